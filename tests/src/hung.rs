//! A filesystem that stops answering on demand, as a dead NFS or FUSE server does.
//!
//! It is a FUSE server in this process (`linux/fuse.h`): one directory with one file, `file`. While it hangs, requests are read and
//! not answered, so whoever made one waits and cannot be killed. When this process ends, the kernel ends the filesystem with it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The kernel's device; a machine without it cannot run what needs this filesystem.
pub const DEVICE: &str = "/dev/fuse";

/// What `file` holds.
pub const CONTENT: &[u8] = b"it answers\n";

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const ACCESS: u32 = 34;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// The directory's and the file's number.
const ROOT: u64 = 1;
const FILE: u64 = 2;

/// The filesystem, mounted until it is dropped.
#[derive(Debug)]
pub struct Hung {
    path: PathBuf,
    state: Arc<State>,
    server: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct State {
    hangs: AtomicBool,
    ends: AtomicBool,
    /// Requests that wait for an answer.
    waiting: AtomicUsize,
}

impl Hung {
    /// Mounts it on a directory, which is made. It answers.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn mount(path: &Path) -> Result<Self> {
        std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        let device = OpenOptions::new().read(true).write(true).custom_flags(nix::libc::O_NONBLOCK).open(DEVICE);
        let device = device.with_context(|| format!("open {DEVICE}"))?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("hung"), path, Some("fuse.hung"), flags, Some(options.as_str()))
            .with_context(|| format!("mount a FUSE filesystem on {}", path.display()))?;
        let state = Arc::new(State::default());
        let server = std::thread::Builder::new().name("hung filesystem".into()).spawn({
            let state = state.clone();
            move || {
                if let Err(error) = serve(device, &state) {
                    eprintln!("the hung filesystem ended: {error:#}");
                }
            }
        });
        Ok(Self { path: path.to_owned(), state, server: Some(server?) })
    }

    /// Stops answering.
    pub fn hang(&self) {
        self.state.hangs.store(true, Ordering::Release);
    }

    /// Answers what waits, and what comes.
    pub fn release(&self) {
        self.state.hangs.store(false, Ordering::Release);
    }

    /// Requests that wait for an answer.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.state.waiting.load(Ordering::Acquire)
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        self.release();
        if let Err(errno) = umount2(&self.path, MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {errno}", self.path.display());
        }
        self.state.ends.store(true, Ordering::Release);
        if self.server.take().is_some_and(|server| server.join().is_err()) {
            eprintln!("the server of {} panicked", self.path.display());
        }
    }
}

fn serve(mut device: File, state: &State) -> Result<()> {
    let mut held: Vec<Vec<u8>> = Vec::new();
    let mut buffer = vec![0; 1 << 18];
    while !state.ends.load(Ordering::Acquire) {
        if !state.hangs.load(Ordering::Acquire) {
            for request in held.drain(..) {
                answer(&mut device, &request)?;
            }
            state.waiting.store(0, Ordering::Release);
        }
        // The flags change without an event.
        poll(
            &mut [PollFd::new(std::os::fd::AsFd::as_fd(&device), PollFlags::POLLIN)],
            PollTimeout::try_from(Duration::from_millis(20))?,
        )?;
        let length = match device.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(()),
            // ENOENT: the request was cancelled meanwhile.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::NotFound) => {
                continue;
            }
            Err(error) => return Err(error).context("read a request"),
        };
        let request = &buffer[..length];
        if state.hangs.load(Ordering::Acquire) {
            held.push(request.to_vec());
            state.waiting.store(held.len(), Ordering::Release);
        } else {
            answer(&mut device, request)?;
        }
    }
    Ok(())
}

fn word(request: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(request.get(at..at + 4)?.try_into().ok()?))
}

fn long(request: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(request.get(at..at + 8)?.try_into().ok()?))
}

