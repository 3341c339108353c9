//! kuasarctl as a user runs it.
// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used)]

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
};

use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use kuasar_shim::proto::admin::{
    ConsoleRequest, Document, ExecInput, ExecOutput, GcRequest, InspectRequest, ListRequest, SettingsRequest, Text,
    UpgradeRequest, VersionRequest, admin_server, exec_input, exec_output,
};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

/// A configuration in which nothing is written.
static EMPTY: LazyLock<PathBuf> = LazyLock::new(|| write(Path::new(env!("CARGO_TARGET_TMPDIR")), "empty.toml", ""));

/// kuasarctl with nothing of this machine's settings.
fn kuasarctl(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kuasarctl"));
    command.args(arguments).env("KUASAR_CONFIG", EMPTY.as_path()).env_remove("KUASAR_CONTAINERD");
    command
}

fn run(arguments: &[&str]) -> Output {
    kuasarctl(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What a command that works prints.
fn prints(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    stdout(&output)
}

/// What a command that fails says.
fn refuses(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", stdout(&output));
    stderr(&output)
}

fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn without_a_daemon_the_socket_and_the_remedy_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().to_str().unwrap();
    for command in [&["ps"][..], &["inspect", "x"], &["version"]] {
        let said = refuses(&[&["--state", state], command].concat());
        assert!(said.contains(&format!("nothing listens at {state}/kuasard.sock")) && said.contains("start it"), "{said}");
    }
    // What it knows by itself it tells all the same.
    let output = run(&["--state", state, "--json", "version"]);
    let version: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(version, json!({ "client": { "version": env!("CARGO_PKG_VERSION") } }));
}

#[test]
fn faults_of_the_configuration_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "c.toml", "[log]\nlevel = 'loud'\nmore = 1\n[sandboxer.x]\nkind = 'vm'\n");
    let path = path.to_str().unwrap();
    for command in [&["config"][..], &["containerd-config", "--containerd-version", "2.4.2"]] {
        let said = refuses(&[&["--config", path], command].concat());
        let lines: Vec<_> = said.lines().filter(|line| line.starts_with(path)).collect();
        assert_eq!(lines.len(), 3, "{said}");
        assert!(lines[0].starts_with(&format!("{path}:2: log.level:")), "{said}");
    }
    assert!(refuses(&["--config", "/nonexistent/c.toml", "config"]).contains("/nonexistent/c.toml: does not exist"));
}

#[test]
fn the_configuration_is_printed_as_understood() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "c.toml", "[sandboxer.fast]\nkind = 'runc'\nruntime = 'crun'\n");
    let printed: toml::Table = prints(&["--config", path.to_str().unwrap(), "config"]).parse().unwrap();
    assert_eq!(printed["sandboxer"]["fast"]["runtime"].as_str(), Some("crun"));
    assert_eq!(printed["log"]["level"].as_str(), Some("info"));
    let json: Value = serde_json::from_str(&prints(&["--config", path.to_str().unwrap(), "--json", "config"])).unwrap();
    assert_eq!(json["sandboxer"]["fast"]["runtime"], "crun");
    // The variable does what the option does.
    let output = kuasarctl(&["config"]).env("KUASAR_CONFIG", &path).output().unwrap();
    assert_eq!(stdout(&output).parse::<toml::Table>().unwrap(), printed);
}

#[test]
fn the_drop_in_follows_configuration_and_version() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "c.toml", "[sandboxer.fast]\nkind = 'runc'\nruntime = 'crun'\n");
    let arguments = ["--config", path.to_str().unwrap(), "--state", "/run/k", "containerd-config", "--containerd-version"];
    let drop_in: toml::Table = prints(&[&arguments[..], &["2.4.2"]].concat()).parse().unwrap();
    assert_eq!(drop_in["proxy_plugins"]["fast"]["address"].as_str(), Some("/run/k/kuasard.sock"));
    let runtimes = &drop_in["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"];
    assert_eq!(runtimes["fast"]["sandboxer"].as_str(), Some("fast"));
    let here = std::env::current_dir().unwrap();
    let drop_in: toml::Table = prints(&["--state", "k", "containerd-config", "--containerd-version", "2.4"]).parse().unwrap();
    let address = here.join("k/kuasard.sock").display().to_string();
    assert_eq!(drop_in["proxy_plugins"]["kuasar-runc"]["address"].as_str(), Some(address.as_str()));
    assert!(refuses(&[&arguments[..], &["1.7.24"]].concat()).contains("not possible yet"));
    let wrong = run(&[&arguments[..], &["latest"]].concat());
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("is not a version of containerd"), "{}", stderr(&wrong));
}

