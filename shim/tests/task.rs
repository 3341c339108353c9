//! The Task service over its socket.
#![allow(clippy::unwrap_used, clippy::expect_used)] // also in what is no test function

mod daemon;

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest,
        KillRequest, PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest,
        StateResponse, StatsRequest, Status, UpdateTaskRequest, WaitRequest,
    },
    shim_async::TaskClient,
};
use daemon::{Daemon, LONG, context, create, request, status};
use kuasar_sandboxers::fake::Behaviour;
use kuasar_shim::proto::sandbox::{ControllerShutdownRequest, ControllerStopRequest};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::time::timeout;
use ttrpc::Code;

const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

fn state(id: &str, exec: &str) -> StateRequest {
    StateRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

fn start(id: &str, exec: &str) -> StartRequest {
    StartRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

fn wait(id: &str, exec: &str) -> WaitRequest {
    WaitRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

fn delete(id: &str, exec: &str) -> DeleteRequest {
    DeleteRequest { id: id.into(), exec_id: exec.into(), ..Default::default() }
}

fn kill(id: &str, exec: &str, signal: u32) -> KillRequest {
    KillRequest { id: id.into(), exec_id: exec.into(), signal, ..Default::default() }
}

fn exec(id: &str, exec: &str, spec: &str) -> ExecProcessRequest {
    let any = Any { type_url: PROCESS.into(), value: spec.into(), ..Default::default() };
    ExecProcessRequest { id: id.into(), exec_id: exec.into(), spec: MessageField::some(any), ..Default::default() }
}

async fn running(daemon: &Daemon, task: &TaskClient, id: &str) {
    task.create(context(), &daemon.container("p1", id, &Behaviour::Run.process())).await.unwrap();
    task.start(context(), &start(id, "")).await.unwrap();
}

#[tokio::test]
async fn a_container_lives_and_ends() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    let mut wanted = daemon.container("p1", "c1", &Behaviour::Run.process());
    wanted.stdout = "/dev/null".into();
    let created = task.create(context(), &wanted).await.unwrap();
    let before = task.state(context(), &state("c1", "")).await.unwrap();
    assert_eq!((before.status.unwrap(), before.pid, before.id.as_str()), (Status::CREATED, created.pid, "c1"));
    assert_eq!((before.stdout.as_str(), before.bundle.as_str()), ("/dev/null", wanted.bundle.as_str()));

    let started = task.start(context(), &start("c1", "")).await.unwrap();
    assert_eq!(started.pid, created.pid);
    let connected = task.connect(context(), &ConnectRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (std::process::id(), started.pid));
    let pids = task.pids(context(), &PidsRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [started.pid]);
    let stats = task.stats(context(), &StatsRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");

    task.pause(context(), &PauseRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    let paused = task.state(context(), &state("c1", "")).await.unwrap();
    assert_eq!(paused.status.unwrap(), Status::PAUSED);
    task.resume(context(), &ResumeRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: br#"{"cpu":{"shares":2}}"#.to_vec(),
        ..Default::default()
    };
    let update = UpdateTaskRequest { id: "c1".into(), resources: MessageField::some(resources), ..Default::default() };
    task.update(context(), &update).await.unwrap();
    let close = CloseIORequest { id: "c1".into(), stdin: true, ..Default::default() };
    task.close_io(context(), &close).await.unwrap();

    let running = task.delete(context(), &delete("c1", "")).await;
    assert_eq!(status(running).0, Code::FAILED_PRECONDITION);
    let waiter = task.clone();
    let waiting = tokio::spawn(async move { waiter.wait(context(), &wait("c1", "")).await });
    task.kill(context(), &kill("c1", "", 9)).await.unwrap();
    let exit = timeout(LONG, waiting).await.unwrap().unwrap().unwrap();
    assert_eq!(exit.exit_status, 137);
    let after = task.state(context(), &state("c1", "")).await.unwrap();
    assert_eq!((after.status.unwrap(), after.exit_status, after.exited_at), (Status::STOPPED, 137, exit.exited_at.clone()));
    // A restarting containerd takes an empty list for a leaked shim.
    let pids = task.pids(context(), &PidsRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes.len(), 1);
    let (code, text) = status(task.kill(context(), &kill("c1", "", 9)).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(text.contains("already finished"), "{text}");

    let deleted = task.delete(context(), &delete("c1", "")).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status, deleted.exited_at), (started.pid, 137, exit.exited_at));
    let again = task.delete(context(), &delete("c1", "")).await;
    assert_eq!(status(again).0, Code::NOT_FOUND);
    // containerd 2.4 does this after every Delete; the daemon serves on.
    for id in ["c1", "", "nobody"] {
        task.shutdown(context(), &ShutdownRequest { id: id.into(), now: true, ..Default::default() }).await.unwrap();
    }
    let topics = daemon.inbox.topics(6).await;
    assert_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed", "/tasks/exit", "/tasks/delete"]);
}

#[tokio::test]
async fn an_exec_lives_and_ends() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    running(&daemon, &task, "c1").await;
    let spec = Behaviour::Run.process().to_string();
    task.exec(context(), &exec("c1", "e1", &spec)).await.unwrap();
    assert_eq!(status(task.exec(context(), &exec("c1", "e1", &spec)).await).0, Code::ALREADY_EXISTS);
    let before = task.state(context(), &state("c1", "e1")).await.unwrap();
    assert_eq!((before.id.as_str(), before.exec_id.as_str(), before.pid), ("e1", "e1", 0));
    let started = task.start(context(), &start("c1", "e1")).await.unwrap();
    assert_ne!(started.pid, 0);
    task.kill(context(), &kill("c1", "e1", 15)).await.unwrap();
    let exit = timeout(LONG, task.wait(context(), &wait("c1", "e1"))).await.unwrap().unwrap();
    assert_eq!(exit.exit_status, 143);
    let deleted = task.delete(context(), &delete("c1", "e1")).await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (143, started.pid));
    assert_eq!(status(task.state(context(), &state("c1", "e1")).await).0, Code::NOT_FOUND);
    let topics = daemon.inbox.topics(5).await;
    assert_eq!(topics[2..], ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]);
}

