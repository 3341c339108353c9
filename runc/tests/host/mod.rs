//! What the tests against real OCI runtimes need: a root filesystem, specifications, and a look at what is left behind.
#![allow(dead_code, unreachable_pub)] // each test program uses its part
#![allow(clippy::unwrap_used)] // a test may

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use kuasar_runc::{Runtime, RuntimeChoice};
use kuasar_sandboxers::{
    fake::{self, Behaviour},
    id::ContainerId,
    reaper::Reaper,
    spec::OciSpec,
    stdio::Stdio,
    types::{ContainerSpec, Mount, NamespaceMode, SandboxSpec},
};
use serde_json::{Value, json};

/// Every applet the tests call.
const APPLETS: [&str; 14] =
    ["sh", "sleep", "true", "echo", "cat", "id", "hostname", "ls", "kill", "ps", "readlink", "stty", "tail", "dd"];

/// Longest time any one thing in a test may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The runtimes that are here and can be used; says loudly which are not.
pub async fn runtimes(test: &str, reaper: &Reaper) -> Vec<Runtime> {
    let mut found = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP {test}: containers take root");
        return found;
    }
    if busybox().is_none() {
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

fn busybox() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|dir| dir.join("busybox")).find(|file| file.is_file())?;
    // A dynamic one names its loader.
    let program = fs::read(&found).ok()?;
    (!program.windows(10).any(|window| window == b"/ld-linux-")).then_some(found)
}

/// A root filesystem with busybox.
pub fn make_rootfs(dir: &Path) {
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "run"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    for name in ["etc/hosts", "etc/hostname", "etc/resolv.conf"] {
        fs::write(dir.join(name), "").unwrap();
    }
    fs::copy(busybox().unwrap(), dir.join("bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", dir.join("bin").join(applet)).unwrap();
    }
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

/// An OCI process.
pub fn process(args: &[&str]) -> Value {
    let capabilities = json!(["CAP_KILL", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"]);
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "noNewPrivileges": true,
    })
}

pub fn behaviour(behaviour: Behaviour) -> Value {
    match behaviour {
        Behaviour::Exit(code) => process(&["/bin/sh", "-c", &format!("exit {code}")]),
        Behaviour::Run => process(&["/bin/sleep", "1000"]),
        Behaviour::FailToStart => process(&["no-such-program"]),
    }
}

/// A specification as containerd writes it for a sandbox without a process.
pub fn oci(process: Value, pid: Option<&str>, cgroup: &str) -> Value {
    let pid = match pid {
        Some(path) => json!({"type": "pid", "path": path}),
        None => json!({"type": "pid"}),
    };
    json!({
        "ociVersion": "1.3.0",
        "process": process,
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777"]},
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "mount"},
                {"type": "network", "path": "/proc/0/ns/net"},
                {"type": "ipc", "path": "/proc/0/ns/ipc"},
                {"type": "uts", "path": "/proc/0/ns/uts"},
                pid,
            ],
        },
    })
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
