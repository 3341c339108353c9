//! The kernel: its version, cgroups, namespaces, security modules, and what this process may do.

use std::{fs, os::unix::fs::PermissionsExt};

use kuasar_vmm::qemu::kvm_is_closed;

use super::{Finding, Host, containerd};

/// Oldest kernel that has what the daemon takes for granted (pidfds, `close_range`, `openat2`).
const OLDEST: (u32, u32) = (5, 10);
/// `mount_setattr(2)`: recursive read-only mounts, and id-mapped mounts.
const MOUNT_SETATTR: (u32, u32) = (5, 12);
/// Id-mapped tmpfs, which pods with a user namespace have (Kubernetes asks for the same version).
const IDMAPPED_TMPFS: (u32, u32) = (6, 3);

/// Controllers without which limits of pods are not kept.
const REQUIRED_CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// Controllers that some pods ask for.
const OPTIONAL_CONTROLLERS: [&str; 2] = ["cpuset", "hugetlb"];

/// Bit of `CAP_SYS_RESOURCE` (capabilities(7)).
const CAP_SYS_RESOURCE: u32 = 24;
/// Bit of `CAP_SYS_ADMIN`.
const CAP_SYS_ADMIN: u32 = 21;

pub(super) fn all(host: &Host, containerd: &containerd::Setup) -> Vec<Finding> {
    let mut findings = vec![version(host)];
    findings.push(cgroups(host));
    findings.push(namespaces(host));
    findings.push(user_namespaces(host));
    findings.push(overlay(host));
    findings.push(seccomp(host));
    findings.push(security_modules(host));
    findings.push(privileges(host));
    findings.extend(oom_score(host, containerd));
    findings.push(kvm(host));
    findings
}

