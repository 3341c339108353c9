//! What is measured, and how.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::future::try_join_all;
use kuasar_tests::leak::census;
use kuasar_tests::{ContainerSpec, Node, Pod, PodSpec, process, wait};

use crate::table::Table;

/// How much of it.
pub(crate) struct Plan {
    /// Rounds of single calls.
    pub(crate) rounds: usize,
    /// Rounds of pods in parallel.
    parallel_rounds: usize,
    /// Numbers of pods at which memory is taken.
    memory_at: &'static [usize],
    /// MiB that a container prints.
    output_mib: u64,
}

impl Plan {
    /// Some minutes.
    pub(crate) const FULL: Self = Self { rounds: 20, parallel_rounds: 3, memory_at: &[1, 20, 50], output_mib: 256 };
    /// Within a minute.
    pub(crate) const QUICK: Self = Self { rounds: 5, parallel_rounds: 1, memory_at: &[1, 20], output_mib: 64 };
}

const PARALLEL: usize = 20;
/// How long all that a container has printed may take to be in its log.
const PATIENCE: Duration = Duration::from_secs(120);

fn progress(text: &str) {
    eprintln!("  {text}");
}

/// Times of one call of one handler.
type Samples = BTreeMap<(String, String), Vec<f64>>;

async fn timed<T, E>(
    samples: &mut Samples,
    name: &str,
    handler: &str,
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let begun = Instant::now();
    let value = call.await?;
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    samples.entry((name.to_owned(), handler.to_owned())).or_default().push(ms);
    Ok(value)
}

fn spec(handler: &str, host_network: bool) -> PodSpec {
    let spec = PodSpec::new("bench").handler(handler);
    if host_network { spec.host_network() } else { spec }
}

/// The value below which `share` of the samples lie (nearest rank).
fn quantile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let rank = (samples.len() as f64 * share).ceil() as usize;
    samples[rank.clamp(1, samples.len()) - 1]
}

/// The life of a pod with one container, call by call, on the pod network and on the host's.
pub(crate) async fn calls(node: &Node, handlers: &[String], plan: &Plan, table: &mut Table) -> Result<()> {
    for (network, host) in [("CNI", false), ("host network", true)] {
        progress(&format!("single calls, {network}"));
        let mut samples = Samples::new();
        // The first round warms caches up and does not count.
        for round in 0..=plan.rounds {
            let mut counted = Samples::new();
            for handler in handlers {
                life_of_a_pod(node, handler, host, &mut counted).await.with_context(|| format!("with {handler}"))?;
            }
            if round > 0 {
                for (key, mut times) in counted {
                    samples.entry(key).or_default().append(&mut times);
                }
            }
        }
        for call in ["runp", "create+start", "ExecSync", "stop", "stopp+rmp"] {
            for handler in handlers {
                if let Some(times) = samples.get_mut(&(call.to_owned(), handler.clone())) {
                    table.add(&format!("{call}, {network}, median"), "ms", handler, quantile(times, 0.5));
                    table.add(&format!("{call}, {network}, p95"), "ms", handler, quantile(times, 0.95));
                }
            }
        }
    }
    Ok(())
}

async fn life_of_a_pod(node: &Node, handler: &str, host_network: bool, samples: &mut Samples) -> Result<()> {
    let pod = timed(samples, "runp", handler, node.run_pod(spec(handler, host_network))).await?;
    let container = timed(samples, "create+start", handler, pod.run(ContainerSpec::new("c").sleep())).await?;
    timed(samples, "ExecSync", handler, container.exec(["true"])).await?;
    timed(samples, "stop", handler, container.stop(0)).await?;
    timed(samples, "stopp+rmp", handler, pod.remove_all()).await?;
    Ok(())
}

/// Pods with a container each, all at once.
pub(crate) async fn parallel(node: &Node, handlers: &[String], plan: &Plan, table: &mut Table) -> Result<()> {
    progress(&format!("{PARALLEL} pods in parallel"));
    let mut samples = Samples::new();
    for _ in 0..plan.parallel_rounds {
        for handler in handlers {
            let pods =
                timed(&mut samples, "up", handler, try_join_all((0..PARALLEL).map(|_| up(node, handler, false)))).await?;
            timed(&mut samples, "down", handler, try_join_all(pods.iter().map(Pod::remove_all))).await?;
        }
    }
    for ((direction, handler), mut times) in samples {
        table.add(&format!("{PARALLEL} pods in parallel, {direction}"), "ms", &handler, quantile(&mut times, 0.5));
    }
    Ok(())
}

async fn up(node: &Node, handler: &str, host_network: bool) -> Result<Pod> {
    let pod = node.run_pod(spec(handler, host_network)).await?;
    pod.run(ContainerSpec::new("c").sleep()).await?;
    Ok(pod)
}

/// Memory of what stands between containerd and the containers, with some pods running.
pub(crate) async fn memory(node: &Node, handlers: &[String], plan: &Plan, table: &mut Table) -> Result<()> {
    progress("memory");
    for handler in handlers {
        let mut pods = Vec::new();
        for count in plan.memory_at {
            while pods.len() < *count {
                pods.push(up(node, handler, true).await?);
            }
            let pids = node.management_pids(handler)?;
            let mib = census::pss_kib(&pids)? as f64 / 1024.0;
            let plural = if *count == 1 { "" } else { "s" };
            table.add(&format!("PSS at {count} pod{plural}"), "MiB", handler, mib);
        }
        try_join_all(pods.iter().map(Pod::remove_all)).await?;
    }
    Ok(())
}

/// How fast what a container prints arrives in its log. Here more is better.
pub(crate) async fn throughput(node: &Node, handlers: &[String], plan: &Plan, table: &mut Table) -> Result<()> {
    progress("throughput of stdout");
    for handler in handlers {
        let pod = node.run_pod(spec(handler, true)).await?;
        let line = "x".repeat(1023);
        let script = format!("yes {line} | head -c {}; echo; echo the end", plan.output_mib << 20);
        let begun = Instant::now();
        let container = pod.run(ContainerSpec::new("writer").sh(&script)).await?;
        let log = container.log.clone().context("the container has no log")?;
        wait::until("the end of what was printed", PATIENCE, || async {
            Ok(process::tail_bytes(&log, 64)?.ends_with("the end\n").then_some(()))
        })
        .await?;
        let rate = plan.output_mib as f64 / begun.elapsed().as_secs_f64();
        table.add("stdout of a container", "MiB/s", handler, rate);
        pod.remove_all().await?;
    }
    Ok(())
}
