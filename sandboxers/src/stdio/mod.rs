//! Where a process's input and output go, and how they get there.
//!
//! ```text
//!   containerd                         this daemon                          process
//!   FIFO  (default)       ─────────────── the FIFO itself ───────────────▶  0 1 2      no copier, survives any restart
//!   streaming             ── StreamEnd ── pipe of the StreamHub ─────────▶  0 1 2
//!   file://                              writer process ◀── a pipe ──────     1 2
//!   binary://                            logger process ◀── pipes ───────     1 2
//! ```
//!
//! That is [`ProcessIo`], for a process without a terminal; [`Terminal`](crate::terminal::Terminal) is the other.
//!
//! Standard input ends for the process when both writers are gone: containerd's, and one of ours that
//! [`ProcessIo::close_stdin`] closes. So a client that detaches does not end it, and CloseIO does.

mod carry;
mod endpoint;
mod fifo;
mod hub;
mod log_file;
mod logger;
mod null;
mod process;
mod unread;

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

pub use carry::{splice_all, write_all};
pub(crate) use endpoint::{Endpoint, Endpoints};
pub(crate) use fifo::Fifo;
pub use fifo::reopened;
pub use hub::{Chunk, StreamEnd, StreamHub};
pub(crate) use log_file::{LogWriter, serve as serve_log};
pub(crate) use logger::Logger;
pub use null::null_device;
pub use process::{ChildFds, ProcessIo};
pub(crate) use process::{Streams, own};
pub(crate) use unread::until_empty;

use crate::{
    contract::SandboxContext,
    fdstore::{FdStore, Held},
    id::{ContainerId, ExecId, Namespace, SandboxId},
    reaper::Reaper,
    types::SandboxSpec,
};

/// containerd's three stdio fields, as it sent them: a FIFO path, a `file://` or `binary://` log URI, a streaming URL
/// (`ttrpc+unix://…?streaming_id=…`), or empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error; ignored with a terminal.
    pub stderr: String,
    /// The process gets a pseudo-terminal.
    pub terminal: bool,
}

/// What opening stdio needs to know besides the [`Stdio`].
#[derive(Clone, Debug)]
pub struct IoContext {
    /// containerd's namespace; told to log programs.
    pub namespace: Namespace,
    /// The sandbox, whose log writers are counted.
    pub sandbox: SandboxId,
    /// The container; told to log programs.
    pub container: ContainerId,
    /// Streams that containerd opened.
    pub streams: StreamHub,
    /// Starts log programs.
    pub reaper: Reaper,
    /// User and group id that own the pipes made for the process (`IoUid`, `IoGid`).
    pub owner: (u32, u32),
    /// Where descriptors are left that the process must not lose when the daemon dies.
    pub fds: FdStore,
    /// What names them: unique to the process, at most 240 bytes.
    pub name: String,
}

/// How the names of descriptors begin that are parked for a sandbox, or for one container of it; also as versions before have named them.
#[must_use]
pub fn parked_names(namespace: &Namespace, sandbox: &SandboxId, container: Option<&ContainerId>) -> Vec<String> {
    let rest = container.map_or_else(|| format!("{sandbox}/"), |container| format!("{sandbox}/{container}/"));
    vec![format!("{}{rest}", of_namespace(namespace)), rest]
}

/// How the names of descriptors begin that are parked for what is in a namespace. systemd takes names of 255 bytes, and ids may have 76 each.
#[must_use]
pub fn of_namespace(namespace: &Namespace) -> String {
    let name = namespace.as_str();
    if name.len() < 16 {
        return format!("@{name}/");
    }
    // FNV-1a: the next version has to find it, too.
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("@{:016x}/", name.bytes().fold(0xcbf2_9ce4_8422_2325, mix))
}

impl IoContext {
    /// For a process of a sandbox: the first one of a container, or an exec.
    #[must_use]
    pub fn of(spec: &SandboxSpec, context: &SandboxContext, container: &ContainerId, exec: Option<&ExecId>) -> Self {
        let (namespace, sandbox) = (of_namespace(&spec.namespace), &spec.id);
        let name = match exec {
            None => format!("{namespace}{sandbox}/{container}"),
            Some(exec) => format!("{namespace}{sandbox}/{container}/{exec}"),
        };
        Self {
            namespace: spec.namespace.clone(),
            sandbox: sandbox.clone(),
            container: container.clone(),
            streams: context.streams.clone(),
            reaper: context.reaper.clone(),
            owner: spec.options.io_owner,
            fds: context.fds.clone(),
            name,
        }
    }

    /// The name of one of the process's descriptors.
    #[must_use]
    pub fn held(&self, which: &str) -> String {
        format!("{}/{which}", self.name)
    }

    /// Takes one of the process's descriptors that an earlier daemon has left.
    #[must_use]
    pub fn take(&self, which: &str) -> Option<(Vec<OwnedFd>, Held)> {
        self.fds.take_of_namespace(&self.held(which))
    }
}
