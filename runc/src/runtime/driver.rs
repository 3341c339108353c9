//! Calling an OCI runtime.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use kuasar_sandboxers::{
    Error, Result,
    failpoint::{self, Failpoint},
    reaper::Reaper,
    stages,
    stdio::ChildFds,
};
use serde::Deserialize;
use serde_json::Value;

use super::{CallFile, MemoryFile, Runtime, launch, memory, update};

/// How much of a runtime's own words is passed on, in bytes.
const MESSAGE_LIMIT: u64 = 4096;

/// The longest that an update of resources may take: containerd holds a lock meanwhile that a stop of the container waits for.
const UPDATE_LIMIT: Duration = Duration::from_secs(10);

/// An OCI runtime together with where it keeps what it knows of the containers of one sandbox.
#[derive(Clone, Debug)]
pub(crate) struct Driver {
    runtime: Runtime,
    root: PathBuf,
    systemd: bool,
    reaper: Reaper,
    limit: Duration,
}

/// What a runtime knows of a container (runtime-spec, "State").
#[derive(Debug, Deserialize)]
pub(crate) struct State {
    /// `created`, `running`, `stopped`, or a word of the runtime's own: `paused`.
    pub(crate) status: String,
    pub(crate) bundle: PathBuf,
}

/// How to create a container.
#[derive(Debug)]
pub(crate) struct Create<'a> {
    pub(crate) id: &'a str,
    pub(crate) bundle: &'a Path,
    pub(crate) pid_file: &'a Path,
    pub(crate) console: Option<PathBuf>,
    pub(crate) no_pivot: bool,
    pub(crate) no_new_keyring: bool,
    /// The adjustment of its OOM score, where the runtime is not told one.
    pub(crate) oom_score: Option<i64>,
}

/// How to add a process to a container.
#[derive(Debug)]
pub(crate) struct Exec<'a> {
    pub(crate) id: &'a str,
    pub(crate) process: &'a Value,
    pub(crate) pid_file: &'a Path,
    pub(crate) console: Option<PathBuf>,
}

impl Driver {
    pub(crate) fn new(runtime: Runtime, root: PathBuf, reaper: Reaper, limit: Duration) -> Self {
        Self { runtime, root, systemd: false, reaper, limit }
    }

    /// The same, with control groups managed by systemd or not.
    pub(crate) fn with_systemd(&self, systemd: bool) -> Self {
        Self { systemd, ..self.clone() }
    }

