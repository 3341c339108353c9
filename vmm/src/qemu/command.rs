//! A machine in the words of QEMU's command line.

use std::{fs::File, os::fd::OwnedFd, path::Path, sync::Arc};

use kuasar_sandboxers::{Error, Result};

use super::{Accelerator, Machine, Setup};
use crate::{
    launch::Launch,
    spec::{Disk, Memory, VmSpec, Vsock},
};

/// The granularity of added memory, in MiB: Linux takes no smaller blocks on x86.
pub(super) const DIMM_MIB: u64 = 128;

/// How many times memory can be added, at most: each takes one of the eight regions that a vhost-user device has at least.
const DIMM_SLOTS: u64 = 4;

/// How many times as much at least is left for the places after one as it takes.
const DIMM_GROWTH: u64 = 4;

/// The processor that is translated: all that QEMU knows, without what makes the guest slow. With `erms` and `fsrm` its kernel clears and
/// copies pages by `rep stosb` and `rep movsb`, which are translated to a step for each byte: starting a program takes twice as long.
/// Five levels of page tables are one more to walk, for addresses that no guest has.
const TRANSLATED_CPU: &str = "max,la57=off,erms=off,fsrm=off";

/// Descriptors that QEMU is given, open: it runs as a user who could open none of them.
#[derive(Debug)]
pub(super) struct Opened {
    /// Listens for QMP clients.
    pub(super) qmp: Arc<OwnedFd>,
    /// The console's file, for appending.
    pub(super) console: Arc<OwnedFd>,
    /// One for each of the spec's disks.
    pub(super) disks: Vec<Arc<OwnedFd>>,
    /// One for each of the spec's shares, connected to its virtiofsd.
    pub(super) shares: Vec<Arc<OwnedFd>>,
    /// Connected to the vsock device, where that is a process.
    pub(super) vsock: Option<Arc<OwnedFd>>,
}

/// Opens an image or block device as the guest may use it.
///
/// # Errors
/// The kernel's, naming the path.
pub(super) fn open_disk(disk: &Disk) -> Result<Arc<OwnedFd>> {
    let file = File::options().read(true).write(!disk.readonly).open(&disk.path).map_err(Error::io("open", &disk.path))?;
    Ok(Arc::new(file.into()))
}

/// `text` as the value of an option, where a comma ends it unless there are two.
fn value(text: &str) -> String {
    text.replace(',', ",,")
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::invalid(path.display().to_string(), "QEMU takes only paths that are UTF-8"))
}

/// Says `spec` in QEMU's words, and gives it the descriptors that these name.
///
/// # Errors
/// [`Error::Invalid`] for a path that QEMU would not take.
pub(super) fn say(spec: &VmSpec, setup: &Setup, opened: &Opened, launch: &mut Launch) -> Result<()> {
    let mut line = Line { launch, bus: setup.machine, sets: 0 };
    line.machine(spec, setup)?;
    line.memory(spec);
    line.channels(opened);
    for (disk, fd) in spec.disks.iter().zip(&opened.disks) {
        line.disk(disk, fd);
    }
    for (share, fd) in spec.shares.iter().zip(&opened.shares) {
        let number = line.launch.pass(fd.clone());
        let tag = value(&share.tag);
        line.option("-chardev", &format!("socket,id=fs-{tag},fd={number}"));
        line.device("vhost-user-fs", &format!("chardev=fs-{tag},tag={tag}"));
    }
    line.nics(spec);
    match (&spec.vsock, &opened.vsock) {
        (Vsock::Kernel { cid, vhost }, _) => {
            let number = line.launch.pass(vhost.clone());
            line.device("vhost-vsock", &format!("guest-cid={cid},vhostfd={number}"));
        }
        (Vsock::User { .. }, Some(fd)) => {
            let number = line.launch.pass(fd.clone());
            line.option("-chardev", &format!("socket,id=vsock,fd={number}"));
            line.device("vhost-user-vsock", "chardev=vsock");
        }
        (Vsock::User { .. } | Vsock::Builtin { .. }, _) => {
            return Err(Error::invalid("vsock", "QEMU has none of its own; use /dev/vhost-vsock or vhost-device-vsock"));
        }
    }
    line.device("virtio-rng", "rng=rng");
    if spec.balloon {
        line.device("virtio-balloon", "free-page-reporting=on,deflate-on-oom=on");
    }
    for port in 1..=setup.hot_disks() {
        line.option("-device", &format!("pcie-root-port,id={},chassis={port},slot={port}", root_port(port)));
    }
    Ok(())
}

/// The name of a place for a hot disk, counted from 1.
pub(super) fn root_port(number: usize) -> String {
    format!("port{number}")
}

struct Line<'a> {
    launch: &'a mut Launch,
    bus: Machine,
    sets: usize,
}

