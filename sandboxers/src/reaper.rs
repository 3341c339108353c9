//! Child processes: starting them, and learning how they end.
//!
//! An OCI runtime exits after it has started a container, and the container's first process becomes the child of the nearest child
//! subreaper (`PR_SET_CHILD_SUBREAPER`, prctl(2)): this process, or a parent of it that tells what it sees (the keeper of
//! `kuasard`). One loop reaps every child; who cares for a pid asks for its exit. Pids are reused within minutes on a busy node,
//! so an exit also tells when its process started: take a [`Mark`] before the fork, and exits of processes older than it are not yours.
//!
//! Nobody else may wait for children: a second waiter would steal exits. `Command`s must not use `pre_exec`, `uid` or
//! `groups`, which make the standard library fork and wait by itself.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt,
    num::ParseIntError,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    process::{ChildStdin, Command, Stdio},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill},
    },
    time::{ClockId, clock_gettime},
    unistd::{self, Pid, SysconfVar, sysconf},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::timeout,
};
use tracing::warn;

use crate::{
    error::{Error, Result},
    orphans::Orphans,
    sys::{self, ChildState},
    types::Exit,
};

/// Exits that are remembered, asked for or not: whoever asks late finds what it means among them.
const REMEMBERED: usize = 2048;

/// What a helper program may print before the rest is thrown away, in bytes.
const OUTPUT_LIMIT: usize = 1 << 20;

/// The start of a process that nobody saw: descriptors had run out. No process starts with the kernel itself.
pub const UNSEEN: u64 = 0;

/// A point in time, for telling processes of the same pid apart: in clock ticks since boot, as the kernel tells a process's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Mark(u64);

impl Mark {
    fn now() -> Self {
        Self(ticks_since_boot(Duration::ZERO))
    }

    /// Clock ticks since boot.
    #[must_use]
    pub fn ticks(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Mark {
    type Err = ParseIntError;
    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        text.parse().map(Self)
    }
}

/// How a process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The pid it had.
    pub pid: u32,
    /// When it started, in clock ticks since boot (`/proc/<pid>/stat`, field 22); [`UNSEEN`] where that could not be read.
    pub start: u64,
    /// How and when it ended.
    pub exit: Exit,
}

impl Ended {
    /// When it ended, in clock ticks since boot.
    fn end(&self) -> u64 {
        ticks_since_boot(self.exit.at.elapsed().unwrap_or_default())
    }
}

/// Which process of a pid is meant.
#[derive(Clone, Copy, Debug)]
enum Which {
    /// One that was forked after this point.
    Since(Mark),
    /// The one that started then.
    Started(u64),
}

impl Which {
    fn is(self, ended: &Ended) -> bool {
        match (self, ended.start) {
            // No other process can have had the pid from the start of the one that is meant until its end.
            (Self::Since(Mark(start)) | Self::Started(start), UNSEEN) => ended.end() >= start,
            (Self::Since(mark), start) => start >= mark.0,
            (Self::Started(start), other) => start == other,
        }
    }
}

/// Starts children and hands out their exits. Clones share one table.
#[derive(Clone, Debug)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
    /// The subreaper that tells us what it sees, where that is another process.
    keeper: Option<u32>,
    begun: Mark,
    orphans: Orphans,
}

