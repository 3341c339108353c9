//! What this host offers to sandboxes, what it lacks, and how to get it: the work behind `kuasarctl check`.
//!
//! Every check is a function from a [`Host`] to [`Finding`]s. A host is a root directory and a search path, so tests build one
//! from a few files. Checks look and never change anything: no mount, no namespace, no module loaded, `/dev/kvm` not opened.

pub mod containerd;
mod host;
mod kernel;
mod network;
mod runtime;
mod state;
#[cfg(test)]
mod tests;

use std::{os::unix::net::UnixStream, path::Path};

use kuasar_sandboxers::reaper::Reaper;
use serde::Serialize;

pub use self::host::Host;
use crate::config::{Config, ConfigErrors};

/// How one thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// There, and as it should be.
    Ok,
    /// Pods run, but something is limited.
    Warn,
    /// Not there.
    Missing,
}

impl Status {
    /// The word for tables.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What: `kernel`, `cgroups` …
    pub subject: String,
    /// How it stands.
    pub status: Status,
    /// Without it no pod runs.
    pub required: bool,
    /// What was found.
    pub detail: String,
    /// How to get what is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    fn new(subject: impl Into<String>, status: Status, detail: impl Into<String>) -> Self {
        Self { subject: subject.into(), status, required: false, detail: detail.into(), remedy: None }
    }

    fn ok(subject: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(subject, Status::Ok, detail)
    }

    fn warn(subject: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(subject, Status::Warn, detail) }
    }

    fn missing(subject: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..Self::new(subject, Status::Missing, detail) }
    }

    fn required(self) -> Self {
        Self { required: true, ..self }
    }

    /// Whether no pod can run because of this.
    #[must_use]
    pub fn blocks(&self) -> bool {
        self.required && self.status == Status::Missing
    }
}

/// Looks at everything. `socket` is the daemon's; with a configuration that is not valid, the defaults are checked.
pub async fn all(
    host: &Host,
    reaper: &Reaper,
    config: &Result<Config, ConfigErrors>,
    config_path: &Path,
    socket: &Path,
) -> Vec<Finding> {
    let defaults = Config::default();
    let effective = config.as_ref().unwrap_or(&defaults);
    let containerd = containerd::Setup::read(host);
    let mut findings = Vec::new();
    findings.extend(kernel::all(host, &containerd));
    findings.push(configuration(config, config_path));
    findings.push(daemon(host, socket));
    findings.extend(socket.parent().into_iter().flat_map(|state| state::all(host, effective, state)));
    findings.extend(runtime::all(effective, reaper).await);
    findings.extend(network::all(host, &containerd));
    let found = containerd::find(host, reaper).await;
    findings.extend(containerd::all(host, &found, &containerd, effective, socket));
    findings
}

fn configuration(config: &Result<Config, ConfigErrors>, path: &Path) -> Finding {
    match config {
        Ok(config) => {
            let names: Vec<_> = config.sandboxers.keys().map(String::as_str).collect();
            let source = if path.exists() { path.display().to_string() } else { "defaults".to_owned() };
            Finding::ok("configuration", format!("{source}: {}", names.join(", ")))
        }
        Err(faults) => {
            let (path, faults) = (path.display(), faults.to_string().replace('\n', "; "));
            Finding::missing("configuration", faults, format!("correct {path} and its conf.d")).required()
        }
    }
}

fn daemon(host: &Host, socket: &Path) -> Finding {
    match UnixStream::connect(host.path(socket)) {
        Ok(_) => Finding::ok("kuasard", format!("listens at {}", socket.display())),
        Err(error) => {
            let detail = format!("not running: {}: {error}", socket.display());
            Finding::warn("kuasard", detail, "systemctl start kuasard, or name its state directory with --state")
        }
    }
}
