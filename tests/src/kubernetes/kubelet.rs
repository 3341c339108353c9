//! kubelet: its configuration, and the mount namespace in which it leaves the host alone.
//!
//! What is covered there, and why:
//!
//! | path | with | else kubelet |
//! |---|---|---|
//! | `/run` | an empty directory with a link to containerd | would ask, through cAdvisor, whatever listens at `/run/containerd/containerd.sock` |
//! | `/var/log` | an empty directory | makes links to logs in `/var/log/containers`, which stay |
//! | six files below `/proc/sys` | files with the values that kubelet wants | sets them on the host: `kernel.panic_on_oops`, `vm.overcommit_memory`, … |

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::control_plane::ControlPlane;
use super::{GATES, MAX_PODS, NODE, Site, write};
use crate::leak::census;
use crate::process::Daemon;

/// The values that kubelet gives the node (`setupKernelTunables`).
const SYSCTLS: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// `$1` holds the sysctls' files, `$2` is containerd's socket. Where `/run`, `/var/log` and `/proc` are parts of shared mounts, those are
/// made private first, so that nothing of this reaches other namespaces; volumes, which are below a mount of their own, do.
const COVER: &str = r#"
set -e
for path in / /run /var /var/log /proc /proc/sys; do
    mount --make-private "$path" 2>/dev/null || [ "$path" != / ] || exit 1
done
sysctls=$1 socket=$2
shift 2
(cd "$sysctls" && find . -type f) | while read -r file; do mount --bind "$sysctls/$file" "/proc/sys/$file"; done
mount -t tmpfs -o mode=755 kubelet /var/log
mount -t tmpfs -o mode=755 kubelet /run
mkdir /run/containerd
ln -s "$socket" /run/containerd/containerd.sock
exec "$@"
"#;

/// kubelet, running or stopped.
pub struct Kubelet {
    site: Site,
    kubeconfig: PathBuf,
    client_certificate: PathBuf,
    gates: Vec<(&'static str, bool)>,
    daemon: Option<Daemon>,
}

impl Kubelet {
    pub(super) fn start(site: &Site, control_plane: &ControlPlane) -> Result<Self> {
        let mut kubelet = Self {
            site: site.clone(),
            kubeconfig: control_plane.kubelet.clone(),
            client_certificate: control_plane.client_certificate.clone(),
            gates: Vec::new(),
            daemon: None,
        };
        write(&site.dir.join("resolv.conf"), "nameserver 192.0.2.53\n")?;
        for (sysctl, value) in SYSCTLS {
            let path = sysctls(site).join(sysctl);
            fs::create_dir_all(path.parent().context("no directory")?)?;
            write(&path, &format!("{value}\n"))?;
        }
        kubelet.again()?;
        Ok(kubelet)
    }

    /// Feature gates from the next start on.
    pub fn gates(&mut self, gates: &[(&'static str, bool)]) {
        self.gates = gates.to_vec();
    }

    /// Starts it once more.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn again(&mut self) -> Result<()> {
        let site = &self.site;
        let config = site.dir.join("kubelet.json");
        write(&config, &self.configuration().to_string())?;
        let mut command = std::process::Command::new("unshare");
        command
            .args(["--mount", "--propagation", "unchanged", "sh", "-c", COVER, "sh"])
            .arg(sysctls(site))
            .arg(&site.containerd)
            .arg(site.programs.dir.join("kubelet"))
            .arg("--config")
            .arg(&config)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--root-dir")
            .arg(root(site))
            .arg("--cert-dir")
            .arg(root(site).join("pki"))
            .args(["--hostname-override", NODE, "--node-ip", &site.address.to_string(), "--v", "2"]);
        self.daemon = Some(Daemon::spawn("kubelet", command, &site.log("kubelet"))?);
        Ok(())
    }

    fn configuration(&self) -> Value {
        let site = &self.site;
        let gates: serde_json::Map<String, Value> =
            self.gates.iter().chain(GATES).map(|(gate, on)| ((*gate).to_owned(), Value::from(*on))).collect();
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": site.address.to_string(),
            "port": site.kubelet_port,
            "healthzPort": 0,
            "authentication": {
                "anonymous": { "enabled": false },
                "webhook": { "enabled": false },
                "x509": { "clientCAFile": self.client_certificate },
            },
            "authorization": { "mode": "AlwaysAllow" },
            "containerRuntimeEndpoint": format!("unix://{}", site.containerd.display()),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": site.cgroup,
            // A node without v2 is one to be tested on, too.
            "failCgroupV1": false,
            "failSwapOn": false,
            // Lower values need CAP_SYS_RESOURCE, which containers that tests run in may lack.
            "oomScoreAdj": 0,
            "makeIPTablesUtilChains": false,
            "clusterDomain": "cluster.local",
            "resolvConf": site.dir.join("resolv.conf"),
            "podLogsDir": site.dir.join("pods"),
            "volumePluginDir": root(site).join("plugins-exec"),
            "staticPodPath": static_pods(site),
            "maxPods": MAX_PODS,
            "podPidsLimit": 1024,
            "syncFrequency": "10s",
            "volumeStatsAggPeriod": "5s",
            "kubeAPIQPS": 200,
            "kubeAPIBurst": 400,
            "eventRecordQPS": 0,
            "registryPullQPS": 0,
            "memorySwap": {},
            "runtimeRequestTimeout": "4m",
            "cpuManagerPolicy": "none",
            // The tests' machine decides about its disk.
            "evictionHard": { "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%" },
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "localStorageCapacityIsolation": true,
            "enableProfilingHandler": false,
            "featureGates": gates,
        })
    }

