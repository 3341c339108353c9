//! The task that owns a sandbox.
//!
//! Everyone else sends it closures over its state ([`SandboxHandle`](crate::registry::SandboxHandle) wraps that); it runs
//! them one after the other, so the state needs no lock. What takes time (anything of the backend) it starts as a job and
//! goes on; the job's end comes back as one more closure. Each process has a *lane*: while a job of that process runs, further
//! requests for it queue, which is what makes "Kill is answered before Delete" true.
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
    task::JoinSet,
    time::sleep,
};
use tracing::{Instrument, error, info, info_span};

use crate::{
    contract::{Container, Process, Sandbox, SandboxContext},
    error::{Error, Result},
    event::{Event, EventKind},
    failpoint::{self, Failpoint},
    id::{ContainerId, ExecId},
    lifecycle::{Denial, ProcessRequest, ProcessState, ProcessStep, SandboxState, SandboxStep},
    registry::Registry,
    store::{ContainerRecord, DeletedRecord, ExecRecord, SandboxRecord},
    types::{Capabilities, ContainerHead, Exit, SandboxSpec},
};

pub(crate) type Call = Box<dyn FnOnce(&mut Owner) + Send>;
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;
/// Deletions that are remembered. A request that a daemon's death has left without an answer is repeated to the next daemon at once, so
/// these need to cover what can be deleted in a pod in an instant.
const DELETED: usize = 32;
/// Events of one sandbox that are saved.
const OUTBOX: usize = 256;
/// When to save what can wait, unless something else has it saved before: that an event was taken (a daemon that dies before tells it
/// again), and what could not be saved because the disk is full.
const REST: Duration = Duration::from_millis(500);

type AfterSave = Box<dyn FnOnce(&mut Owner, Result<(), String>) + Send>;

/// One process: a container's first (`None`) or an exec.
pub(crate) type Key = (ContainerId, Option<ExecId>);

/// Requests for one process (or for the sandbox itself) that wait for the job that runs.
#[derive(Default)]
pub(crate) struct Lane {
    busy: bool,
    queue: VecDeque<Call>,
}

/// A process and what is known of it.
pub(crate) struct ProcessEntry {
    pub(crate) state: ProcessState,
    pub(crate) stdio: crate::stdio::Stdio,
    pub(crate) process: Arc<dyn Process>,
    /// Tells all who wait. Never changes once set.
    pub(crate) exit: watch::Sender<Option<Exit>>,
    /// An exit that came before its start, or while that was under way: told when what is under way is over.
    early_exit: Option<Exit>,
    lane: Lane,
}

impl ProcessEntry {
    pub(crate) fn new(process: Arc<dyn Process>, state: ProcessState, stdio: crate::stdio::Stdio) -> Self {
        let (exit, _) = watch::channel(state.exit());
        Self { state, stdio, process, exit, early_exit: None, lane: Lane::default() }
    }

    /// Whether no job of it runs.
    pub(crate) fn is_idle(&self) -> bool {
        !self.lane.busy
    }
}

/// A container and what is known of it.
pub(crate) struct ContainerEntry {
    pub(crate) head: ContainerHead,
    pub(crate) container: Arc<dyn Container>,
    pub(crate) init: ProcessEntry,
    pub(crate) execs: BTreeMap<ExecId, ProcessEntry>,
}

