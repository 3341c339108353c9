use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use serde_json::{Value, json};

use super::{
    Finding, Host, Status, containerd,
    daemon::{self, Daemon, Serving, Settings},
    driver, kernel, network, runtime, state, systemd,
};
use crate::config::Config;

/// A directory made to look like a host.
struct Fake(tempfile::TempDir);

impl Fake {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn with(self, path: &str, text: &str) -> Self {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// A program that is only looked for, never run.
    fn with_program(self, path: &str) -> Self {
        let fake = self.with(path, "");
        fs::set_permissions(fake.0.path().join(path), fs::Permissions::from_mode(0o755)).unwrap();
        fake
    }

    fn kernel(self, release: &str) -> Self {
        self.with("proc/sys/kernel/osrelease", &format!("{release}\n"))
    }

    fn host(&self) -> Host {
        Host::at(self.0.path())
    }
}

fn told(finding: &Finding, status: Status, required: bool, words: &str) {
    assert_eq!((finding.status, finding.required), (status, required), "{finding:?}");
    assert!(finding.detail.contains(words), "{finding:?}");
    assert_eq!(finding.remedy.is_some(), status != Status::Ok, "whatever is not well has a remedy: {finding:?}");
}

#[test]
fn the_kernel_may_be_too_old() {
    for (release, status, required, words) in [
        ("6.18.1-arch1", Status::Ok, false, "6.18.1-arch1"),
        ("5.12.0", Status::Ok, false, "5.12"),
        ("5.10.0-30-amd64", Status::Warn, false, "no recursive read-only mounts"),
        ("4.19.0-27-amd64", Status::Missing, true, "too old"),
        ("nonsense", Status::Missing, true, "cannot be read"),
    ] {
        told(&kernel::version(&Fake::new().kernel(release).host()), status, required, words);
    }
}

#[test]
fn state_that_cannot_be_read_is_told() {
    let state = Path::new("/run/kuasar");
    let [finding] = &state::all(&Fake::new().host(), &Config::default(), state)[..] else { panic!() };
    told(finding, Status::Ok, false, "0 sandboxes");
    let fake = Fake::new()
        .with("run/kuasar/sandboxes/k8s.io/torn/state.json", "{")
        .with("run/kuasar/sandboxes/k8s.io/aside/state.json.unreadable", "");
    let mut findings = state::all(&fake.host(), &Config::default(), state);
    findings.sort_by(|one, other| one.subject.cmp(&other.subject));
    let [aside, torn] = &findings[..] else { panic!("{findings:?}") };
    told(aside, Status::Warn, false, "it is empty; none of its processes lives");
    told(torn, Status::Warn, false, "not JSON");
    assert!(torn.subject.contains("torn") && torn.remedy.as_ref().is_some_and(|remedy| remedy.contains("kuasarctl gc")));
    assert!(torn.detail.contains("k8s.io/torn/state.json: "), "{torn:?}");
}

#[test]
fn cgroups_of_all_kinds_are_known() {
    let unified = |controllers| Fake::new().with("sys/fs/cgroup/cgroup.controllers", controllers);
    told(&kernel::cgroups(&unified("cpuset cpu io memory hugetlb pids\n").host()), Status::Ok, false, "v2: cpuset, cpu");
    told(&kernel::cgroups(&unified("cpuset cpu pids\n").host()), Status::Missing, true, "v2 without memory");
    told(&kernel::cgroups(&unified("cpu memory pids\n").host()), Status::Warn, false, "no cpuset, hugetlb");
    told(&kernel::cgroups(&Fake::new().host()), Status::Missing, true, "no controllers");
    let mut v1 = Fake::new();
    for controller in ["cpu", "cpu,cpuacct", "cpuset", "memory", "pids", "hugetlb", "systemd"] {
        v1 = v1.with(&format!("sys/fs/cgroup/{controller}/cgroup.procs"), "");
    }
    told(&kernel::cgroups(&v1.host()), Status::Warn, false, "v1: cpu, cpuset, hugetlb, memory, pids");
    let hybrid = v1.with("sys/fs/cgroup/unified/cgroup.controllers", "");
    told(&kernel::cgroups(&hybrid.host()), Status::Warn, false, "v1 (hybrid)");
}

#[test]
fn namespaces_and_what_goes_with_them() {
    let mut fake = Fake::new().kernel("6.18.0");
    told(&kernel::namespaces(&fake.host()), Status::Missing, true, "no cgroup, ipc, mnt, net, pid, uts");
    told(&kernel::user_namespaces(&fake.host()), Status::Missing, false, "not in this kernel");
    for kind in ["cgroup", "ipc", "mnt", "net", "pid", "uts", "user"] {
        fake = fake.with(&format!("proc/self/ns/{kind}"), "");
    }
    told(&kernel::namespaces(&fake.host()), Status::Ok, false, "net");
    told(&kernel::user_namespaces(&fake.host()), Status::Ok, false, "id-mapped");
    let fake = fake.kernel("6.1.0");
    told(&kernel::user_namespaces(&fake.host()), Status::Warn, false, "without id-mapped");
    let fake = fake.with("proc/sys/user/max_user_namespaces", "0\n");
    told(&kernel::user_namespaces(&fake.host()), Status::Missing, false, "forbidden");
}

#[test]
fn overlayfs_may_be_a_module() {
    let none = Fake::new().kernel("6.1.0").with("proc/filesystems", "nodev\tproc\n\text4\n");
    told(&kernel::overlay(&none.host()), Status::Missing, false, "not in this kernel");
    let module = none.with("lib/modules/6.1.0/modules.dep", "kernel/fs/overlayfs/overlay.ko.xz:\n");
    told(&kernel::overlay(&module.host()), Status::Ok, false, "module");
    let built_in = module.with("proc/filesystems", "nodev\toverlay\n");
    told(&kernel::overlay(&built_in.host()), Status::Ok, false, "in the kernel");
}

#[test]
fn security_modules_and_seccomp() {
    let fake = Fake::new();
    told(&kernel::security_modules(&fake.host()), Status::Missing, false, "neither");
    told(&kernel::seccomp(&fake.host()), Status::Missing, false, "not in this kernel");
    let fake =
        fake.with("sys/module/apparmor/parameters/enabled", "Y\n").with("proc/sys/kernel/seccomp/actions_avail", "errno\n");
    told(&kernel::security_modules(&fake.host()), Status::Warn, false, "apparmor_parser is missing");
    told(&kernel::seccomp(&fake.host()), Status::Ok, false, "filtered");
    let fake = fake.with_program("sbin/apparmor_parser").with("sys/fs/selinux/enforce", "1");
    told(&kernel::security_modules(&fake.host()), Status::Ok, false, "AppArmor, SELinux (enforcing)");
}

#[test]
fn privileges_are_read_from_the_process() {
    let capabilities = |set: &str| Fake::new().with("proc/self/status", &format!("Name:\tx\nCapEff:\t{set}\n"));
    let setup = containerd::Setup::default();
    let all = capabilities("000001ffffffffff");
    told(&kernel::privileges(&all.host()), Status::Ok, false, "CAP_SYS_ADMIN");
    told(&kernel::oom_score(&all.host(), &setup).unwrap(), Status::Ok, false, "can be lowered");
    let no_resource = capabilities("000001fffeffffff");
    told(&kernel::oom_score(&no_resource.host(), &setup).unwrap(), Status::Warn, false, "will not start");
    let none = capabilities("0000000000000000");
    told(&kernel::privileges(&none.host()), Status::Missing, true, "no CAP_SYS_ADMIN");
    assert_eq!(kernel::oom_score(&none.host(), &setup), None);
    let restricted = no_resource
        .with("etc/containerd/config.toml", "[plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n");
    let setup = containerd::Setup::read(&restricted.host());
    told(&kernel::oom_score(&restricted.host(), &setup).unwrap(), Status::Ok, false, "restrict_oom_score_adj");
}

#[test]
fn a_kvm_device_without_hardware_is_seen_through() {
    told(&kernel::kvm(&Fake::new().host()), Status::Missing, false, "no /dev/kvm");
    let device = Fake::new().with("dev/kvm", "");
    if cfg!(target_arch = "x86_64") {
        told(&kernel::kvm(&device.host()), Status::Missing, false, "no hardware");
    }
    let device = device.with("sys/module/kvm_amd/refcnt", "0");
    for (mode, status, word) in [(0o600, Status::Missing, "mode 600"), (0o660, Status::Ok, "kvm_amd")] {
        fs::set_permissions(device.0.path().join("dev/kvm"), fs::Permissions::from_mode(mode)).unwrap();
        told(&kernel::kvm(&device.host()), status, false, word);
    }
}

#[test]
fn cni_plugins_are_looked_for_where_containerd_does() {
    let standard = ["/opt/cni/bin".to_owned()];
    let fake = Fake::new();
    told(&network::plugins(&fake.host(), &standard), Status::Missing, false, "none in /opt/cni/bin");
    let fake = fake.with_program("usr/lib/cni/bridge");
    let finding = network::plugins(&fake.host(), &standard);
    told(&finding, Status::Missing, false, "none in /opt/cni/bin");
    assert!(finding.remedy.unwrap().contains("bin_dirs = [\"/usr/lib/cni\"]"));
    told(
        &network::plugins(&fake.host(), &["/usr/lib/cni".to_owned()]),
        Status::Warn,
        false,
        "bridge, but no host-local, loopback, portmap",
    );
    let mut fake = fake;
    for name in ["host-local", "loopback", "portmap"] {
        fake = fake.with_program(&format!("usr/lib/cni/{name}"));
    }
    let fake = fake.with(
        "etc/containerd/config.toml",
        "[plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/usr/lib/cni']\nconf_dir = '/cni'\n",
    );
    let setup = containerd::Setup::read(&fake.host());
    let findings = network::all(&fake.host(), &setup);
    told(&findings[0], Status::Ok, false, "in /usr/lib/cni");
    told(&findings[1], Status::Missing, false, "none in /cni");
    let fake = fake.with("cni/10-net.conflist", "{}").with("cni/05-readme.txt", "");
    told(&network::all(&fake.host(), &setup)[1], Status::Ok, false, "/cni/10-net.conflist");
}

const SOCKET: &str = "/run/kuasar/kuasard.sock";

/// The drop-in as it should be.
const DROP_IN: &str = "
[proxy_plugins.kuasar-runc]
type = 'sandbox'
address = '/run/kuasar/kuasard.sock'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kuasar-runc]
runtime_type = 'io.containerd.kuasar-runc.v1'
sandboxer = 'kuasar-runc'
";

