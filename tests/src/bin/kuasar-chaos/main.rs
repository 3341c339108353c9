//! The chaos suite: everything is killed, at random, under load, and nobody notices.
//!
//! ```text
//!   Node ─┬─ stand      containers that count, from beginning to end     ┐
//!         ├─ load       clients: pods, containers, execs, stats          ├─▶ Ledger ─▶ table, chaos.json
//!         └─ saboteur   kill -9, SIGSTOP, disk full, no descriptors      ┘   (broken promises)
//! ```
//!
//! In five parts: the *storm* disturbs everything; *serving* kills only the worker, with many pods, for the time until it serves
//! again; *upgrades* replaces the daemon, of which no call may fail; *hung* has a volume and virtual machines' guests that do not answer,
//! which other pods must not notice; *keeper* kills the whole daemon together with containerd. Then all is removed, and nothing may be left.
//!
//! Invariants: every call has a deadline; a call that fails is excused by a disturbance that it saw, or breaks a promise
//! ([`ledger`]); one disturbance begins when the one before is over; a seed gives the same disturbances in the same order,
//! though not at the same step of what they meet.

mod guests;
mod hung;
mod latencies;
mod ledger;
mod load;
mod plan;
mod report;
mod rng;
mod saboteur;
mod standing;
mod volume;
mod world;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use futures::future::try_join_all;
use kuasar_tests::leak::Snapshot;
use kuasar_tests::scratch::Storage;
use kuasar_tests::screen::{Screen, Style};
use kuasar_tests::{ContainerSpec, Node, NodeOptions, Pod, PodSpec, program, tools};
use tokio::task::JoinSet;

use ledger::{Ledger, Promise};
use plan::{End, Part};
use report::{Head, Report};
use rng::Rng;
use saboteur::Saboteur;
use standing::Stand;
use world::{GivenUp, World};

/// How often all standing containers are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// How many pods are started at a time where many are.
const BATCH: usize = 10;
/// Room for the state of all pods, and little more: filling it shall be quick.
const STATE_MIB: u32 = 32;
/// Names of times until it serves.
const STORM: &str = "killed in the storm";
const MANY: &str = "killed with many pods";
const UPGRADE: &str = "upgraded, by kuasarctl";

/// Kills kuasard, containerd and OCI runtimes at random under load, and looks whether anybody notices.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The sandboxer to disturb.
    #[arg(long, env = "SANDBOXER", default_value = "kuasar-runc")]
    sandboxer: String,
    /// How long the storm lasts at most.
    #[arg(long, env = "CHAOS_MINUTES", default_value_t = 6.0)]
    minutes: f64,
    /// End the storm after so many kills of the worker, and a tenth as many of containerd.
    #[arg(long)]
    kills: Option<usize>,
    /// Standing pods.
    #[arg(long, default_value_t = 6)]
    pods: usize,
    /// Standing containers in them.
    #[arg(long, default_value_t = 24)]
    containers: usize,
    /// Pods for the time from kill to serving.
    #[arg(long, default_value_t = 50)]
    serving_pods: usize,
    /// Kills for it.
    #[arg(long, default_value_t = 60)]
    serving_kills: usize,
    /// Upgrades.
    #[arg(long, default_value_t = 20)]
    upgrades: usize,
    /// Phases with a hung volume and stuck guests, and as many without.
    #[arg(long, default_value_t = 8)]
    hung_phases: usize,
    /// Pods per client and phase whose calls are compared then.
    #[arg(long, default_value_t = 15)]
    hung_lives: usize,
    /// Only these parts.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Repeat the disturbances of another run.
    #[arg(long, env = "CHAOS_SEED")]
    seed: Option<u64>,
    /// Directory for the results and the log.
    #[arg(long, default_value = "target/chaos")]
    out: PathBuf,
    /// File for the results, a line per promise.
    #[arg(long)]
    results: Option<PathBuf>,
}

impl Arguments {
    fn wants(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    program::start(async |node| run(arguments, node).await)
}

/// Runs it all, and leaves the daemons' logs beside the results.
async fn run(arguments: Arguments, slot: &mut Option<Node>) -> Result<ExitCode> {
    let result = disturb(&arguments, slot).await;
    if let Some(node) = slot {
        for log in [&node.containerd.paths().log, &node.dir().join("kuasard.log")] {
            let copy = arguments.out.join(log.file_name().unwrap_or_default());
            std::fs::copy(log, &copy).with_context(|| format!("copy {} to {}", log.display(), copy.display()))?;
        }
    }
    result
}

async fn disturb(arguments: &Arguments, slot: &mut Option<Node>) -> Result<ExitCode> {
    let mut screen = Screen::new();
    ensure!(!tools::is_machine(&arguments.sandboxer), "{}: name a sandboxer of kind runc to disturb", arguments.sandboxer);
    std::fs::create_dir_all(&arguments.out).with_context(|| format!("create {}", arguments.out.display()))?;
    let log = arguments.out.join("chaos.log");
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs(),
    };
    let mut rng = Rng::new(seed);

