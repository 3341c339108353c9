//! What the agent is sent for a container: its specification, and what is to be mounted or made for it.

use kuasar_guest_protocol::agent::{Disk, HugePages, Storage};
use kuasar_sandboxers::{Error, Result, spec::OciSpec, types::Mount};

use crate::disks::DiskUse;

/// A filesystem on a disk, as the agent mounts it.
pub(crate) fn filesystem(disk: &DiskUse, mount: &Mount, target: &str) -> Storage {
    storage(disk, &mount.kind, mount.options.clone(), target)
}

/// A device node for a disk, as the agent makes it.
pub(crate) fn raw(disk: &DiskUse, readonly: bool, target: &str) -> Storage {
    storage(disk, "", if readonly { vec!["ro".into()] } else { Vec::new() }, target)
}

fn storage(disk: &DiskUse, filesystem: &str, options: Vec<String>, target: &str) -> Storage {
    let serial = disk.serial.clone();
    let disk = Disk { serial, filesystem: filesystem.into(), options, ..Disk::default() };
    let mut storage = Storage { target: target.into(), ..Storage::default() };
    storage.set_disk(disk);
    storage
}

/// Memory on huge pages that the pod's containers share.
pub(crate) fn huge_pages(options: &[String], target: &str) -> Storage {
    let mut storage = Storage { target: target.into(), ..Storage::default() };
    storage.set_huge_pages(HugePages { options: options.to_vec(), ..HugePages::default() });
    storage
}

/// A specification as a part of a message.
pub(crate) fn document(spec: &OciSpec) -> Result<Vec<u8>> {
    let bytes = spec.as_value().to_string().into_bytes();
    // With room for the rest of the message.
    let most = kuasar_guest_protocol::MESSAGE_MAX - (64 << 10);
    if bytes.len() > most {
        return Err(Error::invalid("container spec", format!("it has {} bytes; a guest takes at most {most}", bytes.len())));
    }
    Ok(bytes)
}
