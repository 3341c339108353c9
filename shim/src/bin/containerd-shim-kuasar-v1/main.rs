//! What containerd executes for `runtime_type = "io.containerd.<sandboxer>.v1"`. It is installed under a name for each
//! sandboxer (`containerd-shim-kuasar-runc-v1` is `kuasar-runc`) and never stays: whatever runs, runs in kuasard.
//!
//! | called with | by containerd | answer |
//! |---|---|---|
//! | `-info` | when it starts (2.3.4 and later), and for containers with id-mapped mounts | what the OCI runtime can do |
//! | `delete` | when it lost a container's connection | how that container ended |
//! | `start` | for a runtime without `sandboxer` | not yet: an error that says what to configure |
//!
//! It works without the daemon, and is as quick as the runtime it asks: containerd starts up only after every answer.

mod args;
mod delete;
mod info;

use std::{
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use anyhow::{Context, Result, bail};

use crate::args::{Action, Args};

/// `containerd-shim-<name>-v1` as containerd makes it from `io.containerd.<name>.v1`.
const PREFIX: &str = "containerd-shim-";
const SUFFIX: &str = "-v1";

/// The name under which this file is installed; it stands for no sandboxer in particular.
const GENERIC: &str = "kuasar";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap_or_default();
    let program = Path::new(&program).file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match args::parse(arguments).map_err(anyhow::Error::msg).and_then(|args| run(&program, &args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd passes on what is on standard error.
            eprintln!("{program}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(program: &str, args: &Args) -> Result<()> {
    match args.action {
        Action::Version => {
            println!("{program}:\n  Version:  {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Action::Info => answer(&info::answer(sandboxer_of(program), io::stdin().lock())?),
        Action::Delete => answer(&delete::answer(args)?),
        Action::Start => {
            let sandboxer = sandboxer_of(program).unwrap_or("kuasar-runc");
            bail!(
                "runs pods through containerd's Sandbox API only: set `sandboxer = \"{sandboxer}\"` in containerd's table for this \
                 runtime (`kuasarctl containerd-config` prints it); containerd 1.7, ctr run, nerdctl and Docker are not served \
                 yet, see docs/containerd.md"
            )
        }
    }
}

/// The sandboxer that the program's name stands for.
fn sandboxer_of(program: &str) -> Option<&str> {
    program.strip_prefix(PREFIX)?.strip_suffix(SUFFIX).filter(|name| *name != GENERIC)
}

fn answer(bytes: &[u8]) -> Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).context("cannot write the answer")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_tells_the_sandboxer() {
        assert_eq!(sandboxer_of("containerd-shim-kuasar-runc-v1"), Some("kuasar-runc"));
        assert_eq!(sandboxer_of("containerd-shim-kuasar-v1"), None);
        assert_eq!(sandboxer_of("shim"), None);
    }
}
