//! The guest's devices for privileged containers, which may use all of them.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use kuasar_sandboxers::{Error, Result, spec::OciSpec};
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

/// What each container has of its own, by the OCI runtime or as a mount; containerd leaves the same out for privileged ones on a node.
const OWN: [&str; 12] = ["console", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "tty", "urandom", "zero"];

/// Gives a container that may use every device the nodes that are below `dev`.
pub(crate) fn add_to_privileged(spec: &mut OciSpec, dev: &Path) -> Result<()> {
    if !may_use_all(spec) {
        return Ok(());
    }
    let mut found = Vec::new();
    list(dev, "/dev", &mut found)?;
    let document = spec.as_value_mut();
    let devices = &mut document["linux"]["devices"];
    if !devices.is_array() {
        *devices = json!([]);
    }
    if let Some(devices) = devices.as_array_mut() {
        found.retain(|device| !devices.iter().any(|asked| asked["path"] == device["path"]));
        devices.append(&mut found);
    }
    Ok(())
}

/// Whether a rule of the container's allows everything.
fn may_use_all(spec: &OciSpec) -> bool {
    let rules = spec.as_value().pointer("/linux/resources/devices").and_then(Value::as_array);
    rules.into_iter().flatten().any(|rule| {
        let any = |key: &str| rule[key].is_null() || rule[key].as_i64().is_some_and(|number| number < 0);
        rule["allow"] == true && any("major") && any("minor") && rule["type"].as_str().is_none_or(|kind| kind == "a")
    })
}

fn list(dir: &Path, shown: &str, found: &mut Vec<Value>) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if shown == "/dev" && OWN.contains(&name.as_str()) {
            continue;
        }
        let path = format!("{shown}/{name}");
        // One that has gone meanwhile is not there to be given.
        let Ok(about) = entry.metadata() else { continue };
        let kind = match about.file_type() {
            kind if kind.is_dir() => {
                list(&entry.path(), &path, found)?;
                continue;
            }
            kind if kind.is_char_device() => "c",
            kind if kind.is_block_device() => "b",
            _ => continue,
        };
        found.push(json!({
            "path": path,
            "type": kind,
            "major": major(about.rdev()),
            "minor": minor(about.rdev()),
            "fileMode": about.mode() & 0o7777,
            "uid": about.uid(),
            "gid": about.gid(),
        }));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use super::*;

    #[test]
    fn privileged_containers_have_all_devices_and_others_none() {
        let rule = |rule: Value| {
            let rules = json!([{"allow": false, "access": "rwm"}, rule]);
            json!({"process": {}, "root": {"path": "/r"}, "linux": {"resources": {"devices": rules}}})
        };
        let given = |before: Value| {
            let mut spec = OciSpec::try_from(before).unwrap();
            add_to_privileged(&mut spec, Path::new("/dev")).unwrap();
            spec.as_value()["linux"]["devices"].as_array().cloned().unwrap_or_default()
        };
        assert!(given(rule(json!({"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}))).is_empty());
        let all = rule(json!({"allow": true, "access": "rwm"}));
        let devices = given(all.clone());
        let names: Vec<_> = devices.iter().filter_map(|device| device["path"].as_str()).collect();
        // What any Linux has that a container is not given by the runtime.
        assert!(names.contains(&"/dev/kmsg") || names.contains(&"/dev/fuse") || names.contains(&"/dev/ttyS0"), "{names:?}");
        assert!(!names.contains(&"/dev/null") && !names.iter().any(|name| name.starts_with("/dev/pts")), "{names:?}");
        let mut asked = all;
        asked["linux"]["devices"] = json!([{"path": names[0], "type": "c", "major": 9, "minor": 9}]);
        let devices = given(asked);
        assert_eq!(devices.len(), names.len());
        assert_eq!(devices[0]["major"], 9);
    }
}
