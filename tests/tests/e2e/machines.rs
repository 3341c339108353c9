//! What ends in a pod with a virtual machine, and when: the hypervisor, its helpers, the guest's kernel, the worker in the middle of a
//! start. Whatever it is, calls are answered in time and say why, and the pod can be stopped and removed.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use futures::future::try_join_all;
use kuasar_tests::cri::SOON;
use kuasar_tests::cri::k8s_cri::v1::{
    ContainerState, ContainerStatsFilter, LinuxContainerResources, ListContainerStatsRequest, PodSandboxState,
};
use kuasar_tests::kuasard::Killed;
use kuasar_tests::leak::census;
use kuasar_tests::{Container, ContainerSpec, Node, Pod, tools, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::kuasarctl::{report, said};
use crate::suite::{Case, Entry, Lone, cases, eventually, refused};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Machines Alone:
        starts_that_are_cut_off,
        starts_that_are_killed,
        kernels_that_do_not_get_far,
        a_killed_worker_and_connections_not_answered,
    ];
    cases.extend(cases![Machines Shared:
        a_guest_that_hangs,
        statistics_beside_stuck_guests,
        what_a_machine_cannot_do_without,
        a_guest_that_panics,
        machines_that_end_before_a_start,
        machines_that_end_during_a_stop,
        sizes_that_cannot_be,
        a_small_limit,
        containers_that_come_and_go,
    ]);
    cases
}

/// Programs of which each machine has one, as far as the node needs them.
const PROGRAMS: [&str; 3] = ["qemu-system-x86_64", "virtiofsd", "vhost-device-vsock"];

/// How long a call may take to say that its machine has ended.
const TOLD: Duration = Duration::from_secs(20);

/// How long a start may take: more than a guest may take to boot.
const BOOT: Duration = Duration::from_secs(90);

/// The processes of machines, whose control groups have `named` in their paths, by program.
fn processes(named: &str, program: &str) -> Result<Vec<i32>> {
    census::programs(named, program.as_ref())
}

/// Files that the pod's virtiofsd have open: one for each that the guest remembers.
fn remembered(pod: &Pod) -> Result<usize> {
    let pids = processes(&format!("kuasar-vm-{}", pod.id), "virtiofsd")?;
    pids.into_iter().map(|pid| Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())).sum()
}

/// A program of a pod's machine.
fn process(pod: &Pod, program: &str) -> Result<Option<i32>> {
    Ok(processes(&format!("kuasar-vm-{}", pod.id), program)?.first().copied())
}

fn send(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("send {signal} to {pid}"))
}

