//! What makes a container node of it: containerd and kuasard as services, with tools to look at them, and images.
//!
//! kuasar comes as its Debian packages, which the node installs with apt; the rest is what the other tests use, from the cache or PATH.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Payload, VmNode};
use crate::image::recipes;
use crate::tools;

/// containerd's socket in the node.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// As containerd's own sources have it.
const CONTAINERD_UNIT: &str = "[Unit]
Description=containerd container runtime
After=network.target dbus.service

[Service]
ExecStart=/usr/local/bin/containerd
Type=notify
Delegate=yes
KillMode=process
Restart=always
RestartSec=5
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
OOMScoreAdjust=-999

[Install]
WantedBy=multi-user.target
";

/// Configuration: a second sandboxer beside the package's.
pub const SANDBOXERS: (&str, &str) =
    ("/etc/kuasar/conf.d/crun.toml", "[sandboxer.kuasar-crun]\nkind = 'runc'\nruntime = 'crun'\n");

/// Where the packages are in the node, in the directories that `scripts/deb-versions.sh` makes.
pub const PACKAGES: &str = "/opt/node/packages";

/// As an administrator does, without a network. The drop-in is made before containerd starts, which asks each shim for its features then.
const INSTALL: &str = "set -e
export DEBIAN_FRONTEND=noninteractive
apt-get -qq -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root install --yes /opt/node/packages/1/*.deb
kuasarctl containerd-config >/etc/containerd/conf.d/kuasar.toml
systemctl daemon-reload
systemctl enable --quiet --now containerd
ctr -n k8s.io images import /opt/node/images.tar >/dev/null
rm /opt/node/images.tar";

/// All of it, to be there from the boot on: `packages` is a directory that `scripts/deb-versions.sh` has made.
///
/// # Errors
/// A tool is missing, or something cannot be read.
pub fn payload(packages: &Path) -> Result<Payload> {
    let mut payload = Payload::new()?;
    let mut names = Vec::new();
    for version in ["1", "2", "broken"] {
        let dir = packages.join(version);
        let entries = std::fs::read_dir(&dir).with_context(|| format!("read {}: `make node-debs` makes it", dir.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("read {}", dir.display()))?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                payload.program(&path, &format!("{PACKAGES}/{version}"))?;
                names.push(path);
            }
        }
    }
    ensure!(!names.is_empty(), "no packages in {}: `make node-debs` makes them", packages.display());
    let containerd = tools::Containerd::find()?;
    let mut programs = vec![containerd.containerd, containerd.ctr, containerd.shim_runc_v2, tools::runc()?, tools::crictl()?];
    // Without it what needs it is skipped.
    programs.extend(tools::critest());
    for program in programs {
        payload.program(&program, "/usr/local/bin")?;
    }
    let plugins = tools::cni_bin_dir()?;
    for plugin in ["bridge", "host-local", "loopback", "portmap"] {
        payload.program(&plugins.join(plugin), "/opt/cni/bin")?;
    }
    payload.file("/etc/containerd/config.toml", containerd_config()?.as_bytes())?;
    payload.file("/etc/systemd/system/containerd.service", CONTAINERD_UNIT.as_bytes())?;
    payload.file("/etc/cni/net.d/10-node.conflist", &serde_json::to_vec_pretty(&network())?)?;
    payload.file("/etc/crictl.yaml", format!("runtime-endpoint: unix://{CONTAINERD_SOCKET}\ntimeout: 60\n").as_bytes())?;
    payload.file(SANDBOXERS.0, SANDBOXERS.1.as_bytes())?;
    // containerd would find no directory of drop-ins.
    payload.file("/etc/containerd/conf.d/.keep", b"")?;
    let mut images = Vec::new();
    recipes::for_tests()?.write_tar(&mut images)?;
    payload.file("/opt/node/images.tar", &images)?;
    Ok(payload)
}

/// Installs and starts what [`payload`] has put there.
///
/// # Errors
/// Something does not start.
pub async fn start(node: &VmNode) -> Result<()> {
    node.script(INSTALL).timeout(Duration::from_secs(240)).check().await.context("install kuasar, start containerd")?;
    Ok(())
}

/// systemd's cgroup driver, which has to be set before the drop-in is made.
fn containerd_config() -> Result<String> {
    let config = json!({
        "version": 3,
        "imports": ["/etc/containerd/conf.d/*.toml"],
        // In 2 s, what containerd allows, an emulated machine beside others' work may not have replaced the daemon.
        "timeouts": { "io.containerd.timeout.task.state": "30s" },
        "plugins": {
            "io.containerd.cri.v1.images": { "pinned_images": { "sandbox": recipes::PAUSE } },
            "io.containerd.cri.v1.runtime": {
                // containerd passes no limits of huge pages on otherwise.
                "disable_hugetlb_controller": false,
                "containerd": {
                    "runtimes": { "runc": { "runtime_type": "io.containerd.runc.v2", "options": { "SystemdCgroup": true } } },
                },
                "cni": { "bin_dirs": ["/opt/cni/bin"], "conf_dir": "/etc/cni/net.d" },
            },
        },
    });
    toml::to_string(&config).context("write containerd's configuration")
}

fn network() -> serde_json::Value {
    let ipam = json!({ "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }] });
    let bridge =
        json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true, "ipam": ipam });
    let ports = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    json!({ "cniVersion": "1.0.0", "name": "node", "plugins": [bridge, ports] })
}
