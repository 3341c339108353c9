//! The daemon that listens: what it goes by and what its sandboxers can do is asked of it, not guessed from this process.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Finding, Status, runtime::able};
use crate::config::{Config, ConfigErrors, SandboxerConfig};

/// Its answer to `kuasar.v1.Admin/Settings`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Its version.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Where it looks for programs (`PATH`).
    pub search_path: String,
    /// The file its configuration was read from, which may be missing.
    pub config: PathBuf,
    /// The configuration in force, as TOML.
    pub configuration: String,
    /// Its sandboxers.
    pub sandboxers: BTreeMap<String, Serving>,
}

/// What a sandboxer can do at the moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serving {
    /// It runs pods.
    Ready {
        /// What with.
        technique: String,
        /// The OCI runtime's `features` document.
        features: Option<Value>,
    },
    /// It cannot be set up at the moment; why.
    Unavailable(String),
}

/// What was learnt of the daemon.
#[derive(Debug)]
pub enum Daemon {
    /// It has answered.
    Answers(Box<Settings>),
    /// It listens, but does not tell; why.
    Silent(String),
    /// Nothing listens; why.
    Absent(String),
}

impl Daemon {
    /// Its settings, where it has told them.
    #[must_use]
    pub fn settings(&self) -> Option<&Settings> {
        match self {
            Self::Answers(settings) => Some(settings),
            Self::Silent(_) | Self::Absent(_) => None,
        }
    }
}

pub(super) fn running(daemon: &Daemon, socket: &Path) -> Finding {
    let (subject, socket) = ("kuasard", socket.display());
    match daemon {
        Daemon::Answers(settings) => {
            Finding::ok(subject, format!("{}, process {}, listens at {socket}", settings.version, settings.pid))
        }
        Daemon::Silent(why) => Finding::warn(
            subject,
            format!(
                "listens at {socket} but does not report its settings ({why}); the checks below use this shell's environment"
            ),
            "run the kuasarctl of the same version, and see the daemon's log if it does not answer that either",
        ),
        Daemon::Absent(why) => {
            let remedy = "systemctl start kuasard, or name its state directory with --state";
            Finding::missing(subject, format!("not running: {why}"), remedy).required()
        }
    }
}

/// The configuration in force, beside what its file says now.
pub(super) fn configuration(settings: &Settings, file: &Result<Config, ConfigErrors>) -> Finding {
    let (subject, path) = ("configuration", settings.config.display());
    let names: Vec<_> = settings.sandboxers.keys().map(String::as_str).collect();
    match file {
        Err(faults) => {
            let faults = faults.to_string().replace('\n', "; ");
            let detail = format!("{faults}; the daemon goes by what it read before, and would not start anew");
            Finding::warn(subject, detail, format!("correct {path} and its conf.d"))
        }
        Ok(config) if config.to_toml() != settings.configuration => {
            let detail = format!("{path}: changed since the daemon read it");
            Finding::warn(subject, detail, "kuasarctl upgrade, which reads it anew")
        }
        Ok(_) => {
            let source = if settings.config.exists() { path.to_string() } else { "defaults".to_owned() };
            Finding::ok(subject, format!("{source}: {}", names.join(", ")))
        }
    }
}

/// What the daemon's sandboxers run pods with. `seen` is what is found from here: where that is the same, it tells more, such as the path.
pub(super) fn sandboxers(settings: &Settings, config: &Config, seen: &[Finding]) -> Vec<Finding> {
    let finding = |(name, serving): (&String, &Serving)| {
        let machine = matches!(config.sandboxers.get(name), Some(SandboxerConfig::Vmm(_)));
        let subject = format!("{}, {name}", if machine { "virtual machines" } else { "OCI runtime" });
        let same = |technique: &str| {
            let same = seen.iter().find(|seen| seen.subject == subject && seen.detail.starts_with(technique));
            same.map(|seen| Finding { required: false, ..seen.clone() })
        };
        match serving {
            Serving::Ready { technique, features } => same(technique).unwrap_or_else(|| match machine {
                true => Finding::ok(subject, technique),
                false => able(subject, technique, features.as_ref()),
            }),
            Serving::Unavailable(why) => {
                Finding::missing(subject, why, "correct that; kuasard tries again by itself, no restart is needed")
            }
        }
    };
    let findings: Vec<_> = settings.sandboxers.iter().map(finding).collect();
    let none = findings.iter().all(|finding| finding.status == Status::Missing);
    findings.into_iter().map(|finding| if none { finding.required() } else { finding }).collect()
}