/// A call's answer, which comes in time.
async fn answer<T>(what: &str, limit: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<Result<T, Status>> {
    // Boxed, because a debug build lays all of them out side by side in the case's own frame.
    timeout(limit, Box::pin(call)).await.with_context(|| format!("{what} was not answered within {} s", limit.as_secs()))
}

/// A pod in a machine with a container that sleeps.
async fn pod_and_container(case: &Case) -> Result<(Pod, Container)> {
    let pod = case.pod().await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    Ok((pod, container))
}

/// What has to be true of a pod and its container once the machine has ended, for the reason that is given.
async fn has_ended(case: &Case, pod: &Pod, container: &Container, why: &str) -> Result<()> {
    let status = container.wait_exit().await?;
    assert_eq!(status.exit_code, 137, "{status:?}");
    ensure!(status.reason != "OOMKilled", "nothing ran out of memory: {status:?}");
    pod.wait_state(PodSandboxState::SandboxNotready).await?;
    let inspected: Value = serde_json::from_str(&said(&case.node, &["inspect", &pod.id])?)?;
    let ended = inspected["detail"]["ended"].as_str().with_context(|| format!("no reason in {inspected}"))?;
    ensure!(ended.starts_with(why), "{ended}");
    let created = answer("CreateContainer", TOLD, pod.create(ContainerSpec::new("late").sleep())).await?;
    refused(created, &["is not running"])?;
    ensure!(answer("ExecSync", TOLD, container.sh("true")).await?.is_err(), "an exec in a machine that has ended");
    answer("StopPodSandbox", TOLD, pod.stop()).await??;
    answer("RemoveContainer", TOLD, container.remove()).await??;
    answer("RemovePodSandbox", TOLD, pod.remove()).await??;
    Ok(())
}

async fn what_a_machine_cannot_do_without(case: &Case) -> Result<()> {
    let each = PROGRAMS.map(async |program| {
        let (pod, container) = pod_and_container(case).await?;
        let Some(pid) = process(&pod, program)? else {
            ensure!(program == "vhost-device-vsock", "the machine has no {program}");
            return Ok(());
        };
        let mut session = container.exec_session(&["sh", "-c", "echo on; sleep 1000"], false, false).await?;
        session.wait_for("on\n").await?;
        // There are two of them, by what they share.
        let line = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        send(pid, Signal::SIGKILL)?;
        let why = match program {
            "virtiofsd" if line.contains("/shared/roots") => {
                "virtiofsd-roots, which it cannot do without, ended with status 137"
            }
            "virtiofsd" => "virtiofsd-volumes, which it cannot do without, ended with status 137",
            "vhost-device-vsock" => "vsock, which it cannot do without, ended with status 137",
            _ => "its hypervisor ended with status 137",
        };
        // However it is told: the session ends.
        let _ = timeout(TOLD, session.wait()).await.context("the exec does not end")?;
        has_ended(case, &pod, &container, why).await.with_context(|| format!("after the end of {program}"))
    });
    try_join_all(each.map(Box::pin)).await.map(drop)
}

/// What a container has had is let go of, or a pod whose containers fail again and again would fill the node. Of each only the root
/// directory is remembered, until the guest wants the memory.
async fn containers_that_come_and_go(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let before = remembered(&pod)?;
    for gone in 1..=3 {
        let container = pod.run(ContainerSpec::new("c").sleep()).await?;
        assert_eq!(container.sh("ls -lR /bin /etc > /dev/null; echo looked").await?.stdout(), "looked\n");
        ensure!(remembered(&pod)? > before + gone, "the guest has opened no file");
        container.stop(0).await?;
        container.remove().await?;
        eventually("the guest to forget its container's files", async || Ok(remembered(&pod)? <= before + gone)).await?;
    }
    Ok(())
}

async fn a_guest_that_panics(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().privileged()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep().privileged()).await?;
    let ran = answer("ExecSync", TOLD, container.sh("echo c > /proc/sysrq-trigger")).await?;
    ensure!(ran.as_ref().map_or(true, |ran| ran.exit_code != 0), "the guest lives: {ran:?}");
    has_ended(case, &pod, &container, "its hypervisor ended: the guest's kernel panicked: sysrq triggered crash").await
}

async fn machines_that_end_before_a_start(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let container = pod.create(ContainerSpec::new("c").sleep()).await?;
    let pid = process(&pod, PROGRAMS[0])?.context("the machine has no QEMU")?;
    send(pid, Signal::SIGKILL)?;
    ensure!(answer("StartContainer", TOLD, container.start()).await?.is_err(), "a start in a machine that has ended");
    answer("RemoveContainer", TOLD, container.remove()).await??;
    pod.wait_state(PodSandboxState::SandboxNotready).await?;
    answer("RemovePodSandbox", TOLD, pod.remove_all()).await??;
    // And one that nobody has noticed yet.
    let pod = case.pod().await?;
    let pid = process(&pod, PROGRAMS[0])?.context("the machine has no QEMU")?;
    send(pid, Signal::SIGKILL)?;
    answer("the removal of a pod", TOLD, pod.remove_all()).await??;
    Ok(())
}

async fn machines_that_end_during_a_stop(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let container = pod.run(ContainerSpec::new("c").sh("trap 'echo asked' TERM; echo on; while :; do sleep 0.1; done")).await?;
    container.wait_log("on").await?;
    let pid = process(&pod, PROGRAMS[0])?.context("the machine has no QEMU")?;
    let stop = answer("StopContainer", SOON + TOLD, container.stop(SOON.as_secs().cast_signed()));
    let end = async {
        container.wait_log("asked").await?;
        send(pid, Signal::SIGKILL)
    };
    let (stopped, ended) = tokio::join!(stop, end);
    ended?;
    stopped??;
    has_ended(case, &pod, &container, "its hypervisor ended with status 137").await
}

