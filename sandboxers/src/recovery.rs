//! Taking over what an earlier daemon has left, again and again until it succeeds.
//!
//! ```text
//!   record ─▶ attempt ─┬▶ owner task
//!               ▲      └▶ failed: requests are answered Unavailable, ids and parked descriptors stay
//!               └─ pause, or the next request
//! ```
//!
//! The same holds for a container of a sandbox that was recovered ([`Lost`]). What cannot be recovered can be ended: a stop or delete of the
//! sandbox tries once more, and then has the backend remove it as it removes what nobody knows.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};
use tracing::{debug, error, info};

use crate::{
    contract::{Container, Known, Process, Sandbox, Sandboxer},
    error::{Error, Result},
    event::{EventKind, Noticed},
    fdstore::FdStore,
    id::{ContainerId, ExecId, Namespace, SandboxId},
    lane::Track,
    lifecycle::{ProcessState, ProcessStep, SandboxState},
    measure::Meter,
    owner::{Call, ContainerEntry, Key, OutOfMemory, Owner, ProcessEntry, Reply, Request, Subject, guarded},
    registry::Registry,
    stdio::parked_names,
    store::{ContainerRecord, ExecRecord, SandboxRecord},
    types::Exit,
};

/// The pause after the first failed attempt, which doubles; and after which a request makes another attempt at once.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// When something is tried again.
struct Retry {
    failed_at: Instant,
    pause: Duration,
}

impl Retry {
    fn new() -> Self {
        Self { failed_at: Instant::now(), pause: FIRST_PAUSE }
    }

    fn failed(&mut self) {
        *self = Self { failed_at: Instant::now(), pause: (2 * self.pause).min(LONGEST_PAUSE) };
    }

    /// When it is by itself.
    fn at(&self) -> Instant {
        self.failed_at + self.pause
    }

    /// Whether a request is reason enough: else it is answered with what the last attempt has found.
    fn on_request(&self) -> bool {
        self.failed_at.elapsed() >= FIRST_PAUSE
    }
}

/// What answers for a sandbox that could not be taken over yet.
pub(crate) struct Unrecovered {
    id: SandboxId,
    why: String,
    /// Those that want it stopped or deleted.
    removals: Vec<Reply<()>>,
}

impl Unrecovered {
    pub(crate) fn unavailable(&self) -> Error {
        let why = format!("it could not be recovered, which is tried again: {}", self.why);
        Error::Unavailable { what: format!("sandbox {}", self.id), why }
    }

    /// Has it ended and removed.
    pub(crate) fn remove(&mut self, reply: Reply<()>) {
        self.removals.push(reply);
    }
}

/// A sandbox of an earlier daemon that is to be taken over.
struct TakeOver {
    registry: Registry,
    key: (Namespace, SandboxId),
    /// `None`: its state file could not be read for the moment.
    record: Option<SandboxRecord>,
    calls: mpsc::UnboundedReceiver<Request>,
    news: watch::Sender<()>,
}

impl Registry {
    /// Makes a sandbox known, and lets it be recovered. Resolves after the first attempt, to what its descriptors that may still be wanted
    /// are called.
    pub(crate) fn begin_recovery(
        &self,
        key: (Namespace, SandboxId),
        record: Option<SandboxRecord>,
    ) -> oneshot::Receiver<Vec<String>> {
        let (calls, news) = self.announce(&key, record.as_ref());
        let (tell, attempted) = oneshot::channel();
        let take_over = TakeOver { registry: self.clone(), key, record, calls, news };
        tokio::spawn(take_over.run(tell));
        attempted
    }

