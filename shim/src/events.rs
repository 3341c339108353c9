//! Events for containerd: task events, in order, over containerd's ttrpc events service.
//!
//! containerd may be away (its restart is routine), so events wait: each sandbox keeps its own, and hands a few at a time to the
//! publisher, which therefore needs no bound. An event is sent again when its answer was lost, be it by our own death, so containerd may
//! see one twice; its consumers allow for that. Exits do not depend on events (containerd waits for those with Task.Wait), OOM kills do.

use std::{
    collections::VecDeque,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::{
    api::{ForwardRequest, Mount},
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskPaused, TaskResumed, TaskStart,
    },
    shim::event::Envelope,
    shim_async::EventsClient,
    topics,
};
use kuasar_sandboxers::{
    event::{Event, EventKind, Sent},
    failpoint::{self, Failpoint},
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use tokio::{net::UnixStream, select, sync::mpsc::UnboundedReceiver, time};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use ttrpc::{r#async::Client, asynchronous::transport::Socket, context};

/// The package of containerd's events.
const PACKAGE: &str = "containerd.events";
/// How long containerd may take to answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Pauses between attempts to reach containerd: the first, doubled each time, up to the last.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Where containerd takes events: its gRPC socket's path with `.ttrpc` added.
#[must_use]
pub fn address(containerd: &Path) -> PathBuf {
    let mut address = containerd.as_os_str().to_owned();
    address.push(".ttrpc");
    address.into()
}

/// Publishes events until told to stop and all that can be sent is sent, or until nobody can send any more.
pub async fn publish(address: PathBuf, mut events: UnboundedReceiver<Sent>, stop: CancellationToken) {
    let mut publisher = Publisher { address, client: None, waiting: VecDeque::new(), pause: PAUSE.0 };
    loop {
        // What has come before a stop is sent, too.
        while let Ok(event) = events.try_recv() {
            publisher.add(event);
        }
        if publisher.waiting.is_empty() {
            select! {
                event = events.recv() => match event {
                    Some(event) => publisher.add(event),
                    None => return,
                },
                () = stop.cancelled() => return,
            }
        } else if let Err(error) = publisher.send_first().await {
            if publisher.pause == PAUSE.0 {
                debug!(%error, "cannot reach containerd with an event; trying again");
            }
            if stop.is_cancelled() {
                info!(waiting = publisher.waiting.len(), %error, "containerd is away: its events are left to the next daemon");
                return;
            }
            publisher.client = None;
            select! {
                () = time::sleep(publisher.pause) => {}
                () = stop.cancelled() => {}
            }
            publisher.pause = (publisher.pause * 2).min(PAUSE.1);
        }
    }
}

struct Publisher {
    address: PathBuf,
    client: Option<EventsClient>,
    waiting: VecDeque<(Envelope, Sent)>,
    pause: Duration,
}

impl Publisher {
    fn add(&mut self, sent: Sent) {
        let envelope = match envelope(&sent.event) {
            Ok(Some(envelope)) => envelope,
            Ok(None) => return sent.delivered(),
            Err(error) => {
                warn!(%error, container = %sent.event.container, "cannot encode an event");
                return sent.delivered();
            }
        };
        self.waiting.push_back((envelope, sent));
    }

    /// The first that waits is dealt with.
    fn pop(&mut self) {
        if let Some((_, sent)) = self.waiting.pop_front() {
            sent.delivered();
        }
    }

    /// Sends the first that waits. An error means that containerd could not be reached.
    async fn send_first(&mut self) -> io::Result<()> {
        let Some((envelope, _)) = self.waiting.front() else { return Ok(()) };
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(envelope.clone()), ..Default::default() };
        let client = match &self.client {
            Some(client) => client,
            None => self.client.insert(dial(&self.address).await?),
        };
        match client.forward(context::with_duration(ANSWER), &request).await {
            Ok(_) => {}
            // containerd has read it and does not want it: the next one.
            Err(ttrpc::Error::RpcStatus(status)) if status.code() != ttrpc::Code::DEADLINE_EXCEEDED => {
                warn!(topic, refusal = status.message(), "containerd refused an event");
            }
            Err(error) => return Err(io::Error::other(error)),
        }
        failpoint::reach(Failpoint::Published);
        self.pop();
        self.pause = PAUSE.0;
        Ok(())
    }
}

async fn dial(address: &Path) -> io::Result<EventsClient> {
    let stream = UnixStream::connect(address).await?;
    Ok(EventsClient::new(Client::new(Socket::new(stream))))
}

/// The event in containerd's form; `None` for one it has no form for.
fn envelope(event: &Event) -> protobuf::Result<Option<Envelope>> {
    let Some((topic, any)) = message(event)? else { return Ok(None) };
    Ok(Some(Envelope {
        timestamp: MessageField::some(event.at.into()),
        namespace: event.namespace.to_string(),
        topic: topic.into(),
        event: MessageField::some(any),
        ..Default::default()
    }))
}

fn message(event: &Event) -> protobuf::Result<Option<(&'static str, Any)>> {
    let container_id = event.container.to_string();
    Ok(Some(match &event.kind {
        EventKind::Created { bundle, rootfs, stdio, pid } => {
            let io = TaskIO {
                stdin: stdio.stdin.clone(),
                stdout: stdio.stdout.clone(),
                stderr: stdio.stderr.clone(),
                terminal: stdio.terminal,
                ..Default::default()
            };
            let mount = |mount: &kuasar_sandboxers::types::Mount| Mount {
                type_: mount.kind.clone(),
                source: mount.source.clone(),
                target: mount.target.clone(),
                options: mount.options.clone(),
                ..Default::default()
            };
            let create = TaskCreate {
                container_id,
                bundle: bundle.display().to_string(),
                rootfs: rootfs.iter().map(mount).collect(),
                io: MessageField::some(io),
                pid: *pid,
                ..Default::default()
            };
            (topics::TASK_CREATE_EVENT_TOPIC, pack(PACKAGE, &create)?)
        }
        EventKind::Started { pid } => {
            (topics::TASK_START_EVENT_TOPIC, pack(PACKAGE, &TaskStart { container_id, pid: *pid, ..Default::default() })?)
        }
        EventKind::ExecAdded { exec } => {
            let added = TaskExecAdded { container_id, exec_id: exec.to_string(), ..Default::default() };
            (topics::TASK_EXEC_ADDED_EVENT_TOPIC, pack(PACKAGE, &added)?)
        }
        EventKind::ExecStarted { exec, pid } => {
            let started = TaskExecStarted { container_id, exec_id: exec.to_string(), pid: *pid, ..Default::default() };
            (topics::TASK_EXEC_STARTED_EVENT_TOPIC, pack(PACKAGE, &started)?)
        }
        EventKind::Exited { exec, pid, exit } => {
            let exited = TaskExit {
                // The first process goes by its container's id.
                id: exec.as_ref().map_or_else(|| container_id.clone(), ToString::to_string),
                container_id,
                pid: *pid,
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at.into()),
                ..Default::default()
            };
            (topics::TASK_EXIT_EVENT_TOPIC, pack(PACKAGE, &exited)?)
        }
        // As with runc's shim, the deletion of an exec is not told: containerd would take it for the task's.
        EventKind::Deleted { exec: Some(_), .. } => return Ok(None),
        EventKind::Deleted { exec: None, pid, exit } => {
            let deleted = TaskDelete {
                container_id,
                pid: *pid,
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at.into()),
                ..Default::default()
            };
            (topics::TASK_DELETE_EVENT_TOPIC, pack(PACKAGE, &deleted)?)
        }
        EventKind::Paused => {
            (topics::TASK_PAUSED_EVENT_TOPIC, pack(PACKAGE, &TaskPaused { container_id, ..Default::default() })?)
        }
        EventKind::Resumed => {
            (topics::TASK_RESUMED_EVENT_TOPIC, pack(PACKAGE, &TaskResumed { container_id, ..Default::default() })?)
        }
        EventKind::OutOfMemory => {
            (topics::TASK_OOM_EVENT_TOPIC, pack(PACKAGE, &TaskOOM { container_id, ..Default::default() })?)
        }
    }))
}

