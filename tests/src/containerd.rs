//! A private containerd: its configuration for versions 2.1 to 2.4, start, restart, kill.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cri::Cri;
use crate::image::{Store, recipes};
use crate::process::{self, Daemon};
use crate::scratch::Scratch;
use crate::{tools, wait};

const START: Duration = Duration::from_secs(60);

/// A change to a configuration before it is written.
pub type Patch = Box<dyn Fn(&mut Value) + Send + Sync>;

/// How containerd runs the pods of a handler.
#[derive(Clone, Debug)]
pub enum Runtime {
    /// The runc-v2 shim with this OCI runtime: the peer that everything is compared with.
    Shim(PathBuf),
    /// A sandboxer of kuasard, by its name.
    Sandboxer {
        /// The sandboxer's name in kuasard's configuration.
        sandboxer: String,
        /// Whether stdio goes over containerd's streaming service instead of FIFOs.
        streaming: bool,
    },
}

/// A runtime handler: what a pod's RuntimeClass names.
#[derive(Clone, Debug)]
pub struct Handler {
    /// Its name.
    pub name: String,
    /// What is behind it.
    pub runtime: Runtime,
}

/// What a containerd needs to know to be configured.
pub struct Config {
    /// The installation.
    pub tools: tools::Containerd,
    /// Its handlers; the first is the default one.
    pub handlers: Vec<Handler>,
    /// The socket of kuasard, which answers for the sandboxers.
    pub kuasard_socket: PathBuf,
    /// Whether pods may ask for host ports (the portmap CNI plugin, which needs iptables).
    pub host_ports: bool,
    /// Whether containerd logs at debug level.
    pub debug: bool,
    /// A last word on the configuration.
    pub patch: Option<Patch>,
    /// Variables for containerd and the shims it runs.
    pub env: Vec<(String, String)>,
}

/// Where a node's containerd has its things.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Configuration file.
    pub config: PathBuf,
    /// Persistent state.
    pub root: PathBuf,
    /// Volatile state.
    pub state: PathBuf,
    /// gRPC socket.
    pub socket: PathBuf,
    /// NRI socket.
    pub nri_socket: PathBuf,
    /// CNI configurations.
    pub cni_conf: PathBuf,
    /// IP addresses given out, a file each.
    pub cni_leases: PathBuf,
    /// Network namespaces of pods.
    pub netns: PathBuf,
    /// Log.
    pub log: PathBuf,
    /// Registry hosts.
    pub certs: PathBuf,
    /// Shims, as containerd looks them up on PATH.
    pub shims: PathBuf,
}

impl Paths {
    fn new(scratch: &Scratch) -> Self {
        let state = scratch.run().join("containerd");
        let dir = scratch.dir();
        Self {
            config: dir.join("containerd.toml"),
            root: scratch.root().join("containerd"),
            socket: state.join("containerd.sock"),
            nri_socket: state.join("nri.sock"),
            netns: state.join("netns"),
            state,
            cni_conf: dir.join("cni"),
            cni_leases: dir.join("leases"),
            log: dir.join("containerd.log"),
            certs: dir.join("certs.d"),
            shims: dir.join("bin"),
        }
    }
}

/// A containerd of our own, running or stopped.
pub struct Containerd {
    config: Config,
    paths: Paths,
    daemon: Option<Daemon>,
}

impl Containerd {
    /// Writes its configuration into the scratch directory. Starting is another step: the registry's address, for one, is
    /// known only in between.
    ///
    /// # Errors
    /// A tool is missing, or a file cannot be written.
    pub fn new(scratch: &Scratch, config: Config) -> Result<Self> {
        let paths = Paths::new(scratch);
        for dir in [&paths.root, &paths.state, &paths.cni_conf, &paths.cni_leases, &paths.certs, &paths.shims] {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        let cni_bin = tools::cni_bin_dir()?;
        let mut containerd = configuration(&config, &paths, &cni_bin);
        if let Some(patch) = &config.patch {
            patch(&mut containerd);
        }
        write(&paths.config, &toml::to_string(&containerd)?)?;
        let conflist = cni(scratch, &paths, config.host_ports);
        write(&paths.cni_conf.join("10-kuasar.conflist"), &serde_json::to_string_pretty(&conflist)?)?;
        link_shims(&config, &paths)?;
        Ok(Self { config, paths, daemon: None })
    }

    /// Where its things are.
    #[must_use]
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Major, minor, patch.
    #[must_use]
    pub fn version(&self) -> (u32, u32, u32) {
        self.config.tools.version
    }

    /// Its pid, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        process::tail(&self.paths.log, 40)
    }

