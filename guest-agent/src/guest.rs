//! The guest: one pod, its containers, and what they have.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kuasar_guest_protocol::{
    agent::{CreateContainerRequest, ExecRequest, IdMapping as MappingMessage, SetUpRequest, Storage},
    stream::{StreamHeader, StreamKind},
};
use kuasar_runc::{RuncConfig, RuncSandboxer, Runtime};
use kuasar_sandboxers::{
    Container, Error, Result, Sandbox, SandboxContext, Sandboxer,
    cgroup::{Cgroup, Stats},
    fdstore::FdStore,
    id::{ContainerId, ExecId},
    reaper::Reaper,
    spec::OciSpec,
    stdio::StreamHub,
    types::{
        ContainerSpec, ExecSpec, IdMapping, IdMappings, NamespaceMode, PodMetadata, PodNamespaces, PodResources,
        RuntimeOptions, SandboxSpec,
    },
    undo::Undo,
};
use serde_json::{Value, json};
use tokio::sync::{Mutex, mpsc, watch};
use tracing::warn;

use crate::{
    boot,
    connection::Connection,
    debug, devices,
    events::Events,
    lanes::Lanes,
    process::{Fifos, Live, remove_dir},
    setup,
    storage::{Held, Storages},
    submounts,
};

/// Containers at a time.
const CONTAINERS: usize = 512;

/// Added processes of a container at a time.
const EXECS: usize = 2048;

/// Storages of a container.
const STORAGES: usize = 256;

/// Where and how a guest is.
#[derive(Clone, Debug)]
pub struct Place {
    /// Directory for all that lives as long as the pod.
    pub root: PathBuf,
    /// The control group that those of the containers are in.
    pub cgroup: PathBuf,
    /// This machine is the pod's: it may be named, connected and switched off. Else only containers are run, beside what runs here.
    pub machine: bool,
    /// The host may start processes beside the containers.
    pub debug: bool,
}

/// One pod, and the machine it has. Clones share it.
#[derive(Clone)]
pub struct Guest(Arc<Inner>);

struct Inner {
    place: Place,
    runtime: Runtime,
    sandboxer: RuncSandboxer,
    reaper: Reaper,
    events: Events,
    /// `None` before the machine was made the pod's.
    pod: Mutex<Option<Arc<Pod>>>,
    made: watch::Sender<Option<Arc<Pod>>>,
    containers: Lanes<ContainerId, Contained>,
    storages: Storages,
    /// Becomes true when all of the machine is there that containers need.
    booted: watch::Receiver<bool>,
    ready_us: u64,
}

/// The pod that this machine is.
pub(crate) struct Pod {
    pub(crate) sandbox: Arc<dyn Sandbox>,
    /// Where the host's shares are.
    shares: Vec<PathBuf>,
}

/// A container that exists.
pub(crate) struct Contained {
    pub(crate) container: Arc<dyn Container>,
    pub(crate) first: Live,
    pub(crate) execs: Lanes<ExecId, Live>,
    storages: Vec<Held>,
    submounts: Vec<PathBuf>,
    dir: PathBuf,
}

impl Guest {
    /// A guest that has no pod yet. `booted` becomes true when the machine has all that containers need; `ready_us` is told to the host.
    ///
    /// Inside a tokio runtime.
    #[must_use]
    pub fn new(place: Place, runtime: Runtime, reaper: Reaper, booted: watch::Receiver<bool>, ready_us: u64) -> Self {
        let events = Events::default();
        let config = RuncConfig { root: place.root.join("runc"), ..RuncConfig::default() };
        let sandboxer = RuncSandboxer::new(config, runtime.clone(), reaper.clone());
        Self(Arc::new(Inner {
            place,
            runtime,
            sandboxer,
            reaper,
            events,
            pod: Mutex::default(),
            made: watch::Sender::new(None),
            containers: Lanes::new("container", CONTAINERS),
            storages: Storages::default(),
            booted,
            ready_us,
        }))
    }

    pub(crate) fn place(&self) -> &Place {
        &self.0.place
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.0.runtime
    }

    pub(crate) fn events(&self) -> &Events {
        &self.0.events
    }

    pub(crate) fn ready_us(&self) -> u64 {
        self.0.ready_us
    }

    /// The pod, if this machine was made one's.
    pub(crate) fn pod(&self) -> Option<Arc<Pod>> {
        self.0.made.borrow().clone()
    }

