//! How cases are run: the cluster, a case's objects and their removal, the comparison with the runc handler.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use futures::FutureExt as _;
use kuasar_tests::image::recipes;
use kuasar_tests::kubernetes::kubectl::{Kubectl, Ran};
use kuasar_tests::kubernetes::{Cluster, condition, watch};
use kuasar_tests::{hybrid, skip, tools};
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::{OnceCell, RwLock, Semaphore};

use crate::table::{Table, Verdict};

/// The measure of all others.
pub(crate) const PEER: &str = "runc";
/// What cannot be for a pod in a virtual machine, as docs/microvm.md says, and why.
const NOT_IN_MACHINES: &[(&str, &str)] = &[
    ("pod::host_network", "the node's network interfaces cannot be in a virtual machine"),
    ("pod::host_pid", "the node's processes cannot be seen from a virtual machine"),
    ("pod::host_ipc", "the node's shared memory cannot be in a virtual machine"),
    ("volumes::bidirectional", "mounts of a virtual machine cannot be the node's"),
    ("pod::app_armor", "the guest has no AppArmor"),
    ("resources::limits", "the container's control group is the guest's"),
    ("resources::process_limit", "kubelet's limit is for processes of the node, and these are the guest's"),
];
/// What is not run in virtual machines, and why.
const NOT_RUN_IN_MACHINES: &[(&str, &str)] =
    &[("scale::from_1_to_30", "machines for so many, emulated, take longer than a case may")];
/// How long a case may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(240);
/// And when its pods have virtual machines, which may be emulated.
const LIMIT_OF_MACHINES: Duration = Duration::from_secs(600);
/// How long a pod may take to be what it is to be.
const SOON: Duration = Duration::from_secs(90);
/// Cases mostly wait.
const AT_A_TIME: usize = 6;
/// Cases with virtual machines at a time: each boots one or some.
const MACHINES_AT_A_TIME: usize = 2;
/// Lines of evidence shown with a failure.
const EVIDENCE: usize = 10;
/// Events of each pod.
const ORDINARY: [&str; 4] = ["Scheduled", "Pulled", "Created", "Started"];

type Outcome<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// For which handlers a case runs, and beside what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Each, beside other cases.
    Shared,
    /// Each, with nothing else going on: it restarts something, or measures.
    Alone,
    /// As the last, for sandboxers of ours.
    OursAlone,
}

/// A case to be run.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// `commands::exec`.
    pub(crate) name: (&'static str, &'static str),
    /// Where.
    pub(crate) scope: Scope,
    /// What it does.
    pub(crate) body: for<'a> fn(&'a Case) -> Outcome<'a>,
}

impl Entry {
    fn title(&self) -> String {
        format!("{}::{}", self.name.0.rsplit("::").next().unwrap_or_default(), self.name.1)
    }
}

/// A list of [`Entry`]s out of functions: `cases![Shared: this, that]`.
macro_rules! cases {
    ($scope:ident: $($name:ident),+ $(,)?) => {
        vec![$($crate::suite::Entry {
            name: (module_path!(), stringify!($name)),
            scope: $crate::suite::Scope::$scope,
            body: |case| Box::pin($name(case)),
        }),+]
    };
}
pub(crate) use cases;

/// A case under way, for one handler.
pub(crate) struct Case {
    pub(crate) cluster: Arc<Cluster>,
    /// The runtime handler, the RuntimeClass and the namespace, which have the same name.
    pub(crate) handler: String,
    /// Names what the case makes.
    pub(crate) slug: String,
    dir: PathBuf,
    kinds: Mutex<BTreeSet<String>>,
    note: Mutex<String>,
}

impl Case {
    pub(crate) fn kubectl(&self) -> &Kubectl {
        self.cluster.kubectl()
    }

    /// Whether the handler's pods have a virtual machine each.
    pub(crate) fn is_machine(&self) -> bool {
        tools::is_machine(&self.handler)
    }

    /// How long something may take.
    pub(crate) fn patience(&self) -> Duration {
        if self.is_machine() { 3 * SOON } else { SOON }
    }

    /// The same, in kubectl's words.
    pub(crate) fn timeout(&self) -> String {
        format!("--timeout={}s", self.patience().as_secs())
    }

    /// What the table shows beside the verdict.
    pub(crate) fn note(&self, text: String) {
        *lock(&self.note) = text;
    }