fn lacks(fake: &Fake) -> Option<String> {
    containerd::Setup::read(&fake.host()).lacks(&fake.host(), "kuasar-runc", Path::new(SOCKET))
}

#[test]
fn containerds_configuration_is_followed_through_its_imports() {
    let fake = Fake::new().with("etc/containerd/conf.d/kuasar.toml", DROP_IN);
    assert!(lacks(&fake).unwrap().contains("no [proxy_plugins.kuasar-runc]"), "a drop-in that nothing imports does not count");
    let fake = fake.with("etc/containerd/config.toml", "version = 3\nimports = ['conf.d/*.toml']\n");
    assert!(lacks(&fake).unwrap().contains("needs containerd-shim-kuasar-runc-v1"));
    let fake = fake.with_program("usr/bin/containerd-shim-kuasar-runc-v1");
    assert_eq!(lacks(&fake), None);
    // containerd finds the shim beside itself too.
    let mut elsewhere = fake.host();
    elsewhere.containerd = Some("/opt/containerd".into());
    fs::rename(fake.0.path().join("usr/bin/containerd-shim-kuasar-runc-v1"), fake.0.path().join("opt-shim")).unwrap();
    assert!(lacks(&fake).is_some());
    fs::create_dir(fake.0.path().join("opt")).unwrap();
    fs::rename(fake.0.path().join("opt-shim"), fake.0.path().join("opt/containerd-shim-kuasar-runc-v1")).unwrap();
    assert_eq!(containerd::Setup::read(&elsewhere).lacks(&elsewhere, "kuasar-runc", Path::new(SOCKET)), None);
    let fake = fake.with_program("usr/bin/containerd-shim-kuasar-runc-v1");
    // A circle of imports ends.
    let fake = fake.with(
        "etc/containerd/conf.d/z.toml",
        "imports = ['/etc/containerd/config.toml', '/etc/containerd/*.toml', 'gone.toml']",
    );
    assert_eq!(lacks(&fake), None);
    let fake = fake.with("etc/containerd/conf.d/z.toml", "imports = [");
    assert_eq!(lacks(&fake), None);
    let setup = containerd::Setup::read(&fake.host());
    let findings = containerd::all(&fake.host(), &Err("none".into()), &setup, &Config::default(), Path::new(SOCKET));
    assert!(findings.iter().any(|finding| finding.subject == "containerd configuration" && finding.status == Status::Warn));
}

