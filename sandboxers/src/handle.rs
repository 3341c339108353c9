//! How the rest of the daemon talks to the owner task of a sandbox.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures::future::join_all;
use serde::Serialize;
use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use tracing::debug;

use crate::{
    cgroup::Stats,
    contract::Sandbox,
    error::{Error, Result},
    id::{ContainerId, ExecId, Namespace, SandboxId},
    inside::{Program, ProgramIo, Section},
    lane::Scope,
    lifecycle::{ProcessState, SandboxState},
    measure,
    owner::{Key, Owner, Reply, Request, Subject},
    requests::Measurable,
    stdio::Stdio,
    types::{ContainerSpec, ExecSpec, Exit, PodResources, ProcessInfo, SandboxSpec, WindowSize},
};

/// A sandbox, to send requests to. It may be gone at any time; requests then fail with NotFound.
#[derive(Clone, Debug)]
pub struct SandboxHandle {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The sandbox.
    pub id: SandboxId,
    calls: mpsc::UnboundedSender<Request>,
    /// Changes when something that could not be recovered has been, or is gone.
    news: watch::Receiver<()>,
}

/// A container in a sandbox. It may be gone at any time; requests then fail with NotFound.
#[derive(Clone, Debug)]
pub struct ContainerHandle {
    sandbox: SandboxHandle,
    id: ContainerId,
}

/// What is known of a sandbox.
#[derive(Clone, Debug, Serialize)]
pub struct SandboxStatus {
    /// As it was asked for.
    pub spec: Arc<SandboxSpec>,
    /// Where it is in its life.
    pub state: SandboxState,
    /// When it was created.
    pub created_at: SystemTime,
    /// The technique, for people: `runc 1.3.5`.
    pub technique: String,
    /// The backend's own facts.
    pub detail: Value,
    /// Its containers, by id.
    pub containers: Vec<ContainerStatus>,
}

/// What is known of a container.
#[derive(Clone, Debug, Serialize)]
pub struct ContainerStatus {
    /// The container.
    pub id: ContainerId,
    /// containerd's bundle directory.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: ProcessStatus,
    /// The others, by id.
    pub execs: Vec<ProcessStatus>,
    /// Why it, or one of its execs, could not be recovered from an earlier daemon: it is as that has seen it last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unrecovered: Option<String>,
}

/// What is known of a process.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProcessStatus {
    /// The exec; `None` for a container's first process.
    pub exec: Option<ExecId>,
    /// Where it is in its life.
    pub state: ProcessState,
    /// The process of the node that it is in, where the state's pid is none there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_pid: Option<u32>,
    /// Where its input and output go.
    pub stdio: Stdio,
}

/// A process with what its container adds.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerProcess {
    /// containerd's bundle directory.
    pub bundle: PathBuf,
    /// The process.
    pub process: ProcessStatus,
}

impl SandboxHandle {
    /// A handle, and what its receiver needs.
    pub(crate) fn new(namespace: Namespace, id: SandboxId) -> (Self, mpsc::UnboundedReceiver<Request>, watch::Sender<()>) {
        let ((calls, requests), (news, heard)) = (mpsc::unbounded_channel(), watch::channel(()));
        (Self { namespace, id, calls, news: heard }, requests, news)
    }

