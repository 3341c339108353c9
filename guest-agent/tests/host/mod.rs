//! The host's side, as far as tests need it, and containers to run.
#![allow(dead_code, unreachable_pub)] // each test program uses its part
#![allow(clippy::unwrap_used)] // a test may

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream as BlockingStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kuasar_guest_protocol::{
    STREAM_PORT,
    agent::{ContainerRequest, CreateContainerRequest, ExecRequest, ProcessRequest, SignalRequest, Streams, WaitResponse},
    agent_ttrpc::AgentClient,
    stream::{ACCEPTED, StreamHeader, StreamKind},
};
use kuasar_sandboxers::busybox;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{sleep, timeout},
};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context::{Context, with_duration},
};

/// Longest time any one thing in a test may take; an emulated machine on a busy host is slow.
pub const LIMIT: Duration = Duration::from_secs(60);

/// What a call is given.
pub fn call() -> Context {
    with_duration(LIMIT)
}

/// The agent, on unix sockets or behind a hybrid vsock.
#[derive(Clone)]
pub struct Agent {
    pub client: AgentClient,
    place: Place,
}

#[derive(Clone)]
pub enum Place {
    /// Sockets `1024`, `1025` and `1026` in a directory.
    Directory(PathBuf),
    /// `CONNECT <port>` on a socket.
    Hybrid(PathBuf),
}

impl Place {
    /// Connects to a port, once the agent is there.
    pub async fn connect(&self, port: u32) -> UnixStream {
        let deadline = Instant::now() + LIMIT;
        loop {
            let tried = match self {
                Self::Directory(dir) => UnixStream::connect(dir.join(port.to_string())).await,
                Self::Hybrid(socket) => {
                    let socket = socket.clone();
                    tokio::task::spawn_blocking(move || hybrid(&socket, port)).await.unwrap()
                }
            };
            match tried {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "port {port} does not answer: {error}"),
            }
            sleep(Duration::from_millis(5)).await;
        }
    }
}

fn hybrid(socket: &Path, port: u32) -> std::io::Result<UnixStream> {
    let mut stream = BlockingStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // A byte at a time: what follows is not this function's.
    let mut line = String::new();
    let mut reader = BufReader::with_capacity(1, &stream);
    reader.read_line(&mut line)?;
    if !line.starts_with("OK ") {
        return Err(std::io::Error::other(format!("{line:?}")));
    }
    stream.set_read_timeout(None)?;
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

impl Agent {
    /// Connects to the agent's calls.
    pub async fn connect(place: Place) -> Self {
        let stream = place.connect(kuasar_guest_protocol::PORT).await;
        Self { client: AgentClient::new(Client::new(Socket::new(stream))), place }
    }

    /// Another connection.
    pub async fn again(&self) -> Self {
        Self::connect(self.place.clone()).await
    }

    /// A connection to the stream port on which nothing has been said.
    pub async fn raw_stream(&self) -> UnixStream {
        self.place.connect(STREAM_PORT).await
    }

    /// Opens a stream; `None` when it is refused.
    pub async fn stream(&self, container: &str, exec: &str, kind: StreamKind) -> Option<UnixStream> {
        let mut stream = self.raw_stream().await;
        let header = StreamHeader { container: container.into(), exec: exec.into(), kind }.encode().unwrap();
        stream.write_all(&header).await.unwrap();
        let mut answer = [0];
        timeout(LIMIT, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        (answer[0] == ACCEPTED).then_some(stream)
    }

    pub async fn create(&self, id: &str, spec: &Value, streams: Streams) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            id: id.into(),
            spec: spec.to_string().into_bytes(),
            streams: Some(streams).into(),
            ..Default::default()
        };
        self.client.create_container(call(), &request).await.map(|made| made.pid)
    }

    pub async fn start(&self, id: &str) -> ttrpc::Result<u32> {
        let request = ContainerRequest { container: id.into(), ..Default::default() };
        self.client.start_container(call(), &request).await.map(|started| started.pid)
    }

    pub async fn exec(&self, container: &str, exec: &str, process: &Value, streams: Streams) -> ttrpc::Result<u32> {
        let request = ExecRequest {
            container: container.into(),
            exec: exec.into(),
            process: process.to_string().into_bytes(),
            streams: Some(streams).into(),
            in_guest: container.is_empty(),
            ..Default::default()
        };
        self.client.exec(call(), &request).await.map(|started| started.pid)
    }

    pub async fn wait(&self, container: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        self.client.wait(call(), &process_request(container, exec)).await
    }

    pub async fn kill(&self, container: &str, exec: &str, signal: u32) -> ttrpc::Result<()> {
        let request = SignalRequest { container: container.into(), exec: exec.into(), signal, ..Default::default() };
        self.client.signal(call(), &request).await.map(drop)
    }

    pub async fn delete(&self, container: &str, exec: &str) -> ttrpc::Result<()> {
        self.client.delete(call(), &process_request(container, exec)).await.map(drop)
    }

    /// Runs a script in a container to its end; what it printed, and its status.
    pub async fn run(&self, container: &str, exec: &str, script: &str) -> (String, u32) {
        let process = process(&["sh", "-c", script]);
        self.exec(container, exec, &process, Streams { stdout: true, ..Default::default() }).await.unwrap();
        let mut stream = self.stream(container, exec, StreamKind::Stdout).await.unwrap();
        let end = self.wait(container, exec).await.unwrap();
        let said = exactly(&mut stream, end.stdout_bytes).await;
        drop(stream);
        self.delete(container, exec).await.unwrap();
        (String::from_utf8_lossy(&said).into_owned(), end.status)
    }
}

pub fn process_request(container: &str, exec: &str) -> ProcessRequest {
    ProcessRequest { container: container.into(), exec: exec.into(), ..Default::default() }
}

/// Reads that many bytes.
pub async fn exactly(stream: &mut UnixStream, count: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(count).unwrap()];
    let mut come = 0;
    while come < bytes.len() {
        match timeout(LIMIT, stream.read(&mut bytes[come..])).await {
            Ok(Ok(length @ 1..)) => come += length,
            end => panic!("{come} of {count} bytes came, then {end:?}"),
        }
    }
    bytes
}

/// An OCI process.
pub fn process(args: &[&str]) -> Value {
    let mut process = busybox::process(args);
    // Not this machine's.
    process["apparmorProfile"] = "cri-containerd.apparmor.d".into();
    process
}

/// A specification as the host sends it.
pub fn spec(rootfs: &Path, process: Value) -> Value {
    let mut spec = busybox::oci(process, None, "kubepods-pod1.slice:cri-containerd:abc");
    spec["root"]["path"] = json!(rootfs);
    let more = [
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
        json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]}),
    ];
    spec["mounts"].as_array_mut().unwrap().extend(more);
    spec
}
