//! Restarts: of containerd with pods running, and of kuasard, its worker alone or both its processes.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::join_all;
use kuasar_sandboxers::failpoint;
use kuasar_tests::cri::k8s_cri::v1::{ContainerState, PodSandboxState};
use kuasar_tests::cri::logs::Line;
use kuasar_tests::leak::census;
use kuasar_tests::systemd::Supervisor;
use kuasar_tests::{ContainerSpec, Node, NodeOptions, Pod, PodSpec, tools, wait};
use nix::sys::signal::Signal;
use serde_json::Value;
use tonic::Code;

use crate::kuasarctl::said;
use crate::suite::{Entry, Lone, agree, cases};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Stdio Alone: containerd_restarts];
    cases.extend(cases![Ours Alone:
        kuasard_is_away,
        the_worker_is_killed,
        the_keeper_is_killed,
        the_keeper_is_killed_under_systemd,
        the_keeper_and_containerd_are_killed,
        a_kill_for_want_of_memory_outlives_worker_and_containerd,
        kuasard_is_stopped_while_calls_are_in_flight,
        several_sandboxers,
    ]);
    cases
}

async fn gone(pid: i32) -> Result<()> {
    wait::until(&format!("process {pid} to be gone"), kuasar_tests::cri::SOON, || async {
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A zombie has ended, too.
        Ok((state.is_empty() || state.contains(") Z ")).then_some(()))
    })
    .await
}

pub(crate) fn numbers(lines: &[Line]) -> Result<Vec<u64>> {
    lines.iter().map(|line| line.text.parse().with_context(|| format!("{:?} is no number", line.text))).collect()
}

