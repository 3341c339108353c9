//! Sandboxes that containerd has forgotten.
//!
//! When RunPodSandbox fails after our Create, because its caller gave up or the daemon was stopped between Create and Start,
//! containerd (2.1 to 2.4) deletes the sandbox from its store and calls nobody. When containerd's metadata is wiped, it forgets all of
//! them, with containers. So the daemon looks: a sandbox that the store does not have at two looks in a row, and none of whose containers
//! containerd knows, is stopped and deleted. The store has a sandbox before Create and until after Shutdown, and containerd a container
//! before Task.Create, so none is taken that containerd still means to use.
//!
//! Sandboxes with containers are compared once in a while only, and nothing is asked at the other looks while every sandbox has one. A
//! store that has never listed a sandbox of ours is not believed: the configuration may name another containerd than the one that calls.
//! That it has is remembered in a file, for the next daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::join_all;
use kuasar_sandboxers::{
    Error, Result,
    handle::{SandboxHandle, SandboxStatus},
    id::{ContainerId, Namespace, SandboxId},
    lifecycle::ProcessState,
    registry::Registry,
};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tonic::{
    Request,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tracing::{debug, info, warn};

use crate::{
    abandoned::Comparison,
    calls::Calls,
    proto::{
        containers::{ListContainersRequest, containers_client::ContainersClient},
        sandbox::{StoreListRequest, store_client::StoreClient},
    },
};

/// How long containerd may take to answer, and a sandbox to tell its state.
const ANSWER: Duration = Duration::from_secs(5);

/// Which part of the interval passes before the first look.
const FIRST: u32 = 5;

/// Looks between two in which sandboxes with containers are compared, too.
const QUICK: usize = 11;

/// Failed looks in a row after which the log says so.
const FAILURES: u32 = 6;

/// Sandboxes that containerd is asked for at a time: the answer repeats their annotations, which Kubernetes allows 256 KiB of.
const ASKED: usize = 32;

/// The largest answer taken, in bytes: the largest that containerd sends.
const ANSWER_BYTES: usize = 16 << 20;

/// Looks for forgotten sandboxes and abandoned containers, and removes them, for as long as it is polled.
pub(crate) async fn collect(
    containerd: PathBuf,
    memory: PathBuf,
    comparison: Comparison,
    registry: Registry,
    calls: Calls,
    interval: Duration,
) {
    let eyes = Eyes::new(containerd, memory);
    let (missing, abandoned) = (BTreeSet::new(), BTreeSet::new());
    let mut collector = Collector { eyes, comparison, registry, calls, quick: 0, missing, abandoned };
    let mut failures = 0;
    // Soon for the first time: while there are sandboxes that containerd lists, it shows that it is the one that is to be believed.
    let mut pause = interval / FIRST;
    loop {
        sleep(pause).await;
        pause = interval;
        match collector.look().await {
            Ok(()) => {
                if std::mem::take(&mut failures) >= FAILURES {
                    info!("containerd tells again which sandboxes it knows");
                }
            }
            Err(error) => {
                // containerd is away: nothing is known, so nothing is forgotten. It may come back with less than it had.
                collector.missing.clear();
                collector.abandoned.clear();
                collector.quick = 0;
                failures += 1;
                match failures {
                    FAILURES => warn!(
                        error = error.report(),
                        "containerd does not tell which sandboxes it knows; what it has forgotten stays"
                    ),
                    _ => debug!(error = error.report(), "cannot ask containerd which sandboxes it knows"),
                }
            }
        }
    }
}

/// The containerd that has listed sandboxes of ours, and in which namespaces.
#[derive(Serialize, Deserialize)]
struct Memory<A, N> {
    containerd: A,
    namespaces: N,
}

/// What an earlier daemon has written down of that containerd. Without it, it is found out again.
pub(crate) fn remembered(memory: &Path, containerd: &Path) -> BTreeSet<Namespace> {
    let known: Option<Memory<PathBuf, BTreeSet<Namespace>>> =
        fs::read(memory).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    known.filter(|known| known.containerd == containerd).map(|known| known.namespaces).unwrap_or_default()
}

/// Which sandboxes are compared with what containerd knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Those without containers.
    Empty,
    /// All.
    All,
}

