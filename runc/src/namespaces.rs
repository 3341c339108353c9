//! A pod's namespaces: made before its first container, and where its containers find them.
//!
//! ```text
//!   network   the file that containerd gives: CNI has filled it already
//!   user      owner of that network namespace, which containerd made inside it; without one, a new one
//!   ipc, uts  new; host name and kernel parameters are set from inside
//!   pid       new if the pod shares it, with kuasar-init as process 1
//! ```
//!
//! A namespace lives as long as something holds it: process 1 where there is one, else a bind mount on a file, so that pods
//! that do not share process ids cost no process at all.

use std::{
    ffi::OsString,
    fs::{self, DirBuilder, File},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{DirBuilderExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
};

use kuasar_sandboxers::{
    Error, Result, mount,
    process::{Tracked, command_lines},
    reaper::{ExitFuture, Reaper},
    stages,
    types::{IdMapping, IdMappings, NamespaceMode, SandboxSpec},
    undo::Undo,
};
use serde::{Deserialize, Serialize};

use crate::{program::InitProgram, sys, sysctl};

/// The longest host name (uname(2)).
const HOST_NAME_MAX: usize = 64;

/// As pause containers have it: the last process of the pod that the kernel should kill for want of memory.
const INIT_OOM_SCORE: i32 = -998;

/// Where the namespaces of a pod are; `None` is the node's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Namespaces {
    pub(crate) network: Option<PathBuf>,
    pub(crate) ipc: Option<PathBuf>,
    pub(crate) uts: Option<PathBuf>,
    pub(crate) user: Option<PathBuf>,
    pub(crate) pid: PidNamespace,
}

/// Process ids, of which a container may have its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PidNamespace {
    /// The pod's containers share these.
    Shared(PathBuf),
    /// Each container has its own.
    #[default]
    Own,
    /// The node's.
    Node,
}

/// Namespaces that have been made, and process 1 in them, if there is one.
pub(crate) struct Made {
    pub(crate) namespaces: Namespaces,
    pub(crate) init: Option<(Tracked, ExitFuture)>,
}

/// Finds what is wrong with a pod's namespaces before anything is made.
///
/// # Errors
/// [`Error::Invalid`].
pub(crate) fn check(spec: &SandboxSpec) -> Result<()> {
    sysctl::arguments(spec)?;
    if spec.hostname.len() > HOST_NAME_MAX || spec.hostname.contains('\0') {
        let why = format!("it has {} bytes; the kernel takes at most {HOST_NAME_MAX}", spec.hostname.len());
        return Err(Error::invalid(format!("hostname {:?}", spec.hostname), why));
    }
    let pod_network = spec.namespaces.network != NamespaceMode::Node;
    match &spec.netns {
        Some(path) if pod_network => drop(open_netns(path)?),
        None if pod_network => {
            return Err(Error::invalid("netns", "the pod has its own network but no path to its namespace was given"));
        }
        _ => {}
    }
    if let Some(mappings) = &spec.namespaces.user
        && (mappings.uids.is_empty() || mappings.gids.is_empty())
    {
        return Err(Error::invalid("user namespace", "it maps no user or no group ids"));
    }
    Ok(())
}

/// Whether making a pod's namespaces takes kuasar-init: not where it has none of its own, as within a machine that is the pod's.
///
/// # Errors
/// As for [`check`].
pub(crate) fn need_program(spec: &SandboxSpec) -> Result<bool> {
    Ok(new_namespaces(spec) != 0 || spec.namespaces.user.is_some() || !sysctl::arguments(spec)?.is_empty())
}

/// Flags (clone(2)) of those that are to be made, but for the user namespace.
fn new_namespaces(spec: &SandboxSpec) -> i32 {
    let modes = &spec.namespaces;
    let uts = modes.network != NamespaceMode::Node;
    let new = [
        (modes.ipc != NamespaceMode::Node, libc::CLONE_NEWIPC),
        (uts, libc::CLONE_NEWUTS),
        (modes.pid == NamespaceMode::Pod, libc::CLONE_NEWPID),
    ];
    new.into_iter().filter_map(|(wanted, flag)| wanted.then_some(flag)).sum()
}

