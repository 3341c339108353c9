//! A machine that runs, and the changes that can be made to it.

use std::{
    collections::HashSet,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use kuasar_sandboxers::{Error, Result, types::Exit};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    sync::{Mutex, broadcast::error::RecvError},
    time::{Instant, timeout_at},
};

use super::{Machine, QMP_SOCKET, Setup, address, command, remove_socket};
use crate::{
    hypervisor::{Place, Vm},
    launch::{LAST_WORDS, LaunchRecord, Launched},
    qmp::{Event, Qmp},
    spec::{Cpus, Disk, Memory, VmSpec, VsockAddress},
};

/// How long QEMU may take to answer: longer only when the host is beyond help.
const ANSWER: Duration = Duration::from_secs(20);

/// How long a guest may take to let go of a disk.
const LETTING_GO: Duration = Duration::from_secs(20);

/// How long QEMU's end may take to be told after its socket has closed.
const ENDING: Duration = Duration::from_secs(2);

/// How much of the console's end is searched for a panic, and how much of the panic is told, in bytes.
const CONSOLE: u64 = 64 << 10;
const PANIC: usize = 200;

/// What the kernel says then.
const PANIC_WORDS: &str = "Kernel panic - not syncing: ";

/// What a later daemon needs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    process: LaunchRecord,
    vsock: VsockAddress,
    console: PathBuf,
    machine: Machine,
    hot_disks: usize,
    cpus: Cpus,
    memory: Memory,
}

/// A machine run by QEMU.
#[derive(Debug)]
pub(super) struct QemuVm {
    record: Record,
    launched: Launched,
    socket: PathBuf,
    /// Made when it is needed, and again when it has broken.
    qmp: Mutex<Option<Qmp>>,
    /// Held while devices are added or removed.
    changing: Mutex<()>,
    panicked: Arc<AtomicBool>,
}

impl QemuVm {
    pub(super) fn new(launched: Launched, setup: &Setup, spec: &VmSpec, place: &Place) -> Self {
        let record = Record {
            process: launched.record(),
            vsock: address(spec),
            console: spec.console.clone(),
            machine: setup.machine,
            hot_disks: setup.hot_disks(),
            cpus: Cpus { boot: spec.cpus.boot, max: setup.max_cpus(spec) },
            memory: spec.memory,
        };
        Self::with(record, launched, place)
    }

    pub(super) fn adopt(record: Record, place: &Place) -> Result<Self> {
        let launched = Launched::adopt(record.process.clone(), &place.dir, &place.reaper)?;
        Ok(Self::with(record, launched, place))
    }

    fn with(record: Record, launched: Launched, place: &Place) -> Self {
        let socket = place.dir.join(QMP_SOCKET);
        Self { record, launched, socket, qmp: Mutex::default(), changing: Mutex::default(), panicked: Arc::default() }
    }

    /// Waits until QEMU answers. When it ends instead, its own words are the error.
    pub(super) async fn connect(&self) -> Result<()> {
        let connected = tokio::select! {
            connected = self.qmp() => connected.map(drop),
            _ = self.launched.exited() => return Err(self.launched.failure("start", ENDING).await),
        };
        match connected {
            // Its socket has closed; most often because it is about to end.
            Err(Error::Backend { .. } | Error::Io { .. })
                if tokio::time::timeout(ENDING, self.launched.exited()).await.is_ok() =>
            {
                Err(self.launched.failure("start", ENDING).await)
            }
            connected => connected,
        }
    }

    async fn qmp(&self) -> Result<Qmp> {
        let mut held = self.qmp.lock().await;
        if let Some(qmp) = held.as_ref().filter(|qmp| !qmp.is_closed()) {
            return Ok(qmp.clone());
        }
        if self.launched.exit().is_some() {
            return Err(self.launched.failure("answer", ENDING).await);
        }
        let stream = UnixStream::connect(&self.socket).await.map_err(Error::io("connect to", &self.socket))?;
        let panicked = self.panicked.clone();
        let seen = move |event: &Event| {
            if matches!(event.name.as_str(), "GUEST_PANICKED" | "GUEST_CRASHLOADED") {
                panicked.store(true, Ordering::Relaxed);
            }
        };
        let qmp = Qmp::open(stream, "QEMU", ANSWER, seen).await?;
        Ok(held.insert(qmp).clone())
    }

