//! Tests as root, each in a network namespace of its own, which nobody else sees.

use std::{process::Command, thread};

use kuasar_guest_protocol::forward::{self, request};
use nix::sched::{CloneFlags, unshare};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    net::TcpListener,
    runtime,
};

use super::*;

/// Runs a test in a new namespace: on a thread of its own, whose threads and programs are in it too.
fn isolated<F: Future<Output = ()>>(name: &'static str, test: impl FnOnce() -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() || Command::new("ip").arg("-V").output().is_err() {
        eprintln!("SKIP {name}: root's powers, or iproute2");
        return;
    }
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test());
    };
    thread::spawn(run).join().unwrap();
}

fn ip_command(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn address(text: &str) -> agent::Address {
    let (ip, prefix) = text.split_once('/').unwrap();
    agent::Address { ip: octets(ip), prefix: prefix.parse().unwrap(), ..Default::default() }
}

fn octets(text: &str) -> Vec<u8> {
    match text.parse().unwrap() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn interface(last: u8, name: &str, addresses: &[&str]) -> agent::Interface {
    agent::Interface {
        mac: vec![2, 0, 0, 0, 0, last],
        name: name.into(),
        mtu: 1400,
        addresses: addresses.iter().map(|text| address(text)).collect(),
        ..Default::default()
    }
}

fn route(interface: &str, destination: &str, gateway: &str) -> agent::Route {
    let mut route = agent::Route { interface: interface.into(), protocol: 4, ..Default::default() };
    if let Some((ip, prefix)) = destination.split_once('/') {
        route.destination = octets(ip);
        route.prefix = prefix.parse().unwrap();
    } else {
        route.ipv6 = destination == "default6";
    }
    if gateway.is_empty() {
        route.scope = 253;
    } else {
        route.gateway = octets(gateway);
    }
    route
}

#[test]
fn the_network_is_made_as_asked_and_once_more() {
    isolated("the_network_is_made_as_asked_and_once_more", || async {
        // Named the wrong way round.
        ip_command("link add eth0 address 02:00:00:00:00:02 type veth peer name eth1 address 02:00:00:00:00:01");
        let request = agent::SetUpRequest {
            interfaces: vec![
                interface(1, "eth0", &["10.1.0.2/24", "fd01::2/64", "fe80::1:2/64"]),
                interface(2, "eth1", &["10.2.0.2/32", "fd02::2/64"]),
            ],
            routes: vec![
                // In an order that does not work.
                agent::Route { metric: 7, mtu: 1300, ..route("eth0", "default", "10.1.0.1") },
                route("eth0", "default6", "fd01::1"),
                agent::Route { onlink: true, source: octets("10.2.0.2"), ..route("eth1", "10.9.0.0/16", "10.3.3.3") },
                route("eth1", "10.8.0.0/16", "fd02::1"),
                route("eth1", "10.7.0.0/16", "169.254.1.1"),
                route("eth1", "169.254.1.1/32", ""),
                route("eth0", "10.1.0.0/24", ""),
                route("eth0", "fd01::/64", ""),
                route("eth1", "fd02::/64", ""),
                route("eth0", "fe80::/64", ""),
                route("eth1", "fe80::/64", ""),
            ],
            neighbours: vec![agent::Neighbour {
                interface: "eth1".into(),
                ip: octets("169.254.1.1"),
                mac: vec![2, 0, 0, 0, 9, 9],
                ..Default::default()
            }],
            ..Default::default()
        };
        apply(&request).await.unwrap();
        let look = || {
            ["link", "address", "-4 route", "-6 route", "neighbour show nud permanent"].map(ip_command).map(|text| {
                let steady = |word: &&str| !word.starts_with("qdisc");
                text.split_whitespace().filter(steady).collect::<Vec<_>>().join(" ")
            })
        };
        let [links, addresses, v4, v6, neighbours] = look();
        assert!(links.contains("eth0@eth1") && links.contains("mtu 1400"), "{links}");
        assert!(ip_command("link show eth0").contains("02:00:00:00:00:01"), "{links}");
        assert!(ip_command("link show lo").contains("LOOPBACK,UP"), "{links}");
        for expected in
            ["10.1.0.2/24 brd 10.1.0.255", "fd01::2/64", "fe80::1:2/64", "10.2.0.2/32", "fd02::2/64", "nodad noprefixroute"]
        {
            assert!(addresses.contains(expected), "{expected} in {addresses}");
        }
        assert!(!ip_command("address show eth0").contains("tentative"), "{addresses}");
        // Of its own address the first needs no other of that kind; the second has one made up.
        assert!(!ip_command("address show eth0").contains("fe80::ff:fe00:1"), "{addresses}");
        for expected in [
            "default via 10.1.0.1 dev eth0 proto static metric 7 mtu 1300",
            "10.9.0.0/16 via 10.3.3.3 dev eth1 proto static src 10.2.0.2 onlink",
            "10.8.0.0/16 via inet6 fd02::1 dev eth1 proto static",
            "10.7.0.0/16 via 169.254.1.1 dev eth1",
            "10.1.0.0/24 dev eth0 proto static scope link",
        ] {
            assert!(v4.contains(expected), "{expected} in {v4}");
        }
        for expected in ["default via fd01::1 dev eth0", "fd01::/64 dev eth0", "fe80::/64 dev eth0", "fe80::/64 dev eth1"] {
            assert!(v6.contains(expected), "{expected} in {v6}");
        }
        assert!(neighbours.contains("169.254.1.1 dev eth1 lladdr 02:00:00:00:09:09 PERMANENT"), "{neighbours}");
        apply(&request).await.unwrap();
        // Except for what the kernel makes up by and by for the second interface.
        let settled = |look: [String; 5]| look.map(|text| text.matches("fd0").count() + text.matches("10.").count());
        assert_eq!(settled(look()), settled([links, addresses, v4, v6, neighbours]));
    });
}

#[test]
fn a_late_interface_is_waited_for() {
    isolated("a_late_interface_is_waited_for", || async {
        let request = agent::SetUpRequest { interfaces: vec![interface(1, "eth0", &["10.1.0.2/24"])], ..Default::default() };
        let network = Network::check(&request).unwrap();
        let begun = Instant::now();
        let error = network.make(Duration::from_millis(100)).unwrap_err().to_string();
        assert!(error.contains("02:00:00:00:00:01") && begun.elapsed() >= Duration::from_millis(100), "{error}");
        // Its thread begins in this namespace.
        let late = thread::spawn(|| {
            thread::sleep(Duration::from_millis(200));
            ip_command("link add late type veth peer name other");
            thread::sleep(Duration::from_millis(100));
            ip_command("link set late address 02:00:00:00:00:01");
        });
        apply(&request).await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(300));
        late.join().unwrap();
        assert!(ip_command("address show eth0").contains("10.1.0.2/24"));
    });
}

#[test]
fn what_the_kernel_refuses_is_named() {
    isolated("what_the_kernel_refuses_is_named", || async {
        ip_command("link add dev a address 02:00:00:00:00:01 type veth peer name b");
        let request = agent::SetUpRequest {
            interfaces: vec![interface(1, "eth0", &["10.1.0.2/24"])],
            routes: vec![route("eth0", "default", "10.5.5.5")],
            ..Default::default()
        };
        let error = apply(&request).await.unwrap_err().report();
        assert!(error.contains("add route 0.0.0.0/0 via 10.5.5.5 dev eth0") && error.contains("gateway"), "{error}");
    });
}

#[test]
fn nonsense_is_refused_before_anything_is_made() {
    let good = || agent::SetUpRequest {
        interfaces: vec![interface(1, "eth0", &["10.1.0.2/24"])],
        routes: vec![route("eth0", "10.1.0.0/24", "")],
        neighbours: vec![agent::Neighbour {
            interface: "eth0".into(),
            ip: vec![10, 1, 0, 1],
            mac: vec![2; 6],
            ..Default::default()
        }],
        ..Default::default()
    };
    Network::check(&good()).unwrap();
    Network::check(&agent::SetUpRequest::default()).unwrap();
    type Change = fn(&mut agent::SetUpRequest);
    let changes: [(&str, Change); 15] = [
        ("interfaces.mac", |request| request.interfaces[0].mac.truncate(5)),
        ("interfaces.name", |request| request.interfaces[0].name = "../x".into()),
        ("interfaces.name", |request| request.interfaces[0].name = "much-too-long-a-name".into()),
        ("interfaces.name", |request| request.interfaces[0].name = "lo".into()),
        ("interfaces", |request| request.interfaces.push(request.interfaces[0].clone())),
        ("interfaces.addresses.ip", |request| request.interfaces[0].addresses[0].ip.push(1)),
        ("interfaces.addresses.prefix", |request| request.interfaces[0].addresses[0].prefix = 33),
        ("routes.interface", |request| request.routes[0].interface = "eth1".into()),
        ("routes.destination", |request| request.routes[0].destination.truncate(3)),
        ("routes.prefix", |request| request.routes[0].prefix = 300),
        ("routes.prefix", |request| request.routes[0].destination.clear()),
        ("routes.scope", |request| request.routes[0].scope = 256),
        ("routes.source", |request| request.routes[0].source = vec![0; 16]),
        ("neighbours.mac", |request| request.neighbours[0].mac.clear()),
        ("neighbours.interface", |request| request.neighbours[0].interface.clear()),
    ];
    for (field, change) in changes {
        let mut request = good();
        change(&mut request);
        let error = Network::check(&request).unwrap_err().to_string();
        assert!(error.starts_with(&format!("invalid {field}:")), "{field}: {error}");
    }
}

#[test]
fn connections_are_carried_to_the_loopback_interface() {
    isolated("connections_are_carried_to_the_loopback_interface", || async {
        ip_command("link set lo up");
        for ip in ["127.0.0.1", "::1"] {
            let listener = TcpListener::bind((ip, 0)).await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let serves = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut seen = Vec::new();
                stream.read_to_end(&mut seen).await.unwrap();
                stream.write_all(&seen).await.unwrap();
            };
            let (mut carrier, theirs) = duplex(1000);
            let (mut plain, mut client) = duplex(1000);
            let hosts = async {
                assert!(request(&mut carrier, port).await.unwrap());
                forward::relay(&mut plain, &mut carrier).await.unwrap();
                drop((plain, carrier));
            };
            let sent = vec![42; 100_000];
            let talks = async {
                let (mut reader, mut writer) = tokio::io::split(&mut client);
                let sends = async {
                    writer.write_all(&sent).await.unwrap();
                    writer.shutdown().await.unwrap();
                };
                let mut seen = Vec::new();
                let ((), read) = tokio::join!(sends, reader.read_to_end(&mut seen));
                read.unwrap();
                assert!(seen == sent);
            };
            let (served, (), (), ()) = tokio::join!(super::forward(theirs), serves, hosts, talks);
            served.unwrap();
            drop(listener);
            // Nobody is there any more.
            let (mut carrier, theirs) = duplex(1000);
            let asks = async {
                assert!(!request(&mut carrier, port).await.unwrap());
                drop(carrier);
            };
            let (served, ()) = tokio::join!(super::forward(theirs), asks);
            served.unwrap();
        }
    });
}

#[test]
fn a_carrier_that_breaks_off_resets_the_connection() {
    isolated("a_carrier_that_breaks_off_resets_the_connection", || async {
        ip_command("link set lo up");
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mut carrier, theirs) = duplex(1000);
        let asks = async {
            assert!(request(&mut carrier, port).await.unwrap());
            drop(carrier);
        };
        let reads = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_eq!(stream.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        };
        let (served, (), ()) = tokio::join!(super::forward(theirs), asks, reads);
        served.unwrap_err();
    });
}
