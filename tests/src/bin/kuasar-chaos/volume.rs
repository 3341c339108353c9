//! A volume that stops answering, and pods that start containers with it meanwhile.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::future::{join_all, try_join_all};
use kuasar_tests::hung::{CONTENT, DEVICE, Hung};
use kuasar_tests::{Container, ContainerSpec, Pod, PodSpec, skip, wait};

use crate::given_up;
use crate::ledger::{Call, Disturbance, Promise};
use crate::world::World;

/// Pods with the volume.
const PODS: usize = 6;
/// Containers with it that each of them starts while it hangs: one after another, as each start is given up after ten seconds.
const EACH: usize = 2;
/// How long the first look at it may take.
const LOOK: Duration = Duration::from_secs(30);
/// Where containers have it.
const AT: &str = "/hung";

/// The volume, its pods, and the containers that they are about to start.
pub(crate) struct Volume {
    hung: Hung,
    dir: PathBuf,
    pods: Vec<Pod>,
    created: Vec<Vec<Container>>,
}

impl Volume {
    /// Mounts it and runs the pods; `None`, recorded as a skip, where that cannot be.
    pub(crate) async fn up(world: &World, dir: &Path) -> Result<Option<Self>> {
        if !Path::new(DEVICE).exists() {
            skip::record("chaos: hung volumes", &format!("this machine has no {DEVICE}"));
            return Ok(None);
        }
        let hung = Hung::mount(dir)?;
        let pods = given_up(try_join_all((0..PODS).map(|_| world.run_pod(PodSpec::host_network))).await)?;
        Ok(Some(Self { hung, dir: dir.to_owned(), pods, created: Vec::new() }))
    }

    fn container(&self, spec: ContainerSpec) -> ContainerSpec {
        spec.sleep().mount(&self.dir, AT, false)
    }

    /// Creates the containers, while it answers.
    pub(crate) async fn prepare(&mut self, world: &World) -> Result<()> {
        for pod in &self.pods {
            let created = (0..EACH).map(|_| {
                let spec = self.container(world.container(&world.unique("hung")));
                world.once(Call::CreateContainer, &pod.id, pod.create(spec))
            });
            self.created.push(try_join_all(created).await.context("create a container with a volume that answers")?);
        }
        Ok(())
    }

    /// Stops answering.
    pub(crate) fn hang(&self) {
        self.hung.hang();
    }

    /// Starts the containers while `goes_on`. Whether a start that has waited succeeds is its own affair.
    pub(crate) async fn call(&self, world: &World, goes_on: &AtomicBool) {
        let starts = self.created.iter().map(|created| async move {
            for container in created {
                if goes_on.load(Ordering::Relaxed) {
                    let start = container.start();
                    let _ = world.about_disturbed(Disturbance::Volume, Call::StartContainer, &container.id, start).await;
                }
            }
        });
        join_all(starts).await;
    }

    /// Waits until something waits for it.
    pub(crate) async fn is_waited_for(&self) -> Result<()> {
        wait::until("a look at the hung volume", LOOK, || async { Ok((self.hung.waiting() > 0).then_some(())) }).await
    }

    /// Whether something waits for it.
    pub(crate) fn is_waiting(&self) -> bool {
        self.hung.waiting() > 0
    }

    /// Answers again.
    pub(crate) fn release(&self) {
        self.hung.release();
    }

    /// Removes the containers, and looks whether each pod can have another one.
    pub(crate) async fn recover(&mut self, world: &World) -> Result<()> {
        for container in self.created.drain(..).flatten() {
            given_up(world.remove_container(&container, 0).await)?;
        }
        for pod in &self.pods {
            let container = given_up(world.run_container(pod, |spec| self.container(spec)).await)?;
            let read = world.once(Call::ExecSync, &container.id, container.exec(["cat", &format!("{AT}/file")])).await;
            // A failure is on the ledger.
            if let Ok(read) = read
                && (read.exit_code, read.out.as_slice()) != (0, CONTENT)
            {
                let text = format!("{} reads {:?} from a volume that answers again", container.id, read.stdout());
                world.ledger.broke(Promise::True, 1, &text);
            }
            given_up(world.remove_container(&container, 0).await)?;
        }
        Ok(())
    }

    /// Removes the pods.
    pub(crate) async fn down(self, world: &World) -> Result<()> {
        for pod in &self.pods {
            given_up(world.remove_pod(&pod.id).await)?;
        }
        Ok(())
    }
}
