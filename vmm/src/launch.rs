//! Starting the VMM and its helpers: without root's powers, in the pod's control group from the first instruction on, with the
//! descriptors they need and no others, and such that a later daemon can take them over.
//!
//! ```text
//!   posix_spawn ─▶ [unshare --user] ─▶ sh, waits ─▶ setpriv ─▶ the program
//!                                        ▲
//!        moved into the control group, ids mapped, limits set
//! ```
//!
//! All of it is one process, so its identity is known before the program runs. A pipe holds it at the shell: whatever the daemon does to
//! the process is done before the program can fork or take memory, on cgroup v1 too, where a process cannot be born in a group. When the
//! daemon dies meanwhile, the pipe closes and the program never runs.
//!
//! Descriptors are passed by posix_spawn's own dup2, never by clearing close-on-exec in this process, where any other child started at
//! the same moment would inherit a guest's disks.

use std::{
    collections::VecDeque,
    ffi::{CString, OsStr, OsString},
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kuasar_sandboxers::{
    Error, Result,
    cgroup::{self, Cgroup},
    limits,
    process::{Ending, Exiting, Identity, Tracked},
    reaper::Reaper,
    stdio::null_device,
    types::Exit,
};
use nix::{
    fcntl::{OFlag, open},
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::{signal::SigSet, stat::Mode},
    unistd::mkfifo,
};
use rustix::{
    io::fcntl_dupfd_cloexec,
    process::{Pid, Resource, Rlimit, prlimit},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

/// How much of what a program says is kept, in bytes from the end.
pub const LAST_WORDS: usize = 4 << 10;

/// What a program may say within [`BREATH`] before it is not listened to until that is over: a guest can make it talk.
const TALK: usize = 1 << 20;

/// What a pipe holds, unless someone changes that.
const PIPE: usize = 64 << 10;

/// See [`TALK`].
const BREATH: Duration = Duration::from_secs(1);

/// How long a process may take from its start to the gate, and to its end after SIGKILL: longer only when the node is beyond help.
const LIMIT: Duration = Duration::from_secs(20);

/// The first number of descriptors that a program is given.
const FIRST_FD: RawFd = 10;

/// Numbers that only the shell at the gate sees: where it says that it is there, and where it waits.
const READY_FD: RawFd = 8;
const GATE_FD: RawFd = 9;

/// Waits at the gate. 125 is env(1)'s and setpriv(1)'s own "could not".
const GATE: &str = "cd / && echo >&8 && exec 8>&- && read -r _ <&9 && exec 9<&- && exec \"$@\" || exit 125";

/// What a program keeps of root's powers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privileges {
    /// None: no capability, whoever it runs as.
    None,
    /// All, over a user namespace of its own in which every id is itself: files of any owner, but nothing of the host's.
    OwnNamespace,
    /// The daemon's, except for new ones.
    Kept,
}

/// A program to be started.
#[derive(Debug)]
pub struct Launch {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    fds: Vec<Arc<OwnedFd>>,
    cgroup: Option<Cgroup>,
    user: Option<(u32, u32)>,
    groups: Vec<u32>,
    privileges: Privileges,
    open_files: Option<u64>,
}

/// What [`Launched::adopt`] needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaunchRecord {
    /// As given to [`Launch::new`].
    pub name: String,
    /// The process.
    pub process: Identity,
}

/// A program that was started, by this daemon or an earlier one.
#[derive(Debug)]
pub struct Launched {
    record: LaunchRecord,
    process: Option<Arc<Tracked>>,
    ending: Arc<Ending>,
    words: Arc<Words>,
}

/// Finds a program: named by an environment variable, or of that name in `PATH`, or at one of the places where distributions put it.
///
/// # Errors
/// [`Error::Unavailable`], naming the variable, when there is none.
pub fn find_program(name: &str, variable: &str, places: &[&str]) -> Result<PathBuf> {
    let unavailable = |why| Error::Unavailable { what: name.into(), why };
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        if is_program(&path) {
            return Ok(path);
        }
        return Err(unavailable(format!("{variable} says {}, which is no program", path.display())));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(|path| is_program(path));
    found
        .or_else(|| places.iter().map(PathBuf::from).find(|path| is_program(path)))
        .ok_or_else(|| unavailable(format!("it is not in PATH{}; install it, or name it in {variable}", also(places))))
}

