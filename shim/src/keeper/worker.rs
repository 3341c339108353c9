//! The worker's end of the socket to the keeper.

use std::{
    collections::{BTreeMap, VecDeque},
    env, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::parent_id,
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kuasar_sandboxers::{
    fdstore::{FdStore, Holder},
    process,
    reaper::{Ended, Reaper},
    watch,
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill},
    },
    unistd::Pid,
};
use rustix::net::{RecvFlags, SendFlags};
use tokio::{
    io::{Interest, unix::AsyncFd},
    select,
    sync::{Notify, mpsc::UnboundedSender},
    time::sleep,
};
use tracing::{error, warn};

use super::{
    signals,
    wire::{self, Message, Outcome, Received},
};
use crate::sys;

/// The environment variable that makes `kuasard` a worker: the number of the socket's descriptor.
pub const VARIABLE: &str = "KUASAR_KEEPER";

/// Messages that wait for a keeper which takes none, as one that is stopped. Beyond, they are refused.
const QUEUE: usize = 4096;

/// How long to wait before asking again for what came without its descriptors, or sending what the kernel had no memory for.
const AGAIN: Duration = Duration::from_millis(100);

/// How often to look whether the keeper is stopped: it cannot be asked then, and calls that need it wait.
const LOOK: Duration = Duration::from_secs(1);

/// The keeper, as the worker sees it. Clones share the socket.
#[derive(Clone, Debug)]
pub struct Keeper(Arc<Link>);

#[derive(Debug)]
struct Link {
    socket: OwnedFd,
    /// What the socket did not take, in order.
    queue: Mutex<VecDeque<(Message, Vec<OwnedFd>)>>,
    /// Told when there is something in it.
    queued: Notify,
}

/// What is parked under a name.
#[derive(Debug)]
pub struct Parked {
    /// The name.
    pub name: String,
    /// In the order in which they were parked.
    pub descriptors: Vec<OwnedFd>,
}

/// How the names of what sandboxes leave with the keeper begin.
const HELD: &str = "held/";

/// What the keeper hands to a new worker.
#[derive(Debug)]
pub struct Inheritance {
    /// The keeper.
    pub keeper: Keeper,
    /// What workers before this one have parked, by name.
    pub parked: BTreeMap<String, Vec<OwnedFd>>,
    /// Processes that have ended.
    pub exits: Vec<Ended>,
    /// Whether this is the worker of a new program, which is to be replaced by one of the old if it does not get ready.
    pub upgrade: bool,
    /// What became of the last upgrade.
    pub upgraded: Option<Outcome>,
    /// Connections that came without their descriptors.
    pub cut: Vec<String>,
}

/// Whether a keeper has started this process.
#[must_use]
pub fn is_worker() -> bool {
    env::var_os(VARIABLE).is_some()
}

/// What the keeper tells a new worker; returns when all is told.
///
/// To be called once, while there is one thread.
///
/// # Errors
/// When the variable is not what a keeper sets, or the keeper is gone.
pub fn inherit() -> io::Result<Inheritance> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{VARIABLE} is for kuasard's own use: unset it"));
    let number = env::var(VARIABLE).ok().and_then(|number| number.parse().ok()).ok_or_else(invalid)?;
    let socket = sys::take_inherited(VARIABLE, number).map_err(|_| invalid())?;
    // The keeper blocks the signals it reads, and a child inherits that. Some may have come already.
    sys::say_that_ignored(signals::harmless());
    SigSet::all().thread_unblock()?;
    // Its successor's worker takes over what there is; two at the same work would spoil it. A keeper that is gone already shows below.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let keeper = Keeper::at(socket);
    // Whatever link to the program it was started by.
    prctl::set_name(c"kuasard")?;
    let (mut parked, mut exits, mut upgrade, mut upgraded, mut cut) = (BTreeMap::new(), Vec::new(), false, None, Vec::new());
    loop {
        let received = match wire::receive(&keeper.0.socket, RecvFlags::empty()) {
            Ok(received) => received.ok_or_else(gone)?,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                eprintln!("kuasard: from the keeper: {error}");
                continue;
            }
            Err(error) => return Err(error),
        };
        match received.message {
            // A connection can wait for its turn; without the others nothing works.
            Message::Park(name) if received.is_cut && is_connection(&name) => cut.push(name),
            Message::Park(name) if received.is_cut => {
                let why =
                    format!("descriptors have run out, so what the keeper holds as {name} cannot be taken: raise the limit");
                return Err(io::Error::other(why));
            }
            Message::Park(name) => drop(parked.insert(name, received.descriptors)),
            Message::Exit(ended) => exits.push(ended),
            Message::Upgrade { .. } => upgrade = true,
            Message::Upgraded(outcome) => upgraded = Some(outcome),
            Message::Complete => return Ok(Inheritance { keeper, parked, exits, upgrade, upgraded, cut }),
            _ => {}
        }
    }
}

