//! What is mounted in the guest for containers: disks, and memory that they share.

use std::{
    collections::HashMap,
    fs::{self, DirBuilder},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use kuasar_guest_protocol::agent::{Disk, HugePages, Storage, storage::Kind};
use kuasar_sandboxers::{Error, Result, mount, types::Mount};
use nix::sys::stat::{Mode, SFlag, mknod};
use tokio::sync::Mutex;

use crate::{setup::Share, uevent};

/// Where the kernel lists disks.
const DISKS: &str = "/sys/block";

/// The longest serial number that virtio-blk tells, in bytes.
const SERIAL_MAX: usize = 20;

/// What is mounted, and for how many containers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Storages(Arc<Mutex<HashMap<PathBuf, usize>>>);

/// A storage that a container has.
#[derive(Debug)]
pub(crate) struct Held {
    target: PathBuf,
    /// A raw disk's device number.
    pub(crate) device: Option<(u64, u64)>,
    /// Whether the container may only read that.
    pub(crate) readonly: bool,
}

impl Storages {
    /// Makes one available at its target.
    pub(crate) async fn add(&self, storage: &Storage) -> Result<Held> {
        let target = absolute(&storage.target)?;
        let mut uses = self.0.lock().await;
        if let Some(count) = uses.get_mut(&target) {
            return match &storage.kind {
                Some(Kind::HugePages(_)) => {
                    *count += 1;
                    Ok(Held { target, device: None, readonly: false })
                }
                _ => Err(Error::AlreadyExists { kind: "storage", id: storage.target.clone() }),
            };
        }
        let readonly = matches!(&storage.kind, Some(Kind::Disk(disk)) if disk.options.iter().any(|option| option == "ro"));
        let (device, count) = match &storage.kind {
            Some(Kind::Disk(disk)) => (add_disk(disk, &target).await?, 1),
            Some(Kind::HugePages(pages)) => {
                mount_huge_pages(pages, &target).await?;
                // It lives as long as the pod, which is a user of its own: between an init container and the next there is none.
                (None, 2)
            }
            _ => return Err(Error::invalid("storage", format!("that for {} is of no kind known here", storage.target))),
        };
        uses.insert(target.clone(), count);
        Ok(Held { target, device, readonly })
    }

    /// Gives one back; the last one takes it away. One that was given back before is fine.
    pub(crate) async fn remove(&self, target: &Path) -> Result<()> {
        let mut uses = self.0.lock().await;
        match uses.get_mut(target) {
            None => return Ok(()),
            Some(count @ 2..) => {
                *count -= 1;
                return Ok(());
            }
            Some(_) => {}
        }
        mount::unmount_all(target).await?;
        let removed = if target.is_dir() { fs::remove_dir(target) } else { fs::remove_file(target) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", target)(error)),
            _ => uses.remove(target),
        };
        Ok(())
    }
}

impl Held {
    /// Where it is.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }
}

/// A path in the guest that names one place only.
pub(crate) fn absolute(path: &str) -> Result<PathBuf> {
    let plain = Path::new(path)
        .components()
        .all(|part| matches!(part, std::path::Component::RootDir | std::path::Component::Normal(_)));
    if path.starts_with('/') && path.len() > 1 && plain && !path.contains('\0') {
        Ok(path.into())
    } else {
        Err(Error::invalid("path in the guest", format!("{path:?} is not an absolute path without \"..\"")))
    }
}

/// Makes a directory that may be there.
pub(crate) fn make_dir(dir: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(Error::io("create", dir))
}

async fn mount_huge_pages(pages: &HugePages, target: &Path) -> Result<()> {
    make_dir(target)?;
    let kind = "hugetlbfs".to_owned();
    let mount = Mount { source: kind.clone(), kind, target: String::new(), options: pages.options.clone() };
    mount::mount_all(&[mount], target).await
}

/// Mounts a disk, or makes a node for it: then its device number.
async fn add_disk(disk: &Disk, target: &Path) -> Result<Option<(u64, u64)>> {
    if disk.serial.is_empty() || disk.serial.len() > SERIAL_MAX {
        let why = format!("{:?} is no serial number; it has 1 to {SERIAL_MAX} bytes", disk.serial);
        return Err(Error::invalid("disk", why));
    }
    let device = uevent::appear(&format!("the disk {:?}", disk.serial), || find_disk(Path::new(DISKS), &disk.serial)).await?;
    let number = fs::metadata(&device).map_err(Error::io("look at", &device))?.rdev();
    if disk.filesystem.is_empty() {
        if let Some(parent) = target.parent() {
            make_dir(parent)?;
        }
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        mknod(target, SFlag::S_IFBLK, mode, number).map_err(|errno| Error::io("make device", target)(errno.into()))?;
        return Ok(Some((nix::sys::stat::major(number), nix::sys::stat::minor(number))));
    }
    make_dir(target)?;
    let mount = Mount {
        kind: disk.filesystem.clone(),
        source: device.display().to_string(),
        target: String::new(),
        options: disk.options.clone(),
    };
    mount::mount_all(&[mount], target).await.map(|()| None)
}

/// The device of the disk with that serial number, if it is there.
fn find_disk(disks: &Path, serial: &str) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(disks).map_err(Error::io("list", disks))? {
        let entry = entry.map_err(Error::io("list", disks))?;
        // Other disks have none; one that has just gone has none either.
        let Ok(told) = fs::read_to_string(entry.path().join("serial")) else { continue };
        if told.trim_end_matches(['\n', '\0']) == serial {
            let device = Path::new("/dev").join(entry.file_name());
            return Ok(device.exists().then_some(device));
        }
    }
    Ok(None)
}

