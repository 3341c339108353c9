//! Exec, attach and port-forward: what goes over an open connection.

use std::time::Duration;

use anyhow::{Result, ensure};
use kuasar_tests::ContainerSpec;
use kuasar_tests::cri::k8s_cri::v1::ContainerState;
use kuasar_tests::cri::stream::Session;
use kuasar_tests::image::recipes;
use sha2::{Digest as _, Sha256};

use crate::suite::{Case, Entry, cases, eventually};

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Stdio Shared:
        exec_carries_stdin_and_both_outputs,
        exec_carries_megabytes,
        exec_waits_for_what_it_leaves_behind,
        exec_with_a_terminal,
        a_terminal_passes_control_characters,
        a_client_that_hangs_up_ends_stdin,
        attach_reads_and_writes,
        stdin_once_ends_with_its_first_client,
        stdin_outlives_its_clients,
        attach_to_a_terminal,
    ];
    cases.extend(cases![Handlers Shared: port_forward_reaches_the_pod, what_cannot_be_executed_says_why]);
    cases
}

async fn exec_carries_stdin_and_both_outputs(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let script = "read line; echo \"out $line\"; echo \"err $line\" >&2; exit 9";
    let mut session = container.exec_session(&["sh", "-c", script], false, true).await?;
    session.write(b"hello\n").await?;
    assert_eq!(session.wait().await?, 9);
    assert_eq!((session.out.as_slice(), session.err.as_slice()), (b"out hello\n".as_slice(), b"err hello\n".as_slice()));
    Ok(())
}

async fn exec_carries_megabytes(case: &Case) -> Result<()> {
    const BYTES: usize = 4 << 20;
    let container = case.sleeper().await?;
    let mut session = container.exec_session(&["sh", "-c", "head -c 8388608 /dev/zero | tr '\\0' z"], false, false).await?;
    assert_eq!(session.wait().await?, 0);
    ensure!(session.out.len() == 8_388_608, "{} bytes arrived", session.out.len());
    ensure!(session.out.iter().all(|byte| *byte == b'z'));

    let data: Vec<u8> = (0..=250u8).cycle().take(BYTES).collect();
    let mut session = container.exec_session(&["sh", "-c", &format!("head -c {BYTES} | sha256sum")], false, true).await?;
    for chunk in data.chunks(32 << 10) {
        session.write(chunk).await?;
    }
    assert_eq!(session.wait().await?, 0);
    let digest: String = Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(String::from_utf8_lossy(&session.out), format!("{digest}  -\n"));
    Ok(())
}

async fn exec_waits_for_what_it_leaves_behind(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    // Longer than an agent waits before it tells of the end.
    let script = "(sleep 4; echo late; echo 'late, too' >&2) & echo soon; exit 7";
    let mut session = container.exec_session(&["sh", "-c", script], false, false).await?;
    assert_eq!(session.wait().await?, 7);
    assert_eq!((session.out.as_slice(), session.err.as_slice()), (b"soon\nlate\n".as_slice(), b"late, too\n".as_slice()));
    let ran = container.sh(script).await?;
    assert_eq!((ran.exit_code, ran.stdout().as_str(), ran.stderr().as_str()), (7, "soon\nlate\n", "late, too\n"));
    Ok(())
}

/// Gives the terminal of a shell a size, and waits until the shell says so: the size arrives on another channel than commands.
async fn resize(session: &mut Session, width: u16, height: u16) -> Result<()> {
    session.resize(width, height).await?;
    let wanted = format!("[{height} {width}]");
    // In quotes, or the terminal's echo of the command would be taken for the answer.
    for _ in 0..200 {
        let answers = session.out.len();
        session.write(b"echo \"[\"$(stty size)\"]\"\n").await?;
        session.wait_until(|out| String::from_utf8_lossy(&out[answers..]).contains("]\r\n")).await?;
        if String::from_utf8_lossy(&session.out[answers..]).contains(&wanted) {
            return Ok(());
        }
    }
    anyhow::bail!("no {wanted} in {:?}", String::from_utf8_lossy(&session.out))
}

async fn exec_with_a_terminal(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let mut session = container.exec_session(&["sh"], true, true).await?;
    resize(&mut session, 91, 23).await?;
    resize(&mut session, 120, 40).await?;
    // stderr goes to the terminal, too.
    session.write(b"tty; echo 'to' stderr >&2; exit 5\n").await?;
    assert_eq!(session.wait().await?, 5);
    let printed = String::from_utf8_lossy(&session.out).into_owned();
    assert!(printed.contains("/dev/pts/") && printed.contains("to stderr\r\n"), "{printed:?}");
    assert!(session.err.is_empty());
    Ok(())
}

