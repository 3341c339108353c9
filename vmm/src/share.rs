//! What a pod's containers see of the host's filesystems: one directory that virtiofsd shares.
//!
//! ```text
//!  <sandbox>/shared/                         a mount of its own, shared with virtiofsd's namespace
//!      containers/<id>/rootfs                the snapshot, mounted
//!      containers/<id>/mounts/<number>       each volume, bound
//! ```
//!
//! Read-only is a property of the mounts made here, so no guest can undo it. What the guest is told are these names and nothing else: it
//! never learns a path of the host, and none comes from it.

use std::{
    fs::{self, DirBuilder, File},
    io::ErrorKind,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use kuasar_guest_protocol::{SHARE_TARGET, SHARED_CONTAINERS};
use kuasar_sandboxers::{Error, Result, id::ContainerId, mount, types::Mount};
use nix::mount::MsFlags;

/// How a volume is to be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Binding {
    /// The guest must not write to it.
    pub(crate) readonly: bool,
    /// With what is mounted below it.
    pub(crate) recursive: bool,
    /// With what the host mounts below it later (`HostToContainer`).
    pub(crate) follows_host: bool,
}

/// The shared directory of one sandbox.
#[derive(Clone, Debug)]
pub(crate) struct SharedDir(PathBuf);

impl SharedDir {
    pub(crate) fn of(sandbox: &Path) -> Self {
        Self(sandbox.join("shared"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it: a mount whose own mounts propagate, so that virtiofsd's namespace follows.
    pub(crate) async fn create(&self) -> Result<()> {
        let containers = self.0.join(SHARED_CONTAINERS);
        make_dir(&self.0)?;
        mount::bind(&self.0, &self.0, MsFlags::empty(), false).await?;
        mount::propagate(&self.0, MsFlags::MS_PRIVATE).await?;
        mount::propagate(&self.0, MsFlags::MS_SHARED).await?;
        make_dir(&containers)
    }

    /// Takes everything out of it and away. One that is not there is fine.
    pub(crate) async fn remove(&self) -> Result<()> {
        mount::unmount_all(&self.0).await?;
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &self.0)(error)),
            _ => Ok(()),
        }
    }

    fn container(&self, id: &ContainerId) -> PathBuf {
        self.0.join(SHARED_CONTAINERS).join(id.as_str())
    }

    fn in_guest(id: &ContainerId) -> PathBuf {
        Path::new(SHARE_TARGET).join(SHARED_CONTAINERS).join(id.as_str())
    }

    /// Makes a container's place.
    pub(crate) fn add_container(&self, id: &ContainerId) -> Result<()> {
        make_dir(&self.container(id).join("mounts"))
    }

    /// Shows a container's root filesystem; returns its path in the guest.
    pub(crate) async fn add_rootfs(&self, id: &ContainerId, mounts: &[Mount]) -> Result<PathBuf> {
        let target = self.container(id).join("rootfs");
        make_dir(&target)?;
        mount::mount_all(mounts, &target).await?;
        Ok(Self::in_guest(id).join("rootfs"))
    }

    /// Shows a directory as a container's root filesystem; returns its path in the guest.
    pub(crate) async fn bind_rootfs(&self, id: &ContainerId, source: &Path, readonly: bool) -> Result<PathBuf> {
        let target = self.container(id).join("rootfs");
        make_dir(&target)?;
        self.bind(source, &target, Binding { readonly, recursive: true, follows_host: false }).await?;
        Ok(Self::in_guest(id).join("rootfs"))
    }

    /// Shows a file or directory of the host's as a container's volume; returns its path in the guest.
    pub(crate) async fn add_volume(&self, id: &ContainerId, number: usize, source: &Path, binding: Binding) -> Result<PathBuf> {
        let name = format!("mounts/{number}");
        let target = self.container(id).join(&name);
        let found = fs::metadata(source).map_err(Error::io("find the volume", source))?;
        if found.is_dir() {
            make_dir(&target)?;
        } else {
            File::create(&target).map_err(Error::io("create", &target))?;
        }
        self.bind(source, &target, binding).await?;
        Ok(Self::in_guest(id).join(name))
    }

    async fn bind(&self, source: &Path, target: &Path, binding: Binding) -> Result<()> {
        let recursive = if binding.recursive { MsFlags::MS_REC } else { MsFlags::empty() };
        mount::bind(source, target, recursive, binding.readonly).await?;
        // A slave first, or what is mounted here would appear on the host; then shared again, or virtiofsd would not see it.
        let propagation = if binding.follows_host { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
        mount::propagate(target, propagation | MsFlags::MS_REC).await?;
        mount::propagate(target, MsFlags::MS_SHARED | MsFlags::MS_REC).await
    }

    /// Takes a container's filesystems away.
    pub(crate) async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        let dir = self.container(id);
        mount::unmount_all(&dir).await?;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", &dir)(error)),
            _ => Ok(()),
        }
    }

    /// The containers that have a place here.
    pub(crate) fn containers(&self) -> Result<Vec<String>> {
        let dir = self.0.join(SHARED_CONTAINERS);
        let entries = match fs::read_dir(&dir) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(Error::io("list", &dir))?,
        };
        Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }
}

/// virtiofsd may run as root of another user namespace: it needs what the directory's owner may.
fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(Error::io("create", path))
}
