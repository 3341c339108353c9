//! A container in the guest, and processes added to it.
//!
//! The agent holds what is true of them; here is what they have on the host (a place in the share, disks, streams) and how they ended.

use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use kuasar_guest_protocol::agent::{ContainerRequest, CreateContainerRequest, ExecRequest, ProcessRequest, UpdateRequest};
use kuasar_sandboxers::{
    Code, Container, Error, Process, Result,
    cgroup::Stats,
    failpoint::{self, Failpoint},
    id::{ContainerId, ExecId},
    offload::Offload,
    process::Ending,
    stages,
    stdio::{IoContext, ProcessIo, Stdio},
    types::{ContainerHead, ContainerSpec, ExecSpec, Exit, ProcessInfo, WindowSize},
    undo::Undo,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{sync::Notify, time::timeout};
use tracing::{Instrument, debug};

use crate::{
    agent::{QUICK, SLOW},
    calls::{self, known_to_run},
    disks::{DiskUse, Wanted},
    ended::{OomKills, exit},
    pod::{Guest, Pod},
    relay::{self, Relay},
    rewrite::{self, GUEST_PIDS},
    storage,
};

/// The status of a process whose machine ended under it, as of one that was killed.
const KILLED: u32 = 137;

/// The most processes of a container that are listed: the guest says how many there are.
const MOST_PROCESSES: usize = 65_536;

/// A process in the guest and all that belongs to it on this side.
#[derive(Debug)]
struct Running {
    pod: Arc<Pod>,
    request: ProcessRequest,
    /// In the guest.
    pid: u32,
    /// The VMM, which is all that there is of it on the node.
    vmm: Option<u32>,
    relay: Relay,
    ending: Ending,
    /// Whether somebody waits for it to die of SIGKILL.
    doomed: AtomicBool,
    /// Of a container's first process.
    oom_kills: OomKills,
    /// Nobody reads what it has left behind any more.
    deleted: Notify,
}

/// How long a container may take to end after SIGKILL before its machine is ended: as long as a guest may take to answer.
const DYING: std::time::Duration = QUICK;

/// What is saved of a container.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: u32,
    /// Serial numbers.
    disks: Vec<String>,
    /// The same disks, and what they are; a daemon before this one did not save that.
    #[serde(default)]
    uses: Vec<DiskUse>,
}

/// What is saved of an added process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ExecRecord {
    /// It can be started.
    Added { document: Value },
    /// It has been.
    Started { pid: u32 },
}

/// The contract's face of a container.
#[derive(Debug)]
pub(crate) struct VmContainer(Arc<Contained>);

/// A container and all that belongs to it.
#[derive(Debug)]
pub(crate) struct Contained {
    process: Arc<Running>,
    head: ContainerHead,
    disks: Vec<DiskUse>,
}

/// A process that was added to a container.
#[derive(Debug)]
pub(crate) struct VmExec {
    pod: Arc<Pod>,
    request: ProcessRequest,
    id: ExecId,
    container: ContainerId,
    stdio: Stdio,
    /// What to run; null once it runs.
    document: Mutex<Value>,
    /// An earlier daemon has added it, and may have started it.
    recovered: bool,
    /// The guest was asked to start it, and may have.
    attempted: AtomicBool,
    running: OnceLock<Arc<Running>>,
}

fn request(container: &ContainerId, exec: Option<&ExecId>) -> ProcessRequest {
    let exec = exec.map(ToString::to_string).unwrap_or_default();
    ProcessRequest { container: container.to_string(), exec, ..ProcessRequest::default() }
}

impl Running {
    /// Watches for its end.
    fn begin(pod: Arc<Pod>, guest: Option<Arc<Guest>>, request: ProcessRequest, pid: u32, relay: Relay) -> Arc<Self> {
        let vmm = guest.as_ref().map(|guest| guest.vm().pid());
        let (ending, doomed, deleted) = (Ending::pending(), AtomicBool::new(false), Notify::new());
        let oom_kills = OomKills::default();
        let running = Arc::new(Self { pod, request, pid, vmm, relay, ending, doomed, oom_kills, deleted });
        tokio::spawn(running.clone().watch(guest).in_current_span());
        running
    }

