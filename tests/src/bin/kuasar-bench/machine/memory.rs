//! What a pod takes beyond its machine's memory: QEMU and its helpers, and kuasard's part. The figure is PSS.

use std::fs;

use anyhow::{Context, Result};
use kuasar_tests::screen::Screen;
use kuasar_tests::{ContainerSpec, Node, Pod};

use super::processes::{self, Process};
use super::{Kernel, Subject};
use crate::report::{Line, Report, Target};
use crate::samples::{Figure, Samples};

/// By how much kuasard may grow with a pod, in MiB.
const DAEMON_MIB: f64 = 0.4;

/// The mapping of a machine's memory: QEMU's and, shared with it, the helpers'.
const RAM: &str = "/memfd:";

/// What a machine has in memory, in KiB of PSS.
#[derive(Clone, Copy, Default)]
struct Taken {
    /// The guest's memory, as far as it was touched.
    ram: u64,
    /// All else.
    beyond: u64,
}

pub(crate) async fn measure(subject: Subject<'_>, screen: &mut Screen, report: &mut Report) -> Result<()> {
    let Subject { node, kernels, amount } = subject;
    for kernel in kernels {
        screen.status(&format!("memory of {} pods with {}", amount.memory_pods, kernel.name))?;
        // What is made once is made with the first.
        up(node, kernel).await?.remove_all().await?;
        let before = crate::memory::read(node, &kernel.handler).await?.mib;
        let mut pods = Vec::new();
        for _ in 0..amount.memory_pods {
            pods.push(up(node, kernel).await?);
        }
        let grown = crate::memory::read(node, &kernel.handler).await?.mib - before;
        let (mut ram, mut beyond) = (Samples::default(), Samples::default());
        for pod in &pods {
            let taken = taken(&processes::of_pod(&pod.id)?)?;
            ram.push(taken.ram as f64 / 1024.0);
            beyond.push(taken.beyond as f64 / 1024.0);
        }
        for pod in &pods {
            pod.remove_all().await?;
        }
        let mut add = |name, value: Option<Figure>, target| -> Result<()> {
            let value = value.context("there was no pod")?;
            report.add(Line::new("memory of a pod", name, "MiB", value).of(&kernel.label()).aim(target));
            Ok(())
        };
        add("guest's, touched", ram.median(), None)?;
        add("beyond it", beyond.median(), None)?;
        let each = Figure::once(grown / amount.memory_pods as f64);
        add("kuasard's growth", Some(each), Some(Target::value(DAEMON_MIB)))?;
    }
    Ok(())
}

async fn up(node: &Node, kernel: &Kernel) -> Result<Pod> {
    let pod = node.run_pod(kernel.pod()).await?;
    pod.run(ContainerSpec::new("c").sleep()).await?;
    Ok(pod)
}

fn taken(processes: &[Process]) -> Result<Taken> {
    let mut sum = Taken::default();
    for process in processes {
        let path = format!("/proc/{}/smaps", process.pid);
        let taken = of_smaps(&fs::read_to_string(&path).with_context(|| format!("read {path}"))?);
        sum = Taken { ram: sum.ram + taken.ram, beyond: sum.beyond + taken.beyond };
    }
    Ok(sum)
}

/// proc_pid_smaps(5): a line `start-end perms offset dev inode path` for each mapping, then lines `Key: value`.
fn of_smaps(smaps: &str) -> Taken {
    let (mut taken, mut is_ram) = (Taken::default(), false);
    for line in smaps.lines() {
        match line.strip_prefix("Pss:") {
            Some(value) => {
                let kib: u64 = value.trim().strip_suffix(" kB").and_then(|kib| kib.trim().parse().ok()).unwrap_or(0);
                *(if is_ram { &mut taken.ram } else { &mut taken.beyond }) += kib;
            }
            None if !line.split(' ').next().is_some_and(|word| word.ends_with(':')) => is_ram = line.contains(RAM),
            None => {}
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_told_apart() {
        let smaps = "7f-80 rw-s 00000000 00:01 1031 /memfd:memory-backend-memfd (deleted)\nSize: 9 kB\nPss:      7 kB\nPss_Dirty: 5 kB\n\
                     80-81 rw-p 00000000 00:00 0 [heap]\nPss:     11 kB\n";
        let taken = of_smaps(smaps);
        assert_eq!((taken.ram, taken.beyond), (7, 11));
    }
}
