//! Calls in flight: where they run, what happens when they panic, and what a shutdown waits for.
//!
//! The faces (gRPC, ttrpc) only translate. The work of a call runs as a task of its own on the workers' runtime, so that a client
//! that goes away, or a deadline that passes, never stops an operation half way. Waiting for an exit is the exception:
//! it changes nothing, may last for weeks, ends with its client, and does not hold a shutdown up.

use std::{
    collections::BTreeMap,
    fmt::Display,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::FutureExt;
use kuasar_sandboxers::{Error, Result};
use tokio::{runtime::Handle, sync::Notify};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, debug, debug_span, error, warn};

/// Between two lines of the log about calls whose clients have gone.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs calls. Clones share one table.
#[derive(Clone, Debug)]
pub struct Calls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    workers: Handle,
    tracker: TaskTracker,
    stopping: CancellationToken,
    /// Cancelled by the end of [`Calls::wait_unless_stopped`].
    parting: CancellationToken,
    begun: Notify,
    running: Mutex<Running>,
    unanswered: Lines,
}

#[derive(Debug, Default)]
struct Running {
    last: u64,
    calls: BTreeMap<u64, Call>,
}

#[derive(Debug)]
struct Call {
    name: &'static str,
    subject: String,
    since: Instant,
}

/// Takes a call off the table, however it ended.
struct Entry {
    inner: Arc<Inner>,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.inner.table().calls.remove(&self.number);
    }
}

/// Somebody who waits for the answer of a call.
struct Asking<'a> {
    inner: &'a Inner,
    name: &'static str,
    subject: &'a str,
    since: Instant,
    answered: bool,
}

impl Asking<'_> {
    fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if self.answered || self.inner.stopping.is_cancelled() {
            return;
        }
        // ttrpc's own line for it does not say whom it is about.
        let seconds = self.since.elapsed().as_secs_f32();
        let Self { name, subject, .. } = self;
        match self.inner.unanswered.admit() {
            Some(0) => warn!(name, subject, seconds, "the client did not wait for the end of a call, which goes on"),
            Some(untold) => warn!(name, subject, seconds, untold, "clients did not wait for the end of calls, which go on"),
            None => debug!(name, subject, seconds, "the client did not wait for the end of a call, which goes on"),
        }
    }
}

/// Lets one line pass per [`PAUSE`]: a guest that hangs may cause as many as there are calls.
#[derive(Debug, Default)]
struct Lines(Mutex<(Option<Instant>, u64)>);

impl Lines {
    /// Whether the line may be written; with the number of those before it that were not.
    fn admit(&self) -> Option<u64> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.0.is_some_and(|last| last.elapsed() < PAUSE) {
            lines.1 += 1;
            return None;
        }
        lines.0 = Some(Instant::now());
        Some(std::mem::take(&mut lines.1))
    }
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, name: &'static str, subject: String) -> Entry {
        let mut table = self.table();
        table.last += 1;
        let number = table.last;
        table.calls.insert(number, Call { name, subject, since: Instant::now() });
        Entry { inner: Arc::clone(self), number }
    }
}

fn stopping() -> Error {
    Error::Unavailable { what: "kuasard".into(), why: "it is stopping; repeat the call when it runs again".into() }
}

impl Calls {
    /// A table whose calls run on the given runtime.
    #[must_use]
    pub fn new(workers: Handle) -> Self {
        Self(Arc::new(Inner {
            workers,
            tracker: TaskTracker::new(),
            stopping: CancellationToken::new(),
            parting: CancellationToken::new(),
            begun: Notify::new(),
            running: Mutex::default(),
            unanswered: Lines::default(),
        }))
    }