    async fn watch(self: Arc<Self>, guest: Option<Arc<Guest>>) {
        let exit = match &guest {
            Some(guest) => exit(guest, &self.request).await,
            None => None,
        };
        let exit = exit.as_ref();
        let settled = match &guest {
            Some(guest) if !exit.is_some_and(|exit| exit.more) => self.relay.settle(exit, guest.agent(), &self.request).await,
            _ => false,
        };
        if settled {
            self.relay.report_loss(exit, &self.request);
            self.relay.close().await;
        }
        self.oom_kills.report(&self.pod.context.notices, &self.request, exit).await;
        self.ending.tell(Exit::now(exit.map_or(KILLED, |exit| exit.status & 0xff)));
        if !settled {
            // As on the node, where the process's output waits for containerd, and what it has left behind has that output, too.
            if let Some(guest) = guest {
                tokio::select! {
                    () = self.relay.linger(exit) => {}
                    () = self.deleted.notified() => {}
                    _ = guest.ended() => {}
                }
            }
            self.relay.report_loss(exit, &self.request);
            self.relay.close().await;
        }
    }

    /// A number that stands for it alone, and for no process of the node.
    fn shown_pid(&self) -> u32 {
        GUEST_PIDS.saturating_add(self.pid)
    }

    async fn kill(self: &Arc<Self>, signal: i32, all: bool) -> Result<()> {
        let finished = || Error::Finished {
            id: if self.request.exec.is_empty() { &self.request.container } else { &self.request.exec }.clone(),
        };
        if self.ending.known().is_some() {
            return Err(finished());
        }
        let is_last = signal == libc::SIGKILL && self.request.exec.is_empty();
        let signal = u32::try_from(signal).map_err(|_| Error::invalid("signal", format!("{signal} is no signal")))?;
        let guest = self.pod.guest()?;
        match guest.unless_ended(calls::signal(&guest, &self.request, signal, all)).await {
            Err(error) if error.code() == Code::NotFound => Err(finished()),
            // It ended with its machine.
            Err(_) if guest.has_ended() => Err(finished()),
            // A pod is stopped after its containers: one that cannot be killed would never let go of its machine.
            Err(error) if is_last && matches!(error.code(), Code::Unavailable | Code::DeadlineExceeded) => {
                guest.give_up(format!("container {} cannot be killed: {}", self.request.container, error.report())).await;
                Ok(())
            }
            sent => {
                if is_last && !self.doomed.swap(true, Ordering::Relaxed) {
                    tokio::spawn(self.clone().see_it_die(guest).in_current_span());
                }
                sent.map(drop)
            }
        }
    }

    /// What a guest says of SIGKILL is not relied upon: ends the machine of a container that lives on.
    async fn see_it_die(self: Arc<Self>, guest: Arc<Guest>) {
        if timeout(DYING, self.ending.wait()).await.is_err() {
            let container = &self.request.container;
            guest.give_up(format!("container {container} has not ended within {} s of being killed", DYING.as_secs())).await;
        }
    }

    async fn resize(&self, size: WindowSize) -> Result<()> {
        calls::resize(&*self.pod.guest()?, &self.request, size).await
    }

    async fn close_stdin(&self) -> Result<()> {
        // The guest sees the end of input when the connection ends, which is after containerd has closed its end, too.
        self.relay.close_stdin();
        Ok(())
    }

    /// Has the guest remove it, if there still is a guest.
    async fn delete(&self) -> Result<()> {
        self.deleted.notify_one();
        calls::delete(&self.pod, &self.request).await
    }
}

impl VmContainer {
    pub(crate) async fn create(pod: Arc<Pod>, spec: ContainerSpec) -> Result<Self> {
        let mut undo = Undo::new("create the container");
        let created = create(pod, spec, &mut undo).await;
        undo.settle(created).await.map(Self)
    }

