//! Tests as root, in network namespaces of their own: a node, a pod, and a guest whose only wire is the pod's tap.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use kuasar_sandboxers::fdstore::MemoryHolder;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use super::{forward::Forwarder, *};
use crate::spec::MacAddress;

/// What a guest with a common driver takes: `TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6`.
const OFFLOAD: libc::c_uint = 0x07;

/// A network namespace under a name of its own.
struct Namespace(String);

impl Namespace {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("kuasar-net-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        run(&["ip", "netns", "add", &name]);
        let namespace = Self(name);
        namespace.ip("link set lo up");
        namespace
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.0)
    }

    /// Runs ip(8) in it.
    fn ip(&self, arguments: &str) -> String {
        let arguments = arguments.replace("@self", &self.0);
        run(&["ip", "-n", &self.0].into_iter().chain(arguments.split(' ')).collect::<Vec<_>>())
    }

    fn tc(&self, arguments: &str) -> String {
        run(&["tc", "-n", &self.0].into_iter().chain(arguments.split(' ')).collect::<Vec<_>>())
    }

    async fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        namespace::within(&self.path(), || Ok(work())).await.unwrap().unwrap()
    }

    /// Names of its interfaces, and its queueing disciplines.
    fn contents(&self) -> (String, String) {
        let names =
            |text: String| text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>().join(" ");
        (names(self.ip("-br link")), self.tc("qdisc show"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        run(&["ip", "netns", "del", &self.0]);
    }
}

fn run(words: &[&str]) -> String {
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Says why a test cannot run here.
fn lacks(test: &str) -> bool {
    let why = if !nix::unistd::geteuid().is_root() {
        "root's powers"
    } else if Command::new("ip").arg("-V").output().is_err() || Command::new("tc").arg("-V").output().is_err() {
        "iproute2"
    } else if !Path::new("/dev/net/tun").exists() {
        "/dev/net/tun"
    } else {
        return false;
    };
    eprintln!("SKIP {test}: {why}");
    true
}

/// A machine without a machine: a namespace whose `eth0` is a tap, joined with the tap of the pod.
struct Guest {
    namespace: Namespace,
    stop: Arc<AtomicBool>,
    copiers: Vec<JoinHandle<()>>,
    /// The largest frame that went over the wire.
    largest: Arc<AtomicUsize>,
}

impl Guest {
    async fn start(network: &PodNetwork) -> Self {
        let namespace = Namespace::new();
        let (stop, largest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut copiers = Vec::new();
        for (nic, interface) in network.nics.iter().zip(&network.setup.interfaces) {
            assert_eq!(nic.mac.0.to_vec(), interface.mac);
            let name = interface.name.clone();
            let inside = Arc::new(namespace.within(move || open_tap(&name, 0).unwrap()).await);
            for tap in [&nic.tap, &inside] {
                sys::set_tap_offload(tap.as_fd(), OFFLOAD).unwrap();
            }
            namespace.ip(&format!("link set {} address {} mtu {}", interface.name, nic.mac, nic.mtu));
            for (from, to) in [(nic.tap.clone(), inside.clone()), (inside, nic.tap.clone())] {
                let (stop, largest) = (stop.clone(), largest.clone());
                copiers.push(thread::spawn(move || copy_frames(&from, &to, &stop, &largest)));
            }
        }
        let guest = Self { namespace, stop, copiers, largest };
        guest.configure(&network.setup);
        guest
    }

    /// As the agent does, which has tests of its own.
    fn configure(&self, setup: &GuestNetwork) {
        let text = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
            Ok(v4) => IpAddr::from(v4).to_string(),
            Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap()).to_string(),
        };
        for interface in &setup.interfaces {
            self.namespace.ip(&format!("link set {} addrgenmode none", interface.name));
            for address in &interface.addresses {
                let v6 = if address.ip.len() == 16 { " nodad" } else { "" };
                let ip = text(&address.ip);
                self.namespace.ip(&format!("address add {ip}/{} dev {} noprefixroute{v6}", address.prefix, interface.name));
            }
            self.namespace.ip(&format!("link set {} up", interface.name));
        }
        for route in &setup.routes {
            let family = if route.ipv6 { "-6" } else { "-4" };
            let to = if route.destination.is_empty() {
                "default".into()
            } else {
                format!("{}/{}", text(&route.destination), route.prefix)
            };
            let onlink = if route.onlink { " onlink" } else { "" };
            let via = match route.gateway.len() {
                0 => String::new(),
                4 => format!(" via {}", text(&route.gateway)),
                _ => format!(" via inet6 {}", text(&route.gateway)),
            };
            self.namespace
                .ip(&format!("{family} route append {to}{via} dev {} proto {}{onlink}", route.interface, route.protocol));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for copier in self.copiers.drain(..) {
            copier.join().unwrap();
        }
    }
}

fn copy_frames(from: &OwnedFd, to: &OwnedFd, stop: &AtomicBool, largest: &AtomicUsize) {
    let mut frame = vec![0; 80 << 10];
    while !stop.load(Ordering::Relaxed) {
        let moment = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&moment)).unwrap();
        match rustix::io::read(from, &mut frame[..]) {
            Ok(length) => {
                largest.fetch_max(length, Ordering::Relaxed);
                // One that is not up yet takes nothing, and a full one loses frames as a wire would.
                match rustix::io::write(to, &frame[..length]) {
                    Ok(_) | Err(rustix::io::Errno::IO | rustix::io::Errno::AGAIN) => {}
                    Err(errno) => panic!("{errno}"),
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::IO) => {}
            // It was removed.
            Err(rustix::io::Errno::BADFD) => return,
            Err(errno) => panic!("{errno}"),
        }
    }
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 7 + at / 251) % 256).unwrap()).collect()
}

