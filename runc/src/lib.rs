//! Containers as processes on this kernel, through an OCI runtime.

pub mod config;

pub use config::{RuncConfig, RuntimeChoice, RuntimeName};
