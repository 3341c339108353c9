//! Commands in the node, by ssh over one kept connection.
//!
//! ssh has 255 for its own failures as well as for the command's: the node notes when it was the command's. With the configuration in the
//! node's directory, anybody on this machine can join in: `ssh -F <directory>/ssh_config node`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::child::Bound;
use crate::wait;

/// What ssh ends with when it fails itself.
const SSH_FAILED: i32 = 255;
/// How long a script may take where nothing else is said.
const TIMEOUT: Duration = Duration::from_secs(120);
/// What a script may take longer here than there, on a busy machine.
const SLACK: Duration = Duration::from_secs(30);
/// How long ssh may take to log in, in an emulated machine.
const LOGIN: Duration = Duration::from_secs(60);

/// Which of its streams a command has written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Its exit code; 128 and the signal's number when it was killed.
    pub code: i32,
    /// Its standard output.
    pub out: Vec<u8>,
    /// Its standard error.
    pub err: Vec<u8>,
}

impl Ran {
    /// Standard output as text, without the last newline.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.out).trim_end_matches('\n').to_owned()
    }

    /// Standard error as text, without the last newline.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.err).trim_end_matches('\n').to_owned()
    }
}

/// How ssh, scp and people who debug get into the node.
#[derive(Debug)]
pub(super) struct Channel {
    dir: PathBuf,
    connection: Option<Bound>,
    forwards: Vec<(PathBuf, String)>,
    next: AtomicU32,
}

impl Channel {
    /// Writes the configuration into a directory that has the image's `key` and `known_hosts`.
    pub(super) fn new(dir: &Path, port: u16) -> Result<Self> {
        let mut text = format!("Host node\n  HostName 127.0.0.1\n  Port {port}\n  User root\n");
        for (key, file) in [("IdentityFile", "key"), ("UserKnownHostsFile", "known_hosts"), ("ControlPath", "connection")] {
            let _infallible = writeln!(text, "  {key} {}", dir.join(file).display());
        }
        text.push_str("  HostKeyAlias node\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n  BatchMode yes\n");
        // Of those that need no instructions of the processor's, the quickest. A busy machine may not answer for a while.
        text.push_str("  Ciphers chacha20-poly1305@openssh.com\n  LogLevel ERROR\n");
        text.push_str("  ServerAliveInterval 15\n  ServerAliveCountMax 8\n");
        let channel = Self { dir: dir.to_path_buf(), connection: None, forwards: Vec::new(), next: AtomicU32::new(0) };
        std::fs::write(channel.config(), text).with_context(|| format!("write {}", channel.config().display()))?;
        Ok(channel)
    }

    fn config(&self) -> PathBuf {
        self.dir.join("ssh_config")
    }

    fn ssh(&self) -> Command {
        let mut command = Command::new("ssh");
        command.arg("-F").arg(self.config()).kill_on_drop(true);
        command
    }

    /// Logs in, and makes the forwards of the connection before anew.
    pub(super) async fn connect(&mut self) -> Result<()> {
        self.disconnect()?;
        let path = self.dir.join("connection");
        let mut command = Bound::command(Path::new("ssh"));
        command.arg("-F").arg(self.config()).args(["-N", "-o", "ControlMaster=yes", "node"]);
        let connection = self.connection.insert(Bound::spawn("the ssh connection", command, &self.dir.join("ssh.log"))?);
        wait::until("ssh to log in", LOGIN, || async {
            connection.check_running()?;
            Ok(path.exists().then_some(()))
        })
        .await?;
        for (local, remote) in &self.forwards {
            self.open_forward(local, remote).await?;
        }
        Ok(())
    }

