//! Files that are passed to the runtime.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use kuasar_sandboxers::{Error, Result, process::Tracked, reaper::Reaper};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use rustix::fs::{FallocateFlags, fallocate};
use tokio::time::timeout;
use tracing::warn;

use super::launch;

/// How much of what a program says is read, in bytes.
const OUTPUT_LIMIT: u64 = 1 << 20;

/// A file without a name, in memory. A program opens it through [`Self::path`], so no descriptor has to be inherited (which every other child started
/// at the same moment would inherit too) and nothing has to be removed afterwards.
#[derive(Debug)]
pub(crate) struct MemoryFile(File);

impl MemoryFile {
    /// An empty file.
    pub(crate) fn empty(name: &str) -> Result<Self> {
        let create = || memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING);
        let fd: OwnedFd =
            create().map_err(io::Error::from).map_err(Error::failed(format!("make a file in memory for {name}")))?;
        Ok(Self(fd.into()))
    }

    fn filled(mut self, name: &str, content: &[u8]) -> Result<Self> {
        let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
        let fill = self.0.write_all(content).and_then(|()| Ok(fcntl(&self.0, FcntlArg::F_ADD_SEALS(seals))?));
        fill.map_err(Error::failed(format!("fill a file in memory for {name}")))?;
        Ok(self)
    }

    /// A sealed file that can be executed: through [`Self::path`].
    pub(crate) fn executable(name: &str, content: &[u8]) -> Result<Self> {
        // Linux 6.3 wants to be told whether a file in memory is a program, and may be set to refuse those that do not say
        // (`vm.memfd_noexec`); older kernels do not know the flag.
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let said = flags | MFdFlags::from_bits_retain(libc::MFD_EXEC);
        let file = match memfd_create(name, said) {
            Err(Errno::EINVAL) => memfd_create(name, flags),
            made => made,
        };
        let file = file.map_err(io::Error::from).map_err(Error::failed(format!("make a file in memory for {name}")))?;
        Self(file.into()).filled(name, content)
    }

    /// Where other processes of this pid namespace find it while it is open here.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    /// Another descriptor for it, to be a child's standard error.
    pub(crate) fn descriptor(&self) -> Result<OwnedFd> {
        Ok(self.0.try_clone().map_err(Error::failed("duplicate a descriptor"))?.into())
    }

    /// The last `limit` bytes, as text.
    pub(crate) fn tail(&self, limit: u64) -> Result<String> {
        tail(&self.0, limit).map_err(Error::failed("read a file in memory"))
    }
}

