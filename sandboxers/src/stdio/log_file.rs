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
//! - there is one writer for each log of a process. A log that hangs holds that writer, its pipe (64 KiB) and its buffer ([`CHUNK`]);
//!   the process then waits as with any full pipe;
//! - a writer lives on without a daemon, and ends when nothing can write to its pipe any more;
//! - one that does not end [`REST`] after that is killed. While the kernel does not let it go, it counts as a helper of its sandbox.
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
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::{sys::prctl, unistd::setsid};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::unix::pipe, runtime::Handle, time::timeout};
use tracing::{Instrument, warn};

use super::IoContext;
use crate::{
    error::{Code, Error, Result},
    fdstore::Held,
    offload::{self, Helper, LOOK, Place},
    process::Tracked,
};

/// What a writer moves at once, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// How long the end of a process waits until all of its output is in the file.
const END: Duration = Duration::from_secs(5);

/// How long a filesystem may take for the rest, once nothing can write to the pipe any more.
const REST: Duration = Duration::from_secs(60);

/// What a writer reports at most, in bytes.
const REPORT: usize = 16 << 10;

/// Makes this executable a writer.
const VARIABLE: &str = "KUASAR_LOG_WRITER";

/// The name that a writer has in lists of processes: not one that `pkill kuasard` finds.
const NAME: &CStr = c"kuasar-log";

/// The first line of a writer's report: whether the file is open.
#[derive(Debug, Serialize, Deserialize)]
struct Opened(Result<(), (Code, String)>);

/// The writer of one log file.
#[derive(Debug)]
pub(crate) struct LogWriter {
    report: Mutex<Option<Report>>,
}

/// What is known of a writer until it has ended.
#[derive(Debug)]
struct Report {
    path: PathBuf,
    sandbox: String,
    /// `None` when it is a thread, or has ended.
    process: Option<Tracked>,
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
    /// [`Code::DeadlineExceeded`] when the filesystem does not respond; [`Error::Unavailable`] when too many helpers of the sandbox are stuck;
    /// otherwise why the file cannot be opened.
    pub(crate) async fn start(path: &Path, opened: &Path, field: &str, context: &IoContext) -> Result<(Self, OwnedFd)> {
        let sandbox = sandbox_of(context);
        let place = Place::take(&sandbox)?;
        let (input, output) = new_pipe()?;
        let (report, theirs) = new_pipe()?;
        let watched = report.try_clone().map_err(Error::failed("copy a descriptor"))?;
        let pipe = pipe::Receiver::from_owned_fd(watched).map_err(Error::failed("watch a log writer's report"))?;
        let helper = if offload::is_served() {
            let mut command = Command::new("/proc/self/exe");
            command
                .arg0(OsStr::from_bytes(NAME.to_bytes()))
                .args([path, opened])
                .env_clear()
                .env(VARIABLE, "1")
                .stdin(input)
                .stdout(theirs)
                .stderr(Stdio::null());
            let child = context.reaper.spawn(&mut command)?;
            // Unlike other helpers it keeps the daemon's scores: a process whose output goes nowhere would die of SIGPIPE.
            Some(Helper::new(child, place)?)
        } else {
            let (path, opened) = (path.to_owned(), opened.to_owned());
            let work = move || write_log(&path, &opened, &mut File::from(input), &mut File::from(theirs));
            std::thread::Builder::new().name("log".into()).spawn(work).map_err(Error::failed("start a thread for a log"))?;
            None
        };
        let mut report_of = Report { path: path.to_owned(), sandbox, process: None, pipe, bytes: Vec::new(), held: None };
        match (timeout(LOOK, report_of.opened()).await, helper) {
            (Ok(opened), helper) => {
                opened?;
                report_of.process = helper.and_then(Helper::release);
            }
            (Err(_), helper) => {
                let what = format!("log file {}", path.display());
                if let Some(helper) = helper {
                    helper.kill(&what).await;
                }
                return Err(offload::no_answer(&what, LOOK));
            }
        }
        let mut left = vec![report.as_fd()];
        left.extend(report_of.process.as_ref().map(AsFd::as_fd));
        report_of.held = Some(context.fds.leave(name(field, context), &left)?);
        Ok((Self { report: Mutex::new(Some(report_of)) }, output))
    }