#[derive(Debug, Default)]
struct Table {
    ended: VecDeque<Ended>,
    claims: HashMap<u32, Vec<(Which, oneshot::Sender<Exit>)>>,
    /// Children that are continued when a signal stops them.
    commands: HashSet<u32>,
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
        Self::run_loop(None)
    }

    /// Starts the loop in a process whose parent, `keeper`, is the subreaper: what that sees goes to [`Self::hear`]. Once per process,
    /// inside a tokio runtime.
    ///
    /// # Errors
    /// When the runtime refuses, which is not expected.
    pub fn install_under(keeper: u32) -> Result<Self> {
        Self::run_loop(Some(keeper))
    }

    fn run_loop(keeper: Option<u32>) -> Result<Self> {
        let mut children = signal(SignalKind::child()).map_err(Error::failed("listen for SIGCHLD"))?;
        let reaper = Self { table: Arc::default(), keeper, begun: Mark::now(), orphans: Orphans::default() };
        let table = reaper.clone();
        tokio::spawn(async move {
            loop {
                reap().into_iter().for_each(|ended| table.hear(ended));
                // A call waits for these. A virtual machine may have been stopped to be looked at.
                for pid in table.commands() {
                    if let Some(program) = continue_stopped(pid) {
                        warn!(pid, program, "a program was stopped by a signal: it is continued");
                    }
                }
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// One that is only told, for tests; it began later than everything that runs.
    #[cfg(test)]
    pub(crate) fn under(keeper: u32) -> Self {
        Self { table: Arc::default(), keeper: Some(keeper), begun: Mark(Mark::now().0 + 1), orphans: Orphans::default() }
    }

    /// The parent that is the subreaper, where that is not this process.
    #[must_use]
    pub fn keeper(&self) -> Option<u32> {
        self.keeper
    }

    /// Exit statuses of processes that are neither this process's children nor the keeper's.
    #[must_use]
    pub fn orphans(&self) -> &Orphans {
        &self.orphans
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change of the table is complete before anything can panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an exit.
    pub fn hear(&self, ended: Ended) {
        self.table().heard(ended);
    }

    /// The present point in time; take it before something forks.
    ///
    /// A pid is not reused within the hundredth of a second in which all processes have the same start.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark::now()
    }

    /// Since when children are reaped here.
    #[must_use]
    pub fn begun(&self) -> Mark {
        self.begun
    }

    /// The exit of `pid`, a child or orphan of ours that was forked after `since`. Ready at once if it has ended already.
    #[must_use]
    pub fn exit_of(&self, pid: u32, since: Mark) -> ExitFuture {
        self.claim(pid, Which::Since(since))
    }

    /// The exit of the process `pid` that started at `start`, which must be a child or orphan of ours, or have been one.
    #[must_use]
    pub fn exit_of_started(&self, pid: u32, start: u64) -> ExitFuture {
        self.claim(pid, Which::Started(start))
    }

    /// How that process has ended, if that is known.
    #[must_use]
    pub fn known(&self, pid: u32, start: u64) -> Option<Exit> {
        self.table().find(pid, Which::Started(start)).map(|ended| ended.exit)
    }

    /// The end of the process `pid` that was forked after `since`, if it is known.
    #[must_use]
    pub fn ended_since(&self, pid: u32, since: Mark) -> Option<Ended> {
        self.table().find(pid, Which::Since(since))
    }

    fn claim(&self, pid: u32, which: Which) -> ExitFuture {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.table();
        match table.find(pid, which) {
            // The receiver is right here.
            Some(ended) => drop(sender.send(ended.exit)),
            None => table.claims.entry(pid).or_default().push((which, sender)),
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

    /// Has a child continued whenever a signal stops it, for as long as the result lives: one that is run to its end.
    #[must_use]
    pub fn keep_running(&self, pid: u32) -> KeptRunning {
        self.table().commands.insert(pid);
        // Before that.
        continue_stopped(pid);
        KeptRunning { reaper: self.clone(), pid }
    }

    fn commands(&self) -> Vec<u32> {
        self.table().commands.iter().copied().collect()
    }

    /// Runs a program to its end, with no input, and takes what it says. It is killed when it has not ended within `limit`.
    ///
    /// # Errors
    /// When it cannot be started or takes too long. A program that fails is not an error here; see [`Output::status`].
    pub async fn run(&self, command: &mut Command, limit: Duration) -> Result<Output> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child = self.spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
        let _running = self.keep_running(child.pid);
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

/// Clock ticks since boot, so long ago.
fn ticks_since_boot(ago: Duration) -> u64 {
    ticks(since_boot().saturating_sub(ago))
}

/// The time since boot.
pub(crate) fn since_boot() -> Duration {
    // It does not fail: the clock exists on every Linux.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// A time since boot in clock ticks, as the kernel tells a process's start.
pub(crate) fn ticks(since_boot: Duration) -> u64 {
    // It does not fail: the variable exists on every Linux.
    let ticks = sysconf(SysconfVar::CLK_TCK).ok().flatten().map_or(100, |ticks| u128::from(ticks.unsigned_abs()));
    u64::try_from(since_boot.as_nanos() * ticks / 1_000_000_000).unwrap_or(u64::MAX)
}

/// Reaps every child that has ended, whatever it has ended of.
#[must_use]
pub fn reap() -> Vec<Ended> {
    let mut all = Vec::new();
    loop {
        // First without reaping: the start is told only as long as it is a zombie.
        let ChildState { pid, status } = match sys::child_state(None, libc::WEXITED | libc::WNOWAIT) {
            Ok(Some(child)) => child,
            Ok(None) => return all,
            Err(error) => match error.raw_os_error() {
                Some(libc::ECHILD) => return all,
                Some(libc::EINTR) => continue,
                _ => {
                    warn!(%error, "cannot wait for children");
                    return all;
                }
            },
        };
        let start = start_of(pid).unwrap_or_else(|| {
            warn!(pid, "cannot read when a child that has ended was started");
            UNSEEN
        });
        let reaped = sys::child_state(Some(pid), libc::WEXITED);
        // It has ended, however this went; what is told twice does no harm.
        all.push(Ended { pid, start, exit: Exit::now(status) });
        match reaped {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => warn!(pid, "a child was reaped by somebody else"),
            Err(error) => {
                // It is the first to be seen the next time, too.
                warn!(%error, pid, "cannot reap a child");
                return all;
            }
        }
    }
}

/// A child that is continued when a signal stops it.
#[derive(Debug)]
pub struct KeptRunning {
    reaper: Reaper,
    pid: u32,
}

impl Drop for KeptRunning {
    fn drop(&mut self) {
        self.reaper.table().commands.remove(&self.pid);
    }
}

/// Continues a child if a signal has stopped it, and returns its name then.
pub fn continue_stopped(pid: u32) -> Option<String> {
    // An error means that there is no such child.
    sys::child_state(Some(pid), libc::WSTOPPED).ok().flatten()?;
    if let Err(error) = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGCONT) {
        warn!(%error, pid, "cannot continue a child that was stopped");
        return None;
    }
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(name.trim_end().to_owned())
}

/// When a process started, in clock ticks since boot (proc_pid_stat(5)); `None` when there is none, or it cannot be read.
#[must_use]
pub fn start_of(pid: u32) -> Option<u64> {
    let text = spare::read(&format!("/proc/{pid}/stat")).ok()?;
    // The name in the second field may hold anything, so count from its end, where the third begins.
    text[text.rfind(')')? + 1..].split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// A descriptor in reserve: what has to be read does not fail because descriptors have run out.
mod spare {
    use std::{
        fs::{self, File},
        io,
        sync::{Mutex, PoisonError},
    };

    static SPARE: Mutex<Option<File>> = Mutex::new(None);

    pub(super) fn read(path: &str) -> io::Result<String> {
        // One at a time: the place of the spare is for one.
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        let read = match fs::read_to_string(path) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) && spare.take().is_some() => {
                fs::read_to_string(path)
            }
            read => read,
        };
        if spare.is_none() {
            // Without it this works as long as there are others.
            *spare = File::open("/dev/null").ok();
        }
        read
    }
}

impl Table {
    /// The first that is meant: a later one has the pid again.
    fn find(&self, pid: u32, which: Which) -> Option<Ended> {
        self.ended.iter().find(|ended| ended.pid == pid && which.is(ended)).copied()
    }

    fn heard(&mut self, ended: Ended) {
        if let Some(claims) = self.claims.remove(&ended.pid) {
            let (meant, others): (Vec<_>, Vec<_>) = claims.into_iter().partition(|(which, _)| which.is(&ended));
            if !others.is_empty() {
                self.claims.insert(ended.pid, others);
            }
            for (_, claim) in meant {
                // Whoever asked may have gone away: fine.
                let _ = claim.send(ended.exit);
            }
        }
        if self.ended.len() == REMEMBERED {
            self.ended.pop_front();
        }
        self.ended.push_back(ended);
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
    use std::time::SystemTime;

    use super::*;

    fn ended(pid: u32, start: u64, status: u32) -> Ended {
        Ended { pid, start, exit: exit(status) }
    }

    fn exit(status: u32) -> Exit {
        Exit { status, at: std::time::UNIX_EPOCH }
    }

    fn reaper() -> Reaper {
        Reaper { table: Arc::default(), keeper: None, begun: Mark::now(), orphans: Orphans::default() }
    }

    #[tokio::test]
    async fn an_exit_of_an_earlier_process_of_that_pid_is_not_it() {
        let reaper = reaper();
        reaper.hear(ended(7, 10, 1));
        let late = reaper.exit_of(7, Mark(11));
        let exact = reaper.exit_of_started(7, 14);
        // Told late, too.
        reaper.hear(ended(7, 9, 2));
        reaper.hear(ended(7, 12, 3));
        reaper.hear(ended(7, 14, 4));
        assert_eq!((late.await, exact.await), (exit(3), exit(4)));
        reaper.hear(ended(8, 11, 5));
        assert_eq!(reaper.exit_of(8, Mark(11)).await, exit(5));
        assert_eq!((reaper.known(7, 11), reaper.known(7, 10), reaper.known(7, 10)), (None, Some(exit(1)), Some(exit(1))));
    }

    #[tokio::test]
    async fn an_exit_whose_start_was_not_seen_reaches_its_claim() {
        let reaper = reaper();
        let mark = reaper.mark();
        let before = Ended { pid: 7, start: UNSEEN, exit: Exit { status: 1, at: SystemTime::now() - Duration::from_secs(60) } };
        reaper.hear(before);
        let (since, started) = (reaper.exit_of(7, mark), reaper.exit_of_started(7, mark.0));
        assert_eq!(reaper.known(7, mark.0), None);
        let exit = Exit::now(2);
        reaper.hear(Ended { pid: 7, start: UNSEEN, exit });
        assert_eq!((since.await, started.await, reaper.exit_of(7, mark).await), (exit, exit, exit));
        assert_eq!(reaper.known(7, mark.0 + 60 * 100), None, "one that started after that end");
    }

    #[tokio::test]
    async fn exits_are_bounded() {
        let reaper = reaper();
        for pid in 0..3 * REMEMBERED as u32 {
            reaper.hear(ended(pid, 0, 0));
        }
        assert_eq!(reaper.table().ended.len(), REMEMBERED);
    }

    #[test]
    fn a_mark_is_in_the_kernels_ticks() {
        let reaper = reaper();
        let before = reaper.mark();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let start = start_of(child.id()).unwrap();
        assert!((before..=reaper.mark()).contains(&Mark(start)), "{before:?} {start}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
