//! Every signal there is, sent to everything of ours and to what runs in containers. The table for users is in docs/crashes.md.
//!
//! | sent to | ends of it | is continued | notices nothing |
//! |---|---|---|---|
//! | a process in a container that has set nothing | all others: 128 and the signal | 19, by whom it pleases | 17, 18, 20–23, 28 |
//! | process 1 of a container, from the node | 9 | 19, by whom it pleases | all others |
//! | an OCI runtime at work, so that its call fails and the next succeeds | all others | 19, by us | 17, 18, 20–23, 28 |
//! | our worker, so that another takes its place | 2, 15 (after what is under way), 3–9, 11, 31 | 19, 21, 22, by the keeper | all others |
//! | our keeper | 2, 15 (after what is under way), 3–9, 11, 31 | 19, by the worker | all others |
//!
//! 20 to 22 stop only what has somebody to continue it: a process whose group is orphaned (setpgid(2)) ignores them, as those of
//! containers do. The C library ignores 32 and 33 in programs that it starts; some OCI runtimes pass that on to containers.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kuasar_tests::cri::SOON;
use kuasar_tests::cri::k8s_cri::v1::ContainerState;
use kuasar_tests::kuasard::{Killed, Kuasard};
use kuasar_tests::leak::census;
use kuasar_tests::signals::{ALL, Action, OfWorker, RESERVED, action, codes, is_stopped, of_worker, script, send, send_worker};
use kuasar_tests::{ContainerSpec, Node, tools, wait};

use crate::suite::{Case, Entry, Lone, cases};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Handlers Shared: execs_get_any_signal, containers_get_any_signal, process_1_gets_any_signal];
    cases.extend(cases![Ours Alone: the_daemon_gets_any_signal, oci_runtimes_get_any_signal]);
    cases
}

/// In a virtual machine each process takes longer; those of which something can go wrong.
const A_FEW: [i32; 6] = [9, 15, 19, 33, 34, 64];
const AT_A_TIME: usize = 8;

fn ensure_ended(signal: i32, code: i32) -> Result<()> {
    let expected = codes(signal);
    ensure!(expected.contains(&code), "signal {signal}: {code}, not one of {expected:?}");
    Ok(())
}

fn signals(case: &Case) -> Vec<i32> {
    if case.is_machine() { A_FEW.to_vec() } else { ALL.collect() }
}

async fn execs_get_any_signal(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    stream::iter(signals(case))
        .map(|signal| {
            let container = container.clone();
            async move {
                let ran = container.sh(&script(signal)).await.with_context(|| format!("signal {signal}"))?;
                ensure_ended(signal, ran.exit_code)
            }
        })
        .buffer_unordered(AT_A_TIME)
        .try_collect::<()>()
        .await?;
    // What comes later ends as well.
    assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    container.stop(0).await?;
    assert_eq!(container.wait_exit().await?.exit_code, 137);
    Ok(())
}

async fn containers_get_any_signal(case: &Case) -> Result<()> {
    // None is process 1, which could not be killed from inside.
    let pod = case.run(case.spec().shared_pid()).await?;
    stream::iter(signals(case))
        .map(|signal| {
            let pod = pod.clone();
            async move {
                let container = pod.run(ContainerSpec::new(&format!("c{signal}")).sh(&script(signal))).await?;
                ensure_ended(signal, container.wait_exit().await?.exit_code)?;
                Ok::<_, anyhow::Error>(container.remove().await?)
            }
        })
        .buffer_unordered(AT_A_TIME)
        .try_collect::<()>()
        .await?;
    let container = pod.run(ContainerSpec::new("later").sleep()).await?;
    container.stop(0).await?;
    assert_eq!(container.wait_exit().await?.exit_code, 137);
    Ok(())
}

async fn process_1_gets_any_signal(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let pid = container.pid().await?;
    for signal in ALL.filter(|signal| ![9, 19].contains(signal)) {
        send(pid, signal)?;
    }
    assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    send(pid, 19)?;
    send(pid, 18)?;
    assert_eq!(container.state().await?, ContainerState::ContainerRunning);
    send(pid, 9)?;
    assert_eq!(container.wait_exit().await?.exit_code, 137);
    Ok(())
}

/// Those that a process of ours logs, and nothing else.
fn logged() -> impl Iterator<Item = i32> {
    [1, 10, 12, 14, 16, 20, 24, 25, 26, 27, 29, 30].into_iter().chain(34..=64)
}

