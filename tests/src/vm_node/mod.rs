//! A node of its own kernel: Debian with systemd, cgroup v2 and AppArmor, in a virtual machine. `make node` builds its image.
//!
//! ```text
//!   VmNode ─┬─ directory    configuration of ssh, keys, sockets; swept when its owner is gone
//!           ├─ QEMU         emulates, unless KUASAR_NODE_KVM=1; the image's disk with an overlay without a name
//!           ├─ payload      a tar archive as second disk, unpacked at the node's root
//!           └─ channel      ssh, one kept connection: scripts, files, forwarded sockets, a terminal
//! ```
//!
//! Invariants: the image is never written; the node has no network but its channel; QEMU and ssh end with the process that has started
//! them, whatever ends that.
//!
//! Non-goals: networks between nodes, and disks that outlive one.

mod channel;
mod child;
mod payload;
pub mod software;

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use command_fds::{CommandFdExt as _, FdMapping};
use nix::fcntl::Flock;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

pub use channel::{Ran, Script, Stream, Watch, quote};
pub use payload::Payload;

use crate::{process, scratch, tools, wait};
use child::Bound;

/// How long a boot may take, emulated, on a machine that others use as well.
const BOOT: Duration = Duration::from_secs(300);
/// How long an orderly end may take: units have 90 s.
const POWER_OFF: Duration = Duration::from_secs(150);
/// How long sshd may take to say what it is.
const BANNER: Duration = Duration::from_secs(10);
/// Descriptor of the payload in QEMU.
const PAYLOAD: i32 = 3;
/// What the console says when no boot will come of it.
const FATAL: [&str; 3] = ["Kernel panic", "initrd: ", "You are in emergency mode"];

/// What a node shall be.
pub struct Options {
    /// Debian's suite, as the image is called.
    pub suite: String,
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// What it has besides the image.
    pub payload: Option<Payload>,
    /// Where the console's log goes, which stays: `node-<suite>-console.log`.
    pub logs: PathBuf,
}

/// A running node. Dropping it is a power cut, and leaves nothing but the console's log.
#[derive(Debug)]
pub struct VmNode {
    // In the order in which they go.
    channel: channel::Channel,
    vm: Bound,
    console: PathBuf,
    port: u16,
    dir: PathBuf,
    _lock: Flock<File>,
}

impl VmNode {
    /// Boots a node, and unpacks its payload. systemd may still be starting units then: see [`VmNode::wait_running`].
    ///
    /// # Errors
    /// The image or a tool is missing, or the node does not boot; the error has the end of the console's log.
    pub async fn boot(options: Options) -> Result<Self> {
        let suite = options.suite.clone();
        Self::boot_inner(options).await.with_context(|| format!("boot a node of {suite}"))
    }

    async fn boot_inner(options: Options) -> Result<Self> {
        let image = tools::node_image(&options.suite)?;
        let qemu = tools::hypervisor("qemu")?;
        std::fs::create_dir_all(&options.logs).with_context(|| format!("create {}", options.logs.display()))?;
        let console = options.logs.join(format!("node-{}-console.log", options.suite));
        if let Err(error) = scratch::sweep(false) {
            eprintln!("cannot sweep: {error:#}");
        }
        let (dir, lock) = scratch::claim(&scratch::base(), "vm-node-")?;
        let mut removal = RemoveOnError(Some(&dir));
        for file in ["key", "known_hosts"] {
            std::fs::copy(image.join(file), dir.join(file)).with_context(|| format!("copy {file} of {}", image.display()))?;
        }
        let port = free_port()?;
        let has_payload = options.payload.is_some();
        let payload = options.payload.map(Payload::finish).transpose()?;
        let vm = start_vm(&qemu, &image, &dir, &console, port, options.memory_mib, payload)?;
        let channel = channel::Channel::new(&dir, port)?;
        removal.0 = None;
        drop(removal);
        let mut node = Self { channel, vm, console, port, dir, _lock: lock };
        node.connect(None).await?;
        if has_payload {
            // Directories that the distribution has made stay as they are.
            node.script("tar --extract --no-same-owner --no-overwrite-dir --directory / --file /dev/vdb").check().await?;
        }
        Ok(node)
    }

