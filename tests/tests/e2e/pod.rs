//! The life of pods and containers.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use kuasar_tests::cri::k8s_cri::v1::{
    self, ContainerEventType, ContainerState, GetEventsRequest, ListPodSandboxRequest, PodSandboxFilter, PodSandboxState,
};
use kuasar_tests::{Container, ContainerSpec, Pod, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tonic::Code;

use crate::suite::{Case, Entry, cases, eventually, refused};

pub(crate) fn cases() -> Vec<Entry> {
    cases![Handlers Shared:
        thirty_pods_at_once,
        lifecycle,
        a_removed_pod_takes_running_containers_along,
        several_containers,
        a_container_goes_through_its_states,
        stop_gives_time_and_then_kills,
        a_container_is_started_again_in_the_same_pod,
        a_container_killed_from_outside,
        a_pods_init_killed_from_outside,
        what_does_not_start_says_why,
        a_stopped_pod_takes_no_containers,
        unknown_ids_are_not_found,
        events_tell_the_story,
        the_same_pod_twice,
    ]
}

async fn lifecycle(case: &Case) -> Result<()> {
    let spec = case.spec().label("app", "a").annotation("note", "b");
    let metadata = spec.config.metadata.clone();
    let pod = case.run(spec).await?;

    let status = pod.status().await?.status.unwrap_or_default();
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert!(status.created_at > 0);
    assert_eq!(status.metadata, metadata);
    assert_eq!(status.runtime_handler, case.handler);
    assert_eq!(status.labels, [("app".to_owned(), "a".to_owned())].into());
    assert_eq!(status.annotations["note"], "b");
    assert!(status.network.unwrap_or_default().ip.starts_with("10."));
    let filter = PodSandboxFilter { id: pod.id.clone(), ..Default::default() };
    let request = ListPodSandboxRequest { filter: Some(filter) };
    let listed = case.cri.runtime().list_pod_sandbox(request).await?.into_inner().items;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].state(), listed[0].runtime_handler.as_str()), (PodSandboxState::SandboxReady, case.handler.as_str()));

    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    pod.stop().await?;
    assert_eq!(pod.state().await?, PodSandboxState::SandboxNotready);
    assert_eq!(container.wait_exit().await?.exit_code, 137);
    pod.stop().await?;
    pod.remove().await?;
    assert_eq!(pod.status().await.unwrap_err().code(), Code::NotFound);
    assert_eq!(container.status().await.unwrap_err().code(), Code::NotFound);
    pod.remove().await?;
    pod.stop().await?;
    Ok(())
}

async fn a_removed_pod_takes_running_containers_along(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().shared_pid()).await?;
    let one = pod.run(ContainerSpec::new("one").sleep()).await?;
    pod.run(ContainerSpec::new("two").sh("trap '' TERM; sleep 1000 & wait")).await?;
    pod.create(ContainerSpec::new("three").sleep()).await?;
    pod.remove().await?;
    assert_eq!(one.status().await.unwrap_err().code(), Code::NotFound);
    Ok(())
}

async fn several_containers(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let script = |name: &str| format!("echo {name} >/mine; while :; do nc -l -p 700{0} -e cat /mine; done", name.len());
    let specs = ["a", "bb", "ccc"].map(|name| ContainerSpec::new(name).sh(&script(name)));
    let containers = try_join_all(specs.into_iter().map(|spec| pod.run(spec))).await?;
    // A root file system each, one network for all.
    for (container, (name, next)) in containers.iter().zip([("a", "bb"), ("bb", "ccc"), ("ccc", "a")]) {
        eventually(&format!("{name} to have written"), || async {
            Ok(container.exec(["cat", "/mine"]).await?.stdout() == format!("{name}\n"))
        })
        .await?;
        let ask = format!("nc 127.0.0.1 700{}", next.len());
        eventually(&format!("{next} to answer {name}"), || async {
            Ok(container.sh(&ask).await?.stdout() == format!("{next}\n"))
        })
        .await?;
    }
    for (code, container) in containers.iter().enumerate() {
        // What exits does so alone, with its own code.
        assert_eq!(container.state().await?, ContainerState::ContainerRunning);
        container.stop(0).await?;
        let status = container.status().await?;
        assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 137), "{code}");
    }
    assert_eq!(pod.state().await?, PodSandboxState::SandboxReady);
    Ok(())
}