#[test]
fn the_drop_in_is_for_the_containerd_found() {
    let dir = tempfile::tempdir().unwrap();
    let containerd = dir.path().join("containerd");
    // Written by another process: a file that this one has open for writing while another test forks cannot be executed.
    let script = format!("printf '#!/bin/sh\\necho containerd x v2.1.9 y\\n' > {containerd:?} && chmod 755 {containerd:?}");
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let output = kuasarctl(&["containerd-config"]).env("KUASAR_CONTAINERD", &containerd).output().unwrap();
    assert!(stdout(&output).starts_with("# kuasar for containerd 2.1.9"), "{}", stderr(&output));
    let output = kuasarctl(&["containerd-config"]).env("KUASAR_CONTAINERD", "/nonexistent").output().unwrap();
    assert!(stderr(&output).contains("KUASAR_CONTAINERD names \"/nonexistent\""), "{}", stderr(&output));
}

#[test]
fn checks_are_told_in_both_forms() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "c.toml", "[log]\nlevel = 'loud'\n");
    let output = run(&["--config", path.to_str().unwrap(), "--json", "check"]);
    assert_eq!(output.status.code(), Some(1), "a broken configuration blocks every pod");
    let findings: Vec<Value> = serde_json::from_str(&stdout(&output)).unwrap();
    let finding = |subject: &str| findings.iter().find(|finding| finding["subject"] == subject).unwrap();
    assert_eq!(finding("configuration")["status"], "missing");
    assert_eq!(finding("configuration")["required"], true);
    assert!(finding("configuration")["detail"].as_str().unwrap().contains("log.level"));
    assert!(findings.iter().all(|finding| finding["status"] == "ok" || finding["remedy"].is_string()));
    assert!(stderr(&output).contains("configuration"));
    // Without a daemon no pod runs.
    let state = ["--state", dir.path().to_str().unwrap(), "--json", "check"];
    let output = run(&state);
    let findings: Vec<Value> = serde_json::from_str(&stdout(&output)).unwrap();
    let daemon = findings.iter().find(|finding| finding["subject"] == "kuasard").unwrap();
    assert_eq!((&daemon["status"], &daemon["required"]), (&json!("missing"), &json!(true)));
    assert_eq!(output.status.code(), Some(1));
    let table = stdout(&run(&["--config", path.to_str().unwrap(), "check"]));
    assert!(table.starts_with("STATUS") && table.contains("kernel"), "{table}");
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(prints(&["completions", shell]).contains("containerd-config"), "{shell}");
    }
}

/// A daemon that answers what it was asked.
struct Fake;

fn document(value: &Value) -> Result<Response<Document>, Status> {
    Ok(Response::new(Document { json: value.to_string() }))
}

/// A program that says its arguments, and then what it reads.
fn echo(asked: Streaming<ExecInput>) -> BoxStream<'static, Result<ExecOutput, Status>> {
    use exec_output::What;
    let answers = asked.flat_map(|asked| {
        let answers = match asked.ok().and_then(|asked| asked.what) {
            Some(exec_input::What::Program(program)) if program.id == "runc" => {
                vec![Err(Status::unimplemented("a program beside the containers is not supported: use crictl exec"))]
            }
            Some(exec_input::What::Program(program)) => {
                let said = format!("{} {:?} {:?}\n", program.namespace, program.args, program.terminal);
                let status = (!program.stdin).then_some(Ok(What::Status(130)));
                [Ok(What::Stderr(said.into_bytes()))].into_iter().chain(status).collect()
            }
            Some(exec_input::What::Stdin(bytes)) => vec![Ok(What::Stdout(bytes)), Ok(What::Taken(true))],
            Some(exec_input::What::StdinEnded(_)) => vec![Ok(What::Status(7))],
            _ => Vec::new(),
        };
        stream::iter(answers)
    });
    answers.map(|answer| answer.map(|what| ExecOutput { what: Some(what) })).boxed()
}

