//! The network of the guest: what the host has found in the pod's namespace, made here.
//!
//! Each interface is found by its MAC address, whatever the kernel has called it. Everything is done by way of rtnetlink, and can be done
//! again: what is there already is fine.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use kuasar_guest_protocol::{
    agent,
    forward::{CONNECTED, REFUSED, relay},
};
use kuasar_sandboxers::{
    Error, Result,
    netlink::{Netlink, errno},
};
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope},
    link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType, RouteVia},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    task::spawn_blocking,
    time::timeout,
};

/// rtnetlink(7)'s message types, and its group of changes of interfaces.
const NEW_LINK: u16 = 16;
const GET_LINK: u16 = 18;
const SET_LINK: u16 = 19;
const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const NEW_NEIGHBOUR: u16 = 28;
const LINK_GROUP: u32 = 1;

/// The loopback interface.
const LOOPBACK: u32 = 1;

/// How many interfaces there may be here.
const LINKS_MAX: usize = 1024;

/// How long the machine's interfaces may take to appear: drivers are loaded, buses are looked through.
const APPEARING: Duration = Duration::from_secs(10);

/// How long a connection to this machine itself may take, of either kind.
const CONNECTING: Duration = Duration::from_secs(4);

/// How long the host may take to name a port, and to close when both ways have ended.
const WAITING: Duration = Duration::from_secs(10);

/// Makes the network that a request describes: returns when it can be used.
///
/// # Errors
/// [`Error::Invalid`] for what can be no network; [`Error::TimedOut`] when an interface does not appear; others for what the kernel refuses.
pub(crate) async fn apply(request: &agent::SetUpRequest) -> Result<()> {
    let network = Network::check(request)?;
    spawn_blocking(move || network.make(APPEARING)).await.map_err(Error::failed("set up the network"))?
}

type Mac = [u8; 6];

/// A request that can be met.
#[derive(Debug)]
struct Network {
    interfaces: Vec<Interface>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
}

#[derive(Debug)]
struct Interface {
    mac: Mac,
    name: String,
    mtu: u32,
    addresses: Vec<(IpAddr, u8)>,
}

#[derive(Debug)]
struct Route {
    interface: String,
    /// The unspecified address for a default route.
    destination: IpAddr,
    prefix: u8,
    gateway: Option<IpAddr>,
    source: Option<IpAddr>,
    scope: u8,
    protocol: u8,
    metric: u32,
    onlink: bool,
    mtu: u32,
}

#[derive(Debug)]
struct Neighbour {
    interface: String,
    ip: IpAddr,
    mac: Mac,
}

fn ip(bytes: &[u8], what: &str) -> Result<IpAddr> {
    let address = <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
    address.map_err(|_| Error::invalid(what, format!("{} bytes are no IP address", bytes.len())))
}

fn optional_ip(bytes: &[u8], what: &str) -> Result<Option<IpAddr>> {
    if bytes.is_empty() { Ok(None) } else { ip(bytes, what).map(Some) }
}

fn mac(bytes: &[u8], what: &str) -> Result<Mac> {
    Mac::try_from(bytes).map_err(|_| Error::invalid(what, format!("{} bytes are no MAC address", bytes.len())))
}

fn prefix(length: u32, address: IpAddr, what: &str) -> Result<u8> {
    let most = if address.is_ipv4() { 32 } else { 128 };
    u8::try_from(length)
        .ok()
        .filter(|length| *length <= most)
        .ok_or_else(|| Error::invalid(what, format!("a prefix of {length} bits; {address} has {most}")))
}

fn byte(value: u32, what: &str) -> Result<u8> {
    u8::try_from(value).map_err(|_| Error::invalid(what, format!("{value}; there are 0 to 255")))
}

/// What netdevice(7) takes as a name.
fn check_name(name: &str) -> Result<()> {
    let bad = |byte: u8| byte.is_ascii_whitespace() || byte == b'/' || byte == b':' || byte == 0;
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name == "." || name == ".." || name.bytes().any(bad) || name == "lo" {
        return Err(Error::invalid("interfaces.name", format!("{name:?} cannot be the name of an interface")));
    }
    Ok(())
}

