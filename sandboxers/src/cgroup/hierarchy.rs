//! Which cgroup trees are mounted where.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
};

use rustix::fs::{XattrFlags, getxattr, setxattr};
use tracing::debug;

use crate::{
    error::{Error, Result},
    mount::info::{MountEntry, mounts},
};

/// Which form of control groups the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A tree per controller.
    V1,
    /// As v1, and a v2 tree without controllers.
    Hybrid,
    /// One tree.
    V2,
}

/// The mounted trees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    trees: Vec<Tree>,
    version: Version,
}

/// One mounted tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Its controllers (v1: `cpu` and `cpuacct` are often together; `name=systemd` is none), sorted; empty for the v2 tree.
    names: Vec<String>,
    /// Where it is mounted.
    point: PathBuf,
    /// Which directory of the tree is mounted there: within a container often not the root.
    root: PathBuf,
}

/// The attribute of groups that were made on the way to another. Processes in a container cannot set it.
const MARK: &str = "trusted.kuasar";

/// How often a group is begun to be made, while the ends of others remove those above it.
const CREATE_TRIES: u32 = 20;

/// Options of a v1 mount that are not controllers.
const OPTIONS: [&str; 10] =
    ["rw", "ro", "none", "all", "noprefix", "xattr", "seclabel", "clone_children", "cpuset_v2_mode", "favordynmods"];

impl Hierarchy {
    /// Those of this host, found once.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when none is mounted.
    pub fn of_host() -> Result<&'static Self> {
        static FOUND: OnceLock<Hierarchy> = OnceLock::new();
        static SEARCH: Mutex<()> = Mutex::new(());
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        // The table of a busy node is long; one thread reads it and the others wait.
        let _searching = SEARCH.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = FOUND.get() {
            return Ok(found);
        }
        let found = Self::from_mounts(mounts()?).ok_or_else(no_cgroups)?;
        Ok(FOUND.get_or_init(|| found))
    }

    /// Reads a mount table (`/proc/<pid>/mountinfo`).
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it has no control groups.
    pub fn parse(mountinfo: &[u8]) -> Result<Self> {
        Self::from_mounts(mountinfo.split(|byte| *byte == b'\n').filter_map(MountEntry::parse)).ok_or_else(no_cgroups)
    }

    fn from_mounts(mounts: impl IntoIterator<Item = MountEntry>) -> Option<Self> {
        let mut trees: Vec<Tree> = Vec::new();
        for mount in mounts {
            let mut names: Vec<String> = match mount.kind.as_str() {
                "cgroup" => mount.options.split(',').filter(|option| is_controller(option)).map(Into::into).collect(),
                "cgroup2" => Vec::new(),
                _ => continue,
            };
            names.sort_unstable();
            if mount.kind == "cgroup" && names.is_empty() {
                continue;
            }
            let tree = Tree { names, point: mount.point, root: mount.root };
            match trees.iter_mut().find(|other| other.names == tree.names) {
                // The same tree can be mounted in many places; the usual one is the one everybody means.
                Some(other) if other.point.starts_with("/sys/fs/cgroup") => {}
                Some(other) => *other = tree,
                None => trees.push(tree),
            }
        }
        let unified = trees.iter().any(Tree::is_unified);
        let controllers = trees.iter().flat_map(|tree| &tree.names).any(|name| !name.starts_with("name="));
        let version = match (unified, controllers) {
            (true, true) => Version::Hybrid,
            (true, false) => Version::V2,
            (false, true) => Version::V1,
            (false, false) => return None,
        };
        Some(Self { trees, version })
    }

    /// Which form.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// All trees.
    #[must_use]
    pub fn trees(&self) -> &[Tree] {
        &self.trees
    }

    /// The v2 tree.
    #[must_use]
    pub fn unified(&self) -> Option<&Tree> {
        self.trees.iter().find(|tree| tree.is_unified())
    }

    /// The v1 tree that has a controller.
    #[must_use]
    pub fn tree(&self, controller: &str) -> Option<&Tree> {
        self.trees.iter().find(|tree| tree.names.iter().any(|name| name == controller))
    }
}

fn is_controller(option: &str) -> bool {
    option.starts_with("name=") || (!OPTIONS.contains(&option) && !option.contains('='))
}

fn no_cgroups() -> Error {
    Error::Unsupported {
        operation: "running containers",
        why: "no control groups are mounted; mount cgroup2 on /sys/fs/cgroup".into(),
    }
}

impl Tree {
    /// What it is called in what is saved: its first controller; empty for the v2 tree.
    #[must_use]
    pub fn key(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Whether it is the v2 tree.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        self.names.is_empty()
    }

