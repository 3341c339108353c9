//! The Streaming service: stdio over the Task socket, as containerd 2.x does it.
#![allow(clippy::unwrap_used, clippy::expect_used)] // also in what is no test function

mod daemon;

use std::{io::Write, os::fd::OwnedFd, time::Duration};

use daemon::{Daemon, LONG};
use kuasar_sandboxers::fdstore::FdStore;
use kuasar_shim::proto::{
    containerd::services::streaming::v1::StreamInit,
    types::transfer::{Data, WindowUpdate},
};
use prost::Message;
use protobuf::well_known_types::any::Any;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    time::timeout,
};
use ttrpc::r#async::{CSReceiver, CSSender, Client, ClientStream};

const WINDOW: i32 = 64 << 10;

fn any(name: &str, message: &impl Message) -> Any {
    Any { type_url: name.into(), value: message.encode_to_vec(), ..Default::default() }
}

/// containerd's end of a stream, on a connection of its own.
struct Stream {
    _client: Client,
    sender: CSSender<Any>,
    receiver: CSReceiver<Any>,
}

impl Stream {
    async fn open_raw(daemon: &Daemon) -> Self {
        let client = daemon.client().await;
        let request = ttrpc::Request {
            service: "containerd.services.streaming.v1.Streaming".into(),
            method: "Stream".into(),
            ..Default::default()
        };
        let inner = client.new_stream(request, true, true).await.unwrap();
        let (sender, receiver) = ClientStream::<Any, Any>::new(inner).split();
        Self { _client: client, sender, receiver }
    }

    async fn open(daemon: &Daemon, id: &str) -> Self {
        let mut stream = Self::open_raw(daemon).await;
        // What becomes of Go's opening frame.
        stream.sender.send(&Any::default()).await.unwrap();
        let init = StreamInit { id: id.into() };
        stream.sender.send(&any("containerd.services.streaming.v1.StreamInit", &init)).await.unwrap();
        assert_eq!(stream.next().await.unwrap().type_url, "google.protobuf.Empty");
        stream
    }

    async fn next(&mut self) -> ttrpc::Result<Any> {
        timeout(LONG, self.receiver.recv()).await.expect("a message in time")
    }

    async fn grant(&self, update: i32) {
        self.sender.send(&any("containerd.types.transfer.WindowUpdate", &WindowUpdate { update })).await.unwrap();
    }

    async fn data(&mut self) -> Option<Vec<u8>> {
        match self.next().await {
            Ok(message) => {
                assert_eq!(message.type_url, "containerd.types.transfer.Data");
                Some(Data::decode(message.value.as_slice()).unwrap().data)
            }
            Err(ttrpc::Error::Eof) => None,
            Err(error) => panic!("{error:?}"),
        }
    }

    /// Reads as containerd's reader does: the window is opened again when less than all of it is left.
    async fn read_to_end(&mut self) -> Vec<u8> {
        let (mut all, mut window) = (Vec::new(), 0);
        loop {
            if window < WINDOW {
                self.grant(WINDOW).await;
                window += WINDOW;
            }
            let Some(data) = self.data().await else { return all };
            window -= i32::try_from(data.len()).unwrap();
            assert!(window >= 0, "more than was asked for");
            all.extend(data);
        }
    }

    async fn write(&self, data: &[u8]) {
        self.sender.send(&any("containerd.types.transfer.Data", &Data { data: data.to_vec() })).await.unwrap();
    }

    async fn window(&mut self) -> i32 {
        let message = self.next().await.unwrap();
        assert_eq!(message.type_url, "containerd.types.transfer.WindowUpdate");
        WindowUpdate::decode(message.value.as_slice()).unwrap().update
    }

    async fn refusal(&mut self) -> String {
        match self.next().await.unwrap_err() {
            ttrpc::Error::RpcStatus(status) => {
                assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT);
                status.message().to_owned()
            }
            other => panic!("{other:?}"),
        }
    }
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|number| u8::try_from(number % 251).unwrap()).collect()
}

fn writer(fd: OwnedFd) -> pipe::Sender {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    pipe::Sender::from_owned_fd(fd).unwrap()
}

fn reader(fd: OwnedFd) -> pipe::Receiver {
    nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    pipe::Receiver::from_owned_fd(fd).unwrap()
}

#[tokio::test]
async fn output_arrives_whole_and_ends() {
    let daemon = Daemon::start().await;
    // Opened before the process exists, as containerd does.
    let mut stream = Stream::open(&daemon, "c1-stdout").await;
    let process = daemon.hub.open_output("c1-stdout").unwrap().1;
    let sent = bytes(1 << 20);
    let copy = sent.clone();
    let writing = std::thread::spawn(move || std::fs::File::from(process).write_all(&copy).unwrap());
    assert!(stream.read_to_end().await == sent);
    writing.join().unwrap();
}

