//! The header of a stream: what a connection to [`STREAM_PORT`](crate::STREAM_PORT) is for.
//!
//! The host connects and sends one header; the guest answers one byte, [`ACCEPTED`] or [`REFUSED`]; then bytes go one way only.
//!
//! - **Standard input** ends when the host closes the connection. It is read by the guest only as fast as the process reads.
//! - **Output** is never closed by the guest first: some vsock devices throw away what is on its way then. The answer to
//!   `Agent.Wait` says how many bytes there were; when the host has them all, it closes.
//!
//! A stream that is opened again replaces the connection before it, which is closed: the host's daemon was restarted.

use thiserror::Error;

use crate::ID_MAX;

/// The guest takes the stream.
pub const ACCEPTED: u8 = 1;

/// It does not: there is no such process, or no such stream of it.
pub const REFUSED: u8 = 0;

/// The longest header, in bytes.
pub const HEADER_MAX: usize = 4 + 2 * ID_MAX;

/// First byte of each header: this layout.
const LAYOUT: u8 = 1;

/// One of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// To the process. With a terminal, what is typed.
    Stdin,
    /// From the process. With a terminal, all of it.
    Stdout,
    /// From the process; not with a terminal.
    Stderr,
}

impl StreamKind {
    const ALL: [Self; 3] = [Self::Stdin, Self::Stdout, Self::Stderr];

    /// Its name, for people and file names.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// The container; empty for a process beside the containers.
    pub container: String,
    /// The exec; empty for the container's first process.
    pub exec: String,
    /// Which stream.
    pub kind: StreamKind,
}

/// Bytes that are no header.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum BadHeader {
    /// Another layout, of another version.
    #[error("a stream header of layout {0}; this side knows {LAYOUT}")]
    Layout(u8),
    /// No such stream.
    #[error("stream {0}; there are 0, 1 and 2")]
    Kind(u8),
    /// Too long an id.
    #[error("an id of {0} bytes; the longest has {ID_MAX}")]
    Length(usize),
    /// An id that is not UTF-8.
    #[error("an id that is not UTF-8")]
    Text,
}

impl StreamHeader {
    /// The header as it is sent: layout, kind, and the two ids with their lengths before them.
    ///
    /// # Errors
    /// [`BadHeader::Length`] for an id that is too long.
    pub fn encode(&self) -> Result<Vec<u8>, BadHeader> {
        let mut bytes = vec![LAYOUT, self.kind as u8];
        for id in [&self.container, &self.exec] {
            let length = u8::try_from(id.len()).ok().filter(|_| id.len() <= ID_MAX).ok_or(BadHeader::Length(id.len()))?;
            bytes.push(length);
            bytes.extend(id.as_bytes());
        }
        Ok(bytes)
    }

    /// Reads a header from the beginning of `bytes`: it and its length, or `None` when more bytes are needed.
    ///
    /// # Errors
    /// For what can be no header, however it goes on.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, BadHeader> {
        let [layout, kind, rest @ ..] = bytes else {
            return bytes
                .first()
                .filter(|layout| **layout != LAYOUT)
                .map_or(Ok(None), |layout| Err(BadHeader::Layout(*layout)));
        };
        if *layout != LAYOUT {
            return Err(BadHeader::Layout(*layout));
        }
        let kind = *StreamKind::ALL.get(usize::from(*kind)).ok_or(BadHeader::Kind(*kind))?;
        let Some((container, rest)) = id(rest)? else { return Ok(None) };
        let Some((exec, rest)) = id(rest)? else { return Ok(None) };
        Ok(Some((Self { container, exec, kind }, bytes.len() - rest.len())))
    }

    /// How many bytes are missing at least, when [`Self::decode`] of `bytes` needs more: whoever reads that many reads nothing of what
    /// follows the header.
    #[must_use]
    pub fn missing(bytes: &[u8]) -> usize {
        // Layout, kind, a length, that many bytes, another length.
        let container = bytes.get(2).map(|length| 3 + usize::from(*length) + 1);
        let Some(container) = container else { return 4 - bytes.len() };
        let exec = bytes.get(container - 1).map(|length| container + usize::from(*length));
        exec.unwrap_or(container).saturating_sub(bytes.len()).max(1)
    }
}

