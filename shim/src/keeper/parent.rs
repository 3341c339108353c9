//! The keeper's own loop: one thread, one poll(2).

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, VecDeque},
    env, fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use kuasar_sandboxers::reaper::{Ended, reap};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::{FdFlags, fcntl_setfd},
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, accept_with, socketpair},
};

use crate::sys;

use super::{
    systemd,
    wire::{self, Message},
    worker::VARIABLE,
};

/// Exits that are remembered. Each process ends once, and a node has fewer than this many, so none is forgotten before a worker that
/// comes late has heard of it.
const EXITS: usize = 2 << 10;
/// A worker that has served for this long has not failed because of what it was started with.
const STABLE: Duration = Duration::from_secs(10);
/// Pauses before a worker is started again: none after the first crashes in a row, then twice as long each time.
const AT_ONCE: u32 = 3;
/// How long a worker may say nothing; one that hangs for longer is killed. Several times what it takes on a machine that swaps.
const HUNG: Duration = Duration::from_secs(60);
/// The status of a process that was killed.
const KILLED: u32 = 128 + Signal::SIGKILL as u32;
/// How long to accept nothing after descriptors have run out.
const FULL: Duration = Duration::from_millis(100);
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// What the keeper holds.
#[derive(Default)]
struct Keeper {
    parked: BTreeMap<String, Vec<OwnedFd>>,
    /// Names of listening sockets to accept on.
    accepting: BTreeSet<String>,
    connections: u64,
    exits: VecDeque<Ended>,
    /// Until when nothing is accepted, because descriptors have run out.
    full: Cell<Option<Instant>>,
}

/// The worker that runs, and what it is yet to be told.
struct Worker {
    pid: u32,
    socket: OwnedFd,
    /// In order; descriptors are looked up when a message is sent, and one of what was dropped meanwhile is left out.
    outbox: VecDeque<Message>,
    started: Instant,
    /// When it has said something last.
    heard: Instant,
    /// It answers calls.
    ready: bool,
}

impl Worker {
    /// Whether its end is likely to repeat itself soon. To be killed is no failure of its own.
    fn failed(&self, ended: &Ended) -> bool {
        !self.ready || ended.exit.status != KILLED && self.started.elapsed() < STABLE
    }
}

