//! The node itself, as the other cases use it: exit codes, streams, files, time limits, a reboot.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use kuasar_tests::cri::k8s_cri::v1::{ContainerState, PodSandboxState};
use kuasar_tests::vm_node::Stream;
use kuasar_tests::{ContainerSpec, PodSpec};

use crate::suite::{Entry, Site, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![exit_codes_are_the_commands, output_is_streamed, time_limits_hold, files_go_in_and_out, a_reboot_with_pods]
}

async fn exit_codes_are_the_commands(site: &mut Site) -> Result<()> {
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("no-such-command", 127), ("exit 255", 255), ("kill -9 $$", 137)] {
        let ran = site.node.script(script).run().await?;
        ensure!(ran.code == code, "{script:?} ended with {}", ran.code);
    }
    Ok(())
}

async fn output_is_streamed(site: &mut Site) -> Result<()> {
    let mut seen = Vec::new();
    let begun = Instant::now();
    let mut watch = |stream: Stream, bytes: &[u8]| seen.push((stream, begun.elapsed(), bytes.to_vec()));
    let ran = site.node.script("echo one; sleep 2; echo two >&2").watch(&mut watch).run().await?;
    ensure!((ran.out.as_slice(), ran.err.as_slice()) == (b"one\n".as_slice(), b"two\n".as_slice()), "{ran:?}");
    ensure!(seen.len() == 2 && seen[0].0 == Stream::Out && seen[1].0 == Stream::Err, "{seen:?}");
    ensure!(seen[1].1 - seen[0].1 > Duration::from_secs(1), "all came at once: {seen:?}");
    let bytes: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let ran = site.node.script("cat").stdin(&bytes).run().await?;
    ensure!(ran.out == bytes, "{} bytes of {} came back", ran.out.len(), bytes.len());
    Ok(())
}

async fn time_limits_hold(site: &mut Site) -> Result<()> {
    let Err(error) = site.node.script("sleep 1234").timeout(Duration::from_secs(1)).run().await else {
        bail!("sleep was let sleep");
    };
    ensure!(format!("{error:#}").contains("not done after 1 s"), "{error:#}");
    let left = site.node.script("pgrep -f 'slee[p] 1234'").run().await?;
    ensure!(left.code == 1, "it still sleeps: {}", left.stdout());
    Ok(())
}

async fn files_go_in_and_out(site: &mut Site) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    std::fs::write(&from, "some text")?;
    site.node.push(&from, "/root/pushed").await?;
    ensure!(site.sh("cat /root/pushed").await? == "some text", "another text there");
    site.node.pull("/root/pushed", &to).await?;
    ensure!(std::fs::read(&to)? == b"some text", "another text here");
    ensure!(site.node.pull("/root/nothing", &to).await.is_err(), "what is not there was copied");
    Ok(())
}

async fn a_reboot_with_pods(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod"), &[]).await?;
    // systemd gives what takes no notice of SIGTERM 90 s.
    let container = pod.run(ContainerSpec::new("c").sh("trap 'exit 0' TERM; while :; do sleep 0.1; done")).await?;
    site.node.reboot().await?;
    site.node.wait_running().await?;
    site.cri_is_ready().await?;
    let told = site.sh("kuasarctl gc --dry-run").await?;
    ensure!(told.contains("nothing to collect"), "gc would collect {told}");
    let pods = site.cri.pods().await?;
    ensure!(pods.len() == 1 && pods[0].state() == PodSandboxState::SandboxNotready, "pods are {pods:?}");
    let containers = site.cri.containers().await?;
    let has_ended = containers.len() == 1 && containers[0].state() == ContainerState::ContainerExited;
    ensure!(has_ended && containers[0].id == container.id, "containers are {containers:?}");
    let new = site.pod(PodSpec::new("new"), &[]).await?;
    let ran = new.run(ContainerSpec::new("c").sleep()).await?.exec(["echo", "ok"]).await?;
    ensure!(ran.exit_code == 0, "exec: {ran:?}");
    Ok(())
}
