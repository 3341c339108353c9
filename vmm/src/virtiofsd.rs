//! virtiofsd: shows a directory of the host to the guest.
//!
//! It serves files of any owner, so it cannot run as a plain user; but of root's powers it needs only those over files. So it runs as root
//! of a user namespace of its own in which every id is itself, where the host allows that: a guest that takes it over has neither a
//! capability on the host nor a view of anything but the directory (its own sandbox: mount, pid and network namespaces, seccomp).
//!
//! Decisions, each measured with a guest:
//! - the mount namespace is a slave of the host's: what is mounted below the directory later appears in the guest, and what is unmounted
//!   goes. An unmount has to be lazy (`MNT_DETACH`), for virtiofsd keeps a descriptor of each inode that the guest remembers. A mount
//!   must be read-only (and all else) before it is bound there: what is changed by remounting does not reach the slave;
//! - submounts are announced, so that equal inode numbers in two of them are not taken for one file;
//! - inodes are held by descriptors: file handles need `CAP_DAC_READ_SEARCH` of the host. Hence the limit of open files;
//! - advisory locks stay in the guest, where all of the pod's containers are; shared files of several pods are not locked against each
//!   other.

use std::{
    fmt,
    os::{
        fd::OwnedFd,
        unix::{fs::chown, net::UnixListener},
    },
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use kuasar_sandboxers::{Error, Result, programs::Programs, reaper::Reaper};

use crate::{
    hypervisor::Place,
    launch::{Launch, Launched, Privileges, find_program},
};

/// The oldest that is taken: the first ones in Rust differ in their options, and older ones are C and unmaintained.
const OLDEST: (u32, u32) = (1, 8);

/// A cold page cache may make it load for seconds.
const LIMIT: Duration = Duration::from_secs(20);

/// One for each inode that the guest remembers, as in virtiofsd itself.
const OPEN_FILES: u64 = 1_000_000;

/// Requests for root filesystems that are worked on at a time: one that waits for a slow disk must not hold up all containers of a pod.
const THREADS: u32 = 4;

/// The same for volumes, among which may be one whose server does not answer. A thread costs the node some 20 KiB.
const VOLUME_THREADS: u32 = 64;

/// What a guest remembers of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Attributes and names for a second, and data until the file is opened anew. Changes made on the host are seen after that second at
    /// the latest; until then a file that the host rewrites in place can show its new content cut to its old length. One that is replaced
    /// (ConfigMap, Secret) never does.
    Auto,
    /// All, for good: for files that nobody else changes. What is new is seen; what is changed or removed on the host need not be.
    ///
    /// Programs start faster, because the guest has their code already: with translated processors, where code at another place in memory
    /// is translated anew, in a tenth of the time.
    Always,
}

/// virtiofsd, found and checked.
#[derive(Clone, Debug)]
pub struct Virtiofsd {
    program: PathBuf,
    version: (u32, u32),
    /// Why it cannot have a user namespace of its own.
    refused: Option<String>,
}

impl fmt::Display for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
        })
    }
}

impl Virtiofsd {
    /// Finds virtiofsd where no `path` is given, asks for its version, and tries how it can be confined.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it is missing or too old.
    pub async fn open(path: Option<&Path>, reaper: &Reaper, known: &mut Programs) -> Result<Self> {
        let program = match path {
            Some(path) => path.to_owned(),
            None => find_program("virtiofsd", "KUASAR_VIRTIOFSD", &["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"])?,
        };
        let version = match known.get(&program).filter(|version| *version >= OLDEST) {
            Some(version) => version,
            None => {
                let version = version(&program, reaper).await?;
                known.record(&program, &version);
                version
            }
        };
        // A sysctl may have changed that any moment.
        let refused = try_namespace(reaper).await?;
        if let Some(why) = &refused {
            tracing::warn!(
                reason = why,
                "virtiofsd runs as the host's root, in its own sandbox, for it cannot have a user namespace"
            );
        }
        Ok(Self { program, version, refused })
    }

    /// For people: what it is, and how it is confined.
    #[must_use]
    pub fn describe(&self) -> String {
        let (major, minor) = self.version;
        let confined = match &self.refused {
            None => "in a user namespace of its own".to_owned(),
            Some(why) => format!("as the host's root: {why}"),
        };
        format!("virtiofsd {major}.{minor} ({confined})")
    }

