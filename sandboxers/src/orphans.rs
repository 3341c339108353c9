//! Exit statuses of processes that are neither our children nor the keeper's.
//!
//! Processes that an earlier keeper has started become children of the host's init when that keeper dies. Linux 6.15 keeps the status of a
//! reaped process in its pidfds. Before, only the parent is told, and those that subscribe to [process events]: a subscription is
//! made before the processes are looked for, and lives as long as there are any.
//!
//! ```text
//!   worker starts ─▶ begin: subscribe ─▶ processes are found ─▶ recovered ─▶ last orphan ends: unsubscribe
//!                       ▲ parked socket                                              │
//!                       └──────────── keeper, systemd: the queue goes on ◀───────────┘ worker or keeper ends before
//! ```
//!
//! The socket is parked, so that what ends between two workers waits in its queue, and under systemd also what ends between two keepers.
//!
//! What the kernel sends is an end of a thread. The leader's is not always the process's: when it ends before the other threads, or one of
//! them calls execve(2), the leader's status is 0 and the process goes on. Hence [`Known::Likely`].
//!
//! [process events]: crate::procevents

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
    task::{JoinHandle, yield_now},
};
use tracing::{debug, warn};

use crate::{
    error::{Error, Result},
    failpoint,
    fdstore::{FdStore, Held},
    process::{Identity, shell_status},
    procevents::{ProcessEvents, ThreadExit},
    reaper::{since_boot, ticks},
    sys,
    types::Exit,
};

/// The name under which the subscription is parked.
const NAME: &str = "process-events";

/// What fails where it is refused.
const SUBSCRIBE: &str = "subscribe to process events";

/// Exits that are remembered while it is not known yet whose matter: as many as the socket has room for, twice.
const REMEMBERED: usize = 8192;

/// Exits that are read at a time, before others get the lock.
const BATCH: usize = 1024;

/// How often the log says at most that exits were lost.
const LOST_LOGGED: Duration = Duration::from_secs(60);

/// Where the statuses come from. Clones share it.
#[derive(Clone, Debug)]
pub struct Orphans(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// Changed with each exit that is of interest.
    news: watch::Sender<()>,
}

/// The means, chosen once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Source {
    /// As far as pidfds keep the status, which has not been tried yet.
    #[default]
    Unasked,
    /// The pidfds keep the status.
    Pidfds,
    /// Process events.
    Events,
}

#[derive(Debug, Default)]
struct State {
    source: Source,
    store: FdStore,
    /// Which processes matter is not known yet.
    is_recovering: bool,
    subscription: Option<Subscription>,
    watched: HashMap<u32, Watched>,
    /// In the order in which they came.
    exits: VecDeque<Recorded>,
    /// Some were lost. More are, without a word of the kernel's, until all that there is has been read.
    is_losing: bool,
    /// When the last of them may have come, since boot.
    lost: Option<Duration>,
    lost_logged: Option<Duration>,
    refused_logged: bool,
}

#[derive(Debug)]
struct Subscription {
    events: Arc<ProcessEvents>,
    reader: JoinHandle<()>,
    /// `None` where it could not be parked, or is the next process's.
    parked: Option<Held>,
    is_handed_off: bool,
}

/// A process whose exit matters.
#[derive(Debug)]
struct Watched {
    /// How many wait for it.
    count: usize,
    /// `None` when it had been reaped before.
    pidfd: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Recorded {
    exit: ThreadExit,
    /// The whole process had ended when it was read.
    is_final: bool,
}

/// What is known of an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It is the process's.
    Certain(Exit),
    /// It may be that of a thread whose process has gone on, and another may be on its way.
    Likely(Exit),
}

/// An exit that matters, from before the process was looked at until its status is known.
#[derive(Debug)]
pub struct Watch {
    orphans: Orphans,
    identity: Identity,
    pidfd: Option<Arc<OwnedFd>>,
    is_by_events: bool,
    /// It is among those that exits are kept for.
    is_counted: bool,
}

impl Default for Orphans {
    fn default() -> Self {
        Self(Arc::new(Inner { state: Mutex::default(), news: watch::channel(()).0 }))
    }
}

impl Orphans {
    /// Chooses the source, and subscribes if it has to be process events. To be called before any process is looked for; what an earlier
    /// process has parked in `store` is taken over. [`Self::recovered`] says when all have been found.
    ///
    /// Without it, and where the subscription is refused, statuses are known only as far as the kernel shows them on a process that has not been
    /// reaped yet.
    pub fn begin(&self, store: &FdStore) {
        let keep = sys::pidfds_keep_statuses().unwrap_or_else(|error| {
            debug!(%error, "cannot try out whether pidfds keep exit statuses");
            false
        });
        let source = if keep && !failpoint::has_old_pidfds() { Source::Pidfds } else { Source::Events };
        self.begin_with(source, store);
    }