    /// Ends the connection, and all that runs over it.
    pub(super) fn disconnect(&mut self) -> Result<()> {
        if let Some(mut connection) = self.connection.take() {
            connection.kill()?;
        }
        let stale = std::iter::once(self.dir.join("connection")).chain(self.forwards.iter().map(|(local, _)| local.clone()));
        for path in stale.filter(|path| path.exists()) {
            std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        Ok(())
    }

    /// A socket of the node's, as one in the directory; also over the next connections.
    pub(super) async fn forward(&mut self, remote: &str) -> Result<PathBuf> {
        let local = self.dir.join(format!("forward-{}", self.forwards.len()));
        self.open_forward(&local, remote).await?;
        self.forwards.push((local.clone(), remote.to_owned()));
        Ok(local)
    }

    async fn open_forward(&self, local: &Path, remote: &str) -> Result<()> {
        let what = format!("{}:{remote}", local.display());
        let output = self.ssh().args(["-O", "forward", "-L", &what, "node"]).stdin(Stdio::null()).output().await?;
        ensure!(output.status.success(), "forward {what}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// Copies files: `from` and `to` as scp(1) has them, the node's with `node:` before it.
    pub(super) async fn copy(&self, from: &str, to: &str) -> Result<()> {
        let mut command = Command::new("scp");
        command.arg("-F").arg(self.config()).args(["-q", "-r", "-p", "--", from, to]).stdin(Stdio::null()).kill_on_drop(true);
        let output = command.output().await.context("run scp")?;
        ensure!(output.status.success(), "copy {from} to {to}: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// A terminal, or a command in one, with this process's own streams.
    pub(super) async fn terminal(&self, command: Option<&str>) -> Result<ExitStatus> {
        let mut ssh = self.ssh();
        // A second -t would force one where there is none.
        ssh.arg("-t").args(["-o", "RequestTTY=auto", "node"]).args(command);
        ssh.status().await.context("run ssh")
    }
}

/// Is shown what a script prints.
pub type Watch<'a> = dyn FnMut(Stream, &[u8]) + Send + 'a;

/// A script for the node's bash.
pub struct Script<'a> {
    channel: &'a Channel,
    text: String,
    timeout: Duration,
    stdin: Vec<u8>,
    watch: Option<&'a mut Watch<'a>>,
}

impl<'a> Script<'a> {
    pub(super) fn new(channel: &'a Channel, text: &str) -> Self {
        Self { channel, text: text.to_owned(), timeout: TIMEOUT, stdin: Vec::new(), watch: None }
    }

    /// How long it may take: two minutes, when nothing is said. What has not ended then is killed.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// What it reads on standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: &[u8]) -> Self {
        self.stdin = bytes.to_vec();
        self
    }

    /// Shows what it prints, as it comes.
    #[must_use]
    pub fn watch(mut self, watch: &'a mut Watch<'a>) -> Self {
        self.watch = Some(watch);
        self
    }

    /// Runs it to its end: until all have closed its standard output and error.
    ///
    /// # Errors
    /// The node cannot be reached, or the script took too long. That it fails is none.
    pub async fn run(mut self) -> Result<Ran> {
        let number = self.channel.next.fetch_add(1, Ordering::Relaxed);
        let mark = format!("/run/kuasar-script-{number}");
        let remote = format!(
            "timeout --kill-after=5 {} bash -c {}; code=$?; [ $code -ne {SSH_FAILED} ] || : >{mark}; exit $code",
            self.timeout.as_secs_f32(),
            quote(&self.text)
        );
        let begun = Instant::now();
        let limit = self.timeout + SLACK;
        let ran = match tokio::time::timeout(limit, self.remote(&remote)).await {
            Ok(ran) => ran?,
            Err(_) => bail!("the node did not answer within {} s: {}", limit.as_secs(), self.text),
        };
        // With 124, and with 137 where it had to be killed.
        if begun.elapsed() >= self.timeout && [124, 137].contains(&ran.code) {
            bail!("not done after {} s: {}; it printed {:?}", self.timeout.as_secs_f32(), self.text, ran.stdout());
        }
        if ran.code == SSH_FAILED {
            let look = tokio::time::timeout(SLACK, self.remote(&format!("rm {mark}"))).await;
            let is_own = matches!(&look, Ok(Ok(looked)) if looked.code == 0);
            ensure!(is_own, "the connection broke while the node ran {}: {}", self.text, ran.stderr());
        }
        Ok(ran)
    }

    /// Runs it, and fails if it does; returns its standard output.
    ///
    /// # Errors
    /// It fails, or as [`Script::run`] does.
    pub async fn check(self) -> Result<String> {
        let text = self.text.clone();
        let ran = self.run().await?;
        ensure!(ran.code == 0, "{text}: exit code {}: {} {}", ran.code, ran.stderr(), ran.stdout());
        Ok(ran.stdout())
    }

    async fn remote(&mut self, remote: &str) -> Result<Ran> {
        let mut command = self.channel.ssh();
        command.args(["-T", "node", remote]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0);
        let mut child = command.spawn().context("run ssh")?;
        let (mut stdin, mut stdout, mut stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let bytes = std::mem::take(&mut self.stdin);
        let feed = async {
            if let Some(stdin) = &mut stdin {
                match stdin.write_all(&bytes).await {
                    // What does not read all of it may have its reasons.
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
                    written => written.context("write to ssh")?,
                }
            }
            drop(stdin.take());
            Ok::<_, anyhow::Error>(())
        };
        let watch = &mut self.watch;
        let collect = async {
            let (mut out, mut err) = (Vec::new(), Vec::new());
            let (mut out_buffer, mut err_buffer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
            while stdout.is_some() || stderr.is_some() {
                let (stream, length) = tokio::select! {
                    length = read(&mut stdout, &mut out_buffer), if stdout.is_some() => (Stream::Out, length?),
                    length = read(&mut stderr, &mut err_buffer), if stderr.is_some() => (Stream::Err, length?),
                };
                let (all, buffer) = match stream {
                    Stream::Out => (&mut out, &out_buffer),
                    Stream::Err => (&mut err, &err_buffer),
                };
                all.extend_from_slice(&buffer[..length]);
                if let Some(watch) = watch.as_mut()
                    && length > 0
                {
                    watch(stream, &buffer[..length]);
                }
            }
            Ok::<_, anyhow::Error>((out, err))
        };
        let ((), (out, err)) = tokio::try_join!(feed, collect)?;
        let status = child.wait().await.context("wait for ssh")?;
        let code = status.code().with_context(|| format!("ssh ended by itself: {status}"))?;
        Ok(Ran { code, out, err })
    }
}

/// Reads what there is; closes the stream at its end.
async fn read<R: AsyncRead + Unpin>(stream: &mut Option<R>, buffer: &mut [u8]) -> Result<usize> {
    let Some(open) = stream else { return Ok(0) };
    let length = open.read(buffer).await.context("read from ssh")?;
    if length == 0 {
        *stream = None;
    }
    Ok(length)
}

/// One word for a shell.
#[must_use]
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_gives_back_what_is_quoted() -> Result<()> {
        for text in ["", "a b", "it's", "$(false) `x` \\ \"y\"", "two\nlines"] {
            let command = format!("printf %s {}", quote(text));
            let output = std::process::Command::new("sh").args(["-c", &command]).output()?;
            assert_eq!(String::from_utf8(output.stdout)?, text);
        }
        Ok(())
    }
}
