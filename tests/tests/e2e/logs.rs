//! What a container prints.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::cri::SOON;
use kuasar_tests::cri::k8s_cri::v1::ContainerState;
use kuasar_tests::cri::logs::{self, Line};
use kuasar_tests::{ContainerSpec, tools, wait};

use crate::suite::{Case, Entry, Lone, cases, eventually};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Stdio Shared:
        many_lines_are_all_there_in_order,
        both_streams_are_apart,
        long_lines_and_odd_bytes,
        what_was_printed_last_is_there,
        a_burst_before_the_end_is_whole,
        a_rotated_log_goes_on_in_a_new_file,
        no_log_is_asked_for,
        a_terminal_is_logged_too,
    ];
    cases.extend(cases![Ours Alone: output_of_what_ends_while_containerd_is_away]);
    cases
}

fn texts(lines: &[Line], is_stderr: bool) -> Vec<&str> {
    lines.iter().filter(|line| line.is_stderr == is_stderr).map(|line| line.text.as_str()).collect()
}

fn assert_counts_up(lines: &[&str], to: usize) -> Result<()> {
    for (index, text) in lines.iter().enumerate() {
        ensure!(*text == (index + 1).to_string(), "line {} is {text:?}", index + 1);
    }
    ensure!(lines.len() == to, "{} lines of {to}", lines.len());
    Ok(())
}

async fn many_lines_are_all_there_in_order(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").command(&["seq", "1", "100000"])).await?;
    assert_eq!(container.wait_exit().await?.exit_code, 0);
    // containerd writes the log beside, and says "exited" when the pipe is drained; the file follows at once.
    container.wait_log("100000").await?;
    assert_counts_up(&texts(&container.logs()?, false), 100_000)
}

async fn both_streams_are_apart(case: &Case) -> Result<()> {
    let script = "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo $i; echo $i >&2; done; echo last";
    let container = case.container(ContainerSpec::new("c").sh(script)).await?;
    container.wait_log("last").await?;
    container.wait_exit().await?;
    eventually("the last line of stderr", || async { Ok(texts(&container.logs()?, true).last() == Some(&"2000")) }).await?;
    let lines = container.logs()?;
    assert_counts_up(&texts(&lines, true), 2000)?;
    let mut out = texts(&lines, false);
    assert_eq!(out.pop(), Some("last"));
    assert_counts_up(&out, 2000)
}

async fn long_lines_and_odd_bytes(case: &Case) -> Result<()> {
    // CRI cuts long lines into parts; together they are the line.
    let script = "head -c 300000 /dev/zero | tr '\\0' x; echo; echo; printf 'a\\tb \\303\\244\\n'; echo last";
    let container = case.container(ContainerSpec::new("c").sh(script)).await?;
    container.wait_log("last").await?;
    let lines = container.logs()?;
    let out = texts(&lines, false);
    assert_eq!(out[0].len(), 300_000);
    assert_eq!(&out[1..], ["", "a\tb ä", "last"]);
    Ok(())
}

async fn what_was_printed_last_is_there(case: &Case) -> Result<()> {
    let pod = case.quick_pod().await?;
    for round in 0..5 {
        let container = pod.run(ContainerSpec::new("c").sh(&format!("echo first; printf 'end of {round}'"))).await?;
        container.wait_exit().await?;
        container.wait_log(&format!("end of {round}")).await?;
        container.remove().await?;
    }
    Ok(())
}

async fn a_burst_before_the_end_is_whole(case: &Case) -> Result<()> {
    const BYTES: usize = 8 << 20;
    // One write after the other, and none after the last.
    let script = format!("head -c {BYTES} /dev/zero | tr '\\0' z; exit 3");
    let container = case.container(ContainerSpec::new("c").sh(&script)).await?;
    assert_eq!(container.wait_exit().await?.exit_code, 3);
    eventually("the whole log", || async { Ok(container.logs()?.iter().map(|line| line.text.len()).sum::<usize>() >= BYTES) })
        .await?;
    let lines = container.logs()?;
    assert_eq!(lines.iter().map(|line| line.text.len()).sum::<usize>(), BYTES);
    assert!(lines.iter().all(|line| line.text.bytes().all(|byte| byte == b'z')));
    Ok(())
}

