//! `kuasar.v1.Admin`: what kuasarctl asks. Answers are JSON documents.

use kuasar_sandboxers::{
    Error, Result,
    handle::{SandboxHandle, SandboxStatus},
    registry::Registry,
};
use serde::Serialize;
use serde_json::{Map, json};
use tonic::{Request, Response, Status};

use crate::{
    calls::Calls,
    proto::admin::{Document, InspectRequest, ListRequest, VersionRequest, admin_server},
    status::IntoStatus,
};

/// The service.
#[derive(Clone)]
pub struct Admin {
    registry: Registry,
    calls: Calls,
}

impl Admin {
    /// A service over `registry`.
    #[must_use]
    pub fn new(registry: Registry, calls: Calls) -> Self {
        Self { registry, calls }
    }
}

/// The sandboxes of a namespace (empty: of all), as they are now, oldest first.
async fn sandboxes(registry: Registry, namespace: String) -> Result<Vec<SandboxStatus>> {
    let wanted = |sandbox: &SandboxHandle| namespace.is_empty() || sandbox.namespace.as_str() == namespace;
    let mut found = Vec::new();
    for sandbox in registry.list().into_iter().filter(wanted) {
        match sandbox.status().await {
            Ok(status) => found.push(status),
            // Deleted meanwhile.
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_by_key(|status| status.created_at);
    Ok(found)
}

/// The one sandbox that is meant by an id of it or of a container in it, or by the beginning of one.
fn only(found: Vec<SandboxStatus>, id: &str) -> Result<SandboxStatus> {
    if id.is_empty() {
        return Err(Error::invalid("id", "it is empty; give the id of a sandbox or container, or the beginning of one"));
    }
    let ids = |status: &SandboxStatus| {
        let containers = status.containers.iter().map(|container| container.id.to_string());
        containers.chain([status.spec.id.to_string()]).collect::<Vec<_>>()
    };
    let exact = |status: &SandboxStatus| ids(status).iter().any(|candidate| candidate == id);
    let begins = |status: &SandboxStatus| ids(status).iter().any(|candidate| candidate.starts_with(id));
    let (mut matching, rest): (Vec<_>, Vec<_>) = found.into_iter().partition(exact);
    if matching.is_empty() {
        matching = rest.into_iter().filter(begins).collect();
    }
    let mut matching = matching.into_iter();
    match (matching.next(), matching.len()) {
        (Some(status), 0) => Ok(status),
        (Some(_), more) => {
            Err(Error::invalid("id", format!("{id:?} fits {} sandboxes; give more of it, or the namespace", more + 1)))
        }
        (None, _) => Err(Error::NotFound { kind: "sandbox or container", id: id.into() }),
    }
}

fn document(value: &impl Serialize) -> Result<Response<Document>, Status> {
    let json = serde_json::to_string(value).map_err(Error::failed("write the answer as JSON")).grpc()?;
    Ok(Response::new(Document { json }))
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    async fn list(&self, request: Request<ListRequest>) -> Result<Response<Document>, Status> {
        let work = sandboxes(self.registry.clone(), request.into_inner().namespace);
        document(&self.calls.run("Admin.List", "all", work).await.grpc()?)
    }

    async fn inspect(&self, request: Request<InspectRequest>) -> Result<Response<Document>, Status> {
        let InspectRequest { namespace, id } = request.into_inner();
        let work = sandboxes(self.registry.clone(), namespace);
        let found = self.calls.run("Admin.Inspect", &id, work).await.grpc()?;
        document(&only(found, &id).grpc()?)
    }

    async fn version(&self, _: Request<VersionRequest>) -> Result<Response<Document>, Status> {
        let mut sandboxers = Map::new();
        for name in self.registry.sandboxers() {
            let capabilities = self.registry.capabilities(&name).grpc()?;
            sandboxers.insert(name, json!({ "technique": capabilities.technique, "features": capabilities.features }));
        }
        document(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "sandboxers": sandboxers,
        }))
    }
}
