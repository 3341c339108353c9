//! What a pod is given beside its images: names, addresses of name servers, shared memory, kernel parameters.

use anyhow::{Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::PodSandboxState;
use kuasar_tests::{Container, ContainerSpec};

use crate::suite::{Case, Entry, cases, refused};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Handlers Shared:
        hostname,
        hosts,
        resolv_conf_as_asked_for,
        resolv_conf_of_the_node,
        the_files_are_the_pods_and_follow_the_rootfs,
        mounts_of_a_containers_own_come_first,
        shared_memory_is_the_pods,
        sysctls_as_asked_for,
        unprivileged_ports_and_ping,
        the_nodes_sysctls_are_left_alone,
        a_sysctl_that_does_not_exist,
    ]
}

async fn cat(container: &Container, path: &str) -> Result<String> {
    let ran = container.exec(["cat", path]).await?;
    ensure!(ran.exit_code == 0, "cat {path}: {ran:?}");
    Ok(ran.stdout())
}

async fn hostname(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().hostname("a-name-of-its-own")).await?;
    for name in ["one", "two"] {
        let container = pod.run(ContainerSpec::new(name).sleep()).await?;
        assert_eq!(container.exec(["hostname"]).await?.stdout(), "a-name-of-its-own\n");
        assert_eq!(cat(&container, "/etc/hostname").await?, "a-name-of-its-own\n");
        assert_eq!(cat(&container, "/proc/sys/kernel/hostname").await?, "a-name-of-its-own\n");
        assert_eq!(container.sh("echo $HOSTNAME").await?.stdout(), "a-name-of-its-own\n");
    }
    assert_ne!(nix::unistd::gethostname()?, "a-name-of-its-own");
    Ok(())
}

async fn hosts(case: &Case) -> Result<()> {
    let container = case.pod().await?.run(ContainerSpec::new("c").sleep()).await?;
    let hosts = cat(&container, "/etc/hosts").await?;
    assert!(hosts.lines().any(|line| line.starts_with("127.0.0.1") && line.contains("localhost")), "{hosts}");
    Ok(())
}

async fn resolv_conf_as_asked_for(case: &Case) -> Result<()> {
    let spec = case.spec().dns(&["10.1.2.3", "10.1.2.4"], &["a.example", "b.example"], &["ndots:5", "timeout:1"]);
    let container = case.run(spec).await?.run(ContainerSpec::new("c").sleep()).await?;
    let conf = cat(&container, "/etc/resolv.conf").await?;
    let mut lines: Vec<&str> = conf.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        ["nameserver 10.1.2.3", "nameserver 10.1.2.4", "options ndots:5 timeout:1", "search a.example b.example"]
    );
    Ok(())
}

async fn resolv_conf_of_the_node(case: &Case) -> Result<()> {
    let container = case.pod().await?.run(ContainerSpec::new("c").sleep()).await?;
    assert_eq!(cat(&container, "/etc/resolv.conf").await?, std::fs::read_to_string("/etc/resolv.conf")?);
    Ok(())
}

async fn the_files_are_the_pods_and_follow_the_rootfs(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let one = pod.run(ContainerSpec::new("one").sleep()).await?;
    let two = pod.run(ContainerSpec::new("two").sleep()).await?;
    let readonly = pod.run(ContainerSpec::new("readonly").sleep().readonly_rootfs()).await?;
    for file in ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"] {
        assert_eq!(one.sh(&format!("echo '# a mark' >>{file}")).await?.exit_code, 0, "{file}");
        for other in [&two, &readonly] {
            assert!(cat(other, file).await?.ends_with("# a mark\n"), "{file}");
        }
        assert_ne!(readonly.sh(&format!("echo more >>{file}")).await?.exit_code, 0, "{file}");
    }
    // A container that comes later finds them as they are.
    let late = pod.run(ContainerSpec::new("late").sleep()).await?;
    assert!(cat(&late, "/etc/hosts").await?.ends_with("# a mark\n"));
    assert!(!std::fs::read_to_string("/etc/hosts")?.contains("# a mark"));
    assert!(!std::fs::read_to_string("/etc/resolv.conf")?.contains("# a mark"));
    Ok(())
}

async fn mounts_of_a_containers_own_come_first(case: &Case) -> Result<()> {
    // As kubelet does with /etc/hosts.
    let file = case.dir().join("hosts");
    std::fs::write(&file, "127.0.0.1 kubelet-managed\n")?;
    let shm = case.dir().join("shm");
    std::fs::create_dir(&shm)?;
    std::fs::write(shm.join("mine"), "mine")?;
    let pod = case.pod().await?;
    let spec = ContainerSpec::new("c").sleep().mount(&file, "/etc/hosts", false).mount(&shm, "/dev/shm", false);
    let container = pod.run(spec).await?;
    assert_eq!(cat(&container, "/etc/hosts").await?, "127.0.0.1 kubelet-managed\n");
    assert_eq!(cat(&container, "/dev/shm/mine").await?, "mine");
    let other = pod.run(ContainerSpec::new("other").sleep()).await?;
    assert!(!cat(&other, "/etc/hosts").await?.contains("kubelet-managed"));
    Ok(())
}

