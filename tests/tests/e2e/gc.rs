//! What is collected, unasked and by `kuasarctl gc`, and what never is.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use kuasar_shim::proto::containers::ListContainersRequest;
use kuasar_shim::proto::containers::containers_client::ContainersClient;
use kuasar_tests::cri::SOON;
use kuasar_tests::image::recipes;
use kuasar_tests::leak::census;
use kuasar_tests::{ContainerSpec, Node, PodSpec, wait};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tonic::transport::Endpoint;

use crate::kuasarctl::{kuasarctl, said};
use crate::suite::{Entry, Lone, agree, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Ours Alone:
        what_containerd_has_forgotten_is_collected_unasked,
        nothing_that_containerd_knows_is_collected,
        a_damaged_state_file,
    ]
}

/// Pods at a time, and how often each is made again.
const LOAD: (usize, usize) = (4, 6);

fn json(node: &Node, args: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&said(node, args)?)?)
}

/// What a collection tells of each sandbox: `(id, kind, outcome)`.
fn collected(report: &Value) -> Vec<(&str, &str, &str)> {
    let items = report["collected"].as_array().into_iter().flatten();
    items
        .map(|item| {
            let text = |key: &str| item[key].as_str().unwrap_or_default();
            (text("sandbox"), text("kind"), text("outcome"))
        })
        .collect()
}

/// All that containerd has on disk, and what it has made for pods outside: what is left of a node whose metadata is lost.
fn wipe(node: &Node) -> Result<()> {
    let paths = node.containerd.paths();
    for entry in fs::read_dir(&paths.root)? {
        fs::remove_dir_all(entry?.path())?;
    }
    let pods = paths.state.join("io.containerd.grpc.v1.cri");
    for point in census::mounts_below(&pods, std::process::id().cast_signed())?.iter().rev() {
        umount2(point, MntFlags::MNT_DETACH)?;
    }
    fs::remove_dir_all(&pods).with_context(|| format!("remove {}", pods.display()))?;
    for network in fs::read_dir(&paths.cni_leases)? {
        fs::remove_dir_all(network?.path())?;
    }
    Ok(())
}

