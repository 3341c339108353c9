//! What is known of the node's OCI runtimes: to ask one what it is takes it tens of milliseconds, and so does a trial, and a daemon that
//! starts again has pods that wait. Known as long as the program is the same file and the kernel the same boot's.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use kuasar_sandboxers::{Error, Result};
use serde::{Deserialize, Serialize};

use super::probe::Facts;

/// The file's name, in the sandboxer's directory.
const FILE: &str = ".runtimes.json";

/// Where this boot has a name of its own.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// By program.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(default)]
    boot: String,
    #[serde(default)]
    runtimes: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    identity: [i64; 5],
    facts: Facts,
}

impl Record {
    /// What a daemon has written in its sandboxer's directory. What cannot be read is found out again.
    pub(super) fn read(root: &Path) -> Self {
        let boot = fs::read_to_string(BOOT).unwrap_or_default();
        let read = fs::read(root.join(FILE)).ok().and_then(|text| serde_json::from_slice::<Self>(&text).ok());
        read.filter(|record| record.boot == boot).unwrap_or(Self { boot, runtimes: BTreeMap::new() })
    }

    /// What is known of a program.
    pub(super) fn get(&self, program: &Path) -> Option<Facts> {
        let entry = self.runtimes.get(program)?;
        (identity(program).ok()? == entry.identity).then(|| entry.facts.clone())
    }

    /// Takes note, also for the next daemon.
    pub(super) fn put(&mut self, root: &Path, facts: &Facts) -> Result<()> {
        let program = facts.program.clone();
        let identity = identity(&program).map_err(Error::io("look at", &program))?;
        self.runtimes.insert(program, Entry { identity, facts: facts.clone() });
        let (path, new) = (root.join(FILE), root.join(format!("{FILE}.new")));
        let text = serde_json::to_vec(self).map_err(Error::failed("write down what a runtime is"))?;
        let write = || {
            fs::create_dir_all(root)?;
            let mut file = fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            io::Write::write_all(&mut file, &text)?;
            fs::rename(&new, &path)
        };
        write().map_err(Error::io("write", &path))
    }
}

/// What changes when a file is replaced or written.
fn identity(program: &Path) -> io::Result<[i64; 5]> {
    let file = program.metadata()?;
    Ok([file.dev().cast_signed(), file.ino().cast_signed(), file.size().cast_signed(), file.mtime(), file.ctime_nsec()])
}