/// Sends from one namespace to another and back, and compares.
async fn transfer(client: &Namespace, server: &Namespace, address: IpAddr, length: usize) {
    let listener = server.within(move || StdListener::bind((address, 0)).unwrap()).await;
    let address = listener.local_addr().unwrap();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut seen = Vec::new();
        stream.read_to_end(&mut seen).unwrap();
        stream.write_all(&seen).unwrap();
    });
    let limit = std::time::Duration::from_secs(20);
    let mut stream = client.within(move || StdStream::connect_timeout(&address, limit)).await.unwrap();
    stream.set_read_timeout(Some(limit)).unwrap();
    let sent = bytes(length);
    stream.write_all(&sent).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut seen = Vec::new();
    stream.read_to_end(&mut seen).unwrap();
    assert!(seen == sent, "{} of {length} bytes came back", seen.len());
    echo.join().unwrap();
}

/// A pod with one veth to its node.
fn pod() -> (Namespace, Namespace) {
    let (node, pod) = (Namespace::new(), Namespace::new());
    node.ip(&format!("link add veth0 mtu 1400 type veth peer name eth0 mtu 1400 address 02:00:00:00:77:02 netns {}", pod.0));
    node.ip("address add 10.77.0.1/24 dev veth0");
    node.ip("address add fd77::1/64 dev veth0 nodad");
    node.ip("link set veth0 up");
    pod.ip("address add 10.77.0.2/24 dev eth0");
    pod.ip("address add fd77::2/64 dev eth0 nodad");
    pod.ip("link set eth0 up");
    (node, pod)
}

async fn connected(pod: &Namespace) -> Result<PodNetwork> {
    let mut undo = Undo::new("test");
    let result = connect(&pod.path(), &mut undo).await;
    undo.settle(result).await
}

async fn disconnected(pod: &Namespace, before: &(String, String)) {
    disconnect(&pod.path()).await.unwrap();
    assert_eq!(&pod.contents(), before);
}

const NODE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 77, 0, 1));

fn v6(last: u16) -> IpAddr {
    IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, last])
}