/// Whether that is the name of a connection: its listening socket's and a number. What sandboxes leave has a prefix of its own.
fn is_connection(name: &str) -> bool {
    !name.starts_with(HELD) && name.contains('/')
}

impl Inheritance {
    /// What sandboxes have left with the keeper, taken out of what is parked.
    #[must_use]
    pub fn fd_store(&mut self) -> FdStore {
        let parked = std::mem::take(&mut self.parked).into_iter();
        let (held, others): (Vec<_>, Vec<_>) = parked.partition(|(name, _)| name.starts_with(HELD));
        self.parked = others.into_iter().collect();
        let held = held.into_iter().filter_map(|(name, descriptors)| Some((name.strip_prefix(HELD)?.to_owned(), descriptors)));
        FdStore::new(self.keeper.clone(), held.collect())
    }
}

impl Holder for Keeper {
    fn hold(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.park(&format!("{HELD}{name}"), descriptors)
    }

    fn release(&self, name: &str) -> io::Result<()> {
        self.drop_parked(&format!("{HELD}{name}"))
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the keeper is gone")
}

impl Keeper {
    /// Whoever is at the other end of `socket`.
    pub(crate) fn at(socket: OwnedFd) -> Self {
        Self(Arc::new(Link { socket, queue: Mutex::default(), queued: Notify::new() }))
    }

    /// Its pid.
    #[must_use]
    pub fn pid() -> u32 {
        parent_id()
    }

    /// Leaves copies of descriptors with the keeper under a name, in place of what was.
    ///
    /// # Errors
    /// When the keeper is gone, or takes nothing any more, or descriptors have run out while it takes nothing.
    pub fn park(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.tell(&Message::Park(name.to_owned()), descriptors)
    }

    /// Lets the keeper close what is parked under a name.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn drop_parked(&self, name: &str) -> io::Result<()> {
        self.tell(&Message::Drop(name.to_owned()), &[])
    }

