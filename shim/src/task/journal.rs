//! What has been read from a Task connection and not been answered, kept where the worker's death does not reach: in a memory file that
//! the keeper holds beside the connection.
//!
//! ```text
//!   0      header: which half counts, how many bytes it has, how many are being added
//!   4 Ki   first half  ┐ requests without an answer, as they came, and the beginning of the next
//!   1 Gi   second half ┘
//! ```
//!
//! Bytes are peeked, written down, and only then taken from the socket. A worker that dies in between leaves a header that says
//! how many it was about to take; whether it did, the socket tells by its peek offset (SO_PEEK_OFF, unix(7)), which the kernel moves
//! forward with what is peeked and back with what is taken.
//!
//! An answered request goes: what remains is written to the other half, and the header turns to that. It is written in one piece.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use kuasar_sandboxers::failpoint::{self, Failpoint};
use rustix::{
    fs::{FallocateFlags, fallocate},
    net::{RecvFlags, recv},
};

use crate::sys;

/// A frame's header (<https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md>): length, stream id, type and flags.
const FRAME_HEADER: usize = 10;
/// The type of a request, and that of its answer.
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
/// The flag of a request on whose stream more is to come.
const REMOTE_OPEN: u8 = 2;
/// Where a request's flags tell how many workers have died while it was unanswered, up to three. No peer sets these bits: ttrpc has three
/// others, and ignores what it does not know.
pub(crate) const DEATHS: u8 = 0xc0;
/// One death.
const DEATH: u8 = 0x40;

/// Where the halves begin. The file has holes.
const HALVES: [u64; 2] = [4 << 10, 1 << 30];
const HEADER: usize = 24;
/// A half that has held more than this gives its memory back when it is left.
const LARGE: u64 = 64 << 10;

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Frame {
    /// With the header.
    size: u64,
    stream: u32,
    kind: u8,
    flags: u8,
}

impl Frame {
    fn parse(bytes: &[u8; FRAME_HEADER]) -> Self {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, flags] = *bytes;
        let length = u64::from(u32::from_be_bytes([l0, l1, l2, l3]));
        Self { size: length + FRAME_HEADER as u64, stream: u32::from_be_bytes([s0, s1, s2, s3]), kind, flags }
    }
}

/// Finds the frames in a stream of bytes.
#[derive(Debug, Default)]
struct Frames {
    header: Vec<u8>,
    /// What is still to come of the present frame after its header.
    rest: u64,
    present: Option<Frame>,
}

impl Frames {
    /// Takes bytes; calls `done` for each frame that ends in them, with the number of bytes up to its end.
    fn take(&mut self, bytes: &[u8], mut done: impl FnMut(Frame, usize)) {
        let mut at = 0;
        loop {
            if let Some(frame) = self.present {
                let step = usize::try_from(self.rest).unwrap_or(usize::MAX).min(bytes.len() - at);
                self.rest -= step as u64;
                at += step;
                if self.rest > 0 {
                    return;
                }
                self.present = None;
                done(frame, at);
            }
            let step = (FRAME_HEADER - self.header.len()).min(bytes.len() - at);
            self.header.extend_from_slice(&bytes[at..at + step]);
            at += step;
            let Ok(header) = <[u8; FRAME_HEADER]>::try_from(self.header.as_slice()) else { return };
            self.header.clear();
            let frame = Frame::parse(&header);
            self.rest = frame.size - FRAME_HEADER as u64;
            self.present = Some(frame);
        }
    }
}

/// What one half holds, and what is about to be added to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Head {
    half: u64,
    length: u64,
    pending: u64,
}

/// A request that has not been answered.
#[derive(Clone, Copy, Debug)]
struct Request {
    stream: u32,
    at: u64,
    size: u64,
}

/// The journal of one connection.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    head: Head,
    unanswered: Vec<Request>,
    /// Where the first frame begins that is not whole yet.
    tail: u64,
    coming: Frames,
    going: Frames,
    /// Streams of messages go over it: these cannot be repeated, so nothing is written down.
    streams: bool,
}

/// What a worker before this one has left in a journal.
#[derive(Debug)]
pub(crate) struct Left {
    pub(crate) journal: Journal,
    /// What is to be read before anything from the socket.
    pub(crate) replay: Vec<u8>,
}