    /// Runs an operation to its end, whatever becomes of the caller, and gives its result.
    ///
    /// # Errors
    /// The operation's own error; [`Error::Unavailable`] during a shutdown; [`Error::Failed`] when it panicked.
    pub async fn run<T, W>(&self, name: &'static str, subject: impl Display, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        if self.0.stopping.is_cancelled() {
            return Err(stopping());
        }
        let subject = subject.to_string();
        let asking = Asking { inner: &self.0, name, subject: &subject, since: Instant::now(), answered: false };
        let span = debug_span!("call", name, subject);
        let entry = self.0.enter(name, subject.clone());
        self.0.begun.notify_one();
        let work = async move {
            let result = work.await;
            drop(entry);
            result
        };
        // The text of a task, some kilobytes, is there for each type of work that is spawned.
        let task = self.0.tracker.spawn_on(work.boxed().instrument(span), &self.0.workers);
        let result = task.await.unwrap_or_else(|broken| {
            // The panic hook has logged where.
            error!(name, subject, %broken, "a call panicked");
            Err(defect(name))
        });
        asking.answered();
        note(name, &subject, &result);
        result
    }

    /// Waits for something that may take for ever. Ends only with its caller: containerd takes a failed wait for the exit.
    ///
    /// # Errors
    /// The work's own error; [`Error::Failed`] when it panicked.
    pub async fn wait<T>(&self, name: &'static str, subject: &str, work: impl Future<Output = Result<T>> + Send) -> Result<T> {
        let result = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|_| {
            error!(name, subject, "a call panicked");
            Err(defect(name))
        });
        note(name, subject, &result);
        result
    }

    /// Like [`Calls::wait`], for clients that ask again: ends with [`Calls::part`] and [`Calls::stop`], too.
    ///
    /// # Errors
    /// As [`Calls::wait`], and [`Error::Unavailable`] then.
    pub async fn wait_unless_stopped<T>(
        &self,
        name: &'static str,
        subject: &str,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        tokio::select! {
            result = self.wait(name, subject, work) => result,
            () = self.0.parting.cancelled() => Err(stopping()),
        }
    }

    /// Resolves with [`Calls::part`] and [`Calls::stop`].
    pub fn parted(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        self.0.parting.clone().cancelled_owned()
    }

    /// Resolves when a call has begun since the last time.
    pub async fn begun(&self) {
        self.0.begun.notified().await;
    }

    /// Refuses calls from now on.
    pub fn stop(&self) {
        self.0.stopping.cancel();
        self.part();
    }

    /// Ends waits of clients that ask again. Calls that come are still run; before [`Calls::drain`] there must be none any more.
    pub fn part(&self) {
        self.0.parting.cancel();
        self.0.tracker.close();
    }

    /// After [`Calls::stop`] or [`Calls::part`]: lets what runs finish, and says what did not within the limit, one line for each.
    pub async fn drain(&self, limit: Duration) -> Vec<String> {
        if tokio::time::timeout(limit, self.0.tracker.wait()).await.is_ok() {
            return Vec::new();
        }
        let table = self.0.table();
        table
            .calls
            .values()
            .map(|call| format!("{} {} for {:.1} s", call.name, call.subject, call.since.elapsed().as_secs_f32()))
            .collect()
    }
}

fn defect(name: &str) -> Error {
    Error::failed(format!("answer {name}"))("a defect in kuasard; its log says where")
}

fn note<T>(name: &'static str, subject: &str, result: &Result<T>) {
    if let Err(error) = result {
        debug!(name, subject, error = error.report(), "call failed");
    }
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;
    use tokio::sync::oneshot;

    use super::*;

    fn calls() -> Calls {
        Calls::new(Handle::current())
    }

    #[tokio::test]
    async fn an_operation_outlives_its_caller() {
        let calls = calls();
        let (go, gate) = oneshot::channel::<()>();
        let (done, outcome) = oneshot::channel();
        let work = async move {
            gate.await.map_err(Error::failed("wait"))?;
            done.send(7).map_err(|_| Error::invalid("test", "nobody listens"))
        };
        let caller = tokio::spawn({
            let calls = calls.clone();
            async move { calls.run("Test", "x", work).await }
        });
        while calls.0.table().calls.is_empty() {
            tokio::task::yield_now().await;
        }
        caller.abort();
        assert!(caller.await.unwrap_err().is_cancelled());
        go.send(()).unwrap();
        assert_eq!(outcome.await, Ok(7));
    }

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let calls = calls();
        let broken: Result<()> = calls.run("Test", "x", async { panic!("on purpose") }).await;
        assert_eq!(broken.unwrap_err().code(), Code::Internal);
        let broken: Result<()> = calls.wait("Test", "x", async { panic!("on purpose") }).await;
        assert_eq!(broken.unwrap_err().code(), Code::Internal);
        assert!(calls.0.table().calls.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_shutdown_waits_for_work_but_not_for_waits() {
        let calls = calls();
        let waiting = tokio::spawn({
            let calls = calls.clone();
            async move { calls.wait_unless_stopped("Wait", "x", std::future::pending::<Result<()>>()).await }
        });
        let stuck = tokio::spawn({
            let calls = calls.clone();
            async move { calls.run("Start", "pod", std::future::pending::<Result<()>>()).await }
        });
        while calls.0.table().calls.is_empty() {
            tokio::task::yield_now().await;
        }
        calls.stop();
        assert_eq!(waiting.await.unwrap().unwrap_err().code(), Code::Unavailable);
        let late: Result<()> = calls.run("Start", "late", async { Ok(()) }).await;
        assert_eq!(late.unwrap_err().code(), Code::Unavailable);
        let left = calls.drain(Duration::from_secs(3)).await;
        assert_eq!(left.len(), 1);
        assert!(left[0].starts_with("Start pod for"), "{left:?}");
        stuck.abort();
    }

    #[test]
    fn lines_are_few_and_count_the_others() {
        let lines = Lines::default();
        assert_eq!((lines.admit(), lines.admit(), lines.admit()), (Some(0), None, None));
        lines.0.lock().unwrap().0 = None;
        assert_eq!((lines.admit(), lines.admit()), (Some(2), None));
    }
}
