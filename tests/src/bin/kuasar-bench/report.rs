//! The results: lines of a peer's figure beside one of ours, their ratio, and the target for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kuasar_tests::screen::{Screen, Style};
use serde::Serialize;

use crate::host::Host;
use crate::plan::{Runtime, Side};
use crate::samples::Figure;

/// Upper bounds, all of which hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Target {
    /// For ours over the peer's.
    pub(crate) ratio: Option<f64>,
    /// For what ours has more than the peer's.
    pub(crate) over: Option<f64>,
    /// For ours itself.
    pub(crate) value: Option<f64>,
}

impl Target {
    pub(crate) fn ratio(ratio: f64) -> Self {
        Self { ratio: Some(ratio), ..Self::default() }
    }

    pub(crate) fn over(over: f64) -> Self {
        Self { over: Some(over), ..Self::default() }
    }

    pub(crate) fn value(value: f64) -> Self {
        Self { value: Some(value), ..Self::default() }
    }

    /// What is compared with a peer needs one.
    fn is_met(self, value: f64, peer: Option<f64>) -> bool {
        let compared = |limit: Option<f64>, figure: fn(f64, f64) -> f64| {
            limit.is_none_or(|limit| peer.is_some_and(|peer| figure(value, peer) <= limit))
        };
        compared(self.ratio, |ours, peer| ours / peer)
            && compared(self.over, |ours, peer| ours - peer)
            && self.value.is_none_or(|limit| value <= limit)
    }

    /// For people.
    fn text(self, unit: &str) -> String {
        let parts = [
            self.ratio.map(|ratio| format!("≤ {ratio:.2}")),
            self.over.map(|over| format!("≤ {over} {unit} more")),
            self.value.map(|value| format!("≤ {value} {unit}")),
        ];
        parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// Who the peer of containers is.
pub(crate) const SHIM: &str = "shim runc";

/// A figure, most often compared with a peer's.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// What it belongs to.
    pub(crate) section: &'static str,
    /// What was measured.
    pub(crate) name: &'static str,
    /// Who the peer is.
    pub(crate) peer_name: &'static str,
    /// Whose figure is compared with the peer's.
    pub(crate) who: String,
    /// Whether it is shown only to understand the others.
    pub(crate) is_aside: bool,
    /// The peer's figure, where there is one.
    pub(crate) peer: Option<Figure>,
    /// The other's.
    pub(crate) ours: Figure,
    /// Of both.
    pub(crate) unit: &'static str,
    /// What it should be.
    pub(crate) target: Option<Target>,
}

impl Line {
    /// A figure that stands alone until [`Self::beside`].
    pub(crate) fn new(section: &'static str, name: &'static str, unit: &'static str, ours: Figure) -> Self {
        let (who, peer) = (String::new(), None);
        Self { section, name, peer_name: "", who, is_aside: false, peer, ours, unit, target: None }
    }

    /// Whose figure it is.
    pub(crate) fn of(self, who: &str) -> Self {
        Self { who: who.to_owned(), ..self }
    }

    /// What it is compared with.
    pub(crate) fn beside(self, peer_name: &'static str, peer: Figure) -> Self {
        Self { peer_name, peer: Some(peer), ..self }
    }

    /// What it should be.
    pub(crate) fn aim(self, target: Option<Target>) -> Self {
        Self { target, ..self }
    }

    fn ratio(&self) -> Option<f64> {
        Some(self.ours.value / self.peer?.value)
    }

    fn is_met(&self) -> Option<bool> {
        Some(self.target?.is_met(self.ours.value, self.peer.map(|peer| peer.value)))
    }

    fn rows(&self) -> Vec<Row> {
        let row = |statistic: &str, peer: Option<f64>, ours: f64| Row {
            name: format!("{}, {}, {}{statistic}", self.name, self.section, self.who),
            peer_name: self.peer.map(|_| self.peer_name),
            peer,
            ours,
            unit: self.unit,
            ratio: peer.map(|peer| ours / peer),
            target_ratio: None,
            target_over: None,
            target_value: None,
            met: None,
        };
        let mut rows = vec![Row {
            target_ratio: self.target.and_then(|target| target.ratio),
            target_over: self.target.and_then(|target| target.over),
            target_value: self.target.and_then(|target| target.value),
            met: self.is_met(),
            ..row(if self.ours.p95.is_some() { ", median" } else { "" }, self.peer.map(|peer| peer.value), self.ours.value)
        }];
        if let Some(ours) = self.ours.p95 {
            rows.push(row(", p95", self.peer.and_then(|peer| peer.p95), ours));
        }
        rows
    }
}

/// A row of the JSON file.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_name: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<f64>,
    ours: f64,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_over: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    met: Option<bool>,
}

#[derive(Serialize)]
struct File<'a> {
    host: &'a Host,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    notes: &'a BTreeMap<&'static str, String>,
    rows: Vec<Row>,
}

