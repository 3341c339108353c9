//! How a process in the guest ended, as the guest tells it.

use std::sync::atomic::{AtomicU64, Ordering};

use kuasar_guest_protocol::agent::{ProcessRequest, WaitResponse};
use kuasar_sandboxers::{
    Code, Result,
    cgroup::Stats,
    event::{Notice, Notices},
    process::Ending,
};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::{agent::QUICK, guest::Guest};

/// What the guest tells of the end of a process; `None` when the machine ended first.
pub(crate) async fn exit(guest: &Guest, request: &ProcessRequest) -> Option<WaitResponse> {
    loop {
        let wait = guest.agent().call("wait for a process", None, |client, context| {
            let request = request.clone();
            async move { client.wait(context, &request).await }
        });
        let error = tokio::select! {
            biased;
            waited = wait => match waited {
                Ok(exit) => return Some(exit),
                Err(error) => error,
            },
            _ = guest.ended() => return None,
        };
        if error.code() == Code::NotFound {
            // Nobody can tell any more.
            warn!(container = request.container, exec = request.exec, "the guest does not know the process");
            return Some(WaitResponse { status: 255, ..WaitResponse::default() });
        }
        debug!(error = error.report(), "cannot wait for a process in the guest");
        // The machine ends when its agent is gone for good, so one of the two comes.
        if !guest.agent_is_back().await {
            return None;
        }
    }
}

/// Out-of-memory kills in a container, known when it has ended.
#[derive(Debug, Default)]
pub(crate) struct OomKills(AtomicU64);

impl OomKills {
    /// Reports what the guest tells of a container's first process, before its exit is known to anybody. The events of the guest come by
    /// another call, and may come later.
    pub(crate) async fn report(&self, notices: &Notices, request: &ProcessRequest, exit: Option<&WaitResponse>) {
        let kills = exit.map_or(0, |exit| exit.oom_kills);
        let Ok(container) = request.container.parse() else { return };
        if kills == 0 || !request.exec.is_empty() {
            return;
        }
        self.0.store(kills, Ordering::Relaxed);
        let reported = notices.report(&container, Notice::OutOfMemory { kills: Some(kills) });
        if timeout(QUICK, reported).await.is_err() {
            warn!(%container, "an out-of-memory kill is reported after the exit: the state is not saved");
        }
    }

    /// What the guest measured; of a container that has ended, at least these kills: its guest may be gone, or unable to tell.
    pub(crate) fn or_ended(&self, measured: Result<Stats>, ending: &Ending) -> Result<Stats> {
        match measured {
            Err(_) if ending.known().is_some() => Ok(Stats::ended_v2(self.0.load(Ordering::Relaxed))),
            measured => measured,
        }
    }
}
