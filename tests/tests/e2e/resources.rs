//! Limits, how they change, what is used, and what happens beyond them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use futures::future::join_all;
use kuasar_tests::cri::k8s_cri::v1::{
    ContainerState, LinuxContainerResources, ListContainerStatsRequest, ListPodSandboxMetricsRequest,
    ListPodSandboxStatsRequest, PodSandboxStatsFilter,
};
use kuasar_tests::{Container, ContainerSpec};

use tonic::Code;

use crate::suite::{Case, Entry, cases, eventually, refused};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Handlers Shared:
        limits_are_set,
        limits_change,
        limits_change_beside_devices,
        a_quota_that_limits_nothing,
        everything_of_a_pod_is_below_its_cgroup,
        use_is_told,
        out_of_memory,
        many_out_of_memory_at_once,
        a_child_out_of_memory,
        limits_that_cannot_be,
        paused_and_resumed,
        a_pods_resources_change,
        a_machine_grows_with_its_pod,
        metrics_are_listed,
    ];
    cases.extend(cases![Ours Shared: a_pod_without_a_group_is_the_sum_of_its_containers]);
    cases
}

/// The cgroup of a process below one controller, on the node.
fn cgroup(pid: i32, controller: &str) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let mut unified = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let path = path.trim_start_matches('/');
        if controllers.split(',').any(|name| name == controller) {
            return Ok(Path::new("/sys/fs/cgroup").join(controller).join(path));
        }
        if controllers.is_empty() {
            unified = Some(Path::new("/sys/fs/cgroup").join(path));
        }
    }
    unified.with_context(|| format!("process {pid} has no cgroup for {controller}"))
}

/// A setting of a container's cgroup: by its file's name in version 1, or in version 2.
fn setting(pid: i32, controller: &str, v1: &str, v2: &str) -> Result<String> {
    let dir = cgroup(pid, controller)?;
    let file = if dir.starts_with(Path::new("/sys/fs/cgroup").join(controller)) { v1 } else { v2 };
    let path = dir.join(file);
    Ok(fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?.trim().to_owned())
}

fn memory_limit(pid: i32) -> Result<String> {
    setting(pid, "memory", "memory.limit_in_bytes", "memory.max")
}

/// Quota and period in microseconds.
fn cpu_limit(pid: i32) -> Result<String> {
    let quota = setting(pid, "cpu", "cpu.cfs_quota_us", "cpu.max")?;
    if quota.contains(' ') {
        return Ok(quota);
    }
    Ok(format!("{quota} {}", setting(pid, "cpu", "cpu.cfs_period_us", "cpu.max")?))
}

const MIB: i64 = 1 << 20;

async fn limits_are_set(case: &Case) -> Result<()> {
    let mut spec = ContainerSpec::new("c").sleep().memory_limit(64 * MIB).cpu_limit(50_000, 100_000).cpu_shares(512);
    spec.resources().cpuset_cpus = "0".to_owned();
    let container = case.container(spec).await?;
    let pid = container.pid().await?;
    assert_eq!(memory_limit(pid)?, (64 * MIB).to_string());
    assert_eq!(cpu_limit(pid)?, "50000 100000");
    assert_eq!(setting(pid, "cpuset", "cpuset.cpus", "cpuset.cpus")?, "0");
    let shares = setting(pid, "cpu", "cpu.shares", "cpu.weight")?;
    assert!(["512", "20", "59"].contains(&shares.as_str()), "{shares}");
    assert_eq!(container.sh("grep Cpus_allowed_list /proc/self/status").await?.stdout(), "Cpus_allowed_list:\t0\n");
    let status = container.status().await?;
    let linux = status.resources.and_then(|resources| resources.linux).unwrap_or_default();
    assert_eq!((linux.memory_limit_in_bytes, linux.cpu_quota), (64 * MIB, 50_000));
    Ok(())
}

/// Devices are there all the time.
async fn limits_change_beside_devices(case: &Case) -> Result<()> {
    let script = "while [ ! -e /stop ]; do true </dev/null || echo lost; true </dev/urandom || echo lost; done; echo stopped; exec sleep 1000";
    let container = case.container(ContainerSpec::new("c").sh(script)).await?;
    for round in 0..20 {
        let resources = LinuxContainerResources { memory_limit_in_bytes: (64 + round) * MIB, ..Default::default() };
        container.update(resources).await?;
    }
    container.sh("touch /stop").await?;
    container.wait_log("stopped").await?;
    let lost = container.logs()?.iter().filter(|line| line.text.contains("lost")).count();
    assert_eq!(lost, 0, "a device could not be opened");
    Ok(())
}

