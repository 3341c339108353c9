//! Exits of all processes of the host, as the kernel's process events connector sends them (`linux/cn_proc.h`, `CONFIG_PROC_EVENTS`).
//!
//! The kernel multicasts every fork, exec and exit of the host. A filter in the kernel drops all but exits, so that this process is not even
//! woken for the others. An exit is sent after the process has become a zombie, so its pidfd is readable first, and its parent may have
//! reaped it already.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use nix::time::{ClockId, clock_gettime};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind,
    netlink::{self, SocketAddrNetlink},
    recvfrom, send, socket_with, sockopt,
};

use crate::{reaper::since_boot, sys};

/// Room for what is not read at once, in bytes: a packet takes about 1 KiB of it, so some 4000 exits.
const ROOM: usize = 4 << 20;

/// `NLMSG_DONE`, the only type of the connector's messages.
const DONE: u16 = 3;
/// `CN_VAL_PROC`: with `CN_IDX_PROC`, the address of process events. The index is the multicast group, too.
const VALUE: u32 = 1;

/// Offsets in a packet: `struct nlmsghdr` (16 bytes), `struct cn_msg` (20 bytes), `struct proc_event`.
mod at {
    pub(super) const INDEX: usize = 16;
    pub(super) const VALUE: usize = 20;
    pub(super) const ACKNOWLEDGED: usize = 28;
    pub(super) const KIND: usize = 36;
    pub(super) const TIME: usize = 44;
    /// Of an acknowledgement.
    pub(super) const ERROR: usize = 52;
    pub(super) const THREAD: usize = 52;
    pub(super) const PROCESS: usize = 56;
    pub(super) const STATUS: usize = 60;
}

/// The length of a request: the two headers, and what is asked for.
const REQUEST: usize = 40;

/// Packets that are passed over while the answer to a subscription is looked for. It is behind what others' subscriptions have sent since
/// the socket was bound, a moment ago.
const BEFORE_ANSWER: usize = 4096;

/// A subscription. The kernel keeps its queue as long as any process has the socket open.
#[derive(Debug)]
pub(crate) struct ProcessEvents(OwnedFd);

/// The end of a thread: a leader's, or another's with a status that is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadExit {
    /// The pid of the process, in the host's namespace.
    pub(crate) process: u32,
    /// As wait(2) gives it.
    pub(crate) wait_status: i32,
    /// When it ended, since boot.
    pub(crate) at: Duration,
}

/// One packet.
#[derive(Debug, PartialEq, Eq)]
enum Packet {
    Exit(ThreadExit),
    /// An answer to the request of that number, with an error number or 0.
    Answer(u32, u32),
    Other,
}

