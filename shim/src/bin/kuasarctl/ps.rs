//! `kuasarctl ps`: pods and their containers.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use kuasar_sandboxers::{
    lifecycle::{ProcessState, SandboxState},
    types::PodMetadata,
};
use serde::Deserialize;
use serde_json::Value;

use crate::table;

/// What is shown of the daemon's answer; the rest of it is for `--json` and `inspect`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Sandbox {
    Live { spec: Box<Spec>, state: SandboxState, created_at: SystemTime, containers: Vec<Container> },
    Other { spec: Named, state: Other },
}

#[derive(Debug, Deserialize)]
struct Named {
    namespace: String,
    id: String,
}

/// States that no sandbox has which is looked after.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Other {
    SetAside { why: String, processes: Option<Vec<u32>>, unknown: Option<String> },
}

#[derive(Debug, Deserialize)]
struct Spec {
    namespace: String,
    id: String,
    sandboxer: String,
    pod: PodMetadata,
}

#[derive(Debug, Deserialize)]
struct Container {
    id: String,
    init: Process,
}

#[derive(Debug, Deserialize)]
struct Process {
    state: ProcessState,
    node_pid: Option<u32>,
}

/// The table of everything the daemon runs.
pub(crate) fn render(list: &Value, full_ids: bool, now: SystemTime) -> Result<String> {
    let sandboxes = Vec::<Sandbox>::deserialize(list).context("kuasard's list is of another form; is it another version?")?;
    let short = |id: &str| table::short(id, full_ids);
    let mut rows = Vec::new();
    let mut aside = Vec::new();
    for sandbox in sandboxes {
        let (spec, state, created_at, containers) = match sandbox {
            Sandbox::Live { spec, state, created_at, containers } => (spec, state, created_at, containers),
            Sandbox::Other { spec, state } => {
                aside.push(set_aside(&short(&spec.id), spec.namespace, state));
                continue;
            }
        };
        let pod = match (spec.pod.namespace.as_str(), spec.pod.name.as_str()) {
            ("", name) => name.to_owned(),
            (namespace, name) => format!("{namespace}/{name}"),
        };
        let age = now.duration_since(created_at).map_or_else(|_| "-".to_owned(), age);
        let (state, pid) = sandbox_state(state);
        rows.push(vec![short(&spec.id), "pod".into(), pod, spec.sandboxer, state, pid, age, spec.namespace]);
        for container in containers {
            let (state, mut pid) = process_state(container.init.state);
            // Its processes are another kernel's: on the node there is the VMM alone, for all of the pod's containers.
            if let Some(vmm) = container.init.node_pid.filter(|_| pid != NONE) {
                pid = format!("{vmm} (VM)");
            }
            let empty = String::new;
            rows.push(vec![format!("  {}", short(&container.id)), "container".into(), empty(), empty(), state, pid]);
        }
    }
    let mut text = table::render(&["ID", "KIND", "POD", "SANDBOXER", "STATE", "PID", "AGE", "NAMESPACE"], &rows);
    if !aside.is_empty() {
        text.push_str("\nNobody looks after these; kuasarctl check tells what to do:\n");
        text.push_str(&table::render(&["ID", "STATE", "NAMESPACE", "PROCESSES", "WHY"], &aside));
    }
    Ok(text)
}

fn set_aside(id: &str, namespace: String, state: Other) -> Vec<String> {
    let Other::SetAside { why, processes, unknown } = state;
    let processes = match (processes, unknown) {
        (Some(pids), _) => table::pids(&pids),
        (None, why) => why.unwrap_or_else(|| "?".to_owned()),
    };
    vec![id.to_owned(), "set aside".to_owned(), namespace, processes, why]
}

fn sandbox_state(state: SandboxState) -> (String, String) {
    let (word, pid) = match state {
        SandboxState::Created => ("created", None),
        SandboxState::Starting => ("starting", None),
        SandboxState::Ready { pid, .. } => ("ready", pid),
        SandboxState::Stopping => ("stopping", None),
        SandboxState::Stopped { .. } => ("stopped", None),
    };
    (word.to_owned(), shown(pid))
}