fn tail(mut file: &File, limit: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A file for one call, removed with this. It has a name of its own, which the runtime finds even when this process has died meanwhile:
/// one that cannot open its log says so on its standard error, which is a container's. On a full disk it is in memory all the same,
/// because containers must be removable then.
#[derive(Debug)]
pub(crate) struct CallFile {
    path: PathBuf,
    file: File,
    named: bool,
}

/// How much a [`CallFile`] can hold in any case, in bytes.
const ROOM: u64 = 4096;

/// How the names of [`CallFile`]s begin.
const CALL: &str = ".call-";

impl CallFile {
    pub(crate) fn new(dir: &Path, content: &[u8]) -> Result<Self> {
        let mut file = match Self::named(dir) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::StorageFull => Self::unnamed()?,
            made => made?,
        };
        if let Err(error) = file.file.write_all(content) {
            if error.kind() != io::ErrorKind::StorageFull {
                return Err(Error::io("write", &file.path)(error));
            }
            file = Self::unnamed()?;
            file.file.write_all(content).map_err(Error::failed("fill a file in memory"))?;
        }
        Ok(file)
    }

    fn named(dir: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let path = dir.join(format!("{CALL}{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        // One of that name is what a daemon that has died left behind.
        let create = || File::options().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path);
        let file = Self { file: create().map_err(Error::io("create", &path))?, path, named: true };
        // When the disk gets full during the call, there is still room for what the runtime says of that.
        fallocate(&file.file, FallocateFlags::KEEP_SIZE, 0, ROOM)
            .map_err(|errno| Error::io("write", &file.path)(errno.into()))?;
        Ok(file)
    }

    fn unnamed() -> Result<Self> {
        let file = MemoryFile::empty("call")?;
        Ok(Self { path: file.path(), file: file.0, named: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The last `limit` bytes, as text.
    pub(crate) fn tail(&self, limit: u64) -> Result<String> {
        tail(&self.file, limit).map_err(Error::io("read", &self.path))
    }
}

impl Drop for CallFile {
    fn drop(&mut self) {
        if self.named {
            // What remains goes with the directory.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes those that a daemon has left in a directory when it died.
pub(crate) fn remove_call_files(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        // A daemon that was deleting the sandbox has come that far.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(Error::io("list", dir))?,
    };
    for entry in entries {
        let entry = entry.map_err(Error::io("list", dir))?;
        if entry.file_name().as_encoded_bytes().starts_with(CALL.as_bytes()) {
            fs::remove_file(entry.path()).map_err(Error::io("remove", entry.path()))?;
        }
    }
    Ok(())
}

/// What a program that ran to its end has said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a program to its end, without input, and takes what it says, at most `OUTPUT_LIMIT` bytes from the end of each stream. It is
/// killed when it takes longer than `limit`. Files instead of pipes: nothing has to be read while it runs.
pub(crate) async fn listen(reaper: &Reaper, command: &mut Command, limit: Duration) -> Result<Said> {
    let (stdout, stderr) = (MemoryFile::empty("stdout")?, MemoryFile::empty("stderr")?);
    command.stdin(Stdio::null()).stdout(stdout.descriptor()?).stderr(stderr.descriptor()?);
    let status = run(reaper, command, limit).await?;
    Ok(Said { status, stdout: stdout.tail(OUTPUT_LIMIT)?, stderr: stderr.tail(OUTPUT_LIMIT)? })
}

/// Runs a program to its end and returns its status. When it takes longer than `limit`, or is not waited for any more, it is killed with all
/// that it has started: that may hold a container's output, or be at work on it for ever.
pub(crate) async fn run(reaper: &Reaper, command: &mut Command, limit: Duration) -> Result<u32> {
    // Its group is what it has started and not put into a session of its own, like a container's processes, which outlive it.
    let child = reaper.spawn(command.process_group(0))?;
    let _running = reaper.keep_running(child.pid);
    let mut unfinished = Unfinished(Tracked::open(child.pid).inspect_err(|_| {
        let _ = kill(Pid::from_raw(child.pid.cast_signed()), Signal::SIGKILL);
    })?);
    if let Ok(exit) = timeout(limit, child.exit).await {
        unfinished.0 = None;
        return Ok(exit.status);
    }
    Err(Error::TimedOut { operation: launch::name(command), seconds: limit.as_secs() })
}

/// A program that has not ended.
struct Unfinished(Option<Tracked>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(program) = &self.0
            && let Err(error) = program.kill_tree()
        {
            warn!(pid = program.identity().pid, error = error.report(), "a program that does not end cannot be killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use kuasar_sandboxers::process::is_dead;

    use super::*;

    /// Waits until both processes that a script has named in a file are dead.
    fn die(pids: &Path) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let text = fs::read_to_string(pids).unwrap();
            let pids: Vec<u32> = text.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
            if pids.len() == 2 && pids.iter().all(|pid| is_dead(*pid)) {
                return;
            }
            assert!(Instant::now() < deadline, "{pids:?} live on");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[tokio::test]
    async fn what_does_not_end_is_killed_with_what_it_has_started() {
        let reaper = kuasar_sandboxers::fake::reaper();
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let script = |first: &str| {
            let mut command = Command::new("sh");
            // One of them in a session of its own, and found as a child.
            let text = format!("sleep 600 & echo $! >>{0}; {first} & echo $! >>{0}; wait", pids.display());
            command.args(["-c", &text]).stdin(Stdio::null()).stdout(Stdio::null());
            command
        };
        let late = run(&reaper, &mut script("setsid sleep 600"), Duration::from_millis(500)).await.unwrap_err();
        assert!(matches!(late, Error::TimedOut { .. }), "{}", late.report());
        die(&pids);
        // Nobody waits for it any more.
        fs::remove_file(&pids).unwrap();
        let mut command = script("sleep 600");
        let unfinished = timeout(Duration::from_millis(500), run(&reaper, &mut command, Duration::from_secs(60)));
        unfinished.await.unwrap_err();
        die(&pids);
        // What a program leaves behind that has ended by itself is its own affair: a container, for one.
        let pid = dir.path().join("left");
        let mut command = Command::new("sh");
        command.args(["-c", &format!("sleep 600 & echo $! >{}", pid.display())]).stdin(Stdio::null());
        assert_eq!(run(&reaper, &mut command, Duration::from_secs(60)).await.unwrap(), 0);
        let left: u32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        assert!(!is_dead(left));
        kill(Pid::from_raw(left.cast_signed()), Signal::SIGKILL).unwrap();
    }
}
