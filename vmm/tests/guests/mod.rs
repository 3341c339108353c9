//! A hypervisor whose guests are tasks of the test, and do what a test wants: above all what no guest should.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use kuasar_guest_protocol::{
    PORT, STREAM_PORT, VERSION,
    agent::{
        EventsResponse, HelloResponse, OnlineResponse, Pid, PidsResponse, ProcessRequest, SignalRequest, StateResponse,
        StatsResponse, WaitResponse, events_response::Event, events_response::event::Kind, state_response::State,
    },
    stream::{ACCEPTED, StreamHeader},
};
use kuasar_sandboxers::{Error, Result, cgroup::Stats, process::Ending, types::Exit, undo::Undo};
use kuasar_vmm::{
    hypervisor::{Capabilities, Hypervisor, Place, Vm, VsockWays},
    spec::{Disk, VmSpec, Vsock, VsockAddress},
};
use protobuf::Message;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    runtime::Handle,
    sync::{Mutex as AsyncMutex, watch},
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;
use ttrpc::{Code, MessageHeader, Request, Response, Status};

/// What a guest does instead of answering a call.
#[derive(Clone, Debug)]
pub(crate) enum Ill {
    Silence,
    HangUp,
    /// Bytes that are no frame.
    Garbage,
    /// A frame that is announced and not finished.
    HalfFrame,
    /// A frame of 4 GiB is announced.
    HugeFrame,
    /// Frames without end that nobody has asked for.
    Flood,
    /// The answer to another question.
    Stray,
    /// A payload that cannot be decoded.
    WrongType,
    /// An error, with this text.
    Refusal(String),
    /// This payload.
    Answer(Vec<u8>),
    /// The VMM ends, after this has been said on the console.
    Death(u32, &'static str),
}

/// What a connection to the guest's port of streams brings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Output {
    /// Nothing.
    #[default]
    None,
    /// As much as is taken.
    Endless,
    /// So many bytes.
    Bytes(usize),
    /// No answer to the header.
    Silence,
    /// Something else than an answer.
    Garbage,
}

/// How guests behave from now on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ways(Arc<Mutex<Behaviour>>);

#[derive(Debug, Default)]
struct Behaviour {
    ills: HashMap<&'static str, Ill>,
    output: Output,
    told: u64,
    connects: Option<Ill>,
    /// Where machines live that outlive a daemon, and those that do.
    outside: Option<Handle>,
    machines: HashMap<PathBuf, Arc<FakeVm>>,
}

impl Ways {
    /// Answers calls of a method so.
    pub(crate) fn ill(&self, method: &'static str, ill: Ill) {
        self.0.lock().unwrap().ills.insert(method, ill);
    }

    pub(crate) fn well(&self, method: &'static str) {
        self.0.lock().unwrap().ills.remove(method);
    }

    /// What processes print, and how much of it the guest tells with their end.
    pub(crate) fn output(&self, output: Output, told: u64) {
        let mut behaviour = self.0.lock().unwrap();
        (behaviour.output, behaviour.told) = (output, told);
    }

    /// Answers connections so, before any call.
    pub(crate) fn connects(&self, ill: Ill) {
        self.0.lock().unwrap().connects = Some(ill);
    }

    /// Has machines live on when their daemon's runtime ends, as tasks of this one.
    pub(crate) fn outlive(&self, runtime: Handle) {
        self.0.lock().unwrap().outside = Some(runtime);
    }

    fn of(&self, method: &str) -> Option<Ill> {
        self.0.lock().unwrap().ills.get(method).cloned()
    }
}

/// The hypervisor.
#[derive(Debug)]
pub(crate) struct Fake {
    capabilities: Capabilities,
    ways: Ways,
}

impl Fake {
    pub(crate) fn new(ways: Ways) -> Self {
        let none = || Err("there is nothing to add it to".to_owned());
        let capabilities = Capabilities {
            name: "Fake 1.0".into(),
            emulated: false,
            vsock: VsockWays { kernel: false, user: false, builtin: true },
            hot_disks: none(),
            max_hot_disks: 0,
            hot_cpus: none(),
            hot_memory: none(),
            overhead_mib: 0,
        };
        Self { capabilities, ways }
    }
}

