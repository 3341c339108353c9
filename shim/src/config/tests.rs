use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::Duration,
};

use proptest::prelude::*;

use kuasar_runc::{RuncConfig, RuntimeChoice};
use kuasar_vmm::{
    Annotation, HypervisorConfig, VmmConfig,
    config::{DEFAULT_INITRD, DEFAULT_KERNEL},
    qemu::{Accel, Machine, QemuConfig},
};

use super::*;

fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(Path::new("c.toml"), text)
}

/// The faults of a text, as printed, one a line.
fn faults(text: &str) -> Vec<String> {
    parse(text).unwrap_err().to_string().lines().map(str::to_owned).collect()
}

fn runc(config: &Config, name: &str) -> RuncConfig {
    match &config.sandboxers[name] {
        SandboxerConfig::Runc(config) => config.clone(),
        SandboxerConfig::Vmm(_) => panic!("{name} is of another kind"),
    }
}

fn vmm(config: &Config, name: &str) -> VmmConfig {
    match &config.sandboxers[name] {
        SandboxerConfig::Vmm(config) => config.as_ref().clone(),
        SandboxerConfig::Runc(_) => panic!("{name} is of another kind"),
    }
}

/// Each key of a table of `kind = "vmm"`, with another value than the default.
const EVERY_VMM_KEY: &str = "
    [sandboxer.small]
    kind = 'vmm'
    hypervisor = 'qemu'
    path = '/opt/qemu'
    machine = 'microvm'
    accel = 'tcg'
    hot_disks = 0
    kernel = '/opt/vmlinuz'
    initrd = '/opt/initrd.img'
    kernel_parameters = ['mitigations=off', 'nokaslr']
    virtiofsd = '/opt/virtiofsd'
    vsock_device = '/opt/vsock'
    root = '/run/small'
    cpus = 2
    max_cpus = 4
    memory_mib = 128
    guest_overhead_mib = 32
    max_memory_mib = 4096
    annotations = ['memory_mib']
    boot_limit_secs = 5
    users_from = 200000
    debug = true
";

#[test]
fn nothing_written_means_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.sandboxers.keys().collect::<Vec<_>>(), ["kuasar-runc"]);
    assert_eq!(runc(&config, "kuasar-runc").runtime, RuntimeChoice::Auto);
    assert_eq!(parse("[sandboxer]\n").unwrap(), Config::default());
}

#[test]
fn what_is_written_counts() {
    let text = "
        [containerd]
        address = '/run/k3s/containerd/containerd.sock'
        [log]
        level = 'debug'
        [sandboxer.fast]
        kind = 'runc'
        runtime = 'crun'
        [sandboxer.mine]
        kind = 'runc'
        runtime = '/opt/bin/my-runtime'
    ";
    let config = parse(text).unwrap();
    assert_eq!(config.containerd.address, Path::new("/run/k3s/containerd/containerd.sock"));
    assert_eq!(config.log.level, LogLevel::Debug);
    // Naming sandboxers replaces the default one.
    assert_eq!(config.sandboxers.keys().collect::<Vec<_>>(), ["fast", "mine"]);
    assert_eq!(runc(&config, "fast").runtime.to_string(), "crun");
    assert_eq!(runc(&config, "mine").runtime, RuntimeChoice::Path("/opt/bin/my-runtime".into()));
}

#[test]
fn every_fault_is_told_with_its_place() {
    let text = "\
[containerd]
adress = '/x'
[log]
level = 'loud'
[sandboxer.kuasar-runc]
kind = 'runc'
runtime = 5
[sandboxer.Bad_Name]
kind = 'vm'
[sandboxer.none]
[extra]
";
    let expected = [
        "c.toml:2: containerd.adress: is not a known key; accepted here: address",
        "c.toml:4: log.level: \"loud\" is not a log level; accepted: error, warn, info, debug, trace",
        "c.toml:7: sandboxer.kuasar-runc.runtime: is an integer; accepted: a string",
        "c.toml:8: sandboxer.Bad_Name: \"Bad_Name\" is not a name for a sandboxer; accepted: up to 63 lower case letters, \
         digits and inner hyphens, as in kuasar-runc",
        "c.toml:9: sandboxer.Bad_Name.kind: \"vm\" is not a kind of sandboxer; accepted: runc, vmm",
        "c.toml:10: sandboxer.none: has no kind; accepted: kind = \"runc\", kind = \"vmm\"",
        "c.toml:11: extra: is not a known key; accepted here: containerd, log, sandboxer",
    ];
    assert_eq!(faults(text), expected);
}

