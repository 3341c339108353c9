//! Live upgrade, as the worker sees it: it tells the keeper by which program to be replaced, and leaves (see [`server`](crate::server)).
//! What became of it the keeper tells the worker that serves afterwards.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use kuasar_sandboxers::{Error, Result};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::keeper::{wire::Outcome, worker::Keeper};

/// Who takes upgrades on. Clones share it.
#[derive(Clone, Debug)]
pub struct Upgrades {
    keeper: Keeper,
    leave: CancellationToken,
    last: Arc<Mutex<Option<Outcome>>>,
}

impl Upgrades {
    /// With what became of the last one.
    #[must_use]
    pub fn new(keeper: Keeper, last: Option<Outcome>) -> Self {
        Self { keeper, leave: CancellationToken::new(), last: Arc::new(Mutex::new(last)) }
    }

    /// Cancelled when this worker is to leave.
    #[must_use]
    pub fn leave(&self) -> CancellationToken {
        self.leave.clone()
    }

    /// Takes note of what became of the last one.
    pub fn note(&self, outcome: Outcome) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
    }

    /// What became of the last one.
    #[must_use]
    pub fn last(&self) -> Option<Outcome> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begins to be replaced by a program; without one, by what is installed where this one was. Returns the id that
    /// [`Self::last`] of the next worker tells the outcome for, and the program.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such program, [`Error::Unavailable`] when this worker is leaving already.
    pub fn begin(&self, binary: Option<PathBuf>) -> Result<(String, PathBuf)> {
        let binary = binary.map_or_else(installed, Ok)?;
        check(&binary)?;
        if self.leave.is_cancelled() {
            let why = "an upgrade is under way; wait for its end".into();
            return Err(Error::Unavailable { what: "kuasard".into(), why });
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let id = format!("{}-{}", std::process::id(), now.as_nanos());
        self.keeper.upgrade(&id, &binary).map_err(Error::failed("tell the keeper of the upgrade"))?;
        info!(binary = %binary.display(), id, "to be replaced: leaving");
        self.leave.cancel();
        Ok((id, binary))
    }
}

/// Where this program was when it was started; by now there may be another.
fn installed() -> Result<PathBuf> {
    let path = std::env::current_exe().map_err(Error::io("find", "/proc/self/exe"))?;
    // As the kernel shows one whose file has been replaced (proc_pid_exe(5)).
    let text = path.to_str().and_then(|path| path.strip_suffix(" (deleted)"));
    Ok(text.map_or_else(|| path.clone(), PathBuf::from))
}

fn check(binary: &Path) -> Result<()> {
    let invalid = |why: &str| Error::invalid("binary", format!("{} {why}", binary.display()));
    if !binary.is_absolute() {
        return Err(invalid("is no absolute path"));
    }
    let found = std::fs::metadata(binary).map_err(|error| invalid(&format!("cannot be used: {error}")))?;
    if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
        return Err(invalid("is no program; name kuasard's new binary"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;

    use super::*;

    #[test]
    fn only_a_program_is_taken_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        for path in [Path::new("kuasard"), dir.path(), &file, &dir.path().join("none")] {
            let error = check(path).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument);
            assert!(error.report().contains(&path.display().to_string()), "{}", error.report());
        }
        check(&installed().unwrap()).unwrap();
    }
}
