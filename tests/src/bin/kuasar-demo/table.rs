//! The comparison: a column per handler, the runc shim first, and what the others are of it.

use std::time::Duration;

use anyhow::Result;
use kuasar_tests::screen::{Screen, Style};

use crate::pod::Figures;

const LABEL: usize = 25;
const RATIO: usize = 6;

/// What is shown of a column: the text, and the number that its ratio is made of.
struct Cell {
    text: String,
    number: Option<f64>,
}

fn time(time: Duration) -> Cell {
    let ms = time.as_secs_f64() * 1e3;
    Cell { text: format!("{ms:.0} ms"), number: Some(ms) }
}

fn memory(kib: u64) -> Cell {
    let mib = kib as f64 / 1024.0;
    Cell { text: format!("{mib:.1} MiB"), number: Some(mib) }
}

/// Prints it.
pub(crate) fn print(results: &[Figures], screen: &mut Screen) -> Result<()> {
    let mut rows: Vec<(String, Vec<Cell>)> = Vec::new();
    let mut row = |label: String, cell: &dyn Fn(&Figures) -> Cell| rows.push((label, results.iter().map(cell).collect()));
    row("start a pod".to_owned(), &|of| time(of.run));
    row("start a container in it".to_owned(), &|of| time(of.start));
    row("run a command in that".to_owned(), &|of| time(of.exec));
    row("remove the pod".to_owned(), &|of| time(of.remove));
    row("memory, 1 pod".to_owned(), &|of| memory(of.memory[0].kib));
    let count = |pods: usize| Cell { text: pods.to_string(), number: None };
    row("pods in the end".to_owned(), &|of| count(of.pods));
    row("memory then".to_owned(), &|of| memory(of.memory[1].kib));
    row("processes then".to_owned(), &|of| count(of.memory[1].processes));
    row("kernel of the containers".to_owned(), &|of| Cell { text: of.kernel.clone(), number: None });

    // A kernel's version can be long.
    let value = rows.iter().flat_map(|(_, cells)| cells).map(|cell| cell.text.len() + 1).max().unwrap_or(0).max(12);
    screen.line("")?;
    let mut head = " ".repeat(LABEL);
    for (index, figures) in results.iter().enumerate() {
        head.push_str(&format!("{:>value$}", figures.title));
        if index > 0 {
            head.push_str(&" ".repeat(RATIO));
        }
    }
    screen.line(&screen.paint(Style::Bold, head.trim_end()))?;
    for (label, cells) in rows {
        screen.line(&line(screen, &label, &cells, value))?;
    }
    screen.line(&screen.paint(
        Style::Dim,
        "Medians of the pods, one after another. Memory (PSS) and processes: shims and pause containers on\n\
         the left, kuasard on the right, without VMMs. × is the part of the runc shim's figure.",
    ))
}

fn line(screen: &Screen, label: &str, cells: &[Cell], value: usize) -> String {
    let peer = cells.first().and_then(|cell| cell.number);
    let mut line = format!("{label:<LABEL$}");
    for (index, cell) in cells.iter().enumerate() {
        line.push_str(&format!("{:>value$}", cell.text));
        if index > 0 {
            let ratio = cell.number.zip(peer).map(|(ours, peer)| format!("×{:.2}", ours / peer)).unwrap_or_default();
            line.push_str(&screen.paint(Style::Dim, &format!("{ratio:>RATIO$}")));
        }
    }
    line.trim_end().to_owned()
}
