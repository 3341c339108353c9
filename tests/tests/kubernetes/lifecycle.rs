//! Probes, hooks and grace.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::image::recipes;
use kuasar_tests::kubernetes::watch::{flaps, restarts};
use serde_json::{Value, json};

use crate::suite::{Case, Entry, cases, container, is_ready, sh, sleeper, with};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Shared:
        readiness_by_exec,
        readiness_by_http_and_tcp,
        liveness_by_exec,
        liveness_by_http_and_tcp,
        startup_probe_holds_others,
        probe_that_takes_too_long,
        probes_leave_well_pods_alone,
        post_start,
        post_start_that_fails,
        pre_stop,
        grace_is_kept,
        grace_that_is_exceeded,
        deletion_without_grace,
        stop_signal,
    ]
}

async fn becomes(case: &Case, pod: &str, ready: bool) -> Result<()> {
    case.until(pod, if ready { "readiness" } else { "unreadiness" }, |pod| Ok((is_ready(pod) == ready).then_some(()))).await
}

async fn restarted(case: &Case, pod: &str) -> Result<()> {
    case.until(pod, "a restart and readiness", |pod| Ok((restarts(pod) == 1 && is_ready(pod)).then_some(()))).await
}

async fn readiness_by_exec(case: &Case) -> Result<()> {
    let pod = case.name("");
    let probe = json!({ "readinessProbe": { "exec": { "command": ["test", "-e", "/tmp/ready"] }, "periodSeconds": 1, "failureThreshold": 1 } });
    case.pod(&pod, json!({ "containers": [with(sleeper("c"), probe)] })).await?;
    case.until(&pod, "a start", |pod| Ok(container(pod, "c").filter(|status| status["started"] == true).map(|_| ()))).await?;
    case.prints(&pod, "touch /tmp/ready").await?;
    becomes(case, &pod, true).await?;
    case.prints(&pod, "rm /tmp/ready").await?;
    becomes(case, &pod, false).await?;
    case.prints(&pod, "touch /tmp/ready").await?;
    becomes(case, &pod, true).await
}

async fn readiness_by_http_and_tcp(case: &Case) -> Result<()> {
    let pod = case.name("");
    let web = |name: &str, port: u16, probe: Value| {
        json!({
            "name": name,
            "image": recipes::WEB,
            "env": [{ "name": "PORT", "value": port.to_string() }],
            "ports": [{ "name": "http", "containerPort": port }],
            "readinessProbe": with(json!({ "periodSeconds": 1 }), probe),
        })
    };
    let containers = [
        web(
            "get",
            8080,
            json!({ "httpGet": { "port": "http", "path": "/any", "httpHeaders": [{ "name": "X-A", "value": "b" }] } }),
        ),
        web("connect", 8081, json!({ "tcpSocket": { "port": 8081 } })),
    ];
    case.ready_pod(&pod, json!({ "containers": containers })).await
}

async fn liveness_by_exec(case: &Case) -> Result<()> {
    let pod = case.name("");
    let probe = json!({ "livenessProbe": { "exec": { "command": ["test", "!", "-e", "/tmp/ill"] }, "periodSeconds": 1, "failureThreshold": 1 } });
    case.ready_pod(&pod, json!({ "containers": [with(sleeper("c"), probe)] })).await?;
    case.prints(&pod, "touch /tmp/ill").await?;
    restarted(case, &pod).await
}

/// A server that a file ends, so that its port refuses.
async fn liveness_by_http_and_tcp(case: &Case) -> Result<()> {
    for (suffix, probe) in [("http", json!({ "httpGet": { "port": 80 } })), ("tcp", json!({ "tcpSocket": { "port": 80 } }))] {
        let pod = case.name(suffix);
        let script = "nginx & server=$!; until [ -e /tmp/ill ]; do sleep 0.1; done; kill $server; sleep 1000000";
        let web = json!({ "name": "c", "image": recipes::WEB, "command": ["sh", "-c", script] });
        let probes = json!({
            "startupProbe": with(probe.clone(), json!({ "periodSeconds": 1, "failureThreshold": 60 })),
            "livenessProbe": with(probe, json!({ "periodSeconds": 1, "failureThreshold": 1 })),
        });
        case.ready_pod(&pod, json!({ "containers": [with(web, probes)] })).await?;
        case.prints(&pod, "touch /tmp/ill").await?;
        restarted(case, &pod).await?;
    }
    Ok(())
}

