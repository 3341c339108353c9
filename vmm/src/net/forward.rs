//! Port-forward: connections to the loopback interface of the pod's namespace reach the guest's.
//!
//! containerd enters the pod's network namespace for `crictl port-forward` and connects to localhost there, where nothing of a pod in a
//! machine listens. So a listener of ours takes every TCP connection to a loopback address, whatever its port (see `lookup`), and each is
//! carried over vsock to the agent, which connects to that port in the guest.
//!
//! The listeners and the program's link are descriptors that are left for the daemon's successors: connections that come meanwhile wait
//! in the listeners' queues. They also keep the network namespace, so a [`Forwarder`] has to go when the pod stops.

use std::{
    fmt::Debug,
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kuasar_guest_protocol::forward;
use kuasar_sandboxers::{
    Error, Result,
    fdstore::{FdStore, Held},
    netlink::Netlink,
};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::{lookup, namespace, rtm};

/// How many connections of a pod are carried at a time; the next ones wait.
const CONNECTIONS_MAX: usize = 128;

/// How long the guest may take to connect to its own loopback interface.
const OPENING: Duration = Duration::from_secs(10);

/// How long nothing is accepted after an error, which is a lack of descriptors or memory.
const RESPITE: Duration = Duration::from_millis(100);

/// The loopback interface of every namespace.
const LOOPBACK: u32 = 1;

/// The listeners of a pod.
#[derive(Debug)]
pub struct Forwarder {
    v4: TcpListener,
    /// Where the kernel has IPv6.
    v6: Option<TcpListener>,
    connections: Arc<Semaphore>,
    /// It was said that no more connections are taken.
    is_full: AtomicBool,
    /// The program is attached as long as this is open.
    _link: OwnedFd,
    _held: Held,
}

impl Forwarder {
    /// Listens in the namespace at a path, and leaves the listeners in `fds` under a name. Within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the kernel has no `sk_lookup` (Linux 5.9) or forbids it; pods run without it all the same.
    pub async fn attach(netns: &Path, fds: &FdStore, name: String) -> Result<Self> {
        let path = netns.to_owned();
        let gone = || Error::invalid("netns", format!("{} is no network namespace, or no longer", netns.display()));
        let (link, v4, v6) = namespace::within(netns, move || listen(&path)).await?.ok_or_else(gone)?;
        let mut descriptors = vec![link.as_fd(), v4.as_fd()];
        descriptors.extend(v6.as_ref().map(AsFd::as_fd));
        let held = fds.leave(name, &descriptors)?;
        Self::new(link, v4, v6, held)
    }

    /// Goes on with what an earlier daemon has left under a name; `None` when it has left nothing. Within a tokio runtime.
    ///
    /// # Errors
    /// When it is not what [`Self::attach`] leaves.
    pub fn adopt(fds: &FdStore, name: &str) -> Result<Option<Self>> {
        let Some((descriptors, held)) = fds.take_of_namespace(name) else { return Ok(None) };
        let mut descriptors = descriptors.into_iter();
        let (Some(link), Some(v4), v6, None) = (descriptors.next(), descriptors.next(), descriptors.next(), descriptors.next())
        else {
            return Err(Error::invalid(name, "it is not the link and the listeners of a port-forward"));
        };
        Self::new(link, v4.into(), v6.map(StdListener::from), held).map(Some)
    }

    fn new(link: OwnedFd, v4: StdListener, v6: Option<StdListener>, held: Held) -> Result<Self> {
        let watch = |listener| TcpListener::from_std(listener).map_err(Error::failed("watch the listener of a port-forward"));
        Ok(Self {
            v4: watch(v4)?,
            v6: v6.map(watch).transpose()?,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            is_full: AtomicBool::new(false),
            _link: link,
            _held: held,
        })
    }

    /// Carries connections until it is dropped, and those with it. `dial` connects to the agent's
    /// [`FORWARD_PORT`](kuasar_guest_protocol::FORWARD_PORT); what goes over that connection is done here.
    pub async fn run<D, F, S>(&self, dial: D)
    where
        D: Fn() -> F + Clone + Send + 'static,
        F: Future<Output = Result<S>> + Send,
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut running = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.accept() => accepted,
                Some(ended) = running.join_next() => {
                    if let Err(error) = ended {
                        warn!(%error, "a port-forward ended badly");
                    }
                    continue;
                }
            };
            match accepted {
                Ok((mut stream, port, permit)) => {
                    let dial = dial.clone();
                    running.spawn(async move {
                        if let Err(error) = carry(&mut stream, port, dial).await {
                            debug!(port, error = error.report(), "a port-forward was broken off");
                            // The client sees a reset, not the end of the data.
                            if let Err(error) = stream.set_zero_linger() {
                                debug!(port, %error, "a port-forward cannot be reset");
                            }
                        }
                        drop((stream, permit));
                    });
                }
                Err(error) => {
                    warn!(%error, "cannot accept a connection to a pod's loopback interface");
                    sleep(RESPITE).await;
                }
            }
        }
    }

    /// The next connection, and the port that was meant. No connection is lost if this is dropped.
    async fn accept(&self) -> io::Result<(TcpStream, u16, OwnedSemaphorePermit)> {
        let permit = match self.connections.clone().try_acquire_owned() {
            Ok(permit) => {
                self.is_full.store(false, Ordering::Relaxed);
                permit
            }
            Err(_) => {
                if !self.is_full.swap(true, Ordering::Relaxed) {
                    warn!(
                        most = CONNECTIONS_MAX,
                        "the pod's port-forwards have as many connections as they may; the next ones wait"
                    );
                }
                self.connections.clone().acquire_owned().await.map_err(io::Error::other)?
            }
        };
        let v6 = async {
            match &self.v6 {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        let (stream, _) = tokio::select! {
            accepted = self.v4.accept() => accepted?,
            accepted = v6 => accepted?,
        };
        let port = stream.local_addr()?.port();
        Ok((stream, port, permit))
    }
}

/// Carries one connection to its end.
async fn carry<D, F, S>(stream: &mut TcpStream, port: u16, dial: D) -> Result<()>
where
    D: FnOnce() -> F,
    F: Future<Output = Result<S>>,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let open = async move {
        let mut carrier = dial().await?;
        let connected = forward::request(&mut carrier, port).await.map_err(Error::failed("ask the guest for a connection"))?;
        Ok::<_, Error>((carrier, connected))
    };
    let too_long = |_| Error::TimedOut { operation: "the guest's connecting".into(), seconds: OPENING.as_secs() };
    let (mut carrier, connected) = timeout(OPENING, open).await.map_err(too_long)??;
    if !connected {
        return Err(Error::Unavailable { what: format!("port {port} of the guest"), why: "nothing listens there".into() });
    }
    forward::relay(stream, &mut carrier).await.map_err(Error::failed("carry a connection"))
}

