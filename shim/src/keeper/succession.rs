//! How a new program takes the keeper's place: as the same process, by execve(2), so that its children stay its children and
//! whoever supervises it sees no change. What it holds goes along as open descriptors, listed in a memory file.
//!
//! The new program is first asked, as a child of its own, whether it can read that list. There is no way back from execve.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fs::File,
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::Command,
    time::Duration,
};

use kuasar_sandboxers::{limits, reaper::Ended};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::{FdFlags, fcntl_setfd},
    process::{PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};

use super::wire::Outcome;
use crate::sys;

/// The environment variable that says that a keeper goes on: the number of the list's descriptor.
const VARIABLE: &str = "KUASAR_KEEPER_STATE";
/// The environment variable that says that it is only to be tried.
const TRIAL: &str = "KUASAR_KEEPER_TRIAL";
/// How long the trial may take.
const LIMIT: Duration = Duration::from_secs(5);

/// What one keeper leaves to the next. Versions of the program may differ: what is added here has to have a default.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Estate {
    pub(super) parked: BTreeMap<String, Vec<RawFd>>,
    pub(super) accepting: BTreeSet<String>,
    pub(super) connections: u64,
    pub(super) exits: Vec<Ended>,
    /// The pid of the worker and the socket to it.
    pub(super) worker: (u32, RawFd),
    /// What the worker is to be told of the upgrade.
    pub(super) outcome: Option<Outcome>,
    /// What systemd is still to be told of what is parked ([`super::systemd`]).
    pub(super) unsent: BTreeMap<String, usize>,
}

/// What this process is.
pub(super) enum Origin {
    /// The first keeper.
    First,
    /// One that goes on where another was.
    Successor(Estate),
    /// One that only had to try to read what it would go on with, and could.
    Trial,
}

/// Finds out. To be called once, while there is one thread.
///
/// # Errors
/// When the variable is not what a keeper sets, or the list cannot be read.
pub(super) fn origin() -> io::Result<Origin> {
    let Some(number) = env::var_os(VARIABLE) else { return Ok(Origin::First) };
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{VARIABLE} is for kuasard's own use: unset it"));
    let number = number.to_str().and_then(|number| number.parse().ok()).ok_or_else(invalid)?;
    let mut list = File::from(sys::take_inherited(VARIABLE, number).map_err(|_| invalid())?);
    let mut bytes = Vec::new();
    // A trial has moved the position, which both share.
    list.rewind()?;
    list.read_to_end(&mut bytes)?;
    let estate = serde_json::from_slice(&bytes)?;
    Ok(if env::var_os(TRIAL).is_some() { Origin::Trial } else { Origin::Successor(estate) })
}

/// Lets `binary` go on in this process's place, with all of `descriptors` open. Returns only when that fails; then this one goes on.
pub(super) fn replace(binary: &Path, estate: &Estate, descriptors: &[BorrowedFd<'_>]) -> io::Error {
    let replace = || {
        let list = memfd_create("kuasard-keeper", MemfdFlags::CLOEXEC)?;
        let mut list = File::from(list);
        list.write_all(&serde_json::to_vec(estate)?)?;
        let inherited = Inherited::new([list.as_fd()].into_iter().chain(descriptors.iter().copied()))?;
        let mut args = env::args_os();
        let name = args.next().unwrap_or_default();
        let mut command = Command::new(binary);
        command.arg0(name).args(args).env(VARIABLE, list.as_raw_fd().to_string());
        try_out(&mut command)?;
        let error = limits::with_first_open_files(|| command.env_remove(TRIAL).exec());
        drop(inherited);
        Err(error?)
    };
    match replace() {
        Ok(never) => never,
        Err(error) => error,
    }
}

/// Lets the program say whether it can.
fn try_out(command: &mut Command) -> io::Result<()> {
    let mut child = command.env(TRIAL, "1").spawn()?;
    let ended = || {
        let pid = rustix::process::Pid::from_child(&child);
        let handle = pidfd_open(pid, PidfdFlags::empty())?;
        let timeout = PollTimeout::try_from(LIMIT).unwrap_or(PollTimeout::MAX);
        // Signals for the keeper wait; only those that it does not block can interrupt, and those end it.
        Ok::<_, io::Error>(poll(&mut [PollFd::new(handle.as_fd(), PollFlags::POLLIN)], timeout)? > 0)
    };
    let ended = ended();
    if !matches!(ended, Ok(true)) {
        child.kill()?;
    }
    let status = child.wait()?;
    match ended {
        Ok(true) if status.success() => Ok(()),
        Ok(true) => Err(io::Error::other(format!("it cannot go on with what this keeper holds ({status})"))),
        Ok(false) => Err(io::Error::other(format!("it did not say within {} s that it can go on", LIMIT.as_secs()))),
        Err(error) => Err(error),
    }
}

/// Descriptors that programs inherit for as long as this lives.
struct Inherited<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Inherited<'a> {
    fn new(descriptors: impl Iterator<Item = BorrowedFd<'a>>) -> io::Result<Self> {
        let mut inherited = Self(Vec::new());
        for descriptor in descriptors {
            fcntl_setfd(descriptor, FdFlags::empty())?;
            inherited.0.push(descriptor);
        }
        Ok(inherited)
    }
}

impl Drop for Inherited<'_> {
    fn drop(&mut self) {
        for descriptor in &self.0 {
            // It is open, so this cannot fail.
            let _ = fcntl_setfd(descriptor, FdFlags::CLOEXEC);
        }
    }
}
