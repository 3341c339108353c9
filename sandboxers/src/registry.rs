//! Who is where: sandboxers by name, sandboxes and containers by id.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::Path,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use futures::future::join_all;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{error, info, warn};

use crate::{
    contract::{Known, Leftover, SandboxContext, Sandboxer},
    error::{Error, Result},
    event::{EventSink, Notices},
    failures::{Attempt, Failure, Failures},
    fdstore::FdStore,
    handle::{ContainerHandle, SandboxHandle},
    id::{ContainerId, ExecId, Namespace, SandboxId},
    lifecycle::{ProcessState, SandboxState},
    owner::{Owner, Request},
    reaper::Reaper,
    saving, stages,
    stdio::{StreamHub, parked_names},
    store::{DeletedRecord, SandboxRecord, Store},
    types::{Capabilities, SandboxSpec},
    undo::Undo,
};

/// How long after a recovery requests that the daemon before has not answered may still be repeated: they are at once.
const REPEATED: Duration = Duration::from_secs(5);

/// The stage after a backend's own ones.
pub(crate) const SAVE: &str = "save the state";

/// Every sandbox of the daemon. Clones share it.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    sandboxers: BTreeMap<String, Entry>,
    store: Store,
    failures: Failures,
    events: EventSink,
    streams: StreamHub,
    reaper: Reaper,
    fds: FdStore,
    index: Mutex<Index>,
    /// Held by whoever removes leftovers.
    collecting: Arc<tokio::sync::Mutex<()>>,
}

/// A configured sandboxer, and what it can do: asked once when that is known, for every sandbox keeps it.
struct Entry {
    sandboxer: Arc<dyn Sandboxer>,
    capabilities: OnceLock<Arc<Capabilities>>,
}

