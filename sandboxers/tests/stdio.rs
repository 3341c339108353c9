//! Stdio of real processes: FIFOs, streams, log files, log programs and terminals. In a process of its own, because the
//! reaper takes every exit of the process.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::{Duration, Instant},
};

use kuasar_sandboxers::{
    Code, Error,
    fdstore::{FdStore, MemoryHolder},
    reaper::{Child, Reaper},
    stdio::{IoContext, ProcessIo, Stdio, StreamEnd, StreamHub},
    terminal::Terminal,
    types::WindowSize,
};
use nix::{
    fcntl::{FcntlArg, FdFlag, OFlag, fcntl},
    pty::openpty,
    sys::stat::Mode,
    unistd::mkfifo,
};
use tokio::{runtime::Runtime, time::timeout};

const LIMIT: Duration = Duration::from_secs(20);

/// One runtime for all tests, because a process has one reaper and that lives in a runtime.
fn run(test: impl Future<Output = ()>) {
    static SHARED: OnceLock<Runtime> = OnceLock::new();
    SHARED.get_or_init(|| Runtime::new().unwrap()).block_on(async { timeout(LIMIT, test).await.expect("the test hangs") });
}

fn context() -> IoContext {
    static REAPER: OnceLock<Reaper> = OnceLock::new();
    IoContext {
        namespace: "k8s.io".parse().unwrap(),
        sandbox: "pod".parse().unwrap(),
        container: "c1".parse().unwrap(),
        streams: StreamHub::default(),
        reaper: REAPER.get_or_init(|| Reaper::install().unwrap()).clone(),
        owner: (0, 0),
        fds: FdStore::default(),
        name: "pod/c1/1".into(),
    }
}

struct Pipes {
    dir: tempfile::TempDir,
}

impl Pipes {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["stdin", "stdout", "stderr"] {
            mkfifo(&dir.path().join(name), Mode::from_bits_truncate(0o700)).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn stdio(&self, terminal: bool) -> Stdio {
        Stdio { stdin: self.text("stdin"), stdout: self.text("stdout"), stderr: self.text("stderr"), terminal }
    }

    /// containerd's end of an output FIFO.
    fn reader(&self, name: &str) -> File {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.path(name)).unwrap();
        fcntl(&file, FcntlArg::F_SETFL(OFlag::O_RDONLY)).unwrap();
        file
    }

    fn writer(&self) -> File {
        OpenOptions::new().write(true).open(self.path("stdin")).unwrap()
    }
}

fn start(io: &ProcessIo, context: &IoContext, script: &str) -> Child {
    let fds = io.child_fds().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", script]).stdin(fds.stdin).stdout(fds.stdout).stderr(fds.stderr);
    context.reaper.spawn(&mut command).unwrap()
}

async fn read_all(mut file: File) -> String {
    let text = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        file.read_to_string(&mut text).map(|_| text)
    });
    text.await.unwrap().unwrap()
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn collect(end: &StreamEnd) -> String {
    let mut text = String::new();
    while let Some(chunk) = end.next().await.unwrap() {
        text.push_str(str::from_utf8(&chunk).unwrap());
        chunk.sent();
    }
    text
}

#[test]
fn fifos_reach_the_process_and_input_ends_with_close_only() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let (stdout, stderr) = (pipes.reader("stdout"), pipes.reader("stderr"));
        let io = ProcessIo::open(&pipes.stdio(false), &context).await.unwrap();
        let child = start(&io, &context, "cat; echo done >&2");
        assert!(matches!(io.child_fds(), Err(Error::Invalid { .. })));
        // Two clients, one after the other: neither ends the input.
        for word in ["one ", "two"] {
            pipes.writer().write_all(word.as_bytes()).unwrap();
        }
        let mut exit = child.exit;
        assert!(timeout(Duration::from_millis(100), &mut exit).await.is_err(), "input ended before CloseIO");
        let client = pipes.writer();
        io.close_stdin();
        assert!(timeout(Duration::from_millis(100), &mut exit).await.is_err(), "input ended with a client still there");
        drop(client);
        assert_eq!(exit.await.status, 0);
        io.finish().await;
        // Readers see the end at once: nothing of ours holds the FIFOs open.
        assert_eq!((read_all(stdout).await, read_all(stderr).await), ("one two".into(), "done\n".into()));
        let client = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(pipes.path("stdin"));
        assert_eq!(client.unwrap_err().raw_os_error(), Some(libc::ENXIO));
    });
}

