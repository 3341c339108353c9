//! The daemon's sockets: claimed, bound, served, drained.
//!
//! ```text
//!   claim the state directory ─▶ bind both sockets ─▶ (recover) ─▶ serve ─┬▶ stop: refuse, drain, publish, unlink
//!                                                                         └▶ leave for another worker: drain
//! ```
//!
//! Sockets are bound before sandboxes are recovered, so that a client that comes early waits instead of failing.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use kuasar_sandboxers::{Error, Result, event::Sent, registry::Registry, stdio::StreamHub};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::resource::{Resource, getrlimit},
};
use tokio::{
    net::UnixListener,
    runtime::{Handle, RuntimeFlavor},
    sync::mpsc::UnboundedReceiver,
    task::{JoinHandle, yield_now},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    abandoned::Comparison,
    admin::{Admin, Configured},
    calls::Calls,
    controller::Controller,
    events, forgotten,
    gc::Gc,
    keeper::worker::{Keeper, Parked},
    proto::{admin::admin_server::AdminServer, sandbox::controller_server::ControllerServer},
    sys,
    task::{
        TaskService,
        connection::{self, Acceptor, Hush, Kept, Source},
    },
    upgrade::Upgrades,
};

/// The gRPC socket's name in the state directory.
pub const CONTROL_SOCKET: &str = "kuasard.sock";
/// The ttrpc socket's name in the state directory.
pub const TASK_SOCKET: &str = "task.sock";
/// The lock's name in the state directory.
pub const LOCK: &str = "kuasard.lock";
/// The name of the file that says in which namespaces containerd lists our sandboxes.
const LISTED: &str = "listed.json";
/// Where sockets are made before they get their permissions and their name.
const NEW: &str = ".new";

/// gRPC connections at a time; containerd has one, kuasarctl one for a moment.
const CONTROL_CONNECTIONS: usize = 64;
/// Task connections at a time take at most half of the descriptors the process may have, within these bounds.
const TASK_CONNECTIONS: (u64, u64) = (64, 8192);
/// Descriptors of a Task connection: the socket and its journal.
const OF_CONNECTION: u64 = 2;
/// How long a worker that was killed may take to let go of the state directory: its memory is gone first, and its descriptors last.
const DYING: Duration = Duration::from_secs(3);
/// How often memory is given back at most, while there are calls.
const TIDY: Duration = Duration::from_secs(2);
/// How often to let go of the program's pages at most. What is in use comes back within a millisecond.
const FORGET: Duration = Duration::from_secs(20);
/// How long answers that are ready may take to leave at a shutdown.
const FLUSH: Duration = Duration::from_secs(2);
/// How long Task requests may take to finish before another worker takes over; those that do not are begun again there.
const HAND_OVER: Duration = Duration::from_secs(5);

/// A state directory that is this daemon's alone for as long as this lives. Its sockets go with it.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// Names of the sockets that have been bound.
    bound: Mutex<Vec<&'static str>>,
    lock: Flock<File>,
}

/// The listening sockets.
#[derive(Debug)]
pub struct Sockets {
    control: UnixListener,
    task: TaskSocket,
}

/// Who accepts on the Task socket.
#[derive(Debug)]
enum TaskSocket {
    /// This process.
    Ours(UnixListener),
    /// The keeper.
    Kept(Keeper, UnboundedReceiver<Parked>),
}

/// What is served.
pub struct Parts {
    /// The sandboxes.
    pub registry: Registry,
    /// Streams of their processes.
    pub hub: StreamHub,
    /// What happens in them.
    pub events: UnboundedReceiver<Sent>,
    /// Where operations run.
    pub workers: Handle,
    /// containerd's gRPC socket.
    pub containerd: PathBuf,
    /// What the daemon has been told.
    pub configured: Configured,
    /// Who takes upgrades on, where there is a keeper.
    pub upgrades: Option<Upgrades>,
    /// How long operations may take to finish after a stop.
    pub grace: Duration,
    /// How often to look for sandboxes that containerd has forgotten.
    pub look_interval: Duration,
}

/// Locks a file, waiting for whoever has it. Neither a signal nor a descriptor tells that a lock is free, so it is tried again and again.
fn lock_by(mut file: File, end: Instant) -> Result<Flock<File>, (File, Errno)> {
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Err((busy, Errno::EWOULDBLOCK)) if Instant::now() < end => file = busy,
            locked => return locked,
        }
        thread::sleep(Duration::from_millis(10));
    }
}

