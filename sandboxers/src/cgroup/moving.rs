//! The wait before a process is moved between groups of cgroup v1.
//!
//! The kernel moves none while a fork is under way anywhere, and waits for that as long as RCU likes: ten to twenty
//! milliseconds, unless something was moved a moment ago. An OCI runtime moves a container's first process, and each added one.

use std::{
    fs,
    path::PathBuf,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing::debug;

use super::{Hierarchy, Version};
use crate::error::{Error, Result};

static WAITING: AtomicBool = AtomicBool::new(false);

/// Begins that wait in the background, for a runtime that is about to be called and will find it over, or partly so. Does
/// nothing on cgroup v2, where processes are born where they belong. To be called within a tokio runtime.
pub fn expect_move() {
    static PROCS: OnceLock<Option<PathBuf>> = OnceLock::new();
    let procs = PROCS.get_or_init(|| {
        own_procs().inspect_err(|error| debug!(error = error.report(), "moves between control groups are not prepared")).ok()?
    });
    let Some(procs) = procs else { return };
    if !WAITING.swap(true, Ordering::Relaxed) {
        tokio::task::spawn_blocking(move || {
            // Ourselves, to where we are: nothing moves, but the kernel finds out only after the wait.
            if let Err(error) = fs::write(procs, "0") {
                debug!(file = %procs.display(), %error, "moves between control groups are not prepared");
            }
            WAITING.store(false, Ordering::Relaxed);
        });
    }
}

/// The list of processes of this daemon's own group in some tree of v1.
fn own_procs() -> Result<Option<PathBuf>> {
    let hierarchy = Hierarchy::of_host()?;
    if hierarchy.version() == Version::V2 {
        return Ok(None);
    }
    let path = "/proc/self/cgroup";
    let membership = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let mut trees = hierarchy.trees().iter().filter(|tree| !tree.is_unified());
    Ok(trees.find_map(|tree| Some(tree.dir(&tree.path_in(&membership)?).join("cgroup.procs"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found() {
        let procs = own_procs().unwrap();
        assert_eq!(procs.is_some(), Hierarchy::of_host().unwrap().version() != Version::V2);
        let own = std::process::id().to_string();
        assert!(procs.is_none_or(|procs| fs::read_to_string(procs).unwrap().lines().any(|pid| pid == own)));
    }
}
