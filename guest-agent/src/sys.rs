//! System calls that no library in the tree wraps safely. The one module of this crate with unsafe code.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
};

use tokio::io::{Interest, unix::AsyncFd};

/// Lets tokio watch a descriptor for reading.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is an open descriptor that stays the same until it is dropped, and AsyncFd owns it from here on
    // and gives it out by shared reference or back whole.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}

/// `SO_VM_SOCKETS_BUFFER_SIZE` of <linux/vm_sockets.h>.
const BUFFER_SIZE: libc::c_int = 0;

/// Sets the size of a vsock connection's buffer (vsock(7)). Its peer is told when it is another than before.
pub(crate) fn set_vsock_buffer(socket: RawFd, size: u64) -> io::Result<()> {
    // SAFETY: the kernel reads `size`, whose own size is given, during the call; a descriptor that is no vsock is refused.
    let result = unsafe {
        libc::setsockopt(
            socket,
            libc::AF_VSOCK,
            BUFFER_SIZE,
            (&raw const size).cast(),
            libc::socklen_t::try_from(size_of::<u64>()).unwrap_or_default(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
