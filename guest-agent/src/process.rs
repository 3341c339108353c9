//! A process that exists, and its streams.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kuasar_guest_protocol::{
    agent::{StateResponse, Streams, WaitResponse, state_response::State},
    stream::StreamKind,
};
use kuasar_sandboxers::{Error, Process, Result, process::Ending, stdio::Stdio, types::Exit};
use nix::{sys::stat::Mode, unistd::mkfifo};
use protobuf::EnumOrUnknown;
use tokio::{
    net::unix::pipe,
    sync::{mpsc, watch},
};

use crate::{
    connection::Connection,
    relay::{self, Output},
};

/// Connections for the same stream that wait for being taken up.
const WAITING: usize = 4;

/// The FIFOs of a process that does not exist yet.
#[derive(Debug)]
pub(crate) struct Fifos {
    dir: PathBuf,
    terminal: bool,
    stdin: Option<Input>,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
}

/// The FIFO of a process's input.
#[derive(Debug)]
struct Input {
    path: PathBuf,
    /// Both ends: while it is open, the writing end can be opened, and has a reader. The runtime would take one without a reader for
    /// closed for good, and find it writable whenever it is asked.
    both: File,
}

impl Fifos {
    /// Makes those that are asked for, in a directory of the process's own, in place of what is there.
    pub(crate) fn make(dir: PathBuf, wanted: &Streams) -> Result<Self> {
        remove_dir(&dir)?;
        DirBuilder::new().recursive(true).mode(0o711).create(&dir).map_err(Error::io("create", &dir))?;
        let make = |kind: StreamKind| {
            let path = dir.join(kind.name());
            mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| Error::io("make FIFO", &path)(errno.into()))?;
            Ok::<_, Error>(path)
        };
        let reader = |kind| {
            let path = make(kind)?;
            pipe::OpenOptions::new().open_receiver(&path).map(Some).map_err(Error::io("open FIFO", path))
        };
        let stdin = if wanted.stdin { Some(Input::open(make(StreamKind::Stdin)?)?) } else { None };
        let stdout = if wanted.stdout { reader(StreamKind::Stdout)? } else { None };
        let stderr = if wanted.stderr && !wanted.terminal { reader(StreamKind::Stderr)? } else { None };
        Ok(Self { dir, terminal: wanted.terminal, stdin, stdout, stderr })
    }

    /// Where the process finds them.
    pub(crate) fn stdio(&self) -> Stdio {
        let path = |there: bool, kind: StreamKind| {
            if there { self.dir.join(kind.name()).display().to_string() } else { String::new() }
        };
        Stdio {
            stdin: path(self.stdin.is_some(), StreamKind::Stdin),
            stdout: path(self.stdout.is_some(), StreamKind::Stdout),
            stderr: path(self.stderr.is_some(), StreamKind::Stderr),
            terminal: self.terminal,
        }
    }

    /// The directory they are in.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Input {
    fn open(path: PathBuf) -> Result<Self> {
        let both = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let both = both.map_err(Error::io("open FIFO", &path))?;
        Ok(Self { path, both })
    }

    /// The writing end, once the process has the reading end. It only writes: the process's end is noticed.
    fn writer(self) -> Result<pipe::Sender> {
        let writer = pipe::OpenOptions::new().open_sender(&self.path).map_err(Error::io("open FIFO", &self.path))?;
        drop(self.both);
        Ok(writer)
    }
}

/// Removes a directory, if it is there.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", dir)(error)),
        _ => Ok(()),
    }
}

/// A process that exists.
pub(crate) struct Live {
    /// The process.
    pub(crate) process: Arc<dyn Process>,
    /// For logs.
    name: String,
    started: AtomicBool,
    ending: Arc<Ending>,
    dir: PathBuf,
    stdin: Option<(mpsc::Sender<Connection>, watch::Sender<bool>)>,
    stdout: Option<(mpsc::Sender<Connection>, Output)>,
    stderr: Option<(mpsc::Sender<Connection>, Output)>,
}

