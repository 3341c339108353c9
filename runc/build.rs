//! Builds `init/main.rs`: a static executable of a few KiB that runs from a memfd (see `src/program.rs`).
//!
//! Cargo cannot yet build another crate's binary with its own flags as part of a library (artifact dependencies are unstable), so
//! the compiler is called directly. The program has no dependencies, not even the standard library.

use std::{env, path::PathBuf, process::Command};

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}

fn main() {
    println!("cargo::rerun-if-changed=init");
    let source = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("init/main.rs");
    let output = PathBuf::from(variable("OUT_DIR")).join("kuasar-init");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.arg(source).arg("-o").arg(output);
    rustc.args(["--edition", "2024", "--crate-name", "kuasar_init", "--crate-type", "bin"]);
    rustc.args(["--target", &variable("TARGET"), "-D", "warnings"]);
    // Few pages, each shared by every pod: no unwinding tables, no relocations, no separate read-only segment.
    for flag in [
        "panic=abort",
        "opt-level=s",
        "lto=fat",
        "codegen-units=1",
        "strip=symbols",
        "relocation-model=static",
        "force-unwind-tables=no",
        "debuginfo=0",
        "target-feature=+crt-static",
    ] {
        rustc.args(["-C", flag]);
    }
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,noseparate-code",
        "-Wl,--gc-sections",
    ] {
        rustc.arg("-C").arg(format!("link-arg={argument}"));
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    // Flags for the host program (coverage, sanitizers) would need a runtime that this one does not have.
    for name in ["CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS"] {
        rustc.env_remove(name);
    }
    match rustc.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("building init/main.rs failed: {status}"),
        Err(error) => panic!("cannot run {rustc:?}: {error}"),
    }
}
