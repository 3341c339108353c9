//! Resource use, measured within a limit: containerd asks for that of all pods at once, and one that cannot tell must not hold up the rest.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::FutureExt;
use tokio::{spawn, time::timeout};

use crate::error::{Error, Result};

/// How long a measurement may take. One that takes longer goes on, and its result is the next answer. A little more than what a backend
/// allows whatever it asks, so that its error, which says more, comes first.
pub(crate) const LIMIT: Duration = Duration::from_millis(2500);

/// What was measured last. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Meter<T>(Arc<Mutex<Measured<T>>>);

#[derive(Debug)]
struct Measured<T> {
    last: Option<T>,
    /// Measurements beyond the limit that go on.
    stuck: usize,
}

impl<T> Default for Meter<T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Measured { last: None, stuck: 0 })))
    }
}

impl<T: Clone + Send + 'static> Meter<T> {
    fn measured(&self) -> MutexGuard<'_, Measured<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Measures by `work`. When that fails, or takes too long, the answer is what was measured last; as long as it is stuck, at once.
    ///
    /// # Errors
    /// What `work` says, or [`Error::Unavailable`], when nothing was measured before.
    pub(crate) async fn read(&self, of: String, work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
        if self.measured().stuck > 0 {
            return self.last(|| slow(of));
        }
        let mut work = spawn(work.boxed());
        let Ok(done) = timeout(LIMIT, &mut work).await else {
            self.measured().stuck += 1;
            let meter = self.clone();
            spawn(async move {
                let late = work.await;
                let mut measured = meter.measured();
                measured.stuck -= 1;
                if let Ok(Ok(late)) = late {
                    measured.last = Some(late);
                }
            });
            return self.last(|| slow(of));
        };
        match done.map_err(Error::failed("measure it")).and_then(|done| done) {
            Ok(now) => {
                self.measured().last = Some(now.clone());
                Ok(now)
            }
            Err(error @ Error::NotFound { .. }) => Err(error),
            Err(error) => self.last(|| error),
        }
    }

    fn last(&self, error: impl FnOnce() -> Error) -> Result<T> {
        self.measured().last.clone().ok_or_else(error)
    }
}

fn slow(of: String) -> Error {
    Error::Unavailable {
        what: format!("resource use of {of}"),
        why: format!("it takes more than {} s to tell", LIMIT.as_secs_f32()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{sync::oneshot, time::Instant};

    use super::*;

    fn failing(error: Error) -> impl Future<Output = Result<u32>> {
        std::future::ready(Err(error))
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_stuck_costs_its_limit_once_and_the_last_value_stands_in() {
        let meter = Meter::default();
        let of = || "it".to_owned();
        let unknown = || Error::invalid("it", "unknown");
        assert!(matches!(meter.read(of(), failing(unknown())).await, Err(Error::Invalid { .. })));
        assert_eq!(meter.read(of(), async { Ok(1) }).await.unwrap(), 1);
        assert_eq!(meter.read(of(), failing(unknown())).await.unwrap(), 1);
        let gone = Error::NotFound { kind: "container", id: "c".into() };
        assert!(matches!(meter.read(of(), failing(gone)).await, Err(Error::NotFound { .. })));

        let (free, freed) = oneshot::channel::<u32>();
        let before = Instant::now();
        assert_eq!(meter.read(of(), async { Ok(freed.await.unwrap()) }).await.unwrap(), 1);
        assert_eq!(before.elapsed(), LIMIT);
        let before = Instant::now();
        for _ in 0..10 {
            assert_eq!(meter.read(of(), std::future::pending()).await.unwrap(), 1);
        }
        assert_eq!(before.elapsed(), Duration::ZERO);
        // What it says in the end is the last value, and it is asked again.
        free.send(2).unwrap();
        while meter.measured().stuck > 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(meter.read(of(), failing(unknown())).await.unwrap(), 2);
        let never = Meter::<u32>::default().read(of(), std::future::pending()).await;
        assert!(matches!(never, Err(Error::Unavailable { .. })), "{never:?}");
    }
}
