//! Waiting for devices: the kernel tells of each one on a netlink socket.

use std::{io, os::fd::AsRawFd, time::Duration};

use kuasar_sandboxers::{Error, Result, watch};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket},
};
use tokio::{io::Interest, time::timeout};

/// How long a device may take to appear: the host has added it before it asks.
const APPEARANCE: Duration = Duration::from_secs(10);

/// The kernel's multicast group; udev's is 2.
const KERNEL: u32 = 1;

/// Tries something until it succeeds, again after each event of a device. `None` means that it is not there yet.
///
/// # Errors
/// [`Error::TimedOut`] when it does not appear, and whatever `attempt` gives.
pub(crate) async fn appear<T>(what: &str, mut attempt: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    // Mostly it is there.
    if let Some(found) = attempt()? {
        return Ok(found);
    }
    let failed = || Error::failed("listen for devices");
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let netlink = socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)
        .and_then(|netlink| bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, KERNEL)).map(|()| netlink))
        .map_err(|errno| failed()(io::Error::from(errno)))?;
    let netlink = watch(netlink, Interest::READABLE).map_err(failed())?;
    let work = async {
        loop {
            if let Some(found) = attempt()? {
                return Ok(found);
            }
            let mut ready = netlink.readable().await.map_err(failed())?;
            let mut event = [0; 8 << 10];
            match recv(netlink.as_raw_fd(), &mut event, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EAGAIN) => ready.clear_ready(),
                // Some were lost, perhaps the one.
                Ok(_) | Err(Errno::EINTR | Errno::ENOBUFS) => {}
                Err(errno) => return Err(failed()(io::Error::from(errno))),
            }
        }
    };
    let late = |_| Error::TimedOut { operation: format!("the appearance of {what}"), seconds: APPEARANCE.as_secs() };
    timeout(APPEARANCE, work).await.map_err(late)?
}
