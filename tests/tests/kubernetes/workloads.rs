//! Controllers, and the order in which a pod's containers run and end.

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::image::recipes;
use serde_json::{Value, json};

use crate::suite::{Case, Entry, cases, container, is_ready, sh, sleeper, with};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Shared:
        deployment_rolls_over,
        stateful_set_and_daemon_set,
        job_with_completions,
        job_that_fails,
        job_that_is_repeated,
        job_with_a_failure_policy,
        job_with_a_deadline,
        exit_codes_and_signals,
        restarts_with_growing_pauses,
        restart_rules,
        termination_messages,
        init_containers,
        init_container_that_fails,
        sidecar,
        sidecar_of_a_job,
        static_pod,
        pod_with_a_deadline,
    ]
}

fn selector(app: &str) -> Value {
    json!({ "matchLabels": { "app": app } })
}

async fn deployment_rolls_over(case: &Case) -> Result<()> {
    let name = case.name("");
    let rollout = format!("deployment/{name}");
    let web = json!({
        "name": "web",
        "image": recipes::WEB,
        "readinessProbe": { "httpGet": { "port": 80 }, "periodSeconds": 1 },
    });
    let spec =
        json!({ "replicas": 2, "selector": selector(&name), "template": case.template(&name, json!({ "containers": [web] })) });
    case.create("apps/v1", "Deployment", &name, json!({ "spec": spec })).await?;
    let kubectl = |args: Vec<String>| async move { case.kubectl().must(&case.handler, &args).await };
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let rolled = || kubectl(words(&format!("rollout status {rollout} {}", case.timeout())));
    rolled().await?;
    kubectl(words(&format!("set env {rollout} ROUND=2"))).await?;
    rolled().await?;
    kubectl(words(&format!("scale {rollout} --replicas=3"))).await?;
    rolled().await?;
    let env = kubectl(words(&format!("exec {rollout} -- env"))).await?;
    ensure!(env.lines().any(|line| line == "ROUND=2"), "{env}");
    kubectl(words(&format!("rollout undo {rollout}"))).await?;
    rolled().await?;
    Ok(())
}

async fn stateful_set_and_daemon_set(case: &Case) -> Result<()> {
    let [set, daemons] = ["set", "daemons"].map(|suffix| case.name(suffix));
    let template = |app: &str| case.template(app, json!({ "containers": [sleeper("c")] }));
    let spec = json!({ "replicas": 2, "serviceName": set, "selector": selector(&set), "template": template(&set) });
    case.create("apps/v1", "StatefulSet", &set, json!({ "spec": spec })).await?;
    let spec = json!({ "selector": selector(&daemons), "template": template(&daemons) });
    case.create("apps/v1", "DaemonSet", &daemons, json!({ "spec": spec })).await?;
    for kind in [format!("statefulset/{set}"), format!("daemonset/{daemons}")] {
        case.kubectl().must(&case.handler, &["rollout", "status", &kind, &case.timeout()]).await?;
    }
    assert_eq!(case.prints(&format!("{set}-1"), "hostname").await?, format!("{set}-1\n"));
    Ok(())
}

/// Creates a job and waits for this condition; returns its status.
async fn job(case: &Case, job: Value, pod: Value, condition: &str) -> Result<Value> {
    let name = case.name("");
    let mut spec = job;
    spec["template"] = case.template(&name, pod);
    case.create("batch/v1", "Job", &name, json!({ "spec": spec })).await?;
    let wanted = format!("--for=condition={condition}");
    case.kubectl().must(&case.handler, &["wait", &wanted, &format!("job/{name}"), &case.timeout()]).await?;
    Ok(case.kubectl().get(&case.handler, "job", &name).await?["status"].take())
}

fn reason(status: &Value, condition: &str) -> Option<Value> {
    let conditions = status["conditions"].as_array()?;
    Some(conditions.iter().find(|found| found["type"] == condition)?["reason"].clone())
}

async fn job_with_completions(case: &Case) -> Result<()> {
    let pod = json!({ "restartPolicy": "Never", "containers": [sh("c", "echo $JOB_COMPLETION_INDEX; exit 0")] });
    let status = job(case, json!({ "completions": 3, "parallelism": 2, "completionMode": "Indexed" }), pod, "Complete").await?;
    assert_eq!((&status["succeeded"], &status["failed"]), (&json!(3), &Value::Null), "{status}");
    Ok(())
}

async fn job_that_fails(case: &Case) -> Result<()> {
    let pod = json!({ "restartPolicy": "Never", "containers": [sh("c", "exit 3")] });
    // One more try comes 10 s later.
    let status = job(case, json!({ "backoffLimit": 1 }), pod, "Failed").await?;
    assert_eq!((&status["failed"], reason(&status, "Failed")), (&json!(2), Some(json!("BackoffLimitExceeded"))), "{status}");
    Ok(())
}

/// Counts in a volume how often it has begun.
fn counting(then: &str) -> Value {
    let script = format!("echo x >> /v/begun; n=$(wc -l < /v/begun); {then}");
    with(sh("c", &script), json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] }))
}

