//! A sandboxer without sandboxes, for tests: its processes are entries in a table.
//!
//! It is a full implementation of the contract, so what is built on the contract can be tested without root, and the
//! conformance suite is itself checked. What a process does is said by the first word of its `args`: see [`Behaviour`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Semaphore, watch},
};

use crate::{
    cgroup::Stats,
    contract::{Container, Known, Leftover, Process, Sandbox, SandboxContext, Sandboxer},
    error::{Error, Result},
    id::{ExecId, Namespace, SandboxId},
    reaper::Reaper,
    stages,
    stdio::Stdio,
    types::{
        Capabilities, ContainerHead, ContainerSpec, ExecSpec, Exit, PodMetadata, PodNamespaces, PodResources, ProcessInfo,
        RuntimeOptions, SandboxSpec, WindowSize,
    },
};

/// The reaper of all tests of this process: two would take each other's children. It runs on threads of its own, since each test's runtime
/// ends with it.
///
/// # Panics
/// When it cannot be installed.
#[must_use]
#[allow(clippy::expect_used)]
pub fn reaper() -> Reaper {
    static REAPER: OnceLock<(Reaper, Runtime)> = OnceLock::new();
    let install = || {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let reaper = runtime.block_on(async { Reaper::install() }).expect("a reaper");
        (reaper, runtime)
    };
    // A test's own thread, which is in a runtime already, must not wait for another.
    REAPER.get_or_init(|| thread::spawn(install).join().expect("the reaper is installed")).0.clone()
}

/// What a process does once it is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Behaviour {
    /// Ends at once with this code.
    Exit(u32),
    /// Runs until it is killed.
    Run,
    /// Cannot be started.
    FailToStart,
}

impl Behaviour {
    /// The `process` object that makes the fake behave so.
    #[must_use]
    pub fn process(self) -> Value {
        match self {
            Self::Exit(code) => json!({"args": ["exit", code.to_string()]}),
            Self::Run => json!({"args": ["run"]}),
            Self::FailToStart => json!({"args": ["fail"]}),
        }
    }

    fn parse(process: &Value) -> Result<Self> {
        let arg = |index: usize| process["args"][index].as_str();
        match (arg(0), arg(1).map(str::parse)) {
            (Some("exit"), Some(Ok(code))) => Ok(Self::Exit(code)),
            (Some("run"), _) => Ok(Self::Run),
            (Some("fail"), _) => Ok(Self::FailToStart),
            _ => Err(Error::invalid("process args", format!("the fake sandboxer knows no {}", process["args"]))),
        }
    }
}

/// A minimal sandbox spec for tests, of the sandboxer `fake`.
///
/// # Panics
/// When `id` is not a valid id.
#[must_use]
#[allow(clippy::expect_used)]
pub fn spec(id: &str) -> SandboxSpec {
    SandboxSpec {
        namespace: "test".parse().expect("a valid namespace"),
        id: id.parse().expect("a valid id"),
        sandboxer: "fake".into(),
        pod: PodMetadata::default(),
        hostname: id.into(),
        netns: None,
        namespaces: PodNamespaces::default(),
        dns: None,
        sysctls: BTreeMap::new(),
        cgroup_parent: String::new(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        log_directory: String::new(),
        resources: PodResources::default(),
        options: RuntimeOptions::default(),
    }
}

/// What the fake has in place of a kernel: it outlives daemons, and tells what has not been released.
#[derive(Clone, Debug, Default)]
pub struct World(Arc<Mutex<State>>);

/// What happens at an operation instead of its success.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It fails.
    Fail,
    /// It can never succeed.
    Refuse,
    /// The backend panics.
    Panic,
    /// It waits for a permit, and then goes on.
    Wait(Arc<Semaphore>),
}