#[test]
fn the_child_gets_the_fifo_itself_in_blocking_mode() {
    run(async {
        let (pipes, mut context) = (Pipes::new(), context());
        let root = nix::unistd::geteuid().is_root();
        if root {
            context.owner = (70_000, 70_001);
        }
        let io = ProcessIo::open(&pipes.stdio(false), &context).await.unwrap();
        let fds = io.child_fds().unwrap();
        for (fd, name) in [(&fds.stdin, "stdin"), (&fds.stdout, "stdout"), (&fds.stderr, "stderr")] {
            let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL).unwrap());
            assert!(!flags.contains(OFlag::O_NONBLOCK), "{name}");
            let flags = FdFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFD).unwrap());
            assert!(flags.contains(FdFlag::FD_CLOEXEC), "{name}");
            let file = File::from(fd.try_clone().unwrap());
            let (given, named) = (file.metadata().unwrap(), fs::metadata(pipes.path(name)).unwrap());
            assert_eq!(given.ino(), named.ino());
            assert!(!root || (named.uid(), named.gid()) == (70_000, 70_001));
        }
    });
}

/// The context of a daemon, and that of the next one, which has what the first has left.
fn contexts() -> (MemoryHolder, IoContext, impl Fn(&MemoryHolder) -> IoContext) {
    let holder = MemoryHolder::default();
    let next = |holder: &MemoryHolder| IoContext { fds: holder.store(), ..context() };
    let first = next(&holder);
    (holder, first, next)
}

#[test]
fn stdin_is_not_closed_by_the_death_of_a_daemon() {
    run(async {
        let pipes = Pipes::new();
        let (holder, context, next) = contexts();
        let first = ProcessIo::open(&pipes.stdio(false), &context).await.unwrap();
        let child = start(&first, &context, "exec cat >/dev/null");
        let second = ProcessIo::adopt(&pipes.stdio(false), &next(&holder)).unwrap();
        drop(first);
        let mut exit = child.exit;
        assert!(timeout(Duration::from_millis(100), &mut exit).await.is_err());
        second.close_stdin();
        assert_eq!(exit.await.status, 0);
        assert!(holder.names().is_empty());
    });
}

#[test]
fn output_streams_outlive_a_daemon() {
    run(async {
        let (holder, context, next) = contexts();
        let url = |id: &str| format!("ttrpc+unix:///x?streaming_id={id}");
        let stdio = Stdio { stdout: url("out"), stderr: url("err"), ..Stdio::default() };
        let first = ProcessIo::open(&stdio, &context).await.unwrap();
        // More than a pipe holds, and only SIGPIPE would end it early.
        let child = start(&first, &context, "head -c 300000 /dev/zero; sleep 0.1; echo; exit 3");
        let second = ProcessIo::adopt(&stdio, &next(&holder)).unwrap();
        drop(first);
        assert_eq!(child.exit.await.status, 3);
        drop(second);
        assert!(holder.names().is_empty());
    });
}

#[test]
fn a_terminal_outlives_a_daemon() {
    run(async {
        let pipes = Pipes::new();
        let (holder, context, next) = contexts();
        let stdio = pipes.stdio(true);
        let tty = Tty::new(&stdio, &context).await;
        let second = Terminal::adopt(&stdio, &next(&holder)).await.unwrap().unwrap();
        let Tty { terminal, slave } = tty;
        drop(terminal);
        let mut output = OpenOptions::new().read(true).write(true).open(pipes.path("stdout")).unwrap();
        File::from(slave).write_all(b"still here").unwrap();
        let mut said = [0; 10];
        output.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"still here");
        drop(second);
        // Its output task, which may be at work on another thread, ends a moment after it was told to.
        while !holder.names().is_empty() {
            tokio::task::yield_now().await;
        }
        // Of one that nobody has left there is nothing to go on with.
        assert!(Terminal::adopt(&stdio, &next(&holder)).await.unwrap().is_none());
    });
}

