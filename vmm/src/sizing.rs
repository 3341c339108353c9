//! How large a pod's machine is.
//!
//! | | without a limit | with a limit |
//! |---|---|---|
//! | processors | `cpus` | the limit, rounded up |
//! | memory | `memory_mib` | the limit and what the guest takes: `guest_overhead_mib`, and 1/64 of the limit to describe its pages |
//!
//! Huge pages come on top of that. No machine has less than its kernel needs to boot. A limit above what the node has is legal, and gives what
//! the node has.
//!
//! An annotation, where allowed, says it outright, and is refused where it cannot be. A container's own limits hold inside, by control groups of the guest. The host's control
//! group of the pod, which kubelet makes of the containers' limits and the RuntimeClass's overhead, holds the machine as a whole.

use std::collections::BTreeMap;

use kuasar_sandboxers::{
    Error, Result,
    types::{PodResources, Resources},
};
use nix::{
    sys::sysinfo::sysinfo,
    unistd::{SysconfVar, sysconf},
};
use serde::{Deserialize, Serialize};

use crate::{
    config::{Annotation, VmmConfig},
    spec::{Cpus, Memory},
};

/// Linux describes each page of 4096 bytes by 64 bytes of `struct page`.
const DESCRIBED: u64 = 64;

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
        // Not std's available_parallelism, which is what this daemon may use: its CPU quota and affinity say nothing about pods.
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).map_err(Error::failed("count the processors"))?;
        let memory = sysinfo().map_err(Error::failed("ask for the host's memory"))?.ram_total();
        let cpus = cpus.and_then(|count| u32::try_from(count).ok()).unwrap_or(1).max(1);
        Ok(Self { cpus, memory_mib: memory >> 20 })
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

/// The size of a pod's machine, which is at least `boot_mib`, in MiB: what its kernel needs to boot.
///
/// # Errors
/// [`Error::Invalid`] for annotations that are not allowed, mean nothing, or ask for what the host or the kernel cannot do.
pub(crate) fn of(
    config: &VmmConfig,
    boot_mib: u64,
    host: Host,
    resources: &PodResources,
    annotations: &BTreeMap<String, String>,
    can_grow: bool,
) -> Result<Size> {
    let asked = read(config, annotations)?;
    let containers = resources.containers.as_ref();
    let cpus = match asked.get(&Annotation::Cpus) {
        Some(0) => return Err(refused(Annotation::Cpus, "a VM has at least one processor")),
        Some(count) if *count > host.cpus.into() => {
            return Err(refused(Annotation::Cpus, format!("{count} processors; this node has {}", host.cpus)));
        }
        Some(count) => *count,
        None => containers.and_then(cpu_limit).unwrap_or(config.cpus.into()),
    };
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX).min(host.cpus).max(1);
    let limit = containers.and_then(memory_limit_mib);
    let huge_pages_mib = containers.map_or(0, huge_pages_mib);
    let memory_mib = match asked.get(&Annotation::MemoryMib) {
        Some(mib) if *mib < boot_mib => {
            let why = format!(
                "memory limit too small: the VM would have {mib} MiB, and its kernel needs {boot_mib} MiB to boot; raise it, or leave it out"
            );
            return Err(refused(Annotation::MemoryMib, why));
        }
        Some(mib) if *mib > host.memory_mib => {
            return Err(refused(Annotation::MemoryMib, format!("{mib} MiB; this node has {} MiB", host.memory_mib)));
        }
        Some(mib) => *mib,
        None => {
            let memory = limit.map_or(config.memory_mib, |limit| with_guest(config, limit)).max(boot_mib);
            memory.saturating_add(huge_pages_mib).min(host.memory_mib.max(boot_mib))
        }
    };
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

fn refused(annotation: Annotation, why: impl Into<String>) -> Error {
    Error::invalid(format!("annotation {}{annotation}", Annotation::PREFIX), why)
}

/// The memory of a machine whose containers may use `limit`, both in MiB.
fn with_guest(config: &VmmConfig, limit: u64) -> u64 {
    limit.saturating_add(limit.div_ceil(DESCRIBED)).saturating_add(config.guest_overhead_mib)
}

/// What a pod's containers may use together, in bytes, where they are limited; `None` where they are not. The guest's overhead is on top: it is
/// the machine as a whole that the node's control group limits, and a pod where only some containers have limits says the sum of those.
pub(crate) fn pod_limit_bytes(config: &VmmConfig, resources: &PodResources) -> Option<u64> {
    let limit = resources.containers.as_ref().and_then(memory_limit_mib)?;
    Some(limit.saturating_add(config.guest_overhead_mib).min(u64::MAX >> 20) << 20)
}

