//! The terminal of a process: copies between its pseudo-terminal and wherever containerd wants it.
//!
//! ```text
//!   stdin  FIFO or stream ──▶ input task ──▶ ┌────────┐ ──▶ slave: the process
//!   stdout FIFO, stream,  ◀── output task ◀─ │ master │ ◀──
//!          program or log writer             └────────┘
//! ```
//!
//! A terminal cannot be handed to containerd, so this is the one place where bytes pass through the daemon. Buffers exist
//! only while there is something to copy. Output waits for a slow or absent containerd; input that the process does not
//! read waits too.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::unix::pipe,
    select,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    error::{Error, Result},
    fdstore::Held,
    id::ContainerId,
    stdio::{Endpoint, Endpoints, Fifo, IoContext, LogWriter, Logger, Stdio, Streams, own, splice_all, until_empty, write_all},
    sys,
    types::WindowSize,
};

/// What is copied at once, in bytes; a pseudo-terminal holds 4 KiB.
const CHUNK: usize = 4 << 10;

/// How long the rest of the output may take after the process has ended: a process it left behind may hold the terminal open.
const DRAIN: Duration = Duration::from_secs(2);

/// Names the parked descriptor that output is written to.
const OUTPUT: &str = "output";

type Master = Arc<AsyncFd<OwnedFd>>;

/// The terminal of one process. Dropping it hangs up.
#[derive(Debug)]
pub struct Terminal {
    master: Master,
    output: JoinHandle<()>,
    /// Becomes true when all output was copied.
    drained: watch::Receiver<bool>,
    input: Option<JoinHandle<()>>,
    closing: CancellationToken,
    logger: Option<Logger>,
    log: Option<LogWriter>,
    streams: Streams,
    _held: Vec<Held>,
}

impl Terminal {
    /// Starts to copy. `master` is the pseudo-terminal's master, as an OCI runtime sends it over its console socket.
    ///
    /// # Errors
    /// As [`ProcessIo::open`](crate::stdio::ProcessIo::open).
    pub async fn new(master: OwnedFd, stdio: &Stdio, context: &IoContext) -> Result<Self> {
        // Without it the process is hung up.
        let held = context.fds.leave(context.held("tty"), &[master.as_fd()])?;
        Self::copying(master, held, stdio, context, false).await
    }

