//! What is said of a pod and its containers: environment, names, namespaces, users, rights.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::suite::{Case, Entry, Missing, cases, container, sh, sleeper, with};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Shared:
        command_and_environment,
        environment_from_maps,
        environment_from_fields,
        names_of_a_pod,
        resolver,
        network_between_pods,
        host_network,
        host_pid,
        host_ipc,
        shared_processes,
        apart_by_default,
        sysctls,
        user_namespace,
        users_and_groups,
        supplemental_groups_policy,
        non_root_is_enforced,
        capabilities,
        privileged,
        no_new_privileges,
        read_only_root,
        seccomp,
        app_armor,
        proc_is_masked,
        image_that_is_not_there,
    ]
}

/// A pod with one container that runs a script.
fn one(script: &str, more: Value) -> Value {
    json!({ "containers": [with(sh("c", script), more)] })
}

async fn command_and_environment(case: &Case) -> Result<()> {
    let env = json!([
        { "name": "A", "value": "one" },
        { "name": "B", "value": "$(A) two $(NO)" },
        { "name": "C", "value": "$$(A)" },
        { "name": "D", "value": "spaces  and\nlines" },
    ]);
    let container = json!({
        "name": "c",
        "command": ["sh", "-c", "pwd; echo \"$A|$B|$C|$D|$0|$1\""],
        "args": ["$(A)", "$$(A)"],
        "workingDir": "/var/run/made",
        "env": env,
    });
    let text = case.output(&case.name(""), json!({ "containers": [container] })).await?;
    assert_eq!(text, "/var/run/made\none|one two $(NO)|$(A)|spaces  and\nlines|one|$(A)\n");
    Ok(())
}

async fn environment_from_maps(case: &Case) -> Result<()> {
    let name = case.name("");
    case.create("v1", "ConfigMap", &name, json!({ "data": { "KEY": "map", "OTHER": "all" } })).await?;
    case.create("v1", "Secret", &name, json!({ "stringData": { "KEY": "secret" } })).await?;
    let more = json!({
        "env": [
            { "name": "M", "valueFrom": { "configMapKeyRef": { "name": name, "key": "KEY" } } },
            { "name": "S", "valueFrom": { "secretKeyRef": { "name": name, "key": "KEY" } } },
            { "name": "N", "valueFrom": { "secretKeyRef": { "name": "none", "key": "KEY", "optional": true } } },
        ],
        "envFrom": [{ "prefix": "P_", "configMapRef": { "name": name } }],
    });
    assert_eq!(case.output(&name, one("echo $M $S ${N-unset} $P_KEY $P_OTHER", more)).await?, "map secret unset map all\n");
    Ok(())
}

async fn environment_from_fields(case: &Case) -> Result<()> {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "fieldPath": path } } });
    let limit = json!({ "name": "CPU", "valueFrom": { "resourceFieldRef": { "resource": "limits.cpu", "divisor": "1m" } } });
    let more = json!({
        "env": [field("POD", "metadata.name"), field("NS", "metadata.namespace"), field("IP", "status.podIP"), field("NODE", "spec.nodeName"), limit],
        "resources": { "limits": { "cpu": "300m", "memory": "96Mi" } },
    });
    let name = case.name("");
    let text = case.output(&name, one("hostname -i | grep -q \"^$IP\" && echo $POD $NS $NODE $CPU", more)).await?;
    assert_eq!(text, format!("{name} {} {} 300\n", case.handler, kuasar_tests::kubernetes::NODE));
    Ok(())
}

async fn names_of_a_pod(case: &Case) -> Result<()> {
    let [plain, long] = ["", "long"].map(|suffix| case.name(suffix));
    let mut spec = one("hostname; grep -c foo.example /etc/hosts; grep 'foo.example' /etc/hosts | head -n 1", json!({}));
    spec["hostname"] = "given".into();
    spec["subdomain"] = "sub".into();
    spec["hostAliases"] = json!([{ "ip": "192.0.2.7", "hostnames": ["foo.example", "bar.example"] }]);
    assert_eq!(case.output(&plain, spec).await?, "given\n1\n192.0.2.7\tfoo.example\tbar.example\n");
    let mut spec = one("hostname", json!({}));
    spec["hostname"] = "given".into();
    spec["subdomain"] = "sub".into();
    spec["setHostnameAsFQDN"] = true.into();
    assert_eq!(case.output(&long, spec).await?, format!("given.sub.{}.svc.cluster.local\n", case.handler));
    Ok(())
}