async fn a_rotated_log_goes_on_in_a_new_file(case: &Case) -> Result<()> {
    let script = "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo $i; [ $((i%100)) != 0 ] || sleep 0.02; done; exec sleep 1000";
    let container = case.container(ContainerSpec::new("c").sh(script)).await?;
    let Some(log) = container.log.clone() else { anyhow::bail!("no log") };
    container.wait_log("500").await?;
    let old = log.with_extension("old");
    std::fs::rename(&log, &old)?;
    container.reopen_log().await?;
    container.wait_log("3000").await?;
    let (old, new) = (logs::read(&old)?, logs::read(&log)?);
    ensure!(!old.is_empty() && !new.is_empty());
    let all: Vec<Line> = old.into_iter().chain(new).collect();
    assert_counts_up(&texts(&all, false), 3000)
}

async fn no_log_is_asked_for(case: &Case) -> Result<()> {
    // Nobody reads what it prints; it must neither stop nor fail.
    let container = case.container(ContainerSpec::new("c").command(&["seq", "1", "100000"]).log_path("")).await?;
    assert_eq!(container.wait_exit().await?.exit_code, 0);
    Ok(())
}

async fn a_terminal_is_logged_too(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").sh("tty; echo to stderr >&2; seq 1 5000").tty()).await?;
    container.wait_log("5000").await?;
    assert_eq!(container.wait_exit().await?.exit_code, 0);
    let lines = container.logs()?;
    // A terminal is one stream, and writes CR LF.
    assert!(texts(&lines, true).is_empty());
    let out: Vec<&str> = texts(&lines, false).into_iter().map(|text| text.trim_end_matches('\r')).collect();
    assert_eq!(out[..2], ["/dev/pts/0", "to stderr"]);
    assert_counts_up(&out[2..], 5000)
}

async fn output_of_what_ends_while_containerd_is_away(lone: &Lone) -> Result<()> {
    // Longer than anything waits for a reader that may be slow.
    const AWAY: Duration = Duration::from_secs(14);
    // About what a pipe holds; with a machine there are several, one behind the other.
    let lines = if tools::is_machine(&lone.handler) { 40_000 } else { 10_000 };
    let mut node = lone.node().await?;
    let before = lone.baseline(&node).await?;
    let flags = node.dir().join("run/flags");
    fs::create_dir(&flags)?;
    let pod = node.run_pod(lone.pod()).await?;
    for (name, worker_dies) in [("ending", false), ("ending-twice", true)] {
        let script = |lines: usize| {
            let print = format!("seq 1 {lines}; seq 1 {lines} >&2");
            format!("until test -e /flags/{name}; do sleep 0.05; done; {print}; touch /flags/$0-{name}; exit 3")
        };
        let command =
            |kind: &str, lines| ContainerSpec::new(&format!("{name}-{kind}")).command(&["sh", "-c", &script(lines), kind]);
        let plain = pod.run(command("plain", lines).mount(&flags, "/flags", false)).await?;
        let terminal = pod.run(command("terminal", 1000).tty().mount(&flags, "/flags", false)).await?;
        node.containerd.stop()?;
        fs::write(flags.join(name), "")?;
        for kind in ["plain", "terminal"] {
            let done = flags.join(format!("{kind}-{name}"));
            wait::until(&format!("{}", done.display()), SOON, || async { Ok(done.exists().then_some(())) }).await?;
        }
        // How long is what this is about.
        tokio::time::sleep(AWAY / 2).await;
        if worker_dies {
            let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
            let killed = kuasard.kill_worker().await?;
            kuasard.wait_serving(killed).await?;
        }
        tokio::time::sleep(AWAY / 2).await;
        node.containerd.start().await?;
        for container in [&plain, &terminal] {
            let exited = container.wait_exit().await?;
            assert_eq!((exited.state(), exited.exit_code), (ContainerState::ContainerExited, 3));
        }
        let printed = plain.logs()?;
        for is_stderr in [false, true] {
            assert_counts_up(&texts(&printed, is_stderr), lines).with_context(|| format!("{name}, stderr: {is_stderr}"))?;
        }
        let printed = terminal.logs()?.len();
        ensure!(printed == 2000, "{name}: {printed} lines of the terminal's 2000");
        plain.remove().await?;
        terminal.remove().await?;
    }
    pod.remove_all().await?;
    fs::remove_dir_all(&flags)?;
    node.assert_no_leak(&before).await?;
    node.stop().await
}
