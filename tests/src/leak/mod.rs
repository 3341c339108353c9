//! What a node has on the machine, taken down before a test and compared after it.
//!
//! A category is a multiset of names: the same name twice counts twice (two sockets are both called `socket`). Less than
//! before is no leak; more is, once it stays so until the deadline.

pub mod census;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use kuasar_sandboxers::programs;

use census::Owner;

/// Names, each with how often it occurs.
type Bag = BTreeMap<String, usize>;

/// tokio keeps an idle thread of its blocking pool for ten seconds: what a burst has started says nothing yet. A soak test
/// compares [`Snapshot::threads`] itself, later.
const IDLE_THREADS: usize = 64;

/// Where to look.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Whose things.
    pub owner: Owner,
    /// kuasard, when it runs.
    pub kuasard_pid: Option<i32>,
    /// Processes that the harness answers for itself, and restarts.
    pub daemons: Vec<i32>,
    /// Directories whose whole content counts (kuasard's state and root).
    pub deep: Vec<PathBuf>,
    /// What is in them and does not count, with all below it: a daemon writes it once, sooner or later, and keeps it, or bounds it
    /// by itself.
    pub kept: Vec<PathBuf>,
    /// Directories whose entries count (containerd's lists of pods and tasks, network namespaces, leases).
    pub shallow: Vec<PathBuf>,
    /// The node's bridge.
    pub bridge: String,
}

/// What there is at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    bags: BTreeMap<&'static str, Bag>,
    /// Threads of kuasard.
    pub threads: usize,
    /// Open file descriptors of kuasard.
    pub fds: usize,
}

impl Snapshot {
    /// Takes it.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn take(scope: &Scope) -> Result<Self> {
        let mut snapshot = Self::default();
        let own_pid = std::process::id().cast_signed();
        for point in census::mounts_below(&scope.owner.dir, own_pid)? {
            snapshot.count("mount", point.display().to_string());
        }
        for cgroup in census::cgroups(&scope.owner)? {
            // The parent that the harness names for its pods is the harness's own, as a pod's is kubelet's.
            if cgroup.file_name().is_none_or(|name| name != scope.owner.tag.as_str()) {
                snapshot.count("cgroup", cgroup.display().to_string());
            }
        }
        let processes = census::processes(&scope.owner)?;
        for process in processes.into_iter().filter(|process| !scope.daemons.contains(&process.pid)) {
            snapshot.count("process", format!("{} {}", process.pid, process.command));
        }
        for dir in &scope.deep {
            walk(dir, &mut |path| {
                // What is known of the node's programs is no pod's.
                let known = path.file_name().is_some_and(|name| name == programs::FILE);
                if !known && !scope.kept.iter().any(|kept| path.starts_with(kept)) {
                    snapshot.count("state", path.display().to_string());
                }
            });
        }
        for dir in &scope.shallow {
            for path in entries(dir) {
                snapshot.count("entry", path.display().to_string());
            }
        }
        for port in entries(&Path::new("/sys/class/net").join(&scope.bridge).join("brif")) {
            snapshot.count("interface", port.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        if let Some(pid) = scope.kuasard_pid {
            snapshot.take_daemon(pid, own_pid, &scope.owner.dir)?;
        }
        Ok(snapshot)
    }

    /// The daemon: its own process and those it has started from the same executable (keeper and worker).
    fn take_daemon(&mut self, pid: i32, own_pid: i32, dir: &Path) -> Result<()> {
        for pid in census::own_family(pid)? {
            for fd in entries(Path::new(&format!("/proc/{pid}/fd"))) {
                let target = fs::read_link(&fd).map(|target| target.display().to_string());
                // Gone between listing and reading: it was the listing's own, or is closed by now.
                let Ok(target) = target else { continue };
                // "socket:[123]" and "pipe:[4]": the number says nothing.
                let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
                self.count("fd of kuasard", kind.to_owned());
                self.fds += 1;
            }
            self.threads += entries(Path::new(&format!("/proc/{pid}/task"))).len();
            let ns = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
            if ns(pid) != ns(own_pid) {
                // It cannot be read of a process that is about to end.
                for point in census::mounts_below(dir, pid).unwrap_or_default() {
                    self.count("mount of kuasard", point.display().to_string());
                }
            }
        }
        Ok(())
    }

    /// Adds the addresses that the host-local CNI plugin holds: a file each, named after it, in a directory per network.
    pub(crate) fn leases(&mut self, dir: &Path) {
        for network in entries(dir) {
            for lease in entries(&network) {
                let name = lease.file_name().unwrap_or_default().to_string_lossy().into_owned();
                // Beside them lie the plugin's lock and its notes on where to go on.
                if name.parse::<std::net::IpAddr>().is_ok() {
                    self.count("lease", name);
                }
            }
        }
    }

    /// Whatever carries one of these ids in its name, a line each.
    #[must_use]
    pub fn naming(&self, ids: &BTreeSet<String>) -> Vec<String> {
        let names = |name: &str| ids.iter().any(|id| name.contains(id.as_str()));
        let all = self.bags.iter().flat_map(|(category, bag)| bag.keys().map(move |name| (category, name)));
        all.filter(|(_, name)| names(name)).map(|(category, name)| format!("{category}: {name}")).collect()
    }

    /// Counts a directory of kuasard's state that is made once, later on, and stays.
    pub fn expect_state(&mut self, path: &Path) {
        self.count("state", path.display().to_string());
    }

    fn count(&mut self, category: &'static str, name: String) {
        *self.bags.entry(category).or_default().entry(name).or_default() += 1;
    }

    /// What is here and was not in `before`, a line each; empty when nothing is.
    #[must_use]
    pub fn beyond(&self, before: &Self) -> Vec<String> {
        let mut more = Vec::new();
        let none = Bag::new();
        for (category, bag) in &self.bags {
            let old = before.bags.get(category).unwrap_or(&none);
            for (name, count) in bag {
                let was = old.get(name).copied().unwrap_or(0);
                if *count > was {
                    let times = if count - was > 1 { format!(" ({} times)", count - was) } else { String::new() };
                    more.push(format!("{category}: {name}{times}"));
                }
            }
        }
        if self.threads > before.threads + IDLE_THREADS {
            more.push(format!("threads of kuasard: {} where {} were", self.threads, before.threads));
        }
        more
    }
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    // A directory that is not there has no entries.
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn walk(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    for path in entries(dir) {
        visit(&path);
        // Not into links; a rootfs mounted here shows up as a mount and as what is in it, which is enough said.
        if path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            walk(&path, visit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(items: &[(&'static str, &str)]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for (category, name) in items {
            snapshot.count(category, (*name).to_owned());
        }
        snapshot
    }

    #[test]
    fn only_more_is_a_leak() {
        let before = of(&[("fd of kuasard", "socket"), ("mount", "/a")]);
        assert!(of(&[("mount", "/a")]).beyond(&before).is_empty());
        let after =
            of(&[("fd of kuasard", "socket"), ("fd of kuasard", "socket"), ("fd of kuasard", "socket"), ("mount", "/b")]);
        assert_eq!(after.beyond(&before), ["fd of kuasard: socket (2 times)", "mount: /b"]);
    }
}
