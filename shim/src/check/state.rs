//! State files that cannot be read, and what still runs of their sandboxes: without the daemon, which may be what is missing.

use std::{collections::BTreeSet, path::Path};

use kuasar_sandboxers::{
    Result,
    store::{Entry, StateFile, Store},
};

use super::{Finding, Host};
use crate::config::{Config, SandboxerConfig};

/// A finding for each file that cannot be read; `state` is the daemon's directory.
pub(super) fn all(host: &Host, config: &Config, state: &Path) -> Vec<Finding> {
    let subject = "sandboxes' state";
    let entries = match Store::at(&host.path(state)).entries() {
        Ok(entries) => entries,
        Err(error) => return vec![Finding::warn(subject, error.report(), "run this as root")],
    };
    let count = entries.len();
    let bad: Vec<_> = entries.into_iter().filter_map(|entry| unreadable(host, config, entry)).collect();
    if bad.is_empty() { vec![Finding::ok(subject, format!("{count} sandboxes, and all can be read"))] } else { bad }
}

fn unreadable(host: &Host, config: &Config, entry: Entry) -> Option<Finding> {
    let StateFile::Unreadable { path, why } = &entry.file else { return None };
    let subject = format!("state of sandbox {}", entry.id);
    let found = format!("{}: {why}", path.display());
    Some(match processes(host, config, &entry) {
        Err(error) => Finding::warn(subject, format!("{found}; {}", error.report()), "run this as root"),
        Ok(pids) if pids.is_empty() => Finding::warn(
            subject,
            format!("{found}; none of its processes lives"),
            "kuasarctl gc removes it; or mend the file and restart kuasard",
        ),
        Ok(pids) => {
            let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
            Finding::warn(
                subject,
                format!("{found}; nobody looks after its processes {}", pids.join(", ")),
                format!(
                    "mend the file, or install the version that wrote it, and restart kuasard; or give the sandbox up: kill -9 {}; kuasarctl gc",
                    pids.join(" ")
                ),
            )
        }
    })
}

fn processes(host: &Host, config: &Config, entry: &Entry) -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for sandboxer in config.sandboxers.values() {
        let root = host.path(sandboxer.root());
        found.extend(match sandboxer {
            SandboxerConfig::Runc(_) => kuasar_runc::processes(&root, &entry.namespace, &entry.id)?,
            SandboxerConfig::Vmm(_) => kuasar_vmm::processes(&root, &entry.namespace, &entry.id)?,
        });
    }
    Ok(found)
}
