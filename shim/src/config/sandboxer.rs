//! The tables `[sandboxer.<name>]`, one per sandboxer instance.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use kuasar_runc::{RuncConfig, RuntimeChoice};
use kuasar_vmm::VmmConfig;

use super::{
    fault::Origin,
    section::{Section, absolute_path},
    vmm,
};

/// Name of the sandboxer that exists when the configuration names none.
const DEFAULT_NAME: &str = "kuasar-runc";

/// Names that mean something else to containerd: its two built-in sandboxers, and its default runtime handler, which a
/// sandboxer of that name would silently replace.
const RESERVED: [&str; 3] = ["podsandbox", "shim", "runc"];

/// Longest DNS label (RFC 1123), the form Kubernetes wants of a RuntimeClass handler.
const MAX_NAME: usize = 63;

/// One sandboxer instance: the technique, and how it is set up.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum SandboxerConfig {
    /// `kind = "runc"`: containers as processes on this kernel, through an OCI runtime.
    Runc(RuncConfig),
    /// `kind = "vmm"`: each pod in a virtual machine of its own.
    Vmm(Box<VmmConfig>),
}

impl SandboxerConfig {
    /// The directory for what lives as long as its sandboxes.
    #[must_use]
    pub fn root(&self) -> &Path {
        match self {
            Self::Runc(config) => &config.root,
            Self::Vmm(config) => &config.root,
        }
    }
}

/// What runs when nothing is configured.
pub(super) fn defaults(state: &Path) -> BTreeMap<String, SandboxerConfig> {
    BTreeMap::from([(DEFAULT_NAME.to_owned(), SandboxerConfig::Runc(default_runc(state, DEFAULT_NAME)))])
}

/// A sandboxer's directory is its own: it removes what it finds there and does not know.
fn default_runc(state: &Path, name: &str) -> RuncConfig {
    RuncConfig { root: state.join("runc").join(name), ..RuncConfig::default() }
}

pub(super) fn read_all(mut section: Section<'_>, state: &Path) -> BTreeMap<String, SandboxerConfig> {
    let mut sandboxers = BTreeMap::new();
    let mut roots: Vec<(String, PathBuf, Origin)> = Vec::new();
    section.tables(|name, mut table| {
        if let Err(problem) = check_name(name) {
            table.fault_here(problem);
        }
        let origin = table.origin_of("root");
        if let Some(config) = read(name, table, state) {
            roots.push((name.to_owned(), config.root().to_owned(), origin));
            sandboxers.insert(name.to_owned(), config);
        }
    });
    for (index, (name, root, origin)) in roots.iter().enumerate() {
        let within = |other: &Path| root.starts_with(other) || other.starts_with(root);
        if let Some((other, path, _)) = roots[..index].iter().find(|(_, other, _)| within(other)) {
            let problem = format!(
                "{} is not its own: sandboxer {other} has {}; accepted: a directory that no other sandboxer has, nor one in or above it",
                root.display(),
                path.display()
            );
            section.fault_in(origin, name, "root", problem);
        }
    }
    sandboxers
}

fn check_name(name: &str) -> Result<(), String> {
    let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let label = !name.is_empty()
        && name.len() <= MAX_NAME
        && name.bytes().all(inside)
        && !name.starts_with('-')
        && !name.ends_with('-');
    if !label {
        return Err(format!(
            "{name:?} is not a name for a sandboxer; accepted: up to {MAX_NAME} lower case letters, digits and inner hyphens, \
             as in {DEFAULT_NAME}"
        ));
    }
    if RESERVED.contains(&name) {
        return Err(format!("the name {name:?} means something else to containerd; take another, as {DEFAULT_NAME}"));
    }
    Ok(())
}

/// The techniques by name.
const KINDS: [&str; 2] = ["runc", "vmm"];

/// Range of `command_limit_secs`. Below a second a busy node would fail for nothing; above an hour nobody waits.
const COMMAND_LIMIT_SECS: RangeInclusive<i64> = 1..=3600;

fn read(name: &str, mut table: Section<'_>, state: &Path) -> Option<SandboxerConfig> {
    let missing = table.is_missing("kind");
    let kind = table.checked("kind", |kind| {
        KINDS
            .into_iter()
            .find(|known| *known == kind)
            .ok_or_else(|| format!("{kind:?} is not a kind of sandboxer; accepted: {}", KINDS.join(", ")))
    });
    if missing {
        table.fault_here(format!("has no kind; accepted: {}", KINDS.map(|kind| format!("kind = \"{kind}\"")).join(", ")));
    }
    // With an unknown kind nobody can say which other keys are right.
    match kind? {
        "vmm" => Some(SandboxerConfig::Vmm(Box::new(vmm::read(name, table, state)))),
        _ => Some(SandboxerConfig::Runc(read_runc(name, table, state))),
    }
}

fn read_runc(name: &str, mut table: Section<'_>, state: &Path) -> RuncConfig {
    let mut config = default_runc(state, name);
    if let Some(runtime) = table.checked("runtime", runtime) {
        config.runtime = runtime;
    }
    if let Some(root) = table.absolute_path("root") {
        config.root = root;
    }
    if let Some(seconds) = table.integer("command_limit_secs", COMMAND_LIMIT_SECS) {
        config.command_limit = Duration::from_secs(seconds.unsigned_abs());
    }
    table.finish();
    config
}

fn runtime(text: &str) -> Result<RuntimeChoice, String> {
    match text.parse().map_err(|error: kuasar_runc::config::UnknownRuntime| error.to_string())? {
        RuntimeChoice::Path(_) => absolute_path(text).map(RuntimeChoice::Path),
        choice => Ok(choice),
    }
}

impl SandboxerConfig {
    /// The table that means this.
    pub(super) fn to_toml(&self) -> toml::Table {
        let mut table = toml::Table::new();
        match self {
            Self::Runc(config) => {
                table.insert("kind".into(), "runc".into());
                table.insert("runtime".into(), config.runtime.to_string().into());
                table.insert("root".into(), config.root.display().to_string().into());
                // Read from whole seconds within COMMAND_LIMIT_SECS, so nothing is cut off here.
                let seconds = i64::try_from(config.command_limit.as_secs()).unwrap_or(*COMMAND_LIMIT_SECS.end());
                table.insert("command_limit_secs".into(), seconds.into());
            }
            Self::Vmm(config) => return vmm::to_toml(config),
        }
        table
    }
}
