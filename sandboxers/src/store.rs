//! The state store: one file per sandbox, written whole.
//!
//! ```text
//! <state>/sandboxes/<namespace>/<sandbox id>/state.json     {"version": 1, …}
//! ```
//!
//! A write goes to a temporary file, which is synced and renamed, so a reader sees the old state or the new one. A file that
//! cannot be read is set aside beside itself and reported, never deleted: its sandbox may still run.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, ErrorKind, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    event::Event,
    id::{ContainerId, ExecId, Namespace, SandboxId},
    lifecycle::{ProcessState, SandboxState},
    stdio::Stdio,
    types::{ContainerHead, SandboxSpec},
};

/// The version of the format below. A file of a newer version is set aside, not guessed at.
pub const VERSION: u32 = 1;

const FILE: &str = "state.json";
const TEMPORARY: &str = ".state.json.new";

/// Everything known of a sandbox.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// As it was asked for.
    pub spec: SandboxSpec,
    /// Where it is in its life.
    pub state: SandboxState,
    /// When it was created.
    pub created_at: SystemTime,
    /// The backend's own record.
    pub backend: Value,
    /// Its containers.
    pub containers: Vec<ContainerRecord>,
    /// What was deleted last: who asked for it may not have been answered.
    #[serde(default)]
    pub deleted: Vec<DeletedRecord>,
    /// Events that containerd may not have got.
    #[serde(default)]
    pub events: Vec<Event>,
}

/// A process that has been deleted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeletedRecord {
    /// The container.
    pub container: ContainerId,
    /// The exec; `None` for the container's first process.
    pub exec: Option<ExecId>,
    /// How it ended.
    pub state: ProcessState,
}

/// Everything known of a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// What it is.
    pub head: ContainerHead,
    /// Its first process.
    pub state: ProcessState,
    /// The backend's own record.
    pub backend: Value,
    /// Additional processes.
    pub execs: Vec<ExecRecord>,
}

/// Everything known of an exec.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExecRecord {
    /// The exec.
    pub id: ExecId,
    /// Its input and output.
    pub stdio: Stdio,
    /// Where it is in its life.
    pub state: ProcessState,
    /// The backend's own record.
    pub backend: Value,
}

/// What a restart finds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Sandboxes that can be read.
    pub records: Vec<SandboxRecord>,
    /// Files that cannot, where they have been put, and why.
    pub set_aside: Vec<(PathBuf, String)>,
    /// Directories of sandboxes that were never saved, so nothing of them was started.
    pub unsaved: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    version: u32,
    #[serde(flatten)]
    record: &'a SandboxRecord,
}

/// The directory all state is under.
#[derive(Clone, Debug)]
pub struct Store(PathBuf);

impl Store {
    /// Uses `<state>/sandboxes`, making it where it is missing.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn open(state: &Path) -> Result<Self> {
        let root = state.join("sandboxes");
        make_dir(&root, 0o711)?;
        Ok(Self(root))
    }

    /// A sandbox's own directory.
    #[must_use]
    pub fn dir(&self, namespace: &Namespace, id: &SandboxId) -> PathBuf {
        self.0.join(namespace).join(id)
    }

    /// Makes a sandbox's directory; a leftover of the same name is an error, for its owner has to be found first.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`], or what the file system says.
    pub fn make(&self, namespace: &Namespace, id: &SandboxId) -> Result<PathBuf> {
        make_dir(&self.0.join(namespace), 0o711)?;
        let dir = self.dir(namespace, id);
        // Search permission for others: processes in a user namespace reach their hosts file through here.
        match DirBuilder::new().mode(0o711).create(&dir) {
            Ok(()) => Ok(dir),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(Error::AlreadyExists { kind: "sandbox directory", id: dir.display().to_string() })
            }
            Err(error) => Err(Error::io("create", dir)(error)),
        }
    }

    /// Writes a sandbox's state whole.
    ///
    /// # Errors
    /// What the file system says; the earlier state is then still there.
    pub fn save(&self, record: &SandboxRecord) -> Result<()> {
        let dir = self.dir(&record.spec.namespace, &record.spec.id);
        let temporary = dir.join(TEMPORARY);
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            let bytes = serde_json::to_vec(&Envelope { version: VERSION, record })?;
            file.write_all(&bytes)?;
            file.sync_data()?;
            fs::rename(&temporary, dir.join(FILE))
        };
        write().map_err(Error::io("save the state in", &dir))
    }

    /// Removes a sandbox's directory and all that is in it. Mounts below it must be gone: it does not cross into one.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self, namespace: &Namespace, id: &SandboxId) -> Result<()> {
        let dir = self.dir(namespace, id);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
            _ => Ok(()),
        }
    }

    /// Reads all sandboxes, and sets aside what cannot be read.
    ///
    /// # Errors
    /// When a directory cannot be listed.
    pub fn load(&self) -> Result<Loaded> {
        let mut loaded = Loaded::default();
        for namespace in list(&self.0)? {
            for dir in list(&namespace)? {
                let file = dir.join(FILE);
                if is_unsaved(&dir)? {
                    loaded.unsaved.push(dir);
                    continue;
                }
                match read(&file) {
                    Ok(record) if self.dir(&record.spec.namespace, &record.spec.id) == dir => loaded.records.push(record),
                    Ok(_) => set_aside(&file, "it describes another sandbox", &mut loaded),
                    Err(why) => set_aside(&file, &why, &mut loaded),
                }
            }
        }
        Ok(loaded)
    }
}

