//! The cgroup driver of the node: who makes the control groups of pods.
//!
//! Nothing of ours has to be set: kuasard has a container's group made as the path says that kubelet has given it. containerd's runc handler and
//! kubelet have a setting each, and a node on which they differ makes no pods, or makes them outside of what kubelet looks at.

use std::fmt;

use super::{Finding, Host, containerd::Setup};

/// kubelet's configuration where kubeadm puts it.
const KUBELET: &str = "/var/lib/kubelet/config.yaml";

/// Who makes control groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The OCI runtime.
    Cgroupfs,
    /// systemd, asked by the OCI runtime.
    Systemd,
}

impl Driver {
    /// The word that kubelet has for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cgroupfs => "cgroupfs",
            Self::Systemd => "systemd",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::Cgroupfs => Self::Systemd,
            Self::Systemd => Self::Cgroupfs,
        }
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a driver was learned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `SystemdCgroup` of the runtime handler runc.
    Containerd,
    /// `cgroupDriver` in kubelet's configuration.
    Kubelet,
    /// Neither says anything: whether systemd runs the node, with cgroup v2.
    Host,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Containerd => f.write_str("containerd's runtime handler runc"),
            Self::Kubelet => write!(f, "cgroupDriver in {KUBELET}"),
            Self::Host => f.write_str("what runs this node"),
        }
    }
}

/// The driver of this node, and what says so.
#[must_use]
pub fn detect(host: &Host, setup: &Setup) -> (Driver, Source) {
    if let Some(driver) = of_containerd(setup) {
        return (driver, Source::Containerd);
    }
    if let Some(driver) = of_kubelet(host) {
        return (driver, Source::Kubelet);
    }
    (of_host(host), Source::Host)
}

fn of_containerd(setup: &Setup) -> Option<Driver> {
    let is_systemd = setup.runc_has_systemd_driver()?;
    Some(if is_systemd { Driver::Systemd } else { Driver::Cgroupfs })
}

/// A key of the document itself, as kubeadm writes it. One that is not there means cgroupfs to kubelet, and nothing here: newer ones
/// ask containerd.
fn of_kubelet(host: &Host) -> Option<Driver> {
    let text = host.read(KUBELET)?;
    let value = text.lines().find_map(|line| line.strip_prefix("cgroupDriver:"))?;
    let value = value.split(" #").next().unwrap_or(value).trim().trim_matches(['"', '\'']);
    [Driver::Cgroupfs, Driver::Systemd].into_iter().find(|driver| driver.as_str() == value)
}

fn of_host(host: &Host) -> Driver {
    // sd_booted(3).
    let is_systemds = host.exists("/run/systemd/system") && host.exists("/sys/fs/cgroup/cgroup.controllers");
    if is_systemds { Driver::Systemd } else { Driver::Cgroupfs }
}

pub(super) fn finding(host: &Host, setup: &Setup) -> Finding {
    let subject = "cgroup driver";
    let (driver, source) = detect(host, setup);
    if let (Source::Containerd, Some(kubelets)) = (source, of_kubelet(host))
        && kubelets != driver
    {
        let detail = format!("{source} has {driver}, kubelet {kubelets}: pods of the handler runc do not start");
        let remedy = format!(
            "SystemdCgroup = {} for the handler runc in containerd's configuration, or cgroupDriver: {driver} in {KUBELET}; \
             restart what was changed",
            kubelets == Driver::Systemd
        );
        return Finding::warn(subject, detail, remedy);
    }
    if source == Source::Containerd && driver != of_host(host) && of_kubelet(host).is_none() {
        let detail = format!("{driver}, by {source}, but {} is usual on a node like this", driver.other());
        let remedy = format!(
            "see that kubelet has the same; SystemdCgroup = {} for the handler runc in containerd's configuration",
            driver == Driver::Cgroupfs
        );
        return Finding::warn(subject, detail, remedy);
    }
    Finding::ok(subject, format!("{driver}, by {source}"))
}
