//! What containerd would never send, or sends only without CRI: straight to kuasard's sockets, with real containers behind.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CreateTaskRequest, DeleteRequest, KillRequest, Mount, StartRequest, StateRequest,
    Status as TaskStatus, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::TaskClient;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use kuasar_shim::proto::sandbox::controller_client::ControllerClient;
use kuasar_shim::proto::sandbox::{
    ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest, ControllerStatusRequest, ControllerStopRequest,
};
use kuasar_shim::server::{CONTROL_SOCKET, TASK_SOCKET};
use kuasar_tests::cri::k8s_cri::v1::PodSandboxConfig;
use kuasar_tests::hung::{self, Hung};
use kuasar_tests::leak::census::running;
use kuasar_tests::{Node, PodSpec, process, tools};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Uri};
use ttrpc::r#async::Client;
use ttrpc::asynchronous::transport::Socket;

use crate::devices::LoopDevice;
use crate::suite::{Case, Entry, cases, eventually};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Ours Shared:
        the_controllers_codes,
        a_network_namespace_that_is_none,
        specs_that_are_none,
        a_fifo_that_has_gone,
        a_root_file_system_that_cannot_be_mounted,
        the_task_services_codes,
        a_client_that_hangs_up,
        logs_to_files_and_programs,
        a_hung_log_stops_nobody,
    ]
}

/// Not CRI's: there a sandbox that containerd's store does not have would be taken for forgotten.
const NAMESPACE: &str = "e2e";
const LIMIT: Duration = Duration::from_secs(30);

/// A client of kuasard that speaks as containerd does.
struct Direct<'a> {
    case: &'a Case,
    state: PathBuf,
    controller: ControllerClient<Channel>,
    task: TaskClient,
    pods: Mutex<Vec<String>>,
}

/// Runs `body` with a client, and takes away its pods.
async fn with<'a>(case: &'a Case, body: impl for<'b> FnOnce(&'b Direct<'a>) -> BoxFuture<'b, Result<()>>) -> Result<()> {
    let direct = Direct::new(case).await?;
    let result = std::panic::AssertUnwindSafe(body(&direct)).catch_unwind().await;
    let pods = std::mem::take(&mut *direct.pods.lock().map_err(|_| anyhow::anyhow!("poisoned"))?);
    for pod in pods {
        direct.remove(&pod).await?;
    }
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("containerd-namespace", tonic::metadata::MetadataValue::from_static(NAMESPACE));
    request
}

fn context() -> ttrpc::context::Context {
    context_in(NAMESPACE)
}

fn context_in(namespace: &str) -> ttrpc::context::Context {
    let mut context = ttrpc::context::with_duration(LIMIT);
    context.add("containerd-namespace-ttrpc".to_owned(), namespace.to_owned());
    context
}

/// Code and message of a call that must fail.
fn refusal<T>(result: ttrpc::Result<T>) -> Result<(ttrpc::Code, String)> {
    match result {
        Ok(_) => bail!("it was accepted"),
        Err(ttrpc::Error::RpcStatus(status)) => Ok((status.code(), status.message().to_owned())),
        Err(error) => bail!("no answer: {error}"),
    }
}

async fn connect(state: &Path) -> Result<TaskClient> {
    let stream = UnixStream::connect(state.join(TASK_SOCKET)).await?;
    Ok(TaskClient::new(Client::new(Socket::new(stream))))
}

async fn dial(state: &Path) -> Result<ControllerClient<Channel>> {
    let socket = state.join(CONTROL_SOCKET);
    let dial = move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    let channel = Endpoint::from_static("http://kuasard").connect_with_connector(tower::service_fn(dial)).await?;
    Ok(ControllerClient::new(channel))
}

/// A Create request for a pod.
fn wanted(id: &str, sandboxer: &str, config: &PodSandboxConfig) -> ControllerCreateRequest {
    let options = prost_types::Any { type_url: "runtime.v1.PodSandboxConfig".to_owned(), value: config.encode_to_vec() };
    ControllerCreateRequest {
        sandbox_id: id.to_owned(),
        options: Some(options),
        sandboxer: sandboxer.to_owned(),
        ..Default::default()
    }
}

