//! The sandboxer: what is made once for all pods, and what earlier daemons left behind.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::ErrorKind,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use async_trait::async_trait;
use kuasar_sandboxers::{
    Error, Result, Sandbox, SandboxContext, Sandboxer,
    cgroup::{Cgroup, expect_move},
    id::{Namespace, SandboxId},
    mount,
    reaper::Reaper,
    types::{Capabilities, SandboxSpec},
};
use serde_json::Value;
use tokio::sync::OnceCell;
use tracing::warn;

use crate::{
    config::RuncConfig,
    namespaces,
    process::Tracked,
    program::InitProgram,
    runtime::{Driver, Runtime},
    sandbox::{INIT_GROUP, Pod, RuncSandbox},
};

/// Name of the directory below the root that no containerd namespace can have.
const SCRATCH: &str = ".empty";

/// Runs pods as processes of this kernel.
#[derive(Debug)]
pub struct RuncSandboxer {
    config: RuncConfig,
    runtime: Runtime,
    reaper: Reaper,
    /// Runtimes that containerd's options named, by that name.
    others: Mutex<HashMap<String, Runtime>>,
    program: OnceCell<InitProgram>,
    pods: Mutex<HashMap<(Namespace, SandboxId), Weak<Pod>>>,
}

impl RuncSandboxer {
    /// Finds the runtime that the configuration asks for.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it is missing or too old.
    pub async fn open(config: RuncConfig, reaper: Reaper) -> Result<Self> {
        let runtime = Runtime::find(&config.runtime, &reaper).await?;
        Ok(Self::new(config, runtime, reaper))
    }

    /// With a runtime that has been found already.
    #[must_use]
    pub fn new(config: RuncConfig, runtime: Runtime, reaper: Reaper) -> Self {
        Self { config, runtime, reaper, others: Mutex::default(), program: OnceCell::new(), pods: Mutex::default() }
    }

    /// The OCI runtime in use.
    #[must_use]
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    fn dir(&self, namespace: &Namespace, id: &SandboxId) -> PathBuf {
        self.config.root.join(namespace).join(id)
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<(Namespace, SandboxId), Weak<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn program(&self) -> Result<&InitProgram> {
        let scratch = self.config.root.join(SCRATCH);
        self.program.get_or_try_init(|| InitProgram::load(&scratch, self.reaper.clone())).await
    }

    async fn runtime_for(&self, spec: &SandboxSpec) -> Result<Runtime> {
        let Some(binary) = spec.options.binary.as_deref().filter(|binary| !binary.is_empty()) else {
            return Ok(self.runtime.clone());
        };
        let others = || self.others.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = others().get(binary) {
            return Ok(known.clone());
        }
        let found = Runtime::of_option(binary, &self.reaper).await?;
        others().insert(binary.to_owned(), found.clone());
        Ok(found)
    }

    fn driver(&self, runtime: Runtime, dir: &Path) -> Driver {
        Driver::new(runtime, runtime_root(dir), self.reaper.clone(), self.config.command_limit)
    }

    async fn pod(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Pod> {
        let dir = self.dir(&spec.namespace, &spec.id);
        let driver = self.driver(self.runtime_for(&spec).await?, &dir);
        Ok(Pod::new(spec, context, dir, driver, self.program().await?.clone()))
    }

    fn adopt(&self, pod: Arc<Pod>) -> Arc<dyn Sandbox> {
        let mut pods = self.pods();
        pods.retain(|_, pod| pod.strong_count() > 0);
        pods.insert((pod.spec.namespace.clone(), pod.spec.id.clone()), Arc::downgrade(&pod));
        Arc::new(RuncSandbox::new(pod))
    }

    /// Removes everything of one sandbox that nobody knows any more.
    async fn remove_leftover(&self, dir: &Path) -> Result<()> {
        for (init, owner) in namespaces::inits(dir)? {
            if owner == dir {
                remove_init(&init).await?;
            }
        }
        // If another runtime made them, this one may not read its state; then what follows fails and says so.
        let driver = self.driver(self.runtime.clone(), dir);
        for id in names(&runtime_root(dir))? {
            remove_container(&driver, &id).await?;
        }
        mount::unmount_all(dir).await?;
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Sandboxer for RuncSandboxer {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            technique: self.runtime.to_string(),
            exec: Ok(()),
            pause: Ok(()),
            update: Ok(()),
            terminal: Ok(()),
            features: self.runtime.features().cloned(),
        }
    }

    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        // Its start and its first container tend to follow at once.
        expect_move();
        namespaces::check(&spec)?;
        let pod = self.pod(spec, context).await?;
        if pod.dir.exists() {
            // Cut off between making it and saving that it is there.
            warn!(dir = %pod.dir.display(), "removing what an earlier sandbox of the same id left behind");
            self.remove_leftover(&pod.dir).await?;
        }
        let pod = Arc::new(pod);
        pod.prepare().await?;
        Ok(self.adopt(pod))
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        let pod = Arc::new(self.pod(spec, context).await?);
        pod.clone().restore(record)?;
        Ok(self.adopt(pod))
    }

    async fn collect(&self, known: &BTreeSet<(Namespace, SandboxId)>) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for namespace in names(&self.config.root)?.iter().filter_map(|name| name.parse::<Namespace>().ok()) {
            for id in names(&self.config.root.join(&namespace))?.iter().filter_map(|name| name.parse::<SandboxId>().ok()) {
                let key = (namespace.clone(), id);
                let dir = self.dir(&key.0, &key.1);
                if known.contains(&key) {
                    let pod = self.pods().get(&key).and_then(Weak::upgrade);
                    if let Some(pod) = pod {
                        removed.extend(collect_containers(&pod, &dir).await?);
                    }
                    continue;
                }
                match self.remove_leftover(&dir).await {
                    Ok(()) => removed.push(format!("sandbox {} of namespace {}", key.1, key.0)),
                    Err(error) => {
                        warn!(dir = %dir.display(), error = error.report(), "cannot remove what a sandbox left behind")
                    }
                }
            }
        }
        // Started just before a daemon died, before its directory was made or after it was removed.
        for (init, dir) in namespaces::inits(&self.config.root)? {
            if !dir.exists() {
                remove_init(&init).await?;
                removed.push(format!("process {}, the first of a sandbox at {}", init.identity().pid, dir.display()));
            }
        }
        Ok(removed)
    }
}

/// Containers of a known sandbox whose creation was cut off.
async fn collect_containers(pod: &Pod, dir: &Path) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for id in names(&runtime_root(dir))? {
        if !pod.has_container(&id) {
            match remove_container(&pod.driver, &id).await {
                Ok(()) => removed.push(format!("container {id} of sandbox {}", pod.spec.id)),
                Err(error) => warn!(container = id, error = error.report(), "cannot remove a container that nobody knows"),
            }
        }
    }
    Ok(removed)
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
    let bundle = driver.bundle(id).await?;
    driver.delete(id, true).await?;
    match bundle {
        Some(bundle) => mount::unmount_all(&bundle.join("rootfs")).await,
        None => Ok(()),
    }
}

/// Where the OCI runtime keeps what it knows of a sandbox's containers.
fn runtime_root(dir: &Path) -> PathBuf {
    dir.join("oci")
}

/// What is in a directory; nothing if it is not there.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(Error::io("list", dir))?,
    };
    let directories = entries.into_iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(directories.filter_map(|entry| entry.file_name().into_string().ok()).collect())
}
