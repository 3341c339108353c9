//! The results: rows of a figure of the peer beside one of ours, their ratio, and the budget for it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

/// Upper bounds for a ratio of ours to the peer's: row, handler, bound.
const BUDGETS: [(&str, &str, f64); 11] = [
    ("runp, host network, median", "kuasar-runc", 0.15),
    ("runp, CNI, median", "kuasar-runc", 0.45),
    ("create+start, CNI, median", "kuasar-runc", 0.90),
    ("create+start, CNI, median", "kuasar-crun", 0.45),
    ("stopp+rmp, host network, median", "kuasar-runc", 0.25),
    ("ExecSync, CNI, median", "kuasar-runc", 0.85),
    ("ExecSync, CNI, median", "kuasar-crun", 0.40),
    ("20 pods in parallel, up", "kuasar-runc", 0.65),
    ("20 pods in parallel, down", "kuasar-runc", 0.65),
    ("PSS at 50 pods", "kuasar-runc", 0.10),
    ("PSS at 50 pods", "kuasar-crun", 0.10),
];

struct Row {
    name: String,
    unit: &'static str,
    /// By handler, in the order they were measured.
    values: Vec<(String, f64)>,
}

/// All rows.
pub(crate) struct Table {
    peer: &'static str,
    rows: Vec<Row>,
}

impl Table {
    /// An empty one.
    pub(crate) fn new(peer: &'static str) -> Self {
        Self { peer, rows: Vec::new() }
    }

    /// Adds a figure of a handler.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, handler: &str, value: f64) {
        let index = self.rows.iter().position(|row| row.name == name).unwrap_or_else(|| {
            self.rows.push(Row { name: name.to_owned(), unit, values: Vec::new() });
            self.rows.len() - 1
        });
        self.rows[index].values.push((handler.to_owned(), value));
    }

    /// Each figure of ours: row, handler, peer's value, our value, ratio.
    fn comparisons(&self) -> impl Iterator<Item = (&Row, &str, f64, f64, f64)> {
        self.rows.iter().flat_map(|row| {
            let peer = row.values.iter().find(|(handler, _)| handler == self.peer).map(|(_, value)| *value);
            row.values.iter().filter(|(handler, _)| handler != self.peer).filter_map(move |(handler, ours)| {
                let peer = peer?;
                Some((row, handler.as_str(), peer, *ours, ours / peer))
            })
        })
    }

    /// Prints it, with ratios and budgets.
    pub(crate) fn print(&self) {
        println!("\n{:<34}{:<14}{:>11}{:>11}{:>7}{:>8}{:>8}", "", "", self.peer, "ours", "", "ratio", "budget");
        for (row, handler, peer, ours, ratio) in self.comparisons() {
            let budget = BUDGETS.iter().find(|(name, of, _)| *name == row.name && *of == handler);
            let budget = budget.map_or_else(String::new, |(_, _, bound)| {
                let verdict = if ratio > *bound { " over" } else { "" };
                format!("{bound:>8.2}{verdict}")
            });
            println!("{:<34}{handler:<14}{peer:>11.1}{ours:>11.1} {:<6}{ratio:>8.3}{budget}", row.name, row.unit);
        }
    }

    /// Writes it as JSON, an object per figure of ours.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let rows: Vec<_> = self
            .comparisons()
            .map(|(row, handler, peer, ours, ratio)| {
                json!({
                    "name": format!("{}, {handler}", row.name),
                    "peer": peer,
                    "ours": ours,
                    "unit": row.unit,
                    "ratio": ratio,
                })
            })
            .collect();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        fs::write(path, serde_json::to_string_pretty(&rows)? + "\n").with_context(|| format!("write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_ours_to_the_peers() {
        let mut table = Table::new("runc");
        table.add("runp", "ms", "runc", 100.0);
        table.add("runp", "ms", "kuasar-runc", 25.0);
        table.add("lonely", "ms", "kuasar-runc", 1.0);
        let ratios: Vec<f64> = table.comparisons().map(|(.., ratio)| ratio).collect();
        assert_eq!(ratios, [0.25]);
    }
}
