//! A thread of its own for saving state: no other work of any pod can keep it from being done.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        OnceLock,
        mpsc::{Sender, channel},
    },
};

use tokio::sync::oneshot;

use crate::error::{Error, Result};

type Work = Box<dyn FnOnce() + Send>;

/// The way to the thread, which lives as long as the process. One is enough: state is on a tmpfs, where a save takes microseconds.
static QUEUE: OnceLock<Sender<Work>> = OnceLock::new();

/// Runs `work` after what was queued before.
///
/// # Errors
/// The work's own; also when the thread cannot be started, or the work panics.
pub(crate) async fn run<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    const OPERATION: &str = "save state";
    let queue = match QUEUE.get() {
        Some(queue) => queue,
        None => {
            let queue = start().map_err(Error::failed(OPERATION))?;
            QUEUE.get_or_init(|| queue)
        }
    };
    let (sender, done) = oneshot::channel();
    // That nobody waits any more does not matter: it is saved.
    let work = Box::new(move || drop(sender.send(work())));
    queue.send(work).map_err(|_| Error::failed(OPERATION)("its thread has ended"))?;
    done.await.map_err(|_| Error::failed(OPERATION)("it panicked"))?
}

fn start() -> std::io::Result<Sender<Work>> {
    let (queue, works) = channel::<Work>();
    let run = move || {
        for work in works {
            // The panic hook has reported it; `done` above sees that nothing comes.
            let _ = catch_unwind(AssertUnwindSafe(work));
        }
    };
    std::thread::Builder::new().name("kuasard-save".into()).spawn(run)?;
    Ok(queue)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};

    use super::*;

    #[test]
    fn saves_while_the_blocking_threads_are_taken() {
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        let (begun, end) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
        runtime.block_on(async {
            let hung = tokio::task::spawn_blocking({
                let (begun, end) = (begun.clone(), end.clone());
                move || (begun.wait(), end.wait())
            });
            begun.wait();
            assert_eq!(run(|| Ok(7)).await.unwrap(), 7);
            let error = run(|| if true { panic!("a defect") } else { Ok(()) }).await.unwrap_err();
            assert!(error.report().contains("panicked"), "{}", error.report());
            assert_eq!(run(|| Ok(8)).await.unwrap(), 8);
            end.wait();
            hung.await.unwrap();
        });
    }
}
