//! The suite over the contract, with a real machine for each of its pods.

#![allow(clippy::unwrap_used, reason = "what fails fails the test")]

mod machines;

use std::{
    fs::{self, File},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use kuasar_sandboxers::{
    Sandboxer, busybox,
    cgroup::Cgroup,
    conformance::{self, Fixture},
    fake::{self, Behaviour},
    id::{ContainerId, ExecId},
    process,
    reaper::Reaper,
    spec::OciSpec,
    stdio::Stdio,
    types::{ContainerSpec, ExecSpec, Mount, SandboxSpec},
};
use kuasar_vmm::{HypervisorConfig, VmmConfig, VmmSandboxer, qemu::Machine};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::{runtime::Handle, task::block_in_place};

struct Machines {
    kernel: PathBuf,
    rootfs: PathBuf,
    /// What CNI would have made, without interfaces.
    network: File,
    /// The parent of the pods' control groups.
    group: PathBuf,
}

impl Machines {
    /// The machines' sandboxer; what it lacks is the error.
    async fn open(&self, root: &Path) -> kuasar_sandboxers::Result<VmmSandboxer> {
        let mut config = VmmConfig::new(HypervisorConfig::Qemu(machines::config(Machine::Q35)), root.to_owned());
        config.kernel = Some(self.kernel.clone());
        config.memory_mib = 256;
        VmmSandboxer::open(config, machines::reaper()).await
    }

    /// Names of the interfaces in the pods' network.
    fn interfaces(&self) -> Vec<String> {
        let network = self.network.try_clone().unwrap();
        let look = move || {
            setns(network, CloneFlags::CLONE_NEWNET).unwrap();
            fs::read_to_string("/proc/thread-self/net/dev").unwrap()
        };
        let table = thread::spawn(look).join().unwrap();
        table.lines().filter_map(|line| Some(format!("interface {}", line.split_once(':')?.0.trim()))).collect()
    }
}

/// A network namespace that is there as long as its descriptor is.
fn new_network() -> File {
    let make = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    };
    thread::spawn(make).join().unwrap()
}

impl Fixture for Machines {
    fn sandboxer(&self, root: &Path) -> Arc<dyn Sandboxer> {
        // The machine's user comes by on its way to its sockets.
        let above = root.parent().unwrap();
        fs::set_permissions(above, fs::Permissions::from_mode(0o711)).unwrap();
        Arc::new(block_in_place(|| Handle::current().block_on(self.open(root))).unwrap())
    }

    fn sandbox(&self, id: &str) -> SandboxSpec {
        let mut spec = fake::spec(id);
        spec.sandboxer = "vmm".into();
        spec.cgroup_parent = self.group.display().to_string();
        spec.netns = Some(format!("/proc/{}/fd/{}", std::process::id(), self.network.as_raw_fd()).into());
        spec
    }

    fn container(&self, dir: &Path, id: ContainerId, behaviour: Behaviour) -> ContainerSpec {
        let bundle = dir.join("bundles").join(&id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let rootfs = Mount {
            kind: "bind".into(),
            source: self.rootfs.to_str().unwrap().into(),
            target: String::new(),
            options: vec!["rbind".into(), "ro".into()],
        };
        let spec = busybox::oci(busybox::behaviour(behaviour), None, &format!("{}/{id}", self.group.display()));
        ContainerSpec { id, bundle, spec: OciSpec::try_from(spec).unwrap(), rootfs: vec![rootfs], stdio: Stdio::default() }
    }

    fn exec(&self, id: ExecId, behaviour: Behaviour) -> ExecSpec {
        ExecSpec { id, process: busybox::behaviour(behaviour), stdio: Stdio::default() }
    }

    fn held(&self, root: &Path) -> Vec<String> {
        let path = root.to_str().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut held: Vec<_> = mounts.lines().filter(|line| line.contains(path)).map(|line| format!("mount {line}")).collect();
        process::command_lines(|pid, line| {
            let line = String::from_utf8_lossy(line);
            if line.contains(path) {
                held.push(format!("process {pid} {line}"));
            }
            Ok(())
        })
        .unwrap();
        for dir in ["root/test", "root/.machines"].map(|name| root.join(name)) {
            let entries = fs::read_dir(dir).into_iter().flatten();
            held.extend(entries.map(|entry| format!("directory {:?}", entry.unwrap().path())));
        }
        let groups = Cgroup::named("kuasar-vm-pod").unwrap();
        held.extend(groups.iter().filter(|group| group.path().starts_with(&self.group)).map(|group| format!("{group:?}")));
        held.extend(self.interfaces());
        held.sort();
        held
    }

    fn reaper(&self) -> Reaper {
        machines::reaper()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conformance() {
    let Some((image, _)) = machines::needs("conformance").await else { return };
    let dir = tempfile::tempdir().unwrap();
    let rootfs = dir.path().join("rootfs");
    busybox::make_rootfs(&rootfs).unwrap();
    let group = PathBuf::from(format!("/kuasar-vmm-conformance-{}", std::process::id()));
    let fixture = Machines { kernel: image.join("vmlinuz"), rootfs, network: new_network(), group: group.clone() };
    if let Err(error) = fixture.open(&dir.path().join("root")).await {
        machines::skip::<()>("conformance", &error.report());
        return;
    }
    let results = conformance::run(&fixture).await;
    Cgroup::at(&group).unwrap().remove().await.unwrap();
    let failed: Vec<_> =
        results.iter().filter_map(|(case, outcome)| Some(format!("{case}: {}", outcome.as_ref().err()?))).collect();
    println!("{} cases passed", results.len() - failed.len());
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
}
