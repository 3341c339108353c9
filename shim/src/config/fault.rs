//! What can be wrong with a configuration, collected.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Origin {
    pub(super) file: Arc<Path>,
    /// Counted from one.
    pub(super) line: usize,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// The file it is in.
    pub file: PathBuf,
    /// The line, counted from one, where it concerns a line.
    pub line: Option<usize>,
    /// Path of the key, as `sandboxer.kuasar-runc.runtime`; empty where it concerns the whole file.
    pub key: String,
    /// What is wrong and what would be accepted.
    pub problem: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        if !self.key.is_empty() {
            write!(f, " {}:", self.key)?;
        }
        write!(f, " {}", self.problem)
    }
}

/// Everything that is wrong with a configuration, one line each in the order of files and lines. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<Fault>);

impl ConfigErrors {
    /// The faults.
    #[must_use]
    pub fn faults(&self) -> &[Fault] {
        &self.0
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Faults found so far.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<Fault>);

impl Faults {
    /// One that concerns a whole file.
    pub(super) fn in_file(&mut self, file: &Path, problem: impl Into<String>) {
        self.0.push(Fault { file: file.to_path_buf(), line: None, key: String::new(), problem: problem.into() });
    }

    /// One that concerns a place in a file.
    pub(super) fn at(&mut self, origin: &Origin, key: impl Into<String>, problem: impl Into<String>) {
        let Origin { file, line } = origin;
        self.0.push(Fault { file: file.to_path_buf(), line: Some(*line), key: key.into(), problem: problem.into() });
    }

    /// The value, if nothing was wrong.
    pub(super) fn into_result<T>(mut self, value: T) -> Result<T, ConfigErrors> {
        if self.0.is_empty() {
            return Ok(value);
        }
        self.0.sort();
        self.0.dedup();
        Err(ConfigErrors(self.0))
    }
}