    async fn recover_sandbox(&self, record: SandboxRecord) -> Result<Owner> {
        let sandboxer = self.sandboxer(&record.spec.sandboxer)?;
        let spec = Arc::new(record.spec);
        let context = self.context(&spec, self.store().dir(&spec.namespace, &spec.id));
        let sandbox = sandboxer.recover(spec.clone(), context, record.backend).await?;
        let capabilities = self.capabilities(&spec.sandboxer)?;
        let mut owner = Owner::new(spec, capabilities, sandbox, self.clone(), record.state, record.created_at);
        record.events.into_iter().for_each(|event| owner.publish_event(event));
        owner.deleted = record.deleted.into();
        for container in record.containers {
            let id = container.head.id.clone();
            let mut lost = Lost::new(container);
            let (found, outcome) =
                lost.part.attempt(&*owner.sandbox.clone(), &owner.registry.fds().clone(), &owner.key()).await;
            owner.take_over(&id, found);
            if let Err(error) = outcome {
                error!(container = %id, error = error.report(), "failed to recover a container; it is tried again");
                lost.why = error.report();
                owner.lost.insert(id, lost);
            }
        }
        match owner.state {
            SandboxState::Ready { .. } => owner.watch_sandbox(),
            SandboxState::Stopping => {
                owner.watch_sandbox();
                owner.resume_stop();
            }
            // Nobody waits for its result any more.
            SandboxState::Starting => owner.resume_stop(),
            SandboxState::Created | SandboxState::Stopped { .. } => {}
        }
        Ok(owner)
    }

    /// The sandboxer of that name; all of them when it is not known which.
    fn backends_of(&self, sandboxer: Option<&str>) -> Result<Vec<&dyn Sandboxer>> {
        match sandboxer {
            Some(name) => Ok(vec![self.sandboxer(name)?]),
            None => Ok(self.backends().collect()),
        }
    }

    /// Has backends remove what they have of a sandbox, but for the containers `keep`; of all of it if that is `None`.
    async fn remove_remains(
        &self,
        key: &(Namespace, SandboxId),
        sandboxer: Option<&str>,
        keep: Option<BTreeSet<ContainerId>>,
    ) -> Result<()> {
        let mut known: Known = self.keys().into_iter().map(|key| (key, None)).collect();
        known.remove(key);
        known.extend(keep.map(|containers| (key.clone(), Some(containers))));
        for backend in self.backends_of(sandboxer)? {
            for leftover in backend.leftovers(&known).await?.into_iter().filter(|leftover| leftover.sandbox == *key) {
                leftover.removal.await?;
            }
        }
        Ok(())
    }
}

impl TakeOver {
    async fn run(mut self, first: oneshot::Sender<Vec<String>>) {
        let mut first = Some(first);
        let mut retry = Retry::new();
        let mut waiting = Vec::new();
        loop {
            let why = match guarded(self.attempt()).await {
                Ok(mut owner) => {
                    debug!(sandbox_id = %self.key.1, "recovered a sandbox");
                    self.registry.note_recovered(&self.key);
                    let _ = self.news.send(());
                    let lost = owner.lost.keys().flat_map(|id| parked_names(&self.key.0, &self.key.1, Some(id))).collect();
                    owner.news = self.news;
                    tokio::spawn(owner.run(waiting, self.calls));
                    first.map(|first| first.send(lost));
                    return;
                }
                Err(error) => error.report(),
            };
            match first.take() {
                Some(first) => {
                    error!(sandbox_id = %self.key.1, error = why, "failed to recover a sandbox; it is tried again");
                    let _ = first.send(parked_names(&self.key.0, &self.key.1, None));
                }
                None => debug!(sandbox_id = %self.key.1, error = why, "failed to recover a sandbox again"),
            }
            self.registry.note_unrecovered(&self.key, why.clone());
            retry.failed();
            // Whoever came during the attempt is answered with its result, too.
            while let Ok(request) = self.calls.try_recv() {
                waiting.push(request);
            }
            let mut subject = Unrecovered { id: self.key.1.clone(), why, removals: Vec::new() };
            loop {
                waiting.drain(..).for_each(|request| request(Subject::Unrecovered(&mut subject)));
                if !subject.removals.is_empty() && self.remove(&mut subject).await {
                    return;
                }
                tokio::select! {
                    () = sleep_until(retry.at()) => break,
                    request = self.calls.recv() => match request {
                        Some(request) => waiting.push(request),
                        None => return,
                    },
                }
                if retry.on_request() {
                    break;
                }
            }
        }
    }

    async fn attempt(&mut self) -> Result<Owner> {
        if self.record.is_none() {
            let record = self.registry.store().read(&self.key.0, &self.key.1)?;
            self.registry.claim_recorded(&self.key, &record);
            self.record = Some(record);
        }
        match self.record.clone() {
            Some(record) => self.registry.recover_sandbox(record).await,
            None => Err(Error::NotFound { kind: "sandbox", id: self.key.1.to_string() }),
        }
    }

