//! The guest's agent, as the host talks to it.
//!
//! The guest is hostile. So of what it sends nothing is believed that matters on the host: a call has a time limit, a message ttrpc's limit of
//! 4 MiB, all messages together a [`Budget`], a text a length; and no answer is used as a path.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use kuasar_guest_protocol::{
    PORT, VERSION,
    agent::{HelloRequest, HelloResponse},
    agent_ttrpc::AgentClient,
};
use kuasar_sandboxers::{Code, Error, Result, fdstore::FdStore};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixListener,
    sync::Mutex as AsyncMutex,
    time::{Instant, sleep, timeout, timeout_at},
};
use tracing::{info, warn};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context::{self, Context as Ctx},
};

use crate::{
    dial::{Connection, Dialler},
    spec::VsockAddress,
};

/// How long a call may take that only looks at something or sends a signal. Emulated machines are slow.
pub(crate) const QUICK: Duration = Duration::from_secs(30);

/// How long numbers may take that are asked for of all guests of the node, one after another. A guest that takes longer is silent.
pub(crate) const BRIEF: Duration = Duration::from_secs(2);

/// How long a call may take that starts a program.
pub(crate) const SLOW: Duration = Duration::from_secs(120);

/// By how much a call's limit is shorter than the one that ttrpc is told, which takes a connection for broken when it is over.
const SLACK: Duration = Duration::from_secs(1);

/// How often a guest that boots is tried: vsock tells nobody when somebody begins to listen.
const TRY: Duration = Duration::from_millis(3);

/// How long the first attempt to connect may take. On a busy host one may be neither taken nor refused, when the next one is.
const ATTEMPT: Duration = Duration::from_secs(5);

/// The longest text of the guest's that is kept, in bytes.
const TEXT: usize = 4 << 10;

/// How much the guest may say to calls at once, and in the long run each second, in bytes. The largest answers are diagnostics (256 KiB)
/// and statistics (a few KiB).
const BURST: u64 = 8 << 20;
const RATE: u64 = 1 << 20;

/// The agent of one guest. Connects when it is needed.
#[derive(Debug)]
pub(crate) struct Agent {
    dialler: Dialler,
    budget: Arc<Budget>,
    /// The connection that calls share.
    client: Mutex<Option<Arc<Connected>>>,
    /// Whoever makes it.
    connecting: AsyncMutex<()>,
    /// Its last hello, of an earlier connection perhaps.
    hello: Mutex<Option<Arc<HelloResponse>>>,
    /// It did not answer within [`BRIEF`], and has answered nothing since.
    silent: AtomicBool,
}

struct Connected(AgentClient);

impl std::fmt::Debug for Connected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connected").finish_non_exhaustive()
    }
}

impl Agent {
    pub(crate) fn at(address: VsockAddress, fds: FdStore) -> Self {
        Self {
            dialler: Dialler::new(address, fds),
            budget: Arc::default(),
            client: Mutex::default(),
            connecting: AsyncMutex::default(),
            hello: Mutex::default(),
            silent: AtomicBool::new(false),
        }
    }

    /// Whether nothing is to be expected from it at the moment.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// Notes that an answer is overdue. The next one that comes, to whatever call, ends that.
    pub(crate) fn fall_silent(&self) {
        if !self.silent.swap(true, Ordering::Relaxed) {
            warn!("the guest does not answer: until it does, its statistics are the last that are known");
        }
    }

