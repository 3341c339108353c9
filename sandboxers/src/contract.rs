//! The three traits a sandbox technique implements.
//!
//! A backend supplies mechanism only. Who may ask for what in which state, one operation at a time per process, waiting,
//! persistence and events are the owner task's work (`owner`), the same for every technique. So an
//! implementation may assume:
//!
//! - calls arrive in an order that the tables in [`lifecycle`](crate::lifecycle) allow, and never two at once for the same
//!   process, but for [`Process::kill`], which comes beside any but `delete`; calls for different processes of a sandbox do run at the same
//!   time, and [`Sandbox::stop`] beside all of them. What hangs in a process's runtime has to end soon after the process has;
//! - nothing of a container is under way when it is deleted, nor of a sandbox, whose containers have been deleted then;
//! - a call is never cancelled half way: when the client goes away the call still runs to its end;
//! - a `recover…` that fails has changed nothing, and is called again;
//! - a call that fails has undone its own steps (see [`undo`](crate::undo));
//! - a create or start that takes several steps names each as it begins (see [`stages`](crate::stages)), for the report of its failure;
//! - a daemon that dies in the middle of a call leaves what `recover`, `leftovers` and a repetition of the call cope with: a
//!   container that was half made is a leftover, a process that was half started tells what became of it (`Process::started`);
//! - after [`Sandbox::delete`] nothing of the sandbox may be left on the node, however the calls before it ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use futures::future::BoxFuture;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::{
    cgroup::Stats,
    error::Result,
    event::Notices,
    fdstore::FdStore,
    id::{ContainerId, ExecId, Namespace, SandboxId},
    inside::{Program, ProgramIo, Section, on_the_node},
    reaper::Reaper,
    stdio::{Stdio, StreamHub},
    types::{Capabilities, ContainerHead, ContainerSpec, ExecSpec, Exit, PodResources, ProcessInfo, SandboxSpec, WindowSize},
};

/// One configured sandboxer instance.
#[async_trait]
pub trait Sandboxer: Send + Sync + 'static {
    /// Why it can do nothing for the moment, and what to do about that; `None` when it can.
    fn unavailable(&self) -> Option<String> {
        None
    }

    /// What the technique can do here.
    fn capabilities(&self) -> Capabilities;

    /// Prepares a sandbox: everything that can be checked and made before processes start.
    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>>;

    /// Takes a sandbox over from an earlier daemon. `record` is what [`Sandbox::record`] gave last.
    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>>;

    /// What earlier daemons of this instance have left behind that is not in `known`. Only what is there at the call: nothing of that is
    /// removed before a leftover's `removal` is awaited, which is after the recovery of the sandboxes that are known, and perhaps never.
    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>>;

    /// The live processes of a sandbox, found without its record: of one whose state cannot be read, or that nobody knows. None where
    /// this instance has no such sandbox.
    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>>;
}

/// The sandboxes that are known, with their containers; `None`: nothing of it is a leftover, because nobody can tell which containers it
/// has (its state cannot be read), or because it is at work.
pub type Known = BTreeMap<(Namespace, SandboxId), Option<BTreeSet<ContainerId>>>;

/// Something that nobody knows any more.
pub struct Leftover {
    /// The sandbox it is, or is of.
    pub sandbox: (Namespace, SandboxId),
    /// What it is, for people.
    pub what: String,
    /// Removes it. If somebody has made the same again meanwhile, that is left alone.
    pub removal: BoxFuture<'static, Result<()>>,
}

/// What the shared layer lends to a sandbox.
#[derive(Clone, Debug)]
pub struct SandboxContext {
    /// A directory of the sandbox's own, mode 0711, made before create and removed after delete. Nothing else writes in it but
    /// the state store (`state.json`).
    pub dir: PathBuf,
    /// Where the backend reports what it notices by itself (an OOM kill): before the exit that follows from it.
    pub notices: Notices,
    /// How child processes are started and waited for.
    pub reaper: Reaper,
    /// Streams that containerd opens for `io_type = "streaming"`.
    pub streams: StreamHub,
    /// Where descriptors are left that must not be closed when the daemon dies.
    pub fds: FdStore,
}

