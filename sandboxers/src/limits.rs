//! The limit of open files. A daemon needs more than a program is given by default (1024), and its children are not to have more:
//! programs that close all descriptors up to their limit, and those that use select(2), work with few only.

use std::{
    io,
    sync::{Mutex, PoisonError},
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What this process was started with, once it has raised it.
static FIRST: Mutex<Option<Rlimit>> = Mutex::new(None);

/// Raises the soft limit to the hard one. Children that are to have the first one back are told it: [`of_children`].
///
/// # Errors
/// When the kernel refuses, which is not expected.
pub fn raise_open_files() -> io::Result<()> {
    let mut first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = *first.get_or_insert_with(|| getrlimit(Resource::Nofile));
    Ok(setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?)
}

/// Runs `start` with the soft limit that this process was started with. For a process of one thread: others would have it, too.
pub fn with_first_open_files<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(limit) = *first else { return Ok(start()) };
    // What is open above it stays so.
    setrlimit(Resource::Nofile, limit)?;
    let started = start();
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(started)
}

/// The soft and the hard limit of open files for children.
#[must_use]
pub fn of_children() -> (u64, u64) {
    let first = FIRST.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = first.unwrap_or_else(|| getrlimit(Resource::Nofile));
    // None is what the kernel calls infinity.
    (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX))
}
