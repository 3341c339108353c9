//! The kernel, called directly. Strings are byte slices; those from the command line are passed on as they lie there, NUL
//! included, and [`join`] makes others.

use core::arch::asm;

pub(crate) type Fd = usize;
pub(crate) type Pid = u32;

pub(crate) mod kernel {
    //! Numbers from the kernel's headers.

    #[cfg(target_arch = "x86_64")]
    mod numbers {
        pub(crate) const NR_READ: usize = 0;
        pub(crate) const NR_WRITE: usize = 1;
        pub(crate) const NR_CLOSE: usize = 3;
        pub(crate) const NR_RT_SIGACTION: usize = 13;
        pub(crate) const NR_RT_SIGPROCMASK: usize = 14;
        pub(crate) const NR_RT_SIGRETURN: usize = 15;
        pub(crate) const NR_CLONE: usize = 56;
        pub(crate) const NR_CHDIR: usize = 80;
        pub(crate) const NR_SETSID: usize = 112;
        pub(crate) const NR_SETGROUPS: usize = 116;
        pub(crate) const NR_SETRESUID: usize = 117;
        pub(crate) const NR_SETRESGID: usize = 119;
        pub(crate) const NR_CAPSET: usize = 126;
        pub(crate) const NR_RT_SIGTIMEDWAIT: usize = 128;
        pub(crate) const NR_PIVOT_ROOT: usize = 155;
        pub(crate) const NR_PRCTL: usize = 157;
        pub(crate) const NR_CHROOT: usize = 161;
        pub(crate) const NR_MOUNT: usize = 165;
        pub(crate) const NR_UMOUNT2: usize = 166;
        pub(crate) const NR_SETHOSTNAME: usize = 170;
        pub(crate) const NR_RESTART_SYSCALL: usize = 219;
        pub(crate) const NR_EXIT_GROUP: usize = 231;
        pub(crate) const NR_OPENAT: usize = 257;
        pub(crate) const NR_UNSHARE: usize = 272;
        pub(crate) const NR_PIPE2: usize = 293;
        pub(crate) const NR_SETNS: usize = 308;
        pub(crate) const NR_EXECVE: usize = 59;
        pub(crate) const NR_UMASK: usize = 95;
        pub(crate) const NR_PERSONALITY: usize = 135;
        pub(crate) const NR_SETPRIORITY: usize = 141;
        pub(crate) const NR_SCHED_SETSCHEDULER: usize = 144;
        pub(crate) const NR_SCHED_SETAFFINITY: usize = 203;
        pub(crate) const NR_IOPRIO_SET: usize = 251;
        pub(crate) const NR_PRLIMIT64: usize = 302;
        pub(crate) const O_DIRECTORY: usize = 0o200_000;
        pub(crate) const AUDIT_ARCH: u32 = 0xC000_003E;
    }
    #[cfg(target_arch = "aarch64")]
    mod numbers {
        pub(crate) const NR_READ: usize = 63;
        pub(crate) const NR_WRITE: usize = 64;
        pub(crate) const NR_CLOSE: usize = 57;
        pub(crate) const NR_RT_SIGACTION: usize = 134;
        pub(crate) const NR_RT_SIGPROCMASK: usize = 135;
        pub(crate) const NR_RT_SIGRETURN: usize = 139;
        pub(crate) const NR_CLONE: usize = 220;
        pub(crate) const NR_CHDIR: usize = 49;
        pub(crate) const NR_SETSID: usize = 157;
        pub(crate) const NR_SETGROUPS: usize = 159;
        pub(crate) const NR_SETRESUID: usize = 147;
        pub(crate) const NR_SETRESGID: usize = 149;
        pub(crate) const NR_CAPSET: usize = 91;
        pub(crate) const NR_RT_SIGTIMEDWAIT: usize = 137;
        pub(crate) const NR_PIVOT_ROOT: usize = 41;
        pub(crate) const NR_PRCTL: usize = 167;
        pub(crate) const NR_CHROOT: usize = 51;
        pub(crate) const NR_MOUNT: usize = 40;
        pub(crate) const NR_UMOUNT2: usize = 39;
        pub(crate) const NR_SETHOSTNAME: usize = 161;
        pub(crate) const NR_RESTART_SYSCALL: usize = 128;
        pub(crate) const NR_EXIT_GROUP: usize = 94;
        pub(crate) const NR_OPENAT: usize = 56;
        pub(crate) const NR_UNSHARE: usize = 97;
        pub(crate) const NR_PIPE2: usize = 59;
        pub(crate) const NR_SETNS: usize = 268;
        pub(crate) const NR_EXECVE: usize = 221;
        pub(crate) const NR_UMASK: usize = 166;
        pub(crate) const NR_PERSONALITY: usize = 92;
        pub(crate) const NR_SETPRIORITY: usize = 140;
        pub(crate) const NR_SCHED_SETSCHEDULER: usize = 119;
        pub(crate) const NR_SCHED_SETAFFINITY: usize = 122;
        pub(crate) const NR_IOPRIO_SET: usize = 30;
        pub(crate) const NR_PRLIMIT64: usize = 261;
        pub(crate) const O_DIRECTORY: usize = 0o40_000;
        pub(crate) const AUDIT_ARCH: u32 = 0xC000_00B7;
    }
    pub(crate) use numbers::*;

