//! Sandboxes that containerd has forgotten are removed, and no others.
#![allow(clippy::unwrap_used, clippy::expect_used)] // also in what is no test function

mod daemon;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use containerd_shim_protos::{api::StartRequest, shim_async::TaskClient};
use daemon::{Daemon, LONG, LOOK_INTERVAL, create, request};
use kuasar_sandboxers::fake::Behaviour;
use kuasar_shim::proto::{
    admin::{GcRequest, InspectRequest, ListRequest},
    containers::{
        Container, ListContainersRequest, ListContainersResponse,
        containers_server::{Containers, ContainersServer},
    },
    sandbox::{
        ControllerStatusRequest, StoreCreateRequest, StoreCreateResponse, StoreDeleteRequest, StoreDeleteResponse,
        StoreGetRequest, StoreGetResponse, StoreListRequest, StoreListResponse, StoreUpdateRequest, StoreUpdateResponse,
        store_server::{Store, StoreServer},
    },
    tasks::{
        GetRequest, GetResponse,
        tasks_server::{Tasks, TasksServer},
    },
    types::Sandbox,
};
use serde_json::Value;
use tokio::{net::UnixListener, task::JoinHandle};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status};

/// containerd's store, as far as it is asked.
#[derive(Clone, Default)]
struct Known {
    ids: Arc<Mutex<BTreeSet<String>>>,
    containers: Arc<Mutex<BTreeSet<String>>>,
    /// Containers whose tasks it has.
    tasks: Arc<Mutex<BTreeSet<String>>>,
    asked: Arc<Mutex<usize>>,
    /// How large the annotations are that each sandbox has, in bytes.
    annotations: Arc<Mutex<usize>>,
}

impl Known {
    fn serve(&self, daemon: &Daemon) -> JoinHandle<()> {
        let listener = UnixListener::bind(daemon.dir.path().join("containerd.sock")).unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(StoreServer::new(self.clone()))
            .add_service(ContainersServer::new(self.clone()))
            .add_service(TasksServer::new(self.clone()));
        tokio::spawn(async move { server.serve_with_incoming(UnixListenerStream::new(listener)).await.unwrap() })
    }

    fn set(&self, ids: &[&str]) {
        *self.ids.lock().unwrap() = ids.iter().map(|id| (*id).to_owned()).collect();
    }

    fn set_containers(&self, ids: &[&str]) {
        *self.containers.lock().unwrap() = ids.iter().map(|id| (*id).to_owned()).collect();
    }

    fn set_tasks(&self, ids: &[&str]) {
        *self.tasks.lock().unwrap() = ids.iter().map(|id| (*id).to_owned()).collect();
    }

    /// Waits until the daemon has looked so many times more.
    async fn looks(&self, count: usize) {
        let before = *self.asked.lock().unwrap();
        tokio::time::timeout(LONG, async {
            while *self.asked.lock().unwrap() < before + count {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        })
        .await
        .expect("looks in time");
    }
}

#[tonic::async_trait]
impl Store for Known {
    async fn list(&self, request: Request<StoreListRequest>) -> Result<Response<StoreListResponse>, Status> {
        assert_eq!(request.metadata().get("containerd-namespace").unwrap(), daemon::NAMESPACE);
        *self.asked.lock().unwrap() += 1;
        let filters = request.into_inner().filters;
        let note = "x".repeat(*self.annotations.lock().unwrap());
        let ids = self.ids.lock().unwrap().clone();
        let asked = ids.into_iter().filter(|id| filters.contains(&format!("id==\"{id}\"")));
        let labels = || [("note".to_owned(), note.clone())].into();
        let list = asked.map(|sandbox_id| Sandbox { sandbox_id, labels: labels(), ..Default::default() }).collect();
        Ok(Response::new(StoreListResponse { list }))
    }

    async fn create(&self, _: Request<StoreCreateRequest>) -> Result<Response<StoreCreateResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn update(&self, _: Request<StoreUpdateRequest>) -> Result<Response<StoreUpdateResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn delete(&self, _: Request<StoreDeleteRequest>) -> Result<Response<StoreDeleteResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }

    async fn get(&self, _: Request<StoreGetRequest>) -> Result<Response<StoreGetResponse>, Status> {
        Err(Status::unimplemented("not asked for"))
    }
}