#[test]
fn each_way_to_miss_the_daemon_is_told() {
    for (from, to, words) in [
        ("type = 'sandbox'", "type = 'snapshot'", "has the type \"snapshot\""),
        ("kuasard.sock", "other.sock", "has the address /run/kuasar/other.sock"),
        ("sandboxer = 'kuasar-runc'", "", "with sandboxer = \"kuasar-runc\""),
        ("sandboxer = 'kuasar-runc'", "sandboxer = 'shim'", "has the sandboxer \"shim\""),
        ("'io.containerd.kuasar-runc.v1'", "'kuasar'", "which names no shim"),
    ] {
        let fake = Fake::new().with("etc/containerd/config.toml", &DROP_IN.replace(from, to));
        let problem = lacks(&fake).unwrap();
        assert!(problem.contains(words), "{problem}");
    }
}

#[test]
fn versions_of_containerd_are_read() {
    let version = |text: &str| text.parse::<containerd::Version>();
    assert_eq!(version("v2.4.2").unwrap().to_string(), "2.4.2");
    assert_eq!(version("2.1.9~ds1").unwrap().to_string(), "2.1.9");
    assert_eq!(version("2.4.0-beta.1").unwrap().to_string(), "2.4.0");
    assert_eq!(version("2.3").unwrap().to_string(), "2.3");
    assert!(version("2.3").unwrap().at_least(2, 3, 4), "without a patch level the newest is meant");
    for wrong in ["", "2", "two", "2.", "2.x", "1.2.3.4", "-1.2"] {
        assert!(version(wrong).is_err(), "{wrong:?}");
    }
    let says = |text: &str| {
        let version = containerd::version_in(text).ok_or_else(|| "no version".to_owned());
        containerd::program(&version.map(|version| containerd::Containerd { path: "/usr/bin/containerd".into(), version }))
    };
    told(
        &says("containerd github.com/containerd/containerd/v2 v2.4.2 1fbd703"),
        Status::Ok,
        false,
        "2.4.2 at /usr/bin/containerd",
    );
    told(&says("containerd github.com/containerd/containerd/v2 2.1.9~ds1 2.1.9~ds1-1"), Status::Warn, false, "2.1.9");
    told(&says("containerd github.com/containerd/containerd v2.0.5 x"), Status::Warn, false, "never tried");
    told(&says("containerd github.com/containerd/containerd v1.7.24 x"), Status::Missing, true, "no Sandbox API");
    told(&says("hello"), Status::Missing, true, "no version");
}

