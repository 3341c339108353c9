//! Running critest against a handler, and comparing two runs spec by spec.
//!
//! The measure is the runc shim on the same containerd in the same run: a spec that it passes must pass, one that it runs
//! must not be skipped. What fails alike is the environment's or the images' fault, and is shown as such. What cannot be in a
//! virtual machine is listed here by name, and must not pass either, or the list is out of date.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

/// Specs that ask for what no virtual machine can have, and why.
pub const NOT_IN_MACHINES: &[(&str, &str)] = &[
    (
        "[k8s.io] Container Mount Propagation runtime should support mount propagation mount with 'rshared' should support \
         propagation from host to container and vice versa",
        "mounts of a virtual machine are its own kernel's, and cannot appear on the node",
    ),
    (
        "[k8s.io] Security Context NamespaceOption runtime should support HostPID",
        "the node's processes are another kernel's, which a virtual machine cannot see",
    ),
    (
        "[k8s.io] Security Context NamespaceOption runtime should support HostIpc is true",
        "the node's shared memory segments are another kernel's",
    ),
    (
        "[k8s.io] Security Context NamespaceOption runtime should support HostNetwork is true",
        "the node's sockets and interfaces are another kernel's",
    ),
    (
        "[k8s.io] Streaming runtime should support streaming interfaces runtime should support portforward in host network",
        "the node's sockets and interfaces are another kernel's",
    ),
];

/// How a spec ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It passed.
    Passed,
    /// It failed, with the first line of why.
    Failed(String),
    /// It did not run, with the reason.
    Skipped(String),
}

/// A run of critest.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// The runtime handler.
    pub handler: String,
    /// Each spec by its name.
    pub specs: BTreeMap<String, Outcome>,
    /// critest's own closing lines.
    pub closing: String,
}

impl Run {
    /// Passed, failed, skipped.
    #[must_use]
    pub fn counts(&self) -> (usize, usize, usize) {
        let count = |wanted: fn(&Outcome) -> bool| self.specs.values().filter(|outcome| wanted(outcome)).count();
        (
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            count(|outcome| matches!(outcome, Outcome::Skipped(_))),
        )
    }
}

/// How to run it.
#[derive(Clone, Debug)]
pub struct Critest {
    /// The program.
    pub program: PathBuf,
    /// CRI's socket.
    pub socket: PathBuf,
    /// Where reports and logs go.
    pub out: PathBuf,
    /// Only specs that match this regular expression; empty for all.
    pub focus: String,
    /// NRI's socket, for the specs that need it.
    pub nri_socket: Option<PathBuf>,
}

impl Critest {
    /// Runs it to its end. That specs fail is a result, not an error.
    ///
    /// # Errors
    /// It cannot be run, or writes no report; the error names its log.
    pub async fn run(&self, handler: &str) -> Result<Run> {
        fs::create_dir_all(&self.out).with_context(|| format!("create {}", self.out.display()))?;
        let log = self.out.join(format!("{handler}.log"));
        let report = self.out.join(format!("{handler}.xml"));
        // It looks for one in /etc and beside the program otherwise, and the machine's own must not count.
        let config = self.out.join("crictl.yaml");
        fs::write(&config, "").with_context(|| format!("write {}", config.display()))?;
        if report.exists() {
            fs::remove_file(&report).with_context(|| format!("remove {}", report.display()))?;
        }
        let endpoint = format!("unix://{}", self.socket.display());
        let out = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut command = Command::new(&self.program);
        command
            .arg("-config")
            .arg(&config)
            .args(["-runtime-handler", handler, "-runtime-endpoint", &endpoint, "-image-endpoint", &endpoint])
            .args(["-ginkgo.no-color", "-ginkgo.seed", "1", "-ginkgo.junit-report"])
            .arg(&report)
            .stdin(Stdio::null())
            .stderr(out.try_clone()?)
            .stdout(out)
            // Where it puts the logs of its pods, and the sources it looks for.
            .current_dir(&self.out)
            .kill_on_drop(true);
        if !self.focus.is_empty() {
            command.args(["-ginkgo.focus", &self.focus]);
        }
        if let Some(nri) = &self.nri_socket {
            command.arg("-nri-socket").arg(nri);
        }
        command.status().await.with_context(|| format!("run {}", self.program.display()))?;
        let text = fs::read_to_string(&report).with_context(|| format!("critest wrote no report; see {}", log.display()))?;
        Ok(Run {
            handler: handler.to_owned(),
            specs: parse(&text).with_context(|| format!("in {}", report.display()))?,
            closing: closing(&fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?),
        })
    }
}

