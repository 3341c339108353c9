//! What a program says on its standard output: lines, colours where they are wanted, and a line of progress that the next
//! one replaces.
//!
//! Colours and progress are for a terminal only; `NO_COLOR` (<https://no-color.org>) and `TERM=dumb` turn colours off there.

use std::io::{self, IsTerminal as _, Stdout, Write as _};

use anyhow::{Context, Result};

/// How a piece of text is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Headings.
    Bold,
    /// What one may skip.
    Dim,
    /// Good news.
    Green,
    /// Bad news.
    Red,
    /// What one could type.
    Cyan,
}

/// Standard output.
#[derive(Debug)]
pub struct Screen {
    out: Stdout,
    is_terminal: bool,
    has_colours: bool,
    has_status: bool,
}

impl Default for Screen {
    fn default() -> Self {
        Self::new()
    }
}

impl Screen {
    /// Looks at standard output and at the environment.
    #[must_use]
    pub fn new() -> Self {
        let out = io::stdout();
        let is_terminal = out.is_terminal();
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Self { out, is_terminal, has_colours: is_terminal && !unwanted, has_status: false }
    }

    /// The text with its style; as it is, where there are no colours. Pad before: escape sequences have no width.
    #[must_use]
    pub fn paint(&self, style: Style, text: &str) -> String {
        if !self.has_colours || text.is_empty() {
            return text.to_owned();
        }
        let code = match style {
            Style::Bold => 1,
            Style::Dim => 2,
            Style::Red => 31,
            Style::Green => 32,
            Style::Cyan => 36,
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }

    /// Prints a line that stays.
    ///
    /// # Errors
    /// Nobody reads any more.
    pub fn line(&mut self, text: &str) -> Result<()> {
        let clear = self.clear();
        writeln!(self.out, "{clear}{text}").context("write to standard output")
    }

    /// Shows what is being done until the next line. Not a terminal: shows nothing.
    ///
    /// # Errors
    /// Nobody reads any more.
    pub fn status(&mut self, text: &str) -> Result<()> {
        if !self.is_terminal {
            return Ok(());
        }
        let text = self.paint(Style::Dim, &format!("  … {text}"));
        let clear = self.clear();
        self.has_status = true;
        write!(self.out, "{clear}{text}").and_then(|()| self.out.flush()).context("write to standard output")
    }

    fn clear(&mut self) -> &'static str {
        if std::mem::take(&mut self.has_status) { "\r\x1b[K" } else { "" }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // What comes next, on whatever stream, begins at the left. A reader that is gone will not miss it.
        if self.has_status {
            let _ = write!(self.out, "\r\x1b[K").and_then(|()| self.out.flush());
        }
    }
}
