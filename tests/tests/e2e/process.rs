//! What a container's processes are given, and ExecSync.

use anyhow::{Result, ensure};
use futures::future::try_join_all;
use kuasar_tests::ContainerSpec;
use tonic::Code;

use crate::suite::{Case, Entry, cases, eventually, refused};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Stdio Shared:
        output_is_whole_and_apart,
        exit_codes_are_true,
        an_exec_that_takes_too_long_is_killed,
        an_exec_leaves_a_daemon_behind,
        many_execs_at_once,
        what_cannot_be_run_says_why,
    ];
    cases.extend(cases![Handlers Shared:
        environment_and_directory,
        an_exec_is_part_of_the_container,
        stop_ends_execs_too,
    ]);
    cases
}

async fn exit_codes_are_true(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    for code in [0, 1, 7, 126, 127, 255] {
        assert_eq!(container.sh(&format!("exit {code}")).await?.exit_code, code);
    }
    // As a shell says it: 128 and the signal.
    assert_eq!(container.sh("kill -9 $$").await?.exit_code, 137);
    assert_eq!(container.sh("kill -TERM $$").await?.exit_code, 143);
    Ok(())
}

async fn output_is_whole_and_apart(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let ran = container.sh("echo out; echo err >&2; printf tail").await?;
    assert_eq!((ran.stdout().as_str(), ran.stderr().as_str()), ("out\ntail", "err\n"));
    let nothing = container.exec(["true"]).await?;
    assert_eq!((nothing.out.len(), nothing.err.len()), (0, 0));

    // More than any buffer on the way holds, on both at once; and bytes that are no text.
    let ran = container.sh("seq 1 400000 & seq 400001 700000 >&2; wait").await?;
    let numbers = |range: std::ops::RangeInclusive<u32>| range.map(|number| format!("{number}\n")).collect::<String>();
    ensure!(ran.stdout() == numbers(1..=400_000), "stdout is not whole: {} bytes", ran.out.len());
    ensure!(ran.stderr() == numbers(400_001..=700_000), "stderr is not whole: {} bytes", ran.err.len());
    assert_eq!(container.exec(["printf", r"\000\377\r\n\n"]).await?.out, b"\x00\xff\r\n\n");
    Ok(())
}

async fn an_exec_that_takes_too_long_is_killed(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let error = container.exec_timeout(["sleep", "4321"], 1).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    eventually("the exec to be gone", || async { Ok(container.sh("ps | grep '[s]leep 4321'").await?.exit_code == 1) }).await?;
    // In time is in time.
    assert_eq!(container.exec_timeout(["true"], 30).await?.exit_code, 0);
    Ok(())
}

async fn an_exec_leaves_a_daemon_behind(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let ran = container.sh("sleep 4321 </dev/null >/dev/null 2>&1 & echo started").await?;
    assert_eq!((ran.exit_code, ran.stdout().as_str()), (0, "started\n"));
    assert_eq!(container.sh("ps | grep '[s]leep 4321'").await?.exit_code, 0, "it still runs");
    Ok(())
}

async fn many_execs_at_once(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let one = |number: i32| {
        let container = container.clone();
        async move {
            let ran = container.sh(&format!("echo {number}; exit {number}")).await?;
            ensure!((ran.exit_code, ran.stdout()) == (number, format!("{number}\n")), "{number}: {ran:?}");
            Ok(())
        }
    };
    try_join_all((0..25).map(one)).await?;
    Ok(())
}

async fn what_cannot_be_run_says_why(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    refused(container.exec(["/no/such/program"]).await, &["/no/such/program"])?;
    // Every OCI runtime has words of its own for this.
    refused(container.exec(["/etc/passwd"]).await, &[])?;
    refused(container.exec([""; 0]).await, &[])?;
    // And is forgotten: the next exec, and the end of the container, find nothing in their way.
    assert_eq!(container.sh("exit 3").await?.exit_code, 3);
    container.stop(0).await?;
    refused(container.exec(["true"]).await, &[])?;
    Ok(())
}

async fn environment_and_directory(case: &Case) -> Result<()> {
    let spec = ContainerSpec::new("c")
        .command(&["sh", "-c", "echo \"$0 $1 $KEY $PWD\"; exec sleep 1000"])
        .args(&["first", "second one"])
        .env("KEY", "a value = 'x'")
        .working_dir("/made/on/the/way");
    let container = case.container(spec).await?;
    let line = container.wait_log("first").await?;
    assert_eq!(line.text, "first second one a value = 'x' /made/on/the/way");
    let ran = container.sh("echo \"$KEY $PWD\"; test -n \"$PATH\"").await?;
    assert_eq!((ran.exit_code, ran.stdout().as_str()), (0, "a value = 'x' /made/on/the/way\n"));
    Ok(())
}

async fn an_exec_is_part_of_the_container(case: &Case) -> Result<()> {
    let spec = ContainerSpec::new("c").sleep().user(1234, Some(2345)).groups(&[3456]).add_capabilities(&["NET_ADMIN"]);
    let container = case.pod().await?.run(spec).await?;
    let same = |what: &str| format!("for f in {what}; do readlink /proc/1/ns/$f; readlink /proc/self/ns/$f; done");
    // Its own number 1 runs as another user's process would: readable for the same one.
    let ran = container.sh(&same("mnt pid net ipc uts cgroup")).await?;
    let links: Vec<String> = ran.stdout().lines().map(str::to_owned).collect();
    assert_eq!(links.len(), 12, "{ran:?}");
    for pair in links.chunks(2) {
        assert_eq!(pair[0], pair[1]);
    }
    assert_eq!(container.exec(["id"]).await?.stdout(), "uid=1234 gid=2345 groups=2345,3456\n");
    let ran = container.sh("for p in 1 self; do grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/$p/status; done").await?;
    let all = ran.stdout();
    let lines: Vec<&str> = all.lines().collect();
    let (init, exec) = lines.split_at(lines.len() / 2);
    assert_eq!(init, exec);
    let ran = container.sh("cat /proc/1/cgroup; echo; cat /proc/self/cgroup").await?.stdout();
    let (init, exec) = ran.split_once("\n\n").unwrap_or_default();
    assert_eq!(init.trim(), exec.trim());
    Ok(())
}

async fn stop_ends_execs_too(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let running = {
        let container = container.clone();
        tokio::spawn(async move { container.sh("echo up >/up; exec sleep 4321").await })
    };
    eventually("the exec to run", || async { Ok(container.exec(["test", "-e", "/up"]).await?.exit_code == 0) }).await?;
    container.stop(0).await?;
    let ran = running.await??;
    assert_eq!(ran.exit_code, 137);
    Ok(())
}
