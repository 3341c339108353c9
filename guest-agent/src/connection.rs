//! Connections from the host.

use std::{
    io,
    os::fd::AsRawFd,
    pin::Pin,
    task::{Context, Poll},
};

use kuasar_guest_protocol::PORT;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::OwnedSemaphorePermit,
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tracing::warn;

use crate::poke::{Pokes, Registered};

/// Where the host connects to.
#[derive(Debug)]
#[allow(private_interfaces)] // made by `vsock`
pub enum Listener {
    /// A vsock port; with pokes, if the host's device needs them.
    Vsock(VsockListener, Option<Pokes>),
    /// A unix socket: in tests, in place of a port.
    Unix(UnixListener),
}

impl Listener {
    /// Listens on a vsock port.
    ///
    /// # Errors
    /// The kernel's refusal: `EAFNOSUPPORT` as long as it has no vsock.
    pub(crate) fn vsock(port: u32, pokes: Option<Pokes>) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(|listener| Self::Vsock(listener, pokes))
    }

    /// The next connection from the host. Containers reach vsock too; they are turned away.
    pub(crate) async fn accept(&self) -> io::Result<Connection> {
        loop {
            match self {
                Self::Vsock(listener, pokes) => {
                    let (stream, peer) = listener.accept().await?;
                    if peer.cid() == VMADDR_CID_HOST {
                        let registered = pokes.as_ref().map(|pokes| {
                            let calls = listener.local_addr().is_ok_and(|ours| ours.port() == PORT);
                            pokes.register(calls.then(|| stream.as_raw_fd()))
                        });
                        return Ok(Connection { registered, stream: Stream::Vsock(stream), _permit: None });
                    }
                    warn!(cid = peer.cid(), "turned away a connection that is not from the host");
                }
                Self::Unix(listener) => {
                    let (stream, _) = listener.accept().await?;
                    return Ok(Connection { registered: None, stream: Stream::Unix(stream), _permit: None });
                }
            }
        }
    }
}

/// A connection from the host.
#[derive(Debug)]
pub struct Connection {
    /// Dropped before the socket is closed.
    registered: Option<Registered>,
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

    /// The stream, and whom to tell when bytes have moved.
    fn parts(self: Pin<&mut Self>) -> (&mut Stream, Option<&Registered>) {
        let this = self.get_mut();
        (&mut this.stream, this.registered.as_ref())
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let (stream, registered) = self.parts();
        let result = match stream {
            Stream::Vsock(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        };
        if let (Poll::Ready(Ok(())), Some(registered)) = (&result, registered) {
            registered.moved((buffer.filled().len() - before) as u64);
        }
        result
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let (stream, registered) = self.parts();
        let result = match stream {
            Stream::Vsock(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        };
        if let (Poll::Ready(Ok(length)), Some(registered)) = (&result, registered) {
            registered.moved(*length as u64);
        }
        result
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.parts().0 {
            Stream::Vsock(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.parts().0 {
            Stream::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
