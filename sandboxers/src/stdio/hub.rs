//! Streams that containerd opens for a process's input and output (`io_type = "streaming"`).
//!
//! containerd opens a stream by id before the process exists, and again after its own restart. So the hub keeps one
//! pipe per id for as long as the process lives: the process has one end, the hub the other, and a [`StreamEnd`] is the
//! present connection's hold on it. Bytes wait in the pipe and nowhere else; a chunk that a dying connection did not take goes
//! to the next one. There is no task and no standing buffer per stream.

use std::{
    collections::HashMap,
    io,
    ops::Deref,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    net::unix::pipe,
    select,
    sync::{Notify, SetOnce},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    error::{Error, Result},
    fdstore::Held,
};

/// The largest [`Chunk`] in bytes: well below ttrpc's frame limit and containerd's window of 64 KiB.
const CHUNK: usize = 16 << 10;

/// How long after CloseIO more input may be on its way when containerd leaves the stream open. Only silence counts.
const LATE_INPUT: Duration = Duration::from_secs(2);

/// All streams of the daemon, by id. Clones share one table.
///
/// Locks are taken in this order: the table, then a stream's attachment; neither is held across an await.
#[derive(Clone, Debug, Default)]
pub struct StreamHub(Arc<Mutex<HashMap<Box<str>, Arc<Stream>>>>);

#[derive(Debug, Default)]
struct Stream {
    /// Set when the process's side is opened, which also settles the direction.
    side: SetOnce<Side>,
    /// What was read from the process and not yet taken.
    unsent: tokio::sync::Mutex<Vec<u8>>,
    attachment: Mutex<Attachment>,
    /// Told when an attachment ends.
    changed: Notify,
}

#[derive(Debug)]
enum Side {
    /// The process writes, we read.
    Output(pipe::Receiver),
    /// The process reads, we write, until it is closed.
    Input(Mutex<Option<Arc<Writer>>>),
}

#[derive(Debug)]
struct Writer {
    sender: pipe::Sender,
    _held: Held,
}

#[derive(Debug, Default)]
struct Attachment {
    /// How many there were; tells the present one from earlier ones.
    count: u64,
    /// Ends the present [`StreamEnd`].
    current: Option<CancellationToken>,
    /// CloseIO came: the end of the present attachment is the end of input.
    closing: bool,
    /// Writes that are going on, and how many there were.
    writing: (usize, u64),
}

/// A connection's hold on a stream; dropping it lets go.
#[derive(Debug)]
pub struct StreamEnd {
    hub: StreamHub,
    id: Box<str>,
    stream: Arc<Stream>,
    token: CancellationToken,
    number: u64,
}

/// Output that is to be sent. Unless [`Chunk::sent`] is called, it is given out again.
#[derive(Debug)]
pub struct Chunk<'a> {
    unsent: tokio::sync::MutexGuard<'a, Vec<u8>>,
}

impl Stream {
    /// Throws output away until somebody attaches, or the process has ended.
    async fn discard(self: Arc<Self>) {
        let mut chunk = vec![0; CHUNK];
        while let Some(Side::Output(receiver)) = self.side.get() {
            if receiver.readable().await.is_err() || lock(&self.attachment).count > 0 {
                return;
            }
            if let Ok(0) = receiver.try_read(&mut chunk) {
                return;
            }
        }
    }
}

