//! Compiles `applets/applets.c`, which goes into the images of the tests: static, so that it runs in an empty root.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

fn main() -> Result<()> {
    println!("cargo::rerun-if-changed=applets/applets.c");
    println!("cargo::rerun-if-env-changed=CC");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").context("no OUT_DIR: run through cargo")?).join("applets");
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let status = Command::new(&cc)
        .args(["-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&out)
        .arg("applets/applets.c")
        .status()
        .with_context(|| format!("no C compiler {cc}: run `make deps`"))?;
    if !status.success() {
        bail!("{cc} cannot link a static program: run `make deps` (libc6-dev has the static libc)");
    }
    Ok(())
}