    fn need_pod(&self) -> Result<Arc<Pod>> {
        self.pod()
            .ok_or_else(|| Error::Unavailable { what: "the pod".into(), why: "the guest was not set up; call SetUp".into() })
    }

    /// Makes this machine the pod's. Once; after that it does nothing.
    pub(crate) async fn set_up(&self, request: &SetUpRequest) -> Result<()> {
        let mut pod = self.0.pod.lock().await;
        if pod.is_some() {
            return Ok(());
        }
        // Its sender is the boot, which ends with true, or with the machine.
        self.0.booted.clone().wait_for(|booted| *booted).await.map_err(Error::failed("boot the guest"))?;
        if self.0.place.machine {
            setup::machine(request).await?;
        }
        make_private(&self.0.place.root)?;
        if let Err(error) = Cgroup::create(&self.0.place.cgroup) {
            warn!(error = error.report(), "the pod has no control group of its own");
        }
        self.limit_pod(request.pod_memory_bytes)?;
        let context = SandboxContext {
            dir: self.0.place.root.join("state"),
            notices: self.0.events.notices(),
            reaper: self.0.reaper.clone(),
            streams: StreamHub::default(),
            fds: FdStore::default(),
        };
        let sandbox = self.0.sandboxer.create(Arc::new(sandbox_spec(request)?), context).await?;
        if let Err(error) = sandbox.start().await {
            sandbox.delete().await?;
            return Err(error);
        }
        let shares = request.shares.iter().map(|share| share.target.clone().into()).collect();
        let made = Arc::new(Pod { sandbox, shares });
        *pod = Some(made.clone());
        self.0.made.send_replace(Some(made));
        Ok(())
    }

    /// Limits what the containers may use together, in bytes; 0 changes nothing. Without it, memory that was added in larger steps than the pod
    /// asked for would be theirs, and the node's limit would end the machine.
    pub(crate) fn limit_pod(&self, bytes: u64) -> Result<()> {
        if bytes == 0 || !self.0.place.machine {
            return Ok(());
        }
        let group = self.0.place.cgroup.strip_prefix("/").unwrap_or(&self.0.place.cgroup);
        let file = Path::new(boot::CGROUPS).join(group).join("memory.max");
        fs::write(&file, bytes.to_string()).map_err(Error::io("limit the pod's memory with", &file))
    }

    /// The name of a container; what runs beside the containers has none.
    fn container_id(&self, id: &str) -> Result<ContainerId> {
        if id.is_empty() { debug::id(self.0.place.debug) } else { id.parse() }
    }

