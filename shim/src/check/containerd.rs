//! containerd: which one, and whether its configuration knows our sandboxers.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fmt, fs,
    os::unix::{ffi::OsStrExt, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
    time::Duration,
};

use kuasar_sandboxers::reaper::Reaper;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use toml::{Table, Value};

use super::{Finding, Host, Status};
use crate::config::Config;

pub use super::kernel::may_lower_oom_score;

/// Environment variable that names another containerd than the one on the search path.
pub const PROGRAM_VARIABLE: &str = "KUASAR_CONTAINERD";

/// containerd's own configuration file.
pub const CONFIG: &str = "/etc/containerd/config.toml";

/// Where drop-ins go by convention. It is read only where the configuration imports it.
pub const DROP_INS: &str = "/etc/containerd/conf.d/*.toml";

/// What `containerd --version` may take.
const LIMIT: Duration = Duration::from_secs(10);

/// More files than this are not followed; imports may form circles.
const MAX_FILES: usize = 256;

/// The CRI plugin that runs pods, since containerd 2.0.
const CRI: &str = "io.containerd.cri.v1.runtime";
/// The same before.
const CRI_1: &str = "io.containerd.grpc.v1.cri";

/// A version of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// As in 2.4.2.
    pub major: u32,
    /// As in 2.4.2.
    pub minor: u32,
    /// As in 2.4.2; where it is not known, the newest of that line is meant.
    pub patch: Option<u32>,
}

impl Version {
    /// Whether this is `major.minor.patch` or later.
    #[must_use]
    pub fn at_least(self, major: u32, minor: u32, patch: u32) -> bool {
        (self.major, self.minor, self.patch.unwrap_or(u32::MAX)) >= (major, minor, patch)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        self.patch.map_or(Ok(()), |patch| write!(f, ".{patch}"))
    }
}

impl FromStr for Version {
    type Err = String;

    /// Reads `2.4.2`, `v2.4.2`, `2.4`, `2.1.9~ds1` or `2.4.0-beta.1`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fault = || format!("{text:?} is not a version of containerd; accepted: as 2.4 or 2.4.2");
        let plain = text.strip_prefix('v').unwrap_or(text);
        let plain = plain.split(['-', '+', '~']).next().unwrap_or(plain);
        let numbers: Vec<u32> = plain.split('.').map(str::parse).collect::<Result<_, _>>().map_err(|_| fault())?;
        match numbers[..] {
            [major, minor] => Ok(Self { major, minor, patch: None }),
            [major, minor, patch] => Ok(Self { major, minor, patch: Some(patch) }),
            _ => Err(fault()),
        }
    }
}

/// The containerd program of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Containerd {
    /// Where it is.
    pub path: PathBuf,
    /// What it says it is.
    pub version: Version,
}

/// Finds containerd ([`PROGRAM_VARIABLE`], then the search path) and asks its version.
///
/// # Errors
/// A sentence saying why there is none.
pub async fn find(host: &Host, reaper: &Reaper) -> Result<Containerd, String> {
    let path = match &host.containerd {
        Some(path) => host.program(path).ok_or_else(|| format!("{PROGRAM_VARIABLE} names {path:?}, which is not a program"))?,
        None => host.program("containerd").ok_or("containerd is not on the search path")?,
    };
    let said = reaper.run(Command::new(&path).arg("--version"), LIMIT).await.map_err(|error| error.report())?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = version_in(&text).filter(|_| said.status == 0);
    let version = version.ok_or_else(|| format!("{} does not tell its version: {:?}", path.display(), text.trim()))?;
    Ok(Containerd { path, version })
}

/// A containerd that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Running {
    pub(super) program: PathBuf,
    /// The configuration file it was given; `None`: the usual one.
    pub(super) config: Option<PathBuf>,
    /// Its `PATH`.
    pub(super) search_path: Option<OsString>,
}

/// The containerd that listens at this socket, unless it is somebody else who does, or this user may not see it.
pub(super) fn running_at(socket: &Path) -> Option<Running> {
    let listener = getsockopt(&UnixStream::connect(socket).ok()?, PeerCredentials).ok()?;
    let process = PathBuf::from(format!("/proc/{}", listener.pid()));
    let program = fs::read_link(process.join("exe")).ok()?;
    // systemd listens for a containerd that has not been started yet.
    if !program.file_name()?.as_bytes().starts_with(b"containerd") {
        return None;
    }
    let arguments = fs::read(process.join("cmdline")).ok()?;
    let config = config_argument(&arguments)
        // As the process sees it.
        .and_then(|path| Some(fs::read_link(process.join("cwd")).ok()?.join(path)));
    let environment = fs::read(process.join("environ")).ok()?;
    let search_path = environment.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"PATH="));
    Some(Running { program, config, search_path: search_path.map(|path| OsStr::from_bytes(path).to_owned()) })
}

