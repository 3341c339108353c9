//! Requests, limits, what happens beyond them, and what is measured.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use kuasar_tests::kubernetes::watch::restarts;
use serde_json::{Value, json};

use crate::suite::{Case, Entry, cases, container, is_long, sh, sleeper, with};

/// Containers that are OOMKilled.
const KILLS: usize = 12;
/// And in the long form.
const MANY_KILLS: usize = 120;
/// Each in a virtual machine.
const KILLS_OF_MACHINES: usize = 3;
/// Containers of a pod among them.
const KILLS_PER_POD: usize = 4;

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Shared:
        oom_killed,
        one_process_of_several_is_killed,
        limits,
        classes,
        limits_of_the_pod,
        resize,
        resize_with_a_restart,
        resize_of_the_pod,
        process_limit,
        summary,
        resource_metrics,
    ];
    cases.extend(cases![Alone: statistics_from_cri]);
    cases
}

fn limited(container: Value, memory: &str) -> Value {
    with(container, json!({ "resources": { "requests": { "cpu": "1m", "memory": "1Mi" }, "limits": { "memory": memory } } }))
}

fn is_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// Each container's reason has to be the one, or a Job's owner looks for a fault that is none.
async fn oom_killed(case: &Case) -> Result<()> {
    let (count, per_pod) = match (case.is_machine(), is_long()) {
        (true, _) => (KILLS_OF_MACHINES, KILLS_OF_MACHINES),
        (false, false) => (KILLS, KILLS_PER_POD),
        (false, true) => (MANY_KILLS, KILLS_PER_POD),
    };
    let memory = if case.is_machine() { "64Mi" } else { "24Mi" };
    let names: Vec<String> = (0..count / per_pod).map(|pod| case.name(&pod.to_string())).collect();
    let containers: Vec<Value> = (0..per_pod)
        .map(|number| limited(json!({ "name": format!("c{number}"), "command": ["tail", "/dev/zero"] }), memory))
        .collect();
    for few in names.chunks(KILLS) {
        try_join_all(few.iter().map(|name| case.pod(name, json!({ "restartPolicy": "Never", "containers": containers }))))
            .await?;
    }
    let pods = try_join_all(names.iter().map(|name| case.ended(name))).await?;
    let ends: Vec<(i64, String)> = pods
        .iter()
        .filter_map(|pod| pod["status"]["containerStatuses"].as_array())
        .flatten()
        .map(|status| &status["state"]["terminated"])
        .map(|ended| (ended["exitCode"].as_i64().unwrap_or(-1), ended["reason"].as_str().unwrap_or_default().to_owned()))
        .collect();
    let good = ends.iter().filter(|end| **end == (137, "OOMKilled".to_owned())).count();
    case.note(format!("{good} of {count}"));
    ensure!(good == count, "{good} of {count} are OOMKilled: {ends:?}");
    Ok(())
}

/// On cgroup v2 kubelet asks for the whole container's end; on v1 for that of the process.
async fn one_process_of_several_is_killed(case: &Case) -> Result<()> {
    let pod = case.name("");
    let memory = if case.is_machine() { "64Mi" } else { "24Mi" };
    case.pod(
        &pod,
        json!({ "restartPolicy": "Never", "containers": [limited(sh("c", "tail /dev/zero; echo child $?"), memory)] }),
    )
    .await?;
    let ended = case.ended(&pod).await?;
    let ended = container(&ended, "c").context("no container")?["state"]["terminated"].clone();
    if is_v2() {
        assert_eq!((&ended["exitCode"], &ended["reason"]), (&json!(137), &json!("OOMKilled")));
    } else {
        let log = case.kubectl().must(&case.handler, &["logs", &pod]).await?;
        ensure!(log.contains("child 137\n"), "{log}");
        assert_eq!(ended["exitCode"], 0);
    }
    Ok(())
}

async fn limits(case: &Case) -> Result<()> {
    let script = if is_v2() {
        "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight"
    } else {
        "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes; echo $(cat cpu/cpu.cfs_quota_us) $(cat cpu/cpu.cfs_period_us); cat cpu/cpu.shares"
    };
    let more = json!({ "resources": { "requests": { "cpu": "100m", "memory": "16Mi" }, "limits": { "cpu": "250m", "memory": "64Mi" } } });
    let text = case.output(&case.name(""), json!({ "containers": [with(sh("c", script), more)] })).await?;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["67108864", "25000 100000"], "{text}");
    ensure!(is_v2() || lines[2] == "102", "{text}");
    Ok(())
}

async fn classes(case: &Case) -> Result<()> {
    let equal = json!({ "cpu": "50m", "memory": "64Mi" });
    for (class, resources) in [
        ("BestEffort", json!({})),
        ("Burstable", json!({ "requests": { "cpu": "10m" } })),
        ("Guaranteed", json!({ "requests": equal, "limits": equal })),
    ] {
        let pod = case.name(&class.to_lowercase());
        case.ready_pod(&pod, json!({ "containers": [with(sleeper("c"), json!({ "resources": resources }))] })).await?;
        case.until(&pod, class, |pod| Ok((pod["status"]["qosClass"] == class).then_some(()))).await?;
        // One machine at a time.
        case.kubectl().must(&case.handler, &["delete", "pod", &pod, "--wait"]).await?;
    }
    Ok(())
}

