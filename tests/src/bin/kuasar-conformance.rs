//! critest with a sandboxer beside critest with the runc shim, on one containerd, in one run.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kuasar_tests::conformance::{Critest, NOT_IN_MACHINES, Run, Verdict, compare, write_results};
use kuasar_tests::image::recipes;
use kuasar_tests::{Node, NodeOptions, program, skip, tools};

/// Runs the CRI conformance suite with a sandboxer and with the runc shim, and compares the two.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The sandboxer to test; its name says its kind (kuasar-runc, kuasar-crun, kuasar-qemu).
    #[arg(long, env = "SANDBOXER", default_value = "kuasar-runc")]
    sandboxer: String,
    /// The OCI runtime behind both, runc or crun; by default what the sandboxer's name says. Machines have their own: the shim's.
    #[arg(long, value_parser = ["runc", "crun"])]
    runtime: Option<String>,
    /// Only the shim, to check the suite itself.
    #[arg(long)]
    peer_only: bool,
    /// Only specs that match this regular expression.
    #[arg(long, env = "FOCUS", default_value = "")]
    focus: String,
    /// Also the specs that need NRI in virtual machines, which take minutes where they are emulated; others always run them.
    #[arg(long)]
    nri: bool,
    /// Directory for logs and JUnit reports.
    #[arg(long, default_value = "target/conformance")]
    out: PathBuf,
    /// File for the results, a line per spec.
    #[arg(long)]
    results: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::start(async |node| start(arguments, node).await)
}

async fn start(arguments: Arguments, slot: &mut Option<Node>) -> Result<ExitCode> {
    let machine = tools::hypervisor_of(&arguments.sandboxer).map_or(Ok(()), tools::machine);
    let critest = match machine.and_then(|()| tools::critest()) {
        Ok(critest) => critest,
        // Whoever set the variable does not want to skip.
        Err(wrong @ tools::Missing::Variable { .. }) => return Err(wrong.into()),
        Err(missing) => {
            skip::record(&format!("conformance of {}", arguments.sandboxer), &missing.to_string());
            return Ok(ExitCode::SUCCESS);
        }
    };
    let peer_only = arguments.peer_only;
    let sandboxer = arguments.sandboxer.clone();
    let mut options = NodeOptions::new("conformance").quiet().registry(recipes::for_critest()?).host_ports();
    let peer = match arguments.runtime.as_deref() {
        Some(runtime) => runtime,
        None if sandboxer.ends_with("crun") => "crun",
        None => "runc",
    };
    if !peer_only {
        options = options.sandboxer(&sandboxer, tools::hypervisor_of(&sandboxer).unwrap_or(peer));
    }
    let node = slot.insert(Node::start(options).await?);
    let (major, minor, patch) = node.containerd.version();
    println!("containerd {major}.{minor}.{patch}, critest {}", critest.display());

    std::fs::create_dir_all(&arguments.out).with_context(|| format!("create {}", arguments.out.display()))?;
    let critest = Critest {
        program: critest,
        socket: node.containerd.paths().socket.clone(),
        out: arguments.out.canonicalize()?,
        focus: arguments.focus.clone(),
        nri_socket: (arguments.nri || !tools::is_machine(&sandboxer)).then(|| node.containerd.paths().nri_socket.clone()),
    };
    let peer = suite(&critest, peer).await?;
    let behind = if peer_only {
        0
    } else {
        let ours = suite(&critest, &sandboxer).await?;
        report(&arguments, &peer, &ours)?
    };
    Ok(if behind == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn suite(critest: &Critest, handler: &str) -> Result<Run> {
    let minutes =
        if tools::is_machine(handler) { "up to fifteen minutes where machines are emulated" } else { "about three minutes" };
    println!("\n{handler}: running, {minutes}; log: {}/{handler}.log", critest.out.display());
    let run = critest.run(handler).await?;
    println!("{handler}: {}", run.closing.replace('\n', "\n    "));
    let (passed, failed, _) = run.counts();
    ensure!(passed + failed > 0, "critest ran no spec with {handler}: see {}/{handler}.log", critest.out.display());
    Ok(run)
}

/// Prints the comparison; returns how many specs are behind the peer, or listed as impossible when they are not.
fn report(arguments: &Arguments, peer: &Run, ours: &Run) -> Result<usize> {
    let impossible = if tools::is_machine(&ours.handler) { NOT_IN_MACHINES } else { &[] };
    let verdicts = compare(peer, ours, impossible);
    if let Some(path) = &arguments.results {
        write_results(path, &verdicts)?;
    }
    let (passed, failed, skipped) = peer.counts();
    println!("\n{:<20} {passed:>4} passed {failed:>3} failed {skipped:>3} skipped", peer.handler);
    let (passed, failed, skipped) = ours.counts();
    println!("{:<20} {passed:>4} passed {failed:>3} failed {skipped:>3} skipped", ours.handler);
    let mut behind = 0;
    for (name, verdict) in &verdicts {
        match verdict {
            Verdict::Behind(how) => {
                behind += 1;
                println!("  BEHIND {name}\n      {how}");
            }
            Verdict::Alike(how) if how.starts_with("fails") => println!("  alike  {name}\n      {how}"),
            Verdict::Impossible(why) => println!("  SKIP {name}: {why}"),
            Verdict::Alike(_) | Verdict::Passed => {}
        }
    }
    if behind == 0 {
        let but = if impossible.is_empty() { "" } else { ", but for what cannot be in a virtual machine" };
        println!("{}: every spec that the shim passes passes, none is skipped that it runs{but}", ours.handler);
    } else {
        println!("{}: {behind} specs behind the shim", ours.handler);
    }
    Ok(behind)
}
