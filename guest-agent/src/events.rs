//! What happens in the guest without the host having asked, until the host has noted it.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use kuasar_guest_protocol::agent::{EventsResponse, events_response};
use kuasar_sandboxers::event::{EventKind, EventSink, Sent};
use protobuf::EnumOrUnknown;
use tokio::sync::{Notify, mpsc::UnboundedReceiver};

/// How many are kept at most; the oldest are given up first.
const KEPT: usize = 1024;

/// How many are told at a time.
const TOLD: usize = 64;

/// Events that the host has not noted.
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
}

impl Events {
    /// Collects what is sent to the sink that comes along.
    pub(crate) fn collect() -> (Self, EventSink) {
        let events = Self::default();
        let (sink, receiver) = EventSink::channel();
        tokio::spawn(events.clone().take(receiver));
        (events, sink)
    }

    async fn take(self, mut receiver: UnboundedReceiver<Sent>) {
        while let Some(sent) = receiver.recv().await {
            // The others are answers to what the host asks.
            if sent.event.kind == EventKind::OutOfMemory {
                self.add(sent.event.container.as_str(), events_response::event::Kind::OUT_OF_MEMORY);
            }
            sent.delivered();
        }
    }

    fn add(&self, container: &str, kind: events_response::event::Kind) {
        let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.last += 1;
        let event = events_response::Event {
            number: kept.last,
            container: container.into(),
            kind: EnumOrUnknown::new(kind),
            ..Default::default()
        };
        if kept.events.len() == KEPT {
            kept.events.pop_front();
        }
        kept.events.push_back(event);
        drop(kept);
        self.0.news.notify_waiters();
    }

    /// Waits for events after that number, and forgets those up to it.
    pub(crate) async fn after(&self, number: u64) -> EventsResponse {
        loop {
            let mut news = std::pin::pin!(self.0.news.notified());
            news.as_mut().enable();
            {
                let mut kept = self.0.kept.lock().unwrap_or_else(PoisonError::into_inner);
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
    use events_response::event::Kind;
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn told_until_noted_and_bounded() {
        let events = Events::default();
        assert!(events.after(0).now_or_never().is_none());
        let waiting = tokio::spawn({
            let events = events.clone();
            async move { events.after(0).await }
        });
        tokio::task::yield_now().await;
        events.add("c", Kind::OUT_OF_MEMORY);
        assert_eq!(waiting.await.map(|told| told.events.len()).ok(), Some(1));
        assert_eq!(events.after(0).await.events[0].number, 1);
        assert!(events.after(1).now_or_never().is_none());
        for _ in 0..2 * KEPT {
            events.add("c", Kind::OUT_OF_MEMORY);
        }
        let told = events.after(1).await;
        assert_eq!((told.events.len(), told.events[0].number), (TOLD, 2 * KEPT as u64 + 2 - KEPT as u64));
    }
}
