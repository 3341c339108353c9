//! What happens in the guest without the host having asked, until the host has noted it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kuasar_guest_protocol::agent::{EventsResponse, events_response};
use kuasar_sandboxers::event::{Notice, Noticed, Notices};
use protobuf::EnumOrUnknown;
use tokio::sync::Notify;

/// How many are told at a time.
const TOLD: usize = 64;

/// Events that the host has not noted: one for a container at most.
#[derive(Clone, Debug, Default)]
pub(crate) struct Events(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    kept: Mutex<Kept>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Kept {
    last: u64,
    events: VecDeque<events_response::Event>,
    /// Out-of-memory kills of each container that had some.
    kills: BTreeMap<String, u64>,
}

impl Events {
    /// Where what the containers' backend notices is kept as events.
    pub(crate) fn notices(&self) -> Notices {
        let events = self.clone();
        Notices::to(move |Noticed { container, notice: Notice::OutOfMemory { kills }, kept }| {
            events.out_of_memory(container.as_str(), kills);
            drop(kept);
        })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn out_of_memory(&self, container: &str, kills: Option<u64>) {
        let mut kept = self.kept();
        let counted = kept.kills.entry(container.into()).or_default();
        *counted = kills.unwrap_or(*counted + 1).max(*counted);
        let oom_kills = *counted;
        kept.last += 1;
        let event = events_response::Event {
            number: kept.last,
            container: container.into(),
            kind: EnumOrUnknown::new(events_response::event::Kind::OUT_OF_MEMORY),
            oom_kills,
            ..Default::default()
        };
        // The later one says all that the earlier one does.
        kept.events.retain(|earlier| earlier.container != container);
        kept.events.push_back(event);
        drop(kept);
        self.0.news.notify_waiters();
    }

    /// How many processes of a container were killed because memory ran out.
    pub(crate) fn kills(&self, container: &str) -> u64 {
        self.kept().kills.get(container).copied().unwrap_or(0)
    }

    /// The container is gone: its events are of no use any more.
    pub(crate) fn forget(&self, container: &str) {
        let mut kept = self.kept();
        kept.kills.remove(container);
        kept.events.retain(|event| event.container != container);
    }

    /// Waits for events after that number, and forgets those up to it.
    pub(crate) async fn after(&self, number: u64) -> EventsResponse {
        loop {
            let mut news = std::pin::pin!(self.0.news.notified());
            news.as_mut().enable();
            {
                let mut kept = self.kept();
                kept.events.retain(|event| event.number > number);
                if !kept.events.is_empty() {
                    let events = kept.events.iter().take(TOLD).cloned().collect();
                    return EventsResponse { events, ..Default::default() };
                }
            }
            news.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn told_until_noted_and_one_for_each_container() {
        let events = Events::default();
        assert!(events.after(0).now_or_never().is_none());
        let waiting = tokio::spawn({
            let events = events.clone();
            async move { events.after(0).await }
        });
        tokio::task::yield_now().await;
        let report = |container: &str, kills| {
            let saved = events.notices().report(&container.parse().unwrap(), Notice::OutOfMemory { kills });
            assert!(saved.now_or_never().is_some(), "its reporter waits for no host");
        };
        report("c", Some(1));
        assert_eq!(waiting.await.map(|told| told.events.len()).ok(), Some(1));
        assert_eq!(events.after(0).await.events[0].number, 1);
        assert!(events.after(1).now_or_never().is_none());
        for kills in 2..=50 {
            report("c", Some(kills));
        }
        report("d", None);
        let told = events.after(1).await.events;
        let told: Vec<_> = told.iter().map(|event| (event.container.as_str(), event.oom_kills)).collect();
        assert_eq!(told, [("c", 50), ("d", 1)]);
        assert_eq!(events.kills("c"), 50);
        events.forget("c");
        assert_eq!((events.kills("c"), events.after(1).await.events.len()), (0, 1));
    }
}
