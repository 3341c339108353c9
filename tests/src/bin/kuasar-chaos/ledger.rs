//! What was done and what came of it: calls, disturbances, broken promises.
//!
//! A call that fails is excused by what was done to a daemon while it was in flight, and by nothing else:
//!
//! | disturbed | calls that may fail |
//! |---|---|
//! | the worker | those that containerd passes to the Sandbox Controller and does not repeat, and statistics, which are empty: other Task calls are answered by the next worker |
//! | the daemon, stopped for seconds | the same, and those for which containerd has a deadline of its own |
//! | a process by a signal that it gets over, or the worker by one at which it leaves | none |
//! | containerd | all |
//! | the OCI runtime, descriptors, disk | all: the daemon says so, and nothing is left |
//! | a volume, a guest | those about its own pod; nothing of other pods, whose calls are as fast as ever |

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use tonic::{Code, Status};

use crate::latencies::{Compared, SLOWER};

/// How long after a worker's return a call about a pod may still fail: containerd waits before it dials again.
const REDIAL: Duration = Duration::from_secs(3);
/// How long after the end of a shortage what had begun under it may fail.
const AFTERMATH: Duration = Duration::from_secs(1);
/// How the message of a call begins that has failed at the Controller, though it is no call about a pod.
const CONTROLLER_FIRST: [&str; 2] = ["failed to get controller status", "failed to query sandbox platform"];
/// What kuasard says of a request that workers die of, and how many it takes.
const POISON: &str = "has died three times with this request unanswered";
const POISON_DEATHS: usize = 3;
/// Broken promises that are told one by one.
const TOLD: usize = 30;
const TOLD_LINES: usize = 12;

/// A CRI call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) enum Call {
    RunPodSandbox,
    StopPodSandbox,
    RemovePodSandbox,
    PodSandboxStatus,
    PodSandboxStats,
    CreateContainer,
    StartContainer,
    ExecSync,
    StopContainer,
    RemoveContainer,
    ContainerStatus,
    ContainerStats,
    List,
    ListContainerStats,
    ListPodSandboxStats,
}

impl Call {
    /// Whether it has failed at the Sandbox Controller, whose calls containerd does not repeat, or for want of statistics.
    fn is_not_repeated(self, status: &Status) -> bool {
        match self {
            Self::RunPodSandbox | Self::StopPodSandbox | Self::RemovePodSandbox | Self::PodSandboxStatus => true,
            Self::PodSandboxStats | Self::ContainerStats => true,
            Self::ListPodSandboxStats | Self::ListContainerStats => true,
            // It asks the Controller for the pod's status and platform first.
            Self::CreateContainer => CONTROLLER_FIRST.iter().any(|text| status.message().starts_with(text)),
            _ => false,
        }
    }
}

/// What is done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) enum Disturbance {
    /// kill -9 of the worker.
    Worker,
    /// The worker kills itself between two steps.
    Failpoint,
    /// kill -9 of containerd.
    Containerd,
    /// kill -9 of both, containerd first.
    Both,
    /// kill -9 of an OCI runtime that is at work.
    Runtime,
    /// kill -9 of a container's first process.
    Init,
    /// SIGSTOP of the whole daemon for seconds.
    Stop,
    /// Any signal, where it does no harm to calls: to what exists for that, or to a worker that leaves, goes on, or is continued.
    Signal,
    /// No space left where the state is.
    Disk,
    /// One of the daemon's processes cannot open another descriptor.
    Descriptors,
    /// The daemon is replaced, which excuses nothing.
    Upgrade,
    /// A volume of some pods does not answer, which excuses nothing of others.
    Volume,
    /// SIGSTOP of some pods' virtual machines, which excuses nothing of others.
    Guests,
    /// kill -9 of the whole daemon, and of containerd.
    Keeper,
}

