//! Stdio of one process, with a terminal or without.

use std::path::{Path, PathBuf};

use kuasar_sandboxers::{
    Error, Result,
    stdio::{ChildFds, IoContext, ProcessIo, Stdio},
    terminal::Terminal,
    types::WindowSize,
};

use crate::runtime::console::ConsoleSocket;

/// Stdio of a process that exists.
#[derive(Debug)]
pub(crate) enum Io {
    Plain(ProcessIo),
    Terminal(Terminal),
    /// A terminal whose other end was lost with an earlier daemon.
    Lost,
}

/// Stdio before the process exists.
pub(crate) enum Prepared {
    Plain(Box<ProcessIo>),
    Console(ConsoleSocket),
}

impl Prepared {
    /// Opens what the process will be given. `dir` is where a socket may be made.
    pub(crate) async fn open(stdio: &Stdio, context: &IoContext, dir: &Path) -> Result<Self> {
        if stdio.terminal {
            Ok(Self::Console(ConsoleSocket::listen(dir)?))
        } else {
            Ok(Self::Plain(Box::new(ProcessIo::open(stdio, context).await?)))
        }
    }

    /// What the runtime is to hand to the process.
    pub(crate) fn child_fds(&self) -> Result<Option<ChildFds>> {
        match self {
            Self::Plain(io) => io.child_fds().map(Some),
            Self::Console(_) => Ok(None),
        }
    }

    /// Where the runtime is to send the terminal.
    pub(crate) fn console(&self) -> Option<PathBuf> {
        match self {
            Self::Plain(_) => None,
            Self::Console(socket) => Some(socket.path()),
        }
    }

    /// After the runtime has made the process: takes the terminal.
    pub(crate) async fn connect(self, stdio: &Stdio, context: &IoContext) -> Result<Io> {
        match self {
            Self::Plain(io) => Ok(Io::Plain(*io)),
            Self::Console(socket) => Ok(Io::Terminal(Terminal::new(socket.receive().await?, stdio, context).await?)),
        }
    }
}

impl Io {
    /// Takes the stdio of a running process over.
    pub(crate) async fn adopt(stdio: &Stdio, context: &IoContext) -> Result<Self> {
        if !stdio.terminal {
            return ProcessIo::adopt(stdio, context).map(Self::Plain);
        }
        Ok(Terminal::adopt(stdio, context).await?.map_or(Self::Lost, Self::Terminal))
    }

    pub(crate) fn close_stdin(&self) {
        match self {
            Self::Plain(io) => io.close_stdin(),
            Self::Terminal(terminal) => terminal.close_stdin(),
            Self::Lost => {}
        }
    }

    pub(crate) fn resize(&self, size: WindowSize) -> Result<()> {
        match self {
            Self::Terminal(terminal) => terminal.resize(size),
            Self::Plain(_) => Err(Error::invalid("resize", "the process has no terminal")),
            Self::Lost => Err(Error::Unavailable {
                what: "the terminal".into(),
                why: "its connection was lost with an earlier daemon; start the process again".into(),
            }),
        }
    }

    /// After the process's end: waits until its output is where it should be.
    pub(crate) async fn finish(&self) {
        match self {
            Self::Plain(io) => io.finish().await,
            Self::Terminal(terminal) => terminal.finish().await,
            Self::Lost => {}
        }
    }
}
