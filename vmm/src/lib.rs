//! MicroVMs: pods that have a machine and a kernel of their own.
//!
//! ```text
//!  VmmSandboxer ──▶ VmSandbox ──▶ VmContainer ──▶ VmExec        sandboxer, sandbox, container, exec
//!                      │  │            │
//!       VmSpec ◀───────┘  │            └──▶ AgentClient, streams     over vsock
//!          │              ├──▶ net        the pod's interfaces become NICs
//!          ▼              ├──▶ share      what containers see of the host, through virtiofsd
//!   Hypervisor / Vm       └──▶ process    VMM and helpers: started without root's powers, watched
//!     └ qemu
//! ```
//!
//! Invariants:
//! - a machine is described once, by a [`VmSpec`](spec::VmSpec); a driver only says the same in its hypervisor's words, and what it cannot
//!   do is in its [`Capabilities`](hypervisor::Capabilities);
//! - the guest is hostile: each of its answers is bounded in size, rate and time, and nothing it says becomes a path on the host;
//! - read-only is enforced on the host, by mounts and by the VMM, never in the guest;
//! - everything of a sandbox lies in one directory, or in the control group that carries its name, so that it can be removed without any
//!   record.

mod agent;
mod boot;
mod calls;
pub mod config;
mod console;
mod container;
mod dial;
mod disks;
mod ended;
mod features;
mod guest;
pub mod hypervisor;
mod image;
mod inside;
pub mod launch;
mod machine_dir;
pub mod net;
mod pod;
pub mod qemu;
pub mod qmp;
mod relay;
mod rewrite;
mod sandboxer;
mod share;
mod sizing;
pub mod spec;
mod stats;
mod storage;
mod sys;
pub mod virtiofsd;
mod vsock;
pub mod vsock_device;

pub use config::{Annotation, HypervisorConfig, VmmConfig};
pub use features::features;
pub use sandboxer::{VmmSandboxer, processes};
