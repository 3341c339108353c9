//! Files that live in memory, passed to the runtime by path.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use kuasar_sandboxers::{Error, Result, reaper::Reaper};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use tokio::time::timeout;

/// How much of what a program says is read, in bytes.
const OUTPUT_LIMIT: u64 = 1 << 20;

/// A file without a name. A runtime opens it through [`Self::path`], so no descriptor has to be inherited (which every other child started
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

    /// A file with this content, which nobody can change any more.
    pub(crate) fn sealed(name: &str, content: &[u8]) -> Result<Self> {
        Self::empty(name)?.filled(name, content)
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
    pub(crate) fn tail(&mut self, limit: u64) -> Result<String> {
        let mut bytes = Vec::new();
        let read = self.0.seek(SeekFrom::End(0)).and_then(|length| {
            self.0.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
            (&self.0).take(limit).read_to_end(&mut bytes)
        });
        read.map_err(Error::failed("read a file in memory"))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
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
    let (mut stdout, mut stderr) = (MemoryFile::empty("stdout")?, MemoryFile::empty("stderr")?);
    command.stdin(Stdio::null()).stdout(stdout.descriptor()?).stderr(stderr.descriptor()?);
    let status = run(reaper, command, limit).await?;
    Ok(Said { status, stdout: stdout.tail(OUTPUT_LIMIT)?, stderr: stderr.tail(OUTPUT_LIMIT)? })
}

/// Runs a program to its end and returns its status. It is killed when it takes longer than `limit`.
pub(crate) async fn run(reaper: &Reaper, command: &mut Command, limit: Duration) -> Result<u32> {
    let child = reaper.spawn(command)?;
    if let Ok(exit) = timeout(limit, child.exit).await {
        return Ok(exit.status);
    }
    match kill(Pid::from_raw(child.pid.cast_signed()), Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(errno) => return Err(Error::failed("kill a program that does not end")(io::Error::from(errno))),
    }
    Err(Error::TimedOut { operation: command.get_program().to_string_lossy().into_owned(), seconds: limit.as_secs() })
}