#[tonic::async_trait]
impl admin_server::Admin for Fake {
    type ExecStream = BoxStream<'static, Result<ExecOutput, Status>>;
    type ConsoleStream = BoxStream<'static, Result<Text, Status>>;

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Result<Response<Self::ExecStream>, Status> {
        Ok(Response::new(echo(request.into_inner())))
    }

    async fn console(&self, request: Request<ConsoleRequest>) -> Result<Response<Self::ConsoleStream>, Status> {
        let pieces = ["booted\n".to_owned(), format!("follow {}\n", request.into_inner().follow)];
        Ok(Response::new(stream::iter(pieces.map(|text| Ok(Text { text }))).boxed()))
    }

    async fn account(&self, _: Request<InspectRequest>) -> Result<Response<Document>, Status> {
        document(&json!([{ "title": "console", "text": "booted\n" }]))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<Document>, Status> {
        let time = json!({ "secs_since_epoch": 1, "nanos_since_epoch": 0 });
        let pod = json!({ "name": "web", "namespace": "shop", "uid": "u", "attempt": 0 });
        document(&json!([{
            "spec": { "namespace": request.into_inner().namespace, "id": "abc", "sandboxer": "kuasar-runc", "pod": pod },
            "state": "created",
            "created_at": time,
            "containers": [],
        }]))
    }

    async fn inspect(&self, request: Request<InspectRequest>) -> Result<Response<Document>, Status> {
        match request.into_inner().id.as_str() {
            "ab" => document(&json!({ "spec": { "id": "abc" } })),
            id => Err(Status::not_found(format!("sandbox or container {id:?} does not exist"))),
        }
    }

    async fn gc(&self, request: Request<GcRequest>) -> Result<Response<Document>, Status> {
        let dry_run = request.into_inner().dry_run;
        let unanswered = (!dry_run).then_some("nobody listens");
        document(&json!({ "dry_run": dry_run, "unanswered": unanswered, "collected": [] }))
    }

    async fn version(&self, _: Request<VersionRequest>) -> Result<Response<Document>, Status> {
        document(&json!({
            "version": "9.9.9",
            "pid": 42,
            "keeper_pid": 41,
            "upgrade": { "id": "7", "error": null },
            "sandboxers": {
                "kuasar-runc": { "technique": "runc 1.3.5" },
                "kuasar-qemu": { "technique": "unavailable", "unavailable": "no kernel for its guests" },
            },
        }))
    }

    async fn settings(&self, _: Request<SettingsRequest>) -> Result<Response<Document>, Status> {
        let none = std::env::temp_dir();
        let ready = json!({ "ready": { "technique": "runc 9.9.9", "features": null } });
        document(&json!({
            "version": "9.9.9",
            "pid": 42,
            "search_path": "/nowhere",
            "config": "/no/such/config.toml",
            "configuration": format!("[containerd]\naddress = '{}'\n", none.join("no-containerd.sock").display()),
            "sandboxers": { "kuasar-runc": ready, "kuasar-qemu": { "unavailable": "no kernel for its guests" } },
        }))
    }

    async fn upgrade(&self, request: Request<UpgradeRequest>) -> Result<Response<Document>, Status> {
        let binary = match request.into_inner().binary {
            binary if binary.ends_with("/none") => return Err(Status::invalid_argument("invalid binary: there is none")),
            binary if binary.is_empty() => "/usr/bin/kuasard".into(),
            binary => binary,
        };
        document(&json!({ "version": "9.9.8", "pid": 40, "id": "7", "binary": binary }))
    }
}

#[test]
fn the_daemon_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let listener = {
        let _inside = runtime.enter();
        UnixListener::bind(dir.path().join("kuasard.sock")).unwrap()
    };
    let service = admin_server::AdminServer::new(Fake);
    runtime.spawn(Server::builder().add_service(service).serve_with_incoming(UnixListenerStream::new(listener)));
    let state = ["--state", dir.path().to_str().unwrap()];
    let with = |rest: &[&str]| -> Vec<String> { state.iter().chain(rest).map(|text| (*text).to_owned()).collect() };
    let prints = |rest: &[&str]| prints(&with(rest).iter().map(String::as_str).collect::<Vec<_>>());
    let refuses = |rest: &[&str]| refuses(&with(rest).iter().map(String::as_str).collect::<Vec<_>>());

