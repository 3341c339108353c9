//! Helpers for work on files: this executable is its own helper, so it has a `main` of its own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    process::{self, Command, ExitCode},
    time::{Duration, Instant},
};

use futures::future::join_all;
use kuasar_sandboxers::{
    Code,
    fdstore::{FdStore, MemoryHolder},
    offload::{self, Done, MOST, Offload, Step, Work},
    reaper::Reaper,
    stdio::{ChildFds, IoContext, ProcessIo, Stdio, StreamHub},
    types::Mount,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver, time::timeout};

fn main() -> ExitCode {
    if let Some(ended) = offload::serve() {
        return ended;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    // On a worker: a helper dies with the thread that started it.
    let tests = runtime.spawn(async {
        let reaper = Reaper::install().unwrap();
        results_and_errors_come_back(&Offload::new("one", &reaper)).await;
        eprintln!("test results_and_errors_come_back ... ok");
        a_log_is_written_by_a_process_of_its_own(&reaper).await;
        eprintln!("test a_log_is_written_by_a_process_of_its_own ... ok");
        what_hangs_is_given_up(&reaper).await;
    });
    runtime.block_on(tests).unwrap();
    ExitCode::SUCCESS
}

async fn results_and_errors_come_back(offload: &Offload) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::write(&image, "").unwrap();
    let open = |path: &Path| Work::OpenDisk { path: path.to_owned(), readonly: false };
    let Done::Opened(file) = offload.run_one("the image", open(&image)).await.unwrap() else { panic!("no file") };
    File::from(file).write_all(b"a line\n").unwrap();
    assert_eq!(fs::read_to_string(&image).unwrap(), "a line\n");
    // Up to the first failure, whose words and code are the helper's.
    let target = dir.path().join("later");
    fs::create_dir(&target).unwrap();
    let tmpfs = Mount { kind: "tmpfs".into(), source: "tmpfs".into(), target: String::new(), options: Vec::new() };
    let later = Work::Mount { mounts: vec![tmpfs], target: target.clone() };
    let step = |work: Work| Step { what: "an image".into(), work };
    let error = offload.run(vec![step(open(&image)), step(open(dir.path())), step(later)]).await.unwrap_err();
    assert!(error.report().contains(&dir.path().display().to_string()), "{}", error.report());
    assert_eq!(error.code(), Code::Internal);
    assert_eq!(fs::metadata(target).unwrap().dev(), fs::metadata(dir.path()).unwrap().dev(), "it was mounted");
    let answer = offload.run_one("a device", Work::IsBlockDevice("/dev/null".into())).await.unwrap();
    assert!(matches!(answer, Done::Answer(false)), "{answer:?}");
}

fn io_context(reaper: &Reaper, fds: FdStore) -> IoContext {
    IoContext {
        namespace: "k8s.io".parse().unwrap(),
        sandbox: "logging".parse().unwrap(),
        container: "c1".parse().unwrap(),
        streams: StreamHub::default(),
        reaper: reaper.clone(),
        owner: (0, 0),
        fds,
        name: "@k8s.io/logging/c1".into(),
    }
}

async fn a_log_is_written_by_a_process_of_its_own(reaper: &Reaper) {
    let (dir, holder) = (tempfile::tempdir().unwrap(), MemoryHolder::default());
    let log = dir.path().join("made/for/it/log");
    let stdio = Stdio { stdout: format!("file://{}", log.display()), ..Stdio::default() };
    let writers = || {
        let is_one = |entry: &fs::DirEntry| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == log.as_os_str().as_encoded_bytes())
        };
        fs::read_dir("/proc").unwrap().filter(|entry| entry.as_ref().is_ok_and(is_one)).count()
    };
    let first = ProcessIo::open(&stdio, &io_context(reaper, holder.store())).await.unwrap();
    assert_eq!(writers(), 1, "one for both streams");
    let ChildFds { stdout, stderr, .. } = first.child_fds().unwrap();
    let (mut stdout, mut stderr) = (File::from(stdout), File::from(stderr));
    stdout.write_all(b"a ").unwrap();
    // As the version before has parked it: with a pidfd.
    let (earlier, name) = (holder.store(), "@k8s.io/logging/c1/log-out");
    let (parked, held) = earlier.take(name).unwrap();
    assert_eq!(parked.len(), 1);
    let pidfd = File::open("/proc/self").unwrap();
    std::mem::forget((earlier.leave(name.into(), &[parked[0].as_fd(), pidfd.as_fd()]).unwrap(), held));
    // The daemon dies, and the next one waits for its writer.
    let second = ProcessIo::adopt(&stdio, &io_context(reaper, holder.store())).unwrap();
    std::mem::forget(first);
    stderr.write_all(b"line\n").unwrap();
    drop((stdout, stderr));
    second.finish().await;
    assert_eq!((fs::read_to_string(&log).unwrap().as_str(), writers()), ("a line\n", 0));

    // What the version before has opened itself, wherever it is now.
    let file = OpenOptions::new().append(true).open(&log).unwrap().into();
    let old = log.with_extension("old");
    fs::rename(&log, &old).unwrap();
    let pipe = second.pipe_for_file(&stdio, "stdout", &file, &io_context(reaper, holder.store())).await.unwrap().unwrap();
    drop(file);
    File::from(pipe).write_all(b"more\n").unwrap();
    second.finish().await;
    assert_eq!(fs::read_to_string(old).unwrap(), "a line\nmore\n");
}

