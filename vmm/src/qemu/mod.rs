//! QEMU: q35 and microvm machines, by KVM or, where there is none, by its own translation (TCG).
//!
//! ```text
//!   Qemu ── start ─▶ command   the spec in words and descriptors
//!     │                │
//!     │              launch    the process, without powers
//!     │                │
//!     └─────────▶ QemuVm ──▶ qmp   changes of the running machine, events
//! ```
//!
//! QEMU opens nothing but the kernel, the initial ramdisk and its own firmware: sockets, disks, taps and the console are handed to it
//! open, so that it can run as a user without any rights and in a directory that it cannot write. QMP's socket is bound here: there is
//! nothing to wait for, and a later daemon connects to it again.

mod command;
mod machine;
mod probe;

use std::{
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use kuasar_sandboxers::{Error, Result, programs::Programs, reaper::Reaper, undo::Undo};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use self::machine::QemuVm;
pub use self::probe::{Version, kvm_is_closed};
use crate::{
    hypervisor::{Capabilities, Hypervisor, Place, Vm, VsockWays},
    launch::{Launch, find_program},
    spec::{VmSpec, Vsock, VsockAddress},
};

/// The oldest that is taken: it has `-action panic=exit-failure`, and its vhost-user devices work on microvm machines.
pub const OLDEST: Version = Version(7, 0, 0);

/// What QEMU takes besides the guest's memory, in MiB: measured with TCG, whose translated code is most of it, and with KVM.
const OVERHEAD_TCG_MIB: u64 = 128;
const OVERHEAD_KVM_MIB: u64 = 64;

/// How long a helper's socket may refuse connections.
const LISTENING: Duration = Duration::from_secs(1);

/// Processors a machine can be given, whatever its spec says: each costs time at boot.
const MOST_CPUS: u32 = 255;

/// How QEMU is to be used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QemuConfig {
    /// The program; found when this is not given.
    pub path: Option<PathBuf>,
    /// The kind of machine.
    pub machine: Machine,
    /// What runs the guest's instructions.
    pub accel: Accel,
    /// How many disks can be added to a running q35 machine at a time; each place costs 20 to 30 ms at boot with TCG.
    pub hot_disks: Option<usize>,
}

/// A kind of machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Machine {
    /// A PC with PCI Express: disks, memory and processors can be added while it runs.
    #[default]
    Q35,
    /// Without PCI: boots sooner, and takes nothing more once it runs.
    Microvm,
}

/// What is to run the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// KVM where it works, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// QEMU's translation.
    Tcg,
}

/// What does run them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accelerator {
    Kvm,
    Tcg,
}

/// What was found out when the daemon started.
#[derive(Clone, Debug)]
struct Setup {
    program: PathBuf,
    machine: Machine,
    accelerator: Accelerator,
    hot_disks: usize,
    /// Groups that may open `/dev/kvm`.
    groups: Vec<u32>,
    /// How fast the guest's time stamp counter runs, where what it has to measure that by is translated too.
    time_stamp_khz: Option<u64>,
}

/// QEMU, found and checked.
#[derive(Debug)]
pub struct Qemu {
    setup: Setup,
    capabilities: Capabilities,
}

impl Setup {
    /// Places for hot disks.
    fn hot_disks(&self) -> usize {
        if self.machine == Machine::Q35 { self.hot_disks } else { 0 }
    }

    /// How many processors a machine of this spec can be given.
    fn max_cpus(&self, spec: &VmSpec) -> u32 {
        if self.machine == Machine::Q35 { spec.cpus.max.min(MOST_CPUS).max(spec.cpus.boot) } else { spec.cpus.boot }
    }

    /// What QEMU is told of that. Where it translates for one processor, older ones (7.2) leave memory barriers out, though devices run beside
    /// that processor: now and then a guest's word that it has put something into a queue is lost, and the device waits for ever.
    fn possible_cpus(&self, spec: &VmSpec) -> u32 {
        let max = self.max_cpus(spec);
        if self.machine == Machine::Q35 && self.accelerator == Accelerator::Tcg { max.max(2) } else { max }
    }
}

impl Qemu {
    /// Finds QEMU and asks for its version.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it is missing, too old, or KVM is demanded and absent.
    pub async fn open(config: QemuConfig, reaper: &Reaper, known: &mut Programs) -> Result<Self> {
        let program = match config.path {
            Some(path) => path,
            None => {
                find_program("qemu-system-x86_64", "KUASAR_QEMU", &["/usr/libexec/qemu-kvm", "/usr/bin/qemu-system-x86_64"])?
            }
        };
        let facts = match known.get(&program).filter(|facts: &probe::Facts| facts.version >= OLDEST) {
            Some(facts) => facts,
            None => {
                let facts = probe::Facts::find_out(&program, reaper).await?;
                if facts.time_stamp_khz.is_some() {
                    known.record(&program, &facts);
                }
                facts
            }
        };
        let accelerator = probe::accelerator(config.accel)?;
        let groups = if accelerator == Accelerator::Kvm { probe::kvm_groups()? } else { Vec::new() };
        let hot_disks = config.hot_disks.unwrap_or(4).min(16);
        let time_stamp_khz = facts.time_stamp_khz.filter(|_| accelerator == Accelerator::Tcg);
        let setup = Setup { program, machine: config.machine, accelerator, hot_disks, groups, time_stamp_khz };
        Ok(Self { capabilities: capabilities(&setup, facts.version), setup })
    }

