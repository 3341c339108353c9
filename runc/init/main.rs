//! `kuasar-init`: makes a pod's namespaces, and stays in them as process 1 where the pod shares its process ids.
//!
//! The daemon must not enter namespaces itself: it has threads, and a fork of it would copy its page tables for every pod. So
//! it runs this, a static program without a standard library that the kernel loads in some tens of microseconds.
//!
//! Arguments are `key=value`, taken in the order below whatever order they are given in:
//!
//! | argument | meaning |
//! |---|---|
//! | `run=PROGRAM` | become that program: with `nofile=SOFT:HARD` and `oom=N`, and its arguments after `--` (see `run.rs`) |
//! | `empty-root=DIR` | alone: make a mount namespace with nothing in it, print a line, and wait until standard input is closed |
//! | `oom=N` | OOM score adjustment, as far as the kernel lets us |
//! | `root=PATH` | mount namespace to join (the one that `empty-root` made) |
//! | `userns=PATH` | user namespace to join, or |
//! | `uidmap=LINES`, `gidmap=LINES` | user namespace to make, with this uid_map and gid_map |
//! | `netns=PATH` | network namespace to join |
//! | `new=FLAGS` | namespaces to make, as the decimal sum of `CLONE_NEW*` |
//! | `hostname=NAME` | host name to set |
//! | `sysctl=PATH=VALUE` | file below /proc/sys to write; a leading `?` on PATH makes it optional |
//! | `pin=KIND:FILE` | bind the namespace of that kind (`ipc`, `uts`, `user`) on a file, which is made |
//! | `init=LABEL` | fork a process 1 into the new pid namespace and print its pid; LABEL is for people and for clean-up |
//!
//! On failure it prints one line, what TAB errno, to standard error and exits with 1.
//!
//! ```text
//!  without a user namespace            with one (whoever enters it loses all power outside)
//!  parent: enter, pin, fork ─▶ init    parent: fork ─▶ child: enter, fork ─▶ init
//!                                              maps ids, pins ◀─┘ waits
//! ```

#![no_std]
#![no_main]
// Loops that copy bytes would be compiled to calls of memcpy, which nobody provides here.
#![no_builtins]

mod reaper;
mod run;
mod sys;

use sys::{Fd, Pid, cstr, fail, kernel};

core::arch::global_asm!(
    #[cfg(target_arch = "x86_64")]
    ".globl _start\n_start:\nxor %ebp, %ebp\nmov %rsp, %rdi\nand $-16, %rsp\ncall start_from_stack\nud2",
    #[cfg(target_arch = "aarch64")]
    ".globl _start\n_start:\nmov x29, #0\nmov x0, sp\nbl start_from_stack\nbrk #1",
    #[cfg(target_arch = "x86_64")]
    options(att_syntax)
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    sys::exit(101)
}

/// The arguments, as the kernel laid them on the stack.
#[derive(Clone, Copy)]
struct Arguments {
    count: usize,
    first: *mut *const u8,
}

