//! Collection on request: what no sandbox of this daemon answers for.
//!
//! ```text
//!   what is known      sandboxes in the registry, being created among them, and directories in the state store
//!        │             taken before the backends look
//!        ▼
//!   what backends find beyond that, each with the sandbox it belonged to
//!        │             the id is reserved: unknown still, and nobody can create it
//!        ▼
//!   removal
//! ```
//!
//! A creation makes its id known before anything else, and a deletion keeps it until nothing is left. So what is found of a sandbox that
//! was created after the known ones were noted is known by the time its removal is considered, and left alone; and none can come into
//! being under an id whose remains are being removed.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tracing::{error, info};

use crate::{
    contract::{Known, Leftover},
    error::Result,
    id::{Namespace, SandboxId},
    registry::Registry,
    store::{Entry, StateFile},
};

type Key = (Namespace, SandboxId);

/// Why something is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A sandbox that containerd does not know.
    Forgotten,
    /// A container that containerd has given up.
    Abandoned,
    /// What a daemon has left of a sandbox that nobody knows.
    Leftover,
    /// A sandbox whose state file cannot be read.
    SetAside,
    /// A sandbox that this daemon could not take over.
    Unrecovered,
}

/// What becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Nothing, because it was only asked.
    WouldRemove,
    /// It is gone.
    Removed,
    /// It stays.
    Kept,
    /// It should be gone, and is not; why.
    Failed(String),
}

/// A thing that was looked at by a collection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Why it was looked at.
    pub kind: Kind,
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The sandbox it belongs to, or is.
    pub sandbox: SandboxId,
    /// What it is, for people.
    pub what: String,
    /// Why it goes, or stays.
    pub why: String,
    /// Its live processes.
    pub processes: Vec<u32>,
    /// What becomes of it.
    pub outcome: Outcome,
}

/// A sandbox that nobody looks after: its state file cannot be read, or it could not be recovered.
#[derive(Debug)]
pub struct SetAside {
    /// Where it is, and how its state file is.
    pub entry: Entry,
    /// What is wrong.
    pub why: String,
    /// Its live processes.
    pub processes: Result<Vec<u32>>,
}

/// An id that nobody can create as long as this lives.
struct Reserved<'a>(&'a Registry, Key);

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        let (namespace, id) = &self.1;
        self.0.forget_sandbox(namespace, id);
    }
}

impl Registry {
    /// Sandboxes whose state files cannot be read.
    ///
    /// # Errors
    /// When the state directory cannot be read.
    pub async fn set_aside(&self) -> Result<Vec<SetAside>> {
        let mut found = Vec::new();
        for entry in self.strangers()? {
            if let StateFile::Unreadable { why, .. } = &entry.file {
                let (why, processes) = (why.clone(), self.processes(&entry.namespace, &entry.id).await);
                found.push(SetAside { entry, why, processes });
            }
        }
        Ok(found)
    }

    /// Sandboxes that could not be recovered yet, in the same form.
    pub async fn not_recovered(&self) -> Vec<SetAside> {
        let mut found = Vec::new();
        for ((namespace, id), why) in self.unrecovered() {
            let (dir, processes) = (self.store().dir(&namespace, &id), self.processes(&namespace, &id).await);
            let why = format!("it could not be taken over, which is tried again: {why}");
            found.push(SetAside { entry: Entry { namespace, id, dir, file: StateFile::Whole }, why, processes });
        }
        found
    }

    /// Directories in the store that belong to no sandbox of the registry.
    fn strangers(&self) -> Result<Vec<Entry>> {
        let entries = self.store().entries_except(&self.keys())?;
        // Once more: a creation makes its id known before its directory.
        let known = self.keys();
        // A deletion that has come to its end meanwhile has removed the directory before it gave up the id.
        let stranger = |entry: &Entry| !known.contains(&(entry.namespace.clone(), entry.id.clone())) && entry.dir.exists();
        Ok(entries.into_iter().filter(stranger).collect())
    }

