//! The owner task and the recovery, on the fake sandboxer whose operations fail, hang or panic.

#![allow(clippy::unwrap_used)] // a test may

use std::{
    collections::BTreeMap,
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use kuasar_sandboxers::{
    Code, Error, Result, Sandboxer,
    collect::{Kind, Outcome},
    deferred::{Deferred, Open},
    event::EventSink,
    fake::{self, Behaviour, FakeSandboxer, Fault, World},
    fdstore::{FdStore, MemoryHolder},
    handle::{ContainerHandle, SandboxHandle},
    id::ExecId,
    lifecycle::{ProcessPhase, SandboxPhase},
    reaper::Reaper,
    registry::Registry,
    spec::OciSpec,
    stdio::{Stdio, StreamHub},
    types::{ContainerSpec, ExecSpec},
};
use serde_json::json;
use tokio::{
    sync::Semaphore,
    task::JoinHandle,
    time::{sleep, timeout},
};

const LIMIT: Duration = Duration::from_secs(30);

/// What outlives daemons.
struct Node {
    dir: tempfile::TempDir,
    world: World,
    reaper: Reaper,
    holder: MemoryHolder,
}

impl Node {
    fn registry(&self, fds: FdStore, sandboxers: BTreeMap<String, Arc<dyn Sandboxer>>) -> Registry {
        let (sink, _) = EventSink::channel();
        let (hub, reaper) = (StreamHub::default(), self.reaper.clone());
        Registry::new(self.dir.path(), sandboxers, sink, hub, reaper, fds).unwrap()
    }

    fn sandboxer(&self) -> Arc<dyn Sandboxer> {
        Arc::new(FakeSandboxer::new(self.world.clone()))
    }

    /// A daemon that has tried to recover everything once.
    async fn daemon(&self) -> Registry {
        self.daemon_with(BTreeMap::from([("fake".to_owned(), self.sandboxer())])).await
    }

    async fn daemon_with(&self, sandboxers: BTreeMap<String, Arc<dyn Sandboxer>>) -> Registry {
        let registry = self.registry(self.holder.store(), sandboxers);
        registry.recover().await.unwrap().finished().await.unwrap();
        registry
    }

    /// What a daemon does that dies after it.
    async fn earlier<F>(self: &Arc<Self>, work: impl FnOnce(Arc<Self>, Registry) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send,
    {
        let node = self.clone();
        let run = move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let registry = node.daemon().await;
                work(node, registry).await;
            });
            // Its tasks are gone when it is.
            runtime.shutdown_timeout(LIMIT);
        };
        tokio::task::spawn_blocking(run).await.unwrap();
    }

    fn alive(&self) -> bool {
        self.world.held().iter().any(|held| held.starts_with("process"))
    }
}

fn sandbox(registry: &Registry) -> SandboxHandle {
    registry.sandbox(&"test".parse().unwrap(), &"pod".parse().unwrap()).unwrap()
}

fn container(registry: &Registry) -> ContainerHandle {
    registry.container(&"test".parse().unwrap(), &"main".parse().unwrap()).unwrap()
}

fn exec_id() -> ExecId {
    "e".parse().unwrap()
}

fn running(dir: &Path) -> ContainerSpec {
    let spec = json!({"process": Behaviour::Run.process(), "root": {"path": "rootfs"}}).to_string();
    let spec = OciSpec::parse(spec.as_bytes()).unwrap();
    ContainerSpec { bundle: dir.join("bundle"), id: "main".parse().unwrap(), spec, rootfs: Vec::new(), stdio: Stdio::default() }
}

/// A sandbox with a container that runs.
async fn pod(node: &Node, registry: &Registry) -> (SandboxHandle, ContainerHandle) {
    registry.create(fake::spec("pod")).await.unwrap();
    let pod = sandbox(registry);
    pod.start().await.unwrap();
    pod.create_container(running(node.dir.path())).await.unwrap();
    let main = container(registry);
    main.start(None).await.unwrap();
    (pod, main)
}

async fn add_exec(main: &ContainerHandle) {
    main.exec(ExecSpec { id: exec_id(), process: Behaviour::Run.process(), stdio: Stdio::default() }).await.unwrap();
}