    async fn run(&self, name: &'static str, arguments: Value) -> Result<Value> {
        self.qmp().await?.run(name, arguments, ANSWER).await
    }

    fn hot(&self, operation: &'static str) -> Result<()> {
        match self.record.machine {
            Machine::Q35 => Ok(()),
            Machine::Microvm => {
                Err(Error::Unsupported { operation, why: "a microvm machine takes nothing more once it runs; use q35".into() })
            }
        }
    }

    /// The ids of all devices that have one.
    async fn devices(&self) -> Result<HashSet<String>> {
        let list = self.run("qom-list", json!({"path": "/machine/peripheral"})).await?;
        Ok(array(&list).filter_map(|device| Some(device.get("name")?.as_str()?.to_owned())).collect())
    }

    /// A place for a disk with nothing in it.
    async fn free_port(&self) -> Result<String> {
        let buses = self.run("query-pci", json!({})).await?;
        let empty = |device: &Value| {
            let name = device.get("qdev_id")?.as_str()?.to_owned();
            let taken = array(device.get("pci_bridge")?.get("devices").unwrap_or(&Value::Null)).next().is_some();
            Some(name).filter(|_| !taken)
        };
        let devices = array(&buses).filter_map(|bus| bus.get("devices")).flat_map(array);
        let free: HashSet<String> = devices.filter_map(empty).collect();
        let port = (1..=self.record.hot_disks).map(command::root_port).find(|port| free.contains(port));
        port.ok_or_else(|| Error::Unsupported {
            operation: "adding a disk",
            why: format!("all {} places of the machine are taken; configure more (hot_disks)", self.record.hot_disks),
        })
    }

    /// Takes back what of a disk is no device: its node, and the descriptor behind it. What is not there is fine.
    async fn forget_disk(&self, serial: &str) -> Result<()> {
        let nodes = self.run("query-named-block-nodes", json!({"flat": true})).await?;
        let name = node(serial);
        if array(&nodes).any(|node| node.get("node-name").and_then(Value::as_str) == Some(&name)) {
            self.run("blockdev-del", json!({"node-name": name})).await?;
        }
        let sets = self.run("query-fdsets", json!({})).await?;
        let ours = |set: &&Value| {
            array(set.get("fds").unwrap_or(&Value::Null)).any(|fd| fd.get("opaque").and_then(Value::as_str) == Some(serial))
        };
        for set in array(&sets).filter(ours).filter_map(|set| set.get("fdset-id")) {
            self.run("remove-fd", json!({"fdset-id": set})).await?;
        }
        Ok(())
    }

    async fn plug_disk(&self, disk: &Disk, port: &str) -> Result<()> {
        let fd = command::open_disk(disk)?;
        let added = self.qmp().await?.run_with("add-fd", json!({"opaque": disk.serial}), fd, ANSWER).await?;
        let set = added.get("fdset-id").and_then(Value::as_u64).unwrap_or_default();
        self.run("blockdev-add", command::block_node(disk, &format!("/dev/fdset/{set}"))).await?;
        let (id, drive) = (device(&disk.serial), node(&disk.serial));
        let device = json!({"driver": "virtio-blk-pci", "id": id, "drive": drive, "serial": disk.serial, "bus": port});
        self.run("device_add", device).await.map(drop)
    }

