//! System calls that no library in the tree wraps. The one module of this crate with unsafe code.
#![allow(unsafe_code)]

use std::io;

/// adjtime(3): has the clock run faster or slower until it has made up for `us` microseconds, instead of what it was to make up for before.
pub(crate) fn slew_clock(us: i64) -> io::Result<()> {
    let delta = libc::timeval { tv_sec: us / 1_000_000, tv_usec: us % 1_000_000 };
    // SAFETY: the first argument is only read and lives during the call; the second may be null.
    let result = unsafe { libc::adjtime(&raw const delta, std::ptr::null_mut()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
