//! Resource use from cgroup v2, field for field containerd's `io.containerd.cgroups.v2.Metrics`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files::{Files, device, huge_page_sizes, key_values, number};
pub use super::files::{RdmaEntry, RdmaStat};
use crate::error::Result;

/// Resource use. A controller that is not there is `None`. A limit that is not set is `u64::MAX`, as containerd has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // the kernel documents the fields: Documentation/admin-guide/cgroup-v2.rst
pub struct Stats {
    pub pids: Option<PidsStat>,
    pub cpu: Option<CpuStat>,
    pub memory: Option<MemoryStat>,
    pub rdma: Option<RdmaStat>,
    pub io: Option<IoStat>,
    pub hugetlb: Vec<HugeTlbStat>,
    pub memory_events: Option<MemoryEvents>,
}

/// Pressure stall information: the share of time in which some or all waited, in percent, and the time in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PsiStats {
    pub some: Option<PsiData>,
    pub full: Option<PsiData>,
}

/// One line of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PsiData {
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
    pub total: u64,
}

/// Processes and threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PidsStat {
    pub current: u64,
    pub limit: u64,
}

/// Processor time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuStat {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub nr_periods: u64,
    pub nr_throttled: u64,
    pub throttled_usec: u64,
    pub psi: Option<PsiStats>,
    pub nr_bursts: u64,
    pub burst_usec: u64,
}

/// Memory; bytes, except the counts of events.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MemoryStat {
    pub anon: u64,
    pub file: u64,
    pub kernel_stack: u64,
    pub slab: u64,
    pub sock: u64,
    pub shmem: u64,
    pub file_mapped: u64,
    pub file_dirty: u64,
    pub file_writeback: u64,
    pub anon_thp: u64,
    pub inactive_anon: u64,
    pub active_anon: u64,
    pub inactive_file: u64,
    pub active_file: u64,
    pub unevictable: u64,
    pub slab_reclaimable: u64,
    pub slab_unreclaimable: u64,
    pub pgfault: u64,
    pub pgmajfault: u64,
    pub workingset_refault: u64,
    pub workingset_activate: u64,
    pub workingset_nodereclaim: u64,
    pub pgrefill: u64,
    pub pgscan: u64,
    pub pgsteal: u64,
    pub pgactivate: u64,
    pub pgdeactivate: u64,
    pub pglazyfree: u64,
    pub pglazyfreed: u64,
    pub thp_fault_alloc: u64,
    pub thp_collapse_alloc: u64,
    pub usage: u64,
    pub usage_limit: u64,
    pub swap_usage: u64,
    pub swap_limit: u64,
    pub max_usage: u64,
    pub swap_max_usage: u64,
    pub psi: Option<PsiStats>,
}

/// `memory.events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MemoryEvents {
    pub low: u64,
    pub high: u64,
    pub max: u64,
    pub oom: u64,
    pub oom_kill: u64,
    pub oom_group_kill: u64,
}

/// Block devices.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct IoStat {
    pub usage: Vec<IoEntry>,
    pub psi: Option<PsiStats>,
}

/// One device; bytes and operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct IoEntry {
    pub major: u64,
    pub minor: u64,
    pub rbytes: u64,
    pub wbytes: u64,
    pub rios: u64,
    pub wios: u64,
}

/// Huge pages of one size; bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct HugeTlbStat {
    pub current: u64,
    pub max: u64,
    pub pagesize: String,
    pub failcnt: u64,
}

impl Stats {
    /// Reads the files of a group. `None` when there is no such group.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>> {
        let mut files = Files::new(dir.to_owned());
        let files = &mut files;
        let mut stats = Self { cpu: read_cpu(files)?, memory: read_memory(files)?, ..Self::default() };
        if let Some(current) = files.number("pids.current")? {
            stats.pids = Some(PidsStat { current, limit: files.number("pids.max")?.unwrap_or(u64::MAX) });
        }
        stats.memory_events = read_memory_events(files)?;
        if let Some(text) = files.text("io.stat")? {
            let usage = text.lines().filter_map(io_entry).collect();
            stats.io = Some(IoStat { usage, psi: read_psi(files, "io.pressure")? });
        }
        let current = files.rdma("rdma.current")?;
        let limit = files.rdma("rdma.max")?;
        stats.rdma = current.zip(limit).map(|(current, limit)| RdmaStat { current, limit });
        for size in huge_page_sizes() {
            stats.hugetlb.extend(read_hugetlb(files, size)?);
        }
        let there = stats != Self::default();
        Ok(there.then_some(stats))
    }
}