#[tokio::test]
async fn a_veth_reaches_the_guest() {
    if lacks("a_veth_reaches_the_guest") {
        return;
    }
    let (node, pod) = pod();
    pod.ip("route add default via 10.77.0.1 metric 5 mtu 1300");
    pod.ip("route add 10.99.0.0/16 via 10.77.9.9 dev eth0 onlink src 10.77.0.2");
    pod.ip("-6 route add default via fd77::1 dev eth0");
    pod.ip("route add 10.98.0.0/16 via inet6 fd77::1 dev eth0");
    pod.ip("neighbour add 10.77.0.7 lladdr 02:00:00:00:77:07 dev eth0 nud permanent");
    pod.ip("route add table 77 10.1.0.0/16 dev eth0");
    let before = pod.contents();
    let network = connected(&pod).await.unwrap();

    let [nic] = network.nics.as_slice() else { panic!("{network:?}") };
    assert_eq!((nic.index, nic.mac, nic.mtu), (0, MacAddress([2, 0, 0, 0, 0x77, 2]), 1400));
    let GuestNetwork { interfaces, routes, neighbours } = &network.setup;
    assert_eq!((interfaces[0].name.as_str(), interfaces[0].mtu), ("eth0", 1400));
    let addresses: Vec<_> = interfaces[0].addresses.iter().map(|address| (address.ip.clone(), address.prefix)).collect();
    assert!(addresses.contains(&(vec![10, 77, 0, 2], 24)), "{addresses:?}");
    assert!(addresses.iter().any(|(ip, prefix)| ip.starts_with(&[0xfd, 0x77]) && *prefix == 64), "{addresses:?}");
    let default = routes.iter().find(|route| route.prefix == 0 && !route.ipv6).unwrap();
    assert_eq!((default.gateway.as_slice(), default.metric, default.mtu), (&[10, 77, 0, 1][..], 5, 1300));
    let onlink = routes.iter().find(|route| route.destination == [10, 99, 0, 0]).unwrap();
    assert_eq!((onlink.onlink, onlink.source.as_slice(), onlink.prefix), (true, &[10, 77, 0, 2][..], 16));
    assert!(routes.iter().any(|route| route.ipv6 && route.prefix == 0 && route.gateway.len() == 16), "{routes:?}");
    assert!(routes.iter().any(|route| route.destination == [10, 98, 0, 0] && route.gateway.len() == 16), "{routes:?}");
    assert!(routes.iter().any(|route| route.destination == [10, 77, 0, 0] && route.gateway.is_empty()), "{routes:?}");
    assert!(!routes.iter().any(|route| route.destination == [10, 1, 0, 0]), "{routes:?}");
    assert!(routes.is_sorted_by_key(|route| !route.gateway.is_empty()));
    assert_eq!((neighbours[0].ip.as_slice(), neighbours[0].mac.as_slice()), (&[10, 77, 0, 7][..], &[2, 0, 0, 0, 0x77, 7][..]));
    assert_eq!(neighbours.len(), 1, "{neighbours:?}");

    let guest = Guest::start(&network).await;
    transfer(&guest.namespace, &node, NODE, 16 << 20).await;
    transfer(&guest.namespace, &node, v6(1), 16 << 20).await;
    transfer(&node, &guest.namespace, v6(2), 1 << 20).await;
    transfer(&node, &guest.namespace, [10, 77, 0, 2].into(), 1 << 20).await;
    let largest = guest.largest.load(Ordering::Relaxed);
    assert!(largest > 10_000, "segments are made before the wire: {largest}");
    drop(guest);
    disconnected(&pod, &before).await;
    // A second time there is nothing to do.
    disconnected(&pod, &before).await;
}

/// A guest without offloads is served too: the kernel makes the checksums and segments.
#[tokio::test]
async fn a_guest_without_offloads_is_served() {
    if lacks("a_guest_without_offloads_is_served") {
        return;
    }
    let (node, pod) = pod();
    let network = connected(&pod).await.unwrap();
    let guest = Guest::start(&network).await;
    sys::set_tap_offload(network.nics[0].tap.as_fd(), 0).unwrap();
    transfer(&node, &guest.namespace, v6(2), 1 << 20).await;
    transfer(&node, &guest.namespace, [10, 77, 0, 2].into(), 1 << 20).await;
}

#[tokio::test]
async fn taps_go_with_their_descriptors_and_attempts_replace_each_other() {
    if lacks("taps_go_with_their_descriptors_and_attempts_replace_each_other") {
        return;
    }
    let (node, pod) = pod();
    let before = pod.contents();
    let first = connected(&pod).await.unwrap();
    let second = connected(&pod).await.unwrap();
    assert_eq!(first.setup, second.setup);
    assert_eq!(pod.ip("-br link").matches("kuasar").count(), 1);
    let guest = Guest::start(&second).await;
    transfer(&guest.namespace, &node, NODE, 1000).await;
    drop((guest, first, second));
    assert_eq!(pod.contents().0, before.0, "the tap stays");
    disconnected(&pod, &before).await;
}

