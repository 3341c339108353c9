//! The OCI runtime: a program that makes, starts and removes one container per call and then exits.
//!
//! [`probe`] finds one and asks what it is; [`Driver`] calls it. Its command line is that of runc, which crun and youki share
//! (<https://github.com/opencontainers/runtime-tools/blob/master/docs/command-line-interface.md>). It is called only for what only it
//! can do: signals, exits, process lists and resource use come from the kernel, because each call costs milliseconds.

pub(crate) mod console;
mod driver;
mod launch;
mod memory;
mod probe;
mod trial;
mod update;

pub(crate) use driver::{Create, Driver, Exec};
pub(crate) use memory::{CallFile, MemoryFile, listen, remove_call_files};
pub use probe::{Kind, Runtime, Version};
