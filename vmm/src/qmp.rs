//! QMP: JSON, a line each, on a unix socket. QEMU and StratoVirt speak it.
//!
//! One task owns the connection. It sends one command at a time and waits for its reply, for StratoVirt loses commands that come
//! together, and tells events to whoever listens. What comes in is bounded: a line in size, all lines in rate, a command's reply in
//! time. A peer that does not speak the protocol is given up for good, with the reason; a reply that comes too late is thrown away.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kuasar_sandboxers::{Error, Result};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
    sync::{broadcast, mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};

/// The longest line. Replies are a few hundred bytes, the greeting too.
const LINE: usize = 1 << 20;

/// How many lines are read within a second. QEMU limits most of its events to one a second of each kind.
const RATE: usize = 1000;

/// Events that are kept for a listener who is slow.
const EVENTS: usize = 256;

/// Something that has happened to the machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `GUEST_PANICKED`, `DEVICE_DELETED` …
    pub name: String,
    /// Its details.
    pub data: Value,
}

/// The VMM has refused a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `GenericError`, `DeviceNotFound` …
    pub class: String,
    /// For people.
    pub description: String,
}

/// A connection. Clones share it.
#[derive(Clone, Debug)]
pub struct Qmp {
    program: Arc<str>,
    requests: mpsc::Sender<Request>,
    events: broadcast::Sender<Event>,
    broken: Arc<Mutex<Option<String>>>,
}

#[derive(Debug)]
struct Request {
    name: &'static str,
    line: Vec<u8>,
    id: u64,
    fd: Option<Arc<OwnedFd>>,
    reply: oneshot::Sender<Result<Value, Refusal>>,
}

/// A line from the peer.
enum Message {
    Greeting,
    Event(Event),
    Reply { id: Option<u64>, result: Result<Value, Refusal> },
}

impl Qmp {
    /// Speaks on a connection, up to the point where commands are taken. `seen` is told of each event, before the listeners; it must not
    /// take long.
    ///
    /// # Errors
    /// When the peer does not greet within `limit`, or not in this protocol.
    pub async fn open(
        stream: UnixStream,
        program: &str,
        limit: Duration,
        seen: impl Fn(&Event) + Send + 'static,
    ) -> Result<Self> {
        let (requests, inbox) = mpsc::channel(16);
        let qmp = Self { program: program.into(), requests, events: broadcast::channel(EVENTS).0, broken: Arc::default() };
        let mut lines = Lines { stream, buffer: Vec::new(), searched: 0, window: Instant::now(), read: 0 };
        let greeting = async {
            loop {
                if let Message::Greeting = Message::parse(&lines.next().await?)? {
                    return Ok::<_, String>(());
                }
            }
        };
        match timeout(limit, greeting).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => return Err(qmp.failure("greet", why)),
            Err(_) => return Err(Error::TimedOut { operation: format!("{program}'s greeting"), seconds: limit.as_secs() }),
        }
        let (events, broken) = (qmp.events.clone(), qmp.broken.clone());
        tokio::spawn(async move {
            let result = Peer { lines, inbox, events, seen: Box::new(seen), pending: None }.run().await;
            let why = result.err().unwrap_or_else(|| "the connection was given up".into());
            *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        });
        qmp.run("qmp_capabilities", json!({}), limit).await?;
        Ok(qmp)
    }

    /// Whether nothing comes through any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.requests.is_closed()
    }

    /// Events from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Runs a command; a refusal is an error.
    ///
    /// # Errors
    /// [`Error::Backend`] with the peer's words; [`Error::TimedOut`].
    pub async fn run(&self, name: &'static str, arguments: Value, limit: Duration) -> Result<Value> {
        self.ask(name, arguments, None, limit).await?.map_err(|refusal| self.failure(name, refusal.description))
    }

    /// Runs a command that a descriptor goes with (`add-fd`, `getfd`).
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn run_with(&self, name: &'static str, arguments: Value, fd: Arc<OwnedFd>, limit: Duration) -> Result<Value> {
        self.ask(name, arguments, Some(fd), limit).await?.map_err(|refusal| self.failure(name, refusal.description))
    }

    /// Runs a command whose refusal means something to the caller.
    ///
    /// # Errors
    /// When the connection is broken, or the reply does not come in time.
    pub async fn ask(
        &self,
        name: &'static str,
        arguments: Value,
        fd: Option<Arc<OwnedFd>>,
        limit: Duration,
    ) -> Result<Result<Value, Refusal>> {
        static IDS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        let id = IDS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut command = Map::from_iter([("execute".to_owned(), json!(name)), ("id".to_owned(), json!(id))]);
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            command.insert("arguments".into(), arguments);
        }
        let mut line = serde_json::to_vec(&command).map_err(Error::failed(format!("write the command {name}")))?;
        line.extend(b"\r\n");
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            let sent = self.requests.send(Request { name, line, id, fd, reply }).await;
            sent.map_err(|_| self.broken(name))?;
            answer.await.map_err(|_| self.broken(name))
        };
        let operation = || format!("{}'s command {name}", self.program);
        timeout(limit, exchange).await.map_err(|_| Error::TimedOut { operation: operation(), seconds: limit.as_secs() })?
    }

    fn broken(&self, name: &str) -> Error {
        let why = self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.failure(name, why.unwrap_or_else(|| "the connection is closing".into()))
    }

    fn failure(&self, operation: &str, message: String) -> Error {
        Error::Backend { program: self.program.to_string(), operation: operation.into(), message }
    }
}