    pub(crate) async fn recover(pod: Arc<Pod>, head: ContainerHead, record: Value) -> Result<Self> {
        let record: Record = serde_json::from_value(record).map_err(Error::failed("read the container's record"))?;
        let Record { pid, disks: serials, uses } = record;
        let disks = if uses.is_empty() { serials.into_iter().map(DiskUse::of).collect() } else { uses };
        // Whether it is recovered or not, they are taken for nobody else's.
        pod.disks.adopt(&head.id, &disks).await;
        let request = request(&head.id, None);
        let (guest, context) = (pod.guest().ok(), IoContext::of(&pod.spec, &pod.context, &head.id, None));
        let agent = guest.as_ref().map(|guest| guest.agent());
        let relay = Relay::adopt(&head.stdio, &context, agent, &request).await?;
        let process = Running::begin(pod, guest, request, pid, relay);
        Ok(Self(Contained { process, head, disks }.known()))
    }
}

async fn create(pod: Arc<Pod>, spec: ContainerSpec, undo: &mut Undo) -> Result<Arc<Contained>> {
    let ContainerSpec { id, bundle, spec: mut oci, rootfs, stdio } = spec;
    let guest = pod.guest()?;
    stages::enter("rewrite the specification");
    let (mut volumes, devices) = rewrite::prepare(&mut oci)?;
    let request = request(&id, None);
    // One attempt at a time. What an earlier one has left goes: here when this has its place, in the guest when it makes the container.
    let _claim = pod.claim(&id).await;
    pod.disks.adopt(&id, &[]).await;

    stages::enter("share the rootfs");
    let (shared, named) = (pod.shared.clone(), id.clone());
    undo.push(format!("take container {id} out of the share"), async move { shared.remove_container(&named).await });
    let place = pod.shared.add_container(&id).await?;
    let offload = Offload::new(pod.spec.id.to_string(), &pod.context.reaper);
    let mut disks = Vec::new();
    let mut storages = Vec::new();
    let on_disk = match &rootfs[..] {
        [only] => pod.can_be_disk(only, &offload).await?,
        _ => false,
    };
    let root = match &rootfs[..] {
        [] => {
            let source = bundle.join(oci.root_path().unwrap_or("rootfs"));
            place.bind_rootfs(&source, oci.root_readonly(), &offload).await?
        }
        [only] if on_disk => {
            let readonly = only.options.iter().any(|option| option == "ro");
            let wanted = Wanted { container: &id, source: only.source.as_ref(), readonly, shared: false };
            match pod.disks.add(&guest, wanted, &offload, undo).await {
                Ok(disk) => {
                    let target = format!("{}/{id}/rootfs", kuasar_guest_protocol::STORAGE_TARGET);
                    storages.push(storage::filesystem(&disk, only, &target));
                    disks.push(disk);
                    target.into()
                }
                // All places are taken: the node can mount it as well.
                Err(error @ Error::Unsupported { .. }) => {
                    debug!(error = error.report(), "the root filesystem is shared instead");
                    place.add_rootfs(&rootfs, &offload).await?
                }
                Err(error) => return Err(error),
            }
        }
        mounts => place.add_rootfs(mounts, &offload).await?,
    };
    failpoint::reach(Failpoint::Mounted);
    oci.set_root_path(&root);
    stages::enter("share the volumes");
    let shown = place.add_volumes(&mut volumes, &offload).await?;
    for (volume, place) in volumes.iter().zip(shown) {
        let place = match volume.huge_page {
            None => place,
            Some(size) => {
                let target = pod.memory_volume(&volume.source);
                storages.push(storage::huge_pages(&[format!("pagesize={size}"), "mode=1777".into()], &target));
                target.into()
            }
        };
        rewrite::place(&mut oci, volume, &place);
    }
    for device in &devices {
        let wanted = Wanted { container: &id, source: &device.source, readonly: device.readonly, shared: true };
        let disk = pod.disks.add(&guest, wanted, &offload, undo).await?;
        let serial = &disk.serial;
        let target =
            format!("{}/{id}/{serial}{}", kuasar_guest_protocol::STORAGE_TARGET, if device.readonly { "-ro" } else { "" });
        // The same device may be at two paths of a container.
        if !storages.iter().any(|storage| storage.target == target) {
            storages.push(storage::raw(&disk, device.readonly, &target));
        }
        rewrite::add_block_device(&mut oci, device, target.as_ref());
        disks.push(disk);
    }

    let spec = storage::document(&oci)?;
    // As a tree it takes some hundred kilobytes, and the guest most of the time that this takes.
    drop(oci);
    stages::enter("open its input and output");
    let context = IoContext::of(&pod.spec, &pod.context, &id, None);
    let io = ProcessIo::open(&stdio, &context).await?;
    stages::enter("create the container in the guest");
    let asked = CreateContainerRequest {
        id: id.to_string(),
        spec,
        storages,
        streams: Some(relay::streams(&stdio)).into(),
        ..CreateContainerRequest::default()
    };
    let (taken_back, named) = (pod.clone(), request.clone());
    undo.push("remove the container in the guest", async move { calls::delete(&taken_back, &named).await });
    let made = guest.agent().call("create the container", Some(SLOW), |client, context| async move {
        client.create_container(context, &asked).await
    });
    let (made, connections) = guest.unless_ended(relay::make(guest.agent(), &stdio, made)).await?;
    failpoint::reach(Failpoint::ContainerMade);
    let relay = Relay::open(io, connections?, &context, &request)?;
    let process = Running::begin(pod, Some(guest), request, made.pid, relay);
    Ok(Contained { process, head: ContainerHead { id, bundle, stdio }, disks }.known())
}

