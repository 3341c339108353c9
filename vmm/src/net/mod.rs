//! The pod's network: each interface of the namespace that CNI has filled becomes a NIC of the machine.
//!
//! ```text
//!        the pod's network namespace                                    the machine
//!   ───▶ eth0 ──ingress: u32, mirred──▶ kuasar2 (tap) ──▶ VMM ──▶ virtio-net, named eth0: same MAC, MTU,
//!   ◀─── eth0 ◀──ingress: u32, mirred── kuasar2 (tap) ◀── VMM ◀── addresses, routes and permanent neighbours
//!          lo ──BPF sk_lookup──▶ our listener ──vsock 1026──▶ the guest's lo      (see [`forward`])
//! ```
//!
//! - **The interfaces keep their addresses.** Plugins want them when they undo their work (`bridge` finds by them what it has to take
//!   out of the masquerading), ipvlan finds its packets by them, and a daemon that starts anew reads them again. The namespace's own
//!   stack does not interfere: frames are taken before it sees them, so it answers no ARP and no ping, and what it may say about itself
//!   (a router solicitation) has the same addresses as the guest.
//! - **Duplicate address detection** has been done in the namespace by the plugin, with the same MAC address; the guest does not repeat
//!   it. Where it has failed, the address is not carried.
//! - **Offloads** go through: a tap has a header for them, and the VMM tells it what the guest takes. What the guest does not take the
//!   kernel does: checksums and segments are made when a packet is queued on the tap.
//! - **Taps** last as long as the descriptor, which the VMM holds. They are removed by [`disconnect`] too, whoever has them open.
//!
//! Which kinds of interfaces can be carried is told in `interfaces`.

mod addressing;
pub mod forward;
mod interfaces;
mod lookup;
mod namespace;
mod tc;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashMap, HashSet},
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    sync::Arc,
};

use kuasar_guest_protocol::agent;
use kuasar_sandboxers::{
    Error, Result,
    netlink::{Netlink, errno},
    undo::Undo,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkLayerType, LinkMessage,
};
use rustix::net::netdevice::name_to_index;
use tracing::debug;

use self::interfaces::{INTERFACES_MAX, Interface, Way};
use crate::{spec::Nic, sys};

/// rtnetlink(7)'s message types.
mod rtm {
    pub(super) const NEW_LINK: u16 = 16;
    pub(super) const DEL_LINK: u16 = 17;
    pub(super) const GET_LINK: u16 = 18;
    pub(super) const NEW_ADDRESS: u16 = 20;
    pub(super) const GET_ADDRESS: u16 = 22;
    pub(super) const NEW_ROUTE: u16 = 24;
    pub(super) const GET_ROUTE: u16 = 26;
    pub(super) const NEW_NEIGHBOUR: u16 = 28;
    pub(super) const GET_NEIGHBOUR: u16 = 30;
    pub(super) const NEW_QDISC: u16 = 36;
    pub(super) const DEL_QDISC: u16 = 37;
    pub(super) const NEW_FILTER: u16 = 44;
    pub(super) const DEL_FILTER: u16 = 45;
    pub(super) const GET_FILTER: u16 = 46;
}

/// How many interfaces are looked at, of which most can only be ports of a bridge.
const LINKS_MAX: usize = 16 * INTERFACES_MAX;

/// What the pod's network is, and the taps that carry it.
#[derive(Debug)]
pub struct PodNetwork {
    /// A NIC for each interface, in the order of `setup.interfaces`.
    pub nics: Vec<Nic>,
    /// What the guest is told.
    pub setup: GuestNetwork,
}

/// The network as the guest sets it up: fields of [`agent::SetUpRequest`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GuestNetwork {
    /// Interfaces, by their MAC addresses.
    pub interfaces: Vec<agent::Interface>,
    /// Routes, in an order in which they can be made.
    pub routes: Vec<agent::Route>,
    /// Neighbours that are not to be asked for.
    pub neighbours: Vec<agent::Neighbour>,
}

/// Looks at the namespace at a path, makes a tap for each interface in it, and redirects traffic both ways. The interfaces stay as they
/// are otherwise. What an earlier attempt has left is replaced.
///
/// # Errors
/// [`Error::Unsupported`] for an interface that cannot be carried, by its name; [`Error::Invalid`] for too many; others for what the kernel
/// refuses.
pub async fn connect(netns: &Path, undo: &mut Undo) -> Result<PodNetwork> {
    let path = netns.to_owned();
    undo.push(format!("disconnect {}", netns.display()), async move { disconnect(&path).await });
    let gone = || Error::invalid("netns", format!("{} is no network namespace, or no longer", netns.display()));
    namespace::within(netns, connect_here).await?.ok_or_else(gone)
}

/// Removes the taps and the redirection. Idempotent; a namespace that is gone is fine.
///
/// # Errors
/// When the kernel refuses.
pub async fn disconnect(netns: &Path) -> Result<()> {
    let work = || {
        let mut netlink = open()?;
        let links = links(&mut netlink)?;
        clear(&mut netlink, &links)
    };
    namespace::within(netns, work).await.map(Option::unwrap_or_default)
}

