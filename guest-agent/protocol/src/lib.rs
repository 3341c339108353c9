//! What the host and the agent of a microVM say to each other: messages, the service's two sides, and the header of a stream.
//!
//! ```text
//!   host (kuasard)                                     guest (kuasar-guest-agent)
//!   AgentClient ───── ttrpc on vsock port 1024 ──────▶ Agent
//!   StreamHeader ──── vsock port 1025, then bytes ───▶ standard input, output and error of one process
//!   port number ───── vsock port 1026, then frames ──▶ a TCP port of the guest's loopback interface
//! ```
//!
//! Invariants:
//! - the host asks and the guest answers, never the other way round;
//! - every message is bounded ([`MESSAGE_MAX`], [`ID_MAX`], [`HEADER_MAX`]);
//! - nothing here touches a file, a socket or a process: either side may be fed with anything.

pub mod forward;
pub mod stream;

/// The generated messages.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    nonstandard_style,
    unused,
    rust_2018_idioms,
    unreachable_pub
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The generated service: `create_agent` and the trait `Agent` for the guest, `AgentClient` for the host.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    nonstandard_style,
    unused,
    rust_2018_idioms,
    unreachable_pub
)]
pub mod agent_ttrpc {
    use super::agent;
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// The version of this protocol. Both sides must have the same: kernel, agent and daemon are installed together.
pub const VERSION: u32 = 1;

/// The vsock port of the service.
pub const PORT: u32 = 1024;

/// The vsock port of streams.
pub const STREAM_PORT: u32 = 1025;

/// The vsock port on which the guest forwards to a TCP port of its own loopback interface: see [`forward`].
pub const FORWARD_PORT: u32 = 1026;

/// The longest message, in bytes: ttrpc's own limit.
pub const MESSAGE_MAX: usize = 4 << 20;

/// The longest id of a container or an exec, in bytes.
pub const ID_MAX: usize = 128;

/// Where storages that are not shared are mounted in the guest.
pub const STORAGE_TARGET: &str = "/run/kuasar/storage";

/// Word of the kernel's command line that lets [`agent::ExecRequest::in_guest`] work.
pub const DEBUG_WORD: &str = "kuasar.debug";

/// The port of the host that the agent connects to once, when it listens, and says nothing. Only with [`EMULATED_WORD`].
pub const KNOCK_PORT: u32 = 1023;

/// Word of the kernel's command line with which the agent knocks: for hosts with vhost-device-vsock, which never answers a connection that
/// is made before the guest listens.
pub const EMULATED_WORD: &str = "kuasar.vsock=emulated";

/// Word of the kernel's command line that says how much the agent logs to the console: `kuasar.log=debug`.
pub const LOG_WORD: &str = "kuasar.log=";