    /// Goes on copying for a process of an earlier daemon; `None` when that has left no master. A stream is lost with the daemon that had
    /// it: containerd does not open it again.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub async fn adopt(stdio: &Stdio, context: &IoContext) -> Result<Option<Self>> {
        let Some((mut left, held)) = context.take("tty") else { return Ok(None) };
        let Some(master) = left.pop() else { return Ok(None) };
        Self::copying(master, held, stdio, context, true).await.map(Some)
    }

    async fn copying(master: OwnedFd, held: Held, stdio: &Stdio, context: &IoContext, adopted: bool) -> Result<Self> {
        let stdio = Stdio { terminal: true, ..stdio.clone() };
        let ends = Endpoints::parse(&stdio)?;
        let mut streams = Streams::new(context);
        let (mut logger, mut log) = (None, None);
        let mut held = vec![held];
        let source = match &ends.stdin {
            // Open for writing too, so that a client that detaches does not end it.
            Endpoint::Fifo(path) => {
                let (fifo, input) = fifo("stdin", "stdin", path, context)?;
                held.push(input);
                Some(fifo)
            }
            Endpoint::Stream(id) if !adopted => Some(streams.open_input(id, context)?),
            _ => None,
        };
        let sink = match &ends.stdout {
            Endpoint::None => Sink::Nowhere,
            Endpoint::Stream(_) if adopted => Sink::Nowhere,
            Endpoint::Fifo(path) => {
                let (fifo, held) = fifo("stdout", OUTPUT, path, context)?;
                Sink::pipe(fifo, Some(held), true)?
            }
            Endpoint::Stream(id) => Sink::pipe(streams.open_output("stdout", id, context)?, None, false)?,
            Endpoint::File(path) => match log_pipe(path, context, adopted).await {
                Ok((writer, pipe, held)) => {
                    log = Some(writer);
                    Sink::pipe(pipe, Some(held), false)?
                }
                // A log must not stop the recovery of its container.
                Err(error) if adopted => {
                    warn!(container = %context.container, error = error.report(), "output is discarded: its log file cannot be written");
                    Sink::Nowhere
                }
                Err(error) => return Err(error),
            },
            Endpoint::Program(program) => {
                let (started, stdout, _) = Logger::start(program, context).await?;
                logger = Some(started);
                Sink::pipe(own(stdout, context)?, None, false)?
            }
        };
        let source = source.map(pipe::Receiver::from_owned_fd).transpose().map_err(Error::failed("watch stdin"))?;
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK;
        fcntl(&master, FcntlArg::F_SETFL(flags)).map_err(Error::failed("make the terminal non-blocking"))?;
        let master =
            sys::watch(master, Interest::READABLE | Interest::WRITABLE).map_err(Error::failed("watch the terminal"))?;
        let master: Master = Arc::new(master);
        let closing = CancellationToken::new();
        let container = context.container.clone();
        let (done, drained) = watch::channel(false);
        let output = tokio::spawn({
            let master = master.clone();
            async move {
                let mut sink = sink;
                if let Err(error) = copy_output(&master, &mut sink, &container).await {
                    warn!(%container, %error, "terminal output was cut off");
                }
                // Nobody waits any more: fine.
                let _ = done.send(true);
                // What is in a FIFO is lost when the last that has it open goes, and containerd may be away.
                if let Sink::Pipe { pipe, is_fifo: true, .. } = &sink {
                    until_empty(pipe.get_ref()).await;
                }
            }
        });
        let input = source.map(|source| {
            let (master, closing, container) = (master.clone(), closing.clone(), context.container.clone());
            tokio::spawn(async move {
                if let Err(error) = copy_input(&source, &master, &closing).await {
                    debug!(%container, %error, "terminal input ended");
                }
            })
        });
        Ok(Self { master, output, drained, input, closing, logger, log, streams, _held: held })
    }

    /// The master, for whoever keeps a second hold on it.
    #[must_use]
    pub fn master(&self) -> BorrowedFd<'_> {
        self.master.get_ref().as_fd()
    }

    /// Sets the size; the process gets SIGWINCH.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resize(&self, size: WindowSize) -> Result<()> {
        let size = Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(self.master(), size).map_err(|errno| Error::failed("resize the terminal")(io::Error::from(errno)))
    }

    /// Ends input as a user would: after all that has arrived, the end-of-file character. A program that reads single
    /// characters (raw mode) has no end-of-file, and gets none.
    pub fn close_stdin(&self) {
        // A stream's pipe ends by itself, when all that was on its way has come.
        if !self.streams.close_input() {
            self.closing.cancel();
        }
    }

    /// After the process's end: waits, within bounds, until its output is where it should be.
    pub async fn finish(&self) {
        let mut drained = self.drained.clone();
        // An error means that the task is gone, which is as good.
        if timeout(DRAIN, drained.wait_for(|drained| *drained)).await.is_err() {
            debug!("a process that was left behind holds the terminal open, or nobody takes its output");
            return;
        }
        self.streams.drained().await;
        if let Some(logger) = &self.logger {
            logger.finish().await;
        }
        if let Some(log) = &self.log {
            log.finish().await;
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.output.abort();
        if let Some(input) = &self.input {
            input.abort();
        }
    }
}

/// A FIFO of containerd's, held by the daemon's successors too: containerd takes it for ended when nobody has it open.
fn fifo(field: &'static str, name: &str, path: &Path, context: &IoContext) -> Result<(OwnedFd, Held)> {
    let name = context.held(name);
    if let Some((mut left, held)) = context.fds.take_of_namespace(&name)
        && let Some(fifo) = left.pop()
    {
        return Ok((fifo, held));
    }
    let fifo = own(Fifo::find(field, path)?.both()?, context)?;
    let held = context.fds.leave(name, &[fifo.as_fd()])?;
    Ok((fifo, held))
}

/// The pipe to a log's writer, parked so that the writer outlives the daemon.
async fn log_pipe(path: &Path, context: &IoContext, adopted: bool) -> Result<(LogWriter, OwnedFd, Held)> {
    const FIELD: &str = "stdout";
    let name = context.held(OUTPUT);
    // The version before has not parked the pipe, so that its writer has ended.
    if adopted
        && let Some((mut parked, held)) = context.fds.take_of_namespace(&name)
        && let (Some(pipe), Some(writer)) = (parked.pop(), LogWriter::adopt(path, FIELD, context)?)
    {
        return Ok((writer, pipe, held));
    }
    let (writer, pipe) = LogWriter::start(path, path, FIELD, context).await?;
    let held = context.fds.leave(name, &[pipe.as_fd()])?;
    Ok((writer, pipe, held))
}

enum Sink {
    Nowhere,
    Pipe {
        pipe: AsyncFd<OwnedFd>,
        /// Whether the kernel can move bytes from a terminal to a pipe.
        splices: bool,
        /// Its content is lost when the last that has it open goes.
        is_fifo: bool,
        _held: Option<Held>,
    },
}

impl Sink {
    fn pipe(fd: OwnedFd, held: Option<Held>, is_fifo: bool) -> Result<Self> {
        fcntl(&fd, FcntlArg::F_GETFL)
            .and_then(|flags| fcntl(&fd, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK)))
            .map_err(Error::failed("make stdout non-blocking"))?;
        let pipe = sys::watch(fd, Interest::WRITABLE).map_err(Error::failed("watch stdout"))?;
        Ok(Self::Pipe { pipe, splices: true, is_fifo, _held: held })
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Nowhere => Ok(()),
            Self::Pipe { pipe, .. } => write_all(pipe, bytes).await,
        }
    }
}

