//! Places where the daemon can be made to die, so that tests can show that nothing is lost there.
//!
//! Nothing happens unless the environment variable [`VARIABLE`] names a directory. When a file of a place's name is in it, whoever
//! reaches the place removes the file and kills the process, as `kill -9` would.

use std::{env, fs, path::PathBuf, sync::OnceLock};

use nix::sys::signal::{Signal, raise};

/// The environment variable that names the directory.
pub const VARIABLE: &str = "KUASAR_FAILPOINTS";

macro_rules! points {
    ($($(#[doc = $doc:literal])* $point:ident = $name:literal,)*) => {
        /// A place between two steps that last.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Failpoint {
            $($(#[doc = $doc])* $point,)*
        }

        impl Failpoint {
            /// The file's name.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$point => $name,)*
                }
            }
        }

        /// The names of all.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

points! {
    /// Bytes of a connection have been seen and not been written down.
    Peeked = "peeked",
    /// They are written down and still in the socket.
    Noted = "noted",
    /// They are out of the socket, and the journal does not say so.
    Taken = "taken",
    /// An answer is in its socket and its request still in the journal.
    Answered = "answered",
    /// A backend has done what it was asked, and nothing is saved.
    Done = "done",
    /// The state is saved, and nobody has been told.
    Saved = "saved",
    /// An event has reached containerd and still counts as waiting.
    Published = "published",
    /// A virtual machine has its network, its share and its vsock device, and no hypervisor.
    HelpersStarted = "helpers-started",
    /// A pod has its namespaces and its first process, or its hypervisor.
    PodMade = "pod-made",
    /// The guest of a virtual machine is set up.
    GuestBooted = "guest-booted",
    /// A container's root filesystem is mounted.
    Mounted = "mounted",
    /// The OCI runtime has made a container.
    ContainerMade = "container-made",
    /// The OCI runtime has started a container.
    ContainerStarted = "container-started",
    /// The OCI runtime has started an exec.
    ExecStarted = "exec-started",
    /// The OCI runtime has deleted a container, whose root filesystem is still mounted.
    ContainerDeleted = "container-deleted",
}

/// A file in the directory that has the daemon go on as on a kernel before 6.15, whose pidfds tell no exit status. It stays there.
pub const OLD_PIDFDS: &str = "old-pidfds";

fn directory() -> Option<&'static PathBuf> {
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    DIRECTORY.get_or_init(|| env::var_os(VARIABLE).map(PathBuf::from)).as_ref()
}

/// Whether [`OLD_PIDFDS`] is there.
#[must_use]
pub fn has_old_pidfds() -> bool {
    directory().is_some_and(|directory| directory.join(OLD_PIDFDS).exists())
}

/// Ends the process if that is asked for here.
pub fn reach(point: Failpoint) {
    let Some(directory) = directory() else { return };
    if fs::remove_file(directory.join(point.name())).is_ok() {
        // It does not return.
        let _ = raise(Signal::SIGKILL);
    }
}
