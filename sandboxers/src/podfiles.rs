//! Files that all containers of a pod share: `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf` and `/dev/shm`.
//!
//! containerd makes them only for sandboxes it runs by itself, so they are ours. Contents are as there: the node's hosts
//! file (kubelet mounts one of its own over it), the pod's or the node's name, the pod's DNS configuration or the node's.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown},
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use crate::{
    error::{Error, Result},
    mount::{blocking, unmount_tree},
    spec::OciSpec,
    types::{DnsConfig, NamespaceMode, SandboxSpec},
};

/// Size of a pod's `/dev/shm`, containerd's and Docker's default.
const SHM_MIB: u32 = 64;

const HOST_SHM: &str = "/dev/shm";

/// Names in the sandbox's directory, and where containers see them.
const FILES: [(&str, &str); 3] = [("hosts", "/etc/hosts"), ("hostname", "/etc/hostname"), ("resolv.conf", "/etc/resolv.conf")];
const SHM: (&str, &str) = ("shm", "/dev/shm");

/// The shared files of one pod.
#[derive(Clone, Debug)]
pub struct PodFiles {
    dir: PathBuf,
    host_ipc: bool,
}

impl PodFiles {
    /// The files of a pod whose [`Self::create`] was done before, perhaps by an earlier daemon.
    #[must_use]
    pub fn at(dir: &Path, spec: &SandboxSpec) -> Self {
        Self { dir: dir.to_owned(), host_ipc: spec.namespaces.ipc == NamespaceMode::Node }
    }

    /// Makes the files in `dir`. With a user namespace its root owns them.
    ///
    /// # Errors
    /// When one cannot be written or `/dev/shm` not be mounted; nothing is left then.
    pub async fn create(dir: &Path, spec: &SandboxSpec) -> Result<Self> {
        let files = Self::at(dir, spec);
        let made = files.clone();
        let hostname = spec.hostname.clone();
        let dns = spec.dns.clone();
        let owner = spec.namespaces.user.as_ref().map(|map| (host_root(&map.uids), host_root(&map.gids)));
        blocking("make the pod's files", move || {
            let result = made.write(&hostname, dns.as_ref(), owner);
            if result.is_err()
                && let Err(error) = made.clear()
            {
                tracing::error!(error = error.report(), "failed to undo the pod's files");
            }
            result
        })
        .await?;
        Ok(files)
    }

    fn write(&self, hostname: &str, dns: Option<&DnsConfig>, owner: Option<(u32, u32)>) -> Result<()> {
        let Contents { hosts, hostname, resolv_conf } = Contents::of(hostname, dns)?;
        for ((name, _), content) in FILES.iter().zip([hosts, format!("{hostname}\n").into_bytes(), resolv_conf]) {
            let path = self.dir.join(name);
            write_file(&path, &content).map_err(Error::io("write", &path))?;
            give(&path, owner)?;
        }
        if self.host_ipc {
            return fs::metadata(HOST_SHM).map(drop).map_err(Error::io("share the node's", HOST_SHM));
        }
        let shm = self.dir.join(SHM.0);
        DirBuilder::new().mode(0o700).create(&shm).map_err(Error::io("make directory", &shm))?;
        let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let options = format!("mode=1777,size={SHM_MIB}m");
        mount(Some("shm"), &shm, Some("tmpfs"), flags, Some(options.as_str()))
            .map_err(|errno| Error::io("mount a tmpfs on", &shm)(errno.into()))?;
        give(&shm, owner)
    }

    fn shm(&self) -> PathBuf {
        if self.host_ipc { HOST_SHM.into() } else { self.dir.join(SHM.0) }
    }

    /// The OCI mounts that show the files to a container; `readonly` for one with a read-only root filesystem, as CRI has it.
    #[must_use]
    pub fn mounts(&self, readonly: bool) -> Vec<Value> {
        let access = if readonly { "ro" } else { "rw" };
        let mut mounts: Vec<_> = FILES.iter().map(|(name, target)| bind(&self.dir.join(name), target, &[access])).collect();
        // Without these the OCI runtime would clear them on the bind mount. Programs of the node run from its own.
        let flags: &[&str] = if self.host_ipc { &["rw", "nosuid", "nodev"] } else { &["rw", "nosuid", "nodev", "noexec"] };
        mounts.push(bind(&self.shm(), SHM.1, flags));
        mounts
    }

    /// Adds the mounts to a container's specification. What it mounts at the same place by itself stays, except
    /// containerd's default `/dev/shm`, which would be the container's alone.
    ///
    /// # Errors
    /// When the files cannot be given the container's SELinux label.
    pub fn apply(&self, spec: &mut OciSpec) -> Result<()> {
        if let Some(label) = spec.mount_label() {
            self.label(label)?;
        }
        let readonly = spec.root_readonly();
        let list = spec.mounts_mut();
        for mount in self.mounts(readonly) {
            let target = destination(&mount).to_owned();
            let same = list.iter().position(|other| Path::new(destination(other)) == Path::new(&target));
            match same {
                Some(index) if is_default_shm(&list[index]) => list[index] = mount,
                Some(_) => {}
                None => {
                    // Mounts happen in this order: after one that would hide it, before those below it.
                    let below = list.iter().position(|other| Path::new(destination(other)).starts_with(&target));
                    list.insert(below.unwrap_or(list.len()), mount);
                }
            }
        }
        Ok(())
    }