/// As kubelet sends it for containers with processors of their own.
async fn a_quota_that_limits_nothing(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").sleep().cpu_limit(-1, 100_000)).await?;
    if !case.is_machine() {
        let limit = cpu_limit(container.pid().await?)?;
        ensure!(limit == "-1 100000" || limit == "max 100000", "{limit}");
    }
    let unlimited = LinuxContainerResources { cpu_quota: -1, cpu_period: 100_000, ..Default::default() };
    container.update(unlimited).await?;
    Ok(())
}

async fn limits_change(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").sleep().memory_limit(64 * MIB).cpu_limit(50_000, 100_000)).await?;
    let pid = container.pid().await?;
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 128 * MIB,
        cpu_quota: 20_000,
        cpu_period: 100_000,
        cpuset_cpus: "0".to_owned(),
        ..Default::default()
    };
    container.update(resources).await?;
    assert_eq!(memory_limit(pid)?, (128 * MIB).to_string());
    assert_eq!(cpu_limit(pid)?, "20000 100000");
    assert_eq!(setting(pid, "cpuset", "cpuset.cpus", "cpuset.cpus")?, "0");
    let linux = container.status().await?.resources.and_then(|resources| resources.linux).unwrap_or_default();
    assert_eq!(linux.memory_limit_in_bytes, 128 * MIB);
    // Only what is named changes.
    container.update(LinuxContainerResources { cpu_quota: 30_000, cpu_period: 100_000, ..Default::default() }).await?;
    assert_eq!((memory_limit(pid)?, cpu_limit(pid)?), ((128 * MIB).to_string(), "30000 100000".to_owned()));
    assert_eq!(container.sh("echo on").await?.stdout(), "on\n");
    Ok(())
}

async fn limits_that_cannot_be(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").sleep().memory_limit(64 * MIB)).await?;
    let impossible = LinuxContainerResources { cpuset_cpus: "4000".to_owned(), ..Default::default() };
    refused(container.update(impossible).await, &["cpuset"])?;
    assert_eq!(memory_limit(container.pid().await?)?, (64 * MIB).to_string());
    assert_eq!(container.sh("echo on").await?.stdout(), "on\n");
    let mut spec = ContainerSpec::new("never").sleep();
    spec.resources().cpuset_cpus = "4000".to_owned();
    let never = case.quick_pod().await?.create(spec).await?;
    refused(never.start().await, &["cpuset"])?;
    Ok(())
}

async fn everything_of_a_pod_is_below_its_cgroup(case: &Case) -> Result<()> {
    let parent = case.node.cgroup_parent();
    let pod = case.run(case.spec().shared_pid()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let exec = {
        let container = container.clone();
        tokio::spawn(async move { container.sh("touch /up; exec sleep 4321").await })
    };
    eventually("the exec to run", || async { Ok(container.exec(["test", "-e", "/up"]).await?.exit_code == 0) }).await?;
    let mut pids = vec![container.pid().await?, crate::pod::init_of(&container).await?];
    let procs = cgroup(pids[0], "memory")?.join("cgroup.procs");
    pids.extend(fs::read_to_string(&procs)?.lines().filter_map(|line| line.parse::<i32>().ok()));
    for pid in pids {
        for controller in ["memory", "cpu", "pids"] {
            let path = cgroup(pid, controller)?.display().to_string();
            ensure!(path.contains(&format!("{parent}/")), "process {pid}: {path} is not below {parent}");
        }
    }
    // Each container has one of its own, named after it.
    let own = cgroup(container.pid().await?, "memory")?.display().to_string();
    assert!(own.contains(&container.id), "{own}");
    container.stop(0).await?;
    exec.await??;
    Ok(())
}

async fn use_is_told(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    // Something that stays in memory, and something that takes time.
    let script = "head -c 8000000 /dev/zero >/dev/shm/held; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; exec sleep 1000";
    let container = pod.run(ContainerSpec::new("c").sh(script)).await?;
    eventually("processor time and memory to show", || async {
        let stats = container.stats().await?;
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |value| value.value);
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |value| value.value);
        Ok(cpu > 1_000_000 && memory > 6_000_000)
    })
    .await?;
    let stats = container.stats().await?;
    assert_eq!(stats.attributes.unwrap_or_default().id, container.id);
    let request = ListContainerStatsRequest { filter: None };
    let all = case.cri.runtime().list_container_stats(request).await?.into_inner().stats;
    assert!(all.iter().filter_map(|stats| stats.attributes.as_ref()).any(|attributes| attributes.id == container.id));
    let pod_stats = pod.stats().await?.linux.unwrap_or_default();
    assert_eq!(pod_stats.containers.len(), 1);
    let network = pod_stats.network.and_then(|network| network.default_interface).unwrap_or_default();
    assert_eq!(network.name, "eth0");
    // Of one that has ended there is nothing to tell, and that is no reason to tell nothing of the others.
    let other = pod.run(ContainerSpec::new("other").sleep()).await?;
    container.stop(0).await?;
    let pod_stats = pod.stats().await?.linux.unwrap_or_default();
    let ids: Vec<String> = pod_stats.containers.into_iter().filter_map(|stats| Some(stats.attributes?.id)).collect();
    assert!(ids.contains(&other.id), "{ids:?}");
    Ok(())
}