#[test]
fn output_without_a_reader_is_kept_until_it_is_read_also_by_the_next_daemon() {
    run(async {
        let pipes = Pipes::new();
        let (holder, first, next) = contexts();
        let stdio = Stdio { stdin: String::new(), ..pipes.stdio(false) };
        let io = ProcessIo::open(&stdio, &first).await.unwrap();
        start(&io, &first, "echo said; echo told >&2").exit.await;
        io.finish().await;
        // The daemon dies, and the one after it.
        drop(first);
        std::mem::forget(io);
        let second = next(&holder);
        let io = ProcessIo::adopt(&stdio, &second).unwrap();
        io.finish().await;
        // containerd comes back, and crashes before it has read anything.
        drop(pipes.reader("stdout"));
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (stdout, stderr) = (pipes.reader("stdout"), pipes.reader("stderr"));
        assert_eq!((read_all(stdout).await, read_all(stderr).await), ("said\n".into(), "told\n".into()));
        // Nothing is kept of what was read, nor of a process that is deleted.
        until("the end of what is kept", || holder.names().is_empty()).await;
        let third = IoContext { name: "pod/c1/2".into(), ..second.clone() };
        let io = ProcessIo::open(&stdio, &third).await.unwrap();
        start(&io, &third, "echo unheard").exit.await;
        io.finish().await;
        assert!(!holder.names().is_empty());
        drop(io);
        until("the end of what is kept", || holder.names().is_empty()).await;
    });
}

#[test]
fn output_that_was_left_with_a_reading_end_is_kept_by_a_writing_end() {
    run(async {
        let pipes = Pipes::new();
        let (holder, first, next) = contexts();
        let stdio = Stdio { stdout: pipes.text("stdout"), ..Stdio::default() };
        let mut both = OpenOptions::new().read(true).write(true).open(pipes.path("stdout")).unwrap();
        std::mem::forget(first.fds.leave(first.held("stdout"), &[both.as_fd()]).unwrap());
        both.write_all(b"said").unwrap();
        drop(both);
        let io = ProcessIo::adopt(&stdio, &next(&holder)).unwrap();
        io.finish().await;
        assert!(!holder.names().is_empty());
        assert_eq!(read_all(pipes.reader("stdout")).await, "said");
        until("the end of what is kept", || holder.names().is_empty()).await;
    });
}

#[test]
fn what_is_not_there_or_no_fifo_is_named() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let mut stdio = pipes.stdio(false);
        stdio.stderr = pipes.text("gone");
        let error = ProcessIo::open(&stdio, &context).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        let text = error.to_string();
        assert!(
            text.starts_with("invalid stderr: /") && text.contains("gone does not exist; containerd makes this FIFO"),
            "{text}"
        );
        fs::write(pipes.path("gone"), "").unwrap();
        let text = ProcessIo::open(&stdio, &context).await.unwrap_err().to_string();
        assert!(text.contains("gone is not a FIFO"), "{text}");
    });
}

#[test]
fn a_log_file_takes_both_and_is_appended_to() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let log = pipes.path("logs/of/c1.log");
        for word in ["first", "second"] {
            let stdio = Stdio { stdout: format!("file://{}?maxsize=1", log.display()), ..Stdio::default() };
            let io = ProcessIo::open(&stdio, &context).await.unwrap();
            // Nor can the process empty it.
            let child = start(&io, &context, &format!("echo {word}; echo error >/dev/stderr; : >/dev/stdout; cat"));
            assert_eq!(child.exit.await.status, 0);
            io.finish().await;
        }
        assert_eq!(fs::read_to_string(log).unwrap(), "first\nerror\nsecond\nerror\n");
    });
}

/// Each daemon waits for what was written while the one before it ran.
#[test]
fn a_log_file_outlives_a_daemon() {
    run(async {
        let pipes = Pipes::new();
        let (holder, context, next) = contexts();
        let log = pipes.path("log");
        let stdio = Stdio { stdout: format!("file://{}", log.display()), ..Stdio::default() };
        let first = ProcessIo::open(&stdio, &context).await.unwrap();
        let child = start(&first, &context, "head -c 300000 /dev/zero; sleep 0.1; echo end; exit 3");
        let second = ProcessIo::adopt(&stdio, &next(&holder)).unwrap();
        drop(first);
        assert_eq!(child.exit.await.status, 3);
        second.finish().await;
        let text = fs::read(log).unwrap();
        assert!(text.len() == 300_004 && text.ends_with(b"\0end\n"), "{}", text.len());
        drop(second);
        assert!(holder.names().is_empty());
    });
}

