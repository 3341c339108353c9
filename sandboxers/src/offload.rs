//! Work on files that a pod names, in a process of its own with a deadline.
//!
//! A system call on a dead NFS or FUSE server does not return. The thread in it cannot be killed, nor can the process that the thread
//! belongs to. So the daemon does not look at volumes and the layers of lazy snapshotters itself: a short-lived helper does, which is this
//! executable again ([`serve`]). Log files have writers of their own ([`stdio`]), which bound their own lives.
//!
//! ```text
//!   daemon ── steps (JSON in a memfd, as standard input) ──▶ helper
//!          ◀── a reply for each step, or the first failure (SOCK_SEQPACKET, as standard output; JSON, maybe a descriptor) ──
//! ```
//!
//! Invariants:
//! - each step has a deadline. At the deadline the helper is killed. One that the kernel does not let go stays until the server answers, and
//!   dies before it does anything else;
//! - a sandbox has at most [`MOST`] helpers, the stuck ones included;
//! - a helper dies with the daemon that started it.
//!
//! Where the executable does not call [`serve`] (the guest's agent, tests) a thread takes the helper's place.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, IoSlice, IoSliceMut, Read, Seek},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileTypeExt,
    },
    path::PathBuf,
    process::{Command, ExitCode},
    sync::{
        Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
    },
    process::{Signal, getppid, set_parent_process_death_signal},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
    time::timeout,
};
use tracing::{debug, info, warn};

use crate::{
    error::{Code, Error, Result},
    limits,
    mount::{self, Showing, Shown},
    process::Tracked,
    reaper::{Child, ExitFuture, Reaper},
    stdio,
    types::Mount,
};

/// Helpers of one sandbox at a time.
pub const MOST: usize = 8;

/// Helpers of all sandboxes that cannot be killed, before no more are started: pods that come and go must not fill the node with them.
const STUCK: usize = 512;

/// How long a file may take to be looked at.
pub(crate) const LOOK: Duration = Duration::from_secs(10);

/// How long a root filesystem may take to be mounted: a lazy snapshotter may fetch it from a registry.
const MOUNT: Duration = Duration::from_secs(60);

/// How long a helper may take to die of SIGKILL before it is reported as stuck.
const DYING: Duration = Duration::from_secs(1);

/// Makes this executable a helper; the value is the pid of the daemon that started it.
const VARIABLE: &str = "KUASAR_OFFLOAD";

/// One reply, in bytes.
const REPLY: usize = 64 << 10;

/// Those that there are of [`STUCK`].
static STUCK_NOW: AtomicUsize = AtomicUsize::new(0);

/// Whether this executable is a helper when it is started as one.
static SERVED: AtomicBool = AtomicBool::new(false);

/// Helpers by sandbox.
static HELPERS: OnceLock<Mutex<HashMap<String, usize>>> = OnceLock::new();

/// Something to do with a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// What it is about, for errors: `volume /data`.
    pub what: String,
    /// The work.
    pub work: Work,
}

/// What a helper can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Mounts a root filesystem, as [`mount::mount_all`].
    Mount {
        /// In order.
        mounts: Vec<Mount>,
        /// The root directory.
        target: PathBuf,
    },
    /// Shows a file or directory elsewhere.
    Show(Showing),
    /// Finds out whether a path names a block device.
    IsBlockDevice(PathBuf),
    /// Opens a device or image for reading, and perhaps for writing.
    OpenDisk {
        /// Of the device or image.
        path: PathBuf,
        /// Not for writing.
        readonly: bool,
    },
}

/// The result of a step.
#[derive(Debug)]
pub enum Done {
    /// There is nothing to tell.
    Nothing,
    /// How it is shown.
    Shown(Shown),
    /// The answer.
    Answer(bool),
    /// The file.
    Opened(OwnedFd),
}

/// As it is sent.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    Nothing,
    Shown(Shown),
    Answer(bool),
    /// The descriptor comes along.
    Opened,
    Failed {
        code: Code,
        report: String,
    },
}

/// Does work on files for one sandbox.
#[derive(Clone, Debug)]
pub struct Offload {
    sandbox: String,
    reaper: Reaper,
}

