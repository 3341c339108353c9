//! systemd, which keeps the daemon's connections while it is restarted.

use std::{process::Command, time::Duration};

use kuasar_sandboxers::reaper::Reaper;

use super::{Finding, Host};

/// First version with `FileDescriptorStorePreserve=`, by which connections outlive a stop and not only a restart.
const PRESERVES: u32 = 254;

/// The daemon's service.
const UNIT: &str = "kuasard.service";

/// What `systemctl` may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Nothing where this host was not booted with it (`sd_booted(3)`).
pub(super) async fn all(host: &Host, reaper: &Reaper) -> Vec<Finding> {
    if !host.exists("/run/systemd/system") {
        return Vec::new();
    }
    let Some(program) = host.program("systemctl") else { return Vec::new() };
    let run = async |arguments: &[&str]| {
        let said = reaper.run(Command::new(&program).args(arguments), LIMIT).await.ok()?;
        Some(String::from_utf8_lossy(&said.stdout).into_owned())
    };
    let version = run(&["--version"]).await.map(|text| version(&text));
    let stored = run(&["show", "--property=NFileDescriptorStore,FileDescriptorStoreMax", UNIT]).await;
    version.into_iter().chain(stored.and_then(|text| stored_descriptors(&text))).collect()
}

/// What the unit has room for, and how much of it is taken. Nothing for a systemd that has no such unit, and for a unit that does
/// not run.
pub(super) fn stored_descriptors(text: &str) -> Option<Finding> {
    let subject = "stored descriptors";
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')?.parse::<u64>().ok());
    let (stored, most) = (value("NFileDescriptorStore")?, value("FileDescriptorStoreMax")?);
    if stored == 0 {
        return None;
    }
    let remedy = format!("raise FileDescriptorStoreMax= of {UNIT} (systemctl edit kuasard), then systemctl daemon-reload");
    if stored >= most {
        let detail = format!("{stored} of {most}: containers beyond are reported as exited when kuasard is restarted");
        return Some(Finding::warn(subject, detail, remedy));
    }
    if stored * 10 >= most * 9 {
        return Some(Finding::warn(subject, format!("{stored} of {most}: nearly all that systemd keeps"), remedy));
    }
    Some(Finding::ok(subject, format!("{stored} of {most}, which systemd keeps over a restart of kuasard")))
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
