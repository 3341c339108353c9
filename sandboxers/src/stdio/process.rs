//! Stdio of a process without a terminal.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{FutureExt, future::join_all};
use nix::{
    fcntl::OFlag,
    unistd::{Gid, Uid, fchown},
};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, warn};

use super::{
    Endpoint, Endpoints, Fifo, IoContext, LogWriter, Logger, Stdio, StreamHub, null_device, reopened, unread::OutputFifo,
};
use crate::{
    error::{Error, Result},
    fdstore::Held,
};

/// How long containerd may take to read the rest of a stream after the process has ended. A descendant that the process left
/// behind may hold the stream open for ever.
const DRAIN: Duration = Duration::from_secs(5);

/// What the streams are called, by descriptor.
const FIELDS: [&str; 3] = ["stdin", "stdout", "stderr"];

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
    keeper: Mutex<Option<(OwnedFd, Held)>>,
    /// Our ends of the output's FIFOs. containerd stops reading one for good when nobody has it open for writing, as when this daemon dies
    /// between opening it and handing it over.
    outputs: Mutex<Vec<OutputFifo>>,
    /// Waits, after the process's end, for containerd to read what is left.
    unread: Mutex<Option<AbortOnDropHandle<()>>>,
    logger: Option<Logger>,
    logs: Mutex<Vec<LogWriter>>,
    streams: Streams,
}

/// The streams of one process; forgotten together.
#[derive(Debug)]
pub(crate) struct Streams {
    hub: StreamHub,
    input: Option<String>,
    outputs: Vec<String>,
    /// Our ends of the output's pipes.
    held: Vec<Held>,
}

impl ProcessIo {
    /// Opens everything. For a log program this waits until it is ready.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a field that cannot be understood, or a FIFO that is not there; [`Error::TimedOut`] or
    /// [`Error::Backend`] for a log program that does not get ready; [`Error::Io`] for the rest.
    pub async fn open(stdio: &Stdio, context: &IoContext) -> Result<Self> {
        Self::open_missing(stdio, context, &FIELDS).await
    }

