//! Which OCI runtime a pod has.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::{ContainerSpec, tools};

use crate::suite::{Entry, Lone, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Ours Alone: a_pod_stays_with_its_runtime]
}

/// As when a package upgrade brings a better one, which `auto` then takes.
async fn a_pod_stays_with_its_runtime(lone: &Lone) -> Result<()> {
    if tools::is_machine(&lone.handler) {
        return lone.skip("the OCI runtime is in the guest");
    }
    let other = if lone.handler.contains("crun") { tools::runc() } else { tools::crun() };
    let Ok(other) = other else { return lone.skip("there is one OCI runtime only") };
    let node = lone.node().await?;
    let old = node.run_pod(lone.pod().quick()).await?;
    let container = old.run(ContainerSpec::new("c").sleep()).await?;

    let kuasard = node.kuasard.as_ref().context("the node has no kuasard")?;
    let mut config: toml::Table = fs::read_to_string(kuasard.config())?.parse()?;
    config["sandboxer"][&lone.handler]["runtime"] = other.display().to_string().into();
    fs::write(kuasard.config(), config.to_string())?;
    // Its worker reads the configuration anew.
    let upgraded = kuasard.upgrade(None).await?;
    ensure!(upgraded.status.success(), "{}", String::from_utf8_lossy(&upgraded.stderr));

    assert_eq!(container.exec(["true"]).await?.exit_code, 0);
    let later = old.run(ContainerSpec::new("later").sleep()).await?;
    assert_eq!(later.exec(["true"]).await?.exit_code, 0);
    let new = node.run_pod(lone.pod().quick()).await?;
    assert_eq!(new.run(ContainerSpec::new("c").sleep()).await?.exec(["true"]).await?.exit_code, 0);
    old.remove_all().await?;
    new.remove_all().await?;
    node.stop().await
}
