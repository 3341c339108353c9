//! Directories and files of the node in a container.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::join_all;
use kuasar_tests::cri::SOON;
use kuasar_tests::cri::k8s_cri::v1::{HugepageLimit, LinuxContainerResources, Mount, MountPropagation};
use kuasar_tests::hung::{self, Hung};
use kuasar_tests::{Container, ContainerSpec, Pod, PodSpec, tools, wait};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::suite::{Case, Entry, Lone, cases, eventually, refused};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Handlers Shared:
        read_write_and_read_only,
        files_nested_and_in_order,
        read_only_spares_mounts_below,
        recursively_read_only,
        a_mount_below_can_be_taken_away_on_the_node,
        propagation_to_the_container,
        propagation_to_the_node,
        huge_pages_of_the_guest,
        what_cannot_be_mounted_says_why,
        containers_share_a_volume,
    ];
    cases.extend(cases![Ours Alone: a_hung_volume_stops_nobody]);
    cases
}

/// A filesystem in the node's memory, unmounted on drop.
struct Memory(PathBuf);

impl Memory {
    fn tmpfs(path: &Path) -> Result<Self> {
        Self::at(path, "tmpfs", "size=1m")
    }

    fn at(path: &Path, kind: &str, options: &str) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        mount(Some(kind), path, Some(kind), MsFlags::empty(), Some(options))
            .with_context(|| format!("mount a {kind} on {}", path.display()))?;
        Ok(Self(path.to_path_buf()))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Err(errno) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {errno}", self.0.display());
        }
    }
}

fn volume(case: &Case, name: &str) -> Result<PathBuf> {
    let path = case.dir().join(name);
    fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    Ok(path)
}

async fn read_write_and_read_only(case: &Case) -> Result<()> {
    let dir = volume(case, "v")?;
    fs::write(dir.join("from-node"), "node")?;
    let spec = ContainerSpec::new("c").sleep().mount(&dir, "/rw", false).mount(&dir, "/ro", true);
    let container = case.container(spec).await?;
    assert_eq!(container.sh("cat /ro/from-node; echo container >/rw/from-container").await?.stdout(), "node");
    assert_eq!(fs::read_to_string(dir.join("from-container"))?, "container\n");
    let refused = container.sh("echo x >/ro/x").await?;
    assert!(refused.stderr().contains("Read-only file system"), "{refused:?}");
    ensure!(!dir.join("x").exists());
    // What the node adds later shows.
    fs::write(dir.join("later"), "later")?;
    assert_eq!(container.sh("cat /rw/later /ro/later").await?.stdout(), "laterlater");
    Ok(())
}

async fn files_nested_and_in_order(case: &Case) -> Result<()> {
    let (outer, inner) = (volume(case, "outer")?, volume(case, "inner")?);
    fs::create_dir(outer.join("in"))?;
    fs::write(inner.join("who"), "inner")?;
    fs::write(case.dir().join("file"), "a file")?;
    let spec = ContainerSpec::new("c")
        .sleep()
        .mount(&inner, "/data/in", false)
        .mount(&outer, "/data", false)
        .mount(&case.dir().join("file"), "/etc/made/for/it", true)
        // A path that the image has, and one that leads through a link of it.
        .mount(&case.dir().join("file"), "/etc/passwd", true);
    let container = case.container(spec).await?;
    assert_eq!(container.sh("cat /data/in/who /etc/made/for/it /etc/passwd").await?.stdout(), "innera filea file");
    assert_ne!(container.sh("echo x >/etc/passwd").await?.exit_code, 0);
    Ok(())
}

async fn read_only_spares_mounts_below(case: &Case) -> Result<()> {
    let dir = volume(case, "v")?;
    let _below = Memory::tmpfs(&dir.join("below"))?;
    let container = case.container(ContainerSpec::new("c").sleep().mount(&dir, "/v", true)).await?;
    assert_ne!(container.sh("echo x >/v/x").await?.exit_code, 0);
    // As CRI has it: read-only is that mount's matter alone.
    assert_eq!(container.sh("echo x >/v/below/x && cat /v/below/x").await?.stdout(), "x\n");
    Ok(())
}

async fn a_mount_below_can_be_taken_away_on_the_node(case: &Case) -> Result<()> {
    let dir = volume(case, "v")?;
    let below = Memory::tmpfs(&dir.join("below"))?;
    fs::write(below.0.join("mark"), "mounted before")?;
    let pod = case.quick_pod().await?;
    let container = pod.run(ContainerSpec::new("c").sleep().mount(&dir, "/v", false)).await?;
    assert_eq!(container.sh("cat /v/below/mark").await?.stdout(), "mounted before");
    drop(below);
    // It is the container's own by now.
    assert_eq!(container.sh("cat /v/below/mark").await?.stdout(), "mounted before");
    // A place that is mounted on in another namespace only is free.
    fs::remove_dir(dir.join("below")).context("remove its place on the node")?;
    container.remove().await?;
    let again = pod.run(ContainerSpec::new("again").sleep().mount(&dir, "/v", false)).await?;
    assert_eq!(again.sh("ls /v | wc -l").await?.stdout(), "0\n");
    Ok(())
}

