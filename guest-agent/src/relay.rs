//! Moving bytes between a process's FIFO and the host's connection.
//!
//! The FIFO is what the process knows, so a connection that is lost, or not there yet, is nothing to it: output waits in the FIFO, and
//! the process waits with it once that is full.

use std::{io, os::fd::AsFd, sync::Arc, time::Duration};

use kuasar_sandboxers::{Process, process::Ending};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
    select,
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::connection::Connection;

/// What is moved at once, in bytes: what a pipe holds.
const CHUNK: usize = 64 << 10;

/// The same for input, whose buffer exists as long as its connection.
const INPUT_CHUNK: usize = 16 << 10;

/// How long a process that was left behind by the one that has ended may hold its output open without writing, before the end is told all
/// the same.
const LEFT_BEHIND: Duration = Duration::from_secs(2);

/// How long the end of a process waits for its output to be taken. It is told then, and the output waits on.
const UNTAKEN: Duration = Duration::from_secs(5);

/// The same for the host to connect.
const ABSENT: Duration = Duration::from_secs(10);

/// How long a FIFO is left alone that the runtime finds ready when it is not.
const REFUSED: Duration = Duration::from_millis(5);

/// Where the host's connections for one stream come in; a newer one replaces the one before it.
pub(crate) type Incoming = mpsc::Receiver<Connection>;

/// How far an output has come.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    /// Bytes that were given to the present connection, or the last one.
    pub(crate) sent: u64,
    /// There is a connection.
    connected: bool,
    /// There is something that the connection does not take at the moment.
    held_up: bool,
    /// Everything was sent, or given up.
    done: bool,
}

/// What is asked of an output from outside.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Wishes {
    /// Close the connection when everything was sent.
    pub(crate) close: bool,
}

/// The steering of an output that is being moved.
#[derive(Debug)]
pub(crate) struct Output {
    progress: watch::Receiver<Progress>,
    wishes: watch::Sender<Wishes>,
}

impl Output {
    /// Starts to move bytes. The process exists already, or its FIFO would seem to have been closed.
    pub(crate) fn start(fifo: pipe::Receiver, incoming: Incoming, ending: Arc<Ending>) -> Self {
        let (progress, told) = watch::channel(Progress::default());
        let (wishes, asked) = watch::channel(Wishes::default());
        let relay = OutputRelay { fifo: Some(fifo), incoming, progress, asked, unsent: Unsent::default() };
        tokio::spawn(relay.run(ending));
        Self { progress: told, wishes }
    }

    /// Has the connection closed once everything was sent.
    pub(crate) fn close(&self) {
        self.wishes.send_modify(|wishes| wishes.close = true);
    }

    /// After the process's end: waits until its output was sent, and says how much that was; and whether there may be more, because the host
    /// does not take it at the moment, or a process that was left behind may write. At the end of that the connection is closed.
    pub(crate) async fn settle(&self, what: &str) -> (u64, bool) {
        let mut progress = self.progress.clone();
        loop {
            let now = *progress.borrow_and_update();
            let patience = match now {
                Progress { done: true, .. } => return (now.sent, false),
                Progress { connected: true, held_up: true, .. } => UNTAKEN,
                Progress { connected: true, .. } => LEFT_BEHIND,
                Progress { connected: false, .. } => ABSENT,
            };
            match timeout(patience, progress.changed()).await {
                Ok(Ok(())) => {}
                // The relay has ended.
                Ok(Err(_)) => return (progress.borrow().sent, false),
                Err(_) => {
                    debug!(
                        what,
                        now.connected,
                        now.held_up,
                        "an output is not taken to its end, or a process that was left behind holds it open"
                    );
                    self.close();
                    return (now.sent, true);
                }
            }
        }
    }
}

struct OutputRelay {
    /// `None` once it has ended.
    fifo: Option<pipe::Receiver>,
    incoming: Incoming,
    progress: watch::Sender<Progress>,
    asked: watch::Receiver<Wishes>,
    unsent: Unsent,
}

/// Bytes that have left the FIFO and were not given to a connection.
#[derive(Default)]
struct Unsent {
    bytes: Vec<u8>,
    start: usize,
}

impl Unsent {
    fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }
}

/// What has happened while there was a connection.
enum Step {
    Read,
    Wrote(usize),
    Ended,
    Lost,
}

impl OutputRelay {
    /// Goes on until nobody can connect or ask any more.
    async fn run(mut self, ending: Arc<Ending>) {
        let mut connection: Option<Connection> = None;
        let mut asked = self.asked.clone();
        loop {
            let wishes = *asked.borrow_and_update();
            if wishes.close && self.done() {
                connection = None;
            }
            let Some(open) = connection.as_mut() else {
                self.progress.send_modify(|progress| progress.connected = false);
                let unread = self.unsent.is_empty().then_some(self.fifo.as_ref()).flatten();
                select! {
                    newer = self.incoming.recv() => match newer {
                        Some(newer) => {
                            self.progress.send_modify(|progress| *progress = Progress { connected: true, sent: 0, ..*progress });
                            connection = Some(newer);
                        }
                        None => return,
                    },
                    changed = asked.changed() => if changed.is_err() { return },
                    () = ended_unread(unread, &ending) => self.finish(),
                }
                continue;
            };
            select! {
                biased;
                newer = self.incoming.recv() => match newer {
                    Some(newer) => {
                        self.progress.send_modify(|progress| progress.sent = 0);
                        connection = Some(newer);
                    }
                    None => return,
                },
                changed = asked.changed() => if changed.is_err() { return },
                step = step(self.fifo.as_ref(), open, &mut self.unsent) => match step {
                    Step::Read => self.progress.send_modify(|progress| progress.held_up = true),
                    Step::Wrote(length) => {
                        let held_up = !self.unsent.is_empty();
                        self.progress.send_modify(|progress| {
                            progress.sent += length as u64;
                            progress.held_up = held_up;
                        });
                    }
                    Step::Ended => self.finish(),
                    Step::Lost => connection = None,
                },
            }
        }
    }

