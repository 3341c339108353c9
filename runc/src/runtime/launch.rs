//! What crosses from this daemon to an OCI runtime, and by way of it to containers. The one place that says it.
//!
//! | | |
//! |---|---|
//! | descriptors | 0, 1 and 2 as the caller gives them; no others |
//! | environment | the daemon's, without what is meant for the daemon alone |
//! | signals | none ignored, none blocked |
//! | open files | the limits that the daemon was started with, not those that it has given itself |
//! | other limits | the daemon's; the unit sets those of containerd's own |
//! | OOM score | the daemon's, unless the process is to have another: then that from the first instruction on |
//! | processors, policy, nice value, I/O priority, personality | the kernel's defaults |
//! | umask | 022 |
//! | control group | the daemon's; the runtime moves the container's first process |
//! | namespaces, capabilities, keyring | the daemon's; the runtime makes the container's own |
//!
//! std's `Command` can set only the first two without a fork of the whole daemon. So `kuasar-init` is what is started: it sets the
//! rest and becomes the runtime, within some tens of microseconds. It exits with 127 when there is no such program, and with 126
//! when it cannot be run.

use std::{env, io, path::Path, process::Command};

use kuasar_sandboxers::{Error, Result, limits};

use crate::program;

/// Prefixes of variables that are meant for this daemon: crun and runc take some of them for the container's.
const NOT_OURS: [&str; 6] = ["NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_", "KUASAR_", "GLIBC_TUNABLES", "RUST_"];

/// A command that runs an OCI runtime; arguments can be added. `oom_score` is the adjustment for what it starts.
pub(crate) fn command(runtime: &Path, oom_score: Option<i64>) -> Result<Command> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program::image()?.path());
    let mut run = std::ffi::OsString::from("run=");
    run.push(runtime);
    let (soft, hard) = limits::of_children();
    command.arg0("kuasar-init").arg(run).arg(format!("nofile={soft}:{hard}"));
    if let Some(adjustment) = oom_score {
        command.arg(format!("oom={adjustment}"));
    }
    command.arg("--");
    for (name, _) in env::vars_os() {
        if NOT_OURS.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// Why the runtime could not be started at all, if `status` says so.
pub(crate) fn not_started(runtime: &Path, status: u32) -> Option<Error> {
    let reason = match status {
        127 => io::ErrorKind::NotFound.into(),
        126 => io::Error::new(io::ErrorKind::PermissionDenied, "it cannot be executed"),
        _ => return None,
    };
    Some(Error::io("start", runtime)(reason))
}
