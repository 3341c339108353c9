//! The north face: all that containerd speaks, and the composition root kuasard.
//!
//! ```text
//!   containerd ──gRPC──▶ kuasard.sock   controller (pods), admin (kuasarctl)      ┐
//!              ──ttrpc─▶ task.sock      task (containers), streaming (their stdio) ├─ calls ─▶ Registry ─▶ …
//!              ◀─ttrpc── events         what happened, in order                   ┘
//! ```
//!
//! Invariants:
//! - translation only: no state of a sandbox or container is kept here;
//! - errors become statuses in [`status`] and nowhere else;
//! - an operation that has begun runs to its end, whatever its client does ([`calls`]);
//! - backends are named by the composition root alone: `config`, `check` and the binaries.
//!
//! Not here: shim v2's `start` (containers without a sandbox of their own come with a later issue), and checkpoints.

mod abandoned;
pub mod admin;
pub mod arguments;
pub mod backends;
pub mod calls;
pub mod check;
pub mod config;
pub mod controller;
pub mod events;
pub mod forgotten;
pub mod gc;
mod inside;
mod inspect;
pub mod keeper;
pub mod metrics;
pub mod options;
pub mod pod;
pub mod proto;
pub mod server;
pub mod status;
pub mod streaming;
pub mod sys;
pub mod task;
pub mod upgrade;
