//! A real machine: the agent as its process 1, under QEMU without KVM.
//!
//! Needs `KUASAR_GUEST_KERNEL` and `KUASAR_GUEST_INITRD`, which `make guest` makes, and QEMU, virtiofsd, vhost-device-vsock and a static
//! busybox on `PATH`; says loudly what is missing.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test may

mod host;

use std::{
    env, fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use host::{Agent, LIMIT, Place, call, exactly, process, spec};
use kuasar_guest_protocol::{
    KNOCK_PORT,
    agent::{
        ContainerRequest, CreateContainerRequest, Disk, Empty, HelloRequest, HugePages, OnlineRequest, SetUpRequest, Share,
        ShutDownRequest, Storage, Streams, storage::Kind,
    },
    stream::StreamKind,
};
use kuasar_sandboxers::busybox;
use tokio::{io::AsyncWriteExt, net::UnixListener};

/// The share: its tag, and where it is mounted.
const SHARE: (&str, &str) = ("share", "/run/kuasar/share");

/// A program that ends with the test.
struct Program(Child);

impl Program {
    fn start(name: &str, variable: &str, arguments: &[String], log: &Path) -> Self {
        let log = fs::File::create(log).unwrap();
        let program = env::var_os(variable).unwrap_or_else(|| name.into());
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Self(command.spawn().unwrap_or_else(|error| panic!("{name}: {error}")))
    }

    fn ends_within(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.0.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        true
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine with a share, a disk and a vsock.
struct Machine {
    dir: tempfile::TempDir,
    qemu: Program,
    knock: UnixListener,
    _helpers: [Program; 2],
    started: Instant,
}

/// What of it is not here.
fn missing() -> Option<String> {
    for variable in ["KUASAR_GUEST_KERNEL", "KUASAR_GUEST_INITRD"] {
        if env::var_os(variable).is_none_or(|path| !Path::new(&path).is_file()) {
            return Some(format!("{variable} names no file; run make guest"));
        }
    }
    for (program, variable) in [
        ("qemu-system-x86_64", "KUASAR_QEMU"),
        ("virtiofsd", "KUASAR_VIRTIOFSD"),
        ("vhost-device-vsock", "KUASAR_VHOST_DEVICE_VSOCK"),
        ("mke2fs", "KUASAR_MKE2FS"),
    ] {
        let on_path = |path: std::ffi::OsString| env::split_paths(&path).any(|dir| dir.join(program).is_file());
        let sbin = ["/usr/sbin", "/sbin"].iter().any(|dir| Path::new(dir).join(program).is_file());
        if env::var_os(variable).is_none() && !sbin && !env::var_os("PATH").is_some_and(on_path) {
            return Some(format!("{program} is not on PATH"));
        }
    }
    busybox::find().is_none().then(|| "no static busybox on PATH".into())
}

impl Machine {
    fn boot(words: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        fs::create_dir(path("share")).unwrap();
        fs::create_dir_all(path("share/containers/c")).unwrap();
        busybox::make_rootfs(&dir.path().join("share/containers/c/rootfs")).unwrap();
        fs::create_dir(path("content")).unwrap();
        fs::write(path("content/hello"), "from a disk").unwrap();
        fs::File::create(path("disk")).unwrap().set_len(8 << 20).unwrap();
        let made = Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-d", &path("content"), &path("disk")]).status();
        assert!(made.unwrap().success());
        let strings = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let vsock = Program::start(
            "vhost-device-vsock",
            "KUASAR_VHOST_DEVICE_VSOCK",
            &strings(&["--vm", &format!("guest-cid=5,socket={},uds-path={}", path("vh"), path("vm"))]),
            &dir.path().join("vsock.log"),
        );
        let virtiofsd = Program::start(
            "virtiofsd",
            "KUASAR_VIRTIOFSD",
            &strings(&["--socket-path", &path("fs"), "--shared-dir", &path("share"), "--sandbox", "namespace"]),
            &dir.path().join("virtiofsd.log"),
        );
        let deadline = Instant::now() + LIMIT;
        while !["vh", "fs"].iter().all(|name| Path::new(&path(name)).exists()) {
            assert!(Instant::now() < deadline, "a helper does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        let knock = UnixListener::bind(path(&format!("vm_{KNOCK_PORT}"))).unwrap();
        let started = Instant::now();
        let arguments = strings(&[
            "-M",
            "q35,accel=tcg,memory-backend=m",
            "-cpu",
            "max",
            "-m",
            "256",
            // With one that is possible QEMU 7.2 leaves memory barriers out, and words to devices get lost.
            "-smp",
            "1,maxcpus=2",
            "-object",
            "memory-backend-memfd,id=m,size=256M,share=on",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            &format!("file:{}", path("console")),
            "-kernel",
            &env::var("KUASAR_GUEST_KERNEL").unwrap(),
            "-initrd",
            &env::var("KUASAR_GUEST_INITRD").unwrap(),
            "-append",
            &format!("console=ttyS0 quiet panic=-1 reboot=t mitigations=off init_on_alloc=0 {words}"),
            "-chardev",
            &format!("socket,id=c0,path={}", path("fs")),
            "-device",
            &format!("vhost-user-fs-pci,chardev=c0,tag={}", SHARE.0),
            "-chardev",
            &format!("socket,id=cv,path={}", path("vh")),
            "-device",
            "vhost-user-vsock-pci,chardev=cv",
            "-drive",
            &format!("if=none,id=d,file={},format=raw", path("disk")),
            "-device",
            "virtio-blk-pci,drive=d,serial=data-1",
        ]);
        let qemu = Program::start("qemu-system-x86_64", "KUASAR_QEMU", &arguments, &dir.path().join("qemu.log"));
        Self { dir, qemu, knock, _helpers: [vsock, virtiofsd], started }
    }

    fn place(&self) -> Place {
        Place::Hybrid(self.dir.path().join("vm"))
    }

    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.path().join("console")).unwrap_or_default()).into_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the console:\n{}", self.console());
            for log in ["qemu.log", "vsock.log", "virtiofsd.log"] {
                eprintln!("{log}:\n{}", fs::read_to_string(self.dir.path().join(log)).unwrap_or_default());
            }
        }
    }
}

macro_rules! timed {
    ($what:literal, $work:expr) => {{
        let start = Instant::now();
        let result = $work;
        println!("{:>8.1} ms  {}", start.elapsed().as_secs_f64() * 1000.0, $what);
        result
    }};
}

async fn hello(agent: &Agent) -> kuasar_guest_protocol::agent::HelloResponse {
    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap();
    let request = HelloRequest { version: kuasar_guest_protocol::VERSION, time_ns: now, ..Default::default() };
    agent.client.hello(call(), &request).await.unwrap()
}

fn set_up() -> SetUpRequest {
    SetUpRequest {
        sandbox: "test".into(),
        hostname: "in-the-machine".into(),
        hosts: b"127.0.0.1 localhost\n".to_vec(),
        resolv_conf: b"nameserver 192.0.2.1\n".to_vec(),
        sysctls: [("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned())].into(),
        shares: vec![Share { tag: SHARE.0.into(), target: SHARE.1.into(), ..Default::default() }],
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine() {
    if let Some(why) = missing() {
        eprintln!("SKIP a_machine: {why}");
        return;
    }
    let mut machine = Machine::boot("kuasar.debug kuasar.log=info kuasar.vsock=emulated");
    let knocked = tokio::time::timeout(LIMIT, machine.knock.accept()).await.expect("the agent does not knock");
    drop(knocked.unwrap());
    println!("{:>8.1} ms  boot to knock", machine.started.elapsed().as_secs_f64() * 1000.0);
    let agent = Agent::connect(machine.place()).await;
    let told = hello(&agent).await;
    println!(
        "{:>8.1} ms  boot to hello; kernel {}, {}",
        machine.started.elapsed().as_secs_f64() * 1000.0,
        told.kernel,
        told.runtime
    );
    println!(
        "{:>8.1} ms  kernel start to listening, by the guest",
        Duration::from_micros(told.ready_us).as_secs_f64() * 1000.0
    );
    assert_eq!(told.version, kuasar_guest_protocol::VERSION);
    assert!(!told.set_up && !told.runtime.is_empty());
    timed!("hello again", hello(&agent).await);
    timed!("set up", agent.client.set_up(call(), &set_up()).await.unwrap());
    timed!("set up again", agent.client.set_up(call(), &set_up()).await.unwrap());

    let rootfs = Path::new(SHARE.1).join("containers/c/rootfs");
    let mut document = spec(&rootfs, process(&["sleep", "1000"]));
    document["linux"]["seccomp"] = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["sethostname", "chroot"], "action": "SCMP_ACT_ERRNO"}],
    });
    document["mounts"].as_array_mut().unwrap().extend([
        serde_json::json!({"destination": "/data", "type": "bind", "source": "/run/kuasar/storage/data", "options": ["bind", "ro"]}),
        serde_json::json!({"destination": "/memory", "type": "bind", "source": "/run/kuasar/storage/memory", "options": ["rbind"]}),
    ]);
    let storages = vec![
        Storage {
            kind: Some(Kind::Disk(Disk {
                serial: "data-1".into(),
                filesystem: "ext4".into(),
                options: vec!["ro".into()],
                ..Default::default()
            })),
            target: "/run/kuasar/storage/data".into(),
            ..Default::default()
        },
        Storage {
            kind: Some(Kind::HugePages(HugePages { options: vec!["pagesize=2M".into()], ..Default::default() })),
            target: "/run/kuasar/storage/memory".into(),
            ..Default::default()
        },
    ];
    let request = CreateContainerRequest {
        id: "c".into(),
        spec: document.to_string().into_bytes(),
        storages,
        streams: Some(Streams { stdout: true, ..Default::default() }).into(),
        ..Default::default()
    };
    timed!("create", agent.client.create_container(call(), &request).await.unwrap());
    timed!("start", agent.start("c").await.unwrap());
    for round in 0..3 {
        let name = format!("true-{round}");
        timed!("exec, wait and delete of true", {
            agent.exec("c", &name, &process(&["true"]), Streams::default()).await.unwrap();
            assert_eq!(agent.wait("c", &name).await.unwrap().status, 0);
            agent.delete("c", &name).await.unwrap();
        });
    }
    let script = "hostname; cat /data/hello /etc/resolv.conf; : >/memory/y && ls /memory; cat /proc/self/cgroup; \
                  readlink /proc/1/exe; ls -d /sys/class/net/lo; cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let (said, status) = timed!("exec of a script", agent.run("c", "look", script).await);
    println!("{said}");
    assert_eq!(status, 0, "{said}");
    for line in
        ["in-the-machine\n", "from a disk", "nameserver 192.0.2.1\n", "\ny\n", "/pod/c\n", "busybox", "/sys/class/net/lo\n0\n"]
    {
        assert!(said.contains(line), "{line:?} is missing");
    }
    let (said, status) = agent.run("c", "seccomp", "hostname other 2>&1; cat /proc/self/status").await;
    assert!(status == 0 && said.contains("Seccomp:\t2") && !said.contains("Seccomp:\t0"), "{said}");

    // Bytes one way, and the other.
    let out = Streams { stdout: true, ..Default::default() };
    agent.exec("c", "out", &process(&["dd", "if=/dev/zero", "bs=64k", "count=320"]), out).await.unwrap();
    let mut stdout = agent.stream("c", "out", StreamKind::Stdout).await.unwrap();
    timed!("20 MiB out", assert_eq!(exactly(&mut stdout, 20 << 20).await.len(), 20 << 20));
    assert_eq!(agent.wait("c", "out").await.unwrap().stdout_bytes, 20 << 20);
    drop(stdout);
    agent.delete("c", "out").await.unwrap();
    let both = Streams { stdin: true, stdout: true, ..Default::default() };
    agent.exec("c", "in", &process(&["sh", "-c", "cat >/tmp/bytes; md5sum </tmp/bytes"]), both).await.unwrap();
    let mut stdin = agent.stream("c", "in", StreamKind::Stdin).await.unwrap();
    let mut stdout = agent.stream("c", "in", StreamKind::Stdout).await.unwrap();
    timed!("20 MiB in", {
        stdin.write_all(&vec![0; 20 << 20]).await.unwrap();
        drop(stdin);
        agent.wait("c", "in").await.unwrap();
    });
    assert!(exactly(&mut stdout, 32).await == b"8f4e33f3dc3e414ff94e5fb6905cba8c");
    drop(stdout);
    agent.delete("c", "in").await.unwrap();

    // Both at once.
    let streams = Streams { stdin: true, stdout: true, ..Default::default() };
    agent.exec("c", "cat", &process(&["cat"]), streams).await.unwrap();
    let bytes: Vec<u8> = (0..20u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut stdin = agent.stream("c", "cat", StreamKind::Stdin).await.unwrap();
    let mut stdout = agent.stream("c", "cat", StreamKind::Stdout).await.unwrap();
    timed!("20 MiB through cat", {
        let sending = bytes.clone();
        let sent = tokio::spawn(async move { stdin.write_all(&sending).await.unwrap() });
        assert!(exactly(&mut stdout, bytes.len() as u64).await == bytes, "the bytes are others");
        sent.await.unwrap();
        let end = agent.wait("c", "cat").await.unwrap();
        assert_eq!((end.status, end.stdout_bytes), (0, bytes.len() as u64));
    });
    agent.delete("c", "cat").await.unwrap();

    // The machine itself.
    let (said, status) = agent_run_in_guest(&agent).await;
    assert!(status == 0 && said.contains("kuasar"), "{said}");
    let told = timed!("diagnose", agent.client.diagnose(call(), &Empty::default()).await.unwrap());
    assert!(told.sections.iter().any(|section| section.text.contains("Linux version")), "no kernel log");
    let online = agent.client.online(call(), &OnlineRequest { cpus: 1, memory_bytes: 1, ..Default::default() }).await.unwrap();
    assert!(online.cpus == 1 && online.memory_bytes > 100 << 20);
    let request = ContainerRequest { container: String::new(), ..Default::default() };
    let stats = timed!("stats", agent.client.stats(call(), &request).await.unwrap());
    assert!(String::from_utf8_lossy(&stats.stats).contains("v2"));

    agent.kill("c", "", 9).await.unwrap();
    assert_eq!(agent.wait("c", "").await.unwrap().status, 137);
    timed!("delete", agent.delete("c", "").await.unwrap());
    agent.delete("c", "").await.unwrap();
    let request = ShutDownRequest { grace_ms: 0, ..Default::default() };
    let gone = timed!("shut down", {
        // The answer may not arrive.
        let _ = agent.client.shut_down(ttrpc::context::with_duration(Duration::from_secs(5)), &request).await;
        machine.qemu.ends_within(LIMIT)
    });
    assert!(gone, "the machine still runs");
    println!("{}", machine.console());
}

async fn agent_run_in_guest(agent: &Agent) -> (String, u32) {
    // The machine has no programs but ours and the OCI runtime.
    let streams = Streams { stdout: true, ..Default::default() };
    let mut document = process(&["/bin/crun", "--root", "/run/kuasar/runc/guest/pod/oci", "list"]);
    document["env"] = serde_json::json!(["PATH=/bin"]);
    timed!("exec beside the containers", agent.exec("", "list", &document, streams).await.unwrap());
    let mut stdout = agent.stream("", "list", StreamKind::Stdout).await.unwrap();
    let end = agent.wait("", "list").await.unwrap();
    let said = exactly(&mut stdout, end.stdout_bytes).await;
    drop(stdout);
    agent.delete("", "list").await.unwrap();
    (String::from_utf8_lossy(&said).into_owned(), end.status)
}
