//! `kuasarctl`: what an administrator asks of the host and of the daemon.

mod admin;
mod drop_in;
mod exec;
mod failures;
mod gc;
mod logs;
mod ps;
mod share;
mod table;

use std::{
    io::{self, Write},
    path::{Path, PathBuf, absolute},
    process::ExitCode,
    time::{Instant, SystemTime},
};

use anyhow::{Context, Result, anyhow};
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use kuasar_sandboxers::reaper::Reaper;
use kuasar_shim::{
    check::{
        self, Host,
        containerd::{self, Version},
        driver,
    },
    config::{Config, DEFAULT_PATH, DEFAULT_STATE, PATH_VARIABLE},
    server::CONTROL_SOCKET,
};
use serde_json::{Value, json};

use crate::{admin::Daemon, drop_in::Target};

/// Looks after kuasard, the daemon that runs pods for containerd.
#[derive(Debug, Parser)]
#[command(name = "kuasarctl", version)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Args, Debug)]
struct Global {
    /// The daemon's state directory; its socket is kuasard.sock in it
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_STATE)]
    state: PathBuf,
    /// The daemon's configuration file
    #[arg(long, global = true, value_name = "FILE", env = PATH_VARIABLE, default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    json: bool,
}

impl Global {
    /// The state directory, as containerd and others have to be told of it.
    fn state(&self) -> Result<PathBuf> {
        absolute(&self.state).context("cannot tell where the state directory is")
    }

