//! Stdio of a process without a terminal.

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use nix::unistd::{Gid, Uid, fchown};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{Endpoint, Endpoints, Fifo, IoContext, Logger, Stdio, StreamHub};
use crate::error::{Error, Result};

/// How long containerd may take to read the rest of a stream after the process has ended. A descendant that the process left
/// behind may hold the stream open for ever.
const DRAIN: Duration = Duration::from_secs(5);

/// The descriptors a process is started with; each can be turned into a `std::process::Stdio`.
#[derive(Debug)]
pub struct ChildFds {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
}

/// Stdio of a process without a terminal. Dropping it releases everything of ours; the process keeps its own descriptors.
#[derive(Debug)]
pub struct ProcessIo {
    child: Mutex<Option<ChildFds>>,
    /// Our writer of the stdin FIFO; closed by CloseIO.
    keeper: Mutex<Option<OwnedFd>>,
    logger: Option<Logger>,
    streams: Streams,
}

/// The streams of one process; forgotten together.
#[derive(Debug)]
pub(crate) struct Streams {
    hub: StreamHub,
    input: Option<String>,
    outputs: Vec<String>,
}

impl ProcessIo {
    /// Opens everything. For a log program this waits until it is ready.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a field that cannot be understood, or a FIFO that is not there; [`Error::TimedOut`] or
    /// [`Error::Backend`] for a log program that does not get ready; [`Error::Io`] for the rest.
    pub async fn open(stdio: &Stdio, context: &IoContext) -> Result<Self> {
        let ends = Endpoints::parse(stdio)?;
        let mut streams = Streams::new(context);
        let (stdin, keeper) = match &ends.stdin {
            Endpoint::Fifo(path) => {
                let (reader, keeper) = Fifo::find("stdin", path)?.reader_and_keeper()?;
                (own(reader, context)?, Some(keeper))
            }
            Endpoint::Stream(id) => (own(streams.open_input(id)?, context)?, None),
            _ => (null()?, None),
        };
        let mut logger = None;
        let mut logger_stderr = None;
        let stdout = match (&ends.stdout, &ends.stderr) {
            (Endpoint::Program(program), _) => {
                let (started, stdout, stderr) = Logger::start(program, context).await?;
                logger = Some(started);
                logger_stderr = Some(own(stderr, context)?);
                own(stdout, context)?
            }
            (end, Endpoint::Program(program)) => {
                let (started, _, stderr) = Logger::start(program, context).await?;
                logger = Some(started);
                logger_stderr = Some(own(stderr, context)?);
                open_output("stdout", end, &mut streams, context)?
            }
            (end, _) => open_output("stdout", end, &mut streams, context)?,
        };
        let stderr = match (&ends.stderr, logger_stderr) {
            // One log program takes both, whatever the second URI says.
            (Endpoint::Program(_), Some(stderr)) => stderr,
            (end, _) => open_output("stderr", end, &mut streams, context)?,
        };
        let child = Some(ChildFds { stdin, stdout, stderr });
        Ok(Self { child: Mutex::new(child), keeper: Mutex::new(keeper), logger, streams })
    }

    /// Takes the stdio of a running process over after a restart of the daemon: holds its stdin open again. The process still
    /// has FIFOs, files and log programs; a stream's pipe was lost with the daemon that had it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a field that cannot be understood.
    pub fn adopt(stdio: &Stdio, context: &IoContext) -> Result<Self> {
        let keeper = match Endpoints::parse(stdio)?.stdin {
            Endpoint::Fifo(path) => match Fifo::find("stdin", &path).and_then(|fifo| fifo.keeper()) {
                Ok(keeper) => Some(keeper),
                Err(error) => {
                    debug!(container = %context.container, error = error.report(), "stdin is not held open again");
                    None
                }
            },
            _ => None,
        };
        Ok(Self { child: Mutex::default(), keeper: Mutex::new(keeper), logger: None, streams: Streams::new(context) })
    }

    /// The descriptors for the process, handed over: once it has been started none of them may stay open here, or readers
    /// would not see its end.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they were taken before.
    pub fn child_fds(&self) -> Result<ChildFds> {
        lock(&self.child).take().ok_or_else(|| Error::invalid("stdio", "its descriptors were handed to a process before"))
    }

    /// Ends standard input as far as it depends on us: the process sees end-of-file once containerd has closed its side too.
    pub fn close_stdin(&self) {
        lock(&self.keeper).take();
        self.streams.close_input();
    }

    /// After the process's end: waits, within bounds, until streams and log programs have taken its output.
    pub async fn finish(&self) {
        lock(&self.child).take();
        self.streams.drained().await;
        if let Some(logger) = &self.logger {
            logger.finish().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    pub(crate) fn new(context: &IoContext) -> Self {
        Self { hub: context.streams.clone(), input: None, outputs: Vec::new() }
    }

    pub(crate) fn open_input(&mut self, id: &str) -> Result<OwnedFd> {
        let fd = self.hub.open_input(id)?;
        self.input = Some(id.into());
        Ok(fd)
    }

    pub(crate) fn open_output(&mut self, id: &str) -> Result<OwnedFd> {
        let fd = self.hub.open_output(id)?;
        self.outputs.push(id.into());
        Ok(fd)
    }

    /// Ends the input stream; `false` when there is none.
    pub(crate) fn close_input(&self) -> bool {
        self.input.as_ref().inspect(|id| self.hub.close_input(id)).is_some()
    }

    /// Waits until containerd has taken the output, within [`DRAIN`].
    pub(crate) async fn drained(&self) {
        let drained = async {
            for id in &self.outputs {
                self.hub.drained(id).await;
            }
        };
        if timeout(DRAIN, drained).await.is_err() {
            warn!(streams = ?self.outputs, "output was not taken, or a left-behind process holds the stream open");
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        for id in self.outputs.iter().chain(&self.input) {
            self.hub.forget(id);
        }
    }
}

fn open_output(field: &'static str, end: &Endpoint, streams: &mut Streams, context: &IoContext) -> Result<OwnedFd> {
    match end {
        Endpoint::None | Endpoint::Program(_) => null(),
        Endpoint::Fifo(path) => own(Fifo::find(field, path)?.both()?, context),
        Endpoint::File(path) => open_log(path),
        Endpoint::Stream(id) => own(streams.open_output(id)?, context),
    }
}

fn null() -> Result<OwnedFd> {
    let null = File::options().read(true).write(true).open("/dev/null").map_err(Error::io("open", "/dev/null"))?;
    Ok(null.into())
}

/// A log file, made with its directory where missing, as containerd's own shim does.
pub(crate) fn open_log(path: &Path) -> Result<OwnedFd> {
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(Error::io("make log directory", directory))?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)
        .map_err(Error::io("open log file", path))?;
    let kind = file.metadata().map_err(Error::io("look at log file", path))?;
    if !kind.is_file() {
        return Err(Error::invalid("log URI", format!("{} is not a regular file", path.display())));
    }
    Ok(file.into())
}

/// Gives a pipe or FIFO to the user the runtime's options name (root of a user namespace, for one), so that the process can
/// open `/dev/stdout`.
pub(crate) fn own(pipe: OwnedFd, context: &IoContext) -> Result<OwnedFd> {
    let (uid, gid) = context.owner;
    if (uid, gid) != (0, 0) {
        fchown(pipe.as_fd(), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(|errno| Error::failed(format!("give a stdio pipe to {uid}:{gid}"))(io::Error::from(errno)))?;
    }
    Ok(pipe)
}
