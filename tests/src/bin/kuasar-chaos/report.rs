//! The results: what was done, what became of the calls, what was promised.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kuasar_tests::screen::{Screen, Style};
use serde::Serialize;

use crate::latencies::Compared;
use crate::ledger::{FirstStatistics, Promise, Sum, TakenAlong};

/// From a kill of the worker with many pods until the next one serves, in milliseconds: at most.
const MEDIAN_MS: f64 = 60.0;
const P95_MS: f64 = 200.0;

/// What the run was.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Head {
    pub(crate) seed: u64,
    pub(crate) containerd: String,
    pub(crate) sandboxer: String,
    pub(crate) pods: usize,
    pub(crate) containers: usize,
}

/// Times from kill to serving.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Times {
    count: usize,
    median: f64,
    p95: f64,
    max: f64,
}

impl Times {
    /// By nearest rank.
    fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).checked_sub(1)?).copied();
        Some(Self { count: sorted.len(), median: rank(50)?, p95: rank(95)?, max: rank(100)? })
    }

    fn are_met(self) -> bool {
        self.median <= MEDIAN_MS && self.p95 <= P95_MS
    }
}

#[derive(Serialize)]
struct Document<'a> {
    head: &'a Head,
    until_serving: Vec<(&'static str, Times)>,
    sum: &'a Sum,
}

/// What a run has come to.
pub(crate) struct Report {
    head: Head,
    sum: Sum,
}

impl Report {
    pub(crate) fn new(head: Head, sum: Sum) -> Self {
        Self { head, sum }
    }

    /// Whether all was kept that was promised.
    pub(crate) fn is_kept(&self) -> bool {
        self.sum.broken.is_empty()
    }

    fn serving(&self) -> Vec<(&'static str, Times)> {
        self.sum.serving_ms.iter().filter_map(|(phase, samples)| Some((*phase, Times::of(samples)?))).collect()
    }

    pub(crate) fn print(&self, screen: &mut Screen) -> Result<()> {
        title(screen, "disturbances", "   times")?;
        for (what, times) in &self.sum.disturbances {
            screen.line(&format!("  {:<30}{times:>8}", what.name()))?;
        }
        title(screen, "calls", "      ok  failed retried without cause    hung")?;
        for (call, count) in &self.sum.calls {
            screen.line(&format!(
                "  {:<30}{:>8}{:>8}{:>8}{:>14}{:>8}",
                format!("{call:?}"),
                count.ok,
                count.failed,
                count.retried,
                count.without_cause,
                count.hung
            ))?;
        }
        title(screen, "until it serves", "   times  median     p95     max  ms")?;
        for (phase, times) in self.serving() {
            let Times { count, median, p95, max } = times;
            screen.line(&format!("  {phase:<30}{count:>8}{median:>8.0}{p95:>8.0}{max:>8.0}"))?;
        }
        self.print_beside(screen)?;
        title(screen, "promises", "  broken")?;
        for promise in Promise::ALL {
            let times = self.sum.broken.get(&promise).copied().unwrap_or(0);
            let style = if times == 0 { Style::Green } else { Style::Red };
            let count = screen.paint(style, &format!("{times:>8}"));
            screen.line(&format!("  {:<30}{count}", promise.broken()))?;
        }
        let TakenAlong { lines, exits } = self.sum.taken_along;
        if lines + exits > 0 {
            let text = format!("  {lines} lines and {exits} exit codes were in containerd's own hands when it was killed");
            screen.line(&screen.paint(Style::Dim, &text))?;
        }
        if self.sum.twice_unnoted > 0 {
            let text = format!("  {} execs were run twice: the disk was full when the worker died", self.sum.twice_unnoted);
            screen.line(&screen.paint(Style::Dim, &text))?;
        }
        for told in &self.sum.told {
            screen.line(&screen.paint(Style::Red, &format!("  {told}")))?;
        }
        screen.line("")
    }

    /// Other pods' calls beside what does not answer.
    fn print_beside(&self, screen: &mut Screen) -> Result<()> {
        if self.sum.beside.is_empty() {
            return Ok(());
        }
        title(screen, "beside what does not answer", " samples    healthy p99     max disturbed p99     max  ms")?;
        for (call, Compared { healthy, disturbed }) in &self.sum.beside {
            screen.line(&format!(
                "  {:<30}{:>8}{:>15.0}{:>8.0}{:>14.0}{:>8.0}",
                format!("{call:?}"),
                healthy.count.min(disturbed.count),
                healthy.p99_ms,
                healthy.max_ms,
                disturbed.p99_ms,
                disturbed.max_ms
            ))?;
        }
        if let Some(FirstStatistics { guests, times, max_ms, limit_ms }) = self.sum.first_statistics {
            let what = format!("first statistics, {guests} stuck");
            screen.line(&format!("  {what:<30}{times:>8}{:>37.0}  of {limit_ms:.0}", max_ms))?;
        }
        Ok(())
    }

    /// Says whether the figure for many pods is met, where it was taken.
    pub(crate) fn verdict(&self, phase: &str) -> Option<String> {
        let (_, times) = self.serving().into_iter().find(|(name, _)| *name == phase)?;
        let word = if times.are_met() { "met" } else { "missed" };
        Some(format!("kill to serving, {phase}: median ≤ {MEDIAN_MS} ms, p95 ≤ {P95_MS} ms: {word}"))
    }

    /// Writes it as JSON.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let document = Document { head: &self.head, until_serving: self.serving(), sum: &self.sum };
        fs::write(path, serde_json::to_string_pretty(&document)? + "\n").with_context(|| format!("write {}", path.display()))
    }

    /// Writes a line per promise, for the summary of `make test`.
    pub(crate) fn write_results(&self, path: &Path) -> Result<()> {
        let kept = Promise::ALL.iter().filter(|promise| !self.sum.broken.contains_key(promise)).count();
        let mut text = format!("PASSED {kept}\n");
        for (promise, times) in &self.sum.broken {
            text.push_str(&format!("FAIL {}: {times} times, seed {}\n", promise.broken(), self.head.seed));
        }
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }
}

fn title(screen: &mut Screen, left: &str, right: &str) -> Result<()> {
    let (left, right) = (screen.paint(Style::Bold, &format!("{left:<32}")), screen.paint(Style::Dim, right));
    screen.line("")?;
    screen.line(&format!("{left}{right}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let times = Times::of(&(1..=100).rev().map(f64::from).collect::<Vec<_>>()).unwrap();
        assert_eq!((times.median, times.p95, times.max), (50.0, 95.0, 100.0));
        assert_eq!(Times::of(&[7.0]), Some(Times { count: 1, median: 7.0, p95: 7.0, max: 7.0 }));
        assert_eq!(Times::of(&[]), None);
    }
}
