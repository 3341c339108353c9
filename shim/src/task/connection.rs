//! The Task socket's connections.
//!
//! They come from the keeper, each with its [journal](super::journal): what a worker that died has read of one and not answered is read
//! again. Without a keeper they are accepted here.
//!
//! containerd keeps one connection per container and dials once more per stdio stream, so there may be many; how many
//! are served at a time is bounded, the rest wait in the socket's backlog. Each gets a ttrpc server of its own, because only so can the
//! streams on it learn that it has gone.
//!
//! Everything here runs on one thread (a current-thread runtime): ttrpc spawns a task per frame, and only there do the frames of
//! a stream keep their order.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::fd::OwnedFd,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use kuasar_sandboxers::stdio::StreamHub;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{UnixListener, UnixStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc::UnboundedReceiver, watch},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};
use ttrpc::{
    r#async::{Server, Service},
    asynchronous::transport::Listener,
};

use super::{
    TaskService,
    journal::{Journal, Left},
};
use crate::{
    keeper::worker::{Keeper, Parked},
    streaming::Streaming,
};

/// How long to wait before accepting again after it failed, which means that descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);
/// How often at most it is logged that connections wait for a place.
const WARN_EVERY: Duration = Duration::from_secs(30);

/// Room for so many connections at a time.
#[derive(Debug)]
struct Places {
    free: Arc<Semaphore>,
    /// When it was last logged that there is none.
    warned: Mutex<Option<Instant>>,
}

impl Places {
    fn new(limit: usize) -> Self {
        Self { free: Arc::new(Semaphore::new(limit)), warned: Mutex::default() }
    }

    /// A place, when there is one.
    async fn take(&self) -> Option<OwnedSemaphorePermit> {
        if self.free.available_permits() == 0 {
            let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
            if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
                *warned = Some(Instant::now());
                warn!("as many connections as are allowed; more wait until one ends: raise the limit of descriptors");
            }
        }
        // Never closed.
        self.free.clone().acquire_owned().await.ok()
    }
}

/// Accepts connections, at most so many at a time. Clones of what it gives keep their place until dropped.
#[derive(Debug)]
pub struct Acceptor {
    listener: UnixListener,
    places: Places,
}

impl Acceptor {
    /// An acceptor for `limit` connections at a time.
    #[must_use]
    pub fn new(listener: UnixListener, limit: usize) -> Self {
        Self { listener, places: Places::new(limit) }
    }

