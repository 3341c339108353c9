//! Memory of what stands between containerd and the containers.
//!
//! Counted are, for the shim, its processes and the pause containers; for a sandboxer, kuasard and every helper that it keeps.
//! Not counted is containerd, which both need. The figure is PSS: each shared page counts for its share.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::future::try_join_all;
use kuasar_tests::leak::census;
use kuasar_tests::screen::Screen;
use kuasar_tests::{Node, Pod};

use crate::plan::{Network, Plan, Side, Sides, up};
use crate::report::{Line, Report, SHIM, Target};
use crate::samples::Figure;

/// How many pods are started at a time.
const BATCH: usize = 10;
/// How far apart two readings are that are to agree, and for how long.
const APART: Duration = Duration::from_millis(250);
const PATIENCE: Duration = Duration::from_secs(5);

/// The most that all our management processes may take at 50 pods.
const LIMIT_MIB: f64 = 15.0;

pub(crate) struct Reading {
    pub(crate) mib: f64,
    processes: usize,
    threads: usize,
}

pub(crate) async fn measure(node: &Node, sides: &Sides, plan: &Plan, screen: &mut Screen, report: &mut Report) -> Result<()> {
    // One kuasard serves the sandboxers of all OCI runtimes: that with runc stands for them.
    let (Some(peer), Some((_, ours))) = (sides.all().first(), sides.ours().next()) else { return Ok(()) };
    let theirs = readings(node, peer, plan, screen).await?;
    let readings = readings(node, ours, plan, screen).await?;
    let mut add = |name: &'static str, peer: f64, value: f64, unit: &'static str, target: Option<Target>| {
        let line = Line::new("management processes", name, unit, Figure::once(value)).beside(SHIM, Figure::once(peer));
        report.compare(ours, line.aim(target));
    };
    for ((pods, theirs), ours) in plan.memory_at.iter().zip(&theirs).zip(&readings) {
        let (name, target) = match pods {
            1 => ("PSS, 1 pod", None),
            20 => ("PSS, 20 pods", None),
            _ => ("PSS, 50 pods", Some(Target { value: Some(LIMIT_MIB), ..Target::ratio(0.10) })),
        };
        add(name, theirs.mib, ours.mib, "MiB", target);
    }
    if let (Some(theirs), Some(ours)) = (theirs.last(), readings.last()) {
        add("processes, 50 pods", theirs.processes as f64, ours.processes as f64, "", None);
        add("threads, 50 pods", theirs.threads as f64, ours.threads as f64, "", None);
    }
    Ok(())
}

async fn readings(node: &Node, side: &Side, plan: &Plan, screen: &mut Screen) -> Result<Vec<Reading>> {
    let mut pods: Vec<Pod> = Vec::new();
    let mut readings = Vec::new();
    for count in plan.memory_at {
        while pods.len() < *count {
            screen.status(&format!("memory with {}: {} pods of {count}", side.handler, pods.len()))?;
            let batch = BATCH.min(count - pods.len());
            pods.extend(try_join_all((0..batch).map(|_| up(node, side, Network::Host))).await?);
        }
        readings.push(read(node, &side.handler).await.with_context(|| format!("read the memory of {}", side.handler))?);
    }
    screen.status(&format!("memory with {}: removing {} pods", side.handler, pods.len()))?;
    for batch in pods.chunks(BATCH) {
        try_join_all(batch.iter().map(Pod::remove_all)).await?;
    }
    Ok(readings)
}

/// Reads until two readings agree: what a burst of starts has taken is given back only a little later.
pub(crate) async fn read(node: &Node, handler: &str) -> Result<Reading> {
    let end = Instant::now() + PATIENCE;
    let mut last = f64::INFINITY;
    loop {
        let pids = node.management_pids(handler)?;
        let mib = census::pss_kib(&pids)? as f64 / 1024.0;
        if (last - mib).abs() < mib / 100.0 || Instant::now() > end {
            let threads = pids.iter().map(|pid| threads(*pid)).sum();
            return Ok(Reading { mib, processes: pids.len(), threads });
        }
        last = mib;
        tokio::time::sleep(APART).await;
    }
}

/// What has ended has none.
fn threads(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count)
}
