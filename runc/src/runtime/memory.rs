//! Files that live in memory, passed to the runtime by path.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use kuasar_sandboxers::{Error, Result};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};

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
