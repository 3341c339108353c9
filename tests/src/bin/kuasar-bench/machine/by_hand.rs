//! The machine of a pod, booted without kuasar: the same QEMU with the same kernel, initrd, words and devices, as the command line of a
//! running pod has them. What differs is what a file descriptor of the daemon's was: sockets have paths, and network cards no tap.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use kuasar_guest_protocol::agent::HelloRequest;
use kuasar_guest_protocol::agent_ttrpc::AgentClient;
use kuasar_guest_protocol::{KNOCK_PORT, PORT, VERSION};
use kuasar_tests::{Pod, wait};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use ttrpc::r#async::{Client, transport::Socket};

use super::processes;
use crate::plan::ms;

/// How long a machine may take to boot, and a helper to listen.
const PATIENCE: Duration = Duration::from_secs(120);

/// How to boot it.
pub(crate) struct Recipe {
    vmm: Vec<String>,
    /// By the tag of what it shares.
    virtiofsd: BTreeMap<String, Vec<String>>,
    vsock: String,
}

/// Options of QEMU's that have no value.
const BARE: [&str; 3] = ["-nodefaults", "-no-user-config", "-no-reboot"];

impl Recipe {
    /// As a running pod has it.
    ///
    /// # Errors
    /// The pod has no such processes: without vhost-device-vsock there is no way to a machine that is booted by hand.
    pub(crate) fn of(pod: &Pod) -> Result<Self> {
        let all = processes::of_pod(&pod.id)?;
        let vsock = processes::running(&all, "vhost-device-vsock").context("name it in KUASAR_VHOST_DEVICE_VSOCK")?;
        Ok(Self {
            vmm: processes::running(&all, "qemu-system-x86_64")?.words.clone(),
            virtiofsd: processes::all_running(&all, "virtiofsd")
                .filter_map(|process| Some((shared(&process.words)?.to_owned(), process.words.clone())))
                .collect(),
            vsock: vsock.words.first().cloned().unwrap_or_default(),
        })
    }

    /// The words for QEMU, with what it needs in `dir`.
    fn vmm_words(&self, dir: &Path) -> Result<Vec<String>> {
        let mut words = self.vmm.iter();
        let mut said = vec![words.next().context("QEMU has no command line")?.clone()];
        while let Some(option) = words.next() {
            if BARE.contains(&option.as_str()) {
                said.push(option.clone());
                continue;
            }
            let value = words.next().with_context(|| format!("QEMU's {option} has no value"))?;
            if let Some(value) = by_path(option, value, dir)? {
                said.extend([option.clone(), value]);
            }
        }
        Ok(said)
    }

    /// The same for each virtiofsd.
    fn virtiofsd_words(&self, dir: &Path) -> Vec<Vec<String>> {
        let said = self.virtiofsd.iter().map(|(tag, words)| {
            let mut said: Vec<String> = Vec::new();
            for word in words {
                let is_directory = said.last().is_some_and(|last| last == SHARED_DIR);
                said.push(match word {
                    _ if is_directory => dir.join("shared").display().to_string(),
                    word if word.starts_with("--fd=") => format!("--socket-path={}", dir.join(share_socket(tag)).display()),
                    word => word.clone(),
                });
            }
            said
        });
        said.collect()
    }
}

/// The option of virtiofsd's before what it shares.
const SHARED_DIR: &str = "--shared-dir";

/// The tag of what a virtiofsd shares, which its directory is named by.
fn shared(words: &[String]) -> Option<&str> {
    let at = words.iter().position(|word| word == SHARED_DIR)?;
    words.get(at + 1)?.rsplit('/').next()
}

fn share_socket(tag: &str) -> String {
    format!("fs-{tag}.sock")
}

const VSOCK: &str = "vsock.sock";
const HYBRID: &str = "hybrid.sock";

/// An option's value with a path in the place of a descriptor; `None` where the option goes.
fn by_path(option: &str, value: &str, dir: &Path) -> Result<Option<String>> {
    let id = value.split(',').find_map(|part| part.strip_prefix("id=")).unwrap_or_default();
    let socket = |name: &str| format!("socket,id={id},path={}", dir.join(name).display());
    Ok(match option {
        // Nobody asks it anything.
        "-add-fd" | "-mon" => None,
        "-chardev" if id == "qmp" => None,
        "-chardev" if id == "console" => Some(format!("file,id=console,path={}", dir.join("console").display())),
        "-chardev" if id == "vsock" => Some(socket(VSOCK)),
        "-chardev" if id.starts_with("fs-") => Some(socket(&format!("{id}.sock"))),
        // The card is the same; nothing is plugged into it.
        "-netdev" => Some(format!("hubport,id={id},hubid=0")),
        "-name" => Some("guest=by-hand".to_owned()),
        _ if value.split(',').any(|part| part.starts_with("fd=") || part.starts_with("vhostfd=")) => {
            bail!("QEMU's {option} {value} has a descriptor that is not known here")
        }
        _ => Some(value.to_owned()),
    })
}

