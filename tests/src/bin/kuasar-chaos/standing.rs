//! Containers that are there from beginning to end, and must not notice anything.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::{ContainerFilter, ContainerState, PodSandboxState};
use kuasar_tests::leak::census;
use kuasar_tests::{Container, Pod};

use crate::ledger::{Call, Disturbance, Promise};
use crate::rng::Rng;
use crate::world::{GivenUp, MINE, World};

/// How far apart a container prints its numbers, in milliseconds.
const APART_MS: &str = "50";
/// How many lines containerd may have read and not yet written when it is killed: they come one by one.
const TAKEN_ALONG: u64 = 3;
/// Every so many containers one has a terminal.
const TERMINAL_EVERY: usize = 10;
/// Kinds of pods, one after the other; in the first all containers share their processes' numbers.
const KINDS: usize = 3;
/// The file, in a container's own directory, that collects the tokens of commands run in it.
const EXECS: &str = "execs";

/// What is known of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ran {
    /// The call said so.
    Yes,
    /// The call failed: it may have run.
    Perhaps,
}

/// A container and what must not change of it.
pub(crate) struct Standing {
    /// The container.
    pub(crate) container: Container,
    /// Whether it has a terminal.
    pub(crate) is_terminal: bool,
    pid: i32,
    start: Option<u64>,
    dir: PathBuf,
    log: Mutex<Follower>,
    /// With whether nothing could be written down of them.
    tokens: Mutex<BTreeMap<String, (Ran, bool)>>,
    /// Whether its loss has been told.
    is_lost: Mutex<bool>,
}

/// All of them.
pub(crate) struct Stand {
    pub(crate) pods: Vec<Pod>,
    pub(crate) containers: Vec<Standing>,
}

impl Stand {
    /// Starts them, spread over pods of all kinds.
    pub(crate) async fn up(world: &World, pods: usize, containers: usize) -> Result<Self> {
        let given_up = |_: GivenUp| anyhow::anyhow!("the standing containers do not start: see the log");
        let mut stand = Self { pods: Vec::new(), containers: Vec::new() };
        for number in 0..pods {
            let pod = world.run_pod(|spec| match number % KINDS {
                0 => spec.shared_pid(),
                1 => spec,
                _ => spec.host_network(),
            });
            stand.pods.push(pod.await.map_err(given_up)?);
        }
        for number in 0..containers {
            let Some(pod) = stand.pods.get(number % pods.max(1)) else { break };
            let is_terminal = number % TERMINAL_EVERY == TERMINAL_EVERY - 1;
            stand.containers.push(Standing::up(world, pod, is_terminal, APART_MS).await?);
        }
        ensure!(!stand.containers.is_empty(), "no standing containers");
        Ok(stand)
    }

    /// Looks at all: processes, logs, what CRI says.
    pub(crate) async fn look(&self, world: &World) -> Result<(), GivenUp> {
        for standing in &self.containers {
            standing.look(world);
        }
        let states: BTreeMap<String, i32> = world
            .containers(ContainerFilter::default())
            .await?
            .into_iter()
            .map(|container| (container.id, container.state))
            .collect();
        for standing in &self.containers {
            let state = states.get(&standing.container.id).copied();
            standing.is_said_to_be(world, state.and_then(|state| ContainerState::try_from(state).ok()));
        }
        let pods: BTreeMap<String, i32> = world.pods(None).await?.into_iter().map(|pod| (pod.id, pod.state)).collect();
        for pod in &self.pods {
            if pods.get(&pod.id).copied() != Some(PodSandboxState::SandboxReady.into()) {
                world.ledger.broke(
                    Promise::Reported,
                    1,
                    &format!("the pod {} is {:?} (0 is ready)", pod.id, pods.get(&pod.id)),
                );
            }
        }
        Ok(())
    }

    /// Pods in which no container's process is process 1.
    pub(crate) fn shared_pid(&self) -> impl Iterator<Item = &Pod> {
        self.pods.iter().step_by(KINDS)
    }

    /// Runs a command in each.
    pub(crate) async fn exec_in_each(&self, world: &World, rng: &mut Rng) {
        for standing in &self.containers {
            standing.exec(world, rng).await;
        }
    }

