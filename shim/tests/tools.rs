//! kuasarctl and the shim program against the daemon's real services.
// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod daemon;

use std::{
    io::Read,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use containerd_shim_protos::api::{DeleteResponse, StartRequest, StateRequest, WaitRequest};
use daemon::{Daemon, annotated, context, request, status};
use kuasar_sandboxers::fake::Behaviour;
use protobuf::Message;
use serde_json::{Value, json};
use ttrpc::Code;

/// Runs one of our programs beside the daemon and takes what it says. How it ends is not known: the daemon in this process reaps it.
async fn says(program: &'static str, arguments: Vec<String>) -> (Vec<u8>, String) {
    let run = move || {
        let mut child = Command::new(program)
            .args(arguments)
            .env_remove("KUASAR_CONFIG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let said = thread::spawn(move || {
            let mut said = String::new();
            stderr.read_to_string(&mut said).unwrap();
            said
        });
        let mut stdout = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
        let _reaped_by_the_daemon = child.wait();
        (stdout, said.join().unwrap())
    };
    tokio::task::spawn_blocking(run).await.unwrap()
}

async fn kuasarctl(daemon: &Daemon, arguments: &[&str]) -> (String, String) {
    let state = daemon.state();
    let all = ["--state", state.to_str().unwrap()].iter().chain(arguments).map(|text| (*text).to_owned()).collect();
    let (stdout, stderr) = says(env!("CARGO_BIN_EXE_kuasarctl"), all).await;
    (String::from_utf8(stdout).unwrap(), stderr)
}

#[tokio::test(flavor = "multi_thread")]
async fn kuasarctl_shows_what_the_daemon_has() {
    let daemon = Daemon::start().await;
    let (empty, _) = kuasarctl(&daemon, &["ps"]).await;
    assert_eq!(empty.lines().count(), 1, "{empty}");

    let _controller = daemon.pod("p1").await;
    let _controller = daemon.pod("p2").await;
    let task = daemon.task().await;
    let created = task.create(context(), &daemon.container("p1", "c1", &Behaviour::Run.process())).await.unwrap();
    task.start(context(), &StartRequest { id: "c1".into(), ..Default::default() }).await.unwrap();

    let (table, said) = kuasarctl(&daemon, &["ps"]).await;
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows.len(), 4, "{table}{said}");
    assert_eq!(rows[1][..5], ["p1", "pod", "p1", "fake", "ready"]);
    assert_eq!(rows[2], ["c1", "container", "running", &created.pid.to_string()]);
    assert_eq!(rows[3][..2], ["p2", "pod"]);
    let (other, _) = kuasarctl(&daemon, &["ps", "-n", "elsewhere"]).await;
    assert_eq!(other.lines().count(), 1, "{other}");
    let (list, _) = kuasarctl(&daemon, &["ps", "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&list).unwrap().as_array().unwrap().len(), 2);

    let (one, _) = kuasarctl(&daemon, &["inspect", "c"]).await;
    assert_eq!(serde_json::from_str::<Value>(&one).unwrap()["spec"]["id"], "p1");
    let (_, said) = kuasarctl(&daemon, &["inspect", "p"]).await;
    assert!(said.contains("fits 2 sandboxes"), "{said}");
    let (_, said) = kuasarctl(&daemon, &["inspect", "x"]).await;
    assert!(said.contains("\"x\" does not exist"), "{said}");
    let (version, _) = kuasarctl(&daemon, &["version"]).await;
    assert!(version.contains(&format!("(process {})", std::process::id())) && version.contains("fake"), "{version}");
}

#[tokio::test(flavor = "multi_thread")]
async fn kuasarctl_tells_why_a_start_failed() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let error = daemon.controller().await.create(request(annotated("lost", "fake/refuse"))).await.unwrap_err();
    let file = daemon.state().join("failures").read_dir().unwrap().next().unwrap().unwrap().path();
    assert!(error.message().ends_with(" (kuasarctl failures lost)"), "{error}");
    // The sandbox is gone; what there is to tell is not.
    for id in ["lost", "lo"] {
        let (account, said) = kuasarctl(&daemon, &["inspect", id]).await;
        for word in ["FAILED TO  create the sandbox", "make the fake sandbox  (failed)", file.to_str().unwrap()] {
            assert!(account.contains(word), "no {word:?} in {account}{said}");
        }
    }
    let (json, _) = kuasarctl(&daemon, &["inspect", "lost", "--json"]).await;
    let failure = &serde_json::from_str::<Value>(&json).unwrap()["failures"][0];
    assert_eq!((&failure["code"], &failure["container"]), (&json!("InvalidArgument"), &Value::Null));
    let (_, said) = kuasarctl(&daemon, &["inspect", "lost", "-n", "elsewhere"]).await;
    assert!(said.contains("does not exist"), "{said}");

    // Of a sandbox that is here they are a part.
    let task = daemon.task().await;
    task.create(context(), &daemon.container("p1", "c1", &Behaviour::FailToStart.process())).await.unwrap();
    let (code, text) = status(task.start(context(), &StartRequest { id: "c1".into(), ..Default::default() }).await);
    assert_eq!(code, Code::INTERNAL);
    assert!(text.contains("executable file not found (kuasarctl failures p1)"), "{text}");
    let (json, _) = kuasarctl(&daemon, &["inspect", "c1"]).await;
    let pod: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&pod["spec"]["id"], &pod["failures"][0]["container"]), (&json!("p1"), &json!("c1")));
    assert_eq!(pod["failures"][0]["log"]["program"], "fake");
    assert_eq!(pod["failures"].as_array().unwrap().len(), 1);
}