/// The state of one sandbox. Only its task touches it.
pub(crate) struct Owner {
    pub(crate) spec: Arc<SandboxSpec>,
    pub(crate) capabilities: Arc<Capabilities>,
    pub(crate) sandbox: Arc<dyn Sandbox>,
    pub(crate) context: SandboxContext,
    pub(crate) registry: Registry,
    pub(crate) state: SandboxState,
    pub(crate) created_at: SystemTime,
    pub(crate) exit: watch::Sender<Option<Exit>>,
    pub(crate) containers: HashMap<ContainerId, ContainerEntry>,
    pub(crate) lane: Lane,
    /// Containers being created, which have no entry and no lane yet.
    pub(crate) creating: usize,
    /// Wants to run when no job runs in any lane.
    when_idle: Vec<Call>,
    jobs: JoinSet<Call>,
    changed: bool,
    after_save: Vec<AfterSave>,
    /// Containers that could not be taken over from an earlier daemon.
    pub(crate) unrecovered: Vec<ContainerRecord>,
    /// The last deletions, in order.
    pub(crate) deleted: VecDeque<DeletedRecord>,
    /// Events that are to be saved as long as nobody has taken them, in order, each with its number.
    outbox: VecDeque<(u64, Event)>,
    events: u64,
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
        context: SandboxContext,
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
            context,
            registry,
            state,
            created_at,
            exit: watch::channel(ended).0,
            containers: HashMap::new(),
            lane: Lane::default(),
            creating: 0,
            when_idle: Vec::new(),
            jobs: JoinSet::new(),
            changed: false,
            after_save: Vec::new(),
            unrecovered: Vec::new(),
            deleted: VecDeque::new(),
            outbox: VecDeque::new(),
            events: 0,
            stale: false,
            unsaved: false,
            sealed: false,
            gone: false,
        }
    }

    /// Runs until the sandbox is deleted or the daemon ends.
    pub(crate) async fn run(mut self, mut calls: mpsc::UnboundedReceiver<Call>) {
        let span = info_span!("sandbox", sandbox_id = %self.spec.id);
        let work = async {
            // What the recovery has found out.
            self.settle().await;
            while !self.gone {
                let call = tokio::select! {
                    call = calls.recv() => match call {
                        Some(call) => call,
                        None => return,
                    },
                    Some(done) = self.jobs.join_next() => match done {
                        Ok(call) => call,
                        // Jobs catch their panics and are never aborted.
                        Err(error) => { error!(%error, "a job was lost"); continue }
                    },
                    () = sleep(REST), if self.stale => {
                        self.changed();
                        Box::new(|_: &mut Self| {}) as Call
                    }
                };
                self.apply(call);
                // What else has arrived shares the save.
                while let Ok(call) = calls.try_recv() {
                    self.apply(call);
                }
                self.settle().await;
            }
        };
        work.instrument(span).await;
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
            if self.idle() {
                for call in std::mem::take(&mut self.when_idle) {
                    call(self);
                }
            }
            if !self.changed && self.after_save.is_empty() {
                return;
            }
        }
    }

    async fn save(&mut self) -> Result<(), String> {
        let record = self.record();
        let store = self.registry.store().clone();
        let saved = match tokio::task::spawn_blocking(move || store.save(&record)).await {
            Ok(saved) => saved.map_err(|error| error.report()),
            Err(error) => Err(error.to_string()),
        };
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
                .collect(),
        });
        SandboxRecord {
            spec: (*self.spec).clone(),
            state: self.state,
            created_at: self.created_at,
            backend: self.sandbox.record(),
            containers: containers.chain(self.unrecovered.iter().cloned()).collect(),
            deleted: self.deleted.iter().cloned().collect(),
            events: self.outbox.iter().map(|(_, event)| event.clone()).collect(),
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
        if self.outbox.len() == OUTBOX {
            self.outbox.pop_front();
        }
        self.events += 1;
        self.outbox.push_back((self.events, event));
        self.changed();
        self.events
    }

    pub(crate) fn tell_event(&mut self, number: u64) {
        let Some((_, event)) = self.outbox.iter().find(|(kept, _)| *kept == number) else { return };
        let (registry, spec) = (self.registry.clone(), self.spec.clone());
        self.context.events.send_kept(event.clone(), move || {
            let Ok(sandbox) = registry.sandbox(&spec.namespace, &spec.id) else { return };
            sandbox.post(move |owner| {
                owner.drop_event(number);
                owner.stale = true;
            });
        });
    }

    pub(crate) fn drop_event(&mut self, number: u64) {
        self.outbox.retain(|(kept, _)| *kept != number);
    }

    /// Remembers a deletion for whoever asks for it again.
    pub(crate) fn bury(&mut self, key: &Key, state: ProcessState) {
        if self.deleted.len() == DELETED {
            self.deleted.pop_front();
        }
        self.deleted.push_back(DeletedRecord { container: key.0.clone(), exec: key.1.clone(), state });
    }

    /// Whether no job runs in any lane.
    pub(crate) fn idle(&self) -> bool {
        let idle = |entry: &ContainerEntry| entry.init.is_idle() && entry.execs.values().all(ProcessEntry::is_idle);
        !self.lane.busy && self.creating == 0 && self.containers.values().all(idle)
    }

    pub(crate) fn when_idle(&mut self, call: impl FnOnce(&mut Self) + Send + 'static) {
        self.when_idle.push(Box::new(call));
    }

    fn lane(&mut self, key: Option<&Key>) -> Option<&mut Lane> {
        match key {
            None => Some(&mut self.lane),
            Some(key) => self.process(key).ok().map(|process| &mut process.lane),
        }
    }

    /// Runs `call` when no job runs in the lane of `key` (`None`: the sandbox's own), now if that is so. Unknown processes have
    /// no lane: `call` runs at once and finds that out.
    pub(crate) fn in_turn(&mut self, key: Option<&Key>, call: impl FnOnce(&mut Self) + Send + 'static) {
        match self.lane(key) {
            Some(lane) if lane.busy => lane.queue.push_back(Box::new(call)),
            _ => call(self),
        }
    }

    /// Starts a job in a lane. `then` gets its result when it has ended, and what queued meanwhile runs after that.
    pub(crate) fn job<T: Send + 'static>(
        &mut self,
        key: Option<Key>,
        job: impl Future<Output = Result<T>> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<T>) + Send + 'static,
    ) {
        if let Some(lane) = self.lane(key.as_ref()) {
            lane.busy = true;
        }
        self.background(job, move |owner, result| {
            failpoint::reach(Failpoint::Done);
            if let Some(lane) = owner.lane(key.as_ref()) {
                lane.busy = false;
            }
            then(owner, result);
            if let Some(key) = &key {
                owner.tell_early_exit(key);
            }
            // Each of these may make the lane busy again, and the rest goes on waiting; or remove it, and the rest is dropped, which
            // their clients are told as NotFound.
            while let Some(call) = owner.lane(key.as_ref()).filter(|lane| !lane.busy).and_then(|lane| lane.queue.pop_front()) {
                call(owner);
            }
        });
    }

    /// Starts a job that belongs to no lane: reading, or waiting for an exit.
    pub(crate) fn background<T: Send + 'static>(
        &mut self,
        job: impl Future<Output = Result<T>> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<T>) + Send + 'static,
    ) {
        let job = AssertUnwindSafe(job).catch_unwind().in_current_span();
        self.jobs.spawn(async move {
            let result = job.await.unwrap_or_else(|panic| Err(panicked(&*panic)));
            Box::new(move |owner: &mut Self| then(owner, result)) as Call
        });
    }

    pub(crate) fn container(&mut self, id: &ContainerId) -> Result<&mut ContainerEntry> {
        let missing = || Error::NotFound { kind: "container", id: id.to_string() };
        self.containers.get_mut(id).ok_or_else(missing)
    }

    pub(crate) fn process(&mut self, key: &Key) -> Result<&mut ProcessEntry> {
        let (container, exec) = key;
        let entry = self.container(container)?;
        match exec {
            None => Ok(&mut entry.init),
            Some(exec) => entry.execs.get_mut(exec).ok_or_else(|| Error::NotFound { kind: "exec", id: exec.to_string() }),
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

    /// Watches for the end of a process that exists.
    pub(crate) fn watch_process(&mut self, key: Key, process: Arc<dyn Process>) {
        self.background(async move { Ok(process.exited().await) }, move |owner, exit| {
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
        self.background(async move { Ok(sandbox.exited().await) }, |owner, exit| {
            let exit = exit.unwrap_or_else(|error| {
                error!(error = error.report(), "lost track of the sandbox");
                Exit::now(255)
            });
            // While a stop runs, its end is what counts: only then is everything really gone.
            owner.in_turn(None, move |owner| {
                owner.sandbox_step(SandboxStep::Ended { exit });
            });
        });
    }

    fn process_exited(&mut self, key: &Key, exit: Exit) {
        // Deleted meanwhile: the answer to Delete has told it.
        let Ok(process) = self.process(key) else { return };
        if process.lane.busy && matches!(process.state, ProcessState::Created { .. }) {
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
        if let Some(entry) = self.containers.remove(id) {
            for process in entry.execs.into_values().chain([entry.init]) {
                process.exit.send_if_modified(|exit| {
                    let unknown = exit.is_none();
                    exit.get_or_insert_with(|| Exit::now(137));
                    unknown
                });
            }
        }
        self.registry.forget_container(&self.spec.namespace, id);
        self.changed();
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
