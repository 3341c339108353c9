//! Containers for tests: a root filesystem with busybox, and specifications as containerd writes them for a sandbox without a process.

use std::{env, fs, io, os::unix::fs::symlink, path::Path, path::PathBuf};

use serde_json::{Value, json};

use crate::fake::Behaviour;

/// Every applet that tests call.
const APPLETS: [&str; 16] = [
    "sh", "sleep", "true", "echo", "cat", "id", "hostname", "ls", "kill", "ps", "readlink", "stty", "tail", "dd", "md5sum",
    "head",
];

/// A static busybox, if there is one on PATH.
#[must_use]
pub fn find() -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    let found = env::split_paths(&path).map(|dir| dir.join("busybox")).find(|file| file.is_file())?;
    // A dynamic one names its loader.
    let program = fs::read(&found).ok()?;
    (!program.windows(10).any(|window| window == b"/ld-linux-")).then_some(found)
}

/// Makes a root filesystem.
///
/// # Errors
/// There is no static busybox, or something cannot be made.
pub fn make_rootfs(dir: &Path) -> io::Result<()> {
    let busybox = find().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no static busybox on PATH"))?;
    for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "run"] {
        fs::create_dir_all(dir.join(name))?;
    }
    for name in ["etc/hosts", "etc/hostname", "etc/resolv.conf"] {
        fs::write(dir.join(name), "")?;
    }
    fs::copy(busybox, dir.join("bin/busybox"))?;
    APPLETS.iter().try_for_each(|applet| symlink("busybox", dir.join("bin").join(applet)))
}

/// An OCI process.
#[must_use]
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

/// A process that behaves so.
#[must_use]
pub fn behaviour(behaviour: Behaviour) -> Value {
    match behaviour {
        Behaviour::Exit(code) => process(&["/bin/sh", "-c", &format!("exit {code}")]),
        Behaviour::Run => process(&["/bin/sleep", "1000"]),
        Behaviour::FailToStart => process(&["no-such-program"]),
    }
}

/// A specification. `pid` is the path of the process id namespace to join; `None` for one of the container's own.
#[must_use]
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