/// The task that owns the connection.
struct Peer {
    lines: Lines,
    inbox: mpsc::Receiver<Request>,
    events: broadcast::Sender<Event>,
    seen: Box<dyn Fn(&Event) + Send>,
    pending: Option<Request>,
}

impl Peer {
    /// Until the peer hangs up or talks nonsense, or nobody is left who could ask. The one asking may have gone away: its reply is awaited
    /// all the same, so that the next command comes alone.
    async fn run(mut self) -> Result<(), String> {
        loop {
            let line = tokio::select! {
                line = self.lines.next() => line?,
                request = self.inbox.recv(), if self.pending.is_none() => {
                    let Some(mut request) = request else { return Ok(()) };
                    if request.reply.is_closed() {
                        continue;
                    }
                    self.lines.send(&mut request).await.map_err(|error| format!("cannot send {}: {error}", request.name))?;
                    self.pending = Some(request);
                    continue;
                }
            };
            match Message::parse(&line)? {
                // StratoVirt says it again now and then.
                Message::Greeting => {}
                Message::Event(event) => {
                    (self.seen)(&event);
                    // Without listeners nobody misses it.
                    let _ = self.events.send(event);
                }
                // Replies without an id are for what could not be read, which was ours.
                Message::Reply { id, result } => match self.pending.take_if(|pending| id.is_none_or(|id| id == pending.id)) {
                    // Whoever asked may have gone away: fine.
                    Some(pending) => drop(pending.reply.send(result)),
                    None => return Err("it answered what it was not asked".into()),
                },
            }
        }
    }
}

impl Message {
    fn parse(line: &[u8]) -> Result<Self, String> {
        let nonsense = || format!("it said {:?}, which is no QMP", String::from_utf8_lossy(&line[..line.len().min(200)]));
        let mut message: Map<String, Value> = serde_json::from_slice(line).map_err(|_| nonsense())?;
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
        let id = message.get("id").and_then(Value::as_u64);
        if message.contains_key("QMP") {
            Ok(Self::Greeting)
        } else if let Some(name) = message.get("event").and_then(Value::as_str) {
            let name = name.to_owned();
            Ok(Self::Event(Event { name, data: message.remove("data").unwrap_or(Value::Null) }))
        } else if let Some(value) = message.remove("return") {
            Ok(Self::Reply { id, result: Ok(value) })
        } else if let Some(error) = message.get("error") {
            let refusal = Refusal { class: text(error.get("class")), description: text(error.get("desc")) };
            Ok(Self::Reply { id, result: Err(refusal) })
        } else {
            Err(nonsense())
        }
    }
}

/// The connection, in lines.
struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// Up to where there is no end of a line.
    searched: usize,
    /// When the present second of reading began, and how many lines it has brought.
    window: Instant,
    read: usize,
}

