//! What a container may do.

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::security_profile::ProfileType;
use kuasar_tests::{Container, ContainerSpec};
use serde_json::json;

use crate::suite::{Case, Entry, cases, refused};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Handlers Shared:
        a_read_only_root_file_system,
        capabilities,
        the_default_seccomp_profile,
        a_seccomp_profile_of_the_node,
        a_seccomp_profile_that_is_missing,
        new_privileges,
        paths_are_masked_and_read_only,
        privileged,
        apparmor,
        selinux,
        oom_score,
    ]
}

const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;
const NET_ADMIN: u64 = 1 << 12;
const SYS_TIME: u64 = 1 << 25;
const CHOWN: u64 = 1;
/// The number of a system call of Linux 6.13.
const SETXATTRAT: i64 = 463;

/// A line of /proc/<process>/status: of the container's first process, or of an exec.
async fn status(container: &Container, process: &str, key: &str) -> Result<String> {
    let text = container.exec(["cat", &format!("/proc/{process}/status")]).await?.stdout();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(line.with_context(|| format!("no {key} in {text:?}"))?.trim().to_owned())
}

/// A capability set of both, which must be the same.
async fn capability_set(container: &Container, set: &str) -> Result<u64> {
    let init = status(container, "1", set).await?;
    ensure!(init == status(container, "self", set).await?, "init and exec differ in {set}");
    Ok(u64::from_str_radix(&init, 16)?)
}

async fn a_read_only_root_file_system(case: &Case) -> Result<()> {
    let dir = case.dir().join("v");
    std::fs::create_dir(&dir)?;
    let container = case.container(ContainerSpec::new("c").sleep().readonly_rootfs().mount(&dir, "/v", false)).await?;
    for path in ["/x", "/tmp/x", "/etc/x", "/bin/ls"] {
        let ran = container.sh(&format!("echo x >>{path}")).await?;
        // Of a program that runs, virtiofs says that first.
        let busy = case.is_machine() && ran.stderr().contains("Text file busy");
        assert!(busy || ran.stderr().contains("Read-only file system"), "{path}: {ran:?}");
    }
    assert_eq!(container.sh("echo x >/v/x && echo x >/dev/shm/x && echo x >/dev/null").await?.exit_code, 0);
    Ok(())
}

async fn capabilities(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let plain = pod.run(ContainerSpec::new("plain").sleep()).await?;
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(capability_set(&plain, set).await?, DEFAULT_CAPABILITIES, "{set}");
    }
    let spec = ContainerSpec::new("more").sleep().add_capabilities(&["NET_ADMIN", "SYS_TIME"]).drop_capabilities(&["CHOWN"]);
    let more = pod.run(spec).await?;
    assert_eq!(capability_set(&more, "CapEff").await?, DEFAULT_CAPABILITIES & !CHOWN | NET_ADMIN | SYS_TIME);
    assert_ne!(more.sh("touch /f && chown 1:1 /f").await?.exit_code, 0);
    let none = pod.run(ContainerSpec::new("none").sleep().drop_capabilities(&["ALL"])).await?;
    assert_eq!(capability_set(&none, "CapEff").await?, 0);
    assert_eq!(capability_set(&none, "CapBnd").await?, 0);
    let one = pod.run(ContainerSpec::new("one").sleep().drop_capabilities(&["ALL"]).add_capabilities(&["CHOWN"])).await?;
    assert_eq!(capability_set(&one, "CapEff").await?, CHOWN);
    // Who is not root has none, unless a file gives them.
    let user = pod.run(ContainerSpec::new("user").sleep().user(1000, None)).await?;
    assert_eq!(capability_set(&user, "CapEff").await?, 0);
    assert_eq!(capability_set(&user, "CapBnd").await?, DEFAULT_CAPABILITIES);
    let all = pod.run(ContainerSpec::new("all").sleep().add_capabilities(&["ALL"])).await?;
    let bounding = std::fs::read_to_string("/proc/self/status")?;
    let bounding = bounding.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("no CapBnd")?.trim();
    assert_eq!(capability_set(&all, "CapEff").await?, u64::from_str_radix(bounding, 16)?, "all that this node has");
    Ok(())
}

