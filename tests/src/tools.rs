//! Finding the programs a node is made of.
//!
//! Order: the `KUASAR_…` variable, the cache that `make deps` fills, PATH. A variable that is set and wrong is an error,
//! never a reason to look further: whoever set it wants that one.

use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use thiserror::Error;

use crate::process;

/// What could not be found, and the remedy.
#[derive(Debug, Error)]
pub enum Missing {
    /// A variable names something that is not an executable file.
    #[error("{variable}={path} is not an executable file: correct or unset it")]
    Variable {
        /// The variable.
        variable: &'static str,
        /// Its value.
        path: String,
    },
    /// Nowhere to be found.
    #[error("no {name} found: run `make deps`, or set {variable} to its path")]
    Tool {
        /// The program.
        name: String,
        /// The variable that would name it.
        variable: &'static str,
    },
    /// Found, but of no use.
    #[error("{path} is {found}, need {need}: run `make deps`, or set {variable} to a newer one")]
    TooOld {
        /// The program found.
        path: String,
        /// Its version.
        found: String,
        /// The version needed.
        need: &'static str,
        /// The variable that would name another.
        variable: &'static str,
    },
    /// Found, but it would not say its version.
    #[error("cannot ask {path} for its version: {reason}")]
    Version {
        /// The program.
        path: String,
        /// What happened.
        reason: String,
    },
    /// One of our own programs is not built.
    #[error("no {name} in {dir}: run `make build`, or set KUASAR_BIN_DIR")]
    NotBuilt {
        /// The program.
        name: String,
        /// Where it was looked for.
        dir: String,
    },
    /// No image of a node is built.
    #[error("no image of a node in {dir}: run `make node SUITE={suite}`")]
    NodeImage {
        /// Debian's suite.
        suite: String,
        /// Where it was looked for.
        dir: String,
    },
}

/// The directory that `make deps` fills.
#[must_use]
pub fn cache() -> PathBuf {
    env::var_os("KUASAR_CACHE").map_or_else(|| "/var/cache/kuasar-tools".into(), PathBuf::from)
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(name)).find(|file| is_executable(file))
}

fn find(name: &str, variable: &'static str) -> Result<PathBuf, Missing> {
    if let Some(value) = env::var_os(variable).filter(|value| !value.is_empty()) {
        let path = PathBuf::from(&value);
        // A bare name is looked up as a shell would.
        let path = if path.components().count() == 1 { on_path(&value.to_string_lossy()).unwrap_or(path) } else { path };
        return if is_executable(&path) {
            Ok(path)
        } else {
            Err(Missing::Variable { variable, path: value.to_string_lossy().into_owned() })
        };
    }
    let cached = cache().join("bin").join(name);
    if is_executable(&cached) {
        return Ok(cached);
    }
    on_path(name).ok_or_else(|| Missing::Tool { name: name.to_owned(), variable })
}

/// Hypervisors that a sandboxer can be of.
pub const HYPERVISORS: [&str; 1] = ["qemu"];

/// The hypervisor of a handler: that which its sandboxer is called after.
#[must_use]
pub fn hypervisor_of(handler: &str) -> Option<&str> {
    let name = handler.strip_suffix("-streaming").unwrap_or(handler);
    name.strip_prefix("kuasar-").filter(|name| HYPERVISORS.contains(name))
}

/// Whether the pods of a handler have a virtual machine each.
#[must_use]
pub fn is_machine(handler: &str) -> bool {
    hypervisor_of(handler).is_some()
}

/// The guest's kernel to test with, its initrd beside it: `KUASAR_GUEST_KERNEL`, else what `make guest` has put into the cache.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn guest_kernel() -> Result<PathBuf, Missing> {
    let variable = "KUASAR_GUEST_KERNEL";
    if let Some(value) = env::var_os(variable).filter(|value| !value.is_empty()) {
        return Ok(value.into());
    }
    let kernel = cache().join("guest/cloud/vmlinuz");
    if kernel.is_file() { Ok(kernel) } else { Err(Missing::Tool { name: "guest kernel".into(), variable }) }
}

/// The guest's kernel to test with, and those of the images beside it.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn guest_kernels() -> Result<Vec<PathBuf>, Missing> {
    let mut kernels = vec![guest_kernel()?];
    let images = kernels[0].parent().and_then(Path::parent).map(Path::to_path_buf);
    let beside = images.into_iter().flat_map(|images| ["cloud", "mini"].map(|name| images.join(name).join("vmlinuz")));
    let beside: Vec<PathBuf> = beside.filter(|kernel| kernel.is_file() && *kernel != kernels[0]).collect();
    kernels.extend(beside);
    Ok(kernels)
}

/// What machines have of which there are many at once.
#[derive(Clone, Debug)]
pub struct SmallMachine {
    /// The guest's kernel: the small one, where there is one.
    pub kernel: PathBuf,
    /// As much memory, in MiB, as that needs, and no more: the annotation's value.
    pub memory_mib: &'static str,
}

