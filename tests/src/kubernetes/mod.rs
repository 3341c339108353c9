//! A Kubernetes of one node: etcd, API server, controllers, scheduler and kubelet as processes beside a [`Node`], and `kubectl` to talk to it.
//!
//! ```text
//!   Cluster ──┬─ Node            containerd, kuasard, images
//!             ├─ ControlPlane    etcd (Unix socket) ◀─ kube-apiserver (loopback) ◀─ kube-controller-manager, kube-scheduler
//!             ├─ Kubelet         in a mount namespace of its own, restarted by tests
//!             └─ PodWatch        each state that the API server has shown of a pod
//! ```
//!
//! All of it lives in the node's scratch directory and goes with it. kubelet sets sysctls of the host, makes links in `/var/log/containers`
//! and looks for containerd in one place only, so it gets a mount namespace where these are its own: see [`kubelet`].

pub mod control_plane;
pub mod kubectl;
pub mod kubelet;
pub mod watch;

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::image::{Store, recipes};
use crate::leak::Snapshot;
use crate::process;
use crate::systemd::Supervisor;
use crate::{ContainerSpec, Node, NodeOptions, PodSpec, tools, wait};

use control_plane::ControlPlane;
use kubectl::Kubectl;
use kubelet::Kubelet;
use watch::PodWatch;

/// The node's name.
pub const NODE: &str = "node";
/// How long the whole may take to be ready, on a busy machine.
const START: Duration = Duration::from_secs(180);
/// kubelet looks once a minute for sandboxes of pods that are gone.
const EMPTIED: Duration = Duration::from_secs(150);
/// Pods that the node takes: those of a scale, and others beside them.
const MAX_PODS: u32 = 250;

/// Feature gates that are off by default and that tests want.
const GATES: &[(&str, bool)] = &[("ContainerStopSignals", true)];

/// What is common to the programs of a cluster.
#[derive(Clone, Debug)]
pub struct Site {
    /// The programs.
    pub programs: tools::Kubernetes,
    /// Configuration, keys and logs.
    pub dir: PathBuf,
    /// Below the node's shared mount: volumes that kubelet mounts reach containerd.
    pub run: PathBuf,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// The control group of all pods, below each hierarchy's root.
    pub cgroup: String,
    /// The node's address, which must not be a loopback one.
    pub address: Ipv4Addr,
    /// The API server's port.
    pub api_port: u16,
    /// kubelet's port.
    pub kubelet_port: u16,
}

impl Site {
    fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.api_port)
    }

    /// Writes how a client with this token reaches the API server.
    fn kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
            "clusters": [{ "name": "c", "cluster": {
                "server": self.url(),
                "certificate-authority": control_plane::api_certificate(self),
            } }],
            "users": [{ "name": "u", "user": { "token": token } }],
        });
        write(&path, &config.to_string())?;
        Ok(path)
    }

    /// The program with this name, to be given arguments.
    fn program(&self, name: &str) -> Command {
        Command::new(self.programs.dir.join(name))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }
}

/// A running cluster.
pub struct Cluster {
    // The order in which they are dropped when they are not stopped.
    watch: PodWatch,
    /// kubelet, for restarts.
    pub kubelet: tokio::sync::Mutex<Kubelet>,
    control_plane: ControlPlane,
    /// containerd and kuasard, for restarts.
    pub node: tokio::sync::RwLock<Node>,
    kubectl: Kubectl,
    site: Site,
    before: Snapshot,
}