fn gate() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(0))
}

/// Asks for something, before anything is asked for that comes after this, and goes on meanwhile.
async fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let mut work = Box::pin(work);
    match futures::poll!(work.as_mut()) {
        Poll::Ready(done) => tokio::spawn(std::future::ready(done)),
        Poll::Pending => tokio::spawn(work),
    }
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(LIMIT, work).await.unwrap()
}

/// Asks again until the answer is another than Unavailable.
async fn once_available<T, F: Future<Output = Result<T>>>(ask: impl Fn() -> F) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match within(ask()).await {
            Err(Error::Unavailable { .. }) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
            answer => return answer,
        }
    }
}

fn unavailable<T: std::fmt::Debug>(answer: Result<T>) {
    assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
}

// One test: the reaper is one for the process.
#[tokio::test(flavor = "multi_thread")]
async fn the_engine() {
    let reaper = Reaper::install().unwrap();
    macro_rules! cases {
        ($($case:ident),* $(,)?) => {$(
            println!("{}", stringify!($case));
            let (dir, world) = (tempfile::tempdir().unwrap(), World::default());
            let node = Arc::new(Node { dir, world, reaper: reaper.clone(), holder: MemoryHolder::default() });
            within($case(node.clone())).await;
            assert!(node.world.overlaps().is_empty(), "{:?}", node.world.overlaps());
        )*};
    }
    cases![
        a_stop_that_was_cut_off_is_finished,
        a_sandbox_that_ended_by_itself_is_stopped_once,
        a_recovery_that_fails_is_tried_again,
        a_recovery_that_panics_is_tried_again,
        what_can_never_be_recovered_is_kept_until_it_is_stopped,
        a_container_that_was_not_recovered_is_tried_again,
        a_container_that_can_never_be_recovered_ends_with_its_sandbox,
        a_stop_during_an_attempt_waits_for_it,
        an_exec_that_was_not_recovered_does_not_take_its_container_along,
        an_exec_that_can_never_be_recovered_is_deleted,
        a_signal_does_not_wait_for_a_stuck_update,
        a_container_is_deleted_after_what_runs_in_it,
        a_sandbox_is_deleted_after_what_runs_in_it,
        an_exec_that_is_deleted_while_it_starts_is_ended,
        what_waits_for_a_removed_container_is_told_so,
        a_sandboxer_that_is_away_takes_nobody_along,
    ];
}