impl Network {
    fn check(request: &agent::SetUpRequest) -> Result<Self> {
        let mut interfaces: Vec<Interface> = Vec::new();
        for wanted in &request.interfaces {
            check_name(&wanted.name)?;
            let interface = Interface {
                mac: mac(&wanted.mac, "interfaces.mac")?,
                name: wanted.name.clone(),
                mtu: wanted.mtu,
                addresses: wanted
                    .addresses
                    .iter()
                    .map(|address| {
                        let ip = ip(&address.ip, "interfaces.addresses.ip")?;
                        Ok((ip, prefix(address.prefix, ip, "interfaces.addresses.prefix")?))
                    })
                    .collect::<Result<_>>()?,
            };
            if interfaces.iter().any(|other| other.mac == interface.mac || other.name == interface.name) {
                return Err(Error::invalid("interfaces", format!("{} or its MAC address is there twice", interface.name)));
            }
            interfaces.push(interface);
        }
        let known = |name: &str, what: &str| {
            let found = interfaces.iter().any(|interface| interface.name == name);
            found.then(|| name.to_owned()).ok_or_else(|| Error::invalid(what, format!("{name:?} is none of the interfaces")))
        };
        let mut routes: Vec<Route> = request
            .routes
            .iter()
            .map(|wanted| Route::check(wanted, known(&wanted.interface, "routes.interface")?))
            .collect::<Result<_>>()?;
        // A gateway has to be reachable when it is named: the sort is stable, so the host's order remains otherwise.
        routes.sort_by_key(|route| (route.gateway.is_some(), !route.onlink && route.gateway.is_some()));
        let neighbours = request
            .neighbours
            .iter()
            .map(|wanted| {
                Ok(Neighbour {
                    interface: known(&wanted.interface, "neighbours.interface")?,
                    ip: ip(&wanted.ip, "neighbours.ip")?,
                    mac: mac(&wanted.mac, "neighbours.mac")?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { interfaces, routes, neighbours })
    }

    fn make(&self, appearing: Duration) -> Result<()> {
        let mut netlink = Netlink::open().map_err(Error::failed("open a netlink socket"))?;
        set(&mut netlink, LOOPBACK, Vec::new(), true).map_err(Error::failed("bring up the loopback interface"))?;
        if self.interfaces.is_empty() {
            return Ok(());
        }
        let macs: Vec<Mac> = self.interfaces.iter().map(|interface| interface.mac).collect();
        let links = appear(&mut netlink, &macs, appearing)?;
        let indices = self.rename(&mut netlink, &links)?;
        let index = |name: &str| indices.get(name).copied().unwrap_or_default();
        for interface in &self.interfaces {
            interface.make(&mut netlink, index(&interface.name))?;
        }
        for route in &self.routes {
            route.make(&mut netlink, index(&route.interface))?;
        }
        for neighbour in &self.neighbours {
            neighbour.make(&mut netlink, index(&neighbour.interface))?;
        }
        Ok(())
    }

    /// Gives the interfaces their names; returns their indices by these.
    fn rename(&self, netlink: &mut Netlink, links: &[Link]) -> Result<BTreeMap<String, u32>> {
        let failed = |from: &str, to: &str| Error::failed(format!("rename interface {from} to {to}"));
        let mut indices = BTreeMap::new();
        let mut pending = Vec::new();
        for interface in &self.interfaces {
            let Some(link) = links.iter().find(|link| link.mac == Some(interface.mac)) else {
                return Err(Error::NotFound { kind: "interface", id: text(interface.mac) });
            };
            indices.insert(interface.name.clone(), link.index);
            if link.name != interface.name {
                pending.push((link, interface.name.as_str()));
            }
        }
        // Whoever has a name that another gets makes way first, so that two can change theirs.
        for link in links {
            if pending.iter().any(|(other, name)| other.index != link.index && *name == link.name) {
                let spare = format!("kuasar{}", link.index);
                rename(netlink, link.index, &spare).map_err(failed(&link.name, &spare))?;
            }
        }
        for (link, name) in pending {
            rename(netlink, link.index, name).map_err(failed(&link.name, name))?;
        }
        Ok(indices)
    }
}

fn text([a, b, c, d, e, f]: Mac) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// An interface of this machine.
#[derive(Debug)]
struct Link {
    index: u32,
    name: String,
    mac: Option<Mac>,
}

fn links(netlink: &mut Netlink) -> Result<Vec<Link>> {
    let messages: Vec<LinkMessage> =
        netlink.list(GET_LINK, NEW_LINK, &LinkMessage::default(), LINKS_MAX).map_err(Error::failed("list the interfaces"))?;
    let link = |message: LinkMessage| {
        let mut link = Link { index: message.header.index, name: String::new(), mac: None };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(address) => link.mac = address.try_into().ok(),
                _ => {}
            }
        }
        link
    };
    Ok(messages.into_iter().map(link).collect())
}

/// Waits until interfaces with all these addresses are there; returns all interfaces.
fn appear(netlink: &mut Netlink, macs: &[Mac], limit: Duration) -> Result<Vec<Link>> {
    let failed = || Error::failed("wait for the machine's interfaces");
    let deadline = Instant::now() + limit;
    // Before the first look, so that nothing is missed between the two; and only if that one does not find them all.
    let mut news: Option<Netlink> = None;
    loop {
        let found = links(netlink)?;
        let missing = macs.iter().find(|mac| !found.iter().any(|link| link.mac == Some(**mac)));
        let Some(missing) = missing else { return Ok(found) };
        let Some(news) = &mut news else {
            news = Some(Netlink::subscribed(LINK_GROUP).map_err(failed())?);
            continue;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other).map_err(failed())?;
        match poll(&mut [PollFd::new(&news.fd(), PollFlags::IN)], Some(&left)) {
            Ok(0) => {
                let operation = format!("the appearing of an interface with MAC address {}", text(*missing));
                return Err(Error::TimedOut { operation, seconds: limit.as_secs() });
            }
            Ok(_) => news.changed().map_err(failed())?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed()(io::Error::from(errno))),
        }
    }
}