    /// The next connection. Does not fail: running out of descriptors passes, and the peer waits meanwhile.
    pub async fn accept(&self) -> Connection {
        let place = self.places.take().await;
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    return Connection { stream, kept: None, hush: Hush::default(), heard: None, _place: place, _guard: None };
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Lets connections be read no more. What is sent to them waits in their sockets for the next worker, and what has been read is still
/// answered. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Hush(Arc<AtomicBool>);

impl Hush {
    /// From now on nothing is read.
    pub fn begin(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where Task connections come from.
#[derive(Debug)]
pub enum Source {
    /// A socket of our own.
    Listener(Acceptor),
    /// The keeper.
    Keeper(Kept),
}

/// Connections that the keeper has accepted.
#[derive(Debug)]
pub struct Kept {
    keeper: Keeper,
    fresh: UnboundedReceiver<Parked>,
    hush: Hush,
    places: Places,
}

impl Kept {
    /// What comes through `fresh`, at most `limit` at a time.
    #[must_use]
    pub fn new(keeper: Keeper, fresh: UnboundedReceiver<Parked>, hush: Hush, limit: usize) -> Self {
        Self { keeper, fresh, hush, places: Places::new(limit) }
    }

    /// The next connection; `None` when the keeper is gone.
    async fn accept(&mut self) -> Option<Connection> {
        loop {
            let Parked { name, descriptors } = self.fresh.recv().await?;
            let place = self.places.take().await;
            let taken = take(descriptors);
            if let Err(error) = &taken
                && matches!(
                    error.raw_os_error(),
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS | libc::ENOSPC)
                )
            {
                // Closed, it would be its container's death to containerd. The keeper still has it.
                warn!(%error, name, "a connection cannot be taken over now");
                self.keeper.ask_again(name);
                continue;
            }
            let hold = Hold { keeper: self.keeper.clone(), name };
            match taken {
                Ok(Some((stream, left))) => {
                    let kept = Journalled { journal: left.journal, replay: left.replay.into(), _hold: hold };
                    let (kept, hush) = (Some(kept), self.hush.clone());
                    return Some(Connection { stream, kept, hush, heard: None, _place: place, _guard: None });
                }
                Ok(None) => debug!(name = hold.name, "a connection with streams ends with its worker"),
                Err(error) => warn!(%error, name = hold.name, "cannot take over a connection; it is closed"),
            }
        }
    }
}

fn take(descriptors: Vec<OwnedFd>) -> io::Result<Option<(UnixStream, Left)>> {
    let Ok([socket, journal]) = <[OwnedFd; 2]>::try_from(descriptors) else {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a connection with its journal"));
    };
    let stream = UnixStream::from_std(socket.into())?;
    Ok(Journal::open(journal, &stream)?.map(|left| (stream, left)))
}

/// The keeper's hold on a connection, which ends with ours.
#[derive(Debug)]
struct Hold {
    keeper: Keeper,
    name: String,
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Without a keeper nobody holds it.
        let _ = self.keeper.drop_parked(&self.name);
    }
}

/// What a connection has that outlives this process.
#[derive(Debug)]
struct Journalled {
    journal: Journal,
    /// What is read before anything from the socket.
    replay: VecDeque<u8>,
    _hold: Hold,
}

/// An accepted connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    kept: Option<Journalled>,
    hush: Hush,
    /// Told whenever the peer has sent something.
    heard: Option<watch::Sender<()>>,
    _place: Option<OwnedSemaphorePermit>,
    _guard: Option<DropGuard>,
}

impl Connection {
    /// A token that is cancelled when this is dropped.
    fn closed(&mut self) -> CancellationToken {
        let token = CancellationToken::new();
        self._guard = Some(token.clone().drop_guard());
        token
    }