impl Disturbance {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker killed",
            Self::Failpoint => "worker killed at a failpoint",
            Self::Containerd => "containerd killed",
            Self::Both => "containerd and worker killed",
            Self::Runtime => "OCI runtime killed",
            Self::Init => "container's init killed",
            Self::Stop => "daemon stopped for seconds",
            Self::Signal => "other signals sent",
            Self::Disk => "disk full",
            Self::Descriptors => "descriptors run out",
            Self::Upgrade => "daemon upgraded",
            Self::Volume => "volume hung",
            Self::Guests => "guests stuck",
            Self::Keeper => "keeper and containerd killed",
        }
    }

    /// Whether the worker dies of it.
    pub(crate) fn kills_worker(self) -> bool {
        matches!(self, Self::Worker | Self::Failpoint | Self::Both)
    }

    /// Whether containerd dies of it.
    pub(crate) fn kills_containerd(self) -> bool {
        matches!(self, Self::Containerd | Self::Both)
    }

    /// Whether, and for how long after its end, it excuses the failure of a call.
    fn excuses(self, call: Call, status: &Status) -> Option<Duration> {
        match self {
            Self::Containerd | Self::Both | Self::Keeper => Some(REDIAL),
            Self::Worker | Self::Failpoint | Self::Stop if call.is_not_repeated(status) => Some(REDIAL),
            Self::Stop if status.code() == Code::DeadlineExceeded => Some(Duration::ZERO),
            Self::Runtime | Self::Disk | Self::Descriptors => Some(AFTERMATH),
            Self::Worker | Self::Failpoint | Self::Stop | Self::Init | Self::Signal | Self::Upgrade => None,
            Self::Volume | Self::Guests => None,
        }
    }
}

/// What must not happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) enum Promise {
    /// A standing container's process is the same from beginning to end.
    Runs,
    /// CRI says so.
    Reported,
    /// No line of a log is lost.
    Lines,
    /// No line is there twice.
    LinesOnce,
    /// A command is run when the call says so.
    Executed,
    /// And not twice.
    ExecutedOnce,
    /// Exit codes and outputs are the true ones.
    True,
    /// Each call is answered.
    Answered,
    /// A call fails only of what was done.
    Succeeds,
    /// What failed works when it is tried again.
    Recovers,
    /// Calls of pods beside a hung volume and stuck guests are as fast as ever.
    Undisturbed,
    /// Nothing is left in the end.
    Clean,
}

impl Promise {
    pub(crate) const ALL: [Self; 12] = [
        Self::Runs,
        Self::Reported,
        Self::Lines,
        Self::LinesOnce,
        Self::Executed,
        Self::ExecutedOnce,
        Self::True,
        Self::Answered,
        Self::Succeeds,
        Self::Recovers,
        Self::Undisturbed,
        Self::Clean,
    ];

    /// What is counted when it is broken.
    pub(crate) fn broken(self) -> &'static str {
        match self {
            Self::Runs => "containers lost",
            Self::Reported => "containers reported exited",
            Self::Lines => "log lines lost",
            Self::LinesOnce => "log lines doubled",
            Self::Executed => "execs never run",
            Self::ExecutedOnce => "execs run twice",
            Self::True => "wrong exit codes or outputs",
            Self::Answered => "calls hung",
            Self::Succeeds => "calls failed without cause",
            Self::Recovers => "calls that never succeeded",
            Self::Undisturbed => "calls slowed down by others",
            Self::Clean => "things left behind",
        }
    }
}

/// What became of the calls of a kind.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Calls {
    pub(crate) ok: u64,
    /// Failed because of a disturbance.
    pub(crate) failed: u64,
    /// Failed without one.
    pub(crate) without_cause: u64,
    /// Made once more after a failure.
    pub(crate) retried: u64,
    /// Not answered in time.
    pub(crate) hung: u64,
}

/// What containerd had been told and had not yet written down when it was killed: it was acknowledged, so nobody else has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct TakenAlong {
    /// Lines, read from a container.
    pub(crate) lines: u64,
    /// Exit codes, of tasks that it had deleted.
    pub(crate) exits: u64,
}

/// The first statistics of all pods after guests got stuck: containers' and pods', one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct FirstStatistics {
    /// How many guests are stuck at a time.
    pub(crate) guests: usize,
    /// How often.
    pub(crate) times: usize,
    /// The longest time.
    pub(crate) max_ms: f64,
    /// What it may be.
    pub(crate) limit_ms: f64,
}

/// A disturbance, from its beginning to the moment when all is back.
#[derive(Clone, Copy, Debug)]
struct Window {
    what: Disturbance,
    begun: Instant,
    ended: Option<Instant>,
}

impl Window {
    fn excuses(&self, call: Call, begun: Instant, status: &Status) -> bool {
        // A call that fails does so now: whatever has begun has begun before.
        self.what.excuses(call, status).is_some_and(|after| self.ended.is_none_or(|ended| ended + after >= begun))
    }
}

#[derive(Default)]
struct Entries {
    calls: BTreeMap<Call, Calls>,
    windows: BTreeMap<usize, Window>,
    broken: BTreeMap<Promise, u64>,
    told: Vec<String>,
    /// Messages of failures that are excused, with how often each came.
    reasons: BTreeMap<String, u64>,
    taken_along: TakenAlong,
    twice_unnoted: u64,
    serving_ms: BTreeMap<&'static str, Vec<f64>>,
    beside: BTreeMap<Call, Compared>,
    first_statistics: Option<FirstStatistics>,
    out: Option<File>,
}