/// Packs a message of a package as Go's `typeurl` does: the bare name of the type, without a host before it. The package is
/// given, because the library finds it out only by decoding whole descriptors, which it then keeps.
pub(crate) fn pack(package: &str, message: &impl Message) -> protobuf::Result<Any> {
    fn name<M: Message>(_: &M) -> &'static str {
        M::NAME
    }
    let type_url = format!("{package}.{}", name(message));
    Ok(Any { type_url, value: message.write_to_bytes()?, ..Default::default() })
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Arc, Mutex},
        time::SystemTime,
    };

    use async_trait::async_trait;
    use containerd_shim_protos::{
        api::Empty,
        shim_async::{Events, create_events},
    };
    use kuasar_sandboxers::{event::EventSink, types::Exit};
    use tokio::{net::UnixListener, sync::Notify};
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    /// containerd's end, which breaks off its first answers.
    #[derive(Default)]
    struct Containerd {
        seen: Mutex<Vec<Envelope>>,
        changed: Notify,
    }

    struct Face(Arc<Containerd>);

    #[async_trait]
    impl Events for Face {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.unwrap();
            let refuse = envelope.topic == topics::TASK_PAUSED_EVENT_TOPIC;
            self.0.seen.lock().unwrap().push(envelope);
            self.0.changed.notify_waiters();
            if refuse {
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "no")));
            }
            Ok(Empty::default())
        }
    }

    impl Containerd {
        async fn serve(self: &Arc<Self>, path: &Path) -> Server {
            let listener = UnixListener::bind(path).unwrap();
            let mut server =
                Server::new().add_listener(listener.into()).register_service(create_events(Arc::new(Face(self.clone()))));
            server.start().await.unwrap();
            server
        }

        async fn seen(&self, count: usize) -> Vec<Envelope> {
            let wait = async {
                loop {
                    let changed = self.changed.notified();
                    if self.seen.lock().unwrap().len() >= count {
                        return self.seen.lock().unwrap().clone();
                    }
                    changed.await;
                }
            };
            time::timeout(Duration::from_secs(20), wait).await.expect("events within 20 s")
        }
    }

    fn event(container: &str, kind: EventKind) -> Event {
        Event { namespace: "k8s.io".parse().unwrap(), container: container.parse().unwrap(), at: SystemTime::UNIX_EPOCH, kind }
    }

    fn unpack<M: protobuf::MessageFull>(envelope: &Envelope) -> M {
        assert_eq!(envelope.event.type_url, M::descriptor().full_name());
        M::parse_from_bytes(&envelope.event.value).unwrap()
    }

    #[test]
    fn every_kind_has_gos_name_and_topic() {
        let exit = Exit { status: 137, at: SystemTime::UNIX_EPOCH + Duration::from_secs(9) };
        let exec = || "e1".parse().unwrap();
        let stdio = kuasar_sandboxers::stdio::Stdio { stdout: "/fifo".into(), terminal: true, ..Default::default() };
        let created = EventKind::Created { bundle: "/b".into(), rootfs: vec![], stdio, pid: 4 };
        let kinds = [
            (created, "/tasks/create", "containerd.events.TaskCreate"),
            (EventKind::Started { pid: 4 }, "/tasks/start", "containerd.events.TaskStart"),
            (EventKind::ExecAdded { exec: exec() }, "/tasks/exec-added", "containerd.events.TaskExecAdded"),
            (EventKind::ExecStarted { exec: exec(), pid: 5 }, "/tasks/exec-started", "containerd.events.TaskExecStarted"),
            (EventKind::Exited { exec: None, pid: 4, exit }, "/tasks/exit", "containerd.events.TaskExit"),
            (EventKind::Deleted { exec: None, pid: 4, exit }, "/tasks/delete", "containerd.events.TaskDelete"),
            (EventKind::Paused, "/tasks/paused", "containerd.events.TaskPaused"),
            (EventKind::Resumed, "/tasks/resumed", "containerd.events.TaskResumed"),
            (EventKind::OutOfMemory, "/tasks/oom", "containerd.events.TaskOOM"),
        ];
        for (kind, topic, name) in kinds {
            let envelope = envelope(&event("c1", kind)).unwrap().unwrap();
            assert_eq!((envelope.topic.as_str(), envelope.namespace.as_str()), (topic, "k8s.io"));
            assert_eq!(envelope.event.type_url, name);
        }
        let deleted = EventKind::Deleted { exec: Some(exec()), pid: 5, exit };
        assert!(envelope(&event("c1", deleted)).unwrap().is_none());
    }

    #[test]
    fn an_exit_names_its_process() {
        let exit = Exit { status: 3, at: SystemTime::UNIX_EPOCH + Duration::from_secs(9) };
        let first: TaskExit = unpack(&envelope(&event("c1", EventKind::Exited { exec: None, pid: 4, exit })).unwrap().unwrap());
        assert_eq!((first.container_id.as_str(), first.id.as_str(), first.exit_status), ("c1", "c1", 3));
        assert_eq!(first.exited_at.seconds, 9);
        let exec = Some("e1".parse().unwrap());
        let exec: TaskExit = unpack(&envelope(&event("c1", EventKind::Exited { exec, pid: 5, exit })).unwrap().unwrap());
        assert_eq!((exec.container_id.as_str(), exec.id.as_str()), ("c1", "e1"));
    }

    #[tokio::test]
    async fn events_survive_containerds_restart_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd.sock.ttrpc");
        let (sink, events) = EventSink::channel();
        let stop = CancellationToken::new();
        let publisher = tokio::spawn(publish(path.clone(), events, stop.clone()));
        let send = |pid| sink.send(event("c1", EventKind::Started { pid }), || {});

        // Nobody there yet.
        send(1);
        sink.send(event("c1", EventKind::Paused), || {});
        send(2);
        let containerd = Arc::new(Containerd::default());
        let mut server = containerd.serve(&path).await;
        assert_eq!(containerd.seen(3).await.len(), 3);

        // Restart.
        server.shutdown().await.unwrap();
        drop(server);
        std::fs::remove_file(&path).unwrap();
        (3..20).for_each(send);
        let _server = containerd.serve(&path).await;
        let seen = containerd.seen(20).await;
        let pids: Vec<u32> =
            seen.iter().filter(|e| e.topic == topics::TASK_START_EVENT_TOPIC).map(|e| unpack::<TaskStart>(e).pid).collect();
        assert_eq!(pids, (1..20).collect::<Vec<_>>());

        // What has come before the stop is still sent.
        send(20);
        stop.cancel();
        publisher.await.unwrap();
        assert_eq!(containerd.seen(21).await.len(), 21);
    }

    #[test]
    fn the_address_is_beside_containerds_socket() {
        assert_eq!(address(Path::new("/run/containerd/containerd.sock")), Path::new("/run/containerd/containerd.sock.ttrpc"));
    }
}
