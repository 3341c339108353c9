//! Many machines at once, with the smallest kernel there is.

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use kuasar_tests::screen::Screen;
use kuasar_tests::{ContainerSpec, Node, Pod, tools};

use super::{Kernel, Subject};
use crate::plan::timed;
use crate::report::{Line, Report};
use crate::samples::Figure;

pub(crate) async fn measure(subject: Subject<'_>, screen: &mut Screen, report: &mut Report) -> Result<()> {
    let Subject { node, kernels, amount } = subject;
    let machine = tools::small_machine()?;
    let small = kernels.iter().find(|kernel| kernel.path == machine.kernel).context("there is no kernel")?;
    let mib = machine.memory_mib;
    // Directories and connections are made when they are first needed.
    run(node, small, mib).await?.remove_all().await?;
    let before = node.snapshot()?;
    screen.status(&format!("{} machines at once with {}", amount.many, small.name))?;
    let (up, pods) = timed(try_join_all((0..amount.many).map(|_| run(node, small, mib)))).await?;
    let (down, _) = timed(try_join_all(pods.iter().map(Pod::remove_all))).await?;
    node.assert_no_leak(&before).await?;
    report.note("pods at once", format!("{}, of {mib} MiB each", amount.many));
    for (name, time) in [("up, each exec'd", up), ("down", down)] {
        report.add(Line::new("pods at once", name, "ms", Figure::once(time)).of(&small.label()));
    }
    Ok(())
}

async fn run(node: &Node, kernel: &Kernel, mib: &str) -> Result<Pod> {
    let pod = node.run_pod(kernel.pod().annotation("io.kuasar.vm.memory_mib", mib)).await?;
    let container = pod.run(ContainerSpec::new("c").sleep()).await?;
    let ran = container.exec(["true"]).await?;
    ensure!(ran.exit_code == 0, "`true` exits with {}: {}", ran.exit_code, ran.stderr());
    Ok(pod)
}
