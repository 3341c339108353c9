//! A suite over the contract: what every sandboxer must do, whatever its technique. Backends run it from their own tests:
//!
//! ```ignore
//! for (name, result) in conformance::run(&fixture).await { … }
//! ```
//!
//! Cases go through [`Registry`], which is how a sandboxer is used. Each case gets a state directory and ids of its own and
//! must leave the fixture's [`Fixture::held`] as it was.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc::UnboundedReceiver, time::timeout};

use crate::{
    contract::Sandboxer,
    error::{Code, Error, Result},
    event::{EventKind, EventSink, Sent},
    fake::Behaviour,
    fdstore::MemoryHolder,
    handle::{ContainerHandle, SandboxHandle},
    id::{ContainerId, ExecId},
    lifecycle::{ProcessPhase, SandboxPhase},
    reaper::Reaper,
    registry::Registry,
    stdio::StreamHub,
    types::{ContainerSpec, ExecSpec, SandboxSpec},
};

/// What the suite needs to know of a technique.
pub trait Fixture: Sync {
    /// A sandboxer, as a daemon that has just started would make it. `root` outlives daemons.
    fn sandboxer(&self, root: &Path) -> Arc<dyn Sandboxer>;
    /// A sandbox that can be started.
    fn sandbox(&self, id: &str) -> SandboxSpec;
    /// A container of that behaviour; files it needs go below `dir`.
    fn container(&self, dir: &Path, id: ContainerId, behaviour: Behaviour) -> ContainerSpec;
    /// An exec of that behaviour.
    fn exec(&self, id: ExecId, behaviour: Behaviour) -> ExecSpec;
    /// Whatever of the host's resources sandboxes of this technique could leave behind.
    fn held(&self, root: &Path) -> Vec<String>;
    /// The daemon's reaper: one for the process.
    fn reaper(&self) -> Reaper;
}

/// The longest any one step may take.
const LIMIT: Duration = Duration::from_secs(30);

type Outcome = Result<(), String>;

/// A daemon's inside, for one case.
struct Daemon<'a> {
    fixture: &'a dyn Fixture,
    dir: &'a Path,
    registry: Registry,
    events: UnboundedReceiver<Sent>,
    holder: MemoryHolder,
    /// Where this daemon has its state.
    state: PathBuf,
}

macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(format!($($why)+));
        }
    };
}

mod deaths;

use deaths::{
    a_death_after_an_exec_has_ended, a_death_after_creating_a_container, a_death_after_deleting_a_container,
    a_death_after_starting_a_container, a_death_after_starting_an_exec, a_death_after_stopping_a_sandbox,
    a_death_before_an_answer,
};

/// Runs every case; returns each one's name and how it went.
pub async fn run(fixture: &dyn Fixture) -> Vec<(&'static str, Outcome)> {
    let mut results = Vec::new();
    macro_rules! cases {
        ($($case:ident),* $(,)?) => {$(
            results.push((stringify!($case), one(fixture, stringify!($case), async |daemon| $case(daemon).await).await));
        )*};
    }
    cases![
        a_pod_from_start_to_end,
        names_are_unique_and_unknown_ones_not_found,
        states_are_respected,
        signals_end_processes,
        stopping_ends_everything,
        stopping_deletes_what_was_never_started,
        deleting_a_live_sandbox_leaves_nothing,
        a_failed_start_can_be_deleted,
        a_failed_start_names_its_stage,
        many_containers_at_once,
        pause_and_resume,
        a_new_daemon_takes_over,
        a_death_after_creating_a_container,
        a_death_after_starting_a_container,
        a_death_after_starting_an_exec,
        a_death_after_an_exec_has_ended,
        a_death_after_deleting_a_container,
        a_death_before_an_answer,
        a_death_after_stopping_a_sandbox,
    ];
    results
}

