//! Resource use from cgroup v1, field for field containerd's `io.containerd.cgroups.v1.Metrics`.

use std::{collections::HashMap, fs, path::PathBuf};

use nix::unistd::{SysconfVar, sysconf};

use serde::{Deserialize, Serialize};

use super::files::{Files, device, huge_page_sizes, number};
pub use super::files::{RdmaEntry, RdmaStat};
use crate::error::Result;

/// Resource use. A controller that is not there is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the kernel documents the controllers: Documentation/admin-guide/cgroup-v1
pub struct Stats {
    pub hugetlb: Vec<HugetlbStat>,
    pub pids: Option<PidsStat>,
    pub cpu: Option<CpuStat>,
    pub memory: Option<MemoryStat>,
    pub blkio: Option<BlkIoStat>,
    pub rdma: Option<RdmaStat>,
    pub memory_oom_control: Option<MemoryOomControl>,
}

/// Huge pages of one size; bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct HugetlbStat {
    pub usage: u64,
    pub max: u64,
    pub failcnt: u64,
    pub pagesize: String,
}

/// Processes and threads; a limit of 0 is none, as containerd has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PidsStat {
    pub current: u64,
    pub limit: u64,
}

/// Processor time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuStat {
    pub usage: Option<CpuUsage>,
    pub throttling: Option<Throttle>,
}

/// Processor time in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuUsage {
    pub total: u64,
    pub kernel: u64,
    pub user: u64,
    pub per_cpu: Vec<u64>,
}

/// CFS bandwidth control; time in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Throttle {
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_time: u64,
}

/// `memory.stat` and the counters beside it; bytes, except the counts of pages and faults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MemoryStat {
    pub cache: u64,
    pub rss: u64,
    pub rss_huge: u64,
    pub mapped_file: u64,
    pub dirty: u64,
    pub writeback: u64,
    pub pg_pg_in: u64,
    pub pg_pg_out: u64,
    pub pg_fault: u64,
    pub pg_maj_fault: u64,
    pub inactive_anon: u64,
    pub active_anon: u64,
    pub inactive_file: u64,
    pub active_file: u64,
    pub unevictable: u64,
    pub hierarchical_memory_limit: u64,
    pub hierarchical_swap_limit: u64,
    pub total_cache: u64,
    pub total_rss: u64,
    pub total_rss_huge: u64,
    pub total_mapped_file: u64,
    pub total_dirty: u64,
    pub total_writeback: u64,
    pub total_pg_pg_in: u64,
    pub total_pg_pg_out: u64,
    pub total_pg_fault: u64,
    pub total_pg_maj_fault: u64,
    pub total_inactive_anon: u64,
    pub total_active_anon: u64,
    pub total_inactive_file: u64,
    pub total_active_file: u64,
    pub total_unevictable: u64,
    pub usage: Option<MemoryEntry>,
    pub swap: Option<MemoryEntry>,
    pub kernel: Option<MemoryEntry>,
    pub kernel_tcp: Option<MemoryEntry>,
}

/// A memory counter in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MemoryEntry {
    pub limit: u64,
    pub usage: u64,
    pub max: u64,
    pub failcnt: u64,
}

/// `memory.oom_control`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MemoryOomControl {
    pub oom_kill_disable: u64,
    pub under_oom: u64,
    pub oom_kill: u64,
}

/// Block devices. Where the CFQ scheduler does not count (it left the kernel in 5.0), bytes and operations are those of
/// throttling.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct BlkIoStat {
    pub io_service_bytes_recursive: Vec<BlkIoEntry>,
    pub io_serviced_recursive: Vec<BlkIoEntry>,
    pub io_queued_recursive: Vec<BlkIoEntry>,
    pub io_service_time_recursive: Vec<BlkIoEntry>,
    pub io_wait_time_recursive: Vec<BlkIoEntry>,
    pub io_merged_recursive: Vec<BlkIoEntry>,
    pub io_time_recursive: Vec<BlkIoEntry>,
    pub sectors_recursive: Vec<BlkIoEntry>,
}

/// One counter of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct BlkIoEntry {
    pub op: String,
    pub device: String,
    pub major: u64,
    pub minor: u64,
    pub value: u64,
}

