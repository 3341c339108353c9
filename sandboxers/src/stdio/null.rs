//! What a process has as a standard stream that goes nowhere.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, fchmod, makedev, mknodat, openat, unlinkat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

use crate::error::{Error, Result};

/// A file system that is mounted nowhere, so that nothing finds its files by a path.
static NOWHERE: OnceLock<OwnedFd> = OnceLock::new();

/// A null device with an inode of its own (null(4)). It is what `/dev/null` is, opened again or not, but a process that changes its
/// owner or its mode (an OCI runtime gives standard streams to the container's user, fchown(2)) does not change the node's
/// `/dev/null`, nor that of another process.
///
/// # Errors
/// When the kernel refuses: this takes root.
pub fn null_device() -> Result<OwnedFd> {
    open().map_err(Error::failed("make a null device"))
}

fn open() -> io::Result<OwnedFd> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let directory = nowhere()?;
    let name = COUNT.fetch_add(1, Ordering::Relaxed).to_string();
    mknodat(directory, name.as_str(), FileType::CharacterDevice, Mode::from_raw_mode(0o600), makedev(1, 3))?;
    let opened = openat(directory, name.as_str(), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    unlinkat(directory, name.as_str(), AtFlags::empty())?;
    let opened = opened?;
    // Not by mknod, which heeds the umask.
    fchmod(&opened, Mode::from_raw_mode(0o666))?;
    Ok(opened)
}

fn nowhere() -> io::Result<&'static OwnedFd> {
    if let Some(mounted) = NOWHERE.get() {
        return Ok(mounted);
    }
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    // Another thread may have been as fast; its own will do.
    Ok(NOWHERE.get_or_init(|| mounted))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        io::{Read, Write},
        os::{
            fd::AsRawFd,
            unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, fchown},
        },
    };

    use super::*;

    #[test]
    fn is_a_null_device_of_its_own() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIP is_a_null_device_of_its_own: making a device needs root");
        }
        let node = fs::metadata("/dev/null").unwrap();
        let [one, other] = [(); 2].map(|()| File::from(null_device().unwrap()));
        let found = one.metadata().unwrap();
        assert!(found.file_type().is_char_device());
        assert_eq!((found.rdev(), found.mode() & 0o7777, found.uid()), (node.rdev(), 0o666, 0));
        assert_eq!((&one).write(b"gone").unwrap(), 4);
        assert_eq!((&one).read(&mut [0; 4]).unwrap(), 0);
        // As `cat /dev/stdin` does.
        let again = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", one.as_raw_fd()));
        assert_eq!(again.unwrap().read(&mut [0; 4]).unwrap(), 0);

        fchown(&one, Some(1000), Some(1000)).unwrap();
        one.set_permissions(fs::Permissions::from_mode(0o000)).unwrap();
        assert_eq!((one.metadata().unwrap().uid(), one.metadata().unwrap().mode() & 0o777), (1000, 0));
        for untouched in [other.metadata().unwrap(), fs::metadata("/dev/null").unwrap()] {
            assert_eq!((untouched.uid(), untouched.mode()), (node.uid(), node.mode()));
        }
    }
}