#[tonic::async_trait]
impl Containers for Known {
    async fn list(&self, request: Request<ListContainersRequest>) -> Result<Response<ListContainersResponse>, Status> {
        assert_eq!(request.metadata().get("containerd-namespace").unwrap(), daemon::NAMESPACE);
        let filters = request.into_inner().filters;
        let known = self.containers.lock().unwrap().clone();
        let asked = known.into_iter().filter(|id| filters.contains(&format!("id==\"{id}\"")));
        Ok(Response::new(ListContainersResponse { containers: asked.map(|id| Container { id }).collect() }))
    }
}

#[tonic::async_trait]
impl Tasks for Known {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        assert_eq!(request.metadata().get("containerd-namespace").unwrap(), daemon::NAMESPACE);
        let has = self.tasks.lock().unwrap().contains(&request.into_inner().container_id);
        if has { Ok(Response::new(GetResponse {})) } else { Err(Status::not_found("no running task found")) }
    }
}

async fn gc(daemon: &Daemon, dry_run: bool) -> Value {
    let answer = daemon.admin().await.gc(GcRequest { dry_run }).await.unwrap();
    serde_json::from_str(&answer.into_inner().json).unwrap()
}

/// Sandboxes and what became of them.
fn outcomes(report: &Value) -> Vec<(&str, &str)> {
    let items = report["collected"].as_array().unwrap().iter();
    let mut told: Vec<_> = items.map(|item| (item["sandbox"].as_str().unwrap(), item["outcome"].as_str().unwrap())).collect();
    told.sort_unstable();
    told
}

/// Makes a container in a new pod; its connection, without which it is in doubt.
async fn used(daemon: &Daemon, pod: &str, container: &str) -> TaskClient {
    daemon.pod(pod).await;
    made(daemon, pod, container).await.unwrap()
}

async fn made(daemon: &Daemon, pod: &str, container: &str) -> ttrpc::Result<TaskClient> {
    let task = daemon.task().await;
    task.create(daemon::context(), &daemon.container(pod, container, &Behaviour::Run.process())).await?;
    Ok(task)
}

/// The containers of a pod.
async fn containers(daemon: &Daemon, pod: &str) -> Vec<String> {
    let inspect = InspectRequest { namespace: String::new(), id: pod.into() };
    let json = daemon.admin().await.inspect(inspect).await.unwrap().into_inner().json;
    let status: Value = serde_json::from_str(&json).unwrap();
    let ids = status["containers"].as_array().unwrap().iter().map(|container| container["id"].as_str().unwrap().to_owned());
    ids.collect()
}

