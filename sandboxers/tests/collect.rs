//! Collection on request, on the fake sandboxer.

#![allow(clippy::unwrap_used)] // a test may

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use kuasar_sandboxers::{
    Error, Known, Leftover, Result, Sandbox, SandboxContext, Sandboxer,
    collect::{Collected, Kind, Outcome},
    event::{EventSink, Notices},
    fake::{self, Behaviour, FakeSandboxer, World},
    fdstore::FdStore,
    id::{Namespace, SandboxId},
    reaper::Reaper,
    registry::Registry,
    spec::OciSpec,
    stdio::{Stdio, StreamHub},
    types::{Capabilities, ContainerSpec, SandboxSpec},
};
use serde_json::{Value, json};
use tokio::sync::Notify;

/// The fake, in which a creation can be held up when everything of it is there, and before anybody is told.
#[derive(Clone)]
struct Held {
    fake: FakeSandboxer,
    made: Arc<Notify>,
    go: Arc<Notify>,
    /// Something to be done when leftovers have been looked for.
    after_scan: Arc<Mutex<Option<Hook>>>,
}

type Hook = Box<dyn FnOnce() -> futures::future::BoxFuture<'static, ()> + Send>;

#[async_trait]
impl Sandboxer for Held {
    fn capabilities(&self) -> Capabilities {
        self.fake.capabilities()
    }

    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        let sandbox = self.fake.create(spec.clone(), context).await?;
        if spec.annotations.contains_key("test/hold") {
            self.made.notify_one();
            self.go.notified().await;
        }
        Ok(sandbox)
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        self.fake.recover(spec, context, record).await
    }

    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>> {
        let found = self.fake.leftovers(known).await;
        let hook = self.after_scan.lock().unwrap().take();
        if let Some(hook) = hook {
            hook().await;
        }
        found
    }

    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        self.fake.processes(namespace, id).await
    }
}

/// What outlives daemons.
struct Node {
    dir: tempfile::TempDir,
    world: World,
    reaper: Reaper,
}

impl Node {
    /// A daemon that has recovered.
    async fn daemon(&self) -> (Registry, Held) {
        let held = Held {
            fake: FakeSandboxer::new(self.world.clone()),
            made: Arc::default(),
            go: Arc::default(),
            after_scan: Arc::default(),
        };
        let sandboxers = BTreeMap::from([("fake".to_owned(), Arc::new(held.clone()) as Arc<dyn Sandboxer>)]);
        let (sink, _) = EventSink::channel();
        let (reaper, fds) = (self.reaper.clone(), FdStore::default());
        let registry = Registry::new(self.dir.path(), sandboxers, sink, StreamHub::default(), reaper, fds).unwrap();
        registry.recover().await.unwrap().finished().await.unwrap();
        (registry, held)
    }

    /// A sandbox with a container that an earlier daemon has made and never saved; the pid of the container.
    async fn leave(&self, id: &str) -> u32 {
        let context = SandboxContext {
            dir: self.dir.path().join(id),
            notices: Notices::channel().0,
            reaper: self.reaper.clone(),
            streams: StreamHub::default(),
            fds: FdStore::default(),
        };
        let earlier = FakeSandboxer::new(self.world.clone());
        let sandbox = earlier.create(Arc::new(fake::spec(id)), context).await.unwrap();
        let container = sandbox.create_container(running(self.dir.path(), &format!("{id}-c"))).await.unwrap();
        container.pid().unwrap()
    }

    fn state_file(&self, id: &str) -> std::path::PathBuf {
        self.dir.path().join("sandboxes/test").join(id).join("state.json")
    }
}

async fn pod(registry: &Registry, id: &str) {
    registry.create(fake::spec(id)).await.unwrap();
    registry.sandbox(&"test".parse().unwrap(), &id.parse().unwrap()).unwrap().start().await.unwrap();
}

fn running(dir: &Path, id: &str) -> ContainerSpec {
    let spec = json!({"process": Behaviour::Run.process(), "root": {"path": "rootfs"}}).to_string();
    let spec = OciSpec::parse(spec.as_bytes()).unwrap();
    let id = id.parse().unwrap();
    ContainerSpec { bundle: dir.join("bundle"), id, spec, rootfs: Vec::new(), stdio: Stdio::default() }
}

async fn container(registry: &Registry, dir: &Path, pod: &str, id: &str) -> u32 {
    let spec = running(dir, id);
    registry.sandbox(&"test".parse().unwrap(), &pod.parse().unwrap()).unwrap().create_container(spec).await.unwrap()
}

fn told(collected: &[Collected]) -> Vec<(Kind, &str, &Outcome)> {
    collected.iter().map(|item| (item.kind, item.sandbox.as_str(), &item.outcome)).collect()
}

// One test: the reaper is one for the process.
#[tokio::test]
async fn collection() {
    let reaper = Reaper::install().unwrap();
    let node = || Node { dir: tempfile::tempdir().unwrap(), world: World::default(), reaper: reaper.clone() };
    what_nobody_knows_goes_and_nothing_else(node()).await;
    what_is_being_created_is_left_alone(node()).await;
    what_is_created_after_the_look_is_left_alone(node()).await;
    what_is_set_aside_goes_when_its_processes_have_gone(node()).await;
    what_could_not_be_taken_over_is_kept(node()).await;
}