/// Makes and removes a pod in the namespace of these cases, whose directories kuasard keeps from then on.
pub(crate) async fn first(node: &Node, handler: &str) -> Result<()> {
    let state = node.kuasard.as_ref().context("the node has no kuasard")?.state();
    let mut controller = dial(state).await?;
    let id = format!("first-{handler}");
    controller.create(request(wanted(&id, handler, &PodSpec::new("first").host_network().config))).await?;
    controller.start(request(ControllerStartRequest { sandbox_id: id.clone(), ..Default::default() })).await?;
    controller.stop(request(ControllerStopRequest { sandbox_id: id.clone(), ..Default::default() })).await?;
    controller.shutdown(request(ControllerShutdownRequest { sandbox_id: id, ..Default::default() })).await?;
    Ok(())
}

impl<'a> Direct<'a> {
    async fn new(case: &'a Case) -> Result<Self> {
        let state = case.node.kuasard.as_ref().context("the node has no kuasard")?.state().to_path_buf();
        let controller = dial(&state).await?;
        let task = connect(&state).await?;
        Ok(Self { case, state, controller, task, pods: Mutex::default() })
    }

    /// An id of this case, which is looked for afterwards.
    fn id(&self, word: &str) -> String {
        let id = format!("{word}-{}-{}", self.case.handler, std::process::id());
        self.case.remember(&id);
        id
    }

    fn controller(&self) -> ControllerClient<Channel> {
        self.controller.clone()
    }

    /// A Create request for a pod with the node's network.
    fn wanted(&self, id: &str) -> ControllerCreateRequest {
        self.wanted_as(id, self.case.spec().host_network().config)
    }

    fn wanted_as(&self, id: &str, config: PodSandboxConfig) -> ControllerCreateRequest {
        wanted(id, &self.case.handler, &config)
    }

    async fn start(&self, id: &str) -> Result<(), tonic::Status> {
        let start = ControllerStartRequest { sandbox_id: id.to_owned(), ..Default::default() };
        self.controller().start(request(start)).await.map(drop)
    }

    /// A pod that is ready.
    async fn pod(&self, word: &str) -> Result<String> {
        let id = self.id(word);
        if let Ok(mut pods) = self.pods.lock() {
            pods.push(id.clone());
        }
        self.controller().create(request(self.wanted(&id))).await?;
        self.start(&id).await?;
        Ok(id)
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let not_there = |status: &tonic::Status| status.code() == Code::NotFound;
        let stop = ControllerStopRequest { sandbox_id: id.to_owned(), ..Default::default() };
        let shutdown = ControllerShutdownRequest { sandbox_id: id.to_owned(), ..Default::default() };
        let results = [
            self.controller().stop(request(stop)).await.map(drop),
            self.controller().shutdown(request(shutdown)).await.map(drop),
        ];
        results.into_iter().find(|result| result.as_ref().is_err_and(|status| !not_there(status))).unwrap_or(Ok(()))?;
        Ok(())
    }

    /// A bundle with any text for its spec, and the request for it.
    fn bundle(&self, pod: &str, id: &str, config: &str) -> Result<CreateTaskRequest> {
        let bundle = self.case.dir().join(id);
        let bin = bundle.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        fs::create_dir_all(bundle.join("rootfs/proc"))?;
        fs::copy(tools::busybox()?, bin.join("sh"))?;
        fs::set_permissions(bin.join("sh"), fs::Permissions::from_mode(0o755))?;
        fs::write(bundle.join("config.json"), config)?;
        fs::write(bundle.join("sandbox"), pod)?;
        Ok(CreateTaskRequest { id: id.to_owned(), bundle: bundle.display().to_string(), ..Default::default() })
    }

