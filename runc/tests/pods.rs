//! What pods and containers can ask for, on real OCI runtimes.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may

mod host;
#[path = "host/oom.rs"]
mod oom;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures::FutureExt;
use kuasar_runc::{RuncConfig, RuncSandboxer, Runtime};
use kuasar_sandboxers::{
    Code, Container, Error, Leftover, Sandbox, SandboxContext, Sandboxer, busybox,
    event::{EventSink, Noticed, Notices},
    fdstore::MemoryHolder,
    reaper::Reaper,
    registry::Registry,
    stdio::{Stdio, StreamHub},
    types::{ContainerHead, ContainerSpec, ExecSpec, IdMapping, IdMappings, NamespaceMode, SandboxSpec, WindowSize},
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use oom::out_of_memory;
use serde_json::{Value, json};
use tokio::{sync::mpsc::UnboundedReceiver, time::timeout};

const MARK: &str = "kuasar-runc-pods";
const SHARED: Option<&str> = Some("/proc/0/ns/pid");

/// A node with one sandboxer.
struct Node {
    dir: tempfile::TempDir,
    rootfs: PathBuf,
    runtime: Runtime,
    reaper: Reaper,
    sandboxer: RuncSandboxer,
    notices: Notices,
    noticed: UnboundedReceiver<Noticed>,
    holder: MemoryHolder,
}

impl Node {
    fn new(runtime: Runtime, reaper: Reaper) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        busybox::make_rootfs(&rootfs).unwrap();
        let (notices, noticed) = Notices::channel();
        let sandboxer = Self::sandboxer(dir.path(), &runtime, &reaper);
        Self { dir, rootfs, runtime, reaper, sandboxer, notices, noticed, holder: MemoryHolder::default() }
    }

    fn sandboxer(dir: &Path, runtime: &Runtime, reaper: &Reaper) -> RuncSandboxer {
        let config = RuncConfig { root: dir.join("root"), ..RuncConfig::default() };
        RuncSandboxer::new(config, runtime.clone(), reaper.clone())
    }

    /// As after a restart of the daemon.
    fn restart(&mut self) {
        self.sandboxer = Self::sandboxer(self.dir.path(), &self.runtime, &self.reaper);
    }

    fn context(&self) -> SandboxContext {
        let dir = self.dir.path().join("state");
        SandboxContext {
            dir,
            notices: self.notices.clone(),
            reaper: self.reaper.clone(),
            streams: StreamHub::default(),
            fds: self.holder.store(),
        }
    }

    async fn start(&self, spec: SandboxSpec) -> Arc<dyn Sandbox> {
        let pod = self.sandboxer.create(Arc::new(spec), self.context()).await.unwrap();
        assert_eq!(pod.start().await.unwrap(), None);
        pod
    }

    async fn pod(&self, pid: NamespaceMode) -> Arc<dyn Sandbox> {
        self.start(host::pod("runc", "pod", pid)).await
    }

    fn spec(&self, id: &str, args: &[&str], pid: Option<&str>) -> ContainerSpec {
        let oci = busybox::oci(busybox::process(args), pid, &format!("/{MARK}/{id}"));
        host::container(self.dir.path(), &self.rootfs, id.parse().unwrap(), oci, Stdio::default())
    }

    /// A file that takes the output of a container.
    fn output(&self, name: &str) -> (Stdio, PathBuf) {
        let path = self.dir.path().join(name);
        (Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() }, path)
    }

    async fn run(&self, pod: &Arc<dyn Sandbox>, spec: ContainerSpec) -> Arc<dyn Container> {
        let container = pod.create_container(spec).await.unwrap_or_else(|error| panic!("{}", error.report()));
        container.start().await.unwrap_or_else(|error| panic!("{}", error.report()));
        container
    }

    /// What a shell script prints in a container of its own.
    async fn said(&self, pod: &Arc<dyn Sandbox>, id: &str, script: &str, pid: Option<&str>) -> String {
        let (stdio, path) = self.output(id);
        let container = self.run(pod, ContainerSpec { stdio, ..self.spec(id, &["sh", "-c", script], pid) }).await;
        assert_eq!(within(container.exited()).await.status, 0, "{}", fs::read_to_string(&path).unwrap_or_default());
        container.delete().await.unwrap();
        let said = fs::read_to_string(&path).unwrap();
        fs::remove_file(path).unwrap();
        said
    }

    async fn end(&mut self, pod: Arc<dyn Sandbox>) {
        pod.stop(Duration::ZERO).await.unwrap();
        pod.delete().await.unwrap();
        pod.delete().await.unwrap();
        self.assert_nothing_left().await;
    }

    async fn assert_nothing_left(&self) {
        let deadline = Instant::now() + host::LIMIT;
        loop {
            let held = host::held(self.dir.path(), MARK);
            if held.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind: {held:#?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    timeout(host::LIMIT, work).await.expect("it hung")
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + host::LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.trim().is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

// One test for all: the reaper is one for the process, and takes every child of the process.
#[tokio::test(flavor = "multi_thread")]
async fn pods() {
    // What a run that failed has left does not fail this one too.
    host::remove_groups(MARK);
    let reaper = Reaper::install().unwrap();
    for runtime in host::runtimes("pods", &reaper).await {
        println!("with {runtime}");
        let mut node = Node::new(runtime, reaper.clone());
        macro_rules! cases {
            ($($case:ident),* $(,)?) => {$(
                println!("  {}", stringify!($case));
                $case(&mut node).await;
                node.assert_nothing_left().await;
            )*};
        }
        cases![
            process_ids_are_shared,
            process_ids_are_not_shared,
            leftovers_of_a_container_end_with_it,
            another_containers_process_ids,
            the_runtimes_message_is_kept,
            bad_requests_leave_nothing,
            failed_starts_name_their_stage,
            output_and_input,
            terminals,
            a_stop_with_grace,
            out_of_memory,
            resources_and_freezing,
            signals_to_all,
            user_namespaces,
            the_end_of_process_one,
            a_restart_without_its_containers,
            a_pid_that_is_anothers_now,
            leftovers_are_collected,
        ];
    }
    host::remove_groups(MARK);
}

async fn process_ids_are_shared(node: &mut Node) {
    let mut spec = host::pod("runc", "pod", NamespaceMode::Pod);
    spec.cgroup_parent = format!("/{MARK}/parent");
    let pod = node.start(spec).await;
    let first = node.run(&pod, node.spec("first", &["sleep", "1001"], SHARED)).await;
    // An orphan in it is reaped by process 1.
    let exec = ExecSpec {
        id: "orphan".parse().unwrap(),
        process: busybox::process(&["sh", "-c", "sh -c 'sleep 0.05 & exit 0'"]),
        stdio: Stdio::default(),
    };
    let exec = first.exec(exec).await.unwrap();
    let pid = exec.start().await.unwrap();
    assert_eq!(within(exec.exited()).await.status, 0);
    assert!(matches!(exec.kill(libc::SIGKILL, false).await, Err(Error::Finished { .. })));
    assert_eq!(exec.pid(), Some(pid));
    exec.delete().await.unwrap();

    let said = node.said(&pod, "second", "ps; cat /proc/1/comm; ls /proc/1/root; echo x > /dev/shm/x", SHARED).await;
    assert!(said.contains("sleep 1001"), "{said}");
    assert!(said.contains("kuasar-init"), "{said}");
    let said = node.said(&pod, "third", "cat /dev/shm/x; ps", SHARED).await;
    assert!(said.starts_with("x\n"), "{said}");
    assert!(!said.contains("[sleep]"), "a zombie was left: {said}");
    // A container that prefers its own.
    let said = node.said(&pod, "private", "echo $$", None).await;
    assert_eq!(said, "1\n");

    let pids = first.pids().await.unwrap();
    assert_eq!((pids.len(), Some(pids[0].pid)), (1, first.pid()));
    first.kill(libc::SIGKILL, false).await.unwrap();
    assert_eq!(within(first.exited()).await.status, 137);
    assert_eq!(first.pids().await.unwrap(), pids);
    first.delete().await.unwrap();
    pod.stop(Duration::ZERO).await.unwrap();
    pod.delete().await.unwrap();
    remove_parent();
}

async fn process_ids_are_not_shared(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    assert_eq!(node.said(&pod, "a", "echo $$; readlink /proc/self/ns/ipc", None).await.lines().next(), Some("1"));
    let ipc = |said: String| said.trim().to_owned();
    let a = ipc(node.said(&pod, "a", "readlink /proc/self/ns/ipc", None).await);
    let b = ipc(node.said(&pod, "b", "readlink /proc/self/ns/ipc", None).await);
    assert_eq!(a, b);
    assert_ne!(a, fs::read_link("/proc/self/ns/ipc").unwrap().to_str().unwrap());
    let net = ipc(node.said(&pod, "a", "readlink /proc/self/ns/net", None).await);
    assert_eq!(net, fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap());
    // It asks for the pod's process ids, which the pod said there are none of.
    assert_eq!(node.said(&pod, "c", "echo $$", SHARED).await, "1\n");
    node.end(pod).await;
}

async fn leftovers_of_a_container_end_with_it(node: &mut Node) {
    for pid in [NamespaceMode::Pod, NamespaceMode::Node] {
        let pod = node.pod(pid).await;
        let spec = node.spec("main", &["sh", "-c", "sleep 1002 & exit 3"], SHARED);
        let container = node.run(&pod, spec).await;
        assert_eq!(within(container.exited()).await.status, 3);
        // When the exit is told, nothing runs any more.
        let held = host::held(node.dir.path(), MARK);
        assert!(!held.iter().any(|what| what.contains("sleep 1002")), "{held:?}");
        container.delete().await.unwrap();
        node.end(pod).await;
    }
}

async fn another_containers_process_ids(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    let target = node.run(&pod, node.spec("target", &["sleep", "1003"], None)).await;
    let path = format!("/proc/{}/ns/pid", target.pid().unwrap());
    let said = node.said(&pod, "debugger", "cat /proc/1/cmdline", Some(&path)).await;
    assert!(said.contains("1003"), "{said}");
    let stranger = format!("/proc/{}/ns/pid", std::process::id());
    let error = pod.create_container(node.spec("stranger", &["true"], Some(&stranger))).await.err().unwrap();
    assert!(matches!(&error, Error::Invalid { .. }), "{error}");
    node.end(pod).await;
}

async fn the_runtimes_message_is_kept(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    let error = pod.create_container(node.spec("bad", &["no-such-program"], None)).await.err().unwrap();
    let Error::Backend { message, .. } = &error else { panic!("{error}") };
    assert!(message.contains("no-such-program") && message.contains("not found"), "{message}");
    let container = node.run(&pod, node.spec("good", &["sleep", "1004"], None)).await;
    let spec =
        ExecSpec { id: "bad".parse().unwrap(), process: busybox::process(&["no-such-program"]), stdio: Stdio::default() };
    let exec = container.exec(spec).await.unwrap();
    let Error::Backend { message, .. } = exec.start().await.unwrap_err() else { panic!() };
    assert!(message.contains("no-such-program"), "{message}");
    exec.delete().await.unwrap();
    assert!(
        container.exec(ExecSpec { id: "odd".parse().unwrap(), process: json!([]), stdio: Stdio::default() }).await.is_err()
    );
    node.end(pod).await;
}

async fn bad_requests_leave_nothing(node: &mut Node) {
    let mut spec = host::pod("runc", "pod", NamespaceMode::Pod);
    spec.namespaces.network = NamespaceMode::Pod;
    spec.netns = Some(node.rootfs.join("etc/hosts"));
    let error = node.sandboxer.create(Arc::new(spec), node.context()).await.err().unwrap();
    assert!(matches!(&error, Error::Invalid { .. }), "{error}");
    let mut spec = host::pod("runc", "pod", NamespaceMode::Pod);
    spec.options.binary = Some("no-such-runtime".into());
    let error = node.sandboxer.create(Arc::new(spec), node.context()).await.err().unwrap();
    assert!(matches!(&error, Error::Unavailable { .. }), "{error}");
    node.assert_nothing_left().await;

    let pod = node.pod(NamespaceMode::Pod).await;
    let before = host::held(node.dir.path(), MARK);
    let mut spec = node.spec("rootfs", &["true"], None);
    spec.rootfs[0].source = "/no/such/directory".into();
    assert!(pod.create_container(spec).await.is_err());
    let mut spec = node.spec("fifo", &["true"], None);
    spec.stdio.stdout = node.dir.path().join("vanished").display().to_string();
    assert!(matches!(pod.create_container(spec).await, Err(Error::Invalid { .. })));
    assert!(pod.create_container(node.spec("program", &["no-such-program"], None)).await.is_err());
    let mut spec = node.spec("mount", &["true"], None);
    spec.spec.mounts_mut().push(json!({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}));
    assert!(pod.create_container(spec).await.is_err());
    assert_eq!(host::held(node.dir.path(), MARK), before);
    node.end(pod).await;
}

async fn failed_starts_name_their_stage(node: &mut Node) {
    let state = node.dir.path().join("registry");
    let sandboxer: Arc<dyn Sandboxer> = Arc::new(Node::sandboxer(node.dir.path(), &node.runtime, &node.reaper));
    let (sandboxers, store) = (BTreeMap::from([("runc".to_owned(), sandboxer)]), node.holder.store());
    let registry =
        Registry::new(&state, sandboxers, EventSink::channel().0, StreamHub::default(), node.reaper.clone(), store).unwrap();
    // What the last failure was, of which the error tells the same.
    let last = |error: Error| {
        let failure = registry.failures().unwrap().pop().unwrap();
        assert_eq!(error.report(), format!("{} (kuasarctl failures pod)", failure.error));
        let stages: Vec<_> = failure.stages.iter().map(|stage| stage.name.clone()).collect();
        (failure, stages)
    };

    let mut spec = host::pod("runc", "pod", NamespaceMode::Pod);
    spec.hostname = "x".repeat(65);
    let (failure, stages) = last(registry.create(spec.clone()).await.unwrap_err());
    assert_eq!((failure.code, stages.last().unwrap().as_str()), (Code::InvalidArgument, "check what the pod asks for"));

    spec.hostname.clear();
    spec.sysctls = [("kernel.shm_rmid_forced".into(), "many".into())].into();
    registry.create(spec.clone()).await.unwrap();
    let pod = registry.sandbox(&spec.namespace, &spec.id).unwrap();
    let (failure, stages) = last(pod.start().await.unwrap_err());
    assert_eq!((failure.operation.as_str(), failure.container), ("start the sandbox", None));
    assert_eq!(stages.last().unwrap(), "make the pod's namespaces, its sysctls and its process 1");
    assert!(failure.error.contains("shm_rmid_forced"), "{}", failure.error);
    assert!(registry.sandbox(&spec.namespace, &spec.id).is_err(), "a sandbox that cannot be started stays");

    spec.sysctls.clear();
    registry.create(spec.clone()).await.unwrap();
    let pod = registry.sandbox(&spec.namespace, &spec.id).unwrap();
    pod.start().await.unwrap();
    let mut rootfs = node.spec("rootfs", &["true"], None);
    rootfs.rootfs[0].source = "/no/such/directory".into();
    let (failure, stages) = last(pod.create_container(rootfs).await.unwrap_err());
    assert_eq!((failure.container.unwrap().as_str(), stages.last().unwrap().as_str()), ("rootfs", "mount the rootfs"));
    assert!(failure.log.is_none() && failure.error.contains("/no/such/directory"), "{}", failure.error);
    let mut fifo = node.spec("fifo", &["true"], None);
    fifo.stdio.stdout = node.dir.path().join("vanished").display().to_string();
    let (_, stages) = last(pod.create_container(fifo).await.unwrap_err());
    assert_eq!(stages.last().unwrap(), "open its input and output");

    // What the OCI runtime has written outlives the call.
    let with_runtime = format!("create the container with {}", node.runtime);
    let mut bind = node.spec("mount", &["true"], None);
    bind.spec.mounts_mut().push(json!({"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}));
    for (spec, word) in [(bind, "/no/such"), (node.spec("program", &["no-such-program"], None), "no-such-program")] {
        let (failure, stages) = last(pod.create_container(spec).await.unwrap_err());
        assert_eq!(stages.last(), Some(&with_runtime));
        assert!(stages.contains(&"mount the rootfs".to_owned()), "{stages:?}");
        let log = failure.log.unwrap();
        assert_eq!(log.program, node.runtime.program().display().to_string());
        assert!(log.text.contains("\"level\"") && log.text.contains(word), "{}", log.text);
    }
    assert_eq!(registry.failures().unwrap().len(), 6);
    pod.delete().await.unwrap();
}

async fn output_and_input(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    let (stdin, stdout) = (node.dir.path().join("in"), node.dir.path().join("out"));
    for fifo in [&stdin, &stdout] {
        mkfifo(fifo, Mode::S_IRWXU).unwrap();
    }
    let open = |path: &Path, write: bool| {
        // As containerd does: neither end waits for the other.
        fs::OpenOptions::new().read(!write).write(write).custom_flags(libc::O_NONBLOCK).open(path)
    };
    let mut reader = open(&stdout, false).unwrap();
    let name = |path: &Path| path.to_str().unwrap().to_owned();
    let stdio = Stdio { stdin: name(&stdin), stdout: name(&stdout), ..Stdio::default() };
    let container = node.run(&pod, ContainerSpec { stdio, ..node.spec("cat", &["cat"], None) }).await;
    let mut writer = open(&stdin, true).unwrap();
    writer.write_all(b"through a container").unwrap();
    drop(writer);
    let mut said = Vec::new();
    let mut chunk = [0; 64];
    until("the echo", || {
        if let Ok(length) = reader.read(&mut chunk) {
            said.extend_from_slice(&chunk[..length]);
        }
        said == b"through a container"
    })
    .await;
    // The client is gone but did not close stdin: the process goes on.
    assert!(alive(container.pid().unwrap()));
    container.close_stdin().await.unwrap();
    assert_eq!(within(container.exited()).await.status, 0);
    assert!(matches!(container.kill(libc::SIGTERM, false).await, Err(Error::Finished { .. })));
    container.delete().await.unwrap();
    node.end(pod).await;
}

async fn terminals(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    let (mut stdio, path) = node.output("terminal");
    stdio.terminal = true;
    let mut spec = ContainerSpec {
        stdio,
        ..node.spec(
            "tty",
            &["sh", "-c", "while ! stty size | cat | ls -d /tmp/none 2>/dev/null; do stty size; sleep 0.02; done"],
            None,
        )
    };
    spec.spec.as_value_mut()["process"]["terminal"] = true.into();
    let container = node.run(&pod, spec).await;
    container.resize(WindowSize { width: 123, height: 45 }).await.unwrap();
    until("the new size", || fs::read_to_string(&path).unwrap_or_default().contains("45 123\r\n")).await;

    let (mut stdio, path) = node.output("exec");
    stdio.terminal = true;
    let process = busybox::process(&["sh", "-c", "stty size; readlink /proc/self/fd/0; exit 4"]);
    let exec = container.exec(ExecSpec { id: "tty".parse().unwrap(), process, stdio }).await.unwrap();
    exec.start().await.unwrap();
    assert_eq!(within(exec.exited()).await.status, 4);
    let said = fs::read_to_string(path).unwrap();
    assert!(said.contains("/dev/pts/"), "{said:?}");
    exec.delete().await.unwrap();
    let plain =
        ExecSpec { id: "plain".parse().unwrap(), process: busybox::process(&["sleep", "1005"]), stdio: Stdio::default() };
    let plain = container.exec(plain).await.unwrap();
    plain.start().await.unwrap();
    assert!(plain.resize(WindowSize { width: 1, height: 1 }).await.is_err());
    node.end(pod).await;
}

async fn a_stop_with_grace(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    let polite = node
        .run(&pod, node.spec("polite", &["sh", "-c", "trap 'exit 7' TERM; echo; while :; do sleep 0.02; done"], None))
        .await;
    let deaf = node.run(&pod, node.spec("deaf", &["sleep", "1006"], None)).await;
    // Both have to run their programs, one with its trap: a signal would end the OCI runtime's
    // init, which they are until then and which may catch it.
    let status =
        |container: &Arc<dyn Container>| fs::read_to_string(format!("/proc/{}/status", container.pid().unwrap())).unwrap();
    until("the trap", || {
        let status = status(&polite);
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap().trim();
        status.starts_with("Name:\tsh\n") && u64::from_str_radix(caught, 16).unwrap() & 1 << (libc::SIGTERM - 1) != 0
    })
    .await;
    until("the deaf one's program", || status(&deaf).starts_with("Name:\tsleep\n")).await;
    let begun = Instant::now();
    pod.stop(Duration::from_millis(500)).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(400), "it did not wait for the deaf one");
    assert_eq!((within(polite.exited()).await.status, within(deaf.exited()).await.status), (7, 137));
    assert_eq!(within(pod.exited()).await.status, 0);
    polite.delete().await.unwrap();
    deaf.delete().await.unwrap();
    node.end(pod).await;
}

async fn resources_and_freezing(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    let container = node.run(&pod, node.spec("main", &["sleep", "1007"], None)).await;
    container.stats().await.unwrap();
    container.update(json!({"memory": {"limit": 64 << 20}})).await.unwrap();
    let v1 = format!("/sys/fs/cgroup/memory/{MARK}/main/memory.limit_in_bytes");
    let v2 = format!("/sys/fs/cgroup/{MARK}/main/memory.max");
    let limit = fs::read_to_string(v1).or_else(|_| fs::read_to_string(v2)).unwrap();
    assert_eq!(limit.trim(), (64 << 20).to_string());
    container.pause().await.unwrap();
    assert_eq!(container.record()["paused"], true);
    container.resume().await.unwrap();
    container.pause().await.unwrap();
    container.kill(libc::SIGKILL, false).await.unwrap();
    assert_eq!(within(container.exited()).await.status, 137);
    container.delete().await.unwrap();
    // Deleting the pod ends a frozen one too.
    let container = node.run(&pod, node.spec("frozen", &["sleep", "1008"], None)).await;
    container.pause().await.unwrap();
    node.end(pod).await;
}

async fn signals_to_all(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Container).await;
    let script = "trap : TERM; while :; do sleep 1009; done";
    let container = node.run(&pod, node.spec("main", &["sh", "-c", script], None)).await;
    let shell = container.pid().unwrap();
    let sleeper = || {
        let pids = host::processes_of(shell);
        pids.into_iter()
            .find(|pid| fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("1009\0")))
    };
    until("the second process", || sleeper().is_some()).await;
    let first = sleeper().unwrap();
    assert!(container.pids().await.unwrap().iter().any(|process| process.pid == first));
    container.kill(libc::SIGTERM, true).await.unwrap();
    // It reaches both: the one ends, the other has a trap and starts another.
    until("the end of the second process", || sleeper().is_some_and(|pid| pid != first)).await;
    assert!(alive(shell));
    assert!(matches!(container.kill(1000, false).await, Err(Error::Invalid { .. })));
    container.kill(libc::SIGKILL, true).await.unwrap();
    assert_eq!(within(container.exited()).await.status, 137);
    container.delete().await.unwrap();
    node.end(pod).await;
}

async fn user_namespaces(node: &mut Node) {
    if node.runtime.features().is_none() {
        eprintln!("SKIP user_namespaces with {}: it is too old for them", node.runtime);
        return;
    }
    let range = vec![IdMapping { container_id: 0, host_id: 300_000, length: 65_536 }];
    let mappings = IdMappings { uids: range.clone(), gids: range };
    // Processes of the namespace have to reach the root filesystem.
    for dir in [node.dir.path().to_owned(), node.dir.path().join("bundles")] {
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    let mut spec = host::pod("runc", "pod", NamespaceMode::Pod);
    spec.namespaces.user = Some(mappings);
    let pod = node.start(spec).await;
    let script = "cat /proc/self/uid_map; id -u; cat /proc/1/comm; echo > /dev/shm/x";
    let mut spec = node.spec("main", &["sh", "-c", script], SHARED);
    let range = json!([{"containerID": 0, "hostID": 300_000, "size": 65_536}]);
    let linux = &mut spec.spec.as_value_mut()["linux"];
    linux["uidMappings"] = range.clone();
    linux["gidMappings"] = range;
    linux["namespaces"].as_array_mut().unwrap().push(json!({"type": "user", "path": "/proc/0/ns/user"}));
    let (stdio, path) = node.output("mapped");
    let container = node.run(&pod, ContainerSpec { stdio, ..spec }).await;
    assert_eq!(within(container.exited()).await.status, 0, "{:?}", fs::read_to_string(&path));
    let said = fs::read_to_string(path).unwrap();
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(words, ["0", "300000", "65536", "0", "kuasar-init"]);
    container.delete().await.unwrap();
    node.end(pod).await;
}

async fn the_end_of_process_one(node: &mut Node) {
    let pod = node.pod(NamespaceMode::Pod).await;
    let container = node.run(&pod, node.spec("main", &["sleep", "1011"], SHARED)).await;
    let init = pod.describe()["init"].as_u64().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(init.try_into().unwrap()), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(within(pod.exited()).await.status, 0);
    assert_eq!(within(container.exited()).await.status, 137);
    container.delete().await.unwrap();
    node.end(pod).await;
}

/// What the state store would have saved.
struct Saved {
    spec: SandboxSpec,
    pod: Value,
    head: ContainerHead,
    container: Value,
}

async fn a_restart_without_its_containers(node: &mut Node) {
    let spec = host::pod("runc", "pod", NamespaceMode::Pod);
    let pod = node.start(spec.clone()).await;
    let bundle = node.spec("main", &["sh", "-c", "sleep 0.2; exit 5"], SHARED);
    let head = ContainerHead { id: bundle.id.clone(), bundle: bundle.bundle.clone(), stdio: bundle.stdio.clone() };
    let container = node.run(&pod, bundle).await;
    let saved = Saved { spec, pod: pod.record(), head, container: container.record() };
    // Taken over while it runs: its true status.
    node.restart();
    let pod = node.sandboxer.recover(Arc::new(saved.spec.clone()), node.context(), saved.pod.clone()).await.unwrap();
    let container = pod.recover_container(saved.head.clone(), saved.container.clone()).await.unwrap();
    assert_eq!(container.pid(), container.record()["process"]["pid"].as_u64().map(|pid| u32::try_from(pid).unwrap()));
    assert_eq!(within(container.exited()).await.status, 5);
    // Taken over after its end, which has been seen, or has not. Whoever has its pid now is not touched.
    node.restart();
    let mut reused = saved.container.clone();
    reused["process"]["pid"] = std::process::id().into();
    for (record, status) in [(saved.container, 5), (reused, 255)] {
        let pod = node.sandboxer.recover(Arc::new(saved.spec.clone()), node.context(), saved.pod.clone()).await.unwrap();
        let container = pod.recover_container(saved.head.clone(), record).await.unwrap();
        assert!(matches!(container.kill(libc::SIGKILL, false).await, Err(Error::Finished { .. })));
        assert_eq!(within(container.exited()).await.status, status);
        container.delete().await.unwrap();
    }
    let pod = node.sandboxer.recover(Arc::new(saved.spec.clone()), node.context(), saved.pod.clone()).await.unwrap();
    node.end(pod).await;
    // Without its process 1 a pod has ended.
    let pod = node.sandboxer.recover(Arc::new(saved.spec), node.context(), saved.pod).await.unwrap();
    assert_eq!(within(pod.exited()).await.status, 137);
    node.end(pod).await;
}

/// The group that kubelet would have made for a pod, and would remove.
fn remove_parent() {
    for tree in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let parent = tree.path().join(MARK).join("parent");
        if parent.exists() {
            fs::remove_dir(parent).unwrap();
        }
    }
}

async fn a_pid_that_is_anothers_now(node: &mut Node) {
    let spec = host::pod("runc", "pod", NamespaceMode::Pod);
    let pod = node.start(spec.clone()).await;
    let bundle = node.spec("main", &["sleep", "1014"], SHARED);
    let head = ContainerHead { id: bundle.id.clone(), bundle: bundle.bundle.clone(), stdio: bundle.stdio.clone() };
    let container = node.run(&pod, bundle).await;
    let exec = ExecSpec { id: "e".parse().unwrap(), process: busybox::process(&["sleep", "1015"]), stdio: Stdio::default() };
    let exec = container.exec(exec).await.unwrap();
    exec.start().await.unwrap();
    let saved = Saved { spec: spec.clone(), pod: pod.record(), head, container: container.record() };
    let saved_exec = exec.record();
    drop(exec);
    node.end(pod).await;

    // Every one of these pids has come round.
    let victim =
        node.reaper.spawn(std::process::Command::new("sleep").arg("1016").stdout(std::process::Stdio::null())).unwrap();
    let taken = |mut record: Value, pointer: &str| {
        *record.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = victim.pid.into();
        record
    };
    node.restart();
    let pod = taken(saved.pod, "/init/pid");
    let pod = node.sandboxer.recover(Arc::new(spec), node.context(), pod).await.unwrap();
    let container = pod.recover_container(saved.head, taken(saved.container, "/process/pid")).await.unwrap();
    let exec = taken(saved_exec, "/started/process/pid");
    let exec = container.recover_exec("e".parse().unwrap(), Stdio::default(), exec).await.unwrap();
    assert!(matches!(container.kill(libc::SIGKILL, false).await, Err(Error::Finished { .. })));
    assert!(matches!(exec.kill(libc::SIGKILL, false).await, Err(Error::Finished { .. })));
    for status in [within(pod.exited()).await, within(container.exited()).await, within(exec.exited()).await] {
        assert_eq!(status.status, 255);
    }
    exec.delete().await.unwrap();
    container.delete().await.unwrap();
    node.end(pod).await;
    assert!(alive(victim.pid));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(victim.pid.cast_signed()), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(within(victim.exit).await.status, 137);
}

async fn leftovers_are_collected(node: &mut Node) {
    let mut spec = host::pod("runc", "pod", NamespaceMode::Pod);
    spec.cgroup_parent = format!("/{MARK}/parent");
    let pod = node.start(spec).await;
    let one = node.run(&pod, node.spec("one", &["sh", "-c", "sleep 1012 & exec sleep 1012"], SHARED)).await;
    let two = pod.create_container(node.spec("two", &["sleep", "1013"], None)).await.unwrap();
    until("the second process of a container", || one.pids().now_or_never().unwrap().unwrap().len() == 2).await;
    let other = node.start(host::pod("runc", "other", NamespaceMode::Container)).await;
    let key = ("test".parse().unwrap(), "other".parse().unwrap());
    // Process 1 is put into its group in the background: tree by tree, each of which has the group first.
    until("the accounting of process 1", || {
        let trees = fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
        let groups: Vec<_> =
            trees.map(|tree| tree.path().join(MARK).join("parent/kuasar-init-pod")).filter(|group| group.exists()).collect();
        let full = |group: &PathBuf| fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|pids| !pids.is_empty());
        !groups.is_empty() && groups.iter().all(full)
    })
    .await;
    let init = u32::try_from(pod.describe()["init"].as_u64().unwrap()).unwrap();
    let mut pids: Vec<_> = one.pids().await.unwrap().into_iter().map(|process| process.pid).collect();
    pids.extend([init, two.pid().unwrap()]);
    pids.sort_unstable();
    drop((pod, one, two));
    node.restart();
    let (namespace, id) = ("test".parse().unwrap(), "pod".parse().unwrap());
    assert_eq!(node.sandboxer.processes(&namespace, &id).await.unwrap(), pids);
    // Of one at work nothing is left over, whatever it looks like.
    let at_work = BTreeMap::from([(key.clone(), None), ((namespace.clone(), id.clone()), None)]);
    assert!(node.sandboxer.leftovers(&at_work).await.unwrap().is_empty());
    // Its group remains, and nothing tells any more that it was there.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(init.cast_signed()), nix::sys::signal::Signal::SIGKILL).unwrap();
    until("the end of process 1", || !alive(init)).await;
    let found = node.sandboxer.leftovers(&BTreeMap::from([(key, Some(BTreeSet::new()))])).await.unwrap();
    let [Leftover { sandbox, what, removal }] = <[_; 1]>::try_from(found).ok().expect("one leftover");
    assert!(what.contains("sandbox pod"), "{what}");
    assert_eq!(sandbox, (namespace.clone(), id.clone()));
    removal.await.unwrap();
    assert!(node.sandboxer.processes(&namespace, &id).await.unwrap().is_empty());
    let held = host::held(node.dir.path(), MARK);
    assert!(held.iter().all(|what| what.contains("/other") || what.contains("parent")), "{held:#?}");
    node.said(&other, "alive", "echo", None).await;
    remove_parent();
    node.end(other).await;
}
