//! The main entry: a node of one's own, [`Node::start`].

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kuasar_sandboxers::failures;
use serde_json::{Value, json};
use tonic::Status;

use crate::containerd::{Config, Containerd, Handler, Patch, Runtime};
use crate::cri::{Cri, Pod, PodSpec};
use crate::image::{Store, recipes};
use crate::kuasard::{Kuasard, Sandboxer};
use crate::leak::census::{self, Owner};
use crate::leak::{Scope, Snapshot};
use crate::registry::Registry;
use crate::scratch::{Scratch, Storage};
use crate::{process, tools};

/// What kuasard notes in its state when containerd has first listed its sandboxes.
const LISTED: &str = "listed.json";
/// Names the directory of failpoints to kuasard.
const FAILPOINTS: &str = "KUASAR_FAILPOINTS";
/// How long what a test has removed may take to be gone.
const SETTLE: Duration = Duration::from_secs(15);

/// What a node shall be.
///
/// Every node has the handler `runc` (the runc-v2 shim), and `crun` where that is installed. Each sandboxer adds a handler
/// of its name, and one with `-streaming` appended that is the same sandboxer with `io_type = "streaming"`.
#[derive(Default)]
pub struct NodeOptions {
    name: String,
    containerd: Option<tools::Containerd>,
    runc: Option<PathBuf>,
    sandboxers: Vec<Sandboxer>,
    later: Vec<Sandboxer>,
    registry: Option<Store>,
    images: Option<Store>,
    host_ports: bool,
    quiet: bool,
    storage: Storage,
    patch_containerd: Option<Patch>,
    patch_kuasard: Option<Patch>,
    state_mib: Option<u32>,
    failpoints: bool,
}

impl NodeOptions {
    /// A node with the runc shim only. The name shows up in messages.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Another containerd than the one found.
    #[must_use]
    pub fn containerd(mut self, containerd: tools::Containerd) -> Self {
        self.containerd = Some(containerd);
        self
    }

    /// Another runc than the one found, for the `runc` handler.
    #[must_use]
    pub fn runc(mut self, runc: PathBuf) -> Self {
        self.runc = Some(runc);
        self
    }

    /// kuasard with a sandboxer of kind `runc` and this OCI runtime: `runc` or `crun` as found, or a path; or with one of kind `vmm` and
    /// this hypervisor: `qemu`.
    #[must_use]
    pub fn sandboxer(self, name: &str, runtime: &str) -> Self {
        if tools::HYPERVISORS.contains(&runtime) {
            return self.sandboxer_table(name, tools::machine_table(runtime));
        }
        let path = match runtime {
            "runc" => tools::runc().unwrap_or_else(|_| runtime.into()),
            "crun" => tools::crun().unwrap_or_else(|_| runtime.into()),
            path => path.into(),
        };
        self.sandboxer_table(name, json!({ "kind": "runc", "runtime": path }))
    }

    /// kuasard with a sandboxer configured by this table.
    #[must_use]
    pub fn sandboxer_table(mut self, name: &str, table: Value) -> Self {
        self.sandboxers.push(Sandboxer { name: name.to_owned(), table });
        self
    }

    /// A sandboxer with this hypervisor that containerd knows from the start, and kuasard from [`Node::add_later`] on: each worker looks
    /// for the hypervisor as it starts, which takes time.
    #[must_use]
    pub fn sandboxer_later(mut self, name: &str, hypervisor: &str) -> Self {
        self.later.push(Sandboxer { name: name.to_owned(), table: tools::machine_table(hypervisor) });
        self
    }

    /// A registry that serves these images under their own names.
    #[must_use]
    pub fn registry(mut self, images: Store) -> Self {
        self.registry = Some(images);
        self
    }

    /// Other images to import than [`recipes::for_tests`]; they need to hold [`recipes::PAUSE`].
    #[must_use]
    pub fn images(mut self, images: Store) -> Self {
        self.images = Some(images);
        self
    }

    /// Pods may ask for ports of the host (needs iptables).
    #[must_use]
    pub fn host_ports(mut self) -> Self {
        self.host_ports = true;
        self
    }