    /// The request for a container that runs a shell script.
    fn container(&self, pod: &str, id: &str, script: &str) -> Result<CreateTaskRequest> {
        self.bundle(pod, id, &self.spec(id, script).to_string())
    }

    fn spec(&self, id: &str, script: &str) -> Value {
        let namespace = |kind: &str| json!({ "type": kind, "path": format!("/proc/0/ns/{kind}") });
        json!({
            "ociVersion": "1.2.0",
            "process": { "args": ["/bin/sh", "-c", script], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"] },
            "root": { "path": "rootfs" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] },
            ],
            "linux": {
                "cgroupsPath": format!("{}/{id}", self.case.node.cgroup_parent()),
                "namespaces": [{ "type": "pid" }, { "type": "mount" }, namespace("ipc"), namespace("uts"), namespace("network")],
            },
        })
    }

    async fn create_refused(&self, wanted: &CreateTaskRequest) -> Result<(ttrpc::Code, String)> {
        let refused = refusal(self.task.create(context(), wanted).await)?;
        let state = StateRequest { id: wanted.id.clone(), ..Default::default() };
        ensure!(refusal(self.task.state(context(), &state).await)?.0 == ttrpc::Code::NOT_FOUND, "{} exists", wanted.id);
        Ok(refused)
    }

    async fn wait(&self, id: &str) -> Result<WaitResponse> {
        Ok(self.task.wait(context(), &WaitRequest { id: id.to_owned(), ..Default::default() }).await?)
    }

    async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        self.task.start(context(), &StartRequest { id: id.to_owned(), ..Default::default() }).await.map(drop)
    }

    async fn kill(&self, id: &str) -> ttrpc::Result<()> {
        self.task.kill(context(), &KillRequest { id: id.to_owned(), signal: 9, ..Default::default() }).await.map(drop)
    }

    async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        self.task.delete(context(), &DeleteRequest { id: id.to_owned(), ..Default::default() }).await.map(drop)
    }
}

async fn the_controllers_codes(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let mut controller = direct.controller();
            let id = direct.pod("controller").await?;
            let twice = controller.create(request(direct.wanted(&id))).await.unwrap_err();
            assert_eq!(twice.code(), Code::AlreadyExists, "{twice}");
            let twice = direct.start(&id).await.unwrap_err();
            assert_eq!(twice.code(), Code::FailedPrecondition, "{twice}");
            let unknown = direct.start("never-created").await.unwrap_err();
            assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
            let status = ControllerStatusRequest { sandbox_id: "never-created".to_owned(), ..Default::default() };
            assert_eq!(controller.status(request(status)).await.unwrap_err().code(), Code::NotFound);

            let other = ControllerCreateRequest { sandboxer: "no-such".to_owned(), ..direct.wanted(&direct.id("other")) };
            let unknown = controller.create(request(other)).await.unwrap_err();
            assert_eq!(unknown.code(), Code::InvalidArgument, "{unknown}");
            assert!(unknown.message().contains("no-such") && unknown.message().contains(&direct.case.handler), "{unknown}");
            let bare = ControllerCreateRequest { options: None, ..direct.wanted(&direct.id("bare")) };
            assert_eq!(controller.create(request(bare)).await.unwrap_err().code(), Code::InvalidArgument);
            let long = "x".repeat(300);
            for hostile in ["", ".", "..", "a/b", "../../etc", "a\0b", "a b", &long] {
                let error = controller.create(request(direct.wanted(hostile))).await.unwrap_err();
                assert_eq!(error.code(), Code::InvalidArgument, "{hostile:?}: {error}");
            }
            direct.remove(&id).await?;
            let gone = direct.start(&id).await.unwrap_err();
            assert_eq!(gone.code(), Code::NotFound, "{gone}");
            Ok(())
        }
        .boxed()
    })
    .await
}

