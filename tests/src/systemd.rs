//! What systemd does for a service of `Type=notify` with a store for descriptors (sd_notify(3), sd_listen_fds(3)): takes messages,
//! keeps descriptors, hands them to the next process. systemd itself drops a descriptor whose other end is closed, and so does this.

use std::collections::BTreeSet;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use command_fds::{CommandFdExt, FdMapping};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// How often the service has to say that it lives: half of this.
const WATCHDOG: Duration = Duration::from_secs(2);
/// The first descriptor that is handed over.
const FIRST: i32 = 3;
/// The longest message.
const SIZE_LIMIT: usize = 4096;
/// Ends the thread that takes messages.
const END: &str = "END";

/// What the service has said.
#[derive(Default)]
struct Heard {
    stored: Vec<(String, OwnedFd)>,
    words: BTreeSet<String>,
}

/// A supervisor of one service.
pub struct Supervisor {
    socket: PathBuf,
    heard: Arc<Mutex<Heard>>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// One that listens in a directory.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn new(dir: &Path) -> Result<Self> {
        let socket = dir.join("notify");
        let listener = UnixDatagram::bind(&socket).with_context(|| format!("bind {}", socket.display()))?;
        let heard = Arc::<Mutex<Heard>>::default();
        let shared = Arc::clone(&heard);
        let thread = std::thread::spawn(move || {
            while let Ok((text, descriptors)) = receive(&listener) {
                if text == END {
                    return;
                }
                lock(&shared).hear(&text, descriptors);
            }
        });
        Ok(Self { socket, heard, thread: Some(thread) })
    }

    /// Whether the service has said something, as `READY=1`, since [`Self::forget`].
    #[must_use]
    pub fn has_heard(&self, word: &str) -> bool {
        lock(&self.heard).words.contains(word)
    }

    /// Forgets what the service has said, but for what is stored.
    pub fn forget(&self) {
        lock(&self.heard).words.clear();
    }

    /// The names of what is stored.
    #[must_use]
    pub fn stored(&self) -> Vec<String> {
        let mut heard = lock(&self.heard);
        heard.sweep();
        let mut names: Vec<String> = heard.stored.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// The command that starts `program` as a service.
    ///
    /// # Errors
    /// A descriptor cannot be duplicated.
    pub fn command(&self, program: &Path) -> Result<Command> {
        let mut heard = lock(&self.heard);
        heard.sweep();
        // The variable has to name the process, which the shell's stays.
        let mut command = Command::new("sh");
        command.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]).arg(program);
        let mut mappings = Vec::new();
        for (child_fd, (_, descriptor)) in (FIRST..).zip(&heard.stored) {
            mappings.push(FdMapping { parent_fd: descriptor.try_clone()?, child_fd });
        }
        let names: Vec<&str> = heard.stored.iter().map(|(name, _)| name.as_str()).collect();
        command
            .env("NOTIFY_SOCKET", &self.socket)
            .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        command.fd_mappings(mappings)?;
        Ok(command)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let told = UnixDatagram::unbound().and_then(|socket| socket.send_to(END.as_bytes(), &self.socket));
        if told.is_ok()
            && let Some(thread) = self.thread.take()
        {
            // It cannot panic over what it does.
            let _ = thread.join();
        }
        // Another may listen there after it.
        if let Err(error) = std::fs::remove_file(&self.socket)
            && error.kind() != io::ErrorKind::NotFound
        {
            eprintln!("cannot remove {}: {error}", self.socket.display());
        }
    }
}

impl Heard {
    fn hear(&mut self, text: &str, descriptors: Vec<OwnedFd>) {
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        for word in text.lines() {
            match word {
                "FDSTORE=1" => {}
                "FDSTOREREMOVE=1" => self.stored.retain(|(stored, _)| stored != name),
                _ => drop(self.words.insert(word.to_owned())),
            }
        }
        self.stored.extend(descriptors.into_iter().map(|descriptor| (name.to_owned(), descriptor)));
    }

    /// Drops what has no other end any more.
    fn sweep(&mut self) {
        let ended = |descriptor: &OwnedFd| {
            let mut watched = [PollFd::new(descriptor.as_fd(), PollFlags::empty())];
            let polled = poll(&mut watched, PollTimeout::ZERO);
            let events = watched[0].revents().unwrap_or(PollFlags::empty());
            polled.is_ok() && events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
        };
        self.stored.retain(|(_, descriptor)| !ended(descriptor));
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn receive(socket: &UnixDatagram) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; SIZE_LIMIT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    Ok((String::from_utf8_lossy(&bytes[..received.bytes]).into_owned(), descriptors))
}