/// Listens in the calling thread's network namespace, which is the one at `netns`.
fn listen(netns: &Path) -> Result<(OwnedFd, StdListener, Option<StdListener>)> {
    bring_loopback_up().map_err(Error::failed("bring up the loopback interface of the pod's network"))?;
    let bind = |address: SocketAddr| {
        let listener = StdListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok::<_, io::Error>(listener)
    };
    let failed = || Error::failed("listen on the loopback interface of the pod's network");
    let v4 = bind((Ipv4Addr::LOCALHOST, 0).into()).map_err(failed())?;
    let v6 = match bind((Ipv6Addr::LOCALHOST, 0).into()) {
        Ok(listener) => Some(listener),
        // IPv6 is not in the kernel, or not in this namespace.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)) => None,
        Err(error) => return Err(failed()(error)),
    };
    let namespace = File::open(netns).map_err(Error::io("open network namespace", netns))?;
    let link = lookup::attach(namespace.as_fd(), v4.as_fd(), v6.as_ref().map(AsFd::as_fd)).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::EINVAL | libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP) => Error::Unsupported {
                operation: "port-forward into a machine",
                why: format!("the kernel takes no sk_lookup program ({error}): it needs Linux 5.9 with CONFIG_BPF_SYSCALL"),
            },
            _ => Error::failed("attach the port-forward to the pod's network")(error),
        }
    })?;
    Ok((link, v4, v6))
}

/// The plugin does that, where there is one.
fn bring_loopback_up() -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = LOOPBACK;
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    Netlink::open()?.request(rtm::NEW_LINK, 0, &link)
}