/// Keeps workers running until one is told to stop and does, or the first does not get ready.
///
/// # Errors
/// When the kernel refuses what the keeper needs, or a worker cannot be started at all.
pub fn keep() -> io::Result<ExitCode> {
    prctl::set_child_subreaper(true)?;
    let mask = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut keeper = Keeper::with(systemd::stored());
    let watchdog = systemd::watchdog();
    let mut worker = Some(keeper.start()?);
    let (mut ready, mut stopping, mut crashes) = (false, false, 0);
    let mut restart = None;
    let mut fed = watchdog.map(|_| Instant::now());
    loop {
        let hung = worker.as_ref().map(|worker| worker.heard + HUNG);
        keeper.wait(&signals, worker.as_ref(), [restart, hung, fed].into_iter().flatten().min())?;
        if let (Some(interval), Some(at)) = (watchdog, fed)
            && at <= Instant::now()
        {
            systemd::alive();
            fed = Some(Instant::now() + interval);
        }
        while let Some(signal) = signals.read_signal()? {
            let signal = Signal::try_from(signal.ssi_signo.cast_signed()).ok();
            let Some(signal) = signal.filter(|signal| *signal != Signal::SIGCHLD) else { continue };
            if signal != Signal::SIGHUP && !stopping {
                stopping = true;
                systemd::stopping();
            }
            match &worker {
                Some(worker) => tell(worker.pid, signal),
                None if stopping => return Ok(ExitCode::SUCCESS),
                None => {}
            }
        }
        if let Some(worker) = &mut worker {
            keeper.listen(worker);
            if worker.ready && !ready {
                ready = true;
                systemd::ready();
            }
            if worker.heard.elapsed() >= HUNG && !stopping {
                eprintln!("kuasard: the worker {} has been silent for {} s: it is killed", worker.pid, HUNG.as_secs());
                tell(worker.pid, Signal::SIGKILL);
                worker.heard = Instant::now();
            }
        }
        for ended in reap() {
            let Some(dead) = worker.take_if(|worker| worker.pid == ended.pid) else {
                keeper.ended(ended, worker.as_mut());
                continue;
            };
            // What it said last may still be in the socket.
            let mut dead = dead;
            keeper.listen(&mut dead);
            ready |= dead.ready;
            if stopping || !ready {
                return Ok(u8::try_from(ended.exit.status).map_or(ExitCode::FAILURE, ExitCode::from));
            }
            crashes = if dead.failed(&ended) { crashes + 1 } else { 0 };
            let pause = pause(crashes);
            eprintln!(
                "kuasard: the worker {} ended with status {}; starting another in {} ms",
                dead.pid,
                ended.exit.status,
                pause.as_millis()
            );
            restart = Some(Instant::now() + pause);
        }
        if worker.is_none() && restart.is_none_or(|at| at <= Instant::now()) {
            restart = None;
            match keeper.start() {
                Ok(started) => worker = Some(started),
                // Processes or descriptors have run out: that passes.
                Err(error) => {
                    eprintln!("kuasard: cannot start a worker: {error}; trying again");
                    restart = Some(Instant::now() + PAUSE.1);
                }
            }
        }
        keeper.accept(worker.as_mut());
        if let Some(worker) = &mut worker {
            keeper.speak(worker);
        }
    }
}

fn pause(crashes: u32) -> Duration {
    match crashes.checked_sub(AT_ONCE) {
        None => Duration::ZERO,
        Some(more) => PAUSE.0.saturating_mul(1 << more.min(16)).min(PAUSE.1),
    }
}

fn tell(pid: u32, signal: Signal) {
    if let Err(error) = kill(Pid::from_raw(pid.cast_signed()), signal) {
        eprintln!("kuasard: cannot send {signal} to the worker {pid}: {error}");
    }
}

impl Keeper {
    /// One that goes on with what an earlier one has parked.
    fn with(parked: BTreeMap<String, Vec<OwnedFd>>) -> Self {
        // Connections are numbered; a number must not come again.
        let number = |name: &String| name.rsplit_once('/')?.1.parse().ok();
        let connections = parked.keys().filter_map(number).max().unwrap_or(0);
        Self { parked, connections, ..Self::default() }
    }

    fn park(&mut self, name: String, descriptors: Vec<OwnedFd>) {
        let earlier = self.parked.get(&name).map_or(0, Vec::len);
        systemd::store(&name, &descriptors, earlier);
        self.parked.insert(name, descriptors);
    }

