//! Making the machine the pod's: names, files, kernel parameters, shares.

use std::{
    fs,
    path::{Path, PathBuf},
};

use kuasar_guest_protocol::agent::SetUpRequest;
use kuasar_sandboxers::{Error, Result};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    unistd::sethostname,
};

use crate::{
    net,
    storage::{absolute, make_dir, mount_share},
};

/// Size of `/dev/shm` where the host does not say, in bytes: containerd's and Docker's.
const SHM: u64 = 64 << 20;

/// Where the kernel's parameters are.
const PARAMETERS: &str = "/proc/sys";

/// Where huge pages are reserved.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";

/// A filesystem that the host shares.
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) tag: String,
    pub(crate) target: PathBuf,
    readonly: bool,
}

impl Share {
    /// Mounts it; `None` when there is no such share yet.
    pub(crate) fn mount(&self) -> Result<Option<()>> {
        let mut flags = MsFlags::MS_NODEV;
        flags.set(MsFlags::MS_RDONLY, self.readonly);
        match mount(Some(self.tag.as_str()), &self.target, Some("virtiofs"), flags, None::<&str>) {
            // Without a device of that tag the kernel calls it an invalid argument.
            Err(Errno::EINVAL | Errno::ENODEV | Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(Error::io("mount the share on", &self.target)(errno.into())),
            Ok(()) => {}
        }
        // What containers mount below it with bidirectional propagation is seen by the others.
        mount(None::<&str>, &self.target, None::<&str>, MsFlags::MS_SHARED, None::<&str>)
            .map_err(|errno| Error::io("share mounts below", &self.target)(errno.into()))?;
        Ok(Some(()))
    }
}

/// Makes this machine the pod's. May be done again after a failure.
pub(crate) async fn machine(request: &SetUpRequest) -> Result<()> {
    if !request.hostname.is_empty() {
        sethostname(&request.hostname)
            .map_err(|errno| Error::failed(format!("set the host name {:?}", request.hostname))(std::io::Error::from(errno)))?;
    }
    let (network, local) = tokio::join!(net::apply(request), shares_and_files(request));
    network.and(local)?;
    // Those of interfaces exist with the interfaces.
    for (name, value) in &request.sysctls {
        set_parameter(Path::new(PARAMETERS), name, value)?;
    }
    request.huge_pages.iter().try_for_each(|(size, count)| set_huge_pages_apart(Path::new(HUGE_PAGES), *size, *count))
}

/// Sets memory apart for so many pages of a size in bytes.
fn set_huge_pages_apart(root: &Path, size: u64, count: u64) -> Result<()> {
    let what = || format!("{count} huge pages of {} KiB", size >> 10);
    let file = root.join(format!("hugepages-{}kB/nr_hugepages", size >> 10));
    if !file.exists() {
        return Err(Error::invalid(what(), "the guest's kernel has none of this size; ask for another"));
    }
    fs::write(&file, count.to_string()).map_err(Error::io("set huge pages apart with", &file))?;
    // The kernel takes what it finds, and says no more.
    let found = fs::read_to_string(&file).map_err(Error::io("read", &file))?;
    if found.trim().parse() == Ok(count) {
        return Ok(());
    }
    let why = format!("the guest's memory had room for {}; give the pod more (io.kuasar.vm.memory_mib)", found.trim());
    Err(Error::Unavailable { what: what(), why })
}

async fn shares_and_files(request: &SetUpRequest) -> Result<()> {
    write_file("/etc/hosts", &request.hosts)?;
    write_file("/etc/resolv.conf", &request.resolv_conf)?;
    mount_shm(if request.shm_bytes == 0 { SHM } else { request.shm_bytes })?;
    for share in &request.shares {
        let share = Share { tag: share.tag.clone(), target: absolute(&share.target)?, readonly: share.readonly };
        mount_share(&share).await?;
    }
    Ok(())
}

fn write_file(path: &str, content: &[u8]) -> Result<()> {
    make_dir(Path::new("/etc"))?;
    fs::write(path, content).map_err(Error::io("write", path))
}

/// The pod's shared memory: all containers see this machine's.
fn mount_shm(bytes: u64) -> Result<()> {
    let (target, options) = (Path::new("/dev/shm"), format!("mode=1777,size={bytes}"));
    make_dir(target)?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_REMOUNT, !kuasar_sandboxers::mount::mounted_under(target)?.is_empty());
    mount(Some("shm"), target, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(|errno| Error::io("mount a tmpfs on", target)(errno.into()))
}

/// Sets a kernel parameter, by its name with dots or slashes (sysctl(8)).
fn set_parameter(root: &Path, name: &str, value: &str) -> Result<()> {
    let invalid = |why: &str| Error::invalid(format!("sysctl {name:?}"), why);
    // Where a slash comes first, dots belong to names of interfaces.
    let slashes = name.find(['/', '.']).is_some_and(|first| name.as_bytes()[first] == b'/');
    let swap = |c| match c {
        '.' => '/',
        '/' => '.',
        c => c,
    };
    let path: String = if slashes { name.to_owned() } else { name.chars().map(swap).collect() };
    if path.is_empty() || path.contains('\0') || path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(invalid("it is no name of a kernel parameter"));
    }
    let file = root.join(path);
    match fs::OpenOptions::new().write(true).open(&file) {
        Ok(mut open) => std::io::Write::write_all(&mut open, value.as_bytes())
            .map_err(|error| invalid(&format!("the guest's kernel does not take {value:?}: {error}"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(invalid("the guest's kernel does not have it; leave it out, or use a guest kernel that does"))
        }
        Err(error) => Err(Error::io("open", file)(error)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use super::*;

    #[test]
    fn fuzz_parameters() {
        let dir = tempfile::tempdir().unwrap();
        let (root, beside) = (dir.path().join("sys/net"), dir.path().join("sys/beside"));
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("there"), "0").unwrap();
        fs::write(&beside, "untouched").unwrap();
        bolero::check!().with_type::<(String, bool)>().for_each(|(name, plausible)| {
            let name = if *plausible { name.replace(|c: char| !c.is_alphanumeric(), "../") + "beside" } else { name.clone() };
            // Whether there is such a parameter or not: nothing else is written.
            let _ = set_parameter(&root, &name, "1");
            assert_eq!(fs::read_to_string(&beside).unwrap(), "untouched");
        });
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
    }

    #[test]
    fn huge_pages() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("hugepages-2048kB")).unwrap();
        let file = dir.path().join("hugepages-2048kB/nr_hugepages");
        fs::write(&file, "0").unwrap();
        set_huge_pages_apart(dir.path(), 2 << 20, 16).unwrap();
        assert_eq!(fs::read_to_string(file).unwrap(), "16");
        let error = set_huge_pages_apart(dir.path(), 1 << 30, 1).unwrap_err().report();
        assert!(error.contains("1 huge pages of 1048576 KiB") && error.contains("none of this size"), "{error}");
    }

    #[test]
    fn parameters() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("net/ipv4/conf/eth0.1");
        fs::create_dir_all(&conf).unwrap();
        for name in ["net/ipv4/ip_forward", "net/ipv4/conf/eth0.1/rp_filter"] {
            fs::write(dir.path().join(name), "0").unwrap();
        }
        set_parameter(dir.path(), "net.ipv4.ip_forward", "1").unwrap();
        set_parameter(dir.path(), "net/ipv4/conf/eth0.1/rp_filter", "2").unwrap();
        set_parameter(dir.path(), "net.ipv4.conf.eth0/1.rp_filter", "3").unwrap();
        assert_eq!(fs::read_to_string(conf.join("rp_filter")).unwrap(), "3");
        assert_eq!(fs::read_to_string(dir.path().join("net/ipv4/ip_forward")).unwrap(), "1");
        for name in ["", "net", "net/../x", "a..b", "net.none", "/etc/passwd"] {
            assert!(set_parameter(dir.path(), name, "1").is_err(), "{name}");
        }
        assert!(!dir.path().join("net/none").exists());
    }
}