/// The next daemon goes on with the writer; where that is not there, and its file cannot be opened, the output goes nowhere.
#[test]
fn a_terminals_log_outlives_a_daemon() {
    run(async {
        let pipes = Pipes::new();
        let (holder, context, next) = contexts();
        let log = pipes.path("log");
        let stdio = Stdio { stdout: format!("file://{}", log.display()), terminal: true, ..Stdio::default() };
        let Tty { terminal, slave } = Tty::new(&stdio, &context).await;
        File::from(slave.try_clone().unwrap()).write_all(b"first ").unwrap();
        while fs::metadata(&log).unwrap().len() < 6 {
            tokio::task::yield_now().await;
        }
        // It is not opened again.
        let moved = pipes.path("moved");
        fs::rename(&log, &moved).unwrap();
        fs::create_dir(&log).unwrap();
        let (second, third) = (next(&holder), next(&holder));
        let second = Terminal::adopt(&stdio, &second).await.unwrap().unwrap();
        drop(terminal);
        File::from(slave.try_clone().unwrap()).write_all(b"second").unwrap();
        while fs::metadata(&moved).unwrap().len() < 12 {
            tokio::task::yield_now().await;
        }
        assert_eq!(fs::read_to_string(&moved).unwrap(), "first second");
        drop(second);

        // The version before has not parked the pipe.
        drop(third.fds.take(&third.held("output")).unwrap());
        let third = Terminal::adopt(&stdio, &third).await.unwrap().unwrap();
        let mut slave = File::from(slave);
        tokio::task::spawn_blocking(move || slave.write_all(&[b'x'; 100_000]).unwrap()).await.unwrap();
        third.finish().await;
        drop(third);
    });
}

/// A daemon may die when it has connected some of a process's streams in a virtual machine.
#[test]
fn only_what_is_missing_is_opened() {
    run(async {
        let pipes = Pipes::new();
        let (holder, context, next) = contexts();
        let uri = |name: &str| format!("file://{}", pipes.path(name).display());
        let stdio = Stdio { stdout: uri("out.log"), stderr: uri("err.log"), ..Stdio::default() };
        let parked = |which: &str| {
            let (parked, held) = holder.store().take(&context.held(which)).unwrap();
            held.keep();
            File::from(parked.into_iter().next().unwrap()).metadata().unwrap().ino()
        };
        let first = ProcessIo::open(&stdio, &context).await.unwrap();
        let mut stdout = File::from(first.child_fds().unwrap().stdout);
        let before = (parked("log-out"), parked("log-err"));
        let second = ProcessIo::open_missing(&stdio, &next(&holder), &["stderr"]).await.unwrap();
        assert!(parked("log-out") == before.0 && parked("log-err") != before.1);
        let mut stderr = File::from(second.child_fds().unwrap().stderr);
        stdout.write_all(b"out").unwrap();
        stderr.write_all(b"err").unwrap();
        drop((first, stdout, stderr));
        // Waits for both writers.
        second.finish().await;
        let text = |name: &str| fs::read_to_string(pipes.path(name)).unwrap();
        assert_eq!((text("out.log").as_str(), text("err.log").as_str()), ("out", "err"));
    });
}

#[test]
fn a_log_that_cannot_be_opened_is_named() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        fs::create_dir(pipes.path("log")).unwrap();
        for (path, why) in [(pipes.text("log"), "failed to open log file"), ("/dev/null".into(), "is not a regular file")] {
            let stdio = Stdio { stdout: format!("file://{path}"), ..Stdio::default() };
            let error = ProcessIo::open(&stdio, &context).await.unwrap_err().report();
            assert!(error.contains(&path) && error.contains(why), "{error}");
        }
    });
}

#[test]
fn streams_carry_everything() {
    run(async {
        let context = context();
        let url = |name: &str| format!("ttrpc+unix:///run/kuasar/task.sock?streaming_id=c1-{name}");
        let stdio = Stdio { stdin: url("stdin"), stdout: url("stdout"), stderr: url("stderr"), terminal: false };
        let ends = ["stdin", "stdout", "stderr"].map(|name| context.streams.attach(&format!("c1-{name}")));
        let io = ProcessIo::open(&stdio, &context).await.unwrap();
        let child = start(&io, &context, "cat; echo error >&2");
        let [stdin, stdout, stderr] = ends;
        let text = "0123456789".repeat(30_000);
        let writing = tokio::spawn({
            let text = text.clone();
            async move { stdin.write(text.as_bytes()).await }
        });
        let stdout = tokio::spawn(async move { collect(&stdout).await });
        writing.await.unwrap().unwrap();
        io.close_stdin();
        assert_eq!(child.exit.await.status, 0);
        let stderr = tokio::spawn(async move { collect(&stderr).await });
        io.finish().await;
        assert_eq!((stdout.await.unwrap() == text, stderr.await.unwrap().as_str()), (true, "error\n"));
        assert!(ProcessIo::open(&stdio, &context).await.is_err(), "the streams still belong to the first process");
        drop(io);
        ProcessIo::open(&stdio, &context).await.unwrap();
    });
}

