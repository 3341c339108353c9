//! The state store: one file per sandbox, written whole.
//!
//! ```text
//! <state>/sandboxes/<namespace>/<sandbox id>/state.json     {"version": 1, …}
//! ```
//!
//! A write goes to a temporary file, which is synced and renamed, so a reader sees the old state or the new one. A file that
//! cannot be read is set aside beside itself and reported, never deleted: its sandbox may still run. The next daemon tries again: it may
//! be of the version that wrote the file.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
    time::SystemTime,
};

use nix::unistd::geteuid;
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

/// Others may pass: processes in a user namespace reach their hosts file through here.
const DIR_MODE: u32 = 0o711;
/// Environments and annotations are nobody else's business.
const FILE_MODE: u32 = 0o600;

const FILE: &str = "state.json";
const TEMPORARY: &str = ".state.json.new";
/// What a file that cannot be read is called from then on.
const ASIDE: &str = "state.json.unreadable";

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
    /// Out-of-memory kills that have been told.
    #[serde(default)]
    pub oom_kills: u64,
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
    /// Sandboxes whose files could not be read for the moment (no descriptors left, an error of the disk), and why.
    pub unread: Vec<((Namespace, SandboxId), Error)>,
    /// Directories of sandboxes that were never saved, so nothing of them was started.
    pub unsaved: Vec<PathBuf>,
}

/// Of any version.
#[derive(Deserialize)]
struct Version {
    version: Option<u32>,
}

/// A sandbox's directory, and what is in its state file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The sandbox.
    pub id: SandboxId,
    /// The directory.
    pub dir: PathBuf,
    /// How its state file is.
    pub file: StateFile,
}

/// How a state file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateFile {
    /// There was none yet.
    Missing,
    /// It can be read.
    Whole,
    /// It cannot be read.
    Unreadable {
        /// Where it is now.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// What is read in a sandbox's directory.
enum Found {
    Unsaved,
    /// Not now.
    Unread(Error),
    Whole(PathBuf, Box<SandboxRecord>),
    Unreadable(PathBuf, String),
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
        make_dir(&root)?;
        Ok(Self(root))
    }

    /// The same, without making anything: for who only looks.
    #[must_use]
    pub fn at(state: &Path) -> Self {
        Self(state.join("sandboxes"))
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
        make_dir(&self.0.join(namespace))?;
        let dir = self.dir(namespace, id);
        match DirBuilder::new().mode(DIR_MODE).create(&dir) {
            Ok(()) => {
                set_mode(&dir, DIR_MODE)?;
                Ok(dir)
            }
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
            let bytes = serde_json::to_vec(&Envelope { version: VERSION, record })?;
            write_private(&temporary, &bytes)?.sync_data()?;
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
            set_mode(&namespace, DIR_MODE)?;
            for dir in list(&namespace)? {
                set_mode(&dir, DIR_MODE)?;
                for file in [FILE, TEMPORARY, ASIDE].map(|name| dir.join(name)).iter().filter(|file| file.is_file()) {
                    set_mode(file, FILE_MODE)?;
                }
                match self.look(&dir)? {
                    Found::Unsaved => loaded.unsaved.push(dir),
                    Found::Unread(error) => match (name_of(&namespace), name_of(&dir)) {
                        (Some(namespace), Some(id)) => loaded.unread.push(((namespace, id), error)),
                        _ => return Err(error),
                    },
                    Found::Unreadable(file, why) => set_aside(&file, &why, &mut loaded),
                    Found::Whole(file, record) if file.ends_with(FILE) => loaded.records.push(*record),
                    Found::Whole(file, record) => match fs::rename(&file, dir.join(FILE)) {
                        Ok(()) => loaded.records.push(*record),
                        Err(error) => loaded.set_aside.push((file, format!("it cannot be put back: {error}"))),
                    },
                }
            }
        }
        Ok(loaded)
    }

    /// Looks at all sandboxes' directories and changes nothing. What appears or disappears meanwhile may be missing.
    ///
    /// # Errors
    /// When a directory cannot be listed.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        self.entries_except(&BTreeSet::new())
    }

    /// The same, without those that are known: their files are not read.
    ///
    /// # Errors
    /// When a directory cannot be listed.
    pub fn entries_except(&self, known: &BTreeSet<(Namespace, SandboxId)>) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for place in list_present(&self.0)? {
            let Some(namespace) = name_of::<Namespace>(&place) else { continue };
            for dir in list_present(&place)? {
                let Some(id) = name_of(&dir).filter(|id: &SandboxId| !known.contains(&(namespace.clone(), id.clone()))) else {
                    continue;
                };
                let file = match self.look(&dir) {
                    Ok(Found::Unsaved) => StateFile::Missing,
                    Ok(Found::Whole(path, _)) if path.ends_with(ASIDE) => StateFile::Unreadable {
                        path,
                        why: "it can be read again; kuasard takes it up when it starts again".into(),
                    },
                    Ok(Found::Whole(..)) => StateFile::Whole,
                    Ok(Found::Unreadable(path, why)) => StateFile::Unreadable { path, why },
                    Ok(Found::Unread(error)) => return Err(error),
                    Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(error),
                };
                entries.push(Entry { namespace: namespace.clone(), id, dir, file });
            }
        }
        Ok(entries)
    }

    fn look(&self, dir: &Path) -> Result<Found> {
        if is_unsaved(dir)? {
            return Ok(Found::Unsaved);
        }
        let there = |name: &str| Some(dir.join(name)).filter(|path| path.symlink_metadata().is_ok());
        let file = there(FILE).or_else(|| there(ASIDE)).unwrap_or_else(|| dir.join(FILE));
        Ok(match read(&file) {
            Ok(record) if self.dir(&record.spec.namespace, &record.spec.id) == dir => Found::Whole(file, Box::new(record)),
            Ok(_) => Found::Unreadable(file, "it describes another sandbox".into()),
            Err(ReadError::Wrong(why)) => Found::Unreadable(file, why),
            Err(ReadError::Io(error)) => Found::Unread(Error::io("read", file)(error)),
        })
    }

    /// Reads the state of one sandbox.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Invalid`] for one that cannot be understood.
    pub fn read(&self, namespace: &Namespace, id: &SandboxId) -> Result<SandboxRecord> {
        let dir = self.dir(namespace, id);
        match self.look(&dir)? {
            Found::Whole(_, record) => Ok(*record),
            Found::Unread(error) => Err(error),
            Found::Unreadable(file, why) => Err(Error::invalid(file.display().to_string(), why)),
            Found::Unsaved => Err(Error::NotFound { kind: "state of sandbox", id: id.to_string() }),
        }
    }
}

