//! A host to look at: the real one, or a directory that stands for one.

use std::{
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::containerd::{self, CONFIG, PROGRAM_VARIABLE, Running};

/// Files of /proc and /sys, and configuration files, are smaller.
const MAX_BYTES: u64 = 1 << 20;

/// Where files and programs are looked for.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
    search: Vec<PathBuf>,
    /// The containerd that [`containerd::PROGRAM_VARIABLE`](super::containerd::PROGRAM_VARIABLE) names.
    pub(super) containerd: Option<PathBuf>,
    /// containerd's configuration file.
    pub(super) containerd_config: PathBuf,
    /// Where containerd looks for programs, if not where we do.
    containerd_search: Option<Vec<PathBuf>>,
}

impl Host {
    /// This machine.
    #[must_use]
    pub fn this() -> Self {
        let search = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
        let containerd = std::env::var_os(PROGRAM_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        Self { root: "/".into(), search, containerd, containerd_config: CONFIG.into(), containerd_search: None }
    }

    /// A directory that stands for a machine; programs are looked for in its `usr/bin`.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        let search = vec!["/usr/bin".into()];
        Self { root: root.into(), search, containerd: None, containerd_config: CONFIG.into(), containerd_search: None }
    }

    /// Looks for programs where a daemon does.
    pub(super) fn search_in(&mut self, path: &str) {
        self.search = std::env::split_paths(path).collect();
    }

    /// Goes by the containerd that listens at `address`, where one does: its program, unless another is named, its configuration and its
    /// search path.
    #[must_use]
    pub fn with_containerd_at(mut self, address: &Path) -> Self {
        if let Some(running) = containerd::running_at(&self.path(address)) {
            self.see_containerd(running);
        }
        self
    }

    pub(super) fn see_containerd(&mut self, running: Running) {
        if let Some(config) = running.config {
            self.containerd_config = config;
        }
        self.containerd_search = running.search_path.map(|path| std::env::split_paths(&path).collect());
        self.containerd.get_or_insert(running.program);
    }

    /// Where an absolute path of the host is for us.
    #[must_use]
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Directory of the containerd program, as the host calls it.
    fn containerd_directory(&self) -> Option<PathBuf> {
        let named = self.containerd.clone();
        let on_path =
            || self.search.iter().map(|directory| directory.join("containerd")).find(|path| self.program(path).is_some());
        named.or_else(on_path)?.parent().map(Path::to_path_buf)
    }

    pub(super) fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.path(path).exists()
    }

    /// Text of a file without the white space around; `None` where it cannot be read.
    pub(super) fn read(&self, path: impl AsRef<Path>) -> Option<String> {
        let mut text = String::new();
        fs::File::open(self.path(path)).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned())
    }

    /// Names in a directory, sorted; none where it cannot be read.
    pub(super) fn list(&self, directory: impl AsRef<Path>) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// Whether the host has this program: an absolute path, or a name on the search path. Answers with where it is for us.
    pub(super) fn program(&self, name: impl AsRef<OsStr>) -> Option<PathBuf> {
        self.program_in(&self.search, Path::new(name.as_ref()))
    }

    /// Whether containerd finds this program.
    pub(super) fn containerd_finds(&self, name: &str) -> bool {
        let search = self.containerd_search.as_ref().unwrap_or(&self.search);
        // It also looks beside itself.
        let beside = || self.containerd_directory().is_some_and(|directory| self.program(directory.join(name)).is_some());
        self.program_in(search, Path::new(name)).is_some() || beside()
    }

    fn program_in(&self, search: &[PathBuf], name: &Path) -> Option<PathBuf> {
        let mut candidates = if name.is_absolute() {
            vec![self.path(name)]
        } else {
            search.iter().map(|directory| self.path(directory).join(name)).collect()
        };
        candidates.retain(|path| is_executable(path));
        candidates.into_iter().next()
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