/// A sandbox: a pod's isolation and what its containers share.
#[async_trait]
pub trait Sandbox: Send + Sync + 'static {
    /// Starts it; returns the pid that stands for it on the node, where one means anything.
    async fn start(&self) -> Result<Option<u32>>;

    /// Ends every process in it: gracefully within `grace`, then by force. Idempotent.
    async fn stop(&self, grace: Duration) -> Result<()>;

    /// Releases every resource. Idempotent. Every container has been deleted before, and a sandbox that was started has been
    /// stopped, unless its start failed.
    async fn delete(&self) -> Result<()>;

    /// Resolves when a started sandbox has ended, by itself or by [`Sandbox::stop`].
    async fn exited(&self) -> Exit;

    /// Creates a container; its first process exists afterwards but does not run yet.
    async fn create_container(&self, spec: ContainerSpec) -> Result<Arc<dyn Container>>;

    /// Takes a container over from an earlier daemon; `record` is what [`Process::record`] gave last.
    async fn recover_container(&self, head: ContainerHead, record: Value) -> Result<Arc<dyn Container>>;

    /// Makes the pod's new resources effective where the technique has a part in that.
    async fn update(&self, resources: &PodResources) -> Result<()>;

    /// Resource use of the sandbox as a whole, where it has a cgroup.
    async fn metrics(&self) -> Result<Option<Stats>>;

    /// What [`Sandboxer::recover`] needs besides the spec. Taken after every call that changed something.
    fn record(&self) -> Value;

    /// Facts for people (`crictl inspectp`, `kuasarctl inspect`).
    fn describe(&self) -> Value;

    /// Runs a program beside the containers, as root of the sandbox's own kernel, to its end: its exit code, or 128 and the signal. Nothing
    /// of it is left then, nor when it was killed because nobody took its output any more.
    async fn run_beside(&self, _program: Program, _io: ProgramIo) -> Result<u32> {
        let instead = "use crictl exec for a program in a container, or nsenter with a process id of kuasarctl ps";
        Err(on_the_node("a program beside the containers", instead))
    }

    /// Gives what the sandbox's own kernel and what runs beside the containers have said, as text without control characters but newlines
    /// and tabs; with `follow`, also what they say until the sandbox ends, or nobody takes it any more.
    async fn console(&self, _follow: bool, _output: mpsc::Sender<String>) -> Result<()> {
        Err(on_the_node("a console", "dmesg shows what the node's kernel says"))
    }

    /// All that is known of the sandbox for people who look for faults, of one that hangs or has ended, too.
    async fn account(&self) -> Result<Vec<Section>> {
        let instead = "crictl logs shows what its containers say, journalctl -u kuasard what kuasard does";
        Err(on_the_node("a log of the sandbox", instead))
    }
}

/// A process under our care: a container's first one, or an exec.
#[async_trait]
pub trait Process: Send + Sync + 'static {
    /// Its pid on the node, or a number that stands for it alone and for no process there; `None` before it exists.
    fn pid(&self) -> Option<u32>;

    /// The process of the node that it is in, where [`Self::pid`] is no process there: a VMM.
    fn node_pid(&self) -> Option<u32> {
        None
    }

    /// Lets it run; returns its pid.
    async fn start(&self) -> Result<u32>;

    /// The pid of a process that was recovered as created, if it was started after all: by a daemon that died before it could save
    /// that.
    async fn started(&self) -> Result<Option<u32>>;

    /// Sends a signal, to all processes of the container when `all`.
    async fn kill(&self, signal: i32, all: bool) -> Result<()>;

    /// Resolves when it has ended. For a container's first process: when nothing of the container runs any more.
    async fn exited(&self) -> Exit;

    /// Releases what it has. A container's first process that was created but never started is killed.
    async fn delete(&self) -> Result<()>;

    /// Sets the terminal's size.
    async fn resize(&self, size: WindowSize) -> Result<()>;

    /// Closes our writing end of its standard input.
    async fn close_stdin(&self) -> Result<()>;

    /// What recovery needs besides the spec.
    fn record(&self) -> Value;
}

/// A container. As a [`Process`] it is its first process.
#[async_trait]
pub trait Container: Process {
    /// Prepares an additional process; it is not started.
    async fn exec(&self, spec: ExecSpec) -> Result<Arc<dyn Process>>;

    /// Takes an exec over from an earlier daemon.
    async fn recover_exec(&self, id: ExecId, stdio: Stdio, record: Value) -> Result<Arc<dyn Process>>;

    /// Every process in the container. Never empty: after the end it is the pid that was.
    async fn pids(&self) -> Result<Vec<ProcessInfo>>;

    /// Resource use.
    async fn stats(&self) -> Result<Stats>;

    /// Applies an OCI `linux.resources` object.
    async fn update(&self, resources: Value) -> Result<()>;

    /// Freezes every process.
    async fn pause(&self) -> Result<()>;

    /// Thaws them.
    async fn resume(&self) -> Result<()>;
}