    pub(crate) const NR_CLOSE_RANGE: usize = 436;
    pub(crate) const ENOENT: i32 = 2;
    pub(crate) const EINTR: i32 = 4;
    pub(crate) const EINVAL: i32 = 22;
    pub(crate) const O_RDONLY: usize = 0;
    pub(crate) const O_WRONLY: usize = 1;
    pub(crate) const O_CREAT: usize = 0o100;
    pub(crate) const O_CLOEXEC: usize = 0o2_000_000;
    pub(crate) const O_PATH: usize = 0o10_000_000;
    pub(crate) const SIGINT: usize = 2;
    pub(crate) const SIGKILL: usize = 9;
    pub(crate) const SIGTERM: usize = 15;
    pub(crate) const SIGSTOP: usize = 19;
    pub(crate) const SIGNALS: usize = 64;
    pub(crate) const RLIMIT_NOFILE: usize = 7;
    pub(crate) const SIGCHLD: usize = 17;
    pub(crate) const CLONE_NEWNS: usize = 0x0002_0000;
    pub(crate) const CLONE_NEWUSER: usize = 0x1000_0000;
    pub(crate) const CLONE_NEWNET: usize = 0x4000_0000;
    pub(crate) const MS_RDONLY: usize = 1;
    pub(crate) const MS_NOSUID: usize = 2;
    pub(crate) const MS_NODEV: usize = 4;
    pub(crate) const MS_NOEXEC: usize = 8;
    pub(crate) const MS_BIND: usize = 4096;
    pub(crate) const MS_MOVE: usize = 8192;
    pub(crate) const MS_REC: usize = 16384;
    pub(crate) const MS_PRIVATE: usize = 1 << 18;
    pub(crate) const MNT_DETACH: usize = 2;
    pub(crate) const PR_SET_DUMPABLE: usize = 4;
    pub(crate) const PR_SET_NAME: usize = 15;
    pub(crate) const PR_SET_SECCOMP: usize = 22;
    pub(crate) const PR_SET_NO_NEW_PRIVS: usize = 38;
    pub(crate) const SECCOMP_MODE_FILTER: usize = 2;
    pub(crate) const SECCOMP_RET_ALLOW: u32 = 0x7fff_0000;
    pub(crate) const SECCOMP_RET_KILL_PROCESS: u32 = 0x8000_0000;
    pub(crate) const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
}
use kernel::*;

// The compiler calls these four by name where it sees fit. They are short because nothing here is long.

/// # Safety
/// As memcpy(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, length: usize) -> *mut u8 {
    for index in 0..length {
        // SAFETY: within both buffers, by the caller's promise.
        unsafe { *to.add(index) = *from.add(index) };
    }
    to
}

