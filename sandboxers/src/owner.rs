//! The task that owns a sandbox.
//!
//! Everyone else sends it closures over its state ([`SandboxHandle`](crate::registry::SandboxHandle) wraps that); it runs
//! them one after the other, so the state needs no lock. What takes time (anything of the backend) it starts as a job and
//! goes on; the job's end comes back as one more closure. Each process has [lanes](crate::lane): while a job of that process runs,
//! further requests for it queue, and its removal waits for all that runs, which is what makes "Kill is answered before Delete" true.
//!
//! What must be saved before it is told is put off: closures mark the state changed and push what is to be said afterwards;
//! after a batch of closures the loop saves once and then says it all.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::FutureExt;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tracing::{Instrument, error, info, info_span};

use crate::{
    cgroup::Stats,
    contract::{Container, Process, Sandbox},
    error::{Error, Result},
    event::{Event, EventKind, Notice, Noticed},
    failpoint::{self, Failpoint},
    id::{ContainerId, ExecId},
    lane::{Lane, Scope, Track},
    lifecycle::{Denial, ProcessRequest, ProcessState, ProcessStep, SandboxState, SandboxStep},
    measure::Meter,
    outbox::Outbox,
    recovery::{Lost, Unrecovered},
    registry::Registry,
    saving,
    store::{ContainerRecord, DeletedRecord, ExecRecord, SandboxRecord},
    types::{Capabilities, ContainerHead, Exit, SandboxSpec},
};

