//! From nothing to a running container, beside the boot of the same machine by hand; exec, beside the node's own.

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kuasar_tests::screen::Screen;
use kuasar_tests::{Container, ContainerSpec, Node, PodSpec};

use super::by_hand::{self, Recipe};
use super::{Amount, Kernel, ON_NODE, Subject, stages};
use crate::plan::timed;
use crate::report::{Line, Report, Target};
use crate::samples::{Figure, Samples};

/// A pod may take this much of what its machine takes to boot by hand.
const RATIO: f64 = 1.25;
/// The most that kuasard may work for it beside that, in milliseconds.
const ON_NODE_MS: f64 = 40.0;
/// By how much an exec may take longer than on the node, in milliseconds.
const EXEC_OVER_MS: f64 = 30.0;

/// How many programs a shell starts to see how long one takes.
const PROGRAMS: u32 = 20;

/// What is timed, of the pods of one handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    ByHand,
    Run,
    Start,
    Whole,
    OnNode,
    Exec,
    Program,
}

type Table = BTreeMap<(What, String), Samples>;

const NODE: &str = "node";
const BY_HAND: &str = "by hand";

pub(crate) async fn measure(subject: Subject<'_>, screen: &mut Screen, report: &mut Report) -> Result<()> {
    let Subject { node, kernels, amount } = subject;
    let mut table = Table::new();
    let begun = Instant::now();
    let mut recipes = Vec::new();
    for kernel in kernels {
        screen.status(&format!("the first machine with {}", kernel.name))?;
        recipes.push(recipe(node, kernel).await.with_context(|| format!("with {}", kernel.handler))?);
    }
    // The first round warms caches up and does not count.
    for round in 0..=amount.rounds {
        if begun.elapsed() > amount.rounds_limit && round > 1 {
            screen.line(&format!("boots: only {} rounds in {} s", round - 1, amount.rounds_limit.as_secs()))?;
            break;
        }
        screen.status(&format!("boots, round {round} of {}", amount.rounds))?;
        let mut times = Vec::new();
        for (kernel, recipe) in kernels.iter().zip(&recipes) {
            // Whoever is first in one round is second in the next.
            for by_hand in [round % 2 == 0, round % 2 != 0] {
                if by_hand {
                    let time = by_hand::boot(recipe, &node.dir().join("run/by-hand")).await;
                    let time = time.with_context(|| format!("boot {} by hand", kernel.name))?;
                    times.push((What::ByHand, kernel.handler.clone(), time));
                } else {
                    let life = life(node, kernel.pod(), true, amount).await;
                    let life = life.with_context(|| format!("with {}", kernel.handler))?;
                    times.extend(life.into_iter().map(|(what, time)| (what, kernel.handler.clone(), time)));
                }
            }
        }
        let life = life(node, PodSpec::new("bench").handler(ON_NODE), false, amount).await.context("on the node")?;
        times.extend(life.into_iter().map(|(what, time)| (what, ON_NODE.to_owned(), time)));
        for (what, handler, time) in times.into_iter().filter(|_| round > 0) {
            table.entry((what, handler)).or_default().push(time);
        }
    }
    tell(&table, kernels, report)
}

/// Runs a pod once, which also is the first for its handler.
async fn recipe(node: &Node, kernel: &Kernel) -> Result<Recipe> {
    let pod = node.run_pod(kernel.pod()).await?;
    let recipe = Recipe::of(&pod)?;
    pod.remove_all().await?;
    Ok(recipe)
}

async fn life(node: &Node, spec: PodSpec, is_machine: bool, amount: &Amount) -> Result<Vec<(What, f64)>> {
    let (run, pod) = timed(node.run_pod(spec)).await?;
    let (start, container) = timed(pod.run(ContainerSpec::new("c").sleep())).await?;
    let mut times = vec![(What::Run, run), (What::Start, start), (What::Whole, run + start)];
    for _ in 0..amount.execs {
        let (exec, ran) = timed(container.exec(["true"])).await?;
        ensure!(ran.exit_code == 0, "`true` exits with {}: {}", ran.exit_code, ran.stderr());
        times.push((What::Exec, exec));
    }
    times.push((What::Program, program(&container).await?));
    if is_machine {
        let kuasard = node.kuasard.as_ref().context("there is no kuasard")?;
        let log = fs::read(kuasard.log()).with_context(|| format!("read {}", kuasard.log().display()))?;
        times.push((What::OnNode, stages::on_node(&String::from_utf8_lossy(&log), [&pod.id, &container.id])?));
    }
    pod.remove_all().await?;
    Ok(times)
}

/// How long a shell in the container takes to start a program and see it end, by the container's own clock, in milliseconds.
async fn program(container: &Container) -> Result<f64> {
    let script = format!(
        "read a x < /proc/uptime; i=0; while [ $i -lt {PROGRAMS} ]; do /bin/true; i=$((i+1)); done; read b x < /proc/uptime; echo $a $b"
    );
    let seconds = super::transfer::between(&container.sh(&script).await?)?;
    Ok(seconds * 1e3 / f64::from(PROGRAMS))
}

fn tell(table: &Table, kernels: &[Kernel], report: &mut Report) -> Result<()> {
    let figure = |what: What, handler: &str| -> Result<Figure> {
        table.get(&(what, handler.to_owned())).and_then(Samples::figure).context("nothing was measured")
    };
    for kernel in kernels {
        let add = |report: &mut Report, what, name, peer: Option<(&'static str, Figure)>, target| -> Result<()> {
            let line = Line::new("from nothing to a container", name, "ms", figure(what, &kernel.handler)?).of(&kernel.label());
            let line = peer.into_iter().fold(line, |line, (name, peer)| line.beside(name, peer));
            report.add(line.aim(target));
            Ok(())
        };
        let boot = figure(What::ByHand, &kernel.handler)?;
        add(report, What::Whole, "runp+create+start", Some((BY_HAND, boot)), Some(Target::ratio(RATIO)))?;
        add(report, What::Run, "runp", Some((BY_HAND, boot)), None)?;
        add(report, What::Start, "create+start", None, None)?;
        add(report, What::OnNode, "work on the node", None, Some(Target::value(ON_NODE_MS)))?;
    }
    for kernel in kernels {
        // Where processors are emulated, the second says how much that is.
        for (what, name, target) in
            [(What::Exec, "ExecSync", Some(Target::over(EXEC_OVER_MS))), (What::Program, "a program in it", None)]
        {
            let line = Line::new("exec", name, "ms", figure(what, &kernel.handler)?).of(&kernel.label());
            report.add(line.beside(NODE, figure(what, ON_NODE)?).aim(target));
        }
    }
    for kernel in kernels {
        let line = Line::new("boot by hand to hello", "QEMU", "ms", figure(What::ByHand, &kernel.handler)?);
        report.add(line.of(&kernel.label()));
    }
    Ok(())
}