    /// Starts it and waits until CRI says that runtime and network are ready.
    ///
    /// # Errors
    /// It ends, or is not ready in time; the error carries the end of its log.
    pub async fn start(&mut self) -> Result<()> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let own = [self.paths.shims.clone(), tools::cache().join("bin")];
        let path = std::env::join_paths(own.into_iter().chain(std::env::split_paths(&path)))?;
        let mut command = Command::new(&self.config.tools.containerd);
        command
            .arg("--config")
            .arg(&self.paths.config)
            .env("PATH", path)
            .envs(self.config.env.iter().cloned())
            // The tests' own address would leak into shims otherwise.
            .env_remove("CONTAINERD_ADDRESS")
            .env_remove("CONTAINERD_NAMESPACE");
        let daemon = self.daemon.insert(Daemon::spawn("containerd", command, &self.paths.log)?);
        let socket = &self.paths.socket;
        let mut last = String::from("its socket does not answer");
        let ready = async {
            loop {
                daemon.check_running()?;
                match Cri::connect(socket).await {
                    Ok(cri) => match cri.not_ready().await {
                        Ok(None) => return Ok::<_, anyhow::Error>(()),
                        Ok(Some(condition)) => last = condition,
                        Err(status) => last = status.message().to_owned(),
                    },
                    Err(error) => last = format!("{error:#}"),
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let Ok(result) = tokio::time::timeout(START, ready).await else {
            anyhow::bail!("containerd is not ready after {} s: {last}; its log ends:\n{}", START.as_secs(), self.log_tail());
        };
        result
    }

    /// Ends it with SIGTERM. Pods stay.
    ///
    /// # Errors
    /// It does not run, or has to be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.take().context("containerd is not running")?.terminate()?;
        Ok(())
    }

    /// Ends it with SIGKILL. Pods stay.
    ///
    /// # Errors
    /// It does not run.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("containerd is not running")?.kill()
    }

    /// Makes images known to CRI without a registry.
    ///
    /// # Errors
    /// `ctr` fails, or CRI does not show the images.
    pub async fn import(&self, images: &Store, cri: &Cri) -> Result<()> {
        let archive = self.paths.config.with_file_name("images.tar");
        {
            let file = fs::File::create(&archive).with_context(|| format!("create {}", archive.display()))?;
            images.write_tar(std::io::BufWriter::new(file))?;
        }
        self.ctr(&["images", "import", &archive.to_string_lossy()])?;
        fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
        // CRI learns of it by an event.
        for reference in images.references().keys() {
            wait::until(&format!("CRI to show {reference}"), START, || async {
                Ok(cri.image_status(reference).await?.map(|_| ()))
            })
            .await?;
        }
        Ok(())
    }

    /// Runs this containerd's `ctr` in CRI's namespace and returns what it printed.
    ///
    /// # Errors
    /// It fails; the error carries its stderr.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        process::run(
            Command::new(&self.config.tools.ctr)
                .arg("--address")
                .arg(&self.paths.socket)
                .args(["--namespace", "k8s.io"])
                .args(args),
        )
    }
}

