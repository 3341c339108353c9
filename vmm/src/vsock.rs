//! Which way the host reaches guests: by the kernel, where it has `/dev/vhost-vsock`, else by a device of its own for each machine.

use std::{
    fs::OpenOptions,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use kuasar_sandboxers::{Error, Result};

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

impl VsockWay {
    /// The best way that both this host and the hypervisor have.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when there is none, with what is missing.
    pub(crate) fn find(capabilities: &Capabilities, device: Option<&Path>) -> Result<Self> {
        let ways = capabilities.vsock;
        if ways.builtin {
            return Ok(Self::Builtin);
        }
        if ways.kernel && device.is_none() && open_vhost().is_ok() {
            return Ok(Self::Kernel);
        }
        if ways.user {
            return match VsockDevice::open(VsockDeviceConfig { path: device.map(Path::to_owned) }) {
                Ok(device) => Ok(Self::User(device)),
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

    /// Makes what the machine of this number needs.
    pub(crate) async fn start(&self, number: u32, place: &Place) -> Result<(Option<Launched>, Vsock)> {
        let cid = FIRST_CID + number;
        match self {
            Self::Kernel => {
                let vhost = open_vhost().map_err(Error::io("open", VHOST_VSOCK))?;
                Ok((None, Vsock::Kernel { cid, vhost: Arc::new(vhost.into()) }))
            }
            Self::User(device) => {
                let (launched, vsock) = device.start(cid, place).await?;
                Ok((Some(launched), vsock))
            }
            Self::Builtin => Ok((None, Vsock::Builtin { cid, socket: socket(&place.dir) })),
        }
    }
}

fn open_vhost() -> io::Result<std::fs::File> {
    OpenOptions::new().read(true).write(true).open(VHOST_VSOCK)
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("vsock")
}
