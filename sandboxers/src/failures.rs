//! Starts that have failed, each told in a file: the error outlives the sandbox, which is gone by then.
//!
//! ```text
//! <state>/failures/<microseconds since 1970>-<sandbox or container id>.json     mode 0600, the newest 100
//! ```
//!
//! The files are all there is: whoever asks reads them, so a restart of the daemon loses none. They are not synced, for they are of
//! no use to anything but people.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use futures::FutureExt;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use crate::{
    error::{Code, Error, Result},
    id::{ContainerId, Namespace, SandboxId},
    owner::panicked,
    stages::{ProgramLog, Stage, Stages},
};

/// How many are kept.
pub const KEPT: usize = 100;

/// Name of their directory below the daemon's state directory.
pub const DIRECTORY: &str = "failures";

/// As many digits of an id as crictl and docker show.
pub const SHORT_ID: usize = 13;

/// How much of an error is kept, in bytes from its beginning.
const ERROR_LIMIT: usize = 16 << 10;

/// A start that has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// When.
    pub at: SystemTime,
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The sandbox that was to be started, or that the container is in.
    pub sandbox: SandboxId,
    /// The container that was to be started; `None` for the sandbox itself.
    pub container: Option<ContainerId>,
    /// What failed: `create the container`.
    pub operation: String,
    /// The status code it was answered with.
    pub code: Code,
    /// The error with its causes.
    pub error: String,
    /// What had been begun; the last one failed.
    pub stages: Vec<Stage>,
    /// What the program has logged that was called last, such as an OCI runtime.
    pub log: Option<ProgramLog>,
    /// Where this is written down.
    pub file: PathBuf,
}

impl Failure {
    /// Where the rest is, in a few words for the end of an error message, which Kubernetes shows with each event. They are the same for
    /// each try of a container, so that Kubernetes counts such events instead of listing them.
    fn reference(&self, written: bool) -> String {
        match self.stages.last() {
            // Without a report there is nothing else that tells.
            Some(failed) if !written => format!("failed stage: {}", failed.name),
            _ => {
                let id: String = self.sandbox.as_str().chars().take(SHORT_ID).collect();
                format!("kuasarctl failures {id}")
            }
        }
    }
}

/// All that have been written down below a daemon's state directory, oldest first; the daemon need not run.
///
/// # Errors
/// When their directory cannot be listed.
pub fn read(state: &Path) -> Result<Vec<Failure>> {
    Failures::below(state).list()
}

/// The directory of failures.
#[derive(Clone, Debug)]
pub(crate) struct Failures(Arc<Path>);

impl Failures {
    /// Those below a daemon's state directory. The directory is made when there is one to be told.
    pub(crate) fn below(state: &Path) -> Self {
        Self(state.join(DIRECTORY).into())
    }

    /// All, oldest first.
    pub(crate) fn list(&self) -> Result<Vec<Failure>> {
        let read = |file: &PathBuf| match fs::read(file).map_err(|error| error.to_string()).and_then(|bytes| parse(&bytes)) {
            Ok(failure) => Some(failure),
            Err(why) => {
                // Removed meanwhile, being written, or of another version.
                debug!(file = %file.display(), why, "cannot read the report of a failure");
                None
            }
        };
        Ok(self.files()?.iter().filter_map(read).collect())
    }

    /// The files, oldest first.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(Error::io("list", &*self.0))?,
        };
        let mut files: Vec<_> = entries.into_iter().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "json"));
        files.sort();
        Ok(files)
    }

    fn write(&self, failure: &Failure) -> Result<()> {
        let file = &failure.file;
        match DirBuilder::new().mode(0o700).create(&self.0) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(Error::io("create", &*self.0)(error)),
            _ => {}
        }
        let create = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
        let mut created = create().map_err(Error::io("create", file))?;
        let text = serde_json::to_vec_pretty(failure).map_err(Error::failed("write a failure as JSON"))?;
        created.write_all(&text).map_err(|error| {
            // Half of it is of no use, and takes room where there is none.
            let _ = fs::remove_file(file);
            Error::io("write", file)(error)
        })
    }

    /// Removes the oldest beyond [`KEPT`].
    fn prune(&self) -> Result<()> {
        let files = self.files()?;
        for file in &files[..files.len().saturating_sub(KEPT)] {
            match fs::remove_file(file) {
                // Somebody else's failure was pruned for at the same time.
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io("remove", file)(error)),
                _ => {}
            }
        }
        Ok(())
    }
}

