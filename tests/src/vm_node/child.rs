//! A child process that the kernel ends with this one, whatever ends this one.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{process, wait};

/// A child that does not outlive this process. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Bound {
    name: String,
    pidfd: OwnedFd,
    // The kernel signals the child when the thread ends that started it, not the process.
    parent: Option<JoinHandle<std::io::Result<ExitStatus>>>,
    log: PathBuf,
}

impl Bound {
    /// The command to start `program` with: setpriv(1) asks for the signal, setsid(1) leaves the terminal, and both become the program.
    /// ssh serves other processes' terminals, and would be stopped as one in the background of its own.
    pub(super) fn command(program: &Path) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "setsid"]).arg(program);
        command
    }

    /// Starts what [`Bound::command`] has begun; what it prints goes to `log`.
    pub(super) fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out = std::fs::File::create(log).with_context(|| format!("create {}", log.display()))?;
        let err = out.try_clone()?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let (report, started) = mpsc::sync_channel(1);
        let parent = std::thread::Builder::new().name(format!("parent of {name}")).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let copy = std::io::Error::from(error.kind());
                    let _ = report.send(Err(error));
                    return Err(copy);
                }
            };
            // Not reaped yet, so the pid is its own.
            let pidfd = Pid::from_raw(child.id().cast_signed())
                .ok_or_else(|| std::io::Error::other("a child without a pid"))
                .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
            let unseen = pidfd.is_err();
            if report.send(pidfd).is_err() || unseen {
                child.kill()?;
            }
            child.wait()
        })?;
        let pidfd = started.recv().with_context(|| format!("the thread that starts {name} ended"))?;
        let pidfd = pidfd.with_context(|| format!("start {name}"))?;
        Ok(Self { name: name.to_owned(), pidfd, parent: Some(parent), log: log.to_path_buf() })
    }

    /// Whether it has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.parent.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Fails, with what it has printed last, when it has ended.
    pub(super) fn check_running(&self) -> Result<()> {
        if self.has_ended() {
            bail!("{} ended:\n{}", self.name, process::tail(&self.log, 20));
        }
        Ok(())
    }

    /// Waits for it to end by itself.
    pub(super) async fn ended(&mut self, deadline: Duration) -> Result<ExitStatus> {
        wait::until(&format!("the end of {}", self.name), deadline, || async { Ok(self.has_ended().then_some(())) }).await?;
        self.reap()
    }

    /// SIGKILL, and reaps it.
    pub(super) fn kill(&mut self) -> Result<()> {
        if self.parent.is_none() {
            return Ok(());
        }
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => self.reap().map(drop),
            Err(errno) => Err(errno).with_context(|| format!("kill {}", self.name)),
        }
    }

    fn reap(&mut self) -> Result<ExitStatus> {
        let parent = self.parent.take().with_context(|| format!("{} has been waited for", self.name))?;
        let status = parent.join().map_err(|_| anyhow!("the thread that waits for {} panicked", self.name))?;
        status.with_context(|| format!("wait for {}", self.name))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_when_it_is_dropped_and_tells_how_it_ended() -> Result<()> {
        let dir = tempfile::tempdir()?;
        let mut command = Bound::command(Path::new("sh"));
        command.args(["-c", "echo $$; exec sleep 1000"]);
        let log = dir.path().join("log");
        let child = Bound::spawn("a shell", command, &log)?;
        assert!(wait::until_sync(Duration::from_secs(10), || process::tail(&log, 1).parse::<i32>().is_ok()));
        let pid: i32 = process::tail(&log, 1).parse()?;
        child.check_running()?;
        drop(child);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());

        let mut command = Bound::command(Path::new("sh"));
        command.args(["-c", "echo why >&2; exit 7"]);
        let mut child = Bound::spawn("a shell", command, &log)?;
        let status = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()?
            .block_on(child.ended(Duration::from_secs(10)))?;
        assert_eq!(status.code(), Some(7));
        assert!(child.check_running().unwrap_err().to_string().contains("why"));
        Ok(())
    }
}
