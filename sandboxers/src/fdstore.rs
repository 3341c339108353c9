//! Descriptors that outlive this process, left with somebody who holds them for its successor.
//!
//! A process with a terminal is hung up when the last descriptor of the terminal's master is closed, and one that writes to a pipe
//! without a reader is killed: such descriptors may not go with the daemon.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Debug,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    error::{Error, Result},
    id::SandboxId,
};

/// Who holds them.
pub trait Holder: Debug + Send + Sync {
    /// Holds copies of descriptors under a name.
    ///
    /// # Errors
    /// When the holder is gone, or cannot hold more.
    fn hold(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()>;

    /// Closes what it holds under a name.
    ///
    /// # Errors
    /// When the holder is gone.
    fn release(&self, name: &str) -> io::Result<()>;
}

/// Descriptors by name. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct FdStore(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// `None`: no process outlives this one.
    holder: Option<Box<dyn Holder>>,
    names: Mutex<Names>,
}

#[derive(Debug, Default)]
struct Names {
    /// What has not been taken.
    inherited: HashMap<String, Vec<OwnedFd>>,
    /// Sandboxes of which there are several of the same id, in different namespaces.
    ambiguous: BTreeSet<SandboxId>,
    /// The numbers of those that are held for this process.
    current: HashMap<String, u64>,
    count: u64,
}

impl Names {
    fn next(&mut self, name: &str) -> u64 {
        self.count += 1;
        self.current.insert(name.to_owned(), self.count);
        self.count
    }
}

/// Descriptors that are held; they are released with this, unless others have got their name.
#[derive(Debug)]
pub struct Held {
    store: FdStore,
    name: String,
    number: u64,
}

impl FdStore {
    /// A store at `holder`, which already holds what is `inherited` for the processes before this one.
    #[must_use]
    pub fn new(holder: impl Holder + 'static, inherited: HashMap<String, Vec<OwnedFd>>) -> Self {
        let names = Mutex::new(Names { inherited, ..Names::default() });
        Self(Arc::new(Inner { holder: Some(Box::new(holder)), names }))
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves copies of descriptors under a name, in place of what was: without a moment in which neither is held.
    ///
    /// # Errors
    /// [`Error::Failed`] when they cannot be held.
    pub fn leave(&self, name: String, descriptors: &[BorrowedFd<'_>]) -> Result<Held> {
        let mut names = self.names();
        if let Some(holder) = &self.0.holder {
            holder.hold(&name, descriptors).map_err(Error::failed(format!("leave {name} for the daemon's successors")))?;
        }
        names.inherited.remove(&name);
        let number = names.next(&name);
        Ok(Held { store: self.clone(), name, number })
    }

    /// What a process before this one has left under a name, to go on with; once.
    #[must_use]
    pub fn take(&self, name: &str) -> Option<(Vec<OwnedFd>, Held)> {
        let mut names = self.names();
        let descriptors = names.inherited.remove(name)?;
        let number = names.next(name);
        Some((descriptors, Held { store: self.clone(), name: name.to_owned(), number }))
    }

    /// The same, for a name that begins with [its namespace](crate::stdio::of_namespace); also as versions have left it that did not name that,
    /// where there is no doubt whose it is.
    #[must_use]
    pub fn take_of_namespace(&self, name: &str) -> Option<(Vec<OwnedFd>, Held)> {
        self.take(name).or_else(|| {
            let (_, earlier) = name.split_once('/').filter(|(namespace, _)| namespace.starts_with('@'))?;
            let (sandbox, _) = earlier.split_once('/')?;
            let ambiguous = self.names().ambiguous.iter().any(|id| id.as_str() == sandbox);
            if ambiguous { None } else { self.take(earlier) }
        })
    }

    /// Says of which ids there are several sandboxes, in different namespaces.
    pub fn note_ambiguous(&self, ids: BTreeSet<SandboxId>) {
        self.names().ambiguous = ids;
    }

    /// Takes all that was left under names that begin so; each name once.
    #[must_use]
    pub fn take_all(&self, prefix: &str) -> Vec<(Vec<OwnedFd>, Held)> {
        let names: Vec<_> = self.names().inherited.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        names.iter().filter_map(|name| self.take(name)).collect()
    }

    /// Runs an attempt to take over what was left under names that begin with one of `prefixes`. What has been taken is put back when it
    /// fails, so that it can be tried again.
    ///
    /// # Errors
    /// What the attempt says; when there are too few descriptors to keep what it may take, it is not made.
    pub async fn attempt<T>(&self, prefixes: &[String], attempt: impl Future<Output = Result<T>>) -> Result<T> {
        let kept: Vec<(String, Vec<OwnedFd>)> = {
            let names = self.names();
            let wanted = names.inherited.iter().filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix)));
            let copy = |(name, fds): (&String, &Vec<OwnedFd>)| {
                Ok((name.clone(), fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?))
            };
            wanted.map(copy).collect::<io::Result<_>>().map_err(Error::failed("keep what an earlier daemon has left"))?
        };
        let outcome = attempt.await;
        if outcome.is_err() {
            let mut names = self.names();
            for (name, fds) in kept {
                // Not taken, or taken by what lives on.
                if names.inherited.contains_key(&name) || names.current.contains_key(&name) {
                    continue;
                }
                let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                let held = self.0.holder.as_ref().map_or(Ok(()), |holder| holder.hold(&name, &borrowed));
                if let Err(error) = held {
                    tracing::warn!(name, %error, "cannot leave it for the daemon's successors again");
                }
                names.inherited.insert(name, fds);
            }
        }
        outcome
    }

    /// Releases what was inherited and has not been taken: its owners are gone. But for names that begin with one of `spared`, and, as long
    /// as there are such, those that tell no owner.
    pub fn release_rest(&self, spared: &[String]) {
        let spare =
            |name: &str| spared.iter().any(|prefix| name.starts_with(prefix)) || !spared.is_empty() && !name.contains('/');
        let mut names = self.names();
        let rest: Vec<_> = names.inherited.keys().filter(|name| !spare(name)).cloned().collect();
        for name in rest {
            names.inherited.remove(&name);
            self.release(&name);
        }
    }

    fn release(&self, name: &str) {
        if let Some(holder) = &self.0.holder
            && let Err(error) = holder.release(name)
        {
            tracing::debug!(name, %error, "cannot release what was left for the daemon's successors");
        }
    }
}

