//! The processes of a pod's machine.

use std::fs;

use anyhow::{Context, Result};
use kuasar_sandboxers::cgroup::Cgroup;

/// A process, and what it was started with: the program first.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) words: Vec<String>,
}

/// All processes of a pod's machine: those in its control group.
///
/// # Errors
/// The groups cannot be looked through.
pub(crate) fn of_pod(id: &str) -> Result<Vec<Process>> {
    let mut pids = Vec::new();
    for group in Cgroup::named(&format!("kuasar-vm-{id}"))? {
        pids.extend(group.processes()?);
    }
    // A process is in a group of each hierarchy.
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter()
        .map(|pid| {
            let path = format!("/proc/{pid}/cmdline");
            let line = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
            let words = line.split_terminator('\0').map(str::to_owned).collect();
            Ok(Process { pid: i32::try_from(pid)?, words })
        })
        .collect()
}

/// Those of them that run this program.
pub(crate) fn all_running<'a>(processes: &'a [Process], program: &str) -> impl Iterator<Item = &'a Process> {
    let runs = move |process: &&Process| process.words.first().is_some_and(|path| path.rsplit('/').next() == Some(program));
    processes.iter().filter(runs)
}

/// The first of them that runs this program.
///
/// # Errors
/// There is none.
pub(crate) fn running<'a>(processes: &'a [Process], program: &str) -> Result<&'a Process> {
    all_running(processes, program).next().with_context(|| format!("the machine has no {program}"))
}