impl Contained {
    /// Lets the pod know that it is made.
    fn known(self) -> Arc<Self> {
        let container = Arc::new(self);
        container.process.pod.add_container(&container);
        container
    }

    pub(crate) fn id(&self) -> &ContainerId {
        &self.head.id
    }

    fn named(&self) -> ContainerRequest {
        ContainerRequest { container: self.head.id.to_string(), ..ContainerRequest::default() }
    }
}

#[async_trait]
impl Process for VmContainer {
    fn pid(&self) -> Option<u32> {
        Some(self.0.process.shown_pid())
    }

    fn node_pid(&self) -> Option<u32> {
        self.0.process.vmm
    }

    async fn start(&self) -> Result<u32> {
        let guest = self.0.process.pod.guest()?;
        let request = self.0.named();
        let started = guest.agent().call("start the container", Some(SLOW), |client, context| async move {
            client.start_container(context, &request).await
        });
        guest.unless_ended(started).await?;
        failpoint::reach(Failpoint::ContainerStarted);
        Ok(self.0.process.shown_pid())
    }

    async fn started(&self) -> Result<Option<u32>> {
        let process = &self.0.process;
        Ok(known_to_run(&process.pod, &process.request).await.map(|_| process.shown_pid()))
    }

    async fn kill(&self, signal: i32, all: bool) -> Result<()> {
        self.0.process.kill(signal, all).await
    }

    async fn exited(&self) -> Exit {
        self.0.process.ending.wait().await
    }

    async fn delete(&self) -> Result<()> {
        let pod = &self.0.process.pod;
        self.0.process.delete().await?;
        failpoint::reach(Failpoint::ContainerDeleted);
        if let Ok(guest) = pod.guest() {
            pod.disks.remove(&guest, &self.0.head.id).await?;
            guest.known_stats().forget(self.0.head.id.as_str());
        }
        pod.shared.remove_container(&self.0.head.id).await?;
        Ok(())
    }

    async fn resize(&self, size: WindowSize) -> Result<()> {
        self.0.process.resize(size).await
    }

    async fn close_stdin(&self) -> Result<()> {
        self.0.process.close_stdin().await
    }

    fn record(&self) -> Value {
        let disks = self.0.disks.iter().map(|disk| disk.serial.clone()).collect();
        json!(Record { pid: self.0.process.pid, disks, uses: self.0.disks.clone() })
    }
}

