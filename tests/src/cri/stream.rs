//! Exec, attach and port-forward over the URL that CRI hands out: Kubernetes' channel protocol on a WebSocket.
//!
//! Each binary message is one channel byte and data. Version 4 is what every containerd speaks; it has no way to close one
//! channel, so the end of stdin is the end of the connection ([`Session::close`]).

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

const PROTOCOL: &str = "v4.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// How long a session waits for the next thing to arrive.
const PATIENCE: Duration = Duration::from_secs(30);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(url: &str) -> Result<Socket> {
    let url = url.replacen("http", "ws", 1);
    let mut request = url.as_str().into_client_request()?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
    let (socket, _) = connect_async(request).await.with_context(|| format!("connect to {url}"))?;
    Ok(socket)
}

async fn send(socket: &mut Socket, channel: u8, data: &[u8]) -> Result<()> {
    let mut message = Vec::with_capacity(data.len() + 1);
    message.push(channel);
    message.extend_from_slice(data);
    socket.send(Message::binary(message)).await.context("write to the stream")
}

/// The next channel and its data; `None` at the end.
async fn receive(socket: &mut Socket) -> Result<Option<(u8, Vec<u8>)>> {
    loop {
        let next = tokio::time::timeout(PATIENCE, socket.next())
            .await
            .with_context(|| format!("nothing arrived on the stream for {} s", PATIENCE.as_secs()))?;
        match next {
            None | Some(Err(Error::ConnectionClosed | Error::AlreadyClosed) | Ok(Message::Close(_))) => return Ok(None),
            Some(Err(error)) => return Err(error).context("read from the stream"),
            Some(Ok(Message::Binary(data))) => {
                if let Some((channel, rest)) = data.split_first() {
                    return Ok(Some((*channel, rest.to_vec())));
                }
            }
            Some(Ok(_)) => {}
        }
    }
}

/// An exec or attach session.
#[derive(Debug)]
pub struct Session {
    socket: Socket,
    /// What has been printed on stdout, or on the terminal, so far.
    pub out: Vec<u8>,
    /// What has been printed on stderr so far.
    pub err: Vec<u8>,
    status: Option<Value>,
    ended: bool,
}

impl Session {
    /// Opens the URL that Exec or Attach returned.
    ///
    /// # Errors
    /// Nobody answers there.
    pub async fn open(url: &str) -> Result<Self> {
        Ok(Self { socket: open(url).await?, out: Vec::new(), err: Vec::new(), status: None, ended: false })
    }

    /// Writes to stdin.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        send(&mut self.socket, STDIN, data).await
    }

    /// Gives the terminal a size.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        let size = json!({ "Width": width, "Height": height }).to_string();
        send(&mut self.socket, RESIZE, size.as_bytes()).await
    }

    async fn step(&mut self) -> Result<()> {
        match receive(&mut self.socket).await? {
            None => self.ended = true,
            Some((STDOUT, data)) => self.out.extend(data),
            Some((STDERR, data)) => self.err.extend(data),
            Some((STATUS, data)) if !data.is_empty() => {
                self.status = Some(serde_json::from_slice(&data).context("the stream's status is not JSON")?);
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// Reads until stdout holds `text`.
    ///
    /// # Errors
    /// The session ends before, or nothing arrives any more; the error shows what did.
    pub async fn wait_for(&mut self, text: &str) -> Result<()> {
        let waited = self.wait_until(|out| String::from_utf8_lossy(out).contains(text)).await;
        waited.with_context(|| format!("waiting for {text:?}"))
    }

    /// Reads until what stdout holds is enough.
    ///
    /// # Errors
    /// As for [`Session::wait_for`].
    pub async fn wait_until(&mut self, enough: impl Fn(&[u8]) -> bool) -> Result<()> {
        while !enough(&self.out) {
            if self.ended {
                bail!("the session ended; it printed {:?}", String::from_utf8_lossy(&self.out));
            }
            let stepped = self.step().await;
            stepped.with_context(|| format!("the session has printed {:?} so far", String::from_utf8_lossy(&self.out)))?;
        }
        Ok(())
    }

    /// Reads to the end and returns the exit code, as the status on the error channel says it.
    ///
    /// # Errors
    /// The connection breaks, or the status tells of anything but an exit code.
    pub async fn wait(&mut self) -> Result<i32> {
        while !self.ended {
            self.step().await?;
        }
        let Some(status) = &self.status else {
            bail!("the session ended without a status");
        };
        if status["status"] == "Success" {
            return Ok(0);
        }
        status["details"]["causes"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|cause| cause["reason"] == "ExitCode")
            .and_then(|cause| cause["message"].as_str()?.parse().ok())
            .with_context(|| format!("the session failed: {status}"))
    }

    /// Reads to the end and returns exit code and what stdout, or the terminal, has shown.
    ///
    /// # Errors
    /// As for [`Session::wait`].
    pub async fn finish(mut self) -> Result<(i32, String)> {
        let code = self.wait().await?;
        Ok((code, String::from_utf8_lossy(&self.out).into_owned()))
    }

    /// Hangs up: the process reads the end of its stdin.
    ///
    /// # Errors
    /// The connection is gone already.
    pub async fn close(mut self) -> Result<()> {
        self.socket.close(None).await.context("close the stream")
    }
}

/// A TCP connection into a pod.
#[derive(Debug)]
pub struct PortForward {
    socket: Socket,
}

impl PortForward {
    /// Opens the URL that PortForward returned for one port.
    ///
    /// # Errors
    /// Nobody answers there, or the answer names another port.
    pub async fn open(url: &str, port: u16) -> Result<Self> {
        let mut socket = open(url).await?;
        // Both channels, data and error, begin with the port.
        for channel in 0..2 {
            let greeting = receive(&mut socket).await?;
            if greeting.as_ref() != Some(&(channel, port.to_le_bytes().to_vec())) {
                bail!("port-forward to {port} begins with {greeting:?} on channel {channel}");
            }
        }
        Ok(Self { socket })
    }

    /// Sends a request and reads until the reply ends, as one would with a server that closes.
    ///
    /// # Errors
    /// The connection breaks, or the pod's side reports an error.
    pub async fn request(&mut self, request: &[u8]) -> Result<Vec<u8>> {
        send(&mut self.socket, 0, request).await?;
        let mut reply = Vec::new();
        while let Some((channel, data)) = receive(&mut self.socket).await? {
            match channel {
                0 => reply.extend(data),
                _ if data.is_empty() => {}
                _ => bail!("port-forward: {}", String::from_utf8_lossy(&data)),
            }
        }
        Ok(reply)
    }
}
