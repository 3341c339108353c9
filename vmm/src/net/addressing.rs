//! What the guest needs to know: addresses, routes and neighbours, as the protocol's messages.
//!
//! Everything of the main table is copied, routes that the kernel made for an address too: the guest makes none by itself, since some
//! plugins (`ptp`) have removed those. What the network tells a machine anyway is not copied: addresses and routes of router
//! advertisements.

use std::{collections::HashMap, net::IpAddr};

use kuasar_guest_protocol::agent;
use kuasar_sandboxers::{Error, Result, netlink::Netlink};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType, RouteVia,
    },
};
use tracing::warn;

use super::rtm;

/// More than any pod has; the messages to the guest stay far below their limit.
const ADDRESSES_MAX: usize = 1024;
const ROUTES_MAX: usize = 4096;
const NEIGHBOURS_MAX: usize = 4096;

/// The main routing table.
const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;
/// The kernel's table of its own addresses.
const LOCAL: u32 = 255;

fn failed(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    Error::failed(format!("read the {what} of the pod's network"))
}

/// All addresses in the namespace that are not the network's own doing, with the index of their interface.
pub(super) fn addresses(netlink: &mut Netlink) -> Result<Vec<(u32, agent::Address)>> {
    let messages: Vec<AddressMessage> = netlink
        .list(rtm::GET_ADDRESS, rtm::NEW_ADDRESS, &AddressMessage::default(), ADDRESSES_MAX)
        .map_err(failed("addresses"))?;
    Ok(messages.iter().filter_map(address).collect())
}

fn address(message: &AddressMessage) -> Option<(u32, agent::Address)> {
    let (mut local, mut other, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // Of a point-to-point link, where they differ, `other` is the far end's.
    let address = local.or(other)?;
    let kept = address.is_ipv4() || flags.contains(AddressFlags::Permanent) && !flags.contains(AddressFlags::Dadfailed);
    let (ip, prefix) = (bytes(address), u32::from(message.header.prefix_len));
    kept.then(|| (message.header.index, agent::Address { ip, prefix, ..Default::default() }))
}

/// The routes of the main table over interfaces that are carried, by their index; those without a gateway first.
pub(super) fn routes(netlink: &mut Netlink, names: &HashMap<u32, String>) -> Result<Vec<agent::Route>> {
    let messages: Vec<RouteMessage> =
        netlink.list(rtm::GET_ROUTE, rtm::NEW_ROUTE, &RouteMessage::default(), ROUTES_MAX).map_err(failed("routes"))?;
    let mut routes = Vec::new();
    let mut elsewhere = 0;
    for message in &messages {
        match table(message) {
            MAIN => routes.extend(route(message, names)?),
            LOCAL => {}
            _ => elsewhere += 1,
        }
    }
    if elsewhere > 0 {
        warn!(routes = elsewhere, "routes outside of the main table are not carried into the machine");
    }
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok(routes)
}

fn table(message: &RouteMessage) -> u32 {
    let wide = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    wide.unwrap_or_else(|| u32::from(message.header.table))
}

fn route(message: &RouteMessage, names: &HashMap<u32, String>) -> Result<Option<agent::Route>> {
    let header = &message.header;
    let ipv6 = match header.address_family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return Ok(None),
    };
    if header.flags.contains(RouteFlags::Cloned) || header.protocol == RouteProtocol::Ra {
        return Ok(None);
    }
    let mut route = agent::Route {
        prefix: u32::from(header.destination_prefix_length),
        scope: u32::from(u8::from(header.scope)),
        protocol: u32::from(u8::from(header.protocol)),
        onlink: header.flags.contains(RouteFlags::Onlink),
        ipv6,
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => route.destination = raw(address),
            RouteAttribute::Gateway(address) => route.gateway = raw(address),
            RouteAttribute::Via(RouteVia::Inet6(address)) => route.gateway = address.octets().to_vec(),
            RouteAttribute::PrefSource(address) => route.source = raw(address),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => match names.get(index) {
                Some(name) => route.interface.clone_from(name),
                // Over the loopback interface, or one that is left out.
                None => return Ok(None),
            },
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                route.mtu = mtu.unwrap_or_default();
            }
            RouteAttribute::MultiPath(_) => {
                let why = format!("the route to {} has several next hops: give it one", destination(&route));
                return Err(Error::Unsupported { operation: "the pod's network", why });
            }
            _ => {}
        }
    }
    if header.kind != RouteType::Unicast || route.interface.is_empty() {
        warn!(destination = destination(&route), kind = ?header.kind, "a route without an interface is not carried into the machine");
        return Ok(None);
    }
    Ok(Some(route))
}

fn destination(route: &agent::Route) -> String {
    let bytes = route.destination.as_slice();
    let address = <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
    address.map_or_else(|_| "everywhere".to_owned(), |address| format!("{address}/{}", route.prefix))
}

/// The neighbours that were set for ever, on interfaces that are carried.
pub(super) fn neighbours(netlink: &mut Netlink, names: &HashMap<u32, String>) -> Result<Vec<agent::Neighbour>> {
    let messages: Vec<NeighbourMessage> = netlink
        .list(rtm::GET_NEIGHBOUR, rtm::NEW_NEIGHBOUR, &NeighbourMessage::default(), NEIGHBOURS_MAX)
        .map_err(failed("neighbours"))?;
    Ok(messages.iter().filter_map(|message| neighbour(message, names)).collect())
}

fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, String>) -> Option<agent::Neighbour> {
    if message.header.state != NeighbourState::Permanent || message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let mut neighbour = agent::Neighbour { interface: names.get(&message.header.ifindex)?.clone(), ..Default::default() };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => neighbour.ip = address.octets().to_vec(),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => neighbour.ip = address.octets().to_vec(),
            NeighbourAttribute::LinkLayerAddress(address) => neighbour.mac.clone_from(address),
            _ => {}
        }
    }
    (!neighbour.ip.is_empty() && neighbour.mac.len() == 6).then_some(neighbour)
}

fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn raw(address: &RouteAddress) -> Vec<u8> {
    match address {
        RouteAddress::Inet(address) => address.octets().to_vec(),
        RouteAddress::Inet6(address) => address.octets().to_vec(),
        _ => Vec::new(),
    }
}
