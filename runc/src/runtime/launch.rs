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

/// What a command runs, for people.
pub(crate) fn name(command: &Command) -> String {
    let runtime = command.get_args().find_map(|argument| argument.to_str()?.strip_prefix("run="));
    runtime.map_or_else(|| command.get_program().to_string_lossy().into_owned(), str::to_owned)
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kuasar_sandboxers::reaper::Reaper;
    use nix::{
        sched::{CpuSet, sched_setaffinity},
        sys::signal::{SigSet, Signal},
        unistd::Pid,
    };

    use super::{
        super::memory::{Said, listen},
        *,
    };

    async fn run(reaper: &Reaper, program: &str, oom_score: Option<i64>, arguments: &[&str]) -> Said {
        let mut command = command(Path::new(program), oom_score).unwrap();
        listen(reaper, command.args(arguments), Duration::from_secs(10)).await.unwrap()
    }

    #[tokio::test]
    async fn nothing_of_the_daemon_crosses() {
        let reaper = kuasar_sandboxers::fake::reaper();
        // Of this thread, which starts the program.
        let mut first = CpuSet::new();
        first.set(0).unwrap();
        sched_setaffinity(Pid::from_raw(0), &first).unwrap();
        SigSet::from_iter([Signal::SIGUSR1]).thread_block().unwrap();
        limits::raise_open_files().unwrap();
        let (soft, hard) = limits::of_children();

        let script =
            "cat /proc/self/status /proc/self/limits /proc/self/oom_score_adj; ls /proc/self/fd; env; umask; echo \"$0 $@\"";
        let said = run(&reaper, "/bin/sh", Some(321), &["-c", script, "name", "one", "two words"]).await;
        assert_eq!((said.status, said.stderr.as_str()), (0, ""));
        let line = |key: &str| {
            let line =
                said.stdout.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("no {key}: {}", said.stdout));
            line[key.len()..].split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(
            (line("SigIgn:"), line("SigBlk:"), line("Umask:")),
            (vec!["0".repeat(16)], vec!["0".repeat(16)], vec!["0022".into()])
        );
        let files = line("Max open files");
        assert_eq!(files[..2], [soft.to_string(), hard.to_string()]);
        let ones = std::fs::read_to_string("/proc/1/status").unwrap();
        let ones = ones.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned();
        assert_eq!(line("Cpus_allowed_list:"), [ones]);
        assert!(said.stdout.lines().any(|line| line == "321"), "{}", said.stdout);
        // ls has the directory open.
        let open: Vec<_> = said.stdout.lines().filter(|line| line.len() == 1).collect();
        assert_eq!(open, ["0", "1", "2", "3"]);
        assert!(said.stdout.ends_with("0022\nname one two words\n"), "{}", said.stdout);

        let missing = run(&reaper, "/nonexistent/runtime", None, &[]).await;
        let error = not_started(Path::new("/nonexistent/runtime"), missing.status).unwrap();
        assert!(error.report().contains("/nonexistent/runtime") && error.report().contains("not found"), "{}", error.report());
        let directory = run(&reaper, "/", None, &[]).await;
        assert!(not_started(Path::new("/"), directory.status).is_some());
    }

    #[test]
    fn a_command_is_called_by_its_runtime() {
        assert_eq!(name(command(Path::new("/usr/bin/crun"), None).unwrap().arg("create")), "/usr/bin/crun");
        assert_eq!(name(&Command::new("/bin/true")), "/bin/true");
    }

    #[test]
    fn variables_for_the_daemon() {
        let names = ["NOTIFY_SOCKET", "LISTEN_FDS", "WATCHDOG_USEC", "KUASAR_WORKER"];
        assert!(names.iter().all(|name| NOT_OURS.iter().any(|prefix| name.starts_with(prefix))));
        assert!(!NOT_OURS.iter().any(|prefix| "PATH".starts_with(prefix)));
    }
}
