//! The Controller and Admin services over their socket.
#![allow(clippy::unwrap_used, clippy::expect_used)] // also in what is no test function

mod daemon;

use daemon::{Daemon, LONG, annotated, create, request};
use kuasar_sandboxers::fake::Behaviour;
use kuasar_shim::proto::{
    admin::{InspectRequest, ListRequest, VersionRequest},
    sandbox::{
        ControllerCreateRequest, ControllerMetricsRequest, ControllerPlatformRequest, ControllerShutdownRequest,
        ControllerStartRequest, ControllerStatusRequest, ControllerStopRequest, ControllerUpdateRequest, ControllerWaitRequest,
    },
    types::Sandbox,
};
use prost_types::Any;
use serde_json::Value;
use tokio::{io::AsyncWriteExt, net::UnixStream, time::timeout};
use tonic::Code;

fn start(id: &str) -> ControllerStartRequest {
    ControllerStartRequest { sandbox_id: id.into(), ..Default::default() }
}

fn status(id: &str, verbose: bool) -> ControllerStatusRequest {
    ControllerStatusRequest { sandbox_id: id.into(), verbose, ..Default::default() }
}

fn shutdown(id: &str) -> ControllerShutdownRequest {
    ControllerShutdownRequest { sandbox_id: id.into(), ..Default::default() }
}

#[tokio::test]
async fn a_pod_lives_and_ends() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.controller().await;
    let created = controller.create(request(create("p1"))).await.unwrap().into_inner();
    assert_eq!(created.sandbox_id, "p1");
    let before = controller.status(request(status("p1", false))).await.unwrap().into_inner();
    assert_eq!((before.state.as_str(), before.info.len()), ("SANDBOX_NOTREADY", 0));

    let started = controller.start(request(start("p1"))).await.unwrap().into_inner();
    let address = format!("ttrpc+unix://{}", daemon.state().canonicalize().unwrap().join("task.sock").display());
    assert_eq!((started.address.as_str(), started.version), (address.as_str(), 3));
    assert!(started.created_at.is_some() && started.labels.is_empty());
    // containerd 2.3 and later read it for each container.
    let spec: serde_json::Value = serde_json::from_slice(&started.spec.unwrap().value).unwrap();
    assert!(spec["ociVersion"].is_string());

    let ready = controller.status(request(status("p1", true))).await.unwrap().into_inner();
    assert_eq!((ready.state.as_str(), ready.pid), ("SANDBOX_READY", started.pid));
    assert_eq!((ready.address.as_str(), ready.version), (address.as_str(), 3));
    let info: Value = serde_json::from_str(&ready.info["info"]).unwrap();
    assert_eq!(info["pid"], started.pid);
    let ours: Value = serde_json::from_str(&ready.info["kuasar"]).unwrap();
    assert_eq!(ours["spec"]["id"], "p1");

    let platform = ControllerPlatformRequest { sandbox_id: "p1".into(), ..Default::default() };
    let platform = controller.platform(request(platform)).await.unwrap().into_inner().platform.unwrap();
    assert_eq!(platform.os, "linux");

    let wait = ControllerWaitRequest { sandbox_id: "p1".into(), ..Default::default() };
    let mut waiter = controller.clone();
    let waiting = tokio::spawn(async move { waiter.wait(request(wait)).await });
    let stop = ControllerStopRequest { sandbox_id: "p1".into(), timeout_secs: 0, ..Default::default() };
    controller.stop(request(stop.clone())).await.unwrap();
    let exit = timeout(LONG, waiting).await.unwrap().unwrap().unwrap().into_inner();
    assert!(exit.exited_at.is_some());
    // Again, as the kubelet does.
    controller.stop(request(stop)).await.unwrap();
    let stopped = controller.status(request(status("p1", false))).await.unwrap().into_inner();
    assert_eq!(stopped.state, "SANDBOX_NOTREADY");
    assert!(stopped.exited_at.is_some());

    controller.shutdown(request(shutdown("p1"))).await.unwrap();
    let gone = controller.shutdown(request(shutdown("p1"))).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);
    assert_eq!(daemon.world().held(), Vec::<String>::new());
}

#[tokio::test]
async fn shutdown_of_a_live_pod_stops_it() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.pod("p1").await;
    controller.shutdown(request(shutdown("p1"))).await.unwrap();
    assert_eq!(daemon.world().held(), Vec::<String>::new());
}

