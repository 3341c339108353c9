//! `containerd.services.streaming.v1.Streaming` on the Task socket: stdio with `io_type = "streaming"`.
//!
//! containerd dials once more for each stdio stream, names it in a `StreamInit`, waits for an acknowledgement, and then moves
//! `Data` one way and `WindowUpdate`s (bytes the reader is ready for) the other:
//!
//! ```text
//!   stdout, stderr   containerd ──WindowUpdate──▶ here ──Data──▶ containerd, ends when the process has closed its end
//!   stdin            here ──WindowUpdate──▶ containerd ──Data──▶ here, ends when containerd closes
//! ```
//!
//! Nothing on the wire says which it is, and containerd's reader breaks on a `WindowUpdate`, so the first one of ours waits until the
//! process has opened its side.
//!
//! ttrpc hands each arriving frame to a task of its own. Only a current-thread runtime polls those in order, which
//! is why the Task socket is served on one (see [`connection`](crate::task::connection)).

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::FutureExt;
use kuasar_sandboxers::{
    Error, Result,
    stdio::{StreamEnd, StreamHub},
};
use prost::Message;
use protobuf::well_known_types::any::Any;
use tokio::{
    select,
    sync::{
        Semaphore,
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
        watch,
    },
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;
use ttrpc::{
    Response,
    r#async::{SSReceiver, SSSender, ServerStream, Service, StreamHandler, StreamInner, TtrpcContext},
    proto::ResponseInit,
};

use crate::{
    proto::{
        containerd::services::streaming::v1::StreamInit,
        types::transfer::{Data, WindowUpdate},
    },
    status::IntoStatus,
};

const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const METHOD: &str = "Stream";

const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const ACKNOWLEDGEMENT: &str = "google.protobuf.Empty";
const DATA: &str = "containerd.types.transfer.Data";
const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// Input that may be on its way to us, in bytes: containerd's own window.
const WINDOW: i64 = 64 << 10;
/// How long containerd may take to read the rest of a stream before its connection is closed all the same.
const UNREAD: Duration = Duration::from_secs(5);
/// How long containerd is silent when it has read a stream to its end.
const SILENCE: Duration = Duration::from_millis(200);
/// The longest stream id, in bytes.
const ID_LIMIT: usize = 512;
/// Output that a client may ask for at once, in bytes; more is a defect of the client.
const CREDIT_LIMIT: usize = 1 << 40;

/// The service, for one connection.
#[derive(Clone)]
pub struct Streaming {
    hub: StreamHub,
    /// Cancelled when the connection is gone: ttrpc does not tell a stream's handler. Cancelling it ends the connection.
    closed: CancellationToken,
    /// Changes whenever containerd has sent something on the connection.
    heard: watch::Receiver<()>,
    /// Streams on the connection that have not been let go.
    open: Arc<AtomicUsize>,
}

impl Streaming {
    /// A service over `hub` for the connection that ends with `closed` and is `heard` from.
    #[must_use]
    pub fn new(hub: StreamHub, closed: CancellationToken, heard: watch::Receiver<()>) -> Self {
        Self { hub, closed, heard, open: Arc::default() }
    }

    /// The service under its name.
    #[must_use]
    pub fn services(self) -> HashMap<String, Service> {
        let stream: Arc<dyn StreamHandler + Send + Sync> = Arc::new(self);
        let service = Service { methods: HashMap::new(), streams: [(METHOD.to_owned(), stream)].into() };
        [(SERVICE.to_owned(), service)].into()
    }

    async fn stream(&self, stream: StreamInner) -> Result<()> {
        let (sender, mut receiver) = ServerStream::<Any, Any>::new(stream).split();
        let Some(id) = init(&mut receiver, &self.closed).await? else { return Ok(()) };
        let end = self.hub.attach(&id);
        self.open.fetch_add(1, Ordering::Relaxed);
        send(&sender, ACKNOWLEDGEMENT, Vec::new()).await?;
        debug!(id, "stream opened");
        let flow = Flow::default();
        let (queue, queued) = unbounded_channel();
        let (sent, result) = select! {
            biased;
            result = output(&end, &sender, &flow) => (result.is_ok(), result),
            result = async {
                tokio::try_join!(receive(receiver, queue, &flow, &self.closed), input(&end, &sender, queued, &flow)).map(drop)
            } => (false, result),
        };
        debug!(id, sent, "stream ended");
        // Input is let go at once, for that tells the process that there is no more.
        self.let_go_later(Some(end).filter(|_| sent));
        result
    }

    /// Ends the connection of a stream that has ended, and before that holds on to sent output until containerd has read all of
    /// it. A process's exit is told only then: containerd drops what it has not read when it hears of it.
    ///
    /// containerd 2.4 closes the connection then. Earlier ones only close their side of the stream, with the last frame they send
    /// on the connection, and would keep it for ever: so silence after something was heard ends it, and a daemon that serves
    /// thousands of processes does not keep two descriptors for each.
    fn let_go_later(&self, output: Option<StreamEnd>) {
        let Self { closed, mut heard, open, .. } = self.clone();
        heard.mark_unchanged();
        tokio::spawn(async move {
            if let Some(end) = output {
                select! {
                    () = closed.cancelled() => {}
                    () = end.superseded() => {}
                    _ = timeout(UNREAD, heard.changed()) => silence(&mut heard).await,
                }
            }
            // The last answer may still be on its way out.
            select! {
                () = closed.cancelled() => {}
                () = silence(&mut heard) => {}
            }
            if open.fetch_sub(1, Ordering::Relaxed) == 1 {
                closed.cancel();
            }
        });
    }
}

/// Waits until the peer has sent nothing for a while.
async fn silence(heard: &mut watch::Receiver<()>) {
    while timeout(SILENCE, heard.changed()).await.is_ok_and(|heard| heard.is_ok()) {}
}

#[async_trait]
impl StreamHandler for Streaming {
    async fn handler(&self, _: TtrpcContext, stream: StreamInner) -> ttrpc::Result<Option<Response>> {
        match self.stream(stream).await.ttrpc() {
            Err(ttrpc::Error::RpcStatus(status)) => Ok(Some(Response::init_status(status))),
            result => result.map(|()| None),
        }
    }
}

/// What either side may still send.
struct Flow {
    /// Bytes of output containerd is ready for.
    credit: Semaphore,
    /// Bytes of input we have asked for and not got.
    window: AtomicI64,
}

impl Default for Flow {
    fn default() -> Self {
        Self { credit: Semaphore::new(0), window: AtomicI64::new(0) }
    }
}

fn broken(why: impl Into<String>) -> Error {
    Error::invalid("stream", why)
}

/// The stream's id; `None` when the client went away before it said one.
async fn init(receiver: &mut SSReceiver<Any>, closed: &CancellationToken) -> Result<Option<String>> {
    let any = loop {
        let any = select! {
            any = receiver.recv() => any.map_err(Error::failed("read from a stream"))?,
            () = closed.cancelled() => None,
        };
        match any {
            None => return Ok(None),
            // Go's frame that opens a stream carries no message; ttrpc here makes an empty one of it.
            Some(any) if any.type_url.is_empty() && any.value.is_empty() => {}
            Some(any) => break any,
        }
    };
    if any.type_url.rsplit('/').next() != Some(INIT) {
        return Err(broken(format!("the first message is {:?}, not {INIT}", any.type_url)));
    }
    let id = StreamInit::decode(any.value.as_slice()).map_err(|error| broken(format!("{INIT} cannot be decoded: {error}")))?.id;
    if id.is_empty() || id.len() > ID_LIMIT {
        return Err(broken(format!("its id has {} bytes; 1 to {ID_LIMIT} are allowed", id.len())));
    }
    Ok(Some(id))
}

async fn send(sender: &SSSender<Any>, type_url: &str, value: Vec<u8>) -> Result<()> {
    let any = Any { type_url: type_url.into(), value, ..Default::default() };
    sender.send(&any).await.map_err(Error::failed("write to a stream"))
}

/// Moves output to containerd until there is no more, or another connection has taken the stream over.
async fn output(end: &StreamEnd, sender: &SSSender<Any>, flow: &Flow) -> Result<()> {
    while let Some(chunk) = end.next().await.map_err(Error::failed("read a process's output"))? {
        // A chunk is a quarter of containerd's window, which it opens again whenever less than all of it is left.
        let size = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
        let permit = select! {
            permit = flow.credit.acquire_many(size) => permit,
            // While a chunk is held this only tells that another connection has taken over.
            _ = end.next() => return Ok(()),
        };
        permit.map_err(Error::failed("wait for the stream's window"))?.forget();
        send(sender, DATA, Data { data: chunk.to_vec() }.encode_to_vec()).await?;
        chunk.sent();
    }
    Ok(())
}

/// Takes what containerd sends at once, so that ttrpc never has to hold frames back, until containerd closes.
async fn receive(
    mut receiver: SSReceiver<Any>,
    queue: UnboundedSender<Vec<u8>>,
    flow: &Flow,
    closed: &CancellationToken,
) -> Result<()> {
    loop {
        let any = select! {
            biased;
            any = receiver.recv() => any,
            () = closed.cancelled() => {
                // What came before the connection went is already here.
                match receiver.recv().now_or_never() {
                    Some(any) => any,
                    None => return Ok(()),
                }
            }
        };
        let Some(any) = any.map_err(Error::failed("read from a stream"))? else { return Ok(()) };
        let undecodable = |error| broken(format!("{:?} cannot be decoded: {error}", any.type_url));
        match any.type_url.rsplit('/').next() {
            Some(DATA) => {
                let data = Data::decode(any.value.as_slice()).map_err(undecodable)?.data;
                let length = i64::try_from(data.len()).unwrap_or(i64::MAX);
                if flow.window.fetch_sub(length, Ordering::Relaxed) < length {
                    return Err(broken(format!("{length} bytes of input came that were not asked for")));
                }
                // Refused only once the reader has ended, and the handler with it.
                if queue.send(data).is_err() {
                    return Ok(());
                }
            }
            Some(WINDOW_UPDATE) => {
                let update = WindowUpdate::decode(any.value.as_slice()).map_err(undecodable)?.update;
                let update = usize::try_from(update).map_err(|_| broken("a negative window"))?;
                if flow.credit.available_permits() > CREDIT_LIMIT {
                    return Err(broken("more output was asked for than can ever be sent"));
                }
                flow.credit.add_permits(update);
            }
            _ => return Err(broken(format!("{:?} is not known here", any.type_url))),
        }
    }
}

/// Moves input to the process, and asks for more as it is taken.
async fn input(end: &StreamEnd, sender: &SSSender<Any>, mut queued: UnboundedReceiver<Vec<u8>>, flow: &Flow) -> Result<()> {
    // Writing nothing waits until the process has opened its side, and tells which that is.
    let mut taking = select! {
        result = end.write(&[]) => match result {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => false,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                // Output: only containerd's end of the stream is to come.
                while queued.recv().await.is_some() {}
                return Ok(());
            }
            Err(error) => return Err(Error::failed("give input to a process")(error)),
        },
        // Nothing was asked for, so this is containerd's end of the stream.
        _ = queued.recv() => return Ok(()),
    };
    grant(sender, flow, WINDOW).await?;
    let mut taken = 0;
    while let Some(bytes) = queued.recv().await {
        // A process that takes no more input must not make the writer wait: the rest goes nowhere.
        taking = taking && end.write(&bytes).await.is_ok();
        taken += i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        if taken >= WINDOW / 2 {
            grant(sender, flow, taken).await?;
            taken = 0;
        }
    }
    Ok(())
}

async fn grant(sender: &SSSender<Any>, flow: &Flow, bytes: i64) -> Result<()> {
    flow.window.fetch_add(bytes, Ordering::Relaxed);
    let update = i32::try_from(bytes).map_err(Error::failed("open the stream's window"))?;
    send(sender, WINDOW_UPDATE, WindowUpdate { update }.encode_to_vec()).await
}