    fn done(&self) -> bool {
        self.fifo.is_none()
    }

    fn finish(&mut self) {
        self.fifo = None;
        self.unsent = Unsent::default();
        self.progress.send_modify(|progress| progress.done = true);
    }
}

/// One step; cancelling it loses nothing.
async fn step(fifo: Option<&pipe::Receiver>, connection: &mut Connection, unsent: &mut Unsent) -> Step {
    if !unsent.is_empty() {
        return match connection.write(&unsent.bytes[unsent.start..]).await {
            Ok(0) | Err(_) => Step::Lost,
            Ok(length) => {
                unsent.start += length;
                Step::Wrote(length)
            }
        };
    }
    // The host sends nothing on an output: it closes it, or it does what it should not.
    let mut nothing = [0; 1];
    let Some(fifo) = fifo else {
        let _closed = connection.read(&mut nothing).await;
        return Step::Lost;
    };
    unsent.start = 0;
    let mut refused = false;
    loop {
        unsent.bytes.resize(CHUNK, 0);
        match fifo.try_read(&mut unsent.bytes) {
            Ok(0) => {
                *unsent = Unsent::default();
                return Step::Ended;
            }
            Ok(length) => {
                unsent.bytes.truncate(length);
                return Step::Read;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // An idle stream keeps no buffer.
                *unsent = Unsent::default();
                // One that had no writer for a moment is always said to be readable.
                if std::mem::replace(&mut refused, true) {
                    sleep(REFUSED).await;
                }
                select! {
                    ready = fifo.readable() => if ready.is_err() { return Step::Ended },
                    _closed = connection.read(&mut nothing) => return Step::Lost,
                }
            }
            Err(error) => {
                warn!(%error, "cannot read an output");
                *unsent = Unsent::default();
                return Step::Ended;
            }
        }
    }
}

/// Resolves when the process has ended and its FIFO has nothing to read and nobody who writes.
async fn ended_unread(fifo: Option<&pipe::Receiver>, ending: &Ending) {
    let Some(fifo) = fifo else { return std::future::pending().await };
    ending.wait().await;
    let mut polled = [PollFd::from_borrowed_fd(fifo.as_fd(), PollFlags::IN)];
    let now = poll(&mut polled, Some(&Timespec::default()));
    let told = polled[0].revents();
    if now.is_err() || !told.contains(PollFlags::HUP) || told.contains(PollFlags::IN) {
        std::future::pending().await
    }
}

/// Moves input until the host closes its connection, which ends the process's input. Goes on no longer than the process.
pub(crate) async fn input(
    fifo: pipe::Sender,
    mut incoming: Incoming,
    mut closing: watch::Receiver<bool>,
    process: Arc<dyn Process>,
    ending: Arc<Ending>,
) {
    let moved = move_input(&fifo, &mut incoming, &mut closing);
    select! {
        biased;
        exit = ending.wait() => {
            debug!(status = exit.status, "input is over: the process has ended");
            return;
        }
        result = moved => if let Err(error) = result {
            debug!(%error, "the process takes no more input");
        },
    }
    drop(fifo);
    if let Err(error) = process.close_stdin().await {
        warn!(error = error.report(), "cannot close a standard input");
    }
}

async fn move_input(fifo: &pipe::Sender, incoming: &mut Incoming, closing: &mut watch::Receiver<bool>) -> io::Result<()> {
    let mut connection: Option<Connection> = None;
    let mut buffer = Vec::new();
    let (mut start, mut end) = (0, 0);
    let mut refused = false;
    loop {
        let Some(open) = connection.as_mut() else {
            select! {
                newer = incoming.recv() => match newer {
                    Some(newer) => connection = Some(newer),
                    None => return Ok(()),
                },
                // With a connection, the end of that is what counts: there may be bytes on their way.
                _ = closing.wait_for(|closing| *closing) => return Ok(()),
            }
            continue;
        };
        buffer.resize(INPUT_CHUNK, 0);
        let moved = async {
            if start < end {
                fifo.writable().await?;
                match fifo.try_write(&buffer[start..end]) {
                    Ok(length) => (start, refused) = (start + length, false),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        // A FIFO that had no reader for a moment is taken for closed, and is always said to be writable.
                        if std::mem::replace(&mut refused, true) {
                            sleep(REFUSED).await;
                        }
                    }
                    Err(error) => return Err(error),
                }
                return Ok(true);
            }
            let length = match open.read(&mut buffer).await {
                Ok(length) => length,
                Err(error) => {
                    debug!(%error, "the host's end of an input is gone");
                    0
                }
            };
            (start, end) = (0, length);
            Ok::<_, io::Error>(length > 0)
        };
        select! {
            biased;
            newer = incoming.recv() => match newer {
                Some(newer) => connection = Some(newer),
                None => return Ok(()),
            },
            moved = moved => if !moved? { return Ok(()) },
        }
    }
}
