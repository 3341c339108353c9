//! Collection on request (`kuasarctl gc`): what containerd has forgotten, and what nobody answers for.
//!
//! What containerd knows is never removed; when it cannot be asked, nothing that it might know is.

use std::path::PathBuf;

use kuasar_sandboxers::{
    Result,
    collect::{Collected, Kind, Outcome},
    registry::Registry,
};
use serde::Serialize;

use crate::{
    abandoned::{Abandoned, Comparison},
    calls::Calls,
    forgotten::{self, Eyes, Missing, Scope},
};

/// What is asked, and where what is believed of it is remembered.
#[derive(Clone, Debug)]
pub struct Gc {
    /// containerd's gRPC socket.
    pub containerd: PathBuf,
    /// The file that says in which namespaces containerd lists our sandboxes.
    pub memory: PathBuf,
    /// Finds containers that containerd has given up.
    pub(crate) comparison: Comparison,
}

/// How a collection went.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    dry_run: bool,
    /// Why containerd could not be asked which sandboxes it knows.
    unanswered: Option<String>,
    collected: Vec<Collected>,
}

impl Gc {
    /// Collects, or only tells what would be.
    pub(crate) async fn run(self, registry: Registry, calls: Calls, dry_run: bool) -> Result<Report> {
        let mut collected = Vec::new();
        let comparison = self.comparison.clone();
        let unanswered = match Eyes::new(self.containerd, self.memory).look(&registry, Scope::All).await {
            Ok(missing) => {
                for missing in missing {
                    collected.push(forget(missing, &calls, dry_run).await);
                }
                None
            }
            Err(error) => Some(error.report()),
        };
        let unanswered = match comparison.find(&registry).await {
            Ok(abandoned) => {
                for abandoned in abandoned {
                    collected.push(give_up(abandoned, &calls, dry_run).await);
                }
                unanswered
            }
            Err(error) => unanswered.or_else(|| Some(error.report())),
        };
        collected.extend(registry.collect(dry_run).await?);
        Ok(Report { dry_run, unanswered, collected })
    }
}

async fn forget(missing: Missing, calls: &Calls, dry_run: bool) -> Collected {
    let (spec, containers) = (missing.status.spec.clone(), missing.status.containers.len());
    let why = match (missing.believed, containers) {
        (false, _) => {
            "containerd does not list it, but has never listed one of this namespace; is [containerd] address the one that calls?".into()
        }
        (true, 0) => "containerd does not know it".into(),
        (true, _) => format!("containerd knows neither it nor its containers, {containers} in all"),
    };
    Collected {
        kind: Kind::Forgotten,
        namespace: spec.namespace.clone(),
        sandbox: spec.id.clone(),
        what: format!("sandbox of pod {}/{}", spec.pod.namespace, spec.pod.name),
        why,
        processes: missing.processes(),
        outcome: match (missing.believed, dry_run) {
            (false, _) => Outcome::Kept,
            (true, true) => Outcome::WouldRemove,
            (true, false) => match forgotten::remove(calls, missing.sandbox).await {
                Ok(()) => Outcome::Removed,
                Err(error) => Outcome::Failed(error.report()),
            },
        },
    }
}

async fn give_up(abandoned: Abandoned, calls: &Calls, dry_run: bool) -> Collected {
    let sandbox = abandoned.sandbox.clone();
    Collected {
        kind: Kind::Abandoned,
        namespace: sandbox.namespace,
        sandbox: sandbox.id,
        what: format!("container {}", abandoned.status.id),
        why: "containerd has given it up: it has lost its connection, and containerd has no task of it".into(),
        processes: abandoned.processes(),
        outcome: match dry_run {
            true => Outcome::WouldRemove,
            false => match abandoned.end(calls).await {
                Ok(()) => Outcome::Removed,
                Err(error) => Outcome::Failed(error.report()),
            },
        },
    }
}
