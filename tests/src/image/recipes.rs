//! The images themselves: what the tests use, and stand-ins for those that critest asks for by name.
//!
//! Base is the host's static busybox. Its applets are hard links, because critest masks and mounts over single programs,
//! which would follow a symbolic link to all of them.

use std::fs;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;

use super::{Recipe, Store};
use crate::{process, tools};

/// busybox, with `pgrep`, `ipcs`, `count`, and a shell as its command.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// The pause image that the runc shim puts into each pod.
pub const PAUSE: &str = "localhost/pause:1";
/// An HTTP server on port 80, or on `$PORT`; it answers `ok`.
pub const WEB: &str = "localhost/web:1";

/// `applets/applets.c`, static; what it does depends on the name it is run by.
static APPLETS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/applets"));

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    www-data:x:33:33:www-data:/var/www:/bin/false\n\
    nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const GROUP: &str = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

struct Busybox {
    program: Vec<u8>,
    applets: Vec<String>,
}

fn load_busybox() -> Result<Busybox> {
    let path = tools::busybox()?;
    let program = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
    if has_interpreter(&program) {
        bail!("{} is dynamically linked and would not run in an image: install busybox-static (`make deps`)", path.display());
    }
    let applets = process::run(Command::new(&path).arg("--list"))?;
    Ok(Busybox {
        program,
        applets: applets
            .lines()
            // Two are programs of ours below; busybox itself is what the others link to.
            .filter(|applet| !["busybox", "httpd", "pgrep", "ipcs"].contains(applet))
            .map(str::to_owned)
            .collect(),
    })
}

/// Whether an ELF file asks for a dynamic loader: all of them name theirs near the beginning.
fn has_interpreter(program: &[u8]) -> bool {
    let head = &program[..program.len().min(4096)];
    [b"/ld-linux".as_slice(), b"/ld-musl".as_slice(), b"/ld64.so".as_slice()]
        .iter()
        .any(|name| head.windows(name.len()).any(|window| window == *name))
}

fn busybox() -> Result<&'static Busybox> {
    static BUSYBOX: OnceLock<Result<Busybox, String>> = OnceLock::new();
    BUSYBOX.get_or_init(|| load_busybox().map_err(|error| format!("{error:#}"))).as_ref().map_err(|error| anyhow!("{error}"))
}

/// A root file system with busybox, a shell as its command.
///
/// # Errors
/// The host has no static busybox.
pub fn base() -> Result<Recipe> {
    base_with(PASSWD, GROUP)
}

fn base_with(passwd: &str, group: &str) -> Result<Recipe> {
    let busybox = busybox()?;
    let mut recipe = Recipe::new();
    for dir in
        ["bin", "etc", "root", "usr", "usr/bin", "usr/sbin", "usr/local", "usr/local/bin", "var", "var/run", "var/www", "home"]
    {
        recipe = recipe.dir(dir, 0o755);
    }
    recipe = recipe
        .dir("tmp", 0o1777)
        .file("etc/passwd", 0o644, passwd)
        .file("etc/group", 0o644, group)
        .file("bin/busybox", 0o755, busybox.program.clone())
        .file("usr/bin/pgrep", 0o755, APPLETS)
        .hard_link("usr/bin/ipcs", "usr/bin/pgrep")
        .hard_link("usr/bin/count", "usr/bin/pgrep")
        .hard_link("usr/bin/syscall", "usr/bin/pgrep");
    for applet in &busybox.applets {
        recipe = recipe.hard_link(&format!("bin/{applet}"), "bin/busybox");
    }
    Ok(recipe.config("Env", vec![PATH]).config("Cmd", vec!["/bin/sh"]))
}

/// busybox's shell runs what is built into it without a look at the files, so that critest's mask over `/bin/ls` would mask nothing. To a
/// copy of it that knows the program by another name, `ls` is one like others. `None` for a busybox of another making.
fn shell_that_looks_for_ls(busybox: &[u8]) -> Option<Vec<u8>> {
    // Its table of names, which stays in order: it is searched by halves.
    const NAMES: &[u8] = b"\0ls\0lsmod\0";
    let place = busybox.windows(NAMES.len()).position(|window| window == NAMES)?;
    let mut shell = busybox.to_vec();
    shell[place + 2] = b'r';
    Some(shell)
}

