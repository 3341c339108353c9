//! The directory of a pod's machine and that of its sandbox, on disk: made, found by each other, and removed with all that they tell of.

use std::{
    fs::{self, DirBuilder},
    io::ErrorKind,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
};

use kuasar_sandboxers::{Error, Result, cgroup::Cgroup};

use crate::{console::Console, net, share::SharedDir};

/// The machine's directory. Its user may find in it what it is told of, and nothing else: it cannot put anything in another's place.
pub(crate) fn make(dir: &Path) -> Result<()> {
    DirBuilder::new().mode(0o711).create(dir).map_err(Error::io("create", dir))
}

/// The directory of a sandbox's machine, where it has one.
pub(crate) fn of(dir: &Path) -> Result<Option<PathBuf>> {
    linked(&dir.join("vm"))
}

/// What a link of ours says.
fn linked(link: &Path) -> Result<Option<PathBuf>> {
    match fs::read_link(link) {
        Ok(target) => Ok(Some(target)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", link)(error)),
    }
}

pub(crate) fn link(link: &Path, target: &Path) -> Result<()> {
    remove_link(link)?;
    symlink(target, link).map_err(Error::io("create", link))
}

fn remove_link(link: &Path) -> Result<()> {
    match fs::remove_file(link) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", link)(error)),
        _ => Ok(()),
    }
}

/// The link to the machine's directory stays as long as the sandbox's own, for it holds the machine's number.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    Console::of(dir).remove()?;
    remove_link(&dir.join("netns"))?;
    of(dir)?.map_or(Ok(()), |machine| remove_dir(&machine))
}

pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

pub(crate) async fn remove_group(group: &Cgroup) -> Result<()> {
    group.kill().await?;
    group.remove().await
}

/// Undoes all that a pod's machine may have made, whatever is known of it: processes by their control group, the rest by the directory.
pub(crate) async fn clear(dir: &Path, group: &Cgroup) -> Result<()> {
    clear_machine(dir, group).await?;
    remove_dir(dir)
}

/// As [`clear`], but the sandbox's directory stays, for another start.
pub(crate) async fn clear_machine(dir: &Path, group: &Cgroup) -> Result<()> {
    remove_group(group).await?;
    if let Some(netns) = linked(&dir.join("netns"))? {
        net::disconnect(&netns).await?;
    }
    SharedDir::of(dir).remove().await?;
    remove(dir)
}
