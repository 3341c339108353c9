//! Being process 1: from the kernel's hands to a machine that containers can run in.
//!
//! ```text
//!   root, /proc, /sys, /dev …   a few system calls
//!   modules                     each takes milliseconds, so the ports are opened as soon as vsock is there
//!   ports                       Hello is answered from now on; SetUp waits for the rest
//! ```

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use kuasar_guest_protocol::{DEBUG_WORD, EMULATED_WORD, FORWARD_PORT, KNOCK_PORT, LOG_WORD, PORT, STREAM_PORT};
use kuasar_sandboxers::{Error, Result};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        stat::{Mode, SFlag, makedev, mknod},
    },
    unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout},
};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use tracing::{debug, error, info, warn};

use crate::{connection::Listener, machine, serve::Ports, storage::make_dir};

/// Names the modules, a path a line, in order. A kernel that has everything built in has none. One with a second word in its line is not loaded at
/// boot but when the kernel first wants it, by its name or by what that word has it called, with commas, or `-`; after those of the third word.
const MODULES: &str = "/etc/modules";

/// What iptables(8) of old asks for without the kernel's asking: it would start modprobe(8), and containers have none.
const TABLES: [&str; 2] = ["ip_tables", "ip6_tables"];

/// Where control groups are.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// Processes and threads at a time: the most that the kernel has numbers for.
const PROCESSES: u32 = 1 << 22;

/// How long the host may take to hear the knock.
const KNOCK: Duration = Duration::from_secs(1);

/// How often it is tried.
const KNOCKS: usize = 10;

/// What the kernel's command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// Processes beside the containers are allowed.
    pub debug: bool,
    /// The host wants to be told when somebody listens.
    pub knock: bool,
    /// How much to log.
    pub log: Option<String>,
}

impl Words {
    fn parse(cmdline: &str) -> Self {
        let mut words = Self::default();
        for word in cmdline.split_whitespace() {
            words.debug |= word == DEBUG_WORD;
            words.knock |= word == EMULATED_WORD;
            if let Some(level) = word.strip_prefix(LOG_WORD) {
                words.log = Some(level.into());
            }
        }
        words
    }
}

/// Microseconds since the kernel started.
#[must_use]
pub fn uptime_us() -> u64 {
    machine::uptime_us()
}

/// Mounts what every process expects. Nothing works without, so the first failure is the last.
///
/// # Errors
/// Which mount failed.
pub fn mount_all() -> Result<Words> {
    leave_initial_root()?;
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let private = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    for (kind, target, flags, options) in [
        ("proc", "/proc", quiet, ""),
        ("sysfs", "/sys", quiet, ""),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
        ("devpts", "/dev/pts", private, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("mqueue", "/dev/mqueue", quiet, ""),
        // Device nodes for raw disks are made there, and nothing says that programs are not.
        ("tmpfs", "/run", MsFlags::MS_NOSUID, "mode=0755"),
        ("tmpfs", "/tmp", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, "mode=1777"),
        ("cgroup2", CGROUPS, quiet, "nsdelegate,memory_recursiveprot"),
    ] {
        if kind != "cgroup2" {
            make_dir(Path::new(target))?;
        }
        let options = Some(options).filter(|options| !options.is_empty());
        match mount(Some(kind), target, Some(kind), flags, options) {
            Ok(()) => {}
            // A kernel without message queues runs containers all the same, as long as they want none.
            Err(nix::errno::Errno::ENODEV) if kind == "mqueue" => {}
            Err(errno) => return Err(Error::io("mount", target)(errno.into())),
        }
        if kind == "devtmpfs" {
            // From here on there is something to say it on.
            open_console()?;
        }
    }
    // What is mounted below is seen by nobody else but who asks for it.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>)
        .map_err(|errno| Error::io("make mounts private below", "/")(errno.into()))?;
    make_nodes(Path::new("/dev"))?;
    enable_controllers()?;
    load_on_demand()?;
    set_limits()?;
    let cmdline = fs::read_to_string("/proc/cmdline").map_err(Error::io("read", "/proc/cmdline"))?;
    Ok(Words::parse(&cmdline))
}

/// The root that the kernel starts with cannot be left by pivot_root(2), which containers are made with: it has no parent. The same files
/// mounted once more on top of it have one.
fn leave_initial_root() -> Result<()> {
    let failed = |what: &'static str| move |errno: nix::errno::Errno| Error::io(what, "/")(errno.into());
    let aside = "/new-root";
    make_dir(Path::new(aside))?;
    mount(Some("/"), aside, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed("mount once more"))?;
    chdir(aside).map_err(failed("enter the new"))?;
    mount(Some(aside), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(failed("mount on"))?;
    chroot(".").map_err(failed("change"))?;
    chdir("/").map_err(failed("enter"))
}

/// Standard input, output and error: the kernel gives them only if it found a console.
fn open_console() -> Result<()> {
    let open = |path: &'static str| File::options().read(true).write(true).open(path).map_err(Error::io("open", path));
    let console = open("/dev/console").or_else(|_| open("/dev/null"))?;
    dup2_stdin(&console)
        .and_then(|()| dup2_stdout(&console))
        .and_then(|()| dup2_stderr(&console))
        .map_err(|errno| Error::failed("take the console")(io::Error::from(errno)))
}

/// Containers may be limited in all that this kernel can limit.
fn enable_controllers() -> Result<()> {
    let dir = Path::new(CGROUPS);
    let known = fs::read_to_string(dir.join("cgroup.controllers")).map_err(Error::io("read", dir))?;
    let file = dir.join("cgroup.subtree_control");
    for controller in known.split_whitespace() {
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            warn!(controller, %error, "a controller cannot be enabled");
        }
    }
    Ok(())
}

/// The limits of processes, as those of containerd on a node. The kernel's own for the numbers of processes and signals are by the machine's
/// memory: a machine of 512 MiB would have 1549 processes of a user. What a pod may have is its control group's to say.
fn set_limits() -> Result<()> {
    for (what, resource) in [("processes", Resource::RLIMIT_NPROC), ("pending signals", Resource::RLIMIT_SIGPENDING)] {
        setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY)
            .map_err(|errno| Error::failed(format!("raise the limit of {what}"))(io::Error::from(errno)))?;
    }
    // As systemd has it on nodes, and the kernel's other limit by memory.
    for (name, value) in [("pid_max", PROCESSES), ("threads-max", PROCESSES)] {
        let file = Path::new("/proc/sys/kernel").join(name);
        fs::write(&file, value.to_string()).map_err(Error::io("write", &file))?;
    }
    Ok(())
}