async fn out_of_memory(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").command(&["tail", "/dev/zero"]).memory_limit(16 * MIB)).await?;
    container.wait_exit().await?;
    let named = eventually("the reason", || async { Ok(container.status().await?.reason == "OOMKilled") }).await;
    let status = container.status().await?;
    named.with_context(|| format!("{status:?}"))?;
    assert_eq!(status.exit_code, 137);
    Ok(())
}

/// The more at once, the sooner an exit is seen before what the kernel says of its cause.
async fn many_out_of_memory_at_once(case: &Case) -> Result<()> {
    let count = if case.is_machine() { 3 } else { 10 };
    let pod = case.run(case.spec().quick()).await?;
    let names: Vec<String> = (0..count).map(|number| format!("c{number}")).collect();
    let run = |name: &String| {
        let spec = ContainerSpec::new(name).command(&["tail", "/dev/zero"]).memory_limit(16 * MIB);
        let pod = &pod;
        async move { pod.run(spec).await }
    };
    for container in join_all(names.iter().map(run)).await {
        let container = container?;
        assert_eq!(container.wait_exit().await?.exit_code, 137);
        let named = eventually("the reason", || async { Ok(container.status().await?.reason == "OOMKilled") }).await;
        let status = container.status().await?;
        named.with_context(|| format!("{status:?}"))?;
    }
    Ok(())
}

async fn a_child_out_of_memory(case: &Case) -> Result<()> {
    let container: Container = case.container(ContainerSpec::new("c").sleep().memory_limit(24 * MIB)).await?;
    let ran = container.exec(["tail", "/dev/zero"]).await?;
    assert_eq!(ran.exit_code, 137, "{ran:?}");
    assert_eq!(container.state().await?, ContainerState::ContainerRunning);
    assert_eq!(container.sh("echo on").await?.stdout(), "on\n");
    Ok(())
}

async fn a_pods_resources_change(case: &Case) -> Result<()> {
    if case.node.containerd.version() < (2, 3, 0) {
        return case.skip("UpdatePodSandboxResources needs containerd 2.3");
    }
    let pod =
        case.run(case.spec().quick().resources(LinuxContainerResources { cpu_shares: 1024, ..Default::default() })).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let resources = LinuxContainerResources { cpu_shares: 512, memory_limit_in_bytes: 256 * MIB, ..Default::default() };
    pod.update(resources, None).await?;
    // The pod's cgroup is kubelet's; a container keeps what is its own.
    assert_eq!(container.sh("echo on").await?.stdout(), "on\n");
    Ok(())
}

