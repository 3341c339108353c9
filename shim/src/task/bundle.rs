//! A Create request and the bundle directory it names, as a [`ContainerSpec`].

use std::{
    fs::File,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::{self, CreateTaskRequest};
use kuasar_sandboxers::{
    Error, Result,
    id::{ContainerId, SandboxId},
    spec::OciSpec,
    stdio::Stdio,
    types::{ContainerSpec, Mount},
};

/// What containerd calls the file in a bundle that names the container's sandbox.
const SANDBOX_FILE: &str = "sandbox";
/// The annotation that names it too, when the CRI plugin has made the spec.
const SANDBOX_ANNOTATION: &str = "io.kubernetes.cri.sandbox-id";
/// The largest file read from a bundle, in bytes. containerd's specs have some ten thousand.
const FILE_LIMIT: u64 = 16 << 20;

/// Reads the bundle. Its files were written a moment ago, so this takes microseconds and needs no thread of its own.
///
/// # Errors
/// [`Error::Invalid`] or [`Error::Unsupported`] for what is wrong with the request, [`Error::Io`] when the bundle cannot be read.
pub(super) fn read(id: ContainerId, request: CreateTaskRequest) -> Result<(SandboxId, ContainerSpec)> {
    if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
        return Err(no_checkpoints());
    }
    let bundle = PathBuf::from(request.bundle);
    if !bundle.is_absolute() {
        return Err(Error::invalid("bundle", format!("{:?} is not an absolute path", bundle.display())));
    }
    let config = file(&bundle.join("config.json"))?
        .ok_or_else(|| Error::invalid("bundle", format!("there is no config.json in {}", bundle.display())))?;
    let spec = OciSpec::parse(&config)?;
    let sandbox = sandbox(&bundle, &spec)?;
    let spec = ContainerSpec {
        id,
        bundle,
        spec,
        rootfs: request.rootfs.into_iter().map(mount).collect(),
        stdio: Stdio { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal },
    };
    Ok((sandbox, spec))
}

/// The refusal of checkpoints, in either direction.
pub(super) fn no_checkpoints() -> Error {
    Error::Unsupported {
        operation: "checkpoint and restore",
        why: "no sandboxer here makes checkpoints; start the container from its image".into(),
    }
}

/// The sandbox a container belongs to. containerd writes a file; the annotation is for what was created without it.
fn sandbox(bundle: &Path, spec: &OciSpec) -> Result<SandboxId> {
    if let Some(name) = file(&bundle.join(SANDBOX_FILE))? {
        let name = String::from_utf8_lossy(&name);
        return name.trim_end().parse();
    }
    let annotation = spec.as_value().get("annotations").and_then(|all| all.get(SANDBOX_ANNOTATION));
    let name = annotation.and_then(|name| name.as_str()).ok_or_else(|| {
        let why = format!(
            "the container names none: {} has no file {SANDBOX_FILE:?} and config.json no annotation {SANDBOX_ANNOTATION}",
            bundle.display()
        );
        Error::invalid("sandbox", why)
    })?;
    name.parse()
}

/// A file of the bundle; `None` where there is none.
fn file(path: &Path) -> Result<Option<Vec<u8>>> {
    let opened = match File::open(path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut content = Vec::new();
    opened.take(FILE_LIMIT + 1).read_to_end(&mut content).map_err(Error::io("read", path))?;
    if content.len() as u64 > FILE_LIMIT {
        return Err(Error::invalid("bundle", format!("{} is larger than {FILE_LIMIT} bytes", path.display())));
    }
    Ok(Some(content))
}

fn mount(mount: api::Mount) -> Mount {
    Mount { kind: mount.type_, source: mount.source, target: mount.target, options: mount.options }
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;

    use super::*;

    const CONFIG: &str = r#"{"process":{"args":["a"]},"root":{"path":"rootfs"},
        "annotations":{"io.kubernetes.cri.sandbox-id":"from-annotation"}}"#;

    fn bundle(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        dir
    }

    fn request(dir: &tempfile::TempDir) -> CreateTaskRequest {
        CreateTaskRequest { bundle: dir.path().display().to_string(), stdout: "/fifo".into(), ..Default::default() }
    }

    fn read_it(request: CreateTaskRequest) -> Result<(SandboxId, ContainerSpec)> {
        read("c1".parse().unwrap(), request)
    }

    #[test]
    fn the_sandbox_file_comes_before_the_annotation() {
        let dir = bundle(&[("config.json", CONFIG), ("sandbox", "from-file\n")]);
        assert_eq!(read_it(request(&dir)).unwrap().0.as_str(), "from-file");
        let dir = bundle(&[("config.json", CONFIG)]);
        let mut with_mounts = request(&dir);
        with_mounts.rootfs = vec![api::Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec!["ro".into()],
            ..Default::default()
        }];
        let (sandbox, spec) = read_it(with_mounts).unwrap();
        assert_eq!(sandbox.as_str(), "from-annotation");
        assert_eq!((spec.rootfs[0].kind.as_str(), spec.rootfs[0].options.as_slice()), ("overlay", &["ro".to_owned()][..]));
        assert_eq!((spec.id.as_str(), spec.stdio.stdout.as_str()), ("c1", "/fifo"));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let none = bundle(&[]);
        let text = bundle(&[("config.json", "not json")]);
        let bare = bundle(&[("config.json", r#"{"process":{"args":["a"]},"root":{"path":"r"}}"#)]);
        let rootless = bundle(&[("config.json", r#"{"process":{"args":["a"]}}"#)]);
        let outside = bundle(&[("config.json", CONFIG), ("sandbox", "../x")]);
        for (dir, word) in
            [(&none, "config.json"), (&text, "not JSON"), (&bare, "annotation"), (&rootless, "root"), (&outside, "../x")]
        {
            let error = read_it(request(dir)).unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{}", error.report());
            assert!(error.report().contains(word), "{}", error.report());
        }
        let relative = CreateTaskRequest { bundle: "here".into(), ..Default::default() };
        assert_eq!(read_it(relative).unwrap_err().code(), Code::InvalidArgument);
        let restore = CreateTaskRequest { checkpoint: "/c".into(), ..request(&none) };
        assert_eq!(read_it(restore).unwrap_err().code(), Code::Unimplemented);
    }

    #[test]
    fn a_huge_file_is_refused() {
        let dir = bundle(&[]);
        File::create(dir.path().join("config.json")).unwrap().set_len(FILE_LIMIT + 1).unwrap();
        assert_eq!(read_it(request(&dir)).unwrap_err().code(), Code::InvalidArgument);
    }
}
