//! Looking into pods that have a kernel of their own: programs beside their containers, consoles, and what is known of them.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kuasar_tests::{ContainerSpec, Node, Pod, wait};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::kuasarctl;
use crate::suite::{Case, Entry, Lone, cases};

/// How long a program in an emulated guest may take to do what it is asked for.
const SOON: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> Vec<Entry> {
    let mut cases = cases![Machines Alone: programs, programs_end_with_whoever_asked, programs_with_a_terminal, consoles];
    cases.extend(cases![Machines Shared: accounts]);
    cases.extend(cases![Ours Shared: refusals]);
    cases
}

/// A node whose guests may be looked into, and a pod on it.
async fn debugged(lone: &Lone) -> Result<(Node, Pod)> {
    let handler = lone.handler.clone();
    let node = Node::start(lone.options().patch_kuasard(move |config| config["sandboxer"][&handler]["debug"] = true.into()));
    let node = node.await?;
    let pod = node.run_pod(lone.pod()).await?;
    Ok((node, pod))
}

/// kuasarctl exec, not started yet.
fn exec(node: &Node, options: &[&str], id: &str, program: &[&str]) -> Result<Command> {
    let mut command = kuasarctl::command(node)?;
    command.arg("exec").args(options).arg(id).arg("--").args(program);
    Ok(command)
}

fn ran(node: &Node, pod: &Pod, script: &str) -> Result<Output> {
    exec(node, &[], &pod.id, &["sh", "-c", script])?.output().context("run kuasarctl exec")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The command lines of the guest's processes.
fn processes(node: &Node, pod: &Pod) -> Result<String> {
    let listed = ran(node, pod, "ps -o args")?;
    ensure!(listed.status.success(), "{listed:?}");
    Ok(text(&listed.stdout))
}

async fn ended(child: &mut Child) -> Result<ExitStatus> {
    wait::until("kuasarctl to end", SOON, || std::future::ready(child.try_wait().context("wait for kuasarctl"))).await
}

async fn programs(lone: &Lone) -> Result<()> {
    let (node, pod) = debugged(lone).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;

    let output = ran(&node, &pod, "echo out; echo err >&2; exit 7")?;
    assert_eq!((output.status.code(), text(&output.stdout), text(&output.stderr)), (Some(7), "out\n".into(), "err\n".into()));
    assert_eq!(ran(&node, &pod, "kill -9 $$")?.status.code(), Some(128 + 9));
    // Of the machine, as its root, and with all of its powers.
    let beside =
        text(&ran(&node, &pod, "id -u; readlink /proc/1/exe; mkdir /tmp/m && mount -t tmpfs m /tmp/m && echo ok")?.stdout);
    assert_eq!(beside, "0\n/init\nok\n");
    // What the kernel has no driver for until somebody wants it.
    let wanted = "mkdir -p /tmp/a /tmp/b /tmp/c && mount -t overlay -o lowerdir=/tmp/a:/tmp/b o /tmp/c && umount /tmp/c && \
                  brctl addbr br9 && brctl delbr br9";
    let output = ran(&node, &pod, wanted)?;
    assert!(output.status.success(), "{output:?}");
    // Nothing of it is left in the guest.
    let mounts = || Ok::<_, anyhow::Error>(text(&ran(&node, &pod, "grep -c . /proc/mounts")?.stdout));
    assert_eq!(mounts()?, mounts()?);
    // By the id of a container, or the beginning of the pod's.
    for id in [container.id.as_str(), &pod.id[..20]] {
        let output = exec(&node, &["-n", "k8s.io"], id, &["true"])?.output()?;
        assert!(output.status.success(), "{output:?}");
    }

    // All of a large output, and of a large input.
    let large = 8 << 20;
    let output = ran(&node, &pod, &format!("head -c {large} /dev/zero; head -c {large} /dev/zero >&2"))?;
    ensure!(output.status.success() && output.stdout.len() == large, "{} bytes, {}", output.stdout.len(), output.status);
    assert_eq!(output.stderr.len(), large);
    let sent: Vec<u8> = (0..1u32 << 19).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut cat = exec(&node, &["-i"], &pod.id, &["cat"])?;
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut input, bytes) = (cat.stdin.take().context("no input")?, sent.clone());
    let writing = std::thread::spawn(move || input.write_all(&bytes));
    let output = cat.wait_with_output()?;
    writing.join().unwrap()?;
    ensure!(output.status.success() && output.stdout == sent, "{} bytes, {}", output.stdout.len(), output.status);
    // Without -i there is none, and a program need not take what there is.
    assert_eq!(text(&exec(&node, &[], &pod.id, &["cat"])?.stdin(Stdio::piped()).output()?.stdout), "");
    let mut unread = exec(&node, &["-i"], &pod.id, &["true"])?;
    let unread = unread.stdin(File::open("/dev/zero")?).output()?;
    assert_eq!(unread.status.code(), Some(0), "{unread:?}");

    let output = exec(&node, &[], &pod.id, &["/no/such/program"])?.output()?;
    assert!(output.status.code() == Some(125) && text(&output.stderr).contains("/no/such/program"), "{output:?}");
    pod.remove_all().await?;
    node.stop().await
}