impl Stats {
    /// Reads the files of a group; `dir` gives its directory in the tree of a controller. `None` when there is no such group.
    pub(super) fn read(dir: impl Fn(&str) -> Option<PathBuf>) -> Result<Option<Self>> {
        let files = |controller| dir(controller).map(Files::new);
        let mut stats = Self::default();
        if let Some(mut files) = files("pids") {
            stats.pids = read_pids(&mut files)?;
        }
        let usage = files("cpuacct").map(|mut files| read_cpu_usage(&mut files)).transpose()?.flatten();
        let throttling = files("cpu").map(|mut files| read_throttling(&mut files)).transpose()?.flatten();
        stats.cpu = (usage.is_some() || throttling.is_some()).then_some(CpuStat { usage, throttling });
        if let Some(mut files) = files("memory") {
            stats.memory = read_memory(&mut files)?;
            let mut control = MemoryOomControl::default();
            let there = files.pairs("memory.oom_control", |key, value| match key {
                "oom_kill_disable" => control.oom_kill_disable = value,
                "under_oom" => control.under_oom = value,
                "oom_kill" => control.oom_kill = value,
                _ => {}
            })?;
            stats.memory_oom_control = there.then_some(control);
        }
        if let Some(mut files) = files("blkio") {
            stats.blkio = read_blkio(&mut files)?;
        }
        if let Some(mut files) = files("rdma") {
            let current = files.rdma("rdma.current")?;
            let limit = files.rdma("rdma.max")?;
            stats.rdma = current.zip(limit).map(|(current, limit)| RdmaStat { current, limit });
        }
        if let Some(mut files) = files("hugetlb") {
            for size in huge_page_sizes() {
                stats.hugetlb.extend(read_hugetlb(&mut files, size)?);
            }
        }
        let there = stats != Self::default();
        Ok(there.then_some(stats))
    }
}

fn read_pids(files: &mut Files) -> Result<Option<PidsStat>> {
    let Some(current) = files.number("pids.current")? else { return Ok(None) };
    let limit = files.number("pids.max")?.filter(|limit| *limit != u64::MAX).unwrap_or(0);
    Ok(Some(PidsStat { current, limit }))
}

fn read_cpu_usage(files: &mut Files) -> Result<Option<CpuUsage>> {
    let Some(total) = files.number("cpuacct.usage")? else { return Ok(None) };
    let mut usage = CpuUsage { total, ..CpuUsage::default() };
    let ticks =
        sysconf(SysconfVar::CLK_TCK).ok().flatten().and_then(|ticks| u64::try_from(ticks).ok()).filter(|ticks| *ticks > 0);
    let nanoseconds = 1_000_000_000 / ticks.unwrap_or(100);
    files.pairs("cpuacct.stat", |key, value| match key {
        "user" => usage.user = value * nanoseconds,
        "system" => usage.kernel = value * nanoseconds,
        _ => {}
    })?;
    if let Some(text) = files.text("cpuacct.usage_percpu")? {
        usage.per_cpu = text.split_ascii_whitespace().map(number).collect();
    }
    Ok(Some(usage))
}

fn read_throttling(files: &mut Files) -> Result<Option<Throttle>> {
    let mut throttle = Throttle::default();
    let there = files.pairs("cpu.stat", |key, value| match key {
        "nr_periods" => throttle.periods = value,
        "nr_throttled" => throttle.throttled_periods = value,
        "throttled_time" => throttle.throttled_time = value,
        _ => {}
    })?;
    Ok(there.then_some(throttle))
}

