//! Out-of-memory kills: told before the exit, by a daemon that comes later too, and known after the end.

use kuasar_sandboxers::{cgroup::Stats, event::Notice};

use super::*;

pub(super) async fn out_of_memory(node: &mut Node) {
    if !Path::new("/sys/fs/cgroup/memory").exists()
        && !fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").is_ok_and(|list| list.contains("memory"))
    {
        eprintln!("SKIP out_of_memory: no memory controller");
        return;
    }
    let pod_spec = host::pod("runc", "pod", NamespaceMode::Container);
    let pod = node.start(pod_spec.clone()).await;
    let mut spec = node.spec("greedy", &["tail", "/dev/zero"], None);
    spec.spec.as_value_mut()["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    spec.spec.as_value_mut()["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
    let head = ContainerHead { id: spec.id.clone(), bundle: spec.bundle.clone(), stdio: spec.stdio.clone() };
    let container = node.run(&pod, spec).await;
    // The exit waits until the notice is saved.
    let noticed = within(node.noticed.recv()).await.expect("a notice");
    assert_eq!((noticed.container.as_str(), noticed.notice), ("greedy", Notice::OutOfMemory { kills: Some(1) }));
    assert!(timeout(Duration::from_millis(50), container.exited()).await.is_err(), "its exit was told first");
    drop(noticed);
    assert_eq!(within(container.exited()).await.status, 137);
    assert_eq!(oom_kills(&container.stats().await.unwrap()), 1);

    // A daemon that died before it could tell: the next one does, though the container has ended.
    node.restart();
    let recovered = node.sandboxer.recover(Arc::new(pod_spec), node.context(), pod.record()).await.unwrap();
    let again = recovered.recover_container(head, container.record()).await.unwrap();
    let noticed = within(node.noticed.recv()).await.expect("a notice of the next daemon's");
    assert_eq!(noticed.notice, Notice::OutOfMemory { kills: Some(1) });
    drop(noticed);
    within(again.exited()).await;
    again.delete().await.unwrap();
    assert_eq!(oom_kills(&again.stats().await.unwrap()), 1, "what is known of one whose group is gone");

    let container = node.run(&recovered, node.spec("modest", &["true"], None)).await;
    within(container.exited()).await;
    container.delete().await.unwrap();
    assert!(node.noticed.try_recv().is_err(), "the end of a group was taken for a kill");
    node.end(recovered).await;
}

fn oom_kills(stats: &Stats) -> u64 {
    match stats {
        Stats::V1(stats) => stats.memory_oom_control.unwrap().oom_kill,
        Stats::V2(stats) => stats.memory_events.unwrap().oom_kill,
    }
}
