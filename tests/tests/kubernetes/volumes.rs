//! Volumes of every kind that needs no driver of its own.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::kubernetes::VOLUME_IMAGE;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::suite::{Case, Entry, cases, sh, sleeper, with};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Shared:
        empty_dir,
        empty_dir_in_memory,
        empty_dir_outlives_containers,
        config_map,
        config_map_that_changes,
        secret,
        projected,
        downward_api,
        host_path,
        host_path_types,
        read_only_mounts,
        sub_path,
        sub_path_of_an_expression,
        fs_group,
        host_to_container,
        bidirectional,
        image_volume,
        persistent_volume,
        persistent_block_volume,
        ephemeral_volume_is_counted,
    ]
}

fn mounted(container: Value, mounts: Value) -> Value {
    with(container, json!({ "volumeMounts": mounts }))
}

/// A pod with one container that runs a script, one volume, and this mount of it.
fn one(script: &str, volume: Value, mount: Value) -> Value {
    let volume = with(json!({ "name": "v" }), volume);
    let mount = with(json!({ "name": "v", "mountPath": "/v" }), mount);
    json!({ "containers": [mounted(sh("c", script), json!([mount]))], "volumes": [volume] })
}

const SLEEP: &str = "exec sleep 1000000";

async fn empty_dir(case: &Case) -> Result<()> {
    let pod = case.name("");
    let mounts = json!([{ "name": "v", "mountPath": "/v" }]);
    let spec = json!({
        "containers": [mounted(sleeper("a"), mounts.clone()), mounted(sleeper("b"), mounts)],
        "volumes": [{ "name": "v", "emptyDir": {} }],
    });
    case.ready_pod(&pod, spec).await?;
    case.prints(&pod, "mkdir /v/d; echo word > /v/d/f; mkfifo /v/p; ln -s d/f /v/l; chown 7:8 /v/d/f").await?;
    let args = ["exec", &pod, "-c", "b", "--", "sh", "-c", "cat /v/l; stat -c '%u:%g %F' /v/d/f /v/p; stat -c %a /v"];
    let text = case.kubectl().must(&case.handler, &args).await?;
    assert_eq!(text, "word\n7:8 regular file\n0:0 fifo\n777\n");
    Ok(())
}

async fn empty_dir_in_memory(case: &Case) -> Result<()> {
    let volume = json!({ "emptyDir": { "medium": "Memory", "sizeLimit": "8Mi" } });
    let script = "df -k /v | tail -n 1 | awk '{ print $2 }'; head -c 9000000 /dev/zero > /v/f 2>/dev/null || echo full";
    assert_eq!(case.output(&case.name(""), one(script, volume, json!({}))).await?, "8192\nfull\n");
    Ok(())
}

async fn empty_dir_outlives_containers(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.pod(
        &pod,
        one("echo x >> /v/f; [ $(wc -l < /v/f) -ge 2 ] || exit 1; exec sleep 1000000", json!({ "emptyDir": {} }), json!({})),
    )
    .await?;
    case.until(&pod, "a restart", |pod| Ok((kuasar_tests::kubernetes::watch::restarts(pod) == 1).then_some(()))).await?;
    case.ready(&pod).await?;
    assert_eq!(case.prints(&pod, "cat /v/f").await?, "x\nx\n");
    Ok(())
}

async fn config_map(case: &Case) -> Result<()> {
    let name = case.name("");
    let data = json!({ "data": { "one": "1", "two": "2" }, "binaryData": { "zero": "AAEC" } });
    case.create("v1", "ConfigMap", &name, data).await?;
    let items = json!([{ "key": "two", "path": "sub/dir/two", "mode": 0o400 }]);
    let spec = json!({
        "containers": [mounted(
            sh("c", "cat /all/one /some/sub/dir/two; wc -c < /all/zero; ls /some; stat -Lc %a /all/one /some/sub/dir/two; touch /all/x 2>/dev/null || echo read-only"),
            json!([{ "name": "all", "mountPath": "/all" }, { "name": "some", "mountPath": "/some" }]),
        )],
        "volumes": [
            { "name": "all", "configMap": { "name": name, "defaultMode": 0o640 } },
            { "name": "some", "configMap": { "name": name, "items": items } },
        ],
    });
    let text = case.output(&name, spec).await?;
    ensure!(text.starts_with("123\nsub\n640\n400\n") && text.ends_with("read-only\n"), "{text}");
    Ok(())
}