fn read_memory(files: &mut Files) -> Result<Option<MemoryStat>> {
    let mut memory = MemoryStat::default();
    let there = files.pairs("memory.stat", |key, value| {
        let field = match key {
            "cache" => &mut memory.cache,
            "rss" => &mut memory.rss,
            "rss_huge" => &mut memory.rss_huge,
            "mapped_file" => &mut memory.mapped_file,
            "dirty" => &mut memory.dirty,
            "writeback" => &mut memory.writeback,
            "pgpgin" => &mut memory.pg_pg_in,
            "pgpgout" => &mut memory.pg_pg_out,
            "pgfault" => &mut memory.pg_fault,
            "pgmajfault" => &mut memory.pg_maj_fault,
            "inactive_anon" => &mut memory.inactive_anon,
            "active_anon" => &mut memory.active_anon,
            "inactive_file" => &mut memory.inactive_file,
            "active_file" => &mut memory.active_file,
            "unevictable" => &mut memory.unevictable,
            "hierarchical_memory_limit" => &mut memory.hierarchical_memory_limit,
            "hierarchical_memsw_limit" => &mut memory.hierarchical_swap_limit,
            "total_cache" => &mut memory.total_cache,
            "total_rss" => &mut memory.total_rss,
            "total_rss_huge" => &mut memory.total_rss_huge,
            "total_mapped_file" => &mut memory.total_mapped_file,
            "total_dirty" => &mut memory.total_dirty,
            "total_writeback" => &mut memory.total_writeback,
            "total_pgpgin" => &mut memory.total_pg_pg_in,
            "total_pgpgout" => &mut memory.total_pg_pg_out,
            "total_pgfault" => &mut memory.total_pg_fault,
            "total_pgmajfault" => &mut memory.total_pg_maj_fault,
            "total_inactive_anon" => &mut memory.total_inactive_anon,
            "total_active_anon" => &mut memory.total_active_anon,
            "total_inactive_file" => &mut memory.total_inactive_file,
            "total_active_file" => &mut memory.total_active_file,
            "total_unevictable" => &mut memory.total_unevictable,
            _ => return,
        };
        *field = value;
    })?;
    if !there {
        return Ok(None);
    }
    memory.usage = read_entry(files, "memory.")?;
    memory.swap = read_entry(files, "memory.memsw.")?;
    memory.kernel = read_entry(files, "memory.kmem.")?;
    memory.kernel_tcp = read_entry(files, "memory.kmem.tcp.")?;
    Ok(Some(memory))
}

fn read_entry(files: &mut Files, prefix: &str) -> Result<Option<MemoryEntry>> {
    let mut number = |name| files.number(&format!("{prefix}{name}"));
    let Some(usage) = number("usage_in_bytes")? else { return Ok(None) };
    Ok(Some(MemoryEntry {
        usage,
        limit: number("limit_in_bytes")?.unwrap_or_default(),
        max: number("max_usage_in_bytes")?.unwrap_or_default(),
        failcnt: number("failcnt")?.unwrap_or_default(),
    }))
}

fn read_hugetlb(files: &mut Files, size: &str) -> Result<Option<HugetlbStat>> {
    let mut number = |name| files.number(&format!("hugetlb.{size}.{name}"));
    let Some(usage) = number("usage_in_bytes")? else { return Ok(None) };
    Ok(Some(HugetlbStat {
        usage,
        max: number("max_usage_in_bytes")?.unwrap_or_default(),
        failcnt: number("failcnt")?.unwrap_or_default(),
        pagesize: size.into(),
    }))
}

fn read_blkio(files: &mut Files) -> Result<Option<BlkIoStat>> {
    let mut devices = HashMap::new();
    let mut entries = |name: &str| {
        Ok::<_, crate::Error>(
            files.text(name)?.map(|text| text.lines().filter_map(|line| blkio_entry(line, &mut devices)).collect()),
        )
    };
    let mut blkio = BlkIoStat::default();
    if let Some(serviced) = entries("blkio.io_serviced_recursive")? {
        blkio = BlkIoStat {
            io_serviced_recursive: serviced,
            io_service_bytes_recursive: entries("blkio.io_service_bytes_recursive")?.unwrap_or_default(),
            io_queued_recursive: entries("blkio.io_queued_recursive")?.unwrap_or_default(),
            io_service_time_recursive: entries("blkio.io_service_time_recursive")?.unwrap_or_default(),
            io_wait_time_recursive: entries("blkio.io_wait_time_recursive")?.unwrap_or_default(),
            io_merged_recursive: entries("blkio.io_merged_recursive")?.unwrap_or_default(),
            io_time_recursive: entries("blkio.time_recursive")?.unwrap_or_default(),
            sectors_recursive: entries("blkio.sectors_recursive")?.unwrap_or_default(),
        };
        if blkio != BlkIoStat::default() {
            return Ok(Some(blkio));
        }
    }
    // The recursive form came with Linux 5.0.
    let mut either = |name: &str| match entries(&format!("blkio.throttle.{name}_recursive"))? {
        None => entries(&format!("blkio.throttle.{name}")),
        found => Ok(found),
    };
    let Some(serviced) = either("io_serviced")? else { return Ok(None) };
    blkio.io_serviced_recursive = serviced;
    blkio.io_service_bytes_recursive = either("io_service_bytes")?.unwrap_or_default();
    Ok(Some(blkio))
}

