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

use kuasar_sandboxers::{
    limits,
    reaper::{Ended, continue_stopped, reap},
};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        prctl,
        signal::{Signal, kill},
        signalfd::SignalFd,
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
    log,
    signals::{self, Asked},
    succession::{self, Estate, Origin},
    systemd::{self, Notifier},
    wire::{self, Message, Outcome, Received},
    worker::VARIABLE,
};

/// Exits that are remembered. Each process ends once, and a node has fewer than this many, so none is forgotten before a worker that
/// comes late has heard of it.
const EXITS: usize = 2 << 10;
/// A worker that has served for this long has not failed because of what it was started with.
const STABLE: Duration = Duration::from_secs(10);
/// Crashes in a row after which the next worker is started without a pause.
const AT_ONCE: u32 = 3;
/// How long a worker may say nothing; one that hangs for longer is killed. Several times what it takes on a machine that swaps.
const HUNG: Duration = Duration::from_secs(60);
/// How long a worker may live on without its socket: between closing it and its end there is a moment.
const CLOSED: Duration = Duration::from_secs(1);
/// How long a worker may take to stop before it is killed: its grace for calls, and what comes after.
const STOPPING: Duration = Duration::from_secs(60);
/// How long what is to be parked may wait for descriptors.
const ROOM: Duration = Duration::from_secs(5);
/// How often the keeper is looked at anew when systemd was not told that it lives.
const UNWELL: Duration = Duration::from_secs(1);
/// The pause after the kernel has refused something that it never refuses.
const TROUBLE: Duration = Duration::from_millis(100);
/// The status of a process that was killed.
const KILLED: u32 = 128 + Signal::SIGKILL as u32;
/// Of one that ended by what was passed on to it.
const STOPPED: [u32; 2] = [128 + Signal::SIGTERM as u32, 128 + Signal::SIGINT as u32];
/// How long to take nothing after descriptors have run out.
const FULL: Duration = Duration::from_millis(100);
/// How long a worker may take to finish what it is about before another program's takes its place. A stop takes 30 s at most.
const LEAVE: Duration = Duration::from_secs(45);
/// How long the other program's may take until it answers calls.
const TRIAL: Duration = Duration::from_secs(15);
/// Pauses after that: the first, doubled each time, up to the last.
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
    /// The journal of the next connection: one that is accepted must have one.
    journal: Option<OwnedFd>,
    notifier: Notifier,
    worker: Option<Worker>,
    /// Since when there is none.
    vacant: Option<Instant>,
    /// When to start one.
    restart: Option<Instant>,
    /// Workers that have failed, one after the other.
    crashes: u32,
    /// A worker has been ready.
    ready: bool,
    /// Told to end.
    stopping: Option<Instant>,
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
    /// When it has said something last, or was killed for saying nothing.
    heard: Instant,
    /// When it has said something last, or was started.
    lived: Instant,
    /// It has closed its socket: when to kill it.
    closed: Option<Instant>,
    /// Since when what it parks waits for descriptors.
    waiting: Option<Instant>,
    /// It answers calls.
    ready: bool,
}

impl Worker {
    fn new(pid: u32, socket: OwnedFd, outbox: VecDeque<Message>, ready: bool) -> Self {
        let now = Instant::now();
        Self { pid, socket, outbox, started: now, heard: now, lived: now, closed: None, waiting: None, ready }
    }