/// The smallest machine there is here.
///
/// # Errors
/// [`Missing`] when there is no kernel at all.
pub fn small_machine() -> Result<SmallMachine, Missing> {
    let mut kernels = guest_kernels()?;
    let is_mini = |kernel: &PathBuf| kernel.parent().and_then(Path::file_name).is_some_and(|image| image == "mini");
    Ok(match kernels.iter().position(is_mini) {
        Some(mini) => SmallMachine { kernel: kernels.swap_remove(mini), memory_mib: "128" },
        None => SmallMachine { kernel: kernels.swap_remove(0), memory_mib: "256" },
    })
}

/// A hypervisor's program.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn hypervisor(name: &str) -> Result<PathBuf, Missing> {
    match name {
        "qemu" => find("qemu-system-x86_64", "KUASAR_QEMU"),
        _ => Err(Missing::Tool { name: name.into(), variable: "KUASAR_QEMU" }),
    }
}

/// The device for guests' vsock, where the kernel's own is not used.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn vsock_device() -> Result<PathBuf, Missing> {
    find("vhost-device-vsock", "KUASAR_VHOST_DEVICE_VSOCK")
}

/// What of a virtual machine is missing here.
///
/// # Errors
/// [`Missing`].
pub fn machine(hypervisor_name: &str) -> Result<(), Missing> {
    hypervisor(hypervisor_name)?;
    guest_kernel()?;
    find("virtiofsd", "KUASAR_VIRTIOFSD")?;
    if Path::new("/dev/vhost-vsock").exists() { Ok(()) } else { vsock_device().map(drop) }
}

/// The table of a sandboxer with this hypervisor.
#[must_use]
pub fn machine_table(hypervisor_name: &str) -> Value {
    let mut table = json!({ "kind": "vmm", "hypervisor": hypervisor_name, "memory_mib": 256 });
    let found = [
        ("path", hypervisor(hypervisor_name)),
        ("kernel", guest_kernel()),
        ("virtiofsd", find("virtiofsd", "KUASAR_VIRTIOFSD")),
        ("vsock_device", vsock_device()),
    ];
    for (key, path) in found {
        // The daemon says what it lacks.
        if let Ok(path) = path {
            table[key] = path.to_string_lossy().into();
        }
    }
    table
}

/// A containerd installation: the daemon and what has to be of the same version.
#[derive(Clone, Debug)]
pub struct Containerd {
    /// The daemon.
    pub containerd: PathBuf,
    /// Its command line client.
    pub ctr: PathBuf,
    /// The runc-v2 shim.
    pub shim_runc_v2: PathBuf,
    /// Major, minor, patch.
    pub version: (u32, u32, u32),
}

impl Containerd {
    /// The containerd to test with: `KUASAR_CONTAINERD`, else the cache, else PATH.
    ///
    /// # Errors
    /// [`Missing`] when there is none, or only one before 2.0.
    pub fn find() -> Result<Self, Missing> {
        Self::at(find("containerd", "KUASAR_CONTAINERD")?)
    }

    fn at(containerd: PathBuf) -> Result<Self, Missing> {
        let version = version_of(&containerd)?;
        if version < (2, 0, 0) {
            let (major, minor, patch) = version;
            return Err(Missing::TooOld {
                path: containerd.display().to_string(),
                found: format!("{major}.{minor}.{patch}"),
                need: "containerd 2.0 or newer",
                variable: "KUASAR_CONTAINERD",
            });
        }
        let beside = |name: &str| -> Result<PathBuf, Missing> {
            let path = containerd.with_file_name(name);
            if is_executable(&path) {
                return Ok(path);
            }
            find(name, "KUASAR_CONTAINERD")
        };
        Ok(Self { ctr: beside("ctr")?, shim_runc_v2: beside("containerd-shim-runc-v2")?, containerd, version })
    }
}

/// Reads the version out of what `containerd --version` prints: `containerd <module> [v]2.4.2+unknown <revision>`.
fn version_of(containerd: &Path) -> Result<(u32, u32, u32), Missing> {
    let fail = |reason: String| Missing::Version { path: containerd.display().to_string(), reason };
    let text = process::run(Command::new(containerd).arg("--version")).map_err(|error| fail(format!("{error:#}")))?;
    text.split_whitespace().find_map(parse_version).ok_or_else(|| fail(format!("no version in {:?}", text.trim())))
}

fn parse_version(word: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = word.trim_start_matches('v').splitn(3, '.');
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    let patch: String = numbers.next()?.chars().take_while(char::is_ascii_digit).collect();
    Some((major, minor, patch.parse().ok()?))
}

/// The runc to test with.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn runc() -> Result<PathBuf, Missing> {
    find("runc", "KUASAR_RUNC")
}

/// The crun to test with.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn crun() -> Result<PathBuf, Missing> {
    find("crun", "KUASAR_CRUN")
}

/// cri-tools' command line client.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn crictl() -> Result<PathBuf, Missing> {
    find("crictl", "KUASAR_CRICTL")
}

/// cri-tools' conformance suite.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn critest() -> Result<PathBuf, Missing> {
    find("critest", "KUASAR_CRITEST")
}