    /// Opens those of `stdin`, `stdout` and `stderr` that are `missing`, and adopts the others from an earlier daemon. The descriptors for the
    /// process are null devices for the others.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_missing(stdio: &Stdio, context: &IoContext, missing: &[&str]) -> Result<Self> {
        let ends = Endpoints::parse(stdio)?;
        let select = |wanted: bool| {
            let of = |field: &str, end: &Endpoint| {
                if missing.contains(&field) == wanted { end.clone() } else { Endpoint::None }
            };
            let [stdin, stdout, stderr] = FIELDS;
            Endpoints { stdin: of(stdin, &ends.stdin), stdout: of(stdout, &ends.stdout), stderr: of(stderr, &ends.stderr) }
        };
        let mut io = Self::adopted(&select(false), context)?;
        io.add(&select(true), context).await?;
        Ok(io)
    }

    async fn add(&mut self, ends: &Endpoints, context: &IoContext) -> Result<()> {
        // Those of a daemon that has not got as far as connecting them.
        let mut logs = adopt_logs(ends, context)?;
        let mut outputs = Vec::new();
        let streams = &mut self.streams;
        let stdin = match &ends.stdin {
            Endpoint::Fifo(path) => {
                let (reader, keeper) = Fifo::find("stdin", path)?.reader_and_keeper()?;
                // When nobody has it open for writing, the process takes that for the end of its input.
                let held = context.fds.leave(context.held("stdin"), &[keeper.as_fd()])?;
                *lock(&self.keeper) = Some((keeper, held));
                own(reader, context)?
            }
            Endpoint::Stream(id) => own(streams.open_input(id, context)?, context)?,
            _ => null_device()?,
        };
        let mut logger_stderr = None;
        let stdout = match (&ends.stdout, &ends.stderr) {
            (Endpoint::Program(program), _) => {
                let (started, stdout, stderr) = Logger::start(program, context).await?;
                self.logger = Some(started);
                logger_stderr = Some(own(stderr, context)?);
                own(stdout, context)?
            }
            (end, Endpoint::Program(program)) => {
                let (started, _, stderr) = Logger::start(program, context).await?;
                self.logger = Some(started);
                logger_stderr = Some(own(stderr, context)?);
                open_output("stdout", end, streams, &mut outputs, &mut logs, context).await?
            }
            (end, _) => open_output("stdout", end, streams, &mut outputs, &mut logs, context).await?,
        };
        let stderr = match (&ends.stderr, logger_stderr) {
            // One log program takes both, whatever the second URI says.
            (Endpoint::Program(_), Some(stderr)) => stderr,
            // One pipe keeps the order of what is written to both.
            (Endpoint::File(_), _) if ends.stderr == ends.stdout => {
                stdout.try_clone().map_err(Error::failed("copy a descriptor"))?
            }
            (end, _) => open_output("stderr", end, streams, &mut outputs, &mut logs, context).await?,
        };
        lock(&self.outputs).append(&mut outputs);
        lock(&self.logs).append(&mut logs);
        *lock(&self.child) = Some(ChildFds { stdin, stdout, stderr });
        Ok(())
    }

    /// Takes the stdio of a running process over from an earlier daemon: what that has left of it. The process still has FIFOs, files
    /// and log programs.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a field that cannot be understood; [`Error::Io`] when descriptors have run out.
    pub fn adopt(stdio: &Stdio, context: &IoContext) -> Result<Self> {
        Self::adopted(&Endpoints::parse(stdio)?, context)
    }

    fn adopted(ends: &Endpoints, context: &IoContext) -> Result<Self> {
        let mut streams = Streams::new(context);
        let mut keeper = None;
        match &ends.stdin {
            Endpoint::Fifo(_) => {
                let left = context.take("stdin");
                keeper = left.and_then(|(mut left, held)| Some((left.pop()?, held)));
            }
            Endpoint::Stream(id) => streams.adopt_input(id, context)?,
            _ => {}
        }
        let mut outputs = Vec::new();
        for (field, end) in [("stdout", &ends.stdout), ("stderr", &ends.stderr)] {
            match end {
                Endpoint::Stream(id) => streams.adopt_output(field, id, context)?,
                // The process has the descriptor itself.
                Endpoint::Fifo(path) => {
                    let Some((left, mut held)) = context.take(field) else { continue };
                    // The version before has left an end that reads, too. With nobody's reading end, the kernel tells whether containerd reads.
                    if let Some(both) = left.first()
                        && let Some(writer) = reopened(both, OFlag::O_RDWR, OFlag::O_WRONLY)?
                    {
                        held = context.fds.leave(context.held(field), &[writer.as_fd()])?;
                    }
                    outputs.push(OutputFifo::new(path.clone(), held));
                }
                _ => {}
            }
        }
        let logs = Mutex::new(adopt_logs(ends, context)?);
        let (keeper, outputs) = (Mutex::new(keeper), Mutex::new(outputs));
        Ok(Self { child: Mutex::default(), keeper, outputs, unread: Mutex::default(), logger: None, logs, streams })
    }

    /// A pipe to a log writer in place of a log file, which versions before have opened for what stands where the process would; `None` when it
    /// is none. `field` is `stdout` or `stderr`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn pipe_for_file(
        &self,
        stdio: &Stdio,
        field: &str,
        file: &OwnedFd,
        context: &IoContext,
    ) -> Result<Option<OwnedFd>> {
        let ends = Endpoints::parse(stdio)?;
        let Endpoint::File(path) = (if field == "stderr" { &ends.stderr } else { &ends.stdout }) else { return Ok(None) };
        // Not fstat(2), which does not return on a dead NFS or FUSE server.
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let target = fs::read_link(&link).map_err(Error::io("read", link))?;
        if target.as_os_str().as_encoded_bytes().starts_with(b"pipe:[") {
            return Ok(None);
        }
        let opened = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        let (writer, pipe) = LogWriter::start(path, opened.as_ref(), field, context).await?;
        lock(&self.logs).push(writer);
        Ok(Some(pipe))
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

    /// After the process's end: waits, within bounds, until streams and log programs have taken its output. What is left in a FIFO without a
    /// reader stays there until it is read, or this is dropped.
    pub async fn finish(&self) {
        lock(&self.child).take();
        let unread: Vec<_> = lock(&self.outputs).drain(..).filter(OutputFifo::is_unread).collect();
        if !unread.is_empty() {
            let waiting = tokio::spawn(join_all(unread.into_iter().map(OutputFifo::until_read)).map(drop).in_current_span());
            *lock(&self.unread) = Some(AbortOnDropHandle::new(waiting));
        }
        self.streams.drained().await;
        if let Some(logger) = &self.logger {
            logger.finish().await;
        }
        let logs: Vec<_> = lock(&self.logs).drain(..).collect();
        join_all(logs.iter().map(LogWriter::finish)).await;
    }
}