async fn config_map_that_changes(case: &Case) -> Result<()> {
    let name = case.name("");
    case.create("v1", "ConfigMap", &name, json!({ "data": { "word": "old" } })).await?;
    case.ready_pod(&name, one(SLEEP, json!({ "configMap": { "name": name } }), json!({}))).await?;
    assert_eq!(case.prints(&name, "cat /v/word").await?, "old");
    case.kubectl()
        .must(&case.handler, &["patch", "configmap", &name, "--patch", r#"{"data":{"word":"new","more":"1"}}"#])
        .await?;
    case.until_prints(&["exec", &name, "--", "sh", "-c", "cat /v/word /v/more"], "the change", |text| {
        (text == "new1").then_some(())
    })
    .await
}

async fn secret(case: &Case) -> Result<()> {
    let name = case.name("");
    case.create("v1", "Secret", &name, json!({ "stringData": { "key": "hidden" } })).await?;
    let spec = one(
        "cat /v/key; echo; stat -Lc %a /v/key; df /v/key | tail -n 1 | awk '{ print $1 }'",
        json!({ "secret": { "secretName": name, "defaultMode": 0o400 } }),
        json!({}),
    );
    let text = case.output(&name, spec).await?;
    ensure!(text.starts_with("hidden\n400\n"), "{text}");
    Ok(())
}

async fn projected(case: &Case) -> Result<()> {
    let name = case.name("");
    case.create("v1", "ConfigMap", &name, json!({ "data": { "c": "from a map" } })).await?;
    case.create("v1", "Secret", &name, json!({ "stringData": { "s": "from a secret" } })).await?;
    let sources = json!([
        { "configMap": { "name": name } },
        { "secret": { "name": name } },
        { "downwardAPI": { "items": [{ "path": "name", "fieldRef": { "fieldPath": "metadata.name" } }] } },
        { "serviceAccountToken": { "path": "token", "expirationSeconds": 3600, "audience": "here" } },
    ]);
    let script = "cat /v/c /v/s /v/name; echo; cut -d . -f 1 < /v/token | head -c 3; echo; ls /var/run/secrets/kubernetes.io/serviceaccount";
    let mut spec = one(script, json!({ "projected": { "sources": sources } }), json!({}));
    spec["automountServiceAccountToken"] = true.into();
    let text = case.output(&name, spec).await?;
    assert_eq!(text, format!("from a mapfrom a secret{name}\neyJ\nca.crt\nnamespace\ntoken\n"));
    Ok(())
}

async fn downward_api(case: &Case) -> Result<()> {
    let pod = case.name("");
    let items = json!([
        { "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } },
        { "path": "limit", "resourceFieldRef": { "containerName": "c", "resource": "limits.memory", "divisor": "1Mi" } },
    ]);
    let mut spec = one(SLEEP, json!({ "downwardAPI": { "items": items } }), json!({}));
    spec["containers"][0]["resources"] = json!({ "limits": { "memory": "96Mi", "cpu": "200m" } });
    case.ready_pod(&pod, spec).await?;
    assert_eq!(case.prints(&pod, "cat /v/limit").await?, "96");
    case.kubectl().must(&case.handler, &["label", "pod", &pod, "new=one"]).await?;
    case.until_prints(&["exec", &pod, "--", "cat", "/v/labels"], "the label", |text| text.contains("new=\"one\"").then_some(()))
        .await
}

async fn host_path(case: &Case) -> Result<()> {
    let pod = case.name("");
    let dir = case.dir()?;
    fs::write(dir.join("node"), "from the node\n")?;
    case.ready_pod(&pod, one(SLEEP, json!({ "hostPath": { "path": dir, "type": "Directory" } }), json!({}))).await?;
    assert_eq!(case.prints(&pod, "cat /v/node; echo from the pod > /v/pod; mv /v/node /v/moved").await?, "from the node\n");
    assert_eq!(fs::read_to_string(dir.join("pod"))?, "from the pod\n");
    fs::write(dir.join("later"), "later\n")?;
    assert_eq!(case.prints(&pod, "cat /v/later /v/moved").await?, "later\nfrom the node\n");
    Ok(())
}

async fn host_path_types(case: &Case) -> Result<()> {
    let [pod, refused] = ["", "refused"].map(|suffix| case.name(suffix));
    let dir = case.dir()?;
    fs::write(dir.join("file"), "")?;
    let path = |name: &str| dir.join(name).display().to_string();
    let spec = json!({
        "containers": [mounted(sleeper("c"), json!([{ "name": "f", "mountPath": "/f" }, { "name": "d", "mountPath": "/d" }, { "name": "n", "mountPath": "/n" }]))],
        "volumes": [
            { "name": "f", "hostPath": { "path": path("file"), "type": "File" } },
            { "name": "d", "hostPath": { "path": path("made"), "type": "DirectoryOrCreate" } },
            { "name": "n", "hostPath": { "path": path("new"), "type": "FileOrCreate" } },
        ],
    });
    case.ready_pod(&pod, spec).await?;
    case.prints(&pod, "echo 1 > /f; echo 2 > /n; touch /d/x").await?;
    ensure!(
        fs::read_to_string(path("file"))? == "1\n"
            && fs::read_to_string(path("new"))? == "2\n"
            && Path::new(&path("made/x")).exists()
    );
    case.pod(&refused, one(SLEEP, json!({ "hostPath": { "path": path("absent"), "type": "Directory" } }), json!({}))).await?;
    let field = format!("involvedObject.name={refused},reason=FailedMount");
    case.until_prints(&["get", "events", "--field-selector", &field], "a refusal", |text| {
        text.contains("hostPath type check failed").then_some(())
    })
    .await
}

async fn read_only_mounts(case: &Case) -> Result<()> {
    let name = case.name("");
    let dir = case.dir()?;
    fs::create_dir(dir.join("below"))?;
    mount(Some("tmpfs"), &dir.join("below"), Some("tmpfs"), MsFlags::empty(), Some("size=1m"))?;
    let spec = json!({
        "containers": [mounted(
            sh("c", "touch /r/x || echo 1; touch /r/below/x && echo 2; touch /rr/x || echo 3; touch /rr/below/x || echo 4"),
            json!([
                { "name": "v", "mountPath": "/r", "readOnly": true },
                { "name": "v", "mountPath": "/rr", "readOnly": true, "recursiveReadOnly": "Enabled" },
            ]),
        )],
        "volumes": [{ "name": "v", "hostPath": { "path": dir } }],
    });
    let printed = case.output(&name, spec).await;
    umount2(&dir.join("below"), MntFlags::MNT_DETACH)?;
    let words: Vec<String> = printed?.lines().filter(|line| line.len() == 1).map(str::to_owned).collect();
    assert_eq!(words, ["1", "2", "3", "4"]);
    Ok(())
}

async fn sub_path(case: &Case) -> Result<()> {
    let name = case.name("");
    case.create("v1", "ConfigMap", &name, json!({ "data": { "conf": "set" } })).await?;
    let spec = json!({
        "initContainers": [mounted(sh("i", "mkdir -p /v/a/b; echo in a/b > /v/a/b/f"), json!([{ "name": "v", "mountPath": "/v" }]))],
        "containers": [mounted(
            sh("c", "cat /b/f /etc/conf; ls /b /etc/passwd; echo more >> /b/f; cat /f"),
            json!([
                { "name": "v", "mountPath": "/b", "subPath": "a/b" },
                { "name": "v", "mountPath": "/f", "subPath": "a/b/f" },
                { "name": "m", "mountPath": "/etc/conf", "subPath": "conf" },
            ]),
        )],
        "volumes": [{ "name": "v", "emptyDir": {} }, { "name": "m", "configMap": { "name": name } }],
    });
    let text = case.output(&name, spec).await?;
    assert_eq!(text, "in a/b\nset/etc/passwd\n\n/b:\nf\nin a/b\nmore\n");
    Ok(())
}

async fn sub_path_of_an_expression(case: &Case) -> Result<()> {
    let pod = case.name("");
    let dir = case.dir()?;
    let mut spec = one("echo here > /v/f", json!({ "hostPath": { "path": dir } }), json!({ "subPathExpr": "of/$(POD)" }));
    spec["containers"][0]["env"] = json!([{ "name": "POD", "valueFrom": { "fieldRef": { "fieldPath": "metadata.name" } } }]);
    case.output(&pod, spec).await?;
    assert_eq!(fs::read_to_string(dir.join("of").join(&pod).join("f"))?, "here\n");
    Ok(())
}

async fn fs_group(case: &Case) -> Result<()> {
    let mut spec = one("id -G; stat -c '%g %A' /v; touch /v/f; stat -c %u:%g /v/f", json!({ "emptyDir": {} }), json!({}));
    spec["securityContext"] = json!({ "runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 3000 });
    assert_eq!(case.output(&case.name(""), spec).await?, "2000 3000\n3000 drwxrwsrwx\n1000:3000\n");
    Ok(())
}

async fn host_to_container(case: &Case) -> Result<()> {
    let pod = case.name("");
    let dir = case.dir()?;
    let below = dir.join("below");
    fs::create_dir(&below)?;
    case.ready_pod(&pod, one(SLEEP, json!({ "hostPath": { "path": dir } }), json!({ "mountPropagation": "HostToContainer" })))
        .await?;
    mount(Some("tmpfs"), &below, Some("tmpfs"), MsFlags::empty(), Some("size=1m"))?;
    let seen = async {
        fs::write(below.join("f"), "mounted\n")?;
        case.until_prints(&["exec", &pod, "--", "sh", "-c", "cat /v/below/f"], "what is mounted", |text| {
            (text == "mounted\n").then_some(())
        })
        .await
    };
    let seen = seen.await;
    // A guest remembers what it has looked at, and keeps it busy on the node: docs/microvm.md.
    let how = if case.is_machine() { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    let gone = umount2(&below, how).context("unmount what the pod has looked at");
    if gone.is_err() {
        umount2(&below, MntFlags::MNT_DETACH)?;
    }
    seen?;
    gone?;
    case.until_prints(&["exec", &pod, "--", "sh", "-c", "ls /v/below; echo ."], "what was unmounted to be gone", |text| {
        (text == ".\n").then_some(())
    })
    .await
}

async fn bidirectional(case: &Case) -> Result<()> {
    let pod = case.name("");
    let dir = case.dir()?;
    fs::create_dir(dir.join("below"))?;
    let mut spec = one(SLEEP, json!({ "hostPath": { "path": dir } }), json!({ "mountPropagation": "Bidirectional" }));
    spec["containers"][0]["securityContext"] = json!({ "privileged": true });
    case.ready_pod(&pod, spec).await?;
    case.prints(&pod, "mount -t tmpfs t /v/below && echo from the pod > /v/below/f").await?;
    let seen = fs::read_to_string(dir.join("below/f"));
    case.prints(&pod, "umount /v/below").await?;
    assert_eq!(seen?, "from the pod\n");
    ensure!(!dir.join("below/f").exists(), "what the pod has unmounted is there");
    Ok(())
}

async fn image_volume(case: &Case) -> Result<()> {
    let volume = json!({ "image": { "reference": VOLUME_IMAGE, "pullPolicy": "Never" } });
    let text = case
        .output(&case.name(""), one("cat /v/data/word; touch /v/x 2>/dev/null || echo read-only", volume, json!({})))
        .await?;
    ensure!(text.starts_with("from an image\n") && text.ends_with("read-only\n"), "{text}");
    Ok(())
}

/// A volume of the node's, and a claim for it. Their names are the cluster's, so the handler is in them.
async fn claim(case: &Case, path: &Path, mode: &str) -> Result<String> {
    let name = case.name("");
    let volume = format!("{}-{name}", case.handler);
    let affinity = json!({ "required": { "nodeSelectorTerms": [{
        "matchExpressions": [{ "key": "kubernetes.io/hostname", "operator": "In", "values": [kuasar_tests::kubernetes::NODE] }],
    }] } });
    let common = json!({ "accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeMode": mode });
    let spec =
        with(common.clone(), json!({ "capacity": { "storage": "1Mi" }, "local": { "path": path }, "nodeAffinity": affinity }));
    case.create("v1", "PersistentVolume", &volume, json!({ "spec": spec })).await?;
    let spec = with(common, json!({ "volumeName": volume, "resources": { "requests": { "storage": "1Mi" } } }));
    case.create("v1", "PersistentVolumeClaim", &name, json!({ "spec": spec })).await?;
    Ok(name)
}

async fn persistent_volume(case: &Case) -> Result<()> {
    let dir = case.dir()?;
    let name = claim(case, dir, "Filesystem").await?;
    let volume = || json!({ "persistentVolumeClaim": { "claimName": name } });
    case.output(&case.name("writer"), one("echo kept > /v/f", volume(), json!({}))).await?;
    assert_eq!(case.output(&case.name("reader"), one("cat /v/f", volume(), json!({}))).await?, "kept\n");
    Ok(())
}

/// A loop device of a file, and the end of both.
struct Loop {
    device: String,
}

impl Loop {
    fn of(file: &Path) -> Result<Self> {
        fs::File::create(file)?.set_len(1 << 20)?;
        let device = kuasar_tests::process::run(std::process::Command::new("losetup").args(["--find", "--show"]).arg(file));
        match device {
            Ok(device) => Ok(Self { device: device.trim().to_owned() }),
            Err(error) => Err(crate::suite::Missing(format!("no loop device: {error:#}")).into()),
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(error) = kuasar_tests::process::run(std::process::Command::new("losetup").args(["--detach", &self.device])) {
            eprintln!("{error:#}");
        }
    }
}

async fn persistent_block_volume(case: &Case) -> Result<()> {
    let pod = case.name("");
    let disk = Loop::of(&case.dir()?.join("disk"))?;
    let name = claim(case, Path::new(&disk.device), "Block").await?;
    let spec = json!({
        "containers": [with(sh("c", "stat -c %F /dev/own; echo word | dd of=/dev/own conv=sync,fsync 2>/dev/null; head -c 5 /dev/own"), json!({ "volumeDevices": [{ "name": "v", "devicePath": "/dev/own" }] }))],
        "volumes": [{ "name": "v", "persistentVolumeClaim": { "claimName": name } }],
    });
    let text = case.output(&pod, spec).await?;
    assert_eq!(text, "block special file\nword\n");
    // kubelet holds the device until it has forgotten the pod.
    case.kubectl().must(&case.handler, &["delete", "pod", &pod, "--wait"]).await?;
    Ok(())
}

/// kubelet looks every few seconds at what pods have written, and evicts the one that is over its limit.
async fn ephemeral_volume_is_counted(case: &Case) -> Result<()> {
    let pod = case.name("");
    let spec =
        one("head -c 3000000 /dev/zero > /v/f; exec sleep 1000000", json!({ "emptyDir": { "sizeLimit": "1Mi" } }), json!({}));
    case.pod(&pod, spec).await?;
    let reason = case.until(&pod, "an eviction", |pod| Ok(pod["status"]["reason"].as_str().map(str::to_owned))).await?;
    assert_eq!(reason, "Evicted");
    Ok(())
}
