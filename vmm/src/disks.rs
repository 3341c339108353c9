//! The disks of a pod's machine: one for each block device of the node, however many of the pod's containers have it.
//!
//! A serial number is used once in the life of a machine, whatever becomes of the daemon: what a disk is cannot be asked for, and one that a
//! daemon has added before it died must not be taken for another.

use std::{
    collections::HashMap,
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

/// The disks of one machine.
#[derive(Clone, Debug, Default)]
pub(crate) struct Disks(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By serial number. Locked while the machine is changed, so that two containers that want the same device get one disk.
    known: Mutex<HashMap<String, Known>>,
    /// An earlier daemon may have added some that no container has.
    inherited: AtomicBool,
}

#[derive(Debug)]
struct Known {
    shared: Option<u64>,
    readonly: bool,
    users: usize,
}

impl DiskUse {
    /// One of which only the serial number is known.
    pub(crate) fn of(serial: String) -> Self {
        Self { serial, shared: None, readonly: false }
    }
}

impl Disks {
    /// Counts what a container of an earlier daemon has.
    pub(crate) async fn adopt(&self, disks: &[DiskUse]) {
        let mut known = self.0.known.lock().await;
        for DiskUse { serial, shared, readonly } in disks {
            let disk = Known { shared: *shared, readonly: *readonly, users: 0 };
            known.entry(serial.clone()).or_insert(disk).users += 1;
        }
    }

    /// The machine was started by an earlier daemon.
    pub(crate) fn set_inherited(&self) {
        self.0.inherited.store(true, Ordering::Relaxed);
    }

    /// Makes a device of the node a disk of the machine, or counts one more user of the disk that it is. Only what is `shared` is given to more
    /// than one.
    pub(crate) async fn add(
        &self,
        guest: &Arc<Guest>,
        source: &Path,
        readonly: bool,
        shared: bool,
        offload: &Offload,
        undo: &mut Undo,
    ) -> Result<DiskUse> {
        stages::enter(format!("add {} as a disk", source.display()));
        // The driver opens it once more: that is quick as long as this is open.
        let work = Work::OpenDisk { path: source.to_owned(), readonly };
        let opened = match offload.run_one(format!("device {}", source.display()), work).await? {
            Done::Opened(opened) => File::from(opened),
            other => return Err(Error::failed("open a device")(format!("its helper answered {other:?}"))),
        };
        let device = opened.metadata().map_err(Error::io("look at the device", source))?.rdev();
        let shared = shared.then_some(device);
        let mut known = self.0.known.lock().await;
        // One that can be written to serves a container that may only read, too: its control group holds it to that.
        let there =
            known.iter_mut().find(|(_, disk)| shared.is_some() && disk.shared == shared && (readonly || !disk.readonly));
        let taken = if let Some((serial, disk)) = there {
            disk.users += 1;
            DiskUse { serial: serial.clone(), shared, readonly: disk.readonly }
        } else {
            let serial = serial()?;
            // Before it is there, so that nobody takes it for one that no container has.
            known.insert(serial.clone(), Known { shared, readonly, users: 1 });
            if let Err(error) = guest.add_disk(source, &serial, readonly).await {
                known.remove(&serial);
                return Err(error);
            }
            DiskUse { serial, shared, readonly }
        };
        drop(known);
        let (disks, guest, serial) = (self.clone(), guest.clone(), taken.serial.clone());
        undo.push(format!("remove disk {serial}"), async move { disks.remove(&guest, &serial).await });
        Ok(taken)
    }

    /// Takes a disk from a container, and from the machine if it was the last that had it. One that is not there is fine.
    pub(crate) async fn remove(&self, guest: &Guest, serial: &str) -> Result<()> {
        let mut known = self.0.known.lock().await;
        match known.get_mut(serial) {
            Some(disk) if disk.users > 1 => disk.users -= 1,
            // Asked for again after a failure, it is still known.
            _ => {
                guest.remove_disk(serial).await?;
                known.remove(serial);
            }
        }
        Ok(())
    }

    /// Removes what an earlier daemon has added for a container that it did not come to finish: each takes one of the machine's few places.
    /// Every container that there is has been adopted.
    pub(crate) async fn sweep(&self, guest: &Guest) -> Result<()> {
        if !self.0.inherited.load(Ordering::Relaxed) {
            return Ok(());
        }
        let known = self.0.known.lock().await;
        for serial in guest.disks().await?.iter().filter(|serial| !known.contains_key(*serial)) {
            guest.remove_disk(serial).await?;
        }
        self.0.inherited.store(false, Ordering::Relaxed);
        Ok(())
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

    #[tokio::test]
    async fn users_of_an_earlier_daemon_are_counted() {
        let disks = Disks::default();
        let shared = DiskUse { shared: Some(7), ..DiskUse::of("one".into()) };
        disks.adopt(&[shared.clone(), DiskUse::of("two".into())]).await;
        disks.adopt(&[shared]).await;
        let known = disks.0.known.lock().await;
        assert_eq!((known["one"].users, known["two"].users, known["two"].shared), (2, 1, None));
    }
}
