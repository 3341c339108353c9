//! Reading and removing in cgroupfs.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::SplitAsciiWhitespace,
};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Groups within groups that are followed. cgroup v2 has a limit of its own only where an administrator sets one.
const DEPTH: usize = 32;

/// The files of one group; one buffer for all.
pub(super) struct Files {
    path: PathBuf,
    text: Vec<u8>,
}

impl Files {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { path: dir, text: Vec::new() }
    }

    /// A file's text; `None` when it is not there, its controller is off, or the group is gone.
    pub(super) fn text(&mut self, name: &str) -> Result<Option<&str>> {
        self.path.push(name);
        self.text.clear();
        let result = File::open(&self.path).and_then(|mut file| file.read_to_end(&mut self.text));
        let path = match result {
            Ok(_) => {
                self.path.pop();
                let text = str::from_utf8(&self.text).map_err(Error::failed(format!("read {name}")))?;
                return Ok(Some(text));
            }
            Err(error) => {
                let path = self.path.clone();
                self.path.pop();
                if is_absent(&error) {
                    return Ok(None);
                }
                Error::io("read", path)(error)
            }
        };
        Err(path)
    }

    /// The number in a file; `max` is the greatest.
    pub(super) fn number(&mut self, name: &str) -> Result<Option<u64>> {
        Ok(self.text(name)?.map(|text| number(text.trim())))
    }

    /// The lines `key value` of a file, given to `each`; whether the file is there.
    pub(super) fn pairs(&mut self, name: &str, mut each: impl FnMut(&str, u64)) -> Result<bool> {
        let Some(text) = self.text(name)? else { return Ok(false) };
        for line in text.lines() {
            if let Some((key, value)) = line.split_once(' ') {
                each(key, number(value.trim()));
            }
        }
        Ok(true)
    }

    /// `rdma.current` and `rdma.max`: `<device> hca_handle=<n> hca_object=<n>`.
    pub(super) fn rdma(&mut self, name: &str) -> Result<Option<Vec<RdmaEntry>>> {
        Ok(self.text(name)?.map(|text| text.lines().filter_map(rdma_entry).collect()))
    }
}

/// Use or limit of one RDMA device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaEntry {
    /// Device name.
    pub device: String,
    /// Handles.
    pub hca_handles: u32,
    /// Objects.
    pub hca_objects: u32,
}

/// Use and limits of RDMA devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaStat {
    /// What is used.
    pub current: Vec<RdmaEntry>,
    /// What may be used.
    pub limit: Vec<RdmaEntry>,
}

fn rdma_entry(line: &str) -> Option<RdmaEntry> {
    let mut fields = line.split_ascii_whitespace();
    let mut entry = RdmaEntry { device: fields.next()?.into(), ..RdmaEntry::default() };
    for (key, value) in key_values(fields) {
        let value = u32::try_from(number(value)).unwrap_or(u32::MAX);
        match key {
            "hca_handle" => entry.hca_handles = value,
            "hca_object" => entry.hca_objects = value,
            _ => {}
        }
    }
    Some(entry)
}

/// Fields of the form `key=value`.
pub(super) fn key_values<'a>(fields: SplitAsciiWhitespace<'a>) -> impl Iterator<Item = (&'a str, &'a str)> {
    fields.filter_map(|field| field.split_once('='))
}

/// `8:16`.
pub(super) fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A number as the kernel writes it. `max` means no limit; negative ones occur for counters that are off for a moment.
pub(super) fn number(text: &str) -> u64 {
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP | libc::ENOTDIR))
}

/// Page sizes as hugetlb files have them in their names (`2MB`, `1GB`); they do not change while the kernel runs.
pub(super) fn huge_page_sizes() -> &'static [String] {
    static SIZES: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
    SIZES.get_or_init(|| {
        let Ok(entries) = fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
        let mut sizes: Vec<u64> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok())
            .collect();
        sizes.sort_unstable();
        sizes.into_iter().map(page_size_name).collect()
    })
}