#[derive(Debug, Default)]
struct State {
    next_pid: u32,
    /// What is to happen at operations, and how many times.
    faults: BTreeMap<String, (usize, Fault)>,
    /// Operations that have begun.
    begun: watch::Sender<Vec<String>>,
    /// What is done now with which process.
    at_work: BTreeMap<String, &'static str>,
    /// Operations that came while another of the same process ran.
    overlaps: Vec<String>,
    /// What stands for sandboxes.
    sandboxes: BTreeMap<String, u32>,
    processes: BTreeMap<u32, watch::Sender<Option<Exit>>>,
    /// First processes of containers, by container.
    made: BTreeMap<String, u32>,
    /// Processes that have been let run, by what they belong to.
    started: BTreeMap<String, u32>,
    /// With the sandbox that has it.
    resources: BTreeMap<String, (Namespace, SandboxId)>,
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Names of what is held now, and of what runs.
    #[must_use]
    pub fn held(&self) -> Vec<String> {
        let state = self.state();
        let running =
            state.processes.iter().filter(|(_, exit)| exit.borrow().is_none()).map(|(pid, _)| format!("process {pid}"));
        state.resources.keys().cloned().chain(running).collect()
    }

    /// Ends a process, as if by a signal from elsewhere.
    pub fn kill(&self, pid: u32) {
        self.end(pid, 137);
    }

    /// Lets something happen the next `times` that an operation is begun: `recover sandbox pod`, `stop sandbox pod`, `start container main`,
    /// `update container main`, `delete exec e of container main` …
    pub fn fault(&self, operation: &str, times: usize, fault: Fault) {
        self.state().faults.insert(operation.to_owned(), (times, fault));
    }

    /// How often an operation has begun.
    #[must_use]
    pub fn begun(&self, operation: &str) -> usize {
        self.state().begun.borrow().iter().filter(|begun| *begun == operation).count()
    }

    /// Waits until an operation has begun.
    pub async fn begins(&self, operation: &str) {
        let mut begun = self.state().begun.subscribe();
        // The world outlives who waits for it.
        let _ = begun.wait_for(|begun| begun.iter().any(|begun| begun == operation)).await;
    }

    /// Operations that came while another of the same process was under way; signals may, unless it is being deleted.
    #[must_use]
    pub fn overlaps(&self) -> Vec<String> {
        self.state().overlaps.clone()
    }

    /// Begins an operation.
    async fn begin(&self, verb: &'static str, resource: &str) -> Result<AtWork> {
        let operation = format!("{verb} {resource}");
        let fault = {
            let mut state = self.state();
            state.begun.send_modify(|begun| begun.push(operation.clone()));
            let meanwhile = state.at_work.get(resource).copied();
            if let Some(meanwhile) = meanwhile.filter(|meanwhile| verb != "kill" || *meanwhile == "delete") {
                state.overlaps.push(format!("{operation} while there was {meanwhile}"));
            }
            if verb != "kill" {
                state.at_work.insert(resource.to_owned(), verb);
            }
            state.faults.get_mut(&operation).filter(|(times, _)| *times > 0).map(|(times, fault)| {
                *times -= 1;
                fault.clone()
            })
        };
        let at_work = AtWork { world: self.clone(), resource: (verb != "kill").then(|| resource.to_owned()) };
        match fault {
            None => {}
            Some(Fault::Fail) => return Err(Error::failed(operation)("it was told to fail")),
            Some(Fault::Refuse) => return Err(Error::invalid(operation, "it was told to be refused")),
            #[allow(clippy::panic, reason = "that is what it is for")]
            Some(Fault::Panic) => panic!("{operation} was told to panic"),
            Some(Fault::Wait(gate)) => {
                gate.acquire().await.map_err(Error::failed(operation))?.forget();
            }
        }
        Ok(at_work)
    }

    fn hold(&self, resource: String, sandbox: (Namespace, SandboxId)) {
        self.state().resources.insert(resource, sandbox);
    }

    fn release(&self, resource: &str) {
        let mut state = self.state();
        state.resources.remove(resource);
        state.made.remove(resource);
        state.started.remove(resource);
    }

    fn spawn(&self) -> u32 {
        let mut state = self.state();
        state.next_pid += 1;
        let pid = state.next_pid + 1000;
        state.processes.insert(pid, watch::channel(None).0);
        pid
    }

    fn started(&self, resource: &str) -> Option<u32> {
        self.state().started.get(resource).copied()
    }

