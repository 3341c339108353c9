//! A sandboxer that cannot be set up for the moment: its hypervisor or its guest's kernel is away during a package's upgrade, for one.
//!
//! The others serve. Of this one everything is answered Unavailable, with the reason; its sandboxes from before count as not recovered. It is
//! tried again from time to time and whenever it is wanted, and is the sandboxer itself from then on.

use std::{
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use futures::future::BoxFuture;
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tracing::{debug, error, info};

use crate::{
    contract::{Known, Leftover, Sandbox, SandboxContext, Sandboxer},
    error::{Error, Result},
    id::{Namespace, SandboxId},
    owner::guarded,
    types::{Capabilities, SandboxSpec},
};

/// Within this time nobody has it tried again.
const FLOOR: Duration = Duration::from_secs(1);
/// The first pause before it is tried again by itself, which doubles.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Sets a sandboxer up.
pub type Open = Box<dyn Fn() -> BoxFuture<'static, Result<Arc<dyn Sandboxer>>> + Send + Sync>;

/// See the module.
pub struct Deferred {
    name: String,
    open: Open,
    opened: OnceLock<Arc<dyn Sandboxer>>,
    why: Mutex<String>,
    /// When the last attempt failed. Held during one.
    failed: tokio::sync::Mutex<Instant>,
}

impl Deferred {
    /// Sets a sandboxer up; where that fails, stands for it until it succeeds. The error is for whoever cannot do without.
    pub async fn open(name: String, open: Open) -> (Arc<dyn Sandboxer>, Option<Error>) {
        let error = match guarded(open()).await {
            Ok(sandboxer) => return (sandboxer, None),
            Err(error) => error,
        };
        error!(sandboxer = name, error = error.report(), "a sandboxer cannot be set up; its pods are unavailable until it can");
        let (why, failed) = (Mutex::new(error.report()), tokio::sync::Mutex::new(Instant::now()));
        let deferred = Arc::new(Self { name, open, opened: OnceLock::new(), why, failed });
        let waiting = Arc::downgrade(&deferred);
        tokio::spawn(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                sleep(pause).await;
                pause = (2 * pause).min(LONGEST_PAUSE);
                let Some(deferred) = waiting.upgrade() else { return };
                match deferred.ready().await {
                    Ok(_) => return,
                    Err(error) => debug!(sandboxer = deferred.name, error = error.report(), "sandboxer still cannot be set up"),
                }
            }
        });
        (deferred, Some(error))
    }

    /// The sandboxer, if it can be set up now.
    async fn ready(&self) -> Result<&Arc<dyn Sandboxer>> {
        if let Some(sandboxer) = self.opened.get() {
            return Ok(sandboxer);
        }
        // One attempt at a time; who has waited for one has its result.
        let mut failed = self.failed.lock().await;
        if self.opened.get().is_none() && failed.elapsed() >= FLOOR {
            match guarded((self.open)()).await {
                Ok(sandboxer) => {
                    info!(
                        sandboxer = self.name,
                        technique = sandboxer.capabilities().technique,
                        "sandboxer ready after retries"
                    );
                    return Ok(self.opened.get_or_init(|| sandboxer));
                }
                Err(error) => {
                    *self.why.lock().unwrap_or_else(PoisonError::into_inner) = error.report();
                    *failed = Instant::now();
                }
            }
        }
        self.opened.get().ok_or_else(|| Error::Unavailable { what: format!("sandboxer {}", self.name), why: self.reason() })
    }

    fn reason(&self) -> String {
        let why = self.why.lock().unwrap_or_else(PoisonError::into_inner);
        format!("{why}; tried again within a minute, and for each new pod")
    }
}

#[async_trait]
impl Sandboxer for Deferred {
    fn unavailable(&self) -> Option<String> {
        match self.opened.get() {
            Some(sandboxer) => sandboxer.unavailable(),
            None => Some(self.reason()),
        }
    }

    fn capabilities(&self) -> Capabilities {
        let no = || Err(self.reason());
        match self.opened.get() {
            Some(sandboxer) => sandboxer.capabilities(),
            None => Capabilities {
                technique: "unavailable".into(),
                exec: no(),
                pause: no(),
                update: no(),
                terminal: no(),
                features: None,
            },
        }
    }

    async fn create(&self, spec: Arc<SandboxSpec>, context: SandboxContext) -> Result<Arc<dyn Sandbox>> {
        self.ready().await?.create(spec, context).await
    }

    async fn recover(&self, spec: Arc<SandboxSpec>, context: SandboxContext, record: Value) -> Result<Arc<dyn Sandbox>> {
        self.ready().await?.recover(spec, context, record).await
    }

    async fn leftovers(&self, known: &Known) -> Result<Vec<Leftover>> {
        self.ready().await?.leftovers(known).await
    }

    async fn processes(&self, namespace: &Namespace, id: &SandboxId) -> Result<Vec<u32>> {
        self.ready().await?.processes(namespace, id).await
    }
}