    /// The live processes of a sandbox, found without its record.
    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        let mut found = BTreeSet::new();
        for sandboxer in self.backends() {
            found.extend(sandboxer.processes(namespace, id).await?);
        }
        Ok(found.into_iter().collect())
    }

    /// Removes, or only tells, what no sandbox of this registry answers for: what backends find of unknown sandboxes, and sandboxes whose
    /// state files cannot be read and of which no process lives.
    ///
    /// # Errors
    /// When the state directory cannot be read, or a backend cannot look.
    pub async fn collect(&self, dry_run: bool) -> Result<Vec<Collected>> {
        // A recovery may be at work on the same leftovers.
        let _alone = self.collecting().lock().await;
        let strangers = self.strangers()?;
        let mut known: Known = self.keys().into_iter().map(|key| (key, None)).collect();
        known.extend(strangers.iter().map(|entry| ((entry.namespace.clone(), entry.id.clone()), None)));

        let mut collected = Vec::new();
        let mut emptied = BTreeMap::new();
        for entry in strangers {
            let StateFile::Unreadable { why, .. } = &entry.file else {
                collected.extend(unrecovered(entry));
                continue;
            };
            let key = (entry.namespace.clone(), entry.id.clone());
            let mut item = Collected {
                kind: Kind::SetAside,
                namespace: key.0.clone(),
                sandbox: key.1.clone(),
                what: entry.dir.display().to_string(),
                why: format!("its state cannot be read: {why}"),
                processes: Vec::new(),
                outcome: Outcome::Kept,
            };
            match self.processes(&key.0, &key.1).await {
                Ok(processes) if processes.is_empty() => {
                    item.why.push_str("; none of its processes lives");
                    known.remove(&key);
                    emptied.insert(key, (item, Vec::new()));
                    continue;
                }
                Ok(processes) => item.processes = processes,
                Err(error) => item.why = format!("{}; its processes cannot be looked for: {}", item.why, error.report()),
            }
            collected.push(item);
        }

        collected.extend(self.not_recovered().await.into_iter().map(|SetAside { entry, why, processes }| Collected {
            kind: Kind::Unrecovered,
            namespace: entry.namespace,
            sandbox: entry.id,
            what: entry.dir.display().to_string(),
            why,
            processes: processes.unwrap_or_default(),
            outcome: Outcome::Kept,
        }));

        let mut leftovers = Vec::new();
        // What one has left that is not available is not lost sight of: it is looked for when it is.
        for sandboxer in self.backends().filter(|sandboxer| sandboxer.unavailable().is_none()) {
            for leftover in sandboxer.leftovers(&known).await? {
                match emptied.get_mut(&leftover.sandbox) {
                    Some((_, remains)) => remains.push(leftover),
                    None => leftovers.push(leftover),
                }
            }
        }
        for leftover in leftovers {
            collected.extend(self.collect_leftover(leftover, dry_run).await);
        }
        for (key, (item, remains)) in emptied {
            collected.extend(self.collect_emptied(key, item, remains, dry_run).await);
        }
        Ok(collected)
    }

    /// Keeps an id from being created; `None` when somebody has it.
    fn reserve(&self, key: &Key) -> Option<Reserved<'_>> {
        self.claim_id(key).then(|| Reserved(self, key.clone()))
    }

    async fn collect_leftover(&self, leftover: Leftover, dry_run: bool) -> Option<Collected> {
        let Leftover { sandbox: key, what, removal } = leftover;
        let reserved = self.reserve(&key)?;
        // Saved since the store was looked at.
        if self.store().dir(&key.0, &key.1).exists() {
            return None;
        }
        // Only told; the removal finds them by itself.
        let processes = self.processes(&key.0, &key.1).await.unwrap_or_default();
        let outcome = if dry_run { Outcome::WouldRemove } else { outcome(&what, removal.await) };
        drop(reserved);
        let why = "no state file and no sandbox of this daemon tells of it".to_owned();
        Some(Collected { kind: Kind::Leftover, namespace: key.0, sandbox: key.1, what, why, processes, outcome })
    }

    async fn collect_emptied(&self, key: Key, item: Collected, remains: Vec<Leftover>, dry_run: bool) -> Option<Collected> {
        let reserved = self.reserve(&key)?;
        if dry_run {
            return Some(Collected { outcome: Outcome::WouldRemove, ..item });
        }
        let remove = async {
            for leftover in remains {
                leftover.removal.await?;
            }
            self.store().remove(&key.0, &key.1)
        };
        let outcome = outcome(&item.what, remove.await);
        drop(reserved);
        Some(Collected { outcome, ..item })
    }
}

fn unrecovered(entry: Entry) -> Option<Collected> {
    // What was never saved is removed at the end of a recovery.
    (entry.file == StateFile::Whole).then(|| Collected {
        kind: Kind::Unrecovered,
        namespace: entry.namespace,
        sandbox: entry.id,
        what: entry.dir.display().to_string(),
        why: "this daemon could not take it over; its log says why, and the next one tries again".into(),
        processes: Vec::new(),
        outcome: Outcome::Kept,
    })
}

fn outcome(what: &str, removed: Result<()>) -> Outcome {
    match removed {
        Ok(()) => {
            info!(what, "collected");
            Outcome::Removed
        }
        Err(error) => {
            error!(what, error = error.report(), "cannot be collected");
            Outcome::Failed(error.report())
        }
    }
}
