//! Containers as processes on this kernel, through an OCI runtime. In a microVM the guest's agent does the same work with it.
//!
//! ```text
//!  RuncSandboxer ──▶ Pod ──▶ Contained ──▶ Executed           sandboxer, sandbox, container, exec
//!       │             │          │            │
//!       │         namespaces   rewrite        │               what a pod without a pause container needs
//!       │             │          │            │
//!   InitProgram ──────┘        Driver ────────┘               kuasar-init          the OCI runtime's command line
//!                                │
//!                         runc, crun, youki …                 makes the container, and exits
//! ```
//!
//! Invariants:
//! - nothing of ours runs for a pod but its containers, and, if it shares its process ids, a process 1 of a few KiB without any power;
//! - the runtime is called for what only it can do; signals, exits, process lists and resource use come from the kernel;
//! - a signal is sent through a pidfd, so it never reaches a process that has the pid later;
//! - a container's exit is told when nothing of it runs any more and its output has been taken;
//! - everything of a sandbox lies in one directory, is labelled with it, or is in a control group that the runtime knows, so that
//!   it can be removed without any record;
//! - the daemon itself never enters a namespace.
//!
//! Not here: making network namespaces (CNI), the pod's control group (kubelet), images and their layers (snapshotters).

pub mod config;
mod container;
mod exec;
mod io;
mod namespaces;
mod program;
mod rewrite;
mod runtime;
mod sandbox;
mod sandboxer;
mod seccomp;
mod strays;
mod sys;
mod sysctl;
mod unrecorded;

pub use config::{RuncConfig, RuntimeChoice, RuntimeName};
pub use runtime::{Kind, Runtime, Version};
pub use sandboxer::RuncSandboxer;
pub use unrecorded::processes;