/// The file that `-c`, `-config` or `--config` names in the arguments of a process, as `/proc/PID/cmdline` has them.
pub(super) fn config_argument(arguments: &[u8]) -> Option<PathBuf> {
    let mut arguments = arguments.split(|byte| *byte == 0).skip(1);
    while let Some(argument) = arguments.next() {
        let flag = argument.strip_prefix(b"--").or_else(|| argument.strip_prefix(b"-"));
        let Some(rest) = flag.and_then(|flag| flag.strip_prefix(b"config").or_else(|| flag.strip_prefix(b"c"))) else {
            continue;
        };
        let value = match rest {
            [] => arguments.next()?,
            [b'=', value @ ..] => value,
            _ => continue,
        };
        return Some(PathBuf::from(OsStr::from_bytes(value)));
    }
    None
}

/// The version in what `containerd --version` prints, such as
/// `containerd github.com/containerd/containerd/v2 v2.4.2 1fbd70374134b891f97ce19c70b6e50c7b9f4e0d`.
pub(super) fn version_in(text: &str) -> Option<Version> {
    text.split_whitespace().find_map(|word| word.parse().ok())
}

/// containerd's configuration with all it imports.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    files: Vec<(PathBuf, Table)>,
    unreadable: Vec<(PathBuf, String)>,
}

impl Setup {
    /// Reads the configuration file and its imports as containerd does: relative to the importing file, `*` expanded, each file once.
    #[must_use]
    pub fn read(host: &Host) -> Self {
        let mut setup = Self::default();
        let mut pending = vec![host.containerd_config.clone()];
        let mut seen = BTreeSet::new();
        while !pending.is_empty() && seen.len() < MAX_FILES {
            let path = pending.remove(0);
            if !seen.insert(path.clone()) {
                continue;
            }
            let Some(text) = host.read(&path) else {
                continue;
            };
            match text.parse::<Table>() {
                Ok(table) => {
                    let imports =
                        table.get("imports").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
                    pending.extend(imports.flat_map(|import| expand(host, &path, import)));
                    setup.files.push((path, table));
                }
                Err(error) => setup.unreadable.push((path, error.message().to_owned())),
            }
        }
        setup
    }

    /// The value at a path of keys; the file read last wins, as in containerd.
    fn get(&self, keys: &[&str]) -> Option<&Value> {
        self.files.iter().rev().find_map(|(_, table)| {
            let (first, rest) = keys.split_first()?;
            rest.iter().try_fold(table.get(*first)?, |value, key| value.get(*key))
        })
    }

    fn text(&self, keys: &[&str]) -> Option<&str> {
        self.get(keys).and_then(Value::as_str)
    }

    /// Whether `restrict_oom_score_adj` is set.
    #[must_use]
    pub fn restricts_oom_score(&self) -> bool {
        let set = |plugin| self.get(&["plugins", plugin, "restrict_oom_score_adj"]).and_then(Value::as_bool);
        set(CRI).or_else(|| set(CRI_1)).unwrap_or(false)
    }

    /// Whether containerd's own handler runc has `SystemdCgroup` set, and to what.
    pub(super) fn runc_has_systemd_driver(&self) -> Option<bool> {
        let set = |plugin| self.get(&["plugins", plugin, "containerd", "runtimes", "runc", "options", "SystemdCgroup"]);
        set(CRI).or_else(|| set(CRI_1)).and_then(Value::as_bool)
    }

    /// Directories of CNI plugins.
    pub(super) fn cni_bin_dirs(&self) -> Vec<String> {
        let list = |plugin| self.get(&["plugins", plugin, "cni", "bin_dirs"]).and_then(Value::as_array);
        let single = |plugin| self.text(&["plugins", plugin, "cni", "bin_dir"]);
        let dirs: Vec<_> = list(CRI).into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
        if !dirs.is_empty() {
            return dirs;
        }
        vec![single(CRI).or_else(|| single(CRI_1)).unwrap_or("/opt/cni/bin").to_owned()]
    }

    /// Directory of CNI configurations.
    pub(super) fn cni_conf_dir(&self) -> String {
        let dir = |plugin| self.text(&["plugins", plugin, "cni", "conf_dir"]);
        dir(CRI).or_else(|| dir(CRI_1)).unwrap_or("/etc/cni/net.d").to_owned()
    }

    /// What a runtime handler of this name is set to.
    fn handler(&self, name: &str, key: &str) -> Option<&str> {
        let of = |plugin| self.text(&["plugins", plugin, "containerd", "runtimes", name, key]);
        of(CRI).or_else(|| of(CRI_1))
    }

