//! The keeper's own loop: one thread, one poll(2).

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet, VecDeque},
    env, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
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
    succession::{self, Estate, Origin},
    systemd,
    wire::{self, Message, Outcome},
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
/// Of one that ended by what was passed on to it.
const STOPPED: [u32; 2] = [128 + Signal::SIGTERM as u32, 128 + Signal::SIGINT as u32];
/// How long to accept nothing after descriptors have run out.
const FULL: Duration = Duration::from_millis(100);
/// How long a worker may take to finish what it is about before another program's takes its place. A stop takes 30 s at most.
const LEAVE: Duration = Duration::from_secs(45);
/// How long the other program's may take until it answers calls.
const TRIAL: Duration = Duration::from_secs(15);
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
    worker: Option<Worker>,
    /// When to start one.
    restart: Option<Instant>,
    /// Workers that have failed, one after the other.
    crashes: u32,
    /// A worker has been ready.
    ready: bool,
    /// Told to end.
    stopping: bool,
    upgrade: Option<Upgrade>,
    /// Which upgrade this keeper is still to follow, and to which program.
    successor: Option<(String, PathBuf)>,
    /// How the last upgrade ended.
    outcome: Option<Outcome>,
    /// It is time to give memory back.
    idle: bool,
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

/// An upgrade that is under way.
struct Upgrade {
    id: String,
    binary: PathBuf,
    /// The old worker has left, the new one is to get ready.
    tried: bool,
    /// Until when the worker may take.
    by: Instant,
    /// What the new worker has said of its failure.
    why: Option<String>,
}

