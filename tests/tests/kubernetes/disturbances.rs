//! What restarts below a pod leave of it: containerd, kubelet, and for handlers of ours kuasard's worker, keeper and an upgrade, while probes
//! run each second. Nothing is to be started again, and no pod to be unready for a moment.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use kuasar_tests::kubernetes::supervise;
use kuasar_tests::kubernetes::watch::{flaps, restarts};
use kuasar_tests::{Node, wait};
use serde_json::json;

use crate::lifecycle::probed;
use crate::suite::{Case, Entry, cases, container, is_ready, sh, with};

/// Pods with a probe of each kind.
const PODS: usize = 7;
/// And in virtual machines.
const MACHINES: usize = 2;
/// A kubelet that starts takes containers for new ones, and their readiness for unknown, that have run for less than 10 s.
const OLD: Duration = Duration::from_secs(12);
/// Each is watched so long after the last disturbance: some rounds of each probe, and of kubelet's own.
const AFTER: Duration = Duration::from_secs(15);
/// How long a daemon may take to serve again.
const SERVING: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Alone:
        nothing,
        containerd_restarts,
        containerd_is_killed,
        kubelet_restarts,
        kubelet_is_killed,
        containerd_and_kubelet_are_killed,
    ];
    cases.extend(cases![OursAlone:
        worker_is_killed,
        upgrade,
        keeper_is_killed,
        keeper_and_containerd_are_killed,
        keeper_is_killed_without_systemd,
    ]);
    cases
}

/// Runs pods with probes, one that counts and one that is about to end, and looks at them after `disturb`.
async fn undisturbed(case: &Case, disturb: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    let dir = case.dir()?;
    let mut names: Vec<String> =
        (0..if case.is_machine() { MACHINES } else { PODS }).map(|pod| case.name(&pod.to_string())).collect();
    let (counter, ending) = (case.name("counter"), case.name("ending"));
    let volume = json!({ "name": "v", "hostPath": { "path": dir } });
    let mount = json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] });
    let counting = sh("c", "i=0; until [ -e /v/enough ]; do echo $i; i=$((i+1)); sleep 0.05; done; exec sleep 1000000");
    try_join_all(names.iter().map(|name| case.pod(name, probed()))).await?;
    case.pod(&counter, json!({ "containers": [with(counting, mount.clone())], "volumes": [volume] })).await?;
    let waiting = sh("c", "until [ -e /v/end ]; do sleep 0.1; done; exit 3");
    case.pod(&ending, json!({ "restartPolicy": "Never", "containers": [with(waiting, mount)], "volumes": [volume] })).await?;
    names.push(counter.clone());
    try_join_all(names.iter().chain([&ending]).map(|name| case.ready(name))).await?;

    tokio::time::sleep(OLD).await;
    let begin = Instant::now();
    disturb().await?;
    std::fs::write(dir.join("end"), "")?;
    tokio::time::sleep(AFTER).await;
    // What the API server does not hear from kubelet it cannot show.
    case.cluster.node_is_ready().await?;

    let mut counts = (0, 0);
    let mut bad = Vec::new();
    for name in &names {
        let history = case.cluster.pods().history(&case.handler, name);
        let last = history.last().with_context(|| format!("pod {name} is gone"))?;
        let (again, unready) = (restarts(&last.pod), flaps(&history, begin));
        counts = (counts.0 + again, counts.1 + unready.len());
        if again > 0 || !unready.is_empty() {
            bad.push(format!("{name}: {again} restarts, unready {unready:?}"));
        }
    }
    case.note(format!("{} restarts, {} flaps", counts.0, counts.1));
    ensure!(bad.is_empty(), "{}", bad.join("\n"));
    let ended = case.ended(&ending).await?;
    assert_eq!(container(&ended, "c").context("no container")?["state"]["terminated"]["exitCode"], 3);
    std::fs::write(dir.join("enough"), "")?;
    assert_eq!(case.prints(&counter, "echo on").await?, "on\n");
    let log = case.kubectl().must(&case.handler, &["logs", &counter]).await?;
    let lines: Vec<&str> = log.lines().collect();
    let expected: Vec<String> = (0..lines.len()).map(|line| line.to_string()).collect();
    let first = lines.iter().zip(&expected).find(|(line, expected)| *line != expected);
    ensure!(first.is_none() && lines.len() > 100, "{} lines, of which {first:?} is not what it should be", lines.len());
    Ok(())
}

async fn node(case: &Case) -> tokio::sync::RwLockWriteGuard<'_, Node> {
    case.cluster.node.write().await
}

/// How many pods go unready by themselves here: none, or the others say nothing.
async fn nothing(case: &Case) -> Result<()> {
    undisturbed(case, async || Ok(())).await
}