async fn a_network_namespace_that_is_none(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let file = direct.case.dir().join("file");
            fs::write(&file, "")?;
            let missing = direct.case.dir().join("missing");
            let other = PathBuf::from("/proc/self/ns/uts");
            for (number, path) in [&file, &missing, &other].into_iter().enumerate() {
                let id = direct.id(&format!("netns-{number}"));
                let spec = direct.case.spec();
                let wanted =
                    ControllerCreateRequest { netns_path: path.display().to_string(), ..direct.wanted_as(&id, spec.config) };
                let result = match direct.controller().create(request(wanted)).await {
                    Ok(_) => direct.start(&id).await,
                    Err(status) => Err(status),
                };
                let error = result.unwrap_err();
                assert_eq!(error.code(), Code::InvalidArgument, "{error}");
                assert!(error.message().contains(&path.display().to_string()), "{error}");
                assert!(error.message().contains("netns"), "{error}");
                // containerd calls nothing after a failed Start: what had been made must be gone as it is.
                direct.remove(&id).await?;
            }
            Ok(())
        }
        .boxed()
    })
    .await
}

async fn specs_that_are_none(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let pod = direct.pod("specs").await?;
            let id = direct.id("spec");
            let whole = direct.spec(&id, "true");
            let without = |field: &str| {
                let mut spec = whole.clone();
                spec.as_object_mut().map(|spec| spec.remove(field));
                spec.to_string()
            };
            let broken = [
                ("{ not json".to_owned(), "JSON"),
                ("[]".to_owned(), "process"),
                (without("process"), "process"),
                (without("root"), "root"),
            ];
            for (config, word) in broken {
                let (code, text) = direct.create_refused(&direct.bundle(&pod, &id, &config)?).await?;
                assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{text}");
                assert!(text.contains(word), "no {word:?} in {text}");
            }
            let wanted = direct.container(&pod, &id, "true")?;
            fs::remove_file(Path::new(&wanted.bundle).join("config.json"))?;
            let (code, text) = direct.create_refused(&wanted).await?;
            assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{text}");
            assert!(text.contains("config.json"), "{text}");
            // A program that does not exist: in the runtime's own words.
            let mut spec = whole.clone();
            spec["process"]["args"][0] = "/no/such/program".into();
            let (_, text) = direct.create_refused(&direct.bundle(&pod, &id, &spec.to_string())?).await?;
            assert!(text.contains("/no/such/program"), "{text}");
            // After all that the id is free.
            direct.task.create(context(), &direct.container(&pod, &id, "exit 3")?).await?;
            direct.start_container(&id).await?;
            assert_eq!(direct.wait(&id).await?.exit_status, 3);
            direct.delete(&id).await?;
            Ok(())
        }
        .boxed()
    })
    .await
}

async fn a_fifo_that_has_gone(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let pod = direct.pod("fifo").await?;
            let id = direct.id("reader");
            let gone = direct.case.dir().join("gone").display().to_string();
            for field in ["stdin", "stdout", "stderr"] {
                let mut wanted = direct.container(&pod, &id, "true")?;
                match field {
                    "stdin" => wanted.stdin.clone_from(&gone),
                    "stdout" => wanted.stdout.clone_from(&gone),
                    _ => wanted.stderr.clone_from(&gone),
                }
                let (code, text) = direct.create_refused(&wanted).await?;
                assert!([ttrpc::Code::INVALID_ARGUMENT, ttrpc::Code::NOT_FOUND].contains(&code), "{code:?}: {text}");
                assert!(text.contains(field) && text.contains(&gone), "{text}");
            }
            Ok(())
        }
        .boxed()
    })
    .await
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    Mount { type_: kind.to_owned(), source: source.to_owned(), options, ..Default::default() }
}

