//! What does not answer: a volume of some pods, the guests of others. Calls of the pods beside them must not become slower.
//!
//! ```text
//!   healthy │ disturbed │ healthy │ disturbed │ …     phases, in which the same clients live the same lives
//!             volume hangs, guests are stopped; clients call both
//! ```
//!
//! Phases of both kinds take turns, so that the machine's own moods are in both, and all of a kind are taken together: a call's 99th
//! percentile beside what does not answer may be [`SLOWER`](crate::latencies::SLOWER) than in the healthy phases, where the same guests
//! are idle. Statistics of all pods are among these calls, but for the first after guests got stuck, which find that out: 2 s for
//! each guest, once.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::future::{OptionFuture, try_join_all};
use kuasar_tests::cri::k8s_cri::v1::{ListContainerStatsRequest, ListPodSandboxStatsRequest};
use kuasar_tests::{skip, tools};

use crate::guests::{Guests, HYPERVISOR};
use crate::latencies::{Latencies, SLOWER};
use crate::ledger::{Call, Disturbance, FirstStatistics};
use crate::rng::Rng;
use crate::volume::Volume;
use crate::world::World;

/// Clients that live side by side. One call that waits in the daemon is to meet another.
const CLIENTS: usize = 2;
/// Statistics of all pods.
const STATISTICS: [Call; 2] = [Call::ListContainerStats, Call::ListPodSandboxStats];
/// What one stuck guest may cost statistics, once.
const ONE_GUEST: Duration = Duration::from_secs(2);

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Phases of each kind.
    pub(crate) phases: usize,
    /// Pods' lives, one after another, per client and phase.
    pub(crate) lives: usize,
}

/// Whether this machine can have guests; a skip is recorded where it cannot.
///
/// # Errors
/// A variable names a program that is none.
pub(crate) fn has_guests() -> Result<bool, tools::Missing> {
    match tools::machine(HYPERVISOR) {
        Ok(()) => Ok(true),
        Err(wrong @ tools::Missing::Variable { .. }) => Err(wrong),
        Err(missing) => {
            skip::record("chaos: stuck guests", &missing.to_string());
            Ok(false)
        }
    }
}

/// What does not answer in a disturbed phase: what of it this machine can have.
struct Troubled {
    volume: Option<Volume>,
    guests: Option<Guests>,
}

/// Lets a volume and guests hang and answer again, and compares what that does to others. `dir` is where the volume is mounted.
pub(crate) async fn disturb(world: &World, dir: &Path, guests: bool, size: Size, rng: &mut Rng) -> Result<()> {
    let volume = Volume::up(world, dir).await?;
    let guests = if guests { Some(Guests::up(world).await?) } else { None };
    if volume.is_none() && guests.is_none() {
        return Ok(());
    }
    let mut troubled = Troubled { volume, guests };
    let (mut healthy, mut disturbed, mut first) = (Latencies::default(), Latencies::default(), Vec::new());
    // The first one of a kind is slower.
    life(world, &mut Latencies::default()).await?;
    for _ in 0..size.phases {
        healthy.merge(lives(world, size.lives).await?);
        troubled.prepare(world).await?;
        disturbed.merge(troubled.phase(world, size.lives, &mut first, rng).await?);
        troubled.recover(world, rng).await?;
    }
    let Troubled { volume, guests } = troubled;
    let compared = Latencies::compare(&healthy, &disturbed);
    if let Some(guests) = guests {
        let healthy: f64 = STATISTICS.iter().filter_map(|call| compared.get(call)).map(|call| call.healthy.p99_ms).sum();
        let most = (SLOWER + ONE_GUEST * u32::try_from(guests.count())?).as_secs_f64() * 1e3;
        world.ledger.first_statistics(FirstStatistics {
            guests: guests.count(),
            times: first.len(),
            max_ms: first.iter().max().copied().unwrap_or_default().as_secs_f64() * 1e3,
            limit_ms: healthy + most,
        });
        guests.down(world).await?;
    }
    world.ledger.compared(compared);
    match volume {
        Some(volume) => volume.down(world).await,
        None => Ok(()),
    }
}

impl Troubled {
    async fn prepare(&mut self, world: &World) -> Result<()> {
        if let Some(volume) = &mut self.volume {
            volume.prepare(world).await?;
        }
        match &mut self.guests {
            Some(guests) => guests.prepare(world).await,
            None => Ok(()),
        }
    }

