//! How cases are run: their scopes, the shared node, the clean-up and the search for what they left.

use std::collections::BTreeSet;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::FutureExt as _;
use kuasar_tests::cri::k8s_cri::v1::{RemovePodSandboxRequest, RuntimeHandlerFeatures, StopPodSandboxRequest};
use kuasar_tests::leak::Snapshot;
use kuasar_tests::{Container, ContainerSpec, Cri, Node, NodeOptions, Pod, PodSpec, hybrid, skip, tools, wait};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;
use tonic::Status;

/// What cannot be for a pod in a virtual machine, and why. A module's name stands for all of its cases.
const NOT_IN_MACHINES: &[(&str, &str)] = &[
    ("direct", "it makes pods on the node's network"),
    ("soak::two_hundred_pods", "machines for so many take longer than a case may"),
    ("pod::thirty_pods_at_once", "machines for so many take longer than a case may"),
    ("pod::a_pods_init_killed_from_outside", "the pod's processes are the guest's"),
    ("pod::a_container_killed_from_outside", "the pod's processes are the guest's"),
    ("bad::an_oci_runtime_that_disappears", "the OCI runtime is in the guest"),
    ("bad::an_oci_runtime_that_hangs", "the OCI runtime is in the guest"),
    ("bad::an_oci_runtime_that_is_too_old", "the OCI runtime is in the guest"),
    ("kuasarctl::starts_that_fail_are_told", "its failure is the OCI runtime's on the node"),
    ("namespaces::the_nodes_processes", "a virtual machine has none of the node's namespaces"),
    ("namespaces::the_nodes_network", "a virtual machine has none of the node's namespaces"),
    ("namespaces::the_nodes_ipc", "a virtual machine has none of the node's namespaces"),
    ("namespaces::everything_of_the_node", "a virtual machine has none of the node's namespaces"),
    ("podfiles::the_nodes_sysctls_are_left_alone", "it is about pods on the node's network"),
    ("podfiles::shared_memory_is_the_pods", "the guest's own shared memory is the pod's, and may hold programs"),
    ("namespaces::a_pod_is_apart_and_its_containers_are_together", "it compares the node's namespaces"),
    ("resources::limits_are_set", "the container's control group is the guest's"),
    ("resources::limits_change", "the container's control group is the guest's"),
    ("resources::limits_that_cannot_be", "what a limit may be is the guest's kernel's to say"),
    ("resources::everything_of_a_pod_is_below_its_cgroup", "the container's processes are the guest's"),
    ("volumes::propagation_to_the_node", "mounts of a virtual machine cannot be the node's"),
    ("devices::one_that_is_asked_for", "character devices of the node are not the guest's"),
    ("devices::all_of_them", "character devices of the node are not the guest's"),
    ("network::a_server_on_the_nodes_network", "a virtual machine is not on the node's network"),
    ("signals::process_1_gets_any_signal", "the container's processes are the guest's"),
    ("signals::oci_runtimes_get_any_signal", "the OCI runtime is in the guest"),
    ("gc::a_damaged_state_file", "it looks for the processes of containers"),
];

/// How long a case may take. What hangs is to be named, not to stop the suite.
const LIMIT: Duration = Duration::from_secs(120);
/// How long what a case has removed may take to be gone.
const SETTLE: Duration = Duration::from_secs(15);
/// Cases mostly wait for containerd: more at a time than there are processors.
const AT_A_TIME: usize = 8;
/// The handlers of our own sandboxers begin so.
const OURS: &str = "kuasar-";
/// Lines of a log shown with a failure.
const EVIDENCE: usize = 8;

/// For which handlers a case runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Each.
    Handlers,
    /// Each, and its variant whose stdio goes over containerd's streaming service.
    Stdio,
    /// Each sandboxer of ours.
    Ours,
    /// Each whose pods have a virtual machine.
    Machines,
}

type Outcome<'a> = Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;

/// What a case does.
#[derive(Clone, Copy)]
pub(crate) enum Body {
    /// With the shared node.
    Shared(for<'a> fn(&'a Case) -> Outcome<'a>),
    /// With nodes that it starts for itself.
    Alone(for<'a> fn(&'a Lone) -> Outcome<'a>),
}

