//! Configuration of the daemon: one TOML file and the `conf.d/*.toml` beside it.
//!
//! ```text
//!  config.toml ─┐                ┌─ [containerd] ──▶ Containerd
//!  conf.d/a.toml├─ parse, merge ─┼─ [log] ─────────▶ Log
//!  conf.d/b.toml┘   (tree)       └─ [sandboxer.x] ─▶ SandboxerConfig      (section by section)
//! ```
//!
//! Two layers: [`tree`] is what was written, each value with the file and line it came from; [`Config`] is what it means.
//! Between them stands [`section`], which takes known keys out of a table one at a time and notes a fault for whatever is
//! wrong or left over. Nothing stops at the first fault: whoever edits a file by hand should see the whole list at once. That
//! is why neither serde nor a merging library does this: both give up at the first thing they do not like.
//!
//! Drop-ins are merged in the order of their names, table by table; the later value of a key wins. Files that somebody other
//! than root could have written are refused (see [`file`]).

mod fault;
mod file;
mod sandboxer;
mod section;
mod tree;
mod vmm;

#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use self::{fault::Faults, section::Section, tree::Node};
pub use self::{
    fault::{ConfigErrors, Fault},
    sandboxer::SandboxerConfig,
};

/// Where the configuration is read from unless told otherwise. This file alone may be missing: then everything has its default.
pub const DEFAULT_PATH: &str = "/etc/kuasar/config.toml";

/// Environment variable that names the file instead, for the daemon, the shim (which containerd starts) and `kuasarctl`.
pub const PATH_VARIABLE: &str = "KUASAR_CONFIG";

/// The daemon's state directory unless told otherwise.
pub const DEFAULT_STATE: &str = "/run/kuasar";

/// Where containerd listens by default.
const DEFAULT_CONTAINERD_ADDRESS: &str = "/run/containerd/containerd.sock";

/// What the daemon was told, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The containerd that this daemon serves.
    pub containerd: Containerd,
    /// Logging.
    pub log: Log,
    /// The sandboxers by name. Never empty.
    pub sandboxers: BTreeMap<String, SandboxerConfig>,
}

/// The table `[containerd]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Containerd {
    /// containerd's gRPC socket; its ttrpc socket, to which events go, is this path with `.ttrpc` added.
    pub address: PathBuf,
}

/// The table `[log]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// Least severe message that is written.
    pub level: LogLevel,
}

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// Only what failed.
    Error,
    /// And what is odd.
    Warn,
    /// And what happened.
    #[default]
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    const ALL: [Self; 5] = [Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace];

    /// The word used in the configuration, which is also tracing's.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|level| level.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a log level; accepted: {}", Self::ALL.map(Self::as_str).join(", ")))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::defaults_in(Path::new(DEFAULT_STATE))
    }
}

impl Config {
    /// What holds when nothing is written, for a daemon with this state directory: sandboxers keep what they have below it.
    #[must_use]
    pub fn defaults_in(state: &Path) -> Self {
        Self {
            containerd: Containerd { address: DEFAULT_CONTAINERD_ADDRESS.into() },
            log: Log { level: LogLevel::default() },
            sandboxers: sandboxer::defaults(state),
        }
    }

    /// Reads `path` and the `conf.d/*.toml` beside it, for a daemon with this state directory: unless told otherwise,
    /// sandboxers keep what they have below it.
    ///
    /// # Errors
    /// Every fault found in any of the files. A missing file is one, except [`DEFAULT_PATH`].
    pub fn load(path: &Path, state: &Path) -> Result<Self, ConfigErrors> {
        Self::load_files(path, path == Path::new(DEFAULT_PATH), state)
    }

    /// The file to read when no option names one: [`PATH_VARIABLE`], else [`DEFAULT_PATH`].
    #[must_use]
    pub fn default_path() -> PathBuf {
        std::env::var_os(PATH_VARIABLE).filter(|path| !path.is_empty()).map_or_else(|| DEFAULT_PATH.into(), PathBuf::from)
    }

    fn load_files(path: &Path, may_be_missing: bool, state: &Path) -> Result<Self, ConfigErrors> {
        let mut faults = Faults::default();
        let texts = file::read_all(path, may_be_missing, &mut faults);
        Self::from_texts(&texts, state, faults)
    }

    /// What one text means; `name` stands for the file in faults.
    ///
    /// # Errors
    /// Every fault found.
    pub fn parse(name: &Path, text: &str) -> Result<Self, ConfigErrors> {
        Self::from_texts(&[(name.to_path_buf(), text.to_owned())], Path::new(DEFAULT_STATE), Faults::default())
    }

    fn from_texts(texts: &[(PathBuf, String)], state: &Path, mut faults: Faults) -> Result<Self, ConfigErrors> {
        let mut merged = Node::empty();
        for (path, text) in texts {
            merged.merge(tree::parse(path, text, &mut faults));
        }
        let config = Self::from_tree(merged, state, &mut faults);
        faults.into_result(config)
    }

    fn from_tree(root: Node, state: &Path, faults: &mut Faults) -> Self {
        let mut config = Self::defaults_in(state);
        let mut root = Section::root(root, faults);
        if let Some(mut table) = root.table("containerd") {
            if let Some(address) = table.absolute_path("address") {
                config.containerd.address = address;
            }
            table.finish();
        }
        if let Some(mut table) = root.table("log") {
            if let Some(level) = table.parsed("level") {
                config.log.level = level;
            }
            table.finish();
        }
        if let Some(sandboxers) = root.table("sandboxer") {
            let sandboxers = sandboxer::read_all(sandboxers, state);
            // An empty table is as good as none: a daemon without a sandboxer could do nothing.
            if !sandboxers.is_empty() {
                config.sandboxers = sandboxers;
            }
        }
        root.finish();
        config
    }

    /// The same configuration as one file.
    #[must_use]
    pub fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut root = toml::Table::new();
        let table = |entries: Vec<(&str, toml::Value)>| {
            toml::Value::Table(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
        };
        let address = self.containerd.address.display().to_string();
        root.insert("containerd".into(), table(vec![("address", address.into())]));
        root.insert("log".into(), table(vec![("level", self.log.level.as_str().into())]));
        let sandboxers = self.sandboxers.iter().map(|(name, config)| (name.clone(), config.to_toml().into()));
        root.insert("sandboxer".into(), toml::Value::Table(sandboxers.collect()));
        write!(f, "{root}")
    }
}
