//! The life of a sandbox and of a process: which request is allowed when, and what it leads to.
//!
//! ```text
//!  sandbox   ● ─create─▶ Created ─start─▶ Starting ─▶ Ready ─stop or its own end─▶ Stopping ─▶ Stopped ─delete─▶ ●
//!                           │                │ failed                                              ▲
//!                           │                └──────────▶ ● (deleted at once: containerd           │
//!                           └───────────── stop ────────────  never asks about it again) ──────────┘
//!
//!  process   ● ─create or exec─▶ Created ─start─▶ Running ◀─pause, resume─▶ Paused
//!                                   │                │                         │
//!                                   └────────────────┴────── exit ─────────────┴──▶ Stopped ─delete─▶ ●
//! ```
//!
//! The happy path of a pod: sandbox create, start; for each container create, start; kill, exit, delete; sandbox stop,
//! delete. Containers may be created only in a Ready sandbox; stopping the sandbox ends every process in it, so processes
//! reach Stopped by their exit and never by decree.
//!
//! Both tables are data. [`SandboxState::next`] and [`ProcessState::next`] are the only ways to change a state.

use std::{fmt, time::SystemTime};

use serde::{Deserialize, Serialize};

use crate::types::Exit;

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SandboxState {
    /// Prepared, nothing runs.
    Created,
    /// Being started.
    Starting,
    /// Containers can be created.
    Ready {
        /// The process that stands for it, where there is one.
        pid: Option<u32>,
        /// When it became ready.
        since: SystemTime,
    },
    /// Being stopped.
    Stopping,
    /// Nothing runs in it.
    Stopped {
        /// How it ended.
        exit: Exit,
    },
}

/// A [`SandboxState`] without its data: a row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SandboxPhase {
    Created,
    Starting,
    Ready,
    Stopping,
    Stopped,
}

/// What moves a sandbox from one state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SandboxStep {
    Start,
    Started {
        pid: Option<u32>,
        at: SystemTime,
    },
    Stop,
    /// Stopped by request, or its technique's process died.
    Ended {
        exit: Exit,
    },
}

/// What may be asked of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum SandboxRequest {
    Start,
    Stop,
    Delete,
    CreateContainer,
    Update,
}

impl SandboxState {
    /// The row of the table.
    #[must_use]
    pub fn phase(&self) -> SandboxPhase {
        match self {
            Self::Created => SandboxPhase::Created,
            Self::Starting => SandboxPhase::Starting,
            Self::Ready { .. } => SandboxPhase::Ready,
            Self::Stopping => SandboxPhase::Stopping,
            Self::Stopped { .. } => SandboxPhase::Stopped,
        }
    }

    /// Whether the request is allowed now.
    ///
    /// # Errors
    /// A [`Denial`] that says in which state the sandbox is and what to do.
    pub fn admit(&self, id: impl fmt::Display, request: SandboxRequest) -> Result<(), Denial> {
        use SandboxPhase as P;
        use SandboxRequest as R;
        let remedy = match (self.phase(), request) {
            (P::Created, R::Start | R::Stop | R::Delete | R::Update) => return Ok(()),
            (P::Ready, R::Stop | R::CreateContainer | R::Update) => return Ok(()),
            // Shutdown of a live sandbox is how containerd rolls a failed RunPodSandbox back.
            (_, R::Delete) => return Ok(()),
            // Stopping again is how the kubelet makes sure.
            (P::Starting | P::Stopping | P::Stopped, R::Stop) => return Ok(()),
            (P::Created, R::CreateContainer) => "start it first",
            (P::Starting, _) => "wait until it is ready",
            (P::Ready, R::Start) => "a sandbox is started once",
            (P::Stopping | P::Stopped, _) => "kubelet starts the pod anew, with crictl remove it and run it again",
        };
        Err(Denial {
            kind: "sandbox",
            id: id.to_string(),
            state: self.phase().name(),
            request: match request {
                R::Start => "start",
                R::Stop => "stop",
                R::Delete => "delete",
                R::CreateContainer => "create a container in",
                R::Update => "update",
            },
            remedy,
        })
    }

    /// The state after a step; `None` where the table has no such step.
    #[must_use]
    pub fn next(&self, step: SandboxStep) -> Option<Self> {
        use SandboxPhase as P;
        match (self.phase(), step) {
            (P::Created, SandboxStep::Start) => Some(Self::Starting),
            (P::Starting, SandboxStep::Started { pid, at }) => Some(Self::Ready { pid, since: at }),
            (P::Created | P::Starting | P::Ready, SandboxStep::Stop) => Some(Self::Stopping),
            (P::Created | P::Starting | P::Ready | P::Stopping, SandboxStep::Ended { exit }) => Some(Self::Stopped { exit }),
            _ => None,
        }
    }
}

