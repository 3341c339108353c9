//! How fast bytes get out of a container: what it prints into its log, and files of a volume.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kuasar_tests::cri::Executed;
use kuasar_tests::screen::Screen;
use kuasar_tests::{ContainerSpec, Node, PodSpec, process, wait};

use super::{ON_NODE, Subject};
use crate::report::{Line, Report};
use crate::samples::Samples;

/// How long it may take until all that was printed is in the log.
const PATIENCE: Duration = Duration::from_secs(300);
const FIRST: &str = "the beginning";
const LAST: &str = "the end";

/// What is measured, in MB/s.
const KINDS: [&str; 3] = ["stdout into the log", "virtiofs, read", "virtiofs, write"];

pub(crate) async fn measure(subject: Subject<'_>, screen: &mut Screen, report: &mut Report) -> Result<()> {
    let Subject { node, kernels, amount } = subject;
    let dir = node.dir().join("run/transfer");
    fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    let kernel = kernels.first().context("there is no kernel")?;
    let mut samples: [[Samples; KINDS.len()]; 2] = Default::default();
    for round in 0..amount.transfer_rounds {
        for (side, handler) in [ON_NODE, &kernel.handler].into_iter().enumerate() {
            screen.status(&format!("transfers with {handler}, round {} of {}", round + 1, amount.transfer_rounds))?;
            let rates = rates(node, handler, &dir, amount.transfer_mib).await.with_context(|| format!("with {handler}"))?;
            for (kind, rate) in samples[side].iter_mut().zip(rates) {
                kind.push(rate);
            }
        }
    }
    let [peer, ours] = samples;
    for ((name, peer), ours) in KINDS.into_iter().zip(peer).zip(ours) {
        let (peer, ours) = (peer.median().context("no round")?, ours.median().context("no round")?);
        report.add(Line::new("more is better", name, "MB/s", ours).of(&kernel.label()).beside("node", peer));
    }
    Ok(())
}

async fn rates(node: &Node, handler: &str, dir: &Path, mib: usize) -> Result<[f64; KINDS.len()]> {
    let megabytes = (mib << 20) as f64 / 1e6;
    // New for each pod: no cache knows them, but the node's own.
    let (read, written) = (dir.join("read"), dir.join("written"));
    fs::write(&read, vec![b'x'; mib << 20]).with_context(|| format!("write {}", read.display()))?;
    let pod = node.run_pod(PodSpec::new("bench").handler(handler)).await?;
    // Lines are made before the clock runs, in the pod's own memory.
    let line = "x".repeat(99);
    let script = format!(
        "yes {line} | head -c {} > /dev/shm/lines; echo {FIRST}; cat /dev/shm/lines; echo {LAST}; exec sleep 100000",
        mib << 20
    );
    let container = pod.run(ContainerSpec::new("c").sh(&script).mount(dir, "/data", false)).await?;
    let log = container.log.clone().context("the container has no log")?;
    wait::until("the first line in the log", PATIENCE, || async {
        Ok(fs::metadata(&log).is_ok_and(|log| log.len() > 0).then_some(()))
    })
    .await?;
    let begun = Instant::now();
    wait::until("the last line in the log", PATIENCE, || async {
        Ok(process::tail_bytes(&log, 64)?.trim_end().ends_with(LAST).then_some(()))
    })
    .await?;
    let printed = begun.elapsed().as_secs_f64();

    let copy =
        |what: &str| format!("read a x < /proc/uptime; dd {what} bs=1M 2>/dev/null; read b x < /proc/uptime; echo $a $b");
    let read_seconds = between(&container.sh(&copy("if=/data/read of=/dev/null")).await?)?;
    let write = format!("if=/dev/zero of=/data/written count={mib} conv=fsync");
    let write_seconds = between(&container.sh(&copy(&write)).await?)?;
    ensure!(fs::metadata(&written).is_ok_and(|file| file.len() == (mib as u64) << 20), "the container has not written all");
    pod.remove_all().await?;
    for file in [&read, &written, &log] {
        fs::remove_file(file).with_context(|| format!("remove {}", file.display()))?;
    }
    Ok([printed, read_seconds, write_seconds].map(|seconds| megabytes / seconds))
}

/// Seconds between two times that a script has printed. A clock that counts hundredths shows no less than one.
pub(crate) fn between(ran: &Executed) -> Result<f64> {
    ensure!(ran.exit_code == 0, "the script exits with {}: {}", ran.exit_code, ran.stderr());
    let said = ran.stdout();
    let times: Vec<f64> = said.split_whitespace().map(str::parse).collect::<Result<_, _>>().with_context(|| said.clone())?;
    let [from, to] = times[..] else { anyhow::bail!("the script says {said:?}") };
    Ok((to - from).max(0.01))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        let ran = |out: &str, exit_code| Executed { exit_code, out: out.into(), err: Vec::new() };
        assert!((between(&ran("10.50 12.00\n", 0)).unwrap() - 1.5).abs() < 1e-9);
        assert!((between(&ran("10.50 10.50\n", 0)).unwrap() - 0.01).abs() < 1e-9);
        assert!(between(&ran("10.50\n", 0)).is_err() && between(&ran("1 2", 1)).is_err());
    }
}