/// Nothing runs in it any more, nor is anything answered, but it has not ended.
async fn a_guest_that_hangs(case: &Case) -> Result<()> {
    let (pod, container) = pod_and_container(case).await?;
    let pid = process(&pod, PROGRAMS[0])?.context("the machine has no QEMU")?;
    send(pid, Signal::SIGSTOP)?;
    // Both wait for the agent at the same time. The pod is stopped as kubelet does it, which ends a machine that does not answer.
    let exec = answer("ExecSync", Duration::from_secs(60), container.exec_timeout(["true"], 40));
    let stop = answer("StopPodSandbox", Duration::from_secs(60), pod.stop());
    let (exec, stopped) = tokio::join!(exec, stop);
    ensure!(exec?.is_err(), "an exec in a guest that hangs");
    stopped?.context("the stop of a pod whose guest hangs")?;
    let status = container.wait_exit().await?;
    assert_eq!((status.exit_code, status.state()), (137, ContainerState::ContainerExited));
    answer("RemovePodSandbox", TOLD, pod.remove()).await??;
    Ok(())
}

/// A small limit can be reached, and a container has of the guest what it would have of the node.
async fn a_small_limit(case: &Case) -> Result<()> {
    let limit = 64 << 20;
    let limits = LinuxContainerResources { memory_limit_in_bytes: limit, ..LinuxContainerResources::default() };
    let pod = case.run(case.spec().privileged().resources(limits)).await?;
    let spec = ContainerSpec::new("c").sleep().memory_limit(limit).add_capabilities(&["NET_ADMIN"]);
    let container = pod.run(spec).await?;
    let take =
        async |size: &str| container.exec(["dd", "if=/dev/zero", "of=/dev/null", &format!("bs={size}"), "count=1"]).await;
    let all = take("58M").await?;
    assert_eq!(all.exit_code, 0, "{all:?}");
    let more = take("72M").await?;
    assert_eq!((more.exit_code, container.sh("echo on").await?.stdout().as_str()), (137, "on\n"), "{more:?}");

    let own = container.sh("cat /sys/fs/cgroup/memory.max; grep ^0: /proc/self/cgroup").await?.stdout();
    assert_eq!(own, format!("{limit}\n0::/\n"));
    let limits = container.sh("grep -E 'Max (processes|pending)' /proc/self/limits | tr -s ' '").await?.stdout();
    assert_eq!(limits.matches("unlimited unlimited").count(), 2, "{limits}");

    // On the node there is the VM, not whatever has the guest's number there.
    let vmm = process(&pod, PROGRAMS[0])?.context("the machine has no QEMU")?;
    let pid = container.pid().await?;
    let tasks = case.node.containerd.ctr(&["task", "ls"])?;
    let listed = case.node.containerd.ctr(&["task", "ps", &container.id])?;
    ensure!(pid > 1 << 22, "{pid} may be a process of the node");
    ensure!([&tasks, &listed].iter().all(|list| list.contains(&pid.to_string())), "{pid} is not in {tasks} or {listed}");
    let listed = said(&case.node, &["ps"])?;
    ensure!(listed.contains(&format!("{vmm} (VM)")), "{listed}");

    let everything = pod.run(ContainerSpec::new("all").sleep().privileged()).await?;
    let opened = everything.sh("exec 3</dev/kmsg && mknod /dev/again c 10 229 && exec 3<>/dev/again").await?;
    assert_eq!(opened.exit_code, 0, "{opened:?}");
    // What the distribution's kernel has as modules, which nobody loads before they are wanted.
    if !container.sh("uname -r").await?.stdout().contains("cloud") {
        return Ok(());
    }
    let wanted = "ip link add d0 type dummy && ip link add link d0 name d0.5 type vlan id 5 && ip link add v0 type veth && \
                  ip link add w0 type wireguard && test -e /proc/net/ip_tables_names";
    let made = container.sh(wanted).await?;
    assert_eq!(made.exit_code, 0, "{made:?}");
    let opened = everything.sh("exec 3<>/dev/net/tun && exec 3<>/dev/loop-control && losetup -f").await?;
    assert_eq!((opened.exit_code, opened.stdout().as_str()), (0, "/dev/loop0\n"), "{opened:?}");
    Ok(())
}

