//! Control groups: where they are, what is in them and what it uses, out-of-memory kills, and their end.
//!
//! ```text
//!   Hierarchy   what is mounted where: v1 (a tree per controller), hybrid (v1, and v2 without controllers), v2 (one tree)
//!   Cgroup      one group: the same path in every tree, or nearly so
//! ```
//!
//! A [`Cgroup`] never is the root of a tree, nor the daemon's own group: what is done to a group is done to all that is in it.

mod files;
mod hierarchy;
mod moving;
mod oom;
mod sum;
pub mod v1;
pub mod v2;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tracing::debug;

pub use self::{
    hierarchy::{Hierarchy, Tree, Version},
    moving::expect_move,
    oom::OomWatch,
};
use crate::error::{Error, Result};

/// How long a group may take to become empty after every process in it was killed. One in uninterruptible sleep takes as
/// long as it likes.
const EMPTY: Duration = Duration::from_secs(10);

/// How long the end of a group may take that has no process any more: the kernel frees dead ones late.
const REMOVE: Duration = Duration::from_secs(5);

/// Resource use of a control group, in the form of the hierarchy it was read from; containerd has a message for each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stats {
    /// From cgroup v1.
    V1(Box<v1::Stats>),
    /// From cgroup v2.
    V2(Box<v2::Stats>),
}

impl Stats {
    /// What is left to say of a group that has ended, in the form of this host: nothing is used, and how often memory ran out.
    ///
    /// # Errors
    /// When the host's hierarchy cannot be read.
    pub fn of_ended(oom_kills: u64) -> Result<Self> {
        Ok(match Hierarchy::of_host()?.version() {
            Version::V2 => Self::ended_v2(oom_kills),
            Version::V1 | Version::Hybrid => {
                let memory_oom_control = Some(v1::MemoryOomControl { oom_kill: oom_kills, ..Default::default() });
                Self::V1(Box::new(v1::Stats { memory_oom_control, ..Default::default() }))
            }
        })
    }

    /// The same of a group in a guest, which has cgroup v2.
    #[must_use]
    pub fn ended_v2(oom_kill: u64) -> Self {
        let memory_events = Some(v2::MemoryEvents { oom_kill, ..Default::default() });
        Self::V2(Box::new(v2::Stats { memory_events, ..Default::default() }))
    }
}

/// A control group, by its path below the mount point of each tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    path: PathBuf,
    /// Trees in which the path is another, or which it has no part in; by [`Tree::key`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    except: BTreeMap<String, Option<PathBuf>>,
}

/// The path of the group that kubelet or Docker calls `cgroup_parent`. A systemd slice is a path in disguise: `a-b.slice`
/// lies in `a.slice` (systemd.slice(5)), and `-.slice` is the root.
#[must_use]
pub fn parent_path(cgroup_parent: &str) -> PathBuf {
    let mut path = PathBuf::from("/");
    match cgroup_parent.strip_suffix(".slice") {
        Some("-") => {}
        Some(name) if !name.contains('/') && !name.split('-').any(str::is_empty) => {
            let ends = name.match_indices('-').map(|(end, _)| end).chain([name.len()]);
            path.extend(ends.map(|end| format!("{}.slice", &name[..end])));
        }
        _ => path.extend(Path::new(cgroup_parent).components().filter(|part| matches!(part, Component::Normal(_)))),
    }
    path
}

/// Resource use of the group that kubelet or Docker calls `cgroup_parent`; `None` where that is the root, or is not there: the group is
/// kubelet's, and is not made.
///
/// # Errors
/// When it cannot be read.
pub fn parent_stats(cgroup_parent: &str) -> Result<Option<Stats>> {
    let path = parent_path(cgroup_parent);
    if path.parent().is_none() {
        return Ok(None);
    }
    match Cgroup::at(&path)?.stats() {
        Err(Error::NotFound { .. }) => Ok(None),
        stats => stats.map(Some),
    }
}

