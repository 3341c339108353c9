//! System calls that no library in the tree wraps. The one module of this crate with unsafe code.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use tokio::io::{Interest, unix::AsyncFd};

/// Lets tokio watch a descriptor.
///
/// # Errors
/// When it is of a kind that cannot be watched (a regular file), or the runtime refuses.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is an open descriptor that stays the same until it is dropped, and AsyncFd owns it from here on
    // and gives it out by shared reference or back whole.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// pidfd_send_signal(2). Any number the kernel knows, real-time signals too, which the libraries' signal types leave out.
pub(crate) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is involved: the null pointer asks for default signal information.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What waitid(2) tells of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ChildState {
    pub(crate) pid: u32,
    /// How it has ended, as a shell says it: the exit code, or 128 and the signal. The signal alone of one that is stopped.
    pub(crate) status: u32,
}

/// waitid(2) for one child or any, without waiting; `None` when none has changed as `flags` say. The libraries' types leave out real-time
/// signals: they fail for a child that one has killed.
pub(crate) fn child_state(pid: Option<u32>, flags: libc::c_int) -> io::Result<Option<ChildState>> {
    let (kind, id) = pid.map_or((libc::P_ALL, 0), |pid| (libc::P_PID, pid));
    // SAFETY: zeros are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one siginfo_t to `info`, which lives during the call.
    if unsafe { libc::waitid(kind, id, &raw mut info, flags | libc::WNOHANG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: waitid has filled in both, or left the zeros.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let status = match info.si_code {
        libc::CLD_KILLED | libc::CLD_DUMPED => 128 + status,
        // A code of a kernel to come must not keep the child from being reaped.
        _ => status,
    };
    Ok(Some(ChildState { pid: pid.unsigned_abs(), status: status.unsigned_abs() }))
}

/// The wait status of a process that has been reaped, from its pidfd (Linux 6.15); `None` while it has not been.
pub(crate) fn wait_status(pidfd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    // SAFETY: the struct has integers only.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    info.mask = u64::from(libc::PIDFD_INFO_EXIT);
    // SAFETY: the request carries the size of `info`, and the kernel writes no further.
    let result = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0).then_some(info.exit_code))
}

/// Whether pidfds tell the exit status of a process that has been reaped, tried out on one. It has no exit signal, so the reaper does not
/// see it (`__WCLONE`).
pub(crate) fn pidfds_keep_statuses() -> io::Result<bool> {
    const CODE: libc::c_int = 3;
    // SAFETY: without CLONE_VM and with a null stack this is fork(2): the child has its own copy of memory and runs on its copy of this
    // stack. The remaining arguments are pointers that are ignored without their flags.
    let pid = match unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: a plain system call without memory arguments, allowed in the child of a threaded process. It does not return, so
        // nothing of this process's state is touched or dropped here.
        0 => unsafe { libc::_exit(CODE) },
        pid => i32::try_from(pid).map_err(io::Error::other)?,
    };
    let pidfd = rustix::process::Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()));
    // In any case, before an error is told.
    loop {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::__WCLONE)) {
            Err(nix::errno::Errno::EINTR) => {}
            reaped => break reaped.map(drop)?,
        };
    }
    // Kernels before 6.13 do not know the question, and those before 6.15 do not answer it.
    Ok(wait_status(pidfd?.as_fd()).is_ok_and(|status| status == Some(CODE << 8)))
}

/// A process that sits in a new user namespace until it is dropped. It has no exit signal, so neither SIGCHLD nor a plain
/// waitpid(2) sees it (`__WCLONE`), and the reaper is not disturbed.
pub(crate) struct NamespaceHolder(Pid);

impl NamespaceHolder {
    /// Clones it. The caller must stay on this thread while it lives: the holder dies with the thread.
    pub(crate) fn new() -> io::Result<Self> {
        // CLONE_FILES: no descriptor is duplicated, so nobody's end-of-file or unmount is delayed by it.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_FILES;
        // SAFETY: without CLONE_VM and with a null stack this is fork(2): the child has its own copy of memory and runs on
        // its copy of this stack. The remaining arguments are pointers that are ignored without their flags.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => loop {
                // SAFETY: both are plain system calls without memory arguments, allowed in the child of a threaded process.
                // SIGKILL is the only way out, so nothing of this process's state is ever touched or dropped here.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
            pid => Ok(Self(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?))),
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.0
    }
}

impl Drop for NamespaceHolder {
    fn drop(&mut self) {
        if let Err(error) = kill(self.0, Signal::SIGKILL).and_then(|()| waitpid(self.0, Some(WaitPidFlag::__WCLONE)).map(drop))
        {
            tracing::warn!(%error, pid = self.0.as_raw(), "cannot end the holder of a user namespace");
        }
    }
}

/// Lets a netlink socket give reasons in words, behind its error numbers.
pub(crate) fn explain_netlink_errors(socket: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the option's value is an int.
    unsafe { set_option(socket, libc::SOL_NETLINK, libc::NETLINK_EXT_ACK, &on) }
}

/// Lets a socket take only the packets that a classic BPF program accepts (SO_ATTACH_FILTER, socket(7)).
pub(crate) fn attach_filter(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let program =
        libc::sock_fprog { len: u16::try_from(program.len()).map_err(io::Error::other)?, filter: program.as_ptr().cast_mut() };
    // SAFETY: the option's value is a program. The kernel reads the instructions it points to, as many as it says, during the call, and does
    // not write them.
    unsafe { set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program) }
}

/// setsockopt(2).
///
/// # Safety
/// The option's value is of this type, and what it points to lives during the call.
unsafe fn set_option<T>(socket: BorrowedFd<'_>, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads so much of the value; that it is the option's is the caller's promise.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// mount_setattr(2) on the whole tree that `tree` (of open_tree(2)) refers to: maps its ids through `user_namespace`, makes
/// it private, and read-only if asked.
pub(crate) fn map_mount_ids(tree: &OwnedFd, user_namespace: BorrowedFd<'_>, readonly: bool) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP | if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 },
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::from(user_namespace.as_raw_fd().unsigned_abs()),
    };
    set_mount_attributes(tree, &attributes, libc::AT_RECURSIVE)
}

/// The same for one mount: maps its ids.
pub(crate) fn map_ids_of_mount(tree: &OwnedFd, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let userns_fd = u64::from(user_namespace.as_raw_fd().unsigned_abs());
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd };
    set_mount_attributes(tree, &attributes, 0)
}

/// The same for one mount, or with all below it: makes it read-only.
pub(crate) fn make_mount_readonly(tree: &OwnedFd, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    set_mount_attributes(tree, &attributes, if recursive { libc::AT_RECURSIVE } else { 0 })
}

/// The same for the whole tree: sets where mounts propagate to.
pub(crate) fn set_mount_propagation(tree: &OwnedFd, propagation: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 };
    set_mount_attributes(tree, &attributes, libc::AT_RECURSIVE)
}

fn set_mount_attributes(tree: &OwnedFd, attributes: &libc::mount_attr, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the path is an empty C string, `attributes` is a reference to what lives during the call and the size given is its own. The kernel
    // only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
