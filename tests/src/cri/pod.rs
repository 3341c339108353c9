//! Handles to what runs: a pod, a container.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use k8s_cri::v1::{self, ContainerState, PodSandboxConfig, PodSandboxState};
use tonic::Status;

use super::logs::{self, Line};
use super::stream::{PortForward, Session};
use super::{ContainerSpec, Cri};
use crate::wait;

/// How long a test waits for what should happen at once.
pub const SOON: Duration = Duration::from_secs(30);

/// A pod that was run. Dropping the handle leaves the pod: its node removes it.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// What was asked for; CreateContainer repeats it.
    pub config: PodSandboxConfig,
    pub(super) cri: Cri,
}

impl Pod {
    /// CreateContainer.
    ///
    /// # Errors
    /// The call fails.
    pub async fn create(&self, mut spec: ContainerSpec) -> Result<Container, Status> {
        // As kubelet does: what the container does not say about namespaces, the pod says.
        let pod_namespaces = || self.config.linux.as_ref()?.security_context.as_ref()?.namespace_options.clone();
        let security = spec.security();
        match &mut security.namespace_options {
            None => security.namespace_options = pod_namespaces(),
            Some(own) => {
                if let Some(pod) = pod_namespaces() {
                    (own.network, own.ipc) = (pod.network, pod.ipc);
                    own.userns_options = pod.userns_options;
                }
            }
        }
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(spec.config.clone()),
            sandbox_config: Some(self.config.clone()),
        };
        let id = self.cri.runtime().create_container(request).await?.into_inner().container_id;
        self.cri.remember(&id);
        let log = (!spec.config.log_path.is_empty()).then(|| Path::new(&self.config.log_directory).join(&spec.config.log_path));
        Ok(Container { id, log, cri: self.cri.clone() })
    }

    /// CreateContainer and StartContainer.
    ///
    /// # Errors
    /// The call that fails.
    pub async fn run(&self, spec: ContainerSpec) -> Result<Container, Status> {
        let container = self.create(spec).await?;
        container.start().await?;
        Ok(container)
    }

    /// PodSandboxStatus, verbose.
    ///
    /// # Errors
    /// The call fails.
    pub async fn status(&self) -> Result<v1::PodSandboxStatusResponse, Status> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        Ok(self.cri.runtime().pod_sandbox_status(request).await?.into_inner())
    }

    /// Ready or not.
    ///
    /// # Errors
    /// The call fails.
    pub async fn state(&self) -> Result<PodSandboxState, Status> {
        Ok(self.status().await?.status.unwrap_or_default().state())
    }

    /// Waits for a state.
    ///
    /// # Errors
    /// A call fails, or [`SOON`] has passed.
    pub async fn wait_state(&self, state: PodSandboxState) -> Result<()> {
        wait::until(&format!("pod {} to be {}", self.id, state.as_str_name()), SOON, || async {
            Ok((self.state().await? == state).then_some(()))
        })
        .await
    }

    /// Its IP address; empty on the node's network.
    ///
    /// # Errors
    /// The call fails.
    pub async fn ip(&self) -> Result<String, Status> {
        let status = self.status().await?.status.unwrap_or_default();
        Ok(status.network.unwrap_or_default().ip)
    }

    /// PodSandboxStats.
    ///
    /// # Errors
    /// The call fails.
    pub async fn stats(&self) -> Result<v1::PodSandboxStats, Status> {
        let request = v1::PodSandboxStatsRequest { pod_sandbox_id: self.id.clone() };
        let response = self.cri.runtime().pod_sandbox_stats(request).await?;
        Ok(response.into_inner().stats.unwrap_or_default())
    }

    /// PortForward, opened: bytes to and from a TCP port of the pod.
    ///
    /// # Errors
    /// The call fails, or the stream cannot be opened.
    pub async fn port_forward(&self, port: u16) -> Result<PortForward> {
        let request = v1::PortForwardRequest { pod_sandbox_id: self.id.clone(), port: vec![i32::from(port)] };
        let url = self.cri.runtime().port_forward(request).await?.into_inner().url;
        PortForward::open(&url, port).await
    }

    /// StopPodSandbox.
    ///
    /// # Errors
    /// The call fails.
    pub async fn stop(&self) -> Result<(), Status> {
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.runtime().stop_pod_sandbox(request).await?;
        Ok(())
    }

    /// RemovePodSandbox.
    ///
    /// # Errors
    /// The call fails.
    pub async fn remove(&self) -> Result<(), Status> {
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        self.cri.runtime().remove_pod_sandbox(request).await?;
        Ok(())
    }

    /// StopPodSandbox and RemovePodSandbox, which take the containers along.
    ///
    /// # Errors
    /// The call that fails.
    pub async fn remove_all(&self) -> Result<(), Status> {
        self.stop().await?;
        self.remove().await
    }
}

