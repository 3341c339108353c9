//! `containerd.services.sandbox.v1.Controller`: pods, as containerd's CRI plugin asks for them.
//!
//! containerd's expectations that are not in the protocol definition (measured on 2.1 to 2.4):
//! - a Start answer without `version` 3 makes it run the shim binary instead of using our address;
//! - Status repeats address and version: after a restart containerd learns them from there;
//! - Wait is the pod's liveness. [`Unavailable`](kuasar_sandboxers::Code::Unavailable) is retried, any other error makes the pod NotReady;
//! - Stop and Shutdown of a sandbox that is gone may answer NotFound; both may be repeated;
//! - Update leaves `sandboxer` empty.

use std::{
    collections::HashMap,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use kuasar_sandboxers::{
    Error, Result,
    handle::{SandboxHandle, SandboxStatus},
    id::Namespace,
    lifecycle::SandboxState,
    registry::Registry,
};
use prost_types::{Any, Timestamp};
use serde_json::{Value, json};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use crate::{
    calls::Calls,
    metrics, pod,
    proto::{
        sandbox::{
            ControllerCreateRequest, ControllerCreateResponse, ControllerMetricsRequest, ControllerMetricsResponse,
            ControllerPlatformRequest, ControllerPlatformResponse, ControllerShutdownRequest, ControllerShutdownResponse,
            ControllerStartRequest, ControllerStartResponse, ControllerStatusRequest, ControllerStatusResponse,
            ControllerStopRequest, ControllerStopResponse, ControllerUpdateRequest, ControllerUpdateResponse,
            ControllerWaitRequest, ControllerWaitResponse, controller_server,
        },
        types,
    },
    status::IntoStatus,
};

/// Version of the Task API behind the address.
const TASK_VERSION: u32 = 3;

/// The type of a sandbox's spec in containerd's store.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// A pod has no container of its own to be described. Without any spec containerd 2.3 and later log an error for each container.
const EMPTY_SPEC: &str = r#"{"ociVersion":"1.0.2"}"#;

/// The only part of a sandbox that Update understands.
const EXTENSIONS: &str = "extensions";
/// The extension in it.
const UPDATED_RESOURCES: &str = "updated-resources";

/// The service.
#[derive(Clone)]
pub struct Controller {
    registry: Registry,
    calls: Calls,
    address: Arc<str>,
}

impl Controller {
    /// A service over `registry` that sends containerd to the Task socket at `task_socket`.
    #[must_use]
    pub fn new(registry: Registry, calls: Calls, task_socket: &Path) -> Self {
        Self { registry, calls, address: format!("ttrpc+unix://{}", task_socket.display()).into() }
    }

    fn sandbox(&self, metadata: &MetadataMap, id: &str) -> Result<SandboxHandle> {
        self.registry.sandbox(&namespace(metadata)?, &id.parse()?)
    }

    /// Runs an operation on one sandbox.
    async fn on<T, W>(
        &self,
        name: &'static str,
        metadata: &MetadataMap,
        id: &str,
        work: impl FnOnce(SandboxHandle) -> W + Send,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        let sandbox = self.sandbox(metadata, id).grpc()?;
        self.calls.run(name, id, work(sandbox)).await.grpc()
    }
}

/// containerd's namespace, which every request carries as a header.
fn namespace(metadata: &MetadataMap) -> Result<Namespace> {
    let header = metadata.get("containerd-namespace").and_then(|value| value.to_str().ok());
    header.ok_or_else(|| Error::invalid("namespace", "the header containerd-namespace is missing"))?.parse()
}

#[tonic::async_trait]
impl controller_server::Controller for Controller {
    async fn create(&self, request: Request<ControllerCreateRequest>) -> Result<Response<ControllerCreateResponse>, Status> {
        let namespace = namespace(request.metadata()).grpc()?;
        let request = request.into_inner();
        let sandbox_id = request.sandbox_id.clone();
        let spec = pod::spec(namespace, request).grpc()?;
        let registry = self.registry.clone();
        self.calls.run("Controller.Create", &sandbox_id, async move { registry.create(spec).await }).await.grpc()?;
        Ok(Response::new(ControllerCreateResponse { sandbox_id }))
    }

    async fn start(&self, request: Request<ControllerStartRequest>) -> Result<Response<ControllerStartResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let work = |sandbox: SandboxHandle| async move { sandbox.start().await };
        let status = self.on("Controller.Start", &metadata, &request.sandbox_id, work).await?;
        Ok(Response::new(ControllerStartResponse {
            sandbox_id: request.sandbox_id,
            pid: pid(&status),
            created_at: Some(status.created_at.into()),
            labels: HashMap::new(),
            address: self.address.to_string(),
            version: TASK_VERSION,
            spec: Some(Any { type_url: SPEC.into(), value: EMPTY_SPEC.into() }),
        }))
    }

    async fn platform(
        &self,
        request: Request<ControllerPlatformRequest>,
    ) -> Result<Response<ControllerPlatformResponse>, Status> {
        self.sandbox(request.metadata(), &request.get_ref().sandbox_id).grpc()?;
        Ok(Response::new(ControllerPlatformResponse { platform: Some(platform()) }))
    }

    async fn stop(&self, request: Request<ControllerStopRequest>) -> Result<Response<ControllerStopResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let grace = Duration::from_secs(request.timeout_secs.into());
        let work = move |sandbox: SandboxHandle| async move { sandbox.stop(grace).await };
        self.on("Controller.Stop", &metadata, &request.sandbox_id, work).await?;
        Ok(Response::new(ControllerStopResponse {}))
    }

    async fn wait(&self, request: Request<ControllerWaitRequest>) -> Result<Response<ControllerWaitResponse>, Status> {
        let sandbox = self.sandbox(request.metadata(), &request.get_ref().sandbox_id).grpc()?;
        let exit = self.calls.wait_unless_stopped("Controller.Wait", sandbox.id.as_str(), sandbox.wait()).await.grpc()?;
        Ok(Response::new(ControllerWaitResponse { exit_status: exit.status, exited_at: Some(exit.at.into()) }))
    }

    async fn status(&self, request: Request<ControllerStatusRequest>) -> Result<Response<ControllerStatusResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let work = |sandbox: SandboxHandle| async move { sandbox.status().await };
        let status = self.on("Controller.Status", &metadata, &request.sandbox_id, work).await?;
        let exited_at = match status.state {
            SandboxState::Stopped { exit } => Some(exit.at.into()),
            _ => None,
        };
        Ok(Response::new(ControllerStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: pid(&status),
            state: state(status.state).into(),
            info: if request.verbose { info(&status).grpc()? } else { HashMap::new() },
            created_at: Some(status.created_at.into()),
            exited_at,
            extra: None,
            address: self.address.to_string(),
            version: TASK_VERSION,
        }))
    }

    async fn shutdown(
        &self,
        request: Request<ControllerShutdownRequest>,
    ) -> Result<Response<ControllerShutdownResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let work = |sandbox: SandboxHandle| async move { sandbox.delete().await };
        self.on("Controller.Shutdown", &metadata, &request.sandbox_id, work).await?;
        Ok(Response::new(ControllerShutdownResponse {}))
    }

    async fn metrics(&self, request: Request<ControllerMetricsRequest>) -> Result<Response<ControllerMetricsResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        // containerd passes over a sandbox that is unavailable or gone; after any other error it tells of no sandbox at all.
        let work = |sandbox: SandboxHandle| async move {
            sandbox.metrics().await.map_err(|error| match error {
                Error::NotFound { .. } => error,
                error => Error::Unavailable { what: "the sandbox's resource use".into(), why: error.report() },
            })
        };
        let stats = self.on("Controller.Metrics", &metadata, &request.sandbox_id, work).await?;
        let metric = types::Metric {
            timestamp: Some(Timestamp::from(SystemTime::now())),
            id: request.sandbox_id,
            data: Some(metrics::grpc(&stats).grpc()?),
        };
        Ok(Response::new(ControllerMetricsResponse { metrics: Some(metric) }))
    }

    async fn update(&self, request: Request<ControllerUpdateRequest>) -> Result<Response<ControllerUpdateResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let sandbox = self.sandbox(&metadata, &request.sandbox_id).grpc()?;
        let Some(resources) = update(&request).grpc()? else { return Ok(Response::new(ControllerUpdateResponse {})) };
        let work = async move { sandbox.update(resources).await };
        self.calls.run("Controller.Update", request.sandbox_id, work).await.grpc()?;
        Ok(Response::new(ControllerUpdateResponse {}))
    }
}

