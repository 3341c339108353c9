//! What goes wrong around a pod: the OCI runtime, the configuration, the disk, the caller.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::k8s_cri::v1::{RemovePodSandboxRequest, StopPodSandboxRequest};
use kuasar_tests::kuasard::Kuasard;
use kuasar_tests::{ContainerSpec, Node, tools, wait};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::Code;

use crate::suite::{Entry, Lone, agree, cases, refused};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Ours Alone:
        an_oci_runtime_that_is_too_old,
        an_oci_runtime_that_disappears,
        an_oci_runtime_that_hangs,
        a_sandboxer_that_is_not_configured,
        a_full_disk,
        callers_that_give_up,
        a_second_daemon,
    ]
}

fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

async fn an_oci_runtime_that_is_too_old(lone: &Lone) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let old = dir.path().join("runc");
    script(&old, "echo 'runc version 1.0.0-rc5'")?;
    // The others serve.
    let node = Node::start(lone.options().sandboxer("kuasar-old", &old.display().to_string())).await?;
    let path = old.display().to_string();
    let error = refused(node.run_pod(lone.pod().handler("kuasar-old")).await, &["kuasar-old", &path, "1.0.0", "1.1.0"])?;
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    let pod = node.run_pod(lone.pod()).await?;
    pod.run(ContainerSpec::new("c").sleep()).await?;
    // It is found when it is there: by the next pod.
    fs::remove_file(&old)?;
    fs::copy(tools::runc()?, &old)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    node.run_pod(lone.pod().handler("kuasar-old")).await?.remove_all().await?;
    pod.remove_all().await?;
    node.stop().await?;
    // Nor one that is no OCI runtime at all. Without any other the daemon does not start.
    script(&old, "echo hello")?;
    let (handler, odd) = (lone.handler.clone(), path.clone());
    let options = lone.options().patch_kuasard(move |config| config["sandboxer"][&handler]["runtime"] = odd.clone().into());
    let error = Node::start(options).await.map(drop).unwrap_err();
    let text = format!("{error:#}");
    for word in [&lone.handler, &path] {
        ensure!(text.contains(word.as_str()), "no {word:?} in {text}");
    }
    Ok(())
}

/// The pids that a script has written to a file, once there are as many.
async fn written(file: &Path, count: usize) -> Result<Vec<i32>> {
    let what = format!("{count} pids in {}", file.display());
    let pids = wait::until(&what, kuasar_tests::cri::SOON, || async {
        let text = fs::read_to_string(file).unwrap_or_default();
        let pids: Vec<i32> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        Ok((pids.len() == count).then_some(pids))
    });
    pids.await
}

async fn end(pids: &[i32]) -> Result<()> {
    let ended = wait::until("the stuck runtimes to end", kuasar_tests::cri::SOON, || async {
        Ok(pids.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    });
    ended.await
}

async fn an_oci_runtime_that_hangs(lone: &Lone) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let original = if lone.handler.contains("crun") { tools::crun()? } else { tools::runc()? };
    let (path, stuck, pids) = (dir.path().join("runtime"), dir.path().join("stuck"), dir.path().join("pids"));
    let text = format!(
        "case \" $* \" in\n*\" update \"*|*\" exec \"*)\n  if [ -e {stuck} ]; then\n    sleep 600 & echo $$ $! >>{pids}; wait\n  fi;;\nesac\nexec {} \"$@\"",
        original.display(),
        stuck = stuck.display(),
        pids = pids.display(),
    );
    script(&path, &text)?;
    let (handler, program) = (lone.handler.clone(), path.display().to_string());
    let options = lone.options().patch_kuasard(move |config| config["sandboxer"][&handler]["runtime"] = program.clone().into());
    let node = Node::start(options).await?;
    let before = lone.baseline(&node).await?;
    let pod = node.run_pod(lone.pod()).await?;
    let (updated, other) = (pod.run(ContainerSpec::new("u").sleep()).await?, pod.run(ContainerSpec::new("e").sleep()).await?);
    fs::write(&stuck, "")?;
    let resources = kuasar_tests::cri::k8s_cri::v1::LinuxContainerResources { cpu_shares: 7, ..Default::default() };
    // containerd itself has the stop wait for the update, which is given up soon; the runtime would hang for ten minutes.
    let stopped = async {
        let pids = written(&pids, 2).await?;
        let begun = std::time::Instant::now();
        updated.stop(1).await?;
        updated.remove().await?;
        ensure!(begun.elapsed() < Duration::from_secs(30), "the stop took {:?}", begun.elapsed());
        end(&pids).await
    };
    let (update, stopped) = tokio::join!(updated.update(resources), stopped);
    stopped?;
    ensure!(update.is_err(), "an update that hangs has succeeded");
    // What hangs ends with its pod, and takes what it has started along.
    fs::remove_file(&pids)?;
    let removed = async {
        let pids = written(&pids, 2).await?;
        pod.remove_all().await?;
        end(&pids).await
    };
    let (exec, removed) = tokio::join!(other.exec(["true"]), removed);
    removed?;
    ensure!(exec.is_err(), "an exec that hangs has succeeded");
    node.assert_no_leak(&before).await?;
    node.stop().await
}

