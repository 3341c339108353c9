//! kuasarctl beside a containerd that runs pods.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::{ContainerSpec, Node, tools};
use serde_json::{Value, json};
use tonic::Status;

use crate::suite::{Case, Entry, Lone, cases};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Ours Alone: containerd_takes_its_drop_in, without_a_daemon];
    cases.extend(cases![Ours Shared: pods_are_listed_and_inspected, starts_that_fail_are_told, versions_and_check]);
    cases
}

/// kuasarctl for a node's daemon, without what it is to do.
pub(crate) fn command(node: &Node) -> Result<Command> {
    let kuasard = node.kuasard.as_ref().context("the node has no kuasard")?;
    let mut command = Command::new(tools::ours("kuasarctl")?);
    command.arg("--state").arg(kuasard.state()).arg("--config").arg(kuasard.config());
    Ok(command)
}

pub(crate) fn kuasarctl(node: &Node, args: &[&str]) -> Result<Output> {
    command(node)?.args(args).output().context("run kuasarctl")
}

pub(crate) fn said(node: &Node, args: &[&str]) -> Result<String> {
    let output = kuasarctl(node, args)?;
    ensure!(output.status.success(), "kuasarctl {args:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

fn refused(node: &Node, args: &[&str]) -> Result<String> {
    let output = kuasarctl(node, args)?;
    ensure!(!output.status.success(), "kuasarctl {args:?} was accepted: {output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

async fn pods_are_listed_and_inspected(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().shared_pid()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let table = said(&case.node, &["ps", "--no-trunc"])?;
    let line = |id: &str| table.lines().find(|line| line.contains(id)).with_context(|| format!("no {id} in:\n{table}"));
    assert!(
        line(&pod.id)?.contains("default/pod") && line(&pod.id)?.contains(&case.handler) && line(&pod.id)?.contains("ready")
    );
    // The guest's pids mean nothing on the node.
    let pid = if case.is_machine() { " (VM)".to_owned() } else { container.pid().await?.to_string() };
    assert!(line(&container.id)?.contains("running") && line(&container.id)?.contains(&pid), "{table}");
    assert!(said(&case.node, &["ps"])?.contains(&pod.id[..13]));
    assert!(!said(&case.node, &["ps", "-n", "another"])?.contains(&pod.id[..13]));

    let list: Value = serde_json::from_str(&said(&case.node, &["ps", "--json"])?)?;
    let of = |list: &Value| list.as_array().into_iter().flatten().find(|entry| entry["spec"]["id"] == pod.id.as_str()).cloned();
    let listed = of(&list).context("ps --json does not list the pod")?;
    assert_eq!(listed["spec"]["sandboxer"], case.handler.as_str());
    assert_eq!(listed["containers"][0]["id"], container.id.as_str());
    // By the pod's id, the beginning of it, or the container's.
    for id in [pod.id.as_str(), &pod.id[..20], container.id.as_str()] {
        let inspected: Value = serde_json::from_str(&said(&case.node, &["inspect", id])?)?;
        assert_eq!(inspected["spec"]["id"], pod.id.as_str());
    }
    assert!(refused(&case.node, &["inspect", "no-such-pod"])?.contains("no-such-pod"));
    pod.remove_all().await?;
    assert!(!said(&case.node, &["ps", "--no-trunc"])?.contains(&pod.id));
    refused(&case.node, &["inspect", &pod.id])?;
    Ok(())
}

/// The last report of what an error names, and the file it is in.
pub(crate) fn report(node: &Node, error: &Status) -> Result<(String, Value)> {
    let (_, rest) = error.message().split_once("(kuasarctl failures ").with_context(|| format!("no report in {error}"))?;
    // containerd adds what it makes of the code.
    let id = rest.split(')').next().unwrap_or(rest);
    let mut reports: Vec<Value> = serde_json::from_str(&said(node, &["failures", id, "--json"])?)?;
    let report = reports.pop().with_context(|| format!("no report of {id}"))?;
    let file = report["file"].as_str().context("the report does not tell its file")?.to_owned();
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&file).with_context(|| format!("read {file}"))?)?;
    assert_eq!(report, written);
    // Kubernetes shows the whole error with each event.
    for word in ["stage: ", " ms", &file] {
        assert!(!error.message().contains(word), "{word:?} is for the report, and not for {error}");
    }
    Ok((file, report))
}

async fn starts_that_fail_are_told(case: &Case) -> Result<()> {
    let failed = case.run(case.spec().shared_pid().sysctl("kernel.shm_rmid_forced", "many")).await;
    let error = crate::suite::refused(failed, &["shm_rmid_forced", "(kuasarctl failures "])?;
    let (file, failure) = report(&case.node, &error)?;
    let state = case.node.kuasard.as_ref().context("the node has no kuasard")?.state().join("failures");
    assert!(Path::new(&file).starts_with(&state), "{file}");
    assert_eq!(failure["operation"], "start the sandbox");
    // containerd has deleted it.
    let id = failure["sandbox"].as_str().context("no sandbox in the report")?;
    let account = said(&case.node, &["inspect", id])?;
    for word in ["FAILED TO  start the sandbox", "shm_rmid_forced", "(failed)", &file] {
        assert!(account.contains(word), "no {word:?} in:\n{account}");
    }
    let json: Value = serde_json::from_str(&said(&case.node, &["inspect", &id[..20], "--json"])?)?;
    assert_eq!(json, json!({ "failures": [failure] }));
    let without_age = |account: &str| account.lines().filter(|line| !line.starts_with("AGE")).collect::<Vec<_>>().join("\n");
    assert_eq!(without_age(&said(&case.node, &["failures", id])?), without_age(&account));
    let list = said(&case.node, &["failures", "--no-trunc"])?;
    assert!(list.lines().any(|line| line.contains(id) && line.contains("start the sandbox")), "{list}");

    let pod = case.run(case.spec().quick()).await?;
    let missing = pod.create(ContainerSpec::new("missing").command(&["/no/such/program"])).await?;
    let error = crate::suite::refused(missing.start().await, &["/no/such/program", "(kuasarctl failures "])?;
    let (_, failure) = report(&case.node, &error)?;
    let log = failure["log"]["text"].as_str().context("the OCI runtime's log is not kept")?;
    assert!(log.contains("/no/such/program"), "{log}");
    let stages: Vec<&str> = failure["stages"].as_array().into_iter().flatten().filter_map(|s| s["name"].as_str()).collect();
    assert!(stages.contains(&"mount the rootfs"), "{stages:?}");
    // While the pod is there it tells, and after it as well.
    let inspected: Value = serde_json::from_str(&said(&case.node, &["inspect", &missing.id])?)?;
    assert_eq!((&inspected["spec"]["id"], &inspected["failures"][0]), (&json!(pod.id), &failure));
    pod.remove_all().await?;
    for id in [&pod.id, &missing.id] {
        let account = said(&case.node, &["inspect", id])?;
        assert!(account.contains("FAILED TO  create the container") && account.contains(log.trim_end()), "{account}");
    }
    Ok(())
}

async fn versions_and_check(case: &Case) -> Result<()> {
    let version: Value = serde_json::from_str(&said(&case.node, &["version", "--json"])?)?;
    assert!(version.to_string().contains(&case.handler), "{version}");
    let check: Value = serde_json::from_str(&String::from_utf8(kuasarctl(&case.node, &["check", "--json"])?.stdout)?)?;
    let subjects: Vec<&str> = check.as_array().into_iter().flatten().filter_map(|entry| entry["subject"].as_str()).collect();
    assert!(subjects.contains(&"kernel") && subjects.contains(&"cgroups"), "{subjects:?}");
    // How the daemon and containerd were started counts, and not what this shell has.
    let mut check = command(&case.node)?;
    let output = check.args(["check", "--json"]).env("PATH", "/nowhere").env_remove("KUASAR_CONTAINERD").output()?;
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    for subject in ["kuasard", "configuration", "containerd", "containerd socket", &format!("containerd, {}", case.handler)] {
        let of = |finding: &&Value| finding["subject"] == subject;
        let finding = findings.iter().find(of).with_context(|| format!("no {subject} in {findings:?}"))?;
        let well = finding["status"] == "ok" || subject == "containerd" && finding["status"] == "warn";
        assert!(well, "{finding}");
    }
    assert!(output.status.success(), "pods run here, but: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

async fn without_a_daemon(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    node.kuasard.as_mut().context("the node has no kuasard")?.stop()?;
    for args in [&["ps"][..], &["inspect", "x"]] {
        let error = refused(&node, args)?;
        assert!(error.contains("kuasard.sock") && error.contains("not running"), "{error}");
    }
    node.stop().await
}

async fn containerd_takes_its_drop_in(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let (major, minor, patch) = node.containerd.version();
    let drop_in = said(&node, &["containerd-config", "--containerd-version", &format!("{major}.{minor}.{patch}")])?;
    let path = node.dir().join("drop-in.toml");
    std::fs::write(&path, &drop_in)?;
    // All that the harness had said about sandboxers goes; the drop-in is to say it.
    node.containerd.stop()?;
    let file = node.containerd.paths().config.clone();
    let mut config: toml::Table = std::fs::read_to_string(&file)?.parse()?;
    config.remove("proxy_plugins");
    config["imports"] = toml::Value::Array(vec![path.display().to_string().into()]);
    let runtimes = config["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"].as_table_mut();
    let runtimes = runtimes.context("the harness configures no runtimes")?;
    runtimes.retain(|name, _| name == "runc");
    std::fs::write(&file, toml::to_string(&config)?)?;
    node.containerd.start().await?;

    let handlers: Vec<String> = node.cri.handlers().await?.into_iter().map(|handler| handler.name).collect();
    ensure!(handlers.contains(&lone.handler), "{handlers:?} after\n{drop_in}");
    let pod = node.run_pod(lone.pod()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    assert_eq!(container.sh("echo on").await?.stdout(), "on\n");
    assert!(said(&node, &["ps", "--no-trunc"])?.contains(&pod.id), "it runs in kuasard");
    pod.remove_all().await?;
    node.stop().await
}