    /// Sends a closure to the owner task and waits for its answer.
    pub(crate) async fn call<T: Send + 'static>(&self, call: impl FnOnce(&mut Owner, Reply<T>) + Send + 'static) -> Result<T> {
        let request = move |subject: Subject<'_>, reply: Reply<T>| match subject {
            Subject::Owner(owner) => call(owner, reply),
            Subject::Unrecovered(sandbox) => drop(reply.send(Err(sandbox.unavailable()))),
        };
        self.request(request).await
    }

    async fn request<T: Send + 'static>(&self, request: impl FnOnce(Subject<'_>, Reply<T>) + Send + 'static) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::NotFound { kind: "sandbox", id: self.id.to_string() };
        self.calls.send(Box::new(move |subject| request(subject, reply))).map_err(|_| gone())?;
        match answer.await {
            Ok(answer) => answer,
            Err(_) if self.calls.is_closed() => Err(gone()),
            Err(_) => Err(Error::failed("answer a request")("a defect in kuasard; its log says where")),
        }
    }

    /// Sends a closure to the owner task, if that is still there.
    pub(crate) fn post(&self, call: impl FnOnce(&mut Owner) + Send + 'static) {
        let request = |subject: Subject<'_>| {
            if let Subject::Owner(owner) = subject {
                call(owner);
            }
        };
        let _ = self.calls.send(Box::new(request));
    }

    /// Like [`Self::call`], for what is answered from the owner's own state.
    async fn read<T: Send + 'static>(&self, read: impl FnOnce(&mut Owner) -> Result<T> + Send + 'static) -> Result<T> {
        self.call(move |owner, reply| {
            let _ = reply.send(read(owner));
        })
        .await
    }

    /// Starts the sandbox. When that fails the sandbox is gone.
    ///
    /// # Errors
    /// [`Error::Denied`] unless it is created and not started; else what the backend says.
    pub async fn start(&self) -> Result<SandboxStatus> {
        self.call(Owner::start).await
    }

    /// Ends everything in it, by force after `grace`. Stopping a stopped sandbox is fine. One that could not be recovered is removed.
    ///
    /// # Errors
    /// What the backend says, or that the state could not be saved.
    pub async fn stop(&self, grace: Duration) -> Result<()> {
        let request = move |subject: Subject<'_>, reply| match subject {
            Subject::Owner(owner) => owner.stop(grace, reply),
            Subject::Unrecovered(sandbox) => sandbox.remove(reply),
        };
        self.request(request).await
    }

    /// Stops it if need be, and releases all it has.
    ///
    /// # Errors
    /// What the backend says; it can be tried again.
    pub async fn delete(&self) -> Result<()> {
        let request = |subject: Subject<'_>, reply| match subject {
            Subject::Owner(owner) => owner.delete(reply),
            Subject::Unrecovered(sandbox) => sandbox.remove(reply),
        };
        self.request(request).await
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is gone.
    pub async fn wait(&self) -> Result<Exit> {
        let exit = self.read(|owner| Ok(owner.exit.subscribe())).await?;
        ended(exit).await
    }

    /// What is known of it.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is gone.
    pub async fn status(&self) -> Result<SandboxStatus> {
        self.read(|owner| Ok(owner.status())).await
    }

    /// Creates a container; returns the pid of its first process.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], [`Error::Denied`] unless the sandbox is ready, or what the backend says.
    pub async fn create_container(&self, spec: ContainerSpec) -> Result<u32> {
        self.call(move |owner, reply| owner.create_container(spec, reply)).await
    }

    /// Changes the pod's resources.
    ///
    /// # Errors
    /// [`Error::Denied`] when it is stopped, or what the backend says.
    pub async fn update(&self, resources: PodResources) -> Result<()> {
        self.call(move |owner, reply| owner.update(resources, reply)).await
    }

    /// Resource use of the whole: of its control group, or else the sum of what its containers use. What cannot be measured in time is
    /// taken from the last time, or left out.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is gone.
    pub async fn metrics(&self) -> Result<Stats> {
        let (sandbox, meter, containers) =
            self.read(|owner| Ok((owner.sandbox.clone(), owner.meter.clone(), owner.all_measurable()))).await?;
        match meter.read(format!("sandbox {}", self.id), async move { sandbox.metrics().await }).await {
            Ok(Some(stats)) => return Ok(stats),
            Ok(None) => {}
            Err(error) => {
                debug!(sandbox_id = %self.id, error = error.report(), "cannot measure a sandbox; adding up its containers")
            }
        }
        let measured = join_all(containers.into_iter().map(Measurable::measure)).await;
        match Stats::sum(measured.into_iter().flatten())? {
            Some(sum) => Ok(sum),
            None => Stats::of_ended(0),
        }
    }

    /// Runs a program beside the containers, to its end.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the sandbox has no kernel of its own; else what the backend says.
    pub async fn run_beside(&self, program: Program, io: ProgramIo) -> Result<u32> {
        self.sandbox().await?.run_beside(program, io).await
    }

    /// Gives what the sandbox's own kernel has said, and what it says from now on.
    ///
    /// # Errors
    /// As [`Self::run_beside`].
    pub async fn console(&self, follow: bool, output: mpsc::Sender<String>) -> Result<()> {
        self.sandbox().await?.console(follow, output).await
    }

    /// All that is known of it, for people.
    ///
    /// # Errors
    /// As [`Self::run_beside`].
    pub async fn account(&self) -> Result<Vec<Section>> {
        self.sandbox().await?.account().await
    }

    async fn sandbox(&self) -> Result<Arc<dyn Sandbox>> {
        self.read(|owner| Ok(owner.sandbox.clone())).await
    }

    /// Waits until no operation is under way.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is gone.
    pub(crate) async fn idle(&self) -> Result<()> {
        self.call(|owner, reply| owner.when_quiet(Scope::Sandbox, move |owner| owner.answer(reply, Ok(())))).await
    }
}

impl ContainerHandle {
    pub(crate) fn new(sandbox: SandboxHandle, id: ContainerId) -> Self {
        Self { sandbox, id }
    }

    fn key(&self, exec: Option<ExecId>) -> Key {
        (self.id.clone(), exec)
    }

    /// The sandbox it is in.
    #[must_use]
    pub fn sandbox(&self) -> &SandboxHandle {
        &self.sandbox
    }

