//! The real QEMU, translating a real kernel: start to end, changes while it runs, being taken over, and what goes wrong.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

mod machines;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use kuasar_sandboxers::{Code, process::is_dead, programs::Programs, undo::Undo};
use kuasar_vmm::{
    hypervisor::{Hypervisor, Vm},
    launch::Launched,
    qemu::{Accel, Machine, Qemu, QemuConfig},
    spec::{Cpus, Disk, Memory, VmSpec, VsockAddress},
};
use machines::{Bench, bench, config, reaper};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

const MINUTE: Duration = Duration::from_secs(60);

/// Starts a machine as a sandbox would.
async fn start(bench: &Bench, machine: Machine, change: impl FnOnce(&mut VmSpec)) -> (Arc<dyn Vm>, Launched, Qemu) {
    let qemu = Qemu::open(config(machine), &reaper(), &mut Programs::default()).await.unwrap();
    let (device, vsock) = bench.vsock().await;
    let mut spec = bench.spec(vsock);
    change(&mut spec);
    let mut undo = Undo::new("test");
    let vm = qemu.start(spec, bench.place(), &mut undo).await;
    let vm = undo.settle(vm).await.unwrap();
    (vm, device, qemu)
}

/// Ends a machine, and checks that nothing is left of it.
async fn end(bench: &Bench, vm: &Arc<dyn Vm>, device: &Launched) {
    vm.kill().await.unwrap();
    vm.kill().await.unwrap();
    device.kill().await.unwrap();
    assert!(is_dead(vm.pid()) && is_dead(device.pid()));
    assert_eq!(bench.left(), ["vsock"]);
}

async fn boots_and_is_killed(test: &str, machine: Machine) {
    let script = "say capabilities $(grep -c . /proc/cpuinfo); say disks $(ls /sys/block | grep -c vd); say virtio $(ls /sys/bus/virtio/devices)";
    let Some(bench) = bench(test, script).await else { return };
    fs::write(bench.path("disk"), vec![0; 1 << 20]).unwrap();
    fs::set_permissions(bench.path("disk"), fs::Permissions::from_mode(0o600)).unwrap();
    let disk = Disk { serial: "cold".into(), path: bench.path("disk"), readonly: true };
    let begin = Instant::now();
    let (vm, device, qemu) = start(&bench, machine, |spec| spec.disks.push(disk)).await;
    let started = begin.elapsed();
    bench.said("end of the script").await;
    eprintln!("{}: {started:?} to QMP, {:?} to the end of the script", qemu.capabilities().name, begin.elapsed());
    let console = bench.console();
    assert!(console.contains("disks 1") && console.contains("virtio virtio0 virtio1 virtio2 virtio3"), "{console}");
    let status = fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line =
        |key: &str| status.lines().find(|line| line.starts_with(key)).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(line("Uid:"), "Uid: 64000 64000 64000 64000");
    assert_eq!((line("CapEff:").as_str(), line("CapBnd:").as_str()), ("CapEff: 0000000000000000", "CapBnd: 0000000000000000"));
    assert_eq!((line("NoNewPrivs:").as_str(), line("Seccomp:").as_str()), ("NoNewPrivs: 1", "Seccomp: 2"));
    // The console is cut by whoever owns it; QEMU appends.
    fs::File::options().write(true).open(bench.path("console")).unwrap().set_len(0).unwrap();
    // Nobody listens on the guest's port, which is an answer; a pause does not cost the way to it.
    let VsockAddress::Hybrid(path) = vm.vsock() else { panic!("{:?}", vm.vsock()) };
    for _ in 0..4 {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(b"CONNECT 1024\n").await.unwrap();
        assert_eq!(timeout(MINUTE, stream.read(&mut [0; 32])).await.unwrap().unwrap_or(0), 0);
        vm.pause().await.unwrap();
        vm.resume().await.unwrap();
    }
    assert!(!is_dead(vm.pid()));
    fs::remove_file(bench.path("disk")).unwrap();
    end(&bench, &vm, &device).await;
    assert_eq!((vm.exited().await.status, vm.last_words()), (137, None));
}

#[tokio::test]
async fn a_q35_machine_boots_and_is_killed() {
    boots_and_is_killed("a_q35_machine_boots_and_is_killed", Machine::Q35).await;
}

#[tokio::test]
async fn a_microvm_machine_boots_and_is_killed() {
    boots_and_is_killed("a_microvm_machine_boots_and_is_killed", Machine::Microvm).await;
}

