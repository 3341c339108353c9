//! Devices of the node in a container.

use std::path::Path;

use anyhow::{Result, ensure};
use kuasar_tests::ContainerSpec;

use crate::suite::{Case, Entry, cases, refused};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Handlers Shared:
        the_usual_ones,
        one_that_is_asked_for,
        one_that_was_not_asked_for,
        one_that_does_not_exist,
        all_of_them,
    ]
}

/// A device that no container has unless it asks for it, and that bears to be opened.
fn device() -> Option<&'static str> {
    ["/dev/loop-control", "/dev/fuse", "/dev/kmsg"].into_iter().find(|path| Path::new(path).exists())
}

async fn the_usual_ones(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let script = "cd /dev && head -c 4 zero | wc -c && head -c 4 urandom | wc -c && echo x >null && echo x >full";
    let ran = container.sh(script).await?;
    assert_eq!(ran.stdout(), "4\n4\n");
    assert!(ran.stderr().contains("No space left"), "{ran:?}");
    let ran = container.sh("ls -d /dev/random /dev/tty /dev/ptmx /dev/pts /dev/shm /dev/mqueue /dev/fd /dev/stdin").await?;
    assert_eq!(ran.exit_code, 0, "{ran:?}");
    Ok(())
}

async fn one_that_is_asked_for(case: &Case) -> Result<()> {
    let Some(device) = device() else { return case.skip("no device that could be given to a container") };
    let pod = case.quick_pod().await?;
    let both = pod.run(ContainerSpec::new("both").sleep().device(device, "rwm")).await?;
    assert_eq!(both.sh(&format!("exec 3<>{device}")).await?.exit_code, 0);
    let read = pod.run(ContainerSpec::new("read").sleep().device(device, "r")).await?;
    assert_eq!(read.sh(&format!("exec 3<{device}")).await?.exit_code, 0);
    let ran = read.sh(&format!("exec 3>{device}")).await?;
    assert!(ran.stderr().contains("not permitted"), "{ran:?}");
    let mut elsewhere = ContainerSpec::new("elsewhere").sleep().device(device, "rw");
    elsewhere.config.devices[0].container_path = "/dev/by-another-name".to_owned();
    let elsewhere = pod.run(elsewhere).await?;
    assert_eq!(elsewhere.sh("exec 3</dev/by-another-name").await?.exit_code, 0);
    Ok(())
}

async fn one_that_was_not_asked_for(case: &Case) -> Result<()> {
    let Some(device) = device() else { return case.skip("no device that could be withheld") };
    let container = case.sleeper().await?;
    ensure!(container.exec(["test", "-e", device]).await?.exit_code != 0);
    // It can make the node; the kernel does not let it in.
    use std::os::unix::fs::MetadataExt as _;
    let number = std::fs::metadata(device)?.rdev();
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let ran = container.sh(&format!("mknod /made c {major} {minor} && exec 3</made")).await?;
    assert!(ran.stderr().contains("not permitted"), "{ran:?}");
    Ok(())
}

async fn one_that_does_not_exist(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    refused(pod.create(ContainerSpec::new("c").sleep().device("/dev/no-such", "rwm")).await, &["/dev/no-such"])?;
    Ok(())
}

async fn all_of_them(case: &Case) -> Result<()> {
    let Some(device) = device() else { return case.skip("no device that only privileged containers have") };
    let pod = case.run(case.spec().quick().privileged()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep().privileged()).await?;
    assert_eq!(container.sh(&format!("exec 3<{device}")).await?.exit_code, 0);
    Ok(())
}