    /// To be called while there is no containerd: lines that come next may follow a gap.
    pub(crate) fn containerd_is_dead(&self) -> Result<()> {
        self.containers.iter().try_for_each(|standing| standing.log().mark())
    }

    /// Compares the commands that have run with the calls that were made.
    pub(crate) fn account(&self, world: &World) -> Result<()> {
        self.containers.iter().try_for_each(|standing| standing.account(world))
    }

    /// Removes those with a terminal.
    pub(crate) async fn remove_terminals(&mut self, world: &World) -> Result<(), GivenUp> {
        for standing in self.containers.extract_if(.., |standing| standing.is_terminal) {
            world.remove_container(&standing.container, 0).await?;
        }
        Ok(())
    }
}

impl Standing {
    /// Starts one that prints a number every so many milliseconds.
    pub(crate) async fn up(world: &World, pod: &Pod, is_terminal: bool, apart_ms: &str) -> Result<Self> {
        let dir = world.dir(&world.unique("standing"))?;
        let container = world.run_container(pod, |spec| {
            let spec = spec.command(&["count", apart_ms]).mount(&dir, MINE, false);
            if is_terminal { spec.tty() } else { spec }
        });
        let given_up = |_: GivenUp| anyhow::anyhow!("a standing container does not start: see the log");
        let container = container.await.map_err(given_up)?;
        let pid = container.pid().await?;
        let log = Mutex::new(Follower::new(container.log.clone().context("a standing container has no log")?));
        let start = census::start_time(pid);
        Ok(Self { container, is_terminal, pid, start, dir, log, tokens: Mutex::default(), is_lost: Mutex::new(false) })
    }

    fn log(&self) -> std::sync::MutexGuard<'_, Follower> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells once, not at each look.
    fn lost(&self, world: &World, promise: Promise, what: &str) {
        let mut is_lost = self.is_lost.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *is_lost, true) {
            world.ledger.broke(promise, 1, &format!("{} (terminal: {}) {what}", self.container.id, self.is_terminal));
        }
    }

    /// Looks at its process and its log. A process in a virtual machine is not the node's.
    pub(crate) fn look(&self, world: &World) {
        let now = census::start_time(self.pid);
        if now != self.start {
            self.lost(world, Promise::Runs, &format!("process {} began at {:?}, now {now:?}", self.pid, self.start));
        }
        let seen = self.log().read();
        let id = &self.container.id;
        match seen {
            Ok(seen) => {
                world.ledger.lines_taken_along(seen.taken_along);
                if seen.lost > 0 {
                    world.ledger.broke(
                        Promise::Lines,
                        seen.lost,
                        &format!("{id} (terminal: {}) {}", self.is_terminal, seen.where_lost),
                    );
                }
                if seen.doubled > 0 {
                    world.ledger.broke(Promise::LinesOnce, seen.doubled, &format!("{id} (terminal: {})", self.is_terminal));
                }
            }
            Err(error) => world.ledger.broke(Promise::Lines, 1, &format!("{id}: {error:#}")),
        }
    }

    /// What CRI says of it.
    pub(crate) fn is_said_to_be(&self, world: &World, state: Option<ContainerState>) {
        if state != Some(ContainerState::ContainerRunning) {
            self.lost(world, Promise::Reported, &format!("is {state:?}"));
        }
    }

    /// Runs a command in it that leaves a token, and compares what the call says.
    pub(crate) async fn exec(&self, world: &World, rng: &mut Rng) {
        // Whether it has succeeded is on the ledger.
        self.exec_beside(world, rng, None).await;
    }

    /// The same while its pod is disturbed, if it is: the call may fail then. Returns whether it has succeeded.
    pub(crate) async fn exec_beside(&self, world: &World, rng: &mut Rng, disturbed: Option<Disturbance>) -> bool {
        let token = world.unique("token");
        let code = i32::try_from(rng.below(126)).unwrap_or(0);
        let script = format!("echo {token} >>{MINE}/{EXECS}; echo {token}; exit {code}");
        let about = format!("{token} in {}", self.container.id);
        let begun = Instant::now();
        let call = self.container.sh(&script);
        let answer = match disturbed {
            None => world.once(Call::ExecSync, &about, call).await,
            Some(what) => world.about_disturbed(what, Call::ExecSync, &about, call).await,
        };
        let unnoted = world.ledger.nothing_could_be_noted_since(begun);
        let ran = match answer {
            Ok(ran) => {
                let output = ran.stdout();
                let twice = unnoted && output.lines().eq([token.as_str(); 2]);
                if ran.exit_code != code || output.trim() != token && !twice {
                    let text = format!("exec of {about}: {} and {:?} in place of {code}", ran.exit_code, ran.stdout());
                    world.ledger.broke(Promise::True, 1, &text);
                }
                Ran::Yes
            }
            Err(_) => Ran::Perhaps,
        };
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(token, (ran, unnoted));
        ran == Ran::Yes
    }

    /// Compares the commands that have run in it with the calls that were made.
    pub(crate) fn account(&self, world: &World) -> Result<()> {
        let path = self.dir.join(EXECS);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
        };
        let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
        for token in text.lines() {
            *counts.entry(token).or_default() += 1;
        }
        for (token, ran) in &*self.tokens.lock().unwrap_or_else(PoisonError::into_inner) {
            match (counts.get(token.as_str()).copied().unwrap_or(0), ran) {
                (0, (Ran::Yes, _)) => world.ledger.broke(Promise::Executed, 1, &format!("{token} in {}", self.container.id)),
                (0 | 1, _) => {}
                (2, (_, true)) => world.ledger.ran_twice_unnoted(&format!("{token} in {}", self.container.id)),
                (times, _) => {
                    world.ledger.broke(Promise::ExecutedOnce, 1, &format!("{token} in {}, {times} times", self.container.id))
                }
            }
        }
        Ok(())
    }
}

