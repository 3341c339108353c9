//! Helpers for work on files: this executable is its own helper, so it has a `main` of its own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::fd::AsRawFd,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use futures::future::join_all;
use kuasar_sandboxers::{
    Code,
    offload::{self, Done, MOST, Offload, Step, Work},
    reaper::Reaper,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

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
        what_hangs_is_given_up(&reaper).await;
    });
    runtime.block_on(tests).unwrap();
    ExitCode::SUCCESS
}

async fn results_and_errors_come_back(offload: &Offload) {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("made/for/it/log");
    let Done::Opened(file) = offload.run_one("the log", Work::OpenLog(log.clone())).await.unwrap() else { panic!("no file") };
    File::from(file).write_all(b"a line\n").unwrap();
    assert_eq!(fs::read_to_string(&log).unwrap(), "a line\n");
    // Up to the first failure, whose words and code are the helper's.
    let later = dir.path().join("later");
    let step = |path: &Path| Step { what: "a log".into(), work: Work::OpenLog(path.to_owned()) };
    let error = offload.run(vec![step(&log), step(dir.path()), step(&later)]).await.unwrap_err();
    assert!(error.report().contains(&dir.path().display().to_string()), "{}", error.report());
    assert_eq!(error.code(), Code::Internal);
    assert!(!later.exists());
    let answer = offload.run_one("a device", Work::IsBlockDevice("/dev/null".into())).await.unwrap();
    assert!(matches!(answer, Done::Answer(false)), "{answer:?}");
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
    let (took, ()) = tokio::join!(given_up, beside);
    assert!(took < Duration::from_secs(20), "{took:?}");
    // The device ends the filesystem; then there are places again.
    drop(device);
    look().await.unwrap();
    umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    eprintln!("test what_hangs_is_given_up ... ok");
}