/// Mounts a share of the host's. One that is mounted there already is fine.
pub(crate) async fn mount_share(share: &Share) -> Result<()> {
    let target = &share.target;
    make_dir(target)?;
    if !mount::mounted_under(target)?.is_empty() {
        return Ok(());
    }
    // No devices: what a snapshot says of those is the host's, not this machine's.
    uevent::appear(&format!("the share {:?}", share.tag), || share.mount()).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use super::*;

    #[test]
    fn disks_by_serial() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial) in [("null", Some("rootfs-1\n")), ("vdz", None)] {
            let disk = dir.path().join(name);
            fs::create_dir(&disk).unwrap();
            if let Some(serial) = serial {
                fs::write(disk.join("serial"), serial).unwrap();
            }
        }
        assert_eq!(find_disk(dir.path(), "rootfs-1").unwrap(), Some("/dev/null".into()));
        assert_eq!(find_disk(dir.path(), "rootfs").unwrap(), None);
    }

    #[test]
    fn fuzz_paths() {
        bolero::check!().with_type::<String>().for_each(|path| {
            if let Ok(path) = absolute(path) {
                assert!(path.is_absolute() && !path.components().any(|part| part == std::path::Component::ParentDir));
            }
        });
    }

    #[test]
    fn paths_are_plain() {
        for path in ["", "/", "a", "/a/../b", "/a\0"] {
            assert!(absolute(path).is_err(), "{path:?}");
        }
        assert!(absolute("/run/kuasar/storage/x").is_ok());
    }

    #[tokio::test]
    async fn huge_pages_are_shared_and_go_with_their_last_user() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP huge_pages_are_shared_and_go_with_their_last_user: mounting takes root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("shared");
        let storages = Storages::default();
        let storage = Storage {
            kind: Some(Kind::HugePages(HugePages { options: vec!["mode=0700".into()], ..Default::default() })),
            target: target.to_str().unwrap().into(),
            ..Default::default()
        };
        let (first, second) = (storages.add(&storage).await.unwrap(), storages.add(&storage).await.unwrap());
        fs::write(target.join("file"), "").unwrap();
        storages.remove(first.target()).await.unwrap();
        assert!(target.join("file").exists());
        storages.remove(second.target()).await.unwrap();
        storages.remove(second.target()).await.unwrap();
        assert!(!target.exists());
    }
}
