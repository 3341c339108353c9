//! A pod in a virtual machine in the node: with KVM, which QEMU emulates for the node, and the kernel's vsock.

use std::time::Duration;

use anyhow::{Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::ContainerState;
use kuasar_tests::vm_node::quote;
use kuasar_tests::{ContainerSpec, PodSpec, skip};

use crate::pods::WAITS;
use crate::suite::{Entry, Site, cases, suite};

pub(crate) fn cases() -> Vec<Entry> {
    cases![; slow: a_pod_with_kvm]
}

const HANDLER: &str = "kuasar-qemu";
/// A guest on an emulated processor takes its time.
const CONFIGURATION: &str =
    "[sandboxer.kuasar-qemu]\nkind = 'vmm'\nhypervisor = 'qemu'\naccel = 'kvm'\nboot_limit_secs = 600\n";
const FILE: &str = "/etc/kuasar/conf.d/qemu.toml";
const DROP_IN: &str = "kuasarctl containerd-config >/etc/containerd/conf.d/kuasar.toml && systemctl restart containerd";

async fn a_pod_with_kvm(site: &mut Site) -> Result<()> {
    if suite() == "bookworm" {
        skip::record("machines::a_pod_with_kvm", "bookworm has no virtiofsd that is new enough");
        return Ok(());
    }
    site.sh("modprobe -a kvm-amd vhost_vsock vhost_net").await?;
    site.sh(&format!("printf %s {} >{FILE}", quote(CONFIGURATION))).await?;
    site.node.script(&format!("systemctl reload kuasard && {DROP_IN}")).timeout(Duration::from_secs(180)).check().await?;
    site.cri_is_ready().await?;
    let tested = with_kvm(site).await;
    site.cri.remove_all_pods().await?;
    site.sh(&format!("rm {FILE} && systemctl reload kuasard && {DROP_IN}")).await?;
    tested?;
    site.cri_is_ready().await
}

async fn with_kvm(site: &mut Site) -> Result<()> {
    let check = site.sh("kuasarctl check | grep 'virtual machines, kuasar-qemu'").await?;
    ensure!(check.starts_with("ok") && check.contains("KVM") && check.contains("/dev/vhost-vsock"), "check says {check}");
    let pod = site.pod_of(PodSpec::new("vm"), &[], HANDLER).await?;
    let group = format!("$(find /sys/fs/cgroup -path '*/kuasar-vm-{}/cgroup.procs')", pod.id);
    let open = site.sh(&format!("for pid in $(cat {group}); do ls -l /proc/$pid/fd; done")).await?;
    for what in ["kvm-vm", "/dev/vhost-vsock"] {
        ensure!(open.contains(what), "QEMU has no {what} open: {open}");
    }
    ensure!(!pod.ip().await?.is_empty(), "the pod has no address");
    let container = pod.run(ContainerSpec::new("c").sh(WAITS)).await?;
    let ran = container.sh("uname -r; exit 3").await?;
    ensure!(ran.exit_code == 3 && ran.stdout().trim() != site.sh("uname -r").await?, "exec: {ran:?}");
    site.sh("systemctl restart kuasard").await?;
    ensure!(container.exec(["echo", "ok"]).await?.stdout() == "ok\n", "exec after a restart of the daemon");
    ensure!(container.state().await? == ContainerState::ContainerRunning, "it does not run");
    container.stop(60).await?;
    let status = container.wait_exit().await?;
    ensure!(status.exit_code == 7, "the exit code is {}, {}", status.exit_code, status.reason);
    let log = site.log(&container).await?;
    ensure!(log.len() == 1 && log[0].text == "ready", "the log is {log:?}");
    Ok(())
}
