//! Out-of-memory kills, told by the kernel: no thread and no polling.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::event::EventfdFlags;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};
use tracing::warn;

use crate::{
    error::{Error, Result},
    sys::watch,
};

/// How long the kernel may take from removing a v1 group to telling that it did: a grace period of RCU and a work queue.
const LAST_SIGNAL: Duration = Duration::from_secs(1);

/// Tells of processes of one group that the kernel killed for want of memory.
#[derive(Debug)]
pub struct OomWatch(Kind);

#[derive(Debug)]
enum Kind {
    V1 {
        event: AsyncFd<OwnedFd>,
        /// Exists as long as the group does.
        control: Box<Path>,
        ended: bool,
    },
    V2 {
        events: Watched,
        population: Watched,
        kills: u64,
    },
}

impl OomWatch {
    /// cgroup v1: an eventfd that is registered for `memory.oom_control` (Documentation/admin-guide/cgroup-v1/memory.rst,
    /// 10). The kernel signals it at each out-of-memory, and once when the group is removed.
    pub(super) fn v1(dir: &Path) -> Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::failed("make an eventfd")(io::Error::from(errno)))?;
        let control = dir.join("memory.oom_control");
        let file = File::open(&control).map_err(Error::io("open", &control))?;
        let register = dir.join("cgroup.event_control");
        let line = format!("{} {}", event.as_raw_fd(), file.as_raw_fd());
        fs::write(&register, line).map_err(Error::io("watch for out-of-memory kills with", register))?;
        let event = watch(event, Interest::READABLE).map_err(Error::failed("watch an eventfd"))?;
        Ok(Self(Kind::V1 { event, control: control.into(), ended: false }))
    }

    /// cgroup v2: `memory.events` and `cgroup.events` poll as urgent when they change. Not inotify, of which a user has
    /// 128 instances by default.
    pub(super) fn v2(dir: &Path) -> Result<Self> {
        let events = Watched::open(&dir.join("memory.events"))?;
        let kills = events.value("oom_kill")?.unwrap_or(0);
        let population = Watched::open(&dir.join("cgroup.events"))?;
        population.value("populated")?;
        Ok(Self(Kind::V2 { events, population, kills }))
    }

    /// The next kill, or several at once; `None` when the group has gone away (v2: when no process is left in it).
    /// Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<()> {
        let next = match &mut self.0 {
            Kind::V1 { ended: true, .. } => return None,
            Kind::V1 { event, control, ended } => next_v1(event, control, ended).await,
            Kind::V2 { events, population, kills } => next_v2(events, population, kills).await,
        };
        next.unwrap_or_else(|error| {
            warn!(error = error.report(), "cannot watch for out-of-memory kills any more");
            None
        })
    }
}

async fn next_v1(event: &AsyncFd<OwnedFd>, control: &Path, ended: &mut bool) -> Result<Option<()>> {
    let count = signals(event).await?;
    if control.exists() {
        return Ok(Some(()));
    }
    // The group has been removed, and its last signal is no kill. It is in the count, or it is still to come.
    *ended = true;
    let kills = match timeout(LAST_SIGNAL, signals(event)).await {
        Ok(more) => count + more? - 1,
        Err(_) => count - 1,
    };
    Ok((kills > 0).then_some(()))
}

/// Waits for signals of an eventfd and says how many there were, at least one.
async fn signals(event: &AsyncFd<OwnedFd>) -> Result<u64> {
    let failed = Error::failed("read an eventfd");
    let read = |event: &AsyncFd<OwnedFd>| {
        let mut count = [0; 8];
        rustix::io::read(event.get_ref(), &mut count)?;
        Ok(u64::from_ne_bytes(count))
    };
    loop {
        let mut ready = match event.readable().await {
            Ok(ready) => ready,
            Err(error) => return Err(failed(error)),
        };
        if let Ok(count) = ready.try_io(read) {
            return count.map_err(failed);
        }
    }
}

async fn next_v2(events: &Watched, population: &Watched, kills: &mut u64) -> Result<Option<()>> {
    loop {
        let Some(now) = events.value("oom_kill")? else { return Ok(None) };
        if std::mem::replace(kills, now) < now {
            return Ok(Some(()));
        }
        if population.value("populated")?.unwrap_or(0) == 0 {
            return Ok(None);
        }
        tokio::select! {
            result = events.changed() => result?,
            result = population.changed() => result?,
        }
    }
}

/// A file of cgroupfs that says when it changes: poll(2) reports it as urgent until it is read again.
#[derive(Debug)]
struct Watched {
    file: AsyncFd<OwnedFd>,
    path: Box<Path>,
}

impl Watched {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let file = watch(file.into(), Interest::PRIORITY).map_err(Error::io("watch", path))?;
        Ok(Self { file, path: path.into() })
    }

    /// The value of a key now; `None` when the group is gone.
    fn value(&self, key: &str) -> Result<Option<u64>> {
        // Both files are a few short lines.
        let mut text = [0; 1024];
        let length = match rustix::io::pread(self.file.get_ref(), &mut text, 0) {
            Ok(length) => length,
            Err(rustix::io::Errno::NODEV) => return Ok(None),
            Err(errno) => return Err(Error::io("read", &*self.path)(errno.into())),
        };
        let text = String::from_utf8_lossy(&text[..length]);
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        Ok(Some(value.map_or(0, super::files::number)))
    }

    async fn changed(&self) -> Result<()> {
        let mut ready = self.file.ready(Interest::PRIORITY).await.map_err(Error::io("watch", &*self.path))?;
        // Whoever waits reads the file next, so the next change is a new event.
        ready.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::cgroup::Hierarchy;

    /// The mechanism of v2 on a hybrid host, where a v2 group has no memory controller: `cgroup.events` stands for both files.
    #[tokio::test]
    async fn cgroup_files_tell_of_changes_without_polling() {
        let unified = Hierarchy::of_host().unwrap().unified().map(|tree| tree.dir(Path::new("/kuasar-test-oom")));
        let Some(dir) = unified.filter(|dir| nix::unistd::geteuid().is_root() && fs::create_dir(dir).is_ok()) else {
            eprintln!("SKIP cgroup_files_tell_of_changes_without_polling: needs root and a writable cgroup v2 tree");
            return;
        };
        let watched = Watched::open(&dir.join("cgroup.events")).unwrap();
        assert_eq!(watched.value("populated").unwrap(), Some(0));
        assert!(timeout(Duration::from_millis(50), watched.changed()).await.is_err(), "a change without cause");
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        timeout(Duration::from_secs(10), watched.changed()).await.unwrap().unwrap();
        assert_eq!(watched.value("populated").unwrap(), Some(1));
        let (events, mut kills) = (Watched::open(&dir.join("cgroup.events")).unwrap(), 0);
        let ended = timeout(Duration::from_secs(10), next_v2(&events, &watched, &mut kills));
        child.kill().unwrap();
        let ended = ended.await.unwrap().unwrap();
        child.wait().unwrap();
        fs::remove_dir(&dir).unwrap();
        assert_eq!(ended, None);
        assert_eq!(watched.value("populated").unwrap(), None);
    }
}
