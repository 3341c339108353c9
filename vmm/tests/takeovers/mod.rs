//! What the next daemon makes of guests whose daemon was killed.

use std::{fs, os::fd::AsFd, path::Path, sync::Arc};

use kuasar_sandboxers::{
    Error, Process, Sandboxer,
    cgroup::Cgroup,
    stdio::Stdio,
    types::{ContainerHead, ExecSpec},
};
use tokio::time::timeout;

use crate::{
    Node, SOON, exec,
    guests::{Ill, Output, until},
    patiently, sandboxer,
};

/// What a daemon does that is killed after it.
async fn cut_off<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let daemon = move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let done = runtime.block_on(work);
        runtime.shutdown_background();
        done
    };
    tokio::task::spawn_blocking(daemon).await.unwrap()
}

/// A daemon that is killed in the middle of a start, and the one after it: which ends what it finds half made, and can start it again.
#[tokio::test]
async fn a_start_that_was_cut_off_is_cleared_and_can_be_repeated() {
    let Some(node) = Node::new("a_start_that_was_cut_off_is_cleared_and_can_be_repeated").await else { return };
    let helper = |root: &Path| fs::read_dir(root.join(".machines/0")).map_or(0, Iterator::count) > 0;
    let context = node.context();
    let spec = Arc::new(node.spec());
    node.ways.ill("Hello", Ill::Silence);
    let (root, dir, ways) = (node.root(), node.dir.path().to_owned(), node.ways.clone());
    let (first, saved) = (spec.clone(), context.clone());
    let record = cut_off(async move {
        let sandbox = sandboxer(&dir, &ways).await.create(first, saved).await.unwrap();
        let record = sandbox.record();
        tokio::spawn(async move { sandbox.start().await });
        until("the guest to be there", || root.join(".machines/0/vsock").exists() && helper(&root)).await;
        record
    })
    .await;
    let group = format!("kuasar-vm-{}", node.name);
    let processes = || Cgroup::named(&group).unwrap().iter().map(|group| group.processes().unwrap().len()).sum::<usize>();
    assert!(processes() > 0 && node.netns.contents().await != node.untouched);

    let second = sandboxer(node.dir.path(), &node.ways).await;
    let sandbox = second.recover(spec, context, record).await.unwrap();
    assert_eq!((processes(), node.root().join(".machines/0").exists()), (0, false));
    node.ways.well("Hello");
    timeout(SOON, sandbox.start()).await.unwrap().unwrap();
    assert!(processes() > 0);
    timeout(SOON, sandbox.delete()).await.unwrap().unwrap();
    node.assert_nothing_is_left().await;
}

/// A guest that does not answer the daemon that takes over may only be slow. What the daemon before has started, and not saved that, is
/// started again by who waits for it, and goes on.
#[tokio::test]
async fn what_a_silent_guest_has_started_is_not_forgotten() {
    let Some(node) = Node::new("what_a_silent_guest_has_started_is_not_forgotten").await else { return };
    node.ways.outlive(tokio::runtime::Handle::current());
    node.ways.output(Output::Bytes(5), 5);
    let log = node.dir.path().join("log");
    let stdio = Stdio { stdout: format!("file://{}", log.display()), ..Stdio::default() };
    let (spec, dir, ways, context) = (Arc::new(node.spec()), node.dir.path().to_owned(), node.ways.clone(), node.context());
    let (wanted, first) = (node.container_spec(Stdio::default()), spec.clone());
    let head = ContainerHead { id: wanted.id.clone(), bundle: wanted.bundle.clone(), stdio: wanted.stdio.clone() };
    let ((id, added), printed) = (exec("e"), log.clone());
    let added = ExecSpec { stdio: stdio.clone(), ..added };
    let (pod, container, exec) = cut_off(async move {
        let sandbox = sandboxer(&dir, &ways).await.create(first, context).await.unwrap();
        sandbox.start().await.unwrap();
        let container = sandbox.create_container(wanted).await.unwrap();
        let exec = container.exec(added).await.unwrap();
        let records = (sandbox.record(), container.record(), exec.record());
        container.start().await.unwrap();
        exec.start().await.unwrap();
        until("output and errors", || fs::metadata(&printed).is_ok_and(|log| log.len() == 10)).await;
        // A daemon that is killed lets go of nothing.
        std::mem::forget((sandbox, container, exec));
        records
    })
    .await;

    node.ways.ill("State", Ill::Silence);
    let second = sandboxer(node.dir.path(), &node.ways).await;
    let sandbox = second.recover(spec, node.context(), pod).await.unwrap();
    let (container, exec) = patiently(async {
        let container = sandbox.recover_container(head, container).await.unwrap();
        assert_eq!(container.started().await.unwrap(), None);
        let exec = container.recover_exec(id, stdio, exec).await.unwrap();
        assert_eq!(exec.started().await.unwrap(), None);
        (container, exec)
    })
    .await;
    node.ways.well("State");
    for process in [&*exec, &*container as &dyn Process] {
        // The guest's 7, as a number that no process of the node has.
        assert_eq!(timeout(SOON, process.start()).await.unwrap().unwrap(), (1 << 22) + 7);
        process.kill(libc::SIGTERM, false).await.unwrap();
        assert_eq!(timeout(SOON, process.exited()).await.unwrap().status, 3);
        process.delete().await.unwrap();
    }
    // Over the connections that the first daemon has made: others would have brought it again.
    assert_eq!(fs::read(&log).unwrap(), b"xxxxxxxxxx");
    timeout(SOON, sandbox.delete()).await.unwrap().unwrap();
    node.assert_nothing_is_left().await;
}

