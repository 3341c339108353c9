//! Containers that containerd has given up while they run.
//!
//! containerd takes the loss of a Task connection for the container's end: it reports the container as exited, and whoever asked for it
//! makes another. What runs on then, runs beside that one for the pod's life. It happens when keeper and worker die and nobody has kept
//! their connections, or when a restarted containerd cannot reach kuasard in time.
//!
//! So a container without a connection is in doubt, and containerd is asked whether it still has its task: before another container is
//! made in that pod, and at each look of the [collector](crate::forgotten). One whose task is gone, in a sandbox that containerd still
//! lists, is ended and deleted. A containerd that does not list the sandbox is not the one that made it, and is not believed.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kuasar_sandboxers::{
    Error, Result,
    handle::{ContainerHandle, ContainerStatus, SandboxHandle},
    id::{ContainerId, Namespace},
    lifecycle::ProcessState,
    registry::Registry,
};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::{Code, transport::Channel};
use tracing::{info, warn};

use crate::{
    calls::Calls,
    forgotten::{self, connect, request},
    proto::tasks::{GetRequest, tasks_client::TasksClient},
};

/// How long a creation waits until containers of the same pod that are in doubt are compared, and ended.
const LIMIT: Duration = Duration::from_secs(5);

/// How long to wait before containerd is asked again.
const AGAIN: Duration = Duration::from_millis(100);

/// How long one may take to end that is killed: what hangs in the kernel does not.
const END: Duration = Duration::from_secs(20);

type Key = (Namespace, ContainerId);

/// Which containers have a Task connection. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attached(Arc<Mutex<HashMap<Key, usize>>>);

/// Says that a container has a connection, as long as it lives.
#[derive(Debug)]
pub(crate) struct Attachment {
    attached: Attached,
    key: Key,
}

impl Attached {
    fn table(&self) -> MutexGuard<'_, HashMap<Key, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, key: Key) -> Attachment {
        *self.table().entry(key.clone()).or_default() += 1;
        Attachment { attached: self.clone(), key }
    }

    fn has(&self, key: &Key) -> bool {
        self.table().contains_key(key)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let mut table = self.attached.table();
        if let Some(count) = table.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                table.remove(&self.key);
            }
        }
    }
}

/// A container that containerd has given up.
#[derive(Debug)]
pub(crate) struct Abandoned {
    pub(crate) sandbox: SandboxHandle,
    pub(crate) container: ContainerHandle,
    pub(crate) status: ContainerStatus,
}

impl Abandoned {
    pub(crate) fn key(&self) -> Key {
        (self.sandbox.namespace.clone(), self.status.id.clone())
    }

    /// Its first process, if that lives.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let state = self.status.init.state;
        let lives = !matches!(state, ProcessState::Stopped { .. });
        lives.then(|| state.pid()).filter(|pid| *pid != 0).into_iter().collect()
    }

    /// Ends it and removes it.
    pub(crate) async fn end(self, calls: &Calls) -> Result<()> {
        let Self { sandbox, container, status } = self;
        let operation = format!("the end of container {}", status.id);
        let late = move |_| Error::TimedOut { operation, seconds: END.as_secs() };
        let end = async move {
            if matches!(status.init.state, ProcessState::Running { .. } | ProcessState::Paused { .. }) {
                match container.kill(None, libc::SIGKILL, true).await {
                    Ok(()) | Err(Error::Finished { .. }) => drop(container.wait(None).await?),
                    Err(error) => return Err(error),
                }
            }
            container.delete(None).await.map(drop)
        };
        let work = async move { timeout(END, end).await.map_err(late)? };
        let id = &status.id;
        match calls.run("end an abandoned container", id, work).await {
            Ok(()) => {
                info!(sandbox_id = %sandbox.id, container = %id, "ended a container that containerd has given up");
                Ok(())
            }
            // Another has been quicker.
            Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => {
                warn!(sandbox_id = %sandbox.id, container = %id, error = error.report(), "cannot end a container that containerd has given up");
                Err(error)
            }
        }
    }
}

/// Finds and ends them. Clones are of the same daemon.
#[derive(Clone, Debug)]
pub(crate) struct Comparison {
    containerd: PathBuf,
    /// In which namespaces that containerd has listed sandboxes of ours.
    memory: PathBuf,
    pub(crate) attached: Attached,
}

impl Comparison {
    pub(crate) fn new(containerd: PathBuf, memory: PathBuf) -> Self {
        Self { containerd, memory, attached: Attached::default() }
    }