    /// The same, with process events whatever the kernel can do.
    #[cfg(any(test, feature = "testing"))]
    pub fn begin_with_events(&self, store: &FdStore) {
        self.begin_with(Source::Events, store);
    }

    fn begin_with(&self, source: Source, store: &FdStore) {
        let mut state = self.state();
        state.source = source;
        state.store = store.clone();
        state.is_recovering = true;
        let subscribed = match source {
            // No pidfd tells of what has ended since the daemon before was stopped.
            Source::Pidfds => self.take_over(&mut state).map(drop),
            Source::Events => self.subscribe(&mut state),
            Source::Unasked => Ok(()),
        };
        if let Err(error) = subscribed {
            // Of interest only with processes that are not our children.
            debug!(error = error.report(), "no process events");
        }
    }

    /// All processes that this one answers for have been found, so that others do not matter.
    pub fn recovered(&self) {
        let mut state = self.state();
        state.is_recovering = false;
        let State { exits, watched, .. } = &mut *state;
        exits.retain(|recorded| watched.contains_key(&recorded.exit.process));
        state.end_if_idle();
    }

    /// Leaves a subscription to the next process, whatever becomes of this one: its keeper is about to end, and its children with it become
    /// orphans. To be called last.
    pub fn hand_off(&self) {
        let mut state = self.state();
        if state.source == Source::Unasked {
            return;
        }
        if let Err(error) = self.subscribe(&mut state) {
            debug!(error = error.report(), "no process events for the next daemon");
        }
        // What this process reads from now on the next does not get.
        if let Some(mut subscription) = state.subscription.take()
            && let Some(parked) = subscription.parked.take()
        {
            parked.keep();
            subscription.is_handed_off = true;
        }
    }

    /// Watches for an exit; `pidfd` is `None` when the process has been reaped. It is known only what comes while this or
    /// [the recovery](Self::begin) lasts.
    pub(crate) fn watch(&self, identity: Identity, pidfd: Option<Arc<OwnedFd>>) -> Watch {
        let mut state = self.state();
        let is_by_events = state.source == Source::Events;
        let is_counted = is_by_events || state.subscription.is_some();
        if is_counted {
            let watched = state.watched.entry(identity.pid).or_insert(Watched { count: 0, pidfd: None });
            watched.count += 1;
            if pidfd.is_some() {
                watched.pidfd.clone_from(&pidfd);
            }
            if is_by_events
                && let Err(error) = self.subscribe(&mut state)
                && !std::mem::replace(&mut state.refused_logged, true)
            {
                let error = error.report();
                warn!(error, "no process events: exit statuses of what an earlier daemon has started may be unknown (255)");
            }
        }
        Watch { orphans: self.clone(), identity, pidfd, is_by_events, is_counted }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of it is complete before anything can panic.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Subscribes, unless that is done.
    fn subscribe(&self, state: &mut State) -> Result<()> {
        if state.subscription.is_some() || self.take_over(state)? {
            return Ok(());
        }
        let events = ProcessEvents::subscribe().map_err(Error::failed(SUBSCRIBE))?;
        let parked = state.store.leave(NAME.to_owned(), &[events.fd()]);
        let parked =
            parked.inspect_err(|error| debug!(error = error.report(), "what ends between two workers will not be seen"));
        self.read(state, events, parked.ok())
    }

    /// Takes over the subscription that is parked; false when there is none.
    fn take_over(&self, state: &mut State) -> Result<bool> {
        let parked = state.store.take(NAME).and_then(|(mut descriptors, held)| Some((descriptors.pop()?, held)));
        let Some((socket, held)) = parked else { return Ok(false) };
        self.read(state, ProcessEvents::inherit(socket), Some(held))?;
        Ok(true)
    }

    fn read(&self, state: &mut State, events: ProcessEvents, parked: Option<Held>) -> Result<()> {
        // A descriptor of its own, which the reader closes when it ends.
        let socket = events.fd().try_clone_to_owned().and_then(|fd| sys::watch(fd, Interest::READABLE));
        let reader = tokio::spawn(read(Arc::downgrade(&self.0), socket.map_err(Error::failed(SUBSCRIBE))?));
        state.subscription = Some(Subscription { events: Arc::new(events), reader, parked, is_handed_off: false });
        Ok(())
    }
}

/// Reads exits as they come, so that the socket's room lasts.
async fn read(inner: Weak<Inner>, socket: AsyncFd<OwnedFd>) {
    loop {
        match socket.readable().await {
            // Before it is read: what comes after makes it ready again.
            Ok(mut ready) => ready.clear_ready(),
            Err(error) => return warn!(%error, "cannot wait for process events"),
        }
        loop {
            let Some(inner) = inner.upgrade() else { return };
            let Drained { more, news } = inner.state.lock().unwrap_or_else(PoisonError::into_inner).drain();
            if news {
                inner.news.send_replace(());
            }
            if !more {
                break;
            }
            drop(inner);
            yield_now().await;
        }
    }
}

struct Drained {
    /// There may be more to read.
    more: bool,
    /// Something that matters was among them.
    news: bool,
}

impl State {
    /// Reads what has come.
    fn drain(&mut self) -> Drained {
        let Some(events) = self.subscription.as_ref().map(|subscription| subscription.events.clone()) else {
            return Drained { more: false, news: false };
        };
        let mut news = false;
        for _ in 0..BATCH {
            match events.next() {
                Ok(Some(exit)) => news |= self.record(exit),
                Ok(None) => {
                    if std::mem::take(&mut self.is_losing) {
                        self.lost = Some(since_boot());
                    }
                    return Drained { more: false, news };
                }
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory => self.note_loss(),
                Err(error) => {
                    warn!(%error, "cannot read process events: exit statuses may be unknown (255)");
                    self.subscription = None;
                    return Drained { more: false, news };
                }
            }
        }
        Drained { more: true, news }
    }