async fn what_containerd_has_forgotten_is_collected_unasked(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    for spec in [PodSpec::new("a").shared_pid(), PodSpec::new("b"), PodSpec::new("c").quick()] {
        let pod = node.run_pod(spec.handler(&lone.handler)).await?;
        pod.run(ContainerSpec::new("c").sh("sleep 1000 & exec sleep 1000")).await?;
        pod.create(ContainerSpec::new("waiting").sleep()).await?;
    }
    node.run_pod(PodSpec::new("empty").handler(&lone.handler)).await?;
    let listed = node.kuasard.as_ref().context("the node has no kuasard")?.state().join("listed.json");
    wait::until("kuasard to know its containerd", SOON, || async { Ok(listed.exists().then_some(())) }).await?;
    // containerd first: it would begin to tidy up.
    node.containerd.kill()?;
    node.kuasard.as_mut().context("the node has no kuasard")?.kill()?;
    wipe(&node)?;
    node.kuasard.as_mut().context("the node has no kuasard")?.start().await?;
    assert_eq!(json(&node, &["ps", "--json"])?.as_array().map(Vec::len), Some(4), "they run on as long as containerd is away");
    // It cannot say what it knows.
    let output = kuasarctl(&node, &["gc", "--json"])?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(collected(&report).is_empty() && report["unanswered"].is_string(), "{report}");
    node.containerd.start().await?;
    node.assert_no_leak(&before).await?;
    assert_eq!(json(&node, &["gc", "--dry-run", "--json"])?["collected"], Value::Array(Vec::new()));
    // And it works on.
    node.containerd.import(&recipes::for_tests()?, &node.cri).await?;
    let pod = node.run_pod(lone.pod()).await?;
    assert_eq!(pod.run(ContainerSpec::new("c").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    pod.remove_all().await?;
    node.stop().await
}

async fn nothing_that_containerd_knows_is_collected(lone: &Lone) -> Result<()> {
    let node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let staying = node.run_pod(lone.pod().shared_pid()).await?;
    let container = staying.run(ContainerSpec::new("c").sleep()).await?;
    let pid = container.pid().await?;
    let start = census::start_time(pid);
    let (pods, rounds) = LOAD;
    let load = try_join_all((0..pods).map(|number| {
        let node = &node;
        async move {
            for round in 0..rounds {
                let spec = lone.pod().quick();
                let pod = node.run_pod(if (number + round) % 2 == 0 { spec.shared_pid() } else { spec }).await?;
                // Never without and never with a container for long.
                let container = pod.run(ContainerSpec::new("c").sleep()).await?;
                assert_eq!(container.sh("exit 3").await?.exit_code, 3);
                pod.remove_all().await?;
            }
            Ok::<_, tonic::Status>(())
        }
    }));
    let mut load = Box::pin(load);
    let mut collections = 0;
    loop {
        let gc = tokio::task::block_in_place(|| json(&node, &["gc", "--json"]))?;
        ensure!(collected(&gc).is_empty() && gc["unanswered"].is_null(), "{gc}");
        collections += 1;
        // One after the other, as fast as they go.
        match tokio::time::timeout(Duration::from_millis(1), &mut load).await {
            Ok(done) => break done.map(drop)?,
            Err(_) => continue,
        }
    }
    drop(load);
    ensure!(collections > 10, "only {collections} collections during the load");
    assert_eq!(census::start_time(pid), start);
    assert_eq!(container.sh("exit 4").await?.exit_code, 4);
    // What is asked of a sandbox that the store does not list.
    let channel = Endpoint::try_from(format!("unix://{}", node.containerd.paths().socket.display()))?;
    let mut containers = ContainersClient::new(channel.connect().await?);
    let mut request = tonic::Request::new(ListContainersRequest {
        filters: [staying.id.as_str(), container.id.as_str(), "nobody"].map(|id| format!("id=={id:?}")).into(),
    });
    request.metadata_mut().insert("containerd-namespace", tonic::metadata::MetadataValue::from_static("k8s.io"));
    let known: Vec<_> = containers.list(request).await?.into_inner().containers.into_iter().map(|known| known.id).collect();
    assert_eq!(known, [container.id.as_str()]);
    staying.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

/// The live processes that `ps` tells of a sandbox that was set aside.
fn set_aside(node: &Node, id: &str) -> Result<Vec<i32>> {
    let list = json(node, &["ps", "--json"])?;
    let entry = list.as_array().into_iter().flatten().find(|entry| entry["spec"]["id"] == id);
    let state = &entry.with_context(|| format!("{id} is not listed in {list}"))?["state"]["set_aside"];
    ensure!(state["why"].as_str().is_some_and(|why| why.contains("not JSON")), "{list}");
    let pids = state["processes"].as_array().context("no processes")?;
    Ok(pids.iter().filter_map(|pid| i32::try_from(pid.as_i64()?).ok()).collect())
}

fn finding(node: &Node, id: &str) -> Result<Value> {
    let check: Value = serde_json::from_slice(&kuasarctl(node, &["check", "--json"])?.stdout)?;
    let about = |finding: &&Value| finding["subject"].as_str().is_some_and(|subject| subject.contains(id));
    let findings: Vec<_> = check.as_array().into_iter().flatten().filter(about).collect();
    ensure!(findings.len() == 1, "{check:#}");
    Ok(findings[0].clone())
}

fn tear(file: &Path) -> Result<()> {
    let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    Ok(fs::write(file, &bytes[..bytes.len() / 2])?)
}

async fn a_damaged_state_file(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let good = node.run_pod(lone.pod().shared_pid()).await?;
    let well = good.run(ContainerSpec::new("well").sleep()).await?;
    let bad = node.run_pod(lone.pod().shared_pid()).await?;
    let lost = bad.run(ContainerSpec::new("lost").sh("sleep 1000 & exec sleep 1000")).await?;
    let other = bad.run(ContainerSpec::new("other").sleep()).await?;
    let mut pids = vec![lost.pid().await?, other.pid().await?];
    // containerd first: it would take all containers for dead.
    node.containerd.kill()?;
    node.kuasard.as_mut().context("the node has no kuasard")?.kill()?;
    let state = node.kuasard.as_ref().context("the node has no kuasard")?.state().join("sandboxes/k8s.io").join(&bad.id);
    tear(&state.join("state.json"))?;
    // Without a daemon, too.
    let found = finding(&node, &bad.id)?;
    ensure!(found["detail"].as_str().is_some_and(|detail| detail.contains(&pids[0].to_string())), "{found}");
    node.kuasard.as_mut().context("the node has no kuasard")?.start().await?;
    node.containerd.start().await?;

    assert_eq!(well.sh("exit 3").await?.exit_code, 3);
    assert_eq!(good.run(ContainerSpec::new("new").sleep()).await?.sh("exit 4").await?.exit_code, 4);
    ensure!(state.join("state.json.unreadable").exists() && !state.join("state.json").exists());
    let told = set_aside(&node, &bad.id)?;
    // The two containers, what one has started, and the pod's process 1.
    ensure!(told.len() == 4 && pids.iter().all(|pid| told.contains(pid)), "{told:?}, and not {pids:?}");
    pids = told;
    let table = said(&node, &["ps"])?;
    ensure!(table.contains("set aside") && table.contains(&bad.id[..13]) && table.contains(&pids[0].to_string()), "{table}");
    let inspected = json(&node, &["inspect", &bad.id])?;
    ensure!(inspected["state"]["set_aside"]["processes"].as_array().is_some_and(|told| told.len() == 4), "{inspected}");
    let found = finding(&node, &bad.id)?;
    assert_eq!(found["status"], "warn");
    for word in ["state.json.unreadable", &pids[0].to_string()] {
        ensure!(found["detail"].as_str().is_some_and(|detail| detail.contains(word)), "no {word} in {found}");
    }
    let starts: Vec<_> = pids.iter().map(|pid| census::start_time(*pid)).collect();
    for args in [&["gc", "--dry-run", "--json"][..], &["gc", "--json"]] {
        let report = json(&node, args)?;
        assert_eq!(collected(&report), [(bad.id.as_str(), "set_aside", "kept")]);
        assert_eq!(report["collected"][0]["processes"].as_array().map(Vec::len), Some(4));
    }
    // Neither that nor another daemon's start signals them.
    let killed = node.kuasard.as_ref().context("the node has no kuasard")?.kill_worker().await?;
    node.kuasard.as_mut().context("the node has no kuasard")?.wait_serving(killed).await?;
    assert_eq!(set_aside(&node, &bad.id)?, pids);
    assert_eq!(pids.iter().map(|pid| census::start_time(*pid)).collect::<Vec<_>>(), starts);
    for pid in &pids {
        // Process 1 takes the others along.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    wait::until("its processes to end", SOON, || async { Ok(set_aside(&node, &bad.id)?.is_empty().then_some(())) }).await?;
    assert_eq!(collected(&json(&node, &["gc", "--dry-run", "--json"])?), [(bad.id.as_str(), "set_aside", "would_remove")]);
    assert_eq!(collected(&json(&node, &["gc", "--json"])?), [(bad.id.as_str(), "set_aside", "removed")]);
    ensure!(!state.exists() && !said(&node, &["ps"])?.contains("set aside"));
    for pod in [good, bad] {
        // containerd may be busy with it still.
        wait::until("the pod to be removed", SOON, || async { Ok(pod.remove_all().await.ok()) }).await?;
    }
    agree(&node).await?;
    // It keeps its connections to tasks that it has not found again.
    node.containerd.stop()?;
    node.containerd.start().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}