/// Loads modules on a thread of its own; tells after each, and closes the channel at the end.
fn load_modules() -> mpsc::UnboundedReceiver<()> {
    let (tell, told) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let list = match fs::read_to_string(MODULES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return error!(%error, "cannot read {MODULES}"),
            Ok(list) => list,
        };
        for Module { path, .. } in modules(&list).filter(|module| module.aliases.is_none()) {
            let start = machine::uptime_us();
            match load_module(Path::new(path)) {
                Ok(()) => debug!(path, took_us = machine::uptime_us() - start, "module loaded"),
                // What needs it says so later; most are for devices that this machine does not have.
                Err(error) => warn!(error = error.report(), "a module cannot be loaded"),
            }
            // Nobody listens any more once the ports are open.
            let _ = tell.send(());
        }
    });
    told
}

/// Has the kernel ask this program for modules. Not at boot: there it wants many that it can do without.
fn load_on_demand() -> Result<()> {
    let file = "/proc/sys/kernel/modprobe";
    match fs::write(file, "/init") {
        // A kernel without modules.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written.map_err(Error::io("write", file)),
    }
}

/// A module of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Module<'a> {
    path: &'a str,
    /// Of one that boot does not load.
    aliases: Option<&'a str>,
    /// What comes before it.
    needs: &'a str,
}

fn modules(list: &str) -> impl Iterator<Item = Module<'_>> {
    list.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some(Module { path: words.next()?, aliases: words.next(), needs: words.next().unwrap_or_default() })
    })
}

impl<'a> Module<'a> {
    fn aliases(self) -> impl Iterator<Item = &'a str> {
        self.aliases.into_iter().flat_map(|aliases| aliases.split(',')).filter(|alias| *alias != "-")
    }

    /// Whether the kernel means it: by an alias, or by its name.
    fn is_called(self, name: &str) -> bool {
        let own = Path::new(self.path).file_stem().and_then(|stem| stem.to_str()).map(|stem| stem.replace('-', "_"));
        self.aliases.is_some() && (own.as_deref() == Some(name) || self.aliases().any(|alias| alias == name))
    }

    /// The files to load, in order.
    fn files(self) -> impl Iterator<Item = PathBuf> {
        let path = Path::new(self.path);
        let needed = self.needs.split(',').filter(|name| !name.is_empty()).map(|name| path.with_file_name(name));
        needed.chain(std::iter::once(path.to_owned()))
    }

    /// The device node that has it loaded when it is opened: its path below /dev, and its number.
    fn node(self) -> Option<(&'a str, u64)> {
        let name = self.aliases().find_map(|alias| alias.strip_prefix("devname:"))?;
        let number = self.aliases().find_map(|alias| alias.strip_prefix("char-major-"))?;
        let (major, minor) = number.split_once('-')?;
        Some((name, makedev(major.parse().ok()?, minor.parse().ok()?)))
    }
}

