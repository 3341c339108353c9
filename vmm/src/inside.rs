//! Looking into a guest: programs beside its containers, its console, and what is known of it.
//!
//! A program's bytes pass through this daemon and nothing of it is left with the keeper: its session ends with whoever asked for it, and
//! with the daemon. What it ran in is removed with the pod's last session, and by a daemon that takes the pod over.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use kuasar_guest_protocol::{
    STREAM_PORT,
    agent::{DiagnoseResponse, Empty, ExecRequest, ProcessRequest, Streams, WaitResponse},
    stream::{ACCEPTED, StreamHeader, StreamKind},
};
use kuasar_sandboxers::{
    Code, Error, Result,
    inside::{Program, ProgramControl, ProgramIo, ProgramOutput, Section},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{Mutex, OwnedMutexGuard, mpsc, watch},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::{
    agent::{QUICK, SLOW, tame, within},
    calls,
    dial::Connection,
    ended,
    pod::{Guest, Pod},
};

/// What is moved at once, in bytes.
const CHUNK: usize = 32 << 10;

/// How long a guest may take to remove what is left of a program. Longer only one that hangs.
const REMOVAL: Duration = Duration::from_secs(10);

/// How long output may stand still that a program which has ended has left, as the guest says.
const STANDSTILL: Duration = Duration::from_secs(10);

/// How long a guest may take to tell what it knows: who looks for faults is told that it hangs rather than kept waiting.
const DIAGNOSIS: Duration = Duration::from_secs(10);

/// How much of the console's end is in an account, in bytes.
const CONSOLE: u64 = 32 << 10;

/// The most sections that a guest tells of itself, and the longest title and text, in bytes.
const SECTIONS: usize = 32;
const TITLE: usize = 64;
const TEXT: usize = 64 << 10;

/// Where programs are in the guest.
const PATH: &str = "PATH=/bin:/sbin:/usr/bin:/usr/sbin";

/// How many programs run beside a pod's containers. Held while one begins or is removed.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Arc<Mutex<usize>>);

impl Sessions {
    /// Nothing begins as long as this is held.
    pub(crate) async fn hold(&self) -> OwnedMutexGuard<usize> {
        self.0.clone().lock_owned().await
    }
}

/// Removes all that runs beside the containers.
pub(crate) async fn clear(pod: &Pod) {
    remove(pod, &ProcessRequest::default()).await;
}

/// Removes a program, or what all of them run in.
async fn remove(pod: &Pod, process: &ProcessRequest) {
    match timeout(REMOVAL, calls::delete(pod, process)).await {
        Ok(Ok(())) => {}
        // The guest was not booted for them.
        Ok(Err(error)) if error.code() == Code::Unimplemented => {}
        Ok(Err(error)) => warn!(error = error.report(), "a program beside the containers may not be removed"),
        Err(_) => warn!("the guest does not answer: a program beside its containers may not be removed"),
    }
}

/// Runs a program beside the containers, to its end.
///
/// # Errors
/// [`Error::Unsupported`] in a guest that was not booted for it; what the guest says; [`Error::Unavailable`] when nobody takes its output
/// any more.
pub(crate) async fn run(pod: &Pod, program: Program, io: ProgramIo) -> Result<u32> {
    let guest = pod.guest()?;
    let streams = Streams {
        stdin: program.stdin,
        stdout: true,
        stderr: program.terminal.is_none(),
        terminal: program.terminal.is_some(),
        ..Streams::default()
    };
    let process = ProcessRequest { exec: name(), ..ProcessRequest::default() };
    let request = ExecRequest {
        exec: process.exec.clone(),
        process: document(&program).to_string().into_bytes(),
        streams: Some(streams.clone()).into(),
        in_guest: true,
        ..ExecRequest::default()
    };
    let mut sessions = pod.sessions.hold().await;
    let begun = guest
        .agent()
        .call("run the program", Some(SLOW), |client, context| async move { client.exec(context, &request).await });
    let begun = guest.unless_ended(begun).await;
    *sessions += 1;
    drop(sessions);
    let taker = io.output.clone();
    let ended = match begun {
        Ok(_) => tokio::select! {
            biased;
            () = taker.closed() => {
                let why = "it has gone; the program is killed".into();
                Err(Error::Unavailable { what: "whoever has asked for the program".into(), why })
            }
            ended = guest.unless_ended(carry(&guest, &process, &program, &streams, io)) => ended,
        },
        Err(error) if error.code() == Code::Unimplemented => Err(Error::Unsupported {
            operation: "a program beside the containers",
            why: format!(
                "the guest of this pod was booted without it; set debug = true in the table [sandboxer.{}] of the configuration, \
                 have it read (kuasarctl upgrade), and start a new pod",
                pod.spec.sandboxer
            ),
        }),
        Err(error) => Err(error),
    };
    remove(pod, &process).await;
    let mut sessions = pod.sessions.hold().await;
    *sessions -= 1;
    if *sessions == 0 {
        // With what any of them has left running.
        clear(pod).await;
    }
    ended
}

/// A name that no other program has, of an earlier daemon either.
fn name() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{:x}-{:x}", since.as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The OCI process.
fn document(program: &Program) -> Value {
    let mut env = vec![PATH.to_owned(), "HOME=/".to_owned()];
    env.extend(program.terminal.as_ref().map(|terminal| format!("TERM={}", terminal.kind)));
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": program.args,
        "env": env,
        "cwd": "/",
        "terminal": program.terminal.is_some(),
    })
}