impl Line<'_> {
    fn option(&mut self, name: &str, value: &str) {
        self.launch.args([name, value]);
    }

    /// A virtio device on the bus that this machine has.
    fn device(&mut self, name: &str, properties: &str) {
        let bus = match self.bus {
            Machine::Q35 => "pci",
            Machine::Microvm => "device",
        };
        self.option("-device", &format!("{name}-{bus},{properties}"));
    }

    fn machine(&mut self, spec: &VmSpec, setup: &Setup) -> Result<()> {
        self.launch.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
        self.option("-display", "none");
        self.option("-name", &format!("guest={},debug-threads=on", value(&spec.name)));
        // None of the devices of a PC that cost time at boot. With graphics=off the firmware would write on the console.
        let machine = match setup.machine {
            Machine::Q35 => "q35,smm=off,vmport=off,hpet=off,usb=off,sata=off",
            Machine::Microvm => "microvm,isa-serial=on",
        };
        // A core of QEMU has none of the guest's secrets in it.
        self.option("-machine", &format!("{machine},memory-backend=ram,dump-guest-core=off"));
        match setup.accelerator {
            Accelerator::Kvm => {
                self.option("-accel", "kvm");
                self.option("-cpu", "host");
            }
            Accelerator::Tcg => {
                // The translated code of all processors, in MiB; QEMU's default is a gigabyte.
                self.option("-accel", "tcg,thread=multi,tb-size=64");
                self.option("-cpu", TRANSLATED_CPU);
            }
        }
        self.option("-smp", &format!("cpus={},maxcpus={}", spec.cpus.boot, setup.possible_cpus(spec)));
        self.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        self.option("-kernel", path(&spec.kernel)?);
        self.option("-initrd", path(&spec.initrd)?);
        self.option("-append", &kernel_words(spec, setup).join(" "));
        // Tells of a panic where the guest has a driver for it. On a PC without ISA bridge the console has to.
        if setup.machine == Machine::Q35 {
            self.option("-device", "pvpanic");
        }
        self.option("-action", "panic=exit-failure");
        Ok(())
    }

    fn memory(&mut self, spec: &VmSpec) {
        let (boot, slots) = (spec.memory.boot_mib, dimm_slots(spec.memory));
        let more = if self.bus == Machine::Q35 && slots > 0 {
            let more = (spec.memory.max_mib - boot).next_multiple_of(DIMM_MIB);
            format!(",slots={slots},maxmem={}M", boot + more)
        } else {
            String::new()
        };
        self.option("-m", &format!("size={boot}M{more}"));
        self.option("-object", &format!("memory-backend-memfd,id=ram,size={boot}M,share=on{}", huge_pages(spec.memory)));
        self.option("-object", "rng-random,id=rng,filename=/dev/urandom");
    }

    fn channels(&mut self, opened: &Opened) {
        let number = self.launch.pass(opened.qmp.clone());
        self.option("-chardev", &format!("socket,id=qmp,fd={number},server=on,wait=off"));
        self.option("-mon", "chardev=qmp,mode=control");
        let set = self.set(&opened.console);
        self.option("-chardev", &format!("file,id=console,path={set},append=on"));
        self.option("-serial", "chardev:console");
    }

    /// Gives a descriptor under a name that QEMU opens as a file.
    fn set(&mut self, fd: &Arc<OwnedFd>) -> String {
        self.sets += 1;
        let number = self.launch.pass(fd.clone());
        self.option("-add-fd", &format!("fd={number},set={}", self.sets));
        format!("/dev/fdset/{}", self.sets)
    }

    fn disk(&mut self, disk: &Disk, fd: &Arc<OwnedFd>) {
        let file = self.set(fd);
        self.option("-blockdev", &block_node(disk, &file).to_string());
        let serial = value(&disk.serial);
        self.device("virtio-blk", &format!("drive=disk-{serial},id=dev-{serial},serial={serial}"));
    }

    fn nics(&mut self, spec: &VmSpec) {
        for nic in &spec.nics {
            let mut backend = format!("tap,id=nic{},fd={}", nic.index, self.launch.pass(nic.tap.clone()));
            if let Some(vhost) = &nic.vhost {
                backend += &format!(",vhost=on,vhostfd={}", self.launch.pass(vhost.clone()));
            }
            self.option("-netdev", &backend);
            // No firmware for booting from the network.
            let rom = if self.bus == Machine::Q35 { ",romfile=" } else { "" };
            let front = format!("netdev=nic{},mac={},host_mtu={}{rom}", nic.index, nic.mac, nic.mtu);
            self.device("virtio-net", &front);
        }
    }
}