fn pause() -> Recipe {
    Recipe::new().file("pause", 0o755, APPLETS).config("Entrypoint", vec!["/pause"]).config("User", "65535:65535")
}

fn web(program: &str, command: &[&str], port: Option<u16>) -> Result<Recipe> {
    let mut env = vec![PATH.to_owned()];
    env.extend(port.map(|port| format!("PORT={port}")));
    Ok(base()?.hard_link(program, "usr/bin/pgrep").config("Cmd", command).config("Env", env))
}

/// What every node imports.
///
/// # Errors
/// The host has no static busybox.
pub fn for_tests() -> Result<Store> {
    let mut store = Store::new();
    store.build(&[PAUSE], &pause())?;
    store.build(&[BUSYBOX], &base()?)?;
    store.build(&[WEB], &web("usr/sbin/nginx", &["nginx"], None)?)?;
    Ok(store)
}

/// Stand-ins for the images that critest pulls.
///
/// One is missing: `test-image-digest@sha256:9700…` names the content of a real image, which cannot be made up.
///
/// # Errors
/// The host has no static busybox.
pub fn for_critest() -> Result<Store> {
    const E2E: &str = "registry.k8s.io/e2e-test-images";
    const CRI: &str = "gcr.io/k8s-staging-cri-tools";
    let mut store = Store::new();

    let mut shell = base()?;
    if let Some(program) = shell_that_looks_for_ls(&busybox()?.program) {
        shell = shell.layer().file("bin/sh", 0o755, program);
    }
    store.build(&[format!("{E2E}/busybox:1.29-2")], &shell)?;
    let nginx = web("usr/sbin/nginx", &["nginx", "-g", "daemon off;"], None)?;
    store.build(&[format!("{E2E}/nginx:1.14-2")], &nginx)?;
    let httpd = web("usr/local/bin/httpd", &["httpd"], None)?;
    store.build(&[format!("{E2E}/httpd:2.4.39-4")], &httpd)?;
    let hostnet = web("usr/sbin/nginx", &["nginx", "-g", "daemon off;"], Some(12003))?;
    for name in ["hostnet-nginx-amd64", "hostnet-nginx-arm64", "hostnet-nginx"] {
        store.build(&[format!("{CRI}/{name}:latest")], &hostnet)?;
    }
    let nnp = base()?.file("nnp", 0o4755, APPLETS).config("Cmd", vec!["/nnp"]).config("User", "1000");
    store.build(&[format!("{E2E}/nonewprivs:1.3")], &nnp)?;
    // Of another digest than the one that the node itself uses, or that one's name would be counted among its tags.
    let pause = pause().config("Labels", json!({ "for": "critest" }));
    store.build(&["registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9"], &pause)?;

    // Each needs a digest of its own; some are run, too.
    let base = base()?;
    let marked = |mark: &str| base.clone().layer().file("mark", 0o644, mark);
    store.build(&[format!("{CRI}/test-image-latest:latest")], &marked("latest"))?;
    for tag in ["test", "all"] {
        store.build(&[format!("{CRI}/test-image-tag:{tag}")], &marked(tag))?;
    }
    let tags: Vec<String> = (1..=3).map(|tag| format!("{CRI}/test-image-tags:{tag}")).collect();
    store.build(&tags, &marked("tags"))?;
    for number in 1..=3 {
        store.build(&[format!("{CRI}/test-image-{number}:latest")], &marked(&number.to_string()))?;
    }
    for (name, user) in
        [("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:1004"), ("username-group", "www-data:1004")]
    {
        let recipe = marked(name).config("User", user);
        store.build(&[format!("{CRI}/test-image-user-{name}:latest")], &recipe)?;
    }
    let predefined = base_with(
        &format!("{PASSWD}default-user:x:1000:1000::/home:/bin/sh\n"),
        &format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n"),
    )?
    .config("User", "1000");
    store.build(&[format!("{CRI}/test-image-predefined-group:latest")], &predefined)?;
    Ok(store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_looks_for_ls() {
        let table = b"x\0losetup\0ls\0lsmod\0lsscsi\0";
        assert_eq!(shell_that_looks_for_ls(table).unwrap(), b"x\0losetup\0lr\0lsmod\0lsscsi\0");
        assert_eq!(shell_that_looks_for_ls(b"another"), None);
    }
}
