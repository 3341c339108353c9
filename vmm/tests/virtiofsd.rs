//! virtiofsd with a real guest: what is mounted on the host later is seen, changes are seen, and what the guest may do to files.
#![allow(clippy::unwrap_used, reason = "a test may")]

mod machines;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    time::{Duration, Instant},
};

use kuasar_sandboxers::{Code, process::is_dead, programs::Programs, undo::Undo};
use kuasar_vmm::{
    hypervisor::Hypervisor,
    qemu::{Machine, Qemu},
    spec::Share,
    virtiofsd::{Cache, Virtiofsd},
};
use machines::{bench, config, reaper};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Unmounts everything below a directory when a test ends, however it ends.
struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        while umount2(self.0, MntFlags::MNT_DETACH).is_ok() {}
    }
}

fn tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
}

/// Waits for the host's commands: the guest does step `n` once the file `go<n>` is there, which it looks for without its cache.
const SCRIPT: &str = "
step() { while ! ls /mnt/share | grep -qx go$1; do sleep 0.1; done; }
mkdir -p /mnt/share; mount -t virtiofs share /mnt/share && say mounted
step 1
say one $(cat /mnt/share/sub/one/name) two $(cat /mnt/share/sub/two/name)
[ $(stat -c %i /mnt/share/sub/one/name) = $(stat -c %i /mnt/share/sub/two/name) ] && say equal inodes
[ $(stat -c %d /mnt/share/sub/one/name) != $(stat -c %d /mnt/share/sub/two/name) ] && say different devices
chown 4000:5000 /mnt/share/sub/one/name && chmod 4711 /mnt/share/sub/one/name && say changed
cat /mnt/share/secret && say secret
mknod /mnt/share/null c 1 3 || say no devices
echo x > /mnt/share/sub/readonly/file || say read only
say config $(cat /mnt/share/config/key)
n=0; while [ \"$(cat /mnt/share/config/key)\" = old ]; do n=$((n+1)); sleep 0.1; done
say swapped to $(cat /mnt/share/config/key)
while ! grep -q longer /mnt/share/file; do sleep 0.1; done
say file $(cat /mnt/share/file)
step 2
while [ -e /mnt/share/sub/one/name ]; do sleep 0.1; done
say unmounted
";

#[tokio::test]
async fn a_guest_sees_later_mounts_and_changes() {
    let test = "a_guest_sees_later_mounts_and_changes";
    let Some(bench) = bench(test, SCRIPT).await else { return };
    let pods = bench.path("mounts");
    tmpfs(&pods);
    let _unmount = Unmount(&pods);
    let virtiofsd = match Virtiofsd::open(None, &reaper(), &mut Programs::default()).await {
        Ok(virtiofsd) => virtiofsd,
        Err(error) => return eprintln!("SKIP {test}: {}", error.report()),
    };
    eprintln!("{}", virtiofsd.describe());
    let shared = pods.join("shared");
    tmpfs(&shared);
    mount(None::<&str>, &shared, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
    fs::create_dir(shared.join("sub")).unwrap();
    fs::create_dir_all(shared.join("config/v1")).unwrap();
    fs::write(shared.join("config/v1/key"), "old\n").unwrap();
    symlink("v1", shared.join("config/data")).unwrap();
    symlink("data/key", shared.join("config/key")).unwrap();
    fs::write(shared.join("file"), "before\n").unwrap();
    fs::write(shared.join("secret"), "").unwrap();
    fs::set_permissions(shared.join("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    std::os::unix::fs::chown(shared.join("secret"), Some(1234), Some(1234)).unwrap();

    let socket = bench.path("fs.sock");
    let daemon = virtiofsd.start("virtiofsd", &shared, Cache::Auto, &socket, &bench.place()).await.unwrap();
    let qemu = Qemu::open(config(Machine::Q35), &reaper(), &mut Programs::default()).await.unwrap();
    let (device, vsock) = bench.vsock().await;
    let mut spec = bench.spec(vsock);
    spec.shares.push(Share { tag: "share".into(), socket: socket.clone() });
    let mut undo = Undo::new("test");
    let vm = qemu.start(spec, bench.place(), &mut undo).await;
    let vm = undo.settle(vm).await.unwrap();
    bench.said("mounted").await;

    // Long after virtiofsd has made its own mount namespace: two file systems that number their files alike.
    for name in ["one", "two"] {
        let at = shared.join("sub").join(name);
        tmpfs(&at);
        fs::write(at.join("name"), name).unwrap();
    }
    // Read-only before it gets there: later changes of a mount's flags do not reach virtiofsd's copy of it.
    let (staged, readonly) = (pods.join("staged"), shared.join("sub/readonly"));
    tmpfs(&staged);
    fs::create_dir(&readonly).unwrap();
    mount(None::<&str>, &staged, None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, None::<&str>)
        .unwrap();
    mount(Some(&staged), &readonly, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    umount2(&staged, MntFlags::empty()).unwrap();
    fs::write(shared.join("go1"), "").unwrap();
    for words in
        ["one one two two", "equal inodes", "different devices", "changed", "secret", "no devices", "read only", "config old"]
    {
        bench.said(words).await;
    }
    let changed = fs::metadata(shared.join("sub/one/name")).unwrap();
    assert_eq!((changed.uid(), changed.gid(), changed.mode() & 0o7777), (4000, 5000, 0o4711));

    // As kubelet does it.
    fs::create_dir(shared.join("config/v2")).unwrap();
    fs::write(shared.join("config/v2/key"), "new\n").unwrap();
    symlink("v2", shared.join("config/data_tmp")).unwrap();
    let begin = Instant::now();
    fs::rename(shared.join("config/data_tmp"), shared.join("config/data")).unwrap();
    bench.said("swapped to new").await;
    eprintln!("a swapped symbolic link was seen after {:?}", begin.elapsed());
    let begin = Instant::now();
    fs::write(shared.join("file"), "after that, longer\n").unwrap();
    bench.said("file after that, longer").await;
    eprintln!("a changed file was seen after {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(20));

    // The guest remembers its files, so it is not let go at once; but nothing blocks.
    fs::write(shared.join("go2"), "").unwrap();
    umount2(&shared.join("sub/one"), MntFlags::MNT_DETACH).unwrap();
    bench.said("unmounted").await;

    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", daemon.pid())).unwrap();
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    let own = namespace("self") != namespace(&daemon.pid().to_string());
    assert_eq!(virtiofsd.describe().contains("in a user namespace of its own"), own);
    daemon.kill().await.unwrap();
    assert!(is_dead(daemon.pid()) && children.split_whitespace().all(|pid| is_dead(pid.parse().unwrap())), "{children}");
    // Nobody holds the mounts any more.
    for name in ["two", "readonly"] {
        umount2(&shared.join("sub").join(name), MntFlags::empty()).unwrap();
    }
    umount2(&shared, MntFlags::empty()).unwrap();
    vm.kill().await.unwrap();
    device.kill().await.unwrap();
    fs::remove_file(socket).unwrap();
    let mut left = bench.left();
    left.sort();
    assert_eq!(left, ["mounts", "vsock"]);
}

#[tokio::test]
async fn a_virtiofsd_that_will_not_do_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("old");
    fs::write(&path, "#!/bin/sh\necho virtiofsd version 7.2.22 >&2\n").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    for (path, why) in [(path, "in C"), (dir.path().join("none"), "install virtiofsd")] {
        let error = Virtiofsd::open(Some(&path), &reaper(), &mut Programs::default()).await.unwrap_err();
        assert!(error.code() == Code::Unavailable && error.report().contains(why), "{}", error.report());
    }
}
