//! `containerd.task.v3.Task` and `v2.Task`: containers and their processes. Both names have the same messages and methods.
//!
//! containerd dials once per container. It takes the loss of a connection for the container's death, so nothing a client sends may
//! end a connection, and [`Shutdown`](TaskService::shutdown) (which containerd 2.4 sends after every Delete) must do nothing but succeed.

mod bundle;
pub mod connection;
mod journal;
mod replay;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
        DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
        StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim::oci::ProcessDetails,
    shim_async::{Task, create_task},
};
use kuasar_sandboxers::{
    Error, Result,
    handle::ContainerHandle,
    id::{ContainerId, ExecId, Namespace},
    lifecycle::ProcessState,
    registry::Registry,
    stdio::Stdio,
    types::{ExecSpec, WindowSize},
};
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::Value;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use ttrpc::r#async::{Service, TtrpcContext};

use self::replay::or_earlier;
use crate::{abandoned::Comparison, calls::Calls, events, metrics, status::IntoStatus};

/// Names of the service: containerd 2.x asks for the first, 1.7 for the second.
const NAMES: [&str; 2] = ["containerd.task.v3.Task", "containerd.task.v2.Task"];

/// How long containerd may keep a connection whose container is deleted. It closes it as soon as Delete is answered, unless it does
/// not know that the container was created: then it keeps the connection, and a task that it takes for live, until it restarts.
const UNCLOSED: Duration = Duration::from_secs(10);

/// The metadata that `containerd-shim-kuasar-v1 delete` adds to its calls: they are not containerd's.
pub const CLEAN_UP: &str = "kuasar-clean-up";

/// The service.
#[derive(Clone)]
pub struct TaskService {
    registry: Registry,
    calls: Calls,
    comparison: Comparison,
    /// Cancelled when the connection is gone; cancelling it ends the connection.
    connection: CancellationToken,
    /// The containers that the connection is for: one, where containerd has made it.
    attached: Arc<Mutex<BTreeSet<(Namespace, ContainerId)>>>,
}

impl TaskService {
    /// A service over `registry`.
    #[must_use]
    pub(crate) fn new(registry: Registry, calls: Calls, comparison: Comparison) -> Self {
        Self { registry, calls, comparison, connection: CancellationToken::new(), attached: Arc::default() }
    }

    /// The service under its names, for the connection that ends with `connection`.
    #[must_use]
    pub fn services(&self, connection: &CancellationToken) -> HashMap<String, Service> {
        let service = Arc::new(Self { connection: connection.clone(), attached: Arc::default(), ..self.clone() });
        NAMES
            .into_iter()
            .flat_map(|name| {
                let services = replay::guarded(create_task(service.clone()));
                services.map(move |(_, service)| (name.to_owned(), service))
            })
            .collect()
    }

    fn container(&self, context: &TtrpcContext, id: &str) -> Result<ContainerHandle> {
        let (namespace, id) = (namespace(context)?, id.parse()?);
        let container = self.registry.container(&namespace, &id)?;
        if !context.metadata.contains_key(CLEAN_UP) {
            self.attach((namespace, id));
        }
        Ok(container)
    }

    /// The container is looked after by whoever is at the other end, as long as the connection is there.
    fn attach(&self, key: (Namespace, ContainerId)) {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        if attached.insert(key.clone()) {
            let (attachment, connection) = (self.comparison.attached.add(key), self.connection.clone());
            tokio::spawn(async move {
                connection.cancelled().await;
                drop(attachment);
            });
        }
    }

