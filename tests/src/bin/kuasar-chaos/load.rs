//! The load: clients that do, all the time, what kubelet does. Each ends what it is doing when the load ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kuasar_tests::cri::k8s_cri::v1::{ContainerState, ListContainerStatsRequest, PodSandboxState};
use kuasar_tests::{Container, Pod};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::ledger::{Call, Promise};
use crate::rng::Rng;
use crate::standing::Stand;
use crate::world::{GivenUp, World};

/// How long a container that ends by itself may be said to run.
const EXIT: Duration = Duration::from_secs(30);
/// How long after that its log may take to be complete.
const LOG: Duration = Duration::from_secs(10);
/// What containerd says of a task that it had deleted before it was killed, and not noted how it had ended.
const UNKNOWN: i32 = 255;
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Lines that a short container prints.
const LINES: u64 = 20;
/// The longest pause of a client between two things it does, in milliseconds.
const REST_MS: u64 = 150;

/// What a client does.
#[derive(Clone, Copy, Debug)]
enum Client {
    Execs,
    Containers,
    Short,
    Pods,
    Looks,
}

const CLIENTS: [Client; 7] =
    [Client::Execs, Client::Execs, Client::Containers, Client::Short, Client::Pods, Client::Pods, Client::Looks];

/// Starts all clients.
pub(crate) fn start(world: &Arc<World>, stand: &Arc<Stand>, rng: &mut Rng) -> JoinSet<()> {
    world.load_goes_on(true);
    let mut clients = JoinSet::new();
    for client in CLIENTS {
        clients.spawn(run(client, Arc::clone(world), Arc::clone(stand), rng.fork()));
    }
    clients
}

async fn run(client: Client, world: Arc<World>, stand: Arc<Stand>, mut rng: Rng) {
    while world.goes_on() {
        let done = match client {
            Client::Execs => exec(&world, &stand, &mut rng).await,
            Client::Containers => container(&world, &stand, &mut rng).await,
            Client::Short => short(&world, &stand, &mut rng).await,
            Client::Pods => pod(&world, &mut rng).await,
            Client::Looks => look(&world, &stand, &mut rng).await,
        };
        if let Err(GivenUp) = done {
            world.ledger.note(&format!("{client:?} has given something up, and goes on"));
        }
        world.rest(rng.millis(0, REST_MS)).await;
    }
}

async fn exec(world: &World, stand: &Stand, rng: &mut Rng) -> Result<(), GivenUp> {
    if let Some(standing) = rng.pick(&stand.containers) {
        standing.exec(world, rng).await;
    }
    Ok(())
}

/// Runs a command in a container of the load itself.
async fn exec_in(world: &World, container: &Container, rng: &mut Rng) -> Result<(), GivenUp> {
    let code = i32::try_from(rng.below(126)).unwrap_or(0);
    let script = format!("echo {code}; exit {code}");
    let ran = world.insist(Call::ExecSync, &container.id, || container.sh(&script)).await?;
    if (ran.exit_code, ran.stdout()) != (code, format!("{code}\n")) {
        let text = format!("exec in {}: {} and {:?} in place of {code}", container.id, ran.exit_code, ran.stdout());
        world.ledger.broke(Promise::True, 1, &text);
    }
    Ok(())
}

/// A container in a standing pod, from its creation to its removal.
async fn container(world: &World, stand: &Stand, rng: &mut Rng) -> Result<(), GivenUp> {
    let Some(pod) = rng.pick(&stand.pods) else { return Ok(()) };
    let container = world.run_container(pod, |spec| spec.sleep()).await?;
    if rng.one_in(2) {
        exec_in(world, &container, rng).await?;
    }
    world.remove_container(&container, 0).await
}

/// A container that ends by itself: its exit code is the true one, and its log is whole.
async fn short(world: &World, stand: &Stand, rng: &mut Rng) -> Result<(), GivenUp> {
    let Some(pod) = rng.pick(&stand.pods) else { return Ok(()) };
    let code = i32::try_from(rng.below(126)).unwrap_or(0);
    let script = format!("seq 1 {LINES}; exit {code}");
    let begun = Instant::now();
    let container = world.run_container(pod, |spec| spec.sh(&script)).await?;
    exits_with(world, &container, code, begun).await?;
    if !world.ledger.containerd_died_since(begun) {
        prints_all(world, &container).await;
    }
    world.remove_container(&container, 0).await
}