impl ProcessEvents {
    /// Subscribes. What ends after this returns is received.
    ///
    /// # Errors
    /// Where the kernel has no connector, or it serves only processes in the host's pid and network namespaces that have CAP_NET_ADMIN.
    pub(crate) fn subscribe() -> io::Result<Self> {
        static REQUESTS: AtomicU32 = AtomicU32::new(1);
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, Some(netlink::CONNECTOR))?;
        // Before anything can arrive.
        sys::attach_filter(socket.as_fd(), &filter())?;
        sockopt::set_socket_recv_buffer_size_force(&socket, ROOM)?;
        bind(&socket, &SocketAddrNetlink::new(0, 1 << (libc::CN_IDX_PROC - 1)))?;
        let events = Self(socket);
        let number = std::process::id().rotate_left(8) ^ REQUESTS.fetch_add(1, Ordering::Relaxed);
        events.request(libc::PROC_CN_MCAST_LISTEN, number)?;
        // The kernel answers before send(2) returns, or not at all.
        for _ in 0..BEFORE_ANSWER {
            match events.receive() {
                Ok(Some(Packet::Answer(to, 0))) if to == number.wrapping_add(1) => return Ok(events),
                Ok(Some(Packet::Answer(to, error))) if to == number.wrapping_add(1) => {
                    return Err(io::Error::from_raw_os_error(error.cast_signed()));
                }
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => return Err(error),
            }
        }
        let why = "no answer: it wants CONFIG_PROC_EVENTS, CAP_NET_ADMIN and the host's pid namespace";
        Err(io::Error::new(io::ErrorKind::Unsupported, why))
    }

    /// A subscription that an earlier process has made, with what has arrived since.
    pub(crate) fn inherit(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// The socket, to wait until something has arrived, or to hand it on.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The next exit that has arrived; `None` when there is no more.
    ///
    /// # Errors
    /// `OutOfMemory` when some were lost, for want of room. The kernel drops more until all that has arrived is read, and says it once.
    pub(crate) fn next(&self) -> io::Result<Option<ThreadExit>> {
        loop {
            match self.receive()? {
                Some(Packet::Exit(exit)) => return Ok(Some(exit)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// Ends the subscription for whatever process has the socket open. The kernel counts subscribers, and not their deaths: it goes on making
    /// events, to drop them at once, after one that was not ended.
    pub(crate) fn end(&self) {
        if let Err(error) = self.request(libc::PROC_CN_MCAST_IGNORE, 0) {
            tracing::debug!(%error, "cannot end the subscription to process events");
        }
    }

    fn request(&self, operation: u32, number: u32) -> io::Result<()> {
        let mut packet = Vec::with_capacity(REQUEST);
        packet.extend(u32::try_from(REQUEST).map_err(io::Error::other)?.to_ne_bytes());
        packet.extend(DONE.to_ne_bytes());
        // No flags, sequence number or port.
        packet.extend([0; 10]);
        for word in [libc::CN_IDX_PROC, VALUE, number, number] {
            packet.extend(word.to_ne_bytes());
        }
        packet.extend(4u16.to_ne_bytes());
        packet.extend([0; 2]);
        packet.extend(operation.to_ne_bytes());
        rustix::io::retry_on_intr(|| send(&self.0, &packet, SendFlags::empty()))?;
        Ok(())
    }

    fn receive(&self) -> io::Result<Option<Packet>> {
        let mut buffer = [0; 256];
        loop {
            let (length, sender) = match recvfrom(&self.0, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _, sender)) => (length, sender),
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                // A socket says either, and std knows only the second.
                Err(errno @ (rustix::io::Errno::NOBUFS | rustix::io::Errno::NOMEM)) => {
                    return Err(io::Error::new(io::ErrorKind::OutOfMemory, errno));
                }
                Err(errno) => return Err(errno.into()),
            };
            // A container in the host's network with CAP_NET_ADMIN may send to this socket, too.
            let is_kernel = sender.and_then(|sender| SocketAddrNetlink::try_from(sender).ok()).is_some_and(|it| it.pid() == 0);
            if is_kernel {
                return Ok(Some(parse(&buffer[..length])));
            }
        }
    }
}

/// Accepts answers, exits of leaders, and exits of other threads with a status: those of a process whose leader has ended before it.
fn filter() -> [libc::sock_filter; 11] {
    let load = |offset: usize| instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset as u32, 0, 0);
    let is = |value: u32, yes: u8, no: u8| instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value, yes, no);
    let end = |length: u32| instruction(libc::BPF_RET | libc::BPF_K, length, 0, 0);
    [
        // Words are loaded as of the network's byte order.
        load(at::KIND),
        is(libc::PROC_EVENT_NONE.to_be(), 8, 0),
        is(libc::PROC_EVENT_EXIT.to_be(), 0, 6),
        load(at::THREAD),
        instruction(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0),
        load(at::PROCESS),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_X, 0, 3, 0),
        load(at::STATUS),
        is(0, 0, 1),
        end(0),
        end(u32::MAX),
    ]
}

fn instruction(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    // Codes have 16 bits.
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn parse(packet: &[u8]) -> Packet {
    let word = |at: usize| packet.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes);
    let long = |at: usize| packet.get(at..at + 8).and_then(|long| long.try_into().ok()).map(u64::from_ne_bytes);
    let parse = || {
        if (word(at::INDEX)?, word(at::VALUE)?) != (libc::CN_IDX_PROC, VALUE) {
            return None;
        }
        Some(match word(at::KIND)? {
            libc::PROC_EVENT_NONE => Packet::Answer(word(at::ACKNOWLEDGED)?, word(at::ERROR)?),
            libc::PROC_EVENT_EXIT => Packet::Exit(ThreadExit {
                process: word(at::PROCESS)?,
                wait_status: word(at::STATUS)?.cast_signed(),
                at: from_monotonic(Duration::from_nanos(long(at::TIME)?)),
            }),
            _ => Packet::Other,
        })
    };
    parse().unwrap_or(Packet::Other)
}