    screen.status("starting a private containerd and kuasard")?;
    let options = NodeOptions::new("chaos").quiet().storage(Storage::Memory).sandboxer(&arguments.sandboxer, "runc");
    let guests = arguments.wants(Part::Hung) && hung::has_guests()?;
    let options = if guests { options.sandboxer_later(guests::HANDLER, guests::HYPERVISOR) } else { options };
    let node = slot.insert(Node::start(options.state_mib(STATE_MIB).failpoints()).await?);
    let (major, minor, patch) = node.containerd.version();
    let head = Head {
        seed,
        containerd: format!("{major}.{minor}.{patch}"),
        sandboxer: arguments.sandboxer.clone(),
        pods: arguments.pods,
        containers: arguments.containers,
    };
    screen.line(&format!("seed {seed}; node in {}, log in {}", node.dir().display(), log.display()))?;
    let mut before = baseline(node, &arguments.sandboxer).await?;
    if guests {
        // The last is made with its first pod, the others with the sandboxer.
        let state = node.kuasard.as_ref().context("the node has no kuasard")?.state();
        let dir = Path::new("vmm").join(guests::HANDLER);
        for path in [Path::new("vmm"), &dir, &dir.join(".machines"), &dir.join("k8s.io")] {
            before.expect_state(&state.join(path));
        }
    }
    let world = Arc::new(World::new(node, &arguments.sandboxer, Ledger::new(&log)?)?);

    screen.status("starting the standing containers")?;
    let stand = Arc::new(Stand::up(&world, arguments.pods, arguments.containers).await?);
    let mut looks = JoinSet::new();
    looks.spawn(look_often(Arc::clone(&world), Arc::clone(&stand)));

    if arguments.wants(Part::Storm) {
        world.ledger.note("the storm");
        let mut load = load::start(&world, &stand, &mut rng);
        let end = End::new(arguments.kills, arguments.minutes);
        let mut saboteur = Saboteur { node, world: &world, stand: &stand, rng: rng.fork(), phase: STORM };
        while !end.has_come(&world.ledger) {
            screen.status(&end.progress(&world.ledger))?;
            saboteur.strike().await?;
        }
        finish(&world, &mut load).await?;
        stand.exec_in_each(&world, &mut rng).await;
    }
    if arguments.wants(Part::Serving) {
        step(&mut screen, &world, &format!("starting pods until there are {}", arguments.serving_pods))?;
        let more = more_pods(&world, arguments.serving_pods.saturating_sub(stand.pods.len())).await?;
        let mut load = load::start(&world, &stand, &mut rng);
        let mut saboteur = Saboteur { node, world: &world, stand: &stand, rng: rng.fork(), phase: MANY };
        for kill in 0..arguments.serving_kills {
            screen.status(&format!("{} pods: kill {} of {}", arguments.serving_pods, kill + 1, arguments.serving_kills))?;
            saboteur.worker_sometime().await?;
        }
        finish(&world, &mut load).await?;
        step(&mut screen, &world, "removing the pods again")?;
        remove_pods(&world, &more).await;
    }

    if arguments.wants(Part::Upgrades) {
        step(&mut screen, &world, "waiting until nothing before is an excuse any more")?;
        world.ledger.quiet().await;
        let mut load = load::start(&world, &stand, &mut rng);
        let mut saboteur = Saboteur { node, world: &world, stand: &stand, rng: rng.fork(), phase: UPGRADE };
        for upgrade in 0..arguments.upgrades {
            screen.status(&format!("upgrade {} of {}", upgrade + 1, arguments.upgrades))?;
            saboteur.upgrade_sometime().await?;
        }
        finish(&world, &mut load).await?;
    }

    if arguments.wants(Part::Hung) {
        step(&mut screen, &world, "letting a volume hang and guests get stuck")?;
        world.ledger.quiet().await;
        if guests {
            // Not before: it is part of each worker's start.
            node.add_later().await?;
        }
        let size = hung::Size { phases: arguments.hung_phases, lives: arguments.hung_lives };
        hung::disturb(&world, &node.dir().join("run/hung"), guests, size, &mut rng.fork()).await?;
    }

