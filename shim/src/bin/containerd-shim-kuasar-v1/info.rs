//! `-info`: what the OCI runtime, or a machine, can do, so that containerd offers it to Kubernetes (recursive read-only mounts, user namespaces).

use std::{
    io::{IsTerminal, Read},
    path::Path,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};
use kuasar_runc::{RuncConfig, Runtime};
use kuasar_sandboxers::{Error, reaper::Reaper};
use kuasar_shim::{
    config::{Config, DEFAULT_STATE, SandboxerConfig},
    options,
};
use serde_json::{Value, json};

/// The name under which Go's typeurl knows the runtime specification's `features` document (containerd `core/runtime/typeurl.go`).
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// No runtime options are larger.
const MAX_OPTIONS_BYTES: u64 = 1 << 20;

/// The answer for standard output, a serialised `containerd.types.RuntimeInfo`. `sandboxer` is whom it is about, where the program's
/// name tells; `input` is where containerd writes the options of its runtime table, if there are any.
pub(crate) fn answer(sandboxer: Option<&str>, input: impl Read + IsTerminal) -> Result<Vec<u8>> {
    let options = read_options(input)?;
    let path = Config::default_path();
    // Where the daemon keeps its state is of no matter here.
    let config =
        Config::load(&path, Path::new(DEFAULT_STATE)).map_err(|faults| anyhow!("the configuration has faults:\n{faults}"))?;
    let (name, sandboxer) = choose(&config, sandboxer)?;
    let features = match sandboxer {
        SandboxerConfig::Runc(sandboxer) => ask(sandboxer, options.as_ref())?,
        // The runtime is in machines that there are none of yet.
        SandboxerConfig::Vmm(_) => Some(kuasar_vmm::features()),
        _ => bail!("sandboxer {name:?} runs no OCI runtime that could be asked"),
    };
    // containerd takes a missing document for a fault when a pod asks for something, and a document that lists nothing for "not supported".
    let features = features.unwrap_or_else(|| json!({ "ociVersionMin": "1.0.0", "ociVersionMax": "1.0.2" }));
    let features = Some(Any { type_url: FEATURES.into(), value: features.to_string().into_bytes(), ..Default::default() });
    let info = RuntimeInfo {
        name: format!("io.containerd.{name}.v1"),
        version: Some(RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() }).into(),
        options: options.into(),
        features: features.into(),
        ..Default::default()
    };
    info.write_to_bytes().context("cannot serialise the answer")
}

/// Asks the OCI runtime. One too old to have `features` is no error: containerd then offers less.
fn ask(sandboxer: &RuncConfig, options: Option<&Any>) -> Result<Option<Value>> {
    let binary = match options {
        Some(options) => {
            let options = prost_types::Any { type_url: options.type_url.clone(), value: options.value.clone() };
            options::decode(Some(&options)).map_err(told)?.binary
        }
        None => None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    let runtime = runtime.block_on(async {
        let reaper = Reaper::install()?;
        match &binary {
            Some(binary) => Runtime::of_option(binary, &reaper).await,
            None => Runtime::find_as_known(&sandboxer.runtime, &reaper, &sandboxer.root).await,
        }
    });
    Ok(runtime.map_err(told)?.features().cloned())
}

fn told(error: Error) -> anyhow::Error {
    anyhow!("{}", error.report())
}

fn read_options(input: impl Read + IsTerminal) -> Result<Option<Any>> {
    // Called by hand there is nothing to wait for.
    if input.is_terminal() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    input.take(MAX_OPTIONS_BYTES + 1).read_to_end(&mut bytes).context("cannot read the runtime options")?;
    ensure!(bytes.len() as u64 <= MAX_OPTIONS_BYTES, "the runtime options are larger than {} KiB", MAX_OPTIONS_BYTES >> 10);
    if bytes.is_empty() {
        return Ok(None);
    }
    Any::parse_from_bytes(&bytes).map(Some).context("the runtime options are not a google.protobuf.Any")
}

/// The sandboxer of that name; without one, the only one there is.
fn choose<'a>(config: &'a Config, name: Option<&'a str>) -> Result<(&'a str, &'a SandboxerConfig)> {
    let names = || config.sandboxers.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    match name {
        Some(name) => {
            let sandboxer = config.sandboxers.get(name);
            let sandboxer = sandboxer.with_context(|| format!("no sandboxer {name:?} is configured; there is {}", names()))?;
            Ok((name, sandboxer))
        }
        None => {
            let mut sandboxers = config.sandboxers.iter();
            match (sandboxers.next(), sandboxers.next()) {
                (Some((name, sandboxer)), None) => Ok((name, sandboxer)),
                _ => bail!(
                    "several sandboxers are configured; call this program as containerd-shim-NAME-v1 for one of {}",
                    names()
                ),
            }
        }
    }
}
