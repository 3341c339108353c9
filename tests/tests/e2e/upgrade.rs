//! Live upgrade: no call fails, whatever the new program does.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::{ContainerState, PodSandboxState};
use kuasar_tests::leak::census;
use kuasar_tests::{Container, ContainerSpec, Node, tools};
use serde_json::Value;

use crate::suite::{Entry, Lone, cases};

/// Upgrades under load, besides those of `make chaos`.
const ROUNDS: usize = 5;

pub(crate) fn cases() -> Vec<Entry> {
    cases![Ours Alone: no_call_fails, what_fails_is_rolled_back]
}

async fn upgrade(node: &Node, binary: Option<&Path>) -> Result<Output> {
    node.kuasard.as_ref().context("the node has no kuasard")?.upgrade(binary).await
}

/// The programs that keeper and worker run.
async fn programs(node: &Node) -> Result<[PathBuf; 2]> {
    let kuasard = node.kuasard.as_ref().context("the node has no kuasard")?;
    let pids = [kuasard.pid().context("kuasard is not running")?, kuasard.worker_pid().await?];
    Ok([program(pids[0])?, program(pids[1])?])
}

fn program(pid: i32) -> Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).with_context(|| format!("the program of {pid}"))
}

/// Copies of the daemon's program, by turns the one and the other.
fn copies(dir: &Path) -> Result<[PathBuf; 2]> {
    let copies = ["one", "two"].map(|name| dir.join(name).join("kuasard"));
    for copy in &copies {
        fs::create_dir(copy.parent().context("no parent")?)?;
        fs::copy(tools::ours("kuasard")?, copy)?;
    }
    Ok(copies)
}

/// Pods, containers and execs, one after the other until `enough`; returns how many calls there were.
async fn load(node: &Node, lone: &Lone, enough: &AtomicBool) -> Result<usize> {
    let mut rounds = 0;
    while !enough.load(Ordering::Relaxed) {
        let pod = node.run_pod(lone.pod()).await.context("RunPodSandbox")?;
        let ending = pod.run(ContainerSpec::new("ending").sh("exit 7")).await.context("a container")?;
        let container = pod.run(ContainerSpec::new("c").sleep()).await.context("a container")?;
        assert_eq!(container.sh("echo on; exit 3").await.context("ExecSync")?.exit_code, 3);
        assert_eq!(ending.wait_exit().await?.exit_code, 7);
        container.stop(0).await.context("StopContainer")?;
        pod.remove_all().await.context("the removal of a pod")?;
        rounds += 1;
    }
    Ok(rounds)
}

async fn execs(container: &Container, enough: &AtomicBool) -> Result<usize> {
    let mut count = 0;
    while !enough.load(Ordering::Relaxed) {
        let ran = container.sh("sleep 0.05; echo on; exit 3").await.context("ExecSync")?;
        assert_eq!((ran.exit_code, ran.stdout().as_str()), (3, "on\n"));
        count += 1;
    }
    Ok(count)
}