async fn gone(daemon: &Daemon, id: &str) {
    let wait = async {
        while exists(daemon, id).await {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::time::timeout(LONG, wait).await.expect("it to be removed in time");
}

async fn exists(daemon: &Daemon, id: &str) -> bool {
    let status = ControllerStatusRequest { sandbox_id: id.into(), ..Default::default() };
    match daemon.controller().await.status(request(status)).await {
        Ok(_) => true,
        Err(status) => {
            assert_eq!(status.code(), Code::NotFound);
            false
        }
    }
}

#[tokio::test]
async fn what_containerd_has_forgotten_goes() {
    let daemon = Daemon::start().await;
    let known = Known::default();
    known.set(&["kept", "lost", "only-created", "used"]);
    known.set_containers(&["c1"]);
    known.serve(&daemon);
    for id in ["kept", "lost"] {
        daemon.pod(id).await;
    }
    daemon.controller().await.create(request(create("only-created"))).await.unwrap();
    let _connection = used(&daemon, "used", "c1").await;
    known.looks(3).await;
    for id in ["kept", "lost", "only-created", "used"] {
        assert!(exists(&daemon, id).await, "{id}");
    }
    known.set(&["kept"]);
    for id in ["lost", "only-created"] {
        gone(&daemon, id).await;
    }
    // More than between two looks at those with containers.
    known.looks(15).await;
    assert!(exists(&daemon, "kept").await);
    assert!(exists(&daemon, "used").await, "containerd knows its container");
}

#[tokio::test]
async fn what_was_wiped_goes_with_its_containers() {
    let daemon = Daemon::start().await;
    let known = Known::default();
    known.set(&["kept", "wiped"]);
    known.set_containers(&["c1", "c2"]);
    known.serve(&daemon);
    let _connections = (used(&daemon, "kept", "c1").await, used(&daemon, "wiped", "c2").await);
    // Each at which sandboxes with containers are compared.
    known.looks(3).await;
    known.set(&["kept"]);
    known.looks(3).await;
    assert!(exists(&daemon, "wiped").await, "containerd knows its container");
    known.set_containers(&["c1"]);
    gone(&daemon, "wiped").await;
    known.looks(3).await;
    assert!(exists(&daemon, "kept").await);
}

#[tokio::test]
async fn a_collection_on_request_takes_one_look() {
    let daemon = Daemon::start_rarely_looking().await;
    let _connection = used(&daemon, "used", "c1").await;
    for id in ["kept", "lost"] {
        daemon.pod(id).await;
    }
    let report = gc(&daemon, false).await;
    assert!(report["unanswered"].as_str().unwrap().contains("containerd.sock"), "{report}");
    assert!(outcomes(&report).is_empty());

    // One that has listed none of ours may be another's.
    let known = Known::default();
    known.set(&["somebody"]);
    known.serve(&daemon);
    let report = gc(&daemon, false).await;
    assert_eq!(outcomes(&report), [("kept", "kept"), ("lost", "kept"), ("used", "kept")]);
    assert!(report["collected"][0]["why"].as_str().unwrap().contains("address"), "{report}");
    assert!(report["unanswered"].is_null());

    known.set(&["kept"]);
    known.set_containers(&["c1"]);
    assert_eq!(outcomes(&gc(&daemon, true).await), [("lost", "would_remove")]);
    assert!(exists(&daemon, "lost").await);
    assert_eq!(outcomes(&gc(&daemon, false).await), [("lost", "removed")]);
    assert!(!exists(&daemon, "lost").await);
    known.set_containers(&[]);
    let report = gc(&daemon, true).await;
    assert_eq!(outcomes(&report), [("used", "would_remove")]);
    assert_eq!(report["collected"][0]["processes"].as_array().unwrap().len(), 1);
    assert_eq!(outcomes(&gc(&daemon, false).await), [("used", "removed")]);
    assert_eq!(outcomes(&gc(&daemon, false).await), []);
    assert!(exists(&daemon, "kept").await);
}

#[tokio::test]
async fn what_was_set_aside_is_listed_and_inspected() {
    let daemon = Daemon::start_rarely_looking().await;
    let _connection = used(&daemon, "bad", "c1").await;
    daemon.pod("good").await;
    let file = daemon.state().join("sandboxes").join(daemon::NAMESPACE).join("bad/state.json");
    let (dir, gated) = daemon.stop().await;
    std::fs::write(&file, "").unwrap();
    let daemon = Daemon::start_in(dir, gated).await;
    let ask = async |namespace: &str| -> Value {
        let namespace = namespace.to_owned();
        serde_json::from_str(&daemon.admin().await.list(ListRequest { namespace }).await.unwrap().into_inner().json).unwrap()
    };
    let list = ask("").await;
    let ids: Vec<_> = list.as_array().unwrap().iter().map(|entry| entry["spec"]["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["good", "bad"]);
    let told = &list[1]["state"]["set_aside"];
    assert!(told["why"].as_str().unwrap().contains("empty") && told["processes"].as_array().unwrap().len() == 1, "{list}");
    assert_eq!(ask("other").await, serde_json::json!([]));
    let inspect = InspectRequest { namespace: String::new(), id: "ba".into() };
    let one = daemon.admin().await.inspect(inspect).await.unwrap().into_inner().json;
    assert_eq!(serde_json::from_str::<Value>(&one).unwrap(), list[1]);
    assert_eq!(outcomes(&gc(&daemon, false).await), [("bad", "kept")]);
    assert!(exists(&daemon, "good").await);
}

#[tokio::test]
async fn a_store_that_knows_none_of_ours_is_another_containerds() {
    let daemon = Daemon::start().await;
    let known = Known::default();
    known.set(&["of", "somebody", "else"]);
    known.serve(&daemon);
    daemon.pod("p1").await;
    known.looks(4).await;
    assert!(exists(&daemon, "p1").await);
}

/// Its connection is lost, and containerd makes another in its place.
#[tokio::test]
async fn what_containerd_has_given_up_is_ended_before_another_is_made() {
    let daemon = Daemon::start_rarely_looking().await;
    let known = Known::default();
    known.set(&["p"]);
    known.set_tasks(&["c1"]);
    known.serve(&daemon);
    let first = used(&daemon, "p", "c1").await;
    first.start(daemon::context(), &StartRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    drop(first);
    // As after a crash of all, of which containerd has noticed nothing yet.
    let second = made(&daemon, "p", "c2").await.unwrap();
    assert_eq!(containers(&daemon, "p").await, ["c1", "c2"], "containerd still has the first");
    known.set_tasks(&[]);
    let third = made(&daemon, "p", "c3").await.unwrap();
    // The second has a connection, so nobody has given it up.
    assert_eq!(containers(&daemon, "p").await, ["c2", "c3"]);
    drop((second, third));
    // A containerd that does not know the sandbox has given nothing up.
    known.set(&[]);
    let _fourth = made(&daemon, "p", "c4").await.unwrap();
    assert_eq!(containers(&daemon, "p").await, ["c2", "c3", "c4"]);
}

#[tokio::test]
async fn what_containerd_has_given_up_is_ended_in_any_case() {
    let daemon = Daemon::start().await;
    let known = Known::default();
    known.set(&["p"]);
    known.set_tasks(&["c2"]);
    let _attached = used(&daemon, "p", "c0").await;
    drop((made(&daemon, "p", "c1").await.unwrap(), made(&daemon, "p", "c2").await.unwrap()));
    known.serve(&daemon);
    let ended = async {
        while containers(&daemon, "p").await != ["c0", "c2"] {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    };
    tokio::time::timeout(LONG, ended).await.expect("it to be ended in time");
    known.looks(30).await;
    assert_eq!(containers(&daemon, "p").await, ["c0", "c2"]);
}

#[tokio::test]
async fn a_collection_on_request_names_what_containerd_has_given_up() {
    let daemon = Daemon::start_rarely_looking().await;
    let known = Known::default();
    known.set(&["p"]);
    known.serve(&daemon);
    drop(used(&daemon, "p", "c1").await);
    let report = gc(&daemon, true).await;
    assert_eq!(outcomes(&report), [("p", "would_remove")]);
    let item = &report["collected"][0];
    assert_eq!((item["kind"].as_str(), item["what"].as_str()), (Some("abandoned"), Some("container c1")), "{report}");
    assert_eq!(containers(&daemon, "p").await, ["c1"]);
    assert_eq!(outcomes(&gc(&daemon, false).await), [("p", "removed")]);
    assert!(containers(&daemon, "p").await.is_empty());
}

/// Nobody tells whether the container in doubt is still wanted.
#[tokio::test]
async fn a_creation_waits_for_containerd_for_a_while_only() {
    let daemon = Daemon::start().await;
    let known = Known::default();
    known.set(&["p"]);
    let server = known.serve(&daemon);
    daemon.pod("p").await;
    known.looks(3).await;
    drop(made(&daemon, "p", "c1").await.unwrap());
    server.abort();
    let _ = server.await;
    let (code, text) = daemon::status(made(&daemon, "p", "c2").await.map(drop));
    assert_eq!(code, ttrpc::Code::UNAVAILABLE);
    assert!(text.contains("containerd.sock") && text.contains("try again"), "{text}");
    assert_eq!(containers(&daemon, "p").await, ["c1"]);
}

/// Answers of more than gRPC takes by default.
#[tokio::test]
async fn annotations_hide_nothing() {
    let daemon = Daemon::start_rarely_looking().await;
    let known = Known::default();
    let ids: Vec<String> = (0..20).map(|number| format!("p{number}")).collect();
    *known.annotations.lock().unwrap() = 256 << 10;
    known.serve(&daemon);
    for id in &ids {
        let mut create = create(id);
        create.annotations.insert("note".into(), "x".repeat(256 << 10));
        daemon.controller().await.create(request(create)).await.unwrap();
    }
    let all: Vec<&str> = ids.iter().map(String::as_str).collect();
    known.set(&all[1..]);
    assert_eq!(outcomes(&gc(&daemon, true).await), [("p0", "would_remove")]);
    let list = daemon.admin().await.list(ListRequest::default()).await.unwrap().into_inner().json;
    assert_eq!(serde_json::from_str::<Value>(&list).unwrap().as_array().unwrap().len(), 20);
}