    /// A directory of the node for this case, below a mount that is shared with other mount namespaces.
    pub(crate) fn dir(&self) -> Result<&Path> {
        std::fs::create_dir_all(&self.dir).with_context(|| format!("create {}", self.dir.display()))?;
        Ok(&self.dir)
    }

    /// A name for an object of the case's own.
    pub(crate) fn name(&self, suffix: &str) -> String {
        if suffix.is_empty() { self.slug.clone() } else { format!("{}-{suffix}", self.slug) }
    }

    /// Creates an object, by its kind, its API's version and what is in it beside its metadata; it is removed with the case.
    pub(crate) async fn create(&self, version: &str, kind: &str, name: &str, content: Value) -> Result<()> {
        let mut object = content;
        object["apiVersion"] = version.into();
        object["kind"] = kind.into();
        object["metadata"]["name"] = name.into();
        object["metadata"]["labels"]["case"] = self.slug.clone().into();
        lock(&self.kinds).insert(kind.to_lowercase());
        self.kubectl().create(&self.handler, &object).await
    }

    /// A pod of the handler, with what these tests have in common filled in where the spec does not say it.
    pub(crate) fn spec(&self, spec: Value) -> Value {
        let mut spec = spec;
        let fill = |object: &mut Value, key: &str, value: Value| {
            if object[key].is_null() {
                object[key] = value;
            }
        };
        fill(&mut spec, "runtimeClassName", self.handler.clone().into());
        // Shells do not end at SIGTERM.
        fill(&mut spec, "terminationGracePeriodSeconds", 1.into());
        fill(&mut spec, "automountServiceAccountToken", false.into());
        fill(&mut spec, "enableServiceLinks", false.into());
        fill(&mut spec, "dnsPolicy", "Default".into());
        for list in ["initContainers", "containers", "ephemeralContainers"] {
            for container in spec[list].as_array_mut().into_iter().flatten() {
                fill(container, "image", recipes::BUSYBOX.into());
                fill(container, "imagePullPolicy", "Never".into());
                // Without one a virtual machine gets next to no share of a busy processor.
                if self.is_machine() && container["resources"].is_null() {
                    container["resources"] = json!({ "requests": { "cpu": "20m" } });
                }
            }
        }
        spec
    }

    /// The template of a controller's pods.
    pub(crate) fn template(&self, app: &str, spec: Value) -> Value {
        json!({ "metadata": { "labels": { "case": self.slug, "app": app } }, "spec": self.spec(spec) })
    }

    /// Creates a pod.
    pub(crate) async fn pod(&self, name: &str, spec: Value) -> Result<()> {
        self.create("v1", "Pod", name, json!({ "spec": self.spec(spec) })).await
    }

    /// Creates a pod and waits until it is ready.
    pub(crate) async fn ready_pod(&self, name: &str, spec: Value) -> Result<()> {
        self.pod(name, spec).await?;
        self.ready(name).await
    }

    /// Waits until a pod is ready.
    pub(crate) async fn ready(&self, name: &str) -> Result<()> {
        self.until(name, "readiness", |pod| Ok(is_ready(pod).then_some(()))).await
    }

    /// Waits until a pod has ended, and returns it.
    pub(crate) async fn ended(&self, name: &str) -> Result<Value> {
        self.until(name, "the end", |pod| {
            Ok(matches!(pod["status"]["phase"].as_str(), Some("Succeeded" | "Failed")).then(|| pod.clone()))
        })
        .await
    }

    /// Runs a pod that is to succeed, and returns what its first container has printed.
    pub(crate) async fn output(&self, name: &str, spec: Value) -> Result<String> {
        let mut spec = spec;
        spec["restartPolicy"] = "Never".into();
        self.pod(name, spec).await?;
        let pod = self.ended(name).await?;
        let text = self.kubectl().must(&self.handler, &["logs", name]).await?;
        ensure!(pod["status"]["phase"] == "Succeeded", "pod {name} has failed, and printed {text:?}: {}", pod["status"]);
        Ok(text)
    }

    /// Waits until `look` finds something in a pod.
    pub(crate) async fn until<T>(&self, name: &str, what: &str, look: impl FnMut(&Value) -> Result<Option<T>>) -> Result<T> {
        let limit = self.patience();
        self.cluster.pods().until((&self.handler, name), what, limit, look).await
    }

