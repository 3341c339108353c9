//! What the owner task does for each request. The typed face of these is in [`handle`](crate::handle).

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::future::{Either, join_all};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tracing::error;

use crate::{
    cgroup::Stats,
    contract::{Container, Process},
    error::{Error, Result},
    event::{Event, EventKind},
    handle::{ContainerStatus, ProcessStatus, SandboxStatus},
    lane::{Scope, Track},
    lifecycle::{ProcessRequest, ProcessState, ProcessStep, SandboxRequest, SandboxState, SandboxStep},
    measure::Meter,
    owner::{ContainerEntry, Key, Owner, ProcessEntry, Reply, name},
    registry::SAVE,
    types::{ContainerHead, ContainerSpec, ExecSpec, Exit, PodResources, Support},
};

/// How long the end of an exec that was sent SIGKILL may take.
const DEATH: Duration = Duration::from_secs(20);

impl Owner {
    pub(crate) fn start(&mut self, reply: Reply<SandboxStatus>) {
        self.in_turn(&Track::Sandbox, move |owner| {
            if let Err(denial) = owner.state.admit(&owner.spec.id, SandboxRequest::Start) {
                return owner.answer(reply, Err(denial.into()));
            }
            owner.sandbox_step(SandboxStep::Start);
            let attempt = owner.registry.attempt(&owner.spec, None, "start the sandbox");
            let sandbox = owner.sandbox.clone();
            owner.job(
                Track::Sandbox,
                attempt.watch(async move { sandbox.start().await }),
                move |owner, started| match started {
                    Ok(pid) => {
                        attempt.enter(SAVE);
                        owner.sandbox_step(SandboxStep::Started { pid, at: SystemTime::now() });
                        owner.watch_sandbox();
                        owner.after_save(move |owner, saved| match saved {
                            Ok(()) => drop(reply.send(Ok(owner.status()))),
                            // It would come back as one that is not started, and cannot be started any more.
                            Err(why) => {
                                owner.discard(reply, attempt.failed(Error::failed("save that the sandbox is started")(why)))
                            }
                        });
                    }
                    Err(error) => owner.discard(reply, error),
                },
            );
        });
    }

    /// Ends a sandbox whose start failed. containerd never asks about such a sandbox again, so it cannot be left for later.
    fn discard(&mut self, reply: Reply<SandboxStatus>, cause: Error) {
        let sandbox = self.sandbox.clone();
        self.remove(async move { sandbox.delete().await }, move |owner, removed| {
            if let Err(error) = removed {
                error!(error = error.report(), "a sandbox whose start failed could not be removed; delete it again");
                owner.sandbox_step(SandboxStep::Ended { exit: Exit::now(255) });
            }
            owner.answer(reply, Err(cause));
        });
    }

    pub(crate) fn stop(&mut self, grace: Duration, reply: Reply<()>) {
        self.in_turn(&Track::Sandbox, move |owner| {
            let stopped = matches!(owner.state, SandboxState::Stopped { .. });
            // One that has ended by itself may have left things that only its stop releases.
            if stopped && owner.told_to_stop && owner.lost.is_empty() {
                return owner.answer(reply, Ok(()));
            }
            let orphans = owner.never_started();
            owner.stop_now(grace, move |owner, stopped| match stopped {
                Ok(()) if orphans.is_empty() => owner.stopped(reply),
                Ok(()) => owner.delete_orphans(orphans, reply),
                Err(error) => {
                    if reply.is_closed() {
                        error!(
                            error = error.report(),
                            "the sandbox cannot be stopped, and nobody waits for that; stop it again"
                        );
                    }
                    owner.answer(reply, Err(error));
                }
            });
        });
    }