impl Cgroup {
    /// The group a process is in. Trees where it shares the daemon's group, or is in the root, do not count.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is no such process, [`Error::Invalid`] when it has no group of its own.
    pub fn of_process(pid: u32) -> Result<Self> {
        let hierarchy = Hierarchy::of_host()?;
        let read = |path: String| fs::read_to_string(&path).map_err(Error::io("read", path));
        let theirs = match read(format!("/proc/{pid}/cgroup")) {
            Err(Error::Io { source, .. }) if matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
                return Err(Error::NotFound { kind: "process", id: pid.to_string() });
            }
            theirs => theirs?,
        };
        let ours = read("/proc/self/cgroup".into())?;
        Self::from_membership(hierarchy, &theirs, &ours).ok_or_else(|| {
            Error::invalid("control group", format!("process {pid} has none of its own; the runtime must put it into one"))
        })
    }

    fn from_membership(hierarchy: &Hierarchy, theirs: &str, ours: &str) -> Option<Self> {
        let paths: Vec<_> = hierarchy
            .trees()
            .iter()
            .map(|tree| {
                let path =
                    tree.path_in(theirs).filter(|path| path != Path::new("/") && tree.path_in(ours).as_ref() != Some(path));
                (tree.key(), path)
            })
            .collect();
        // The path most trees agree on.
        let votes = |path: &PathBuf| paths.iter().filter(|(_, other)| other.as_ref() == Some(path)).count();
        let path = paths.iter().filter_map(|(_, path)| path.as_ref()).max_by_key(|path| votes(path))?.clone();
        let except = paths.into_iter().filter(|(_, other)| other.as_ref() != Some(&path));
        let except = except.map(|(key, other)| (key.to_owned(), other)).collect();
        Some(Self { path, except })
    }

    /// The group with this path in every tree, whether it exists or not.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a path that is not absolute, is the root or has `..` in it.
    pub fn at(path: &Path) -> Result<Self> {
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        if !path.is_absolute() || path == Path::new("/") || !plain {
            return Err(Error::invalid("control group", format!("{} is not an absolute path below the root", path.display())));
        }
        Ok(Self { path: path.to_owned(), except: BTreeMap::new() })
    }

    /// Makes the group and those above it that are missing. One that exists is taken as it is.
    ///
    /// # Errors
    /// As for [`Self::at`]; else the kernel's refusal.
    pub fn create(path: &Path) -> Result<Self> {
        let hierarchy = Hierarchy::of_host()?;
        let mut group = Self::at(path)?;
        for tree in hierarchy.trees() {
            if tree.is_unified() && hierarchy.version() == Version::Hybrid {
                // No controllers there, and OCI runtimes leave it alone too.
                group.except.insert(tree.key().to_owned(), None);
            } else {
                tree.create(path)?;
            }
        }
        Ok(group)
    }

    /// The groups of this name, wherever they are. Looks through every tree, so it is for when nothing else tells.
    ///
    /// # Errors
    /// When there are no control groups here, or they cannot be looked through.
    pub fn named(name: &str) -> Result<Vec<Self>> {
        let mut paths = BTreeSet::new();
        for tree in Hierarchy::of_host()?.trees() {
            let root = tree.dir(Path::new("/"));
            files::find(&root, name, &mut |dir| {
                paths.extend(dir.strip_prefix(&root).ok().map(|path| Path::new("/").join(path)));
            })?;
        }
        paths.iter().map(|path| Self::at(path)).collect()
    }

    /// Its path below the mount point of most trees.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn dir_in(&self, tree: &Tree) -> Option<PathBuf> {
        match self.except.get(tree.key()) {
            Some(other) => other.as_ref().map(|path| tree.dir(path)),
            None => Some(tree.dir(&self.path)),
        }
    }

    fn dir(&self, hierarchy: &Hierarchy, controller: &str) -> Option<PathBuf> {
        self.dir_in(hierarchy.tree(controller)?)
    }

    fn dirs<'a>(&'a self, hierarchy: &'a Hierarchy) -> impl Iterator<Item = PathBuf> + 'a {
        hierarchy.trees().iter().filter_map(|tree| self.dir_in(tree))
    }

    /// Whether it exists, in any tree.
    #[must_use]
    pub fn exists(&self) -> bool {
        Hierarchy::of_host().is_ok_and(|hierarchy| self.dirs(hierarchy).any(|dir| dir.is_dir()))
    }

    /// Moves a process into it.
    ///
    /// # Errors
    /// The kernel's refusal: no such process, or a limit of the group.
    pub fn add(&self, pid: u32) -> Result<()> {
        for dir in self.dirs(Hierarchy::of_host()?) {
            let file = dir.join("cgroup.procs");
            fs::write(&file, pid.to_string()).map_err(Error::io("move a process into", file))?;
        }
        Ok(())
    }

    /// The processes in it and in the groups below it. Empty when it does not exist.
    ///
    /// # Errors
    /// When the kernel refuses to tell.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let hierarchy = Hierarchy::of_host()?;
        let mut pids = Vec::new();
        if let Some(dir) = self.main_dir(hierarchy) {
            files::processes(&dir, &mut pids)?;
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Where its processes are asked for: a tree that container runtimes always use.
    fn main_dir(&self, hierarchy: &Hierarchy) -> Option<PathBuf> {
        let preferred = ["pids", "freezer", "devices", "memory"];
        preferred.iter().find_map(|controller| self.dir(hierarchy, controller)).or_else(|| self.dirs(hierarchy).next())
    }

    /// Resource use. Reads the group's own files and nothing else; short, no need for another thread.
    ///
    /// # Errors
    /// [`Error::NotFound`] when the group does not exist. A controller that is missing is absent from the result.
    pub fn stats(&self) -> Result<Stats> {
        let hierarchy = Hierarchy::of_host()?;
        let stats = match (hierarchy.version(), hierarchy.unified().and_then(|tree| self.dir_in(tree))) {
            (Version::V2, Some(dir)) => v2::Stats::read(&dir)?.map(|stats| Stats::V2(Box::new(stats))),
            _ => v1::Stats::read(|controller| self.dir(hierarchy, controller))?.map(|stats| Stats::V1(Box::new(stats))),
        };
        stats.ok_or_else(|| Error::NotFound { kind: "control group", id: self.path.display().to_string() })
    }

    /// Watches for processes of the group that the kernel kills for want of memory.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a memory controller; else the kernel's refusal.
    pub fn oom_watch(&self) -> Result<OomWatch> {
        let hierarchy = Hierarchy::of_host()?;
        let dir =
            self.dir(hierarchy, "memory").or_else(|| self.dir_in(hierarchy.unified()?)).ok_or_else(|| Error::Unsupported {
                operation: "watching for out-of-memory kills",
                why: "this host has no memory controller mounted; boot without cgroup_disable=memory".into(),
            })?;
        match hierarchy.version() {
            Version::V2 => OomWatch::v2(&dir),
            Version::V1 | Version::Hybrid => OomWatch::v1(&dir),
        }
    }

    /// Kills every process in it and below, frozen ones too, and waits until it is empty.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when some do not end; [`Error::Invalid`] when this process is in it.
    pub async fn kill(&self) -> Result<()> {
        let hierarchy = Hierarchy::of_host()?;
        let ourselves = std::process::id();
        let deadline = Instant::now() + EMPTY;
        let mut pause = Duration::from_millis(1);
        let mut round = 0;
        loop {
            let pids = self.processes()?;
            if pids.is_empty() {
                return Ok(());
            }
            if pids.contains(&ourselves) {
                return Err(Error::invalid("control group", format!("{} holds this daemon too", self.path.display())));
            }
            // One write reaches all, and none can fork away (Linux 5.14).
            let atomic = hierarchy.version() == Version::V2
                && hierarchy
                    .unified()
                    .and_then(|tree| self.dir_in(tree))
                    .is_some_and(|dir| fs::write(dir.join("cgroup.kill"), "1").is_ok());
            if !atomic {
                // A group that forks faster than we signal stands still while it is frozen.
                self.signal_all(&pids, hierarchy, round >= 3).await?;
            }
            if Instant::now() >= deadline {
                let operation = format!("the end of processes {pids:?} in control group {}", self.path.display());
                return Err(Error::TimedOut { operation, seconds: EMPTY.as_secs() });
            }
            // cgroup v1 has no event for an empty group.
            sleep(pause).await;
            pause = (2 * pause).min(Duration::from_millis(50));
            round += 1;
        }
    }

    async fn signal_all(&self, pids: &[u32], hierarchy: &Hierarchy, freeze: bool) -> Result<()> {
        let state = self.dir(hierarchy, "freezer").map(|dir| dir.join("freezer.state"));
        let mut pids = pids.to_vec();
        if freeze && let Some(state) = &state {
            fs::write(state, "FROZEN").map_err(Error::io("freeze", state))?;
            for _ in 0..20 {
                if fs::read_to_string(state).is_ok_and(|now| now.trim() == "FROZEN") {
                    break;
                }
                sleep(Duration::from_millis(5)).await;
            }
            // Those that were seen before, where none can be now.
            pids = self.processes().unwrap_or(pids);
        }
        let mut failed = Ok(());
        for pid in pids {
            match kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                // The others too, and the group must not stay frozen.
                Err(errno) => failed = Err(Error::failed(format!("kill process {pid}"))(io::Error::from(errno))),
            }
        }
        // A frozen process, a paused container's too, dies when it thaws.
        match state.map(|state| fs::write(&state, "THAWED").map_err(Error::io("thaw", state))) {
            Some(Err(Error::Io { source, .. })) if source.kind() == io::ErrorKind::NotFound => failed,
            Some(Err(error)) => failed.and(Err(error)),
            _ => failed,
        }
    }

    /// Removes it and the groups below it, and those above it that [`Self::create`] has made and that are empty. Waits for a group that
    /// is still becoming empty; kill its processes before. Missing is fine.
    ///
    /// # Errors
    /// [`Error::TimedOut`] when it does not become empty, naming the processes in it.
    pub async fn remove(&self) -> Result<()> {
        let hierarchy = Hierarchy::of_host()?;
        let deadline = Instant::now() + REMOVE;
        let mut pause = Duration::from_millis(1);
        loop {
            let mut busy = false;
            for tree in hierarchy.trees() {
                let Some(dir) = self.dir_in(tree) else { continue };
                if files::remove(&dir)? {
                    tree.remove_made_above(&dir);
                } else {
                    busy = true;
                }
            }
            if !busy {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let pids = self.processes()?;
                let operation = format!("removal of control group {}, which holds processes {pids:?},", self.path.display());
                return Err(Error::TimedOut { operation, seconds: REMOVE.as_secs() });
            }
            debug!(cgroup = %self.path.display(), "control group is busy");
            // The kernel has no event for the moment when a group can be removed.
            sleep(pause).await;
            pause = (2 * pause).min(Duration::from_millis(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slices_are_paths() {
        for (parent, path) in [
            ("", "/"),
            ("-.slice", "/"),
            ("system.slice", "/system.slice"),
            ("kubepods-burstable-pod1_2.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
            ("/kubepods/burstable/pod1", "/kubepods/burstable/pod1"),
            ("kubepods/pod1/", "/kubepods/pod1"),
            ("/a.slice/a-b.slice", "/a.slice/a-b.slice"),
            ("/../../etc", "/etc"),
            ("a--b.slice", "/a--b.slice"),
        ] {
            assert_eq!(parent_path(parent), Path::new(path), "{parent:?}");
        }
    }

    #[test]
    fn membership_leaves_out_what_is_shared_with_the_daemon() {
        let hierarchy = Hierarchy::parse(hierarchy::tests::HYBRID.as_bytes()).unwrap();
        let ours = "3:cpu,cpuacct:/system\n2:memory:/daemon\n1:name=systemd:/\n0::/\n";
        let theirs = "3:cpu,cpuacct:/pod/c1\n2:memory:/daemon\n1:name=systemd:/pod/c1\n0::/\n";
        let group = Cgroup::from_membership(&hierarchy, theirs, ours).unwrap();
        assert_eq!(group.path(), Path::new("/pod/c1"));
        let dirs: Vec<_> = group.dirs(&hierarchy).collect();
        assert_eq!(dirs, [Path::new("/sys/fs/cgroup/cpu,cpuacct/pod/c1"), Path::new("/sys/fs/cgroup/systemd/pod/c1")]);
        assert_eq!(group.dir(&hierarchy, "memory"), None);
        assert_eq!(Cgroup::from_membership(&hierarchy, ours, ours), None);
        let json = serde_json::to_string(&group).unwrap();
        assert_eq!(json, r#"{"path":"/pod/c1","except":{"":null,"memory":null}}"#);
        assert_eq!(serde_json::from_str::<Cgroup>(&json).unwrap(), group);
    }

    #[test]
    fn refuses_to_make_what_is_no_group() {
        for path in ["/", "relative", "/a/../b", ""] {
            assert!(matches!(Cgroup::create(Path::new(path)), Err(Error::Invalid { .. })), "{path:?}");
        }
    }

    proptest! {
        #[test]
        fn a_parent_path_stays_below_the_root(parent in "[a-z./-]{0,20}(\\.slice)?") {
            let path = parent_path(&parent);
            prop_assert!(path.starts_with("/"));
            prop_assert!(path.components().all(|part| !matches!(part, Component::ParentDir)));
        }

        #[test]
        fn membership_is_read_without_panic(theirs in "(([0-9]:)?[a-z,=]{0,9}:?/?[ -~]{0,20}\n){0,5}") {
            let hierarchy = Hierarchy::parse(hierarchy::tests::HYBRID.as_bytes()).unwrap();
            let _ = Cgroup::from_membership(&hierarchy, &theirs, "0::/\n");
        }
    }
}
