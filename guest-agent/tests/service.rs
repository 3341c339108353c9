//! The agent's calls and streams on this host, as root, with real containers; unix sockets stand for vsock ports.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may

mod host;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::join_all;
use host::{Agent, LIMIT, Place as Connecting, call, exactly, process, process_request, spec};
use kuasar_guest_agent::{Guest, Listener, Place, Ports, serve};
use kuasar_guest_protocol::{
    agent::{
        ContainerRequest, Empty, EventsRequest, HelloRequest, ResizeRequest, SetUpRequest, SignalRequest, Streams,
        UpdateRequest, state_response::State,
    },
    stream::StreamKind,
};
use kuasar_runc::{Runtime, RuntimeChoice};
use kuasar_sandboxers::{busybox, cgroup::Cgroup, reaper::Reaper};
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::TestRunner,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    sync::watch,
    time::{sleep, timeout},
};

const CGROUP: &str = "/kuasar-guest-agent-test";

/// An agent that serves.
struct Serving {
    dir: tempfile::TempDir,
    rootfs: PathBuf,
    guest: Guest,
    agent: Agent,
    _booted: watch::Sender<bool>,
}

impl Serving {
    async fn start(runtime: Runtime, reaper: Reaper) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs");
        busybox::make_rootfs(&rootfs).unwrap();
        let listen = |port: u32| Listener::Unix(UnixListener::bind(dir.path().join(port.to_string())).unwrap());
        let ports = Ports { calls: listen(1024), streams: listen(1025), forward: listen(1026) };
        let (booted, boot) = watch::channel(true);
        let place = Place { root: dir.path().join("run"), cgroup: CGROUP.into(), machine: false, debug: false };
        let guest = Guest::new(place, runtime, reaper, boot, 7);
        tokio::spawn(serve(guest.clone(), ports));
        let agent = Agent::connect(Connecting::Directory(dir.path().to_owned())).await;
        Self { dir, rootfs, guest, agent, _booted: booted }
    }

    fn spec(&self, args: &[&str]) -> Value {
        spec(&self.rootfs, process(args))
    }

    /// A container that lives until it is killed.
    async fn container(&self, id: &str) {
        self.agent.create(id, &self.spec(&["sleep", "1000"]), Streams::default()).await.unwrap();
        self.agent.start(id).await.unwrap();
    }

    async fn end(&self, id: &str) {
        self.agent.kill(id, "", 9).await.unwrap();
        assert_eq!(self.agent.wait(id, "").await.unwrap().status, 137);
        self.agent.delete(id, "").await.unwrap();
    }

    fn assert_nothing_left(&self) {
        let left: Vec<_> = fs::read_dir(self.dir.path().join("run/containers"))
            .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn streams(names: &str) -> Streams {
    let has = |name| names.contains(name);
    Streams { stdin: has("in"), stdout: has("out"), stderr: has("err"), terminal: has("tty"), ..Default::default() }
}

fn code(error: &ttrpc::Error) -> ttrpc::Code {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("no status: {other}"),
    }
}

// One test for all: the reaper is one for the process, and takes every child of the process.
#[tokio::test(flavor = "multi_thread")]
async fn service() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIP service: containers take root");
        return;
    }
    if busybox::find().is_none() {
        eprintln!("SKIP service: no static busybox on PATH; install busybox-static");
        return;
    }
    let reaper = Reaper::install().unwrap();
    let runtime = match Runtime::find(&RuntimeChoice::Auto, &reaper).await {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("SKIP service: {}", error.report());
            return;
        }
    };
    println!("with {runtime}");
    // What a run that failed has left does not fail this one too.
    let group = Cgroup::at(Path::new(CGROUP)).unwrap();
    group.kill().await.unwrap();
    group.remove().await.unwrap();
    let serving = Serving::start(runtime, reaper).await;
    before_set_up(&serving).await;
    let request = SetUpRequest { hostname: "pod".into(), ..Default::default() };
    serving.agent.client.set_up(call(), &request).await.unwrap();
    serving.agent.client.set_up(call(), &request).await.unwrap();
    macro_rules! cases {
        ($($case:ident),* $(,)?) => {$(
            println!("  {}", stringify!($case));
            $case(&serving).await;
            serving.assert_nothing_left();
        )*};
    }
    cases![
        output_and_its_totals,
        a_burst_before_the_end,
        input,
        twenty_mebibytes_both_ways,
        standard_error_is_apart,
        terminals,
        a_replaced_stream,
        output_that_nobody_takes,
        a_process_left_behind,
        ending_output_from_this_side,
        repeated_calls,
        calls_whose_connection_is_lost,
        wrong_requests,
        resources_and_signals,
        processes_beside_the_containers,
        garbage_on_the_stream_port,
        garbage_on_the_call_port,
    ];
    serving.guest.end().await.unwrap();
    Cgroup::at(Path::new(CGROUP)).unwrap().remove().await.unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let dir = serving.dir.path().to_str().unwrap();
    assert!(!mounts.contains(dir), "still mounted: {mounts}");
}