    /// Makes a call that must not hold up others of its kind: none to a silent guest, and each for [`BRIEF`] at the most.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub(crate) async fn call_briefly<T, F>(
        &self,
        operation: &'static str,
        call: impl FnOnce(AgentClient, Ctx) -> F,
    ) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        if self.is_silent() {
            return Err(lost("it does not answer at the moment; the call goes through when it does"));
        }
        // Also of the time that it takes to connect.
        let called = within(BRIEF, operation, self.call(operation, Some(BRIEF), call)).await.and_then(|called| called);
        if matches!(called, Err(Error::TimedOut { .. })) {
            self.fall_silent();
        }
        called
    }

    /// What it has said of itself, once it was reached.
    pub(crate) fn hello(&self) -> Option<Arc<HelloResponse>> {
        self.hello.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until the guest has booted and its agent answers, for as long as `limit`. It connects to `ready` when it listens.
    ///
    /// # Errors
    /// [`Error::TimedOut`], and what an agent says that cannot be worked with.
    pub(crate) async fn wait(&self, ready: Option<UnixListener>, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        if let Some(ready) = ready {
            // That may get lost on a busy host, so it is not relied upon.
            if let Ok(Err(error)) = timeout(limit / 2, ready.accept()).await {
                return Err(Error::failed("wait for the guest")(error));
            }
        }
        let mut last: Option<String> = None;
        loop {
            // A connection that is made too early may be neither taken nor refused, so none is waited for to the end.
            let attempt = deadline.min(Instant::now() + ATTEMPT);
            if let Ok(Ok(connection)) = timeout_at(attempt, self.dialler.dial(PORT)).await {
                match self.greet(connection, attempt).await {
                    Ok(client) => {
                        *self.shared() = Some(client);
                        return Ok(());
                    }
                    // The last of many attempts may only have begun too late.
                    Err(Error::TimedOut { .. }) => drop(last.get_or_insert_with(|| "it does not answer".to_owned())),
                    Err(error @ Error::Unavailable { .. }) if !self.budget.is_exceeded() => last = Some(error.report()),
                    Err(error) => return Err(error),
                }
            }
            if Instant::now() >= deadline {
                return Err(late(limit, last.as_deref()));
            }
            sleep(TRY).await;
        }
    }

    /// Says hello on a new connection.
    async fn greet(&self, connection: Connection, deadline: Instant) -> Result<Arc<Connected>> {
        let metered = Metered { connection, budget: self.budget.clone() };
        let client = AgentClient::new(Client::new(Socket::new(metered)));
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).map_err(Error::failed("read the clock"))?;
        let time_ns = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
        let request = HelloRequest { version: VERSION, time_ns, ..HelloRequest::default() };
        let left = left(deadline).min(QUICK);
        let hello = within(left, "say hello", client.hello(context::with_duration(left + SLACK), &request)).await?;
        let hello = hello.map_err(|error| self.error("say hello", error))?;
        if hello.version != VERSION {
            let message = format!(
                "it speaks version {} of the protocol, this daemon {VERSION}; install the guest image of the same release",
                hello.version
            );
            let (by, operation) = ("the guest's agent".into(), "say hello".into());
            return Err(Error::Refused { by, operation, code: Code::FailedPrecondition, message });
        }
        let mut hello = hello;
        for text in [&mut hello.agent, &mut hello.kernel, &mut hello.runtime, &mut hello.boot_id] {
            *text = tame(text, 128);
        }
        *self.hello.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(hello));
        Ok(Arc::new(Connected(client)))
    }

    fn shared(&self) -> MutexGuard<'_, Option<Arc<Connected>>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection that calls share. One caller makes it, and the others wait for that.
    async fn client(&self) -> Result<Arc<Connected>> {
        let known = || self.shared().clone();
        let connect = async {
            let _turn = self.connecting.lock().await;
            if let Some(client) = known() {
                return Ok(client);
            }
            let client = tries(|deadline| async move {
                let connection = self.connect(PORT, deadline).await?;
                self.greet(connection, deadline).await
            })
            .await?;
            *self.shared() = Some(client.clone());
            Ok(client)
        };
        match known() {
            Some(client) => Ok(client),
            // Also of those that wait.
            None => within(QUICK, "connect", connect).await?,
        }
    }

    /// Connects to a port of the guest.
    ///
    /// # Errors
    /// When that is refused, or takes too long.
    pub(crate) async fn dial(&self, port: u32) -> Result<Connection> {
        tries(|deadline| self.connect(port, deadline)).await
    }

    async fn connect(&self, port: u32, deadline: Instant) -> Result<Connection> {
        let dialled = within(left(deadline), "connect", self.dialler.dial(port)).await?;
        dialled.map_err(|error| lost(&format!("it cannot be reached: {error}")))
    }

    /// Makes a call; `operation` reads as the end of "failed to …". Without a limit it may take as long as the machine lives.
    ///
    /// # Errors
    /// What the agent answered, by its code; [`Error::Unavailable`] when it cannot be reached; [`Error::TimedOut`].
    pub(crate) async fn call<T, F>(
        &self,
        operation: &'static str,
        limit: Option<Duration>,
        call: impl FnOnce(AgentClient, Ctx) -> F,
    ) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let client = self.client().await?;
        let context = limit.map_or_else(|| context::with_timeout(0), |limit| context::with_duration(limit + SLACK));
        let called = call(client.0.clone(), context);
        let answer = match limit {
            Some(limit) => within(limit, operation, called).await,
            None => Ok(called.await),
        };
        if matches!(answer, Ok(Ok(_) | Err(ttrpc::Error::RpcStatus(_)))) {
            if self.silent.swap(false, Ordering::Relaxed) {
                info!("the guest answers again");
            }
        } else {
            // It is broken, or may be: the next call gets another. Those that wait on it go on.
            self.shared().take_if(|shared| Arc::ptr_eq(shared, &client));
        }
        answer?.map_err(|error| self.error(operation, error))
    }

    fn error(&self, operation: &str, error: ttrpc::Error) -> Error {
        if self.budget.is_exceeded() {
            return lost("it has sent more than a guest has to say, and is not listened to any more; delete the pod");
        }
        let ttrpc::Error::RpcStatus(status) = error else { return lost(&tame(&error.to_string(), TEXT)) };
        let code = match status.code() {
            ttrpc::Code::INVALID_ARGUMENT => Code::InvalidArgument,
            ttrpc::Code::NOT_FOUND => Code::NotFound,
            ttrpc::Code::ALREADY_EXISTS => Code::AlreadyExists,
            ttrpc::Code::FAILED_PRECONDITION => Code::FailedPrecondition,
            ttrpc::Code::UNIMPLEMENTED => Code::Unimplemented,
            ttrpc::Code::RESOURCE_EXHAUSTED => Code::ResourceExhausted,
            ttrpc::Code::UNAVAILABLE => Code::Unavailable,
            // Of a step of the guest's own, which it names: the call's own limit is watched here.
            ttrpc::Code::DEADLINE_EXCEEDED => Code::DeadlineExceeded,
            _ => Code::Internal,
        };
        Error::Refused { by: "the guest".into(), operation: operation.into(), code, message: tame(status.message(), TEXT) }
    }
}