#[tokio::test]
async fn one_that_cannot_start_says_why_and_leaves_nothing() {
    let Some(bench) = bench("one_that_cannot_start_says_why_and_leaves_nothing", "").await else { return };
    let qemu = Qemu::open(config(Machine::Q35), &reaper(), &mut Programs::default()).await.unwrap();
    let (device, vsock) = bench.vsock().await;
    let mut spec = bench.spec(vsock);
    spec.kernel = bench.path("none");
    let mut undo = Undo::new("test");
    let result = qemu.start(spec, bench.place(), &mut undo).await;
    let report = undo.settle(result).await.unwrap_err().report();
    assert!(report.contains("could not open kernel file") && report.contains("none"), "{report}");
    device.kill().await.unwrap();
    assert_eq!(bench.left(), ["vsock"]);
}

#[tokio::test]
async fn disks_come_and_go() {
    let script = "n=0; while :; do d=$(for s in /sys/block/vd*/serial; do echo $(cat $s); done 2>/dev/null | sort | tr '\\n' ' '); \
                  [ \"$d\" = \"$o\" ] || { n=$((n+1)); say $n disks \"$d.\"; o=$d; }; sleep 0.1; done";
    let Some(bench) = bench("disks_come_and_go", script).await else { return };
    let disk = |serial: &str, readonly| {
        let path = bench.path(&format!("disk,{serial}"));
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        Disk { serial: serial.into(), path, readonly }
    };
    let (one, two) = (disk("one", false), disk("two", true));
    let cold = disk("cold", false);
    let (vm, device, _) = start(&bench, Machine::Q35, |spec| spec.disks.push(cold.clone())).await;
    bench.said("1 disks cold .").await;
    vm.add_disk(&one).await.unwrap();
    vm.add_disk(&one).await.unwrap();
    bench.said("2 disks cold one .").await;
    vm.add_disk(&two).await.unwrap();
    bench.said("3 disks cold one two .").await;
    vm.remove_disk("one").await.unwrap();
    vm.remove_disk("one").await.unwrap();
    vm.remove_disk("never").await.unwrap();
    assert_eq!(vm.disks().await.unwrap(), ["cold", "two"]);
    bench.said("4 disks cold two .").await;
    // Its descriptor is gone, too: the image can be used elsewhere.
    let open = fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    let open: Vec<_> = open.collect();
    assert!(!open.contains(&one.path) && open.contains(&two.path) && open.contains(&cold.path), "{open:?}");
    // Again, and as many as there are places.
    vm.add_disk(&one).await.unwrap();
    for serial in ["three", "four"] {
        vm.add_disk(&disk(serial, false)).await.unwrap();
    }
    let error = vm.add_disk(&disk("five", false)).await.unwrap_err().report();
    assert!(error.contains("hot_disks"), "{error}");
    let missing = Disk { path: bench.path("missing"), ..disk("six", false) };
    assert!(vm.add_disk(&missing).await.is_err());
    for serial in ["one", "two", "three", "four", "five", "cold"] {
        fs::remove_file(bench.path(&format!("disk,{serial}"))).unwrap();
    }
    fs::remove_file(bench.path("disk,six")).unwrap();
    end(&bench, &vm, &device).await;
}

