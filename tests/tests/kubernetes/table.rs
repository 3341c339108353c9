//! How each case ended with each handler, as a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;

/// How a case ended with a handler.
#[derive(Clone, Debug)]
pub(crate) enum Verdict {
    /// It passed, with what it has to say.
    Passed(String),
    /// It failed, and the runc handler does not, or is the one.
    Failed(String),
    /// It fails with the runc handler, too.
    Alike(String),
    /// It cannot be, as the documentation says.
    Impossible(String),
    /// It was not run.
    Skipped(String),
}

impl Verdict {
    fn cell(&self) -> String {
        match self {
            Self::Passed(note) if note.is_empty() => "yes".to_owned(),
            Self::Passed(note) => format!("yes: {note}"),
            Self::Failed(_) => "**no**".to_owned(),
            Self::Alike(_) => "as runc: no".to_owned(),
            Self::Impossible(_) => "–".to_owned(),
            Self::Skipped(_) => "not run".to_owned(),
        }
    }

    fn reason(&self) -> Option<&str> {
        match self {
            Self::Passed(_) => None,
            Self::Failed(why) | Self::Alike(why) | Self::Impossible(why) | Self::Skipped(why) => Some(why),
        }
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Table {
    handlers: Vec<String>,
    cases: Vec<String>,
    verdicts: BTreeMap<(String, String), Verdict>,
}

impl Table {
    pub(crate) fn new(handlers: &[String], cases: Vec<String>) -> Self {
        Self { handlers: handlers.to_vec(), cases, verdicts: BTreeMap::new() }
    }

    pub(crate) fn set(&mut self, case: &str, handler: &str, verdict: Verdict) {
        self.verdicts.insert((case.to_owned(), handler.to_owned()), verdict);
    }

    /// As Markdown: the table, then the reasons. Cases that were not run at all are left out.
    pub(crate) fn markdown(&self) -> Result<String> {
        let mut text = format!("| case | {} |\n|---|{}\n", self.handlers.join(" | "), "---|".repeat(self.handlers.len()));
        let mut reasons = String::new();
        let mut passed = vec![(0, 0); self.handlers.len()];
        for case in &self.cases {
            let row: Vec<Option<&Verdict>> =
                self.handlers.iter().map(|handler| self.verdicts.get(&(case.clone(), handler.clone()))).collect();
            if row.iter().all(Option::is_none) {
                continue;
            }
            write!(text, "| {case} |")?;
            for ((verdict, handler), (good, all)) in row.iter().zip(&self.handlers).zip(&mut passed) {
                match verdict {
                    None => text.push_str(" |"),
                    Some(verdict) => {
                        *all += 1;
                        *good += usize::from(matches!(verdict, Verdict::Passed(_)));
                        write!(text, " {} |", verdict.cell())?;
                        if let Some(reason) = verdict.reason() {
                            let line = reason.lines().next().unwrap_or_default();
                            writeln!(reasons, "- {case}, {handler}: {}", line.chars().take(400).collect::<String>())?;
                        }
                    }
                }
            }
            text.push('\n');
        }
        text.push_str("| passed |");
        for (good, all) in passed {
            write!(text, " {good} of {all} |")?;
        }
        text.push('\n');
        if !reasons.is_empty() {
            write!(text, "\n{reasons}")?;
        }
        Ok(text)
    }
}
