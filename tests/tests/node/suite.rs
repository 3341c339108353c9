//! How cases are run: the node, the clean-up and the search for what they left.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::FutureExt as _;
use kuasar_tests::cri::logs;
use kuasar_tests::vm_node::{Options, VmNode, quote, software};
use kuasar_tests::{Container, Cri, Pod, PodSpec, skip, tools, wait};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;

/// The handler of most cases.
pub(crate) const HANDLER: &str = "kuasar-runc";
/// How long a case may take, in an emulated machine beside others' work; one of the fast part, and one of the others.
const LIMITS: (Duration, Duration) = (Duration::from_secs(480), Duration::from_secs(2400));
/// How long a case waits for what should happen at once, in an emulated machine beside others' work.
pub(crate) const SOON: Duration = Duration::from_secs(120);
/// How long what a case has removed may take to be gone.
const SETTLE: Duration = Duration::from_secs(30);
/// In MiB: without pods in virtual machines, which the fast part has none of, and with them.
const MEMORY: (u32, u32) = (2560, 6144);

pub(crate) type Outcome<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// What a case does.
pub(crate) type Body = for<'a> fn(&'a mut Site) -> Outcome<'a>;

/// A case to be run.
pub(crate) struct Entry {
    /// `pods::lifecycle`.
    pub(crate) name: (&'static str, &'static str),
    /// What it does.
    pub(crate) body: Body,
    /// Whether it belongs to the fast part.
    pub(crate) is_fast: bool,
}

/// A list of [`Entry`]s out of functions: those of the fast part, then, after `slow:`, the others.
macro_rules! cases {
    ($($fast:ident),* $(,)? $(; slow: $($slow:ident),+ $(,)?)?) => {
        vec![
            $($crate::suite::cases!(@ $fast, true),)*
            $($($crate::suite::cases!(@ $slow, false),)+)?
        ]
    };
    (@ $name:ident, $is_fast:literal) => {
        $crate::suite::Entry {
            name: (module_path!(), stringify!($name)),
            body: |site| Box::pin($name(site)),
            is_fast: $is_fast,
        }
    };
}
pub(crate) use cases;

/// The node with its services, for one case after the other.
pub(crate) struct Site {
    /// The virtual machine.
    pub(crate) node: VmNode,
    /// CRI, over the forwarded socket of its containerd.
    pub(crate) cri: Cri,
    socket: PathBuf,
    /// Slices that a case has started, as kubelet does for a pod.
    slices: Vec<String>,
    /// What took how long. Printed in the end: the lines in between are libtest's, and are counted.
    times: Vec<String>,
}

impl Site {
    async fn start() -> Result<Self> {
        let failures = logs_dir().join(format!("node-{}-failures.log", suite()));
        if failures.exists() {
            std::fs::remove_file(&failures).with_context(|| format!("remove {}", failures.display()))?;
        }
        let packages =
            std::env::var_os("KUASAR_NODE_PACKAGES").context("KUASAR_NODE_PACKAGES is not set: `make node-test` sets it")?;
        let begun = Instant::now();
        let payload = Some(software::payload(&PathBuf::from(packages))?);
        let memory_mib = if is_fast_part() { MEMORY.0 } else { MEMORY.1 };
        let mut node = VmNode::boot(Options { suite: suite(), memory_mib, payload, logs: logs_dir() }).await?;
        let booted = begun.elapsed().as_secs();
        software::start(&node).await?;
        let socket = node.forward(software::CONTAINERD_SOCKET).await?;
        let cri = Cri::connect(&socket).await?;
        let times = format!("node of {}: booted after {booted} s, services after {} s", suite(), begun.elapsed().as_secs());
        Ok(Self { node, cri, socket, slices: Vec::new(), times: vec![times] })
    }

    /// After a restart of containerd, or a reboot: waits until CRI says that runtime and network are ready.
    pub(crate) async fn cri_is_ready(&mut self) -> Result<()> {
        let socket = &self.socket;
        self.cri = wait::until("CRI to be ready", SETTLE, || async {
            let Ok(cri) = Cri::connect(socket).await else { return Ok(None) };
            Ok(matches!(cri.not_ready().await, Ok(None)).then_some(cri))
        })
        .await?;
        Ok(())
    }