async fn one(fixture: &dyn Fixture, name: &str, case: impl AsyncFnOnce(&mut Daemon<'_>) -> Outcome) -> Outcome {
    let dir = tempfile::Builder::new().prefix("kuasar-").tempdir().map_err(|error| error.to_string())?;
    let before = fixture.held(dir.path());
    let outcome = match Daemon::start(fixture, dir.path()) {
        Ok(mut daemon) => {
            daemon.recover().await?;
            let limit = 4 * LIMIT;
            let outcome = timeout(limit, case(&mut daemon)).await.unwrap_or_else(|_| Err(format!("it hung for {limit:?}")));
            // Whatever the case left behind on purpose or by failing.
            for sandbox in daemon.registry.list() {
                sandbox.delete().await.map_err(|error| error.report())?;
            }
            outcome
        }
        Err(error) => Err(error.report()),
    };
    outcome?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let after = fixture.held(dir.path());
        if after == before {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{name} left behind: {after:?}; there was {before:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl<'a> Daemon<'a> {
    fn start(fixture: &'a dyn Fixture, dir: &'a Path) -> Result<Self> {
        Self::with(fixture, dir, dir.join("state"), MemoryHolder::default())
    }

    fn with(fixture: &'a dyn Fixture, dir: &'a Path, state: PathBuf, holder: MemoryHolder) -> Result<Self> {
        let (sink, events) = EventSink::channel();
        let name = fixture.sandbox("name").sandboxer;
        let sandboxers = BTreeMap::from([(name, fixture.sandboxer(&dir.join("root")))]);
        let registry = Registry::new(&state, sandboxers, sink, StreamHub::default(), fixture.reaper(), holder.store())?;
        Ok(Self { fixture, dir, registry, events, holder, state })
    }

    async fn recover(&self) -> Outcome {
        let recovery = self.registry.recover().await.map_err(|error| error.report())?;
        recovery.finished().await.map_err(|error| error.report())
    }

    /// A copy of what is saved now.
    fn snapshot(&self) -> Result<PathBuf, String> {
        let copy = self.state.with_extension(format!("{}", self.state.extension().map_or(0, |number| number.len()) + 1));
        copy_dir(&self.state, &copy).map_err(|error| format!("cannot copy the state: {error}"))?;
        Ok(copy)
    }

    /// What a daemon finds when the one before it died after `snapshot` was saved, whatever that has done since.
    async fn successor(&self, snapshot: PathBuf) -> Result<Daemon<'a>, String> {
        let next = Self::with(self.fixture, self.dir, snapshot, self.holder.clone()).map_err(|error| error.report())?;
        next.recover().await?;
        Ok(next)
    }

    /// A started sandbox.
    async fn pod(&self, id: &str) -> Result<SandboxHandle, String> {
        let spec = self.fixture.sandbox(id);
        let (namespace, sandbox) = (spec.namespace.clone(), spec.id.clone());
        self.registry.create(spec).await.map_err(|error| error.report())?;
        let pod = self.registry.sandbox(&namespace, &sandbox).map_err(|error| error.report())?;
        let status = pod.start().await.map_err(|error| error.report())?;
        ensure!(status.state.phase() == SandboxPhase::Ready, "started but {:?}", status.state);
        Ok(pod)
    }

    fn find_pod(&self, id: &str) -> Result<SandboxHandle, String> {
        let spec = self.fixture.sandbox(id);
        self.registry.sandbox(&spec.namespace, &spec.id).map_err(|error| error.report())
    }

    fn container_spec(&self, id: &str, behaviour: Behaviour) -> Result<ContainerSpec, String> {
        Ok(self.fixture.container(self.dir, parse(id)?, behaviour))
    }

    /// A created container.
    async fn container(&self, pod: &SandboxHandle, id: &str, behaviour: Behaviour) -> Result<ContainerHandle, String> {
        let pid = pod.create_container(self.container_spec(id, behaviour)?).await.map_err(|error| error.report())?;
        ensure!(pid > 0, "a created container has no process");
        self.find(pod, id)
    }

    fn find(&self, pod: &SandboxHandle, id: &str) -> Result<ContainerHandle, String> {
        self.registry.container(&pod.namespace, &parse(id)?).map_err(|error| error.report())
    }

    /// Kinds of the events of a container up to its deletion.
    async fn history(&mut self, id: &str) -> Result<Vec<&'static str>, String> {
        let mut kinds = Vec::new();
        loop {
            let event = timeout(LIMIT, self.events.recv()).await.map_err(|_| format!("no deletion event after {kinds:?}"))?;
            let event = event.ok_or("the events ended")?.event;
            if event.container.as_str() != id {
                continue;
            }
            kinds.push(match event.kind {
                EventKind::Created { .. } => "created",
                EventKind::Started { .. } => "started",
                EventKind::ExecAdded { .. } => "exec added",
                EventKind::ExecStarted { .. } => "exec started",
                EventKind::Exited { exec: Some(_), .. } => "exec exited",
                EventKind::Exited { exec: None, .. } => "exited",
                EventKind::Deleted { exec: Some(_), .. } => "exec deleted",
                EventKind::Deleted { exec: None, .. } => {
                    kinds.push("deleted");
                    return Ok(kinds);
                }
                EventKind::Paused => "paused",
                EventKind::Resumed => "resumed",
                EventKind::OutOfMemory => "out of memory",
            });
        }
    }
}

fn parse<T: std::str::FromStr<Err = Error>>(id: &str) -> Result<T, String> {
    id.parse().map_err(|error: Error| error.report())
}

fn fails<T: Debug>(what: &str, result: Result<T>, code: Code) -> Outcome {
    match result {
        Ok(value) => Err(format!("{what} succeeded with {value:?} instead of failing with {code:?}")),
        Err(error) if error.code() == code => Ok(()),
        Err(error) => Err(format!("{what} failed with {:?} ({}) instead of {code:?}", error.code(), error.report())),
    }
}

async fn within<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T, String> {
    let result = timeout(LIMIT, work).await.map_err(|_| format!("{what} hung"))?;
    result.map_err(|error| format!("{what}: {}", error.report()))
}

async fn a_pod_from_start_to_end(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    let pid = within("start", container.start(None)).await?;
    let pids = within("pids", container.pids()).await?;
    ensure!(pids.iter().any(|process| process.pid == pid), "{pid} is not among {pids:?}");
    within("stats", container.stats()).await?;

    let exec: ExecId = parse("exec-1")?;
    within("exec", container.exec(daemon.fixture.exec(exec.clone(), Behaviour::Exit(7)))).await?;
    let exit = container.wait(Some(exec.clone()));
    within("start of the exec", container.start(Some(exec.clone()))).await?;
    ensure!(within("wait for the exec", exit).await?.status == 7, "the exec's exit code is lost");
    let deleted = within("delete of the exec", container.delete(Some(exec.clone()))).await?;
    ensure!(deleted.state.exit().is_some_and(|exit| exit.status == 7), "the exec was deleted as {deleted:?}");
    fails("status of a deleted exec", container.status(Some(exec)).await, Code::NotFound)?;

    within("kill", container.kill(None, libc::SIGKILL, false)).await?;
    ensure!(within("wait", container.wait(None)).await?.status == 137, "a killed container's exit code is not 137");
    let status = within("status", container.status(None)).await?;
    ensure!(status.process.state.pid() == pid, "the pid changed: {status:?}");
    within("delete", container.delete(None)).await?;
    fails("status of a deleted container", container.status(None).await, Code::NotFound)?;
    let history = daemon.history("main").await?;
    let expected = ["created", "started", "exec added", "exec started", "exec exited", "exec deleted", "exited", "deleted"];
    ensure!(history == expected, "events came as {history:?}");

    within("stop", pod.stop(Duration::ZERO)).await?;
    within("wait for the sandbox", pod.wait()).await?;
    within("stop again", pod.stop(Duration::ZERO)).await?;
    within("delete of the sandbox", pod.delete()).await?;
    fails("delete of a deleted sandbox", pod.delete().await, Code::NotFound)
}

async fn names_are_unique_and_unknown_ones_not_found(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    fails("a second sandbox of a name", daemon.registry.create(daemon.fixture.sandbox("pod")).await, Code::AlreadyExists)?;
    let mut other = daemon.fixture.sandbox("other");
    other.sandboxer = "unheard-of".into();
    fails("a sandbox of an unknown sandboxer", daemon.registry.create(other).await, Code::InvalidArgument)?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    let again = pod.create_container(daemon.container_spec("main", Behaviour::Run)?).await;
    fails("a second container of a name", again, Code::AlreadyExists)?;
    within("start", container.start(None)).await?;
    within("exec", container.exec(daemon.fixture.exec(parse("e")?, Behaviour::Run))).await?;
    let again = container.exec(daemon.fixture.exec(parse("e")?, Behaviour::Run)).await;
    fails("a second exec of a name", again, Code::AlreadyExists)?;
    let unknown: ExecId = parse("unknown")?;
    fails("kill of an unknown exec", container.kill(Some(unknown.clone()), 9, false).await, Code::NotFound)?;
    fails("wait for an unknown exec", container.wait(Some(unknown)).await, Code::NotFound)?;
    fails("an unknown container", daemon.registry.container(&pod.namespace, &parse("nobody")?).map(|_| ()), Code::NotFound)?;
    fails("an unknown sandbox", daemon.registry.sandbox(&pod.namespace, &parse("nobody")?).map(|_| ()), Code::NotFound)
}

async fn states_are_respected(daemon: &mut Daemon<'_>) -> Outcome {
    let spec = daemon.fixture.sandbox("pod");
    let (namespace, id) = (spec.namespace.clone(), spec.id.clone());
    daemon.registry.create(spec).await.map_err(|error| error.report())?;
    let pod = daemon.registry.sandbox(&namespace, &id).map_err(|error| error.report())?;
    let early = pod.create_container(daemon.container_spec("early", Behaviour::Run)?).await;
    fails("a container in a sandbox that is not started", early, Code::FailedPrecondition)?;
    within("start", pod.start()).await?;
    fails("a second start", pod.start().await, Code::FailedPrecondition)?;

    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    let exec = daemon.fixture.exec(parse("e")?, Behaviour::Run);
    fails("exec before start", container.exec(exec).await, Code::FailedPrecondition)?;
    within("start of the container", container.start(None)).await?;
    fails("a second start of the container", container.start(None).await, Code::FailedPrecondition)?;
    fails("delete of a running container", container.delete(None).await, Code::FailedPrecondition)?;

    let exec: ExecId = parse("e")?;
    within("exec", container.exec(daemon.fixture.exec(exec.clone(), Behaviour::Run))).await?;
    fails(
        "kill of an exec that has not started",
        container.kill(Some(exec.clone()), 9, false).await,
        Code::FailedPrecondition,
    )?;
    within("start of the exec", container.start(Some(exec.clone()))).await?;
    fails("delete of a running exec", container.delete(Some(exec.clone())).await, Code::FailedPrecondition)?;
    within("kill of the exec", container.kill(Some(exec.clone()), libc::SIGKILL, false)).await?;
    within("wait for the exec", container.wait(Some(exec.clone()))).await?;
    within("delete of the exec", container.delete(Some(exec))).await?;

    within("stop", pod.stop(Duration::ZERO)).await?;
    let late = pod.create_container(daemon.container_spec("late", Behaviour::Run)?).await;
    fails("a container in a stopped sandbox", late, Code::FailedPrecondition)
}

async fn signals_end_processes(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    within("start", container.start(None)).await?;
    // The answer to Kill must come before that of Delete, whatever the order of their ends.
    within("kill", container.kill(None, libc::SIGKILL, true)).await?;
    within("wait", container.wait(None)).await?;
    fails("kill of an ended container", container.kill(None, libc::SIGKILL, false).await, Code::NotFound)?;
    ensure!(!within("pids", container.pids()).await?.is_empty(), "an ended container has no pid");
    within("delete", container.delete(None)).await?;

    // A container that is never started can be killed, and deleted.
    let container = daemon.container(&pod, "unstarted", Behaviour::Run).await?;
    within("delete of an unstarted container", container.delete(None)).await?;
    let history = daemon.history("unstarted").await?;
    ensure!(history == ["created", "exited", "deleted"], "events came as {history:?}");

    // containerd does that when it has restarted between its creation and its start. The exit comes while the signal is still being sent.
    let container = daemon.container(&pod, "killed", Behaviour::Run).await?;
    within("kill of an unstarted container", container.kill(None, libc::SIGKILL, true)).await?;
    ensure!(within("wait", container.wait(None)).await?.status == 137, "killed before its start, but not by SIGKILL");
    within("delete", container.delete(None)).await?;

    // Its own exit, at once.
    let container = daemon.container(&pod, "short", Behaviour::Exit(42)).await?;
    let exit = container.wait(None);
    within("start", container.start(None)).await?;
    let exit = within("wait", exit).await?;
    ensure!(exit.status == 42, "the exit code is {}", exit.status);
    within("delete", container.delete(None)).await?;
    let history = daemon.history("short").await?;
    ensure!(history == ["created", "started", "exited", "deleted"], "events came as {history:?}");
    Ok(())
}

async fn stopping_ends_everything(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let mut exits = Vec::new();
    for id in ["one", "two"] {
        let container = daemon.container(&pod, id, Behaviour::Run).await?;
        within("start", container.start(None)).await?;
        let exec: ExecId = parse("e")?;
        within("exec", container.exec(daemon.fixture.exec(exec.clone(), Behaviour::Run))).await?;
        within("start of the exec", container.start(Some(exec.clone()))).await?;
        exits.push((container, exec));
    }
    within("stop", pod.stop(Duration::ZERO)).await?;
    for (container, exec) in exits {
        ensure!(within("wait", container.wait(None)).await?.status == 137, "stopped but not killed");
        within("wait for the exec", container.wait(Some(exec))).await?;
        within("delete", container.delete(None)).await?;
    }
    let status = within("status", pod.status()).await?;
    ensure!(status.state.phase() == SandboxPhase::Stopped, "stopped but {:?}", status.state);
    within("delete", pod.delete()).await
}

/// containerd forgets the task of a container whose creation was cancelled, and cannot remove the pod while we know of it.
async fn stopping_deletes_what_was_never_started(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let running = daemon.container(&pod, "running", Behaviour::Run).await?;
    within("start", running.start(None)).await?;
    let orphan = daemon.container(&pod, "orphan", Behaviour::Run).await?;
    within("stop", pod.stop(Duration::ZERO)).await?;
    match within("status of the orphan", async { Ok(orphan.status(None).await) }).await? {
        Err(Error::NotFound { .. }) => {}
        other => return Err(format!("a container that was never started outlives the stop of its sandbox: {other:?}")),
    }
    let history = daemon.history("orphan").await?;
    ensure!(history == ["created", "exited", "deleted"], "events came as {history:?}");
    ensure!(within("wait", running.wait(None)).await?.status == 137, "stopped but not killed");
    within("delete", pod.delete()).await
}

async fn deleting_a_live_sandbox_leaves_nothing(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let running = daemon.container(&pod, "running", Behaviour::Run).await?;
    within("start", running.start(None)).await?;
    let exit = running.wait(None);
    daemon.container(&pod, "created", Behaviour::Run).await?;
    within("delete", pod.delete()).await?;
    // It was asked before the delete but may be answered by it; either way it must be answered.
    match timeout(LIMIT, exit).await {
        Ok(Ok(_)) | Ok(Err(Error::NotFound { .. })) => {}
        Ok(Err(error)) => return Err(error.report()),
        Err(_) => return Err("a wait outlived its sandbox".into()),
    }
    ensure!(daemon.registry.list().is_empty(), "the sandbox is still known");
    // Its names are free again.
    daemon.pod("pod").await?;
    Ok(())
}

async fn a_failed_start_can_be_deleted(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    // Some runtimes find out when the container is created, others when it is started.
    match pod.create_container(daemon.container_spec("bad", Behaviour::FailToStart)?).await {
        Ok(_) => {
            let container = daemon.find(&pod, "bad")?;
            match container.start(None).await {
                Ok(pid) => return Err(format!("what cannot be started runs as {pid}")),
                Err(error) => ensure!(
                    error.report().contains("not found") || error.report().contains("No such file"),
                    "{}",
                    error.report()
                ),
            }
            within("delete", container.delete(None)).await?;
        }
        Err(error) => {
            ensure!(error.report().contains("not found") || error.report().contains("No such file"), "{}", error.report())
        }
    }
    // The name is free, and the pod still works.
    let container = daemon.container(&pod, "bad", Behaviour::Run).await?;
    within("start", container.start(None)).await?;
    let exec: ExecId = parse("e")?;
    within("exec", container.exec(daemon.fixture.exec(exec.clone(), Behaviour::FailToStart))).await?;
    ensure!(container.start(Some(exec.clone())).await.is_err(), "an exec that cannot be started runs");
    within("delete of the exec", container.delete(Some(exec))).await?;
    let status = within("status", container.status(None)).await?;
    ensure!(status.process.state.phase() == ProcessPhase::Running, "a failed exec took the container along: {status:?}");
    Ok(())
}

async fn a_failed_start_names_its_stage(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let started = match pod.create_container(daemon.container_spec("bad", Behaviour::FailToStart)?).await {
        Ok(_) => daemon.find(&pod, "bad")?.start(None).await,
        created => created,
    };
    let Err(error) = started else { return Err("what cannot be started was".into()) };
    let failures = daemon.registry.failures().map_err(|error| error.report())?;
    let [failure] = failures.as_slice() else { return Err(format!("one start failed, told are {failures:?}")) };
    ensure!(!failure.stages.is_empty(), "no stage in {failure:?}");
    // The rest is for the report: Kubernetes shows the whole error with each event.
    let text = format!("{} (kuasarctl failures {})", failure.error, pod.id);
    ensure!(error.report() == text, "{} instead of {text}", error.report());
    ensure!(failure.file.is_file(), "{} is not there", failure.file.display());
    ensure!(failure.code == error.code(), "{failure:?} for {}", error.report());
    let ids = (&failure.namespace, &failure.sandbox, failure.container.as_ref().map(ContainerId::as_str));
    ensure!(ids == (&pod.namespace, &pod.id, Some("bad")), "{failure:?}");
    // A refusal is none, nor is an exec.
    fails("a second start", pod.start().await, Code::FailedPrecondition)?;
    daemon.container(&pod, "good", Behaviour::Run).await?;
    let again = pod.create_container(daemon.container_spec("good", Behaviour::Run)?).await;
    fails("the same container again", again, Code::AlreadyExists)?;
    let container = daemon.find(&pod, "good")?;
    within("start", container.start(None)).await?;
    let exec: ExecId = parse("e")?;
    within("exec", container.exec(daemon.fixture.exec(exec.clone(), Behaviour::FailToStart))).await?;
    ensure!(container.start(Some(exec)).await.is_err(), "an exec that cannot be started runs");
    // They outlive what failed, and the daemon.
    within("delete", pod.delete()).await?;
    let next = daemon.successor(daemon.state.clone()).await?;
    let told = next.registry.failures().map_err(|error| error.report())?;
    ensure!(told == failures, "{told:?} instead of {failures:?}");
    Ok(())
}

async fn many_containers_at_once(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let daemon = &*daemon;
    let lives = (0..8u32).map(|number| {
        let pod = pod.clone();
        async move {
            let id = format!("c{number}");
            let container = daemon.container(&pod, &id, Behaviour::Exit(number)).await?;
            let exit = container.wait(None);
            within("start", container.start(None)).await?;
            let exit = within("wait", exit).await?;
            ensure!(exit.status == number, "{id} ended with {}", exit.status);
            within("delete", container.delete(None)).await?;
            Ok(())
        }
    });
    futures::future::join_all(lives).await.into_iter().collect()
}

async fn pause_and_resume(daemon: &mut Daemon<'_>) -> Outcome {
    let name = daemon.fixture.sandbox("name").sandboxer;
    let can = daemon.registry.capabilities(&name).map_err(|error| error.report())?.pause.clone();
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    fails(
        "pause before start",
        container.pause().await,
        if can.is_ok() { Code::FailedPrecondition } else { Code::Unimplemented },
    )?;
    within("start", container.start(None)).await?;
    if can.is_err() {
        return fails("pause", container.pause().await, Code::Unimplemented);
    }
    within("pause", container.pause()).await?;
    let exec = container.exec(daemon.fixture.exec(parse("e")?, Behaviour::Run)).await;
    fails("exec in a paused container", exec, Code::FailedPrecondition)?;
    within("resume", container.resume()).await?;
    fails("a second resume", container.resume().await, Code::FailedPrecondition)?;
    // A frozen process must still be killable, or the pod could never be stopped.
    within("pause", container.pause()).await?;
    within("kill", container.kill(None, libc::SIGKILL, false)).await?;
    within("wait", container.wait(None)).await?;
    within("delete", container.delete(None)).await?;
    Ok(())
}

async fn a_new_daemon_takes_over(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    let pid = within("start", container.start(None)).await?;
    let ended = daemon.container(&pod, "ended", Behaviour::Exit(3)).await?;
    within("start", ended.start(None)).await?;
    within("wait", ended.wait(None)).await?;

    // The one before lives on in this process, and must not save where this one deletes.
    let snapshot = daemon.snapshot()?;
    *daemon = daemon.successor(snapshot).await?;
    let pod = daemon.registry.sandbox(&pod.namespace, &pod.id).map_err(|error| error.report())?;
    let status = within("status", pod.status()).await?;
    ensure!(status.state.phase() == SandboxPhase::Ready, "recovered as {:?}", status.state);
    let container = daemon.find(&pod, "main")?;
    let status = within("status", container.status(None)).await?;
    ensure!(status.process.state.phase() == ProcessPhase::Running, "recovered as {status:?}");
    ensure!(status.process.state.pid() == pid, "recovered with another pid: {status:?}");
    let exit = within("wait", daemon.find(&pod, "ended")?.wait(None)).await?;
    ensure!(exit.status == 3, "the exit code became {}", exit.status);
    let exec: ExecId = parse("e")?;
    within("exec", container.exec(daemon.fixture.exec(exec.clone(), Behaviour::Exit(5)))).await?;
    let exit = container.wait(Some(exec.clone()));
    within("start of the exec", container.start(Some(exec))).await?;
    ensure!(within("wait", exit).await?.status == 5, "an exec after the recovery loses its exit code");
    within("kill", container.kill(None, libc::SIGKILL, false)).await?;
    within("wait", container.wait(None)).await?;
    within("delete", container.delete(None)).await?;
    within("delete of the sandbox", pod.delete()).await
}

fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
