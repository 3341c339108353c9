//! The harness itself, on the peer: containerd's runc-v2 shim. What passes here is no fault of the harness where it fails
//! with a sandboxer.

use anyhow::Result;
use kuasar_tests::cri::k8s_cri::v1::{ContainerState, LinuxContainerResources};
use kuasar_tests::image::recipes;
use kuasar_tests::{ContainerSpec, Node, NodeOptions, PodSpec, require, skip, tools};

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_and_leaves_nothing() -> Result<()> {
    require!(tools::Containerd::find());
    let node = Node::start(NodeOptions::new("pod")).await?;
    let before = node.snapshot()?;

    let pod = node.run_pod(PodSpec::new("pod").handler("runc")).await?;
    assert!(pod.ip().await?.starts_with("10."));
    let container = pod.run(ContainerSpec::new("c").sh("echo out; echo err >&2; exec sleep 1000")).await?;
    assert!(!container.wait_log("out").await?.is_stderr);
    assert!(container.wait_log("err").await?.is_stderr);
    let ran = container.exec(["cat", "/proc/1/comm"]).await?;
    assert_eq!((ran.exit_code, ran.stdout().as_str()), (0, "sleep\n"));
    assert_eq!(container.sh("exit 7").await?.exit_code, 7);
    assert!(container.pid().await? > 0);
    assert!(!node.snapshot()?.beyond(&before).is_empty(), "the leak check sees a running pod");
    container.stop(0).await?;
    assert_eq!(container.wait_exit().await?.exit_code, 137);
    pod.remove_all().await?;

    node.assert_no_leak(&before).await?;
    node.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_carry_what_is_written() -> Result<()> {
    require!(tools::Containerd::find());
    let node = Node::start(NodeOptions::new("streams")).await?;
    let pod = node.run_pod(PodSpec::new("pod").handler("runc")).await?;
    let container = pod.run(ContainerSpec::new("c").command(&["cat"]).stdin_once()).await?;

    let mut exec = container.exec_session(&["sh", "-c", "echo a; echo b >&2; exit 3"], false, false).await?;
    assert_eq!(exec.wait().await?, 3);
    assert_eq!((exec.out.as_slice(), exec.err.as_slice()), (b"a\n".as_slice(), b"b\n".as_slice()));

    let mut terminal = container.exec_session(&["sh"], true, true).await?;
    terminal.resize(91, 23).await?;
    // The size arrives on another channel than the command: ask until it is there.
    terminal.write(b"until stty size | grep '^23 91'; do sleep 0.05; done; exit 5\n").await?;
    assert_eq!(terminal.wait().await?, 5);
    terminal.wait_for("23 91").await?;

    let mut attached = container.attach(false, true).await?;
    attached.write(b"through the container\n").await?;
    attached.wait_for("through the container").await?;
    attached.close().await?;
    assert_eq!(container.wait_exit().await?.exit_code, 0, "cat ends with its stdin");

    let web = pod.run(ContainerSpec::new("web").image(recipes::WEB)).await?;
    web.wait_log("serving").await?;
    let reply = pod.port_forward(80).await?.request(b"GET / HTTP/1.1\r\n\r\n").await?;
    assert!(reply.ends_with(b"ok\n"), "{}", String::from_utf8_lossy(&reply));
    node.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_survive_a_restart_of_containerd() -> Result<()> {
    require!(tools::Containerd::find());
    let mut node = Node::start(NodeOptions::new("restart")).await?;
    let pod = node.run_pod(PodSpec::new("pod").handler("runc")).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    node.containerd.stop()?;
    node.containerd.start().await?;
    assert_eq!(container.state().await?, ContainerState::ContainerRunning);
    node.containerd.kill()?;
    node.containerd.start().await?;
    assert_eq!(container.sh("echo still here").await?.stdout(), "still here\n");
    node.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pods_resources_can_be_updated() -> Result<()> {
    let tools = require!(tools::Containerd::find());
    if tools.version < (2, 3, 0) {
        skip!("UpdatePodSandboxResources needs containerd 2.3");
    }
    let node = Node::start(NodeOptions::new("update")).await?;
    let pod = node.run_pod(PodSpec::new("pod").handler("runc")).await?;
    pod.update(LinuxContainerResources { cpu_shares: 512, ..Default::default() }, None).await?;
    node.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_test_leaves_nothing_either() -> Result<()> {
    require!(tools::Containerd::find());
    let node = Node::start(NodeOptions::new("dropped")).await?;
    let pod = node.run_pod(PodSpec::new("pod").handler("runc")).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    // Paused: nothing in a frozen cgroup dies.
    node.containerd.ctr(&["task", "pause", &container.id])?;
    let dir = node.dir().to_path_buf();
    drop(node);
    assert!(!dir.exists());
    let mounts = kuasar_tests::leak::census::mounts_below(&dir, std::process::id().cast_signed())?;
    assert!(mounts.is_empty(), "{mounts:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_come_from_the_registry_under_their_own_names() -> Result<()> {
    require!(tools::Containerd::find());
    let node = Node::start(NodeOptions::new("registry").registry(recipes::for_critest()?)).await?;
    let reference = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
    assert!(node.cri.image_status(reference).await?.is_none());
    node.cri.pull(reference).await?;
    assert!(node.cri.image_status(reference).await?.is_some());
    let error = node.cri.pull("registry.k8s.io/no-such-image:1").await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound, "{error}");
    node.stop().await
}
