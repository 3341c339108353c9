//! What each signal does to keeper and worker; the table for users is in docs/crashes.md.
//!
//! | | keeper | worker |
//! |---|---|---|
//! | SIGTERM, SIGINT | ends both, after what is under way | leaves to the next worker |
//! | those of a fault, SIGQUIT, SIGKILL | ends both | ends; there is another at once |
//! | SIGSTOP | is continued by the worker | is continued by the keeper |
//! | all others | are logged | are logged |
//!
//! The keeper has them blocked and reads them: a blocked signal waits, so none is lost while the keeper becomes another program. The worker
//! may not block any, because the programs it starts would inherit that; it has handlers, which they do not.

use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

/// What says that something is wrong with the process. To go on would be worse.
const FAULTS: [Signal; 8] = [
    Signal::SIGQUIT,
    Signal::SIGILL,
    Signal::SIGTRAP,
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGSEGV,
    Signal::SIGSYS,
];

/// What a process ignores by itself.
const QUIET: [libc::c_int; 5] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGPIPE, libc::SIGURG, libc::SIGWINCH];

/// What a signal asks of the keeper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// To end.
    Stop(Signal),
    /// Nothing.
    Nothing,
    /// Nothing that it does; to be logged.
    Unknown,
}

/// Blocks what the keeper reads, and gives what to read it from.
pub(super) fn block() -> nix::Result<SignalFd> {
    let mut read = SigSet::all();
    for fault in FAULTS {
        read.remove(fault);
    }
    read.thread_block()?;
    SignalFd::with_flags(&read, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// What the signal of that number asks for. Numbers, because the libraries' types have none of the real-time signals.
pub(super) fn asked(number: libc::c_int) -> Asked {
    match number {
        libc::SIGTERM => Asked::Stop(Signal::SIGTERM),
        libc::SIGINT => Asked::Stop(Signal::SIGINT),
        quiet if QUIET.contains(&quiet) => Asked::Nothing,
        _ => Asked::Unknown,
    }
}

/// Those that must not end a worker, though they end a process by default, or stop it (SIGTSTP). SIGTERM and SIGINT are not among them.
/// Those that stop a process which uses the terminal of others are not, either: with a handler it would try that again for ever.
pub(super) fn harmless() -> impl Iterator<Item = libc::c_int> {
    let others = [libc::SIGTERM, libc::SIGINT, libc::SIGKILL, libc::SIGSTOP, libc::SIGTTIN, libc::SIGTTOU];
    // The C library's own: 32, 33, and with musl 34.
    let ours = (1..32).chain(libc::SIGRTMIN()..=libc::SIGRTMAX());
    ours.filter(move |number| {
        !others.contains(number) && !QUIET.contains(number) && FAULTS.iter().all(|fault| *fault as libc::c_int != *number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_has_one_meaning() {
        let harmless: Vec<_> = harmless().collect();
        for number in 1..=64 {
            let is_fault = FAULTS.iter().any(|fault| *fault as libc::c_int == number);
            let is_reserved = (32..libc::SIGRTMIN()).contains(&number);
            let others = [libc::SIGKILL, libc::SIGSTOP, libc::SIGTTIN, libc::SIGTTOU].contains(&number);
            let classes = [
                is_fault || is_reserved || others,
                asked(number) == Asked::Nothing,
                matches!(asked(number), Asked::Stop(_)),
                harmless.contains(&number),
            ];
            assert_eq!(classes.iter().filter(|class| **class).count(), 1, "{number}: {classes:?}");
        }
        for number in [libc::SIGHUP, libc::SIGUSR1, libc::SIGALRM, libc::SIGTSTP, libc::SIGRTMIN(), 64] {
            assert!(harmless.contains(&number), "{number}");
        }
    }
}
