//! Child processes: starting them, and learning how they end.
//!
//! The daemon is a child subreaper (`PR_SET_CHILD_SUBREAPER`, prctl(2)): an OCI runtime exits after it has started a container, and
//! the container's first process becomes our child. One loop reaps every child; who cares for a pid asks for its exit. Pids
//! are reused within minutes on a busy node, so exits carry a sequence number: take a [`Mark`] before the fork, and exits
//! older than it are not yours.
//!
//! Nobody else may wait for children: a second waiter would steal exits. `Command`s must not use `pre_exec`, `uid` or
//! `groups`, which make the standard library fork and wait by itself.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    process::{ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{self, Pid},
};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::timeout,
};
use tracing::{debug, warn};

use crate::{
    error::{Error, Result},
    types::Exit,
};

/// Exits nobody has asked for yet that are kept; older ones were orphans of containers.
const UNCLAIMED: usize = 4096;

/// What a helper program may print before the rest is thrown away, in bytes.
const OUTPUT_LIMIT: usize = 1 << 20;

/// A point in the sequence of exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(u64);

/// Starts children and hands out their exits. Clones share one table.
#[derive(Clone, Debug)]
pub struct Reaper(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    sequence: u64,
    unclaimed: VecDeque<(u64, u32, Exit)>,
    claims: HashMap<u32, Vec<oneshot::Sender<Exit>>>,
}

/// The exit of one process, when it comes.
#[derive(Debug)]
pub struct ExitFuture(oneshot::Receiver<Exit>);

impl Future for ExitFuture {
    type Output = Exit;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Exit> {
        // The sender lives in the table until it is used, so an error means the daemon is going down.
        Pin::new(&mut self.0).poll(cx).map(|exit| exit.unwrap_or_else(|_| Exit::now(255)))
    }
}

/// A child of ours.
#[derive(Debug)]
pub struct Child {
    /// Its pid, which is not reused before `exit` is ready.
    pub pid: u32,
    /// Its end.
    pub exit: ExitFuture,
    /// Pipes, as far as the command asked for them.
    pub stdin: Option<ChildStdin>,
    /// The reading end of its standard output.
    pub stdout: Option<OwnedFd>,
    /// The reading end of its standard error.
    pub stderr: Option<OwnedFd>,
}

/// What a program that ran to its end has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code; 128 + signal when killed.
    pub status: u32,
    /// Standard output, cut after 1 MiB.
    pub stdout: Vec<u8>,
    /// Standard error, cut after 1 MiB.
    pub stderr: Vec<u8>,
}

impl Reaper {
    /// Makes this process a child subreaper and starts the loop. Once per process, inside a tokio runtime.
    ///
    /// # Errors
    /// When the kernel or the runtime refuses; neither is expected.
    pub fn install() -> Result<Self> {
        prctl::set_child_subreaper(true).map_err(Error::failed("become the child subreaper"))?;
        let mut children = signal(SignalKind::child()).map_err(Error::failed("listen for SIGCHLD"))?;
        let reaper = Self(Arc::default());
        let table = reaper.clone();
        tokio::spawn(async move {
            loop {
                table.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change of the table is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self) {
        loop {
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code.unsigned_abs()),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + (signal as i32).unsigned_abs()),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => {
                    warn!(%error, "cannot wait for children");
                    return;
                }
            };
            self.table().exited(pid.as_raw().unsigned_abs(), Exit::now(status));
        }
    }

