//! The agent of a microVM: containers through the `runc` crate, on the host's behalf.
//!
//! ```text
//!  host ── vsock 1024 ──▶ service ──▶ Guest ──▶ RuncSandboxer ──▶ crun        one pod, in this machine's own namespaces
//!       ── vsock 1025 ──▶ streams ──▶ relay ──▶ FIFO ──▶ process              a connection per standard stream
//!       ── vsock 1026 ──▶ net::forward ──▶ 127.0.0.1                          port-forward
//! ```
//!
//! Invariants:
//! - only the host is served, whoever else can reach a port;
//! - operations of one process run one at a time, and each ends whatever becomes of the connection that asked for it;
//! - everything that is asked for can be asked for again: the host's daemon may die before it hears the answer;
//! - what the host sends is bounded before it is looked at.
//!
//! Being process 1 of a machine is `main`'s part ([`boot`]); everything else runs on any Linux host, where the tests run it.

pub mod boot;
mod connection;
pub mod console;
mod debug;
mod devices;
mod events;
mod guest;
mod lanes;
mod machine;
mod net;
mod process;
mod relay;
mod serve;
mod service;
mod setup;
mod status;
mod storage;
mod submounts;
mod sys;
mod uevent;

pub use connection::{Connection, Listener};
pub use debug::WAIT;
pub use guest::{Guest, Place};
pub use serve::{Ports, serve};
