//! For unit tests.

use std::{sync::OnceLock, thread};

use kuasar_sandboxers::reaper::Reaper;
use tokio::runtime::Runtime;

/// The reaper of all tests of this process: two would take each other's children. It runs on a thread of its own, since each test's runtime
/// ends with it.
pub(crate) fn reaper() -> Reaper {
    static REAPER: OnceLock<(Reaper, Runtime)> = OnceLock::new();
    let install = || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let reaper = runtime.block_on(async { Reaper::install().unwrap() });
        (reaper, runtime)
    };
    // A test's own thread must not wait for another runtime.
    REAPER.get_or_init(|| thread::spawn(install).join().unwrap()).0.clone()
}
