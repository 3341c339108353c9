//! The drop-in that makes containerd send pods to this daemon.
//!
//! What has to be written differs between versions of containerd; the comments in the output say why each line is there, because
//! whoever puts a file into /etc/containerd has to answer for it.

use std::{fmt::Write, path::Path};

use kuasar_shim::{
    check::{
        containerd::{CONFIG, DROP_INS, Version},
        driver::{Driver, Source},
    },
    config::{Config, SandboxerConfig},
};

/// What the output depends on besides the configuration.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    /// The containerd it is for.
    pub(crate) version: Version,
    /// The daemon's socket.
    pub(crate) socket: &'a Path,
    /// Directory of the shim programs.
    pub(crate) programs: &'a Path,
    /// Image to pin as pause image.
    pub(crate) pause_image: Option<&'a str>,
    /// Whether containerd and the daemon lack `CAP_SYS_RESOURCE`.
    pub(crate) restrict_oom_score: bool,
    /// The node's cgroup driver, and what says so.
    pub(crate) driver: (Driver, Source),
}

/// First version with the Sandbox API for other sandboxers.
const SANDBOX_API: (u32, u32, u32) = (2, 0, 0);
/// First version that anything was tried on.
const TRIED: (u32, u32, u32) = (2, 1, 0);
/// First version whose `containerd config default` imports the drop-ins.
const IMPORTS: (u32, u32, u32) = (2, 2, 0);
/// First version that pulls a pause image for every sandboxer.
const PULLS_PAUSE: (u32, u32, u32) = (2, 3, 0);
/// First version that asks shims of other types than runc's for their features.
const ASKS_FEATURES: (u32, u32, u32) = (2, 3, 4);
/// First version with `disable_pause_image_pull`.
const PAUSE_SWITCH: (u32, u32, u32) = (2, 4, 0);

/// Writes the drop-in.
///
/// # Errors
/// A sentence where this containerd cannot be served.
pub(crate) fn write(config: &Config, target: &Target<'_>) -> Result<String, String> {
    let version = target.version;
    let since = |(major, minor, patch)| version.at_least(major, minor, patch);
    if !since(SANDBOX_API) {
        return Err(format!(
            "containerd {version} hands no pods to other sandboxers: its Sandbox API came with 2.0; kuasar serves 2.1 and later. \
             Serving 1.7 (and ctr run, nerdctl, Docker) through shim v2 is not possible yet"
        ));
    }
    if version.major > 2 {
        return Err(format!("containerd {version} is newer than anything known here; see whether there is a newer kuasar"));
    }
    let mut out = String::new();
    let text = &mut out;
    let drop_in = DROP_INS.replace('*', "kuasar");
    comment(text, "", &format!("kuasar for containerd {version}, written by `kuasarctl containerd-config`."));
    comment(text, "", &format!("Keep it as {drop_in} and restart containerd."));
    comment(text, "", &format!("containerd reads that directory only if {CONFIG} exists and says"));
    comment(text, "", &format!("    imports = [{}]", quoted(DROP_INS)));
    if since(IMPORTS) {
        comment(text, "", "which the output of `containerd config default` does.");
    } else {
        comment(text, "", &format!("which containerd {version} does not write by itself: add the line at its top."));
    }
    if !since(TRIED) {
        comment(text, "", "containerd 2.0 has what this needs, but was never tried: 2.1 or later is better.");
    }
    let (driver, source) = target.driver;
    comment(
        text,
        "",
        &format!("The cgroup driver of this node is {driver}, by {source}. Pods of kuasar have kubelet's, whichever"),
    );
    comment(text, "", "that is, and nothing has to be set for it here.");
    text.push_str("version = 3\n");
    node_settings(text, target);
    for (name, config) in &config.sandboxers {
        sandboxer(text, target, name, config);
    }
    Ok(out)
}

