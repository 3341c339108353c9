//! The stages of a start: what it was doing when it failed, and how long each part of it took.
//!
//! ```text
//!   owner task, registry ── Stages::scope ──▶ backend: enter("mount the rootfs"), enter("write the bundle"), …
//!                              └────────────▶ failures, if it comes to that
//! ```
//!
//! The record is local to the task that runs the operation: a backend names its stages without being handed anything, and operations
//! that run at the same time do not mix. What the operation spawns is outside, so a stage is entered before something is spawned for
//! it. Outside of an operation that is recorded nothing happens.

use std::{
    borrow::Cow,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::task::futures::TaskLocalFuture;

/// How much of a program's log is kept, in bytes from its end.
pub const LOG_LIMIT: usize = 32 << 10;

tokio::task_local! {
    static CURRENT: Stages;
}

/// Begins the next stage of the operation under way, which ends the one before. The name reads as an instruction
/// (`mount the rootfs`).
pub fn enter(stage: impl Into<Cow<'static, str>>) {
    // Nobody is interested outside of a recorded operation.
    let _ = CURRENT.try_with(|stages| stages.enter(stage));
}

/// Keeps what a program has logged that was called for the current stage and has failed, at most [`LOG_LIMIT`] bytes from the end. The
/// last one counts.
pub fn keep_log(program: impl Into<String>, text: &str) {
    let _ = CURRENT.try_with(|stages| stages.keep_log(program.into(), text));
}

/// Says that the current stage has failed: what follows takes back what was done, and is no part of the record.
pub(crate) fn fail() {
    let _ = CURRENT.try_with(Stages::fail);
}

/// A stage that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// What was being done.
    pub name: String,
    /// How long it took, to its end or failure.
    pub milliseconds: u64,
}

/// What a program has logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramLog {
    /// Its name or path.
    pub program: String,
    /// The end of what it wrote.
    pub text: String,
}

/// The record of one operation. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stages(Arc<Mutex<Record>>);

#[derive(Debug, Default)]
struct Record {
    begun: Vec<(Cow<'static, str>, Instant)>,
    failed: Option<Instant>,
    log: Option<ProgramLog>,
}

impl Stages {
    fn record(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it the record of all that `work` does in its own task.
    pub(crate) fn scope<F: Future>(&self, work: F) -> TaskLocalFuture<Self, F> {
        CURRENT.scope(self.clone(), work)
    }

    pub(crate) fn enter(&self, stage: impl Into<Cow<'static, str>>) {
        let mut record = self.record();
        if record.failed.is_none() {
            record.begun.push((stage.into(), Instant::now()));
        }
    }

    fn keep_log(&self, program: String, text: &str) {
        let mut record = self.record();
        if record.failed.is_none() {
            record.log = Some(ProgramLog { program, text: tail(text, LOG_LIMIT).to_owned() });
        }
    }

    fn fail(&self) {
        self.record().failed.get_or_insert_with(Instant::now);
    }

    /// What has been recorded up to the failure, which is now unless it was before. The last stage is the one that failed; without
    /// stages nothing had begun.
    pub(crate) fn account(&self) -> (Vec<Stage>, Option<ProgramLog>) {
        self.fail();
        let record = self.record();
        (record.stages(record.failed), record.log.clone())
    }

    /// What has been recorded, the last stage up to now.
    pub(crate) fn so_far(&self) -> Vec<Stage> {
        self.record().stages(Some(Instant::now()))
    }
}

impl Record {
    /// The stages, the last of which ends at `end`.
    fn stages(&self, end: Option<Instant>) -> Vec<Stage> {
        let ends = self.begun.iter().skip(1).map(|(_, begun)| *begun).chain(end);
        let stages = self.begun.iter().zip(ends).map(|((name, begun), end)| Stage {
            name: name.to_string(),
            milliseconds: rounded(end.saturating_duration_since(*begun)),
        });
        stages.collect()
    }
}

fn rounded(duration: Duration) -> u64 {
    u64::try_from((duration.as_micros() + 500) / 1000).unwrap_or(u64::MAX)
}

/// The last `limit` bytes, less what would be half a character.
fn tail(text: &str, limit: usize) -> &str {
    let start = text.len().saturating_sub(limit);
    (start..=text.len()).find_map(|start| text.get(start..)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{error::Error, undo::Undo};

    fn names(stages: &Stages) -> Vec<String> {
        stages.account().0.into_iter().map(|stage| stage.name).collect()
    }

    #[tokio::test]
    async fn operations_at_the_same_time_do_not_mix() {
        let work = async |name: &'static str| {
            let stages = Stages::default();
            let work = async {
                for _ in 0..3 {
                    enter(name);
                    tokio::task::yield_now().await;
                }
            };
            stages.scope(work).await;
            names(&stages)
        };
        let (one, other) = tokio::join!(work("one"), work("other"));
        assert_eq!((one, other), (vec!["one".to_owned(); 3], vec!["other".to_owned(); 3]));
    }

    #[tokio::test]
    async fn outside_of_an_operation_nothing_is_recorded() {
        let stages = Stages::default();
        enter("nothing");
        keep_log("nothing", "nothing");
        let spawned = async { tokio::spawn(async { enter("elsewhere") }).await };
        stages.scope(spawned).await.unwrap();
        assert_eq!(stages.account(), (Vec::new(), None));
    }

    #[tokio::test]
    async fn taking_back_is_no_part_of_the_record() {
        let stages = Stages::default();
        let work = async {
            enter("first");
            std::thread::sleep(Duration::from_millis(5));
            enter(format!("second of {}", 2));
            keep_log("runc", "why");
            let mut undo = Undo::new("test");
            undo.push("take back", async {
                enter("take back");
                keep_log("runc", "something else");
                std::thread::sleep(Duration::from_millis(50));
                Ok(())
            });
            undo.settle(Err::<(), _>(Error::invalid("x", "y"))).await
        };
        stages.scope(work).await.unwrap_err();
        let (stages, log) = stages.account();
        assert_eq!(stages.iter().map(|stage| stage.name.as_str()).collect::<Vec<_>>(), ["first", "second of 2"]);
        assert!(stages[0].milliseconds >= 5 && stages[1].milliseconds < 50, "{stages:?}");
        assert_eq!(log, Some(ProgramLog { program: "runc".into(), text: "why".into() }));
    }

    #[test]
    fn the_end_of_a_long_log_is_kept() {
        assert_eq!(tail("short", 10), "short");
        assert_eq!(tail("ééé", 3), "é");
        assert_eq!(tail("", 0), "");
        let stages = Stages::default();
        stages.keep_log("runc".into(), &format!("{}the reason", "é".repeat(LOG_LIMIT)));
        let log = stages.account().1.unwrap();
        assert!(log.text.len() <= LOG_LIMIT && log.text.ends_with("the reason"));
    }
}
