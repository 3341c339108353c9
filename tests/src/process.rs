//! A daemon as a child process: started with a log file, stopped by pid, never left behind.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait;

/// How long a daemon may take to end after SIGTERM before it is killed.
pub const TERM_GRACE: Duration = Duration::from_secs(10);

/// A running child process with a log file.
///
/// It is a process group of its own: Ctrl-C reaches the test or the demo, which then stops its daemons in order.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command`; what it prints is appended to `log`.
    ///
    /// # Errors
    /// The log cannot be opened, or the program cannot be run.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let out = append(log)?;
        let err = out.try_clone().with_context(|| format!("duplicate {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {name} ({})", command.get_program().to_string_lossy()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_path_buf() })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Fails, with the end of the log, when the process has ended.
    ///
    /// # Errors
    /// The process has ended or cannot be waited for.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended ({}); its log ends:\n{}", self.name, describe(status), self.log_tail());
        }
        Ok(())
    }

    /// The last lines of the log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.log, 40)
    }

    /// Sends `signal`.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid()), signal).with_context(|| format!("send {signal} to {}", self.name))
    }

    /// SIGTERM, and SIGKILL after [`TERM_GRACE`]. Having to kill is an error.
    ///
    /// # Errors
    /// The process did not end by itself, or had ended before.
    pub fn terminate(mut self) -> Result<ExitStatus> {
        self.check_running()?;
        self.signal(Signal::SIGTERM)?;
        if let Some(status) = self.wait_for(TERM_GRACE)? {
            return Ok(status);
        }
        let tail = self.log_tail();
        let name = self.name.clone();
        self.kill()?;
        bail!("{name} did not end within {} s of SIGTERM; its log ends:\n{tail}", TERM_GRACE.as_secs())
    }

    /// Waits for the process to end by itself; `None` when it has not in time.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn wait_for(&mut self, deadline: Duration) -> Result<Option<ExitStatus>> {
        let mut result = Ok(None);
        wait::until_sync(deadline, || {
            result = self.child.try_wait();
            !matches!(result, Ok(None))
        });
        result.with_context(|| format!("wait for {}", self.name))
    }

    /// SIGKILL, and reaps it.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn kill(mut self) -> Result<()> {
        self.kill_now()
    }

    fn kill_now(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            self.child.kill().with_context(|| format!("kill {}", self.name))?;
            self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.kill_now() {
            eprintln!("{error:#}");
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

fn append(path: &Path) -> Result<File> {
    OpenOptions::new().create(true).append(true).open(path).with_context(|| format!("open {}", path.display()))
}

/// The last `lines` lines of a file; what went wrong when it cannot be read.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = text.lines().collect();
            all[all.len().saturating_sub(lines)..].join("\n")
        }
        Err(error) => format!("(cannot read {}: {error})", path.display()),
    }
}

/// The last `count` bytes of a file, without reading the rest; none while it does not exist.
///
/// # Errors
/// The file cannot be read.
pub fn tail_bytes(path: &Path, count: u64) -> Result<String> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error).with_context(|| format!("open {}", path.display())),
    };
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(count)))?;
    let mut bytes = Vec::new();
    file.take(count).read_to_end(&mut bytes).with_context(|| format!("read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Runs a program to its end and returns what it printed. It is a process group of its own, as a [`Daemon`] is.
///
/// # Errors
/// It cannot be run, or fails; the error carries its stderr.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .process_group(0)
        .output()
        .with_context(|| format!("run {}", command.get_program().to_string_lossy()))?;
    if !output.status.success() {
        bail!(
            "{} {} failed ({}): {}",
            command.get_program().to_string_lossy(),
            command.get_args().map(|arg| arg.to_string_lossy()).collect::<Vec<_>>().join(" "),
            describe(output.status),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