/// Loads what the kernel asks for by this name.
///
/// # Errors
/// There is no such module, or it cannot be loaded.
pub fn load_for(name: &str) -> Result<()> {
    let list = fs::read_to_string(MODULES).map_err(Error::io("read", MODULES))?;
    let module = modules(&list).find(|module| module.is_called(name));
    let module = module.ok_or_else(|| Error::NotFound { kind: "module", id: name.to_owned() })?;
    module.files().try_for_each(|path| load_module(&path))
}

/// Loads what a container that may change the network wants, and that no kernel asks for.
pub(crate) fn load_tables() {
    for name in TABLES {
        match load_for(name) {
            Ok(()) | Err(Error::NotFound { .. }) => {}
            Err(error) => debug!(error = error.report(), name, "a module cannot be loaded"),
        }
    }
}

/// Makes the device nodes of modules that are loaded when one is opened, as kmod does on nodes.
fn make_nodes(dev: &Path) -> Result<()> {
    let list = match fs::read_to_string(MODULES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        list => list.map_err(Error::io("read", MODULES))?,
    };
    for (name, number) in modules(&list).filter_map(Module::node) {
        let path = dev.join(name);
        path.parent().map_or(Ok(()), make_dir)?;
        match mknod(&path, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, number) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
            Err(errno) => return Err(Error::io("make device", path)(errno.into())),
        }
    }
    Ok(())
}

fn load_module(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(errno) => Err(Error::io("load", path)(errno.into())),
    }
}

/// Opens the ports as soon as the kernel can, and goes on with what is left. The receiver becomes true when all is there.
///
/// # Errors
/// When there is no vsock after all modules have been loaded.
pub async fn open_ports(words: &Words) -> Result<(Ports, watch::Receiver<bool>)> {
    let mut modules = load_modules();
    let ports = loop {
        let opened = (|| {
            Ok::<_, io::Error>(Ports {
                calls: Listener::vsock(PORT)?,
                streams: Listener::vsock(STREAM_PORT)?,
                forward: Listener::vsock(FORWARD_PORT)?,
            })
        })();
        match opened {
            Ok(ports) => break ports,
            Err(error) => {
                if modules.recv().await.is_none() {
                    return Err(Error::failed(format!("listen on vsock; the guest's image lacks its modules in {MODULES}"))(
                        error,
                    ));
                }
            }
        }
    };
    let (booted, boot) = watch::channel(false);
    let mut silent = words.knock;
    tokio::spawn(async move {
        loop {
            silent = silent && !knock().await;
            if modules.recv().await.is_none() {
                break;
            }
        }
        if silent {
            knock().await;
        }
        info!("booted");
        booted.send_replace(true);
        // A guest waits for the value, which is gone with its sender.
        booted.closed().await;
    });
    Ok((ports, boot))
}

/// Tells the host that somebody listens; false when there is no way to the host yet.
async fn knock() -> bool {
    for _ in 0..KNOCKS {
        match timeout(KNOCK, VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, KNOCK_PORT))).await {
            Ok(Ok(_stream)) => return true,
            Ok(Err(error)) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENETUNREACH)) => return false,
            // The host does not wait for it, and need not.
            Ok(Err(_)) => return true,
            // On a busy host it may have got lost.
            Err(_) => {}
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_for_boot_or_for_a_name() {
        let list = "/lib/a.ko\n/lib/b-b.ko -\n\n/lib/c.ko fs-c,fs-cc b-b.ko\n/lib/tun.ko char-major-10-200,devname:net/tun\n";
        let boot: Vec<_> = modules(list).filter(|module| module.aliases.is_none()).map(|module| module.path).collect();
        assert_eq!(boot, ["/lib/a.ko"]);
        let files = |name: &str| {
            let module = modules(list).find(|module| module.is_called(name));
            module.map(|module| module.files().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(files("fs-cc").as_deref(), Some("/lib/b-b.ko /lib/c.ko"));
        assert_eq!(files("c"), files("fs-c"));
        assert_eq!(files("b_b").as_deref(), Some("/lib/b-b.ko"));
        for name in ["a", "", "-", "fs", "b-b"] {
            assert_eq!(files(name), None, "{name:?}");
        }
        let nodes: Vec<_> = modules(list).filter_map(Module::node).collect();
        assert_eq!(nodes, [("net/tun", makedev(10, 200))]);
    }

    #[test]
    fn words_of_the_command_line() {
        let words = Words::parse("console=ttyS0 quiet kuasar.log=debug kuasar.debug panic=-1");
        assert!(Words::parse(EMULATED_WORD).knock);
        assert_eq!(words, Words { debug: true, log: Some("debug".into()), knock: false });
        assert_eq!(Words::parse("kuasar.debugging kuasar.log"), Words::default());
    }
}
