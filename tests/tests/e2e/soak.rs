//! Many pods, one after the other: nothing may grow. And many at once.

use std::env;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use kuasar_tests::tools::{self, SmallMachine};
use kuasar_tests::{Container, ContainerSpec, Node, Pod, wait};
use tonic::{Code, Status};

use crate::suite::{Entry, Lone, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Ours Alone: two_hundred_pods, pods_at_once_and_a_killed_worker]
}

const PODS: usize = 200;
const AT_A_TIME: usize = 8;
/// By how much the memory of kuasard may be above that at the start.
const MEMORY_KIB: u64 = 2 << 10;
const SETTLE: Duration = Duration::from_secs(15);

/// Pods at once, and how many of them where each is a machine: those may have to be emulated, beside those of other cases.
const AT_ONCE: usize = 20;
const MACHINES_AT_ONCE: usize = 6;
/// Another number of those.
const MACHINES_VARIABLE: &str = "KUASAR_E2E_MACHINES";
/// How long it may take until one more pod is up.
const NEXT: Duration = Duration::from_secs(100);

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

fn at_once(lone: &Lone) -> Result<usize> {
    match env::var(MACHINES_VARIABLE) {
        _ if !tools::is_machine(&lone.handler) => Ok(AT_ONCE),
        Ok(number) => number.parse().with_context(|| format!("{MACHINES_VARIABLE}={number} is no number")),
        Err(_) => Ok(MACHINES_AT_ONCE),
    }
}

/// Runs a pod, counts it, and has it run something.
async fn up(node: &Node, lone: &Lone, machine: Option<&SmallMachine>, started: &AtomicUsize) -> Result<(Pod, Container)> {
    let mut spec = lone.pod();
    if let Some(machine) = machine {
        spec = spec.annotation("io.kuasar.vm.memory_mib", machine.memory_mib);
    }
    // Calls about a pod, of which one is in the making of each container, fail once when the worker dies, and kubelet repeats them. All
    // others are answered.
    let pod = repeated("a pod to run", || node.run_pod(spec.clone())).await?;
    let container = repeated("a container to be made", || pod.create(ContainerSpec::new("c").sleep())).await?;
    container.start().await?;
    started.fetch_add(1, Ordering::Relaxed);
    says(&container).await?;
    Ok((pod, container))
}

/// Makes a call again as long as the daemon is not there.
async fn repeated<T, F: Future<Output = Result<T, Status>>>(what: &str, call: impl Fn() -> F) -> Result<T> {
    wait::until(what, NEXT, || async {
        match call().await {
            Err(status) if status.code() == Code::Unavailable => Ok(None),
            done => Ok(Some(done?)),
        }
    })
    .await
}

async fn says(container: &Container) -> Result<()> {
    let said = container.sh("echo it runs; exit 3").await?;
    ensure!((said.exit_code, said.stdout().as_str()) == (3, "it runs\n"), "{} says {said:?}", container.id);
    Ok(())
}

async fn pods_at_once_and_a_killed_worker(lone: &Lone) -> Result<()> {
    let (count, handler) = (at_once(lone)?, lone.handler.clone());
    let machine = if tools::is_machine(&handler) { Some(tools::small_machine()?) } else { None };
    let kernel = machine.as_ref().map(|machine| machine.kernel.clone());
    let options = lone.options().patch_kuasard(move |config| {
        if let Some(kernel) = &kernel {
            config["sandboxer"][&handler]["kernel"] = kernel.to_string_lossy().into();
            // Many that boot at once on few processors are slow, not stuck.
            config["sandboxer"][&handler]["boot_limit_secs"] = NEXT.as_secs().into();
        }
    });
    let node = Node::start(options).await?;
    let before = lone.baseline(&node).await?;
    let kuasard = node.kuasard.as_ref().context("there is no kuasard")?;
    let started = AtomicUsize::new(0);
    let killing = async {
        // While none is up yet, when the first is, and when half of them are.
        for number in [0, 1, count / 2] {
            wait::until(&format!("{number} pods"), NEXT, || async {
                Ok((started.load(Ordering::Relaxed) >= number).then_some(()))
            })
            .await?;
            kuasard.kill_worker().await?;
        }
        Ok(())
    };
    let (pods, ()) = tokio::try_join!(try_join_all((0..count).map(|_| up(&node, lone, machine.as_ref(), &started))), killing)?;
    try_join_all(pods.iter().map(|(_, container)| says(container))).await?;
    try_join_all(pods.iter().map(|(pod, _)| pod.remove_all())).await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}
