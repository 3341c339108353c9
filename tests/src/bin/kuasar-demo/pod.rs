//! The pod that is shown, and those that are counted.

use std::time::{Duration, Instant};

use anyhow::Result;
use kuasar_tests::image::{Store, recipes};
use kuasar_tests::leak::census;
use kuasar_tests::screen::{Screen, Style};
use kuasar_tests::{Container, ContainerSpec, Node, PodSpec, tools};

use crate::WIDTH;

/// How many pods there are in the end: the one that is shown and more, one after another.
const PODS: usize = 10;
/// The same for virtual machines, which may have to be emulated.
const MACHINES: usize = 2;
const CLIENT: &str = "localhost/client:1";
/// It says what it sees, and asks the web server, which is in the same network namespace.
const SCRIPT: &str = "\
echo \"host $(hostname), Linux $(uname -r), $(ls /proc | grep -c '^[0-9]*$') processes in sight\"
until reply=$(wget -qO- http://127.0.0.1/ 2>/dev/null); do sleep 0.01; done
echo \"the web server says: $reply\"
exec sleep 100000
";

/// A runtime handler.
pub(crate) struct Handler {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    note: &'static str,
}

impl Handler {
    pub(crate) const SHIM: Self =
        Self { name: "runc", title: "runc shim", note: "containerd's own: a shim and a pause container for each pod" };
    pub(crate) const OURS: Self =
        Self { name: "kuasar-runc", title: "kuasar-runc", note: "kuasard with the same runc: one daemon for all pods" };
    pub(crate) const OURS_CRUN: Self = Self { name: "kuasar-crun", title: "kuasar-crun", note: "the same kuasard with crun" };

    pub(crate) const OURS_QEMU: Self = Self {
        name: "kuasar-qemu",
        title: "kuasar-qemu",
        note: "the same kuasard: each pod in a virtual machine with a kernel of its own",
    };

    fn pods(&self) -> usize {
        if tools::is_machine(self.name) { MACHINES } else { PODS }
    }

    fn spec(&self, name: &str) -> PodSpec {
        PodSpec::new(name).handler(self.name)
    }
}

/// What one handler came to.
pub(crate) struct Figures {
    pub(crate) title: &'static str,
    pub(crate) pods: usize,
    /// Medians over all pods.
    pub(crate) run: Duration,
    pub(crate) start: Duration,
    pub(crate) remove: Duration,
    pub(crate) exec: Duration,
    /// As a container sees it.
    pub(crate) kernel: String,
    /// With one pod, and with all.
    pub(crate) memory: [Memory; 2],
}

/// What the processes between containerd and the containers take.
#[derive(Clone, Copy)]
pub(crate) struct Memory {
    pub(crate) kib: u64,
    pub(crate) processes: usize,
}

impl Memory {
    fn read(node: &Node, handler: &Handler) -> Result<Self> {
        let pids = node.management_pids(handler.name)?;
        Ok(Self { kib: census::pss_kib(&pids)?, processes: pids.len() })
    }
}

/// What the node imports.
pub(crate) fn images() -> Result<Store> {
    let mut images = recipes::for_tests()?;
    let client = recipes::base()?.layer().file("client.sh", 0o755, SCRIPT).config("Cmd", vec!["sh", "/client.sh"]);
    images.build(&[CLIENT], &client)?;
    Ok(images)
}

fn web() -> ContainerSpec {
    ContainerSpec::new("web").image(recipes::WEB)
}

fn client() -> ContainerSpec {
    ContainerSpec::new("client").image(CLIENT)
}

/// What is slow only the first time happens here.
pub(crate) async fn warm_up(node: &Node, handler: &Handler) -> Result<()> {
    let pod = node.run_pod(handler.spec("warm-up")).await?;
    let web = pod.run(web()).await?;
    pod.run(client()).await?.wait_log("says").await?;
    web.exec(["true"]).await?;
    Ok(pod.remove_all().await?)
}

async fn timed<T, E>(times: &mut Vec<Duration>, call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let begun = Instant::now();
    let value = call.await?;
    times.push(begun.elapsed());
    Ok(value)
}

/// The line for crictl that does the same, and how long it took.
fn command(screen: &mut Screen, text: &str, times: &[Duration]) -> Result<()> {
    let time = times.last().map(|time| format!("{:.0} ms", time.as_secs_f64() * 1e3)).unwrap_or_default();
    let pad = (WIDTH - 4).saturating_sub(text.len());
    screen.line(format!("  $ {}{time:>pad$}", screen.paint(Style::Cyan, text)).trim_end())
}

fn printed(screen: &mut Screen, name: &str, container: &Container) -> Result<()> {
    for line in container.logs()? {
        screen.line(&format!("  {} {}", screen.paint(Style::Dim, &format!("{name:<6} │")), line.text))?;
    }
    Ok(())
}

/// Runs the pod, shows it, and counts.
pub(crate) async fn show(node: &Node, handler: &Handler, screen: &mut Screen) -> Result<Figures> {
    let Handler { name, title, note } = handler;
    screen.line("")?;
    screen.line(&format!("{}  {}", screen.paint(Style::Bold, title), screen.paint(Style::Dim, note)))?;
    let [mut run, mut start, mut exec, mut remove] = [const { Vec::new() }; 4];

    screen.status("running the pod")?;
    let pod = timed(&mut run, node.run_pod(handler.spec("demo"))).await?;
    command(screen, &format!("crictl runp --runtime {name} pod.json"), &run)?;
    let web = timed(&mut start, pod.run(web())).await?;
    command(screen, "crictl create $POD web.json pod.json; crictl start $WEB", &start)?;
    let client = timed(&mut start, pod.run(client())).await?;
    command(screen, "crictl create $POD client.json pod.json; crictl start $CLIENT", &start)?;
    let ran = timed(&mut exec, client.exec(["uname", "-r"])).await?;
    command(screen, "crictl exec $CLIENT uname -r", &exec)?;
    client.wait_log("says").await?;
    command(screen, "crictl logs $WEB; crictl logs $CLIENT", &[])?;
    printed(screen, "web", &web)?;
    printed(screen, "client", &client)?;
    let one = Memory::read(node, handler)?;

    let mut pods = vec![pod];
    while pods.len() < handler.pods() {
        screen.status(&format!("pod {} of {}", pods.len() + 1, handler.pods()))?;
        let pod = timed(&mut run, node.run_pod(handler.spec("more"))).await?;
        timed(&mut start, pod.run(self::web())).await?;
        pods.push(pod);
    }
    let all = Memory::read(node, handler)?;
    // The one that was shown comes last, and has its time beside its command.
    for pod in pods.iter().rev() {
        screen.status("removing the pods")?;
        timed(&mut remove, pod.remove_all()).await?;
    }
    command(screen, "crictl rmp --force $POD", &remove)?;
    Ok(Figures {
        title,
        pods: pods.len(),
        run: median(run),
        start: median(start),
        exec: median(exec),
        remove: median(remove),
        kernel: ran.stdout().trim().to_owned(),
        memory: [one, all],
    })
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
