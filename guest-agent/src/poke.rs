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
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};
use tracing::debug;

use crate::sys;

/// How long nothing has to move before a packet is sent, and between it and the next.
const QUICK: Duration = Duration::from_millis(1);

/// How many are sent after something has moved at least, and at most.
const COUNT: (u64, u64) = (10, 10_000);

/// How many bytes moved may leave one such entry: less than the guest's smallest buffer.
const PER_ENTRY: u64 = 2 << 10;

/// How long before those that follow: in case something has begun to wait meanwhile.
const SLOW: [Duration; 4] =
    [Duration::from_millis(10), Duration::from_millis(50), Duration::from_millis(200), Duration::from_secs(1)];

/// The connections that packets can be sent on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pokes(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    active: Notify,
    /// In bytes, since it was looked at last.
    moved: AtomicU64,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    count: u64,
    /// Those for calls, whose buffers are never full: a buffer that gets smaller then would be overrun.
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

impl Pokes {
    /// Starts to send packets. Inside a tokio runtime.
    pub(crate) fn start() -> Self {
        let pokes = Self::default();
        tokio::spawn(pokes.clone().run());
        pokes
    }

    async fn run(self) {
        let mut left = 0u64;
        loop {
            self.0.active.notified().await;
            let mut slow = SLOW.iter();
            while let Some(wait) = if left > 0 { Some(&QUICK) } else { slow.next() } {
                sleep(*wait).await;
                match self.0.moved.swap(0, Ordering::Relaxed) {
                    0 => {
                        self.poke();
                        left = left.saturating_sub(1);
                    }
                    bytes => {
                        left = (left + bytes / PER_ENTRY).clamp(COUNT.0, COUNT.1);
                        slow = SLOW.iter();
                    }
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

    /// Makes a connection known, before which the result is to be dropped; `socket` is one that packets can be sent on.
    pub(crate) fn register(&self, socket: Option<RawFd>) -> Registered {
        let mut open = self.open();
        open.count += 1;
        let number = open.count;
        open.sockets.extend(socket.map(|socket| (number, socket)));
        Registered { pokes: self.clone(), number }
    }
}

impl Registered {
    /// Says that bytes have moved.
    pub(crate) fn moved(&self, bytes: u64) {
        // Whoever has said so before has told the one who waits.
        if self.pokes.0.moved.fetch_add(bytes.max(1), Ordering::Relaxed) == 0 {
            self.pokes.0.active.notify_one();
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.pokes.open().sockets.remove(&self.number);
        self.moved(0);
    }
}
