//! The sandboxer: what is made once for all pods, and what earlier daemons left behind.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use async_trait::async_trait;
use kuasar_sandboxers::{
    Error, Known, Leftover, Result, Sandbox, SandboxContext, Sandboxer,
    cgroup::{Cgroup, expect_move},
    id::{Namespace, SandboxId},
    mount,
    process::Tracked,
    reaper::Reaper,
    stages,
    types::{Capabilities, SandboxSpec},
};
use serde_json::Value;
use tokio::sync::OnceCell;
use tracing::{info, warn};

use crate::{
    config::{RuncConfig, RuntimeName},
    namespaces,
    program::InitProgram,
    runtime::{Driver, Kind, Runtime},
    sandbox::{INIT_GROUP, Pod, RUNTIME, RuncSandbox},
    strays::Strays,
    unrecorded,
};

/// Name of the directory below the root that no containerd namespace can have.
const SCRATCH: &str = ".empty";

/// Runs pods as processes of this kernel.
#[derive(Debug)]
pub struct RuncSandboxer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: RuncConfig,
    runtime: Runtime,
    reaper: Reaper,
    /// Runtimes that containerd's options named, by that name.
    others: Mutex<HashMap<String, Runtime>>,
    program: OnceCell<InitProgram>,
    /// For pods whose control groups systemd makes, where the other cannot have it do so.
    systemd: OnceCell<Runtime>,
    strays: OnceCell<Strays>,
    pods: Mutex<HashMap<(Namespace, SandboxId), Weak<Pod>>>,
}

impl RuncSandboxer {
    /// Finds the runtime that the configuration asks for. One that is new to this node has to run a container.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it is missing or too old.
    pub async fn open(config: RuncConfig, reaper: Reaper) -> Result<Self> {
        let runtime = Runtime::find_and_try(&config.runtime, &reaper, &config.root).await?;
        let opened = Self::new(config, runtime, reaper);
        // Needed before anything is recovered, and it can go on beside what is done until then. Whoever needs it hears why it failed.
        let inner = opened.inner.clone();
        tokio::spawn(async move { inner.strays().await.is_ok() });
        Ok(opened)
    }

