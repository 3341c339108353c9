//! The calls of `agent.proto`.

use std::{fs, sync::Arc, time::Duration};

use async_trait::async_trait;
use kuasar_guest_protocol::{
    VERSION,
    agent::{
        ContainerRequest, CreateContainerRequest, DiagnoseResponse, Empty, EventsRequest, EventsResponse, ExecRequest,
        HelloRequest, HelloResponse, OnlineRequest, OnlineResponse, Pid, PidsResponse, ProcessRequest, ResizeRequest,
        SetTimeRequest, SetUpRequest, ShutDownRequest, SignalRequest, StateResponse, StatsResponse, UpdateRequest,
        WaitResponse, pids_response::Process,
    },
    agent_ttrpc::Agent,
};
use kuasar_sandboxers::{Error, Result, types::WindowSize};
use tracing::{error, info, warn};
use ttrpc::r#async::TtrpcContext;

use crate::{
    guest::{Contained, Guest},
    machine,
    status::status,
};

/// How long filesystems may take to be written at the end.
const LAST_SYNC: Duration = Duration::from_secs(5);

/// The host's calls. Each runs to its end, whatever becomes of the connection.
pub(crate) struct Service(Guest);

type Context = TtrpcContext;

impl Service {
    pub(crate) fn new(guest: Guest) -> Self {
        Self(guest)
    }

    /// Has the call done in a task of its own: the server drops a call when its connection is lost.
    async fn run<F, T>(&self, work: impl FnOnce(Guest) -> F) -> ttrpc::Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send + 'static,
    {
        let done = tokio::spawn(work(self.0.clone())).await;
        done.unwrap_or_else(|failed| Err(Error::failed("answer")(failed))).map_err(|error| status(&error))
    }

    fn container(&self, id: &str) -> ttrpc::Result<Arc<Contained>> {
        self.0.container(id).map_err(|error| status(&error))
    }
}

fn pid(pid: u32) -> Pid {
    Pid { pid, ..Default::default() }
}

fn empty(_: ()) -> Empty {
    Empty::default()
}

fn json(what: &'static str, bytes: &[u8]) -> Result<serde_json::Value> {
    serde_json::from_slice(bytes).map_err(|error| Error::invalid(what, format!("it is not JSON: {error}")))
}

