//! How a pod is reached.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::ContainerSpec;
use kuasar_tests::image::recipes;
use kuasar_tests::{Node, wait};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::suite::{Case, Entry, Lone, cases, eventually};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Handlers Alone: ports_of_the_node];
    cases.extend(cases![Handlers Shared:
        a_pod_has_an_address_that_is_reached,
        pods_reach_each_other,
        a_server_on_the_nodes_network,
        addresses_are_given_back,
    ]);
    cases
}

/// What a web server answers.
async fn get(address: SocketAddr) -> Result<String> {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await?;
        Ok::<_, std::io::Error>(reply)
    };
    let reply = tokio::time::timeout(std::time::Duration::from_secs(5), asked).await;
    reply.with_context(|| format!("no answer from {address}"))?.with_context(|| format!("ask {address}"))
}

async fn a_pod_has_an_address_that_is_reached(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let ip = pod.ip().await?;
    let web = pod.run(ContainerSpec::new("web").image(recipes::WEB)).await?;
    let client = pod.run(ContainerSpec::new("client").sleep()).await?;
    web.wait_log("serving").await?;
    // From the node, from beside, and by loopback.
    assert!(get(SocketAddr::new(ip.parse()?, 80)).await?.ends_with("ok\n"));
    for host in [ip.as_str(), "127.0.0.1"] {
        assert_eq!(client.exec(["wget", "-q", "-O", "-", &format!("http://{host}/")]).await?.stdout(), "ok\n");
    }
    let addresses = client.exec(["ip", "-4", "-o", "addr", "show"]).await?.stdout();
    assert!(addresses.contains(&format!("inet {ip}/24")) && addresses.contains("inet 127.0.0.1/8"), "{addresses}");
    Ok(())
}

async fn pods_reach_each_other(case: &Case) -> Result<()> {
    let (one, two) = (case.pod().await?, case.pod().await?);
    let web = one.run(ContainerSpec::new("web").image(recipes::WEB)).await?;
    web.wait_log("serving").await?;
    let client = two.run(ContainerSpec::new("client").sleep()).await?;
    let url = format!("http://{}/", one.ip().await?);
    assert_eq!(client.exec(["wget", "-q", "-O", "-", &url]).await?.stdout(), "ok\n");
    assert_ne!(one.ip().await?, two.ip().await?);
    // Loopback is each one's own.
    assert_ne!(client.exec(["wget", "-q", "-T", "2", "-O", "-", "http://127.0.0.1/"]).await?.exit_code, 0);
    Ok(())
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

async fn a_server_on_the_nodes_network(case: &Case) -> Result<()> {
    let port = free_port()?;
    let pod = case.quick_pod().await?;
    assert_eq!(pod.ip().await?, "");
    let web = pod.run(ContainerSpec::new("web").image(recipes::WEB).env("PORT", &port.to_string())).await?;
    web.wait_log("serving").await?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    assert!(get(address).await?.ends_with("ok\n"));
    web.stop(0).await?;
    ensure!(get(address).await.is_err(), "nobody listens any more");
    Ok(())
}

async fn addresses_are_given_back(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let lease = case.node.containerd.paths().cni_leases.join("kuasar").join(pod.ip().await?);
    assert!(lease.exists(), "{}", lease.display());
    pod.stop().await?;
    eventually("the address to be given back", || async { Ok(!lease.exists()) }).await
}

async fn ports_of_the_node(lone: &Lone) -> Result<()> {
    if kuasar_tests::process::run(std::process::Command::new("iptables").args(["-t", "nat", "-S", "POSTROUTING"])).is_err() {
        return lone.skip("iptables does not work here: ports of the node cannot be mapped");
    }
    let node = Node::start(lone.options().host_ports()).await?;
    let before = lone.baseline(&node).await?;
    let port = free_port()?;
    let pod = node.run_pod(lone.pod().port(i32::from(port), 80)).await?;
    let web = pod.run(ContainerSpec::new("web").image(recipes::WEB)).await?;
    web.wait_log("serving").await?;
    // The node's side of the bridge is an address of the node.
    let octets: Ipv4Addr = pod.ip().await?.parse()?;
    let [a, b, c, _] = octets.octets();
    let address = SocketAddr::from((Ipv4Addr::new(a, b, c, 1), port));
    wait::until("the port of the node to lead to the pod", kuasar_tests::cri::SOON, || async {
        Ok(get(address).await.is_ok_and(|reply| reply.ends_with("ok\n")).then_some(()))
    })
    .await?;
    pod.remove_all().await?;
    ensure!(get(address).await.is_err(), "the port leads nowhere any more");
    node.assert_no_leak(&before).await?;
    node.stop().await
}
