//! A process of this node that we answer for, whoever its parent is.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::{
    io::Interest,
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{debug, warn};

use crate::{
    error::{Error, Result},
    orphans::{Known, Watch},
    reaper::{ExitFuture, Reaper, start_of},
    sys,
    types::Exit,
};

/// The status that is told when nobody knows the true one, as containerd does.
const UNKNOWN_STATUS: u32 = 255;

/// How long the parent of a dead process may take to reap it.
const REAPING: Duration = Duration::from_secs(2);

/// How long the keeper may take to tell of an exit that it has seen, on a node that swaps; one that it does not remember any more is
/// unknown then.
const TELLING: Duration = Duration::from_secs(60);

/// The same where a keeper before this one may have seen it: nobody will tell then.
const TELLING_OTHERS: Duration = Duration::from_secs(1);

/// How long an end that may be only a thread's waits for another, after the whole process has ended: the kernel sends that a moment later.
const ANOTHER: Duration = Duration::from_millis(250);

/// How often is looked for what a process that is being killed has started.
const ROUNDS: usize = 5;

/// How much of a command line is looked at, in bytes: more than we give to any program we start.
const COMMAND_LINE: usize = 32 << 10;

/// What tells a process from a later one of the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid.
    pub pid: u32,
    /// When it started, in clock ticks since boot (`/proc/<pid>/stat`, field 22).
    pub start: u64,
}

/// What is read from `/proc/<pid>/stat`.
struct Stat {
    parent: u32,
    group: u32,
    start: u64,
    zombie: bool,
    stopped: bool,
    /// As wait(2) gives it; only for a zombie, and 0 without the right to trace it.
    wait_status: i32,
}

/// The pids of this host.
pub fn pids() -> Result<impl Iterator<Item = Result<u32>>> {
    let entries = fs::read_dir("/proc").map_err(Error::io("list", "/proc"))?;
    let pid = |entry: io::Result<fs::DirEntry>| match entry {
        Ok(entry) => entry.file_name().to_str()?.parse().ok().map(Ok),
        Err(error) => Some(Err(Error::io("list", "/proc")(error))),
    };
    Ok(entries.filter_map(pid))
}

/// Whether a process has ended, reaped or not. One that cannot be looked at has not.
pub fn is_dead(pid: u32) -> bool {
    matches!(Stat::read(pid), Ok(None | Some(Stat { zombie: true, .. })))
}

/// Whether a signal has stopped a process (as SIGSTOP, not a debugger).
pub fn is_stopped(pid: u32) -> bool {
    matches!(Stat::read(pid), Ok(Some(Stat { stopped: true, .. })))
}

