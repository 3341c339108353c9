//! Which interfaces a pod has, and how each kind is carried into a machine.
//!
//! | kind | carried |
//! |---|---|
//! | veth, macvlan, macvtap, ipvlan (L2), netkit (L2), bridge, bond, team, vlan, dummy, a physical or SR-IOV Ethernet device | by a tap of ours and redirection both ways |
//! | a tap | opened: what its other side is, is the plugin's affair |
//! | a port of a bridge, bond or team in the same namespace | as a part of that |
//! | one that is down and has no address (`tunl0`, `sit0`: the kernel puts them into every namespace) | not at all |
//! | ipvlan and netkit in L3 mode, ipvtap, tun, WireGuard, IP tunnels, IPoIB, VRF and whatever is not Ethernet | refused: a machine speaks Ethernet, with ARP and neighbour discovery |
//! | one on top of another of the same namespace (vlan, macvlan) | refused: everything that comes in on the lower one goes to the machine |

use std::collections::HashSet;

use kuasar_sandboxers::{Error, Result};
use netlink_packet_core::Nla;
use netlink_packet_route::link::{
    InfoData, InfoIpVlan, InfoKind, InfoTun, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};

use crate::spec::MacAddress;

/// More than any pod has, and than machines have slots for.
pub(super) const INTERFACES_MAX: usize = 16;

/// Our taps begin so, followed by the index of the interface they belong to.
const TAP_PREFIX: &str = "kuasar";

/// The largest MTU of a tap: an IP packet less an Ethernet header.
const MTU_MAX: u32 = 65_521;

/// `IFLA_TUN_TYPE` and its value for a tap, `IFLA_TUN_MULTI_QUEUE`: linux/if_link.h.
const TUN_TYPE: u16 = 3;
const TUN_TYPE_TAP: u8 = 2;
const TUN_MULTI_QUEUE: u16 = 7;

/// How an interface is carried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By a tap of our own.
    Redirect,
    /// It is a tap, with several queues or one.
    Open {
        /// `IFF_MULTI_QUEUE` has to be given again when it is opened.
        multi_queue: bool,
    },
}

/// An interface that is carried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: MacAddress,
    pub(super) mtu: u32,
    pub(super) way: Way,
}

impl Interface {
    /// The name of our tap for it.
    pub(super) fn tap(&self) -> String {
        format!("{TAP_PREFIX}{}", self.index)
    }
}

/// Whether an interface is a tap of ours.
pub(super) fn is_ours(link: &LinkMessage) -> bool {
    let number = name(link).strip_prefix(TAP_PREFIX);
    kind(link) == Some(&InfoKind::Tun)
        && number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// What is to be carried, of all interfaces of a namespace; `addressed` are the indices of those that have addresses.
pub(super) fn choose(links: &[LinkMessage], addressed: &HashSet<u32>) -> Result<Vec<Interface>> {
    let mut chosen: Vec<Interface> = Vec::new();
    for link in links {
        let up = link.header.flags.contains(LinkFlags::Up);
        let skipped = link.header.flags.contains(LinkFlags::Loopback)
            || is_ours(link)
            || controller(link)
                .is_some_and(|above| links.iter().any(|other| other.header.index == above && carries_ports(other)));
        if skipped || !up && !addressed.contains(&link.header.index) {
            continue;
        }
        let interface = examine(link)?;
        if let Some(twin) = chosen.iter().find(|other| other.mac == interface.mac) {
            return Err(refused(
                link,
                &format!("it has the same MAC address as {}, by which the guest would tell them apart", twin.name),
            ));
        }
        if chosen.len() == INTERFACES_MAX {
            return Err(Error::invalid("network of the pod", format!("it has more than {INTERFACES_MAX} interfaces")));
        }
        chosen.push(interface);
    }
    for link in links {
        let stacked = |interface: &Interface| kind(link) != Some(&InfoKind::Veth) && lower(link) == Some(interface.index);
        let carried = |index| chosen.iter().any(|interface| interface.index == index);
        if carried(link.header.index)
            && let Some(below) = chosen.iter().find(|interface| stacked(interface))
        {
            let why = format!(
                "it is on top of {}, whose traffic all goes to the machine: make it inside of the pod, or on the node's side",
                below.name
            );
            return Err(refused(link, &why));
        }
    }
    Ok(chosen)
}

fn examine(link: &LinkMessage) -> Result<Interface> {
    const L2: &str = "use its L2 mode";
    let way = match kind(link) {
        Some(InfoKind::IpVlan) if mode(link) != Some(IpVlanMode::L2) => {
            return Err(refused(link, &format!("in L3 mode it takes no Ethernet frames: {L2}")));
        }
        Some(InfoKind::Netkit) if link.header.flags.contains(LinkFlags::Noarp) => {
            return Err(refused(link, &format!("in L3 mode it takes no Ethernet frames: {L2}")));
        }
        Some(InfoKind::Tun) => match tun(link, TUN_TYPE) {
            Some(TUN_TYPE_TAP) => Way::Open { multi_queue: tun(link, TUN_MULTI_QUEUE) == Some(1) },
            _ => return Err(refused(link, "it carries IP packets, and a machine needs Ethernet frames: use a tap")),
        },
        // A device with a driver of its own, physical or virtual.
        None
        | Some(
            InfoKind::Veth
            | InfoKind::MacVlan
            | InfoKind::MacVtap
            | InfoKind::IpVlan
            | InfoKind::Netkit
            | InfoKind::Bridge
            | InfoKind::Bond
            | InfoKind::Team
            | InfoKind::Vlan
            | InfoKind::Dummy,
        ) => Way::Redirect,
        Some(_) => {
            let why = "this kind cannot be carried into a machine: use veth, macvlan, ipvlan in L2 mode, a bridge or a tap";
            return Err(refused(link, why));
        }
    };
    if link.header.link_layer_type != LinkLayerType::Ether {
        let why = "it is not an Ethernet interface, and a machine has no other: use veth, macvlan, ipvlan in L2 mode or a tap";
        return Err(refused(link, why));
    }
    let address = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => <[u8; 6]>::try_from(address.as_slice()).ok(),
        _ => None,
    });
    let mac = address.map(MacAddress).ok_or_else(|| refused(link, "it has no MAC address"))?;
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some((*mtu).min(MTU_MAX)),
        _ => None,
    });
    let mtu = mtu.ok_or_else(|| refused(link, "the kernel tells no MTU of it"))?;
    Ok(Interface { index: link.header.index, name: name(link).to_owned(), mac, mtu, way })
}

