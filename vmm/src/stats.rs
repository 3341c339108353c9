//! Resource use of containers, as their guest tells it: in time, whatever the guest does.
//!
//! containerd asks for all containers of the node one after another. So a guest that does not answer costs a moment once: until it answers
//! again, the last numbers that are known stand.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kuasar_guest_protocol::agent::{ContainerRequest, PidsResponse};
use kuasar_sandboxers::{Error, Result, cgroup::Stats};
use tokio::time::timeout;
use tracing::Instrument;

use crate::guest::Guest;

/// How long to wait for new numbers where there are some. Many guests may be stuck at once.
const PATIENCE: Duration = Duration::from_millis(300);

/// The last numbers of each container of a guest.
#[derive(Debug, Default)]
pub(crate) struct KnownStats(Mutex<HashMap<String, Stats>>);

impl KnownStats {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Stats>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, container: &str) -> Option<Stats> {
        self.all().get(container).cloned()
    }

    /// For a container that goes.
    pub(crate) fn forget(&self, container: &str) {
        self.all().remove(container);
    }
}

impl Guest {
    /// Resource use of a container.
    ///
    /// # Errors
    /// What the guest answers; when it does not answer, and nothing is known from before.
    pub(crate) async fn stats(self: &Arc<Self>, container: &str) -> Result<Stats> {
        let known = self.known_stats().of(container);
        let patience = if known.is_some() { PATIENCE } else { Duration::MAX };
        let (guest, name) = (self.clone(), container.to_owned());
        // It goes on when nobody waits any more: the numbers are for the next who asks.
        let asked = tokio::spawn(async move { guest.ask_for_stats(name).await }.in_current_span());
        match (timeout(patience, asked).await, known) {
            (Ok(answered), known) => match (answered.map_err(Error::failed("ask for resource use"))?, known) {
                (Err(_), Some(known)) if self.agent().is_silent() => Ok(known),
                (answer, _) => answer,
            },
            (Err(_), Some(known)) => Ok(known),
            (Err(late), None) => Err(Error::failed("ask for resource use")(late)),
        }
    }

    async fn ask_for_stats(&self, container: String) -> Result<Stats> {
        let request = ContainerRequest { container: container.clone(), ..ContainerRequest::default() };
        let asked = self
            .agent()
            .call_briefly("ask for resource use", |client, context| async move { client.stats(context, &request).await });
        let answer = self.unless_ended(asked).await?;
        let stats: Stats =
            serde_json::from_slice(&answer.stats).map_err(Error::failed("read the resource use that the guest told"))?;
        self.known_stats().all().insert(container, stats.clone());
        Ok(stats)
    }

    /// The processes of a container; `None` when the guest does not answer.
    ///
    /// # Errors
    /// What it answers.
    pub(crate) async fn processes(&self, request: ContainerRequest) -> Result<Option<PidsResponse>> {
        let asked =
            self.agent().call_briefly("list processes", |client, context| async move { client.pids(context, &request).await });
        match asked.await {
            Err(_) if self.agent().is_silent() => Ok(None),
            listed => listed.map(Some),
        }
    }
}