    pub(crate) fn systemd(&self) -> bool {
        self.systemd
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Whether the runtime knows a container of that id, in whatever state.
    pub(crate) fn knows(&self, id: &str) -> bool {
        self.root.join(id).exists()
    }

    /// Creates a container; its first process gets `io` (`None` with a terminal) and waits to be started.
    pub(crate) async fn create(&self, create: Create<'_>, io: Option<ChildFds>) -> Result<()> {
        let mut command = launch::command(self.runtime.program(), create.oom_score)?;
        let log = self.globals(&mut command)?;
        command.arg("create").arg("--bundle").arg(create.bundle).arg("--pid-file").arg(create.pid_file);
        if let Some(console) = create.console {
            command.arg("--console-socket").arg(console);
        }
        if create.no_pivot {
            command.arg("--no-pivot");
        }
        if create.no_new_keyring {
            command.arg("--no-new-keyring");
        }
        command.arg(create.id);
        self.call("create the container", command, log, io).await?;
        failpoint::reach(Failpoint::ContainerMade);
        Ok(())
    }

    /// Lets the first process run.
    pub(crate) async fn start(&self, id: &str) -> Result<()> {
        self.simple("start the container", &["start", id]).await?;
        failpoint::reach(Failpoint::ContainerStarted);
        Ok(())
    }

    /// Adds a process to a running container.
    pub(crate) async fn exec(&self, exec: Exec<'_>, io: Option<ChildFds>) -> Result<()> {
        let document = self.file(exec.process.to_string().as_bytes())?;
        // runc sets it itself; crun leaves added processes with its own.
        let mut command = launch::command(self.runtime.program(), exec.process["oomScoreAdj"].as_i64().or(Some(0)))?;
        let log = self.globals(&mut command)?;
        command.args(["exec", "--detach", "--process"]).arg(document.path()).arg("--pid-file").arg(exec.pid_file);
        if let Some(console) = exec.console {
            command.arg("--console-socket").arg(console);
        }
        command.arg(exec.id);
        self.call("start a process in the container", command, log, io).await?;
        failpoint::reach(Failpoint::ExecStarted);
        Ok(())
    }

    /// Removes what the runtime keeps of a container, and its cgroup. With `force` also what still runs in it; that takes runc 100 ms
    /// even when nothing does, so it is for emergencies.
    pub(crate) async fn delete(&self, id: &str, force: bool) -> Result<()> {
        let arguments: &[&str] = if force { &["delete", "--force", id] } else { &["delete", id] };
        self.simple("delete the container", arguments).await
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<()> {
        self.simple("pause the container", &["pause", id]).await
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<()> {
        self.simple("resume the container", &["resume", id]).await
    }

    /// Applies an OCI `linux.resources` object.
    pub(crate) async fn update(&self, id: &str, resources: &Value) -> Result<()> {
        let document = self.file(update::document(resources)?.to_string().as_bytes())?;
        let mut command = launch::command(self.runtime.program(), None)?;
        let log = self.globals(&mut command)?;
        command.args(["update", "--resources"]).arg(document.path()).arg(id);
        let driver = Self { limit: self.limit.min(UPDATE_LIMIT), ..self.clone() };
        let updated = driver.call("update the container's resources", command, log, None).await;
        match updated {
            // crun 1.8.1, on cgroup v1.
            Err(Error::Backend { message, .. }) if update::lifts_quota(resources) && message.contains("cfs_quota_us") => {
                let why =
                    format!("{} does not write it as the kernel reads it ({message}); use a newer one, or runc", self.runtime);
                Err(Error::Unsupported { operation: "taking a CPU quota away", why })
            }
            updated => updated,
        }
    }

    /// Asks what the runtime knows of a container; `None` where it knows no such container.
    pub(crate) async fn state(&self, id: &str) -> Result<Option<State>> {
        let mut command = launch::command(self.runtime.program(), None)?;
        let _log = self.globals(&mut command)?;
        let said = memory::listen(&self.reaper, command.args(["state", id]), self.limit).await?;
        if said.status != 0 {
            return Ok(None);
        }
        serde_json::from_str(&said.stdout)
            .map(Some)
            .map_err(Error::failed(format!("read the state that {} tells", self.runtime)))
    }

    async fn simple(&self, operation: &str, arguments: &[&str]) -> Result<()> {
        let mut command = launch::command(self.runtime.program(), None)?;
        let log = self.globals(&mut command)?;
        command.args(arguments);
        self.call(operation, command, log, None).await
    }

    /// A file for one call, beside what the runtime keeps.
    fn file(&self, content: &[u8]) -> Result<CallFile> {
        CallFile::new(self.root.parent().unwrap_or(&self.root), content)
    }

    fn globals(&self, command: &mut Command) -> Result<CallFile> {
        let log = self.file(b"")?;
        command.arg("--root").arg(&self.root).arg("--log").arg(log.path());
        // crun writes in that form on a container's standard error, too, when it cannot become the container's program.
        if !self.runtime.is_crun() {
            command.args(["--log-format", "json"]);
        }
        if self.systemd {
            command.arg("--systemd-cgroup");
        }
        Ok(log)
    }

    /// Runs the runtime to its end. Without `io` its own standard error is kept for the error message.
    async fn call(&self, operation: &str, mut command: Command, log: CallFile, io: Option<ChildFds>) -> Result<()> {
        let mut said = None;
        match io {
            Some(io) => command.stdin(io.stdin).stdout(io.stdout).stderr(io.stderr),
            None => {
                let stderr = MemoryFile::empty("runtime.stderr")?;
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr.descriptor()?);
                said = Some(stderr);
                &mut command
            }
        };
        // Its descriptors are the process's stdio, whose readers wait for the last writer to go: it must not outlive the call.
        let status = memory::run(&self.reaper, &mut command, self.limit).await;
        drop(command);
        if let Ok(0) = status {
            return Ok(());
        }
        self.keep_log(&log, said.as_ref());
        let status = status?;
        let mut message = last_error(&log.tail(MESSAGE_LIMIT)?);
        if message.is_none()
            && let Some(said) = &said
        {
            message = Some(said.tail(MESSAGE_LIMIT)?.trim().to_owned()).filter(|said| !said.is_empty());
        }
        if message.is_none()
            && let Some(error) = launch::not_started(self.runtime.program(), status)
        {
            return Err(error);
        }
        Err(Error::Backend {
            program: self.runtime.program().display().to_string(),
            operation: operation.into(),
            message: message.unwrap_or_else(|| format!("it ended with status {} and said nothing", status)),
        })
    }

    /// Keeps all that a failed call has written, of which the error has only the last. What cannot be read must not hide that error.
    fn keep_log(&self, log: &CallFile, said: Option<&MemoryFile>) {
        let limit = stages::LOG_LIMIT as u64;
        let mut written = log.tail(limit).unwrap_or_default();
        written.extend(said.and_then(|said| said.tail(limit).ok()));
        if !written.is_empty() {
            stages::keep_log(self.runtime.program().display().to_string(), &written);
        }
    }
}

/// The last error in a log of JSON lines, as runc and youki write it; else the last line, which with crun is the error.
fn last_error(log: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Line {
        #[serde(default)]
        level: String,
        msg: String,
    }
    let lines: Vec<Line> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let error = lines.iter().rev().find(|line| matches!(line.level.as_str(), "error" | "fatal" | "panic")).or(lines.last());
    match error {
        Some(line) => Some(line.msg.trim().to_owned()),
        None => log.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runtimes_own_words() {
        let runc = concat!(
            r#"{"level":"warning","msg":"config.json has both","time":"x"}"#,
            "\n",
            r#"{"level":"error","msg":"runc create failed: exec: \"nope\": executable file not found in $PATH","time":"x"}"#,
            "\n"
        );
        assert_eq!(last_error(runc).unwrap(), "runc create failed: exec: \"nope\": executable file not found in $PATH");
        assert_eq!(last_error("{\"msg\":\"a\"}\n{\"msg\":\"b\"}\n").unwrap(), "b");
        assert_eq!(last_error("not json\n\n").unwrap(), "not json");
        // The beginning of a long log is cut off.
        assert_eq!(last_error("el\":\"error\",\"msg\":\"x\"}\n{\"level\":\"error\",\"msg\":\"y\"}").unwrap(), "y");
        assert_eq!(last_error(""), None);
    }
}
