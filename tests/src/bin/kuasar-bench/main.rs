//! The benchmark: a sandboxer beside containerd's runc-v2 shim, on one containerd, in one run.
//!
//! ```text
//!   Node ─┬─ calls     a pod's life, call by call, on the pod network and on the host's ─┐
//!         ├─ parallel  20 pods at once, up and down                                      ├─▶ Report ─▶ table, runc.json
//!         ├─ memory    PSS of the management processes at 1, 20 and 50 pods              │   (targets)
//!         └─ output    a container's standard output into its log                        ┘
//! ```
//!
//! Peers take turns, and the one that begins changes from round to round, so that what else the machine does falls on all
//! alike. Times are those of single CRI calls over gRPC. `docs/benchmark.md` says what each figure means. Virtual machines have peers of
//! their own: [`machine`].

mod calls;
mod host;
mod machine;
mod memory;
mod output;
mod parallel;
mod plan;
mod report;
mod samples;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use clap::builder::FalseyValueParser;
use kuasar_tests::scratch::Storage;
use kuasar_tests::screen::{Screen, Style};
use kuasar_tests::{Node, NodeOptions, program, tools};

use host::Host;
use plan::{Part, Plan, Sides};
use report::Report;

/// Compares a sandboxer with containerd's runc-v2 shim.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The sandboxer to measure with runc; the same is measured with crun where that is installed. One of virtual machines is measured
    /// beside machines booted by hand.
    #[arg(long, env = "SANDBOXER", default_value = "kuasar-runc")]
    sandboxer: String,
    /// Fewer rounds: done within a minute.
    #[arg(long, env = "BENCH_QUICK", value_parser = FalseyValueParser::new())]
    quick: bool,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Keep images and containerd's database on the disk, and wait for its syncs.
    #[arg(long)]
    disk: bool,
    /// Fail when a target is missed.
    #[arg(long)]
    strict: bool,
    /// Directory for the results.
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
}

impl Arguments {
    fn storage(&self) -> Storage {
        if self.disk { Storage::Disk } else { Storage::Memory }
    }

    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::start(async |node| {
        if tools::is_machine(&arguments.sandboxer) { machine::run(&arguments, node).await } else { run(arguments, node).await }
    })
}

async fn run(arguments: Arguments, slot: &mut Option<Node>) -> Result<ExitCode> {
    let mut screen = Screen::new();
    let plan = if arguments.quick { Plan::QUICK } else { Plan::FULL };
    let sides = Sides::new(&arguments.sandboxer, tools::crun().is_ok());
    let storage = arguments.storage();
    let host = Host::look(plan.name, plan.rounds, storage)?;
    for line in host.lines() {
        screen.line(&line)?;
    }
    if !sides.has_crun() {
        screen.line("without crun: none found, set KUASAR_CRUN to one")?;
    }

    screen.status("starting a private containerd and kuasard")?;
    let mut options = NodeOptions::new("bench").quiet().storage(storage).sandboxer(&arguments.sandboxer, "runc");
    if sides.has_crun() {
        options = options.sandboxer(plan::OURS_CRUN, "crun");
    }
    // What is measured shall not be the writing of a debug log.
    let node = Node::start(options.patch_kuasard(|config| config["log"]["level"] = "info".into())).await?;
    let node = &*slot.insert(node);

    let mut report = Report::new(&host);
    if arguments.wants(Part::Calls) {
        calls::measure(node, &sides, &plan, &mut screen, &mut report).await.context("measure single calls")?;
    }
    if arguments.wants(Part::Parallel) {
        parallel::measure(node, &sides, &plan, &mut screen, &mut report).await.context("measure pods in parallel")?;
    }
    if arguments.wants(Part::Memory) {
        memory::measure(node, &sides, &plan, &mut screen, &mut report).await.context("measure memory")?;
    }
    if arguments.wants(Part::Output) {
        output::measure(node, &sides, &plan, &mut screen, &mut report).await.context("measure output")?;
    }

    let missed = report.print(&mut screen)?;
    if host.crun.is_some() && !host.crun_is_current {
        screen.line("crun is neither static nor 1.20 or newer: the targets with crun do not apply")?;
    }
    let name = arguments.sandboxer.strip_prefix("kuasar-").unwrap_or(&arguments.sandboxer);
    let path = arguments.out.join(format!("{name}.json"));
    report.write(&path)?;
    screen.line(&screen.paint(Style::Dim, &format!("written to {}", path.display())))?;
    screen.status("removing everything")?;
    Ok(if arguments.strict && missed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