#[test]
fn wrong_types_and_values_are_named() {
    let cases = [
        ("containerd = 1", "c.toml:1: containerd: is an integer; accepted: a table, written [containerd]"),
        ("[[log]]", "log: is an array; accepted: a table"),
        ("[log]\nlevel = true", "c.toml:2: log.level: is a boolean; accepted: a string"),
        ("[containerd]\naddress = 'run/x'", "containerd.address: \"run/x\" is not an absolute path"),
        ("[containerd]\naddress = 'unix:///x'", "\"unix:///x\" is not an absolute path"),
        ("[containerd]\naddress = '/a/../b'", "has no .. in it"),
        ("[containerd]\naddress = \"/a\\u0000b\"", "is not an absolute path"),
        (
            "[sandboxer.a]\nkind = 'runc'\nruntime = 'kata'",
            "\"kata\" is not an OCI runtime; accepted: auto, runc, crun, youki, or an absolute path",
        ),
        ("[sandboxer.a]\nkind = 'runc'\nruntime = '/'", "is not an absolute path"),
        ("[sandboxer.a]\nkind = 'runc'\n'b c' = 1", "c.toml:3: sandboxer.a.\"b c\": is not a known key"),
        ("[sandboxer.podsandbox]\nkind = 'runc'", "means something else to containerd"),
        ("[sandboxer.runc]\nkind = 'runc'", "means something else to containerd"),
        ("[sandboxer.-a]\nkind = 'runc'", "is not a name"),
        ("[sandboxer.'a.b']\nkind = 'runc'", "is not a name"),
        ("sandboxer.a = 'runc'", "sandboxer.a: is a string; accepted: a table, written [sandboxer.a]"),
    ];
    for (text, fault) in cases {
        let found = faults(text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert!(found[0].contains(fault), "{text}: {found:?}");
    }
    let long = format!("[sandboxer.{}]\nkind = 'runc'", "a".repeat(64));
    assert!(faults(&long)[0].contains("is not a name"));
}

#[test]
fn a_name_given_twice_is_told() {
    let found = faults("[sandboxer.a]\nkind = 'runc'\n[sandboxer.a]\nkind = 'runc'\n");
    assert!(found[0].starts_with("c.toml:3: not valid TOML: duplicate key"), "{found:?}");
}

#[test]
fn broken_lines_do_not_hide_other_faults() {
    let found = faults("[log]\nlevel = \n[containerd]\naddress = 7\n= 3\n");
    assert_eq!(found.iter().filter(|line| line.contains("not valid TOML")).count(), 2, "{found:?}");
    assert!(found.iter().any(|line| line.starts_with("c.toml:4: containerd.address: is an integer")), "{found:?}");
}

/// A directory with `config.toml` and drop-ins.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn load(&self) -> Result<Config, ConfigErrors> {
        Config::load(&self.path("config.toml"), Path::new(DEFAULT_STATE))
    }
}