/// From ginkgo's "Ran 114 of 142 Specs in …" on: that line and the verdict.
fn closing(log: &str) -> String {
    log.lines().skip_while(|line| !line.starts_with("Ran ")).take(2).collect::<Vec<_>>().join("\n")
}

fn parse(junit: &str) -> Result<BTreeMap<String, Outcome>> {
    let document = roxmltree::Document::parse(junit).context("not XML")?;
    let mut specs = BTreeMap::new();
    for case in document.descendants().filter(|node| node.has_tag_name("testcase")) {
        let name = case.attribute("name").context("a testcase without a name")?;
        // Set-up and reporting nodes are no specs.
        let Some(name) = name.strip_prefix("[It] ") else { continue };
        let message = || {
            case.children()
                .find_map(|child| child.attribute("message"))
                .unwrap_or_default()
                .lines()
                .next()
                .unwrap_or_default()
                .trim_start_matches("skipped - ")
                .to_owned()
        };
        let outcome = match case.attribute("status") {
            Some("passed") => Outcome::Passed,
            Some("skipped" | "pending") => Outcome::Skipped(message()),
            Some(_) => Outcome::Failed(message()),
            None => bail!("the testcase {name} has no status"),
        };
        specs.insert(name.to_owned(), outcome);
    }
    if specs.is_empty() {
        bail!("the report holds no spec");
    }
    Ok(specs)
}

/// What a comparison says of one spec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passes.
    Passed,
    /// The peer passes it, or at least runs it, and we do not; with our outcome in words.
    Behind(String),
    /// Neither passes it; with the reason.
    Alike(String),
    /// It is listed, and does not pass; with the list's reason.
    Impossible(&'static str),
}

