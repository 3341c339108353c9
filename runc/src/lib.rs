//! Containers as processes on this kernel, through an OCI runtime.

pub mod config;
mod runtime;

pub use config::{RuncConfig, RuntimeChoice, RuntimeName};
pub use runtime::{Kind, Runtime, Version};