/// Moves what a program that has begun reads and writes, until it has ended and all of that was taken.
async fn carry(guest: &Guest, process: &ProcessRequest, program: &Program, streams: &Streams, io: ProgramIo) -> Result<u32> {
    let ProgramIo { input, control, output } = io;
    if let Some(size) = program.terminal.as_ref().and_then(|terminal| terminal.size) {
        do_with(guest, process, ProgramControl::Resize(size)).await;
    }
    let stdout = open(guest, process, StreamKind::Stdout).await?;
    let stderr = if streams.stderr { Some(open(guest, process, StreamKind::Stderr).await?) } else { None };
    // A program that has ended already takes no more.
    let stdin = if streams.stdin { open(guest, process, StreamKind::Stdin).await.ok() } else { None };

    let (told, exit) = watch::channel(None::<WaitResponse>);
    let taken = async {
        let ended = async {
            let exit = ended::exit(guest, process).await.ok_or_else(|| guest.gone())?;
            told.send_replace(Some(exit.clone()));
            Ok(exit)
        };
        let stderr = async {
            match stderr {
                Some(stderr) => take(stderr, exit.clone(), |exit| exit.stderr_bytes, ProgramOutput::Stderr, &output).await,
                None => Ok(()),
            }
        };
        let stdout = take(stdout, exit.clone(), |exit| exit.stdout_bytes, ProgramOutput::Stdout, &output);
        let (exit, (), ()) = tokio::try_join!(ended, stdout, stderr)?;
        Ok(exit.status & 0xff)
    };
    tokio::select! {
        biased;
        taken = taken => taken,
        never = feed(stdin, input, &output) => match never {},
        never = steer(guest, process, control) => match never {},
    }
}

/// Opens one of a program's streams.
async fn open(guest: &Guest, process: &ProcessRequest, kind: StreamKind) -> Result<Connection> {
    let operation = || format!("open {} of the program in the guest", kind.name());
    let header = StreamHeader { container: process.container.clone(), exec: process.exec.clone(), kind };
    let header = header.encode().map_err(Error::failed(operation()))?;
    let mut connection = guest.agent().dial(STREAM_PORT).await?;
    let taken = async {
        connection.write_all(&header).await?;
        match connection.read_u8().await? {
            ACCEPTED => Ok(()),
            _ => Err(std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "the guest has no such stream")),
        }
    };
    within(QUICK, "open a stream", taken).await?.map_err(Error::failed(operation()))?;
    Ok(connection)
}

/// Takes a stream of output, as much as the program's end says there is.
async fn take(
    mut stream: Connection,
    mut exit: watch::Receiver<Option<WaitResponse>>,
    total: impl Fn(&WaitResponse) -> u64,
    piece: impl Fn(Vec<u8>) -> ProgramOutput,
    output: &mpsc::Sender<ProgramOutput>,
) -> Result<()> {
    let mut moved = 0;
    let mut buffer = vec![0; CHUNK];
    loop {
        let known = exit.borrow_and_update().as_ref().map(&total);
        if known.is_some_and(|total| moved >= total) {
            return Ok(());
        }
        let length = tokio::select! {
            read = stream.read(&mut buffer) => read.map_err(Error::failed("read the program's output"))?,
            // Its sender is there as long as anybody waits for this.
            _ = exit.changed(), if known.is_none() => continue,
            () = sleep(STANDSTILL), if known.is_some() => 0,
        };
        if length == 0 {
            return match known {
                Some(_) => {
                    Err(Error::Unavailable { what: "the rest of the output".into(), why: "the guest does not send it".into() })
                }
                None => Ok(()),
            };
        }
        moved += length as u64;
        // A refusal means that nobody takes it any more, which whoever waits for this sees, too.
        let _ = output.send(piece(buffer[..length].to_vec())).await;
    }
}

