//! Removes what killed tests have left on the machine. With `--kept`, also what `KUASAR_KEEP=1` has kept.

use clap::Parser;

/// Removes what killed tests have left on the machine.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Also what KUASAR_KEEP=1 has kept for inspection.
    #[arg(long)]
    kept: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    for dir in kuasar_tests::scratch::sweep(arguments.kept)? {
        println!("removed {}", dir.display());
    }
    Ok(())
}
