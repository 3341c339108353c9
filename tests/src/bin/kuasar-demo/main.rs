//! What Kuasar does, shown: the same pod of two containers by containerd's runc shim and by each sandboxer, on a private
//! containerd in a scratch directory, with images made on the spot. Nothing stays, whatever ends it.

mod pod;
mod table;

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use kuasar_tests::scratch::Storage;
use kuasar_tests::screen::{Screen, Style};
use kuasar_tests::{Node, NodeOptions, process, program, tools};

use pod::Handler;

/// Columns of a line, of which the last few are for a time.
const WIDTH: usize = 80;

/// Runs a pod of two containers by containerd's runc shim and by kuasard, and shows what each costs.
#[derive(Parser)]
#[command(version)]
struct Arguments {}

fn main() -> ExitCode {
    Arguments::parse();
    program::start(run)
}

async fn run(slot: &mut Option<Node>) -> Result<ExitCode> {
    let mut screen = Screen::new();
    let mut handlers = vec![Handler::SHIM, Handler::OURS];
    let mut options = NodeOptions::new("demo").quiet().storage(Storage::Memory).sandboxer(Handler::OURS.name, "runc");
    let mut versions = format!("runc {}", version(&tools::runc()?)?);
    if let Ok(crun) = tools::crun() {
        handlers.push(Handler::OURS_CRUN);
        options = options.sandboxer(Handler::OURS_CRUN.name, "crun");
        versions = format!("{versions}, crun {}", version(&crun)?);
    }
    match tools::machine("qemu") {
        Ok(()) => {
            handlers.push(Handler::OURS_QEMU);
            options = options.sandboxer(Handler::OURS_QEMU.name, "qemu");
        }
        Err(missing) => screen.line(&format!("without kuasar-qemu: {missing}"))?,
    }
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's version")?;
    screen.line(&screen.paint(Style::Bold, "Kuasar: one pod, run by containerd's runc shim and by kuasard"))?;
    screen.line(&screen.paint(Style::Dim, &format!("Linux {}, {versions}", kernel.trim())))?;
    screen.line("")?;

    let begun = Instant::now();
    screen.status("making images from this machine's busybox")?;
    let images = pod::images()?;
    done(&mut screen, "made two images: a web server, and a client for it", begun)?;

    let begun = Instant::now();
    screen.status("starting a private containerd and kuasard")?;
    // What is timed shall not be the writing of a debug log.
    options = options.images(images).patch_kuasard(|config| config["log"]["level"] = "info".into());
    let node = &*slot.insert(Node::start(options).await?);
    let (major, minor, patch) = node.containerd.version();
    let what = format!("started containerd {major}.{minor}.{patch} and kuasard in {}", node.dir().display());
    done(&mut screen, &what, begun)?;

    let begun = Instant::now();
    for handler in &handlers {
        screen.status(&format!("warming up {}", handler.name))?;
        pod::warm_up(node, handler).await.with_context(|| format!("warm up {}", handler.name))?;
    }
    done(&mut screen, "warmed up: a pod each, not counted", begun)?;

    let mut results = Vec::new();
    for handler in &handlers {
        let shown = pod::show(node, handler, &mut screen).await;
        results.push(shown.with_context(|| format!("run a pod with {}", handler.name))?);
    }

    screen.line("")?;
    let begun = Instant::now();
    screen.status("removing everything")?;
    if let Some(node) = slot.take() {
        node.stop().await?;
    }
    done(&mut screen, "removed everything", begun)?;
    table::print(&results, &mut screen)?;
    where_to_go(&mut screen)?;
    Ok(ExitCode::SUCCESS)
}

/// A step that is done, and how long it took.
fn done(screen: &mut Screen, what: &str, begun: Instant) -> Result<()> {
    let time = format!("{:.1} s", begun.elapsed().as_secs_f64());
    let room = WIDTH.saturating_sub(2);
    let pad = room.saturating_sub(what.chars().count());
    let tick = screen.paint(Style::Green, "✓");
    screen.line(&format!("{tick} {what}{}", screen.paint(Style::Dim, &format!("{time:>pad$}"))))
}

fn where_to_go(screen: &mut Screen) -> Result<()> {
    screen.line("")?;
    screen.line(&screen.paint(Style::Bold, "Next"))?;
    for (command, what) in [
        ("make test", "checks, end-to-end tests, CRI conformance beside the runc shim"),
        ("make bench", "these figures thoroughly: medians, p95, 50 pods, throughput"),
        ("make install", "then `kuasarctl check` and `kuasarctl containerd-config`"),
        ("README.md", "RuntimeClass, crictl session, what works and what does not yet"),
    ] {
        screen.line(&format!("  {}{what}", screen.paint(Style::Cyan, &format!("{command:<14}"))))?;
    }
    Ok(())
}

/// The last word of the first line that `--version` prints.
fn version(program: &Path) -> Result<String> {
    let text = process::run(Command::new(program).arg("--version"))?;
    let word = text.lines().next().and_then(|line| line.split(' ').next_back());
    Ok(word.with_context(|| format!("{} prints no version", program.display()))?.to_owned())
}
