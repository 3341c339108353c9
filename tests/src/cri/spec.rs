//! What a test asks for: builders over CRI's PodSandboxConfig and ContainerConfig.

use std::sync::atomic::{AtomicU32, Ordering};

use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, Device, DnsConfig, IdMapping, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PortMapping, SecurityProfile, UserNamespace,
    security_profile::ProfileType,
};

use super::image_spec;
use crate::image::recipes;

fn unique() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A pod to be run. By default: containerd's default handler, pod network, a pid namespace for each container (as kubelet
/// asks for), hostname = name. [`crate::Node::run_pod`] adds cgroup parent and log directory.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// All of it, for what has no method here.
    pub config: PodSandboxConfig,
    /// The runtime handler; empty for the default one.
    pub handler: String,
    /// See [`PodSpec::quick`].
    pub quick: bool,
}

impl PodSpec {
    /// A pod by this name (its uid is unique).
    #[must_use]
    pub fn new(name: &str) -> Self {
        let uid = format!("{name}-{}-{}", std::process::id(), unique());
        let mut spec = Self {
            config: PodSandboxConfig {
                metadata: Some(PodSandboxMetadata { name: name.to_owned(), uid, namespace: "default".to_owned(), attempt: 0 }),
                hostname: name.to_owned(),
                linux: Some(LinuxPodSandboxConfig::default()),
                ..Default::default()
            },
            handler: String::new(),
            quick: false,
        };
        spec.namespaces().pid = NamespaceMode::Container.into();
        spec
    }

    /// The pod-level Linux part.
    pub fn linux(&mut self) -> &mut LinuxPodSandboxConfig {
        self.config.linux.get_or_insert_default()
    }

    /// The pod-level security context.
    pub fn security(&mut self) -> &mut LinuxSandboxSecurityContext {
        self.linux().security_context.get_or_insert_default()
    }

    /// The pod's namespace options.
    pub fn namespaces(&mut self) -> &mut NamespaceOption {
        self.security().namespace_options.get_or_insert_default()
    }

    /// The runtime handler.
    #[must_use]
    pub fn handler(mut self, handler: &str) -> Self {
        handler.clone_into(&mut self.handler);
        self
    }

    /// The node's network; the hostname is the node's then, too.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.namespaces().network = NamespaceMode::Node.into();
        self.config.hostname = String::new();
        self
    }

    /// Where the network does not matter: the node's, which is quicker, unless the pod has a virtual machine.
    #[must_use]
    pub fn quick(mut self) -> Self {
        self.quick = true;
        self
    }

    /// The node's processes.
    #[must_use]
    pub fn host_pid(self) -> Self {
        self.pid(NamespaceMode::Node)
    }

    /// One pid namespace for the pod.
    #[must_use]
    pub fn shared_pid(self) -> Self {
        self.pid(NamespaceMode::Pod)
    }

    /// The pid namespace mode.
    #[must_use]
    pub fn pid(mut self, mode: NamespaceMode) -> Self {
        self.namespaces().pid = mode.into();
        self
    }

    /// The node's IPC.
    #[must_use]
    pub fn host_ipc(mut self) -> Self {
        self.namespaces().ipc = NamespaceMode::Node.into();
        self
    }

    /// A user namespace: uids and gids 0..`length` are `host_start`.. outside.
    #[must_use]
    pub fn user_namespace(mut self, host_start: u32, length: u32) -> Self {
        let mapping = IdMapping { host_id: host_start, container_id: 0, length };
        self.namespaces().userns_options =
            Some(UserNamespace { mode: NamespaceMode::Pod.into(), uids: vec![mapping], gids: vec![mapping] });
        self
    }

    /// The hostname.
    #[must_use]
    pub fn hostname(mut self, hostname: &str) -> Self {
        hostname.clone_into(&mut self.config.hostname);
        self
    }

    /// Name servers, search domains and options of resolv.conf.
    #[must_use]
    pub fn dns(mut self, servers: &[&str], searches: &[&str], options: &[&str]) -> Self {
        self.config.dns_config =
            Some(DnsConfig { servers: owned(servers), searches: owned(searches), options: owned(options) });
        self
    }

    /// A sysctl.
    #[must_use]
    pub fn sysctl(mut self, key: &str, value: &str) -> Self {
        self.linux().sysctls.insert(key.to_owned(), value.to_owned());
        self
    }

    /// The parent cgroup.
    #[must_use]
    pub fn cgroup_parent(mut self, parent: &str) -> Self {
        parent.clone_into(&mut self.linux().cgroup_parent);
        self
    }

    /// A TCP port of the node that leads to one of the pod (0 for none on the node).
    #[must_use]
    pub fn port(mut self, host: i32, container: i32) -> Self {
        self.config.port_mappings.push(PortMapping { host_port: host, container_port: container, ..Default::default() });
        self
    }

    /// A label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.config.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Privileged containers may run in it.
    #[must_use]
    pub fn privileged(mut self) -> Self {
        self.security().privileged = true;
        self
    }

    /// What its containers may use together, as kubelet sums it up.
    #[must_use]
    pub fn resources(mut self, resources: LinuxContainerResources) -> Self {
        self.linux().resources = Some(resources);
        self
    }
}

