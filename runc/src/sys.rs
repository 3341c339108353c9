//! System calls that no library in the tree wraps. The one module of this crate with unsafe code.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// The kind of a namespace (`CLONE_NEW…`), of an open file that is one (ioctl_nsfs(2)).
pub(crate) fn namespace_kind(file: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) } {
        -1 => Err(io::Error::last_os_error()),
        kind => Ok(kind),
    }
}

/// The user namespace that owns a namespace (ioctl_nsfs(2)).
pub(crate) fn owning_user_namespace(file: &impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    match unsafe { libc::ioctl(file.as_fd().as_raw_fd(), libc::NS_GET_USERNS) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just made this descriptor (close-on-exec) for us alone.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}
