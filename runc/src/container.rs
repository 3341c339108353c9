//! One container.

use std::{
    collections::HashMap,
    fs,
    io::ErrorKind,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::future::join_all;
use kuasar_sandboxers::{
    Container, Error, Process, Result,
    cgroup::{Cgroup, OomWatch, Stats, expect_move},
    event::Notice,
    failpoint::{self, Failpoint},
    id::{ContainerId, ExecId},
    mount,
    offload::Offload,
    process::{Ending, Exiting, Identity, Tracked},
    reaper::ExitFuture,
    spec::OciSpec,
    stages,
    stdio::{IoContext, Stdio},
    types::{ContainerHead, ContainerSpec, ExecSpec, Exit, ProcessInfo, WindowSize},
    undo::Undo,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::{Instrument, debug, error, warn};

use crate::{
    exec::{Executed, RuncExec},
    io::{Io, Prepared},
    rewrite::{self, Rewriting},
    runtime::{Create, Driver},
    sandbox::{DEATH, Pod, until_ended},
};

/// How long the OCI runtime may take to delete what has ended, before it is forced to.
const DELETE: Duration = Duration::from_secs(15);
/// How long the exit of a container waits until the notice of its out-of-memory kill is saved.
const REPORTED: Duration = Duration::from_secs(1);

/// A container and all that belongs to it.
#[derive(Debug)]
pub(crate) struct Contained {
    pub(crate) pod: Arc<Pod>,
    pub(crate) head: ContainerHead,
    pub(crate) driver: Driver,
    identity: Identity,
    /// `None` when it ended while no daemon ran.
    process: Option<Tracked>,
    /// `None` when the runtime has put it into no group of its own.
    cgroup: Option<Cgroup>,
    /// The kernel ends all of it with its first process.
    own_pids: bool,
    /// Its root filesystem is ours to unmount.
    mounted: bool,
    paused: AtomicBool,
    /// Out-of-memory kills that were seen.
    oom_kills: AtomicU64,
    io: Io,
    ending: Ending,
    execs: Mutex<HashMap<ExecId, Weak<Executed>>>,
}

/// What is saved of a container.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    process: Identity,
    cgroup: Option<Cgroup>,
    own_pids: bool,
    mounted: bool,
    systemd: bool,
    paused: bool,
}

/// What a creation has found out when the runtime is done.
struct Born {
    process: Tracked,
    exit: ExitFuture,
    io: Io,
}

/// The contract's face of a [`Contained`].
#[derive(Debug)]
pub(crate) struct RuncContainer(Arc<Contained>);

pub(crate) fn io_context(pod: &Pod, id: &ContainerId, exec: Option<&ExecId>) -> IoContext {
    IoContext::of(&pod.spec, &pod.context, id, exec)
}

/// Reads a pid file.
pub(crate) fn read_pid(file: &Path) -> Result<u32> {
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    text.trim().parse().map_err(Error::failed(format!("read the pid in {}", file.display())))
}

/// Removes a file, if it is there.
pub(crate) fn remove_file(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", file)(error)),
        _ => Ok(()),
    }
}

impl RuncContainer {
    pub(crate) async fn create(pod: Arc<Pod>, spec: ContainerSpec) -> Result<Self> {
        let mut undo = Undo::new("create the container");
        let created = create(pod, spec, &mut undo).await;
        undo.settle(created).await.map(Self)
    }

    pub(crate) async fn recover(pod: Arc<Pod>, head: ContainerHead, record: Value) -> Result<Self> {
        let record: Record = serde_json::from_value(record).map_err(Error::failed("read the container's record"))?;
        // What may fail comes first: what is taken over with the stdio can be taken only once.
        let process = Tracked::find(record.process)?;
        let io = Io::adopt(&head.stdio, &io_context(&pod, &head.id, None)).await?;
        let contained = Arc::new(Contained {
            driver: pod.driver.with_systemd(record.systemd),
            identity: record.process,
            process,
            cgroup: record.cgroup,
            own_pids: record.own_pids,
            mounted: record.mounted,
            paused: AtomicBool::new(record.paused),
            oom_kills: AtomicU64::new(0),
            io,
            ending: Ending::pending(),
            execs: Mutex::default(),
            head,
            pod,
        });
        let exiting = Exiting::adopted(contained.identity, contained.process.as_ref(), &contained.pod.context.reaper);
        contained.clone().begin(exiting);
        Ok(Self(contained))
    }
}

