//! The disks of a pod's machine: one for each block device of the node, however many of the pod's containers have it.
//!
//! A serial number is used once in the life of a machine, whatever becomes of the daemon: what a disk is cannot be asked for, and one that a
//! daemon has added before it died must not be taken for another.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use kuasar_sandboxers::{
    Error, Result,
    id::ContainerId,
    offload::{Done, Offload, Work},
    stages,
    undo::Undo,
};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::guest::Guest;

/// A disk as a container has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskUse {
    pub(crate) serial: String,
    /// Number of the node's device, where others may have it too.
    shared: Option<u64>,
    /// Whether the machine may not write to it.
    readonly: bool,
}

/// A device that a container is to have as a disk.
pub(crate) struct Wanted<'a> {
    pub(crate) container: &'a ContainerId,
    pub(crate) source: &'a Path,
    pub(crate) readonly: bool,
    /// Others may have it, too.
    pub(crate) shared: bool,
}

/// The disks of one machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disks(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Locked while the machine is changed, so that two containers that want the same device get one disk.
    table: Mutex<Table>,
    /// An earlier daemon may have added some that no container has.
    inherited: AtomicBool,
}

/// Whose the disks are.
#[derive(Debug, Default)]
struct Table {
    /// By serial number.
    known: BTreeMap<String, Known>,
    /// Containers, also former ones, of which all disks are known.
    owners: BTreeSet<ContainerId>,
}

#[derive(Debug)]
struct Known {
    shared: Option<u64>,
    readonly: bool,
    /// Each once, however often it is asked to let go, and however often it names the device.
    users: BTreeSet<ContainerId>,
}

impl DiskUse {
    /// One of which only the serial number is known.
    pub(crate) fn of(serial: String) -> Self {
        Self { serial, shared: None, readonly: false }
    }
}

impl Disks {
    /// Notes what a container has: one of an earlier daemon before anything else is done about it, a new one while it has none yet.
    pub(crate) async fn adopt(&self, container: &ContainerId, disks: &[DiskUse]) {
        self.0.table.lock().await.adopt(container, disks);
    }

    /// The machine was started by an earlier daemon.
    pub(crate) fn set_inherited(&self) {
        self.0.inherited.store(true, Ordering::Relaxed);
    }

    /// Makes a device of the node a disk of the machine, or adds the container to the users of the disk that it is. Only what is `shared` is
    /// given to more than one.
    pub(crate) async fn add(
        &self,
        guest: &Arc<Guest>,
        wanted: Wanted<'_>,
        offload: &Offload,
        undo: &mut Undo,
    ) -> Result<DiskUse> {
        let Wanted { container, source, readonly, shared } = wanted;
        stages::enter(format!("add {} as a disk", source.display()));
        // The driver opens it once more: that is quick as long as this is open.
        let work = Work::OpenDisk { path: source.to_owned(), readonly };
        let opened = match offload.run_one(format!("device {}", source.display()), work).await? {
            Done::Opened(opened) => File::from(opened),
            other => return Err(Error::failed("open a device")(format!("its helper answered {other:?}"))),
        };
        let device = opened.metadata().map_err(Error::io("look at the device", source))?.rdev();
        let shared = shared.then_some(device);
        let mut table = self.0.table.lock().await;
        // One that can be written to serves a container that may only read, too: its control group holds it to that.
        let there =
            table.known.iter_mut().find(|(_, disk)| shared.is_some() && disk.shared == shared && (readonly || !disk.readonly));
        let taken = if let Some((serial, disk)) = there {
            disk.users.insert(container.clone());
            DiskUse { serial: serial.clone(), shared, readonly: disk.readonly }
        } else {
            let serial = serial()?;
            // Before it is there, so that nobody takes it for one that no container has.
            let users = BTreeSet::from([container.clone()]);
            table.known.insert(serial.clone(), Known { shared, readonly, users });
            if let Err(error) = guest.add_disk(source, &serial, readonly).await {
                table.known.remove(&serial);
                return Err(error);
            }
            DiskUse { serial, shared, readonly }
        };
        drop(table);
        let (disks, guest, container) = (self.clone(), guest.clone(), container.clone());
        undo.push(format!("remove disk {}", taken.serial), async move { disks.remove(&guest, &container).await });
        Ok(taken)
    }

    /// Takes its disks from a container, and from the machine those that no other has. Without any that is fine.
    pub(crate) async fn remove(&self, guest: &Guest, container: &ContainerId) -> Result<()> {
        let mut table = self.0.table.lock().await;
        for serial in table.let_go(container) {
            // Asked for again after a failure, it is still known.
            guest.remove_disk(&serial).await?;
            table.known.remove(&serial);
        }
        Ok(())
    }

