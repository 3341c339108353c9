//! Mounting what snapshotters give, and taking it away again.
//!
//! Everything that may wait for a disk runs on tokio's blocking threads, and what may wait for a server in a helper
//! ([`offload`](crate::offload)).

mod idmap;
pub mod info;
mod options;
mod overlay;
mod remote;
mod show;

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::statvfs::{FsFlags, statvfs},
};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};
use serde::{Deserialize, Serialize};
use tracing::error;

use self::options::Options;
pub(crate) use self::show::show_now;
pub use self::{
    idmap::user_namespace,
    info::mounted_under,
    remote::mount_rootfs,
    show::{Showing, Shown},
};
use crate::{
    error::{Error, Result},
    sys::{make_mount_readonly, map_ids_of_mount, set_mount_propagation},
    types::{IdMappings, Mount},
};

/// Mounts a root filesystem: all of `mounts`, in order, on `target` or below it.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Unsupported`] for a mount that cannot be understood, else the kernel's refusal. What was
/// mounted before the failure is unmounted again.
pub async fn mount_all(mounts: &[Mount], target: &Path) -> Result<()> {
    let mounts = mounts.to_vec();
    let target = target.to_owned();
    blocking("mount the root filesystem", move || mount_all_now(&mounts, &target)).await
}

pub(crate) fn mount_all_now(mounts: &[Mount], target: &Path) -> Result<()> {
    let mut done: Vec<PathBuf> = Vec::new();
    for entry in mounts {
        if let Err(failure) = mount_one(entry, target, &mut done) {
            for path in done.iter().rev() {
                if let Err(error) = detach(path) {
                    error!(error = error.report(), "failed to undo a mount");
                }
            }
            return Err(failure);
        }
    }
    Ok(())
}

/// Unmounts everything on `target` and below it, whatever still uses it (`MNT_DETACH`). Missing or not mounted is fine.
///
/// # Errors
/// When the kernel refuses.
pub async fn unmount_all(target: &Path) -> Result<()> {
    let target = target.to_owned();
    blocking("unmount", move || unmount_tree(&target)).await
}

/// How a mount is shown once more by [`bind`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// With what is mounted below it.
    pub recursive: bool,
    /// It cannot be written to; what is mounted below it can, as with `mount -o bind,ro`.
    pub readonly: bool,
    /// What is mounted below it cannot be written to either.
    pub readonly_below: bool,
    /// With what is mounted below `source` later, but nothing goes the other way.
    pub follows: bool,
    /// With its owners mapped; what is mounted below it has its own.
    pub ids: Option<IdMappings>,
}

/// Makes the file or directory `source` visible at `target`, which must exist and be of the same kind.
///
/// It appears there as it is to be, in one step: other mount namespaces that the target's mounts propagate to never see it writable, and
/// they would go on to, for a mount's flags do not propagate.
///
/// # Errors
/// The kernel's refusal; nothing is left mounted then.
pub async fn bind(source: &Path, target: &Path, binding: Binding) -> Result<()> {
    let (source, target) = (source.to_owned(), target.to_owned());
    blocking("bind mount", move || bind_now(&source, &target, &binding)).await
}

fn bind_now(source: &Path, target: &Path, binding: &Binding) -> Result<()> {
    let failed = || Error::failed(format!("bind {} on {}", source.display(), target.display()));
    let ids = binding.ids.as_ref().map(user_namespace).transpose()?;
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, binding.recursive);
    let tree = open_tree(CWD, source, flags).map_err(io::Error::from).map_err(failed())?;
    // A slave first: the clone is a peer of the source, and what is mounted on either would appear on the other.
    let propagation = if binding.follows { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    set_mount_propagation(&tree, propagation).map_err(failed())?;
    if let Some(ids) = ids {
        map_ids_of_mount(&tree, ids.as_fd()).map_err(failed())?;
    }
    if binding.readonly {
        make_mount_readonly(&tree, binding.readonly_below).map_err(failed())?;
    }
    move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(io::Error::from).map_err(failed())
}

/// Changes how mounts propagate to and from `target` (`MS_SHARED`, `MS_SLAVE` …, with `MS_REC` also of all below it).
///
/// # Errors
/// The kernel's refusal.
pub async fn propagate(target: &Path, propagation: MsFlags) -> Result<()> {
    let target = target.to_owned();
    blocking("change the propagation of a mount", move || call(None, &target, None, propagation, None)).await
}