#[tokio::test]
async fn bad_input_gets_its_code_and_leaves_nothing() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.controller().await;

    let bare = controller.create(create("p1")).await.unwrap_err();
    assert_eq!(bare.code(), Code::InvalidArgument);
    assert!(bare.message().contains("containerd-namespace"), "{bare}");

    let other = ControllerCreateRequest { sandboxer: "kuasar-typo".into(), ..create("p1") };
    let other = controller.create(request(other)).await.unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument);
    assert!(other.message().contains("kuasar-typo") && other.message().contains("fake"), "{other}");

    for id in ["", "a/b", "..", "a\0b", &"a".repeat(300)] {
        let bad = controller.create(request(create(id))).await.unwrap_err();
        assert_eq!(bad.code(), Code::InvalidArgument, "{id:?}");
        let bad = controller.status(request(status(id, false))).await.unwrap_err();
        assert_eq!(bad.code(), Code::InvalidArgument, "{id:?}");
    }

    let refused = controller.create(request(annotated("p1", "fake/refuse"))).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(daemon.world().held(), Vec::<String>::new());
    let gone = controller.status(request(status("p1", false))).await.unwrap_err();
    assert_eq!(gone.code(), Code::NotFound);

    controller.create(request(create("p1"))).await.unwrap();
    let twice = controller.create(request(create("p1"))).await.unwrap_err();
    assert_eq!(twice.code(), Code::AlreadyExists);
    controller.start(request(start("p1"))).await.unwrap();
    let twice = controller.start(request(start("p1"))).await.unwrap_err();
    assert_eq!(twice.code(), Code::FailedPrecondition);
    assert!(twice.message().contains("started once"), "{twice}");

    // Of the same name in another namespace: another sandbox.
    let mut elsewhere = request(create("p1"));
    elsewhere.metadata_mut().insert("containerd-namespace", "other".parse().unwrap());
    controller.create(elsewhere).await.unwrap();
}

#[tokio::test]
async fn anything_on_an_unknown_id_is_not_found() {
    let daemon = Daemon::start().await;
    let mut c = daemon.controller().await;
    let id = String::from("nobody");
    let mut codes = vec![
        c.start(request(start(&id))).await.unwrap_err().code(),
        c.status(request(status(&id, true))).await.unwrap_err().code(),
        c.shutdown(request(shutdown(&id))).await.unwrap_err().code(),
    ];
    let stop = ControllerStopRequest { sandbox_id: id.clone(), ..Default::default() };
    codes.push(c.stop(request(stop)).await.unwrap_err().code());
    let wait = ControllerWaitRequest { sandbox_id: id.clone(), ..Default::default() };
    codes.push(c.wait(request(wait)).await.unwrap_err().code());
    let platform = ControllerPlatformRequest { sandbox_id: id.clone(), ..Default::default() };
    codes.push(c.platform(request(platform)).await.unwrap_err().code());
    let metrics = ControllerMetricsRequest { sandbox_id: id.clone(), ..Default::default() };
    codes.push(c.metrics(request(metrics)).await.unwrap_err().code());
    let update = ControllerUpdateRequest { sandbox_id: id, ..Default::default() };
    codes.push(c.update(request(update)).await.unwrap_err().code());
    assert_eq!(codes, [Code::NotFound; 8]);
}

#[tokio::test]
async fn resources_are_updated_and_measured() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.pod("p1").await;
    let any = Any {
        type_url: "io.containerd.cri.v1/UpdatedResources".into(),
        value: br#"{"Overhead":null,"Resources":{"cpu_quota":1000}}"#.to_vec(),
    };
    let update = |any: Any| ControllerUpdateRequest {
        sandbox_id: "p1".into(),
        sandboxer: String::new(),
        sandbox: Some(Sandbox { extensions: [("updated-resources".to_owned(), any)].into(), ..Default::default() }),
        fields: vec!["extensions".into()],
    };
    controller.update(request(update(any.clone()))).await.unwrap();
    let broken = controller.update(request(update(Any { value: b"{".to_vec(), ..any }))).await.unwrap_err();
    assert_eq!(broken.code(), Code::InvalidArgument);

    // A pod without a control group of its own is the sum of its containers: of none, too, or containerd tells of no pod at all.
    let metrics = || request(ControllerMetricsRequest { sandbox_id: "p1".into(), ..Default::default() });
    let metric = controller.metrics(metrics()).await.unwrap().into_inner().metrics.unwrap();
    assert_eq!(metric.id, "p1");
    assert!(metric.data.unwrap().type_url.ends_with(".Metrics"));
    let task = daemon.task().await;
    task.create(daemon::context(), &daemon.container("p1", "c1", &Behaviour::Run.process())).await.unwrap();
    let metric = controller.metrics(metrics()).await.unwrap().into_inner().metrics.unwrap();
    assert_eq!(metric.data.unwrap().type_url, "io.containerd.cgroups.v2.Metrics");
}

#[tokio::test]
async fn an_operation_survives_its_client() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.controller().await;
    let call = tokio::spawn(async move { controller.create(request(annotated("p1", "test/gate"))).await });
    daemon.gated.arrived.notified().await;
    // The client and its connection go away in the middle of the call.
    call.abort();
    assert!(call.await.is_err());
    daemon.gated.gate.add_permits(1);
    let mut controller = daemon.controller().await;
    let made = async {
        loop {
            match controller.start(request(start("p1"))).await {
                Ok(_) => return,
                Err(error) => assert_eq!(error.code(), Code::NotFound),
            }
        }
    };
    timeout(LONG, made).await.expect("the sandbox is made all the same");
}

