//! Containers that print numbers, and probes, which a disturbance must leave alone.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::ContainerState;
use kuasar_tests::{Container, ContainerSpec, Pod, PodSpec, wait};

use crate::suite::{SOON, Site};

/// Prints a number every 20 ms, and ends with 7 of SIGTERM.
const COUNTS: &str = "count 20 & trap 'exit 7' TERM; wait";
/// Ends by itself, as a Job that succeeds, when it is let.
const SUCCEEDS: &str = "while [ ! -e /tmp/end ]; do sleep 0.1; done";
/// How many lines more it takes to say that a container goes on printing.
const LINES: usize = 50;

/// A pod of them.
pub(crate) struct Running {
    pod: Pod,
    /// Print numbers, by a pipe and by a terminal.
    counters: Vec<Container>,
    job: Container,
    pids: Vec<i32>,
}

impl Running {
    /// Starts them, and waits until each has printed something.
    pub(crate) async fn start(site: &mut Site) -> Result<Self> {
        let pod = site.pod(PodSpec::new("pod"), &[]).await?;
        let counters = vec![
            pod.run(ContainerSpec::new("pipe").sh(COUNTS)).await?,
            pod.run(ContainerSpec::new("tty").tty().sh(COUNTS)).await?,
        ];
        let job = pod.run(ContainerSpec::new("job").sh(SUCCEEDS)).await?;
        let mut running = Self { pod, counters, job, pids: Vec::new() };
        running.pids = running.now().await?;
        running.go_on(site).await.context("before")?;
        Ok(running)
    }

    async fn now(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        for container in self.counters.iter().chain([&self.job]) {
            let state = container.state().await?;
            ensure!(state == ContainerState::ContainerRunning, "{} is {}", container.id, state.as_str_name());
            pids.push(container.pid().await?);
        }
        Ok(pids)
    }

    /// Waits until each has printed more.
    async fn go_on(&self, site: &Site) -> Result<()> {
        for container in &self.counters {
            let before = site.log(container).await?.len();
            wait::until(&format!("more lines of {}", container.id), SOON, || async {
                Ok((site.log(container).await?.len() >= before + LINES).then_some(()))
            })
            .await?;
        }
        Ok(())
    }

    /// The container that waits until it is let succeed.
    pub(crate) fn job(&self) -> &Container {
        &self.job
    }

    /// After a disturbance: all run on as the processes they were, and print.
    pub(crate) async fn run_on(&self, site: &Site) -> Result<()> {
        ensure!(self.now().await? == self.pids, "other processes than before");
        self.go_on(site).await
    }

    /// In the end: all is as it was, and ends as it should.
    pub(crate) async fn examine(&self, site: &Site) -> Result<()> {
        self.run_on(site).await?;
        for container in self.counters.iter().chain([&self.job]) {
            let ran = container.exec(["echo", "ok"]).await?;
            ensure!((ran.exit_code, ran.stdout().as_str()) == (0, "ok\n"), "exec: {ran:?}");
        }
        ensure!(!self.pod.ip().await?.is_empty(), "the pod has lost its address");
        let mut ends = Vec::new();
        for container in &self.counters {
            container.stop(20).await?;
            ends.push((7, container.wait_exit().await?.exit_code));
            self.is_whole(site, container).await?;
        }
        self.job.exec(["touch", "/tmp/end"]).await?;
        ends.push((0, self.job.wait_exit().await?.exit_code));
        ensure!(ends.iter().all(|(expected, told)| expected == told), "exit codes (expected, told): {ends:?}");
        Ok(())
    }

    async fn is_whole(&self, site: &Site, container: &Container) -> Result<()> {
        let log = site.log(container).await?;
        for (index, line) in log.iter().enumerate() {
            let number = line.text.trim().parse::<usize>().ok();
            ensure!(number == Some(index + 1), "line {} of {} is {:?}", index + 1, log.len(), line.text);
        }
        Ok(())
    }
}

/// How often a probe is run: as often as kubelet can.
const PROBE: Duration = Duration::from_secs(1);

/// Runs an exec in a container each second, until something is done and once more after it. Each must succeed, and run once.
pub(crate) async fn probed<T>(container: &Container, during: impl Future<Output = Result<T>>) -> Result<T> {
    probed_seeing(container, during, &[0]).await
}

/// The same, where an exec's end may not be seen: its exit code is one of these.
pub(crate) async fn probed_seeing<T>(
    container: &Container,
    during: impl Future<Output = Result<T>>,
    codes: &[i32],
) -> Result<T> {
    container.exec(["rm", "-f", "/tmp/probes"]).await?;
    let mut number = 0;
    let mut probe = async || {
        number += 1;
        let ran = container.sh(&format!("echo {number} >>/tmp/probes; echo {number}")).await;
        let ran = ran.with_context(|| format!("probe {number}"))?;
        ensure!(codes.contains(&ran.exit_code) && ran.stdout() == format!("{number}\n"), "probe {number}: {ran:?}");
        Ok(())
    };
    let mut ticks = tokio::time::interval(PROBE);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut during = std::pin::pin!(during);
    let done = loop {
        tokio::select! {
            done = &mut during => break done?,
            _ = ticks.tick() => {
                // What is done meanwhile goes on.
                let mut probe = std::pin::pin!(probe());
                tokio::select! {
                    probed = &mut probe => probed?,
                    done = &mut during => {
                        probe.await?;
                        break done?;
                    }
                }
            }
        }
    };
    probe().await?;
    let seen = container.exec(["cat", "/tmp/probes"]).await?.stdout();
    let numbers: Vec<_> = seen.lines().map(str::to_owned).collect();
    ensure!(numbers == (1..=number).map(|number| number.to_string()).collect::<Vec<_>>(), "of {number} probes ran {numbers:?}");
    Ok(done)
}