/// A sandbox that containerd does not know, nor any container of it.
pub(crate) struct Missing {
    pub(crate) sandbox: SandboxHandle,
    pub(crate) status: SandboxStatus,
    /// Whether containerd has ever listed a sandbox of ours in its namespace.
    pub(crate) believed: bool,
}

impl Missing {
    /// First processes of its containers, as far as they live.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let alive = |state: &ProcessState| !matches!(state, ProcessState::Stopped { .. });
        let states = self.status.containers.iter().map(|container| container.init.state);
        states.filter(alive).map(|state| state.pid()).filter(|pid| *pid != 0).collect()
    }
}

/// Sees what containerd knows.
pub(crate) struct Eyes {
    containerd: PathBuf,
    /// Where `believed` is remembered.
    memory: PathBuf,
    /// Namespaces in which the store has listed a sandbox of ours.
    believed: BTreeSet<Namespace>,
}

impl Eyes {
    pub(crate) fn new(containerd: PathBuf, memory: PathBuf) -> Self {
        let believed = remembered(&memory, &containerd);
        Self { containerd, memory, believed }
    }

    /// Compares the registry's sandboxes with what containerd knows.
    pub(crate) async fn look(&mut self, registry: &Registry, scope: Scope) -> Result<Vec<Missing>> {
        // Before the store is asked: what is created later is not among them.
        let all = registry.list();
        let mut suspects = BTreeMap::<Namespace, Vec<SandboxHandle>>::new();
        for sandbox in &all {
            // One that is busy is in use.
            if let Some(status) = status(sandbox).await
                && (scope == Scope::All || status.containers.is_empty())
            {
                suspects.entry(sandbox.namespace.clone()).or_default().push(sandbox.clone());
            } else if !self.believed.contains(&sandbox.namespace) {
                suspects.entry(sandbox.namespace.clone()).or_default();
            }
        }
        if suspects.is_empty() {
            return Ok(Vec::new());
        }
        let channel = connect(&self.containerd).await?;
        let mut missing = Vec::new();
        for (namespace, suspects) in suspects {
            let asked: Vec<_> =
                all.iter().filter(|sandbox| sandbox.namespace == namespace).map(|sandbox| sandbox.id.as_str()).collect();
            let known = sandboxes(&channel, &namespace, &asked).await?;
            let ours = |sandbox: &&SandboxHandle| sandbox.namespace == namespace && known.contains(sandbox.id.as_str());
            if all.iter().any(|sandbox| ours(&sandbox)) && self.believed.insert(namespace.clone()) {
                self.remember();
            }
            let believed = self.believed.contains(&namespace);
            for sandbox in suspects.into_iter().filter(|sandbox| !known.contains(sandbox.id.as_str())) {
                // Once more: by now it may have a container, or be gone.
                let Some(status) = status(&sandbox).await else { continue };
                if !knows_any(&channel, &namespace, &status).await? {
                    missing.push(Missing { sandbox, status, believed });
                }
            }
        }
        Ok(missing)
    }

    fn remember(&self) {
        let memory = Memory { containerd: &self.containerd, namespaces: &self.believed };
        let written = serde_json::to_vec(&memory).map_err(io::Error::from).and_then(|bytes| fs::write(&self.memory, bytes));
        if let Err(error) = written {
            debug!(file = %self.memory.display(), %error, "cannot remember which namespaces containerd lists");
        }
    }
}

struct Collector {
    eyes: Eyes,
    comparison: Comparison,
    registry: Registry,
    calls: Calls,
    /// Looks until sandboxes with containers are compared, too.
    quick: usize,
    /// What containerd did not know at the last look.
    missing: BTreeSet<(Namespace, SandboxId)>,
    /// Containers that it had given up then.
    abandoned: BTreeSet<(Namespace, ContainerId)>,
}