    /// Waits for a device's end, of which an event tells.
    async fn await_removal(&self, id: &str) -> Result<()> {
        let qmp = self.qmp().await?;
        let mut events = qmp.events();
        let asked = qmp.ask("device_del", json!({"id": id}), None, ANSWER).await?;
        match asked {
            Err(refusal) if refusal.class == "DeviceNotFound" => return Ok(()),
            // Asked for before, and the guest has not let go yet: wait on.
            Err(refusal) if refusal.description.contains("already in the process of unplug") => {}
            Err(refusal) => {
                return Err(Error::Backend {
                    program: "QEMU".into(),
                    operation: format!("remove {id}"),
                    message: refusal.description,
                });
            }
            Ok(_) => {}
        }
        let deadline = Instant::now() + LETTING_GO;
        loop {
            match timeout_at(deadline, events.recv()).await {
                Ok(Ok(event)) if event.data.get("device").and_then(Value::as_str) == Some(id) => match event.name.as_str() {
                    "DEVICE_DELETED" => return Ok(()),
                    "DEVICE_UNPLUG_GUEST_ERROR" => {
                        return Err(Error::Backend {
                            program: "QEMU".into(),
                            operation: format!("remove {id}"),
                            message: "the guest refuses to let go".into(),
                        });
                    }
                    _ => {}
                },
                Ok(Ok(_)) => {}
                // Events were missed, or there will be none: see for ourselves.
                Ok(Err(RecvError::Lagged(_) | RecvError::Closed)) | Err(_) if !self.devices().await?.contains(id) => {
                    return Ok(());
                }
                Ok(Err(RecvError::Lagged(_))) => {}
                Ok(Err(RecvError::Closed)) | Err(_) => {
                    let operation = format!("the guest's letting go of {id}");
                    return Err(Error::TimedOut { operation, seconds: LETTING_GO.as_secs() });
                }
            }
        }
    }
}

/// Before a disk's serial number, in the id of its device.
const DEVICE: &str = "dev-";

fn device(serial: &str) -> String {
    format!("{DEVICE}{serial}")
}

