//! What the containers of a pod share with each other and with the node.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::{ContainerState, NamespaceMode};
use kuasar_tests::{Container, ContainerSpec};
use serde_json::Value;

use crate::suite::{Case, Entry, cases, eventually, refused};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Handlers Shared:
        a_pod_is_apart_and_its_containers_are_together,
        each_container_has_its_own_processes,
        a_pod_shares_its_processes,
        orphans_are_reaped,
        a_container_ends_whole_in_a_shared_pid_namespace,
        the_nodes_processes,
        the_processes_of_a_target,
        a_target_that_does_not_run,
        the_nodes_network,
        the_nodes_ipc,
        everything_of_the_node,
    ];
    cases.extend(cases![Ours Shared: the_init_of_a_pod_is_ours, crictl_inspectp_names_them]);
    cases
}

/// The namespace that a container is in, as the kernel names it.
async fn namespace(container: &Container, kind: &str) -> Result<String> {
    let ran = container.sh(&format!("readlink /proc/self/ns/{kind}")).await?;
    ensure!(ran.exit_code == 0, "{ran:?}");
    Ok(ran.stdout().trim().to_owned())
}

fn own_namespace(kind: &str) -> Result<String> {
    let path = format!("/proc/self/ns/{kind}");
    Ok(std::fs::read_link(&path).with_context(|| format!("read {path}"))?.display().to_string())
}

async fn a_pod_is_apart_and_its_containers_are_together(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let one = pod.run(ContainerSpec::new("one").sleep()).await?;
    let two = pod.run(ContainerSpec::new("two").sleep()).await?;
    let other = case.pod().await?.run(ContainerSpec::new("other").sleep()).await?;
    for kind in ["net", "ipc", "uts"] {
        assert_eq!(namespace(&one, kind).await?, namespace(&two, kind).await?, "{kind} is the pod's");
        assert_ne!(namespace(&one, kind).await?, namespace(&other, kind).await?, "{kind} is one pod's");
        assert_ne!(namespace(&one, kind).await?, own_namespace(kind)?, "{kind} is not the node's");
    }
    for kind in ["mnt", "pid"] {
        assert_ne!(namespace(&one, kind).await?, namespace(&two, kind).await?, "{kind} is the container's");
        assert_ne!(namespace(&one, kind).await?, own_namespace(kind)?, "{kind} is not the node's");
    }
    // System V shared memory is of the IPC namespace.
    let segments = |container: Container| async move { Ok::<_, anyhow::Error>(container.exec(["ipcs", "-m"]).await?.stdout()) };
    assert_eq!(segments(one).await?, segments(two).await?);
    Ok(())
}

async fn each_container_has_its_own_processes(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let one = pod.run(ContainerSpec::new("one").command(&["sleep", "1111"])).await?;
    let two = pod.run(ContainerSpec::new("two").command(&["sleep", "2222"])).await?;
    for (container, command) in [(&one, "sleep 1111 "), (&two, "sleep 2222 ")] {
        assert_eq!(container.sh("tr '\\0' ' ' </proc/1/cmdline").await?.stdout(), command);
    }
    assert_eq!(one.sh("ps | grep '[s]leep 2222'").await?.exit_code, 1);
    Ok(())
}

async fn a_pod_shares_its_processes(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().shared_pid()).await?;
    let one = pod.run(ContainerSpec::new("one").command(&["sleep", "1111"])).await?;
    let two = pod.run(ContainerSpec::new("two").command(&["sleep", "2222"])).await?;
    assert_eq!(namespace(&one, "pid").await?, namespace(&two, "pid").await?);
    assert_ne!(namespace(&one, "pid").await?, own_namespace("pid")?);
    assert_eq!(one.sh("ps | grep '[s]leep 2222'").await?.exit_code, 0);
    // A signal reaches across; the root file system is across, too.
    assert_eq!(two.sh("touch /in-two").await?.exit_code, 0);
    assert_eq!(
        one.sh("test -e /proc/$(pgrep -x sleep | tail -1)/root/ && kill -TERM $(ps | awk '/[s]leep 2222/{print $1}')")
            .await?
            .exit_code,
        0
    );
    two.wait_exit().await?;
    assert_eq!(one.state().await?, ContainerState::ContainerRunning);
    // One that asks for its own has its own.
    let apart = pod.run(ContainerSpec::new("apart").sleep().pid(NamespaceMode::Container, "")).await?;
    assert_ne!(namespace(&one, "pid").await?, namespace(&apart, "pid").await?);
    Ok(())
}