async fn recursively_read_only(case: &Case) -> Result<()> {
    if !case.features().await?.recursive_read_only_mounts {
        return case.skip("CRI does not offer recursive read-only mounts with this handler");
    }
    let dir = volume(case, "v")?;
    let _below = Memory::tmpfs(&dir.join("below"))?;
    let mut spec = ContainerSpec::new("c").sleep().mount(&dir, "/v", true);
    spec.config.mounts[0].recursive_read_only = true;
    let container = case.container(spec).await?;
    for path in ["/v/x", "/v/below/x"] {
        let ran = container.sh(&format!("echo x >{path}")).await?;
        assert!(ran.stderr().contains("Read-only file system"), "{path}: {ran:?}");
    }
    Ok(())
}

fn with_propagation(dir: &Path, at: &str, propagation: MountPropagation) -> Mount {
    Mount {
        host_path: dir.display().to_string(),
        container_path: at.to_owned(),
        propagation: propagation.into(),
        ..Default::default()
    }
}

async fn propagation_to_the_container(case: &Case) -> Result<()> {
    let dir = volume(case, "v")?;
    let mut spec = ContainerSpec::new("c").sleep();
    spec.config.mounts = vec![
        with_propagation(&dir, "/private", MountPropagation::PropagationPrivate),
        with_propagation(&dir, "/follows", MountPropagation::PropagationHostToContainer),
    ];
    let container = case.container(spec).await?;
    let later = Memory::tmpfs(&dir.join("later"))?;
    fs::write(later.0.join("mark"), "mounted later")?;
    assert_eq!(container.sh("cat /follows/later/mark").await?.stdout(), "mounted later");
    assert_ne!(container.sh("cat /private/later/mark").await?.exit_code, 0);
    drop(later);
    // A guest remembers for a second what it has looked up (docs/microvm.md).
    eventually("it to be gone in the container", || async { Ok(container.sh("cat /follows/later/mark").await?.exit_code != 0) })
        .await
}

async fn propagation_to_the_node(case: &Case) -> Result<()> {
    let dir = volume(case, "v")?;
    let pod = case.run(case.spec().quick().privileged()).await?;
    let mut spec = ContainerSpec::new("c").sleep().privileged();
    spec.config.mounts = vec![
        with_propagation(&dir, "/both", MountPropagation::PropagationBidirectional),
        with_propagation(&dir, "/follows", MountPropagation::PropagationHostToContainer),
    ];
    let container = pod.run(spec).await?;
    let script = |at: &str| format!("mkdir -p /{at}/{at} && mount -t tmpfs tmpfs /{at}/{at} && echo mounted >/{at}/{at}/mark");
    assert_eq!(container.sh(&script("both")).await?.exit_code, 0);
    assert_eq!(fs::read_to_string(dir.join("both/mark"))?, "mounted\n");
    assert_eq!(container.sh(&script("follows")).await?.exit_code, 0);
    ensure!(!dir.join("follows/mark").exists(), "nothing comes out of this one");
    assert_eq!(container.sh("umount /both/both").await?.exit_code, 0);
    eventually("it to be gone on the node", || async { Ok(!dir.join("both/mark").exists()) }).await
}

async fn huge_pages_of_the_guest(case: &Case) -> Result<()> {
    if !case.is_machine() {
        return case.skip("huge pages are the node's");
    }
    let dir = volume(case, "huge")?;
    // kubelet's emptyDir with `medium: HugePages`: the node need not have a page of it.
    let Ok(_node) = Memory::at(&dir, "hugetlbfs", "pagesize=2M") else {
        return case.skip("a node whose kernel has huge pages of 2 MiB");
    };
    let limit = |page_size: &str, limit| HugepageLimit { page_size: page_size.to_owned(), limit };
    let limits = vec![limit("1GB", 0), limit("2MB", 8 << 20)];
    let resources = LinuxContainerResources { hugepage_limits: limits, ..Default::default() };
    let pod = case.run(case.spec().quick().resources(resources)).await?;
    let container = pod.run(ContainerSpec::new("c").sleep().mount(&dir, "/huge", false)).await?;
    let told =
        "awk '/^HugePages_Total|^Hugepagesize/ { print $2 }' /proc/meminfo; awk '$2 == \"/huge\" { print $3 }' /proc/mounts";
    assert_eq!(container.sh(told).await?.stdout(), "4\n2048\nhugetlbfs\n");
    let limits = vec![limit("3MB", 3 << 20)];
    let resources = LinuxContainerResources { hugepage_limits: limits, ..Default::default() };
    refused(case.run(case.spec().quick().resources(resources)).await, &["hugepage_limits", "3MB"])?;
    Ok(())
}

