//! Questions to the kernel's network configuration (rtnetlink(7)), one at a time.
//!
//! Synchronous: an answer takes the kernel some microseconds, and whoever asks about another network namespace sits on a thread of its
//! own anyway. Messages are those of `netlink-packet-route`; each is parsed as the one kind it is expected to be, which keeps the rest
//! of that library out of the guest's agent.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_OVERRUN, NetlinkHeader,
    Parseable,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv, send, socket_with,
};

use crate::sys;

/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// The kernel never sends more at once, whatever the buffer (`NETLINK_DUMP`'s limit).
const BUFFER: usize = 32 << 10;

/// How often a list is asked for that changes while it is read.
const ATTEMPTS: usize = 8;

/// A socket of the network namespace that the calling thread was in when it was opened.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What one message was, to whoever waits for it.
enum Reply<'a> {
    /// The question is answered.
    End(io::Result<()>),
    /// A part of the answer.
    Part(u16, &'a [u8]),
}

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn open() -> io::Result<Self> {
        Self::subscribed(0)
    }

    /// Opens one that is told of changes too: `groups` are the bits of rtnetlink(7)'s multicast groups (`RTMGRP_LINK`). Such a socket is
    /// for [`Self::changed`] only: its answers would be among the news.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn subscribed(groups: u32) -> io::Result<Self> {
        // Without a protocol: 0, which is NETLINK_ROUTE.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        sys::explain_netlink_errors(socket.as_fd())?;
        bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// The socket, to wait until it has news.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Reads the news that are there, and forgets them: what they are about is asked for anew, since they may have been too many for the
    /// socket.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn changed(&mut self) -> io::Result<()> {
        loop {
            match recv(&self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok(_) | Err(rustix::io::Errno::INTR | rustix::io::Errno::NOBUFS) => {}
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Asks for a change of type `kind` (`RTM_NEWLINK`) with `flags` (`NLM_F_CREATE`), and waits until it is made.
    ///
    /// # Errors
    /// What the kernel says, in words where it has some; its number is kept only where it has none, so see [`errno`].
    pub fn request(&mut self, kind: u16, flags: u16, message: &impl Emitable) -> io::Result<()> {
        self.ask(kind, flags | NLM_F_ACK, message)?;
        loop {
            let mut end = None;
            self.receive(|_, reply| {
                if let Reply::End(result) = reply {
                    end = Some(result);
                }
                Ok(())
            })?;
            if let Some(result) = end {
                return result;
            }
        }
    }

    /// Asks for a list with a message of type `kind` (`RTM_GETLINK`); its entries are of type `entry` (`RTM_NEWLINK`). At most `limit`.
    ///
    /// # Errors
    /// What the kernel says; an answer that cannot be parsed; a list that is longer, or does not hold still.
    pub fn list<T: Parseable<[u8]>>(
        &mut self,
        kind: u16,
        entry: u16,
        message: &impl Emitable,
        limit: usize,
    ) -> io::Result<Vec<T>> {
        for _ in 0..ATTEMPTS {
            self.ask(kind, NLM_F_DUMP, message)?;
            let (mut entries, mut changed, mut end) = (Vec::new(), false, None);
            let mut failure = None;
            while end.is_none() {
                self.receive(|flags, reply| {
                    changed |= flags & NLM_F_DUMP_INTR != 0;
                    match reply {
                        Reply::End(result) => end = Some(result),
                        Reply::Part(kind, _) if kind != entry || failure.is_some() => {}
                        Reply::Part(_, _) if entries.len() == limit => {
                            failure = Some(io::Error::other(format!("there are more than {limit}")));
                        }
                        Reply::Part(_, bytes) => match T::parse(bytes) {
                            Ok(parsed) => entries.push(parsed),
                            Err(error) => failure = Some(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
                        },
                    }
                    Ok(())
                })?;
            }
            end.unwrap_or(Ok(()))?;
            match failure {
                Some(failure) => return Err(failure),
                None if changed => {}
                None => return Ok(entries),
            }
        }
        Err(io::Error::other(format!("it changed while it was read, {ATTEMPTS} times")))
    }

    fn ask(&mut self, kind: u16, flags: u16, message: &impl Emitable) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = HEADER + message.buffer_len();
        let mut header = NetlinkHeader::default();
        header.length = u32::try_from(length).map_err(io::Error::other)?;
        header.message_type = kind;
        header.flags = flags | NLM_F_REQUEST;
        header.sequence_number = self.sequence;
        let mut bytes = vec![0; length];
        header.emit(&mut bytes);
        message.emit(&mut bytes[HEADER..]);
        loop {
            match send(&self.socket, &bytes, SendFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives once, and shows each message that answers the last question, with its flags.
    fn receive(&mut self, mut show: impl FnMut(u16, Reply<'_>) -> io::Result<()>) -> io::Result<()> {
        let (received, length) = loop {
            match recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        if length > received {
            return Err(io::Error::other(format!("a message of {length} bytes, more than the kernel sends at once")));
        }
        let mut rest = &self.buffer[..received];
        while let Some((header, payload, next)) = split(rest) {
            rest = next;
            if header.sequence_number != self.sequence {
                continue;
            }
            let reply = match header.message_type {
                NLMSG_ERROR | NLMSG_DONE => Reply::End(outcome(header.message_type, header.flags, payload)),
                NLMSG_OVERRUN => Reply::End(Err(io::Error::other("the kernel lost a part of its answer"))),
                kind => Reply::Part(kind, payload),
            };
            show(header.flags, reply)?;
        }
        Ok(())
    }
}

/// The first message of `bytes`, its payload, and what follows; `None` at the end.
fn split(bytes: &[u8]) -> Option<(NetlinkHeader, &[u8], &[u8])> {
    let word = |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes);
    let half = |at: usize| bytes.get(at..at + 2).and_then(|half| half.try_into().ok()).map(u16::from_ne_bytes);
    let mut header = NetlinkHeader::default();
    header.length = word(0)?;
    header.message_type = half(4)?;
    header.flags = half(6)?;
    header.sequence_number = word(8)?;
    let length = usize::try_from(header.length).ok()?;
    let payload = bytes.get(HEADER..length)?;
    Some((header, payload, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// Set in an error that has attributes behind it.
const ACK_TLVS: u16 = 0x200;
/// Set in an error that does not repeat the whole question.
const CAPPED: u16 = 0x100;
/// The attribute that holds the kernel's own words.
const ERROR_MESSAGE: u16 = 1;

/// An error number with what the kernel says about it.
#[derive(Debug)]
struct Explained {
    errno: i32,
    words: String,
}

impl std::fmt::Display for Explained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", io::Error::from_raw_os_error(self.errno), self.words)
    }
}

impl std::error::Error for Explained {}

/// The error number that [`Netlink::request`] failed with.
#[must_use]
pub fn errno(error: &io::Error) -> Option<i32> {
    let explained = || error.get_ref()?.downcast_ref::<Explained>().map(|explained| explained.errno);
    error.raw_os_error().or_else(explained)
}

/// What an error message, or the end of a list, says.
fn outcome(kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
    let code = payload.get(..4).and_then(|word| word.try_into().ok()).map_or(0, i32::from_ne_bytes);
    if code == 0 {
        return Ok(());
    }
    let words = if flags & ACK_TLVS == 0 { None } else { words(kind, flags, &payload[4..]) };
    Err(match words {
        Some(words) => io::Error::new(io::Error::from_raw_os_error(-code).kind(), Explained { errno: -code, words }),
        None => io::Error::from_raw_os_error(-code),
    })
}

fn words(kind: u16, flags: u16, payload: &[u8]) -> Option<String> {
    // An error repeats the question, of which a capped one has only the header.
    let repeated = match (kind, flags & CAPPED) {
        (NLMSG_DONE, _) => 0,
        (_, 0) => usize::try_from(u32::from_ne_bytes(payload.get(..4)?.try_into().ok()?)).ok()?.next_multiple_of(4),
        _ => HEADER,
    };
    let mut rest = payload.get(repeated..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let attribute = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        if attribute == ERROR_MESSAGE {
            let text = value.split(|byte| *byte == 0).next().unwrap_or_default();
            return Some(String::from_utf8_lossy(text).into_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkMessage;

    use super::*;

    const RTM_NEWLINK: u16 = 16;
    const RTM_DELLINK: u16 = 17;
    const RTM_GETLINK: u16 = 18;

    #[test]
    fn interfaces_are_listed() {
        let mut netlink = Netlink::open().unwrap();
        let links: Vec<LinkMessage> = netlink.list(RTM_GETLINK, RTM_NEWLINK, &LinkMessage::default(), 1000).unwrap();
        assert!(links.iter().any(|link| link.header.index == 1), "{links:?}");
        let error = netlink.list::<LinkMessage>(RTM_GETLINK, RTM_NEWLINK, &LinkMessage::default(), 0).unwrap_err();
        assert_eq!(error.to_string(), "there are more than 0");
        // And the next question is not confused by what was left of the answer.
        assert_eq!(
            netlink.list::<LinkMessage>(RTM_GETLINK, RTM_NEWLINK, &LinkMessage::default(), 1000).unwrap().len(),
            links.len()
        );
    }

    #[test]
    fn the_kernels_refusal_is_told() {
        let mut netlink = Netlink::open().unwrap();
        let mut nothing = LinkMessage::default();
        nothing.header.index = u32::MAX >> 1;
        let error = netlink.request(RTM_DELLINK, 0, &nothing).unwrap_err();
        assert!(matches!(errno(&error), Some(libc::ENODEV | libc::EPERM)), "{error}");
    }

    #[test]
    fn words_are_found_behind_the_question() {
        let mut payload = (-libc::EINVAL).to_ne_bytes().to_vec();
        payload.extend([&20u32.to_ne_bytes()[..], &[0; 16]].concat());
        payload.extend([&9u16.to_ne_bytes()[..], &1u16.to_ne_bytes(), b"why!\0", &[0; 3]].concat());
        let error = outcome(NLMSG_ERROR, ACK_TLVS, &payload).unwrap_err();
        assert!(error.to_string().ends_with(": why!"), "{error}");
        assert_eq!(errno(&error), Some(libc::EINVAL));
        for cut in 4..payload.len() {
            assert_eq!(errno(&outcome(NLMSG_ERROR, ACK_TLVS, &payload[..cut]).unwrap_err()), Some(libc::EINVAL));
        }
        outcome(NLMSG_ERROR, 0, &[0; 4]).unwrap();
    }
}
