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
    inspect,
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
        let (registry, wanted) = (self.registry.clone(), id.clone());
        let work = async move {
            let found = sandboxes(registry.clone(), namespace.clone()).await?;
            let failures = tokio::task::spawn_blocking(move || registry.failures()).await;
            inspect::only(found, failures.map_err(Error::failed("read the failures"))??, &namespace, &wanted)
        };
        document(&self.calls.run("Admin.Inspect", &id, work).await.grpc()?)
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