/// The directory of a node's image, made by `make node`.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn node_image(suite: &str) -> Result<PathBuf, Missing> {
    let dir = cache().join("node").join(suite);
    if dir.join("manifest").is_file() {
        // The name is that of another directory after a build.
        return Ok(dir.canonicalize().unwrap_or(dir));
    }
    Err(Missing::NodeImage { suite: suite.to_owned(), dir: dir.display().to_string() })
}

/// The programs of a Kubernetes.
#[derive(Clone, Debug)]
pub struct Kubernetes {
    /// Where they are.
    pub dir: PathBuf,
}

/// The Kubernetes to test with: `KUASAR_KUBERNETES`, else the newest in the cache.
///
/// # Errors
/// [`Missing`] when a program of it is not there.
pub fn kubernetes() -> Result<Kubernetes, Missing> {
    let variable = "KUASAR_KUBERNETES";
    let dir = match env::var_os(variable).filter(|value| !value.is_empty()) {
        Some(value) => PathBuf::from(value),
        None => {
            let names = std::fs::read_dir(cache()).into_iter().flatten().flatten().map(|entry| entry.file_name());
            let versions = names.filter_map(|name| parse_version(name.to_str()?.strip_prefix("kubernetes-")?));
            let newest = versions.max().ok_or_else(|| Missing::Tool { name: "Kubernetes".to_owned(), variable })?;
            cache().join(format!("kubernetes-{}.{}.{}", newest.0, newest.1, newest.2))
        }
    };
    let programs = ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl"];
    match programs.iter().map(|name| dir.join(name)).find(|program| !is_executable(program)) {
        Some(missing) => Err(Missing::Variable { variable, path: missing.display().to_string() }),
        None => Ok(Kubernetes { dir }),
    }
}

/// The static busybox the images are made of.
///
/// # Errors
/// [`Missing`] when there is none.
pub fn busybox() -> Result<PathBuf, Missing> {
    find("busybox", "KUASAR_BUSYBOX")
}

/// The directory of the CNI plugins: `KUASAR_CNI_BIN`, the cache, or where distributions put them.
///
/// # Errors
/// [`Missing`] when no directory holds `bridge`, `host-local` and `loopback`.
pub fn cni_bin_dir() -> Result<PathBuf, Missing> {
    let complete = |dir: &PathBuf| ["bridge", "host-local", "loopback"].iter().all(|plugin| is_executable(&dir.join(plugin)));
    if let Some(dir) = env::var_os("KUASAR_CNI_BIN").map(PathBuf::from) {
        return if complete(&dir) {
            Ok(dir)
        } else {
            Err(Missing::Variable { variable: "KUASAR_CNI_BIN", path: dir.display().to_string() })
        };
    }
    [cache().join("bin"), "/opt/cni/bin".into(), "/usr/lib/cni".into()].into_iter().find(complete).ok_or_else(|| {
        Missing::Tool { name: "CNI plugins (bridge, host-local, loopback)".to_owned(), variable: "KUASAR_CNI_BIN" }
    })
}

/// One of our own executables: from `KUASAR_BIN_DIR`, else from the cargo target directory this test runs from, else from
/// that directory's `release` or `debug` sibling.
///
/// # Errors
/// [`Missing::NotBuilt`] names where it was looked for.
pub fn ours(name: &str) -> Result<PathBuf, Missing> {
    let not_built = |dir: &Path| Missing::NotBuilt { name: name.to_owned(), dir: dir.display().to_string() };
    if let Some(dir) = env::var_os("KUASAR_BIN_DIR").map(PathBuf::from) {
        let path = dir.join(name);
        return if is_executable(&path) { Ok(path) } else { Err(not_built(&dir)) };
    }
    let exe = env::current_exe().unwrap_or_default();
    // target/<profile>/deps/<test>, or target/<profile>/<program>
    let mut profile = exe.parent().unwrap_or(Path::new("/")).to_path_buf();
    if profile.file_name().is_some_and(|dir| dir == "deps") {
        profile.pop();
    }
    let target = profile.parent().map(Path::to_path_buf).unwrap_or_default();
    [profile.clone(), target.join("release"), target.join("debug")]
        .into_iter()
        .map(|dir| dir.join(name))
        .find(|path| is_executable(path))
        .ok_or_else(|| not_built(&profile))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_in_every_spelling() {
        assert_eq!(parse_version("v2.1.9"), Some((2, 1, 9)));
        assert_eq!(parse_version("2.4.2+unknown"), Some((2, 4, 2)));
        assert_eq!(parse_version("2.0.0-rc.1"), Some((2, 0, 0)));
        assert_eq!(parse_version("github.com/containerd/containerd/v2"), None);
        assert_eq!(parse_version("containerd"), None);
    }

    #[test]
    fn a_missing_tool_names_the_remedy() {
        let error = find("kuasar-no-such-tool", "KUASAR_NO_SUCH_TOOL").unwrap_err();
        assert_eq!(error.to_string(), "no kuasar-no-such-tool found: run `make deps`, or set KUASAR_NO_SUCH_TOOL to its path");
    }
}