/// A container to be created. By default: [`recipes::BUSYBOX`], its image's command, the pod's namespaces, a log file.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// All of it, for what has no method here.
    pub config: ContainerConfig,
}

impl ContainerSpec {
    /// A container by this name.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            config: ContainerConfig {
                metadata: Some(ContainerMetadata {
                    name: name.to_owned(),
                    // Kubelet counts restarts; here it makes the name unique within the pod.
                    attempt: unique(),
                }),
                image: Some(image_spec(recipes::BUSYBOX)),
                log_path: format!("{name}.log"),
                linux: Some(LinuxContainerConfig::default()),
                ..Default::default()
            },
        }
    }

    /// The Linux part.
    pub fn linux(&mut self) -> &mut LinuxContainerConfig {
        self.config.linux.get_or_insert_default()
    }

    /// The security context.
    pub fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        self.linux().security_context.get_or_insert_default()
    }

    /// The resources.
    pub fn resources(&mut self) -> &mut LinuxContainerResources {
        self.linux().resources.get_or_insert_default()
    }

    /// The image.
    #[must_use]
    pub fn image(mut self, reference: &str) -> Self {
        self.config.image = Some(image_spec(reference));
        self
    }

    /// The command (Kubernetes' word; the image's entrypoint).
    #[must_use]
    pub fn command(mut self, command: &[&str]) -> Self {
        self.config.command = owned(command);
        self
    }

    /// The arguments (the image's command).
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.config.args = owned(args);
        self
    }

    /// A shell script.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.command(&["sh", "-c", script])
    }

    /// Sleeps until it is killed.
    #[must_use]
    pub fn sleep(self) -> Self {
        self.command(&["sleep", "100000"])
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.config.envs.push(KeyValue { key: key.to_owned(), value: value.to_owned() });
        self
    }

    /// The working directory.
    #[must_use]
    pub fn working_dir(mut self, dir: &str) -> Self {
        dir.clone_into(&mut self.config.working_dir);
        self
    }

    /// A bind mount.
    #[must_use]
    pub fn mount(mut self, host_path: &std::path::Path, container_path: &str, readonly: bool) -> Self {
        self.config.mounts.push(Mount {
            host_path: host_path.to_string_lossy().into_owned(),
            container_path: container_path.to_owned(),
            readonly,
            ..Default::default()
        });
        self
    }

    /// A device of the node, by the same path, with permissions such as `rwm`.
    #[must_use]
    pub fn device(mut self, path: &str, permissions: &str) -> Self {
        self.config.devices.push(Device {
            container_path: path.to_owned(),
            host_path: path.to_owned(),
            permissions: permissions.to_owned(),
        });
        self
    }

    /// A label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.config.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// A terminal.
    #[must_use]
    pub fn tty(mut self) -> Self {
        self.config.tty = true;
        self
    }

    /// An open stdin.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.config.stdin = true;
        self
    }

    /// An open stdin that closes when the first client detaches.
    #[must_use]
    pub fn stdin_once(mut self) -> Self {
        self.config.stdin = true;
        self.config.stdin_once = true;
        self
    }

    /// User and, where given, group.
    #[must_use]
    pub fn user(mut self, uid: i64, gid: Option<i64>) -> Self {
        let security = self.security();
        security.run_as_user = Some(Int64Value { value: uid });
        security.run_as_group = gid.map(|value| Int64Value { value });
        self
    }

    /// A user of the image's /etc/passwd.
    #[must_use]
    pub fn user_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.security().run_as_username);
        self
    }

    /// Supplemental groups.
    #[must_use]
    pub fn groups(mut self, groups: &[i64]) -> Self {
        self.security().supplemental_groups = groups.to_vec();
        self
    }

    /// Capabilities to add, without `CAP_`; `ALL` for all.
    #[must_use]
    pub fn add_capabilities(mut self, capabilities: &[&str]) -> Self {
        self.security().capabilities.get_or_insert_default().add_capabilities = owned(capabilities);
        self
    }

    /// Capabilities to drop, without `CAP_`; `ALL` for all.
    #[must_use]
    pub fn drop_capabilities(mut self, capabilities: &[&str]) -> Self {
        self.security().capabilities.get_or_insert_default().drop_capabilities = owned(capabilities);
        self
    }

    /// Privileged (the pod must be, too).
    #[must_use]
    pub fn privileged(mut self) -> Self {
        self.security().privileged = true;
        self
    }

    /// A read-only root file system.
    #[must_use]
    pub fn readonly_rootfs(mut self) -> Self {
        self.security().readonly_rootfs = true;
        self
    }

    /// no_new_privs.
    #[must_use]
    pub fn no_new_privileges(mut self) -> Self {
        self.security().no_new_privs = true;
        self
    }

    /// Paths that read as empty, and paths that cannot be written.
    #[must_use]
    pub fn guarded_paths(mut self, masked: &[&str], readonly: &[&str]) -> Self {
        let security = self.security();
        security.masked_paths = owned(masked);
        security.readonly_paths = owned(readonly);
        self
    }

    /// A seccomp profile: runtime default, unconfined, or a file of the node.
    #[must_use]
    pub fn seccomp(mut self, profile: ProfileType, file: &str) -> Self {
        self.security().seccomp = Some(SecurityProfile { profile_type: profile.into(), localhost_ref: file.to_owned() });
        self
    }

    /// The pid namespace mode; kubelet repeats the pod's one here, and so does [`super::Pod::create`] unless this is called.
    #[must_use]
    pub fn pid(mut self, mode: NamespaceMode, target: &str) -> Self {
        let options = self.security().namespace_options.get_or_insert_default();
        options.pid = mode.into();
        target.clone_into(&mut options.target_id);
        self
    }

    /// A memory limit.
    #[must_use]
    pub fn memory_limit(mut self, bytes: i64) -> Self {
        self.resources().memory_limit_in_bytes = bytes;
        self
    }

    /// A CPU limit: `quota` of each `period` microseconds.
    #[must_use]
    pub fn cpu_limit(mut self, quota: i64, period: i64) -> Self {
        let resources = self.resources();
        resources.cpu_quota = quota;
        resources.cpu_period = period;
        self
    }

    /// A CPU share.
    #[must_use]
    pub fn cpu_shares(mut self, shares: i64) -> Self {
        self.resources().cpu_shares = shares;
        self
    }

    /// The kernel's inclination to kill it first.
    #[must_use]
    pub fn oom_score_adj(mut self, adjustment: i64) -> Self {
        self.resources().oom_score_adj = adjustment;
        self
    }

    /// The log file's name below the pod's log directory; empty for none.
    #[must_use]
    pub fn log_path(mut self, path: &str) -> Self {
        path.clone_into(&mut self.config.log_path);
        self
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