#[test]
fn what_a_runtime_can_do_is_told() {
    let able = |features: Option<Value>| runtime::able("x".into(), "runc 1.3.5", features.as_ref());
    let all = json!({
        "mountOptions": ["ro", "rro"],
        "linux": {
            "namespaces": ["user", "pid"],
            "seccomp": { "enabled": true },
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    });
    told(
        &able(Some(all.clone())),
        Status::Ok,
        false,
        "runc 1.3.5: seccomp, user namespaces, id-mapped mounts, recursive read-only mounts",
    );
    let mut some = all;
    some["linux"]["seccomp"]["enabled"] = json!(false);
    told(&able(Some(some)), Status::Warn, false, "; no seccomp");
    told(&able(Some(json!({ "linux": 7 }))), Status::Warn, false, "runc 1.3.5: no seccomp, user namespaces");
    told(&able(None), Status::Warn, false, "does not tell");
}

#[test]
fn runtime_types_name_shims_as_containerd_does() {
    assert_eq!(containerd::shim_program("io.containerd.kuasar-runc.v1").as_deref(), Some("containerd-shim-kuasar-runc-v1"));
    assert_eq!(containerd::shim_program("kuasar"), None);
    assert_eq!(containerd::shim_program(".v1"), None);
}

#[test]
fn the_cgroup_driver_is_containerds_then_kubelets_then_the_hosts() {
    let runc = |set: &str| {
        let tables = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]";
        Fake::new().with("etc/containerd/config.toml", &format!("version = 3\n{tables}\nSystemdCgroup = {set}\n"))
    };
    let by_systemd = |fake: Fake| fake.with("run/systemd/system/x", "").with("sys/fs/cgroup/cgroup.controllers", "cpu");
    let kubelet = |fake: Fake, driver: &str| {
        fake.with(
            "var/lib/kubelet/config.yaml",
            &format!("kind: KubeletConfiguration\ncgroupDriver: {driver}\nx:\n  cgroupDriver: y\n"),
        )
    };
    let find = |fake: &Fake| driver::finding(&fake.host(), &containerd::Setup::read(&fake.host()));
    told(&find(&Fake::new()), Status::Ok, false, "cgroupfs, by what runs this node");
    told(&find(&by_systemd(Fake::new())), Status::Ok, false, "systemd, by what runs this node");
    told(&find(&kubelet(Fake::new(), "systemd")), Status::Ok, false, "systemd, by cgroupDriver in /var/lib/kubelet");
    told(&find(&kubelet(by_systemd(Fake::new()), "'cgroupfs' # old")), Status::Ok, false, "cgroupfs, by cgroupDriver");
    told(&find(&kubelet(Fake::new(), "neither")), Status::Ok, false, "cgroupfs, by what runs this node");
    told(&find(&by_systemd(runc("true"))), Status::Ok, false, "systemd, by containerd's runtime handler runc");
    told(&find(&kubelet(runc("true"), "systemd")), Status::Ok, false, "systemd, by containerd's");
    told(&find(&kubelet(runc("false"), "systemd")), Status::Warn, false, "handler runc has cgroupfs, kubelet systemd");
    told(&find(&by_systemd(runc("false"))), Status::Warn, false, "but systemd is usual");
}

