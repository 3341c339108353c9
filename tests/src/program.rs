//! The frame of a program that runs a node: whatever ends it, the node is stopped in order.

use std::process::ExitCode;

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};

use crate::{Node, hybrid};

/// A whole `main`: [`run`] on a tokio runtime, with [`hybrid::hide_controllers`] before there is a second thread.
pub fn start(work: impl AsyncFnOnce(&mut Option<Node>) -> Result<ExitCode>) -> ExitCode {
    let runtime = hybrid::hide_controllers().and_then(|()| Ok(tokio::runtime::Runtime::new()?));
    match runtime {
        Ok(runtime) => runtime.block_on(run(work)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs `work`, which puts its node into the slot it is given, until it is done or SIGINT, SIGTERM or SIGHUP arrives; then
/// stops the node. Errors are printed; the exit code is `work`'s own, 1 after an error, 128 + the signal's number after a signal.
pub async fn run(work: impl AsyncFnOnce(&mut Option<Node>) -> Result<ExitCode>) -> ExitCode {
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

async fn until_signal(work: impl Future<Output = Result<ExitCode>>) -> Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let name = tokio::select! {
        result = work => return result,
        _ = interrupt.recv() => SignalKind::interrupt(),
        _ = terminate.recv() => SignalKind::terminate(),
        _ = hangup.recv() => SignalKind::hangup(),
    };
    eprintln!("interrupted: removing everything");
    Ok(ExitCode::from(128 + u8::try_from(name.as_raw_value())?))
}