impl Lines {
    /// The next that is not empty. Nothing is lost when this is dropped half way.
    async fn next(&mut self) -> Result<Vec<u8>, String> {
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                if self.read >= RATE {
                    sleep_until(self.window + Duration::from_secs(1)).await;
                }
                if self.window.elapsed() >= Duration::from_secs(1) {
                    (self.window, self.read) = (Instant::now(), 0);
                }
                self.read += 1;
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                if line.iter().any(|byte| !byte.is_ascii_whitespace()) {
                    return Ok(line);
                }
                continue;
            }
            self.searched = self.buffer.len();
            if self.buffer.len() >= LINE {
                return Err(format!("it said a line of more than {LINE} bytes"));
            }
            self.stream.readable().await.map_err(|error| error.to_string())?;
            match self.stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Err("it has hung up".into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    async fn send(&mut self, request: &mut Request) -> io::Result<()> {
        let mut rest = request.line.as_slice();
        if let Some(fd) = request.fd.take() {
            let send = || {
                let fds = [fd.as_fd()];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(&fds));
                let sent = sendmsg(&self.stream, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL)?;
                Ok::<_, io::Error>(sent)
            };
            let sent = self.stream.async_io(Interest::WRITABLE, send).await?;
            rest = &rest[sent..];
        }
        self.stream.write_all(rest).await
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    /// A peer that greets and takes the capabilities, then says `rest` upon the first command.
    async fn peer(mut stream: UnixStream, rest: Vec<u8>) -> UnixStream {
        stream.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        let id = serde_json::from_str::<Value>(&line).unwrap()["id"].clone();
        let mut stream = stream.into_inner();
        stream.write_all(format!("{{\"return\": {{}}, \"id\": {id}}}\r\n").as_bytes()).await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await.unwrap();
        let _ = stream.write_all(&rest).await;
        stream
    }

    /// What comes of a command that is answered so.
    async fn answered(rest: &[u8], limit: Duration) -> (Result<Value>, Qmp) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = tokio::spawn(peer(theirs, rest.to_vec()));
        let qmp = Qmp::open(ours, "test", SOON, |_| ()).await.unwrap();
        let result = qmp.run("query-status", json!({}), limit).await;
        // A flood is not read to its end.
        peer.abort();
        (result, qmp)
    }

    #[tokio::test]
    async fn what_is_no_qmp_is_given_up_with_the_reason() {
        for (said, why) in [
            (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "HTTP/1.1 400"),
            (b"\xff\xfe\x00\n".to_vec(), "which is no QMP"),
            (b"{\"what\": 1}\n".to_vec(), "which is no QMP"),
            (b"[1]\n".to_vec(), "which is no QMP"),
            (vec![b'{'; LINE + 10], "a line of more than"),
            (b"{\"return\": {}, \"id\": 0}\n".to_vec(), "what it was not asked"),
        ] {
            let (result, qmp) = answered(&said, SOON).await;
            let report = result.unwrap_err().report();
            assert!(report.contains(why), "{report}");
            let again = qmp.run("query-status", json!({}), SOON).await.unwrap_err().report();
            assert!(qmp.is_closed() && again.contains(why), "{again}");
        }
    }

    #[test]
    fn fuzz_messages() {
        bolero::check!().for_each(|line: &[u8]| {
            // A refusal quotes what was said, but not all of it.
            assert!(Message::parse(line).err().is_none_or(|why| why.len() < 2000));
        });
    }

    #[tokio::test]
    async fn silence_has_an_end() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = Qmp::open(ours, "test", Duration::from_millis(50), |_| ()).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        let (ours, theirs) = UnixStream::pair().unwrap();
        let _peer = tokio::spawn(peer(theirs, Vec::new()));
        let qmp = Qmp::open(ours, "test", SOON, |_| ()).await.unwrap();
        let error = qmp.run("query-status", json!({}), Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_peer_that_hangs_up_is_noticed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = Qmp::open(ours, "test", SOON, |_| ()).await.unwrap_err();
        assert!(error.report().contains("hung up"), "{}", error.report());
    }

    #[tokio::test]
    async fn a_flood_of_events_is_read_at_a_bounded_rate() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let flood = b"{\"event\": \"X\", \"data\": {\"n\": 1}}\r\n".repeat(10 * RATE);
        let peer = tokio::spawn(peer(theirs, flood));
        let seen = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = seen.clone();
        let count = move |_: &Event| {
            counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        };
        let begin = Instant::now();
        let qmp = Qmp::open(ours, "test", SOON, count).await.unwrap();
        let error = qmp.run("query-status", json!({}), Duration::from_millis(1500)).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        let (seen, elapsed) = (seen.load(std::sync::atomic::Ordering::Relaxed), begin.elapsed().as_secs() as usize);
        assert!((RATE - 10..=(elapsed + 1) * RATE).contains(&seen), "{seen} in {elapsed} s");
        peer.abort();
    }

    #[tokio::test]
    async fn replies_and_refusals_are_told_apart() {
        let refusal = b"{\"event\": \"X\"}\r\n\r\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\r\n";
        let report = answered(refusal, SOON).await.0.unwrap_err().report();
        assert_eq!(report, "test failed to query-status: no such thing");
        assert_eq!(answered(b"{\"return\": {\"a\": 1}}\n", SOON).await.0.unwrap(), json!({"a": 1}));
    }
}