/// # Safety
/// As memset(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, length: usize) -> *mut u8 {
    for index in 0..length {
        // SAFETY: within the buffer, by the caller's promise.
        unsafe { *to.add(index) = value as u8 };
    }
    to
}

/// # Safety
/// As memcmp(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    for index in 0..length {
        // SAFETY: within both buffers, by the caller's promise.
        let (left, right) = unsafe { (*left.add(index), *right.add(index)) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

/// # Safety
/// As bcmp(3).
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, length: usize) -> i32 {
    // SAFETY: the same promise.
    unsafe { memcmp(left, right, length) }
}

/// One system call with the given arguments; a negative result is an errno.
///
/// # Safety
/// Whatever the call does with its arguments must be sound: pointers valid for what the kernel reads and writes.
unsafe fn call(number: usize, a: [usize; 5]) -> Result<usize, i32> {
    let result: isize;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the kernel's calling convention; rcx and r11 are overwritten by the instruction.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3],
            in("r8") a[4], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the kernel's calling convention.
    unsafe {
        asm!("svc #0", in("x8") number, inlateout("x0") a[0] => result, in("x1") a[1], in("x2") a[2], in("x3") a[3],
            in("x4") a[4], options(nostack));
    }
    if result < 0 { Err(-(result as i32)) } else { Ok(result as usize) }
}

/// A string of the command line.
///
/// # Safety
/// `start` points at a NUL-terminated string that lives for ever.
pub(crate) unsafe fn cstr(start: *const u8) -> &'static [u8] {
    let mut length = 0;
    // SAFETY: reads stop at the NUL, which is there by the caller's promise.
    unsafe {
        while *start.add(length) != 0 {
            length += 1;
        }
        core::slice::from_raw_parts(start, length)
    }
}

/// The longest path that is passed to the kernel, with its NUL.
const PATH_MAX: usize = 4096;

/// Runs `with` on a NUL-terminated copy.
fn terminated<T>(path: &[u8], with: impl FnOnce(usize) -> Result<T, i32>) -> Result<T, i32> {
    const ENAMETOOLONG: i32 = 36;
    let mut copy = [const { core::mem::MaybeUninit::<u8>::uninit() }; PATH_MAX];
    if path.len() >= PATH_MAX {
        return Err(ENAMETOOLONG);
    }
    for (to, from) in copy.iter_mut().zip(path) {
        to.write(*from);
    }
    copy[path.len()].write(0);
    with(copy.as_ptr() as usize)
}

/// Puts parts together in `buffer`; what does not fit is cut.
pub(crate) fn join<'a>(buffer: &'a mut [u8], parts: &[&[u8]]) -> &'a [u8] {
    let mut length = 0;
    for byte in parts.iter().flat_map(|part| part.iter()) {
        if let Some(slot) = buffer.get_mut(length) {
            *slot = *byte;
            length += 1;
        }
    }
    &buffer[..length]
}

/// A number in decimal.
pub(crate) fn decimal(number: u32, buffer: &mut [u8; 20]) -> &[u8] {
    let mut rest = number;
    let mut start = buffer.len();
    loop {
        start -= 1;
        buffer[start] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            return &buffer[start..];
        }
    }
}

/// Says what failed, and ends.
pub(crate) fn fail(what: &[u8], detail: &[u8], errno: i32) -> ! {
    let mut digits = [0; 20];
    for part in [what, detail, b"\t", decimal(errno.unsigned_abs(), &mut digits), b"\n"] {
        // Nobody is left to tell if that fails.
        let _ = write(2, part);
    }
    exit(1)
}

pub(crate) fn exit(status: usize) -> ! {
    loop {
        // SAFETY: does not return.
        let _ = unsafe { call(NR_EXIT_GROUP, [status, 0, 0, 0, 0]) };
    }
}

const AT_FDCWD: usize = -100isize as usize;

pub(crate) fn open(path: &[u8], flags: usize) -> Result<Fd, i32> {
    open_at(AT_FDCWD, path, flags)
}

