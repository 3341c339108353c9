//! Exit statuses of orphans by process events: real processes of another parent, which reaps them at once as init does. This executable is
//! that parent, too, and some of the orphans, so it has a `main` of its own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may")]

use std::{
    env,
    io::{BufRead, BufReader, PipeWriter, stdin},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, ExitCode, Stdio, exit},
    thread,
    time::{Duration, Instant},
};

use futures::future::join_all;
use kuasar_sandboxers::{
    fdstore::{FdStore, MemoryHolder},
    process::{Exiting, Identity, Tracked},
    reaper::{Reaper, start_of},
};
use nix::sys::{prctl, wait::waitpid};
use tokio::time::{sleep, timeout};

const ROLE: &str = "KUASAR_TEST_ROLE";
const LIMIT: Duration = Duration::from_secs(60);
/// How the subscription is parked.
const PARKED: &str = "process-events";

fn main() -> ExitCode {
    match env::var(ROLE).as_deref() {
        Ok("parent") => return parent(),
        Ok("thread-executes") => thread_executes(),
        Ok("thread-exits") => thread_exits(),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        // Of no process: the orphans' parent is another.
        let reaper = Reaper::install_under(u32::MAX).unwrap();
        let holder = MemoryHolder::default();
        reaper.orphans().begin_with_events(&holder.store());
        if !holder.names().contains(&PARKED.to_owned()) {
            eprintln!("SKIP orphans: process events want root in the host's namespaces, and CONFIG_PROC_EVENTS");
            return;
        }
        reaped_before_they_are_looked_for(&reaper).await;
        eprintln!("test reaped_before_they_are_looked_for ... ok");
        many_at_once_under_load(&reaper).await;
        eprintln!("test many_at_once_under_load ... ok");
        the_leaders_end_may_not_be_the_last(&reaper).await;
        eprintln!("test the_leaders_end_may_not_be_the_last ... ok");
        it_ends_with_the_last_orphan(&reaper, &holder).await;
        eprintln!("test it_ends_with_the_last_orphan ... ok");
        what_ends_between_two_daemons_waits(&reaper).await;
        eprintln!("test what_ends_between_two_daemons_waits ... ok");
    });
    ExitCode::SUCCESS
}

/// Starts each argument as an orphan's script, prints the pids, and reaps whatever ends.
fn parent() -> ExitCode {
    prctl::set_child_subreaper(true).unwrap();
    for script in env::args().skip(1) {
        // Descriptor 3 is what the test lets them go by.
        let orphan = "exec 3<&0; sh -c \"$1\" >/dev/null & echo $!";
        let mut starter = Command::new("sh").args(["-c", orphan, "sh", &script]).env_remove(ROLE).spawn().unwrap();
        starter.wait().unwrap();
    }
    while waitpid(None, None).is_ok() {}
    ExitCode::SUCCESS
}

/// The leader ends when another thread becomes another program, as in Go.
fn thread_executes() -> ! {
    thread::spawn(|| {
        let error = Command::new("sh").args(["-c", "read x; exit 7"]).env_remove(ROLE).exec();
        panic!("{error}");
    });
    loop {
        thread::park();
    }
}

/// All threads end when one that is not the leader says so.
fn thread_exits() -> ! {
    for _ in 0..3 {
        thread::spawn(|| {
            loop {
                thread::park();
            }
        });
    }
    thread::spawn(|| {
        let mut go = String::new();
        stdin().read_line(&mut go).unwrap();
        exit(env::args().nth(1).unwrap().parse().unwrap());
    });
    loop {
        thread::park();
    }
}

/// Orphans that wait to be let go.
struct Orphans {
    parent: Child,
    found: Vec<Identity>,
    go: PipeWriter,
}

impl Orphans {
    fn start(scripts: &[String]) -> Self {
        let (waiting, go) = std::io::pipe().unwrap();
        let mut parent = Command::new(env::current_exe().unwrap())
            .args(scripts)
            .env(ROLE, "parent")
            .stdin(waiting)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pids = BufReader::new(parent.stdout.take().unwrap()).lines().take(scripts.len());
        let found = pids.map(|pid| pid.unwrap().parse().unwrap());
        let found = found.map(|pid| Identity { pid, start: start_of(pid).unwrap() }).collect();
        Self { parent, found, go }
    }

    /// They are taken for a daemon's, as it finds them.
    fn find(&self, reaper: &Reaper) -> Vec<(Tracked, Exiting)> {
        let find = |identity: &Identity| {
            let process = Tracked::find(*identity).unwrap().unwrap();
            let exiting = Exiting::adopted(*identity, Some(&process), reaper);
            (process, exiting)
        };
        self.found.iter().map(find).collect()
    }

