//! A CRI client in the words of a test: [`Cri`] for the node, [`Pod`] and [`Container`] handles for what runs on it.
//!
//! Every call that is a CRI call returns [`tonic::Status`] as its error, so that a test can look at the code and message;
//! `?` turns it into an `anyhow` error. Fields that no builder names are reached through `spec.config`.

pub mod logs;
mod pod;
mod resources;
mod spec;
pub mod stream;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self, ImageSpec};
use tokio::net::UnixStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

pub use k8s_cri;
pub use pod::{Container, Executed, Pod, SOON};
pub use spec::{ContainerSpec, PodSpec};

/// A connection to the CRI services of one containerd. Cheap to clone; connects anew by itself after a restart.
#[derive(Clone, Debug)]
pub struct Cri {
    channel: Channel,
    /// Ids of every pod and container made through this client: the leak check looks for their traces.
    ids: Arc<Mutex<BTreeSet<String>>>,
}

impl Cri {
    /// Connects to a containerd socket.
    ///
    /// # Errors
    /// Nobody listens there.
    pub async fn connect(socket: &Path) -> Result<Self> {
        Ok(Self { channel: channel(socket).await?, ids: Arc::default() })
    }

    /// The raw runtime service, for calls that have no method here.
    #[must_use]
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        // Container stats of many pods pass tonic's default of 4 MiB.
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(64 << 20)
    }

    /// The raw image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    /// Ids of every pod and container made so far.
    #[must_use]
    pub fn ids(&self) -> BTreeSet<String> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn remember(&self, id: &str) {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned());
    }

    /// The first condition that is not met, in its own words; `None` when runtime and network are ready.
    ///
    /// # Errors
    /// The call fails.
    pub async fn not_ready(&self) -> Result<Option<String>, Status> {
        let response = self.runtime().status(v1::StatusRequest { verbose: false }).await?;
        let conditions = response.into_inner().status.unwrap_or_default().conditions;
        Ok(conditions
            .into_iter()
            .find(|condition| !condition.status && condition.r#type.ends_with("Ready"))
            .map(|condition| format!("{}: {}", condition.r#type, condition.message)))
    }

    /// The runtime handlers and what each can do.
    ///
    /// # Errors
    /// The call fails.
    pub async fn handlers(&self) -> Result<Vec<v1::RuntimeHandler>, Status> {
        let response = self.runtime().status(v1::StatusRequest { verbose: false }).await?;
        Ok(response.into_inner().runtime_handlers)
    }

    /// An image, when it is there.
    ///
    /// # Errors
    /// The call fails.
    pub async fn image_status(&self, reference: &str) -> Result<Option<v1::Image>, Status> {
        let request = v1::ImageStatusRequest { image: Some(image_spec(reference)), verbose: false };
        Ok(self.images().image_status(request).await?.into_inner().image)
    }

    /// Pulls an image; returns its id.
    ///
    /// # Errors
    /// The call fails.
    pub async fn pull(&self, reference: &str) -> Result<String, Status> {
        let request = v1::PullImageRequest { image: Some(image_spec(reference)), ..Default::default() };
        Ok(self.images().pull_image(request).await?.into_inner().image_ref)
    }

    /// RunPodSandbox.
    ///
    /// # Errors
    /// The call fails.
    pub async fn run_pod(&self, spec: PodSpec) -> Result<Pod, Status> {
        let request = v1::RunPodSandboxRequest { config: Some(spec.config.clone()), runtime_handler: spec.handler };
        let id = self.runtime().run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        self.remember(&id);
        Ok(Pod { id, config: spec.config, cri: self.clone() })
    }

    /// All pods.
    ///
    /// # Errors
    /// The call fails.
    pub async fn pods(&self) -> Result<Vec<v1::PodSandbox>, Status> {
        let request = v1::ListPodSandboxRequest { filter: None };
        Ok(self.runtime().list_pod_sandbox(request).await?.into_inner().items)
    }

    /// All containers, running or not.
    ///
    /// # Errors
    /// The call fails.
    pub async fn containers(&self) -> Result<Vec<v1::Container>, Status> {
        let request = v1::ListContainersRequest { filter: None };
        Ok(self.runtime().list_containers(request).await?.into_inner().containers)
    }

    /// A handle to a container that somebody else has made; its log is not known.
    #[must_use]
    pub fn container(&self, id: &str) -> Container {
        Container { id: id.to_owned(), log: None, cri: self.clone() }
    }

    /// Stops and removes every pod, as `crictl rmp --all --force` does.
    ///
    /// # Errors
    /// The first call that fails.
    pub async fn remove_all_pods(&self) -> Result<(), Status> {
        for pod in self.pods().await? {
            let pod_sandbox_id = pod.id;
            let mut runtime = self.runtime();
            runtime.stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }).await?;
            runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await?;
        }
        Ok(())
    }
}

/// A gRPC connection over a Unix socket.
pub(crate) async fn channel(socket: &Path) -> Result<Channel> {
    let path: PathBuf = socket.to_path_buf();
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        }))
        .await
        .with_context(|| format!("connect to {}", socket.display()))
}

fn image_spec(reference: &str) -> ImageSpec {
    ImageSpec { image: reference.to_owned(), ..Default::default() }
}
