//! Daemons that die between two steps: what the next one makes of the state that was saved last.

use std::time::Duration;

use super::{Daemon, Outcome, parse, within};
use crate::{
    fake::Behaviour,
    id::{ContainerId, ExecId},
    lifecycle::ProcessPhase,
};

pub(super) async fn a_death_after_creating_a_container(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let snapshot = daemon.snapshot()?;
    let before = daemon.fixture.held(daemon.dir);
    daemon.container(&pod, "main", Behaviour::Run).await?;
    let next = daemon.successor(snapshot).await?;
    let after = daemon.fixture.held(daemon.dir);
    ensure!(after == before, "a container that no sandbox knows is left: {after:?}, without it {before:?}");
    // containerd's request is repeated.
    let pod = next.find_pod("pod")?;
    let container = next.container(&pod, "main", Behaviour::Exit(3)).await?;
    within("start", container.start(None)).await?;
    ensure!(within("wait", container.wait(None)).await?.status == 3, "the container made again is another");
    within("delete of the sandbox", pod.delete()).await
}

pub(super) async fn a_death_after_starting_a_container(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    let snapshot = daemon.snapshot()?;
    let pid = within("start", container.start(None)).await?;
    let mut next = daemon.successor(snapshot).await?;
    let pod = next.find_pod("pod")?;
    let container = next.find(&pod, "main")?;
    let status = within("status", container.status(None)).await?;
    ensure!(status.process.state.phase() == ProcessPhase::Running, "it runs, but is recovered as {status:?}");
    ensure!(status.process.state.pid() == pid, "recovered with another pid than {pid}: {status:?}");
    within("kill", container.kill(None, libc::SIGKILL, false)).await?;
    ensure!(within("wait", container.wait(None)).await?.status == 137, "its end is lost");
    within("delete", container.delete(None)).await?;
    let history = next.history("main").await?;
    ensure!(history.ends_with(&["started", "exited", "deleted"]), "events came as {history:?}");
    within("delete of the sandbox", pod.delete()).await
}

pub(super) async fn a_death_after_starting_an_exec(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    within("start", container.start(None)).await?;
    let (live, unstarted): (ExecId, ExecId) = (parse("live")?, parse("unstarted")?);
    within("exec", container.exec(daemon.fixture.exec(live.clone(), Behaviour::Run))).await?;
    within("exec", container.exec(daemon.fixture.exec(unstarted.clone(), Behaviour::Exit(4)))).await?;
    let snapshot = daemon.snapshot()?;
    let pid = within("start of the exec", container.start(Some(live.clone()))).await?;
    let next = daemon.successor(snapshot).await?;
    let container = next.find(&next.find_pod("pod")?, "main")?;
    let status = within("status", container.status(Some(live.clone()))).await?;
    ensure!(status.process.state.phase() == ProcessPhase::Running, "it runs, but is recovered as {status:?}");
    ensure!(status.process.state.pid() == pid, "recovered with another pid than {pid}: {status:?}");
    within("kill", container.kill(Some(live.clone()), libc::SIGKILL, false)).await?;
    ensure!(within("wait", container.wait(Some(live))).await?.status == 137, "its end is lost");
    // What was not started is as good as before.
    within("start of the other", container.start(Some(unstarted.clone()))).await?;
    ensure!(within("wait", container.wait(Some(unstarted))).await?.status == 4, "an exec was recovered as another");
    within("delete of the sandbox", next.find_pod("pod")?.delete()).await
}

pub(super) async fn a_death_after_an_exec_has_ended(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    within("start", container.start(None)).await?;
    let exec: ExecId = parse("e")?;
    within("exec", container.exec(daemon.fixture.exec(exec.clone(), Behaviour::Exit(6)))).await?;
    let added = daemon.snapshot()?;
    within("start of the exec", container.start(Some(exec.clone()))).await?;
    within("wait", container.wait(Some(exec.clone()))).await?;
    let next = daemon.successor(added).await?;
    let container = next.find(&next.find_pod("pod")?, "main")?;
    ensure!(within("wait", container.wait(Some(exec.clone()))).await?.status == 6, "the exit code is lost");
    within("delete", container.delete(Some(exec))).await?;
    within("delete of the sandbox", next.find_pod("pod")?.delete()).await
}

pub(super) async fn a_death_after_deleting_a_container(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Exit(8)).await?;
    within("start", container.start(None)).await?;
    within("wait", container.wait(None)).await?;
    let snapshot = daemon.snapshot()?;
    within("delete", container.delete(None)).await?;
    let next = daemon.successor(snapshot).await?;
    let pod = next.find_pod("pod")?;
    let deleted = within("second delete", next.find(&pod, "main")?.delete(None)).await?;
    ensure!(deleted.state.exit().is_some_and(|exit| exit.status == 8), "the exit code is lost: {deleted:?}");
    within("delete of the sandbox", pod.delete()).await
}

/// Everything is saved, and no client has had an answer.
pub(super) async fn a_death_before_an_answer(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Exit(8)).await?;
    within("start", container.start(None)).await?;
    within("wait", container.wait(None)).await?;
    within("delete", container.delete(None)).await?;
    let mut next = daemon.successor(daemon.snapshot()?).await?;
    let (namespace, id): (_, ContainerId) = (pod.namespace.clone(), parse("main")?);
    let deleted = next.registry.deleted(&namespace, &id, None);
    ensure!(
        deleted.and_then(|state| state.exit()).is_some_and(|exit| exit.status == 8),
        "a deletion whose answer may be lost is forgotten: {deleted:?}"
    );
    // No event has been taken: all are told again.
    let history = next.history("main").await?;
    ensure!(history == ["created", "started", "exited", "deleted"], "events came as {history:?}");
    within("delete of the sandbox", next.find_pod("pod")?.delete()).await?;
    ensure!(next.registry.deleted(&namespace, &id, None).is_none(), "a deletion outlives its sandbox");
    Ok(())
}

pub(super) async fn a_death_after_stopping_a_sandbox(daemon: &mut Daemon<'_>) -> Outcome {
    let pod = daemon.pod("pod").await?;
    let container = daemon.container(&pod, "main", Behaviour::Run).await?;
    within("start", container.start(None)).await?;
    let snapshot = daemon.snapshot()?;
    within("stop", pod.stop(Duration::ZERO)).await?;
    let next = daemon.successor(snapshot).await?;
    let pod = next.find_pod("pod")?;
    ensure!(within("wait", next.find(&pod, "main")?.wait(None)).await?.status == 137, "the container's end is lost");
    // Not every technique has something that tells the end of a sandbox by itself.
    within("stop again", pod.stop(Duration::ZERO)).await?;
    within("wait for the sandbox", pod.wait()).await?;
    within("delete", pod.delete()).await
}