/// The start of a log URI for a script. Run by sh, because a file that was just written may still be open for writing in a
/// child that another test forks, and cannot be executed then.
fn logger(pipes: &Pipes, scheme: &str, script: &str) -> String {
    let path = pipes.path("logger");
    fs::write(&path, script).unwrap();
    format!("{scheme}:///bin/sh?{}=", path.display())
}

/// Pipes among our descriptors that every child gets.
fn inherited_pipes() -> usize {
    let close_on_exec = |fd: &str| {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        flags.is_none_or(|flags| flags & libc::O_CLOEXEC != 0)
    };
    let all = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let passed_on = all.filter(|fd| fd.parse::<i32>().unwrap() > 2 && !close_on_exec(fd));
    passed_on
        .filter(|fd| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|to| to.to_string_lossy().starts_with("pipe:")))
        .count()
}

#[test]
fn a_log_program_gets_both_streams_its_arguments_and_who_it_is_for() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let log = pipes.text("log");
        let uri = logger(
            &pipes,
            "binary",
            r#"exec >"$3"; exec 5>&-
            echo "$2 $CONTAINER_NAMESPACE/$CONTAINER_ID $(env | grep -vc '^\(CONTAINER_\|PWD=\|_=\|SHLVL=\|OLDPWD=\)')"
            cat <&3; cat <&4; echo end; ls -l /proc/$$/fd"#,
        );
        let stdio = Stdio { stdout: format!("{uri}&log={}", log.replace('/', "%2F")), ..Stdio::default() };
        let io = ProcessIo::open(&stdio, &context).await.unwrap();
        let child = start(&io, &context, "echo out; echo error >&2");
        assert_eq!(child.exit.await.status, 0);
        io.finish().await;
        let text = fs::read_to_string(&log).unwrap();
        let (text, descriptors) = text.split_once("end\n").unwrap();
        assert_eq!(text, "log k8s.io/c1 0\nout\nerror\n");
        // Its pipes are the two it is given, besides those that this very process has inherited.
        let pipes = descriptors.lines().filter(|line| line.contains("-> pipe:")).count();
        assert_eq!(pipes, 2 + inherited_pipes(), "{descriptors}");
    });
}

#[test]
fn a_log_program_that_does_not_get_ready_is_an_error_and_no_process() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let open = |uri: String, context: IoContext| async move {
            let stdio = Stdio { stdout: uri, ..Stdio::default() };
            ProcessIo::open(&stdio, &context).await
        };
        // The older protocol takes the end of descriptor 5 for readiness.
        open(logger(&pipes, "binary", "exit 1"), context.clone()).await.unwrap();
        let error = open(logger(&pipes, "binary-v2", "exit 1"), context.clone()).await.unwrap_err();
        assert!(error.to_string().starts_with("sh failed to get ready"), "{error}");
        let error = open("binary:///nonexistent/logger".into(), context).await.unwrap_err();
        assert_eq!(error.to_string(), "failed to start log program /nonexistent/logger");
    });
}

struct Tty {
    terminal: Terminal,
    slave: OwnedFd,
}

impl Tty {
    async fn new(stdio: &Stdio, context: &IoContext) -> Self {
        let pty = openpty(None, None).unwrap();
        // Kept from the children: whoever has the slave open keeps the terminal open.
        fcntl(&pty.slave, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        Self { terminal: Terminal::new(pty.master, stdio, context).await.unwrap(), slave: pty.slave }
    }

    fn start(&self, context: &IoContext, script: &str) -> Child {
        let slave = || self.slave.as_fd().try_clone_to_owned().unwrap();
        let mut command = Command::new("setsid");
        command.args(["-c", "sh", "-c", script]).stdin(slave()).stdout(slave()).stderr(slave());
        context.reaper.spawn(&mut command).unwrap()
    }
}

#[test]
fn a_terminal_between_fifos() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let stdout = pipes.reader("stdout");
        let tty = Tty::new(&pipes.stdio(true), &context).await;
        tty.terminal.resize(WindowSize { width: 132, height: 43 }).unwrap();
        let child = tty.start(&context, "stty -echo; stty size; cat; echo end");
        let Tty { terminal, slave } = tty;
        drop(slave);
        // No end of line: the end-of-file character must be sent twice.
        pipes.writer().write_all(b"one\ntwo").unwrap();
        let mut exit = child.exit;
        assert!(timeout(Duration::from_millis(200), &mut exit).await.is_err(), "input ended with its client");
        terminal.close_stdin();
        assert_eq!(exit.await.status, 0);
        terminal.finish().await;
        drop(terminal);
        let text = read_all(stdout).await;
        // What came before `stty -echo` is echoed.
        assert!(text.contains("43 132\r\n") && text.ends_with("one\r\ntwoend\r\n"), "{text:?}");
    });
}

