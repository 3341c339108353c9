//! A guest that answers each call with what a fuzzer makes up.

use std::os::fd::OwnedFd;

use kuasar_guest_protocol::agent::{ContainerRequest, Empty, EventsRequest, ProcessRequest};
use protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MessageHeader, Response};

use super::*;

/// Nothing waits longer for a guest of this test.
const SOON: Duration = Duration::from_millis(20);

/// What the guest makes of a call.
#[derive(Debug, bolero::TypeGenerator)]
enum Answer {
    /// A well-formed frame with any message in it.
    Message(Vec<u8>),
    /// An error of any code.
    Status(i32, String),
    /// A frame with any payload.
    Payload(Vec<u8>),
    /// A frame with any header.
    Frame { length: u32, stream: u32, kind: u8, flags: u8, payload: Vec<u8> },
    /// Any bytes.
    Bytes(Vec<u8>),
    /// None at all.
    Silence,
    /// It hangs up.
    End,
}

fn frame(header: MessageHeader, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from(header);
    bytes.extend(payload);
    bytes
}

fn response(stream: u32, response: &Response) -> Vec<u8> {
    let payload = response.write_to_bytes().unwrap();
    frame(MessageHeader::new_response(stream, payload.len() as u32), &payload)
}

impl Answer {
    fn bytes(&self, stream: u32) -> Option<Vec<u8>> {
        Some(match self {
            Self::Message(payload) => response(stream, &Response { payload: payload.clone(), ..Response::default() }),
            Self::Status(code, message) => {
                let mut status = ttrpc::get_status(ttrpc::Code::UNKNOWN, message);
                status.code = protobuf::EnumOrUnknown::from_i32(*code);
                response(stream, &Response { status: Some(status).into(), ..Response::default() })
            }
            Self::Payload(payload) => frame(MessageHeader::new_response(stream, payload.len() as u32), payload),
            Self::Frame { length, stream, kind, flags, payload } => {
                let mut header = MessageHeader::new_response(*stream, *length);
                (header.type_, header.flags) = (*kind, *flags);
                frame(header, payload)
            }
            Self::Bytes(bytes) => bytes.clone(),
            Self::Silence => Vec::new(),
            Self::End => return None,
        })
    }
}

/// Answers one call after the other.
async fn guest(mut connection: UnixStream, answers: &[Answer]) -> io::Result<()> {
    for answer in answers {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        connection.read_exact(&mut header).await?;
        let header = MessageHeader::from(header);
        let mut request = vec![0; header.length as usize];
        connection.read_exact(&mut request).await?;
        let Some(bytes) = answer.bytes(header.stream_id) else { return Ok(()) };
        connection.write_all(&bytes).await?;
    }
    // Whoever waits for more is not told that there is none.
    connection.read_u8().await.map(drop)
}

/// Each call once, as the daemon makes them; what comes of it is either an answer or an error.
async fn host(connection: UnixStream) -> Vec<Error> {
    let agent = Agent::at(VsockAddress::Hybrid("/nowhere".into()), FdStore::default());
    let connection = Connection::new(OwnedFd::from(connection.into_std().unwrap())).unwrap();
    let mut errors = Vec::new();
    match agent.greet(connection, Instant::now() + SOON).await {
        Ok(client) => *agent.shared() = Some(client),
        Err(error) => errors.push(error),
    }
    if let Some(hello) = agent.hello() {
        assert!(hello.version == VERSION && [&hello.agent, &hello.kernel].iter().all(|text| text.len() <= 128));
    }
    macro_rules! call {
        ($($method:ident($request:expr);)*) => {$(
            let called = agent.call(stringify!($method), Some(SOON), |client, context| async move {
                client.$method(context, &$request).await
            });
            errors.extend(called.await.err());
        )*};
    }
    call! {
        state(ProcessRequest::default());
        wait(ProcessRequest::default());
        pids(ContainerRequest::default());
        stats(ContainerRequest::default());
        events(EventsRequest::default());
        diagnose(Empty::default());
    }
    errors
}

#[test]
fn fuzz_answers() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    bolero::check!().with_type::<Vec<Answer>>().for_each(|answers| {
        let errors = runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            tokio::select! {
                errors = host(ours) => errors,
                // The host's calls end in any case.
                _ = async { let _ = guest(theirs, answers).await; std::future::pending::<()>().await } => unreachable!(),
            }
        });
        for error in errors {
            assert!(error.report().len() < 2 * TEXT, "{}", error.report());
        }
    });
}
