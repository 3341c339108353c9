//! What a pod's containers see of the host's filesystems: one directory that virtiofsd shares.
//!
//! ```text
//!  <sandbox>/shared/                         a mount of its own, shared with virtiofsd's namespace
//!      containers/<id>/<attempt>/rootfs      the snapshot, mounted
//!      containers/<id>/<attempt>/mounts/<n>  each volume, bound
//! ```
//!
//! Each attempt at making a container has a name of its own: a guest remembers for a second where a name led to, and would look for a
//! second attempt in the place of the first.
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
use kuasar_sandboxers::{
    Error, Result,
    id::ContainerId,
    mount::{self, Binding},
    types::Mount,
};
use nix::mount::MsFlags;

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
        mount::bind(&self.0, &self.0, Binding::default()).await?;
        mount::propagate(&self.0, MsFlags::MS_SHARED).await?;
        make_dir(&containers)
    }

    /// Takes everything out of it and away. One that is not there is fine.
    pub(crate) async fn remove(&self) -> Result<()> {
        remove_tree(&self.0).await
    }

    fn container(&self, id: &ContainerId) -> PathBuf {
        self.0.join(SHARED_CONTAINERS).join(id.as_str())
    }

    /// Whether a container has a place here.
    pub(crate) fn has(&self, id: &ContainerId) -> bool {
        self.container(id).exists()
    }

    /// Makes a container's place, in which nothing of an earlier attempt is.
    pub(crate) async fn add_container(&self, id: &ContainerId) -> Result<ContainerDir> {
        let dir = self.container(id);
        let earlier: Vec<u32> = names(&dir)?.iter().filter_map(|name| name.parse().ok()).collect();
        let attempt = earlier.iter().max().map_or(0, |last| last.wrapping_add(1)).to_string();
        let place = ContainerDir {
            host: dir.join(&attempt),
            guest: [SHARE_TARGET, SHARED_CONTAINERS, id.as_str(), &attempt].iter().collect(),
            staging: self.staging(id),
        };
        make_dir(&place.host.join("mounts"))?;
        unstage(&place.staging).await?;
        for attempt in earlier {
            remove_tree(&dir.join(attempt.to_string())).await?;
        }
        Ok(place)
    }

    /// Where a root filesystem is put together.
    fn staging(&self, id: &ContainerId) -> PathBuf {
        self.0.with_file_name(format!("{id}.rootfs"))
    }

    /// Takes a container's filesystems away.
    pub(crate) async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        unstage(&self.staging(id)).await?;
        remove_tree(&self.container(id)).await
    }

    /// The containers that have a place here.
    pub(crate) fn containers(&self) -> Result<Vec<String>> {
        names(&self.0.join(SHARED_CONTAINERS))
    }
}

/// The place of one container.
#[derive(Debug)]
pub(crate) struct ContainerDir {
    host: PathBuf,
    guest: PathBuf,
    staging: PathBuf,
}

impl ContainerDir {
    /// Shows a root filesystem; returns its path in the guest.
    pub(crate) async fn add_rootfs(&self, mounts: &[Mount]) -> Result<PathBuf> {
        // Elsewhere first: some take several steps, of which the guest must not see the first.
        make_dir(&self.staging)?;
        mount::mount_all(mounts, &self.staging).await?;
        let shown = self.bind_rootfs(&self.staging, false).await;
        let unmounted = unstage(&self.staging).await;
        let shown = shown?;
        unmounted.map(|()| shown)
    }

    /// Shows a directory as the root filesystem; returns its path in the guest.
    pub(crate) async fn bind_rootfs(&self, source: &Path, readonly: bool) -> Result<PathBuf> {
        let target = self.host.join("rootfs");
        make_dir(&target)?;
        mount::bind(source, &target, Binding { readonly, recursive: true, ..Binding::default() }).await?;
        Ok(self.guest.join("rootfs"))
    }

    /// Shows a file or directory of the host's as a volume; returns its path in the guest.
    pub(crate) async fn add_volume(&self, number: usize, source: &Path, binding: Binding) -> Result<PathBuf> {
        let name = format!("mounts/{number}");
        let target = self.host.join(&name);
        let found = fs::metadata(source).map_err(Error::io("find the volume", source))?;
        if found.is_dir() {
            make_dir(&target)?;
        } else {
            File::create(&target).map_err(Error::io("create", &target))?;
        }
        let follows = binding.follows;
        mount::bind(source, &target, binding).await?;
        if !follows {
            // virtiofsd has them. Here they would keep the node from removing the directories that they are on.
            mount::leave_below_to_others(&target).await?;
        }
        Ok(self.guest.join(name))
    }
}

/// What is in a directory; nothing if it is not there.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(Error::io("list", dir))?,
    };
    Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// Removes a directory and what is mounted in it. One that is not there is fine.
async fn remove_tree(dir: &Path) -> Result<()> {
    mount::unmount_all(dir).await?;
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

async fn unstage(staging: &Path) -> Result<()> {
    mount::unmount_all(staging).await?;
    match fs::remove_dir(staging) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", staging)(error)),
        _ => Ok(()),
    }
}

/// virtiofsd may run as root of another user namespace: it needs what the directory's owner may.
fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(Error::io("create", path))
}