    /// Lets them go, and waits until all have been reaped.
    async fn end(self) -> Vec<Identity> {
        let Self { parent, found, go } = self;
        drop(go);
        let pid = parent.id();
        timeout(LIMIT, async {
            // Its end, which the reaper sees, is theirs.
            while Path::new(&format!("/proc/{pid}")).exists() || found.iter().any(|it| start_of(it.pid) == Some(it.start)) {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
        found
    }
}

/// How a script ends, and the status of that.
fn ends(count: u32) -> Vec<(String, u32)> {
    let signals = [9, 15, 11, 6, 34, 64];
    let of = |number: u32| match number % 4 {
        0 => ("exit 0".to_owned(), 0),
        1 => (format!("exit {}", number % 256), number % 256),
        2 => (format!("sleep 0.0{}; exit 3", number % 10), 3),
        _ => {
            let signal = signals[(number / 4) as usize % signals.len()];
            (format!("kill -{signal} $$"), 128 + signal)
        }
    };
    (0..count).map(of).map(|(script, status)| (format!("read x <&3; {script}"), status)).collect()
}

async fn reaped_before_they_are_looked_for(reaper: &Reaper) {
    let ends = ends(40);
    let scripts: Vec<_> = ends.iter().map(|(script, _)| script.clone()).collect();
    for (identity, (script, status)) in Orphans::start(&scripts).end().await.into_iter().zip(&ends) {
        let before = std::time::SystemTime::now();
        assert!(Tracked::find(identity).unwrap().is_none());
        let exit = Exiting::adopted(identity, None, reaper).of(None).await;
        assert_eq!(exit.status, *status, "{script}");
        // When it ended, not when it was asked for.
        assert!(before - LIMIT < exit.at && exit.at <= before, "{:?} {before:?}", exit.at);
    }
    // And nothing is made up of one that was not there.
    let never = Identity { pid: std::process::id(), start: start_of(std::process::id()).unwrap() };
    assert_eq!(Exiting::adopted(never, None, reaper).of(None).await.status, 255);
}

/// Programs that end all the time, and others that take the processors.
struct Load(Vec<Child>);

impl Load {
    fn start() -> Self {
        let scripts = ["while :; do /bin/true; done"; 4].into_iter().chain(["while :; do :; done"; 4]);
        Self(scripts.map(|script| Command::new("sh").args(["-c", script]).spawn().unwrap()).collect())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            child.kill().unwrap();
        }
    }
}

async fn many_at_once_under_load(reaper: &Reaper) {
    let ends = ends(100);
    let scripts: Vec<_> = ends.iter().map(|(script, _)| script.clone()).collect();
    for round in 0..3 {
        let orphans = Orphans::start(&scripts);
        let found = orphans.find(reaper);
        let load = Load::start();
        let begun = Instant::now();
        let exits = tokio::spawn(async move {
            let of = |(process, exiting): (Tracked, Exiting)| async move { exiting.of(Some(&process)).await };
            join_all(found.into_iter().map(of)).await
        });
        orphans.end().await;
        let exits = timeout(LIMIT, exits).await.unwrap().unwrap();
        drop(load);
        eprintln!("round {round}: {} exits under load in {} ms", exits.len(), begun.elapsed().as_millis());
        for (exit, (script, status)) in exits.iter().zip(&ends) {
            assert_eq!(exit.status, *status, "{script}");
        }
    }
}

async fn the_leaders_end_may_not_be_the_last(reaper: &Reaper) {
    let program = env::current_exe().unwrap().display().to_string();
    let in_role = |role: &str, status: u32| (format!("{ROLE}={role} exec {program} {status} <&3"), status);
    let all = [in_role("thread-executes", 7), in_role("thread-exits", 0), in_role("thread-exits", 6)];
    let scripts: Vec<_> = all.iter().map(|(script, _)| script.clone()).collect();
    let orphans = Orphans::start(&scripts);
    let found = orphans.find(reaper);
    let command_line = format!("/proc/{}/cmdline", orphans.found[0].pid);
    timeout(LIMIT, async {
        while !std::fs::read(&command_line).unwrap().ends_with(b"exit 7\0") {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    orphans.end().await;
    for ((process, exiting), (script, status)) in found.into_iter().zip(&all) {
        assert_eq!(timeout(LIMIT, exiting.of(Some(&process))).await.unwrap().status, *status, "{script}");
    }
}

async fn it_ends_with_the_last_orphan(reaper: &Reaper, holder: &MemoryHolder) {
    let orphans = Orphans::start(&["read x <&3; exit 4".to_owned()]);
    let mut found = orphans.find(reaper);
    reaper.orphans().recovered();
    assert_eq!(holder.names(), [PARKED], "while there is one");
    orphans.end().await;
    let (process, exiting) = found.pop().unwrap();
    assert_eq!(exiting.of(Some(&process)).await.status, 4);
    assert_eq!(holder.names(), [""; 0], "nothing is to be known");
    // And begins with the next.
    let orphans = Orphans::start(&["read x <&3; exit 5".to_owned()]);
    let (process, exiting) = orphans.find(reaper).pop().unwrap();
    assert_eq!(holder.names(), [PARKED]);
    orphans.end().await;
    assert_eq!(exiting.of(Some(&process)).await.status, 5);
    assert_eq!(holder.names(), [""; 0]);
}

async fn what_ends_between_two_daemons_waits(reaper: &Reaper) {
    let holder = MemoryHolder::default();
    let leaving = Reaper::install_under(u32::MAX).unwrap();
    leaving.orphans().begin_with_events(&holder.store());
    leaving.orphans().recovered();
    assert_eq!(holder.names(), [""; 0]);
    leaving.orphans().hand_off();
    assert_eq!(holder.names(), [PARKED]);
    drop(leaving);
    let ends = ends(20);
    let scripts: Vec<_> = ends.iter().map(|(script, _)| script.clone()).collect();
    let orphans = Orphans::start(&scripts).end().await;

    // A keeper that is younger has not seen how they ended.
    let keeper = reaper.spawn(Command::new("sleep").arg("1000")).unwrap();
    let store: FdStore = holder.store();
    let next = Reaper::install_under(keeper.pid).unwrap();
    next.orphans().begin_with_events(&store);
    for (identity, (script, status)) in orphans.into_iter().zip(&ends) {
        assert_eq!(Exiting::adopted(identity, None, &next).of(None).await.status, *status, "{script}");
    }
    next.orphans().recovered();
    assert_eq!(holder.names(), [""; 0]);
    // Any of the reapers may be the one that sees its end.
    Tracked::open(keeper.pid).unwrap().unwrap().signal(libc::SIGKILL).unwrap();
}