/// Settings of containerd as a whole, only where nothing works without.
fn node_settings(text: &mut String, target: &Target<'_>) {
    let version = target.version;
    let since = |(major, minor, patch)| version.at_least(major, minor, patch);
    if let Some(image) = target.pause_image {
        text.push('\n');
        comment(
            text,
            "",
            "The pause image of the whole node. Pods of kuasar have no pause container; a version of containerd that",
        );
        comment(text, "", "pulls it all the same finds this one.");
        let _infallible =
            writeln!(text, "[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = {}", quoted(image));
    } else if since(PULLS_PAUSE) && !since(PAUSE_SWITCH) {
        text.push('\n');
        comment(
            text,
            "",
            &format!("containerd {version} pulls the pause image before each pod, although pods of kuasar have no pause"),
        );
        comment(
            text,
            "",
            "container, and no setting prevents it. Without a registry at hand, import any small image and name it:",
        );
        comment(text, "", "`kuasarctl containerd-config --pause-image REFERENCE`.");
    }
    if target.restrict_oom_score {
        text.push('\n');
        comment(
            text,
            "",
            "CAP_SYS_RESOURCE is missing here: containers cannot be given the low OOM scores that Kubernetes asks for.",
        );
        comment(text, "", "This applies to all runtime handlers.");
        text.push_str("[plugins.'io.containerd.cri.v1.runtime']\n  restrict_oom_score_adj = true\n");
    }
}

fn sandboxer(text: &mut String, target: &Target<'_>, name: &str, config: &SandboxerConfig) {
    let in_machine = matches!(config, SandboxerConfig::Vmm(_));
    let version = target.version;
    let since = |(major, minor, patch)| version.at_least(major, minor, patch);
    let shim = format!("containerd-shim-{name}-v1");
    let table = format!("plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}");
    let _infallible = write!(
        text,
        "\n[proxy_plugins.{name}]\n  type = \"sandbox\"\n  address = {}\n\n[{table}]\n  sandboxer = {}\n",
        quoted(&target.socket.display().to_string()),
        quoted(name),
    );
    comment(text, "  ", &format!("containerd runs {shim} for this type. It has to be on containerd's search path:"));
    comment(text, "  ", "without it a restart of containerd takes every container for dead.");
    let _infallible = writeln!(text, "  runtime_type = \"io.containerd.{name}.v1\"");
    // An OCI runtime in a machine tells nobody what it can do.
    if !since(ASKS_FEATURES) && !in_machine {
        comment(
            text,
            "  ",
            &format!(
                "containerd {version} asks only shims of runc's type what they can do; of this one it believes that it has neither"
            ),
        );
        comment(
            text,
            "  ",
            "recursive read-only mounts nor user namespaces. Where containerd-shim-runc-v2 is installed as well, pods get both by",
        );
        comment(text, "  ", "these lines instead (that shim is then what containerd runs for containers it has lost):");
        comment(text, "  ", "    runtime_type = \"io.containerd.runc.v2\"");
        comment(text, "  ", &format!("    runtime_path = {}", quoted(&target.programs.join(&shim).display().to_string())));
    }
    if since(PAUSE_SWITCH) {
        comment(text, "  ", "Pods of kuasar have no pause container.");
        text.push_str("  disable_pause_image_pull = true\n");
    }
    if in_machine {
        comment(
            text,
            "  ",
            "Pods run in virtual machines: a privileged container cannot be given the node's devices, and has the machine's.",
        );
        text.push_str("  privileged_without_host_devices = true\n");
        text.push_str("  privileged_without_host_devices_all_devices_allowed = true\n");
    }
}

fn comment(text: &mut String, indent: &str, line: &str) {
    let _infallible = writeln!(text, "{indent}# {line}");
}