/// The time since boot; the monotonic clock stands still while the machine is suspended.
fn from_monotonic(monotonic: Duration) -> Duration {
    // It does not fail: the clock exists on every Linux.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
    monotonic + since_boot().saturating_sub(now)
}

#[cfg(test)]
mod tests {
    use std::{process::Command, thread, time::Instant};

    use super::*;

    fn subscribed(test: &str) -> Option<ProcessEvents> {
        let skipped = |error: &io::Error| eprintln!("SKIP {test}: no process events: {error}");
        ProcessEvents::subscribe().inspect_err(skipped).ok()
    }

    /// The exits of a process until it has come, or those that were lost.
    fn exits_of(events: &ProcessEvents, pid: u32) -> io::Result<Vec<ThreadExit>> {
        let by = Instant::now() + Duration::from_secs(20);
        let mut all = Vec::new();
        while all.is_empty() {
            assert!(Instant::now() < by, "no exit of {pid} came");
            match events.next()? {
                Some(exit) if exit.process == pid => all.push(exit),
                Some(_) => {}
                None => thread::yield_now(),
            }
        }
        Ok(all)
    }

    #[test]
    fn an_exit_is_received_though_it_is_reaped() {
        let Some(events) = subscribed("an_exit_is_received_though_it_is_reaped") else { return };
        let before = since_boot();
        for (script, wait_status) in [("exit 0", 0), ("exit 7", 7 << 8), ("kill -9 $$", 9)] {
            let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            child.wait().unwrap();
            let exits = exits_of(&events, child.id()).unwrap();
            assert_eq!(exits[0].wait_status, wait_status, "{script}");
            assert!((before..=since_boot()).contains(&exits[0].at), "{before:?} {exits:?}");
        }
        events.end();
    }

    #[test]
    fn threads_and_forks_do_not_take_room() {
        let Some(events) = subscribed("threads_and_forks_do_not_take_room") else { return };
        // Of this process no leader ends.
        for _ in 0..50 {
            thread::spawn(|| {}).join().unwrap();
        }
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let by = Instant::now() + Duration::from_secs(20);
        loop {
            match events.receive().unwrap() {
                Some(Packet::Exit(exit)) => {
                    assert_ne!(exit.process, std::process::id(), "a thread's");
                    if exit.process == child.id() {
                        break;
                    }
                }
                Some(Packet::Answer(..)) => {}
                Some(Packet::Other) => panic!("no exit has passed the filter"),
                None => assert!(Instant::now() < by, "no exit came"),
            }
        }
        events.end();
    }

    #[test]
    fn losses_are_noticed_and_not_the_end() {
        let Some(events) = subscribed("losses_are_noticed_and_not_the_end") else { return };
        // The least that there is.
        sockopt::set_socket_recv_buffer_size(&events.0, 1).unwrap();
        for _ in 0..100 {
            Command::new("true").spawn().unwrap().wait().unwrap();
        }
        let mut lost = false;
        loop {
            match events.next() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => lost |= error.kind() == io::ErrorKind::OutOfMemory,
            }
        }
        assert!(lost);
        sockopt::set_socket_recv_buffer_size_force(&events.0, ROOM).unwrap();
        let mut child = Command::new("sh").args(["-c", "exit 3"]).spawn().unwrap();
        child.wait().unwrap();
        let exits = loop {
            match exits_of(&events, child.id()) {
                // Of others, before there was room.
                Err(error) if error.kind() == io::ErrorKind::OutOfMemory => {}
                exits => break exits.unwrap(),
            }
        };
        assert_eq!(exits[0].wait_status, 3 << 8);
        events.end();
    }

    #[test]
    fn what_is_cut_short_is_no_exit() {
        let mut packet = vec![0; at::STATUS + 4];
        for (at, word) in [(at::INDEX, 1), (at::VALUE, 1), (at::KIND, libc::PROC_EVENT_EXIT), (at::PROCESS, 7), (at::STATUS, 9)]
        {
            packet[at..at + 4].copy_from_slice(&u32::to_ne_bytes(word));
        }
        assert!(matches!(parse(&packet), Packet::Exit(ThreadExit { process: 7, wait_status: 9, .. })));
        for length in 0..packet.len() {
            assert_eq!(parse(&packet[..length]), Packet::Other);
        }
        packet[at::INDEX] = 2;
        assert_eq!(parse(&packet), Packet::Other);
    }
}
