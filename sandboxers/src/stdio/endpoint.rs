//! Reading containerd's stdio fields.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::Stdio;
use crate::error::{Error, Result};

/// One stdio field, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// Nowhere: a null device.
    None,
    /// A FIFO that containerd made.
    Fifo(PathBuf),
    /// A file that output is appended to.
    File(PathBuf),
    /// A program that takes the output.
    Program(LogProgram),
    /// A stream that containerd opened, by its id.
    Stream(String),
}

/// A `binary://` log URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LogProgram {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// `binary-v2`: it must write a byte to be ready; for `binary`, closing is enough.
    pub must_report: bool,
}

/// The fields of a [`Stdio`], understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoints {
    /// [`Endpoint::None`], [`Endpoint::Fifo`] or [`Endpoint::Stream`].
    pub stdin: Endpoint,
    /// Any.
    pub stdout: Endpoint,
    /// Any; where a log URI is given for standard output only, the same one.
    pub stderr: Endpoint,
}

impl Endpoints {
    /// Reads all fields.
    pub(crate) fn parse(stdio: &Stdio) -> Result<Self> {
        let stdin = Endpoint::parse("stdin", &stdio.stdin)?;
        if matches!(stdin, Endpoint::File(_) | Endpoint::Program(_)) {
            return Err(Error::invalid(
                "stdin",
                format!("{:?} is a log URI; input comes from a FIFO or a stream", stdio.stdin),
            ));
        }
        let stdout = Endpoint::parse("stdout", &stdio.stdout)?;
        let mut stderr = if stdio.terminal { Endpoint::None } else { Endpoint::parse("stderr", &stdio.stderr)? };
        let log = matches!(stdout, Endpoint::File(_) | Endpoint::Program(_));
        if !stdio.terminal && log && stderr == Endpoint::None {
            // One log takes both, as with containerd's own shim.
            stderr = stdout.clone();
        }
        Ok(Self { stdin, stdout, stderr })
    }
}

impl Endpoint {
    /// Reads the field called `field`.
    pub(crate) fn parse(field: &'static str, text: &str) -> Result<Self> {
        let invalid = |why: &str| Err(Error::invalid(field, format!("{text:?} {why}")));
        if text.contains('\0') {
            return invalid("has a NUL byte");
        }
        if text.is_empty() {
            return Ok(Self::None);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            if text.starts_with('/') {
                return Ok(Self::Fifo(text.into()));
            }
            return invalid("is neither an absolute path nor a URI");
        };
        let (location, query) = rest.split_once('?').unwrap_or((rest, ""));
        if scheme.starts_with("ttrpc") || scheme.starts_with("grpc") {
            let id = form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == "streaming_id");
            return match id {
                Some((_, id)) if !id.is_empty() => Ok(Self::Stream(id.into_owned())),
                _ => invalid("is a streaming URL without streaming_id"),
            };
        }
        let path = match percent_decode_str(location).decode_utf8() {
            Ok(path) if path.starts_with('/') && !path.contains('\0') => PathBuf::from(path.into_owned()),
            _ => return invalid("does not name an absolute path"),
        };
        match scheme {
            "fifo" => Ok(Self::Fifo(path)),
            "file" => Ok(Self::File(path)),
            "binary" | "binary-v2" => {
                let arguments = arguments(query);
                if arguments.iter().any(|argument| argument.contains('\0')) {
                    return invalid("has an argument with a NUL byte");
                }
                Ok(Self::Program(LogProgram { path, arguments, must_report: scheme == "binary-v2" }))
            }
            _ => invalid("has an unknown scheme; fifo, file, binary, binary-v2 and streaming URLs are accepted"),
        }
    }
}

/// The query of a log URI as arguments: each key, then its first value (containerd's `NewBinaryCmd`), in the URI's order.
fn arguments(query: &str) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    let mut arguments = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if !keys.iter().any(|seen| *seen == key) {
            keys.push(key.to_string());
            arguments.extend([key.into_owned(), value.into_owned()]);
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Endpoint> {
        Endpoint::parse("stdout", text)
    }

    #[test]
    fn every_form_containerd_sends() {
        assert_eq!(parse("").unwrap(), Endpoint::None);
        assert_eq!(parse("/run/x/1-stdout").unwrap(), Endpoint::Fifo("/run/x/1-stdout".into()));
        assert_eq!(parse("file:///var/log/a%20b.log?maxsize=1").unwrap(), Endpoint::File("/var/log/a b.log".into()));
        assert_eq!(
            parse("ttrpc+unix:////run/k/task.sock?streaming_id=c1-stdout").unwrap(),
            Endpoint::Stream("c1-stdout".into())
        );
        let Endpoint::Program(program) = parse("binary:///bin/sh?-c=printf%20x%20%3E%265&-c=twice&debug").unwrap() else {
            panic!("not a program");
        };
        assert_eq!(program.arguments, ["-c", "printf x >&5", "debug", ""]);
        assert!(!program.must_report);
        assert!(matches!(parse("binary-v2:///l").unwrap(), Endpoint::Program(LogProgram { must_report: true, .. })));
    }

    #[test]
    fn refuses_the_rest_and_names_the_field() {
        for text in ["relative", "npipe:////x", "file://relative", "binary://", "ttrpc+unix:///s", "/a\0b", "file:///a%00b"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.starts_with("invalid stdout: "), "{error}");
        }
        let stdio = Stdio { stdin: "file:///x".into(), ..Stdio::default() };
        assert!(Endpoints::parse(&stdio).is_err());
    }

    #[test]
    fn a_log_for_stdout_takes_stderr_too() {
        let stdio = Stdio { stdout: "file:///x".into(), ..Stdio::default() };
        let ends = Endpoints::parse(&stdio).unwrap();
        assert_eq!(ends.stderr, ends.stdout);
        let stdio = Stdio { stdout: "/fifo".into(), ..Stdio::default() };
        assert_eq!(Endpoints::parse(&stdio).unwrap().stderr, Endpoint::None);
    }

    proptest! {
        #[test]
        fn never_panics_and_paths_are_absolute(text in "(file|binary|fifo|ttrpc\\+unix|x)?(://)?\\PC{0,40}") {
            match parse(&text) {
                Ok(Endpoint::Fifo(path) | Endpoint::File(path)) => prop_assert!(path.is_absolute()),
                Ok(Endpoint::Program(program)) => {
                    prop_assert!(program.path.is_absolute());
                    prop_assert_eq!(program.arguments.len() % 2, 0);
                }
                Ok(Endpoint::Stream(id)) => prop_assert!(!id.is_empty()),
                Ok(Endpoint::None) => prop_assert!(text.is_empty()),
                Err(error) => prop_assert!(error.to_string().contains("stdout")),
            }
        }
    }
}
