//! What a node has on this machine: its mounts, cgroups, processes. One answer for the leak check and for the clean-up.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};

/// Whose things are looked for.
#[derive(Clone, Debug)]
pub struct Owner {
    /// The node's scratch directory.
    pub dir: PathBuf,
    /// Its last component, unique on the machine: part of the name of each cgroup that tests ask for.
    pub tag: String,
    /// Ids of pods and containers, which name cgroups where the pod asked for none.
    pub ids: BTreeSet<String>,
}

impl Owner {
    fn names(&self, text: &str) -> bool {
        text.contains(&self.tag) || self.ids.iter().any(|id| text.contains(id.as_str()))
    }
}

/// Mount points below `dir`, in the order they were mounted, as `pid` sees them.
///
/// # Errors
/// mountinfo cannot be read.
pub fn mounts_below(dir: &Path, pid: i32) -> Result<Vec<PathBuf>> {
    let path = format!("/proc/{pid}/mountinfo");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(text
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .filter(|point| point.starts_with(dir))
        .collect())
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn unescape(field: &str) -> String {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let code = after.get(..3).and_then(|octal| u8::from_str_radix(octal, 8).ok());
        if let Some(code) = code {
            out.push(char::from(code));
            rest = &after[3..];
        } else {
            out.push('\\');
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// Where cgroup hierarchies are mounted, v1 and v2.
///
/// # Errors
/// mountinfo cannot be read.
pub fn cgroup_roots() -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let mut roots: Vec<PathBuf> = text
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right.starts_with("cgroup").then(|| left.split(' ').nth(4).map(|field| PathBuf::from(unescape(field))))?
        })
        .collect();
    roots.sort();
    roots.dedup();
    Ok(roots)
}

/// The owner's cgroups in all hierarchies, parents before children.
///
/// # Errors
/// A hierarchy cannot be listed.
pub fn cgroups(owner: &Owner) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for root in cgroup_roots()? {
        walk_dirs(&root, &mut |path| {
            if path.strip_prefix(&root).is_ok_and(|below| owner.names(&below.to_string_lossy())) {
                found.push(path.to_path_buf());
            }
        });
    }
    Ok(found)
}

fn walk_dirs(dir: &Path, visit: &mut dyn FnMut(&Path)) {
    // A cgroup may vanish between its listing and its visit: that is what is waited for, not an error.
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            visit(&path);
            walk_dirs(&path, visit);
        }
    }
}

/// A process that belongs to a node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// Its command line, NUL replaced by space; its comm where that is empty.
    pub command: String,
}

/// Processes of the owner: daemons and helpers that name its directory on their command line, what runs in its cgroups, and
/// whatever has a root file system from its directory.
///
/// # Errors
/// /proc cannot be listed.
pub fn processes(owner: &Owner) -> Result<Vec<Process>> {
    let dir = owner.dir.to_string_lossy().into_owned();
    let own_ns = fs::read_link("/proc/self/ns/mnt").context("read /proc/self/ns/mnt")?;
    let own_pid = std::process::id().cast_signed();
    let mut found = Vec::new();
    for pid in pids()? {
        if pid == own_pid {
            continue;
        }
        // Each of these files may be gone by now, with the process.
        let read = |file: &str| {
            fs::read(format!("/proc/{pid}/{file}"))
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default()
        };
        let command = read("cmdline").trim_end_matches('\0').replace('\0', " ");
        let cgroup = read("cgroup");
        let is_daemon = command.contains(&dir) && is_runtime_program(&command);
        let in_cgroup = owner.names(&cgroup);
        let on_rootfs = || {
            fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|ns| ns != own_ns)
                && read("mountinfo").lines().any(|line| line.split(' ').nth(4) == Some("/") && line.contains(&dir))
        };
        // A zombie has neither; its parent answers for it.
        if is_daemon || in_cgroup || on_rootfs() {
            let command = if command.is_empty() { read("comm").trim().to_owned() } else { command };
            found.push(Process { pid, command });
        }
    }
    Ok(found)
}

/// Processes in control groups with `named` in their paths that run the program of this name.
///
/// # Errors
/// /proc cannot be listed.
pub fn programs(named: &str, program: &OsStr) -> Result<Vec<i32>> {
    let owner = Owner { dir: "/nonexistent".into(), tag: named.to_owned(), ids: BTreeSet::new() };
    let runs = |command: &str| Path::new(command.split(' ').next().unwrap_or_default()).file_name() == Some(program);
    Ok(processes(&owner)?.into_iter().filter(|process| runs(&process.command)).map(|process| process.pid).collect())
}