    /// Waits until a call prints what `look` accepts.
    pub(crate) async fn until_prints<T>(&self, args: &[&str], what: &str, look: impl Fn(&str) -> Option<T>) -> Result<T> {
        let end = Instant::now() + self.patience();
        loop {
            let ran = self.kubectl().run(&self.handler, args, b"").await?;
            if let Some(found) = look(&ran.stdout) {
                return Ok(found);
            }
            ensure!(
                Instant::now() < end,
                "waited in vain for {what}: kubectl {} prints {} {}",
                args.join(" "),
                ran.stdout,
                ran.stderr
            );
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// `kubectl exec` of a shell's script in a pod's first container.
    pub(crate) async fn sh(&self, pod: &str, script: &str) -> Result<Ran> {
        self.kubectl().run(&self.handler, &["exec", pod, "--", "sh", "-c", script], b"").await
    }

    /// As [`Self::sh`], and it has to succeed.
    pub(crate) async fn prints(&self, pod: &str, script: &str) -> Result<String> {
        let ran = self.sh(pod, script).await?;
        ensure!(ran.status.success(), "{script:?} in {pod}: {} {}", ran.stdout, ran.stderr);
        Ok(ran.stdout)
    }

    async fn clean_up(&self) -> Result<()> {
        self.delete().await?;
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.dir.display()))
            }
            _ => Ok(()),
        }
    }

    async fn delete(&self) -> Result<()> {
        let mut kinds: Vec<String> = lock(&self.kinds).iter().cloned().collect();
        if kinds.is_empty() {
            return Ok(());
        }
        // Controllers' pods go by themselves, later.
        kinds.retain(|kind| kind != "pod");
        kinds.push("pod".to_owned());
        let kinds = kinds.join(",");
        let selector = format!("case={}", self.slug);
        self.kubectl()
            .must(&self.handler, &["delete", &kinds, "--selector", &selector, "--ignore-not-found", "--wait", &self.timeout()])
            .await?;
        Ok(())
    }

    /// What Kubernetes has noted about the case's pods.
    pub(crate) async fn evidence(&self) -> String {
        let args = ["get", "events", "--sort-by=.lastTimestamp", "--output", "json"];
        let events =
            match self.kubectl().must(&self.handler, &args).await.and_then(|text| Ok(serde_json::from_str::<Value>(&text)?)) {
                Ok(events) => events,
                Err(error) => return format!("\nno events: {error:#}"),
            };
        let own = |event: &&Value| event["involvedObject"]["name"].as_str().is_some_and(|name| name.starts_with(&self.slug));
        let lines: Vec<String> = events["items"]
            .as_array()
            .into_iter()
            .flatten()
            // Those of its way to where it is say nothing of a failure.
            .filter(|event| own(event) && !ORDINARY.iter().any(|ordinary| event["reason"] == *ordinary))
            .map(|event| {
                let word = |field: &str| event[field].as_str().unwrap_or_default();
                format!("  {} {} (count {})", word("reason"), word("message"), event["count"])
            })
            .collect();
        format!("\nevents:\n{}", lines[lines.len().saturating_sub(EVIDENCE)..].join("\n"))
    }
}

/// How a case ends that does not pass.
#[derive(Clone, Debug)]
enum Fault {
    /// It fails.
    Failed(String),
    /// The machine lacks what it needs.
    Missing(String),
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Missing>() {
            Ok(Missing(what)) => Self::Missing(what),
            Err(error) => Self::Failed(format!("{error:#}")),
        }
    }
}

/// How a case ends with the peer, once somebody has asked.
type Peer = Arc<OnceCell<Result<String, Fault>>>;

/// The error of a case that cannot be run here: what the machine lacks.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Missing(pub(crate) String);

/// Whether a pod is ready.
pub(crate) fn is_ready(pod: &Value) -> bool {
    condition(pod, "Ready").is_some_and(|(status, _)| status == "True")
}

/// The status of one of a pod's containers.
pub(crate) fn container<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    watch::statuses(pod).find(|status| status["name"] == name)
}

/// A container that runs a shell's script.
pub(crate) fn sh(name: &str, script: &str) -> Value {
    json!({ "name": name, "command": ["sh", "-c", script] })
}

/// One that waits until it is ended.
pub(crate) fn sleeper(name: &str) -> Value {
    json!({ "name": name, "command": ["sleep", "1000000"] })
}

/// A container with more in it.
pub(crate) fn with(mut container: Value, more: Value) -> Value {
    if let (Some(into), Value::Object(more)) = (container.as_object_mut(), more) {
        into.extend(more);
    }
    container
}

/// Whether the long forms are asked for.
pub(crate) fn is_long() -> bool {
    std::env::var_os("KUASAR_KUBERNETES_LONG").is_some_and(|long| long == "1")
}