#[tokio::test]
async fn what_others_have_there_stays() {
    if lacks("what_others_have_there_stays") {
        return;
    }
    let (node, pod) = pod();
    pod.tc("qdisc add dev eth0 clsact");
    pod.tc("filter add dev eth0 egress protocol ip pref 7 u32 match u32 0 0 flowid 1:1");
    let before = (pod.contents(), pod.tc("filter show dev eth0 egress"));
    let network = connected(&pod).await.unwrap();
    let guest = Guest::start(&network).await;
    transfer(&guest.namespace, &node, NODE, 1000).await;
    drop(guest);
    disconnected(&pod, &before.0).await;
    assert_eq!(pod.tc("filter show dev eth0 egress"), before.1);
    assert_eq!(pod.tc("filter show dev eth0 ingress"), "");
}

#[tokio::test]
async fn several_interfaces_of_several_kinds() {
    if lacks("several_interfaces_of_several_kinds") {
        return;
    }
    let (node, pod) = pod();
    // The parent of those below, with its other end on the node.
    let middle = Namespace::new();
    node.ip(&format!("link add parent0 type veth peer name parent1 netns {}", middle.0));
    node.ip("address add 10.78.0.1/24 dev parent0");
    node.ip("link set parent0 up");
    middle.ip("link set parent1 up");
    let mut guests = vec![[10, 77, 0, 2]];
    for (number, kind) in [(2u8, "macvlan mode bridge"), (3, "macvtap mode bridge"), (4, "ipvlan mode l2")] {
        let link = format!("link add link parent1 name k{number} netns {} type {kind}", pod.0);
        let words: Vec<&str> = ["ip", "-n", &middle.0].into_iter().chain(link.split(' ')).collect();
        if !Command::new(words[0]).args(&words[1..]).output().unwrap().status.success() {
            eprintln!("SKIP several_interfaces_of_several_kinds, {kind}: the kernel has no such interfaces");
            continue;
        }
        pod.ip(&format!("address add 10.78.0.{number}/32 dev k{number}"));
        pod.ip(&format!("link set k{number} up"));
        node.ip(&format!("route add 10.78.0.{number}/32 dev parent0"));
        guests.push([10, 78, 0, number]);
    }
    // A bridge, with a port to the node.
    node.ip(&format!("link add port0 type veth peer name port1 netns {}", pod.0));
    node.ip("address add 10.79.0.1/24 dev port0");
    node.ip("link set port0 up");
    pod.ip("link add br0 type bridge");
    pod.ip("link set port1 master br0");
    pod.ip("link set port1 up");
    pod.ip("address add 10.79.0.2/24 dev br0");
    pod.ip("link set br0 up");
    guests.push([10, 79, 0, 2]);
    pod.ip("route add default via 10.77.0.1");
    // The guest answers from the interface that was asked.
    pod.ip("route add 10.78.0.1/32 dev k2");
    let before = pod.contents();
    let network = connected(&pod).await.unwrap();
    let names: Vec<_> = network.setup.interfaces.iter().map(|interface| interface.name.as_str()).collect();
    assert!(!names.contains(&"port1") && names.contains(&"br0"), "{names:?}");
    assert_eq!(names.len(), guests.len(), "{names:?}");
    let guest = Guest::start(&network).await;
    for address in &guests {
        eprintln!("to {address:?}");
        if address[1] == 78 {
            guest.namespace.ip(&format!("route replace 10.78.0.1/32 dev k{}", address[3]));
        }
        transfer(&node, &guest.namespace, (*address).into(), 1 << 20).await;
    }
    drop(guest);
    disconnected(&pod, &before).await;
}

#[tokio::test]
async fn a_tap_is_opened() {
    if lacks("a_tap_is_opened") {
        return;
    }
    for queues in ["", " multi_queue"] {
        let pod = Namespace::new();
        pod.ip(&format!("tuntap add dev eth0 mode tap{queues}"));
        pod.ip("link set eth0 up");
        let before = pod.contents();
        let network = connected(&pod).await.unwrap();
        assert_eq!(network.nics.len(), 1);
        // The namespace asks for its neighbour, and the machine hears it.
        pod.ip("address add 10.80.0.1/24 dev eth0");
        let asked =
            pod.within(|| StdStream::connect_timeout(&([10, 80, 0, 2], 1).into(), std::time::Duration::from_millis(200)));
        asked.await.unwrap_err();
        let mut frame = [0; 2000];
        let mut kinds = Vec::new();
        while let Ok(length) = rustix::io::read(&network.nics[0].tap, &mut frame) {
            // Behind the header for offloads and two addresses.
            kinds.push((length, frame[10 + 12], frame[10 + 13]));
        }
        assert!(kinds.iter().any(|(_, a, b)| (*a, *b) == (8, 6)), "no ARP: {kinds:?}");
        // A second machine cannot have it.
        assert!(connected(&pod).await.is_err() || queues == " multi_queue");
        drop(network);
        disconnect(&pod.path()).await.unwrap();
        assert_eq!(pod.contents().0, before.0);
    }
}