    /// Shows the directory `shared` at the vhost-user socket `socket`, which takes one connection; it accepts one as soon as this returns.
    /// It ends when that connection does. `name` is unique among the programs of `place`.
    ///
    /// # Errors
    /// When the socket cannot be made, or virtiofsd not be started.
    pub async fn start(&self, name: &str, shared: &Path, cache: Cache, socket: &Path, place: &Place) -> Result<Launched> {
        let listener = UnixListener::bind(socket).map_err(Error::io("listen on", socket))?;
        if let Some((uid, gid)) = place.user {
            chown(socket, Some(uid), Some(gid)).map_err(Error::io("change the owner of", socket))?;
        }
        let mut launch = Launch::new(name, &self.program);
        let number = launch.pass(OwnedFd::from(listener));
        launch.arg(format!("--fd={number}")).arg("--shared-dir").arg(shared);
        launch.args(["--sandbox=namespace", "--seccomp=kill", "--announce-submounts", "--xattr", "--inode-file-handles=never"]);
        let threads = match cache {
            Cache::Always => THREADS,
            Cache::Auto => VOLUME_THREADS,
        };
        launch.args([format!("--cache={cache}"), format!("--thread-pool-size={threads}")]);
        launch.args(["--rlimit-nofile=0", "--log-level=warn"]);
        let privileges = if self.refused.is_none() { Privileges::OwnNamespace } else { Privileges::Kept };
        launch.privileges(privileges).open_files(OPEN_FILES).cgroup(place.cgroup.clone());
        launch.start(&place.dir, &place.reaper).await
    }
}

async fn version(program: &Path, reaper: &Reaper) -> Result<(u32, u32)> {
    let unavailable = |why| Error::Unavailable { what: "virtiofsd".into(), why };
    let output = match reaper.run(Command::new(program).arg("--version"), LIMIT).await {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Err(unavailable(format!("{} does not exist; install virtiofsd, or set its path", program.display())));
        }
        output => output?,
    };
    let said: String = [output.stdout, output.stderr].iter().map(|said| String::from_utf8_lossy(said).into_owned()).collect();
    check_version(&said).map_err(|why| unavailable(format!("{} {why}", program.display())))
}

fn check_version(said: &str) -> Result<(u32, u32), String> {
    let first = said.lines().next().unwrap_or_default();
    let (major, minor) = OLDEST;
    let wanted = format!("version {major}.{minor} or newer of the one in Rust is needed");
    // `virtiofsd version 7.2.22 (Debian …)`, `using FUSE kernel interface version 7.36`.
    if first.starts_with("virtiofsd version") || said.contains("FUSE kernel interface") {
        return Err(format!("is the old virtiofsd of QEMU, in C; {wanted}"));
    }
    let parse = || {
        let mut numbers = first.strip_prefix("virtiofsd ")?.trim().split('.').map(|number| number.parse::<u32>().ok());
        Some((numbers.next()??, numbers.next()??))
    };
    match parse() {
        Some(found) if found >= OLDEST => Ok(found),
        Some((major, minor)) => Err(format!("is version {major}.{minor}; {wanted}")),
        None => Err(format!("does not tell its version, but {:?}; {wanted}", first.chars().take(100).collect::<String>())),
    }
}

/// Does what virtiofsd will do in a user namespace; says why that does not work here.
async fn try_namespace(reaper: &Reaper) -> Result<Option<String>> {
    let dir = tempfile::tempdir().map_err(Error::failed("make a directory for a while"))?;
    let unshare = find_program("unshare", "KUASAR_UNSHARE", &["/usr/bin/unshare"])?;
    let mut launch = Launch::new("try-namespace", &unshare);
    launch.args(["--mount", "--pid", "--net", "--fork", "mount", "-t", "proc", "proc", "/proc"]);
    launch.privileges(Privileges::OwnNamespace);
    let tried = match launch.start(dir.path(), reaper).await {
        Ok(launched) => launched,
        Err(error) => return Ok(Some(error.report())),
    };
    let ended = tokio::time::timeout(LIMIT, tried.exited()).await;
    let refused = match ended {
        Ok(exit) if exit.status == 0 => None,
        Ok(_) | Err(_) => Some(tried.failure("make a user namespace", Duration::ZERO).await.report()),
    };
    tried.kill().await?;
    Ok(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(check_version("virtiofsd 1.14.0\n"), Ok((1, 14)));
        assert!(check_version("virtiofsd 1.7.2").unwrap_err().starts_with("is version 1.7; version 1.8 or newer"));
        let old = "virtiofsd version 7.2.22 (Debian 1:7.2)\nusing FUSE kernel interface version 7.36\n";
        assert!(check_version(old).unwrap_err().contains("in C"));
        assert!(check_version("").unwrap_err().contains("does not tell"));
    }
}
