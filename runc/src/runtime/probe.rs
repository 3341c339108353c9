//! Finding an OCI runtime, and finding out what it is.

use std::{
    env, fmt,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use kuasar_sandboxers::{Error, Result, programs::Programs, reaper::Reaper};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tracing::{error, warn};

use super::{launch, memory::listen, trial};
use crate::config::{RuntimeChoice, RuntimeName};

/// Name of the directory of a trial, which no containerd namespace can have.
const TRIAL: &str = ".trial";

/// How long a runtime may take to say its version.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// Where programs are when `PATH` is not set.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A version as far as it is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version(pub u32, pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// Reads the leading numbers of `1.3.5`, `1.2.0-rc.1+dev`, `1.8.1.0.0.0.23-3856` or `v1.0`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(str::parse);
        let first = numbers.next()?.ok()?;
        let mut next = || numbers.next().and_then(std::result::Result::ok);
        Some(Self(first, next()?, next().unwrap_or(0)))
    }
}

/// Which program it is, by what it calls itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// One that we know.
    Known(RuntimeName),
    /// Another that understands the same command line.
    Other,
}

impl Kind {
    /// The oldest version that can be used.
    fn minimum(self) -> Version {
        match self {
            // The first with `features`, cgroup v2 `kill` and JSON logs of every error.
            Self::Known(RuntimeName::Runc) => Version(1, 1, 0),
            Self::Known(RuntimeName::Crun) => Version(1, 0, 0),
            Self::Known(RuntimeName::Youki) => Version(0, 3, 0),
            Self::Other => Version(0, 0, 0),
        }
    }
}

/// An OCI runtime that can be used. Clones share it.
#[derive(Clone, Debug)]
pub struct Runtime {
    facts: Arc<Facts>,
    /// Why a better one is not used.
    instead: Option<Arc<str>>,
}

/// What is known of one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) program: PathBuf,
    kind: Kind,
    name: String,
    version: Version,
    newest_spec: Option<Version>,
    features: Option<Value>,
    /// Whether it can have systemd make control groups. A static crun cannot.
    systemd: bool,
    /// Why containers do not run with it: what a trial has shown.
    #[serde(default)]
    unfit: Option<String>,
}

/// Looks for runtimes.
struct Search<'a> {
    reaper: &'a Reaper,
    known: Programs,
    /// Where to try what is not known; without, nothing is tried.
    root: Option<&'a Path>,
}

impl Runtime {
    /// The runtime of that choice, as far as it tells by itself what it is. `Auto` takes the fastest that hides nothing from containerd: a
    /// crun that knows `features` (else no recursive read-only mounts and no user namespaces are offered) and runs containers here, else
    /// runc, else another crun. Never youki: processes that it adds to a container run without the container's seccomp profile.
    ///
    /// # Errors
    /// [`Error::Unavailable`] that says what was found, what is wanted, and what to do.
    pub async fn find(choice: &RuntimeChoice, reaper: &Reaper) -> Result<Self> {
        Search { reaper, known: Programs::default(), root: None }.find(choice).await
    }