impl StateDir {
    /// Makes the directory if need be, and locks it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when another daemon has it, [`Error::Io`] when it cannot be used.
    pub fn claim(path: &Path) -> Result<Self> {
        Self::claim_with(path, None)
    }

    /// The same, with the locked file of the worker before this one, if there was one.
    ///
    /// # Errors
    /// As for [`Self::claim`].
    pub fn claim_with(path: &Path, locked: Option<OwnedFd>) -> Result<Self> {
        // Containers with a user namespace pass through it, so others may enter; what must be private says so itself.
        DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(Error::io("create", path))?;
        let path = fs::canonicalize(path).map_err(Error::io("find", path))?;
        let name = path.join(LOCK);
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&name);
        let file = locked.map_or_else(open, |file| Ok(File::from(file))).map_err(Error::io("open", &name))?;
        let mut lock = match lock_by(file, Instant::now() + DYING) {
            Ok(lock) => lock,
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                // Only to name it; the daemon may be just about to write it.
                let owner = match file.read_to_string(&mut pid) {
                    Ok(_) if !pid.trim().is_empty() => format!("process {}", pid.trim()),
                    _ => "another process".into(),
                };
                let why = format!("{owner} serves it; stop that daemon, or give this one another --state");
                return Err(Error::Unavailable { what: format!("state directory {}", path.display()), why });
            }
            Err((_, errno)) => return Err(Error::io("lock", &name)(errno.into())),
        };
        let write = |file: &mut File| -> io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut lock).map_err(Error::io("write", &name))?;
        Ok(Self { path, bound: Mutex::default(), lock })
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Binds both sockets in place of those of an earlier daemon; only root may use them.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Invalid`] when something that is no socket has one of the names.
    pub fn bind(&self) -> Result<Sockets> {
        let (control, task) = self.bind_both()?;
        Ok(Sockets { control, task: TaskSocket::Ours(task) })
    }

    fn bind_both(&self) -> Result<(UnixListener, UnixListener)> {
        let new = self.path.join(NEW);
        match DirBuilder::new().mode(0o700).create(&new) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(Error::io("create", &new)(error)),
            _ => {}
        }
        // Whoever waits until the first accepts finds the other accepting, too.
        let task = self.bind_one(&new, TASK_SOCKET)?;
        let control = self.bind_one(&new, CONTROL_SOCKET)?;
        fs::remove_dir(&new).map_err(Error::io("remove", &new))?;
        Ok((control, task))
    }

    /// The sockets of the worker before this one, out of what is `parked`; or new ones, which are parked together with the lock. The keeper
    /// accepts Task connections, `connections` tells which.
    ///
    /// # Errors
    /// As for [`Self::bind`]; [`Error::Failed`] when the keeper is gone.
    pub fn bind_kept(
        &self,
        keeper: &Keeper,
        parked: &mut BTreeMap<String, Vec<OwnedFd>>,
        connections: UnboundedReceiver<Parked>,
    ) -> Result<Sockets> {
        let failed = || Error::failed("leave the sockets with the keeper");
        let mut earlier = |name: &str| parked.remove(name)?.pop().filter(|_| self.path.join(name).exists());
        if let (Some(control), Some(_)) = (earlier(CONTROL_SOCKET), earlier(TASK_SOCKET)) {
            let mut bound = self.bound.lock().unwrap_or_else(PoisonError::into_inner);
            bound.extend([CONTROL_SOCKET, TASK_SOCKET]);
            let control = UnixListener::from_std(control.into()).map_err(failed())?;
            // Known to a keeper that has started this worker after another; not to one that has them from systemd.
            keeper.accept(TASK_SOCKET).map_err(failed())?;
            return Ok(Sockets { control, task: TaskSocket::Kept(keeper.clone(), connections) });
        }
        let (control, task) = self.bind_both()?;
        let park = || {
            keeper.park(LOCK, &[self.lock.as_fd()])?;
            keeper.park(CONTROL_SOCKET, &[control.as_fd()])?;
            keeper.park(TASK_SOCKET, &[task.as_fd()])?;
            keeper.accept(TASK_SOCKET)
        };
        park().map_err(failed())?;
        Ok(Sockets { control, task: TaskSocket::Kept(keeper.clone(), connections) })
    }

    fn bind_one(&self, new: &Path, name: &'static str) -> Result<UnixListener> {
        let (made, path) = (new.join(name), self.path.join(name));
        if fs::symlink_metadata(&path).is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(Error::invalid(
                "state directory",
                format!("{} is in the way: it is no socket; move it", path.display()),
            ));
        }
        match fs::remove_file(&made) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io("remove", &made)(error)),
            _ => {}
        }
        // In a private directory until nobody but root can connect; the rename replaces an old socket without a gap.
        let listener = UnixListener::bind(&made).map_err(Error::io("bind", &made))?;
        fs::set_permissions(&made, fs::Permissions::from_mode(0o600)).map_err(Error::io("change the mode of", &made))?;
        fs::rename(&made, &path).map_err(Error::io("rename a socket to", &path))?;
        self.bound.lock().unwrap_or_else(PoisonError::into_inner).push(name);
        Ok(listener)
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        let mut bound = std::mem::take(self.bound.get_mut().unwrap_or_else(PoisonError::into_inner));
        bound.sort_unstable();
        bound.dedup();
        for name in bound {
            let path = self.path.join(name);
            if let Err(error) = fs::remove_file(&path) {
                warn!(path = %path.display(), %error, "cannot remove a socket");
            }
        }
    }
}

/// Why [`serve`] has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It was stopped: nothing is in flight any more.
    Stopped,
    /// Another worker is to take over. The process has to end as it is: what it has open is not its own any more.
    Left,
}

/// Serves until `stop`, then lets operations finish, and says in the log which did not; or until it is to leave for another worker.
///
/// # Errors
/// [`Error::Invalid`] on any but a current-thread runtime, where streams would lose their order (see [`connection`]);
/// [`Error::Failed`] when the gRPC server breaks down.
pub async fn serve(state: &StateDir, sockets: Sockets, parts: Parts, stop: CancellationToken) -> Result<Served> {
    if Handle::current().runtime_flavor() != RuntimeFlavor::CurrentThread {
        return Err(Error::invalid("runtime", "sockets are to be served on a current-thread runtime"));
    }
    let Parts { registry, hub, events, workers, containerd, configured, upgrades, grace, look_interval } = parts;
    let (hush, leave) = (Hush::default(), upgrades.as_ref().map(Upgrades::leave).unwrap_or_default());
    // No more gRPC connections or calls on them.
    let parted = CancellationToken::new();
    let calls = Calls::new(workers);
    let silence = CancellationToken::new();
    let publisher = tokio::spawn(events::publish(events::address(&containerd), events, silence.clone()));

    let tidier = tokio::spawn(tidy(calls.clone()));
    let memory = state.path().join(LISTED);
    let comparison = Comparison::new(containerd.clone(), memory.clone());
    let gc = Gc { containerd: containerd.clone(), memory: memory.clone(), comparison: comparison.clone() };
    let looking = forgotten::collect(containerd, memory, comparison.clone(), registry.clone(), calls.clone(), look_interval);
    let collector = tokio::spawn(looking);

    let task = TaskService::new(registry.clone(), calls.clone(), comparison);
    let task_limit = task_connections();
    let source = match sockets.task {
        TaskSocket::Ours(listener) => Source::Listener(Acceptor::new(listener, task_limit)),
        TaskSocket::Kept(keeper, connections) => Source::Keeper(Kept::new(keeper, connections, hush.clone(), task_limit)),
    };
    let tasks = tokio::spawn(connection::serve(source, task, hub, stop.clone()));

    let acceptor = Acceptor::new(sockets.control, CONTROL_CONNECTIONS);
    let incoming = futures::stream::unfold(acceptor, |acceptor| async {
        let connection = acceptor.accept().await;
        Some((Ok::<_, io::Error>(connection), acceptor))
    });
    let controller = Controller::new(registry.clone(), calls.clone(), &state.path.join(TASK_SOCKET));
    let control = tonic::transport::Server::builder()
        .add_service(ControllerServer::new(controller))
        .add_service(AdminServer::new(Admin::new(registry.clone(), calls.clone(), gc, upgrades, configured)))
        .serve_with_incoming_shutdown(incoming, parted.clone().cancelled_owned());
    let mut control = tokio::spawn(control);

    let broken = tokio::select! {
        () = stop.cancelled() => None,
        ended = &mut control => Some(ended),
        () = leave.cancelled() => {
            parted.cancel();
            hand_over(&calls, control, &hush, &registry, grace).await;
            // What is not sent in time is saved, and sent by the next worker.
            silence.cancel();
            if timeout(FLUSH, publisher).await.is_err() {
                info!("events are left to the next worker");
            }
            return Ok(Served::Left);
        }
    };
    parted.cancel();
    info!("stopping: no more calls; containers keep running");
    stop.cancel();
    calls.stop();
    for call in calls.drain(grace).await {
        warn!(call, "a call did not finish in time");
    }
    for sandbox in registry.drain(grace).await {
        warn!(sandbox_id = %sandbox, "an operation of a sandbox did not finish in time");
    }
    tidier.abort();
    collector.abort();
    silence.cancel();
    for (what, task) in [("the publisher of events", publisher), ("the Task socket", tasks)] {
        match timeout(FLUSH, task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!(%error, "{what} broke down"),
            Err(_) => warn!("{what} did not end in time"),
        }
    }
    settle().await;
    let ended = match broken {
        Some(ended) => Some(ended),
        None => timeout(FLUSH, control).await.inspect_err(|_| warn!("the gRPC server did not end in time")).ok(),
    };
    match ended {
        Some(Ok(Err(error))) => Err(Error::failed("serve gRPC")(error)),
        Some(Err(error)) => Err(Error::failed("serve gRPC")(error)),
        Some(Ok(Ok(()))) | None => Ok(Served::Stopped),
    }
}

/// Finishes what is in flight without refusing anything: what comes meanwhile waits in the sockets, which stay open.
///
/// gRPC first, while Task requests are still read, because those calls cannot be begun again by another worker and some take long.
async fn hand_over<T>(calls: &Calls, control: JoinHandle<T>, hush: &Hush, registry: &Registry, grace: Duration) {
    calls.part();
    if timeout(grace, control).await.is_err() {
        warn!("gRPC calls did not finish in time");
    }
    hush.begin();
    settle().await;
    for call in calls.drain(HAND_OVER).await {
        info!(call, "a call is left to the next worker");
    }
    for sandbox in registry.drain(HAND_OVER).await {
        info!(sandbox_id = %sandbox, "an operation of a sandbox is left to the next worker");
    }
    settle().await;
    info!("leaving");
}

/// Requests and answers pass through a few tasks on this thread; each gets its turns.
async fn settle() {
    for _ in 0..64 {
        yield_now().await;
    }
}

/// Gives back what calls have left free, and now and then what they, or the start, have needed of the program.
async fn tidy(calls: Calls) {
    loop {
        let forgotten = Instant::now();
        sleep(TIDY).await;
        sys::forget_program();
        while forgotten.elapsed() < FORGET {
            calls.begun().await;
            sleep(TIDY).await;
            sys::give_memory_back();
        }
    }
}

fn task_connections() -> usize {
    let (least, most) = TASK_CONNECTIONS;
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(least, |(soft, _)| soft);
    usize::try_from((descriptors / 2 / OF_CONNECTION).clamp(least, most)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;

    use super::*;

    #[tokio::test]
    async fn a_state_directory_has_one_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = StateDir::claim(&path).unwrap();
        let error = StateDir::claim(&path).unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        assert!(error.report().contains(&format!("process {}", std::process::id())), "{}", error.report());
        drop(first);
        StateDir::claim(&path).unwrap();
    }

    #[tokio::test]
    async fn sockets_are_private_and_replace_stale_ones() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::claim(dir.path()).unwrap();
        drop(state.bind().unwrap());
        let _sockets = state.bind().unwrap();
        for name in [CONTROL_SOCKET, TASK_SOCKET] {
            let path = state.path().join(name);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            tokio::net::UnixStream::connect(&path).await.unwrap();
        }
        assert!(!state.path().join(NEW).exists());
    }

    #[tokio::test]
    async fn what_is_no_socket_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::claim(dir.path()).unwrap();
        let precious = state.path().join(TASK_SOCKET);
        fs::write(&precious, "x").unwrap();
        assert_eq!(state.bind().unwrap_err().code(), Code::InvalidArgument);
        assert_eq!(fs::read(&precious).unwrap(), b"x");
    }
}
