//! Waiting for a condition, with a deadline.

use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at again.
const INTERVAL: Duration = Duration::from_millis(10);

/// Polls `condition` until it yields a value. `Ok(None)` means "not yet", an error ends the wait at once.
///
/// # Errors
/// The condition's own error, or one that names `what` when `deadline` has passed.
pub async fn until<T, F, Fut>(what: &str, deadline: Duration, mut condition: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<Option<T>>>,
{
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition().await? {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("waited {} s in vain for {what}", deadline.as_secs_f32());
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// The same for a condition that does not block, usable where no runtime is (in `Drop`).
///
/// Returns whether the condition came true in time.
pub fn until_sync(deadline: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + deadline;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(INTERVAL);
    }
}
