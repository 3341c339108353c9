//! The daemon: puts configuration, backends and faces together, and runs until it is told to stop.
//!
//! The main thread runs the faces (translation only); two more run the operations of sandboxes. What may block has threads of its
//! own that end when idle.

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    fs::File,
    io::{self, IsTerminal, Read, Seek, Write},
    os::fd::{AsFd, OwnedFd},
    panic,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Parser;
use kuasar_sandboxers::{
    event::EventSink, format, limits, offload, reaper::Reaper, registry::Registry, stdio::StreamHub, store::Store,
};
use kuasar_shim::{
    admin::Configured,
    arguments::Args,
    backends,
    config::{Config, LogLevel},
    keeper::{
        CONFIG, is_stored, keep,
        wire::Message,
        worker::{self, Inheritance, Keeper, Parked},
    },
    server::{LOCK, Parts, Served, StateDir, serve},
    sys,
    upgrade::Upgrades,
};
use nix::sys::stat::{Mode, umask};
use rustix::fs::{MemfdFlags, memfd_create};
use tokio::{
    runtime::{Builder, Runtime},
    signal::unix::{SignalKind, signal},
    sync::mpsc::{self, unbounded_channel},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{Level, error, info, warn};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// How long operations may take to finish after SIGTERM, below systemd's default of 90 s before it kills.
const GRACE: Duration = Duration::from_secs(30);

/// How long the keeper may take to take what a worker leaves to the next.
const FLUSH: Duration = Duration::from_secs(2);

/// How often the keeper is told that the worker works. It takes silence of three times that for a worker that hangs.
const ALIVE: Duration = Duration::from_secs(20);

/// How often to look for sandboxes that containerd has forgotten; one is removed at the second look.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Threads for what blocks: saving state, mounting, cgroups. Requests beyond wait.
const BLOCKING_THREADS: usize = 16;

/// How long such a thread stays when it has nothing to do. A busy moment must not cost memory for long.
const BLOCKING_IDLE: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    if let Some(ended) = offload::serve() {
        return ended;
    }
    let args = Args::parse();
    // Modes are those that are asked for, whoever started this.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let ended = match worker::is_worker() {
        false => keep().context("the keeper cannot go on"),
        true => {
            sys::tune_allocator();
            run(&args)
        }
    };
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("kuasard: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode> {
    limits::raise_open_files().context("cannot raise the limit of open files")?;
    let inherited = worker::inherit().context("cannot take over from the keeper")?;
    let keeper = inherited.keeper.clone();
    let served = work(args, inherited);
    if let Err(error) = &served {
        // Of interest to an upgrade. The keeper may be why this worker fails.
        let _ = keeper.failed(&format!("{error:#}"));
    }
    keeper.flush(FLUSH);
    served
}

fn work(args: &Args, mut inherited: Inheritance) -> Result<ExitCode> {
    let state = std::path::absolute(&args.state).with_context(|| format!("cannot use --state {}", args.state.display()))?;
    let (config, fresh) = configuration(args, &state, &mut inherited)?;
    log_to_stderr(config.log.level);
    let lock = inherited.parked.remove(LOCK).and_then(|mut parked| parked.pop());
    let state = StateDir::claim_with(&state, lock).map_err(report)?;
    format::admit(state.path()).map_err(report)?;
    std::fs::create_dir_all(&args.root).with_context(|| format!("cannot create {}", args.root.display()))?;

    let workers = Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("kuasard-work")
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(BLOCKING_IDLE)
        .enable_all()
        .build()
        .context("cannot start the worker threads")?;
    let faces = Builder::new_current_thread().enable_all().build().context("cannot start the main loop")?;
    let keeper = inherited.keeper.clone();
    let file = std::path::absolute(config_file(args)).context("cannot tell where the configuration is")?;
    let configured = Configured { file, text: config.to_toml() };
    let served = faces.block_on(daemon(config, configured, fresh, &state, &workers, inherited));
    if matches!(served, Ok(Served::Left)) {
        keeper.flush(FLUSH);
        // Nothing is closed, removed or given back: it is the next worker's now.
        std::process::exit(0);
    }
    // Containers run on; what has not finished by now has been reported.
    workers.shutdown_background();
    served.map(|_| ExitCode::SUCCESS)
}