/// A TOML string.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(version: &str) -> Target<'static> {
        Target {
            version: version.parse().unwrap(),
            socket: Path::new("/run/kuasar/kuasard.sock"),
            programs: Path::new("/usr/local/bin"),
            pause_image: None,
            restrict_oom_score: false,
            driver: (Driver::Systemd, Source::Kubelet),
        }
    }

    fn two_sandboxers() -> Config {
        let text = "[sandboxer.kuasar-runc]\nkind = 'runc'\n[sandboxer.kuasar-crun]\nkind = 'runc'\nruntime = 'crun'\n";
        Config::parse(Path::new("c"), text).unwrap()
    }

    fn runtime<'a>(table: &'a toml::Table, name: &str) -> &'a toml::Table {
        table["plugins"]["io.containerd.cri.v1.runtime"]["containerd"]["runtimes"][name].as_table().unwrap()
    }

    #[test]
    fn every_version_gets_each_sandboxer() {
        for version in ["2.0.5", "2.1", "2.1.9", "2.2.1", "2.3.0", "2.3.4", "2.4", "2.4.2", "v2.5.0-beta.1"] {
            let text = write(&two_sandboxers(), &target(version)).unwrap();
            let table: toml::Table = text.parse().unwrap();
            assert_eq!(table["version"].as_integer(), Some(3), "{version}");
            for name in ["kuasar-runc", "kuasar-crun"] {
                let proxy = &table["proxy_plugins"][name];
                assert_eq!(proxy["type"].as_str(), Some("sandbox"));
                assert_eq!(proxy["address"].as_str(), Some("/run/kuasar/kuasard.sock"));
                let runtime = runtime(&table, name);
                assert_eq!(runtime["sandboxer"].as_str(), Some(name));
                assert_eq!(runtime["runtime_type"].as_str(), Some(format!("io.containerd.{name}.v1").as_str()));
                assert!(!runtime.contains_key("runtime_path") && !runtime.contains_key("options"));
            }
            assert!(!table["plugins"].as_table().unwrap().contains_key("io.containerd.cri.v1.images"));
            assert!(text.contains(r#"imports = ["/etc/containerd/conf.d/*.toml"]"#));
            assert!(text.contains("# The cgroup driver of this node is systemd, by cgroupDriver in"), "{text}");
        }
    }

    #[test]
    fn the_pause_image_is_switched_off_where_that_works() {
        for (version, switched) in
            [("2.0.5", false), ("2.1.9", false), ("2.2.1", false), ("2.3.4", false), ("2.4.0", true), ("2.4", true)]
        {
            let text = write(&Config::default(), &target(version)).unwrap();
            let table: toml::Table = text.parse().unwrap();
            let switch = runtime(&table, "kuasar-runc").get("disable_pause_image_pull").and_then(toml::Value::as_bool);
            assert_eq!(switch, switched.then_some(true), "{version}");
            assert_eq!(text.contains("--pause-image"), version.starts_with("2.3"), "{version}");
        }
        let target = Target { pause_image: Some("localhost/pause:1"), ..target("2.3.4") };
        let table: toml::Table = write(&Config::default(), &target).unwrap().parse().unwrap();
        let images = &table["plugins"]["io.containerd.cri.v1.images"];
        assert_eq!(images["pinned_images"]["sandbox"].as_str(), Some("localhost/pause:1"));
    }

    #[test]
    fn versions_that_do_not_ask_our_shim_are_told_the_way_round() {
        for (version, told) in
            [("2.0.5", true), ("2.1.9", true), ("2.2.1", true), ("2.3.3", true), ("2.3.4", false), ("2.4.2", false)]
        {
            let text = write(&Config::default(), &target(version)).unwrap();
            let way_round = r#"#     runtime_path = "/usr/local/bin/containerd-shim-kuasar-runc-v1""#;
            assert_eq!(text.contains(way_round), told, "{version}");
            assert_eq!(
                text.contains("imports the") || text.contains("add the line at its top"),
                !version.starts_with("2.2") && told && !version.starts_with("2.3"),
                "{version}"
            );
        }
    }

    #[test]
    fn machines_are_given_no_devices_of_the_node() {
        let text = "[sandboxer.kuasar-runc]\nkind = 'runc'\n[sandboxer.kuasar-qemu]\nkind = 'vmm'\nhypervisor = 'qemu'\n";
        let config = Config::parse(Path::new("c"), text).unwrap();
        for version in ["2.1.9", "2.4.2"] {
            let text = write(&config, &target(version)).unwrap();
            let table: toml::Table = text.parse().unwrap();
            let without = |name| runtime(&table, name).get("privileged_without_host_devices").and_then(toml::Value::as_bool);
            assert_eq!((without("kuasar-qemu"), without("kuasar-runc")), (Some(true), None), "{version}");
            let all = "privileged_without_host_devices_all_devices_allowed";
            assert_eq!(runtime(&table, "kuasar-qemu").get(all).and_then(toml::Value::as_bool), Some(true), "{version}");
            // The way round the missing question is for OCI runtimes of the node.
            assert!(!text.contains("containerd-shim-kuasar-qemu-v1\"\n"), "{version}");
        }
    }

    #[test]
    fn what_the_node_needs_is_set() {
        let target = Target { restrict_oom_score: true, ..target("2.4.2") };
        let table: toml::Table = write(&Config::default(), &target).unwrap().parse().unwrap();
        assert_eq!(table["plugins"]["io.containerd.cri.v1.runtime"]["restrict_oom_score_adj"].as_bool(), Some(true));
        // For a type that is not runc's, containerd reads any such table in a form that pods with a user namespace fail with.
        assert!(!runtime(&table, "kuasar-runc").contains_key("options"));
    }

    #[test]
    fn versions_that_cannot_be_served_are_told_why() {
        assert!(write(&Config::default(), &target("1.7.24")).unwrap_err().contains("not possible yet"));
        assert!(write(&Config::default(), &target("3.0.0")).unwrap_err().contains("newer"));
    }
}