    /// Removes what an earlier daemon has added for a container that it did not come to finish: each takes one of the machine's few places.
    /// Of one of the `recorded` containers that was not recovered yet nobody knows the disks: nothing is removed then.
    pub(crate) async fn sweep(&self, guest: &Guest, recorded: &BTreeSet<ContainerId>) -> Result<()> {
        if !self.0.inherited.load(Ordering::Relaxed) {
            return Ok(());
        }
        let table = self.0.table.lock().await;
        let Some(strays) = table.strays(guest.disks().await?, recorded) else { return Ok(()) };
        for serial in strays {
            guest.remove_disk(&serial).await?;
        }
        self.0.inherited.store(false, Ordering::Relaxed);
        Ok(())
    }
}

impl Table {
    fn adopt(&mut self, container: &ContainerId, disks: &[DiskUse]) {
        for DiskUse { serial, shared, readonly } in disks {
            let disk = Known { shared: *shared, readonly: *readonly, users: BTreeSet::new() };
            self.known.entry(serial.clone()).or_insert(disk).users.insert(container.clone());
        }
        self.owners.insert(container.clone());
    }

    /// Takes a container from the disks that others have, too. Returns those that are its alone.
    fn let_go(&mut self, container: &ContainerId) -> Vec<String> {
        let mut alone = Vec::new();
        for (serial, disk) in self.known.iter_mut().filter(|(_, disk)| disk.users.contains(container)) {
            if disk.users.len() > 1 {
                disk.users.remove(container);
            } else {
                // The guest may let go of it late, under whoever has got it meanwhile.
                disk.shared = None;
                alone.push(serial.clone());
            }
        }
        alone
    }

    /// Those of a machine's disks that no container has; `None` while one of the `recorded` may have any of them.
    fn strays(&self, mut disks: Vec<String>, recorded: &BTreeSet<ContainerId>) -> Option<Vec<String>> {
        disks.retain(|serial| !self.known.contains_key(serial));
        recorded.is_subset(&self.owners).then_some(disks)
    }
}

/// A number that no disk of a machine has had: the machine does not outlive this clock. At most 17 characters.
fn serial() -> Result<String> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(Error::failed("read the clock"))?;
    let ns = now.tv_sec().unsigned_abs().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec().unsigned_abs());
    Ok(format!("d{ns:x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_numbers_are_new_and_fit_a_disk() {
        let (first, second) = (serial().unwrap(), serial().unwrap());
        assert_ne!(first, second);
        // virtio-blk has 20 bytes; the earlier daemons' began with "disk-".
        assert!(second.len() <= 20 && !second.starts_with("disk-"), "{second}");
    }

    #[test]
    fn a_disk_is_removed_with_its_last_user_however_often_each_lets_go() {
        let [one, two]: [ContainerId; 2] = ["one", "two"].map(|id| id.parse().unwrap());
        let shared = DiskUse { shared: Some(7), ..DiskUse::of("shared".into()) };
        let mut table = Table::default();
        // The device is at two paths, and the first attempt to recover the container has failed later.
        for _ in 0..2 {
            table.adopt(&one, &[shared.clone(), DiskUse::of("own".into()), shared.clone()]);
        }
        table.adopt(&two, &[shared]);
        assert_eq!((table.known["shared"].users.len(), table.known["own"].shared), (2, None));
        for _ in 0..2 {
            assert_eq!(table.let_go(&one), ["own"]);
        }
        table.known.remove("own");
        assert!(table.let_go(&one).is_empty());
        for _ in 0..2 {
            assert_eq!(table.let_go(&two), ["shared"]);
        }
        assert_eq!(table.known["shared"].shared, None, "nobody gets what is on its way out");
    }

    #[test]
    fn a_disk_is_no_stray_while_a_container_is_not_recovered() {
        let [one, two]: [ContainerId; 2] = ["one", "two"].map(|id| id.parse().unwrap());
        let recorded = BTreeSet::from([one.clone(), two.clone()]);
        let strays = |table: &Table| table.strays(["of-one", "of-two", "half-made"].map(String::from).into(), &recorded);
        let mut table = Table::default();
        table.adopt(&one, &[DiskUse::of("of-one".into())]);
        assert_eq!(strays(&table), None);
        table.adopt(&two, &[DiskUse::of("of-two".into())]);
        assert_eq!(strays(&table), Some(vec!["half-made".into()]));
    }
}