    fn label(&self, label: &str) -> Result<()> {
        let shm = (!self.host_ipc).then(|| self.shm());
        for path in FILES.iter().map(|(name, _)| self.dir.join(name)).chain(shm) {
            match rustix::fs::lsetxattr(&path, "security.selinux", label.as_bytes(), rustix::fs::XattrFlags::empty()) {
                // No SELinux here, so nobody looks at labels.
                Ok(()) | Err(rustix::io::Errno::NOTSUP) => {}
                Err(errno) => return Err(Error::io("set the SELinux label of", path)(errno.into())),
            }
        }
        Ok(())
    }

    /// Takes the files away. Missing ones are fine.
    ///
    /// # Errors
    /// When the kernel refuses to unmount or remove one.
    pub async fn remove(&self) -> Result<()> {
        let files = self.clone();
        blocking("remove the pod's files", move || files.clear()).await
    }

    fn clear(&self) -> Result<()> {
        let shm = self.dir.join(SHM.0);
        unmount_tree(&shm)?;
        missing_is_fine(fs::remove_dir(&shm)).map_err(Error::io("remove directory", &shm))?;
        for (name, _) in FILES {
            let path = self.dir.join(name);
            missing_is_fine(fs::remove_file(&path)).map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }
}

/// What is in the files of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// `/etc/hosts`.
    pub hosts: Vec<u8>,
    /// The host name, without an end of line.
    pub hostname: String,
    /// `/etc/resolv.conf`.
    pub resolv_conf: Vec<u8>,
}

impl Contents {
    /// For a pod of this name, or the node's if it is empty, and this DNS configuration, or the node's.
    ///
    /// # Errors
    /// When the node's own files or name cannot be read.
    pub fn of(hostname: &str, dns: Option<&DnsConfig>) -> Result<Self> {
        let hostname = match hostname {
            "" => nix::unistd::gethostname().map_err(Error::failed("read the node's name"))?.to_string_lossy().into_owned(),
            name => name.to_owned(),
        };
        let hosts = node_file("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")?;
        let resolv_conf = match dns {
            Some(dns) => resolv_conf(dns).into_bytes(),
            None => node_file("/etc/resolv.conf", "")?,
        };
        Ok(Self { hosts, hostname, resolv_conf })
    }
}

fn missing_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Which id outside is root inside; nobody mapped means the files stay ours.
fn host_root(mappings: &[crate::types::IdMapping]) -> u32 {
    mappings.iter().find(|mapping| mapping.container_id == 0 && mapping.length > 0).map_or(0, |mapping| mapping.host_id)
}

fn give(path: &Path, owner: Option<(u32, u32)>) -> Result<()> {
    match owner {
        Some((uid, gid)) => chown(path, Some(uid), Some(gid)).map_err(Error::io("change the owner of", path)),
        None => Ok(()),
    }
}

fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::{io::Write, os::unix::fs::PermissionsExt};
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path)?;
    // Every user of the containers reads them, whatever the umask.
    file.set_permissions(fs::Permissions::from_mode(0o644))?;
    file.write_all(content)
}

fn node_file(path: &str, missing: &str) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(missing.into()),
        content => content.map_err(Error::io("read", path)),
    }
}

/// resolv.conf(5); lines in the order containerd writes them.
fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    let mut line = |key: &str, words: &str| {
        text.extend([key, " ", words, "\n"]);
    };
    if !dns.searches.is_empty() {
        line("search", &dns.searches.join(" "));
    }
    for server in &dns.servers {
        line("nameserver", server);
    }
    if !dns.options.is_empty() {
        line("options", &dns.options.join(" "));
    }
    text
}

fn bind(source: &Path, target: &str, flags: &[&str]) -> Value {
    let options: Vec<&str> = ["rbind", "rprivate"].iter().chain(flags).copied().collect();
    json!({
        "destination": target,
        "type": "bind",
        "source": source.to_string_lossy(),
        "options": options,
    })
}

fn destination(mount: &Value) -> &str {
    mount["destination"].as_str().unwrap_or_default()
}