async fn containerd_restarts(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let flags = node.dir().join("run/flags");
    fs::create_dir(&flags)?;
    let pod = node.run_pod(lone.pod().shared_pid()).await?;
    let ip = pod.ip().await?;
    // One that counts, one that reads, one with a terminal, and for each restart one that ends while nobody looks.
    let counting = "i=0; while [ ! -e /flags/enough ]; do i=$((i+1)); echo $i; sleep 0.005; done; exec sleep 1000";
    let counter = pod.run(ContainerSpec::new("counter").sh(counting).mount(&flags, "/flags", true)).await?;
    let reader = pod.run(ContainerSpec::new("reader").command(&["cat"]).stdin()).await?;
    let terminal = pod.run(ContainerSpec::new("terminal").command(&["sh"]).tty().stdin()).await?;
    counter.wait_log("20").await?;

    for (code, abruptly) in [(7, false), (8, true)] {
        let script = format!("until test -e /flags/{code}; do sleep 0.01; done; exit {code}");
        let ending = pod.run(ContainerSpec::new("ending").sh(&script).mount(&flags, "/flags", true)).await?;
        let pid = ending.pid().await?;
        let count = numbers(&counter.logs()?)?.len();
        if abruptly {
            node.containerd.kill()?
        } else {
            node.containerd.stop()?
        }
        fs::write(flags.join(code.to_string()), "")?;
        gone(pid).await?;
        node.containerd.start().await?;

        assert_eq!(pod.state().await?, PodSandboxState::SandboxReady);
        assert_eq!(pod.ip().await?, ip);
        for container in [&counter, &reader, &terminal] {
            assert_eq!(container.state().await?, ContainerState::ContainerRunning, "{}", container.id);
            assert_eq!(container.sh("echo on; exit 3").await?.exit_code, 3);
        }
        let exited = ending.wait_exit().await?;
        if lone.is_ours() {
            // With its own shim containerd says 255.
            assert_eq!(exited.exit_code, code);
        }
        ending.remove().await?;
        // The log goes on.
        wait::until("the log to go on", kuasar_tests::cri::SOON, || async {
            Ok((counter.logs()?.len() > count + 50).then_some(()))
        })
        .await?;
        let mut session = counter.exec_session(&["sh", "-c", "read x; echo got $x"], false, true).await?;
        session.write(b"it\n").await?;
        assert_eq!(session.finish().await?, (0, "got it\n".to_owned()));
        // What is typed still arrives.
        let mut attached = reader.attach(false, true).await?;
        attached.write(b"typed\n").await?;
        attached.wait_for("typed").await?;
        attached.close().await?;
        let mut attached = terminal.attach(true, true).await?;
        attached.write(b"echo ty'p'ed\n").await?;
        attached.wait_for("typed\r\n").await?;
        attached.close().await?;
        assert_eq!(pod.run(ContainerSpec::new("new").sleep()).await?.sh("echo new").await?.stdout(), "new\n");
    }
    fs::write(flags.join("enough"), "")?;
    wait::until("the counter to end", kuasar_tests::cri::SOON, || async {
        Ok((counter.sh("pgrep -x sleep").await?.exit_code == 0).then_some(()))
    })
    .await?;
    counter.stop(0).await?;
    assert_eq!(counter.wait_exit().await?.exit_code, 137);
    let seen = numbers(&counter.logs()?)?;
    ensure!(seen.is_sorted_by(|one, next| one < next), "lines were repeated");
    if !lone.handler.ends_with("-streaming") {
        // What is on its way over a stream when containerd ends is lost with it: its protocol acknowledges nothing.
        ensure!(seen.iter().copied().eq(1..=seen.len() as u64), "lines were lost: {:?}", around_the_gap(&seen));
    }
    pod.remove_all().await?;
    fs::remove_dir_all(&flags)?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

fn around_the_gap(numbers: &[u64]) -> &[u64] {
    let gap = numbers.iter().zip(1..).position(|(seen, expected)| *seen != expected).unwrap_or(0);
    &numbers[gap.saturating_sub(3)..(gap + 3).min(numbers.len())]
}

async fn kuasard_is_away(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    kuasard(&mut node)?.stop()?;
    let error = node.run_pod(lone.pod()).await.map(|pod| pod.id).unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    // containerd itself starts without it, too.
    node.containerd.stop()?;
    node.containerd.start().await?;
    kuasard(&mut node)?.start().await?;
    let pod = wait::until("pods to run again", kuasar_tests::cri::SOON, || async {
        match node.run_pod(lone.pod()).await {
            Ok(pod) => Ok(Some(pod)),
            // containerd dials again when its backoff has passed.
            Err(status) if status.code() == Code::Unavailable => Ok(None),
            Err(status) => Err(status.into()),
        }
    })
    .await?;
    assert_eq!(pod.run(ContainerSpec::new("c").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    pod.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

fn kuasard(node: &mut Node) -> Result<&mut kuasar_tests::kuasard::Kuasard> {
    node.kuasard.as_mut().context("the node has no kuasard")
}

/// Pods of several kinds, one container each.
async fn some_pods(node: &Node, handler: &str) -> Result<Vec<Pod>> {
    let specs = [PodSpec::new("a").shared_pid(), PodSpec::new("b"), PodSpec::new("c").quick()];
    let mut pods = Vec::new();
    for spec in specs {
        let pod = node.run_pod(spec.handler(handler)).await?;
        pod.run(ContainerSpec::new("c").sleep()).await?;
        pods.push(pod);
    }
    Ok(pods)
}

async fn kill_worker(node: &mut Node) -> Result<Duration> {
    let kuasard = kuasard(node)?;
    let killed = kuasard.kill_worker().await?;
    kuasard.wait_serving(killed).await
}

/// Waits for a file that a container makes.
async fn made(path: &Path) -> Result<()> {
    wait::until(&format!("{}", path.display()), kuasar_tests::cri::SOON, || async { Ok(path.exists().then_some(())) }).await
}

async fn the_worker_is_killed(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let flags = node.dir().join("run/flags");
    fs::create_dir(&flags)?;
    let with_flags = |name: &str, script: &str| ContainerSpec::new(name).sh(script).mount(&flags, "/flags", false);
    let pod = node.run_pod(lone.pod().shared_pid()).await?;
    let other = node.run_pod(lone.pod().quick()).await?;
    let counter = pod.run(ContainerSpec::new("counter").sh("i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done")).await?;
    let terminal = other.run(ContainerSpec::new("terminal").command(&["sh"]).tty().stdin()).await?;
    let mut pids = Vec::new();
    for container in [&counter, &terminal] {
        let pid = container.pid().await?;
        pids.push((container, pid, census::start_time(pid)));
    }
    counter.wait_log("20").await?;
    for round in 0..3 {
        let flag = |name: &str| format!("{name}-{round}");
        let script = format!("trap 'touch /flags/{}; sleep 0.5; exit 5' TERM; while :; do sleep 0.01; done", flag("term"));
        let stopping = other.run(with_flags("stopping", &script)).await?;
        let script = format!("until test -e /flags/{}; do sleep 0.01; done; exit 42", flag("go"));
        let ending = other.run(with_flags("ending", &script)).await?;
        let script = format!("touch /flags/{}; until test -e /flags/{}; do sleep 0.01; done; exit 9", flag("exec"), flag("go"));
        let exec = other.run(with_flags("exec", "exec sleep 100000")).await?;
        let mut session = exec.exec_session(&["sh", "-c", "read x; echo got $x; exit 6"], false, true).await?;
        let mut terminal_session = exec.exec_session(&["sh"], true, true).await?;
        terminal_session.write(b"echo rea'd'y\n").await?;
        terminal_session.wait_for("ready\r\n").await?;

        // Three calls in flight, and what they wait for comes about while there is no worker, or a new one.
        let kill = async {
            made(&flags.join(flag("term"))).await?;
            made(&flags.join(flag("exec"))).await?;
            kill_worker(&mut node).await?;
            Ok::<_, anyhow::Error>(fs::write(flags.join(flag("go")), "")?)
        };
        let (stopped, ran, killed) = tokio::join!(stopping.stop(20), exec.sh(&script), kill);
        killed?;
        stopped.context("StopContainer in flight")?;
        assert_eq!(ran.context("ExecSync in flight")?.exit_code, 9);
        assert_eq!(stopping.wait_exit().await?.exit_code, 5);
        assert_eq!(ending.wait_exit().await?.exit_code, 42);
        session.write(b"it\n").await?;
        assert_eq!(session.finish().await.context("an exec with stdin")?, (6, "got it\n".to_owned()));
        terminal_session.write(b"exit 4\n").await?;
        assert_eq!(terminal_session.wait().await.context("an exec with a terminal")?, 4);

        for (container, pid, start) in &pids {
            assert_eq!(container.state().await?, ContainerState::ContainerRunning, "{}", container.id);
            assert_eq!((container.pid().await?, census::start_time(*pid)), (*pid, *start));
            assert_eq!(container.sh("echo on; exit 3").await?.exit_code, 3);
        }
        assert_eq!(other.state().await?, PodSandboxState::SandboxReady);
        let mut attached = terminal.attach(true, true).await?;
        attached.write(b"echo ty'p'ed\n").await?;
        attached.wait_for("typed\r\n").await.context("a container with a terminal")?;
        attached.close().await?;
        let seen = numbers(&counter.logs()?)?.len();
        wait::until("the log to go on", kuasar_tests::cri::SOON, || async {
            Ok((counter.logs()?.len() > seen + 20).then_some(()))
        })
        .await?;
        let new = node.run_pod(lone.pod()).await?;
        assert_eq!(new.run(ContainerSpec::new("new").sleep()).await?.sh("echo new").await?.stdout(), "new\n");
        new.remove_all().await?;
    }
    counter.stop(0).await?;
    assert_eq!(counter.wait_exit().await?.exit_code, 137);
    let seen = numbers(&counter.logs()?)?;
    ensure!(seen.iter().copied().eq(1..=seen.len() as u64), "lines were lost or repeated: {:?}", around_the_gap(&seen));
    pod.remove_all().await?;
    other.remove_all().await?;
    fs::remove_dir_all(&flags)?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

async fn the_keeper_and_containerd_are_killed(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let pods = some_pods(&node, &lone.handler).await?;
    let counter =
        pods[0].run(ContainerSpec::new("counter").sh("i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done")).await?;
    counter.wait_log("20").await?;
    let count = node.cri.containers().await?.len();
    let pid = counter.pid().await?;
    let start = census::start_time(pid);
    // containerd first: it would save at once that the containers have ended.
    node.containerd.kill()?;
    kuasard(&mut node)?.kill()?;
    assert_eq!(census::start_time(pid), start, "containers run on");
    kuasard(&mut node)?.start().await?;
    node.containerd.start().await?;

    let containers = node.cri.containers().await?;
    assert_eq!(containers.len(), count);
    ensure!(containers.iter().all(|container| container.state() == ContainerState::ContainerRunning), "{containers:#?}");
    for pod in &pods {
        assert_eq!(pod.state().await?, PodSandboxState::SandboxReady);
    }
    assert_eq!((counter.pid().await?, census::start_time(pid)), (pid, start));
    assert_eq!(counter.sh("exit 3").await?.exit_code, 3);
    agree(&node).await?;
    let seen = counter.logs()?.len();
    wait::until("the log to go on", kuasar_tests::cri::SOON, || async {
        Ok((counter.logs()?.len() > seen + 20).then_some(()))
    })
    .await?;
    counter.stop(0).await?;
    assert_eq!(counter.wait_exit().await?.exit_code, 137);
    let seen = numbers(&counter.logs()?)?;
    ensure!(seen.is_sorted_by(|one, next| one < next), "lines were repeated");
    node.cri.remove_all_pods().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

/// The containers that kuasard has in a pod.
fn known_containers(node: &Node, pod: &str) -> Result<Vec<String>> {
    let pods: Value = serde_json::from_str(&said(node, &["ps", "--json"])?)?;
    let pod = pods.as_array().into_iter().flatten().find(|found| found["spec"]["id"] == pod).context("no such pod")?;
    let ids = pod["containers"].as_array().into_iter().flatten().filter_map(|container| container["id"].as_str());
    Ok(ids.map(ToOwned::to_owned).collect())
}

async fn the_keeper_is_killed(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let pods = some_pods(&node, &lone.handler).await?;
    let mut pids = Vec::new();
    for container in node.cri.containers().await? {
        let pid = node.cri.container(&container.id).pid().await?;
        pids.push((pid, census::start_time(pid)));
    }
    kuasard(&mut node)?.kill()?;
    kuasard(&mut node)?.start().await?;
    // A lost connection is the container's death to containerd, which never dials again. Before kubelet has it made anew, it is ended.
    let again = wait::until("a container to be made anew", kuasar_tests::cri::SOON, || async {
        Ok(pods[0].run(ContainerSpec::new("again").sleep()).await.ok())
    })
    .await?;
    let first = node.cri.containers().await?.into_iter().filter(|container| container.pod_sandbox_id == pods[0].id);
    for container in first.filter(|container| container.id != again.id) {
        let code = node.cri.container(&container.id).wait_exit().await?.exit_code;
        ensure!([137, 255].contains(&code), "{code}");
    }
    let known = known_containers(&node, &pods[0].id)?;
    ensure!(known == std::slice::from_ref(&again.id), "{known:?} run beside {} in their place", again.id);
    // And those in whose place nothing is made are ended, too.
    for pod in &pods[1..] {
        wait::until("containers that were given up to be ended", kuasar_tests::cri::SOON, || async {
            Ok(known_containers(&node, &pod.id)?.is_empty().then_some(()))
        })
        .await?;
    }
    // A guest's are not the node's.
    for (pid, start) in pids.iter().filter(|_| !tools::is_machine(&lone.handler)) {
        ensure!(census::start_time(*pid) != *start, "process {pid} runs on");
    }
    assert_eq!(again.sh("echo on").await?.stdout(), "on\n");
    // What becomes of its containers is containerd's word; that they can be removed, wholly, is ours.
    for pod in pods {
        wait::until("the pod to be removed", kuasar_tests::cri::SOON, || async {
            // It takes containerd a moment to notice, and to dial again.
            Ok(pod.remove_all().await.ok())
        })
        .await?;
    }
    let pod = node.run_pod(lone.pod()).await?;
    assert_eq!(pod.run(ContainerSpec::new("c").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    pod.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

/// As the last case, but the descriptors are stored: nobody notices, and as little when it is stopped and started again.
async fn the_keeper_is_killed_under_systemd(lone: &Lone) -> Result<()> {
    let mut node = Node::start(lone.options().failpoints()).await?;
    let flags = node.dir().join("run/flags");
    fs::create_dir(&flags)?;
    let supervisor = Supervisor::new(node.dir())?;
    kuasard(&mut node)?.stop()?;
    kuasard(&mut node)?.supervised_by(supervisor);
    kuasard(&mut node)?.start().await?;
    wait::until("pods to run again", kuasar_tests::cri::SOON, || async { Ok(node.run_pod(lone.pod()).await.ok()) })
        .await?
        .remove_all()
        .await?;
    let before = lone.baseline(&node).await?;
    let service = |node: &Node| {
        node.kuasard.as_ref().and_then(|kuasard| kuasard.supervisor()).context("no supervisor").map(Supervisor::stored)
    };
    let stored = service(&node)?;

    let pods = some_pods(&node, &lone.handler).await?;
    let counter =
        pods[0].run(ContainerSpec::new("counter").sh("i=0; while :; do i=$((i+1)); echo $i; sleep 0.005; done")).await?;
    let terminal = pods[1].run(ContainerSpec::new("terminal").command(&["sh"]).tty().stdin()).await?;
    counter.wait_log("20").await?;
    let pid = counter.pid().await?;
    let start = census::start_time(pid);
    let old_pidfds = node.failpoints().join(failpoint::OLD_PIDFDS);
    for round in 0..4 {
        // What an earlier keeper has started is not the next one's child. Twice as before Linux 6.15, which does not tell its end by pidfds.
        match round {
            0 => fs::write(&old_pidfds, "")?,
            2 => fs::remove_file(&old_pidfds)?,
            _ => {}
        }
        let script = format!("until test -e /flags/{round}; do sleep 0.01; done; exit 42");
        let ending = pods[2].run(ContainerSpec::new("ending").sh(&script).mount(&flags, "/flags", true)).await?;
        let mut session = pods[2]
            .run(ContainerSpec::new("e").sleep())
            .await?
            .exec_session(&["sh", "-c", "read x; echo $x; exit 6"], false, true)
            .await?;
        let script = "until test -e /flags/away; do sleep 0.01; done; exit 17";
        let away = pods[2].run(ContainerSpec::new("away").sh(script).mount(&flags, "/flags", true)).await?;
        let away_pid = away.pid().await?;
        // In flight: the next worker answers.
        let exec = counter.sh("sleep 1; exit 9");
        let kill = async {
            match round {
                0 | 2 => kuasard(&mut node)?.stop()?,
                _ => kuasard(&mut node)?.kill()?,
            }
            // A guest's are not the node's.
            if !tools::is_machine(&lone.handler) {
                fs::write(flags.join("away"), "")?;
                gone(away_pid).await?;
            }
            kuasard(&mut node)?.start().await
        };
        let (ran, killed) = tokio::join!(exec, kill);
        killed?;
        assert_eq!(ran.context("ExecSync in flight")?.exit_code, 9, "round {round}");
        wait::until("WATCHDOG=1", kuasar_tests::cri::SOON, || async {
            let supervisor = node.kuasard.as_ref().and_then(|kuasard| kuasard.supervisor());
            Ok(supervisor.is_some_and(|supervisor| supervisor.has_heard("WATCHDOG=1")).then_some(()))
        })
        .await?;
        // How one ends is known as long as somebody of ours is there.
        fs::write(flags.join(round.to_string()), "")?;
        assert_eq!(ending.wait_exit().await?.exit_code, 42);
        // The events of what ends after an orderly stop wait in a socket that systemd has.
        fs::write(flags.join("away"), "")?;
        let codes: &[i32] = if [0, 2].contains(&round) || tools::is_machine(&lone.handler) { &[17] } else { &[17, 255] };
        let code = away.wait_exit().await?.exit_code;
        ensure!(codes.contains(&code), "round {round}: {code}");
        fs::remove_file(flags.join("away"))?;
        session.write(b"it\n").await?;
        assert_eq!(session.finish().await?, (6, "it\n".to_owned()));
        assert_eq!(counter.state().await?, ContainerState::ContainerRunning);
        assert_eq!((counter.pid().await?, census::start_time(pid)), (pid, start));
        let mut attached = terminal.attach(true, true).await?;
        attached.write(b"echo ty'p'ed\n").await?;
        attached.wait_for("typed\r\n").await?;
        attached.close().await?;
        agree(&node).await?;
    }
    counter.stop(0).await?;
    let seen = numbers(&counter.logs()?)?;
    ensure!(seen.iter().copied().eq(1..=seen.len() as u64), "lines were lost or repeated: {:?}", around_the_gap(&seen));
    node.cri.remove_all_pods().await?;
    fs::remove_dir_all(&flags)?;
    node.assert_no_leak(&before).await?;
    wait::until("the store to be as before", kuasar_tests::cri::SOON, || async {
        Ok((service(&node)? == stored).then_some(()))
    })
    .await
    .with_context(|| format!("before: {stored:?}, now: {:?}", service(&node)))?;
    kuasard(&mut node)?.stop()?;
    ensure!(kuasard(&mut node)?.supervisor().is_some_and(|supervisor| supervisor.has_heard("STOPPING=1")), "no STOPPING=1");
    kuasard(&mut node)?.start().await?;
    node.stop().await
}

/// containerd learns of it by an event alone, and is away; the worker that noticed it, if any did, is gone when it comes back.
async fn a_kill_for_want_of_memory_outlives_worker_and_containerd(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let flags = node.dir().join("run/flags");
    fs::create_dir(&flags)?;
    let pod = node.run_pod(lone.pod()).await?;
    let greedy = |name: &str| {
        let script = format!("until test -e /flags/{name}; do sleep 0.01; done; exec tail /dev/zero");
        ContainerSpec::new(name).sh(&script).mount(&flags, "/flags", true).memory_limit(24 << 20)
    };
    // One that ends before the worker does, and one while there is none or a new one.
    let (early, late) = (pod.run(greedy("early")).await?, pod.run(greedy("late")).await?);
    let pids = (early.pid().await?, late.pid().await?);
    node.containerd.kill()?;
    fs::write(flags.join("early"), "")?;
    if !tools::is_machine(&lone.handler) {
        gone(pids.0).await?;
    }
    fs::write(flags.join("late"), "")?;
    kill_worker(&mut node).await?;
    if !tools::is_machine(&lone.handler) {
        gone(pids.1).await?;
    }
    node.containerd.start().await?;
    for container in [&early, &late] {
        assert_eq!(container.wait_exit().await?.exit_code, 137);
        let named = wait::until("the reason", kuasar_tests::cri::SOON, || async {
            Ok((container.status().await?.reason == "OOMKilled").then_some(()))
        });
        let named = named.await;
        named.with_context(|| container.id.clone())?;
    }
    node.cri.remove_all_pods().await?;
    fs::remove_dir_all(&flags)?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

async fn kuasard_is_stopped_while_calls_are_in_flight(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let settled = node.run_pod(lone.pod()).await?;
    let container = settled.run(ContainerSpec::new("c").sleep()).await?;
    for round in 0..3 {
        let starts = join_all((0..6).map(|_| async {
            let pod = node.run_pod(lone.pod()).await?;
            pod.run(ContainerSpec::new("c").sleep()).await?;
            Ok::<_, tonic::Status>(())
        }));
        let execs = join_all((0..4).map(|_| container.sh("exit 3")));
        let calls = async { (starts.await, execs.await) };
        let stop = async {
            // Each round in another moment of theirs.
            tokio::time::sleep(Duration::from_millis(40 * (round + 1))).await;
            node.kuasard.as_ref().and_then(|kuasard| kuasard.pid()).context("kuasard is not running")
        };
        let pid = nix::unistd::Pid::from_raw(node.kuasard.as_ref().and_then(|kuasard| kuasard.pid()).unwrap_or_default());
        let stop = async { stop.await.and_then(|_| Ok(nix::sys::signal::kill(pid, Signal::SIGTERM)?)) };
        // Whatever becomes of a call, it is answered.
        let answered = tokio::time::timeout(kuasar_tests::cri::SOON, async { tokio::join!(calls, stop) });
        let ((_starts, _execs), stopped) = answered.await.context("a call was never answered")?;
        stopped?;
        let kuasard = kuasard(&mut node)?;
        let ended = kuasard.daemon()?.wait_for(kuasar_tests::cri::SOON)?;
        ensure!(ended.is_some_and(|status| status.success()), "kuasard ended with {ended:?}");
        kuasard.start().await?;
        wait::until("pods to run again", kuasar_tests::cri::SOON, || async {
            match node.run_pod(lone.pod()).await {
                Ok(_) => Ok(Some(())),
                Err(status) if status.code() == Code::Unavailable => Ok(None),
                Err(status) => Err(status.into()),
            }
        })
        .await?;
    }
    agree(&node).await?;
    node.cri.remove_all_pods().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

async fn several_sandboxers(lone: &Lone) -> Result<()> {
    let mut options = lone.options().sandboxer("kuasar-other", "runc");
    let mut handlers = vec![lone.handler.as_str(), "kuasar-other"];
    if tools::crun().is_ok() {
        options = options.sandboxer("kuasar-third", "crun");
        handlers.push("kuasar-third");
    }
    // And beside them the runc shim, on the same containerd.
    handlers.push("runc");
    let node: Node = Node::start(NodeOptions::quiet(options)).await?;
    let before = node.snapshot()?;
    let mut pods = Vec::new();
    for handler in &handlers {
        let pod = node.run_pod(PodSpec::new("pod").handler(handler)).await?;
        let container = pod.run(ContainerSpec::new("c").sleep()).await?;
        pods.push((*handler, pod, container));
    }
    for (handler, pod, container) in &pods {
        assert_eq!(container.sh(&format!("echo {handler}")).await?.stdout(), format!("{handler}\n"));
        assert_eq!(pod.status().await?.status.unwrap_or_default().runtime_handler, *handler);
        let state = node.dir().join("run/kuasar");
        ensure!((*handler == "runc") != below(&state, &pod.id, handler), "the state of a pod of {handler}");
    }
    // One of them goes; the others stay.
    pods.remove(0).1.remove_all().await?;
    for (_, _, container) in &pods {
        assert_eq!(container.sh("echo on").await?.stdout(), "on\n");
    }
    for (_, pod, _) in pods {
        pod.remove_all().await?;
    }
    let left = node.snapshot()?.beyond(&before);
    ensure!(left.iter().all(|line| line.starts_with("fd of kuasard") || line.starts_with("state: ")), "{left:?}");
    node.stop().await
}

/// Whether a directory named after a pod lies somewhere below one that is named after its sandboxer.
fn below(dir: &Path, id: &str, sandboxer: &str) -> bool {
    let Ok(entries) = fs::read_dir(dir) else { return false };
    entries.flatten().any(|entry| {
        let path = entry.path();
        path.to_string_lossy().contains(sandboxer) && entry.file_name().to_string_lossy().contains(id)
            || path.is_dir() && below(&path, id, sandboxer)
    })
}