    /// Lets the keeper accept on the listening socket parked under a name.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn accept(&self, name: &str) -> io::Result<()> {
        self.tell(&Message::Accept(name.to_owned()), &[])
    }

    /// Says that calls are answered from now on.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn ready(&self) -> io::Result<()> {
        self.tell(&Message::Ready, &[])
    }

    /// Asks to be replaced by a program once this worker has left.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn upgrade(&self, id: &str, binary: &Path) -> io::Result<()> {
        self.tell(&Message::Upgrade { id: id.to_owned(), binary: binary.to_owned() }, &[])
    }

    /// Says why this worker is about to end instead of getting ready.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn failed(&self, why: &str) -> io::Result<()> {
        self.tell(&Message::failed(why), &[])
    }

    /// Says that the worker still works.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn alive(&self) -> io::Result<()> {
        self.tell(&Message::Alive, &[])
    }

    /// Sends a message, without waiting: callers answer calls meanwhile.
    fn tell(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut queue = self.queue();
        if queue.is_empty() {
            match wire::send(&self.0.socket, message, descriptors, SendFlags::DONTWAIT) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory) => {}
                done => return done,
            }
        }
        if queue.len() >= QUEUE {
            return Err(io::Error::new(io::ErrorKind::WouldBlock, "the keeper takes nothing any more"));
        }
        let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        queue.push_back((message.clone(), copies));
        self.0.queued.notify_one();
        Ok(())
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<(Message, Vec<OwnedFd>)>> {
        // Every change of it is complete before anything can panic.
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what has not been taken; `WouldBlock` or `OutOfMemory` when there is more.
    fn send_queued(&self) -> io::Result<()> {
        let mut queue = self.queue();
        while let Some((message, descriptors)) = queue.front() {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            wire::send(&self.0.socket, message, &descriptors, SendFlags::DONTWAIT)?;
            queue.pop_front();
        }
        Ok(())
    }

    /// Waits until all is sent, for so long at most. For the end of this process; it blocks the thread.
    pub fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        while let Err(error) = self.send_queued() {
            if error.kind() == io::ErrorKind::OutOfMemory && Instant::now() < end {
                std::thread::sleep(AGAIN);
                continue;
            }
            let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::ZERO);
            let mut watched = [PollFd::new(self.0.socket.as_fd(), PollFlags::POLLOUT)];
            if error.kind() != io::ErrorKind::WouldBlock || !matches!(poll(&mut watched, left), Ok(1..)) {
                return warn!(%error, "the keeper has not taken all that this worker leaves to the next");
            }
        }
    }

    fn socket(&self, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
        watch(self.0.socket.as_fd().try_clone_to_owned()?, interest)
    }

    /// Sends what the socket did not take, when it does. Ends with an error.
    async fn send_later(&self) -> io::Result<()> {
        let socket = self.socket(Interest::WRITABLE)?;
        loop {
            self.0.queued.notified().await;
            while let Err(error) = socket.async_io(Interest::WRITABLE, |_| self.send_queued()).await {
                if error.kind() != io::ErrorKind::OutOfMemory {
                    return Err(error);
                }
                sleep(AGAIN).await;
            }
        }
    }

    /// Passes on what the keeper tells, until it is gone; what is not about connections and exits goes to `other`. `cut` are the
    /// connections that a new worker has got without their descriptors.
    ///
    /// # Errors
    /// Always: why it cannot be heard any more.
    pub async fn listen(
        &self,
        reaper: &Reaper,
        connections: &UnboundedSender<Parked>,
        cut: Vec<String>,
        other: impl Fn(Message),
    ) -> io::Error {
        let without = |name: String| {
            warn!(name, "descriptors have run out; a connection waits until there are some");
            self.ask_again(name);
        };
        cut.into_iter().for_each(without);
        let heard = async {
            let socket = self.socket(Interest::READABLE)?;
            loop {
                let received = socket.async_io(Interest::READABLE, |socket| wire::receive(socket, RecvFlags::DONTWAIT)).await;
                let Received { message, descriptors, is_cut } = match received {
                    Ok(received) => received.ok_or_else(gone)?,
                    // Of another version's keeper.
                    Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                        warn!(%error, "the keeper has sent something else");
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                match message {
                    Message::Park(name) if is_cut => without(name),
                    // Nobody takes connections any more: the daemon is stopping.
                    Message::Park(name) => drop(connections.send(Parked { name, descriptors })),
                    Message::Exit(ended) => reaper.hear(ended),
                    Message::Lost(name) => {
                        error!(
                            name,
                            "the keeper's descriptors have run out: raise its limit; this will not outlive the worker"
                        );
                    }
                    message => other(message),
                }
            }
        };
        let ended: io::Result<()> = select! {
            ended = heard => ended,
            ended = self.send_later() => ended,
        };
        ended.err().unwrap_or_else(gone)
    }

    /// Asks for what could not be taken, when there may be room. To be called inside a runtime.
    pub(crate) fn ask_again(&self, name: String) {
        let keeper = self.clone();
        tokio::spawn(async move {
            sleep(AGAIN).await;
            // A keeper that is gone is noticed elsewhere.
            let _ = keeper.tell(&Message::Again(name), &[]);
        });
    }

    /// Continues the keeper whenever a signal has stopped it.
    pub async fn keep_going() {
        loop {
            sleep(LOOK).await;
            let keeper = Self::pid();
            if process::is_stopped(keeper) {
                let continued = kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGCONT);
                warn!(keeper, ?continued, "the keeper was stopped by a signal: it is continued");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[tokio::test]
    async fn a_keeper_that_takes_nothing_keeps_nobody_waiting() {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let keeper = Keeper::at(ours);
        let mut sent = 0;
        let refused = loop {
            let file = std::fs::File::open("/dev/null").unwrap();
            match keeper.park(&format!("held/{sent}"), &[file.as_fd()]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused.kind(), io::ErrorKind::WouldBlock);
        assert!(sent >= QUEUE);
        // It goes on: all comes, in order.
        let sending = tokio::spawn(async move { keeper.send_later().await });
        let socket = watch(theirs, Interest::READABLE).unwrap();
        for number in 0..sent {
            let received = socket.async_io(Interest::READABLE, |socket| wire::receive(socket, RecvFlags::DONTWAIT)).await;
            let received = received.unwrap().unwrap();
            assert_eq!((received.message, received.descriptors.len()), (Message::Park(format!("held/{number}")), 1));
        }
        sending.abort();
    }

    #[test]
    fn a_connection_is_known_by_its_name() {
        assert_eq!(["task.sock/7", "task.sock", "held/a/b", "config"].map(is_connection), [true, false, false, false]);
    }
}