#[async_trait]
impl Hypervisor for Fake {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn start(&self, spec: VmSpec, _place: Place, undo: &mut Undo) -> Result<Arc<dyn Vm>> {
        let Vsock::Builtin { socket, .. } = spec.vsock else { return Err(Error::invalid("vsock", "not its own")) };
        let listener = UnixListener::bind(&socket).map_err(Error::io("listen on", &socket))?;
        let guest = Guest { ways: self.ways.clone(), console: spec.console, ..Guest::default() };
        let outside = self.ways.0.lock().unwrap().outside.clone();
        let runtime = outside.clone().unwrap_or_else(Handle::current);
        let listener = listener.into_std().map_err(Error::failed("make the listener anybody's"))?;
        let serving = AbortOnDropHandle::new(runtime.spawn(guest.clone().serve(listener)));
        let vm = Arc::new(FakeVm { guest, socket: socket.clone(), serving: Mutex::new(Some(serving)) });
        if outside.is_some() {
            self.ways.0.lock().unwrap().machines.insert(socket, vm.clone());
        }
        let undone = vm.clone();
        undo.push("kill it", async move { undone.kill().await });
        Ok(vm)
    }

    /// A machine that outlives daemons, or one that has ended: its task was the earlier daemon's.
    async fn adopt(&self, record: Value, _place: Place) -> Result<Arc<dyn Vm>> {
        if let Some(vm) = self.ways.0.lock().unwrap().machines.get(Path::new(record.as_str().unwrap())) {
            return Ok(vm.clone());
        }
        let guest = Guest::default();
        guest.ending.tell(Exit::now(137));
        Ok(Arc::new(FakeVm { guest, socket: record.as_str().unwrap().into(), serving: Mutex::default() }))
    }
}

#[derive(Debug)]
struct FakeVm {
    guest: Guest,
    socket: PathBuf,
    serving: Mutex<Option<AbortOnDropHandle<()>>>,
}

