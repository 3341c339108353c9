//! What happens in sandboxes, for whoever publishes it.

use std::{path::PathBuf, time::SystemTime};

use tokio::sync::mpsc;

use crate::{
    id::{ContainerId, ExecId, Namespace},
    stdio::Stdio,
    types::{Exit, Mount},
};

/// Something that happened to a container or one of its processes.
#[derive(Clone, Debug)]
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
#[derive(Clone, Debug)]
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

/// Where events go. Sending never blocks and never fails: who publishes must bound what it keeps.
#[derive(Clone, Debug)]
pub struct EventSink(mpsc::UnboundedSender<Event>);

impl EventSink {
    /// A sink and its receiving end.
    #[must_use]
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Tells that something happened now.
    pub fn send(&self, namespace: &Namespace, container: &ContainerId, kind: EventKind) {
        let event = Event { namespace: namespace.clone(), container: container.clone(), at: SystemTime::now(), kind };
        if self.0.send(event).is_err() {
            tracing::debug!(%container, "event dropped: the publisher has ended");
        }
    }
}