pub(crate) fn open_at(directory: Fd, path: &[u8], flags: usize) -> Result<Fd, i32> {
    // SAFETY: `path` is NUL-terminated.
    terminated(path, |path| unsafe { call(NR_OPENAT, [directory, path, flags | O_CLOEXEC, 0, 0]) })
}

pub(crate) fn create(path: &[u8]) -> Result<Fd, i32> {
    // SAFETY: `path` is NUL-terminated.
    terminated(path, |path| unsafe { call(NR_OPENAT, [AT_FDCWD, path, O_RDONLY | O_CREAT | O_CLOEXEC, 0o444, 0]) })
}

pub(crate) fn close(fd: Fd) {
    // SAFETY: the descriptor is ours and not used again; an error would not matter.
    let _ = unsafe { call(NR_CLOSE, [fd, 0, 0, 0, 0]) };
}

pub(crate) fn close_all() {
    close_from(0);
}

pub(crate) fn close_from(first: Fd) {
    // SAFETY: no such descriptor is used again.
    let _ = unsafe { call(NR_CLOSE_RANGE, [first, u32::MAX as usize, 0, 0, 0]) };
}

pub(crate) fn write(fd: Fd, bytes: &[u8]) -> Result<usize, i32> {
    // SAFETY: the kernel reads `bytes` only.
    unsafe { call(NR_WRITE, [fd, bytes.as_ptr() as usize, bytes.len(), 0, 0]) }
}

/// Fills `buffer`; false when the other side is gone first. Messages are a few bytes, which a pipe never splits.
pub(crate) fn receive(fd: Fd, buffer: &mut [u8]) -> bool {
    loop {
        // SAFETY: the kernel writes into `buffer` only.
        match unsafe { call(NR_READ, [fd, buffer.as_mut_ptr() as usize, buffer.len(), 0, 0]) } {
            Err(EINTR) => {}
            read => return read == Ok(buffer.len()),
        }
    }
}

/// A pipe: reading end, writing end.
pub(crate) fn pipe() -> (Fd, Fd) {
    let mut ends = [0i32; 2];
    // SAFETY: the kernel writes two descriptors into `ends`.
    match unsafe { call(NR_PIPE2, [ends.as_mut_ptr() as usize, O_CLOEXEC, 0, 0, 0]) } {
        Ok(_) => (ends[0] as usize, ends[1] as usize),
        Err(errno) => fail(b"make a pipe", b"", errno),
    }
}

pub(crate) fn fork() -> Result<Pid, i32> {
    // SAFETY: a plain fork of a single-threaded process: no shared memory, no new stack.
    unsafe { call(NR_CLONE, [SIGCHLD, 0, 0, 0, 0]) }.map(|pid| pid as Pid)
}

pub(crate) fn setns(fd: Fd, kind: usize) -> Result<usize, i32> {
    // SAFETY: no memory is involved.
    unsafe { call(NR_SETNS, [fd, kind, 0, 0, 0]) }
}

pub(crate) fn unshare(flags: usize) -> Result<usize, i32> {
    // SAFETY: no memory is involved.
    unsafe { call(NR_UNSHARE, [flags, 0, 0, 0, 0]) }
}

pub(crate) fn sethostname(name: &[u8]) -> Result<usize, i32> {
    // SAFETY: the kernel reads `name` only.
    unsafe { call(NR_SETHOSTNAME, [name.as_ptr() as usize, name.len(), 0, 0, 0]) }
}

/// mount(2); an empty source or kind is passed as an empty string, which the kernel ignores where it has no use for it.
pub(crate) fn mount(source: &[u8], target: &[u8], kind: &[u8], flags: usize) -> Result<usize, i32> {
    terminated(source, |source| {
        terminated(target, |target| {
            // SAFETY: the strings are NUL-terminated.
            terminated(kind, |kind| unsafe { call(NR_MOUNT, [source, target, kind, flags, 0]) })
        })
    })
}

pub(crate) fn detach(target: &[u8]) -> Result<usize, i32> {
    // SAFETY: the string is NUL-terminated.
    terminated(target, |target| unsafe { call(NR_UMOUNT2, [target, MNT_DETACH, 0, 0, 0]) })
}