impl Journal {
    /// Takes the journal of a connection over, be it empty or not; `None` when the connection cannot go on.
    ///
    /// # Errors
    /// When the file or the socket cannot be used, or the file is not a journal.
    pub(crate) fn open(file: OwnedFd, socket: impl AsFd) -> io::Result<Option<Left>> {
        let file = File::from(file);
        let mut head = Head::default();
        if file.metadata()?.len() >= HEADER as u64 {
            head = read_head(&file)?;
            if head.half == u64::MAX {
                return Ok(None);
            }
            // Everything peeked has been taken when the offset is where it began.
            if head.pending > 0 && sys::peek_offset(&socket)? == 0 {
                head.length += head.pending;
            }
            head.pending = 0;
        }
        sys::reset_peek_offset(&socket)?;
        let mut journal = Self {
            file,
            head,
            unanswered: Vec::new(),
            tail: 0,
            coming: Frames::default(),
            going: Frames::default(),
            streams: false,
        };
        journal.write_head()?;
        // Before there is a buffer for what may be nonsense.
        if head.length > 0 && journal.base() + head.length > journal.file.metadata()?.len() {
            return Err(corrupt());
        }
        let mut replay = vec![0; usize::try_from(head.length).map_err(|_| corrupt())?];
        journal.file.read_exact_at(&mut replay, journal.base())?;
        journal.note(&replay, 0)?;
        for request in &journal.unanswered {
            let place = request.at + FRAME_HEADER as u64 - 1;
            let flags = usize::try_from(place).ok().and_then(|place| replay.get_mut(place)).ok_or_else(corrupt)?;
            if *flags & DEATHS != DEATHS {
                *flags += DEATH;
            }
            journal.file.write_all_at(&[*flags], journal.base() + place)?;
        }
        Ok(Some(Left { journal, replay }))
    }

    /// Reads from the socket, and writes down what it reads.
    ///
    /// # Errors
    /// What the socket says, `WouldBlock` among it; or that nothing can be written down, and then nothing has been read.
    pub(crate) fn read(&mut self, socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
        if self.streams {
            return Ok(recv(&socket, buffer, RecvFlags::DONTWAIT)?.0);
        }
        let (peeked, _) = recv(&socket, &mut *buffer, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        if peeked == 0 {
            return Ok(0);
        }
        failpoint::reach(Failpoint::Peeked);
        let start = self.head.length;
        self.file.write_all_at(&buffer[..peeked], self.base() + start)?;
        self.head.pending = peeked as u64;
        self.write_head()?;
        failpoint::reach(Failpoint::Noted);
        let (taken, _) = recv(&socket, &mut buffer[..peeked], RecvFlags::DONTWAIT)?;
        if taken != peeked {
            // As far as is known the kernel does not do that; then it is seen what is left once more.
            sys::reset_peek_offset(&socket)?;
        }
        failpoint::reach(Failpoint::Taken);
        self.head = Head { length: start + taken as u64, pending: 0, ..self.head };
        self.write_head()?;
        self.note(&buffer[..taken], start)?;
        Ok(taken)
    }

    /// Takes note of bytes that have been written to the socket: an answer ends its request.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn sent(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.streams {
            return Ok(());
        }
        let before = self.unanswered.len();
        let unanswered = &mut self.unanswered;
        self.going.take(bytes, |frame, _| {
            if frame.kind == RESPONSE {
                unanswered.retain(|request| request.stream != frame.stream);
            }
        });
        if self.unanswered.len() == before {
            return Ok(());
        }
        failpoint::reach(Failpoint::Answered);
        self.compact()
    }

    /// Finds the requests in what was added at `start`.
    fn note(&mut self, bytes: &[u8], start: u64) -> io::Result<()> {
        let (unanswered, tail) = (&mut self.unanswered, &mut self.tail);
        let mut streams = false;
        self.coming.take(bytes, |frame, end| {
            let end = start + end as u64;
            if frame.kind == REQUEST {
                streams |= frame.flags & REMOTE_OPEN != 0;
                unanswered.push(Request { stream: frame.stream, at: end.saturating_sub(frame.size), size: frame.size });
            }
            *tail = end;
        });
        if streams {
            self.streams = true;
            self.head = Head { half: u64::MAX, ..Head::default() };
            self.write_head()?;
            self.file.set_len(HEADER as u64)?;
        }
        Ok(())
    }

    /// Writes what is unanswered to the other half and turns to it.
    fn compact(&mut self) -> io::Result<()> {
        let (from, other) = (self.base(), 1 - self.head.half);
        let to = HALVES[usize::from(other == 1)];
        let mut length = 0;
        let mut moved = Vec::new();
        let tail = Request { stream: 0, at: self.tail, size: self.head.length - self.tail };
        for request in self.unanswered.iter().chain([&tail]) {
            let mut bytes = vec![0; usize::try_from(request.size).map_err(|_| corrupt())?];
            self.file.read_exact_at(&mut bytes, from + request.at)?;
            self.file.write_all_at(&bytes, to + length)?;
            moved.push(Request { at: length, ..*request });
            length += request.size;
        }
        let left = self.head.length;
        self.head = Head { half: other, length, pending: 0 };
        self.write_head()?;
        self.tail = moved.pop().map_or(0, |tail| tail.at);
        self.unanswered = moved;
        if left > LARGE {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, hole, from, left)?;
        }
        Ok(())
    }

    fn base(&self) -> u64 {
        HALVES[usize::from(self.head.half == 1)]
    }

    fn write_head(&self) -> io::Result<()> {
        let Head { half, length, pending } = self.head;
        let mut bytes = [0; HEADER];
        for (place, number) in bytes.chunks_exact_mut(8).zip([half, length, pending]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        self.file.write_all_at(&bytes, 0)
    }
}