fn parse(bytes: &[u8]) -> Result<Failure, String> {
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

/// One start, which is told of if it fails. Clones are the same one.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    failures: Failures,
    stages: Stages,
    namespace: Namespace,
    sandbox: SandboxId,
    container: Option<ContainerId>,
    operation: &'static str,
}

impl Attempt {
    /// `operation` reads as an instruction (`create the container`).
    pub(crate) fn new(
        failures: &Failures,
        (namespace, sandbox): (&Namespace, &SandboxId),
        container: Option<&ContainerId>,
        operation: &'static str,
    ) -> Self {
        Self {
            failures: failures.clone(),
            stages: Stages::default(),
            namespace: namespace.clone(),
            sandbox: sandbox.clone(),
            container: container.cloned(),
            operation,
        }
    }

    /// Begins a stage outside of [`Self::watch`].
    pub(crate) fn enter(&self, stage: &'static str) {
        self.stages.enter(stage);
    }

    /// Does the work of the attempt, or a part of it. A panic is a failure like others.
    pub(crate) fn watch<T, W>(&self, work: W) -> impl Future<Output = Result<T>> + use<T, W>
    where
        W: Future<Output = Result<T>>,
    {
        let attempt = self.clone();
        async move {
            let done = AssertUnwindSafe(attempt.stages.scope(work)).catch_unwind().await;
            let done = done.unwrap_or_else(|panic| Err(panicked(&*panic))).map_err(|error| attempt.failed(error))?;
            attempt.tell();
            Ok(done)
        }
    }

    /// Logs how long each stage has taken up to now.
    fn tell(&self) {
        let stages = self.stages.so_far();
        if stages.is_empty() || !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        let stages = serde_json::to_string(&stages).unwrap_or_default();
        let id = self.container.as_ref().map_or(self.sandbox.as_str(), ContainerId::as_str);
        debug!(id, operation = self.operation, %stages, "done");
    }

    /// Writes the failure down, and says in the error where to read more of it. Refusals are not failures, nor is what was wrong before
    /// anything had begun.
    pub(crate) fn failed(&self, error: Error) -> Error {
        let (stages, log) = self.stages.account();
        if stages.is_empty() || matches!(error, Error::Denied(_) | Error::AlreadyExists { .. }) {
            return error;
        }
        let at = SystemTime::now();
        let id = self.container.as_ref().map_or(self.sandbox.as_str(), ContainerId::as_str);
        let micros = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let failure = Failure {
            at,
            namespace: self.namespace.clone(),
            sandbox: self.sandbox.clone(),
            container: self.container.clone(),
            operation: self.operation.into(),
            code: error.code(),
            error: head(error.report(), ERROR_LIMIT),
            stages,
            log,
            file: self.failures.0.join(format!("{micros:016}-{id}.json")),
        };
        let written = self.failures.write(&failure).and_then(|()| {
            // It is written down all the same.
            self.failures.prune().or_else(|error| {
                warn!(error = error.report(), "cannot remove the reports of older failures");
                Ok(())
            })
        });
        if let Err(error) = &written {
            warn!(error = error.report(), "a failure cannot be written down");
        }
        Error::Staged { reference: failure.reference(written.is_ok()), error: Box::new(error) }
    }
}