fn process_state(state: ProcessState) -> (String, String) {
    match state {
        ProcessState::Created { pid } => ("created".to_owned(), shown(pid)),
        ProcessState::Running { pid } => ("running".to_owned(), shown(Some(pid))),
        ProcessState::Paused { pid } => ("paused".to_owned(), shown(Some(pid))),
        ProcessState::Stopped { exit, .. } => (format!("exited ({})", exit.status), shown(None)),
    }
}

/// Where there is no pid.
const NONE: &str = "-";

fn shown(pid: Option<u32>) -> String {
    pid.filter(|pid| *pid != 0).map_or_else(|| NONE.to_owned(), |pid| pid.to_string())
}

/// The largest unit that is not zero.
pub(crate) fn age(age: Duration) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let seconds = age.as_secs();
    let unit = UNITS.iter().find(|(size, _)| seconds >= *size);
    unit.map_or_else(|| "0s".to_owned(), |(size, name)| format!("{}{name}", seconds / size))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pods_stand_above_their_containers() {
        let time = json!({ "secs_since_epoch": 1000, "nanos_since_epoch": 0 });
        let container =
            |id: &str, state: Value| json!({ "id": id, "bundle": "/b", "init": { "exec": null, "state": state }, "execs": [] });
        let pod = json!({ "name": "web-0", "namespace": "shop", "uid": "u", "attempt": 0 });
        let list = json!([{
            "spec": { "namespace": "k8s.io", "id": "0123456789abcdef", "sandboxer": "kuasar-runc", "pod": pod },
            "state": { "ready": { "pid": null, "since": time } },
            "created_at": time,
            "technique": "runc 1.3.5",
            "containers": [
                container("c1", json!({ "running": { "pid": 42 } })),
                container("c2", json!({ "stopped": { "pid": 43, "exit": { "status": 137, "at": time } } })),
            ],
        }]);
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + 7300);
        let text = render(&list, false, now).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["0123456789abc", "pod", "shop/web-0", "kuasar-runc", "ready", "-", "2h", "k8s.io"]);
        assert_eq!(lines[2], ["c1", "container", "running", "42"]);
        assert_eq!(lines[3], ["c2", "container", "exited", "(137)", "-"]);
        assert!(render(&list, true, now).unwrap().contains("0123456789abcdef"));
        let mut in_vm = list;
        for container in [0, 1] {
            in_vm[0]["containers"][container]["init"]["node_pid"] = 4711.into();
        }
        let text = render(&in_vm, false, now).unwrap();
        assert!(text.contains("running       4711 (VM)") && text.matches("(VM)").count() == 1, "{text}");
    }

    #[test]
    fn what_was_set_aside_stands_below() {
        let aside = |processes: Value| {
            let state =
                json!({ "set_aside": { "why": "it is empty", "directory": "/d", "processes": processes, "unknown": null } });
            json!({ "spec": { "namespace": "k8s.io", "id": "0123456789abcdef" }, "state": state, "containers": [] })
        };
        let text = render(&json!([aside(json!([7, 8])), aside(json!([]))]), false, SystemTime::now()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[2], "Nobody looks after these; kuasarctl check tells what to do:");
        let words: Vec<&str> = lines[4].split_whitespace().collect();
        assert_eq!(words, ["0123456789abc", "set", "aside", "k8s.io", "7,8", "it", "is", "empty"]);
        assert!(lines[5].contains("k8s.io     none"), "{text}");
    }

    #[test]
    fn another_form_is_an_error() {
        assert!(render(&json!([{ "spec": 1 }]), false, SystemTime::now()).unwrap_err().to_string().contains("another version"));
        assert_eq!(render(&json!([]), false, SystemTime::now()).unwrap().lines().count(), 1);
    }
}