/// Hands input to a program. What it does not take any more goes nowhere.
async fn feed(
    mut stdin: Option<Connection>,
    mut input: mpsc::Receiver<Vec<u8>>,
    output: &mpsc::Sender<ProgramOutput>,
) -> std::convert::Infallible {
    while let Some(bytes) = input.recv().await {
        if let Some(stream) = &mut stdin
            && let Err(error) = stream.write_all(&bytes).await
        {
            debug!(%error, "a program takes no more input");
            stdin = None;
        }
        let _ = output.send(ProgramOutput::Taken).await;
    }
    // That is the end of input.
    drop(stdin);
    std::future::pending().await
}

/// Passes on what else is done with a program.
async fn steer(
    guest: &Guest,
    process: &ProcessRequest,
    mut control: mpsc::Receiver<ProgramControl>,
) -> std::convert::Infallible {
    while let Some(control) = control.recv().await {
        do_with(guest, process, control).await;
    }
    std::future::pending().await
}

/// What fails, fails for a program that has just ended.
async fn do_with(guest: &Guest, process: &ProcessRequest, control: ProgramControl) {
    let done = match control {
        ProgramControl::Resize(size) => calls::resize(guest, process, size).await,
        ProgramControl::Signal(signal) => calls::signal(guest, process, signal, false).await,
    };
    if let Err(error) = done {
        debug!(error = error.report(), ?control, "cannot be done with a program");
    }
}

/// What is known of a machine on the node and in its guest.
pub(crate) async fn account(guest: &Guest, described: &Value) -> Vec<Section> {
    let described = serde_json::to_string_pretty(described).unwrap_or_else(|error| error.to_string());
    let console = guest.console().end(CONSOLE).unwrap_or_else(|error| error.report());
    let mut sections = vec![Section::new("machine", described), Section::new("console", console)];
    sections.extend(guest.words().into_iter().map(|(name, words)| {
        let words = words.map_or_else(|| "it has said nothing".to_owned(), |words| tame(&words, TEXT));
        Section::new(format!("{name} (its last words)"), words)
    }));
    let operation = "tell what it knows";
    let asked =
        guest.agent().call(operation, None, |client, context| async move { client.diagnose(context, &Empty::default()).await });
    // A connection that has to be made first is in the limit, too.
    let told = within(DIAGNOSIS, operation, guest.unless_ended(asked)).await;
    match told.and_then(|told| told) {
        Ok(told) => sections.extend(told_sections(told)),
        Err(error) => sections.push(Section::new("guest", format!("it cannot be asked: {}", error.report()))),
    }
    sections
}

fn told_sections(told: DiagnoseResponse) -> impl Iterator<Item = Section> {
    let sections = told.sections.into_iter().take(SECTIONS);
    sections.map(|section| {
        // A title is one line.
        let title = tame(&section.title, TITLE).replace(['\n', '\t'], " ");
        Section::new(format!("guest: {title}"), tame(&section.text, TEXT))
    })
}

#[cfg(test)]
mod tests {
    use kuasar_guest_protocol::agent::diagnose_response::Section as Told;
    use kuasar_sandboxers::inside::ProgramTerminal;

    use super::*;

    #[test]
    fn what_a_guest_tells_is_bounded_and_tamed() {
        let told = Told { title: "a\nb\x1b[2J".repeat(20), text: "x\ty\x07\n".repeat(100_000), ..Told::default() };
        let told = DiagnoseResponse { sections: vec![told; 1000], ..DiagnoseResponse::default() };
        let sections: Vec<_> = told_sections(told).collect();
        assert_eq!(sections.len(), SECTIONS);
        assert!(sections[0].title.starts_with("guest: a b\u{fffd}[2Ja b") && sections[0].title.len() < 2 * TITLE);
        assert!(sections[0].text.starts_with("x\ty\u{fffd}\n") && sections[0].text.len() <= TEXT);
    }

    #[test]
    fn programs_have_names_of_their_own_and_a_terminal_of_the_right_kind() {
        assert_ne!(name(), name());
        assert!(name().parse::<kuasar_sandboxers::id::ExecId>().is_ok());
        let terminal = ProgramTerminal { kind: "xterm".into(), size: None };
        let program = Program { args: vec!["sh".into()], stdin: true, terminal: Some(terminal) };
        let document = document(&program);
        assert_eq!(document["env"], json!([PATH, "HOME=/", "TERM=xterm"]));
        assert_eq!((&document["args"], &document["terminal"]), (&json!(["sh"]), &json!(true)));
    }
}
