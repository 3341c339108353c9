//! Who kills: at random moments, one thing after the other, each time until all is back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kuasar_sandboxers::failpoint;
use kuasar_tests::cri::SOON;
use kuasar_tests::kuasard::{Killed, Kuasard};
use kuasar_tests::signals::{self, OfWorker};
use kuasar_tests::{Node, wait};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Resource, Rlimit, prlimit};
use tokio::time::sleep;

use crate::ledger::{Call, Disturbance, Promise};
use crate::load;
use crate::rng::Rng;
use crate::standing::Stand;
use crate::world::World;

/// How often each is chosen. containerd comes in between, every [`CONTAINERD_EVERY`] kills of the worker.
const WEIGHTS: [(Disturbance, u64); 8] = [
    (Disturbance::Worker, 64),
    (Disturbance::Failpoint, 16),
    (Disturbance::Runtime, 6),
    (Disturbance::Init, 6),
    (Disturbance::Stop, 2),
    (Disturbance::Signal, 12),
    (Disturbance::Disk, 3),
    (Disturbance::Descriptors, 3),
];
pub(crate) const CONTAINERD_EVERY: usize = 10;
/// How long to wait for an OCI runtime to be at work, or for the worker to come past a failpoint.
const CHANCE: Duration = Duration::from_secs(2);
/// Blocks that the disk is filled with, the last by the smallest.
const BLOCKS: [u64; 3] = [1 << 20, 64 << 10, 4 << 10];

/// Kills, and knows what of.
pub(crate) struct Saboteur<'a> {
    pub(crate) node: &'a mut Node,
    pub(crate) world: &'a Arc<World>,
    pub(crate) stand: &'a Stand,
    pub(crate) rng: Rng,
    /// Under which name times until serving are noted.
    pub(crate) phase: &'static str,
}

