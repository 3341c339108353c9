//! Lanes: what is under way for one process, or for the sandbox itself, and what waits for that.
//!
//! ```text
//!  work       start, pause, update, exec, resize …   one at a time, in the order they came
//!  signals    kill                                   likewise, and beside work: a stuck runtime must not hold a stop up
//!  removal    delete                                 closes both lanes of each process it removes: nothing is begun any more,
//!                                                    what runs ends first, what waits is answered after it
//! ```

use std::collections::VecDeque;

use crate::{
    id::ContainerId,
    owner::{Call, Key, Owner},
};

/// Operations that wait for each other.
#[derive(Default)]
pub(crate) struct Lane {
    busy: bool,
    /// What it belongs to is being removed.
    closed: bool,
    queue: VecDeque<Call>,
}

impl Lane {
    /// Whether no job runs in it.
    pub(crate) fn is_idle(&self) -> bool {
        !self.busy
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// What waits in it, when it goes with what it belongs to.
    pub(crate) fn into_queue(self) -> VecDeque<Call> {
        self.queue
    }
}

/// Which lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Track {
    /// The sandbox's own.
    Sandbox,
    /// A process's.
    Work(Key),
    /// The one for its signals.
    Signals(Key),
}

impl Track {
    pub(crate) fn work(key: &Key) -> Self {
        Self::Work(key.clone())
    }
}

/// What is removed together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The sandbox with all its containers.
    Sandbox,
    /// A container with all its execs, or one exec.
    Process(Key),
}

impl Owner {
    pub(crate) fn lane(&mut self, track: &Track) -> Option<&mut Lane> {
        match track {
            Track::Sandbox => Some(&mut self.lane),
            Track::Work(key) => self.process(key).ok().map(|process| &mut process.lane),
            Track::Signals(key) => self.process(key).ok().map(|process| &mut process.signals),
        }
    }

    /// Runs `call` when nothing runs in the lane and it is not closed, now if that is so. Unknown processes have no lane: `call` runs at
    /// once and finds that out, after another attempt to recover them where that is what they lack.
    pub(crate) fn in_turn(&mut self, track: &Track, call: impl FnOnce(&mut Self) + Send + 'static) {
        let Some(call) = self.await_recovery(track, Box::new(call)) else { return };
        match self.lane(track) {
            Some(lane) if lane.busy || lane.closed => lane.queue.push_back(call),
            _ => call(self),
        }
    }

    pub(crate) fn occupy(&mut self, track: &Track, busy: bool) {
        if let Some(lane) = self.lane(track) {
            lane.busy = busy;
        }
    }

    /// Runs what waits in a lane. Each call may make it busy again, and the rest goes on waiting; or remove it, and then the rest has been
    /// run by that.
    pub(crate) fn advance(&mut self, track: &Track) {
        while let Some(call) =
            self.lane(track).filter(|lane| !lane.busy && !lane.closed).and_then(|lane| lane.queue.pop_front())
        {
            call(self);
        }
    }

    /// Everything that a removal of `scope` removes.
    fn tracks(&self, scope: &Scope) -> Vec<Track> {
        let mut keys: Vec<Key> = Vec::new();
        let mut add = |id: &ContainerId| {
            let execs = self.containers.get(id).into_iter().flat_map(|entry| entry.execs.keys());
            keys.extend(execs.map(|exec| (id.clone(), Some(exec.clone()))).chain([(id.clone(), None)]));
        };
        match scope {
            Scope::Sandbox => self.containers.keys().for_each(&mut add),
            Scope::Process((id, None)) => add(id),
            Scope::Process(exec) => keys.push(exec.clone()),
        }
        let own = (*scope == Scope::Sandbox).then_some(Track::Sandbox);
        let both = |key: Key| [Track::Work(key.clone()), Track::Signals(key)];
        own.into_iter().chain(keys.into_iter().flat_map(both)).collect()
    }

    /// Begins nothing any more in what is to be removed.
    pub(crate) fn close(&mut self, scope: &Scope) {
        self.set_closed(scope, true);
    }

    /// After a removal that failed: goes on with what waits.
    pub(crate) fn reopen(&mut self, scope: &Scope) {
        self.set_closed(scope, false);
        for track in self.tracks(scope) {
            self.advance(&track);
        }
    }

    fn set_closed(&mut self, scope: &Scope, closed: bool) {
        for track in self.tracks(scope) {
            if let Some(lane) = self.lane(&track) {
                lane.closed = closed;
            }
        }
    }

    /// Whether no job runs in any lane of it.
    pub(crate) fn is_quiet(&mut self, scope: &Scope) -> bool {
        let making = *scope == Scope::Sandbox && self.creating > 0;
        !making && self.tracks(scope).iter().all(|track| self.lane(track).is_none_or(|lane| lane.is_idle()))
    }

    /// Runs `call` once no job runs in any lane of `scope`.
    pub(crate) fn when_quiet(&mut self, scope: Scope, call: impl FnOnce(&mut Self) + Send + 'static) {
        self.draining.push((scope, Box::new(call)));
    }

    /// What waits for quiet that has come.
    pub(crate) fn quieted(&mut self) -> Option<Call> {
        let scopes: Vec<Scope> = self.draining.iter().map(|(scope, _)| scope.clone()).collect();
        let at = scopes.iter().position(|scope| self.is_quiet(scope))?;
        Some(self.draining.remove(at).1)
    }
}
