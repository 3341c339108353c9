//! Networks that a fuzzer makes up.

use bolero::TypeGenerator;

use super::*;

#[derive(Debug, TypeGenerator)]
struct Wanted {
    interfaces: Vec<WantedInterface>,
    routes: Vec<WantedRoute>,
    neighbours: Vec<(u8, Vec<u8>, Vec<u8>)>,
}

#[derive(Debug, TypeGenerator)]
struct WantedInterface {
    mac: [u8; 6],
    broken_mac: Option<Vec<u8>>,
    name: String,
    mtu: u32,
    addresses: Vec<(Address, u32)>,
}

#[derive(Debug, TypeGenerator)]
enum Address {
    V4([u8; 4]),
    V6([u8; 16]),
    Any(Vec<u8>),
}

#[derive(Debug, TypeGenerator)]
struct WantedRoute {
    interface: u8,
    destination: Address,
    gateway: Option<Address>,
    source: Option<Address>,
    numbers: [u32; 5],
    flags: [bool; 2],
}

impl Address {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::V4(bytes) => bytes.to_vec(),
            Self::V6(bytes) => bytes.to_vec(),
            Self::Any(bytes) => bytes.clone(),
        }
    }
}

impl Wanted {
    /// One of the interfaces, as far as there are any.
    fn name(&self, index: u8) -> String {
        let interfaces = self.interfaces.len().max(1);
        self.interfaces.get(usize::from(index) % interfaces).map(|interface| interface.name.clone()).unwrap_or_default()
    }

    fn request(&self) -> agent::SetUpRequest {
        let interfaces = self.interfaces.iter().map(|wanted| agent::Interface {
            mac: wanted.broken_mac.clone().unwrap_or_else(|| wanted.mac.to_vec()),
            name: wanted.name.clone(),
            mtu: wanted.mtu,
            addresses: wanted
                .addresses
                .iter()
                .map(|(ip, prefix)| agent::Address { ip: ip.bytes(), prefix: *prefix, ..Default::default() })
                .collect(),
            ..Default::default()
        });
        let routes = self.routes.iter().map(|wanted| {
            let [prefix, scope, protocol, metric, mtu] = wanted.numbers;
            agent::Route {
                interface: self.name(wanted.interface),
                destination: wanted.destination.bytes(),
                gateway: wanted.gateway.as_ref().map(Address::bytes).unwrap_or_default(),
                source: wanted.source.as_ref().map(Address::bytes).unwrap_or_default(),
                onlink: wanted.flags[0],
                ipv6: wanted.flags[1],
                prefix,
                scope,
                protocol,
                metric,
                mtu,
                ..Default::default()
            }
        });
        let neighbours = self.neighbours.iter().map(|(interface, ip, mac)| agent::Neighbour {
            interface: self.name(*interface),
            ip: ip.clone(),
            mac: mac.clone(),
            ..Default::default()
        });
        agent::SetUpRequest {
            interfaces: interfaces.collect(),
            routes: routes.collect(),
            neighbours: neighbours.collect(),
            ..Default::default()
        }
    }
}

#[test]
fn fuzz_networks() {
    bolero::check!().with_type::<Wanted>().for_each(|wanted| {
        let Ok(network) = Network::check(&wanted.request()) else { return };
        assert_eq!(network.interfaces.len(), wanted.interfaces.len());
        assert_eq!(network.routes.len(), wanted.routes.len());
        for interface in &network.interfaces {
            check_name(&interface.name).unwrap();
        }
        for route in &network.routes {
            assert!(network.interfaces.iter().any(|interface| interface.name == route.interface));
            assert!(route.prefix <= if route.destination.is_ipv4() { 32 } else { 128 });
            assert!(route.gateway.is_none_or(|gateway| !gateway.is_unspecified()), "{route:?}");
        }
    });
}