async fn a_machine_grows_with_its_pod(case: &Case) -> Result<()> {
    if !case.is_machine() {
        return case.skip("only a virtual machine has a size");
    }
    if case.node.containerd.version() < (2, 3, 0) {
        return case.skip("UpdatePodSandboxResources needs containerd 2.3");
    }
    if std::thread::available_parallelism()?.get() < 2 {
        return case.skip("a node with one processor, so no machine can have two");
    }
    let limits = |cpus: i64, mib: i64| LinuxContainerResources {
        cpu_quota: cpus * 100_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    };
    let pod = case.run(case.spec().resources(limits(1, 192))).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let size = || async {
        let ran = container.sh("grep -c ^processor /proc/cpuinfo; awk '/^MemTotal/ { print $2 }' /proc/meminfo").await?;
        let mut numbers = ran.stdout().lines().map(str::parse::<i64>).collect::<Result<Vec<_>, _>>()?.into_iter();
        Ok::<_, anyhow::Error>((numbers.next().context("no processors")?, numbers.next().context("no memory")? >> 10))
    };
    let (cpus, before) = size().await?;
    ensure!(cpus == 1 && (192..192 + 3 + 80).contains(&before), "{cpus} processors, {before} MiB");
    pod.update(limits(2, 448), None).await?;
    let (cpus, after) = size().await?;
    // By little more than was asked for: what is beyond that is paid for by the pod's group on the node.
    ensure!(cpus == 2 && (before + 256..=before + 384).contains(&after), "{cpus} processors, {before} MiB, then {after} MiB");
    assert_eq!(container.exec(["nproc"]).await?.stdout(), "2\n", "both may be used");
    // Nor can containers without limits of their own have more than the pod, or the node would end all of it.
    let ran = container.exec(["dd", "if=/dev/zero", "of=/dev/null", "bs=540M", "count=1"]).await?;
    assert_eq!((ran.exit_code, container.sh("echo on").await?.stdout().as_str()), (137, "on\n"), "{ran:?}");
    // It never shrinks.
    pod.update(limits(1, 192), None).await?;
    assert_eq!(size().await?, (cpus, after));
    Ok(())
}

/// One that cannot be measured would hide all pods of the node.
async fn a_pod_without_a_group_is_the_sum_of_its_containers(case: &Case) -> Result<()> {
    if case.node.containerd.version() < (2, 4, 0) {
        return case.skip("before containerd 2.4 it measures pods itself");
    }
    let pod = case.run(case.spec().quick().cgroup_parent("/")).await?;
    let working_set = || async {
        let filter = PodSandboxStatsFilter { id: pod.id.clone(), ..Default::default() };
        let request = ListPodSandboxStatsRequest { filter: Some(filter) };
        let listed = case.cri.runtime().list_pod_sandbox_stats(request).await?.into_inner().stats;
        let stats = listed.into_iter().next().context("no statistics of the pod")?.linux.unwrap_or_default();
        Ok::<_, anyhow::Error>(stats.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |value| value.value))
    };
    // One without containers has statistics, too.
    working_set().await?;
    for name in ["a", "b"] {
        pod.run(ContainerSpec::new(name).sh("x=$(head -c 8000000 /dev/zero | tr '\\0' x); sleep 1000; echo $x")).await?;
    }
    eventually("the memory of both to show", || async { Ok(working_set().await? > 12_000_000) }).await
}

async fn metrics_are_listed(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let listed = case.cri.runtime().list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {}).await;
    let pods = match listed {
        Err(status) if status.code() == Code::Unimplemented => {
            return case.skip("ListPodSandboxMetrics needs a newer containerd");
        }
        listed => listed?.into_inner().pod_metrics,
    };
    let of_pod = pods.into_iter().find(|metrics| metrics.pod_sandbox_id == pod.id).context("no metrics of the pod")?;
    let of_container = of_pod.container_metrics.into_iter().find(|metrics| metrics.container_id == container.id);
    let metrics = of_container.context("no metrics of the container")?.metrics;
    assert!(metrics.iter().any(|metric| metric.name == "container_memory_working_set_bytes"), "{metrics:?}");
    Ok(())
}

async fn paused_and_resumed(case: &Case) -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done";
    let container = case.container(ContainerSpec::new("c").sh(script)).await?;
    container.wait_log("5").await?;
    // CRI has no words for it.
    let ctr = &case.node.containerd;
    ctr.ctr(&["task", "pause", &container.id])?;
    let state = || {
        Ok::<_, anyhow::Error>(
            ctr.ctr(&["task", "ls"])?.lines().find(|line| line.contains(&container.id)).unwrap_or_default().to_owned(),
        )
    };
    assert!(state()?.contains("PAUSED"), "{}", state()?);
    // The pipe is emptied; then it stands still.
    eventually("the log to stand still", || async {
        let before = container.logs()?.len();
        tokio::time::sleep(std::time::Duration::from_millis(60)).await;
        Ok(container.logs()?.len() == before)
    })
    .await?;
    let lines = container.logs()?.len();
    ctr.ctr(&["task", "resume", &container.id])?;
    assert!(state()?.contains("RUNNING"), "{}", state()?);
    eventually("the log to go on", || async { Ok(container.logs()?.len() > lines) }).await?;
    // Stopped while paused it ends all the same.
    ctr.ctr(&["task", "pause", &container.id])?;
    container.remove().await?;
    Ok(())
}