async fn crictl_inspectp_names_them(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().shared_pid()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let info: Value = serde_json::from_str(pod.status().await?.info.get("info").context("no info")?)?;
    let named = info["runtimeSpec"]["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
    let path = |kind: &str| named.iter().find(|one| one["type"] == kind).and_then(|one| one["path"].as_str());
    let inode = |kind| Ok::<_, anyhow::Error>(std::fs::metadata(path(kind).with_context(|| format!("no {kind}"))?)?.ino());
    inode("network")?;
    if case.is_machine() {
        // The others are the guest's.
        assert_eq!((&info["pid"], named.len()), (&Value::from(0), 1));
        return Ok(());
    }
    for (kind, name) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts"), ("pid", "pid")] {
        assert_eq!(format!("{name}:[{}]", inode(kind)?), namespace(&container, name).await?);
    }
    let pid = std::fs::read_link(format!("/proc/{}/ns/pid", info["pid"]))?.display().to_string();
    assert_eq!(pid, namespace(&container, "pid").await?);
    Ok(())
}

async fn the_init_of_a_pod_is_ours(case: &Case) -> Result<()> {
    let container = case.run(case.spec().shared_pid()).await?.run(ContainerSpec::new("c").sleep()).await?;
    assert_eq!(container.exec(["cat", "/proc/1/comm"]).await?.stdout(), "kuasar-init\n");
    // It is none of the container's business: no way into the node by it.
    for path in ["/proc/1/root/", "/proc/1/cwd/", "/proc/1/fd/", "/proc/1/environ"] {
        let shown = container.sh(&format!("ls {path} 2>/dev/null | head -1; cat {path} 2>/dev/null")).await?;
        assert!(shown.stdout().is_empty() || shown.stdout() == "/proc/1/environ\n", "{path} shows {shown:?}");
    }
    // Nor does it end by what would end another process; SIGTERM is its business, as it is that of a pause container.
    container.sh("kill -HUP 1; kill -SEGV 1; kill -KILL 1").await?;
    assert_eq!(container.exec(["cat", "/proc/1/comm"]).await?.stdout(), "kuasar-init\n");
    Ok(())
}

async fn orphans_are_reaped(case: &Case) -> Result<()> {
    let container = case.run(case.spec().shared_pid()).await?.run(ContainerSpec::new("c").sleep()).await?;
    let script = "i=0; while [ $i -lt 100 ]; do i=$((i+1)); sh -c 'sleep 0.05 & exit'; done; echo made";
    assert_eq!(container.sh(script).await?.stdout(), "made\n");
    eventually("all orphans to be gone", || async {
        // A zombie's state is Z.
        let left = container.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c -E '\\) Z |\\(sleep\\) . 1 '").await?;
        // The container's own sleep may have number 1 as its parent.
        Ok(left.stdout().trim().parse::<u32>().unwrap_or(u32::MAX) <= 1
            && container.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep '(sleep) Z '").await?.exit_code == 1)
    })
    .await
}

async fn a_container_ends_whole_in_a_shared_pid_namespace(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().shared_pid()).await?;
    let watch = pod.run(ContainerSpec::new("watch").command(&["tail", "-f", "/dev/null"])).await?;
    let script = "sleep 5555 & setsid sleep 5555 & (trap '' TERM; sleep 5555) & echo up; exit 0";
    let count = || async { Ok::<_, anyhow::Error>(watch.sh("pgrep -x sleep | wc -l").await?.stdout().trim().to_owned()) };
    // Its first process ends by itself: what it has started ends with it.
    let ends = pod.run(ContainerSpec::new("ends").sh(script)).await?;
    assert_eq!(ends.wait_exit().await?.exit_code, 0);
    eventually("its children to be gone", || async { Ok(count().await? == "0") }).await?;
    // It is stopped.
    let stopped = pod.run(ContainerSpec::new("stopped").sh(&script.replace("exit 0", "wait"))).await?;
    eventually("its children to run", || async { Ok(count().await? == "3") }).await?;
    stopped.stop(0).await?;
    eventually("its children to be gone", || async { Ok(count().await? == "0") }).await?;
    assert_eq!(watch.state().await?, ContainerState::ContainerRunning);
    Ok(())
}