/// Opens a network namespace, if it is one.
fn open_netns(path: &Path) -> Result<File> {
    let field = || format!("netns {}", path.display());
    let file = File::open(path).map_err(|error| Error::invalid(field(), format!("it cannot be opened: {error}")))?;
    match sys::namespace_kind(file.as_fd()) {
        Ok(libc::CLONE_NEWNET) => Ok(file),
        Ok(_) => Err(Error::invalid(field(), "it is a namespace of another kind")),
        Err(_) => Err(Error::invalid(field(), "it is not a network namespace; was it unmounted?")),
    }
}

/// Makes the namespaces of a pod. `dir` is the sandbox's own directory, and what process 1 is recognised by; the program is there where
/// [`need_program`] says so.
///
/// # Errors
/// Which step failed. What was made is on the `undo` stack.
pub(crate) async fn make(
    spec: &SandboxSpec,
    dir: &Path,
    program: Option<&InitProgram>,
    reaper: &Reaper,
    undo: &mut Undo,
) -> Result<Made> {
    let modes = &spec.namespaces;
    let shares_pid = modes.pid == NamespaceMode::Pod;
    let pod_network = modes.network != NamespaceMode::Node;
    let (ipc, uts) = (modes.ipc != NamespaceMode::Node, pod_network);
    let netns = spec.netns.as_deref().filter(|_| pod_network);

    stages::enter("open the namespaces that the pod was given");
    let mut arguments: Vec<OsString> = Vec::new();
    let opened = netns.map(open_netns).transpose()?;
    if let Some(path) = netns {
        arguments.push(argument("netns", path.as_os_str().as_bytes()));
    }
    // Open until the helper has joined it.
    let _user = match &modes.user {
        Some(mappings) => user_namespace(mappings, opened.as_ref(), &mut arguments)?,
        None => None,
    };
    let new = new_namespaces(spec);
    let pid = if modes.pid == NamespaceMode::Node { PidNamespace::Node } else { PidNamespace::Own };
    let mut namespaces = Namespaces { network: netns.map(Path::to_owned), pid, ..Namespaces::default() };
    let Some(program) = program else { return Ok(Made { namespaces, init: None }) };
    arguments.push(format!("new={new}").into());
    if uts && !spec.hostname.is_empty() {
        arguments.push(argument("hostname", spec.hostname.as_bytes()));
    }
    arguments.extend(sysctl::arguments(spec)?);

    let made = [("ipc", ipc), ("uts", uts), ("user", modes.user.is_some())];
    let made = made.into_iter().filter_map(|(kind, made)| made.then_some(kind));
    let mut init = None;
    if shares_pid {
        stages::enter("make the pod's namespaces, its sysctls and its process 1");
        arguments.push(argument("root", program.empty_root().as_os_str().as_bytes()));
        arguments.push(format!("oom={INIT_OOM_SCORE}").into());
        arguments.push(argument("init", dir.as_os_str().as_bytes()));
        let mark = reaper.mark();
        let pid = program.run(&arguments).await?;
        let exit = reaper.exit_of(pid, mark);
        let process = Tracked::open(pid)?.ok_or_else(|| Error::failed("start the pod's process 1")("it ended at once"))?;
        let identity = process.identity();
        undo.push("kill the pod's process 1", async move {
            Tracked::find(identity)?.map_or(Ok(false), |init| init.signal(libc::SIGKILL)).map(drop)
        });
        for kind in made.chain(["pid"]) {
            namespaces.set(kind, format!("/proc/{pid}/ns/{kind}").into());
        }
        init = Some((process, exit));
    } else {
        stages::enter("make the pod's namespaces and its sysctls");
        let pins = pins(dir);
        DirBuilder::new().recursive(true).mode(0o711).create(&pins).map_err(Error::io("create", &pins))?;
        let dir = dir.to_owned();
        undo.push("let the pod's namespaces go", async move { release(&dir).await });
        for kind in made {
            let file = pins.join(kind);
            arguments.push(argument(&format!("pin={kind}:"), file.as_os_str().as_bytes()));
            namespaces.set(kind, file);
        }
        program.run(&arguments).await?;
    }
    Ok(Made { namespaces, init })
}

/// Lets go of namespaces that are pinned below the sandbox's own directory. None is fine.
pub(crate) async fn release(dir: &Path) -> Result<()> {
    let pins = pins(dir);
    mount::unmount_all(&pins).await?;
    match fs::remove_dir_all(&pins) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", pins)(error)),
        _ => Ok(()),
    }
}

fn pins(dir: &Path) -> PathBuf {
    dir.join("ns")
}