    fn has_closed(&mut self) {
        self.closed.get_or_insert_with(|| Instant::now() + CLOSED);
    }

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
    log::to_stderr();
    // Descriptors of every container are parked here.
    limits::raise_open_files()?;
    prctl::set_child_subreaper(true)?;
    let signals = signals::block()?;
    let mut keeper = match estate {
        Some(estate) => Keeper::succeed(estate)?,
        None => {
            let mut notifier = Notifier::new(BTreeMap::new());
            let parked = systemd::stored(&mut notifier);
            let mut keeper = Keeper::with(parked, notifier);
            keeper.worker = Some(keeper.start(None)?);
            keeper
        }
    };
    let status = keeper.run(&signals);
    // What is not stored would be lost.
    keeper.notifier.finish(&keeper.parked);
    Ok(u8::try_from(status).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn pause(crashes: u32) -> Duration {
    match crashes.checked_sub(AT_ONCE) {
        None => Duration::ZERO,
        Some(more) => PAUSE.0.saturating_mul(1 << more.min(16)).min(PAUSE.1),
    }
}

/// Says that the kernel has refused something, and lets that pass: it is tried again at once, and may be refused again.
fn trouble(what: &str, error: io::Error) {
    eprintln!("kuasard: the keeper cannot {what}: {error}; trying again");
    std::thread::sleep(TROUBLE);
}

fn tell(pid: u32, signal: Signal) {
    if let Err(error) = kill(Pid::from_raw(pid.cast_signed()), signal) {
        eprintln!("kuasard: cannot send {signal} to the worker {pid}: {error}");
    }
}

impl Keeper {
    /// Until the end; the status to end with. Nothing that the kernel refuses on the way is a reason to end.
    fn run(&mut self, signals: &SignalFd) -> u32 {
        let watchdog = systemd::watchdog();
        let mut fed = watchdog.map(|_| Instant::now());
        loop {
            self.wait(signals, fed);
            if let (Some(interval), Some(at)) = (watchdog, fed)
                && at <= Instant::now()
            {
                // Else systemd starts all anew.
                let is_well = self.is_well();
                if is_well {
                    self.notifier.alive();
                }
                fed = Some(Instant::now() + if is_well { interval } else { UNWELL });
            }
            if let Some(status) = self.take_signals(signals) {
                return status;
            }
            self.hear_worker();
            self.watch_worker();
            for ended in reap() {
                if let Some(status) = self.ended(ended) {
                    return status;
                }
            }
            self.continue_worker();
            self.start_worker();
            self.accept();
            self.speak();
            self.leave_to_successor();
            self.notifier.send(&self.parked);
            if std::mem::take(&mut self.idle) {
                // What waiting needs is little of the program.
                sys::forget_program();
            }
        }
    }

    /// Whether a worker lives, or another is about to.
    fn is_well(&self) -> bool {
        let since = self.worker.as_ref().map(|worker| worker.lived).or(self.vacant);
        since.is_none_or(|since| since.elapsed() < 2 * HUNG)
    }

    /// Does what signals ask for; the status to end with, if this is the end.
    fn take_signals(&mut self, signals: &SignalFd) -> Option<u32> {
        loop {
            let signal = match signals.read_signal() {
                Ok(signal) => signal?.ssi_signo.cast_signed(),
                Err(error) => {
                    trouble("read signals", error.into());
                    return None;
                }
            };
            match signals::asked(signal) {
                Asked::Nothing => {}
                Asked::Stop(signal) => {
                    if let Some(status) = self.stop(signal) {
                        return Some(status);
                    }
                }
                Asked::Unknown if signal == libc::SIGHUP => {
                    eprintln!("kuasard: SIGHUP is ignored; `kuasarctl upgrade` lets the configuration be read again");
                }
                Asked::Unknown => eprintln!("kuasard: signal {signal} is ignored"),
            }
        }
    }

    fn stop(&mut self, signal: Signal) -> Option<u32> {
        let again = self.stopping.replace(self.stopping.unwrap_or_else(Instant::now)).is_some();
        if !again {
            self.notifier.stopping();
        }
        match &mut self.worker {
            // One that has not got that far has nothing to finish.
            Some(worker) if worker.ready && !again => worker.outbox.push_back(Message::Stop),
            Some(worker) => tell(worker.pid, signal),
            None => return Some(0),
        }
        None
    }

    /// Continues the worker, if a signal has stopped it.
    fn continue_worker(&mut self) {
        let Some(worker) = &self.worker else { return };
        if continue_stopped(worker.pid).is_some() {
            eprintln!("kuasard: the worker {} was stopped by a signal: it is continued", worker.pid);
        }
    }

    /// One that goes on with what an earlier one has parked.
    fn with(parked: BTreeMap<String, Vec<OwnedFd>>, notifier: Notifier) -> Self {
        // Connections are numbered; a number must not come again.
        let number = |name: &String| name.rsplit_once('/')?.1.parse().ok();
        let connections = parked.keys().filter_map(number).max().unwrap_or(0);
        Self { parked, connections, notifier, ..Self::default() }
    }

    fn park(&mut self, name: String, descriptors: Vec<OwnedFd>) {
        self.notifier.changed(&name, self.parked.get(&name).map_or(0, Vec::len));
        self.parked.insert(name, descriptors);
    }

    fn drop_parked(&mut self, name: &str) {
        if let Some(dropped) = self.parked.remove(name) {
            self.notifier.changed(name, dropped.len());
        }
        self.accepting.remove(name);
    }

    /// One that goes on where an earlier program was.
    fn succeed(estate: Estate) -> io::Result<Self> {
        let Estate { parked, accepting, connections, exits, worker: (pid, socket), outcome, unsent } = estate;
        let socket = sys::own_inherited(socket)?;
        let parked = parked.into_iter().filter_map(|(name, numbers)| {
            let owned: io::Result<_> = numbers.into_iter().map(sys::own_inherited).collect();
            // The others are not to be lost with it.
            let failed = |error: &io::Error| eprintln!("kuasard: {name} was not handed on: {error}");
            owned.inspect_err(failed).ok().map(|owned| (name, owned))
        });
        Ok(Self {
            parked: parked.collect(),
            accepting,
            connections,
            exits: exits.into(),
            notifier: Notifier::new(unsent),
            worker: Some(Worker::new(pid, socket, outcome.clone().map(Message::Upgraded).into_iter().collect(), true)),
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
        command.arg0(name).args(args).env(VARIABLE, theirs.as_raw_fd().to_string());
        let child = limits::with_first_open_files(|| command.spawn())??;
        let parked = self.parked.keys().cloned().map(Message::Park);
        let told = parked.chain(self.exits.iter().copied().map(Message::Exit));
        let role = match upgrade {
            Some(upgrade) => Some(Message::Upgrade { id: upgrade.id.clone(), binary: upgrade.binary.clone() }),
            None => self.outcome.clone().map(Message::Upgraded),
        };
        let outbox = told.chain(role).chain([Message::Complete]).collect();
        // Its handle is of no use: whoever ends is reaped by pid.
        Ok(Worker::new(child.id(), ours, outbox, false))
    }

    /// Starts a worker when there is none and it is time.
    fn start_worker(&mut self) {
        if self.worker.is_some() || self.restart.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.restart = None;
        match self.start(self.upgrade.as_ref()) {
            Ok(started) => (self.worker, self.vacant) = (Some(started), None),
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
        let Some(worker) = &mut self.worker else { return };
        let now = Instant::now();
        let late = self.upgrade.as_mut().filter(|upgrade| upgrade.by <= now);
        let why = match (self.stopping, late) {
            _ if worker.closed.is_some_and(|at| at <= now) => "has closed its socket".to_owned(),
            (Some(since), _) if since.elapsed() < STOPPING => return,
            (Some(_), _) => format!("did not stop within {} s", STOPPING.as_secs()),
            (None, Some(upgrade)) if upgrade.tried => {
                let why = format!("did not serve within {} s", TRIAL.as_secs());
                upgrade.why = Some(format!("it {why}"));
                why
            }
            // What it has not finished is begun again by the next.
            (None, Some(_)) => format!("did not leave within {} s", LEAVE.as_secs()),
            (None, None) if worker.heard.elapsed() >= HUNG => format!("has been silent for {} s", HUNG.as_secs()),
            (None, None) => return,
        };
        eprintln!("kuasard: the worker {} {why}: it is killed", worker.pid);
        tell(worker.pid, Signal::SIGKILL);
        worker.heard = now;
        worker.closed = worker.closed.map(|_| now + HUNG);
        self.stopping = self.stopping.map(|_| now);
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.by = now + HUNG;
        }
    }

    /// Becomes the new program, if the worker is and knows all there is to know.
    fn leave_to_successor(&mut self) {
        let is_told = self.worker.as_ref().is_some_and(|worker| worker.outbox.is_empty());
        // The next upgrade comes first, if there is one already: it would be forgotten.
        if self.stopping.is_some() || self.upgrade.is_some() || !is_told {
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
            unsent: self.notifier.rest().clone(),
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
    fn wait(&self, signals: &SignalFd, at: Option<Instant>) {
        let full = self.full.get().filter(|until| *until > Instant::now());
        let worker = self.worker.as_ref();
        let mut times = vec![at, self.restart, full, self.notifier.again(), worker.and_then(|worker| worker.closed)];
        match self.stopping {
            Some(since) => times.push(Some(since + STOPPING)),
            None => times.extend([self.upgrade.as_ref().map(|upgrade| upgrade.by), worker.map(|worker| worker.heard + HUNG)]),
        }
        let mut watched = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        // At its end a socket is always ready.
        if let Some(worker) = worker.filter(|worker| worker.closed.is_none()) {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, worker.waiting.is_none() || full.is_none());
            flags.set(PollFlags::POLLOUT, !worker.outbox.is_empty());
            if !flags.is_empty() {
                watched.push(PollFd::new(worker.socket.as_fd(), flags));
            }
        }
        if full.is_none() {
            watched.extend(self.listeners().map(|(_, listener)| PollFd::new(listener, PollFlags::POLLIN)));
        }
        let timeout = times.into_iter().flatten().min().map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut watched, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => trouble("wait", error.into()),
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
            if self.must_wait(worker) {
                return;
            }
            let received = wire::receive(&worker.socket, RecvFlags::DONTWAIT);
            if matches!(received, Ok(Some(_))) {
                (worker.heard, worker.lived) = (Instant::now(), Instant::now());
            }
            let Received { message, descriptors, is_cut } = match received {
                Ok(Some(received)) => received,
                Ok(None) => return worker.has_closed(),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::InvalidData => {
                        eprintln!("kuasard: from the worker: {error}");
                        continue;
                    }
                    // As good as closed.
                    _ => return worker.has_closed(),
                },
            };
            match message {
                Message::Park(name) if is_cut => {
                    eprintln!("kuasard: descriptors have run out: {name} is not held for the next worker; raise the limit");
                    worker.outbox.push_back(Message::Lost(name));
                }
                Message::Park(name) => self.park(name, descriptors),
                Message::Again(name) => worker.outbox.push_back(Message::Park(name)),
                Message::Drop(name) => self.drop_parked(&name),
                Message::Accept(name) => drop(self.accepting.insert(name)),
                Message::Ready => self.worker_is_ready(worker),
                Message::Upgrade { id, binary } if self.upgrade.is_none() => {
                    self.upgrade = Some(Upgrade { id, binary, tried: false, by: Instant::now() + LEAVE, why: None });
                }
                Message::Failed(why) => {
                    if let Some(upgrade) = &mut self.upgrade {
                        upgrade.why = Some(why);
                    }
                }
                Message::Alive => self.idle = true,
                // Not for us.
                Message::Exit(_) | Message::Complete | Message::Upgrade { .. } | Message::Upgraded(_) => {}
                Message::Stop | Message::Lost(_) => {}
            }
        }
    }

    /// Whether the worker's next message is to wait for descriptors: taken now it would come without its own. Others may get free only by
    /// what comes behind it, so not for ever.
    fn must_wait(&self, worker: &mut Worker) -> bool {
        if !matches!(wire::parks_next(&worker.socket), Ok(true)) || wire::has_room(&worker.socket) {
            worker.waiting = None;
            return false;
        }
        let waits = worker.waiting.get_or_insert_with(Instant::now).elapsed() < ROOM;
        if waits {
            self.full.set(Some(Instant::now() + FULL));
        }
        waits
    }

    fn worker_is_ready(&mut self, worker: &mut Worker) {
        worker.ready = true;
        if !self.ready {
            self.ready = true;
            self.notifier.ready();
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
        self.vacant = Some(Instant::now());
        let status = ended.exit.status;
        let is_stopping = self.stopping.is_some();
        // Told to stop before it had learned to listen.
        let obeyed = is_stopping && STOPPED.contains(&status);
        if is_stopping || !self.ready {
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
        let names: Vec<_> = self.accepting.iter().cloned().collect();
        for name in names {
            // Not for ever: the worker has something to do as well.
            for _ in 0..64 {
                // Where the worker writes down what it has read and not answered. A connection without it would have to be closed.
                if self.journal.is_none() {
                    self.journal = memfd_create("journal", MemfdFlags::CLOEXEC).ok();
                }
                let listener = self.parked.get(&name).and_then(|parked| parked.first());
                let (Some(listener), Some(_)) = (listener, &self.journal) else {
                    self.full.set(Some(Instant::now() + FULL));
                    break;
                };
                match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(connection) => accepted.extend(self.journal.take().map(|journal| (name.clone(), [connection, journal]))),
                    Err(rustix::io::Errno::AGAIN) => break,
                    // Descriptors have run out.
                    Err(_) => {
                        self.full.set(Some(Instant::now() + FULL));
                        break;
                    }
                }
            }
        }
        for (listener, descriptors) in accepted {
            self.connections += 1;
            let name = format!("{listener}/{}", self.connections);
            self.park(name.clone(), descriptors.into());
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
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::InvalidInput => {
                        eprintln!("kuasard: the worker cannot be told: {error}");
                        worker.outbox.pop_front();
                    }
                    io::ErrorKind::OutOfMemory => return trouble("tell the worker", error),
                    // It has ended, or is about to.
                    _ => return worker.has_closed(),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests;