async fn the_daemon_gets_any_signal(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let pod = node.run_pod(lone.pod()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let pid = container.pid().await?;
    let start = census::start_time(pid);
    let daemon = |node: &Node| {
        let kuasard = node.kuasard.as_ref().and_then(Kuasard::pid);
        kuasard.context("kuasard is not running")
    };
    let keeper = daemon(&node)?;
    let mut worker = running(&node)?.worker_pid().await?;

    // Neither ends, and each says so: the same line, but for SIGHUP to the keeper.
    for signal in logged().chain([13, 17, 18, 23, 28, 32, 33]) {
        if !RESERVED.contains(&signal) {
            send(keeper, signal)?;
        }
        send(worker, signal)?;
    }
    for signal in logged() {
        running(&node)?.wait_log(&format!("signal {signal:02} is ignored")).await?;
    }
    running(&node)?.wait_log("SIGHUP is ignored").await?;
    assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    assert_eq!((daemon(&node)?, running(&node)?.worker_pid().await?), (keeper, worker));

    // Stopped, and nobody waits long.
    for (process, signal) in [(worker, 19), (worker, 21), (worker, 22), (keeper, 19)] {
        send(process, signal)?;
        assert_eq!(container.sh("exit 4").await?.exit_code, 4);
        wait::until(&format!("{process} to be continued"), SOON, || async { Ok((!is_stopped(process)).then_some(())) }).await?;
    }
    running(&node)?.wait_log("the keeper was stopped by a signal").await?;
    assert_eq!(running(&node)?.worker_pid().await?, worker);

    // Replaced; each time by a worker that has to do with one more such end.
    for signal in ALL.filter(|signal| matches!(of_worker(*signal), OfWorker::Leaves | OfWorker::Ends)) {
        let killed = Killed { pid: worker, at: std::time::Instant::now() };
        send_worker(worker, signal)?;
        let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
        kuasard.wait_serving(killed).await.with_context(|| format!("after signal {signal}"))?;
        assert_eq!(container.sh("exit 5").await?.exit_code, 5, "after signal {signal}");
        // Several failures in a row would make the keeper wait; to be killed is none.
        let killed = kuasard.kill_worker().await?;
        kuasard.wait_serving(killed).await?;
        worker = kuasard.worker_pid().await?;
    }
    assert_eq!(container.state().await?, ContainerState::ContainerRunning);
    assert_eq!((container.pid().await?, census::start_time(pid)), (pid, start));
    assert_eq!(container.sh("kill -34 $$").await?.exit_code, 162);
    container.stop(0).await?;
    assert_eq!(container.wait_exit().await?.exit_code, 137);
    pod.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

fn running(node: &Node) -> Result<&Kuasard> {
    node.kuasard.as_ref().context("the node has no kuasard")
}

async fn oci_runtimes_get_any_signal(lone: &Lone) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let original = if lone.handler.contains("crun") { tools::crun()? } else { tools::runc()? };
    // As the runtime when it is at work on an exec: the first to see the file gets the signal that it names.
    let (program, order) = (dir.path().join("runtime"), dir.path().join("signal"));
    let text = format!(
        "#!/bin/sh\ncase \" $* \" in *' exec '*) s=$(cat {order} 2>&-) && rm {order} && kill -$s $$;; esac\nexec {original} \"$@\"\n",
        order = order.display(),
        original = original.display()
    );
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let handler = lone.handler.clone();
    let options = lone.options().patch_kuasard(move |config| {
        config["sandboxer"][&handler]["runtime"] = program.display().to_string().into();
    });
    let node = Node::start(options).await?;
    let before = lone.baseline(&node).await?;
    let pod = node.run_pod(lone.pod().quick()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let mut failed = BTreeSet::new();
    for signal in ALL {
        fs::write(&order, signal.to_string())?;
        match container.sh("exit 3").await {
            Ok(ran) => assert_eq!(ran.exit_code, 3, "signal {signal}"),
            Err(_) => drop(failed.insert(signal)),
        }
        ensure!(!order.exists(), "no OCI runtime has seen the signal {signal}");
    }
    let expected = ALL.filter(|signal| action(*signal) == Action::Ends && !RESERVED.contains(signal));
    failed.retain(|signal| !RESERVED.contains(signal));
    assert_eq!(failed, expected.collect::<BTreeSet<_>>());
    assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    pod.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}
