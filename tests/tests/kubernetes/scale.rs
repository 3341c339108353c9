//! Many pods at once.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::suite::{Case, Entry, PEER, cases, is_ready, lock, sleeper};

/// Pods in the end.
const PODS: usize = 30;
/// How long they may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(180);

pub(crate) fn cases() -> Vec<Entry> {
    cases![Alone: from_1_to_30]
}

/// What each handler took.
static TOOK: Mutex<BTreeMap<String, Duration>> = Mutex::new(BTreeMap::new());

async fn ready(case: &Case, count: usize) -> Result<()> {
    let end = Instant::now() + LIMIT;
    loop {
        let pods: Vec<Value> = case
            .cluster
            .pods()
            .all(&case.handler)
            .into_iter()
            .filter(|pod| pod["metadata"]["labels"]["case"] == case.slug)
            .collect();
        let there = pods.iter().filter(|pod| is_ready(pod)).count();
        if there == count && pods.len() == count {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{there} of {count} pods are ready after {} s, of {}", LIMIT.as_secs(), pods.len());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How long it takes, and how long until all but one are gone, as a ratio to the peer's. Nothing is asserted of times: the machine has other
/// things to do.
async fn from_1_to_30(case: &Case) -> Result<()> {
    let name = case.name("");
    let spec = json!({
        "replicas": 1,
        "selector": { "matchLabels": { "app": name } },
        "template": case.template(&name, json!({ "containers": [sleeper("c")] })),
    });
    case.create("apps/v1", "Deployment", &name, json!({ "spec": spec })).await?;
    ready(case, 1).await?;
    let begin = Instant::now();
    let deployment = format!("deployment/{name}");
    case.kubectl().must(&case.handler, &["scale", &deployment, &format!("--replicas={PODS}")]).await?;
    ready(case, PODS).await?;
    let up = begin.elapsed();
    let begin = Instant::now();
    case.kubectl().must(&case.handler, &["scale", &deployment, "--replicas=1"]).await?;
    ready(case, 1).await?;
    let down = begin.elapsed();
    let ratio = {
        let mut took = lock(&TOOK);
        took.insert(case.handler.clone(), up);
        took.get(PEER).map(|peer| up.as_secs_f64() / peer.as_secs_f64())
    };
    let ratio = ratio.map(|ratio| format!(", {ratio:.2} of {PEER}'s")).unwrap_or_default();
    case.note(format!("{:.1} s{ratio}; down {:.1} s", up.as_secs_f64(), down.as_secs_f64()));
    Ok(())
}
