//! Standard input and output of a process in the guest.
//!
//! ```text
//!   containerd's FIFO, stream, log ── ProcessIo's descriptor ── splice ── vsock connection ── agent ── FIFO ── process
//! ```
//!
//! On this side of the guest the relay stands where the process would: it has the descriptors that the process would have been given
//! ([`ProcessIo`]), and one connection to the agent for each. All of them are left with the keeper, so a daemon that takes over goes on
//! where the one before was cut off: what a splice(2) has moved has been moved, and what it has not is still in the connection.
//!
//! How much output there is the agent tells with the process's exit; how much has come is counted here, in memory that is left with the
//! keeper as well ([`Counts`]). A daemon that died between moving bytes and counting them has counted too few. So one that has taken over
//! has the guest close the connections at the end instead of waiting for a number.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{FileExt, FileTypeExt},
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::try_join_all;
use kuasar_guest_protocol::{
    STREAM_PORT,
    agent::{ProcessRequest, Streams, WaitResponse},
    stream::{ACCEPTED, StreamHeader, StreamKind},
};
use kuasar_sandboxers::{
    Error, Result,
    fdstore::Held,
    stdio::{ChildFds, IoContext, ProcessIo, Stdio, null_device, reopened, splice_all, write_all},
    watch,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::{
    io::Errno,
    net::{RecvFlags, Shutdown, recv, shutdown},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    select,
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};
use tracing::{Instrument, debug, warn};

use crate::agent::{Agent, QUICK};

/// What is moved at once, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// How long output may stand still after the process's end before that is told all the same. The rest follows when containerd takes it.
const STANDSTILL: Duration = Duration::from_secs(10);

/// How long the guest may take to answer the header of a stream.
const ANSWER: Duration = Duration::from_secs(30);

/// Which of the descriptors that are left belong to which stream: the ends on the host's side in this order, then the connections.
const KINDS: [StreamKind; 3] = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr];

/// Stdio of one process in the guest.
#[derive(Debug)]
pub(crate) struct Relay {
    io: ProcessIo,
    outputs: Vec<Arc<Output>>,
    /// Taken over from an earlier daemon, so that the counts may be too small.
    adopted: bool,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    /// Ends standard input when nobody needs it any more.
    input: Option<Arc<OwnedFd>>,
    held: Mutex<Vec<Held>>,
}

/// One stream of output.
#[derive(Debug)]
struct Output {
    kind: StreamKind,
    moved: AtomicU64,
    changed: Notify,
    /// The guest has closed it, or it broke.
    ended: AtomicBool,
}

/// How far a stream has come, in memory that outlives the daemon: for each stream one number of eight bytes.
#[derive(Debug)]
struct Counts(File);

/// Which streams the host will open, for the agent.
pub(crate) fn streams(stdio: &Stdio) -> Streams {
    Streams {
        stdin: !stdio.stdin.is_empty(),
        stdout: !stdio.stdout.is_empty(),
        stderr: !stdio.terminal && (!stdio.stderr.is_empty() || is_log(&stdio.stdout)),
        terminal: stdio.terminal,
        ..Streams::default()
    }
}

/// A log URI for standard output takes standard error too.
fn is_log(stdout: &str) -> bool {
    stdout.starts_with("file://") || stdout.starts_with("binary")
}

fn wanted(streams: &Streams, kind: StreamKind) -> bool {
    match kind {
        StreamKind::Stdin => streams.stdin,
        StreamKind::Stdout => streams.stdout,
        StreamKind::Stderr => streams.stderr,
    }
}

impl Counts {
    /// Set once the header was sent.
    const OPENED: u64 = 1 << 63;

    fn new() -> Result<Self> {
        let failed = || Error::failed("make memory for the counts of streams");
        let memory = rustix::fs::memfd_create("kuasar-streams", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(failed())?;
        let file = File::from(memory);
        file.set_len(8 * KINDS.len() as u64).map_err(failed())?;
        Ok(Self(file))
    }

    fn get(&self, kind: StreamKind) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, 8 * kind as u64)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set(&self, kind: StreamKind, count: u64) -> io::Result<()> {
        self.0.write_all_at(&count.to_le_bytes(), 8 * kind as u64)
    }
}