fn id(bytes: &[u8]) -> Result<Option<(String, &[u8])>, BadHeader> {
    let Some((length, rest)) = bytes.split_first() else { return Ok(None) };
    let length = usize::from(*length);
    if length > ID_MAX {
        return Err(BadHeader::Length(length));
    }
    let Some((text, rest)) = rest.split_at_checked(length) else { return Ok(None) };
    let text = str::from_utf8(text).map_err(|_| BadHeader::Text)?;
    Ok(Some((text.to_owned(), rest)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn header() -> impl Strategy<Value = StreamHeader> {
        ("[a-zA-Z0-9._-]{0,128}", "\\PC{0,20}", prop::sample::select(&StreamKind::ALL))
            .prop_map(|(container, exec, kind)| StreamHeader { container, exec, kind })
    }

    #[test]
    fn what_is_no_header_is_said_as_early_as_it_can_be() {
        assert_eq!(StreamHeader::decode(b""), Ok(None));
        assert_eq!(StreamHeader::decode(&[2]), Err(BadHeader::Layout(2)));
        assert_eq!(StreamHeader::decode(&[1]), Ok(None));
        assert_eq!(StreamHeader::decode(&[1, 3]), Err(BadHeader::Kind(3)));
        assert_eq!(StreamHeader::decode(&[1, 0, 129]), Err(BadHeader::Length(129)));
        assert_eq!(StreamHeader::decode(&[1, 0, 1, 0xff, 0]), Err(BadHeader::Text));
        let long = StreamHeader { container: "c".repeat(ID_MAX + 1), exec: String::new(), kind: StreamKind::Stdin };
        assert_eq!(long.encode(), Err(BadHeader::Length(ID_MAX + 1)));
        assert_eq!(StreamHeader { container: "c".repeat(300), ..long }.encode(), Err(BadHeader::Length(300)));
    }

    #[test]
    fn the_longest() {
        let id = "i".repeat(ID_MAX);
        let longest = StreamHeader { container: id.clone(), exec: id, kind: StreamKind::Stderr }.encode().unwrap();
        assert_eq!(longest.len(), HEADER_MAX);
    }

    proptest! {
        #[test]
        fn round_trip_with_anything_behind_it(header in header(), rest in vec(any::<u8>(), 0..40)) {
            let mut bytes = header.encode().unwrap();
            let length = bytes.len();
            for end in 0..length {
                prop_assert_eq!(StreamHeader::decode(&bytes[..end]), Ok(None));
                let missing = StreamHeader::missing(&bytes[..end]);
                prop_assert!(missing > 0 && end + missing <= length, "{} of {} are there, {} missing", end, length, missing);
            }
            bytes.extend(rest);
            prop_assert_eq!(StreamHeader::decode(&bytes), Ok(Some((header, length))));
        }
    }

    #[test]
    fn fuzz_headers() {
        bolero::check!().with_type::<(Vec<u8>, bool)>().for_each(|(bytes, plausible)| {
            let mut bytes = bytes.clone();
            if *plausible && bytes.len() > 2 {
                (bytes[0], bytes[1], bytes[2]) = (LAYOUT, bytes[1] % 3, bytes[2] % 130);
            }
            match StreamHeader::decode(&bytes) {
                Ok(Some((header, length))) => assert_eq!(header.encode().unwrap(), &bytes[..length]),
                Ok(None) => assert!(bytes.len() < HEADER_MAX && StreamHeader::missing(&bytes) > 0),
                Err(_) => {}
            }
        });
    }
}
