//! What Kuasar does, shown: the same pod of two containers in each sandboxer and in containerd's own runc shim, on a private
//! containerd in a scratch directory. Nothing stays, after Ctrl-C neither.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use kuasar_tests::image::recipes;
use kuasar_tests::leak::census;
use kuasar_tests::{ContainerSpec, Node, NodeOptions, PodSpec, process, program, tools};

/// How often a pod is started for the figures; the pod that is shown comes first and is not counted.
const ROUNDS: usize = 5;

/// Runs a pod of two containers in each sandboxer, beside containerd's runc shim.
#[derive(Parser)]
#[command(version)]
struct Arguments {}

/// What one handler came to.
struct Figures {
    handler: &'static str,
    run_pod: Duration,
    container: Duration,
    memory_kib: u64,
    processes: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    Arguments::parse();
    program::run(run).await
}

async fn run(slot: &mut Option<Node>) -> Result<ExitCode> {
    let mut options = NodeOptions::new("demo").quiet().sandboxer("kuasar-runc", "runc");
    let mut handlers = vec!["runc", "kuasar-runc"];
    if let Ok(crun) = tools::crun() {
        options = options.sandboxer("kuasar-crun", "crun");
        handlers.extend(["crun", "kuasar-crun"]);
        println!("runc and crun: {}, {}", version(&tools::runc()?)?, version(&crun)?);
    }
    println!("starting a private containerd and kuasard, building images from the host's busybox");
    let node = slot.insert(Node::start(options).await?);
    let (major, minor, patch) = node.containerd.version();
    println!("containerd {major}.{minor}.{patch} and kuasard run in {}", node.dir().display());

    let mut table = Vec::new();
    for (index, handler) in handlers.iter().enumerate() {
        println!("\n[{}/{}] {handler}: {}", index + 1, handlers.len(), describe(handler));
        show(node, handler).await.with_context(|| format!("show a pod with {handler}"))?;
        table.push(measure(node, handler).await.with_context(|| format!("measure pods with {handler}"))?);
    }
    summarise(&table);
    println!("\nremoving everything");
    Ok(ExitCode::SUCCESS)
}

fn describe(handler: &str) -> &'static str {
    match handler {
        "runc" => "containerd's own runc-v2 shim, a shim process and a pause container per pod",
        "crun" => "the same shim with crun",
        "kuasar-runc" => "kuasard with runc, no process per pod",
        _ => "kuasard with crun",
    }
}

/// The first line that `--version` prints.
fn version(program: &Path) -> Result<String> {
    let text = process::run(std::process::Command::new(program).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// A pod with a web server and a client of it, and what they print.
async fn show(node: &Node, handler: &'static str) -> Result<()> {
    let begun = Instant::now();
    println!("    $ crictl runp --runtime {handler} pod.json");
    let pod = node.run_pod(PodSpec::new("demo").handler(handler)).await?;
    println!("      pod {:.12} has address {}, after {} ms", pod.id, pod.ip().await?, begun.elapsed().as_millis());

    let begun = Instant::now();
    println!("    $ crictl create {:.12} web.json pod.json && crictl start …", pod.id);
    let web = pod.run(ContainerSpec::new("web").image(recipes::WEB)).await?;
    println!("    $ crictl create {:.12} client.json pod.json && crictl start …", pod.id);
    let script = "echo kernel $(uname -r), host name $(hostname), $(ls /proc | grep -c '^[0-9]') processes in sight
        until wget -qO /tmp/page http://127.0.0.1/ 2>/dev/null; do sleep 0.05; done
        echo web server says: $(cat /tmp/page)";
    let client = pod.run(ContainerSpec::new("client").sh(script)).await?;
    println!("      both run after {} ms", begun.elapsed().as_millis());
    client.wait_log("says").await?;
    for (name, container) in [("web", &web), ("client", &client)] {
        println!("    $ crictl logs {name}");
        for line in container.logs()? {
            println!("      {}", line.text);
        }
    }
    println!("    $ crictl exec {:.12} cat /proc/1/comm", web.id);
    println!("      {}", web.exec(["cat", "/proc/1/comm"]).await?.stdout().trim());
    println!("    $ crictl rmp --force {:.12}", pod.id);
    pod.remove_all().await?;
    Ok(())
}

async fn measure(node: &Node, handler: &'static str) -> Result<Figures> {
    let mut run_pod = Vec::new();
    let mut container = Vec::new();
    let mut memory = (0, 0);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let pod = node.run_pod(PodSpec::new("measured").handler(handler)).await?;
        run_pod.push(begun.elapsed());
        let begun = Instant::now();
        pod.run(ContainerSpec::new("c").sleep()).await?;
        container.push(begun.elapsed());
        let pids = node.management_pids(handler)?;
        memory = (census::pss_kib(&pids)?, pids.len());
        pod.remove_all().await?;
    }
    let (memory_kib, processes) = memory;
    Ok(Figures { handler, run_pod: median(run_pod), container: median(container), memory_kib, processes })
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn summarise(table: &[Figures]) {
    println!("\n{ROUNDS} pods of one container each, one after another (medians); memory with one pod running");
    println!("{:<14}{:>12}{:>18}{:>24}", "", "start a pod", "start a container", "memory of management");
    for figures in table {
        println!(
            "{:<14}{:>9.0} ms{:>15.0} ms{:>13.1} MiB in {} processes",
            figures.handler,
            figures.run_pod.as_secs_f64() * 1e3,
            figures.container.as_secs_f64() * 1e3,
            figures.memory_kib as f64 / 1024.0,
            figures.processes
        );
    }
    println!("The shim's memory comes again with each pod; kuasard serves all of them.");
}