    /// The writer that an earlier daemon has started.
    ///
    /// # Errors
    /// When descriptors have run out.
    pub(crate) fn adopt(path: &Path, field: &str, context: &IoContext) -> Result<Option<Self>> {
        let Some((left, held)) = context.fds.take_of_namespace(&name(field, context)) else { return Ok(None) };
        let mut left = left.into_iter();
        let Some(report) = left.next() else { return Ok(None) };
        let process = left.next().map(Tracked::from_pidfd).transpose()?.flatten();
        let pipe = pipe::Receiver::from_owned_fd(report).map_err(Error::failed("watch a log writer's report"))?;
        let report =
            Report { path: path.to_owned(), sandbox: sandbox_of(context), process, pipe, bytes: Vec::new(), held: Some(held) };
        Ok(Some(Self { report: Mutex::new(Some(report)) }))
    }

    /// After the process's end: waits, within bounds, until all of its output is in the file. The writing ends must be closed. What takes
    /// longer goes on by itself.
    pub(crate) async fn finish(&self) {
        let Some(mut report) = self.report.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        if timeout(END, report.end()).await.is_err() {
            warn!(log = %report.path.display(), "a log file does not take a process's output, or a left-behind process still writes");
            tokio::spawn(report.give_up().in_current_span());
        }
    }
}

impl Drop for LogWriter {
    /// Where the end is not waited for, as of a start that has failed, no writer that hangs is left.
    fn drop(&mut self) {
        let report = self.report.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(report), Ok(runtime)) = (report, Handle::try_current()) {
            runtime.spawn(report.give_up().in_current_span());
        }
    }
}

impl Report {
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
        if !self.bytes.is_empty() {
            let (log, lost) = (self.path.display(), String::from_utf8_lossy(&self.bytes));
            warn!(%log, %lost, "a log is not whole");
        }
    }

    /// Kills the writer when its filesystem does not respond once nothing can write to its pipe any more.
    async fn give_up(mut self) {
        let mut ended = false;
        loop {
            if timeout(REST, self.end()).await.is_ok() {
                return;
            }
            // At two looks in a row: so long it had for the rest.
            match &self.process {
                Some(process) if !has_ended(process.identity().pid) => ended = false,
                Some(process) if std::mem::replace(&mut ended, true) => {
                    warn!(log = %self.path.display(), "a log file does not respond: what has not been written of it is lost");
                    return offload::kill(process, &format!("log file {}", self.path.display()), &self.sandbox).await;
                }
                Some(_) => {}
                None => return,
            }
        }
    }
}

/// Whether nothing can write to the pipe that a writer reads.
fn has_ended(pid: u32) -> bool {
    let mut options = OpenOptions::new();
    let input = match options.read(true).custom_flags(libc::O_NONBLOCK).open(format!("/proc/{pid}/fd/0")) {
        Ok(input) => input,
        Err(error) => return error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH),
    };
    let mut polled = [PollFd::new(&input, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec::default())).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

fn sandbox_of(context: &IoContext) -> String {
    context.name.split('/').nth(1).unwrap_or_default().to_owned()
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
        Ok::<_, io::Error>((File::from(io::stdin().as_fd().try_clone_to_owned()?), io::stdout().as_fd().try_clone_to_owned()?))
    };
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let (path, opened) = (paths.next().unwrap_or_default(), paths.next().unwrap_or_default());
    Some(match own() {
        Ok((mut input, report)) => {
            write_log(&path, &opened, &mut input, &mut File::from(report));
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    })
}

/// Appends all that comes to the file. The report's reader may be gone, and is told of everything else.
fn write_log(path: &Path, opened: &Path, input: &mut impl Read, report: &mut impl Write) {
    let opened = open(path, opened);
    let told = Opened(opened.as_ref().map(drop).map_err(|error| (error.code(), error.report())));
    let _ = serde_json::to_writer(&mut *report, &told).map_err(io::Error::from).and_then(|()| report.write_all(b"\n"));
    if let Ok(mut file) = opened
        && let Err(lost) = append(input, &mut file)
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
    Ok(file)
}

/// # Errors
/// What was lost, and why. A full disk must not stop the process: what does not fit is thrown away, and what comes later is tried again.
fn append(input: &mut impl Read, file: &mut impl Write) -> Result<(), String> {
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
            match file.write(rest) {
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
    fn what_does_not_fit_is_counted_and_what_comes_later_is_written() {
        let mut input = Read::chain(&b"01234567"[..], &b"later"[..]);
        let mut disk = Full(Vec::new(), 3);
        let lost = append(&mut input, &mut disk).unwrap_err();
        assert!(lost.starts_with("5 bytes could not be written: "), "{lost}");
        assert_eq!(disk.0, b"012later");
    }
}
