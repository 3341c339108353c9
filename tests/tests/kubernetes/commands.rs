//! What kubectl does with a running pod: exec, attach, cp, port-forward, debug, logs.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kuasar_tests::image::recipes;
use nix::pty::openpty;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::suite::{Case, Entry, cases, container, sh, sleeper, with};

/// How long a stream may take to say what it is to say.
const STREAM: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Entry> {
    cases![Shared:
        exec,
        exec_with_much_output,
        exec_with_a_terminal,
        attach,
        attach_to_a_terminal,
        cp,
        port_forward,
        debug_with_an_ephemeral_container,
        debug_with_a_copy,
        logs,
        logs_that_are_followed,
        logs_of_the_container_before,
    ]
}

async fn exec(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sleeper("a"), sleeper("b")] })).await?;
    let ran = case.sh(&pod, "echo out; echo err >&2; exit 7").await?;
    assert_eq!((ran.stdout.as_str(), ran.code()), ("out\n", 7));
    ensure!(ran.stderr.contains("err\n"), "{}", ran.stderr);
    let args = ["exec", "--stdin", &pod, "--container", "b", "--", "sh", "-c", "cat; hostname"];
    let ran = case.kubectl().run(&case.handler, &args, b"from afar\n").await?;
    assert_eq!((ran.stdout.as_str(), ran.code()), (format!("from afar\n{pod}\n").as_str(), 0));
    let ran = case.kubectl().run(&case.handler, &["exec", &pod, "--", "/no/such/program"], b"").await?;
    ensure!(ran.code() != 0 && ran.stderr.to_lowercase().contains("no such file"), "{} {}", ran.code(), ran.stderr);
    // Several at once do not get into each other's way.
    let many = (0..8).map(|number| {
        let pod = pod.clone();
        async move { case.prints(&pod, &format!("sleep 0.2; echo {number}")).await }
    });
    let printed = futures::future::try_join_all(many).await?;
    assert_eq!(printed, (0..8).map(|number| format!("{number}\n")).collect::<Vec<_>>());
    Ok(())
}

async fn exec_with_much_output(case: &Case) -> Result<()> {
    const BYTES: usize = 8 << 20;
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sleeper("c")] })).await?;
    let text = case.prints(&pod, &format!("head -c {BYTES} /dev/zero | tr '\\0' x")).await?;
    assert_eq!(text.len(), BYTES);
    let input = vec![b'y'; BYTES];
    let ran = case.kubectl().run(&case.handler, &["exec", "--stdin", &pod, "--", "wc", "-c"], &input).await?;
    assert_eq!(ran.stdout.trim(), BYTES.to_string());
    Ok(())
}

/// kubectl as at a terminal, and the terminal.
fn at_a_terminal(mut command: Command) -> Result<(Child, tokio::fs::File)> {
    let terminal = openpty(None, None).context("open a terminal")?;
    let slave = || terminal.slave.try_clone();
    let child = command.stdin(slave()?).stdout(slave()?).stderr(slave()?).spawn()?;
    Ok((child, std::fs::File::from(terminal.master).into()))
}

/// Reads until the terminal has shown this, and returns all.
async fn shown(terminal: &mut tokio::fs::File, what: &str) -> Result<String> {
    let mut text = String::new();
    let mut bytes = [0; 4096];
    let read = async {
        while !text.contains(what) {
            // EIO once all that wrote to it have gone.
            let Ok(count @ 1..) = terminal.read(&mut bytes).await else { break };
            text.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    };
    let in_time = tokio::time::timeout(STREAM, read).await.is_ok();
    ensure!(in_time && text.contains(what), "no {what:?} at the terminal: {text:?}");
    Ok(text)
}

async fn exec_with_a_terminal(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sleeper("c")] })).await?;
    let script = "tty; read line; echo \"got $line\"; stty size; exit 3";
    let (mut child, mut terminal) =
        at_a_terminal(case.kubectl().command(&case.handler, &["exec", "--stdin", "--tty", &pod, "--", "sh", "-c", script]))?;
    shown(&mut terminal, "/dev/pts/").await?;
    terminal.write_all(b"hello\r").await?;
    shown(&mut terminal, "got hello").await?;
    shown(&mut terminal, "exit code 3").await?;
    assert_eq!(tokio::time::timeout(STREAM, child.wait()).await??.code(), Some(3));
    Ok(())
}

