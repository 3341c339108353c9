//! `kuasarctl exec`: a program in a pod's guest, with our input and output.

use std::{
    io::{self, IsTerminal, Read, Stdin},
    os::fd::AsFd,
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, Result, anyhow};
use kuasar_shim::proto::admin::{ExecInput, ExecOutput, ExecProgram, WindowSize, exec_input::What, exec_output};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::{
    fs::File,
    io::AsyncWriteExt,
    select,
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::admin::{self, Daemon};

/// What is read at once, in bytes; the daemon takes twice as much.
const PIECE: usize = 32 << 10;

/// Messages to the daemon that wait to be sent.
const WAITING: usize = 8;

/// The exit code when there is no program's to give, as of env(1) and docker(1).
const FAILED: u8 = 125;

/// Of a terminal that does not say what it is.
const TERMINAL: &str = "xterm";

/// What is to be run.
#[derive(Debug)]
pub(crate) struct Exec<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) id: &'a str,
    pub(crate) stdin: bool,
    pub(crate) terminal: bool,
    pub(crate) command: &'a [String],
}

/// Runs it; the program's exit code is ours.
pub(crate) fn run(socket: &Path, exec: &Exec<'_>) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let ended = runtime.block_on(session(socket, exec));
    // Writing to somebody who does not read must not keep us.
    runtime.shutdown_background();
    Ok(ExitCode::from(ended.unwrap_or_else(|error| {
        eprintln!("kuasarctl: {error:#}");
        FAILED
    })))
}

/// A terminal that passes on what is typed as it is; put back when this is dropped.
struct Raw {
    terminal: Stdin,
    before: Termios,
}

impl Raw {
    fn begin(terminal: Stdin) -> Result<Self> {
        let failed = "cannot set the terminal up";
        let before = tcgetattr(&terminal).context(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Now, &raw).context(failed)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(&self.terminal, OptionalActions::Now, &self.before) {
            eprintln!("kuasarctl: cannot put the terminal back: {error}; type reset");
        }
    }
}

/// How large our terminal is, if we have one.
fn size() -> Option<WindowSize> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    Some(WindowSize { width: size.ws_col.into(), height: size.ws_row.into() }).filter(|size| size.width > 0)
}

fn message(what: What) -> ExecInput {
    ExecInput { what: Some(what) }
}

async fn session(socket: &Path, exec: &Exec<'_>) -> Result<u8> {
    let mut daemon = Daemon::connect(socket).await?;
    let (messages, queue) = mpsc::channel(WAITING);
    let kind = || std::env::var("TERM").ok().filter(|kind| !kind.is_empty()).unwrap_or_else(|| TERMINAL.into());
    let program = ExecProgram {
        namespace: exec.namespace.into(),
        id: exec.id.into(),
        args: exec.command.to_vec(),
        stdin: exec.stdin,
        terminal: if exec.terminal { kind() } else { String::new() },
        size: if exec.terminal { size() } else { None },
    };
    messages.send(message(What::Program(program))).await?;
    let answers = daemon.exec(ReceiverStream::new(queue)).await?;
    let raw = if exec.terminal && exec.stdin && io::stdin().is_terminal() { Some(Raw::begin(io::stdin())?) } else { None };
    let taken = Notify::new();
    let pieces = if exec.stdin { Some(read()) } else { None };
    let ended = select! {
        ended = put_out(answers, &taken) => ended,
        ended = feed(pieces, &messages, &taken) => ended,
        ended = steer(&messages, exec.terminal) => ended,
    };
    // Before anything is said.
    drop(raw);
    match ended {
        // Whoever read our output (`head`) has had enough.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe) => {
            Ok(of_signal(SignalKind::pipe()))
        }
        ended => ended,
    }
}

/// The exit code of what a signal has ended.
fn of_signal(kind: SignalKind) -> u8 {
    u8::try_from(128 + kind.as_raw_value()).unwrap_or(FAILED)
}

