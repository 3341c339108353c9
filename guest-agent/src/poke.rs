//! Keeping an emulated vsock going.
//!
//! vhost-device-vsock 0.3 looks at its queues when something happens, and stops at the first entry that turns out to be nothing: what
//! is behind it waits until something happens again, which may be never when each side waits for the other. Any packet from the guest
//! is something, and takes one such entry away. So some are sent after bytes have moved, and none when nothing moves for long.

use std::{
    collections::BTreeMap,
    os::fd::RawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};
use tracing::debug;

use crate::sys;

/// How long nothing has to move before a packet is sent, and then before each of the next: as many as there can be entries that are
/// nothing, of which each packet takes one away.
const QUICK: (Duration, usize) = (Duration::from_millis(1), 400);

/// How long before those that follow: in case something has begun to wait meanwhile.
const SLOW: [Duration; 4] =
    [Duration::from_millis(10), Duration::from_millis(50), Duration::from_millis(200), Duration::from_secs(1)];

/// The connections that packets can be sent on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pokes(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    active: Notify,
    moved: AtomicBool,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    count: u64,
    sockets: BTreeMap<u64, RawFd>,
    /// Sizes of a connection's buffer: a packet is sent when it changes.
    size: u64,
}

/// One connection, as long as it is open.
#[derive(Debug)]
pub(crate) struct Registered {
    pokes: Pokes,
    number: u64,
}

/// What the kernel gives a connection, in bytes, and one less.
const SIZE: u64 = 256 << 10;

/// How long to wait before the next packet after so many; `None` when it was the last.
fn wait(sent: usize) -> Option<Duration> {
    let (quick, count) = QUICK;
    if sent < count { Some(quick) } else { SLOW.get(sent - count).copied() }
}

impl Pokes {
    /// Starts to send packets. Inside a tokio runtime.
    pub(crate) fn start() -> Self {
        let pokes = Self::default();
        tokio::spawn(pokes.clone().run());
        pokes
    }

    async fn run(self) {
        loop {
            self.0.active.notified().await;
            let mut sent = 0;
            while let Some(wait) = wait(sent) {
                sleep(wait).await;
                if self.0.moved.swap(false, Ordering::Relaxed) {
                    sent = 0;
                } else {
                    self.poke();
                    sent += 1;
                }
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn poke(&self) {
        let mut open = self.open();
        open.size = if open.size == SIZE { SIZE - 1 } else { SIZE };
        // Under the lock none of them is closed.
        if let Some(socket) = open.sockets.values().next()
            && let Err(error) = sys::set_vsock_buffer(*socket, open.size)
        {
            debug!(%error, "cannot poke the host's vsock device");
        }
    }

    /// Makes a connection known, before which the result is to be dropped.
    pub(crate) fn register(&self, socket: RawFd) -> Registered {
        let mut open = self.open();
        open.count += 1;
        let number = open.count;
        open.sockets.insert(number, socket);
        Registered { pokes: self.clone(), number }
    }
}

impl Registered {
    /// Says that bytes have moved.
    pub(crate) fn moved(&self) {
        // Whoever has said so before has told the one who waits.
        if !self.pokes.0.moved.swap(true, Ordering::Relaxed) {
            self.pokes.0.active.notify_one();
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.pokes.open().sockets.remove(&self.number);
        self.moved();
    }
}