fn name_of<T: FromStr>(path: &Path) -> Option<T> {
    path.file_name()?.to_str()?.parse().ok()
}

fn make_dir(dir: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir).map_err(Error::io("create", dir))?;
    set_mode(dir, DIR_MODE)
}

/// Whatever the umask is, and whatever another version has made it.
fn set_mode(path: &Path, mode: u32) -> Result<()> {
    let set = || {
        let metadata = path.symlink_metadata()?;
        if metadata.is_symlink() || metadata.mode() & 0o7777 == mode {
            return Ok(());
        }
        fs::set_permissions(path, Permissions::from_mode(mode))
    };
    set().map_err(Error::io("change the mode of", path))
}

/// Writes a file that nobody else may read: specifications have passwords in them.
pub(crate) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(FILE_MODE).open(path)?;
    file.set_permissions(Permissions::from_mode(FILE_MODE))?;
    file.write_all(bytes)?;
    Ok(file)
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    let entries = entries.map_err(Error::io("list", dir))?;
    Ok(entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_dir()).collect())
}

/// The same; nothing if it is not there.
fn list_present(dir: &Path) -> Result<Vec<PathBuf>> {
    match list(dir) {
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        listed => listed,
    }
}

/// Why a state file is not read.
enum ReadError {
    /// It cannot be what it should be, now or later.
    Wrong(String),
    /// The kernel does not give it.
    Io(io::Error),
}

