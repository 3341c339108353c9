//! A process added to a container.

use std::{
    fs,
    io::ErrorKind,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use async_trait::async_trait;
use kuasar_sandboxers::{
    Error, Process, Result,
    cgroup::expect_move,
    id::ExecId,
    process::{Ending, Exiting, Identity, Tracked},
    reaper::{Mark, Reaper},
    stdio::{IoContext, Stdio},
    types::{ExecSpec, Exit, WindowSize},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::{Instrument, warn};

use crate::{
    container::{Contained, io_context, read_pid, remove_file},
    io::{Io, Prepared},
    runtime::Exec,
    sandbox::DEATH,
};

/// An added process and all that belongs to it.
#[derive(Debug)]
pub(crate) struct Executed {
    container: Arc<Contained>,
    id: ExecId,
    stdio: Stdio,
    /// What to run; null once it runs.
    document: Mutex<Value>,
    running: OnceLock<Running>,
    ending: Ending,
}

/// What is saved of an added process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    /// It can be started.
    Added {
        document: Value,
    },
    Started {
        process: Identity,
        mark: Mark,
    },
}

/// A process that has been started.
#[derive(Debug)]
struct Running {
    identity: Identity,
    /// From before its start; part of its pid file's name.
    mark: Mark,
    /// `None` when it ended before we could take hold of it.
    process: Option<Tracked>,
    io: Io,
}

/// The start of a process that had ended before anybody saw when it started. No process starts with the kernel itself.
const UNSEEN: u64 = 0;

/// A process that has been taken hold of, as far as it is still there.
struct Taken {
    identity: Identity,
    mark: Mark,
    process: Option<Tracked>,
    exiting: Exiting,
}

impl Taken {
    /// One that was forked after `mark`.
    fn since(pid: u32, mark: Mark, reaper: &Reaper) -> Result<Self> {
        let exit = reaper.exit_of(pid, mark);
        let process = Tracked::open(pid)?;
        // Reaped already, so what has been opened may be another process.
        let ended = reaper.ended_since(pid, mark);
        let process = process.filter(|_| ended.is_none());
        let start = ended.map(|ended| ended.start).or(process.as_ref().map(|process| process.identity().start));
        let exiting = match (ended, &process) {
            (Some(ended), _) => Exiting::Known(ended.exit),
            (None, Some(process)) => Exiting::of_running(process, reaper),
            (None, None) => Exiting::late(exit, mark.ticks(), reaper),
        };
        Ok(Self { identity: Identity { pid, start: start.unwrap_or(UNSEEN) }, mark, process, exiting })
    }

    /// One that has been recorded.
    fn again(identity: Identity, mark: Mark, reaper: &Reaper) -> Result<Self> {
        if identity.start == UNSEEN {
            let exiting = Exiting::late(reaper.exit_of(identity.pid, mark), mark.ticks(), reaper);
            return Ok(Self { identity, mark, process: None, exiting });
        }
        let process = Tracked::find(identity)?;
        let exiting = Exiting::adopted(identity, process.as_ref(), reaper);
        Ok(Self { identity, mark, process, exiting })
    }
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
        Ok(Self::add(container, id, stdio, process))
    }

    pub(crate) async fn recover(container: Arc<Contained>, id: ExecId, stdio: Stdio, record: Value) -> Result<Self> {
        let record: Record = serde_json::from_value(record).map_err(Error::failed("read the exec's record"))?;
        let reaper = container.pod.context.reaper.clone();
        let (document, started) = match record {
            Record::Added { document } => {
                let born = born(&container, &id)?.map(|(pid, mark)| Taken::since(pid, mark, &reaper)).transpose()?;
                (document, born)
            }
            Record::Started { process, mark } => (Value::Null, Some(Taken::again(process, mark, &reaper)?)),
        };
        let exec = Self::add(container, id, stdio, document);
        if let Some(Taken { identity, mark, process, exiting }) = started {
            let executed = exec.0.clone();
            let io = Io::adopt(&executed.stdio, &executed.io_context()).await?;
            executed.begin(Running { identity, mark, process, io }, exiting);
        }
        Ok(exec)
    }

    fn add(container: Arc<Contained>, id: ExecId, stdio: Stdio, document: Value) -> Self {
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

/// Where the OCI runtime is to write the pid. The mark tells the process from a later one of that pid. No container's pid file has such
/// a name: an id ends with a letter or a digit, and has no two separators in a row.
fn pid_file(container: &Contained, id: &ExecId, mark: Mark) -> PathBuf {
    container.pod.dir.join(format!("{}{mark}.pid", prefix(container, id)))
}

fn prefix(container: &Contained, id: &ExecId) -> String {
    format!("{}..{id}..", container.head.id)
}

/// The pid of a process that a daemon has started and could not record any more, with its mark.
fn born(container: &Contained, id: &ExecId) -> Result<Option<(u32, Mark)>> {
    let (dir, prefix) = (&container.pod.dir, prefix(container, id));
    let entries = match fs::read_dir(dir) {
        // It went with the pod.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(Error::io("list", dir))?,
    };
    for entry in entries {
        let name = entry.map_err(Error::io("list", dir))?.file_name();
        let mark = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.strip_suffix(".pid")?.parse().ok());
        // An empty one is of a runtime that was killed before it could write it.
        if let Some(mark) = mark
            && fs::metadata(dir.join(&name)).is_ok_and(|file| file.len() > 0)
        {
            return Ok(Some((read_pid(&dir.join(&name))?, mark)));
        }
    }
    Ok(None)
}

impl Executed {
    pub(crate) fn pid(&self) -> Option<u32> {
        self.running.get().map(|running| running.identity.pid)
    }

    /// Resolves when it does not run: it has ended, or was not started.
    pub(crate) async fn ended(&self) {
        if self.running.get().is_some() {
            self.ending.wait().await;
        }
    }

    fn io_context(&self) -> IoContext {
        io_context(&self.container.pod, &self.container.head.id, Some(&self.id))
    }

    fn document(&self) -> MutexGuard<'_, Value> {
        self.document.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn start(self: &Arc<Self>) -> Result<u32> {
        let container = &self.container;
        let document = self.document().clone();
        let pod = &container.pod;
        let mark = pod.context.reaper.mark();
        let context = self.io_context();
        let io = Prepared::open(&self.stdio, &context, &pod.dir).await?;
        let pid_file = pid_file(container, &self.id, mark);
        let exec = Exec { id: container.head.id.as_str(), process: &document, pid_file: &pid_file, console: io.console() };
        if let Err(error) = container.unless_ended(container.driver.exec(exec, io.child_fds()?)).await {
            // A runtime that was killed may have started it.
            if let Err(error) = self.take_back().await {
                warn!(exec = %self.id, error = error.report(), "what a failed start has left is removed with the exec");
            }
            return Err(error);
        }
        let pid = read_pid(&pid_file)?;
        let Taken { identity, process, exiting, .. } = Taken::since(pid, mark, &pod.context.reaper)?;
        let io = match io.connect(&self.stdio, &context).await {
            Ok(io) => io,
            Err(error) => {
                if let Some(process) = process {
                    process.signal(libc::SIGKILL)?;
                }
                remove_file(&pid_file)?;
                return Err(error);
            }
        };
        self.clone().begin(Running { identity, mark, process, io }, exiting);
        Ok(pid)
    }

    /// Ends the process that a start has left which did not come to its end.
    async fn take_back(&self) -> Result<()> {
        let Some((pid, mark)) = born(&self.container, &self.id)? else { return Ok(()) };
        if let Some(process) = Taken::since(pid, mark, &self.container.pod.context.reaper)?.process {
            process.signal(libc::SIGKILL)?;
            timeout(DEATH, process.ended()).await.unwrap_or_else(|_| Err(self.lives_on()))?;
        }
        remove_file(&pid_file(&self.container, &self.id, mark))
    }

    fn lives_on(&self) -> Error {
        Error::TimedOut { operation: format!("the end of exec {}", self.id), seconds: DEATH.as_secs() }
    }

    /// Watches for its end.
    fn begin(self: Arc<Self>, running: Running, exiting: Exiting) {
        // Once: by the one start, or by the recovery.
        self.running.get_or_init(|| running);
        *self.document() = Value::Null;
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

    async fn started(&self) -> Result<Option<u32>> {
        Ok(self.0.pid())
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
                return Err(self.0.lives_on());
            }
        }
        match self.0.running.get() {
            Some(running) => remove_file(&pid_file(&self.0.container, &self.0.id, running.mark))?,
            None => self.0.take_back().await?,
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
        json!(match self.0.running.get() {
            Some(Running { identity, mark, .. }) => Record::Started { process: *identity, mark: *mark },
            None => Record::Added { document: self.0.document().clone() },
        })
    }
}