/// One stream with both its ends.
struct Ends {
    kind: StreamKind,
    ours: OwnedFd,
    guest: OwnedFd,
}

/// What is left with the keeper of a process's streams.
struct Left {
    ends: Vec<Ends>,
    counts: Arc<Counts>,
    held: Vec<Held>,
}

impl Left {
    /// Nothing but the counts, which the keeper has from now on.
    fn new(context: &IoContext) -> Result<Self> {
        let counts = Arc::new(Counts::new()?);
        let held = vec![context.fds.leave(name(context, "counts"), &[counts.0.as_fd()])?];
        Ok(Self { ends: Vec::new(), counts, held })
    }

    /// Adds streams, each with its end on this side.
    fn connect(&mut self, io: &ProcessIo, connections: Vec<(StreamKind, OwnedFd)>, context: &IoContext) -> Result<()> {
        let ChildFds { stdin, stdout, stderr } = io.child_fds()?;
        let mut ours: Vec<_> = KINDS.into_iter().zip([stdin, stdout, stderr]).collect();
        for (kind, guest) in connections {
            let Some(at) = ours.iter().position(|(of, _)| *of == kind) else { continue };
            let (_, ours) = ours.swap_remove(at);
            // With nobody's reading end, the kernel tells after the process's end whether containerd reads.
            let writer = if kind == StreamKind::Stdin { None } else { reopened(&ours, OFlag::O_RDWR, OFlag::O_WRONLY)? };
            let left = [writer.as_ref().unwrap_or(&ours).as_fd(), guest.as_fd()];
            self.held.push(context.fds.leave(name(context, kind.name()), &left)?);
            self.ends.push(Ends { kind, ours, guest });
        }
        Ok(())
    }

    /// What an earlier daemon has left.
    fn take(stdio: &Stdio, context: &IoContext) -> Result<Self> {
        let (mut held, mut ends) = (Vec::new(), Vec::new());
        let counts = match context.fds.take_of_namespace(&name(context, "counts")) {
            Some((mut left, hold)) => {
                held.push(hold);
                left.pop().map(|memory| Counts(memory.into()))
            }
            None => None,
        };
        let counts = Arc::new(counts.map_or_else(Counts::new, Ok)?);
        for kind in KINDS {
            let Some((left, hold)) = context.fds.take_of_namespace(&name(context, kind.name())) else { continue };
            if let Ok([mut ours, guest]) = <[OwnedFd; 2]>::try_from(left) {
                held.push(hold);
                let path = match kind {
                    StreamKind::Stdin => "",
                    StreamKind::Stdout => &stdio.stdout,
                    StreamKind::Stderr => &stdio.stderr,
                };
                // A FIFO: who has only its writing end cannot write while nobody reads.
                if path.starts_with('/')
                    && let Some(both) = reopened(&ours, OFlag::O_WRONLY, OFlag::O_RDWR)?
                {
                    ours = both;
                }
                ends.push(Ends { kind, ours, guest });
            }
        }
        Ok(Self { ends, counts, held })
    }

    /// Puts pipes in place of log files, which the version before has opened itself. Where that fails the output goes nowhere: a log must not
    /// stop the recovery of its container.
    async fn pipe_files(&mut self, io: &ProcessIo, stdio: &Stdio, context: &IoContext) -> Result<()> {
        for Ends { kind, ours, guest } in self.ends.iter_mut().filter(|ends| ends.kind != StreamKind::Stdin) {
            match io.pipe_for_file(stdio, kind.name(), ours, context).await {
                Ok(Some(pipe)) => {
                    *ours = pipe;
                    self.held.push(context.fds.leave(name(context, kind.name()), &[ours.as_fd(), guest.as_fd()])?);
                }
                Ok(None) => {}
                Err(error) => {
                    warn!(error = error.report(), stream = kind.name(), "output is discarded: its log file cannot be written");
                    *ours = null_device()?;
                }
            }
        }
        Ok(())
    }
}

