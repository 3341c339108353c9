//! systemd, which keeps the daemon's connections while it is restarted.

use std::{process::Command, time::Duration};

use kuasar_sandboxers::reaper::Reaper;

use super::{Finding, Host};

/// First version with `FileDescriptorStorePreserve=`, by which connections outlive a stop and not only a restart.
const PRESERVES: u32 = 254;

/// What `systemctl --version` may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Nothing where this host was not booted with it (`sd_booted(3)`).
pub(super) async fn all(host: &Host, reaper: &Reaper) -> Option<Finding> {
    if !host.exists("/run/systemd/system") {
        return None;
    }
    let program = host.program("systemctl")?;
    let said = reaper.run(Command::new(program).arg("--version"), LIMIT).await.ok()?;
    Some(version(&String::from_utf8_lossy(&said.stdout)))
}

/// `systemd 252 (252.39-1~deb12u1)`, then a line of what it was built with.
pub(super) fn version(text: &str) -> Finding {
    let subject = "systemd";
    let first = text.lines().next().unwrap_or_default();
    let number = first.split_whitespace().nth(1).and_then(|word| word.split(['.', '~', '-']).next()?.parse::<u32>().ok());
    match number {
        None => Finding::warn(subject, format!("its version cannot be read: {first:?}"), "see systemctl --version"),
        Some(number) if number < PRESERVES => Finding::warn(
            subject,
            format!("{number}: when kuasard is stopped, and then started, containerd reports every container as exited"),
            format!(
                "systemctl restart kuasard, or kuasarctl upgrade, never stop and start; systemd {PRESERVES} or later has no such limit"
            ),
        ),
        Some(number) => Finding::ok(subject, number.to_string()),
    }
}
