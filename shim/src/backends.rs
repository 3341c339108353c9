//! Backends by configuration: with `config`, the one place that names them.

use std::{collections::BTreeMap, sync::Arc};

use kuasar_runc::RuncSandboxer;
use kuasar_sandboxers::{
    Error, Result, Sandboxer,
    deferred::{Deferred, Open},
    reaper::Reaper,
};
use kuasar_vmm::VmmSandboxer;
use tracing::info;

use crate::config::SandboxerConfig;

/// What becomes of a daemon in which a sandboxer cannot work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// It does not start: as an upgrade, which leaves to the program before what that can do.
    All,
    /// It starts if another can.
    Any,
    /// It starts: there are sandboxes to look after.
    None,
}

/// Sets the configured sandboxers up. One that cannot work for the moment is tried again ([`Deferred`]).
///
/// # Errors
/// When one cannot work here, and the daemon is not to start without; it is named.
pub async fn build(
    configs: BTreeMap<String, SandboxerConfig>,
    need: Need,
    reaper: &Reaper,
) -> Result<BTreeMap<String, Arc<dyn Sandboxer>>> {
    let mut sandboxers: BTreeMap<String, Arc<dyn Sandboxer>> = BTreeMap::new();
    let mut errors = Vec::new();
    for (name, config) in configs {
        let (sandboxer, error) = Deferred::open(name.clone(), opener(config, reaper.clone())).await;
        match error {
            None => info!(sandboxer = name, technique = sandboxer.capabilities().technique, "sandboxer ready"),
            Some(error) => errors.push(Error::failed(format!("set up sandboxer {name}"))(error)),
        }
        sandboxers.insert(name, sandboxer);
    }
    let most = match need {
        Need::All => 0,
        Need::Any => sandboxers.len().saturating_sub(1),
        Need::None => sandboxers.len(),
    };
    if errors.len() > most { Err(errors.swap_remove(0)) } else { Ok(sandboxers) }
}

fn opener(config: SandboxerConfig, reaper: Reaper) -> Open {
    Box::new(move || {
        let (config, reaper) = (config.clone(), reaper.clone());
        Box::pin(async move {
            Ok(match config {
                SandboxerConfig::Runc(config) => Arc::new(RuncSandboxer::open(config, reaper).await?) as Arc<dyn Sandboxer>,
                SandboxerConfig::Vmm(config) => Arc::new(VmmSandboxer::open(*config, reaper).await?),
            })
        })
    })
}