async fn startup_probe_holds_others(case: &Case) -> Result<()> {
    let pod = case.name("");
    let probes = json!({
        "startupProbe": { "exec": { "command": ["test", "-e", "/tmp/up"] }, "periodSeconds": 1, "failureThreshold": 120 },
        "livenessProbe": { "exec": { "command": ["test", "-e", "/tmp/up"] }, "periodSeconds": 1, "failureThreshold": 1 },
    });
    case.pod(&pod, json!({ "containers": [with(sh("c", "sleep 5; touch /tmp/up; exec sleep 1000000"), probes)] })).await?;
    case.ready(&pod).await?;
    case.until(&pod, "no restart", |pod| Ok((restarts(pod) == 0).then_some(()))).await
}

async fn probe_that_takes_too_long(case: &Case) -> Result<()> {
    let pod = case.name("");
    let slow = json!({ "exec": { "command": ["sh", "-c", "test -e /tmp/quick || sleep 1000"] }, "periodSeconds": 1, "timeoutSeconds": 1 });
    case.pod(&pod, json!({ "containers": [with(sleeper("c"), json!({ "readinessProbe": slow }))] })).await?;
    case.until_prints(
        &["get", "events", "--field-selector", &format!("involvedObject.name={pod},reason=Unhealthy"), "--output", "name"],
        "a probe that fails",
        |text| (!text.is_empty()).then_some(()),
    )
    .await?;
    // What is ended with a probe is all of it.
    case.until_prints(
        &["exec", &pod, "--", "sh", "-c", "touch /tmp/quick; ps | grep -c '[s]leep 1000$' || true"],
        "no probe's process",
        |text| (text.trim() == "0").then_some(()),
    )
    .await?;
    case.ready(&pod).await
}

async fn probes_leave_well_pods_alone(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, probed()).await?;
    let begin = Instant::now();
    tokio::time::sleep(Duration::from_secs(20)).await;
    let history = case.cluster.pods().history(&case.handler, &pod);
    let last = history.last().context("the pod is gone")?;
    let (again, unready) = (restarts(&last.pod), flaps(&history, begin));
    ensure!(again == 0 && unready.is_empty(), "{again} restarts, unready {unready:?}");
    Ok(())
}

/// A pod with a probe of each kind, each second.
pub(crate) fn probed() -> Value {
    let every = |probe: Value| with(probe, json!({ "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 3 }));
    let exec = every(json!({ "exec": { "command": ["true"] } }));
    let web = |name: &str, port: u16, probe: &Value| {
        let probe = every(probe.clone());
        json!({
            "name": name,
            "image": recipes::WEB,
            "env": [{ "name": "PORT", "value": port.to_string() }],
            "readinessProbe": probe,
            "livenessProbe": probe,
        })
    };
    json!({ "containers": [
        with(sleeper("exec"), json!({ "readinessProbe": exec, "livenessProbe": exec })),
        web("http", 8080, &json!({ "httpGet": { "port": 8080 } })),
        web("tcp", 8081, &json!({ "tcpSocket": { "port": 8081 } })),
    ] })
}

async fn post_start(case: &Case) -> Result<()> {
    let pod = case.name("");
    let hook = json!({ "lifecycle": { "postStart": { "exec": { "command": ["sh", "-c", "echo hooked > /tmp/hook"] } } } });
    case.ready_pod(&pod, json!({ "containers": [with(sleeper("c"), hook)] })).await?;
    assert_eq!(case.prints(&pod, "cat /tmp/hook").await?, "hooked\n");
    Ok(())
}

async fn post_start_that_fails(case: &Case) -> Result<()> {
    let pod = case.name("");
    let hook = json!({ "lifecycle": { "postStart": { "exec": { "command": ["false"] } } } });
    case.pod(&pod, json!({ "restartPolicy": "Never", "containers": [with(sleeper("c"), hook)] })).await?;
    let pod = case.ended(&pod).await?;
    assert_eq!(pod["status"]["phase"], "Failed");
    Ok(())
}

/// A pod that notes in a directory of the node what happens to it.
fn noting(case: &Case, script: &str, more: Value, grace: u32) -> Result<Value> {
    let volume = json!({ "name": "v", "hostPath": { "path": case.dir()? } });
    let noting = with(sh("c", script), with(json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] }), more));
    Ok(json!({ "terminationGracePeriodSeconds": grace, "containers": [noting], "volumes": [volume] }))
}

