//! Who is where: sandboxers by name, sandboxes and containers by id.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use tokio::{sync::mpsc, time::timeout};
use tracing::{error, info, warn};

use crate::{
    contract::{Sandbox, SandboxContext, Sandboxer},
    error::{Error, Result},
    event::EventSink,
    handle::{ContainerHandle, SandboxHandle},
    id::{ContainerId, Namespace, SandboxId},
    lifecycle::{ProcessState, SandboxState, SandboxStep},
    owner::{ContainerEntry, Key, Owner, ProcessEntry},
    reaper::Reaper,
    stdio::StreamHub,
    store::{ContainerRecord, SandboxRecord, Store},
    types::{Capabilities, Exit, SandboxSpec},
    undo::Undo,
};

/// Every sandbox of the daemon. Clones share it.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    sandboxers: BTreeMap<String, Entry>,
    store: Store,
    events: EventSink,
    streams: StreamHub,
    reaper: Reaper,
    index: Mutex<Index>,
}

/// A configured sandboxer, and what it can do: asked once, for every sandbox keeps it.
struct Entry {
    sandboxer: Arc<dyn Sandboxer>,
    capabilities: Arc<Capabilities>,
}

#[derive(Default)]
struct Index {
    /// `None`: being created.
    sandboxes: HashMap<(Namespace, SandboxId), Option<SandboxHandle>>,
    containers: HashMap<(Namespace, ContainerId), SandboxId>,
}

impl Registry {
    /// A registry without sandboxes; [`Self::recover`] finds those of an earlier daemon.
    ///
    /// # Errors
    /// When the state directory cannot be used.
    pub fn new(
        state: &Path,
        sandboxers: BTreeMap<String, Arc<dyn Sandboxer>>,
        events: EventSink,
        streams: StreamHub,
        reaper: Reaper,
    ) -> Result<Self> {
        let store = Store::open(state)?;
        let entry = |sandboxer: Arc<dyn Sandboxer>| Entry { capabilities: Arc::new(sandboxer.capabilities()), sandboxer };
        let sandboxers = sandboxers.into_iter().map(|(name, sandboxer)| (name, entry(sandboxer))).collect();
        Ok(Self(Arc::new(Inner { sandboxers, store, events, streams, reaper, index: Mutex::default() })))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Every change of the index is a single call.
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.0.store
    }

    /// Names of the configured sandboxers.
    #[must_use]
    pub fn sandboxers(&self) -> Vec<String> {
        self.0.sandboxers.keys().cloned().collect()
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.0.sandboxers.get(name).ok_or_else(|| {
            let known = self.sandboxers().join(", ");
            Error::invalid(
                "sandboxer",
                format!("{name:?} is not configured here (there are: {known}); add a table [sandboxer.{name}] to kuasard's configuration, or correct containerd's"),
            )
        })
    }

    /// What a sandboxer can do.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none of that name.
    pub fn capabilities(&self, sandboxer: &str) -> Result<Arc<Capabilities>> {
        Ok(self.entry(sandboxer)?.capabilities.clone())
    }

    /// All sandboxes, in no order.
    #[must_use]
    pub fn list(&self) -> Vec<SandboxHandle> {
        self.index().sandboxes.values().flatten().cloned().collect()
    }

