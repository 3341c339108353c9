//! The Task socket's connections.
//!
//! containerd keeps one connection per container and dials once more per stdio stream, so there may be many; how many
//! are served at a time is bounded, the rest wait in the socket's backlog. Each gets a ttrpc server of its own, because only so can the
//! streams on it learn that it has gone.
//!
//! Everything here runs on one thread (a current-thread runtime): ttrpc spawns a task per frame, and only there do the frames of
//! a stream keep their order.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use kuasar_sandboxers::stdio::StreamHub;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore, watch},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};
use ttrpc::{
    r#async::{Server, Service},
    asynchronous::transport::Listener,
};

use super::TaskService;
use crate::streaming::Streaming;

/// How long to wait before accepting again after it failed, which means that descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections, at most so many at a time. Clones of what it gives keep their place until dropped.
#[derive(Debug)]
pub struct Acceptor {
    listener: UnixListener,
    places: Arc<Semaphore>,
}

impl Acceptor {
    /// An acceptor for `limit` connections at a time.
    #[must_use]
    pub fn new(listener: UnixListener, limit: usize) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(limit)) }
    }

    /// The next connection. Does not fail: running out of descriptors passes, and the peer waits meanwhile.
    pub async fn accept(&self) -> Connection {
        if self.places.available_permits() == 0 {
            warn!("as many connections as are allowed; more wait until one ends");
        }
        // Never closed.
        let place = self.places.clone().acquire_owned().await.ok();
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return Connection { stream, heard: None, _place: place, _guard: None },
                Err(error) => {
                    warn!(%error, "cannot accept a connection; trying again");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// An accepted connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
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
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before
            && let Some(heard) = &self.heard
        {
            heard.send_replace(());
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
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

/// Serves the Task socket until `stop`; connections live on until they are closed or the runtime ends.
pub async fn serve(acceptor: Acceptor, task: TaskService, hub: StreamHub, stop: CancellationToken) {
    loop {
        let connection = select! {
            connection = acceptor.accept() => connection,
            () = stop.cancelled() => return,
        };
        tokio::spawn(serve_one(connection, task.clone(), hub.clone()));
    }
}

async fn serve_one(mut connection: Connection, task: TaskService, hub: StreamHub) {
    let (closed, heard) = (connection.closed(), connection.heard());
    let streaming = Streaming::new(hub, closed.clone(), heard);
    let services: HashMap<String, Service> = task.services(&closed).into_iter().chain(streaming.services()).collect();
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
    use tokio::{io::AsyncReadExt, time::timeout};

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
