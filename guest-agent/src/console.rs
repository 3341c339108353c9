//! What the agent says, on the machine's console: the host keeps it in a file, and shows its end when a machine fails.

use std::{fmt, panic};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::{format::Writer, time::FormatTime};

use crate::machine;

/// How much is said unless the kernel's command line asks for something else.
const LEVEL: LevelFilter = LevelFilter::INFO;

/// As the kernel's own lines have it.
struct Uptime;

impl FormatTime for Uptime {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let us = machine::uptime_us();
        write!(writer, "[{:5}.{:06}]", us / 1_000_000, us % 1_000_000)
    }
}

/// Starts to log on standard error; `level` is a word of tracing's, as `debug`.
pub fn log(level: Option<&str>) {
    let asked = level.map(str::parse::<LevelFilter>);
    let logger = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_target(false)
        .with_timer(Uptime)
        .with_writer(std::io::stderr)
        .with_max_level(asked.as_ref().and_then(|asked| asked.as_ref().ok().copied()).unwrap_or(LEVEL))
        .finish();
    if tracing::subscriber::set_global_default(logger).is_err() {
        eprintln!("kuasar-guest-agent: somebody else logs already");
    }
    if let Some(Err(error)) = asked {
        tracing::warn!(%error, "the level of the log cannot be understood; trace, debug, info, warn, error and off are known");
    }
}

/// Has a panic end the machine: half an agent is worse than none, and the host notices the end at once.
pub fn end_machine_on_panic() {
    panic::set_hook(Box::new(|panic| {
        eprintln!("kuasar-guest-agent: {panic}");
        machine::power_off();
    }));
}

/// Switches the machine off.
pub fn end_machine() {
    machine::power_off();
}
