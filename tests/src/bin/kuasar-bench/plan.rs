//! Who is measured, and how much of what.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use kuasar_tests::{ContainerSpec, Node, Pod, PodSpec};

/// Our sandboxer with crun.
pub(crate) const OURS_CRUN: &str = "kuasar-crun";

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// A pod's life, call by call.
    Calls,
    /// Many pods at once.
    Parallel,
    /// Memory of the management processes.
    Memory,
    /// A container's standard output.
    Output,
}

/// How much of it.
pub(crate) struct Plan {
    /// What it is called in the results.
    pub(crate) name: &'static str,
    /// Rounds of single calls that count, at most; one more comes before them.
    pub(crate) rounds: usize,
    /// No further round of single calls is begun after this time.
    pub(crate) rounds_limit: Duration,
    /// Whether the shim with crun takes part: nothing is asked of it.
    pub(crate) is_shim_with_crun_measured: bool,
    /// ExecSync calls in a round.
    pub(crate) execs: usize,
    /// Rounds of pods in parallel.
    pub(crate) parallel_rounds: usize,
    /// Numbers of pods at which memory is read.
    pub(crate) memory_at: &'static [usize],
    /// Rounds of output.
    pub(crate) output_rounds: usize,
    /// MiB that a container prints.
    pub(crate) output_mib: usize,
}

impl Plan {
    /// A few minutes.
    pub(crate) const FULL: Self = Self {
        name: "full",
        rounds: 40,
        rounds_limit: Duration::from_secs(600),
        is_shim_with_crun_measured: true,
        execs: 3,
        parallel_rounds: 5,
        memory_at: &[1, 20, 50],
        output_rounds: 5,
        output_mib: 256,
    };
    /// Within a minute.
    pub(crate) const QUICK: Self = Self {
        name: "quick",
        rounds: 8,
        rounds_limit: Duration::from_secs(15),
        is_shim_with_crun_measured: false,
        execs: 2,
        parallel_rounds: 1,
        memory_at: &[1, 20, 50],
        output_rounds: 1,
        output_mib: 64,
    };
}

/// The OCI runtime behind a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Runtime {
    Runc,
    Crun,
}

impl Runtime {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }
}

/// One of those that are compared.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    /// Its runtime handler.
    pub(crate) handler: String,
    /// Whether it is our sandboxer, not the shim.
    pub(crate) is_ours: bool,
    /// What is behind it.
    pub(crate) runtime: Runtime,
}

/// All that are compared. The first is the peer: the shim with runc.
pub(crate) struct Sides(Vec<Side>);

impl Sides {
    /// The shim and the sandboxer with runc, and both with crun, if there is one.
    pub(crate) fn new(sandboxer: &str, has_crun: bool) -> Self {
        let side = |handler: &str, is_ours, runtime| Side { handler: handler.to_owned(), is_ours, runtime };
        let mut sides = vec![side("runc", false, Runtime::Runc), side(sandboxer, true, Runtime::Runc)];
        if has_crun {
            sides.extend([side(OURS_CRUN, true, Runtime::Crun), side("crun", false, Runtime::Crun)]);
        }
        Self(sides)
    }

    /// Whether crun takes part.
    pub(crate) fn has_crun(&self) -> bool {
        self.0.len() > 2
    }

    /// All of them.
    pub(crate) fn all(&self) -> &[Side] {
        &self.0
    }

    /// The peer and our sides.
    pub(crate) fn asked_for(&self) -> impl Iterator<Item = (usize, &Side)> {
        self.0.iter().enumerate().filter(|(index, side)| *index == 0 || side.is_ours)
    }

    /// Our sides.
    pub(crate) fn ours(&self) -> impl Iterator<Item = (usize, &Side)> {
        self.0.iter().enumerate().filter(|(_, side)| side.is_ours)
    }

    /// The order of a round: each begins in turn.
    pub(crate) fn order(&self, round: usize, indices: impl Iterator<Item = usize>) -> Vec<usize> {
        let mut order: Vec<usize> = indices.collect();
        let first = round % order.len().max(1);
        order.rotate_left(first);
        order
    }
}

/// Where a pod has its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Network {
    Cni,
    Host,
}

impl Network {
    pub(crate) const ALL: [Self; 2] = [Self::Cni, Self::Host];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Cni => "CNI",
            Self::Host => "host network",
        }
    }
}

/// A pod as kubelet asks for it by default: a pid namespace for each container, one IPC namespace, no seccomp profile.
pub(crate) fn pod(side: &Side, network: Network) -> PodSpec {
    let spec = PodSpec::new("bench").handler(&side.handler);
    match network {
        Network::Cni => spec,
        Network::Host => spec.host_network(),
    }
}

/// Runs a pod with one container that sleeps.
pub(crate) async fn up(node: &Node, side: &Side, network: Network) -> Result<Pod> {
    let context = || format!("with {}", side.handler);
    let pod = node.run_pod(pod(side, network)).await.with_context(context)?;
    pod.run(ContainerSpec::new("c").sleep()).await.with_context(context)?;
    Ok(pod)
}

/// Milliseconds.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// How long a call took, in milliseconds, and what it returned.
pub(crate) async fn timed<T, E>(call: impl Future<Output = Result<T, E>>) -> Result<(f64, T), E> {
    let begun = Instant::now();
    let value = call.await?;
    Ok((ms(begun.elapsed()), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_side_begins_in_turn() {
        let sides = Sides::new("kuasar-runc", true);
        let order = |round| sides.order(round, sides.asked_for().map(|(index, _)| index));
        assert_eq!([order(0), order(1), order(2), order(3)], [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]);
    }
}
