//! What kuasarctl does in sandboxes that have a kernel of their own: it runs programs beside the containers, and shows consoles.
//!
//! ```text
//!   kuasarctl ── ExecInput ──▶ forward ── input, control ──▶ the sandbox's program
//!             ◀── ExecOutput ─────────────────── output ◀──
//! ```
//!
//! A session ends with whichever comes first: the program, the caller, or this worker, which kills the program in the last two cases. Pieces
//! of input are answered one by one, so that a program that reads nothing does not keep a signal or a new size from it.

use futures::{
    StreamExt,
    stream::{self, BoxStream},
};
use kuasar_sandboxers::{
    Error, Result,
    handle::SandboxHandle,
    inside::{Program, ProgramControl, ProgramIo, ProgramOutput, ProgramTerminal},
    registry::Registry,
    types::WindowSize,
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::{
    admin::sandboxes,
    calls::Calls,
    inspect,
    proto::admin::{self, ConsoleRequest, ExecInput, ExecOutput, ExecProgram, Text, exec_input, exec_output},
    status::IntoStatus,
};

/// Messages on the way between the faces and a program, in each direction.
const WAITING: usize = 4;

/// Resizes and signals that a program has not got yet; more are thrown away.
const CONTROLS: usize = 64;

/// The longest piece of input, in bytes.
const PIECE: usize = 64 << 10;

/// The longest program with its arguments, in bytes.
const ARGUMENTS: usize = 1 << 20;

/// The longest kind of a terminal, in bytes.
const KIND: usize = 64;

/// The sandbox that is meant by an id of it or of a container in it, or by the beginning of one.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Invalid`] when the id fits several.
pub(crate) async fn find(registry: &Registry, namespace: String, id: &str) -> Result<SandboxHandle> {
    let missing = || Error::NotFound { kind: "sandbox or container", id: id.into() };
    let here = sandboxes(registry.clone(), namespace.clone()).await?;
    let subject = inspect::only(here, Vec::new(), &namespace, id)?;
    let spec = &subject.here().ok_or_else(missing)?.spec;
    let meant = |sandbox: &SandboxHandle| (&sandbox.namespace, &sandbox.id) == (&spec.namespace, &spec.id);
    registry.list().into_iter().find(meant).ok_or_else(missing)
}

/// Runs a program; `asked` begins with which.
pub(crate) async fn exec(
    registry: Registry,
    calls: Calls,
    mut asked: Streaming<ExecInput>,
) -> Result<BoxStream<'static, Result<ExecOutput, Status>>, Status> {
    let Some(ExecInput { what: Some(exec_input::What::Program(program)) }) = asked.message().await? else {
        return Err(Error::invalid("first message", "it says no program")).grpc();
    };
    let (namespace, id) = (program.namespace.clone(), program.id.clone());
    let program = read(program).grpc()?;
    let (input, inputs) = mpsc::channel(1);
    let (control, controls) = mpsc::channel(CONTROLS);
    let (output, outputs) = mpsc::channel(WAITING);
    let (told, ended) = oneshot::channel();
    let io = ProgramIo { input: inputs, control: controls, output };
    let subject = id.clone();
    let work = async move { find(&registry, namespace, &id).await?.run_beside(program, io).await };
    let running = calls.clone();
    tokio::spawn(async move {
        // Nobody may be there any more who would hear it.
        let _ = told.send(running.run("Admin.Exec", subject, work).await);
    });
    tokio::spawn(forward(asked, input, control));
    let last = |status| ExecOutput { what: Some(exec_output::What::Status(status)) };
    Ok(answers(calls, outputs, message, async move { ended.await.map(|ended| ended.map(|status| Some(last(status)))) }))
}

/// Shows a console.
pub(crate) fn console(registry: Registry, calls: Calls, asked: ConsoleRequest) -> BoxStream<'static, Result<Text, Status>> {
    let ConsoleRequest { namespace, id, follow } = asked;
    let (output, outputs) = mpsc::channel(WAITING);
    let (told, ended) = oneshot::channel();
    let waiting = calls.clone();
    tokio::spawn(async move {
        let work = async { find(&registry, namespace, &id).await?.console(follow, output).await };
        let _ = told.send(waiting.wait_unless_stopped("Admin.Console", &id, work).await);
    });
    answers(calls, outputs, |text| Text { text }, async move { ended.await.map(|ended| ended.map(|()| None)) })
}

