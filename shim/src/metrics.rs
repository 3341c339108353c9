//! Resource use in containerd's messages: cgroups' `Metrics` of v1 and of v2.
//!
//! The contract's statistics have the same fields; what is missing in a group stays unset in the message.

use containerd_shim_protos::{cgroups::metrics as wire1, cgroups_v2::metrics as wire2};
use kuasar_sandboxers::{
    Error, Result,
    cgroup::{Stats, v1, v2},
};
use protobuf::{MessageField, well_known_types::any::Any};

use crate::events::pack;

/// For Task.Stats.
///
/// # Errors
/// When the message cannot be encoded; not expected.
pub fn ttrpc(stats: &Stats) -> Result<Any> {
    let encoded = match stats {
        Stats::V1(stats) => pack("io.containerd.cgroups.v1", &stats.wire()),
        Stats::V2(stats) => pack("io.containerd.cgroups.v2", &stats.wire()),
    };
    encoded.map_err(Error::failed("encode metrics"))
}

/// For Controller.Metrics: the same message for the other protocol's library.
///
/// # Errors
/// As [`ttrpc`].
pub fn grpc(stats: &Stats) -> Result<prost_types::Any> {
    let any = ttrpc(stats)?;
    Ok(prost_types::Any { type_url: any.type_url, value: any.value })
}

/// A statistic that has the message `M`.
trait Wire<M> {
    fn wire(&self) -> M;
}

fn field<M>(value: &Option<impl Wire<M>>) -> MessageField<M> {
    MessageField::from_option(value.as_ref().map(Wire::wire))
}

fn list<M>(values: &[impl Wire<M>]) -> Vec<M> {
    values.iter().map(Wire::wire).collect()
}

/// Says which fields are numbers, other values, optional messages, and lists of messages.
macro_rules! wire {
    ($($from:ty => $to:path {
        $(numbers: $($number:ident)+;)?
        $(values: $($value:ident)+;)?
        $(fields: $($field:ident)+;)?
        $(lists: $($list:ident)+;)?
    })*) => {$(
        impl Wire<$to> for $from {
            fn wire(&self) -> $to {
                $to {
                    $($($number: self.$number,)+)?
                    $($($value: self.$value.clone(),)+)?
                    $($($field: field(&self.$field),)+)?
                    $($($list: list(&self.$list),)+)?
                    ..Default::default()
                }
            }
        }
    )*};
}

wire! {
    v1::Stats => wire1::Metrics {
        fields: pids cpu memory blkio rdma memory_oom_control;
        lists: hugetlb;
    }
    v1::HugetlbStat => wire1::HugetlbStat {
        numbers: usage max failcnt;
        values: pagesize;
    }
    v1::PidsStat => wire1::PidsStat {
        numbers: current limit;
    }
    v1::CpuStat => wire1::CPUStat {
        fields: usage throttling;
    }
    v1::CpuUsage => wire1::CPUUsage {
        numbers: total kernel user;
        values: per_cpu;
    }
    v1::Throttle => wire1::Throttle {
        numbers: periods throttled_periods throttled_time;
    }
    v1::MemoryStat => wire1::MemoryStat {
        numbers: cache rss rss_huge mapped_file dirty writeback pg_pg_in pg_pg_out pg_fault pg_maj_fault
            inactive_anon active_anon inactive_file active_file unevictable
            hierarchical_memory_limit hierarchical_swap_limit
            total_cache total_rss total_rss_huge total_mapped_file total_dirty total_writeback
            total_pg_pg_in total_pg_pg_out total_pg_fault total_pg_maj_fault
            total_inactive_anon total_active_anon total_inactive_file total_active_file total_unevictable;
        fields: usage swap kernel kernel_tcp;
    }
    v1::MemoryEntry => wire1::MemoryEntry {
        numbers: limit usage max failcnt;
    }
    v1::MemoryOomControl => wire1::MemoryOomControl {
        numbers: oom_kill_disable under_oom oom_kill;
    }
    v1::BlkIoStat => wire1::BlkIOStat {
        lists: io_service_bytes_recursive io_serviced_recursive io_queued_recursive io_service_time_recursive
            io_wait_time_recursive io_merged_recursive io_time_recursive sectors_recursive;
    }
    v1::BlkIoEntry => wire1::BlkIOEntry {
        numbers: major minor value;
        values: op device;
    }

    v1::RdmaStat => wire1::RdmaStat {
        lists: current limit;
    }
    v1::RdmaEntry => wire1::RdmaEntry {
        numbers: hca_handles hca_objects;
        values: device;
    }

    v2::Stats => wire2::Metrics {
        fields: pids cpu memory rdma io memory_events;
        lists: hugetlb;
    }
    v2::PidsStat => wire2::PidsStat {
        numbers: current limit;
    }
    v2::CpuStat => wire2::CPUStat {
        numbers: usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec nr_bursts burst_usec;
        fields: psi;
    }
    v2::MemoryStat => wire2::MemoryStat {
        numbers: anon file kernel_stack slab sock shmem file_mapped file_dirty file_writeback anon_thp
            inactive_anon active_anon inactive_file active_file unevictable slab_reclaimable slab_unreclaimable
            pgfault pgmajfault workingset_refault workingset_activate workingset_nodereclaim
            pgrefill pgscan pgsteal pgactivate pgdeactivate pglazyfree pglazyfreed thp_fault_alloc thp_collapse_alloc
            usage usage_limit swap_usage swap_limit max_usage swap_max_usage;
        fields: psi;
    }
    v2::MemoryEvents => wire2::MemoryEvents {
        numbers: low high max oom oom_kill oom_group_kill;
    }
    v2::IoStat => wire2::IOStat {
        fields: psi;
        lists: usage;
    }
    v2::IoEntry => wire2::IOEntry {
        numbers: major minor rbytes wbytes rios wios;
    }
    v2::RdmaStat => wire2::RdmaStat {
        lists: current limit;
    }
    v2::RdmaEntry => wire2::RdmaEntry {
        numbers: hca_handles hca_objects;
        values: device;
    }
    v2::HugeTlbStat => wire2::HugeTlbStat {
        numbers: current max failcnt;
        values: pagesize;
    }
    v2::PsiStats => wire2::PSIStats {
        fields: some full;
    }
    v2::PsiData => wire2::PSIData {
        numbers: avg10 avg60 avg300 total;
    }
}