/// A connection to the agent for each of these streams. They may be made before there is the process, which is named over them later.
async fn dial(agent: &Agent, kinds: impl Iterator<Item = StreamKind>) -> Result<Vec<(StreamKind, OwnedFd)>> {
    let dialled = kinds.map(|kind| async move { Ok((kind, agent.dial(STREAM_PORT).await?.into_fd())) });
    try_join_all(dialled).await
}

/// Makes a process in the guest, and meanwhile the connections for its stdio. Returns what the guest answers, and the connections, if
/// they could be made.
///
/// # Errors
/// When the guest does not make the process.
pub(crate) async fn make<T>(
    agent: &Agent,
    stdio: &Stdio,
    made: impl Future<Output = Result<T>>,
) -> Result<(T, Result<Vec<(StreamKind, OwnedFd)>>)> {
    let asked = streams(stdio);
    let kinds = KINDS.into_iter().filter(|kind| wanted(&asked, *kind));
    let (made, connections) = tokio::join!(made, dial(agent, kinds));
    Ok((made?, connections))
}

impl Relay {
    /// Connects the stdio of a process that exists in the guest.
    ///
    /// # Errors
    /// When the keeper does not take the descriptors.
    pub(crate) fn open(
        io: ProcessIo,
        connections: Vec<(StreamKind, OwnedFd)>,
        context: &IoContext,
        process: &ProcessRequest,
    ) -> Result<Self> {
        let mut left = Left::new(context)?;
        left.connect(&io, connections, context)?;
        Self::begin(io, left, process, false)
    }

