//! `delete`: containerd has lost the connection under which it knew a container, has given it up, and asks how it ended.
//!
//! What still runs is ended: containerd calls this only after it has given a container up (`cleanupAfterDeadShim`), reports it as exited,
//! and whoever asked for it makes another. A restart of containerd, which finds its containers again, does not come here. Where kuasard
//! cannot be reached it compares its containers with containerd's itself, before it makes another. The daemon's address is in the bundle,
//! where containerd noted it; so this works whatever the daemon's configuration is.

use std::{
    fs::File,
    io::Read,
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::{
    TaskClient,
    api::{DeleteRequest, DeleteResponse, KillRequest, StateRequest, Status, WaitRequest},
    protobuf::{Message, well_known_types::timestamp::Timestamp},
    ttrpc::{self, Code},
};

use kuasar_shim::task::CLEAN_UP;

use crate::args::Args;

/// containerd gives this program 5 s in all.
const LIMIT: Duration = Duration::from_secs(4);

const SIGKILL: u32 = 9;

/// What containerd itself assumes of a container whose end nobody saw.
const UNKNOWN_STATUS: u32 = 255;

/// No bootstrap.json is larger.
const MAX_BOOTSTRAP_BYTES: u64 = 64 << 10;

/// The answer for standard output, a serialised `DeleteResponse`.
pub(crate) fn answer(args: &Args) -> Result<Vec<u8>> {
    ensure!(!args.id.is_empty(), "delete needs -id");
    ensure!(!args.namespace.is_empty(), "delete needs -namespace");
    let bundle = args.bundle.as_deref().unwrap_or(Path::new("."));
    let response = match task_address(bundle).and_then(|address| ask(&address, args)) {
        Ok(response) => response,
        Err(error) => {
            // A failure would only make containerd assume the same and keep the bundle for nothing.
            eprintln!("how container {} ended is not known: {error:#}", args.id);
            unknown(0)
        }
    };
    response.write_to_bytes().context("cannot serialise the answer")
}

/// Where containerd reached this container's tasks, from the note in its bundle.
fn task_address(bundle: &Path) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Bootstrap {
        address: String,
    }
    let path = bundle.join("bootstrap.json");
    let reading = || format!("cannot read {}", path.display());
    let mut text = Vec::new();
    File::open(&path).with_context(reading)?.take(MAX_BOOTSTRAP_BYTES).read_to_end(&mut text).with_context(reading)?;
    let Bootstrap { address } = serde_json::from_slice(&text).with_context(reading)?;
    if !address.starts_with("unix:///") {
        bail!("{} names the address {address:?}, which is not that of a unix socket", path.display());
    }
    Ok(address)
}

fn ask(address: &str, args: &Args) -> Result<DeleteResponse> {
    let client = ttrpc::Client::connect(address).with_context(|| format!("kuasard does not listen at {address}"))?;
    let tasks = TaskClient::new(client);
    let deadline = Instant::now() + LIMIT;
    let context = || {
        let mut context = ttrpc::context::with_duration(deadline.saturating_duration_since(Instant::now()));
        context.add("containerd-namespace-ttrpc".into(), args.namespace.clone());
        context.add(CLEAN_UP.into(), "1".into());
        context
    };
    let id = args.id.clone();
    let state = match tasks.state(context(), &StateRequest { id: id.clone(), ..Default::default() }) {
        Ok(state) => state,
        Err(error) if is_gone(&error) => return Ok(unknown(0)),
        Err(error) => return Err(error).with_context(|| format!("kuasard at {address} does not tell its state")),
    };
    // One that was created and never started is killed by its deletion.
    if !matches!(state.status(), Status::STOPPED | Status::CREATED) {
        let kill = KillRequest { id: id.clone(), signal: SIGKILL, all: true, ..Default::default() };
        let ended = match tasks.kill(context(), &kill) {
            Err(error) if !is_gone(&error) => Err(error),
            _ => tasks.wait(context(), &WaitRequest { id: id.clone(), ..Default::default() }).map(drop),
        };
        ended.with_context(|| {
            format!("kuasard at {address} does not end it; it compares its containers with containerd's later")
        })?;
    }
    // containerd will not ask for this again.
    match tasks.delete(context(), &DeleteRequest { id, ..Default::default() }) {
        // kuasard has been quicker.
        Err(error) if is_gone(&error) => Ok(unknown(state.pid())),
        deleted => deleted.with_context(|| format!("kuasard at {address} does not delete it")),
    }
}

fn is_gone(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == Code::NOT_FOUND)
}

fn unknown(pid: u32) -> DeleteResponse {
    let exited_at = Some(Timestamp::from(SystemTime::now())).into();
    DeleteResponse { pid, exit_status: UNKNOWN_STATUS, exited_at, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundle_names_the_daemon() {
        let bundle = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(bundle.path().join("bootstrap.json"), text).unwrap();
        assert!(format!("{:#}", task_address(bundle.path()).unwrap_err()).contains("bootstrap.json"));
        write(r#"{"version":3,"address":"unix:///run/kuasar/task.sock","protocol":"ttrpc"}"#);
        assert_eq!(task_address(bundle.path()).unwrap(), "unix:///run/kuasar/task.sock");
        write(r#"{"version":3,"address":"vsock://3:1024","protocol":"ttrpc"}"#);
        assert!(task_address(bundle.path()).unwrap_err().to_string().contains("not that of a unix socket"));
        write("{");
        assert!(task_address(bundle.path()).is_err());
    }
}