impl Held {
    /// Leaves them with the holder, for good.
    pub fn keep(self) {
        self.store.names().current.remove(&self.name);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Under the lock, or it could take what is left under the name at the same time.
        let mut names = self.store.names();
        if names.current.get(&self.name) == Some(&self.number) {
            names.current.remove(&self.name);
            self.store.release(&self.name);
        }
    }
}

/// A holder that lives as long as its clones, for tests.
#[cfg(any(test, feature = "testing"))]
#[derive(Clone, Debug, Default)]
pub struct MemoryHolder(Arc<Mutex<HashMap<String, Vec<OwnedFd>>>>);

#[cfg(any(test, feature = "testing"))]
impl MemoryHolder {
    fn held(&self) -> MutexGuard<'_, HashMap<String, Vec<OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of what is held.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.held().keys().cloned().collect()
    }

    /// A store as the next process gets it.
    ///
    /// # Panics
    /// When descriptors have run out.
    #[must_use]
    #[allow(clippy::expect_used)]
    pub fn store(&self) -> FdStore {
        let copy = |descriptor: &OwnedFd| descriptor.try_clone().expect("a descriptor");
        let inherited = self.held().iter().map(|(name, held)| (name.clone(), held.iter().map(copy).collect())).collect();
        FdStore::new(self.clone(), inherited)
    }
}

#[cfg(any(test, feature = "testing"))]
impl Holder for MemoryHolder {
    fn hold(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let copies = descriptors.iter().map(BorrowedFd::try_clone_to_owned).collect::<io::Result<_>>()?;
        self.held().insert(name.to_owned(), copies);
        Ok(())
    }

    fn release(&self, name: &str) -> io::Result<()> {
        self.held().remove(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_left_is_found_once_by_the_next() {
        let holder = MemoryHolder::default();
        let (reader, mut writer) = io::pipe().unwrap();
        let first = holder.store();
        let held = first.leave("pipe".into(), &[reader.as_fd()]).unwrap();
        drop(reader);
        // As when the process dies.
        std::mem::forget(held);
        writer.write_all(b"x").unwrap();
        let second = holder.store();
        let (descriptors, held) = second.take("pipe").unwrap();
        assert_eq!(descriptors.len(), 1);
        assert!(second.take("pipe").is_none());
        // Others get its name.
        let other = second.leave("pipe".into(), &[descriptors[0].as_fd()]).unwrap();
        drop(held);
        assert_eq!(holder.names(), ["pipe"]);
        drop(other);
        assert!(holder.names().is_empty());
        // The last reader.
        drop((first, descriptors));
        assert!(writer.write_all(b"x").is_err());
    }

    #[test]
    fn what_nobody_takes_is_released() {
        let holder = MemoryHolder::default();
        let (reader, _writer) = io::pipe().unwrap();
        std::mem::forget(holder.store().leave("pipe".into(), &[reader.as_fd()]).unwrap());
        let next = holder.store();
        next.release_rest(&[]);
        assert!(holder.names().is_empty() && next.take("pipe").is_none());
    }

    #[test]
    fn equal_ids_in_two_namespaces_are_not_mistaken_for_each_other() {
        let holder = MemoryHolder::default();
        let (reader, _writer) = io::pipe().unwrap();
        let leave = |name: &str| std::mem::forget(holder.store().leave(name.into(), &[reader.as_fd()]).unwrap());
        leave("pod/c/tty");
        // Of a version that did not name it.
        assert!(holder.store().take_of_namespace("@a/pod/c/tty").is_some());
        leave("pod/c/tty");
        leave("@b/pod/c/tty");
        let next = holder.store();
        next.note_ambiguous(BTreeSet::from(["pod".parse().unwrap()]));
        assert!(next.take_of_namespace("@a/pod/c/tty").is_none());
        assert!(next.take_of_namespace("@b/pod/c/tty").is_some());
    }

    #[tokio::test]
    async fn what_a_failed_attempt_has_taken_can_be_taken_again() {
        let holder = MemoryHolder::default();
        let (reader, mut writer) = io::pipe().unwrap();
        std::mem::forget(holder.store().leave("@ns/pod/c/tty".into(), &[reader.as_fd()]).unwrap());
        drop(reader);
        let next = holder.store();
        let prefixes = ["@ns/pod/c/".to_owned()];
        let failing =
            async { next.take("@ns/pod/c/tty").map(|_| ()).map_or(Ok(()), |()| Err(Error::invalid("attempt", "it fails"))) };
        next.attempt(&prefixes, failing).await.unwrap_err();
        assert_eq!(holder.names(), ["@ns/pod/c/tty"]);
        writer.write_all(b"x").unwrap();
        // What belongs to something that is tried again stays.
        next.release_rest(&prefixes);
        let taken = next.attempt(&prefixes, async { Ok(next.take("@ns/pod/c/tty")) }).await.unwrap();
        drop(taken.unwrap());
        assert!(holder.names().is_empty());
        assert!(writer.write_all(b"x").is_err());
    }
}
