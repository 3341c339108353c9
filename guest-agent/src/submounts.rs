//! Directories of the host's shares that are filesystems of their own, as the host says of each root filesystem and volume, for the time
//! that a container has them.
//!
//! The kernel mounts them where somebody first comes by. For a container that would be in its own namespace, and its last process would take
//! them away as it ends. That must not be: when such a process was killed while it waited for a page of a file, the page is still on its
//! way, and Linux (seen with 6.1) falls over the file that is in use: "Busy inodes after unmount of virtiofs". The process then never ends,
//! and nor does its container. So the agent comes by first, and takes them away later.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use kuasar_sandboxers::{Error, Result, mount, spec::OciSpec};
use tokio::time::sleep;
use tracing::warn;

/// After this time the host has answered whatever processes that have ended may have asked for. The kernel does not tell of virtiofs, as it
/// does of other FUSE filesystems, what is on its way.
const ANSWERED: Duration = Duration::from_secs(10);

/// Has those mounted, below the host's shares, that a container is to have; tells the directories that may be some.
pub(crate) fn hold(spec: &OciSpec, shares: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let document = spec.as_value();
    let mounts = document["mounts"].as_array().into_iter().flatten();
    let sources = mounts.map(|mount| &mount["source"]).chain([&document["root"]["path"]]);
    let paths = sources.filter_map(|source| source.as_str()).map(Path::new);
    let mut held = Vec::new();
    for path in paths.filter(|path| shares.iter().any(|share| path.starts_with(share))) {
        // What is mounted on a directory is mounted when it is gone into.
        match OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path.join(".")) {
            Ok(_) => held.push(path.to_owned()),
            // A file is no filesystem.
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => {}
            Err(error) => return Err(Error::io("look into", path)(error)),
        }
    }
    Ok(held)
}

/// Takes them away when that can be done, some time after this has returned.
pub(crate) fn let_go(held: Vec<PathBuf>) {
    if held.is_empty() {
        return;
    }
    tokio::spawn(async move {
        sleep(ANSWERED).await;
        for dir in held {
            if let Err(error) = mount::unmount_all(&dir).await {
                warn!(error = error.report(), "a share of a container that has gone stays mounted");
            }
        }
    });
}