    /// Changes whenever the peer has sent something.
    fn heard(&mut self) -> watch::Receiver<()> {
        self.heard.get_or_insert_with(|| watch::channel(()).0).subscribe()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.hush.is_on() {
            // For good: this process is about to end.
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let Self { stream, kept, heard, .. } = &mut *self;
        let polled = match kept {
            None => Pin::new(stream).poll_read(cx, buf),
            Some(kept) => kept.poll_read(stream, cx, buf),
        };
        if buf.filled().len() > before
            && let Some(heard) = heard
        {
            heard.send_replace(());
        }
        polled
    }
}

impl Journalled {
    fn poll_read(&mut self, stream: &UnixStream, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.replay.is_empty() {
            let (first, _) = self.replay.as_slices();
            let count = first.len().min(buf.remaining());
            buf.put_slice(&first[..count]);
            self.replay.drain(..count);
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(stream.poll_read_ready(cx))?;
            let free = buf.initialize_unfilled();
            match stream.try_io(Interest::READABLE, || self.journal.read(stream, free)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        if let Some(kept) = &mut self.kept {
            kept.journal.sent(&buf[..count])?;
        }
        Poll::Ready(Ok(count))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, bufs))?;
        if let Some(kept) = &mut self.kept {
            let mut left = count;
            for buf in bufs {
                let part = buf.len().min(left);
                kept.journal.sent(&buf[..part])?;
                left -= part;
            }
        }
        Poll::Ready(Ok(count))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl tonic::transport::server::Connected for Connection {
    type ConnectInfo = ();
    fn connect_info(&self) {}
}

/// Serves Task connections until `stop`; they live on until they are closed or the runtime ends.
pub async fn serve(mut source: Source, task: TaskService, hub: StreamHub, stop: CancellationToken) {
    loop {
        let next = async {
            match &mut source {
                Source::Listener(acceptor) => Some(acceptor.accept().await),
                Source::Keeper(kept) => kept.accept().await,
            }
        };
        let connection = select! {
            connection = next => connection,
            () = stop.cancelled() => return,
        };
        let Some(connection) = connection else { return };
        tokio::spawn(serve_one(connection, task.clone(), hub.clone()));
    }
}

async fn serve_one(mut connection: Connection, task: TaskService, hub: StreamHub) {
    let (closed, heard) = (connection.closed(), connection.heard());
    let streaming = Streaming::new(hub, closed.clone(), heard);
    let services = task.services(&closed).into_iter().chain(streaming.services()).collect();
    answer(connection, closed, services).await;
}

/// Serves a connection until it is closed.
async fn answer(connection: Connection, closed: CancellationToken, services: HashMap<String, Service>) {
    let only = futures::stream::once(async { Ok(connection) });
    let mut server = Server::new().add_listener(Listener::new(only)).register_service(services);
    match server.start().await {
        // Dropping the server would end the connection.
        Ok(()) => closed.cancelled().await,
        Err(error) => debug!(%error, "cannot serve a connection"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use futures::FutureExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        time::timeout,
    };

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn acceptor(path: &Path, limit: usize) -> Acceptor {
        Acceptor::new(UnixListener::bind(path).unwrap(), limit)
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_wait_for_a_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let acceptor = acceptor(&path, 2);
        let _clients = [(); 3].map(|()| std::os::unix::net::UnixStream::connect(&path).unwrap());
        let first = acceptor.accept().await;
        let _second = acceptor.accept().await;
        assert!(acceptor.accept().now_or_never().is_none());
        drop(first);
        timeout(LONG, acceptor.accept()).await.expect("a place");
    }

    /// A connection as the keeper hands it on, with its peer's end.
    fn parked(name: &str, journal: &[u8]) -> (Parked, UnixStream) {
        let (ours, peer) = UnixStream::pair().unwrap();
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        rustix::io::pwrite(&file, journal, 0).unwrap();
        let socket = OwnedFd::from(ours.into_std().unwrap());
        (Parked { name: name.into(), descriptors: vec![socket, file] }, peer)
    }

    #[tokio::test]
    async fn a_journal_that_does_not_parse_ends_its_connection_and_no_other() {
        let (ours, _keeper) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let (tell, fresh) = tokio::sync::mpsc::unbounded_channel();
        let mut kept = Kept::new(Keeper::at(ours.into()), fresh, Hush::default(), 4);
        let (good, mut client) = parked("good", &[]);
        // No journal at all; one of more than there is; one whose bytes are no requests: of a size that no peer may send.
        let header = |length: u64| [0, length, 0].map(u64::to_le_bytes).concat();
        let (noise, mut noisy) = parked("noise", &[0xa5; 5000]);
        let (short, mut cut) = parked("short", &header(4000));
        let text = [header(300), vec![0; 4096 - 24], vec![0xff; 300]].concat();
        let (text, _garbled) = parked("text", &text);
        let (mut lone, mut alone) = parked("lone", &[]);
        lone.descriptors.pop();
        for parked in [noise, short, text, lone, good] {
            tell.send(parked).unwrap();
        }
        for _ in 0..2 {
            let mut connection = timeout(LONG, kept.accept()).await.expect("the next").expect("a keeper");
            let closed = connection.closed();
            tokio::spawn(answer(connection, closed, HashMap::new()));
        }
        for peer in [&mut noisy, &mut cut, &mut alone] {
            assert_eq!(timeout(LONG, peer.read(&mut [0])).await.expect("the end").unwrap(), 0);
        }
        // An empty request of a service that there is not: it is answered, on its stream.
        client.write_all(&[0, 0, 0, 0, 0, 0, 0, 1, 1, 0]).await.unwrap();
        let mut header = [0; 10];
        timeout(LONG, client.read_exact(&mut header)).await.expect("an answer").unwrap();
        assert_eq!((header[7], header[8]), (1, 2));
    }

    #[tokio::test]
    async fn a_connection_tells_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let acceptor = acceptor(&path, 1);
        let mut client = UnixStream::connect(&path).await.unwrap();
        let mut connection = acceptor.accept().await;
        let closed = connection.closed();
        assert!(!closed.is_cancelled());
        drop(connection);
        timeout(LONG, closed.cancelled()).await.expect("the end");
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