/// Copies until the last process has closed the terminal. When the sink fails, what follows is discarded: the process must not block.
async fn copy_output(master: &AsyncFd<OwnedFd>, sink: &mut Sink, container: &ContainerId) -> io::Result<()> {
    let discard = |sink: &mut Sink, error: io::Error| {
        warn!(%container, %error, "terminal output is discarded: its destination cannot be written");
        *sink = Sink::Nowhere;
    };
    loop {
        if let Sink::Pipe { pipe, splices: splices @ true, .. } = sink {
            // Nothing that has left the terminal is in our memory, where it would be lost with us.
            match splice_output(master, pipe).await {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => *splices = false,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => discard(sink, error),
                ended => return ended,
            }
        }
        let mut ready = master.readable().await?;
        let mut buffer = vec![0; CHUNK];
        loop {
            let length = match ready.try_io(|master| Ok(rustix::io::read(master.get_ref(), &mut buffer[..])?)) {
                Ok(Ok(0)) => return Ok(()),
                Ok(Ok(length)) => length,
                Ok(Err(error)) if is_hangup(&error) => return Ok(()),
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            };
            if let Err(error) = sink.write(&buffer[..length]).await {
                discard(sink, error);
            }
        }
    }
}

/// How Linux says that nobody has the slave open any more.
fn is_hangup(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// The same into a pipe, within the kernel.
async fn splice_output(master: &AsyncFd<OwnedFd>, pipe: &AsyncFd<OwnedFd>) -> io::Result<()> {
    match splice_all(master, pipe, CHUNK, |_| Ok(())).await {
        Err(error) if is_hangup(&error) => Ok(()),
        ended => ended,
    }
}

/// Copies until input is closed and all of it has arrived.
async fn copy_input(source: &pipe::Receiver, master: &AsyncFd<OwnedFd>, closing: &CancellationToken) -> io::Result<()> {
    // Whether the process would take the end-of-file character as the end of a line.
    let mut in_line = false;
    loop {
        let mut buffer = Vec::with_capacity(CHUNK);
        let closed = closing.is_cancelled();
        let read = if closed { read_now(source, &mut buffer) } else { source.try_read_buf(&mut buffer) };
        match read {
            Ok(0) => break,
            Ok(_) => {
                in_line = buffer.last().is_some_and(|byte| !matches!(byte, b'\n' | b'\r'));
                write_all(master, &buffer).await?;
            }
            // The FIFO stays open with us, so its end is when it is empty after CloseIO.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && closed => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                drop(buffer);
                select! {
                    ready = source.readable() => ready?,
                    () = closing.cancelled() => {}
                }
            }
            Err(error) => return Err(error),
        }
    }
    let modes = tcgetattr(master.get_ref())?;
    if modes.local_modes.contains(LocalModes::ICANON) {
        let end = modes.special_codes[SpecialCodeIndex::VEOF];
        // The first one in a line only sends the line off.
        write_all(master, &[end, end][usize::from(!in_line)..]).await?;
    }
    Ok(())
}

/// Reads what is there. The runtime knows of what has arrived only after it has looked, and until then says that there is nothing.
fn read_now(source: &pipe::Receiver, buffer: &mut Vec<u8>) -> io::Result<usize> {
    buffer.resize(CHUNK, 0);
    let length = rustix::io::read(source, &mut buffer[..])?;
    buffer.truncate(length);
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As after the death of a log's writer.
    #[tokio::test]
    async fn output_goes_on_when_nothing_reads_it_any_more() {
        let pty = nix::pty::openpty(None, None).unwrap();
        fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).unwrap();
        let master = sys::watch(pty.master, Interest::READABLE | Interest::WRITABLE).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        for splices in [true, false] {
            let mut sink = Sink::pipe(writer.try_clone().unwrap().into(), None, false).unwrap();
            if let Sink::Pipe { splices: by_kernel, .. } = &mut sink {
                *by_kernel = splices;
            }
            let container = "c1".parse().unwrap();
            let slave = pty.slave.try_clone().unwrap();
            // More than the terminal holds.
            let write =
                tokio::task::spawn_blocking(move || io::Write::write_all(&mut std::fs::File::from(slave), &[b'x'; 100_000]));
            select! {
                written = write => written.unwrap().unwrap(),
                ended = copy_output(&master, &mut sink, &container) => panic!("copying ended: {ended:?}"),
                () = tokio::time::sleep(Duration::from_secs(10)) => panic!("the process is blocked"),
            }
        }
    }
}
