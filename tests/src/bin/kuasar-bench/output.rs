//! How fast what a container prints gets into its log.
//!
//! The container copies a prepared file of lines to its standard output, so that nothing but the way to the log takes time.
//! The clock runs from the moment it is let go until the last line is in the log, on tmpfs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kuasar_tests::screen::Screen;
use kuasar_tests::{ContainerSpec, Node, process, wait};
use nix::sys::stat::Mode;

use crate::plan::{Network, Plan, Side, Sides, pod};
use crate::report::{Line, Report, SHIM};
use crate::samples::Samples;

/// As long as a line of a log often is.
const LINE: usize = 100;
const LAST: &str = "the end";
/// How long all that was printed may take to be in the log.
const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) async fn measure(node: &Node, sides: &Sides, plan: &Plan, screen: &mut Screen, report: &mut Report) -> Result<()> {
    let dir = node.dir().join("run/output");
    prepare(&dir, plan).with_context(|| format!("prepare {}", dir.display()))?;
    let mut table: BTreeMap<usize, Samples> = BTreeMap::new();
    for round in 0..plan.output_rounds {
        for index in sides.order(round, sides.asked_for().map(|(index, _)| index)) {
            let side = &sides.all()[index];
            screen.status(&format!("output with {}, round {} of {}", side.handler, round + 1, plan.output_rounds))?;
            let rate = rate(node, side, &dir, plan).await.with_context(|| format!("with {}", side.handler))?;
            table.entry(index).or_default().push(rate);
        }
    }
    for (index, side) in sides.ours() {
        let figure = |index: usize| table.get(&index).and_then(Samples::median);
        let (Some(peer), Some(ours)) = (figure(0), figure(index)) else { continue };
        report.compare(side, Line::new("stdout into the log", "more is better", "MB/s", ours).beside(SHIM, peer));
    }
    Ok(())
}

fn prepare(dir: &Path, plan: &Plan) -> Result<()> {
    fs::create_dir(dir)?;
    let line = format!("{}\n", "x".repeat(LINE - 1));
    fs::write(dir.join("lines"), line.repeat((plan.output_mib << 20) / LINE))?;
    nix::unistd::mkfifo(&dir.join("go"), Mode::S_IRUSR | Mode::S_IWUSR)?;
    Ok(())
}

async fn rate(node: &Node, side: &Side, dir: &Path, plan: &Plan) -> Result<f64> {
    let mut spec = pod(side, Network::Host);
    spec.config.log_directory = dir.join("logs").display().to_string();
    let pod = node.run_pod(spec).await?;
    let script = format!("read line < /output/go; cat /output/lines; echo {LAST}");
    let container = pod.run(ContainerSpec::new("writer").sh(&script).mount(dir, "/output", true)).await?;
    let log = container.log.clone().context("the container has no log")?;
    // Opened for reading, too: that never waits for the other end.
    let mut go = fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(dir.join("go"))?;
    let begun = Instant::now();
    go.write_all(b"go\n")?;
    wait::until("the last line in the log", PATIENCE, || async {
        Ok(process::tail_bytes(&log, 64)?.trim_end().ends_with(LAST).then_some(()))
    })
    .await?;
    let rate = ((plan.output_mib << 20) as f64) / 1e6 / begun.elapsed().as_secs_f64();
    // While containerd takes note of an exit, a pod can be stopped and yet not be removed.
    container.wait_exit().await?;
    pod.remove_all().await?;
    fs::remove_file(&log).with_context(|| format!("remove {}", log.display()))?;
    Ok(rate)
}
