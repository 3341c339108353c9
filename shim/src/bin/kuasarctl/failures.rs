//! `kuasarctl inspect` of what could not be started and is gone: the failures, for people.

use std::{fmt::Write, time::SystemTime};

use anyhow::{Context, Result};
use kuasar_sandboxers::failures::Failure;
use serde::Deserialize;
use serde_json::Value;

use crate::{ps::age, table::printable};

/// The answer that has nothing else.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Gone {
    failures: Vec<Failure>,
}

/// The account of failures, if the daemon's answer has nothing else.
pub(crate) fn render(inspected: &Value, now: SystemTime) -> Result<Option<String>> {
    if inspected.get("spec").is_some() || inspected.get("failures").is_none() {
        return Ok(None);
    }
    let gone = Gone::deserialize(inspected).context("kuasard's failures are of another form; is it another version?")?;
    let accounts: Vec<String> = gone.failures.iter().map(|failure| account(failure, now)).collect();
    Ok(Some(accounts.join("\n")))
}

fn account(failure: &Failure, now: SystemTime) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: &str| {
        let _infallible = writeln!(out, "{name:<10} {}", printable(text));
    };
    line("FAILED TO", &failure.operation);
    line("SANDBOX", failure.sandbox.as_str());
    if let Some(container) = &failure.container {
        line("CONTAINER", container.as_str());
    }
    line("NAMESPACE", failure.namespace.as_str());
    line("AGE", &now.duration_since(failure.at).map_or_else(|_| "-".to_owned(), age));
    line("ERROR", &failure.error);
    for (index, stage) in failure.stages.iter().enumerate() {
        let mark = if index + 1 == failure.stages.len() { "  (failed)" } else { "" };
        let took = format!("{} ms", stage.milliseconds);
        line(if index == 0 { "STAGES" } else { "" }, &format!("{took:>8}  {}{mark}", stage.name));
    }
    line("LOG", &failure.file.display().to_string());
    if let Some(log) = &failure.log {
        line("LOGGED BY", &log.program);
        for text in log.text.lines() {
            line("", text);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn failure() -> Value {
        json!({
            "at": { "secs_since_epoch": 1000, "nanos_since_epoch": 0 },
            "namespace": "k8s.io",
            "sandbox": "abc",
            "container": "web",
            "operation": "create the container",
            "code": "Internal",
            "error": "runc failed: \u{1b}[2J",
            "stages": [
                { "name": "mount the rootfs", "milliseconds": 2 },
                { "name": "create the container with runc", "milliseconds": 31 },
            ],
            "log": { "program": "/bin/runc", "text": "{\"level\":\"error\"}\nsecond\n" },
            "file": "/run/kuasar/failures/1-web.json",
        })
    }

    #[test]
    fn every_failure_is_told() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1061);
        let text = render(&json!({ "failures": [failure(), failure()] }), now).unwrap().unwrap();
        let one = "\
FAILED TO  create the container
SANDBOX    abc
CONTAINER  web
NAMESPACE  k8s.io
AGE        1m
ERROR      runc failed: \u{fffd}[2J
STAGES         2 ms  mount the rootfs
              31 ms  create the container with runc  (failed)
LOG        /run/kuasar/failures/1-web.json
LOGGED BY  /bin/runc
           {\"level\":\"error\"}
           second
";
        assert_eq!(text, format!("{one}\n{one}"));
    }

    #[test]
    fn a_sandbox_that_is_here_is_no_failure() {
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(render(&json!({ "spec": {}, "failures": [failure()] }), now).unwrap(), None);
        assert_eq!(render(&json!({ "other": 1 }), now).unwrap(), None);
        assert!(render(&json!({ "failures": [1] }), now).unwrap_err().to_string().contains("another version"));
    }
}
