//! One pod in a machine of its own.
//!
//! ```text
//!  <root>/<namespace>/<sandbox id>/     everything of it, so that whoever finds the directory can remove all
//!      shared/       what the guest sees of the host (see share)
//!      vm            a link to the machine's directory, which has a short name: sockets of the VMM and its helpers
//!      console.log   what the guest's kernel and agent say
//!      netns         a link to the pod's network namespace
//! ```
//!
//! A start goes through phases, each of which can be taken back:
//!
//! ```text
//!   place ──▶ network │ share, virtiofsd │ vsock ──▶ VMM ──▶ agent's hello ──▶ set up
//!             └────────── side by side ──────────┘
//! ```

use std::{
    collections::{BTreeSet, HashMap},
    fs::DirBuilder,
    io::ErrorKind,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use kuasar_guest_protocol::{
    FORWARD_PORT, STORAGE_TARGET,
    agent::{IdMapping, ProcessRequest, SetUpRequest, Share as GuestShare},
};
use kuasar_sandboxers::{
    Container, Error, Result, Sandbox, SandboxContext,
    cgroup::{Cgroup, Stats, parent_path, parent_stats},
    failpoint::{self, Failpoint},
    id::ContainerId,
    inside::{Program, ProgramIo, Section},
    offload::{Done, Offload, Work},
    podfiles::Contents,
    process::Ending,
    stages,
    stdio::of_namespace,
    types::{ContainerHead, ContainerSpec, Exit, Mount, NamespaceMode, PodResources, SandboxSpec},
    undo::Undo,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    net::UnixListener,
    sync::{OwnedMutexGuard, mpsc},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, debug, warn};

pub(crate) use crate::guest::Guest;
use crate::{
    agent::SLOW,
    boot, calls,
    console::Console,
    container::{Contained, VmContainer},
    dial,
    disks::Disks,
    guest::GuestRecord,
    hypervisor::Place,
    inside::{self, Sessions},
    launch::Launched,
    machine_dir,
    net::{self, PodNetwork, forward::Forwarder},
    sandboxer::Shared,
    share::{Half, SharedDir},
    sizing::{self, Host, Size},
    spec::{Share, VmSpec},
};

/// How the control groups of machines are called, before the sandbox's id.
pub(crate) const GROUP: &str = "kuasar-vm-";

/// A snapshotter's filesystems that a guest can mount from a disk.
const DISK_FILESYSTEMS: [&str; 2] = ["ext4", "erofs"];

/// What a pod is, and what its containers need of it.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) spec: Arc<SandboxSpec>,
    pub(crate) context: SandboxContext,
    pub(crate) dir: PathBuf,
    pub(crate) shared: SharedDir,
    sandboxer: Arc<Shared>,
    number: u32,
    state: Mutex<State>,
    pub(crate) disks: Disks,
    ending: Ending,
    /// Programs beside the containers.
    pub(crate) sessions: Sessions,
}

#[derive(Debug, Default)]
struct State {
    size: Option<Size>,
    guest: Option<Arc<Guest>>,
    /// Carries connections to forwarded ports.
    forwarding: Option<AbortOnDropHandle<()>>,
    /// Names of containers that are being made or removed.
    claims: HashMap<String, Arc<tokio::sync::Mutex<()>>>,
    /// Containers that are made, as long as somebody has them.
    containers: HashMap<ContainerId, Weak<Contained>>,
}

/// What is saved of a pod.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Tells this machine's user and vsock address from others'.
    pub(crate) number: u32,
    size: Option<Size>,
    guest: Option<GuestRecord>,
}

/// Finds what is wrong with a pod before anything is made.
///
/// # Errors
/// [`Error::Unsupported`] for what a pod in a machine of its own cannot have.
pub(crate) fn check(spec: &SandboxSpec) -> Result<()> {
    let shares = |what, why: &str| {
        let why = format!("{why}, and this pod runs in a virtual machine; use a sandboxer of kind runc for it");
        Err(Error::Unsupported { operation: what, why })
    };
    let modes = &spec.namespaces;
    if modes.network == NamespaceMode::Node {
        return shares("hostNetwork", "the node's network interfaces cannot be in a virtual machine");
    }
    if modes.pid == NamespaceMode::Node {
        return shares("hostPID", "the node's processes cannot be seen from a virtual machine");
    }
    if modes.ipc == NamespaceMode::Node {
        return shares("hostIPC", "the node's shared memory cannot be in a virtual machine");
    }
    if spec.netns.is_none() {
        return Err(Error::invalid("netns", "the pod has its own network but no path to its namespace was given"));
    }
    Ok(())
}