/// `key=value`; a key that ends with `:` has its `=` already.
fn argument(key: &str, value: &[u8]) -> OsString {
    let mut bytes = key.as_bytes().to_vec();
    if !key.ends_with(':') {
        bytes.push(b'=');
    }
    bytes.extend_from_slice(value);
    OsString::from_vec(bytes)
}

/// Adds the arguments for the pod's user namespace; returns what has to stay open meanwhile.
fn user_namespace(mappings: &IdMappings, netns: Option<&File>, arguments: &mut Vec<OsString>) -> Result<Option<File>> {
    let Some(netns) = netns else {
        arguments.push(argument("uidmap", lines(&mappings.uids).as_bytes()));
        arguments.push(argument("gidmap", lines(&mappings.gids).as_bytes()));
        return Ok(None);
    };
    let owner = sys::owning_user_namespace(netns).map_err(Error::failed("find the owner of the pod's network namespace"))?;
    let owner = File::from(owner);
    let ours = fs::metadata("/proc/self/ns/user").map_err(Error::io("look at", "/proc/self/ns/user"))?;
    let theirs = owner.metadata().map_err(Error::failed("look at the pod's user namespace"))?;
    if (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) {
        return Err(Error::invalid(
            "netns",
            "it belongs to the node's user namespace, but the pod wants one of its own; make the network namespace inside it",
        ));
    }
    arguments.push(format!("userns=/proc/{}/fd/{}", std::process::id(), owner.as_raw_fd()).into());
    Ok(Some(owner))
}

/// The form of /proc/<pid>/uid_map.
fn lines(ranges: &[IdMapping]) -> String {
    ranges.iter().map(|range| format!("{} {} {}\n", range.container_id, range.host_id, range.length)).collect()
}

impl Namespaces {
    fn set(&mut self, kind: &str, path: PathBuf) {
        match kind {
            "ipc" => self.ipc = Some(path),
            "uts" => self.uts = Some(path),
            "user" => self.user = Some(path),
            "pid" => self.pid = PidNamespace::Shared(path),
            _ => {}
        }
    }
}

/// A process with this command line, if it is process 1 of a pod whose own directory is below `root`, with that directory.
pub(crate) fn init(pid: u32, command: &[u8], root: &Path) -> Result<Option<(Tracked, PathBuf)>> {
    let mut arguments = command.split(|byte| *byte == 0);
    if arguments.next() != Some(b"kuasar-init") {
        return Ok(None);
    }
    let label = arguments.find_map(|argument| argument.strip_prefix(b"init="));
    let dir = label.map(|label| Path::new(std::ffi::OsStr::from_bytes(label))).filter(|dir| dir.starts_with(root));
    let Some(dir) = dir else { return Ok(None) };
    Ok(Tracked::open(pid)?.map(|process| (process, dir.to_owned())))
}

/// The live processes 1 of pods whose own directories are below `root`, each with that directory.
pub(crate) fn inits(root: &Path) -> Result<Vec<(Tracked, PathBuf)>> {
    let mut found = Vec::new();
    command_lines(|pid, command| {
        found.extend(init(pid, command, root)?);
        Ok(())
    })?;
    Ok(found)
}

#[cfg(test)]
pub(crate) mod tests {
    use kuasar_sandboxers::fake;

    use super::*;

    /// Makes a network namespace on a file, as CNI's caller does; inside a user namespace if there is a mapping.
    pub(crate) async fn netns(program: &InitProgram, file: &Path, user: Option<&IdMappings>) {
        let mut arguments =
            vec![format!("new={}", libc::CLONE_NEWNET).into(), argument("pin=net:", file.as_os_str().as_bytes())];
        if let Some(mappings) = user {
            user_namespace(mappings, None, &mut arguments).unwrap();
        }
        program.run(&arguments).await.unwrap();
    }

    pub(crate) fn mappings(host: u32) -> IdMappings {
        let range = vec![IdMapping { container_id: 0, host_id: host, length: 65536 }];
        IdMappings { uids: range.clone(), gids: range }
    }

    struct Host {
        dir: tempfile::TempDir,
        reaper: Reaper,
        program: InitProgram,
    }

    impl Host {
        async fn new(test: &str) -> Option<Self> {
            if !nix::unistd::geteuid().is_root() {
                eprintln!("SKIP {test}: making namespaces takes root");
                return None;
            }
            let dir = tempfile::tempdir().unwrap();
            let reaper = kuasar_sandboxers::fake::reaper();
            let program = InitProgram::load(&dir.path().join("empty"), reaper.clone()).await.unwrap();
            Some(Self { dir, reaper, program })
        }