/// The first `limit` bytes, less what would be half a character.
fn head(mut text: String, limit: usize) -> String {
    if let Some(end) = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end)) {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{
        lifecycle::Denial,
        stages::{enter, keep_log},
    };

    fn attempt(failures: &Failures, container: Option<&str>) -> Attempt {
        let (namespace, sandbox) = ("k8s.io".parse().unwrap(), "pod".parse().unwrap());
        let container = container.map(|id| id.parse().unwrap());
        Attempt::new(failures, (&namespace, &sandbox), container.as_ref(), "create the container")
    }

    async fn fails(attempt: Attempt, error: Error) -> Error {
        let work = async {
            enter("mount the rootfs");
            enter("create the container with runc");
            keep_log("/bin/runc", "{\"level\":\"error\"}");
            Err::<(), _>(error)
        };
        attempt.watch(work).await.unwrap_err()
    }

    fn full() -> Error {
        Error::failed("make it")(Error::io("write", "/x")(io::Error::from_raw_os_error(libc::ENOSPC)))
    }

    #[tokio::test]
    async fn a_failure_is_told_in_the_error_and_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let failures = Failures::below(dir.path());
        assert!(failures.list().unwrap().is_empty());
        let error = fails(attempt(&failures, Some("web")), full()).await;
        let told = failures.list().unwrap();
        let [failure] = told.as_slice() else { panic!("{told:?}") };
        assert_eq!(error.code(), Code::ResourceExhausted);
        let text = full().report();
        let stages: Vec<&str> = failure.stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(stages, ["mount the rootfs", "create the container with runc"]);
        // What took how long is for the report alone, and so is its path: each event of Kubernetes has the whole text.
        assert_eq!(error.report(), format!("{text} (kuasarctl failures pod)"));
        // Wrapped once more it stays what it is.
        let outer = Error::failed("run")(fails(attempt(&failures, None), full()).await);
        assert_eq!(outer.report(), format!("failed to run: {text} (kuasarctl failures pod)"));
        assert_eq!(outer.code(), Code::ResourceExhausted);
        assert_eq!((failure.container.as_ref().unwrap().as_str(), failure.error.as_str()), ("web", text.as_str()));
        assert_eq!((failure.code, failure.operation.as_str()), (Code::ResourceExhausted, "create the container"));
        assert_eq!(failure.log.as_ref().unwrap().program, "/bin/runc");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&failures.0), mode(&failure.file)), (0o700, 0o600));
        // Read by another daemon.
        assert_eq!(Failures::below(dir.path()).list().unwrap()[0], *failure);
    }

    #[tokio::test]
    async fn only_failures_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let failures = Failures::below(dir.path());
        let denial = Denial { kind: "sandbox", id: "pod".into(), state: "stopped", request: "start", remedy: "create it" };
        for refusal in [Error::Denied(denial), Error::AlreadyExists { kind: "sandbox", id: "pod".into() }] {
            let text = refusal.report();
            assert_eq!(fails(attempt(&failures, None), refusal).await.report(), text);
        }
        let early = attempt(&failures, None).watch(async { Err::<(), _>(Error::invalid("x", "y")) }).await.unwrap_err();
        assert_eq!(early.report(), "invalid x: y");
        assert!(!failures.0.exists());
    }

    #[tokio::test]
    async fn a_panic_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let failures = Failures::below(dir.path());
        let work = async {
            enter("calculate");
            panic!("on purpose");
        };
        let error = attempt(&failures, None).watch::<(), _>(work).await.unwrap_err();
        assert!(error.report().ends_with("on purpose (kuasarctl failures pod)"), "{}", error.report());
    }

    #[tokio::test]
    async fn without_room_the_error_is_told_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let failures = Failures::below(dir.path());
        fs::write(&failures.0, "not a directory").unwrap();
        let error = fails(attempt(&failures, None), full()).await;
        assert!(error.report().ends_with(" (failed stage: create the container with runc)"), "{}", error.report());
    }

    #[tokio::test]
    async fn the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let failures = Failures::below(dir.path());
        for number in 0..=KEPT {
            fails(attempt(&failures, Some(&format!("c{number}"))), full()).await;
        }
        let told = failures.list().unwrap();
        assert_eq!((told.len(), fs::read_dir(&failures.0).unwrap().count()), (KEPT, KEPT));
        let ids = |failure: &Failure| failure.container.clone().unwrap().to_string();
        assert_eq!((ids(&told[0]), ids(&told[KEPT - 1])), ("c1".into(), format!("c{KEPT}")));
        // What is none is nobody's business.
        fs::write(failures.0.join("odd.json"), "{").unwrap();
        assert_eq!(failures.list().unwrap().len(), KEPT);
    }

    #[test]
    fn the_beginning_of_a_long_error_is_kept() {
        assert_eq!(head("short".into(), 10), "short");
        assert_eq!(head("éé".into(), 3), "é");
    }
}