    /// containerd logs at level info instead of debug.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Where containerd and kuasard keep what outlives them.
    #[must_use]
    pub fn storage(mut self, storage: Storage) -> Self {
        self.storage = storage;
        self
    }

    /// A last word on containerd's configuration.
    #[must_use]
    pub fn patch_containerd(mut self, patch: impl Fn(&mut Value) + Send + Sync + 'static) -> Self {
        self.patch_containerd = Some(Box::new(patch));
        self
    }

    /// kuasard's volatile state on a file system of its own, of this size.
    #[must_use]
    pub fn state_mib(mut self, mib: u32) -> Self {
        self.state_mib = Some(mib);
        self
    }

    /// kuasard kills itself where a file in [`Node::failpoints`] says so.
    #[must_use]
    pub fn failpoints(mut self) -> Self {
        self.failpoints = true;
        self
    }

    /// A last word on kuasard's configuration.
    #[must_use]
    pub fn patch_kuasard(mut self, patch: impl Fn(&mut Value) + Send + Sync + 'static) -> Self {
        self.patch_kuasard = Some(Box::new(patch));
        self
    }
}

fn failpoints_in(dir: &Path) -> PathBuf {
    dir.join("failpoints")
}

/// A private containerd, with kuasard where a sandboxer was asked for, images imported, ready for pods.
pub struct Node {
    name: String,
    /// The CRI client.
    pub cri: Cri,
    /// containerd, for restarts.
    pub containerd: Containerd,
    /// kuasard, for restarts; `None` without sandboxers.
    pub kuasard: Option<Kuasard>,
    /// The registry, when asked for.
    pub registry: Option<Registry>,
    // Last: it goes after the processes that live in it.
    scratch: Option<Scratch>,
    bridge: String,
    owner: Owner,
    sandboxers: Vec<String>,
    later: Vec<Sandboxer>,
    stopped: bool,
}

impl Node {
    /// Starts a node.
    ///
    /// # Errors
    /// Not root, a tool is missing ([`tools::Missing`] names it and the remedy), or something does not start; the error
    /// carries the end of its log. Nothing is left behind.
    pub async fn start(options: NodeOptions) -> Result<Self> {
        let name = options.name.clone();
        Self::start_inner(options).await.with_context(|| format!("start a node for {name}"))
    }

    async fn start_inner(options: NodeOptions) -> Result<Self> {
        let mut handlers =
            vec![Handler { name: "runc".to_owned(), runtime: Runtime::Shim(options.runc.map_or_else(tools::runc, Ok)?) }];
        if let Ok(crun) = tools::crun() {
            handlers.push(Handler { name: "crun".to_owned(), runtime: Runtime::Shim(crun) });
        }
        for sandboxer in options.sandboxers.iter().chain(&options.later) {
            for streaming in [false, true] {
                handlers.push(Handler {
                    name: format!("{}{}", sandboxer.name, if streaming { "-streaming" } else { "" }),
                    runtime: Runtime::Sandboxer { sandboxer: sandboxer.name.clone(), streaming },
                });
            }
        }
        let tools = options.containerd.map_or_else(tools::Containerd::find, Ok)?;
        let images = options.images.map_or_else(recipes::for_tests, Ok)?;

        let scratch = Scratch::new(options.storage)?;
        let config = Config {
            tools,
            handlers,
            kuasard_socket: Kuasard::socket_in(&scratch),
            host_ports: options.host_ports,
            debug: !options.quiet,
            patch: options.patch_containerd,
            // Where our shim, which containerd runs, finds what it has to know.
            env: vec![("KUASAR_CONFIG".to_owned(), Kuasard::config_in(&scratch).display().to_string())],
        };
        let mut containerd = Containerd::new(&scratch, config)?;
        let registry = match options.registry {
            Some(images) => Some(Registry::start(images, &containerd.paths().certs)?),
            None => None,
        };
        let mut kuasard = None;
        if !options.sandboxers.is_empty() {
            let socket = &containerd.paths().socket;
            let mut daemon = Kuasard::new(&scratch, socket, &options.sandboxers, options.patch_kuasard.as_ref())?;
            if let Some(mib) = options.state_mib {
                scratch.limit(daemon.state(), mib)?;
            }
            if options.failpoints {
                let dir = failpoints_in(scratch.dir());
                std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
                daemon.set_env(FAILPOINTS, &dir);
            }
            kuasard = Some(daemon);
        }
        if let Some(kuasard) = &mut kuasard {
            // First: containerd asks every shim for its features as it starts.
            kuasard.start().await?;
        }
        containerd.start().await?;
        let cri = Cri::connect(&containerd.paths().socket).await?;
        containerd.import(&images, &cri).await?;
        Ok(Self {
            name: options.name,
            sandboxers: options.sandboxers.into_iter().map(|sandboxer| sandboxer.name).collect(),
            later: options.later,
            cri,
            containerd,
            kuasard,
            registry,
            bridge: scratch.bridge(),
            owner: Owner { dir: scratch.dir().to_path_buf(), tag: scratch.tag(), ids: std::collections::BTreeSet::new() },
            scratch: Some(scratch),
            stopped: false,
        })
    }