/// A case to be run.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// `pod::lifecycle`.
    pub(crate) name: (&'static str, &'static str),
    /// For which handlers.
    pub(crate) scope: Scope,
    /// What it does.
    pub(crate) body: Body,
}

/// A list of [`Entry`]s out of functions: `cases![Handlers Shared: this, that]`.
macro_rules! cases {
    ($scope:ident $body:ident: $($name:ident),+ $(,)?) => {
        vec![$($crate::suite::Entry {
            name: (module_path!(), stringify!($name)),
            scope: $crate::suite::Scope::$scope,
            body: $crate::suite::Body::$body(|case| Box::pin($name(case))),
        }),+]
    };
}
pub(crate) use cases;

/// A case with a node of its own.
pub(crate) struct Lone {
    /// The runtime handler.
    pub(crate) handler: String,
    name: String,
}

impl Lone {
    /// Options for a node with this handler.
    pub(crate) fn options(&self) -> NodeOptions {
        with_handler(NodeOptions::new(&self.name), &self.handler)
    }

    /// A node with this handler.
    pub(crate) async fn node(&self) -> Result<Node> {
        Node::start(self.options()).await
    }

    /// A pod to be run with this handler.
    pub(crate) fn pod(&self) -> PodSpec {
        PodSpec::new("pod").handler(&self.handler)
    }

    /// What the node has after its first pod, and before the next.
    pub(crate) async fn baseline(&self, node: &Node) -> Result<Snapshot> {
        baseline(node, std::slice::from_ref(&self.handler)).await
    }

    /// Whether the handler is a sandboxer of ours.
    pub(crate) fn is_ours(&self) -> bool {
        self.handler.starts_with(OURS)
    }

    /// Records a skip.
    pub(crate) fn skip(&self, missing: &str) -> Result<()> {
        skip::record(&self.name, missing);
        Ok(())
    }
}

/// What a node has after its first pod: connections are made and directories created when they are first needed.
async fn baseline(node: &Node, handlers: &[String]) -> Result<Snapshot> {
    let before = node.snapshot()?;
    for handler in handlers {
        if let Some((name, _)) = sandboxer(handler).filter(|_| !tools::is_machine(handler)) {
            crate::direct::first(node, name).await?;
        }
        let pod = node.run_pod(PodSpec::new("first").handler(handler).shared_pid()).await?;
        let container = pod.run(ContainerSpec::new("c").sleep()).await?;
        ensure!(container.exec(["true"]).await?.exit_code == 0, "the first exec with {handler} fails");
        pod.remove_all().await?;
        wait::until("the first pod to be gone", SETTLE, || async {
            let ids = node.cri.ids();
            Ok(node.snapshot()?.naming(&ids).is_empty().then_some(()))
        })
        .await?;
    }
    // Of what is counted by kind there must not be more than a first pod makes.
    let after = node.snapshot()?;
    for line in after.beyond(&before) {
        ensure!(line.starts_with("fd of kuasard") || line.starts_with("state: "), "the first pod has left {line}");
    }
    Ok(after)
}

fn with_handler(options: NodeOptions, handler: &str) -> NodeOptions {
    match sandboxer(handler) {
        Some((name, runtime)) => options.sandboxer(name, runtime),
        None => options,
    }
}

/// `kuasar-crun-streaming` is the sandboxer `kuasar-crun` with the OCI runtime `crun`.
fn sandboxer(handler: &str) -> Option<(&str, &str)> {
    let name = handler.strip_suffix("-streaming").unwrap_or(handler);
    Some((name, name.strip_prefix(OURS)?))
}

/// A case on the shared node, for one handler, with a client of its own.
pub(crate) struct Case {
    /// The shared node.
    pub(crate) node: Arc<Node>,
    /// A client that knows what this case has made.
    pub(crate) cri: Cri,
    /// The runtime handler.
    pub(crate) handler: String,
    name: String,
    dir: PathBuf,
    /// Further ids that must leave no trace.
    others: Mutex<BTreeSet<String>>,
}

