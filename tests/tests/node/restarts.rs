//! What ends the daemon, under containers that print numbers: they run on, no line is lost, and how they end is known.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::{skip, wait};

use crate::running::{Running, probed, probed_seeing};
use crate::suite::{Entry, SOON, Site, cases};

pub(crate) fn cases() -> Vec<Entry> {
    cases![
        systemctl_restart,
        stop_and_start,
        the_keeper_is_killed,
        keeper_and_worker_are_killed,
        one_that_is_stopped_is_continued,
        the_watchdog,
        systemd_reloads_and_is_replaced,
        systemctl_reload,
        three_times_under_load;
        slow: forty_times_under_load, more_descriptors_than_systemd_stores
    ]
}

/// The first systemd with FileDescriptorStorePreserve.
const PRESERVES: u32 = 254;
const RESTART: &str = "systemctl restart kuasard";
/// Containers are the keeper's children as well.
const KILL_BOTH: &str = "keeper=$(systemctl show --value -p MainPID kuasard); kill -9 $keeper $(pgrep -x -P $keeper kuasard)";

/// Runs what ends the daemon under containers, which must not notice.
async fn disturb(site: &mut Site, script: &str) -> Result<()> {
    let running = Running::start(site).await?;
    replace(site, script).await?;
    running.examine(site).await
}

/// Runs what ends the daemon, and waits until another is there.
async fn replace(site: &Site, script: &str) -> Result<()> {
    let before = site.show("kuasard", "MainPID").await?;
    site.sh(script).await?;
    wait::until("another daemon", SOON, || async {
        let main = site.show("kuasard", "MainPID").await?;
        let state = site.show("kuasard", "ActiveState").await?;
        Ok((main != before && main != "0" && state == "active").then_some(()))
    })
    .await
}

/// A setting of the unit that goes at the next boot.
async fn set_unit(site: &Site, setting: &str) -> Result<()> {
    let dir = "/run/systemd/system/kuasard.service.d";
    site.sh(&format!("mkdir -p {dir} && printf '[Service]\\n{setting}\\n' >{dir}/test.conf && systemctl daemon-reload"))
        .await?;
    Ok(())
}

async fn reset_unit(site: &Site) -> Result<()> {
    site.sh("rm -r /run/systemd/system/kuasard.service.d && systemctl daemon-reload").await?;
    Ok(())
}

async fn systemctl_restart(site: &mut Site) -> Result<()> {
    disturb(site, RESTART).await
}

async fn stop_and_start(site: &mut Site) -> Result<()> {
    if site.is_before_systemd(PRESERVES).await? {
        skip::record(
            "restarts::stop_and_start",
            &format!("systemd before {PRESERVES} closes the descriptors it stores at a stop"),
        );
        return Ok(());
    }
    disturb(site, "systemctl stop kuasard && systemctl start kuasard").await
}

async fn the_keeper_is_killed(site: &mut Site) -> Result<()> {
    disturb(site, "kill -9 $(systemctl show --value -p MainPID kuasard)").await
}

async fn keeper_and_worker_are_killed(site: &mut Site) -> Result<()> {
    disturb(site, KILL_BOTH).await
}

async fn one_that_is_stopped_is_continued(site: &mut Site) -> Result<()> {
    let running = Running::start(site).await?;
    let (keeper, worker) = site.daemons().await?;
    for pid in [&worker, &keeper] {
        site.sh(&format!("kill -STOP {pid}")).await?;
        running.run_on(site).await?;
        let state = site.sh(&format!("ps -o s= -p {pid}")).await?;
        ensure!(state.trim() != "T", "{pid} is still stopped");
    }
    ensure!(site.daemons().await? == (keeper, worker), "other daemons than before");
    running.examine(site).await
}

/// In which systemd wants to hear of the daemon: less than the unit has, so that the test need not wait as long.
const WATCHDOG: Duration = Duration::from_secs(6);

async fn the_watchdog(site: &mut Site) -> Result<()> {
    set_unit(site, &format!("WatchdogSec={}", WATCHDOG.as_secs())).await?;
    replace(site, RESTART).await?;
    let running = Running::start(site).await?;
    let (keeper, worker) = site.daemons().await?;
    // When both are stopped, neither continues the other.
    replace(site, &format!("kill -STOP {keeper} {worker}")).await?;
    let journal = site.sh("journalctl --no-pager -u kuasard -n 50").await?;
    ensure!(journal.contains("Watchdog timeout"), "the journal says nothing of the watchdog: {journal}");
    running.examine(site).await?;
    reset_unit(site).await?;
    replace(site, RESTART).await
}

async fn systemd_reloads_and_is_replaced(site: &mut Site) -> Result<()> {
    let running = Running::start(site).await?;
    for script in ["systemctl daemon-reload", "systemctl daemon-reexec"] {
        probed(running.job(), site.sh(script)).await.context(script)?;
        running.run_on(site).await.context(script)?;
    }
    // What it stores is still there.
    replace(site, KILL_BOTH).await?;
    running.examine(site).await
}

