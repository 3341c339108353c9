//! What signals do, by number: the libraries' types have no real-time signals.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cri::SOON;
use crate::tools;

/// All there are.
pub const ALL: std::ops::RangeInclusive<i32> = 1..=64;

/// Those that the C library has for itself. It lets programs that it starts ignore them, and some OCI runtimes pass that on.
pub const RESERVED: [i32; 2] = [32, 33];

/// What a process says with its exit code that has got over a signal.
pub const WELL: i32 = 77;

/// What a signal does to a process that has set nothing (signal(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It ends, with 128 and the signal.
    Ends,
    /// It waits until it is continued.
    Stops,
    /// Nothing. Signals 20 to 22 stop only what has somebody to continue it: a process whose group is orphaned (setpgid(2)) ignores them, as
    /// those of containers do.
    Nothing,
}

/// What a signal does to a process of a container.
#[must_use]
pub fn action(signal: i32) -> Action {
    match signal {
        19 => Action::Stops,
        17 | 18 | 20..=23 | 28 => Action::Nothing,
        _ => Action::Ends,
    }
}

/// A shell script that sends its process a signal, and says that it is well if it can.
#[must_use]
pub fn script(signal: i32) -> String {
    match action(signal) {
        Action::Stops => format!("(sleep 1; kill -18 $$) & kill -{signal} $$; exit {WELL}"),
        _ => format!("kill -{signal} $$; exit {WELL}"),
    }
}

/// The exit codes that the script may have.
#[must_use]
pub fn codes(signal: i32) -> Vec<i32> {
    match action(signal) {
        // BusyBox's shell ignores SIGQUIT, as others do not.
        Action::Ends if signal == 3 || RESERVED.contains(&signal) => vec![128 + signal, WELL],
        Action::Ends => vec![128 + signal],
        _ => vec![WELL],
    }
}

/// What a signal does to the worker of kuasard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OfWorker {
    /// It finishes what is under way, and another takes its place.
    Leaves,
    /// It ends, and another takes its place.
    Ends,
    /// The keeper continues it.
    IsContinued,
    /// It logs it, or nothing at all.
    GoesOn,
}

/// What a signal does to the worker of kuasard.
#[must_use]
pub fn of_worker(signal: i32) -> OfWorker {
    match signal {
        2 | 15 => OfWorker::Leaves,
        3..=9 | 11 | 31 => OfWorker::Ends,
        19 | 21 | 22 => OfWorker::IsContinued,
        _ => OfWorker::GoesOn,
    }
}

/// Sends a signal; false when there is no such process.
///
/// # Errors
/// It cannot be sent.
pub fn send(pid: i32, signal: i32) -> Result<bool> {
    // A minimal Debian has no kill program.
    let mut command = Command::new(tools::busybox()?);
    let output = command.args(["kill", &format!("-{signal}"), &pid.to_string()]).output().context("run kill")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let is_gone = said.contains("No such process");
    ensure!(output.status.success() || is_gone, "kill -{signal} {pid}: {said}");
    Ok(!is_gone)
}

/// Sends the worker a signal, so that what the signal does comes about.
///
/// # Errors
/// It cannot be sent.
pub fn send_worker(pid: i32, signal: i32) -> Result<()> {
    let end = Instant::now() + SOON;
    // The language's own handler takes the first for an overflow of the stack, and finds that it is none.
    while send(pid, signal)? && [7, 11].contains(&signal) {
        ensure!(Instant::now() < end, "signal {signal} does not end {pid}");
        sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Whether a signal has stopped a process.
#[must_use]
pub fn is_stopped(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "))
}
