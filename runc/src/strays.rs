//! What daemons before this one have started and that runs at its start: OCI runtimes, and processes 1 of pods. One look at all processes
//! of the node finds both.
//!
//! What OCI runtimes are doing goes on. A container that looks half made may be made a moment later, so nothing can be said of a container
//! while one of them is at work on it.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use kuasar_sandboxers::{
    Result,
    process::{Tracked, command_lines},
};
use tokio::time::timeout;
use tracing::warn;

use crate::namespaces;

/// How long one may take to end by itself: it has nothing to wait for but the kernel, and the first process it has made.
const LIMIT: Duration = Duration::from_secs(5);
/// How often to look whether one has become something else.
const LOOK: Duration = Duration::from_millis(10);

/// What ran when the daemon started.
#[derive(Debug)]
pub(crate) struct Strays {
    /// OCI runtimes that may still run, each with the directory below which it keeps its state.
    runtimes: Mutex<Vec<(Arc<Tracked>, PathBuf)>>,
    /// Processes 1, each with its pod's directory, until somebody has asked.
    inits: Mutex<Option<Vec<(Tracked, PathBuf)>>>,
}

impl Strays {
    /// Looks for them; `root` is above all their directories. To be called before this daemon calls an OCI runtime.
    pub(crate) fn find(root: &Path) -> Result<Self> {
        let (mut runtimes, mut inits) = (Vec::new(), Vec::new());
        let ours = |line: &[u8]| directory(line).filter(|directory| directory.starts_with(root));
        command_lines(|pid, line| {
            // Looked at once more: it may have ended before it was held.
            if ours(line).is_some()
                && is_outside(pid)
                && let Some(process) = Tracked::open(pid)?
                && let Ok(line) = fs::read(format!("/proc/{pid}/cmdline"))
                && let Some(directory) = ours(&line)
            {
                runtimes.push((Arc::new(process), directory));
            }
            inits.extend(namespaces::init(pid, line, root)?);
            Ok(())
        })?;
        Ok(Self { runtimes: Mutex::new(runtimes), inits: Mutex::new(Some(inits)) })
    }

    /// The live processes 1 of pods whose own directories are below `root`: the first time those that ran at the daemon's start, then those
    /// that run now.
    pub(crate) fn inits(&self, root: &Path) -> Result<Vec<(Tracked, PathBuf)>> {
        let first = self.inits.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.map_or_else(|| namespaces::inits(root), Ok)
    }

    /// Waits until none runs that is at work on the sandbox at `dir`; ends those that take too long.
    pub(crate) async fn settle(&self, dir: &Path) -> Result<()> {
        let strays: Vec<_> = self
            .runtimes()
            .iter()
            .filter(|(_, directory)| directory.starts_with(dir))
            .map(|(stray, _)| stray.clone())
            .collect();
        let ended = join_all(strays.iter().map(|stray| end(stray))).await;
        ended.into_iter().collect::<Result<()>>()?;
        // What they are held by goes with them.
        self.runtimes().retain(|(_, directory)| !directory.starts_with(dir));
        Ok(())
    }

    fn runtimes(&self) -> MutexGuard<'_, Vec<(Arc<Tracked>, PathBuf)>> {
        self.runtimes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn end(stray: &Tracked) -> Result<()> {
    let settled = async {
        // Nothing tells that a process has entered a container.
        while is_outside(stray.identity().pid) {
            if let Ok(ended) = timeout(LOOK, stray.ended()).await {
                return ended;
            }
        }
        Ok(())
    };
    if let Ok(settled) = timeout(LIMIT, settled).await {
        return settled;
    }
    warn!(pid = stray.identity().pid, "an OCI runtime that the daemon before this one has called does not end; it is killed");
    stray.kill_tree()?;
    stray.ended().await
}

/// Whether a process is in no container. The first process of one that crun has made looks like crun itself until it is started, and those
/// in it can look like whatever they want.
fn is_outside(pid: u32) -> bool {
    let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/mnt")).ok();
    // A zombie has none.
    namespace(&pid.to_string()).is_none_or(|its| Some(its) == namespace("self"))
}

/// Where a process keeps its state that has been called as we call an OCI runtime: with `--root` and a directory among its arguments.
fn directory(line: &[u8]) -> Option<PathBuf> {
    let mut arguments = line.split(|byte| *byte == 0).skip(1);
    arguments.by_ref().find(|argument| *argument == b"--root")?;
    Some(PathBuf::from(OsStr::from_bytes(arguments.next()?)))
}