impl Case {
    async fn new(node: Arc<Node>, name: &str, handler: &str) -> Result<Self> {
        let cri = Cri::connect(&node.containerd.paths().socket).await?;
        let dir = node.dir().join("run/cases").join(name.replace(['/', ':'], "."));
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(Self { node, cri, handler: handler.to_owned(), name: name.to_owned(), dir, others: Mutex::default() })
    }

    /// Also looks for this id when the case is done.
    pub(crate) fn remember(&self, id: &str) {
        self.others.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
    }

    fn ids(&self) -> BTreeSet<String> {
        let others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        self.cri.ids().union(&others).cloned().collect()
    }

    /// A directory of the case's own, below a mount that is shared with other mount namespaces.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the handler is a sandboxer of ours.
    pub(crate) fn is_ours(&self) -> bool {
        self.handler.starts_with(OURS)
    }

    /// A pod to be run with this handler.
    pub(crate) fn spec(&self) -> PodSpec {
        PodSpec::new("pod").handler(&self.handler)
    }

    /// Runs a pod, remembered for the clean-up.
    pub(crate) async fn run(&self, spec: PodSpec) -> Result<Pod, Status> {
        self.cri.run_pod(self.node.complete(spec)).await
    }

    /// An ordinary pod.
    pub(crate) async fn pod(&self) -> Result<Pod, Status> {
        self.run(self.spec()).await
    }

    /// Whether the handler's pods have a virtual machine each.
    pub(crate) fn is_machine(&self) -> bool {
        tools::is_machine(&self.handler)
    }

    /// A pod on the node's network where it can be: quicker, where the network does not matter.
    pub(crate) async fn quick_pod(&self) -> Result<Pod, Status> {
        self.run(self.spec().quick()).await
    }

    /// A container that sleeps, in a pod on the node's network.
    pub(crate) async fn sleeper(&self) -> Result<Container, Status> {
        self.container(ContainerSpec::new("c").sleep()).await
    }

    /// A running container in a pod of its own, on the node's network.
    pub(crate) async fn container(&self, spec: ContainerSpec) -> Result<Container, Status> {
        self.quick_pod().await?.run(spec).await
    }

    /// What CRI says the handler can do.
    pub(crate) async fn features(&self) -> Result<RuntimeHandlerFeatures> {
        let handlers = self.cri.handlers().await?;
        let found = handlers.into_iter().find(|handler| handler.name == self.handler);
        Ok(found.with_context(|| format!("CRI does not list the handler {}", self.handler))?.features.unwrap_or_default())
    }

    /// Records a skip: `return case.skip("no AppArmor")`.
    pub(crate) fn skip(&self, missing: &str) -> Result<()> {
        skip::record(&self.name, missing);
        Ok(())
    }