    /// The same, with what the daemon has found out whose sandboxer has the directory `root`.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub async fn find_as_known(choice: &RuntimeChoice, reaper: &Reaper, root: &Path) -> Result<Self> {
        Search { reaper, known: Programs::load(root), root: None }.find(choice).await
    }

    /// The same, as the daemon does it: one that is not known yet has to run a container, and what that shows is written down in `root`.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub async fn find_and_try(choice: &RuntimeChoice, reaper: &Reaper, root: &Path) -> Result<Self> {
        let found = Search { reaper, known: Programs::load_and_record(root), root: Some(root) }.find(choice).await?;
        if let Some(why) = found.obstacle() {
            error!(runtime = %found, program = %found.program().display(), why, "containers will not run with this OCI runtime");
        }
        if let Some(why) = found.instead() {
            warn!(runtime = %found, program = %found.program().display(), why, "the best OCI runtime is not used");
        }
        Ok(found)
    }

    /// The same, for pods whose control groups systemd makes.
    pub(crate) async fn find_for_systemd(choice: &RuntimeChoice, reaper: &Reaper, root: &Path) -> Result<Self> {
        Search { reaper, known: Programs::load_and_record(root), root: Some(root) }.find_for_systemd(choice).await
    }

    /// The runtime that containerd's runtime options name (`BinaryName`): a path, or a name on `PATH`.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub async fn of_option(binary: &str, reaper: &Reaper) -> Result<Self> {
        let path = if binary.contains('/') { Some(PathBuf::from(binary)) } else { on_path(binary) };
        match path {
            Some(path) => Self::probe(&path, reaper).await,
            None => {
                Err(unavailable(format!("{binary}, which the runtime option BinaryName names, is not on PATH; install it")))
            }
        }
    }

    /// Asks a program what it is.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it is missing, too old, or no OCI runtime.
    pub async fn probe(program: &Path, reaper: &Reaper) -> Result<Self> {
        let asked = async |question| {
            let said = listen(reaper, launch::command(program, None)?.arg(question), PROBE_LIMIT).await?;
            launch::not_started(program, said.status).map_or(Ok(said), Err)
        };
        let said = match asked("--version").await {
            Ok(said) => said,
            Err(error) => {
                let path = program.display();
                return Err(unavailable(format!(
                    "{path} cannot be run ({}); install an OCI runtime, or set the sandboxer's \"runtime\" to one",
                    error.report()
                )));
            }
        };
        if said.status != 0 {
            return Err(no_runtime(program, said.status, &said.stdout));
        }
        let features = asked("features").await?;
        let features = if features.status == 0 { features.stdout } else { String::new() };
        Self::told(program, &said.stdout, &features)
    }

    /// A program of which it is known what it says to `--version` and `features`, so that it need not be asked. `features` is empty for
    /// one that knows no such command.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when that is not what an OCI runtime says, or one that is too old.
    pub fn told(program: &Path, version: &str, features: &str) -> Result<Self> {
        let banner = Banner::parse(version).ok_or_else(|| no_runtime(program, 0, version))?;
        let minimum = banner.kind.minimum();
        if banner.version < minimum {
            return Err(unavailable(format!(
                "{} is {} {}, which is too old; install {minimum} or newer, or set the sandboxer's \"runtime\" to another",
                program.display(),
                banner.name,
                banner.version,
            )));
        }
        let features = serde_json::from_str(features).ok().filter(|document: &Value| document["ociVersionMin"].is_string());
        Ok(Self::known(Facts {
            program: program.to_owned(),
            kind: banner.kind,
            name: banner.name,
            version: banner.version,
            newest_spec: banner.spec,
            features,
            systemd: banner.kind != Kind::Known(RuntimeName::Crun) || version.contains("+SYSTEMD"),
            unfit: None,
        }))
    }

    fn known(facts: Facts) -> Self {
        Self { facts: Arc::new(facts), instead: None }
    }

    /// Why it is used and not a better one that is there, for `auto`.
    #[must_use]
    pub fn instead(&self) -> Option<&str> {
        self.instead.as_deref()
    }

    /// The program.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.facts.program
    }

    /// Which one it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.facts.kind
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.facts.version
    }

    /// Its `features` document (runtime-spec `features.md`), where it has one.
    #[must_use]
    pub fn features(&self) -> Option<&Value> {
        self.facts.features.as_ref()
    }

    /// Why it cannot run containers on this host, as far as that is known: by a trial, or because crun refuses the mixed form of control
    /// groups when some controllers are left in the v2 tree.
    #[must_use]
    pub fn obstacle(&self) -> Option<String> {
        const CONTROLLERS: &str = "/sys/fs/cgroup/unified/cgroup.controllers";
        if self.facts.unfit.is_some() || !self.is_crun() {
            return self.facts.unfit.clone();
        }
        let left = std::fs::read_to_string(CONTROLLERS).ok()?;
        let left = left.trim();
        (!left.is_empty()).then(|| {
            format!(
                "{self} does not run on cgroup v1 with controllers left in v2 ({left}); boot with cgroup v2 alone, or use runc"
            )
        })
    }

    /// Whether it can have systemd make control groups.
    pub(crate) fn can_use_systemd(&self) -> bool {
        self.facts.systemd
    }

    /// Whether it is crun, some of whose ways are its own.
    pub(crate) fn is_crun(&self) -> bool {
        self.facts.kind == Kind::Known(RuntimeName::Crun)
    }

    /// Whether it refuses a spec that names a newer `ociVersion` than 1.0, as crun up to 1.8 does even if the content is fine.
    pub(crate) fn only_spec_1_0(&self) -> bool {
        self.is_crun() && self.facts.newest_spec.is_some_and(|spec| spec < Version(1, 1, 0))
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.facts.name, self.facts.version)
    }
}

