//! Guests that misbehave, at the boot and in each call: whatever they do, the host answers in time, says why, and is left with nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "what fails fails the test")]

mod guests;
mod machines;
mod takeovers;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use guests::{Fake, Ill, Output, Ways, hello, out_of_memory, script, until};
use kuasar_guest_protocol::VERSION;
use kuasar_sandboxers::{
    Code, Error, Result, SandboxContext, Sandboxer,
    cgroup::Cgroup,
    event::{EventKind, EventSink, Notices, Sent},
    fake,
    fdstore::MemoryHolder,
    handle::{ContainerHandle, SandboxHandle},
    id::ExecId,
    lifecycle::SandboxPhase,
    registry::Registry,
    spec::OciSpec,
    stdio::{Stdio, StreamHub},
    types::{ContainerSpec, ExecSpec, SandboxSpec},
};
use kuasar_vmm::{HypervisorConfig, VmmConfig, VmmSandboxer, qemu::QemuConfig};
use machines::reaper;
use serde_json::json;
use tokio::{sync::mpsc::UnboundedReceiver, time::timeout};

/// How long anything may take that is not meant to wait for a guest.
const SOON: Duration = Duration::from_secs(20);

/// How long guests may take to boot here.
const BOOT: Duration = Duration::from_secs(1);