/// Nothing here panics while it holds a lock of this module, and each change under one is complete in itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StreamHub {
    /// A new output stream: a copy of our reading end, and the process's writing end. containerd may have opened the stream already, or
    /// will.
    ///
    /// # Errors
    /// When another process has the stream, or descriptors have run out.
    pub fn open_output(&self, id: &str) -> Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = new_pipe()?;
        let copy = reader.try_clone().map_err(Error::failed("copy a descriptor"))?;
        let receiver = pipe::Receiver::from_owned_fd(reader).map_err(Error::failed("watch a stream's pipe"))?;
        self.open(id, Side::Output(receiver))?;
        Ok((copy, writer))
    }

    /// The process's reading end of a new input stream. `hold` sees our writing end before.
    ///
    /// # Errors
    /// As [`Self::open_output`], and what `hold` says.
    pub fn open_input(&self, id: &str, hold: impl FnOnce(BorrowedFd<'_>) -> Result<Held>) -> Result<OwnedFd> {
        let (reader, writer) = new_pipe()?;
        let held = hold(writer.as_fd())?;
        self.adopt_input(id, writer, held)?;
        Ok(reader)
    }

    /// An output stream of an earlier daemon, of which our reading end is left. containerd does not open a stream again until it starts
    /// again itself; until then output is thrown away, or the process would stop.
    ///
    /// # Errors
    /// As [`Self::open_output`].
    pub fn adopt_output(&self, id: &str, reader: OwnedFd) -> Result<()> {
        let receiver = pipe::Receiver::from_owned_fd(reader).map_err(Error::failed("watch a stream's pipe"))?;
        self.open(id, Side::Output(receiver))?;
        if let Some(stream) = self.get(id) {
            tokio::spawn(stream.discard());
        }
        Ok(())
    }

    /// An input stream of an earlier daemon, of which our writing end is left.
    ///
    /// # Errors
    /// As [`Self::open_output`].
    pub fn adopt_input(&self, id: &str, writer: OwnedFd, held: Held) -> Result<()> {
        let sender = pipe::Sender::from_owned_fd(writer).map_err(Error::failed("watch a stream's pipe"))?;
        self.open(id, Side::Input(Mutex::new(Some(Arc::new(Writer { sender, _held: held })))))
    }

    fn open(&self, id: &str, side: Side) -> Result<()> {
        let mut streams = lock(&self.0);
        let stream = streams.entry(id.into()).or_default();
        stream.side.set(side).map_err(|_| Error::AlreadyExists { kind: "stream", id: id.into() })
    }

    /// Connects to a stream, now or before its process exists. An earlier connection to the same id ends.
    #[must_use]
    pub fn attach(&self, id: &str) -> StreamEnd {
        let mut streams = lock(&self.0);
        let stream = streams.entry(id.into()).or_default().clone();
        let token = CancellationToken::new();
        let mut attachment = lock(&stream.attachment);
        attachment.count += 1;
        let number = attachment.count;
        if let Some(earlier) = attachment.current.replace(token.clone()) {
            debug!(id, "stream opened again");
            earlier.cancel();
        }
        drop(attachment);
        StreamEnd { hub: self.clone(), id: id.into(), stream, token, number }
    }

    fn get(&self, id: &str) -> Option<Arc<Stream>> {
        lock(&self.0).get(id).cloned()
    }

    /// Ends an input stream: the process reads what has arrived, then end-of-file. Idempotent.
    pub fn close_input(&self, id: &str) {
        let Some(stream) = self.get(id) else { return };
        let token = {
            let mut attachment = lock(&stream.attachment);
            if std::mem::replace(&mut attachment.closing, true) {
                return;
            }
            attachment.current.clone()
        };
        // CloseIO comes on another connection than the stream and may overtake the last input. containerd closes the stream
        // before it, so the attachment's end tells that all has come. A client that leaves the stream open must not keep
        // the process waiting for ever: silence ends it too.
        let Some(token) = token else { return stream.end_input() };
        tokio::spawn(async move {
            let mut before = None;
            while timeout(LATE_INPUT, token.cancelled()).await.is_err() {
                let (going_on, count) = lock(&stream.attachment).writing;
                if going_on == 0 && before == Some(count) {
                    break;
                }
                before = Some(count);
            }
            stream.end_input();
        });
    }

    /// Waits until containerd has taken all output of a stream whose process has ended and has let go of it. Returns at once
    /// when nobody is attached. Unbounded where a descendant of the process holds its end open.
    ///
    /// Having sent the last byte is not enough: once containerd knows of the exit it breaks its own reading off.
    pub async fn drained(&self, id: &str) {
        let Some(stream) = self.get(id) else { return };
        let mut changed = std::pin::pin!(stream.changed.notified());
        loop {
            changed.as_mut().enable();
            if lock(&stream.attachment).current.is_none() {
                return;
            }
            changed.as_mut().await;
            changed.set(stream.changed.notified());
        }
    }

    /// Lets a stream go when its process is deleted. A connection that still reads output may do so to its end.
    pub fn forget(&self, id: &str) {
        let Some(stream) = lock(&self.0).remove(id) else { return };
        if !matches!(stream.side.get(), Some(Side::Output(_))) {
            if let Some(token) = &lock(&stream.attachment).current {
                token.cancel();
            }
            stream.end_input();
        }
    }
}

