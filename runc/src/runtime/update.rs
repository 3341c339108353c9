//! What of an update of resources is passed on to a runtime.
//!
//! runc takes all of it or nothing; crun writes one setting after the other and stops at the first that the kernel refuses. So what
//! can be seen to be refused is refused before, for every runtime alike.

use std::{fs, ops::RangeInclusive, path::Path};

use kuasar_sandboxers::{Error, Result};
use serde_json::Value;

/// What the kernel accepts as period and, if it is a limit, as quota, in microseconds (Documentation/scheduler/sched-bwc.rst).
const PERIOD: RangeInclusive<i64> = 1_000..=1_000_000;
const LEAST_QUOTA: i64 = 1_000;

/// An OCI `linux.resources` object as the runtime is to see it.
///
/// # Errors
/// [`Error::Invalid`] for what the kernel would refuse.
pub(super) fn document(resources: &Value) -> Result<Value> {
    let possible = fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    check(resources, possible.trim(), unified)?;
    let mut resources = resources.clone();
    if let Some(resources) = resources.as_object_mut() {
        // containerd sends those that the container was made with. They are as they were, and crun would take them all away
        // for a moment to write them again.
        resources.remove("devices");
    }
    Ok(resources)
}

/// Whether CPU time is not to be limited any more.
pub(super) fn lifts_quota(resources: &Value) -> bool {
    resources["cpu"]["quota"].as_i64().is_some_and(|quota| quota < 0)
}

fn check(resources: &Value, possible: &str, unified: bool) -> Result<()> {
    let cpu = &resources["cpu"];
    if let Some(period) = cpu["period"].as_i64().filter(|period| *period != 0 && !PERIOD.contains(period)) {
        let why = format!("{period} is out of range; accepted: {} to {} microseconds", PERIOD.start(), PERIOD.end());
        return Err(Error::invalid("CPU period", why));
    }
    if let Some(quota) = cpu["quota"].as_i64().filter(|quota| (1..LEAST_QUOTA).contains(quota)) {
        return Err(Error::invalid("CPU quota", format!("{quota} is too small; accepted: {LEAST_QUOTA} microseconds or more")));
    }
    if let Some(cpus) = cpu["cpus"].as_str().filter(|cpus| !cpus.is_empty()) {
        let within = ranges(cpus).zip(ranges(possible)).is_none_or(|(asked, there)| {
            asked.iter().all(|asked| there.iter().any(|there| there.contains(asked.start()) && there.contains(asked.end())))
        });
        if ranges(cpus).is_none() || !within {
            return Err(Error::invalid("cpuset.cpus", format!("{cpus:?} is not of this node's processors, {possible}")));
        }
    }
    if !unified && resources["unified"].as_object().is_some_and(|settings| !settings.is_empty()) {
        return Err(Error::invalid("unified resources", "this node has cgroup v1, where there are no such settings"));
    }
    Ok(())
}

/// A list as cpuset(7) has it: `0-3,7`.
fn ranges(list: &str) -> Option<Vec<RangeInclusive<u32>>> {
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let range = first.parse().ok()?..=last.parse().ok()?;
        (!range.is_empty()).then_some(range)
    };
    list.split(',').map(|text| range(text.trim())).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn devices_stay_as_they_are() {
        let update = json!({ "devices": [{ "allow": false, "access": "rwm" }], "memory": { "limit": 1 << 26 } });
        assert_eq!(document(&update).unwrap(), json!({ "memory": { "limit": 1 << 26 } }));
    }

    #[test]
    fn what_the_kernel_would_refuse() {
        let refused = |update: Value, unified| check(&update, "0-3", unified).is_err();
        for update in [
            json!({ "cpu": { "quota": 1 } }),
            json!({ "cpu": { "period": 1 } }),
            json!({ "cpu": { "period": 2_000_000 } }),
            json!({ "cpu": { "cpus": "2-4" } }),
            json!({ "cpu": { "cpus": "3-1" } }),
            json!({ "cpu": { "cpus": "x" } }),
        ] {
            assert!(refused(update.clone(), true), "{update}");
        }
        for update in [
            json!({}),
            json!({ "cpu": { "quota": -1, "period": 100_000, "shares": 2 } }),
            json!({ "cpu": { "quota": 0, "period": 0, "cpus": "" } }),
            json!({ "cpu": { "quota": 1_000, "cpus": "0,2-3" } }),
            json!({ "unified": {} }),
        ] {
            assert!(!refused(update.clone(), false), "{update}");
        }
        let unified = json!({ "unified": { "memory.high": "1" } });
        assert!(refused(unified.clone(), false) && !refused(unified, true));
    }
}
