//! Connections to a TCP port of the guest's loopback interface, carried over [`FORWARD_PORT`](crate::FORWARD_PORT).
//!
//! The host connects and sends the port, two bytes, big endian. The guest answers [`CONNECTED`] or [`REFUSED`]. Then both send frames:
//! two bytes, big endian, with the length of what follows; an empty frame says that nothing more comes this way, while the other way may
//! go on. A connection that ends without it was broken off.
//!
//! Frames, and not the connection's own end, because some vsock devices know no half-closed connections, and throw away what is on its
//! way when the guest closes. So the guest never closes first, unless it breaks off.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};

/// The guest has connected.
pub const CONNECTED: u8 = 1;

/// Nothing listens there.
pub const REFUSED: u8 = 0;

/// How much is sent in a frame, in bytes. What is received may have more.
const CHUNK: usize = 16 << 10;

/// The host's side of the opening: names the port; true when the guest has connected to it.
///
/// # Errors
/// When the connection breaks, or the guest answers something else.
pub async fn request<C: AsyncRead + AsyncWrite + Unpin>(carrier: &mut C, port: u16) -> io::Result<bool> {
    carrier.write_all(&port.to_be_bytes()).await?;
    carrier.flush().await?;
    match carrier.read_u8().await? {
        CONNECTED => Ok(true),
        REFUSED => Ok(false),
        other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("the guest answers {other}"))),
    }
}

/// Copies between a plain connection and one that carries frames, until both ways have ended.
///
/// # Errors
/// When one of the two breaks. The caller then breaks off the other.
pub async fn relay<P, C>(plain: &mut P, carrier: &mut C) -> io::Result<()>
where
    P: AsyncRead + AsyncWrite + Unpin,
    C: AsyncRead + AsyncWrite + Unpin,
{
    let (mut plain_in, mut plain_out) = split(plain);
    let (mut carrier_in, mut carrier_out) = split(carrier);
    let away = async {
        // The length stands before what is read, so that both go out at once.
        let mut frame = vec![0; 2 + CHUNK];
        loop {
            let length = plain_in.read(&mut frame[2..]).await?;
            frame[..2].copy_from_slice(&u16::try_from(length).map_err(io::Error::other)?.to_be_bytes());
            carrier_out.write_all(&frame[..2 + length]).await?;
            carrier_out.flush().await?;
            if length == 0 {
                return Ok(());
            }
        }
    };
    let back = async {
        let mut frame = vec![0; CHUNK];
        loop {
            let mut left = usize::from(carrier_in.read_u16().await?);
            if left == 0 {
                return match plain_out.shutdown().await {
                    // It is closed already, which is as good.
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                    done => done,
                };
            }
            while left > 0 {
                let part = left.min(CHUNK);
                let length = carrier_in.read(&mut frame[..part]).await?;
                if length == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                plain_out.write_all(&frame[..length]).await?;
                left -= length;
            }
        }
    };
    tokio::try_join!(away, back).map(|((), ())| ())
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn both_ways_end_on_their_own() {
        let (client, host) = duplex(1000);
        let (mut to_guest, mut to_host) = duplex(777);
        let (guest, server) = duplex(1000);
        let hosts = async { relay(&mut { host }, &mut to_guest).await.unwrap() };
        let guests = async { relay(&mut { guest }, &mut to_host).await.unwrap() };
        let sent: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let (mut client_in, mut client_out) = split(client);
        let (mut server_in, mut server_out) = split(server);
        let client_sends = async {
            client_out.write_all(&sent).await.unwrap();
            client_out.shutdown().await.unwrap();
        };
        let serves = async {
            let mut seen = Vec::new();
            server_in.read_to_end(&mut seen).await.unwrap();
            // The client has ended, and is answered all the same.
            server_out.write_all(&seen).await.unwrap();
            server_out.shutdown().await.unwrap();
        };
        let reads = async {
            let mut seen = Vec::new();
            client_in.read_to_end(&mut seen).await.unwrap();
            seen
        };
        let ((), (), (), (), seen) = tokio::join!(hosts, guests, client_sends, serves, reads);
        assert_eq!(seen, sent);
    }

    #[tokio::test]
    async fn a_carrier_that_breaks_is_no_end() {
        for cut in [&[0][..], &[0, 5, 1, 2], &[0, 2, 1, 2]] {
            let (plain, mut other) = duplex(100);
            let (mut carrier, mut guest) = duplex(100);
            guest.write_all(cut).await.unwrap();
            drop(guest);
            other.shutdown().await.unwrap();
            relay(&mut { plain }, &mut carrier).await.unwrap_err();
        }
    }

    #[test]
    fn fuzz_frames() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        bolero::check!().for_each(|sent: &[u8]| {
            let (plain, other) = duplex(100);
            let (carrier, mut peer) = duplex(100);
            let feeding = async {
                // It may have been given up before the end.
                let _ = peer.write_all(sent).await;
                drop(peer);
            };
            let reading = async {
                let (mut came, mut ours) = split(other);
                ours.shutdown().await.unwrap();
                let mut seen = Vec::new();
                came.read_to_end(&mut seen).await.unwrap();
                seen
            };
            // It lets go of the carrier, of which the rest is not read.
            let relaying = async move { relay(&mut { plain }, &mut { carrier }).await };
            let (seen, ended, ()) = runtime.block_on(async { tokio::join!(reading, relaying, feeding) });
            // What comes through are the frames' contents, up to the frame that ends it or the place where it breaks.
            let (mut rest, mut expected, mut whole) = (sent, Vec::new(), false);
            while let Some((length, more)) = rest.split_first_chunk::<2>() {
                let length = usize::from(u16::from_be_bytes(*length));
                whole = length == 0;
                expected.extend(&more[..length.min(more.len())]);
                rest = more.get(length..).unwrap_or_default();
                if whole {
                    break;
                }
            }
            assert_eq!(seen, expected);
            assert_eq!(ended.is_ok(), whole);
        });
    }

    #[tokio::test]
    async fn the_guest_answers_one_of_two() {
        for (answer, expected) in [(CONNECTED, Some(true)), (REFUSED, Some(false)), (7, None)] {
            let (mut host, mut guest) = duplex(100);
            guest.write_u8(answer).await.unwrap();
            assert_eq!(request(&mut host, 0x1234).await.ok(), expected);
            assert_eq!(guest.read_u16().await.unwrap(), 0x1234);
        }
        let (mut host, guest) = duplex(100);
        drop(guest);
        request(&mut host, 1).await.unwrap_err();
    }
}
