//! Log files (`file://`): the process gets a pipe, and a process of ours appends what comes through it to the file.
//!
//! ```text
//!   process ── pipe ──▶ writer (this executable again) ── O_APPEND ──▶ file
//!                         └── report: ready or why not; at the end, what was lost ──▶ daemon
//! ```
//!
//! The process must not have the file itself: an open of `/dev/stdout` with `O_TRUNC`, as a shell's `>` is, would empty the log. And the
//! daemon must not write to it: on a dead NFS or FUSE server that does not return.
//!
//! Invariants:
//! - there is one writer for each log of a process. A log that hangs blocks that writer, its pipe (64 KiB) and its buffer ([`CHUNK`]);
//!   the process then waits as with any full pipe;
//! - a writer needs no daemon. It ends when its pipe has hung up and is empty, or when it then makes no progress for [`REST`]. One in
//!   uninterruptible sleep ends only when the filesystem responds, and no daemon waits for that;
//! - a writer whose filesystem does not respond counts as a helper of its sandbox ([`offload::MOST`]) while it opens the file, and again once
//!   its pipe has hung up.
//!
//! Where the executable does not call [`offload::serve`] (tests) a thread takes the writer's place.

use std::{
    ffi::{CStr, OsStr},
    fs::{DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::prctl,
    unistd::setsid,
};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::unix::pipe, runtime::Handle, time::timeout};
use tracing::{Instrument, warn};

use super::IoContext;
use crate::{
    error::{Code, Error, Result},
    fdstore::Held,
    id::SandboxId,
    offload::{self, LOOK, Place, Stuck},
};

/// What a writer moves at once, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// How long the end of a process waits until all of its output is in the file.
const END: Duration = Duration::from_secs(5);

/// How long a filesystem may take for one write, once nothing can write to the pipe any more.
const REST: Duration = Duration::from_secs(30);

/// How long a writer may take for what is left in its pipe before it reports that it is behind.
const BEHIND: Duration = Duration::from_secs(1);

/// What a writer reports at most, in bytes.
const REPORT: usize = 16 << 10;

/// Makes this executable a writer.
const VARIABLE: &str = "KUASAR_LOG_WRITER";

/// The name that a writer has in lists of processes: not one that `pkill kuasard` finds.
const NAME: &CStr = c"kuasar-log";

/// The first line of a writer's report: whether the file is open.
#[derive(Debug, Serialize, Deserialize)]
struct Opened(Result<(), (Code, String)>);

/// The line by which a writer reports that its pipe has hung up and that it has not written everything yet. Other lines are what was lost.
const IS_BEHIND: &[u8] = b"behind\n";

/// The writer of one log file.
#[derive(Debug)]
pub(crate) struct LogWriter {
    report: Mutex<Option<Report>>,
}

/// What is known of a writer until it has ended.
#[derive(Debug)]
struct Report {
    path: PathBuf,
    sandbox: SandboxId,
    pipe: pipe::Receiver,
    bytes: Vec<u8>,
    /// As long as the writer may be there, the next daemon is to know of it.
    held: Option<Held>,
}

impl LogWriter {
    /// Starts the writer for a file and waits until that is open; it and its directory are made where missing, as containerd's own shim does.
    /// Returns the writing end for the process. What is opened is `opened`, which may be another name of the file at `path`. `field` tells the
    /// logs of a process apart.
    ///
    /// # Errors
    /// [`Code::DeadlineExceeded`] when the filesystem does not respond; [`Code::ResourceExhausted`] when too many helpers or earlier writers
    /// of the sandbox wait for filesystems; otherwise why the file cannot be opened.
    pub(crate) async fn start(path: &Path, opened: &Path, field: &str, context: &IoContext) -> Result<(Self, OwnedFd)> {
        let place = Place::take(context.sandbox.as_str()).map_err(|error| Error::Reported {
            code: Code::ResourceExhausted,
            report: format!("failed to open log file {}: {}", path.display(), error.report()),
        })?;
        let (input, output) = new_pipe()?;
        let (report, theirs) = new_pipe()?;
        let watched = report.try_clone().map_err(Error::failed("copy a descriptor"))?;
        if offload::is_served() {
            let mut command = Command::new("/proc/self/exe");
            command
                .arg0(OsStr::from_bytes(NAME.to_bytes()))
                .args([path, opened])
                .env_clear()
                .env(VARIABLE, "1")
                .stdin(input)
                .stdout(theirs)
                .stderr(Stdio::null());
            // Unlike helpers it keeps the daemon's scores: a process whose output goes nowhere would die of SIGPIPE.
            context.reaper.spawn(&mut command)?;
        } else {
            let (path, opened) = (path.to_owned(), opened.to_owned());
            let work = move || {
                write_log(&path, &opened, &mut File::from(input), &mut File::from(theirs), &Progress::default());
            };
            std::thread::Builder::new().name("log".into()).spawn(work).map_err(Error::failed("start a thread for a log"))?;
        }
        let mut report_of = Report::new(path, watched, context)?;
        let Ok(opened) = timeout(LOOK, report_of.opened()).await else {
            // The pipe is closed with this call, so the writer ends once the kernel lets it.
            tokio::spawn(async move {
                report_of.end().await;
                drop(place);
            });
            return Err(offload::no_answer(&format!("log file {}", path.display()), LOOK));
        };
        opened?;
        report_of.held = Some(context.fds.leave(name(field, context), &[report.as_fd()])?);
        Ok((Self { report: Mutex::new(Some(report_of)) }, output))
    }