#[tokio::test]
async fn the_service_has_its_old_name_too() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    running(&daemon, &task, "c1").await;
    let request = ttrpc::Request {
        service: "containerd.task.v2.Task".into(),
        method: "State".into(),
        payload: state("c1", "").write_to_bytes().unwrap(),
        metadata: ttrpc::context::to_pb(context().metadata),
        ..Default::default()
    };
    let response = daemon.client().await.request(request).await.unwrap();
    let state = StateResponse::parse_from_bytes(&response.payload).unwrap();
    assert_eq!(state.status.unwrap(), Status::RUNNING);
}

#[tokio::test]
async fn anything_on_an_unknown_id_is_not_found() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    running(&daemon, &task, "c1").await;
    let id = || String::from("nobody");
    let json = || MessageField::some(Any { value: b"{}".to_vec(), ..Default::default() });
    let answers = vec![
        status(task.state(context(), &state("nobody", "")).await),
        status(task.start(context(), &start("nobody", "")).await),
        status(task.delete(context(), &delete("nobody", "")).await),
        status(task.kill(context(), &kill("nobody", "", 9)).await),
        status(task.wait(context(), &wait("nobody", "")).await),
        status(task.exec(context(), &exec("nobody", "e1", "{}")).await),
        status(task.pids(context(), &PidsRequest { id: id(), ..Default::default() }).await),
        status(task.pause(context(), &PauseRequest { id: id(), ..Default::default() }).await),
        status(task.resume(context(), &ResumeRequest { id: id(), ..Default::default() }).await),
        status(task.stats(context(), &StatsRequest { id: id(), ..Default::default() }).await),
        status(task.connect(context(), &ConnectRequest { id: id(), ..Default::default() }).await),
        status(task.checkpoint(context(), &CheckpointTaskRequest { id: id(), ..Default::default() }).await),
        status(task.resize_pty(context(), &ResizePtyRequest { id: id(), ..Default::default() }).await),
        status(task.close_io(context(), &CloseIORequest { id: id(), stdin: true, ..Default::default() }).await),
        status(task.update(context(), &UpdateTaskRequest { id: id(), resources: json(), ..Default::default() }).await),
        // An unknown exec of a known container.
        status(task.state(context(), &state("c1", "nobody")).await),
        status(task.start(context(), &start("c1", "nobody")).await),
        status(task.delete(context(), &delete("c1", "nobody")).await),
        status(task.kill(context(), &kill("c1", "nobody", 9)).await),
        status(task.wait(context(), &wait("c1", "nobody")).await),
    ];
    for (number, (code, text)) in answers.into_iter().enumerate() {
        assert_eq!(code, Code::NOT_FOUND, "{number}: {text}");
        assert!(text.contains("nobody"), "{number}: {text}");
    }
    // A container for a sandbox that does not exist.
    let orphan = daemon.container("no-pod", "c2", &Behaviour::Run.process());
    assert_eq!(status(task.create(context(), &orphan).await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn bad_input_gets_its_code_and_leaves_nothing() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.controller().await;
    controller.create(request(create("p1"))).await.unwrap();
    let task = daemon.task().await;
    let good = daemon.container("p1", "c1", &Behaviour::Run.process());

    // The sandbox is not started.
    let (code, text) = status(task.create(context(), &good).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("start it first"), "{text}");
    let start_pod = kuasar_shim::proto::sandbox::ControllerStartRequest { sandbox_id: "p1".into(), ..Default::default() };
    controller.start(request(start_pod)).await.unwrap();
    let held = daemon.world().held();

    let (code, text) = status(task.create(ttrpc::context::Context::default(), &good).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("containerd-namespace-ttrpc"), "{text}");
    for id in ["", "a/b", "..", "a\0b", &"a".repeat(300)] {
        let bad = CreateTaskRequest { id: id.into(), ..good.clone() };
        assert_eq!(status(task.create(context(), &bad).await).0, Code::INVALID_ARGUMENT, "{id:?}");
        assert_eq!(status(task.state(context(), &state(id, "")).await).0, Code::INVALID_ARGUMENT, "{id:?}");
    }
    for (config, word) in [
        ("this is not JSON", "not JSON"),
        (r#"{"root":{"path":"rootfs"}}"#, "process"),
        (r#"{"process":{"args":["run"]}}"#, "root"),
        (r#"{"process":{"args":["no-such"]},"root":{"path":"rootfs"}}"#, "no-such"),
    ] {
        let (code, text) = status(task.create(context(), &daemon.bundle("p1", "c1", config)).await);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
        assert!(text.contains(word), "{text}");
    }
    let nowhere = CreateTaskRequest { id: "c1".into(), bundle: "/no/such/bundle".into(), ..Default::default() };
    let (code, text) = status(task.create(context(), &nowhere).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("/no/such/bundle"), "{text}");
    assert_eq!(daemon.world().held(), held);

    // A program that does not exist: the runtime's own words arrive.
    let missing = daemon.container("p1", "c2", &Behaviour::FailToStart.process());
    task.create(context(), &missing).await.unwrap();
    let (code, text) = status(task.start(context(), &start("c2", "")).await);
    assert_eq!(code, Code::INTERNAL);
    assert!(text.contains("executable file not found"), "{text}");
    task.delete(context(), &delete("c2", "")).await.unwrap();
    assert_eq!(daemon.world().held(), held);

    let good = daemon.container("p1", "c1", &Behaviour::Run.process());
    task.create(context(), &good).await.unwrap();
    assert_eq!(status(task.create(context(), &good).await).0, Code::ALREADY_EXISTS);
    let early = exec("c1", "e1", &Behaviour::Run.process().to_string());
    assert_eq!(status(task.exec(context(), &early).await).0, Code::FAILED_PRECONDITION);
    task.start(context(), &start("c1", "")).await.unwrap();
    assert_eq!(status(task.start(context(), &start("c1", "")).await).0, Code::FAILED_PRECONDITION);
    assert_eq!(status(task.kill(context(), &kill("c1", "", 65)).await).0, Code::INVALID_ARGUMENT);
    for spec in ["", "x", "[]"] {
        assert_eq!(status(task.exec(context(), &exec("c1", "e1", spec)).await).0, Code::INVALID_ARGUMENT);
    }
    assert_eq!(status(task.exec(context(), &exec("c1", "a/b", "{}")).await).0, Code::INVALID_ARGUMENT);
    let size = ResizePtyRequest { id: "c1".into(), width: 70000, height: 1, ..Default::default() };
    assert_eq!(status(task.resize_pty(context(), &size).await).0, Code::INVALID_ARGUMENT);
    let update = UpdateTaskRequest { id: "c1".into(), ..Default::default() };
    assert_eq!(status(task.update(context(), &update).await).0, Code::INVALID_ARGUMENT);
    let checkpoint = CheckpointTaskRequest { id: "c1".into(), path: "/x".into(), ..Default::default() };
    let (code, text) = status(task.checkpoint(context(), &checkpoint).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(text.contains("checkpoint"), "{text}");
    let restore = CreateTaskRequest { id: "c9".into(), checkpoint: "/x".into(), ..good };
    assert_eq!(status(task.create(context(), &restore).await).0, Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn a_stopped_pod_ends_its_containers() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    running(&daemon, &task, "c1").await;
    let waiter = task.clone();
    let waiting = tokio::spawn(async move { waiter.wait(context(), &wait("c1", "")).await });
    let stop = ControllerStopRequest { sandbox_id: "p1".into(), ..Default::default() };
    controller.stop(request(stop)).await.unwrap();
    assert_eq!(timeout(LONG, waiting).await.unwrap().unwrap().unwrap().exit_status, 137);
    task.delete(context(), &delete("c1", "")).await.unwrap();
    let shutdown = ControllerShutdownRequest { sandbox_id: "p1".into(), ..Default::default() };
    controller.shutdown(request(shutdown)).await.unwrap();
    assert_eq!(daemon.world().held(), Vec::<String>::new());
}

#[tokio::test]
async fn a_process_that_ends_at_once_has_its_exit() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    for code in 0..20 {
        let id = format!("c{code}");
        task.create(context(), &daemon.container("p1", &id, &Behaviour::Exit(code).process())).await.unwrap();
        task.start(context(), &start(&id, "")).await.unwrap();
        assert_eq!(timeout(LONG, task.wait(context(), &wait(&id, ""))).await.unwrap().unwrap().exit_status, code);
        task.delete(context(), &delete(&id, "")).await.unwrap();
    }
}

#[tokio::test]
async fn a_lost_connection_ends_its_waits_and_nothing_else() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    running(&daemon, &task, "c1").await;
    let waiter = daemon.task().await;
    let waiting = tokio::spawn(async move { waiter.wait(context(), &wait("c1", "")).await });
    waiting.abort();
    let _ = waiting.await;
    let found = task.state(context(), &state("c1", "")).await.unwrap();
    assert_eq!(found.status.unwrap(), Status::RUNNING);
}

#[tokio::test]
async fn a_stop_lets_a_wait_stand_and_keeps_containers() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    running(&daemon, &task, "c1").await;
    let waiter = task.clone();
    let waiting = tokio::spawn(async move { waiter.wait(context(), &wait("c1", "")).await });
    let (dir, gated) = daemon.stop().await;
    // The connection ends with the daemon, without an answer: containerd would take any for the container's end.
    let ended = timeout(LONG, waiting).await.unwrap().unwrap().unwrap_err();
    assert!(!matches!(ended, ttrpc::Error::RpcStatus(_)), "{ended:?}");
    drop(task);

    let daemon = Daemon::start_in(dir, gated).await;
    let task = daemon.task().await;
    let found = task.state(context(), &state("c1", "")).await.unwrap();
    assert_eq!(found.status.unwrap(), Status::RUNNING);
    task.kill(context(), &kill("c1", "", 9)).await.unwrap();
    assert_eq!(timeout(LONG, task.wait(context(), &wait("c1", ""))).await.unwrap().unwrap().exit_status, 137);
}

#[tokio::test]
async fn kill_is_answered_before_delete() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    for number in 0..50 {
        let id = format!("c{number}");
        running(&daemon, &task, &id).await;
        let (order, mut answered) = tokio::sync::mpsc::unbounded_channel();
        let send = order.clone();
        let (killer, deleter) = (task.clone(), task.clone());
        let (kill, delete) = (kill(&id, "", 9), delete(&id, ""));
        let killing = tokio::spawn(async move {
            killer.kill(context(), &kill).await.unwrap();
            send.send("kill").unwrap();
        });
        let deleting = tokio::spawn(async move {
            while let Err(error) = deleter.delete(context(), &delete).await {
                assert_eq!(status(Err::<(), _>(error)).0, Code::FAILED_PRECONDITION);
            }
            order.send("delete").unwrap();
        });
        killing.await.unwrap();
        deleting.await.unwrap();
        assert_eq!([answered.recv().await, answered.recv().await], [Some("kill"), Some("delete")]);
    }
}
