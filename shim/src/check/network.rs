//! What containerd's CNI needs for pods with a network of their own.

use super::{Finding, Host, containerd};

/// Plugins that the usual configurations are made of, and where they come from.
const PLUGINS: [&str; 4] = ["bridge", "host-local", "loopback", "portmap"];

/// Where Debian's package puts them, which is not where containerd looks unless told.
const DEBIAN: &str = "/usr/lib/cni";

pub(super) fn all(host: &Host, containerd: &containerd::Setup) -> Vec<Finding> {
    vec![plugins(host, &containerd.cni_bin_dirs()), configuration(host, &containerd.cni_conf_dir())]
}

pub(super) fn plugins(host: &Host, directories: &[String]) -> Finding {
    let has = |name: &str| directories.iter().any(|directory| host.program(format!("{directory}/{name}")).is_some());
    let (found, lacking): (Vec<_>, Vec<_>) = PLUGINS.into_iter().partition(|name| has(name));
    let places = directories.join(", ");
    let elsewhere =
        host.program(format!("{DEBIAN}/bridge")).is_some() && !directories.iter().any(|directory| directory == DEBIAN);
    let remedy = if elsewhere {
        format!(
            "they are in {DEBIAN}: set bin_dirs = [{DEBIAN:?}] in [plugins.'io.containerd.cri.v1.runtime'.cni] of containerd"
        )
    } else {
        format!("install the CNI plugins into {places} (Debian: containernetworking-plugins, into {DEBIAN})")
    };
    if found.is_empty() {
        return Finding::missing("CNI plugins", format!("none in {places}: only pods with hostNetwork run"), remedy);
    }
    if !lacking.is_empty() {
        return Finding::warn("CNI plugins", format!("{}, but no {}", found.join(", "), lacking.join(", ")), remedy);
    }
    Finding::ok("CNI plugins", format!("{} in {places}", found.join(", ")))
}

pub(super) fn configuration(host: &Host, directory: &str) -> Finding {
    let names = host.list(directory);
    // containerd takes the first of these in order of name.
    let first = names.iter().find(|name| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)));
    match first {
        Some(name) => Finding::ok("CNI configuration", format!("{directory}/{name}")),
        None => Finding::missing(
            "CNI configuration",
            format!("none in {directory}: only pods with hostNetwork run"),
            "install the cluster's network add-on, or write a conflist",
        ),
    }
}
