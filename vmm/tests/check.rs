//! What a sandboxer needs before its first pod, and how it says what is missing: with programs that only say that they are there.

#![allow(clippy::unwrap_used, reason = "what fails fails the test")]

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use kuasar_sandboxers::{Code, reaper::Reaper};
use kuasar_vmm::{
    HypervisorConfig, VmmConfig, VmmSandboxer,
    qemu::{Accel, QemuConfig},
};

fn script(path: &Path, text: &str) -> PathBuf {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_owned()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A configuration with which all is well, in a directory.
fn config(dir: &Path) -> VmmConfig {
    let mut kernel = vec![0; 1024];
    kernel[514..518].copy_from_slice(b"HdrS");
    fs::write(dir.join("vmlinuz"), kernel).unwrap();
    fs::write(dir.join("initrd"), "070701").unwrap();
    fs::write(dir.join("junk"), "junk").unwrap();
    let path = Some(script(&dir.join("qemu"), "echo QEMU emulator version 9.1.0"));
    let hypervisor = HypervisorConfig::Qemu(QemuConfig { path, accel: Accel::Tcg, ..QemuConfig::default() });
    VmmConfig {
        kernel: Some(dir.join("vmlinuz")),
        virtiofsd: Some(script(&dir.join("virtiofsd"), "echo virtiofsd 1.14.0")),
        vsock_device: Some(script(&dir.join("vsock"), "exit 1")),
        ..VmmConfig::new(hypervisor, dir.join("root"))
    }
}

#[tokio::test]
async fn what_is_missing_is_named_before_the_first_pod_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let reaper = Reaper::install().unwrap();
    let good = config(dir.path());
    let before = names(dir.path());
    let found = VmmSandboxer::check(&good, &reaper).await.unwrap();
    assert!(found.contains("QEMU 9.1.0 (q35, TCG), virtiofsd 1.14 (") && found.contains("vsock by "), "{found}");
    let none = || Some(dir.path().join("none"));
    let junk = || Some(dir.path().join("junk"));
    let qemu = |path| HypervisorConfig::Qemu(QemuConfig { path, accel: Accel::Tcg, ..QemuConfig::default() });
    let old = script(&dir.path().join("old"), "echo 'virtiofsd version 7.2.22 (Debian)'");
    let before = [before, vec!["old".into()]].concat().into_iter().collect::<std::collections::BTreeSet<_>>();
    for (bad, words) in [
        (
            VmmConfig { hypervisor: qemu(none()), ..good.clone() },
            ["QEMU is unavailable: ", "none does not exist; install QEMU"],
        ),
        (VmmConfig { virtiofsd: none(), ..good.clone() }, ["virtiofsd is unavailable: ", "does not exist; install virtiofsd"]),
        (
            VmmConfig { virtiofsd: Some(old), ..good.clone() },
            ["virtiofsd is unavailable: ", "is the old virtiofsd of QEMU, in C"],
        ),
        (
            VmmConfig { vsock_device: none(), ..good.clone() },
            ["vhost-device-vsock is unavailable: ", "none is no program; install"],
        ),
        (
            VmmConfig { vsock_device: junk(), ..good.clone() },
            ["vhost-device-vsock is unavailable: ", "junk is no program; install"],
        ),
        (VmmConfig { kernel: none(), ..good.clone() }, ["the guest's kernel is unavailable: ", "cannot be read: No such file"]),
        (
            VmmConfig { kernel: Some(dir.path().into()), ..good.clone() },
            ["the guest's kernel is unavailable: ", "cannot be read: Is a dir"],
        ),
        (
            VmmConfig { kernel: junk(), ..good.clone() },
            ["the guest's kernel is unavailable: ", "junk is no bzImage; make one with"],
        ),
        (VmmConfig { initrd: none(), ..good.clone() }, ["the guest's initrd is unavailable: ", "cannot be read: No such file"]),
        (
            VmmConfig { initrd: junk(), ..good.clone() },
            ["the guest's initrd is unavailable: ", "junk is no initrd (cpio, gzip"],
        ),
        (VmmConfig { debug: true, ..good.clone() }, ["the guest's initrd is unavailable: ", "initrd-debug cannot be read"]),
    ] {
        let checked = VmmSandboxer::check(&bad, &reaper).await.unwrap_err();
        let opened = VmmSandboxer::open(bad, reaper.clone()).await.unwrap_err();
        assert_eq!((checked.code(), opened.code(), checked.report()), (Code::Unavailable, Code::Unavailable, opened.report()));
        let report = checked.report();
        assert!(report.starts_with(words[0]) && report.contains(words[1]), "{report}");
        assert_eq!(names(dir.path()), before.iter().cloned().collect::<Vec<_>>(), "{report}");
    }
    VmmSandboxer::open(good, reaper).await.unwrap();
    assert!(dir.path().join("root").is_dir());
}
