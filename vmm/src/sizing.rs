//! How large a pod's machine is.
//!
//! | | without a limit | with a limit |
//! |---|---|---|
//! | processors | `cpus` | the limit, rounded up |
//! | memory | `memory_mib` | the limit and `guest_overhead_mib`, which the guest's kernel and agent take |
//!
//! Huge pages come on top of that.
//!
//! An annotation, where allowed, says it outright. A container's own limits hold inside, by control groups of the guest. The host's control
//! group of the pod, which kubelet makes of the containers' limits and the RuntimeClass's overhead, holds the machine as a whole.

use std::collections::BTreeMap;

use kuasar_sandboxers::{
    Error, Result,
    types::{PodResources, Resources},
};
use nix::sys::sysinfo::sysinfo;
use serde::{Deserialize, Serialize};

use crate::{
    config::{Annotation, VmmConfig},
    spec::{Cpus, Memory},
};

/// The least memory that a guest boots with, in MiB.
pub(crate) const LEAST_MIB: u64 = 64;

/// Memory comes in blocks of this size when it is added (x86), in MiB.
const BLOCK_MIB: u64 = 128;

/// How many times as large as it is at first a machine's memory can become: what is added is described in what is there already, with 64
/// bytes for each page, and may come in a quarter of the whole way.
const GROWTH: u64 = 16;

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
}

impl Host {
    pub(crate) fn look() -> Result<Self> {
        let cpus = std::thread::available_parallelism().map_err(Error::failed("count the processors"))?;
        let memory = sysinfo().map_err(Error::failed("ask for the host's memory"))?.ram_total();
        Ok(Self { cpus: u32::try_from(cpus.get()).unwrap_or(u32::MAX), memory_mib: memory >> 20 })
    }
}

/// How large a machine is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Size {
    pub(crate) cpus: Cpus,
    pub(crate) memory: Memory,
    /// How much of the memory is set apart for huge pages, in MiB.
    #[serde(default)]
    pub(crate) huge_pages_mib: u64,
}

/// The size of a pod's machine.
///
/// # Errors
/// [`Error::Invalid`] for annotations that are not allowed or mean nothing, and for more than the host has.
pub(crate) fn of(
    config: &VmmConfig,
    host: Host,
    resources: &PodResources,
    annotations: &BTreeMap<String, String>,
    can_grow: bool,
) -> Result<Size> {
    let asked = read(config, annotations)?;
    let number = |annotation| asked.get(&annotation).copied();
    let containers = resources.containers.as_ref();
    let cpus = number(Annotation::Cpus)
        .or_else(|| containers.and_then(cpu_limit))
        .map_or(config.cpus, |count| u32::try_from(count).unwrap_or(u32::MAX));
    if cpus == 0 || cpus > host.cpus {
        let why = format!("a machine of {cpus} processors; this host has {}, and one is the least", host.cpus);
        return Err(Error::invalid("size of the pod", why));
    }
    let limit = containers.and_then(memory_limit_mib);
    let huge_pages_mib = containers.map_or(0, huge_pages_mib);
    let memory_mib = number(Annotation::MemoryMib).unwrap_or_else(|| {
        let memory = limit.map_or(config.memory_mib, |limit| limit.saturating_add(config.guest_overhead_mib));
        memory.saturating_add(huge_pages_mib)
    });
    if memory_mib < LEAST_MIB || memory_mib > host.memory_mib {
        let why = format!(
            "a machine with {memory_mib} MiB of memory; accepted: {LEAST_MIB} MiB, which a guest needs to boot, to {} MiB, which this host has",
            host.memory_mib
        );
        return Err(Error::invalid("size of the pod", why));
    }
    let max_cpus = if can_grow { config.max_cpus.min(host.cpus).max(cpus) } else { cpus };
    let max_mib = match (can_grow, config.max_memory_mib) {
        (false, _) => memory_mib,
        (true, 0) => host.memory_mib,
        (true, most) => most.min(host.memory_mib),
    };
    let max_mib = max_mib.min(GROWTH.saturating_mul(memory_mib)).max(memory_mib);
    Ok(Size {
        cpus: Cpus { boot: cpus, max: max_cpus },
        memory: Memory {
            boot_mib: memory_mib,
            max_mib: memory_mib + (max_mib - memory_mib) / BLOCK_MIB * BLOCK_MIB,
            huge_page_kib: None,
        },
        huge_pages_mib,
    })
}