async fn resolver(case: &Case) -> Result<()> {
    let mut spec = one("cat /etc/resolv.conf", json!({}));
    spec["dnsPolicy"] = "None".into();
    spec["dnsConfig"] =
        json!({ "nameservers": ["192.0.2.1"], "searches": ["a.example"], "options": [{ "name": "ndots", "value": "3" }] });
    assert_eq!(case.output(&case.name(""), spec).await?, "search a.example\nnameserver 192.0.2.1\noptions ndots:3\n");
    let plain = case.output(&case.name("plain"), one("cat /etc/resolv.conf", json!({}))).await?;
    assert_eq!(plain, "nameserver 192.0.2.53\n");
    Ok(())
}

async fn network_between_pods(case: &Case) -> Result<()> {
    let [server, client] = ["server", "client"].map(|suffix| case.name(suffix));
    let web = json!({ "name": "web", "image": kuasar_tests::image::recipes::WEB, "readinessProbe": { "tcpSocket": { "port": 80 }, "periodSeconds": 1 } });
    case.ready_pod(&server, json!({ "containers": [web, sleeper("beside")] })).await?;
    let ip = case.until(&server, "an address", |pod| Ok(pod["status"]["podIP"].as_str().map(str::to_owned))).await?;
    let gateway = case.cluster.site().address;
    let script = format!("wget -qO- http://{ip}/; ping -c 1 -W 5 {gateway} > /dev/null && echo node");
    assert_eq!(case.output(&client, one(&script, json!({}))).await?.replace("\n\n", "\n"), "ok\nnode\n");
    // Containers of a pod meet on its loopback interface.
    let args = ["exec", &server, "-c", "beside", "--", "wget", "-qO-", "http://127.0.0.1/"];
    assert_eq!(case.kubectl().must(&case.handler, &args).await?.trim(), "ok");
    Ok(())
}

async fn host_network(case: &Case) -> Result<()> {
    let pod = case.name("");
    let mut spec = one("hostname; ls /sys/class/net; exec sleep 1000000", json!({}));
    spec["hostNetwork"] = true.into();
    case.ready_pod(&pod, spec).await?;
    let ip = case.until(&pod, "an address", |pod| Ok(pod["status"]["podIP"].as_str().map(str::to_owned))).await?;
    assert_eq!(ip, case.cluster.site().address.to_string());
    let log = case.kubectl().must(&case.handler, &["logs", &pod]).await?;
    let interfaces =
        std::fs::read_dir("/sys/class/net")?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let bridge = interfaces.into_iter().find(|name| name.starts_with("kua")).context("the node has no bridge")?;
    ensure!(log.contains(&bridge), "no {bridge} in {log}");
    Ok(())
}

async fn host_pid(case: &Case) -> Result<()> {
    let mut spec = one("tr '\\0' ' ' < /proc/1/cmdline; ps | grep -c '[k]ubelet --config'", json!({}));
    spec["hostPID"] = true.into();
    let text = case.output(&case.name(""), spec).await?;
    ensure!(text.lines().last().is_some_and(|count| count != "0"), "kubelet is not to be seen: {text}");
    Ok(())
}

async fn host_ipc(case: &Case) -> Result<()> {
    let namespace = std::fs::read_link("/proc/self/ns/ipc")?.display().to_string();
    let mut spec = one("readlink /proc/self/ns/ipc", json!({}));
    spec["hostIPC"] = true.into();
    assert_eq!(case.output(&case.name(""), spec).await?.trim(), namespace);
    Ok(())
}