    fn record(&mut self, exit: ThreadExit) -> bool {
        let watched = self.watched.get(&exit.process);
        if watched.is_none() && !self.is_recovering {
            return false;
        }
        let is_final = watched.and_then(|watched| watched.pidfd.as_ref()).is_some_and(|pidfd| has_ended(pidfd));
        let news = watched.is_some();
        if self.exits.len() == REMEMBERED {
            // Some other process's, as nearly all are. What is watched is told at once.
            self.exits.pop_front();
        }
        self.exits.push_back(Recorded { exit, is_final });
        news
    }

    fn note_loss(&mut self) {
        let now = since_boot();
        self.is_losing = true;
        if self.lost_logged.is_none_or(|logged| now.saturating_sub(logged) >= LOST_LOGGED) {
            self.lost_logged = Some(now);
            warn!("process events were lost: some exit statuses may be unknown (255)");
        }
    }

    /// What has come of a process, if it is enough to tell.
    fn known(&self, identity: Identity, is_reaped: bool) -> Option<Known> {
        // Only its own can be younger than its start: the pid is not another's before it has been reaped.
        let of_it = |recorded: &&Recorded| recorded.exit.process == identity.pid && ticks(recorded.exit.at) >= identity.start;
        let mut all = self.exits.iter().filter(of_it);
        let last = all.next_back()?;
        let exit = Exit { status: shell_status(last.exit.wait_status), at: time_of(last.exit.at) };
        let was_lost = self.is_losing || self.lost.is_some_and(|lost| lost >= last.exit.at);
        if is_reaped {
            // By now others may have had the pid; and the last of its own may be among the lost.
            let agree = all.all(|other| other.exit.wait_status == last.exit.wait_status);
            return (agree && !was_lost).then_some(Known::Certain(exit));
        }
        match last.is_final {
            true => Some(Known::Certain(exit)),
            false if was_lost => None,
            false => Some(Known::Likely(exit)),
        }
    }

    fn end_if_idle(&mut self) {
        if self.watched.is_empty() && !self.is_recovering {
            self.subscription = None;
            self.exits.clear();
        }
    }
}

/// Whether all threads of a process have ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(pidfd, PollFlags::IN)];
    loop {
        match poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Err(Errno::INTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}

fn time_of(at: Duration) -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(since_boot().saturating_sub(at)).unwrap_or(now)
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.reader.abort();
        if self.is_handed_off {
            return;
        }
        // First, or the next process could take over one that has ended.
        drop(self.parked.take());
        self.events.end();
    }
}

impl Watch {
    /// Whether the kernel tells statuses by process events only.
    pub(crate) fn is_by_events(&self) -> bool {
        self.is_by_events
    }

    /// Whether exits come.
    pub(crate) fn is_subscribed(&self) -> bool {
        self.orphans.state().subscription.is_some()
    }

    /// What has come until now.
    pub(crate) fn known(&self) -> Option<Known> {
        let mut state = self.orphans.state();
        loop {
            let Drained { more, news } = state.drain();
            if news {
                self.orphans.0.news.send_replace(());
            }
            if !more {
                break;
            }
        }
        state.known(self.identity, self.pidfd.is_none())
    }

    /// The exit of a process that has been reaped before this was made; pending when it does not come.
    pub(crate) async fn of_reaped(&self) -> Exit {
        let mut news = self.news();
        loop {
            news.mark_unchanged();
            if let Some(Known::Certain(exit)) = self.known() {
                return exit;
            }
            if news.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Changes with each exit that matters to anybody.
    pub(crate) fn news(&self) -> watch::Receiver<()> {
        self.orphans.0.news.subscribe()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.is_counted {
            return;
        }
        let pid = self.identity.pid;
        let mut state = self.orphans.state();
        if let Some(watched) = state.watched.get_mut(&pid) {
            watched.count -= 1;
            if watched.count > 0 {
                return;
            }
        }
        state.watched.remove(&pid);
        if !state.is_recovering {
            state.exits.retain(|recorded| recorded.exit.process != pid);
        }
        state.end_if_idle();
    }
}