async fn job_that_is_repeated(case: &Case) -> Result<()> {
    let pod = json!({
        "restartPolicy": "OnFailure",
        "containers": [counting("[ $n -ge 2 ]")],
        "volumes": [{ "name": "v", "emptyDir": {} }],
    });
    let status = job(case, json!({ "backoffLimit": 4 }), pod, "Complete").await?;
    assert_eq!((&status["succeeded"], &status["failed"]), (&json!(1), &Value::Null), "{status}");
    Ok(())
}

async fn job_with_a_failure_policy(case: &Case) -> Result<()> {
    let pod = json!({ "restartPolicy": "Never", "containers": [sh("c", "exit 42")] });
    let rule = json!({ "action": "FailJob", "onExitCodes": { "containerName": "c", "operator": "In", "values": [42] } });
    let status = job(case, json!({ "backoffLimit": 4, "podFailurePolicy": { "rules": [rule] } }), pod, "Failed").await?;
    assert_eq!((&status["failed"], reason(&status, "Failed")), (&json!(1), Some(json!("PodFailurePolicy"))), "{status}");
    Ok(())
}

async fn job_with_a_deadline(case: &Case) -> Result<()> {
    let pod = json!({ "restartPolicy": "Never", "containers": [sleeper("c")] });
    let status = job(case, json!({ "activeDeadlineSeconds": 5 }), pod, "Failed").await?;
    assert_eq!(reason(&status, "Failed"), Some(json!("DeadlineExceeded")), "{status}");
    Ok(())
}

/// What a container's end is reported as.
fn end(pod: &Value, name: &str) -> Result<(i64, String)> {
    let ended = &container(pod, name).with_context(|| format!("no container {name}"))?["state"]["terminated"];
    let code = ended["exitCode"].as_i64().with_context(|| format!("{name} has not ended"))?;
    Ok((code, ended["reason"].as_str().unwrap_or_default().to_owned()))
}

async fn exit_codes_and_signals(case: &Case) -> Result<()> {
    let pod = case.name("");
    let containers = [
        sh("none", "exit 0"),
        sh("seven", "exit 7"),
        sh("most", "exit 255"),
        // Two dollars are one to Kubernetes. SIGKILL of its own does nothing to process 1.
        sh("killed", "sh -c 'kill -9 $$$$'; exit $?"),
        sh("term", "trap 'exit 9' TERM; kill $$$$; while :; do sleep 0.1; done"),
    ];
    case.pod(&pod, json!({ "restartPolicy": "Never", "containers": containers })).await?;
    let pod = case.ended(&pod).await?;
    assert_eq!(pod["status"]["phase"], "Failed");
    for (name, code) in [("none", 0), ("seven", 7), ("most", 255), ("killed", 137), ("term", 9)] {
        let reason = if code == 0 { "Completed" } else { "Error" };
        assert_eq!(end(&pod, name)?, (code, reason.to_owned()), "{name}");
    }
    Ok(())
}

async fn restarts_with_growing_pauses(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.pod(&pod, json!({ "containers": [sh("c", "exit 5")] })).await?;
    let last = case.until(&pod, "two restarts", |pod| {
        let status = container(pod, "c").cloned().unwrap_or_default();
        Ok((status["restartCount"].as_u64() >= Some(2)).then(|| status["lastState"]["terminated"]["exitCode"].clone()))
    });
    assert_eq!(last.await?, 5);
    case.until(&pod, "CrashLoopBackOff", |pod| {
        Ok(container(pod, "c").filter(|status| status["state"]["waiting"]["reason"] == "CrashLoopBackOff").map(|_| ()))
    })
    .await
}

async fn restart_rules(case: &Case) -> Result<()> {
    let pod = case.name("");
    let rule = json!({ "action": "Restart", "exitCodes": { "operator": "In", "values": [42] } });
    let container =
        with(counting("[ $n -ge 2 ] || exit 42; exit 8"), json!({ "restartPolicy": "Never", "restartPolicyRules": [rule] }));
    let spec = json!({ "restartPolicy": "Never", "containers": [container], "volumes": [{ "name": "v", "emptyDir": {} }] });
    case.pod(&pod, spec).await?;
    let pod = case.ended(&pod).await?;
    assert_eq!(end(&pod, "c")?.0, 8);
    assert_eq!(kuasar_tests::kubernetes::watch::restarts(&pod), 1);
    Ok(())
}

async fn termination_messages(case: &Case) -> Result<()> {
    let pod = case.name("");
    let containers = [
        with(sh("file", "echo reason > /tmp/why; exit 1"), json!({ "terminationMessagePath": "/tmp/why" })),
        with(sh("log", "echo in the log; exit 1"), json!({ "terminationMessagePolicy": "FallbackToLogsOnError" })),
    ];
    case.pod(&pod, json!({ "restartPolicy": "Never", "containers": containers })).await?;
    let pod = case.ended(&pod).await?;
    for (name, text) in [("file", "reason\n"), ("log", "in the log\n")] {
        assert_eq!(container(&pod, name).context("no container")?["state"]["terminated"]["message"], text, "{name}");
    }
    Ok(())
}

