//! OCI runtimes that a daemon has called and that have outlived it.
//!
//! What they are doing goes on. A container that looks half made may be made a moment later, so nothing can be said of a container
//! while one of them is at work on it.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::join_all;
use kuasar_sandboxers::{Error, Result};
use tokio::time::timeout;
use tracing::warn;

use crate::process::Tracked;

/// How long one may take to end by itself: it has nothing to wait for but the kernel, and the first process it has made.
const LIMIT: Duration = Duration::from_secs(5);

/// Those that ran when the daemon started, each with the directory below which it keeps its state.
#[derive(Debug)]
pub(crate) struct Strays(Vec<(Tracked, PathBuf)>);

impl Strays {
    /// Looks for them; `root` is above all their directories. To be called before this daemon calls an OCI runtime.
    pub(crate) fn find(root: &Path) -> Result<Self> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").map_err(Error::io("list", "/proc"))? {
            let name = entry.map_err(Error::io("list", "/proc"))?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            let is_one = || directory(pid).filter(|directory| directory.starts_with(root));
            if is_one().is_none() {
                continue;
            }
            // Looked at once more: it may have ended before it was held.
            if let Some(process) = Tracked::open(pid)?
                && let Some(directory) = is_one()
            {
                found.push((process, directory));
            }
        }
        Ok(Self(found))
    }

    /// Waits until none runs that is at work on the sandbox at `dir`; ends those that take too long.
    pub(crate) async fn settle(&self, dir: &Path) -> Result<()> {
        let strays = self.0.iter().filter(|(_, directory)| directory.starts_with(dir));
        join_all(strays.map(|(stray, _)| end(stray))).await.into_iter().collect()
    }
}

async fn end(stray: &Tracked) -> Result<()> {
    if let Ok(ended) = timeout(LIMIT, stray.ended()).await {
        return ended;
    }
    warn!(pid = stray.identity().pid, "an OCI runtime that the daemon before this one has called does not end; it is killed");
    stray.signal(libc::SIGKILL)?;
    stray.ended().await
}

/// Where a process keeps its state that has been called as we call an OCI runtime: with `--root` and a directory among its arguments.
fn directory(pid: u32) -> Option<PathBuf> {
    // Whoever has ended has none.
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut arguments = line.split(|byte| *byte == 0).skip(1);
    arguments.by_ref().find(|argument| *argument == b"--root")?;
    Some(PathBuf::from(OsStr::from_bytes(arguments.next()?)))
}