    fn end(&self, pid: u32, status: u32) {
        if let Some(exit) = self.state().processes.get(&pid) {
            exit.send_if_modified(|exit| {
                let alive = exit.is_none();
                exit.get_or_insert_with(|| Exit::now(status));
                alive
            });
        }
    }

    async fn exited(&self, pid: u32) -> Exit {
        let exit = self.state().processes.get(&pid).map(watch::Sender::subscribe);
        match exit {
            Some(mut exit) => match exit.wait_for(Option::is_some).await {
                Ok(exit) => exit.unwrap_or_else(|| Exit::now(255)),
                Err(_) => Exit::now(255),
            },
            None => std::future::pending().await,
        }
    }
}

/// An operation under way.
struct AtWork {
    world: World,
    resource: Option<String>,
}

impl Drop for AtWork {
    fn drop(&mut self) {
        if let Some(resource) = &self.resource {
            self.world.state().at_work.remove(resource);
        }
    }
}

/// Every process of a sandbox.
type Pids = Arc<Mutex<Vec<u32>>>;

fn lock(pids: &Pids) -> MutexGuard<'_, Vec<u32>> {
    pids.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The fake sandboxer. Clones are the same daemon's.
#[derive(Clone, Debug, Default)]
pub struct FakeSandboxer {
    /// Its kernel.
    pub world: World,
    /// Containers that have been made or recovered.
    known: Arc<Mutex<BTreeSet<String>>>,
}

#[derive(Debug)]
struct FakeSandbox {
    namespace: Namespace,
    id: SandboxId,
    world: World,
    /// Stands for the sandbox itself.
    pid: u32,
    pids: Pids,
    known: Arc<Mutex<BTreeSet<String>>>,
}

impl FakeSandbox {
    fn know(&self, container: &str) -> String {
        let name = format!("container {container}");
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        name
    }
}

#[async_trait]
impl Sandboxer for FakeSandboxer {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            technique: "fake".into(),
            exec: Ok(()),
            pause: Ok(()),
            update: Ok(()),
            terminal: Err("a fake process has no terminal; use stdio".into()),
            features: None,
        }
    }

    async fn create(&self, spec: Arc<SandboxSpec>, _context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        stages::enter("make the fake sandbox");
        if spec.annotations.contains_key("fake/refuse") {
            return Err(Error::invalid("annotation fake/refuse", "it asks for a refusal"));
        }
        let (name, pid) = (format!("sandbox {}", spec.id), self.world.spawn());
        self.world.hold(name.clone(), (spec.namespace.clone(), spec.id.clone()));
        self.world.state().sandboxes.insert(name, pid);
        Ok(Arc::new(self.sandbox(&spec, pid, Vec::new())))
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, _context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        self.world.begin("recover", &format!("sandbox {}", spec.id)).await?;
        let (pid, pids) = serde_json::from_value(record).map_err(Error::failed("read the fake sandbox's record"))?;
        Ok(Arc::new(self.sandbox(&spec, pid, pids)))
    }

    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>> {
        let unknown = |name: &str, sandbox: &(Namespace, SandboxId)| match known.get(sandbox) {
            None => true,
            Some(None) => false,
            Some(Some(containers)) => {
                name.strip_prefix("container ").is_some_and(|name| !containers.iter().any(|id| id.as_str() == name))
            }
        };
        let resources: Vec<_> = self.world.state().resources.clone().into_iter().collect();
        let left = resources.into_iter().filter(|(name, sandbox)| unknown(name, sandbox));
        Ok(left.map(|(name, sandbox)| self.leftover(name, sandbox)).collect())
    }

    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        let state = self.world.state();
        let theirs = state.resources.iter().filter(|(_, (of, sandbox))| of == namespace && sandbox == id);
        let pids = theirs.filter_map(|(name, _)| state.made.get(name).copied());
        Ok(pids.filter(|pid| state.processes.get(pid).is_some_and(|exit| exit.borrow().is_none())).collect())
    }
}

impl FakeSandboxer {
    /// A daemon's sandboxer in a world that there is already.
    #[must_use]
    pub fn new(world: World) -> Self {
        Self { world, known: Arc::default() }
    }