#[test]
fn a_full_store_of_descriptors_is_told() {
    let told_of = |stored: u32, most: u32| {
        systemd::stored_descriptors(&format!("FileDescriptorStoreMax={most}\nNFileDescriptorStore={stored}\n"))
    };
    told(&told_of(17, 65536).unwrap(), Status::Ok, false, "17 of 65536");
    told(&told_of(90, 100).unwrap(), Status::Warn, false, "nearly all");
    told(&told_of(100, 100).unwrap(), Status::Warn, false, "reported as exited");
    assert_eq!((told_of(0, 0), systemd::stored_descriptors("")), (None, None));
}

#[test]
fn an_old_systemd_is_told() {
    told(&systemd::version("systemd 257 (257.8-1)\n+PAM +AUDIT"), Status::Ok, false, "257");
    told(&systemd::version("systemd 254.5\n"), Status::Ok, false, "254");
    told(&systemd::version("systemd 252 (252.39-1~deb12u1)\n"), Status::Warn, false, "252: when kuasard is stopped");
    told(&systemd::version(""), Status::Warn, false, "cannot be read");
}

#[test]
fn the_configuration_of_a_running_containerd_is_known() {
    let argument = |arguments: &str| containerd::config_argument(arguments.replace(' ', "\0").as_bytes());
    for arguments in ["-c /c.toml", "--config /c.toml -l debug", "-l debug --config=/c.toml", "--root /r -config=/c.toml"] {
        assert_eq!(argument(&format!("containerd {arguments}")), Some("/c.toml".into()), "{arguments}");
    }
    for arguments in ["", "--root /r", "--config", "--configuration x", "-cx"] {
        assert_eq!(argument(&format!("-c {arguments}")), None, "{arguments}");
    }
    assert_eq!(containerd::running_at(Path::new("/no/such.sock")), None);
    // Something else listens there.
    let dir = tempfile::tempdir().unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("c.sock")).unwrap();
    assert_eq!(containerd::running_at(&dir.path().join("c.sock")), None);

    let fake = Fake::new().with("opt/c.toml", DROP_IN).with_program("opt/bin/containerd-shim-kuasar-runc-v1");
    let mut host = fake.host();
    host.see_containerd(containerd::Running {
        program: "/opt/sbin/containerd".into(),
        config: Some("/opt/c.toml".into()),
        search_path: Some("/opt/bin".into()),
    });
    assert_eq!(containerd::Setup::read(&host).lacks(&host, "kuasar-runc", Path::new(SOCKET)), None);
}