async fn statistics_beside_stuck_guests(case: &Case) -> Result<()> {
    // kubelet asks for all containers of the node, and evicts by what it hears.
    const LIST: Duration = Duration::from_secs(5);
    let mut containers = Vec::new();
    let mut stuck = Vec::new();
    for number in 0..3 {
        let pod = case.pod().await?;
        let container = pod.run(ContainerSpec::new("c").sh("while :; do sleep 0.1; done")).await?;
        if number > 0 {
            stuck.push(process(&pod, PROGRAMS[0])?.context("the pod has no machine")?);
        }
        containers.push(container.id);
    }
    let list = || async {
        let begun = Instant::now();
        let mut numbers = BTreeMap::new();
        for id in &containers {
            let filter = ContainerStatsFilter { id: id.clone(), ..Default::default() };
            let request = ListContainerStatsRequest { filter: Some(filter) };
            let listed = case.cri.runtime().list_container_stats(request).await?.into_inner().stats;
            let used =
                listed.first().and_then(|stats| stats.cpu.as_ref()?.usage_core_nano_seconds.as_ref()).map(|used| used.value);
            numbers.insert(id.clone(), used.unwrap_or_default());
        }
        Ok::<_, Status>((begun.elapsed(), numbers))
    };
    let (_, well) = list().await?;
    for pid in &stuck {
        send(*pid, Signal::SIGSTOP)?;
    }
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        let (took, numbers) = list().await?;
        slowest = slowest.max(took);
        for (id, used) in &well {
            ensure!(numbers[id] >= *used, "the numbers of {id} are away while two guests are stuck");
        }
    }
    for pid in &stuck {
        send(*pid, Signal::SIGCONT)?;
    }
    ensure!(slowest < LIST, "with two stuck guests a list took {slowest:?}");
    eventually("new numbers of all", || async {
        let numbers = list().await?.1;
        Ok(well.iter().all(|(id, used)| numbers[id] > *used))
    })
    .await
}

async fn sizes_that_cannot_be(case: &Case) -> Result<()> {
    let prefix = "io.kuasar.vm.";
    for (name, value, words) in [
        ("memory_mib", "32", ["memory limit too small: the VM would have 32 MiB, and its kernel needs", "raise it"]),
        ("memory_mib", "99999999", ["99999999 MiB", "this node has"]),
        ("memory_mib", "much", ["memory_mib", "much"]),
        ("cpus", "0", ["io.kuasar.vm.cpus", "at least one processor"]),
        ("cpus", "4096", ["4096 processors", "this node has"]),
        ("kernel", "/boot/vmlinuz", ["io.kuasar.vm.kernel", "accepted: cpus, memory_mib"]),
    ] {
        let spec = case.spec().annotation(&format!("{prefix}{name}"), value);
        let error = refused(answer("RunPodSandbox", TOLD, case.run(spec)).await?, &words)?;
        assert_eq!(error.code(), Code::InvalidArgument, "{name}={value}: {error}");
    }
    Ok(())
}

/// What the paths of the control groups of a node's machines have in common.
fn machines_of(node: &Node) -> String {
    format!("{}/kuasar-vm-", node.cgroup_parent())
}

/// Waits for a program of any machine of the node.
async fn machine_process(node: &Node, program: &str) -> Result<i32> {
    let group = machines_of(node);
    wait::until(&format!("{program} to run"), SOON, || async { Ok(processes(&group, program)?.first().copied()) }).await
}

/// Waits until the guest of the node's only machine has said something.
async fn machine_talks(node: &Node, handler: &str) -> Result<()> {
    let dir = node.dir().join("run/kuasar/vmm").join(handler).join("k8s.io");
    eventually("the guest to say something", || async {
        // The pod's directory may come and go meanwhile.
        let mut pods = fs::read_dir(&dir).into_iter().flatten().flatten();
        let said = |pod: fs::DirEntry| fs::metadata(pod.path().join("console.log")).is_ok_and(|console| console.len() > 0);
        Ok(pods.any(said))
    })
    .await
}