async fn a_root_file_system_that_cannot_be_mounted(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let pod = direct.pod("rootfs").await?;
            let id = direct.id("mounted");
            let missing = direct.case.dir().join("missing").display().to_string();
            let lower = direct.case.dir().join("lower");
            fs::create_dir_all(&lower)?;
            let lowerdir = format!("lowerdir={}:{missing}", lower.display());
            let broken = [
                (vec![mount("no-such-fs", "none", &[])], "no-such-fs"),
                (vec![mount("bind", &missing, &["rbind", "ro"])], missing.as_str()),
                (vec![mount("overlay", "overlay", &[&lowerdir])], missing.as_str()),
                // The first succeeds and must be undone.
                (vec![mount("tmpfs", "tmpfs", &[]), mount("tmpfs", "tmpfs", &["size=nonsense"])], "tmpfs"),
            ];
            for (mounts, word) in broken {
                let mut wanted = direct.container(&pod, &id, "true")?;
                wanted.rootfs = mounts;
                let (code, text) = direct.create_refused(&wanted).await?;
                assert!(text.contains(word), "{code:?}: no {word:?} in {text}");
                assert!(text.contains("mount"), "{text}");
            }
            Ok(())
        }
        .boxed()
    })
    .await
}

/// As a snapshotter with block devices gives it, in a pod of CRI's, for a machine wants a network.
pub(crate) async fn a_root_file_system_on_a_disk(case: &Case) -> Result<()> {
    if process::run(Command::new("losetup").arg("--find")).is_err() {
        return case.skip("no loop device is free, or no losetup");
    }
    let pod = case.pod().await?;
    let direct = Direct::new(case).await?;
    let cri = || context_in("k8s.io");
    let id = direct.id("on-disk");
    let mut wanted = direct.container(
        &pod.id,
        &id,
        "while read -r a b c d; do [ $b = / ] && echo $a $c; done < /proc/mounts; echo on >/left; exit 4",
    )?;
    let log = case.dir().join("log");
    wanted.stdout = format!("file://{}", log.display());
    wanted.stderr.clone_from(&wanted.stdout);
    let image = case.dir().join("image");
    let tree = Path::new(&wanted.bundle).join("rootfs");
    process::run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("16M"))?;
    fs::remove_dir_all(&tree)?;
    let disk = LoopDevice::over(&image)?;
    wanted.rootfs = vec![mount("ext4", &disk.0.display().to_string(), &[])];

    direct.task.create(cri(), &wanted).await?;
    direct.task.start(cri(), &StartRequest { id: id.clone(), ..Default::default() }).await?;
    let ended = direct.task.wait(cri(), &WaitRequest { id: id.clone(), ..Default::default() }).await?;
    direct.task.delete(cri(), &DeleteRequest { id: id.clone(), ..Default::default() }).await?;
    let said = fs::read_to_string(&log)?;
    assert_eq!((ended.exit_status, said.as_str()), (4, "/dev/vda ext4\n"));
    // The guest has let go of it, with all that was written.
    drop(disk);
    let left = process::run(Command::new("debugfs").args(["-R", "cat /left"]).arg(&image))?;
    assert_eq!(left, "on\n");
    Ok(())
}

async fn the_task_services_codes(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let pod = direct.pod("task").await?;
            let id = direct.id("codes");
            let early = refusal(direct.start_container(&id).await)?;
            assert_eq!(early.0, ttrpc::Code::NOT_FOUND, "{}", early.1);
            let orphan = refusal(direct.task.create(context(), &direct.container("no-such-pod", &id, "true")?).await)?;
            assert_eq!(orphan.0, ttrpc::Code::NOT_FOUND, "{}", orphan.1);

            let wanted = direct.container(&pod, &id, "while :; do sleep 1; done")?;
            direct.task.create(context(), &wanted).await?;
            let twice = refusal(direct.task.create(context(), &wanted).await)?;
            assert_eq!(twice.0, ttrpc::Code::ALREADY_EXISTS, "{}", twice.1);
            direct.start_container(&id).await?;
            let twice = refusal(direct.start_container(&id).await)?;
            assert_eq!(twice.0, ttrpc::Code::FAILED_PRECONDITION, "{}", twice.1);
            let running = refusal(direct.delete(&id).await)?;
            assert_eq!(running.0, ttrpc::Code::FAILED_PRECONDITION, "{}", running.1);
            let checkpoint = CheckpointTaskRequest { id: id.clone(), ..Default::default() };
            let refused = refusal(direct.task.checkpoint(context(), &checkpoint).await)?;
            assert_eq!(refused.0, ttrpc::Code::UNIMPLEMENTED, "{}", refused.1);
            let state = direct.task.state(context(), &StateRequest { id: id.clone(), ..Default::default() }).await?;
            assert_eq!(state.status.enum_value_or_default(), TaskStatus::RUNNING);
            direct.kill(&id).await?;
            assert_eq!(direct.wait(&id).await?.exit_status, 137);
            direct.delete(&id).await?;
            let gone = refusal(direct.delete(&id).await)?;
            assert_eq!(gone.0, ttrpc::Code::NOT_FOUND, "{}", gone.1);
            for hostile in ["a/b", "..", "a\0b", &"x".repeat(300)] {
                let mut wanted = wanted.clone();
                hostile.clone_into(&mut wanted.id);
                let refused = refusal(direct.task.create(context(), &wanted).await)?;
                assert_eq!(refused.0, ttrpc::Code::INVALID_ARGUMENT, "{hostile:?}: {}", refused.1);
            }
            Ok(())
        }
        .boxed()
    })
    .await
}

