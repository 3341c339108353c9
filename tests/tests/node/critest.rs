//! What of the CRI's conformance suite needs a node as this one: its specs of AppArmor.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::image::recipes;
use kuasar_tests::vm_node::software::CONTAINERD_SOCKET;
use kuasar_tests::{skip, tools};

use crate::suite::{Entry, HANDLER, Site, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![; slow: apparmor]
}

/// How many specs there are in critest 1.37. Fewer would be a focus that does not mean them any more.
const SPECS: u32 = 9;

async fn apparmor(site: &mut Site) -> Result<()> {
    if let Err(missing) = tools::critest() {
        skip::record("critest::apparmor", &missing.to_string());
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let images = dir.path().join("images.tar");
    recipes::for_critest()?.write_tar(std::fs::File::create(&images)?)?;
    site.node.push(&images, "/tmp/images.tar").await?;
    site.sh("ctr -n k8s.io images import /tmp/images.tar >/dev/null && rm /tmp/images.tar").await?;
    let endpoint = format!("unix://{CONTAINERD_SOCKET}");
    let script = format!(
        "cd /tmp && critest -runtime-handler {HANDLER} -runtime-endpoint {endpoint} -image-endpoint {endpoint} \
         -ginkgo.no-color -ginkgo.seed 1 -ginkgo.focus AppArmor 2>&1"
    );
    let ran = site.node.script(&script).timeout(Duration::from_secs(1000)).run().await?;
    let said = ran.stdout();
    let verdict = said.lines().find(|line| line.contains(" Passed | ")).context("critest gave no verdict")?;
    let passed = verdict.split(" Passed").next().and_then(|before| before.rsplit(' ').next()?.parse::<u32>().ok());
    let are_all = ran.code == 0 && passed.is_some_and(|passed| passed >= SPECS) && verdict.contains("| 0 Failed");
    ensure!(are_all, "critest ended with {}: {verdict}; its last lines:\n{}", ran.code, last_lines(&said));
    Ok(())
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