async fn a_terminal_passes_control_characters(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    // Ctrl-C is SIGINT for whoever has the terminal.
    let mut session = container.exec_session(&["sh", "-c", "echo ready; exec sleep 1000"], true, true).await?;
    session.wait_for("ready").await?;
    session.write(b"\x03").await?;
    assert_eq!(session.wait().await?, 130);
    // Ctrl-D is the end of what is read.
    let mut session = container.exec_session(&["sh", "-c", "echo ready; cat; exit 6"], true, true).await?;
    session.wait_for("ready").await?;
    session.write(b"\x04").await?;
    assert_eq!(session.wait().await?, 6);
    Ok(())
}

async fn a_client_that_hangs_up_ends_stdin(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    let mut session = container.exec_session(&["sh", "-c", "tee /copy; echo end >>/copy"], false, true).await?;
    session.write(b"all of it\n").await?;
    session.wait_for("all of it").await?;
    session.close().await?;
    eventually("the exec to read its end", || async {
        Ok(container.exec(["cat", "/copy"]).await?.stdout() == "all of it\nend\n")
    })
    .await
}

async fn attach_reads_and_writes(case: &Case) -> Result<()> {
    let script = "while read line && test \"$line\" != quit; do echo \"out $line\"; echo \"err $line\" >&2; done; exit 3";
    let container = case.container(ContainerSpec::new("c").sh(script).stdin()).await?;
    let mut first = container.attach(false, true).await?;
    // containerd ends an attachment without stdin at once when the container has one.
    let mut second = container.attach(false, true).await?;
    // That a client is attached shows when it sees something: containerd attaches each stream by itself.
    let mut number = 0;
    while second.out.is_empty() || first.err.is_empty() {
        number += 1;
        ensure!(number < 1000, "the second client sees no output, or the first no errors");
        first.write(format!("{number}\n").as_bytes()).await?;
        first.wait_for(&format!("out {number}\n")).await?;
        // Cancelled or not, what has arrived is kept.
        let _ = tokio::time::timeout(Duration::from_millis(20), second.wait_for("out")).await;
    }
    first.write(b"end\n").await?;
    first.wait_for("out end\n").await?;
    second.wait_for("out end\n").await?;
    container.wait_log("err end").await?;
    first.write(b"quit\n").await?;
    assert_eq!(container.wait_exit().await?.exit_code, 3);
    assert!(first.err.starts_with(b"err "), "{:?}", String::from_utf8_lossy(&first.err));
    Ok(())
}

async fn stdin_once_ends_with_its_first_client(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").sh("cat; echo closed; exit 4").stdin_once()).await?;
    let mut session = container.attach(false, true).await?;
    session.write(b"hello\n").await?;
    session.wait_for("hello").await?;
    session.close().await?;
    assert_eq!(container.wait_exit().await?.exit_code, 4);
    container.wait_log("closed").await?;
    Ok(())
}

async fn stdin_outlives_its_clients(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").command(&["cat"]).stdin()).await?;
    for text in ["first\n", "second\n", "third\n"] {
        let mut session = container.attach(false, true).await?;
        session.write(text.as_bytes()).await?;
        session.wait_for(text).await?;
        session.close().await?;
        container.wait_log(text.trim()).await?;
    }
    assert_eq!(container.state().await?, ContainerState::ContainerRunning);
    Ok(())
}

async fn attach_to_a_terminal(case: &Case) -> Result<()> {
    let container = case.container(ContainerSpec::new("c").command(&["sh"]).tty().stdin()).await?;
    let mut session = container.attach(true, true).await?;
    resize(&mut session, 77, 19).await?;
    session.close().await?;
    assert_eq!(container.state().await?, ContainerState::ContainerRunning);
    let mut again = container.attach(true, true).await?;
    again.write(b"exit 8\n").await?;
    assert_eq!(container.wait_exit().await?.exit_code, 8);
    Ok(())
}

async fn port_forward_reaches_the_pod(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    let web = pod.run(ContainerSpec::new("web").image(recipes::WEB)).await?;
    web.wait_log("serving").await?;
    for _ in 0..3 {
        let reply = pod.port_forward(80).await?.request(b"GET / HTTP/1.1\r\n\r\n").await?;
        assert!(reply.ends_with(b"ok\n"), "{}", String::from_utf8_lossy(&reply));
    }
    // It listens on all addresses of the pod, and of no other.
    let error = match pod.port_forward(81).await {
        Ok(mut closed) => closed.request(b"GET / HTTP/1.1\r\n\r\n").await.unwrap_err(),
        Err(error) => error,
    };
    // What takes connections for a machine cannot know before it has taken one.
    let word = if case.is_machine() { "reset" } else { "refused" };
    assert!(format!("{error:#}").contains(word), "{error:#}");
    Ok(())
}

async fn what_cannot_be_executed_says_why(case: &Case) -> Result<()> {
    let container = case.sleeper().await?;
    for tty in [false, true] {
        let error = match container.exec_session(&["/no/such/program"], tty, false).await {
            Ok(mut session) => session.wait().await.unwrap_err(),
            Err(error) => error,
        };
        assert!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    }
    container.stop(0).await?;
    assert!(container.exec_session(&["true"], false, false).await.is_err());
    assert!(container.attach(false, false).await.is_err());
    Ok(())
}