/// Sets attributes of an interface, and whether it is up.
fn set(netlink: &mut Netlink, index: u32, attributes: Vec<LinkAttribute>, up: bool) -> io::Result<()> {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    link.header.change_mask = link.header.flags;
    link.attributes = attributes;
    netlink.request(SET_LINK, 0, &link)
}

fn rename(netlink: &mut Netlink, index: u32, name: &str) -> io::Result<()> {
    let mut down = LinkMessage::default();
    down.header.index = index;
    down.header.change_mask = LinkFlags::Up;
    // Older kernels rename only what is down.
    netlink.request(SET_LINK, 0, &down)?;
    set(netlink, index, vec![LinkAttribute::IfName(name.to_owned())], false)
}

impl Interface {
    fn make(&self, netlink: &mut Netlink, index: u32) -> Result<()> {
        let failed = |what: &str| Error::failed(format!("{what} of interface {}", self.name));
        // The address that the kernel would make up is among those given, if the pod's interface has any of IPv6; without one it would
        // make none.
        let ipv6 = self.addresses.iter().any(|(ip, _)| ip.is_ipv6());
        let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        if !ipv6 || self.addresses.iter().any(|(ip, _)| link_local(ip)) {
            let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
            match set(netlink, index, vec![LinkAttribute::AfSpecUnspec(vec![none])], false) {
                // A kernel without IPv6.
                Err(error) if errno(&error) == Some(libc::EAFNOSUPPORT) => {}
                done => done.map_err(failed("turn off address generation"))?,
            }
        }
        let mtu = (self.mtu != 0).then_some(LinkAttribute::Mtu(self.mtu));
        set(netlink, index, mtu.into_iter().collect(), false).map_err(failed("set the MTU"))?;
        for (ip, prefix) in &self.addresses {
            add_address(netlink, index, *ip, *prefix).map_err(failed(&format!("add address {ip}/{prefix}")))?;
        }
        set(netlink, index, Vec::new(), true).map_err(failed("change the state"))
    }
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn add_address(netlink: &mut Netlink, index: u32, ip: IpAddr, prefix: u8) -> io::Result<()> {
    let mut address = AddressMessage::default();
    address.header.family = family(ip);
    address.header.index = index;
    address.header.prefix_len = prefix;
    if matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        address.header.scope = AddressScope::Link;
    }
    address.attributes = vec![
        AddressAttribute::Local(ip),
        AddressAttribute::Address(ip),
        // Routes come from the host, all of them; and nobody else can have the address, for the pod's interface has it.
        AddressAttribute::Flags(AddressFlags::Noprefixroute | AddressFlags::Nodad),
    ];
    if let IpAddr::V4(ip) = ip
        && prefix < 31
    {
        let host = u32::MAX >> prefix;
        address.attributes.push(AddressAttribute::Broadcast(Ipv4Addr::from(u32::from(ip) | host)));
    }
    netlink.request(NEW_ADDRESS, NLM_F_CREATE | NLM_F_REPLACE, &address)
}

impl Route {
    fn check(wanted: &agent::Route, interface: String) -> Result<Self> {
        let destination = match optional_ip(&wanted.destination, "routes.destination")? {
            Some(destination) => destination,
            None if wanted.prefix != 0 => {
                return Err(Error::invalid("routes.prefix", format!("{} bits of no destination", wanted.prefix)));
            }
            None if wanted.ipv6 => Ipv6Addr::UNSPECIFIED.into(),
            None => Ipv4Addr::UNSPECIFIED.into(),
        };
        let gateway = optional_ip(&wanted.gateway, "routes.gateway")?;
        let source = optional_ip(&wanted.source, "routes.source")?;
        if source.is_some_and(|source| source.is_ipv4() != destination.is_ipv4()) {
            return Err(Error::invalid("routes.source", "it is of another family than the destination"));
        }
        if destination.is_ipv6() && gateway.is_some_and(|gateway| gateway.is_ipv4()) {
            return Err(Error::invalid("routes.gateway", "there are no IPv4 gateways of IPv6 destinations"));
        }
        Ok(Self {
            interface,
            prefix: prefix(wanted.prefix, destination, "routes.prefix")?,
            destination,
            gateway,
            source,
            scope: byte(wanted.scope, "routes.scope")?,
            protocol: byte(wanted.protocol, "routes.protocol")?,
            metric: wanted.metric,
            onlink: wanted.onlink,
            mtu: wanted.mtu,
        })
    }

