//! One operation at a time for each thing that has a name.

use std::{
    collections::HashMap,
    fmt::Display,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use kuasar_sandboxers::{Error, Result};
use tokio::sync::OwnedMutexGuard;

/// Things by their names. Whoever makes, changes or removes one takes its [`Turn`] first, so that a call that is repeated while its
/// first run goes on waits for that.
#[derive(Debug)]
pub(crate) struct Lanes<K, V> {
    lanes: Mutex<HashMap<K, Arc<Lane<V>>>>,
    limit: usize,
    /// What the things are, for errors.
    kind: &'static str,
}

#[derive(Debug)]
struct Lane<V> {
    turn: Arc<tokio::sync::Mutex<()>>,
    value: Mutex<Option<Arc<V>>>,
}

/// The right to make, change or remove one thing.
#[derive(Debug)]
pub(crate) struct Turn<'a, K: Hash + Eq, V> {
    lanes: &'a Lanes<K, V>,
    key: K,
    lane: Arc<Lane<V>>,
    _guard: OwnedMutexGuard<()>,
}

impl<K: Clone + Display + Hash + Eq, V> Lanes<K, V> {
    /// None yet, and at most `limit` of them.
    pub(crate) fn new(kind: &'static str, limit: usize) -> Self {
        Self { lanes: Mutex::default(), limit, kind }
    }

    /// Waits for the turn of one thing, whether it exists or not.
    pub(crate) async fn turn(&self, key: &K) -> Result<Turn<'_, K, V>> {
        loop {
            let lane = self.lane(key)?;
            let guard = lane.turn.clone().lock_owned().await;
            // Whoever had the turn before may have removed it.
            if locked(&self.lanes).get(key).is_some_and(|known| Arc::ptr_eq(known, &lane)) {
                return Ok(Turn { lanes: self, key: key.clone(), lane, _guard: guard });
            }
        }
    }

    fn lane(&self, key: &K) -> Result<Arc<Lane<V>>> {
        let mut lanes = locked(&self.lanes);
        if let Some(lane) = lanes.get(key) {
            return Ok(lane.clone());
        }
        if lanes.len() >= self.limit {
            let why = format!("there are {} already, which is the most; delete some", self.limit);
            return Err(Error::Unavailable { what: format!("another {}", self.kind), why });
        }
        let lane = Arc::new(Lane { turn: Arc::default(), value: Mutex::default() });
        lanes.insert(key.clone(), lane.clone());
        Ok(lane)
    }

    /// One that exists.
    pub(crate) fn find(&self, key: &K) -> Result<Arc<V>> {
        let lane = locked(&self.lanes).get(key).cloned();
        lane.and_then(|lane| locked(&lane.value).clone())
            .ok_or_else(|| Error::NotFound { kind: self.kind, id: key.to_string() })
    }

    /// Those that exist.
    pub(crate) fn names(&self) -> Vec<K> {
        locked(&self.lanes).keys().cloned().collect()
    }
}

impl<K: Hash + Eq, V> Turn<'_, K, V> {
    /// The thing, if it exists.
    pub(crate) fn value(&self) -> Option<Arc<V>> {
        locked(&self.lane.value).clone()
    }

    /// Makes it known, or forgets it.
    pub(crate) fn set(&self, value: Option<Arc<V>>) {
        *locked(&self.lane.value) = value;
    }
}

impl<K: Hash + Eq, V> Drop for Turn<'_, K, V> {
    fn drop(&mut self) {
        let mut lanes = locked(&self.lanes.lanes);
        if locked(&self.lane.value).is_none() {
            lanes.remove(&self.key);
        }
    }
}

/// Every change under these locks is complete before anything can panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn one_at_a_time_and_none_is_left_behind() {
        let lanes: Lanes<String, u32> = Lanes::new("thing", 1);
        let key = "a".to_owned();
        let first = lanes.turn(&key).await.unwrap();
        assert!(lanes.turn(&"b".to_owned()).now_or_never().unwrap().is_err(), "the limit counts");
        let mut second = Box::pin(lanes.turn(&key));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        let second = second.await.unwrap();
        assert!(matches!(lanes.find(&key), Err(Error::NotFound { .. })));
        second.set(Some(Arc::new(7)));
        drop(second);
        assert_eq!(*lanes.find(&key).unwrap(), 7);
        lanes.turn(&key).await.unwrap().set(None);
        assert!(lanes.names().is_empty());
    }
}
