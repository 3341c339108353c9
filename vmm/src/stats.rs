//! Resource use of containers, as their guest tells it: in time, whatever the guest does.
//!
//! containerd asks for all containers of the node one after another. So a guest that does not answer costs a moment once: until it answers
//! again, the last numbers that are known stand.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
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
pub(crate) struct KnownStats {
    all: Mutex<HashMap<String, Stats>>,
    /// The last answer took longer than [`PATIENCE`]. That is the guest's fault, whichever container it is asked about.
    slow: AtomicBool,
    /// And it was no number.
    failing: AtomicBool,
}

impl KnownStats {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Stats>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long to wait for an answer about a container.
    fn patience(&self, is_known: bool) -> Duration {
        match (self.slow.load(Ordering::Relaxed), is_known) {
            (true, true) => Duration::ZERO,
            (false, true) => PATIENCE,
            (true, false) if self.failing.load(Ordering::Relaxed) => Duration::ZERO,
            // The call has a limit of its own.
            (_, false) => Duration::MAX,
        }
    }

    fn note(&self, took: Duration, failed: bool) {
        self.slow.store(took > PATIENCE, Ordering::Relaxed);
        self.failing.store(failed, Ordering::Relaxed);
    }

    /// An answer has not come within [`PATIENCE`]. Until one comes no other call waits: the guest is taken for silent only later.
    fn note_late(&self) {
        self.slow.store(true, Ordering::Relaxed);
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
        let patience = self.known_stats().patience(known.is_some());
        let (guest, name) = (self.clone(), container.to_owned());
        // It goes on when nobody waits any more: the numbers are for the next who asks.
        let asked = async move {
            let begun = Instant::now();
            let answer = guest.ask_for_stats(name).await;
            guest.known_stats().note(begun.elapsed(), answer.is_err());
            answer
        };
        let asked = tokio::spawn(asked.in_current_span());
        match (timeout(patience, asked).await, known) {
            (Ok(answered), known) => match (answered.map_err(Error::failed("ask for resource use"))?, known) {
                (Err(_), Some(known)) if self.agent().is_silent() => Ok(known),
                (answer, _) => answer,
            },
            (Err(_), Some(known)) => {
                self.known_stats().note_late();
                Ok(known)
            }
            (Err(_), None) => Err(Error::Unavailable {
                what: format!("resource use of container {container}"),
                why: "its guest does not answer in time; ask again later".into(),
            }),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_late_once_is_waited_for_no_more() {
        let known = KnownStats::default();
        assert_eq!((known.patience(true), known.patience(false)), (PATIENCE, Duration::MAX));
        // An error, however it comes, is no number for the next time.
        known.note(PATIENCE * 2, true);
        assert_eq!((known.patience(true), known.patience(false)), (Duration::ZERO, Duration::ZERO));
        known.note(PATIENCE * 2, false);
        assert_eq!((known.patience(true), known.patience(false)), (Duration::ZERO, Duration::MAX));
        known.note(Duration::ZERO, false);
        assert_eq!((known.patience(true), known.patience(false)), (PATIENCE, Duration::MAX));
        // The answer is still to come.
        known.note_late();
        assert_eq!((known.patience(true), known.patience(false)), (Duration::ZERO, Duration::MAX));
    }
}
