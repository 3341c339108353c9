//! Log programs (`binary://`): containerd's logging binary protocol.
//!
//! The program gets the process's standard output on descriptor 3, standard error on 4, and a pipe on 5 that it closes (or, for
//! `binary-v2`, writes a byte to) when it is ready to read. `CONTAINER_ID` and `CONTAINER_NAMESPACE` are its whole
//! environment. It ends at end-of-file. It holds the reading ends, so it works on while this daemon is away.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::{
    fcntl::OFlag,
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::{
        signal::{SigSet, Signal as NixSignal},
        stat::Mode,
    },
    unistd::Pid,
};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};
use tracing::warn;

use super::{IoContext, endpoint::LogProgram};
use crate::{
    error::{Error, Result},
    reaper::ExitFuture,
};

/// How long a log program may take to get ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to end after the end of its input, and then after SIGTERM.
const END: Duration = Duration::from_secs(10);
const TERMINATE: Duration = Duration::from_secs(2);

/// Where the descriptors the program gets begin; sources must lie above them, or setting one would overwrite another.
const FIRST_FREE: i32 = 6;

/// A running log program.
#[derive(Debug)]
pub(crate) struct Logger {
    path: PathBuf,
    /// `None` when it had ended at once.
    pidfd: Option<OwnedFd>,
    exit: Mutex<Option<ExitFuture>>,
}

impl Logger {
    /// Starts the program and waits until it is ready. Returns the writing ends for standard output and error.
    pub(crate) async fn start(program: &LogProgram, context: &IoContext) -> Result<(Self, OwnedFd, OwnedFd)> {
        let (stdout_reader, stdout) = high_pipe()?;
        let (stderr_reader, stderr) = high_pipe()?;
        let (ready_reader, ready) = high_pipe()?;
        let mark = context.reaper.mark();
        let pid = spawn(program, context, [&stdout_reader, &stderr_reader, &ready])?;
        let exit = context.reaper.exit_of(pid.as_raw().unsigned_abs(), mark);
        drop((stdout_reader, stderr_reader, ready));
        let pidfd = match rustix::process::Pid::from_raw(pid.as_raw()).map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Some(Ok(pidfd)) => Some(pidfd),
            None | Some(Err(rustix::io::Errno::SRCH)) => None,
            Some(Err(errno)) => return Err(Error::io("watch log program", &program.path)(errno.into())),
        };
        let logger = Self { path: program.path.clone(), pidfd, exit: Mutex::new(Some(exit)) };
        match logger.ready(program, ready_reader).await {
            Ok(()) => Ok((logger, stdout, stderr)),
            Err(error) => {
                logger.signal(Signal::KILL);
                Err(error)
            }
        }
    }

    async fn ready(&self, program: &LogProgram, reader: OwnedFd) -> Result<()> {
        let mut reader = pipe::Receiver::from_owned_fd(reader).map_err(Error::failed("watch a log program's pipe"))?;
        let mut byte = [0];
        let length = timeout(READY, reader.read(&mut byte))
            .await
            .map_err(|_| Error::TimedOut {
                operation: format!("getting ready of log program {}", self.path.display()),
                seconds: READY.as_secs(),
            })?
            .map_err(Error::io("wait for log program", &self.path))?;
        if length == 0 && program.must_report {
            return Err(Error::Backend {
                program: self.path.display().to_string(),
                operation: "get ready".into(),
                message: "it closed descriptor 5 or ended before it wrote a byte there; see its own log".into(),
            });
        }
        Ok(())
    }

    /// Waits until the program has taken everything and ended. The writing ends must be closed. One that does not end is
    /// killed.
    pub(crate) async fn finish(&self) {
        let Some(mut exit) = self.exit.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        for (limit, signal) in [(END, Signal::TERM), (TERMINATE, Signal::KILL)] {
            if timeout(limit, &mut exit).await.is_ok() {
                return;
            }
            warn!(program = %self.path.display(), ?signal, "log program did not end with its input");
            self.signal(signal);
        }
    }

    fn signal(&self, signal: Signal) {
        let Some(pidfd) = &self.pidfd else { return };
        match pidfd_send_signal(pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => warn!(program = %self.path.display(), %errno, "cannot signal log program"),
        }
    }
}

fn high_pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|errno| Error::failed("make a pipe for a log program")(io::Error::from(errno)))?;
    Ok((lift(reader)?, lift(writer)?))
}

fn lift(fd: OwnedFd) -> Result<OwnedFd> {
    if fd.as_raw_fd() >= FIRST_FREE {
        return Ok(fd);
    }
    rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), FIRST_FREE)
        .map_err(|errno| Error::failed("move a log program's pipe")(io::Error::from(errno)))
}

/// posix_spawn(3) and not `Command`: descriptors 3 to 5 cannot be set without `pre_exec`, with which the standard library
/// waits for the child itself, and that is the reaper's work alone.
fn spawn(program: &LogProgram, context: &IoContext, fds: [&OwnedFd; 3]) -> Result<Pid> {
    let failed = |errno: nix::Error| Error::io("start log program", &program.path)(errno.into());
    let text = |text: &[u8]| {
        CString::new(text).map_err(|_| Error::invalid("log program", format!("{} has a NUL byte", program.path.display())))
    };
    let mut actions = PosixSpawnFileActions::init().map_err(failed)?;
    for (target, access) in [(0, OFlag::O_RDONLY), (1, OFlag::O_WRONLY), (2, OFlag::O_WRONLY)] {
        actions.add_open(target, "/dev/null", access, Mode::empty()).map_err(failed)?;
    }
    for (target, fd) in (3..).zip(fds) {
        actions.add_dup2(BorrowedFd::as_raw_fd(&fd.as_fd()), target).map_err(failed)?;
    }
    let mut attributes = PosixSpawnAttr::init().map_err(failed)?;
    // The Rust runtime ignores SIGPIPE, and that would be inherited.
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF).map_err(failed)?;
    attributes.set_sigdefault(&SigSet::from_iter([NixSignal::SIGPIPE])).map_err(failed)?;
    let mut arguments = vec![text(program.path.as_os_str().as_bytes())?];
    for argument in &program.arguments {
        arguments.push(text(argument.as_bytes())?);
    }
    let environment = [
        text(format!("CONTAINER_ID={}", context.container).as_bytes())?,
        text(format!("CONTAINER_NAMESPACE={}", context.namespace).as_bytes())?,
    ];
    let path: &Path = &program.path;
    posix_spawn(path, &actions, &attributes, &arguments, &environment).map_err(failed)
}
