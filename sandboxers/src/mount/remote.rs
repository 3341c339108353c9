//! Telling root filesystems that need a server from those on this node's disks.

use std::path::{Path, PathBuf};

use super::{info, options::Options, overlay};
use crate::{
    error::Result,
    offload::{Offload, Work},
    types::Mount,
};

/// Filesystems that need nothing but the kernel and a disk. All others may wait for a process or a network.
const LOCAL: [&str; 27] = [
    "bcachefs",
    "binfmt_misc",
    "bpf",
    "btrfs",
    "cgroup",
    "cgroup2",
    "debugfs",
    "devpts",
    "devtmpfs",
    "erofs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "hugetlbfs",
    "iso9660",
    "mqueue",
    "nsfs",
    "overlay",
    "proc",
    "ramfs",
    "rootfs",
    "squashfs",
    "sysfs",
    "tmpfs",
    "xfs",
    "zfs",
];

/// Mounts a root filesystem as [`mount_all`](super::mount_all) does: here, if all that it needs is on this node's disks, else in a helper.
///
/// # Errors
/// As [`mount_all`](super::mount_all), and as [`Offload::run`]. What a helper that was too slow has mounted is the caller's to unmount.
pub async fn mount_rootfs(offload: &Offload, mounts: &[Mount], target: &Path) -> Result<()> {
    let (asked, place) = (mounts.to_vec(), target.to_owned());
    let mounted = super::blocking("mount the root filesystem", move || {
        let local = !needs_server(&asked)?;
        if local {
            super::mount_all_now(&asked, &place)?;
        }
        Ok(local)
    });
    if mounted.await? {
        return Ok(());
    }
    let work = Work::Mount { mounts: mounts.to_vec(), target: target.to_owned() };
    offload.run_one(format!("the root filesystem for {}", target.display()), work).await.map(drop)
}

/// Whether mounting these may wait for more than a disk. Looks at the table of mounts only, never at the files.
fn needs_server(mounts: &[Mount]) -> Result<bool> {
    let mut directories = Vec::new();
    for mount in mounts {
        let options = Options::parse(mount)?;
        let binds = options.flags.contains(nix::mount::MsFlags::MS_BIND) || mount.kind == "bind";
        if !binds && !LOCAL.contains(&mount.kind.as_str()) {
            return Ok(true);
        }
        directories.push(PathBuf::from(&mount.source));
        directories.extend(overlay::directories(&options));
    }
    // Also one below such a mount that has another filesystem on it: the path leads through. A node whose root is on a server needs that
    // one for everything.
    let remote = info::mounts_except(&LOCAL)?.into_iter().filter(|mount| mount.point != Path::new("/"));
    let remote: Vec<_> = remote.map(|mount| mount.point).collect();
    Ok(directories.iter().any(|directory| remote.iter().any(|point| directory.starts_with(point))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_a_server_is_told_by_names_alone() {
        let mount = |kind: &str, source: &str, options: &[&str]| Mount {
            kind: kind.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        assert!(!needs_server(&[mount("overlay", "overlay", &["lowerdir=/proc/1:/proc/2", "upperdir=/sys/3"])]).unwrap());
        assert!(!needs_server(&[mount("bind", "/proc", &["rbind", "ro"])]).unwrap());
        assert!(needs_server(&[mount("nfs4", "server:/export", &[])]).unwrap());
    }
}
