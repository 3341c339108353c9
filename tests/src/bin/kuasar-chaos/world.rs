//! What all tasks share, and how each makes its calls: with a deadline, on the ledger, again after a failure, as kubelet does.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kuasar_tests::cri::k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use kuasar_tests::cri::k8s_cri::v1::{
    self, ContainerFilter, ListContainersRequest, ListPodSandboxRequest, PodSandboxFilter, RemovePodSandboxRequest,
    StopPodSandboxRequest,
};
use kuasar_tests::{Container, ContainerSpec, Cri, Node, Pod, PodSpec};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::ledger::{Call, Disturbance, Ledger, Promise};

/// How long a call may take. What takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a call about a hung volume or a stuck guest may take: longer than the daemon waits for a guest that is to start a program.
const PATIENT: Duration = Duration::from_secs(150);
/// How long a call is repeated before it is given up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pauses between attempts: each twice as long as the one before.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// The label by which what an attempt may have left is found again.
const LABEL: &str = "chaos";
/// Where a container finds a directory of its own.
pub(crate) const MINE: &str = "/mine";

/// A call that was given up, or failed and is not repeated by itself. What there is to say is on the ledger.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GivenUp;

/// What all tasks share.
pub(crate) struct World {
    cri: Cri,
    /// What was done, and what came of it.
    pub(crate) ledger: Ledger,
    /// Whether containerd is there.
    containerd: watch::Sender<bool>,
    /// Whether the load goes on.
    load: watch::Sender<bool>,
    handler: String,
    cgroup_parent: String,
    logs: PathBuf,
    shared: PathBuf,
    next: AtomicU64,
}

impl World {
    pub(crate) fn new(node: &Node, handler: &str, ledger: Ledger) -> Result<Self> {
        // Below a mount that other mount namespaces see, too.
        let shared = node.dir().join("run/chaos");
        std::fs::create_dir_all(&shared).with_context(|| format!("create {}", shared.display()))?;
        Ok(Self {
            cri: node.cri.clone(),
            ledger,
            containerd: watch::Sender::new(true),
            load: watch::Sender::new(true),
            handler: handler.to_owned(),
            cgroup_parent: node.cgroup_parent(),
            logs: node.dir().join("logs"),
            shared,
            next: AtomicU64::new(1),
        })
    }

    /// The client.
    pub(crate) fn cri(&self) -> &Cri {
        &self.cri
    }

    /// The raw runtime service.
    pub(crate) fn runtime(&self) -> RuntimeServiceClient<Channel> {
        self.cri.runtime()
    }

