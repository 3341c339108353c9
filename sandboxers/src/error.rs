//! What can go wrong, and the one place that says which status code it is.
//!
//! Codes are those of gRPC (<https://grpc.github.io/grpc/core/md_doc_statuscodes.html>); ttrpc uses the same numbers. The
//! north face turns an [`Error`] into a status with [`Error::code`] and [`Error::report`], and nowhere else.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::lifecycle::Denial;

/// The status codes this project answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Code {
    /// The request itself is wrong and will be wrong again.
    InvalidArgument,
    /// The thing named does not exist, or no longer.
    NotFound,
    /// The thing to be made exists.
    AlreadyExists,
    /// The thing exists but its state does not allow the request.
    FailedPrecondition,
    /// This technique cannot do it.
    Unimplemented,
    /// Out of disk, memory, descriptors or processes.
    ResourceExhausted,
    /// Not now; the same request may succeed later.
    Unavailable,
    /// It took longer than allowed.
    DeadlineExceeded,
    /// Everything else.
    Internal,
}

/// An error of the contract. `operation` fields read as the end of "failed to …".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request has a value that cannot be accepted.
    #[error("invalid {what}: {why}")]
    Invalid {
        /// What is wrong, by its field name.
        what: String,
        /// Why, and what would be accepted.
        why: String,
    },
    /// No such sandbox, container or process.
    #[error("{kind} {id:?} does not exist")]
    NotFound {
        /// `sandbox`, `container`, `exec` …
        kind: &'static str,
        /// The id asked for.
        id: String,
    },
    /// The process has ended, so it cannot be signalled; containerd expects NotFound here.
    #[error("process of {id:?} already finished")]
    Finished {
        /// The container or exec id.
        id: String,
    },
    /// There is one of that name.
    #[error("{kind} {id:?} already exists")]
    AlreadyExists {
        /// `sandbox`, `container`, `exec` …
        kind: &'static str,
        /// The id asked for.
        id: String,
    },
    /// The lifecycle does not allow it.
    #[error(transparent)]
    Denied(#[from] Denial),
    /// The technique cannot do it.
    #[error("{operation} is not supported: {why}")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// Why not, and what to use instead.
        why: String,
    },
    /// Something this needs is away for now.
    #[error("{what} is unavailable: {why}")]
    Unavailable {
        /// What is away.
        what: String,
        /// Why, and what to do.
        why: String,
    },
    /// A step took too long.
    #[error("{operation} did not finish within {seconds} s")]
    TimedOut {
        /// What was being done.
        operation: String,
        /// The limit.
        seconds: u64,
    },
    /// A system call on a path failed.
    #[error("failed to {operation} {}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// An OCI runtime, hypervisor or engine refused; its own words are kept.
    #[error("{} failed to {operation}: {}", name(program), own_words(program, message))]
    Backend {
        /// The program's name or path.
        program: String,
        /// What was being done.
        operation: String,
        /// The program's own message.
        message: String,
    },
    /// Another part of the system refused, with a code of its own.
    #[error("{by} failed to {operation}: {message}")]
    Refused {
        /// Which part.
        by: String,
        /// What was being done.
        operation: String,
        /// The code it answered with.
        code: Code,
        /// Its own message.
        message: String,
    },
    /// What another process reports that worked for this one: its text has all causes.
    #[error("{report}")]
    Reported {
        /// The code of its error.
        code: Code,
        /// The error and its causes.
        report: String,
    },
    /// Anything else, with its cause.
    #[error("failed to {operation}")]
    Failed {
        /// What was being done.
        operation: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A start failed half way. Its text has all causes, so that the reference stands at the end.
    #[error("{} ({reference})", .error.report())]
    Staged {
        /// What went wrong.
        error: Box<Error>,
        /// How to read its report (see [`failures`](crate::failures)).
        reference: String,
    },
}

/// The result of the contract's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps the cause of a failed system call on a path; meant for `map_err`.
    pub fn io(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { operation, path, source }
    }

    /// Wraps any cause; meant for `map_err`.
    pub fn failed<E>(operation: impl Into<String>) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let operation = operation.into();
        move |source| Self::Failed { operation, source: source.into() }
    }

    /// An [`Error::Invalid`].
    pub fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), why: why.into() }
    }

    /// The status code for this error.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::NotFound { .. } | Self::Finished { .. } => Code::NotFound,
            Self::AlreadyExists { .. } => Code::AlreadyExists,
            Self::Denied(_) => Code::FailedPrecondition,
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::TimedOut { .. } => Code::DeadlineExceeded,
            Self::Backend { .. } => Code::Internal,
            Self::Refused { code, .. } | Self::Reported { code, .. } => *code,
            Self::Staged { error, .. } => error.code(),
            Self::Io { source, .. } => io_code(source),
            Self::Failed { source, .. } => {
                if let Some(inner) = source.downcast_ref::<Self>() {
                    inner.code()
                } else {
                    source.downcast_ref::<io::Error>().map_or(Code::Internal, io_code)
                }
            }
        }
    }

    /// The error and its causes in one line, for the edge: a status message or a log line.
    #[must_use]
    pub fn report(&self) -> String {
        let mut line = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let text = error.to_string();
            // `#[error(transparent)]` repeats its source's text.
            if !line.ends_with(&text) {
                line.push_str(": ");
                line.push_str(&text);
            }
            cause = error.source();
        }
        line
    }
}

/// A program as people call it.
fn name(program: &str) -> &str {
    Path::new(program).file_name().and_then(|name| name.to_str()).unwrap_or(program)
}

/// A program's message without what the error says before it, such as `runc create failed: ` of runc.
fn own_words<'a>(program: &str, message: &'a str) -> &'a str {
    let repeated = || {
        let (said, rest) = message.split_once(" failed: ")?;
        let (by, verb) = said.split_once(' ')?;
        (by == name(program) && !verb.contains(' ')).then_some(rest)
    };
    repeated().unwrap_or(message)
}

fn io_code(error: &io::Error) -> Code {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN) => {
            Code::ResourceExhausted
        }
        Some(libc::ETIMEDOUT) => Code::DeadlineExceeded,
        _ => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_has_the_whole_chain_once() {
        let full = Error::io("write", "/run/x")(io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(full.code(), Code::ResourceExhausted);
        let outer = Error::failed("save the sandbox")(full);
        assert_eq!(outer.code(), Code::ResourceExhausted);
        assert_eq!(outer.report(), "failed to save the sandbox: failed to write /run/x: No space left on device (os error 28)");
    }

    #[test]
    fn a_program_is_named_once() {
        let said = |program: &str, message: &str| {
            Error::Backend { program: program.into(), operation: "create it".into(), message: message.into() }.to_string()
        };
        let runc = "/usr/local/sbin/runc";
        assert_eq!(
            said(runc, "runc create failed: exec: \"x\": not found"),
            "runc failed to create it: exec: \"x\": not found"
        );
        // What tells more stays.
        assert_eq!(said(runc, "exec failed: not found"), "runc failed to create it: exec failed: not found");
        assert_eq!(said("crun", "runc create failed: x"), "crun failed to create it: runc create failed: x");
        assert_eq!(said("runc", "runc has long failed: x"), "runc failed to create it: runc has long failed: x");
        assert_eq!(said("the guest's agent", ""), "the guest's agent failed to create it: ");
    }
}
