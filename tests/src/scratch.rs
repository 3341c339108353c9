//! The scratch directory of a node, and the removal of all that hangs on it.
//!
//! ```text
//!   <base>/kuasar-XXXXXX/        base: KUASAR_SCRATCH or /tmp; kept short, it prefixes Unix socket paths
//!       lock                     flock(2)ed while the owner lives
//!       run/                     tmpfs, stands for /run: containerd and kuasard state, sockets
//!       root/                    on disk, stands for /var/lib
//!       *.toml *.log cni/ …
//! ```
//!
//! A test that is killed outright cannot clean up. Its lock is released by the kernel all the same, so the next node, or
//! `kuasar-sweep`, finds the directory unlocked and removes it with everything that belongs to it ([`sweep`]).

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use nix::unistd::Pid;

use crate::leak::census::{self, Owner};
use crate::wait;

const PREFIX: &str = "kuasar-";
/// Each slot is a /24 of 10.80.0.0/12 and a bridge name.
const SLOTS: u16 = 10 * 256;
/// A file of this name keeps a directory from being swept.
const KEEP: &str = "keep";
const CLEANUP: Duration = Duration::from_secs(15);

/// What stands for `/var/lib`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// The disk that the scratch directory is on.
    #[default]
    Disk,
    /// tmpfs: nothing waits for a disk, which containerd makes sync several times for each container.
    Memory,
}

/// A directory with a tmpfs, a lock and a network slot of its own; removed on drop with all that belongs to it.
#[derive(Debug)]
pub struct Scratch {
    dir: PathBuf,
    storage: Storage,
    slot: u16,
    removed: bool,
    _slot_lock: Flock<File>,
    _lock: Flock<File>,
}

impl Scratch {
    /// Makes one; sweeps what dead owners left first.
    ///
    /// # Errors
    /// Not root, or the base directory is not writable.
    pub fn new(storage: Storage) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("a private containerd needs root: run as root");
        }
        let base = base();
        fs::create_dir_all(&base).with_context(|| format!("create {}", base.display()))?;
        // What another test could not be rid of is no fault of this one.
        if let Err(error) = sweep(false) {
            eprintln!("cannot sweep: {error:#}");
        }
        let (slot, slot_lock) = take_slot(&base)?;
        let (dir, lock) = claim(&base, "")?;
        fs::write(dir.join("slot"), slot.to_string())?;
        let scratch = Self { dir, storage, slot, removed: false, _slot_lock: slot_lock, _lock: lock };
        let run = scratch.run();
        fs::create_dir(&run)?;
        mount(Some("tmpfs"), &run, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755"))
            .with_context(|| format!("mount a tmpfs on {}", run.display()))?;
        // Mounts made below must reach neither other mount namespaces' copies nor be copied twice.
        mount(None::<&str>, &run, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .with_context(|| format!("make {} shared", run.display()))?;
        fs::create_dir(scratch.root())?;
        Ok(scratch)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A tmpfs that stands for `/run`.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Stands for `/var/lib`. On the tmpfs, too, where the directory itself is on overlayfs, which cannot carry another one.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        let on_overlay = statfs(&self.dir).is_ok_and(|fs| fs.filesystem_type() == OVERLAYFS_SUPER_MAGIC);
        if on_overlay || self.storage == Storage::Memory { self.run().join("root") } else { self.dir.join("root") }
    }

    /// Gives a directory of the node a file system of its own that holds so much and no more.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn limit(&self, dir: &Path, mib: u32) -> Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        let options = format!("mode=755,size={mib}m");
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))
            .with_context(|| format!("mount a tmpfs on {}", dir.display()))
    }

    /// The directory's own name: unique, and part of the name of everything the node makes outside the directory.
    #[must_use]
    pub fn tag(&self) -> String {
        tag_of(&self.dir)
    }

    /// The name of the node's network bridge.
    #[must_use]
    pub fn bridge(&self) -> String {
        bridge_of(self.slot)
    }

    /// The node's pod subnet.
    #[must_use]
    pub fn subnet(&self) -> String {
        format!("{}/24", self.address(0))
    }

    /// The bridge's address in it, by which pods reach the node.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.address(1)
    }

    fn address(&self, last: u8) -> Ipv4Addr {
        let [high, low] = self.slot.to_be_bytes();
        Ipv4Addr::new(10, 80 + high, low, last)
    }

    /// Kills, unmounts and removes everything that belongs to the directory, and itself.
    ///
    /// # Errors
    /// All that could not be removed, named.
    pub fn remove(mut self) -> Result<()> {
        self.removed = true;
        remove(&self.dir)
    }

    /// Leaves the directory and all that belongs to it for inspection, and says where.
    pub fn keep(mut self) {
        self.removed = true;
        if let Err(error) = fs::write(self.dir.join(KEEP), "") {
            eprintln!("cannot mark {} as kept: {error}", self.dir.display());
        }
        eprintln!("kept {}: `kuasar-sweep --kept` removes it", self.dir.display());
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = remove(&self.dir)
        {
            eprintln!("cannot clean up: {error:#}");
        }
    }
}

/// Where scratch directories go.
pub(crate) fn base() -> PathBuf {
    std::env::var_os("KUASAR_SCRATCH").map_or_else(|| "/tmp".into(), PathBuf::from)
}