    // From here on nobody looks beside.
    looks.shutdown().await;
    let mut stand = Arc::into_inner(stand).context("somebody still looks at the standing containers")?;
    if arguments.wants(Part::Keeper) {
        step(&mut screen, &world, "killing the whole daemon and containerd")?;
        // A terminal's master is gone with the last process that has it; only a supervisor could keep it.
        given_up(stand.remove_terminals(&world).await)?;
        Saboteur { node, world: &world, stand: &stand, rng: rng.fork(), phase: STORM }.keeper().await?;
    }
    step(&mut screen, &world, "looking at all once more")?;
    given_up(stand.look(&world).await)?;
    stand.exec_in_each(&world, &mut rng).await;
    stand.account(&world)?;

    step(&mut screen, &world, "removing everything")?;
    given_up(world.remove_pods(None).await)?;
    drop(stand);
    std::fs::remove_dir_all(node.dir().join("run/chaos")).context("remove the containers' own directories")?;
    step(&mut screen, &world, "looking for what is left")?;
    if let Err(error) = node.assert_no_leak(&before).await {
        world.ledger.broke(Promise::Clean, 1, &format!("{error:#}"));
    }
    let report = Report::new(head, world.ledger.sum());
    report.print(&mut screen)?;
    conclude(arguments, &report, &mut screen)
}

fn step(screen: &mut Screen, world: &World, what: &str) -> Result<()> {
    world.ledger.note(what);
    screen.status(what)
}

fn conclude(arguments: &Arguments, report: &Report, screen: &mut Screen) -> Result<ExitCode> {
    let path = arguments.out.join("chaos.json");
    report.write(&path)?;
    if let Some(path) = &arguments.results {
        report.write_results(path)?;
    }
    if let Some(verdict) = report.verdict(MANY) {
        screen.line(&verdict)?;
    }
    let (style, text) = match report.is_kept() {
        true => (Style::Green, "every promise was kept"),
        false => (Style::Red, "promises were broken"),
    };
    let written = format!("{}; written to {}", screen.paint(style, text), path.display());
    screen.line(&written)?;
    Ok(if report.is_kept() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn given_up<T>(result: Result<T, GivenUp>) -> Result<T> {
    result.map_err(|GivenUp| anyhow!("a call that has to succeed does not: see the log"))
}

/// What the node has when it has had a pod and a second worker: what is made once is made then.
async fn baseline(node: &mut Node, handler: &str) -> Result<Snapshot> {
    first_pod(node, handler).await?;
    let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
    let killed = kuasard.kill_worker().await?;
    kuasard.wait_serving(killed).await?;
    first_pod(node, handler).await?;
    node.snapshot()
}

async fn first_pod(node: &Node, handler: &str) -> Result<()> {
    let pod = node.run_pod(PodSpec::new("first").handler(handler).shared_pid()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    ensure!(container.exec(["true"]).await?.exit_code == 0, "the first exec fails");
    Ok(pod.remove_all().await?)
}

/// Looks at the standing containers until it is told to stop.
async fn look_often(world: Arc<World>, stand: Arc<Stand>) {
    loop {
        let begun = Instant::now();
        // Who gives up has said why.
        let _ = stand.look(&world).await;
        tokio::time::sleep(LOOK.saturating_sub(begun.elapsed())).await;
    }
}

/// Ends the load, each client with what it is doing.
async fn finish(world: &World, load: &mut JoinSet<()>) -> Result<()> {
    world.load_goes_on(false);
    while let Some(client) = load.join_next().await {
        client.context("a client has ended")?;
    }
    Ok(())
}

async fn more_pods(world: &World, count: usize) -> Result<Vec<Pod>> {
    let mut pods = Vec::new();
    while pods.len() < count {
        let batch = (0..BATCH.min(count - pods.len())).map(|_| async {
            let pod = world.run_pod(PodSpec::host_network).await?;
            world.run_container(&pod, ContainerSpec::sleep).await?;
            Ok::<_, GivenUp>(pod)
        });
        pods.extend(given_up(try_join_all(batch).await)?);
    }
    Ok(pods)
}

async fn remove_pods(world: &World, pods: &[Pod]) {
    for batch in pods.chunks(BATCH) {
        // Who gives up has said why, and in the end all pods are removed once more.
        let _ = try_join_all(batch.iter().map(|pod| world.remove_pod(&pod.id))).await;
    }
}
