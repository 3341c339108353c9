//! The Debian packages, as an administrator has them: upgraded, removed and installed under pods and beside other installations.

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::vm_node::{Ran, software};

use crate::running::{Running, probed};
use crate::suite::{Entry, Site, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![
        an_upgrade_that_finds_the_disk_full_then_room,
        a_version_that_does_not_work,
        removal_is_refused_under_pods,
        purge_then_an_installation_by_hand,
    ]
}

/// The options of each call.
const APT: &str = "DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o APT::Sandbox::User=root \
                   -o Dpkg::Options::=--force-confnew --yes --allow-downgrades";

/// Runs apt; returns what it and the packages have said.
async fn apt(site: &Site, what: &str) -> Result<String> {
    let ran = tried(site, what).await?;
    ensure!(ran.code == 0, "apt-get {what}: exit code {}: {}", ran.code, ran.stdout());
    Ok(ran.stdout())
}

async fn tried(site: &Site, what: &str) -> Result<Ran> {
    site.node.script(&format!("{APT} {what} 2>&1")).run().await
}

/// Which version is installed: `install ok installed 0.1.0…`, or nothing.
async fn installed(site: &Site) -> Result<String> {
    site.sh("dpkg-query -W -f '${Status} ${Version}' kuasar 2>/dev/null || true").await
}

/// The version of a package that is at hand.
async fn version_of(site: &Site, name: &str) -> Result<String> {
    site.sh(&format!("dpkg-deb -f {}/{name}/kuasar_*.deb Version", software::PACKAGES)).await
}

fn install(name: &str) -> String {
    format!("install {}/{name}/kuasar_*.deb", software::PACKAGES)
}

/// Sees to it that a version is installed: apt takes half a minute in an emulated machine.
async fn have(site: &Site, name: &str) -> Result<()> {
    if installed(site).await? != format!("install ok installed {}", version_of(site, name).await?) {
        apt(site, &install(name)).await?;
    }
    Ok(())
}

fn says(text: &str, said: &str) -> Result<()> {
    ensure!(said.contains(text), "no {text:?} in: {said}");
    Ok(())
}

const VERIFY: &str = "dpkg --verify kuasar || true";

/// Takes all the space but this, in MiB: less than a program of the package, more than logs need.
const LEFT: u64 = 6;

async fn an_upgrade_that_finds_the_disk_full_then_room(site: &mut Site) -> Result<()> {
    have(site, "1").await?;
    // The image leaves documents out, which dpkg misses.
    let before = (installed(site).await?, site.sh(VERIFY).await?);
    let running = Running::start(site).await?;
    let daemons = site.daemons().await?;
    site.sh(&format!("fallocate -l $(($(df --output=avail -B 1 / | tail -n 1) - ({LEFT} << 20))) /var/filled")).await?;
    let ran = probed(running.job(), tried(site, &install("2"))).await;
    site.sh("rm /var/filled").await?;
    let ran = ran?;
    ensure!(ran.code != 0 && ran.stdout().contains("No space left on device"), "exit code {}: {}", ran.code, ran.stdout());
    ensure!(site.daemons().await? == daemons, "other daemons than before");
    running.run_on(site).await?;
    let after = (installed(site).await?, site.sh(VERIFY).await?);
    ensure!(after == before, "what is installed was {before:?}, is {after:?}");
    let said = probed(running.job(), apt(site, &install("2"))).await?;
    says("is now", &said)?;
    let (keeper, worker) = site.daemons().await?;
    ensure!(keeper == daemons.0 && worker != daemons.1, "daemons were {daemons:?}, are {keeper} and {worker}");
    ensure!(installed(site).await?.ends_with(&version_of(site, "2").await?), "installed is {}", installed(site).await?);
    running.examine(site).await
}

async fn a_version_that_does_not_work(site: &mut Site) -> Result<()> {
    have(site, "2").await?;
    let running = Running::start(site).await?;
    let (keeper, _) = site.daemons().await?;
    let said = probed(running.job(), apt(site, &install("broken"))).await?;
    says("could not be replaced", &said)?;
    says("kuasarctl upgrade", &said)?;
    ensure!(site.daemons().await?.0 == keeper, "another keeper than before");
    running.run_on(site).await?;
    // Mended, by a package or by hand.
    let said = probed(running.job(), apt(site, &install("2"))).await?;
    says("is now", &said)?;
    ensure!(site.daemons().await?.0 == keeper, "another keeper than before");
    running.examine(site).await
}