async fn before_set_up(serving: &Serving) {
    let request = HelloRequest { version: kuasar_guest_protocol::VERSION, ..Default::default() };
    let told = serving.agent.client.hello(call(), &request).await.unwrap();
    assert!(!told.set_up && told.ready_us == 7 && !told.boot_id.is_empty() && !told.kernel.is_empty());
    let early = serving.agent.create("early", &serving.spec(&["true"]), Streams::default()).await.unwrap_err();
    assert_eq!(code(&early), ttrpc::Code::UNAVAILABLE);
    serving.assert_nothing_left();
}

async fn output_and_its_totals(serving: &Serving) {
    let agent = &serving.agent;
    agent.create("c", &serving.spec(&["sh", "-c", "cat /proc/self/cgroup; exit 7"]), streams("out")).await.unwrap();
    let state = agent.client.state(call(), &process_request("c", "")).await.unwrap();
    assert_eq!(state.state, State::CREATED.into());
    let group = std::fs::read_to_string(format!("/proc/{}/cgroup", state.pid)).unwrap();
    assert!(group.contains(&format!("{CGROUP}/c")), "{group}");
    let mut stdout = agent.stream("c", "", StreamKind::Stdout).await.unwrap();
    let pid = agent.start("c").await.unwrap();
    let end = agent.wait("c", "").await.unwrap();
    let said = exactly(&mut stdout, end.stdout_bytes).await;
    // It has a control group namespace: its own group is all it sees.
    let said = String::from_utf8_lossy(&said);
    assert!(!said.is_empty() && said.lines().all(|line| line.ends_with(":/")), "{said}");
    assert_eq!((end.status, end.stderr_bytes), (7, 0));
    assert!(end.ended_ns > 1_600_000_000_000_000_000);
    // The connection is the host's to close.
    assert!(timeout(Duration::from_millis(50), stdout.read(&mut [0])).await.is_err());
    let state = agent.client.state(call(), &process_request("c", "")).await.unwrap();
    assert_eq!((state.state, state.pid, state.status), (State::ENDED.into(), pid, 7));
    agent.delete("c", "").await.unwrap();
    assert!(agent.stream("c", "", StreamKind::Stdout).await.is_none());
}

async fn a_burst_before_the_end(serving: &Serving) {
    let agent = &serving.agent;
    let args = ["dd", "if=/dev/zero", "bs=1M", "count=8"];
    agent.create("c", &serving.spec(&args), streams("out")).await.unwrap();
    agent.start("c").await.unwrap();
    // The host comes late and reads late.
    let mut stdout = agent.stream("c", "", StreamKind::Stdout).await.unwrap();
    assert_eq!(exactly(&mut stdout, 8 << 20).await.len(), 8 << 20);
    assert_eq!(agent.wait("c", "").await.unwrap().stdout_bytes, 8 << 20);
    agent.delete("c", "").await.unwrap();
}