fn seccomp_works() -> bool {
    std::path::Path::new("/proc/sys/kernel/seccomp").exists()
}

async fn seccomp_of(container: &Container) -> Result<String> {
    let (init, exec) = (status(container, "1", "Seccomp").await?, status(container, "self", "Seccomp").await?);
    ensure!(init == exec, "init {init}, exec {exec}");
    Ok(init)
}

async fn the_default_seccomp_profile(case: &Case) -> Result<()> {
    if !seccomp_works() {
        return case.skip("this kernel has no seccomp");
    }
    let pod = case.quick_pod().await?;
    let default = pod.run(ContainerSpec::new("default").sleep().seccomp(ProfileType::RuntimeDefault, "")).await?;
    assert_eq!(seccomp_of(&default).await?, "2");
    // Forbidden by it, whatever the capabilities.
    assert_ne!(default.sh("unshare -U true").await?.exit_code, 0);
    let answer = async |call: i64| anyhow::Ok(default.exec(["syscall", &call.to_string()]).await?.stdout().trim().to_owned());
    assert_eq!(answer(nix::libc::SYS_add_key).await?, "EPERM");
    // Whether the profile has heard of setxattrat or not: programs do without a call that is not there, not without one that is refused.
    assert_ne!(answer(SETXATTRAT).await?, "EPERM");
    let terminal = default.exec_session(&["grep", "Seccomp:", "/proc/self/status"], true, true).await?.finish().await?;
    assert_eq!(terminal.1.split_whitespace().last(), Some("2"), "{terminal:?}");
    let unconfined = pod.run(ContainerSpec::new("unconfined").sleep().seccomp(ProfileType::Unconfined, "")).await?;
    assert_eq!(seccomp_of(&unconfined).await?, "0");
    // CRI leaves it to the caller; kubelet asks for one.
    let unsaid = pod.run(ContainerSpec::new("unsaid").sleep()).await?;
    assert_eq!(seccomp_of(&unsaid).await?, "0");
    Ok(())
}

async fn a_seccomp_profile_of_the_node(case: &Case) -> Result<()> {
    if !seccomp_works() {
        return case.skip("this kernel has no seccomp");
    }
    let profile = case.dir().join("profile.json");
    let denied = ["chmod", "fchmod", "fchmodat", "fchmodat2"];
    let json = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{ "names": denied, "action": "SCMP_ACT_ERRNO" }] });
    std::fs::write(&profile, json.to_string())?;
    let path = profile.display().to_string();
    let spec = ContainerSpec::new("c").sh("chmod 777 /tmp; echo $?; exec sleep 1000").seccomp(ProfileType::Localhost, &path);
    let container = case.container(spec).await?;
    container.wait_log("1").await?;
    assert!(container.sh("chmod 777 /tmp").await?.stderr().contains("not permitted"));
    assert_eq!(seccomp_of(&container).await?, "2");
    Ok(())
}

async fn a_seccomp_profile_that_is_missing(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let path = case.dir().join("none.json").display().to_string();
    let create = pod.create(ContainerSpec::new("c").sleep().seccomp(ProfileType::Localhost, &path)).await;
    refused(create, &["none.json"])?;
    Ok(())
}

async fn new_privileges(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let without = pod.run(ContainerSpec::new("without").sleep().no_new_privileges()).await?;
    let with = pod.run(ContainerSpec::new("with").sleep()).await?;
    for process in ["1", "self"] {
        assert_eq!(status(&without, process, "NoNewPrivs").await?, "1");
        assert_eq!(status(&with, process, "NoNewPrivs").await?, "0");
    }
    Ok(())
}