#[tokio::test]
async fn a_panic_in_a_backend_is_an_answer() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.controller().await;
    let broken = controller.create(request(annotated("p1", "test/panic"))).await.unwrap_err();
    assert_eq!(broken.code(), Code::Internal);
    controller.create(request(create("p2"))).await.unwrap();
}

#[tokio::test]
async fn garbage_on_the_sockets_harms_nobody() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.pod("p1").await;
    for name in ["kuasard.sock", "task.sock"] {
        let mut stream = UnixStream::connect(daemon.state().join(name)).await.unwrap();
        stream.write_all(&[0xff; 4096]).await.unwrap();
    }
    let ready = controller.status(request(status("p1", false))).await.unwrap().into_inner();
    assert_eq!(ready.state, "SANDBOX_READY");
}

#[tokio::test]
async fn a_wait_for_each_of_many_pods_blocks_nothing() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.pod("p1").await;
    // containerd has one connection, and HTTP/2 servers like to limit the requests on one to a few hundred.
    let waits: Vec<_> = (0..500)
        .map(|_| {
            let mut waiter = controller.clone();
            let wait = ControllerWaitRequest { sandbox_id: "p1".into(), ..Default::default() };
            tokio::spawn(async move { waiter.wait(request(wait)).await })
        })
        .collect();
    let ready = timeout(LONG, controller.status(request(status("p1", false)))).await.unwrap().unwrap().into_inner();
    assert_eq!(ready.state, "SANDBOX_READY");
    controller.shutdown(request(shutdown("p1"))).await.unwrap();
    for wait in waits {
        timeout(LONG, wait).await.unwrap().unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_stop_lets_calls_finish_and_refuses_new_ones() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.pod("p1").await;
    let wait = ControllerWaitRequest { sandbox_id: "p1".into(), ..Default::default() };
    let mut waiter = controller.clone();
    let waiting = tokio::spawn(async move { waiter.wait(request(wait)).await });
    let mut creator = controller.clone();
    let creating = tokio::spawn(async move { creator.create(request(annotated("p2", "test/gate"))).await });
    daemon.gated.arrived.notified().await;

    daemon.stop.cancel();
    // The wait ends with the code that makes containerd ask again.
    let waited = timeout(LONG, waiting).await.unwrap().unwrap().unwrap_err();
    assert_eq!(waited.code(), Code::Unavailable);
    assert!(controller.create(request(create("p3"))).await.is_err());
    assert!(!daemon.served.is_finished());

    daemon.gated.gate.add_permits(1);
    creating.await.unwrap().unwrap();
    let state = daemon.state();
    let (dir, gated) = daemon.stop().await;
    assert!(!state.join("kuasard.sock").exists() && !state.join("task.sock").exists());

    // Everything is still there for the next daemon.
    let daemon = Daemon::start_in(dir, gated).await;
    let mut controller = daemon.controller().await;
    let ready = controller.status(request(status("p1", false))).await.unwrap().into_inner();
    assert_eq!(ready.state, "SANDBOX_READY");
    controller.start(request(start("p2"))).await.unwrap();
}

#[tokio::test]
async fn a_stop_does_not_wait_for_ever() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.controller().await;
    let creating = tokio::spawn(async move { controller.create(request(annotated("p1", "test/gate"))).await });
    daemon.gated.arrived.notified().await;
    daemon.stop().await;
    creating.abort();
}

#[tokio::test]
async fn kuasarctl_sees_sandboxes_and_sandboxers() {
    let daemon = Daemon::start().await;
    let mut controller = daemon.pod("pod-one").await;
    controller.create(request(create("pod-two"))).await.unwrap();
    let mut admin = daemon.admin().await;
    let parse = |json: &str| serde_json::from_str::<Value>(json).unwrap();

    let list = parse(&admin.list(ListRequest::default()).await.unwrap().into_inner().json);
    let ids: Vec<_> = list.as_array().unwrap().iter().map(|sandbox| &sandbox["spec"]["id"]).collect();
    assert_eq!(ids, ["pod-one", "pod-two"]);
    let none = admin.list(ListRequest { namespace: "other".into() }).await.unwrap().into_inner();
    assert_eq!(parse(&none.json), Value::Array(vec![]));

    let inspect = |id: &str| InspectRequest { namespace: String::new(), id: id.into() };
    let one = parse(&admin.inspect(inspect("pod-o")).await.unwrap().into_inner().json);
    assert_eq!(one["spec"]["id"], "pod-one");
    assert_eq!(admin.inspect(inspect("pod-")).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(admin.inspect(inspect("")).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(admin.inspect(inspect("x")).await.unwrap_err().code(), Code::NotFound);

    let version = parse(&admin.version(VersionRequest {}).await.unwrap().into_inner().json);
    assert_eq!(version["sandboxers"]["fake"]["technique"], "fake");
    assert_eq!(version["pid"], std::process::id());
}
