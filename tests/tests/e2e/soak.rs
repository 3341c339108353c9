//! Many pods, one after the other: nothing may grow.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use kuasar_tests::{ContainerSpec, Node, wait};

use crate::suite::{Entry, Lone, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Ours Alone: two_hundred_pods]
}

const PODS: usize = 200;
const AT_A_TIME: usize = 8;
/// By how much the memory of kuasard may be above that at the start.
const MEMORY_KIB: u64 = 2 << 10;
const SETTLE: Duration = Duration::from_secs(15);

/// All that some processes hold in memory. Not the proportional share: a case beside this one may begin or cease to run the
/// same program, which would change the share of its pages.
fn resident_kib(pids: &[i32]) -> Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        sum += kib.with_context(|| format!("no Rss in {path}"))?;
    }
    Ok(sum)
}

async fn pods(node: &Node, lone: &Lone, count: usize) -> Result<()> {
    stream::iter((0..count).map(|_| async {
        let pod = node.run_pod(lone.pod().quick()).await?;
        let container = pod.run(ContainerSpec::new("c").sleep().log_path("")).await?;
        ensure!(container.pid().await? > 0);
        pod.remove_all().await?;
        Ok(())
    }))
    .buffer_unordered(AT_A_TIME)
    .try_collect()
    .await
}

async fn two_hundred_pods(lone: &Lone) -> Result<()> {
    let node = Node::start(lone.options().quiet()).await?;
    // What is made once is made now: as many pods at once as there will be.
    pods(&node, lone, 2 * AT_A_TIME).await?;
    let memory = || resident_kib(&node.management_pids(&lone.handler)?);
    // Threads that have nothing to do end within seconds; until then the start looks larger than it is.
    let mut before = (node.snapshot()?, memory()?);
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = (node.snapshot()?, memory()?);
        if now.0.threads <= before.0.threads && now.1 <= before.1 {
            before = now;
        }
    }
    let (snapshot, kib) = before;
    pods(&node, lone, PODS).await?;
    node.assert_no_leak(&snapshot).await?;
    let grown = || {
        let (now, kib_now) = (node.snapshot()?, memory()?);
        let mut grown = Vec::new();
        if now.fds > snapshot.fds {
            grown.push(format!("{} descriptors where {} were", now.fds, snapshot.fds));
        }
        if now.threads > snapshot.threads {
            grown.push(format!("{} threads where {} were", now.threads, snapshot.threads));
        }
        if kib_now > kib + MEMORY_KIB {
            grown.push(format!("{kib_now} KiB where {kib} KiB were"));
        }
        Ok::<_, anyhow::Error>(grown)
    };
    let settled =
        wait::until("kuasard to be as small as before", SETTLE, || async { Ok(grown()?.is_empty().then_some(())) }).await;
    settled.with_context(|| format!("{:?}", grown()))?;
    node.stop().await
}
