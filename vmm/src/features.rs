//! What pods in machines can be offered.

use serde_json::{Value, json};

/// The runtime specification's `features` document, as far as it is true of any machine: containerd asks for it before there is one, and
/// then offers Kubernetes what it finds. Read-only mounts and mapped owners are this node's doing, user namespaces the guest's.
#[must_use]
pub fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": ["bind", "rbind", "ro", "rro", "rw", "rprivate", "rslave"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    })
}