    /// Ends everything in the sandbox, containers that could not be recovered among it. For whoever has the sandbox's lane.
    pub(crate) fn stop_now(&mut self, grace: Duration, then: impl FnOnce(&mut Self, Result<()>) + Send + 'static) {
        self.sandbox_step(SandboxStep::Stop);
        let sandbox = self.sandbox.clone();
        self.job(Track::Sandbox, async move { sandbox.stop(grace).await }, move |owner, stopped| match stopped {
            Ok(()) => {
                owner.told_to_stop = true;
                owner.end_lost(then);
            }
            Err(error) => then(owner, Err(error)),
        });
    }

    /// Goes on with a stop that the daemon before this one has begun, or with a start that nobody waits for any more.
    pub(crate) fn resume_stop(&mut self) {
        let (reply, _) = oneshot::channel();
        self.stop(Duration::ZERO, reply);
    }

    fn stopped(&mut self, reply: Reply<()>) {
        self.sandbox_step(SandboxStep::Ended { exit: Exit::now(0) });
        // If this were lost, the sandbox would come back as ready and could never be removed.
        self.after_save(move |_, saved| {
            let _ = reply.send(saved.map_err(Error::failed("save that the sandbox is stopped")));
        });
    }

    /// Containers that were created and not started, and are not being started now.
    fn never_started(&self) -> Vec<Key> {
        let unstarted =
            |entry: &ContainerEntry| entry.init.lane.is_idle() && matches!(entry.init.state, ProcessState::Created { .. });
        self.containers.values().filter(|entry| unstarted(entry)).map(|entry| (entry.head.id.clone(), None)).collect()
    }

    /// Deletes containers of a stopped sandbox that were never started, then answers. containerd stops and deletes its containers
    /// before it stops their sandbox, but it forgets the task of one whose creation was cancelled at its end ("failed to get task
    /// pid"), and removes neither container nor pod as long as we know of that task.
    fn delete_orphans(&mut self, orphans: Vec<Key>, reply: Reply<()>) {
        let deletions: Vec<_> = orphans
            .into_iter()
            .map(|key| {
                let (told, deleted) = oneshot::channel();
                self.delete_process(key.clone(), told);
                async move { (key.0, deleted.await) }
            })
            .collect();
        self.job(Track::Sandbox, async move { Ok(join_all(deletions).await) }, move |owner, deletions| {
            for (container, deleted) in deletions.into_iter().flatten() {
                if let Ok(Err(error)) = deleted {
                    error!(%container, error = error.report(), "a container that was never started remains until its sandbox is deleted");
                }
            }
            owner.stopped(reply);
        });
    }

    pub(crate) fn delete(&mut self, reply: Reply<()>) {
        self.in_turn(&Track::Sandbox, move |owner| {
            owner.close(&Scope::Sandbox);
            // First: what hangs in it ends with it.
            if owner.told_to_stop && owner.lost.is_empty() {
                return owner.delete_stopped(reply);
            }
            owner.stop_now(Duration::ZERO, move |owner, stopped| match stopped {
                Ok(()) => owner.delete_stopped(reply),
                Err(error) => {
                    owner.reopen(&Scope::Sandbox);
                    owner.answer(reply, Err(error));
                }
            });
        });
    }

    fn delete_stopped(&mut self, reply: Reply<()>) {
        // Anything half made by a job would be left behind.
        self.when_quiet(Scope::Sandbox, move |owner| {
            let sandbox = owner.sandbox.clone();
            let containers: Vec<_> = owner.containers.values().map(delete_container).collect();
            let delete = async move {
                for delete in containers {
                    delete.await?;
                }
                sandbox.delete().await
            };
            owner.remove(delete, move |owner, removed| owner.answer(reply, removed));
        });
    }