    /// A word that nothing else is called by.
    pub(crate) fn unique(&self, what: &str) -> String {
        format!("{what}-{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Says whether containerd is there.
    pub(crate) fn containerd_is(&self, up: bool) {
        self.containerd.send_replace(up);
    }

    /// Starts or ends the load.
    pub(crate) fn load_goes_on(&self, on: bool) {
        self.load.send_replace(on);
    }

    /// Whether the load goes on.
    pub(crate) fn goes_on(&self) -> bool {
        *self.load.borrow()
    }

    /// A pause in the load, which ends early with the load.
    pub(crate) async fn rest(&self, time: Duration) {
        let mut load = self.load.subscribe();
        // Either the time is over, or the load.
        let _ = timeout(time, load.wait_for(|on| !on)).await;
    }

    /// A pod's specification, found again by its name.
    pub(crate) fn pod(&self, name: &str) -> PodSpec {
        let mut spec = PodSpec::new(name).handler(&self.handler).cgroup_parent(&self.cgroup_parent).label(LABEL, name);
        spec.config.log_directory = self.logs.join(name).display().to_string();
        spec
    }

    /// A container's specification, found again by its name.
    pub(crate) fn container(&self, name: &str) -> ContainerSpec {
        ContainerSpec::new(name).log_path(&format!("{name}.log")).label(LABEL, name)
    }

    /// A directory of this machine for a container to mount at [`MINE`].
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.shared.join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        Ok(dir)
    }

    /// Makes a call once, when containerd is there.
    pub(crate) async fn once<T>(
        &self,
        call: Call,
        about: &str,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        self.once_within(DEADLINE, call, about, work).await
    }

    /// The same for a call that may take so long.
    async fn once_within<T>(
        &self,
        limit: Duration,
        call: Call,
        about: &str,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        let mut containerd = self.containerd.subscribe();
        // The sender is in `self`.
        let _ = containerd.wait_for(|up| *up).await;
        let begun = Instant::now();
        self.noted(limit, call, about, work, |status| self.ledger.failed(call, begun, about, status)).await
    }

    /// Makes a call about what is disturbed itself: it may fail, and wait for as long as the daemon waits for a guest.
    pub(crate) async fn about_disturbed<T>(
        &self,
        what: Disturbance,
        call: Call,
        about: &str,
        work: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, Status> {
        self.noted(PATIENT, call, about, work, |status| self.ledger.failed_by(what, call, about, status)).await
    }

    /// Puts on the ledger what becomes of a call; `failed` does for a failure.
    async fn noted<T>(
        &self,
        limit: Duration,
        call: Call,
        about: &str,
        work: impl Future<Output = Result<T, Status>>,
        failed: impl FnOnce(&Status),
    ) -> Result<T, Status> {
        match timeout(limit, work).await {
            Ok(Ok(value)) => {
                self.ledger.ok(call);
                Ok(value)
            }
            Ok(Err(status)) => {
                failed(&status);
                Err(status)
            }
            Err(_) => {
                self.ledger.hung(call, about);
                Err(Status::deadline_exceeded(format!("no answer within {} s", limit.as_secs())))
            }
        }
    }

    /// Makes a call again and again until it succeeds.
    pub(crate) async fn insist<T, W>(&self, call: Call, about: &str, mut work: impl FnMut() -> W) -> Result<T, GivenUp>
    where
        W: Future<Output = Result<T, Status>>,
    {
        let (begun, mut pause) = (Instant::now(), PAUSE.0);
        loop {
            match self.once(call, about, work()).await {
                Ok(value) => return Ok(value),
                Err(status) => self.again(call, about, &status, begun, &mut pause).await?,
            }
        }
    }

    /// The same for what ends something: gone is as good.
    async fn insist_gone<W>(&self, call: Call, about: &str, mut work: impl FnMut() -> W) -> Result<(), GivenUp>
    where
        W: Future<Output = Result<(), Status>>,
    {
        self.insist(call, about, || {
            let work = work();
            async {
                match work.await {
                    Err(status) if status.code() == Code::NotFound => Ok(()),
                    other => other,
                }
            }
        })
        .await
    }

    /// Runs a pod, with another one for each attempt, of which the earlier are removed.
    pub(crate) async fn run_pod(&self, kind: impl Fn(PodSpec) -> PodSpec) -> Result<Pod, GivenUp> {
        self.run_pod_within(DEADLINE, kind).await
    }

    /// The same where an attempt may take so long, because a guest boots.
    pub(crate) async fn run_pod_within(&self, limit: Duration, kind: impl Fn(PodSpec) -> PodSpec) -> Result<Pod, GivenUp> {
        let (begun, mut pause) = (Instant::now(), PAUSE.0);
        loop {
            let name = self.unique("pod");
            let attempt = self.cri.run_pod(kind(self.pod(&name)));
            match self.once_within(limit, Call::RunPodSandbox, &name, attempt).await {
                Ok(pod) => return Ok(pod),
                Err(status) => {
                    self.remove_pods(Some(&name)).await?;
                    self.again(Call::RunPodSandbox, &name, &status, begun, &mut pause).await?;
                }
            }
        }
    }

    /// Creates and starts a container, with another one for each attempt.
    pub(crate) async fn run_container(
        &self,
        pod: &Pod,
        kind: impl Fn(ContainerSpec) -> ContainerSpec,
    ) -> Result<Container, GivenUp> {
        let (begun, mut pause) = (Instant::now(), PAUSE.0);
        loop {
            let name = self.unique("c");
            let failed = match self.once(Call::CreateContainer, &name, pod.create(kind(self.container(&name)))).await {
                Ok(container) => match self.once(Call::StartContainer, &container.id, container.start()).await {
                    Ok(()) => return Ok(container),
                    Err(status) => (Call::StartContainer, status),
                },
                Err(status) => (Call::CreateContainer, status),
            };
            self.remove_containers(&name).await?;
            self.again(failed.0, &name, &failed.1, begun, &mut pause).await?;
        }
    }

    /// Waits for the next attempt, unless it has been tried for too long.
    async fn again(
        &self,
        call: Call,
        about: &str,
        status: &Status,
        begun: Instant,
        pause: &mut Duration,
    ) -> Result<(), GivenUp> {
        if begun.elapsed() > PATIENCE {
            self.ledger.broke(Promise::Recovers, 1, &format!("{call:?} of {about}, at last: {}", status.message()));
            return Err(GivenUp);
        }
        sleep(*pause).await;
        *pause = PAUSE.1.min(*pause * 2);
        self.ledger.retried(call);
        Ok(())
    }

    /// Stops and removes a container.
    pub(crate) async fn remove_container(&self, container: &Container, grace_secs: i64) -> Result<(), GivenUp> {
        self.insist_gone(Call::StopContainer, &container.id, || container.stop(grace_secs)).await?;
        self.insist_gone(Call::RemoveContainer, &container.id, || container.remove()).await
    }

    /// Stops and removes a pod.
    pub(crate) async fn remove_pod(&self, id: &str) -> Result<(), GivenUp> {
        let pod_sandbox_id = id.to_owned();
        self.insist_gone(Call::StopPodSandbox, id, || async {
            let request = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
            self.cri.runtime().stop_pod_sandbox(request).await.map(|_| ())
        })
        .await?;
        self.insist_gone(Call::RemovePodSandbox, id, || async {
            let request = RemovePodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
            self.cri.runtime().remove_pod_sandbox(request).await.map(|_| ())
        })
        .await
    }

    async fn remove_containers(&self, name: &str) -> Result<(), GivenUp> {
        let filter = ContainerFilter { label_selector: label(name), ..Default::default() };
        for container in self.containers(filter).await? {
            self.remove_container(&self.cri.container(&container.id), 0).await?;
        }
        Ok(())
    }

    /// Removes pods: those of this name, or all.
    pub(crate) async fn remove_pods(&self, name: Option<&str>) -> Result<(), GivenUp> {
        for pod in self.pods(name).await? {
            self.remove_pod(&pod.id).await?;
        }
        Ok(())
    }

    /// Pods: those of this name, or all.
    pub(crate) async fn pods(&self, name: Option<&str>) -> Result<Vec<v1::PodSandbox>, GivenUp> {
        let filter = name.map(|name| PodSandboxFilter { label_selector: label(name), ..Default::default() });
        self.insist(Call::List, "pods", || async {
            let request = ListPodSandboxRequest { filter: filter.clone() };
            Ok(self.cri.runtime().list_pod_sandbox(request).await?.into_inner().items)
        })
        .await
    }

    /// Containers.
    pub(crate) async fn containers(&self, filter: ContainerFilter) -> Result<Vec<v1::Container>, GivenUp> {
        self.insist(Call::List, "containers", || async {
            let request = ListContainersRequest { filter: Some(filter.clone()) };
            Ok(self.cri.runtime().list_containers(request).await?.into_inner().containers)
        })
        .await
    }
}

fn label(name: &str) -> HashMap<String, String> {
    HashMap::from([(LABEL.to_owned(), name.to_owned())])
}
