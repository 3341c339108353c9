//! What a machine is to be: the one device model that all drivers translate.

use std::{fmt, os::fd::OwnedFd, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

/// A machine, complete. Descriptors in it are handed to the VMM when it is started.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// The sandbox's id, for process lists and logs.
    pub name: String,
    /// Processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Memory,
    /// The kernel: a bzImage.
    pub kernel: PathBuf,
    /// The initial ramdisk, with the agent as `/init`.
    pub initrd: PathBuf,
    /// Words for the kernel's command line. The driver adds what its machine needs (`console=…`).
    pub cmdline: Vec<String>,
    /// Disks that are there from the start.
    pub disks: Vec<Disk>,
    /// Shared directories.
    pub shares: Vec<Share>,
    /// Network interfaces.
    pub nics: Vec<Nic>,
    /// The way to the agent.
    pub vsock: Vsock,
    /// The file that the guest's console is appended to. It exists; the VMM must open it for appending, for it is cut when it grows.
    pub console: PathBuf,
    /// Unused guest memory is given back to the host (balloon with free page reporting).
    pub balloon: bool,
}

/// Processors of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpus {
    /// How many it starts with; at least 1.
    pub boot: u32,
    /// How many it can be given; at least `boot`.
    pub max: u32,
}

/// Memory of a machine, in MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// How much it starts with.
    pub boot_mib: u64,
    /// How much it can be given; at least `boot_mib`.
    pub max_mib: u64,
    /// On huge pages of the host, of this size in KiB.
    pub huge_page_kib: Option<u64>,
}

/// A virtio-blk disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The virtio serial number, by which the guest finds it, and the name of its devices: at most 20 letters, digits and hyphens.
    pub serial: String,
    /// The image (raw) or block device.
    pub path: PathBuf,
    /// Enforced by the VMM.
    pub readonly: bool,
}

/// A virtiofs share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// What the guest mounts it by.
    pub tag: String,
    /// virtiofsd's vhost-user socket.
    pub socket: PathBuf,
}

/// A virtio-net interface.
#[derive(Clone, Debug)]
pub struct Nic {
    /// Its place among the machine's, from 0.
    pub index: usize,
    /// The address in the guest, the same as that of the pod's interface.
    pub mac: MacAddress,
    /// Largest packet.
    pub mtu: u32,
    /// An open tap (one queue, `IFF_VNET_HDR`), non-blocking.
    pub tap: Arc<OwnedFd>,
    /// An open `/dev/vhost-net`, where there is one.
    pub vhost: Option<Arc<OwnedFd>>,
}

/// How the host reaches the guest's vsock.
#[derive(Clone, Debug)]
pub enum Vsock {
    /// By the kernel: an open `/dev/vhost-vsock`.
    Kernel {
        /// The guest's context id.
        cid: u32,
        /// The device.
        vhost: Arc<OwnedFd>,
    },
    /// By a vhost-user device (vhost-device-vsock), with the hybrid protocol on a unix socket of its own.
    User {
        /// The guest's context id.
        cid: u32,
        /// The device's vhost-user socket.
        socket: PathBuf,
        /// The socket with the hybrid protocol.
        hybrid: PathBuf,
    },
    /// By the VMM itself, with the hybrid protocol on this unix socket.
    Builtin {
        /// The guest's context id.
        cid: u32,
        /// Made by the VMM.
        socket: PathBuf,
    },
}

/// Where the guest's ports are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VsockAddress {
    /// `AF_VSOCK`.
    Cid(u32),
    /// A unix socket on which `CONNECT <port>\n` is answered with `OK <port>\n`.
    Hybrid(PathBuf),
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