    /// Runs the backend's part of a removal, then removes the state. In two jobs: an exit that is told meanwhile is saved, and
    /// that must not write into a directory that is being removed.
    fn remove(
        &mut self,
        backend: impl Future<Output = Result<()>> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<()>) + Send + 'static,
    ) {
        self.close(&Scope::Sandbox);
        self.job(Track::Sandbox, backend, move |owner, deleted| {
            if let Err(error) = deleted {
                owner.reopen(&Scope::Sandbox);
                return then(owner, Err(error));
            }
            owner.sealed = true;
            let (store, spec) = (owner.registry.store().clone(), owner.spec.clone());
            owner.job(Track::Sandbox, async move { store.remove(&spec.namespace, &spec.id) }, move |owner, removed| {
                match removed {
                    Ok(()) => owner.remove_from_registry(),
                    Err(_) => {
                        owner.sealed = false;
                        owner.reopen(&Scope::Sandbox);
                    }
                }
                then(owner, removed);
            });
        });
    }

    /// The sandbox is gone: nothing refers to it any more, and waiting calls are answered.
    fn remove_from_registry(&mut self) {
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            self.forget(&id);
        }
        self.sandbox_step(SandboxStep::Ended { exit: Exit::now(0) });
        self.registry.forget_sandbox(&self.spec.namespace, &self.spec.id);
        self.gone = true;
    }

    pub(crate) fn update(&mut self, resources: PodResources, reply: Reply<()>) {
        self.in_turn(&Track::Sandbox, move |owner| {
            if let Err(denial) = owner.state.admit(&owner.spec.id, SandboxRequest::Update) {
                return owner.answer(reply, Err(denial.into()));
            }
            let sandbox = owner.sandbox.clone();
            let update = async move { sandbox.update(&resources).await.map(|()| resources) };
            owner.job(Track::Sandbox, update, move |owner, updated| {
                let updated = updated.map(|resources| {
                    Arc::make_mut(&mut owner.spec).resources = resources;
                    owner.changed();
                });
                owner.answer(reply, updated);
            });
        });
    }

    pub(crate) fn status(&self) -> SandboxStatus {
        let mut containers: Vec<_> = self
            .containers
            .values()
            .map(|entry| ContainerStatus {
                id: entry.head.id.clone(),
                bundle: entry.head.bundle.clone(),
                init: process_status(&entry.init, None),
                execs: entry.execs.iter().map(|(id, exec)| process_status(exec, Some(id.clone()))).collect(),
                unrecovered: self.lost.get(&entry.head.id).map(|lost| lost.why().to_owned()),
            })
            .collect();
        let lost = self.lost.values().filter(|lost| lost.execs().is_none());
        containers.extend(lost.map(|lost| ContainerStatus {
            id: lost.record.head.id.clone(),
            bundle: lost.record.head.bundle.clone(),
            init: ProcessStatus { exec: None, state: lost.record.state, node_pid: None, stdio: lost.record.head.stdio.clone() },
            execs: Vec::new(),
            unrecovered: Some(lost.why().to_owned()),
        }));
        containers.sort_by(|a, b| a.id.cmp(&b.id));
        SandboxStatus {
            spec: self.spec.clone(),
            state: self.state,
            created_at: self.created_at,
            technique: self.capabilities.technique.clone(),
            detail: self.sandbox.describe(),
            containers,
        }
    }

    pub(crate) fn create_container(&mut self, spec: ContainerSpec, reply: Reply<u32>) {
        let claimed = self
            .state
            .admit(&self.spec.id, SandboxRequest::CreateContainer)
            .map_err(Error::from)
            .and_then(|()| if spec.stdio.terminal { self.require("a terminal", |can| &can.terminal) } else { Ok(()) })
            .and_then(|()| self.registry.claim_container(&self.spec.namespace, &spec.id, &self.spec.id));
        if let Err(error) = claimed {
            return self.answer(reply, Err(error));
        }
        let head = ContainerHead { id: spec.id.clone(), bundle: spec.bundle.clone(), stdio: spec.stdio.clone() };
        let rootfs = spec.rootfs.clone();
        let attempt = self.registry.attempt(&self.spec, Some(&head.id), "create the container");
        let sandbox = self.sandbox.clone();
        self.creating += 1;
        self.background(attempt.watch(async move { sandbox.create_container(spec).await }), move |owner, created| {
            owner.creating -= 1;
            let container = match created {
                Ok(container) => container,
                Err(error) => {
                    owner.registry.forget_container(&owner.spec.namespace, &head.id);
                    return owner.answer(reply, Err(error));
                }
            };
            // The sandbox may have been stopped while the container was made.
            if let Err(denial) = owner.state.admit(&owner.spec.id, SandboxRequest::CreateContainer) {
                return owner.take_back(head, container, reply, denial.into());
            }
            let pid = container.pid().unwrap_or(0);
            let init = ProcessEntry::new(container.clone(), ProcessState::Created { pid: Some(pid) }, head.stdio.clone());
            let entry = ContainerEntry {
                head: head.clone(),
                container: container.clone(),
                init,
                execs: std::collections::BTreeMap::new(),
                oom: Default::default(),
                meter: Default::default(),
            };
            owner.containers.insert(head.id.clone(), entry);
            let (bundle, stdio) = (head.bundle.clone(), head.stdio.clone());
            let kind = EventKind::Created { bundle, rootfs, stdio, pid };
            let event = owner.keep_event(Event::now(&owner.spec.namespace, &head.id, kind));
            attempt.enter(SAVE);
            owner.after_save(move |owner, saved| {
                if let Err(why) = saved {
                    let unsaved = owner.containers.remove(&head.id);
                    unsaved.into_iter().for_each(|entry| owner.dismiss(entry.init));
                    owner.drop_event(event);
                    let error = attempt.failed(Error::failed("save the container's state")(why));
                    return owner.take_back(head, container, reply, error);
                }
                owner.tell_event(event);
                owner.watch_process((head.id, None), container);
                let _ = reply.send(Ok(pid));
            });
        });
    }

    /// Removes a container that was made but cannot be kept, and answers why.
    fn take_back(&mut self, head: ContainerHead, container: Arc<dyn Container>, reply: Reply<u32>, cause: Error) {
        self.creating += 1;
        self.background(async move { container.delete().await }, move |owner, deleted| {
            owner.creating -= 1;
            if let Err(error) = deleted {
                error!(container = %head.id, error = error.report(), "a half-made container could not be removed");
            }
            owner.registry.forget_container(&owner.spec.namespace, &head.id);
            let _ = reply.send(Err(cause));
        });
    }

    pub(crate) fn add_exec(&mut self, container: crate::id::ContainerId, spec: ExecSpec, reply: Reply<()>) {
        // In the init's lane: an exec cannot be added while its container is started, paused or deleted.
        let init = (container, None);
        self.in_turn(&Track::work(&init), move |owner| {
            let handle = match owner.admit_exec(&init, &spec) {
                Ok(handle) => handle,
                Err(error) => return owner.answer(reply, Err(error)),
            };
            let (id, stdio) = (spec.id.clone(), spec.stdio.clone());
            owner.job(Track::work(&init), async move { handle.exec(spec).await }, move |owner, made| {
                let added = made.and_then(|process| {
                    let entry = owner.container(&init.0)?;
                    let pid = process.pid();
                    entry.execs.insert(id.clone(), ProcessEntry::new(process, ProcessState::Created { pid }, stdio));
                    owner.changed();
                    owner.publish(&init.0, EventKind::ExecAdded { exec: id });
                    Ok(())
                });
                owner.answer(reply, added);
            });
        });
    }

    fn admit_exec(&mut self, init: &Key, spec: &ExecSpec) -> Result<Arc<dyn Container>> {
        self.require("exec", |can| &can.exec)?;
        self.admit(init, ProcessRequest::Exec)?;
        let entry = self.container(&init.0)?;
        if entry.execs.contains_key(&spec.id) {
            return Err(Error::AlreadyExists { kind: "exec", id: spec.id.to_string() });
        }
        Ok(entry.container.clone())
    }

    pub(crate) fn start_process(&mut self, key: Key, reply: Reply<u32>) {
        if let Ok(process) = self.process(&key) {
            process.starting += 1;
        }
        self.in_turn(&Track::work(&key), move |owner| {
            let process = match owner.admit(&key, ProcessRequest::Start) {
                Ok(process) => process,
                Err(error) => return owner.answer_start(key, reply, Err(error)),
            };
            let start = process.clone();
            let start = async move { start.start().await };
            // An exec has no report: a probe whose program is missing fails every few seconds, and would drive out all others.
            let start = match &key {
                (id, None) => Either::Left(owner.registry.attempt(&owner.spec, Some(id), "start the container").watch(start)),
                (_, Some(_)) => Either::Right(start),
            };
            owner.job(Track::work(&key), start, move |owner, started| {
                if let Ok(pid) = started {
                    owner.step(&key, ProcessStep::Started { pid });
                    if key.1.is_some() {
                        // A container's first process is watched since it was created.
                        owner.watch_process(key.clone(), process);
                    }
                    owner.publish(&key.0, EventKind::started(key.1.clone(), pid));
                }
                owner.answer_start(key, reply, started);
            });
        });
    }

    fn answer_start(&mut self, key: Key, reply: Reply<u32>, started: Result<u32>) {
        self.after_save(move |owner, _| {
            if let Ok(process) = owner.process(&key) {
                process.starting = process.starting.saturating_sub(1);
            }
            // The client may have gone away: fine.
            let _ = reply.send(started);
        });
    }

    /// Sends a signal beside what else is under way: SIGTERM and SIGKILL are what ends that.
    pub(crate) fn kill(&mut self, key: Key, signal: i32, all: bool, reply: Reply<()>) {
        if let Ok(process) = self.process(&key) {
            // containerd deletes what has ended while another of its callers may still try to kill it, and closes the connection when
            // Delete is answered: this answer must not wait for that one.
            if matches!(process.state, ProcessState::Stopped { .. }) {
                let refused = self.admit(&key, ProcessRequest::Kill).map(drop);
                return self.answer(reply, refused);
            }
            if process.signals.is_closed() {
                return self.answer(reply, Err(Error::Finished { id: name(&key).1.to_owned() }));
            }
        }
        // An exec that is being started has no process yet.
        let unborn = self.process(&key).map_or(true, |process| process.state == ProcessState::Created { pid: None });
        let work = Track::work(&key);
        let send = move |owner: &mut Self| {
            owner.in_turn(&Track::Signals(key.clone()), move |owner| match owner.admit(&key, ProcessRequest::Kill) {
                Ok(process) => {
                    let kill = async move { process.kill(signal, all).await };
                    owner.job(Track::Signals(key), kill, move |owner, sent| owner.answer(reply, sent));
                }
                Err(error) => owner.answer(reply, Err(error)),
            });
        };
        if unborn { self.in_turn(&work, send) } else { send(self) }
    }

    pub(crate) fn resize(&mut self, key: Key, size: crate::types::WindowSize, reply: Reply<()>) {
        self.in_lane(key, ProcessRequest::Resize, reply, move |process| async move { process.resize(size).await });
    }

    pub(crate) fn close_stdin(&mut self, key: Key, reply: Reply<()>) {
        self.in_lane(key, ProcessRequest::CloseStdin, reply, |process| async move { process.close_stdin().await });
    }

    /// A request that changes no state of ours.
    fn in_lane<F>(
        &mut self,
        key: Key,
        request: ProcessRequest,
        reply: Reply<()>,
        work: impl FnOnce(Arc<dyn Process>) -> F + Send + 'static,
    ) where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.in_turn(&Track::work(&key), move |owner| match owner.admit(&key, request) {
            Ok(process) => owner.job(Track::Work(key), work(process), move |owner, done| owner.answer(reply, done)),
            Err(error) => owner.answer(reply, Err(error)),
        });
    }

    pub(crate) fn delete_process(&mut self, key: Key, reply: Reply<ProcessStatus>) {
        // containerd cancels the Start of an exec whose client goes away, does not kill a process whose pid it was never told, and only
        // deletes it. An exec whose start was answered has to be killed first, as with containerd's own shim.
        let unheard = key.1.is_some() && self.process(&key).is_ok_and(|process| process.starting > 0);
        self.in_turn(&Track::work(&key), move |owner| {
            let running = owner.process(&key).is_ok_and(|process| matches!(process.state, ProcessState::Running { .. }));
            if let Some(exit) = owner.ended_before(&key) {
                return owner.delete_lost(key, exit, reply);
            }
            if !(unheard && running)
                && let Err(error) = owner.admit(&key, ProcessRequest::Delete)
            {
                return owner.answer(reply, Err(error));
            }
            let scope = Scope::Process(key.clone());
            owner.close(&scope);
            owner.when_quiet(scope, move |owner| owner.delete_quiet(key, reply));
        });
    }

    /// Deletes a container that cannot be recovered, and had ended before.
    fn delete_lost(&mut self, key: Key, exit: Exit, reply: Reply<ProcessStatus>) {
        let Some(lost) = self.lost.get(&key.0) else { return };
        let (state, stdio) = (lost.record.state, lost.record.head.stdio.clone());
        self.remove_lost(key.0.clone(), move |owner, removed| {
            let status = removed.map(|()| {
                owner.record_deletion(&key, state);
                owner.publish(&key.0, EventKind::Deleted { exec: None, pid: state.pid(), exit });
                ProcessStatus { exec: None, state, node_pid: None, stdio }
            });
            owner.answer(reply, status);
        });
    }

    fn delete_quiet(&mut self, key: Key, reply: Reply<ProcessStatus>) {
        let delete = match (&key.1, self.container(&key.0)) {
            (None, Ok(entry)) => Either::Left(delete_container(entry)),
            (_, _) => match self.process(&key) {
                Ok(process) => Either::Right(delete_exec(process)),
                Err(error) => return self.answer(reply, Err(error)),
            },
        };
        self.job(Track::work(&key), delete, move |owner, deleted| {
            owner.tell_early_exit(&key);
            let status = deleted.and_then(|()| owner.process_deleted(&key));
            if status.is_err() {
                owner.reopen(&Scope::Process(key));
            }
            owner.answer(reply, status);
        });
    }

    fn process_deleted(&mut self, key: &Key) -> Result<ProcessStatus> {
        // Never started, so nothing but this delete has ended it.
        self.tell_exit(key, Exit::now(137));
        let status = process_status(self.process(key)?, key.1.clone());
        let (pid, exit) = (status.state.pid(), status.state.exit().unwrap_or_else(|| Exit::now(137)));
        self.record_deletion(key, status.state);
        match &key.1 {
            None => self.forget(&key.0),
            Some(exec) => {
                let removed = self.container(&key.0)?.execs.remove(exec);
                self.changed();
                removed.into_iter().for_each(|process| self.dismiss(process));
            }
        }
        self.publish(&key.0, EventKind::Deleted { exec: key.1.clone(), pid, exit });
        Ok(status)
    }

    pub(crate) fn pause(&mut self, key: Key, reply: Reply<()>) {
        self.freeze(key, ProcessRequest::Pause, ProcessStep::Paused, EventKind::Paused, reply);
    }

    pub(crate) fn resume(&mut self, key: Key, reply: Reply<()>) {
        self.freeze(key, ProcessRequest::Resume, ProcessStep::Resumed, EventKind::Resumed, reply);
    }

    fn freeze(&mut self, init: Key, request: ProcessRequest, step: ProcessStep, event: EventKind, reply: Reply<()>) {
        self.in_turn(&Track::work(&init), move |owner| {
            let admitted = owner
                .require("pausing", |can| &can.pause)
                .and_then(|()| owner.admit(&init, request))
                .and_then(|_| Ok(owner.container(&init.0)?.container.clone()));
            let container = match admitted {
                Ok(container) => container,
                Err(error) => return owner.answer(reply, Err(error)),
            };
            let work = async move {
                if request == ProcessRequest::Pause { container.pause().await } else { container.resume().await }
            };
            owner.job(Track::work(&init), work, move |owner, done| {
                if done.is_ok() && owner.step(&init, step) {
                    owner.publish(&init.0, event);
                }
                owner.answer(reply, done);
            });
        });
    }

    pub(crate) fn update_container(&mut self, init: Key, resources: Value, reply: Reply<()>) {
        self.in_turn(&Track::work(&init), move |owner| {
            let admitted = owner
                .require("updating resources", |can| &can.update)
                .and_then(|()| owner.admit(&init, ProcessRequest::Update))
                .and_then(|_| Ok(owner.container(&init.0)?.container.clone()));
            match admitted {
                Ok(container) => {
                    let update = async move { container.update(resources).await };
                    owner.job(Track::Work(init), update, move |owner, done| owner.answer(reply, done));
                }
                Err(error) => owner.answer(reply, Err(error)),
            }
        });
    }

    fn require(&self, operation: &'static str, of: impl FnOnce(&crate::types::Capabilities) -> &Support) -> Result<()> {
        of(&self.capabilities).clone().map_err(|why| Error::Unsupported { operation, why })
    }
}