/// containerd reads configuration version 3 from 2.0 on; later ones migrate it in memory.
fn configuration(config: &Config, paths: &Paths, cni_bin: &Path) -> Value {
    let mut runtimes = serde_json::Map::new();
    let mut proxies = serde_json::Map::new();
    for handler in &config.handlers {
        let runtime = match &handler.runtime {
            Runtime::Shim(binary) => json!({
                "runtime_type": "io.containerd.runc.v2",
                "options": { "BinaryName": binary },
            }),
            Runtime::Sandboxer { sandboxer, streaming } => {
                proxies.insert(sandboxer.clone(), json!({ "type": "sandbox", "address": config.kuasard_socket }));
                let mut runtime = json!({
                    "runtime_type": format!("io.containerd.{sandboxer}.v1"),
                    "sandboxer": sandboxer,
                });
                // Older ones do not know the key, and pull what is pinned below, which is there already.
                if config.tools.version >= (2, 4, 0) {
                    runtime["disable_pause_image_pull"] = true.into();
                }
                // As the drop-in has it.
                if tools::is_machine(sandboxer) {
                    runtime["privileged_without_host_devices"] = true.into();
                    runtime["privileged_without_host_devices_all_devices_allowed"] = true.into();
                }
                if *streaming {
                    runtime["io_type"] = "streaming".into();
                }
                runtime
            }
        };
        runtimes.insert(handler.name.clone(), runtime);
    }
    let own = |name: &str| paths.config.with_file_name(name);
    json!({
        "version": 3,
        "root": paths.root,
        "state": paths.state,
        // The machine's own drop-ins are none of ours.
        "imports": [],
        "disabled_plugins": [
            "io.containerd.snapshotter.v1.blockfile",
            "io.containerd.snapshotter.v1.btrfs",
            "io.containerd.snapshotter.v1.devmapper",
            "io.containerd.snapshotter.v1.erofs",
            "io.containerd.snapshotter.v1.zfs",
            "io.containerd.tracing.processor.v1.otlp",
        ],
        "grpc": { "address": paths.socket },
        "ttrpc": { "address": format!("{}.ttrpc", paths.socket.display()) },
        "debug": { "level": if config.debug { "debug" } else { "info" } },
        "plugins": {
            "io.containerd.cri.v1.images": {
                "pinned_images": { "sandbox": recipes::PAUSE },
                "registry": { "config_path": paths.certs },
            },
            "io.containerd.cri.v1.runtime": {
                "restrict_oom_score_adj": true,
                "netns_mounts_under_state_dir": true,
                "cdi_spec_dirs": [own("cdi")],
                "containerd": {
                    "default_runtime_name": config.handlers.first().map_or("runc", |handler| &handler.name),
                    "runtimes": runtimes,
                },
                "cni": { "bin_dirs": [cni_bin], "conf_dir": paths.cni_conf },
            },
            "io.containerd.internal.v1.opt": { "path": own("opt") },
            "io.containerd.nri.v1.nri": {
                "socket_path": paths.nri_socket,
                "plugin_path": own("nri"),
                "plugin_config_path": own("nri.d"),
            },
        },
        "proxy_plugins": proxies,
    })
}

fn cni(scratch: &Scratch, paths: &Paths, host_ports: bool) -> Value {
    let mut plugins = vec![json!({
        "type": "bridge",
        "bridge": scratch.bridge(),
        "isGateway": true,
        "ipMasq": false,
        "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{ "subnet": scratch.subnet() }]],
            "routes": [{ "dst": "0.0.0.0/0" }],
            "dataDir": paths.cni_leases,
        },
    })];
    if host_ports {
        plugins.push(json!({ "type": "portmap", "capabilities": { "portMappings": true } }));
    }
    json!({ "cniVersion": "1.0.0", "name": "kuasar", "plugins": plugins })
}

/// containerd derives a shim's file name from `runtime_type` and looks it up on PATH.
fn link_shims(config: &Config, paths: &Paths) -> Result<()> {
    let link = |target: &Path, name: &str| {
        let at = paths.shims.join(name);
        symlink(target, &at).with_context(|| format!("link {}", at.display()))
    };
    link(&config.tools.shim_runc_v2, "containerd-shim-runc-v2")?;
    let mut linked = Vec::new();
    for handler in &config.handlers {
        if let Runtime::Sandboxer { sandboxer, .. } = &handler.runtime
            && !linked.contains(&sandboxer)
        {
            link(&tools::ours("containerd-shim-kuasar-v1")?, &format!("containerd-shim-{sandboxer}-v1"))?;
            linked.push(sandboxer);
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}