async fn what_nobody_knows_goes_and_nothing_else(node: Node) {
    let (registry, _) = node.daemon().await;
    pod(&registry, "kept").await;
    container(&registry, node.dir.path(), "kept", "kept-c").await;
    assert!(registry.collect(false).await.unwrap().is_empty());
    let pid = node.leave("lost").await;
    for (dry_run, outcome) in [(true, Outcome::WouldRemove), (true, Outcome::WouldRemove), (false, Outcome::Removed)] {
        let collected = registry.collect(dry_run).await.unwrap();
        // The sandbox and its container.
        let expected = (Kind::Leftover, "lost", &outcome);
        assert_eq!(told(&collected), [expected; 2]);
        if dry_run {
            assert_eq!(collected[0].processes, [pid]);
        }
        assert_eq!(node.world.held().iter().any(|what| what.contains("lost")), dry_run);
        assert!(node.world.held().contains(&"container kept-c".to_owned()));
    }
    assert!(registry.collect(false).await.unwrap().is_empty());
}

async fn what_is_being_created_is_left_alone(node: Node) {
    let (registry, held) = node.daemon().await;
    let mut spec = fake::spec("new");
    spec.annotations.insert("test/hold".into(), String::new());
    let creation = tokio::spawn({
        let registry = registry.clone();
        async move { registry.create(spec).await }
    });
    held.made.notified().await;
    assert!(registry.collect(false).await.unwrap().is_empty());
    held.go.notify_one();
    creation.await.unwrap().unwrap();
    assert!(registry.collect(false).await.unwrap().is_empty());
    assert!(node.world.held().contains(&"sandbox new".to_owned()));
}

async fn what_is_created_after_the_look_is_left_alone(node: Node) {
    let (registry, held) = node.daemon().await;
    node.leave("lost").await;
    // What has been noted as known does not have it, what has been found has.
    let creating = registry.clone();
    *held.after_scan.lock().unwrap() = Some(Box::new(move || {
        Box::pin(async move {
            creating.create(fake::spec("lost")).await.unwrap();
        })
    }));
    assert!(registry.collect(false).await.unwrap().is_empty());
    assert!(registry.sandbox(&"test".parse().unwrap(), &"lost".parse().unwrap()).unwrap().status().await.is_ok());
    assert!(node.world.held().contains(&"sandbox lost".to_owned()));
}

/// Two pods of an earlier daemon, and the pid of a container in the bad one. On a runtime of its own: that daemon has to be dead before
/// its successor comes, or it would save what happens to its containers.
async fn earlier(node: &Arc<Node>) -> u32 {
    let node = node.clone();
    let run = async move {
        let (registry, _) = node.daemon().await;
        for id in ["good", "bad"] {
            pod(&registry, id).await;
        }
        container(&registry, node.dir.path(), "bad", "bad-c").await
    };
    tokio::task::spawn_blocking(|| tokio::runtime::Runtime::new().unwrap().block_on(run)).await.unwrap()
}

async fn what_could_not_be_taken_over_is_kept(node: Node) {
    let node = Arc::new(node);
    earlier(&node).await;
    let file = node.state_file("bad");
    let mut state: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    state["backend"] = "of another form".into();
    fs::write(&file, state.to_string()).unwrap();
    let held = node.world.held();
    let (registry, _) = node.daemon().await;
    let collected = registry.collect(false).await.unwrap();
    assert_eq!(told(&collected), [(Kind::Unrecovered, "bad", &Outcome::Kept)]);
    assert!(registry.set_aside().await.unwrap().is_empty());
    assert_eq!(node.world.held(), held);
    assert!(file.exists());
}

async fn what_is_set_aside_goes_when_its_processes_have_gone(node: Node) {
    let node = Arc::new(node);
    let pid = earlier(&node).await;
    fs::write(node.state_file("bad"), "{").unwrap();
    let (registry, _) = node.daemon().await;
    let [set_aside] = <[_; 1]>::try_from(registry.set_aside().await.unwrap()).unwrap();
    assert_eq!((set_aside.entry.id.as_str(), set_aside.processes.unwrap()), ("bad", vec![pid]));
    assert!(set_aside.why.contains("not JSON"), "{}", set_aside.why);
    // Its processes live: nothing of it is touched.
    for dry_run in [true, false] {
        let collected = registry.collect(dry_run).await.unwrap();
        assert_eq!(told(&collected), [(Kind::SetAside, "bad", &Outcome::Kept)]);
        assert_eq!(collected[0].processes, [pid]);
    }
    assert!(matches!(registry.create(fake::spec("bad")).await, Err(Error::AlreadyExists { .. })));
    node.world.kill(pid);
    for (dry_run, outcome) in [(true, Outcome::WouldRemove), (false, Outcome::Removed)] {
        let collected = registry.collect(dry_run).await.unwrap();
        assert_eq!(told(&collected), [(Kind::SetAside, "bad", &outcome)]);
        assert_eq!(node.state_file("bad").parent().unwrap().exists(), dry_run);
    }
    assert!(registry.set_aside().await.unwrap().is_empty());
    assert!(!node.world.held().iter().any(|what| what.contains("bad")), "{:?}", node.world.held());
    assert!(registry.sandbox(&"test".parse().unwrap(), &"good".parse().unwrap()).unwrap().status().await.is_ok());
    registry.create(fake::spec("bad")).await.unwrap();
}
