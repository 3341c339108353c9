//! One pod.
//!
//! ```text
//!  <root>/<namespace>/<sandbox id>/     everything of it, so that whoever finds the directory can remove all
//!      ns/          pinned namespaces, if it has no process 1
//!      files/       hosts, hostname, resolv.conf, shm
//!      oci/         the OCI runtime's state, a directory per container
//!      runtime      which program that is
//!      *.pid        of added processes, and for the moment of a call
//!      console-*, .call-*   for the moment of a call
//! ```

use std::{
    collections::HashMap,
    fs::{self, DirBuilder},
    io::ErrorKind,
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use futures::future::join_all;
use kuasar_sandboxers::{
    Container, Error, Result, Sandbox, SandboxContext,
    cgroup::{Cgroup, Stats, parent_path, parent_stats},
    failpoint::{self, Failpoint},
    id::ContainerId,
    mount,
    podfiles::PodFiles,
    process::{Ending, Exiting, Identity, Tracked},
    stages,
    types::{ContainerHead, ContainerSpec, Exit, NamespaceMode, PodResources, SandboxSpec},
    undo::Undo,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{sync::OwnedMutexGuard, task::JoinHandle, time::timeout};
use tracing::{Instrument, debug};

use crate::{
    container::{Contained, RuncContainer},
    namespaces::{self, Namespaces},
    program::InitProgram,
    runtime::{Driver, remove_call_files},
};

/// How long the end of a process that was sent SIGKILL may take. One that waits for a disk takes as long as the disk.
pub(crate) const DEATH: Duration = Duration::from_secs(20);

/// How long the OCI runtime may go on with something that has ended: on a busy node the start of a process that ends at once lasts longer than
/// that. Twice, for when we have been stopped ourselves the first is over before we have heard that the runtime has ended.
const LAST: Duration = Duration::from_secs(2);

/// Runs work of the OCI runtime as long as there is something to do it to. A runtime that hangs is killed a moment after that has ended: nothing
/// that is to be removed waits for it.
pub(crate) async fn until_ended<T>(ended: impl Future<Output = ()>, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::pin!(work);
    tokio::select! {
        done = &mut work => return done,
        () = ended => {}
    }
    for _ in 0..2 {
        if let Ok(done) = timeout(LAST, &mut work).await {
            return done;
        }
    }
    let operation = "what the OCI runtime did to a container that has ended".into();
    Err(Error::TimedOut { operation, seconds: 2 * LAST.as_secs() })
}

/// How the control groups of processes 1 are called, before the sandbox's id.
pub(crate) const INIT_GROUP: &str = "kuasar-init-";

/// What a pod is, and what its containers need of it.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) spec: Arc<SandboxSpec>,
    pub(crate) context: SandboxContext,
    pub(crate) dir: PathBuf,
    pub(crate) driver: Driver,
    pub(crate) files: PodFiles,
    /// Where its namespaces take it.
    program: Option<InitProgram>,
    state: Mutex<State>,
    ending: Ending,
}

#[derive(Debug, Default)]
struct State {
    namespaces: Option<Namespaces>,
    init: Option<Arc<Tracked>>,
    /// Under way as long as process 1 is put into its group.
    accounting: Option<JoinHandle<()>>,
    containers: HashMap<ContainerId, Weak<Contained>>,
    /// Names of containers that are being made or removed.
    claims: HashMap<String, Arc<tokio::sync::Mutex<()>>>,
}

/// Name of the file in a pod's directory that names the OCI runtime's program: another cannot read what it keeps.
pub(crate) const RUNTIME: &str = "runtime";

/// What is saved of a pod.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    #[serde(default)]
    namespaces: Option<Namespaces>,
    #[serde(default)]
    init: Option<Identity>,
}