    /// A container that exists.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Contained>> {
        self.0.containers.find(&self.container_id(id)?)
    }

    /// Prepares a container; returns the pid of its first process.
    pub(crate) async fn create_container(&self, request: &CreateContainerRequest) -> Result<u32> {
        let id: ContainerId = request.id.parse()?;
        if request.storages.len() > STORAGES {
            let why = format!("there are {}; at most {STORAGES} are taken", request.storages.len());
            return Err(Error::invalid("storages of the container", why));
        }
        let spec = OciSpec::parse(&request.spec)?;
        self.create(id, spec, &request.storages, request.streams.as_ref().unwrap_or_default()).await
    }

    async fn create(
        &self,
        id: ContainerId,
        spec: OciSpec,
        storages: &[Storage],
        streams: &kuasar_guest_protocol::agent::Streams,
    ) -> Result<u32> {
        let turn = self.0.containers.turn(&id).await?;
        if let Some(earlier) = turn.value() {
            if earlier.first.started() {
                return Err(Error::AlreadyExists { kind: "container", id: id.to_string() });
            }
            // The host did not hear that it was made.
            self.release(&earlier).await?;
            turn.set(None);
        }
        let pod = self.need_pod()?;
        let mut undo = Undo::new("create the container");
        let made = self.make(&pod, &id, spec, storages, streams, &mut undo).await;
        let made = undo.settle(made).await?;
        let pid = made.first.pid();
        turn.set(Some(Arc::new(made)));
        Ok(pid)
    }

    async fn make(
        &self,
        pod: &Pod,
        id: &ContainerId,
        mut spec: OciSpec,
        storages: &[Storage],
        streams: &kuasar_guest_protocol::agent::Streams,
        undo: &mut Undo,
    ) -> Result<Contained> {
        let dir = self.0.place.root.join("containers").join(id);
        let taken = dir.clone();
        undo.push(format!("remove {}", dir.display()), async move { remove_dir(&taken) });
        let bundle = dir.join("bundle");
        make_private(&bundle)?;
        let mut held = Vec::new();
        for storage in storages {
            let added = self.0.storages.add(storage).await?;
            let (all, target) = (self.0.storages.clone(), added.target().to_owned());
            undo.push(format!("take {} away", target.display()), async move { all.remove(&target).await });
            held.push(added);
        }
        let submounts = submounts::hold(&spec, &pod.shares)?;
        let taken = submounts.clone();
        undo.push("let go of the host's shares", async move {
            submounts::let_go(taken);
            Ok(())
        });
        let in_container = id.as_str() != debug::ID;
        adapt(&mut spec, &self.0.place.cgroup.join(id), &held);
        if in_container {
            spec.set_namespace("cgroup", None);
            devices::add_to_privileged(&mut spec, Path::new("/dev"))?;
            if self.0.place.machine && may_change_network(&spec) {
                boot::load_tables();
            }
        }
        let fifos = Fifos::make(dir.join("io"), streams)?;
        let container = ContainerSpec { id: id.clone(), bundle, spec, rootfs: Vec::new(), stdio: fifos.stdio() };
        let container = pod.sandbox.create_container(container).await?;
        let made = container.clone();
        undo.push("remove the container", async move { made.delete().await });
        let first = Live::begin(id.to_string(), container.clone(), fifos, false)?;
        Ok(Contained { container, first, execs: Lanes::new("exec", EXECS), storages: held, submounts, dir })
    }

    /// Lets a container run.
    pub(crate) async fn start_container(&self, id: &str) -> Result<u32> {
        let id = self.container_id(id)?;
        let turn = self.0.containers.turn(&id).await?;
        let container = turn.value().ok_or_else(|| Error::NotFound { kind: "container", id: id.to_string() })?;
        if !container.first.started() {
            container.container.start().await?;
            container.first.set_started();
        }
        Ok(container.first.pid())
    }

    /// Starts another process in a container, or beside them.
    pub(crate) async fn exec(&self, request: &ExecRequest) -> Result<u32> {
        let id: ExecId = request.exec.parse()?;
        let process: Value = serde_json::from_slice(&request.process)
            .map_err(|error| Error::invalid("process", format!("it is not JSON: {error}")))?;
        if !process.is_object() {
            return Err(Error::invalid("process", "it is no JSON object"));
        }
        if request.in_guest {
            self.make_beside().await?;
        }
        let container = self.container(if request.in_guest { "" } else { &request.container })?;
        let turn = container.execs.turn(&id).await?;
        if let Some(known) = turn.value() {
            return Ok(known.pid());
        }
        let fifos = Fifos::make(container.dir.join("execs").join(&id), request.streams.as_ref().unwrap_or_default())?;
        let dir = fifos.dir().to_owned();
        let spec = ExecSpec { id: id.clone(), process: without_labels(process), stdio: fifos.stdio() };
        let exec = container.container.exec(spec).await?;
        let name = format!("{}/{id}", container.first.name());
        let started = match exec.start().await {
            Ok(pid) => Live::begin(name, exec.clone(), fifos, true).map(|live| (pid, live)),
            Err(error) => Err(error),
        };
        match started {
            Ok((pid, live)) => {
                turn.set(Some(Arc::new(live)));
                Ok(pid)
            }
            Err(error) => {
                exec.delete().await?;
                remove_dir(&dir)?;
                Err(error)
            }
        }
    }

    /// Makes what processes beside the containers run in, if it is not there.
    async fn make_beside(&self) -> Result<()> {
        let id = debug::id(self.0.place.debug)?;
        match self.0.containers.find(&id) {
            Ok(found) if found.first.is_running() => return Ok(()),
            Ok(_) => self.delete(id.as_str(), "").await?,
            Err(_) => {}
        }
        let spec = debug::spec()?;
        match self.create(id.clone(), spec, &[], &Default::default()).await {
            // Another call was faster.
            Err(Error::AlreadyExists { .. }) | Ok(_) => {}
            Err(error) => return Err(error),
        }
        self.start_container(id.as_str()).await.map(drop)
    }

    /// Has something done with a process that exists: a container's first one, or an exec.
    pub(crate) async fn with<T>(&self, container: &str, exec: &str, work: impl AsyncFnOnce(&Live) -> T) -> Result<T> {
        let container = self.container(container)?;
        if exec.is_empty() {
            return Ok(work(&container.first).await);
        }
        let exec = container.execs.find(&exec.parse()?)?;
        Ok(work(&exec).await)
    }

    /// Waits until nobody makes, starts or removes a process any more, after which it is known whether it exists.
    pub(crate) async fn settled(&self, container: &str, exec: &str) -> Result<()> {
        let id = self.container_id(container)?;
        if exec.is_empty() {
            drop(self.0.containers.turn(&id).await?);
        } else {
            let (container, id) = (self.container(container)?, exec.parse()?);
            drop(container.execs.turn(&id).await?);
        }
        Ok(())
    }

    /// Removes a process; of a container all that is left. One that does not exist is fine.
    pub(crate) async fn delete(&self, container: &str, exec: &str) -> Result<()> {
        let id = self.container_id(container)?;
        if exec.is_empty() {
            let turn = self.0.containers.turn(&id).await?;
            if let Some(container) = turn.value() {
                self.release(&container).await?;
                turn.set(None);
            }
            self.0.events.forget(id.as_str());
            return Ok(());
        }
        let exec: ExecId = exec.parse()?;
        match self.0.containers.find(&id) {
            Err(Error::NotFound { .. }) => Ok(()),
            found => release_exec(&*found?, &exec).await,
        }
    }

    async fn release(&self, container: &Contained) -> Result<()> {
        for id in container.execs.names() {
            release_exec(container, &id).await?;
        }
        container.first.delete().await?;
        submounts::let_go(container.submounts.clone());
        for storage in container.storages.iter().rev() {
            self.0.storages.remove(storage.target()).await?;
        }
        remove_dir(&container.dir)
    }

    /// Where connections for a stream go.
    pub(crate) fn stream(&self, header: &StreamHeader) -> Result<mpsc::Sender<Connection>> {
        let container = self.container(&header.container)?;
        let kind: StreamKind = header.kind;
        let found = if header.exec.is_empty() {
            container.first.stream(kind)
        } else {
            container.execs.find(&header.exec.parse()?)?.stream(kind)
        };
        found.ok_or_else(|| Error::NotFound { kind: "stream", id: kind.name().into() })
    }

    /// Resource use of all containers together.
    pub(crate) fn stats(&self) -> Result<Stats> {
        Cgroup::at(&self.0.place.cgroup)?.stats()
    }

    /// Ends every container: gracefully within `grace`, then by force.
    pub(crate) async fn stop(&self, grace: Duration) -> Result<()> {
        match self.pod() {
            Some(pod) => pod.sandbox.stop(grace).await,
            None => Ok(()),
        }
    }

    /// Ends and removes all that was made for the pod.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub async fn end(&self) -> Result<()> {
        self.stop(Duration::ZERO).await?;
        for id in self.0.containers.names() {
            self.delete(id.as_str(), "").await?;
        }
        let pod = self.0.pod.lock().await.take();
        self.0.made.send_replace(None);
        match pod {
            Some(pod) => pod.sandbox.delete().await,
            None => Ok(()),
        }
    }
}