/// containerd's default has this source; a pod's own in-memory volume is a bind mount, and `docker --tmpfs` has another source.
fn is_default_shm(mount: &Value) -> bool {
    mount["type"] == "tmpfs" && mount["source"] == "shm"
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use nix::sys::statvfs::{FsFlags, statvfs};

    use super::*;
    use crate::types::{IdMapping, IdMappings, PodMetadata, PodNamespaces, PodResources, RuntimeOptions};

    fn sandbox() -> SandboxSpec {
        SandboxSpec {
            namespace: "k8s.io".parse().unwrap(),
            id: "s1".parse().unwrap(),
            sandboxer: "kuasar-test".into(),
            pod: PodMetadata::default(),
            hostname: "web-0".into(),
            netns: None,
            namespaces: PodNamespaces::default(),
            dns: Some(DnsConfig {
                servers: vec!["10.0.0.10".into(), "10.0.0.11".into()],
                searches: vec!["a.local".into(), "local".into()],
                options: vec!["ndots:5".into()],
            }),
            sysctls: Default::default(),
            cgroup_parent: String::new(),
            labels: Default::default(),
            annotations: Default::default(),
            log_directory: String::new(),
            resources: PodResources::default(),
            options: RuntimeOptions::default(),
        }
    }

    fn container(mounts: Value, readonly: bool) -> OciSpec {
        let value = json!({ "process": {}, "root": { "readonly": readonly }, "mounts": mounts });
        OciSpec::parse(value.to_string().as_bytes()).unwrap()
    }

    fn destinations(spec: &OciSpec) -> Vec<&str> {
        spec.mounts().iter().map(destination).collect()
    }

    #[tokio::test]
    async fn makes_and_removes_everything() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIP makes_and_removes_everything: mounting needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        let mut spec = sandbox();
        let range = vec![IdMapping { container_id: 0, host_id: 70_000, length: 65_536 }];
        spec.namespaces.user = Some(IdMappings { uids: range.clone(), gids: range });
        let files = PodFiles::create(dir.path(), &spec).await.unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(read("hostname"), "web-0\n");
        assert_eq!(read("resolv.conf"), "search a.local local\nnameserver 10.0.0.10\nnameserver 10.0.0.11\noptions ndots:5\n");
        assert_eq!(read("hosts"), fs::read_to_string("/etc/hosts").unwrap());
        let shm = fs::metadata(dir.path().join("shm")).unwrap();
        assert_eq!((shm.uid(), shm.mode() & 0o7777), (70_000, 0o1777));
        for name in ["hosts", "hostname", "resolv.conf"] {
            let file = fs::metadata(dir.path().join(name)).unwrap();
            assert_eq!((file.uid(), file.mode() & 0o7777), (70_000, 0o644), "{name}");
        }
        let mounted = statvfs(&dir.path().join("shm")).unwrap();
        assert_eq!(mounted.blocks() * mounted.fragment_size(), u64::from(SHM_MIB) << 20);
        assert!(mounted.flags().contains(FsFlags::ST_NOEXEC | FsFlags::ST_NOSUID));
        files.remove().await.unwrap();
        files.remove().await.unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn host_ipc_and_the_nodes_own_names() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = sandbox();
        spec.hostname.clear();
        spec.dns = None;
        spec.namespaces.ipc = NamespaceMode::Node;
        let files = PodFiles::create(dir.path(), &spec).await.unwrap();
        let node = nix::unistd::gethostname().unwrap().into_string().unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("hostname")).unwrap(), format!("{node}\n"));
        assert_eq!(files.mounts(false)[3]["source"], "/dev/shm");
        assert!(!dir.path().join("shm").exists());
        files.remove().await.unwrap();
    }

    #[tokio::test]
    async fn a_failure_leaves_nothing() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("SKIP a_failure_leaves_nothing: mounting needs root");
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("resolv.conf")).unwrap();
        let error = PodFiles::create(dir.path(), &sandbox()).await.unwrap_err();
        assert!(error.to_string().ends_with("resolv.conf"), "{error}");
        assert!(!dir.path().join("hosts").exists());
    }

    #[test]
    fn a_containers_own_mounts_win_except_the_default_shm() {
        let files = PodFiles::at(Path::new("/pod"), &sandbox());
        let default_shm = json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" });
        let mut spec = container(
            json!([default_shm, { "destination": "/etc/hosts/", "source": "/kubelet" }, { "destination": "/etc" }]),
            true,
        );
        files.apply(&mut spec).unwrap();
        assert_eq!(destinations(&spec), ["/dev/shm", "/etc/hosts/", "/etc", "/etc/hostname", "/etc/resolv.conf"]);
        assert_eq!(spec.mounts()[0]["source"], "/pod/shm");
        assert_eq!(spec.mounts()[3]["options"], json!(["rbind", "rprivate", "ro"]));
        let again = spec.clone();
        files.apply(&mut spec).unwrap();
        assert_eq!(spec, again);

        let own = json!({ "destination": "/dev/shm", "type": "bind", "source": "/volume" });
        let mut spec = container(json!([own, { "destination": "/etc/hostname/below" }]), false);
        files.apply(&mut spec).unwrap();
        assert_eq!(destinations(&spec)[1..], ["/etc/hostname", "/etc/hostname/below", "/etc/hosts", "/etc/resolv.conf"]);
        assert_eq!((&spec.mounts()[0]["source"], &spec.mounts()[1]["options"][2]), (&json!("/volume"), &json!("rw")));
    }
}
