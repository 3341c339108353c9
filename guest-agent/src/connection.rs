//! Connections from the host.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::OwnedSemaphorePermit,
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tracing::warn;

/// Where the host connects to.
#[derive(Debug)]
pub enum Listener {
    /// A vsock port.
    Vsock(VsockListener),
    /// A unix socket: in tests, in place of a port.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a vsock port.
    ///
    /// # Errors
    /// The kernel's refusal: `EAFNOSUPPORT` as long as it has no vsock.
    pub fn vsock(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self::Vsock)
    }

    /// The next connection from the host. Containers reach vsock too; they are turned away.
    pub(crate) async fn accept(&self) -> io::Result<Connection> {
        loop {
            match self {
                Self::Vsock(listener) => {
                    let (stream, peer) = listener.accept().await?;
                    if peer.cid() == VMADDR_CID_HOST {
                        return Ok(Connection { stream: Stream::Vsock(stream), _permit: None });
                    }
                    warn!(cid = peer.cid(), "turned away a connection that is not from the host");
                }
                Self::Unix(listener) => {
                    let (stream, _) = listener.accept().await?;
                    return Ok(Connection { stream: Stream::Unix(stream), _permit: None });
                }
            }
        }
    }
}

/// A connection from the host.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    /// Its place among those that may be open at a time.
    _permit: Option<OwnedSemaphorePermit>,
}

#[derive(Debug)]
enum Stream {
    Vsock(VsockStream),
    Unix(UnixStream),
}

impl Connection {
    /// Counts it as long as it lives.
    pub(crate) fn counted(self, permit: OwnedSemaphorePermit) -> Self {
        Self { _permit: Some(permit), ..self }
    }

    fn stream(self: Pin<&mut Self>) -> &mut Stream {
        &mut self.get_mut().stream
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.stream() {
            Stream::Vsock(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.stream() {
            Stream::Vsock(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.stream() {
            Stream::Vsock(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.stream() {
            Stream::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