fn read_cpu(files: &mut Files) -> Result<Option<CpuStat>> {
    let mut cpu = CpuStat::default();
    let there = files.pairs("cpu.stat", |key, value| {
        let field = match key {
            "usage_usec" => &mut cpu.usage_usec,
            "user_usec" => &mut cpu.user_usec,
            "system_usec" => &mut cpu.system_usec,
            "nr_periods" => &mut cpu.nr_periods,
            "nr_throttled" => &mut cpu.nr_throttled,
            "throttled_usec" => &mut cpu.throttled_usec,
            "nr_bursts" => &mut cpu.nr_bursts,
            "burst_usec" => &mut cpu.burst_usec,
            _ => return,
        };
        *field = value;
    })?;
    cpu.psi = read_psi(files, "cpu.pressure")?;
    Ok(there.then_some(cpu))
}

fn read_memory(files: &mut Files) -> Result<Option<MemoryStat>> {
    let mut memory = MemoryStat::default();
    let there = files.pairs("memory.stat", |key, value| {
        let field = match key {
            "anon" => &mut memory.anon,
            "file" => &mut memory.file,
            "kernel_stack" => &mut memory.kernel_stack,
            "slab" => &mut memory.slab,
            "sock" => &mut memory.sock,
            "shmem" => &mut memory.shmem,
            "file_mapped" => &mut memory.file_mapped,
            "file_dirty" => &mut memory.file_dirty,
            "file_writeback" => &mut memory.file_writeback,
            "anon_thp" => &mut memory.anon_thp,
            "inactive_anon" => &mut memory.inactive_anon,
            "active_anon" => &mut memory.active_anon,
            "inactive_file" => &mut memory.inactive_file,
            "active_file" => &mut memory.active_file,
            "unevictable" => &mut memory.unevictable,
            "slab_reclaimable" => &mut memory.slab_reclaimable,
            "slab_unreclaimable" => &mut memory.slab_unreclaimable,
            "pgfault" => &mut memory.pgfault,
            "pgmajfault" => &mut memory.pgmajfault,
            // Linux 5.9 split these two; together they are what the field means.
            "workingset_refault" | "workingset_refault_anon" | "workingset_refault_file" => {
                memory.workingset_refault += value;
                return;
            }
            "workingset_activate" | "workingset_activate_anon" | "workingset_activate_file" => {
                memory.workingset_activate += value;
                return;
            }
            "workingset_nodereclaim" => &mut memory.workingset_nodereclaim,
            "pgrefill" => &mut memory.pgrefill,
            "pgscan" => &mut memory.pgscan,
            "pgsteal" => &mut memory.pgsteal,
            "pgactivate" => &mut memory.pgactivate,
            "pgdeactivate" => &mut memory.pgdeactivate,
            "pglazyfree" => &mut memory.pglazyfree,
            "pglazyfreed" => &mut memory.pglazyfreed,
            "thp_fault_alloc" => &mut memory.thp_fault_alloc,
            "thp_collapse_alloc" => &mut memory.thp_collapse_alloc,
            _ => return,
        };
        *field = value;
    })?;
    if !there {
        return Ok(None);
    }
    memory.usage = files.number("memory.current")?.unwrap_or_default();
    memory.usage_limit = files.number("memory.max")?.unwrap_or(u64::MAX);
    memory.max_usage = files.number("memory.peak")?.unwrap_or_default();
    memory.swap_usage = files.number("memory.swap.current")?.unwrap_or_default();
    memory.swap_limit = files.number("memory.swap.max")?.unwrap_or_default();
    memory.swap_max_usage = files.number("memory.swap.peak")?.unwrap_or_default();
    memory.psi = read_psi(files, "memory.pressure")?;
    Ok(Some(memory))
}

fn read_memory_events(files: &mut Files) -> Result<Option<MemoryEvents>> {
    let mut events = MemoryEvents::default();
    let there = files.pairs("memory.events", |key, value| match key {
        "low" => events.low = value,
        "high" => events.high = value,
        "max" => events.max = value,
        "oom" => events.oom = value,
        "oom_kill" => events.oom_kill = value,
        "oom_group_kill" => events.oom_group_kill = value,
        _ => {}
    })?;
    Ok(there.then_some(events))
}