async fn input(serving: &Serving) {
    let agent = &serving.agent;
    agent.create("c", &serving.spec(&["sh", "-c", "cat; echo end"]), streams("in out")).await.unwrap();
    let mut stdout = agent.stream("c", "", StreamKind::Stdout).await.unwrap();
    let mut stdin = agent.stream("c", "", StreamKind::Stdin).await.unwrap();
    stdin.write_all(b"early ").await.unwrap();
    agent.start("c").await.unwrap();
    assert_eq!(exactly(&mut stdout, 6).await, b"early ");
    stdin.write_all(b"late\n").await.unwrap();
    // With a connection, that is what counts.
    agent.client.close_stdin(call(), &process_request("c", "")).await.unwrap();
    assert_eq!(exactly(&mut stdout, 5).await, b"late\n");
    drop(stdin);
    let end = agent.wait("c", "").await.unwrap();
    assert_eq!((end.status, end.stdout_bytes), (0, 15));
    assert_eq!(exactly(&mut stdout, 4).await, b"end\n");
    agent.delete("c", "").await.unwrap();
    // Without one, closing ends it.
    agent.create("c", &serving.spec(&["cat"]), streams("in")).await.unwrap();
    agent.start("c").await.unwrap();
    agent.client.close_stdin(call(), &process_request("c", "")).await.unwrap();
    assert_eq!(agent.wait("c", "").await.unwrap().status, 0);
    agent.delete("c", "").await.unwrap();
}

