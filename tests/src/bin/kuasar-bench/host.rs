//! What the figures were taken on: without it they say nothing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use kuasar_tests::leak::census;
use kuasar_tests::scratch::Storage;
use kuasar_tests::{process, tools};
use serde::Serialize;

/// Versions and machine: the head of the results.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Host {
    /// When, in seconds since 1970.
    pub(crate) unix_time_secs: u64,
    /// Full or quick.
    pub(crate) plan: &'static str,
    pub(crate) rounds: usize,
    pub(crate) kuasard: String,
    pub(crate) containerd: String,
    pub(crate) runc: String,
    pub(crate) crun: Option<String>,
    /// Whether crun is one that the targets speak of: static, or 1.20 and later.
    pub(crate) crun_is_current: bool,
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_mib: u64,
    pub(crate) cgroups: &'static str,
    /// Where containerd keeps its database and images.
    pub(crate) storage: &'static str,
    /// One minute's load when it began: what else the machine had to do.
    pub(crate) load: f64,
}

impl Host {
    /// Asks programs and kernel.
    pub(crate) fn look(plan: &'static str, rounds: usize, storage: Storage) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
        let crun = tools::crun().ok();
        let crun_version = crun.as_deref().map(version).transpose()?;
        let meminfo = read("/proc/meminfo")?;
        let memory_kib: u64 = field(&meminfo, "MemTotal").and_then(|text| text.split(' ').next()?.parse().ok()).unwrap_or(0);
        let (major, minor, patch) = tools::Containerd::find()?.version;
        Ok(Self {
            unix_time_secs: SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?.as_secs(),
            plan,
            rounds,
            kuasard: version(&tools::ours("kuasard")?)?,
            containerd: format!("{major}.{minor}.{patch}"),
            runc: version(&tools::runc()?)?,
            crun_is_current: match (&crun, &crun_version) {
                (Some(path), Some(version)) => is_static(path)? || minor_of(version) >= (1, 20),
                _ => false,
            },
            crun: crun_version,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu: field(&read("/proc/cpuinfo")?, "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cpus: std::thread::available_parallelism()?.get(),
            memory_mib: memory_kib / 1024,
            cgroups: cgroups()?,
            storage: match storage {
                Storage::Disk => "disk",
                Storage::Memory => "tmpfs",
            },
            load: read("/proc/loadavg")?.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        })
    }

    /// For the head of the table.
    pub(crate) fn lines(&self) -> [String; 2] {
        let crun = self.crun.as_ref().map_or_else(String::new, |version| format!(", crun {version}"));
        [
            format!(
                "kuasard {}, containerd {}, runc {}{crun}; {} rounds",
                self.kuasard, self.containerd, self.runc, self.rounds
            ),
            format!(
                "Linux {}, {} × {}, {} GiB, cgroup {}, storage on {}, load {:.1}",
                self.kernel,
                self.cpus,
                self.cpu,
                self.memory_mib / 1024,
                self.cgroups,
                self.storage,
                self.load
            ),
        ]
    }
}

/// The last word of the first line that `--version` prints.
fn version(program: &Path) -> Result<String> {
    let text = process::run(Command::new(program).arg("--version"))?;
    let word = text.lines().next().and_then(|line| line.split(' ').next_back());
    Ok(word.with_context(|| format!("{} prints no version", program.display()))?.to_owned())
}

fn minor_of(version: &str) -> (u32, u32) {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Whether an ELF file asks for no loader.
fn is_static(program: &Path) -> Result<bool> {
    let bytes = fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let head = &bytes[..bytes.len().min(4096)];
    Ok(!head.windows(4).any(|window| window == b"/ld-"))
}

fn field(text: &str, key: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn cgroups() -> Result<&'static str> {
    let roots = census::cgroup_roots()?;
    let unified = |root: &Path| root.join("cgroup.controllers").exists();
    Ok(match (roots.iter().any(|root| unified(root)), roots.iter().any(|root| !unified(root))) {
        (true, true) => "v1 (hybrid)",
        (true, false) => "v2",
        _ => "v1",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_by_number() {
        assert!(minor_of("1.21") > minor_of("1.8.1"));
        assert!(minor_of("1.21") >= (1, 20));
        assert_eq!(field("a: 1\nMemTotal:  5 kB\n", "MemTotal").as_deref(), Some("5 kB"));
    }
}