/// Releases a container with all its execs.
fn delete_container(entry: &ContainerEntry) -> impl Future<Output = Result<()>> + Send + use<> {
    let execs: Vec<_> = entry.execs.values().map(|exec| exec.process.clone()).collect();
    let container = entry.container.clone();
    async move {
        for exec in execs {
            exec.delete().await?;
        }
        container.delete().await
    }
}

/// Releases an exec; one that runs, because the client that started it has gone meanwhile, is ended before.
fn delete_exec(entry: &ProcessEntry) -> impl Future<Output = Result<()>> + Send + use<> {
    let (process, running) = (entry.process.clone(), matches!(entry.state, ProcessState::Running { .. }));
    async move {
        if running {
            match process.kill(libc::SIGKILL, false).await {
                Err(Error::Finished { .. }) | Ok(()) => {}
                Err(error) => return Err(error),
            }
            if timeout(DEATH, process.exited()).await.is_err() {
                return Err(Error::TimedOut {
                    operation: "the end of an exec that was killed".into(),
                    seconds: DEATH.as_secs(),
                });
            }
        }
        process.delete().await
    }
}

pub(crate) fn process_status(entry: &ProcessEntry, exec: Option<crate::id::ExecId>) -> ProcessStatus {
    ProcessStatus { exec, state: entry.state, node_pid: entry.process.node_pid(), stdio: entry.stdio.clone() }
}