    /// Runs an operation on one container.
    async fn on<T, W>(
        &self,
        name: &'static str,
        context: &TtrpcContext,
        id: &str,
        work: impl FnOnce(ContainerHandle) -> W + Send,
    ) -> Result<T>
    where
        T: Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        let container = self.container(context, id)?;
        let subject = format!("{id} of sandbox {}", container.sandbox().id);
        self.calls.run(name, subject, work(container)).await
    }

    /// The state of a process, be it deleted by the daemon before this one.
    async fn last_state(&self, context: &TtrpcContext, id: &str, exec: Option<ExecId>) -> Option<ProcessState> {
        match self.container(context, id) {
            Ok(container) => match container.status(exec.clone()).await {
                Ok(found) => Some(found.process.state),
                Err(_) => self.deleted(context, id, exec.as_ref()),
            },
            Err(_) => self.deleted(context, id, exec.as_ref()),
        }
    }

    fn deleted(&self, context: &TtrpcContext, id: &str, exec: Option<&ExecId>) -> Option<ProcessState> {
        self.registry.deleted(&namespace(context).ok()?, &id.parse().ok()?, exec)
    }

    /// Ends the connection some time after the container is deleted.
    fn close_after(&self, container: ContainerHandle) {
        let connection = self.connection.clone();
        tokio::spawn(async move {
            container.deleted().await;
            if timeout(UNCLOSED, connection.cancelled()).await.is_err() {
                connection.cancel();
            }
        });
    }
}

/// containerd's namespace, which every request carries as metadata.
fn namespace(context: &TtrpcContext) -> Result<Namespace> {
    let value = context.metadata.get("containerd-namespace-ttrpc").and_then(|values| values.first());
    value.ok_or_else(|| Error::invalid("namespace", "the metadata containerd-namespace-ttrpc is missing"))?.parse()
}

/// An exec's id; `None` for the container's first process.
fn exec(id: &str) -> Result<Option<ExecId>> {
    if id.is_empty() { Ok(None) } else { id.parse().map(Some) }
}

/// A JSON document that came in an `Any`; its type names are not fixed by containerd's API, so its shape decides.
fn document(what: &'static str, any: Option<&Any>) -> Result<Value> {
    let Some(any) = any else { return Err(Error::invalid(what, "it is missing")) };
    let value: Value = serde_json::from_slice(&any.value)
        .map_err(|error| Error::invalid(what, format!("{:?} is not JSON: {error}", any.type_url)))?;
    if !value.is_object() {
        return Err(Error::invalid(what, "it is not a JSON object"));
    }
    Ok(value)
}

fn stdio(stdin: String, stdout: String, stderr: String, terminal: bool) -> Stdio {
    Stdio { stdin, stdout, stderr, terminal }
}

fn status(state: ProcessState) -> Status {
    match state {
        ProcessState::Created { .. } => Status::CREATED,
        ProcessState::Running { .. } => Status::RUNNING,
        ProcessState::Paused { .. } => Status::PAUSED,
        ProcessState::Stopped { .. } => Status::STOPPED,
    }
}

