//! Volumes that stop answering, of pods beside which others live: whose calls must not become slower.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::{join_all, try_join_all};
use kuasar_tests::hung::{DEVICE, Hung};
use kuasar_tests::{Container, ContainerSpec, Pod, PodSpec, skip, wait};
use tonic::Status;

use crate::ledger::{Call, Promise};
use crate::world::{GivenUp, World};

/// How often healthy phases and hung ones follow each other. The machine's own moods are in both.
const PHASES: usize = 4;
/// Containers' lives per phase.
const LIVES: usize = 12;
/// Pods with the hung volume, a container each per phase.
const HUNG_PODS: usize = 6;
/// By how much calls may be slower while volumes hang: or by as much as healthy phases differ among themselves, on a machine with other work.
const SLOWER: Duration = Duration::from_millis(100);
/// How long the first look at a volume may take.
const LOOK: Duration = Duration::from_secs(30);

/// How long calls took.
#[derive(Default)]
struct Latencies(BTreeMap<Call, Vec<Duration>>);

impl Latencies {
    async fn measure<T>(&mut self, call: Call, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let begun = Instant::now();
        let done = work.await;
        self.0.entry(call).or_default().push(begun.elapsed());
        done
    }

    /// The 99th percentile of all calls of a kind.
    fn p99(&self, call: Call) -> Duration {
        let mut all = self.0.get(&call).cloned().unwrap_or_default();
        all.sort();
        all.get((all.len() * 99 / 100).min(all.len().saturating_sub(1))).copied().unwrap_or_default()
    }
}

/// Lets volumes hang and answer again, and compares what that does to others. `dir` is where they are mounted.
pub(crate) async fn disturb(world: &World, dir: &Path) -> Result<()> {
    if !Path::new(DEVICE).exists() {
        skip::record("chaos: hung volumes", &format!("this machine has no {DEVICE}"));
        return Ok(());
    }
    let given_up = |GivenUp| anyhow::anyhow!("a call that has to succeed does not: see the log");
    let hung = Hung::mount(dir)?;
    let hit = try_join_all((0..HUNG_PODS).map(|_| world.run_pod(PodSpec::host_network))).await.map_err(given_up)?;
    let other = world.run_pod(PodSpec::host_network).await.map_err(given_up)?;
    let beside = world.run_container(&other, ContainerSpec::sleep).await.map_err(given_up)?;
    let (mut healthy, mut disturbed) = (Vec::new(), Latencies::default());
    // The first one of a kind is slower.
    life(world, &other, &beside, &mut Latencies::default()).await?;
    for _ in 0..PHASES {
        let mut phase = Latencies::default();
        for _ in 0..LIVES {
            life(world, &other, &beside, &mut phase).await?;
        }
        healthy.push(phase);
        let made = hit.iter().map(|pod| {
            let spec = world.container(&world.unique("hung")).sleep().mount(dir, "/hung", false);
            world.once(Call::CreateContainer, &pod.id, pod.create(spec))
        });
        let stuck = try_join_all(made).await.context("create a container with a volume that answers")?;
        hung.hang();
        let starting = join_all(stuck.iter().map(Container::start));
        let living = async {
            wait::until("a look at the hung volume", LOOK, || async { Ok((hung.waiting() > 0).then_some(())) }).await?;
            for _ in 0..LIVES {
                life(world, &other, &beside, &mut disturbed).await?;
            }
            ensure!(hung.waiting() > 0, "nobody waits for the hung volume any more");
            hung.release();
            Ok(())
        };
        // Whether a start that has waited succeeds is its own affair.
        let (_, lived) = tokio::join!(starting, living);
        lived?;
        for container in &stuck {
            world.remove_container(container, 0).await.map_err(given_up)?;
        }
    }
    for pod in hit.iter().chain([&other]) {
        world.remove_pod(&pod.id).await.map_err(given_up)?;
    }
    for call in [Call::CreateContainer, Call::StartContainer, Call::ExecSync, Call::StopContainer, Call::RemoveContainer] {
        let phases = healthy.iter().map(|phase| phase.p99(call));
        let (well, best) = (phases.clone().max().unwrap_or_default(), phases.min().unwrap_or_default());
        let (ill, most) = (disturbed.p99(call), well + SLOWER.max(well - best));
        let text = format!(
            "{call:?}: p99 {} ms beside hung volumes, else {} to {} ms",
            ill.as_millis(),
            best.as_millis(),
            well.as_millis()
        );
        world.ledger.note(&text);
        if ill > most {
            world.ledger.broke(Promise::Undisturbed, 1, &text);
        }
    }
    Ok(())
}

/// A container from its creation to its removal, with a command in the one beside it.
async fn life(world: &World, pod: &Pod, beside: &Container, took: &mut Latencies) -> Result<()> {
    let name = world.unique("beside");
    let create = took.measure(Call::CreateContainer, pod.create(world.container(&name).sleep()));
    let container = world.once(Call::CreateContainer, &name, create).await?;
    world.once(Call::StartContainer, &name, took.measure(Call::StartContainer, container.start())).await?;
    world.once(Call::ExecSync, &name, took.measure(Call::ExecSync, beside.exec(["true"]))).await?;
    world.once(Call::StopContainer, &name, took.measure(Call::StopContainer, container.stop(0))).await?;
    world.once(Call::RemoveContainer, &name, took.measure(Call::RemoveContainer, container.remove())).await?;
    Ok(())
}
