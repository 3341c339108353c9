//! Removes what killed tests have left on the machine. With `--kept`, also what `KUASAR_KEEP=1` has kept.

use std::process::ExitCode;

use clap::Parser;

/// Removes what killed tests have left on the machine.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Also what KUASAR_KEEP=1 has kept for inspection.
    #[arg(long)]
    kept: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match kuasar_tests::scratch::sweep(arguments.kept) {
        Ok(removed) => {
            for dir in removed {
                println!("removed {}", dir.display());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