    let table = prints(&["ps", "-n", "k8s.io"]);
    assert!(table.contains("shop/web") && table.contains("k8s.io") && table.contains("created"), "{table}");
    let list: Value = serde_json::from_str(&prints(&["ps", "--json"])).unwrap();
    assert_eq!(list[0]["spec"]["id"], "abc");
    let one: Value = serde_json::from_str(&prints(&["inspect", "ab"])).unwrap();
    assert_eq!(one["spec"]["id"], "abc");
    assert_eq!(refuses(&["inspect", "zz"]), "kuasarctl: kuasard refused: sandbox or container \"zz\" does not exist\n");
    // What the daemon has and how it was started counts, and not what is on our search path.
    let output = run(&with(&["check", "--json"]).iter().map(String::as_str).collect::<Vec<_>>());
    let findings: Vec<Value> = serde_json::from_str(&stdout(&output)).unwrap();
    for (subject, status, required, words) in [
        ("kuasard", "ok", false, "9.9.9, process 42, listens at "),
        ("configuration", "warn", false, "the daemon goes by what it read before"),
        ("OCI runtime, kuasar-runc", "warn", false, "runc 9.9.9: does not tell what it can do"),
        ("OCI runtime, kuasar-qemu", "missing", false, "no kernel for its guests"),
        ("containerd", "missing", true, "not on the search path"),
        ("containerd socket", "missing", true, "no-containerd.sock"),
    ] {
        let of = |finding: &&Value| finding["subject"] == subject;
        let finding = findings.iter().find(of).unwrap_or_else(|| panic!("no {subject} in {findings:?}"));
        assert_eq!((&finding["status"], &finding["required"]), (&json!(status), &json!(required)), "{finding}");
        assert!(finding["detail"].as_str().unwrap().contains(words), "{finding}");
    }
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert_eq!(prints(&["gc", "--dry-run"]), "nothing to collect\n");
    assert_eq!(serde_json::from_str::<Value>(&prints(&["gc", "--dry-run", "--json"])).unwrap()["dry_run"], true);
    assert!(refuses(&["gc"]).contains("nobody listens"));
    let version = prints(&["version"]);
    assert!(version.contains("9.9.9 (keeper 41, worker 42)") && version.contains("runc 1.3.5"), "{version}");
    assert!(version.contains("unavailable: no kernel for its guests"), "{version}");
    let version: Value = serde_json::from_str(&prints(&["version", "--json"])).unwrap();
    assert_eq!(version["daemon"]["version"], "9.9.9");
    assert_eq!(prints(&["console", "ab"]), "booted\nfollow false\n");
    assert_eq!(prints(&["console", "--follow", "ab"]), "booted\nfollow true\n");
    assert_eq!(prints(&["logs", "--sandbox", "ab"]), "==> console <==\nbooted\n");
    let account: Value = serde_json::from_str(&prints(&["logs", "--sandbox", "--json", "ab"])).unwrap();
    assert_eq!(account[0]["title"], "console");
    let exec = |rest: &[&str], input: &[u8]| {
        let arguments = with(rest);
        let mut command = kuasarctl(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        command.env("TERM", "vt220").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // One that is given no input does not read it.
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    };
    let output = exec(&["exec", "-i", "-n", "k8s.io", "ab", "--", "cat", "-v", "--json"], &[b'x'; 200_000]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(7), 200_000));
    assert_eq!(stderr(&output), "k8s.io [\"cat\", \"-v\", \"--json\"] \"\"\n");
    let output = exec(&["exec", "-t", "ab", "sh"], b"");
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(130), " [\"sh\"] \"vt220\"\n"));
    let output = exec(&["exec", "runc", "sh"], b"");
    let refusal = "kuasarctl: kuasard refused: a program beside the containers is not supported: use crictl exec\n";
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(125), refusal));
    let upgraded = prints(&["upgrade"]);
    assert!(upgraded.starts_with("kuasard 9.9.8 (process 40) is now 9.9.9 (process 42), /usr/bin/kuasard,"), "{upgraded}");
    let upgraded: Value = serde_json::from_str(&prints(&["upgrade", "--json", "--binary", "/new"])).unwrap();
    assert_eq!(upgraded["before"]["binary"], "/new");
    assert_eq!(refuses(&["upgrade", "--binary", "/none"]), "kuasarctl: kuasard refused: invalid binary: there is none\n");
}