/// By the reaper, which takes every exit.
async fn run(words: &[&str]) -> String {
    let output = reaper().run(Command::new(words[0]).args(&words[1..]), SOON).await.unwrap();
    assert_eq!(output.status, 0, "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A network namespace as a plugin leaves it.
struct Namespace(String);

impl Namespace {
    async fn new(name: &str) -> Self {
        run(&["ip", "netns", "add", name]).await;
        let namespace = Self(name.to_owned());
        for words in ["link add eth0 type veth peer name far", "addr add 10.9.8.7/24 dev eth0", "link set eth0 up"] {
            namespace.ip(words).await;
        }
        namespace
    }

    async fn ip(&self, words: &str) -> String {
        run(&["ip", "-n", &self.0].into_iter().chain(words.split(' ')).collect::<Vec<_>>()).await
    }

    /// Names of its interfaces, and what redirects their traffic.
    async fn contents(&self) -> (Vec<String>, String) {
        let names = self.ip("-br link").await.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect();
        (names, run(&["tc", "-n", &self.0, "qdisc", "show", "dev", "eth0"]).await)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The test may have failed already.
        if let Err(error) = Command::new("ip").args(["netns", "del", &self.0]).spawn() {
            eprintln!("remove network namespace {}: {error}", self.0);
        }
    }
}

/// A node whose virtual machines are made up, for one pod.
struct Node {
    dir: tempfile::TempDir,
    name: String,
    netns: Namespace,
    untouched: (Vec<String>, String),
    ways: Ways,
    holder: MemoryHolder,
    registry: Registry,
    events: UnboundedReceiver<Sent>,
}

impl Node {
    /// `None`, said aloud, where this cannot be tried.
    async fn new(test: &str) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIP {test}: root");
            return None;
        }
        let name = format!("hostile-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let netns = Namespace::new(&name).await;
        let dir = tempfile::tempdir().unwrap();
        let mut kernel = vec![0; 1024];
        kernel[514..518].copy_from_slice(b"HdrS");
        fs::write(dir.path().join("vmlinuz"), kernel).unwrap();
        fs::write(dir.path().join("initrd"), "070701").unwrap();
        script(&dir.path().join("virtiofsd"), "[ \"$1\" != --version ] || exec echo virtiofsd 1.14.0; exec sleep 1000000");
        let (ways, holder) = (Ways::default(), MemoryHolder::default());
        let (registry, events) = registry(dir.path(), &ways, &holder).await;
        Some(Self { untouched: netns.contents().await, dir, name, netns, ways, holder, registry, events })
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// Where the pod's control group is.
    fn group(&self) -> String {
        format!("/kuasar-hostile-{}", self.name)
    }

    fn spec(&self) -> SandboxSpec {
        let mut spec = fake::spec(&self.name);
        spec.netns = Some(Path::new("/run/netns").join(&self.netns.0));
        spec.cgroup_parent = self.group();
        spec
    }

    /// As a daemon gets it that takes over.
    fn context(&self) -> SandboxContext {
        SandboxContext {
            dir: self.dir.path().join("state"),
            notices: Notices::channel().0,
            reaper: reaper(),
            streams: StreamHub::default(),
            fds: self.holder.store(),
        }
    }

    fn pod(&self) -> Result<SandboxHandle> {
        self.registry.sandbox(&self.spec().namespace, &self.spec().id)
    }

    async fn start(&self) -> Result<SandboxHandle> {
        self.registry.create(self.spec()).await?;
        let pod = self.pod()?;
        pod.start().await.map(|_| pod)
    }

    /// How a start fails that must fail.
    async fn failed_start(&self) -> String {
        let error = timeout(SOON, self.start()).await.expect("a start without end").unwrap_err();
        self.assert_nothing_is_left().await;
        error.report()
    }

    fn container_spec(&self, stdio: Stdio) -> ContainerSpec {
        let bundle = self.dir.path().join("bundle");
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec = json!({"ociVersion": "1.2.0", "process": {"args": ["x"]}, "root": {"path": "rootfs"}}).to_string();
        let spec = OciSpec::parse(spec.as_bytes()).unwrap();
        ContainerSpec { id: "c".parse().unwrap(), bundle, spec, rootfs: Vec::new(), stdio }
    }

    fn container(&self) -> Result<ContainerHandle> {
        self.registry.container(&self.spec().namespace, &"c".parse().unwrap())
    }

    /// A pod with a container that runs.
    async fn running(&self, stdio: Stdio) -> (SandboxHandle, ContainerHandle) {
        let pod = self.start().await.unwrap();
        pod.create_container(self.container_spec(stdio)).await.unwrap();
        let container = self.container().unwrap();
        container.start(None).await.unwrap();
        (pod, container)
    }

    /// Stops and deletes all, as containerd would: containers first.
    async fn remove(&self) {
        let work = async {
            let pod = self.pod()?;
            if let Ok(container) = self.container() {
                match container.kill(None, libc::SIGKILL, true).await {
                    Err(error) if error.code() != Code::NotFound => return Err(error),
                    _ => container.wait(None).await?,
                };
                container.delete(None).await?;
            }
            pod.stop(Duration::from_secs(1)).await?;
            pod.delete().await
        };
        timeout(SOON, work).await.expect("a removal without end").unwrap();
        self.assert_nothing_is_left().await;
    }

    async fn assert_nothing_is_left(&self) {
        let entries = |dir: &Path| fs::read_dir(dir).map_or(0, Iterator::count);
        assert_eq!((entries(&self.root().join("test")), entries(&self.root().join(".machines"))), (0, 0));
        assert!(Cgroup::named(&format!("kuasar-vm-{}", self.name)).unwrap().is_empty());
        Cgroup::at(Path::new(&self.group())).unwrap().remove().await.unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()), "{mounts}");
        assert_eq!(self.netns.contents().await, self.untouched);
    }
}

async fn sandboxer(dir: &Path, ways: &Ways) -> VmmSandboxer {
    let config = VmmConfig {
        kernel: Some(dir.join("vmlinuz")),
        virtiofsd: Some(dir.join("virtiofsd")),
        boot_limit: BOOT,
        ..VmmConfig::new(HypervisorConfig::Qemu(QemuConfig::default()), dir.join("root"))
    };
    VmmSandboxer::with(Box::new(Fake::new(ways.clone())), config, reaper()).await.unwrap()
}

async fn registry(dir: &Path, ways: &Ways, holder: &MemoryHolder) -> (Registry, UnboundedReceiver<Sent>) {
    let (sink, events) = EventSink::channel();
    let all: BTreeMap<String, Arc<dyn Sandboxer>> =
        BTreeMap::from([("fake".into(), Arc::new(sandboxer(dir, ways).await) as _)]);
    let registry = Registry::new(&dir.join("state"), all, sink, StreamHub::default(), reaper(), holder.store()).unwrap();
    registry.recover().await.unwrap().finished().await.unwrap();
    (registry, events)
}