/// All there is while cases run.
struct Run {
    handlers: Vec<String>,
    cluster: tokio::sync::Mutex<Option<Result<Arc<Cluster>, String>>>,
    /// Cases that want nothing else to go on take it for writing.
    gate: RwLock<()>,
    machines: Semaphore,
    /// How cases end with the peer.
    peers: Mutex<BTreeMap<String, Peer>>,
    table: Mutex<Table>,
    next: std::sync::atomic::AtomicUsize,
}

impl Run {
    async fn cluster(&self) -> Result<Arc<Cluster>> {
        let mut slot = self.cluster.lock().await;
        let cluster = match slot.take() {
            Some(cluster) => cluster,
            None => Cluster::start("Kubernetes", &self.handlers).await.map(Arc::new).map_err(|error| format!("{error:#}")),
        };
        *slot = Some(cluster.clone());
        cluster.map_err(|error| anyhow!("there is no cluster: {error}"))
    }

    /// Runs a case once, and removes what it has made.
    async fn attempt(&self, entry: &Entry, handler: &str) -> Result<String, Fault> {
        let is_machine = tools::is_machine(handler);
        let _one = if is_machine { Some(self.machines.acquire().await.map_err(anyhow::Error::from)?) } else { None };
        let (_shared, _alone) = match entry.scope {
            Scope::Shared => (Some(self.gate.read().await), None),
            Scope::Alone | Scope::OursAlone => (None, Some(self.gate.write().await)),
        };
        let cluster = self.cluster().await?;
        // What a case before it has left would be in its way.
        let number = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let slug = format!("{}-{number}", entry.name.1.replace('_', "-"));
        let dir = cluster.site().run.join("cases").join(format!("{handler}-{slug}"));
        let case = Case { cluster, handler: handler.to_owned(), slug, dir, kinds: Mutex::default(), note: Mutex::default() };
        let limit = if is_machine { LIMIT_OF_MACHINES } else { LIMIT };
        let mut result = limited((entry.body)(&case), limit).await;
        if let Err(error) = &result
            && !error.is::<Missing>()
        {
            result = Err(anyhow!("{error:#}{}", case.evidence().await));
        }
        let cleaned = case.clean_up().await.context("clean up");
        result.and(cleaned)?;
        let note = lock(&case.note).clone();
        Ok(note)
    }

    /// As [`Self::attempt`], and once more where `KUASAR_E2E_RETRIES` allows it.
    async fn attempts(&self, entry: &Entry, handler: &str) -> Result<String, Fault> {
        let mut result = self.attempt(entry, handler).await;
        for retry in 1..=retries() {
            let Err(Fault::Failed(why)) = &result else { break };
            println!("RETRY {retry} of {handler}/{} after: {why}", entry.title());
            result = self.attempt(entry, handler).await;
        }
        result
    }

    /// How the case ends with the peer: found out when it is first asked for.
    async fn peer(&self, entry: &Entry) -> Result<String, Fault> {
        let cell = Arc::clone(lock(&self.peers).entry(entry.title()).or_default());
        cell.get_or_init(|| self.attempts(entry, PEER)).await.clone()
    }

    async fn verdict(&self, entry: &Entry, handler: &str) -> Verdict {
        let result = if handler == PEER { self.peer(entry).await } else { self.attempts(entry, handler).await };
        let why = match result {
            Ok(note) => return Verdict::Passed(note),
            Err(Fault::Missing(what)) => return Verdict::Skipped(what),
            Err(Fault::Failed(why)) => why,
        };
        if handler == PEER || entry.scope == Scope::OursAlone {
            return Verdict::Failed(why);
        }
        match self.peer(entry).await {
            Err(Fault::Failed(peers)) => Verdict::Alike(format!("{why}; with {PEER}: {peers}")),
            Ok(_) | Err(Fault::Missing(_)) => Verdict::Failed(why),
        }
    }

    /// Stops the cluster and writes the table.
    async fn finish(&self) -> Result<()> {
        let table = lock(&self.table).markdown()?;
        println!("\n{table}");
        if let Some(dir) = std::env::var_os("KUASAR_KUBERNETES_OUT").map(PathBuf::from) {
            std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
            let path = dir.join("table.md");
            std::fs::write(&path, &table).with_context(|| format!("write {}", path.display()))?;
        }
        let Some(Ok(cluster)) = self.cluster.lock().await.take() else { return Ok(()) };
        let cluster = Arc::try_unwrap(cluster).map_err(|_| anyhow!("a case still holds the cluster"))?;
        cluster.stop().await
    }
}