impl Pod {
    pub(crate) fn new(
        spec: Arc<SandboxSpec>,
        context: SandboxContext,
        dir: PathBuf,
        sandboxer: Arc<Shared>,
        number: u32,
    ) -> Self {
        Self {
            shared: SharedDir::of(&dir),
            spec,
            context,
            dir,
            sandboxer,
            number,
            state: Mutex::default(),
            disks: Disks::default(),
            ending: Ending::pending(),
            sessions: Sessions::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine, while it runs.
    pub(crate) fn guest(&self) -> Result<Arc<Guest>> {
        match &self.state().guest {
            Some(guest) if guest.has_ended() => Err(guest.gone()),
            Some(guest) => Ok(guest.clone()),
            None => Err(self.not_started()),
        }
    }

    /// Has a container's name to oneself, for making it or for removing what is left of it.
    pub(crate) async fn claim(&self, id: &ContainerId) -> OwnedMutexGuard<()> {
        let claim = {
            let claims = &mut self.state().claims;
            claims.retain(|_, claim| Arc::strong_count(claim) > 1);
            claims.entry(id.to_string()).or_default().clone()
        };
        claim.lock_owned().await
    }

    /// Notes a container that is made.
    pub(crate) fn add_container(&self, container: &Arc<Contained>) {
        let containers = &mut self.state().containers;
        containers.retain(|_, container| container.strong_count() > 0);
        containers.insert(container.id().clone(), Arc::downgrade(container));
    }

    fn has_container(&self, id: &ContainerId) -> bool {
        self.state().containers.get(id).is_some_and(|container| container.strong_count() > 0)
    }

    /// Whether a root filesystem can be a disk of the machine: it is one device, and never anything else that a path may name.
    pub(crate) async fn can_be_disk(&self, mount: &Mount, offload: &Offload) -> Result<bool> {
        let may = mount.target.is_empty()
            && DISK_FILESYSTEMS.contains(&mount.kind.as_str())
            && self.sandboxer.hypervisor.capabilities().hot_disks.is_ok();
        if !may {
            return Ok(false);
        }
        let asked = offload.run_one(format!("device {}", mount.source), Work::IsBlockDevice((&mount.source).into())).await?;
        Ok(matches!(asked, Done::Answer(true)))
    }

    /// Where a volume in memory is in the guest: the same for all containers that have it.
    pub(crate) fn memory_volume(&self, source: &Path) -> String {
        let name: String = source.to_string_lossy().bytes().map(|byte| format!("{byte:02x}")).collect();
        // A path has at most 4096 bytes and a name 255, so a long one is told by its end, where volumes have their names.
        format!("{STORAGE_TARGET}/memory/{}", &name[name.len().saturating_sub(240)..])
    }

    fn group(&self) -> PathBuf {
        parent_path(&self.spec.cgroup_parent).join(format!("{GROUP}{}", self.spec.id))
    }

    fn size(&self) -> Result<Size> {
        let Shared { config, boot_mib, .. } = &*self.sandboxer;
        let can_grow = self.sandboxer.can_grow();
        sizing::of(config, *boot_mib, Host::look()?, &self.spec.resources, &self.spec.annotations, can_grow)
    }

    /// Makes the directory and finds out what can be known before the start.
    pub(crate) fn prepare(&self) -> Result<()> {
        stages::enter("size the machine");
        self.state().size = Some(self.size()?);
        stages::enter("make the pod's directory");
        // Nobody else may come by: below it are containers' files, Secrets and programs that become root among them.
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(Error::io("create", &self.dir))?;
        // From now on its number is seen to be taken, by a later daemon too.
        machine_dir::link(&self.dir.join("vm"), &self.sandboxer.machine_dir(self.number))
            .or_else(|error| machine_dir::remove_dir(&self.dir).and(Err(error)))
    }

    /// Takes the state over that an earlier daemon has saved.
    pub(crate) async fn restore(self: &Arc<Self>, record: Record) -> Result<()> {
        self.disks.set_inherited();
        self.state().size = record.size;
        let Some(saved) = record.guest else {
            // A start that was cut off is not waited for any more, and its machine would run until somebody deletes the sandbox.
            if let Err(error) = self.clear_machine().await {
                warn!(error = error.report(), "cannot remove what a start that was cut off has left; its deletion tries again");
            }
            return Ok(());
        };
        let place = self.place(None);
        let vm = self.sandboxer.hypervisor.adopt(saved.vm, place.clone()).await?;
        let helpers =
            saved.helpers.into_iter().map(|helper| self.sandboxer.adopt_helper(helper, &place)).collect::<Result<_>>()?;
        dial::outwait(&self.context.fds);
        let guest = Guest::watch(vm, helpers, Console::of(&self.dir), self.context.fds.clone());
        guest.tend(&self.context);
        match Forwarder::adopt(&self.context.fds, &self.forwarder_name()) {
            Ok(Some(forwarder)) => self.forward(&guest, forwarder),
            Ok(None) => {}
            Err(error) => debug!(error = error.report(), "ports are not forwarded any more"),
        }
        self.adopt(guest);
        self.clear_sessions().await;
        Ok(())
    }

    /// Nobody waits any more for programs that ran beside the containers under an earlier daemon. No new one begins before they are gone.
    async fn clear_sessions(self: &Arc<Self>) {
        let held = self.sessions.hold().await;
        let pod = self.clone();
        let work = async move {
            inside::clear(&pod).await;
            drop(held);
        };
        tokio::spawn(work.in_current_span());
    }

    /// The machine, also one that has ended.
    fn machine(&self) -> Result<Arc<Guest>> {
        self.state().guest.clone().ok_or_else(|| self.not_started())
    }

    fn not_started(&self) -> Error {
        let why = "it has no virtual machine yet; start it first".into();
        Error::Unavailable { what: format!("sandbox {}", self.spec.id), why }
    }

    fn forwarder_name(&self) -> String {
        format!("{}{}/forward", of_namespace(&self.spec.namespace), self.spec.id)
    }

    fn adopt(self: &Arc<Self>, guest: Arc<Guest>) {
        self.state().guest = Some(guest.clone());
        let pod = Arc::downgrade(self);
        let work = async move {
            guest.ended().await;
            if let Some(pod) = pod.upgrade() {
                pod.ending.tell(Exit::now(0));
            }
        };
        tokio::spawn(work.in_current_span());
    }

    fn place(&self, cgroup: Option<Cgroup>) -> Place {
        Place {
            dir: self.sandboxer.machine_dir(self.number),
            reaper: self.context.reaper.clone(),
            cgroup,
            user: self.sandboxer.user(self.number),
        }
    }

    /// Removes what a start has made that was cut off before anybody could take it back.
    async fn clear_machine(&self) -> Result<()> {
        if !self.sandboxer.machine_dir(self.number).exists() {
            return Ok(());
        }
        warn!("removing what is left of a start that was cut off");
        machine_dir::clear_machine(&self.dir, &Cgroup::at(&self.group())?).await
    }

    async fn start_now(self: &Arc<Self>, undo: &mut Undo) -> Result<()> {
        let sandboxer = &self.sandboxer;
        let Some(size) = self.state().size else { return Err(Error::invalid("sandbox", "its machine has no size")) };
        let Some(netns) = self.spec.netns.clone() else { return Err(Error::invalid("netns", "there is none")) };

        stages::enter("remove what an earlier start has left");
        self.clear_machine().await?;
        stages::enter("make the machine's control group and directory");
        // First: by this directory it is seen that a start has begun.
        let dir = self.dir.clone();
        undo.push("remove the machine's files", async move { machine_dir::remove(&dir) });
        machine_dir::make(&sandboxer.machine_dir(self.number))?;
        let path = self.group();
        let group = tokio::task::spawn_blocking(move || Cgroup::create(&path))
            .await
            .map_err(Error::failed("make a control group"))??;
        let taken_back = group.clone();
        undo.push("remove the machine's control group", async move { machine_dir::remove_group(&taken_back).await });
        let place = self.place(Some(group));
        machine_dir::link(&self.dir.join("netns"), &netns)?;
        let console = Console::of(&self.dir);
        console.create(place.user)?;

        stages::enter("connect the network, and start virtiofsd and the vsock device");
        let (mut net_undo, mut share_undo) = (Undo::new("connect the network"), Undo::new("share files"));
        let (network, filesystems, vsock) = tokio::join!(
            net::connect(&netns, &mut net_undo),
            self.start_shares(&place, &mut share_undo),
            sandboxer.vsock.start(self.number, &place),
        );
        for part in [net_undo, share_undo] {
            undo.append(part);
        }
        let (PodNetwork { nics, setup }, (filesystems, shares), vsock) = (network?, filesystems?, vsock?);
        failpoint::reach(Failpoint::HelpersStarted);
        let helpers: Vec<_> = filesystems.into_iter().chain(vsock.device).collect();

        stages::enter(format!("start {}", sandboxer.hypervisor.capabilities().name));
        let spec = VmSpec {
            name: self.spec.id.to_string(),
            cpus: size.cpus,
            memory: size.memory,
            kernel: sandboxer.config.kernel(),
            initrd: sandboxer.initrd(),
            cmdline: sandboxer.command_line(),
            disks: Vec::new(),
            shares,
            nics,
            vsock: vsock.vsock,
            console: console.path().to_owned(),
            balloon: true,
        };
        let vm = match sandboxer.hypervisor.start(spec, place, undo).await {
            Ok(vm) => vm,
            Err(error) => return Err(blame(error, &helpers).await),
        };
        failpoint::reach(Failpoint::PodMade);
        let guest = Guest::watch(vm, helpers, console.clone(), self.context.fds.clone());
        let taken_back = guest.clone();
        undo.push("end the machine", async move {
            taken_back.stop(Duration::ZERO).await;
            Ok(())
        });

        let booted = self.boot(&guest, vsock.ready, &setup).await;
        if let Err(error) = booted {
            stages::keep_log("the guest's console", &console.end(stages::LOG_LIMIT as u64)?);
            let (program, said) = (sandboxer.hypervisor.capabilities().name.clone(), console.last_lines());
            return Err(boot::failure(program, &error, &said, size.memory.boot_mib, &self.spec.resources));
        }
        failpoint::reach(Failpoint::GuestBooted);
        stages::enter("forward ports");
        match Forwarder::attach(&netns, &self.context.fds, self.forwarder_name()).await {
            Ok(forwarder) => self.forward(&guest, forwarder),
            // Only port-forward needs it.
            Err(error) => debug!(error = error.report(), "ports of the pod cannot be forwarded"),
        }
        guest.tend(&self.context);
        self.adopt(guest);
        Ok(())
    }

    async fn start_shares(&self, place: &Place, undo: &mut Undo) -> Result<(Vec<Launched>, Vec<Share>)> {
        let shared = self.shared.clone();
        undo.push("take the shared directory away", async move { shared.remove().await });
        self.shared.create().await?;
        let start = async |half: Half| {
            let name = format!("virtiofsd-{}", half.name());
            let socket = place.dir.join(format!("{name}.sock"));
            let virtiofsd = &self.sandboxer.virtiofsd;
            let launched = virtiofsd.start(&name, &self.shared.half(half), half.cache(), &socket, place).await?;
            Ok::<_, Error>((launched, Share { tag: half.name().into(), socket }))
        };
        let [roots, volumes] = Half::ALL.map(start);
        // Both to their ends, so that none is cut off by the other's failure.
        let (roots, volumes) = tokio::join!(roots, volumes);
        Ok([roots?, volumes?].into_iter().unzip())
    }

    async fn boot(&self, guest: &Guest, ready: Option<UnixListener>, network: &net::GuestNetwork) -> Result<()> {
        stages::enter("boot the guest");
        let limit = boot::limit(self.sandboxer.config.boot_limit, &self.spec.resources);
        guest.unless_ended(guest.agent().wait(ready, limit)).await?;
        stages::enter("set up the guest");
        let request = self.setup(network)?;
        let set_up = guest
            .agent()
            .call("set up the guest", Some(SLOW), |client, context| async move { client.set_up(context, &request).await });
        guest.unless_ended(set_up).await.map(drop)
    }

    fn setup(&self, network: &net::GuestNetwork) -> Result<SetUpRequest> {
        let spec = &self.spec;
        let Contents { hosts, hostname, resolv_conf } = Contents::of(&spec.hostname, spec.dns.as_ref())?;
        let mappings = |of: fn(&kuasar_sandboxers::types::IdMappings) -> &Vec<kuasar_sandboxers::types::IdMapping>| {
            let mappings = spec.namespaces.user.as_ref().map(of);
            let mapping = |one: &kuasar_sandboxers::types::IdMapping| IdMapping {
                container_id: one.container_id,
                host_id: one.host_id,
                length: one.length,
                ..IdMapping::default()
            };
            mappings.into_iter().flatten().map(mapping).collect()
        };
        let mut sysctls: HashMap<_, _> = spec.sysctls.clone().into_iter().collect();
        // As containerd has it for pods with a network of their own: low ports and ping need no privilege.
        for (name, value) in [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")] {
            sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
        let containers = spec.resources.containers.iter();
        let huge_pages =
            containers.flat_map(|resources| &resources.huge_page_limits).map(|(size, bytes)| (*size, bytes / size));
        let shares = Half::ALL.map(|half| GuestShare {
            tag: half.name().into(),
            target: half.target().to_string_lossy().into_owned(),
            ..GuestShare::default()
        });
        Ok(SetUpRequest {
            sandbox: spec.id.to_string(),
            hostname,
            hosts,
            resolv_conf,
            sysctls,
            shares: shares.into(),
            shared_pids: spec.namespaces.pid == NamespaceMode::Pod,
            uids: mappings(|map| &map.uids),
            gids: mappings(|map| &map.gids),
            interfaces: network.interfaces.clone(),
            routes: network.routes.clone(),
            neighbours: network.neighbours.clone(),
            huge_pages: huge_pages.collect(),
            pod_memory_bytes: sizing::pod_limit_bytes(&self.sandboxer.config, &spec.resources).unwrap_or(0),
            ..SetUpRequest::default()
        })
    }

    /// Hands connections to the pod's localhost, as port-forward makes them in its network namespace, to the guest.
    fn forward(&self, guest: &Arc<Guest>, forwarder: Forwarder) {
        let guest = guest.clone();
        let dial = move || {
            let guest = guest.clone();
            async move { guest.agent().dial(FORWARD_PORT).await }
        };
        let running = tokio::spawn(async move { forwarder.run(dial).await }.in_current_span());
        self.state().forwarding = Some(AbortOnDropHandle::new(running));
    }
}

/// A VMM does not start when one of its helpers has ended: that is the reason then. One that ends because the VMM has is not killed.
async fn blame(error: Error, helpers: &[Launched]) -> Error {
    let is_refused = matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::ConnectionRefused);
    // The helpers of a VMM that was refused by one of them have lost it, too, and end with status 0.
    let ended = helpers.iter().filter_map(|helper| Some((helper.exit()?.status, helper)));
    let to_blame = ended.filter(|(status, _)| is_refused || *status > 128).max_by_key(|(status, _)| *status);
    match to_blame {
        Some((_, helper)) => helper.failure("serve the machine", Duration::ZERO).await,
        None => error,
    }
}

/// The contract's face of a [`Pod`].
#[derive(Debug)]
pub(crate) struct VmSandbox(Arc<Pod>);

impl VmSandbox {
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        Self(pod)
    }
}

#[async_trait]
impl Sandbox for VmSandbox {
    /// No process of the node stands for the pod: its processes are another kernel's.
    async fn start(&self) -> Result<Option<u32>> {
        let mut undo = Undo::new("start the sandbox");
        let started = self.0.start_now(&mut undo).await;
        undo.settle(started).await.map(|()| None)
    }