async fn release_exec(container: &Contained, id: &ExecId) -> Result<()> {
    let turn = container.execs.turn(id).await?;
    if let Some(exec) = turn.value() {
        exec.delete().await?;
        turn.set(None);
    }
    Ok(())
}

/// Makes a directory through which others may pass: processes in a user namespace reach their files through it.
fn make_private(dir: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(Error::io("create", dir))
}

/// The pod as the `runc` crate takes it: it has this machine's network and names, and without a user namespace its shared memory.
fn sandbox_spec(request: &SetUpRequest) -> Result<SandboxSpec> {
    let range = |message: &MappingMessage| IdMapping {
        container_id: message.container_id,
        host_id: message.host_id,
        length: message.length,
    };
    let ranges = |messages: &[MappingMessage]| messages.iter().map(range).collect::<Vec<_>>();
    let user = IdMappings { uids: ranges(&request.uids), gids: ranges(&request.gids) };
    let root = |ranges: &[IdMapping]| ranges.iter().find(|range| range.container_id == 0).map_or(0, |range| range.host_id);
    let io_owner = (root(&user.uids), root(&user.gids));
    let user = Some(user).filter(|user| !user.uids.is_empty() || !user.gids.is_empty());
    let sysctls = request.sysctls.iter().filter(|(name, _)| user.is_some() && is_of_ipc(name));
    let sysctls = sysctls.map(|(name, value)| (name.clone(), value.clone())).collect();
    Ok(SandboxSpec {
        namespace: "guest".parse()?,
        id: "pod".parse()?,
        sandboxer: "guest".into(),
        pod: PodMetadata::default(),
        hostname: request.hostname.clone(),
        netns: None,
        namespaces: PodNamespaces {
            network: NamespaceMode::Node,
            pid: if request.shared_pids { NamespaceMode::Pod } else { NamespaceMode::Container },
            // The machine's belongs to the machine's root: root of a user namespace could mount no message queues.
            ipc: if user.is_some() { NamespaceMode::Pod } else { NamespaceMode::Node },
            user,
        },
        dns: None,
        sysctls,
        cgroup_parent: String::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        log_directory: String::new(),
        resources: PodResources::default(),
        options: RuntimeOptions { io_owner, ..RuntimeOptions::default() },
    })
}

