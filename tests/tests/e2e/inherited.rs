//! What of the node and of the daemon reaches a container's processes: nothing but what is meant for them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::{Container, ContainerSpec, Node, tools};

use crate::suite::{Case, Entry, Lone, cases};

pub(crate) fn cases() -> Vec<Entry> {
    let mut all = cases![Handlers Shared:
        the_nodes_null_device_is_out_of_reach,
        streams_that_go_nowhere,
    ];
    all.extend(cases![Ours Alone: what_the_daemon_was_started_with]);
    all
}

const NULL: &str = "/dev/null";

async fn the_nodes_null_device_is_out_of_reach(case: &Case) -> Result<()> {
    if !case.is_ours() {
        return case.skip("containerd's own shim hands it to execs");
    }
    let before = fs::metadata(NULL)?;
    let pod = case.quick_pod().await?;
    let mut outcome = Ok(());
    for uid in [1000, 0] {
        let name = format!("user-{uid}");
        let container = pod.run(ContainerSpec::new(&name).sleep().user(uid, None)).await?;
        let script = "for n in 0 1 2; do chmod 0604 /proc/self/fd/$n; chown 7:7 /proc/self/fd/$n; done 2>/dev/null; id -u";
        let ran = container.sh(script).await?;
        // Also without any stream but the one that is asked for.
        let session = container.exec_session(&["sh", "-c", script], false, false).await?.finish().await?;
        let after = fs::metadata(NULL)?;
        if (before.uid(), before.gid(), before.mode()) != (after.uid(), after.gid(), after.mode()) {
            // The machine has to go on.
            chown(NULL, Some(before.uid()), Some(before.gid()))?;
            fs::set_permissions(NULL, fs::Permissions::from_mode(before.mode() & 0o7777))?;
            outcome = Err(anyhow::anyhow!("as user {uid}: owner {}, mode {:o}", after.uid(), after.mode()));
        }
        assert_eq!((ran.exit_code, ran.stdout(), session.1), (0, format!("{uid}\n"), format!("{uid}\n")));
    }
    outcome
}

/// As programs expect them of a null device.
async fn streams_that_go_nowhere(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    for uid in [1000, 0] {
        let name = format!("user-{uid}");
        let container = pod.run(ContainerSpec::new(&name).sleep().user(uid, None)).await?;
        let script = "cat; cat /dev/stdin; cat </proc/self/fd/0; test -t 0; echo $?; test -c /proc/self/fd/0; echo $?";
        let ran = container.sh(script).await?;
        assert_eq!((ran.exit_code, ran.stdout().as_str()), (0, "1\n0\n"), "as user {uid}: {}", ran.stderr());
    }
    Ok(())
}

/// What tells where a process comes from: of the first one, of an exec, and of an exec with a terminal.
async fn traits(container: &Container) -> Result<[String; 3]> {
    let files = |process: &str| ["status", "limits", "oom_score_adj", "stat"].map(|file| format!("/proc/{process}/{file}"));
    let cat = |process: &str| [&["cat".to_owned()][..], &files(process)].concat();
    let main = container.exec(cat("1")).await?.stdout();
    let exec = container.exec(cat("self")).await?.stdout();
    let words = cat("self");
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let terminal = container.exec_session(&words, true, true).await?.finish().await?.1.replace('\r', "");
    let told = |text: String| {
        let kept = ["Umask", "SigBlk", "SigIgn", "Cpus_allowed_list", "NoNewPrivs", "Max "];
        let mut told: Vec<&str> = text.lines().filter(|line| kept.iter().any(|kept| line.starts_with(kept))).collect();
        // A number alone; and of the last line the priority, the nice value and the policy.
        told.extend(text.lines().filter(|line| line.parse::<i32>().is_ok()));
        let stat = text.lines().last().and_then(|line| line.rsplit_once(") ")).map(|(_, fields)| fields);
        let fields: Vec<&str> = stat.unwrap_or_default().split(' ').collect();
        let number = |at: usize| fields.get(at - 3).copied().unwrap_or("missing");
        format!("{}\npriority {} nice {} policy {}", told.join("\n"), number(18), number(19), number(41))
    };
    Ok([main, exec, terminal].map(told))
}

async fn run(node: &Node, handler: &str) -> Result<Container> {
    let pod = node.run_pod(kuasar_tests::PodSpec::new(handler).handler(handler).quick()).await?;
    Ok(pod.run(ContainerSpec::new("c").sleep().oom_score_adj(600)).await?)
}

async fn what_the_daemon_was_started_with(lone: &Lone) -> Result<()> {
    if tools::is_machine(&lone.handler) {
        return lone.skip("processes of a virtual machine are its own");
    }
    let mut node = lone.node().await?;
    let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
    kuasard.stop()?;
    kuasard.start_by("umask 0; echo 300 >/proc/self/oom_score_adj; ulimit -Sn 1500; trap '' USR1 HUP; exec taskset 1 nice -n 5 \"$0\" \"$@\"");
    kuasard.start().await?;
    let worker = kuasard.worker_pid().await?;
    let limits = fs::read_to_string(format!("/proc/{worker}/limits"))?;
    let files = limits.lines().find(|line| line.starts_with("Max open files")).context("no limit of open files")?;
    let files: Vec<&str> = files.split_whitespace().collect();
    ensure!(files[3] == files[4], "the daemon has not raised its own limit: {files:?}");

    let [shims, ours] = [run(&node, "runc").await?, run(&node, &lone.handler).await?];
    let [shims, ours] = [traits(&shims).await?, traits(&ours).await?];
    for ((which, shims), ours) in ["first", "exec", "exec with a terminal"].iter().zip(&shims).zip(&ours) {
        // What it was started with is what containers get; containerd of this node was started with another limit, and by a program
        // that leaves a signal of the C library ignored.
        // And a shim passes containerd's own nice value on.
        let apart = ["Max open files", "SigIgn", "priority"];
        let same = |text: &str| {
            let lines = text.lines().filter(|line| !apart.iter().any(|apart| line.starts_with(apart)));
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(same(ours), same(shims), "{which}");
        ensure!(ours.contains("Max open files            1500 "), "{which}: {ours}");
        ensure!(ours.ends_with("priority 20 nice 0 policy 0"), "{which}: {ours}");
        ensure!(ours.contains("SigIgn:\t0000000000000000"), "{which}: {ours}");
    }
    // Files of the pod are for every user to read, and for none to write.
    let root = node.kuasard.as_ref().context("no kuasard")?.state().join("runc").join(&lone.handler).join("k8s.io");
    let pods = fs::read_dir(&root)?.collect::<std::io::Result<Vec<_>>>()?;
    ensure!(!pods.is_empty(), "no pod in {}", root.display());
    for (pod, name) in pods.iter().flat_map(|pod| ["hosts", "hostname", "resolv.conf"].map(|name| (pod, name))) {
        let mode = fs::metadata(pod.path().join("files").join(name))?.mode() & 0o7777;
        ensure!(mode == 0o644, "{name} has mode {mode:o}");
    }
    node.stop().await
}
