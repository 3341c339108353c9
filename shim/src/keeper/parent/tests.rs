//! The keeper's loop, turn by turn.

use std::{
    fs::File,
    os::unix::process::ExitStatusExt,
    process::{Child, Stdio},
};

use rustix::process::{Resource, getrlimit, setrlimit};

use super::*;

/// A keeper whose worker only sleeps, and the worker's end of the socket.
fn keeper() -> (Keeper, Child, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
    let worker = Some(Worker::new(child.id(), ours, VecDeque::new(), true));
    (Keeper { worker, ready: true, ..Keeper::default() }, child, theirs)
}

/// What does not get ready for the time of a test.
fn signals() -> SignalFd {
    SignalFd::new(&nix::sys::signal::SigSet::empty()).unwrap()
}

#[test]
fn a_worker_that_closes_its_socket_is_killed() {
    let (mut keeper, mut child, theirs) = keeper();
    let signals = signals();
    drop(theirs);
    let begun = Instant::now();
    let mut turns = 0;
    // When it is killed, it gets time to end.
    let killed = |keeper: &Keeper| keeper.worker.as_ref().is_some_and(|worker| worker.closed > Some(begun + HUNG));
    while !killed(&keeper) {
        keeper.wait(&signals, None);
        keeper.hear_worker();
        keeper.watch_worker();
        turns += 1;
    }
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert!(begun.elapsed() >= CLOSED);
    // Up to its end there was nothing to do, and nothing was done.
    assert!(turns < 100, "{turns}");
}

#[test]
fn systemd_is_not_told_of_a_keeper_whose_worker_says_nothing() {
    let long_ago = Instant::now().checked_sub(3 * HUNG).unwrap();
    let (mut keeper, mut child, _theirs) = keeper();
    assert!(keeper.is_well());
    // It was killed for it, and does not end.
    keeper.worker.as_mut().unwrap().lived = long_ago;
    assert!(!keeper.is_well());
    child.kill().unwrap();
    child.wait().unwrap();
    keeper.worker = None;
    assert!(keeper.is_well());
    keeper.vacant = Some(long_ago);
    assert!(!keeper.is_well());
}

/// Set in a process that runs one test.
const ALONE: &str = "KUASAR_TEST_ALONE";

#[test]
fn what_there_is_no_room_for_waits_and_then_is_refused() {
    // In a process of its own: other tests are not to run out of descriptors.
    if env::var_os(ALONE).is_none() {
        let mut alone = Command::new(env::current_exe().unwrap());
        alone.args(["--exact", "keeper::parent::tests::what_there_is_no_room_for_waits_and_then_is_refused"]).env(ALONE, "1");
        let output = alone.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let (mut keeper, mut child, theirs) = keeper();
    let file = File::open("/dev/null").unwrap();
    let park = || wire::send(&theirs, &Message::Park("held/a".into()), &[file.as_fd(), theirs.as_fd()], SendFlags::DONTWAIT);
    park().unwrap();
    keeper.hear_worker();
    assert_eq!(keeper.parked["held/a"].len(), 2);
    let number = keeper.parked["held/a"][0].as_raw_fd();
    park().unwrap();
    let before = getrlimit(Resource::Nofile);
    let limit = |current| setrlimit(Resource::Nofile, rustix::process::Rlimit { current, ..before }).unwrap();
    limit(Some(0));
    keeper.hear_worker();
    let worker = keeper.worker.as_mut().unwrap();
    let waits = worker.waiting.is_some() && keeper.full.get().is_some();
    worker.waiting = Instant::now().checked_sub(ROOM);
    keeper.hear_worker();
    limit(before.current);
    assert!(waits);
    let held = &keeper.parked["held/a"];
    assert_eq!((held.len(), held[0].as_raw_fd()), (2, number), "what was held is held");
    keeper.speak();
    let told = wire::receive(&theirs, RecvFlags::DONTWAIT).unwrap().unwrap();
    assert_eq!(told.message, Message::Lost("held/a".into()));
    // With room all is as ever, and what came cut is sent again.
    park().unwrap();
    wire::send(&theirs, &Message::Again("held/a".into()), &[], SendFlags::DONTWAIT).unwrap();
    keeper.hear_worker();
    assert_ne!(keeper.parked["held/a"][0].as_raw_fd(), number);
    keeper.speak();
    let told = wire::receive(&theirs, RecvFlags::DONTWAIT).unwrap().unwrap();
    assert_eq!((told.message, told.descriptors.len()), (Message::Park("held/a".into()), 2));
    child.kill().unwrap();
    child.wait().unwrap();
}