/// The pod's own limit is over containers that have none.
async fn limits_of_the_pod(case: &Case) -> Result<()> {
    let pod = case.name("");
    let fill = sh(
        "c",
        "dd if=/dev/zero of=/dev/null bs=20M count=1 && echo little; dd if=/dev/zero of=/dev/null bs=300M count=1; echo code $?; exec sleep 1000000",
    );
    let spec = json!({
        "resources": { "requests": { "cpu": "20m", "memory": "96Mi" }, "limits": { "cpu": "500m", "memory": "96Mi" } },
        "containers": [with(fill, json!({ "resources": {} })), with(sleeper("d"), json!({ "resources": {} }))],
    });
    case.pod(&pod, spec).await?;
    let log = case
        .until_prints(&["logs", &pod, "-c", "c"], "the end of what takes too much", |text| {
            text.contains("code").then(|| text.to_owned())
        })
        .await;
    // Where a whole container goes, its log says as little of the code as of anything.
    match log {
        Ok(log) => ensure!(log.contains("little") && !log.contains("code 0"), "{log}"),
        Err(error) => {
            let history = case.cluster.pods().history(&case.handler, &pod);
            ensure!(history.last().is_some_and(|seen| restarts(&seen.pod) > 0), "{error:#}");
        }
    }
    Ok(())
}

async fn patch(case: &Case, pod: &str, patch: Value) -> Result<()> {
    case.kubectl()
        .must(&case.handler, &["patch", "pod", pod, "--subresource", "resize", "--patch", &patch.to_string()])
        .await?;
    Ok(())
}

fn sizes(memory: &str, cpu: &str) -> Value {
    json!({ "requests": { "memory": "32Mi", "cpu": "20m" }, "limits": { "memory": memory, "cpu": cpu } })
}

fn has(pod: &Value, memory: &str, cpu: &str) -> Option<u64> {
    let status = container(pod, "c")?;
    let limits = &status["resources"]["limits"];
    let pending = pod["status"]["conditions"].as_array().is_some_and(|conditions| {
        conditions.iter().any(|condition| condition["type"].as_str().is_some_and(|kind| kind.starts_with("PodResize")))
    });
    (limits["memory"] == memory && limits["cpu"] == cpu && !pending).then_some(restarts(pod))
}

/// What the container can have.
async fn takes(case: &Case, pod: &str, mib: u32) -> Result<bool> {
    Ok(case.sh(pod, &format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1")).await?.status.success())
}

async fn resize(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [with(sleeper("c"), json!({ "resources": sizes("64Mi", "200m") }))] })).await?;
    ensure!(!takes(case, &pod, 100).await?, "100 MiB of 64");
    patch(case, &pod, json!({ "spec": { "containers": [{ "name": "c", "resources": sizes("160Mi", "400m") }] } })).await?;
    assert_eq!(case.until(&pod, "more", |pod| Ok(has(pod, "160Mi", "400m"))).await?, 0);
    ensure!(takes(case, &pod, 100).await?, "no 100 MiB of 160");
    patch(case, &pod, json!({ "spec": { "containers": [{ "name": "c", "resources": sizes("64Mi", "100m") }] } })).await?;
    assert_eq!(case.until(&pod, "less", |pod| Ok(has(pod, "64Mi", "100m"))).await?, 0);
    ensure!(!takes(case, &pod, 100).await?, "100 MiB of 64 again");
    Ok(())
}

async fn resize_with_a_restart(case: &Case) -> Result<()> {
    let pod = case.name("");
    let more = json!({
        "resources": sizes("64Mi", "200m"),
        "resizePolicy": [{ "resourceName": "memory", "restartPolicy": "RestartContainer" }, { "resourceName": "cpu", "restartPolicy": "NotRequired" }],
    });
    case.ready_pod(&pod, json!({ "containers": [with(sleeper("c"), more)] })).await?;
    patch(case, &pod, json!({ "spec": { "containers": [{ "name": "c", "resources": sizes("64Mi", "300m") }] } })).await?;
    assert_eq!(case.until(&pod, "more of the processor", |pod| Ok(has(pod, "64Mi", "300m"))).await?, 0);
    patch(case, &pod, json!({ "spec": { "containers": [{ "name": "c", "resources": sizes("128Mi", "300m") }] } })).await?;
    assert_eq!(case.until(&pod, "more memory", |pod| Ok(has(pod, "128Mi", "300m").filter(|count| *count > 0))).await?, 1);
    Ok(())
}