    /// A sandbox by its id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn sandbox(&self, namespace: &Namespace, id: &SandboxId) -> Result<SandboxHandle> {
        let handle = self.index().sandboxes.get(&(namespace.clone(), id.clone())).cloned().flatten();
        handle.ok_or_else(|| Error::NotFound { kind: "sandbox", id: id.to_string() })
    }

    /// A container by its id.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn container(&self, namespace: &Namespace, id: &ContainerId) -> Result<ContainerHandle> {
        let missing = || Error::NotFound { kind: "container", id: id.to_string() };
        let sandbox = self.index().containers.get(&(namespace.clone(), id.clone())).cloned().ok_or_else(missing)?;
        Ok(ContainerHandle::new(self.sandbox(namespace, &sandbox).map_err(|_| missing())?, id.clone()))
    }

    /// Creates a sandbox. It runs to its end even when the caller goes away.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an unknown sandboxer, [`Error::AlreadyExists`], or what the backend says; nothing is left then.
    pub async fn create(&self, spec: SandboxSpec) -> Result<()> {
        self.entry(&spec.sandboxer)?;
        let key = (spec.namespace.clone(), spec.id.clone());
        if self.index().sandboxes.contains_key(&key) {
            return Err(Error::AlreadyExists { kind: "sandbox", id: spec.id.to_string() });
        }
        self.index().sandboxes.insert(key.clone(), None);
        let registry = self.clone();
        let work = async move {
            let mut undo = Undo::new("create sandbox");
            let created = registry.create_now(spec, &mut undo).await;
            let created = undo.settle(created).await;
            if created.is_err() {
                registry.index().sandboxes.remove(&key);
            }
            created
        };
        tokio::spawn(work).await.map_err(Error::failed("create the sandbox"))?
    }

    async fn create_now(&self, spec: SandboxSpec, undo: &mut Undo) -> Result<()> {
        let Entry { sandboxer, capabilities } = self.entry(&spec.sandboxer)?;
        let context = self.context(self.store().make(&spec.namespace, &spec.id)?);
        let (store, namespace, id) = (self.store().clone(), spec.namespace.clone(), spec.id.clone());
        undo.push("remove the sandbox's directory", async move { store.remove(&namespace, &id) });
        let spec = Arc::new(spec);
        let sandbox = sandboxer.create(spec.clone(), context.clone()).await?;
        let made = sandbox.clone();
        undo.push("delete the sandbox", async move { made.delete().await });
        let owner =
            Owner::new(spec, capabilities.clone(), sandbox, context, self.clone(), SandboxState::Created, SystemTime::now());
        let (store, record) = (self.store().clone(), owner.record());
        let saved = tokio::task::spawn_blocking(move || store.save(&record)).await;
        saved.map_err(Error::failed("save the sandbox's state"))??;
        self.adopt(owner);
        Ok(())
    }

    fn context(&self, dir: std::path::PathBuf) -> SandboxContext {
        SandboxContext { dir, events: self.0.events.clone(), streams: self.0.streams.clone(), reaper: self.0.reaper.clone() }
    }

    /// Lets an owner run and makes it known.
    fn adopt(&self, owner: Owner) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let (namespace, id) = (owner.spec.namespace.clone(), owner.spec.id.clone());
        let handle = SandboxHandle::new(namespace.clone(), id.clone(), sender);
        let mut index = self.index();
        for container in owner.containers.keys() {
            index.containers.insert((namespace.clone(), container.clone()), id.clone());
        }
        index.sandboxes.insert((namespace, id), Some(handle));
        drop(index);
        tokio::spawn(owner.run(receiver));
    }

    pub(crate) fn claim_container(&self, namespace: &Namespace, id: &ContainerId, sandbox: &SandboxId) -> Result<()> {
        match self.index().containers.entry((namespace.clone(), id.clone())) {
            std::collections::hash_map::Entry::Occupied(_) => {
                Err(Error::AlreadyExists { kind: "container", id: id.to_string() })
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(sandbox.clone());
                Ok(())
            }
        }
    }

    pub(crate) fn forget_container(&self, namespace: &Namespace, id: &ContainerId) {
        self.index().containers.remove(&(namespace.clone(), id.clone()));
    }

    pub(crate) fn forget_sandbox(&self, namespace: &Namespace, id: &SandboxId) {
        self.index().sandboxes.remove(&(namespace.clone(), id.clone()));
    }

    /// Takes over what an earlier daemon left: sandboxes by their state files; then each sandboxer removes leftovers of others.
    /// What cannot be taken over stays as it is and is reported in the log.
    ///
    /// # Errors
    /// When the state directory cannot be read at all.
    pub async fn recover(&self) -> Result<()> {
        let loaded = self.store().load()?;
        let mut known = BTreeSet::new();
        for (file, why) in &loaded.set_aside {
            warn!(file = %file.display(), why, "cannot read the state of a sandbox; its processes, if any, are left alone");
            // Known all the same, or its processes would be collected as leftovers.
            if let (Some(Ok(id)), Some(Ok(namespace))) = (parent_name(file, 1), parent_name(file, 2)) {
                known.insert((namespace, id));
            }
        }
        for record in loaded.records {
            let (namespace, id) = (record.spec.namespace.clone(), record.spec.id.clone());
            known.insert((namespace, id.clone()));
            match self.recover_sandbox(record).await {
                Ok(()) => info!(sandbox_id = %id, "recovered a sandbox"),
                Err(error) => error!(sandbox_id = %id, error = error.report(), "failed to recover a sandbox; it is left alone"),
            }
        }
        for (name, Entry { sandboxer, .. }) in &self.0.sandboxers {
            match sandboxer.collect(&known).await {
                Ok(removed) => removed.iter().for_each(|what| info!(sandboxer = name, what, "removed a leftover")),
                Err(error) => error!(sandboxer = name, error = error.report(), "failed to collect leftovers"),
            }
        }
        Ok(())
    }

    async fn recover_sandbox(&self, record: SandboxRecord) -> Result<()> {
        let Entry { sandboxer, capabilities } = self.entry(&record.spec.sandboxer)?;
        let spec = Arc::new(record.spec);
        let context = self.context(self.store().dir(&spec.namespace, &spec.id));
        let sandbox = sandboxer.recover(spec.clone(), context.clone(), record.backend).await?;
        let mut owner = Owner::new(spec, capabilities.clone(), sandbox, context, self.clone(), record.state, record.created_at);
        let mut watched = Vec::new();
        for container in record.containers {
            let id = container.head.id.clone();
            match recover_container(&*owner.sandbox.clone(), container).await {
                Ok((entry, keys)) => {
                    watched.extend(keys);
                    owner.containers.insert(id, entry);
                }
                Err(error) => error!(container = %id, error = error.report(), "failed to recover a container"),
            }
        }
        for key in watched {
            if let Ok(process) = owner.process(&key).map(|entry| entry.process.clone()) {
                owner.watch_process(key, process);
            }
        }
        match owner.state {
            SandboxState::Ready { .. } => owner.watch_sandbox(),
            // Cut off half way: nobody waits for the result any more, and a stop or delete will come.
            SandboxState::Starting | SandboxState::Stopping => {
                owner.sandbox_step(SandboxStep::Ended { exit: Exit::now(255) });
            }
            SandboxState::Created | SandboxState::Stopped { .. } => {}
        }
        self.adopt(owner);
        Ok(())
    }

    /// Waits until no operation is under way in any sandbox, at most `limit`; returns the sandboxes where one still is.
    pub async fn drain(&self, limit: Duration) -> Vec<SandboxId> {
        let waits = self.list().into_iter().map(|sandbox| async move {
            match timeout(limit, sandbox.idle()).await {
                Ok(_) => None,
                Err(_) => Some(sandbox.id),
            }
        });
        futures::future::join_all(waits).await.into_iter().flatten().collect()
    }
}

/// Takes a container over; returns it with the processes whose end is still to come.
async fn recover_container(sandbox: &dyn Sandbox, record: ContainerRecord) -> Result<(ContainerEntry, Vec<Key>)> {
    let id = record.head.id.clone();
    let container = sandbox.recover_container(record.head.clone(), record.backend).await?;
    let mut entry = ContainerEntry {
        init: ProcessEntry::new(container.clone(), record.state, record.head.stdio.clone()),
        head: record.head,
        container: container.clone(),
        execs: BTreeMap::new(),
    };
    let mut keys = Vec::new();
    if entry.init.state.exit().is_none() {
        keys.push((id.clone(), None));
    }
    for exec in record.execs {
        let process = container.recover_exec(exec.id.clone(), exec.stdio.clone(), exec.backend).await?;
        if matches!(exec.state, ProcessState::Running { .. }) {
            keys.push((id.clone(), Some(exec.id.clone())));
        }
        entry.execs.insert(exec.id, ProcessEntry::new(process, exec.state, exec.stdio));
    }
    Ok((entry, keys))
}

fn parent_name<T: FromStr>(file: &Path, up: usize) -> Option<Result<T, T::Err>> {
    Some(file.ancestors().nth(up)?.file_name()?.to_str()?.parse())
}
