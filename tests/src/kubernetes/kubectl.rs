//! `kubectl` as a process.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::Site;

/// How long one call may take, also one that waits for emulated virtual machines.
const LIMIT: Duration = Duration::from_secs(300);

/// What a call came to.
#[derive(Clone, Debug)]
pub struct Ran {
    /// kubectl's exit status.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// And what it said beside that.
    pub stderr: String,
}

impl Ran {
    /// The exit code; -1 after a signal.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }
}

/// A client that may do everything.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    config: PathBuf,
    cache: PathBuf,
}

impl Kubectl {
    pub(super) fn new(site: &Site, config: &Path) -> Result<Self> {
        let cache = site.dir.join("kubectl");
        std::fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
        Ok(Self { program: site.programs.dir.join("kubectl"), config: config.to_path_buf(), cache })
    }

    /// A call to be made, for what [`Self::run`] does not do.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(&self, namespace: &str, args: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--kubeconfig").arg(&self.config).arg("--cache-dir").arg(&self.cache);
        if !namespace.is_empty() {
            command.args(["--namespace", namespace]);
        }
        // It keeps habits of the user, else.
        command.args(args).env("HOME", &self.cache).stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Runs it with something to read; how it ends is the caller's to judge.
    ///
    /// # Errors
    /// It cannot be run, or takes too long.
    pub async fn run<S: AsRef<OsStr>>(&self, namespace: &str, args: &[S], input: &[u8]) -> Result<Ran> {
        let shown = || args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ");
        let mut command = self.command(namespace, args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        if !input.is_empty() {
            command.stdin(Stdio::piped());
        }
        let mut child = command.spawn().context("run kubectl")?;
        let stdin = child.stdin.take();
        let fed = async {
            if let Some(mut stdin) = stdin {
                // One that ends before it has read all says why by itself.
                let _ = stdin.write_all(input).await;
            }
        };
        let both = async { tokio::join!(child.wait_with_output(), fed).0 };
        let Ok(output) = tokio::time::timeout(LIMIT, both).await else {
            bail!("kubectl {} is not done after {} s", shown(), LIMIT.as_secs());
        };
        let output = output.with_context(|| format!("kubectl {}", shown()))?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Ran { status: output.status, stdout: text(output.stdout), stderr: text(output.stderr) })
    }

    /// Runs it, and fails when it does.
    ///
    /// # Errors
    /// It fails; the error carries what it said.
    pub async fn must<S: AsRef<OsStr>>(&self, namespace: &str, args: &[S]) -> Result<String> {
        let ran = self.run(namespace, args, b"").await?;
        let shown = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ");
        ensure!(ran.status.success(), "kubectl {shown}: {} ({})", ran.stderr.trim(), ran.status);
        Ok(ran.stdout)
    }

    /// Creates an object.
    ///
    /// # Errors
    /// It is refused.
    pub async fn create(&self, namespace: &str, object: &Value) -> Result<()> {
        let ran = self.run(namespace, &["create", "--filename", "-"], object.to_string().as_bytes()).await?;
        ensure!(ran.status.success(), "kubectl create {}: {}", object["kind"], ran.stderr.trim());
        Ok(())
    }

    /// An object.
    ///
    /// # Errors
    /// There is none.
    pub async fn get(&self, namespace: &str, kind: &str, name: &str) -> Result<Value> {
        let text = self.must(namespace, &["get", kind, name, "--output", "json"]).await?;
        serde_json::from_str(&text).context("parse what kubectl prints")
    }

    /// What the API server answers to a GET of this path.
    ///
    /// # Errors
    /// It refuses.
    pub async fn raw(&self, path: &str) -> Result<String> {
        self.must("", &["get", "--raw", path]).await
    }
}