async fn attach(case: &Case) -> Result<()> {
    let pod = case.name("");
    let reader =
        with(sh("c", "while read line; do echo \"got $line\"; done; exit 4"), json!({ "stdin": true, "stdinOnce": true }));
    case.ready_pod(&pod, json!({ "containers": [reader], "restartPolicy": "Never" })).await?;
    let ran = case.kubectl().run(&case.handler, &["attach", "--stdin", &pod], b"one\ntwo\n").await?;
    ensure!(ran.stdout.contains("got one\n") && ran.stdout.contains("got two\n"), "{} {}", ran.stdout, ran.stderr);
    // The end of what is read is the container's end.
    let pod = case.ended(&pod).await?;
    assert_eq!(container(&pod, "c").context("no container")?["state"]["terminated"]["exitCode"], 4);
    Ok(())
}

async fn attach_to_a_terminal(case: &Case) -> Result<()> {
    let pod = case.name("");
    let reader = with(sh("c", "while read line; do echo \"got $line\"; done"), json!({ "stdin": true, "tty": true }));
    case.ready_pod(&pod, json!({ "containers": [reader] })).await?;
    let (mut child, mut terminal) =
        at_a_terminal(case.kubectl().command(&case.handler, &["attach", "--stdin", "--tty", &pod]))?;
    shown(&mut terminal, "pressing enter").await?;
    terminal.write_all(b"hello\r").await?;
    shown(&mut terminal, "got hello").await?;
    child.kill().await?;
    // It runs on when a client leaves.
    ensure!(case.prints(&pod, "echo on").await? == "on\n");
    Ok(())
}

async fn cp(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(&pod, json!({ "containers": [sleeper("c")] })).await?;
    let dir = case.dir()?;
    let tree = dir.join("tree/below");
    std::fs::create_dir_all(&tree)?;
    let bytes: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(tree.join("file"), &bytes)?;
    let [from, to] = ["tree", "back"].map(|name| dir.join(name).display().to_string());
    case.kubectl().must(&case.handler, &["cp", &from, &format!("{pod}:/tmp/tree")]).await?;
    assert_eq!(case.prints(&pod, "stat -c %s /tmp/tree/below/file").await?.trim(), bytes.len().to_string());
    case.kubectl().must(&case.handler, &["cp", &format!("{pod}:/tmp/tree"), &to]).await?;
    ensure!(std::fs::read(dir.join("back/below/file"))? == bytes, "the file has changed on its way");
    Ok(())
}

