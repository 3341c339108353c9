//! Asking the daemon.

use std::{io::ErrorKind, path::Path, time::Duration};

use anyhow::{Context, Result, anyhow};
use kuasar_shim::check::daemon::Daemon as Found;
use kuasar_shim::proto::admin::{
    ConsoleRequest, ExecInput, ExecOutput, GcRequest, InspectRequest, ListRequest, SettingsRequest, Text, UpgradeRequest,
    VersionRequest, admin_client::AdminClient,
};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

/// A daemon that does not answer within this is as good as not running.
const LIMIT: Duration = Duration::from_secs(10);

/// A collection may have processes to wait for.
const GC_LIMIT: Duration = Duration::from_secs(600);
/// A guest that hangs is waited for before the rest of an account is told.
const ACCOUNT_LIMIT: Duration = Duration::from_secs(60);
/// How long an upgrade may take: what the keeper gives the two workers, and the calls before them.
const UPGRADE: Duration = Duration::from_secs(90);

/// The largest answer taken, in bytes: a list of some thousand pods.
const ANSWER_BYTES: usize = 64 << 20;

/// How often a daemon that is being upgraded is asked whether it is.
const AGAIN: Duration = Duration::from_millis(20);

/// A connection to the daemon.
#[derive(Debug)]
pub(crate) struct Daemon(AdminClient<Channel>);

impl Daemon {
    /// Connects to the daemon's socket.
    pub(crate) async fn connect(socket: &Path) -> Result<Self> {
        Self::connect_for(socket, LIMIT).await
    }

    /// The same, for requests that may take as long as a collection.
    pub(crate) async fn connect_for_gc(socket: &Path) -> Result<Self> {
        Self::connect_for(socket, GC_LIMIT).await
    }

    /// The same, for an account of a sandbox.
    pub(crate) async fn connect_for_account(socket: &Path) -> Result<Self> {
        Self::connect_for(socket, ACCOUNT_LIMIT).await
    }

    async fn connect_for(socket: &Path, limit: Duration) -> Result<Self> {
        // tonic says only "transport error"; the plain connect knows why.
        if let Err(error) = tokio::net::UnixStream::connect(socket).await {
            return Err(explain(socket, &error));
        }
        let channel = Endpoint::try_from(format!("unix://{}", socket.display()))
            .with_context(|| format!("{} cannot be a socket's address", socket.display()))?
            .timeout(limit)
            .connect_timeout(LIMIT)
            .connect()
            .await
            .with_context(|| format!("kuasard at {} does not speak gRPC", socket.display()))?;
        Ok(Self(AdminClient::new(channel).max_decoding_message_size(ANSWER_BYTES)))
    }

    /// Every sandbox.
    pub(crate) async fn list(&mut self, namespace: &str) -> Result<Value> {
        let request = ListRequest { namespace: namespace.to_owned() };
        document(self.0.list(request).await.map_err(refused)?.into_inner().json)
    }

    /// One sandbox.
    pub(crate) async fn inspect(&mut self, namespace: &str, id: &str) -> Result<Value> {
        let request = InspectRequest { namespace: namespace.to_owned(), id: id.to_owned() };
        document(self.0.inspect(request).await.map_err(refused)?.into_inner().json)
    }

    /// Runs a program in a sandbox.
    pub(crate) async fn exec(&mut self, messages: ReceiverStream<ExecInput>) -> Result<Streaming<ExecOutput>> {
        Ok(self.0.exec(messages).await.map_err(refused)?.into_inner())
    }

    /// What the console of a sandbox says.
    pub(crate) async fn console(&mut self, namespace: &str, id: &str, follow: bool) -> Result<Streaming<Text>> {
        let request = ConsoleRequest { namespace: namespace.to_owned(), id: id.to_owned(), follow };
        Ok(self.0.console(request).await.map_err(refused)?.into_inner())
    }

    /// All that is known of a sandbox.
    pub(crate) async fn account(&mut self, namespace: &str, id: &str) -> Result<Value> {
        let request = InspectRequest { namespace: namespace.to_owned(), id: id.to_owned() };
        document(self.0.account(request).await.map_err(refused)?.into_inner().json)
    }

    /// Collects what nobody answers for, or only tells what.
    pub(crate) async fn gc(&mut self, dry_run: bool) -> Result<Value> {
        document(self.0.gc(GcRequest { dry_run }).await.map_err(refused)?.into_inner().json)
    }

    /// The daemon itself.
    pub(crate) async fn version(&mut self) -> Result<Value> {
        document(self.0.version(VersionRequest {}).await.map_err(refused)?.into_inner().json)
    }
}

/// What the daemon at a socket goes by, if there is one and it tells.
pub(crate) async fn settings(socket: &Path) -> Found {
    if let Err(error) = tokio::net::UnixStream::connect(socket).await {
        return Found::Absent(format!("{}: {error}", socket.display()));
    }
    let asked = async {
        let mut daemon = Daemon::connect(socket).await?;
        let answer = document(daemon.0.settings(SettingsRequest {}).await.map_err(refused)?.into_inner().json)?;
        serde_json::from_value(answer).context("kuasard's settings are of another form; is it another version?")
    };
    match asked.await {
        Ok(settings) => Found::Answers(settings),
        Err(error) => Found::Silent(format!("{error:#}")),
    }
}

/// Lets a daemon be replaced, and waits until it is. Gives what it was and what it is, with what became of the upgrade.
pub(crate) async fn upgrade(socket: &Path, binary: Option<&Path>) -> Result<(Value, Value)> {
    let before = {
        let mut daemon = Daemon::connect(socket).await?;
        let binary = binary.map(|binary| binary.display().to_string()).unwrap_or_default();
        let asked = daemon.0.upgrade(UpgradeRequest { binary }).await;
        document(asked.map_err(refused)?.into_inner().json)?
    };
    let asked_again = async {
        loop {
            // The one that leaves still answers, the next does not yet: neither knows.
            if let Ok(mut daemon) = Daemon::connect(socket).await
                && let Ok(now) = daemon.version().await
                && now["upgrade"]["id"] == before["id"]
            {
                return now;
            }
            sleep(AGAIN).await;
        }
    };
    match timeout(UPGRADE, asked_again).await {
        Ok(after) => Ok((before, after)),
        Err(_) => Err(anyhow!(
            "kuasard did not say within {} s what became of the upgrade; its log does, and `kuasarctl version` shows what runs",
            UPGRADE.as_secs()
        )),
    }
}

fn document(json: String) -> Result<Value> {
    serde_json::from_str(&json).context("kuasard's answer is not JSON; is it another version?")
}

pub(crate) fn refused(status: Status) -> anyhow::Error {
    // The connection's, not kuasard's.
    if let Some(cause) = std::error::Error::source(&status) {
        return anyhow!("{cause}").context("the connection to kuasard is lost");
    }
    anyhow!("{}", status.message()).context(match status.code() {
        // With its own words it is kuasard that refuses, not gRPC.
        tonic::Code::Unimplemented if status.message().is_empty() => {
            "kuasard does not know this request; is it another version?"
        }
        tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => "kuasard does not answer",
        _ => "kuasard refused",
    })
}

fn explain(socket: &Path, error: &std::io::Error) -> anyhow::Error {
    let socket = socket.display();
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => anyhow!(
            "kuasard is not running: nothing listens at {socket}; start it (systemctl start kuasard), or name its state directory \
             with --state"
        ),
        ErrorKind::PermissionDenied => anyhow!("no permission to talk to kuasard at {socket}; run this as root"),
        _ => anyhow!("cannot reach kuasard at {socket}: {error}"),
    }
}