/// What a look at a log has found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    lost: u64,
    where_lost: String,
    doubled: u64,
    taken_along: u64,
}

/// Reads a log of numbers as it grows.
struct Follower {
    path: PathBuf,
    offset: u64,
    last: u64,
    /// Where the file ended when there was no containerd to write it.
    marks: Vec<u64>,
}

impl Follower {
    fn new(path: PathBuf) -> Self {
        Self { path, offset: 0, last: 0, marks: Vec::new() }
    }

    fn mark(&mut self) -> Result<()> {
        let metadata = fs::metadata(&self.path).with_context(|| format!("look at {}", self.path.display()))?;
        self.marks.push(metadata.len());
        Ok(())
    }

    fn read(&mut self) -> Result<Seen> {
        let mut file = fs::File::open(&self.path).with_context(|| format!("open {}", self.path.display()))?;
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).with_context(|| format!("read {}", self.path.display()))?;
        let mut seen = Seen::default();
        // The last line may be in the middle of being written.
        for line in String::from_utf8_lossy(&bytes).split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            let begin = self.offset;
            self.offset += line.len() as u64;
            // Time, stream, tag, text; a terminal ends its lines with CR LF.
            let number = line.splitn(4, ' ').nth(3).and_then(|text| text.trim_end().parse().ok());
            let number: u64 = number.with_context(|| format!("{} holds {line:?}", self.path.display()))?;
            let missing = number.saturating_sub(self.last + 1);
            if number <= self.last {
                seen.doubled += 1;
            } else if missing > 0 && missing <= TAKEN_ALONG && self.marks.contains(&begin) {
                seen.taken_along += missing;
            } else if missing > 0 {
                seen.lost += missing;
                seen.where_lost = format!("{number} follows {} in line {:?}", self.last, line.trim_end());
            }
            self.last = self.last.max(number);
        }
        Ok(seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_gap_is_containerds_only_where_it_died() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut follower = Follower::new(file.path().to_path_buf());
        let mut print = |text: &str| file.write_all(text.as_bytes()).unwrap();
        print("t stdout F 1\nt stdout F 2\nt stdout F 3");
        assert_eq!(follower.read().unwrap(), Seen::default());
        print("\n");
        follower.mark().unwrap();
        print("t stdout F 5\r\n");
        let seen = follower.read().unwrap();
        assert_eq!((seen.lost, seen.taken_along, seen.doubled), (0, 1, 0));
        print("t stdout F 7\nt stdout F 7\nt stdout F 8\n");
        let seen = follower.read().unwrap();
        assert_eq!((seen.lost, seen.taken_along, seen.doubled), (1, 0, 1));
        print("nonsense\n");
        assert!(follower.read().is_err());
    }
}