fn refused(link: &LinkMessage, why: &str) -> Error {
    let kind = kind(link).map_or_else(|| "no virtual one".to_owned(), ToString::to_string);
    Error::Unsupported { operation: "the pod's network", why: format!("interface {} ({kind}): {why}", name(link)) }
}

fn name(link: &LinkMessage) -> &str {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    });
    name.unwrap_or_default()
}

fn info(link: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    let info = link.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(info) => Some(info),
        _ => None,
    });
    info.flatten()
}

fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    info(link).find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

fn mode(link: &LinkMessage) -> Option<IpVlanMode> {
    info(link).find_map(|info| match info {
        LinkInfo::Data(InfoData::IpVlan(data)) => data.iter().find_map(|data| match data {
            InfoIpVlan::Mode(mode) => Some(*mode),
            _ => None,
        }),
        _ => None,
    })
}

/// A byte of what the kernel says about a tun device.
fn tun(link: &LinkMessage, attribute: u16) -> Option<u8> {
    info(link).find_map(|info| match info {
        LinkInfo::Data(InfoData::Tun(data)) => data.iter().find_map(|data| match data {
            InfoTun::Other(value) if value.kind() == attribute && value.value_len() == 1 => {
                let mut byte = [0];
                value.emit_value(&mut byte);
                Some(byte[0])
            }
            _ => None,
        }),
        _ => None,
    })
}

