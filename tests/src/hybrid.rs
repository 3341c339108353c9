//! crun on a host that has control groups v1 and v2 side by side.
//!
//! crun refuses such a host as soon as v2 holds a controller, even one that nothing uses (`hugetlb`, say, where it is not
//! mounted as v1). A program that compares runtimes is no reason to change the host: it looks at it through a mount namespace
//! of its own, where the list of v2's controllers is empty.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const CONTROLLERS: &str = "/sys/fs/cgroup/unified/cgroup.controllers";

/// Enters the namespace where there is need of it. To be called while the process has one thread: those that exist already
/// stay where they are.
///
/// # Errors
/// Not root, or the kernel refuses.
pub fn hide_controllers() -> Result<()> {
    // Only a hybrid host has v2 there.
    let Ok(controllers) = fs::read_to_string(CONTROLLERS) else { return Ok(()) };
    if controllers.trim().is_empty() || !nix::unistd::geteuid().is_root() {
        // Whoever is not root hears of it from the node.
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
    // Slave: unmounts of the host still arrive, so nothing of it stays busy; what is mounted here does not reach it.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>)
        .context("detach the mount namespace from the host's")?;
    let context = || format!("hide {} from crun", Path::new(CONTROLLERS).display());
    mount(Some("/dev/null"), CONTROLLERS, None::<&str>, MsFlags::MS_BIND, None::<&str>).with_context(context)
}
