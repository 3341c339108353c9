//! What the API server has shown of each pod: a state per change, so that a restart or a moment without readiness is seen however short.

use std::collections::HashMap;
use std::io::BufReader;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::sync::watch;

use super::kubectl::Kubectl;

/// A state of a pod, and when it was seen.
#[derive(Clone, Debug)]
pub struct Seen {
    /// When.
    pub at: Instant,
    /// The pod as the API server shows it; `Null` once it is gone.
    pub pod: Value,
}

/// States by namespace and name.
type History = HashMap<(String, String), Vec<Seen>>;

/// A running watch.
pub struct PodWatch {
    history: Arc<Mutex<History>>,
    changes: watch::Receiver<u64>,
    ending: Arc<AtomicBool>,
    child: Arc<Mutex<std::process::Child>>,
}

impl PodWatch {
    pub(super) fn start(kubectl: &Kubectl) -> Result<Self> {
        let history = Arc::<Mutex<History>>::default();
        let (changed, changes) = watch::channel(0);
        let ending = Arc::new(AtomicBool::new(false));
        let mut first = spawn(kubectl)?;
        let mut output = first.stdout.take();
        let child = Arc::new(Mutex::new(first));
        let (kubectl, shared, over, current) = (kubectl.clone(), Arc::clone(&history), Arc::clone(&ending), Arc::clone(&child));
        std::thread::Builder::new().name("pods".to_owned()).spawn(move || {
            while let Some(stdout) = output.take() {
                let events = serde_json::Deserializer::from_reader(BufReader::new(stdout)).into_iter::<Value>();
                // The last one of a watch that is ended may be cut.
                for event in events.map_while(Result::ok) {
                    note(&mut lock(&shared), event);
                    changed.send_modify(|count| *count += 1);
                }
                let mut child = lock(&current);
                // It has closed its end, or what it says is no JSON.
                let _ = child.kill();
                let _ = child.wait();
                if over.load(Ordering::SeqCst) {
                    return;
                }
                match spawn(&kubectl) {
                    Ok(mut next) => {
                        output = next.stdout.take();
                        *child = next;
                    }
                    Err(error) => eprintln!("pods are not watched any more: {error:#}"),
                }
            }
        })?;
        Ok(Self { history, changes, ending, child })
    }

    pub(super) fn stop(&self) {
        self.ending.store(true, Ordering::SeqCst);
        // Its thread reaps it.
        let _ = lock(&self.child).kill();
    }

    /// All states seen of a pod since the first, or since it was gone last.
    #[must_use]
    pub fn history(&self, namespace: &str, name: &str) -> Vec<Seen> {
        lock(&self.history).get(&(namespace.to_owned(), name.to_owned())).cloned().unwrap_or_default()
    }

    /// The last states of a namespace's pods that there are.
    #[must_use]
    pub fn all(&self, namespace: &str) -> Vec<Value> {
        let history = lock(&self.history);
        let last = history.iter().filter(|((place, _), _)| place == namespace).filter_map(|(_, seen)| seen.last());
        last.filter(|seen| !seen.pod.is_null()).map(|seen| seen.pod.clone()).collect()
    }

    /// Waits until `look` finds something in the last state of a pod: `Null` when it is gone, or not there yet.
    ///
    /// # Errors
    /// `look`'s own, or not in time; the error carries the pod's status.
    pub async fn until<T>(
        &self,
        (namespace, name): (&str, &str),
        what: &str,
        limit: Duration,
        mut look: impl FnMut(&Value) -> Result<Option<T>>,
    ) -> Result<T> {
        let end = tokio::time::Instant::now() + limit;
        let mut changes = self.changes.clone();
        loop {
            changes.mark_unchanged();
            let pod = self.history(namespace, name).pop().map_or(Value::Null, |seen| seen.pod);
            if let Some(found) = look(&pod).with_context(|| format!("pod {name}: {}", pod["status"]))? {
                return Ok(found);
            }
            match tokio::time::timeout_at(end, changes.changed()).await {
                Ok(changed) => changed.context("pods are not watched any more")?,
                Err(_) => bail!("waited {} s in vain for {what} of pod {name}: {}", limit.as_secs(), pod["status"]),
            }
        }
    }
}

