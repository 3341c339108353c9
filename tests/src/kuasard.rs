//! Our daemon as a child process: the keeper, whose child in turn is the worker.
//!
//! The harness starts and stops the keeper. The worker is what a test may kill by itself ([`Kuasard::kill_worker`]): the keeper starts
//! another.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kuasar_shim::proto::admin::admin_client::AdminClient;
use kuasar_shim::proto::admin::{ListRequest, VersionRequest};
use kuasar_shim::server::{CONTROL_SOCKET, LOCK};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::containerd::Patch;
use crate::cri;
use crate::leak::census;
use crate::process::{self, Daemon};
use crate::scratch::Scratch;
use crate::systemd::Supervisor;
use crate::{tools, wait};

const START: Duration = Duration::from_secs(30);
/// How long the worker may live on when its keeper has been killed.
const ORPHANED: Duration = Duration::from_secs(10);
/// How often a worker that does not answer yet is asked again: time from kill to answer is measured in milliseconds.
const ASK_AGAIN: Duration = Duration::from_millis(1);
/// How long one question may remain unanswered before it is asked on another connection.
const ANSWER: Duration = Duration::from_secs(5);

/// A sandboxer to be configured.
#[derive(Clone, Debug)]
pub struct Sandboxer {
    /// Its name, and that of its runtime handler: `kuasar-runc`.
    pub name: String,
    /// Its table in the configuration: `kind`, and what that kind knows.
    pub table: Value,
}

/// A worker that was killed.
#[derive(Clone, Copy, Debug)]
pub struct Killed {
    /// Its pid.
    pub pid: i32,
    /// When.
    pub at: Instant,
}

/// kuasard, running or stopped.
pub struct Kuasard {
    program: PathBuf,
    env: Vec<(String, String)>,
    config: PathBuf,
    state: PathBuf,
    root: PathBuf,
    log: PathBuf,
    supervisor: Option<Supervisor>,
    starter: Option<&'static str>,
    daemon: Option<Daemon>,
}

impl Kuasard {
    /// Where its socket is for a node in this directory.
    #[must_use]
    pub fn socket_in(scratch: &Scratch) -> PathBuf {
        scratch.run().join("kuasar/kuasard.sock")
    }

    /// Where its configuration is for a node in this directory.
    #[must_use]
    pub fn config_in(scratch: &Scratch) -> PathBuf {
        scratch.dir().join("kuasar.toml")
    }

    /// Writes its configuration.
    ///
    /// # Errors
    /// It is not built, or a file cannot be written.
    pub fn new(scratch: &Scratch, containerd: &Path, sandboxers: &[Sandboxer], patch: Option<&Patch>) -> Result<Self> {
        let kuasard = Self {
            program: tools::ours("kuasard")?,
            env: Vec::new(),
            config: Self::config_in(scratch),
            state: scratch.run().join("kuasar"),
            root: scratch.root().join("kuasar"),
            log: scratch.dir().join("kuasard.log"),
            supervisor: None,
            starter: None,
            daemon: None,
        };
        let tables: serde_json::Map<String, Value> =
            sandboxers.iter().map(|sandboxer| (sandboxer.name.clone(), sandboxer.table.clone())).collect();
        let mut config = json!({
            "containerd": { "address": containerd },
            "log": { "level": "debug" },
            "sandboxer": tables,
        });
        if let Some(patch) = patch {
            patch(&mut config);
        }
        fs::write(&kuasard.config, toml::to_string(&config)?).with_context(|| format!("write {}", kuasard.config.display()))?;
        Ok(kuasard)
    }