const NEW_CONFIGURATION: &str = "/etc/kuasar/conf.d/reload.toml";

/// By the unit: the configuration is read again, and a wrong one changes nothing.
async fn systemctl_reload(site: &mut Site) -> Result<()> {
    let running = Running::start(site).await?;
    let (keeper, worker) = site.daemons().await?;
    site.sh(&format!("printf '[sandboxer.kuasar-new]\\nkind = \"runc\"\\n' >{NEW_CONFIGURATION}")).await?;
    probed(running.job(), site.sh("systemctl reload kuasard")).await?;
    let (same, other) = site.daemons().await?;
    ensure!(same == keeper && other != worker, "daemons were {keeper} and {worker}, are {same} and {other}");
    let known = site.sh("kuasarctl check | grep kuasar-new").await?;
    ensure!(known.contains("OCI runtime, kuasar-new"), "the sandboxer is not known: {known}");
    running.run_on(site).await?;
    site.sh(&format!("echo nonsense >{NEW_CONFIGURATION}")).await?;
    let ran = probed(running.job(), async { site.node.script("systemctl reload kuasard").run().await }).await?;
    site.sh(&format!("rm {NEW_CONFIGURATION}")).await?;
    ensure!(ran.code != 0, "a wrong configuration was taken");
    ensure!(site.daemons().await?.0 == keeper, "another keeper than before");
    running.run_on(site).await?;
    site.sh("systemctl reload kuasard").await?;
    running.examine(site).await
}

async fn three_times_under_load(site: &mut Site) -> Result<()> {
    under_load(site, 3).await
}

async fn forty_times_under_load(site: &mut Site) -> Result<()> {
    under_load(site, 40).await
}

/// Restarts the service and kills the daemon, in turn. Containers print, an exec is begun before and ends after each, and others begin and
/// end all the time.
async fn under_load(site: &mut Site, times: usize) -> Result<()> {
    let running = Running::start(site).await?;
    let root = format!("/proc/{}/root/tmp", running.job().pid().await?);
    for round in 1..=times {
        let script = if round % 2 == 0 { RESTART } else { KILL_BOTH };
        // How an exec ends while no daemon lives is not seen when the keeper was killed.
        let codes: &[i32] = if round % 2 == 0 { &[0] } else { &[0, 255] };
        let exec =
            format!("echo {round} >/tmp/begun; while [ ! -e /tmp/end-{round} ]; do sleep 0.1; done; echo {round}; exit 5");
        let held = async { Ok(running.job().sh(&exec).await?) };
        let disturbed = async {
            wait::until("the exec to begin", SOON, || async {
                let begun = site.node.script(&format!("cat {root}/begun")).run().await?;
                Ok((begun.stdout() == round.to_string()).then_some(()))
            })
            .await?;
            replace(site, script).await?;
            running.run_on(site).await?;
            site.sh(&format!("touch {root}/end-{round}")).await?;
            Ok(())
        };
        let both = async { tokio::try_join!(held, disturbed) };
        let (ran, ()) = probed_seeing(running.job(), both, codes).await.with_context(|| format!("{script}, time {round}"))?;
        ensure!((ran.exit_code, ran.stdout()) == (5, format!("{round}\n")), "the exec over {script}, time {round}: {ran:?}");
    }
    running.examine(site).await
}

/// In the unit: enough for what the daemon has without pods, and not for theirs.
const FEW: u32 = 8;

/// systemd says nothing of what it does not store. Nothing is lost as long as the keeper lives, and once there is room it is stored.
async fn more_descriptors_than_systemd_stores(site: &mut Site) -> Result<()> {
    set_unit(site, &format!("FileDescriptorStoreMax={FEW}")).await?;
    replace(site, RESTART).await?;
    let running = Running::start(site).await?;
    let stored = site.show("kuasard", "NFileDescriptorStore").await?;
    ensure!(stored == FEW.to_string(), "{stored} descriptors are stored");
    let check = site.node.script("kuasarctl check").run().await?.stdout();
    ensure!(check.contains(&format!("{FEW} of {FEW}: containers beyond are reported as exited")), "check says {check}");
    if !site.is_before_systemd(PRESERVES).await? {
        let journal = site.sh("journalctl --no-pager -u kuasard").await?;
        ensure!(journal.contains(&format!("systemd stores {FEW} descriptors of")), "the journal has no warning: {journal}");
    }
    let worker = site.daemons().await?.1;
    site.sh(&format!("kill -9 {worker}")).await?;
    running.run_on(site).await.context("after the worker's death")?;
    site.sh("systemctl reload kuasard").await?;
    running.run_on(site).await.context("after an upgrade")?;
    reset_unit(site).await?;
    if site.is_before_systemd(PRESERVES).await? {
        // It does not tell the service how much it stores.
        return running.examine(site).await;
    }
    wait::until("all to be stored", 2 * SOON, || async {
        Ok((site.show("kuasard", "NFileDescriptorStore").await?.parse::<u32>()? > FEW).then_some(()))
    })
    .await?;
    replace(site, RESTART).await?;
    running.examine(site).await
}