#[async_trait]
impl Container for VmContainer {
    async fn exec(&self, spec: ExecSpec) -> Result<Arc<dyn Process>> {
        let ExecSpec { id, mut process, stdio } = spec;
        let Some(document) = process.as_object_mut() else {
            return Err(Error::invalid("exec spec", "the process is not a JSON object"));
        };
        // The request decides; the runtime wants both to agree.
        document.insert("terminal".into(), stdio.terminal.into());
        document.shift_remove("apparmorProfile");
        document.shift_remove("selinuxLabel");
        Ok(Arc::new(self.add(id, stdio, process)))
    }

    async fn recover_exec(&self, id: ExecId, stdio: Stdio, record: Value) -> Result<Arc<dyn Process>> {
        let record: ExecRecord = serde_json::from_value(record).map_err(Error::failed("read the exec's record"))?;
        let (document, pid) = match record {
            ExecRecord::Added { document } => (document, None),
            ExecRecord::Started { pid } => (Value::Null, Some(pid)),
        };
        let exec = VmExec { recovered: true, ..self.add(id, stdio, document) };
        let recorded = pid.is_some();
        let pid = match pid {
            None => known_to_run(&exec.pod, &exec.request).await,
            known => known,
        };
        if let Some(pid) = pid {
            let guest = exec.pod.guest().ok();
            let agent = guest.as_ref().map(|guest| guest.agent());
            let relay = match Relay::adopt(&exec.stdio, &exec.io_context(), agent, &exec.request).await {
                // Its client went away before it was told of the start: nobody else would end it.
                Err(error @ Error::Invalid { .. }) if !recorded => {
                    calls::delete(&exec.pod, &exec.request).await?;
                    return Err(error);
                }
                adopted => adopted?,
            };
            exec.running.get_or_init(|| Running::begin(exec.pod.clone(), guest, exec.request.clone(), pid, relay));
        }
        Ok(Arc::new(exec))
    }

    async fn pids(&self) -> Result<Vec<ProcessInfo>> {
        let first = ProcessInfo { pid: self.0.process.shown_pid(), exec: None };
        let Ok(guest) = self.0.process.pod.guest() else { return Ok(vec![first]) };
        let listed = match guest.processes(self.0.named()).await {
            Ok(listed) => listed.unwrap_or_default().processes,
            Err(error) if guest.has_ended() || error.code() == Code::NotFound => return Ok(vec![first]),
            Err(error) => return Err(error),
        };
        let listed = listed.into_iter().take(MOST_PROCESSES);
        let list = listed.map(|one| ProcessInfo { pid: GUEST_PIDS.saturating_add(one.pid), exec: one.exec.parse().ok() });
        let list: Vec<_> = list.collect();
        Ok(if list.is_empty() { vec![first] } else { list })
    }

    async fn stats(&self) -> Result<Stats> {
        let process = &self.0.process;
        let measured = match process.pod.guest() {
            Ok(guest) => guest.stats(self.0.head.id.as_str()).await,
            Err(error) => Err(error),
        };
        process.oom_kills.or_ended(measured, &process.ending)
    }

    async fn update(&self, mut resources: Value) -> Result<()> {
        // Numbers of the host's processors and memory nodes mean nothing in the guest.
        if let Some(cpu) = resources["cpu"].as_object_mut() {
            cpu.shift_remove("cpus");
            cpu.shift_remove("mems");
        }
        let request = UpdateRequest {
            container: self.0.head.id.to_string(),
            resources: resources.to_string().into_bytes(),
            ..UpdateRequest::default()
        };
        let guest = self.0.process.pod.guest()?;
        let updated = guest.agent().call("change the container's resources", Some(SLOW), |client, context| async move {
            client.update(context, &request).await
        });
        updated.await.map(drop)
    }

    async fn pause(&self) -> Result<()> {
        let guest = self.0.process.pod.guest()?;
        let request = self.0.named();
        let paused = guest
            .agent()
            .call("pause the container", Some(QUICK), |client, context| async move { client.pause(context, &request).await });
        paused.await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        let guest = self.0.process.pod.guest()?;
        let request = self.0.named();
        let resumed = guest
            .agent()
            .call("resume the container", Some(QUICK), |client, context| async move { client.resume(context, &request).await });
        resumed.await.map(drop)
    }
}