    /// A script in the node; fails when it does.
    pub(crate) async fn sh(&self, script: &str) -> Result<String> {
        self.node.sh(script).await
    }

    /// A pod below a slice of its own with these properties, which is there before it, as with kubelet.
    pub(crate) async fn pod(&mut self, spec: PodSpec, properties: &[(&str, u64)]) -> Result<Pod> {
        self.pod_of(spec, properties, HANDLER).await
    }

    /// The same, with another handler.
    pub(crate) async fn pod_of(&mut self, spec: PodSpec, properties: &[(&str, u64)], handler: &str) -> Result<Pod> {
        let mut spec = spec.handler(handler);
        let uid = spec.config.metadata.as_ref().map_or_else(String::new, |metadata| metadata.uid.clone());
        // kubelet's names: a hyphen would be another level.
        let slice = format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"));
        let mut call = format!(
            "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager StartTransientUnit \
             'ssa(sv)a(sa(sv))' {slice} replace {}",
            properties.len()
        );
        for (name, value) in properties {
            call.push_str(&format!(" {name} t {value}"));
        }
        self.sh(&format!("{call} 0")).await.context("start the pod's slice")?;
        spec.linux().cgroup_parent = format!("/kubepods.slice/kubepods-burstable.slice/{slice}");
        spec.config.log_directory = format!("/var/log/pods/{uid}");
        self.slices.push(slice);
        Ok(self.cri.run_pod(spec).await?)
    }

    /// The lines of a container's log.
    pub(crate) async fn log(&self, container: &Container) -> Result<Vec<logs::Line>> {
        let path = container.log.as_ref().context("the container has no log")?;
        let text = self.sh(&format!("cat {}", quote(&path.to_string_lossy()))).await?;
        if text.is_empty() { Ok(Vec::new()) } else { logs::parse(&(text + "\n")) }
    }

    /// What of a unit `systemctl show` says.
    pub(crate) async fn show(&self, unit: &str, property: &str) -> Result<String> {
        self.sh(&format!("systemctl show --value -p {property} {}", quote(unit))).await
    }

    /// The pids of keeper and worker.
    pub(crate) async fn daemons(&self) -> Result<(String, String)> {
        let keeper = self.show("kuasard", "MainPID").await?;
        let worker = self.sh(&format!("pgrep -x -P {keeper} kuasard")).await?;
        Ok((keeper, worker))
    }

    /// Whether systemd is older than this version.
    pub(crate) async fn is_before_systemd(&self, version: u32) -> Result<bool> {
        let found = self.sh("systemctl --version | sed -n '1s/systemd \\([0-9]*\\).*/\\1/p'").await?;
        Ok(found.parse::<u32>().with_context(|| format!("systemd's version is {found:?}"))? < version)
    }

    /// Removes what is left of a case's pods, and fails when something in the node still carries their ids.
    async fn clean_up(&mut self) -> Result<()> {
        self.cri.remove_all_pods().await?;
        for slice in std::mem::take(&mut self.slices) {
            self.sh(&format!("systemctl stop {slice}")).await?;
        }
        let ids = self.cri.ids();
        if ids.is_empty() {
            return Ok(());
        }
        let script = trace_script(&ids);
        let begun = Instant::now();
        loop {
            let left = self.sh(&script).await?;
            if left.is_empty() {
                break;
            }
            ensure!(begun.elapsed() < SETTLE, "left behind after {} s:\n{left}", SETTLE.as_secs());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        // With no ids of this case.
        self.cri = Cri::connect(&self.socket).await?;
        Ok(())
    }
}

/// Lists what carries one of the ids: control groups, units, mounts, files of the daemon but for reports, processes.
fn trace_script(ids: &BTreeSet<String>) -> String {
    let ids = ids.iter().map(String::as_str).collect::<Vec<_>>().join("\n");
    format!(
        "ids={}
{{ find /sys/fs/cgroup -type d
systemctl list-units --all --plain --no-legend
cat /proc/self/mountinfo
find /run/kuasar -path /run/kuasar/failures -prune -o -print
find /run/netns /run/containerd/io.containerd.runtime.v2.task 2>/dev/null
ps -eo args; }} | grep -F \"$ids\" | grep -vF 'grep -F' || true",
        quote(&ids)
    )
}

/// Debian's suite that the node is of.
pub(crate) fn suite() -> String {
    std::env::var("SUITE").ok().filter(|suite| !suite.is_empty()).unwrap_or_else(|| "trixie".to_owned())
}

/// Whether only the fast part is wanted.
fn is_fast_part() -> bool {
    std::env::var_os("NODE_PART").is_some_and(|part| part == "fast")
}

/// Where logs go that stay.
fn logs_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../target").into(), PathBuf::from)
        .join("results")
}