async fn programs_end_with_whoever_asked(lone: &Lone) -> Result<()> {
    let (mut node, pod) = debugged(lone).await?;
    let begin = |script: &str| {
        let mut command = exec(&node, &["-i"], &pod.id, &["sh", "-c", script])?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("run kuasarctl exec")
    };
    let is_there = |word: &str| Ok::<_, anyhow::Error>(processes(&node, &pod)?.contains(word));

    // Interrupted once, the program is; twice, whoever asked does not wait.
    let mut patient = begin("trap 'echo trapped; exit 3' INT; echo begun; while :; do sleep 0.1; done")?;
    let mut said = patient.stdout.take().context("no output")?;
    let mut begun = [0; 6];
    said.read_exact(&mut begun)?;
    let pid = |child: &Child| Pid::from_raw(child.id().cast_signed());
    kill(pid(&patient), Signal::SIGINT)?;
    assert_eq!(ended(&mut patient).await?.code(), Some(3));
    let mut rest = String::new();
    said.read_to_string(&mut rest)?;
    assert_eq!(rest, "trapped\n");
    let mut deaf = begin("trap '' INT; echo begun; while :; do sleep 4241; done")?;
    deaf.stdout.as_mut().context("no output")?.read_exact(&mut begun)?;
    kill(pid(&deaf), Signal::SIGINT)?;
    let status = wait::until("a second interrupt to end it", SOON, || {
        let again = kill(pid(&deaf), Signal::SIGINT).context("interrupt it again");
        std::future::ready(again.and_then(|()| deaf.try_wait().context("wait for kuasarctl")))
    });
    assert_eq!(status.await?.code(), Some(128 + 2));
    wait::until("the deaf program to be gone", SOON, async || Ok((!is_there("sleep 4241")?).then_some(()))).await?;

    // Killed: nothing of it is left, nor of what it has left behind.
    let mut left = begin("setsid sleep 4242 & sleep 4243")?;
    wait::until("two programs", SOON, async || Ok((is_there("sleep 4242")? && is_there("sleep 4243")?).then_some(()))).await?;
    left.kill()?;
    left.wait()?;
    wait::until("both to be gone", SOON, async || {
        let processes = processes(&node, &pod)?;
        Ok((!processes.contains("sleep 4242") && !processes.contains("sleep 4243")).then_some(()))
    })
    .await?;

    // Whoever reads no more ends it, too.
    let mut endless = begin("while echo 4244; do :; done")?;
    drop(endless.stdout.take());
    assert_eq!(ended(&mut endless).await?.code(), Some(128 + 13));

    // An upgrade does not wait for it.
    let mut replaced = begin("sleep 4248")?;
    wait::until("a program", SOON, async || Ok(is_there("sleep 4248")?.then_some(()))).await?;
    let since = Instant::now();
    let upgraded = node.kuasard.as_ref().context("the node has no kuasard")?.upgrade(None).await?;
    ensure!(upgraded.status.success() && since.elapsed() < Duration::from_secs(15), "{upgraded:?}, {:?}", since.elapsed());
    assert_eq!(ended(&mut replaced).await?.code(), Some(125));
    assert!(!is_there("sleep 4248")?);

    // The daemon's worker is killed: the next one removes what nobody waits for, and knows of the guest what this one knew.
    let known = |node: &Node| Ok::<_, anyhow::Error>(inspected(node, &pod)?["detail"]["kernel"].clone());
    let before = known(&node)?;
    let mut orphan = begin("sleep 4245")?;
    wait::until("a program", SOON, async || Ok(is_there("sleep 4245")?.then_some(()))).await?;
    let kuasard = node.kuasard.as_mut().context("the node has no kuasard")?;
    let killed = kuasard.kill_worker().await?;
    kuasard.wait_serving(killed).await?;
    assert_eq!(ended(&mut orphan).await?.code(), Some(125));
    wait::until("the orphan to be gone", SOON, async || Ok((!processes(&node, &pod)?.contains("sleep 4245")).then_some(())))
        .await?;
    wait::until("the guest to be known", SOON, async || Ok((known(&node)? == before && before.is_string()).then_some(())))
        .await?;

    pod.remove_all().await?;
    node.stop().await
}

