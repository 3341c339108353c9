//! Sandboxes that containerd has forgotten are removed, and no others.
#![allow(clippy::unwrap_used, clippy::expect_used)] // also in what is no test function

mod daemon;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use daemon::{Daemon, LONG, LOOK_INTERVAL, create, request};
use kuasar_sandboxers::fake::Behaviour;
use kuasar_shim::proto::{
    sandbox::{
        ControllerStatusRequest, StoreCreateRequest, StoreCreateResponse, StoreDeleteRequest, StoreDeleteResponse,
        StoreGetRequest, StoreGetResponse, StoreListRequest, StoreListResponse, StoreUpdateRequest, StoreUpdateResponse,
        store_server::{Store, StoreServer},
    },
    types::Sandbox,
};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status};

/// containerd's store, as far as it is asked.
#[derive(Clone, Default)]
struct Known {
    ids: Arc<Mutex<BTreeSet<String>>>,
    asked: Arc<Mutex<usize>>,
}

impl Known {
    fn serve(&self, daemon: &Daemon) {
        let listener = UnixListener::bind(daemon.dir.path().join("containerd.sock")).unwrap();
        let server = tonic::transport::Server::builder().add_service(StoreServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    }

    fn set(&self, ids: &[&str]) {
        *self.ids.lock().unwrap() = ids.iter().map(|id| (*id).to_owned()).collect();
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
        let ids = self.ids.lock().unwrap().clone();
        let list = ids.into_iter().map(|sandbox_id| Sandbox { sandbox_id, ..Default::default() }).collect();
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
    known.serve(&daemon);
    for id in ["kept", "lost", "used"] {
        daemon.pod(id).await;
    }
    daemon.controller().await.create(request(create("only-created"))).await.unwrap();
    let task = daemon.task().await;
    task.create(daemon::context(), &daemon.container("used", "c1", &Behaviour::Run.process())).await.unwrap();
    known.looks(3).await;
    for id in ["kept", "lost", "only-created", "used"] {
        assert!(exists(&daemon, id).await, "{id}");
    }
    known.set(&["kept"]);
    tokio::time::timeout(LONG, async {
        while exists(&daemon, "lost").await || exists(&daemon, "only-created").await {
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    })
    .await
    .expect("both to be removed in time");
    known.looks(3).await;
    assert!(exists(&daemon, "kept").await);
    assert!(exists(&daemon, "used").await, "a container runs in it");
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