async fn a_container_goes_through_its_states(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let spec = ContainerSpec::new("c").sh("sleep 0.2; exit 7").label("tier", "x").annotation("why", "y");
    let container = pod.create(spec).await?;
    let created = container.status().await?;
    assert_eq!((created.state(), created.started_at, created.finished_at), (ContainerState::ContainerCreated, 0, 0));
    assert_eq!((created.labels["tier"].as_str(), created.annotations["why"].as_str()), ("x", "y"));
    // Nothing runs yet.
    refused(container.exec(["true"]).await, &[])?;
    container.start().await?;
    let exited = container.wait_exit().await?;
    assert_eq!((exited.exit_code, exited.reason.as_str()), (7, "Error"));
    // containerd notes the start when it hears of it, which for a quicker container may be after its end.
    assert!(exited.created_at <= exited.started_at && exited.started_at <= exited.finished_at, "{exited:?}");
    refused(container.start().await, &["CONTAINER_EXITED"])?;
    refused(container.exec(["true"]).await, &[])?;
    container.stop(0).await?;
    container.remove().await?;
    assert_eq!(container.status().await.unwrap_err().code(), Code::NotFound);
    container.remove().await?;

    let done = pod.run(ContainerSpec::new("done").command(&["true"])).await?.wait_exit().await?;
    assert_eq!((done.exit_code, done.reason.as_str()), (0, "Completed"));
    let running = pod.run(ContainerSpec::new("running").sleep()).await?;
    refused(running.start().await, &["CONTAINER_RUNNING"])?;
    // Removal takes along what runs.
    running.remove().await?;
    assert_eq!(running.status().await.unwrap_err().code(), Code::NotFound);
    Ok(())
}

async fn stop_gives_time_and_then_kills(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let polite = pod.run(ContainerSpec::new("polite").sh("trap 'exit 3' TERM; echo ready; sleep 1000 & wait")).await?;
    polite.wait_log("ready").await?;
    polite.stop(30).await?;
    assert_eq!(polite.status().await?.exit_code, 3);

    let stubborn = pod.run(ContainerSpec::new("stubborn").sh("trap '' TERM; echo ready; while :; do sleep 1; done")).await?;
    stubborn.wait_log("ready").await?;
    let before = std::time::Instant::now();
    stubborn.stop(1).await?;
    ensure!(before.elapsed().as_secs() >= 1, "it was not given its second");
    assert_eq!(stubborn.status().await?.exit_code, 137);
    Ok(())
}

async fn a_container_is_started_again_in_the_same_pod(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().shared_pid()).await?;
    let ip = pod.ip().await?;
    for attempt in 0..3 {
        let container = pod.run(ContainerSpec::new("again").sh("test ! -e /mark; touch /mark; exit 5")).await?;
        assert_eq!(container.wait_exit().await?.exit_code, 5, "attempt {attempt}");
        // Kubelet keeps the last one for its log, and removes the ones before.
        if attempt > 0 {
            container.remove().await?;
        }
    }
    let last = pod.run(ContainerSpec::new("again").sleep()).await?;
    assert_eq!(last.sh("echo on").await?.stdout(), "on\n");
    assert_eq!(pod.ip().await?, ip);
    Ok(())
}

async fn a_container_killed_from_outside(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    kill(Pid::from_raw(container.pid().await?), Signal::SIGKILL)?;
    let status = container.wait_exit().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert_eq!(pod.state().await?, PodSandboxState::SandboxReady);
    assert_eq!(pod.run(ContainerSpec::new("next").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    Ok(())
}

/// The process that is number 1 in the pid namespace of a container.
pub(crate) async fn init_of(container: &Container) -> Result<i32> {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let wanted = namespace(container.pid().await?).context("the container has ended")?;
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let first = status.lines().any(|line| line.starts_with("NSpid:") && line.split_whitespace().last() == Some("1"));
        if first && namespace(pid).as_ref() == Some(&wanted) {
            return Ok(pid);
        }
    }
    anyhow::bail!("no process is number 1 in {}", wanted.display())
}

async fn a_pods_init_killed_from_outside(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().shared_pid()).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    kill(Pid::from_raw(init_of(&container).await?), Signal::SIGKILL)?;
    // The kernel kills the others of the namespace.
    assert_eq!(container.wait_exit().await?.exit_code, 137);
    pod.wait_state(PodSandboxState::SandboxNotready).await?;
    refused(pod.run(ContainerSpec::new("late").sleep()).await, &[])?;
    Ok(())
}

async fn what_does_not_start_says_why(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().quick().shared_pid()).await?;
    let missing = pod.create(ContainerSpec::new("missing").command(&["/no/such/program"])).await?;
    refused(missing.start().await, &["/no/such/program"])?;
    let status = missing.status().await?;
    assert_eq!((status.state(), status.reason.as_str()), (ContainerState::ContainerExited, "StartError"));
    assert!(status.message.contains("/no/such/program"), "{}", status.message);
    assert_eq!(status.exit_code, 128);
    missing.remove().await?;

    let plain = pod.create(ContainerSpec::new("plain").command(&["/etc/passwd"])).await?;
    refused(plain.start().await, &[])?;
    let unset = pod.create(ContainerSpec::new("looked-up").command(&["no-such-program"])).await?;
    refused(unset.start().await, &["no-such-program"])?;
    // The pod is none the worse.
    assert_eq!(pod.run(ContainerSpec::new("next").sleep()).await?.sh("echo on").await?.stdout(), "on\n");
    Ok(())
}