/// Somebody's `tail -f` on a log of ours must not count as ours.
fn is_runtime_program(command: &str) -> bool {
    let program = command.split(' ').next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    ["containerd", "kuasar", "runc", "crun", "youki", "ctr", "etcd", "kube"].iter().any(|prefix| name.starts_with(prefix))
}

fn pids() -> Result<Vec<i32>> {
    Ok(fs::read_dir("/proc")
        .context("list /proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect())
}

/// The parent of a process; `None` when it has ended.
#[must_use]
pub fn parent(pid: i32) -> Option<i32> {
    stat(pid, 4)
}

/// When a process began, in clock ticks since the machine did; `None` when it has ended. With its pid it names the process: pids
/// are used again.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    stat(pid, 22)
}

/// A field of `/proc/<pid>/stat`, counted as proc(5) does; none of a zombie, which has ended.
fn stat<T: FromStr>(pid: i32, field: usize) -> Option<T> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // comm may hold anything, a closing parenthesis too: the third field begins after the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    if matches!(fields.first(), Some(&("Z" | "X"))) {
        return None;
    }
    fields.get(field.checked_sub(3)?)?.parse().ok()
}

/// Processes that were run as this program with this argument among others.
///
/// # Errors
/// /proc cannot be listed.
pub fn running(program: &Path, argument: &Path) -> Result<Vec<i32>> {
    let [program, argument] = [program, argument].map(|path| path.as_os_str().as_encoded_bytes().to_vec());
    let runs = |pid: &i32| {
        // One that has ended has no command line.
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.next() == Some(&*program) && words.any(|word| word == argument)
    };
    Ok(pids()?.into_iter().filter(runs).collect())
}

/// `pid` and all its descendants.
///
/// # Errors
/// /proc cannot be listed.
pub fn descendants(pid: i32) -> Result<Vec<i32>> {
    let parents: Vec<(i32, i32)> = pids()?.into_iter().filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let mut family = vec![pid];
    let mut next = 0;
    while next < family.len() {
        let of = family[next];
        family.extend(parents.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| *pid));
        next += 1;
    }
    Ok(family)
}

/// A daemon and its helpers: `pid` and those of its descendants whose executable has the same path or a name of ours, as
/// opposed to the containers that are its children, too.
///
/// # Errors
/// /proc cannot be listed.
pub fn own_family(pid: i32) -> Result<Vec<i32>> {
    let exe = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let program = exe(pid);
    let own = |pid: i32| {
        program.is_some() && exe(pid) == program
            || fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with("kuasar"))
    };
    Ok(descendants(pid)?.into_iter().filter(|pid| own(*pid)).collect())
}

/// Proportional set size of some processes together, in KiB: each shared page counts for its share. What has ended counts for
/// nothing.
///
/// # Errors
/// A process shows no such figure.
pub fn pss_kib(pids: &[i32]) -> Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // ESRCH comes from a process that ends between open and read.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
            Err(error) => return Err(error).with_context(|| format!("read {path}")),
        };
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        sum += kib.with_context(|| format!("no Pss in {path}"))?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape("/plain"), "/plain");
        assert_eq!(unescape(r"/odd\9"), r"/odd\9");
    }

    #[test]
    fn only_runtime_programs_are_claimed_by_command_line() {
        assert!(is_runtime_program("/usr/bin/containerd -c /tmp/x"));
        assert!(!is_runtime_program("tail -f /tmp/x/containerd.log"));
    }

    #[test]
    fn this_process_has_memory_and_one_that_is_gone_has_none() {
        let own = pss_kib(&[std::process::id().cast_signed()]).unwrap();
        assert!(own > 0);
        assert_eq!(pss_kib(&[i32::MAX]).unwrap(), 0);
    }

    #[test]
    fn descendants_begin_with_the_process_itself() {
        let own = std::process::id().cast_signed();
        assert_eq!(descendants(own).unwrap().first(), Some(&own));
    }

    #[test]
    fn a_process_is_known_by_its_parent_its_start_and_its_command_line() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let own = std::process::id().cast_signed();
        assert_eq!(parent(pid), Some(own));
        assert!(start_time(pid) >= start_time(own));
        let sleepers = || running(Path::new("/bin/sleep"), Path::new("1000")).unwrap();
        assert!(crate::wait::until_sync(std::time::Duration::from_secs(10), || sleepers().contains(&pid)));
        child.kill().unwrap();
        // A zombie by now, or about to be one.
        assert!(crate::wait::until_sync(std::time::Duration::from_secs(10), || start_time(pid).is_none()));
        assert!(!sleepers().contains(&pid));
        child.wait().unwrap();
        assert_eq!(parent(pid), None);
    }
}