/// Each of a machine's programs is killed as soon as it runs, and again when the guest boots.
async fn starts_that_are_killed(lone: &Lone) -> Result<()> {
    let node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    for program in PROGRAMS {
        if program == "vhost-device-vsock" && tools::vsock_device().is_err() {
            continue;
        }
        for when in ["at once", "while the guest boots"] {
            let start = answer("RunPodSandbox", BOOT, node.run_pod(lone.pod()));
            let end = async {
                let pid = machine_process(&node, program).await?;
                if when != "at once" {
                    machine_talks(&node, &lone.handler).await?;
                }
                send(pid, Signal::SIGKILL)
            };
            let (started, ended) = tokio::join!(start, end);
            ended?;
            let error = match started? {
                Err(error) => error,
                // The guest was up before the end was noticed.
                Ok(pod) if when != "at once" => {
                    pod.wait_state(PodSandboxState::SandboxNotready).await?;
                    pod.remove_all().await?;
                    node.assert_no_leak(&before).await.with_context(|| format!("{program} killed {when}"))?;
                    continue;
                }
                Ok(pod) => bail!("{program} was killed {when}, and pod {} runs", pod.id),
            };
            let words: &[&str] = match program {
                "virtiofsd" => &["virtiofsd"],
                "vhost-device-vsock" => &["vsock"],
                // On a busy node the guest boots before QEMU is seen to run.
                _ if when == "at once" => &[],
                _ => &["its hypervisor ended", "last on its console"],
            };
            let told = words.iter().chain(&["ended with status 137"]).all(|word| error.message().contains(word));
            ensure!(told, "{program} killed {when}: {error}");
            node.assert_no_leak(&before).await.with_context(|| format!("{program} killed {when}"))?;
        }
    }
    let pod = node.run_pod(lone.pod()).await?;
    assert_eq!(pod.run(ContainerSpec::new("c").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    pod.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

/// The worker dies at each stage of a start. Nobody waits for that machine any more, so the next worker ends it.
async fn starts_that_are_cut_off(lone: &Lone) -> Result<()> {
    let mut node = Node::start(lone.options().failpoints()).await?;
    let before = lone.baseline(&node).await?;
    // One pod stays: kuasard believes a containerd that has named a sandbox of its own.
    let standing = node.run_pod(lone.pod()).await?;
    let container = standing.run(ContainerSpec::new("c").sleep()).await?;
    let machine = process(&standing, PROGRAMS[0])?.context("the machine has no QEMU")?;
    for point in ["helpers-started", "pod-made", "guest-booted"] {
        let file = node.failpoints().join(point);
        let pid = node.kuasard.as_ref().context("the node has no kuasard")?.worker_pid().await?;
        fs::write(&file, "")?;
        let started = answer("RunPodSandbox", BOOT, node.run_pod(lone.pod())).await?;
        ensure!(!file.exists(), "the worker has not come to {point}");
        assert_eq!(refused(started, &[])?.code(), Code::Unavailable, "{point}");
        let killed = Killed { pid, at: std::time::Instant::now() };
        node.kuasard.as_mut().context("the node has no kuasard")?.wait_serving(killed).await?;
        // Nobody deletes what was not told to be there, and nobody has to.
        eventually("the half-made machine to be gone", || async {
            Ok(processes(&machines_of(&node), PROGRAMS[0])? == [machine])
        })
        .await
        .with_context(|| format!("after the worker's death at {point}"))?;
        assert_eq!(container.sh("exit 3").await?.exit_code, 3, "after {point}");
    }
    standing.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

/// The worker dies when its connections to the guest are not answered yet: the vsock device has not looked at them, or the guest has not.
/// vhost-device-vsock bears neither that they are closed then.
async fn a_killed_worker_and_connections_not_answered(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let pod = node.run_pod(lone.pod()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let Some(device) = process(&pod, "vhost-device-vsock")? else {
        return lone.skip("the kernel has vsock for guests: there is no device that could be slow");
    };
    let machines = node.dir().join("run/kuasar/vmm").join(&lone.handler).join(".machines").display().to_string();
    let connections = || {
        let sockets = fs::read_to_string("/proc/net/unix")?;
        let is_ours = |line: &&str| line.contains(&machines) && line.ends_with("/hybrid.sock");
        Ok::<_, anyhow::Error>(sockets.lines().filter(is_ours).count())
    };
    let hypervisor = process(&pod, PROGRAMS[0])?.context("the machine has no QEMU")?;
    for (slow, pid) in [("the device", device), ("the guest", hypervisor)] {
        let connected = connections()?;
        send(pid, Signal::SIGSTOP)?;
        let kill = async {
            eventually("an exec's streams to be asked for", async || Ok(connections()? > connected)).await?;
            let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
            let killed = kuasard.kill_worker().await?;
            send(pid, Signal::SIGCONT)?;
            kuasard.wait_serving(killed).await
        };
        let (ran, killed) = tokio::join!(container.sh("echo on; exit 3"), kill);
        killed.with_context(|| format!("{slow} is slow"))?;
        let ran = ran.with_context(|| format!("the exec in flight, {slow} is slow"))?;
        assert_eq!((ran.exit_code, ran.stdout().as_str()), (3, "on\n"), "{slow} is slow");
        eventually("the vsock device to have nothing to do", async || {
            let used = processor_time(device)?;
            tokio::time::sleep(Duration::from_millis(300)).await;
            Ok(processor_time(device)? == used)
        })
        .await
        .with_context(|| format!("{slow} was slow"))?;
    }
    pod.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

/// How long a process has had a processor, in ticks.
fn processor_time(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let (_, fields) = text.rsplit_once(')').with_context(|| format!("{path} is {text:?}"))?;
    // utime and stime: fields 14 and 15 of proc(5), of which this begins with the third.
    fields.split_whitespace().skip(11).take(2).map(|ticks| Ok(ticks.parse::<u64>()?)).sum()
}

/// Guests that do not come to their agent's first word: the report has what is on their consoles.
async fn kernels_that_do_not_get_far(lone: &Lone) -> Result<()> {
    let hypervisor = lone.handler.trim_start_matches("kuasar-").to_owned();
    let mut options = lone.options();
    let table = |changes: &[(&str, Value)]| {
        let mut table = tools::machine_table(&hypervisor);
        for (key, value) in changes {
            table[key] = value.clone();
        }
        table
    };
    options = options
        .sandboxer_table(
            "kuasar-without-init",
            table(&[("kernel_parameters", json!(["rdinit=/nonexistent", "init=/nonexistent"]))]),
        )
        .sandboxer_table("kuasar-hurried", table(&[("boot_limit_secs", 1.into()), ("annotations", json!(["memory_mib"]))]));
    let node = Node::start(options).await?;
    let before = lone.baseline(&node).await?;
    let failed = async |handler: &str, annotation: Option<(&str, &str)>, words: &[&str]| -> Result<()> {
        let mut spec = lone.pod().handler(handler);
        if let Some((key, value)) = annotation {
            spec = spec.annotation(key, value);
        }
        let error = refused(answer("RunPodSandbox", BOOT, node.run_pod(spec)).await?, words)?;
        let (_, failure) = report(&node, &error)?;
        let stage = failure["stages"].as_array().and_then(|stages| stages.last()).context("no stages in the report")?;
        assert_eq!((&stage["name"], &failure["log"]["program"]), (&"boot the guest".into(), &"the guest's console".into()));
        // The first pod of a sandboxer makes a directory for its namespace.
        let is_own = |line: &String| line.starts_with("state: ") && line.ends_with("/k8s.io");
        let what = format!("all of the pod to be gone, with {handler}");
        eventually(&what, || async { Ok(node.snapshot()?.beyond(&before).iter().all(is_own)) })
            .await
            .with_context(|| node.snapshot().map_or_else(|error| error.to_string(), |now| now.beyond(&before).join("\n")))
    };
    failed("kuasar-without-init", None, &["failed to bring the guest up", "the guest's kernel panicked", "init"]).await?;
    failed("kuasar-hurried", None, &["the boot of the guest up to its agent's first answer", "within 1 s"]).await?;
    let many = lone.pod().handler("kuasar-hurried").annotation("io.kuasar.vm.cpus", "1");
    let error = refused(node.run_pod(many).await, &["io.kuasar.vm.cpus", "it is not allowed here"])?;
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    node.stop().await
}
