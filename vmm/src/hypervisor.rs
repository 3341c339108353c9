//! The seam that every hypervisor's driver implements.
//!
//! A driver translates: a [`VmSpec`] into its command line or API, and a few changes of a running machine. It decides nothing: sizes,
//! paths, privileges, what a pod may have, what happens when something dies. What it lacks it says beforehand ([`Capabilities`]), so that
//! a pod is refused with a sentence instead of failing half way.

use std::{fmt::Debug, path::PathBuf, sync::Arc};

use async_trait::async_trait;
use kuasar_sandboxers::{
    Result,
    cgroup::Cgroup,
    reaper::Reaper,
    types::{Exit, Support},
    undo::Undo,
};
use serde_json::Value;

use crate::spec::{Disk, VmSpec, VsockAddress};

/// One hypervisor, found and checked.
#[async_trait]
pub trait Hypervisor: Debug + Send + Sync + 'static {
    /// What it is and can do here.
    fn capabilities(&self) -> &Capabilities;

    /// Starts a machine; returns when its VMM runs and answers, which is before the guest has booted. Helpers that the spec names
    /// (virtiofsd, a vsock device) are up already. Steps are pushed on `undo` as they are made.
    async fn start(&self, spec: VmSpec, place: Place, undo: &mut Undo) -> Result<Arc<dyn Vm>>;

    /// Takes a machine over from an earlier daemon; `record` is what [`Vm::record`] gave. One whose VMM has ended is no error: its
    /// [`Vm::exited`] resolves.
    async fn adopt(&self, record: Value, place: Place) -> Result<Arc<dyn Vm>>;
}

/// What a hypervisor is and can do on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// For people: `QEMU 7.2.22 (q35, TCG)`.
    pub name: String,
    /// Whether processors are emulated (no KVM), which makes everything some ten times slower.
    pub emulated: bool,
    /// Which of [`Vsock`](crate::spec::Vsock)'s ways it takes.
    pub vsock: VsockWays,
    /// Disks can be added to a running machine, and how many at a time.
    pub hot_disks: Support,
    /// See there.
    pub max_hot_disks: usize,
    /// Processors can be added.
    pub hot_cpus: Support,
    /// Memory can be added.
    pub hot_memory: Support,
    /// The least memory a machine needs besides the guest's own, in MiB: what the VMM takes.
    pub overhead_mib: u64,
}

/// Ways to the guest's vsock that a hypervisor takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VsockWays {
    /// `/dev/vhost-vsock`.
    pub kernel: bool,
    /// vhost-user.
    pub user: bool,
    /// Its own.
    pub builtin: bool,
}

/// Where a machine's VMM runs, and as whom.
#[derive(Clone, Debug)]
pub struct Place {
    /// The machine's own directory, for sockets; the VMM may write in it.
    pub dir: PathBuf,
    /// Starts the VMM and tells its end.
    pub reaper: Reaper,
    /// The control group that the VMM is put into before it runs.
    pub cgroup: Option<Cgroup>,
    /// User and group that the VMM runs as; `None`: as this daemon.
    pub user: Option<(u32, u32)>,
}

/// A machine.
#[async_trait]
pub trait Vm: Debug + Send + Sync + 'static {
    /// What [`Hypervisor::adopt`] needs.
    fn record(&self) -> Value;

    /// The VMM's pid.
    fn pid(&self) -> u32;

    /// Where the guest's vsock is.
    fn vsock(&self) -> VsockAddress;

    /// Adds a disk. One of that serial that is there already is fine.
    async fn add_disk(&self, disk: &Disk) -> Result<()>;

    /// Removes it, once the guest has let go. One that is not there is fine.
    async fn remove_disk(&self, serial: &str) -> Result<()>;

    /// The serial numbers of all disks that were added.
    async fn disks(&self) -> Result<Vec<String>>;

    /// Gives it processors, up to the maximum of its spec; the guest has to bring them into use.
    async fn set_cpus(&self, count: u32) -> Result<()>;

    /// Gives it memory, up to the maximum of its spec, in MiB; the guest has to bring it into use. Returns what it has then.
    async fn set_memory(&self, mib: u64) -> Result<u64>;

    /// Stops its processors, and lets them run again.
    async fn pause(&self) -> Result<()>;

    /// See [`Self::pause`].
    async fn resume(&self) -> Result<()>;

    /// Ends it at once, and waits until the VMM is gone.
    async fn kill(&self) -> Result<()>;

    /// Resolves when the VMM has ended.
    async fn exited(&self) -> Exit;

    /// Why it ended, as far as the VMM knows: `the guest panicked`, its last words on standard error; at most 4 KiB.
    fn last_words(&self) -> Option<String>;
}
