//! `kuasarctl failures`, and `kuasarctl inspect` of what could not be started and is gone: the reports, for people.

use std::{fmt::Write, path::Path, time::SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use kuasar_sandboxers::failures::{self, DIRECTORY, Failure};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    ps::age,
    table::{self, printable, short},
};

/// How much of an error a table shows, in characters; the whole is in the account.
const ERROR_WIDTH: usize = 120;

/// The reports below a state directory, oldest first: those of a sandbox or container when an id, or the beginning of one, is given.
pub(crate) fn read(state: &Path, id: Option<&str>, namespace: &str) -> Result<Vec<Failure>> {
    let mut found = failures::read(state).map_err(|error| anyhow!("{}; run this as root", error.report()))?;
    found.retain(|failure| namespace.is_empty() || failure.namespace.as_str() == namespace);
    if let Some(id) = id.filter(|id| !id.is_empty()) {
        found.retain(|failure| ids(failure).any(|candidate| candidate.starts_with(id)));
        if found.is_empty() {
            bail!("no failed start of {id:?} is recorded in {}", state.join(DIRECTORY).display());
        }
    }
    Ok(found)
}

fn ids(failure: &Failure) -> impl Iterator<Item = &str> {
    failure.container.iter().map(|id| id.as_str()).chain([failure.sandbox.as_str()])
}

/// A line for each.
pub(crate) fn table(failures: &[Failure], full_ids: bool, now: SystemTime) -> String {
    let row = |failure: &Failure| {
        let container = failure.container.as_ref().map_or_else(|| "-".to_owned(), |id| short(id.as_str(), full_ids));
        let mut error: String = failure.error.chars().take(ERROR_WIDTH).collect();
        if error.len() < failure.error.len() {
            error.push('…');
        }
        vec![
            since(failure, now),
            failure.operation.clone(),
            short(failure.sandbox.as_str(), full_ids),
            container,
            failure.namespace.to_string(),
            error,
        ]
    };
    let rows: Vec<_> = failures.iter().map(row).collect();
    table::render(&["AGE", "FAILED TO", "SANDBOX", "CONTAINER", "NAMESPACE", "ERROR"], &rows)
}

/// All of each.
pub(crate) fn accounts(failures: &[Failure], now: SystemTime) -> String {
    failures.iter().map(|failure| account(failure, now)).collect::<Vec<_>>().join("\n")
}

fn since(failure: &Failure, now: SystemTime) -> String {
    now.duration_since(failure.at).map_or_else(|_| "-".to_owned(), age)
}

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
    Ok(Some(accounts(&gone.failures, now)))
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
    line("AGE", &since(failure, now));
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
    fn reports_are_read_without_a_daemon() {
        let state = tempfile::tempdir().unwrap();
        assert!(read(state.path(), None, "").unwrap().is_empty());
        std::fs::create_dir(state.path().join(DIRECTORY)).unwrap();
        for (number, (sandbox, namespace)) in [("abc", "k8s.io"), ("abd", "k8s.io"), ("abc", "other")].into_iter().enumerate() {
            let mut report = failure();
            (report["sandbox"], report["namespace"]) = (sandbox.into(), namespace.into());
            report["error"] = "é".repeat(ERROR_WIDTH + number).into();
            std::fs::write(state.path().join(DIRECTORY).join(format!("{number}.json")), report.to_string()).unwrap();
        }
        let count = |id, namespace| read(state.path(), id, namespace).map(|found| found.len()).unwrap_or_default();
        assert_eq!((count(None, ""), count(None, "k8s.io"), count(Some("ab"), "")), (3, 2, 3));
        assert_eq!((count(Some("abc"), ""), count(Some("abc"), "other"), count(Some("web"), "")), (2, 1, 3));
        let error = read(state.path(), Some("b"), "").unwrap_err().to_string();
        assert!(error.contains("\"b\"") && error.contains(DIRECTORY), "{error}");

        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1061);
        let found = read(state.path(), Some("abc"), "").unwrap();
        let shown = format!(
            "\
AGE  FAILED TO             SANDBOX  CONTAINER  NAMESPACE  ERROR
1m   create the container  abc      web        k8s.io     {error}
1m   create the container  abc      web        other      {error}…
",
            error = "é".repeat(ERROR_WIDTH)
        );
        assert_eq!(table(&found, false, now), shown);
    }

    #[test]
    fn a_sandbox_that_is_here_is_no_failure() {
        let now = SystemTime::UNIX_EPOCH;
        assert_eq!(render(&json!({ "spec": {}, "failures": [failure()] }), now).unwrap(), None);
        assert_eq!(render(&json!({ "other": 1 }), now).unwrap(), None);
        assert!(render(&json!({ "failures": [1] }), now).unwrap_err().to_string().contains("another version"));
    }
}
