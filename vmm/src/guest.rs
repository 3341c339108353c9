//! A running machine with its helpers: one unit that lives and ends together.
//!
//! ```text
//!   launch ──▶ Guest ── VMM, virtiofsd, a vsock device where the host has none
//!                │        any of them ends ─▶ all are ended, and the reason is kept
//!                ├── tend    cuts the console, keeps the clock, passes events on
//!                └── agent
//! ```

use std::{
    path::Path,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::{join_all, select_all};
use kuasar_guest_protocol::agent::{
    EventsRequest, OnlineRequest, SetTimeRequest, ShutDownRequest, events_response::event::Kind,
};
use kuasar_sandboxers::{Error, Result, SandboxContext, event::Notice, fdstore::FdStore, process::Ending, types::Exit};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{Instrument, debug, info, warn};

use crate::{
    agent::{Agent, BRIEF, QUICK, tame},
    console::Console,
    hypervisor::Vm,
    launch::{LaunchRecord, Launched},
    spec::Disk,
    stats::KnownStats,
};

/// How often the console is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How often the guest's clock is set to the host's: under load a guest loses milliseconds, and after a pause all of it.
const CLOCK: Duration = Duration::from_secs(10);

/// How long a machine that was asked to may take to switch itself off, beyond the grace of its containers.
const OFF: Duration = Duration::from_secs(5);

/// How long the end of a VMM may take to be told after that of a helper: helpers end with it, and are sooner gone.
const FOLLOWS: Duration = Duration::from_secs(1);

/// How long to wait before an agent that does not answer is tried again.
const AGAIN: Duration = Duration::from_millis(100);

/// Why a machine has ended that was asked to.
const STOPPED: &str = "it was stopped";

/// What becomes of a pod whose machine has ended.
const ANEW: &str = "kubelet starts the pod anew, with crictl remove it and run it again";

/// How many events are taken at a time.
const EVENTS: usize = 64;

/// What is saved of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GuestRecord {
    /// The driver's own.
    pub(crate) vm: Value,
    /// virtiofsd, vhost-device-vsock.
    pub(crate) helpers: Vec<LaunchRecord>,
}

/// A running machine.
#[derive(Debug)]
pub(crate) struct Guest {
    vm: Arc<dyn Vm>,
    helpers: Vec<Launched>,
    agent: Agent,
    console: Console,
    ending: Ending,
    reason: OnceLock<String>,
    /// It was asked to end. Until it has, its containers run and are answered for.
    stopping: AtomicBool,
    tending: Mutex<Vec<JoinHandle<()>>>,
    known: KnownStats,
}

impl Guest {
    /// Watches a machine that has been started or taken over.
    pub(crate) fn watch(vm: Arc<dyn Vm>, helpers: Vec<Launched>, console: Console, fds: FdStore) -> Arc<Self> {
        let agent = Agent::at(vm.vsock(), fds);
        let guest = Arc::new(Self {
            vm,
            helpers,
            agent,
            console,
            ending: Ending::pending(),
            reason: OnceLock::new(),
            stopping: AtomicBool::new(false),
            tending: Mutex::default(),
            known: KnownStats::default(),
        });
        tokio::spawn(guest.clone().until_ended().in_current_span());
        guest
    }

    async fn until_ended(self: Arc<Self>) {
        let helper = async {
            if self.helpers.is_empty() {
                return std::future::pending().await;
            }
            let (exit, index, _) = select_all(self.helpers.iter().map(|helper| Box::pin(helper.exited()))).await;
            (exit, index)
        };
        let reason = tokio::select! {
            biased;
            exit = self.vm.exited() => self.why_it_ended(exit),
            (exit, index) = helper => match timeout(FOLLOWS, self.vm.exited()).await {
                Ok(exit) => self.why_it_ended(exit),
                Err(_) => {
                    let name = self.helpers.get(index).map(|helper| helper.record().name).unwrap_or_default();
                    format!("{name}, which it cannot do without, ended with status {}", exit.status)
                }
            },
        };
        // The first reason is the true one: what follows is ended by us.
        let stopped = || STOPPED.to_owned();
        let reason = self.reason.get_or_init(|| if self.stopping.load(Ordering::Relaxed) { stopped() } else { reason });
        info!(reason, "the machine has ended");
        self.end_all().await;
        self.ending.tell(Exit::now(0));
    }