    /// Why a pod of this sandboxer would not reach the daemon at `socket`; `None` when it would.
    pub(super) fn lacks(&self, host: &Host, sandboxer: &str, socket: &Path) -> Option<String> {
        let Some(address) = self.text(&["proxy_plugins", sandboxer, "address"]) else {
            return Some(format!("no [proxy_plugins.{sandboxer}]"));
        };
        if Path::new(address) != socket {
            return Some(format!(
                "[proxy_plugins.{sandboxer}] has the address {address}, but the daemon's is {}",
                socket.display()
            ));
        }
        let kind = self.text(&["proxy_plugins", sandboxer, "type"]).unwrap_or_default();
        if kind != "sandbox" {
            return Some(format!("[proxy_plugins.{sandboxer}] has the type {kind:?} instead of \"sandbox\""));
        }
        let Some(named) = self.handler(sandboxer, "sandboxer") else {
            return Some(format!("no runtime table {sandboxer} with sandboxer = {sandboxer:?}"));
        };
        if named != sandboxer {
            return Some(format!("the runtime table {sandboxer} has the sandboxer {named:?}"));
        }
        let kind = self.handler(sandboxer, "runtime_type").unwrap_or_default();
        let Some(shim) = shim_program(kind) else {
            return Some(format!("the runtime table {sandboxer} has the runtime_type {kind:?}, which names no shim"));
        };
        (!host.containerd_finds(&shim)).then(|| {
            format!(
                "runtime_type {kind} needs {shim} on containerd's search path: without it a restart of containerd loses every container"
            )
        })
    }
}

/// Files that an import means.
fn expand(host: &Host, importer: &Path, import: &str) -> Vec<PathBuf> {
    let path = importer.parent().unwrap_or(Path::new("/")).join(import);
    let (Some(directory), Some(pattern)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Vec::new();
    };
    let Some((head, tail)) = pattern.split_once('*') else {
        return vec![path];
    };
    let matches = |name: &String| name.len() >= head.len() + tail.len() && name.starts_with(head) && name.ends_with(tail);
    host.list(directory).into_iter().filter(matches).map(|name| directory.join(name)).collect()
}

/// The program containerd runs for a runtime type: the last two of its dotted parts.
#[must_use]
pub fn shim_program(runtime_type: &str) -> Option<String> {
    let (rest, version) = runtime_type.rsplit_once('.')?;
    let name = rest.rsplit('.').next().filter(|name| !name.is_empty())?;
    Some(format!("containerd-shim-{name}-{version}"))
}

pub(super) fn all(
    host: &Host,
    containerd: &Result<Containerd, String>,
    setup: &Setup,
    config: &Config,
    socket: &Path,
) -> Vec<Finding> {
    let mut findings = vec![program(containerd), running(host, config)];
    for (path, error) in &setup.unreadable {
        findings.push(Finding::warn("containerd configuration", format!("{}: {error}", path.display()), "correct it"));
    }
    let reached: Vec<_> = config.sandboxers.keys().map(|name| sandboxer(host, setup, name, socket)).collect();
    // Pods of one that containerd knows do run.
    let none = reached.iter().all(|finding| finding.status == Status::Missing);
    findings.extend(reached.into_iter().map(|finding| if none { finding.required() } else { finding }));
    findings
}

pub(super) fn program(containerd: &Result<Containerd, String>) -> Finding {
    let remedy = "install containerd 2.1 or later, from the distribution or its releases";
    let Containerd { path, version } = match containerd {
        Ok(containerd) => containerd,
        Err(problem) => return Finding::missing("containerd", problem, remedy).required(),
    };
    let found = format!("{version} at {}", path.display());
    if !version.at_least(2, 0, 0) {
        return Finding::missing("containerd", format!("{found} has no Sandbox API for other sandboxers"), remedy).required();
    }
    if !version.at_least(2, 1, 0) {
        return Finding::warn("containerd", format!("{found}: never tried with kuasar"), remedy);
    }
    if !version.at_least(2, 3, 4) {
        let detail = format!("{found}: no recursive read-only mounts and user namespaces for pods");
        return Finding::warn("containerd", detail, "containerd 2.3.4 or later, or see docs/containerd.md");
    }
    Finding::ok("containerd", found)
}

fn running(host: &Host, config: &Config) -> Finding {
    let address = &config.containerd.address;
    let subject = "containerd socket";
    if host.exists(address) {
        return Finding::ok(subject, address.display().to_string());
    }
    let remedy = "start containerd, or set address in the table [containerd] of kuasar's configuration";
    Finding::missing(subject, format!("no {}", address.display()), remedy).required()
}

fn sandboxer(host: &Host, setup: &Setup, name: &str, socket: &Path) -> Finding {
    let subject = format!("containerd, {name}");
    match setup.lacks(host, name, socket) {
        None => Finding::ok(subject, format!("runtime handler {name} goes to {}", socket.display())),
        Some(problem) => {
            let config = host.containerd_config.display();
            let remedy = format!(
                "kuasarctl containerd-config > {}, `imports = [{DROP_INS:?}]` in {config}, restart containerd",
                DROP_INS.replace('*', "kuasar")
            );
            Finding::missing(subject, problem, remedy)
        }
    }
}
