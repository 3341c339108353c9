//! Starting programs. In a process of its own, because its reaper takes every exit of the process.

#![allow(clippy::unwrap_used, reason = "what fails fails the test")]

use std::{ffi::OsStr, fs, path::Path, time::Duration};

use kuasar_sandboxers::{cgroup::Cgroup, fake::reaper};
use kuasar_vmm::launch::{LAST_WORDS, Launch, LaunchRecord, Launched, Privileges, find_program};
use nix::fcntl::OFlag;

async fn run(prepare: impl FnOnce(&mut Launch)) -> (Launched, tempfile::TempDir) {
    run_program("/bin/sh", prepare).await
}

async fn run_program(program: &str, prepare: impl FnOnce(&mut Launch)) -> (Launched, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let reaper = reaper();
    let mut launch = Launch::new("test", Path::new(program));
    prepare(&mut launch);
    (launch.start(dir.path(), &reaper).await.unwrap(), dir)
}

fn has_cloexec(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
    i32::from_str_radix(flags.trim(), 8).unwrap() & libc::O_CLOEXEC != 0
}

fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIP launch: root");
    }
    root
}

#[tokio::test]
async fn a_program_runs_without_powers_and_with_the_descriptors_it_is_given_only() {
    if !root() {
        return;
    }
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    let (launched, dir) = run_program("/bin/bash", |launch| {
        assert_eq!(launch.pass(write), 10);
        launch.user(Some((12345, 12346)), &[7]).open_files(100);
        let status = "grep -E 'Cap(Eff|Bnd)|NoNewPrivs' /proc/self/status";
        launch.args(["-c", &format!("id -u; id -g; id -G; ulimit -n; {status}; ls /proc/self/fd; echo through >&10")]);
    })
    .await;
    assert_eq!(launched.exited().await.status, 0, "{:?}", launched.last_words());
    let words = launched.last_words().unwrap();
    assert!(words.starts_with("12345\n12346\n12346 7\n100\n"), "{words}");
    let zeros = words.lines().filter(|line| line.starts_with("Cap") && line.ends_with("\t0000000000000000")).count();
    assert!(zeros == 2 && words.contains("NoNewPrivs:\t1"), "{words}");
    // Besides what this very process has inherited, and the directory that `ls` reads.
    let inherited = |fd: i32| fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).is_ok_and(|info| !has_cloexec(&info));
    let fds = words.lines().skip_while(|line| !line.starts_with("NoNewPrivs")).skip(1);
    let strange = |fd: &i32| ![0, 1, 2, 3, 10].contains(fd) && !inherited(*fd);
    assert_eq!(fds.filter_map(|fd| fd.parse().ok()).find(strange), None, "{words}");
    let mut bytes = [0; 16];
    assert_eq!(nix::unistd::read(&read, &mut bytes).unwrap(), 8);
    launched.kill().await.unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_user_namespace_has_every_id() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut launch = Launch::new("test", Path::new("/bin/sh"));
    launch.privileges(Privileges::OwnNamespace);
    launch.args([
        OsStr::new("-c"),
        "cd \"$0\"; touch f && chown 4000000:77 f; mknod null c 1 3".as_ref(),
        dir.path().as_os_str(),
    ]);
    let launched = launch.start(dir.path(), &reaper()).await.unwrap();
    launched.exited().await;
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(dir.path().join("f")).unwrap().uid(), 4_000_000, "{:?}", launched.last_words());
    assert!(!dir.path().join("null").exists());
}

#[tokio::test]
async fn a_program_is_in_its_control_group_from_the_start() {
    if !root() {
        return;
    }
    let path = format!("/kuasar-launch-{}", std::process::id());
    let cgroup = match Cgroup::create(Path::new(&path)) {
        Ok(cgroup) => cgroup,
        Err(error) => return eprintln!("SKIP a_program_is_in_its_control_group_from_the_start: {}", error.report()),
    };
    let (launched, _dir) = run(|launch| {
        launch.cgroup(Some(cgroup.clone())).args(["-c", "cat /proc/self/cgroup"]);
    })
    .await;
    launched.exited().await;
    cgroup.remove().await.unwrap();
    let words = launched.last_words().unwrap();
    assert!(words.contains(&format!(":memory:{path}\n")) || words.contains(&format!("0::{path}\n")), "{words}");
}

#[tokio::test]
async fn words_are_bounded_and_the_last_count() {
    let (launched, _dir) = run(|launch| {
        launch.args(["-c", "head -c 9000000 /dev/zero | tr '\\0' x 2>/dev/null; sleep 1.2; echo; echo the end"]);
    })
    .await;
    launched.exited().await;
    let words = launched.last_words().unwrap();
    assert!(words.len() <= LAST_WORDS && words.ends_with("\nthe end\n"), "{} {words:?}", words.len());
}

#[tokio::test]
async fn a_program_is_taken_over_with_its_words_and_its_end() {
    let (launched, dir) = run(|launch| {
        launch.args(["-c", "echo before; sleep 1000"]);
    })
    .await;
    let record: LaunchRecord = serde_json::from_str(&serde_json::to_string(&launched.record()).unwrap()).unwrap();
    let second = Launched::adopt(record.clone(), dir.path(), &reaper()).unwrap();
    assert_eq!(second.exit(), None);
    second.kill().await.unwrap();
    assert_eq!((second.exited().await.status, launched.exited().await.status), (137, 137));
    assert!(kuasar_sandboxers::process::is_dead(record.process.pid));
    let third = Launched::adopt(record, dir.path(), &reaper()).unwrap();
    assert_eq!(third.exited().await.status, 137);
    third.kill().await.unwrap();
}

#[tokio::test]
async fn what_cannot_start_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let launch = Launch::new("test", Path::new("/nonexistent"));
    let launched = launch.start(dir.path(), &reaper()).await.unwrap();
    let error = launched.failure("start", Duration::from_secs(20)).await;
    assert!(error.report().contains("/nonexistent"), "{}", error.report());
    launched.kill().await.unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(find_program("no-such-program", "KUASAR_NO_SUCH", &["/x"]).unwrap_err().report().contains("KUASAR_NO_SUCH"));
}
