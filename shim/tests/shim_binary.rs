//! containerd-shim-kuasar-v1 as containerd runs it.
// A helper that fails is a test that fails.
#![allow(clippy::unwrap_used)]

use std::{
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use containerd_shim_protos::{
    Task,
    api::{
        DeleteRequest, DeleteResponse, Empty, KillRequest, StateRequest, StateResponse, Status as TaskStatus, WaitRequest,
        WaitResponse,
    },
    create_task,
    protobuf::{Message, well_known_types::timestamp::Timestamp},
    shim::oci::Options,
    ttrpc::{self, Code, Server, TtrpcContext},
    types::introspection::RuntimeInfo,
};
use kuasar_shim::task::CLEAN_UP;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

/// A directory with the shim under a sandboxer's name, a configuration, and an OCI runtime of our own making.
struct Place {
    dir: tempfile::TempDir,
}

/// What the runtime in [`Place`] says it can do.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": ["ro", "rro"],
        "linux": { "namespaces": ["user"], "mountExtensions": { "idmap": { "enabled": true } } },
        "fromTheFuture": { "kept": true },
    })
}

impl Place {
    /// `features` is what the runtime prints for that command; `None` means that it does not know it.
    fn new(features: Option<&Value>) -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap() };
        symlink(env!("CARGO_BIN_EXE_containerd-shim-kuasar-v1"), place.path("containerd-shim-kuasar-test-v1")).unwrap();
        place.runtime("my-runc", features);
        let text = format!("[sandboxer.kuasar-test]\nkind = 'runc'\nruntime = '{}'\n", place.path("my-runc").display());
        std::fs::write(place.path("config.toml"), text).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes an OCI runtime.
    fn runtime(&self, name: &str, features: Option<&Value>) -> PathBuf {
        let path = self.path(name);
        let version = "--version) printf 'runc version 1.3.5\\nspec: 1.2.1\\n' ;;";
        let features = features.map(|features| format!("features) cat <<'END'\n{features}\nEND\n;;")).unwrap_or_default();
        let script =
            format!("#!/bin/sh\ncase \"$1\" in\n{version}\n{features}\n*) echo \"no such command: $1\" >&2; exit 1 ;;\nesac\n");
        // Written by another process: a file that this one has open for writing while another test forks cannot be executed.
        let mut child = Command::new("sh")
            .args(["-c", "cat > \"$0\" && chmod 755 \"$0\""])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
        path
    }

    fn shim(&self, arguments: &[&str], stdin: &[u8]) -> Output {
        self.shim_named("containerd-shim-kuasar-test-v1", arguments, stdin)
    }

    fn shim_named(&self, name: &str, arguments: &[&str], stdin: &[u8]) -> Output {
        let mut child = Command::new(self.path(name))
            .args(arguments)
            .env("KUASAR_CONFIG", self.path("config.toml"))
            .env_remove("KUASAR_RUNC")
            .current_dir(self.dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A shim that does not read its input has closed it by now.
        let _may_be_closed = child.stdin.take().unwrap().write_all(stdin);
        child.wait_with_output().unwrap()
    }

    fn info(&self, stdin: &[u8]) -> RuntimeInfo {
        let output = self.shim(&["-info"], stdin);
        assert!(output.status.success(), "{}", stderr(&output));
        RuntimeInfo::parse_from_bytes(&output.stdout).unwrap()
    }

    fn delete(&self, address: Option<&Path>) -> (DeleteResponse, String) {
        self.delete_of("c1", address)
    }

    fn delete_of(&self, id: &str, address: Option<&Path>) -> (DeleteResponse, String) {
        if let Some(address) = address {
            let text = json!({ "version": 3, "address": format!("unix://{}", address.display()), "protocol": "ttrpc" });
            std::fs::write(self.path("bootstrap.json"), text.to_string()).unwrap();
        }
        let bundle = self.dir.path().to_str().unwrap();
        let output = self.shim(
            &["-namespace", "k8s.io", "-address", "/c.sock", "-publish-binary", "/c", "-id", id, "-bundle", bundle, "delete"],
            b"",
        );
        assert!(output.status.success(), "{}", stderr(&output));
        (DeleteResponse::parse_from_bytes(&output.stdout).unwrap(), stderr(&output))
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runtime options as they come on standard input.
fn options(binary: &Path) -> Vec<u8> {
    let options = Options { binary_name: binary.to_str().unwrap().into(), ..Default::default() };
    let any =
        Any { type_url: "containerd.runc.v1.Options".into(), value: options.write_to_bytes().unwrap(), ..Default::default() };
    any.write_to_bytes().unwrap()
}

#[test]
fn info_passes_the_runtimes_features_on() {
    let place = Place::new(Some(&features()));
    let info = place.info(b"");
    assert_eq!(info.name, "io.containerd.kuasar-test.v1");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    assert_eq!(info.features.type_url, "types.containerd.io/opencontainers/runtime-spec/1/features/Features");
    assert_eq!(serde_json::from_slice::<Value>(&info.features.value).unwrap(), features());
    assert!(info.options.is_none());
}

#[test]
fn info_is_quick() {
    let place = Place::new(Some(&features()));
    let quickest = (0..5)
        .map(|_| {
            let start = Instant::now();
            place.info(b"");
            start.elapsed()
        })
        .min()
        .unwrap();
    assert!(quickest < Duration::from_millis(500), "{quickest:?}");
}

#[test]
fn info_asks_the_runtime_that_containerd_names() {
    let place = Place::new(None);
    let other = place.runtime("other", Some(&json!({ "ociVersionMin": "1.0.0", "mountOptions": ["other"] })));
    let stdin = options(&other);
    let info = place.info(&stdin);
    assert_eq!(
        serde_json::from_slice::<Value>(&info.features.value).unwrap(),
        json!({ "ociVersionMin": "1.0.0", "mountOptions": ["other"] })
    );
    assert_eq!(info.options.write_to_bytes().unwrap(), stdin);
}

#[test]
fn a_runtime_without_features_is_no_error() {
    // containerd takes a missing document for a fault when a pod asks for something.
    let nothing = json!({ "ociVersionMin": "1.0.0", "ociVersionMax": "1.0.2" });
    for told in [None, Some(json!("a string"))] {
        let info = Place::new(told.as_ref()).info(b"");
        assert_eq!(serde_json::from_slice::<Value>(&info.features.value).unwrap(), nothing);
    }
}

#[test]
fn info_of_machines_needs_no_runtime() {
    let place = Place::new(None);
    std::fs::write(place.path("config.toml"), "[sandboxer.kuasar-test]\nkind = 'vmm'\nhypervisor = 'qemu'\n").unwrap();
    let features: Value = serde_json::from_slice(&place.info(b"").features.value).unwrap();
    assert_eq!(features, kuasar_vmm::features());
    assert!(features["mountOptions"].as_array().unwrap().contains(&json!("rro")), "{features}");
}

#[test]
fn info_says_what_is_wrong() {
    let place = Place::new(Some(&features()));
    let fails = |output: Output, words: &str| {
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    };
    fails(place.shim(&["-info"], &options(Path::new("/nonexistent"))), "/nonexistent");
    fails(place.shim(&["-info"], &[0xff; 9]), "options");
    symlink(env!("CARGO_BIN_EXE_containerd-shim-kuasar-v1"), place.path("containerd-shim-kuasar-other-v1")).unwrap();
    fails(place.shim_named("containerd-shim-kuasar-other-v1", &["-info"], b""), "no sandboxer \"kuasar-other\"");
    std::fs::write(place.path("config.toml"), "[log]\nlevel = 3\nx = 1\n").unwrap();
    fails(place.shim(&["-info"], b""), "log.level");
}

#[test]
fn start_and_version_are_answered() {
    let place = Place::new(None);
    let output = place.shim(&["-namespace", "default", "-id", "x", "start"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("sandboxer = \"kuasar-test\"") && stderr(&output).contains("docs/containerd.md"));
    let output = place.shim(&["-v"], b"");
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains(env!("CARGO_PKG_VERSION")));
    let output = place.shim(&["-id", "x"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("no action"));
}

/// A daemon that knows one container.
struct Daemon {
    running: AtomicBool,
}

fn status(code: Code) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no"))
}

impl Task for Daemon {
    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        assert!(!self.running.load(Ordering::SeqCst), "a running container is not to be deleted");
        assert_eq!(request.id, "c1");
        let exited_at = Some(Timestamp::from(SystemTime::UNIX_EPOCH + Duration::from_secs(77))).into();
        Ok(DeleteResponse { pid: 4, exit_status: 3, exited_at, ..Default::default() })
    }

    fn state(&self, context: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let namespace = context.metadata.get("containerd-namespace-ttrpc").and_then(|values| values.first());
        assert_eq!(namespace.map(String::as_str), Some("k8s.io"));
        if request.id != "c1" {
            return Err(status(Code::NOT_FOUND));
        }
        assert!(context.metadata.contains_key(CLEAN_UP), "it is taken for containerd");
        let status = if self.running.load(Ordering::SeqCst) { TaskStatus::RUNNING } else { TaskStatus::STOPPED };
        Ok(StateResponse { id: request.id, pid: 4, status: status.into(), ..Default::default() })
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        assert_eq!((request.id.as_str(), request.signal, request.all), ("c1", 9, true));
        self.running.store(false, Ordering::SeqCst);
        Ok(Empty::default())
    }

    fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> ttrpc::Result<WaitResponse> {
        assert!(!self.running.load(Ordering::SeqCst), "it is waited for before it is killed");
        Ok(WaitResponse::default())
    }
}

fn serve(place: &Place, running: bool) -> (Server, PathBuf) {
    let socket = place.path("task.sock");
    let mut server = Server::new()
        .bind(&format!("unix://{}", socket.display()))
        .unwrap()
        .register_service(create_task(Arc::new(Daemon { running: running.into() })));
    server.start().unwrap();
    (server, socket)
}

#[test]
fn delete_tells_how_the_container_ended() {
    let place = Place::new(None);
    let (server, socket) = serve(&place, false);
    let (response, said) = place.delete(Some(&socket));
    assert_eq!((response.pid, response.exit_status, response.exited_at.seconds), (4, 3, 77));
    assert_eq!(said, "");
    let (response, said) = place.delete_of("c2", Some(&socket));
    assert_eq!((response.pid, response.exit_status, said.as_str()), (0, 255, ""), "the daemon does not know it");
    server.shutdown();
}

/// containerd has given it up, and another will be made in its place.
#[test]
fn delete_ends_a_running_container() {
    let place = Place::new(None);
    let (server, socket) = serve(&place, true);
    let (response, said) = place.delete(Some(&socket));
    assert_eq!((response.pid, response.exit_status, response.exited_at.seconds), (4, 3, 77));
    assert_eq!(said, "");
    server.shutdown();
}

#[test]
fn delete_without_a_daemon_says_that_nobody_knows() {
    let place = Place::new(None);
    let (response, said) = place.delete(None);
    assert_eq!((response.pid, response.exit_status), (0, 255));
    assert!(response.exited_at.seconds > 1_700_000_000);
    assert!(said.contains("bootstrap.json"), "{said}");
    let (response, said) = place.delete(Some(&place.path("gone.sock")));
    assert_eq!(response.exit_status, 255);
    assert!(said.contains("kuasard does not listen at"), "{said}");
}