#[tokio::test]
async fn output_waits_for_the_window() {
    let daemon = Daemon::start().await;
    let mut stream = Stream::open(&daemon, "s").await;
    let process = daemon.hub.open_output("s").unwrap().1;
    std::fs::File::from(process).write_all(b"hello").unwrap();
    assert!(timeout(Duration::from_millis(50), stream.receiver.recv()).await.is_err());
    stream.grant(WINDOW).await;
    assert_eq!(stream.data().await.unwrap(), b"hello");
    assert_eq!(stream.data().await, None);
}

#[tokio::test]
async fn no_byte_is_lost_or_repeated_when_containerd_restarts() {
    let daemon = Daemon::start().await;
    let mut stream = Stream::open(&daemon, "s").await;
    let mut process = writer(daemon.hub.open_output("s").unwrap().1);
    stream.grant(WINDOW).await;
    process.write_all(b"one ").await.unwrap();
    assert_eq!(stream.data().await.unwrap(), b"one ");
    drop(stream);
    process.write_all(b"two ").await.unwrap();
    let mut stream = Stream::open(&daemon, "s").await;
    process.write_all(b"three").await.unwrap();
    drop(process);
    assert_eq!(stream.read_to_end().await, b"two three");
}

#[tokio::test]
async fn a_connection_without_window_gives_way_to_the_next() {
    let daemon = Daemon::start().await;
    let stuck = Stream::open(&daemon, "s").await;
    let mut process = writer(daemon.hub.open_output("s").unwrap().1);
    process.write_all(b"kept").await.unwrap();
    drop(process);
    let mut stream = Stream::open(&daemon, "s").await;
    assert_eq!(stream.read_to_end().await, b"kept");
    drop(stuck);
}

#[tokio::test]
async fn input_keeps_its_order_and_ends_with_the_stream() {
    let daemon = Daemon::start().await;
    let mut stream = Stream::open(&daemon, "c1-stdin").await;
    // Nothing is asked for before the process is there.
    assert!(timeout(Duration::from_millis(50), stream.receiver.recv()).await.is_err());
    let mut process = reader(daemon.hub.open_input("c1-stdin", |_| FdStore::default().leave("stdin".into(), &[])).unwrap());
    let sent = bytes(300_000);
    let copy = sent.clone();
    let hub = daemon.hub.clone();
    let writing = tokio::spawn(async move {
        let mut window = stream.window().await;
        assert_eq!(window, WINDOW);
        // Many small frames: their order is what matters.
        for part in copy.chunks(97) {
            while window < i32::try_from(part.len()).unwrap() {
                window += stream.window().await;
            }
            stream.write(part).await;
            window -= i32::try_from(part.len()).unwrap();
        }
        stream.sender.close_send().await.unwrap();
        hub.close_input("c1-stdin");
        // Kept: the end of input must not depend on the connection's.
        stream
    });
    let mut got = Vec::new();
    timeout(LONG, process.read_to_end(&mut got)).await.expect("the end of input").unwrap();
    assert!(got == sent);
    drop(writing.await.unwrap());
}

#[tokio::test]
async fn input_sent_just_before_the_connection_closes_arrives() {
    let daemon = Daemon::start().await;
    for round in 0..20 {
        let id = format!("s{round}");
        let mut process = reader(daemon.hub.open_input(&id, |_| FdStore::default().leave("stdin".into(), &[])).unwrap());
        let mut stream = Stream::open(&daemon, &id).await;
        stream.window().await;
        let sent = bytes(20_000);
        for part in sent.chunks(101) {
            stream.write(part).await;
        }
        drop(stream);
        let mut got = vec![0; sent.len()];
        timeout(LONG, process.read_exact(&mut got)).await.expect("all of it").unwrap();
        assert!(got == sent);
    }
}

#[tokio::test]
async fn a_process_that_takes_no_input_does_not_block_the_writer() {
    let daemon = Daemon::start().await;
    let process = daemon.hub.open_input("s", |_| FdStore::default().leave("stdin".into(), &[])).unwrap();
    let mut stream = Stream::open(&daemon, "s").await;
    let mut window = stream.window().await;
    drop(process);
    for _ in 0..64 {
        while window < 4096 {
            window += stream.window().await;
        }
        stream.write(&[0; 4096]).await;
        window -= 4096;
    }
}

#[tokio::test]
async fn a_client_that_breaks_the_rules_is_refused() {
    let daemon = Daemon::start().await;
    let mut stream = Stream::open_raw(&daemon).await;
    stream.sender.send(&any("x.Y", &Data { data: vec![1] })).await.unwrap();
    assert!(stream.refusal().await.contains("x.Y"));

    let mut stream = Stream::open_raw(&daemon).await;
    let init = StreamInit { id: String::new() };
    stream.sender.send(&any("containerd.services.streaming.v1.StreamInit", &init)).await.unwrap();
    assert!(stream.refusal().await.contains("id"));

    let mut stream = Stream::open(&daemon, "early").await;
    stream.write(b"not asked for").await;
    assert!(stream.refusal().await.contains("not asked for"));

    let mut stream = Stream::open(&daemon, "negative").await;
    stream.grant(-1).await;
    assert!(stream.refusal().await.contains("negative"));
}
