//! Showing a file or directory of the node elsewhere, once it is known what it is.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use nix::{
    mount::MsFlags,
    sys::statfs::{HUGETLBFS_MAGIC, statfs},
};
use serde::{Deserialize, Serialize};

use super::{Binding, bind_now, call, detach, mounted_under};
use crate::error::{Error, Result};

/// A file or directory to be shown elsewhere. Looking at it may take as long as its filesystem likes: this is work for
/// [`offload`](crate::offload).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Showing {
    /// The file or directory.
    pub source: PathBuf,
    /// Where to show it: made here, of the same kind, in a directory that exists.
    pub target: PathBuf,
    /// How to show it.
    pub binding: Binding,
    /// For another mount namespace: what is mounted below it is left to those that the target propagates to.
    pub leave_below: bool,
    /// One on huge pages is not shown.
    pub except_huge_pages: bool,
}

/// What was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shown {
    /// The file or directory.
    Bound,
    /// Nothing: it is a hugetlbfs.
    HugePages {
        /// Of a page, in bytes.
        size: i64,
    },
}

pub(crate) fn show_now(showing: &Showing) -> Result<Shown> {
    let Showing { source, target, binding, leave_below, except_huge_pages } = showing;
    let found = fs::metadata(source).map_err(Error::io("find the volume", source))?;
    if *except_huge_pages
        && let Ok(filesystem) = statfs(source)
        && filesystem.filesystem_type() == HUGETLBFS_MAGIC
    {
        return Ok(Shown::HugePages { size: filesystem.block_size() });
    }
    if found.is_dir() {
        // virtiofsd may run as root of another user namespace: it needs what the directory's owner may.
        DirBuilder::new().recursive(true).mode(0o711).create(target).map_err(Error::io("create", target))?;
    } else {
        File::create(target).map_err(Error::io("create", target))?;
    }
    bind_now(source, target, binding)?;
    if *leave_below {
        leave_below_to_others(target)?;
    }
    Ok(Shown::Bound)
}

/// Takes what is mounted below `target` away from this mount namespace, and leaves it in those that `target` has been propagated to. There
/// it stays until `target`'s own directory is removed.
///
/// As long as a mount is here, its place cannot be removed here, though it were in another mount altogether: `rmdir` finds it busy.
fn leave_below_to_others(target: &Path) -> Result<()> {
    let below: Vec<_> = mounted_under(target)?.into_iter().filter(|path| path != target).collect();
    if below.is_empty() {
        return Ok(());
    }
    // Or they would go everywhere.
    call(None, target, None, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None)?;
    below.iter().rev().try_for_each(|path| detach(path))
}