impl Live {
    /// Watches a process that exists now, and moves its bytes.
    ///
    /// # Errors
    /// When its input cannot be opened; the process is still there then.
    pub(crate) fn begin(name: String, process: Arc<dyn Process>, fifos: Fifos, started: bool) -> Result<Self> {
        let stdin = fifos.stdin.map(Input::writer).transpose()?;
        let ending = Arc::new(Ending::pending());
        tokio::spawn({
            let (process, ending) = (process.clone(), ending.clone());
            async move { ending.tell(process.exited().await) }
        });
        let stdin = stdin.map(|fifo| {
            let (sender, incoming) = mpsc::channel(WAITING);
            let (close, closing) = watch::channel(false);
            tokio::spawn(relay::input(fifo, incoming, closing, process.clone(), ending.clone()));
            (sender, close)
        });
        let output = |fifo: Option<pipe::Receiver>| {
            fifo.map(|fifo| {
                let (sender, incoming) = mpsc::channel(WAITING);
                (sender, Output::start(fifo, incoming, ending.clone()))
            })
        };
        let (stdout, stderr) = (output(fifos.stdout), output(fifos.stderr));
        let (started, dir) = (AtomicBool::new(started), fifos.dir);
        Ok(Self { process, name, started, ending, dir, stdin, stdout, stderr })
    }

    /// For logs.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it was let run and has not ended.
    pub(crate) fn is_running(&self) -> bool {
        self.started() && self.ending.known().is_none()
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.process.pid().unwrap_or_default()
    }

    /// Whether it was let run.
    pub(crate) fn started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// Notes that it was let run.
    pub(crate) fn set_started(&self) {
        self.started.store(true, Ordering::Release);
    }

    /// What has become of it.
    pub(crate) fn state(&self) -> StateResponse {
        let exit = self.ending.known();
        let state = match exit {
            Some(_) => State::ENDED,
            None if self.started() => State::RUNNING,
            None => State::CREATED,
        };
        StateResponse {
            state: EnumOrUnknown::new(state),
            pid: self.pid(),
            status: exit.map_or(0, |exit| exit.status),
            ended_ns: exit.map_or(0, ended_ns),
            ..Default::default()
        }
    }

    /// Waits for its end, and until its own output was sent.
    pub(crate) async fn wait(&self) -> WaitResponse {
        let exit = self.ending.wait().await;
        let settled = async |output: &Option<(_, Output)>| match output {
            Some((_, output)) => output.settle(&self.name).await,
            None => (0, false),
        };
        let (stdout, stderr) = tokio::join!(settled(&self.stdout), settled(&self.stderr));
        let more = stdout.1 || stderr.1;
        if more {
            // Both: the host waits for the end of each.
            self.end_output();
        }
        WaitResponse {
            status: exit.status,
            ended_ns: ended_ns(exit),
            stdout_bytes: stdout.0,
            stderr_bytes: stderr.0,
            more,
            ..Default::default()
        }
    }

    /// Where connections for a stream go; `None` when it has no such stream.
    pub(crate) fn stream(&self, kind: StreamKind) -> Option<mpsc::Sender<Connection>> {
        match kind {
            // A process that has ended takes no more.
            StreamKind::Stdin => self.stdin.as_ref().map(|(sender, _)| sender).filter(|sender| !sender.is_closed()),
            StreamKind::Stdout => self.stdout.as_ref().map(|(sender, _)| sender),
            StreamKind::Stderr => self.stderr.as_ref().map(|(sender, _)| sender),
        }
        .cloned()
    }

    /// Ends its input as far as that does not depend on the host's connection.
    pub(crate) async fn close_stdin(&self) -> Result<()> {
        match &self.stdin {
            Some((_, close)) => {
                close.send_replace(true);
                Ok(())
            }
            None => self.process.close_stdin().await,
        }
    }

    /// Closes the connections of its output when everything was sent.
    pub(crate) fn end_output(&self) {
        for (_, output) in self.stdout.iter().chain(&self.stderr) {
            output.close();
        }
    }

    /// Releases the process and its FIFOs.
    pub(crate) async fn delete(&self) -> Result<()> {
        self.process.delete().await?;
        remove_dir(&self.dir)
    }
}

/// Nanoseconds since 1970.
fn ended_ns(exit: Exit) -> i64 {
    let since = exit.at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