impl Search<'_> {
    async fn find(&mut self, choice: &RuntimeChoice) -> Result<Runtime> {
        match choice {
            RuntimeChoice::Path(path) => self.probe(path).await,
            RuntimeChoice::Named(name) => self.named(*name).await,
            RuntimeChoice::Auto => {
                let crun = self.named(RuntimeName::Crun).await.and_then(|crun| match crun.obstacle() {
                    None => Ok(crun),
                    Some(why) => Err(unavailable(format!("{}: {why}", crun.program().display()))),
                });
                let why = match &crun {
                    Ok(crun) if crun.features().is_some() => return Ok(crun.clone()),
                    Ok(crun) => format!("{crun} at {} does not tell what it can do", crun.program().display()),
                    Err(error) => reason(error),
                };
                match (self.named(RuntimeName::Runc).await, crun) {
                    (Ok(runc), _) => Ok(Runtime { instead: Some(why.into()), ..runc }),
                    (Err(_), Ok(crun)) => Ok(crun),
                    (Err(runc), Err(_)) => Err(unavailable(format!("{}; {why}", reason(&runc)))),
                }
            }
        }
    }

    async fn find_for_systemd(mut self, choice: &RuntimeChoice) -> Result<Runtime> {
        if *choice != RuntimeChoice::Auto {
            let found = self.find(choice).await?;
            let why =
                "cannot have systemd make control groups; set the sandboxer's \"runtime\" to auto, runc, or a crun that can";
            return if found.can_use_systemd() { Ok(found) } else { Err(unavailable(format!("{found} {why}"))) };
        }
        for path in candidates(RuntimeName::Crun) {
            match self.probe(&path).await {
                Ok(crun) if crun.can_use_systemd() && crun.obstacle().is_none() && crun.features().is_some() => {
                    return Ok(crun);
                }
                _ => {}
            }
        }
        self.named(RuntimeName::Runc).await
    }

    async fn named(&mut self, name: RuntimeName) -> Result<Runtime> {
        match candidates(name).into_iter().next() {
            Some(path) => self.probe(&path).await,
            None => Err(unavailable(format!(
                "{name} is missing: it is not named by {variable}, not in ../libexec/kuasar and not on PATH; install {name} {minimum} \
                 or newer, or set the sandboxer's \"runtime\" to its path",
                name = name.program(),
                variable = name.variable(),
                minimum = Kind::Known(name).minimum(),
            ))),
        }
    }

    async fn probe(&mut self, program: &Path) -> Result<Runtime> {
        if let Some(facts) = self.known.get(program) {
            return Ok(Runtime::known(facts));
        }
        let mut found = Runtime::probe(program, self.reaper).await?;
        let Some(root) = self.root else { return Ok(found) };
        // runc needs nothing that this daemon does not need, takes ten times as long, and is what there is when all else fails.
        if found.kind() != Kind::Known(RuntimeName::Runc)
            && let Err(error) = trial::run(&found, self.reaper, &root.join(TRIAL)).await
        {
            let unfit = Some(format!("a trial container does not run: {}", error.report()));
            found = Runtime::known(Facts { unfit, ..(*found.facts).clone() });
            // What is not its own answer, as a node without memory or time, may be over when the next daemon asks.
            if !matches!(error, Error::Backend { .. }) {
                return Ok(found);
            }
        }
        self.known.record(found.program(), &*found.facts);
        Ok(found)
    }
}

fn reason(error: &Error) -> String {
    match error {
        Error::Unavailable { why, .. } => why.clone(),
        other => other.report(),
    }
}

/// Programs of that name, the first choice first.
fn candidates(name: RuntimeName) -> Vec<PathBuf> {
    let named = env::var_os(name.variable()).filter(|path| !path.is_empty()).map(PathBuf::from);
    named.into_iter().chain(beside(name.program())).chain(on_path(name.program())).collect()
}