fn make_dir(dir: &Path, mode: u32) -> Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(Error::io("create", dir))
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let entries = entries.map_err(Error::io("list", dir))?;
    Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

fn read(file: &Path) -> Result<SandboxRecord, String> {
    let bytes = fs::read(file).map_err(|error| error.to_string())?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|error| format!("it is not JSON: {error}"))?;
    match value.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {
            serde_json::from_value(value).map_err(|error| format!("it is not a sandbox's state: {error}"))
        }
        Some(version) => Err(format!("it has version {version}, this daemon reads version {VERSION}")),
        None => Err("it has no version".into()),
    }
}

/// Whether a daemon was killed, or the disk was full, between making the directory and the first save.
fn is_unsaved(dir: &Path) -> Result<bool> {
    let names =
        fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>());
    Ok(names.map_err(Error::io("list", dir))?.iter().all(|name| name == TEMPORARY))
}

fn set_aside(file: &Path, why: &str, loaded: &mut Loaded) {
    let aside = file.with_extension("json.unreadable");
    match fs::rename(file, &aside) {
        Ok(()) => loaded.set_aside.push((aside, why.into())),
        Err(error) => loaded.set_aside.push((file.to_path_buf(), format!("{why}; it cannot be renamed either: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Exit;

    fn record() -> SandboxRecord {
        SandboxRecord {
            spec: crate::fake::spec("pod-1"),
            state: SandboxState::Created,
            created_at: SystemTime::UNIX_EPOCH,
            backend: Value::Null,
            containers: vec![ContainerRecord {
                head: ContainerHead { id: "web".parse().unwrap(), bundle: "/b".into(), stdio: Stdio::default() },
                state: ProcessState::Stopped { pid: 3, exit: Exit { status: 1, at: SystemTime::UNIX_EPOCH } },
                backend: serde_json::json!({"pid": 3}),
                execs: Vec::new(),
            }],
            deleted: Vec::new(),
            events: Vec::new(),
        }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let record = record();
        store.make(&record.spec.namespace, &record.spec.id).unwrap();
        store.save(&record).unwrap();
        assert_eq!(store.load().unwrap().records, std::slice::from_ref(&record));
        assert!(matches!(store.make(&record.spec.namespace, &record.spec.id), Err(Error::AlreadyExists { .. })));
        store.remove(&record.spec.namespace, &record.spec.id).unwrap();
        store.remove(&record.spec.namespace, &record.spec.id).unwrap();
        assert!(store.load().unwrap().records.is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_set_aside_and_the_rest_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let good = record();
        store.make(&good.spec.namespace, &good.spec.id).unwrap();
        store.save(&good).unwrap();
        let newer = format!("{{\"version\": {}}}", VERSION + 1);
        for (id, text) in [("torn", "{\"version\": 1, \"spec\""), ("empty", ""), ("newer", newer.as_str()), ("other", "[]")] {
            let dir = store.make(&good.spec.namespace, &id.parse().unwrap()).unwrap();
            fs::write(dir.join(FILE), text).unwrap();
        }
        let unsaved = store.make(&good.spec.namespace, &"unsaved".parse().unwrap()).unwrap();
        fs::write(unsaved.join(TEMPORARY), "{").unwrap();
        let loaded = store.load().unwrap();
        assert_eq!(loaded.records, [good]);
        assert_eq!(loaded.unsaved, [unsaved]);
        assert_eq!(loaded.set_aside.len(), 4);
        for (path, why) in loaded.set_aside {
            assert!(path.ends_with("state.json.unreadable") && path.exists(), "{path:?}: {why}");
        }
    }
}
