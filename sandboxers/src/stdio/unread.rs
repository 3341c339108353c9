//! Output that is not read yet when its process has ended.
//!
//! What is in a FIFO is lost when the last that has it open goes, and containerd may be away. So the writing end that the keeper holds is kept
//! until containerd has read all, or the process is deleted. It is a writing end only: so the kernel tells whether there is a reader.

use std::{os::fd::AsFd, path::PathBuf, time::Duration};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::ioctl_fionread,
};
use tokio::time::sleep;
use tracing::{debug, info};

use super::Fifo;
use crate::{
    error::{Error, Result},
    fdstore::Held,
};

/// How often to look whether a reader has come, or has read all. FIFOs have no event for either.
const LOOK: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(200)];

/// A FIFO for output, whose writing end is left with the keeper.
#[derive(Debug)]
pub(super) struct OutputFifo {
    path: PathBuf,
    _held: Held,
}

/// How a FIFO is that no process writes to any more.
enum Rest {
    /// Nothing is in it, or it is gone.
    Nothing,
    /// Whoever reads it gets the rest, whether we have it open or not.
    BeingRead,
    /// It would be lost. Its size in bytes.
    Unread(u64),
}

impl OutputFifo {
    pub(super) fn new(path: PathBuf, held: Held) -> Self {
        Self { path, _held: held }
    }

    fn rest(&self) -> Result<Rest> {
        let fifo = match Fifo::find("output", &self.path) {
            Ok(fifo) => fifo,
            // containerd has removed it, with the container.
            Err(Error::Invalid { .. }) => return Ok(Rest::Nothing),
            Err(error) => return Err(error),
        };
        // First: what we open for looking would count as a reader.
        if fifo.writer_if_read()?.is_some() {
            return Ok(Rest::BeingRead);
        }
        match ioctl_fionread(fifo.both()?) {
            Ok(0) | Err(_) => Ok(Rest::Nothing),
            Ok(size) => Ok(Rest::Unread(size)),
        }
    }

    /// Whether something would be lost if it were closed.
    pub(super) fn is_unread(&self) -> bool {
        match self.rest() {
            Ok(Rest::Unread(bytes)) => {
                info!(fifo = %self.path.display(), bytes, "output is kept until containerd reads it");
                true
            }
            Ok(Rest::Nothing | Rest::BeingRead) => false,
            Err(error) => {
                debug!(error = error.report(), "cannot find out yet whether output was read");
                true
            }
        }
    }

    /// Waits until a reader has taken all, and closes it.
    pub(super) async fn until_read(self) {
        let [mut pause, longest] = LOOK;
        loop {
            let reading = Fifo::find("output", &self.path).and_then(|fifo| fifo.writer_if_read());
            match reading {
                Err(Error::Invalid { .. }) => return,
                // Without a reader, or without descriptors to look for one.
                Ok(None) | Err(_) => {
                    sleep(pause).await;
                    pause = longest.min(2 * pause);
                }
                Ok(Some(writer)) => loop {
                    // It may go away again, as a containerd that crashes.
                    let mut polled = [PollFd::new(&writer, PollFlags::empty())];
                    let gone =
                        poll(&mut polled, Some(&Timespec::default())).is_ok() && polled[0].revents().contains(PollFlags::ERR);
                    if gone {
                        break;
                    }
                    if !matches!(ioctl_fionread(&writer), Ok(1..)) {
                        return;
                    }
                    sleep(LOOK[0]).await;
                },
            }
        }
    }
}

/// Waits until a pipe that is held open here is empty. Its reader takes what was written last in a moment, or is away.
pub(crate) async fn until_empty(pipe: &impl AsFd) {
    let (mut pause, [_, longest]) = (Duration::from_millis(1), LOOK);
    while matches!(ioctl_fionread(pipe), Ok(1..)) {
        sleep(pause).await;
        pause = longest.min(2 * pause);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use tokio::time::timeout;

    use super::*;
    use crate::fdstore::MemoryHolder;

    #[tokio::test(start_paused = true)]
    async fn output_is_kept_while_it_cannot_be_looked_at() {
        let (dir, holder) = (tempfile::tempdir().unwrap(), MemoryHolder::default());
        let (_, writer) = std::io::pipe().unwrap();
        let held = holder.store().leave("out".into(), &[writer.as_fd()]).unwrap();
        let path = dir.path().join("out");
        // An error that says nothing of the FIFO.
        symlink(&path, &path).unwrap();
        let output = OutputFifo::new(path.clone(), held);
        assert!(output.is_unread());
        let mut read = tokio::spawn(output.until_read());
        assert!(timeout(Duration::from_secs(60), &mut read).await.is_err());
        assert_eq!(holder.names(), ["out"]);
        fs::remove_file(path).unwrap();
        read.await.unwrap();
        assert!(holder.names().is_empty());
    }
}
