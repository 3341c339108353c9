//! `kuasarctl share`: manual pages and completion scripts of kuasarctl and kuasard, from their command lines.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_complete::{Generator, Shell};
use clap_mangen::Man;
use kuasar_shim::arguments::Args as Daemon;

use crate::Cli;

/// Both are for administrators (man-pages(7)).
const SECTION: &str = "8";

/// Where each shell looks below a directory like /usr/share.
const SHELLS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions"),
    (Shell::Zsh, "zsh/site-functions"),
    (Shell::Fish, "fish/vendor_completions.d"),
];

/// Writes all of it below `dir`, in the places that it has below /usr/share.
pub(crate) fn write(dir: &Path) -> Result<()> {
    for command in [Daemon::command(), Cli::command()] {
        for (shell, place) in SHELLS {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command.clone(), command.get_name(), &mut script);
            // bash looks for a file of the command's own name.
            let file = if shell == Shell::Bash { command.get_name().to_owned() } else { shell.file_name(command.get_name()) };
            put(&dir.join(place), &file, &script)?;
        }
        let mut command = command.disable_help_subcommand(true);
        command.build();
        pages(&dir.join("man/man8"), command)?;
    }
    Ok(())
}

/// A page for a command and one for each of its subcommands.
fn pages(dir: &Path, command: Command) -> Result<()> {
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
        pages(dir, inner.clone())?;
    }
    let page = Man::new(command).section(SECTION).manual("Kuasar").source(concat!("kuasar ", env!("CARGO_PKG_VERSION")));
    let mut text = Vec::new();
    page.render(&mut text)?;
    put(dir, &page.get_filename(), &text)
}

fn put(dir: &Path, file: &str, text: &[u8]) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let path = dir.join(file);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_that_is_shown_has_a_page_and_every_program_its_completions() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        for (file, word) in [
            ("man/man8/kuasard.8", ".TH kuasard 8"),
            ("man/man8/kuasarctl.8", r"kuasarctl\-upgrade(8)"),
            ("man/man8/kuasarctl-gc.8", r"\-\-dry\-run"),
            ("bash-completion/completions/kuasard", "--state"),
            ("zsh/site-functions/_kuasarctl", "containerd-config"),
            ("fish/vendor_completions.d/kuasarctl.fish", "no-trunc"),
        ] {
            assert!(read(file).contains(word), "{file} has no {word}: {}", read(file));
        }
        let command = Cli::command();
        let shown = command.get_subcommands().filter(|inner| !inner.is_hide_set()).count();
        assert!(shown > 10, "{shown}");
        assert_eq!(fs::read_dir(dir.path().join("man/man8")).unwrap().count(), shown + 2);
        assert!(!dir.path().join("man/man8/kuasarctl-share.8").exists());
    }
}