impl From<String> for ReadError {
    fn from(why: String) -> Self {
        Self::Wrong(why)
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ELOOP) => Self::Wrong("it is a symbolic link".into()),
            Some(libc::ENOENT | libc::ENXIO | libc::EISDIR) => Self::Wrong(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

fn read(file: &Path) -> Result<SandboxRecord, ReadError> {
    let bytes = read_own(file)?;
    // Parsed twice, which is faster than once into a tree: a new daemon reads the files of all sandboxes before it serves.
    let version = match serde_json::from_slice(&bytes) {
        Ok(Version { version }) => version,
        Err(error) if error.is_data() => None,
        Err(error) => return Err(format!("it is not JSON: {error}").into()),
    };
    match version {
        Some(VERSION) => serde_json::from_slice(&bytes).map_err(|error| format!("it is not a sandbox's state: {error}").into()),
        Some(version) => Err(format!("it has version {version}, this daemon reads version {VERSION}").into()),
        None => Err("it has no version".to_owned().into()),
    }
}

/// Reads a file that only this user can have written: what it says is done as root.
fn read_own(file: &Path) -> Result<Vec<u8>, ReadError> {
    // Not through a link, and without waiting for the writer of a FIFO.
    let mut opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(file)?;
    let metadata = opened.metadata()?;
    if !metadata.is_file() {
        return Err("it is not a regular file".to_owned().into());
    }
    if metadata.uid() != geteuid().as_raw() {
        return Err(format!("it belongs to user {}, not to user {} as the daemon", metadata.uid(), geteuid()).into());
    }
    if metadata.len() == 0 {
        return Err("it is empty".to_owned().into());
    }
    let mut bytes = Vec::new();
    opened.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Whether a daemon was killed, or the disk was full, between making the directory and the first save.
fn is_unsaved(dir: &Path) -> Result<bool> {
    let names =
        fs::read_dir(dir).and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>());
    Ok(names.map_err(Error::io("list", dir))?.iter().all(|name| name == TEMPORARY))
}

fn set_aside(file: &Path, why: &str, loaded: &mut Loaded) {
    let aside = file.with_file_name(ASIDE);
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
                oom_kills: 0,
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
    fn what_is_saved_is_nobody_elses_business() {
        let dir = tempfile::tempdir().unwrap();
        let (store, good) = store(dir.path());
        let (own, namespace) = (store.dir(&good.spec.namespace, &good.spec.id), dir.path().join("sandboxes/test"));
        let modes = || [&own, &namespace, &own.join(FILE)].map(|path| path.metadata().unwrap().mode() & 0o7777);
        assert_eq!(modes(), [0o711, 0o711, 0o600]);
        // As another version has made them, under a strange umask.
        for (path, mode) in [(&own, 0o777), (&namespace, 0o777), (&own.join(FILE), 0o666)] {
            fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        }
        assert_eq!(store.load().unwrap().records.len(), 1);
        assert_eq!(modes(), [0o711, 0o711, 0o600]);
    }

    #[test]
    fn a_file_that_cannot_be_read_for_the_moment_is_not_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (store, good) = store(dir.path());
        let error = |number| ReadError::from(io::Error::from_raw_os_error(number));
        for number in [libc::EMFILE, libc::ENFILE, libc::EIO, libc::ENOMEM] {
            assert!(matches!(error(number), ReadError::Io(_)), "{number}");
        }
        for number in [libc::ELOOP, libc::ENOENT] {
            assert!(matches!(error(number), ReadError::Wrong(_)), "{number}");
        }
        assert_eq!(store.read(&good.spec.namespace, &good.spec.id).unwrap(), good);
    }

    /// A store with one sandbox that can be read.
    fn store(state: &Path) -> (Store, SandboxRecord) {
        let (store, good) = (Store::open(state).unwrap(), record());
        store.make(&good.spec.namespace, &good.spec.id).unwrap();
        store.save(&good).unwrap();
        (store, good)
    }

    fn set_aside_for(words: &str, make: impl FnOnce(&Path, &[u8])) {
        let dir = tempfile::tempdir().unwrap();
        let (store, good) = store(dir.path());
        let whole = SandboxRecord { spec: crate::fake::spec("bad"), ..good.clone() };
        let bad = store.make(&whole.spec.namespace, &whole.spec.id).unwrap();
        store.save(&whole).unwrap();
        let bytes = fs::read(bad.join(FILE)).unwrap();
        make(&bad.join(FILE), &bytes);
        let (file, aside) = (bad.join(FILE), bad.join(ASIDE));
        let entry = |path| {
            let entries = store.entries().unwrap().into_iter();
            let StateFile::Unreadable { path: told, why } = { entries }.find(|entry| entry.dir == bad).unwrap().file else {
                panic!("{words}: it is taken for whole")
            };
            assert_eq!(told, path);
            assert!(why.contains(words), "{why}");
        };
        entry(file.clone());
        // Each daemon that starts tries again.
        for _ in 0..2 {
            let loaded = store.load().unwrap();
            assert_eq!(loaded.records, std::slice::from_ref(&good));
            let [(path, why)] = &loaded.set_aside[..] else { panic!("{words}: {loaded:?}") };
            assert_eq!(path, &aside);
            assert!(why.contains(words), "{why}");
            assert!(!file.exists() && aside.symlink_metadata().is_ok());
            entry(aside.clone());
        }
        // Its owner is found first.
        assert!(matches!(store.make(&whole.spec.namespace, &whole.spec.id), Err(Error::AlreadyExists { .. })));
        // Somebody has mended it, or it is of this daemon's version after all.
        fs::remove_file(&aside).unwrap();
        fs::write(&aside, bytes).unwrap();
        entry_can_be_read_again(&store, &bad);
        assert_eq!(store.load().unwrap().records.len(), 2);
        assert!(file.exists() && !aside.exists());
    }

    fn entry_can_be_read_again(store: &Store, dir: &Path) {
        let entries = store.entries().unwrap();
        let entry = entries.iter().find(|entry| entry.dir == dir).unwrap();
        assert!(matches!(&entry.file, StateFile::Unreadable { why, .. } if why.contains("again")), "{entry:?}");
    }

    #[test]
    fn a_torn_file_is_set_aside() {
        set_aside_for("not JSON", |file, bytes| fs::write(file, &bytes[..bytes.len() / 2]).unwrap());
        set_aside_for("no version", |file, _| fs::write(file, "[]").unwrap());
        set_aside_for("not a sandbox's state", |file, _| fs::write(file, "{\"version\": 1}").unwrap());
    }

    #[test]
    fn an_empty_file_is_set_aside() {
        set_aside_for("empty", |file, _| fs::write(file, "").unwrap());
    }

    #[test]
    fn a_file_of_a_newer_version_is_set_aside() {
        set_aside_for("version 2", |file, bytes| {
            let mut value: Value = serde_json::from_slice(bytes).unwrap();
            value["version"] = (VERSION + 1).into();
            fs::write(file, value.to_string()).unwrap();
        });
    }

    #[test]
    fn a_file_of_another_sandbox_is_set_aside() {
        set_aside_for("another sandbox", |file, bytes| {
            fs::write(file, String::from_utf8_lossy(bytes).replace("\"id\":\"bad\"", "\"id\":\"worse\"")).unwrap();
        });
    }

    #[test]
    fn a_file_that_another_user_may_have_written_is_set_aside() {
        if geteuid().is_root() {
            set_aside_for("user 12345", |file, _| std::os::unix::fs::chown(file, Some(12345), None).unwrap());
        } else {
            eprintln!("SKIP a_file_that_another_user_may_have_written_is_set_aside: giving a file away takes root");
        }
        set_aside_for("symbolic link", |file, _| {
            let other = file.with_file_name("other");
            fs::rename(file, &other).unwrap();
            std::os::unix::fs::symlink(other, file).unwrap();
        });
        set_aside_for("not a regular file", |file, _| {
            fs::remove_file(file).unwrap();
            nix::unistd::mkfifo(file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        });
    }

    #[test]
    fn a_sandbox_that_was_never_saved_is_no_bad_one() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Store::at(dir.path()).entries().unwrap(), []);
        let (store, good) = store(dir.path());
        let unsaved = store.make(&good.spec.namespace, &"unsaved".parse().unwrap()).unwrap();
        fs::write(unsaved.join(TEMPORARY), "{").unwrap();
        let mut files: Vec<_> = store.entries().unwrap().into_iter().map(|entry| (entry.id.to_string(), entry.file)).collect();
        files.sort_by(|one, other| one.0.cmp(&other.0));
        assert_eq!(files, [("pod-1".to_owned(), StateFile::Whole), ("unsaved".to_owned(), StateFile::Missing)]);
        let loaded = store.load().unwrap();
        assert_eq!((loaded.records, loaded.unsaved, loaded.set_aside), (vec![good], vec![unsaved], Vec::new()));
    }
}