/// `8:0 Read 4096`, or without an operation; the line `Total 4096` is none.
fn blkio_entry(line: &str, devices: &mut HashMap<(u64, u64), String>) -> Option<BlkIoEntry> {
    let mut fields = line.split_ascii_whitespace();
    let key = device(fields.next()?)?;
    let (op, value) = match (fields.next()?, fields.next()) {
        (op, Some(value)) => (op, value),
        (value, None) => ("", value),
    };
    let name = devices.entry(key).or_insert_with(|| device_name(key));
    Some(BlkIoEntry { op: op.into(), device: name.clone(), major: key.0, minor: key.1, value: number(value) })
}

fn device_name((major, minor): (u64, u64)) -> String {
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}"));
    let name = link.ok().and_then(|target| Some(target.file_name()?.to_str()?.to_owned()));
    name.map(|name| format!("/dev/{name}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn write(dir: &Path, files: &[(&str, &str)]) {
        for (name, text) in files {
            fs::write(dir.join(name), text).unwrap();
        }
    }

    #[test]
    fn reads_every_controller() {
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[
                ("pids.current", "3\n"),
                ("pids.max", "max\n"),
                ("cpuacct.usage", "5000\n"),
                ("cpuacct.stat", "user 2\nsystem 1\n"),
                ("cpuacct.usage_percpu", "1 2 0 2 \n"),
                ("cpu.stat", "nr_periods 4\nnr_throttled 2\nthrottled_time 77\nnr_bursts 0\n"),
                (
                    "memory.stat",
                    "cache 1\nrss 2\npgpgin 3\nhierarchical_memsw_limit 9\ntotal_rss 5\ntotal_pgmajfault 6\nnew_field 1\n",
                ),
                ("memory.usage_in_bytes", "10\n"),
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory.max_usage_in_bytes", "12\n"),
                ("memory.failcnt", "1\n"),
                ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
                ("blkio.throttle.io_serviced_recursive", "1:1 Read 3\n1:1 Total 3\nTotal 3\n"),
                ("blkio.throttle.io_service_bytes", "1:1 Read 4096\nTotal 4096\n"),
                ("rdma.current", "mlx hca_handle=1 hca_object=2\n"),
                ("rdma.max", "mlx hca_handle=max hca_object=20\n"),
            ],
        );
        let stats = Stats::read(|controller| (controller != "hugetlb").then(|| dir.path().to_owned())).unwrap().unwrap();
        assert_eq!(stats.pids, Some(PidsStat { current: 3, limit: 0 }));
        let cpu = stats.cpu.unwrap();
        let usage = cpu.usage.unwrap();
        assert_eq!((usage.total, usage.user / usage.kernel, usage.per_cpu), (5000, 2, vec![1, 2, 0, 2]));
        assert_eq!(cpu.throttling, Some(Throttle { periods: 4, throttled_periods: 2, throttled_time: 77 }));
        let memory = stats.memory.unwrap();
        assert_eq!((memory.cache, memory.pg_pg_in, memory.hierarchical_swap_limit, memory.total_pg_maj_fault), (1, 3, 9, 6));
        assert_eq!(memory.usage, Some(MemoryEntry { limit: 9_223_372_036_854_771_712, usage: 10, max: 12, failcnt: 1 }));
        assert_eq!(memory.swap, None);
        assert_eq!(stats.memory_oom_control.unwrap().oom_kill, 2);
        let blkio = stats.blkio.unwrap();
        assert_eq!(blkio.io_serviced_recursive.len(), 2);
        assert_eq!(blkio.io_service_bytes_recursive[0].value, 4096);
        assert_eq!(stats.rdma.unwrap().limit[0].hca_handles, u32::MAX);
    }

    #[test]
    fn a_group_that_is_gone_has_no_stats() {
        assert_eq!(Stats::read(|_| Some("/nonexistent".into())).unwrap(), None);
        assert_eq!(Stats::read(|_| None).unwrap(), None);
    }

    proptest! {
        #[test]
        fn block_device_lines(line in "([0-9]{1,3}:[0-9]{1,3} )?[A-Za-z]{0,6} ?[0-9]{0,20}") {
            if let Some(entry) = blkio_entry(&line, &mut HashMap::new()) {
                let prefix = format!("{}:", entry.major);
                prop_assert!(line.trim_start_matches('0').contains(prefix.trim_start_matches('0')));
            }
        }
    }
}
