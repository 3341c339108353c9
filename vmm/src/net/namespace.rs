//! Work in another network namespace.

use std::{fs::File, io, path::Path, thread};

use kuasar_sandboxers::{Error, Result};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};
use tokio::sync::oneshot;

/// Runs `work` in the network namespace at a path; `None` when there is none any more.
///
/// On a thread of its own, which ends with it: a thread of tokio's would come back to other work in the wrong namespace if anything went
/// amiss.
pub(super) async fn within<T: Send + 'static>(
    netns: &Path,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<Option<T>> {
    let path = netns.to_owned();
    let (done, result) = oneshot::channel();
    let run = move || {
        let outcome = enter(&path).and_then(|entered| if entered { work().map(Some) } else { Ok(None) });
        // Whoever asked may have gone away; then what was made is dropped with the answer.
        drop(done.send(outcome));
    };
    thread::Builder::new().name("netns".into()).spawn(run).map_err(Error::failed("start a thread for the pod's network"))?;
    result.await.map_err(Error::failed(format!("work in network namespace {}", netns.display())))?
}

fn enter(netns: &Path) -> Result<bool> {
    let file = match File::open(netns) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("open network namespace", netns)(error)),
    };
    match setns(file, CloneFlags::CLONE_NEWNET) {
        Ok(()) => Ok(true),
        // The file that it was mounted on: it has been unmounted.
        Err(Errno::EINVAL) => Ok(false),
        Err(errno) => Err(Error::io("enter network namespace", netns)(errno.into())),
    }
}
