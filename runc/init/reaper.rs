//! Process 1 of a pod's pid namespace.
//!
//! Containers that share the namespace can see it and, with CAP_SYS_PTRACE, control it. So it keeps nothing worth having: no
//! descriptors, no capabilities, a mount namespace without a file in it, an unprivileged user, and a filter that leaves it the
//! two system calls it needs.

use crate::sys::{self, Fd, kernel};

/// As the pause image has it: nobody, and not 65534, which is what unmapped ids look like.
const NOBODY: usize = 65535;

/// Gives up everything, says so on `seal`, and reaps until it is told to end.
pub(crate) fn run(seal: Fd) -> ! {
    sys::set_name(b"kuasar-init\0");
    sys::setsid();
    // Orphans whose parent ignores SIGCHLD are reaped by the kernel (wait(2), NOTES), so we never wake for them.
    sys::ignore(kernel::SIGCHLD);
    sys::block_all_signals();
    // A small user namespace may not map it; then it stays that namespace's root, without capabilities.
    let _ = sys::become_user(NOBODY);
    sys::drop_capabilities();
    sys::forbid_new_privileges();
    sys::undumpable();
    sys::allow_only(&[
        kernel::NR_RT_SIGTIMEDWAIT,
        kernel::NR_EXIT_GROUP,
        kernel::NR_RESTART_SYSCALL,
        kernel::NR_RT_SIGRETURN,
        kernel::NR_WRITE,
        kernel::NR_CLOSE_RANGE,
    ]);
    // The filter may be missing from the kernel; all else cannot fail. If the parent is gone, so is who wanted us.
    if sys::write(seal, b"k").is_err() {
        sys::exit(1);
    }
    sys::close_all();
    let wanted = 1 << (kernel::SIGTERM - 1) | 1 << (kernel::SIGINT - 1);
    while sys::wait_for_signal(wanted).is_err() {}
    sys::exit(0)
}
