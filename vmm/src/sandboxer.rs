//! The sandboxer: what is found once for all pods, and what earlier daemons left behind.

use std::{
    collections::{BTreeSet, HashMap},
    ffi::OsStr,
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use async_trait::async_trait;
use kuasar_guest_protocol::{DEBUG_WORD, LOG_WORD};
use kuasar_sandboxers::{
    Error, Known, Leftover, Result, Sandbox, SandboxContext, Sandboxer,
    cgroup::Cgroup,
    id::{ContainerId, Namespace, SandboxId},
    programs::Programs,
    reaper::Reaper,
    stages,
    types::{Capabilities, SandboxSpec},
};
use serde_json::Value;
use tracing::{info, warn};

use crate::{
    config::{HypervisorConfig, VmmConfig},
    hypervisor::{Hypervisor, Place},
    launch::{LaunchRecord, Launched},
    machine_dir,
    pod::{self, GROUP, Pod, Record, VmSandbox},
    qemu::Qemu,
    virtiofsd::Virtiofsd,
    vsock::{Trial, VsockWay},
};

/// How many machines there may be at a time: as many users and vsock addresses are set apart.
const MOST: u32 = 65_536;

/// The directory below the root with a directory for each machine, by its number: paths of sockets may have 107 bytes, and a sandbox's id
/// has 64 of them.
const MACHINES: &str = ".machines";

/// The file below the root with the initrd for debugging.
const DEBUG_INITRD: &str = ".initrd-debug";

/// Runs each pod in a virtual machine of its own.
#[derive(Debug)]
pub struct VmmSandboxer {
    shared: Arc<Shared>,
    pods: Arc<Pods>,
}

#[derive(Debug, Default)]
struct Pods(Mutex<HashMap<(Namespace, SandboxId), Weak<Pod>>>);

/// What pods share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: VmmConfig,
    pub(crate) hypervisor: Box<dyn Hypervisor>,
    pub(crate) virtiofsd: Virtiofsd,
    pub(crate) vsock: VsockWay,
    /// The least memory that a guest boots with, in MiB.
    pub(crate) boot_mib: u64,
    /// The numbers of machines that there are.
    numbers: Mutex<BTreeSet<u32>>,
}

impl Shared {
    fn numbers(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The smallest number that no machine has.
    fn number(&self) -> Result<u32> {
        let mut numbers = self.numbers();
        let free = (0..MOST).find(|number| !numbers.contains(number));
        let number = free.ok_or_else(|| Error::Unavailable {
            what: "a place for another virtual machine".into(),
            why: format!("there are {MOST}, the most that one sandboxer can have"),
        })?;
        numbers.insert(number);
        Ok(number)
    }

    pub(crate) fn release(&self, number: u32) {
        self.numbers().remove(&number);
    }

    /// User and group of the machine of this number.
    pub(crate) fn user(&self, number: u32) -> Option<(u32, u32)> {
        let id = self.config.users_from.checked_add(number)?;
        Some((id, id))
    }

    /// Whether machines can be given more when their pods grow.
    pub(crate) fn can_grow(&self) -> bool {
        let capabilities = self.hypervisor.capabilities();
        capabilities.hot_cpus.is_ok() && capabilities.hot_memory.is_ok()
    }

    /// The directory of the machine of this number.
    pub(crate) fn machine_dir(&self, number: u32) -> PathBuf {
        self.config.root.join(MACHINES).join(number.to_string())
    }

    pub(crate) fn initrd(&self) -> PathBuf {
        if self.config.debug { self.config.root.join(DEBUG_INITRD) } else { self.config.initrd() }
    }

    /// Words for the guest's kernel.
    pub(crate) fn command_line(&self) -> Vec<String> {
        let level = if self.config.debug { "debug" } else { "info" };
        // The agent's panic is the kernel's, and ends the machine at once.
        let mut words = vec!["quiet".into(), "cryptomgr.notests".into(), "panic=-1".into(), format!("{LOG_WORD}{level}")];
        words.extend(self.vsock.word().map(str::to_owned));
        if self.hypervisor.capabilities().emulated {
            // On a busy host the kernel's test of its timer fails, and it gives up. What virtiofsd writes into the guest's memory the
            // hypervisor does not see: a page that had a program's code would go on as that. The guest clears pages before it uses
            // them anew, which the hypervisor does see.
            words.extend(["no_timer_check".into(), "init_on_alloc=1".into()]);
            // Code is translated anew for each address that it is seen at, so at random ones for each start of a program: 22 ms instead of
            // 3 for a `/bin/true` that is linked dynamically. The kernel's own random address costs 100 ms of each boot.
            words.extend(["norandmaps".into(), "nokaslr".into()]);
        }
        // crun makes a sealed copy of itself at each start, unless it sees that it cannot be written: so for a read-only mount, if it is
        // on a filesystem that knows no seals at all. The kernel's other choice for the initrd is a tmpfs, which does.
        words.push("rootfstype=ramfs".into());
        if self.config.debug {
            words.push(DEBUG_WORD.into());
        }
        let configured = &self.config.kernel_parameters;
        if !configured.iter().any(|word| word.starts_with("swiotlb=")) {
            // Memory that can be added above 4 GiB has the kernel set 64 MiB of bounce buffers apart, for devices that do not reach there. These
            // machines have none: virtio devices without VIRTIO_F_ACCESS_PLATFORM take the guest's own addresses, of 64 bits.
            words.push("swiotlb=noforce".into());
        }
        words.extend(configured.iter().cloned());
        words
    }

    pub(crate) fn adopt_helper(&self, record: LaunchRecord, place: &Place) -> Result<Launched> {
        Launched::adopt(record, &place.dir, &place.reaper)
    }
}

impl Pods {
    fn lock(&self) -> MutexGuard<'_, HashMap<(Namespace, SandboxId), Weak<Pod>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, key: &(Namespace, SandboxId)) -> Option<Arc<Pod>> {
        self.lock().get(key).and_then(Weak::upgrade)
    }

