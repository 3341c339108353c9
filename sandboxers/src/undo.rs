//! A stack of how to take back what a start has done so far.

use futures::future::BoxFuture;
use tracing::error;

use crate::{error::Result, stages};

/// Steps that take an operation back, newest first. Each successful step of a start pushes one; the end either
/// [disarms](Self::disarm) the stack or [unwinds](Self::unwind) it.
pub struct Undo {
    operation: &'static str,
    steps: Vec<(String, BoxFuture<'static, Result<()>>)>,
}

impl Undo {
    /// An empty stack; `operation` names in the log what is taken back (`create container`).
    #[must_use]
    pub fn new(operation: &'static str) -> Self {
        Self { operation, steps: Vec::new() }
    }

    /// Adds a step; `what` reads as an instruction (`unmount /x`).
    pub fn push(&mut self, what: impl Into<String>, step: impl Future<Output = Result<()>> + Send + 'static) {
        self.steps.push((what.into(), Box::pin(step)));
    }

    /// Adds another stack on top, as of a part that ran beside others.
    pub fn append(&mut self, mut other: Self) {
        self.steps.append(&mut other.steps);
    }

    /// Forgets the steps: the operation has succeeded, and someone else owns what it made.
    pub fn disarm(mut self) {
        self.steps.clear();
    }

    /// Runs the steps, newest first. A step that fails is logged and the rest still run.
    pub async fn unwind(mut self) {
        stages::fail();
        while let Some((what, step)) = self.steps.pop() {
            if let Err(error) = step.await {
                error!(operation = self.operation, step = what, error = error.report(), "failed to undo a step");
            }
        }
    }

    /// Ends the operation: disarms after success, unwinds after failure, and passes the result on.
    pub async fn settle<T>(self, result: Result<T>) -> Result<T> {
        if result.is_ok() {
            self.disarm();
        } else {
            self.unwind().await;
        }
        result
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for (what, _) in self.steps.iter().rev() {
            error!(operation = self.operation, step = what, "a step was neither undone nor kept: the operation panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::error::Error;

    #[tokio::test]
    async fn unwinds_newest_first_and_skips_none() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::new("test");
        for step in 0..3 {
            let seen = seen.clone();
            undo.push(format!("step {step}"), async move {
                seen.lock().unwrap().push(step);
                if step == 1 { Err(Error::invalid("step", "fails")) } else { Ok(()) }
            });
        }
        let result: Result<()> = undo.settle(Err(Error::invalid("x", "y"))).await;
        assert!(result.is_err());
        assert_eq!(*seen.lock().unwrap(), [2, 1, 0]);
    }

    #[tokio::test]
    async fn success_keeps_everything() {
        let mut undo = Undo::new("test");
        undo.push("never", async { panic!("must not run") });
        undo.settle(Ok(())).await.unwrap();
    }
}