/// Whether an error in reading a file below `/proc/<pid>` means that the process has ended.
pub fn has_ended(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Shows every process of this host, by pid and the beginning of its command line, whose arguments end with a zero each. One that has just
/// ended is left out.
pub fn command_lines(mut visit: impl FnMut(u32, &[u8]) -> Result<()>) -> Result<()> {
    // There may be thousands, and this is done before a new daemon serves: one buffer, and no question for the size of what has none.
    let mut buffer = vec![0; COMMAND_LINE];
    for pid in pids()? {
        let pid = pid?;
        let path = format!("/proc/{pid}/cmdline");
        match File::open(&path).and_then(|mut file| file.read(&mut buffer)) {
            Ok(length) => visit(pid, &buffer[..length])?,
            Err(error) if has_ended(&error) => {}
            // It may be what is looked for.
            Err(error) => return Err(Error::io("read", path)(error)),
        }
    }
    Ok(())
}

impl Stat {
    fn read(pid: u32) -> Result<Option<Self>> {
        let path = PathBuf::from(format!("/proc/{pid}/stat"));
        match fs::read_to_string(&path) {
            Ok(text) => {
                Self::parse(&text).map(Some).ok_or_else(|| Error::invalid(path.display().to_string(), "it cannot be read"))
            }
            Err(error) if has_ended(&error) => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// proc_pid_stat(5). The name in the second field may hold anything, so count from its end.
    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).copied();
        Some(Self {
            parent: field(4)?.parse().ok()?,
            // -1 for one that is being reaped.
            group: field(5)?.parse::<i32>().ok()?.cast_unsigned(),
            start: field(22)?.parse().ok()?,
            zombie: matches!(field(3)?, "Z" | "X"),
            stopped: field(3)? == "T",
            wait_status: field(52).and_then(|status| status.parse().ok()).unwrap_or(0),
        })
    }
}

/// A process with its live descendants, and those of the process group that it leads.
fn tree(root: u32) -> Result<Vec<Identity>> {
    let mut all = Vec::new();
    for pid in pids()? {
        let pid = pid?;
        // Whatever cannot be read has just ended.
        all.extend(Stat::read(pid).ok().flatten().filter(|stat| !stat.zombie).map(|stat| (pid, stat)));
    }
    let mut within = BTreeSet::from([root]);
    loop {
        let below = |(pid, stat): &&(u32, Stat)| !within.contains(pid) && (within.contains(&stat.parent) || stat.group == root);
        let more: Vec<u32> = all.iter().filter(below).map(|(pid, _)| *pid).collect();
        if more.is_empty() {
            break;
        }
        within.extend(more);
    }
    let identity = |(pid, stat): (u32, Stat)| Identity { pid, start: stat.start };
    Ok(all.into_iter().filter(|(pid, _)| within.contains(pid)).map(identity).collect())
}

/// A process that is held by a pidfd, so a signal never reaches another.
#[derive(Debug)]
pub struct Tracked {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    parent: u32,
}

impl Tracked {
    /// Takes hold of a process; `None` when there is none of that pid.
    pub fn open(pid: u32) -> Result<Option<Self>> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            // The others: it is being reaped, or the number is that of a thread now.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::NOENT | rustix::io::Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(Error::failed(format!("open process {pid}"))(io::Error::from(errno))),
        };
        let Some(stat) = Stat::read(pid)? else { return Ok(None) };
        let identity = Identity { pid, start: stat.start };
        Ok(Some(Self { identity, pidfd: Arc::new(pidfd), parent: stat.parent }))
    }

    /// Takes hold of a process again; `None` when it is gone, whoever has its pid now, or dead.
    pub fn find(identity: Identity) -> Result<Option<Self>> {
        Ok(Self::open(identity.pid)?.filter(|found| found.identity == identity))
    }

    /// What tells it from others.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Sends a signal; false when the process has ended.
    pub fn signal(&self, signal: i32) -> Result<bool> {
        match sys::send_signal(self.pidfd.as_fd(), signal) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::ESRCH) => Ok(false),
                Some(libc::EINVAL) => Err(Error::invalid("signal", format!("{signal} is no signal"))),
                _ => Err(Error::failed(format!("send signal {signal} to process {}", self.identity.pid))(error)),
            },
        }
    }

    /// Kills it with all that it has started and that has not left it: its descendants, and the process group that it leads.
    pub fn kill_tree(&self) -> Result<()> {
        let mut killed = BTreeSet::new();
        // What is forked meanwhile is found in another round.
        for _ in 0..ROUNDS {
            let found = tree(self.identity.pid)?;
            // Before those below it, or it would replace them.
            self.signal(libc::SIGKILL)?;
            let mut more = false;
            for identity in found.into_iter().filter(|identity| identity.pid != self.identity.pid) {
                if killed.insert((identity.pid, identity.start))
                    && let Some(process) = Self::find(identity)?
                {
                    more = true;
                    process.signal(libc::SIGKILL)?;
                }
            }
            if !more {
                break;
            }
        }
        Ok(())
    }

    /// Waits until it has ended.
    pub async fn ended(&self) -> Result<()> {
        let failed = || Error::failed(format!("watch process {}", self.identity.pid));
        // A descriptor of its own: epoll takes each only once, and several may wait for the same process.
        let pidfd = self.pidfd.try_clone().and_then(|fd| sys::watch(fd, Interest::READABLE)).map_err(failed())?;
        pidfd.readable().await.map_err(failed())?.retain_ready();
        Ok(())
    }

    /// How a process of an earlier daemon ends. The reaper is told of a child of ours or of our keeper's; another's status is in its pidfd
    /// once that one's parent has reaped it, or comes with the kernel's [process events](crate::orphans).
    pub async fn exit(&self, reaper: &Reaper) -> Exit {
        let Some(watch) = self.watch(reaper) else {
            return reaper.exit_of_started(self.identity.pid, self.identity.start).await;
        };
        if let Err(error) = self.ended().await {
            warn!(error = error.report(), "lost track of a process");
            return Exit::now(UNKNOWN_STATUS);
        }
        let at = Exit::now(UNKNOWN_STATUS).at;
        Exit { status: self.status(&watch).await.unwrap_or(UNKNOWN_STATUS), at }
    }

    /// Watches for its exit; `None` for a child of ours or of our keeper's.
    fn watch(&self, reaper: &Reaper) -> Option<Watch> {
        let is_ours = self.parent == std::process::id() || Some(self.parent) == reaper.keeper();
        (!is_ours).then(|| reaper.orphans().watch(self.identity, Some(self.pidfd.clone())))
    }

    /// The exit status of a process that has ended, where the kernel tells.
    async fn status(&self, watch: &Watch) -> Option<u32> {
        let ended = Instant::now();
        let deadline = ended + REAPING;
        let mut news = watch.news();
        loop {
            news.mark_unchanged();
            let told = match watch.is_by_events() {
                false => sys::wait_status(self.pidfd.as_fd()),
                true => Err(io::ErrorKind::Unsupported.into()),
            };
            if let Ok(Some(status)) = told {
                return Some(shell_status(status));
            }
            let known = watch.known();
            if let Some(Known::Certain(exit)) = known {
                return Some(exit.status);
            }
            // Not reaped yet; the kernel then tells those who may trace it, and 0 to others.
            let stat = Stat::read(self.identity.pid).ok().flatten();
            let dead = stat.filter(|stat| stat.zombie && stat.start == self.identity.start);
            if let Some(dead) = &dead
                && dead.wait_status != 0
            {
                return Some(shell_status(dead.wait_status));
            }
            let limit = known.map_or(deadline, |_| ended + ANOTHER);
            if watch.is_subscribed() && timeout_at(limit, news.changed()).await.is_ok_and(|changed| changed.is_ok()) {
                continue;
            }
            if let Some(Known::Likely(exit)) = known {
                return Some(exit.status);
            }
            dead?;
            match told {
                // A kernel before 6.15.
                Err(error) => {
                    debug!(%error, "pidfds tell no exit status here");
                    return Some(0);
                }
                Ok(_) if Instant::now() >= deadline => return Some(0),
                // The event for being reaped comes on the same readiness as the one for the end, which is level and already there.
                Ok(_) => sleep(Duration::from_millis(5)).await,
            }
        }
    }
}