    async fn stop(&self, grace: Duration) -> Result<()> {
        let guest = self.0.state().guest.clone();
        if let Some(guest) = guest {
            guest.stop(grace).await;
        }
        // Its listeners keep the pod's network namespace.
        self.0.state().forwarding.take();
        self.0.ending.tell(Exit::now(0));
        Ok(())
    }

    async fn delete(&self) -> Result<()> {
        self.stop(Duration::ZERO).await?;
        machine_dir::clear(&self.0.dir, &Cgroup::at(&self.0.group())?).await?;
        self.0.sandboxer.release(self.0.number);
        Ok(())
    }

    async fn exited(&self) -> Exit {
        self.0.ending.wait().await
    }

    async fn create_container(&self, spec: ContainerSpec) -> Result<Arc<dyn Container>> {
        Ok(Arc::new(VmContainer::create(self.0.clone(), spec).await?))
    }

    async fn recover_container(&self, head: ContainerHead, record: Value) -> Result<Arc<dyn Container>> {
        Ok(Arc::new(VmContainer::recover(self.0.clone(), head, record).await?))
    }

    /// A machine grows with its pod. It does not shrink: the pod's control group holds it to less, and free memory is given back anyway.
    async fn update(&self, resources: &PodResources) -> Result<()> {
        let Some(now) = self.0.state().size else { return Ok(()) };
        let Ok(guest) = self.0.guest() else { return Ok(()) };
        let config = &self.0.sandboxer.config;
        let mut wanted = sizing::grown(config, now, resources);
        let (mut cpus, mut memory_mib) = (0, 0);
        if wanted.cpus != now.cpus {
            guest.unless_ended(guest.vm().set_cpus(wanted.cpus.boot)).await?;
            cpus = wanted.cpus.boot;
        }
        if wanted.memory != now.memory {
            memory_mib = guest.unless_ended(guest.vm().set_memory(wanted.memory.boot_mib)).await?;
            // It may have been given more, for memory comes in blocks.
            wanted.memory.boot_mib = memory_mib.min(wanted.memory.max_mib);
        }
        guest.online(cpus, memory_mib << 20, sizing::pod_limit_bytes(config, resources).unwrap_or(0)).await?;
        self.0.state().size = Some(wanted);
        Ok(())
    }

