//! What backends notice by themselves: told once, by the next daemon too, and of their own containers only.
#![allow(clippy::unwrap_used, clippy::expect_used)] // also in what is no test function

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use kuasar_sandboxers::{
    Known, Leftover, Result, Sandbox, SandboxContext, Sandboxer,
    event::{EventKind, EventSink, Notice, Notices, Sent},
    fake::{self, Behaviour, FakeSandboxer},
    fdstore::FdStore,
    id::{Namespace, SandboxId},
    reaper::Reaper,
    registry::Registry,
    spec::OciSpec,
    stdio::{Stdio, StreamHub},
    types::{Capabilities, ContainerSpec, SandboxSpec},
};
use serde_json::{Value, json};
use tokio::{sync::mpsc::UnboundedReceiver, time::timeout};

const LONG: Duration = Duration::from_secs(20);

/// The fake, of whose last sandbox the test reports what it likes.
#[derive(Clone, Default)]
struct Reporting {
    fake: FakeSandboxer,
    notices: Arc<Mutex<Option<Notices>>>,
}

#[async_trait]
impl Sandboxer for Reporting {
    fn capabilities(&self) -> Capabilities {
        self.fake.capabilities()
    }

    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        *self.notices.lock().unwrap() = Some(context.notices.clone());
        self.fake.create(spec, context).await
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        *self.notices.lock().unwrap() = Some(context.notices.clone());
        self.fake.recover(spec, context, record).await
    }

    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>> {
        self.fake.leftovers(known).await
    }

    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        self.fake.processes(namespace, id).await
    }
}

impl Reporting {
    /// Reports kills, and waits until that is saved.
    async fn report(&self, container: &str, kills: Option<u64>) {
        let notices = self.notices.lock().unwrap().clone().unwrap();
        let reported = notices.report(&container.parse().unwrap(), Notice::OutOfMemory { kills });
        timeout(LONG, reported).await.expect("a report that is kept, or not");
    }
}

async fn daemon(state: &Path, sandboxer: &Reporting) -> (Registry, UnboundedReceiver<Sent>) {
    let (sink, events) = EventSink::channel();
    let sandboxers: BTreeMap<String, Arc<dyn Sandboxer>> = [("fake".to_owned(), Arc::new(sandboxer.clone()) as _)].into();
    let reaper = Reaper::install().unwrap();
    let registry = Registry::new(state, sandboxers, sink, StreamHub::default(), reaper, FdStore::default()).unwrap();
    registry.recover().await.unwrap().finished().await.unwrap();
    (registry, events)
}

/// Containers whose kills are told now.
async fn told(registry: &Registry, events: &mut UnboundedReceiver<Sent>) -> Vec<String> {
    let mut told = Vec::new();
    // What was reported is saved, and what is saved is sent before the next request is answered.
    let sandbox = registry.sandbox(&"test".parse().unwrap(), &"pod".parse().unwrap()).unwrap();
    timeout(LONG, sandbox.status()).await.unwrap().unwrap();
    while let Ok(sent) = events.try_recv() {
        if sent.event.kind == EventKind::OutOfMemory {
            told.push(sent.event.container.to_string());
        }
    }
    told
}

#[tokio::test]
async fn kills_are_told_once_and_outlive_the_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let sandboxer = Reporting::default();
    let (registry, mut events) = daemon(dir.path(), &sandboxer).await;
    let spec = fake::spec("pod");
    let (namespace, id) = (spec.namespace.clone(), spec.id.clone());
    registry.create(spec).await.unwrap();
    let sandbox = registry.sandbox(&namespace, &id).unwrap();
    sandbox.start().await.unwrap();
    for container in ["one", "other"] {
        let spec = json!({"ociVersion": "1.2.0", "process": Behaviour::Run.process(), "root": {"path": "rootfs"}});
        let container = ContainerSpec {
            id: container.parse().unwrap(),
            bundle: dir.path().join("bundles").join(container),
            spec: OciSpec::try_from(spec).unwrap(),
            rootfs: Vec::new(),
            stdio: Stdio::default(),
        };
        sandbox.create_container(container).await.unwrap();
    }

    sandboxer.report("one", Some(1)).await;
    let file = dir.path().join("sandboxes").join(namespace.as_str()).join("pod/state.json");
    let saved: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert!(saved["events"].as_array().unwrap().iter().any(|event| event["kind"] == "out_of_memory"), "{saved}");
    assert_eq!(told(&registry, &mut events).await, ["one"]);
    // The same again; more while the first waits; one that does not count; somebody else's container; another of its own.
    for (container, kills) in [("one", Some(1)), ("one", Some(2)), ("one", None), ("foreign", Some(7)), ("other", Some(1))] {
        sandboxer.report(container, kills).await;
    }
    assert_eq!(told(&registry, &mut events).await, ["other"]);

    // containerd has taken none of it when the daemon dies; the next one's backend counts from the beginning.
    drop((sandbox, registry, events));
    let (registry, mut events) = daemon(dir.path(), &sandboxer).await;
    let mut again = told(&registry, &mut events).await;
    again.sort();
    assert_eq!(again, ["one", "other"]);
    sandboxer.report("other", Some(1)).await;
    assert!(told(&registry, &mut events).await.is_empty(), "it was told by the daemon before");

    // As a version before this one has saved it: a kill while no daemon was there is told.
    drop((registry, events));
    let mut saved: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    saved["events"] = json!([]);
    for container in saved["containers"].as_array_mut().unwrap() {
        container.as_object_mut().unwrap().remove("oom_kills").expect("a count of what was told");
    }
    fs::write(&file, saved.to_string()).unwrap();
    let (registry, mut events) = daemon(dir.path(), &sandboxer).await;
    assert!(told(&registry, &mut events).await.is_empty());
    sandboxer.report("other", Some(1)).await;
    assert_eq!(told(&registry, &mut events).await, ["other"]);
}
