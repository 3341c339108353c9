//! The benchmark: a sandboxer and containerd's runc-v2 shim, on one containerd, in one run, turn by turn.
//!
//! Turn by turn means that each round measures every handler once, so that what the machine does besides falls on all alike.
//! Times are those of single CRI calls over gRPC. See [`table`] for the budgets.

mod measure;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use kuasar_tests::{Node, NodeOptions, program, tools};

use measure::Plan;
use table::Table;

/// The handler that everything is compared with: containerd's runc-v2 shim with runc.
const PEER: &str = "runc";

/// Compares a sandboxer with containerd's runc-v2 shim.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The sandboxer to measure.
    #[arg(long, env = "SANDBOXER", default_value = "kuasar-runc")]
    sandboxer: String,
    /// Fewer rounds: within a minute. Set to 1.
    #[arg(long, env = "BENCH_QUICK", default_value = "0")]
    quick: String,
    /// Directory for the results.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::run(async |node| run(arguments, node).await).await
}

async fn run(arguments: Arguments, slot: &mut Option<Node>) -> Result<ExitCode> {
    let plan = if arguments.quick == "1" { Plan::QUICK } else { Plan::FULL };
    let mut options = NodeOptions::new("bench").quiet().sandboxer(&arguments.sandboxer, "runc");
    let mut handlers = vec![PEER.to_owned(), arguments.sandboxer.clone()];
    match tools::crun() {
        Ok(_) => {
            options = options.sandboxer("kuasar-crun", "crun");
            handlers.push("kuasar-crun".to_owned());
        }
        Err(missing) => println!("without crun: {missing}"),
    }
    // What is measured shall not be the writing of a debug log.
    let node = Node::start(options.patch_kuasard(|config| config["log"]["level"] = "info".into())).await?;
    let node = &*slot.insert(node);
    let (major, minor, patch) = node.containerd.version();
    println!("containerd {major}.{minor}.{patch}; peer: {PEER} (runc-v2 shim); {} rounds", plan.rounds);

    let mut table = Table::new(PEER);
    measure::calls(node, &handlers, &plan, &mut table).await.context("measure single calls")?;
    measure::parallel(node, &handlers, &plan, &mut table).await.context("measure pods in parallel")?;
    measure::memory(node, &handlers, &plan, &mut table).await.context("measure memory")?;
    measure::throughput(node, &handlers, &plan, &mut table).await.context("measure throughput")?;

    table.print();
    let name = arguments.sandboxer.strip_prefix("kuasar-").unwrap_or(&arguments.sandboxer);
    let path = arguments.out.join(format!("{name}.json"));
    table.write(&path)?;
    println!("written to {}", path.display());
    Ok(ExitCode::SUCCESS)
}