/// The node, once a case has asked for it, or why there is none: not to be tried again for each.
type Slot = Arc<Mutex<Option<Result<Site, String>>>>;

/// Runs the cases that the arguments choose; returns the exit code.
pub(crate) fn run(cases: Vec<Entry>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // There is one node.
    arguments.test_threads = Some(1);
    let runtime = match Runtime::new() {
        Ok(runtime) => Arc::new(runtime),
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    let slot = Slot::default();
    let wanted = cases.into_iter().filter(|entry| entry.is_fast || !is_fast_part());
    let trials = wanted.map(|Entry { name: (module, name), body, is_fast }| {
        let module = module.rsplit("::").next().unwrap_or(module);
        let full = format!("{}/{module}::{name}", suite());
        let (slot, runtime, title) = (Arc::clone(&slot), Arc::clone(&runtime), full.clone());
        Trial::test(full, move || {
            let limit = if is_fast { LIMITS.0 } else { LIMITS.1 };
            runtime.block_on(case(&slot, &title, body, limit)).map_err(|error| Failed::from(format!("{error:#}")))
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    let site = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut has_failed = conclusion.has_failed();
    if let Some(Ok(site)) = site {
        let shown = if std::env::var_os("KUASAR_E2E_TIMES").is_some() { site.times.len() } else { 1 };
        for line in &site.times[..shown] {
            println!("{line}");
        }
        if has_failed {
            runtime.block_on(keep_journal(&site));
        }
        if let Err(error) = runtime.block_on(site.node.power_off()) {
            eprintln!("error: {error:#}");
            has_failed = true;
        }
    }
    if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn keep_journal(site: &Site) {
    let path = logs_dir().join(format!("node-{}-journal.log", suite()));
    let journal = site.node.script("journalctl --no-pager --output=short-precise").run().await;
    match journal.and_then(|ran| Ok(std::fs::write(&path, ran.out)?)) {
        Ok(()) => eprintln!("the node's journal is {}", path.display()),
        Err(error) => eprintln!("cannot keep the node's journal: {error:#}"),
    }
}

async fn case(slot: &Slot, title: &str, body: Body, limit: Duration) -> Result<()> {
    match tools::node_image(&suite()) {
        Ok(_) => {}
        Err(missing) => {
            skip::record(title, &missing.to_string());
            return Ok(());
        }
    }
    // One case at a time: no other waits for it.
    let taken = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut site = match taken {
        Some(Ok(site)) => site,
        Some(Err(fault)) => {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(Err(fault.clone()));
            bail!("{fault}");
        }
        None => match Site::start().await {
            Ok(site) => site,
            Err(error) => {
                *slot.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(Err("there is no node: see the first case".to_owned()));
                return Err(error);
            }
        },
    };
    let begun = Instant::now();
    let result = match tokio::time::timeout(limit, AssertUnwindSafe(body(&mut site)).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(anyhow::anyhow!("{}", text.unwrap_or("panicked")))
        }
        Err(_) => Err(anyhow::anyhow!("not done after {} s", limit.as_secs())),
    };
    let cleaned = site.clean_up().await.context("clean up");
    site.times.push(format!("{title}: {:.1} s", begun.elapsed().as_secs_f32()));
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(Ok(site));
    let result = match (result, cleaned) {
        (Err(error), Err(cleaning)) => Err(anyhow::anyhow!("{error:#}; then: {cleaning:#}")),
        (result, cleaned) => result.and(cleaned),
    };
    if let Err(error) = &result {
        note_failure(title, error)?;
    }
    result
}

/// For those who watch: the harness tells it in the end.
fn note_failure(title: &str, error: &anyhow::Error) -> Result<()> {
    let path = logs_dir().join(format!("node-{}-failures.log", suite()));
    let mut file = std::fs::File::options().create(true).append(true).open(&path)?;
    writeln!(file, "{title}: {error:#}").with_context(|| format!("write {}", path.display()))
}