    /// Ends and removes it as what nobody knows; whether it is gone.
    async fn remove(&mut self, subject: &mut Unrecovered) -> bool {
        let removed = guarded(self.remove_now()).await;
        for reply in subject.removals.drain(..) {
            let _ = reply.send(match &removed {
                Ok(()) => Ok(()),
                Err(error) => {
                    let why = format!("it could not be recovered ({}), nor be removed: {}", subject.why, error.report());
                    Err(Error::Unavailable { what: format!("sandbox {}", self.key.1), why })
                }
            });
        }
        match removed {
            Ok(()) => info!(sandbox_id = %self.key.1, "removed a sandbox that could not be recovered"),
            Err(error) => {
                error!(sandbox_id = %self.key.1, error = error.report(), "a sandbox that could not be recovered cannot be removed either");
                return false;
            }
        }
        true
    }

    async fn remove_now(&mut self) -> Result<()> {
        let (registry, (namespace, id)) = (self.registry.clone(), &self.key);
        let sandboxer = self.record.as_ref().map(|record| record.spec.sandboxer.clone());
        registry.remove_remains(&self.key, sandboxer.as_deref(), None).await?;
        for backend in registry.backends_of(sandboxer.as_deref())? {
            let processes = backend.processes(namespace, id).await?;
            if !processes.is_empty() {
                let why = format!("its processes {processes:?} still run; end them");
                return Err(Error::Unavailable { what: format!("sandbox {id}"), why });
            }
        }
        registry.store().remove(namespace, id)?;
        registry.release_parked(&parked_names(namespace, id, None));
        let containers = self.record.iter().flat_map(|record| &record.containers);
        containers.for_each(|container| registry.forget_container(namespace, &container.head.id));
        registry.forget_sandbox(namespace, id);
        Ok(())
    }
}

/// A container, or execs of one, that could not be taken over yet.
pub(crate) struct Lost {
    /// What is saved of it meanwhile.
    pub(crate) record: ContainerRecord,
    part: Part,
    why: String,
    retry: Retry,
    /// An attempt is under way.
    busy: bool,
    /// What waits for that, to run in a lane, or at once.
    waiting: Vec<(Option<Track>, Call)>,
    /// The newest of what its backend has noticed meanwhile.
    pub(crate) noticed: Option<Noticed>,
}

/// What is still to be recovered of a container.
#[derive(Clone)]
struct Part {
    /// Its execs are those that are.
    record: ContainerRecord,
    /// The container itself, when the backend has it.
    container: Option<Arc<dyn Container>>,
    /// The container is its owner's already.
    known: bool,
}

/// What an attempt has recovered.
#[derive(Default)]
pub(crate) struct Found {
    entry: Option<ContainerEntry>,
    execs: Vec<(ExecId, ProcessEntry)>,
    /// Processes whose end is still to come.
    live: Vec<Key>,
    /// Those that were started and not recorded as that.
    started: Vec<(Key, u32)>,
    /// Execs that are past recovery, and nothing but an entry.
    given_up: Vec<(ExecId, ProcessState)>,
}

impl Lost {
    fn new(record: ContainerRecord) -> Self {
        let part = Part { record: record.clone(), container: None, known: false };
        Self { record, part, why: String::new(), retry: Retry::new(), busy: false, waiting: Vec::new(), noticed: None }
    }

    pub(crate) fn unavailable(&self) -> Error {
        let why = format!("it could not be recovered, which is tried again: {}", self.why);
        Error::Unavailable { what: format!("container {}", self.record.head.id), why }
    }

    /// Its execs that could not be recovered, where it has been itself.
    pub(crate) fn execs(&self) -> Option<&[ExecRecord]> {
        self.part.known.then_some(&self.part.record.execs)
    }

    /// Why, for people.
    pub(crate) fn why(&self) -> &str {
        &self.why
    }
}

impl Part {
    /// Recovers what it can; what is left is to be tried again. What was recovered is not repeated: it has taken what can be taken once.
    async fn attempt(&mut self, sandbox: &dyn Sandbox, fds: &FdStore, key: &(Namespace, SandboxId)) -> (Found, Result<()>) {
        let mut found = Found::default();
        let outcome = self.attempt_into(&mut found, sandbox, fds, key).await;
        (found, outcome)
    }

