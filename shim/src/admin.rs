//! `kuasar.v1.Admin`: what kuasarctl asks. Answers are JSON documents.

use std::{collections::BTreeMap, path::PathBuf};

use futures::{future::join_all, stream::BoxStream};
use kuasar_sandboxers::{
    Error, Result,
    collect::SetAside,
    handle::{SandboxHandle, SandboxStatus},
    registry::Registry,
};
use serde::Serialize;
use serde_json::{Map, Value, json};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    calls::Calls,
    check::daemon::{Serving, Settings},
    gc::Gc,
    inside, inspect,
    keeper::worker::Keeper,
    proto::admin::{
        ConsoleRequest, Document, ExecInput, ExecOutput, GcRequest, InspectRequest, ListRequest, SettingsRequest, Text,
        UpgradeRequest, VersionRequest, admin_server,
    },
    status::IntoStatus,
    upgrade::Upgrades,
};

/// The service.
#[derive(Clone)]
pub struct Admin {
    registry: Registry,
    calls: Calls,
    gc: Gc,
    upgrades: Option<Upgrades>,
    configured: Configured,
}

/// What the daemon has read when it started, or its first worker.
#[derive(Clone, Debug)]
pub struct Configured {
    /// The file.
    pub file: PathBuf,
    /// The configuration in force, as TOML.
    pub text: String,
}

impl Admin {
    /// A service over `registry`.
    #[must_use]
    pub fn new(registry: Registry, calls: Calls, gc: Gc, upgrades: Option<Upgrades>, configured: Configured) -> Self {
        Self { registry, calls, gc, upgrades, configured }
    }

    /// What tells one daemon and its program from another.
    fn identity(&self) -> Map<String, Value> {
        let mut identity = Map::new();
        identity.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        identity.insert("pid".into(), std::process::id().into());
        if let Some(upgrades) = &self.upgrades {
            identity.insert("keeper_pid".into(), Keeper::pid().into());
            identity.insert("upgrade".into(), json!(upgrades.last()));
        }
        identity
    }

    /// What each sandboxer can do at the moment, by name.
    fn serving(&self) -> Result<BTreeMap<String, Serving>> {
        let mut unavailable = self.registry.unavailable();
        let serving = |name: String| {
            if let Some(why) = unavailable.remove(&name) {
                return Ok((name, Serving::Unavailable(why)));
            }
            let can = self.registry.capabilities(&name)?;
            Ok((name, Serving::Ready { technique: can.technique.clone(), features: can.features.clone() }))
        };
        self.registry.sandboxers().into_iter().map(serving).collect()
    }
}

