//! The conformance suite over the contract, on the fake sandboxer: that checks the suite, the owner task and the fake at once.

#![allow(clippy::expect_used, reason = "a fixture that cannot be made fails the test")]

use std::{path::Path, sync::Arc};

use kuasar_sandboxers::{
    Sandboxer,
    conformance::{self, Fixture},
    fake::{self, Behaviour, FakeSandboxer, World},
    id::{ContainerId, ExecId},
    reaper::Reaper,
    spec::OciSpec,
    stdio::Stdio,
    types::{ContainerSpec, ExecSpec, SandboxSpec},
};
use serde_json::json;

struct Fake {
    world: World,
    reaper: Reaper,
}

impl Fixture for Fake {
    fn sandboxer(&self, _root: &Path) -> Arc<dyn Sandboxer> {
        Arc::new(FakeSandboxer::new(self.world.clone()))
    }

    fn sandbox(&self, id: &str) -> SandboxSpec {
        fake::spec(id)
    }

    fn container(&self, dir: &Path, id: ContainerId, behaviour: Behaviour) -> ContainerSpec {
        let spec = json!({"process": behaviour.process(), "root": {"path": "rootfs"}}).to_string();
        ContainerSpec {
            bundle: dir.join(&id),
            id,
            spec: OciSpec::parse(spec.as_bytes()).expect("a valid spec"),
            rootfs: Vec::new(),
            stdio: Stdio::default(),
        }
    }

    fn exec(&self, id: ExecId, behaviour: Behaviour) -> ExecSpec {
        ExecSpec { id, process: behaviour.process(), stdio: Stdio::default() }
    }

    fn held(&self, _root: &Path) -> Vec<String> {
        self.world.held()
    }

    fn reaper(&self) -> Reaper {
        self.reaper.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fake_sandboxer_conforms() {
    let fixture = Fake { world: World::default(), reaper: Reaper::install().unwrap() };
    let mut failed = 0;
    for (name, outcome) in conformance::run(&fixture).await {
        println!("{name}: {outcome:?}");
        failed += usize::from(outcome.is_err());
    }
    assert_eq!(failed, 0);
}