#[async_trait]
impl Vm for FakeVm {
    fn record(&self) -> Value {
        json!(self.socket)
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    fn vsock(&self) -> VsockAddress {
        VsockAddress::Hybrid(self.socket.clone())
    }

    async fn add_disk(&self, _disk: &Disk) -> Result<()> {
        Ok(())
    }

    async fn remove_disk(&self, _serial: &str) -> Result<()> {
        Ok(())
    }

    async fn disks(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn set_cpus(&self, _count: u32) -> Result<()> {
        Ok(())
    }

    async fn set_memory(&self, mib: u64) -> Result<u64> {
        Ok(mib)
    }

    async fn pause(&self) -> Result<()> {
        Ok(())
    }

    async fn resume(&self) -> Result<()> {
        Ok(())
    }

    async fn kill(&self) -> Result<()> {
        self.serving.lock().unwrap().take();
        self.guest.ending.tell(Exit::now(137));
        Ok(())
    }

    async fn exited(&self) -> Exit {
        self.guest.ending.wait().await
    }

    fn last_words(&self) -> Option<String> {
        None
    }
}

/// The guest: what of it is more than answers.
#[derive(Clone, Debug)]
struct Guest {
    ways: Ways,
    console: PathBuf,
    ending: Arc<Ending>,
    /// Processes that have ended, as `container/exec`.
    ended: Arc<watch::Sender<BTreeSet<String>>>,
}

impl Default for Guest {
    fn default() -> Self {
        let ended = Arc::new(watch::channel(BTreeSet::new()).0);
        Self { ways: Ways::default(), console: PathBuf::new(), ending: Arc::new(Ending::pending()), ended }
    }
}

fn key(container: &str, exec: &str) -> String {
    format!("{container}/{exec}")
}

impl Guest {
    /// Takes connections with the hybrid protocol, until the machine ends, which breaks all of them.
    async fn serve(self, listener: std::os::unix::net::UnixListener) {
        let listener = UnixListener::from_std(listener).unwrap();
        let mut connections = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (guest, (stream, _)) = (self.clone(), accepted.unwrap());
                    connections.spawn(async move {
                        // The host goes away when it likes.
                        let _ = guest.connection(stream).await;
                    });
                }
                _ = self.ending.wait() => return,
            }
        }
    }

    async fn connection(self, mut stream: UnixStream) -> std::io::Result<()> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(stream.read_u8().await?);
        }
        let connects = self.ways.0.lock().unwrap().connects.clone();
        match connects {
            Some(Ill::Silence) => return std::future::pending().await,
            Some(Ill::Garbage) => return stream.write_all(&[b'x'; 4096]).await,
            Some(_) => return Ok(()),
            None => stream.write_all(b"OK 1\n").await?,
        }
        let line = String::from_utf8_lossy(&line);
        match line.trim().strip_prefix("CONNECT ").and_then(|port| port.parse().ok()) {
            Some(PORT) => {
                let (read, write) = stream.into_split();
                self.calls(read, Arc::new(AsyncMutex::new(write))).await
            }
            Some(STREAM_PORT) => self.stream(stream).await,
            _ => Ok(()),
        }
    }

    async fn stream(self, mut stream: UnixStream) -> std::io::Result<()> {
        let mut header = vec![0; 2];
        stream.read_exact(&mut header).await?;
        while StreamHeader::decode(&header).unwrap().is_none() {
            header.push(stream.read_u8().await?);
        }
        let output = self.ways.0.lock().unwrap().output;
        let answer = match output {
            Output::Silence => return std::future::pending().await,
            Output::Garbage => 77,
            Output::None | Output::Endless | Output::Bytes(_) => ACCEPTED,
        };
        stream.write_all(&[answer]).await?;
        match output {
            Output::Endless => loop {
                stream.write_all(&[b'x'; 4096]).await?;
            },
            Output::Bytes(count) => stream.write_all(&vec![b'x'; count]).await?,
            Output::None | Output::Silence | Output::Garbage => {}
        }
        // The guest never closes first.
        std::future::pending().await
    }

    async fn calls(self, mut read: OwnedReadHalf, write: Arc<AsyncMutex<OwnedWriteHalf>>) -> std::io::Result<()> {
        let mut asked = tokio::task::JoinSet::new();
        loop {
            let mut header = [0; 10];
            read.read_exact(&mut header).await?;
            let header = MessageHeader::from(header);
            let mut payload = vec![0; header.length as usize];
            read.read_exact(&mut payload).await?;
            let request = Request::parse_from_bytes(&payload).unwrap();
            if let Some(Ill::HangUp) = self.ways.of(&request.method) {
                return Ok(());
            }
            let (guest, write) = (self.clone(), write.clone());
            asked.spawn(async move {
                // The host goes away when it likes.
                let _ = guest.call(header.stream_id, request, &write).await;
            });
        }
    }

    async fn call(self, id: u32, request: Request, write: &AsyncMutex<OwnedWriteHalf>) -> std::io::Result<()> {
        let Some(ill) = self.ways.of(&request.method) else {
            let payload = self.answer(&request).await;
            return write.lock().await.write_all(&frame(id, Response { payload, ..Response::default() })).await;
        };
        match ill {
            Ill::Silence | Ill::HangUp => std::future::pending().await,
            Ill::Garbage => write.lock().await.write_all(&[0xa5; 64 << 10]).await,
            Ill::HalfFrame => {
                let whole = frame(id, Response { payload: vec![1; 100], ..Response::default() });
                write.lock().await.write_all(&whole[..50]).await?;
                std::future::pending().await
            }
            Ill::HugeFrame => {
                write.lock().await.write_all(&Vec::from(MessageHeader::new_response(id, u32::MAX))).await?;
                std::future::pending().await
            }
            Ill::Flood => {
                let stray = frame(id + 2000, Response { payload: vec![0; 1 << 20], ..Response::default() });
                loop {
                    write.lock().await.write_all(&stray).await?;
                }
            }
            Ill::Stray => {
                write.lock().await.write_all(&frame(id + 2000, Response::default())).await?;
                std::future::pending().await
            }
            Ill::WrongType => {
                write.lock().await.write_all(&frame(id, Response { payload: vec![0xff; 100], ..Response::default() })).await
            }
            Ill::Refusal(message) => {
                let mut status = Status::new();
                status.set_code(Code::INTERNAL);
                status.set_message(message);
                write.lock().await.write_all(&frame(id, Response { status: Some(status).into(), ..Response::default() })).await
            }
            Ill::Answer(payload) => write.lock().await.write_all(&frame(id, Response { payload, ..Response::default() })).await,
            Ill::Death(status, words) => {
                let mut console = fs::File::options().append(true).open(&self.console).unwrap();
                console.write_all(words.as_bytes()).unwrap();
                self.ending.tell(Exit::now(status));
                Ok(())
            }
        }
    }

    /// What a guest answers that is as it should be.
    async fn answer(&self, request: &Request) -> Vec<u8> {
        let pid = Pid { pid: 7, ..Pid::default() }.write_to_bytes();
        match request.method.as_str() {
            "Hello" => hello(VERSION, "fake"),
            "CreateContainer" | "StartContainer" | "Exec" => pid.unwrap(),
            "State" => {
                StateResponse { state: State::RUNNING.into(), pid: 7, ..StateResponse::default() }.write_to_bytes().unwrap()
            }
            "Signal" => {
                let asked = SignalRequest::parse_from_bytes(&request.payload).unwrap();
                self.ended.send_modify(|ended| ended.extend([key(&asked.container, &asked.exec)]));
                Vec::new()
            }
            "Wait" => {
                let asked = ProcessRequest::parse_from_bytes(&request.payload).unwrap();
                let key = key(&asked.container, &asked.exec);
                self.ended.subscribe().wait_for(|ended| ended.contains(&key)).await.unwrap();
                let stdout_bytes = self.ways.0.lock().unwrap().told;
                WaitResponse { status: 3, stdout_bytes, ..WaitResponse::default() }.write_to_bytes().unwrap()
            }
            "Pids" => PidsResponse::default().write_to_bytes().unwrap(),
            "Stats" => {
                let stats = serde_json::to_vec(&Stats::V2(Box::default())).unwrap();
                StatsResponse { stats, ..StatsResponse::default() }.write_to_bytes().unwrap()
            }
            "Online" => OnlineResponse::default().write_to_bytes().unwrap(),
            "Events" => std::future::pending().await,
            "ShutDown" => {
                self.ending.tell(Exit::now(0));
                Vec::new()
            }
            _ => Vec::new(),
        }
    }
}

fn frame(id: u32, response: Response) -> Vec<u8> {
    let payload = response.write_to_bytes().unwrap();
    let mut bytes = Vec::from(MessageHeader::new_response(id, u32::try_from(payload.len()).unwrap()));
    bytes.extend(payload);
    bytes
}

/// A hello's answer.
pub(crate) fn hello(version: u32, agent: &str) -> Vec<u8> {
    HelloResponse { version, agent: agent.into(), ..HelloResponse::default() }.write_to_bytes().unwrap()
}

/// An answer with events of these containers, all of the same kind.
pub(crate) fn out_of_memory(containers: &[&str]) -> Vec<u8> {
    let event = |container: &&str| Event {
        number: 1,
        container: (*container).to_owned(),
        kind: Kind::OUT_OF_MEMORY.into(),
        ..Event::default()
    };
    EventsResponse { events: containers.iter().map(event).collect(), ..EventsResponse::default() }.write_to_bytes().unwrap()
}

/// Waits for something that comes soon.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("waited in vain for {what}");
}

/// A program that is a script.
pub(crate) fn script(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}