fn node(serial: &str) -> String {
    format!("disk-{serial}")
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[async_trait]
impl Vm for QemuVm {
    fn record(&self) -> Value {
        // Plain data with string keys: it always can be written.
        serde_json::to_value(&self.record).unwrap_or_default()
    }

    fn pid(&self) -> u32 {
        self.launched.pid()
    }

    fn vsock(&self) -> VsockAddress {
        self.record.vsock.clone()
    }

    async fn add_disk(&self, disk: &Disk) -> Result<()> {
        self.hot("adding a disk")?;
        let _changing = self.changing.lock().await;
        if self.devices().await?.contains(&device(&disk.serial)) {
            return Ok(());
        }
        // Of an attempt that a daemon died in.
        self.forget_disk(&disk.serial).await?;
        let port = self.free_port().await?;
        let plugged = self.plug_disk(disk, &port).await;
        if plugged.is_err()
            && let Err(error) = self.forget_disk(&disk.serial).await
        {
            tracing::warn!(error = error.report(), disk = disk.serial, "cannot take back a disk that was not added");
        }
        plugged
    }

    async fn remove_disk(&self, serial: &str) -> Result<()> {
        self.hot("removing a disk")?;
        let _changing = self.changing.lock().await;
        if self.devices().await?.contains(&device(serial)) {
            self.await_removal(&device(serial)).await?;
        }
        self.forget_disk(serial).await
    }

    async fn disks(&self) -> Result<Vec<String>> {
        let devices = self.devices().await?;
        let mut disks: Vec<_> = devices.iter().filter_map(|device| Some(device.strip_prefix(DEVICE)?.to_owned())).collect();
        disks.sort_unstable();
        Ok(disks)
    }

    async fn set_cpus(&self, count: u32) -> Result<()> {
        let _changing = self.changing.lock().await;
        if count > self.record.cpus.max {
            return Err(Error::invalid("processors", format!("{count} is more than the machine's {}", self.record.cpus.max)));
        }
        if self.record.cpus.max == self.record.cpus.boot {
            return Ok(());
        }
        let list = self.run("query-hotpluggable-cpus", json!({})).await?;
        let (there, mut free): (Vec<_>, Vec<_>) = array(&list).partition(|cpu| cpu.get("qom-path").is_some());
        // QEMU lists the last first.
        free.reverse();
        for cpu in free.into_iter().take((count as usize).saturating_sub(there.len())) {
            let mut device = cpu.get("props").cloned().unwrap_or_else(|| json!({}));
            let place: Vec<String> = device.as_object().into_iter().flatten().map(|(_, number)| number.to_string()).collect();
            device["id"] = json!(format!("cpu-{}", place.join("-")));
            device["driver"] = cpu.get("type").cloned().unwrap_or_default();
            self.run("device_add", device).await?;
        }
        Ok(())
    }

    async fn set_memory(&self, mib: u64) -> Result<u64> {
        let memory = self.record.memory;
        let _changing = self.changing.lock().await;
        if mib > memory.max_mib {
            return Err(Error::invalid("memory", format!("{mib} MiB is more than the machine's {}", memory.max_mib)));
        }
        let sizes = self.run("query-memory-size-summary", json!({})).await?;
        let size = |key: &str| sizes.get(key).and_then(Value::as_u64).unwrap_or_default() >> 20;
        let present = size("base-memory") + size("plugged-memory");
        if mib <= present {
            return Ok(present);
        }
        self.hot("adding memory")?;
        let devices = self.devices().await?;
        let dimms = command::dimm_slots(memory);
        let taken = devices.iter().filter(|device| device.starts_with("dimm")).count() as u64;
        if taken >= dimms {
            return Ok(present);
        }
        let more = command::dimm_mib(mib - present, memory.max_mib.saturating_sub(present), dimms - taken);
        let Some(id) = (0..).map(|number| format!("dimm{number}")).find(|id| !devices.contains(id)) else { return Ok(present) };
        let ram = format!("{id}-ram");
        let mut backend = json!({"qom-type": "memory-backend-memfd", "id": ram, "size": more << 20, "share": true});
        if let Some(size) = memory.huge_page_kib {
            backend["hugetlb"] = json!(true);
            backend["hugetlbsize"] = json!(size << 10);
        }
        // Of an attempt that a daemon died in; there is none as a rule.
        self.qmp().await?.ask("object-del", json!({"id": ram}), None, ANSWER).await?.ok();
        self.run("object-add", backend).await?;
        if let Err(error) = self.run("device_add", json!({"driver": "pc-dimm", "id": id, "memdev": ram})).await {
            self.run("object-del", json!({"id": ram})).await?;
            return Err(error);
        }
        Ok(present + more)
    }

    /// QEMU's own `stop` also stops its vhost-user devices, and vhost-device-vsock 0.3.0 is deaf for good after every third `cont` or so.
    /// Such a machine is stopped as a process; until it goes on, QMP does not answer.
    async fn pause(&self) -> Result<()> {
        match self.record.vsock {
            VsockAddress::Cid(_) => self.run("stop", json!({})).await.map(drop),
            VsockAddress::Hybrid(_) => self.launched.signal(libc::SIGSTOP),
        }
    }

    async fn resume(&self) -> Result<()> {
        match self.record.vsock {
            VsockAddress::Cid(_) => self.run("cont", json!({})).await.map(drop),
            VsockAddress::Hybrid(_) => self.launched.signal(libc::SIGCONT),
        }
    }

    async fn kill(&self) -> Result<()> {
        self.launched.kill().await?;
        remove_socket(&self.socket)
    }

    async fn exited(&self) -> Exit {
        self.launched.exited().await
    }

    fn last_words(&self) -> Option<String> {
        let panic = panic_words(&self.record.console);
        let panic = match panic {
            Some(words) => Some(format!("the guest's kernel panicked: {words}")),
            None if self.panicked.load(Ordering::Relaxed) => Some("the guest's kernel panicked".into()),
            None => None,
        };
        let words: Vec<String> = [panic, self.launched.last_words()].into_iter().flatten().collect();
        let words = words.join("\n");
        let end = (0..=words.len().min(LAST_WORDS)).rev().find(|end| words.is_char_boundary(*end)).unwrap_or(0);
        Some(words[..end].to_owned()).filter(|words| !words.is_empty())
    }
}

/// What the kernel has said on the console when it panicked. The guest may write there what it likes: this is for people only.
fn panic_words(console: &Path) -> Option<String> {
    let mut file = File::open(console).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE))).ok()?;
    let mut end = Vec::new();
    file.take(CONSOLE).read_to_end(&mut end).ok()?;
    let text = String::from_utf8_lossy(&end);
    let words = &text[text.rfind(PANIC_WORDS)? + PANIC_WORDS.len()..];
    Some(
        words
            .chars()
            .take_while(|character| *character != '\n')
            .filter(|character| !character.is_control())
            .take(PANIC)
            .collect(),
    )
}