/// What is put out, and after that how it has ended. When this worker stops, nothing is put out any more.
fn answers<T, M>(
    calls: Calls,
    outputs: mpsc::Receiver<T>,
    message: impl FnMut(T) -> M + Send + 'static,
    last: impl Future<Output = Result<Result<Option<M>>, oneshot::error::RecvError>> + Send + 'static,
) -> BoxStream<'static, Result<M, Status>>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let outputs = ReceiverStream::new(outputs).take_until(calls.parted()).map(message).map(Ok);
    let last = async move {
        let last = async { last.await.map_err(Error::failed("hear how it has ended"))? };
        calls.wait_unless_stopped("Admin.Session", "its end", last).await.grpc().transpose()
    };
    outputs.chain(stream::once(last).filter_map(std::future::ready)).boxed()
}

fn message(output: ProgramOutput) -> ExecOutput {
    ExecOutput {
        what: Some(match output {
            ProgramOutput::Stdout(bytes) => exec_output::What::Stdout(bytes),
            ProgramOutput::Stderr(bytes) => exec_output::What::Stderr(bytes),
            ProgramOutput::Taken => exec_output::What::Taken(true),
        }),
    }
}

fn read(program: ExecProgram) -> Result<Program> {
    let ExecProgram { args, stdin, terminal, size, .. } = program;
    if args.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("program", "it has no name"));
    }
    let length = args.iter().map(String::len).sum::<usize>();
    if length > ARGUMENTS {
        return Err(Error::invalid("program", format!("its arguments have {length} bytes; the most is {ARGUMENTS}")));
    }
    if terminal.len() > KIND || !terminal.chars().all(|c| c.is_ascii_graphic()) {
        return Err(Error::invalid("terminal", format!("{terminal:?} is no kind of one")));
    }
    let size = size.map(window).transpose()?;
    let terminal = Some(terminal).filter(|kind| !kind.is_empty()).map(|kind| ProgramTerminal { kind, size });
    Ok(Program { args, stdin, terminal })
}

fn window(size: admin::WindowSize) -> Result<WindowSize> {
    let side = |side: u32| {
        u16::try_from(side).map_err(|_| Error::invalid("terminal size", format!("{side} is more than {}", u16::MAX)))
    };
    Ok(WindowSize { width: side(size.width)?, height: side(size.height)? })
}

/// Hands on what the caller sends, to the end of its connection or of the program. A caller that does not keep to the protocol loses its
/// input.
async fn forward(mut asked: Streaming<ExecInput>, input: mpsc::Sender<Vec<u8>>, control: mpsc::Sender<ProgramControl>) {
    let mut input = Some(input);
    while let Ok(Some(ExecInput { what: Some(what) })) = asked.message().await {
        let controlled = match what {
            exec_input::What::Stdin(bytes) => {
                let taken = bytes.len() <= PIECE && input.as_ref().is_some_and(|input| input.try_send(bytes).is_ok());
                if !taken {
                    input = None;
                }
                continue;
            }
            exec_input::What::StdinEnded(_) => {
                input = None;
                continue;
            }
            exec_input::What::Size(size) => window(size).map(ProgramControl::Resize),
            exec_input::What::Signal(signal) => Ok(ProgramControl::Signal(signal)),
            exec_input::What::Program(_) => return,
        };
        if let Ok(controlled) = controlled {
            // Of a flood the rest is thrown away.
            let _ = control.try_send(controlled);
        }
    }
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;

    use super::*;

    fn asked() -> ExecProgram {
        ExecProgram { args: vec!["sh".into()], stdin: true, ..ExecProgram::default() }
    }

    #[test]
    fn programs_are_read() {
        assert_eq!(read(asked()).unwrap(), Program { args: vec!["sh".into()], stdin: true, terminal: None });
        let size = Some(admin::WindowSize { width: 80, height: 24 });
        let program = read(ExecProgram { terminal: "xterm".into(), size, ..asked() }).unwrap();
        let size = Some(WindowSize { width: 80, height: 24 });
        assert_eq!(program.terminal, Some(ProgramTerminal { kind: "xterm".into(), size }));
    }

    #[test]
    fn programs_that_cannot_be() {
        let size = Some(admin::WindowSize { width: 65_536, height: 1 });
        let bad = [
            ExecProgram { args: Vec::new(), ..asked() },
            ExecProgram { args: vec![String::new()], ..asked() },
            ExecProgram { args: vec!["x".repeat(ARGUMENTS + 1)], ..asked() },
            ExecProgram { terminal: "a b".into(), ..asked() },
            ExecProgram { terminal: "t".repeat(KIND + 1), ..asked() },
            ExecProgram { terminal: "xterm".into(), size, ..asked() },
        ];
        for program in bad {
            assert_eq!(read(program).unwrap_err().code(), Code::InvalidArgument);
        }
    }
}