/// Runs a body with a time limit; a failed assertion becomes an error, so that the clean-up still takes place.
async fn limited(body: Outcome<'_>, limit: Duration) -> Result<()> {
    match tokio::time::timeout(limit, AssertUnwindSafe(body).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => {
            // Where it was is on stderr already.
            let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            bail!("{}", text.unwrap_or("panicked"))
        }
        Err(_) => bail!("not done after {} s", limit.as_secs()),
    }
}

fn handlers() -> Vec<String> {
    let mut handlers = vec![PEER.to_owned()];
    match std::env::var("KUASAR_E2E_HANDLERS") {
        Ok(list) => {
            handlers.extend(list.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != PEER).map(str::to_owned))
        }
        Err(_) => {
            handlers.push("kuasar-runc".to_owned());
            for (handler, found) in [("kuasar-crun", tools::crun().map(drop)), ("kuasar-qemu", tools::machine("qemu"))] {
                match found {
                    Ok(()) => handlers.push(handler.to_owned()),
                    Err(missing) => skip::record(handler, &missing.to_string()),
                }
            }
        }
    }
    handlers
}

/// Runs the cases that the command line asks for.
pub(crate) fn run(entries: Vec<Entry>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_A_TIME);
    // While there is one thread.
    let runtime = match hybrid::hide_controllers().and_then(|()| Ok(Runtime::new()?)) {
        Ok(runtime) => Arc::new(runtime),
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let handlers = handlers();
    let all = Arc::new(Run {
        table: Mutex::new(Table::new(&handlers, entries.iter().map(Entry::title).collect())),
        handlers,
        cluster: tokio::sync::Mutex::default(),
        gate: RwLock::default(),
        machines: Semaphore::new(MACHINES_AT_A_TIME),
        peers: Mutex::default(),
        next: std::sync::atomic::AtomicUsize::new(0),
    });
    let mut trials = Vec::new();
    // What wants the cluster for itself comes last: others would wait for it. Then handler by handler: the peer has ended most cases when
    // another fails one.
    for shared in [true, false] {
        for handler in &all.handlers {
            for entry in entries.iter().filter(|entry| (entry.scope == Scope::Shared) == shared) {
                if entry.scope != Scope::OursAlone || handler != PEER {
                    trials.push(trial(&runtime, &all, *entry, handler));
                }
            }
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if arguments.list {
        return conclusion.exit_code();
    }
    // In libtest's words, for whoever counts them.
    if let Err(error) = runtime.block_on(all.finish()) {
        println!("test the_cluster_leaves_nothing ... FAILED\n{error:#}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

fn trial(runtime: &Arc<Runtime>, all: &Arc<Run>, entry: Entry, handler: &str) -> Trial {
    let title = entry.title();
    let name = format!("{handler}/{title}");
    let (runtime, all, handler) = (Arc::clone(runtime), Arc::clone(all), handler.to_owned());
    Trial::test(name.clone(), move || {
        let begin = Instant::now();
        let listed = |list: &[(&str, &str)]| {
            let found = list.iter().find(|(case, _)| tools::is_machine(&handler) && *case == title);
            found.map(|(_, why)| (*why).to_owned())
        };
        let verdict = match (listed(NOT_IN_MACHINES), listed(NOT_RUN_IN_MACHINES)) {
            (Some(why), _) => Verdict::Impossible(why),
            (None, Some(why)) => Verdict::Skipped(why),
            (None, None) => runtime.block_on(all.verdict(&entry, &handler)),
        };
        if std::env::var_os("KUASAR_E2E_TIMES").is_some() {
            eprintln!("{:6.2} s {name}", begin.elapsed().as_secs_f32());
        }
        lock(&all.table).set(&title, &handler, verdict.clone());
        match verdict {
            Verdict::Passed(_) => Ok(()),
            Verdict::Failed(why) => {
                // libtest tells why in the end only, which is long to wait for.
                eprintln!("FAILED {name}: {why}");
                Err(Failed::from(why))
            }
            Verdict::Alike(why) | Verdict::Impossible(why) | Verdict::Skipped(why) => {
                skip::record(&name, &why);
                Ok(())
            }
        }
    })
}

/// As for the end-to-end tests.
fn retries() -> u32 {
    std::env::var("KUASAR_E2E_RETRIES").ok().and_then(|count| count.parse().ok()).unwrap_or(0)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
