//! How much of what.

use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::ledger::{Disturbance, Ledger};
use crate::saboteur::CONTAINERD_EVERY;

/// A part of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Everything is disturbed, under load.
    Storm,
    /// Only the worker is killed, under load, with many pods: how long until it serves again.
    Serving,
    /// The daemon is replaced by itself, under load: no call fails.
    Upgrades,
    /// A volume hangs and guests get stuck: other pods' calls are as fast as ever.
    Hung,
    /// The whole daemon and containerd are killed, and started again.
    Keeper,
}

/// When the storm ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// When that many workers have been killed, and containerd a tenth as often.
    pub(crate) kills: Option<usize>,
    /// When the time is over.
    pub(crate) at: Instant,
}

impl End {
    pub(crate) fn new(kills: Option<usize>, minutes: f64) -> Self {
        // A number of kills has no time of its own, but an end all the same.
        Self { kills, at: Instant::now() + Duration::from_secs_f64(minutes * 60.0) }
    }

    /// Whether it has come.
    pub(crate) fn has_come(&self, ledger: &Ledger) -> bool {
        let [workers, containerds] =
            [Disturbance::kills_worker, Disturbance::kills_containerd].map(|which| ledger.disturbed(which));
        let enough = |kills: usize| workers >= kills && containerds >= kills / CONTAINERD_EVERY;
        Instant::now() >= self.at || self.kills.is_some_and(enough)
    }

    /// For a line of progress.
    pub(crate) fn progress(&self, ledger: &Ledger) -> String {
        let [workers, containerds] =
            [Disturbance::kills_worker, Disturbance::kills_containerd].map(|which| ledger.disturbed(which));
        let left = self.at.saturating_duration_since(Instant::now()).as_secs();
        format!("{workers} workers and {containerds} containerds killed, {left} s left at most")
    }
}