impl Stream {
    fn end_input(&self) {
        if let Some(Side::Input(sender)) = self.side.get() {
            lock(sender).take();
        }
    }
}

impl StreamEnd {
    /// The next output of the process; `None` when there will be none, or another connection has taken over.
    ///
    /// For an input stream this waits until the process is gone. Cancelling loses nothing.
    ///
    /// # Errors
    /// When the pipe cannot be read; not expected.
    pub async fn next(&self) -> io::Result<Option<Chunk<'_>>> {
        select! {
            biased;
            () = self.token.cancelled() => Ok(None),
            chunk = self.read() => chunk,
        }
    }

    async fn read(&self) -> io::Result<Option<Chunk<'_>>> {
        let Side::Output(receiver) = self.stream.side.wait().await else {
            return std::future::pending().await;
        };
        // Held by the chunk: an earlier connection that is still sending must settle first, or order would be lost.
        let mut unsent = self.stream.unsent.lock().await;
        while unsent.is_empty() {
            unsent.reserve_exact(CHUNK);
            match receiver.try_read_buf(&mut *unsent) {
                Ok(0) => {
                    *unsent = Vec::new();
                    return Ok(None);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // An idle stream keeps no buffer.
                    *unsent = Vec::new();
                    receiver.readable().await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Some(Chunk { unsent }))
    }

    /// Waits until another connection has taken over, or the stream is let go.
    pub async fn superseded(&self) {
        self.token.cancelled().await;
    }

    /// Gives input to the process. Waits until the process exists, and while its pipe is full.
    ///
    /// # Errors
    /// [`io::ErrorKind::BrokenPipe`] when the process takes no more input or another connection has taken over, and
    /// [`io::ErrorKind::Unsupported`] when the stream carries output.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        {
            let mut attachment = lock(&self.stream.attachment);
            attachment.writing.0 += 1;
            attachment.writing.1 += 1;
        }
        let writing = Writing(&self.stream);
        let result = select! {
            biased;
            () = self.token.cancelled() => Err(io::ErrorKind::BrokenPipe.into()),
            result = self.write_all(bytes) => result,
        };
        drop(writing);
        result
    }

    async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let Side::Input(sender) = self.stream.side.wait().await else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the stream carries output"));
        };
        let Some(writer) = lock(sender).clone() else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let sender = &writer.sender;
        while !bytes.is_empty() {
            sender.writable().await?;
            match sender.try_write(bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Counts a write while it goes on, also when it is cancelled.
struct Writing<'a>(&'a Stream);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        lock(&self.0.attachment).writing.0 -= 1;
    }
}

impl Drop for StreamEnd {
    fn drop(&mut self) {
        let mut streams = lock(&self.hub.0);
        let mut attachment = lock(&self.stream.attachment);
        if attachment.count == self.number {
            attachment.current = None;
            // A stream that no process has taken up ends with its connection.
            if !self.stream.side.initialized() && streams.get(&self.id).is_some_and(|stream| Arc::ptr_eq(stream, &self.stream))
            {
                streams.remove(&self.id);
            }
        }
        drop(attachment);
        drop(streams);
        self.token.cancel();
        self.stream.changed.notify_waiters();
    }
}

impl Deref for Chunk<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.unsent
    }
}