async fn create(pod: Arc<Pod>, spec: ContainerSpec, undo: &mut Undo) -> Result<Arc<Contained>> {
    let ContainerSpec { id, bundle, spec: mut oci, rootfs, stdio } = spec;
    expect_move();
    stages::enter("wait for the container's name");
    let _claim = pod.claim(id.as_str()).await;
    stages::enter("rewrite the specification");
    let systemd = pod.spec.options.systemd_cgroup || rewrite::wants_systemd(&oci);
    let driver = pod.driver.with_systemd(systemd);
    let target = bundle.join("rootfs");
    let mounted = !rootfs.is_empty();
    let namespaces = pod.namespaces()?;
    Rewriting {
        namespaces: &namespaces,
        files: &pod.files,
        rootfs: mounted.then_some(target.as_path()),
        only_spec_1_0: driver.runtime().only_spec_1_0(),
        refuses_newer_calls: driver.runtime().is_crun(),
        in_pod: &|pid| pod.is_first_process(pid),
    }
    .apply(&mut oci, &bundle)?;

    if driver.knows(id.as_str()) {
        // An earlier daemon was cut off in the middle of this.
        stages::enter("remove what is left of an earlier attempt");
        driver.delete(id.as_str(), true).await?;
        mount::unmount_all(&target).await?;
    }
    if mounted {
        stages::enter("mount the rootfs");
        fs::create_dir_all(&target).map_err(Error::io("create", &target))?;
        let taken_back = target.clone();
        // Before: what a helper that was too slow has mounted goes, too.
        undo.push(format!("unmount {}", target.display()), async move { mount::unmount_all(&taken_back).await });
        mount::mount_rootfs(&Offload::new(pod.spec.id.to_string(), &pod.context.reaper), &rootfs, &target).await?;
        failpoint::reach(Failpoint::Mounted);
    }
    if let Some(group) = unmade_group(&oci) {
        // crun, for one, leaves it behind when it cannot set a limit.
        undo.push(format!("remove control group {}", group.path().display()), async move {
            group.kill().await?;
            group.remove().await
        });
    }
    stages::enter("write the bundle");
    let config = bundle.join("config.json");
    fs::write(&config, oci.as_value().to_string()).map_err(Error::io("write", &config))?;
    let own_pids = rewrite::has_own_pids(&oci);
    // As without a daemon that is spared.
    let oom_score = oci.as_value()["process"]["oomScoreAdj"].is_null().then_some(0);
    // A document takes some hundred kilobytes, and the runtime most of the time that this takes.
    drop(oci);
    let created = create_process(&pod, &driver, &id, &bundle, &stdio, oom_score, undo).await?;
    let cgroup = match Cgroup::of_process(created.process.identity().pid) {
        Ok(cgroup) => Some(cgroup),
        Err(error) => {
            warn!(container = %id, error = error.report(), "the container has no control group: no statistics, no out-of-memory events");
            None
        }
    };
    let contained = Arc::new(Contained {
        driver,
        identity: created.process.identity(),
        process: Some(created.process),
        cgroup,
        own_pids,
        mounted,
        paused: AtomicBool::new(false),
        oom_kills: AtomicU64::new(0),
        io: created.io,
        ending: Ending::pending(),
        execs: Mutex::default(),
        head: ContainerHead { id, bundle, stdio },
        pod,
    });
    contained.clone().begin(Exiting::Ours(created.exit));
    Ok(contained)
}

/// The control group that the runtime is about to make for the container: `None` where the path is a systemd unit's, which ends by
/// itself, or is in use already.
fn unmade_group(oci: &OciSpec) -> Option<Cgroup> {
    Cgroup::at(Path::new(oci.cgroups_path()?)).ok().filter(|group| !group.exists())
}