async fn shared_processes(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "shareProcessNamespace": true, "containers": [sleeper("a"), sh("b", "exec sleep 7654321")] }))
        .await?;
    let text = case.prints(&pod, "kill $(ps | awk '/[s]leep 7654321/ { print $1 }') && echo killed").await?;
    assert_eq!(text, "killed\n");
    case.until(&pod, "a restart", |pod| Ok(container(pod, "b").filter(|status| status["restartCount"] == 1).map(|_| ()))).await
}

async fn apart_by_default(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sleeper("a"), sh("b", "exec sleep 7654321")] })).await?;
    let of = |name: &'static str| {
        let pod = pod.clone();
        async move {
            let script = "for n in pid mnt uts ipc net; do readlink /proc/self/ns/$n; done";
            case.kubectl().must(&case.handler, &["exec", &pod, "-c", name, "--", "sh", "-c", script]).await
        }
    };
    let (a, b) = (of("a").await?, of("b").await?);
    let same: Vec<bool> = a.lines().zip(b.lines()).map(|(a, b)| a == b).collect();
    // Processes and mounts are each container's own; name, shared memory and network the pod's.
    assert_eq!(same, [false, false, true, true, true], "{a}{b}");
    Ok(())
}

async fn sysctls(case: &Case) -> Result<()> {
    let mut spec = one("cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced", json!({}));
    spec["securityContext"] = json!({ "sysctls": [
        { "name": "net.ipv4.ip_unprivileged_port_start", "value": "77" },
        { "name": "kernel.shm_rmid_forced", "value": "1" },
    ] });
    assert_eq!(case.output(&case.name(""), spec).await?, "77\n1\n");
    Ok(())
}

async fn user_namespace(case: &Case) -> Result<()> {
    let mut spec = one(
        "id -u; awk '{ print ($2 >= 65536), $3 }' /proc/self/uid_map; touch /v/f; stat -c %u /v/f",
        json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] }),
    );
    spec["hostUsers"] = false.into();
    spec["volumes"] = json!([{ "name": "v", "emptyDir": {} }]);
    let name = case.name("");
    let printed = case.output(&name, spec).await;
    if let Err(error) = &printed {
        let text = format!("{error:#}{}", case.evidence().await);
        for lacking in ["does not support user namespaces", "idmap mount", "idmapped", "ID-mapped"] {
            if text.contains(lacking) && case.handler == "runc" {
                return Err(Missing(format!("no user namespaces with {}: {}", case.handler, text.replace('\n', " "))).into());
            }
        }
    }
    assert_eq!(printed?, "0\n1 65536\n0\n");
    Ok(())
}

async fn users_and_groups(case: &Case) -> Result<()> {
    let mut spec = json!({ "containers": [
        sh("c", "id -u; id -g; id -G"),
        with(sh("d", "id -u; id -g"), json!({ "securityContext": { "runAsUser": 7, "runAsGroup": 8 } })),
    ] });
    spec["securityContext"] = json!({ "runAsUser": 1000, "runAsGroup": 2000, "supplementalGroups": [4000, 5000] });
    let name = case.name("");
    assert_eq!(case.output(&name, spec).await?, "1000\n2000\n2000 4000 5000\n");
    assert_eq!(case.kubectl().must(&case.handler, &["logs", &name, "-c", "d"]).await?, "7\n8\n");
    Ok(())
}

async fn supplemental_groups_policy(case: &Case) -> Result<()> {
    let pod = case.name("");
    let mut spec = json!({ "containers": [sleeper("c")] });
    spec["securityContext"] =
        json!({ "runAsUser": 1000, "runAsGroup": 2000, "supplementalGroups": [4000], "supplementalGroupsPolicy": "Strict" });
    case.ready_pod(&pod, spec).await?;
    let user = case
        .until(&pod, "its user in the status", |pod| {
            Ok(container(pod, "c").map(|status| status["user"]["linux"].clone()).filter(|user| !user.is_null()))
        })
        .await?;
    assert_eq!((&user["uid"], &user["gid"], &user["supplementalGroups"]), (&json!(1000), &json!(2000), &json!([2000, 4000])));
    Ok(())
}

