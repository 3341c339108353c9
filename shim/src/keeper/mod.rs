//! The keeper: the parent of the daemon's working process, which holds what must outlive that.
//!
//! ```text
//!   kuasard (keeper) ── listening sockets, Task connections with their journals, exits of container processes
//!      │  one socket: datagrams with descriptors
//!      └── kuasard (worker) ── everything else
//! ```
//!
//! containerd takes a lost Task connection for the container's death and never dials again. So the connections belong to a
//! process that does next to nothing: the keeper accepts them, starts the worker, hands it copies, and when the worker dies, starts
//! another with the same. It knows no protocol but [`wire`], and parks whatever it is given under a name.
//!
//! It is the child subreaper: a container's first process becomes its child when the OCI runtime exits, whatever has become of the
//! worker. It remembers how its children ended, by pid *and start time*, because pids are reused.
//!
//! An upgrade is the same hand-over on purpose: the worker finishes what it is about and leaves, one of the new program takes its place,
//! and when that serves, the keeper itself becomes the new program ([`succession`]). A worker that does not get ready is replaced by
//! one of the old program, which is still at hand whatever has become of its file.
//!
//! The keeper's own death ends the worker too; containers run on, and the next daemon finds them by their state. Under [`systemd`] it
//! finds what was parked as well, so containerd does not notice.

mod log;
mod parent;
mod signals;
mod succession;
mod systemd;
pub mod wire;
pub mod worker;

pub use self::{parent::keep, systemd::is_stored};

/// The name under which the worker's configuration is parked.
pub const CONFIG: &str = "config";