/// Answers one request: a header of 40 bytes (length, opcode, unique, node …), then what belongs to the opcode.
fn answer(device: &mut File, request: &[u8]) -> Result<()> {
    let header = || Some((word(request, 4)?, long(request, 8)?, long(request, 16)?));
    let (opcode, unique, node) = header().context("a request without a header")?;
    let body = request.get(40..).unwrap_or_default();
    let reply = match opcode {
        FORGET | BATCH_FORGET | INTERRUPT => return Ok(()),
        INIT => Ok(init()),
        LOOKUP if body == b"file\0" => Ok([entry(), attributes(FILE)].concat()),
        LOOKUP => Err(nix::libc::ENOENT),
        // Valid for no time: each look asks again.
        GETATTR | SETATTR => Ok([vec![0; 16], attributes(node)].concat()),
        OPEN | OPENDIR => Ok(vec![0; 16]),
        READ => {
            let offset = usize::try_from(long(body, 8).unwrap_or_default()).unwrap_or(usize::MAX);
            Ok(CONTENT.get(offset..).unwrap_or_default().to_vec())
        }
        // All of it, of which nothing is kept: its length, and what fills the reply up.
        WRITE => Ok([word(body, 16).unwrap_or_default(), 0].iter().flat_map(|word| word.to_ne_bytes()).collect()),
        STATFS => Ok(vec![0; 80]),
        READDIR | RELEASE | RELEASEDIR | FLUSH | ACCESS | DESTROY => Ok(Vec::new()),
        _ => Err(nix::libc::ENOSYS),
    };
    let (error, body) = match reply {
        Ok(body) => (0, body),
        Err(errno) => (-errno, Vec::new()),
    };
    let length = u32::try_from(16 + body.len())?;
    let message = [&length.to_ne_bytes()[..], &error.to_ne_bytes(), &unique.to_ne_bytes(), &body].concat();
    match device.write_all(&message) {
        // Whoever asked does not wait any more, or the filesystem is unmounted.
        Err(error) if matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ENODEV)) => Ok(()),
        written => written.context("answer a request"),
    }
}

/// `struct fuse_init_out` of protocol 7.31: no features.
fn init() -> Vec<u8> {
    let words: [u32; 4] = [7, 31, 1 << 17, 0];
    let mut reply: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    // max_background and congestion_threshold, then max_write.
    reply.extend([64u16, 48].iter().flat_map(|number| number.to_ne_bytes()));
    reply.extend((1u32 << 16).to_ne_bytes());
    reply.resize(64, 0);
    reply
}

/// `struct fuse_entry_out` up to its attributes.
fn entry() -> Vec<u8> {
    let mut reply = FILE.to_ne_bytes().to_vec();
    reply.resize(40, 0);
    reply
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, links, size): (u32, u32, u64) =
        if node == ROOT { (nix::libc::S_IFDIR | 0o777, 2, 0) } else { (nix::libc::S_IFREG | 0o666, 1, CONTENT.len() as u64) };
    let mut reply = [node, size].iter().flat_map(|number| number.to_ne_bytes()).collect::<Vec<_>>();
    // Blocks and times.
    reply.resize(60, 0);
    reply.extend(mode.to_ne_bytes());
    reply.extend(links.to_ne_bytes());
    // Owner and device.
    reply.resize(80, 0);
    reply.extend(4096u32.to_ne_bytes());
    reply.resize(88, 0);
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_hangs_and_answers_again() -> Result<()> {
        if !Path::new(DEVICE).exists() || !nix::unistd::geteuid().is_root() {
            crate::skip!("{DEVICE} and root are needed");
        }
        let place = tempfile::tempdir()?;
        let hung = Hung::mount(place.path())?;
        let file = place.path().join("file");
        assert_eq!(std::fs::read(&file)?, CONTENT);
        hung.hang();
        let reading = std::thread::spawn(move || std::fs::read(file));
        while hung.waiting() == 0 {
            std::thread::yield_now();
        }
        assert!(!reading.is_finished());
        hung.release();
        assert_eq!(reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??, CONTENT);
        Ok(())
    }
}