    /// Waits for sshd, and logs in; where a boot is named, into another than that.
    async fn connect(&mut self, not: Option<&str>) -> Result<()> {
        let end = std::time::Instant::now() + BOOT;
        loop {
            wait::until("the node's sshd", end.saturating_duration_since(std::time::Instant::now()), || async {
                self.check_booting()?;
                Ok(has_banner(self.port).await.then_some(()))
            })
            .await
            .with_context(|| format!("its console ends:\n{}", self.console_tail()))?;
            match self.channel.connect().await {
                Ok(()) if not.is_none() => return Ok(()),
                Ok(()) => match self.boot_id().await {
                    Ok(boot) if Some(boot.as_str()) != not => return Ok(()),
                    // Still the one that is going down.
                    Ok(_) => {}
                    Err(error) if std::time::Instant::now() >= end => return Err(error),
                    Err(_) => {}
                },
                // sshd may be there before accounts may log in, and until it is stopped.
                Err(error) if std::time::Instant::now() >= end => return Err(error),
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn check_booting(&self) -> Result<()> {
        self.vm.check_running()?;
        let console = process::tail(&self.console, 20);
        if let Some(line) = console.lines().find(|line| FATAL.iter().any(|fatal| line.contains(fatal))) {
            bail!("the node does not boot: {}", line.trim());
        }
        Ok(())
    }

    /// The last lines of the console.
    #[must_use]
    pub fn console_tail(&self) -> String {
        process::tail(&self.console, 30)
    }

    /// Its directory: `ssh -F <directory>/ssh_config node` joins in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A script for the node's bash, to be run.
    #[must_use]
    pub fn script(&self, text: &str) -> Script<'_> {
        Script::new(&self.channel, text)
    }

    /// Runs a script, and fails if it does; returns what it printed.
    ///
    /// # Errors
    /// As [`Script::check`].
    pub async fn sh(&self, text: &str) -> Result<String> {
        self.script(text).check().await
    }

    /// Copies a file or a directory into the node.
    ///
    /// # Errors
    /// It cannot be read here or written there.
    pub async fn push(&self, from: &Path, to: &str) -> Result<()> {
        self.channel.copy(&from.to_string_lossy(), &format!("node:{to}")).await
    }

    /// Copies a file or a directory out of the node.
    ///
    /// # Errors
    /// It cannot be read there or written here.
    pub async fn pull(&self, from: &str, to: &Path) -> Result<()> {
        self.channel.copy(&format!("node:{from}"), &to.to_string_lossy()).await
    }

    /// A Unix socket of the node's, as one here; it outlives a reboot.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub async fn forward(&mut self, socket: &str) -> Result<PathBuf> {
        self.channel.forward(socket).await
    }

    /// A shell, or a command, with this process's streams, on a terminal where they are one.
    ///
    /// # Errors
    /// ssh cannot be run.
    pub async fn terminal(&self, command: Option<&str>) -> Result<ExitStatus> {
        self.channel.terminal(command).await
    }

    /// Waits until systemd has started all units; returns what it says: `running`, or `degraded` when some failed.
    ///
    /// # Errors
    /// It takes too long.
    pub async fn wait_running(&self) -> Result<String> {
        Ok(self.script("systemctl is-system-running --wait").timeout(BOOT).run().await?.stdout())
    }

    async fn boot_id(&self) -> Result<String> {
        self.sh("cat /proc/sys/kernel/random/boot_id").await
    }

    /// Reboots it in order, as an administrator does.
    ///
    /// # Errors
    /// It does not come back.
    pub async fn reboot(&mut self) -> Result<()> {
        let before = self.boot_id().await?;
        self.sh("systemctl reboot").await?;
        self.connect(Some(&before)).await.context("reboot")
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// It does not end in time; it is gone all the same.
    pub async fn power_off(mut self) -> Result<()> {
        self.sh("systemctl poweroff").await?;
        let ended = self.vm.ended(POWER_OFF).await;
        let status = ended.with_context(|| format!("power off; its console ends:\n{}", self.console_tail()))?;
        ensure!(status.success(), "QEMU failed: {status}");
        Ok(())
    }
}

impl Drop for VmNode {
    fn drop(&mut self) {
        for ended in [self.channel.disconnect(), self.vm.kill()] {
            if let Err(error) = ended {
                eprintln!("{error:#}");
            }
        }
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!("remove {}: {error}", self.dir.display());
        }
    }
}

/// A directory that goes with this.
struct RemoveOnError<'a>(Option<&'a Path>);

