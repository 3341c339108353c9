//! A node in a virtual machine, for a terminal or a command: with containerd and kuasard where it is given packages, else bare. What is done
//! in it is gone afterwards.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use kuasar_tests::vm_node::{Options, VmNode, software};
use kuasar_tests::{program, tools};

/// Boots a node in a virtual machine, for a terminal or a command.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Debian's suite: trixie or bookworm.
    #[arg(long, env = "SUITE", default_value = "trixie")]
    suite: String,
    /// Memory, in MiB. Pods in virtual machines need 6144.
    #[arg(long, env = "KUASAR_NODE_MEMORY", default_value_t = 2560)]
    memory: u32,
    /// Directory with kuasar's packages, as `make node-debs` makes it: containerd and kuasard run then.
    #[arg(long)]
    packages: Option<PathBuf>,
    /// Directory for the console's log.
    #[arg(long, default_value = "target/results")]
    logs: PathBuf,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// A terminal.
    Shell,
    /// A command, with its exit code.
    Exec {
        /// It, for the node's shell.
        #[arg(required = true, trailing_var_arg = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::start_vm(async |slot| run(arguments, slot).await)
}

async fn run(arguments: Arguments, slot: &mut Option<VmNode>) -> Result<ExitCode> {
    // A sentence of its own, before anything is made.
    tools::node_image(&arguments.suite)?;
    let begun = Instant::now();
    eprintln!("booting a node of {}: about a minute where it is emulated", arguments.suite);
    let payload = arguments.packages.as_deref().map(software::payload).transpose()?;
    let options = Options { suite: arguments.suite, memory_mib: arguments.memory, payload, logs: arguments.logs };
    let node = slot.insert(VmNode::boot(options).await?);
    if arguments.packages.is_some() {
        software::start(node).await?;
    }
    let seconds = begun.elapsed().as_secs();
    eprintln!("after {seconds} s; from another terminal: ssh -F {}/ssh_config node", node.dir().display());
    let command = match arguments.action {
        Action::Shell => None,
        Action::Exec { command } => Some(command.join(" ")),
    };
    let status = node.terminal(command.as_deref()).await?;
    let code = status.code().with_context(|| format!("ssh ended by itself: {status}"))?;
    Ok(ExitCode::from(u8::try_from(code)?))
}
