//! Backends by configuration: with `config`, the one place that names them.

use std::{collections::BTreeMap, sync::Arc};

use kuasar_runc::RuncSandboxer;
use kuasar_sandboxers::{Error, Result, Sandboxer, fdstore::FdStore, reaper::Reaper};
use kuasar_vmm::VmmSandboxer;
use tracing::info;

use crate::config::SandboxerConfig;

/// Sets the configured sandboxers up.
///
/// # Errors
/// When one cannot work here; it is named.
pub async fn build(
    configs: BTreeMap<String, SandboxerConfig>,
    reaper: &Reaper,
    fds: &FdStore,
) -> Result<BTreeMap<String, Arc<dyn Sandboxer>>> {
    let mut sandboxers: BTreeMap<String, Arc<dyn Sandboxer>> = BTreeMap::new();
    for (name, config) in configs {
        let failed = Error::failed(format!("set up sandboxer {name}"));
        let sandboxer: Arc<dyn Sandboxer> = match config {
            SandboxerConfig::Runc(config) => Arc::new(RuncSandboxer::open(config, reaper.clone(), fds).await.map_err(failed)?),
            SandboxerConfig::Vmm(config) => Arc::new(VmmSandboxer::open(*config, reaper.clone()).await.map_err(failed)?),
        };
        info!(sandboxer = name, technique = sandboxer.capabilities().technique, "sandboxer ready");
        sandboxers.insert(name, sandboxer);
    }
    Ok(sandboxers)
}