impl Drop for RemoveOnError<'_> {
    fn drop(&mut self) {
        if let Some(dir) = self.0
            && let Err(error) = std::fs::remove_dir_all(dir)
        {
            eprintln!("remove {}: {error}", dir.display());
        }
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("look for a free port")?;
    Ok(listener.local_addr()?.port())
}

/// QEMU accepts connections from its start on, and closes them until the node listens.
async fn has_banner(port: u16) -> bool {
    let mut banner = [0; 4];
    let read = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        stream.read_exact(&mut banner).await
    };
    matches!(timeout(BANNER, read).await, Ok(Ok(_))) && banner == *b"SSH-"
}

/// Whether to use KVM: only where one says so, for a device that is there may be slower than none (nested), or not to be used.
fn accelerator() -> Result<&'static str> {
    if std::env::var_os("KUASAR_NODE_KVM").is_none_or(|value| value != "1") {
        return Ok("tcg,thread=multi");
    }
    File::options().read(true).write(true).open("/dev/kvm").context("KUASAR_NODE_KVM=1, but open /dev/kvm")?;
    Ok("kvm")
}

fn start_vm(
    qemu: &Path,
    image: &Path,
    dir: &Path,
    console: &Path,
    port: u16,
    memory_mib: u32,
    payload: Option<File>,
) -> Result<Bound> {
    let accelerator = accelerator()?;
    let mut command: Command = Bound::command(qemu);
    command.args(["-name", "kuasar-node", "-M", "q35", "-smp", "2", "-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-accel", accelerator, "-m", &memory_mib.to_string()]);
    // With AMD's virtualization: that is the one that QEMU emulates.
    command.args(["-cpu", if accelerator == "kvm" { "host" } else { "max,+svm" }]);
    command.arg("-kernel").arg(image.join("vmlinuz")).arg("-initrd").arg(image.join("initrd"));
    command.args([
        "-append",
        // The serial line takes its time; all that the kernel says is in the journal.
        "console=ttyS0 quiet systemd.show_status=auto net.ifnames=0 systemd.unified_cgroup_hierarchy=1 apparmor=1 \
         security=apparmor mitigations=off",
    ]);
    // What is written goes to a file that QEMU removes as soon as it has it open.
    let disk = format!("file={},if=none,id=disk,format=raw,snapshot=on,cache=unsafe", image.join("disk").display());
    command.args(["-drive", &disk, "-device", "virtio-blk-pci,drive=disk"]);
    command.args(["-netdev", &format!("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22")]);
    command.args(["-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci"]);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    // Also what tells a sweep whose it is.
    command.arg("-monitor").arg(format!("unix:{},server=on,wait=off", dir.join("monitor").display()));
    if let Some(payload) = payload {
        command.fd_mappings(vec![FdMapping { parent_fd: OwnedFd::from(payload), child_fd: PAYLOAD }])?;
        let drive = format!("file=/dev/fd/{PAYLOAD},if=none,id=payload,format=raw,readonly=on");
        command.args(["-drive", &drive, "-device", "virtio-blk-pci,drive=payload"]);
    }
    Bound::spawn("QEMU", command, &dir.join("qemu.log"))
}