async fn the_nodes_processes(case: &Case) -> Result<()> {
    let container = case.run(case.spec().host_pid()).await?.run(ContainerSpec::new("c").sleep()).await?;
    assert_eq!(namespace(&container, "pid").await?, own_namespace("pid")?);
    let own = format!("cat /proc/{}/comm", std::process::id());
    let comm = std::fs::read_to_string("/proc/self/comm")?;
    assert_eq!(container.sh(&own).await?.stdout(), comm, "it sees this test");
    container.stop(0).await?;
    assert_eq!(container.status().await?.exit_code, 137);
    Ok(())
}

async fn the_processes_of_a_target(case: &Case) -> Result<()> {
    // As an ephemeral container of kubectl debug has it.
    let pod = case.pod().await?;
    let target = pod.run(ContainerSpec::new("target").command(&["sleep", "1111"])).await?;
    let other = pod.run(ContainerSpec::new("other").command(&["sleep", "2222"])).await?;
    let debug = pod.run(ContainerSpec::new("debug").sleep().pid(NamespaceMode::Target, &target.id)).await?;
    assert_eq!(namespace(&debug, "pid").await?, namespace(&target, "pid").await?);
    assert_ne!(namespace(&debug, "pid").await?, namespace(&other, "pid").await?);
    assert_eq!(debug.sh("tr '\\0' ' ' </proc/1/cmdline").await?.stdout(), "sleep 1111 ");
    assert_eq!(debug.sh("ps | grep '[s]leep 2222'").await?.exit_code, 1);
    debug.stop(0).await?;
    assert_eq!(target.state().await?, ContainerState::ContainerRunning);
    Ok(())
}

async fn a_target_that_does_not_run(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let ended = pod.run(ContainerSpec::new("ended").command(&["true"])).await?;
    ended.wait_exit().await?;
    let spec = || ContainerSpec::new("debug").sleep();
    refused(pod.create(spec().pid(NamespaceMode::Target, &ended.id)).await, &["target"])?;
    refused(pod.create(spec().pid(NamespaceMode::Target, "no-such-container")).await, &["target"])?;
    // Nor one of another pod.
    let other = case.sleeper().await?;
    refused(pod.create(spec().pid(NamespaceMode::Target, &other.id)).await, &["target"])?;
    Ok(())
}

async fn the_nodes_network(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    assert_eq!(namespace(&container, "net").await?, own_namespace("net")?);
    assert_eq!(container.exec(["hostname"]).await?.stdout().trim(), nix::unistd::gethostname()?.to_string_lossy());
    let devices = std::fs::read_to_string("/proc/self/net/dev")?;
    let names = |text: &str| {
        let names = text.lines().skip(2).filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned()));
        names.filter(|name| !name.starts_with("veth")).collect::<Vec<_>>()
    };
    let seen = container.exec(["cat", "/proc/net/dev"]).await?.stdout();
    assert!(names(&seen).contains(&"lo".to_owned()) && names(&devices).iter().any(|name| names(&seen).contains(name)));
    Ok(())
}

async fn the_nodes_ipc(case: &Case) -> Result<()> {
    let name = format!("kuasar-e2e-{}", case.handler);
    let on_node = Path::new("/dev/shm").join(format!("{name}-{}", std::process::id()));
    std::fs::write(&on_node, "from the node")?;
    let checked = async {
        let container = case.run(case.spec().host_network().host_ipc()).await?.run(ContainerSpec::new("c").sleep()).await?;
        assert_eq!(namespace(&container, "ipc").await?, own_namespace("ipc")?);
        let ran = container.exec(["cat".to_owned(), on_node.display().to_string()]).await?;
        assert_eq!(ran.stdout(), "from the node");
        Ok(())
    }
    .await;
    std::fs::remove_file(&on_node)?;
    checked
}

async fn everything_of_the_node(case: &Case) -> Result<()> {
    let spec = case.spec().host_network().host_ipc().host_pid();
    let container = case.run(spec).await?.run(ContainerSpec::new("c").sleep()).await?;
    for kind in ["net", "ipc", "pid", "uts"] {
        assert_eq!(namespace(&container, kind).await?, own_namespace(kind)?, "{kind}");
    }
    assert_ne!(namespace(&container, "mnt").await?, own_namespace("mnt")?);
    Ok(())
}
