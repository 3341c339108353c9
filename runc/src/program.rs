//! `kuasar-init`, ready to run: the program of `init/main.rs`, in memory.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::Write,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use kuasar_sandboxers::{Error, Result, reaper::Reaper};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::timeout};

use crate::runtime::{MemoryFile, listen};

/// Built by `build.rs`.
static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kuasar-init"));

/// It works for less than a millisecond; a node that swaps may need longer.
const LIMIT: Duration = Duration::from_secs(20);

/// The program in memory; every process that runs it shares the pages.
pub(crate) fn image() -> Result<&'static MemoryFile> {
    static FILE: OnceLock<MemoryFile> = OnceLock::new();
    if let Some(image) = FILE.get() {
        return Ok(image);
    }
    let image = MemoryFile::executable("kuasar-init", IMAGE)?;
    // Another thread may have been as fast; its own will do.
    Ok(FILE.get_or_init(|| image))
}

/// Writes it as a program.
pub(crate) fn write(path: &Path) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let create = || fs::File::options().write(true).create_new(true).mode(0o755).open(path)?.write_all(IMAGE);
    create().map_err(Error::io("write", path))
}

/// The program, and the mount namespace without a file that process 1 of pods lives in. Clones share both.
#[derive(Clone, Debug)]
pub(crate) struct InitProgram(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    empty_root: File,
    reaper: Reaper,
}

impl InitProgram {
    /// Puts it into memory. `scratch` is a directory to mount on, inside the new mount namespace only.
    pub(crate) async fn load(scratch: &Path, reaper: Reaper) -> Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(scratch).map_err(Error::io("create", scratch))?;
        let mut argument = OsString::from("empty-root=");
        argument.push(scratch);
        let mut command = command()?;
        command.arg(argument).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = reaper.spawn(&mut command)?;
        let (Some(mut stdin), Some(stdout), Some(stderr)) = (child.stdin, child.stdout, child.stderr) else {
            return Err(Error::failed("start kuasar-init")("it has no pipes"));
        };
        let watch = |fd| pipe::Receiver::from_owned_fd(fd).map_err(Error::failed("watch a pipe"));
        let (mut stdout, mut stderr) = (watch(stdout)?, watch(stderr)?);
        let ready = async {
            let mut line = [0; 1];
            match stdout.read(&mut line).await {
                Ok(1) => {
                    File::open(format!("/proc/{}/ns/mnt", child.pid)).map_err(Error::failed("open the empty mount namespace"))
                }
                _ => {
                    let mut said = Vec::new();
                    stderr.read_to_end(&mut said).await.map_err(Error::failed("read a pipe"))?;
                    Err(failure(&said))
                }
            }
        };
        let ready = timeout(LIMIT, ready).await;
        // It ends at the end of its input, or with the first byte.
        let told = stdin.write_all(b"\n");
        drop(stdin);
        let empty_root = ready.map_err(|_| too_slow())??;
        told.map_err(Error::failed("end kuasar-init"))?;
        timeout(LIMIT, child.exit).await.map_err(|_| too_slow())?;
        Ok(Self(Arc::new(Loaded { empty_root, reaper })))
    }

    /// Where the empty mount namespace can be opened.
    pub(crate) fn empty_root(&self) -> PathBuf {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), self.0.empty_root.as_raw_fd()).into()
    }

    /// Runs it; returns what it printed, which is a pid or 0.
    pub(crate) async fn run(&self, arguments: &[OsString]) -> Result<u32> {
        let said = listen(&self.0.reaper, command()?.args(arguments), LIMIT).await?;
        if said.status != 0 {
            return Err(failure(said.stderr.as_bytes()));
        }
        said.stdout.trim().parse().map_err(Error::failed(format!("understand kuasar-init, which said {:?}", said.stdout)))
    }
}

fn command() -> Result<Command> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(image()?.path());
    command.arg0("kuasar-init").env_clear();
    Ok(command)
}

/// Turns `what TAB errno` into an error.
fn failure(said: &[u8]) -> Error {
    let said = String::from_utf8_lossy(said);
    let line = said.lines().next().unwrap_or("run kuasar-init").to_owned();
    match line.rsplit_once('\t').and_then(|(what, errno)| Some((what.to_owned(), errno.parse().ok()?))) {
        Some((what, 0)) => Error::failed(what)("the process ended"),
        Some((what, errno)) => Error::failed(what)(std::io::Error::from_raw_os_error(errno)),
        None => Error::failed("run kuasar-init")(line),
    }
}

fn too_slow() -> Error {
    Error::TimedOut { operation: "kuasar-init".into(), seconds: LIMIT.as_secs() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_name_the_step() {
        let error = failure(b"set the sysctl net/nope\t2\n");
        assert_eq!(error.report(), "failed to set the sysctl net/nope: No such file or directory (os error 2)");
        assert_eq!(failure(b"fork\t11\n").code(), kuasar_sandboxers::Code::ResourceExhausted);
        assert!(failure(b"").report().contains("kuasar-init"));
    }
}