/// Waits for the end of a container that was begun then, and looks how it ended.
pub(crate) async fn exits_with(world: &World, container: &Container, code: i32, begun: Instant) -> Result<(), GivenUp> {
    let end = Instant::now() + EXIT;
    loop {
        let status = world.insist(Call::ContainerStatus, &container.id, || container.status()).await?;
        if status.state() == ContainerState::ContainerExited {
            if status.exit_code == UNKNOWN && world.ledger.containerd_died_since(begun) {
                world.ledger.exit_taken_along(&container.id);
            } else if status.exit_code != code {
                let text = format!("{} ended with {} ({}), not {code}", container.id, status.exit_code, status.reason);
                world.ledger.broke(Promise::True, 1, &text);
            }
            return Ok(());
        }
        if Instant::now() > end {
            let text = format!("{} is still {:?} {} s after its start", container.id, status.state(), EXIT.as_secs());
            world.ledger.broke(Promise::Answered, 1, &text);
            return Ok(());
        }
        sleep(LOOK_AGAIN).await;
    }
}

async fn prints_all(world: &World, container: &Container) {
    let end = Instant::now() + LOG;
    loop {
        let lines = container.logs().map(|lines| lines.into_iter().map(|line| line.text).collect::<Vec<_>>());
        let is_whole = |lines: &[String]| lines.iter().map(|line| line.parse().ok()).eq((1..=LINES).map(Some));
        match lines {
            Ok(lines) if is_whole(&lines) => return,
            Ok(_) if Instant::now() < end => sleep(LOOK_AGAIN).await,
            Ok(lines) => return world.ledger.broke(Promise::Lines, 1, &format!("{} printed {lines:?}", container.id)),
            Err(error) => return world.ledger.broke(Promise::Lines, 1, &format!("{}: {error:#}", container.id)),
        }
    }
}

/// A pod with containers, from its beginning to its end.
async fn pod(world: &World, rng: &mut Rng) -> Result<(), GivenUp> {
    let kind = rng.below(4);
    let pod = world.run_pod(|spec| match kind {
        0 => spec,
        1 => spec.shared_pid(),
        _ => spec.host_network(),
    });
    let pod = pod.await?;
    let ran = in_pod(world, &pod, rng).await;
    world.remove_pod(&pod.id).await?;
    ran
}

async fn in_pod(world: &World, pod: &Pod, rng: &mut Rng) -> Result<(), GivenUp> {
    for _ in 0..=rng.below(2) {
        let container = world.run_container(pod, |spec| spec.sleep()).await?;
        exec_in(world, &container, rng).await?;
        if rng.one_in(3) {
            world.remove_container(&container, 0).await?;
        }
    }
    Ok(())
}

/// Asks for something that changes nothing.
async fn look(world: &World, stand: &Stand, rng: &mut Rng) -> Result<(), GivenUp> {
    let (Some(standing), Some(pod)) = (rng.pick(&stand.containers), rng.pick(&stand.pods)) else { return Ok(()) };
    let container = &standing.container;
    match rng.below(5) {
        0 => {
            let status = world.insist(Call::ContainerStatus, &container.id, || container.status()).await?;
            standing.is_said_to_be(world, Some(status.state()));
        }
        1 => {
            let state = world.insist(Call::PodSandboxStatus, &pod.id, || pod.state()).await?;
            if state != PodSandboxState::SandboxReady {
                world.ledger.broke(Promise::Reported, 1, &format!("the pod {} is {state:?}", pod.id));
            }
        }
        2 => {
            world.insist(Call::ContainerStats, &container.id, || container.stats()).await?;
        }
        3 => {
            world.insist(Call::PodSandboxStats, &pod.id, || pod.stats()).await?;
        }
        _ => {
            let all = || async { world.runtime().list_container_stats(ListContainerStatsRequest { filter: None }).await };
            world.insist(Call::ListContainerStats, "all", all).await?;
        }
    }
    Ok(())
}