async fn resize_of_the_pod(case: &Case) -> Result<()> {
    let pod = case.name("");
    let spec = json!({
        "resources": { "requests": { "cpu": "20m", "memory": "64Mi" }, "limits": { "cpu": "500m", "memory": "96Mi" } },
        "containers": [with(sleeper("c"), json!({ "resources": {} }))],
    });
    case.ready_pod(&pod, spec).await?;
    patch(case, &pod, json!({ "spec": { "resources": { "limits": { "memory": "256Mi" } } } })).await?;
    // It is shown with the overhead of the RuntimeClass.
    let shown = if case.is_machine() { "512Mi" } else { "256Mi" };
    let count = case.until(&pod, "the pod's limit", |pod| {
        Ok((pod["status"]["resources"]["limits"]["memory"] == shown).then_some(restarts(pod)))
    });
    assert_eq!(count.await?, 0);
    ensure!(takes(case, &pod, 150).await?, "no 150 MiB of 256");
    ensure!(!takes(case, &pod, 700).await?, "700 MiB of 256");
    case.until(&pod, "no restart", |pod| Ok((restarts(pod) == 0).then_some(()))).await
}

/// kubelet's `podPidsLimit`.
async fn process_limit(case: &Case) -> Result<()> {
    let script = "i=0; while [ $i -lt 1100 ]; do sleep 1000000 & i=$((i+1)); done 2>/dev/null; echo all";
    let pod = case.name("");
    case.pod(&pod, json!({ "restartPolicy": "Never", "containers": [sh("c", &format!("({script}) || echo refused"))] }))
        .await?;
    let pod_ended = case.ended(&pod).await?;
    let text = case.kubectl().must(&case.handler, &["logs", &pod]).await?;
    ensure!(text.contains("refused") && !text.contains("all"), "{text} {}", pod_ended["status"]);
    Ok(())
}

/// A pod's entry in kubelet's summary.
async fn summary_of(case: &Case, pod: &str) -> Result<Value> {
    let text = case.kubectl().raw(&format!("/api/v1/nodes/{}/proxy/stats/summary", kuasar_tests::kubernetes::NODE)).await?;
    let mut all: Value = serde_json::from_str(&text)?;
    let pods = all["pods"].as_array_mut().map(std::mem::take).unwrap_or_default();
    Ok(pods
        .into_iter()
        .find(|found| found["podRef"]["name"] == pod && found["podRef"]["namespace"] == case.handler)
        .unwrap_or_default())
}

async fn until_summary(case: &Case, pod: &str, paths: &[&str]) -> Result<()> {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(90);
    loop {
        // kubelet may be about to start.
        let found = summary_of(case, pod).await.unwrap_or_default();
        // 0 is no measurement.
        let missing: Vec<&&str> =
            paths.iter().filter(|path| found.pointer(path).and_then(Value::as_u64).unwrap_or(0) == 0).collect();
        if missing.is_empty() {
            return Ok(());
        }
        ensure!(std::time::Instant::now() < end, "no {missing:?} in the summary: {found}");
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}

/// Works a little, and writes.
const BUSY: &str = "head -c 1000000 /dev/zero > /tmp/f; echo started; while :; do i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; sleep 0.1; done";

async fn summary(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sh("c", BUSY)] })).await?;
    let paths = [
        "/cpu/usageNanoCores",
        "/memory/workingSetBytes",
        "/containers/0/cpu/usageCoreNanoSeconds",
        "/containers/0/cpu/usageNanoCores",
        "/containers/0/memory/workingSetBytes",
        "/containers/0/rootfs/usedBytes",
        "/containers/0/logs/usedBytes",
        "/ephemeral-storage/usedBytes",
    ];
    until_summary(case, &pod, &paths).await
}

async fn resource_metrics(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sh("c", BUSY)] })).await?;
    let path = format!("/api/v1/nodes/{}/proxy/metrics/resource", kuasar_tests::kubernetes::NODE);
    let names = [
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
        "pod_cpu_usage_seconds_total",
        "container_start_time_seconds",
    ];
    case.until_prints(&["get", "--raw", &path], "the pod's metrics", |text| {
        let of = |name: &str| text.lines().any(|line| line.starts_with(name) && line.contains(&format!("pod=\"{pod}\"")));
        names.iter().all(|name| of(name)).then_some(())
    })
    .await
}

/// docs/containerd.md: with this gate everything is there, the network, too.
async fn statistics_from_cri(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sh("c", BUSY)] })).await?;
    gates(case, &[("PodAndContainerStatsFromCRI", true)]).await?;
    let paths = [
        "/cpu/usageNanoCores",
        "/memory/workingSetBytes",
        "/network/rxBytes",
        "/network/txBytes",
        "/process_stats/process_count",
        "/containers/0/cpu/usageNanoCores",
        "/containers/0/memory/workingSetBytes",
        "/containers/0/rootfs/usedBytes",
    ];
    let measured = until_summary(case, &pod, &paths).await;
    gates(case, &[]).await?;
    measured
}

async fn gates(case: &Case, gates: &[(&'static str, bool)]) -> Result<()> {
    let mut kubelet = case.cluster.kubelet.lock().await;
    kubelet.terminate()?;
    kubelet.gates(gates);
    kubelet.again()?;
    drop(kubelet);
    case.cluster.node_is_ready().await
}