/// Waits for a call to be answered.
pub(crate) async fn within<T>(limit: Duration, operation: &str, call: impl Future<Output = T>) -> Result<T> {
    // What is left of a limit is a little less than its seconds.
    let seconds = (limit + Duration::from_millis(500)).as_secs();
    let late = |_| Error::TimedOut { operation: format!("the guest's answer to: {operation},"), seconds };
    timeout(limit, call).await.map_err(late)
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Makes attempts, each with its deadline and twice as long as the one before, until one comes to a result, or [`QUICK`] is over.
async fn tries<T, F: Future<Output = Result<T>>>(attempt: impl Fn(Instant) -> F) -> Result<T> {
    let end = Instant::now() + QUICK;
    let mut limit = ATTEMPT;
    loop {
        let deadline = end.min(Instant::now() + limit);
        match attempt(deadline).await {
            Err(Error::TimedOut { .. }) if deadline < end => limit *= 2,
            done => return done,
        }
    }
}

/// `last` is what came of the last connection that the guest took.
fn late(limit: Duration, last: Option<&str>) -> Error {
    let last = last.map(|why| format!(" (it takes connections, but: {why})")).unwrap_or_default();
    let operation = format!("the boot of the guest up to its agent's first answer{last}");
    Error::TimedOut { operation, seconds: limit.as_secs() }
}

fn lost(why: &str) -> Error {
    Error::Unavailable { what: "the guest's agent".into(), why: why.into() }
}

/// A character of the guest's as it may be shown: none that a terminal takes for a command.
pub(crate) fn tame_char(c: char) -> char {
    if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c }
}

/// A text of the guest's as it may be shown and logged: bounded, without control characters but newlines and tabs.
pub(crate) fn tame(text: &str, limit: usize) -> String {
    let mut tamed: String = text.chars().take(limit).map(tame_char).collect();
    while tamed.len() > limit {
        tamed.pop();
    }
    tamed
}

/// What a guest may still say, across its connections: [`BURST`] bytes, and [`RATE`] more each second.
#[derive(Debug, Default)]
struct Budget(Mutex<Spent>);

#[derive(Debug, Default)]
struct Spent {
    bytes: u64,
    since: Option<Instant>,
    exceeded: bool,
}

impl Budget {
    fn spend(&self, bytes: u64, now: Instant) -> bool {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *spent.since.get_or_insert(now);
        let earned = now.saturating_duration_since(since).as_millis() * u128::from(RATE) / 1000;
        if earned > 0 {
            spent.bytes = spent.bytes.saturating_sub(u64::try_from(earned).unwrap_or(u64::MAX));
            spent.since = Some(now);
        }
        spent.bytes = spent.bytes.saturating_add(bytes);
        spent.exceeded |= spent.bytes > BURST;
        !spent.exceeded
    }

    fn is_exceeded(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).exceeded
    }
}

/// A connection that breaks when more comes over it than the budget allows.
struct Metered {
    connection: Connection,
    budget: Arc<Budget>,
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.connection).poll_read(cx, buffer))?;
        let read = buffer.filled().len() - before;
        if self.budget.spend(read as u64, Instant::now()) {
            Poll::Ready(Ok(()))
        } else {
            Poll::Ready(Err(io::Error::new(io::ErrorKind::QuotaExceeded, "the guest has sent too much")))
        }
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod fuzz;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_earned_back() {
        let budget = Budget::default();
        let start = Instant::now();
        assert!(budget.spend(BURST, start));
        let later = start + Duration::from_secs(2);
        assert!(budget.spend(2 * RATE, later) && !budget.is_exceeded());
        assert!(!budget.spend(1, later) && budget.is_exceeded());
        // It is not earned back from a guest that floods.
        assert!(!budget.spend(0, later + Duration::from_secs(3600)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_that_is_over_is_told_apart_from_one_of_the_guests_own() {
        let error = within(SLOW, "exec", std::future::pending::<()>()).await.unwrap_err();
        assert_eq!(error.report(), "the guest's answer to: exec, did not finish within 120 s");
        let late = ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::DEADLINE_EXCEEDED, "the end of exec x"));
        let error = Agent::at(VsockAddress::Cid(3), FdStore::default()).error("exec", late);
        assert_eq!((error.code(), error.report().contains("the end of exec x")), (Code::DeadlineExceeded, true));
    }

    #[test]
    fn texts_are_tamed() {
        assert_eq!(tame("a\x1b[31mb\nc\td\u{9b}\r", 100), "a\u{fffd}[31mb\nc\td\u{fffd}\u{fffd}");
        assert!(tame(&"ä".repeat(100), 51).len() <= 51);
    }
}