async fn delete(daemon: &Daemon, bundle: &str, id: &str) -> (DeleteResponse, String) {
    let address = format!("unix://{}", daemon.state().join("task.sock").display());
    let bootstrap = json!({ "version": 3, "address": address, "protocol": "ttrpc" });
    std::fs::write(Path::new(bundle).join("bootstrap.json"), bootstrap.to_string()).unwrap();
    let line = format!("-namespace k8s.io -address /c.sock -publish-binary /c -id {id} -bundle {bundle} delete");
    let arguments = line.split(' ').map(str::to_owned).collect();
    let (stdout, said) = says(env!("CARGO_BIN_EXE_containerd-shim-kuasar-v1"), arguments).await;
    (DeleteResponse::parse_from_bytes(&stdout).unwrap(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_containerd_has_given_up_is_told_of_and_ended() {
    let daemon = Daemon::start().await;
    let _controller = daemon.pod("p1").await;
    let task = daemon.task().await;
    let created = daemon.container("p1", "c1", &Behaviour::Exit(7).process());
    let pid = task.create(context(), &created).await.unwrap().pid;

    // Prepared, never started: another is to take its place.
    let (response, said) = delete(&daemon, &created.bundle, "c1").await;
    assert_eq!((response.pid, response.exit_status), (pid, 137), "{said}");
    let state = StateRequest { id: "c1".into(), ..Default::default() };
    assert_eq!(status(task.state(context(), &state).await).0, Code::NOT_FOUND);
    let created = daemon.container("p1", "c1", &Behaviour::Exit(7).process());
    let pid = task.create(context(), &created).await.unwrap().pid;

    // Ended: it is told how, and released.
    task.start(context(), &StartRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    let exit = task.wait(context(), &WaitRequest { id: "c1".into(), ..Default::default() }).await.unwrap();
    let (response, said) = delete(&daemon, &created.bundle, "c1").await;
    assert_eq!((response.pid, response.exit_status, &response.exited_at), (pid, 7, &exit.exited_at), "{said}");
    assert_eq!(status(task.state(context(), &state).await).0, Code::NOT_FOUND);
    let (response, said) = delete(&daemon, &created.bundle, "c1").await;
    assert_eq!((response.pid, response.exit_status, said.as_str()), (0, 255, ""));
}