impl Work {
    fn limit(&self) -> Duration {
        match self {
            Self::Mount { .. } => MOUNT,
            Self::Show(_) | Self::IsBlockDevice(_) | Self::OpenDisk { .. } => LOOK,
        }
    }

    fn perform(&self) -> Result<Done> {
        Ok(match self {
            Self::Mount { mounts, target } => {
                mount::mount_all_now(mounts, target)?;
                Done::Nothing
            }
            Self::Show(showing) => Done::Shown(mount::show_now(showing)?),
            Self::OpenDisk { path, readonly } => {
                let opened = File::options().read(true).write(!readonly).open(path);
                Done::Opened(opened.map_err(Error::io("open", path))?.into())
            }
            Self::IsBlockDevice(path) => {
                Done::Answer(fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()))
            }
        })
    }
}

impl Offload {
    /// For the sandbox of that id. All that name the same sandbox share its limit.
    #[must_use]
    pub fn new(sandbox: impl Into<String>, reaper: &Reaper) -> Self {
        Self { sandbox: sandbox.into(), reaper: reaper.clone() }
    }

    /// Does the steps one after another, each within its deadline, up to the first that fails.
    ///
    /// What steps have done is the caller's to undo, also after a failure.
    ///
    /// # Errors
    /// The step's own; with [`Code::DeadlineExceeded`] when a step does not end, naming what it is about; [`Error::Unavailable`] when too
    /// many helpers of the sandbox are stuck.
    pub async fn run(&self, steps: Vec<Step>) -> Result<Vec<Done>> {
        if steps.is_empty() {
            return Ok(Vec::new());
        }
        let place = Place::take(&self.sandbox)?;
        if is_served() { self.in_helper(steps, place).await } else { in_thread(steps, place).await }
    }

    /// Does one step.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn run_one(&self, what: impl Into<String>, work: Work) -> Result<Done> {
        let done = self.run(vec![Step { what: what.into(), work }]).await?;
        Ok(done.into_iter().next().unwrap_or(Done::Nothing))
    }

    async fn in_helper(&self, steps: Vec<Step>, place: Place) -> Result<Vec<Done>> {
        let failed = || Error::failed("start a helper for work on files");
        let mut request =
            File::from(memfd_create("kuasar-offload", MemfdFlags::CLOEXEC).map_err(io::Error::from).map_err(failed())?);
        serde_json::to_writer(&request, &steps).map_err(io::Error::from).map_err(failed())?;
        request.rewind().map_err(failed())?;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)
            .map_err(failed())?;
        let mut command = Command::new("/proc/self/exe");
        command.env_clear().env(VARIABLE, std::process::id().to_string()).stdin(request).stdout(theirs);
        let child = self.reaper.spawn(&mut command)?;
        // The socket's other end must be the helper's alone, or its end would not be seen.
        drop(command);
        let helper = Helper::new(child, place)?;
        // One that a filesystem holds may stay for long: it is not to be spared when memory is short.
        if let Err(error) = limits::make_ordinary(helper.pid) {
            debug!(error = error.report(), "a helper has the daemon's scores");
        }
        let replies = crate::watch(ours, Interest::READABLE).map_err(failed())?;
        let mut all = Vec::with_capacity(steps.len());
        for Step { what, work } in &steps {
            match timeout(work.limit(), receive(&replies)).await {
                Ok(Ok(Some((reply, descriptor)))) => match done(reply, descriptor) {
                    Ok(done) => all.push(done),
                    Err(error) => return Err(error),
                },
                Ok(Ok(None)) => {
                    return Err(Error::Reported {
                        code: Code::Internal,
                        report: format!("{what} could not be looked at: the helper for it ended early; is memory short?"),
                    });
                }
                Ok(Err(error)) => return Err(failed()(error)),
                Err(_) => {
                    helper.kill(what).await;
                    return Err(no_answer(what, work.limit()));
                }
            }
        }
        Ok(all)
    }
}

/// The error for what has not responded within its limit.
pub(crate) fn no_answer(what: &str, limit: Duration) -> Error {
    let seconds = limit.as_secs();
    let report =
        format!("{what} does not answer: nothing came from its filesystem within {seconds} s; check the server behind it");
    Error::Reported { code: Code::DeadlineExceeded, report }
}