/// What an Update asks for; `None` when there is nothing in it that concerns us.
fn update(request: &ControllerUpdateRequest) -> Result<Option<kuasar_sandboxers::types::PodResources>> {
    // As in containerd's stores, no fields at all mean every one, and a field may be a path into a map.
    let field = |field: &String| field.split('.').next().unwrap_or_default() == EXTENSIONS;
    if let Some(other) = request.fields.iter().find(|name| !field(name)) {
        let why = format!("field {other:?} of a sandbox cannot be changed; {EXTENSIONS:?} can");
        return Err(Error::Unsupported { operation: "this update of a sandbox", why });
    }
    let extension = request.sandbox.as_ref().and_then(|sandbox| sandbox.extensions.get(UPDATED_RESOURCES));
    extension.map(pod::updated_resources).transpose()
}

fn pid(status: &SandboxStatus) -> u32 {
    match status.state {
        SandboxState::Ready { pid, .. } => pid.unwrap_or(0),
        _ => 0,
    }
}

fn state(state: SandboxState) -> &'static str {
    match state {
        SandboxState::Ready { .. } => "SANDBOX_READY",
        _ => "SANDBOX_NOTREADY",
    }
}

/// For `crictl inspectp`. containerd reads the value of `info` into a struct of its own and writes that out again, so only keys
/// it knows are in there; the rest has a key of ours.
fn info(status: &SandboxStatus) -> Result<HashMap<String, String>> {
    let cri = json!({
        // Not in the answer to Start: containerd would write the namespaces of that process into every container's specification.
        "pid": status.detail["init"].as_u64().unwrap_or(pid(status).into()),
        "processStatus": status.state.phase().name(),
        "runtimeType": status.spec.sandboxer,
        "runtimeSpec": { "ociVersion": "1.0.2", "linux": { "namespaces": namespaces(status) } },
    });
    let ours = serde_json::to_string(status).map_err(Error::failed("write the sandbox's status as JSON"))?;
    Ok([("info".to_owned(), cri.to_string()), ("kuasar".to_owned(), ours)].into())
}