/// The node of a disk that is open as `file`. A block device may have other users on the node, as with pods that are no machines: who may use
/// it with whom is the volume's access mode, of which Kubernetes takes care. An image is this machine's alone.
pub(super) fn block_node(disk: &Disk, file: &str) -> serde_json::Value {
    let (driver, locking) = if is_device(disk) { ("host_device", "off") } else { ("file", "auto") };
    serde_json::json!({
        "node-name": format!("disk-{}", disk.serial),
        "driver": "raw",
        "read-only": disk.readonly,
        "discard": "unmap",
        "file": {"driver": driver, "filename": file, "locking": locking},
    })
}

fn is_device(disk: &Disk) -> bool {
    use std::os::unix::fs::FileTypeExt;
    std::fs::metadata(&disk.path).is_ok_and(|found| found.file_type().is_block_device())
}

/// How often memory can be added on the way to the maximum.
pub(super) fn dimm_slots(memory: Memory) -> u64 {
    (memory.max_mib.saturating_sub(memory.boot_mib)).div_ceil(DIMM_MIB).min(DIMM_SLOTS)
}

/// How much is to be added, in MiB, where `missing` are asked for, `rest` are left to the maximum, and `slots` places are free. The places are
/// few, so what is added grows with each: as little as is asked for at first, and all the rest in the last.
pub(super) fn dimm_mib(missing: u64, rest: u64, slots: u64) -> u64 {
    let least = rest.div_ceil(DIMM_GROWTH.pow(u32::try_from(slots.saturating_sub(1)).unwrap_or(0)));
    missing.max(least).next_multiple_of(DIMM_MIB).min(rest.next_multiple_of(DIMM_MIB))
}

fn huge_pages(memory: Memory) -> String {
    memory.huge_page_kib.map(|size| format!(",hugetlb=on,hugetlbsize={size}K")).unwrap_or_default()
}

