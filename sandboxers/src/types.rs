//! What a sandbox and a container are asked to be: plain types of ours, so that the contract names no message of containerd.
//! The north face fills them; backends read them. All are serialisable because the state store keeps them.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    id::{ContainerId, ExecId, Namespace, SandboxId},
    spec::OciSpec,
    stdio::Stdio,
};

/// A sandbox as containerd asks for it, complete: recovery starts from this alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The sandbox.
    pub id: SandboxId,
    /// The configured sandboxer instance that runs it (`kuasar-runc`).
    pub sandboxer: String,
    /// The pod's name, namespace and uid; empty where there is no pod.
    pub pod: PodMetadata,
    /// The pod's host name; empty means the node's own.
    pub hostname: String,
    /// The network namespace that CNI has filled; `None` with the node's network.
    pub netns: Option<PathBuf>,
    /// Which namespaces the pod shares with the node or among its containers.
    pub namespaces: PodNamespaces,
    /// Contents for resolv.conf; `None` copies the node's.
    pub dns: Option<DnsConfig>,
    /// Pod sysctls, as `net.ipv4.ip_forward` → `1`.
    pub sysctls: BTreeMap<String, String>,
    /// The pod's cgroup as kubelet names it: a cgroupfs path, or a systemd slice name. Empty: none.
    pub cgroup_parent: String,
    /// Pod labels.
    pub labels: BTreeMap<String, String>,
    /// Pod annotations.
    pub annotations: BTreeMap<String, String>,
    /// Directory of the container logs, for information only.
    pub log_directory: String,
    /// Sum of the containers' resources and the overhead, where kubelet told.
    pub resources: PodResources,
    /// Options of containerd's runtime table (`containerd.runc.v1.Options`).
    pub options: RuntimeOptions,
}

/// Who the pod is to Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodMetadata {
    /// Pod name.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod uid.
    pub uid: String,
    /// Attempt counter.
    pub attempt: u32,
}

/// Whose namespace of a kind a container gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamespaceMode {
    /// One for the pod.
    #[default]
    Pod,
    /// One for each container.
    Container,
    /// The node's.
    Node,
    /// That of another container (`kubectl debug --target`); the container's spec names it by pid.
    Target,
}

/// Namespaces of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNamespaces {
    /// Network: `Pod` or `Node`.
    pub network: NamespaceMode,
    /// Process ids.
    pub pid: NamespaceMode,
    /// System V IPC and POSIX message queues: `Pod` or `Node`.
    pub ipc: NamespaceMode,
    /// User ids: `None` for the node's, else the pod's own with this mapping.
    pub user: Option<IdMappings>,
}

/// Mapping of a user namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMappings {
    /// User ids.
    pub uids: Vec<IdMapping>,
    /// Group ids.
    pub gids: Vec<IdMapping>,
}

/// One range of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id inside.
    pub container_id: u32,
    /// First id outside.
    pub host_id: u32,
    /// How many.
    pub length: u32,
}

/// What goes into resolv.conf (resolv.conf(5)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsConfig {
    /// `nameserver` lines.
    pub servers: Vec<String>,
    /// The `search` line.
    pub searches: Vec<String>,
    /// The `options` line.
    pub options: Vec<String>,
}

/// Resources of the whole pod, in Kubernetes' split.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PodResources {
    /// What the sandbox technique itself costs.
    pub overhead: Option<Resources>,
    /// What the containers have together.
    pub containers: Option<Resources>,
}

/// Resources as CRI gives them (`LinuxContainerResources`); zero means not set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// CFS period in microseconds.
    pub cpu_period: i64,
    /// CFS quota in microseconds.
    pub cpu_quota: i64,
    /// CFS shares.
    pub cpu_shares: i64,
    /// Memory limit in bytes.
    pub memory_limit_bytes: i64,
    /// Memory and swap limit in bytes.
    pub memory_swap_limit_bytes: i64,
    /// OOM score adjustment, -1000 to 1000.
    pub oom_score_adj: i64,
    /// CPUs, as `0-3,7`.
    pub cpuset_cpus: String,
    /// Memory nodes.
    pub cpuset_mems: String,
    /// cgroup v2 files and their values.
    pub unified: BTreeMap<String, String>,
    /// Limits of huge pages in bytes, by the size of a page in bytes.
    pub huge_page_limits: BTreeMap<u64, u64>,
}

/// Options from containerd's runtime table that apply to an OCI runtime.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeOptions {
    /// `BinaryName`: the OCI runtime to use instead of the sandboxer's own.
    pub binary: Option<String>,
    /// `SystemdCgroup`.
    pub systemd_cgroup: bool,
    /// `NoPivotRoot`.
    pub no_pivot_root: bool,
    /// `NoNewKeyring`.
    pub no_new_keyring: bool,
    /// `IoUid` and `IoGid`: owner of stdio pipes.
    pub io_owner: (u32, u32),
}

/// A filesystem to mount, in mount(8)'s words, as snapshotters give it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// `overlay`, `bind`, `ext4` …
    pub kind: String,
    /// Device or source directory.
    pub source: String,
    /// Below the root filesystem, where the mount goes; empty for the root itself.
    pub target: String,
    /// Options, as `ro`, `lowerdir=…`.
    pub options: Vec<String>,
}

/// A container to create.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// The container.
    pub id: ContainerId,
    /// containerd's bundle directory; `config.json` in it is not read again, `spec` is what counts.
    pub bundle: PathBuf,
    /// The OCI runtime specification as containerd wrote it, before any rewriting.
    pub spec: OciSpec,
    /// Mounts that make the root filesystem; empty when `spec` names a ready directory.
    pub rootfs: Vec<Mount>,
    /// Where the first process's input and output go.
    pub stdio: Stdio,
}

/// What is kept of a [`ContainerSpec`] once the container exists; the specification itself is large and stays in the bundle.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerHead {
    /// The container.
    pub id: ContainerId,
    /// containerd's bundle directory.
    pub bundle: PathBuf,
    /// Where the first process's input and output go.
    pub stdio: Stdio,
}

/// A process to add to a running container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecSpec {
    /// The process.
    pub id: ExecId,
    /// OCI `process` object, unread: unknown fields must reach the runtime.
    pub process: serde_json::Value,
    /// Where its input and output go.
    pub stdio: Stdio,
}

/// How a process, or a sandbox, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code; 128 + signal for a killed process.
    pub status: u32,
    /// When it was seen.
    pub at: SystemTime,
}

impl Exit {
    /// An exit seen now.
    #[must_use]
    pub fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A process that belongs to a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessInfo {
    /// Its id on the node, or within the guest.
    pub pid: u32,
    /// The exec it was started by, where known.
    pub exec: Option<ExecId>,
}

/// What a sandbox technique can do; a request beyond it is answered Unimplemented with the reason before anything happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Short name of the technique for people: `runc 1.3.5`.
    pub technique: String,
    /// Can add processes; else why not.
    pub exec: Support,
    /// Can pause and resume.
    pub pause: Support,
    /// Can change resources of a running container.
    pub update: Support,
    /// Gives terminals.
    pub terminal: Support,
    /// The OCI runtime `features` document (runtime-spec `features.md`), for containerd's introspection.
    pub features: Option<serde_json::Value>,
}

/// Whether one thing is supported, and if not, a sentence saying why.
pub type Support = std::result::Result<(), String>;

/// How long a graceful stop may take before force is used.
pub type Grace = Duration;