        async fn make(&self, spec: &SandboxSpec) -> Result<Made> {
            check(spec)?;
            let mut undo = Undo::new("test");
            let made = make(
                spec,
                self.dir.path(),
                Some(&self.program).filter(|_| need_program(spec).unwrap()),
                &self.reaper,
                &mut undo,
            )
            .await;
            undo.settle(made).await
        }

        /// Unlike dropping, this also lets the namespaces go.
        async fn end(self) {
            mount::unmount_all(self.dir.path()).await.unwrap();
            release(self.dir.path()).await.unwrap();
            assert!(mount::mounted_under(self.dir.path()).unwrap().is_empty());
        }
    }

    fn inode(path: impl AsRef<Path>) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    // All in one test: the reaper is one for the process, and `cargo test` runs tests as threads of one process.
    #[tokio::test]
    async fn pods_get_the_namespaces_they_ask_for() {
        let Some(host) = Host::new("pods_get_the_namespaces_they_ask_for").await else { return };
        without_shared_process_ids(&host).await;
        with_shared_process_ids(&host).await;
        in_a_user_namespace(&host).await;
        with_nothing_of_its_own(&host).await;
        what_cannot_be_made_leaves_nothing(&host).await;
        host.end().await;
    }

    async fn without_shared_process_ids(host: &Host) {
        let net = host.dir.path().join("net");
        netns(&host.program, &net, None).await;
        let mut spec = fake::spec("pod");
        spec.netns = Some(net.clone());
        spec.namespaces.pid = NamespaceMode::Container;
        let made = host.make(&spec).await.unwrap();
        assert!(made.init.is_none());
        let namespaces = made.namespaces;
        assert_eq!((&namespaces.network, &namespaces.pid, &namespaces.user), (&Some(net), &PidNamespace::Own, &None));
        for (path, ours) in [(&namespaces.ipc, "/proc/self/ns/ipc"), (&namespaces.uts, "/proc/self/ns/uts")] {
            assert_ne!(inode(path.as_ref().unwrap()), inode(ours));
        }
        assert_eq!(mount::mounted_under(host.dir.path()).unwrap().len(), 3);
        release(host.dir.path()).await.unwrap();
        release(host.dir.path()).await.unwrap();
        assert_eq!(mount::mounted_under(host.dir.path()).unwrap().len(), 1);
    }