#[test]
fn drop_ins_are_merged_in_order_of_their_names() {
    let dir = Dir::new();
    dir.write("config.toml", "[log]\nlevel = 'warn'\n[sandboxer.a]\nkind = 'runc'\nruntime = 'runc'\n");
    dir.write("conf.d/20.toml", "[sandboxer.a]\nruntime = 'youki'\n[sandboxer.b]\nkind = 'runc'\n");
    dir.write("conf.d/10.toml", "[sandboxer.a]\nruntime = 'crun'\n[containerd]\naddress = '/c'\n");
    dir.write("conf.d/99.toml.bak", "nonsense");
    dir.write("conf.d/.30.toml", "nonsense");
    let config = dir.load().unwrap();
    assert_eq!(config.log.level, LogLevel::Warn);
    assert_eq!(config.containerd.address, Path::new("/c"));
    assert_eq!(config.sandboxers.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(runc(&config, "a").runtime.to_string(), "youki");
}

#[test]
fn faults_name_the_file_they_are_in() {
    let dir = Dir::new();
    let main = dir.write("config.toml", "[log]\nlevel = 1\n");
    let drop_in = dir.write("conf.d/a.toml", "x = 1\n[log\n");
    let text = dir.load().unwrap_err().to_string();
    assert!(text.contains(&format!("{}:2: log.level:", main.display())), "{text}");
    assert!(text.contains(&format!("{}:1: x: is not a known key", drop_in.display())), "{text}");
    assert!(text.contains(&format!("{}:2: not valid TOML", drop_in.display())), "{text}");
}

#[test]
fn only_the_default_file_may_be_missing() {
    let dir = Dir::new();
    let path = dir.path("config.toml");
    let faults = Config::load(&path, Path::new(DEFAULT_STATE)).unwrap_err();
    assert!(faults.to_string().contains("does not exist"), "{faults}");
    assert_eq!(Config::load_files(&path, true, Path::new(DEFAULT_STATE)).unwrap(), Config::default());
    dir.write("conf.d/a.toml", "[log]\nlevel = 'trace'\n");
    assert_eq!(Config::load_files(&path, true, Path::new(DEFAULT_STATE)).unwrap().log.level, LogLevel::Trace);
}

#[test]
fn files_that_others_can_write_are_refused() {
    let dir = Dir::new();
    let path = dir.write("config.toml", "");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o646)).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("can be written by everybody (mode 0646)"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(dir.load().is_ok());
    let drop_in = dir.write("conf.d/a.toml", "");
    fs::set_permissions(dir.path("conf.d"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("conf.d: can be written by everybody"));
    fs::set_permissions(dir.path("conf.d"), fs::Permissions::from_mode(0o755)).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&drop_in, Some(12345), None).unwrap();
        let text = dir.load().unwrap_err().to_string();
        assert!(text.contains("a.toml: is owned by uid 12345"), "{text}");
    }
}

#[test]
fn what_is_no_text_file_is_refused() {
    let dir = Dir::new();
    let path = dir.path("config.toml");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("not a regular file"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("not a regular file"));
    fs::remove_dir(&path).unwrap();
    fs::write(&path, [b'#', 0xff]).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("not UTF-8 text (at byte 1)"));
    fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("larger than 1024 KiB"));
    fs::remove_file(&path).unwrap();
    symlink(dir.write("elsewhere", "[log]\nlevel = 'error'\n"), &path).unwrap();
    assert_eq!(dir.load().unwrap().log.level, LogLevel::Error);
}

#[test]
fn the_annotated_example_says_what_the_defaults_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/config.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(Config::parse(&path, &text).unwrap(), Config::default());
    // With what is commented out it has every key, so it can serve as the reference.
    let all: String = text.lines().map(|line| format!("{}\n", line.strip_prefix("#:").unwrap_or(line))).collect();
    let mut written: toml::Table = all.parse().unwrap();
    let machines = written["sandboxer"].as_table_mut().unwrap().remove("kuasar-qemu").unwrap();
    let printed: toml::Table = Config::default().to_toml().parse().unwrap();
    assert_eq!(written, printed);
    // So it is with a table that is no default, except that some of its keys have no value that could be shown as the default.
    let known: toml::Table = parse(EVERY_VMM_KEY).unwrap().to_toml().parse().unwrap();
    let keys = |table: &toml::Value| table.as_table().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(keys(&machines), keys(&known["sandboxer"]["small"]));
    let shown = vmm(&Config::parse(&path, &all).unwrap(), "kuasar-qemu");
    let HypervisorConfig::Qemu(qemu) = shown.hypervisor.clone();
    let default = VmmConfig::new(
        HypervisorConfig::Qemu(QemuConfig { path: qemu.path, hot_disks: Some(4), ..QemuConfig::default() }),
        "/run/kuasar/vmm/kuasar-qemu".into(),
    );
    let expected = VmmConfig {
        kernel: Some(DEFAULT_KERNEL.into()),
        initrd: Some(DEFAULT_INITRD.into()),
        virtiofsd: shown.virtiofsd.clone(),
        vsock_device: shown.vsock_device.clone(),
        max_memory_mib: shown.max_memory_mib,
        ..default
    };
    assert_eq!(shown, expected);
}