impl Entries {
    /// Whether so many workers have died over a call that kuasard takes the call for the reason, and says so.
    fn is_poison(&self, begun: Instant, status: &Status) -> bool {
        // A failpoint may have been set before the call, and been reached by it.
        let since = |window: &&Window| window.ended.is_none_or(|ended| ended >= begun);
        let deaths = self.windows.values().filter(|window| window.what.kills_worker()).filter(since);
        status.message().contains(POISON) && deaths.count() >= POISON_DEATHS
    }
}

/// The ledger; shared by all who call, disturb and check.
pub(crate) struct Ledger {
    entries: Mutex<Entries>,
    begun: Instant,
}

impl Ledger {
    /// An empty one. What goes wrong is written to `log` as it does.
    pub(crate) fn new(log: &Path) -> Result<Self> {
        let open = OpenOptions::new().create(true).write(true).truncate(true).open(log);
        let out = Some(open.with_context(|| format!("open {}", log.display()))?);
        Ok(Self { entries: Mutex::new(Entries { out, ..Entries::default() }), begun: Instant::now() })
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a line in the log.
    pub(crate) fn note(&self, text: &str) {
        self.note_in(&mut self.entries(), text);
    }

    fn note_in(&self, entries: &mut Entries, text: &str) {
        let line = format!("{:9.3} {text}\n", self.begun.elapsed().as_secs_f64());
        if let Some(Err(error)) = entries.out.as_mut().map(|out| out.write_all(line.as_bytes())) {
            eprintln!("cannot write the log: {error}; it would have been: {line}");
            entries.out = None;
        }
    }

    /// A disturbance begins; to be ended by its number.
    pub(crate) fn begin(&self, what: Disturbance, detail: &str) -> usize {
        let mut entries = self.entries();
        let number = entries.windows.keys().next_back().map_or(0, |last| last + 1);
        entries.windows.insert(number, Window { what, begun: Instant::now(), ended: None });
        self.note_in(&mut entries, &format!("{} {detail}", what.name()));
        number
    }

    /// It has not come about.
    pub(crate) fn cancel(&self, number: usize) {
        let mut entries = self.entries();
        entries.windows.remove(&number);
        self.note_in(&mut entries, "it did not come about");
    }

    /// All is back.
    pub(crate) fn end(&self, number: usize) {
        let mut entries = self.entries();
        let Some(window) = entries.windows.get_mut(&number) else { return };
        window.ended = Some(Instant::now());
        let text = format!("back after {:.0} ms", window.begun.elapsed().as_secs_f64() * 1e3);
        self.note_in(&mut entries, &text);
    }

    /// Waits until no disturbance excuses a call any more that begins then.
    pub(crate) async fn quiet(&self) {
        let last = self.entries().windows.values().filter_map(|window| window.ended).max();
        if let Some(last) = last {
            tokio::time::sleep_until((last + REDIAL).into()).await;
        }
    }

    /// A call has succeeded.
    pub(crate) fn ok(&self, call: Call) {
        self.entries().calls.entry(call).or_default().ok += 1;
    }

    /// A call has failed that was begun then.
    pub(crate) fn failed(&self, call: Call, begun: Instant, about: &str, status: &Status) {
        let mut entries = self.entries();
        let mut windows = entries.windows.values().rev();
        let cause = windows.find(|window| window.excuses(call, begun, status)).map(|window| window.what);
        let cause = cause.or_else(|| entries.is_poison(begun, status).then_some(Disturbance::Worker));
        let count = entries.calls.entry(call).or_default();
        let text = format!("{call:?} of {about}: {:?}: {}", status.code(), status.message());
        let Some(cause) = cause else {
            count.without_cause += 1;
            self.break_in(
                &mut entries,
                Promise::Succeeds,
                1,
                &format!("{text} (after {:.3} s)", begun.elapsed().as_secs_f64()),
            );
            return;
        };
        count.failed += 1;
        *entries.reasons.entry(format!("{call:?}: {:?}, {}", status.code(), cause.name())).or_default() += 1;
        self.note_in(&mut entries, &format!("excused by {}: {text}", cause.name()));
    }

    /// A call has failed about what was disturbed itself.
    pub(crate) fn failed_by(&self, what: Disturbance, call: Call, about: &str, status: &Status) {
        let mut entries = self.entries();
        entries.calls.entry(call).or_default().failed += 1;
        *entries.reasons.entry(format!("{call:?}: {:?}, {}", status.code(), what.name())).or_default() += 1;
        let text = format!("excused by {}: {call:?} of {about}: {:?}: {}", what.name(), status.code(), status.message());
        self.note_in(&mut entries, &text);
    }

    /// A call was not answered in time.
    pub(crate) fn hung(&self, call: Call, about: &str) {
        let mut entries = self.entries();
        entries.calls.entry(call).or_default().hung += 1;
        self.break_in(&mut entries, Promise::Answered, 1, &format!("{call:?} of {about}"));
    }

    /// A call is made once more.
    pub(crate) fn retried(&self, call: Call) {
        self.entries().calls.entry(call).or_default().retried += 1;
    }

    /// A promise is broken, so many times.
    pub(crate) fn broke(&self, promise: Promise, times: u64, what: &str) {
        self.break_in(&mut self.entries(), promise, times, what);
    }

    fn break_in(&self, entries: &mut Entries, promise: Promise, times: u64, what: &str) {
        *entries.broken.entry(promise).or_default() += times;
        let text = format!("{} ({times}): {what}", promise.broken());
        self.note_in(entries, &format!("BROKEN {text}"));
        if entries.told.len() < TOLD {
            // The rest of it is in the log.
            let lines: Vec<&str> = text.lines().take(TOLD_LINES).collect();
            entries.told.push(lines.join("\n"));
        }
    }

    /// containerd has taken lines along.
    pub(crate) fn lines_taken_along(&self, lines: u64) {
        self.entries().taken_along.lines += lines;
    }

    /// containerd has taken the exit code of a container along.
    pub(crate) fn exit_taken_along(&self, container: &str) {
        let mut entries = self.entries();
        entries.taken_along.exits += 1;
        self.note_in(&mut entries, &format!("containerd has taken along how {container} ended"));
    }

    /// How long it took from a kill of the worker until the next one served, in this phase.
    pub(crate) fn served(&self, phase: &'static str, after: Duration) {
        self.entries().serving_ms.entry(phase).or_default().push(after.as_secs_f64() * 1e3);
    }

    /// How long calls took beside what did not answer: a line for each, and a broken promise for each that was slower than it may be.
    pub(crate) fn compared(&self, calls: BTreeMap<Call, Compared>) {
        for (call, compared) in &calls {
            let Compared { healthy, disturbed } = compared;
            let text = format!(
                "{call:?}: p99 {:.0} ms beside what does not answer ({} calls), else {:.0} ms ({}); at most {} ms slower is allowed",
                disturbed.p99_ms,
                disturbed.count,
                healthy.p99_ms,
                healthy.count,
                SLOWER.as_millis()
            );
            self.note(&text);
            if compared.is_slowed_down() {
                self.broke(Promise::Undisturbed, 1, &text);
            }
        }
        self.entries().beside = calls;
    }

    /// How long the first statistics of all pods took after guests got stuck.
    pub(crate) fn first_statistics(&self, first: FirstStatistics) {
        let FirstStatistics { guests, times, max_ms, limit_ms } = first;
        let text = format!(
            "the first statistics of all after {guests} guests got stuck took {max_ms:.0} ms at most ({times} times), of {limit_ms:.0} ms"
        );
        self.note(&text);
        if max_ms > limit_ms {
            self.broke(Promise::Undisturbed, 1, &text);
        }
        self.entries().first_statistics = Some(first);
    }

    /// Whether containerd has been killed since then.
    pub(crate) fn containerd_died_since(&self, then: Instant) -> bool {
        self.entries()
            .windows
            .values()
            .any(|window| window.what.kills_containerd() && window.ended.is_none_or(|ended| ended >= then))
    }

    /// Whether since then the disk was full while a worker died: what the OCI runtime had begun was written down nowhere.
    pub(crate) fn nothing_could_be_noted_since(&self, then: Instant) -> bool {
        let entries = self.entries();
        let since = |which: fn(Disturbance) -> bool| {
            let mut windows = entries.windows.values();
            windows.any(|window| which(window.what) && window.ended.is_none_or(|ended| ended >= then))
        };
        since(|what| what == Disturbance::Disk) && since(Disturbance::kills_worker)
    }

    /// A command was run twice because of that.
    pub(crate) fn ran_twice_unnoted(&self, about: &str) {
        let mut entries = self.entries();
        entries.twice_unnoted += 1;
        self.note_in(&mut entries, &format!("run twice, because the disk was full when the worker died: {about}"));
    }

    /// How many disturbances there were of those that `which` selects.
    pub(crate) fn disturbed(&self, which: impl Fn(Disturbance) -> bool) -> usize {
        self.entries().windows.values().filter(|window| which(window.what)).count()
    }

    /// All of it.
    pub(crate) fn sum(&self) -> Sum {
        let entries = self.entries();
        let mut disturbances: BTreeMap<Disturbance, u64> = BTreeMap::new();
        for window in entries.windows.values() {
            *disturbances.entry(window.what).or_default() += 1;
        }
        Sum {
            seconds: self.begun.elapsed().as_secs_f64(),
            disturbances,
            calls: entries.calls.clone(),
            broken: entries.broken.clone(),
            told: entries.told.clone(),
            reasons: entries.reasons.clone(),
            taken_along: entries.taken_along,
            twice_unnoted: entries.twice_unnoted,
            serving_ms: entries.serving_ms.clone(),
            beside: entries.beside.clone(),
            first_statistics: entries.first_statistics,
        }
    }
}

/// What it all came to.
#[derive(Debug, Serialize)]
pub(crate) struct Sum {
    pub(crate) seconds: f64,
    pub(crate) disturbances: BTreeMap<Disturbance, u64>,
    pub(crate) calls: BTreeMap<Call, Calls>,
    pub(crate) broken: BTreeMap<Promise, u64>,
    pub(crate) told: Vec<String>,
    pub(crate) reasons: BTreeMap<String, u64>,
    pub(crate) taken_along: TakenAlong,
    /// Commands run twice because the disk was full when the worker died.
    pub(crate) twice_unnoted: u64,
    /// Each time from a kill of the worker until the next one served.
    pub(crate) serving_ms: BTreeMap<&'static str, Vec<f64>>,
    /// Calls of other pods, in healthy phases and beside a hung volume and stuck guests.
    pub(crate) beside: BTreeMap<Call, Compared>,
    /// Statistics that find out that guests are stuck, which are not among those.
    pub(crate) first_statistics: Option<FirstStatistics>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(Path::new("/dev/null")).unwrap()
    }

