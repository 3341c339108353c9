//! Kubernetes: what a pod can ask for through its API, and what restarts below it leave of its pods, for each runtime handler.
//!
//! ```text
//!   main ── suite ──┬─ a cluster    one for all handlers; a case removes what it has made
//!                   └─ table        case by case, handler by handler
//! ```
//!
//! The measure is the handler `runc`, containerd's own shim, in the same cluster: what it passes must pass. What it fails is the machine's
//! fault or the test's; what another handler fails then counts as skipped.
//!
//! `KUASAR_E2E_HANDLERS` chooses the handlers (`runc`, `kuasar-runc`, `kuasar-crun`, `kuasar-qemu`), `KUASAR_KUBERNETES_OUT` is the
//! directory that the table is written to, `KUASAR_KUBERNETES_LONG=1` asks for the long forms; the arguments are libtest's.
#![allow(clippy::unwrap_used)] // it is all test code, though not in test functions

mod commands;
mod disturbances;
mod lifecycle;
mod pod;
mod resources;
mod scale;
mod suite;
mod table;
mod volumes;
mod workloads;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cases = [
        workloads::cases(),
        lifecycle::cases(),
        commands::cases(),
        volumes::cases(),
        pod::cases(),
        resources::cases(),
        // These want the cluster for themselves.
        scale::cases(),
        disturbances::cases(),
    ];
    suite::run(cases.into_iter().flatten().collect())
}