/// What ExecSync returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// Exit code.
    pub exit_code: i32,
    /// Standard output, as bytes.
    pub out: Vec<u8>,
    /// Standard error, as bytes.
    pub err: Vec<u8>,
}

impl Executed {
    /// Standard output as text.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }

    /// Standard error as text.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.err).into_owned()
    }
}

/// A container that was created. Dropping the handle leaves the container.
#[derive(Clone, Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its log file, where it has one.
    pub log: Option<PathBuf>,
    pub(super) cri: Cri,
}

impl Container {
    /// StartContainer.
    ///
    /// # Errors
    /// The call fails.
    pub async fn start(&self) -> Result<(), Status> {
        let request = v1::StartContainerRequest { container_id: self.id.clone() };
        self.cri.runtime().start_container(request).await?;
        Ok(())
    }

    /// StopContainer: the stop signal, and SIGKILL after `timeout_secs`.
    ///
    /// # Errors
    /// The call fails.
    pub async fn stop(&self, timeout_secs: i64) -> Result<(), Status> {
        let request = v1::StopContainerRequest { container_id: self.id.clone(), timeout: timeout_secs };
        self.cri.runtime().stop_container(request).await?;
        Ok(())
    }

    /// RemoveContainer.
    ///
    /// # Errors
    /// The call fails.
    pub async fn remove(&self) -> Result<(), Status> {
        let request = v1::RemoveContainerRequest { container_id: self.id.clone() };
        self.cri.runtime().remove_container(request).await?;
        Ok(())
    }

    /// ContainerStatus.
    ///
    /// # Errors
    /// The call fails.
    pub async fn status(&self) -> Result<v1::ContainerStatus, Status> {
        let request = v1::ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let response = self.cri.runtime().container_status(request).await?;
        Ok(response.into_inner().status.unwrap_or_default())
    }

    /// The verbose part of ContainerStatus, which holds pid and runtime spec.
    ///
    /// # Errors
    /// The call fails, or the answer is not JSON.
    pub async fn info(&self) -> Result<serde_json::Value> {
        let request = v1::ContainerStatusRequest { container_id: self.id.clone(), verbose: true };
        let info = self.cri.runtime().container_status(request).await?.into_inner().info;
        Ok(serde_json::from_str(info.get("info").map_or("{}", String::as_str))?)
    }

    /// The pid of its first process on the node.
    ///
    /// # Errors
    /// The call fails, or shows none.
    pub async fn pid(&self) -> Result<i32> {
        let info = self.info().await?;
        info["pid"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok())
            .filter(|pid| *pid > 0)
            .ok_or_else(|| anyhow::anyhow!("container {} shows no pid", self.id))
    }

    /// Its state.
    ///
    /// # Errors
    /// The call fails.
    pub async fn state(&self) -> Result<ContainerState, Status> {
        Ok(self.status().await?.state())
    }