    async fn with_shared_process_ids(host: &Host) {
        let mut spec = fake::spec("pod");
        spec.netns = Some(host.dir.path().join("net"));
        spec.hostname = "a-pod".into();
        spec.sysctls = [("kernel.shmmni", "1234"), ("net.ipv4.ip_unprivileged_port_start", "99")]
            .map(|(name, value)| (name.into(), value.into()))
            .into();
        let made = host.make(&spec).await.unwrap();
        let (init, exit) = made.init.unwrap();
        let pid = init.identity().pid;
        assert_eq!(made.namespaces.pid, PidNamespace::Shared(format!("/proc/{pid}/ns/pid").into()));
        assert_ne!(inode(format!("/proc/{pid}/ns/pid")), inode("/proc/self/ns/pid"));
        assert_eq!(inode(format!("/proc/{pid}/ns/net")), inode(spec.netns.unwrap()));
        // What it could be abused for has been given up.
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        for line in
            ["CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "Uid:\t65535\t65535"]
        {
            assert!(status.contains(line), "{line} is not in {status}");
        }
        assert_eq!(fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 0);
        let memory = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
        let pss = memory.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")?.parse::<u32>().ok());
        assert!(pss.is_some_and(|kib| kib < 40), "process 1 uses {pss:?} KiB");
        // Seen from inside.
        let inside = |program: &str, arguments: &[&str]| {
            let mut command = std::process::Command::new("nsenter");
            command.args(["-t", &pid.to_string(), "-i", "-u", "-n", program]).args(arguments);
            command
        };
        for (path, value) in [
            ("kernel/hostname", "a-pod"),
            ("kernel/shmmni", "1234"),
            ("net/ipv4/ip_unprivileged_port_start", "99"),
            ("net/ipv4/ping_group_range", "0\t2147483647"),
        ] {
            let mut command = inside("cat", &[&format!("/proc/sys/{path}")]);
            let said = crate::runtime::listen(&host.reaper, &mut command, std::time::Duration::from_secs(10)).await.unwrap();
            assert_eq!(said.stdout.trim(), value, "{path}");
        }
        // Found again without any record; and nobody's else.
        let found = inits(host.dir.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].0.identity(), found[0].1.as_path()), (init.identity(), host.dir.path()));
        assert!(inits(&host.dir.path().join("other")).unwrap().is_empty());
        assert!(init.signal(libc::SIGTERM).unwrap());
        assert_eq!(exit.await.status, 0);
        assert!(!init.signal(libc::SIGTERM).unwrap());
    }

    async fn in_a_user_namespace(host: &Host) {
        let net = host.dir.path().join("mapped");
        let mut spec = fake::spec("pod");
        spec.namespaces.user = Some(mappings(200_000));
        spec.hostname = "mapped".into();
        spec.sysctls = [("kernel.shmmni".into(), "77".into())].into();
        // In the node's user namespace.
        spec.netns = Some(host.dir.path().join("net"));
        assert!(matches!(host.make(&spec).await.err().unwrap(), Error::Invalid { .. }));
        netns(&host.program, &net, spec.namespaces.user.as_ref()).await;
        spec.netns = Some(net);
        let made = host.make(&spec).await.unwrap();
        let (init, exit) = made.init.unwrap();
        let user = made.namespaces.user.unwrap();
        let owner = sys::owning_user_namespace(&File::open(spec.netns.as_ref().unwrap()).unwrap()).unwrap();
        assert_eq!(inode(&user), File::from(owner).metadata().unwrap().ino());
        let map = fs::read_to_string(format!("/proc/{}/uid_map", init.identity().pid)).unwrap();
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "65536"]);
        // The others belong to it.
        for kind in ["ipc", "uts", "pid"] {
            let namespace = File::open(format!("/proc/{}/ns/{kind}", init.identity().pid)).unwrap();
            assert_eq!(File::from(sys::owning_user_namespace(&namespace).unwrap()).metadata().unwrap().ino(), inode(&user));
        }
        assert!(init.signal(libc::SIGKILL).unwrap());
        assert_eq!(exit.await.status, 137);
        // A new one, with the node's network, held by files.
        spec.netns = None;
        spec.namespaces.network = NamespaceMode::Node;
        spec.namespaces.pid = NamespaceMode::Container;
        let made = host.make(&spec).await.unwrap();
        assert_ne!(inode(made.namespaces.user.as_ref().unwrap()), inode("/proc/self/ns/user"));
        assert_eq!(made.namespaces.uts, None);
        release(host.dir.path()).await.unwrap();
    }

    async fn with_nothing_of_its_own(host: &Host) {
        let mut spec = fake::spec("pod");
        let node = NamespaceMode::Node;
        spec.namespaces = kuasar_sandboxers::types::PodNamespaces { network: node, pid: node, ipc: node, user: None };
        let made = host.make(&spec).await.unwrap();
        assert!(made.init.is_none());
        assert_eq!(made.namespaces, Namespaces { pid: PidNamespace::Node, ..Namespaces::default() });
    }

    async fn what_cannot_be_made_leaves_nothing(host: &Host) {
        let mut spec = fake::spec("pod");
        spec.netns = Some(host.dir.path().join("net"));
        spec.sysctls = [("net.ipv4.no_such_thing".into(), "1".into())].into();
        let error = host.make(&spec).await.err().unwrap();
        assert!(error.report().contains("net/ipv4/no_such_thing"), "{}", error.report());
        spec.namespaces.pid = NamespaceMode::Container;
        assert!(host.make(&spec).await.is_err());
        assert!(inits(host.dir.path()).unwrap().is_empty());
        assert_eq!(mount::mounted_under(host.dir.path()).unwrap().len(), 2);
        // What is no network namespace is found before anything is made.
        let file = host.dir.path().join("file");
        fs::write(&file, "").unwrap();
        for path in [file, "/proc/self/ns/uts".into(), "/nonexistent".into()] {
            spec.netns = Some(path);
            assert!(matches!(check(&spec), Err(Error::Invalid { .. })));
        }
        spec.netns = None;
        spec.namespaces.network = NamespaceMode::Node;
        spec.sysctls.clear();
        spec.hostname = "x".repeat(65);
        assert!(check(&spec).is_err());
    }
}