/// The interface that it is a port of.
fn controller(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

fn carries_ports(link: &LinkMessage) -> bool {
    matches!(kind(link), Some(InfoKind::Bridge | InfoKind::Bond | InfoKind::Team))
}

/// The interface of the same namespace that it is on top of.
fn lower(link: &LinkMessage) -> Option<u32> {
    let elsewhere = link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::LinkNetNsId(_)));
    let below = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    });
    below.filter(|index| !elsewhere && *index != link.header.index)
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::link::InfoVeth;

    use super::*;

    fn link(index: u32, name: &str, kind: Option<InfoKind>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.header.flags = LinkFlags::Up;
        link.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Mtu(1400),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, u8::try_from(index).unwrap()]),
        ];
        link.attributes.extend(kind.map(|kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])));
        link
    }

    fn with(mut link: LinkMessage, data: InfoData) -> LinkMessage {
        for attribute in &mut link.attributes {
            if let LinkAttribute::LinkInfo(info) = attribute {
                info.push(LinkInfo::Data(data.clone()));
            }
        }
        link
    }

    fn names(links: &[LinkMessage]) -> Result<Vec<String>, String> {
        let chosen = choose(links, &HashSet::new()).map_err(|error| error.to_string())?;
        Ok(chosen.into_iter().map(|interface| interface.name).collect())
    }

    fn refusal(links: &[LinkMessage]) -> String {
        names(links).unwrap_err()
    }

    fn tun_of(attributes: &[(u16, u8)]) -> InfoData {
        let other = |(kind, value): &(u16, u8)| InfoTun::Other(DefaultNla::new(*kind, vec![*value]));
        InfoData::Tun(attributes.iter().map(other).collect())
    }

    #[test]
    fn kinds_that_frames_go_through_are_carried() {
        let mut links = vec![link(1, "lo", None)];
        links[0].header.flags |= LinkFlags::Loopback;
        for kind in [InfoKind::Veth, InfoKind::MacVlan, InfoKind::MacVtap, InfoKind::Bridge, InfoKind::Vlan, InfoKind::Bond] {
            let index = u32::try_from(links.len()).unwrap() + 1;
            links.push(link(index, &kind.to_string(), Some(kind)));
        }
        links.push(link(20, "physical", None));
        links.push(with(link(21, "ipvlan", Some(InfoKind::IpVlan)), InfoData::IpVlan(vec![InfoIpVlan::Mode(IpVlanMode::L2)])));
        let carried = names(&links).unwrap();
        assert_eq!(carried, ["veth", "macvlan", "macvtap", "bridge", "vlan", "bond", "physical", "ipvlan"]);
    }

    #[test]
    fn kinds_without_frames_are_refused_by_name() {
        let l3 = with(link(2, "eth0", Some(InfoKind::IpVlan)), InfoData::IpVlan(vec![InfoIpVlan::Mode(IpVlanMode::L3)]));
        assert!(refusal(&[l3]).contains("eth0 (ipvlan): in L3 mode"));
        let mut netkit = link(2, "eth0", Some(InfoKind::Netkit));
        assert!(names(std::slice::from_ref(&netkit)).is_ok());
        netkit.header.flags |= LinkFlags::Noarp;
        assert!(refusal(&[netkit]).contains("(netkit)"));
        assert!(refusal(&[link(2, "wg0", Some(InfoKind::Wireguard))]).contains("wg0 (wireguard)"));
        assert!(refusal(&[link(2, "vrf0", Some(InfoKind::Vrf))]).contains("(vrf)"));
        let mut infiniband = link(2, "ib0", None);
        infiniband.header.link_layer_type = LinkLayerType::Infiniband;
        assert!(refusal(&[infiniband]).contains("not an Ethernet interface"));
        let l3_tun = with(link(2, "tun0", Some(InfoKind::Tun)), tun_of(&[(TUN_TYPE, 1)]));
        assert!(refusal(&[l3_tun]).contains("use a tap"));
    }

    #[test]
    fn a_tap_is_opened() {
        let tap = with(link(2, "eth0", Some(InfoKind::Tun)), tun_of(&[(TUN_TYPE, 2), (TUN_MULTI_QUEUE, 1)]));
        assert_eq!(choose(&[tap], &HashSet::new()).unwrap()[0].way, Way::Open { multi_queue: true });
        let tap = with(link(2, "eth0", Some(InfoKind::Tun)), tun_of(&[(TUN_TYPE, 2), (TUN_MULTI_QUEUE, 0)]));
        assert_eq!(choose(&[tap], &HashSet::new()).unwrap()[0].way, Way::Open { multi_queue: false });
    }

    #[test]
    fn what_belongs_to_another_or_to_nobody_is_left_out() {
        let mut port = link(2, "port", Some(InfoKind::Veth));
        port.attributes.push(LinkAttribute::Controller(3));
        let bridge = link(3, "br0", Some(InfoKind::Bridge));
        let ours = with(link(4, "kuasar7", Some(InfoKind::Tun)), tun_of(&[(TUN_TYPE, 2)]));
        let mut tunnel = link(5, "tunl0", Some(InfoKind::IpIp));
        tunnel.header.flags = LinkFlags::empty();
        let links = [port, bridge, ours, tunnel];
        assert_eq!(names(&links).unwrap(), ["br0"]);
        // It is not left out when it has an address.
        assert!(choose(&links, &HashSet::from([5])).unwrap_err().to_string().contains("tunl0 (ipip)"));
    }

    #[test]
    fn ambiguous_and_stacked_ones_are_refused() {
        let (first, mut second) = (link(2, "a", Some(InfoKind::Veth)), link(3, "b", Some(InfoKind::Veth)));
        second.attributes[2] = first.attributes[2].clone();
        assert!(refusal(&[first.clone(), second]).contains("same MAC address as a"));
        let mut vlan = link(4, "a.5", Some(InfoKind::Vlan));
        vlan.attributes.push(LinkAttribute::Link(2));
        assert!(refusal(&[first.clone(), vlan.clone()]).contains("on top of a"));
        // Of the same index, in another namespace.
        vlan.attributes.push(LinkAttribute::LinkNetNsId(0));
        assert!(names(&[first.clone(), vlan]).is_ok());
        let mut peer = with(link(5, "peer", Some(InfoKind::Veth)), InfoData::Veth(InfoVeth::Peer(LinkMessage::default())));
        peer.attributes.push(LinkAttribute::Link(2));
        assert!(names(&[first, peer]).is_ok());
        let many: Vec<LinkMessage> = (2..20).map(|index| link(index, "x", Some(InfoKind::Veth))).collect();
        assert!(refusal(&many).contains("more than 16"));
    }
}