impl Cluster {
    /// Starts one whose node has these handlers: `runc`, and sandboxers of ours by their names. kuasard is a service whose descriptors are
    /// kept, as systemd does.
    ///
    /// # Errors
    /// A program is missing ([`tools::Missing`] tells which), or something does not become ready; the error carries the end of its log.
    pub async fn start(name: &str, handlers: &[String]) -> Result<Self> {
        let programs = tools::kubernetes()?;
        let mut options = NodeOptions::new(name).images(images()?).quiet();
        for handler in handlers.iter().filter(|handler| *handler != "runc") {
            let runtime = handler.strip_prefix("kuasar-").with_context(|| format!("no sandboxer is called {handler}"))?;
            options = options.sandboxer(handler, runtime);
        }
        let mut node = Node::start(options).await?;
        let cgroup = node.cgroup_parent();
        kubelet::make_cgroups(&cgroup)?;
        let address = node.make_gateway()?;
        if let (true, Some(last)) = (node.kuasard.is_some(), handlers.last()) {
            supervise(&mut node).await?;
            wait::until("containerd to have kuasard again", START, || async { Ok(first_pod(&node, last).await.ok()) }).await?;
        }
        for handler in handlers {
            first_pod(&node, handler).await?;
        }
        let before = node.snapshot()?;
        let site = Site {
            programs,
            dir: node.dir().join("kubernetes"),
            run: node.dir().join("run/kubelet"),
            containerd: node.containerd.paths().socket.clone(),
            cgroup,
            address,
            api_port: free_port(Ipv4Addr::LOCALHOST)?,
            kubelet_port: free_port(Ipv4Addr::LOCALHOST)?,
        };
        for dir in [&site.dir, &site.run] {
            std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let control_plane = ControlPlane::start(&site).await?;
        let kubectl = Kubectl::new(&site, &control_plane.admin)?;
        let kubelet = Kubelet::start(&site, &control_plane)?;
        let watch = PodWatch::start(&kubectl)?;
        let cluster = Self {
            watch,
            kubelet: tokio::sync::Mutex::new(kubelet),
            control_plane,
            node: tokio::sync::RwLock::new(node),
            kubectl,
            site,
            before,
        };
        cluster.node_is_ready().await?;
        for handler in handlers {
            cluster.admit(handler).await?;
        }
        Ok(cluster)
    }

    /// The client.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// What has been seen of the pods.
    #[must_use]
    pub fn pods(&self) -> &PodWatch {
        &self.watch
    }

    /// Where things are.
    #[must_use]
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Fails when one of the control plane's processes has ended.
    ///
    /// # Errors
    /// Which, with the end of its log.
    pub fn check_running(&mut self) -> Result<()> {
        self.control_plane.check_running()
    }

    /// Waits until the API server calls the node ready.
    ///
    /// # Errors
    /// It does not in time; the error carries the end of kubelet's log.
    pub async fn node_is_ready(&self) -> Result<()> {
        let end = Instant::now() + START;
        let mut last = String::from("the API server has no node");
        while Instant::now() < end {
            self.kubelet.lock().await.check_running()?;
            match self.kubectl.get("", "node", NODE).await {
                Ok(node) => match condition(&node, "Ready") {
                    Some(("True", _)) => return Ok(()),
                    Some((_, message)) => last = message.to_owned(),
                    None => {}
                },
                Err(error) => last = format!("{error:#}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        bail!(
            "the node is not ready after {} s: {last}; kubelet's log ends:\n{}",
            START.as_secs(),
            process::tail(&self.site.log("kubelet"), 40)
        )
    }

    /// The namespace and the RuntimeClass of a handler, both by its name.
    async fn admit(&self, handler: &str) -> Result<()> {
        let mut class = json!({ "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": { "name": handler }, "handler": handler });
        if tools::is_machine(handler) {
            // As docs/microvm.md has it, without KVM; of the processors a node for tests has few.
            class["overhead"] = json!({ "podFixed": { "memory": "256Mi", "cpu": "100m" } });
        }
        self.kubectl.create("", &class).await?;
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": handler } });
        self.kubectl.create("", &namespace).await?;
        // Pods are refused before there are both.
        for (kind, name) in [("serviceaccount", "default"), ("configmap", "kube-root-ca.crt")] {
            wait::until(&format!("the namespace's {kind}"), START, || async {
                Ok(self.kubectl.get(handler, kind, name).await.ok())
            })
            .await?;
        }
        Ok(())
    }

    /// Waits until kubelet has removed what is left of pods that are gone, stops everything, and fails when more is on the machine than was
    /// before the first pod of the cluster.
    ///
    /// # Errors
    /// All that went wrong on the way.
    pub async fn stop(self) -> Result<()> {
        let node = self.node.into_inner();
        let cri = &node.cri;
        let emptied = wait::until("kubelet to remove the last pods", EMPTIED, || async {
            Ok(cri.pods().await?.is_empty().then_some(()))
        })
        .await;
        self.watch.stop();
        let stopped = self.kubelet.into_inner().stop();
        let ended = self.control_plane.stop();
        let cleared = kubelet::remove_cgroups(&self.site.cgroup);
        // What is there because of a failure is named by that.
        let left = if emptied.is_ok() { node.assert_no_leak(&self.before).await } else { Ok(()) };
        let faults: Vec<String> = [emptied, stopped, ended, cleared, left, node.stop().await]
            .into_iter()
            .filter_map(|result| Some(format!("{:#}", result.err()?)))
            .collect();
        if faults.is_empty() { Ok(()) } else { bail!("stop the cluster: {}", faults.join("; ")) }
    }
}

/// Stops a node's kuasard and starts it as a service whose descriptors are kept.
///
/// # Errors
/// There is none, or it does not stop or start.
pub async fn supervise(node: &mut Node) -> Result<()> {
    let dir = node.dir().to_path_buf();
    let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
    kuasard.stop()?;
    kuasard.supervised_by(Supervisor::new(&dir)?);
    kuasard.start().await
}

/// What is made when it is first needed is there after it, and no pod's.
async fn first_pod(node: &Node, handler: &str) -> Result<()> {
    let pod = node.run_pod(PodSpec::new("first").handler(handler)).await?;
    let run = async {
        let container = pod.run(ContainerSpec::new("c").sleep()).await?;
        ensure!(container.exec(["true"]).await?.exit_code == 0, "the first exec with {handler} fails");
        Ok(())
    };
    let result = run.await;
    pod.remove_all().await?;
    result
}

/// A condition's status and message in an object.
#[must_use]
pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<(&'a str, &'a str)> {
    let found = object["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)?;
    Some((found["status"].as_str()?, found["message"].as_str().unwrap_or_default()))
}

/// The images of the tests, and one to be mounted as a volume.
fn images() -> Result<Store> {
    let mut images = recipes::for_tests()?;
    images
        .build(&[VOLUME_IMAGE], &crate::image::Recipe::new().dir("data", 0o755).file("data/word", 0o644, "from an image\n"))?;
    Ok(images)
}

/// An image with nothing but the file `data/word`.
pub const VOLUME_IMAGE: &str = "localhost/volume:1";

/// One that is free now. Another program may take it until it is used; then the one that wants it says so.
fn free_port(address: Ipv4Addr) -> Result<u16> {
    Ok(TcpListener::bind((address, 0)).context("find a free port")?.local_addr()?.port())
}

fn write(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    // Some hold tokens.
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("create {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("write {}", path.display()))
}