#[tokio::test]
async fn processors_and_memory_are_added() {
    let script = "say 1 cpus $(ls -d /sys/devices/system/cpu/cpu? | wc -l); \
                  while [ ! -e /sys/devices/system/cpu/cpu2 ]; do sleep 0.1; done; say 2 cpus; \
                  b=$(ls -d /sys/devices/system/memory/memory? | wc -l); \
                  while [ $(ls -d /sys/devices/system/memory/memory* | wc -l) -lt 4 ]; do sleep 0.1; done; say 3 memory";
    let Some(bench) = bench("processors_and_memory_are_added", script).await else { return };
    let (vm, device, _) = start(&bench, Machine::Q35, |spec| {
        spec.cpus = Cpus { boot: 1, max: 4 };
        spec.memory = Memory { boot_mib: 256, max_mib: 1024, huge_page_kib: None };
    })
    .await;
    bench.said("1 cpus 1").await;
    assert_eq!(vm.set_memory(256).await.unwrap(), 256);
    vm.set_cpus(3).await.unwrap();
    vm.set_cpus(2).await.unwrap();
    bench.said("2 cpus").await;
    // By little more than was asked for, and yet all of it can be reached.
    assert_eq!(vm.set_memory(300).await.unwrap(), 384);
    assert_eq!(vm.set_memory(400).await.unwrap(), 512);
    bench.said("3 memory").await;
    assert_eq!(vm.set_memory(1024).await.unwrap(), 1024);
    assert_eq!(vm.set_memory(512).await.unwrap(), 1024);
    assert_eq!(vm.set_memory(1025).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(vm.set_cpus(5).await.unwrap_err().code(), Code::InvalidArgument);
    end(&bench, &vm, &device).await;
}

#[tokio::test]
async fn a_later_daemon_takes_it_over() {
    let Some(bench) = bench("a_later_daemon_takes_it_over", "").await else { return };
    let (vm, device, qemu) = start(&bench, Machine::Q35, |_| ()).await;
    let record = serde_json::from_str(&vm.record().to_string()).unwrap();
    let (pid, address) = (vm.pid(), vm.vsock());
    // The first holds QMP's connection until it dies.
    drop(vm);
    let vm = qemu.adopt(record, bench.place()).await.unwrap();
    assert_eq!((vm.pid(), vm.vsock()), (pid, address));
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    let record = vm.record();
    end(&bench, &vm, &device).await;
    let late = qemu.adopt(record, bench.place()).await.unwrap();
    assert_eq!(late.exited().await.status, 137);
    let error = late.pause().await.unwrap_err().report();
    assert!(error.contains("already finished"), "{error}");
    late.kill().await.unwrap();
}

#[tokio::test]
async fn a_panic_ends_it_with_the_kernels_words() {
    let Some(bench) = bench("a_panic_ends_it_with_the_kernels_words", "echo c > /proc/sysrq-trigger").await else { return };
    let (vm, device, _) = start(&bench, Machine::Q35, |_| ()).await;
    timeout(MINUTE, vm.exited()).await.unwrap();
    let words = vm.last_words().unwrap();
    assert!(words.starts_with("the guest's kernel panicked: sysrq triggered crash"), "{words}");
    end(&bench, &vm, &device).await;
}

#[tokio::test]
async fn a_kernel_that_is_none_does_not_hang_the_start() {
    let Some(bench) = bench("a_kernel_that_is_none_does_not_hang_the_start", "").await else { return };
    fs::write(bench.path("vmlinuz"), vec![0x5a; 1 << 20]).unwrap();
    let qemu = Qemu::open(config(Machine::Q35), &reaper(), &mut Programs::default()).await.unwrap();
    let (device, vsock) = bench.vsock().await;
    let mut undo = Undo::new("test");
    let started = qemu.start(bench.spec(vsock), bench.place(), &mut undo).await;
    let report = undo.settle(started).await.unwrap_err().report();
    assert!(report.starts_with("qemu failed to start:"), "{report}");
    device.kill().await.unwrap();
    assert_eq!(bench.left(), ["vsock"]);
}

#[tokio::test]
async fn a_qemu_that_will_not_do_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let program = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        QemuConfig { path: Some(path), accel: Accel::Tcg, ..QemuConfig::default() }
    };
    let refused = async |config| {
        let error = Qemu::open(config, &reaper(), &mut Programs::default()).await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable);
        error.report()
    };
    let old = refused(program("old", "echo QEMU emulator version 6.2.0 '(Debian)'")).await;
    assert!(old.contains("version 6.2.0") && old.contains("7.0.0 or newer"), "{old}");
    let other = refused(program("other", "echo hello; exit 1")).await;
    assert!(other.contains("does not tell its version") && other.contains("hello"), "{other}");
    let missing = refused(QemuConfig { path: Some(dir.path().join("none")), ..QemuConfig::default() }).await;
    assert!(missing.contains("does not exist"), "{missing}");
    if ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists()) {
        return eprintln!("SKIP a_qemu_that_will_not_do_is_refused_with_the_remedy (in part): a host without KVM");
    }
    let demanded = program("new", "echo QEMU emulator version 9.0.0");
    let kvm = refused(QemuConfig { accel: Accel::Kvm, ..demanded.clone() }).await;
    assert!(kvm.starts_with("KVM is unavailable") && kvm.contains("kvm_intel"), "{kvm}");
    let auto = Qemu::open(QemuConfig { accel: Accel::Auto, ..demanded }, &reaper(), &mut Programs::default()).await.unwrap();
    assert!(auto.capabilities().emulated, "{:?}", auto.capabilities());
}