fn exec(id: &str) -> (ExecId, ExecSpec) {
    let id: ExecId = id.parse().unwrap();
    (id.clone(), ExecSpec { id, process: json!({"args": ["x"]}), stdio: Stdio::default() })
}

/// How much of this process is in memory, in KiB.
fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Lets time fly while nothing happens, so that limits of minutes can be tried.
async fn patiently<T>(work: impl Future<Output = T>) -> T {
    tokio::time::pause();
    let done = work.await;
    tokio::time::resume();
    done
}

const LATE: &str = "the boot of the guest up to its agent's first answer";

#[tokio::test]
async fn boots_that_come_to_nothing() {
    let Some(node) = Node::new("boots_that_come_to_nothing").await else { return };
    let hears = "(it takes connections, but: the guest's agent is unavailable: ";
    for (ill, words) in [
        (Ill::Silence, [LATE, "(it takes connections, but: it does not answer) did not finish within 1 s"]),
        (Ill::HalfFrame, [LATE, "(it takes connections, but: it does not answer) did not finish within 1 s"]),
        (Ill::Stray, [LATE, "(it takes connections, but: it does not answer) did not finish within 1 s"]),
        (Ill::Garbage, [LATE, "(it takes connections, but: it does not answer) did not finish within 1 s"]),
        (Ill::HugeFrame, [LATE, "(it takes connections, but: it does not answer) did not finish within 1 s"]),
        (Ill::HangUp, [LATE, hears]),
        (Ill::WrongType, [LATE, hears]),
        (Ill::Flood, ["the guest's agent is unavailable: it has sent more than a guest has to say", "delete the pod"]),
        (Ill::Refusal("no\x1b[2J".into()), ["the guest failed to say hello: no\u{fffd}[2J", "nothing is on its console"]),
        (Ill::Answer(hello(99, "")), ["it speaks version 99 of the protocol", "install the guest image of the same release"]),
        (
            Ill::Death(0, "panicked at x\n"),
            ["it switched itself off; last on its console: panicked at x", "kubelet starts the pod anew"],
        ),
        (Ill::Death(0, ""), ["the VM powered off before its kernel printed anything", "nothing is on its console"]),
        (Ill::Death(137, "early\n"), ["its hypervisor ended with status 137", "; last on its console: early"]),
    ] {
        node.ways.ill("Hello", ill.clone());
        let before = resident_kib();
        let report = node.failed_start().await;
        assert!(report.starts_with("Fake 1.0 failed to bring the guest up: "), "{ill:?}: {report}");
        assert!(words.iter().all(|word| report.contains(word)) && report.len() < 8192, "{ill:?}: {report}");
        assert!(!report.contains('\x1b') && report.matches("panicked").count() < 2, "{ill:?}: {report:?}");
        assert!(resident_kib() < before + (64 << 10), "{ill:?}: {} KiB after {before}", resident_kib());
    }
    node.ways.well("Hello");
    for ill in [Ill::Silence, Ill::Garbage, Ill::HangUp] {
        node.ways.connects(ill.clone());
        let report = node.failed_start().await;
        assert!(report.contains(LATE) && report.contains("within 1 s"), "{ill:?}: {report}");
    }
}

#[tokio::test]
async fn guests_that_boot_and_are_not_set_up() {
    let Some(node) = Node::new("guests_that_boot_and_are_not_set_up").await else { return };
    for (ill, words) in [
        (Ill::HangUp, "the guest's agent is unavailable"),
        (Ill::Flood, "it has sent more than a guest has to say"),
        (Ill::Refusal("no such interface".into()), "the guest failed to set up the guest: no such interface"),
        (
            Ill::Death(1, ""),
            "the pod's virtual machine is unavailable: its hypervisor ended with status 1; kubelet starts the pod anew",
        ),
    ] {
        node.ways.ill("SetUp", ill.clone());
        let report = node.failed_start().await;
        assert!(report.contains(words), "{ill:?}: {report}");
    }
    // A hello of 3 MB is much, and no more than that.
    node.ways.well("SetUp");
    node.ways.ill("Hello", Ill::Answer(hello(VERSION, &"agent\x07".repeat(500_000))));
    let pod = node.start().await.unwrap();
    let detail = pod.status().await.unwrap().detail.to_string();
    assert!(detail.len() < 4096 && !detail.contains("\\u0007"), "{detail}");
    node.remove().await;
}

