//! How long the stages of starts took, by kuasard's own account in its log.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use kuasar_sandboxers::stages::Stage;

/// Where an account begins in a line of the log.
const FIELD: &str = "stages=";

/// In stages that begin like this the guest works, or boots: all others are work on the node.
const GUEST: [&str; 4] = ["start QEMU", "boot the guest", "set up the guest", "create the container in the guest"];

/// What kuasard did on the node for a pod and its container, in milliseconds, without the machine's boot and the guest's own work. CNI is
/// containerd's.
///
/// # Errors
/// The log tells nothing of them.
pub(crate) fn on_node(log: &str, ids: [&str; 2]) -> Result<f64> {
    // An operation that is watched in parts is told of after each; the last account has all.
    let mut accounts: BTreeMap<(&str, &str), Vec<Stage>> = BTreeMap::new();
    for id in ids {
        let named = format!("id=\"{id}\"");
        for line in log.lines().filter(|line| line.contains(&named)) {
            let Some((head, stages)) = line.split_once(FIELD) else { continue };
            let operation =
                head.split_once("operation=\"").and_then(|(_, rest)| rest.split_once('"')).map_or("", |part| part.0);
            let stages = serde_json::from_str(stages).with_context(|| format!("read the stages of {line:?}"))?;
            accounts.insert((id, operation), stages);
        }
    }
    // The sandbox is created and started; of a container's start nothing is the node's.
    anyhow::ensure!(accounts.len() >= 3, "kuasard's log tells of {:?} only", accounts.keys());
    let ours = accounts.values().flatten().filter(|stage| !GUEST.iter().any(|guest| stage.name.starts_with(guest)));
    Ok(ours.map(|stage| stage.milliseconds as f64).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_on_the_node_is_added_up() {
        let log = r#"
t DEBUG kuasar: done id="p" operation="create the sandbox" stages=[{"name":"size the machine","milliseconds":2}]
t DEBUG kuasar: done id="p" operation="start the sandbox" stages=[{"name":"a","milliseconds":5},{"name":"boot the guest","milliseconds":900}]
t DEBUG kuasar: done id="x" operation="start the sandbox" stages=[{"name":"a","milliseconds":50}]
t DEBUG kuasar: done id="c" operation="create the container" stages=[{"name":"share the rootfs","milliseconds":7}]
"#;
        assert_eq!(on_node(log, ["p", "c"]).unwrap(), 14.0);
        assert!(on_node(log, ["p", "y"]).is_err());
    }
}