    /// A disturbed phase. `first` gets how long the first statistics took.
    async fn phase(&self, world: &World, lives: usize, first: &mut Vec<Duration>, rng: &mut Rng) -> Result<Latencies> {
        let ledger = &world.ledger;
        let mut windows = Vec::new();
        if let Some(guests) = &self.guests {
            windows.push(ledger.begin(Disturbance::Guests, &format!("{} of them", guests.count())));
            guests.stop()?;
            let begun = Instant::now();
            statistics(world, &mut Latencies::default()).await?;
            first.push(begun.elapsed());
        }
        if let Some(volume) = &self.volume {
            windows.push(ledger.begin(Disturbance::Volume, ""));
            volume.hang();
        }
        let goes_on = AtomicBool::new(true);
        let calls = async {
            let of_volume = self.volume.as_ref().map(|volume| volume.call(world, &goes_on));
            let of_guests = self.guests.as_ref().map(|guests| guests.call(world, &goes_on, rng));
            tokio::join!(OptionFuture::from(of_volume), OptionFuture::from(of_guests))
        };
        let living = async {
            let lived = self.lives_beside(world, lives).await;
            goes_on.store(false, Ordering::Relaxed);
            if let Some(volume) = &self.volume {
                volume.release();
            }
            if let Some(guests) = &self.guests {
                guests.go_on()?;
            }
            windows.into_iter().for_each(|window| ledger.end(window));
            lived
        };
        let (_, lived) = tokio::join!(calls, living);
        lived
    }

    async fn lives_beside(&self, world: &World, count: usize) -> Result<Latencies> {
        let Some(volume) = &self.volume else { return lives(world, count).await };
        volume.is_waited_for().await?;
        let lived = lives(world, count).await?;
        ensure!(volume.is_waiting(), "nothing waits for the hung volume any more");
        Ok(lived)
    }

    async fn recover(&mut self, world: &World, rng: &mut Rng) -> Result<()> {
        if let Some(volume) = &mut self.volume {
            volume.recover(world).await?;
        }
        match &mut self.guests {
            Some(guests) => guests.recover(world, rng).await,
            None => Ok(()),
        }
    }
}

/// So many pods' lives of each client.
async fn lives(world: &World, count: usize) -> Result<Latencies> {
    let client = async || {
        let mut took = Latencies::default();
        for _ in 0..count {
            life(world, &mut took).await?;
        }
        Ok::<_, anyhow::Error>(took)
    };
    let mut all = Latencies::default();
    for took in try_join_all((0..CLIENTS).map(|_| client())).await? {
        all.merge(took);
    }
    Ok(all)
}

/// A pod with a container, from its beginning to its end, and statistics of all pods.
async fn life(world: &World, took: &mut Latencies) -> Result<()> {
    let name = world.unique("beside");
    let run = took.measure(Call::RunPodSandbox, world.cri().run_pod(world.pod(&name).host_network()));
    let pod = world.once(Call::RunPodSandbox, &name, run).await?;
    let create = took.measure(Call::CreateContainer, pod.create(world.container(&name).sleep()));
    let container = world.once(Call::CreateContainer, &name, create).await?;
    world.once(Call::StartContainer, &name, took.measure(Call::StartContainer, container.start())).await?;
    world.once(Call::ExecSync, &name, took.measure(Call::ExecSync, container.exec(["true"]))).await?;
    world.once(Call::PodSandboxStatus, &name, took.measure(Call::PodSandboxStatus, pod.state())).await?;
    world.once(Call::ContainerStats, &name, took.measure(Call::ContainerStats, container.stats())).await?;
    statistics(world, took).await?;
    world.once(Call::StopContainer, &name, took.measure(Call::StopContainer, container.stop(0))).await?;
    world.once(Call::RemoveContainer, &name, took.measure(Call::RemoveContainer, container.remove())).await?;
    world.once(Call::StopPodSandbox, &name, took.measure(Call::StopPodSandbox, pod.stop())).await?;
    world.once(Call::RemovePodSandbox, &name, took.measure(Call::RemovePodSandbox, pod.remove())).await?;
    Ok(())
}

/// Statistics of all pods of the node, as kubelet asks for them.
async fn statistics(world: &World, took: &mut Latencies) -> Result<()> {
    let [of_containers, of_pods] = STATISTICS;
    let mut runtime = world.runtime();
    let list = took.measure(of_containers, runtime.list_container_stats(ListContainerStatsRequest { filter: None }));
    world.once(of_containers, "all", list).await?;
    let list = took.measure(of_pods, runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest { filter: None }));
    world.once(of_pods, "all", list).await?;
    Ok(())
}