    /// Adds a sandboxer to its configuration, which the next upgrade or start reads.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn configure(&self, sandboxer: &Sandboxer) -> Result<()> {
        let text = fs::read_to_string(&self.config).with_context(|| format!("read {}", self.config.display()))?;
        let mut config: Value = toml::from_str(&text).with_context(|| format!("parse {}", self.config.display()))?;
        config["sandboxer"][&sandboxer.name] = sandboxer.table.clone();
        fs::write(&self.config, toml::to_string(&config)?).with_context(|| format!("write {}", self.config.display()))
    }

    /// Its volatile state.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Its persistent state.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Sets a variable of its environment from the next start on.
    pub fn set_env(&mut self, key: &str, value: &Path) {
        self.env.push((key.to_owned(), value.display().to_string()));
    }

    /// Lets a shell's script start it from the next start on: `$0` is the program, `$@` its arguments.
    pub fn start_by(&mut self, script: &'static str) {
        self.starter = Some(script);
    }

    /// Lets it be a service from the next start on.
    pub fn supervised_by(&mut self, supervisor: Supervisor) {
        self.supervisor = Some(supervisor);
    }

    /// Lets it be an unsupervised process from the next start on. What was stored is closed.
    pub fn unsupervised(&mut self) {
        self.supervisor = None;
    }

    /// Who supervises it.
    #[must_use]
    pub fn supervisor(&self) -> Option<&Supervisor> {
        self.supervisor.as_ref()
    }

    /// The keeper's pid, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// The worker's pid: what its lock file says, as soon as that is a child of the keeper.
    ///
    /// # Errors
    /// It does not run, or has no worker for too long.
    pub async fn worker_pid(&self) -> Result<i32> {
        let keeper = self.pid().context("kuasard is not running")?;
        let lock = self.state.join(LOCK);
        wait::until("kuasard to have a worker", START, || async {
            let pid = fs::read_to_string(&lock).ok().and_then(|text| text.trim().parse().ok());
            // While one worker follows the other, the file names the one before.
            Ok(pid.filter(|pid| census::parent(*pid) == Some(keeper)))
        })
        .await
    }

    /// The running process, for signals.
    ///
    /// # Errors
    /// It does not run.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("kuasard is not running")
    }

    /// Its log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        process::tail(&self.log, 40)
    }

    /// Starts it and waits until its socket accepts.
    ///
    /// # Errors
    /// It ends, or does not accept in time; the error carries the end of its log.
    pub async fn start(&mut self) -> Result<()> {
        let mut command = match &self.supervisor {
            Some(supervisor) => {
                supervisor.forget();
                supervisor.command(&self.program)?
            }
            None => match self.starter {
                Some(script) => {
                    let mut command = Command::new("sh");
                    command.arg("-c").arg(script).arg(&self.program);
                    command
                }
                None => Command::new(&self.program),
            },
        };
        command.arg("--config").arg(&self.config).arg("--state").arg(&self.state).arg("--root").arg(&self.root);
        command.envs(self.env.iter().cloned());
        let daemon = self.daemon.insert(Daemon::spawn("kuasard", command, &self.log)?);
        let socket = self.state.join(CONTROL_SOCKET);
        let end = Instant::now() + START;
        while UnixStream::connect(&socket).await.is_err() {
            daemon.check_running()?;
            if Instant::now() > end {
                bail!(
                    "{} does not accept after {} s; kuasard's log ends:\n{}",
                    socket.display(),
                    START.as_secs(),
                    daemon.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let Some(supervisor) = &self.supervisor else { return Ok(()) };
        // Its socket has accepted all the time.
        wait::until("kuasard to be ready", START, || async { Ok(supervisor.has_heard("READY=1").then_some(())) }).await
    }

    /// Ends it with SIGTERM, which drains.
    ///
    /// # Errors
    /// It does not run, has to be killed, or reports a failure.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.daemon.take().context("kuasard is not running")?.terminate()?;
        if !status.success() {
            bail!("kuasard ended with {status} on SIGTERM; its log ends:\n{}", self.log_tail());
        }
        Ok(())
    }

    /// Ends the whole daemon with SIGKILL: the keeper is killed, and the worker goes with it.
    ///
    /// # Errors
    /// It does not run, or the worker lives on.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("kuasard is not running")?.kill()?;
        let mut left = Ok(Vec::new());
        // A process that is about to end has no command line any more, and its sockets still: the next start would take them for its own.
        // A supervisor keeps them open.
        let socket = self.state.join(CONTROL_SOCKET);
        let is_closed = || self.supervisor.is_some() || std::os::unix::net::UnixStream::connect(&socket).is_err();
        let gone = wait::until_sync(ORPHANED, || {
            left = census::running(&self.program, &self.state);
            left.as_ref().is_ok_and(Vec::is_empty) && is_closed()
        });
        let left = left?;
        if !gone {
            bail!("the keeper is dead, and after {} s its worker is not: {left:?}", ORPHANED.as_secs());
        }
        Ok(())
    }

    /// Ends the worker with SIGKILL.
    ///
    /// # Errors
    /// There is none.
    pub async fn kill_worker(&self) -> Result<Killed> {
        let pid = self.worker_pid().await?;
        let at = Instant::now();
        kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("kill the worker {pid}"))?;
        Ok(Killed { pid, at })
    }

    /// Waits until a worker answers that is not the one killed, and returns how long that took from the kill on. The question is one
    /// for which all that ran before has to have been found again.
    ///
    /// # Errors
    /// None does in time, or the daemon has ended.
    pub async fn wait_serving(&mut self, killed: Killed) -> Result<Duration> {
        let mut last = None;
        while killed.at.elapsed() < START {
            match tokio::time::timeout(ANSWER, self.ask()).await {
                Ok(Ok(pid)) if pid != i64::from(killed.pid) => return Ok(killed.at.elapsed()),
                // It has yet to notice that it is dead.
                Ok(Ok(_)) => {}
                Ok(Err(error)) => last = Some(error),
                Err(_) => last = Some(anyhow::anyhow!("no answer within {} s", ANSWER.as_secs())),
            }
            self.daemon()?.check_running()?;
            tokio::time::sleep(ASK_AGAIN).await;
        }
        let last = last.map_or_else(|| "the killed one answers".to_owned(), |error| format!("{error:#}"));
        bail!(
            "no worker answers {} s after the kill of {}: {last}; the log ends:\n{}",
            START.as_secs(),
            killed.pid,
            self.log_tail()
        )
    }

    /// Lets `kuasarctl` replace it by another program, while it runs; by default by what is installed where it was started from. What
    /// kuasarctl says is JSON.
    ///
    /// # Errors
    /// kuasarctl cannot be run.
    pub async fn upgrade(&self, binary: Option<&Path>) -> Result<Output> {
        let mut command = tokio::process::Command::new(tools::ours("kuasarctl")?);
        command.arg("--state").arg(&self.state).args(["upgrade", "--json"]);
        if let Some(binary) = binary {
            command.arg("--binary").arg(binary);
        }
        command.output().await.context("run kuasarctl")
    }

    /// Asks for all sandboxes, and returns the pid of who answered.
    async fn ask(&self) -> Result<i64> {
        let mut admin = AdminClient::new(cri::channel(&self.state.join(CONTROL_SOCKET)).await?);
        admin.list(ListRequest { namespace: String::new() }).await?;
        let version: Value = serde_json::from_str(&admin.version(VersionRequest {}).await?.into_inner().json)?;
        version["pid"].as_i64().context("kuasard does not tell its pid")
    }

    /// Waits until a line of its log holds `text`.
    ///
    /// # Errors
    /// Nothing of the kind is logged in time.
    pub async fn wait_log(&self, text: &str) -> Result<()> {
        wait::until(&format!("{text:?} in kuasard's log"), START, || async {
            let log = fs::read(&self.log).with_context(|| format!("read {}", self.log.display()))?;
            Ok(String::from_utf8_lossy(&log).contains(text).then_some(()))
        })
        .await
    }
}
