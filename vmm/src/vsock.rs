//! Which way the host reaches guests: by the kernel, where it has `/dev/vhost-vsock`, else by a device of its own for each machine.

use std::{
    fs::{self, OpenOptions, Permissions},
    hash::{Hash, Hasher},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use kuasar_guest_protocol::{EMULATED_WORD, KNOCK_PORT};
use kuasar_sandboxers::{Error, Result};
use nix::unistd::AccessFlags;
use tokio::net::UnixListener;

use crate::{
    hypervisor::{Capabilities, Place},
    launch::Launched,
    spec::Vsock,
    vsock_device::{VsockDevice, VsockDeviceConfig},
};

const VHOST_VSOCK: &str = "/dev/vhost-vsock";

/// The first context id for guests: those below are reserved (vsock(7)).
const FIRST_CID: u32 = 3;

/// The way to guests.
#[derive(Debug)]
pub(crate) enum VsockWay {
    Kernel,
    User(VsockDevice),
    Builtin,
}

/// How it is found out whether the host's kernel has vsock for guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trial {
    /// By opening the device, which has the kernel load what is behind it.
    Open,
    /// By looking whether it could be opened.
    Look,
}

impl Trial {
    fn succeeds(self) -> bool {
        match self {
            Self::Open => open_vhost().is_ok(),
            Self::Look => nix::unistd::access(VHOST_VSOCK, AccessFlags::R_OK | AccessFlags::W_OK).is_ok(),
        }
    }
}

impl VsockWay {
    /// The best way that both this host and the hypervisor have.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when there is none, with what is missing.
    pub(crate) fn find(capabilities: &Capabilities, device: Option<&Path>, trial: Trial) -> Result<Self> {
        let ways = capabilities.vsock;
        if ways.builtin {
            return Ok(Self::Builtin);
        }
        if ways.kernel && device.is_none() && trial.succeeds() {
            return Ok(Self::Kernel);
        }
        if ways.user {
            return match VsockDevice::open(VsockDeviceConfig { path: device.map(Path::to_owned) }) {
                Ok(device) => Ok(Self::User(device)),
                // It was asked for by name.
                Err(error) if device.is_some() => Err(error),
                Err(error) => Err(Error::Unavailable {
                    what: "vsock".into(),
                    why: format!("this host has no {VHOST_VSOCK} (modprobe vhost_vsock), and {}", error.report()),
                }),
            };
        }
        let why = format!("this host has no {VHOST_VSOCK} (modprobe vhost_vsock), which {} needs", capabilities.name);
        Err(Error::Unavailable { what: "vsock".into(), why })
    }

    /// What there is of it, for people.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Kernel => VHOST_VSOCK.into(),
            Self::User(device) => device.program().display().to_string(),
            Self::Builtin => "the hypervisor's own".into(),
        }
    }

    /// What the guest is told of it, on its kernel's command line.
    pub(crate) fn word(&self) -> Option<&'static str> {
        matches!(self, Self::User(_)).then_some(EMULATED_WORD)
    }

    /// Makes what the machine of this number needs.
    pub(crate) async fn start(&self, number: u32, place: &Place) -> Result<Made> {
        let cid = FIRST_CID + number;
        match self {
            Self::Kernel => {
                // One that nobody else on the host has: other sandboxers count from their own place.
                let cid = cid + first_of(&place.dir);
                let vhost = open_vhost().map_err(Error::io("open", VHOST_VSOCK))?;
                Ok(Made { device: None, vsock: Vsock::Kernel { cid, vhost: Arc::new(vhost.into()) }, ready: None })
            }
            Self::User(device) => {
                let (launched, vsock) = device.start(cid, place).await?;
                let ready = match &vsock {
                    Vsock::User { hybrid, .. } => Some(listen_knock(hybrid)?),
                    Vsock::Kernel { .. } | Vsock::Builtin { .. } => None,
                };
                Ok(Made { device: Some(launched), vsock, ready })
            }
            Self::Builtin => Ok(Made { device: None, vsock: Vsock::Builtin { cid, socket: socket(&place.dir) }, ready: None }),
        }
    }
}

/// What has been made for a machine.
#[derive(Debug)]
pub(crate) struct Made {
    /// The device's own process.
    pub(crate) device: Option<Launched>,
    pub(crate) vsock: Vsock,
    /// Where the guest connects when it is ready, with the hybrid protocol.
    pub(crate) ready: Option<UnixListener>,
}

/// The guest's connections to a port of the host's arrive at a socket whose name ends with the port.
fn listen_knock(hybrid: &Path) -> Result<UnixListener> {
    let mut path = hybrid.as_os_str().to_owned();
    path.push(format!("_{KNOCK_PORT}"));
    let listener = UnixListener::bind(&path).map_err(Error::io("listen on", &path))?;
    // The device has a user of its own. Nobody else gets into the directory.
    fs::set_permissions(&path, Permissions::from_mode(0o666)).map_err(Error::io("change the mode of", path))?;
    Ok(listener)
}

/// Where a sandboxer's context ids begin, by its directory: below 2^31, with room for its machines.
fn first_of(machine: &Path) -> u32 {
    let mut hasher = std::hash::DefaultHasher::new();
    machine.parent().hash(&mut hasher);
    u32::try_from(hasher.finish() % 0x7ff0).unwrap_or(0) << 16
}

fn open_vhost() -> io::Result<std::fs::File> {
    OpenOptions::new().read(true).write(true).open(VHOST_VSOCK)
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("vsock")
}
