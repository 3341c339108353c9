//! Connections to the guest's vsock ports.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use kuasar_sandboxers::{fdstore::FdStore, watch};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, connect, getsockopt, socket, sockopt},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf, unix::AsyncFd},
    sync::Semaphore,
};
use tracing::debug;

use crate::spec::VsockAddress;

/// The longest answer to `CONNECT`: `OK` and a port, in bytes.
const ANSWER: usize = 32;

/// How many connections to a guest may wait for an answer at a time.
const UNANSWERED: usize = 64;

/// What the names begin with of connections that are left with others until they are answered.
const LEFT: &str = "vm-dial-";

/// A connection to the guest, or anything else that is one stream of bytes.
#[derive(Debug)]
pub(crate) struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    /// Takes a connected, non-blocking socket.
    ///
    /// # Errors
    /// When the runtime cannot watch it.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        watch(socket, Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// Lets the runtime go of it.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.0.into_inner()
    }

    async fn open(socket: OwnedFd, address: &(impl SockaddrLike + Sync)) -> io::Result<Self> {
        match connect(std::os::fd::AsRawFd::as_raw_fd(&socket), address) {
            Ok(()) => return Self::new(socket),
            Err(Errno::EINPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        let connection = Self::new(socket)?;
        connection.0.writable().await?.retain_ready();
        match getsockopt(&connection.0, sockopt::SocketError)? {
            0 => Ok(connection),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Waits for what a device of the hybrid protocol answers.
    async fn answered(mut self) -> io::Result<Self> {
        // Byte by byte: what follows the line is the guest's.
        let mut line = Vec::new();
        loop {
            match self.read_u8().await {
                Ok(b'\n') => break,
                Ok(byte) if line.len() < ANSWER => line.push(byte),
                Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "the vsock device answers with garbage")),
                // Nobody listens on the port.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                Err(error) => return Err(error),
            }
        }
        if line.starts_with(b"OK ") { Ok(self) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
    }
}

fn new_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)?)
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Connects to a guest's ports.
///
/// vhost-device-vsock 0.3 must not find a connection closed that it has not answered. When it has not read the request yet, it looks at that
/// again and again, for the rest of its life, with all of a processor; when it has, it panics at the guest's answer, and is silent from then
/// on. So nobody's impatience closes one, and nor does a daemon's death.
#[derive(Debug)]
pub(crate) struct Dialler {
    address: VsockAddress,
    fds: FdStore,
    unanswered: Arc<Semaphore>,
}

impl Dialler {
    /// With `fds` are left, meanwhile, connections that must outlive this process.
    pub(crate) fn new(address: VsockAddress, fds: FdStore) -> Self {
        Self { address, fds, unanswered: Arc::new(Semaphore::new(UNANSWERED)) }
    }

    /// Connects to a port of the guest.
    ///
    /// # Errors
    /// [`io::ErrorKind::ConnectionRefused`] and its like while nobody listens there, which is so until the guest has booted.
    pub(crate) async fn dial(&self, port: u32) -> io::Result<Connection> {
        match &self.address {
            VsockAddress::Cid(cid) => Connection::open(new_socket(AddressFamily::Vsock)?, &VsockAddr::new(*cid, port)).await,
            VsockAddress::Hybrid(path) => self.dial_hybrid(path, port).await,
        }
    }

    /// The hybrid protocol of Firecracker's vsock device, which Cloud Hypervisor and vhost-device-vsock have too.
    async fn dial_hybrid(&self, path: &Path, port: u32) -> io::Result<Connection> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let address = UnixAddr::new(path.as_os_str().as_bytes())?;
        let permit = self.unanswered.clone().acquire_owned().await.map_err(io::Error::other)?;
        let socket = new_socket(AddressFamily::Unix)?;
        let name = format!("{LEFT}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let held = self.fds.leave(name, &[socket.as_fd()]).map_err(io::Error::other)?;
        // Goes on when this is not waited for any more.
        let answered = tokio::spawn(async move {
            let _until_answered = (permit, held);
            let mut connection = Connection::open(socket, &address).await?;
            connection.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
            connection.answered().await
        });
        answered.await?
    }
}

