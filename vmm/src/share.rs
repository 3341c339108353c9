//! What a pod's containers see of the host's filesystems: two directories that virtiofsd shares.
//!
//! ```text
//!  <sandbox>/shared/                       a mount of its own, shared with the namespaces of both virtiofsd
//!      roots/<id>.<attempt>                the snapshot, mounted
//!      volumes/<id>.<attempt>/<n>          each volume, bound
//! ```
//!
//! Two of them ([`Half`]), because what a guest remembers of a file is virtiofsd's to say, for all that it shows. A snapshot belongs to the
//! container alone: the guest reads each file once. Volumes are changed by others.
//!
//! Each attempt at making a container has a name that was never there before: a guest remembers where a name led to.
//!
//! Read-only is a property of the mounts made here, so no guest can undo it. What the guest is told are these names and nothing else: it
//! never learns a path of the host, and none comes from it.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder},
    io::ErrorKind,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use kuasar_sandboxers::{
    Error, Result,
    id::ContainerId,
    mount::{self, Binding, Showing, Shown},
    offload::{Done, Offload, Step, Work},
    types::Mount,
};
use nix::{
    mount::MsFlags,
    time::{ClockId, clock_gettime},
};

use crate::{rewrite::Volume, virtiofsd::Cache};

/// What is shared, by who else changes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    /// Root filesystems that were mounted for one container.
    Roots,
    /// All else.
    Volumes,
}

impl Half {
    pub(crate) const ALL: [Self; 2] = [Self::Roots, Self::Volumes];

    /// Its directory, and its tag as a device.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Roots => "roots",
            Self::Volumes => "volumes",
        }
    }

    pub(crate) fn cache(self) -> Cache {
        match self {
            Self::Roots => Cache::Always,
            Self::Volumes => Cache::Auto,
        }
    }

    /// Where the guest mounts it.
    pub(crate) fn target(self) -> PathBuf {
        Path::new("/run/kuasar").join(self.name())
    }
}

/// The shared directory of one sandbox.
#[derive(Clone, Debug)]
pub(crate) struct SharedDir(PathBuf);

impl SharedDir {
    pub(crate) fn of(sandbox: &Path) -> Self {
        Self(sandbox.join("shared"))
    }

    pub(crate) fn half(&self, half: Half) -> PathBuf {
        self.0.join(half.name())
    }

    /// Makes it: a mount whose own mounts propagate, so that virtiofsd's namespace follows.
    pub(crate) async fn create(&self) -> Result<()> {
        make_dir(&self.0)?;
        mount::bind(&self.0, &self.0, Binding::default()).await?;
        mount::propagate(&self.0, MsFlags::MS_SHARED).await?;
        Half::ALL.iter().try_for_each(|half| make_dir(&self.half(*half)))
    }

    /// Takes everything out of it and away. One that is not there is fine.
    pub(crate) async fn remove(&self) -> Result<()> {
        remove_tree(&self.0).await
    }

    /// What containers have here, as directories, each with whose it is.
    fn places(&self) -> Result<Vec<(String, PathBuf)>> {
        let mut places = Vec::new();
        for dir in Half::ALL.map(|half| self.half(half)) {
            for name in names(&dir)? {
                if let Some((id, _)) = name.rsplit_once('.') {
                    places.push((id.to_owned(), dir.join(&name)));
                }
            }
        }
        Ok(places)
    }

    /// Makes a container's place, in which nothing of an earlier attempt is.
    pub(crate) async fn add_container(&self, id: &ContainerId) -> Result<ContainerDir> {
        self.remove_container(id).await?;
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(Error::failed("read the clock"))?;
        let name = format!("{id}.{}-{}", now.tv_sec(), now.tv_nsec());
        let place = ContainerDir { shared: self.clone(), name, staging: self.staging(id) };
        make_dir(&place.host(Half::Volumes))?;
        Ok(place)
    }

    /// Where a root filesystem is put together.
    fn staging(&self, id: &ContainerId) -> PathBuf {
        self.0.with_file_name(format!("{id}.rootfs"))
    }

    /// Takes a container's filesystems away.
    pub(crate) async fn remove_container(&self, id: &ContainerId) -> Result<()> {
        unstage(&self.staging(id)).await?;
        for (_, place) in self.places()?.into_iter().filter(|(of, _)| of == id.as_str()) {
            remove_tree(&place).await?;
        }
        Ok(())
    }

    /// The containers that have a place here.
    pub(crate) fn containers(&self) -> Result<BTreeSet<String>> {
        Ok(self.places()?.into_iter().map(|(id, _)| id).collect())
    }
}

/// The place of one container.
#[derive(Debug)]
pub(crate) struct ContainerDir {
    shared: SharedDir,
    name: String,
    staging: PathBuf,
}

impl ContainerDir {
    fn host(&self, half: Half) -> PathBuf {
        self.shared.half(half).join(&self.name)
    }

    fn guest(&self, half: Half) -> PathBuf {
        half.target().join(&self.name)
    }

    /// Shows a root filesystem that is the container's alone; returns its path in the guest.
    pub(crate) async fn add_rootfs(&self, mounts: &[Mount], offload: &Offload) -> Result<PathBuf> {
        // Elsewhere first: some take several steps, of which the guest must not see the first.
        make_dir(&self.staging)?;
        mount::mount_rootfs(offload, mounts, &self.staging).await?;
        let target = self.host(Half::Roots);
        make_dir(&target)?;
        let shown = mount::bind(&self.staging, &target, Binding { recursive: true, ..Binding::default() }).await;
        let unmounted = unstage(&self.staging).await;
        shown.and(unmounted)?;
        Ok(self.guest(Half::Roots))
    }

    /// Shows a directory as the root filesystem; returns its path in the guest. It may be anybody's.
    pub(crate) async fn bind_rootfs(&self, source: &Path, readonly: bool, offload: &Offload) -> Result<PathBuf> {
        let name = "rootfs";
        let binding = Binding { readonly, recursive: true, ..Binding::default() };
        let showing = Showing {
            source: source.to_owned(),
            target: self.host(Half::Volumes).join(name),
            binding,
            leave_below: false,
            except_huge_pages: false,
        };
        offload.run_one(format!("the root filesystem {}", source.display()), Work::Show(showing)).await?;
        Ok(self.guest(Half::Volumes).join(name))
    }

    /// Shows files or directories of the host's as volumes, and finds out which are on huge pages: those are not shown. Returns their paths
    /// in the guest, in the same order.
    pub(crate) async fn add_volumes(&self, volumes: &mut [Volume], offload: &Offload) -> Result<Vec<PathBuf>> {
        let steps = volumes.iter().map(|volume| {
            let binding = volume.binding.clone();
            let showing = Showing {
                source: volume.source.clone(),
                target: self.host(Half::Volumes).join(volume.index.to_string()),
                // virtiofsd has what is mounted below. Here that would keep the node from removing the directories that it is on.
                leave_below: !binding.follows,
                binding,
                except_huge_pages: true,
            };
            Step { what: format!("volume {}", volume.source.display()), work: Work::Show(showing) }
        });
        let shown = offload.run(steps.collect()).await?;
        for (volume, done) in volumes.iter_mut().zip(shown) {
            volume.huge_page = match done {
                Done::Shown(Shown::HugePages { size }) => Some(size),
                _ => None,
            };
        }
        Ok(volumes.iter().map(|volume| self.guest(Half::Volumes).join(volume.index.to_string())).collect())
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