    /// Gives kuasard the sandboxers of [`NodeOptions::sandboxer_later`], by an upgrade to itself.
    ///
    /// # Errors
    /// There is no kuasard, or the upgrade fails.
    pub async fn add_later(&mut self) -> Result<()> {
        let kuasard = self.kuasard.as_ref().context("the node has no kuasard")?;
        for sandboxer in std::mem::take(&mut self.later) {
            kuasard.configure(&sandboxer)?;
            self.sandboxers.push(sandboxer.name);
        }
        let upgraded = kuasard.upgrade(None).await?;
        if !upgraded.status.success() {
            bail!("kuasarctl upgrade: {}", String::from_utf8_lossy(&upgraded.stderr));
        }
        Ok(())
    }

    /// The scratch directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.owner.dir
    }

    /// Where a file by the name of a failpoint makes kuasard's worker kill itself there, when [`NodeOptions::failpoints`] was asked for.
    #[must_use]
    pub fn failpoints(&self) -> PathBuf {
        failpoints_in(self.dir())
    }

    /// The cgroup that holds the node's pods, below each hierarchy's root.
    #[must_use]
    pub fn cgroup_parent(&self) -> String {
        format!("/{}", self.owner.tag)
    }

    /// Makes the bridge of the pods' network with the address that the CNI plugin gives it for the first pod, and returns that: one of the
    /// node's that is no loopback's. The bridge goes with the node, as the plugin's does.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn make_gateway(&self) -> Result<Ipv4Addr> {
        let address = self.scratch.as_ref().context("the node is stopped")?.gateway();
        let bridge = self.bridge.as_str();
        let with_length = format!("{address}/24");
        for args in [
            &["link", "add", bridge, "type", "bridge"][..],
            &["address", "add", &with_length, "dev", bridge],
            &["link", "set", bridge, "up"],
        ] {
            process::run(Command::new("ip").args(args))?;
        }
        Ok(address)
    }

    /// RunPodSandbox, with cgroup parent and log directory filled in where the spec has none.
    ///
    /// # Errors
    /// The call fails.
    pub async fn run_pod(&self, spec: PodSpec) -> Result<Pod, Status> {
        self.cri.run_pod(self.complete(spec)).await
    }

    /// The spec with cgroup parent and log directory filled in where it has none, for a client other than the node's own.
    #[must_use]
    pub fn complete(&self, mut spec: PodSpec) -> PodSpec {
        if spec.quick && !tools::is_machine(&spec.handler) {
            spec = spec.host_network();
        }
        if spec.linux().cgroup_parent.is_empty() {
            spec.linux().cgroup_parent = self.cgroup_parent();
        }
        if spec.config.log_directory.is_empty() {
            let uid = spec.config.metadata.as_ref().map_or("pod", |metadata| &metadata.uid);
            spec.config.log_directory = self.owner.dir.join("logs").join(uid).display().to_string();
        }
        spec
    }

    /// The processes that stand between containerd and the containers of a handler: for the runc shim, shims and pause
    /// containers of all its pods; for a sandboxer, kuasard's.
    ///
    /// # Errors
    /// /proc cannot be read, or kuasard does not run.
    pub fn management_pids(&self, handler: &str) -> Result<Vec<i32>> {
        let sandboxer = self.sandboxers.iter().any(|name| handler.starts_with(name.as_str()));
        if sandboxer {
            let kuasard = self.kuasard.as_ref().and_then(Kuasard::pid).context("kuasard is not running")?;
            return census::own_family(kuasard);
        }
        let mut owner = self.owner.clone();
        owner.ids = self.cri.ids();
        Ok(census::processes(&owner)?
            .into_iter()
            .filter(|process| process.command.contains("containerd-shim-runc-v2") || process.command == "/pause")
            .map(|process| process.pid)
            .collect())
    }

    /// What the node has on the machine now.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let paths = self.containerd.paths();
        let mut owner = self.owner.clone();
        owner.ids = self.cri.ids();
        let kuasard_pid = self.kuasard.as_ref().and_then(Kuasard::pid);
        // Another worker than before is no leak: there is one.
        let mut daemons = kuasard_pid.map(census::own_family).transpose()?.unwrap_or_default();
        daemons.extend(self.containerd.pid());
        Snapshot::take(&Scope {
            owner,
            kuasard_pid,
            daemons,
            deep: self
                .kuasard
                .iter()
                .flat_map(|kuasard| [kuasard.state().to_path_buf(), kuasard.root().to_path_buf()])
                .collect(),
            kept: self
                .kuasard
                .iter()
                .flat_map(|kuasard| [LISTED, failures::DIRECTORY].map(|name| kuasard.state().join(name)))
                .collect(),
            shallow: vec![
                paths.netns.clone(),
                paths.root.join("io.containerd.grpc.v1.cri/sandboxes"),
                paths.root.join("io.containerd.grpc.v1.cri/containers"),
                paths.state.join("io.containerd.grpc.v1.cri/sandboxes"),
                paths.state.join("io.containerd.grpc.v1.cri/containers"),
                paths.state.join("io.containerd.runtime.v2.task/k8s.io"),
            ],
            bridge: self.bridge.clone(),
        })
        .map(|mut snapshot| {
            snapshot.leases(&paths.cni_leases);
            snapshot
        })
    }

    /// Fails, with a list, when the node still has more than `before` after a while.
    ///
    /// # Errors
    /// The list.
    pub async fn assert_no_leak(&self, before: &Snapshot) -> Result<()> {
        let end = std::time::Instant::now() + SETTLE;
        loop {
            let more = self.snapshot()?.beyond(before);
            if more.is_empty() {
                return Ok(());
            }
            if std::time::Instant::now() > end {
                bail!("left behind after {} s:\n  {}", SETTLE.as_secs(), more.join("\n  "));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Removes all pods, stops the daemons, removes the directory with everything that belongs to it.
    ///
    /// # Errors
    /// Everything that went wrong on the way.
    pub async fn stop(mut self) -> Result<()> {
        self.stopped = true;
        let mut faults = Vec::new();
        let mut note = |result: Result<()>| {
            if let Err(error) = result {
                faults.push(format!("{error:#}"));
            }
        };
        if self.containerd.pid().is_some() {
            note(self.cri.remove_all_pods().await.context("remove the pods"));
            note(self.containerd.stop());
        }
        if let Some(kuasard) = &mut self.kuasard
            && kuasard.pid().is_some()
        {
            note(kuasard.stop());
        }
        if let Some(scratch) = self.scratch.take() {
            note(scratch.remove());
        }
        if faults.is_empty() {
            return Ok(());
        }
        bail!("stop the node for {}: {}", self.name, faults.join("; "))
    }
}

impl Drop for Node {
    /// Without [`Node::stop`] before it, the test has failed.
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        eprintln!("containerd's log ends:\n{}", self.containerd.log_tail());
        if let Some(kuasard) = &self.kuasard {
            eprintln!("kuasard's log ends:\n{}", kuasard.log_tail());
        }
        if self.containerd.pid().is_some()
            && let Err(error) = self.containerd.kill()
        {
            eprintln!("{error:#}");
        }
        if let Some(kuasard) = &mut self.kuasard
            && kuasard.pid().is_some()
            && let Err(error) = kuasard.kill()
        {
            eprintln!("{error:#}");
        }
        if std::env::var_os("KUASAR_KEEP").is_some_and(|keep| keep == "1")
            && let Some(scratch) = self.scratch.take()
        {
            scratch.keep();
        }
    }
}