    /// The program's path.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.setup.program
    }

    async fn launch(&self, spec: &VmSpec, place: &Place) -> Result<QemuVm> {
        let socket = place.dir.join(QMP_SOCKET);
        let mut shares = Vec::new();
        for share in &spec.shares {
            shares.push(connect(&share.socket).await?);
        }
        let opened = command::Opened {
            qmp: Arc::new(listen(&socket)?),
            console: Arc::new(open_console(&spec.console)?),
            disks: spec.disks.iter().map(command::open_disk).collect::<Result<_>>()?,
            shares,
            vsock: match &spec.vsock {
                Vsock::User { socket, .. } => Some(connect(socket).await?),
                Vsock::Kernel { .. } | Vsock::Builtin { .. } => None,
            },
        };
        let mut launch = Launch::new("qemu", &self.setup.program);
        command::say(spec, &self.setup, &opened, &mut launch)?;
        launch.cgroup(place.cgroup.clone()).user(place.user, &self.setup.groups);
        let launched = launch.start(&place.dir, &place.reaper).await?;
        // QEMU's ends are in QEMU now; ours would hide its death from virtiofsd.
        drop(opened);
        let vm = QemuVm::new(launched, &self.setup, spec, place);
        match vm.connect().await {
            Ok(()) => Ok(vm),
            Err(error) => {
                vm.kill().await?;
                Err(error)
            }
        }
    }
}

fn capabilities(setup: &Setup, version: Version) -> Capabilities {
    let (machine, hot) = match setup.machine {
        Machine::Q35 => ("q35", Ok(())),
        Machine::Microvm => {
            ("microvm", Err("a microvm machine takes nothing more once it runs; configure machine = \"q35\"".to_owned()))
        }
    };
    let emulated = setup.accelerator == Accelerator::Tcg;
    Capabilities {
        name: format!("QEMU {version} ({machine}, {})", if emulated { "TCG" } else { "KVM" }),
        emulated,
        vsock: VsockWays { kernel: true, user: true, builtin: false },
        hot_disks: if hot.is_ok() && setup.hot_disks == 0 {
            Err("no places for added disks are configured (hot_disks = 0)".into())
        } else {
            hot.clone()
        },
        max_hot_disks: setup.hot_disks(),
        hot_cpus: hot.clone(),
        hot_memory: hot,
        overhead_mib: if emulated { OVERHEAD_TCG_MIB } else { OVERHEAD_KVM_MIB },
    }
}

/// The name of QMP's socket in the machine's directory.
const QMP_SOCKET: &str = "qmp.sock";

/// Only this daemon connects to it, so only root may.
fn listen(path: &Path) -> Result<OwnedFd> {
    remove_socket(path)?;
    UnixListener::bind(path).map(OwnedFd::from).map_err(Error::io("listen on", path))
}

fn remove_socket(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// A socket is there a moment before its owner listens on it.
async fn connect(path: &Path) -> Result<Arc<OwnedFd>> {
    let deadline = Instant::now() + LISTENING;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(Arc::new(stream.into())),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                sleep(Duration::from_millis(1)).await;
            }
            Err(error) => return Err(Error::io("connect to", path)(error)),
        }
    }
}

/// Not created here: whoever owns it cuts it, too.
fn open_console(path: &Path) -> Result<OwnedFd> {
    std::fs::File::options().append(true).open(path).map(OwnedFd::from).map_err(Error::io("open", path))
}

#[async_trait]
impl Hypervisor for Qemu {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    async fn start(&self, spec: VmSpec, place: Place, undo: &mut Undo) -> Result<Arc<dyn Vm>> {
        let socket = place.dir.join(QMP_SOCKET);
        undo.push("remove QEMU's socket", {
            let socket = socket.clone();
            async move { remove_socket(&socket) }
        });
        let vm = Arc::new(self.launch(&spec, &place).await?);
        let undone = vm.clone();
        undo.push("kill QEMU", async move { undone.kill().await });
        Ok(vm)
    }

    async fn adopt(&self, record: Value, place: Place) -> Result<Arc<dyn Vm>> {
        let record = serde_json::from_value(record).map_err(Error::failed("read the record of a QEMU"))?;
        Ok(Arc::new(QemuVm::adopt(record, &place)?))
    }
}

fn address(spec: &VmSpec) -> VsockAddress {
    match &spec.vsock {
        Vsock::Kernel { cid, .. } => VsockAddress::Cid(*cid),
        Vsock::User { hybrid: socket, .. } | Vsock::Builtin { socket, .. } => VsockAddress::Hybrid(socket.clone()),
    }
}
