//! Devices of the node in a container.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use kuasar_tests::{ContainerSpec, process};

use crate::direct::a_root_file_system_on_a_disk;
use crate::suite::{Case, Entry, cases, refused};

pub(crate) fn cases() -> Vec<Entry> {
    // It speaks with kuasard as those of `direct` do, of which no other is for machines.
    let mut cases = cases![Machines Shared: a_root_file_system_on_a_disk];
    cases.extend(cases![Handlers Shared:
        the_usual_ones,
        one_that_is_asked_for,
        one_that_was_not_asked_for,
        one_that_does_not_exist,
        all_of_them,
        a_block_device,
    ]);
    cases
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
    let number = fs::metadata(device)?.rdev();
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

/// A block device of the node over a file, gone on drop.
pub(crate) struct LoopDevice(pub(crate) PathBuf);

impl LoopDevice {
    pub(crate) fn over(file: &Path) -> Result<Self> {
        let found = process::run(Command::new("losetup").args(["--find", "--show", "--direct-io=off"]).arg(file))?;
        Ok(Self(found.trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = process::run(Command::new("losetup").arg("--detach").arg(&self.0)) {
            eprintln!("{error:#}");
        }
    }
}

/// Writes to the device, flushes it, and reads what is behind it.
const WRITE: &str =
    "dd if=/dev/zero bs=4096 count=1 2>/dev/null | tr '\\0' c | dd of=/dev/data seek=1 bs=4096 conv=fsync,notrunc 2>/dev/null";

async fn a_block_device(case: &Case) -> Result<()> {
    if process::run(Command::new("losetup").arg("--find")).is_err() {
        return case.skip("no loop device is free, or no losetup");
    }
    let file = case.dir().join("disk");
    fs::write(&file, vec![b'n'; 1 << 20])?;
    let disk = LoopDevice::over(&file)?;
    let pod = case.quick_pod().await?;
    let with = |name: &str, permissions: &str| {
        let mut spec = ContainerSpec::new(name).sleep().device(&disk.0.display().to_string(), permissions);
        spec.config.devices[0].container_path = "/dev/data".to_owned();
        spec
    };
    let writer = pod.run(with("writer", "rwm")).await?;
    assert_eq!(writer.sh("head -c 4 /dev/data").await?.stdout(), "nnnn");
    let ran = writer.sh(WRITE).await?;
    assert_eq!(ran.exit_code, 0, "{ran:?}");
    let on_node =
        process::run(Command::new("dd").args(["bs=4096", "skip=1", "count=1", "iflag=direct", "status=none"]).arg({
            let mut from = std::ffi::OsString::from("if=");
            from.push(&disk.0);
            from
        }))?;
    assert_eq!(on_node, "c".repeat(4096));
    // Another container has it, too, by two names, and one of another pod.
    let mut twice = with("second", "rwm");
    let mut again = twice.config.devices[0].clone();
    again.container_path = "/dev/again".to_owned();
    twice.config.devices.push(again);
    let second = pod.run(twice).await?;
    assert_eq!(second.sh("dd if=/dev/again bs=4096 skip=1 count=1 2>/dev/null | head -c 4").await?.stdout(), "cccc");
    let other = case.quick_pod().await?;
    let elsewhere = other.run(with("elsewhere", "rwm")).await?;
    assert_eq!(elsewhere.sh("head -c 4 /dev/data").await?.stdout(), "nnnn");
    other.remove_all().await?;
    // One that may only read cannot write, whoever else can.
    let reader = pod.run(with("reader", "r")).await?;
    assert_ne!(reader.sh(WRITE).await?.exit_code, 0);
    reader.remove().await?;
    second.remove().await?;
    assert_eq!(writer.sh(WRITE).await?.exit_code, 0, "it is the writer's still");
    writer.remove().await?;
    // Another container finds what the first has written.
    let reader = pod.run(with("reader", "r")).await?;
    assert_eq!(reader.sh("dd if=/dev/data bs=4096 skip=1 count=1 2>/dev/null | head -c 4").await?.stdout(), "cccc");
    assert_ne!(reader.sh(WRITE).await?.exit_code, 0);
    reader.remove().await?;
    if case.is_machine() {
        // The machine has let go of it.
        let bare = pod.run(ContainerSpec::new("bare").sleep()).await?;
        assert_eq!(bare.sh("grep -c ' vd' /proc/partitions").await?.stdout(), "0\n");
    }
    Ok(())
}

async fn all_of_them(case: &Case) -> Result<()> {
    let Some(device) = device() else { return case.skip("no device that only privileged containers have") };
    let pod = case.run(case.spec().quick().privileged()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep().privileged()).await?;
    assert_eq!(container.sh(&format!("exec 3<{device}")).await?.exit_code, 0);
    Ok(())
}