    /// The directory of the group with this path below the mount point.
    #[must_use]
    pub fn dir(&self, path: &Path) -> PathBuf {
        self.point.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A process's path below the mount point, from its `/proc/<pid>/cgroup`; `None` when it is not in the tree or not
    /// below what is mounted.
    #[must_use]
    pub fn path_in(&self, membership: &str) -> Option<PathBuf> {
        let path = membership.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let names = fields.nth(1)?;
            let path = fields.next()?;
            let same = if self.is_unified() {
                names.is_empty()
            } else {
                names.split(',').any(|name| self.names.iter().any(|own| own == name))
            };
            same.then(|| Path::new(path.strip_suffix(" (deleted)").unwrap_or(path)))
        })?;
        // Both are told relative to the root of our cgroup namespace, so the mounted root may be above it: `/..`.
        let rest = path.strip_prefix(&self.root).ok()?;
        Some(Path::new("/").join(rest))
    }

    /// Makes a group and those above it. The latter are marked, so that [`Self::remove_made_above`] knows them.
    pub(super) fn create(&self, path: &Path) -> Result<()> {
        let mut tries = CREATE_TRIES;
        loop {
            tries -= 1;
            match self.try_create(path) {
                // The end of another group has removed one that both were in.
                Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound && tries > 0 => {}
                result => return result,
            }
        }
    }

    fn try_create(&self, path: &Path) -> Result<()> {
        let group = self.dir(path);
        let mut dir = self.point.clone();
        for part in path.strip_prefix("/").unwrap_or(path) {
            if self.is_unified() {
                enable_controllers(&dir);
            }
            dir.push(part);
            match fs::create_dir(&dir) {
                Ok(()) if dir != group => mark(&dir),
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("make control group", dir)(error));
                }
                _ => {}
            }
            if self.names.iter().any(|name| name == "cpuset") {
                inherit_cpuset(&dir)?;
            }
        }
        Ok(())
    }

    /// Removes the groups above one, as far as they are empty and [`Self::create`] has made them. Others' are theirs to remove, as
    /// kubelet's and systemd's, which are there before any of ours.
    pub(super) fn remove_made_above(&self, dir: &Path) {
        let above = dir.ancestors().skip(1).take_while(|above| above.starts_with(&self.point) && **above != self.point);
        for dir in above {
            if !is_marked(dir) || fs::remove_dir(dir).is_err() {
                return;
            }
        }
    }
}

/// Says that a group is ours to remove. Without the mark it stays.
fn mark(dir: &Path) {
    if let Err(error) = setxattr(dir, MARK, b"1", XattrFlags::empty()) {
        debug!(path = %dir.display(), %error, "control group cannot be marked, and will stay");
    }
}

fn is_marked(dir: &Path) -> bool {
    getxattr(dir, MARK, &mut [0_u8; 8]).is_ok()
}

/// A v2 group has the controllers its parent hands down. Those that cannot be, stay away: a group that has processes of its
/// own must not hand any down (cgroups(7), "no internal processes"), and whoever needs the controller sees it missing.
fn enable_controllers(dir: &Path) {
    let Ok(available) = fs::read_to_string(dir.join("cgroup.controllers")) else { return };
    let file = dir.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&file).unwrap_or_default();
    for controller in available.split_whitespace().filter(|name| !enabled.split_whitespace().any(|other| other == *name)) {
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            debug!(path = %file.display(), controller, %error, "controller is not handed down");
        }
    }
}

/// A v1 cpuset without CPUs takes no process, and a new one has none.
fn inherit_cpuset(dir: &Path) -> Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let read = |dir: &Path| {
            let file = dir.join(name);
            fs::read_to_string(&file).map_err(Error::io("read", file))
        };
        if read(dir)?.trim().is_empty() {
            let file = dir.join(name);
            fs::write(&file, read(parent)?.trim()).map_err(Error::io("write", file))?;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
50 23 0:29 / /elsewhere rw - cgroup cgroup rw,cpuacct,cpu
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,seclabel,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
60 31 0:38 / /mnt rw,relatime - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn finds_every_form() {
        let hybrid = Hierarchy::parse(HYBRID.as_bytes()).unwrap();
        assert_eq!(hybrid.version(), Version::Hybrid);
        assert_eq!(hybrid.tree("cpuacct").unwrap().point, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(hybrid.tree("cpu").unwrap().key(), "cpu");
        assert_eq!(hybrid.unified().unwrap().point, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(hybrid.tree("pids"), None);
        let v2 = Hierarchy::parse(b"30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate").unwrap();
        assert_eq!((v2.version(), v2.trees().len()), (Version::V2, 1));
        let v1 = Hierarchy::parse(b"30 23 0:26 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids").unwrap();
        assert_eq!(v1.version(), Version::V1);
        assert!(matches!(Hierarchy::parse(b"31 23 0:28 / / rw - ext4 x rw"), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn a_mount_may_show_a_part_of_the_tree() {
        let tree = |root: &str| Tree { names: vec!["memory".into()], point: "/m".into(), root: root.into() };
        let membership = "5:memory:/docker/abc/pod:1/c\n4:cpu:/other\n";
        assert_eq!(tree("/").path_in(membership).unwrap(), Path::new("/docker/abc/pod:1/c"));
        assert_eq!(tree("/docker/abc").path_in(membership).unwrap(), Path::new("/pod:1/c"));
        assert_eq!(tree("/elsewhere").path_in(membership), None);
        assert_eq!(tree("/..").path_in("5:memory:/../sibling\n").unwrap(), Path::new("/sibling"));
        assert_eq!(tree("/").path_in("4:cpu:/x\n"), None);
        assert_eq!(tree("/docker/abc").dir(Path::new("/pod")), Path::new("/m/pod"));
    }
}
