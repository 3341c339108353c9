//! What can be configured. Plain and valid by construction; whoever reads a file makes one of these.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use serde::{Deserialize, Serialize};

/// Configuration of one runC sandboxer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuncConfig {
    /// The OCI runtime.
    pub runtime: RuntimeChoice,
    /// Directory for everything that lives as long as its sandbox: runtime state, pinned namespaces, pod files. Best on a tmpfs.
    pub root: PathBuf,
    /// How long one command of the OCI runtime may take before it is killed.
    pub command_limit: Duration,
}

impl Default for RuncConfig {
    fn default() -> Self {
        Self {
            runtime: RuntimeChoice::Auto,
            root: "/run/kuasar/runc".into(),
            // A node that swaps heavily needs many seconds for what takes milliseconds; CRI clients wait two minutes by default.
            command_limit: Duration::from_secs(60),
        }
    }
}

/// Which OCI runtime to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RuntimeChoice {
    /// The best that is installed.
    #[default]
    Auto,
    /// By name: what `KUASAR_RUNC`, `KUASAR_CRUN`, `KUASAR_YOUKI` name, else `libexec/kuasar` beside the daemon, else `PATH`.
    Named(RuntimeName),
    /// This program.
    Path(PathBuf),
}

/// OCI runtimes known by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RuntimeName {
    /// <https://github.com/opencontainers/runc>
    Runc,
    /// <https://github.com/containers/crun>
    Crun,
    /// <https://github.com/youki-dev/youki>
    Youki,
}

impl RuntimeName {
    /// The program's name.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Youki => "youki",
        }
    }

    /// The environment variable that names a program to use instead of the one on `PATH`.
    #[must_use]
    pub fn variable(self) -> &'static str {
        match self {
            Self::Runc => "KUASAR_RUNC",
            Self::Crun => "KUASAR_CRUN",
            Self::Youki => "KUASAR_YOUKI",
        }
    }
}

/// A text that is no [`RuntimeChoice`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownRuntime(String);

impl fmt::Display for UnknownRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not an OCI runtime; accepted: auto, runc, crun, youki, or an absolute path", self.0)
    }
}

impl std::error::Error for UnknownRuntime {}

impl FromStr for RuntimeChoice {
    type Err = UnknownRuntime;

    fn from_str(text: &str) -> Result<Self, UnknownRuntime> {
        match text {
            "auto" => Ok(Self::Auto),
            "runc" => Ok(Self::Named(RuntimeName::Runc)),
            "crun" => Ok(Self::Named(RuntimeName::Crun)),
            "youki" => Ok(Self::Named(RuntimeName::Youki)),
            path if path.starts_with('/') => Ok(Self::Path(path.into())),
            other => Err(UnknownRuntime(other.into())),
        }
    }
}

impl fmt::Display for RuntimeChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Named(name) => f.write_str(name.program()),
            Self::Path(path) => path.display().fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_survive_being_written() {
        for text in ["auto", "runc", "crun", "youki", "/opt/bin/runc"] {
            assert_eq!(text.parse::<RuntimeChoice>().unwrap().to_string(), text);
        }
        let error = "kata".parse::<RuntimeChoice>().unwrap_err();
        assert_eq!(error.to_string(), "\"kata\" is not an OCI runtime; accepted: auto, runc, crun, youki, or an absolute path");
    }
}