async fn twenty_mebibytes_both_ways(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    agent.exec("c", "cat", &process(&["cat"]), streams("in out")).await.unwrap();
    let bytes: Vec<u8> = (0..20u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut stdin = agent.stream("c", "cat", StreamKind::Stdin).await.unwrap();
    let mut stdout = agent.stream("c", "cat", StreamKind::Stdout).await.unwrap();
    let sending = bytes.clone();
    let sent = tokio::spawn(async move { stdin.write_all(&sending).await.unwrap() });
    assert!(exactly(&mut stdout, bytes.len() as u64).await == bytes, "the bytes are others");
    sent.await.unwrap();
    let end = agent.wait("c", "cat").await.unwrap();
    assert_eq!((end.status, end.stdout_bytes), (0, bytes.len() as u64));
    agent.delete("c", "cat").await.unwrap();
    serving.end("c").await;
}

async fn standard_error_is_apart(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    let script = process(&["sh", "-c", "echo out; echo error >&2"]);
    agent.exec("c", "e", &script, streams("out err")).await.unwrap();
    let mut stdout = agent.stream("c", "e", StreamKind::Stdout).await.unwrap();
    let mut stderr = agent.stream("c", "e", StreamKind::Stderr).await.unwrap();
    assert!(agent.stream("c", "e", StreamKind::Stdin).await.is_none());
    let end = agent.wait("c", "e").await.unwrap();
    assert_eq!((end.stdout_bytes, end.stderr_bytes), (4, 6));
    assert_eq!((exactly(&mut stdout, 4).await, exactly(&mut stderr, 6).await), (b"out\n".to_vec(), b"error\n".to_vec()));
    serving.end("c").await;
}

async fn terminals(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    let script = process(&["sh", "-c", "read line; stty size; echo got $line; cat; echo done"]);
    let mut script = script;
    script["terminal"] = json!(true);
    agent.exec("c", "t", &script, streams("in out tty")).await.unwrap();
    let size = ResizeRequest { container: "c".into(), exec: "t".into(), width: 123, height: 45, ..Default::default() };
    agent.client.resize(call(), &size).await.unwrap();
    let mut stdin = agent.stream("c", "t", StreamKind::Stdin).await.unwrap();
    let mut stdout = agent.stream("c", "t", StreamKind::Stdout).await.unwrap();
    stdin.write_all(b"word\n").await.unwrap();
    // The end of input is typed when its connection ends.
    drop(stdin);
    let end = agent.wait("c", "t").await.unwrap();
    let said = String::from_utf8(exactly(&mut stdout, end.stdout_bytes).await).unwrap();
    assert!(said.contains("45 123\r\n") && said.contains("got word\r\n") && said.contains("done\r\n"), "{said:?}");
    let wrong = ResizeRequest { width: 1 << 16, ..size };
    assert_eq!(code(&agent.client.resize(call(), &wrong).await.unwrap_err()), ttrpc::Code::INVALID_ARGUMENT);
    serving.end("c").await;
}

async fn a_replaced_stream(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    let script = process(&["sh", "-c", "echo one; read x; echo two; read x; echo three"]);
    agent.exec("c", "e", &script, streams("in out")).await.unwrap();
    let mut first = agent.stream("c", "e", StreamKind::Stdout).await.unwrap();
    assert_eq!(exactly(&mut first, 4).await, b"one\n");
    let mut second = agent.stream("c", "e", StreamKind::Stdout).await.unwrap();
    // The one before is closed.
    assert_eq!(timeout(LIMIT, first.read(&mut [0])).await.unwrap().unwrap(), 0);
    let _replaced = agent.stream("c", "e", StreamKind::Stdin).await.unwrap();
    let mut stdin = agent.stream("c", "e", StreamKind::Stdin).await.unwrap();
    stdin.write_all(b"\n").await.unwrap();
    assert_eq!(exactly(&mut second, 4).await, b"two\n");
    // A host that is gone for a while loses nothing that was not sent.
    drop(second);
    stdin.write_all(b"\n").await.unwrap();
    let mut third = agent.stream("c", "e", StreamKind::Stdout).await.unwrap();
    let end = agent.wait("c", "e").await.unwrap();
    assert!(end.stdout_bytes <= 6, "the total is that of the last connection");
    let said = exactly(&mut third, end.stdout_bytes).await;
    assert!(said == b"three\n" || said.is_empty(), "{said:?}");
    serving.end("c").await;
}

async fn output_that_nobody_takes(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    // Nothing to take.
    agent.exec("c", "silent", &process(&["true"]), streams("in out err")).await.unwrap();
    let waited = timeout(Duration::from_secs(5), agent.wait("c", "silent")).await.unwrap().unwrap();
    assert_eq!((waited.status, waited.stdout_bytes), (0, 0));
    // Something, and the host never comes: the answer does all the same.
    agent.exec("c", "loud", &process(&["echo", "x"]), streams("out")).await.unwrap();
    let waited = agent.wait("c", "loud").await.unwrap();
    assert_eq!((waited.status, waited.stdout_bytes), (0, 0));
    serving.end("c").await;
}

async fn a_process_left_behind(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    let script = process(&["sh", "-c", "(while [ ! -e /tmp/go ]; do sleep 0.05; done; echo late) & echo x"]);
    agent.exec("c", "e", &script, streams("out")).await.unwrap();
    let mut stdout = agent.stream("c", "e", StreamKind::Stdout).await.unwrap();
    let end = agent.wait("c", "e").await.unwrap();
    assert_eq!((end.status, end.stdout_bytes, end.more), (0, 2, true));
    assert_eq!(exactly(&mut stdout, 2).await, b"x\n");
    // What it prints later comes, too, and then the end.
    agent.run("c", "go", "echo >/tmp/go").await;
    let mut late = Vec::new();
    timeout(LIMIT, stdout.read_to_end(&mut late)).await.unwrap().unwrap();
    assert_eq!(late, b"late\n");
    let end = agent.wait("c", "e").await.unwrap();
    assert_eq!((end.stdout_bytes, end.more), (7, false));
    // Or it never ends, and goes with the exec.
    let script = process(&["sh", "-c", "sleep 500 & echo x"]);
    agent.exec("c", "forever", &script, streams("out")).await.unwrap();
    let mut stdout = agent.stream("c", "forever", StreamKind::Stdout).await.unwrap();
    assert!(agent.wait("c", "forever").await.unwrap().more);
    agent.delete("c", "forever").await.unwrap();
    timeout(LIMIT, stdout.read_to_end(&mut late)).await.unwrap().unwrap();
    serving.end("c").await;
}

async fn ending_output_from_this_side(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    agent.exec("c", "e", &process(&["sh", "-c", "echo one; sleep 0.2; echo two"]), streams("out")).await.unwrap();
    let mut stdout = agent.stream("c", "e", StreamKind::Stdout).await.unwrap();
    agent.client.end_output(call(), &process_request("c", "e")).await.unwrap();
    let mut all = Vec::new();
    timeout(LIMIT, stdout.read_to_end(&mut all)).await.unwrap().unwrap();
    assert_eq!(all, b"one\ntwo\n");
    assert_eq!(agent.wait("c", "e").await.unwrap().stdout_bytes, 8);
    serving.end("c").await;
}

async fn repeated_calls(serving: &Serving) {
    let agent = &serving.agent;
    let document = serving.spec(&["sleep", "1000"]);
    let first = agent.create("c", &document, streams("out")).await.unwrap();
    // The host did not hear the answer: it is made anew.
    let second = agent.create("c", &document, streams("out")).await.unwrap();
    assert_ne!(first, second);
    assert!(!Path::new(&format!("/proc/{first}")).exists(), "the earlier attempt still runs");
    // Several at once, as after deaths of the host's daemon; each finds the same.
    let starts = join_all((0..4).map(|_| agent.start("c"))).await;
    assert!(starts.into_iter().all(|pid| pid.unwrap() == second));
    assert_eq!(code(&agent.create("c", &document, streams("")).await.unwrap_err()), ttrpc::Code::ALREADY_EXISTS);
    let sleep = process(&["sleep", "1000"]);
    let execs = join_all((0..4).map(|_| agent.exec("c", "e", &sleep, Streams::default()))).await;
    let pids: Vec<u32> = execs.into_iter().map(|pid| pid.unwrap()).collect();
    assert!(pids.iter().all(|pid| *pid == pids[0] && *pid != 0), "{pids:?}");
    agent.kill("c", "e", 15).await.unwrap();
    assert_eq!(agent.wait("c", "e").await.unwrap().status, 143);
    assert_eq!(agent.wait("c", "e").await.unwrap().status, 143);
    assert_eq!(code(&agent.kill("c", "e", 15).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    for _ in 0..2 {
        agent.delete("c", "e").await.unwrap();
    }
    assert_eq!(code(&agent.wait("c", "e").await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    agent.kill("c", "", 9).await.unwrap();
    agent.wait("c", "").await.unwrap();
    let deletes = join_all((0..4).map(|_| agent.delete("c", ""))).await;
    assert!(deletes.into_iter().all(|deleted| deleted.is_ok()));
    agent.delete("never", "").await.unwrap();
    agent.delete("never", "either").await.unwrap();
}

async fn calls_whose_connection_is_lost(serving: &Serving) {
    let agent = serving.agent.again().await;
    let document = serving.spec(&["sleep", "1000"]);
    let lost = tokio::spawn(async move { agent.create("c", &document, Streams::default()).await });
    sleep(Duration::from_millis(5)).await;
    // The connection goes with its only user, while the container is being made.
    lost.abort();
    let _ = lost.await;
    let agent = &serving.agent;
    let state = agent.client.state(call(), &process_request("c", "")).await;
    // It was made to its end, or never asked for.
    if let Ok(state) = state {
        assert_eq!(state.state, State::CREATED.into());
    }
    agent.delete("c", "").await.unwrap();
}

async fn wrong_requests(serving: &Serving) {
    let agent = &serving.agent;
    let good = serving.spec(&["true"]);
    for id in ["", "..", "a/b", "-x", &"x".repeat(200)] {
        let error = agent.create(id, &good, Streams::default()).await.unwrap_err();
        assert!(matches!(code(&error), ttrpc::Code::INVALID_ARGUMENT), "{id:?}: {error}");
    }
    for document in [json!(null), json!({}), json!({"process": {}, "root": 1})] {
        let error = agent.create("c", &document, Streams::default()).await.unwrap_err();
        assert_eq!(code(&error), ttrpc::Code::INVALID_ARGUMENT, "{document}");
    }
    // The runtime's own words come through, and nothing is left.
    let error = agent.create("c", &serving.spec(&["no-such-program"]), streams("in out err")).await.unwrap_err();
    assert!(error.to_string().contains("no-such-program"), "{error}");
    serving.assert_nothing_left();
    serving.container("c").await;
    let error = agent.exec("c", "e", &process(&["no-such-program"]), streams("in out err")).await.unwrap_err();
    assert!(error.to_string().contains("no-such-program"), "{error}");
    assert_eq!(code(&agent.exec("c", "e", &json!(7), Streams::default()).await.unwrap_err()), ttrpc::Code::INVALID_ARGUMENT);
    assert_eq!(code(&agent.exec("d", "e", &process(&["true"]), Streams::default()).await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    assert_eq!(code(&agent.start("d").await.unwrap_err()), ttrpc::Code::NOT_FOUND);
    assert_eq!(code(&agent.kill("c", "", 999).await.unwrap_err()), ttrpc::Code::INVALID_ARGUMENT);
    serving.end("c").await;
}

async fn resources_and_signals(serving: &Serving) {
    let agent = &serving.agent;
    serving.container("c").await;
    agent.exec("c", "e", &process(&["sleep", "1000"]), Streams::default()).await.unwrap();
    let of = ContainerRequest { container: "c".into(), ..Default::default() };
    let pids = agent.client.pids(call(), &of).await.unwrap().processes;
    assert!(pids.len() == 2 && pids.iter().any(|process| process.exec == "e"), "{pids:?}");
    let stats = agent.client.stats(call(), &of).await.unwrap().stats;
    let stats: kuasar_sandboxers::cgroup::Stats = serde_json::from_slice(&stats).unwrap();
    println!("    {}", json!(stats).to_string().len());
    let resources = json!({"pids": {"limit": 77}}).to_string().into_bytes();
    let update = UpdateRequest { container: "c".into(), resources, ..Default::default() };
    agent.client.update(call(), &update).await.unwrap();
    agent.client.pause(call(), &of).await.unwrap();
    agent.client.resume(call(), &of).await.unwrap();
    let all = SignalRequest { container: "c".into(), signal: 9, all: true, ..Default::default() };
    agent.client.signal(call(), &all).await.unwrap();
    assert_eq!(agent.wait("c", "e").await.unwrap().status, 137);
    assert_eq!(agent.wait("c", "").await.unwrap().status, 137);
    agent.delete("c", "").await.unwrap();
    assert!(timeout(Duration::from_millis(20), agent.client.events(call(), &EventsRequest::default())).await.is_err());
    let told = agent.client.diagnose(call(), &Empty::default()).await.unwrap();
    assert!(told.sections.iter().any(|section| section.title == "processes" && section.text.contains("service")));
}

async fn processes_beside_the_containers(serving: &Serving) {
    let error = serving.agent.exec("", "e", &process(&["true"]), Streams::default()).await.unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::UNIMPLEMENTED);
    assert!(error.to_string().contains("kuasar.debug"), "{error}");
}

async fn garbage_on_the_stream_port(serving: &Serving) {
    let mut runner = TestRunner::default();
    let bytes = proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..600);
    for round in 0..200 {
        let mut bytes = bytes.new_tree(&mut runner).unwrap().current();
        if round % 2 == 0 && !bytes.is_empty() {
            bytes[0] = 1;
        }
        let mut stream = serving.agent.raw_stream().await;
        // The agent may have closed it already.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("neither answered nor closed");
        assert!(answer.is_empty() || answer == [0], "{answer:?}");
    }
    serving.container("c").await;
    serving.end("c").await;
}

async fn garbage_on_the_call_port(serving: &Serving) {
    let mut runner = TestRunner::default();
    let bytes = proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..600);
    for round in 0..100u8 {
        let mut bytes = bytes.new_tree(&mut runner).unwrap().current();
        // Half of them are frames of a plausible length, on a plausible stream.
        if round % 2 == 0 && bytes.len() > 10 {
            let length = u32::try_from(bytes.len() - 10).unwrap();
            bytes[..4].copy_from_slice(&length.to_be_bytes());
            bytes[4..10].copy_from_slice(&[0, 0, 0, 1, 1 + round % 3, 0]);
        }
        let mut stream = Connecting::Directory(serving.dir.path().to_owned()).connect(1024).await;
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let _ = timeout(LIMIT, stream.read_to_end(&mut Vec::new())).await.expect("the connection hangs");
    }
    serving.container("c").await;
    serving.end("c").await;
}