impl Drop for PodWatch {
    fn drop(&mut self) {
        self.stop();
    }
}

fn spawn(kubectl: &Kubectl) -> Result<std::process::Child> {
    let args = ["get", "pods", "--all-namespaces", "--watch", "--output-watch-events", "--output", "json"];
    let mut command = kubectl.command("", &args).into_std();
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    command.spawn().context("run kubectl")
}

fn note(history: &mut History, mut event: Value) {
    let pod = event["object"].take();
    let name = |field: &str| pod["metadata"][field].as_str().unwrap_or_default().to_owned();
    let seen = history.entry((name("namespace"), name("name"))).or_default();
    let is_gone = event["type"] == "DELETED";
    // A pod of the same name that comes after it is another one.
    if seen.last().is_some_and(|last| last.pod.is_null()) {
        seen.clear();
    }
    seen.push(Seen { at: Instant::now(), pod: if is_gone { Value::Null } else { pod } });
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often the containers of a pod were started again, in these states of it.
#[must_use]
pub fn restarts(pod: &Value) -> u64 {
    statuses(pod).filter_map(|status| status["restartCount"].as_u64()).sum()
}

/// The statuses of all containers of a pod.
pub fn statuses(pod: &Value) -> impl Iterator<Item = &Value> {
    ["initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"]
        .into_iter()
        .filter_map(|list| pod["status"][list].as_array())
        .flatten()
}

/// Each time that a pod was ready and then was not, since `begin`: when, and what Kubernetes says of it.
#[must_use]
pub fn flaps(history: &[Seen], begin: Instant) -> Vec<String> {
    let ready = |seen: &Seen| super::condition(&seen.pod, "Ready").is_some_and(|(status, _)| status == "True");
    let pairs = history.windows(2).filter(|pair| pair[1].at >= begin && ready(&pair[0]) && !ready(&pair[1]));
    pairs
        .map(|pair| {
            let why = super::condition(&pair[1].pod, "Ready").map_or("it is gone", |(_, message)| message);
            format!("after {:.1} s: {why}", pair[1].at.duration_since(begin).as_secs_f32())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(ready: &str, restarts: u64) -> Value {
        json!({
            "metadata": { "namespace": "n", "name": "p" },
            "status": {
                "conditions": [{ "type": "Ready", "status": ready }],
                "containerStatuses": [{ "restartCount": restarts }, { "restartCount": 1 }],
            },
        })
    }

    #[test]
    fn flaps_and_restarts_are_counted() {
        let begin = Instant::now();
        let mut history = History::new();
        for state in [pod("False", 0), pod("True", 0), pod("True", 0), pod("False", 1), pod("True", 1)] {
            note(&mut history, json!({ "type": "MODIFIED", "object": state }));
        }
        let seen = &history[&("n".to_owned(), "p".to_owned())];
        assert_eq!(flaps(seen, begin).len(), 1);
        assert_eq!(flaps(seen, Instant::now()), Vec::<String>::new());
        assert_eq!(restarts(&seen[0].pod), 1);
        assert_eq!(restarts(&seen[4].pod), 2);
    }

    #[test]
    fn a_pod_of_the_same_name_is_another_one() {
        let mut history = History::new();
        for (kind, state) in [("ADDED", pod("True", 0)), ("DELETED", pod("True", 0)), ("ADDED", pod("False", 0))] {
            note(&mut history, json!({ "type": kind, "object": state }));
        }
        let seen = &history[&("n".to_owned(), "p".to_owned())];
        assert_eq!((seen.len(), flaps(seen, seen[0].at)), (1, Vec::new()));
    }
}