async fn port_forward(case: &Case) -> Result<()> {
    let pod = case.name("");
    let echo = sh("echo", "exec nc -lk -p 7 -e cat");
    let web = json!({ "name": "web", "image": recipes::WEB });
    let ready = json!({ "readinessProbe": { "tcpSocket": { "port": 80 }, "periodSeconds": 1 } });
    case.ready_pod(&pod, json!({ "containers": [with(web, ready), echo] })).await?;
    let mut command = case.kubectl().command(&case.handler, &["port-forward", &pod, ":80"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
    let port = tokio::time::timeout(STREAM, async {
        while let Some(line) = lines.next_line().await? {
            // "Forwarding from 127.0.0.1:41187 -> 80"
            let port =
                line.strip_prefix("Forwarding from 127.0.0.1:").and_then(|rest| rest.split(' ').next()?.parse::<u16>().ok());
            if let Some(port) = port {
                return Ok(port);
            }
        }
        bail!("kubectl port-forward has ended")
    })
    .await
    .context("kubectl port-forward does not say its port")??;
    // One after the other, and several at once.
    for _ in 0..2 {
        let answers = futures::future::try_join_all((0..4).map(|_| http(port))).await?;
        ensure!(answers.iter().all(|answer| answer.contains("200 OK")), "{answers:?}");
    }
    child.kill().await?;
    Ok(())
}

async fn http(port: u16) -> Result<String> {
    let asked = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    };
    tokio::time::timeout(STREAM, asked).await.context("no answer through the forwarded port")?
}

async fn debug_with_an_ephemeral_container(case: &Case) -> Result<()> {
    let pod = case.name("");
    case.ready_pod(
        &pod,
        json!({ "containers": [with(sleeper("c"), json!({ "env": [{ "name": "MARK", "value": "here" }] }))] }),
    )
    .await?;
    let script = "tr '\\0' '\\n' < /proc/1/environ | grep MARK; hostname; exit 6";
    let image = format!("--image={}", recipes::BUSYBOX);
    let args = ["debug", &pod, &image, "--image-pull-policy=Never", "--target=c", "--container=d", "--profile=general"];
    case.kubectl().must(&case.handler, &[&args[..], &["--", "sh", "-c", script]].concat()).await?;
    let code = case.until(&pod, "the end of its ephemeral container", |pod| {
        Ok(container(pod, "d").and_then(|status| status["state"]["terminated"]["exitCode"].as_i64()))
    });
    assert_eq!(code.await?, 6);
    // It sees the processes of the container that it is for.
    let log = case.kubectl().must(&case.handler, &["logs", &pod, "--container", "d"]).await?;
    assert_eq!(log, format!("MARK=here\n{pod}\n"));
    Ok(())
}

async fn debug_with_a_copy(case: &Case) -> Result<()> {
    let [pod, copy] = ["", "copy"].map(|suffix| case.name(suffix));
    case.ready_pod(&pod, json!({ "containers": [sleeper("c")] })).await?;
    let image = format!("--image={}", recipes::BUSYBOX);
    let to = format!("--copy-to={copy}");
    let args = ["debug", &pod, &image, "--image-pull-policy=Never", &to, "--container=d", "--keep-labels", "--share-processes"];
    case.kubectl().must(&case.handler, &[&args[..], &["--", "sh", "-c", "sleep 1000000"]].concat()).await?;
    case.ready(&copy).await?;
    let args = ["exec", &copy, "--container", "d", "--", "sh", "-c", "ps | grep -c '[s]leep 1000000'"];
    // Both containers' processes: they share them.
    case.until_prints(&args, "the processes of both containers", |text| (text.trim().parse::<u32>().ok()? >= 2).then_some(()))
        .await
}

async fn logs(case: &Case) -> Result<()> {
    let pod = case.name("");
    let script = "for i in 1 2 3 4 5; do echo line $i; done; head -c 20000 /dev/zero | tr '\\0' x; echo; printf end";
    case.pod(&pod, json!({ "restartPolicy": "Never", "containers": [sh("a", script), sh("b", "echo from b; echo err >&2")] }))
        .await?;
    case.ended(&pod).await?;
    let logs = |more: &'static [&'static str]| {
        let pod = pod.clone();
        async move { case.kubectl().must(&case.handler, &[&["logs", &pod, "--container", "a"][..], more].concat()).await }
    };
    let all = logs(&[]).await?;
    let mut lines: Vec<&str> = all.lines().collect();
    assert_eq!(lines.pop(), Some("end"));
    assert_eq!(lines.pop().map(str::len), Some(20000));
    assert_eq!(lines, ["line 1", "line 2", "line 3", "line 4", "line 5"]);
    assert_eq!(logs(&["--limit-bytes", "7"]).await?, "line 1\n");
    let stamped = logs(&["--timestamps", "--limit-bytes", "60"]).await?;
    ensure!(stamped.starts_with("20") && stamped.contains("Z line 1"), "{stamped}");
    let both = case.kubectl().must(&case.handler, &["logs", &pod, "--all-containers", "--prefix"]).await?;
    for line in [format!("[pod/{pod}/b] from b\n"), format!("[pod/{pod}/b] err\n"), format!("[pod/{pod}/a] line 1\n")] {
        ensure!(both.contains(&line), "no {line:?} in {both}");
    }
    Ok(())
}

async fn logs_that_are_followed(case: &Case) -> Result<()> {
    const LINES: usize = 400;
    let pod = case.name("");
    let script = format!("i=0; while [ $i -lt {LINES} ]; do echo $i; i=$((i+1)); sleep 0.005; done");
    case.pod(&pod, json!({ "restartPolicy": "Never", "containers": [sh("c", &script)] })).await?;
    case.until(&pod, "a start", |pod| {
        Ok(container(pod, "c").filter(|status| status["state"]["waiting"].is_null()).map(|_| ()))
    })
    .await?;
    let text = case.kubectl().must(&case.handler, &["logs", "--follow", &pod]).await?;
    assert_eq!(text, (0..LINES).map(|line| format!("{line}\n")).collect::<String>());
    Ok(())
}

async fn logs_of_the_container_before(case: &Case) -> Result<()> {
    let pod = case.name("");
    let script = "if [ -e /v/been ]; then echo second; exec sleep 1000000; fi; touch /v/been; echo first; exit 1";
    let counting = with(sh("c", script), json!({ "volumeMounts": [{ "name": "v", "mountPath": "/v" }] }));
    case.pod(&pod, json!({ "containers": [counting], "volumes": [{ "name": "v", "emptyDir": {} }] })).await?;
    case.until_prints(&["logs", &pod], "the second container's log", |text| (text == "second\n").then_some(())).await?;
    assert_eq!(case.kubectl().must(&case.handler, &["logs", "--previous", &pod]).await?, "first\n");
    Ok(())
}