impl Collector {
    async fn look(&mut self) -> Result<()> {
        let scope = if self.quick == 0 { Scope::All } else { Scope::Empty };
        let found = self.eyes.look(&self.registry, scope).await?;
        // What is missing with its containers is looked at again at once.
        let again = found.iter().any(|missing| missing.believed && !missing.status.containers.is_empty());
        self.quick = if again { 0 } else { self.quick.checked_sub(1).unwrap_or(QUICK) };
        let mut missing = BTreeSet::new();
        for found in found {
            let key = (found.sandbox.namespace.clone(), found.sandbox.id.clone());
            if found.believed && self.missing.contains(&key) {
                // Else it is gone meanwhile, or to be tried again at a later look; the log says which.
                let _ = remove(&self.calls, found.sandbox).await;
            } else {
                missing.insert(key);
            }
        }
        self.missing = missing;
        let found = self.comparison.find(&self.registry).await?.into_iter();
        let ends = found.map(async |found| {
            let key = found.key();
            // Where it cannot be ended, the log says why; at the next look again.
            let remains = !self.abandoned.contains(&key) || found.end(&self.calls).await.is_err();
            remains.then_some(key)
        });
        self.abandoned = join_all(ends).await.into_iter().flatten().collect();
        Ok(())
    }
}

/// Removes a sandbox that containerd has forgotten.
pub(crate) async fn remove(calls: &Calls, sandbox: SandboxHandle) -> Result<()> {
    let id = sandbox.id.clone();
    let work = async move {
        sandbox.stop(Duration::ZERO).await?;
        sandbox.delete().await
    };
    let removed = calls.run("remove a forgotten sandbox", id.as_str(), work).await;
    match &removed {
        Ok(()) => info!(sandbox_id = %id, "removed a sandbox that containerd has forgotten"),
        Err(error) => debug!(sandbox_id = %id, error = error.report(), "a forgotten sandbox was not removed"),
    }
    removed
}

pub(crate) async fn status(sandbox: &SandboxHandle) -> Option<SandboxStatus> {
    timeout(ANSWER, sandbox.status()).await.ok()?.ok()
}

pub(crate) async fn connect(containerd: &Path) -> Result<Channel> {
    let failed = |error| Error::failed(format!("connect to containerd at {}", containerd.display()))(error);
    let endpoint = Endpoint::try_from(format!("unix://{}", containerd.display())).map_err(failed)?;
    endpoint.timeout(ANSWER).connect_timeout(ANSWER).connect().await.map_err(failed)
}

pub(crate) fn request<T>(namespace: &Namespace, message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    let header = MetadataValue::try_from(namespace.as_str()).map_err(Error::failed("name a namespace in a request"))?;
    request.metadata_mut().insert("containerd-namespace", header);
    Ok(request)
}

/// Which of these ids containerd's store has in a namespace.
pub(crate) async fn sandboxes(channel: &Channel, namespace: &Namespace, ids: &[&str]) -> Result<BTreeSet<String>> {
    let mut known = BTreeSet::new();
    for ids in ids.chunks(ASKED) {
        let request = request(namespace, StoreListRequest { filters: ids.iter().map(|id| format!("id=={id:?}")).collect() })?;
        let answer = StoreClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES).list(request).await;
        let answer = answer.map_err(Error::failed("list containerd's sandboxes"))?;
        known.extend(answer.into_inner().list.into_iter().map(|sandbox| sandbox.sandbox_id));
    }
    Ok(known)
}

/// Whether containerd knows one of a sandbox's containers. The sandbox itself is one for who has made it without the Sandbox API.
async fn knows_any(channel: &Channel, namespace: &Namespace, status: &SandboxStatus) -> Result<bool> {
    let containers = status.containers.iter().map(|container| container.id.as_str());
    let ids: Vec<&str> = containers.chain([status.spec.id.as_str()]).collect();
    let request = request(namespace, ListContainersRequest { filters: ids.iter().map(|id| format!("id=={id:?}")).collect() })?;
    let answer = ContainersClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES).list(request).await;
    let answer = answer.map_err(Error::failed("list containerd's containers"))?;
    Ok(answer.into_inner().containers.iter().any(|container| ids.contains(&container.id.as_str())))
}