#[test]
fn machines_need_a_hypervisor_and_nothing_else() {
    let config = parse("[sandboxer.a]\nkind = 'vmm'\nhypervisor = 'qemu'\n").unwrap();
    let qemu = HypervisorConfig::Qemu(QemuConfig::default());
    assert_eq!(vmm(&config, "a"), VmmConfig::new(qemu, "/run/kuasar/vmm/a".into()));
}

#[test]
fn every_key_of_machines_counts() {
    let config = parse(EVERY_VMM_KEY).unwrap();
    let qemu = QemuConfig { path: Some("/opt/qemu".into()), machine: Machine::Microvm, accel: Accel::Tcg, hot_disks: Some(0) };
    let expected = VmmConfig {
        hypervisor: HypervisorConfig::Qemu(qemu),
        kernel: Some("/opt/vmlinuz".into()),
        initrd: Some("/opt/initrd.img".into()),
        kernel_parameters: vec!["mitigations=off".into(), "nokaslr".into()],
        virtiofsd: Some("/opt/virtiofsd".into()),
        vsock_device: Some("/opt/vsock".into()),
        root: "/run/small".into(),
        cpus: 2,
        memory_mib: 128,
        guest_overhead_mib: 32,
        max_cpus: 4,
        max_memory_mib: 4096,
        annotations: [Annotation::MemoryMib].into(),
        boot_limit: Duration::from_secs(5),
        users_from: 200_000,
        debug: true,
    };
    assert_eq!(vmm(&config, "small"), expected);
    assert_eq!(parse(&config.to_toml()).unwrap(), config);
}

#[test]
fn faults_of_machines_are_told_with_what_would_be_accepted() {
    let table = "[sandboxer.a]\nkind = 'vmm'\n";
    assert_eq!(faults(table), ["c.toml:1: sandboxer.a: has no hypervisor; accepted: hypervisor = \"qemu\""]);
    let cases = [
        ("hypervisor = 'bochs'", "hypervisor: \"bochs\" is not a hypervisor; accepted: qemu"),
        ("hypervisor = 1", "hypervisor: is an integer; accepted: a string"),
        ("machine = 'pc'", "machine: \"pc\" is no machine; accepted: q35, microvm"),
        ("accel = 'hvf'", "accel: \"hvf\" is no accelerator; accepted: auto, kvm, tcg"),
        ("annotations = ['cpus', 'kernel']", "annotations: \"kernel\" is no annotation; accepted: cpus, memory_mib"),
        ("annotations = 'cpus'", "annotations: is a string; accepted: an array of strings"),
        ("annotations = [1]", "annotations: has an integer in it; accepted: an array of strings"),
        ("kernel_parameters = ['a b']", "kernel_parameters: \"a b\" is no word for a kernel's command line"),
        ("kernel_parameters = ['']", "kernel_parameters: \"\" is no word for a kernel's command line"),
        ("kernel_parameters = {}", "kernel_parameters: is a table; accepted: an array of strings"),
        ("path = 'qemu'", "path: \"qemu\" is not an absolute path"),
        ("kernel = '../vmlinuz'", "kernel: \"../vmlinuz\" is not an absolute path"),
        ("initrd = true", "initrd: is a boolean; accepted: a string"),
        ("virtiofsd = 'virtiofsd'", "virtiofsd: \"virtiofsd\" is not an absolute path"),
        ("vsock_device = ''", "vsock_device: \"\" is not an absolute path"),
        ("root = '/'", "root: \"/\" is not an absolute path"),
        ("cpus = 0", "cpus: 0 is out of range; accepted: an integer from 1 to 1024"),
        ("max_cpus = 1025", "max_cpus: 1025 is out of range"),
        ("cpus = '2'", "cpus: is a string; accepted: an integer from 1 to 1024"),
        ("memory_mib = 63", "memory_mib: 63 is out of range; accepted: an integer from 64 to 16777216"),
        ("memory_mib = 1.5", "memory_mib: is a float; accepted: an integer"),
        ("max_memory_mib = 0", "max_memory_mib: 0 is out of range; accepted: an integer from 64 to 16777216"),
        ("guest_overhead_mib = -1", "guest_overhead_mib: -1 is out of range; accepted: an integer from 0 to 65536"),
        ("boot_limit_secs = 3601", "boot_limit_secs: 3601 is out of range; accepted: an integer from 1 to 3600"),
        ("users_from = 999", "users_from: 999 is out of range; accepted: an integer from 1000 to 4000000000"),
        ("hot_disks = 17", "hot_disks: 17 is out of range; accepted: an integer from 0 to 16"),
        ("debug = 'yes'", "debug: is a string; accepted: true or false"),
        ("runtime = 'crun'", "runtime: is not a known key; accepted here: kind, hypervisor, path, machine, accel, hot_disks, "),
    ];
    for (line, fault) in cases {
        let hypervisor = if line.starts_with("hypervisor") { "" } else { "hypervisor = 'qemu'" };
        let found = faults(&format!("{table}{line}\n{hypervisor}\n"));
        assert_eq!(found.len(), 1, "{line}: {found:?}");
        assert!(found[0].starts_with(&format!("c.toml:3: sandboxer.a.{fault}")), "{line}: {found:?}");
    }
    // One fault hides no other.
    let found = faults(&format!("{table}hypervisor = 'bochs'\nmachine = 'pc'\ncpus = 0\n"));
    assert_eq!(found.len(), 3, "{found:?}");
}

