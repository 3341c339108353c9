//! vhost-device-vsock: the way to a guest's vsock where the host's kernel has none (`/dev/vhost-vsock`).

use std::{
    fs::DirBuilder,
    os::unix::fs::{DirBuilderExt, chown},
    path::{Path, PathBuf},
    time::Duration,
};

use futures::StreamExt;
use inotify::{Inotify, WatchMask};
use kuasar_sandboxers::{Error, Result};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::{
    hypervisor::Place,
    launch::{Launch, Launched, find_program, is_program},
    spec::Vsock,
};

/// How long it may take until its sockets are there.
const READY: Duration = Duration::from_secs(20);

/// How vhost-device-vsock is to be used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VsockDeviceConfig {
    /// The program; found when this is not given.
    pub path: Option<PathBuf>,
}

/// vhost-device-vsock, found.
#[derive(Clone, Debug)]
pub struct VsockDevice {
    program: PathBuf,
}

impl VsockDevice {
    /// Finds it.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it is missing, or what is configured is no program.
    pub fn open(config: VsockDeviceConfig) -> Result<Self> {
        let program = match config.path {
            Some(path) if is_program(&path) => path,
            Some(path) => {
                let why =
                    format!("{} is no program; install vhost-device-vsock, or set its path (vsock_device)", path.display());
                return Err(Error::Unavailable { what: "vhost-device-vsock".into(), why });
            }
            None => find_program("vhost-device-vsock", "KUASAR_VHOST_DEVICE_VSOCK", &["/usr/libexec/vhost-device-vsock"])?,
        };
        Ok(Self { program })
    }

    /// The program's path.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts one for the guest of context id `cid`, with its sockets in a new directory `vsock` of the machine's, as the machine's user;
    /// returns when they are there. It serves one VMM, and ends when that does.
    ///
    /// # Errors
    /// When it cannot be started, or ends or dawdles instead of listening.
    pub async fn start(&self, cid: u32, place: &Place) -> Result<(Launched, Vsock)> {
        let dir = place.dir.join("vsock");
        DirBuilder::new().mode(0o711).create(&dir).map_err(Error::io("create", &dir))?;
        let (socket, hybrid) = (dir.join("vhost.sock"), dir.join("hybrid.sock"));
        let text = |path: &Path| match path.to_str() {
            Some(text) if !text.contains([',', '=']) => Ok(text.to_owned()),
            _ => {
                Err(Error::invalid(path.display().to_string(), "vhost-device-vsock takes no path with a comma or equals sign"))
            }
        };
        let mut launch = Launch::new("vsock", &self.program);
        launch.arg("--vm").arg(format!("guest-cid={cid},socket={},uds-path={}", text(&socket)?, text(&hybrid)?));
        launch.cgroup(place.cgroup.clone()).user(place.user, &[]);
        let watch = Inotify::init().map_err(Error::failed("watch a directory"))?;
        watch.watches().add(&dir, WatchMask::CREATE).map_err(Error::io("watch", &dir))?;
        let events = watch.into_event_stream([0; 1024]).map_err(Error::io("watch", &dir))?;
        if let Some((uid, gid)) = place.user {
            chown(&dir, Some(uid), Some(gid)).map_err(Error::io("change the owner of", &dir))?;
        }
        let launched = launch.start(&place.dir, &place.reaper).await?;
        let there = async {
            let mut events = std::pin::pin!(events);
            while !(socket.exists() && hybrid.exists()) {
                if let Some(Err(error)) = events.next().await {
                    return Err(Error::io("watch", &dir)(error));
                }
            }
            Ok(())
        };
        let ready = tokio::select! {
            there = timeout(READY, there) => there.unwrap_or_else(|_| {
                Err(Error::TimedOut { operation: "vhost-device-vsock's listening".into(), seconds: READY.as_secs() })
            }),
            _ = launched.exited() => Err(launched.failure("listen", READY).await),
        };
        // From now on it cannot put something else where we connect to.
        let ready = ready.and_then(|()| chown(&dir, Some(0), Some(0)).map_err(Error::io("change the owner of", &dir)));
        if let Err(error) = ready {
            launched.kill().await?;
            return Err(error);
        }
        Ok((launched, Vsock::User { cid, socket, hybrid }))
    }
}