fn line(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &Context, request: HelloRequest) -> ttrpc::Result<HelloResponse> {
        if request.version != VERSION {
            warn!(host = request.version, ours = VERSION, "the host speaks another version of the protocol");
        }
        // A host that says no time does not want it set.
        if self.0.place().machine && request.time_ns != 0 {
            // The hardware's clock, which the kernel has begun with, tells whole seconds.
            machine::set_time(request.time_ns, self.0.pod().is_none()).map_err(|error| status(&error))?;
        }
        let runtime = self.0.runtime();
        Ok(HelloResponse {
            version: VERSION,
            agent: env!("CARGO_PKG_VERSION").into(),
            kernel: line("/proc/sys/kernel/osrelease"),
            runtime: runtime.to_string(),
            features: runtime.features().map(|features| features.to_string().into_bytes()).unwrap_or_default(),
            set_up: self.0.pod().is_some(),
            boot_id: line("/proc/sys/kernel/random/boot_id"),
            ready_us: self.0.ready_us(),
            ..Default::default()
        })
    }

    async fn set_up(&self, _: &Context, request: SetUpRequest) -> ttrpc::Result<Empty> {
        self.run(|guest| async move {
            let start = machine::uptime_us();
            guest.set_up(&request).await?;
            info!(sandbox_id = request.sandbox, took_us = machine::uptime_us() - start, "set up");
            Ok(Empty::default())
        })
        .await
    }

    async fn create_container(&self, _: &Context, request: CreateContainerRequest) -> ttrpc::Result<Pid> {
        self.run(|guest| async move { guest.create_container(&request).await.map(pid) }).await
    }

    async fn start_container(&self, _: &Context, request: ContainerRequest) -> ttrpc::Result<Pid> {
        self.run(|guest| async move { guest.start_container(&request.container).await.map(pid) }).await
    }

    async fn exec(&self, _: &Context, request: ExecRequest) -> ttrpc::Result<Pid> {
        self.run(|guest| async move { guest.exec(&request).await.map(pid) }).await
    }

    async fn state(&self, _: &Context, request: ProcessRequest) -> ttrpc::Result<StateResponse> {
        self.run(|guest| async move {
            let ProcessRequest { container, exec, .. } = request;
            guest.settled(&container, &exec).await?;
            guest.with(&container, &exec, async |process| process.state()).await
        })
        .await
    }

    async fn signal(&self, _: &Context, request: SignalRequest) -> ttrpc::Result<Empty> {
        self.run(|guest| async move {
            let number = i32::try_from(request.signal)
                .map_err(|_| Error::invalid("signal", format!("{} is no signal", request.signal)))?;
            let SignalRequest { container, exec, all, .. } = request;
            guest.with(&container, &exec, async |process| process.process.kill(number, all).await).await?.map(empty)
        })
        .await
    }

    /// May take as long as the process lives, so it ends with its connection.
    async fn wait(&self, _: &Context, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let ProcessRequest { container, exec, .. } = request;
        let ended = self.0.with(&container, &exec, async |process| process.wait().await).await;
        let mut ended = ended.map_err(|error| status(&error))?;
        if exec.is_empty() {
            ended.oom_kills = self.0.events().kills(&container);
        }
        Ok(ended)
    }

    async fn resize(&self, _: &Context, request: ResizeRequest) -> ttrpc::Result<Empty> {
        self.run(|guest| async move {
            let side = |value: u32| {
                u16::try_from(value).map_err(|_| Error::invalid("terminal size", format!("{value} is more than {}", u16::MAX)))
            };
            let size = WindowSize { width: side(request.width)?, height: side(request.height)? };
            let ResizeRequest { container, exec, .. } = request;
            guest.with(&container, &exec, async |process| process.process.resize(size).await).await?.map(empty)
        })
        .await
    }

    async fn close_stdin(&self, _: &Context, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.run(|guest| async move {
            let ProcessRequest { container, exec, .. } = request;
            guest.with(&container, &exec, async |process| process.close_stdin().await).await?.map(empty)
        })
        .await
    }

    async fn end_output(&self, _: &Context, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.run(|guest| async move {
            let ProcessRequest { container, exec, .. } = request;
            guest.with(&container, &exec, async |process| process.end_output()).await.map(empty)
        })
        .await
    }

    async fn delete(&self, _: &Context, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.run(|guest| async move { guest.delete(&request.container, &request.exec).await.map(empty) }).await
    }

    async fn pids(&self, _: &Context, request: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.container(&request.container)?;
        self.run(|_| async move {
            let known = container.container.pids().await?;
            let process = |known: kuasar_sandboxers::types::ProcessInfo| Process {
                pid: known.pid,
                exec: known.exec.map(String::from).unwrap_or_default(),
                ..Default::default()
            };
            Ok(PidsResponse { processes: known.into_iter().map(process).collect(), ..Default::default() })
        })
        .await
    }

    async fn stats(&self, _: &Context, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        self.run(|guest| async move {
            let stats = if request.container.is_empty() {
                guest.stats()?
            } else {
                guest.container(&request.container)?.container.stats().await?
            };
            let stats = serde_json::to_vec(&stats).map_err(Error::failed("write down resource use"))?;
            Ok(StatsResponse { stats, ..Default::default() })
        })
        .await
    }

    async fn update(&self, _: &Context, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container)?;
        self.run(|_| async move { container.container.update(json("resources", &request.resources)?).await.map(empty) }).await
    }

    async fn pause(&self, _: &Context, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container)?;
        self.run(|_| async move { container.container.pause().await.map(empty) }).await
    }

    async fn resume(&self, _: &Context, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.container)?;
        self.run(|_| async move { container.container.resume().await.map(empty) }).await
    }

    async fn events(&self, _: &Context, request: EventsRequest) -> ttrpc::Result<EventsResponse> {
        Ok(self.0.events().after(request.after).await)
    }

    async fn set_time(&self, _: &Context, request: SetTimeRequest) -> ttrpc::Result<Empty> {
        if !self.0.place().machine {
            return Ok(Empty::default());
        }
        machine::set_time(request.time_ns, false).map(empty).map_err(|error| status(&error))
    }

    async fn online(&self, _: &Context, request: OnlineRequest) -> ttrpc::Result<OnlineResponse> {
        // Much memory takes a while.
        let runtime = tokio::runtime::Handle::current();
        let work = move || runtime.block_on(machine::online(request.cpus, request.memory_bytes));
        self.run(|guest| async move {
            let used = tokio::task::spawn_blocking(work).await.map_err(Error::failed("use what was added"))??;
            guest.limit_pod(request.pod_memory_bytes)?;
            Ok(used)
        })
        .await
    }

    async fn diagnose(&self, _: &Context, _: Empty) -> ttrpc::Result<DiagnoseResponse> {
        self.run(|_| async move {
            tokio::task::spawn_blocking(machine::diagnose).await.map_err(Error::failed("look at the machine"))
        })
        .await
    }

    async fn shut_down(&self, _: &Context, request: ShutDownRequest) -> ttrpc::Result<Empty> {
        self.run(|guest| async move {
            if let Err(error) = guest.stop(Duration::from_millis(request.grace_ms.into())).await {
                error!(error = error.report(), "not every container has ended");
            }
            if guest.place().machine {
                // A filesystem that hangs must not keep the machine.
                let written = tokio::task::spawn_blocking(nix::unistd::sync);
                if tokio::time::timeout(LAST_SYNC, written).await.is_err() {
                    error!("not everything was written within {} s", LAST_SYNC.as_secs());
                }
                info!("switching off");
                machine::power_off();
            }
            Ok(Empty::default())
        })
        .await
    }
}