#[test]
fn sandboxers_have_directories_of_their_own() {
    let config = parse("[sandboxer.a]\nkind = 'runc'\n[sandboxer.b]\nkind = 'runc'\n").unwrap();
    assert_eq!(runc(&config, "a").root, Path::new("/run/kuasar/runc/a"));
    assert_eq!(runc(&config, "b").root, Path::new("/run/kuasar/runc/b"));
    let dir = Dir::new();
    dir.write("config.toml", "");
    let config = Config::load(&dir.path("config.toml"), Path::new("/elsewhere")).unwrap();
    assert_eq!(runc(&config, "kuasar-runc").root, Path::new("/elsewhere/runc/kuasar-runc"));
    for root in ["/x", "/x/y", "/"] {
        let text = format!("[sandboxer.a]\nkind = 'runc'\nroot = '/x'\n[sandboxer.b]\nkind = 'runc'\nroot = '{root}'\n");
        let found = faults(&text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("c.toml:6: sandboxer.b.root: "), "{found:?}");
    }
    let mixed = "[sandboxer.a]\nkind = 'runc'\nroot = '/x'\n[sandboxer.b]\nkind = 'vmm'\nhypervisor = 'qemu'\nroot = '/x/y'\n";
    assert!(faults(mixed)[0].starts_with("c.toml:7: sandboxer.b.root: /x/y is not its own"));
    let inherited = faults("[sandboxer.a]\nkind = 'runc'\nroot = '/run/kuasar/runc'\n[sandboxer.b]\nkind = 'runc'\n");
    assert!(inherited[0].starts_with("c.toml:4: sandboxer.b.root: /run/kuasar/runc/b is not its own"), "{inherited:?}");
}

#[test]
fn numbers_have_a_range() {
    let limit = |value: &str| parse(&format!("[sandboxer.a]\nkind = 'runc'\ncommand_limit_secs = {value}\n"));
    assert_eq!(runc(&limit("0x10").unwrap(), "a").command_limit, Duration::from_secs(16));
    for (value, words) in [
        ("0", "0 is out of range; accepted: an integer from 1 to 3600"),
        ("-5", "-5 is out of range"),
        ("99999999999999999999", "is an integer beyond 64 bits"),
        ("1.5", "is a float; accepted: an integer"),
        ("'60'", "is a string; accepted: an integer"),
    ] {
        let faults = limit(value).unwrap_err().to_string();
        assert!(faults.starts_with("c.toml:3: sandboxer.a.command_limit_secs: ") && faults.contains(words), "{faults}");
    }
}

fn any_path() -> impl Strategy<Value = PathBuf> {
    "(/[a-zA-Z0-9 _.'\"=#\\[\\]äß-]{0,8}[a-z]){1,4}".prop_map(PathBuf::from)
}

fn any_runtime() -> impl Strategy<Value = RuntimeChoice> {
    prop_oneof![
        prop::sample::select(vec!["auto", "runc", "crun", "youki"]).prop_map(|name| name.parse().unwrap()),
        any_path().prop_map(RuntimeChoice::Path),
    ]
}