    /// With a runtime that has been found already.
    #[must_use]
    pub fn new(config: RuncConfig, runtime: Runtime, reaper: Reaper) -> Self {
        let inner = Inner {
            config,
            runtime,
            reaper,
            others: Mutex::default(),
            program: OnceCell::new(),
            systemd: OnceCell::new(),
            strays: OnceCell::new(),
            pods: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The OCI runtime in use.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.inner.runtime
    }
}

impl Inner {
    fn dir(&self, namespace: &Namespace, id: &SandboxId) -> PathBuf {
        sandbox_dir(&self.config.root, namespace, id)
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<(Namespace, SandboxId), Weak<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn program(&self) -> Result<&InitProgram> {
        let scratch = self.config.root.join(SCRATCH);
        let load = async || {
            stages::enter("load kuasar-init");
            InitProgram::load(&scratch, self.reaper.clone()).await
        };
        self.program.get_or_try_init(load).await
    }

    async fn runtime_for(&self, spec: &SandboxSpec) -> Result<Runtime> {
        let Some(binary) = spec.options.binary.as_deref().filter(|binary| !binary.is_empty()) else {
            let systemd = spec.options.systemd_cgroup || spec.cgroup_parent.ends_with(".slice");
            if !systemd || self.runtime.can_use_systemd() {
                return Ok(self.runtime.clone());
            }
            let find = async || {
                let found = Runtime::find_for_systemd(&self.config.runtime, &self.reaper, &self.config.root).await?;
                info!(runtime = %found, instead = %self.runtime, "pods whose control groups systemd makes have another OCI runtime");
                Ok(found)
            };
            return self.systemd.get_or_try_init(find).await.cloned();
        };
        self.other(binary).await
    }

    async fn other(&self, binary: &str) -> Result<Runtime> {
        let others = || self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = others().get(binary) {
            return Ok(known.clone());
        }
        stages::enter("find the OCI runtime");
        let found = Runtime::of_option(binary, &self.reaper).await?;
        others().insert(binary.to_owned(), found.clone());
        Ok(found)
    }

    /// The runtime that a sandbox's containers were made with, if that is known: an earlier daemon may have had another than `now`.
    async fn runtime_of(&self, dir: &Path, now: Runtime) -> Result<Runtime> {
        let file = dir.join(RUNTIME);
        let made_with = match fs::read(&file) {
            Ok(path) => Some(PathBuf::from(OsStr::from_bytes(&path))),
            Err(error) if error.kind() == ErrorKind::NotFound => self.made_by(dir, &now)?,
            Err(error) => return Err(Error::io("read", file)(error)),
        };
        let Some(made_with) = made_with.filter(|program| program != now.program()) else { return Ok(now) };
        match self.other(&made_with.to_string_lossy()).await {
            Ok(runtime) => Ok(runtime),
            Err(error) => {
                warn!(dir = %dir.display(), error = error.report(), instead = %now, "the OCI runtime of a sandbox is gone");
                Ok(now)
            }
        }
    }

    /// For sandboxes of versions that wrote nothing down: by the files of their containers. A program's name where that is another than
    /// `now`.
    fn made_by(&self, dir: &Path, now: &Runtime) -> Result<Option<PathBuf>> {
        let root = runtime_root(dir);
        for id in names(&root)? {
            for (file, name) in [("state.json", RuntimeName::Runc), ("status", RuntimeName::Crun)] {
                if root.join(&id).join(file).exists() && now.kind() != Kind::Known(name) {
                    return Ok(Some(name.program().into()));
                }
            }
        }
        Ok(None)
    }

    fn driver(&self, runtime: Runtime, dir: &Path) -> Driver {
        Driver::new(runtime, runtime_root(dir), self.reaper.clone(), self.config.command_limit)
    }

    /// A new pod, or one that is `made`.
    async fn pod(&self, spec: Arc<SandboxSpec>, context: SandboxContext, made: bool) -> Result<Pod> {
        let dir = self.dir(&spec.namespace, &spec.id);
        let runtime = self.runtime_for(&spec).await?;
        let driver = self.driver(if made { self.runtime_of(&dir, runtime).await? } else { runtime }, &dir);
        let program = if namespaces::need_program(&spec)? { Some(self.program().await?.clone()) } else { None };
        Ok(Pod::new(spec, context, dir, driver, program))
    }

    fn adopt(&self, pod: Arc<Pod>) -> Arc<dyn Sandbox> {
        let mut pods = self.pods();
        pods.retain(|_, pod| pod.strong_count() > 0);
        pods.insert((pod.spec.namespace.clone(), pod.spec.id.clone()), Arc::downgrade(&pod));
        Arc::new(RuncSandbox::new(pod))
    }

    /// What ran when this daemon started.
    async fn strays(&self) -> Result<&Strays> {
        self.strays.get_or_try_init(async || Strays::find(&self.config.root)).await
    }

    /// Removes everything of one sandbox that nobody knows any more.
    async fn remove_leftover(&self, dir: &Path) -> Result<()> {
        self.strays().await?.settle(dir).await?;
        for (init, owner) in namespaces::inits(dir)? {
            if owner == dir {
                remove_init(&init).await?;
            }
        }
        // If the runtime that made them is gone, another may not read its state; then what follows fails and says so.
        let driver = self.driver(self.runtime_of(dir, self.runtime.clone()).await?, dir);
        for id in names(&runtime_root(dir))? {
            remove_container(&driver, &id).await?;
        }
        // If process 1 has ended before this, nobody could tell which group was made for it.
        if let Some(id) = dir.file_name().and_then(OsStr::to_str) {
            for group in Cgroup::named(&format!("{INIT_GROUP}{id}"))? {
                // One with processes is that of a sandbox of the same id in another namespace.
                if group.processes()?.is_empty() {
                    group.remove().await?;
                }
            }
        }
        mount::unmount_all(dir).await?;
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
            _ => Ok(()),
        }
    }
}

impl Inner {
    /// Removes a container of a known sandbox whose creation was cut off.
    async fn remove_half_made(&self, key: &(Namespace, SandboxId), id: &str) -> Result<()> {
        self.strays().await?.settle(&self.dir(&key.0, &key.1)).await?;
        // A sandbox that has gone has taken it along.
        let Some(pod) = self.pods().get(key).and_then(Weak::upgrade) else { return Ok(()) };
        let _claim = pod.claim(id).await;
        if pod.has_container(id) {
            return Ok(());
        }
        remove_container(&pod.driver, id).await
    }

    fn leftover<F>(
        self: &Arc<Self>,
        sandbox: &(Namespace, SandboxId),
        what: String,
        removal: impl FnOnce(Arc<Self>) -> F,
    ) -> Leftover
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        Leftover { sandbox: sandbox.clone(), what, removal: Box::pin(removal(self.clone())) }
    }
}