async fn no_call_fails(lone: &Lone) -> Result<()> {
    let node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let dir = node.dir().join("programs");
    fs::create_dir(&dir)?;
    let copies = copies(&dir)?;
    let pod = node.run_pod(lone.pod().shared_pid()).await?;
    let counter = pod.run(ContainerSpec::new("counter").sh("i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done")).await?;
    let standing = pod.run(ContainerSpec::new("standing").sleep()).await?;
    let pid = counter.pid().await?;
    let start = census::start_time(pid);
    let keeper = node.kuasard.as_ref().and_then(|kuasard| kuasard.pid());
    let mut session = standing.exec_session(&["sh", "-c", "read x; echo got $x; exit 6"], false, true).await?;

    let enough = AtomicBool::new(false);
    let upgraded = async {
        let mut upgrades = 0;
        for round in 0..ROUNDS {
            let binary = &copies[round % 2];
            let output = upgrade(&node, Some(binary)).await?;
            ensure!(output.status.success(), "kuasarctl upgrade: {output:?}");
            let said: Value = serde_json::from_slice(&output.stdout)?;
            ensure!(said["before"]["pid"] != said["after"]["pid"], "the same worker: {said}");
            ensure!(said["milliseconds"].is_u64(), "no time: {said}");
            assert_eq!(programs(&node).await?, [binary.clone(), binary.clone()]);
            upgrades += 1;
        }
        Ok::<_, anyhow::Error>(upgrades)
    };
    let upgraded = async {
        let upgraded = upgraded.await;
        enough.store(true, Ordering::Relaxed);
        upgraded
    };
    // Joined and not tried, so that nothing is in flight when one fails.
    let (upgraded, loaded, also, ran) =
        tokio::join!(upgraded, load(&node, lone, &enough), load(&node, lone, &enough), execs(&standing, &enough));
    assert_eq!(upgraded?, ROUNDS);
    ensure!(loaded.context("under load")? + also.context("under load")? > 0, "no load");
    ensure!(ran.context("under load")? > 0, "no execs");

    assert_eq!(node.kuasard.as_ref().and_then(|kuasard| kuasard.pid()), keeper);
    session.write(b"it\n").await?;
    assert_eq!(session.finish().await?, (6, "got it\n".to_owned()));
    assert_eq!(pod.state().await?, PodSandboxState::SandboxReady);
    assert_eq!(counter.state().await?, ContainerState::ContainerRunning);
    assert_eq!((counter.pid().await?, census::start_time(pid)), (pid, start));
    // Without a program named: what is installed by now where the running one was.
    let running = &copies[(ROUNDS - 1) % 2];
    let new = dir.join("new");
    fs::copy(&copies[ROUNDS % 2], &new)?;
    fs::rename(new, running)?;
    let output = upgrade(&node, None).await?;
    ensure!(output.status.success(), "kuasarctl upgrade: {output:?}");
    assert_eq!(programs(&node).await?, [running.clone(), running.clone()]);

    counter.stop(0).await?;
    let seen = crate::daemon::numbers(&counter.logs()?)?;
    ensure!(seen.iter().copied().eq(1..=seen.len() as u64), "lines were lost or repeated");
    pod.remove_all().await?;
    fs::remove_dir_all(&dir)?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

async fn what_fails_is_rolled_back(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let dir = node.dir().join("programs");
    fs::create_dir(&dir)?;
    let pod = node.run_pod(lone.pod()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let (real, kuasard) = (tools::ours("kuasard")?, node.kuasard.as_ref().context("the node has no kuasard")?);
    let (real, format) = (real.display(), kuasard.state().join("format.json"));
    let (config, format) = (kuasard.config().to_path_buf(), format.display());
    let good = fs::read_to_string(&config)?;
    // As worker they are told whom to ask.
    let scripts = [
        ("ends", "exit 9".to_owned(), "ended with status 9 before it served"),
        ("dies", "kill -9 $$".to_owned(), "ended with status 137 before it served"),
        (
            "older",
            format!(
                "cp {format} {format}.kept; echo '{{\"version\":99,\"writer\":\"9.9\"}}' > {format}; {real} \"$@\"; code=$?; \
                 mv {format}.kept {format}; exit $code"
            ),
            "was written by kuasard 9.9 in format 99",
        ),
        ("no-keeper", format!("[ -n \"$KUASAR_KEEPER\" ] || exit 3; exec {real} \"$@\""), "the keeper remains the old program"),
    ];
    let mut tried = Vec::new();
    for (name, script, why) in scripts {
        let path = dir.join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        tried.push((path, why));
    }
    let text = dir.join("text");
    fs::write(&text, "no program")?;
    fs::set_permissions(&text, fs::Permissions::from_mode(0o755))?;
    tried.push((text, "cannot be started"));
    for (path, why) in &tried {
        let output = upgrade(&node, Some(path)).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains(why), "{}: {output:?}", path.display());
        ensure!(said.contains("the upgrade failed"), "{said}");
        let expected = tools::ours("kuasard")?.canonicalize()?;
        assert_eq!(programs(&node).await?, [expected.clone(), expected]);
        assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    }
    // A configuration with a fault is one of the new program's: the old goes on with what it had, also after a crash.
    fs::write(&config, "[sandboxer")?;
    let output = upgrade(&node, None).await?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && said.contains("kuasar.toml"), "{said}");
    let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
    let killed = kuasard.kill_worker().await?;
    kuasard.wait_serving(killed).await?;
    assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    fs::write(&config, good)?;
    // What is no program is refused before anything happens.
    for (path, why) in [(dir.join("none"), "No such file"), (dir.clone(), "is no program"), (config, "is no program")] {
        let output = upgrade(&node, Some(&path)).await?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && said.contains(why), "{said}");
    }
    pod.remove_all().await?;
    fs::remove_dir_all(&dir)?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}