    /// Waits for its end and returns the last status: exit code, reason, message.
    ///
    /// # Errors
    /// A call fails, or [`SOON`] has passed.
    pub async fn wait_exit(&self) -> Result<v1::ContainerStatus> {
        wait::until(&format!("container {} to exit", self.id), SOON, || async {
            let status = self.status().await?;
            Ok((status.state() == ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// ExecSync, without a time limit.
    ///
    /// # Errors
    /// The call fails.
    pub async fn exec<I, S>(&self, command: I) -> Result<Executed, Status>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        self.exec_timeout(command, 0).await
    }

    /// ExecSync with a time limit in seconds (0 for none).
    ///
    /// # Errors
    /// The call fails; with `DeadlineExceeded` when the time is up.
    pub async fn exec_timeout<I, S>(&self, command: I, timeout_secs: i64) -> Result<Executed, Status>
    where
        I: IntoIterator<Item = S>,
        S: Into<String>,
    {
        let request = v1::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.into_iter().map(Into::into).collect(),
            timeout: timeout_secs,
        };
        let response = self.cri.runtime().exec_sync(request).await?.into_inner();
        Ok(Executed { exit_code: response.exit_code, out: response.stdout, err: response.stderr })
    }

    /// ExecSync of a shell script.
    ///
    /// # Errors
    /// The call fails.
    pub async fn sh(&self, script: &str) -> Result<Executed, Status> {
        self.exec(["sh", "-c", script]).await
    }

    /// Exec, opened: stdin, stdout, stderr, terminal size, exit code over one connection.
    ///
    /// # Errors
    /// The call fails, or the stream cannot be opened.
    pub async fn exec_session(&self, command: &[&str], tty: bool, stdin: bool) -> Result<Session> {
        let request = v1::ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            tty,
            stdin,
            stdout: true,
            // A terminal has no stderr of its own; CRI refuses both.
            stderr: !tty,
        };
        let url = self.cri.runtime().exec(request).await?.into_inner().url;
        Session::open(&url).await
    }

    /// Attach, opened: what the container reads and prints from now on.
    ///
    /// # Errors
    /// The call fails, or the stream cannot be opened.
    pub async fn attach(&self, tty: bool, stdin: bool) -> Result<Session> {
        let request = v1::AttachRequest { container_id: self.id.clone(), tty, stdin, stdout: true, stderr: !tty };
        let url = self.cri.runtime().attach(request).await?.into_inner().url;
        Session::open(&url).await
    }

    /// ContainerStats.
    ///
    /// # Errors
    /// The call fails.
    pub async fn stats(&self) -> Result<v1::ContainerStats, Status> {
        let request = v1::ContainerStatsRequest { container_id: self.id.clone() };
        let response = self.cri.runtime().container_stats(request).await?;
        Ok(response.into_inner().stats.unwrap_or_default())
    }

    /// UpdateContainerResources.
    ///
    /// # Errors
    /// The call fails.
    pub async fn update(&self, resources: v1::LinuxContainerResources) -> Result<(), Status> {
        let request =
            v1::UpdateContainerResourcesRequest { container_id: self.id.clone(), linux: Some(resources), ..Default::default() };
        self.cri.runtime().update_container_resources(request).await?;
        Ok(())
    }

    /// ReopenContainerLog.
    ///
    /// # Errors
    /// The call fails.
    pub async fn reopen_log(&self) -> Result<(), Status> {
        let request = v1::ReopenContainerLogRequest { container_id: self.id.clone() };
        self.cri.runtime().reopen_container_log(request).await?;
        Ok(())
    }

    /// The lines of its log so far; none while there is no file yet.
    ///
    /// # Errors
    /// The log cannot be read, or a line is not in CRI's form.
    pub fn logs(&self) -> Result<Vec<Line>> {
        self.log.as_deref().map_or_else(|| Ok(Vec::new()), logs::read)
    }

    /// Waits until a line of the log holds `text`, and returns that line.
    ///
    /// # Errors
    /// The log cannot be read, or [`SOON`] has passed; the error shows the log.
    pub async fn wait_log(&self, text: &str) -> Result<Line> {
        let found = wait::until(&format!("{text:?} in the log of {}", self.id), SOON, || async {
            Ok(self.logs()?.into_iter().find(|line| line.text.contains(text)))
        })
        .await;
        found.map_err(|error| error.context(format!("the log is {:?}", self.logs().unwrap_or_default())))
    }
}
