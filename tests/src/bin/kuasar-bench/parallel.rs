//! Many pods at once.

use std::collections::BTreeMap;

use anyhow::Result;
use futures::future::try_join_all;
use kuasar_tests::screen::Screen;
use kuasar_tests::{Node, Pod};

use crate::plan::{Network, Plan, Sides, timed, up};
use crate::report::{Line, Report, SHIM, Target};
use crate::samples::Samples;

const PODS: usize = 20;
const DIRECTIONS: [&str; 2] = ["up", "down"];

pub(crate) async fn measure(node: &Node, sides: &Sides, plan: &Plan, screen: &mut Screen, report: &mut Report) -> Result<()> {
    let mut table: BTreeMap<(&str, usize), Samples> = BTreeMap::new();
    for round in 0..plan.parallel_rounds {
        for index in sides.order(round, sides.asked_for().map(|(index, _)| index)) {
            let side = &sides.all()[index];
            screen.status(&format!(
                "{PODS} pods in parallel with {}, round {} of {}",
                side.handler,
                round + 1,
                plan.parallel_rounds
            ))?;
            let (time, pods) = timed(try_join_all((0..PODS).map(|_| up(node, side, Network::Cni)))).await?;
            table.entry(("up", index)).or_default().push(time);
            let (time, _) = timed(try_join_all(pods.iter().map(Pod::remove_all))).await?;
            table.entry(("down", index)).or_default().push(time);
        }
    }
    for direction in DIRECTIONS {
        for (index, side) in sides.ours() {
            let figure = |index: usize| table.get(&(direction, index)).and_then(Samples::median);
            let (Some(peer), Some(ours)) = (figure(0), figure(index)) else { continue };
            let line = Line::new("20 pods in parallel, CNI", direction, "ms", ours).beside(SHIM, peer);
            report.compare(side, line.aim(Some(Target::ratio(0.65))));
        }
    }
    Ok(())
}
