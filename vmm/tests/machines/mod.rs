//! What tests that boot machines share: the guest image with a test's own first process, and the daemon's part around it.
#![allow(clippy::unwrap_used, reason = "a test may")]
#![allow(dead_code, reason = "each test program uses its part")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

pub(crate) use kuasar_sandboxers::fake::reaper;
use kuasar_sandboxers::{busybox, process::Tracked, programs::Programs};
use kuasar_vmm::{
    hypervisor::Place,
    launch::Launched,
    qemu::{Accel, Machine, Qemu, QemuConfig},
    spec::{Cpus, Memory, VmSpec, Vsock},
    vsock_device::{VsockDevice, VsockDeviceConfig},
};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Loads the image's modules, then runs the test's commands, and stays.
const INIT: &str = "#!/test/busybox sh
B=/test/busybox; $B mkdir -p /bin /proc /sys /dev /mnt; $B --install -s /bin
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev 2>/dev/null
[ ! -e /etc/modules ] || while read m; do insmod $m; done < /etc/modules
say() { echo \"TEST: $*\" > /dev/console; }
. /test/run
say end of the script
while :; do sleep 1000; done
";

/// A directory for one machine, and the right to run it: only so many at a time, for the clock runs on while they share processors.
pub(crate) struct Bench {
    pub(crate) dir: TempDir,
    _turn: SemaphorePermit<'static>,
}

/// The guest's kernel and initial ramdisk, with `script` for its first process; `None`, said aloud, when something is missing.
pub(crate) async fn bench(test: &str, script: &str) -> Option<Bench> {
    static TURNS: Semaphore = Semaphore::const_new(2);
    let (image, busybox) = needs(test).await?;
    if let Err(error) = VsockDevice::open(VsockDeviceConfig::default()) {
        return skip(test, &error.report());
    }
    let turn = TURNS.acquire().await.unwrap();
    let dir = TempDir::with_prefix("kuasar-vmm-").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    fs::copy(image.join("vmlinuz"), dir.path().join("vmlinuz")).unwrap();
    let mut initrd = fs::read(image.join("initrd")).unwrap();
    initrd.resize(initrd.len().next_multiple_of(512), 0);
    let entries = [("test", 0o40755, Vec::new()), ("test/busybox", 0o100755, fs::read(busybox).unwrap())];
    let scripts = [("test/init", 0o100755, INIT.into()), ("test/run", 0o100644, script.into()), ("TRAILER!!!", 0, Vec::new())];
    for (name, mode, bytes) in entries.into_iter().chain(scripts) {
        append(&mut initrd, name, mode, &bytes);
    }
    fs::write(dir.path().join("initrd"), initrd).unwrap();
    fs::write(dir.path().join("console"), "").unwrap();
    Some(Bench { dir, _turn: turn })
}

/// Says aloud that a test does not run.
pub(crate) fn skip<T>(test: &str, missing: &str) -> Option<T> {
    eprintln!("SKIP {test}: {missing}");
    None
}

/// The directory of the guest image, and a static busybox; `None`, said aloud, when one of them, QEMU or root's powers are missing.
pub(crate) async fn needs(test: &str) -> Option<(PathBuf, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        return skip(test, "root");
    }
    let Some(image) = image() else {
        return skip(test, "a guest image: make guest, or name a kernel beside its initrd in KUASAR_GUEST_KERNEL");
    };
    let Some(busybox) = busybox::find() else { return skip(test, "no static busybox on PATH; install busybox-static") };
    match Qemu::open(config(Machine::Q35), &reaper(), &mut Programs::default()).await {
        Ok(_) => Some((image, busybox)),
        Err(error) => skip(test, &error.report()),
    }
}

fn image() -> Option<PathBuf> {
    let kernel = std::env::var_os("KUASAR_GUEST_KERNEL").map(PathBuf::from).unwrap_or_else(|| {
        let cache = std::env::var_os("KUASAR_CACHE").unwrap_or_else(|| "/var/cache/kuasar-tools".into());
        Path::new(&cache).join("guest/cloud/vmlinuz")
    });
    let dir = kernel.parent()?.to_owned();
    (kernel.is_file() && dir.join("initrd").is_file()).then_some(dir)
}

/// An entry of a cpio archive (`newc`, Documentation/driver-api/early-userspace/buffer-format.rst).
fn append(archive: &mut Vec<u8>, name: &str, mode: u32, bytes: &[u8]) {
    let fields = [0, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend(b"070701");
    archive.extend(fields.iter().flat_map(|field| format!("{field:08X}").into_bytes()));
    archive.extend(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(bytes);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

pub(crate) fn config(machine: Machine) -> QemuConfig {
    QemuConfig { machine, accel: Accel::Tcg, ..QemuConfig::default() }
}

/// Whatever a failed test has left running names its directory.
impl Drop for Bench {
    fn drop(&mut self) {
        let dir = self.dir.path().as_os_str().as_encoded_bytes().to_owned();
        let ended = kuasar_sandboxers::process::command_lines(|pid, line| {
            if line.windows(dir.len()).any(|part| part == dir)
                && let Some(process) = Tracked::open(pid)?
            {
                process.signal(9)?;
            }
            Ok(())
        });
        if let Err(error) = ended {
            eprintln!("{}", error.report());
        }
    }
}

impl Bench {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn place(&self) -> Place {
        Place { dir: self.dir.path().into(), reaper: reaper(), cgroup: None, user: Some((64_000, 64_001)) }
    }

    /// The device for the machine's vsock.
    pub(crate) async fn vsock(&self) -> (Launched, Vsock) {
        let device = VsockDevice::open(VsockDeviceConfig::default()).unwrap();
        device.start(77, &self.place()).await.unwrap()
    }

    /// A small machine.
    pub(crate) fn spec(&self, vsock: Vsock) -> VmSpec {
        VmSpec {
            name: "test, with a comma".into(),
            cpus: Cpus { boot: 1, max: 1 },
            memory: Memory { boot_mib: 192, max_mib: 192, huge_page_kib: None },
            kernel: self.path("vmlinuz"),
            initrd: self.path("initrd"),
            cmdline: vec!["quiet".into(), "rdinit=/test/init".into()],
            disks: Vec::new(),
            shares: Vec::new(),
            nics: Vec::new(),
            vsock,
            console: self.path("console"),
            balloon: true,
        }
    }

    pub(crate) fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.path("console")).unwrap()).into_owned()
    }

    /// Waits until the guest has said `words`, which it does at most once.
    pub(crate) async fn said(&self, words: &str) {
        let deadline = Instant::now() + Duration::from_secs(90);
        while !self.console().contains(&format!("TEST: {words}")) {
            assert!(Instant::now() < deadline, "the guest does not say {words:?}:\n{}", self.console());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What the machine has left, besides what the bench itself has put there.
    pub(crate) fn left(&self) -> Vec<String> {
        let names = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !["vmlinuz", "initrd", "console"].contains(&name.as_str())).collect()
    }
}