    fn why_it_ended(&self, exit: Exit) -> String {
        match (self.vm.last_words(), self.console.last_lines()) {
            (Some(words), _) => format!("its hypervisor ended: {}", tame(words.trim(), 2048)),
            // As a guest does whose agent cannot go on, and says why beforehand.
            (None, said) if exit.status == 0 && !said.is_empty() => {
                format!("it switched itself off; last on its console: {said}")
            }
            (None, _) if exit.status == 0 => {
                "the VM powered off before its kernel printed anything; check its memory and its kernel image".into()
            }
            (None, _) => format!("its hypervisor ended with status {}", exit.status),
        }
    }

    /// Kills what still runs of it.
    async fn end_all(&self) {
        let vm = self.vm.kill().await;
        let helpers = join_all(self.helpers.iter().map(Launched::kill)).await;
        for error in helpers.into_iter().chain([vm]).filter_map(Result::err) {
            warn!(error = error.report(), "cannot end a process of the machine");
        }
    }

    /// What containers were last known to use.
    pub(crate) fn known_stats(&self) -> &KnownStats {
        &self.known
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    pub(crate) fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    pub(crate) fn console(&self) -> &Console {
        &self.console
    }

    /// The last that the hypervisor and the helpers have said, by their names.
    pub(crate) fn words(&self) -> Vec<(String, Option<String>)> {
        let helpers = self.helpers.iter().map(|helper| (helper.record().name, helper.last_words()));
        std::iter::once(("hypervisor".into(), self.vm.last_words())).chain(helpers).collect()
    }

    pub(crate) fn record(&self) -> GuestRecord {
        GuestRecord { vm: self.vm.record(), helpers: self.helpers.iter().map(Launched::record).collect() }
    }

    /// The pids of all of it.
    pub(crate) fn pids(&self) -> Vec<u32> {
        std::iter::once(self.vm.pid()).chain(self.helpers.iter().map(Launched::pid)).collect()
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.reason.get().is_some() || self.ending.known().is_some()
    }

    /// Resolves when all of it has ended.
    pub(crate) async fn ended(&self) -> Exit {
        self.ending.wait().await
    }

    /// Why it ended.
    pub(crate) fn reason(&self) -> String {
        self.reason.get().cloned().unwrap_or_else(|| STOPPED.into())
    }

    pub(crate) fn gone(&self) -> Error {
        Error::Unavailable { what: "the pod's virtual machine".into(), why: format!("{}; {ANEW}", self.reason()) }
    }

    /// Does something with the guest, which fails with the reason when the machine ends meanwhile.
    pub(crate) async fn unless_ended<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            _ = self.ended() => Err(self.gone()),
            done = work => match done {
                Err(_) if self.has_ended() => {
                    self.ended().await;
                    Err(self.gone())
                }
                done => done,
            },
        }
    }

    /// After a call was cut off: waits until the agent answers again, or false when the machine ends.
    pub(crate) async fn agent_is_back(&self) -> bool {
        let again = async {
            loop {
                sleep(AGAIN).await;
                if self.set_time().await.is_ok() {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            _ = self.ended() => false,
            () = again => true,
        }
    }

    /// Begins to look after a guest that is up.
    pub(crate) fn tend(self: &Arc<Self>, context: &SandboxContext) {
        let notices = context.notices.clone();
        let weak = Arc::downgrade(self);
        let housekeeping = async move {
            let (mut look, mut clock) = (interval(LOOK), interval(CLOCK));
            look.set_missed_tick_behavior(MissedTickBehavior::Delay);
            clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
            clock.tick().await;
            loop {
                let set = tokio::select! {
                    _ = look.tick() => false,
                    _ = clock.tick() => true,
                };
                let Some(guest) = weak.upgrade().filter(|guest| !guest.has_ended()) else { return };
                if let Err(error) = guest.console.cut() {
                    warn!(error = error.report(), "the console's log cannot be kept small");
                }
                if set && let Err(error) = guest.set_time().await {
                    debug!(error = error.report(), "cannot set the guest's clock");
                }
            }
        };
        let guest = self.clone();
        let passing = async move {
            let mut after = 0;
            loop {
                let request = EventsRequest { after, ..EventsRequest::default() };
                let asked = guest
                    .agent
                    .call("ask for events", None, |client, context| async move { client.events(context, &request).await });
                let happened = tokio::select! {
                    biased;
                    _ = guest.ended() => return,
                    happened = asked => happened,
                };
                match happened {
                    Ok(happened) => {
                        let mut saved = Vec::new();
                        for event in happened.events.into_iter().take(EVENTS) {
                            after = after.max(event.number);
                            let Ok(container) = event.container.parse() else { continue };
                            if event.kind.enum_value() == Ok(Kind::OUT_OF_MEMORY) {
                                let kills = Some(event.oom_kills).filter(|kills| *kills > 0);
                                saved.push(notices.report(&container, Notice::OutOfMemory { kills }));
                            }
                        }
                        // The guest forgets what it is told was noted.
                        tokio::select! {
                            biased;
                            _ = guest.ended() => return,
                            _ = join_all(saved) => {}
                        }
                        // A guest can make up as many as it likes.
                        sleep(AGAIN).await;
                    }
                    Err(error) => {
                        debug!(error = error.report(), "cannot ask the guest for events");
                        if !guest.agent_is_back().await {
                            return;
                        }
                    }
                }
            }
        };
        let tasks = [tokio::spawn(housekeeping.in_current_span()), tokio::spawn(passing.in_current_span())];
        self.tending.lock().unwrap_or_else(PoisonError::into_inner).extend(tasks);
    }

    /// Also finds out, every [`CLOCK`], whether the guest answers.
    async fn set_time(&self) -> Result<()> {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).map_err(Error::failed("read the clock"))?;
        let time_ns = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
        let request = SetTimeRequest { time_ns, ..SetTimeRequest::default() };
        let set = self
            .agent
            .call("set the clock", Some(QUICK), |client, context| async move { client.set_time(context, &request).await });
        let mut set = std::pin::pin!(set);
        let set = match timeout(BRIEF, &mut set).await {
            Ok(set) => set,
            Err(_) => {
                self.agent.fall_silent();
                set.await
            }
        };
        set.map(drop)
    }

    /// Ends it: after the grace, in which its containers may end by themselves and what they have written reaches the disks.
    pub(crate) async fn stop(&self, grace: Duration) {
        if !grace.is_zero() && !self.has_ended() {
            let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
            let request = ShutDownRequest { grace_ms, ..ShutDownRequest::default() };
            let asked = async {
                let asked = self.agent.call("shut down", Some(grace + OFF), |client, context| async move {
                    client.shut_down(context, &request).await
                });
                if let Err(error) = asked.await {
                    // The machine may be off before its answer is out.
                    debug!(error = error.report(), "the guest does not answer to being shut down");
                }
                self.ended().await
            };
            self.stopping.store(true, Ordering::Relaxed);
            if timeout(grace + OFF, asked).await.is_err() {
                warn!("the guest has not switched itself off; its machine is killed");
            }
        }
        self.reason.get_or_init(|| STOPPED.into());
        self.end_all().await;
        self.ended().await;
        for task in self.tending.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }

    /// Ends a machine whose guest does not do what it has to.
    pub(crate) async fn give_up(&self, why: String) {
        let reason = self.reason.get_or_init(|| why);
        warn!(reason, "the machine is ended");
        self.end_all().await;
        self.ended().await;
    }

    pub(crate) async fn add_disk(&self, source: &Path, serial: &str, readonly: bool) -> Result<()> {
        let disk = Disk { serial: serial.into(), path: source.into(), readonly };
        self.unless_ended(self.vm.add_disk(&disk)).await
    }

    pub(crate) async fn remove_disk(&self, serial: &str) -> Result<()> {
        if self.has_ended() {
            return Ok(());
        }
        match self.unless_ended(self.vm.remove_disk(serial)).await {
            Err(_) if self.has_ended() => Ok(()),
            removed => removed,
        }
    }

    /// The serial numbers of its disks.
    pub(crate) async fn disks(&self) -> Result<Vec<String>> {
        self.unless_ended(self.vm.disks()).await
    }

    /// Has the guest use what was added to its machine, and limit its containers to what the pod may have; 0 is as it was.
    pub(crate) async fn online(&self, cpus: u32, memory_bytes: u64, pod_memory_bytes: u64) -> Result<()> {
        let request = OnlineRequest { cpus, memory_bytes, pod_memory_bytes, ..OnlineRequest::default() };
        let asked = self.agent.call("use added processors and memory", Some(QUICK), |client, context| async move {
            client.online(context, &request).await
        });
        self.unless_ended(asked).await.map(drop)
    }
}
