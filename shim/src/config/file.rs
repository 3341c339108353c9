//! Reading configuration files, but only those that nobody but root (or whoever runs this) could have written: what a file
//! names is executed as root.

use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use super::fault::Faults;

/// More than any configuration needs; keeps a mistaken path (a log, a device) from filling the memory.
const MAX_BYTES: u64 = 1 << 20;

/// The texts of `path` and of `conf.d/*.toml` beside it, in the order in which they are merged.
pub(super) fn read_all(path: &Path, may_be_missing: bool, faults: &mut Faults) -> Vec<(PathBuf, String)> {
    let mut texts = Vec::new();
    match read(path) {
        Ok(text) => texts.push((path.to_path_buf(), text)),
        Err(Refusal::Io(error)) if error.kind() == ErrorKind::NotFound => {
            if !may_be_missing {
                faults.in_file(path, "does not exist; create it, or leave the option out to run with the defaults");
            }
        }
        Err(refusal) => faults.in_file(path, refusal.to_string()),
    }
    let directory = path.parent().unwrap_or(Path::new("")).join("conf.d");
    let drop_ins = match drop_ins(&directory) {
        Ok(paths) => paths,
        Err(refusal) => {
            faults.in_file(&directory, refusal.to_string());
            return texts;
        }
    };
    for path in drop_ins {
        match read(&path) {
            Ok(text) => texts.push((path, text)),
            Err(refusal) => faults.in_file(&path, refusal.to_string()),
        }
    }
    texts
}

fn drop_ins(directory: &Path) -> Result<Vec<PathBuf>, Refusal> {
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    check_writers(&std::fs::metadata(directory)?)?;
    let mut paths = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        // Editors' and package managers' leftovers begin with a dot or end otherwise.
        if Path::new(&name).extension().is_some_and(|extension| extension == "toml")
            && !name.as_encoded_bytes().starts_with(b".")
        {
            paths.push(directory.join(name));
        }
    }
    paths.sort();
    Ok(paths)
}

/// Why a file is not followed.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("is owned by uid {0}, not by root; refused, as it decides what runs as root: chown root it after reading it")]
    Owner(u32),
    #[error(
        "can be written by everybody (mode {0:04o}); refused, as it decides what runs as root: chmod o-w it after reading it"
    )]
    Writable(u32),
    #[error("is not a regular file")]
    Kind,
    #[error("is larger than {} KiB, which no configuration is", MAX_BYTES >> 10)]
    Size,
    #[error("is not UTF-8 text (at byte {0})")]
    Text(usize),
}

fn read(path: &Path) -> Result<String, Refusal> {
    // Without O_NONBLOCK a FIFO would hold the daemon up for ever. Everything is checked on the open file: a path could be
    // exchanged in between.
    let file: File = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(Refusal::Kind);
    }
    check_writers(&metadata)?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Refusal::Size);
    }
    String::from_utf8(bytes).map_err(|error| Refusal::Text(error.utf8_error().valid_up_to()))
}

fn check_writers(metadata: &std::fs::Metadata) -> Result<(), Refusal> {
    let uid = metadata.uid();
    // Whoever runs this can change what it does anyway, so his own files are as good as root's to him.
    if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        return Err(Refusal::Owner(uid));
    }
    if metadata.mode() & 0o002 != 0 {
        return Err(Refusal::Writable(metadata.mode() & 0o7777));
    }
    Ok(())
}
