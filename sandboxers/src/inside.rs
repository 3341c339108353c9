//! Looking into a sandbox that has a kernel of its own, for people who look for faults: a program beside its containers, its console, and
//! what is known of it. Where pods are processes of the node's kernel the node's own tools do all that.

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{error::Error, types::WindowSize};

/// A program to be run beside the containers, as root of the sandbox's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name and arguments.
    pub args: Vec<String>,
    /// It gets what is typed; else nothing.
    pub stdin: bool,
    /// It gets a terminal, which has one stream of output.
    pub terminal: Option<ProgramTerminal>,
}

/// The terminal of a [`Program`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramTerminal {
    /// What kind of one it is (`TERM`).
    pub kind: String,
    /// How large, where that is known.
    pub size: Option<WindowSize>,
}

/// The input and output of a [`Program`].
#[derive(Debug)]
pub struct ProgramIo {
    /// Its standard input; ends with the channel. Each piece is answered by [`ProgramOutput::Taken`].
    pub input: mpsc::Receiver<Vec<u8>>,
    /// What else is done with it.
    pub control: mpsc::Receiver<ProgramControl>,
    /// Its output. When nobody takes that any more, the program is killed.
    pub output: mpsc::Sender<ProgramOutput>,
}

/// See [`ProgramIo::control`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgramControl {
    /// Its terminal has another size.
    Resize(WindowSize),
    /// It is sent a signal.
    Signal(u32),
}

/// See [`ProgramIo::output`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgramOutput {
    /// Standard output, or a terminal's.
    Stdout(Vec<u8>),
    /// Standard error.
    Stderr(Vec<u8>),
    /// A piece of input has gone to the program.
    Taken,
}

/// A part of what is known of a sandbox, as text without control characters but newlines and tabs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// What it is about.
    pub title: String,
    /// What is known.
    pub text: String,
}

impl Section {
    /// A section.
    pub fn new(title: impl Into<String>, text: impl Into<String>) -> Self {
        Self { title: title.into(), text: text.into() }
    }
}

/// The refusal of a sandbox that has no kernel of its own.
pub(crate) fn on_the_node(operation: &'static str, instead: &str) -> Error {
    let why = format!("the pod has no kernel of its own, its processes are the node's; {instead}");
    Error::Unsupported { operation, why }
}