/// How many processors and how much memory a running machine should have when its pod's resources have changed: never less than it has.
pub(crate) fn grown(config: &VmmConfig, now: Size, resources: &PodResources) -> Size {
    let containers = resources.containers.as_ref();
    let cpus = containers.and_then(cpu_limit).and_then(|count| u32::try_from(count).ok()).unwrap_or(now.cpus.boot);
    let beside = config.guest_overhead_mib.saturating_add(now.huge_pages_mib);
    let limit = containers.and_then(memory_limit_mib).map(|limit| limit.saturating_add(beside));
    let missing = limit.unwrap_or(0).saturating_sub(now.memory.boot_mib).next_multiple_of(BLOCK_MIB);
    Size {
        cpus: Cpus { boot: cpus.clamp(now.cpus.boot, now.cpus.max), ..now.cpus },
        memory: Memory { boot_mib: (now.memory.boot_mib + missing).min(now.memory.max_mib), ..now.memory },
        ..now
    }
}

fn cpu_limit(resources: &Resources) -> Option<u64> {
    let quota = u64::try_from(resources.cpu_quota).ok().filter(|quota| *quota > 0)?;
    let period = u64::try_from(resources.cpu_period).ok().filter(|period| *period > 0)?;
    Some(quota.div_ceil(period))
}

fn memory_limit_mib(resources: &Resources) -> Option<u64> {
    let bytes = u64::try_from(resources.memory_limit_bytes).ok().filter(|bytes| *bytes > 0)?;
    Some(bytes.div_ceil(1 << 20))
}

/// Huge pages are not counted as memory by control groups, so they come beside its limit.
fn huge_pages_mib(resources: &Resources) -> u64 {
    resources.huge_page_limits.values().fold(0, |sum: u64, bytes| sum.saturating_add(bytes.div_ceil(1 << 20)))
}

