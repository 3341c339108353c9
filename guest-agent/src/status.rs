//! Errors as the host hears them.

use kuasar_sandboxers::{Code, Error};

/// The longest message, in bytes.
const MESSAGE_MAX: usize = 4 << 10;

/// The answer that tells of an error.
pub(crate) fn status(error: &Error) -> ttrpc::Error {
    let mut message = error.report();
    if message.len() > MESSAGE_MAX {
        message.truncate((0..=MESSAGE_MAX).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0));
    }
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(error.code()), message))
}

fn code(code: Code) -> ttrpc::Code {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use super::*;

    #[test]
    fn messages_are_bounded_and_codes_kept() {
        let ttrpc::Error::RpcStatus(told) = status(&Error::invalid("spec", "ä".repeat(MESSAGE_MAX))) else {
            panic!("no status")
        };
        assert_eq!(told.code(), ttrpc::Code::INVALID_ARGUMENT);
        assert!(told.message().len() <= MESSAGE_MAX && told.message().len() > MESSAGE_MAX - 4);
        let ttrpc::Error::RpcStatus(told) = status(&Error::Finished { id: "c".into() }) else { panic!("no status") };
        assert_eq!((told.code(), told.message()), (ttrpc::Code::NOT_FOUND, "process of \"c\" already finished"));
    }
}
