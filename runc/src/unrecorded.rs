//! The processes of a sandbox, found without its record: by what its process 1 is called, by what the OCI runtime has noted, and by the
//! control groups of its containers.

use std::{collections::BTreeSet, fs, path::Path};

use kuasar_sandboxers::{
    Error, Result,
    id::{Namespace, SandboxId},
    process::{Identity, Tracked, has_ended, is_dead, pids},
};
use serde_json::Value;

use crate::{
    namespaces,
    sandboxer::{names, runtime_root, sandbox_dir},
};

/// The live processes of a sandbox below the sandboxer's `root`. Needs no OCI runtime and no daemon.
///
/// # Errors
/// When a directory or /proc cannot be read.
pub fn processes(root: &Path, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
    let dir = sandbox_dir(root, namespace, id);
    let mut found = BTreeSet::new();
    for (init, owner) in namespaces::inits(&dir)? {
        if owner == dir {
            found.insert(init.identity().pid);
        }
    }
    let oci = runtime_root(&dir);
    let containers = names(&oci)?;
    for container in &containers {
        // runc and youki; crun.
        for file in ["state.json", "status"] {
            let noted = fs::read(oci.join(container).join(file)).ok();
            if let Some(identity) = noted.and_then(|bytes| serde_json::from_slice(&bytes).ok()).as_ref().and_then(first_process)
                && Tracked::find(identity)?.is_some_and(|process| process.signal(0).unwrap_or(false))
            {
                found.insert(identity.pid);
            }
        }
    }
    if !containers.is_empty() {
        grouped(&containers, &mut found)?;
    }
    Ok(found.into_iter().collect())
}

/// A container's first process, where the runtime has noted when that started: without that its pid may be anybody's by now.
fn first_process(state: &Value) -> Option<Identity> {
    let number = |names: [&str; 2]| names.iter().find_map(|name| state.get(name)?.as_u64());
    let pid = u32::try_from(number(["init_process_pid", "pid"])?).ok()?;
    let start = number(["init_process_start", "process-start-time"])?;
    Some(Identity { pid, start })
}

/// Processes in the control groups of these containers or below. However the runtime has made such a group, containerd has it named after
/// the container, whose id is unique on the node.
fn grouped(containers: &[String], found: &mut BTreeSet<u32>) -> Result<()> {
    for pid in pids()? {
        let pid = pid?;
        let path = format!("/proc/{pid}/cgroup");
        let groups = match fs::read_to_string(&path) {
            Ok(groups) => groups,
            Err(error) if has_ended(&error) => continue,
            // It may be the container's, which is not to be taken for empty.
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        if is_in(&groups, containers) && !is_dead(pid) {
            found.insert(pid);
        }
    }
    Ok(())
}

/// `groups` as in `/proc/<pid>/cgroup`: `4:memory:/pods/<container>`, with systemd `0::/pods.slice/cri-containerd-<container>.scope`.
fn is_in(groups: &str, containers: &[String]) -> bool {
    let parts = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).flat_map(|path| path.split('/'));
    let mut names =
        parts.map(|part| part.strip_suffix(".scope").map_or(part, |scope| scope.rsplit('-').next().unwrap_or(scope)));
    names.any(|name| containers.iter().any(|container| container == name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_containers_group_is_known_by_its_name() {
        let containers = ["abc".to_owned()];
        for group in
            ["4:memory:/pods/abc", "0::/kubepods.slice/cri-containerd-abc.scope", "9:name=systemd:/x/abc/below", "0::/abc"]
        {
            assert!(is_in(&format!("1:cpu:/\n{group}\n"), &containers), "{group}");
        }
        for group in ["0::/", "0::/pods/abcd", "4:memory:/pods/cri-containerd-xabc.scope", "4:abc:/", ""] {
            assert!(!is_in(group, &containers), "{group}");
        }
    }

    #[test]
    fn a_pid_without_its_start_is_nobodys() {
        let runc = json!({ "init_process_pid": 7, "init_process_start": 99 });
        let crun = json!({ "pid": 7, "process-start-time": 99 });
        for state in [runc, crun] {
            assert_eq!(first_process(&state), Some(Identity { pid: 7, start: 99 }));
        }
        assert_eq!(first_process(&json!({ "pid": 7 })), None);
        assert_eq!(first_process(&json!([])), None);
    }

    #[test]
    fn what_runs_under_a_noted_pid_may_be_another() {
        let root = tempfile::tempdir().unwrap();
        let (namespace, id): (Namespace, SandboxId) = ("test".parse().unwrap(), "pod".parse().unwrap());
        assert!(processes(root.path(), &namespace, &id).unwrap().is_empty());
        let container = runtime_root(&sandbox_dir(root.path(), &namespace, &id)).join("no-group-is-called-so");
        fs::create_dir_all(&container).unwrap();
        let ourselves = Tracked::open(std::process::id()).unwrap().unwrap().identity();
        for (start, expected) in [(ourselves.start, vec![ourselves.pid]), (ourselves.start + 1, Vec::new())] {
            let state = json!({ "init_process_pid": ourselves.pid, "init_process_start": start });
            fs::write(container.join("state.json"), state.to_string()).unwrap();
            assert_eq!(processes(root.path(), &namespace, &id).unwrap(), expected);
        }
        fs::write(container.join("state.json"), "garbage").unwrap();
        assert!(processes(root.path(), &namespace, &id).unwrap().is_empty());
    }
}