    fn add(&self, pod: &Arc<Pod>) {
        let mut pods = self.lock();
        pods.retain(|_, pod| pod.strong_count() > 0);
        pods.insert((pod.spec.namespace.clone(), pod.spec.id.clone()), Arc::downgrade(pod));
    }
}

impl VmmSandboxer {
    /// Finds the hypervisor and what else machines need.
    ///
    /// # Errors
    /// [`Error::Unavailable`], naming what is missing or too old and what to do.
    pub async fn open(config: VmmConfig, reaper: Reaper) -> Result<Self> {
        let mut known = Programs::load_and_record(&config.root);
        let hypervisor = find_hypervisor(&config, &reaper, &mut known).await?;
        Self::assemble(hypervisor, config, reaper, &mut known).await
    }

    /// As [`Self::open`], for a hypervisor that is found already.
    ///
    /// # Errors
    /// See there.
    pub async fn with(hypervisor: Box<dyn Hypervisor>, config: VmmConfig, reaper: Reaper) -> Result<Self> {
        let mut known = Programs::load_and_record(&config.root);
        Self::assemble(hypervisor, config, reaper, &mut known).await
    }

    async fn assemble(
        hypervisor: Box<dyn Hypervisor>,
        config: VmmConfig,
        reaper: Reaper,
        known: &mut Programs,
    ) -> Result<Self> {
        let (virtiofsd, vsock) = find_helpers(&*hypervisor, &config, &reaper, Trial::Open, known).await?;
        check_image(&config)?;
        let machines = config.root.join(MACHINES);
        fs::create_dir_all(&machines).map_err(Error::io("create", &machines))?;
        info!(
            hypervisor = hypervisor.capabilities().name,
            virtiofsd = virtiofsd.describe(),
            vsock = vsock.describe(),
            kernel = %config.kernel().display(),
            "virtual machines can be run"
        );
        if config.debug {
            write_debug_initrd(&config)?;
        }
        // Those of sandboxes that cannot be recovered too: their machines may run.
        let numbers = Mutex::new(numbers_in(&config.root)?);
        let mut shared = Shared { config, hypervisor, virtiofsd, vsock, boot_mib: 0, numbers };
        shared.boot_mib = crate::image::boot_mib(&shared.config.kernel(), &shared.initrd())?;
        Ok(Self { shared: Arc::new(shared), pods: Arc::default() })
    }

    /// Looks whether [`Self::open`] would find all it needs, and leaves nothing behind; tells what there is.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn check(config: &VmmConfig, reaper: &Reaper) -> Result<String> {
        // Found out anew: that is what is asked for.
        let mut known = Programs::default();
        let hypervisor = find_hypervisor(config, reaper, &mut known).await?;
        let (virtiofsd, vsock) = find_helpers(&*hypervisor, config, reaper, Trial::Look, &mut known).await?;
        check_image(config)?;
        let found = hypervisor.capabilities();
        Ok(format!(
            "{}, {}, vsock by {}; overhead of a pod: {} MiB, and what virtiofsd needs for its files",
            found.name,
            virtiofsd.describe(),
            vsock.describe(),
            config.guest_overhead_mib + found.overhead_mib
        ))
    }

    fn dir(&self, namespace: &Namespace, id: &SandboxId) -> PathBuf {
        self.shared.config.root.join(namespace).join(id)
    }
}