/// Where `make install` puts the crun that is built with this daemon: `libexec/kuasar` beside the directory of its programs.
fn beside(program: &str) -> Option<PathBuf> {
    let programs = env::current_exe().ok()?;
    let path = programs.parent()?.parent()?.join("libexec/kuasar").join(program);
    is_program(&path).then_some(path)
}

/// What `--version` prints: `runc version 1.3.5`, then lines `key: value`.
struct Banner {
    kind: Kind,
    name: String,
    version: Version,
    spec: Option<Version>,
}

impl Banner {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.lines().next()?.split_whitespace();
        let name = words.next()?.trim_end_matches(':').to_owned();
        let version = words.find_map(Version::parse)?;
        let known =
            [RuntimeName::Runc, RuntimeName::Crun, RuntimeName::Youki].into_iter().find(|known| known.program() == name);
        let spec = text.lines().find_map(|line| Version::parse(line.strip_prefix("spec:")?.trim()));
        Some(Self { kind: known.map_or(Kind::Other, Kind::Known), name, version, spec })
    }
}

fn no_runtime(program: &Path, status: u32, said: &str) -> Error {
    unavailable(format!(
        "{} is not an OCI runtime: `--version` ended with {status} and said {:?}",
        program.display(),
        said.lines().next().unwrap_or_default(),
    ))
}

fn unavailable(why: String) -> Error {
    Error::Unavailable { what: "OCI runtime".into(), why }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    env::split_paths(&path).map(|directory| directory.join(program)).find(|candidate| is_program(candidate))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn banners() {
        let runc = Banner::parse("runc version 1.3.5\nspec: 1.2.1\ngo: go1.26.8\nlibseccomp: 2.5.4\n").unwrap();
        assert_eq!(
            (runc.kind, runc.version, runc.spec),
            (Kind::Known(RuntimeName::Runc), Version(1, 3, 5), Some(Version(1, 2, 1)))
        );
        let crun =
            Banner::parse("crun version 1.8.1\ncommit: f8a\nrundir: /run/crun\nspec: 1.0.0\n+SYSTEMD +SELINUX\n").unwrap();
        assert_eq!(
            (crun.kind, crun.version, crun.spec),
            (Kind::Known(RuntimeName::Crun), Version(1, 8, 1), Some(Version(1, 0, 0)))
        );
        let youki = Banner::parse("youki version: 0.5.7\ncommit: 0.5.7-0-abc\n").unwrap();
        assert_eq!((youki.kind, youki.version), (Kind::Known(RuntimeName::Youki), Version(0, 5, 7)));
        assert_eq!(Banner::parse("runsc version release-20240101.0\nspec: 1.1.0-rc.1\n").map(|banner| banner.version), None);
        assert!(Banner::parse("").is_none());
        assert!(Banner::parse("hello world").is_none());
    }

    #[test]
    fn what_a_runtime_has_said_before_is_believed() {
        let features = r#"{"ociVersionMin": "1.0.0"}"#;
        let crun = Runtime::told(Path::new("/bin/crun"), "crun version 1.21\nspec: 1.0.0\n", features).unwrap();
        assert_eq!((crun.to_string().as_str(), crun.features().is_some()), ("crun 1.21.0", true));
        assert!(crun.only_spec_1_0() && !crun.can_use_systemd());
        let with =
            Runtime::told(Path::new("/bin/crun"), "crun version 1.8.1\nspec: 1.0.0\n+SYSTEMD +SELINUX +CAP\n", "").unwrap();
        assert!(with.can_use_systemd());
        let old = Runtime::told(Path::new("/bin/runc"), "runc version 1.0.3\n", "").unwrap_err();
        assert!(old.to_string().contains("too old"), "{old}");
        assert!(Runtime::told(Path::new("/bin/true"), "", "").is_err());
    }

    #[test]
    fn versions() {
        assert_eq!(Version::parse("1.2.0-rc.1+dev"), Some(Version(1, 2, 0)));
        assert_eq!(Version::parse("1.8.1.0.0.0.23-3856"), Some(Version(1, 8, 1)));
        assert_eq!(Version::parse("v1.0"), Some(Version(1, 0, 0)));
        assert_eq!(Version::parse("unknown"), None);
        assert!(Version(1, 10, 0) > Version(1, 9, 9));
    }
}