async fn a_client_that_hangs_up(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let pod = direct.pod("hanging-up").await?;
            for round in 0..8_u64 {
                let id = direct.id(&format!("cut-{round}"));
                let wanted = direct.container(&pod, &id, "while :; do sleep 1; done")?;
                let client = connect(&direct.state).await?;
                let call = client.create(context(), &wanted);
                // Each round in another moment; the connection goes with the client.
                let cut = tokio::time::timeout(Duration::from_millis(6 * round), call).await;
                drop((cut, client));
                // What has begun ends. Whoever asks for the same meanwhile, or later, is told so.
                let again = direct.task.create(context(), &wanted).await;
                if again.is_err() {
                    assert_eq!(refusal(again)?.0, ttrpc::Code::ALREADY_EXISTS);
                }
                eventually("the container to be there", || async {
                    let state = StateRequest { id: id.clone(), ..Default::default() };
                    Ok(direct.task.state(context(), &state).await.is_ok())
                })
                .await?;
                direct.start_container(&id).await?;
                direct.kill(&id).await?;
                direct.wait(&id).await?;
                direct.delete(&id).await?;
            }
            Ok(())
        }
        .boxed()
    })
    .await
}

async fn logs_to_files_and_programs(case: &Case) -> Result<()> {
    with(case, |direct| {
        async move {
            let pod = direct.pod("logging").await?;
            let run = |id: String, uri: String| async move {
                let mut wanted =
                    direct.container(&pod_of(direct), &id, "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i; done")?;
                wanted.stdout.clone_from(&uri);
                wanted.stderr = uri;
                direct.task.create(context(), &wanted).await?;
                direct.start_container(&id).await?;
                assert_eq!(direct.wait(&id).await?.exit_status, 0);
                direct.delete(&id).await?;
                Ok::<_, anyhow::Error>(())
            };
            let expected: String = (1..=3000).map(|number| format!("{number}\n")).collect();
            let file = direct.case.dir().join("made/on/the/way/log");
            run(direct.id("to-file"), format!("file://{}", file.display())).await?;
            assert!(fs::read_to_string(&file)? == expected, "the file is not whole");

            // A log program reads descriptors 3 and 4, and says by closing 5 that it is ready.
            let copy = direct.case.dir().join("copy");
            let script = format!("exec 5>&-; cat <&3 >{}; echo $CONTAINER_ID >>{0}", copy.display());
            let encoded: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let id = direct.id("to-program");
            run(id.clone(), format!("binary:///bin/sh?-c={encoded}")).await?;
            assert!(fs::read_to_string(&copy)? == format!("{expected}{id}\n"), "the program did not get all");

            let broken = direct.id("to-nothing");
            let mut wanted = direct.container(&pod, &broken, "true")?;
            wanted.stdout = "binary:///no/such/program".to_owned();
            let (_, text) = direct.create_refused(&wanted).await?;
            assert!(text.contains("/no/such/program"), "{text}");
            Ok(())
        }
        .boxed()
    })
    .await
}

