//! The pod's network in the guest.

use kuasar_guest_protocol::agent::SetUpRequest;
use kuasar_sandboxers::{Error, Result};
use tokio::io::{AsyncRead, AsyncWrite};

/// Brings the interfaces into the form that the host asks for.
pub(crate) async fn apply(_request: &SetUpRequest) -> Result<()> {
    crate::sys::loopback_up().map_err(Error::failed("bring the loopback interface up"))
}

/// Connects a stream of the host's with a port of the loopback interface.
pub(crate) async fn forward(stream: impl AsyncRead + AsyncWrite + Send + Unpin) -> Result<()> {
    drop(stream);
    Err(Error::Unsupported { operation: "forwarding", why: "this agent has none".into() })
}