fn open() -> Result<Netlink> {
    Netlink::open().map_err(Error::failed("ask the kernel about the pod's network"))
}

fn links(netlink: &mut Netlink) -> Result<Vec<LinkMessage>> {
    netlink
        .list(rtm::GET_LINK, rtm::NEW_LINK, &LinkMessage::default(), LINKS_MAX)
        .map_err(Error::failed("list the interfaces of the pod's network"))
}

/// Removes what is ours. All of it is tried.
fn clear(netlink: &mut Netlink, links: &[LinkMessage]) -> Result<()> {
    let mut result = Ok(());
    let (taps, others): (Vec<_>, Vec<_>) = links.iter().partition(|link| interfaces::is_ours(link));
    // First the others: with its tap gone, a filter throws packets away and the kernel complains about it.
    for link in others {
        let index = link.header.index;
        let restored = tc::restore(netlink, index).map_err(Error::failed(format!("end the redirection of interface {index}")));
        result = result.and(restored);
    }
    for link in taps {
        let index = link.header.index;
        let mut tap = LinkMessage::default();
        tap.header.index = index;
        let removed = match netlink.request(rtm::DEL_LINK, 0, &tap) {
            // Its VMM has ended meanwhile.
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(()),
            removed => removed.map_err(Error::failed(format!("remove tap {index}"))),
        };
        result = result.and(removed);
    }
    result
}

fn connect_here() -> Result<PodNetwork> {
    let mut netlink = open()?;
    let mut found = links(&mut netlink)?;
    if found.iter().any(interfaces::is_ours) {
        clear(&mut netlink, &found)?;
        found = links(&mut netlink)?;
    }
    let addresses = addressing::addresses(&mut netlink)?;
    let addressed: HashSet<u32> = addresses.iter().map(|(index, _)| *index).collect();
    let chosen = interfaces::choose(&found, &addressed)?;
    let names: HashMap<u32, String> = chosen.iter().map(|interface| (interface.index, interface.name.clone())).collect();
    let setup = GuestNetwork {
        interfaces: chosen
            .iter()
            .map(|interface| agent::Interface {
                mac: interface.mac.0.to_vec(),
                name: interface.name.clone(),
                mtu: interface.mtu,
                addresses: addresses
                    .iter()
                    .filter(|(index, _)| *index == interface.index)
                    .map(|(_, address)| address.clone())
                    .collect(),
                ..Default::default()
            })
            .collect(),
        routes: addressing::routes(&mut netlink, &names)?,
        neighbours: addressing::neighbours(&mut netlink, &names)?,
    };
    let nics =
        chosen.iter().enumerate().map(|(index, interface)| carry(&mut netlink, index, interface)).collect::<Result<_>>()?;
    Ok(PodNetwork { nics, setup })
}

/// Makes the NIC for an interface.
fn carry(netlink: &mut Netlink, index: usize, interface: &Interface) -> Result<Nic> {
    let failed = |what: &str| Error::failed(format!("{what} for interface {} of the pod's network", interface.name));
    let tap = match interface.way {
        Way::Redirect => {
            let name = interface.tap();
            let tap = open_tap(&name, 0).map_err(failed("make a tap"))?;
            let number = name_to_index(netlink.fd(), &name).map_err(io::Error::from).map_err(failed("find the tap"))?;
            bring_up(netlink, number, interface.mtu).map_err(failed("bring up the tap"))?;
            tc::redirect(netlink, interface.index, number)
                .and_then(|()| tc::redirect(netlink, number, interface.index))
                .map_err(failed("redirect traffic (the kernel needs clsact, cls_u32 and act_mirred)"))?;
            tap
        }
        Way::Open { multi_queue } => open_tap(&interface.name, if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 })
            .map_err(failed("open the tap, which nobody else may have open,"))?,
    };
    Ok(Nic { index, mac: interface.mac, mtu: interface.mtu, tap: Arc::new(tap), vhost: vhost().map(Arc::new) })
}

fn open_tap(name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let tun = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    sys::attach_tun(tun.as_fd(), name, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags)?;
    Ok(tun.into())
}

/// Lets a tap carry frames. It gets no address, or the guest would hear the namespace look for neighbours and routers.
fn bring_up(netlink: &mut Netlink, index: u32, mtu: u32) -> io::Result<()> {
    let link = |attributes| {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes = attributes;
        link
    };
    let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let silent = link(vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![none])])]);
    match netlink.request(rtm::NEW_LINK, 0, &silent) {
        // A kernel without IPv6.
        Err(error) if errno(&error) == Some(libc::EAFNOSUPPORT) => {}
        done => done?,
    }
    let mut up = link(vec![LinkAttribute::Mtu(mtu)]);
    up.header.flags = LinkFlags::Up;
    up.header.change_mask = LinkFlags::Up;
    netlink.request(rtm::NEW_LINK, 0, &up)
}

/// The kernel's own virtio-net, where it has it.
fn vhost() -> Option<OwnedFd> {
    match File::options().read(true).write(true).open("/dev/vhost-net") {
        Ok(file) => Some(file.into()),
        Err(error) => {
            debug!(%error, "no /dev/vhost-net: the VMM carries packets itself");
            None
        }
    }
}
