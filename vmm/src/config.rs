//! What can be configured. Plain and valid by construction; whoever reads a file makes one of these.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

/// Where `make install` puts the guest image when nothing else is said.
pub const DEFAULT_KERNEL: &str = "/usr/local/share/kuasar/guest/vmlinuz";

/// See [`DEFAULT_KERNEL`].
pub const DEFAULT_INITRD: &str = "/usr/local/share/kuasar/guest/initrd";

/// Where a kernel is that was installed together with this program, from the directory above that of its programs.
const IMAGE: &str = "share/kuasar/guest/vmlinuz";

/// The environment variable that names the kernel to use instead; the initrd is the file of that name beside it.
pub const KERNEL_VARIABLE: &str = "KUASAR_GUEST_KERNEL";

/// Configuration of one microVM sandboxer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmmConfig {
    /// Which hypervisor, and how it is set up.
    pub hypervisor: HypervisorConfig,
    /// The guest's kernel; `None`: what [`KERNEL_VARIABLE`] names, else the one installed with this program, else
    /// [`DEFAULT_KERNEL`].
    pub kernel: Option<PathBuf>,
    /// The guest's initrd; `None`: the file `initrd` beside the kernel.
    pub initrd: Option<PathBuf>,
    /// More words for the kernel's command line.
    pub kernel_parameters: Vec<String>,
    /// virtiofsd, if not the one that is found.
    pub virtiofsd: Option<PathBuf>,
    /// vhost-device-vsock, if not the one that is found; only where the host has no vhost-vsock.
    pub vsock_device: Option<PathBuf>,
    /// Directory for everything that lives as long as its sandbox. Best on a tmpfs.
    pub root: PathBuf,
    /// Processors of a pod without a limit.
    pub cpus: u32,
    /// Memory of the guest of a pod without a limit, in MiB.
    pub memory_mib: u64,
    /// How much memory the guest itself takes, in MiB: added to the pod's limit, with 1/64 of that to describe its pages.
    pub guest_overhead_mib: u64,
    /// The most that a pod can grow to: processors.
    pub max_cpus: u32,
    /// The most that a pod can grow to: memory in MiB. 0: what the host has.
    pub max_memory_mib: u64,
    /// What pods may set by annotation.
    pub annotations: BTreeSet<Annotation>,
    /// How long a guest may take to boot.
    pub boot_limit: Duration,
    /// Users and groups that VMMs run as: the first of a range, one for each machine. Nobody else's.
    pub users_from: u32,
    /// Whether a shell can be had in the guest (`kuasarctl exec`), which is for debugging.
    pub debug: bool,
}

/// Which hypervisor, and how it is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HypervisorConfig {
    /// QEMU.
    Qemu(crate::qemu::QemuConfig),
}

/// What a pod may set with an annotation `io.kuasar.vm.<name>`, if the sandboxer allows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Annotation {
    /// `cpus`: how many processors the machine has.
    Cpus,
    /// `memory_mib`: the machine's memory, in MiB.
    MemoryMib,
}

impl Annotation {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Cpus, Self::MemoryMib];

    /// Before the name, in a pod's annotations.
    pub const PREFIX: &str = "io.kuasar.vm.";

    /// Its name in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpus => "cpus",
            Self::MemoryMib => "memory_mib",
        }
    }
}

impl fmt::Display for Annotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Annotation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|annotation| annotation.name() == text)
            .ok_or_else(|| format!("{text:?} is no annotation; accepted: {}", Self::ALL.map(Self::name).join(", ")))
    }
}

impl VmmConfig {
    /// What holds for a hypervisor when nothing else is said.
    #[must_use]
    pub fn new(hypervisor: HypervisorConfig, root: PathBuf) -> Self {
        Self {
            hypervisor,
            kernel: None,
            initrd: None,
            kernel_parameters: Vec::new(),
            virtiofsd: None,
            vsock_device: None,
            root,
            cpus: 1,
            memory_mib: 512,
            // The distribution's kernel takes 40 MiB; the initrd, the agent, its runtime and what the kernel keeps free the rest. Measured by
            // what a container can use of a limit of 64 MiB.
            guest_overhead_mib: 80,
            max_cpus: 8,
            max_memory_mib: 0,
            annotations: Annotation::ALL.into(),
            // Emulated machines on a busy node.
            boot_limit: Duration::from_secs(60),
            users_from: 2_000_000_000,
            debug: false,
        }
    }

    /// The kernel to boot.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        let named = || std::env::var_os(KERNEL_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        self.kernel.clone().or_else(named).or_else(installed).unwrap_or_else(|| DEFAULT_KERNEL.into())
    }

    /// The initrd to boot it with.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.initrd.clone().unwrap_or_else(|| self.kernel().with_file_name("initrd"))
    }
}

/// The kernel installed together with this program; `None` for a program that is not installed, such as one of a build directory.
fn installed() -> Option<PathBuf> {
    beside(&std::env::current_exe().ok()?)
}

fn beside(program: &Path) -> Option<PathBuf> {
    let programs = program.parent()?;
    (programs.file_name()? == "bin").then(|| programs.with_file_name(IMAGE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_installed_finds_the_kernel_installed_with_it() {
        let kernel = |program: &str| beside(Path::new(program));
        assert_eq!(kernel("/usr/bin/kuasard"), Some("/usr/share/kuasar/guest/vmlinuz".into()));
        assert_eq!(kernel("/usr/local/bin/kuasard"), Some(DEFAULT_KERNEL.into()));
        // As the kernel names one that an upgrade has replaced.
        assert_eq!(kernel("/usr/bin/kuasard (deleted)"), Some("/usr/share/kuasar/guest/vmlinuz".into()));
        assert_eq!(kernel("/src/target/release/kuasard"), None);
    }
}
