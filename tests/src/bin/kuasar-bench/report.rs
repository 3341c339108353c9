//! The results: lines of a figure of the shim with runc beside one of ours, their ratio, and the target for it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kuasar_tests::screen::{Screen, Style};
use serde::Serialize;

use crate::host::Host;
use crate::plan::{Runtime, Side};
use crate::samples::Figure;

/// Upper bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Target {
    /// For ours over the peer's.
    pub(crate) ratio: f64,
    /// For ours itself.
    pub(crate) value: Option<f64>,
}

impl Target {
    pub(crate) fn ratio(ratio: f64) -> Self {
        Self { ratio, value: None }
    }

    fn is_met(self, value: f64, ratio: f64) -> bool {
        ratio <= self.ratio && self.value.is_none_or(|limit| value <= limit)
    }
}

/// A comparison with the shim with runc.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// What it belongs to.
    pub(crate) section: &'static str,
    /// What was measured.
    pub(crate) name: &'static str,
    /// Who is compared with the peer.
    pub(crate) side: Side,
    /// The peer's figure.
    pub(crate) peer: Figure,
    /// The side's figure.
    pub(crate) ours: Figure,
    /// Of both.
    pub(crate) unit: &'static str,
    /// What the ratio should be.
    pub(crate) target: Option<Target>,
}

impl Line {
    fn ratio(&self) -> f64 {
        self.ours.value / self.peer.value
    }

    fn is_met(&self) -> Option<bool> {
        Some(self.target?.is_met(self.ours.value, self.ratio()))
    }

    /// Who is not the peer, in a word.
    fn label(&self) -> String {
        format!("{} {}", if self.side.is_ours { "kuasar" } else { "shim" }, self.side.runtime.name())
    }

    fn rows(&self) -> Vec<Row> {
        let row = |statistic: &str, peer: f64, ours: f64| Row {
            name: format!("{}, {}, {}{statistic}", self.name, self.section, self.label()),
            peer,
            ours,
            unit: self.unit,
            ratio: ours / peer,
            target_ratio: None,
            target_value: None,
            met: None,
        };
        let mut rows = vec![Row {
            target_ratio: self.target.map(|target| target.ratio),
            target_value: self.target.and_then(|target| target.value),
            met: self.is_met(),
            ..row(if self.peer.p95.is_some() { ", median" } else { "" }, self.peer.value, self.ours.value)
        }];
        if let (Some(peer), Some(ours)) = (self.peer.p95, self.ours.p95) {
            rows.push(row(", p95", peer, ours));
        }
        rows
    }
}

/// A row of the JSON file.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    peer: f64,
    ours: f64,
    unit: &'static str,
    ratio: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

#[derive(Serialize)]
struct File<'a> {
    host: &'a Host,
    rows: Vec<Row>,
}

/// All results.
pub(crate) struct Report {
    host: Host,
    lines: Vec<Line>,
}

impl Report {
    pub(crate) fn new(host: &Host) -> Self {
        Self { host: host.clone(), lines: Vec::new() }
    }

    /// Adds a comparison. What is aimed at with crun is aimed at with a current one: an old one has no target.
    pub(crate) fn add(&mut self, mut line: Line) {
        if line.side.runtime == Runtime::Crun && !self.host.crun_is_current {
            line.target = None;
        }
        self.lines.push(line);
    }

    /// Prints all of it; returns how many targets were missed.
    pub(crate) fn print(&self, screen: &mut Screen) -> Result<usize> {
        let mut section = "";
        for line in &self.lines {
            if line.section != section {
                section = line.section;
                self.head(screen, line)?;
            }
            self.line(screen, line)?;
        }
        let verdicts: Vec<bool> = self.lines.iter().filter_map(Line::is_met).collect();
        let missed = verdicts.iter().filter(|met| !**met).count();
        screen.line("")?;
        let verdict = match missed {
            0 => screen.paint(Style::Green, &format!("all {} targets met", verdicts.len())),
            _ => screen.paint(Style::Red, &format!("{missed} of {} targets missed", verdicts.len())),
        };
        screen.line(&verdict)?;
        if self.host.crun.is_some() && !self.host.crun_is_current {
            screen.line("crun is neither static nor 1.20 or newer: the targets with crun do not apply")?;
        }
        Ok(missed)
    }

    fn head(&self, screen: &mut Screen, line: &Line) -> Result<()> {
        screen.line("")?;
        let columns = if line.peer.p95.is_some() {
            format!("{:>17}{:>9}{:>14}{:>9}", "shim runc", "p95", "compared", "p95")
        } else {
            format!("{:>17}{:>9}{:>14}{:>9}", "shim runc", "", "compared", "")
        };
        let title = format!("{:<32}", line.section);
        let title = screen.paint(Style::Bold, &title);
        let columns = screen.paint(Style::Dim, &format!("{}{:>9}   target", &columns, "ratio"));
        screen.line(&format!("{title}{columns}"))
    }

    fn line(&self, screen: &mut Screen, line: &Line) -> Result<()> {
        let number = |value: f64| if line.unit.is_empty() { format!("{value:.0}") } else { format!("{value:.1}") };
        let p95 = |figure: Figure| figure.p95.map(number).unwrap_or_default();
        let verdict = match (line.target, line.is_met()) {
            (Some(target), Some(met)) => {
                let limit = target.value.map_or_else(String::new, |limit| format!(", {limit} {}", line.unit));
                let aim = format!("≤ {:.2}{limit}", target.ratio);
                let (style, word) = if met { (Style::Green, "met") } else { (Style::Red, "missed") };
                format!("{aim} {}", screen.paint(style, word))
            }
            _ => String::new(),
        };
        let text = format!(
            "  {:<19}{:<11}{:>13} {:<4}{:>8}{:>13} {:<4}{:>5}{:>9.2}   {verdict}",
            line.name,
            line.label(),
            number(line.peer.value),
            line.unit,
            p95(line.peer),
            number(line.ours.value),
            line.unit,
            p95(line.ours),
            line.ratio(),
        );
        let text = text.trim_end();
        let is_aside = !line.side.is_ours;
        screen.line(&if is_aside { screen.paint(Style::Dim, text) } else { text.to_owned() })
    }

    /// Writes it as JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let file = File { host: &self.host, rows: self.lines.iter().flat_map(Line::rows).collect() };
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        fs::write(path, serde_json::to_string_pretty(&file)? + "\n").with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(peer: f64, ours: f64, target: Option<Target>) -> Line {
        Line {
            section: "CNI",
            name: "runp",
            side: Side { handler: "kuasar-runc".to_owned(), is_ours: true, runtime: Runtime::Runc },
            peer: Figure { value: peer, p95: Some(peer * 2.0) },
            ours: Figure { value: ours, p95: Some(ours * 2.0) },
            unit: "ms",
            target,
        }
    }

    #[test]
    fn ratios_are_ours_to_the_peers() {
        let rows = line(100.0, 25.0, Some(Target::ratio(0.25))).rows();
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["runp, CNI, kuasar runc, median", "runp, CNI, kuasar runc, p95"]);
        assert_eq!((rows[0].ratio, rows[0].met, rows[1].met), (0.25, Some(true), None));
    }

    #[test]
    fn a_target_may_bound_the_value_too() {
        let target = Some(Target { ratio: 0.5, value: Some(15.0) });
        assert_eq!(line(100.0, 16.0, target).is_met(), Some(false));
        assert_eq!(line(20.0, 15.0, target).is_met(), Some(false));
        assert_eq!(line(100.0, 15.0, target).is_met(), Some(true));
        assert_eq!(line(100.0, 15.0, None).is_met(), None);
    }
}
