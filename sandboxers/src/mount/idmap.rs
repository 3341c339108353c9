//! Mounts whose owners appear mapped, as in a user namespace (mount_setattr(2), `MOUNT_ATTR_IDMAP`).

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::{
    error::{Error, Result},
    sys::{NamespaceHolder, map_mount_ids},
    types::{IdMapping, IdMappings},
};

/// Makes a user namespace with the given mappings. It lives as long as the descriptor, or until it is pinned elsewhere.
///
/// # Errors
/// [`Error::Invalid`] when the kernel does not take the mappings, which it does for ranges that overlap or are too many.
pub fn user_namespace(mappings: &IdMappings) -> Result<OwnedFd> {
    let holder = NamespaceHolder::new().map_err(Error::failed("make a user namespace"))?;
    let directory = format!("/proc/{}", holder.pid());
    for (file, ranges) in [("uid_map", &mappings.uids), ("gid_map", &mappings.gids)] {
        // One write for all lines: the kernel takes no second one.
        fs::write(format!("{directory}/{file}"), lines(ranges))
            .map_err(|error| Error::invalid("user namespace", format!("the kernel refuses {ranges:?} as {file}: {error}")))?;
    }
    let path = format!("{directory}/ns/user");
    File::open(&path).map(OwnedFd::from).map_err(Error::io("open", path))
}

fn lines(ranges: &[IdMapping]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.container_id, range.host_id, range.length)).collect()
}

/// Mounts `source` and all below it once more on `target`, with ids mapped.
pub(super) fn map(source: &Path, target: &Path, namespace: &OwnedFd, readonly: bool) -> Result<()> {
    let failed = |what: &str, error: io::Error| {
        let operation = format!("{what} {} on {}", source.display(), target.display());
        Err(Error::failed(operation)(error))
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = match open_tree(CWD, source, flags) {
        Ok(tree) => tree,
        Err(errno) => return failed("clone mount", errno.into()),
    };
    if let Err(error) = map_mount_ids(&tree, namespace.as_fd(), readonly) {
        return failed("map the ids of", error);
    }
    // The target may be a link in /proc/self/fd.
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    match move_mount(&tree, "", CWD, target, flags) {
        Ok(()) => Ok(()),
        Err(errno) => failed("attach mapped mount", errno.into()),
    }
}

/// Covers the mount at `target` with itself, with ids mapped.
pub(super) fn map_in_place(target: &Path, namespace: &OwnedFd) -> Result<()> {
    map(target, target, namespace, false)
}