impl VmContainer {
    fn add(&self, id: ExecId, stdio: Stdio, document: Value) -> VmExec {
        let container = self.0.head.id.clone();
        VmExec {
            pod: self.0.process.pod.clone(),
            request: request(&container, Some(&id)),
            id,
            container,
            stdio,
            document: Mutex::new(document),
            recovered: false,
            attempted: AtomicBool::new(false),
            running: OnceLock::new(),
        }
    }
}

impl VmExec {
    fn io_context(&self) -> IoContext {
        IoContext::of(&self.pod.spec, &self.pod.context, &self.container, Some(&self.id))
    }

    fn document(&self) -> MutexGuard<'_, Value> {
        self.document.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Process for VmExec {
    fn pid(&self) -> Option<u32> {
        self.running.get().map(|running| running.shown_pid())
    }

    fn node_pid(&self) -> Option<u32> {
        self.running.get().and_then(|running| running.vmm)
    }

    async fn start(&self) -> Result<u32> {
        let guest = self.pod.guest()?;
        let context = self.io_context();
        let ProcessRequest { container, exec, .. } = self.request.clone();
        let request = ExecRequest {
            container,
            exec,
            process: self.document().to_string().into_bytes(),
            streams: Some(relay::streams(&self.stdio)).into(),
            ..ExecRequest::default()
        };
        self.attempted.store(true, Ordering::Relaxed);
        let started =
            guest.agent().call("exec", Some(SLOW), |client, context| async move { client.exec(context, &request).await });
        let (pid, relay) = if self.recovered {
            let pid = guest.unless_ended(started).await?.pid;
            (pid, Relay::adopt(&self.stdio, &context, Some(guest.agent()), &self.request).await)
        } else {
            let io = ProcessIo::open(&self.stdio, &context).await?;
            let (started, connections) = guest.unless_ended(relay::make(guest.agent(), &self.stdio, started)).await?;
            failpoint::reach(Failpoint::ExecStarted);
            (started.pid, connections.and_then(|connections| Relay::open(io, connections, &context, &self.request)))
        };
        let relay = match relay {
            Ok(relay) => relay,
            Err(error) => {
                calls::delete(&self.pod, &self.request).await?;
                return Err(error);
            }
        };
        // Once: by the one start, or by the recovery.
        let running = || Running::begin(self.pod.clone(), Some(guest), self.request.clone(), pid, relay);
        let shown = self.running.get_or_init(running).shown_pid();
        *self.document() = Value::Null;
        Ok(shown)
    }

    async fn started(&self) -> Result<Option<u32>> {
        Ok(self.pid())
    }

    async fn kill(&self, signal: i32, all: bool) -> Result<()> {
        match self.running.get() {
            Some(running) => running.kill(signal, all).await,
            None => Err(Error::Finished { id: self.id.to_string() }),
        }
    }

    async fn exited(&self) -> Exit {
        match self.running.get() {
            Some(running) => running.ending.wait().await,
            // Nobody asks before it was started.
            None => std::future::pending().await,
        }
    }

    async fn delete(&self) -> Result<()> {
        match self.running.get() {
            Some(running) => running.delete().await,
            None if self.recovered || self.attempted.load(Ordering::Relaxed) => calls::delete(&self.pod, &self.request).await,
            None => Ok(()),
        }
    }

    async fn resize(&self, size: WindowSize) -> Result<()> {
        match self.running.get() {
            Some(running) => running.resize(size).await,
            // The client sends the first size when it likes, also before the start; the next one will do.
            None => Ok(()),
        }
    }

    async fn close_stdin(&self) -> Result<()> {
        match self.running.get() {
            Some(running) => running.close_stdin().await,
            None => Ok(()),
        }
    }

    fn record(&self) -> Value {
        json!(match self.running.get() {
            Some(running) => ExecRecord::Started { pid: running.pid },
            None => ExecRecord::Added { document: self.document().clone() },
        })
    }
}
