//! Containers as processes on this kernel, through an OCI runtime.

pub mod config;
mod container;
mod exec;
mod io;
mod namespaces;
mod process;
mod program;
mod rewrite;
mod runtime;
mod sandbox;
mod sandboxer;
mod sys;
mod sysctl;

pub use config::{RuncConfig, RuntimeChoice, RuntimeName};
pub use runtime::{Kind, Runtime, Version};
pub use sandboxer::RuncSandboxer;