/// Makes a directory for what shall not outlive this process: once its lock is free, a sweep removes it, and kills what mentions it. The
/// infix is a part of its name.
///
/// # Errors
/// The base directory is not writable.
pub(crate) fn claim(base: &Path, infix: &str) -> Result<(PathBuf, Flock<File>)> {
    // Locked before it gets the name that a sweep looks for, or a sweep would take it for abandoned.
    let unnamed = tempfile::Builder::new()
        .prefix(".new-")
        .tempdir_in(base)
        .with_context(|| format!("create a directory in {}", base.display()))?;
    let lock = Flock::lock(File::create(unnamed.path().join("lock"))?, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| anyhow!("lock {}: {errno}", unnamed.path().display()))?;
    let random = tag_of(unnamed.path());
    let dir = base.join(format!("{PREFIX}{infix}{}", random.trim_start_matches(".new-")));
    fs::rename(unnamed.path(), &dir).with_context(|| format!("rename to {}", dir.display()))?;
    // Its drop would look for the old name.
    let _ = unnamed.keep();
    Ok((dir, lock))
}

fn tag_of(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn bridge_of(slot: u16) -> String {
    format!("kua{slot}")
}

fn take_slot(base: &Path) -> Result<(u16, Flock<File>)> {
    let dir = base.join("kuasar.slots");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    for slot in 0..SLOTS {
        let path = dir.join(slot.to_string());
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => {
                // A node that was killed may have left the bridge of this slot to the sweep, which may be under way.
                if !Path::new("/sys/class/net").join(bridge_of(slot)).exists() {
                    return Ok((slot, lock));
                }
            }
            Err((_, Errno::EWOULDBLOCK)) => {}
            Err((_, errno)) => bail!("lock {}: {errno}", path.display()),
        }
    }
    bail!("all {SLOTS} network slots in {} are taken: run `kuasar-sweep`", dir.display())
}

/// Removes what nodes whose owner is dead have left: processes, mounts, cgroups, bridges, directories. Returns the
/// directories removed. With `kept`, also those that were left for inspection.
///
/// # Errors
/// Something could not be removed.
pub fn sweep(kept: bool) -> Result<Vec<PathBuf>> {
    let base = base();
    let mut removed = Vec::new();
    let entries = fs::read_dir(&base).with_context(|| format!("list {}", base.display()))?;
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(PREFIX) {
            continue;
        }
        let dir = entry.path();
        if !kept && dir.join(KEEP).exists() {
            continue;
        }
        let Ok(file) = File::open(dir.join("lock")) else { continue };
        if let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // Another sweep may have been faster: then there is no lock file any more.
            if dir.join("lock").exists() {
                remove(&dir)?;
                removed.push(dir);
            }
        }
    }
    Ok(removed)
}

fn remove(dir: &Path) -> Result<()> {
    let owner = Owner { dir: dir.to_path_buf(), tag: tag_of(dir), ids: task_ids(dir) };
    let bridge = fs::read_to_string(dir.join("slot")).ok().and_then(|slot| slot.parse().ok()).map(bridge_of);
    let mut faults = Vec::new();

    thaw(&owner, &mut faults);
    // Killing containerd's children may start others (a shim's delete), so look again until there are none.
    let gone = wait::until_sync(CLEANUP, || match census::processes(&owner) {
        Ok(processes) => {
            for process in &processes {
                // ESRCH: it ended by itself.
                if let Err(errno) = kill(Pid::from_raw(process.pid), Signal::SIGKILL)
                    && errno != Errno::ESRCH
                {
                    faults.push(format!("kill {} ({}): {errno}", process.pid, process.command));
                }
            }
            processes.is_empty()
        }
        Err(error) => {
            faults.push(format!("{error:#}"));
            true
        }
    });
    if !gone {
        faults.push(format!("processes that do not die: {:?}", census::processes(&owner)));
    }

    for point in census::mounts_below(dir, std::process::id().cast_signed())?.iter().rev() {
        if let Err(errno) = umount2(point, MntFlags::MNT_DETACH)
            // A detached parent took it along.
            && errno != Errno::EINVAL
            && errno != Errno::ENOENT
        {
            faults.push(format!("unmount {}: {errno}", point.display()));
        }
    }

    // Children first; a cgroup stays busy for a moment after its last process is gone.
    let emptied = wait::until_sync(CLEANUP, || {
        census::cgroups(&owner).map(|cgroups| cgroups.iter().rev().all(|cgroup| fs::remove_dir(cgroup).is_ok())).unwrap_or(true)
    });
    if !emptied {
        faults.push(format!("cgroups that stay busy: {:?}", census::cgroups(&owner)));
    }

    if let Some(bridge) = bridge.filter(|bridge| Path::new("/sys/class/net").join(bridge).exists())
        && let Err(error) = crate::process::run(Command::new("ip").args(["link", "delete", &bridge]))
    {
        faults.push(format!("{error:#}"));
    }

    // With the directory its name would be lost, and nobody could try again.
    if faults.is_empty()
        && let Err(error) = fs::remove_dir_all(dir)
    {
        faults.push(format!("remove {}: {error}", dir.display()));
    }
    if !faults.is_empty() {
        faults.dedup();
        bail!("{} could not be removed entirely: {}", dir.display(), faults.join("; "));
    }
    Ok(())
}

/// Lets paused containers go on: in a frozen cgroup of version 1 not even SIGKILL takes effect.
fn thaw(owner: &Owner, faults: &mut Vec<String>) {
    let cgroups = census::cgroups(owner).unwrap_or_else(|error| {
        faults.push(format!("{error:#}"));
        Vec::new()
    });
    for cgroup in cgroups {
        let state = cgroup.join("freezer.state");
        // The others are no freezer's, or are gone by now.
        if fs::read_to_string(&state).is_ok_and(|state| state.trim() != "THAWED")
            && let Err(error) = fs::write(&state, "THAWED")
        {
            faults.push(format!("thaw {}: {error}", cgroup.display()));
        }
    }
}

/// Ids of the tasks whose bundles lie in the scratch directory: they name cgroups that do not carry the tag.
fn task_ids(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir.join("run/containerd/io.containerd.runtime.v2.task/k8s.io"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