    fn failed(ledger: &Ledger, call: Call, begun: Instant) -> bool {
        let before = ledger.sum().broken.get(&Promise::Succeeds).copied().unwrap_or(0);
        ledger.failed(call, begun, "it", &Status::unavailable("gone"));
        ledger.sum().broken.get(&Promise::Succeeds).copied().unwrap_or(0) == before
    }

    #[test]
    fn a_failure_needs_a_cause() {
        let ledger = ledger();
        let begun = Instant::now();
        assert!(!failed(&ledger, Call::RunPodSandbox, begun));
        let worker = ledger.begin(Disturbance::Worker, "");
        assert!(failed(&ledger, Call::RunPodSandbox, begun), "containerd does not repeat it");
        assert!(!failed(&ledger, Call::ExecSync, begun), "the next worker answers it");
        ledger.end(worker);
        assert!(failed(&ledger, Call::RunPodSandbox, Instant::now()));
        assert!(!failed(&ledger, Call::RunPodSandbox, Instant::now() + REDIAL + Duration::from_secs(1)));
        let containerd = ledger.begin(Disturbance::Containerd, "");
        ledger.end(containerd);
        assert!(failed(&ledger, Call::ExecSync, begun));
        assert!(ledger.containerd_died_since(begun));
        let calls = ledger.sum().calls;
        assert_eq!((calls[&Call::ExecSync].failed, calls[&Call::ExecSync].without_cause), (1, 1));
    }

    #[test]
    fn a_call_is_poison_after_three_deaths() {
        let ledger = ledger();
        let begun = Instant::now();
        let poison = Status::internal(format!("kuasard {POISON}, so it is not tried again"));
        let fail = || {
            ledger.failed(Call::StartContainer, begun, "it", &poison);
            ledger.sum().broken.get(&Promise::Succeeds).copied().unwrap_or(0)
        };
        for _ in 0..2 {
            ledger.end(ledger.begin(Disturbance::Worker, ""));
        }
        assert_eq!(fail(), 1);
        ledger.end(ledger.begin(Disturbance::Worker, ""));
        assert_eq!(fail(), 1);
    }

    #[test]
    fn what_kills_both_counts_for_both() {
        let ledger = ledger();
        for what in [Disturbance::Worker, Disturbance::Both, Disturbance::Containerd, Disturbance::Stop] {
            let number = ledger.begin(what, "");
            ledger.end(number);
        }
        assert_eq!(ledger.disturbed(Disturbance::kills_worker), 2);
        assert_eq!(ledger.disturbed(Disturbance::kills_containerd), 2);
    }
}