/// The sandboxes of a namespace (empty: of all), as they are now, oldest first.
pub(crate) async fn sandboxes(registry: Registry, namespace: String) -> Result<Vec<SandboxStatus>> {
    let wanted = |sandbox: &SandboxHandle| namespace.is_empty() || sandbox.namespace.as_str() == namespace;
    let mut found = Vec::new();
    let asked = registry.list().into_iter().filter(wanted).map(|sandbox| async move { sandbox.status().await });
    for status in join_all(asked).await {
        match status {
            Ok(status) => found.push(status),
            // Deleted meanwhile, or not recovered yet.
            Err(Error::NotFound { .. } | Error::Unavailable { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|status| status.created_at);
    Ok(found)
}

/// Sandboxes of a namespace (empty: of all) whose state files cannot be read, or that could not be recovered, in the form of the others as
/// far as that goes.
async fn set_aside(registry: Registry, namespace: String) -> Result<Vec<Value>> {
    let mut found = registry.set_aside().await?;
    found.extend(registry.not_recovered().await);
    let wanted = found.into_iter().filter(|found| namespace.is_empty() || found.entry.namespace.as_str() == namespace);
    Ok(wanted.map(describe).collect())
}

fn describe(SetAside { entry, why, processes }: SetAside) -> Value {
    let (processes, unknown) = match processes {
        Ok(processes) => (Some(processes), None),
        Err(error) => (None, Some(error.report())),
    };
    json!({
        "spec": { "namespace": entry.namespace, "id": entry.id },
        "state": { "set_aside": { "directory": entry.dir, "why": why, "processes": processes, "unknown": unknown } },
        "containers": [],
    })
}

/// Of a pod's annotations Kubernetes allows 256 KiB, too much in a list of all; Inspect has them.
fn without_annotations(status: &SandboxStatus) -> serde_json::Result<Value> {
    let mut value = serde_json::to_value(status)?;
    if let Some(spec) = value["spec"].as_object_mut() {
        spec.remove("annotations");
    }
    Ok(value)
}

fn document(value: &impl Serialize) -> Result<Response<Document>, Status> {
    let json = serde_json::to_string(value).map_err(Error::failed("write the answer as JSON")).grpc()?;
    Ok(Response::new(Document { json }))
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    type ExecStream = BoxStream<'static, Result<ExecOutput, Status>>;
    type ConsoleStream = BoxStream<'static, Result<Text, Status>>;

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<Document>, Status> {
        let (registry, namespace) = (self.registry.clone(), request.into_inner().namespace);
        let work =
            async move { Ok((sandboxes(registry.clone(), namespace.clone()).await?, set_aside(registry, namespace).await?)) };
        let (live, aside) = self.calls.run("Admin.List", "all", work).await.grpc()?;
        let live = live.iter().map(without_annotations).collect::<Result<Vec<_>, _>>();
        let live = live.map_err(Error::failed("write the answer as JSON")).grpc()?;
        document(&live.into_iter().chain(aside).collect::<Vec<_>>())
    }

    async fn inspect(&self, request: Request<InspectRequest>) -> Result<Response<Document>, Status> {
        let InspectRequest { namespace, id } = request.into_inner();
        let (registry, within, wanted) = (self.registry.clone(), namespace.clone(), id.clone());
        let work = async move {
            let found = sandboxes(registry.clone(), within.clone()).await?;
            let failures = tokio::task::spawn_blocking(move || registry.failures()).await;
            inspect::only(found, failures.map_err(Error::failed("read the failures"))??, &within, &wanted)
        };
        match self.calls.run("Admin.Inspect", &id, work).await {
            Err(Error::NotFound { kind, id: _ }) => {
                let work = set_aside(self.registry.clone(), namespace);
                let mut found = self.calls.run("Admin.Inspect", &id, work).await.grpc()?;
                found.retain(|aside| aside["spec"]["id"].as_str().is_some_and(|found| found.starts_with(&id)));
                match <[_; 1]>::try_from(found) {
                    Ok([aside]) => document(&aside),
                    Err(_) => Err(Error::NotFound { kind, id }).grpc(),
                }
            }
            found => document(&found.grpc()?),
        }
    }

    async fn version(&self, _: Request<VersionRequest>) -> Result<Response<Document>, Status> {
        let told = |serving| match serving {
            Serving::Ready { technique, features } => {
                json!({ "technique": technique, "features": features, "unavailable": null })
            }
            Serving::Unavailable(why) => json!({ "technique": "unavailable", "features": null, "unavailable": why }),
        };
        let sandboxers: Map<_, _> = self.serving().grpc()?.into_iter().map(|(name, serving)| (name, told(serving))).collect();
        let mut answer = self.identity();
        answer.insert("sandboxers".into(), sandboxers.into());
        document(&answer)
    }

    async fn settings(&self, _: Request<SettingsRequest>) -> Result<Response<Document>, Status> {
        document(&Settings {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            search_path: std::env::var("PATH").unwrap_or_default(),
            config: self.configured.file.clone(),
            configuration: self.configured.text.clone(),
            sandboxers: self.serving().grpc()?,
        })
    }

    async fn upgrade(&self, request: Request<UpgradeRequest>) -> Result<Response<Document>, Status> {
        let binary = Some(request.into_inner().binary).filter(|binary| !binary.is_empty()).map(PathBuf::from);
        let why = || "this daemon has no keeper that could replace it".into();
        let upgrades =
            self.upgrades.as_ref().ok_or_else(|| Error::Unsupported { operation: "an upgrade", why: why() }).grpc()?;
        let mut answer = self.identity();
        let (id, binary) = upgrades.begin(binary).grpc()?;
        answer.insert("id".into(), id.into());
        answer.insert("binary".into(), json!(binary));
        document(&answer)
    }

    async fn gc(&self, request: Request<GcRequest>) -> Result<Response<Document>, Status> {
        let work = self.gc.clone().run(self.registry.clone(), self.calls.clone(), request.into_inner().dry_run);
        document(&self.calls.run("Admin.Gc", "all", work).await.grpc()?)
    }

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Result<Response<Self::ExecStream>, Status> {
        inside::exec(self.registry.clone(), self.calls.clone(), request.into_inner()).await.map(Response::new)
    }

    async fn console(&self, request: Request<ConsoleRequest>) -> Result<Response<Self::ConsoleStream>, Status> {
        Ok(Response::new(inside::console(self.registry.clone(), self.calls.clone(), request.into_inner())))
    }

    async fn account(&self, request: Request<InspectRequest>) -> Result<Response<Document>, Status> {
        let InspectRequest { namespace, id } = request.into_inner();
        let (registry, wanted) = (self.registry.clone(), id.clone());
        let work = async move { inside::find(&registry, namespace, &wanted).await?.account().await };
        document(&self.calls.run("Admin.Account", &id, work).await.grpc()?)
    }
}
