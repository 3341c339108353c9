//! systemd, where it has started the daemon: what is parked is stored there too (FDSTORE, sd_notify(3)), so that the keeper's own death does
//! not close it. The next keeper gets it back as a service with sockets does (sd_listen_fds(3)).
//!
//! Without systemd nothing here does anything.

use std::{
    collections::BTreeMap,
    env, io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use sd_notify::NotifyState;

use super::CONFIG;
use crate::sys;

/// The longest name that systemd takes, in bytes.
const NAME_LIMIT: usize = 255;

/// Whether what is parked outlives the keeper.
#[must_use]
pub fn is_stored() -> bool {
    // Set for a service of Type=notify. There is no telling whether its unit has room for descriptors; ours has.
    env::var_os("NOTIFY_SOCKET").is_some()
}

/// What an earlier keeper has stored, by name. To be called once, while there is one thread.
pub(super) fn stored() -> BTreeMap<String, Vec<OwnedFd>> {
    let mut numbered = BTreeMap::<String, BTreeMap<usize, OwnedFd>>::new();
    for (name, descriptor) in sys::listen_fds() {
        // Others are not ours, as a socket of a unit that somebody has written.
        if let Some((name, number)) = name.rsplit_once('#').and_then(|(name, number)| Some((name, number.parse().ok()?))) {
            numbered.entry(name.to_owned()).or_default().insert(number, descriptor);
        }
    }
    let whole = |(name, descriptors): (String, BTreeMap<usize, OwnedFd>)| {
        // systemd drops what has been closed at its other end: a connection, and not the journal beside it.
        if !descriptors.keys().copied().eq(0..descriptors.len()) {
            remove(&name, descriptors.into_keys());
            return None;
        }
        Some((name, descriptors.into_values().collect()))
    };
    numbered.into_iter().filter_map(whole).collect()
}

/// The name of one of the descriptors that are parked together; `None` for what is not stored: what systemd has no name for; output that
/// goes through no terminal, which its process holds too and of which there is some for each exec; and the configuration, which
/// a restart of the service is to read again.
fn name_of(name: &str, number: usize) -> Option<String> {
    let left_out = name.ends_with("/stdout") || name.ends_with("/stderr") || name == CONFIG;
    Some(format!("{name}#{number}")).filter(|name| !left_out && name.len() <= NAME_LIMIT && !name.contains(':'))
}

/// Stores what is parked under a name, in place of what was.
pub(super) fn store(name: &str, descriptors: &[OwnedFd], earlier: usize) {
    forget(name, earlier);
    for (number, descriptor) in descriptors.iter().enumerate() {
        let Some(name) = name_of(name, number) else { continue };
        say(sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(&name)], &[descriptor.as_fd()]));
    }
}

/// Removes what is stored under a name.
pub(super) fn forget(name: &str, count: usize) {
    remove(name, 0..count);
}

fn remove(name: &str, numbers: impl Iterator<Item = usize>) {
    for name in numbers.filter_map(|number| name_of(name, number)) {
        say(sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(&name)]));
    }
}

/// Says that calls are answered.
pub(super) fn ready() {
    say(sd_notify::notify(&[NotifyState::Ready]));
}

/// Says that the daemon is stopping.
pub(super) fn stopping() {
    say(sd_notify::notify(&[NotifyState::Stopping]));
}

/// Says that the keeper lives.
pub(super) fn alive() {
    say(sd_notify::notify(&[NotifyState::Watchdog]));
}

/// How often to say so, where systemd wants that.
pub(super) fn watchdog() -> Option<Duration> {
    Some(sd_notify::watchdog_enabled()? / 2)
}

fn say(told: io::Result<()>) {
    if let Err(error) = told {
        eprintln!("kuasard: cannot reach systemd: {error}");
    }
}