/// Keeps a namespace alive without a process: binds `namespace` (`/proc/<pid>/ns/net`, `/proc/self/fd/<n>`) on the file
/// `target`, which is made. [`unmount_all`] and removing the file let it go.
///
/// # Errors
/// The kernel's refusal; the file is not left behind then.
pub async fn pin(namespace: &Path, target: &Path) -> Result<()> {
    let (namespace, target) = (namespace.to_owned(), target.to_owned());
    blocking("pin a namespace", move || {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(&target)
            .map_err(Error::io("make namespace file", &target))?;
        call(Some(&namespace), &target, None, MsFlags::MS_BIND, None).inspect_err(|_| {
            if let Err(error) = std::fs::remove_file(&target) {
                error!(path = %target.display(), %error, "failed to remove a namespace file");
            }
        })
    })
    .await
}

pub(crate) async fn blocking<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    // Boxed, so that the text of a task is there once for each type of result and not for each piece of work.
    let work: Box<dyn FnOnce() -> Result<T> + Send> = Box::new(work);
    tokio::task::spawn_blocking(work).await.map_err(Error::failed(operation))?
}

fn mount_one(entry: &Mount, root: &Path, done: &mut Vec<PathBuf>) -> Result<()> {
    let options = Options::parse(entry)?;
    let mut place = Place::find(root, &entry.target)?;
    let idmap = options.idmap.as_ref().map(user_namespace).transpose()?;
    if !options.flags.contains(MsFlags::MS_REMOUNT) || !options.data.is_empty() {
        if entry.kind == "overlay" {
            overlay::mount(entry, &options, &place.path, idmap.as_ref())?;
        } else {
            let data = options.data.join(",");
            call(Some(Path::new(&entry.source)), &place.path, Some(&entry.kind), options.flags, Some(&data))?;
        }
        if !options.flags.contains(MsFlags::MS_REMOUNT) {
            done.push(place.real_path()?);
            // What follows is about the new mount, and a descriptor still means what is below it.
            place = Place::find(root, &entry.target)?;
        }
    }
    if !options.propagation.is_empty() {
        call(None, &place.path, None, options.propagation, None)?;
    }
    // A bind mount takes its flags in a second step (mount(2)).
    let flags = options.flags & per_mount_flags();
    if options.flags.contains(MsFlags::MS_BIND) && !flags.is_empty() {
        remount_bind(&place.path, flags)?;
    }
    match idmap {
        Some(namespace) if entry.kind != "overlay" => idmap::map_in_place(&place.path, &namespace),
        _ => Ok(()),
    }
}

/// Where a mount goes. Below a root filesystem the image's own links must not lead out of it, so the place is a descriptor
/// there.
struct Place {
    path: PathBuf,
    fd: Option<OwnedFd>,
}

impl Place {
    fn find(root: &Path, below: &str) -> Result<Self> {
        if below.is_empty() || below == "/" {
            return Ok(Self { path: root.to_owned(), fd: None });
        }
        let io = |errno: Errno| Error::io("find mount point", root.join(below.trim_start_matches('/')))(errno.into());
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let root_fd = openat2(AT_FDCWD, root, OpenHow::new().flags(flags)).map_err(io)?;
        let fd = openat2(&root_fd, below, OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT)).map_err(io)?;
        Ok(Self { path: format!("/proc/self/fd/{}", fd.as_raw_fd()).into(), fd: Some(fd) })
    }

    fn real_path(&self) -> Result<PathBuf> {
        match self.fd {
            Some(_) => std::fs::read_link(&self.path).map_err(Error::io("read link", &self.path)),
            None => Ok(self.path.clone()),
        }
    }
}

fn per_mount_flags() -> MsFlags {
    MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC
        | MsFlags::MS_NOATIME
        | MsFlags::MS_NODIRATIME
        | MsFlags::MS_RELATIME
        | MsFlags::MS_STRICTATIME
}

/// Adds flags to a bind mount and keeps those it has.
fn remount_bind(target: &Path, flags: MsFlags) -> Result<()> {
    let present = statvfs(target).map_err(|errno| Error::io("look at mount", target)(errno.into()))?.flags();
    let keep = [
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    let kept = keep.into_iter().filter(|(has, _)| present.contains(*has)).fold(MsFlags::empty(), |all, (_, flag)| all | flag);
    call(None, target, None, kept | flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT, None)
}

fn call(source: Option<&Path>, target: &Path, kind: Option<&str>, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(source, target, kind, flags, data.filter(|data| !data.is_empty())).map_err(|errno| {
        let what = match (source, kind) {
            (Some(source), Some(kind)) => format!("mount {kind} {} on {}", source.display(), target.display()),
            (Some(source), None) => format!("bind {} on {}", source.display(), target.display()),
            _ => format!("change mount {} ({flags:?})", target.display()),
        };
        Error::failed(what)(io::Error::from(errno))
    })
}

fn detach(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // EINVAL: not a mount point.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(errno) => Err(Error::io("unmount", path)(errno.into())),
    }
}