/// Keeps workers running until one is told to stop and does, or the first does not get ready.
///
/// # Errors
/// When the kernel refuses what the keeper needs, or a worker cannot be started at all.
pub fn keep() -> io::Result<ExitCode> {
    // Whatever link to the program it was started by.
    nix::sys::prctl::set_name(c"kuasard")?;
    let estate = match succession::origin()? {
        Origin::Trial => return Ok(ExitCode::SUCCESS),
        Origin::Successor(estate) => Some(estate),
        Origin::First => None,
    };
    prctl::set_child_subreaper(true)?;
    let mask = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let mut keeper = match estate {
        Some(estate) => Keeper::succeed(estate)?,
        None => {
            let mut keeper = Keeper::with(systemd::stored());
            keeper.worker = Some(keeper.start(None)?);
            keeper
        }
    };
    let watchdog = systemd::watchdog();
    let mut fed = watchdog.map(|_| Instant::now());
    loop {
        keeper.wait(&signals, fed)?;
        if let (Some(interval), Some(at)) = (watchdog, fed)
            && at <= Instant::now()
        {
            systemd::alive();
            fed = Some(Instant::now() + interval);
        }
        while let Some(signal) = signals.read_signal()? {
            let signal = Signal::try_from(signal.ssi_signo.cast_signed()).ok();
            let Some(signal) = signal.filter(|signal| *signal != Signal::SIGCHLD) else { continue };
            if signal != Signal::SIGHUP && !keeper.stopping {
                keeper.stopping = true;
                systemd::stopping();
            }
            match &keeper.worker {
                Some(worker) => tell(worker.pid, signal),
                None if keeper.stopping => return Ok(ExitCode::SUCCESS),
                None => {}
            }
        }
        keeper.hear_worker();
        keeper.watch_worker();
        for ended in reap() {
            if let Some(status) = keeper.ended(ended) {
                return Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from));
            }
        }
        keeper.start_worker();
        keeper.accept();
        keeper.speak();
        keeper.leave_to_successor();
        if std::mem::take(&mut keeper.idle) {
            // What waiting needs is little of the program.
            sys::forget_program();
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

    /// One that goes on where an earlier program was.
    fn succeed(estate: Estate) -> io::Result<Self> {
        let Estate { parked, accepting, connections, exits, worker: (pid, socket), outcome } = estate;
        let socket = sys::own_inherited(socket)?;
        let parked = parked.into_iter().map(|(name, numbers)| {
            let owned = numbers.into_iter().map(sys::own_inherited).collect::<io::Result<_>>()?;
            Ok((name, owned))
        });
        let worker = Worker {
            pid,
            socket,
            outbox: outcome.clone().map(Message::Upgraded).into_iter().collect(),
            started: Instant::now(),
            heard: Instant::now(),
            ready: true,
        };
        Ok(Self {
            parked: parked.collect::<io::Result<_>>()?,
            accepting,
            connections,
            exits: exits.into(),
            worker: Some(worker),
            ready: true,
            outcome,
            ..Self::default()
        })
    }

    /// Starts a worker of our own program, or of the one that an upgrade names.
    fn start(&self, upgrade: Option<&Upgrade>) -> io::Result<Worker> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        // One thread, so nobody else starts a process now that would inherit it.
        fcntl_setfd(&theirs, FdFlags::empty())?;
        let mut args = env::args_os();
        let name = args.next().unwrap_or_default();
        let mut command = match upgrade {
            Some(upgrade) => Command::new(&upgrade.binary),
            // Even when another file has its name by now, or none: what was not asked to change does not.
            None => Command::new("/proc/self/exe"),
        };
        sys::start_tuned(&mut command);
        let child = command.arg0(name).args(args).env(VARIABLE, theirs.as_raw_fd().to_string()).spawn()?;
        let parked = self.parked.keys().cloned().map(Message::Park);
        let told = parked.chain(self.exits.iter().copied().map(Message::Exit));
        let role = match upgrade {
            Some(upgrade) => Some(Message::Upgrade { id: upgrade.id.clone(), binary: upgrade.binary.clone() }),
            None => self.outcome.clone().map(Message::Upgraded),
        };
        let outbox = told.chain(role).chain([Message::Complete]).collect();
        // Its handle is of no use: whoever ends is reaped by pid.
        Ok(Worker { pid: child.id(), socket: ours, outbox, started: Instant::now(), heard: Instant::now(), ready: false })
    }

    /// Starts a worker when there is none and it is time.
    fn start_worker(&mut self) {
        if self.worker.is_some() || self.restart.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.restart = None;
        match self.start(self.upgrade.as_ref()) {
            Ok(started) => self.worker = Some(started),
            Err(error) => match self.upgrade.take() {
                Some(upgrade) => {
                    self.upgrade_failed(upgrade, format!("cannot be started: {error}"));
                    self.restart = Some(Instant::now());
                }
                // Processes or descriptors have run out: that passes.
                None => {
                    eprintln!("kuasard: cannot start a worker: {error}; trying again");
                    self.restart = Some(Instant::now() + PAUSE.1);
                }
            },
        }
    }

    fn upgrade_failed(&mut self, upgrade: Upgrade, why: String) {
        let error = format!("{} {why}", upgrade.binary.display());
        eprintln!("kuasard: the upgrade failed, the old program goes on: {error}");
        self.outcome = Some(Outcome { id: upgrade.id, error: Some(error) });
    }

    /// Ends a worker that takes too long.
    fn watch_worker(&mut self) {
        let Some(worker) = self.worker.as_mut().filter(|_| !self.stopping) else { return };
        let late = self.upgrade.as_mut().filter(|upgrade| upgrade.by <= Instant::now());
        let why = match late {
            Some(upgrade) if upgrade.tried => {
                let why = format!("did not serve within {} s", TRIAL.as_secs());
                upgrade.why = Some(format!("it {why}"));
                why
            }
            // What it has not finished is begun again by the next.
            Some(_) => format!("did not leave within {} s", LEAVE.as_secs()),
            None if worker.heard.elapsed() >= HUNG => format!("has been silent for {} s", HUNG.as_secs()),
            None => return,
        };
        eprintln!("kuasard: the worker {} {why}: it is killed", worker.pid);
        tell(worker.pid, Signal::SIGKILL);
        worker.heard = Instant::now();
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.by = Instant::now() + HUNG;
        }
    }

    /// Becomes the new program, if the worker is and knows all there is to know.
    fn leave_to_successor(&mut self) {
        let is_told = self.worker.as_ref().is_some_and(|worker| worker.outbox.is_empty());
        // The next upgrade comes first, if there is one already: it would be forgotten.
        if self.stopping || self.upgrade.is_some() || !is_told {
            return;
        }
        let Some((id, binary)) = self.successor.take() else { return };
        let Some(worker) = &self.worker else { return };
        let number = |descriptor: &OwnedFd| descriptor.as_raw_fd();
        let estate = Estate {
            parked: self.parked.iter().map(|(name, parked)| (name.clone(), parked.iter().map(number).collect())).collect(),
            accepting: self.accepting.clone(),
            connections: self.connections,
            exits: self.exits.iter().copied().collect(),
            worker: (worker.pid, number(&worker.socket)),
            outcome: Some(Outcome { id: id.clone(), error: None }),
        };
        let descriptors: Vec<_> = self.parked.values().flatten().chain([&worker.socket]).map(AsFd::as_fd).collect();
        let error = succession::replace(&binary, &estate, &descriptors);
        let error = format!("{} serves, but the keeper remains the old program: {error}", binary.display());
        eprintln!("kuasard: {error}");
        let outcome = Outcome { id, error: Some(error) };
        self.outcome = Some(outcome.clone());
        self.tell_worker(Message::Upgraded(outcome));
    }

    fn tell_worker(&mut self, message: Message) {
        if let Some(worker) = &mut self.worker {
            worker.outbox.push_back(message);
        }
    }

    /// Waits until there is something to do, at most until `at`.
    fn wait(&self, signals: &SignalFd, at: Option<Instant>) -> io::Result<()> {
        let hung = self.worker.as_ref().map(|worker| worker.heard + HUNG);
        let late = self.upgrade.as_ref().map(|upgrade| upgrade.by);
        let mut watched = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(worker) = &self.worker {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, !worker.outbox.is_empty());
            watched.push(PollFd::new(worker.socket.as_fd(), flags));
        }
        let full = self.full.get().filter(|until| *until > Instant::now());
        if full.is_none() {
            watched.extend(self.listeners().map(|(_, listener)| PollFd::new(listener, PollFlags::POLLIN)));
        }
        let timeout = [at, self.restart, hung, late, full].into_iter().flatten().min().map_or(PollTimeout::NONE, |at| {
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
    fn hear_worker(&mut self) {
        // Taken out, because what it says changes everything else.
        let Some(mut worker) = self.worker.take() else { return };
        self.listen(&mut worker);
        self.worker = Some(worker);
    }

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
                Ok(Some((Message::Ready, _))) => self.worker_is_ready(worker),
                Ok(Some((Message::Upgrade { id, binary }, _))) if self.upgrade.is_none() => {
                    self.upgrade = Some(Upgrade { id, binary, tried: false, by: Instant::now() + LEAVE, why: None });
                }
                Ok(Some((Message::Failed(why), _))) => {
                    if let Some(upgrade) = &mut self.upgrade {
                        upgrade.why = Some(why);
                    }
                }
                Ok(Some((Message::Alive, _))) => self.idle = true,
                // Not for us.
                Ok(Some((Message::Exit(_) | Message::Complete | Message::Upgrade { .. } | Message::Upgraded(_), _))) => {}
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => eprintln!("kuasard: from the worker: {error}"),
                Err(error) => return eprintln!("kuasard: cannot hear the worker {}: {error}", worker.pid),
            }
        }
    }

    fn worker_is_ready(&mut self, worker: &mut Worker) {
        worker.ready = true;
        if !self.ready {
            self.ready = true;
            systemd::ready();
        }
        if let Some(upgrade) = self.upgrade.take_if(|upgrade| upgrade.tried) {
            self.successor = Some((upgrade.id, upgrade.binary));
        }
    }

    /// Takes note of a child's end; the status to end with, if this is the end.
    fn ended(&mut self, ended: Ended) -> Option<u32> {
        let Some(mut dead) = self.worker.take_if(|worker| worker.pid == ended.pid) else {
            if self.exits.len() == EXITS {
                self.exits.pop_front();
            }
            self.exits.push_back(ended);
            self.tell_worker(Message::Exit(ended));
            return None;
        };
        // What it said last may still be in the socket.
        self.listen(&mut dead);
        let status = ended.exit.status;
        // Told to stop before it had learned to listen.
        let obeyed = self.stopping && (STOPPED.contains(&status));
        if self.stopping || !self.ready {
            return Some(if obeyed { 0 } else { status });
        }
        self.restart = Some(Instant::now());
        match self.upgrade.take() {
            Some(upgrade) if !upgrade.tried => {
                self.upgrade = Some(Upgrade { tried: true, by: Instant::now() + TRIAL, ..upgrade });
            }
            Some(mut upgrade) => {
                let why = upgrade.why.take().unwrap_or_else(|| "it said nothing".into());
                self.upgrade_failed(upgrade, format!("ended with status {status} before it served: {why}"));
            }
            None => {
                self.crashes = if dead.failed(&ended) { self.crashes + 1 } else { 0 };
                let pause = pause(self.crashes);
                eprintln!(
                    "kuasard: the worker {} ended with status {status}; starting another in {} ms",
                    dead.pid,
                    pause.as_millis()
                );
                self.restart = Some(Instant::now() + pause);
                // Whatever it was to become, it has ended as itself.
                if let Some((id, binary)) = self.successor.take() {
                    let error = format!("{} served, and ended with status {status} at once", binary.display());
                    self.outcome = Some(Outcome { id, error: Some(error) });
                }
            }
        }
        None
    }

    /// Accepts what has connected. Without a worker too: a connection is to wait in the keeper, not to be refused.
    fn accept(&mut self) {
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
            self.tell_worker(Message::Park(name));
        }
    }

    /// Tells the worker what it can take now.
    fn speak(&mut self) {
        let Some(worker) = &mut self.worker else { return };
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
