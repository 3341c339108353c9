//! What keeper and worker say to each other: a datagram per message, on a pair of connected sockets.

use std::{
    ffi::OsString,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::PathBuf,
    time::{Duration, SystemTime},
};

use kuasar_sandboxers::{reaper::Ended, types::Exit};
use rustix::{
    io::{Errno, fcntl_dupfd_cloexec},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, recv, recvmsg, sendmsg,
    },
};
use serde::{Deserialize, Serialize};

/// The longest name, in bytes.
const NAME_LIMIT: usize = 300;
/// The longest text, in bytes: a path (PATH_MAX) and the id of an upgrade.
const TEXT_LIMIT: usize = (4 << 10) + NAME_LIMIT;
/// The longest message.
const SIZE_LIMIT: usize = 1 + TEXT_LIMIT;
/// The most descriptors parked under one name.
const DESCRIPTORS: usize = 3;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The descriptors that come with it are parked under a name, in place of what was.
    Park(String),
    /// What is parked under a name is closed.
    Drop(String),
    /// To the keeper: accept on the listening socket of that name. Each connection is parked as `<name>/<number>`, with an empty
    /// journal, and told with [`Self::Park`].
    Accept(String),
    /// To the keeper: calls are answered from now on.
    Ready,
    /// To the keeper: the worker still works.
    Alive,
    /// To the keeper: the worker is about to leave, and a program is to take its place, and the keeper's. To a worker: it is that one.
    Upgrade {
        /// Which upgrade this is, for who wants to know what became of it.
        id: String,
        /// The program, by its absolute path.
        binary: PathBuf,
    },
    /// To the keeper: why the worker is about to end instead of getting ready.
    Failed(String),
    /// To the worker: what became of the last upgrade.
    Upgraded(Outcome),
    /// To the worker: a process has ended.
    Exit(Ended),
    /// To the worker: all that was parked and all exits have been told.
    Complete,
    /// To the worker: end, after what is under way. SIGTERM is no such order: anybody may have sent it.
    Stop,
    /// To the worker: what it has parked under a name came without its descriptors. What was parked before is still there.
    Lost(String),
    /// To the keeper: what is parked under a name came without its descriptors, and is to be sent again.
    Again(String),
}

/// A message that was received.
#[derive(Debug)]
pub struct Received {
    /// The message.
    pub message: Message,
    /// What came with it.
    pub descriptors: Vec<OwnedFd>,
    /// There were more descriptors: this process can have no more of them.
    pub is_cut: bool,
}

/// How an upgrade ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Which.
    pub id: String,
    /// Why the new program does not serve, or not as keeper; `None` when it does.
    pub error: Option<String>,
}

impl Message {
    /// That a worker fails, in as many words as there is room for.
    #[must_use]
    pub fn failed(why: &str) -> Self {
        let end = (0..=why.len().min(TEXT_LIMIT / 2)).rfind(|end| why.is_char_boundary(*end)).unwrap_or(0);
        Self::Failed(why[..end].to_owned())
    }

    fn encode(&self) -> Vec<u8> {
        let named = |tag: u8, name: &str| [&[tag], name.as_bytes()].concat();
        match self {
            Self::Park(name) => named(b'p', name),
            Self::Drop(name) => named(b'd', name),
            Self::Accept(name) => named(b'a', name),
            Self::Ready => vec![b'r'],
            Self::Alive => vec![b'l'],
            Self::Complete => vec![b'c'],
            Self::Stop => vec![b's'],
            Self::Lost(name) => named(b'x', name),
            Self::Again(name) => named(b'n', name),
            Self::Failed(why) => named(b'f', why),
            Self::Upgrade { id, binary } => [b"u", id.as_bytes(), b"\0", binary.as_os_str().as_bytes()].concat(),
            Self::Upgraded(Outcome { id, error }) => {
                [b"o", id.as_bytes(), b"\0", error.as_deref().unwrap_or_default().as_bytes()].concat()
            }
            Self::Exit(Ended { pid, start, exit }) => {
                let at = exit.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let nanoseconds = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
                let mut bytes = vec![b'e'];
                for number in [u64::from(*pid), *start, u64::from(exit.status), nanoseconds] {
                    bytes.extend(number.to_le_bytes());
                }
                bytes
            }
        }
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (tag, rest) = bytes.split_first()?;
        let name = || String::from_utf8(rest.to_vec()).ok().filter(|name| !name.is_empty() && name.len() <= NAME_LIMIT);
        Some(match tag {
            b'p' => Self::Park(name()?),
            b'd' => Self::Drop(name()?),
            b'a' => Self::Accept(name()?),
            b'r' if rest.is_empty() => Self::Ready,
            b'l' if rest.is_empty() => Self::Alive,
            b'c' if rest.is_empty() => Self::Complete,
            b's' if rest.is_empty() => Self::Stop,
            b'x' => Self::Lost(name()?),
            b'n' => Self::Again(name()?),
            b'f' => Self::Failed(String::from_utf8(rest.to_vec()).ok()?),
            b'u' | b'o' => {
                let end = rest.iter().position(|byte| *byte == 0)?;
                let (id, rest) = (String::from_utf8(rest[..end].to_vec()).ok()?, &rest[end + 1..]);
                match tag {
                    b'u' => Self::Upgrade { id, binary: OsString::from_vec(rest.to_vec()).into() },
                    _ => {
                        let error = String::from_utf8(rest.to_vec()).ok()?;
                        Self::Upgraded(Outcome { id, error: Some(error).filter(|error| !error.is_empty()) })
                    }
                }
            }
            b'e' => {
                let (numbers, []) = rest.as_chunks::<8>() else { return None };
                let [pid, start, status, at] = *numbers else { return None };
                let [start, at] = [start, at].map(u64::from_le_bytes);
                let [pid, status] = [pid, status].map(|number| u32::try_from(u64::from_le_bytes(number)));
                let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(at);
                Self::Exit(Ended { pid: pid.ok()?, start, exit: Exit { status: status.ok()?, at } })
            }
            _ => return None,
        })
    }
}