fn read_hugetlb(files: &mut Files, size: &str) -> Result<Option<HugeTlbStat>> {
    let Some(current) = files.number(&format!("hugetlb.{size}.current"))? else { return Ok(None) };
    let mut stat = HugeTlbStat { current, max: u64::MAX, pagesize: size.into(), failcnt: 0 };
    if let Some(max) = files.number(&format!("hugetlb.{size}.max"))? {
        stat.max = max;
    }
    files.pairs(&format!("hugetlb.{size}.events"), |key, value| {
        if key == "max" {
            stat.failcnt = value;
        }
    })?;
    Ok(Some(stat))
}

/// `8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0`.
fn io_entry(line: &str) -> Option<IoEntry> {
    let mut fields = line.split_ascii_whitespace();
    let (major, minor) = device(fields.next()?)?;
    let mut entry = IoEntry { major, minor, ..IoEntry::default() };
    for (key, value) in key_values(fields) {
        match key {
            "rbytes" => entry.rbytes = number(value),
            "wbytes" => entry.wbytes = number(value),
            "rios" => entry.rios = number(value),
            "wios" => entry.wios = number(value),
            _ => {}
        }
    }
    Some(entry)
}

fn read_psi(files: &mut Files, name: &str) -> Result<Option<PsiStats>> {
    Ok(files.text(name)?.map(psi))
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and a line `full …`.
fn psi(text: &str) -> PsiStats {
    let mut stats = PsiStats::default();
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace();
        let slot = match fields.next() {
            Some("some") => &mut stats.some,
            Some("full") => &mut stats.full,
            _ => continue,
        };
        let mut data = PsiData::default();
        for (key, value) in key_values(fields) {
            let average = || value.parse().unwrap_or_default();
            match key {
                "avg10" => data.avg10 = average(),
                "avg60" => data.avg60 = average(),
                "avg300" => data.avg300 = average(),
                "total" => data.total = number(value),
                _ => {}
            }
        }
        *slot = Some(data);
    }
    stats
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_every_controller() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("cpu.stat", "usage_usec 9\nuser_usec 6\nsystem_usec 3\nnr_periods 1\nthrottled_usec 5\nburst_usec 4\n"),
            ("cpu.pressure", "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\n"),
            ("memory.stat", "anon 1\nworkingset_refault_anon 2\nworkingset_refault_file 3\nthp_collapse_alloc 8\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.swap.max", "0\n"),
            ("memory.events", "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 0\n"),
            ("io.stat", "8:16 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n254:0\n"),
            ("io.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let stats = Stats::read(dir.path()).unwrap().unwrap();
        assert_eq!(stats.pids, Some(PidsStat { current: 3, limit: u64::MAX }));
        let cpu = stats.cpu.unwrap();
        assert_eq!((cpu.usage_usec, cpu.throttled_usec, cpu.burst_usec), (9, 5, 4));
        let some = PsiData { avg10: 1.5, avg60: 0.0, avg300: 0.25, total: 77 };
        assert_eq!(cpu.psi, Some(PsiStats { some: Some(some), full: None }));
        let memory = stats.memory.unwrap();
        assert_eq!((memory.workingset_refault, memory.usage, memory.usage_limit, memory.swap_limit), (5, 4096, u64::MAX, 0));
        assert_eq!(stats.memory_events.unwrap().oom_kill, 1);
        let io = stats.io.unwrap();
        assert_eq!(io.usage[0], IoEntry { major: 8, minor: 16, rbytes: 10, wbytes: 20, rios: 1, wios: 2 });
        assert_eq!((io.usage.len(), io.psi.unwrap().full.unwrap().total), (2, 2));
        assert_eq!((stats.rdma, stats.hugetlb), (None, Vec::new()));
    }

    #[test]
    fn a_group_that_is_gone_has_no_stats() {
        assert_eq!(Stats::read(Path::new("/nonexistent")).unwrap(), None);
    }

    proptest! {
        #[test]
        fn anything_can_be_read(text in "(some|full|8:0)?[ -~\n]{0,80}") {
            let _ = (psi(&text), io_entry(&text));
        }
    }
}