/// Lets the runtime make the container, and takes hold of its first process.
async fn create_process(
    pod: &Arc<Pod>,
    driver: &Driver,
    id: &ContainerId,
    bundle: &Path,
    stdio: &Stdio,
    oom_score: Option<i64>,
    undo: &mut Undo,
) -> Result<Born> {
    stages::enter("open its input and output");
    let context = io_context(pod, id, None);
    let io = Prepared::open(stdio, &context, &pod.dir).await?;
    let pid_file = pod.dir.join(format!("{id}.pid"));
    let options = &pod.spec.options;
    let create = Create {
        id: id.as_str(),
        bundle,
        pid_file: &pid_file,
        console: io.console(),
        no_pivot: options.no_pivot_root,
        no_new_keyring: options.no_new_keyring,
        oom_score,
    };
    let (taken_back, named) = (driver.clone(), id.clone());
    undo.push("remove what the OCI runtime made", async move {
        if taken_back.knows(named.as_str()) { taken_back.delete(named.as_str(), true).await } else { Ok(()) }
    });
    stages::enter(format!("create the container with {}", driver.runtime()));
    let mark = pod.context.reaper.mark();
    until_ended(pod.ended(), driver.create(create, io.child_fds()?)).await?;
    stages::enter("take hold of its first process");
    let pid = read_pid(&pid_file)?;
    remove_file(&pid_file)?;
    let exit = pod.context.reaper.exit_of(pid, mark);
    let process = Tracked::open(pid)?.ok_or_else(|| Error::Backend {
        program: driver.runtime().to_string(),
        operation: "create the container".into(),
        message: format!("its first process, {pid}, ended at once"),
    })?;
    Ok(Born { process, exit, io: io.connect(stdio, &context).await? })
}

impl Contained {
    /// Makes it known to its pod, and watches for its end.
    fn begin(self: Arc<Self>, exiting: Exiting) {
        self.pod.add(&self);
        // Also of one that has ended while no daemon ran: its group is there until it is deleted, and knows how.
        let oom = self.cgroup.as_ref().and_then(|cgroup| {
            cgroup.oom_watch().inspect_err(|error| debug!(error = error.report(), "no out-of-memory events")).ok()
        });
        tokio::spawn(self.watch(exiting, oom).in_current_span());
    }

    async fn watch(self: Arc<Self>, exiting: Exiting, oom: Option<OomWatch>) {
        let exit = exiting.of(self.process.as_ref());
        let exit = match oom {
            None => exit.await,
            Some(mut oom) => {
                tokio::pin!(exit);
                let (mut watching, mut reported) = (true, None);
                let exit = loop {
                    tokio::select! {
                        exit = &mut exit => break exit,
                        kills = oom.next(), if watching => match kills {
                            Some(kills) => reported = Some(self.out_of_memory(kills)),
                            None => watching = false,
                        },
                    }
                };
                if let Some(kills) = oom.counted() {
                    reported = Some(self.out_of_memory(kills));
                }
                // Who sees the exit must know.
                if let Some(reported) = reported
                    && timeout(REPORTED, reported).await.is_err()
                {
                    warn!(container = %self.head.id, "an out-of-memory kill is reported after the exit: the state is not saved");
                }
                exit
            }
        };
        if !self.own_pids
            && let Err(error) = self.kill_all().await
        {
            error!(container = %self.head.id, error = error.report(), "processes of an ended container still run");
        }
        let execs: Vec<_> = self.execs().values().filter_map(Weak::upgrade).collect();
        if timeout(DEATH, join_all(execs.iter().map(|exec| exec.ended()))).await.is_err() {
            error!(container = %self.head.id, "processes added to an ended container still run");
        }
        self.io.finish().await;
        self.ending.tell(exit);
    }

    fn out_of_memory(&self, kills: u64) -> impl Future<Output = ()> + use<> {
        self.oom_kills.store(kills, Ordering::Relaxed);
        self.pod.context.notices.report(&self.head.id, Notice::OutOfMemory { kills: Some(kills) })
    }

    pub(crate) fn execs(&self) -> MutexGuard<'_, HashMap<ExecId, Weak<Executed>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pid of its first process, while that lives.
    pub(crate) fn live_pid(&self) -> Option<u32> {
        (self.process.is_some() && self.ending.known().is_none()).then_some(self.identity.pid)
    }