impl Saboteur<'_> {
    fn kuasard(&mut self) -> Result<&mut Kuasard> {
        self.node.kuasard.as_mut().context("the node has no kuasard")
    }

    /// Waits for a random moment: mostly within a second and a half, at times at once.
    async fn moment(&mut self) {
        let most = if self.rng.one_in(5) { 100 } else { 1500 };
        sleep(self.rng.millis(0, most)).await;
    }

    /// Does the next thing.
    pub(crate) async fn strike(&mut self) -> Result<()> {
        self.moment().await;
        let ledger = &self.world.ledger;
        let is_due = ledger.disturbed(Disturbance::kills_worker)
            >= CONTAINERD_EVERY * (ledger.disturbed(Disturbance::kills_containerd) + 1);
        let what = match is_due {
            true if self.rng.one_in(3) => Disturbance::Both,
            true => Disturbance::Containerd,
            false => self.rng.weighted(&WEIGHTS).unwrap_or(Disturbance::Worker),
        };
        match what {
            Disturbance::Worker => self.worker().await,
            Disturbance::Failpoint => self.failpoint().await,
            Disturbance::Containerd | Disturbance::Both => self.containerd(what).await,
            Disturbance::Runtime => self.runtime(9).await,
            Disturbance::Init => self.init().await,
            Disturbance::Stop => self.stop().await,
            Disturbance::Signal => self.signal().await,
            Disturbance::Disk => self.disk().await,
            Disturbance::Descriptors => self.descriptors().await,
            Disturbance::Upgrade => self.upgrade().await,
            Disturbance::Keeper => self.keeper().await,
            Disturbance::Volume | Disturbance::Guests => bail!("it has a part of its own"),
        }
        .with_context(|| format!("after: {}", what.name()))
    }

    /// An upgrade at a random moment; how long it took is noted.
    pub(crate) async fn upgrade_sometime(&mut self) -> Result<()> {
        self.moment().await;
        self.upgrade().await
    }

    async fn upgrade(&mut self) -> Result<()> {
        let window = self.world.ledger.begin(Disturbance::Upgrade, "");
        let begun = Instant::now();
        let output = self.kuasard()?.upgrade(None).await?;
        ensure!(output.status.success(), "kuasarctl upgrade: {}", String::from_utf8_lossy(&output.stderr));
        self.world.ledger.end(window);
        self.world.ledger.served(self.phase, begun.elapsed());
        Ok(())
    }

    /// kill -9 of the worker, at a random moment.
    pub(crate) async fn worker_sometime(&mut self) -> Result<()> {
        self.moment().await;
        self.worker().await
    }

    /// kill -9 of the worker; how long until the next one served is noted.
    async fn worker(&mut self) -> Result<()> {
        let window = self.world.ledger.begin(Disturbance::Worker, "");
        let killed = self.kuasard()?.kill_worker().await?;
        let after = self.kuasard()?.wait_serving(killed).await?;
        self.world.ledger.end(window);
        self.world.ledger.served(self.phase, after);
        Ok(())
    }

    /// kill -9 of the worker beside something else, if that is wanted.
    async fn worker_beside(&mut self, wanted: bool) -> Result<Option<(usize, Killed)>> {
        if !wanted {
            return Ok(None);
        }
        let window = self.world.ledger.begin(Disturbance::Worker, "as well");
        Ok(Some((window, self.kuasard()?.kill_worker().await?)))
    }

    async fn worker_is_back(&mut self, killed: Option<(usize, Killed)>) -> Result<()> {
        if let Some((window, killed)) = killed {
            self.kuasard()?.wait_serving(killed).await?;
            self.world.ledger.end(window);
        }
        Ok(())
    }

    async fn failpoint(&mut self) -> Result<()> {
        let Some(name) = self.rng.pick(failpoint::ALL).copied() else { return Ok(()) };
        let file = self.node.failpoints().join(name);
        let pid = self.kuasard()?.worker_pid().await?;
        let window = self.world.ledger.begin(Disturbance::Failpoint, name);
        fs::write(&file, "").with_context(|| format!("write {}", file.display()))?;
        let end = Instant::now() + CHANCE;
        while file.exists() && Instant::now() < end {
            sleep(Duration::from_millis(2)).await;
        }
        // Which of the two is faster says whether it was reached.
        if fs::remove_file(&file).is_ok() {
            self.world.ledger.cancel(window);
            return Ok(());
        }
        self.kuasard()?.wait_serving(Killed { pid, at: Instant::now() }).await?;
        self.world.ledger.end(window);
        Ok(())
    }

    async fn containerd(&mut self, what: Disturbance) -> Result<()> {
        let window = self.world.ledger.begin(what, "");
        self.world.containerd_is(false);
        self.node.containerd.kill()?;
        self.stand.containerd_is_dead()?;
        if what.kills_worker() {
            let killed = self.kuasard()?.kill_worker().await?;
            self.kuasard()?.wait_serving(killed).await?;
        }
        self.node.containerd.start().await?;
        self.world.containerd_is(true);
        self.world.ledger.end(window);
        Ok(())
    }

    /// The whole daemon and containerd, with nothing under way.
    pub(crate) async fn keeper(&mut self) -> Result<()> {
        let window = self.world.ledger.begin(Disturbance::Keeper, "");
        self.world.containerd_is(false);
        // First, because it would save at once that the containers have ended.
        self.node.containerd.kill()?;
        self.stand.containerd_is_dead()?;
        self.kuasard()?.kill()?;
        self.kuasard()?.start().await?;
        self.node.containerd.start().await?;
        self.world.containerd_is(true);
        self.world.ledger.end(window);
        Ok(())
    }

    async fn runtime(&mut self, number: i32) -> Result<()> {
        let end = Instant::now() + CHANCE;
        loop {
            if let Some((pid, operation)) = runtime_at_work(self.node.dir())? {
                let window = self.world.ledger.begin(Disturbance::Runtime, &format!("signal {number}: {operation}"));
                signals::send(pid, number)?;
                self.world.ledger.end(window);
                return Ok(());
            }
            if Instant::now() > end {
                return Ok(());
            }
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// Any signal: to an exec or a container of its own, to an OCI runtime at work, to the worker.
    async fn signal(&mut self) -> Result<()> {
        let number = self.rng.pick(&Vec::from_iter(signals::ALL)).copied().unwrap_or(1);
        match self.rng.below(4) {
            0 => self.signal_exec(number).await,
            1 => self.signal_container(number).await,
            2 => self.runtime(number).await,
            _ => self.signal_worker(number).await,
        }
    }

    async fn signal_exec(&mut self, number: i32) -> Result<()> {
        let Some(standing) = self.rng.pick(&self.stand.containers) else { return Ok(()) };
        let window = self.world.ledger.begin(Disturbance::Signal, &format!("{number} to an exec"));
        let ran = self
            .world
            .once(Call::ExecSync, "what sends itself a signal", standing.container.sh(&signals::script(number)))
            .await;
        let codes = signals::codes(number);
        if let Ok(ran) = ran
            && !codes.contains(&ran.exit_code)
        {
            let text = format!("an exec that sent itself signal {number}: {}, not one of {codes:?}", ran.exit_code);
            self.world.ledger.broke(Promise::True, 1, &text);
        }
        self.world.ledger.end(window);
        Ok(())
    }

    async fn signal_container(&mut self, number: i32) -> Result<()> {
        // Where it is not process 1, which could not send it to itself.
        let pods: Vec<_> = self.stand.shared_pid().collect();
        let (Some(pod), &[code]) = (self.rng.pick(&pods), &signals::codes(number)[..]) else { return Ok(()) };
        let window = self.world.ledger.begin(Disturbance::Signal, &format!("{number} to a container"));
        let begun = Instant::now();
        if let Ok(container) = self.world.run_container(pod, |spec| spec.sh(&signals::script(number))).await {
            // Whoever gives up has said why.
            let _ = load::exits_with(self.world, &container, code, begun).await;
            let _ = self.world.remove_container(&container, 0).await;
        }
        self.world.ledger.end(window);
        Ok(())
    }

    async fn signal_worker(&mut self, number: i32) -> Result<()> {
        let pid = self.kuasard()?.worker_pid().await?;
        let does = signals::of_worker(number);
        let what = if does == OfWorker::Ends { Disturbance::Worker } else { Disturbance::Signal };
        let window = self.world.ledger.begin(what, &format!("{number} to the worker"));
        let killed = Killed { pid, at: Instant::now() };
        signals::send_worker(pid, number)?;
        match does {
            OfWorker::Ends | OfWorker::Leaves => {
                let after = self.kuasard()?.wait_serving(killed).await?;
                if does == OfWorker::Ends {
                    self.world.ledger.served(self.phase, after);
                }
            }
            OfWorker::IsContinued => is_continued(pid).await?,
            OfWorker::GoesOn => {
                let now = self.kuasard()?.worker_pid().await?;
                ensure!(now == pid, "signal {number} has ended the worker {pid}, now it is {now}");
            }
        }
        self.world.ledger.end(window);
        Ok(())
    }

    /// A container of its own, whose init is killed; half of the time while there is no worker.
    async fn init(&mut self) -> Result<()> {
        let Some(pod) = self.rng.pick(&self.stand.pods) else { return Ok(()) };
        let begun = Instant::now();
        let Ok(container) = self.world.run_container(pod, |spec| spec.sleep()).await else { return Ok(()) };
        let pid = container.pid().await?;
        let with_worker = self.rng.one_in(2);
        let window = self.world.ledger.begin(Disturbance::Init, &container.id);
        let killed = self.worker_beside(with_worker).await?;
        signal(pid, Signal::SIGKILL)?;
        self.worker_is_back(killed).await?;
        // Whoever gives up has said why.
        let _ = load::exits_with(self.world, &container, 137, begun).await;
        self.world.ledger.end(window);
        let _ = self.world.remove_container(&container, 0).await;
        Ok(())
    }

    /// Both processes, or each would continue the other.
    async fn stop(&mut self) -> Result<()> {
        let pid = self.kuasard()?.worker_pid().await?;
        let keeper = self.kuasard()?.pid().context("kuasard is not running")?;
        let time = self.rng.millis(1000, 4000);
        let window = self.world.ledger.begin(Disturbance::Stop, &format!("for {} ms", time.as_millis()));
        signal(keeper, Signal::SIGSTOP)?;
        signal(pid, Signal::SIGSTOP)?;
        sleep(time).await;
        signal(keeper, Signal::SIGCONT)?;
        is_continued(pid).await?;
        self.world.ledger.end(window);
        Ok(())
    }

    async fn disk(&mut self) -> Result<()> {
        let path = self.kuasard()?.state().join("filler");
        let time = self.rng.millis(200, 800);
        let with_worker = self.rng.one_in(3);
        let window =
            self.world.ledger.begin(Disturbance::Disk, &format!("for {} ms, worker killed: {with_worker}", time.as_millis()));
        fill(&path)?;
        let killed = self.worker_beside(with_worker).await?;
        sleep(time).await;
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        self.worker_is_back(killed).await?;
        self.world.ledger.end(window);
        Ok(())
    }

    /// The worker's or the keeper's.
    async fn descriptors(&mut self) -> Result<()> {
        let (worker, keeper) = (self.kuasard()?.worker_pid().await?, self.kuasard()?.pid().context("kuasard is not running")?);
        let pid = if self.rng.one_in(2) { worker } else { keeper };
        let open =
            fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("list the descriptors of {pid}"))?.count() as u64;
        let time = self.rng.millis(100, 500);
        let window = self.world.ledger.begin(Disturbance::Descriptors, &format!("{open} of {pid} for {} ms", time.as_millis()));
        let of = rustix::process::Pid::from_raw(pid);
        let limit = |limit: Rlimit| prlimit(of, Resource::Nofile, limit).context("limit the descriptors");
        let before = limit(Rlimit { current: Some(open), maximum: maximum(pid)? })?;
        sleep(time).await;
        limit(before)?;
        self.world.ledger.end(window);
        Ok(())
    }
}