    /// Containers of a sandbox that are in doubt.
    async fn doubtful(&self, sandbox: &SandboxHandle) -> Vec<ContainerStatus> {
        let Some(status) = forgotten::status(sandbox).await else { return Vec::new() };
        let doubtful = |container: &ContainerStatus| !self.attached.has(&(sandbox.namespace.clone(), container.id.clone()));
        status.containers.into_iter().filter(doubtful).collect()
    }

    /// Containers of all sandboxes that containerd has given up. It is asked only when some are in doubt.
    pub(crate) async fn find(&self, registry: &Registry) -> Result<Vec<Abandoned>> {
        let mut found = Vec::new();
        let mut channel = None;
        for sandbox in registry.list() {
            let doubtful = self.doubtful(&sandbox).await;
            if doubtful.is_empty() {
                continue;
            }
            let channel = match &channel {
                Some(channel) => channel,
                None => channel.insert(connect(&self.containerd).await?),
            };
            found.extend(self.given_up(channel, registry, &sandbox, doubtful).await?.unwrap_or_default());
        }
        Ok(found)
    }

    /// Which of these containers containerd has given up; `None` when it does not know their sandbox either.
    async fn given_up(
        &self,
        channel: &Channel,
        registry: &Registry,
        sandbox: &SandboxHandle,
        doubtful: Vec<ContainerStatus>,
    ) -> Result<Option<Vec<Abandoned>>> {
        let namespace = &sandbox.namespace;
        if forgotten::sandboxes(channel, namespace, &[sandbox.id.as_str()]).await?.is_empty() {
            return Ok(None);
        }
        let mut found = Vec::new();
        for status in doubtful {
            if self.has_task(channel, namespace, &status.id).await?
                // Its connection may have come meanwhile: asked for the task, containerd asks us.
                || self.attached.has(&(namespace.clone(), status.id.clone()))
            {
                continue;
            }
            // Else it is gone meanwhile.
            if let Ok(container) = registry.container(namespace, &status.id) {
                found.push(Abandoned { sandbox: sandbox.clone(), container, status });
            }
        }
        Ok(Some(found))
    }

    async fn has_task(&self, channel: &Channel, namespace: &Namespace, id: &ContainerId) -> Result<bool> {
        let asked = request(namespace, GetRequest { container_id: id.to_string() })?;
        match TasksClient::new(channel.clone()).get(asked).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(Error::failed("ask containerd for a task")(status)),
        }
    }

    /// Ends what containerd has given up in a sandbox, before another container is made in it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it is not known within [`LIMIT`] what that is, or not ended.
    pub(crate) async fn before_create(&self, registry: &Registry, calls: &Calls, sandbox: &SandboxHandle) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let mut last = None;
        loop {
            let tried = timeout_at(deadline, async {
                let doubtful = self.doubtful(sandbox).await;
                if doubtful.is_empty() {
                    return Ok::<_, Error>(());
                }
                let channel = connect(&self.containerd).await?;
                let Some(abandoned) = self.given_up(&channel, registry, sandbox, doubtful).await? else {
                    warn!(sandbox_id = %sandbox.id, containerd = %self.containerd.display(), "containers without a connection cannot be compared: containerd does not list their sandbox; is [containerd] address the one that calls?");
                    return Ok(());
                };
                for abandoned in abandoned {
                    abandoned.end(calls).await?;
                }
                Ok(())
            });
            match tried.await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => {
                    if !forgotten::remembered(&self.memory, &self.containerd).contains(&sandbox.namespace) {
                        // Nobody is there who could have given anything up.
                        warn!(sandbox_id = %sandbox.id, error = error.report(), "containers without a connection cannot be compared with containerd's");
                        return Ok(());
                    }
                    last = Some(error.report());
                }
                Err(_) => return Err(in_doubt(sandbox, &self.containerd, last)),
            }
            if timeout_at(deadline, sleep(AGAIN)).await.is_err() {
                return Err(in_doubt(sandbox, &self.containerd, last));
            }
        }
    }
}

fn in_doubt(sandbox: &SandboxHandle, containerd: &Path, last: Option<String>) -> Error {
    let last = last.map(|last| format!(": {last}")).unwrap_or_default();
    Error::Unavailable {
        what: format!("sandbox {:?}", sandbox.id.as_str()),
        why: format!(
            "containers in it have lost their connections, and containerd at {} did not report within {} s whether it still has \
             their tasks{last}; try again",
            containerd.display(),
            LIMIT.as_secs()
        ),
    }
}
