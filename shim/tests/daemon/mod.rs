//! A daemon over the fake sandboxer, in the test's own process, on real sockets.
#![allow(dead_code, unreachable_pub)] // each test file uses a part
#![allow(clippy::unwrap_used, clippy::expect_used)] // it is test code, though not in a test function

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{CreateTaskRequest, Empty, ForwardRequest},
    shim::event::Envelope,
    shim_async::{Events, TaskClient, create_events},
};
use hyper_util::rt::TokioIo;
use k8s_cri::v1 as cri;
use kuasar_sandboxers::{
    Known, Leftover, Result, Sandbox, SandboxContext, Sandboxer,
    event::EventSink,
    fake::{FakeSandboxer, World},
    fdstore::FdStore,
    id::{Namespace, SandboxId},
    reaper::Reaper,
    registry::Registry,
    stdio::StreamHub,
    types::{Capabilities, SandboxSpec},
};
use kuasar_shim::{
    admin::Configured,
    proto::{
        admin::admin_client::AdminClient,
        sandbox::{ControllerCreateRequest, ControllerStartRequest, controller_client::ControllerClient},
    },
    server::{CONTROL_SOCKET, Parts, StateDir, TASK_SOCKET, serve},
};
use prost::Message;
use prost_types::Any;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::{UnixListener, UnixStream},
    runtime::{Builder, Handle},
    sync::{Notify, Semaphore, oneshot},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};
use ttrpc::{
    r#async::{Client, Server, TtrpcContext},
    asynchronous::transport::Socket,
    context::Context,
};

/// The namespace all requests of these tests are in.
pub const NAMESPACE: &str = "k8s.io";

/// No condition these tests wait for takes this long.
pub const LONG: Duration = Duration::from_secs(20);

/// How often these daemons look for what containerd has forgotten.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// The fake, but a sandbox with the annotation `test/gate` is made only when the gate opens.
#[derive(Clone)]
pub struct Gated {
    pub fake: FakeSandboxer,
    pub gate: Arc<Semaphore>,
    pub arrived: Arc<Notify>,
}

#[async_trait]
impl Sandboxer for Gated {
    fn capabilities(&self) -> Capabilities {
        self.fake.capabilities()
    }

    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        if spec.annotations.contains_key("test/gate") {
            self.arrived.notify_one();
            self.gate.acquire().await.unwrap().forget();
        }
        assert!(!spec.annotations.contains_key("test/panic"), "a panic on purpose");
        self.fake.create(spec, context).await
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        self.fake.recover(spec, context, record).await
    }

    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>> {
        self.fake.leftovers(known).await
    }

    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        self.fake.processes(namespace, id).await
    }
}

/// containerd's events service, which keeps what it gets.
#[derive(Default)]
pub struct Inbox {
    seen: Mutex<Vec<Envelope>>,
    changed: Notify,
}

struct Face(Arc<Inbox>);

#[async_trait]
impl Events for Face {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.seen.lock().unwrap().push(request.envelope.unwrap());
        self.0.changed.notify_waiters();
        Ok(Empty::default())
    }
}

impl Inbox {
    /// Topics of the first events, when so many have come.
    pub async fn topics(&self, count: usize) -> Vec<String> {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                let seen: Vec<_> = self.seen.lock().unwrap().iter().map(|event| event.topic.clone()).collect();
                if seen.len() >= count {
                    return seen;
                }
                changed.await;
            }
        };
        tokio::time::timeout(LONG, wait).await.expect("events in time")
    }
}

pub struct Daemon {
    pub dir: Arc<TempDir>,
    pub gated: Gated,
    pub hub: StreamHub,
    pub inbox: Arc<Inbox>,
    pub stop: CancellationToken,
    pub served: JoinHandle<Result<()>>,
    _containerd: Server,
}

impl Daemon {
    pub async fn start() -> Self {
        Self::start_looking(LOOK_INTERVAL).await
    }

    /// One that looks for what containerd has forgotten when it is asked to.
    pub async fn start_rarely_looking() -> Self {
        Self::start_looking(Duration::from_secs(3600)).await
    }

    async fn start_looking(interval: Duration) -> Self {
        let gated =
            Gated { fake: FakeSandboxer::default(), gate: Arc::new(Semaphore::new(0)), arrived: Arc::new(Notify::new()) };
        Self::start_with(Arc::new(tempfile::tempdir().unwrap()), gated, interval).await
    }

    /// A daemon in a directory and a world that may be an earlier one's.
    pub async fn start_in(dir: Arc<TempDir>, gated: Gated) -> Self {
        Self::start_with(dir, gated, LOOK_INTERVAL).await
    }