fn any_sandboxer() -> impl Strategy<Value = SandboxerConfig> {
    let runc = (any_runtime(), any_path(), 1..=3600u64).prop_map(|(runtime, root, seconds)| {
        SandboxerConfig::Runc(RuncConfig { runtime, root, command_limit: Duration::from_secs(seconds) })
    });
    prop_oneof![runc, any_vmm().prop_map(|config| SandboxerConfig::Vmm(Box::new(config)))]
}

fn any_vmm() -> impl Strategy<Value = VmmConfig> {
    let path = || prop::option::of(any_path());
    let machine = prop::sample::select(vec![Machine::Q35, Machine::Microvm]);
    let accel = prop::sample::select(vec![Accel::Auto, Accel::Kvm, Accel::Tcg]);
    let qemu = (path(), machine, accel, prop::option::of(0..=16usize))
        .prop_map(|(path, machine, accel, hot_disks)| QemuConfig { path, machine, accel, hot_disks });
    let programs = (path(), path(), path(), path(), any_path());
    let words = prop::collection::vec("[!-~]{1,12}", 0..4);
    let annotations = prop::sample::subsequence(Annotation::ALL.to_vec(), 0..=Annotation::ALL.len());
    let most = prop_oneof![Just(0), 64..=(16u64 << 20)];
    let sizes = (1..=1024u32, 1..=1024u32, 64..=(16u64 << 20), 0..=65_536u64, most);
    let rest = (1..=3600u64, 1000..=4_000_000_000u32, any::<bool>());
    (qemu, programs, words, annotations, sizes, rest).prop_map(|(qemu, programs, words, annotations, sizes, rest)| {
        let (kernel, initrd, virtiofsd, vsock_device, root) = programs;
        let (cpus, max_cpus, memory_mib, guest_overhead_mib, max_memory_mib) = sizes;
        let (seconds, users_from, debug) = rest;
        VmmConfig {
            hypervisor: HypervisorConfig::Qemu(qemu),
            kernel,
            initrd,
            kernel_parameters: words,
            virtiofsd,
            vsock_device,
            root,
            cpus,
            memory_mib,
            guest_overhead_mib,
            max_cpus,
            max_memory_mib,
            annotations: annotations.into_iter().collect(),
            boot_limit: Duration::from_secs(seconds),
            users_from,
            debug,
        }
    })
}

fn any_config() -> impl Strategy<Value = Config> {
    let name = "[a-z]([a-z0-9-]{0,20}[a-z0-9])?"
        .prop_filter("reserved", |name| !["podsandbox", "shim", "runc"].contains(&name.as_str()));
    let sandboxers = prop::collection::btree_map(name, any_sandboxer(), 1..4);
    (any_path(), prop::sample::select(LogLevel::ALL.to_vec()), sandboxers).prop_map(|(address, level, mut sandboxers)| {
        for (name, sandboxer) in &mut sandboxers {
            let root = match sandboxer {
                SandboxerConfig::Runc(config) => &mut config.root,
                SandboxerConfig::Vmm(config) => &mut config.root,
            };
            // No directory may lie in another's.
            *root = Path::new("/roots").join(name).join(root.strip_prefix("/").unwrap());
        }
        Config { containerd: Containerd { address }, log: Log { level }, sandboxers }
    })
}

proptest! {
    #[test]
    fn a_configuration_survives_being_written(config in any_config()) {
        prop_assert_eq!(parse(&config.to_toml()).unwrap(), config);
    }

    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        let _either = parse(&text);
    }

    #[test]
    fn no_text_like_toml_makes_it_panic(parts in prop::collection::vec(prop::sample::select(vec![
        "[", "]", "[[", "]]", "{", "}", "=", ".", ",", "\n", "\r\n", "'", "\"", "'''", "\"\"\"", "#", " ", "\\u00", "log", "level", "sandboxer",
        "a", "kind", "'runc'", "runtime", "containerd", "address", "'/x'", "1979-05-27", "1e5", "0x1", "true", "inf", "é", "\u{0}",
    ]), 0..40)) {
        let text = parts.concat();
        if let Err(faults) = parse(&text) {
            prop_assert!(!faults.faults().is_empty());
            prop_assert!(faults.faults().iter().all(|fault| fault.line.is_some_and(|line| line >= 1 && line <= text.lines().count() + 1)), "{}", faults);
        }
    }
}
