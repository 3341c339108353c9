//! `kuasarctl gc`: what nobody answers for any more.

use anyhow::{Context, Result};
use kuasar_sandboxers::collect::{Kind, Outcome};
use serde::Deserialize;
use serde_json::Value;

use crate::table;

/// The daemon's answer.
#[derive(Debug, Deserialize)]
pub(crate) struct Report {
    unanswered: Option<String>,
    collected: Vec<Item>,
}

#[derive(Debug, Deserialize)]
struct Item {
    kind: Kind,
    namespace: String,
    sandbox: String,
    what: String,
    why: String,
    processes: Vec<u32>,
    outcome: Outcome,
}

impl Report {
    /// Reads the answer.
    pub(crate) fn parse(answer: &Value) -> Result<Self> {
        Self::deserialize(answer).context("kuasard's report is of another form; is it another version?")
    }

    /// What went wrong, a line each.
    pub(crate) fn problems(&self) -> Vec<String> {
        let unanswered = self.unanswered.iter().map(|why| {
            format!("containerd does not say what it knows, so sandboxes that it may have forgotten are not collected: {why}")
        });
        let failed = self.collected.iter().filter_map(|item| match &item.outcome {
            Outcome::Failed(why) => Some(format!("cannot remove {}: {why}", item.what)),
            _ => None,
        });
        unanswered.chain(failed).collect()
    }

    /// A line for each thing.
    pub(crate) fn render(self, full_ids: bool) -> String {
        if self.collected.is_empty() {
            return "nothing to collect\n".to_owned();
        }
        let rows: Vec<_> = self
            .collected
            .into_iter()
            .map(|item| {
                let result = match item.outcome {
                    Outcome::WouldRemove => "would remove",
                    Outcome::Removed => "removed",
                    Outcome::Kept => "kept",
                    Outcome::Failed(_) => "failed",
                };
                let kind = match item.kind {
                    Kind::Forgotten => "forgotten",
                    Kind::Abandoned => "abandoned",
                    Kind::Leftover => "leftover",
                    Kind::SetAside => "set aside",
                    Kind::Unrecovered => "unrecovered",
                };
                let id = table::short(&item.sandbox, full_ids);
                let processes = table::pids(&item.processes);
                vec![result.to_owned(), kind.to_owned(), id, item.namespace, processes, item.what, item.why]
            })
            .collect();
        table::render(&["RESULT", "KIND", "SANDBOX", "NAMESPACE", "PROCESSES", "WHAT", "WHY"], &rows)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_thing_has_a_line_and_what_failed_is_told() {
        let item = |kind: &str, outcome: Value| {
            json!({
                "kind": kind, "namespace": "k8s.io", "sandbox": "0123456789abcdef", "what": "a sandbox", "why": "nobody knows it",
                "processes": [12, 13], "outcome": outcome,
            })
        };
        let items = [
            item("forgotten", json!("would_remove")),
            item("leftover", json!("removed")),
            item("set_aside", json!("kept")),
            item("unrecovered", json!({ "failed": "it is busy" })),
        ];
        let report = json!({ "dry_run": false, "unanswered": "connection refused", "collected": items });
        let report = Report::parse(&report).unwrap();
        let problems = report.problems();
        assert!(
            problems[0].contains("connection refused") && problems[1] == "cannot remove a sandbox: it is busy",
            "{problems:?}"
        );
        let text = report.render(false);
        let lines: Vec<&str> = text.lines().collect();
        for (line, words) in
            lines[1..].iter().zip(["would remove  forgotten", "removed       leftover", "kept          set aside", "failed"])
        {
            assert!(line.starts_with(words) && line.contains("0123456789abc  ") && line.contains("12,13"), "{text}");
        }
        let none = Report::parse(&json!({ "dry_run": true, "unanswered": null, "collected": [] })).unwrap();
        assert!(none.problems().is_empty());
        assert_eq!(none.render(true), "nothing to collect\n");
        assert!(Report::parse(&json!([])).unwrap_err().to_string().contains("another version"));
    }
}