async fn find_hypervisor(config: &VmmConfig, reaper: &Reaper, known: &mut Programs) -> Result<Box<dyn Hypervisor>> {
    Ok(match &config.hypervisor {
        HypervisorConfig::Qemu(qemu) => Box::new(Qemu::open(qemu.clone(), reaper, known).await?),
    })
}

async fn find_helpers(
    hypervisor: &dyn Hypervisor,
    config: &VmmConfig,
    reaper: &Reaper,
    trial: Trial,
    known: &mut Programs,
) -> Result<(Virtiofsd, VsockWay)> {
    let virtiofsd = Virtiofsd::open(config.virtiofsd.as_deref(), reaper, known).await?;
    let vsock = VsockWay::find(hypervisor.capabilities(), config.vsock_device.as_deref(), trial)?;
    Ok((virtiofsd, vsock))
}

/// The numbers of the machines that sandboxes below a root have.
fn numbers_in(root: &Path) -> Result<BTreeSet<u32>> {
    let mut numbers = BTreeSet::new();
    for namespace in directories(root)? {
        let namespace = root.join(namespace);
        for id in directories(&namespace)? {
            numbers.extend(number_of(&namespace.join(id))?);
        }
    }
    Ok(numbers)
}

/// The number of a sandbox's machine, where it has been given one.
fn number_of(dir: &Path) -> Result<Option<u32>> {
    Ok(machine_dir::of(dir)?.and_then(|place| place.file_name()?.to_str()?.parse().ok()))
}

