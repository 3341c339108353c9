//! Control groups on the real kernel. Needs root, and a cgroup tree that can be written to.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use kuasar_sandboxers::{
    Error,
    cgroup::{Cgroup, Hierarchy, Stats, Version},
};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);

/// A group for one test; `None`, said aloud, where none can be made.
fn group(test: &str) -> Option<Cgroup> {
    match Cgroup::create(Path::new(&format!("/kuasar-test-{}-{test}", std::process::id()))) {
        Ok(group) => Some(group),
        Err(error) => {
            eprintln!("SKIP {test}: {}", error.report());
            None
        }
    }
}

/// A process that waits until its input ends.
fn waiting(group: &Cgroup) -> Child {
    let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).spawn().unwrap();
    group.add(child.id()).unwrap();
    child
}

async fn reap(mut child: Child) -> std::process::ExitStatus {
    tokio::task::spawn_blocking(move || child.wait().unwrap()).await.unwrap()
}

#[tokio::test]
async fn a_group_is_made_filled_measured_emptied_and_removed() {
    let Some(group) = group("life") else { return };
    assert!(group.exists());
    assert!(group.processes().unwrap().is_empty());
    let name = group.path().file_name().unwrap().to_str().unwrap();
    let named = Cgroup::named(name).unwrap();
    assert_eq!(named.iter().map(Cgroup::path).collect::<Vec<_>>(), [group.path()]);
    assert!(Cgroup::named("no-group-is-called-so").unwrap().is_empty());
    let child = waiting(&group);
    assert_eq!(group.processes().unwrap(), [child.id()]);
    assert_eq!(Cgroup::of_process(child.id()).unwrap().processes().unwrap(), [child.id()]);
    match group.stats().unwrap() {
        Stats::V1(stats) => {
            assert_ne!(Hierarchy::of_host().unwrap().version(), Version::V2);
            assert!(stats.memory.is_none_or(|memory| memory.usage.unwrap().limit > 0));
            assert!(stats.cpu.is_none_or(|cpu| cpu.usage.is_none_or(|usage| !usage.per_cpu.is_empty())));
        }
        Stats::V2(stats) => assert!(stats.cpu.is_some()),
    }
    group.kill().await.unwrap();
    assert!(group.processes().unwrap().is_empty());
    reap(child).await;
    group.kill().await.unwrap();
    group.remove().await.unwrap();
    assert!(!group.exists());
    group.remove().await.unwrap();
    assert!(matches!(group.stats(), Err(Error::NotFound { .. })));
}

#[tokio::test]
async fn groups_below_go_too_and_frozen_processes_die() {
    let Some(group) = group("nested") else { return };
    let below = Cgroup::create(&group.path().join("a/b")).unwrap();
    let child = waiting(&below);
    let freezer = Hierarchy::of_host().unwrap().tree("freezer").map(|tree| tree.dir(below.path()).join("freezer.state"));
    if let Some(state) = freezer {
        fs::write(state, "FROZEN").unwrap();
        // What a runtime's pause freezes is the container's own group.
        below.kill().await.unwrap();
    } else {
        group.kill().await.unwrap();
    }
    reap(child).await;
    group.remove().await.unwrap();
    assert!(!below.exists() && !group.exists());
}

#[tokio::test]
async fn groups_above_go_with_the_last_below_them_where_we_made_them() {
    // Another's, as kubelet's.
    let Some(others) = group("others") else { return };
    let first = Cgroup::create(&others.path().join("a/b/first")).unwrap();
    let second = Cgroup::create(&others.path().join("a/second")).unwrap();
    let above = |below: &Cgroup| Cgroup::at(below.path().parent().unwrap()).unwrap();
    first.remove().await.unwrap();
    assert!(!above(&first).exists() && above(&second).exists() && second.exists());
    second.remove().await.unwrap();
    assert!(!above(&second).exists() && others.exists());
    others.remove().await.unwrap();
}