/// Each of the calls that a running container knows, by the method of the agent that it takes.
async fn call(method: &str, container: &ContainerHandle, number: usize) -> Result<()> {
    match method {
        "Stats" => container.stats().await.map(drop),
        "Pids" => container.pids().await.map(drop),
        "Update" => container.update(json!({"cpu": {"shares": 2}})).await,
        "Pause" => container.pause().await,
        "Signal" => container.kill(None, libc::SIGUSR1, false).await,
        "Exec" => {
            let (id, spec) = exec(&format!("e{number}"));
            container.exec(spec).await?;
            container.start(Some(id)).await.map(drop)
        }
        _ => Err(Error::invalid("method", method)),
    }
}

const CALLS: [&str; 6] = ["Stats", "Pids", "Update", "Pause", "Signal", "Exec"];

/// Those that are made for all containers of the node, one after another.
const NUMBERS: [&str; 2] = ["Stats", "Pids"];

/// After those of them that succeed the container is no longer what it was.
const CHANGES: [&str; 2] = ["Pause", "Signal"];

#[tokio::test]
async fn calls_that_are_answered_badly() {
    let Some(node) = Node::new("calls_that_are_answered_badly").await else { return };
    let (pod, container) = node.running(Stdio::default()).await;
    let mut number = 0;
    for method in CALLS {
        for ill in [Ill::HangUp, Ill::WrongType, Ill::Refusal("x\x1b".repeat(100_000))] {
            number += 1;
            node.ways.ill(method, ill.clone());
            let before = resident_kib();
            let answered = timeout(SOON, call(method, &container, number)).await;
            let answered = answered.unwrap_or_else(|_| panic!("{method}: no end of {ill:?}"));
            // What has no payload cannot have a wrong one.
            let report = match (answered, &ill) {
                (Err(error), _) => error.report(),
                (Ok(()), Ill::WrongType) if method != "Stats" => String::new(),
                (Ok(()), _) => panic!("{method} succeeds with {ill:?}"),
            };
            assert!(report.len() < 8192 && !report.contains('\x1b'), "{method}, {ill:?}: {} bytes", report.len());
            assert!(resident_kib() < before + (64 << 10), "{method}, {ill:?}");
            node.ways.well(method);
        }
        // The guest is as good as before.
        number += 1;
        if !CHANGES.contains(&method) {
            call(method, &container, number).await.unwrap_or_else(|error| panic!("{method}: {}", error.report()));
        }
    }
    assert_eq!(pod.status().await.unwrap().state.phase(), SandboxPhase::Ready);
    node.remove().await;
}

#[tokio::test]
async fn calls_that_are_not_answered() {
    let Some(node) = Node::new("calls_that_are_not_answered").await else { return };
    let (_, container) = node.running(Stdio::default()).await;
    // Numbers are not waited for: see below.
    for (number, method) in CALLS.into_iter().enumerate().filter(|(_, method)| !NUMBERS.contains(method)) {
        // What is no frame, or one that is too large, is waited out.
        for ill in [Ill::Silence, Ill::Stray, Ill::HalfFrame, Ill::Garbage, Ill::HugeFrame] {
            node.ways.ill(method, ill.clone());
            let before = resident_kib();
            let error = patiently(call(method, &container, 10 * number)).await.unwrap_err();
            assert!(resident_kib() < before + (64 << 10), "{method}, {ill:?}");
            // Half a frame is made whole by whatever the guest answers next.
            if !matches!(ill, Ill::HalfFrame) {
                assert_eq!(error.code(), Code::DeadlineExceeded, "{method}, {ill:?}: {}", error.report());
                assert!(error.report().contains("the guest's answer to: "), "{}", error.report());
            }
            // The next call is made over another connection, where the guest is as good as before.
            node.ways.well(method);
            if !CHANGES.contains(&method) {
                call(method, &container, 10 * number + 1).await.unwrap_or_else(|error| panic!("{method}: {}", error.report()));
            }
            if method == "Exec" {
                break;
            }
        }
    }
    node.remove().await;
}