/// The pod's annotations that are for us.
fn read(config: &VmmConfig, annotations: &BTreeMap<String, String>) -> Result<BTreeMap<Annotation, u64>> {
    let ours = annotations.iter().filter_map(|(key, value)| Some((key, key.strip_prefix(Annotation::PREFIX)?, value)));
    ours.map(|(key, name, value)| {
        let invalid = |why: String| Error::invalid(format!("annotation {key}"), why);
        let annotation: Annotation = name.parse().map_err(invalid)?;
        if !config.annotations.contains(&annotation) {
            return Err(invalid(
                "it is not allowed here; the sandboxer's configuration lists in `annotations` what pods may set".into(),
            ));
        }
        let number = value.parse().map_err(|_| invalid(format!("{value:?} is no whole number")))?;
        Ok((annotation, number))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::HypervisorConfig;

    const HOST: Host = Host { cpus: 4, memory_mib: 8192 };

    fn config() -> VmmConfig {
        VmmConfig::new(HypervisorConfig::Qemu(Default::default()), "/r".into())
    }

    fn pod(quota: i64, bytes: i64) -> PodResources {
        let containers = Resources { cpu_period: 100_000, cpu_quota: quota, memory_limit_bytes: bytes, ..Resources::default() };
        PodResources { overhead: None, containers: Some(containers) }
    }

    fn annotated(list: &[(&str, &str)]) -> BTreeMap<String, String> {
        list.iter().map(|(name, value)| (format!("io.kuasar.vm.{name}"), (*value).to_owned())).collect()
    }

    fn size(resources: &PodResources, annotations: &[(&str, &str)]) -> Result<(u32, u64)> {
        let size = of(&config(), HOST, resources, &annotated(annotations), true)?;
        Ok((size.cpus.boot, size.memory.boot_mib))
    }

    #[test]
    fn limits_and_defaults() {
        assert_eq!(size(&PodResources::default(), &[]).unwrap(), (1, 512));
        assert_eq!(size(&pod(-1, 0), &[]).unwrap(), (1, 512));
        assert_eq!(size(&pod(150_000, (100 << 20) + 1), &[]).unwrap(), (2, 149));
        assert_eq!(size(&pod(150_000, 100 << 20), &[("cpus", "3"), ("memory_mib", "128")]).unwrap(), (3, 128));
        let mut huge = pod(-1, 100 << 20);
        huge.containers.as_mut().unwrap().huge_page_limits = BTreeMap::from([(2 << 20, 64 << 20), (1 << 30, 1 << 30)]);
        assert_eq!(size(&huge, &[]).unwrap(), (1, 148 + 64 + 1024));
        assert_eq!(size(&huge, &[("memory_mib", "512")]).unwrap(), (1, 512));
    }

    #[test]
    fn how_far_it_grows() {
        let max = |host: u64, most| {
            let config = VmmConfig { max_memory_mib: most, memory_mib: 256, ..config() };
            let host = Host { memory_mib: host, ..HOST };
            of(&config, host, &PodResources::default(), &BTreeMap::new(), true).unwrap().memory.max_mib
        };
        assert_eq!((max(1024, 0), max(8192, 0), max(8192, 512), max(8192, 8000)), (1024, 4096, 512, 4096));
    }

    #[test]
    fn what_cannot_be() {
        let refused =
            |resources: &PodResources, annotations: &[(&str, &str)]| size(resources, annotations).unwrap_err().to_string();
        assert!(refused(&pod(500_000, 0), &[]).contains("this host has 4"));
        assert!(refused(&pod(0, 9000 << 20), &[]).contains("8192 MiB, which this host has"));
        assert!(refused(&pod(0, 1), &[("memory_mib", "32")]).contains("64 MiB, which a guest needs"));
        assert!(refused(&pod(0, 0), &[("cpus", "many")]).contains("annotation io.kuasar.vm.cpus: \"many\" is no whole number"));
        assert!(refused(&pod(0, 0), &[("kernel", "/x")]).contains("accepted: cpus, memory_mib"));
        let strict = VmmConfig { annotations: [Annotation::Cpus].into(), ..config() };
        let error = of(&strict, HOST, &pod(0, 0), &annotated(&[("memory_mib", "128")]), true).unwrap_err();
        assert!(error.to_string().contains("not allowed"), "{error}");
        let others = BTreeMap::from([("io.kubernetes.x".to_owned(), "y".to_owned())]);
        of(&config(), HOST, &pod(0, 0), &others, true).unwrap();
    }

    proptest! {
        #[test]
        fn machines_fit_the_host_and_never_shrink(
            (quota, bytes) in (-5i64..2_000_000, -5i64..(20 << 30)),
            (more_quota, more_bytes) in (any::<i64>(), any::<i64>()),
            can_grow in any::<bool>(),
        ) {
            if let Ok(size) = of(&config(), HOST, &pod(quota, bytes), &BTreeMap::new(), can_grow) {
                prop_assert!(size.cpus.boot >= 1 && size.cpus.boot <= size.cpus.max && size.cpus.max <= HOST.cpus);
                prop_assert!(size.memory.boot_mib >= LEAST_MIB && size.memory.boot_mib <= size.memory.max_mib);
                prop_assert!(size.memory.max_mib <= HOST.memory_mib);
                let after = grown(&config(), size, &pod(more_quota, more_bytes));
                prop_assert!(after.cpus.boot >= size.cpus.boot && after.cpus.boot <= size.cpus.max);
                prop_assert!(after.memory.boot_mib >= size.memory.boot_mib && after.memory.boot_mib <= size.memory.max_mib);
            }
        }
    }
}