pub(crate) fn pivot_root(new: &[u8], old: &[u8]) -> Result<usize, i32> {
    // SAFETY: the strings are NUL-terminated.
    terminated(new, |new| terminated(old, |old| unsafe { call(NR_PIVOT_ROOT, [new, old, 0, 0, 0]) }))
}

pub(crate) fn chdir(path: &[u8]) -> Result<usize, i32> {
    // SAFETY: the string is NUL-terminated.
    terminated(path, |path| unsafe { call(NR_CHDIR, [path, 0, 0, 0, 0]) })
}

pub(crate) fn chroot(path: &[u8]) -> Result<usize, i32> {
    // SAFETY: the string is NUL-terminated.
    terminated(path, |path| unsafe { call(NR_CHROOT, [path, 0, 0, 0, 0]) })
}

/// Takes this user and group id for everything, and no other groups.
pub(crate) fn become_user(id: usize) -> Result<usize, i32> {
    // SAFETY: no memory is involved: the list of groups is empty.
    unsafe {
        // A user namespace may forbid setgroups(2); there are no groups worth keeping then.
        let _ = call(NR_SETGROUPS, [0, 0, 0, 0, 0]);
        call(NR_SETRESGID, [id, id, id, 0, 0])?;
        call(NR_SETRESUID, [id, id, id, 0, 0])
    }
}

fn prctl(option: usize, argument: usize) {
    // SAFETY: callers pass a number, or a pointer to what the option reads. None of those used here can fail in a way that
    // another attempt would mend.
    let _ = unsafe { call(NR_PRCTL, [option, argument, 0, 0, 0]) };
}

/// `name` ends with NUL.
pub(crate) fn set_name(name: &'static [u8]) {
    prctl(PR_SET_NAME, name.as_ptr() as usize);
}

pub(crate) fn setsid() {
    // SAFETY: no memory is involved; it fails only for a group leader, which a forked process is not.
    let _ = unsafe { call(NR_SETSID, [0; 5]) };
}

/// The kernel's `sigaction`, which is not the C library's.
#[repr(C)]
struct SignalAction {
    handler: usize,
    flags: usize,
    restorer: usize,
    mask: u64,
}

const SIG_DFL: usize = 0;
const SIG_IGN: usize = 1;

pub(crate) fn ignore(signal: usize) {
    set_handler(signal, SIG_IGN);
}

/// No signal is ignored or blocked. The C library's posix_spawn(3) leaves two of its own ignored, which sigaction(2) of a C library
/// cannot mend.
pub(crate) fn default_signals() {
    for signal in (1..=SIGNALS).filter(|signal| ![SIGKILL, SIGSTOP].contains(signal)) {
        set_handler(signal, SIG_DFL);
    }
    mask_signals(0);
}

fn set_handler(signal: usize, handler: usize) {
    // aarch64 has no restorer: there the mask comes third, and is zero as well.
    let action = SignalAction { handler, flags: 0, restorer: 0, mask: 0 };
    // SAFETY: the kernel reads `action`, whose mask has eight bytes.
    let _ = unsafe { call(NR_RT_SIGACTION, [signal, &raw const action as usize, 0, 8, 0]) };
}

pub(crate) fn block_all_signals() {
    mask_signals(u64::MAX);
}

fn mask_signals(set: u64) {
    const SIG_SETMASK: usize = 2;
    // SAFETY: the kernel reads eight bytes from `set`.
    let _ = unsafe { call(NR_RT_SIGPROCMASK, [SIG_SETMASK, &raw const set as usize, 0, 8, 0]) };
}

pub(crate) fn umask(mask: usize) {
    // SAFETY: no memory is involved, and it cannot fail.
    let _ = unsafe { call(NR_UMASK, [mask, 0, 0, 0, 0]) };
}

