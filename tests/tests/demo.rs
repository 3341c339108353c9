//! The demo ends when it is told to, whatever it is doing, and leaves nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kuasar_tests::leak::census::{self, Owner};
use kuasar_tests::{require, scratch, tools, wait};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Removing everything, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// After how many lines it is told to end, and by what. What follows the line is under way then: making images (2), starting
/// the daemons (4), warming up (5), running the pod (8), creating containers (9, 10), counting (18), the next handler.
const CASES: [(usize, Signal); 9] = [
    (2, Signal::SIGINT),
    (4, Signal::SIGINT),
    (4, Signal::SIGTERM),
    (5, Signal::SIGINT),
    (8, Signal::SIGINT),
    (9, Signal::SIGHUP),
    (10, Signal::SIGTERM),
    (18, Signal::SIGINT),
    (21, Signal::SIGINT),
];

/// The demo as a terminal runs it: with what it starts in one process group, which Ctrl-C reaches as a whole.
struct Demo(Child);

impl Demo {
    fn start() -> Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kuasar-demo"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        Ok(Self(command.spawn().context("start the demo")?))
    }

    /// The scratch directory, once it has one: it holds a lock in it.
    fn dir(&self) -> Option<PathBuf> {
        let fds = fs::read_dir(format!("/proc/{}/fd", self.0.id())).ok()?;
        fds.flatten().filter_map(|fd| fs::read_link(fd.path()).ok()).find_map(|file| {
            let dir = file.parent()?;
            let is_scratch = file.ends_with("lock") && dir.file_name()?.to_str()?.starts_with("kuasar-");
            is_scratch.then(|| dir.to_path_buf())
        })
    }

    fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        killpg(Pid::from_raw(self.0.id().cast_signed()), signal).context("signal the demo")?;
        let mut status = None;
        wait::until_sync(PATIENCE, || {
            status = self.0.try_wait().ok().flatten();
            status.is_some()
        });
        status.with_context(|| format!("the demo does not end within {} s of {signal}", PATIENCE.as_secs()))
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // It has ended, unless the test has failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn interrupt(lines: usize, signal: Signal) -> Result<()> {
    let mut demo = Demo::start()?;
    let mut out = BufReader::new(demo.0.stdout.take().context("the demo has no stdout")?);
    let mut shown = String::new();
    for _ in 0..lines {
        ensure!(out.read_line(&mut shown)? > 0, "the demo ended by itself:\n{shown}");
    }
    let dir = demo.dir();
    let bridge = dir.as_ref().and_then(|dir| fs::read_to_string(dir.join("slot")).ok()).map(|slot| format!("kua{slot}"));
    // Its directory may come into being just now: then it is found when it is gone, or not at all.
    let status = demo.end(signal)?;
    let said = demo.0.stderr.take().map(std::io::read_to_string).transpose()?.unwrap_or_default();
    ensure!(status.code() == Some(128 + signal as i32), "it ended with {status} ({:?}): {said}", status.signal());
    ensure!(said == "interrupted: removing everything\n", "it said: {said}");
    if let Some(dir) = dir {
        nothing_left(&dir)?;
    }
    if let Some(bridge) = bridge {
        ensure!(!Path::new("/sys/class/net").join(&bridge).exists(), "the bridge {bridge} is left");
    }
    Ok(())
}

fn nothing_left(dir: &Path) -> Result<()> {
    let tag = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let owner = Owner { dir: dir.to_path_buf(), tag, ids: BTreeSet::new() };
    ensure!(!dir.exists(), "{} is left", dir.display());
    let processes = census::processes(&owner)?;
    ensure!(processes.is_empty(), "processes are left: {processes:?}");
    let mounts = census::mounts_below(dir, std::process::id().cast_signed())?;
    ensure!(mounts.is_empty(), "mounts are left: {mounts:?}");
    let cgroups = census::cgroups(&owner)?;
    ensure!(cgroups.is_empty(), "control groups are left: {cgroups:?}");
    Ok(())
}

#[test]
fn an_interrupted_demo_leaves_nothing() -> Result<()> {
    require!(tools::Containerd::find());
    require!(tools::ours("kuasard"));
    for (lines, signal) in CASES {
        interrupt(lines, signal).with_context(|| format!("with {signal} after line {lines}"))?;
    }
    Ok(())
}

#[test]
fn a_demo_that_is_killed_is_swept() -> Result<()> {
    require!(tools::Containerd::find());
    require!(tools::ours("kuasard"));
    let mut demo = Demo::start()?;
    let mut out = BufReader::new(demo.0.stdout.take().context("the demo has no stdout")?);
    let mut shown = String::new();
    // Until kuasard has pods.
    for _ in 0..18 {
        ensure!(out.read_line(&mut shown)? > 0, "the demo ended by itself:\n{shown}");
    }
    let dir = demo.dir().context("the demo has no directory")?;
    demo.0.kill()?;
    demo.0.wait()?;
    // The keeper starts another worker for each that is killed before it.
    scratch::sweep(false)?;
    // A test beside this one may be about to sweep the same.
    wait::until_sync(PATIENCE, || !dir.exists());
    nothing_left(&dir)
}

#[test]
fn a_demo_tells_what_it_shows_and_leaves_nothing() -> Result<()> {
    require!(tools::Containerd::find());
    require!(tools::ours("kuasard"));
    let run = Command::new(env!("CARGO_BIN_EXE_kuasar-demo")).stdin(Stdio::null()).output()?;
    let shown = String::from_utf8(run.stdout)?;
    ensure!(run.status.success(), "it ended with {}: {}", run.status, String::from_utf8_lossy(&run.stderr));
    for text in ["kuasar-runc pod.json", "the web server says: ok", "memory then", "removed everything"] {
        ensure!(shown.contains(text), "no {text:?} in:\n{shown}");
    }
    if tools::machine("qemu").is_ok() {
        ensure!(shown.contains("kuasar-qemu pod.json"), "no virtual machine in:\n{shown}");
    }
    ensure!(!shown.contains('\x1b'), "colours in a file:\n{shown}");
    let dir = shown.split_whitespace().find(|word| word.contains("/kuasar-")).context("it does not say where it runs")?;
    nothing_left(Path::new(dir))
}

#[test]
fn what_cannot_be_shown_is_refused_before_anything_is_built() -> Result<()> {
    let demo = |with: &str| Command::new("scripts/demo.sh").current_dir("..").env("WITH", with).output();
    for with in ["wasm", "qemu,wasm", "runc, wasm"] {
        let run = demo(with).context("run scripts/demo.sh")?;
        let said = String::from_utf8(run.stderr)?;
        ensure!(!run.status.success() && run.stdout.is_empty(), "{with:?} was accepted: {said}");
        for word in ["no sandboxer", "wasm", "kuasar-runc kuasar-crun kuasar-qemu are always shown"] {
            ensure!(said.contains(word), "no {word:?} for {with:?} in {said}");
        }
    }
    Ok(())
}