fn page_size_name(kib: u64) -> String {
    match kib {
        kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
        kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
        kib => format!("{kib}KB"),
    }
}

/// Collects the processes of a group and of those below it.
pub(super) fn processes(dir: &Path, pids: &mut Vec<u32>) -> Result<()> {
    walk(dir, DEPTH, &mut |dir| {
        let file = dir.join("cgroup.procs");
        match fs::read_to_string(&file) {
            // 0 stands for a process that our pid namespace does not see.
            Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse().ok()).filter(|pid: &u32| *pid != 0)),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(Error::io("read", file)(error)),
        }
        Ok(())
    })
}

/// Calls `found` for each group of this name at `dir` or below it.
pub(super) fn find(dir: &Path, name: &str, found: &mut dyn FnMut(&Path)) -> Result<()> {
    walk(dir, DEPTH, &mut |dir| {
        if dir.file_name().is_some_and(|own| own == name) {
            found(dir);
        }
        Ok(())
    })
}

/// Removes a group and those below it; `false` when one is in use.
pub(super) fn remove(dir: &Path) -> Result<bool> {
    // Most have none below.
    match fs::remove_dir(dir) {
        Ok(()) => return Ok(true),
        Err(error) if is_absent(&error) => return Ok(true),
        Err(_) => {}
    }
    let mut free = true;
    walk(dir, DEPTH, &mut |dir| {
        match fs::remove_dir(dir) {
            Ok(()) => {}
            Err(error) if is_absent(&error) => {}
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => free = false,
            Err(error) => return Err(Error::io("remove control group", dir)(error)),
        }
        Ok(())
    })?;
    Ok(free)
}

/// Visits a group after those below it.
fn walk(dir: &Path, depth: usize, visit: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    let metadata = match fs::symlink_metadata(dir) {
        Ok(metadata) => metadata,
        Err(error) if is_absent(&error) => return Ok(()),
        Err(error) => return Err(Error::io("look at", dir)(error)),
    };
    // cgroupfs counts directories in the link count, so a group without any need not be listed.
    if depth > 0 && metadata.nlink() != 2 {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if is_absent(&error) => return Ok(()),
            Err(error) => return Err(Error::io("list", dir)(error)),
        };
        for entry in entries {
            let entry = entry.map_err(Error::io("list", dir))?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), depth - 1, visit)?;
            }
        }
    }
    visit(dir)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn numbers_of_every_kind() {
        assert_eq!(number("max"), u64::MAX);
        assert_eq!(number("18446744073709551615"), u64::MAX);
        assert_eq!(number("-1"), 0);
        assert_eq!(device("8:16"), Some((8, 16)));
        assert_eq!(["64", "2048", "1048576"].map(|kib| page_size_name(number(kib))), ["64KB", "2MB", "1GB"]);
    }

    #[test]
    fn rdma_limits() {
        let entry = rdma_entry("mlx4_0 hca_handle=2 hca_object=max").unwrap();
        assert_eq!(entry, RdmaEntry { device: "mlx4_0".into(), hca_handles: 2, hca_objects: u32::MAX });
        assert_eq!(rdma_entry(""), None);
    }

    #[test]
    fn missing_is_not_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Files::new(dir.path().to_owned());
        assert_eq!(files.number("pids.max").unwrap(), None);
        fs::write(dir.path().join("pids.max"), "max\n").unwrap();
        assert_eq!(files.number("pids.max").unwrap(), Some(u64::MAX));
        assert_eq!(files.path, dir.path());
        let mut pids = Vec::new();
        processes(&dir.path().join("gone"), &mut pids).unwrap();
        assert!(pids.is_empty() && remove(&dir.path().join("gone")).unwrap());
    }

    proptest! {
        #[test]
        fn anything_can_be_read(text in "\\PC{0,60}") {
            let _ = (number(&text), device(&text), rdma_entry(&text));
        }
    }
}