impl Owner {
    /// The status of one process.
    pub(crate) fn process_state(&mut self, key: &Key) -> Result<crate::handle::ContainerProcess> {
        let bundle = self.container(&key.0)?.head.bundle.clone();
        Ok(crate::handle::ContainerProcess { bundle, process: process_status(self.process(key)?, key.1.clone()) })
    }

    /// The container, if it can be measured.
    pub(crate) fn measurable(&mut self, init: &Key) -> Result<Measurable> {
        self.admit(init, ProcessRequest::Stats)?;
        let entry = self.container(&init.0)?;
        Ok(Measurable { id: init.0.clone(), container: entry.container.clone(), meter: entry.meter.clone() })
    }

    /// All containers.
    pub(crate) fn all_measurable(&self) -> Vec<Measurable> {
        let measurable = |entry: &ContainerEntry| Measurable {
            id: entry.head.id.clone(),
            container: entry.container.clone(),
            meter: entry.meter.clone(),
        };
        self.containers.values().map(measurable).collect()
    }
}

/// A container with what it used last.
pub(crate) struct Measurable {
    id: crate::id::ContainerId,
    container: Arc<dyn Container>,
    meter: Meter<Stats>,
}

impl Measurable {
    pub(crate) async fn measure(self) -> Result<Stats> {
        let Self { id, container, meter } = self;
        meter.read(format!("container {id}"), async move { container.stats().await }).await
    }
}