#[test]
fn a_terminal_gives_everything_to_a_slow_reader() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let stdio = Stdio { stdin: String::new(), ..pipes.stdio(true) };
        let tty = Tty::new(&stdio, &context).await;
        let child = tty.start(&context, "seq 1 60000");
        let Tty { terminal, slave } = tty;
        drop(slave);
        let mut exit = child.exit;
        // The FIFO takes 64 KiB; the process waits for a reader.
        assert!(timeout(Duration::from_millis(200), &mut exit).await.is_err());
        let reading = tokio::spawn(read_all(pipes.reader("stdout")));
        assert_eq!(exit.await.status, 0);
        terminal.finish().await;
        drop(terminal);
        let lines: Vec<String> = (1..=60_000).map(|line| format!("{line}\r\n")).collect();
        assert!(reading.await.unwrap() == lines.concat());
    });
}

#[test]
fn a_terminal_between_streams_and_into_a_log() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let url = |name: &str| format!("ttrpc+unix:///s?streaming_id=t-{name}");
        let stdio = Stdio { stdin: url("in"), stdout: url("out"), stderr: "/ignored".into(), terminal: true };
        let (stdin, stdout) = (context.streams.attach("t-in"), context.streams.attach("t-out"));
        let tty = Tty::new(&stdio, &context).await;
        let child = tty.start(&context, "stty -echo; echo ready; cat");
        let Tty { terminal, slave } = tty;
        drop(slave);
        let first = stdout.next().await.unwrap().unwrap();
        assert_eq!(&*first, b"ready\r\n");
        first.sent();
        stdin.write(b"hello\n").await.unwrap();
        drop(stdin);
        terminal.close_stdin();
        let reading = tokio::spawn(async move { collect(&stdout).await });
        assert_eq!(child.exit.await.status, 0);
        terminal.finish().await;
        assert_eq!(reading.await.unwrap(), "hello\r\n");

        let log = pipes.path("terminal.log");
        let stdio = Stdio { stdout: format!("file://{}", log.display()), terminal: true, ..Stdio::default() };
        let tty = Tty::new(&stdio, &context).await;
        let child = tty.start(&context, "echo logged");
        drop(tty.slave);
        assert_eq!(child.exit.await.status, 0);
        tty.terminal.finish().await;
        assert_eq!(fs::read_to_string(log).unwrap(), "logged\r\n");
    });
}

#[test]
fn a_terminal_that_is_held_open_does_not_delay_the_end_for_long() {
    run(async {
        let (pipes, context) = (Pipes::new(), context());
        let tty = Tty::new(&Stdio { stdin: String::new(), ..pipes.stdio(true) }, &context).await;
        let child = tty.start(&context, "exit 3");
        assert_eq!(child.exit.await.status, 3);
        let before = Instant::now();
        tty.terminal.finish().await;
        assert!(before.elapsed() < Duration::from_secs(5));
    });
}

fn descriptors() -> usize {
    fs::read_dir(Path::new("/proc/self/fd")).unwrap().count()
}

#[test]
fn nothing_stays_open() {
    run(async {
        let context = context();
        // Other tests of this process open descriptors too, so a leak shows as growth over many rounds.
        let mut counts = Vec::new();
        for round in 0..40 {
            let pipes = Pipes::new();
            let uri = logger(&pipes, "binary", "exec 5>&-; cat <&3 >/dev/null");
            let io = ProcessIo::open(&pipes.stdio(false), &context).await.unwrap();
            let logged = Stdio { stdout: uri, ..Stdio::default() };
            let log = ProcessIo::open(&logged, &context).await.unwrap();
            let streamed = Stdio { stdout: "ttrpc+unix:///s?streaming_id=x".into(), ..Stdio::default() };
            let stream = ProcessIo::open(&streamed, &context).await.unwrap();
            let end = context.streams.attach("x");
            let tty = Tty::new(&pipes.stdio(true), &context).await;
            log.finish().await;
            drop((io, log, stream, end, tty));
            if round % 10 == 0 {
                counts.push(descriptors());
            }
        }
        until("the last descriptors' closing", || descriptors() < counts[0] + 30).await;
    });
}