fn read_head(file: &File) -> io::Result<Head> {
    let mut bytes = [0; HEADER];
    file.read_exact_at(&mut bytes, 0)?;
    let (numbers, _) = bytes.as_chunks::<8>();
    let [half, length, pending] = *numbers else { return Err(corrupt()) };
    let [half, length, pending] = [half, length, pending].map(u64::from_le_bytes);
    // A half has no room for more.
    let fits = length.checked_add(pending).is_some_and(|end| end < HALVES[1] - HALVES[0]);
    if !fits || !matches!(half, 0 | 1 | u64::MAX) {
        return Err(corrupt());
    }
    Ok(Head { half, length, pending })
}

fn corrupt() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the journal of a connection does not make sense")
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    fn frame(stream: u32, kind: u8, flags: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(body.len()).unwrap().to_be_bytes().to_vec();
        bytes.extend(stream.to_be_bytes());
        bytes.extend([kind, flags]);
        bytes.extend(body);
        bytes
    }

    /// A connection, its peer, and its journal as the keeper holds it.
    struct Kept {
        ours: UnixStream,
        peer: UnixStream,
        file: OwnedFd,
    }

    impl Kept {
        fn new() -> Self {
            let (ours, peer) = UnixStream::pair().unwrap();
            Self { ours, peer, file: memfd_create("journal", MemfdFlags::CLOEXEC).unwrap() }
        }

        /// What a new worker does.
        fn open(&self) -> Option<Left> {
            Journal::open(self.file.try_clone().unwrap(), &self.ours).unwrap()
        }

        fn read(&self, journal: &mut Journal, most: usize) -> Vec<u8> {
            let mut buffer = vec![0; most];
            let count = journal.read(&self.ours, &mut buffer).unwrap();
            buffer.truncate(count);
            buffer
        }
    }

    #[test]
    fn requests_are_repeated_until_they_are_answered() {
        let mut kept = Kept::new();
        let Left { mut journal, replay } = kept.open().unwrap();
        assert!(replay.is_empty());
        let (one, three) = (frame(1, REQUEST, 1, b"one"), frame(3, REQUEST, 0, &[7; 100_000]));
        kept.peer.write_all(&one).unwrap();
        assert_eq!(kept.read(&mut journal, 4096), one);
        let Left { mut journal, replay } = kept.open().unwrap();
        assert_eq!(replay, frame(1, REQUEST, 1 | DEATH, b"one"));
        kept.peer.write_all(&three).unwrap();
        let mut got = Vec::new();
        while got.len() < three.len() {
            got.extend(kept.read(&mut journal, 4096));
        }
        assert_eq!(got, three);
        journal.sent(&frame(1, RESPONSE, 0, b"done")).unwrap();
        let Left { mut journal, replay } = kept.open().unwrap();
        assert_eq!(replay, frame(3, REQUEST, DEATH, &[7; 100_000]));
        // In pieces, as a full socket takes it.
        for byte in frame(3, RESPONSE, 0, b"x") {
            assert_eq!(journal.unanswered.len(), 1);
            journal.sent(&[byte]).unwrap();
        }
        assert!(kept.open().unwrap().replay.is_empty());
    }

    #[test]
    fn what_was_peeked_is_read_once_wherever_the_worker_dies() {
        for taken in [false, true] {
            let mut kept = Kept::new();
            let Left { mut journal, .. } = kept.open().unwrap();
            let whole = [frame(1, REQUEST, 0, b"a"), frame(3, REQUEST, 0, b"b")].concat();
            kept.peer.write_all(&whole[..15]).unwrap();
            kept.read(&mut journal, 4096);
            kept.peer.write_all(&whole[15..]).unwrap();
            // As `read` does, up to its death.
            let mut buffer = [0; 4096];
            let (peeked, _) = recv(&kept.ours, &mut buffer, RecvFlags::PEEK).unwrap();
            journal.file.write_all_at(&buffer[..peeked], journal.base() + journal.head.length).unwrap();
            journal.head.pending = peeked as u64;
            journal.write_head().unwrap();
            if taken {
                kept.ours.read_exact(&mut buffer[..peeked]).unwrap();
            }
            let Left { mut journal, replay } = kept.open().unwrap();
            let mut got = replay;
            if !taken {
                got.extend(kept.read(&mut journal, 4096));
            }
            let marked = |stream, body| frame(stream, REQUEST, DEATH, body);
            let fresh = frame(3, REQUEST, 0, b"b");
            let second = if taken { marked(3, b"b") } else { fresh };
            assert_eq!(got, [marked(1, b"a"), second].concat(), "taken: {taken}");
        }
    }

    #[test]
    fn a_connection_with_streams_does_not_go_on() {
        let mut kept = Kept::new();
        let Left { mut journal, .. } = kept.open().unwrap();
        let request = frame(1, REQUEST, REMOTE_OPEN, b"stream");
        kept.peer.write_all(&request).unwrap();
        assert_eq!(kept.read(&mut journal, 4096), request);
        kept.peer.write_all(b"data").unwrap();
        assert_eq!(kept.read(&mut journal, 4096), b"data");
        assert!(kept.open().is_none());
    }

    #[test]
    fn what_is_no_journal_is_an_error() {
        let kept = Kept::new();
        let file = File::from(kept.file.try_clone().unwrap());
        for bytes in [
            vec![0xff; HEADER],
            [2_u64, 0, 0].map(u64::to_le_bytes).concat(),
            [0, 1 << 40, 0_u64].map(u64::to_le_bytes).concat(),
        ] {
            file.write_all_at(&bytes, 0).unwrap();
            if bytes[..8] != [0xff; 8] {
                Journal::open(kept.file.try_clone().unwrap(), &kept.ours).unwrap_err();
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        /// Whatever is in the file: it is refused, or gone on with, and then what the peer sends is still read.
        #[test]
        fn garbage_is_refused_or_read(
            head in prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..48),
                (0_u64..3, 0_u64..600, 0_u64..600).prop_map(|(half, length, pending)| {
                    [if half == 2 { u64::MAX } else { half }, length, pending].map(u64::to_le_bytes).concat()
                }),
            ],
            bodies in [proptest::collection::vec(any::<u8>(), 0..600), proptest::collection::vec(any::<u8>(), 0..600)],
            sent in proptest::collection::vec(any::<u8>(), 1..300),
            answered in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut kept = Kept::new();
            let file = File::from(kept.file.try_clone().unwrap());
            for (body, half) in bodies.iter().zip(HALVES) {
                file.write_all_at(body, half).unwrap();
            }
            file.write_all_at(&head, 0).unwrap();
            if let Ok(Some(Left { mut journal, .. })) = Journal::open(kept.file.try_clone().unwrap(), &kept.ours) {
                kept.peer.write_all(&sent).unwrap();
                let mut got = Vec::new();
                while got.len() < sent.len() {
                    got.extend(kept.read(&mut journal, 128));
                }
                prop_assert_eq!(got, sent);
                // Of answers only those that the server makes are seen; these are worse.
                let _ = journal.sent(&answered);
                let _ = Journal::open(kept.file.try_clone().unwrap(), &kept.ours);
            }
        }

        /// Whatever pieces requests come in, whatever is answered, and wherever workers die: what is read is what was sent, less what
        /// was answered.
        #[test]
        fn nothing_is_lost(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 1..12),
            steps in proptest::collection::vec((1_usize..700, any::<bool>(), any::<bool>()), 1..40),
        ) {
            let mut kept = Kept::new();
            let frames: Vec<_> = bodies.iter().zip(0_u32..).map(|(body, n)| frame(2 * n + 1, REQUEST, 0, body)).collect();
            kept.peer.write_all(&frames.concat()).unwrap();
            let Left { mut journal, .. } = kept.open().unwrap();
            let (mut pending, mut answered) = (Vec::new(), 0);
            let total: usize = frames.iter().map(Vec::len).sum();
            let mut read = 0;
            for (most, answer, die) in steps {
                if read < total {
                    read += kept.read(&mut journal, most).len();
                }
                pending.clear();
                pending.extend(journal.unanswered.iter().map(|request| request.stream));
                if let Some(stream) = pending.first().filter(|_| answer) {
                    journal.sent(&frame(*stream, RESPONSE, 0, b"ok")).unwrap();
                    answered += 1;
                }
                if die {
                    let Left { journal: next, replay } = kept.open().unwrap();
                    journal = next;
                    let mut expected = frames[answered..].concat();
                    expected.truncate(replay.len());
                    let unmarked: usize = frames[..answered].iter().map(Vec::len).sum();
                    prop_assert_eq!(replay.len(), read - unmarked);
                    // Alike but for the mark.
                    let alike = replay.iter().zip(&expected).filter(|(a, b)| a != b).all(|(a, b)| a | DEATHS == b | DEATHS);
                    prop_assert!(alike);
                }
            }
        }
    }
}
