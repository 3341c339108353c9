//! `kuasarctl logs --sandbox`: what is known of a sandbox, for people.

use std::fmt::Write;

use anyhow::{Context, Result};
use kuasar_sandboxers::inside::Section;
use serde::Deserialize;
use serde_json::Value;

/// Each section under its title.
pub(crate) fn render(account: &Value) -> Result<String> {
    let sections =
        Vec::<Section>::deserialize(account).context("kuasard's account is of another form; is it another version?")?;
    let mut out = String::new();
    for (index, Section { title, text }) in sections.iter().enumerate() {
        let gap = if index == 0 { "" } else { "\n" };
        let _infallible = writeln!(out, "{gap}==> {title} <==\n{}", text.trim_end());
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn sections_have_headings() {
        let account = json!([{ "title": "console", "text": "a\nb\n" }, { "title": "virtiofsd", "text": "" }]);
        assert_eq!(render(&account).unwrap(), "==> console <==\na\nb\n\n==> virtiofsd <==\n\n");
        assert!(render(&json!({ "sections": 1 })).unwrap_err().to_string().contains("another version"));
    }
}
