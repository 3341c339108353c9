//! One container that does nothing, to find out whether a runtime can run any here: what it says of itself does not tell. crun, for
//! one, refuses control groups of which v2 has some and v1 others, and any runtime may meet a kernel that lacks what it needs.

use std::{fs, os::unix::fs::DirBuilderExt, path::Path, time::Duration};

use kuasar_sandboxers::{
    Error, Result,
    cgroup::Cgroup,
    mount,
    process::Tracked,
    reaper::Reaper,
    stdio::{ChildFds, null_device},
};
use nix::mount::MsFlags;
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::warn;

use super::{Create, Driver, MemoryFile, Runtime};
use crate::{container::read_pid, program};

/// How long each step may take; together they take some tens of milliseconds.
const LIMIT: Duration = Duration::from_secs(10);

/// The container's id.
const ID: &str = "trial";

/// What kuasar-init says when it has nothing to do: there is no process 1.
const SAID: &str = "0";

/// Creates, starts and deletes the container, all of it in `dir`, which is gone afterwards.
///
/// # Errors
/// The step that failed, with the runtime's own words.
pub(super) async fn run(runtime: &Runtime, reaper: &Reaper, dir: &Path) -> Result<()> {
    let driver = Driver::new(runtime.clone(), dir.join("oci"), reaper.clone(), LIMIT);
    // Where a daemon has died in the middle of one.
    remove(&driver, dir).await?;
    // Two daemons on one node must not meet.
    let group = Path::new("/").join(format!("kuasar-{ID}-{}", std::process::id()));
    let tried = attempt(&driver, dir, &group).await;
    let removed = match remove(&driver, dir).await {
        Ok(()) => Cgroup::at(&group)?.remove().await,
        failed => failed,
    };
    match (tried, removed) {
        (Ok(()), removed) => removed,
        (Err(error), removed) => {
            if let Err(error) = removed {
                warn!(error = error.report(), "cannot remove the trial container of an OCI runtime");
            }
            Err(error)
        }
    }
}

async fn attempt(driver: &Driver, dir: &Path, group: &Path) -> Result<()> {
    let rootfs = dir.join("rootfs");
    let make = |dir: &Path| fs::DirBuilder::new().recursive(true).mode(0o711).create(dir).map_err(Error::io("create", dir));
    make(&rootfs)?;
    // Its directory may be on a file system from which nothing can be executed.
    nix::mount::mount(Some(ID), &rootfs, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=755,size=1m"))
        .map_err(|errno| Error::io("mount a tmpfs on", &rootfs)(errno.into()))?;
    for name in ["dev", "proc", "sys"] {
        make(&rootfs.join(name))?;
    }
    program::write(&rootfs.join("init"))?;
    let config = dir.join("config.json");
    fs::write(&config, document(group).to_string()).map_err(Error::io("write", &config))?;

    let pid_file = dir.join("pid");
    let create = Create {
        id: ID,
        bundle: dir,
        pid_file: &pid_file,
        console: None,
        no_pivot: false,
        no_new_keyring: false,
        oom_score: None,
    };
    let stdout = MemoryFile::empty("stdout")?;
    let io = ChildFds { stdin: null_device()?, stdout: stdout.descriptor()?, stderr: null_device()? };
    driver.create(create, Some(io)).await?;
    let process = Tracked::open(read_pid(&pid_file)?)?;
    driver.start(ID).await?;
    // The keeper, whose child it is, does not tell of its exit while this daemon starts.
    if let Some(process) = process {
        let late = |_| Error::TimedOut { operation: "the end of a trial container".into(), seconds: LIMIT.as_secs() };
        timeout(LIMIT, process.ended()).await.map_err(late)??;
    }
    match stdout.tail(SAID.len() as u64)?.as_str() {
        SAID => Ok(()),
        said => Err(Error::failed("run a trial container")(format!("its program printed {said:?} instead of {SAID:?}"))),
    }
}

async fn remove(driver: &Driver, dir: &Path) -> Result<()> {
    if driver.knows(ID) {
        driver.delete(ID, true).await?;
    }
    mount::unmount_all(&dir.join("rootfs")).await?;
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// What containers of Kubernetes have: namespaces, limits, a seccomp profile, capabilities, masked paths.
fn document(group: &Path) -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    let architecture = if cfg!(target_arch = "aarch64") { "SCMP_ARCH_AARCH64" } else { "SCMP_ARCH_X86_64" };
    let namespaces = ["mount", "pid", "network", "ipc", "uts"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/init"],
            "cwd": "/",
            "user": { "uid": 0, "gid": 0 },
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "noNewPrivileges": true,
            "oomScoreAdj": 0,
        },
        "root": { "path": "rootfs" },
        "hostname": ID,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
        ],
        "linux": {
            "cgroupsPath": group,
            "namespaces": namespaces,
            "resources": {
                "devices": [
                    { "allow": false, "access": "rwm" },
                    { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm" },
                ],
                "memory": { "limit": 64 << 20 },
                "cpu": { "shares": 256 },
                "pids": { "limit": 16 },
            },
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": [architecture],
                "syscalls": [{ "names": ["reboot"], "action": "SCMP_ACT_ERRNO" }],
            },
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
        },
    })
}