async fn containerd_restarts(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut node = node(case).await;
        for _ in 0..2 {
            node.containerd.stop()?;
            node.containerd.start().await?;
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        Ok(())
    })
    .await
}

async fn containerd_is_killed(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut node = node(case).await;
        for _ in 0..2 {
            node.containerd.kill()?;
            node.containerd.start().await?;
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        Ok(())
    })
    .await
}

async fn kubelet_restarts(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut kubelet = case.cluster.kubelet.lock().await;
        kubelet.terminate()?;
        kubelet.again()
    })
    .await
}

async fn kubelet_is_killed(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut kubelet = case.cluster.kubelet.lock().await;
        kubelet.kill()?;
        kubelet.again()
    })
    .await
}

async fn containerd_and_kubelet_are_killed(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut kubelet = case.cluster.kubelet.lock().await;
        let mut node = node(case).await;
        kubelet.kill()?;
        node.containerd.kill()?;
        node.containerd.start().await?;
        kubelet.again()
    })
    .await
}

async fn worker_is_killed(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut node = node(case).await;
        let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
        for _ in 0..4 {
            let killed = kuasard.kill_worker().await?;
            kuasard.wait_serving(killed).await?;
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        Ok(())
    })
    .await
}

async fn upgrade(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let node = node(case).await;
        let kuasard = node.kuasard.as_ref().context("the node has no kuasard")?;
        for _ in 0..3 {
            let upgraded = kuasard.upgrade(None).await?;
            ensure!(upgraded.status.success(), "kuasarctl upgrade: {}", String::from_utf8_lossy(&upgraded.stderr));
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        Ok(())
    })
    .await
}

/// As under systemd, which keeps its descriptors.
async fn kill_keeper(node: &mut Node) -> Result<()> {
    let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
    kuasard.kill()?;
    kuasard.start().await
}

async fn keeper_is_killed(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut node = node(case).await;
        for _ in 0..2 {
            kill_keeper(&mut node).await?;
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        Ok(())
    })
    .await
}

async fn keeper_and_containerd_are_killed(case: &Case) -> Result<()> {
    undisturbed(case, async || {
        let mut node = node(case).await;
        node.containerd.kill()?;
        kill_keeper(&mut node).await?;
        node.containerd.start().await?;
        let cri = kuasar_tests::Cri::connect(&node.containerd.paths().socket).await?;
        wait::until("CRI to list the pods", SERVING, || async { Ok(cri.pods().await.ok()) }).await?;
        Ok(())
    })
    .await
}

/// Without a descriptor store containerd takes the containers for ended and kubelet has others made. None may then run twice:
/// two would write to one volume.
async fn keeper_is_killed_without_systemd(case: &Case) -> Result<()> {
    {
        let mut node = node(case).await;
        let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
        kuasard.stop()?;
        kuasard.unsupervised();
        kuasard.start().await?;
    }
    let result = runs_once(case).await;
    supervise(&mut *node(case).await).await?;
    result
}

async fn runs_once(case: &Case) -> Result<()> {
    let pod = case.name("");
    let dir = case.dir()?;
    // Each start writes to a file of its own.
    let script = "echo x >> /v/$0; file=/v/$0.$(wc -l < /v/$0); while :; do echo x >> $file; sleep 0.1; done";
    let writer = |name: &str| {
        json!({
            "name": name,
            "command": ["sh", "-c", script, name],
            "volumeMounts": [{ "name": "v", "mountPath": "/v" }],
        })
    };
    let volume = json!({ "name": "v", "hostPath": { "path": dir } });
    case.ready_pod(&pod, json!({ "containers": [writer("a"), writer("b")], "volumes": [volume] })).await?;
    kill_keeper(&mut *node(case).await).await?;
    let again = case
        .until(&pod, "a restart of both containers", |pod| {
            let both =
                ["a", "b"].map(|name| container(pod, name).and_then(|status| status["restartCount"].as_u64()).unwrap_or(0));
            Ok((both.iter().all(|count| *count > 0) && is_ready(pod)).then_some(both))
        })
        .await?;
    case.note(format!("{} restarts", again.iter().sum::<u64>()));
    let size = |name: &str, start: u64| std::fs::metadata(dir.join(format!("{name}.{start}"))).map_or(0, |file| file.len());
    for (name, count) in ["a", "b"].into_iter().zip(again) {
        let sizes = |starts: std::ops::RangeInclusive<u64>| starts.map(|start| size(name, start)).collect::<Vec<_>>();
        // They count from 1.
        let (before, now) = (sizes(1..=count), size(name, count + 1));
        wait::until("the container to write", SERVING, || async { Ok((size(name, count + 1) > now + 20).then_some(())) })
            .await?;
        ensure!(sizes(1..=count) == before, "{name} runs twice: {before:?}, then {:?}", sizes(1..=count));
    }
    Ok(())
}
