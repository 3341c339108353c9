//! The suite over the contract, on real OCI runtimes, in pods that share their process ids and in pods that do not.

mod host;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use kuasar_runc::{RuncConfig, RuncSandboxer, Runtime};
use kuasar_sandboxers::{
    Sandboxer, busybox,
    conformance::{self, Fixture},
    fake::Behaviour,
    id::{ContainerId, ExecId},
    reaper::Reaper,
    stdio::Stdio,
    types::{ContainerSpec, ExecSpec, NamespaceMode, SandboxSpec},
};

const MARK: &str = "kuasar-runc-conformance";

struct Runc {
    runtime: Runtime,
    reaper: Reaper,
    rootfs: PathBuf,
    pid: NamespaceMode,
}

impl Fixture for Runc {
    fn sandboxer(&self, root: &Path) -> Arc<dyn Sandboxer> {
        let config = RuncConfig { root: root.to_owned(), ..RuncConfig::default() };
        Arc::new(RuncSandboxer::new(config, self.runtime.clone(), self.reaper.clone()))
    }

    fn sandbox(&self, id: &str) -> SandboxSpec {
        host::pod("runc", id, self.pid)
    }

    fn container(&self, dir: &Path, id: ContainerId, behaviour: Behaviour) -> ContainerSpec {
        let pid = (self.pid != NamespaceMode::Container).then_some("/proc/0/ns/pid");
        let spec = busybox::oci(busybox::behaviour(behaviour), pid, &format!("/{MARK}/{id}"));
        host::container(dir, &self.rootfs, id, spec, Stdio::default())
    }

    fn exec(&self, id: ExecId, behaviour: Behaviour) -> ExecSpec {
        ExecSpec { id, process: busybox::behaviour(behaviour), stdio: Stdio::default() }
    }

    fn held(&self, root: &Path) -> Vec<String> {
        host::held(root, MARK)
    }

    fn reaper(&self) -> Reaper {
        self.reaper.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance() {
    let reaper = Reaper::install().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    let mut passed = 0;
    for runtime in host::runtimes("conformance", &reaper).await {
        let rootfs = dir.path().join("rootfs");
        if !rootfs.exists() {
            busybox::make_rootfs(&rootfs).unwrap();
        }
        for pid in [NamespaceMode::Container, NamespaceMode::Pod, NamespaceMode::Node] {
            let fixture = Runc { runtime: runtime.clone(), reaper: reaper.clone(), rootfs: rootfs.clone(), pid };
            for (case, outcome) in conformance::run(&fixture).await {
                match outcome {
                    Ok(()) => passed += 1,
                    Err(why) => failures.push(format!("{runtime}, pid {pid:?}, {case}: {why}")),
                }
            }
        }
    }
    host::remove_groups(MARK);
    println!("{passed} cases passed");
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
}