    /// Goes on with the stdio of a process that an earlier daemon has started, and connects what that had not come to.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(crate) async fn adopt(
        stdio: &Stdio,
        context: &IoContext,
        agent: Option<&Agent>,
        process: &ProcessRequest,
    ) -> Result<Self> {
        let mut left = Left::take(stdio, context)?;
        let asked = streams(stdio);
        let missing = |kind: &StreamKind| wanted(&asked, *kind) && !left.ends.iter().any(|ends| ends.kind == *kind);
        let missing: Vec<_> = KINDS.into_iter().filter(missing).collect();
        match agent {
            Some(agent) if !missing.is_empty() => {
                let fields: Vec<_> = missing.iter().map(|kind| kind.name()).collect();
                let io = ProcessIo::open_missing(stdio, context, &fields).await?;
                if left.held.is_empty() {
                    left = Left::new(context)?;
                }
                left.pipe_files(&io, stdio, context).await?;
                let connections = dial(agent, missing.into_iter()).await?;
                left.connect(&io, connections, context)?;
                Self::begin(io, left, process, true)
            }
            _ => {
                let io = ProcessIo::adopt(stdio, context)?;
                left.pipe_files(&io, stdio, context).await?;
                Self::begin(io, left, process, true)
            }
        }
    }

    fn begin(io: ProcessIo, left: Left, process: &ProcessRequest, adopted: bool) -> Result<Self> {
        let Left { ends, counts, held } = left;
        let (mut outputs, mut tasks, mut input) = (Vec::new(), Vec::new(), None);
        for Ends { kind, ours, guest } in ends {
            let count = counts.get(kind).map_err(Error::failed("read the count of a stream"))?;
            let moved = count & !Counts::OPENED;
            let opened = count & Counts::OPENED != 0;
            let header = StreamHeader { container: process.container.clone(), exec: process.exec.clone(), kind };
            let header = header.encode().map_err(Error::failed("name a stream"))?;
            let guest = Arc::new(guest);
            let connection = Stream { guest: guest.clone(), header, opened, counts: counts.clone(), kind };
            let process = format!("{} {}", process.container, process.exec);
            let task = if kind == StreamKind::Stdin {
                input = Some(guest);
                tokio::spawn(
                    async move {
                        if let Err(error) = connection.carry_input(ours).await {
                            debug!(process, %error, "standard input was cut off");
                        }
                    }
                    .in_current_span(),
                )
            } else {
                let output = Arc::new(Output {
                    kind,
                    moved: AtomicU64::new(moved),
                    changed: Notify::new(),
                    ended: AtomicBool::new(false),
                });
                outputs.push(output.clone());
                tokio::spawn(
                    async move {
                        if let Err(error) = connection.carry_output(ours, &output, &process).await {
                            warn!(process, stream = kind.name(), %error, "output was cut off");
                        }
                        output.ended.store(true, Ordering::Release);
                        output.changed.notify_waiters();
                    }
                    .in_current_span(),
                )
            };
            tasks.push(task);
        }
        Ok(Self { io, outputs, adopted, tasks: Mutex::new(tasks), input, held: Mutex::new(held) })
    }

    /// Ends standard input as far as it depends on us.
    pub(crate) fn close_stdin(&self) {
        self.io.close_stdin();
    }

    /// After the process's end, of which the guest has told `exit`: waits until all of its own output is where it should be. False when it
    /// stands still instead: containerd is away, or slow.
    pub(crate) async fn settle(&self, exit: Option<&WaitResponse>, agent: &Agent, process: &ProcessRequest) -> bool {
        let mut all = true;
        for output in &self.outputs {
            let total = total(exit, output.kind);
            if self.adopted
                && !output.has(total)
                && let Err(error) = agent
                    .call("end a process's output", Some(QUICK), |client, context| {
                        let process = process.clone();
                        async move { client.end_output(context, &process).await }
                    })
                    .await
            {
                debug!(error = error.report(), "the guest does not end a process's output");
            }
            all &= output.complete(total).await;
        }
        all
    }

    /// Goes on with the output of a process that has ended: until all of its own has come, or, where the guest has `more`, of what the process
    /// has left behind.
    pub(crate) async fn linger(&self, exit: Option<&WaitResponse>) {
        let more = exit.is_some_and(|exit| exit.more);
        for output in &self.outputs {
            output.until(total(exit, output.kind).filter(|_| !more)).await;
        }
    }

    /// Reports what has not come of an ended process's output, before it is closed.
    pub(crate) fn report_loss(&self, exit: Option<&WaitResponse>, process: &ProcessRequest) {
        for output in &self.outputs {
            let moved = output.moved.load(Ordering::Acquire);
            // One that was taken over has counted too few.
            let lost = total(exit, output.kind).map_or(0, |total| total.saturating_sub(moved));
            if lost > 0 && !self.adopted {
                let (container, exec, stream) = (&process.container, &process.exec, output.kind.name());
                warn!(
                    container,
                    exec,
                    stream,
                    bytes = lost,
                    "output was not taken by containerd, or did not come, and is lost"
                );
            }
        }
    }

    /// Ends all streams.
    pub(crate) async fn close(&self) {
        if let Some(input) = &self.input {
            hang_up(input);
        }
        // containerd takes output for ended when nobody has it open any more.
        let tasks: Vec<_> = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
        for task in tasks {
            task.abort();
            // That it was broken off is no news.
            let _ = task.await;
        }
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.io.finish().await;
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }
}

fn name(context: &IoContext, which: &str) -> String {
    format!("{}/vm-{which}", context.name)
}

/// Ends a connection of which the keeper has a copy.
fn hang_up(connection: &OwnedFd) {
    if let Err(errno) = shutdown(connection, Shutdown::Both)
        && errno != Errno::NOTCONN
    {
        debug!(%errno, "cannot hang a stream up");
    }
}

/// How much the guest tells that there is of a stream.
fn total(exit: Option<&WaitResponse>, kind: StreamKind) -> Option<u64> {
    exit.map(|exit| match kind {
        StreamKind::Stderr => exit.stderr_bytes,
        _ => exit.stdout_bytes,
    })
}

