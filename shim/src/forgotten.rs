//! Sandboxes that containerd has forgotten.
//!
//! When RunPodSandbox fails after our Create, because its caller gave up or the daemon was stopped between Create and Start,
//! containerd (2.1 to 2.4) deletes the sandbox from its store and calls nobody. So the daemon looks: a sandbox without containers
//! that the store does not have at two looks in a row is stopped and deleted. The store has a sandbox before Create and until
//! after Shutdown, so none is taken that containerd still means to use.
//!
//! Nothing is asked while every sandbox has a container. A store that has never listed a sandbox of ours is not believed: the
//! configuration may name another containerd than the one that calls. That it has is remembered in a file, for the next daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use kuasar_sandboxers::{
    Error, Result,
    handle::SandboxHandle,
    id::{Namespace, SandboxId},
    registry::Registry,
};
use serde::{Deserialize, Serialize};
use tokio::time::{sleep, timeout};
use tonic::{
    Request,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tracing::{debug, info};

use crate::{
    calls::Calls,
    proto::sandbox::{StoreListRequest, store_client::StoreClient},
};

/// How long containerd may take to answer, and a sandbox to tell its state.
const ANSWER: Duration = Duration::from_secs(5);

/// Looks for forgotten sandboxes, and removes them, for as long as it is polled.
pub async fn collect(containerd: PathBuf, memory: PathBuf, registry: Registry, calls: Calls, interval: Duration) {
    let believed = remembered(&memory, &containerd);
    let mut collector = Collector { containerd, memory, registry, calls, believed, missing: BTreeSet::new() };
    loop {
        sleep(interval).await;
        if let Err(error) = collector.look().await {
            // containerd is away: nothing is known, so nothing is forgotten.
            collector.missing.clear();
            debug!(error = error.report(), "cannot ask containerd which sandboxes it knows");
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
fn remembered(memory: &Path, containerd: &Path) -> BTreeSet<Namespace> {
    let known: Option<Memory<PathBuf, BTreeSet<Namespace>>> =
        fs::read(memory).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    known.filter(|known| known.containerd == containerd).map(|known| known.namespaces).unwrap_or_default()
}

struct Collector {
    containerd: PathBuf,
    /// Where `believed` is remembered.
    memory: PathBuf,
    registry: Registry,
    calls: Calls,
    /// Namespaces in which the store has listed a sandbox of ours.
    believed: BTreeSet<Namespace>,
    /// What it did not have at the last look.
    missing: BTreeSet<(Namespace, SandboxId)>,
}

impl Collector {
    async fn look(&mut self) -> Result<()> {
        let mut suspects = BTreeMap::<Namespace, Vec<SandboxHandle>>::new();
        // Before the store is asked: what is created later is not among them.
        let all = self.registry.list();
        for sandbox in &all {
            // One that is busy is in use.
            if let Ok(Ok(status)) = timeout(ANSWER, sandbox.status()).await
                && status.containers.is_empty()
            {
                suspects.entry(sandbox.namespace.clone()).or_default().push(sandbox.clone());
            }
        }
        if suspects.is_empty() {
            self.missing.clear();
            return Ok(());
        }
        let mut store = connect(&self.containerd).await?;
        let mut missing = BTreeSet::new();
        for (namespace, suspects) in suspects {
            let known = list(&mut store, &namespace).await?;
            let ours = |sandbox: &&SandboxHandle| sandbox.namespace == namespace && known.contains(sandbox.id.as_str());
            if all.iter().any(|sandbox| ours(&sandbox)) && self.believed.insert(namespace.clone()) {
                self.remember();
            }
            for sandbox in suspects.into_iter().filter(|sandbox| !known.contains(sandbox.id.as_str())) {
                let key = (namespace.clone(), sandbox.id.clone());
                if self.believed.contains(&namespace) && self.missing.contains(&key) {
                    self.remove(sandbox).await;
                } else {
                    missing.insert(key);
                }
            }
        }
        self.missing = missing;
        Ok(())
    }

    fn remember(&self) {
        let memory = Memory { containerd: &self.containerd, namespaces: &self.believed };
        let written = serde_json::to_vec(&memory).map_err(io::Error::from).and_then(|bytes| fs::write(&self.memory, bytes));
        if let Err(error) = written {
            debug!(file = %self.memory.display(), %error, "cannot remember which namespaces containerd lists");
        }
    }

    async fn remove(&self, sandbox: SandboxHandle) {
        let id = sandbox.id.clone();
        let work = async move {
            sandbox.stop(Duration::ZERO).await?;
            sandbox.delete().await
        };
        match self.calls.run("remove a forgotten sandbox", id.as_str(), work).await {
            Ok(()) => info!(sandbox_id = %id, "removed a sandbox that containerd has forgotten"),
            // Gone meanwhile, or to be tried again at a later look.
            Err(error) => debug!(sandbox_id = %id, error = error.report(), "a forgotten sandbox was not removed"),
        }
    }
}

async fn connect(containerd: &Path) -> Result<StoreClient<Channel>> {
    let failed = |error| Error::failed(format!("connect to containerd at {}", containerd.display()))(error);
    let endpoint = Endpoint::try_from(format!("unix://{}", containerd.display())).map_err(failed)?;
    let channel = endpoint.timeout(ANSWER).connect_timeout(ANSWER).connect().await.map_err(failed)?;
    Ok(StoreClient::new(channel))
}

/// The ids that containerd's store has in a namespace.
async fn list(store: &mut StoreClient<Channel>, namespace: &Namespace) -> Result<BTreeSet<String>> {
    let mut request = Request::new(StoreListRequest { filters: Vec::new() });
    let header = MetadataValue::try_from(namespace.as_str()).map_err(Error::failed("name a namespace in a request"))?;
    request.metadata_mut().insert("containerd-namespace", header);
    let answer = store.list(request).await.map_err(Error::failed("list containerd's sandboxes"))?;
    Ok(answer.into_inner().list.into_iter().map(|sandbox| sandbox.sandbox_id).collect())
}
