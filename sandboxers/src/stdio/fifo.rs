//! Opening containerd's FIFOs without ever blocking.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::stat::{Mode, SFlag, fstat},
};

use crate::error::{Error, Result};

/// A FIFO that was found and checked. Later opens go through the descriptor, so a path that is swapped meanwhile is not
/// followed.
pub(crate) struct Fifo {
    found: OwnedFd,
    path: PathBuf,
}

impl Fifo {
    /// Finds the FIFO for `stream` (`stdin` …).
    pub(crate) fn find(stream: &'static str, path: &Path) -> Result<Self> {
        let invalid = |why: &str| Error::invalid(stream, format!("{} {why}", path.display()));
        // O_PATH touches nothing: opening a device or a socket to find out what it is could have effects.
        let found = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ENOTDIR => invalid(
                "does not exist; containerd makes this FIFO before the process, and removes it when the container goes away",
            ),
            errno => Error::io("open FIFO", path)(errno.into()),
        })?;
        let kind = fstat(&found).map_err(|errno| Error::io("look at FIFO", path)(errno.into()))?.st_mode;
        if SFlag::from_bits_truncate(kind) & SFlag::S_IFMT != SFlag::S_IFIFO {
            return Err(invalid("is not a FIFO; containerd makes one there, use a file:// URI to log to a file"));
        }
        Ok(Self { found, path: path.to_owned() })
    }

    fn open(&self, access: OFlag) -> Result<OwnedFd> {
        let link = format!("/proc/self/fd/{}", self.found.as_raw_fd());
        open(link.as_str(), access | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|errno| Error::io("open FIFO", &self.path)(errno.into()))
    }

    /// An end that reads and writes. Such an open never blocks, whoever has the other end (fifo(7)), and whoever holds it
    /// sees neither end-of-file nor SIGPIPE when containerd goes away.
    pub(crate) fn both(&self) -> Result<OwnedFd> {
        self.open(OFlag::O_RDWR)
    }

    /// A writing end, for who has both open already.
    pub(crate) fn writer(&self) -> Result<OwnedFd> {
        self.open(OFlag::O_WRONLY)
    }

    /// A writing end, if somebody has it open for reading.
    pub(crate) fn writer_if_read(&self) -> Result<Option<OwnedFd>> {
        let link = format!("/proc/self/fd/{}", self.found.as_raw_fd());
        match open(link.as_str(), OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty()) {
            Err(Errno::ENXIO) => Ok(None),
            opened => opened.map(Some).map_err(|errno| Error::io("open FIFO", &self.path)(errno.into())),
        }
    }

    /// A reading end, and a writing end that keeps the reader from end-of-file until it is closed. The writing end only
    /// writes, so that containerd still gets EPIPE when the process is gone.
    pub(crate) fn reader_and_keeper(&self) -> Result<(OwnedFd, OwnedFd)> {
        let _both = self.both()?; // while this is open, neither of the others blocks
        let keeper = self.open(OFlag::O_WRONLY)?;
        Ok((self.open(OFlag::O_RDONLY)?, keeper))
    }
}

/// The same FIFO, opened in another way; `None` when it is no FIFO, or is not open in the first way.
///
/// # Errors
/// When descriptors have run out.
pub fn reopened(end: &OwnedFd, from: OFlag, to: OFlag) -> Result<Option<OwnedFd>> {
    let failed = |errno: Errno| Error::failed("open a FIFO again")(io::Error::from(errno));
    let kind = SFlag::from_bits_truncate(fstat(end).map_err(failed)?.st_mode) & SFlag::S_IFMT;
    let flags = OFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFL).map_err(failed)?);
    if kind != SFlag::S_IFIFO || flags & OFlag::O_ACCMODE != from {
        return Ok(None);
    }
    let link = format!("/proc/self/fd/{}", end.as_raw_fd());
    open(link.as_str(), to | OFlag::O_CLOEXEC, Mode::empty()).map(Some).map_err(failed)
}