    fn socket(&self) -> Result<PathBuf> {
        Ok(self.state()?.join(CONTROL_SOCKET))
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what this host offers to sandboxes, what it lacks, and how to get it
    ///
    /// Exits with 1 when something is missing without which no pod runs.
    Check,
    /// Print the configuration as the daemon understands it
    Config,
    /// Print the drop-in file that makes containerd use the daemon
    ContainerdConfig {
        /// Write it for this version instead of the containerd found
        #[arg(long, value_name = "X.Y.Z")]
        containerd_version: Option<Version>,
        /// Directory where the shim programs are installed [default: where this program is]
        #[arg(long, value_name = "DIR")]
        programs: Option<PathBuf>,
        /// Make this the pause image of the node, for a containerd that pulls it although no pod of kuasar needs it
        #[arg(long, value_name = "REFERENCE")]
        pause_image: Option<String>,
    },
    /// List the daemon's pods and containers
    Ps {
        /// Only this containerd namespace
        #[arg(long, short, default_value = "", hide_default_value = true)]
        namespace: String,
        /// Do not shorten ids
        #[arg(long)]
        no_trunc: bool,
    },
    /// Print all that is known of a pod, as JSON, or why a pod or container that is gone could not be started
    Inspect {
        /// Id of the pod or of a container in it, or the beginning of one
        id: String,
        /// Only in this containerd namespace
        #[arg(long, short, default_value = "", hide_default_value = true)]
        namespace: String,
    },
    /// List starts of pods and containers that have failed, or tell all that is known of those of one pod or container
    ///
    /// The newest 100 are kept, whatever has become of the pod and the daemon.
    Failures {
        /// Id of the pod or container, or the beginning of one
        id: Option<String>,
        /// Only in this containerd namespace
        #[arg(long, short, default_value = "", hide_default_value = true)]
        namespace: String,
        /// Do not shorten ids
        #[arg(long)]
        no_trunc: bool,
    },
    /// Run a program in a pod's virtual machine, beside its containers and as root there
    ///
    /// For pods of a sandboxer with `debug = true`. Exits as the program does, with 128 and the number of the signal that has ended it, or
    /// with 125 when there is no program's exit to tell.
    Exec {
        /// Pass our standard input on
        #[arg(long, short = 'i')]
        stdin: bool,
        /// Give the program a terminal
        #[arg(long, short = 't')]
        tty: bool,
        /// Only in this containerd namespace
        #[arg(long, short, default_value = "", hide_default_value = true)]
        namespace: String,
        /// Id of the pod or of a container in it, or the beginning of one
        id: String,
        /// The program and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Show what the kernel and the agent of a pod's virtual machine say
    Console {
        /// Go on until the machine ends
        #[arg(long, short)]
        follow: bool,
        /// Only in this containerd namespace
        #[arg(long, short, default_value = "", hide_default_value = true)]
        namespace: String,
        /// Id of the pod or of a container in it, or the beginning of one
        id: String,
    },
    /// Show all that is known of a pod's virtual machine
    Logs {
        /// Of the sandbox; what its containers say is shown by crictl logs
        #[arg(long, required = true)]
        sandbox: bool,
        /// Only in this containerd namespace
        #[arg(long, short, default_value = "", hide_default_value = true)]
        namespace: String,
        /// Id of the pod or of a container in it, or the beginning of one
        id: String,
    },
    /// Remove what nobody answers for: sandboxes that containerd has forgotten, and remains of those that nobody knows
    ///
    /// Exits with 1 when something could not be removed, or containerd not be asked.
    Gc {
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Do not shorten ids
        #[arg(long)]
        no_trunc: bool,
    },
    /// Replace the running daemon by another program, without a call failing
    ///
    /// Pods run on, and what containerd asks meanwhile waits for a moment. If the new program does not get ready, the old one goes on.
    /// The configuration is read anew.
    Upgrade {
        /// The new kuasard [default: what is installed where the running one was]
        #[arg(long, value_name = "FILE")]
        binary: Option<PathBuf>,
    },
    /// Show the versions of this program and of the daemon
    Version,
    /// Print a completion script for a shell
    Completions {
        /// For which shell
        shell: Shell,
    },
    /// Write the manual pages and completion scripts of kuasarctl and kuasard below a directory such as /usr/share
    #[command(hide = true)]
    Share {
        /// The directory
        dir: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kuasarctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whoever read our output (`head`) has had enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let global = &cli.global;
    let text = match &cli.command {
        Command::Check => return check(global),
        Command::Config => {
            let config = load(global)?;
            if global.json {
                pretty(&serde_json::to_value(config.to_toml().parse::<toml::Table>()?)?)?
            } else {
                config.to_toml()
            }
        }
        Command::ContainerdConfig { containerd_version, programs, pause_image } => {
            let programs = programs.clone().map_or_else(own_directory, Ok)?;
            containerd_config(global, *containerd_version, &programs, pause_image.as_deref())?
        }
        Command::Ps { namespace, no_trunc } => {
            let list = ask(global, async |daemon| daemon.list(namespace).await)?;
            if global.json { pretty(&list)? } else { ps::render(&list, *no_trunc, SystemTime::now())? }
        }
        Command::Inspect { id, namespace } => {
            let inspected = ask(global, async |daemon| daemon.inspect(namespace, id).await)?;
            match failures::render(&inspected, SystemTime::now())?.filter(|_| !global.json) {
                Some(account) => account,
                None => pretty(&inspected)?,
            }
        }
        Command::Failures { id, namespace, no_trunc } => {
            let found = failures::read(&global.state()?, id.as_deref(), namespace)?;
            match id {
                _ if global.json => pretty(&serde_json::to_value(&found)?)?,
                Some(_) => failures::accounts(&found, SystemTime::now()),
                None => failures::table(&found, *no_trunc, SystemTime::now()),
            }
        }
        Command::Exec { stdin, tty, namespace, id, command } => {
            let exec = exec::Exec { namespace, id, stdin: *stdin, terminal: *tty, command };
            return exec::run(&global.socket()?, &exec);
        }
        Command::Console { follow, namespace, id } => return console(global, namespace, id, *follow),
        Command::Logs { sandbox: _, namespace, id } => {
            let account =
                block_on(async { Daemon::connect_for_account(&global.socket()?).await?.account(namespace, id).await })?;
            if global.json { pretty(&account)? } else { logs::render(&account)? }
        }
        Command::Upgrade { binary } => return upgrade(global, binary.as_deref()),
        Command::Gc { dry_run, no_trunc } => return gc(global, *dry_run, *no_trunc),
        Command::Version => return version(global),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "kuasarctl", &mut script);
            String::from_utf8(script)?
        }
        Command::Share { dir } => {
            share::write(dir)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

fn pretty(value: &Value) -> Result<String> {
    Ok(format!("{}\n", serde_json::to_string_pretty(value)?))
}

fn load(global: &Global) -> Result<Config> {
    Config::load(&global.config, &global.state()?).map_err(|faults| anyhow!("the configuration has faults:\n{faults}"))
}

/// Where the programs are that were installed together with this one.
fn own_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot tell where this program is; say --programs")?;
    Ok(program.parent().map_or_else(|| program.clone(), Path::to_owned))
}

/// One thread is plenty.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?.block_on(work)
}

/// Asks the daemon one thing.
fn ask(global: &Global, request: impl AsyncFnOnce(&mut Daemon) -> Result<Value>) -> Result<Value> {
    block_on(async {
        let mut daemon = Daemon::connect(&global.socket()?).await?;
        request(&mut daemon).await
    })
}

/// Runs other programs, as the daemon does.
fn reaper() -> Result<Reaper> {
    Reaper::install().map_err(|error| anyhow!("{}", error.report()))
}

fn check(global: &Global) -> Result<ExitCode> {
    let socket = global.socket()?;
    let findings = block_on(async {
        let daemon = admin::settings(&socket).await;
        // The file of the daemon that runs, whichever that is.
        let file = daemon.settings().map_or(global.config.as_path(), |settings| settings.config.as_path());
        let config = Config::load(file, &global.state()?);
        Ok(check::all(&Host::this(), &reaper()?, &config, file, &socket, &daemon).await)
    })?;
    if global.json {
        print(&pretty(&serde_json::to_value(&findings)?)?)?;
    } else {
        let mut rows = Vec::new();
        for finding in &findings {
            rows.push(vec![finding.status.as_str().to_owned(), finding.subject.clone(), finding.detail.clone()]);
            if let Some(remedy) = &finding.remedy {
                rows.push(vec![String::new(), String::new(), format!("→ {remedy}")]);
            }
        }
        print(&table::render(&["STATUS", "WHAT", "FOUND"], &rows))?;
    }
    let blocking: Vec<_> = findings.iter().filter(|finding| finding.blocks()).map(|finding| finding.subject.as_str()).collect();
    if blocking.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("kuasarctl: no pod can run here for want of: {}", blocking.join(", "));
    Ok(ExitCode::FAILURE)
}

fn console(global: &Global, namespace: &str, id: &str, follow: bool) -> Result<ExitCode> {
    block_on(async {
        let mut said = Daemon::connect(&global.socket()?).await?.console(namespace, id, follow).await?;
        while let Some(piece) = said.message().await.map_err(admin::refused)? {
            print(&piece.text)?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn gc(global: &Global, dry_run: bool, full_ids: bool) -> Result<ExitCode> {
    let answer = block_on(async { Daemon::connect_for_gc(&global.socket()?).await?.gc(dry_run).await })?;
    let report = gc::Report::parse(&answer)?;
    let problems = report.problems();
    print(&if global.json { pretty(&answer)? } else { report.render(full_ids) })?;
    for problem in &problems {
        eprintln!("kuasarctl: {problem}");
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn containerd_config(global: &Global, version: Option<Version>, programs: &Path, pause_image: Option<&str>) -> Result<String> {
    let config = load(global)?;
    let host = Host::this().with_containerd_at(&config.containerd.address);
    let version = match version {
        Some(version) => version,
        None => {
            let found = block_on(async { Ok(containerd::find(&host, &reaper()?).await) })?;
            let found = found.map_err(|problem| {
                anyhow!(
                    "{problem}; install containerd, name it with {}, or say --containerd-version",
                    containerd::PROGRAM_VARIABLE
                )
            })?;
            found.version
        }
    };
    let target = Target {
        version,
        socket: &global.socket()?,
        programs,
        pause_image,
        restrict_oom_score: !containerd::may_lower_oom_score(&host),
        driver: driver::detect(&host, &containerd::Setup::read(&host)),
    };
    drop_in::write(&config, &target).map_err(|problem| anyhow!(problem))
}

fn upgrade(global: &Global, binary: Option<&Path>) -> Result<ExitCode> {
    let binary = binary.map(absolute).transpose().context("cannot tell where the program is")?;
    let since = Instant::now();
    let (before, after) = block_on(admin::upgrade(&global.socket()?, binary.as_deref()))?;
    let took = since.elapsed();
    let error = after["upgrade"]["error"].as_str();
    if global.json {
        let took = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        print(&pretty(&json!({ "before": before, "after": after, "error": error, "milliseconds": took }))?)?;
    }
    let named = |daemon: &Value| format!("{} (process {})", text(&daemon["version"]), text(&daemon["pid"]));
    if let Some(error) = error {
        return Err(anyhow!("{error}").context(format!("the upgrade failed; kuasard {} serves", named(&after))));
    }
    if !global.json {
        let program = text(&before["binary"]);
        print(&format!("kuasard {} is now {}, {program}, after {:.2} s\n", named(&before), named(&after), took.as_secs_f32()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A JSON value as people read it.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn version(global: &Global) -> Result<ExitCode> {
    let daemon = ask(global, async |daemon| daemon.version().await);
    let mut client = json!({ "client": { "version": env!("CARGO_PKG_VERSION") } });
    let mut code = ExitCode::SUCCESS;
    match daemon {
        Ok(daemon) => client["daemon"] = daemon,
        Err(error) => {
            // The client's own version is worth having all the same.
            eprintln!("kuasarctl: {error:#}");
            code = ExitCode::FAILURE;
        }
    }
    if global.json {
        print(&pretty(&client)?)?;
        return Ok(code);
    }
    let mut rows = vec![vec!["kuasarctl".to_owned(), env!("CARGO_PKG_VERSION").to_owned()]];
    if let Some(daemon) = client.get("daemon") {
        let processes = match &daemon["keeper_pid"] {
            Value::Null => format!("process {}", text(&daemon["pid"])),
            keeper => format!("keeper {}, worker {}", text(keeper), text(&daemon["pid"])),
        };
        rows.push(vec!["kuasard".to_owned(), format!("{} ({processes})", text(&daemon["version"]))]);
        for (name, sandboxer) in daemon["sandboxers"].as_object().into_iter().flatten() {
            let version = match &sandboxer["unavailable"] {
                Value::Null => text(&sandboxer["technique"]),
                why => format!("unavailable: {}", text(why)),
            };
            rows.push(vec![format!("  {name}"), version]);
        }
    }
    print(&table::render(&["COMPONENT", "VERSION"], &rows))?;
    Ok(code)
}