fn inspected(node: &Node, pod: &Pod) -> Result<Value> {
    Ok(serde_json::from_str(&kuasarctl::said(node, &["inspect", &pod.id])?)?)
}

/// kuasarctl exec on a terminal of its own; we have the other side.
fn on_a_terminal(node: &Node, pod: &Pod) -> Result<(Child, File)> {
    let size = Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
    let pair = openpty(&size, None)?;
    let end = || Ok::<_, std::io::Error>(Stdio::from(pair.slave.try_clone()?));
    // It is told of new sizes when the terminal is its own.
    let exec = exec(node, &["-it"], &pod.id, &["sh"])?;
    let mut command = Command::new("setsid");
    command.arg("--ctty").arg(exec.get_program()).args(exec.get_args());
    command.env("TERM", "vt100").stdin(end()?).stdout(end()?).stderr(end()?);
    Ok((command.spawn()?, pair.master.into()))
}

/// Reads from a terminal until it has said `word`; `said` is what it has said after it.
fn read_until(terminal: &mut File, said: &mut String, word: &str) -> Result<()> {
    let mut piece = [0; 1024];
    loop {
        if let Some((_, rest)) = said.split_once(word) {
            *said = rest.to_owned();
            return Ok(());
        }
        let length = terminal.read(&mut piece).with_context(|| format!("no {word:?} in {said:?}"))?;
        said.push_str(&text(&piece[..length]));
    }
}

async fn programs_with_a_terminal(lone: &Lone) -> Result<()> {
    let (node, pod) = debugged(lone).await?;
    let (mut shell, mut terminal) = on_a_terminal(&node, &pod)?;
    let talk = std::thread::spawn(move || -> Result<()> {
        let mut said = String::new();
        let mut ask = |terminal: &mut File, typed: &str, word: &str| {
            terminal.write_all(typed.as_bytes())?;
            read_until(terminal, &mut said, word)
        };
        ask(&mut terminal, "stty size; echo $TERM-\n", "33 101\r\n")?;
        ask(&mut terminal, "", "vt100-\r\n")?;
        let size = rustix::termios::Winsize { ws_row: 44, ws_col: 55, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal, size)?;
        ask(&mut terminal, "while [ \"$(stty size)\" != '44 55' ]; do sleep 0.1; done; echo re''sized\n", "resized\r\n")?;
        // What is typed is the program's, an interrupt as well.
        ask(&mut terminal, "echo wai''ting; sleep 4246\n", "waiting\r\n")?;
        ask(&mut terminal, "\x03", "^C")?;
        terminal.write_all(b"exit 9\n")?;
        // Its end is the end of the other side.
        while terminal.read(&mut [0; 64]).is_ok_and(|length| length > 0) {}
        Ok(())
    });
    assert_eq!(ended(&mut shell).await?.code(), Some(9));
    talk.join().unwrap()?;
    pod.remove_all().await?;
    node.stop().await
}