impl Arguments {
    /// The values given for `key`, each without its terminating NUL.
    fn all(self, key: &'static [u8]) -> impl Iterator<Item = &'static [u8]> {
        (1..self.count).filter_map(move |index| {
            // SAFETY: the kernel put `count` valid, NUL-terminated strings there, which live as long as the process.
            let argument = unsafe { cstr(*self.first.add(index)) };
            argument.strip_prefix(key)?.strip_prefix(b"=")
        })
    }

    fn one(self, key: &'static [u8]) -> Option<&'static [u8]> {
        self.all(key).next()
    }

    fn number(self, key: &'static [u8]) -> usize {
        self.one(key).map_or(0, decimal)
    }

    /// Becomes `program`, one of the arguments' values: its arguments are those after `--`, its environment is ours. Returns the errno
    /// when that fails.
    fn exec(self, program: &'static [u8]) -> i32 {
        // SAFETY: as in `all`.
        let Some(end) = (1..self.count).find(|index| unsafe { cstr(*self.first.add(*index)) } == b"--") else {
            return kernel::EINVAL;
        };
        // SAFETY: the kernel has laid the pointers in writable memory of this process's stack, each list with a null at its end, the
        // environment's after the arguments'. `program` ends with NUL, as it is the end of an argument.
        unsafe {
            *self.first.add(end) = program.as_ptr();
            sys::exec(program.as_ptr(), self.first.add(end), self.first.add(self.count + 1))
        }
    }
}

/// Reads a number.
fn decimal(digits: &[u8]) -> usize {
    digits.iter().fold(0usize, |sum, digit| sum.wrapping_mul(10).wrapping_add(usize::from(digit.wrapping_sub(b'0'))))
}

/// Lowering it takes CAP_SYS_RESOURCE, which a daemon in a container may lack; the pod runs as well without.
fn adjust_oom_score(adjustment: &[u8]) {
    if let Ok(file) = sys::open(b"/proc/self/oom_score_adj", kernel::O_WRONLY) {
        let _ = sys::write(file, adjustment);
        sys::close(file);
    }
}

/// # Safety
/// `stack` is the stack pointer at process entry: argc, then argv.
#[unsafe(no_mangle)]
unsafe extern "C" fn start_from_stack(stack: *mut usize) -> ! {
    // SAFETY: as the caller promises; this is the System V ABI of process start on both architectures.
    let arguments = unsafe { Arguments { count: *stack, first: stack.add(1).cast() } };
    if let Some(program) = arguments.one(b"run") {
        run::run(program, arguments);
    }
    if let Some(directory) = arguments.one(b"empty-root") {
        empty_root(directory);
    }
    // As for programs, so for process 1 of a pod.
    sys::default_signals();
    sys::default_scheduling();
    if let Some(adjustment) = arguments.one(b"oom") {
        adjust_oom_score(adjustment);
    }
    if arguments.one(b"userns").is_some() || arguments.one(b"uidmap").is_some() {
        with_user_namespace(arguments)
    } else {
        let entered = Outside::open(arguments).enter(arguments, None);
        pin(arguments, b"self");
        report(entered.map_or(0, |make| make.fork(None)));
    }
}

/// Prints the pid (0: there is none) and ends.
fn report(pid: Pid) -> ! {
    let mut digits = [0; 20];
    let line = sys::decimal(pid, &mut digits);
    if let Err(errno) = sys::write(1, line) {
        fail(b"print the pid", b"", errno);
    }
    sys::exit(0)
}

/// What has to be opened before the way back is closed.
struct Outside {
    sysctls: Fd,
    root: Option<Fd>,
    userns: Option<Fd>,
    netns: Option<Fd>,
}

/// Proof that everything before process 1 is done.
struct MakeInit(());

impl Outside {
    fn open(arguments: Arguments) -> Self {
        let namespace = |key, what| {
            arguments.one(key).map(|path| match sys::open(path, kernel::O_RDONLY) {
                Ok(file) => file,
                Err(errno) => fail(what, path, errno),
            })
        };
        let sysctls = match sys::open(b"/proc/sys", kernel::O_PATH | kernel::O_DIRECTORY) {
            Ok(file) => file,
            Err(errno) => fail(b"open ", b"/proc/sys", errno),
        };
        Self {
            sysctls,
            root: namespace(b"root", b"open the empty mount namespace "),
            userns: namespace(b"userns", b"open the user namespace "),
            netns: namespace(b"netns", b"open the network namespace "),
        }
    }

    /// Joins and makes the namespaces and sets them up. `map` has the ids mapped by someone who may.
    fn enter(self, arguments: Arguments, map: Option<&dyn Fn()>) -> Option<MakeInit> {
        // First, because joining a mount namespace takes power over its owner, the node's user namespace.
        if let Some(root) = self.root
            && let Err(errno) = sys::setns(root, kernel::CLONE_NEWNS)
        {
            fail(b"join the empty mount namespace", b"", errno);
        }
        if let Some(userns) = self.userns
            && let Err(errno) = sys::setns(userns, kernel::CLONE_NEWUSER)
        {
            fail(b"join the user namespace", b"", errno);
        }
        if let Some(map) = map {
            if self.userns.is_none() {
                if let Err(errno) = sys::unshare(kernel::CLONE_NEWUSER) {
                    fail(b"make a user namespace", b"", errno);
                }
                map();
            }
            // Files below /proc/sys belong to the namespace's root.
            if let Err(errno) = sys::become_user(0) {
                fail(b"become root of the user namespace (does it map id 0?)", b"", errno);
            }
        }
        if let Some(netns) = self.netns
            && let Err(errno) = sys::setns(netns, kernel::CLONE_NEWNET)
        {
            fail(b"join the network namespace", b"", errno);
        }
        let new = arguments.number(b"new");
        if new != 0
            && let Err(errno) = sys::unshare(new)
        {
            fail(b"make namespaces", b"", errno);
        }
        if let Some(name) = arguments.one(b"hostname")
            && let Err(errno) = sys::sethostname(name)
        {
            fail(b"set the host name to ", name, errno);
        }
        for setting in arguments.all(b"sysctl") {
            self.set_sysctl(setting);
        }
        arguments.one(b"init").map(|_| MakeInit(()))
    }

    fn set_sysctl(&self, setting: &'static [u8]) {
        let (optional, setting) = setting.strip_prefix(b"?").map_or((false, setting), |rest| (true, rest));
        let Some(split) = setting.iter().position(|byte| *byte == b'=') else { return };
        let (path, value) = (&setting[..split], &setting[split + 1..]);
        let written = sys::open_at(self.sysctls, path, kernel::O_WRONLY).and_then(|file| {
            let written = sys::write(file, value);
            sys::close(file);
            written
        });
        if let Err(errno) = written
            && !optional
        {
            fail(b"set the sysctl ", path, errno);
        }
    }
}

impl MakeInit {
    /// Starts process 1 and returns its pid once it has given up all it can. `keep_out` is a descriptor it must not keep.
    fn fork(self, keep_out: Option<Fd>) -> Pid {
        let (sealed, seal) = sys::pipe();
        match sys::fork() {
            Err(errno) => fail(b"fork process 1 of the pid namespace", b"", errno),
            Ok(0) => {
                if let Some(fd) = keep_out {
                    sys::close(fd);
                }
                reaper::run(seal)
            }
            Ok(pid) => {
                sys::close(seal);
                if !sys::receive(sealed, &mut [0; 1]) {
                    fail(b"seal process 1 of the pid namespace", b"", 0);
                }
                // The end of the pipe: it has closed everything.
                sys::receive(sealed, &mut [0; 1]);
                pid
            }
        }
    }
}

/// Binds namespaces of process `whose` on files.
fn pin(arguments: Arguments, whose: &[u8]) {
    for pin in arguments.all(b"pin") {
        let Some(split) = pin.iter().position(|byte| *byte == b':') else { continue };
        let (kind, file) = (&pin[..split], &pin[split + 1..]);
        let mut buffer = [0; 64];
        let source = sys::join(&mut buffer, &[b"/proc/", whose, b"/ns/", kind]);
        let made = sys::create(file).and_then(|fd| {
            sys::close(fd);
            sys::mount(source, file, b"", kernel::MS_BIND)
        });
        if let Err(errno) = made {
            fail(b"pin a namespace on ", file, errno);
        }
    }
}

/// A child enters the user namespace; this process keeps its power, maps the ids and pins.
fn with_user_namespace(arguments: Arguments) -> ! {
    let (from_child, to_parent) = sys::pipe();
    let (from_parent, to_child) = sys::pipe();
    let child = match sys::fork() {
        Err(errno) => fail(b"fork", b"", errno),
        Ok(0) => {
            sys::close(from_child);
            sys::close(to_child);
            let map = || {
                // The parent answers when the ids are mapped, and is gone if that failed: it has said why.
                if sys::write(to_parent, b"u").is_err() || !sys::receive(from_parent, &mut [0; 1]) {
                    sys::exit(1);
                }
            };
            let pid = Outside::open(arguments).enter(arguments, Some(&map)).map_or(0, |make| make.fork(Some(to_parent)));
            let mut message = [b'p', 0, 0, 0, 0];
            message[1..].copy_from_slice(&pid.to_ne_bytes());
            if sys::write(to_parent, &message).is_err() {
                sys::exit(1);
            }
            // The namespaces must live until they are pinned; the end of the pipe says so.
            sys::receive(from_parent, &mut [0; 1]);
            sys::exit(0)
        }
        Ok(child) => child,
    };
    sys::close(to_parent);
    sys::close(from_parent);
    let mut digits = [0; 20];
    let whose = sys::decimal(child, &mut digits);
    let mut message = [0; 5];
    while sys::receive(from_child, &mut message[..1]) {
        if message[0] == b'u' {
            for (key, file) in [(&b"uidmap"[..], &b"/uid_map"[..]), (b"gidmap", b"/gid_map")] {
                map_ids(arguments.one(key).unwrap_or(b""), whose, file);
            }
            if let Err(errno) = sys::write(to_child, b"m") {
                fail(b"wake the child", b"", errno);
            }
        } else if sys::receive(from_child, &mut message[1..]) {
            pin(arguments, whose);
            report(Pid::from_ne_bytes([message[1], message[2], message[3], message[4]]));
        }
    }
    // The child failed and has said why.
    sys::exit(1)
}

fn map_ids(lines: &[u8], whose: &[u8], file: &[u8]) {
    let mut buffer = [0; 64];
    let path = sys::join(&mut buffer, &[b"/proc/", whose, file]);
    let written = sys::open(path, kernel::O_WRONLY).and_then(|fd| {
        let written = sys::write(fd, lines);
        sys::close(fd);
        written
    });
    if let Err(errno) = written {
        fail(b"write the id mapping ", path, errno);
    }
}

/// Makes a mount namespace whose root is an empty read-only filesystem, for process 1 of pods to live in.
fn empty_root(directory: &[u8]) -> ! {
    let step = |what: &'static [u8], done: Result<usize, i32>| {
        if let Err(errno) = done {
            fail(what, directory, errno);
        }
    };
    step(b"make a mount namespace for ", sys::unshare(kernel::CLONE_NEWNS));
    step(b"make mounts private for ", sys::mount(b"", b"/", b"", kernel::MS_REC | kernel::MS_PRIVATE));
    let flags = kernel::MS_RDONLY | kernel::MS_NOSUID | kernel::MS_NODEV | kernel::MS_NOEXEC;
    step(b"mount an empty filesystem on ", sys::mount(b"none", directory, b"tmpfs", flags));
    step(b"enter ", sys::chdir(directory));
    match sys::pivot_root(b".", b".") {
        Ok(_) => step(b"leave the old root of ", sys::detach(b".")),
        // The initial ramfs cannot be pivoted (pivot_root(2)); hide it instead.
        Err(kernel::EINVAL) => {
            step(b"move to / ", sys::mount(b".", b"/", b"", kernel::MS_MOVE));
            step(b"change the root to ", sys::chroot(b"."));
        }
        Err(errno) => fail(b"change the root to ", directory, errno),
    }
    step(b"announce ", sys::write(1, b"\n"));
    sys::receive(0, &mut [0; 1]);
    sys::exit(0)
}