/// A list of all containers' statistics waits for a stuck guest once, and briefly.
#[tokio::test]
async fn numbers_of_a_stuck_guest_are_the_last_that_are_known() {
    let Some(node) = Node::new("numbers_of_a_stuck_guest_are_the_last_that_are_known").await else { return };
    let (_, container) = node.running(Stdio::default()).await;
    let brief = Duration::from_secs(3);
    // Nothing is known yet.
    node.ways.ill("Stats", Ill::Silence);
    node.ways.ill("Pids", Ill::Silence);
    node.ways.ill("SetTime", Ill::Silence);
    let since = Instant::now();
    let error = container.stats().await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{}", error.report());
    assert!(since.elapsed() < brief, "{:?}", since.elapsed());
    // From now on it is not waited for.
    let since = Instant::now();
    for _ in 0..10 {
        assert_eq!(container.stats().await.unwrap_err().code(), Code::Unavailable);
        assert_eq!(container.pids().await.unwrap().len(), 1);
    }
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    // Whatever it answers ends that.
    for method in ["Stats", "Pids", "SetTime"] {
        node.ways.well(method);
    }
    container.update(json!({"cpu": {"shares": 2}})).await.unwrap();
    let known = container.stats().await.unwrap();
    container.pids().await.unwrap();
    // Stuck again, and now there is something to tell.
    for method in ["Stats", "Pids", "SetTime"] {
        node.ways.ill(method, Ill::Silence);
    }
    let since = Instant::now();
    for _ in 0..10 {
        assert_eq!(container.stats().await.unwrap(), known);
    }
    assert!(since.elapsed() < brief, "{:?}", since.elapsed());
    container.pids().await.unwrap();
    assert!(since.elapsed() < 2 * brief, "{:?}", since.elapsed());
    node.remove().await;
}

#[tokio::test]
async fn a_guest_that_floods_is_not_listened_to_any_more() {
    let Some(node) = Node::new("a_guest_that_floods_is_not_listened_to_any_more").await else { return };
    let (pod, container) = node.running(Stdio::default()).await;
    let before = resident_kib();
    node.ways.ill("Stats", Ill::Flood);
    let words = "it has sent more than a guest has to say, and is not listened to any more; delete the pod";
    for method in ["Stats", "Pids", "Update"] {
        let report = timeout(SOON, call(method, &container, 0)).await.unwrap().unwrap_err().report();
        assert!(report.contains(words), "{method}: {report}");
    }
    assert!(resident_kib() < before + (64 << 10), "{} KiB after {before}", resident_kib());
    // Its container cannot be killed, so the machine is.
    container.kill(None, libc::SIGKILL, true).await.unwrap();
    assert_eq!(timeout(SOON, container.wait(None)).await.unwrap().unwrap().status, 137);
    assert!(timeout(SOON, pod.wait()).await.is_ok());
    let gone = pod.status().await.unwrap().detail["ended"].as_str().unwrap().to_owned();
    assert!(gone.starts_with("container c cannot be killed: ") && gone.contains(words), "{gone}");
    node.remove().await;
}

#[tokio::test]
async fn containers_that_do_not_die_take_their_machines_along() {
    for (ill, why) in [
        (Ill::Silence, "container c cannot be killed: the guest's answer to: send a signal, did not finish within 30 s"),
        (Ill::HangUp, "container c cannot be killed: the guest's agent is unavailable"),
        (Ill::Answer(Vec::new()), "container c has not ended within 30 s of being killed"),
    ] {
        let Some(node) = Node::new("containers_that_do_not_die_take_their_machines_along").await else { return };
        let (pod, container) = node.running(Stdio::default()).await;
        node.ways.ill("Signal", ill.clone());
        let killed = async {
            container.kill(None, libc::SIGKILL, true).await?;
            container.wait(None).await
        };
        let exit = patiently(killed).await.unwrap();
        assert_eq!(exit.status, 137, "{ill:?}");
        let detail = pod.status().await.unwrap().detail;
        assert!(detail["ended"].as_str().unwrap().starts_with(why), "{ill:?}: {detail}");
        node.remove().await;
    }
}

