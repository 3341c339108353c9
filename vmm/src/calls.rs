//! What is asked of the guest about one of its processes.

use kuasar_guest_protocol::agent::{ProcessRequest, ResizeRequest, SignalRequest, state_response::State};
use kuasar_sandboxers::{Code, Result, types::WindowSize};
use tracing::warn;

use crate::{
    agent::{QUICK, SLOW},
    pod::{Guest, Pod},
};

/// Sends a signal to a process.
pub(crate) async fn signal(guest: &Guest, process: &ProcessRequest, signal: u32, all: bool) -> Result<()> {
    let ProcessRequest { container, exec, .. } = process.clone();
    let request = SignalRequest { container, exec, signal, all, ..SignalRequest::default() };
    let sent = guest
        .agent()
        .call("send a signal", Some(QUICK), |client, context| async move { client.signal(context, &request).await });
    sent.await.map(drop)
}

/// Sets the size of a process's terminal.
pub(crate) async fn resize(guest: &Guest, process: &ProcessRequest, size: WindowSize) -> Result<()> {
    let ProcessRequest { container, exec, .. } = process.clone();
    let (width, height) = (size.width.into(), size.height.into());
    let request = ResizeRequest { container, exec, width, height, ..ResizeRequest::default() };
    let resized = guest
        .agent()
        .call("resize a terminal", Some(QUICK), |client, context| async move { client.resize(context, &request).await });
    resized.await.map(drop)
}

/// The pid of a process that an earlier daemon may have started without saving that. When the guest does not say, it is taken for one that was
/// not: starting it, which somebody still waits for if it was, is done once by the guest, however often it is asked.
pub(crate) async fn known_to_run(pod: &Pod, request: &ProcessRequest) -> Option<u32> {
    let guest = pod.guest().ok()?;
    let asked = request.clone();
    let asked = guest
        .agent()
        .call("ask for a process", Some(QUICK), |client, context| async move { client.state(context, &asked).await });
    match asked.await {
        Ok(state) => matches!(state.state.enum_value(), Ok(State::RUNNING | State::ENDED)).then_some(state.pid),
        Err(error) => {
            if error.code() != Code::NotFound {
                let (container, exec) = (&request.container, &request.exec);
                warn!(container, exec, error = error.report(), "the guest does not say whether a process was started");
            }
            None
        }
    }
}

/// Has the guest end a process and forget it, if there still is a guest.
pub(crate) async fn delete(pod: &Pod, request: &ProcessRequest) -> Result<()> {
    let Ok(guest) = pod.guest() else { return Ok(()) };
    let request = request.clone();
    let deleted = guest
        .agent()
        .call("delete a process", Some(SLOW), |client, context| async move { client.delete(context, &request).await });
    tokio::select! {
        deleted = deleted => match deleted {
            Err(error) if error.code() == Code::NotFound => Ok(()),
            // It went with the machine.
            Err(_) if guest.has_ended() => Ok(()),
            deleted => deleted.map(drop),
        },
        _ = guest.ended() => Ok(()),
    }
}
