//! What ends the daemon, under containers that print numbers: they run on, no line is lost, and how they end is known.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::SOON;
use kuasar_tests::cri::k8s_cri::v1::ContainerState;
use kuasar_tests::{Container, ContainerSpec, Pod, PodSpec, skip, wait};

use crate::suite::{Entry, Site, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![systemctl_restart, stop_and_start, the_keeper_is_killed, keeper_and_worker_are_killed]
}

/// Prints a number every 20 ms, and ends with 7 of SIGTERM.
const COUNTS: &str = "count 20 & trap 'exit 7' TERM; wait";
/// Ends by itself, as a Job that succeeds, when it is let.
const SUCCEEDS: &str = "while [ ! -e /tmp/end ]; do sleep 0.1; done";
/// The first systemd with FileDescriptorStorePreserve.
const PRESERVES: u32 = 254;
/// How many lines more it takes to say that a container goes on printing.
const LINES: usize = 50;

struct Running {
    pod: Pod,
    /// Print numbers, by a pipe and by a terminal.
    counters: Vec<Container>,
    job: Container,
    pids: Vec<i32>,
}

impl Running {
    async fn start(site: &mut Site) -> Result<Self> {
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

    /// After a disturbance: all is as it was, and ends as it should.
    async fn examine(&self, site: &Site) -> Result<()> {
        ensure!(self.now().await? == self.pids, "other processes than before");
        self.go_on(site).await?;
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

/// Runs what ends the daemon, and waits until another is there.
async fn disturb(site: &mut Site, script: &str) -> Result<()> {
    let running = Running::start(site).await?;
    let before = site.show("kuasard", "MainPID").await?;
    site.sh(script).await?;
    wait::until("another daemon", Duration::from_secs(60), || async {
        let main = site.show("kuasard", "MainPID").await?;
        let state = site.show("kuasard", "ActiveState").await?;
        Ok((main != before && main != "0" && state == "active").then_some(()))
    })
    .await?;
    running.examine(site).await
}

async fn systemctl_restart(site: &mut Site) -> Result<()> {
    disturb(site, "systemctl restart kuasard").await
}

async fn stop_and_start(site: &mut Site) -> Result<()> {
    let version = site.sh("systemctl --version | sed -n '1s/systemd \\([0-9]*\\).*/\\1/p'").await?;
    if version.parse::<u32>().with_context(|| format!("systemd's version is {version:?}"))? < PRESERVES {
        skip::record("restarts::stop_and_start", &format!("systemd {version} closes the descriptors it stores at a stop"));
        return Ok(());
    }
    disturb(site, "systemctl stop kuasard && systemctl start kuasard").await
}

async fn the_keeper_is_killed(site: &mut Site) -> Result<()> {
    disturb(site, "kill -9 $(systemctl show --value -p MainPID kuasard)").await
}

async fn keeper_and_worker_are_killed(site: &mut Site) -> Result<()> {
    // Containers are the keeper's children as well.
    disturb(site, "keeper=$(systemctl show --value -p MainPID kuasard); kill -9 $keeper $(pgrep -x -P $keeper kuasard)").await
}
