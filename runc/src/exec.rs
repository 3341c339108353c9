//! A process added to a container.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use futures::FutureExt;
use kuasar_sandboxers::{
    Error, Process, Result,
    cgroup::expect_move,
    id::ExecId,
    stdio::Stdio,
    types::{ExecSpec, Exit, WindowSize},
};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::Instrument;

use crate::{
    container::{Contained, io_context, take_pid},
    io::{Io, Prepared},
    process::{Ending, Exiting, Identity, Tracked},
    runtime::Exec,
    sandbox::DEATH,
};

/// An added process and all that belongs to it.
#[derive(Debug)]
pub(crate) struct Executed {
    container: Arc<Contained>,
    id: ExecId,
    stdio: Stdio,
    /// What to run; taken by the start.
    document: Mutex<Option<Value>>,
    running: OnceLock<Running>,
    ending: Ending,
}

/// A process that has been started.
#[derive(Debug)]
struct Running {
    pid: u32,
    /// `None` when it ended before we could take hold of it.
    process: Option<Tracked>,
    io: Io,
}

/// The contract's face of an [`Executed`].
#[derive(Debug)]
pub(crate) struct RuncExec(Arc<Executed>);

impl RuncExec {
    pub(crate) fn prepare(container: Arc<Contained>, spec: ExecSpec) -> Result<Self> {
        let ExecSpec { id, mut process, stdio } = spec;
        // Its start is a call of containerd's away.
        expect_move();
        let Some(document) = process.as_object_mut() else {
            return Err(Error::invalid("exec spec", "the process is not a JSON object"));
        };
        // The request decides; the runtime wants both to agree.
        document.insert("terminal".into(), stdio.terminal.into());
        Ok(Self::add(container, id, stdio, Some(process)))
    }

    pub(crate) fn recover(container: Arc<Contained>, id: ExecId, stdio: Stdio, record: Value) -> Result<Self> {
        let identity: Option<Identity> = serde_json::from_value(record).map_err(Error::failed("read the exec's record"))?;
        let io = Io::adopt(&stdio, &io_context(&container.pod, &container.head.id))?;
        let exec = Self::add(container, id, stdio, None);
        if let Some(identity) = identity {
            let process = Tracked::find(identity)?;
            let exiting = match process {
                Some(_) => Exiting::Adopted(exec.0.container.pod.context.reaper.clone()),
                None => Exiting::Missed,
            };
            exec.0.clone().begin(Running { pid: identity.pid, process, io }, exiting);
        }
        Ok(exec)
    }

    fn add(container: Arc<Contained>, id: ExecId, stdio: Stdio, document: Option<Value>) -> Self {
        let exec = Arc::new(Executed {
            container,
            id,
            stdio,
            document: Mutex::new(document),
            running: OnceLock::new(),
            ending: Ending::pending(),
        });
        exec.container.execs().insert(exec.id.clone(), Arc::downgrade(&exec));
        Self(exec)
    }
}

impl Executed {
    pub(crate) fn pid(&self) -> Option<u32> {
        self.running.get().map(|running| running.pid)
    }

    /// Resolves when it does not run: it has ended, or was not started.
    pub(crate) async fn ended(&self) {
        if self.running.get().is_some() {
            self.ending.wait().await;
        }
    }

    fn document(&self) -> MutexGuard<'_, Option<Value>> {
        self.document.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn start(self: &Arc<Self>) -> Result<u32> {
        let container = &self.container;
        let document = self.document().take().ok_or_else(|| Error::Unavailable {
            what: format!("exec {}", self.id),
            why: "what it was to run is gone: it was started before, or an earlier daemon had it; add a new one".into(),
        })?;
        let pod = &container.pod;
        let context = io_context(pod, &container.head.id);
        let io = Prepared::open(&self.stdio, &context, &pod.dir).await?;
        // The container's pid file has no such name: an id ends with a letter or a digit, and has no two separators in a row.
        let pid_file = pod.dir.join(format!("{}..{}.pid", container.head.id, self.id));
        let exec = Exec { id: container.head.id.as_str(), process: &document, pid_file: &pid_file, console: io.console() };
        let mark = pod.context.reaper.mark();
        container.driver.exec(exec, io.child_fds()?).await?;
        let pid = take_pid(&pid_file)?;
        let mut exit = pod.context.reaper.exit_of(pid, mark);
        let process = Tracked::open(pid)?;
        // Reaped already, so what has been opened may be another process.
        let exiting = (&mut exit).now_or_never();
        let process = process.filter(|_| exiting.is_none());
        let exiting = exiting.map_or(Exiting::Ours(exit), Exiting::Known);
        let io = match io.connect(&self.stdio, &context).await {
            Ok(io) => io,
            Err(error) => {
                if let Some(process) = process {
                    process.signal(libc::SIGKILL)?;
                }
                return Err(error);
            }
        };
        self.clone().begin(Running { pid, process, io }, exiting);
        Ok(pid)
    }

    /// Watches for its end.
    fn begin(self: Arc<Self>, running: Running, exiting: Exiting) {
        // Once: by the one start, or by the recovery.
        self.running.get_or_init(|| running);
        let work = async move {
            let Some(running) = self.running.get() else { return };
            let exit = exiting.of(running.process.as_ref()).await;
            running.io.finish().await;
            self.ending.tell(exit);
        };
        tokio::spawn(work.in_current_span());
    }

    fn signal(&self, signal: i32) -> Result<bool> {
        match self.running.get() {
            Some(Running { process: Some(process), .. }) => process.signal(signal),
            _ => Ok(false),
        }
    }
}

#[async_trait]
impl Process for RuncExec {
    fn pid(&self) -> Option<u32> {
        self.0.pid()
    }

    async fn start(&self) -> Result<u32> {
        self.0.start().await
    }

    /// An added process is one process; `all` is about containers.
    async fn kill(&self, signal: i32, _all: bool) -> Result<()> {
        if self.0.signal(signal)? { Ok(()) } else { Err(Error::Finished { id: self.0.id.to_string() }) }
    }

    async fn exited(&self) -> Exit {
        self.0.ending.wait().await
    }

    async fn delete(&self) -> Result<()> {
        if self.0.running.get().is_some() && self.0.ending.known().is_none() {
            self.0.signal(libc::SIGKILL)?;
            if timeout(DEATH, self.0.ending.wait()).await.is_err() {
                return Err(Error::TimedOut { operation: format!("the end of exec {}", self.0.id), seconds: DEATH.as_secs() });
            }
        }
        self.0.container.execs().remove(&self.0.id);
        Ok(())
    }

    async fn resize(&self, size: WindowSize) -> Result<()> {
        match self.0.running.get() {
            Some(running) => running.io.resize(size),
            // The client sends the first size when it likes, also before the start; the next one will do.
            None => Ok(()),
        }
    }

    async fn close_stdin(&self) -> Result<()> {
        if let Some(running) = self.0.running.get() {
            running.io.close_stdin();
        }
        Ok(())
    }

    fn record(&self) -> Value {
        json!(self.0.running.get().and_then(|running| running.process.as_ref()).map(Tracked::identity))
    }
}
