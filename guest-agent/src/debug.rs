//! What processes beside the containers run in, for people who look for what is wrong: a container with all of the machine.

use kuasar_sandboxers::{Error, Result, id::ContainerId, spec::OciSpec};
use serde_json::json;

/// Argument with which the agent's program does nothing until it is killed.
pub const WAIT: &str = "wait";

/// The name under which it is kept.
pub(crate) const ID: &str = "kuasar-guest-debug";

/// Its name, if there may be one.
pub(crate) fn id(allowed: bool) -> Result<ContainerId> {
    if !allowed {
        return Err(Error::Unsupported {
            operation: "a process beside the containers",
            why: "the guest was booted without kuasar.debug on its command line; allow it in the sandboxer's configuration"
                .into(),
        });
    }
    ID.parse()
}

/// Every capability, by its name.
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// A container whose files and namespaces are the machine's.
pub(crate) fn spec() -> Result<OciSpec> {
    let program = std::env::current_exe().map_err(Error::failed("find the agent's own program"))?;
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [program, WAIT],
            "cwd": "/",
            "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
        },
        "root": {"path": "/"},
        "mounts": [],
        // Without a mount namespace of its own it sees what is mounted later, too.
        "linux": {"namespaces": []},
    })
    .try_into()
}
