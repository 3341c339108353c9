//! What of this daemon's own limits and scores its children are not to have.
//!
//! A daemon needs more open files than a program is given by default (1024): programs that close all descriptors up to their limit, and
//! those that use select(2), work with few only. It is spared by the OOM killer, may be confined to some processors, and may leave a core.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit, setpriority_process, setrlimit};

use crate::error::{Error, Result};

/// What this process was started with, once it has raised it.
static FIRST: Mutex<Option<Rlimit>> = Mutex::new(None);

/// Sets the limits of open files, as an init system does.
///
/// # Errors
/// When the kernel refuses: to raise the hard limit takes `CAP_SYS_RESOURCE`.
pub fn begin_with(soft: u64, hard: u64) -> io::Result<()> {
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum: Some(hard) })?)
}

/// Raises the soft limit to the hard one. Children that are to have the first one back are told it: [`of_children`].
///
/// # Errors
/// When the kernel refuses, which is not expected.
pub fn raise_open_files() -> io::Result<()> {
    let mut first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = *first.get_or_insert_with(|| getrlimit(Resource::Nofile));
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// Runs `start` with the soft limit that this process was started with. For a process of one thread: others would have it, too.
///
/// # Errors
/// When the kernel refuses, which is not expected.
pub fn with_first_open_files<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(limit) = *first else { return Ok(start()) };
    // What is open above it stays so.
    setrlimit(Resource::Nofile, limit)?;
    let started = start();
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(started)
}

/// The soft and the hard limit of open files for children.
#[must_use]
pub fn of_children() -> (u64, u64) {
    let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = first.unwrap_or_else(|| getrlimit(Resource::Nofile));
    // None is what the kernel calls infinity.
    (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX))
}

/// Takes what this daemon has of its own from a child that has not begun yet: one that holds what a guest's memory holds, or serves it.
/// It is as likely to be killed for memory as any program, leaves no core, and runs on every processor at the usual priority.
///
/// # Errors
/// When the kernel refuses what it refuses to no one: the child has ended.
pub fn make_ordinary(pid: u32) -> Result<()> {
    let path = PathBuf::from(format!("/proc/{pid}/oom_score_adj"));
    match fs::write(&path, "0") {
        // Only a lower score takes CAP_SYS_RESOURCE, which a daemon in a container may lack.
        Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(Error::io("write", path)(error)),
        _ => {}
    }
    let raw = pid.cast_signed();
    let child = rustix::process::Pid::from_raw(raw);
    let limit = |errno: rustix::io::Errno| Error::failed(format!("limit process {pid}"))(io::Error::from(errno));
    prlimit(child, Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(limit)?;
    let mut every = CpuSet::new();
    (0..CpuSet::count()).try_for_each(|cpu| every.set(cpu)).map_err(Error::failed("list processors"))?;
    sched_setaffinity(Pid::from_raw(raw), &every).map_err(Error::failed(format!("let process {pid} use every processor")))?;
    match setpriority_process(child, 0) {
        // To raise it takes CAP_SYS_NICE.
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) | Ok(()) => Ok(()),
        Err(errno) => Err(limit(errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_child_is_ordinary() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let pid = child.id();
        let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
        fs::write(format!("/proc/{pid}/oom_score_adj"), "500").unwrap();
        let mut first = CpuSet::new();
        first.set(0).unwrap();
        sched_setaffinity(Pid::from_raw(pid.cast_signed()), &first).unwrap();
        let made = make_ordinary(pid);
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let (score, limits, status) = (read("oom_score_adj"), read("limits"), read("status"));
        child.kill().unwrap();
        child.wait().unwrap();
        made.unwrap();
        // Without the capability it is never below the daemon's.
        assert!(score == "0\n" || own.trim().parse::<i32>().unwrap() > 0, "{score}");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
        let cpus = |text: &str| text.lines().find(|line| line.starts_with("Cpus_allowed_list")).unwrap().to_owned();
        assert_eq!(cpus(&status), cpus(&fs::read_to_string("/proc/1/status").unwrap()));
    }
}