async fn a_stopped_pod_takes_no_containers(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let waiting = pod.create(ContainerSpec::new("waiting").sleep()).await?;
    pod.stop().await?;
    // containerd 2.1 still creates one, and then cannot start it.
    let late = match pod.create(ContainerSpec::new("late").sleep()).await {
        Ok(container) => container.start().await,
        Err(status) => Err(status),
    };
    refused(late, &[])?;
    refused(waiting.start().await, &[])?;
    Ok(())
}

async fn unknown_ids_are_not_found(case: &Case) -> Result<()> {
    let id = "0123456789abcdef".repeat(4);
    let mut runtime = case.cri.runtime();
    let not_found = |what: &str, error: Option<tonic::Status>| -> Result<()> {
        let status = error.with_context(|| format!("{what} of an unknown id was accepted"))?;
        ensure!(status.code() == Code::NotFound, "{what}: {status}");
        Ok(())
    };
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false };
    not_found("PodSandboxStatus", runtime.pod_sandbox_status(request).await.err())?;
    let request = v1::StartContainerRequest { container_id: id.clone() };
    not_found("StartContainer", runtime.start_container(request).await.err())?;
    let request = v1::ExecSyncRequest { container_id: id.clone(), cmd: vec!["true".to_owned()], timeout: 0 };
    not_found("ExecSync", runtime.exec_sync(request).await.err())?;
    let request = v1::ContainerStatsRequest { container_id: id.clone() };
    not_found("ContainerStats", runtime.container_stats(request).await.err())?;
    let request =
        v1::CreateContainerRequest { pod_sandbox_id: id, config: Some(ContainerSpec::new("c").config), ..Default::default() };
    not_found("CreateContainer", runtime.create_container(request).await.err())
}

async fn events_tell_the_story(case: &Case) -> Result<()> {
    let mut stream = case.cri.runtime().get_container_events(GetEventsRequest {}).await?.into_inner();
    let pod = case.quick_pod().await?;
    let container = pod.run(ContainerSpec::new("c").sh("exit 4")).await?;
    container.wait_exit().await?;
    pod.remove_all().await?;

    use ContainerEventType::{ContainerCreatedEvent, ContainerDeletedEvent, ContainerStartedEvent, ContainerStoppedEvent};
    let mut seen: BTreeMap<String, Vec<ContainerEventType>> = BTreeMap::new();
    while seen.get(&pod.id).is_none_or(|kinds| !kinds.contains(&ContainerDeletedEvent)) {
        let event = tokio::time::timeout(kuasar_tests::cri::SOON, stream.message())
            .await
            .with_context(|| format!("no more events after {seen:?}"))??
            .context("the stream of events ended")?;
        if event.container_id == pod.id || event.container_id == container.id {
            if event.container_event_type() == ContainerStoppedEvent && event.container_id == container.id {
                let of = |status: &&v1::ContainerStatus| status.id == container.id;
                let code = event.containers_statuses.iter().find(of).map(|status| status.exit_code);
                assert_eq!(code, Some(4), "{event:?}");
            }
            seen.entry(event.container_id.clone()).or_default().push(event.container_event_type());
        }
    }
    let whole = [ContainerCreatedEvent, ContainerStartedEvent, ContainerStoppedEvent, ContainerDeletedEvent];
    assert_eq!(seen[&container.id], whole, "the container's events");
    for kind in whole {
        assert_eq!(seen[&pod.id].iter().filter(|seen| **seen == kind).count(), 1, "the pod's events: {:?}", seen[&pod.id]);
    }
    Ok(())
}

async fn the_same_pod_twice(case: &Case) -> Result<()> {
    let spec = case.spec().quick();
    let pod = case.run(spec.clone()).await?;
    refused(case.run(spec.clone()).await, &["reserved"])?;
    pod.remove_all().await?;
    // Its name is free again.
    case.run(spec).await?;
    Ok(())
}

async fn thirty_pods_at_once(case: &Case) -> Result<()> {
    let one = |number: usize| async move {
        let mut spec = case.spec();
        if number.is_multiple_of(2) {
            spec = spec.shared_pid();
        }
        let pod: Pod = case.run(spec).await?;
        let script = format!("echo {number} >/number; exec sleep 1000");
        let container = pod.run(ContainerSpec::new("c").sh(&script)).await?;
        wait::until("the number", kuasar_tests::cri::SOON, || async {
            let ran = container.exec(["cat", "/number"]).await?;
            Ok((ran.stdout() == format!("{number}\n")).then_some(()))
        })
        .await?;
        Ok::<_, anyhow::Error>((pod.ip().await?, pod))
    };
    let pods: BTreeMap<String, Pod> = try_join_all((0..30).map(one)).await?.into_iter().collect();
    assert_eq!(pods.len(), 30, "an address each");
    try_join_all(pods.values().map(Pod::remove_all)).await?;
    Ok(())
}
