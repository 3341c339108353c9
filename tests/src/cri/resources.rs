//! UpdatePodSandboxResources, which is younger than the bindings used here (CRI of Kubernetes 1.32, containerd 2.3).

use k8s_cri::v1::LinuxContainerResources;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use super::Pod;

#[derive(Clone, PartialEq, prost::Message)]
struct UpdatePodSandboxResourcesRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "2")]
    overhead: Option<LinuxContainerResources>,
    #[prost(message, optional, tag = "3")]
    resources: Option<LinuxContainerResources>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UpdatePodSandboxResourcesResponse {}

impl Pod {
    /// UpdatePodSandboxResources.
    ///
    /// # Errors
    /// The call fails; with `Unimplemented` before containerd 2.3.
    pub async fn update(
        &self,
        resources: LinuxContainerResources,
        overhead: Option<LinuxContainerResources>,
    ) -> Result<(), Status> {
        let mut client = tonic::client::Grpc::new(self.cri.channel.clone());
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let request =
            UpdatePodSandboxResourcesRequest { pod_sandbox_id: self.id.clone(), overhead, resources: Some(resources) };
        let path = PathAndQuery::from_static("/runtime.v1.RuntimeService/UpdatePodSandboxResources");
        let codec: ProstCodec<UpdatePodSandboxResourcesRequest, UpdatePodSandboxResourcesResponse> = ProstCodec::default();
        client.unary(Request::new(request), path, codec).await?;
        Ok(())
    }
}