fn process(info: kuasar_sandboxers::types::ProcessInfo) -> Result<ProcessInfo> {
    let details = match info.exec {
        None => None,
        Some(exec) => {
            let details = ProcessDetails { exec_id: exec.to_string(), ..Default::default() };
            Some(events::pack("containerd.runc.v1", &details).map_err(Error::failed("encode a process's details"))?)
        }
    };
    Ok(ProcessInfo { pid: info.pid, info: details.into(), ..Default::default() })
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, context: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let exec = exec(&request.exec_id).ttrpc()?;
        let work = |container: ContainerHandle| async move { container.status(exec).await };
        let found = self.on("Task.State", context, &request.id, work).await.ttrpc()?;
        let state = found.process.state;
        let stdio = found.process.stdio;
        let exit = state.exit();
        Ok(StateResponse {
            // As with runc's shim, `id` is the process's.
            id: if request.exec_id.is_empty() { request.id } else { request.exec_id.clone() },
            bundle: found.bundle.display().to_string(),
            pid: state.pid(),
            status: status(state).into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            exec_id: request.exec_id,
            ..Default::default()
        })
    }

    async fn create(&self, context: &TtrpcContext, request: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        let namespace = namespace(context).ttrpc()?;
        let id: ContainerId = request.id.parse().ttrpc()?;
        let (registry, named) = (self.registry.clone(), (namespace, id));
        let (namespace, id) = named.clone();
        self.attach(named.clone());
        let (comparison, calls) = (self.comparison.clone(), self.calls.clone());
        let work = async move {
            let (sandbox, spec) = bundle::read(id.clone(), request)?;
            let sandbox = registry.sandbox(&namespace, &sandbox)?;
            comparison.before_create(&registry, &calls, &sandbox).await?;
            let pid = sandbox.create_container(spec).await?;
            Ok((pid, registry.container(&namespace, &id)?))
        };
        let created = self.calls.run("Task.Create", named.1.clone(), work).await;
        let created = or_earlier(created, context, async |error| match error {
            Error::AlreadyExists { .. } => {
                let container = self.registry.container(&named.0, &named.1).ok()?;
                Some((container.status(None).await.ok()?.process.state.pid(), container))
            }
            _ => None,
        });
        let (pid, container) = created.await.ttrpc()?;
        self.close_after(container);
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, context: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let exec = exec(&request.exec_id).ttrpc()?;
        let subject = exec.clone();
        let work = |container: ContainerHandle| async move { container.start(subject).await };
        let started = self.on("Task.Start", context, &request.id, work).await;
        let started = or_earlier(started, context, async |_| match self.last_state(context, &request.id, exec).await? {
            ProcessState::Created { .. } => None,
            state => Some(state.pid()),
        });
        let pid = started.await.ttrpc()?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, context: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let exec = exec(&request.exec_id).ttrpc()?;
        let subject = exec.clone();
        let work = |container: ContainerHandle| async move { Ok(container.delete(subject).await?.state) };
        let deleted = self.on("Task.Delete", context, &request.id, work).await;
        let deleted = or_earlier(deleted, context, async |error| match error {
            Error::NotFound { .. } => self.deleted(context, &request.id, exec.as_ref()),
            _ => None,
        });
        let state = deleted.await.ttrpc()?;
        let exit = state.exit();
        Ok(DeleteResponse {
            pid: state.pid(),
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, context: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let work = |container: ContainerHandle| async move { container.pids().await };
        let found = self.on("Task.Pids", context, &request.id, work).await.ttrpc()?;
        let processes = found.into_iter().map(process).collect::<Result<_>>().ttrpc()?;
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, context: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let work = |container: ContainerHandle| async move { container.pause().await };
        let paused = self.on("Task.Pause", context, &request.id, work).await;
        let is_paused = |state: &ProcessState| matches!(state, ProcessState::Paused { .. });
        let paused = or_earlier(paused, context, async |_| {
            self.last_state(context, &request.id, None).await.filter(is_paused).map(drop)
        });
        paused.await.ttrpc()?;
        Ok(Empty::default())
    }

    async fn resume(&self, context: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let work = |container: ContainerHandle| async move { container.resume().await };
        let resumed = self.on("Task.Resume", context, &request.id, work).await;
        let runs = |state: &ProcessState| matches!(state, ProcessState::Running { .. });
        let resumed =
            or_earlier(resumed, context, async |_| self.last_state(context, &request.id, None).await.filter(runs).map(drop));
        resumed.await.ttrpc()?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, context: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.container(context, &request.id).ttrpc()?;
        Err(bundle::no_checkpoints()).ttrpc()
    }

    async fn kill(&self, context: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let exec = exec(&request.exec_id).ttrpc()?;
        let signal = signal(request.signal).ttrpc()?;
        let work = move |container: ContainerHandle| async move { container.kill(exec, signal, request.all).await };
        let killed = self.on("Task.Kill", context, &request.id, work).await;
        let killed = or_earlier(killed, context, async |error| {
            matches!(error, Error::Finished { .. } | Error::NotFound { .. }).then_some(())
        });
        killed.await.ttrpc()?;
        Ok(Empty::default())
    }

    async fn exec(&self, context: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let id = request.exec_id.parse().ttrpc()?;
        let process = document("exec spec", request.spec.as_ref()).ttrpc()?;
        let stdio = stdio(request.stdin, request.stdout, request.stderr, request.terminal);
        let spec = ExecSpec { id, process, stdio };
        let work = |container: ContainerHandle| async move { container.exec(spec).await };
        let added = self.on("Task.Exec", context, &request.id, work).await;
        let added = or_earlier(added, context, async |error| matches!(error, Error::AlreadyExists { .. }).then_some(()));
        added.await.ttrpc()?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, context: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let exec = exec(&request.exec_id).ttrpc()?;
        let size = size(request.width, request.height).ttrpc()?;
        let work = move |container: ContainerHandle| async move { container.resize(exec, size).await };
        self.on("Task.ResizePty", context, &request.id, work).await.ttrpc()?;
        Ok(Empty::default())
    }

    async fn close_io(&self, context: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let exec = exec(&request.exec_id).ttrpc()?;
        let work = move |container: ContainerHandle| async move {
            if request.stdin { container.close_stdin(exec).await } else { Ok(()) }
        };
        self.on("Task.CloseIO", context, &request.id, work).await.ttrpc()?;
        Ok(Empty::default())
    }

    async fn update(&self, context: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = document("resources", request.resources.as_ref()).ttrpc()?;
        let work = |container: ContainerHandle| async move { container.update(resources).await };
        self.on("Task.Update", context, &request.id, work).await.ttrpc()?;
        Ok(Empty::default())
    }

    async fn wait(&self, context: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exec = exec(&request.exec_id).ttrpc()?;
        let wait = async { self.container(context, &request.id)?.wait(exec.clone()).await };
        let exit = self.calls.wait("Task.Wait", &request.id, wait).await;
        let exit = or_earlier(exit, context, async |error| match error {
            Error::NotFound { .. } => self.deleted(context, &request.id, exec.as_ref())?.exit(),
            _ => None,
        });
        let exit = exit.await.ttrpc()?;
        Ok(WaitResponse { exit_status: exit.status, exited_at: MessageField::some(exit.at.into()), ..Default::default() })
    }

    async fn stats(&self, context: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let work = |container: ContainerHandle| async move { container.stats().await };
        let stats = self.on("Task.Stats", context, &request.id, work).await.ttrpc()?;
        Ok(StatsResponse { stats: MessageField::some(metrics::ttrpc(&stats).ttrpc()?), ..Default::default() })
    }

    async fn connect(&self, context: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let work = |container: ContainerHandle| async move { container.status(None).await };
        let found = self.on("Task.Connect", context, &request.id, work).await.ttrpc()?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: found.process.state.pid(),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::default())
    }
}