impl Pod {
    pub(crate) fn new(
        spec: Arc<SandboxSpec>,
        context: SandboxContext,
        dir: PathBuf,
        driver: Driver,
        program: Option<InitProgram>,
    ) -> Self {
        let files = PodFiles::at(&dir.join("files"), &spec);
        Self { spec, context, dir, driver, files, program, state: Mutex::default(), ending: Ending::pending() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the directory and what is in it from the start.
    pub(crate) async fn prepare(self: &Arc<Self>) -> Result<()> {
        let mut undo = Undo::new("create the sandbox");
        let made = self.prepare_now(&mut undo).await;
        undo.settle(made).await
    }

    async fn prepare_now(self: &Arc<Self>, undo: &mut Undo) -> Result<()> {
        stages::enter("make the pod's directory");
        let files = self.dir.join("files");
        let dir = self.dir.clone();
        undo.push(format!("remove {}", dir.display()), async move { remove_dir(dir) });
        // Search permission for others: processes in a user namespace reach their hosts file through here.
        DirBuilder::new().recursive(true).mode(0o711).create(&files).map_err(Error::io("create", &files))?;
        let runtime = self.dir.join(RUNTIME);
        fs::write(&runtime, self.driver.runtime().program().as_os_str().as_bytes()).map_err(Error::io("write", &runtime))?;
        stages::enter("make the pod's files");
        PodFiles::create(&files, &self.spec).await?;
        Ok(())
    }

    /// Takes the state over that an earlier daemon has saved.
    pub(crate) fn restore(self: Arc<Self>, record: Value) -> Result<()> {
        let record: Record = serde_json::from_value(record).map_err(Error::failed("read the sandbox's record"))?;
        remove_call_files(&self.dir)?;
        let init = record.init.map(Tracked::find).transpose()?.flatten().map(Arc::new);
        if record.namespaces.is_none() {
            // Its start was cut off before process 1 could be recorded, and will not be repeated.
            for (init, dir) in namespaces::inits(&self.dir)? {
                if dir == self.dir {
                    init.signal(libc::SIGKILL)?;
                }
            }
        }
        *self.state() = State { namespaces: record.namespaces, init: init.clone(), ..State::default() };
        if let Some(identity) = record.init {
            let exiting = Exiting::adopted(identity, init.as_deref(), &self.context.reaper);
            self.watch(init, exiting);
        }
        Ok(())
    }

    /// Tells the pod's end when its process 1 ends.
    fn watch(self: Arc<Self>, init: Option<Arc<Tracked>>, exiting: Exiting) {
        let work = async move {
            let exit = exiting.of(init.as_deref()).await;
            self.ending.tell(exit);
        };
        tokio::spawn(work.in_current_span());
    }

    pub(crate) fn namespaces(&self) -> Result<Namespaces> {
        let state = self.state();
        let unavailable = |why: &str| Error::Unavailable { what: format!("sandbox {}", self.spec.id), why: why.into() };
        // They are named by the pid of process 1, which may soon be another's.
        if state.init.as_ref().is_some_and(|init| !init.signal(0).unwrap_or(false)) {
            return Err(unavailable(
                "its process 1 has ended; kubelet starts the pod anew, with crictl remove it and run it again",
            ));
        }
        state.namespaces.clone().ok_or_else(|| unavailable("it has no namespaces yet; start it first"))
    }

    pub(crate) fn add(&self, container: &Arc<Contained>) {
        self.state().containers.insert(container.head.id.clone(), Arc::downgrade(container));
    }

    /// Has a container's name to oneself, for making it or for removing what is left of it.
    pub(crate) async fn claim(&self, id: &str) -> OwnedMutexGuard<()> {
        let claim = {
            let claims = &mut self.state().claims;
            claims.retain(|_, claim| Arc::strong_count(claim) > 1);
            claims.entry(id.to_owned()).or_default().clone()
        };
        claim.lock_owned().await
    }

    pub(crate) fn forget(&self, id: &ContainerId) {
        self.state().containers.remove(id);
    }

    pub(crate) fn has_container(&self, id: &str) -> bool {
        self.state().containers.contains_key(id)
    }

    fn containers(&self) -> Vec<Arc<Contained>> {
        self.state().containers.values().filter_map(Weak::upgrade).collect()
    }

    /// Whether a container's live first process has that pid.
    pub(crate) fn is_first_process(&self, pid: u32) -> bool {
        self.containers().iter().any(|container| container.live_pid() == Some(pid))
    }

    async fn start_now(self: &Arc<Self>, undo: &mut Undo) -> Result<()> {
        let reaper = &self.context.reaper;
        let made = namespaces::make(&self.spec, &self.dir, self.program.as_ref(), reaper, undo).await?;
        let mut state = State { namespaces: Some(made.namespaces), ..State::default() };
        if let Some((init, exit)) = made.init {
            let init = Arc::new(init);
            state.init = Some(init.clone());
            state.accounting = self.account(init.clone());
            self.clone().watch(Some(init), Exiting::Ours(exit));
        }
        *self.state() = state;
        failpoint::reach(Failpoint::PodMade);
        Ok(())
    }

    /// The group of process 1, a leaf below the pod's: on cgroup v2 only groups without children hold processes.
    fn init_group(&self) -> Option<PathBuf> {
        let parent = Some(&self.spec.cgroup_parent).filter(|parent| !parent.is_empty())?;
        Some(parent_path(parent).join(format!("{INIT_GROUP}{}", self.spec.id)))
    }

    /// Puts process 1 into its group. Nobody waits for that: it takes the kernel some milliseconds for each tree of cgroup v1, and matters
    /// only for accounting.
    fn account(&self, init: Arc<Tracked>) -> Option<JoinHandle<()>> {
        let path = self.init_group()?;
        Some(tokio::task::spawn_blocking(move || {
            let pid = init.identity().pid;
            if let Err(error) = Cgroup::create(&path).and_then(|group| group.add(pid)) {
                debug!(cgroup = %path.display(), error = error.report(), "the pod's process 1 is not accounted to the pod");
            }
        }))
    }

    async fn remove_init_group(&self) -> Result<()> {
        let accounting = self.state().accounting.take();
        if let Some(accounting) = accounting {
            accounting.await.map_err(Error::failed("account the pod's process 1"))?;
        }
        match self.init_group().filter(|_| self.spec.namespaces.pid == NamespaceMode::Pod) {
            Some(path) => group_at(&path)?.remove().await,
            None => Ok(()),
        }
    }

    /// Resolves when the pod has ended.
    pub(crate) async fn ended(&self) {
        self.ending.wait().await;
    }

    /// Ends process 1, and with it whatever runs in the pod's pid namespace.
    async fn end_init(&self) -> Result<()> {
        let init = self.state().init.clone();
        let Some(init) = init else { return Ok(()) };
        if init.signal(libc::SIGKILL)? && timeout(DEATH, init.ended()).await.is_err() {
            return Err(Error::TimedOut {
                operation: format!("the end of the pod's process 1, {},", init.identity().pid),
                seconds: DEATH.as_secs(),
            });
        }
        Ok(())
    }
}

/// A control group by its path, which unlike [`Cgroup::create`] does not make it.
fn group_at(path: &Path) -> Result<Cgroup> {
    serde_json::from_value(json!({ "path": path })).map_err(Error::failed("name a control group"))
}

fn remove_dir(dir: PathBuf) -> Result<()> {
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// The contract's face of a [`Pod`].
#[derive(Debug)]
pub(crate) struct RuncSandbox(Arc<Pod>);

impl RuncSandbox {
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        Self(pod)
    }
}

#[async_trait]
impl Sandbox for RuncSandbox {
    /// No process stands for the pod: containerd would write its pid into specifications, which are rewritten from the pod's own.
    async fn start(&self) -> Result<Option<u32>> {
        let mut undo = Undo::new("start the sandbox");
        let started = self.0.start_now(&mut undo).await;
        undo.settle(started).await.map(|()| None)
    }

    async fn stop(&self, grace: Duration) -> Result<()> {
        let containers = self.0.containers();
        if !grace.is_zero() {
            let asked = containers.iter().map(|container| container.terminate());
            if timeout(grace, join_all(asked)).await.is_err() {
                debug!("the grace is over; what still runs is killed");
            }
        }
        // All are tried, whatever becomes of one.
        let ended = join_all(containers.iter().map(|container| container.end())).await;
        let init = self.0.end_init().await;
        ended.into_iter().chain([init]).collect::<Result<()>>()?;
        self.0.ending.tell(Exit::now(0));
        Ok(())
    }

    async fn delete(&self) -> Result<()> {
        let pod = &self.0;
        // A start that failed half way, or a stop that did.
        self.stop(Duration::ZERO).await?;
        for container in pod.containers() {
            container.release().await?;
        }
        namespaces::release(&pod.dir).await?;
        pod.files.remove().await?;
        pod.remove_init_group().await?;
        match remove_dir(pod.dir.clone()) {
            // Something is still mounted below, which can only be something we do not know of.
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::ResourceBusy => {
                mount::unmount_all(&pod.dir).await?;
                remove_dir(pod.dir.clone())
            }
            removed => removed,
        }
    }

    async fn exited(&self) -> Exit {
        self.0.ending.wait().await
    }

    async fn create_container(&self, spec: ContainerSpec) -> Result<Arc<dyn Container>> {
        Ok(Arc::new(RuncContainer::create(self.0.clone(), spec).await?))
    }

    async fn recover_container(&self, head: ContainerHead, record: Value) -> Result<Arc<dyn Container>> {
        Ok(Arc::new(RuncContainer::recover(self.0.clone(), head, record).await?))
    }

    /// Each container is updated by itself, and the pod's group is kubelet's.
    async fn update(&self, _resources: &PodResources) -> Result<()> {
        Ok(())
    }

    async fn metrics(&self) -> Result<Option<Stats>> {
        parent_stats(&self.0.spec.cgroup_parent)
    }

    fn record(&self) -> Value {
        let state = self.0.state();
        json!(Record { namespaces: state.namespaces.clone(), init: state.init.as_ref().map(|init| init.identity()) })
    }

    fn describe(&self) -> Value {
        let state = self.0.state();
        json!({
            "runtime": self.0.driver.runtime().to_string(),
            "program": self.0.driver.runtime().program(),
            "directory": self.0.dir,
            "namespaces": state.namespaces,
            "init": state.init.as_ref().map(|init| init.identity().pid),
        })
    }
}
