//! What each sandboxer runs its containers with.

use kuasar_runc::Runtime;
use kuasar_sandboxers::reaper::Reaper;
use kuasar_vmm::VmmSandboxer;
use serde_json::Value;

use super::{Finding, Status};
use crate::config::{Config, SandboxerConfig};

/// Each sandboxer's runtime, found and asked exactly as the daemon does it.
pub(super) async fn all(config: &Config, reaper: &Reaper) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, sandboxer) in &config.sandboxers {
        let config = match sandboxer {
            SandboxerConfig::Runc(config) => config,
            SandboxerConfig::Vmm(config) => {
                let subject = format!("virtual machines, {name}");
                findings.push(match VmmSandboxer::check(config, reaper).await {
                    Ok(found) => Finding::ok(subject, found),
                    Err(error) => {
                        Finding::missing(subject, error.report(), "see docs/microvm.md for what virtual machines need")
                    }
                });
                continue;
            }
        };
        let subject = format!("OCI runtime, {name}");
        findings.push(match Runtime::find_as_known(&config.runtime, reaper, &config.root).await {
            Ok(runtime) => {
                let found = format!("{runtime} at {}", runtime.program().display());
                match (runtime.obstacle(), runtime.instead()) {
                    (Some(why), _) => {
                        let remedy = "set runtime = \"auto\" or \"runc\" in the sandboxer's table";
                        Finding::missing(subject, format!("{found}: {why}"), remedy)
                    }
                    (None, Some(why)) => able(subject, &format!("{found} (not the faster crun: {why})"), runtime.features()),
                    (None, None) => able(subject, &found, runtime.features()),
                }
            }
            Err(error) => {
                let remedy = "install crun or runc, or name one: runtime = \"/path\" in the sandboxer's table";
                Finding::missing(subject, error.report(), remedy)
            }
        });
    }
    // With one runtime that works, some pods do run.
    let none = findings.iter().all(|finding| finding.status == Status::Missing);
    findings.into_iter().map(|finding| if none { finding.required() } else { finding }).collect()
}

type Test = fn(&Value) -> bool;

/// What pods can ask for, and where the `features` document (runtime-spec `features.md`) tells of it.
const ABILITIES: [(&str, Test); 4] = [
    ("seccomp", |features| features.pointer("/linux/seccomp/enabled") == Some(&Value::Bool(true))),
    ("user namespaces", |features| has(&features["linux"]["namespaces"], "user")),
    ("id-mapped mounts", |features| features.pointer("/linux/mountExtensions/idmap/enabled") == Some(&Value::Bool(true))),
    ("recursive read-only mounts", |features| has(&features["mountOptions"], "rro")),
];

fn has(list: &Value, text: &str) -> bool {
    list.as_array().into_iter().flatten().any(|item| item == text)
}

pub(super) fn able(subject: String, found: &str, features: Option<&Value>) -> Finding {
    let remedy = "install runc 1.2 or later, or crun 1.9 or later, built with libseccomp";
    let Some(features) = features else {
        let detail =
            format!("{found}: does not tell what it can do, so pods get no user namespaces and no recursive read-only mounts");
        return Finding::warn(subject, detail, remedy);
    };
    let (able, lacking): (Vec<_>, Vec<_>) = ABILITIES.iter().partition(|(_, test)| test(features));
    let names =
        |abilities: Vec<&(&'static str, _)>| abilities.into_iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    if lacking.is_empty() {
        return Finding::ok(subject, format!("{found}: {}", names(able)));
    }
    let detail = if able.is_empty() {
        format!("{found}: no {}", names(lacking))
    } else {
        format!("{found}: {}; no {}", names(able), names(lacking))
    };
    Finding::warn(subject, detail, remedy)
}
