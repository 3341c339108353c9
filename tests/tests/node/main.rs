//! In a node of its own kernel: what needs systemd, cgroup v2 and AppArmor, with containerd and kuasard as services.
//!
//! ```text
//!   main ── suite ── one node, booted for the first case ──┬─ vm         the node itself: commands, files, reboot
//!                                                          ├─ services   units, the drop-in, kuasarctl check
//!                                                          ├─ pods       slices, limits, user namespaces, AppArmor
//!                                                          ├─ cgroups    what cgroup v2 has beyond that: pressure, OOM groups, sizes
//!                                                          ├─ restarts   the daemon's, under containers that print numbers
//!                                                          ├─ packages   upgrade, failures, removal, purge, an installation by hand
//!                                                          ├─ critest    its specs of AppArmor
//!                                                          └─ machines   a pod with KVM, in the virtual machine that the node is
//! ```
//!
//! Cases run one after the other; after each its pods are removed, and nothing that carries their ids may be left in the node.
//!
//! `SUITE` is Debian's (trixie or bookworm), `KUASAR_NODE_PACKAGES` what `scripts/deb-versions.sh` has made; `make node-test` sets both.
//! With `NODE_PART=fast` only those cases run that `make test` has time for.
//! `KUASAR_E2E_TIMES=1` shows how long each case took. The arguments are libtest's.
#![allow(clippy::unwrap_used)] // it is all test code, though not in test functions

mod cgroups;
mod critest;
mod machines;
mod packages;
mod pods;
mod restarts;
mod running;
mod services;
mod suite;
mod vm;

use std::process::ExitCode;

fn main() -> ExitCode {
    // What reboots the node comes last.
    let cases = [
        services::cases(),
        pods::cases(),
        cgroups::cases(),
        restarts::cases(),
        packages::cases(),
        critest::cases(),
        machines::cases(),
        vm::cases(),
    ];
    suite::run(cases.into_iter().flatten().collect())
}
