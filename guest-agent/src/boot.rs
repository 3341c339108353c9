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
    path::Path,
    thread,
    time::Duration,
};

use kuasar_guest_protocol::{DEBUG_WORD, EMULATED_WORD, FORWARD_PORT, KNOCK_PORT, LOG_WORD, PORT, STREAM_PORT};
use kuasar_sandboxers::{Error, Result};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::resource::{Resource, setrlimit},
    unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout},
};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};
use tracing::{debug, error, info, warn};

use crate::{connection::Listener, machine, serve::Ports, storage::make_dir};

/// Names the modules to load, a path a line, in order. A kernel that has everything built in has none. A second word in a line is what the
/// kernel calls the module when it first wants it, and it is loaded then.
const MODULES: &str = "/etc/modules";

/// Where control groups are.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Open files of a process, as containerd's have them: containers that ask for no limit get this.
const OPEN_FILES: u64 = 1 << 20;

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
    enable_controllers()?;
    load_on_demand()?;
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES)
        .map_err(|errno| Error::failed("raise the limit of open files")(io::Error::from(errno)))?;
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

/// Loads modules on a thread of its own; tells after each, and closes the channel at the end.
fn load_modules() -> mpsc::UnboundedReceiver<()> {
    let (tell, told) = mpsc::unbounded_channel();
    thread::spawn(move || {
        let list = match fs::read_to_string(MODULES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => return error!(%error, "cannot read {MODULES}"),
            Ok(list) => list,
        };
        for path in listed(&list, None) {
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

/// The modules of a list, each with the alias that it is loaded for, if boot does not load it.
fn entries(list: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    list.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?, words.next()))
    })
}

/// The modules of a list that boot loads, or that one alias does.
fn listed<'a>(list: &'a str, alias: Option<&'a str>) -> impl Iterator<Item = &'a str> {
    entries(list).filter(move |entry| entry.1 == alias).map(|entry| entry.0)
}

/// The alias in a list that `name` stands for: itself, or that of the module of this name, by which the kernel asks for some.
fn alias_of<'a>(list: &'a str, name: &str) -> Option<&'a str> {
    entries(list).find_map(|(path, alias)| {
        let module = Path::new(path).file_stem()?.to_str()?.replace('-', "_");
        alias.filter(|alias| *alias == name || module == name)
    })
}

/// Loads what the kernel asks for by this name.
///
/// # Errors
/// There is no such module, or it cannot be loaded.
pub fn load_for(name: &str) -> Result<()> {
    let list = fs::read_to_string(MODULES).map_err(Error::io("read", MODULES))?;
    let alias = alias_of(&list, name).ok_or_else(|| Error::NotFound { kind: "module", id: name.to_owned() })?;
    listed(&list, Some(alias)).try_for_each(|path| load_module(Path::new(path)))
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
        let list = "/lib/a.ko\n/lib/b.ko fs-c\n\n/lib/c.ko fs-c\n/lib/d.ko fs-d\n";
        assert_eq!(listed(list, None).collect::<Vec<_>>(), ["/lib/a.ko"]);
        assert_eq!(listed(list, Some("fs-c")).collect::<Vec<_>>(), ["/lib/b.ko", "/lib/c.ko"]);
        assert_eq!(listed(list, Some("")).count(), 0);
        assert_eq!(
            ["fs-c", "c", "d", "a", "", "fs"].map(|name| alias_of(list, name)),
            [Some("fs-c"), Some("fs-c"), Some("fs-d"), None, None, None]
        );
    }

    #[test]
    fn words_of_the_command_line() {
        let words = Words::parse("console=ttyS0 quiet kuasar.log=debug kuasar.debug panic=-1");
        assert!(Words::parse(EMULATED_WORD).knock);
        assert_eq!(words, Words { debug: true, log: Some("debug".into()), knock: false });
        assert_eq!(Words::parse("kuasar.debugging kuasar.log"), Words::default());
    }
}
