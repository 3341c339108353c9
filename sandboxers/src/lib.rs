//! The contract every sandbox technique implements, and what they all share.
//!
//! ```text
//!   shim ──▶ Registry ──▶ owner task (one per sandbox) ──▶ dyn Sandbox / Container / Process
//!             │ ids            │ lifecycle tables               (runc, wasm, vmm …)
//!             │                │ state store
//!             ▼                ▼
//!        who is where     events, exits, waiters
//! ```
//!
//! Invariants:
//! - a sandbox's state is changed by its owner task only; everyone else sends it requests;
//! - a transition that is not in [`lifecycle`]'s tables does not happen;
//! - operations of one process run one at a time and in the order they came; different processes do not wait for each other;
//! - an exit, once seen, never changes, and is saved before anyone is told;
//! - whatever a start made is undone when the start fails.
//!
//! Nothing here names a backend or a message of containerd.

#[cfg(any(test, feature = "testing"))]
pub mod busybox;
pub mod cgroup;
pub mod collect;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
pub mod contract;
pub mod deferred;
pub mod error;
pub mod event;
pub mod failpoint;
pub mod failures;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
pub mod fdstore;
pub mod format;
pub mod handle;
pub mod id;
pub mod inside;
mod lane;
pub mod lifecycle;
pub mod limits;
mod measure;
pub mod mount;
pub mod netlink;
pub mod offload;
pub mod orphans;
mod outbox;
mod owner;
pub mod podfiles;
pub mod process;
mod procevents;
pub mod programs;
pub mod reaper;
mod recovery;
pub mod registry;
mod requests;
mod saving;
pub mod spec;
pub mod stages;
pub mod stdio;
pub mod store;
mod sys;
pub mod terminal;
pub mod types;
pub mod undo;

pub use contract::{Container, Known, Leftover, Process, Sandbox, SandboxContext, Sandboxer};
pub use error::{Code, Error, Result};
pub use sys::watch;