/// Waits until somebody of ours has continued a process.
async fn is_continued(pid: i32) -> Result<()> {
    wait::until(&format!("process {pid} to be continued"), SOON, || async { Ok((!signals::is_stopped(pid)).then_some(())) })
        .await
}

/// The hard limit of a process's descriptors, as /proc tells it.
fn maximum(pid: i32) -> Result<Option<u64>> {
    let path = format!("/proc/{pid}/limits");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"));
    let word = line.and_then(|line| line.split_whitespace().nth(1)).with_context(|| format!("no limit in {path}"))?;
    Ok(word.parse().ok())
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    match kill(Pid::from_raw(pid), signal) {
        // It was faster.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("send {signal} to {pid}")),
    }
}

/// An OCI runtime that works for the node, and what at.
fn runtime_at_work(dir: &Path) -> Result<Option<(i32, String)>> {
    for entry in fs::read_dir("/proc").context("list /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Gone by now, with the process.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<String> = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let is_runtime = words.first().is_some_and(|program| program.ends_with("runc") || program.ends_with("crun"));
        let root = words.iter().position(|word| word == "--root").and_then(|at| words.get(at + 1));
        if is_runtime && root.is_some_and(|root| Path::new(root).starts_with(dir)) {
            return Ok(Some((pid, words[1..].join(" "))));
        }
    }
    Ok(None)
}

/// Takes all the space there is.
fn fill(path: &PathBuf) -> Result<()> {
    let file = fs::File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut size = 0;
    for block in BLOCKS {
        loop {
            match fallocate(&file, FallocateFlags::empty(), size, block) {
                Ok(()) => size += block,
                Err(rustix::io::Errno::NOSPC) => break,
                Err(errno) => return Err(errno).with_context(|| format!("fill {}", path.display())),
            }
        }
    }
    Ok(())
}
