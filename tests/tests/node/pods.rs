//! Pods below slices of systemd, as kubelet makes them.

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::{ContainerState, LinuxContainerResources, SecurityProfile, security_profile::ProfileType};
use kuasar_tests::{Container, ContainerSpec, PodSpec};

use crate::suite::{Entry, Site, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![lifecycle, limits_reach_the_kernel_and_systemd, a_user_namespace, apparmor_by_default]
}

/// Prints `ready`, ends with 7 of SIGTERM.
pub(crate) const WAITS: &str = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";

/// The unit that the OCI runtime has made for a container.
pub(crate) fn scope_of(container: &Container) -> String {
    format!("cri-containerd-{}.scope", container.id)
}

async fn lifecycle(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod"), &[]).await?;
    ensure!(!pod.ip().await?.is_empty(), "the pod has no address");
    let container = pod.run(ContainerSpec::new("c").sh(WAITS)).await?;
    let ran = container.sh("echo out; echo err >&2; exit 3").await?;
    ensure!((ran.exit_code, ran.stdout().as_str(), ran.stderr().as_str()) == (3, "out\n", "err\n"), "exec: {ran:?}");
    let slice = site.show(&scope_of(&container), "Slice").await?;
    ensure!(slice.starts_with("kubepods-burstable-pod"), "the scope's slice is {slice}");
    let delegate = site.show(&scope_of(&container), "Delegate").await?;
    ensure!(delegate == "yes", "the scope's Delegate is {delegate}");
    container.stop(10).await?;
    let status = container.wait_exit().await?;
    ensure!(status.exit_code == 7, "the exit code is {}, {}", status.exit_code, status.reason);
    let log = site.log(&container).await?;
    ensure!(log.first().is_some_and(|line| line.text == "ready"), "the log is {log:?}");
    container.remove().await?;
    pod.remove_all().await?;
    Ok(())
}

async fn limits_reach_the_kernel_and_systemd(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod").host_network(), &[("MemoryMax", 128 << 20), ("CPUWeight", 50)]).await?;
    let spec = ContainerSpec::new("c").sh(WAITS).memory_limit(64 << 20).cpu_limit(50_000, 100_000).cpu_shares(512);
    let container = pod.run(spec).await?;
    limits(site, &container, 64 << 20, "50000 100000", "500ms").await.context("as created")?;
    let above = site.sh(&format!("cat /sys/fs/cgroup{}/../memory.max", group(site, &container).await?)).await?;
    ensure!(above == (128 << 20).to_string(), "the slice's memory.max is {above}");
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        cpu_quota: 20_000,
        cpu_period: 100_000,
        cpu_shares: 512,
        ..Default::default()
    };
    container.update(resources).await?;
    limits(site, &container, 96 << 20, "20000 100000", "200ms").await.context("after the update")?;
    // systemd writes what it knows.
    site.sh("systemctl daemon-reload").await?;
    limits(site, &container, 96 << 20, "20000 100000", "200ms").await.context("after systemctl daemon-reload")?;
    ensure!(container.state().await? == ContainerState::ContainerRunning, "it does not run");
    Ok(())
}

/// Its control group.
pub(crate) async fn group(site: &Site, container: &Container) -> Result<String> {
    let group = site.show(&scope_of(container), "ControlGroup").await?;
    ensure!(!group.is_empty(), "the scope has no control group");
    Ok(group)
}

async fn limits(site: &Site, container: &Container, memory: u64, cpu: &str, per_second: &str) -> Result<()> {
    let group = group(site, container).await?;
    let files = site.sh(&format!("cd /sys/fs/cgroup{group} && cat memory.max cpu.max")).await?;
    ensure!(files == format!("{memory}\n{cpu}"), "memory.max and cpu.max are {files:?}");
    let scope = scope_of(container);
    let (limit, quota) = (site.show(&scope, "MemoryMax").await?, site.show(&scope, "CPUQuotaPerSecUSec").await?);
    ensure!(limit == memory.to_string() && quota == per_second, "systemd has MemoryMax {limit}, CPUQuotaPerSecUSec {quota}");
    Ok(())
}

async fn a_user_namespace(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod").user_namespace(300_000, 65_536), &[]).await?;
    let container = pod.run(ContainerSpec::new("c").sh(WAITS)).await?;
    let map = container.exec(["cat", "/proc/1/uid_map"]).await?.stdout();
    ensure!(map.split_whitespace().eq(["0", "300000", "65536"]), "the map is {map:?}");
    let owner = container.exec(["stat", "-c", "%u", "/", "/bin"]).await?.stdout();
    ensure!(owner == "0\n0\n", "its files are of {owner:?}");
    let outside = site.sh(&format!("stat -c %u /proc/{}", container.pid().await?)).await?;
    ensure!(outside == "300000", "on the node it is {outside}'s");
    Ok(())
}

async fn apparmor_by_default(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod").host_network(), &[]).await?;
    for (kind, label) in
        [(ProfileType::RuntimeDefault, "cri-containerd.apparmor.d (enforce)"), (ProfileType::Unconfined, "unconfined")]
    {
        let mut spec = ContainerSpec::new("c").sh(WAITS);
        spec.security().apparmor = Some(SecurityProfile { profile_type: kind.into(), localhost_ref: String::new() });
        let container = pod.run(spec).await?;
        let current = site.sh(&format!("cat /proc/{}/attr/current", container.pid().await?)).await?;
        ensure!(current == label, "{kind:?}: its label is {current}");
        let inside = container.exec(["cat", "/proc/self/attr/current"]).await?.stdout();
        ensure!(inside.trim() == label, "{kind:?}: an exec's label is {inside}");
    }
    Ok(())
}