impl Output {
    fn has(&self, total: Option<u64>) -> bool {
        self.ended.load(Ordering::Acquire) || total.is_some_and(|total| self.moved.load(Ordering::Acquire) >= total)
    }

    /// Waits until so much was moved, or all.
    async fn until(&self, total: Option<u64>) {
        let mut changed = std::pin::pin!(self.changed.notified());
        loop {
            changed.as_mut().enable();
            if self.has(total) {
                return;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }

    /// Waits until all has been moved; false when it stands still instead.
    async fn complete(&self, total: Option<u64>) -> bool {
        let mut changed = std::pin::pin!(self.changed.notified());
        let mut deadline = Instant::now() + STANDSTILL;
        loop {
            changed.as_mut().enable();
            if self.has(total) {
                return true;
            }
            select! {
                () = changed.as_mut() => deadline = Instant::now() + STANDSTILL,
                () = sleep_until(deadline) => return false,
            }
            changed.set(self.changed.notified());
        }
    }
}

/// The guest's end of a stream.
struct Stream {
    guest: Arc<OwnedFd>,
    header: Vec<u8>,
    /// An earlier daemon has sent the header and has had the answer.
    opened: bool,
    counts: Arc<Counts>,
    kind: StreamKind,
}

impl Stream {
    /// Sends the header and hears whether the guest takes the stream.
    async fn open(&self, guest: &AsyncFd<OwnedFd>) -> io::Result<()> {
        if self.opened {
            return Ok(());
        }
        write_all(guest, &self.header).await?;
        let mut answer = [0];
        let answered = async {
            loop {
                let mut ready = guest.readable().await?;
                match ready.try_io(|guest| Ok(recv(guest.get_ref(), &mut answer[..], RecvFlags::empty())?.0)) {
                    Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                    Ok(received) => return received.map(drop),
                    Err(_) => {}
                }
            }
        };
        timeout(ANSWER, answered).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?;
        if answer != [ACCEPTED] {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the guest has no such stream"));
        }
        self.counts.set(self.kind, Counts::OPENED)
    }

    async fn carry_input(&self, source: OwnedFd) -> io::Result<()> {
        let guest = watched(&self.guest)?;
        self.open(&guest).await?;
        let result = match End::of(source)? {
            End::Pipe(source) => {
                let mut total = 0;
                move_all(&source, &guest, |length| {
                    total += length;
                    Ok(())
                })
                .await
            }
            // Nothing comes from anywhere else.
            End::Nowhere => Ok(()),
        };
        // A copy of the connection is left with the keeper, so closing this one would not end it.
        hang_up(&self.guest);
        result
    }

    /// Where nothing reads at the sink any more, what follows is discarded: the process in the guest must not block.
    async fn carry_output(&self, sink: OwnedFd, output: &Output, process: &str) -> io::Result<()> {
        let guest = watched(&self.guest)?;
        self.open(&guest).await?;
        let mut moved = |length: u64| {
            let all = output.moved.fetch_add(length, Ordering::AcqRel) + length;
            self.counts.set(self.kind, all | Counts::OPENED)?;
            output.changed.notify_waiters();
            Ok(())
        };
        match End::of(sink)? {
            End::Pipe(sink) => match move_all(&guest, &sink, &mut moved).await {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    warn!(process, stream = self.kind.name(), %error, "output is discarded: its destination cannot be written");
                }
                ended => return ended,
            },
            End::Nowhere => {}
        }
        discard(&guest, moved).await
    }
}

fn watched(connection: &OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // A descriptor of its own: epoll takes each only once.
    watch(connection.try_clone()?, Interest::READABLE | Interest::WRITABLE)
}

/// The host's end of a stream.
enum End {
    Pipe(AsyncFd<OwnedFd>),
    /// `/dev/null`, which cannot be waited for, nor has to be.
    Nowhere,
}

impl End {
    fn of(end: OwnedFd) -> io::Result<Self> {
        let file = File::from(end);
        let kind = file.metadata()?.file_type();
        if kind.is_char_device() {
            return Ok(Self::Nowhere);
        }
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // Of a pipe's two directions only the one that it has ever becomes ready.
        watch(file.into(), Interest::READABLE | Interest::WRITABLE).map(Self::Pipe)
    }
}

/// Moves everything from one end to the other, within the kernel where that is possible.
async fn move_all(
    source: &AsyncFd<OwnedFd>,
    sink: &AsyncFd<OwnedFd>,
    mut moved: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    match splice_all(source, sink, CHUNK, &mut moved).await {
        // Sockets of vsock on older kernels.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => copy_all(source, sink, moved).await,
        ended => ended,
    }
}

/// The same through this daemon's memory: what it holds when it is killed is lost.
async fn copy_all(
    source: &AsyncFd<OwnedFd>,
    sink: &AsyncFd<OwnedFd>,
    mut moved: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    while let Some(bytes) = read_some(source).await? {
        let written = write_all(sink, &bytes).await;
        // What was read is not in the connection any more, written or not.
        moved(bytes.len() as u64)?;
        written?;
    }
    Ok(())
}

async fn discard(source: &AsyncFd<OwnedFd>, mut moved: impl FnMut(u64) -> io::Result<()>) -> io::Result<()> {
    while let Some(bytes) = read_some(source).await? {
        moved(bytes.len() as u64)?;
    }
    Ok(())
}

/// What has come; `None` at the end.
async fn read_some(source: &AsyncFd<OwnedFd>) -> io::Result<Option<Vec<u8>>> {
    loop {
        let mut ready = source.readable().await?;
        // Only while there is something to copy.
        let mut buffer = vec![0; CHUNK];
        match ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer[..])?)) {
            Ok(Ok(0)) => return Ok(None),
            Ok(Ok(length)) => {
                buffer.truncate(length);
                return Ok(Some(buffer));
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// As after the death of a log's writer: all is counted, so that the end of the process is not waited for in vain.
    #[tokio::test]
    async fn output_that_nothing_reads_any_more_is_counted_and_discarded() {
        for by_kernel in [true, false] {
            let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            let guest = Arc::new(OwnedFd::from(ours));
            let (mut reader, sink) = io::pipe().unwrap();
            let output = Output {
                kind: StreamKind::Stdout,
                moved: AtomicU64::new(0),
                changed: Notify::new(),
                ended: AtomicBool::new(false),
            };
            let counts = Arc::new(Counts::new().unwrap());
            let stream =
                Stream { guest: guest.clone(), header: Vec::new(), opened: true, counts: counts.clone(), kind: output.kind };
            let writing = tokio::task::spawn_blocking(move || {
                theirs.write_all(b"first").unwrap();
                let mut first = [0; 5];
                reader.read_exact(&mut first).unwrap();
                assert_eq!(&first, b"first");
                drop(reader);
                theirs.write_all(&[b'x'; 1 << 20]).unwrap();
            });
            if by_kernel {
                stream.carry_output(sink.into(), &output, "c e").await.unwrap();
            } else {
                let (source, End::Pipe(sink)) = (watched(&guest).unwrap(), End::of(sink.into()).unwrap()) else {
                    panic!("it is no pipe")
                };
                let mut count = 0;
                let moved = |length| {
                    count += length;
                    Ok(())
                };
                let error = copy_all(&source, &sink, moved).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
                assert!(count > 5, "what was read is not counted");
                discard(&source, |_| Ok(())).await.unwrap();
            }
            writing.await.unwrap();
            if by_kernel {
                let all = 5 + (1 << 20);
                assert_eq!(
                    (output.moved.load(Ordering::Acquire), counts.get(output.kind).unwrap()),
                    (all, all | Counts::OPENED)
                );
            }
        }
    }
}
