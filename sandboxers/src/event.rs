//! What happens in sandboxes, for whoever publishes it.

use std::{path::PathBuf, time::SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    id::{ContainerId, ExecId, Namespace},
    stdio::Stdio,
    types::{Exit, Mount},
};

/// Something that happened to a container or one of its processes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The container.
    pub container: ContainerId,
    /// When.
    pub at: SystemTime,
    /// What.
    pub kind: EventKind,
}

/// The kinds of [`Event`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the variants are containerd's task events, field for field
pub enum EventKind {
    Created {
        bundle: PathBuf,
        rootfs: Vec<Mount>,
        stdio: Stdio,
        pid: u32,
    },
    Started {
        pid: u32,
    },
    ExecAdded {
        exec: ExecId,
    },
    ExecStarted {
        exec: ExecId,
        pid: u32,
    },
    /// The end of a process; `exec` is `None` for the container's first one.
    Exited {
        exec: Option<ExecId>,
        pid: u32,
        exit: Exit,
    },
    Deleted {
        exec: Option<ExecId>,
        pid: u32,
        exit: Exit,
    },
    Paused,
    Resumed,
    /// The kernel killed a process of the container because its memory limit was reached.
    OutOfMemory,
}

impl EventKind {
    pub(crate) fn started(exec: Option<ExecId>, pid: u32) -> Self {
        match exec {
            None => Self::Started { pid },
            Some(exec) => Self::ExecStarted { exec, pid },
        }
    }
}

/// An event on its way.
pub struct Sent {
    /// The event.
    pub event: Event,
    /// Whom to tell when it has been delivered, or never will be.
    delivered: Option<Box<dyn FnOnce() + Send>>,
}

impl From<Event> for Sent {
    /// An event that nobody keeps.
    fn from(event: Event) -> Self {
        Self { event, delivered: None }
    }
}

impl Sent {
    /// Says that the event is dealt with: its sender need not keep it any longer.
    pub fn delivered(mut self) {
        if let Some(tell) = self.delivered.take() {
            tell();
        }
    }
}

impl std::fmt::Debug for Sent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.event.fmt(f)
    }
}

/// Where events go. Sending never blocks and never fails: who publishes must bound what it keeps.
#[derive(Clone, Debug)]
pub struct EventSink(mpsc::UnboundedSender<Sent>);

impl EventSink {
    /// A sink and its receiving end.
    #[must_use]
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Sent>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Tells that something happened now.
    pub fn send(&self, namespace: &Namespace, container: &ContainerId, kind: EventKind) {
        self.pass(Event::now(namespace, container, kind).into());
    }

    /// Tells an event that its sender keeps until `delivered` is called.
    pub(crate) fn send_kept(&self, event: Event, delivered: impl FnOnce() + Send + 'static) {
        self.pass(Sent { event, delivered: Some(Box::new(delivered)) });
    }

    fn pass(&self, sent: Sent) {
        if let Err(mpsc::error::SendError(Sent { event, .. })) = self.0.send(sent) {
            tracing::debug!(container = %event.container, "event dropped: the publisher has ended");
        }
    }
}

impl Event {
    pub(crate) fn now(namespace: &Namespace, container: &ContainerId, kind: EventKind) -> Self {
        Self { namespace: namespace.clone(), container: container.clone(), at: SystemTime::now(), kind }
    }
}