async fn consoles(lone: &Lone) -> Result<()> {
    let (node, pod) = debugged(lone).await?;
    // A guest that hangs is waited for, and what there is without it is told.
    let hypervisor = inspected(&node, &pod)?["detail"]["processes"][0].as_i64().context("no pid")?;
    let hypervisor = Pid::from_raw(i32::try_from(hypervisor)?);
    kill(hypervisor, Signal::SIGSTOP)?;
    let account = kuasarctl::said(&node, &["logs", "--sandbox", &pod.id]);
    kill(hypervisor, Signal::SIGCONT)?;
    let account = account?;
    let asked = "==> guest <==\nit cannot be asked: the guest's answer to: tell what it knows, did not finish within 10 s\n";
    assert!(account.contains(asked) && account.contains("set up"), "{account}");

    let console = kuasarctl::said(&node, &["console", &pod.id])?;
    assert!(console.contains("set up") && !console.contains('\r'), "{console}");

    let mut command = kuasarctl::command(&node)?;
    let mut following = command.args(["console", "-f", &pod.id]).stdout(Stdio::piped()).spawn()?;
    let mut said = following.stdout.take().context("no output")?;
    let reading = std::thread::spawn(move || -> Result<String> {
        let mut all = Vec::new();
        said.read_to_end(&mut all)?;
        Ok(text(&all))
    });
    // More than is kept, with what a terminal would take for commands.
    let flood = "i=0; while [ $i -lt 40 ]; do head -c 65536 /dev/zero | tr '\\0' x; echo; i=$((i+1)); done > /dev/console; \
                 printf 'last\\033[2J\\007\\tword\\n' > /dev/console; cat /proc/uptime";
    let output = ran(&node, &pod, flood)?;
    ensure!(output.status.success(), "{output:?}");
    let file = inspected(&node, &pod)?["detail"]["directory"].as_str().context("no directory")?.to_owned();
    pod.stop().await?;
    assert!(ended(&mut following).await?.success(), "it ends with the machine");
    let all = reading.join().unwrap()?;
    assert!(
        all.starts_with(console.lines().next().unwrap_or_default()) && all.contains("last\u{fffd}[2J\u{fffd}\tword"),
        "{file}"
    );
    assert!(all.len() > 512 << 10 && !all.contains('\x1b'), "{} bytes", all.len());
    // What there is of a machine that has ended, as long as the pod is there.
    let ended = kuasarctl::said(&node, &["console", &pod.id])?;
    assert!(ended.contains("last\u{fffd}[2J"), "{} bytes", ended.len());
    let account = kuasarctl::said(&node, &["logs", "--sandbox", &pod.id])?;
    assert!(account.contains("==> guest <==\nit cannot be asked: the pod's virtual machine is unavailable"), "{account}");
    pod.remove_all().await?;
    node.stop().await
}

async fn refusals(case: &Case) -> Result<()> {
    let pod = case.run(case.spec().quick()).await?;
    let output = ran(&case.node, &pod, "true")?;
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    let words = if case.is_machine() {
        [
            format!("debug = true in the table [sandboxer.{}]", case.handler.trim_end_matches("-streaming")),
            "start a new pod".into(),
        ]
    } else {
        ["no kernel of its own".into(), "use crictl exec".into()]
    };
    assert!(words.iter().all(|word| said.contains(word)), "{said}");
    for args in [&["exec", "no-such-pod", "true"][..], &["console", "no-such-pod"], &["logs", "--sandbox", "no-such-pod"]] {
        let output = kuasarctl::kuasarctl(&case.node, args)?;
        assert!(!output.status.success() && text(&output.stderr).contains("no-such-pod"), "{output:?}");
    }
    if !case.is_machine() {
        for args in [&["console", &pod.id][..], &["logs", "--sandbox", &pod.id]] {
            let output = kuasarctl::kuasarctl(&case.node, args)?;
            assert!(!output.status.success() && text(&output.stderr).contains("no kernel of its own"), "{output:?}");
        }
    }
    Ok(())
}

async fn accounts(case: &Case) -> Result<()> {
    let pod = case.pod().await?;
    pod.run(ContainerSpec::new("c").command(&["sleep", "4247"])).await?;
    let account = kuasarctl::said(&case.node, &["logs", "--sandbox", &pod.id])?;
    let section = |title: &str| {
        let (_, rest) =
            account.split_once(&format!("==> {title} <==\n")).with_context(|| format!("no {title} in:\n{account}"))?;
        Ok::<_, anyhow::Error>(rest.split("\n==> ").next().unwrap_or_default().to_owned())
    };
    assert!(section("machine")?.contains("\"hypervisor\"") && section("console")?.contains("set up"));
    assert!(section("guest: kernel log")?.contains("Linux version") && section("guest: processes")?.contains("sleep 4247"));
    assert!(section("guest: mounts")?.contains(" / ") && section("guest: interfaces")?.contains("eth0"));
    for title in ["hypervisor (its last words)", "virtiofsd-roots (its last words)", "virtiofsd-volumes (its last words)"] {
        section(title)?;
    }
    let json: Value = serde_json::from_str(&kuasarctl::said(&case.node, &["logs", "--sandbox", "--json", &pod.id])?)?;
    let titles: Vec<&str> = json.as_array().into_iter().flatten().filter_map(|section| section["title"].as_str()).collect();
    assert!(titles.contains(&"console") && titles.contains(&"guest: mounts"), "{titles:?}");
    Ok(())
}
