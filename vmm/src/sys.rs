//! System calls that no library in the tree wraps. The one module of this crate with unsafe code.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Attaches an open `/dev/net/tun` to an interface, which is made if there is none of that name, in the network namespace of the
/// calling thread. `flags` are those of `TUNSETIFF` (`IFF_TAP`).
pub(crate) fn attach_tun(tun: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> io::Result<()> {
    let flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no name of an interface"));
    }
    // SAFETY: the struct has integers and a union of such only.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = flags;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives during the call; its name ends with a zero, for it is shorter than
    // the field.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Says what the reader of a tap copes with (`TUN_F_CSUM`), as a VMM does for its guest.
#[cfg(test)]
pub(crate) fn set_tap_offload(tap: BorrowedFd<'_>, offload: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number, no memory is involved.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Commands of bpf(2), by the layout of their attributes.
///
/// # Safety
/// The layout must be the beginning of what the kernel knows under `COMMAND`, without padding, and all pointers in a value must be to
/// memory that lives as long as the value and that the command only reads.
pub(crate) unsafe trait BpfCommand {
    /// Its number in `enum bpf_cmd`.
    const COMMAND: libc::c_int;
}

/// Makes a map.
#[repr(C)]
pub(crate) struct MapCreate {
    pub(crate) kind: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
}

// SAFETY: as in linux/bpf.h, without pointers.
unsafe impl BpfCommand for MapCreate {
    const COMMAND: libc::c_int = 0;
}

/// Sets an element of a map.
#[repr(C)]
pub(crate) struct MapUpdate<'a> {
    map: u32,
    unused: u32,
    key: u64,
    value: u64,
    flags: u64,
    lives: std::marker::PhantomData<&'a u32>,
}

impl<'a> MapUpdate<'a> {
    /// In a map with keys and values of 32 bits; of another map the kernel would read beyond them.
    fn new(map: BorrowedFd<'_>, key: &'a u32, value: &'a u32) -> Self {
        Self {
            map: map.as_raw_fd().unsigned_abs(),
            unused: 0,
            key: std::ptr::from_ref(key) as u64,
            value: std::ptr::from_ref(value) as u64,
            flags: 0,
            lives: std::marker::PhantomData,
        }
    }
}

// SAFETY: as in linux/bpf.h; the kernel reads as much as the map's sizes say, which `new` asks its caller about.
unsafe impl BpfCommand for MapUpdate<'_> {
    const COMMAND: libc::c_int = 2;
}

/// Loads a program.
#[repr(C)]
pub(crate) struct ProgramLoad<'a> {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    lives: std::marker::PhantomData<&'a [u64]>,
}

impl<'a> ProgramLoad<'a> {
    /// Of a kind, for a place of attachment; under a name, which ends with a zero.
    pub(crate) fn new(kind: u32, attach_type: u32, instructions: &'a [u64], name: [u8; 16]) -> io::Result<Self> {
        Ok(Self {
            kind,
            instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
            instructions: instructions.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: 0,
            name,
            interface: 0,
            attach_type,
            lives: std::marker::PhantomData,
        })
    }
}

// SAFETY: as in linux/bpf.h; both pointers are to what lives long enough, and there is no log, which would be written.
unsafe impl BpfCommand for ProgramLoad<'_> {
    const COMMAND: libc::c_int = 5;
}

/// Attaches a program until the link is closed.
#[repr(C)]
pub(crate) struct LinkCreate {
    pub(crate) program: u32,
    pub(crate) target: u32,
    pub(crate) attach_type: u32,
    pub(crate) flags: u32,
}

// SAFETY: as in linux/bpf.h, without pointers.
unsafe impl BpfCommand for LinkCreate {
    const COMMAND: libc::c_int = 28;
}

fn bpf<C: BpfCommand>(mut attributes: C) -> io::Result<libc::c_int> {
    // SAFETY: `C` vouches for the layout and its pointers; the size is its own, and the kernel takes what lies beyond it for zeros.
    let result = unsafe { libc::syscall(libc::SYS_bpf, C::COMMAND, &raw mut attributes, size_of::<C>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(io::Error::other)
}

/// bpf(2) with a command that makes something: its descriptor, which is close-on-exec.
pub(crate) fn bpf_create<C: BpfCommand>(attributes: C) -> io::Result<OwnedFd> {
    let fd = bpf(attributes)?;
    // SAFETY: the commands that make something return a new descriptor, which is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets an element of a map of sockets, which has keys and values of 32 bits.
pub(crate) fn set_socket(map: BorrowedFd<'_>, key: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
    let socket = socket.as_raw_fd().unsigned_abs();
    bpf(MapUpdate::new(map, &key, &socket)).map(drop)
}

/// The processor's time stamp counter.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, Linux lets user space use it, and it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}
