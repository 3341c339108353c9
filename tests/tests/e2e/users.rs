//! Who a container runs as.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use anyhow::{Context as _, Result};
use kuasar_tests::cri::k8s_cri::v1::IdMapping;
use kuasar_tests::{Container, ContainerSpec, Pod};

use crate::suite::{Case, Entry, cases, refused};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Handlers Shared:
        users_and_groups,
        users_that_do_not_exist,
        a_user_namespace,
        a_user_namespace_with_volumes_and_processes,
        two_user_namespaces_do_not_meet,
    ];
    cases.extend(cases![Ours Shared: what_the_runtime_can_do_is_offered]);
    cases
}

async fn what_the_runtime_can_do_is_offered(case: &Case) -> Result<()> {
    if case.node.containerd.version() < (2, 4, 0) {
        return case.skip("containerd before 2.4 asks only the runc shim what its OCI runtime can do");
    }
    let peer = if case.is_machine() { "runc" } else { case.handler.trim_start_matches("kuasar-") };
    let handlers = case.cri.handlers().await?;
    let of_peer = handlers.into_iter().find(|handler| handler.name == peer).with_context(|| format!("no handler {peer}"))?;
    // containerd tells nothing of an OCI runtime that cannot say what it can do, as crun 1.8: so nothing is offered.
    assert_eq!(case.features().await?, of_peer.features.unwrap_or_default(), "the same as with the runc shim");
    Ok(())
}

async fn users_and_groups(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let id = |pod: Pod, spec: ContainerSpec| async move {
        // For the first process and for an exec.
        let container = pod.run(spec.sh("id; exec sleep 1000")).await?;
        let exec = container.exec(["id"]).await?.stdout().trim().to_owned();
        assert_eq!(container.wait_log("uid=").await?.text, exec);
        Ok::<_, anyhow::Error>(exec)
    };
    assert_eq!(id(pod.clone(), ContainerSpec::new("root")).await?, "uid=0(root) gid=0(root) groups=0(root)");
    assert_eq!(id(pod.clone(), ContainerSpec::new("uid").user(1234, None)).await?, "uid=1234 gid=0(root) groups=0(root)");
    let spec = ContainerSpec::new("groups").user(1234, Some(2345)).groups(&[3456, 4567]);
    assert_eq!(id(pod.clone(), spec).await?, "uid=1234 gid=2345 groups=2345,3456,4567");
    let spec = ContainerSpec::new("name").user_name("www-data");
    assert_eq!(id(pod.clone(), spec).await?, "uid=33(www-data) gid=33(www-data) groups=33(www-data)");
    Ok(())
}

async fn users_that_do_not_exist(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    let result = match pod.create(ContainerSpec::new("c").sleep().user_name("nobody-we-know")).await {
        Ok(container) => container.start().await,
        Err(status) => Err(status),
    };
    refused(result, &["no users found"])?;
    let mut group_only = ContainerSpec::new("group").sleep();
    group_only.security().run_as_group = Some(kuasar_tests::cri::k8s_cri::v1::Int64Value { value: 1 });
    refused(pod.create(group_only).await, &["user"])?;
    Ok(())
}

const FIRST: u32 = 100_000;
const LENGTH: u32 = 65_536;

/// A pod's root is nobody on the node. Of a machine the node has no such processes.
async fn assert_owner_on_node(case: &Case, container: &Container, owner: u32) -> Result<()> {
    if !case.is_machine() {
        let process = std::fs::metadata(format!("/proc/{}", container.pid().await?))?;
        assert_eq!((process.uid(), process.gid()), (owner, owner));
    }
    Ok(())
}