impl SandboxPhase {
    /// As people read it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessState {
    /// Prepared. A container's first process has a pid already, an exec has none.
    Created {
        /// Its pid, where it exists.
        pid: Option<u32>,
    },
    /// Running.
    Running {
        /// Its pid.
        pid: u32,
    },
    /// Frozen.
    Paused {
        /// Its pid.
        pid: u32,
    },
    /// Ended.
    Stopped {
        /// The pid it had; 0 if it never existed.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
}

/// A [`ProcessState`] without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ProcessPhase {
    Created,
    Running,
    Paused,
    Stopped,
}

/// What moves a process from one state to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ProcessStep {
    Started { pid: u32 },
    Paused,
    Resumed,
    Exited { exit: Exit },
}

/// What may be asked of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ProcessRequest {
    Start,
    Kill,
    Exec,
    Delete,
    Pause,
    Resume,
    Update,
    Stats,
    Resize,
    CloseStdin,
}

impl ProcessState {
    /// The row of the table.
    #[must_use]
    pub fn phase(&self) -> ProcessPhase {
        match self {
            Self::Created { .. } => ProcessPhase::Created,
            Self::Running { .. } => ProcessPhase::Running,
            Self::Paused { .. } => ProcessPhase::Paused,
            Self::Stopped { .. } => ProcessPhase::Stopped,
        }
    }

    /// Its pid; 0 where there is none, as containerd writes it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        match *self {
            Self::Created { pid } => pid.unwrap_or(0),
            Self::Running { pid } | Self::Paused { pid } | Self::Stopped { pid, .. } => pid,
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        match *self {
            Self::Stopped { exit, .. } => Some(exit),
            _ => None,
        }
    }

    /// Whether the request is allowed now.
    ///
    /// # Errors
    /// A [`Denial`] that says in which state the process is and what to do.
    pub fn admit(&self, kind: &'static str, id: impl fmt::Display, request: ProcessRequest) -> Result<(), Denial> {
        use ProcessPhase as P;
        use ProcessRequest as R;
        let remedy = match (self.phase(), request) {
            (P::Created, R::Start | R::Kill | R::Delete | R::Update | R::Stats | R::Resize | R::CloseStdin) => return Ok(()),
            (P::Running, R::Kill | R::Exec | R::Pause | R::Update | R::Stats | R::Resize | R::CloseStdin) => return Ok(()),
            (P::Paused, R::Kill | R::Resume | R::Update | R::Stats | R::Resize | R::CloseStdin) => return Ok(()),
            // Closing twice is what a client does that lost an answer. containerd measures one that was killed, to see whether by its memory limit.
            (P::Stopped, R::Delete | R::CloseStdin | R::Stats) => return Ok(()),
            (P::Created, R::Exec | R::Pause | R::Resume) => "start it first",
            (P::Running | P::Paused, R::Start) => "a process is started once",
            (P::Running | P::Paused, R::Delete) => "kill it and wait for its exit first",
            (P::Running, R::Resume) => "only a paused container can be resumed",
            (P::Paused, R::Exec | R::Pause) => "resume it first",
            (P::Stopped, _) => "it has ended and can only be deleted",
        };
        Err(Denial {
            kind,
            id: id.to_string(),
            state: self.phase().name(),
            request: match request {
                R::Start => "start",
                R::Kill => "signal",
                R::Exec => "exec in",
                R::Delete => "delete",
                R::Pause => "pause",
                R::Resume => "resume",
                R::Update => "update",
                R::Stats => "measure",
                R::Resize => "resize the terminal of",
                R::CloseStdin => "close the stdin of",
            },
            remedy,
        })
    }

    /// The state after a step; `None` where the table has no such step. An exit is final.
    #[must_use]
    pub fn next(&self, step: ProcessStep) -> Option<Self> {
        match (*self, step) {
            (Self::Created { .. }, ProcessStep::Started { pid }) => Some(Self::Running { pid }),
            (Self::Running { pid }, ProcessStep::Paused) => Some(Self::Paused { pid }),
            (Self::Paused { pid }, ProcessStep::Resumed) => Some(Self::Running { pid }),
            (Self::Stopped { .. }, _) => None,
            (state, ProcessStep::Exited { exit }) => Some(Self::Stopped { pid: state.pid(), exit }),
            _ => None,
        }
    }
}

impl ProcessPhase {
    /// As people read it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A request that the state does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {request} {kind} {id:?}: it is {state}; {remedy}")]
pub struct Denial {
    /// `sandbox`, `container` or `exec`.
    pub kind: &'static str,
    /// Which.
    pub id: String,
    /// Its state.
    pub state: &'static str,
    /// What was asked.
    pub request: &'static str,
    /// What to do instead.
    pub remedy: &'static str,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn process_steps() -> impl Strategy<Value = ProcessStep> {
        prop_oneof![
            (1..9u32).prop_map(|pid| ProcessStep::Started { pid }),
            Just(ProcessStep::Paused),
            Just(ProcessStep::Resumed),
            (0..256u32).prop_map(|status| ProcessStep::Exited { exit: Exit::now(status) }),
        ]
    }

