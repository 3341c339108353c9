//! What the owner task does for each request. The typed face of these is in [`handle`](crate::handle).

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::future::{Either, join_all};
use serde_json::Value;
use tokio::sync::oneshot;
use tracing::error;

use crate::{
    contract::{Container, Process},
    error::{Error, Result},
    event::{Event, EventKind},
    handle::{ContainerStatus, ProcessStatus, SandboxStatus},
    lifecycle::{ProcessRequest, ProcessState, ProcessStep, SandboxRequest, SandboxState, SandboxStep},
    owner::{ContainerEntry, Key, Owner, ProcessEntry, Reply, name},
    registry::SAVE,
    types::{ContainerHead, ContainerSpec, ExecSpec, Exit, PodResources, Support},
};

impl Owner {
    pub(crate) fn start(&mut self, reply: Reply<SandboxStatus>) {
        self.in_turn(None, move |owner| {
            if let Err(denial) = owner.state.admit(&owner.spec.id, SandboxRequest::Start) {
                return owner.answer(reply, Err(denial.into()));
            }
            owner.sandbox_step(SandboxStep::Start);
            let attempt = owner.registry.attempt(&owner.spec, None, "start the sandbox");
            let sandbox = owner.sandbox.clone();
            owner.job(None, attempt.watch(async move { sandbox.start().await }), move |owner, started| match started {
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
            });
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
        self.in_turn(None, move |owner| {
            if let SandboxState::Stopped { .. } = owner.state {
                return owner.answer(reply, Ok(()));
            }
            owner.sandbox_step(SandboxStep::Stop);
            let orphans = owner.never_started();
            let sandbox = owner.sandbox.clone();
            owner.job(None, async move { sandbox.stop(grace).await }, move |owner, stopped| match stopped {
                Ok(()) if orphans.is_empty() => owner.stopped(reply),
                Ok(()) => owner.delete_orphans(orphans, reply),
                Err(error) => owner.answer(reply, Err(error)),
            });
        });
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
            |entry: &ContainerEntry| entry.init.is_idle() && matches!(entry.init.state, ProcessState::Created { .. });
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
        self.job(None, async move { Ok(join_all(deletions).await) }, move |owner, deletions| {
            for (container, deleted) in deletions.into_iter().flatten() {
                if let Ok(Err(error)) = deleted {
                    error!(%container, error = error.report(), "a container that was never started remains until its sandbox is deleted");
                }
            }
            owner.stopped(reply);
        });
    }

    pub(crate) fn delete(&mut self, reply: Reply<()>) {
        // Anything half made by a job would be left behind.
        self.when_idle(move |owner| owner.in_turn(None, move |owner| owner.delete_now(reply)));
    }

    fn delete_now(&mut self, reply: Reply<()>) {
        let sandbox = self.sandbox.clone();
        let live = !matches!(self.state, SandboxState::Stopped { .. });
        let containers: Vec<_> = self.containers.values().map(delete_container).collect();
        self.sandbox_step(SandboxStep::Stop);
        let delete = async move {
            if live {
                sandbox.stop(Duration::ZERO).await?;
            }
            for delete in containers {
                delete.await?;
            }
            sandbox.delete().await
        };
        self.remove(delete, move |owner, removed| owner.answer(reply, removed));
    }

    /// Runs the backend's part of a removal, then removes the state. In two jobs: an exit that is told meanwhile is saved, and
    /// that must not write into a directory that is being removed.
    fn remove(
        &mut self,
        backend: impl Future<Output = Result<()>> + Send + 'static,
        then: impl FnOnce(&mut Self, Result<()>) + Send + 'static,
    ) {
        self.job(None, backend, move |owner, deleted| {
            if let Err(error) = deleted {
                return then(owner, Err(error));
            }
            owner.sealed = true;
            let (store, spec) = (owner.registry.store().clone(), owner.spec.clone());
            owner.job(None, async move { store.remove(&spec.namespace, &spec.id) }, move |owner, removed| {
                match removed {
                    Ok(()) => owner.vanish(),
                    Err(_) => owner.sealed = false,
                }
                then(owner, removed);
            });
        });
    }

    /// The sandbox is gone: nothing refers to it any more, and whoever waits is told.
    fn vanish(&mut self) {
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            self.forget(&id);
        }
        self.sandbox_step(SandboxStep::Ended { exit: Exit::now(0) });
        self.registry.forget_sandbox(&self.spec.namespace, &self.spec.id);
        self.gone = true;
    }

    pub(crate) fn update(&mut self, resources: PodResources, reply: Reply<()>) {
        self.in_turn(None, move |owner| {
            if let Err(denial) = owner.state.admit(&owner.spec.id, SandboxRequest::Update) {
                return owner.answer(reply, Err(denial.into()));
            }
            let sandbox = owner.sandbox.clone();
            let update = async move { sandbox.update(&resources).await.map(|()| resources) };
            owner.job(None, update, move |owner, updated| {
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
            })
            .collect();
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
            };
            owner.containers.insert(head.id.clone(), entry);
            let (bundle, stdio) = (head.bundle.clone(), head.stdio.clone());
            let kind = EventKind::Created { bundle, rootfs, stdio, pid };
            let event = owner.keep_event(Event::now(&owner.spec.namespace, &head.id, kind));
            attempt.enter(SAVE);
            owner.after_save(move |owner, saved| {
                if let Err(why) = saved {
                    owner.containers.remove(&head.id);
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
        self.in_turn(Some(&init.clone()), move |owner| {
            let handle = match owner.admit_exec(&init, &spec) {
                Ok(handle) => handle,
                Err(error) => return owner.answer(reply, Err(error)),
            };
            let (id, stdio) = (spec.id.clone(), spec.stdio.clone());
            owner.job(Some(init.clone()), async move { handle.exec(spec).await }, move |owner, made| {
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
        self.in_turn(Some(&key.clone()), move |owner| {
            let process = match owner.admit(&key, ProcessRequest::Start) {
                Ok(process) => process,
                Err(error) => return owner.answer(reply, Err(error)),
            };
            let start = process.clone();
            let start = async move { start.start().await };
            // An exec has no report: a probe whose program is missing fails every few seconds, and would drive out all others.
            let start = match &key {
                (id, None) => Either::Left(owner.registry.attempt(&owner.spec, Some(id), "start the container").watch(start)),
                (_, Some(_)) => Either::Right(start),
            };
            owner.job(Some(key.clone()), start, move |owner, started| {
                if let Ok(pid) = started {
                    owner.step(&key, ProcessStep::Started { pid });
                    if key.1.is_some() {
                        // A container's first process is watched since it was created.
                        owner.watch_process(key.clone(), process);
                    }
                    owner.publish(&key.0, EventKind::started(key.1.clone(), pid));
                }
                owner.answer(reply, started);
            });
        });
    }

    pub(crate) fn kill(&mut self, key: Key, signal: i32, all: bool, reply: Reply<()>) {
        // containerd deletes what has ended while another of its callers may still try to kill it, and closes the connection when
        // Delete is answered: this answer must not wait for that one.
        if let Ok(process) = self.process(&key)
            && matches!(process.state, ProcessState::Stopped { .. })
        {
            let refused = self.admit(&key, ProcessRequest::Kill).map(drop);
            return self.answer(reply, refused);
        }
        self.in_lane(key, ProcessRequest::Kill, reply, move |process| async move { process.kill(signal, all).await });
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
        self.in_turn(Some(&key.clone()), move |owner| match owner.admit(&key, request) {
            Ok(process) => owner.job(Some(key), work(process), move |owner, done| owner.answer(reply, done)),
            Err(error) => owner.answer(reply, Err(error)),
        });
    }

    pub(crate) fn delete_process(&mut self, key: Key, reply: Reply<ProcessStatus>) {
        self.in_turn(Some(&key.clone()), move |owner| {
            if let Err(error) = owner.admit(&key, ProcessRequest::Delete) {
                return owner.answer(reply, Err(error));
            }
            let delete = match (&key.1, owner.container(&key.0)) {
                (None, Ok(entry)) => Either::Left(delete_container(entry)),
                (_, _) => match owner.process(&key) {
                    Ok(process) => {
                        let process = process.process.clone();
                        Either::Right(async move { process.delete().await })
                    }
                    Err(error) => return owner.answer(reply, Err(error)),
                },
            };
            owner.job(Some(key.clone()), delete, move |owner, deleted| {
                owner.tell_early_exit(&key);
                let status = deleted.and_then(|()| owner.process_deleted(&key));
                owner.answer(reply, status);
            });
        });
    }

    fn process_deleted(&mut self, key: &Key) -> Result<ProcessStatus> {
        // Never started, so nothing but this delete has ended it.
        self.tell_exit(key, Exit::now(137));
        let status = process_status(self.process(key)?, key.1.clone());
        let (pid, exit) = (status.state.pid(), status.state.exit().unwrap_or_else(|| Exit::now(137)));
        self.bury(key, status.state);
        match &key.1 {
            None => self.forget(&key.0),
            Some(exec) => {
                self.container(&key.0)?.execs.remove(exec);
                self.changed();
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
        self.in_turn(Some(&init.clone()), move |owner| {
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
            owner.job(Some(init.clone()), work, move |owner, done| {
                if done.is_ok() && owner.step(&init, step) {
                    owner.publish(&init.0, event);
                }
                owner.answer(reply, done);
            });
        });
    }

    pub(crate) fn update_container(&mut self, init: Key, resources: Value, reply: Reply<()>) {
        self.in_turn(Some(&init.clone()), move |owner| {
            let admitted = owner
                .require("updating resources", |can| &can.update)
                .and_then(|()| owner.admit(&init, ProcessRequest::Update))
                .and_then(|_| Ok(owner.container(&init.0)?.container.clone()));
            match admitted {
                Ok(container) => {
                    let update = async move { container.update(resources).await };
                    owner.job(Some(init), update, move |owner, done| owner.answer(reply, done));
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

pub(crate) fn process_status(entry: &ProcessEntry, exec: Option<crate::id::ExecId>) -> ProcessStatus {
    ProcessStatus { exec, state: entry.state, stdio: entry.stdio.clone() }
}

impl Owner {
    /// The status of one process.
    pub(crate) fn process_state(&mut self, key: &Key) -> Result<crate::handle::ContainerProcess> {
        let bundle = self.container(&key.0)?.head.bundle.clone();
        Ok(crate::handle::ContainerProcess { bundle, process: process_status(self.process(key)?, key.1.clone()) })
    }

    /// The container, if it can be measured.
    pub(crate) fn measurable(&mut self, init: &Key) -> Result<Arc<dyn Container>> {
        self.admit(init, ProcessRequest::Stats).map_err(|error| match error {
            // kubelet asks for stats of containers that have just ended; containerd skips those that are not found.
            Error::Denied(_) => Error::NotFound { kind: "running container", id: name(init).1.to_owned() },
            error => error,
        })?;
        Ok(self.container(&init.0)?.container.clone())
    }
}
