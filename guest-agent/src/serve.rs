//! Serving the host on the agent's three ports.

use std::{io, sync::Arc, time::Duration};

use kuasar_guest_protocol::{
    agent_ttrpc::create_agent,
    stream::{ACCEPTED, HEADER_MAX, REFUSED, StreamHeader},
};
use kuasar_sandboxers::{Error, Result};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
    time::timeout,
};
use tracing::{debug, warn};

use crate::{
    connection::{Connection, Listener},
    guest::Guest,
    net,
    service::Service,
};

/// Connections at a time, by port. The host has one for calls, or two for a moment.
const CALLS: usize = 16;
const STREAMS: usize = 2048;
const FORWARDS: usize = 512;

/// How long the header of a stream may take: the host connects while it has the process made, for which it waits two minutes.
const HEADER: Duration = Duration::from_secs(150);

/// The ports of [`kuasar_guest_protocol`].
#[derive(Debug)]
pub struct Ports {
    /// Of calls.
    pub calls: Listener,
    /// Of streams.
    pub streams: Listener,
    /// Of forwarding.
    pub forward: Listener,
}

/// Serves until the process ends.
///
/// # Errors
/// When a port cannot be served any more, which is not expected.
pub async fn serve(guest: Guest, ports: Ports) -> Result<()> {
    let Ports { calls, streams, forward } = ports;
    let incoming = futures::stream::unfold((calls, Arc::new(Semaphore::new(CALLS))), |(calls, places)| async move {
        let accepted = accept(&calls, &places).await;
        Some((accepted, (calls, places)))
    });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(ttrpc::r#async::transport::Listener::new(incoming))
        .register_service(create_agent(Arc::new(Service::new(guest.clone()))));
    server.start().await.map_err(Error::failed("serve calls"))?;
    let streams = each(streams, STREAMS, move |connection| {
        let guest = guest.clone();
        async move {
            if let Err(error) = take_up(&guest, connection).await {
                debug!(error = error.report(), "a stream was refused");
            }
        }
    });
    let forward = each(forward, FORWARDS, |connection| async move {
        if let Err(error) = net::forward(connection).await {
            debug!(%error, "a connection was not forwarded");
        }
    });
    tokio::try_join!(streams, forward).map(drop)
}

/// The next connection, once there is a place for it. Others wait with the kernel.
async fn accept(listener: &Listener, places: &Arc<Semaphore>) -> io::Result<Connection> {
    let permit = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    Ok(listener.accept().await?.counted(permit))
}

/// Deals with each connection in a task of its own.
async fn each<F>(listener: Listener, limit: usize, work: impl Fn(Connection) -> F) -> Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(limit));
    loop {
        match accept(&listener, &places).await {
            Ok(connection) => drop(tokio::spawn(work(connection))),
            // That connection is gone, or descriptors have run out.
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Reads the header of a stream, and hands the connection to whoever moves its bytes.
async fn take_up(guest: &Guest, mut connection: Connection) -> Result<()> {
    let header = timeout(HEADER, read_header(&mut connection)).await;
    let header =
        header.map_err(|_| Error::TimedOut { operation: "the header of a stream".into(), seconds: HEADER.as_secs() })??;
    let write = || Error::failed("answer the header of a stream");
    match guest.stream(&header) {
        Ok(stream) => {
            connection.write_all(&[ACCEPTED]).await.map_err(write())?;
            // One that comes when the process is going away is closed.
            stream.send(connection).await.map_err(|_| Error::Finished { id: header.container })
        }
        Err(error) => {
            connection.write_all(&[REFUSED]).await.map_err(write())?;
            connection.shutdown().await.map_err(write())?;
            Err(error)
        }
    }
}

/// Reads a header and not one byte more: what follows belongs to the process.
async fn read_header(connection: &mut Connection) -> Result<StreamHeader> {
    let mut bytes = Vec::with_capacity(HEADER_MAX);
    let bad = |error| Error::failed("read the header of a stream")(error);
    loop {
        let start = bytes.len();
        bytes.resize(start + StreamHeader::missing(&bytes), 0);
        connection.read_exact(&mut bytes[start..]).await.map_err(bad)?;
        if let Some((header, _)) = StreamHeader::decode(&bytes).map_err(Error::failed("understand the header of a stream"))? {
            return Ok(header);
        }
    }
}
