//! What pods can have of cgroup v2, with systemd's driver; and that nothing of it stays.

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::{HugepageLimit, LinuxContainerResources};
use kuasar_tests::{Container, ContainerSpec, PodSpec, wait};
use serde_json::Value;

use crate::pods::{WAITS, group, scope_of};
use crate::suite::{Entry, HANDLER, SOON, Site, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![
        limits_of_every_controller,
        statistics_with_pressure,
        out_of_memory,
        processes_are_limited,
        pause,
        a_limit_that_the_kernel_does_not_know,
        groups_that_nobody_has_made_before,
    ]
}

async fn files(site: &Site, container: &Container, names: &[&str]) -> Result<Vec<String>> {
    let dir = format!("/sys/fs/cgroup{}", group(site, container).await?);
    let text = site.sh(&format!("cd {dir} && cat {}", names.join(" "))).await?;
    Ok(text.lines().map(str::to_owned).collect())
}

async fn limits_of_every_controller(site: &mut Site) -> Result<()> {
    let disk = site.sh("lsblk -nrdo MAJ:MIN /dev/vda 2>/dev/null || tr '\\n' ' ' </sys/block/vda/dev").await?;
    let disk = disk.trim();
    let pod = site.pod(PodSpec::new("pod").host_network(), &[]).await?;
    let mut spec = ContainerSpec::new("c").sh(WAITS).memory_limit(64 << 20);
    let resources = spec.resources();
    resources.memory_swap_limit_in_bytes = 96 << 20;
    resources.cpuset_cpus = "0".to_owned();
    resources.hugepage_limits = vec![HugepageLimit { page_size: "2MB".to_owned(), limit: 4 << 20 }];
    resources.unified = [
        ("memory.high", (48 << 20).to_string()),
        ("memory.oom.group", "1".to_owned()),
        ("io.max", format!("{disk} rbps=1048576")),
        ("pids.max", "77".to_owned()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into();
    let container = pod.run(spec).await?;
    let names = [
        "memory.max",
        "memory.high",
        "memory.swap.max",
        "memory.oom.group",
        "cpuset.cpus",
        "pids.max",
        "hugetlb.2MB.max",
        "io.max",
    ];
    let found = files(site, &container, &names).await?;
    let io = format!("{disk} rbps=1048576 wbps=max riops=max wiops=max");
    let expected = ["67108864", "50331648", "33554432", "1", "0", "77", "4194304", &io];
    ensure!(found == expected, "{names:?} are {found:?}");
    let affinity = container.sh("grep Cpus_allowed_list /proc/self/status").await?.stdout();
    ensure!(affinity.ends_with("\t0\n"), "an exec may run on {affinity:?}");
    let scope = scope_of(&container);
    let known = (site.show(&scope, "AllowedCPUs").await?, site.show(&scope, "MemorySwapMax").await?);
    ensure!(known == ("0".to_owned(), (32 << 20).to_string()), "systemd has {known:?}");
    let resources = LinuxContainerResources {
        memory_limit_in_bytes: 80 << 20,
        memory_swap_limit_in_bytes: 80 << 20,
        cpuset_cpus: "1".to_owned(),
        hugepage_limits: vec![HugepageLimit { page_size: "2MB".to_owned(), limit: 2 << 20 }],
        ..Default::default()
    };
    container.update(resources).await.context("update")?;
    // systemd writes what it knows.
    site.sh("systemctl daemon-reload").await?;
    let names = ["memory.max", "memory.swap.max", "cpuset.cpus"];
    let found = files(site, &container, &names).await?;
    ensure!(found == ["83886080", "0", "1"], "after the update {names:?} are {found:?}");
    Ok(())
}

/// What crictl shows in the node: it knows of pressure, which this client does not.
async fn statistics(site: &Site, arguments: &str) -> Result<Value> {
    let text = site.sh(&format!("crictl {arguments} -o json")).await?;
    let all: Value = serde_json::from_str(&text).with_context(|| format!("crictl printed {text}"))?;
    Ok(all["stats"][0].clone())
}

/// A number: JSON of protobuf has those of 64 bits as text.
fn number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

async fn statistics_with_pressure(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod"), &[]).await?;
    // Two that want more than they may have wait for each other.
    let spin = "while :; do :; done & while :; do :; done & ";
    let container = pod.run(ContainerSpec::new("c").cpu_limit(20_000, 100_000).sh(&format!("{spin}{WAITS}"))).await?;
    let arguments = format!("stats --id {}", container.id);
    let (of_container, of_pod) = wait::until("the processor's pressure", SOON, || async {
        let of_container = statistics(site, &arguments).await?;
        let of_pod = statistics(site, &format!("statsp --id {}", pod.id)).await?["linux"].clone();
        let has_waited = |stats: &Value| number(&stats["cpu"]["psi"]["Some"]["Total"]).is_some_and(|total| total > 0);
        Ok((has_waited(&of_container) && has_waited(&of_pod)).then_some((of_container, of_pod)))
    })
    .await?;
    // containerd has none of a pod's disks.
    for (stats, resources) in [(&of_container, &["cpu", "memory", "io"][..]), (&of_pod, &["cpu", "memory"])] {
        for resource in resources {
            for share in ["Some", "Full"] {
                let data = &stats[resource]["psi"][share];
                ensure!(number(&data["Total"]).is_some() && data["Avg10"].is_number(), "no {share} of {resource}: {stats}");
            }
        }
        ensure!(number(&stats["cpu"]["usageCoreNanoSeconds"]["value"]).is_some_and(|used| used > 0), "no use: {stats}");
    }
    // Of the kernel's own, which go on.
    let counted = files(site, &container, &["memory.current", "pids.current"]).await?;
    let told = number(&of_container["memory"]["usageBytes"]["value"]).context("no memory")?;
    ensure!(told > 0 && told < 16 << 20, "memory is {told}, the kernel has {counted:?}");
    ensure!(number(&of_pod["process"]["processCount"]["value"]).is_some_and(|count| count >= 3), "processes: {of_pod}");
    ensure!(of_pod["network"]["defaultInterface"]["name"] == "eth0", "network: {of_pod}");
    Ok(())
}

/// Grows until it is killed, as a child of what waits.
const GROWS: &str = "sh -c 'tail /dev/zero'; echo child $?; sleep 100";

async fn out_of_memory(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod").host_network(), &[]).await?;
    let limited = |name: &str| ContainerSpec::new(name).memory_limit(24 << 20);
    // Process 1.
    let first = pod.run(limited("first").sh("exec tail /dev/zero")).await?;
    let status = first.wait_exit().await?;
    ensure!((status.exit_code, status.reason.as_str()) == (137, "OOMKilled"), "process 1: {status:?}");
    // A child: the rest goes on.
    let child = pod.run(limited("child").sh(GROWS)).await?;
    wait::until("the child to be killed", SOON, || async {
        Ok(site.log(&child).await?.iter().any(|line| line.text == "child 137").then_some(()))
    })
    .await?;
    let events = files(site, &child, &["memory.events"]).await?;
    ensure!(events.contains(&"oom_kill 1".to_owned()) && events.contains(&"oom_group_kill 0".to_owned()), "{events:?}");
    // A child again, where the group goes together, as kubelet has it.
    let mut spec = limited("group").sh(GROWS);
    spec.resources().unified = [("memory.oom.group".to_owned(), "1".to_owned())].into();
    let together = pod.run(spec).await?;
    let status = together.wait_exit().await?;
    ensure!((status.exit_code, status.reason.as_str()) == (137, "OOMKilled"), "the group: {status:?}");
    let log = site.log(&together).await?;
    ensure!(log.is_empty(), "the group's first process lived on: {log:?}");
    Ok(())
}

async fn processes_are_limited(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod").host_network(), &[("TasksMax", 12)]).await?;
    let container = pod.run(ContainerSpec::new("c").sh(WAITS)).await?;
    // By the pod's slice, as kubelet's podPidsLimit.
    let ran = container.sh("for i in 1 2 3 4 5 6 7 8 9 10 11 12 13; do sleep 5 & done; wait").await;
    let said = match ran {
        Ok(ran) => format!("{ran:?} {}", ran.stderr()),
        Err(error) => error.to_string(),
    };
    ensure!(said.contains("fork"), "13 processes were let: {said}");
    let slice = site.sh(&format!("cat /sys/fs/cgroup{}/../pids.events", group(site, &container).await?)).await?;
    ensure!(slice.lines().any(|line| line.starts_with("max ") && line != "max 0"), "the slice has counted {slice:?}");
    Ok(())
}

async fn pause(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod").host_network(), &[]).await?;
    let container = pod.run(ContainerSpec::new("c").sh("count 20 & trap 'exit 7' TERM; wait")).await?;
    let ctr = |what: &str| format!("ctr -n k8s.io tasks {what} {}", container.id);
    site.sh(&ctr("pause")).await?;
    ensure!(files(site, &container, &["cgroup.freeze"]).await? == ["1"], "it is not frozen");
    let listed = site.sh(&format!("ctr -n k8s.io tasks ls | grep {}", container.id)).await?;
    ensure!(listed.contains("PAUSED"), "containerd lists {listed}");
    let before = site.log(&container).await?.len();
    // The daemon that comes next knows, too.
    site.sh("kill -9 $(pgrep -x -P $(systemctl show --value -p MainPID kuasard) kuasard)").await?;
    let listed = site.sh(&format!("ctr -n k8s.io tasks ls | grep {}", container.id)).await?;
    ensure!(listed.contains("PAUSED"), "after the worker's death containerd lists {listed}");
    let after = site.log(&container).await?.len();
    // What was in the pipe.
    ensure!(after - before < 5, "it printed {} lines", after - before);
    site.sh(&ctr("resume")).await?;
    wait::until("more lines", SOON, || async { Ok((site.log(&container).await?.len() > after + 10).then_some(())) }).await?;
    container.stop(20).await?;
    ensure!(container.wait_exit().await?.exit_code == 7, "it was not ended by SIGTERM");
    Ok(())
}

async fn a_limit_that_the_kernel_does_not_know(site: &mut Site) -> Result<()> {
    let pod = site.pod(PodSpec::new("pod").host_network(), &[]).await?;
    let mut spec = ContainerSpec::new("c").sh(WAITS);
    spec.resources().unified = [("nonsense.max".to_owned(), "1".to_owned())].into();
    let container = pod.create(spec).await?;
    let error = container.start().await.err().context("it was started")?;
    ensure!(error.message().contains("nonsense"), "the error does not name it: {error}");
    container.remove().await?;
    let left = site.sh(&format!("systemctl list-units --all --plain --no-legend '*{}*'", container.id)).await?;
    ensure!(left.is_empty(), "left behind: {left}");
    // Others are not affected.
    let ran = pod.run(ContainerSpec::new("c").sh(WAITS)).await?.exec(["echo", "ok"]).await?;
    ensure!(ran.exit_code == 0, "exec: {ran:?}");
    Ok(())
}

/// A pod below groups that are neither kubelet's nor systemd's. Those that were made for it go with it.
async fn groups_that_nobody_has_made_before(site: &mut Site) -> Result<()> {
    site.sh("mkdir -p /sys/fs/cgroup/theirs").await?;
    for handler in [HANDLER, "kuasar-crun"] {
        let mut pods = Vec::new();
        for name in ["one", "two"] {
            let mut spec = PodSpec::new(name).host_network().shared_pid().handler(handler);
            spec.linux().cgroup_parent = format!("/theirs/ours/{name}");
            spec.config.log_directory = format!("/var/log/pods/{name}");
            let pod = site.cri.run_pod(spec).await?;
            let made = format!("test -d /sys/fs/cgroup/theirs/ours/{name}/kuasar-init-{}", pod.id);
            wait::until("its group", SOON, || async { Ok((site.node.script(&made).run().await?.code == 0).then_some(())) })
                .await?;
            pod.run(ContainerSpec::new("c").sh(WAITS)).await?;
            pods.push(pod);
        }
        pods[0].remove_all().await?;
        let left = site.sh("ls -d /sys/fs/cgroup/theirs/ours /sys/fs/cgroup/theirs/ours/*/").await?;
        ensure!(left == "/sys/fs/cgroup/theirs/ours\n/sys/fs/cgroup/theirs/ours/two/", "{handler}: groups are {left}");
        pods[1].remove_all().await?;
        let left = site.sh("find /sys/fs/cgroup/theirs -type d").await?;
        ensure!(left == "/sys/fs/cgroup/theirs", "{handler}: groups left are {left}");
    }
    site.sh("rmdir /sys/fs/cgroup/theirs").await?;
    Ok(())
}
