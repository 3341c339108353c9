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
    time::{sleep, timeout},
};
use tracing::warn;

use crate::{
    error::{Error, Result},
    sys::watch,
};

/// How long the kernel may take from removing a v1 group to telling that it did: a grace period of RCU and a work queue.
const LAST_SIGNAL: Duration = Duration::from_secs(1);

/// Pauses between looks at the counter after a signal: the first, doubled each time, up to the last.
const COUNTED: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(512));

/// Tells of processes of one group that the kernel killed for want of memory.
#[derive(Debug)]
pub struct OomWatch {
    kind: Kind,
    /// How many kills have been told.
    told: u64,
}

#[derive(Debug)]
enum Kind {
    V1 { event: AsyncFd<OwnedFd>, dir: Box<Path>, ended: bool },
    V2 { events: Watched, population: Watched },
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
        Ok(Self { kind: Kind::V1 { event, dir: dir.into(), ended: false }, told: 0 })
    }

    /// cgroup v2: `memory.events` and `cgroup.events` poll as urgent when they change. Not inotify, of which a user has
    /// 128 instances by default.
    pub(super) fn v2(dir: &Path) -> Result<Self> {
        let events = Watched::open(&dir.join("memory.events"))?;
        events.value("oom_kill")?;
        let population = Watched::open(&dir.join("cgroup.events"))?;
        population.value("populated")?;
        Ok(Self { kind: Kind::V2 { events, population }, told: 0 })
    }

    /// How many were killed since the group was made, when it is more than was told before: at once where some were killed before this
    /// watched. `None` when the group has gone away (v2: when no process is left in it). Cancelling loses nothing.
    pub async fn next(&mut self) -> Option<u64> {
        let next = match &mut self.kind {
            Kind::V1 { ended: true, .. } => return None,
            Kind::V1 { event, dir, ended } => next_v1(event, dir, ended, &mut self.told).await,
            Kind::V2 { events, population } => next_v2(events, population, &mut self.told).await,
        };
        next.unwrap_or_else(|error| {
            warn!(error = error.report(), "cannot watch for out-of-memory kills any more");
            None
        })
    }

    /// As [`Self::next`], without waiting. The kernel counts a kill before the process is gone: asked after the end of a process, this knows
    /// of its kill, while the signal of it may not have been noticed yet.
    pub fn counted(&mut self) -> Option<u64> {
        let before = self.told;
        let counted = match &mut self.kind {
            Kind::V1 { ended: true, .. } => Ok(()),
            Kind::V1 { event, dir, .. } => count_v1(event, dir, &mut self.told),
            Kind::V2 { events, .. } => events.value("oom_kill").map(|now| self.told = before.max(now.unwrap_or(0))),
        };
        if let Err(error) = counted {
            warn!(error = error.report(), "cannot count out-of-memory kills");
        }
        (self.told > before).then_some(self.told)
    }
}

/// The counters of v1, where each is of one group alone: of this one and those below it. `None` when it is gone.
fn counter(dir: &Path) -> Result<Option<u64>> {
    let is_gone = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV));
    let control = dir.join("memory.oom_control");
    let text = match fs::read_to_string(&control) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(Error::io("read", control)(error)),
    };
    let mut kills = text.lines().find_map(|line| line.strip_prefix("oom_kill ")).map_or(0, super::files::number);
    let below = match fs::read_dir(dir) {
        Ok(below) => below,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    for entry in below.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        kills += counter(&entry.path())?.unwrap_or(0);
    }
    Ok(Some(kills))
}

/// What the eventfd of a group that is gone says: its last signal is no kill. There may be several for one kill, so they only tell whether
/// there was one.
fn killed_before_the_end(signals: u64, told: &mut u64) -> Option<u64> {
    let unknown = *told == 0 && signals > 1;
    unknown.then(|| {
        *told = 1;
        1
    })
}

fn count_v1(event: &AsyncFd<OwnedFd>, dir: &Path, told: &mut u64) -> Result<()> {
    if let Some(counted) = counter(dir)? {
        *told = counted.max(*told);
        return Ok(());
    }
    let mut signals = [0; 8];
    match rustix::io::read(event.get_ref(), &mut signals) {
        Ok(_) => drop(killed_before_the_end(u64::from_ne_bytes(signals), told)),
        Err(rustix::io::Errno::AGAIN) => {}
        Err(errno) => return Err(Error::failed("read an eventfd")(io::Error::from(errno))),
    }
    Ok(())
}

async fn next_v1(event: &AsyncFd<OwnedFd>, dir: &Path, ended: &mut bool, told: &mut u64) -> Result<Option<u64>> {
    let mut signalled = 0;
    loop {
        // The kernel signals before it kills and counts, and to groups below one that is at its limit, too.
        let mut pause = COUNTED.0;
        loop {
            match counter(dir)? {
                Some(counted) if counted > *told => {
                    *told = counted;
                    return Ok(Some(counted));
                }
                Some(_) if signalled == 0 || pause > COUNTED.1 => break,
                Some(_) => sleep(pause).await,
                None => {
                    *ended = true;
                    // The last signal is among those, or is still to come.
                    let more = timeout(LAST_SIGNAL, signals(event)).await.unwrap_or(Ok(0))?;
                    return Ok(killed_before_the_end(signalled + more, told));
                }
            }
            pause *= 2;
        }
        signalled = signals(event).await?;
    }
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

async fn next_v2(events: &Watched, population: &Watched, told: &mut u64) -> Result<Option<u64>> {
    loop {
        let Some(now) = events.value("oom_kill")? else { return Ok(None) };
        if now > *told {
            *told = now;
            return Ok(Some(now));
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