/// Boots it; returns how long it took from QEMU's start to the agent's hello, in milliseconds. Its helpers were there before.
pub(crate) async fn boot(recipe: &Recipe, dir: &Path) -> Result<f64> {
    fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
    fs::create_dir(dir.join("shared")).context("create the shared directory")?;
    let booted = booted(recipe, dir).await;
    let removed = fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()));
    let time = booted?;
    removed?;
    Ok(time)
}

async fn booted(recipe: &Recipe, dir: &Path) -> Result<f64> {
    let hybrid = dir.join(HYBRID);
    let vsock = format!("guest-cid=3,socket={},uds-path={}", dir.join(VSOCK).display(), hybrid.display());
    let mut helpers = vec![spawn(&[recipe.vsock.clone(), "--vm".to_owned(), vsock], dir)?];
    for words in recipe.virtiofsd_words(dir) {
        helpers.push(spawn(&words, dir)?);
    }
    let sockets: Vec<_> = recipe.virtiofsd.keys().map(|tag| share_socket(tag)).chain([VSOCK.into(), HYBRID.into()]).collect();
    wait::until("the machine's helpers to listen", PATIENCE, || async {
        Ok(sockets.iter().all(|name| dir.join(name).exists()).then_some(()))
    })
    .await?;
    let knock = UnixListener::bind(format!("{}_{KNOCK_PORT}", hybrid.display())).context("listen for the guest's knock")?;

    let words = recipe.vmm_words(dir)?;
    let begun = Instant::now();
    let mut vmm = spawn(&words, dir)?;
    let said_hello = async {
        knock.accept().await.context("wait for the guest's knock")?;
        hello(&hybrid).await
    };
    let greeted = tokio::select! {
        greeted = timeout(PATIENCE, said_hello) => greeted.context("the guest does not boot")?,
        ended = vmm.wait() => Err(anyhow::anyhow!("QEMU ended: {}; it said: {}", ended?, words_of(dir))),
    };
    let time = ms(begun.elapsed());
    helpers.insert(0, vmm);
    for child in &mut helpers {
        // Helpers end with the machine, if they are not killed first.
        child.kill().await.context("end the machine")?;
    }
    greeted.map(|()| time)
}

fn spawn(words: &[String], dir: &Path) -> Result<Child> {
    let (program, arguments) = words.split_first().context("there is no command line")?;
    let said = fs::File::options().create(true).append(true).open(dir.join("said")).context("open a file for its words")?;
    let mut command = Command::new(PathBuf::from(program));
    command.args(arguments).stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).kill_on_drop(true);
    command.spawn().with_context(|| format!("start {program}"))
}

fn words_of(dir: &Path) -> String {
    kuasar_tests::process::tail(&dir.join("said"), 5)
}

/// As kuasard says it, over the device's socket.
async fn hello(hybrid: &Path) -> Result<()> {
    let mut stream = UnixStream::connect(hybrid).await.context("connect to the vsock device")?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        ensure!(answer.len() < 32, "the vsock device answers with {:?}", String::from_utf8_lossy(&answer));
        answer.push(stream.read_u8().await.context("read the vsock device's answer")?);
    }
    ensure!(answer.starts_with(b"OK "), "the vsock device answers with {:?}", String::from_utf8_lossy(&answer));
    let agent = AgentClient::new(Client::new(Socket::new(stream)));
    let time_ns = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())?;
    let request = HelloRequest { version: VERSION, time_ns, ..HelloRequest::default() };
    let said = agent.hello(ttrpc::context::with_duration(PATIENCE), &request).await.context("say hello")?;
    ensure!(said.version == VERSION, "the agent speaks version {}, not {VERSION}", said.version);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_become_paths() {
        let with = |option: &str, value: &str| by_path(option, value, Path::new("/d")).unwrap();
        assert_eq!(with("-chardev", "socket,id=qmp,fd=10,server=on,wait=off"), None);
        assert_eq!(with("-chardev", "socket,id=fs-share,fd=12").as_deref(), Some("socket,id=fs-share,path=/d/fs-share.sock"));
        assert_eq!(with("-chardev", "socket,id=vsock,fd=12").as_deref(), Some("socket,id=vsock,path=/d/vsock.sock"));
        assert_eq!(with("-netdev", "tap,id=nic0,fd=13,vhost=on,vhostfd=14").as_deref(), Some("hubport,id=nic0,hubid=0"));
        assert_eq!(with("-cpu", "max,erms=off").as_deref(), Some("max,erms=off"));
        assert!(by_path("-device", "vhost-vsock-pci,guest-cid=5,vhostfd=16", Path::new("/d")).is_err());
    }
}
