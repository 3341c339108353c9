//! containerd and kuasard as services of systemd.

use anyhow::{Context as _, Result, ensure};

use crate::suite::{Entry, HANDLER, Site, cases, suite};

pub(crate) fn cases() -> Vec<Entry> {
    cases![units_are_up, it_is_a_node_as_kubernetes_has_it, the_drop_in_is_taken, check_finds_what_the_distribution_lacks]
}

async fn units_are_up(site: &mut Site) -> Result<()> {
    let state = site.node.wait_running().await?;
    let failed = site.sh("systemctl --failed --plain --no-legend").await?;
    ensure!(state == "running" && failed.is_empty(), "the node is {state}, failed: {failed}");
    for unit in ["kuasard", "containerd"] {
        ensure!(site.show(unit, "ActiveState").await? == "active", "{unit} is not active");
        let restarts = site.show(unit, "NRestarts").await?;
        ensure!(restarts == "0", "{unit} was restarted {restarts} times");
    }
    Ok(())
}

async fn it_is_a_node_as_kubernetes_has_it(site: &mut Site) -> Result<()> {
    let hierarchy = site.sh("stat -f -c %T /sys/fs/cgroup").await?;
    ensure!(hierarchy == "cgroup2fs", "/sys/fs/cgroup is {hierarchy}");
    let enabled = site.sh("cat /sys/module/apparmor/parameters/enabled").await?;
    ensure!(enabled == "Y", "AppArmor enabled: {enabled}");
    let driver = site.sh("containerd config dump | grep SystemdCgroup").await?;
    ensure!(driver.contains("true"), "containerd has {driver}");
    Ok(())
}

async fn the_drop_in_is_taken(site: &mut Site) -> Result<()> {
    let handlers = site.cri.handlers().await?;
    for name in [HANDLER, "kuasar-crun"] {
        let handler = handlers.iter().find(|handler| handler.name == name).with_context(|| format!("no handler {name}"))?;
        let features = handler.features.unwrap_or_default();
        ensure!(features.user_namespaces && features.recursive_read_only_mounts, "{name} has {features:?}");
    }
    // containerd asks a shim of ours, not runc's.
    let types = site.sh("containerd config dump | grep runtime_type").await?;
    ensure!(types.contains("io.containerd.kuasar-runc.v1"), "runtime types are {types}");
    Ok(())
}

async fn check_finds_what_the_distribution_lacks(site: &mut Site) -> Result<()> {
    // Linux before 6.3 has no id-mapped tmpfs, and systemd before 254 loses descriptors at a stop.
    let expected: &[&str] = if suite() == "bookworm" { &["user namespaces", "systemd"] } else { &[] };
    let ran = site.node.script("kuasarctl check").run().await?;
    let lines = ran.stdout();
    // A line of advice begins with spaces.
    let others: Vec<&str> = lines.lines().skip(1).filter(|line| !line.starts_with("ok ") && !line.starts_with(' ')).collect();
    let are_expected = others.len() == expected.len()
        && expected.iter().all(|what| others.iter().any(|line| line.starts_with("warn ") && line.contains(what)));
    ensure!(ran.code == 0 && are_expected, "exit code {}: {others:?} {}", ran.code, ran.stderr());
    Ok(())
}