    async fn attempt_into(
        &mut self,
        found: &mut Found,
        sandbox: &dyn Sandbox,
        fds: &FdStore,
        key: &(Namespace, SandboxId),
    ) -> Result<()> {
        let ContainerRecord { head, state, backend, oom_kills, .. } = self.record.clone();
        let id = head.id.clone();
        let parked = parked_names(&key.0, &key.1, Some(&id));
        let container = match &self.container {
            Some(container) => container.clone(),
            None => {
                let container = fds.attempt(&parked, guarded(sandbox.recover_container(head.clone(), backend))).await?;
                self.container.insert(container).clone()
            }
        };
        if !self.known {
            guarded(found.note((id.clone(), None), state, &*container)).await?;
            let init = ProcessEntry::new(container.clone(), state, head.stdio.clone());
            let oom = OutOfMemory { kills: oom_kills, ..OutOfMemory::default() };
            let (execs, meter) = (BTreeMap::new(), Meter::default());
            found.entry = Some(ContainerEntry { init, head, container: container.clone(), execs, oom, meter });
            self.known = true;
        }
        let mut outcome = Ok(());
        for exec in std::mem::take(&mut self.record.execs) {
            let recovered = async {
                let ExecRecord { id: exec, stdio, state, backend } = exec.clone();
                let process = container.recover_exec(exec.clone(), stdio.clone(), backend).await?;
                found.note((id.clone(), Some(exec.clone())), state, &*process).await?;
                found.execs.push((exec, ProcessEntry::new(process, state, stdio)));
                Ok(())
            };
            let Err(error) = fds.attempt(&parked, guarded(recovered)).await else { continue };
            debug!(container = %id, exec = %exec.id, error = error.report(), "failed to recover an exec");
            let given_up = match (exec.state, &error) {
                (ProcessState::Stopped { .. }, _) => true,
                // Its FIFOs are gone, and with them whoever would have it started.
                (ProcessState::Created { .. }, Error::Invalid { .. }) => true,
                _ => false,
            };
            if given_up {
                found.given_up.push((exec.id, exec.state));
            } else {
                self.record.execs.push(exec);
                outcome = Err(error);
            }
        }
        outcome
    }
}

impl Found {
    async fn note<P: Process + ?Sized>(&mut self, key: Key, state: ProcessState, process: &P) -> Result<()> {
        let mut live = matches!(state, ProcessState::Running { .. } | ProcessState::Paused { .. });
        if matches!(state, ProcessState::Created { .. }) {
            let started = process.started().await?;
            // A container's first process is there before it is started, and may end.
            live = started.is_some() || key.1.is_none();
            self.started.extend(started.map(|pid| (key.clone(), pid)));
        }
        self.live.extend(live.then_some(key));
        Ok(())
    }
}

impl Owner {
    pub(crate) fn key(&self) -> (Namespace, SandboxId) {
        (self.spec.namespace.clone(), self.spec.id.clone())
    }

    /// Has what was recovered of a container from now on.
    fn take_over(&mut self, id: &ContainerId, found: Found) {
        let Found { entry, execs, live, started, given_up } = found;
        if let Some(entry) = entry {
            self.containers.insert(id.clone(), entry);
        }
        if let Ok(entry) = self.container(id) {
            entry.execs.extend(execs);
        }
        for (key, pid) in started {
            self.step(&key, ProcessStep::Started { pid });
            self.publish(id, EventKind::started(key.1, pid));
        }
        for key in live {
            if let Ok(process) = self.process(&key).map(|entry| entry.process.clone()) {
                self.watch_process(key, process);
            }
        }
        for (exec, state) in given_up {
            self.give_up(id, exec, state);
        }
    }

