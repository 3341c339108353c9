//! The format of what outlives a daemon: state files, and what its parts leave with each other.
//!
//! `<state>/format.json` says which version has written there last, so that an older daemon refuses to start instead of setting aside
//! every sandbox it cannot read.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    store::write_private,
};

/// The format that this program writes. Names of parked descriptors have a namespace since 2.
const FORMAT: u32 = 2;

const FILE: &str = "format.json";

#[derive(Serialize, Deserialize)]
struct Format {
    version: u32,
    /// The version of the program.
    writer: String,
}

/// Refuses a state directory that a newer format has been written to.
///
/// # Errors
/// [`Error::Invalid`] then; [`Error::Io`] when the file cannot be read.
pub fn admit(state: &Path) -> Result<()> {
    let path = state.join(FILE);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text.map_err(Error::io("read", &path))?,
    };
    match serde_json::from_slice(&text) {
        Ok(Format { version, writer }) if version > FORMAT => Err(Error::invalid(
            "state directory",
            format!(
                "{} was written by kuasard {writer} in format {version}, and this is kuasard {}, which knows formats up to \
                 {FORMAT}: it cannot take over what runs there; run that version, or drain the node and remove the directory first",
                state.display(),
                env!("CARGO_PKG_VERSION"),
            ),
        )),
        Ok(_) => Ok(()),
        // Written over below. Each state file tells its own version, too.
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "cannot tell the format of the state directory; taken for ours");
            Ok(())
        }
    }
}

/// Says that this daemon's format is written there from now on.
///
/// # Errors
/// [`Error::Io`].
pub fn note(state: &Path) -> Result<()> {
    let path = state.join(FILE);
    let format = Format { version: FORMAT, writer: env!("CARGO_PKG_VERSION").into() };
    let bytes = serde_json::to_vec(&format).map_err(Error::failed("write down the format of the state directory"))?;
    if fs::read(&path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    write_private(&path, &bytes).map(drop).map_err(Error::io("write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    #[test]
    fn a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        admit(dir.path()).unwrap();
        note(dir.path()).unwrap();
        let written: Format = serde_json::from_slice(&fs::read(dir.path().join(FILE)).unwrap()).unwrap();
        assert_eq!(written.version, 2);
        let write = |version: u32| {
            let text = serde_json::to_vec(&Format { version, writer: "99.9".into() }).unwrap();
            fs::write(dir.path().join(FILE), text).unwrap();
        };
        for version in [1, 2] {
            write(version);
            admit(dir.path()).unwrap();
        }
        write(3);
        let error = admit(dir.path()).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.report().contains("kuasard 99.9"), "{}", error.report());
        fs::write(dir.path().join(FILE), "").unwrap();
        admit(dir.path()).unwrap();
    }
}