async fn shared_memory_is_the_pods(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let one = pod.run(ContainerSpec::new("one").sleep()).await?;
    let two = pod.run(ContainerSpec::new("two").sleep().user(1000, Some(1000))).await?;
    assert_eq!(one.sh("echo shared >/dev/shm/x").await?.exit_code, 0);
    assert_eq!(cat(&two, "/dev/shm/x").await?, "shared\n");
    // As any user may use it.
    assert_eq!(two.sh("echo mine >/dev/shm/y").await?.exit_code, 0);
    assert_eq!(two.sh("df -k /dev/shm | awk 'END{print $2}'; stat -c %a /dev/shm").await?.stdout(), "65536\n1777\n");
    if case.is_ours() {
        let options = two.sh("grep ' /dev/shm ' /proc/mounts").await?.stdout();
        assert!(["rw", "nosuid", "nodev", "noexec"].iter().all(|option| options.contains(option)), "{options}");
    }
    let full = one.sh("dd if=/dev/zero of=/dev/shm/big bs=1M count=70; rm -f /dev/shm/big").await?;
    assert!(full.stderr().contains("No space left"), "{full:?}");
    // It outlives the containers, not the pod.
    one.stop(0).await?;
    one.remove().await?;
    let three = pod.run(ContainerSpec::new("three").sleep()).await?;
    assert_eq!(cat(&three, "/dev/shm/x").await?, "shared\n");
    let other = case.sleeper().await?;
    assert_ne!(other.exec(["test", "-e", "/dev/shm/x"]).await?.exit_code, 0);
    Ok(())
}

async fn sysctls_as_asked_for(case: &Case) -> Result<()> {
    let spec = case
        .spec()
        .sysctl("net.ipv4.ip_local_port_range", "20000 30000")
        .sysctl("kernel.shm_rmid_forced", "1")
        .sysctl("kernel.msgmax", "9000")
        .sysctl("net.ipv4.ip_unprivileged_port_start", "500");
    let pod = case.run(spec).await?;
    for name in ["one", "two"] {
        let container = pod.run(ContainerSpec::new(name).sleep()).await?;
        assert_eq!(cat(&container, "/proc/sys/net/ipv4/ip_local_port_range").await?, "20000\t30000\n");
        assert_eq!(cat(&container, "/proc/sys/kernel/shm_rmid_forced").await?, "1\n");
        assert_eq!(cat(&container, "/proc/sys/kernel/msgmax").await?, "9000\n");
        // What is asked for counts more than what is given by default.
        assert_eq!(cat(&container, "/proc/sys/net/ipv4/ip_unprivileged_port_start").await?, "500\n");
    }
    assert_ne!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?, "20000\t30000\n");
    assert_ne!(std::fs::read_to_string("/proc/sys/kernel/msgmax")?, "9000\n");
    Ok(())
}

async fn unprivileged_ports_and_ping(case: &Case) -> Result<()> {
    let container =
        case.pod().await?.run(ContainerSpec::new("c").sleep().user(1000, Some(1000)).drop_capabilities(&["ALL"])).await?;
    assert_eq!(cat(&container, "/proc/sys/net/ipv4/ip_unprivileged_port_start").await?, "0\n");
    assert_eq!(cat(&container, "/proc/sys/net/ipv4/ping_group_range").await?, "0\t2147483647\n");
    let listens = container.sh("nc -l -p 80 </dev/null >/dev/null 2>/tmp/why & sleep 0.1; kill $!; cat /tmp/why").await?;
    assert!(!listens.stdout().contains("denied"), "{listens:?}");
    Ok(())
}

async fn the_nodes_sysctls_are_left_alone(case: &Case) -> Result<()> {
    let node = |path: &str| std::fs::read_to_string(path);
    let paths = ["/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/sys/net/ipv4/ping_group_range"];
    let before = paths.map(|path| node(path).unwrap_or_default());
    let container = case.sleeper().await?;
    for (path, before) in paths.iter().zip(&before) {
        assert_eq!(&cat(&container, path).await?, before);
        assert_eq!(&node(path)?, before);
    }
    Ok(())
}

async fn a_sysctl_that_does_not_exist(case: &Case) -> Result<()> {
    refused(case.run(case.spec().sysctl("net.ipv4.no_such_thing", "1")).await, &["no_such_thing"])?;
    refused(case.run(case.spec().sysctl("kernel.shm_rmid_forced", "many")).await, &["shm_rmid_forced"])?;
    // A pod without such wishes runs, and the name of those that failed is free.
    assert_eq!(case.pod().await?.state().await?, PodSandboxState::SandboxReady);
    Ok(())
}