impl AsFd for Tracked {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// A wait status as a shell tells it.
pub(crate) fn shell_status(status: i32) -> u32 {
    match status & 0x7f {
        0 => (status >> 8 & 0xff).unsigned_abs(),
        signal => 128 + signal.unsigned_abs(),
    }
}

/// The end of something, told to all who ask. It never changes once it is set.
#[derive(Debug)]
pub struct Ending(watch::Sender<Option<Exit>>);

impl Ending {
    /// One that has not come.
    #[must_use]
    pub fn pending() -> Self {
        Self(watch::channel(None).0)
    }

    /// Tells it, once; later ones do not count.
    pub fn tell(&self, exit: Exit) {
        self.0.send_if_modified(|known| {
            let news = known.is_none();
            known.get_or_insert(exit);
            news
        });
    }

    /// The end, if it has come.
    #[must_use]
    pub fn known(&self) -> Option<Exit> {
        *self.0.borrow()
    }

    /// Waits for it.
    pub async fn wait(&self) -> Exit {
        match self.0.subscribe().wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or_else(|| Exit::now(UNKNOWN_STATUS)),
            // `self` holds the sender, so it is never closed.
            Err(_) => Exit::now(UNKNOWN_STATUS),
        }
    }
}

/// The exit of a process we have started, or have taken over.
pub enum Exiting {
    /// A child of this daemon.
    Ours(ExitFuture),
    /// It has ended already.
    Known(Exit),
    /// It runs, or has not been reaped. Where it is neither our child nor the keeper's, its exit is watched for.
    Adopted(Reaper, Option<Watch>),
    /// It has ended, and who has seen that may not have told yet, for so long at most.
    Late(ExitFuture, Duration, Option<Watch>),
}

impl Exiting {
    /// The exit of a process that has been taken over; `process` is `None` when it has ended.
    pub fn adopted(identity: Identity, process: Option<&Tracked>, reaper: &Reaper) -> Self {
        match (process, reaper.known(identity.pid, identity.start)) {
            (_, Some(exit)) => Self::Known(exit),
            (Some(process), None) => Self::of_running(process, reaper),
            (None, None) => match Self::late(reaper.exit_of_started(identity.pid, identity.start), identity.start, reaper) {
                late @ Self::Late(_, TELLING, _) => late,
                // What an earlier daemon has recorded cannot be younger than this one: there never was such a process.
                Self::Ours(exit) | Self::Late(exit, ..) => {
                    Self::Late(exit, TELLING_OTHERS, Some(reaper.orphans().watch(identity, None)))
                }
                late => late,
            },
        }
    }