fn done(reply: Reply, descriptor: Option<OwnedFd>) -> Result<Done> {
    match (reply, descriptor) {
        (Reply::Nothing, _) => Ok(Done::Nothing),
        (Reply::Shown(shown), _) => Ok(Done::Shown(shown)),
        (Reply::Answer(answer), _) => Ok(Done::Answer(answer)),
        (Reply::Opened, Some(file)) => Ok(Done::Opened(file)),
        (Reply::Opened, None) => Err(Error::failed("receive a file")("its descriptor did not come along: too many are open")),
        (Reply::Failed { code, report }, _) => Err(Error::Reported { code, report }),
    }
}

/// A helper that runs, and one of its sandbox's places as long as it does.
struct Helper {
    pid: u32,
    process: Option<Tracked>,
    exit: Option<(ExitFuture, Place)>,
}

impl Helper {
    fn new(child: Child, place: Place) -> Result<Self> {
        Ok(Self { pid: child.pid, process: Tracked::open(child.pid)?, exit: Some((child.exit, place)) })
    }

    /// Ends it, without waiting for longer than [`DYING`].
    async fn kill(mut self, what: &str) {
        self.signal();
        let Some((mut exit, place)) = self.exit.take() else { return };
        if timeout(DYING, &mut exit).await.is_ok() {
            return;
        }
        let stuck = Stuck::new(what.to_owned(), place);
        tokio::spawn(async move {
            exit.await;
            stuck.has_ended();
        });
    }

    fn signal(&self) {
        if let Some(Err(error)) = self.process.as_ref().map(|process| process.signal(libc::SIGKILL)) {
            warn!(error = error.report(), pid = self.pid, "cannot kill a helper");
        }
    }
}

impl Drop for Helper {
    /// Its work is done, has failed, or is not waited for any more.
    fn drop(&mut self) {
        let Some((exit, place)) = self.exit.take() else { return };
        self.signal();
        tokio::spawn(async move {
            exit.await;
            drop(place);
        });
    }
}

/// A helper or log writer that waits for a filesystem and cannot be ended.
pub(crate) struct Stuck {
    what: String,
    _place: Place,
}

impl Stuck {
    fn new(what: String, place: Place) -> Self {
        warn!(what, "a filesystem does not respond: the process that waits for it stays until it does");
        STUCK_NOW.fetch_add(1, Ordering::Relaxed);
        Self { what, _place: place }
    }

    /// Counts one of a sandbox that has become stuck without a place of its own.
    pub(crate) fn count(what: String, sandbox: &str) -> Self {
        *helpers().entry(sandbox.to_owned()).or_default() += 1;
        Self::new(what, Place(sandbox.to_owned()))
    }