/// Version of the running kernel.
fn release(host: &Host) -> Option<(u32, u32)> {
    let release = host.read("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn version(host: &Host) -> Finding {
    let text = host.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    match release(host) {
        None => Finding::missing("kernel", "its version cannot be read", "mount /proc").required(),
        Some(version) if version < OLDEST => {
            let (major, minor) = OLDEST;
            Finding::missing("kernel", format!("{text} is too old"), format!("Linux {major}.{minor} or later")).required()
        }
        Some(version) if version < MOUNT_SETATTR => {
            let (major, minor) = MOUNT_SETATTR;
            Finding::warn(
                "kernel",
                format!("{text}: no recursive read-only mounts, no user namespaces for pods"),
                format!("Linux {major}.{minor} or later"),
            )
        }
        Some(_) => Finding::ok("kernel", text),
    }
}

/// Controllers of each kind of hierarchy.
pub(super) fn cgroups(host: &Host) -> Finding {
    let unified = host.read("/sys/fs/cgroup/cgroup.controllers");
    let (kind, controllers): (_, Vec<String>) = match &unified {
        Some(controllers) => ("v2", controllers.split_whitespace().map(str::to_owned).collect()),
        None => {
            let hybrid = host.exists("/sys/fs/cgroup/unified/cgroup.controllers");
            (if hybrid { "v1 (hybrid)" } else { "v1" }, v1_controllers(host))
        }
    };
    if controllers.is_empty() {
        return Finding::missing("cgroups", "no controllers under /sys/fs/cgroup", "mount cgroups, as systemd does").required();
    }
    let lacking = |wanted: &[&'static str]| -> Vec<&'static str> {
        wanted.iter().copied().filter(|name| !controllers.iter().any(|controller| controller == name)).collect()
    };
    let required = lacking(&REQUIRED_CONTROLLERS);
    if !required.is_empty() {
        let mut remedy = "enable them in the kernel".to_owned();
        if required.contains(&"memory") {
            remedy.push_str("; memory: boot with cgroup_enable=memory");
        }
        return Finding::missing("cgroups", format!("{kind} without {}", required.join(", ")), remedy).required();
    }
    let detail = format!("{kind}: {}", controllers.join(", "));
    let optional = lacking(&OPTIONAL_CONTROLLERS);
    if !optional.is_empty() {
        let lacking = optional.join(", ");
        return Finding::warn(
            "cgroups",
            format!("{detail}; no {lacking}"),
            format!("a kernel with {lacking}, for pods that ask for it"),
        );
    }
    if unified.is_none() {
        let remedy = "boot with systemd.unified_cgroup_hierarchy=1; containerd deprecates v1 and Kubernetes drops it";
        return Finding::warn("cgroups", detail, remedy);
    }
    Finding::ok("cgroups", detail)
}

/// Each mounted v1 controller has a directory of its name, or a link to the joint one (`cpu` → `cpu,cpuacct`).
fn v1_controllers(host: &Host) -> Vec<String> {
    let mut controllers = host.list("/sys/fs/cgroup");
    controllers.retain(|name| !name.contains(',') && host.exists(format!("/sys/fs/cgroup/{name}/cgroup.procs")));
    controllers.retain(|name| !["unified", "systemd"].contains(&name.as_str()));
    controllers
}

pub(super) fn namespaces(host: &Host) -> Finding {
    let kinds = ["cgroup", "ipc", "mnt", "net", "pid", "uts"];
    let lacking: Vec<_> = kinds.into_iter().filter(|kind| !host.exists(format!("/proc/self/ns/{kind}"))).collect();
    if lacking.is_empty() {
        return Finding::ok("namespaces", kinds.join(", "));
    }
    Finding::missing(
        "namespaces",
        format!("no {}", lacking.join(", ")),
        "a kernel with CONFIG_NAMESPACES and all kinds of them",
    )
    .required()
}

pub(super) fn user_namespaces(host: &Host) -> Finding {
    let subject = "user namespaces";
    if !host.exists("/proc/self/ns/user") {
        return Finding::missing(subject, "not in this kernel", "a kernel with CONFIG_USER_NS, for pods with hostUsers: false");
    }
    if host.read("/proc/sys/user/max_user_namespaces").is_some_and(|max| max == "0") {
        return Finding::missing(subject, "forbidden", "sysctl user.max_user_namespaces=15000, for pods with hostUsers: false");
    }
    match release(host) {
        Some(version) if version >= IDMAPPED_TMPFS => Finding::ok(subject, "with id-mapped mounts"),
        _ => {
            let (major, minor) = IDMAPPED_TMPFS;
            let remedy = format!("Linux {major}.{minor} or later, for pods with hostUsers: false and volumes");
            Finding::warn(subject, "without id-mapped mounts of all filesystems that pods use", remedy)
        }
    }
}

pub(super) fn overlay(host: &Host) -> Finding {
    let subject = "overlayfs";
    let in_kernel = host
        .read("/proc/filesystems")
        .unwrap_or_default()
        .lines()
        .any(|line| line.split_whitespace().last() == Some("overlay"));
    if in_kernel {
        return Finding::ok(subject, "in the kernel");
    }
    let release = host.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = format!("/lib/modules/{release}/modules.dep");
    if host.read(modules).unwrap_or_default().lines().any(|line| line.contains("/overlay.ko")) {
        return Finding::ok(subject, "as a module, loaded when containerd needs it");
    }
    Finding::missing(subject, "not in this kernel", "a kernel with CONFIG_OVERLAY_FS, or another snapshotter in containerd")
}

pub(super) fn seccomp(host: &Host) -> Finding {
    let has = host.read("/proc/sys/kernel/seccomp/actions_avail").is_some();
    if has {
        return Finding::ok("seccomp", "system calls of containers can be filtered");
    }
    Finding::missing(
        "seccomp",
        "not in this kernel",
        "a kernel with CONFIG_SECCOMP_FILTER; until then pods with the default profile fail",
    )
}

pub(super) fn security_modules(host: &Host) -> Finding {
    let mut active = Vec::new();
    if host.read("/sys/module/apparmor/parameters/enabled").is_some_and(|text| text == "Y") {
        // The runtime loads containerd's profile through this program.
        if host.program("apparmor_parser").is_none() && host.program("/sbin/apparmor_parser").is_none() {
            return Finding::warn("AppArmor", "active, but apparmor_parser is missing", "install the package apparmor");
        }
        active.push("AppArmor");
    }
    match host.read("/sys/fs/selinux/enforce").as_deref() {
        Some("1") => active.push("SELinux (enforcing)"),
        Some(_) => active.push("SELinux (permissive)"),
        None => {}
    }
    if active.is_empty() {
        let remedy = "boot with apparmor=1 security=apparmor, or SELinux, for profiles and labels; pods run without";
        return Finding::missing("AppArmor, SELinux", "neither is active", remedy);
    }
    Finding::ok("AppArmor, SELinux", active.join(", "))
}

/// Whether this process has a capability; the daemon and containerd are taken to be started alike.
pub(super) fn capable(host: &Host, bit: u32) -> bool {
    let status = host.read("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set & (1 << bit) != 0)
}

pub(super) fn privileges(host: &Host) -> Finding {
    if capable(host, CAP_SYS_ADMIN) {
        return Finding::ok("privileges", "CAP_SYS_ADMIN");
    }
    Finding::missing("privileges", "no CAP_SYS_ADMIN here", "run as root; what follows is only what an ordinary user can see")
        .required()
}

/// Whether containers' OOM scores can be set as Kubernetes asks.
#[must_use]
pub fn may_lower_oom_score(host: &Host) -> bool {
    capable(host, CAP_SYS_RESOURCE)
}

pub(super) fn oom_score(host: &Host, containerd: &containerd::Setup) -> Option<Finding> {
    if !capable(host, CAP_SYS_ADMIN) {
        return None;
    }
    let subject = "CAP_SYS_RESOURCE";
    let setting = "restrict_oom_score_adj";
    Some(if may_lower_oom_score(host) {
        Finding::ok(subject, "OOM scores can be lowered")
    } else if containerd.restricts_oom_score() {
        Finding::ok(subject, format!("not given, but containerd has {setting}"))
    } else {
        Finding::warn(
            subject,
            "not given: containers that Kubernetes wants to protect from the OOM killer will not start",
            format!("give it to containerd and kuasard, or set {setting} = true (kuasarctl containerd-config does)"),
        )
    })
}

pub(super) fn kvm(host: &Host) -> Finding {
    let subject = "KVM";
    let remedy = "load kvm_intel or kvm_amd, or enable nested virtualisation; only microVM sandboxers need it";
    let backed = ["kvm_intel", "kvm_amd"].into_iter().find(|name| host.exists(format!("/sys/module/{name}")));
    let mode = fs::metadata(host.path("/dev/kvm")).map(|device| device.permissions().mode());
    if let Ok(mode) = mode
        && backed.is_some()
        && kvm_is_closed(mode)
    {
        let detail = format!("only its owner may open /dev/kvm (mode {:o}), and QEMU runs as another user", mode & 0o777);
        return Finding::missing(subject, detail, "chmod 666 /dev/kvm; only microVM sandboxers need it");
    }
    match (mode.is_ok(), backed) {
        (true, Some(module)) => Finding::ok(subject, format!("/dev/kvm, {module}")),
        // On Arm the hypervisor is part of the kernel proper.
        (true, None) if cfg!(target_arch = "aarch64") => Finding::ok(subject, "/dev/kvm"),
        (true, None) => Finding::missing(subject, "/dev/kvm has no hardware behind it", remedy),
        (false, _) => Finding::missing(subject, "no /dev/kvm", remedy),
    }
}