/// Sends a message with descriptors.
///
/// # Errors
/// `WouldBlock` when the other side has not read enough and `flags` say not to wait; `OutOfMemory` when the kernel has none for the moment;
/// `BrokenPipe` when the other side is gone.
pub fn send(socket: impl AsFd, message: &Message, descriptors: &[BorrowedFd<'_>], flags: SendFlags) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    // Alignment may leave room for one more than is asked for.
    if descriptors.len() > DESCRIPTORS
        || !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
    {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors under one name"));
    }
    let bytes = message.encode();
    if bytes.len() > SIZE_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name or path is too long"));
    }
    let sent =
        rustix::io::retry_on_intr(|| sendmsg(&socket, &[IoSlice::new(&bytes)], &mut ancillary, flags | SendFlags::NOSIGNAL));
    sent.map(drop).map_err(unsent)
}

fn unsent(errno: Errno) -> io::Error {
    match errno {
        // A socket says either, and std knows only the second.
        Errno::NOBUFS | Errno::NOMEM => io::Error::new(io::ErrorKind::OutOfMemory, errno),
        errno => errno.into(),
    }
}

/// Receives a message with its descriptors; `None` when the other side is gone.
///
/// # Errors
/// `WouldBlock` when there is none and `flags` say not to wait; `InvalidData` for what is no message, or one of another version of this
/// program: there may be more behind it.
pub fn receive(socket: impl AsFd, flags: RecvFlags) -> io::Result<Option<Received>> {
    let mut bytes = [0; SIZE_LIMIT + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::io::retry_on_intr(|| recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags))?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    // A message is never empty.
    if received.bytes == 0 {
        return Ok(None);
    }
    match Message::decode(&bytes[..received.bytes]) {
        Some(message) => Ok(Some(Received { message, descriptors, is_cut: received.flags.contains(ReturnFlags::CTRUNC) })),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "not a message of keeper or worker")),
    }
}

/// Whether the next message parks something, without taking it.
///
/// # Errors
/// `WouldBlock` when there is none.
pub fn parks_next(socket: impl AsFd) -> io::Result<bool> {
    let mut tag = [0; 1];
    let (read, _) = rustix::io::retry_on_intr(|| recv(&socket, &mut tag, RecvFlags::PEEK | RecvFlags::DONTWAIT))?;
    Ok(read == 1 && tag == [b'p'])
}

/// Whether this process could take the descriptors of a message now.
pub fn has_room(socket: impl AsFd) -> bool {
    let taken: Result<Vec<_>, _> = (0..DESCRIPTORS).map(|_| fcntl_dupfd_cloexec(&socket, 0)).collect();
    taken.is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn what_the_kernel_has_no_memory_for_can_be_sent_later() {
        let kinds = [Errno::NOBUFS, Errno::NOMEM, Errno::AGAIN, Errno::PIPE].map(|errno| unsent(errno).kind());
        assert_eq!(kinds[..2], [io::ErrorKind::OutOfMemory; 2]);
        assert_eq!(kinds[2..], [io::ErrorKind::WouldBlock, io::ErrorKind::BrokenPipe]);
    }

    #[test]
    fn messages_arrive_with_their_descriptors() {
        let (one, other) = pair();
        let exit =
            Ended { pid: 7, start: 9, exit: Exit { status: 137, at: SystemTime::UNIX_EPOCH + Duration::from_nanos(11) } };
        let messages = [
            Message::Park("a/1".into()),
            Message::Drop("a".into()),
            Message::Accept("a".into()),
            Message::Ready,
            Message::Complete,
            Message::Failed("no disk".into()),
            Message::Upgrade { id: "7".into(), binary: "/usr/bin/kuasard".into() },
            Message::Upgraded(Outcome { id: "7".into(), error: None }),
            Message::Upgraded(Outcome { id: "8".into(), error: Some("it is a directory".into()) }),
            Message::Stop,
            Message::Lost("a/1".into()),
            Message::Again("a/1".into()),
        ];
        for message in messages.into_iter().chain([Message::Exit(exit)]) {
            let file = std::fs::File::open("/dev/null").unwrap();
            send(&one, &message, &[file.as_fd(), one.as_fd()], SendFlags::empty()).unwrap();
            assert_eq!(parks_next(&other).unwrap(), matches!(message, Message::Park(_)));
            let received = receive(&other, RecvFlags::empty()).unwrap().unwrap();
            assert_eq!((received.message, received.descriptors.len(), received.is_cut), (message, 2, false));
        }
        drop(one);
        assert!(receive(&other, RecvFlags::empty()).unwrap().is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (one, _other) = pair();
        let long = Message::Park("x".repeat(TEXT_LIMIT + 1));
        assert_eq!(send(&one, &long, &[], SendFlags::empty()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        // What is too long to be told is cut, between characters.
        send(&one, &Message::failed(&"ä".repeat(SIZE_LIMIT)), &[], SendFlags::empty()).unwrap();
        let many = [one.as_fd(); DESCRIPTORS + 1];
        assert_eq!(send(&one, &Message::Ready, &many, SendFlags::empty()).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    proptest! {
        #[test]
        fn anything_is_decoded_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(message) = Message::decode(&bytes) {
                prop_assert_eq!(Message::decode(&message.encode()), Some(message));
            }
        }
    }
}