async fn an_oci_runtime_that_disappears(lone: &Lone) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let original = if lone.handler.contains("crun") { tools::crun()? } else { tools::runc()? };
    let path = dir.path().join("runtime");
    fs::copy(&original, &path)?;
    let handler = lone.handler.clone();
    let moved = path.clone();
    let options = lone.options().patch_kuasard(move |config| {
        config["sandboxer"][&handler]["runtime"] = moved.display().to_string().into();
    });
    let node = Node::start(options).await?;
    let before = lone.baseline(&node).await?;
    let pod = node.run_pod(lone.pod()).await?;
    let container = pod.create(ContainerSpec::new("c").sleep()).await?;
    fs::remove_file(&path)?;
    let error = refused(container.start().await, &[&path.display().to_string()])?;
    assert_ne!(error.code(), Code::Unknown, "{error}");
    container.remove().await?;
    // It comes back, and so does the pod.
    fs::copy(&original, &path)?;
    assert_eq!(pod.run(ContainerSpec::new("c").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    pod.remove_all().await?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}

async fn a_sandboxer_that_is_not_configured(lone: &Lone) -> Result<()> {
    // containerd's configuration has the name, kuasard's has not.
    let options = lone.options().sandboxer("kuasar-forgotten", "runc").patch_kuasard(|config| {
        if let Some(tables) = config["sandboxer"].as_object_mut() {
            tables.remove("kuasar-forgotten");
        }
    });
    let node = Node::start(options).await?;
    let before = lone.baseline(&node).await?;
    let error = refused(node.run_pod(lone.pod().handler("kuasar-forgotten")).await, &["kuasar-forgotten", &lone.handler])?;
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    node.assert_no_leak(&before).await?;
    node.stop().await
}

/// A small file system mounted over a directory.
struct Small(PathBuf);

impl Small {
    fn over(path: &Path) -> Result<Self> {
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some("size=1m"))
            .with_context(|| format!("mount a tmpfs on {}", path.display()))?;
        Ok(Self(path.to_path_buf()))
    }

    /// Leaves no room.
    fn fill(&self) -> Result<()> {
        let full = fs::write(self.0.join("filler"), vec![0; 2 << 20]);
        ensure!(full.is_err_and(|error| error.raw_os_error() == Some(libc::ENOSPC)), "the small file system is not full");
        Ok(())
    }

    fn empty(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.join("filler"))?)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Err(errno) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {errno}", self.0.display());
        }
    }
}