    /// The writer that an earlier daemon has started.
    ///
    /// # Errors
    /// When descriptors have run out.
    pub(crate) fn adopt(path: &Path, field: &str, context: &IoContext) -> Result<Option<Self>> {
        let Some((parked, held)) = context.fds.take_of_namespace(&name(field, context)) else { return Ok(None) };
        // The version before has parked the writer's pidfd, too.
        let Some(report) = parked.into_iter().next() else { return Ok(None) };
        let report = Report { held: Some(held), ..Report::new(path, report, context)? };
        Ok(Some(Self { report: Mutex::new(Some(report)) }))
    }

    /// After the process's end: waits, within bounds, until all of its output is in the file. The writing ends must be closed. What takes
    /// longer goes on by itself.
    pub(crate) async fn finish(&self) {
        let Some(mut report) = self.report.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        if timeout(END, report.end()).await.is_err() {
            warn!(log = %report.path.display(), "a log file does not take a process's output, or a left-behind process still writes");
            tokio::spawn(report.linger().in_current_span());
        }
    }
}

impl Drop for LogWriter {
    /// Where the end is not waited for, as of a start that has failed, the writer still counts until it has ended.
    fn drop(&mut self) {
        let report = self.report.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(report), Ok(runtime)) = (report, Handle::try_current()) {
            runtime.spawn(report.linger().in_current_span());
        }
    }
}

impl Report {
    fn new(path: &Path, pipe: OwnedFd, context: &IoContext) -> Result<Self> {
        let pipe = pipe::Receiver::from_owned_fd(pipe).map_err(Error::failed("watch a log writer's report"))?;
        Ok(Self { path: path.to_owned(), sandbox: context.sandbox.clone(), pipe, bytes: Vec::new(), held: None })
    }

    /// Reads more; false at the end. Cancelling loses nothing.
    async fn more(&mut self) -> bool {
        self.bytes.len() < REPORT && self.pipe.read_buf(&mut self.bytes).await.is_ok_and(|length| length > 0)
    }

    async fn opened(&mut self) -> Result<()> {
        let operation = format!("open log file {}", self.path.display());
        while !self.bytes.ends_with(b"\n") {
            if !self.more().await {
                return Err(Error::failed(operation)("its writer ended early; is memory short?"));
            }
        }
        let line = std::mem::take(&mut self.bytes);
        let Opened(opened) = serde_json::from_slice(&line).map_err(Error::failed(operation))?;
        opened.map_err(|(code, report)| Error::Reported { code, report })
    }

    /// Waits for the writer's end.
    async fn end(&mut self) {
        while self.more().await {}
        let lost = self.bytes.strip_prefix(IS_BEHIND).or_else(|| self.bytes.strip_suffix(IS_BEHIND)).unwrap_or(&self.bytes);
        if !lost.is_empty() {
            let (log, lost) = (self.path.display(), String::from_utf8_lossy(lost));
            warn!(%log, %lost, "a log is not whole");
        }
    }

    /// Waits for the writer's end. Once its pipe has hung up it counts as a helper of its sandbox.
    async fn linger(mut self) {
        while !self.bytes.starts_with(IS_BEHIND) {
            if !self.more().await {
                return self.end().await;
            }
        }
        let stuck = Stuck::count(format!("log file {}", self.path.display()), self.sandbox.as_str());
        self.end().await;
        stuck.has_ended();
    }
}

fn name(field: &str, context: &IoContext) -> String {
    context.held(if field == "stderr" { "log-err" } else { "log-out" })
}

fn new_pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|errno| Error::failed("make a pipe for a log")(io::Error::from(errno)))
}

/// Does a writer's work, if this process was started as one.
pub(crate) fn serve() -> Option<ExitCode> {
    std::env::var_os(VARIABLE)?;
    // What a terminal sends to the daemon's process group is not for the writers.
    let _ = setsid();
    let _ = prctl::set_name(NAME);
    let own = || {
        let (input, report) = (io::stdin().as_fd().try_clone_to_owned()?, io::stdout().as_fd().try_clone_to_owned()?);
        Ok::<_, io::Error>((File::from(input), File::from(report)))
    };
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let (path, opened) = (paths.next().unwrap_or_default(), paths.next().unwrap_or_default());
    let (Ok((mut input, mut report)), Ok((watched, news))) = (own(), own()) else { return Some(ExitCode::FAILURE) };
    let progress = Arc::new(Progress::default());
    let of_watch = progress.clone();
    // Before the first call that may not return.
    let watch = std::thread::Builder::new().name("watch".into()).spawn(move || end_with(&watched, news, &of_watch));
    if watch.is_err() {
        return Some(ExitCode::FAILURE);
    }
    write_log(&path, &opened, &mut input, &mut report, &progress);
    Some(ExitCode::SUCCESS)
}