    fn sandbox_steps() -> impl Strategy<Value = SandboxStep> {
        prop_oneof![
            Just(SandboxStep::Start),
            Just(SandboxStep::Started { pid: None, at: SystemTime::now() }),
            Just(SandboxStep::Stop),
            (0..256u32).prop_map(|status| SandboxStep::Ended { exit: Exit::now(status) }),
        ]
    }

    const PROCESS_REQUESTS: [ProcessRequest; 10] = [
        ProcessRequest::Start,
        ProcessRequest::Kill,
        ProcessRequest::Exec,
        ProcessRequest::Delete,
        ProcessRequest::Pause,
        ProcessRequest::Resume,
        ProcessRequest::Update,
        ProcessRequest::Stats,
        ProcessRequest::Resize,
        ProcessRequest::CloseStdin,
    ];

    proptest! {
        #[test]
        fn an_exit_is_final_and_keeps_the_pid(steps in prop::collection::vec(process_steps(), 0..20)) {
            let mut state = ProcessState::Created { pid: Some(7) };
            let mut exit = None;
            let mut pid = 7;
            for step in steps {
                if let Some(next) = state.next(step) {
                    prop_assert_eq!(exit, None, "left Stopped by {:?}", step);
                    if let ProcessStep::Started { pid: started } = step {
                        pid = started;
                    }
                    state = next;
                    exit = state.exit();
                }
                prop_assert_eq!(state.pid(), pid);
            }
            prop_assert_eq!(state.exit(), exit);
        }

        #[test]
        fn what_a_step_needs_is_what_admission_allows(steps in prop::collection::vec(process_steps(), 0..20)) {
            let mut state = ProcessState::Created { pid: None };
            for step in steps {
                let request = match step {
                    ProcessStep::Started { .. } => Some(ProcessRequest::Start),
                    ProcessStep::Paused => Some(ProcessRequest::Pause),
                    ProcessStep::Resumed => Some(ProcessRequest::Resume),
                    ProcessStep::Exited { .. } => None,
                };
                if let Some(request) = request {
                    prop_assert_eq!(state.next(step).is_some(), state.admit("container", "c", request).is_ok());
                }
                state = state.next(step).unwrap_or(state);
            }
        }

        #[test]
        fn a_stopped_sandbox_stays_stopped(steps in prop::collection::vec(sandbox_steps(), 0..20)) {
            let mut state = SandboxState::Created;
            for step in steps {
                let next = state.next(step);
                if state.phase() == SandboxPhase::Stopped {
                    prop_assert_eq!(next, None);
                }
                let request = match step {
                    SandboxStep::Start => Some(SandboxRequest::Start),
                    _ => None,
                };
                if let Some(request) = request {
                    prop_assert_eq!(next.is_some(), state.admit("s", request).is_ok());
                }
                state = next.unwrap_or(state);
            }
        }
    }

    #[test]
    fn a_live_process_is_never_deleted_and_a_dead_one_always_can_be() {
        for state in [ProcessState::Running { pid: 1 }, ProcessState::Paused { pid: 1 }] {
            let denial = state.admit("container", "web", ProcessRequest::Delete).unwrap_err();
            assert_eq!(
                denial.to_string(),
                format!("cannot delete container \"web\": it is {}; kill it and wait for its exit first", state.phase().name())
            );
        }
        let stopped = ProcessState::Stopped { pid: 1, exit: Exit::now(0) };
        for request in PROCESS_REQUESTS {
            let allowed = matches!(request, ProcessRequest::Delete | ProcessRequest::CloseStdin | ProcessRequest::Stats);
            assert_eq!(stopped.admit("container", "web", request).is_ok(), allowed, "{request:?}");
        }
    }

    #[test]
    fn containers_only_in_a_ready_sandbox() {
        let ready = SandboxState::Ready { pid: None, since: SystemTime::now() };
        let stopped = SandboxState::Stopped { exit: Exit::now(0) };
        assert!(ready.admit("s", SandboxRequest::CreateContainer).is_ok());
        for state in [SandboxState::Created, SandboxState::Starting, SandboxState::Stopping, stopped] {
            assert!(state.admit("s", SandboxRequest::CreateContainer).is_err(), "{state:?}");
            assert!(state.admit("s", SandboxRequest::Delete).is_ok(), "{state:?}");
            assert!(state.admit("s", SandboxRequest::Stop).is_ok(), "{state:?}");
        }
    }
}