fn also(places: &[&str]) -> String {
    if places.is_empty() { String::new() } else { format!(", nor at {}", places.join(" or ")) }
}

pub(crate) fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

impl Launch {
    /// A program; `name` is unique among those of its directory, and a file name.
    #[must_use]
    pub fn new(name: impl Into<String>, program: &Path) -> Self {
        Self {
            name: name.into(),
            program: program.to_owned(),
            args: Vec::new(),
            fds: Vec::new(),
            cgroup: None,
            user: None,
            groups: Vec::new(),
            privileges: Privileges::None,
            open_files: None,
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = A>) -> &mut Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Gives it a descriptor; returns the number it has there.
    pub fn pass(&mut self, fd: impl Into<Arc<OwnedFd>>) -> RawFd {
        self.fds.push(fd.into());
        FIRST_FD + self.fds.len() as RawFd - 1
    }

    /// Puts it into a control group before it runs.
    pub fn cgroup(&mut self, cgroup: Option<Cgroup>) -> &mut Self {
        self.cgroup = cgroup;
        self
    }

    /// Runs it as a user and group, and in no other groups than `groups`; `None`: as this daemon.
    pub fn user(&mut self, user: Option<(u32, u32)>, groups: &[u32]) -> &mut Self {
        self.user = user;
        self.groups = groups.to_vec();
        self
    }

    /// What it keeps of root's powers; none, if this is not called.
    pub fn privileges(&mut self, privileges: Privileges) -> &mut Self {
        self.privileges = privileges;
        self
    }

    /// How many files it may open, if this daemon may allow so many.
    pub fn open_files(&mut self, count: u64) -> &mut Self {
        self.open_files = Some(count);
        self
    }

    /// The program's arguments, as far as they are known.
    #[must_use]
    pub fn arguments(&self) -> &[OsString] {
        &self.args
    }

    fn command_line(&self) -> Result<Vec<CString>> {
        let mut line: Vec<OsString> = Vec::new();
        let mut say = |words: &[&OsStr]| line.extend(words.iter().map(|word| (*word).to_owned()));
        if self.privileges == Privileges::OwnNamespace {
            let unshare = find_program("unshare", "KUASAR_UNSHARE", &["/usr/bin/unshare"])?;
            say(&[unshare.as_os_str(), "--user".as_ref(), "--".as_ref()]);
        }
        say(&["/bin/sh".as_ref(), "-c".as_ref(), GATE.as_ref(), "sh".as_ref()]);
        let setpriv = find_program("setpriv", "KUASAR_SETPRIV", &["/usr/bin/setpriv"])?;
        say(&[setpriv.as_os_str(), "--no-new-privs".as_ref()]);
        if let Some((uid, gid)) = self.user {
            say(&[format!("--reuid={uid}").as_ref(), format!("--regid={gid}").as_ref()]);
            let groups = self.groups.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            let groups = if groups.is_empty() { "--clear-groups".into() } else { format!("--groups={groups}") };
            say(&[groups.as_ref()]);
        }
        // Without the bounding set no program that is executed gets any, not even as root.
        if self.privileges == Privileges::None && nix::unistd::geteuid().is_root() {
            say(&["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"].map(OsStr::new));
        }
        say(&["--".as_ref(), self.program.as_os_str()]);
        line.extend(self.args.iter().cloned());
        let words = line.iter().map(|word| CString::new(word.as_bytes()));
        words.collect::<Result<_, _>>().map_err(Error::failed(format!("make the command line of {}", self.program.display())))
    }

    /// Starts it; returns when the program itself is about to run. `dir` is where the pipe for its words is made.
    ///
    /// # Errors
    /// When it cannot be started or put where it should be. Nothing is left running then.
    pub async fn start(self, dir: &Path, reaper: &Reaper) -> Result<Launched> {
        if self.cgroup.is_some() {
            cgroup::expect_move();
        }
        let (words, said) = Words::create(dir, &self.name)?;
        let result = self.spawn(words, said, reaper).await;
        if result.is_err() {
            Words::remove(dir, &self.name)?;
        }
        result
    }

    async fn spawn(&self, words: Words, said: OwnedFd, reaper: &Reaper) -> Result<Launched> {
        let line = self.command_line()?;
        let pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(Error::failed("make a pipe"));
        let ((ready, ready_theirs), (gate_theirs, gate)) = (pipe()?, pipe()?);
        let null = null_device()?;
        let said = Arc::new(said);
        let mut given = vec![(Arc::new(null), 0), (said.clone(), 1), (said, 2)];
        given.extend([(Arc::new(ready_theirs), READY_FD), (Arc::new(gate_theirs), GATE_FD)]);
        given.extend(self.fds.iter().cloned().zip(FIRST_FD..));

        let mark = reaper.mark();
        let pid = posix_spawn_with(&line, &given).map_err(Error::io("start", &self.program))?;
        drop(given);
        // From here on the process ends when `gate` is closed without a word.
        let exit = reaper.exit_of(pid, mark);
        let process = Tracked::open(pid)?;
        let identity = process.as_ref().map(Tracked::identity);
        let record = LaunchRecord { name: self.name.clone(), process: identity.unwrap_or(Identity { pid, start: 0 }) };
        let launched = Launched::watch(record, process, Exiting::Ours(exit), words);
        let at_gate = async {
            let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(Error::failed("watch a pipe"))?;
            match timeout(LIMIT, ready.read_u8()).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(_)) => Err(launched.failure("start", LIMIT).await),
                Err(_) => Err(Error::TimedOut { operation: format!("the start of {}", self.name), seconds: LIMIT.as_secs() }),
            }
        };
        let prepared = match at_gate.await {
            Ok(()) => self.prepare(pid).await,
            Err(error) => Err(error),
        };
        if let Err(error) = prepared {
            launched.kill().await?;
            return Err(error);
        }
        nix::unistd::write(&gate, b"\n")
            .map_err(|errno| Error::failed(format!("start {}", self.name))(io::Error::from(errno)))?;
        Ok(launched)
    }

    /// While it stands at the gate.
    async fn prepare(&self, pid: u32) -> Result<()> {
        limits::make_ordinary(pid)?;
        if let Some(cgroup) = self.cgroup.clone() {
            // The kernel may wait for tens of milliseconds.
            tokio::task::spawn_blocking(move || cgroup.add(pid)).await.map_err(Error::failed("move a process"))??;
        }
        if self.privileges == Privileges::OwnNamespace {
            // Every id but the last, which is none.
            for map in ["uid_map", "gid_map"] {
                let path = PathBuf::from(format!("/proc/{pid}/{map}"));
                fs::write(&path, "0 0 4294967295\n").map_err(Error::io("write", path))?;
            }
        }
        if let Some(count) = self.open_files {
            let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
            let limit = |count| Rlimit { current: Some(count), maximum: Some(count) };
            // Raising the hard limit takes CAP_SYS_RESOURCE, which a daemon in a container may lack: then what there is must do.
            if let Err(error) = prlimit(raw, Resource::Nofile, limit(count)) {
                let most = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(count).min(count);
                warn!(%error, wanted = count, got = most, program = self.name, "cannot raise the limit of open files");
                prlimit(raw, Resource::Nofile, limit(most))
                    .map_err(|errno| Error::failed("limit open files")(io::Error::from(errno)))?;
            }
        }
        Ok(())
    }
}