    /// Where kubelet looks for pods that no API server knows.
    #[must_use]
    pub fn static_pods(&self) -> PathBuf {
        static_pods(&self.site)
    }

    /// Fails when it has ended.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn check_running(&mut self) -> Result<()> {
        self.daemon.as_mut().context("kubelet is stopped")?.check_running()
    }

    /// Ends it with SIGTERM; pods stay.
    ///
    /// # Errors
    /// It does not run.
    pub fn terminate(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("kubelet is stopped")?;
        daemon.signal(Signal::SIGTERM)?;
        // It may wait for clients that stream.
        daemon.wait_for(crate::process::TERM_GRACE)?;
        daemon.kill()
    }

    /// Ends it with SIGKILL; pods stay.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("kubelet is stopped")?.kill()
    }

    pub(super) fn stop(mut self) -> Result<()> {
        if self.daemon.is_some() { self.kill() } else { Ok(()) }
    }
}

fn root(site: &Site) -> PathBuf {
    site.run.join("root")
}

fn static_pods(site: &Site) -> PathBuf {
    site.dir.join("static")
}

fn sysctls(site: &Site) -> PathBuf {
    site.dir.join("sysctls")
}

/// kubelet wants the control group that its own are below to be there, in each hierarchy. The scratch directory's owner removes it.
pub(super) fn make_cgroups(cgroup: &str) -> Result<()> {
    for root in census::cgroup_roots()? {
        let path = root.join(cgroup.trim_start_matches('/'));
        // The hybrid's second hierarchy holds nothing that kubelet uses.
        if root.file_name().is_some_and(|name| name == "unified") {
            continue;
        }
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if path.join(file).exists() && !path.join("cgroup.controllers").exists() {
                let above = fs::read_to_string(root.join(file))?;
                fs::write(path.join(file), above).with_context(|| format!("write {}", path.join(file).display()))?;
            }
        }
        enable_all(&root, &path)?;
    }
    Ok(())
}

/// Removes what kubelet has made below it, but for pods' groups: those are to be seen.
pub(super) fn remove_cgroups(cgroup: &str) -> Result<()> {
    for root in census::cgroup_roots()? {
        let pods = root.join(cgroup.trim_start_matches('/')).join("kubepods");
        for path in [pods.join("besteffort"), pods.join("burstable"), pods] {
            match fs::remove_dir(&path) {
                Err(error)
                    if !matches!(
                        error.kind(),
                        ErrorKind::NotFound | ErrorKind::ResourceBusy | ErrorKind::DirectoryNotEmpty
                    ) =>
                {
                    return Err(error).with_context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// cgroup v2: controllers are handed down level by level.
fn enable_all(root: &Path, path: &Path) -> Result<()> {
    let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else { return Ok(()) };
    for dir in [root, path] {
        for controller in controllers.split_whitespace() {
            let file = dir.join("cgroup.subtree_control");
            fs::write(&file, format!("+{controller}")).with_context(|| format!("enable {controller} in {}", file.display()))?;
        }
    }
    Ok(())
}