    /// The present point in the sequence of exits; take it before something forks.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(self.table().sequence)
    }

    /// The exit of `pid`, a child or orphan of ours that was forked after `since`. Ready at once if it has ended already.
    #[must_use]
    pub fn exit_of(&self, pid: u32, since: Mark) -> ExitFuture {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.table();
        let position = table.unclaimed.iter().position(|(sequence, dead, _)| *dead == pid && *sequence > since.0);
        match position.and_then(|position| table.unclaimed.remove(position)) {
            // The receiver is right here.
            Some((_, _, exit)) => {
                let _ = sender.send(exit);
            }
            None => table.claims.entry(pid).or_default().push(sender),
        }
        ExitFuture(receiver)
    }

    /// Starts a program. Its exit is ours to wait for, through [`Child::exit`].
    ///
    /// # Errors
    /// When it cannot be started: the program is missing, or processes or descriptors have run out.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let mark = self.mark();
        let program = command.get_program().to_owned();
        let mut child = command.spawn().map_err(Error::io("start", program))?;
        Ok(Child {
            pid: child.id(),
            exit: self.exit_of(child.id(), mark),
            stdin: child.stdin.take(),
            stdout: child.stdout.take().map(OwnedFd::from),
            stderr: child.stderr.take().map(OwnedFd::from),
        })
    }

    /// Runs a program to its end, with no input, and takes what it says. It is killed when it has not ended within `limit`.
    ///
    /// # Errors
    /// When it cannot be started or takes too long. A program that fails is not an error here; see [`Output::status`].
    pub async fn run(&self, command: &mut Command, limit: Duration) -> Result<Output> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = self.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let mut stdout = Captured::new(child.stdout)?;
        let mut stderr = Captured::new(child.stderr)?;
        let ended = async {
            let mut exit = child.exit;
            loop {
                tokio::select! {
                    exit = &mut exit => break exit,
                    () = stdout.fill(), if stdout.open() => {}
                    () = stderr.fill(), if stderr.open() => {}
                }
            }
        };
        let Ok(exit) = timeout(limit, ended).await else {
            kill(Pid::from_raw(child.pid.cast_signed()), Signal::SIGKILL).map_err(Error::failed(format!("kill {program}")))?;
            return Err(Error::TimedOut { operation: program, seconds: limit.as_secs() });
        };
        // A descendant may hold the pipes open for ever, so take what is there and do not wait for their end.
        stdout.drain();
        stderr.drain();
        Ok(Output { status: exit.status, stdout: stdout.bytes, stderr: stderr.bytes })
    }
}

impl Table {
    fn exited(&mut self, pid: u32, exit: Exit) {
        self.sequence += 1;
        if let Some(claims) = self.claims.remove(&pid) {
            for claim in claims {
                // Whoever asked may have gone away: fine.
                let _ = claim.send(exit);
            }
            return;
        }
        debug!(pid, status = exit.status, "an unclaimed child ended");
        if self.unclaimed.len() == UNCLAIMED {
            self.unclaimed.pop_front();
        }
        self.unclaimed.push_back((self.sequence, pid, exit));
    }
}

struct Captured {
    pipe: Option<pipe::Receiver>,
    bytes: Vec<u8>,
}

impl Captured {
    fn new(fd: Option<OwnedFd>) -> Result<Self> {
        let pipe = fd.map(pipe::Receiver::from_owned_fd).transpose().map_err(Error::failed("watch a pipe"))?;
        Ok(Self { pipe, bytes: Vec::new() })
    }

    fn open(&self) -> bool {
        self.pipe.is_some()
    }

    fn keep(&mut self, chunk: &[u8]) {
        let room = OUTPUT_LIMIT - self.bytes.len();
        self.bytes.extend_from_slice(&chunk[..chunk.len().min(room)]);
    }

    async fn fill(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut chunk = [0; 4096];
        match pipe.read(&mut chunk).await {
            Ok(length) if length > 0 => self.keep(&chunk[..length]),
            Ok(_) => self.pipe = None,
            Err(error) => {
                warn!(%error, "cannot read a program's output");
                self.pipe = None;
            }
        }
    }

    /// Takes what is in the pipe now. Not through tokio, which may not have noticed yet that there is something.
    fn drain(&mut self) {
        let mut chunk = [0; 4096];
        while let Some(pipe) = &self.pipe {
            match unistd::read(pipe.as_fd(), &mut chunk) {
                Ok(length) if length > 0 => self.keep(&chunk[..length]),
                Err(Errno::EINTR) => {}
                Ok(_) | Err(Errno::EAGAIN) => self.pipe = None,
                Err(error) => {
                    warn!(%error, "cannot read a program's output");
                    self.pipe = None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(status: u32) -> Exit {
        Exit { status, at: std::time::UNIX_EPOCH }
    }

    #[tokio::test]
    async fn an_exit_before_the_mark_belongs_to_an_earlier_process_of_that_pid() {
        let reaper = Reaper(Arc::default());
        reaper.table().exited(7, exit(1));
        let mark = reaper.mark();
        let late = reaper.exit_of(7, mark);
        reaper.table().exited(7, exit(2));
        assert_eq!(late.await, exit(2));
        reaper.table().exited(8, exit(3));
        assert_eq!(reaper.exit_of(8, mark).await, exit(3));
    }

    #[tokio::test]
    async fn unclaimed_exits_are_bounded() {
        let reaper = Reaper(Arc::default());
        for pid in 0..3 * UNCLAIMED as u32 {
            reaper.table().exited(pid, exit(0));
        }
        assert_eq!(reaper.table().unclaimed.len(), UNCLAIMED);
    }
}