    async fn metrics(&self) -> Result<Option<Stats>> {
        if let Some(stats) = parent_stats(&self.0.spec.cgroup_parent)? {
            return Ok(Some(stats));
        }
        match Cgroup::at(&self.0.group())?.stats() {
            Err(Error::NotFound { .. }) => Ok(None),
            stats => stats.map(Some),
        }
    }

    fn record(&self) -> Value {
        let state = self.0.state();
        json!(Record { number: self.0.number, size: state.size, guest: state.guest.as_ref().map(|guest| guest.record()) })
    }

    fn describe(&self) -> Value {
        let state = self.0.state();
        let hello = state.guest.as_ref().and_then(|guest| guest.agent().hello());
        let hello = hello.as_ref();
        json!({
            "hypervisor": self.0.sandboxer.hypervisor.capabilities().name,
            "directory": self.0.dir,
            "size": state.size,
            "processes": state.guest.as_ref().map(|guest| guest.pids()),
            "ended": state.guest.as_ref().filter(|guest| guest.has_ended()).map(|guest| guest.reason()),
            "kernel": hello.map(|hello| &hello.kernel),
            "agent": hello.map(|hello| &hello.agent),
            "runtime": hello.map(|hello| &hello.runtime),
        })
    }

    async fn run_beside(&self, program: Program, io: ProgramIo) -> Result<u32> {
        inside::run(&self.0, program, io).await
    }

    async fn console(&self, follow: bool, output: mpsc::Sender<String>) -> Result<()> {
        let guest = self.0.machine()?;
        let ended = async {
            guest.ended().await;
        };
        guest.console().give(follow.then_some(ended), &output).await
    }

    async fn account(&self) -> Result<Vec<Section>> {
        Ok(inside::account(&*self.0.machine()?, &self.describe()).await)
    }
}

/// Removes a container of a known sandbox whose creation was cut off: none of those that are `recorded`.
pub(crate) async fn remove_half_made(pod: &Pod, id: &ContainerId, recorded: &BTreeSet<ContainerId>) -> Result<()> {
    let _claim = pod.claim(id).await;
    let guest = pod.guest().ok();
    // Else whoever asked for it has asked again meanwhile, and has it.
    if !pod.has_container(id) {
        let request = ProcessRequest { container: id.to_string(), ..ProcessRequest::default() };
        calls::delete(pod, &request).await?;
        if let Some(guest) = &guest {
            pod.disks.remove(guest, id).await?;
        }
        pod.shared.remove_container(id).await?;
    }
    match guest {
        Some(guest) => pod.disks.sweep(&guest, recorded).await,
        None => Ok(()),
    }
}