#[tokio::test]
async fn machines_that_die_in_a_call() {
    for method in ["CreateContainer", "StartContainer", "Stats", "Exec", "Signal", "Delete", "ShutDown"] {
        let Some(node) = Node::new("machines_that_die_in_a_call").await else { return };
        let pod = node.start().await.unwrap();
        node.ways.ill(method, Ill::Death(0, "the agent cannot go on\n"));
        let work = async {
            pod.create_container(node.container_spec(Stdio::default())).await?;
            let container = node.container()?;
            container.start(None).await?;
            for method in ["Stats", "Exec", "Signal"] {
                call(method, &container, 0).await?;
            }
            Ok(())
        };
        let done: Result<()> = timeout(SOON, work).await.expect("a call without end");
        let why = "it switched itself off; last on its console: the agent cannot go on; kubelet starts the pod anew";
        match done {
            // These come later.
            Ok(()) => assert!(["Delete", "ShutDown"].contains(&method), "{method}"),
            // When the container's end is known before the call's, its last numbers are the answer, and the next call finds it stopped.
            Err(error) if method == "Stats" && error.report().contains("it is stopped") => {}
            Err(error) if method == "Signal" => assert_eq!(error.code(), Code::NotFound, "{}", error.report()),
            Err(error) => {
                let report = error.report();
                assert!(report.starts_with(&format!("the pod's virtual machine is unavailable: {why}")), "{method}: {report}");
                assert_eq!(error.code(), Code::Unavailable);
            }
        }
        node.remove().await;
    }
}

#[tokio::test]
async fn output_other_than_was_told() {
    for (output, told, least) in [
        (Output::Bytes(100), 10, 10),
        (Output::Endless, 5, 5),
        (Output::None, u64::MAX >> 1, 0),
        (Output::Silence, 5, 0),
        (Output::Garbage, 5, 0),
    ] {
        let Some(node) = Node::new("output_other_than_was_told").await else { return };
        node.ways.output(output, told);
        let log = node.dir.path().join("log");
        let stdio = Stdio { stdout: format!("file://{}", log.display()), ..Stdio::default() };
        let (_, container) = node.running(stdio).await;
        if least > 0 {
            until("the output", || fs::metadata(&log).is_ok_and(|log| log.len() >= least)).await;
        }
        let ended = async {
            container.kill(None, libc::SIGTERM, false).await?;
            container.wait(None).await
        };
        // Nothing is waited for that may never come.
        let exit = timeout(SOON, ended).await.unwrap_or_else(|_| panic!("{output:?}: the exit is not told")).unwrap();
        assert_eq!(exit.status, 3, "{output:?}");
        node.remove().await;
    }
}

#[tokio::test]
async fn events_are_believed_of_own_containers_and_not_faster_than_they_can_be() {
    let Some(mut node) = Node::new("events_are_believed_of_own_containers_and_not_faster_than_they_can_be").await else {
        return;
    };
    let names: Vec<&str> = ["c", "another", "../c", ""].into_iter().cycle().take(10_000).collect();
    node.ways.ill("Events", Ill::Answer(out_of_memory(&names)));
    let _ = node.running(Stdio::default()).await;
    // What is measured is how many come in that time.
    tokio::time::sleep(Duration::from_millis(500)).await;
    node.remove().await;
    let mut told = 0;
    while let Ok(sent) = node.events.try_recv() {
        if sent.event.kind == EventKind::OutOfMemory {
            assert_eq!(sent.event.container.as_str(), "c");
            told += 1;
        }
    }
    // Nobody has taken it, so it stands for all that followed.
    assert_eq!(told, 1);
}