/// Where the pod's namespaces on the node are, as in an OCI specification. Those that are the node's own are left out.
fn namespaces(status: &SandboxStatus) -> Vec<Value> {
    let network = status.spec.netns.as_ref().map(|netns| json!({ "type": "network", "path": netns }));
    let found = &status.detail["namespaces"];
    let others = [("ipc", &found["ipc"]), ("uts", &found["uts"]), ("user", &found["user"]), ("pid", &found["pid"]["shared"])];
    let others = others.into_iter().filter_map(|(kind, path)| Some(json!({ "type": kind, "path": path.as_str()? })));
    network.into_iter().chain(others).collect()
}

/// The platform containers run on, in Go's words.
fn platform() -> types::Platform {
    let (architecture, variant) = match std::env::consts::ARCH {
        "x86_64" => ("amd64", ""),
        "x86" => ("386", ""),
        "aarch64" => ("arm64", "v8"),
        "arm" => ("arm", "v7"),
        "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", ""),
        "powerpc64" => ("ppc64", ""),
        "loongarch64" => ("loong64", ""),
        // riscv64 and s390x have one name everywhere.
        other => (other, ""),
    };
    types::Platform {
        os: std::env::consts::OS.into(),
        architecture: architecture.into(),
        variant: variant.into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;
    use prost_types::Any;

    use super::*;

    fn request(fields: &[&str], extensions: &[(&str, Any)]) -> ControllerUpdateRequest {
        let extensions = extensions.iter().map(|(name, any)| ((*name).to_owned(), any.clone())).collect();
        ControllerUpdateRequest {
            fields: fields.iter().map(|field| (*field).to_owned()).collect(),
            sandbox: Some(types::Sandbox { extensions, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn an_update_is_of_the_extensions() {
        let url = "io.containerd.cri.v1/UpdatedResources";
        let any = Any { type_url: url.into(), value: br#"{"Overhead":{"cpu_shares":7}}"#.to_vec() };
        for fields in [&["extensions"][..], &["extensions.updated-resources"], &[]] {
            let got = update(&request(fields, &[(UPDATED_RESOURCES, any.clone())])).unwrap().unwrap();
            assert_eq!(got.overhead.unwrap().cpu_shares, 7);
        }
        assert_eq!(update(&request(&["extensions"], &[("metadata", any.clone())])).unwrap(), None);
        let other = update(&request(&["extensions", "labels"], &[])).unwrap_err();
        assert_eq!(other.code(), Code::Unimplemented);
        assert!(other.report().contains("labels"));
    }

    #[test]
    fn inspectp_shows_process_and_namespaces_where_there_are_any() {
        let mut status = SandboxStatus {
            spec: kuasar_sandboxers::types::SandboxSpec {
                netns: Some("/run/netns/cni-1".into()),
                ..kuasar_sandboxers::fake::spec("p")
            }
            .into(),
            state: SandboxState::Ready { pid: None, since: SystemTime::UNIX_EPOCH },
            created_at: SystemTime::UNIX_EPOCH,
            technique: "runc".into(),
            detail: json!({
                "namespaces": { "network": "/run/netns/cni-1", "ipc": "/s/ipc", "uts": null, "user": null, "pid": { "shared": "/s/pid" } },
                "init": 42,
            }),
            containers: Vec::new(),
        };
        let told = |status: &SandboxStatus| serde_json::from_str::<Value>(&info(status).unwrap()["info"]).unwrap();
        let one = told(&status);
        assert_eq!(one["pid"], 42);
        let namespaces = json!([
            { "type": "network", "path": "/run/netns/cni-1" },
            { "type": "ipc", "path": "/s/ipc" },
            { "type": "pid", "path": "/s/pid" },
        ]);
        assert_eq!(one["runtimeSpec"]["linux"]["namespaces"], namespaces);
        assert_eq!(pid(&status), 0, "what Start tells");
        // A pod on the node's network whose containers have process ids of their own; one in a virtual machine.
        status.spec = kuasar_sandboxers::fake::spec("p").into();
        for detail in [json!({ "namespaces": { "pid": "own" }, "init": null }), json!({ "hypervisor": "qemu" })] {
            status.detail = detail;
            let one = told(&status);
            assert_eq!((&one["pid"], &one["runtimeSpec"]["linux"]["namespaces"]), (&json!(0), &json!([])));
        }
    }

    #[test]
    fn platform_has_gos_names() {
        let platform = platform();
        assert_eq!(platform.os, "linux");
        assert!(!["x86_64", "aarch64", "powerpc64"].contains(&platform.architecture.as_str()));
    }
}