    async fn start_with(dir: Arc<TempDir>, gated: Gated, look_interval: Duration) -> Self {
        let containerd = dir.path().join("containerd.sock");
        let inbox = Arc::new(Inbox::default());
        let events_socket = kuasar_shim::events::address(&containerd);
        let _ = std::fs::remove_file(&events_socket);
        let mut server = Server::new()
            .add_listener(UnixListener::bind(&events_socket).unwrap().into())
            .register_service(create_events(Arc::new(Face(inbox.clone()))));
        server.start().await.unwrap();

        let state = StateDir::claim(&dir.path().join("state")).unwrap();
        let hub = StreamHub::default();
        let (sink, events) = EventSink::channel();
        let sandboxers: BTreeMap<String, Arc<dyn Sandboxer>> = [("fake".to_owned(), Arc::new(gated.clone()) as _)].into();
        let reaper = Reaper::install().unwrap();
        let registry = Registry::new(state.path(), sandboxers, sink, hub.clone(), reaper, FdStore::default()).unwrap();
        registry.recover().await.unwrap();
        let parts = Parts {
            registry,
            hub: hub.clone(),
            events,
            workers: Handle::current(),
            containerd,
            configured: Configured { file: "/no/config.toml".into(), text: String::new() },
            upgrades: None,
            grace: Duration::from_secs(2),
            look_interval,
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (ready, bound) = oneshot::channel();
        let (tell, ended) = oneshot::channel();
        // As in the daemon: the sockets have a thread of their own, whatever the test runs on.
        std::thread::spawn(move || {
            let result = Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                let sockets = state.bind().unwrap();
                ready.send(()).unwrap();
                serve(&state, sockets, parts, stopped).await
            });
            drop(state);
            let _ = tell.send(result);
        });
        bound.await.unwrap();
        let served = tokio::spawn(async move { ended.await.unwrap().map(|_| ()) });
        Self { dir, gated, hub, inbox, stop, served, _containerd: server }
    }

    pub async fn stop(self) -> (Arc<TempDir>, Gated) {
        self.stop.cancel();
        tokio::time::timeout(LONG, self.served).await.expect("the end in time").unwrap().unwrap();
        (self.dir, self.gated)
    }

    pub fn world(&self) -> &World {
        &self.gated.fake.world
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub async fn channel(&self) -> Channel {
        let path = self.state().join(CONTROL_SOCKET);
        let connect = move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        };
        Endpoint::from_static("http://localhost").connect_with_connector(tower::service_fn(connect)).await.unwrap()
    }

    pub async fn controller(&self) -> ControllerClient<Channel> {
        ControllerClient::new(self.channel().await)
    }

    pub async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel().await)
    }

    pub async fn client(&self) -> Client {
        let stream = UnixStream::connect(self.state().join(TASK_SOCKET)).await.unwrap();
        Client::new(Socket::new(stream))
    }

    pub async fn task(&self) -> TaskClient {
        TaskClient::new(self.client().await)
    }

    /// A pod that is ready.
    pub async fn pod(&self, id: &str) -> ControllerClient<Channel> {
        let mut controller = self.controller().await;
        controller.create(request(create(id))).await.unwrap();
        controller.start(request(ControllerStartRequest { sandbox_id: id.into(), ..Default::default() })).await.unwrap();
        controller
    }

    /// A bundle directory for a container whose process does `process`, and the request for it.
    pub fn container(&self, sandbox: &str, id: &str, process: &Value) -> CreateTaskRequest {
        let config = json!({"ociVersion": "1.2.0", "process": process, "root": {"path": "rootfs"}});
        self.bundle(sandbox, id, &config.to_string())
    }

    /// The same with any text for the spec.
    pub fn bundle(&self, sandbox: &str, id: &str, config: &str) -> CreateTaskRequest {
        let bundle = self.dir.path().join("bundles").join(id);
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::write(bundle.join("config.json"), config).unwrap();
        std::fs::write(bundle.join("sandbox"), sandbox).unwrap();
        CreateTaskRequest { id: id.into(), bundle: text(&bundle), ..Default::default() }
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A Create request for a pod with the node's network.
pub fn create(id: &str) -> ControllerCreateRequest {
    let options = cri::NamespaceOption { network: cri::NamespaceMode::Node as i32, ..Default::default() };
    let config = cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata { name: id.into(), ..Default::default() }),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    };
    ControllerCreateRequest {
        sandbox_id: id.into(),
        options: Some(Any { type_url: "runtime.v1.PodSandboxConfig".into(), value: config.encode_to_vec() }),
        sandboxer: "fake".into(),
        ..Default::default()
    }
}

/// The same with an annotation.
pub fn annotated(id: &str, annotation: &str) -> ControllerCreateRequest {
    ControllerCreateRequest { annotations: [(annotation.to_owned(), String::new())].into(), ..create(id) }
}

/// A gRPC request in [`NAMESPACE`].
pub fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("containerd-namespace", NAMESPACE.parse().unwrap());
    request
}

/// The context of a ttrpc request in [`NAMESPACE`].
pub fn context() -> Context {
    let mut context = ttrpc::context::with_duration(LONG);
    context.add("containerd-namespace-ttrpc".into(), NAMESPACE.into());
    context
}

/// The status a ttrpc call failed with.
pub fn status<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?} is no status"),
    }
}