    /// Runs work of the OCI runtime on it, until a moment after its end.
    pub(crate) async fn unless_ended<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let ended = async {
            if let Some(process) = &self.process
                && process.ended().await.is_err()
            {
                // Then its end is not known either.
                std::future::pending().await
            }
        };
        until_ended(ended, work).await
    }

    /// Kills every process and waits until none is left.
    async fn kill_all(&self) -> Result<()> {
        match &self.cgroup {
            Some(cgroup) => cgroup.kill().await,
            None => self.signal(libc::SIGKILL).map(drop),
        }
    }

    /// Sends a signal to the first process; false when it has ended.
    fn signal(&self, signal: i32) -> Result<bool> {
        self.process.as_ref().map_or(Ok(false), |process| process.signal(signal))
    }

    /// Sends a signal to every process of the container, and to none that has its pid later.
    fn signal_all(&self, signal: i32) -> Result<bool> {
        let Some(cgroup) = &self.cgroup else { return self.signal(signal) };
        let mut held = Vec::new();
        for pid in cgroup.processes()? {
            held.extend(Tracked::open(pid)?);
        }
        // Whoever is still listed after it is held, is held as what was listed.
        let still = cgroup.processes()?;
        let mut reached = false;
        for process in held.iter().filter(|process| still.contains(&process.identity().pid)) {
            reached |= process.signal(signal)?;
        }
        Ok(reached)
    }

    /// Asks it to end, and waits until it has.
    pub(crate) async fn terminate(&self) {
        if self.ending.known().is_some() {
            return;
        }
        match self.signal(libc::SIGTERM) {
            Ok(_) => drop(self.ending.wait().await),
            Err(error) => warn!(container = %self.head.id, error = error.report(), "cannot ask a container to end"),
        }
    }

    /// Makes it end.
    pub(crate) async fn end(&self) -> Result<()> {
        if self.ending.known().is_some() {
            return Ok(());
        }
        self.signal(libc::SIGKILL)?;
        self.kill_all().await?;
        match timeout(DEATH, self.ending.wait()).await {
            Ok(_) => Ok(()),
            Err(_) => {
                Err(Error::TimedOut { operation: format!("the end of container {}", self.head.id), seconds: DEATH.as_secs() })
            }
        }
    }

    /// Ends it and removes everything of it.
    pub(crate) async fn release(&self) -> Result<()> {
        self.end().await?;
        let id = self.head.id.as_str();
        let delete = async {
            let late = |_| Err(Error::TimedOut { operation: "its deletion".into(), seconds: DELETE.as_secs() });
            timeout(DELETE, self.driver.delete(id, false)).await.unwrap_or_else(late)
        };
        if self.driver.knows(id)
            && let Err(error) = delete.await
        {
            warn!(container = id, error = error.report(), "the runtime could not delete the container; forcing it");
            self.driver.delete(id, true).await?;
        }
        failpoint::reach(Failpoint::ContainerDeleted);
        if let Some(cgroup) = &self.cgroup {
            cgroup.remove().await?;
        }
        if self.mounted {
            mount::unmount_all(&self.head.bundle.join("rootfs")).await?;
        }
        remove_file(&self.pod.dir.join(format!("{id}.pid")))?;
        self.pod.forget(&self.head.id);
        Ok(())
    }

    fn finished(&self) -> Error {
        Error::Finished { id: self.head.id.to_string() }
    }
}

#[async_trait]
impl Process for RuncContainer {
    fn pid(&self) -> Option<u32> {
        Some(self.0.identity.pid)
    }

    async fn start(&self) -> Result<u32> {
        let driver = &self.0.driver;
        stages::enter(format!("start the container with {}", driver.runtime()));
        self.0.unless_ended(driver.start(self.0.head.id.as_str())).await?;
        Ok(self.0.identity.pid)
    }

    async fn started(&self) -> Result<Option<u32>> {
        let Contained { driver, head, identity, .. } = &*self.0;
        if self.0.live_pid().is_none() {
            // Its exit is about to be told, and says all.
            return Ok(None);
        }
        let state = driver.state(head.id.as_str()).await?;
        Ok(state.filter(|state| matches!(state.status.as_str(), "running" | "paused")).map(|_| identity.pid))
    }