async fn a_stop_that_was_cut_off_is_finished(node: Arc<Node>) {
    node.world.fault("stop sandbox pod", 1, Fault::Wait(gate()));
    node.earlier(|node, registry| async move {
        let (pod, _) = pod(&node, &registry).await;
        let stopping = pod.clone();
        spawn(async move { stopping.stop(LIMIT).await }).await;
        node.world.begins("stop sandbox pod").await;
        // Answered after what it does was saved.
        pod.status().await.unwrap();
    })
    .await;
    assert!(node.alive());
    let registry = node.daemon().await;
    // Nobody asks again.
    let exit = sandbox(&registry).wait().await.unwrap();
    assert!(!node.alive(), "it counts as stopped ({exit:?}), and runs");
    assert_eq!(sandbox(&registry).status().await.unwrap().state.phase(), SandboxPhase::Stopped);
    sandbox(&registry).stop(LIMIT).await.unwrap();
    assert_eq!(node.world.begun("stop sandbox pod"), 2);
    sandbox(&registry).delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn a_sandbox_that_ended_by_itself_is_stopped_once(node: Arc<Node>) {
    let registry = node.daemon().await;
    let (pod, _) = pod(&node, &registry).await;
    let pid = pod.status().await.unwrap().detail["pid"].as_u64().unwrap();
    node.world.kill(u32::try_from(pid).unwrap());
    pod.wait().await.unwrap();
    assert!(node.alive());
    for _ in 0..2 {
        pod.stop(LIMIT).await.unwrap();
        assert!(!node.alive());
    }
    assert_eq!(node.world.begun("stop sandbox pod"), 1);
}

async fn a_recovery_that_fails_is_tried_again(node: Arc<Node>) {
    recovered_at_the_second_attempt(node, Fault::Fail).await;
}

async fn a_recovery_that_panics_is_tried_again(node: Arc<Node>) {
    recovered_at_the_second_attempt(node, Fault::Panic).await;
}

async fn recovered_at_the_second_attempt(node: Arc<Node>, fault: Fault) {
    node.earlier(|node, registry| async move { drop(pod(&node, &registry).await) }).await;
    node.world.fault("recover sandbox pod", 1, fault);
    let registry = node.daemon().await;
    unavailable(sandbox(&registry).status().await);
    let main = container(&registry);
    unavailable(main.status(None).await);
    assert!(matches!(registry.create(fake::spec("pod")).await, Err(Error::AlreadyExists { .. })));
    assert_eq!(registry.unrecovered().len(), 1);
    // containerd takes a failed wait for the end.
    let waiting = spawn({
        let main = main.clone();
        async move { main.wait(None).await }
    })
    .await;
    let status = once_available(|| main.status(None)).await.unwrap();
    assert_eq!(status.process.state.phase(), ProcessPhase::Running);
    assert!(registry.unrecovered().is_empty());
    assert!(!waiting.is_finished());
    main.kill(None, libc::SIGKILL, false).await.unwrap();
    assert_eq!(within(waiting).await.unwrap().unwrap().status, 137);
    main.delete(None).await.unwrap();
    sandbox(&registry).delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn what_can_never_be_recovered_is_kept_until_it_is_stopped(node: Arc<Node>) {
    node.earlier(|node, registry| async move {
        drop(pod(&node, &registry).await);
        let (reader, _) = std::io::pipe().unwrap();
        // As when the process dies.
        for name in ["@test/pod/main/tty", "@test/gone/main/tty"] {
            std::mem::forget(node.holder.store().leave(name.into(), &[reader.as_fd()]).unwrap());
        }
    })
    .await;
    node.world.fault("recover sandbox pod", usize::MAX, Fault::Fail);
    let held = node.world.held();
    let registry = node.daemon().await;
    let waiting = spawn({
        let main = container(&registry);
        async move { main.wait(None).await }
    })
    .await;
    let collected = registry.collect(false).await.unwrap();
    assert_eq!((collected[0].kind, &collected[0].outcome, collected.len()), (Kind::Unrecovered, &Outcome::Kept, 1));
    // Descriptors that nobody wants are let go.
    while node.holder.names().len() > 1 {
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(node.holder.names(), ["@test/pod/main/tty"]);
    unavailable(container(&registry).status(None).await);
    assert_eq!(node.world.held(), held);
    assert!(!waiting.is_finished());
    // As when nobody knows it.
    sandbox(&registry).stop(LIMIT).await.unwrap();
    assert!(node.world.held().is_empty() && node.holder.names().is_empty());
    assert!(within(waiting).await.unwrap().is_err());
    registry.create(fake::spec("pod")).await.unwrap();
}

async fn a_container_that_was_not_recovered_is_tried_again(node: Arc<Node>) {
    node.earlier(|node, registry| async move { drop(pod(&node, &registry).await) }).await;
    node.world.fault("recover container main", 1, Fault::Panic);
    let registry = node.daemon().await;
    let main = container(&registry);
    let status = sandbox(&registry).status().await.unwrap();
    assert!(status.containers[0].unrecovered.is_some(), "{status:?}");
    unavailable(main.status(None).await);
    let again = sandbox(&registry).create_container(running(node.dir.path())).await;
    assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
    once_available(|| main.kill(None, libc::SIGKILL, false)).await.unwrap();
    assert_eq!(main.wait(None).await.unwrap().status, 137);
    main.delete(None).await.unwrap();
    sandbox(&registry).delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn a_container_that_can_never_be_recovered_ends_with_its_sandbox(node: Arc<Node>) {
    node.earlier(|node, registry| async move { drop(pod(&node, &registry).await) }).await;
    node.world.fault("recover container main", usize::MAX, Fault::Fail);
    // It is saved as it was.
    node.earlier(|_, registry| async move { unavailable(container(&registry).delete(None).await) }).await;
    let registry = node.daemon().await;
    unavailable(container(&registry).delete(None).await);
    assert!(node.alive());
    sandbox(&registry).stop(LIMIT).await.unwrap();
    assert!(!node.alive());
    let gone = registry.container(&"test".parse().unwrap(), &"main".parse().unwrap());
    assert!(matches!(gone, Err(Error::NotFound { .. })));
    sandbox(&registry).delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn a_stop_during_an_attempt_waits_for_it(node: Arc<Node>) {
    node.earlier(|node, registry| async move { drop(pod(&node, &registry).await) }).await;
    node.world.fault("recover container main", 1, Fault::Fail);
    let registry = node.daemon().await;
    sandbox(&registry).status().await.unwrap();
    let slow = gate();
    node.world.fault("recover container main", 1, Fault::Wait(slow.clone()));
    let (pod, main) = (sandbox(&registry), container(&registry));
    while node.world.begun("recover container main") < 2 {
        sleep(Duration::from_millis(50)).await;
    }
    let kill = spawn(async move { main.kill(None, libc::SIGTERM, false).await }).await;
    let stop = spawn({
        let pod = pod.clone();
        async move { pod.stop(LIMIT).await }
    })
    .await;
    pod.status().await.unwrap();
    assert!(!stop.is_finished() && !kill.is_finished());
    slow.add_permits(1);
    within(stop).await.unwrap().unwrap();
    assert!(!node.alive());
    // It may have ended before.
    let _ = within(kill).await.unwrap();
    pod.delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn an_exec_that_was_not_recovered_does_not_take_its_container_along(node: Arc<Node>) {
    node.earlier(|node, registry| async move {
        let (_, main) = pod(&node, &registry).await;
        add_exec(&main).await;
        main.start(Some(exec_id())).await.unwrap();
    })
    .await;
    node.world.fault("recover exec e of container main", 1, Fault::Fail);
    let registry = node.daemon().await;
    let main = container(&registry);
    assert_eq!(main.status(None).await.unwrap().process.state.phase(), ProcessPhase::Running);
    unavailable(main.status(Some(exec_id())).await);
    let status = once_available(|| main.status(Some(exec_id()))).await.unwrap();
    assert_eq!(status.process.state.phase(), ProcessPhase::Running);
    main.kill(Some(exec_id()), libc::SIGKILL, false).await.unwrap();
    assert_eq!(main.wait(Some(exec_id())).await.unwrap().status, 137);
    sandbox(&registry).delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn an_exec_that_can_never_be_recovered_is_deleted(node: Arc<Node>) {
    for (ended, fault, status) in [(true, Fault::Fail, 9), (false, Fault::Refuse, 137)] {
        node.earlier(move |node, registry| async move {
            let (_, main) = pod(&node, &registry).await;
            if !ended {
                add_exec(&main).await;
            } else {
                let process = Behaviour::Exit(9).process();
                main.exec(ExecSpec { id: "ended".parse().unwrap(), process, stdio: Stdio::default() }).await.unwrap();
                main.start(Some("ended".parse().unwrap())).await.unwrap();
                main.wait(Some("ended".parse().unwrap())).await.unwrap();
            }
            let (reader, _) = std::io::pipe().unwrap();
            for exec in ["e", "ended"] {
                let name = format!("@test/pod/main/{exec}/stdout");
                std::mem::forget(node.holder.store().leave(name, &[reader.as_fd()]).unwrap());
            }
        })
        .await;
        let id: ExecId = if ended { "ended" } else { "e" }.parse().unwrap();
        node.world.fault(&format!("recover exec {id} of container main"), usize::MAX, fault);
        // The daemon after the next one knows of it, too.
        for _ in 0..2 {
            let id = id.clone();
            node.earlier(move |node, registry| async move {
                let main = container(&registry);
                assert!(sandbox(&registry).status().await.unwrap().containers[0].unrecovered.is_none());
                assert!(!node.holder.names().contains(&format!("@test/pod/main/{id}/stdout")));
                assert_eq!(main.delete(Some(id.clone())).await.unwrap_err().code(), Code::NotFound);
                let buried = registry.deleted(&"test".parse().unwrap(), &"main".parse().unwrap(), Some(&id)).unwrap();
                assert_eq!(buried.exit().unwrap().status, status);
            })
            .await;
        }
        assert_eq!(node.world.begun(&format!("recover exec {id} of container main")), 1);
        node.earlier(|_, registry| async move { sandbox(&registry).delete().await.unwrap() }).await;
        // Nobody can say to the fake that it is not wanted any more: a leftover.
        assert_eq!(node.world.held(), [format!("exec {id} of container main")]);
        node.daemon().await;
        assert!(node.world.held().is_empty());
    }
}

async fn a_signal_does_not_wait_for_a_stuck_update(node: Arc<Node>) {
    let registry = node.daemon().await;
    let (pod, main) = pod(&node, &registry).await;
    let stuck = gate();
    node.world.fault("update container main", 1, Fault::Wait(stuck.clone()));
    let update = spawn({
        let main = main.clone();
        async move { main.update(json!({})).await }
    })
    .await;
    node.world.begins("update container main").await;
    within(main.kill(None, libc::SIGTERM, false)).await.unwrap();
    assert_eq!(within(main.wait(None)).await.unwrap().status, 128 + 15);
    // What cannot be told apart from its update yet waits for that.
    let delete = spawn({
        let main = main.clone();
        async move { main.delete(None).await }
    })
    .await;
    main.status(None).await.unwrap();
    assert!(!delete.is_finished());
    stuck.add_permits(1);
    within(update).await.unwrap().unwrap();
    within(delete).await.unwrap().unwrap();
    pod.delete().await.unwrap();
}

async fn a_container_is_deleted_after_what_runs_in_it(node: Arc<Node>) {
    let registry = node.daemon().await;
    let (pod, main) = pod(&node, &registry).await;
    add_exec(&main).await;
    let slow = gate();
    node.world.fault("start exec e of container main", 1, Fault::Wait(slow.clone()));
    let start = spawn({
        let main = main.clone();
        async move { main.start(Some(exec_id())).await }
    })
    .await;
    node.world.begins("start exec e of container main").await;
    main.kill(None, libc::SIGKILL, false).await.unwrap();
    main.wait(None).await.unwrap();
    let delete = spawn({
        let main = main.clone();
        async move { main.delete(None).await }
    })
    .await;
    main.status(None).await.unwrap();
    // Nothing is begun any more in what is being removed.
    let late = spawn({
        let main = main.clone();
        async move { main.close_stdin(Some(exec_id())).await }
    })
    .await;
    main.status(None).await.unwrap();
    assert!(!delete.is_finished() && !late.is_finished());
    slow.add_permits(1);
    within(start).await.unwrap().unwrap();
    within(delete).await.unwrap().unwrap();
    assert!(matches!(within(late).await.unwrap(), Err(Error::NotFound { kind: "container", .. })));
    pod.delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn a_sandbox_is_deleted_after_what_runs_in_it(node: Arc<Node>) {
    let registry = node.daemon().await;
    let (pod, main) = pod(&node, &registry).await;
    add_exec(&main).await;
    let slow = gate();
    node.world.fault("start exec e of container main", 1, Fault::Wait(slow.clone()));
    let start = spawn({
        let main = main.clone();
        async move { main.start(Some(exec_id())).await }
    })
    .await;
    node.world.begins("start exec e of container main").await;
    let delete = spawn({
        let pod = pod.clone();
        async move { pod.delete().await }
    })
    .await;
    // What hangs in it ends with it, so it is stopped first.
    node.world.begins("stop sandbox pod").await;
    main.status(None).await.unwrap();
    let late = spawn(async move { main.update(json!({})).await }).await;
    pod.status().await.unwrap();
    assert!(!delete.is_finished() && !late.is_finished());
    slow.add_permits(1);
    within(start).await.unwrap().unwrap();
    within(delete).await.unwrap().unwrap();
    assert_eq!(within(late).await.unwrap().unwrap_err().code(), Code::NotFound);
    assert_eq!(node.world.begun("update container main"), 0);
    assert!(node.world.held().is_empty());
}

async fn an_exec_that_is_deleted_while_it_starts_is_ended(node: Arc<Node>) {
    let registry = node.daemon().await;
    let (pod, main) = pod(&node, &registry).await;
    add_exec(&main).await;
    let slow = gate();
    node.world.fault("start exec e of container main", 1, Fault::Wait(slow.clone()));
    // Its client goes away.
    spawn({
        let main = main.clone();
        async move { main.start(Some(exec_id())).await }
    })
    .await;
    node.world.begins("start exec e of container main").await;
    let delete = spawn({
        let main = main.clone();
        async move { main.delete(Some(exec_id())).await }
    })
    .await;
    main.status(None).await.unwrap();
    slow.add_permits(1);
    let deleted = within(delete).await.unwrap().unwrap();
    assert_eq!(deleted.state.exit().unwrap().status, 137);
    // One whose start was answered is not ended by the way.
    add_exec(&main).await;
    main.start(Some(exec_id())).await.unwrap();
    assert_eq!(main.delete(Some(exec_id())).await.unwrap_err().code(), Code::FailedPrecondition);
    pod.delete().await.unwrap();
    assert!(node.world.held().is_empty());
}

async fn what_waits_for_a_removed_container_is_told_so(node: Arc<Node>) {
    let registry = node.daemon().await;
    let (pod, main) = pod(&node, &registry).await;
    main.kill(None, libc::SIGKILL, false).await.unwrap();
    main.wait(None).await.unwrap();
    let slow = gate();
    node.world.fault("delete container main", 1, Fault::Wait(slow.clone()));
    let delete = spawn({
        let main = main.clone();
        async move { main.delete(None).await }
    })
    .await;
    node.world.begins("delete container main").await;
    let exec = ExecSpec { id: exec_id(), process: Behaviour::Run.process(), stdio: Stdio::default() };
    let exec = spawn(async move { main.exec(exec).await }).await;
    pod.status().await.unwrap();
    slow.add_permits(1);
    within(delete).await.unwrap().unwrap();
    let error = within(exec).await.unwrap().unwrap_err();
    assert!(matches!(&error, Error::NotFound { kind: "container", .. }), "{}", error.report());
    pod.delete().await.unwrap();
}

async fn a_sandboxer_that_is_away_takes_nobody_along(node: Arc<Node>) {
    node.earlier(|node, registry| async move { drop(pod(&node, &registry).await) }).await;
    let back = Arc::new(AtomicBool::new(false));
    let open: Open = Box::new({
        let (node, back) = (node.clone(), back.clone());
        move || {
            let (sandboxer, back) = (node.sandboxer(), back.load(Ordering::Relaxed));
            Box::pin(async move { if back { Ok(sandboxer) } else { Err(Error::invalid("kernel", "it is away")) } })
        }
    });
    let (away, error) = Deferred::open("fake".into(), open).await;
    assert!(error.is_some());
    let registry = node.daemon_with(BTreeMap::from([("fake".into(), away), ("other".into(), node.sandboxer())])).await;
    let mut spec = fake::spec("another");
    spec.sandboxer = "other".into();
    registry.create(spec).await.unwrap();
    let error = registry.create(fake::spec("new")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.report().contains("it is away"), "{}", error.report());
    assert!(registry.unavailable()["fake"].contains("it is away"));
    // What it has is nobody's leftover.
    let held = node.world.held();
    let collected = registry.collect(false).await.unwrap();
    assert_eq!(collected.iter().map(|item| item.kind).collect::<Vec<_>>(), [Kind::Unrecovered]);
    unavailable(sandbox(&registry).delete().await);
    unavailable(container(&registry).status(None).await);
    assert_eq!(node.world.held(), held);
    back.store(true, Ordering::Relaxed);
    let status = once_available(|| async { container(&registry).status(None).await }).await.unwrap();
    assert_eq!(status.process.state.phase(), ProcessPhase::Running);
    assert!(registry.unavailable().is_empty());
    assert_eq!(registry.capabilities("fake").unwrap().technique, "fake");
    registry.create(fake::spec("new")).await.unwrap();
}