    fn make(&self, netlink: &mut Netlink, index: u32) -> Result<()> {
        let mut route = RouteMessage::default();
        route.header.address_family = family(self.destination);
        route.header.destination_prefix_length = self.prefix;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = self.protocol.into();
        route.header.scope = self.scope.into();
        route.header.kind = RouteType::Unicast;
        if self.onlink {
            route.header.flags = RouteFlags::Onlink;
        }
        route.attributes.push(RouteAttribute::Oif(index));
        if self.prefix != 0 {
            route.attributes.push(RouteAttribute::Destination(self.destination.into()));
        }
        route.attributes.extend(self.gateway.map(|gateway| match (self.destination, gateway) {
            (IpAddr::V4(_), IpAddr::V6(gateway)) => RouteAttribute::Via(RouteVia::Inet6(gateway)),
            _ => RouteAttribute::Gateway(RouteAddress::from(gateway)),
        }));
        route.attributes.extend(self.source.map(|source| RouteAttribute::PrefSource(source.into())));
        if self.metric != 0 {
            route.attributes.push(RouteAttribute::Priority(self.metric));
        }
        if self.mtu != 0 {
            route.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(self.mtu)]));
        }
        // Not to replace: of IPv6 that would take the same route over another interface away.
        match netlink.request(NEW_ROUTE, NLM_F_CREATE | NLM_F_APPEND, &route) {
            Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(()),
            done => done.map_err(Error::failed(format!("add route {self}"))),
        }
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.destination, self.prefix)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev {}", self.interface)
    }
}

impl Neighbour {
    fn make(&self, netlink: &mut Netlink, index: u32) -> Result<()> {
        let mut neighbour = NeighbourMessage::default();
        neighbour.header.family = family(self.ip);
        neighbour.header.ifindex = index;
        neighbour.header.state = NeighbourState::Permanent;
        neighbour.header.kind = RouteType::Unicast;
        neighbour.attributes =
            vec![NeighbourAttribute::Destination(self.ip.into()), NeighbourAttribute::LinkLayerAddress(self.mac.to_vec())];
        netlink
            .request(NEW_NEIGHBOUR, NLM_F_CREATE | NLM_F_REPLACE, &neighbour)
            .map_err(Error::failed(format!("add neighbour {} on interface {}", self.ip, self.interface)))
    }
}

/// Serves one connection of [`FORWARD_PORT`](kuasar_guest_protocol::FORWARD_PORT), to its end: connects to the port that it names on
/// this machine's loopback interface, and copies both ways.
///
/// # Errors
/// When either connection breaks; the other has been broken off then.
pub(crate) async fn forward<S: AsyncRead + AsyncWrite + Unpin>(mut carrier: S) -> io::Result<()> {
    let slow = |_| io::Error::from(io::ErrorKind::TimedOut);
    let port = timeout(WAITING, carrier.read_u16()).await.map_err(slow)??;
    let connected = match connect(Ipv4Addr::LOCALHOST.into(), port).await {
        Ok(stream) => Some(stream),
        Err(_) => connect(Ipv6Addr::LOCALHOST.into(), port).await.ok(),
    };
    carrier.write_u8(if connected.is_some() { CONNECTED } else { REFUSED }).await?;
    carrier.flush().await?;
    let copied = match connected {
        Some(mut stream) => {
            let copied = relay(&mut stream, &mut carrier).await;
            if copied.is_err() {
                stream.set_zero_linger()?;
            }
            copied
        }
        None => Ok(()),
    };
    if copied.is_ok() {
        // The host closes: what is on its way to it might be thrown away otherwise.
        match timeout(WAITING, carrier.read(&mut [0])).await.map_err(slow)? {
            Err(error) if error.kind() != io::ErrorKind::ConnectionReset => return Err(error),
            _ => {}
        }
    }
    copied
}

async fn connect(address: IpAddr, port: u16) -> io::Result<TcpStream> {
    timeout(CONNECTING, TcpStream::connect((address, port))).await?
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