/// What this daemon was told when it started; what is written by now, if it starts, or with the worker of an upgrade. A crash is not to
/// bring changes that nobody has asked for yet.
///
/// The text is what the next worker is to be told, where that is new.
fn configuration(args: &Args, state: &Path, inherited: &mut Inheritance) -> Result<(Config, Option<String>)> {
    let kept = inherited.parked.remove(CONFIG).and_then(|mut parked| parked.pop()).filter(|_| !inherited.upgrade);
    if let Some(kept) = kept {
        return Ok((kept_configuration(kept).context("cannot read the configuration that the keeper has")?, None));
    }
    let config = Config::load(&config_file(args), state)?;
    let text = config.to_toml();
    Ok((config, Some(text)))
}

fn config_file(args: &Args) -> PathBuf {
    args.config.clone().unwrap_or_else(Config::default_path)
}

fn kept_configuration(kept: OwnedFd) -> Result<Config> {
    let mut file = File::from(kept);
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(Config::parse(Path::new("kept configuration"), &text)?)
}

fn keep_configuration(keeper: &Keeper, text: &str) -> io::Result<()> {
    let mut file = File::from(memfd_create(CONFIG, MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    keeper.park(CONFIG, &[file.as_fd()])
}

async fn daemon(
    config: Config,
    configured: Configured,
    fresh: Option<String>,
    state: &StateDir,
    workers: &Runtime,
    mut inherited: Inheritance,
) -> Result<Served> {
    let fds = inherited.fd_store();
    let Inheritance { keeper, mut parked, exits, upgraded, upgrade, cut, .. } = inherited;
    let upgrades = Upgrades::new(keeper.clone(), upgraded);
    let stop = CancellationToken::new();
    let (order, orders) = mpsc::channel(1);
    // What a supervisor has stored is for the daemon that it starts next, so it is left as for another worker.
    stop_when_told(orders, if is_stored() { upgrades.leave() } else { stop.clone() }, upgrades.leave())?;
    let hub = StreamHub::default();
    let (sink, events) = EventSink::channel();
    // Among the workers, because owner tasks live where they are made.
    let (registry, reaper) = {
        let (dir, hub, sandboxers) = (state.path().to_owned(), hub.clone(), config.sandboxers);
        let empty = Store::at(&dir).entries().is_ok_and(|entries| entries.is_empty());
        let need = match (upgrade, empty) {
            (true, _) => backends::Need::All,
            (false, true) => backends::Need::Any,
            (false, false) => backends::Need::None,
        };
        let build = async move {
            let reaper = Reaper::install_under(Keeper::pid()).map_err(report)?;
            // Before any process is looked for, or what ends in between would not be seen.
            reaper.orphans().begin(&fds);
            exits.into_iter().for_each(|ended| reaper.hear(ended));
            let sandboxers = backends::build(sandboxers, need, &reaper).await.map_err(report)?;
            let registry = Registry::new(&dir, sandboxers, sink, hub, reaper.clone(), fds).map_err(report)?;
            anyhow::Ok((registry, reaper))
        };
        workers.spawn(build).await.context("the start broke off")??
    };
    let (tell, connections) = unbounded_channel();
    // A socket that accepts means that there will be answers: nothing of the configuration is in doubt any more. Calls wait in
    // the socket while what ran before is found again, which is sooner than containerd would dial again.
    let sockets = state.bind_kept(&keeper, &mut parked, connections).map_err(report)?;
    for (name, descriptors) in parked {
        // What is not a connection was somebody else's, who has taken it.
        tell.send(Parked { name, descriptors }).context("nobody takes connections")?;
    }
    let orphans = reaper.orphans().clone();
    tokio::spawn({
        let (keeper, stop, upgrades) = (keeper.clone(), stop.clone(), upgrades.clone());
        async move {
            let other = |message| match message {
                Message::Upgraded(outcome) => upgrades.note(outcome),
                // One that is not taken yet is enough.
                Message::Stop => drop(order.try_send(())),
                _ => {}
            };
            let error = keeper.listen(&reaper, &tell, cut, other).await;
            if !stop.is_cancelled() {
                error!(%error, "cannot go on without the keeper: stopping");
                stop.cancel();
            }
        }
    });
    workers.spawn(Keeper::keep_going());
    tokio::spawn({
        let (keeper, workers) = (keeper.clone(), workers.handle().clone());
        async move {
            // By way of both kinds of threads: when one of them hangs, nothing is said.
            while workers.spawn(sleep(ALIVE)).await.is_ok() && keeper.alive().is_ok() {}
        }
    });
    let recovered = {
        let registry = registry.clone();
        workers.spawn(async move { registry.recover().await })
    };
    // It goes on while calls are served.
    recovered.await.context("the recovery broke off")?.map_err(report)?;
    let parts = Parts {
        registry,
        hub,
        events,
        workers: workers.handle().clone(),
        containerd: config.containerd.address,
        configured,
        upgrades: Some(upgrades),
        grace: GRACE,
        look_interval: LOOK_INTERVAL,
    };
    info!(state = %state.path().display(), version = env!("CARGO_PKG_VERSION"), "serving");
    keeper.ready().context("cannot tell the keeper")?;
    // Not before it is known to work.
    if let Some(text) = fresh {
        keep_configuration(&keeper, &text).context("cannot leave the configuration with the keeper")?;
    }
    // There is no way back to a program that could not read what this one writes.
    if let Err(error) = format::note(state.path()) {
        warn!(error = error.report(), "cannot say in which format the state directory is");
    }
    let served = serve(state, sockets, parts, stop).await.map_err(report)?;
    if matches!(served, Served::Left) && is_stored() {
        // The keeper may be about to end, and what ends after it is not seen otherwise until the next daemon runs.
        let _entered = workers.enter();
        orphans.hand_off();
    }
    Ok(served)
}

/// Cancels `stop` by the keeper's order, and `leave` by SIGTERM or SIGINT, which anybody may send to this process alone: another takes its
/// place. One of these after anything ends the process at once.
fn stop_when_told(mut orders: mpsc::Receiver<()>, stop: CancellationToken, leave: CancellationToken) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    tokio::spawn(async move {
        let mut told = false;
        loop {
            let is_order = tokio::select! {
                _ = terminate.recv() => false,
                _ = interrupt.recv() => false,
                Some(()) = orders.recv() => true,
            };
            match (is_order, std::mem::replace(&mut told, true)) {
                (true, _) => stop.cancel(),
                (false, false) => leave.cancel(),
                (false, true) => {
                    warn!("told to stop again: not waiting for calls");
                    std::process::exit(0);
                }
            }
        }
    });
    Ok(())
}

/// An error of the contract, with all its causes in one line.
fn report(error: kuasar_sandboxers::Error) -> anyhow::Error {
    anyhow::Error::msg(error.report())
}

/// Our own messages from `level` on; of libraries only what is wrong. ttrpc calls it an error when a client goes away, which
/// every stream's does, so it is heard only by who looks for something.
fn log_to_stderr(level: LogLevel) {
    let (level, ttrpc) = match level {
        LogLevel::Error => (Level::ERROR, LevelFilter::OFF),
        LogLevel::Warn => (Level::WARN, LevelFilter::OFF),
        LogLevel::Info => (Level::INFO, LevelFilter::OFF),
        LogLevel::Debug => (Level::DEBUG, LevelFilter::ERROR),
        LogLevel::Trace => (Level::TRACE, LevelFilter::DEBUG),
    };
    let targets = Targets::new().with_default(Level::WARN).with_target("kuasar", level).with_target("ttrpc", ttrpc);
    let lines = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    tracing_subscriber::registry().with(lines).with(targets).init();
    // A panic ends the call or job it happened in; whoever waits for that gets an error, and the log says where.
    panic::set_hook(Box::new(|broken| {
        let place = broken.location().map(ToString::to_string).unwrap_or_default();
        let payload = broken.payload();
        let text = payload.downcast_ref::<&str>().copied().or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let why = text.unwrap_or("(no text)");
        error!(place, why, "panic: a defect in kuasard");
        let trace = Backtrace::capture();
        if trace.status() == BacktraceStatus::Captured {
            error!("{trace}");
        }
    }));
}