    async fn kill(&self, signal: i32, all: bool) -> Result<()> {
        let contained = &self.0;
        let reached = if signal == libc::SIGKILL && (all || contained.paused.load(Ordering::Relaxed)) {
            // Thaws too: on cgroup v1 a frozen process does not even die. With its first process the rest of a container dies anyway.
            let live = contained.live_pid().is_some();
            contained.kill_all().await?;
            live
        } else if all {
            contained.signal_all(signal)?
        } else {
            contained.signal(signal)?
        };
        if reached { Ok(()) } else { Err(contained.finished()) }
    }

    async fn exited(&self) -> Exit {
        self.0.ending.wait().await
    }

    async fn delete(&self) -> Result<()> {
        self.0.release().await
    }

    async fn resize(&self, size: WindowSize) -> Result<()> {
        self.0.io.resize(size)
    }

    async fn close_stdin(&self) -> Result<()> {
        self.0.io.close_stdin();
        Ok(())
    }

    fn record(&self) -> Value {
        json!(Record {
            process: self.0.identity,
            cgroup: self.0.cgroup.clone(),
            own_pids: self.0.own_pids,
            mounted: self.0.mounted,
            systemd: self.0.driver.systemd(),
            paused: self.0.paused.load(Ordering::Relaxed),
        })
    }
}

#[async_trait]
impl Container for RuncContainer {
    async fn exec(&self, spec: ExecSpec) -> Result<Arc<dyn Process>> {
        Ok(Arc::new(RuncExec::prepare(self.0.clone(), spec)?))
    }

    async fn recover_exec(&self, id: ExecId, stdio: Stdio, record: Value) -> Result<Arc<dyn Process>> {
        Ok(Arc::new(RuncExec::recover(self.0.clone(), id, stdio, record).await?))
    }

    async fn pids(&self) -> Result<Vec<ProcessInfo>> {
        let mut execs: HashMap<u32, ExecId> = HashMap::new();
        for (id, exec) in self.0.execs().iter() {
            if let Some(pid) = exec.upgrade().and_then(|exec| exec.pid()) {
                execs.insert(pid, id.clone());
            }
        }
        let mut pids = match &self.0.cgroup {
            Some(cgroup) => cgroup.processes()?,
            None => Vec::new(),
        };
        if pids.is_empty() {
            pids.push(self.0.identity.pid);
        }
        Ok(pids.into_iter().map(|pid| ProcessInfo { pid, exec: execs.get(&pid).cloned() }).collect())
    }

    async fn stats(&self) -> Result<Stats> {
        let measured = match &self.0.cgroup {
            Some(cgroup) => cgroup.stats(),
            None => Err(Error::Unavailable {
                what: format!("resource use of container {}", self.0.head.id),
                why: "the OCI runtime has put it into no control group of its own; give it one in linux.cgroupsPath".into(),
            }),
        };
        match measured {
            // A systemd scope goes with its last process. How that ended is what containerd asks for then.
            Err(_) if self.0.ending.known().is_some() => Stats::of_ended(self.0.oom_kills.load(Ordering::Relaxed)),
            measured => measured,
        }
    }

    async fn update(&self, resources: Value) -> Result<()> {
        self.0.unless_ended(self.0.driver.update(self.0.head.id.as_str(), &resources)).await
    }

    async fn pause(&self) -> Result<()> {
        let Contained { driver, head, paused, .. } = &*self.0;
        let id = head.id.as_str();
        // From the beginning: a signal that comes meanwhile may find it frozen.
        paused.store(true, Ordering::Relaxed);
        let pause = async {
            let Err(error) = driver.pause(id).await else { return Ok(()) };
            // A daemon before this one may have done it, and have died before it could save that.
            driver.state(id).await?.filter(|state| state.status == "paused").map(drop).ok_or(error)
        };
        self.0.unless_ended(pause).await.inspect_err(|_| paused.store(false, Ordering::Relaxed))
    }

    async fn resume(&self) -> Result<()> {
        let Contained { driver, head, paused, .. } = &*self.0;
        let id = head.id.as_str();
        let resume = async {
            let Err(error) = driver.resume(id).await else { return Ok(()) };
            driver.state(id).await?.filter(|state| state.status == "running").map(drop).ok_or(error)
        };
        self.0.unless_ended(resume).await?;
        paused.store(false, Ordering::Relaxed);
        Ok(())
    }
}