/// How many processors and how much memory a running machine should have when its pod's resources have changed: never less than it has.
pub(crate) fn grown(config: &VmmConfig, now: Size, resources: &PodResources) -> Size {
    let containers = resources.containers.as_ref();
    let cpus = containers.and_then(cpu_limit).and_then(|count| u32::try_from(count).ok()).unwrap_or(now.cpus.boot);
    let limit = containers.and_then(memory_limit_mib);
    let limit = limit.map(|limit| with_guest(config, limit).saturating_add(now.huge_pages_mib));
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
    const BOOT_MIB: u64 = 96;

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
        let size = of(&config(), BOOT_MIB, HOST, resources, &annotated(annotations), true)?;
        Ok((size.cpus.boot, size.memory.boot_mib))
    }

    #[test]
    fn limits_and_defaults() {
        assert_eq!(size(&PodResources::default(), &[]).unwrap(), (1, 512));
        assert_eq!(size(&pod(-1, 0), &[]).unwrap(), (1, 512));
        assert_eq!(size(&pod(150_000, (100 << 20) + 1), &[]).unwrap(), (2, 101 + 2 + 80));
        assert_eq!(size(&pod(-1, 4096 << 20), &[]).unwrap(), (1, 4096 + 64 + 80));
        // Whatever the limit: it boots.
        assert_eq!(size(&pod(-1, 1), &[]).unwrap(), (1, BOOT_MIB));
        // Limits above what the node has are legal.
        assert_eq!(size(&pod(6_400_000, 9000 << 20), &[]).unwrap(), (4, 8192));
        assert_eq!(size(&pod(150_000, 100 << 20), &[("cpus", "3"), ("memory_mib", "128")]).unwrap(), (3, 128));
        let mut huge = pod(-1, 100 << 20);
        huge.containers.as_mut().unwrap().huge_page_limits = BTreeMap::from([(2 << 20, 64 << 20), (1 << 30, 1 << 30)]);
        assert_eq!(size(&huge, &[]).unwrap(), (1, 100 + 2 + 80 + 64 + 1024));
        assert_eq!(size(&huge, &[("memory_mib", "512")]).unwrap(), (1, 512));
    }

    #[test]
    fn how_far_it_grows() {
        let max = |host: u64, most| {
            let config = VmmConfig { max_memory_mib: most, memory_mib: 256, ..config() };
            let host = Host { memory_mib: host, ..HOST };
            of(&config, BOOT_MIB, host, &PodResources::default(), &BTreeMap::new(), true).unwrap().memory.max_mib
        };
        assert_eq!((max(1024, 0), max(8192, 0), max(8192, 512), max(8192, 8000)), (1024, 4096, 512, 4096));
    }

    #[test]
    fn what_cannot_be() {
        let refused =
            |resources: &PodResources, annotations: &[(&str, &str)]| size(resources, annotations).unwrap_err().to_string();
        assert!(refused(&pod(0, 0), &[("cpus", "5")]).contains("5 processors; this node has 4"));
        assert!(refused(&pod(0, 0), &[("cpus", "0")]).contains("at least one processor"));
        assert!(refused(&pod(0, 0), &[("memory_mib", "9000")]).contains("this node has 8192 MiB"));
        assert!(refused(&pod(0, 1), &[("memory_mib", "32")]).contains("the VM would have 32 MiB, and its kernel needs 96 MiB"));
        assert!(refused(&pod(0, 0), &[("cpus", "many")]).contains("annotation io.kuasar.vm.cpus: \"many\" is no whole number"));
        assert!(refused(&pod(0, 0), &[("kernel", "/x")]).contains("accepted: cpus, memory_mib"));
        let strict = VmmConfig { annotations: [Annotation::Cpus].into(), ..config() };
        let error = of(&strict, BOOT_MIB, HOST, &pod(0, 0), &annotated(&[("memory_mib", "128")]), true).unwrap_err();
        assert!(error.to_string().contains("not allowed"), "{error}");
        let others = BTreeMap::from([("io.kubernetes.x".to_owned(), "y".to_owned())]);
        of(&config(), BOOT_MIB, HOST, &pod(0, 0), &others, true).unwrap();
    }

    #[test]
    fn the_pods_limit_and_what_the_guest_takes() {
        assert_eq!(pod_limit_bytes(&config(), &PodResources::default()), None);
        assert_eq!(pod_limit_bytes(&config(), &pod(-1, 200 << 20)), Some(280 << 20));
        assert!(pod_limit_bytes(&config(), &pod(-1, i64::MAX)).unwrap() > i64::MAX as u64);
    }

    proptest! {
        #[test]
        fn machines_fit_the_host_and_never_shrink(
            (quota, bytes) in (-5i64..2_000_000, -5i64..(20 << 30)),
            (more_quota, more_bytes) in (any::<i64>(), any::<i64>()),
            can_grow in any::<bool>(),
        ) {
            if let Ok(size) = of(&config(), BOOT_MIB, HOST, &pod(quota, bytes), &BTreeMap::new(), can_grow) {
                prop_assert!(size.cpus.boot >= 1 && size.cpus.boot <= size.cpus.max && size.cpus.max <= HOST.cpus);
                prop_assert!(size.memory.boot_mib >= BOOT_MIB && size.memory.boot_mib <= size.memory.max_mib);
                prop_assert!(size.memory.max_mib <= HOST.memory_mib);
                let after = grown(&config(), size, &pod(more_quota, more_bytes));
                prop_assert!(after.cpus.boot >= size.cpus.boot && after.cpus.boot <= size.cpus.max);
                prop_assert!(after.memory.boot_mib >= size.memory.boot_mib && after.memory.boot_mib <= size.memory.max_mib);
            }
        }
    }
}