async fn non_root_is_enforced(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.pod(&pod, one("true", json!({ "securityContext": { "runAsNonRoot": true } }))).await?;
    case.until(&pod, "a refusal", |pod| {
        let waiting = container(pod, "c").map(|status| &status["state"]["waiting"]);
        Ok(waiting.filter(|waiting| waiting["reason"] == "CreateContainerConfigError").map(|_| ()))
    })
    .await
}

async fn capabilities(case: &Case) -> Result<()> {
    let spec = json!({ "containers": [
        with(sh("c", "grep CapEff /proc/self/status | cut -f 2; chown 1 /tmp 2>/dev/null || echo none"), json!({ "securityContext": { "capabilities": { "drop": ["ALL"] } } })),
        with(sh("d", "grep CapEff /proc/self/status | cut -f 2"), json!({ "securityContext": { "capabilities": { "drop": ["ALL"], "add": ["NET_ADMIN"] } } })),
    ] });
    let name = case.name("");
    let text = case.output(&name, spec).await?;
    ensure!(text.starts_with("0000000000000000\n") && text.ends_with("none\n"), "{text}");
    assert_eq!(case.kubectl().must(&case.handler, &["logs", &name, "-c", "d"]).await?, "0000000000001000\n");
    Ok(())
}

async fn privileged(case: &Case) -> Result<()> {
    let script = "mkdir /tmp/m; mount -t tmpfs t /tmp/m && echo mounted; ls /dev | wc -l; touch /proc/sys/kernel/x 2>&1 | grep -c Read-only";
    let text = case
        .output(&case.name(""), one(&format!("{script}; true"), json!({ "securityContext": { "privileged": true } })))
        .await?;
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.first() == Some(&"mounted") && lines.last() == Some(&"0"), "{text}");
    Ok(())
}

async fn no_new_privileges(case: &Case) -> Result<()> {
    let more = json!({ "securityContext": { "allowPrivilegeEscalation": false } });
    assert_eq!(case.output(&case.name(""), one("grep NoNewPrivs /proc/self/status | cut -f 2", more)).await?, "1\n");
    Ok(())
}

async fn read_only_root(case: &Case) -> Result<()> {
    let more = json!({ "securityContext": { "readOnlyRootFilesystem": true } });
    let text = case
        .output(
            &case.name(""),
            one("touch /x 2>/dev/null || echo read-only; echo w > /dev/termination-log && echo written", more),
        )
        .await?;
    ensure!(text.ends_with("read-only\nwritten\n"), "{text}");
    Ok(())
}

async fn seccomp(case: &Case) -> Result<()> {
    let profile = |kind: &str| json!({ "securityContext": { "seccompProfile": { "type": kind } } });
    let script = "grep '^Seccomp:' /proc/self/status | cut -f 2";
    let spec = json!({ "containers": [with(sh("c", script), profile("RuntimeDefault")), with(sh("d", script), profile("Unconfined"))] });
    let name = case.name("");
    assert_eq!(case.output(&name, spec).await?, "2\n");
    assert_eq!(case.kubectl().must(&case.handler, &["logs", &name, "-c", "d"]).await?, "0\n");
    Ok(())
}

async fn app_armor(case: &Case) -> Result<()> {
    if std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").map_or(true, |enabled| enabled.trim() != "Y") {
        return Err(Missing("no AppArmor".to_owned()).into());
    }
    let more = json!({ "securityContext": { "appArmorProfile": { "type": "RuntimeDefault" } } });
    let text = case.output(&case.name(""), one("cat /proc/self/attr/current", more)).await?;
    ensure!(text.contains("(enforce)"), "{text}");
    Ok(())
}

async fn proc_is_masked(case: &Case) -> Result<()> {
    let name = case.name("");
    let plain = case.output(&name, one("grep -c ' /proc/' /proc/self/mountinfo", json!({}))).await?;
    ensure!(plain.trim() != "0", "nothing of /proc is masked by default");
    Ok(())
}

async fn image_that_is_not_there(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.pod(&pod, one("true", json!({ "image": "localhost/no-such-image:1" }))).await?;
    case.until(&pod, "ErrImageNeverPull", |pod| {
        Ok(container(pod, "c").filter(|status| status["state"]["waiting"]["reason"] == "ErrImageNeverPull").map(|_| ()))
    })
    .await
}