pub(crate) type Call = Box<dyn FnOnce(&mut Owner) + Send>;
/// A request from outside, for whatever answers for the sandbox.
pub(crate) type Request = Box<dyn FnOnce(Subject<'_>) + Send>;
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;
/// Deletions that are remembered. A request that a daemon's death has left without an answer is repeated to the next daemon at once, so
/// these need to cover what can be deleted in a pod in an instant.
const DELETED: usize = 32;
/// Out-of-memory kills of one container within this time are told once: containerd writes each to its disk, in the one queue of all pods.
const OUT_OF_MEMORY: Duration = Duration::from_secs(1);
/// When to save what can wait, unless something else has it saved before: that an event was taken (a daemon that dies before tells it
/// again), and what could not be saved because the disk is full.
const REST: Duration = Duration::from_millis(500);

type AfterSave = Box<dyn FnOnce(&mut Owner, Result<(), String>) + Send>;

/// What answers for a sandbox.
pub(crate) enum Subject<'a> {
    /// Its owner.
    Owner(&'a mut Owner),
    /// Nothing yet: an earlier daemon's sandbox that could not be taken over.
    Unrecovered(&'a mut Unrecovered),
}

/// One process: a container's first (`None`) or an exec.
pub(crate) type Key = (ContainerId, Option<ExecId>);

/// A process and what is known of it.
pub(crate) struct ProcessEntry {
    pub(crate) state: ProcessState,
    pub(crate) stdio: crate::stdio::Stdio,
    pub(crate) process: Arc<dyn Process>,
    /// Tells all who wait. Never changes once set.
    pub(crate) exit: watch::Sender<Option<Exit>>,
    /// An exit that came before its start, or while that was under way: told when what is under way is over.
    early_exit: Option<Exit>,
    /// Requests to start it that have not been answered.
    pub(crate) starting: usize,
    pub(crate) lane: Lane,
    pub(crate) signals: Lane,
}

impl ProcessEntry {
    pub(crate) fn new(process: Arc<dyn Process>, state: ProcessState, stdio: crate::stdio::Stdio) -> Self {
        let (exit, _) = watch::channel(state.exit());
        let (lane, signals) = (Lane::default(), Lane::default());
        Self { state, stdio, process, exit, early_exit: None, starting: 0, lane, signals }
    }
}

/// A container and what is known of it.
pub(crate) struct ContainerEntry {
    pub(crate) head: ContainerHead,
    pub(crate) container: Arc<dyn Container>,
    pub(crate) init: ProcessEntry,
    pub(crate) execs: BTreeMap<ExecId, ProcessEntry>,
    pub(crate) oom: OutOfMemory,
    pub(crate) meter: Meter<Stats>,
}

/// Out-of-memory kills in a container.
#[derive(Default)]
pub(crate) struct OutOfMemory {
    /// How many have been told, or need not be.
    pub(crate) kills: u64,
    /// When last.
    pub(crate) told: Option<Instant>,
}

/// The state of one sandbox. Only its task touches it.
pub(crate) struct Owner {
    pub(crate) spec: Arc<SandboxSpec>,
    pub(crate) capabilities: Arc<Capabilities>,
    pub(crate) sandbox: Arc<dyn Sandbox>,
    pub(crate) registry: Registry,
    pub(crate) state: SandboxState,
    pub(crate) created_at: SystemTime,
    pub(crate) exit: watch::Sender<Option<Exit>>,
    pub(crate) containers: HashMap<ContainerId, ContainerEntry>,
    pub(crate) lane: Lane,
    /// Containers being created, which have no entry and no lane yet.
    pub(crate) creating: usize,
    /// What waits until nothing runs in what it is about.
    pub(crate) draining: Vec<(Scope, Call)>,
    jobs: JoinSet<Call>,
    /// Waits for exits. Nothing is lost with one that is aborted.
    watches: JoinSet<Call>,
    changed: bool,
    after_save: Vec<AfterSave>,
    /// The backend has stopped it, at the request of this daemon.
    pub(crate) told_to_stop: bool,
    /// Containers that could not be taken over from an earlier daemon yet.
    pub(crate) lost: BTreeMap<ContainerId, Lost>,
    /// Changes when one of them is taken over, or gone.
    pub(crate) news: watch::Sender<()>,
    /// The last deletions, in order.
    pub(crate) deleted: VecDeque<DeletedRecord>,
    outbox: Outbox,
    pub(crate) meter: Meter<Option<Stats>>,
    /// Something is to be saved that can wait.
    stale: bool,
    /// The last save has failed.
    unsaved: bool,
    /// Its directory is being removed: nothing is saved any more.
    pub(crate) sealed: bool,
    pub(crate) gone: bool,
}

impl Owner {
    pub(crate) fn new(
        spec: Arc<SandboxSpec>,
        capabilities: Arc<Capabilities>,
        sandbox: Arc<dyn Sandbox>,
        registry: Registry,
        state: SandboxState,
        created_at: SystemTime,
    ) -> Self {
        let ended = match state {
            SandboxState::Stopped { exit } => Some(exit),
            _ => None,
        };
        Self {
            spec,
            capabilities,
            sandbox,
            registry,
            state,
            created_at,
            exit: watch::channel(ended).0,
            containers: HashMap::new(),
            lane: Lane::default(),
            creating: 0,
            draining: Vec::new(),
            jobs: JoinSet::new(),
            watches: JoinSet::new(),
            changed: false,
            after_save: Vec::new(),
            told_to_stop: false,
            lost: BTreeMap::new(),
            news: watch::channel(()).0,
            deleted: VecDeque::new(),
            outbox: Outbox::default(),
            meter: Meter::default(),
            stale: false,
            unsaved: false,
            sealed: false,
            gone: false,
        }
    }

    /// Runs until the sandbox is deleted or the daemon ends; `first` are requests that came before it was recovered.
    pub(crate) async fn run(mut self, first: Vec<Request>, mut calls: mpsc::UnboundedReceiver<Request>) {
        let span = info_span!("sandbox", sandbox_id = %self.spec.id);
        let work = async {
            first.into_iter().for_each(|request| self.serve(request));
            // What the recovery has found out.
            self.settle().await;
            let mut rest = None;
            while !self.gone {
                // From when there was something to save, however many calls there are meanwhile.
                rest = self.stale.then(|| rest.unwrap_or_else(|| Instant::now() + REST));
                let again = self.next_recovery();
                tokio::select! {
                    request = calls.recv() => match request {
                        Some(request) => self.serve(request),
                        None => break,
                    },
                    Some(done) = self.jobs.join_next() => self.finish(done),
                    Some(done) = self.watches.join_next() => self.finish(done),
                    () = until(rest) => {
                        rest = None;
                        self.changed();
                    }
                    () = until(again) => self.recover_lost(),
                }
                // What else has arrived shares the save.
                while !self.gone
                    && let Ok(request) = calls.try_recv()
                {
                    self.serve(request);
                }
                self.settle().await;
            }
            calls.close();
            // What was begun comes to its end.
            while let Some(done) = self.jobs.join_next().await {
                self.finish(done);
                self.settle().await;
            }
            // Nobody keeps them any more.
            for event in self.outbox.rest() {
                self.registry.events().send(event, || {});
            }
        };
        work.instrument(span).await;
    }

    fn serve(&mut self, request: Request) {
        self.apply(Box::new(move |owner| request(Subject::Owner(owner))));
    }

    fn finish(&mut self, done: Result<Call, JoinError>) {
        match done {
            Ok(call) => self.apply(call),
            // Jobs catch their panics and are never aborted.
            Err(error) => error!(%error, "a job was lost"),
        }
    }

    /// A defect in one request must not take the other containers' owner away.
    fn apply(&mut self, call: Call) {
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(|| call(self))) {
            error!(error = panicked(&*panic).report(), "a request was dropped");
        }
    }

    /// Saves what has changed, then says what waited for that; repeats while that changes more.
    async fn settle(&mut self) {
        loop {
            let saved = if std::mem::take(&mut self.changed) && !self.sealed { self.save().await } else { Ok(()) };
            failpoint::reach(Failpoint::Saved);
            for told in std::mem::take(&mut self.after_save) {
                told(self, saved.clone());
            }
            while let Some(call) = self.quieted() {
                call(self);
            }
            if !self.changed && self.after_save.is_empty() {
                return;
            }
        }
    }

    async fn save(&mut self) -> Result<(), String> {
        let record = self.record();
        let store = self.registry.store().clone();
        let saved = saving::run(move || store.save(&record)).await.map_err(|error| error.report());
        self.stale = saved.is_err();
        match &saved {
            Err(why) if !self.unsaved => error!(error = why, "the sandbox's state cannot be saved; trying again until it can"),
            Ok(()) if self.unsaved => info!("the sandbox's state is saved again"),
            _ => {}
        }
        self.unsaved = saved.is_err();
        saved
    }

    pub(crate) fn record(&self) -> SandboxRecord {
        let containers = self.containers.values().map(|entry| ContainerRecord {
            head: entry.head.clone(),
            state: entry.init.state,
            backend: entry.init.process.record(),
            execs: entry
                .execs
                .iter()
                .map(|(id, exec)| ExecRecord {
                    id: id.clone(),
                    stdio: exec.stdio.clone(),
                    state: exec.state,
                    backend: exec.process.record(),
                })
                .chain(self.lost.get(&entry.head.id).and_then(Lost::execs).into_iter().flatten().cloned())
                .collect(),
            oom_kills: entry.oom.kills,
        });
        let lost = self.lost.values().filter(|lost| lost.execs().is_none()).map(|lost| lost.record.clone());
        SandboxRecord {
            spec: (*self.spec).clone(),
            state: self.state,
            created_at: self.created_at,
            backend: self.sandbox.record(),
            containers: containers.chain(lost).collect(),
            deleted: self.deleted.iter().cloned().collect(),
            events: self.outbox.events().cloned().collect(),
        }
    }

    pub(crate) fn changed(&mut self) {
        self.changed = true;
    }

    /// Runs `call` after the state has been saved, or has failed to be.
    pub(crate) fn after_save(&mut self, call: impl FnOnce(&mut Self, Result<(), String>) + Send + 'static) {
        self.after_save.push(Box::new(call));
    }

    /// Answers after the state has been saved. When saving fails the answer is given all the same: what happened has happened,
    /// and the earlier record is enough to recover from.
    pub(crate) fn answer<T: Send + 'static>(&mut self, reply: Reply<T>, result: Result<T>) {
        self.after_save(move |_, _| {
            // The client may have gone away: fine.
            let _ = reply.send(result);
        });
    }

    /// Tells an event after the state has been saved; until it is taken, it is saved too.
    pub(crate) fn publish(&mut self, container: &ContainerId, kind: EventKind) {
        let event = Event::now(&self.spec.namespace, container, kind);
        self.publish_event(event);
    }

    pub(crate) fn publish_event(&mut self, event: Event) {
        let number = self.keep_event(event);
        self.after_save(move |owner, _| owner.tell_event(number));
    }

    /// Has an event saved until it is taken; nobody is told it yet.
    pub(crate) fn keep_event(&mut self, event: Event) -> u64 {
        self.changed();
        self.outbox.keep(event)
    }

    pub(crate) fn tell_event(&mut self, number: u64) {
        self.outbox.release(number);
        self.send_events();
    }

    fn send_events(&mut self) {
        for (number, event) in self.outbox.due() {
            let (registry, spec) = (self.registry.clone(), self.spec.clone());
            self.registry.events().send(event, move || {
                let Ok(sandbox) = registry.sandbox(&spec.namespace, &spec.id) else { return };
                sandbox.post(move |owner| {
                    owner.drop_event(number);
                    owner.stale = true;
                    owner.send_events();
                });
            });
        }
    }

    pub(crate) fn drop_event(&mut self, number: u64) {
        self.outbox.remove(number);
    }

    /// What the backend has noticed by itself.
    pub(crate) fn notice(&mut self, noticed: Noticed) {
        let (id, Notice::OutOfMemory { kills }) = (noticed.container.clone(), noticed.notice);
        // A guest may name any container, and any number.
        let Some(entry) = self.containers.get_mut(&id) else {
            if let Some(lost) = self.lost.get_mut(&id) {
                lost.noticed = Some(noticed);
            }
            return;
        };
        let kills = kills.unwrap_or(entry.oom.kills.saturating_add(1));
        if kills <= entry.oom.kills {
            return;
        }
        entry.oom.kills = kills;
        if self.outbox.tells_out_of_memory(&id) || entry.oom.told.is_some_and(|told| told.elapsed() < OUT_OF_MEMORY) {
            self.stale = true;
            return;
        }
        entry.oom.told = Some(Instant::now());
        self.publish(&id, EventKind::OutOfMemory);
        self.after_save(move |_, _| drop(noticed));
    }

    /// Remembers a deletion for a client that repeats it.
    pub(crate) fn record_deletion(&mut self, key: &Key, state: ProcessState) {
        if self.deleted.len() == DELETED {
            self.deleted.pop_front();
        }
        self.deleted.push_back(DeletedRecord { container: key.0.clone(), exec: key.1.clone(), state });
    }

    /// Starts a job in a lane. `then` gets its result when it has ended, and what queued meanwhile runs after that.
    pub(crate) fn job<T: Send + 'static>(
        &mut self,
        track: Track,
        job: impl Future<Output = Result<T>> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<T>) + Send + 'static,
    ) {
        self.occupy(&track, true);
        self.background(job, move |owner, result| {
            failpoint::reach(Failpoint::Done);
            owner.occupy(&track, false);
            then(owner, result);
            if let Track::Work(key) = &track {
                owner.tell_early_exit(key);
            }
            owner.advance(&track);
        });
    }

    /// Starts a job that belongs to no lane.
    pub(crate) fn background<T: Send + 'static>(
        &mut self,
        job: impl Future<Output = Result<T>> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<T>) + Send + 'static,
    ) {
        self.jobs.spawn(called(job.boxed(), then).boxed());
    }

    pub(crate) fn container(&mut self, id: &ContainerId) -> Result<&mut ContainerEntry> {
        let missing = || match self.lost.get(id) {
            Some(lost) => lost.unavailable(),
            None => Error::NotFound { kind: "container", id: id.to_string() },
        };
        self.containers.get_mut(id).ok_or_else(missing)
    }

    pub(crate) fn process(&mut self, key: &Key) -> Result<&mut ProcessEntry> {
        let (container, exec) = key;
        let lost = exec.as_ref().and_then(|exec| {
            let lost = self.lost.get(container)?;
            lost.execs()?.iter().any(|lost| lost.id == *exec).then(|| lost.unavailable())
        });
        let entry = self.container(container)?;
        match exec {
            None => Ok(&mut entry.init),
            Some(exec) => entry
                .execs
                .get_mut(exec)
                .ok_or_else(|| lost.unwrap_or_else(|| Error::NotFound { kind: "exec", id: exec.to_string() })),
        }
    }

    /// The process, if its state allows the request.
    pub(crate) fn admit(&mut self, key: &Key, request: ProcessRequest) -> Result<Arc<dyn Process>> {
        let process = self.process(key)?;
        let (kind, id) = name(key);
        if request == ProcessRequest::Kill {
            match process.state {
                ProcessState::Stopped { .. } => return Err(Error::Finished { id: id.to_owned() }),
                ProcessState::Created { pid: None } => {
                    return Err(Denial {
                        kind,
                        id: id.to_owned(),
                        state: "created",
                        request: "signal",
                        remedy: "start it first",
                    }
                    .into());
                }
                _ => {}
            }
        }
        process.state.admit(kind, id, request)?;
        Ok(process.process.clone())
    }

    /// Takes a step in a process's life, if the table has it.
    pub(crate) fn step(&mut self, key: &Key, step: ProcessStep) -> bool {
        let Ok(process) = self.process(key) else { return false };
        let Some(next) = process.state.next(step) else { return false };
        process.state = next;
        self.changed();
        true
    }

    /// Takes a step in the sandbox's life, if the table has it.
    pub(crate) fn sandbox_step(&mut self, step: SandboxStep) -> bool {
        let Some(next) = self.state.next(step) else { return false };
        self.state = next;
        self.changed();
        if let SandboxState::Stopped { exit } = next {
            self.after_save(move |owner, _| {
                owner.exit.send_replace(Some(exit));
            });
        }
        true
    }

    /// Waits for an exit.
    fn watch(
        &mut self,
        exit: impl Future<Output = Result<Exit>> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<Exit>) + Send + 'static,
    ) {
        self.watches.spawn(called(exit.boxed(), then).boxed());
    }

    /// Watches for the end of a process that exists.
    pub(crate) fn watch_process(&mut self, key: Key, process: Arc<dyn Process>) {
        self.watch(async move { Ok(process.exited().await) }, move |owner, exit| {
            match exit {
                Ok(exit) => owner.process_exited(&key, exit),
                // Only a panic of the backend gets here. The process may live, but nobody will ever tell its end.
                Err(error) => {
                    error!(container = %key.0, error = error.report(), "lost track of a process");
                    owner.process_exited(&key, Exit::now(255));
                }
            }
        });
    }

    /// Watches for the end of the sandbox itself.
    pub(crate) fn watch_sandbox(&mut self) {
        let sandbox = self.sandbox.clone();
        self.watch(async move { Ok(sandbox.exited().await) }, |owner, exit| {
            let exit = exit.unwrap_or_else(|error| {
                error!(error = error.report(), "lost track of the sandbox");
                Exit::now(255)
            });
            // While a stop runs, its end is what counts: only then is everything really gone.
            owner.in_turn(&Track::Sandbox, move |owner| {
                owner.sandbox_step(SandboxStep::Ended { exit });
            });
        });
    }

    fn process_exited(&mut self, key: &Key, exit: Exit) {
        // Deleted meanwhile: the answer to Delete has told it.
        let Ok(process) = self.process(key) else { return };
        if !process.lane.is_idle() && matches!(process.state, ProcessState::Created { .. }) {
            process.early_exit = Some(exit);
            return;
        }
        self.tell_exit(key, exit);
    }

    /// An exit that came while something was done with a process that was not started yet is told when that is over.
    pub(crate) fn tell_early_exit(&mut self, key: &Key) {
        let early = self.process(key).ok().and_then(|process| process.early_exit.take());
        if let Some(exit) = early {
            self.tell_exit(key, exit);
        }
    }

    pub(crate) fn tell_exit(&mut self, key: &Key, exit: Exit) {
        if !self.step(key, ProcessStep::Exited { exit }) {
            return;
        }
        let Ok(process) = self.process(key) else { return };
        let (pid, sender) = (process.state.pid(), process.exit.clone());
        self.after_save(move |_, _| {
            sender.send_replace(Some(exit));
        });
        self.publish(&key.0, EventKind::Exited { exec: key.1.clone(), pid, exit });
    }

    /// Forgets a container and all its processes; whoever still waits is told an exit.
    pub(crate) fn forget(&mut self, id: &ContainerId) {
        let processes = self.containers.remove(id).into_iter().flat_map(|entry| entry.execs.into_values().chain([entry.init]));
        let lost = self.lost.remove(id);
        self.registry.forget_container(&self.spec.namespace, id);
        self.changed();
        for process in processes {
            process.exit.send_if_modified(|exit| {
                let unknown = exit.is_none();
                exit.get_or_insert_with(|| Exit::now(137));
                unknown
            });
            self.dismiss(process);
        }
        if let Some(lost) = lost {
            self.dismiss_lost(id, lost);
        }
    }

    /// Lets what waits for a process that is gone find that out.
    pub(crate) fn dismiss(&mut self, process: ProcessEntry) {
        for call in process.lane.into_queue().into_iter().chain(process.signals.into_queue()) {
            call(self);
        }
    }
}

