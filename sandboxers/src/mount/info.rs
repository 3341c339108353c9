//! The mount table, `/proc/<pid>/mountinfo` (proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    fs,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The directory of the filesystem that is mounted.
    pub root: PathBuf,
    /// Where, as this process sees it.
    pub point: PathBuf,
    /// Filesystem type.
    pub kind: String,
    /// Options of the filesystem (not of the mount).
    pub options: String,
}

impl MountEntry {
    /// Reads one line; `None` when it is not one.
    #[must_use]
    pub fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let root = unescape(fields.nth(3)?);
        let point = unescape(fields.next()?);
        // After the options comes a list of any length, ended by a dash.
        fields.by_ref().find(|field| *field == b"-")?;
        let kind = String::from_utf8_lossy(fields.next()?).into_owned();
        let options = String::from_utf8_lossy(fields.nth(1).unwrap_or_default()).into_owned();
        Some(Self { root: root.into(), point: point.into(), kind, options })
    }
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut text = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|digits| byte == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        if let Some(digits) = digits {
            let value = digits.iter().fold(0u16, |value, digit| value << 3 | u16::from(digit - b'0'));
            // Above 0o377 it is no byte, and the kernel does not write it.
            text.push((value & 0xff) as u8);
            rest = &tail[3..];
        } else {
            text.push(byte);
            rest = tail;
        }
    }
    OsString::from_vec(text)
}

/// The table, with a line for each of this process's mounts.
fn table() -> Result<Vec<u8>> {
    let path = "/proc/self/mountinfo";
    fs::read(path).map_err(Error::io("read", path))
}

/// This process's mounts, oldest first.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn mounts() -> Result<Vec<MountEntry>> {
    Ok(table()?.split(|byte| *byte == b'\n').filter_map(MountEntry::parse).collect())
}

/// Those of other kinds of filesystem than these.
pub(super) fn mounts_except(kinds: &[&str]) -> Result<Vec<MountEntry>> {
    // Cheap first: few lines need to be taken apart. The dash stands before the kind, and nowhere else between two spaces.
    let other = |line: &&[u8]| {
        let dash = line.windows(3).position(|part| part == b" - ");
        let kind = dash.and_then(|dash| line[dash + 3..].split(|byte| *byte == b' ').next());
        kind.is_some_and(|kind| !kinds.iter().any(|known| known.as_bytes() == kind))
    };
    Ok(table()?.split(|byte| *byte == b'\n').filter(other).filter_map(MountEntry::parse).collect())
}

/// Mount points at `path` and below it, oldest first; one that is mounted on twice is named twice.
///
/// # Errors
/// When `/proc` cannot be read. A missing `path` has no mounts.
pub fn mounted_under(path: &Path) -> Result<Vec<PathBuf>> {
    // The table has real paths. The last component is not followed: a link is not a mount point.
    let parent = path.parent().unwrap_or(Path::new("/"));
    let path = match (fs::canonicalize(parent), path.file_name()) {
        (Ok(parent), Some(name)) => parent.join(name),
        (Ok(root), None) => root,
        (Err(error), _) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        (Err(error), _) => return Err(Error::io("resolve", parent)(error)),
    };
    let mut found = Vec::new();
    for line in table()?.split(|byte| *byte == b'\n') {
        // Cheap first: the table of a busy node is long, and few lines need to be taken apart.
        let Some(field) = line.split(|byte| *byte == b' ').nth(4) else { continue };
        let point = if field.contains(&b'\\') { unescape(field) } else { std::ffi::OsStr::from_bytes(field).to_owned() };
        if Path::new(&point).starts_with(&path) {
            found.push(point.into());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_optional_fields_and_escapes() {
        let line = b"33 31 0:30 /a\\040b /sys/fs/cgroup/cpu\\134x rw,relatime shared:5 master:1 - cgroup none rw,cpu,cpuacct";
        let entry = MountEntry::parse(line).unwrap();
        assert_eq!(entry.root, Path::new("/a b"));
        assert_eq!(entry.point, Path::new("/sys/fs/cgroup/cpu\\x"));
        assert_eq!((entry.kind.as_str(), entry.options.as_str()), ("cgroup", "rw,cpu,cpuacct"));
        assert_eq!(MountEntry::parse(b""), None);
    }

    #[test]
    fn finds_proc_and_nothing_below_what_is_not_there() {
        assert!(mounted_under(Path::new("/proc")).unwrap().contains(&PathBuf::from("/proc")));
        assert!(mounted_under(Path::new("/proc/../nowhere/at/all")).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn never_panics(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = MountEntry::parse(&line);
        }

        #[test]
        fn escapes_round_trip(path in "/[ -~\\t\\n]{0,40}") {
            let escaped: String = path
                .bytes()
                .map(|byte| match byte {
                    b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}"),
                    byte => char::from(byte).to_string(),
                })
                .collect();
            prop_assert_eq!(unescape(escaped.as_bytes()), OsString::from(path));
        }
    }
}
