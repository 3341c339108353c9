//! Kernel parameters of a pod.

use std::ffi::OsString;

use kuasar_sandboxers::{
    Error, Result,
    types::{NamespaceMode, SandboxSpec},
};

/// Parameters of the System V IPC and message queue namespaces, besides all of `fs/mqueue`.
const IPC: [&str; 8] = ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];

/// What containerd sets in every pod that has its own network: ports below 1024 and ping need no privilege, because the pod has the
/// network to itself.
const PORTS: (&str, &str) = ("net/ipv4/ip_unprivileged_port_start", "0");
const PING: (&str, &str) = ("net/ipv4/ping_group_range", "0 2147483647");

/// Arguments for kuasar-init that set the pod's parameters and the defaults.
///
/// # Errors
/// [`Error::Invalid`] for a parameter that is not a pod's own, naming it.
pub(crate) fn arguments(spec: &SandboxSpec) -> Result<Vec<OsString>> {
    let mut settings = Vec::new();
    for (name, value) in &spec.sysctls {
        settings.push((file(name, spec)?, value.as_str()));
    }
    let mut arguments = Vec::new();
    if spec.namespaces.network != NamespaceMode::Node {
        // The range cannot reach beyond the ids that a user namespace maps; containerd leaves it alone there too.
        let ping = spec.namespaces.user.is_none().then_some(PING);
        for (path, value) in [Some(PORTS), ping].into_iter().flatten() {
            if !settings.iter().any(|(set, _)| set == path) {
                arguments.push(format!("sysctl=?{path}={value}").into());
            }
        }
    }
    arguments.extend(settings.into_iter().map(|(path, value)| format!("sysctl={path}={value}").into()));
    Ok(arguments)
}

/// The file below /proc/sys, if the parameter belongs to a namespace that the pod has for itself.
fn file(name: &str, spec: &SandboxSpec) -> Result<String> {
    let refuse = |why: &str| Err(Error::invalid(format!("sysctl {name:?}"), why));
    // sysctl(8): the first separator tells which of the two is one; the other is part of a name, as in "net/ipv4/conf/eth0.1/mtu".
    let dots = name.find(['.', '/']).is_some_and(|first| name.as_bytes()[first] == b'.');
    let swapped = |c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    };
    let path: String = if dots { name.chars().map(swapped).collect() } else { name.to_owned() };
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains(['\0', '=']) {
        return refuse("it is not the name of a kernel parameter");
    }
    let namespaces = &spec.namespaces;
    match path.split_once('/') {
        Some(("net", _)) if namespaces.network == NamespaceMode::Node => {
            refuse("it belongs to the network, which this pod shares with the node")
        }
        Some(("net", _)) => Ok(path),
        Some(("fs", rest)) if rest.starts_with("mqueue/") => ipc(path, namespaces.ipc, refuse),
        Some(("kernel", rest)) if IPC.contains(&rest) => ipc(path, namespaces.ipc, refuse),
        Some(("kernel", "hostname" | "domainname")) if namespaces.network == NamespaceMode::Node => {
            refuse("it belongs to the host name, which this pod shares with the node")
        }
        Some(("kernel", "hostname" | "domainname")) => Ok(path),
        _ => refuse(
            "it is not a pod's own; accepted: net.*, fs.mqueue.*, kernel.shm*, kernel.msg*, kernel.sem, kernel.hostname and kernel.domainname",
        ),
    }
}

fn ipc(path: String, mode: NamespaceMode, refuse: impl Fn(&str) -> Result<String>) -> Result<String> {
    if mode == NamespaceMode::Node {
        refuse("it belongs to the IPC namespace, which this pod shares with the node")
    } else {
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use kuasar_sandboxers::fake;

    fn pod(sysctls: &[(&str, &str)]) -> SandboxSpec {
        let mut spec = fake::spec("pod");
        spec.sysctls = sysctls.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        spec
    }

    #[test]
    fn defaults_give_way() {
        assert_eq!(
            arguments(&pod(&[])).unwrap(),
            ["sysctl=?net/ipv4/ip_unprivileged_port_start=0", "sysctl=?net/ipv4/ping_group_range=0 2147483647"]
        );
        assert_eq!(
            arguments(&pod(&[("net.ipv4.ip_unprivileged_port_start", "1024"), ("net.ipv4.ping_group_range", "1 0")])).unwrap(),
            ["sysctl=net/ipv4/ip_unprivileged_port_start=1024", "sysctl=net/ipv4/ping_group_range=1 0"]
        );
        let mut mapped = pod(&[]);
        mapped.namespaces.user = Some(Default::default());
        assert_eq!(arguments(&mapped).unwrap(), ["sysctl=?net/ipv4/ip_unprivileged_port_start=0"]);
        let mut host = pod(&[]);
        host.namespaces.network = NamespaceMode::Node;
        assert!(arguments(&host).unwrap().is_empty());
    }

    #[test]
    fn names_in_both_notations() {
        for (name, path) in [
            ("net.ipv4.conf.eth0/1.forwarding", "net/ipv4/conf/eth0.1/forwarding"),
            ("net/ipv4/conf/eth0.1/forwarding", "net/ipv4/conf/eth0.1/forwarding"),
            ("kernel.shm_rmid_forced", "kernel/shm_rmid_forced"),
            ("fs.mqueue.msg_max", "fs/mqueue/msg_max"),
            ("kernel.hostname", "kernel/hostname"),
        ] {
            assert_eq!(file(name, &pod(&[])).unwrap(), path);
        }
    }

    #[test]
    fn what_is_the_nodes_is_refused_by_name() {
        for name in ["vm.swappiness", "kernel.panic", "fs.file-max", "net", "net..ipv4", "net/../kernel/panic", "net.x=y", ""] {
            let error = arguments(&pod(&[(name, "1")])).unwrap_err();
            assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        }
        let mut host = pod(&[("kernel.shmmax", "1")]);
        host.namespaces.ipc = NamespaceMode::Node;
        assert!(arguments(&host).is_err());
        let mut host = pod(&[("net.ipv4.ip_forward", "1")]);
        host.namespaces.network = NamespaceMode::Node;
        assert!(arguments(&host).is_err());
    }

    proptest! {
        #[test]
        fn a_path_never_leaves_its_tree(name in "(net|kernel|fs)?[./]?[a-z./=]{0,30}") {
            if let Ok(path) = file(&name, &pod(&[])) {
                prop_assert!(path.split('/').all(|part| !part.is_empty() && part != ".." && part != "."));
                prop_assert!(path.starts_with("net/") || path.starts_with("kernel/") || path.starts_with("fs/mqueue/"));
            }
        }
    }
}
