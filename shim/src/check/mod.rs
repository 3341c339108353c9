//! What this host offers to sandboxes, what it lacks, and how to get it: the work behind `kuasarctl check`.
//!
//! Every check is a function from a [`Host`] to [`Finding`]s. A host is a root directory and a search path, so tests build one
//! from a few files. Checks look and never change anything: no mount, no namespace, no module loaded, `/dev/kvm` not opened.
//! A daemon that listens is asked what it goes by, and so is the containerd that it serves; without them this process's search path and
//! the usual files are looked at.

pub mod containerd;
pub mod daemon;
pub mod driver;
mod host;
mod kernel;
mod network;
mod runtime;
mod state;
mod systemd;
#[cfg(test)]
mod tests;

use std::path::Path;

use kuasar_sandboxers::reaper::Reaper;
use serde::Serialize;

use self::daemon::Daemon;
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

/// Looks at everything. `socket` is the daemon's; with a configuration that is not valid, the defaults are checked, unless a daemon
/// tells which is in force.
pub async fn all(
    host: &Host,
    reaper: &Reaper,
    config: &Result<Config, ConfigErrors>,
    config_path: &Path,
    socket: &Path,
    daemon: &Daemon,
) -> Vec<Finding> {
    let in_force = daemon.settings().and_then(|settings| Config::parse(&settings.config, &settings.configuration).ok());
    let defaults = Config::default();
    let effective = in_force.as_ref().or(config.as_ref().ok()).unwrap_or(&defaults);
    let mut host = host.clone();
    if let Some(settings) = daemon.settings() {
        host.search_in(&settings.search_path);
    }
    let host = &host.with_containerd_at(&effective.containerd.address);
    let containerd = containerd::Setup::read(host);
    let mut findings = Vec::new();
    findings.extend(kernel::all(host, &containerd));
    findings.push(driver::finding(host, &containerd));
    findings.extend(systemd::all(host, reaper).await);
    findings.push(daemon::running(daemon, socket));
    match daemon.settings() {
        Some(settings) => findings.push(daemon::configuration(settings, config)),
        None => findings.push(configuration(config, config_path)),
    }
    findings.extend(socket.parent().into_iter().flat_map(|state| state::all(host, effective, state)));
    let runtimes = runtime::all(effective, reaper).await;
    match daemon.settings() {
        Some(settings) => findings.extend(daemon::sandboxers(settings, effective, &runtimes)),
        None => findings.extend(runtimes),
    }
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
