//! Our daemon as a child process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use crate::containerd::Patch;
use crate::process::{self, Daemon};
use crate::scratch::Scratch;
use crate::{tools, wait};

const START: Duration = Duration::from_secs(30);

/// A sandboxer to be configured.
#[derive(Clone, Debug)]
pub struct Sandboxer {
    /// Its name, and that of its runtime handler: `kuasar-runc`.
    pub name: String,
    /// Its table in the configuration: `kind`, and what that kind knows.
    pub table: Value,
}

/// kuasard, running or stopped.
pub struct Kuasard {
    program: PathBuf,
    config: PathBuf,
    state: PathBuf,
    root: PathBuf,
    log: PathBuf,
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
            config: Self::config_in(scratch),
            state: scratch.run().join("kuasar"),
            root: scratch.root().join("kuasar"),
            log: scratch.dir().join("kuasard.log"),
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

    /// Its pid, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// The running process, for signals.
    ///
    /// # Errors
    /// It does not run.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("kuasard is not running")
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
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&self.config).arg("--state").arg(&self.state).arg("--root").arg(&self.root);
        let daemon = self.daemon.insert(Daemon::spawn("kuasard", command, &self.log)?);
        let socket = self.state.join("kuasard.sock");
        let end = std::time::Instant::now() + START;
        while UnixStream::connect(&socket).await.is_err() {
            daemon.check_running()?;
            if std::time::Instant::now() > end {
                anyhow::bail!(
                    "{} does not accept after {} s; kuasard's log ends:\n{}",
                    socket.display(),
                    START.as_secs(),
                    daemon.log_tail()
                );
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Ends it with SIGTERM, which drains.
    ///
    /// # Errors
    /// It does not run, has to be killed, or reports a failure.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.daemon.take().context("kuasard is not running")?.terminate()?;
        if !status.success() {
            anyhow::bail!("kuasard ended with {status} on SIGTERM; its log ends:\n{}", self.log_tail());
        }
        Ok(())
    }

    /// Ends it with SIGKILL.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("kuasard is not running")?.kill()
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