#[derive(Default)]
struct Index {
    /// `None`: being created.
    sandboxes: HashMap<(Namespace, SandboxId), Option<SandboxHandle>>,
    containers: HashMap<(Namespace, ContainerId), SandboxId>,
    /// Those of an earlier daemon that could not be taken over yet, and why.
    unrecovered: BTreeMap<(Namespace, SandboxId), String>,
    /// Deletions by the daemon before this one, whose answers may have been lost.
    deleted: HashMap<(Namespace, SandboxId), Vec<DeletedRecord>>,
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
        fds: FdStore,
    ) -> Result<Self> {
        let (store, failures) = (Store::open(state)?, Failures::below(state));
        let entry = |sandboxer: Arc<dyn Sandboxer>| Entry { capabilities: OnceLock::new(), sandboxer };
        let sandboxers = sandboxers.into_iter().map(|(name, sandboxer)| (name, entry(sandboxer))).collect();
        Ok(Self(Arc::new(Inner {
            sandboxers,
            store,
            failures,
            events,
            streams,
            reaper,
            fds,
            index: Mutex::default(),
            collecting: Arc::default(),
        })))
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Every change of the index is a single call.
        self.0.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn events(&self) -> &EventSink {
        &self.0.events
    }

    pub(crate) fn store(&self) -> &Store {
        &self.0.store
    }

    /// Starts that have failed, those of earlier daemons too, oldest first: the newest [`KEPT`](crate::failures::KEPT) of them.
    ///
    /// # Errors
    /// When their directory cannot be listed.
    pub fn failures(&self) -> Result<Vec<Failure>> {
        self.0.failures.list()
    }

    /// A start that begins: of a container, or of the sandbox itself.
    pub(crate) fn attempt(&self, spec: &SandboxSpec, container: Option<&ContainerId>, operation: &'static str) -> Attempt {
        Attempt::new(&self.0.failures, (&spec.namespace, &spec.id), container, operation)
    }

    pub(crate) fn backends(&self) -> impl Iterator<Item = &dyn Sandboxer> {
        self.0.sandboxers.values().map(|entry| &*entry.sandboxer)
    }

    pub(crate) fn collecting(&self) -> &Arc<tokio::sync::Mutex<()>> {
        &self.0.collecting
    }

    /// All sandboxes, those that are being created among them.
    pub(crate) fn keys(&self) -> BTreeSet<(Namespace, SandboxId)> {
        self.index().sandboxes.keys().cloned().collect()
    }

    /// Makes an id known as if it were being created; false when it is known already.
    pub(crate) fn claim_id(&self, key: &(Namespace, SandboxId)) -> bool {
        match self.index().sandboxes.entry(key.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(None);
                true
            }
        }
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
        let Entry { sandboxer, capabilities } = self.entry(sandboxer)?;
        if sandboxer.unavailable().is_some() {
            return Ok(Arc::new(sandboxer.capabilities()));
        }
        Ok(capabilities.get_or_init(|| Arc::new(sandboxer.capabilities())).clone())
    }

    /// Configured sandboxers that can do nothing for the moment, by name, and why.
    #[must_use]
    pub fn unavailable(&self) -> BTreeMap<String, String> {
        let entries = self.0.sandboxers.iter();
        entries.filter_map(|(name, entry)| Some((name.clone(), entry.sandboxer.unavailable()?))).collect()
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
        if !self.claim_id(&key) {
            return Err(Error::AlreadyExists { kind: "sandbox", id: spec.id.to_string() });
        }
        let registry = self.clone();
        let attempt = self.attempt(&spec, None, "create the sandbox");
        let work = async move {
            let create = async {
                let mut undo = Undo::new("create sandbox");
                let created = registry.create_now(spec, &mut undo).await;
                undo.settle(created).await
            };
            let created = attempt.watch(create).await;
            if created.is_err() {
                registry.index().sandboxes.remove(&key);
            }
            created
        };
        tokio::spawn(work).await.map_err(Error::failed("create the sandbox"))?
    }

    async fn create_now(&self, spec: SandboxSpec, undo: &mut Undo) -> Result<()> {
        let sandboxer = self.sandboxer(&spec.sandboxer)?;
        stages::enter("make the sandbox's directory");
        let context = self.context(&spec, self.store().make(&spec.namespace, &spec.id)?);
        let (store, namespace, id) = (self.store().clone(), spec.namespace.clone(), spec.id.clone());
        undo.push("remove the sandbox's directory", async move { store.remove(&namespace, &id) });
        let spec = Arc::new(spec);
        let sandbox = sandboxer.create(spec.clone(), context).await?;
        let made = sandbox.clone();
        undo.push("delete the sandbox", async move { made.delete().await });
        stages::enter(SAVE);
        let (state, now) = (SandboxState::Created, SystemTime::now());
        let capabilities = self.capabilities(&spec.sandboxer)?;
        let owner = Owner::new(spec, capabilities, sandbox, self.clone(), state, now);
        let (store, record) = (self.store().clone(), owner.record());
        saving::run(move || store.save(&record)).await?;
        self.adopt(owner);
        Ok(())
    }

    pub(crate) fn context(&self, spec: &SandboxSpec, dir: std::path::PathBuf) -> SandboxContext {
        let (registry, namespace, id) = (self.clone(), spec.namespace.clone(), spec.id.clone());
        let notices = Notices::to(move |noticed| {
            // One that is gone has no containers to notice anything of.
            if let Ok(sandbox) = registry.sandbox(&namespace, &id) {
                sandbox.post(move |owner| owner.notice(noticed));
            }
        });
        SandboxContext { dir, notices, streams: self.0.streams.clone(), reaper: self.0.reaper.clone(), fds: self.0.fds.clone() }
    }

    /// Lets an owner run and makes it known.
    fn adopt(&self, mut owner: Owner) {
        let (namespace, id) = owner.key();
        let (handle, calls, news) = SandboxHandle::new(namespace.clone(), id.clone());
        owner.news = news;
        self.index().sandboxes.insert((namespace, id), Some(handle));
        tokio::spawn(owner.run(Vec::new(), calls));
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
        let key = (namespace.clone(), id.clone());
        let mut index = self.index();
        index.sandboxes.remove(&key);
        index.unrecovered.remove(&key);
        index.deleted.remove(&key);
    }

    /// How a process ended that the daemon before this one has deleted not long before its end.
    #[must_use]
    pub fn deleted(&self, namespace: &Namespace, container: &ContainerId, exec: Option<&ExecId>) -> Option<ProcessState> {
        let index = self.index();
        let records = index.deleted.iter().filter(|((of, _), _)| of == namespace).flat_map(|(_, records)| records);
        let meant = records.filter(|record| record.container == *container && record.exec.as_ref() == exec);
        meant.last().map(|record| record.state)
    }

    /// Takes over what an earlier daemon left. When this returns, its sandboxes are known and can be called; each answers when it has
    /// been recovered, so that none waits for another. Then leftovers that nobody knows are removed.
    ///
    /// What cannot be taken over stays as it is, is reported in the log and by [`Self::unrecovered`], and is tried again.
    ///
    /// # Errors
    /// When the state directory cannot be read at all.
    pub async fn recover(&self) -> Result<Recovery> {
        let begun = Instant::now();
        let loaded = self.store().load()?;
        let mut known = Known::new();
        // What begins so belongs to what may be recovered later: a terminal that is let go hangs up who runs in it.
        let mut spared = Vec::new();
        for (file, why) in &loaded.set_aside {
            warn!(file = %file.display(), why, "cannot read the state of a sandbox; its processes, if any, are left alone");
            // Known all the same, or its processes would be collected as leftovers.
            if let (Some(Ok(id)), Some(Ok(namespace))) = (parent_name(file, 1), parent_name(file, 2)) {
                spared.extend(parked_names(&namespace, &id, None));
                known.insert((namespace, id), None);
            }
        }
        let mut ids = BTreeSet::new();
        let several = loaded.records.iter().map(|record| record.spec.id.clone()).filter(|id| !ids.insert(id.clone()));
        self.0.fds.note_ambiguous(several.collect());
        known.extend(loaded.unread.iter().map(|(key, _)| (key.clone(), None)));
        for record in &loaded.records {
            let containers = record.containers.iter().map(|container| container.head.id.clone()).collect();
            known.insert((record.spec.namespace.clone(), record.spec.id.clone()), Some(containers));
        }
        // Before anything new is made, which would be none.
        let mut leftovers = Vec::new();
        let available = self.0.sandboxers.iter().filter(|(_, entry)| entry.sandboxer.unavailable().is_none());
        for (name, Entry { sandboxer, .. }) in available {
            match sandboxer.leftovers(&known).await {
                Ok(found) => leftovers.extend(found),
                Err(error) => error!(sandboxer = name, error = error.report(), "cannot look for leftovers"),
            }
        }
        let alone = self.0.collecting.clone().lock_owned().await;
        let records =
            loaded.records.into_iter().map(|record| ((record.spec.namespace.clone(), record.spec.id.clone()), Some(record)));
        let unread = loaded.unread.into_iter().map(|(key, _)| (key, None));
        let recovered: Vec<_> = records.chain(unread).map(|(key, record)| self.begin_recovery(key, record)).collect();
        let (fds, orphans) = (self.0.fds.clone(), self.0.reaper.orphans().clone());
        Ok(Recovery(tokio::spawn(async move {
            let recovered = join_all(recovered).await;
            let count = recovered.len();
            spared.extend(recovered.into_iter().flatten().flatten());
            info!(sandboxes = count, milliseconds = begun.elapsed().as_millis(), "recovered what the daemon before has left");
            join_all(leftovers.into_iter().map(remove_leftover)).await;
            for dir in loaded.unsaved {
                info!(dir = %dir.display(), "removing a sandbox that was never made");
                if let Err(error) = fs::remove_dir_all(&dir) {
                    error!(dir = %dir.display(), %error, "cannot remove a sandbox that was never made");
                }
            }
            drop(alone);
            // What belongs to a container that was half made is taken when containerd's request is repeated, or never.
            tokio::spawn(async move {
                sleep(REPEATED).await;
                fds.release_rest(&spared);
                orphans.recovered();
            });
        })))
    }

    /// Makes a sandbox known that is to be recovered: what is asked of it comes by the receiver.
    pub(crate) fn announce(
        &self,
        key: &(Namespace, SandboxId),
        record: Option<&SandboxRecord>,
    ) -> (mpsc::UnboundedReceiver<Request>, watch::Sender<()>) {
        let (handle, calls, news) = SandboxHandle::new(key.0.clone(), key.1.clone());
        match record {
            Some(record) => self.claim_recorded(key, record),
            None => self.note_unrecovered(key, "its state file cannot be read for the moment".into()),
        }
        self.index().sandboxes.insert(key.clone(), Some(handle));
        (calls, news)
    }

    /// Makes known what a record tells of a sandbox.
    pub(crate) fn claim_recorded(&self, key: &(Namespace, SandboxId), record: &SandboxRecord) {
        let mut index = self.index();
        for container in &record.containers {
            index.containers.insert((key.0.clone(), container.head.id.clone()), key.1.clone());
        }
        index.deleted.insert(key.clone(), record.deleted.clone());
    }

    /// Remembers what was deleted in the name of the daemon before this one.
    pub(crate) fn note_deleted(&self, key: &(Namespace, SandboxId), record: Option<DeletedRecord>) {
        self.index().deleted.entry(key.clone()).or_default().extend(record);
    }

    pub(crate) fn note_unrecovered(&self, key: &(Namespace, SandboxId), why: String) {
        self.index().unrecovered.insert(key.clone(), why);
    }

    pub(crate) fn note_recovered(&self, key: &(Namespace, SandboxId)) {
        self.index().unrecovered.remove(key);
    }

    /// Sandboxes of an earlier daemon that could not be taken over yet, which is tried again and again; why.
    #[must_use]
    pub fn unrecovered(&self) -> BTreeMap<(Namespace, SandboxId), String> {
        self.index().unrecovered.clone()
    }

    /// Lets go of descriptors that an earlier daemon has left, under names that begin so.
    pub(crate) fn release_parked(&self, prefixes: &[String]) {
        prefixes.iter().for_each(|prefix| drop(self.0.fds.take_all(prefix)));
    }

    pub(crate) fn fds(&self) -> &FdStore {
        &self.0.fds
    }

    pub(crate) fn sandboxer(&self, name: &str) -> Result<&dyn Sandboxer> {
        Ok(&*self.entry(name)?.sandboxer)
    }

    /// Waits until no operation is under way in any sandbox, at most `limit`; returns the sandboxes where one still is.
    pub async fn drain(&self, limit: Duration) -> Vec<SandboxId> {
        let waits = self.list().into_iter().map(|sandbox| async move {
            match timeout(limit, sandbox.idle()).await {
                Ok(_) => None,
                Err(_) => Some(sandbox.id),
            }
        });
        join_all(waits).await.into_iter().flatten().collect()
    }
}

/// A recovery that goes on.
#[derive(Debug)]
pub struct Recovery(JoinHandle<()>);

impl Recovery {
    /// Waits until everything is recovered, and what was left over is removed.
    ///
    /// # Errors
    /// [`Error::Failed`] when it broke off.
    pub async fn finished(self) -> Result<()> {
        self.0.await.map_err(Error::failed("finish the recovery"))
    }
}

async fn remove_leftover(leftover: Leftover) {
    let Leftover { what, removal, .. } = leftover;
    match removal.await {
        Ok(()) => info!(what, "removed a leftover"),
        Err(error) => error!(what, error = error.report(), "cannot remove a leftover"),
    }
}

fn parent_name<T: FromStr>(file: &Path, up: usize) -> Option<Result<T, T::Err>> {
    Some(file.ancestors().nth(up)?.file_name()?.to_str()?.parse())
}
