//! What happens in sandboxes, for whoever publishes it.

use std::{fmt, path::PathBuf, sync::Arc, time::SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

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

impl Sent {
    /// Says that the event is dealt with: its sender need not keep it any longer.
    pub fn delivered(mut self) {
        if let Some(tell) = self.delivered.take() {
            tell();
        }
    }
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.event.fmt(f)
    }
}

/// Where events go. Sending never blocks and never fails. Each sandbox has a few events on their way at a time, which bounds what waits.
#[derive(Clone, Debug)]
pub struct EventSink(mpsc::UnboundedSender<Sent>);

impl EventSink {
    /// A sink and its receiving end.
    #[must_use]
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Sent>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self(sender), receiver)
    }

    /// Sends an event, which its sender keeps until `delivered` is called.
    pub fn send(&self, event: Event, delivered: impl FnOnce() + Send + 'static) {
        let sent = Sent { event, delivered: Some(Box::new(delivered)) };
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

/// What a backend notices by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The kernel has killed processes of the container because its memory limit was reached.
    OutOfMemory {
        /// How many since the container was made, so that a report can be repeated; `None`: more than were reported before.
        kills: Option<u64>,
    },
}

/// A [`Notice`] on its way.
#[derive(Debug)]
pub struct Noticed {
    /// The container it is about.
    pub container: ContainerId,
    /// What was noticed.
    pub notice: Notice,
    /// Dropped when the notice is kept, or will not be.
    pub kept: oneshot::Sender<()>,
}

/// Where a backend reports what it notices by itself.
#[derive(Clone)]
pub struct Notices(Arc<dyn Fn(Noticed) + Send + Sync>);

impl Notices {
    /// Gives each notice to `take`, which must not block.
    #[must_use]
    pub fn to(take: impl Fn(Noticed) + Send + Sync + 'static) -> Self {
        Self(Arc::new(take))
    }

    /// Notices and their receiving end.
    #[must_use]
    pub fn channel() -> (Self, mpsc::UnboundedReceiver<Noticed>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        // Without a receiver it is not kept, which its reporter sees.
        (Self::to(move |noticed| drop(sender.send(noticed))), receiver)
    }

    /// Reports a notice. What is returned resolves when the notice is saved, and with it the event that tells of it.
    pub fn report(&self, container: &ContainerId, notice: Notice) -> impl Future<Output = ()> + Send + use<> {
        let (kept, saved) = oneshot::channel();
        (self.0)(Noticed { container: container.clone(), notice, kept });
        async move {
            // Dropped is as good as told.
            let _ = saved.await;
        }
    }
}

impl fmt::Debug for Notices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Notices")
    }
}