async fn what_cannot_be_mounted_says_why(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let file = case.dir().join("file");
    fs::write(&file, "a file")?;
    // A file cannot lie on a directory.
    let create = pod.create(ContainerSpec::new("over-a-directory").sleep().mount(&file, "/bin", false)).await;
    let result = match create {
        Ok(container) => container.start().await,
        Err(status) => Err(status),
    };
    let status = refused(result, &[])?;
    // crun names the place as it is in the root filesystem.
    ensure!(["/bin", "`bin`"].iter().any(|place| status.message().contains(place)), "the place is not named: {status}");
    // Where there is nothing, CRI makes a directory.
    let dir = case.dir().join("made/by/cri");
    let container = pod.run(ContainerSpec::new("c").sleep().mount(&dir, "/made", false)).await?;
    assert_eq!(container.sh("echo x >/made/x").await?.exit_code, 0);
    assert_eq!(fs::read_to_string(dir.join("x"))?, "x\n");
    Ok(())
}

async fn containers_share_a_volume(case: &Case) -> Result<()> {
    let dir = volume(case, "v")?;
    let pod = case.quick_pod().await?;
    let reader = pod.run(ContainerSpec::new("reader").sleep().mount(&dir, "/in", true)).await?;
    let writer = pod.run(ContainerSpec::new("writer").sleep().mount(&dir, "/out", false)).await?;
    assert_eq!(writer.sh("echo hello >/out/x").await?.exit_code, 0);
    assert_eq!(reader.sh("cat /in/x").await?.stdout(), "hello\n");
    // Kept when the containers go.
    writer.remove().await?;
    assert_eq!(reader.sh("cat /in/x").await?.stdout(), "hello\n");
    Ok(())
}

/// A container's life and an exec beside it, in a pod whose volumes are well: the longest of its calls.
async fn round(pod: &Pod, beside: &Container, name: &str) -> Result<Duration> {
    let mut longest = Duration::ZERO;
    let mut since = Instant::now();
    let mut lap = || {
        longest = longest.max(since.elapsed());
        since = Instant::now();
    };
    let container = pod.create(ContainerSpec::new(name).sleep()).await?;
    lap();
    container.start().await?;
    lap();
    assert_eq!(beside.exec(["echo", "on"]).await?.stdout(), "on\n");
    lap();
    container.stop(0).await?;
    lap();
    container.remove().await?;
    lap();
    Ok(longest)
}

async fn a_hung_volume_stops_nobody(lone: &Lone) -> Result<()> {
    const ROUNDS: usize = 5;
    if !Path::new(hung::DEVICE).exists() {
        return lone.skip(&format!("this machine has no {}", hung::DEVICE));
    }
    let node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let kuasard = node.kuasard.as_ref().context("the node has no kuasard")?;
    let worker = kuasard.worker_pid().await?;
    let volume = node.dir().join("run/hung");
    let hung = Hung::mount(&volume)?;
    let other = node.run_pod(lone.pod()).await?;
    let beside = other.run(ContainerSpec::new("beside").sleep()).await?;
    // As many as the daemon has threads for calls, and one more.
    let mut hit = Vec::new();
    for name in ["one", "two"] {
        let pod = node.run_pod(PodSpec::new(name).handler(&lone.handler)).await?;
        for name in ["a", "b"] {
            hit.push(pod.create(ContainerSpec::new(name).sleep().mount(&volume, "/hung", false)).await?);
        }
    }
    let mut healthy = Duration::ZERO;
    for number in 0..ROUNDS {
        healthy = healthy.max(round(&other, &beside, &format!("healthy-{number}")).await?);
    }

    hung.hang();
    let starts = tokio::spawn({
        let hit = hit.clone();
        async move { join_all(hit.iter().map(Container::start)).await }
    });
    // crun mounts what it has not looked at.
    let look = || async { Ok((hung.waiting() > 0 || starts.is_finished()).then_some(())) };
    wait::until("a look at the volume", SOON, look).await?;
    let mut slowest = Duration::ZERO;
    for number in 0..ROUNDS {
        slowest = slowest.max(round(&other, &beside, &format!("beside-{number}")).await?);
    }
    eprintln!("{}: longest call of a healthy pod {healthy:?}, beside a hung volume {slowest:?}", lone.handler);
    // A machine under load varies by itself; what waits for the volume waits for seconds.
    ensure!(
        slowest < healthy * 3 + Duration::from_secs(1),
        "other pods notice the hung volume: {slowest:?} instead of {healthy:?}"
    );
    if tools::is_machine(&lone.handler) {
        for started in starts.await? {
            refused(started.map(drop), &["volume", "hung", "does not answer"])?;
        }
        hung.release();
    } else {
        // The OCI runtime looks at volumes, and may take its time.
        hung.release();
        starts.await?;
    }
    assert_eq!(kuasard.worker_pid().await?, worker, "the worker was replaced");
    for container in &hit {
        container.remove().await?;
    }
    node.cri.remove_all_pods().await?;
    drop(hung);
    node.assert_no_leak(&before).await?;
    node.stop().await
}