    /// The exit of a process that is held.
    #[must_use]
    pub fn of_running(process: &Tracked, reaper: &Reaper) -> Self {
        Self::Adopted(reaper.clone(), process.watch(reaper))
    }

    /// The exit of a process that was started at `start` or later, and has been reaped. What this daemon has started is told for sure: who
    /// has reaped it still lives.
    pub fn late(exit: ExitFuture, start: u64, reaper: &Reaper) -> Self {
        if start >= reaper.begun().ticks() {
            return Self::Ours(exit);
        }
        // Without a keeper, the one that has seen it end is gone.
        let seen = reaper.keeper().is_some_and(|keeper| start_of(keeper).is_none_or(|keeper| keeper <= start));
        Self::Late(exit, if seen { TELLING } else { TELLING_OTHERS }, None)
    }
}

impl Exiting {
    /// Waits for it; `process` is what is held of it.
    pub async fn of(self, process: Option<&Tracked>) -> Exit {
        match (self, process) {
            (Self::Ours(exit), _) => exit.await,
            (Self::Known(exit), _) => exit,
            // The watch lasts until then.
            (Self::Adopted(reaper, _watch), Some(process)) => process.exit(&reaper).await,
            // Unknown when it ended while no daemon ran at all.
            (Self::Late(exit, limit, watch), _) => {
                let told = async {
                    match watch {
                        None => exit.await,
                        Some(watch) => tokio::select! {
                            exit = exit => exit,
                            exit = watch.of_reaped() => exit,
                        },
                    }
                };
                timeout(limit, told).await.unwrap_or_else(|_| Exit::now(UNKNOWN_STATUS))
            }
            (Self::Adopted(..), None) => Exit::now(UNKNOWN_STATUS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_confuse() {
        let text = "77 (a) R 1 (b)) Z 9 78 77 0 -1 4194564 0 0 0 0 0 0 0 0 20 0 1 0 4711 0 0 1 0 0 0 0 0 0 0 0 0 0 0 0 17 0 0 0 0 0 0 0 0 0 0 0 0 0 256\n";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.parent, stat.group, stat.start, stat.zombie, shell_status(stat.wait_status)), (9, 78, 4711, true, 1));
        let reaped = text.replace("Z 9 77 77", "X 0 -1 -1");
        assert!(Stat::parse(&reaped).is_some_and(|stat| stat.zombie && stat.start == 4711));
        assert!(Stat::parse("").is_none());
    }

    #[test]
    fn statuses() {
        assert_eq!([0, 256, 0xff00, 9, 0x8b].map(shell_status), [0, 1, 255, 137, 139]);
    }

    #[test]
    fn another_process_of_the_pid_is_not_it() {
        let ours = Tracked::open(std::process::id()).unwrap().unwrap();
        assert!(ours.signal(0).unwrap());
        assert!(matches!(ours.signal(1000), Err(Error::Invalid { .. })));
        assert!(Tracked::find(ours.identity()).unwrap().is_some());
        assert!(Tracked::find(Identity { start: ours.identity().start + 1, ..ours.identity() }).unwrap().is_none());
        assert!(Tracked::open(0).unwrap().is_none());
        assert!(Tracked::open(u32::MAX).unwrap().is_none());
    }

    #[test]
    fn what_this_daemon_has_started_is_waited_for() {
        let reaper = Reaper::under(std::process::id());
        let limit = |start: u64| match Exiting::late(reaper.exit_of_started(7, start), start, &reaper) {
            Exiting::Late(_, limit, _) => Some(limit),
            _ => None,
        };
        let (begun, keeper) = (reaper.begun().ticks(), start_of(std::process::id()).unwrap());
        assert_eq!([begun + 1, keeper, keeper - 1].map(limit), [None, Some(TELLING), Some(TELLING_OTHERS)]);
    }

    #[tokio::test]
    async fn an_ending_is_final() {
        let ending = Ending::pending();
        assert_eq!(ending.known(), None);
        ending.tell(Exit::now(3));
        ending.tell(Exit::now(4));
        assert_eq!(ending.wait().await.status, 3);
    }
}