    fn leftover(&self, name: String, sandbox: (Namespace, SandboxId)) -> Leftover {
        let (world, known, what) = (self.world.clone(), self.known.clone(), name.clone());
        let removal = async move {
            // Made again by a repeated request.
            if !known.lock().unwrap_or_else(PoisonError::into_inner).contains(&name) {
                let process = {
                    let mut state = world.state();
                    state.made.get(&name).copied().or_else(|| state.sandboxes.remove(&name))
                };
                process.into_iter().for_each(|pid| world.end(pid, 137));
                world.release(&name);
            }
            Ok(())
        };
        Leftover { sandbox, what, removal: Box::pin(removal) }
    }

    fn sandbox(&self, spec: &SandboxSpec, pid: u32, pids: Vec<u32>) -> FakeSandbox {
        FakeSandbox {
            namespace: spec.namespace.clone(),
            id: spec.id.clone(),
            world: self.world.clone(),
            pid,
            pids: Arc::new(Mutex::new(pids)),
            known: self.known.clone(),
        }
    }
}

#[async_trait]
impl Sandbox for FakeSandbox {
    async fn start(&self) -> Result<Option<u32>> {
        Ok(Some(self.pid))
    }

    async fn stop(&self, _grace: Duration) -> Result<()> {
        let _at_work = self.world.begin("stop", &format!("sandbox {}", self.id)).await?;
        let pids = lock(&self.pids).clone();
        for pid in pids {
            self.world.end(pid, 137);
        }
        self.world.end(self.pid, 0);
        Ok(())
    }

    async fn delete(&self) -> Result<()> {
        self.stop(Duration::ZERO).await?;
        self.world.state().sandboxes.remove(&format!("sandbox {}", self.id));
        self.world.release(&format!("sandbox {}", self.id));
        Ok(())
    }

    async fn exited(&self) -> Exit {
        self.world.exited(self.pid).await
    }

    async fn create_container(&self, spec: ContainerSpec) -> Result<Arc<dyn Container>> {
        let behaviour = Behaviour::parse(&spec.spec.as_value()["process"])?;
        let name = self.know(spec.id.as_str());
        self.world.hold(name.clone(), (self.namespace.clone(), self.id.clone()));
        // Half made by an earlier daemon.
        let earlier = self.world.state().made.get(&name).copied();
        earlier.into_iter().for_each(|pid| self.world.end(pid, 137));
        let pid = self.world.spawn();
        self.world.state().made.insert(name.clone(), pid);
        lock(&self.pids).push(pid);
        Ok(Arc::new(FakeProcess::new(self, name, behaviour, Some(pid))))
    }

    async fn recover_container(&self, head: ContainerHead, record: Value) -> Result<Arc<dyn Container>> {
        self.world.begin("recover", &format!("container {}", head.id)).await?;
        let (behaviour, pid) = serde_json::from_value(record).map_err(Error::failed("read the fake container's record"))?;
        Ok(Arc::new(FakeProcess::new(self, self.know(head.id.as_str()), behaviour, pid)))
    }

    async fn update(&self, _resources: &PodResources) -> Result<()> {
        Ok(())
    }

    async fn metrics(&self) -> Result<Option<Stats>> {
        Ok(None)
    }

    fn record(&self) -> Value {
        json!((self.pid, &*lock(&self.pids)))
    }

    fn describe(&self) -> Value {
        json!({"pid": self.pid})
    }
}

#[derive(Debug)]
struct FakeProcess {
    world: World,
    sandbox: (Namespace, SandboxId),
    resource: String,
    behaviour: Behaviour,
    pid: Mutex<Option<u32>>,
    pids: Pids,
}

impl FakeProcess {
    fn new(sandbox: &FakeSandbox, resource: String, behaviour: Behaviour, pid: Option<u32>) -> Self {
        let (world, pids) = (sandbox.world.clone(), sandbox.pids.clone());
        let sandbox = (sandbox.namespace.clone(), sandbox.id.clone());
        Self { world, sandbox, pids, resource, behaviour, pid: Mutex::new(pid) }
    }