    /// Deletes an exec that is past recovery, for whoever asks for that.
    fn give_up(&mut self, id: &ContainerId, exec: ExecId, state: ProcessState) {
        let (pid, exit) = (state.pid(), state.exit().unwrap_or_else(|| Exit::now(137)));
        info!(container = %id, exec = %exec, "an exec that has ended, or can never be started, could not be recovered: it is deleted");
        let names = parked_names(&self.spec.namespace, &self.spec.id, Some(id));
        self.registry.release_parked(&names.into_iter().map(|name| format!("{name}{exec}/")).collect::<Vec<_>>());
        let key = (id.clone(), Some(exec.clone()));
        self.record_deletion(&key, ProcessState::Stopped { pid, exit });
        self.registry.note_deleted(&self.key(), self.deleted.back().cloned());
        if state.exit().is_none() {
            self.publish(id, EventKind::Exited { exec: Some(exec.clone()), pid, exit });
        }
        self.publish(id, EventKind::Deleted { exec: Some(exec), pid, exit });
    }

    /// When the next attempt is due.
    pub(crate) fn next_recovery(&self) -> Option<Instant> {
        self.lost.values().filter(|lost| !lost.busy).map(|lost| lost.retry.at()).min()
    }

    /// Tries again what is due.
    pub(crate) fn recover_lost(&mut self) {
        let now = Instant::now();
        let due = self.lost.iter().filter(|(_, lost)| !lost.busy && lost.retry.at() <= now);
        let due: Vec<_> = due.map(|(id, _)| id.clone()).collect();
        due.iter().for_each(|id| self.recover_again(id));
    }

    fn recover_again(&mut self, id: &ContainerId) {
        let Some(lost) = self.lost.get_mut(id) else { return };
        lost.busy = true;
        let (mut part, sandbox, fds, key) = (lost.part.clone(), self.sandbox.clone(), self.registry.fds().clone(), self.key());
        let id = id.clone();
        // As one that is being created: it has no lane of its own.
        self.creating += 1;
        let attempt = async move {
            let (found, outcome) = part.attempt(&*sandbox, &fds, &key).await;
            Ok((part, found, outcome))
        };
        self.background(attempt, move |owner, attempted| {
            owner.creating -= 1;
            let (part, found, outcome) = match attempted {
                Ok((part, found, outcome)) => (Some(part), found, outcome),
                Err(error) => (None, Found::default(), Err(error)),
            };
            owner.recovered(&id, part, found, outcome);
        });
    }

    /// Notes how an attempt has ended, and lets what waited for it go on.
    fn recovered(&mut self, id: &ContainerId, part: Option<Part>, found: Found, outcome: Result<()>) {
        let Some(mut lost) = self.lost.remove(id) else { return };
        self.take_over(id, found);
        let waiting = std::mem::take(&mut lost.waiting);
        if let Some(noticed) = lost.noticed.take_if(|_| self.containers.contains_key(id)) {
            self.notice(noticed);
        }
        match outcome {
            Ok(()) => info!(container = %id, "recovered a container at last"),
            Err(error) => {
                debug!(container = %id, error = error.report(), "failed to recover a container again");
                lost.part = part.unwrap_or(lost.part);
                lost.busy = false;
                lost.why = error.report();
                lost.retry.failed();
                self.lost.insert(id.clone(), lost);
            }
        }
        self.news.send_replace(());
        self.changed();
        self.wake(waiting);
    }

    fn wake(&mut self, waiting: Vec<(Option<Track>, Call)>) {
        for (track, call) in waiting {
            match track {
                Some(track) => self.in_turn(&track, call),
                None => call(self),
            }
        }
    }

    /// Lets a request wait for the recovery of what it is about, where another attempt is reasonable: gives it back else.
    pub(crate) fn await_recovery(&mut self, track: &Track, call: Call) -> Option<Call> {
        let (Track::Work(key) | Track::Signals(key)) = track else { return Some(call) };
        if self.process(key).is_ok() {
            return Some(call);
        }
        let Some(lost) = self.lost.get_mut(&key.0) else { return Some(call) };
        if !lost.busy && !lost.retry.on_request() {
            return Some(call);
        }
        lost.waiting.push((Some(track.clone()), call));
        if !lost.busy {
            self.recover_again(&key.0);
        }
        None
    }

    /// Whether it has ended, as was seen before it was lost: then its removal is all that is wanted of it.
    pub(crate) fn ended_before(&self, key: &Key) -> Option<Exit> {
        let lost = self.lost.get(&key.0).filter(|lost| !lost.busy && !lost.part.known && key.1.is_none())?;
        lost.record.state.exit()
    }