fn failed_to_open(path: impl Into<PathBuf>) -> impl FnOnce(nix::errno::Errno) -> Error {
    let failed = Error::io("open", path);
    move |errno| failed(io::Error::from(errno))
}

/// posix_spawn(3) with these descriptors at these numbers and no others, with no signal blocked or ignored, in a process group of its own
/// (a terminal's interrupt is meant for the daemon), and with `PATH` as its whole environment.
fn posix_spawn_with(line: &[CString], given: &[(Arc<OwnedFd>, RawFd)]) -> io::Result<u32> {
    // Away from the numbers that are going to be taken: dup2 would close one that is still needed.
    let above = FIRST_FD + given.len() as RawFd;
    let mut actions = PosixSpawnFileActions::init()?;
    let copies = given.iter().map(|(fd, number)| Ok((fcntl_dupfd_cloexec(fd, above)?, *number)));
    let copies = copies.collect::<io::Result<Vec<_>>>()?;
    for (fd, number) in &copies {
        actions.add_dup2(fd.as_raw_fd(), *number)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_pgroup(nix::unistd::Pid::from_raw(0))?;
    let flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
        | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
        | PosixSpawnFlags::POSIX_SPAWN_SETPGROUP;
    attributes.set_flags(flags)?;
    let Some(program) = line.first() else { return Err(io::Error::from(io::ErrorKind::InvalidInput)) };
    let environment = [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];
    let pid = posix_spawn(program.as_c_str(), &actions, &attributes, line, &environment)?;
    Ok(pid.as_raw().unsigned_abs())
}

impl Launched {
    /// Takes hold of a process that an earlier daemon has started; one that has ended is no error.
    ///
    /// # Errors
    /// When the kernel does not tell of it.
    pub fn adopt(record: LaunchRecord, dir: &Path, reaper: &Reaper) -> Result<Self> {
        let process = Tracked::find(record.process)?;
        let exiting = Exiting::adopted(record.process, process.as_ref(), reaper);
        let words = Words::open(dir, &record.name)?;
        Ok(Self::watch(record, process, exiting, words))
    }

    fn watch(record: LaunchRecord, process: Option<Tracked>, exiting: Exiting, words: Words) -> Self {
        let (process, ending, words) = (process.map(Arc::new), Arc::new(Ending::pending()), Arc::new(words));
        let (held, told) = (process.clone(), ending.clone());
        tokio::spawn(async move { told.tell(exiting.of(held.as_deref()).await) });
        tokio::spawn(words.clone().listen(record.name.clone()));
        Self { record, process, ending, words }
    }

    /// What [`Self::adopt`] needs.
    #[must_use]
    pub fn record(&self) -> LaunchRecord {
        self.record.clone()
    }

    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.record.process.pid
    }

    /// Resolves when it has ended.
    pub async fn exited(&self) -> Exit {
        self.ending.wait().await
    }

    /// How it has ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        self.ending.known()
    }

    /// Sends it a signal. One that has ended is an error.
    ///
    /// # Errors
    /// [`Error::Finished`] then.
    pub fn signal(&self, signal: i32) -> Result<()> {
        let sent = self.process.as_ref().map(|process| process.signal(signal)).transpose()?;
        if sent == Some(true) { Ok(()) } else { Err(Error::Finished { id: self.record.name.clone() }) }
    }

    /// The last it said, at most [`LAST_WORDS`] bytes; `None` when it said nothing.
    #[must_use]
    pub fn last_words(&self) -> Option<String> {
        self.words.last()
    }

    /// Kills it and the processes it has forked, and waits until they are gone.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when it does not go, which is the kernel's doing.
    pub async fn kill(&self) -> Result<()> {
        if let Some(process) = self.process.as_ref().filter(|_| self.exit().is_none()) {
            // virtiofsd's parent only waits for its child, which is what holds the mounts.
            let children = children(self.pid())?;
            for one in children.iter().chain([process.as_ref()]) {
                one.signal(libc::SIGKILL)?;
            }
            let gone = async {
                for child in &children {
                    child.ended().await?;
                }
                self.exited().await;
                Ok::<_, Error>(())
            };
            let operation = || format!("the end of {}, process {}", self.record.name, self.pid());
            timeout(LIMIT, gone).await.map_err(|_| Error::TimedOut { operation: operation(), seconds: LIMIT.as_secs() })??;
        }
        self.words.forget()
    }

    /// Why it did not do `what`: its own words, or how it ended, for which at most `limit` is waited.
    pub async fn failure(&self, what: &str, limit: Duration) -> Error {
        let ended = timeout(limit, self.exited()).await;
        let message = match (self.last_words(), ended) {
            (Some(words), _) => words.trim_end().to_owned(),
            (None, Ok(exit)) => format!("it ended with status {} and said nothing", exit.status),
            (None, Err(_)) => "it said nothing".into(),
        };
        Error::Backend { program: self.record.name.clone(), operation: what.into(), message }
    }
}

