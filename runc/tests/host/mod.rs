//! What the tests against real OCI runtimes need: the runtimes, pods and containers, and a look at what is left behind.
#![allow(dead_code, unreachable_pub)] // each test program uses its part
#![allow(clippy::unwrap_used)] // a test may

use std::{fs, path::Path, time::Duration};

use kuasar_runc::{Runtime, RuntimeChoice};
use kuasar_sandboxers::{
    busybox, fake,
    id::ContainerId,
    reaper::Reaper,
    spec::OciSpec,
    stdio::Stdio,
    types::{ContainerSpec, Mount, NamespaceMode, SandboxSpec},
};
use serde_json::Value;

/// Longest time any one thing in a test may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The runtimes that are here and can be used; says loudly which are not.
pub async fn runtimes(test: &str, reaper: &Reaper) -> Vec<Runtime> {
    let mut found = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP {test}: containers take root");
        return found;
    }
    if busybox::find().is_none() {
        eprintln!("SKIP {test}: no static busybox on PATH; install busybox-static");
        return found;
    }
    for name in ["runc", "crun"] {
        let choice: RuntimeChoice = name.parse().unwrap();
        match Runtime::find(&choice, reaper).await {
            Ok(runtime) => match runtime.obstacle() {
                None => found.push(runtime),
                Some(why) => eprintln!("SKIP {test} with {name}: {why}"),
            },
            Err(error) => eprintln!("SKIP {test} with {name}: {}", error.report()),
        }
    }
    found
}

/// A pod with the node's network, so that no network has to be made.
pub fn pod(sandboxer: &str, id: &str, pid: NamespaceMode) -> SandboxSpec {
    let mut spec = fake::spec(id);
    spec.sandboxer = sandboxer.into();
    spec.hostname = String::new();
    spec.namespaces.network = NamespaceMode::Node;
    spec.namespaces.pid = pid;
    spec
}

/// A container in a bundle below `dir`.
pub fn container(dir: &Path, rootfs: &Path, id: ContainerId, spec: Value, stdio: Stdio) -> ContainerSpec {
    let bundle = dir.join("bundles").join(&id);
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    let rootfs = Mount {
        kind: "bind".into(),
        source: rootfs.to_str().unwrap().into(),
        target: String::new(),
        options: vec!["rbind".into(), "ro".into()],
    };
    ContainerSpec { id, bundle, spec: OciSpec::try_from(spec).unwrap(), rootfs: vec![rootfs], stdio }
}

/// What below `dir`, and of control groups named `mark`, is in use.
pub fn held(dir: &Path, mark: &str) -> Vec<String> {
    let mut held = Vec::new();
    let path = dir.to_str().unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    held.extend(mounts.lines().filter(|line| line.contains(path)).map(|line| format!("mount {line}")));
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let groups = String::from_utf8_lossy(&read("cgroup")).into_owned();
        let program = fs::read_link(entry.path().join("exe")).unwrap_or_default();
        let stray = program.file_name().is_some_and(|name| name == "runc" || name == "crun") && command.contains(path);
        if groups.contains(mark) || command.starts_with("kuasar-init") && command.contains(path) || stray {
            held.push(format!("process {pid} {command}"));
        }
    }
    for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        if let Ok(group) = fs::read_dir(tree.path().join(mark)) {
            held.extend(group.flatten().filter(|entry| entry.path().is_dir()).map(|entry| format!("group {:?}", entry.path())));
        }
    }
    if let Ok(namespaces) = fs::read_dir(dir.join("root")) {
        let named = namespaces.flatten().filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
        let sandboxes = named.flat_map(|entry| fs::read_dir(entry.path()).into_iter().flatten().flatten());
        held.extend(sandboxes.map(|entry| format!("sandbox {:?}", entry.path())));
    }
    held.sort();
    held
}

/// Removes the control groups the tests have made, when they are empty.
pub fn remove_groups(mark: &str) {
    fn remove(dir: &Path) {
        for child in fs::read_dir(dir).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
            remove(&child.path());
        }
        if let Err(error) = fs::remove_dir(dir) {
            eprintln!("cannot remove {}: {error}", dir.display());
        }
    }
    let trees = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|tree| tree.path().join(mark));
    trees.filter(|dir| dir.is_dir()).for_each(|dir| remove(&dir));
}

/// The children of a process.
pub fn processes_of(parent: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap_or_default();
    list.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}