/// A job whose end comes back as a call, with an error in place of a panic. What is spawned is boxed: the text of a task, some kilobytes, is
/// there once then and not for each kind of job.
fn called<T: Send + 'static>(
    job: impl Future<Output = Result<T>> + Send + 'static,
    then: impl FnOnce(&mut Owner, Result<T>) + Send + 'static,
) -> impl Future<Output = Call> + Send + 'static {
    let job = AssertUnwindSafe(job).catch_unwind().in_current_span();
    async move {
        let result = job.await.unwrap_or_else(|panic| Err(panicked(&*panic)));
        Box::new(move |owner: &mut Owner| then(owner, result)) as Call
    }
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// How a process is named in errors.
pub(crate) fn name(key: &Key) -> (&'static str, &str) {
    match key {
        (_, Some(exec)) => ("exec", exec.as_str()),
        (container, None) => ("container", container.as_str()),
    }
}

/// Turns a caught panic into an error; the message has been logged by the panic hook.
pub(crate) fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    Error::failed("finish the operation because of a defect in kuasard")(text.unwrap_or("panic without a message"))
}

/// Runs an attempt; a panic is a failure like others.
pub(crate) async fn guarded<T>(attempt: impl Future<Output = Result<T>>) -> Result<T> {
    AssertUnwindSafe(attempt).catch_unwind().await.unwrap_or_else(|panic| Err(panicked(&*panic)))
}