async fn init_containers(case: &Case) -> Result<()> {
    let pod = case.name("");
    let mount = json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] });
    let spec = json!({
        "initContainers": [with(sh("one", "echo 1 >> /v/order"), mount.clone()), with(sh("two", "echo 2 >> /v/order"), mount.clone())],
        "containers": [with(sh("c", "echo 3 >> /v/order; cat /v/order"), mount)],
        "volumes": [{ "name": "v", "emptyDir": {} }],
    });
    assert_eq!(case.output(&pod, spec).await?, "1\n2\n3\n");
    Ok(())
}

async fn init_container_that_fails(case: &Case) -> Result<()> {
    let [never, again] = ["never", "again"].map(|suffix| case.name(suffix));
    let spec = json!({ "restartPolicy": "Never", "initContainers": [sh("i", "exit 2")], "containers": [sleeper("c")] });
    case.pod(&never, spec).await?;
    let mut init = counting("[ $n -ge 2 ]");
    init["name"] = "i".into();
    let spec = json!({ "initContainers": [init], "containers": [sleeper("c")], "volumes": [{ "name": "v", "emptyDir": {} }] });
    case.ready_pod(&again, spec).await?;
    let pod = case.ended(&never).await?;
    assert_eq!((pod["status"]["phase"].as_str(), end(&pod, "i")?.0), (Some("Failed"), 2));
    Ok(())
}

/// A sidecar is there before the containers, and ends after them.
fn with_sidecar(main: Value) -> Value {
    let mount = json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] });
    let side = with(
        sh(
            "side",
            "trap 'echo side ends >> /v/order; exit 0' TERM; sleep 0.5; echo side >> /v/order; while :; do sleep 0.1; done",
        ),
        json!({ "restartPolicy": "Always", "startupProbe": { "exec": { "command": ["test", "-e", "/v/order"] }, "periodSeconds": 1 } }),
    );
    json!({
        "terminationGracePeriodSeconds": 20,
        "initContainers": [with(side, mount.clone())],
        "containers": [with(main, mount)],
        "volumes": [{ "name": "v", "emptyDir": {} }],
    })
}

async fn sidecar(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, with_sidecar(sh("c", "echo main >> /v/order; exec sleep 1000000"))).await?;
    assert_eq!(case.prints(&pod, "cat /v/order").await?, "side\nmain\n");
    // One that ends is started again, with the pod's readiness untouched but for its own.
    case.kubectl().run(&case.handler, &["exec", &pod, "-c", "side", "--", "sh", "-c", "kill -TERM 1"], b"").await?;
    case.until(&pod, "the sidecar's restart", |pod| {
        Ok((container(pod, "side").is_some_and(|side| side["restartCount"] == 1) && is_ready(pod)).then_some(()))
    })
    .await
}

async fn sidecar_of_a_job(case: &Case) -> Result<()> {
    let pod = case.name("");
    let mut spec = with_sidecar(sh("c", "echo main >> /v/order; exit 0"));
    spec["restartPolicy"] = "Never".into();
    case.pod(&pod, spec).await?;
    let pod = case.ended(&pod).await?;
    assert_eq!((pod["status"]["phase"].as_str(), end(&pod, "side")?.0), (Some("Succeeded"), 0));
    let finished = |name: &str| container(&pod, name).and_then(|status| status["state"]["terminated"]["finishedAt"].as_str());
    ensure!(finished("side") >= finished("c"), "the sidecar ended first: {}", pod["status"]);
    Ok(())
}

async fn static_pod(case: &Case) -> Result<()> {
    let name = case.name("");
    // kubelet refuses service accounts and secrets of such a pod, and runs it before there is an API server.
    let manifest = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": name, "namespace": case.handler, "labels": { "case": case.slug } },
        "spec": case.spec(json!({ "containers": [sleeper("c")] })),
    });
    let path = case.cluster.kubelet.lock().await.static_pods().join(format!("{}-{name}.json", case.handler));
    std::fs::create_dir_all(path.parent().context("no directory")?)?;
    std::fs::write(&path, manifest.to_string())?;
    let mirror = format!("{name}-{}", kuasar_tests::kubernetes::NODE);
    let ready = case.ready(&mirror).await;
    std::fs::remove_file(&path)?;
    ready?;
    case.until(&mirror, "its end with its manifest", |pod| Ok(pod.is_null().then_some(()))).await
}

async fn pod_with_a_deadline(case: &Case) -> Result<()> {
    let pod = case.name("");
    // Counted from kubelet's first sight of the pod.
    case.pod(&pod, json!({ "activeDeadlineSeconds": 20, "containers": [sleeper("c")] })).await?;
    let pod = case.ended(&pod).await?;
    assert_eq!((&pod["status"]["phase"], &pod["status"]["reason"]), (&json!("Failed"), &json!("DeadlineExceeded")));
    Ok(())
}
