//! The daemon's binary: what it refuses to start with, and what it says then.
#![allow(clippy::unwrap_used, clippy::expect_used)] // also in what is no test function

use std::{
    path::Path,
    process::{Command, Output},
};

use kuasar_shim::server::StateDir;

fn kuasard(dir: &Path, config: &str) -> Output {
    let file = dir.join("kuasar.toml");
    std::fs::write(&file, config).unwrap();
    Command::new(env!("CARGO_BIN_EXE_kuasard"))
        .args([Path::new("--config"), &file, Path::new("--state"), &dir.join("state"), Path::new("--root"), &dir.join("root")])
        .output()
        .unwrap()
}

fn refusal(output: &Output) -> &str {
    assert_eq!(output.status.code(), Some(1));
    std::str::from_utf8(&output.stderr).unwrap()
}

#[test]
fn every_fault_of_the_configuration_is_told_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let output = kuasard(dir.path(), "typo = 1\n[log]\nlevel = 'loud'\n[sandboxer.x]\nkind = 'none'\n");
    let said = refusal(&output);
    for fault in ["typo", "log.level", "sandboxer.x.kind"] {
        assert!(said.contains(fault), "{said}");
    }
    assert!(!dir.path().join("state").exists());
}

#[test]
fn a_missing_configuration_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.toml");
    let output = Command::new(env!("CARGO_BIN_EXE_kuasard")).arg("--config").arg(&missing).output().unwrap();
    assert!(refusal(&output).contains(missing.to_str().unwrap()));
}

#[test]
fn a_missing_oci_runtime_is_named_and_no_socket_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let output = kuasard(dir.path(), "[sandboxer.kuasar-runc]\nkind = 'runc'\nruntime = '/no/such/runtime'\n");
    let said = refusal(&output);
    assert!(said.contains("kuasar-runc") && said.contains("/no/such/runtime"), "{said}");
    for socket in ["kuasard.sock", "task.sock"] {
        assert!(!dir.path().join("state").join(socket).exists(), "{socket}");
    }
}

#[test]
fn a_second_daemon_on_the_same_state_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let _first = StateDir::claim(&dir.path().join("state")).unwrap();
    let output = kuasard(dir.path(), "");
    let said = refusal(&output);
    assert!(said.contains(&format!("process {}", std::process::id())) && said.contains("--state"), "{said}");
}