async fn a_user_namespace(case: &Case) -> Result<()> {
    if !case.features().await?.user_namespaces {
        return case.skip("CRI does not offer user namespaces with this handler");
    }
    let pod = case.run(case.spec().user_namespace(FIRST, LENGTH)).await?;
    let root = pod.run(ContainerSpec::new("root").sleep()).await?;
    let maps = root.sh("cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '").await?.stdout();
    assert_eq!(maps, format!(" 0 {FIRST} {LENGTH}\n").repeat(2));
    assert_eq!(root.exec(["id", "-u"]).await?.stdout(), "0\n");
    assert_owner_on_node(case, &root, FIRST).await?;
    // The image's files are its own, and what the pod is given is, too.
    assert_eq!(root.sh("stat -c %u /bin /etc/passwd | sort -u").await?.stdout(), "0\n");
    let ran = root.sh("echo x >>/etc/passwd && echo x >/dev/shm/x && touch /x && chown 5:5 /x").await?;
    assert_eq!(ran.exit_code, 0, "{ran:?}");
    if case.is_ours() {
        // The runc shim leaves these to the node's root.
        let ran =
            root.sh("stat -c %u /etc/hosts /etc/resolv.conf /etc/hostname /dev/shm | sort -u; echo x >>/etc/hosts").await?;
        assert_eq!((ran.exit_code, ran.stdout().as_str()), (0, "0\n"), "{ran:?}");
    }
    let user = pod.run(ContainerSpec::new("user").sleep().user(1000, Some(1000))).await?;
    assert_owner_on_node(case, &user, FIRST + 1000).await?;
    // Both are in one user namespace, which is not the node's, and owns the pod's network.
    let namespace = |container: Container| async move {
        Ok::<_, anyhow::Error>(container.exec(["readlink", "/proc/self/ns/user"]).await?.stdout())
    };
    assert_eq!(namespace(root.clone()).await?, namespace(user).await?);
    assert_ne!(namespace(root.clone()).await?.trim(), std::fs::read_link("/proc/self/ns/user")?.display().to_string());
    assert_eq!(root.exec(["hostname"]).await?.stdout(), "pod\n");
    if case.is_machine() {
        // The pod's network is the whole guest's, which the guest's root owns (docs/microvm.md).
        return Ok(());
    }
    let admin = pod.run(ContainerSpec::new("admin").sleep().add_capabilities(&["NET_ADMIN"])).await?;
    assert_eq!(admin.sh("ip link add name d0 type dummy || ip addr add 10.99.0.1/32 dev lo").await?.exit_code, 0);
    Ok(())
}

async fn a_user_namespace_with_volumes_and_processes(case: &Case) -> Result<()> {
    if !case.features().await?.user_namespaces {
        return case.skip("CRI does not offer user namespaces with this handler");
    }
    let dir = case.dir().join("v");
    std::fs::create_dir(&dir)?;
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))?;
    std::fs::write(dir.join("of-root"), "x")?;
    let pod = case.run(case.spec().user_namespace(FIRST, LENGTH).shared_pid()).await?;
    let mut spec = ContainerSpec::new("c").sleep().mount(&dir, "/v", false);
    let mapping = IdMapping { host_id: FIRST, container_id: 0, length: LENGTH };
    // As kubelet does for each volume.
    spec.config.mounts[0].uid_mappings = vec![mapping];
    spec.config.mounts[0].gid_mappings = vec![mapping];
    let container = pod.run(spec).await?;
    assert_eq!(container.sh("stat -c %u /v/of-root && echo y >/v/made && chown 7:7 /v/made").await?.stdout(), "0\n");
    assert_eq!(std::fs::metadata(dir.join("made"))?.uid(), 7, "on disk it is what the pod says");
    let other = pod.run(ContainerSpec::new("other").command(&["sleep", "2222"])).await?;
    assert_eq!(container.sh("kill $(ps | awk '/[s]leep 2222/{print $1}')").await?.exit_code, 0);
    other.stop(0).await?;
    Ok(())
}

async fn two_user_namespaces_do_not_meet(case: &Case) -> Result<()> {
    if !case.features().await?.user_namespaces {
        return case.skip("CRI does not offer user namespaces with this handler");
    }
    for first in [FIRST, FIRST + LENGTH] {
        let pod = case.run(case.spec().user_namespace(first, LENGTH)).await?;
        let container = pod.run(ContainerSpec::new("c").sleep()).await?;
        assert_owner_on_node(case, &container, first).await?;
        assert_eq!(container.sh("stat -c %u /bin").await?.stdout(), "0\n", "one image, for each its own");
    }
    // A user that is not mapped is nobody.
    let pod = case.run(case.spec().user_namespace(FIRST, LENGTH)).await?;
    let result = match pod.create(ContainerSpec::new("c").sleep().user(70_000, Some(70_000))).await {
        Ok(container) => container.start().await,
        Err(status) => Err(status),
    };
    refused(result, &[])?;
    Ok(())
}
