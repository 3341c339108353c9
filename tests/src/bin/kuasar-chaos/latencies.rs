//! How long calls take, in healthy phases and beside what does not answer, and how the two compare.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use tonic::Status;

use crate::ledger::Call;

/// By how much the 99th percentile of a call may be slower while others' volumes hang and guests are stuck.
pub(crate) const SLOWER: Duration = Duration::from_millis(100);

/// How long calls took, of phases of one kind together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Latencies(BTreeMap<Call, Vec<Duration>>);

impl Latencies {
    /// Makes a call and notes how long it took, whether it succeeded or not.
    pub(crate) async fn measure<T>(&mut self, call: Call, work: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
        let begun = Instant::now();
        let done = work.await;
        self.0.entry(call).or_default().push(begun.elapsed());
        done
    }

    /// Takes over what another client has measured.
    pub(crate) fn merge(&mut self, other: Self) {
        for (call, times) in other.0 {
            self.0.entry(call).or_default().extend(times);
        }
    }

    fn spread(&self, call: Call) -> Spread {
        let mut sorted = self.0.get(&call).cloned().unwrap_or_default();
        sorted.sort();
        // By nearest rank: of 100 samples and more it is not the largest.
        let rank = |percent: usize| {
            let index = (sorted.len() * percent).div_ceil(100).checked_sub(1);
            let time = index.and_then(|index| sorted.get(index)).copied().unwrap_or_default();
            time.as_secs_f64() * 1e3
        };
        Spread { count: sorted.len(), median_ms: rank(50), p99_ms: rank(99), max_ms: rank(100) }
    }

    /// Each call of healthy phases beside the same of disturbed ones.
    pub(crate) fn compare(healthy: &Self, disturbed: &Self) -> BTreeMap<Call, Compared> {
        let calls = healthy.0.keys().filter(|call| disturbed.0.contains_key(call));
        calls.map(|call| (*call, Compared { healthy: healthy.spread(*call), disturbed: disturbed.spread(*call) })).collect()
    }
}

/// How long calls of a kind took, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) count: usize,
    pub(crate) median_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
}

/// A call in healthy phases, and in those with something that does not answer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Compared {
    pub(crate) healthy: Spread,
    pub(crate) disturbed: Spread,
}

impl Compared {
    /// Whether it is slower than it may be.
    pub(crate) fn is_slowed_down(&self) -> bool {
        self.disturbed.p99_ms > self.healthy.p99_ms + SLOWER.as_secs_f64() * 1e3
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(millis: impl Iterator<Item = u64>) -> Latencies {
        Latencies(BTreeMap::from([(Call::ExecSync, millis.map(Duration::from_millis).collect())]))
    }

    #[test]
    fn one_outlier_in_a_hundred_is_none_of_the_percentile() {
        let mut healthy = of((1..=50).rev());
        healthy.merge(of(51..=100));
        let disturbed = of((1..=98).chain([199, 5000]));
        let compared = Latencies::compare(&healthy, &disturbed)[&Call::ExecSync];
        assert_eq!((compared.healthy.count, compared.healthy.p99_ms, compared.healthy.max_ms), (100, 99.0, 100.0));
        assert_eq!((compared.disturbed.p99_ms, compared.is_slowed_down()), (199.0, false));
        let slow = of((1..=98).chain([200, 5000]));
        assert!(Latencies::compare(&healthy, &slow)[&Call::ExecSync].is_slowed_down());
        assert!(Latencies::compare(&healthy, &Latencies::default()).is_empty());
    }
}