#[cfg(test)]
mod tests {
    use protobuf::Message;

    use super::*;

    #[test]
    fn v1_arrives_under_gos_name() {
        let usage = v1::CpuUsage { total: 1, kernel: 2, user: 3, per_cpu: vec![4, 5] };
        let memory = v1::MemoryStat {
            total_inactive_file: 6,
            usage: Some(v1::MemoryEntry { limit: 7, usage: 8, max: 9, failcnt: 10 }),
            ..Default::default()
        };
        let entry = v1::BlkIoEntry { op: "Read".into(), device: "/dev/vda".into(), major: 254, minor: 0, value: 11 };
        let stats = Stats::V1(Box::new(v1::Stats {
            cpu: Some(v1::CpuStat { usage: Some(usage), throttling: None }),
            memory: Some(memory),
            blkio: Some(v1::BlkIoStat { io_service_bytes_recursive: vec![entry], ..Default::default() }),
            pids: Some(v1::PidsStat { current: 12, limit: 0 }),
            ..Default::default()
        }));
        let any = ttrpc(&stats).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let got = wire1::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((got.cpu.usage.total, got.cpu.usage.per_cpu.as_slice()), (1, &[4, 5][..]));
        assert!(got.cpu.throttling.is_none() && got.rdma.is_none());
        assert_eq!((got.memory.total_inactive_file, got.memory.usage.usage), (6, 8));
        assert_eq!((got.blkio.io_service_bytes_recursive[0].value, got.pids.current), (11, 12));
        let same = grpc(&stats).unwrap();
        assert_eq!((same.type_url, same.value), (any.type_url, any.value));
    }

    #[test]
    fn v2_arrives_under_gos_name() {
        let some = v2::PsiData { avg10: 0.5, total: 9, ..Default::default() };
        let psi = Some(v2::PsiStats { some: Some(some), full: None });
        let stats = Stats::V2(Box::new(v2::Stats {
            cpu: Some(v2::CpuStat { usage_usec: 1, psi, ..Default::default() }),
            memory: Some(v2::MemoryStat { usage: 2, usage_limit: u64::MAX, ..Default::default() }),
            memory_events: Some(v2::MemoryEvents { oom_kill: 3, ..Default::default() }),
            io: Some(v2::IoStat { usage: vec![v2::IoEntry { rbytes: 4, ..Default::default() }], psi: None }),
            ..Default::default()
        }));
        let any = ttrpc(&stats).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let got = wire2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((got.cpu.usage_usec, got.cpu.psi.some.total), (1, 9));
        assert_eq!((got.memory.usage, got.memory.usage_limit), (2, u64::MAX));
        assert_eq!((got.memory_events.oom_kill, got.io.usage[0].rbytes), (3, 4));
        assert!(got.pids.is_none());
    }
}
