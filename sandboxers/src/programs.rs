//! What is known of programs of the node that a sandboxer uses: to ask one what it is and can do takes it tens of milliseconds, and a
//! daemon that starts again has pods that wait. Known as long as the program is the same file, this is the same version, and the
//! kernel the same boot's.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use tracing::warn;

use crate::{
    error::{Error, Result},
    store::write_private,
};

/// The file's name, in the sandboxer's directory.
pub const FILE: &str = ".programs.json";

/// Where this boot has a name of its own.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// By program. The default knows nothing and writes nothing down.
#[derive(Debug, Default)]
pub struct Programs {
    record: Record,
    /// Where to write down what is found out.
    root: Option<PathBuf>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    boot: String,
    /// Our version: another one may ask programs for more.
    #[serde(default)]
    ours: String,
    programs: BTreeMap<PathBuf, Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    identity: [i64; 5],
    facts: Value,
}

impl Programs {
    /// What a daemon has written in its sandboxer's directory. What cannot be read is found out again.
    #[must_use]
    pub fn load(root: &Path) -> Self {
        let boot = fs::read_to_string(BOOT).unwrap_or_default();
        let new = Record { boot, ours: env!("CARGO_PKG_VERSION").into(), programs: BTreeMap::new() };
        let read = fs::read(root.join(FILE)).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok());
        let record = read.filter(|read| (&read.boot, &read.ours) == (&new.boot, &new.ours)).unwrap_or(new);
        Self { record, root: None }
    }

    /// The same, and what is found out is written down there for the next daemon.
    #[must_use]
    pub fn load_and_record(root: &Path) -> Self {
        Self { root: Some(root.to_owned()), ..Self::load(root) }
    }

    /// What is known of a program.
    #[must_use]
    pub fn get<T: DeserializeOwned>(&self, program: &Path) -> Option<T> {
        let entry = self.record.programs.get(program)?;
        (identity(program).ok()? == entry.identity).then(|| serde_json::from_value(entry.facts.clone()).ok())?
    }

    /// Records what was found out.
    pub fn record<T: Serialize>(&mut self, program: &Path, facts: &T) {
        // Without it the next daemon finds out again.
        if let Err(error) = self.write(program, facts) {
            warn!(error = error.report(), program = %program.display(), "cannot write down what a program can do");
        }
    }

    fn write<T: Serialize>(&mut self, program: &Path, facts: &T) -> Result<()> {
        let failed = || Error::failed("write down what a program can do");
        let identity = identity(program).map_err(Error::io("look at", program))?;
        let facts = serde_json::to_value(facts).map_err(failed())?;
        self.record.programs.insert(program.to_owned(), Entry { identity, facts });
        // A sandboxer's directory is made when all that it needs has been found. Before that the next daemon asks once more.
        let Some(root) = self.root.as_ref().filter(|root| root.is_dir()) else { return Ok(()) };
        let (path, new) = (root.join(FILE), root.join(format!("{FILE}.new")));
        let text = serde_json::to_vec(&self.record).map_err(failed())?;
        write_private(&new, &text).and_then(|_| fs::rename(&new, &path)).map_err(Error::io("write", &path))
    }
}

/// What changes when a file is replaced or written.
fn identity(program: &Path) -> io::Result<[i64; 5]> {
    let file = program.metadata()?;
    Ok([file.dev().cast_signed(), file.ino().cast_signed(), file.size().cast_signed(), file.mtime(), file.ctime_nsec()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn until_the_program_changes() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, "1").unwrap();
        let root = dir.path().join("root");
        Programs::load_and_record(&root).record(&program, &(7, 2));
        assert!(!root.exists());
        fs::create_dir(&root).unwrap();
        Programs::load_and_record(&root).record(&program, &(7, 2));
        assert_eq!(Programs::load(&root).get::<(u32, u32)>(&program), Some((7, 2)));
        // What another version of ours has written.
        assert_eq!(Programs::load(&root).get::<String>(&program), None);
        fs::write(&program, "22").unwrap();
        assert_eq!(Programs::load(&root).get::<(u32, u32)>(&program), None);

        let mut read = Programs::load(&root);
        read.record(&program, &"new");
        assert_eq!((read.get(&program), Programs::load(&root).get(&program)), (Some("new".to_owned()), None::<String>));
        fs::write(root.join(FILE), "{").unwrap();
        assert_eq!(Programs::load(&root).get::<(u32, u32)>(&program), None);
    }

    #[test]
    fn of_this_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let program = Path::new("/proc/self/exe");
        Programs::load_and_record(dir.path()).record(program, &1);
        let path = dir.path().join(FILE);
        let mut record: Record = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        record.boot = "another".into();
        fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
        assert_eq!(Programs::load(dir.path()).get::<u32>(program), None);
    }
}
