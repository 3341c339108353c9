//! Errors as statuses: the one place that turns an [`Error`] into what goes over the wire.

use kuasar_sandboxers::{Code, Error};

/// The longest message sent, in bytes. gRPC carries it in a header, and peers bound the size of those.
const MESSAGE_LIMIT: usize = 8 << 10;

/// A result as gRPC answers it.
pub trait IntoStatus<T> {
    /// The value, or the error as a gRPC status.
    ///
    /// # Errors
    /// The status.
    fn grpc(self) -> Result<T, tonic::Status>;

    /// The value, or the error as a ttrpc status.
    ///
    /// # Errors
    /// The status.
    fn ttrpc(self) -> ttrpc::Result<T>;
}

impl<T> IntoStatus<T> for Result<T, Error> {
    fn grpc(self) -> Result<T, tonic::Status> {
        self.map_err(|error| tonic::Status::new(grpc_code(error.code()), message(&error)))
    }

    fn ttrpc(self) -> ttrpc::Result<T> {
        self.map_err(|error| ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc_code(error.code()), message(&error))))
    }
}

fn grpc_code(code: Code) -> tonic::Code {
    match code {
        Code::InvalidArgument => tonic::Code::InvalidArgument,
        Code::NotFound => tonic::Code::NotFound,
        Code::AlreadyExists => tonic::Code::AlreadyExists,
        Code::FailedPrecondition => tonic::Code::FailedPrecondition,
        Code::Unimplemented => tonic::Code::Unimplemented,
        Code::ResourceExhausted => tonic::Code::ResourceExhausted,
        Code::Unavailable => tonic::Code::Unavailable,
        Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        Code::Internal => tonic::Code::Internal,
    }
}

fn ttrpc_code(code: Code) -> ttrpc::Code {
    match code {
        Code::InvalidArgument => ttrpc::Code::INVALID_ARGUMENT,
        Code::NotFound => ttrpc::Code::NOT_FOUND,
        Code::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
        Code::FailedPrecondition => ttrpc::Code::FAILED_PRECONDITION,
        Code::Unimplemented => ttrpc::Code::UNIMPLEMENTED,
        Code::ResourceExhausted => ttrpc::Code::RESOURCE_EXHAUSTED,
        Code::Unavailable => ttrpc::Code::UNAVAILABLE,
        Code::DeadlineExceeded => ttrpc::Code::DEADLINE_EXCEEDED,
        Code::Internal => ttrpc::Code::INTERNAL,
    }
}

/// The whole chain of causes; a very long one (an OCI runtime's log) loses its middle, because the operation is named at the
/// beginning and the reason at the end.
fn message(error: &Error) -> String {
    let text = error.report();
    if text.len() <= MESSAGE_LIMIT {
        return text;
    }
    let half = MESSAGE_LIMIT / 2;
    let head = boundary(&text, half);
    let tail = boundary(&text, text.len() - half);
    format!("{} … {}", &text[..head], &text[tail..])
}

/// The nearest place at or before `at` where a character begins.
fn boundary(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<(Error, i32, &'static str)> {
        let text = String::from;
        vec![
            (Error::invalid("sandbox id", "it is empty"), 3, "invalid sandbox id: it is empty"),
            (Error::NotFound { kind: "sandbox", id: text("a") }, 5, "sandbox \"a\" does not exist"),
            (Error::Finished { id: text("a") }, 5, "process of \"a\" already finished"),
            (Error::AlreadyExists { kind: "container", id: text("a") }, 6, "container \"a\" already exists"),
            (Error::Unsupported { operation: "exec", why: text("no shell") }, 12, "exec is not supported: no shell"),
            (Error::Unavailable { what: text("it"), why: text("later") }, 14, "it is unavailable: later"),
            (Error::TimedOut { operation: text("stop"), seconds: 3 }, 4, "stop did not finish within 3 s"),
            (
                Error::Backend { program: text("runc"), operation: text("create"), message: text("exec: \"x\": not found") },
                13,
                "runc failed to create: exec: \"x\": not found",
            ),
            (
                Error::io("write", "/s")(std::io::Error::from_raw_os_error(libc::ENOSPC)),
                8,
                "failed to write /s: No space left on device (os error 28)",
            ),
            (
                Error::Staged { error: Error::invalid("netns", "it is gone").into(), reference: text("kuasarctl failures a") },
                3,
                "invalid netns: it is gone (kuasarctl failures a)",
            ),
        ]
    }

    #[test]
    fn both_protocols_carry_the_same_code_and_text() {
        for (error, code, text) in all() {
            let Err(ttrpc::Error::RpcStatus(status)) = Err::<(), _>(error).ttrpc() else { panic!("a status") };
            assert_eq!((status.code() as i32, status.message()), (code, text));
        }
        for (error, code, text) in all() {
            let status = Err::<(), _>(error).grpc().unwrap_err();
            assert_eq!((status.code() as i32, status.message()), (code, text));
        }
    }

    #[test]
    fn a_very_long_message_keeps_its_beginning_and_its_end() {
        let log = format!("{}the reason", "é".repeat(1 << 20));
        let error = Error::Backend { program: "runc".into(), operation: "create".into(), message: log };
        let status = Err::<(), _>(error).grpc().unwrap_err();
        assert!(status.message().len() <= MESSAGE_LIMIT + 8);
        assert!(status.message().starts_with("runc failed to create: é") && status.message().ends_with("the reason"));
    }
}