/// Waits for the answers to what an earlier daemon has asked for, of which nobody knows any more what it was for.
pub(crate) fn outwait(fds: &FdStore) {
    for (descriptors, held) in fds.take_all(LEFT) {
        tokio::spawn(async move {
            let _until_answered = held;
            for socket in descriptors {
                if let Err(error) = async { Connection::new(socket)?.answered().await }.await {
                    debug!(%error, "a connection that an earlier daemon asked for");
                }
            }
        });
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *unfilled)?)) {
                Ok(Ok(length)) => {
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            let send = |fd: &AsyncFd<OwnedFd>| Ok(rustix::net::send(fd.get_ref(), bytes, rustix::net::SendFlags::NOSIGNAL)?);
            match guard.try_io(send) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(sent) => return Poll::Ready(sent),
                Err(_) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Write) {
            Ok(()) | Err(rustix::io::Errno::NOTCONN) => Poll::Ready(Ok(())),
            Err(errno) => Poll::Ready(Err(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kuasar_sandboxers::fdstore::MemoryHolder;
    use tokio::{
        net::{UnixListener, UnixStream},
        time::timeout,
    };

    use super::*;

    /// A vsock device that answers a connection with these bytes.
    async fn dialled(answer: &'static [u8]) -> io::Result<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let device = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1024\n");
            stream.write_all(answer).await.unwrap();
        });
        let result = async {
            let mut connection = Dialler::new(VsockAddress::Hybrid(path), FdStore::default()).dial(1024).await?;
            let mut rest = Vec::new();
            connection.read_to_end(&mut rest).await?;
            Ok(rest)
        };
        let result = result.await;
        device.await.unwrap();
        result
    }

    #[tokio::test]
    async fn hybrid_connections() {
        assert_eq!(dialled(b"OK 1073741824\nhello").await.unwrap(), b"hello");
        for refused in [&b""[..], b"ERR\n", b"OK"] {
            assert_eq!(dialled(refused).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        }
        assert_eq!(dialled(&[b'x'; 100]).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn without_a_device() {
        let error =
            Dialler::new(VsockAddress::Hybrid("/nonexistent/vsock".into()), FdStore::default()).dial(1024).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn nothing_is_closed_that_was_not_answered() {
        let (dir, holder) = (tempfile::tempdir().unwrap(), MemoryHolder::default());
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let dialled = tokio::spawn(async move {
            let dialler = Dialler::new(VsockAddress::Hybrid(path), holder.store());
            let given_up = timeout(Duration::from_millis(10), dialler.dial(1024)).await;
            (holder, given_up.is_err())
        });
        let (holder, given_up) = dialled.await.unwrap();
        assert!(given_up);
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = [0; 13];
        stream.read_exact(&mut asked).await.unwrap();
        assert_eq!(holder.names().len(), 1);
        stream.write_all(b"OK 1\n").await.unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        assert!(holder.names().is_empty());
    }

    #[tokio::test]
    async fn what_an_earlier_daemon_has_asked_for_is_waited_for() {
        let (mut device, ours) = UnixStream::pair().unwrap();
        let holder = MemoryHolder::default();
        let first = holder.store();
        std::mem::forget(first.leave(format!("{LEFT}1-1"), &[ours.as_fd()]).unwrap());
        drop(ours);
        let second = holder.store();
        outwait(&second);
        second.release_rest(&[]);
        tokio::task::yield_now().await;
        assert_eq!(device.try_read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        device.write_all(b"OK 1\n").await.unwrap();
        assert_eq!(device.read(&mut [0]).await.unwrap(), 0);
        assert!(holder.names().is_empty());
    }
}