    fn exec(&self, id: &ExecId, behaviour: Behaviour, pid: Option<u32>) -> Arc<dyn Process> {
        let resource = format!("exec {id} of {}", self.resource);
        let (world, sandbox) = (self.world.clone(), self.sandbox.clone());
        world.hold(resource.clone(), sandbox.clone());
        // It may have been started by a daemon that could not record that any more.
        let pid = pid.or_else(|| self.world.started(&resource));
        Arc::new(Self { world, sandbox, pids: self.pids.clone(), resource, behaviour, pid: Mutex::new(pid) })
    }

    fn live_pid(&self) -> Result<u32> {
        self.pid().ok_or_else(|| Error::NotFound { kind: "process", id: self.resource.clone() })
    }
}

#[async_trait]
impl Process for FakeProcess {
    fn pid(&self) -> Option<u32> {
        *self.pid.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn start(&self) -> Result<u32> {
        stages::enter("start the fake process");
        let _at_work = self.world.begin("start", &self.resource).await?;
        if self.behaviour == Behaviour::FailToStart {
            stages::keep_log("fake", "exec: \"fail\": executable file not found");
            return Err(Error::Backend {
                program: "fake".into(),
                operation: "start the process".into(),
                message: "exec: \"fail\": executable file not found".into(),
            });
        }
        let mut pid = self.pid.lock().unwrap_or_else(PoisonError::into_inner);
        let pid = *pid.get_or_insert_with(|| {
            let pid = self.world.spawn();
            lock(&self.pids).push(pid);
            pid
        });
        self.world.state().started.insert(self.resource.clone(), pid);
        if let Behaviour::Exit(code) = self.behaviour {
            self.world.end(pid, code);
        }
        Ok(pid)
    }

    async fn started(&self) -> Result<Option<u32>> {
        Ok(self.world.started(&self.resource))
    }

    async fn kill(&self, signal: i32, _all: bool) -> Result<()> {
        let _at_work = self.world.begin("kill", &self.resource).await?;
        self.world.end(self.live_pid()?, 128 + signal.unsigned_abs());
        Ok(())
    }

    async fn exited(&self) -> Exit {
        match self.pid() {
            Some(pid) => self.world.exited(pid).await,
            None => std::future::pending().await,
        }
    }

    async fn delete(&self) -> Result<()> {
        let _at_work = self.world.begin("delete", &self.resource).await?;
        if let Some(pid) = self.pid() {
            self.world.end(pid, 137);
        }
        self.world.release(&self.resource);
        Ok(())
    }

    async fn resize(&self, _size: WindowSize) -> Result<()> {
        Err(Error::Unsupported { operation: "resizing", why: "a fake process has no terminal".into() })
    }

    async fn close_stdin(&self) -> Result<()> {
        Ok(())
    }

    fn record(&self) -> Value {
        json!((self.behaviour, self.pid()))
    }
}

#[async_trait]
impl Container for FakeProcess {
    async fn exec(&self, spec: ExecSpec) -> Result<Arc<dyn Process>> {
        Ok(FakeProcess::exec(self, &spec.id, Behaviour::parse(&spec.process)?, None))
    }

    async fn recover_exec(&self, id: ExecId, _stdio: Stdio, record: Value) -> Result<Arc<dyn Process>> {
        self.world.begin("recover", &format!("exec {id} of {}", self.resource)).await?;
        let (behaviour, pid) = serde_json::from_value(record).map_err(Error::failed("read the fake exec's record"))?;
        Ok(FakeProcess::exec(self, &id, behaviour, pid))
    }

    async fn pids(&self) -> Result<Vec<ProcessInfo>> {
        Ok(vec![ProcessInfo { pid: self.live_pid()?, exec: None }])
    }

    async fn stats(&self) -> Result<Stats> {
        Ok(Stats::V2(Box::default()))
    }

    async fn update(&self, _resources: Value) -> Result<()> {
        self.world.begin("update", &self.resource).await.map(drop)
    }

    async fn pause(&self) -> Result<()> {
        self.world.begin("pause", &self.resource).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        Ok(())
    }
}