    /// Removes a container that cannot be recovered and has ended.
    pub(crate) fn remove_lost(&mut self, id: ContainerId, then: impl FnOnce(&mut Self, Result<()>) + Send + 'static) {
        let (registry, key, sandboxer, keep) = (self.registry.clone(), self.key(), self.spec.sandboxer.clone(), self.kept(&id));
        if let Some(lost) = self.lost.get_mut(&id) {
            lost.busy = true;
        }
        self.creating += 1;
        let removal = async move { registry.remove_remains(&key, Some(&sandboxer), Some(keep)).await };
        self.background(removal, move |owner, removed| {
            owner.creating -= 1;
            match removed {
                Ok(()) => {
                    owner.forget(&id);
                    then(owner, Ok(()));
                }
                Err(error) => {
                    owner.recovered(
                        &id,
                        None,
                        Found::default(),
                        Err(Error::failed("remove what is left of it")(error.report())),
                    );
                    then(owner, Err(error));
                }
            }
        });
    }

    /// All containers but one that cannot be recovered.
    fn kept(&self, but: &ContainerId) -> BTreeSet<ContainerId> {
        self.containers.keys().chain(self.lost.keys().filter(|id| *id != but)).cloned().collect()
    }

    /// Lets go of what was kept for the recovery of what is gone, and lets what waits for it find that out.
    pub(crate) fn dismiss_lost(&mut self, id: &ContainerId, lost: Lost) {
        self.registry.release_parked(&parked_names(&self.spec.namespace, &self.spec.id, Some(id)));
        self.news.send_replace(());
        self.wake(lost.waiting);
    }

    /// Ends what could not be recovered of a sandbox whose other parts have been stopped: by recovering it, or else by removing it.
    /// For whoever has the sandbox's lane.
    pub(crate) fn end_lost(&mut self, then: impl FnOnce(&mut Self, Result<()>) + Send + 'static) {
        let Some((id, lost)) = self.lost.iter().find(|(_, lost)| !lost.part.known) else { return then(self, Ok(())) };
        let id = id.clone();
        if lost.busy {
            // An attempt, or a removal: one after the other.
            let (told, ended) = oneshot::channel::<()>();
            let call = Box::new(move |_: &mut Self| drop(told));
            if let Some(lost) = self.lost.get_mut(&id) {
                lost.waiting.push((None, call));
            }
            let wait = async move {
                let _ = ended.await;
                Ok(())
            };
            // What has been recovered meanwhile has to be ended, too.
            return self.job(Track::Sandbox, wait, |owner, _| owner.stop_now(Duration::ZERO, then));
        }
        let (registry, key, sandboxer, keep) = (self.registry.clone(), self.key(), self.spec.sandboxer.clone(), self.kept(&id));
        let (mut part, sandbox, fds) = (lost.part.clone(), self.sandbox.clone(), self.registry.fds().clone());
        if let Some(lost) = self.lost.get_mut(&id) {
            lost.busy = true;
        }
        let work = async move {
            let (found, outcome) = part.attempt(&*sandbox, &fds, &key).await;
            if part.known {
                // What has it now can end it.
                return Ok((part, found, outcome, sandbox.stop(Duration::ZERO).await.map(|()| false)));
            }
            let removed = registry.remove_remains(&key, Some(&sandboxer), Some(keep)).await;
            Ok((part, found, outcome, removed.map(|()| true)))
        };
        self.job(Track::Sandbox, work, move |owner, ended| {
            let (part, found, outcome, ended) = match ended {
                Ok((part, found, outcome, ended)) => (Some(part), found, outcome, ended),
                Err(error) => (None, Found::default(), Err(Error::failed("recover it")(error.report())), Err(error)),
            };
            match ended {
                Ok(true) => owner.forget(&id),
                _ => owner.recovered(&id, part, found, outcome),
            }
            match ended {
                Ok(_) => owner.end_lost(then),
                Err(error) => {
                    let why = format!("it could not be recovered, and cannot be ended: {}", error.report());
                    then(owner, Err(Error::Unavailable { what: format!("container {id}"), why }));
                }
            }
        });
    }
}
