//! The command line that containerd uses for every shim. It is that of Go's `flag` package (`-name value`, `-name=value`, one
//! or two hyphens, the action last), which no argument parser for Rust reads.

use std::{ffi::OsString, path::PathBuf};

/// Flags that stand alone.
const SWITCHES: [&str; 5] = ["info", "v", "version", "debug", "h"];

/// What the caller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// `-info`: tell what the runtime can do.
    Info,
    /// `-v`: tell the version.
    Version,
    /// `start`: start a shim for a container.
    Start,
    /// `delete`: containerd has lost this container; say how it ended.
    Delete,
}

/// The command line, read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) action: Action,
    pub(crate) id: String,
    pub(crate) namespace: String,
    /// containerd's directory of the container; it is also the working directory then.
    pub(crate) bundle: Option<PathBuf>,
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Args, String> {
    let mut arguments = arguments.into_iter();
    let mut args = Args { action: Action::Start, id: String::new(), namespace: String::new(), bundle: None };
    let mut action = None;
    let text = |name: &str, value: OsString| value.into_string().map_err(|value| format!("-{name} {value:?} is not UTF-8"));
    while let Some(argument) = arguments.next() {
        let argument = argument.into_string().map_err(|argument| format!("argument {argument:?} is not UTF-8"))?;
        let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
            action = Some(match argument.as_str() {
                "start" => Action::Start,
                "delete" => Action::Delete,
                other => return Err(format!("unknown action {other:?}; known are start and delete")),
            });
            break;
        };
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (flag, None),
        };
        if SWITCHES.contains(&name) {
            let on = inline.is_none_or(|value| value != "false" && value != "0");
            match name {
                "info" if on => action = Some(Action::Info),
                "v" | "version" if on => action = Some(Action::Version),
                // -debug changes nothing here: errors are complete anyway.
                _ => {}
            }
            continue;
        }
        // Every other flag has a value; those that do not matter here (-address, -publish-binary, -socket and what later
        // versions of containerd may add) are read over.
        let value = inline.or_else(|| arguments.next()).ok_or_else(|| format!("-{name} needs a value"))?;
        match name {
            "id" => args.id = text(name, value)?,
            "namespace" => args.namespace = text(name, value)?,
            "bundle" => args.bundle = Some(value.into()),
            _ => {}
        }
    }
    args.action = action.ok_or("no action given: this program is started by containerd, with -info, -v, start or delete")?;
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<Args, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn reads_what_containerd_sends() {
        let line = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id abc -bundle /b -debug delete";
        let args = of(line).unwrap();
        assert_eq!(args.action, Action::Delete);
        assert_eq!((args.id.as_str(), args.namespace.as_str()), ("abc", "k8s.io"));
        assert_eq!(args.bundle, Some("/b".into()));
    }

    #[test]
    fn flags_come_in_any_order_and_form() {
        let args = of("--debug=true -bundle=/b -socket /s --id abc -namespace=x --later value start").unwrap();
        assert_eq!((args.action, args.id.as_str(), args.namespace.as_str()), (Action::Start, "abc", "x"));
        assert_eq!(of("-runtime_path /x -info").unwrap().action, Action::Info);
        assert_eq!(of("-info -debug").unwrap().action, Action::Info);
        assert_eq!(of("-v").unwrap().action, Action::Version);
        assert_eq!(of("-id info start").unwrap().id, "info");
    }

    #[test]
    fn says_what_is_missing() {
        assert!(of("").unwrap_err().contains("no action"));
        assert!(of("-namespace x").unwrap_err().contains("no action"));
        assert!(of("-id").unwrap_err().contains("-id needs a value"));
        assert!(of("stop").unwrap_err().contains("\"stop\""));
        assert!(of("-info=false").unwrap_err().contains("no action"));
    }
}