async fn a_hung_log_stops_nobody(case: &Case) -> Result<()> {
    // More than the daemon has threads for what blocks.
    const LOGS: usize = 20;
    if !Path::new(hung::DEVICE).exists() {
        return case.skip(&format!("this machine has no {}", hung::DEVICE));
    }
    let hung = Hung::mount(&case.dir().join("hung"))?;
    let log = case.dir().join("hung/file");
    let (hung, log) = (&hung, &log);
    with(case, |direct| {
        async move {
            let pod = direct.pod("hung-log").await?;
            let create = |id: String, script: &'static str, log: PathBuf, terminal| {
                let pod = pod.clone();
                async move {
                    let mut spec = direct.spec(&id, script);
                    spec["process"]["terminal"] = json!(terminal);
                    let mut wanted = direct.bundle(&pod, &id, &spec.to_string())?;
                    wanted.stdout = format!("file://{}", log.display());
                    wanted.stderr = if terminal { String::new() } else { wanted.stdout.clone() };
                    wanted.terminal = terminal;
                    direct.task.create(context(), &wanted).await?;
                    Ok::<_, anyhow::Error>(id)
                }
            };
            let mut hit = Vec::new();
            for number in 0..LOGS {
                let id = direct.id(&format!("hit-{number}"));
                hit.push(create(id, "while :; do echo on and on; done", log.clone(), number % 2 == 0).await?);
            }
            hung.hang();
            for id in &hit {
                direct.start_container(id).await?;
            }
            eventually("a write to the log", || async { Ok(hung.waiting() > 0) }).await?;
            for number in 0..5 {
                let file = direct.case.dir().join(format!("well-{number}"));
                let id = create(direct.id(&format!("well-{number}")), "echo well", file.clone(), false).await?;
                direct.start_container(&id).await?;
                assert_eq!(direct.wait(&id).await?.exit_status, 0);
                direct.delete(&id).await?;
                assert_eq!(fs::read_to_string(&file)?, "well\n");
            }
            // What prints into it ends as ever.
            let ends = hit.iter().map(|id| async move {
                direct.kill(id).await?;
                assert_eq!(direct.wait(id).await?.exit_status, 137);
                direct.delete(id).await?;
                Ok::<_, anyhow::Error>(())
            });
            futures::future::try_join_all(ends).await?;
            let writers = || running(Path::new("kuasar-log"), log);
            ensure!(!writers()?.is_empty(), "no process of its own writes to the log");
            // They are bounded: the pod gets no further writers.
            let (id, file) = (direct.id("refused"), direct.case.dir().join("refused"));
            let mut wanted = direct.container(&pod, &id, "echo well")?;
            wanted.stdout = format!("file://{}", file.display());
            wanted.stderr.clone_from(&wanted.stdout);
            let (code, text) = direct.create_refused(&wanted).await?;
            assert_eq!(code, ttrpc::Code::RESOURCE_EXHAUSTED, "{text}");
            assert!(text.contains(&*file.to_string_lossy()) && text.contains("check their NFS or FUSE servers"), "{text}");
            hung.release();
            eventually("the writers' end", || async { Ok(writers()?.is_empty()) }).await?;
            eventually("the end of the refusals", || async { Ok(direct.task.create(context(), &wanted).await.is_ok()) })
                .await?;
            direct.start_container(&id).await?;
            assert_eq!(direct.wait(&id).await?.exit_status, 0);
            direct.delete(&id).await?;
            assert_eq!(fs::read_to_string(&file)?, "well\n");
            Ok(())
        }
        .boxed()
    })
    .await
}

/// The pod of a case that has one.
fn pod_of(direct: &Direct<'_>) -> String {
    direct.pods.lock().ok().and_then(|pods| pods.last().cloned()).unwrap_or_default()
}