/// When a writer has last come back from the filesystem.
struct Progress(Mutex<Instant>);

impl Default for Progress {
    fn default() -> Self {
        Self(Mutex::new(Instant::now()))
    }
}

impl Progress {
    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn made(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Ends this process when the pipe has hung up and the filesystem then does not respond for [`REST`].
fn end_with(input: &File, mut report: File, progress: &Progress) {
    // HUP is reported whatever is asked for.
    let mut polled = [PollFd::new(input, PollFlags::empty())];
    while rustix::io::retry_on_intr(|| poll(&mut polled, None)).is_ok() && polled[0].revents().is_empty() {}
    let hung_up = Instant::now();
    std::thread::sleep(BEHIND);
    // The report's reader may be gone.
    let _ = report.write_all(IS_BEHIND);
    loop {
        let left = (progress.last().max(hung_up) + REST).saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        std::thread::sleep(left);
    }
    let _ = write!(report, "the filesystem did not respond within {} s: what was not written is lost", REST.as_secs());
    std::process::exit(1);
}

/// Appends all that comes to the file. The report's reader may be gone, and is told of everything else.
fn write_log(path: &Path, opened: &Path, input: &mut impl Read, report: &mut impl Write, progress: &Progress) {
    let opened = open(path, opened);
    progress.made();
    let told = Opened(opened.as_ref().map(drop).map_err(|error| (error.code(), error.report())));
    let _ = serde_json::to_writer(&mut *report, &told).map_err(io::Error::from).and_then(|()| report.write_all(b"\n"));
    if let Ok(mut file) = opened
        && let Err(lost) = append(input, &mut file, progress)
    {
        let _ = report.write_all(lost.as_bytes());
    }
}

fn open(path: &Path, opened: &Path) -> Result<File> {
    if let Some(directory) = opened.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(Error::io("make log directory", directory))?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(opened)
        .map_err(Error::io("open log file", path))?;
    let kind = file.metadata().map_err(Error::io("look at log file", path))?;
    if !kind.is_file() {
        return Err(Error::invalid("log URI", format!("{} is not a regular file", path.display())));
    }
    // Only now: a FIFO or a device could block. A FUSE server may take the flag for its own files.
    fcntl(&file, FcntlArg::F_GETFL)
        .and_then(|flags| fcntl(&file, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) & !OFlag::O_NONBLOCK)))
        .map_err(|errno| Error::io("make writes wait for log file", path)(errno.into()))?;
    Ok(file)
}

/// # Errors
/// What was lost, and why. A full disk must not stop the process: what does not fit is thrown away, and what comes later is tried again.
fn append(input: &mut impl Read, file: &mut impl Write, progress: &Progress) -> Result<(), String> {
    let mut buffer = vec![0; CHUNK];
    let (mut lost, mut first) = (0, None);
    loop {
        let mut rest = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => &buffer[..length],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(format!("the pipe cannot be read: {error}")),
        };
        while !rest.is_empty() {
            let written = file.write(rest);
            progress.made();
            match written {
                Ok(length) if length > 0 => rest = &rest[length..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                failed => {
                    lost += rest.len();
                    let error = failed.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                    first.get_or_insert(error);
                    break;
                }
            }
        }
    }
    first.map_or(Ok(()), |error| Err(format!("{lost} bytes could not be written: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes, then none, and after one refusal all again.
    struct Full(Vec<u8>, usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match std::mem::replace(&mut self.1, usize::MAX) {
                0 => Err(io::ErrorKind::StorageFull.into()),
                room => {
                    let taken = room.min(bytes.len());
                    self.1 = room - taken;
                    self.0.extend(&bytes[..taken]);
                    Ok(taken)
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_opened_log_is_a_regular_file_whose_writes_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let file = open(&path, &path).unwrap();
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap());
        assert!(flags.contains(OFlag::O_APPEND) && !flags.contains(OFlag::O_NONBLOCK), "{flags:?}");
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // No reader, which an open that waits would wait for.
        let error = open(&fifo, &fifo).unwrap_err().report();
        assert!(error.contains(&fifo.display().to_string()), "{error}");
        let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
        let error = open(&fifo, &fifo).unwrap_err().report();
        assert!(error.contains("is not a regular file"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_counted_and_what_comes_later_is_written() {
        let mut input = Read::chain(&b"01234567"[..], &b"later"[..]);
        let mut disk = Full(Vec::new(), 3);
        let lost = append(&mut input, &mut disk, &Progress::default()).unwrap_err();
        assert!(lost.starts_with("5 bytes could not be written: "), "{lost}");
        assert_eq!(disk.0, b"012later");
    }
}
