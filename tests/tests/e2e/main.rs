//! End to end: what a pod can ask for, over CRI, on a real containerd, for each runtime handler.
//!
//! ```text
//!   main ── suite ──┬─ a shared node    most cases, many at a time; a case removes what it has made and is then looked over
//!                   └─ nodes of a case's own    what restarts a daemon or measures it
//! ```
//!
//! A case is written once and run for every handler of its scope: `kuasar-runc/pod::lifecycle`. With the handler `runc` (the
//! runc-v2 shim) the suite checks itself: what fails there is no fault of ours.
//!
//! Invariants: a case finds out by asking, never by sleeping; after each case nothing that carries the id of one of its pods or
//! containers is left on the machine; after the last one the shared node has what it had before the first.
//!
//! `KUASAR_E2E_HANDLERS` chooses the handlers (`runc`, `kuasar-runc`, `kuasar-crun`, separated by commas), `KUASAR_E2E_TIMES=1`
//! shows how long each case took, `KUASAR_E2E_MACHINES` says how many virtual machines there are at once; the arguments are libtest's.
#![allow(clippy::unwrap_used)] // it is all test code, though not in test functions

mod bad;
mod daemon;
mod devices;
mod direct;
mod gc;
mod inherited;
mod inside;
mod kuasarctl;
mod logs;
mod machines;
mod namespaces;
mod network;
mod pod;
mod podfiles;
mod process;
mod resources;
mod runtimes;
mod security;
mod signals;
mod soak;
mod streams;
mod suite;
mod upgrade;
mod users;
mod volumes;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cases = [
        // The longest first: the rest fills the gaps.
        soak::cases(),
        daemon::cases(),
        bad::cases(),
        machines::cases(),
        gc::cases(),
        inside::cases(),
        direct::cases(),
        kuasarctl::cases(),
        logs::cases(),
        streams::cases(),
        upgrade::cases(),
        signals::cases(),
        runtimes::cases(),
        process::cases(),
        pod::cases(),
        namespaces::cases(),
        podfiles::cases(),
        network::cases(),
        volumes::cases(),
        security::cases(),
        inherited::cases(),
        devices::cases(),
        users::cases(),
        resources::cases(),
    ];
    suite::run(cases.into_iter().flatten().collect())
}