/// Whether the guest image is there and can be what it should be.
fn check_image(config: &VmmConfig) -> Result<()> {
    // arch/x86/boot/header.S: at 514 "HdrS"; cpio(5): newc, or anything compressed.
    let kernel = config.kernel();
    let head = read_head(&kernel, "the guest's kernel")?;
    if head.get(514..518) != Some(b"HdrS") {
        let why = format!("{} is no bzImage; make one with `make guest`", kernel.display());
        return Err(Error::Unavailable { what: "the guest's kernel".into(), why });
    }
    let debug = config.debug.then(|| debug_initrd(config));
    for initrd in std::iter::once(config.initrd()).chain(debug) {
        let head = read_head(&initrd, "the guest's initrd")?;
        let known: [&[u8]; 4] = [b"070701", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18"];
        if !known.iter().any(|magic| head.starts_with(magic)) {
            let why = format!("{} is no initrd (cpio, gzip, zstd or lz4); make one with `make guest`", initrd.display());
            return Err(Error::Unavailable { what: "the guest's initrd".into(), why });
        }
    }
    Ok(())
}

fn read_head(path: &Path, what: &str) -> Result<Vec<u8>> {
    use io::Read;
    let read = || {
        let mut head = Vec::new();
        fs::File::open(path)?.take(1024).read_to_end(&mut head)?;
        Ok(head)
    };
    read().map_err(|error: io::Error| Error::Unavailable {
        what: what.into(),
        why: format!(
            "{} cannot be read: {error}; make it with `make guest` and install it, or name another in the configuration",
            path.display()
        ),
    })
}

/// What debugging adds to the guest.
fn debug_initrd(config: &VmmConfig) -> PathBuf {
    config.initrd().with_file_name("initrd-debug")
}

/// The kernel unpacks one initrd after the other.
fn write_debug_initrd(config: &VmmConfig) -> Result<()> {
    let target = config.root.join(DEBUG_INITRD);
    let write = || -> io::Result<()> {
        fs::create_dir_all(&config.root)?;
        let mut whole = fs::read(config.initrd())?;
        // Each begins at a multiple of four bytes.
        whole.resize(whole.len().next_multiple_of(4), 0);
        whole.extend(fs::read(debug_initrd(config))?);
        let new = target.with_extension("new");
        fs::write(&new, whole)?;
        fs::rename(&new, &target)
    };
    write().map_err(Error::io("make the initrd for debugging", &target))
}

/// What is in a directory; nothing if it is not there.
fn directories(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(Error::io("list", dir))?,
    };
    let directories = entries.into_iter().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(directories.filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// Removes everything of one sandbox that nobody knows any more.
async fn remove_leftover(shared: &Shared, dir: &Path) -> Result<()> {
    let number = number_of(dir)?;
    for group in groups(dir)? {
        machine_dir::remove_group(&group).await?;
    }
    // The group's path is not known, but it has been removed.
    let id = dir.file_name().and_then(OsStr::to_str).unwrap_or_default();
    machine_dir::clear(dir, &Cgroup::at(&Path::new("/").join(format!("{GROUP}{id}")))?).await?;
    if let Some(number) = number {
        shared.release(number);
    }
    Ok(())
}

/// The control groups of a sandbox, wherever they are.
fn groups(dir: &Path) -> Result<Vec<Cgroup>> {
    match dir.file_name().and_then(OsStr::to_str) {
        Some(id) => Cgroup::named(&format!("{GROUP}{id}")),
        None => Ok(Vec::new()),
    }
}

/// The live processes of a sandbox below the sandboxer's `root`, found without its record: all that is in its control group.
///
/// # Errors
/// When the groups cannot be looked through.
pub fn processes(root: &Path, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
    let dir = root.join(namespace).join(id);
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for group in groups(&dir)? {
        found.extend(group.processes()?);
    }
    Ok(found)
}

#[async_trait]
impl Sandboxer for VmmSandboxer {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            technique: self.shared.hypervisor.capabilities().name.clone(),
            exec: Ok(()),
            pause: Ok(()),
            update: Ok(()),
            terminal: Ok(()),
            features: Some(crate::features()),
        }
    }

    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        stages::enter("check what the pod asks for");
        pod::check(&spec)?;
        let dir = self.dir(&spec.namespace, &spec.id);
        if dir.exists() {
            // Cut off between making it and saving that it is there.
            stages::enter("remove what an earlier sandbox of the same id left behind");
            warn!(dir = %dir.display(), "removing what an earlier sandbox of the same id left behind");
            remove_leftover(&self.shared, &dir).await?;
        }
        let number = self.shared.number()?;
        let pod = Arc::new(Pod::new(spec, context, dir, self.shared.clone(), number));
        if let Err(error) = pod.prepare() {
            self.shared.release(number);
            return Err(error);
        }
        self.pods.add(&pod);
        Ok(Arc::new(VmSandbox::new(pod)))
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        let record: Record = serde_json::from_value(record).map_err(Error::failed("read the sandbox's record"))?;
        self.shared.numbers().insert(record.number);
        let dir = self.dir(&spec.namespace, &spec.id);
        let pod = Arc::new(Pod::new(spec, context, dir, self.shared.clone(), record.number));
        pod.restore(record).await?;
        self.pods.add(&pod);
        Ok(Arc::new(VmSandbox::new(pod)))
    }

    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>> {
        let root = &self.shared.config.root;
        let mut found = Vec::new();
        for namespace in directories(root)?.iter().filter_map(|name| name.parse::<Namespace>().ok()) {
            for id in directories(&root.join(&namespace))?.iter().filter_map(|name| name.parse::<SandboxId>().ok()) {
                let key = (namespace.clone(), id.clone());
                let dir = self.dir(&namespace, &id);
                let (pods, all) = (self.pods.clone(), self.shared.clone());
                match known.get(&key) {
                    // Nobody can tell which of its containers are known.
                    Some(None) => {}
                    Some(Some(containers)) => {
                        let shared = crate::share::SharedDir::of(&dir);
                        let half_made = shared.containers()?.into_iter().filter_map(|name| name.parse::<ContainerId>().ok());
                        for container in half_made.filter(|container| !containers.contains(container)) {
                            let (pods, sandbox, recorded) = (pods.clone(), key.clone(), containers.clone());
                            let what = format!("container {container} of sandbox {id}");
                            found.push(Leftover {
                                sandbox: key.clone(),
                                what,
                                removal: Box::pin(async move {
                                    // A sandbox that has gone has taken it along.
                                    match pods.get(&sandbox) {
                                        Some(pod) => pod::remove_half_made(&pod, &container, &recorded).await,
                                        None => Ok(()),
                                    }
                                }),
                            });
                        }
                    }
                    None => {
                        let what = format!("sandbox {id} of namespace {namespace}");
                        let sandbox = key.clone();
                        let removal = Box::pin(async move {
                            // If somebody has made the same again meanwhile, that is left alone.
                            if pods.get(&sandbox).is_some() { Ok(()) } else { remove_leftover(&all, &dir).await }
                        });
                        found.push(Leftover { sandbox: key, what, removal });
                    }
                }
            }
        }
        Ok(found)
    }

    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        processes(&self.shared.config.root, namespace, id)
    }
}