    /// Starts the container's first process (`None`) or an exec; returns its pid.
    ///
    /// # Errors
    /// [`Error::Denied`] unless it is created and not started; else what the backend says.
    pub async fn start(&self, exec: Option<ExecId>) -> Result<u32> {
        let key = self.key(exec);
        self.sandbox.call(move |owner, reply| owner.start_process(key, reply)).await
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// [`Error::Finished`] when it has ended.
    pub async fn kill(&self, exec: Option<ExecId>, signal: i32, all: bool) -> Result<()> {
        let key = self.key(exec);
        self.sandbox.call(move |owner, reply| owner.kill(key, signal, all, reply)).await
    }

    /// Releases an ended process; for the first one, the container with all its execs. Returns how it ended.
    ///
    /// # Errors
    /// [`Error::Denied`] while it runs; else what the backend says.
    pub async fn delete(&self, exec: Option<ExecId>) -> Result<ProcessStatus> {
        let key = self.key(exec);
        self.sandbox.call(move |owner, reply| owner.delete_process(key, reply)).await
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such process.
    pub async fn wait(&self, exec: Option<ExecId>) -> Result<Exit> {
        let key = self.key(exec);
        let mut news = self.sandbox.news.clone();
        loop {
            news.mark_unchanged();
            let key = key.clone();
            match self.sandbox.read(move |owner| Ok(owner.process(&key)?.exit.subscribe())).await {
                // containerd takes a failed wait for the process's end, and this one may live: it could not be recovered yet.
                Err(error @ Error::Unavailable { .. }) => news.changed().await.map_err(|_| error)?,
                exit => return ended(exit?).await,
            }
        }
    }

    /// Waits until the container is deleted.
    pub async fn deleted(&self) {
        let key = self.key(None);
        if let Ok(mut exit) = self.sandbox.read(move |owner| Ok(owner.process(&key)?.exit.subscribe())).await {
            // Its sender goes with the container.
            while exit.changed().await.is_ok() {}
        }
    }

    /// What is known of a process.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such process.
    pub async fn status(&self, exec: Option<ExecId>) -> Result<ContainerProcess> {
        let key = self.key(exec);
        self.sandbox.read(move |owner| owner.process_state(&key)).await
    }

    /// Prepares an additional process.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], [`Error::Denied`] unless the container runs, [`Error::Unsupported`].
    pub async fn exec(&self, spec: ExecSpec) -> Result<()> {
        let container = self.id.clone();
        self.sandbox.call(move |owner, reply| owner.add_exec(container, spec, reply)).await
    }

    /// All processes in the container, or its first one when it takes too long to list them; never empty.
    ///
    /// # Errors
    /// What the backend says.
    pub async fn pids(&self) -> Result<Vec<ProcessInfo>> {
        let id = self.id.clone();
        let find = move |owner: &mut Owner| {
            let entry = owner.container(&id)?;
            Ok((entry.container.clone(), entry.init.state.pid()))
        };
        let (container, first) = self.sandbox.read(find).await?;
        match timeout(measure::LIMIT, tokio::spawn(async move { container.pids().await })).await {
            Ok(listed) => listed.map_err(Error::failed("list processes"))?,
            Err(_) => Ok(vec![ProcessInfo { pid: first, exec: None }]),
        }
    }

    /// Resource use.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it is gone; else what the backend says.
    pub async fn stats(&self) -> Result<Stats> {
        let key = self.key(None);
        self.sandbox.read(move |owner| owner.measurable(&key)).await?.measure().await
    }

    /// Applies an OCI `linux.resources` object.
    ///
    /// # Errors
    /// [`Error::Denied`] when it has ended, [`Error::Unsupported`], or what the backend says.
    pub async fn update(&self, resources: Value) -> Result<()> {
        let key = self.key(None);
        self.sandbox.call(move |owner, reply| owner.update_container(key, resources, reply)).await
    }

    /// Freezes every process.
    ///
    /// # Errors
    /// [`Error::Denied`] unless it runs, [`Error::Unsupported`], or what the backend says.
    pub async fn pause(&self) -> Result<()> {
        let key = self.key(None);
        self.sandbox.call(move |owner, reply| owner.pause(key, reply)).await
    }

    /// Thaws every process.
    ///
    /// # Errors
    /// [`Error::Denied`] unless it is paused, or what the backend says.
    pub async fn resume(&self) -> Result<()> {
        let key = self.key(None);
        self.sandbox.call(move |owner, reply| owner.resume(key, reply)).await
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// [`Error::Denied`] when it has ended, or what the backend says.
    pub async fn resize(&self, exec: Option<ExecId>, size: WindowSize) -> Result<()> {
        let key = self.key(exec);
        self.sandbox.call(move |owner, reply| owner.resize(key, size, reply)).await
    }

    /// Closes the writing end of a process's standard input.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the backend says.
    pub async fn close_stdin(&self, exec: Option<ExecId>) -> Result<()> {
        let key = self.key(exec);
        self.sandbox.call(move |owner, reply| owner.close_stdin(key, reply)).await
    }
}

async fn ended(mut exit: watch::Receiver<Option<Exit>>) -> Result<Exit> {
    let value = exit.wait_for(Option::is_some).await.map(|exit| *exit);
    // The owner sets an exit before it drops a process, so the alternative means that the daemon is going down.
    value.ok().flatten().ok_or_else(|| Error::Unavailable { what: "the exit".into(), why: "the daemon is stopping".into() })
}
