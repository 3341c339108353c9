//! CRI's log files: `<RFC 3339 time> <stdout|stderr> <F|P> <text>`, a line each; P marks a part of a longer line.

use std::path::Path;

use anyhow::{Context, Result};

/// A line that a container has printed, put together from its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When, as the file says it.
    pub time: String,
    /// Whether it came from stderr.
    pub is_stderr: bool,
    /// What.
    pub text: String,
}

/// Reads a log file; one that does not exist is empty.
///
/// # Errors
/// The file cannot be read, or a line is malformed.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    match std::fs::read(path) {
        Ok(bytes) => parse(&String::from_utf8_lossy(&bytes)).with_context(|| format!("in {}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// The lines of a log file's text.
///
/// # Errors
/// A line is malformed.
pub fn parse(text: &str) -> Result<Vec<Line>> {
    let mut lines: Vec<Line> = Vec::new();
    // Per stream: whether the last line is still to be continued.
    let mut open: [Option<usize>; 2] = [None, None];
    for raw in text.split_inclusive('\n') {
        // The last one may be in the middle of being written.
        let Some(raw) = raw.strip_suffix('\n') else { break };
        let mut fields = raw.splitn(4, ' ');
        let (Some(time), Some(stream), Some(tag), Some(text)) = (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            anyhow::bail!("not a CRI log line: {raw:?}");
        };
        let is_stderr = stream == "stderr";
        let slot = &mut open[usize::from(is_stderr)];
        if let Some(index) = *slot {
            lines[index].text.push_str(text);
        } else {
            *slot = Some(lines.len());
            lines.push(Line { time: time.to_owned(), is_stderr, text: text.to_owned() });
        }
        if tag.starts_with('F') {
            *slot = None;
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_per_stream() {
        let log = "t1 stdout P a\nt2 stderr F x y\nt3 stdout F b\nt4 stdout F \nt5 stdo";
        let texts: Vec<(bool, String)> = parse(log).unwrap().into_iter().map(|line| (line.is_stderr, line.text)).collect();
        assert_eq!(texts, [(false, "ab".to_owned()), (true, "x y".to_owned()), (false, String::new())]);
    }

    #[test]
    fn a_malformed_line_is_an_error() {
        assert!(parse("nonsense\n").is_err());
    }
}