impl Chunk<'_> {
    /// The bytes are with containerd now.
    pub fn sent(mut self) {
        self.unsent.clear();
    }
}

fn new_pipe() -> Result<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|errno| Error::failed("make a pipe for a stream")(io::Error::from(errno)))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use super::*;
    use crate::fdstore::FdStore;

    async fn text(end: &StreamEnd) -> Option<String> {
        let chunk = end.next().await.unwrap()?;
        let text = String::from_utf8(chunk.to_vec()).unwrap();
        chunk.sent();
        Some(text)
    }

    #[tokio::test]
    async fn output_survives_a_new_connection_without_loss_or_repetition() {
        let hub = StreamHub::default();
        let first = hub.attach("c-stdout");
        let mut process = File::from(hub.open_output("c-stdout").unwrap().1);
        process.write_all(b"one").unwrap();
        assert_eq!(text(&first).await.unwrap(), "one");
        process.write_all(b"two").unwrap();
        // The connection dies while it sends: the chunk is not marked as sent.
        drop(first.next().await.unwrap().unwrap());
        let second = hub.attach("c-stdout");
        assert!(first.next().await.unwrap().is_none());
        drop(first);
        assert_eq!(text(&second).await.unwrap(), "two");
        drop(second);
        process.write_all(b"three").unwrap();
        drop(process);
        let third = hub.attach("c-stdout");
        hub.forget("c-stdout");
        assert_eq!(text(&third).await.unwrap(), "three");
        assert_eq!(text(&third).await, None);
        assert!(lock(&hub.0).is_empty());
    }

    #[tokio::test]
    async fn drained_waits_for_the_reader_and_not_for_an_absent_one() {
        let hub = StreamHub::default();
        let mut process = File::from(hub.open_output("s").unwrap().1);
        process.write_all(b"last words").unwrap();
        drop(process);
        hub.drained("s").await;
        let end = hub.attach("s");
        let waiting = tokio::spawn({
            let hub = hub.clone();
            async move { hub.drained("s").await }
        });
        assert_eq!(text(&end).await.unwrap(), "last words");
        assert_eq!(text(&end).await, None);
        assert!(!waiting.is_finished());
        drop(end);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn input_ends_with_close_and_not_with_the_connection() {
        let hub = StreamHub::default();
        let first = hub.attach("s");
        let writing = tokio::spawn(async move { first.write(b"a").await });
        let mut process = File::from(hub.open_input("s", |_| FdStore::default().leave("stdin".into(), &[])).unwrap());
        writing.await.unwrap().unwrap();
        let second = hub.attach("s");
        second.write(b"b").await.unwrap();
        hub.close_input("s");
        second.write(b"late").await.unwrap();
        drop(second);
        let all = tokio::task::spawn_blocking(move || {
            let mut all = String::new();
            process.read_to_string(&mut all).unwrap();
            all
        });
        assert_eq!(all.await.unwrap(), "ablate");
        hub.close_input("s");
        hub.forget("s");
        assert!(lock(&hub.0).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_the_stream_open_does_not_keep_the_process_waiting() {
        let hub = StreamHub::default();
        let end = hub.attach("s");
        let mut process = File::from(hub.open_input("s", |_| FdStore::default().leave("stdin".into(), &[])).unwrap());
        end.write(b"x").await.unwrap();
        hub.close_input("s");
        tokio::time::sleep(3 * LATE_INPUT).await;
        let mut all = String::new();
        process.read_to_string(&mut all).unwrap();
        assert_eq!(all, "x");
        assert_eq!(end.write(b"y").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn a_stream_nobody_took_up_ends_with_its_connection() {
        let hub = StreamHub::default();
        let first = hub.attach("s");
        let second = hub.attach("s");
        drop(first);
        assert_eq!(lock(&hub.0).len(), 1);
        drop(second);
        assert!(lock(&hub.0).is_empty());
        let _one = hub.open_output("s").unwrap().1;
        assert!(matches!(hub.open_output("s"), Err(Error::AlreadyExists { .. })));
    }
}