#[tokio::test]
async fn what_cannot_be_carried_is_refused_and_leaves_nothing() {
    if lacks("what_cannot_be_carried_is_refused_and_leaves_nothing") {
        return;
    }
    let (_node, pod) = pod();
    pod.ip("tuntap add dev tun0 mode tun");
    let before = pod.contents();
    // Down and without an address it is nobody's.
    drop(connected(&pod).await.unwrap());
    disconnected(&pod, &before).await;
    pod.ip("address add 10.5.0.1/24 dev tun0");
    pod.ip("link set tun0 up");
    let before = pod.contents();
    let error = connected(&pod).await.unwrap_err().report();
    assert!(error.contains("tun0 (tun)") && error.contains("use a tap"), "{error}");
    assert_eq!(pod.contents(), before);
    pod.ip("link del tun0");
    pod.ip("route add 10.6.0.0/16 nexthop via 10.77.0.1 nexthop via 10.77.0.3");
    let error = connected(&pod).await.unwrap_err().report();
    assert!(error.contains("10.6.0.0/16 has several next hops"), "{error}");
    pod.ip("route del 10.6.0.0/16");
    // The other tap of that name makes the second interface fail, after the first was made.
    pod.ip("link add eth1 type veth peer name eth2");
    pod.ip("link set eth1 up");
    pod.ip("address add 10.7.0.1/24 dev eth1");
    let index = pod.ip("-o link show eth1").split(':').next().unwrap().to_owned();
    pod.ip(&format!("link add kuasar{index} type veth peer name other"));
    let before = pod.contents();
    connected(&pod).await.unwrap_err();
    assert_eq!(pod.contents(), before);
}

#[tokio::test]
async fn a_namespace_that_is_gone() {
    if lacks("a_namespace_that_is_gone") {
        return;
    }
    let path = Namespace::new().path();
    disconnect(&path).await.unwrap();
    let error = connect(&path, &mut Undo::new("test")).await.unwrap_err().to_string();
    assert!(error.contains("is no network namespace"), "{error}");
    let file = tempfile::NamedTempFile::new().unwrap();
    disconnect(file.path()).await.unwrap();
    // One with a loopback interface only is a network, of nothing.
    let empty = Namespace::new();
    let network = connected(&empty).await.unwrap();
    assert!(network.nics.is_empty() && network.setup == GuestNetwork::default());
}

#[tokio::test]
async fn connecting_is_quick() {
    if lacks("connecting_is_quick") {
        return;
    }
    let (_node, pod) = pod();
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    let store = MemoryHolder::default().store();
    for _ in 0..20 {
        let begun = Instant::now();
        let network = connected(&pod).await.unwrap();
        times[0].push(begun.elapsed());
        drop(network);
        let begun = Instant::now();
        disconnect(&pod.path()).await.unwrap();
        times[1].push(begun.elapsed());
        let begun = Instant::now();
        let forwarder = Forwarder::attach(&pod.path(), &store, "forward".into()).await;
        times[2].push(begun.elapsed());
        drop(forwarder);
    }
    for (what, times) in ["connect", "disconnect", "attach the forwarder"].into_iter().zip(&mut times) {
        times.sort();
        println!("{what}: median {:?}, least {:?}, most {:?}", times[10], times[0], times[19]);
    }
    // Far above what it takes, for a machine with much else to do.
    assert!(times[0][10].as_millis() < 100, "{times:?}");
}

/// An agent: connects nowhere but echoes on even ports, after a greeting with the port's number, and refuses the odd ones.
fn agent() -> DuplexStream {
    let (ours, mut theirs) = duplex(1 << 16);
    tokio::spawn(async move {
        let port = theirs.read_u16().await.unwrap();
        if port % 2 == 1 {
            theirs.write_u8(0).await.unwrap();
            return;
        }
        theirs.write_u8(1).await.unwrap();
        let (mut plain, inside) = duplex(1 << 16);
        let echo = tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(inside);
            writer.write_u16(port).await.unwrap();
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.shutdown().await;
        });
        let _ = kuasar_guest_protocol::forward::relay(&mut plain, &mut theirs).await;
        drop(plain);
        echo.await.unwrap();
    });
    ours
}