/// Puts the program's output out, to its end.
async fn put_out(mut answers: Streaming<ExecOutput>, taken: &Notify) -> Result<u8> {
    let (mut stdout, mut stderr) = (writer(io::stdout())?, writer(io::stderr())?);
    loop {
        let answer = answers.message().await.map_err(admin::refused)?;
        match answer.and_then(|answer| answer.what) {
            Some(exec_output::What::Stdout(bytes)) => put(&mut stdout, &bytes).await?,
            Some(exec_output::What::Stderr(bytes)) => put(&mut stderr, &bytes).await?,
            Some(exec_output::What::Taken(_)) => taken.notify_one(),
            Some(exec_output::What::Status(status)) => return Ok(u8::try_from(status).unwrap_or(FAILED)),
            None => return Err(anyhow!("kuasard does not tell how the program has ended")),
        }
    }
}

/// Something of ours that is written to while signals are waited for, too.
fn writer(out: impl AsFd) -> Result<File> {
    let copy = out.as_fd().try_clone_to_owned().context("cannot copy a descriptor")?;
    Ok(File::from_std(copy.into()))
}

async fn put(out: &mut File, bytes: &[u8]) -> Result<()> {
    out.write_all(bytes).await?;
    Ok(out.flush().await?)
}

/// Reads standard input, in a thread that nobody waits for: a read of a terminal cannot be broken off.
fn read() -> mpsc::Receiver<Vec<u8>> {
    let (pieces, read) = mpsc::channel(1);
    std::thread::spawn(move || {
        let (mut stdin, mut piece) = (io::stdin().lock(), vec![0; PIECE]);
        loop {
            match stdin.read(&mut piece) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(length) if length > 0 && pieces.blocking_send(piece[..length].to_vec()).is_ok() => {}
                // The end, and nothing more can be read after an error either.
                _ => return,
            }
        }
    });
    read
}

/// Sends what is read, piece by piece as the program takes them.
async fn feed(pieces: Option<mpsc::Receiver<Vec<u8>>>, messages: &mpsc::Sender<ExecInput>, taken: &Notify) -> Result<u8> {
    if let Some(mut pieces) = pieces {
        while let Some(piece) = pieces.recv().await {
            // Refused only when the daemon has gone, which whoever reads its answers is told.
            if messages.send(message(What::Stdin(piece))).await.is_err() {
                break;
            }
            taken.notified().await;
        }
        let _ = messages.send(message(What::StdinEnded(true))).await;
    }
    std::future::pending().await
}

/// Passes signals and the terminal's size on, until a signal is to end us.
async fn steer(messages: &mpsc::Sender<ExecInput>, terminal: bool) -> Result<u8> {
    let watch = |kind| signal(kind).context("cannot wait for signals");
    let (mut interrupt, mut terminate) = (watch(SignalKind::interrupt())?, watch(SignalKind::terminate())?);
    let (mut quit, mut hangup) = (watch(SignalKind::quit())?, watch(SignalKind::hangup())?);
    let mut resized = watch(SignalKind::window_change())?;
    let mut asked = false;
    loop {
        let kind = select! {
            Some(()) = interrupt.recv() => SignalKind::interrupt(),
            Some(()) = terminate.recv() => SignalKind::terminate(),
            Some(()) = quit.recv() => SignalKind::quit(),
            Some(()) = hangup.recv() => return Ok(of_signal(SignalKind::hangup())),
            Some(()) = resized.recv() => {
                if let Some(size) = size().filter(|_| terminal) {
                    let _ = messages.send(message(What::Size(size))).await;
                }
                continue;
            }
        };
        // It is asked once. Whoever asks again does not want to wait: then it is killed, as we go.
        if std::mem::replace(&mut asked, true) {
            return Ok(of_signal(kind));
        }
        let number = kind.as_raw_value().unsigned_abs();
        let _ = messages.send(message(What::Signal(number))).await;
    }
}