async fn a_full_disk(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let kuasard = |node: &mut Node| node.kuasard.take().context("the node has no kuasard");
    let mut daemon: Kuasard = kuasard(&mut node)?;
    daemon.stop()?;
    let disk = Small::over(daemon.state())?;
    daemon.start().await?;
    node.kuasard = Some(daemon);
    wait::until("pods to run again", kuasar_tests::cri::SOON, || async {
        match node.run_pod(lone.pod()).await {
            Ok(pod) => Ok(Some(pod.remove_all().await?)),
            Err(status) if status.code() == Code::Unavailable => Ok(None),
            Err(status) => Err(status.into()),
        }
    })
    .await?;
    let before = lone.baseline(&node).await?;

    let pod = node.run_pod(lone.pod()).await?;
    let running = pod.run(ContainerSpec::new("running").sleep()).await?;
    let waiting = pod.create(ContainerSpec::new("waiting").sleep()).await?;
    disk.fill()?;
    let error = refused(node.run_pod(lone.pod()).await, &["No space left on device"])?;
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    // Here it may be the OCI runtime that finds no room, and says so in its own words.
    let error = refused(waiting.start().await, &["o space left on device"])?;
    assert!([Code::ResourceExhausted, Code::Internal].contains(&error.code()), "{error}");
    // What runs, runs on; what is to go, goes.
    assert_eq!(running.state().await?, kuasar_tests::cri::k8s_cri::v1::ContainerState::ContainerRunning);
    running.stop(0).await?;
    assert_eq!(running.wait_exit().await?.exit_code, 137);
    disk.empty()?;
    let next = node.run_pod(lone.pod()).await?;
    assert_eq!(next.run(ContainerSpec::new("c").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    pod.remove_all().await?;
    next.remove_all().await?;
    node.assert_no_leak(&before).await?;
    drop(disk);
    node.stop().await
}

async fn callers_that_give_up(lone: &Lone) -> Result<()> {
    let node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    // One pod stays: kuasard believes a containerd that has named a sandbox of its own.
    let staying = node.run_pod(lone.pod()).await?;
    for round in 0..12_u64 {
        // Each round in another moment: the pod's creation, the container's, the exec.
        let work = async {
            let pod = node.run_pod(lone.pod()).await?;
            let container = pod.run(ContainerSpec::new("c").sleep()).await?;
            container.exec(["sleep", "1000"]).await?;
            Ok::<_, tonic::Status>(())
        };
        let _ = tokio::time::timeout(Duration::from_millis(15 + 30 * round), work).await;
    }
    // As kubelet does: what containerd still lists is stopped and removed. The rest it has forgotten, and kuasard has to find out.
    let last = std::sync::Mutex::new(None);
    let removed = wait::until("the other pods to be removed", kuasar_tests::cri::SOON, || async {
        let mut runtime = node.cri.runtime();
        let others: Vec<_> = node.cri.pods().await?.into_iter().filter(|pod| pod.id != staying.id).collect();
        for pod in &others {
            let pod_sandbox_id = pod.id.clone();
            let stop = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
            let result = match runtime.stop_pod_sandbox(stop).await {
                Ok(_) => runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }).await.map(drop),
                Err(status) => Err(status),
            };
            // Tried again when it fails: something of it may be under way still.
            if let (Err(status), Ok(mut last)) = (result, last.lock()) {
                *last = Some(status);
            }
        }
        Ok(others.is_empty().then_some(()))
    });
    removed.await.with_context(|| format!("the last error was {last:?}"))?;
    agree(&node).await?;
    assert_eq!(staying.run(ContainerSpec::new("c").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    staying.remove_all().await?;
    wait::until("everything to be gone", kuasar_tests::cri::SOON, || async {
        // A bundle whose creation was cut off is containerd's own to remove, at its next start.
        let left = node.snapshot()?.beyond(&before);
        let of_ours: Vec<_> = left.into_iter().filter(|line| !line.contains("io.containerd.runtime.v2.task")).collect();
        Ok(of_ours.is_empty().then_some(()))
    })
    .await
    .with_context(|| node.snapshot().map_or_else(|error| error.to_string(), |now| now.beyond(&before).join("\n")))?;
    node.stop().await
}

async fn a_second_daemon(lone: &Lone) -> Result<()> {
    let mut node = lone.node().await?;
    let pod = node.run_pod(lone.pod()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let second = |kuasard: &Kuasard| -> Result<String> {
        let mut command = std::process::Command::new(tools::ours("kuasard")?);
        command.arg("--config").arg(kuasard.config()).arg("--state").arg(kuasard.state()).arg("--root").arg(kuasard.root());
        let output = command.output()?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        Ok(String::from_utf8(output.stderr)?)
    };
    let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
    let said = second(kuasard)?;
    let worker = format!("process {}", kuasard.worker_pid().await?);
    for word in [worker.as_str(), "--state", &kuasard.state().display().to_string()] {
        ensure!(said.contains(word), "no {word:?} in {said}");
    }
    // Nor when it comes between one worker and the next: the keeper has the lock.
    for _ in 0..3 {
        let killed = kuasard.kill_worker().await?;
        ensure!(second(kuasard)?.contains("another --state"));
        kuasard.wait_serving(killed).await?;
    }
    assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    pod.remove_all().await?;
    node.stop().await
}