/// The children of a process, held.
fn children(pid: u32) -> Result<Vec<Tracked>> {
    let path = PathBuf::from(format!("/proc/{pid}/task/{pid}/children"));
    let list = match fs::read_to_string(&path) {
        Ok(list) => list,
        // It is gone, or this kernel has no such list (CONFIG_PROC_CHILDREN).
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    // A pid that is read here is that child's as long as its parent has not waited for it; the parent is ours and only waits at its end.
    let pids = list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok());
    pids.filter_map(|pid| Tracked::open(pid).transpose()).collect()
}

/// What a program says on standard output and error: a FIFO that it holds open for reading too, and without blocking. So it is bounded
/// whatever the guest makes the program say, nobody is killed or held up when no daemon reads, and a later daemon reads on.
#[derive(Debug)]
struct Words {
    path: PathBuf,
    heard: Mutex<Heard>,
    /// A second description of the same pipe, for whoever waits until there is something.
    ready: Mutex<Option<pipe::Receiver>>,
}

#[derive(Debug)]
struct Heard {
    /// `None` when all who could say something are gone.
    pipe: Option<OwnedFd>,
    last: VecDeque<u8>,
}

impl Words {
    fn path(dir: &Path, name: &str) -> PathBuf {
        dir.join(format!("{name}.words"))
    }