async fn a_log_that_hangs_is_given_up(reaper: &Reaper, mute: &Path) {
    let stdio = Stdio { stdout: format!("file://{}", mute.join("log").display()), ..Stdio::default() };
    let error = ProcessIo::open(&stdio, &io_context(reaper, FdStore::default())).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.report().starts_with("log file /") && error.report().contains("does not answer"), "{}", error.report());
}

/// Without any daemon that would end it.
async fn a_writer_whose_log_hangs_ends_by_itself(reaper: &Reaper, mute: &Path) {
    let log = mute.join("log");
    let mut command = Command::new("/proc/self/exe");
    command
        .args([&log, &log])
        .env_clear()
        .env("KUASAR_LOG_WRITER", "1")
        .stdin(process::Stdio::piped())
        .stdout(process::Stdio::piped());
    let mut writer = reaper.spawn(&mut command).unwrap();
    drop(writer.stdin.take());
    let (mut pipe, mut report) = (Receiver::from_owned_fd(writer.stdout.take().unwrap()).unwrap(), String::new());
    // The end of the report is the writer's.
    timeout(Duration::from_secs(45), pipe.read_to_string(&mut report)).await.unwrap().unwrap();
    assert!(report.starts_with("behind\nthe filesystem did not respond within"), "{report}");
}

/// As of containers that are created and deleted, each of which leaves a writer behind.
async fn writers_of_hung_logs_are_bounded(reaper: &Reaper, mute: &Path) {
    let stdio = Stdio { stdout: format!("file://{}", mute.join("log").display()), ..Stdio::default() };
    let context = IoContext { sandbox: "bounded".parse().unwrap(), ..io_context(reaper, FdStore::default()) };
    let open = || ProcessIo::open(&stdio, &context);
    for hung in join_all((0..MOST).map(|_| open())).await {
        assert_eq!(hung.unwrap_err().code(), Code::DeadlineExceeded);
    }
    // They are still there.
    let error = open().await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{}", error.report());
    let report = error.report();
    assert!(
        report.contains(&stdio.stdout["file://".len()..]) && report.contains("check their NFS or FUSE servers"),
        "{report}"
    );
}

/// A log file that an earlier version has opened itself, on a filesystem that hangs since.
async fn an_opened_log_that_hangs_holds_nothing_up(reaper: &Reaper, mute: &Path) {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(mute).unwrap().into();
    let io = ProcessIo::open(&Stdio::default(), &io_context(reaper, FdStore::default())).await.unwrap();
    let take = async |stdout: &str| {
        let stdio = Stdio { stdout: stdout.into(), ..Stdio::default() };
        io.pipe_for_file(&stdio, "stdout", &file, &io_context(reaper, FdStore::default())).await
    };
    assert!(take("").await.unwrap().is_none());
    let error = take("file:///var/log/well").await.unwrap_err();
    // The writer has looked at it, and names the log.
    assert!(error.report().starts_with("failed to open log file /var/log/well: Is a directory"), "{}", error.report());
}

async fn what_hangs_is_given_up(reaper: &Reaper) {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let (Ok(device), true) = (device, nix::unistd::geteuid().is_root()) else {
        eprintln!("SKIP what_hangs_is_given_up: /dev/fuse and root are needed");
        return;
    };
    // No request is ever answered.
    let dir = tempfile::tempdir().unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    mount(Some("mute"), dir.path(), Some("fuse.mute"), MsFlags::empty(), Some(options.as_str())).unwrap();
    let (mute, well) = (Offload::new("mute", reaper), Offload::new("well", reaper));
    let look = || mute.run_one("volume /mute", Work::IsBlockDevice(dir.path().join("x")));
    let given_up = async {
        let since = Instant::now();
        for given_up in join_all((0..MOST).map(|_| look())).await {
            let error = given_up.unwrap_err();
            assert_eq!(error.code(), Code::DeadlineExceeded);
            assert!(error.report().starts_with("volume /mute does not answer"), "{}", error.report());
        }
        since.elapsed()
    };
    let beside = async {
        // After those have their places.
        tokio::task::yield_now().await;
        let error = look().await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable, "{}", error.report());
        let since = Instant::now();
        well.run_one("a device", Work::IsBlockDevice("/dev/null".into())).await.unwrap();
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    };
    let (log, opened) =
        (a_log_that_hangs_is_given_up(reaper, dir.path()), an_opened_log_that_hangs_holds_nothing_up(reaper, dir.path()));
    let (ends, bounded) =
        (a_writer_whose_log_hangs_ends_by_itself(reaper, dir.path()), writers_of_hung_logs_are_bounded(reaper, dir.path()));
    let (took, (), (), (), (), ()) = tokio::join!(given_up, beside, log, opened, ends, bounded);
    assert!(took < Duration::from_secs(20), "{took:?}");
    // The device ends the filesystem; then there are places again.
    drop(device);
    look().await.unwrap();
    umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    eprintln!("test what_hangs_is_given_up ... ok");
}