/// Linux has signals 1 to 64; 0 only asks whether the process is there.
fn signal(number: u32) -> Result<i32> {
    i32::try_from(number)
        .ok()
        .filter(|number| (0..=64).contains(number))
        .ok_or_else(|| Error::invalid("signal", format!("{number} is not one; they go from 0 to 64")))
}

fn size(width: u32, height: u32) -> Result<WindowSize> {
    match (width.try_into(), height.try_into()) {
        (Ok(width), Ok(height)) => Ok(WindowSize { width, height }),
        _ => Err(Error::invalid("terminal size", format!("{width} x {height} is beyond {0} x {0}", u16::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;

    use super::*;

    #[test]
    fn values_out_of_range_are_refused() {
        assert_eq!(signal(0).unwrap(), 0);
        assert_eq!(signal(64).unwrap(), 64);
        for number in [65, u32::MAX] {
            assert_eq!(signal(number).unwrap_err().code(), Code::InvalidArgument);
        }
        assert_eq!(size(80, 24).unwrap(), WindowSize { width: 80, height: 24 });
        assert_eq!(size(65536, 1).unwrap_err().code(), Code::InvalidArgument);
    }

    #[test]
    fn documents_must_be_json_objects() {
        let any = |json: &str| Any { value: json.into(), ..Default::default() };
        assert_eq!(document("spec", Some(&any(r#"{"args":["a"]}"#))).unwrap()["args"][0], "a");
        for bad in [None, Some(&any("")), Some(&any("[]")), Some(&any("{"))] {
            assert_eq!(document("spec", bad).unwrap_err().code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn an_exec_is_told_apart_by_its_details() {
        let info = kuasar_sandboxers::types::ProcessInfo { pid: 3, exec: Some("e1".parse().unwrap()) };
        let got = process(info).unwrap();
        assert_eq!(got.info.type_url, "containerd.runc.v1.ProcessDetails");
        let info = kuasar_sandboxers::types::ProcessInfo { pid: 3, exec: None };
        assert!(process(info).unwrap().info.is_none());
    }
}