/// Whether a kernel parameter is of an ipc namespace (ipc_namespaces(7)).
fn is_of_ipc(name: &str) -> bool {
    let name = name.replace('/', ".");
    ["kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."].iter().any(|prefix| name.starts_with(prefix))
}

/// Gives a container what only this machine can: its control group and its disks; and takes away what this kernel does not have.
fn adapt(spec: &mut OciSpec, cgroup: &Path, storages: &[Held]) {
    spec.set_cgroups_path(&cgroup.to_string_lossy());
    let document = spec.as_value_mut();
    document["process"] = without_labels(document["process"].take());
    if let Some(linux) = document["linux"].as_object_mut() {
        linux.remove("mountLabel");
        // The host's own class of cache and memory bandwidth.
        linux.remove("intelRdt");
    }
    for (held, (major, minor)) in storages.iter().filter_map(|held| Some((held, held.device?))) {
        let access = if held.readonly { "rm" } else { "rwm" };
        let rule = json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access});
        match document["linux"]["resources"]["devices"].as_array_mut() {
            Some(rules) => rules.push(rule),
            None => document["linux"]["resources"]["devices"] = json!([rule]),
        }
    }
}

/// Whether a container may make rules for packets.
fn may_change_network(spec: &OciSpec) -> bool {
    let bounding = spec.as_value().pointer("/process/capabilities/bounding").and_then(Value::as_array);
    bounding.into_iter().flatten().any(|capability| capability == "CAP_NET_ADMIN")
}

/// The guest's kernel has neither AppArmor nor SELinux: these are the host's, and mean nothing here.
fn without_labels(mut process: Value) -> Value {
    if let Some(process) = process.as_object_mut() {
        process.remove("apparmorProfile");
        process.remove("selinuxLabel");
    }
    process
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use super::*;

    #[test]
    fn specifications_are_adapted_and_nothing_else_is_touched() {
        let before = json!({
            "process": {"args": ["x"], "apparmorProfile": "p", "selinuxLabel": "l", "later": 1},
            "root": {"path": "/r"},
            "linux": {"cgroupsPath": "a:b:c", "mountLabel": "m", "intelRdt": {}, "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
        });
        let mut spec = OciSpec::try_from(before).unwrap();
        adapt(&mut spec, Path::new("/pod/c"), &[]);
        let expected = json!({
            "process": {"args": ["x"], "later": 1},
            "root": {"path": "/r"},
            "linux": {"cgroupsPath": "/pod/c", "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
        });
        assert_eq!(spec.as_value(), &expected);
    }

    #[test]
    fn pods_have_the_machines_namespaces() {
        let mapping = MappingMessage { container_id: 0, host_id: 65536, length: 65536, ..Default::default() };
        let mut request =
            SetUpRequest { shared_pids: true, uids: vec![mapping.clone()], gids: vec![mapping], ..Default::default() };
        for (name, value) in [("kernel.shmmax", "4096"), ("net.ipv4.ip_forward", "1")] {
            request.sysctls.insert(name.into(), value.into());
        }
        let spec = sandbox_spec(&request).unwrap();
        assert_eq!((spec.namespaces.pid, spec.namespaces.ipc), (NamespaceMode::Pod, NamespaceMode::Pod));
        assert_eq!(spec.sysctls.keys().collect::<Vec<_>>(), ["kernel.shmmax"], "the rest is the machine's");
        assert_eq!((spec.namespaces.network, spec.options.io_owner), (NamespaceMode::Node, (65536, 65536)));
        request.uids.clear();
        request.gids.clear();
        let spec = sandbox_spec(&request).unwrap();
        assert!(spec.namespaces.user.is_none() && spec.namespaces.ipc == NamespaceMode::Node && spec.sysctls.is_empty());
    }
}
