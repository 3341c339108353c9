//! The benchmark of virtual machines: what kuasar adds to a machine that is booted by hand, and what a machine adds to a container.
//!
//! ```text
//!   Node ─┬─ boot      the machine of a pod by hand, beside the pod; exec; each kernel ─┐
//!         ├─ many      20 pods at once, up and down                                     ├─▶ Report ─▶ table, vmm.json
//!         ├─ memory    what a pod takes beyond its machine's memory                     │   (targets)
//!         └─ transfer  standard output, and files by virtiofs                           ┘
//! ```
//!
//! The peer changes with the question: the same machine without kuasar, or a container of the same OCI runtime on the node.

mod boot;
mod by_hand;
mod image;
mod many;
mod memory;
mod processes;
mod stages;
mod transfer;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use kuasar_tests::scratch::Storage;
use kuasar_tests::screen::{Screen, Style};
use kuasar_tests::{Node, NodeOptions, PodSpec, tools};

use crate::Arguments;
use crate::host::Host;
use crate::plan::Part;
use crate::report::Report;

/// The sandboxer for containers on the node, with the OCI runtime that is in the guest where there is one.
const ON_NODE: &str = "kuasar-node";

/// How long a guest may take to boot, with all others.
const BOOT_LIMIT_SECS: u64 = 300;

/// How much is measured.
pub(crate) struct Amount {
    name: &'static str,
    /// Rounds of boots that count; one more comes before them.
    rounds: usize,
    /// No further round is begun after this time.
    rounds_limit: Duration,
    /// ExecSync calls in a round.
    execs: usize,
    /// Pods whose memory is read.
    memory_pods: usize,
    /// Rounds of transfers, and MiB in each.
    transfer_rounds: usize,
    transfer_mib: usize,
    /// Pods at once.
    many: usize,
}

impl Amount {
    const FULL: Self = Self {
        name: "full",
        rounds: 10,
        rounds_limit: Duration::from_secs(300),
        execs: 5,
        memory_pods: 5,
        transfer_rounds: 3,
        transfer_mib: 48,
        many: 20,
    };
    const QUICK: Self = Self {
        name: "quick",
        rounds: 3,
        rounds_limit: Duration::from_secs(30),
        execs: 3,
        memory_pods: 2,
        transfer_rounds: 1,
        transfer_mib: 16,
        many: 5,
    };
}

/// A guest's kernel, and the sandboxer whose pods have it.
pub(crate) struct Kernel {
    /// `cloud`, `mini`.
    name: String,
    /// The runtime handler.
    handler: String,
    path: PathBuf,
}

/// What is measured, and how much.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    node: &'a Node,
    kernels: &'a [Kernel],
    amount: &'a Amount,
}

impl Kernel {
    fn at(path: PathBuf, handler: Option<&str>) -> Result<Self> {
        let name = path.parent().and_then(|dir| dir.file_name()).context("the guest's kernel is in no directory")?;
        let name = name.to_string_lossy().into_owned();
        let handler = handler.map_or_else(|| format!("kuasar-qemu-{name}"), str::to_owned);
        Ok(Self { name, handler, path })
    }

    /// Who it is in the table.
    fn label(&self) -> String {
        format!("vm {}", self.name)
    }

    fn pod(&self) -> PodSpec {
        PodSpec::new("bench").handler(&self.handler)
    }
}

/// The kernel to test with, for the sandboxer's own pods, and those beside it.
fn kernels(sandboxer: &str) -> Result<Vec<Kernel>> {
    let paths = tools::guest_kernels()?;
    let handlers = std::iter::once(Some(sandboxer)).chain(std::iter::repeat(None));
    paths.into_iter().zip(handlers).map(|(path, handler)| Kernel::at(path, handler)).collect()
}

pub(crate) async fn run(arguments: &Arguments, slot: &mut Option<Node>) -> Result<ExitCode> {
    let mut screen = Screen::new();
    let amount = if arguments.quick { Amount::QUICK } else { Amount::FULL };
    let storage = arguments.storage();
    let host = Host::look(amount.name, amount.rounds, storage)?;
    for line in host.lines() {
        screen.line(&line)?;
    }
    let kernels = kernels(&arguments.sandboxer)?;
    screen.status("starting a private containerd and kuasard")?;
    let node = &*slot.insert(start(&kernels, storage).await?);

    let mut report = Report::new(&host);
    for kernel in &kernels {
        image::measure(kernel, &mut report).with_context(|| format!("look at {}", kernel.path.display()))?;
    }
    let subject = Subject { node, kernels: &kernels, amount: &amount };
    let mut failed = None;
    for part in Part::value_variants().iter().filter(|part| arguments.wants(**part)) {
        let (screen, report) = (&mut screen, &mut report);
        let measured = match part {
            Part::Calls => boot::measure(subject, screen, report).await.context("measure boots"),
            Part::Parallel => many::measure(subject, screen, report).await.context("measure pods in parallel"),
            Part::Memory => memory::measure(subject, screen, report).await.context("measure memory"),
            Part::Output => transfer::measure(subject, screen, report).await.context("measure transfers"),
        };
        // What the other parts find is told all the same.
        if let Err(error) = measured {
            screen.line(&format!("FAILED: {error:#}"))?;
            failed.get_or_insert(error);
        }
    }
    let missed = report.print(&mut screen)?;
    let path = arguments.out.join("vmm.json");
    report.write(&path)?;
    screen.line(&screen.paint(Style::Dim, &format!("written to {}", path.display())))?;
    screen.status("removing everything")?;
    if let Some(error) = failed {
        return Err(error);
    }
    Ok(if arguments.strict && missed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn start(kernels: &[Kernel], storage: Storage) -> Result<Node> {
    let on_node = if tools::crun().is_ok() { "crun" } else { "runc" };
    let mut options = NodeOptions::new("bench").quiet().storage(storage).sandboxer(ON_NODE, on_node);
    for (number, kernel) in kernels.iter().enumerate() {
        let mut table = tools::machine_table("qemu");
        table["kernel"] = kernel.path.to_string_lossy().into();
        // Each sandboxer has its own users.
        // Many that boot at once on few processors are slow, not stuck.
        table["boot_limit_secs"] = BOOT_LIMIT_SECS.into();
        table["users_from"] = (2_000_000_000 + 65_536 * number).into();
        options = options.sandboxer_table(&kernel.handler, table);
    }
    // Stages are told at this level. That the log is written is part of what is measured, on our side alone.
    Node::start(options.patch_kuasard(|config| config["log"]["level"] = "debug".into())).await
}
