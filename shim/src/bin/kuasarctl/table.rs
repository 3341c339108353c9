//! Tables on a terminal.

use std::fmt::Write;

use kuasar_sandboxers::failures::SHORT_ID;

/// Columns as wide as their widest cell, two blanks apart; the last one is not padded.
pub(crate) fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([header.get(column).map_or(0, |cell| cell.chars().count())]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _infallible = write!(line, "{cell:width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    };
    line(&mut header.iter().copied());
    for row in rows {
        line(&mut row.iter().map(|cell| printable(cell)).collect::<Vec<_>>().iter().map(String::as_str));
    }
    out
}

/// An id, or the beginning of it.
pub(crate) fn short(id: &str, full: bool) -> String {
    if full { id.to_owned() } else { id.chars().take(SHORT_ID).collect() }
}

/// Process ids in one cell.
pub(crate) fn pids(pids: &[u32]) -> String {
    let text: Vec<_> = pids.iter().map(u32::to_string).collect();
    if text.is_empty() { "none".to_owned() } else { text.join(",") }
}

/// Names come from pod authors: no cell may move the cursor.
pub(crate) fn printable(cell: &str) -> String {
    cell.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "long cell".into(), "x".into()], vec!["bcd".into(), String::new(), "\u{1b}[2J".into()]];
        assert_eq!(render(&["ID", "NAME", ""], &rows), "ID   NAME\na    long cell  x\nbcd             \u{fffd}[2J\n");
    }
}
