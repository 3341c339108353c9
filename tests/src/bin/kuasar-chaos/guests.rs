//! Pods in virtual machines whose guests stop answering, and clients that keep calling them.
//!
//! A guest is stuck when its VMM gets SIGSTOP: it has not ended, and answers nothing. After SIGCONT it goes on where it was.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::future::{join_all, try_join_all};
use kuasar_tests::cri::SOON;
use kuasar_tests::leak::census;
use kuasar_tests::{Container, Pod, PodSpec, tools, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::time::sleep;
use tonic::Status;

use crate::given_up;
use crate::ledger::{Call, Disturbance, Promise};
use crate::load::exits_with;
use crate::rng::Rng;
use crate::standing::Standing;
use crate::world::World;

/// The sandboxer, and its hypervisor.
pub(crate) const HANDLER: &str = "kuasar-qemu";
pub(crate) const HYPERVISOR: &str = "qemu";
/// How many guests get stuck at a time.
const GUESTS: usize = 3;
/// How long they may take to boot, side by side, where they are emulated.
const BOOT: Duration = Duration::from_secs(120);
/// How far apart their containers print numbers, in milliseconds: beside healthy guests the processors are to be idle.
const APART_MS: &str = "500";
/// Pause between two calls of a client about a guest.
const PAUSE: Duration = Duration::from_millis(100);
/// What a container that is stopped meanwhile ends with, and the grace that it has: more than a phase takes.
const CODE: i32 = 7;
const GRACE_SECS: i64 = 120;

/// A pod in a virtual machine.
struct Guest {
    pod: Pod,
    standing: Standing,
    vmm: Pid,
}

/// All of them, and the container in the first that is stopped while that does not answer.
pub(crate) struct Guests {
    all: Vec<Guest>,
    stopped: Option<(Container, Instant)>,
}

impl Guests {
    /// Boots them, side by side.
    pub(crate) async fn up(world: &World) -> Result<Self> {
        let program = tools::hypervisor(HYPERVISOR)?;
        let program = program.file_name().context("the hypervisor has no name")?;
        let boot = || async {
            let pod = given_up(world.run_pod_within(BOOT, |spec: PodSpec| spec.handler(HANDLER)).await)?;
            let standing = Standing::up(world, &pod, false, APART_MS).await?;
            let vmm = census::programs(&format!("kuasar-vm-{}", pod.id), program)?;
            let vmm = Pid::from_raw(*vmm.first().with_context(|| format!("the pod {} has no VMM", pod.id))?);
            Ok::<_, anyhow::Error>(Guest { pod, standing, vmm })
        };
        let all = try_join_all((0..GUESTS).map(|_| boot())).await.context("boot guests")?;
        Ok(Self { all, stopped: None })
    }

    pub(crate) fn count(&self) -> usize {
        self.all.len()
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        self.all
            .iter()
            .try_for_each(|guest| kill(guest.vmm, signal).with_context(|| format!("send {signal} to the VMM {}", guest.vmm)))
    }

    /// Starts the container that is to be stopped, while its guest answers.
    pub(crate) async fn prepare(&mut self, world: &World) -> Result<()> {
        let Some(first) = self.all.first() else { return Ok(()) };
        let script = format!("trap 'exit {CODE}' TERM; echo ready; sleep 100000 & wait");
        let begun = Instant::now();
        let container = given_up(world.run_container(&first.pod, |spec| spec.sh(&script)).await)?;
        container.wait_log("ready").await?;
        // Of a guest that has told of all its containers each later question could wait anew.
        world.once(Call::ContainerStats, &container.id, container.stats()).await?;
        self.stopped = Some((container, begun));
        Ok(())
    }

    /// Lets them get stuck.
    pub(crate) fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets them go on.
    pub(crate) fn go_on(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Calls them while `goes_on`, and ends when all has been answered.
    pub(crate) async fn call(&self, world: &World, goes_on: &AtomicBool, rng: &mut Rng) {
        let clients = self.all.iter().map(|guest| (guest, rng.fork())).map(|(guest, mut rng)| async move {
            let execs = async {
                while goes_on.load(Ordering::Relaxed) {
                    guest.standing.exec_beside(world, &mut rng, Some(Disturbance::Guests)).await;
                    sleep(PAUSE).await;
                }
            };
            tokio::join!(execs, guest.look(world, goes_on));
        });
        let stop = async {
            if let Some((container, _)) = &self.stopped {
                let stop = container.stop(GRACE_SECS);
                let _ = world.about_disturbed(Disturbance::Guests, Call::StopContainer, &container.id, stop).await;
            }
        };
        tokio::join!(join_all(clients), stop);
    }

    /// Looks whether all is well again: commands run, statistics go on, no line is lost, what was stopped has ended as it should.
    pub(crate) async fn recover(&mut self, world: &World, rng: &mut Rng) -> Result<()> {
        for guest in &self.all {
            guest.standing.exec(world, rng).await;
            guest.standing.look(world);
        }
        if let Some((container, begun)) = self.stopped.take() {
            let stop = || container.stop(GRACE_SECS);
            given_up(world.insist(Call::StopContainer, &container.id, stop).await)?;
            given_up(exits_with(world, &container, CODE, begun).await)?;
            given_up(world.remove_container(&container, 0).await)?;
        }
        let stale = self.used(world).await?;
        let fresh = wait::until("statistics of guests that go on", SOON, || async {
            let used = self.used(world).await?;
            Ok(stale.iter().all(|(id, stale)| used.get(id).is_some_and(|used| used > stale)).then_some(()))
        });
        if let Err(error) = fresh.await {
            world.ledger.broke(Promise::Recovers, 1, &format!("{error:#}"));
        }
        Ok(())
    }

    /// Processor time of each standing container, in nanoseconds.
    async fn used(&self, world: &World) -> Result<BTreeMap<String, u64>, Status> {
        let asked = self.all.iter().map(|guest| async {
            let container = &guest.standing.container;
            let stats = world.once(Call::ContainerStats, &container.id, container.stats()).await?;
            let used = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |used| used.value);
            Ok::<_, Status>((container.id.clone(), used))
        });
        Ok(try_join_all(asked).await?.into_iter().collect())
    }

    /// Compares what has run in them with what was called, and removes them.
    pub(crate) async fn down(self, world: &World) -> Result<()> {
        let guests = self.all.into_iter().map(|guest| async move {
            guest.standing.look(world);
            guest.standing.account(world)?;
            given_up(world.remove_pod(&guest.pod.id).await)
        });
        try_join_all(guests).await.map(drop)
    }
}

impl Guest {
    /// Asks what kubelet asks again and again.
    async fn look(&self, world: &World, goes_on: &AtomicBool) {
        let container = &self.standing.container;
        let (about, what) = (&container.id, Disturbance::Guests);
        // Whatever comes of them is on the ledger.
        while goes_on.load(Ordering::Relaxed) {
            let _ = world.about_disturbed(what, Call::ContainerStats, about, container.stats()).await;
            let _ = world.about_disturbed(what, Call::ContainerStatus, about, container.status()).await;
            let _ = world.about_disturbed(what, Call::PodSandboxStats, &self.pod.id, self.pod.stats()).await;
            let _ = world.about_disturbed(what, Call::PodSandboxStatus, &self.pod.id, self.pod.state()).await;
            sleep(PAUSE).await;
        }
    }
}
