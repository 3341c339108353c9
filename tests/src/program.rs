//! The frame of a program that runs a node: whatever ends it, the node is stopped in order.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use crate::vm_node::VmNode;
use crate::{Node, hybrid};

/// A whole `main`: [`run`] on a tokio runtime, with [`hybrid::hide_controllers`] before there is a second thread.
pub fn start(work: impl AsyncFnOnce(&mut Option<Node>) -> Result<ExitCode>) -> ExitCode {
    match hybrid::hide_controllers() {
        Ok(()) => on_runtime(work),
        Err(error) => failed(&error),
    }
}

/// What a program runs, and stops in the end.
pub trait Stop {
    /// Stops it.
    fn stop(self) -> impl Future<Output = Result<()>>;
}

impl Stop for Node {
    async fn stop(self) -> Result<()> {
        Self::stop(self).await
    }
}

impl Stop for VmNode {
    async fn stop(self) -> Result<()> {
        // Its disk is thrown away: nothing to be saved by an orderly end.
        drop(self);
        Ok(())
    }
}

/// As [`start`], for a node in a virtual machine: nothing of this machine is to be hidden.
pub fn start_vm(work: impl AsyncFnOnce(&mut Option<VmNode>) -> Result<ExitCode>) -> ExitCode {
    on_runtime(work)
}

fn on_runtime<N: Stop>(work: impl AsyncFnOnce(&mut Option<N>) -> Result<ExitCode>) -> ExitCode {
    match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime.block_on(run(work)),
        Err(error) => failed(&error.into()),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

/// Runs `work`, which puts its node into the slot it is given, until it is done or SIGINT, SIGTERM or SIGHUP arrives; then
/// stops the node. Errors are printed; the exit code is `work`'s own, 1 after an error, 128 + the signal's number after a signal.
pub async fn run<N: Stop>(work: impl AsyncFnOnce(&mut Option<N>) -> Result<ExitCode>) -> ExitCode {
    let mut node = None;
    let result = until_signal(work(&mut node)).await;
    let stopped = match node {
        Some(node) => node.stop().await,
        None => Ok(()),
    };
    for error in [result.as_ref().err(), stopped.as_ref().err()].into_iter().flatten() {
        eprintln!("error: {error:#}");
    }
    match (result, stopped) {
        (Ok(code), Ok(())) => code,
        _ => ExitCode::FAILURE,
    }
}

/// A program that `work` has just started may be hit by the same signal, and what fails by that may be known before the signal is.
const SAME_SIGNAL: Duration = Duration::from_millis(200);

async fn until_signal(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let signalled = async {
        tokio::select! {
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = terminate.recv() => SignalKind::terminate(),
            _ = hangup.recv() => SignalKind::hangup(),
        }
    };
    tokio::pin!(signalled);
    let kind = tokio::select! {
        result = work => match result {
            Ok(code) => return Ok(code),
            Err(error) => timeout(SAME_SIGNAL, signalled).await.map_err(|_| error)?,
        },
        kind = &mut signalled => kind,
    };
    eprintln!("interrupted: removing everything");
    Ok(ExitCode::from(128 + u8::try_from(kind.as_raw_value())?))
}
