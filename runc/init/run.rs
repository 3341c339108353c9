//! Runs another program with what a process has by default, not with what the daemon has: see `src/runtime/launch.rs`, where the list is.

use crate::{
    Arguments,
    sys::{self, kernel},
};

/// As shells do. The daemon gives the reason in words; standard error may be a container's.
const NOT_FOUND: usize = 127;
const CANNOT_RUN: usize = 126;

/// Sets this process up and becomes `program`, whose arguments are those after `--`.
pub(crate) fn run(program: &'static [u8], arguments: Arguments) -> ! {
    sys::default_signals();
    sys::umask(0o022);
    sys::default_scheduling();
    sys::close_from(3);
    if let Some(limits) = arguments.one(b"nofile") {
        let mut limits = limits.split(|byte| *byte == b':').map(crate::decimal);
        if let (Some(soft), Some(hard)) = (limits.next(), limits.next())
            && let Err(errno) = sys::limit_open_files(soft, hard)
        {
            sys::fail(b"limit open files", b"", errno);
        }
    }
    if let Some(adjustment) = arguments.one(b"oom") {
        crate::adjust_oom_score(adjustment);
    }
    let errno = arguments.exec(program);
    sys::exit(if errno == kernel::ENOENT { NOT_FOUND } else { CANNOT_RUN })
}