/// Compares our run with the peer's, spec by spec. Specs that are `impossible` have to be there, and not to pass.
#[must_use]
pub fn compare(peer: &Run, ours: &Run, impossible: &[(&str, &'static str)]) -> BTreeMap<String, Verdict> {
    let missing = Outcome::Skipped("not in the report".to_owned());
    let listed = impossible.iter().map(|(name, _)| (*name).to_owned());
    let names: BTreeSet<String> = peer.specs.keys().chain(ours.specs.keys()).cloned().chain(listed).collect();
    names
        .into_iter()
        .map(|name| {
            let theirs = peer.specs.get(&name).unwrap_or(&missing);
            let own = ours.specs.get(&name).unwrap_or(&missing);
            if let Some((_, why)) = impossible.iter().find(|(listed, _)| *listed == name) {
                let verdict = match ours.specs.get(&name) {
                    Some(Outcome::Failed(_) | Outcome::Skipped(_)) => Verdict::Impossible(why),
                    Some(Outcome::Passed) => Verdict::Behind(format!("passes, and is listed as impossible ({why}): unlist it")),
                    None => Verdict::Behind(format!("is listed as impossible ({why}), and there is no such spec: unlist it")),
                };
                return (name, verdict);
            }
            let verdict = match (theirs, own) {
                (_, Outcome::Passed) => Verdict::Passed,
                (Outcome::Passed | Outcome::Failed(_), Outcome::Skipped(reason)) => {
                    Verdict::Behind(format!("skipped: {reason}"))
                }
                (Outcome::Passed | Outcome::Skipped(_), Outcome::Failed(reason)) => {
                    Verdict::Behind(format!("failed: {reason}"))
                }
                (Outcome::Failed(_), Outcome::Failed(reason)) => Verdict::Alike(format!("fails with the shim too: {reason}")),
                (Outcome::Skipped(_), Outcome::Skipped(reason)) => Verdict::Alike(reason.clone()),
            };
            (name, verdict)
        })
        .collect()
}

/// Writes the comparison in the form that the summary of `make test` reads: `PASSED` and a number, then a line for each spec
/// that failed or was skipped.
///
/// # Errors
/// The file cannot be written.
pub fn write_results(path: &Path, verdicts: &BTreeMap<String, Verdict>) -> Result<()> {
    let passed = verdicts.values().filter(|verdict| matches!(verdict, Verdict::Passed)).count();
    let mut text = format!("PASSED {passed}\n");
    for (name, verdict) in verdicts {
        // The summary takes what follows the first colon for the reason.
        let name = name.replace(": ", " ");
        match verdict {
            Verdict::Passed => {}
            Verdict::Behind(reason) => text.push_str(&format!("FAIL {name}: {reason}\n")),
            Verdict::Alike(reason) => text.push_str(&format!("SKIP {name}: {reason}\n")),
            Verdict::Impossible(why) => text.push_str(&format!("SKIP {name}: {why}\n")),
        }
    }
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"<testsuites><testsuite>
        <testcase name="[BeforeSuite]" status="passed"/>
        <testcase name="[It] a" status="passed"/>
        <testcase name="[It] b" status="failed"><failure message="first&#10;second">x</failure></testcase>
        <testcase name="[It] c" status="skipped"><skipped message="skipped - no AppArmor"/></testcase>
        </testsuite></testsuites>"#;

    fn run(specs: &[(&str, Outcome)]) -> Run {
        Run { specs: specs.iter().map(|(name, outcome)| ((*name).to_owned(), outcome.clone())).collect(), ..Run::default() }
    }

    #[test]
    fn a_report_is_read() {
        let run = Run { specs: parse(REPORT).unwrap(), ..Run::default() };
        assert_eq!(run.counts(), (1, 1, 1));
        assert_eq!(run.specs["b"], Outcome::Failed("first".to_owned()));
        assert_eq!(run.specs["c"], Outcome::Skipped("no AppArmor".to_owned()));
        assert!(parse("<testsuites/>").is_err());
    }

    #[test]
    fn what_the_peer_passes_must_pass_and_what_it_runs_must_run() {
        let failed = || Outcome::Failed("f".to_owned());
        let skipped = || Outcome::Skipped("s".to_owned());
        let peer = run(&[
            ("both", Outcome::Passed),
            ("ours fails", Outcome::Passed),
            ("ours skips", Outcome::Passed),
            ("theirs fails", failed()),
            ("both fail", failed()),
            ("fails, skips", failed()),
            ("both skip", skipped()),
            ("skips, fails", skipped()),
            ("lost", Outcome::Passed),
        ]);
        let ours = run(&[
            ("both", Outcome::Passed),
            ("ours fails", failed()),
            ("ours skips", skipped()),
            ("theirs fails", Outcome::Passed),
            ("both fail", failed()),
            ("fails, skips", skipped()),
            ("both skip", skipped()),
            ("skips, fails", failed()),
        ]);
        let verdicts = compare(&peer, &ours, &[]);
        let behind: Vec<&str> = verdicts
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Behind(_)))
            .map(|(name, _)| name.as_str())
            .collect();
        assert_eq!(behind, ["fails, skips", "lost", "ours fails", "ours skips", "skips, fails"]);
        assert_eq!(verdicts["theirs fails"], Verdict::Passed);
    }

    #[test]
    fn what_is_listed_must_be_there_and_must_not_pass() {
        let failed = || Outcome::Failed("f".to_owned());
        let peer = run(&[("fails", Outcome::Passed), ("skips", Outcome::Passed), ("passes", Outcome::Passed)]);
        let ours = run(&[("fails", failed()), ("skips", Outcome::Skipped("s".to_owned())), ("passes", Outcome::Passed)]);
        let listed = ["fails", "skips", "passes", "gone"].map(|name| (name, "no node in there"));
        let verdicts = compare(&peer, &ours, &listed);
        for name in ["fails", "skips"] {
            assert_eq!(verdicts[name], Verdict::Impossible("no node in there"));
        }
        for name in ["passes", "gone"] {
            assert!(matches!(&verdicts[name], Verdict::Behind(how) if how.ends_with("unlist it")), "{:?}", verdicts[name]);
        }
    }

    #[test]
    fn the_closing_lines_are_ginkgos_own() {
        let log = "noise\nRan 114 of 142 Specs in 94.6 seconds\nFAIL! -- 112 Passed | 2 Failed\nmore\n";
        assert_eq!(closing(log), "Ran 114 of 142 Specs in 94.6 seconds\nFAIL! -- 112 Passed | 2 Failed");
    }
}
