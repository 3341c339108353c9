//! The direction of dependencies between the folders, as docs/architecture.md says.

#![allow(clippy::unwrap_used, reason = "what cannot be read fails the test")]

use std::{collections::BTreeSet, env, process::Command};

use serde_json::Value;

/// What each crate of the workspace may use of the others.
const ALLOWED: [(&str, &[&str]); 7] = [
    ("kuasar-sandboxers", &[]),
    ("kuasar-runc", &["kuasar-sandboxers"]),
    ("kuasar-guest-protocol", &[]),
    ("kuasar-guest-agent", &["kuasar-sandboxers", "kuasar-runc", "kuasar-guest-protocol"]),
    ("kuasar-vmm", &["kuasar-sandboxers", "kuasar-guest-protocol"]),
    ("kuasar-shim", &["kuasar-sandboxers", "kuasar-runc", "kuasar-vmm"]),
    ("kuasar-tests", &["kuasar-sandboxers", "kuasar-runc", "kuasar-vmm", "kuasar-guest-protocol", "kuasar-shim"]),
];

/// Names that no shared crate may mention as a word of its code: a backend there would be a leak of one technique into all.
const BACKENDS: [&str; 3] = ["kuasar_runc", "containerd_shim_protos", "k8s_cri"];

fn packages() -> Vec<Value> {
    let cargo = env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
    let arguments = ["metadata", "--format-version=1", "--no-deps", "--offline", "--manifest-path", manifest];
    let output = Command::new(cargo).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

#[test]
fn dependencies_point_inwards() {
    let packages = packages();
    let names: BTreeSet<_> = packages.iter().map(|package| package["name"].as_str().unwrap()).collect();
    assert_eq!(names, ALLOWED.iter().map(|(name, _)| *name).collect(), "a crate without a rule here");
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let (_, allowed) = ALLOWED.iter().find(|(known, _)| *known == name).unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let dependency = dependency["name"].as_str().unwrap();
            let ours = names.contains(dependency) && dependency != name;
            assert!(!ours || allowed.contains(&dependency), "{name} must not depend on {dependency}");
        }
    }
}

#[test]
fn the_shared_crate_names_no_backend_and_no_message_of_containerd() {
    let mut folders = vec![concat!(env!("CARGO_MANIFEST_DIR"), "/../sandboxers/src").into()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir::<std::path::PathBuf>(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for name in BACKENDS {
                assert!(!text.contains(name), "{} names {name}", path.display());
            }
        }
    }
}