    /// Removes what is left of the case's pods.
    async fn clean_up(&self) -> Result<()> {
        let ids = self.cri.ids();
        for pod in self.cri.pods().await?.into_iter().filter(|pod| ids.contains(&pod.id)) {
            let mut runtime = self.cri.runtime();
            runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() }).await?;
            let remove = || async {
                let request = RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
                self.cri.runtime().remove_pod_sandbox(request).await
            };
            // containerd may still call a container running that is ending by itself.
            if remove().await.is_err() {
                wait::until("a pod to be removable", SETTLE, || async { Ok(remove().await.ok()) }).await?;
            }
        }
        std::fs::remove_dir_all(&self.dir).with_context(|| format!("remove {}", self.dir.display()))
    }

    /// Fails when something on the machine carries the id of a pod or container of this case.
    async fn assert_nothing_left(&self) -> Result<()> {
        let ids = self.ids();
        let end = Instant::now() + SETTLE;
        loop {
            let left = self.node.snapshot()?.naming(&ids);
            if left.is_empty() {
                return Ok(());
            }
            ensure!(Instant::now() < end, "left behind after {} s:\n  {}", SETTLE.as_secs(), left.join("\n  "));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The last lines of the daemons' logs that name a pod or container of this case.
    fn evidence(&self) -> String {
        let ids = self.ids();
        let mut evidence = String::new();
        for log in [self.node.containerd.paths().log.clone(), self.node.dir().join("kuasard.log")] {
            let Ok(text) = std::fs::read(&log) else { continue };
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text
                .lines()
                // containerd kills each exec once more after its end.
                .filter(|line| !line.contains("already finished") && ids.iter().any(|id| line.contains(id.as_str())))
                .collect();
            evidence.push_str(&format!("\n{}:", log.file_name().unwrap_or_default().to_string_lossy()));
            for line in &lines[lines.len().saturating_sub(EVIDENCE)..] {
                evidence.push_str("\n  ");
                evidence.push_str(line);
            }
        }
        evidence
    }
}

/// The shared node, once a case has asked for it.
#[derive(Default)]
struct Shared {
    handlers: Vec<String>,
    node: tokio::sync::Mutex<Option<(Arc<Node>, Snapshot)>>,
    /// Why it does not start: not to be tried again for each case.
    fault: Mutex<Option<String>>,
}

impl Shared {
    async fn node(&self) -> Result<Arc<Node>> {
        let mut slot = self.node.lock().await;
        if let Some((node, _)) = &*slot {
            return Ok(Arc::clone(node));
        }
        if let Some(fault) = &*self.fault.lock().unwrap_or_else(PoisonError::into_inner) {
            bail!("{fault}");
        }
        let mut options = NodeOptions::new("the shared node");
        for handler in &self.handlers {
            options = with_handler(options, handler);
        }
        match Node::start(options).await {
            Ok(node) => {
                std::fs::create_dir_all(node.dir().join("run/cases"))?;
                let node = Arc::new(node);
                let before = baseline(&node, &self.handlers).await?;
                *slot = Some((Arc::clone(&node), before));
                Ok(node)
            }
            Err(error) => {
                *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{error:#}"));
                Err(error)
            }
        }
    }

    /// Compares the node with what it was, and stops it.
    async fn finish(&self) -> Result<()> {
        let Some((node, before)) = self.node.lock().await.take() else { return Ok(()) };
        let leak = node.assert_no_leak(&before).await;
        let node = Arc::try_unwrap(node).map_err(|_| anyhow::anyhow!("a case still holds the shared node"))?;
        let stopped = node.stop().await;
        leak.and(stopped)
    }
}

async fn shared(shared: &Shared, body: for<'a> fn(&'a Case) -> Outcome<'a>, name: &str, handler: &str) -> Result<()> {
    let case = Case::new(shared.node().await?, name, handler).await?;
    let result = limited(body(&case)).await;
    match result {
        Ok(()) => {
            case.clean_up().await.context("clean up")?;
            case.assert_nothing_left().await
        }
        Err(error) => {
            // Before the clean-up adds its own lines.
            let evidence = case.evidence();
            if let Err(error) = case.clean_up().await {
                eprintln!("{name}: clean up after the failure: {error:#}");
            }
            Err(anyhow::anyhow!("{error:#}{evidence}"))
        }
    }
}

/// Runs a body with a time limit; a failed assertion becomes an error, so that the clean-up still takes place.
async fn limited(body: Outcome<'_>) -> Result<()> {
    match tokio::time::timeout(LIMIT, AssertUnwindSafe(body).catch_unwind()).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => {
            // Where it was is on stderr already.
            let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            bail!("{}", text.unwrap_or("panicked"))
        }
        Err(_) => bail!("not done after {} s", LIMIT.as_secs()),
    }
}

