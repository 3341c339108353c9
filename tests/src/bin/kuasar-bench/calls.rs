//! The life of a pod with one container, call by call.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kuasar_tests::screen::Screen;
use kuasar_tests::{ContainerSpec, Node};

use crate::plan::{Network, Plan, Runtime, Side, Sides, pod, timed};
use crate::report::{Line, Report, SHIM, Target};
use crate::samples::Samples;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Call {
    /// RunPodSandbox.
    Run,
    /// CreateContainer and StartContainer.
    Start,
    /// ExecSync of `true`.
    Exec,
    /// StopContainer without a grace period.
    Stop,
    /// StopPodSandbox and RemovePodSandbox; the exited container goes with them.
    Remove,
}

impl Call {
    const ALL: [Self; 5] = [Self::Run, Self::Start, Self::Exec, Self::Stop, Self::Remove];

    fn name(self) -> &'static str {
        match self {
            Self::Run => "runp",
            Self::Start => "create+start",
            Self::Exec => "ExecSync",
            Self::Stop => "stop",
            Self::Remove => "stopp+rmp",
        }
    }

    /// The ratio to the shim with runc that is aimed at.
    fn target(self, network: Network, runtime: Runtime) -> Option<Target> {
        let ratio = match (self, network, runtime) {
            (Self::Run, Network::Host, _) => 0.15,
            (Self::Run, Network::Cni, _) => 0.45,
            (Self::Start, _, Runtime::Runc) => 0.90,
            (Self::Start, _, Runtime::Crun) => 0.45,
            (Self::Exec, _, Runtime::Runc) => 0.85,
            (Self::Exec, _, Runtime::Crun) => 0.40,
            (Self::Remove, Network::Host, _) => 0.25,
            (Self::Stop, ..) | (Self::Remove, Network::Cni, _) => return None,
        };
        Some(Target::ratio(ratio))
    }
}

type Table = BTreeMap<(Network, Call, usize), Samples>;

pub(crate) async fn measure(node: &Node, sides: &Sides, plan: &Plan, screen: &mut Screen, report: &mut Report) -> Result<()> {
    let mut table = Table::new();
    let begun = Instant::now();
    let measured = |side: &Side| plan.is_shim_with_crun_measured || side.is_ours || side.runtime == Runtime::Runc;
    // The first round warms caches up and does not count.
    for round in 0..=plan.rounds {
        if begun.elapsed() > plan.rounds_limit {
            screen.line(&format!("single calls: only {} rounds in {} s", round - 1, plan.rounds_limit.as_secs()))?;
            break;
        }
        screen.status(&format!("single calls, round {round} of {}", plan.rounds))?;
        for network in Network::ALL {
            let indices = sides.all().iter().enumerate().filter(|(_, side)| measured(side)).map(|(index, _)| index);
            for index in sides.order(round, indices) {
                let side = &sides.all()[index];
                let times = life(node, side, network, plan).await.with_context(|| format!("with {}", side.handler))?;
                for (call, time) in times.into_iter().filter(|_| round > 0) {
                    table.entry((network, call, index)).or_default().push(time);
                }
            }
        }
    }
    for network in Network::ALL {
        for call in Call::ALL {
            let figure = |index: usize| table.get(&(network, call, index)).and_then(Samples::figure);
            for (index, side) in sides.all().iter().enumerate().skip(1) {
                let (Some(peer), Some(ours)) = (figure(0), figure(index)) else { continue };
                let line = Line::new(network.name(), call.name(), "ms", ours).beside(SHIM, peer);
                report.compare(side, line.aim(call.target(network, side.runtime)));
            }
        }
    }
    Ok(())
}

async fn life(node: &Node, side: &Side, network: Network, plan: &Plan) -> Result<Vec<(Call, f64)>> {
    let (run, pod) = timed(node.run_pod(pod(side, network))).await?;
    let (start, container) = timed(pod.run(ContainerSpec::new("c").sleep())).await?;
    let mut times = vec![(Call::Run, run), (Call::Start, start)];
    for _ in 0..plan.execs {
        let (exec, ran) = timed(container.exec(["true"])).await?;
        ensure!(ran.exit_code == 0, "`true` exits with {}: {}", ran.exit_code, ran.stderr());
        times.push((Call::Exec, exec));
    }
    times.push((Call::Stop, timed(container.stop(0)).await?.0));
    times.push((Call::Remove, timed(pod.remove_all()).await?.0));
    Ok(times)
}