#[async_trait]
impl Sandboxer for RuncSandboxer {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            technique: self.inner.runtime.to_string(),
            exec: Ok(()),
            pause: Ok(()),
            update: Ok(()),
            terminal: Ok(()),
            features: self.inner.runtime.features().cloned(),
        }
    }

    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        // Its start and its first container tend to follow at once.
        expect_move();
        stages::enter("check what the pod asks for");
        namespaces::check(&spec)?;
        let pod = self.inner.pod(spec, context, false).await?;
        if pod.dir.exists() {
            // Cut off between making it and saving that it is there.
            stages::enter("remove what an earlier sandbox of the same id left behind");
            warn!(dir = %pod.dir.display(), "removing what an earlier sandbox of the same id left behind");
            self.inner.remove_leftover(&pod.dir).await?;
        }
        let pod = Arc::new(pod);
        pod.prepare().await?;
        Ok(self.inner.adopt(pod))
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        let pod = Arc::new(self.inner.pod(spec, context, true).await?);
        self.inner.strays().await?.settle(&pod.dir).await?;
        pod.clone().restore(record)?;
        Ok(self.inner.adopt(pod))
    }

    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>> {
        let inner = &self.inner;
        // Before this daemon calls an OCI runtime.
        let strays = inner.strays().await?;
        let root = &inner.config.root;
        let mut found = Vec::new();
        for namespace in names(root)?.iter().filter_map(|name| name.parse::<Namespace>().ok()) {
            for id in names(&root.join(&namespace))?.iter().filter_map(|name| name.parse::<SandboxId>().ok()) {
                let (key, dir) = ((namespace.clone(), id.clone()), inner.dir(&namespace, &id));
                match known.get(&key) {
                    // Nobody can tell which of its containers are known.
                    Some(None) => {}
                    Some(Some(containers)) => {
                        let half_made = |name: &String| !containers.iter().any(|id| id.as_str() == name);
                        for name in names(&runtime_root(&dir))?.into_iter().filter(half_made) {
                            let (sandbox, key) = (key.clone(), key.clone());
                            let what = format!("container {name} of sandbox {id}");
                            let removal = |inner: Arc<Inner>| async move { inner.remove_half_made(&key, &name).await };
                            found.push(inner.leftover(&sandbox, what, removal));
                        }
                    }
                    None => {
                        let what = format!("sandbox {id} of namespace {namespace}");
                        found.push(inner.leftover(&key.clone(), what, |inner| async move {
                            let made_again = inner.pods().get(&key).is_some_and(|pod| pod.strong_count() > 0);
                            if made_again { Ok(()) } else { inner.remove_leftover(&dir).await }
                        }));
                    }
                }
            }
        }
        // Started just before a daemon died, before its directory was made or after it was removed.
        for (init, dir) in strays.inits(root)? {
            let Some(key) = sandbox_of(&dir).filter(|key| !matches!(known.get(key), Some(None))) else { continue };
            if !dir.exists() {
                let what = format!("process {}, the first of a sandbox at {}", init.identity().pid, dir.display());
                found.push(inner.leftover(&key, what, |_| async move { remove_init(&init).await }));
            }
        }
        Ok(found)
    }

    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        unrecorded::processes(&self.inner.config.root, namespace, id)
    }
}

/// Ends process 1 of a pod, and with it the pod's other processes, and removes the control group that was made for it.
async fn remove_init(init: &Tracked) -> Result<()> {
    let group = Cgroup::of_process(init.identity().pid).ok();
    if init.signal(libc::SIGKILL)? {
        init.ended().await?;
    }
    let ours = |group: &Cgroup| group.path().file_name().is_some_and(|name| name.as_bytes().starts_with(INIT_GROUP.as_bytes()));
    match group.filter(ours) {
        Some(group) => group.remove().await,
        None => Ok(()),
    }
}

/// Removes a container of which only the runtime knows.
async fn remove_container(driver: &Driver, id: &str) -> Result<()> {
    let state = driver.state(id).await?;
    driver.delete(id, true).await?;
    match state {
        Some(state) => mount::unmount_all(&state.bundle.join("rootfs")).await,
        None => Ok(()),
    }
}

/// Everything of a sandbox.
pub(crate) fn sandbox_dir(root: &Path, namespace: &Namespace, id: &SandboxId) -> PathBuf {
    root.join(namespace).join(id)
}

/// Whose directory it is.
fn sandbox_of(dir: &Path) -> Option<(Namespace, SandboxId)> {
    let name = |dir: &Path| dir.file_name()?.to_str().map(str::to_owned);
    Some((name(dir.parent()?)?.parse().ok()?, name(dir)?.parse().ok()?))
}

/// Where the OCI runtime keeps what it knows of a sandbox's containers.
pub(crate) fn runtime_root(dir: &Path) -> PathBuf {
    dir.join("oci")
}

/// What is in a directory; nothing if it is not there.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(Error::io("list", dir))?,
    };
    let directories = entries.into_iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(directories.filter_map(|entry| entry.file_name().into_string().ok()).collect())
}
