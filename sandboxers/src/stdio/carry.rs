//! Carrying bytes between two descriptors that the runtime watches.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pipe::{SpliceFlags, splice},
};
use tokio::io::unix::AsyncFd;

/// Moves everything from one end to the other within the kernel, at most `chunk` bytes at once: nothing that has left `source` is in our
/// memory, where it would be lost with us. `moved` hears of each step.
///
/// # Errors
/// What splice(2) or `moved` says: `EINVAL` where the kernel cannot move bytes between the two.
pub async fn splice_all(
    source: &AsyncFd<OwnedFd>,
    sink: &AsyncFd<OwnedFd>,
    chunk: usize,
    mut moved: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<()> {
    loop {
        let mut readable = source.readable().await?;
        let mut writable = sink.writable().await?;
        // That one of them would block does not say which, so each is asked by itself.
        if readable.try_io(|fd| is_ready(fd.get_ref(), PollFlags::IN)).is_err()
            || writable.try_io(|fd| is_ready(fd.get_ref(), PollFlags::OUT)).is_err()
        {
            continue;
        }
        match splice(source.get_ref(), None, sink.get_ref(), None, chunk, SpliceFlags::NONBLOCK) {
            Ok(0) => return Ok(()),
            Ok(length) => moved(length as u64)?,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Writes all of `bytes`, as the other side takes them.
///
/// # Errors
/// What write(2) says.
pub async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fd.writable().await?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
            Ok(Ok(length)) => bytes = &bytes[length..],
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
}

/// # Errors
/// `WouldBlock` when it is not.
fn is_ready(fd: &impl AsFd, flags: PollFlags) -> io::Result<()> {
    let ready = poll(&mut [PollFd::new(fd, flags)], Some(&Timespec::default()))?;
    if ready > 0 { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
}