    pub(crate) fn has_ended(self) {
        info!(what = self.what, "the process that waited for a filesystem has ended");
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        STUCK_NOW.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A sandbox's right to one more helper.
#[derive(Debug)]
pub(crate) struct Place(String);

fn helpers() -> MutexGuard<'static, HashMap<String, usize>> {
    // A number is changed whole.
    HELPERS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    pub(crate) fn take(sandbox: &str) -> Result<Self> {
        if STUCK_NOW.load(Ordering::Relaxed) >= STUCK {
            return Err(Error::Unavailable {
                what: "the storage of this node".into(),
                why: format!("{STUCK} helpers are blocked on volumes that do not respond; check their NFS or FUSE servers"),
            });
        }
        let mut helpers = helpers();
        let count = helpers.entry(sandbox.to_owned()).or_default();
        if *count >= MOST {
            return Err(Error::Unavailable {
                what: format!("the storage of sandbox {sandbox}"),
                why: format!("{MOST} helpers are blocked on volumes that do not respond; check their NFS or FUSE servers"),
            });
        }
        *count += 1;
        Ok(Self(sandbox.to_owned()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut helpers = helpers();
        if let Some(count) = helpers.get_mut(&self.0) {
            *count -= 1;
            if *count == 0 {
                helpers.remove(&self.0);
            }
        }
    }
}

/// The same on a thread, which is abandoned at the deadline.
async fn in_thread(steps: Vec<Step>, place: Place) -> Result<Vec<Done>> {
    let (sender, mut results) = mpsc::unbounded_channel();
    let mut all = Vec::with_capacity(steps.len());
    let work = {
        let steps = steps.clone();
        move || {
            for step in steps {
                let result = step.work.perform();
                let failed = result.is_err();
                if sender.send(result).is_err() || failed {
                    break;
                }
            }
            drop(place);
        }
    };
    std::thread::Builder::new()
        .name("offload".into())
        .spawn(work)
        .map_err(Error::failed("start a thread for work on files"))?;
    for Step { what, work } in &steps {
        match timeout(work.limit(), results.recv()).await {
            Ok(Some(result)) => all.push(result?),
            Ok(None) => return Err(Error::failed("work on files")(format!("the thread for {what} panicked"))),
            Err(_) => return Err(no_answer(what, work.limit())),
        }
    }
    Ok(all)
}

async fn receive(replies: &AsyncFd<OwnedFd>) -> io::Result<Option<(Reply, Option<OwnedFd>)>> {
    loop {
        let mut ready = replies.readable().await?;
        if let Ok(received) = ready.try_io(|socket| receive_now(socket.get_ref())) {
            return received;
        }
    }
}

fn receive_now(socket: &OwnedFd) -> io::Result<Option<(Reply, Option<OwnedFd>)>> {
    let mut bytes = vec![0; REPLY];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags))?;
    let mut descriptor = None;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            descriptor = descriptors.last();
        }
    }
    // A reply is never empty.
    if received.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes[..received.bytes])?, descriptor)))
}

/// Whether this executable is its own helper.
pub(crate) fn is_served() -> bool {
    SERVED.load(Ordering::Relaxed)
}

/// Does a helper's work, or a log writer's, if this process was started as one; to be called first in `main`. Otherwise this executable is
/// taken as the helper from now on.
#[must_use]
pub fn serve() -> Option<ExitCode> {
    if let Some(ended) = stdio::serve_log() {
        return Some(ended);
    }
    let Some(daemon) = std::env::var_os(VARIABLE) else {
        SERVED.store(true, Ordering::Relaxed);
        return None;
    };
    let daemon = daemon.to_str().and_then(|pid| pid.parse().ok());
    Some(match help(daemon) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kuasard: a helper for work on files failed: {error}");
            ExitCode::FAILURE
        }
    })
}

fn help(daemon: Option<i32>) -> io::Result<()> {
    // What is mounted for a daemon that is gone would be in the way of the next one.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid().map(|parent| parent.as_raw_nonzero().get()) != daemon {
        return Ok(());
    }
    let mut request = Vec::new();
    io::stdin().lock().read_to_end(&mut request)?;
    let steps: Vec<Step> = serde_json::from_slice(&request)?;
    for step in steps {
        let (reply, descriptor) = match step.work.perform() {
            Ok(Done::Nothing) => (Reply::Nothing, None),
            Ok(Done::Shown(shown)) => (Reply::Shown(shown), None),
            Ok(Done::Answer(answer)) => (Reply::Answer(answer), None),
            Ok(Done::Opened(file)) => (Reply::Opened, Some(file)),
            Err(error) => {
                let mut report = error.report();
                // A reply has a limit, and a path may be long.
                report.truncate((0..=report.len().min(REPLY / 8)).rev().find(|at| report.is_char_boundary(*at)).unwrap_or(0));
                (Reply::Failed { code: error.code(), report }, None)
            }
        };
        send(&reply, descriptor.as_ref())?;
        if matches!(reply, Reply::Failed { .. }) || is_alone()? {
            break;
        }
    }
    Ok(())
}

fn send(reply: &Reply, descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let bytes = serde_json::to_vec(reply)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.into_iter().map(AsFd::as_fd).collect();
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let stdout = io::stdout();
    rustix::io::retry_on_intr(|| sendmsg(&stdout, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Whether the daemon does not listen any more.
fn is_alone() -> io::Result<bool> {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default()))?;
    Ok(fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR))
}