async fn dial(pod: &Namespace, address: &str) -> tokio::net::TcpStream {
    let address: SocketAddr = address.parse().unwrap();
    let stream = pod.within(move || StdStream::connect(address).unwrap()).await;
    stream.set_nonblocking(true).unwrap();
    tokio::net::TcpStream::from_std(stream).unwrap()
}

async fn echoes(pod: &Namespace, address: &str) {
    let mut stream = dial(pod, address).await;
    let port = stream.read_u16().await.unwrap();
    assert!(address.ends_with(&format!(":{port}")), "{address} was taken for {port}");
    let (sent, mut seen) = (bytes(3 << 20), Vec::new());
    let (mut reader, mut writer) = stream.split();
    let sending = async {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let (_, read) = tokio::join!(sending, reader.read_to_end(&mut seen));
    read.unwrap();
    assert!(seen == sent, "{} bytes came back", seen.len());
}

#[tokio::test]
async fn the_loopback_interface_leads_to_the_guest() {
    if lacks("the_loopback_interface_leads_to_the_guest") {
        return;
    }
    let pod = Namespace::new();
    let holder = MemoryHolder::default();
    let store = holder.store();
    let forwarder = match Forwarder::attach(&pod.path(), &store, "forward".into()).await {
        Err(error @ Error::Unsupported { .. }) => {
            eprintln!("SKIP the_loopback_interface_leads_to_the_guest: {error}");
            return;
        }
        attached => attached.unwrap(),
    };
    assert_eq!(holder.names(), ["forward"]);
    let connector = || async { Ok(agent()) };
    {
        let tests = async {
            echoes(&pod, "127.0.0.1:8080").await;
            echoes(&pod, "127.9.9.9:80").await;
            echoes(&pod, "[::1]:9090").await;
            tokio::join!(echoes(&pod, "[::1]:5000"), echoes(&pod, "127.0.0.1:5000"));
            // Nothing listens there in the guest.
            for refused in ["127.0.0.1:8081", "[::1]:9091"] {
                let error = dial(&pod, refused).await.read_u8().await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            }
        };
        tokio::select! {
            () = forwarder.run(connector) => unreachable!(),
            () = tests => {}
        }
    }
    // The daemon dies; its successor goes on, with what came meanwhile too.
    std::mem::forget(forwarder);
    let mut waiting = dial(&pod, "127.0.0.1:7000").await;
    let next = holder.store();
    let forwarder = Forwarder::adopt(&next, "forward").unwrap().unwrap();
    assert!(Forwarder::adopt(&next, "forward").unwrap().is_none());
    let tests = async {
        assert_eq!(waiting.read_u16().await.unwrap(), 7000);
        echoes(&pod, "[::1]:9090").await;
    };
    tokio::select! {
        () = forwarder.run(connector) => unreachable!(),
        () = tests => {}
    }
    drop(forwarder);
    assert!(holder.names().is_empty());
}

/// Without a guest that answers, a client is told.
#[tokio::test]
async fn a_guest_that_does_not_play_along() {
    if lacks("a_guest_that_does_not_play_along") {
        return;
    }
    let pod = Namespace::new();
    let store = MemoryHolder::default().store();
    let forwarder = match Forwarder::attach(&pod.path(), &store, "forward".into()).await {
        Err(error @ Error::Unsupported { .. }) => {
            eprintln!("SKIP a_guest_that_does_not_play_along: {error}");
            return;
        }
        attached => attached.unwrap(),
    };
    let failing = || async { Err::<DuplexStream, _>(Error::invalid("vsock", "there is none")) };
    let babbling = || async {
        let (ours, mut theirs) = duplex(100);
        // Connected, and then a frame that is cut off.
        theirs.write_all(&[1, 0, 9, 1]).await.unwrap();
        Ok(ours)
    };
    let test = |expected: &'static [u8]| {
        let pod = &pod;
        async move {
            let mut seen = Vec::new();
            let error = dial(pod, "127.0.0.1:8080").await.read_to_end(&mut seen).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert!(expected.starts_with(&seen), "{seen:?}");
        }
    };
    tokio::select! {
        () = forwarder.run(failing) => unreachable!(),
        () = test(&[]) => {}
    }
    tokio::select! {
        () = forwarder.run(babbling) => unreachable!(),
        () = test(&[1]) => {}
    }
}