#[test]
fn what_no_pod_runs_without_is_required() {
    let found = |drop_in: &str, names: &[&str]| {
        let fake =
            Fake::new().with("etc/containerd/config.toml", drop_in).with_program("usr/bin/containerd-shim-kuasar-runc-v1");
        let text: String = names.iter().map(|name| format!("[sandboxer.{name}]\nkind = 'runc'\n")).collect();
        let config = Config::parse(Path::new("c"), &text).unwrap();
        let setup = containerd::Setup::read(&fake.host());
        containerd::all(&fake.host(), &Err("none".into()), &setup, &config, Path::new(SOCKET))
    };
    let of = |findings: &[Finding], subject: &str| findings.iter().find(|finding| finding.subject == subject).unwrap().clone();
    let findings = found("", &["kuasar-runc", "other"]);
    told(&of(&findings, "containerd socket"), Status::Missing, true, "no /run/containerd");
    told(&of(&findings, "containerd, kuasar-runc"), Status::Missing, true, "no [proxy_plugins.kuasar-runc]");
    // Pods of one sandboxer do run.
    let findings = found(DROP_IN, &["kuasar-runc", "other"]);
    told(&of(&findings, "containerd, kuasar-runc"), Status::Ok, false, "goes to");
    told(&of(&findings, "containerd, other"), Status::Missing, false, "no [proxy_plugins.other]");
}

#[test]
fn a_daemon_that_answers_is_believed() {
    let config = Config::default();
    let ready = |technique: &str| Serving::Ready { technique: technique.into(), features: None };
    let mut settings = Settings {
        version: "1.2.3".into(),
        pid: 7,
        search_path: String::new(),
        config: "/no/such.toml".into(),
        configuration: config.to_toml(),
        sandboxers: [("kuasar-runc".to_owned(), ready("runc 1.3.5"))].into(),
    };
    told(&daemon::configuration(&settings, &Ok(Config::default())), Status::Ok, false, "defaults: kuasar-runc");
    let changed = Config::parse(Path::new("c"), "[log]\nlevel = 'debug'\n");
    told(&daemon::configuration(&settings, &changed), Status::Warn, false, "changed since the daemon read it");
    let wrong = Config::parse(Path::new("c"), "[log]\nlevel = 'loud'\n");
    told(&daemon::configuration(&settings, &wrong), Status::Warn, false, "goes by what it read before");
    let [finding] = &daemon::sandboxers(&settings, &config, &[])[..] else { panic!() };
    told(finding, Status::Warn, false, "runc 1.3.5: does not tell");
    // What is found from here counts where it is the same.
    let seen = |detail: &str| Finding::ok("OCI runtime, kuasar-runc", detail).required();
    let [finding] = &daemon::sandboxers(&settings, &config, &[seen("runc 1.3.5 at /sbin/runc: seccomp")])[..] else { panic!() };
    told(finding, Status::Ok, false, "at /sbin/runc");
    let [finding] = &daemon::sandboxers(&settings, &config, &[seen("crun 1.8.1 at /bin/crun")])[..] else { panic!() };
    told(finding, Status::Warn, false, "runc 1.3.5: does not tell");
    settings.sandboxers.insert("kuasar-runc".into(), Serving::Unavailable("no runc".into()));
    let [finding] = &daemon::sandboxers(&settings, &config, &[])[..] else { panic!() };
    told(finding, Status::Missing, true, "no runc");
    // As it comes over the wire.
    let text = serde_json::to_string(&settings).unwrap();
    assert!(serde_json::from_str::<Settings>(&text).is_ok(), "{text}");
    let socket = Path::new(SOCKET);
    told(&daemon::running(&Daemon::Answers(settings.into()), socket), Status::Ok, false, "1.2.3, process 7");
    told(&daemon::running(&Daemon::Silent("slow".into()), socket), Status::Warn, false, "slow");
    told(&daemon::running(&Daemon::Absent("refused".into()), socket), Status::Missing, true, "refused");
}
