//! Events of one sandbox until containerd has them. They are saved with the sandbox's state, so what a daemon could not send, the next one does.
//!
//! Only a few are with the publisher at a time. What a pod causes while containerd is away therefore waits, and in the end is dropped, here:
//! it takes no room from events of other pods.

use std::collections::VecDeque;

use tracing::warn;

use crate::{
    event::{Event, EventKind},
    id::ContainerId,
};

/// Events that are kept.
const KEPT: usize = 256;
/// Events that are with the publisher at a time.
const ON_THE_WAY: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct Outbox {
    last: u64,
    events: VecDeque<Outgoing>,
    /// More came than are kept.
    overflowed: bool,
}

#[derive(Debug)]
struct Outgoing {
    number: u64,
    event: Event,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// What it tells of is not saved yet.
    Kept,
    Ready,
    OnTheWay,
}

impl Outbox {
    /// Keeps an event; gives its number.
    pub(crate) fn keep(&mut self, event: Event) -> u64 {
        if self.events.len() == KEPT {
            if !std::mem::replace(&mut self.overflowed, true) {
                warn!(kept = KEPT, "containerd takes no events; the oldest of this sandbox are dropped from now on");
            }
            // containerd learns exits by Task.Wait too, but out-of-memory kills by their events alone.
            // What is on the way stays: another would go in its place, and the publisher's queue would grow without end.
            let waits = |kept: &Outgoing| kept.stage != Stage::OnTheWay;
            let droppable = |kept: &Outgoing| waits(kept) && kept.event.kind != EventKind::OutOfMemory;
            let first = self.events.iter().position(droppable).or_else(|| self.events.iter().position(waits));
            // There is one: fewer are on the way than are kept.
            first.map(|first| self.events.remove(first));
        }
        self.last += 1;
        self.events.push_back(Outgoing { number: self.last, event, stage: Stage::Kept });
        self.last
    }

    /// From now on the event may be sent.
    pub(crate) fn release(&mut self, number: u64) {
        if let Some(kept) = self.events.iter_mut().find(|kept| kept.number == number) {
            kept.stage = Stage::Ready;
        }
    }

    /// What is to be sent now, in order.
    pub(crate) fn due(&mut self) -> Vec<(u64, Event)> {
        let busy = self.events.iter().filter(|kept| kept.stage == Stage::OnTheWay).count();
        let ready = self.events.iter_mut().filter(|kept| kept.stage == Stage::Ready);
        let due = ready.take(ON_THE_WAY.saturating_sub(busy));
        due.map(|kept| {
            kept.stage = Stage::OnTheWay;
            (kept.number, kept.event.clone())
        })
        .collect()
    }

    /// What has not been sent, when this ends.
    pub(crate) fn rest(&mut self) -> Vec<Event> {
        let rest = std::mem::take(&mut self.events).into_iter().filter(|kept| kept.stage != Stage::OnTheWay);
        rest.map(|kept| kept.event).collect()
    }

    /// The event is dealt with.
    pub(crate) fn remove(&mut self, number: u64) {
        self.events.retain(|kept| kept.number != number);
        self.overflowed &= !self.events.is_empty();
    }

    /// All that are kept, in order.
    pub(crate) fn events(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().map(|kept| &kept.event)
    }

    /// Whether one that tells of an out-of-memory kill in the container waits.
    pub(crate) fn tells_out_of_memory(&self, container: &ContainerId) -> bool {
        self.events().any(|event| event.kind == EventKind::OutOfMemory && event.container == *container)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(container: &str, kind: EventKind) -> Event {
        Event::now(&"test".parse().unwrap(), &container.parse().unwrap(), kind)
    }

    #[test]
    fn a_few_are_on_the_way_and_in_order() {
        let mut outbox = Outbox::default();
        let numbers: Vec<_> = (0..40).map(|pid| outbox.keep(event("c", EventKind::Started { pid }))).collect();
        assert!(outbox.due().is_empty(), "none is released");
        numbers.iter().for_each(|number| outbox.release(*number));
        let first: Vec<_> = outbox.due().into_iter().map(|(number, _)| number).collect();
        assert_eq!(first, numbers[..ON_THE_WAY]);
        assert!(outbox.due().is_empty());
        outbox.remove(numbers[0]);
        outbox.remove(numbers[1]);
        let next: Vec<_> = outbox.due().into_iter().map(|(number, _)| number).collect();
        assert_eq!(next, numbers[ON_THE_WAY..ON_THE_WAY + 2]);
        assert_eq!(outbox.events().count(), 38);
        assert_eq!(outbox.rest().len(), 38 - ON_THE_WAY);
    }

    #[test]
    fn what_is_dropped_is_no_kill_and_bounded() {
        let mut outbox = Outbox::default();
        outbox.keep(event("greedy", EventKind::OutOfMemory));
        for pid in 0..2 * KEPT as u32 {
            outbox.keep(event("c", EventKind::Started { pid }));
        }
        assert_eq!(outbox.events().count(), KEPT);
        assert!(outbox.tells_out_of_memory(&"greedy".parse().unwrap()));
        assert!(!outbox.tells_out_of_memory(&"c".parse().unwrap()));
    }

    #[test]
    fn who_takes_nothing_is_sent_a_few() {
        let mut outbox = Outbox::default();
        let mut sent = 0;
        for pid in 0..3 * KEPT as u32 {
            let number = outbox.keep(event("c", EventKind::Started { pid }));
            outbox.release(number);
            sent += outbox.due().len();
        }
        assert_eq!((sent, outbox.events().count()), (ON_THE_WAY, KEPT));
    }
}