fn handlers() -> Vec<String> {
    match std::env::var("KUASAR_E2E_HANDLERS") {
        Ok(list) => list.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        Err(_) => {
            let mut handlers = vec!["kuasar-runc".to_owned()];
            match tools::crun() {
                Ok(_) => handlers.push("kuasar-crun".to_owned()),
                Err(missing) => skip::record("kuasar-crun", &missing.to_string()),
            }
            handlers
        }
    }
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
    let all = Arc::new(Shared { handlers: handlers(), ..Shared::default() });
    let mut trials = Vec::new();
    for entry in entries {
        for handler in &all.handlers {
            let ours = handler.starts_with(OURS);
            let fits = match entry.scope {
                Scope::Handlers | Scope::Stdio => true,
                Scope::Ours => ours,
                Scope::Machines => tools::is_machine(handler),
            };
            if !fits {
                continue;
            }
            let module = entry.name.0.rsplit("::").next().unwrap_or_default();
            let name = format!("{module}::{}", entry.name.1);
            let impossible = NOT_IN_MACHINES.iter().find(|(case, _)| *case == module || *case == name);
            if let Some((_, why)) = impossible.filter(|_| tools::is_machine(handler)) {
                let name = format!("{handler}/{name}");
                trials.push(Trial::test(name.clone(), move || {
                    skip::record(&name, why);
                    Ok(())
                }));
                continue;
            }
            trials.push(trial(&runtime, &all, entry, handler));
            if entry.scope == Scope::Stdio && ours {
                trials.push(trial(&runtime, &all, entry, &format!("{handler}-streaming")));
            }
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    // In libtest's words, for whoever counts them.
    if let Err(error) = runtime.block_on(all.finish()) {
        println!("test the_shared_node_is_as_before ... FAILED\n{error:#}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

fn trial(runtime: &Arc<Runtime>, all: &Arc<Shared>, entry: Entry, handler: &str) -> Trial {
    let module = entry.name.0.rsplit("::").next().unwrap_or_default();
    let name = format!("{handler}/{module}::{}", entry.name.1);
    let (runtime, all, handler) = (Arc::clone(runtime), Arc::clone(all), handler.to_owned());
    Trial::test(name.clone(), move || {
        runtime.block_on(async {
            let begin = Instant::now();
            let mut result = attempt(&all, &entry.body, &name, &handler).await;
            for retry in 1..=retries() {
                let Err(error) = &result else { break };
                println!("RETRY {retry} of {name} after: {error:#}");
                result = attempt(&all, &entry.body, &name, &handler).await;
            }
            if std::env::var_os("KUASAR_E2E_TIMES").is_some() {
                eprintln!("{:6.2} s {name}", begin.elapsed().as_secs_f32());
            }
            result.map_err(|error| Failed::from(format!("{error:#}")))
        })
    })
}

async fn attempt(all: &Shared, body: &Body, name: &str, handler: &str) -> Result<()> {
    match *body {
        Body::Shared(body) => shared(all, body, name, handler).await,
        Body::Alone(body) => limited(body(&Lone { handler: handler.to_owned(), name: name.to_owned() })).await,
    }
}

/// How often a failed case is run again. None by default; on a machine shared with others, whose disk or processors may be away
/// for longer than any reasonable time limit, `KUASAR_E2E_RETRIES` allows some, and each is printed.
fn retries() -> u32 {
    std::env::var("KUASAR_E2E_RETRIES").ok().and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Waits until kuasard has as many sandboxes as CRI has pods of its handlers: those that containerd has forgotten have to be found
/// out.
pub(crate) async fn agree(node: &Node) -> Result<()> {
    let dir = node.kuasard.as_ref().context("the node has no kuasard")?.state().join("sandboxes/k8s.io");
    wait::until("kuasard to have the sandboxes that containerd has", kuasar_tests::cri::SOON, || async {
        let pods = node.cri.pods().await?.into_iter().filter(|pod| pod.runtime_handler.starts_with(OURS)).count();
        Ok((std::fs::read_dir(&dir)?.count() == pods).then_some(()))
    })
    .await
}

/// Polls until `condition` holds.
pub(crate) async fn eventually<F, Fut>(what: &str, condition: F) -> Result<()>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<bool>>,
{
    wait::until(what, kuasar_tests::cri::SOON, || {
        let now = condition();
        async { Ok(now.await?.then_some(())) }
    })
    .await
}

/// The error of what must fail, when its message holds all of `words`.
#[track_caller]
pub(crate) fn refused<T>(result: Result<T, Status>, words: &[&str]) -> Result<Status> {
    let at = std::panic::Location::caller();
    match result {
        Ok(_) => bail!("{}:{}: it was accepted", at.file(), at.line()),
        Err(status) => {
            for word in words {
                ensure!(status.message().contains(word), "{}:{}: no {word:?} in: {status}", at.file(), at.line());
            }
            Ok(status)
        }
    }
}