async fn noted(case: &Case) -> Result<String> {
    let path = case.dir()?.join("notes");
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

async fn delete(case: &Case, pod: &str, more: &[&str]) -> Result<Duration> {
    let begin = Instant::now();
    case.kubectl().must(&case.handler, &[&["delete", "pod", pod, "--wait"][..], more].concat()).await?;
    Ok(begin.elapsed())
}

async fn pre_stop(case: &Case) -> Result<()> {
    for (suffix, hook) in [
        ("exec", json!({ "exec": { "command": ["sh", "-c", "sleep 1; echo hook >> /v/notes"] } })),
        ("sleep", json!({ "sleep": { "seconds": 1 } })),
    ] {
        let pod = case.name(suffix);
        let script = "trap 'echo term >> /v/notes; exit 0' TERM; while :; do sleep 0.1; done";
        case.ready_pod(&pod, noting(case, script, json!({ "lifecycle": { "preStop": hook } }), 30)?).await?;
        delete(case, &pod, &[]).await?;
    }
    assert_eq!(noted(case).await?, "hook\nterm\nterm\n");
    Ok(())
}

async fn grace_is_kept(case: &Case) -> Result<()> {
    let pod = case.name("");
    let script = "trap 'sleep 3; echo done >> /v/notes; exit 0' TERM; while :; do sleep 0.1; done";
    case.ready_pod(&pod, noting(case, script, json!({}), 30)?).await?;
    delete(case, &pod, &[]).await?;
    assert_eq!(noted(case).await?, "done\n");
    Ok(())
}

async fn grace_that_is_exceeded(case: &Case) -> Result<()> {
    let pod = case.name("");
    let script = "trap 'echo term >> /v/notes' TERM; i=0; while :; do sleep 0.1; done";
    case.ready_pod(&pod, noting(case, script, json!({}), 3)?).await?;
    let took = delete(case, &pod, &[]).await?;
    assert_eq!(noted(case).await?, "term\n");
    ensure!(took >= Duration::from_secs(3), "gone after {took:?}, before its grace");
    Ok(())
}

async fn deletion_without_grace(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, noting(case, "trap 'sleep 1000' TERM; while :; do sleep 0.1; done", json!({}), 60)?).await?;
    let took = delete(case, &pod, &["--grace-period=1"]).await?;
    ensure!(took < Duration::from_secs(45), "gone after {took:?} only");
    Ok(())
}

/// Without the feature gate the API server drops the field: nothing to be seen.
async fn stop_signal(case: &Case) -> Result<()> {
    let pod = case.name("");
    let script =
        "trap 'echo usr1 >> /v/notes; exit 0' USR1; trap 'echo term >> /v/notes; exit 0' TERM; while :; do sleep 0.1; done";
    let mut spec = noting(case, script, json!({ "lifecycle": { "stopSignal": "SIGUSR1" } }), 30)?;
    spec["os"] = json!({ "name": "linux" });
    case.ready_pod(&pod, spec).await?;
    delete(case, &pod, &[]).await?;
    assert_eq!(noted(case).await?, "usr1\n");
    Ok(())
}