    /// Makes the pipe; returns the end for the program, too.
    fn create(dir: &Path, name: &str) -> Result<(Self, OwnedFd)> {
        Self::remove(dir, name)?;
        let path = Self::path(dir, name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| Error::io("create", &path)(io::Error::from(errno)))?;
        let words = Self::open(dir, name)?;
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let theirs = open(&path, flags, Mode::empty()).map_err(failed_to_open(&path))?;
        Ok((words, theirs))
    }

    fn open(dir: &Path, name: &str) -> Result<Self> {
        let path = Self::path(dir, name);
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let pipe = match open(&path, flags, Mode::empty()) {
            Ok(pipe) => Some(pipe),
            // The program was killed, and the file removed.
            Err(nix::errno::Errno::ENOENT) => None,
            Err(errno) => return Err(failed_to_open(&path)(errno)),
        };
        let copy = pipe.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::failed("duplicate a pipe"))?;
        // Refuses what is no pipe.
        let ready = copy.map(pipe::Receiver::from_owned_fd).transpose().map_err(Error::io("read", &path))?;
        let heard = Heard { pipe, last: VecDeque::new() };
        Ok(Self { path, heard: Mutex::new(heard), ready: Mutex::new(ready) })
    }

    fn remove(dir: &Path, name: &str) -> Result<()> {
        remove_file(&Self::path(dir, name))
    }

    fn forget(&self) -> Result<()> {
        remove_file(&self.path)
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        // Every change is complete before anything can panic.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens until there is nobody left to say anything.
    async fn listen(self: Arc<Self>, name: String) {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut ready) = ready else { return };
        let (mut chunk, mut heard) = ([0; 4096], 0);
        loop {
            match ready.read(&mut chunk).await {
                Ok(0) => break,
                Ok(length) => {
                    debug!(program = name, words = %String::from_utf8_lossy(&chunk[..length]).trim_end(), "said");
                    self.heard().keep(&chunk[..length]);
                    heard += length;
                }
                Err(error) => {
                    debug!(program = name, %error, "cannot listen any more");
                    break;
                }
            }
            if heard >= TALK {
                // What does not fit into the pipe meanwhile is lost.
                sleep(BREATH).await;
                heard = 0;
            }
        }
    }

    fn last(&self) -> Option<String> {
        let mut heard = self.heard();
        heard.drain();
        let bytes: Vec<u8> = heard.last.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Some(text).filter(|text| !text.trim().is_empty())
    }
}

impl Heard {
    fn keep(&mut self, chunk: &[u8]) {
        self.last.extend(chunk);
        let excess = self.last.len().saturating_sub(LAST_WORDS);
        self.last.drain(..excess);
    }

    /// Takes what is in the pipe now, which the listener may not have noticed yet; no more than a pipe holds.
    fn drain(&mut self) {
        let mut chunk = [0; 4096];
        let mut left = PIPE;
        while let Some(pipe) = self.pipe.as_ref().filter(|_| left > 0) {
            match nix::unistd::read(pipe, &mut chunk) {
                Ok(length) if length > 0 => {
                    self.keep(&chunk[..length]);
                    left = left.saturating_sub(length);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Ok(_) | Err(_) => break,
            }
        }
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
