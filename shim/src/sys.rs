//! What the kernel and the C library offer and no crate wraps.
#![allow(unsafe_code)]

use std::{
    env, io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    process::Command,
};

/// Settings for glibc's allocator (Memory Allocation Tunables in its manual) that suit a daemon which is idle most of the time.
///
/// One arena instead of one per thread: what another thread freed is never given back by those. No cache of freed pieces per
/// thread: each piece in one keeps its page in the heap. Measured after fifty pods have come and gone, the heap is half as large.
#[cfg(target_env = "gnu")]
const TUNABLES: &str = "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0";
#[cfg(target_env = "gnu")]
const VARIABLE: &str = "GLIBC_TUNABLES";

/// Lets a program start with [`tune_allocator`]'s settings, so that it need not start itself once more.
pub fn start_tuned(command: &mut Command) {
    #[cfg(target_env = "gnu")]
    if env::var_os(VARIABLE).is_none() {
        command.env(VARIABLE, TUNABLES);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = command;
}

/// Makes the allocator frugal: glibc reads these settings only when a program starts, so the program starts itself once more, as
/// the same process. Does nothing where the environment has settings already, and with other allocators.
///
/// To be called first in `main`, while there is one thread.
pub fn tune_allocator() {
    #[cfg(target_env = "gnu")]
    {
        use std::os::unix::process::CommandExt;

        match env::var_os(VARIABLE) {
            // Meant for us and not for the programs we start.
            // SAFETY: no other thread exists that could read the environment at the same time.
            Some(set) if set == TUNABLES => unsafe { env::remove_var(VARIABLE) },
            Some(_) => {}
            None => {
                let mut args = env::args_os();
                let (Ok(program), Some(name)) = (env::current_exe(), args.next()) else { return };
                // Returns only when that fails, and then it runs on as it is.
                let _ = Command::new(program).arg0(name).args(args).env(VARIABLE, TUNABLES).exec();
            }
        }
    }
}

/// Takes a descriptor that the parent process has left for this one, whose number is in an environment variable. The variable is removed,
/// and the descriptor is not inherited any further.
///
/// To be called while there is one thread, and once for each descriptor.
///
/// # Errors
/// When there is no such descriptor.
pub fn take_inherited(variable: &str, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no other thread exists that could read the environment at the same time.
    unsafe { env::remove_var(variable) };
    own_inherited(number)
}

/// Takes a descriptor that whoever was this process before has left open, and lets it not be inherited any further.
///
/// To be called once for each descriptor.
///
/// # Errors
/// When there is no such descriptor.
pub fn own_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only looks whether the number is in use.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
        return Err(io::ErrorKind::NotFound.into());
    }
    // SAFETY: it is open, and nobody in this process has opened it: whoever has left it says that it is ours.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)?;
    Ok(descriptor)
}

/// Descriptors that systemd has left for this process, with their names (sd_listen_fds(3)). The variables are removed.
///
/// To be called once, while there is one thread.
#[must_use]
pub fn listen_fds() -> Vec<(String, OwnedFd)> {
    // SAFETY: no other thread exists that could read the environment at the same time.
    match unsafe { sd_notify::listen_fds_with_names_and_unset_env() } {
        // SAFETY: systemd has opened them for this process, and nobody in it has taken them.
        Ok(found) => found.map(|(number, name)| (name, unsafe { OwnedFd::from_raw_fd(number) })).collect(),
        Err(error) => {
            eprintln!("kuasard: cannot take what systemd has stored: {error}");
            Vec::new()
        }
    }
}

/// Lets signals do nothing but say so on standard error. Programs that this one starts get them as if this had not been.
pub fn say_that_ignored(signals: impl Iterator<Item = libc::c_int>) {
    for signal in signals {
        // SAFETY: zeros are a valid sigaction, of the default action with an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = say_ignored as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: `action` is valid, and its handler does only what a handler may (signal-safety(7)).
        // Fails for signals that the C library has for itself, which then do what they did.
        unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) };
    }
}

extern "C" fn say_ignored(signal: libc::c_int) {
    let mut text = *b"kuasard: signal 00 is ignored\n";
    // Below 100, so both are digits.
    text[16] += (signal / 10) as u8;
    text[17] += (signal % 10) as u8;
    // SAFETY: write(2) may be called in a handler, `text` lives during the call, and errno is as before for what was interrupted. Nothing
    // can be done about a failure.
    unsafe {
        let errno = libc::__errno_location();
        let before = *errno;
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        *errno = before;
    }
}

/// How far into what has not been read the next peek begins (SO_PEEK_OFF, unix(7)).
///
/// # Errors
/// When it is no socket.
pub fn peek_offset(socket: impl AsFd) -> io::Result<i32> {
    let mut offset: libc::c_int = 0;
    let mut size = size_of_val(&offset) as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `offset`.
    let result = unsafe {
        let number = socket.as_fd().as_raw_fd();
        libc::getsockopt(number, libc::SOL_SOCKET, libc::SO_PEEK_OFF, (&raw mut offset).cast(), &raw mut size)
    };
    if result == 0 { Ok(offset) } else { Err(io::Error::last_os_error()) }
}

/// Lets the next peek begin with what is read next, and peeks after it where it ended.
///
/// # Errors
/// When it is no socket of a kind that can do that.
pub fn reset_peek_offset(socket: impl AsFd) -> io::Result<()> {
    let offset: libc::c_int = 0;
    // SAFETY: the kernel reads `offset`, whose size is given.
    let result = unsafe {
        let number = socket.as_fd().as_raw_fd();
        let size = size_of_val(&offset) as libc::socklen_t;
        libc::setsockopt(number, libc::SOL_SOCKET, libc::SO_PEEK_OFF, (&raw const offset).cast(), size)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets go of the pages of this program and its libraries that are as in their files. What is needed is read again, from the page cache;
/// the rest was needed once, to start: for a process that does little that is most of what it takes.
pub fn forget_program() {
    // SAFETY: the callback has the right type, and takes no data.
    unsafe { libc::dl_iterate_phdr(Some(forget_object), std::ptr::null_mut()) };
}

/// For one program or library (dl_iterate_phdr(3)).
unsafe extern "C" fn forget_object(info: *mut libc::dl_phdr_info, _: libc::size_t, _: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the loader calls this with a valid object.
    let info = unsafe { &*info };
    // SAFETY: so many headers are there.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let page = 4096;
    // What was writable at any time, as tables that the loader has filled in, would be lost.
    let clean = headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0);
    for header in clean {
        let (start, end) = (info.dlpi_addr + header.p_vaddr, info.dlpi_addr + header.p_vaddr + header.p_memsz);
        let (start, end) = (start.next_multiple_of(page), end / page * page);
        if start < end
            && let (Ok(start), Ok(length)) = (usize::try_from(start), usize::try_from(end - start))
        {
            // SAFETY: a private mapping of a file that nobody has written to is the same when it is read again. That the file changes
            // under a program that runs is prevented by the kernel (ETXTBSY) or by whoever installs libraries by rename.
            // A failure changes nothing.
            unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(start), length, libc::MADV_DONTNEED) };
        }
    }
    0
}

/// Gives memory that is free inside glibc's heap back to the kernel. Creating a container parses documents of some hundred
/// kilobytes; what lives on from that keeps the heap's end where it is, and the holes below it would stay resident.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: malloc_trim takes the allocator's own locks and touches free memory only.
        // Whether it found any is of no interest.
        unsafe { libc::malloc_trim(0) };
    }
}