/// All processors that the control group allows, the default policy, nice value and I/O priority, and Linux's own personality. What a
/// daemon in a container may not change stays.
pub(crate) fn default_scheduling() {
    const IOPRIO_WHO_PROCESS: usize = 1;
    let every = [u8::MAX; 1024];
    let priority = 0i32;
    // SAFETY: the kernel reads `every`, whose size is given, and `priority`; the other arguments are numbers.
    unsafe {
        let _ = call(NR_SCHED_SETAFFINITY, [0, every.len(), every.as_ptr() as usize, 0, 0]);
        let _ = call(NR_SCHED_SETSCHEDULER, [0, 0, &raw const priority as usize, 0, 0]);
        let _ = call(NR_SETPRIORITY, [0; 5]);
        let _ = call(NR_IOPRIO_SET, [IOPRIO_WHO_PROCESS, 0, 0, 0, 0]);
        let _ = call(NR_PERSONALITY, [0; 5]);
    }
}

pub(crate) fn limit_open_files(soft: usize, hard: usize) -> Result<usize, i32> {
    let limits = [soft as u64, hard as u64];
    // SAFETY: the kernel reads two words from `limits`, and writes nothing.
    unsafe { call(NR_PRLIMIT64, [0, RLIMIT_NOFILE, limits.as_ptr() as usize, 0, 0]) }
}

/// Becomes another program; returns the errno when that fails.
///
/// # Safety
/// `path` ends with NUL, and both lists with a null pointer, of strings that end with NUL.
pub(crate) unsafe fn exec(path: *const u8, arguments: *const *const u8, environment: *const *const u8) -> i32 {
    // SAFETY: as the caller promises.
    match unsafe { call(NR_EXECVE, [path as usize, arguments as usize, environment as usize, 0, 0]) } {
        Err(errno) => errno,
        // It does not return.
        Ok(_) => 0,
    }
}

/// Waits for one of the (blocked) signals in the set.
pub(crate) fn wait_for_signal(set: u64) -> Result<usize, i32> {
    // SAFETY: the kernel reads eight bytes from `set`.
    unsafe { call(NR_RT_SIGTIMEDWAIT, [&raw const set as usize, 0, 0, 8, 0]) }
}

pub(crate) fn drop_capabilities() {
    let header = [CAPABILITY_VERSION_3, 0];
    let none = [0u32; 6];
    // SAFETY: the kernel reads a header of two words and, for version 3, six words of data.
    let _ = unsafe { call(NR_CAPSET, [header.as_ptr() as usize, none.as_ptr() as usize, 0, 0, 0]) };
}

pub(crate) fn forbid_new_privileges() {
    prctl(PR_SET_NO_NEW_PRIVS, 1);
}

pub(crate) fn undumpable() {
    prctl(PR_SET_DUMPABLE, 0);
}

/// A seccomp filter (seccomp(2)) that kills on every system call but these.
pub(crate) fn allow_only(calls: &[usize]) {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Instruction {
        code: u16,
        yes: u8,
        no: u8,
        value: u32,
    }
    #[repr(C)]
    struct Program {
        length: u16,
        first: *const Instruction,
    }
    const LOAD: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const KILL: Instruction = Instruction { code: RETURN, yes: 0, no: 0, value: SECCOMP_RET_KILL_PROCESS };
    const ALLOW: Instruction = Instruction { code: RETURN, yes: 0, no: 0, value: SECCOMP_RET_ALLOW };

    let mut filter = [KILL; 32];
    filter[0] = Instruction { code: LOAD, yes: 0, no: 0, value: 4 };
    filter[1] = Instruction { code: JUMP_EQUAL, yes: 1, no: 0, value: AUDIT_ARCH };
    filter[3] = Instruction { code: LOAD, yes: 0, no: 0, value: 0 };
    let mut length = 4;
    for number in calls {
        if let Some([test, allow]) = filter.get_mut(length..length + 2) {
            *test = Instruction { code: JUMP_EQUAL, yes: 0, no: 1, value: *number as u32 };
            *allow = ALLOW;
            length += 2;
        }
    }
    let program = Program { length: length as u16 + 1, first: filter.as_ptr() };
    // SAFETY: the kernel copies `length` instructions, the last of which is the KILL that the array was filled with.
    let _ = unsafe { call(NR_PRCTL, [PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &raw const program as usize, 0, 0]) };
}