/// All results.
pub(crate) struct Report {
    host: Host,
    notes: BTreeMap<&'static str, String>,
    lines: Vec<Line>,
}

impl Report {
    pub(crate) fn new(host: &Host) -> Self {
        Self { host: host.clone(), notes: BTreeMap::new(), lines: Vec::new() }
    }

    /// Adds something that figures cannot be read without.
    pub(crate) fn note(&mut self, key: &'static str, value: String) {
        self.notes.insert(key, value);
    }

    /// Adds a figure.
    pub(crate) fn add(&mut self, line: Line) {
        self.lines.push(line);
    }

    /// Adds a comparison of a side with the shim with runc. What is aimed at with crun is aimed at with a current one: an old one has no
    /// target.
    pub(crate) fn compare(&mut self, side: &Side, line: Line) {
        let applies = side.is_ours && (side.runtime != Runtime::Crun || self.host.crun_is_current);
        let who = format!("{} {}", if side.is_ours { "kuasar" } else { "shim" }, side.runtime.name());
        let target = line.target.filter(|_| applies);
        self.add(Line { who, is_aside: !side.is_ours, target, ..line });
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
        Ok(missed)
    }

    fn head(&self, screen: &mut Screen, line: &Line) -> Result<()> {
        screen.line("")?;
        let p95 = if line.ours.p95.is_some() { "p95" } else { "" };
        let (peer, ratio) = if line.peer.is_some() { (line.peer_name, "ratio") } else { ("", "") };
        let columns =
            format!("{peer:>17}{p95:>9}{:>14}{p95:>9}{ratio:>9}   target", if line.peer.is_some() { "compared" } else { "" });
        let title = format!("{:<32}", line.section);
        let title = screen.paint(Style::Bold, &title);
        let columns = screen.paint(Style::Dim, &columns);
        screen.line(&format!("{title}{columns}"))
    }

    fn line(&self, screen: &mut Screen, line: &Line) -> Result<()> {
        let number = |value: f64| if line.unit.is_empty() { format!("{value:.0}") } else { format!("{value:.1}") };
        let p95 = |figure: Option<Figure>| figure.and_then(|figure| figure.p95).map(number).unwrap_or_default();
        let verdict = match (line.target, line.is_met()) {
            (Some(target), Some(met)) => {
                let (style, word) = if met { (Style::Green, "met") } else { (Style::Red, "missed") };
                format!("{} {}", target.text(line.unit), screen.paint(style, word))
            }
            _ => String::new(),
        };
        let text = format!(
            "  {:<19}{:<11}{:>13} {:<4}{:>8}{:>13} {:<4}{:>5}{:>9}   {verdict}",
            line.name,
            line.who,
            line.peer.map(|peer| number(peer.value)).unwrap_or_default(),
            if line.peer.is_some() { line.unit } else { "" },
            p95(line.peer),
            number(line.ours.value),
            line.unit,
            p95(Some(line.ours)),
            line.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
        );
        let text = text.trim_end();
        screen.line(&if line.is_aside { screen.paint(Style::Dim, text) } else { text.to_owned() })
    }

    /// Writes it as JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let rows = self.lines.iter().flat_map(Line::rows).collect();
        let file = File { host: &self.host, notes: &self.notes, rows };
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
        let figure = |value: f64| Figure { value, p95: Some(value * 2.0) };
        Line::new("CNI", "runp", "ms", figure(ours)).of("kuasar runc").beside(SHIM, figure(peer)).aim(target)
    }

    #[test]
    fn ratios_are_ours_to_the_peers() {
        let rows = line(100.0, 25.0, Some(Target::ratio(0.25))).rows();
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["runp, CNI, kuasar runc, median", "runp, CNI, kuasar runc, p95"]);
        assert_eq!((rows[0].ratio, rows[0].met, rows[1].met), (Some(0.25), Some(true), None));
    }

    #[test]
    fn a_target_may_bound_the_value_too() {
        let target = Some(Target { value: Some(15.0), ..Target::ratio(0.5) });
        assert_eq!(line(100.0, 16.0, target).is_met(), Some(false));
        assert_eq!(line(20.0, 15.0, target).is_met(), Some(false));
        assert_eq!(line(100.0, 15.0, target).is_met(), Some(true));
        assert_eq!(line(100.0, 15.0, None).is_met(), None);
    }

    #[test]
    fn a_target_may_bound_what_is_more() {
        assert_eq!(line(100.0, 130.0, Some(Target::over(30.0))).is_met(), Some(true));
        assert_eq!(line(100.0, 131.0, Some(Target::over(30.0))).is_met(), Some(false));
        let alone = Line { peer: None, ..line(0.0, 1.0, Some(Target::over(30.0))) };
        assert_eq!((alone.is_met(), alone.rows()[0].ratio), (Some(false), None));
    }
}