pub(crate) fn unmount_tree(target: &Path) -> Result<()> {
    // The outermost first, each as often as it is mounted on: that takes all below along, and no path leads through a filesystem that may
    // not answer. What was below is then found gone.
    let mut points = mounted_under(target)?;
    points.sort_by_key(|point| point.components().count());
    points.iter().try_for_each(|point| detach(point))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use super::*;
    use crate::types::IdMapping;

    /// A directory that is unmounted and removed, also when the test fails.
    struct Scratch(tempfile::TempDir);

    impl Scratch {
        /// `None`, said aloud, without root.
        fn new(test: &str) -> Option<Self> {
            if !nix::unistd::geteuid().is_root() {
                eprintln!("SKIP {test}: mounting needs root");
                return None;
            }
            Some(Self(tempfile::tempdir().unwrap()))
        }

        fn dir(&self, name: &str) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            if let Err(error) = unmount_tree(self.0.path()) {
                eprintln!("{}", error.report());
            }
        }
    }

    fn entry(kind: &str, source: &Path, target: &str, options: &[String]) -> Mount {
        Mount { kind: kind.into(), source: source.to_str().unwrap().into(), target: target.into(), options: options.to_vec() }
    }

    /// An overlay needs an upper directory that is not on an overlay itself, so everything lives on a tmpfs.
    async fn tmpfs(scratch: &Scratch) {
        mount_all(&[entry("tmpfs", Path::new("tmpfs"), "", &[])], scratch.0.path()).await.unwrap();
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[tokio::test]
    async fn a_failing_mount_takes_the_earlier_ones_back() {
        let Some(scratch) = Scratch::new("a_failing_mount_takes_the_earlier_ones_back") else { return };
        let (source, target) = (scratch.dir("source"), scratch.dir("target"));
        fs::create_dir(source.join("below")).unwrap();
        let mounts = [
            entry("bind", &source, "", &words(&["rbind", "ro"])),
            entry("tmpfs", Path::new("tmpfs"), "/below", &words(&["size=4k"])),
            entry("ext4", Path::new("/nonexistent"), "", &[]),
        ];
        mount_all(&mounts[..2], &target).await.unwrap();
        assert_eq!(mounted_under(&target).unwrap(), [target.clone(), target.join("below")]);
        assert!(fs::write(target.join("file"), "x").is_err(), "the bind mount is not read-only");
        fs::write(target.join("below/file"), "x").unwrap();
        unmount_all(&target).await.unwrap();
        let failure = mount_all(&mounts, &target).await.unwrap_err();
        assert!(failure.report().starts_with("failed to mount ext4 /nonexistent on "), "{}", failure.report());
        assert!(mounted_under(&target).unwrap().is_empty());
        let layers = format!("lowerdir={}:/no/such/layer", source.display());
        let overlay = entry("overlay", Path::new("overlay"), "", &words(&[&layers]));
        let failure = mount_all(&[overlay], &target).await.unwrap_err();
        assert!(failure.report().contains("/no/such/layer does not exist"), "{}", failure.report());
        unmount_all(&target).await.unwrap();
        unmount_all(&target.join("missing/very")).await.unwrap();
    }

    #[tokio::test]
    async fn a_link_in_the_image_does_not_lead_a_mount_out_of_it() {
        let Some(scratch) = Scratch::new("a_link_in_the_image_does_not_lead_a_mount_out_of_it") else { return };
        let (root, outside) = (scratch.dir("root"), scratch.dir("outside"));
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        let mount = [entry("tmpfs", Path::new("tmpfs"), "link", &[])];
        assert!(mount_all(&mount, &root).await.is_err());
        fs::create_dir_all(root.join(outside.strip_prefix("/").unwrap())).unwrap();
        mount_all(&mount, &root).await.unwrap();
        assert_eq!(mounted_under(scratch.0.path()).unwrap(), [root.join(outside.strip_prefix("/").unwrap())]);
    }

    #[tokio::test]
    async fn overlays_of_more_layers_than_a_page_of_options_holds() {
        let Some(scratch) = Scratch::new("overlays_of_more_layers_than_a_page_of_options_holds") else { return };
        tmpfs(&scratch).await;
        let long = "a-rather-long-directory-name-as-snapshotters-have-them/snapshots";
        let layers: Vec<_> = (0..120).map(|layer| scratch.dir(&format!("{long}/{layer}/fs"))).collect();
        fs::write(layers[7].join("seven"), "7").unwrap();
        let list: Vec<_> = layers.iter().map(|layer| layer.to_str().unwrap()).collect();
        let options = [
            "index=off".to_owned(),
            format!("workdir={}", scratch.dir("work").display()),
            format!("upperdir={}", scratch.dir("upper").display()),
            format!("lowerdir={}", list.join(":")),
        ];
        assert!(options.join(",").len() > 8192);
        let target = scratch.dir("root");
        mount_all(&[entry("overlay", Path::new("overlay"), "", &options)], &target).await.unwrap();
        assert_eq!(fs::read_to_string(target.join("seven")).unwrap(), "7");
        fs::write(target.join("new"), "x").unwrap();
        assert!(scratch.dir("upper").join("new").exists());
        assert_ne!(std::env::current_dir().unwrap(), scratch.0.path().join(long));
    }

    #[tokio::test]
    async fn mapped_ids() {
        let Some(scratch) = Scratch::new("mapped_ids") else { return };
        tmpfs(&scratch).await;
        let (lower, second) = (scratch.dir("layers/1"), scratch.dir("layers/2"));
        fs::write(lower.join("file"), "x").unwrap();
        let maps = words(&["uidmap=0:100000:65536", "gidmap=0:200000:65536"]);
        let target = scratch.dir("root");
        let bound = mount_all(&[entry("bind", &lower, "", &[&maps[..], &words(&["rbind"])].concat())], &target).await;
        if let Err(error) = bound {
            eprintln!("SKIP mapped_ids: this kernel maps no ids on tmpfs: {}", error.report());
            return;
        }
        let owner = |path: PathBuf| fs::metadata(path).map(|file| (file.uid(), file.gid())).unwrap();
        assert_eq!(owner(target.join("file")), (100_000, 200_000));
        unmount_all(&target).await.unwrap();

        let overlay = [
            maps,
            vec![
                format!("workdir={}", scratch.dir("work").display()),
                format!("upperdir={}", scratch.dir("upper").display()),
                format!("lowerdir={}:{}", second.display(), lower.display()),
            ],
        ];
        mount_all(&[entry("overlay", Path::new("overlay"), "", &overlay.concat())], &target).await.unwrap();
        assert_eq!(owner(target.join("file")), (100_000, 200_000));
        assert_eq!(mounted_under(scratch.0.path()).unwrap(), [scratch.0.path().to_owned(), target]);
        assert!(!scratch.0.path().join("root.idmapped").exists());
    }

    #[tokio::test]
    async fn namespaces_stay_while_they_are_pinned() {
        let Some(scratch) = Scratch::new("namespaces_stay_while_they_are_pinned") else { return };
        let range = vec![IdMapping { container_id: 0, host_id: 70_000, length: 1000 }];
        let namespace = user_namespace(&IdMappings { uids: range.clone(), gids: range }).unwrap();
        let pinned = scratch.0.path().join("user");
        pin(Path::new(&format!("/proc/self/fd/{}", namespace.as_raw_fd())), &pinned).await.unwrap();
        let inode = fs::metadata(format!("/proc/self/fd/{}", namespace.as_raw_fd())).unwrap().ino();
        drop(namespace);
        assert_eq!(fs::metadata(&pinned).unwrap().ino(), inode);
        let error = pin(Path::new("/proc/self/ns/none"), &scratch.0.path().join("none")).await.unwrap_err();
        assert!(error.report().contains("/proc/self/ns/none"), "{}", error.report());
        assert!(!scratch.0.path().join("none").exists());
        let two =
            vec![IdMapping { container_id: 0, host_id: 1, length: 10 }, IdMapping { container_id: 5, host_id: 50, length: 10 }];
        let error = user_namespace(&IdMappings { uids: two.clone(), gids: two }).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
    }

    #[tokio::test]
    async fn binds_files_and_keeps_flags() {
        let Some(scratch) = Scratch::new("binds_files_and_keeps_flags") else { return };
        mount_all(&[entry("tmpfs", Path::new("tmpfs"), "", &words(&["noexec", "nosuid"]))], &scratch.dir("t")).await.unwrap();
        let (source, target) = (scratch.dir("t").join("file"), scratch.0.path().join("target"));
        fs::write(&source, "x").unwrap();
        fs::write(&target, "").unwrap();
        bind(&source, &target, Binding { readonly: true, ..Binding::default() }).await.unwrap();
        assert!(fs::write(&target, "y").is_err());
        let flags = statvfs(&target).unwrap().flags();
        assert!(flags.contains(FsFlags::ST_NOEXEC | FsFlags::ST_NOSUID | FsFlags::ST_RDONLY));
        unmount_all(&target).await.unwrap();
        assert_eq!(fs::read_to_string(&target).unwrap(), "");
    }
}