/// The machine has ended while no daemon ran: what is parked of its processes' streams would keep containerd waiting for their ends.
#[tokio::test]
async fn streams_of_a_machine_that_ended_unseen_are_closed() {
    let Some(node) = Node::new("streams_of_a_machine_that_ended_unseen_are_closed").await else { return };
    let stdio = Stdio { stdout: format!("file://{}", node.dir.path().join("log").display()), ..Stdio::default() };
    let (spec, dir, ways, context) = (Arc::new(node.spec()), node.dir.path().to_owned(), node.ways.clone(), node.context());
    let (wanted, first) = (node.container_spec(stdio), spec.clone());
    let head = ContainerHead { id: wanted.id.clone(), bundle: wanted.bundle.clone(), stdio: wanted.stdio.clone() };
    let (pod, container) = cut_off(async move {
        let sandbox = sandboxer(&dir, &ways).await.create(first, context).await.unwrap();
        sandbox.start().await.unwrap();
        let container = sandbox.create_container(wanted).await.unwrap();
        let records = (sandbox.record(), container.record());
        // A daemon that is killed lets go of nothing.
        std::mem::forget((sandbox, container));
        records
    })
    .await;
    let parked = || node.holder.names().into_iter().find(|name| name.ends_with("/vm-stdout"));
    // As an earlier version has left it: the log file itself; one that cannot be opened again (ETXTBSY).
    let (earlier, name) = (node.holder.store(), parked().unwrap());
    let (left, held) = earlier.take(&name).unwrap();
    let log = fs::File::open("/proc/self/exe").unwrap();
    std::mem::forget((earlier.leave(name, &[log.as_fd(), left[1].as_fd()]).unwrap(), held));

    let second = sandboxer(node.dir.path(), &node.ways).await;
    let sandbox = second.recover(spec, node.context(), pod).await.unwrap();
    timeout(SOON, sandbox.exited()).await.unwrap();
    let container = sandbox.recover_container(head, container).await.unwrap();
    assert_eq!(timeout(SOON, container.exited()).await.unwrap().status, 137);
    until("the streams to be let go", || parked().is_none()).await;
    container.delete().await.unwrap();
    timeout(SOON, sandbox.delete()).await.unwrap().unwrap();
    node.assert_nothing_is_left().await;
}

/// An exec that the guest runs, of which the daemon that has started it could not tell its client, which has gone meanwhile.
#[tokio::test]
async fn an_exec_without_its_client_is_ended() {
    let Some(node) = Node::new("an_exec_without_its_client_is_ended").await else { return };
    let (spec, context) = (Arc::new(node.spec()), node.context());
    let sandbox = sandboxer(node.dir.path(), &node.ways).await.create(spec, context).await.unwrap();
    sandbox.start().await.unwrap();
    let container = sandbox.create_container(node.container_spec(Stdio::default())).await.unwrap();
    let (id, added) = exec("e");
    let record = container.exec(added).await.unwrap().record();
    let gone = Stdio { stdout: node.dir.path().join("gone").display().to_string(), ..Stdio::default() };
    let recover = || container.recover_exec(id.clone(), gone.clone(), record.clone());

    node.ways.ill("Delete", Ill::Refusal("not yet".into()));
    let error = recover().await.err().unwrap();
    assert!(error.report().contains("not yet"), "{}", error.report());
    node.ways.well("Delete");
    assert!(matches!(recover().await, Err(Error::Invalid { .. })));
    timeout(SOON, sandbox.delete()).await.unwrap().unwrap();
    node.assert_nothing_is_left().await;
}