fn adopt_logs(ends: &Endpoints, context: &IoContext) -> Result<Vec<LogWriter>> {
    let mut logs = Vec::new();
    for (field, end) in [("stdout", &ends.stdout), ("stderr", &ends.stderr)] {
        if let Endpoint::File(path) = end {
            logs.extend(LogWriter::adopt(path, field, context)?);
        }
    }
    Ok(logs)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Streams {
    pub(crate) fn new(context: &IoContext) -> Self {
        Self { hub: context.streams.clone(), input: None, outputs: Vec::new(), held: Vec::new() }
    }

    pub(crate) fn open_input(&mut self, id: &str, context: &IoContext) -> Result<OwnedFd> {
        let theirs = self.hub.open_input(id, |ours| context.fds.leave(context.held("stdin"), &[ours]))?;
        self.input = Some(id.into());
        Ok(theirs)
    }

    pub(crate) fn open_output(&mut self, field: &str, id: &str, context: &IoContext) -> Result<OwnedFd> {
        let (ours, theirs) = self.hub.open_output(id)?;
        self.outputs.push(id.into());
        self.held.push(context.fds.leave(context.held(field), &[ours.as_fd()])?);
        Ok(theirs)
    }

    fn adopt_input(&mut self, id: &str, context: &IoContext) -> Result<()> {
        let Some((mut left, held)) = context.take("stdin") else { return Ok(()) };
        if let Some(ours) = left.pop() {
            self.hub.adopt_input(id, ours, held)?;
            self.input = Some(id.into());
        }
        Ok(())
    }

    pub(crate) fn adopt_output(&mut self, field: &str, id: &str, context: &IoContext) -> Result<()> {
        let Some((mut left, held)) = context.take(field) else { return Ok(()) };
        if let Some(ours) = left.pop() {
            self.hub.adopt_output(id, ours)?;
            self.outputs.push(id.into());
            self.held.push(held);
        }
        Ok(())
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

async fn open_output(
    field: &'static str,
    end: &Endpoint,
    streams: &mut Streams,
    outputs: &mut Vec<OutputFifo>,
    logs: &mut Vec<LogWriter>,
    context: &IoContext,
) -> Result<OwnedFd> {
    match end {
        Endpoint::None | Endpoint::Program(_) => null_device(),
        Endpoint::Fifo(path) => {
            let found = Fifo::find(field, path)?;
            let fifo = own(found.both()?, context)?;
            let held = context.fds.leave(context.held(field), &[found.writer()?.as_fd()])?;
            outputs.push(OutputFifo::new(path.clone(), held));
            Ok(fifo)
        }
        Endpoint::File(path) => {
            let (writer, pipe) = LogWriter::start(path, path, field, context).await?;
            logs.push(writer);
            own(pipe, context)
        }
        Endpoint::Stream(id) => own(streams.open_output(field, id, context)?, context),
    }
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