async fn removal_is_refused_under_pods(site: &mut Site) -> Result<()> {
    let running = Running::start(site).await?;
    let before = site.daemons().await?;
    // Nor with what kuasar needs.
    for what in ["remove kuasar", "purge kuasar", "remove kuasar-crun"] {
        let ran = tried(site, what).await?;
        ensure!(ran.code != 0, "apt-get {what} did it: {}", ran.stdout());
        for text in ["pods run here", "default/pod", "KUASAR_REMOVE_ANYWAY=1"] {
            says(text, &ran.stdout()).with_context(|| format!("apt-get {what}"))?;
        }
        ensure!(installed(site).await?.starts_with("install ok installed"), "after {what}: {}", installed(site).await?);
    }
    ensure!(site.daemons().await? == before, "other daemons than before");
    running.examine(site).await
}

/// What is left of kuasar on the node, but for what the test has put there and what containerd is told.
const LEFTOVERS: &str = "find / /run /sys/fs/cgroup -xdev -iname '*kuasar*' \
    -not -path '/opt/node/*' -not -path '/run/kuasar-script-*' -not -path /etc/containerd/conf.d/kuasar.toml \
    -not -path '/var/lib/containerd/*' -not -path '/run/containerd/*'
pgrep -a kuasard
systemctl list-units --all --plain --no-legend '*kuasar*'
true";

/// As it was installed first.
async fn install_anew(site: &mut Site) -> Result<String> {
    let (path, text) = software::SANDBOXERS;
    site.node.script(&format!("mkdir -p $(dirname {path}) && cat >{path}")).stdin(text.as_bytes()).check().await?;
    apt(site, &format!("install {}/1/*.deb", software::PACKAGES)).await
}

/// What `make install` does, with the programs of the package.
const BY_HAND: &str = "set -e
mkdir -p /usr/local/lib/systemd/system /usr/local/libexec/kuasar /tmp/by-hand
dpkg-deb -x /opt/node/packages/1/kuasar_*.deb /tmp/by-hand
dpkg-deb -x /opt/node/packages/1/kuasar-crun_*.deb /tmp/by-hand
cp -a /tmp/by-hand/usr/bin/* /usr/local/bin/
cp -a /tmp/by-hand/usr/libexec/kuasar/crun /usr/local/libexec/kuasar/
sed 's|/usr/bin|/usr/local/bin|' /tmp/by-hand/usr/lib/systemd/system/kuasard.service >/usr/local/lib/systemd/system/kuasard.service
mkdir -p /etc/kuasar && cp /tmp/by-hand/etc/kuasar/config.toml /etc/kuasar/
rm -r /tmp/by-hand
systemctl daemon-reload
systemctl enable --quiet --now kuasard";

async fn purge_then_an_installation_by_hand(site: &mut Site) -> Result<()> {
    site.cri.remove_all_pods().await?;
    let said = apt(site, "purge kuasar kuasar-crun kuasar-guest").await?;
    says("still leads containerd to kuasar", &said)?;
    let left = site.sh(LEFTOVERS).await?;
    ensure!(left.is_empty(), "left behind by the purge:\n{left}");
    site.sh(BY_HAND).await?;
    let running = Running::start(site).await?;
    let (keeper, worker) = site.daemons().await?;
    let said = install_anew(site).await?;
    says("/usr/local/lib/systemd/system/kuasard.service goes before this package's unit", &said)?;
    says("is left alone", &said)?;
    ensure!(site.daemons().await? == (keeper.clone(), worker), "other daemons than before");
    running.run_on(site).await?;
    // As the package advises.
    let advice = said.lines().find_map(|line| line.split_once("without an interruption of any pod: "));
    let (_, commands) = advice.with_context(|| format!("no advice in: {said}"))?;
    let commands = commands.trim_end_matches('.').replace(", then ", " && ");
    probed(running.job(), site.sh(&commands)).await.with_context(|| format!("follow the advice: {commands}"))?;
    let program = site.sh(&format!("readlink /proc/{keeper}/exe; which kuasard")).await?;
    ensure!(program == "/usr/bin/kuasard\n/usr/bin/kuasard", "programs are {program}");
    let unit = site.show("kuasard", "FragmentPath").await?;
    ensure!(unit == "/usr/lib/systemd/system/kuasard.service", "the unit is {unit}");
    site.sh("systemctl restart kuasard").await?;
    running.examine(site).await
}
