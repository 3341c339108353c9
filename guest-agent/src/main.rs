//! PID 1 of a microVM: the only program in it besides the OCI runtime and what containers bring along.

use std::{env, fs, path::Path, process::ExitCode};

use kuasar_guest_agent::{Guest, Place, boot, console, serve};
use kuasar_runc::Runtime;
use kuasar_sandboxers::{
    Error, Result, limits,
    mount::{self, Binding},
    reaper::Reaper,
};
use tokio::runtime::Builder;
use tracing::{error, info};

/// The OCI runtime.
const RUNTIME: &str = "/bin/crun";

/// What it says to `--version` and `features`, if the image's maker has asked it: to ask takes tens of milliseconds.
const RUNTIME_VERSION: &str = "/etc/kuasar/runtime-version";
const RUNTIME_FEATURES: &str = "/etc/kuasar/runtime-features";

/// Threads that answer and move bytes: one more than the processors of most guests, so that one that waits for a disk stops nobody.
const THREADS: usize = 2;

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    match &words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [kuasar_guest_agent::WAIT] => loop {
            nix::unistd::pause();
        },
        // As the kernel starts its modprobe.
        ["-q", "--", alias] => return modprobe(alias),
        _ => {}
    }
    if std::process::id() != 1 {
        eprintln!("kuasar-guest-agent is process 1 of a microVM; it does nothing anywhere else");
        return ExitCode::FAILURE;
    }
    console::end_machine_on_panic();
    match run() {
        Ok(()) => {}
        Err(error) => error!(error = error.report(), "the agent cannot go on"),
    }
    // The machine is of no use without it, and the kernel panics when its process 1 ends.
    console::end_machine();
    ExitCode::FAILURE
}

fn modprobe(alias: &str) -> ExitCode {
    match boot::load_for(alias) {
        Ok(()) => ExitCode::SUCCESS,
        // The kernel has taken its output away; a status is all that it asks for.
        Err(_) => ExitCode::FAILURE,
    }
}

fn run() -> Result<()> {
    let words = boot::mount_all().inspect_err(|error| eprintln!("kuasar-guest-agent: {}", error.report()))?;
    console::log(words.log.as_deref());
    // Containers that ask for no limit get this one, as under containerd's own unit.
    limits::begin_with(1024, 524_288).and_then(|()| limits::raise_open_files()).map_err(Error::failed("limit open files"))?;
    info!("mounted");
    let threads = Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    threads.map_err(Error::failed("start threads"))?.block_on(async {
        let (ports, booted) = boot::open_ports(&words).await?;
        let ready_us = boot::uptime_us();
        info!("listening");
        let reaper = Reaper::install()?;
        let runtime = find_runtime(&reaper).await?;
        let place = Place { root: "/run/kuasar".into(), cgroup: "/pod".into(), machine: true, debug: words.debug };
        let guest = Guest::new(place, runtime, reaper, booted, ready_us);
        serve(guest, ports).await
    })
}

async fn find_runtime(reaper: &Reaper) -> Result<Runtime> {
    let program = Path::new(RUNTIME);
    // Else it makes a copy of itself at each start, that no container can write into the original: 30 ms where processors are translated.
    mount::bind(program, program, Binding { readonly: true, ..Binding::default() }).await?;
    match (fs::read_to_string(RUNTIME_VERSION), fs::read_to_string(RUNTIME_FEATURES)) {
        (Ok(version), Ok(features)) => Runtime::told(program, &version, &features),
        _ => Runtime::probe(program, reaper).await,
    }
}