/// The kernel's words, and those that this machine needs unless they are said already: where the console is, and that a panic ends it.
fn kernel_words(spec: &VmSpec, setup: &Setup) -> Vec<String> {
    let said = |word: &&str| {
        let key = word.split('=').next().unwrap_or_default();
        !spec.cmdline.iter().any(|other| other.split('=').next() == Some(key))
    };
    // Without a keyboard controller only a triple fault (`reboot=t`) restarts every one of these machines, which -no-reboot makes an end.
    // Translated time stamps are the host's. Measured by a translated timer on a busy host they are many times too fast or slow; and a
    // microvm has only the PIT for that, which fails then, and the guest has no clock at all and hangs.
    let clock = setup.time_stamp_khz.map(|khz| format!("tsc_early_khz={khz}"));
    let own = ["console=ttyS0", "panic=-1", "reboot=t"].into_iter().chain(clock.as_deref());
    own.filter(said).map(str::to_owned).chain(spec.cmdline.iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

    use super::*;
    use crate::spec::{Cpus, MacAddress, Nic, Share};

    fn fd() -> Arc<OwnedFd> {
        Arc::new(File::open("/dev/null").unwrap().into())
    }

    fn setup(machine: Machine) -> Setup {
        let (program, accelerator) = ("/bin/false".into(), Accelerator::Tcg);
        Setup { program, machine, accelerator, hot_disks: 2, groups: Vec::new(), time_stamp_khz: Some(2_600_000) }
    }

    fn spec() -> VmSpec {
        VmSpec {
            name: "pod".into(),
            cpus: Cpus { boot: 1, max: 4 },
            memory: Memory { boot_mib: 256, max_mib: 1024, huge_page_kib: Some(2048) },
            kernel: "/boot/vmlinuz".into(),
            initrd: "/boot/initrd".into(),
            cmdline: vec!["quiet".into(), "panic=5".into()],
            disks: vec![Disk { serial: "root".into(), path: "/dev/null".into(), readonly: true }],
            shares: vec![Share { tag: "share".into(), socket: "/s".into() }],
            nics: vec![Nic { index: 0, mac: MacAddress([2, 0, 0, 0, 0, 1]), mtu: 1400, tap: fd(), vhost: Some(fd()) }],
            vsock: Vsock::Kernel { cid: 5, vhost: fd() },
            console: "/console".into(),
            balloon: true,
        }
    }

    fn words(spec: &VmSpec, machine: Machine) -> Vec<String> {
        let opened = Opened { qmp: fd(), console: fd(), disks: vec![fd()], shares: vec![fd()], vsock: None };
        let mut launch = Launch::new("qemu", Path::new("/bin/false"));
        say(spec, &setup(machine), &opened, &mut launch).unwrap();
        launch.arguments().iter().map(|word| word.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn a_pc_in_words() {
        let line = words(&spec(), Machine::Q35).join(" ");
        for part in [
            "-machine q35,smm=off,vmport=off,hpet=off,usb=off,sata=off,memory-backend=ram,dump-guest-core=off ",
            "-cpu max,la57=off,erms=off,fsrm=off ",
            "-smp cpus=1,maxcpus=4 ",
            "-m size=256M,slots=4,maxmem=1024M ",
            "-object memory-backend-memfd,id=ram,size=256M,share=on,hugetlb=on,hugetlbsize=2048K ",
            "-append console=ttyS0 reboot=t tsc_early_khz=2600000 quiet panic=5 ",
            "-add-fd fd=11,set=1 -chardev file,id=console,path=/dev/fdset/1,append=on ",
            "-add-fd fd=12,set=2 -blockdev {\"node-name\":\"disk-root\",\"driver\":\"raw\",\"read-only\":true,",
            "-device virtio-blk-pci,drive=disk-root,id=dev-root,serial=root ",
            "-chardev socket,id=fs-share,fd=13 -device vhost-user-fs-pci,chardev=fs-share,tag=share ",
            "-netdev tap,id=nic0,fd=14,vhost=on,vhostfd=15 ",
            "-device virtio-net-pci,netdev=nic0,mac=02:00:00:00:00:01,host_mtu=1400,romfile= ",
            "-device vhost-vsock-pci,guest-cid=5,vhostfd=16 ",
            "-device pcie-root-port,id=port2,chassis=2,slot=2",
        ] {
            assert!(line.contains(part), "{part:?} is not in {line}");
        }
    }

    #[test]
    fn a_pc_of_one_processor_keeps_its_memory_barriers() {
        let one = VmSpec { cpus: Cpus { boot: 1, max: 1 }, ..spec() };
        assert!(words(&one, Machine::Q35).join(" ").contains("-smp cpus=1,maxcpus=2 "));
    }

    #[test]
    fn a_microvm_in_words_has_no_pci_and_nothing_that_grows() {
        let line = words(&spec(), Machine::Microvm).join(" ");
        assert!(line.contains("-smp cpus=1,maxcpus=1 ") && line.contains("-m size=256M -object"), "{line}");
        assert!(!line.contains("-pci") && !line.contains("pcie") && !line.contains("romfile"), "{line}");
        let refused = VmSpec { vsock: Vsock::Builtin { cid: 3, socket: "/x".into() }, ..spec() };
        let opened = Opened { qmp: fd(), console: fd(), disks: vec![fd()], shares: vec![fd()], vsock: None };
        let mut launch = Launch::new("qemu", Path::new("/bin/false"));
        assert!(say(&refused, &setup(Machine::Microvm), &opened, &mut launch).is_err());
    }

    #[test]
    fn memory_is_added_by_small_steps_and_reaches_its_maximum() {
        for (boot_mib, max_mib, step) in [(128, 256, 128), (256, 1024, 128), (248, 3960, 128), (256, 100_096, 1664)] {
            let memory = Memory { boot_mib, max_mib, huge_page_kib: None };
            assert_eq!(dimm_mib(1, max_mib - boot_mib, dimm_slots(memory)), step, "{memory:?}");
            assert_eq!(dimm_mib(max_mib - boot_mib, max_mib - boot_mib, dimm_slots(memory)), max_mib - boot_mib);
            let mut present = boot_mib;
            for slots in (1..=dimm_slots(memory)).rev() {
                assert!(present < max_mib, "{memory:?} has {slots} places too many");
                present += dimm_mib(1, max_mib - present, slots);
            }
            assert_eq!(present, max_mib, "{memory:?}");
        }
    }

    /// The keys of an option's value as QEMU reads it: `,,` is a comma.
    fn keys(value: &str) -> Vec<String> {
        let parts = value.replace(",,", "\0");
        parts.split(',').map(|part| part.split('=').next().unwrap_or_default().to_owned()).collect()
    }

    proptest! {
        #[test]
        fn nothing_in_a_spec_becomes_an_option(name in "[a-z,=]{0,20}", tag in "[a-z,=]{1,20}", kernel in "/[a-z,=-]{1,20}") {
            let mut hostile = spec();
            hostile.name = name.clone();
            hostile.shares[0].tag = tag.clone();
            hostile.kernel = PathBuf::from(&kernel);
            let line = words(&hostile, Machine::Q35);
            let after = |option: &str, start: &str| {
                let at = line.windows(2).find(|pair| pair[0] == option && pair[1].starts_with(start));
                at.map(|pair| pair[1].clone()).unwrap()
            };
            prop_assert_eq!(keys(&after("-name", "")), ["guest", "debug-threads"]);
            prop_assert_eq!(keys(&after("-chardev", "socket,id=fs-")), ["socket", "id", "fd"]);
            prop_assert_eq!(keys(&after("-device", "vhost-user-fs")), ["vhost-user-fs-pci", "chardev", "tag"]);
            prop_assert_eq!(after("-kernel", ""), kernel);
        }
    }
}