async fn paths_are_masked_and_read_only(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let masked = ["/proc/kcore", "/proc/keys", "/sys/firmware", "/etc/group"];
    let readonly = ["/proc/sys", "/proc/sysrq-trigger", "/var"];
    let guarded = pod.run(ContainerSpec::new("guarded").sleep().guarded_paths(&masked, &readonly)).await?;
    assert_eq!(
        guarded.sh("head -c 10 /proc/kcore | wc -c; cat /etc/group | wc -c; ls /sys/firmware | wc -l").await?.stdout(),
        "0\n0\n0\n"
    );
    for path in ["/proc/sys/kernel/domainname", "/var/x"] {
        let ran = guarded.sh(&format!("echo x >{path}")).await?;
        assert!(ran.stderr().contains("Read-only file system"), "{path}: {ran:?}");
    }
    // The lists are the caller's: an empty one guards nothing, but sysfs stays as it is.
    let open = pod.run(ContainerSpec::new("open").sleep()).await?;
    assert_ne!(open.sh("cat /etc/group | wc -c").await?.stdout(), "0\n");
    assert_eq!(open.sh("awk '$2==\"/sys\"{print $4}' /proc/mounts | cut -d, -f1").await?.stdout(), "ro\n");
    Ok(())
}

async fn privileged(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().quick().privileged()).await?;
    let spec = ContainerSpec::new("c").sleep().privileged().seccomp(ProfileType::RuntimeDefault, "");
    let container = pod.run(spec).await?;
    assert_eq!(seccomp_of(&container).await?, "0", "privileged means without");
    let bounding = std::fs::read_to_string("/proc/self/status")?;
    let bounding = bounding.lines().find_map(|line| line.strip_prefix("CapEff:")).context("no CapEff")?.trim();
    assert_eq!(capability_set(&container, "CapEff").await?, u64::from_str_radix(bounding, 16)?);
    assert_eq!(container.sh("awk '$2==\"/sys\"{print $4}' /proc/mounts | cut -d, -f1").await?.stdout(), "rw\n");
    assert_eq!(container.sh("mkdir /m && mount -t tmpfs tmpfs /m && echo x >/m/x && umount /m").await?.exit_code, 0);
    // Beside it, others stay what they are.
    let plain = pod.run(ContainerSpec::new("plain").sleep()).await?;
    assert_eq!(capability_set(&plain, "CapEff").await?, DEFAULT_CAPABILITIES);
    let unprivileged = case.quick_pod().await?;
    refused(unprivileged.create(ContainerSpec::new("c").sleep().privileged()).await, &["privileged"])?;
    Ok(())
}

async fn apparmor(case: &Case) -> Result<()> {
    if std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|on| on.starts_with('Y')) {
        let mut spec = ContainerSpec::new("c").sleep();
        spec.security().apparmor = Some(kuasar_tests::cri::k8s_cri::v1::SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            localhost_ref: String::new(),
        });
        let container = case.container(spec).await?;
        for process in ["1", "self"] {
            let label = container.exec(["cat", &format!("/proc/{process}/attr/current")]).await?.stdout();
            assert!(label.starts_with("cri-containerd.apparmor.d"), "{label}");
        }
        return Ok(());
    }
    case.skip("this kernel has no AppArmor")
}

async fn selinux(case: &Case) -> Result<()> {
    if std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        let container = case.sleeper().await?;
        let label = container.exec(["cat", "/proc/1/attr/current"]).await?.stdout();
        assert!(label.contains("container_t"), "{label}");
        return Ok(());
    }
    case.skip("this kernel has no SELinux")
}

async fn oom_score(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").sleep().oom_score_adj(567)).await?;
    assert_eq!(container.exec(["cat", "/proc/1/oom_score_adj"]).await?.stdout(), "567\n");
    assert_eq!(container.exec(["cat", "/proc/self/oom_score_adj"]).await?.stdout(), "567\n");
    let terminal = container.exec_session(&["cat", "/proc/self/oom_score_adj"], true, true).await?.finish().await?;
    assert_eq!(terminal.1.trim_end(), "567");
    Ok(())
}
