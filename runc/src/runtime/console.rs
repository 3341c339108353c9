//! Receiving a terminal: the runtime opens a pseudo-terminal inside the container and sends its master end over a unix socket
//! (`--console-socket`, <https://github.com/opencontainers/runc/blob/main/docs/terminals.md>).

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use kuasar_sandboxers::{Error, Result};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    time::timeout,
};
use tracing::warn;

/// The runtime sends before it exits, so by the time we look it is there.
const RECEIVE_LIMIT: Duration = Duration::from_secs(10);

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A socket that waits for one terminal; gone when dropped.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    /// Socket addresses hold 107 bytes, less than a path with two long ids, so both sides go through this descriptor.
    directory: File,
    name: String,
}

impl ConsoleSocket {
    /// A socket in `directory`.
    pub(crate) fn listen(directory: &Path) -> Result<Self> {
        let name = format!("console-{}", COUNTER.fetch_add(1, Ordering::Relaxed));
        let file = File::open(directory).map_err(Error::io("open", directory))?;
        let address = format!("/proc/self/fd/{}/{name}", file.as_raw_fd());
        let listener = match UnixListener::bind(&address) {
            // Of an earlier daemon that died before it could remove it.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                std::fs::remove_file(&address).and_then(|()| UnixListener::bind(&address))
            }
            bound => bound,
        };
        Ok(Self { listener: listener.map_err(Error::io("listen on", directory.join(&name)))?, directory: file, name })
    }

    /// What to tell the runtime.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}/{}", std::process::id(), self.directory.as_raw_fd(), self.name).into()
    }

    /// The terminal's master end.
    pub(crate) async fn receive(&self) -> Result<OwnedFd> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            loop {
                stream.readable().await?;
                match stream.try_io(Interest::READABLE, || take_descriptor(&stream)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    taken => return taken,
                }
            }
        };
        match timeout(RECEIVE_LIMIT, receive).await {
            Ok(received) => received.map_err(Error::failed("receive the terminal from the OCI runtime")),
            Err(_) => Err(Error::TimedOut {
                operation: "receiving the terminal from the OCI runtime".into(),
                seconds: RECEIVE_LIMIT.as_secs(),
            }),
        }
    }
}

fn take_descriptor(stream: &UnixStream) -> io::Result<OwnedFd> {
    // The message itself is the terminal's name, which is of no use outside the container.
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(stream, &mut [io::IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let descriptor = descriptors.next().and_then(|mut descriptors| descriptors.next());
    descriptor
        .ok_or_else(|| io::Error::new(io::ErrorKind::UnexpectedEof, "the runtime closed the console socket without sending it"))
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let address = format!("/proc/self/fd/{}/{}", self.directory.as_raw_fd(), self.name);
        if let Err(error) = std::fs::remove_file(&address)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, socket = self.name, "cannot remove a console socket");
        }
    }
}