#[tokio::test]
async fn removal_waits_for_the_last_process_and_says_which_it_was() {
    let Some(group) = group("busy") else { return };
    let mut child = waiting(&group);
    let error = group.remove().await.unwrap_err();
    assert!(error.to_string().contains(&child.id().to_string()), "{error}");
    assert!(matches!(error, Error::TimedOut { .. }));
    let removal = group.remove();
    drop(child.stdin.take());
    removal.await.unwrap();
    reap(child).await;
}

#[tokio::test]
async fn a_fork_bomb_is_killed() {
    let Some(group) = group("forks") else { return };
    let hierarchy = Hierarchy::of_host().unwrap();
    let limit = hierarchy.tree("pids").or(hierarchy.unified()).map(|tree| tree.dir(group.path()).join("pids.max"));
    if limit.is_none_or(|limit| fs::write(limit, "60").is_err()) {
        return eprintln!("SKIP forks: no pids controller to keep it small");
    }
    // A shell that cannot fork ends; xargs, as long as it has children, tries again.
    let script = r#"read go; export B='yes | xargs -n 1 -P 3 sh -c "$B"'; eval "$B""#;
    let mut child = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    group.add(child.id()).unwrap();
    drop(child.stdin.take());
    let forked = async {
        while group.processes().unwrap().len() < 20 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LIMIT, forked).await.unwrap();
    group.kill().await.unwrap();
    reap(child).await;
    group.remove().await.unwrap();
}

#[tokio::test]
async fn out_of_memory_kills_are_told_and_the_end_is_not_one() {
    let Some(group) = group("oom") else { return };
    let hierarchy = Hierarchy::of_host().unwrap();
    let (limit, swap) = match hierarchy.version() {
        Version::V2 => (hierarchy.unified().unwrap().dir(group.path()).join("memory.max"), "memory.swap.max"),
        _ => match hierarchy.tree("memory") {
            Some(tree) => (tree.dir(group.path()).join("memory.limit_in_bytes"), "memory.memsw.limit_in_bytes"),
            None => return eprintln!("SKIP oom: no memory controller"),
        },
    };
    fs::write(&limit, "16M").unwrap();
    if let Err(error) = fs::write(limit.with_file_name(swap), if hierarchy.version() == Version::V2 { "0" } else { "16M" }) {
        eprintln!("swap is not limited: {error}");
    }
    let mut watch = group.oom_watch().unwrap();
    assert!(timeout(Duration::from_millis(100), watch.next()).await.is_err());
    // tail keeps a whole line in memory, and zeros have no end of line.
    let script = "read go; head -c 100M /dev/zero | tail";
    let mut child = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    group.add(child.id()).unwrap();
    // Not noticed by anyone until the process is gone: it is counted all the same.
    let mut late = group.oom_watch().unwrap();
    assert_eq!(late.counted(), None);
    drop(child.stdin.take());
    reap(child).await;
    assert_eq!(late.counted(), Some(1));
    assert_eq!(late.counted(), None);
    assert_eq!(timeout(LIMIT, watch.next()).await.unwrap(), Some(1));
    group.kill().await.unwrap();
    // One that begins to watch later knows, too.
    let mut quiet = group.oom_watch().unwrap();
    assert_eq!(timeout(LIMIT, quiet.next()).await.unwrap(), Some(1));
    group.remove().await.unwrap();
    // Nothing more but, perhaps, kills that were signalled together with the end.
    timeout(LIMIT, async { while watch.next().await.is_some() {} }).await.unwrap();
    assert_eq!(timeout(LIMIT, quiet.next()).await.unwrap(), None);
    assert_eq!(timeout(LIMIT, quiet.next()).await.unwrap(), None);
}

#[tokio::test]
async fn nothing_is_done_to_the_daemons_own_group() {
    assert!(matches!(Cgroup::of_process(std::process::id()), Err(Error::Invalid { .. })));
    assert!(matches!(Cgroup::of_process(u32::MAX - 1), Err(Error::NotFound { .. })));
}