    fn start(&self) -> io::Result<Worker> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // One thread, so nobody else starts a process now that would inherit it.
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let mut args = env::args_os();
        let name = args.next().unwrap_or_default();
        let mut command = Command::new(fs::read_link("/proc/self/exe")?);
        std::os::unix::process::CommandExt::arg0(&mut command, name);
        sys::start_tuned(&mut command);
        let child = command.args(args).env(VARIABLE, theirs.as_raw_fd().to_string()).spawn()?;
        let parked = self.parked.keys().cloned().map(Message::Park);
        let outbox = parked.chain(self.exits.iter().copied().map(Message::Exit)).chain([Message::Complete]).collect();
        // Its handle is of no use: whoever ends is reaped by pid.
        Ok(Worker { pid: child.id(), socket: ours, outbox, started: Instant::now(), heard: Instant::now(), ready: false })
    }

    /// Waits until there is something to do, at most until `at`.
    fn wait(&self, signals: &SignalFd, worker: Option<&Worker>, at: Option<Instant>) -> io::Result<()> {
        let mut watched = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(worker) = worker {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, !worker.outbox.is_empty());
            watched.push(PollFd::new(worker.socket.as_fd(), flags));
        }
        let full = self.full.get().filter(|until| *until > Instant::now());
        if full.is_none() {
            watched.extend(self.listeners().map(|(_, listener)| PollFd::new(listener, PollFlags::POLLIN)));
        }
        let timeout = at.into_iter().chain(full).min().map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut watched, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn listeners(&self) -> impl Iterator<Item = (&String, BorrowedFd<'_>)> {
        self.accepting.iter().filter_map(|name| Some((name, self.parked.get(name)?.first()?.as_fd())))
    }

    /// Takes what the worker has said.
    fn listen(&mut self, worker: &mut Worker) {
        loop {
            let received = wire::receive(&worker.socket, RecvFlags::DONTWAIT);
            if received.is_ok() {
                worker.heard = Instant::now();
            }
            match received {
                Ok(Some((Message::Park(name), descriptors))) => self.park(name, descriptors),
                Ok(Some((Message::Drop(name), _))) => {
                    let dropped = self.parked.remove(&name);
                    systemd::forget(&name, dropped.map_or(0, |descriptors| descriptors.len()));
                    self.accepting.remove(&name);
                }
                Ok(Some((Message::Accept(name), _))) => {
                    self.accepting.insert(name);
                }
                Ok(Some((Message::Ready, _))) => worker.ready = true,
                Ok(Some((Message::Alive, _))) => {}
                // Not for us.
                Ok(Some((Message::Exit(_) | Message::Complete, _))) => {}
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => eprintln!("kuasard: from the worker: {error}"),
                Err(error) => return eprintln!("kuasard: cannot hear the worker {}: {error}", worker.pid),
            }
        }
    }

    fn ended(&mut self, ended: Ended, worker: Option<&mut Worker>) {
        if self.exits.len() == EXITS {
            self.exits.pop_front();
        }
        self.exits.push_back(ended);
        if let Some(worker) = worker {
            worker.outbox.push_back(Message::Exit(ended));
        }
    }

    /// Accepts what has connected. Without a worker too: a connection is to wait in the keeper, not to be refused.
    fn accept(&mut self, mut worker: Option<&mut Worker>) {
        let mut accepted = Vec::new();
        for (name, listener) in self.listeners() {
            // Not for ever: the worker has something to do as well.
            for _ in 0..64 {
                match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(connection) => accepted.push((name.clone(), connection)),
                    Err(rustix::io::Errno::AGAIN) => break,
                    // Descriptors have run out.
                    Err(_) => {
                        self.full.set(Some(Instant::now() + FULL));
                        break;
                    }
                }
            }
        }
        for (listener, connection) in accepted {
            // Where the worker writes down what it has read and not answered. Without it the client has to come again.
            let Ok(journal) = memfd_create("journal", MemfdFlags::CLOEXEC) else { continue };
            self.connections += 1;
            let name = format!("{listener}/{}", self.connections);
            self.park(name.clone(), vec![connection, journal]);
            if let Some(worker) = worker.as_deref_mut() {
                worker.outbox.push_back(Message::Park(name));
            }
        }
    }

    /// Tells the worker what it can take now.
    fn speak(&self, worker: &mut Worker) {
        while let Some(message) = worker.outbox.front() {
            let descriptors: Vec<_> = match message {
                Message::Park(name) => match self.parked.get(name) {
                    Some(parked) => parked.iter().map(AsFd::as_fd).collect(),
                    None => {
                        worker.outbox.pop_front();
                        continue;
                    }
                },
                _ => Vec::new(),
            };
            match wire::send(&worker.socket, message, &descriptors, SendFlags::DONTWAIT) {
                Ok(()) => drop(worker.outbox.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It has ended: that is about to be seen.
                Err(_) => return,
            }
        }
    }
}
