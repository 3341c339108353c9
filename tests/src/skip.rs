//! Skipping, loudly.
//!
//! libtest cannot mark a test as skipped once it runs, and captures what a passing test prints. So a skip is a line
//! `SKIP <test>: <what was missing>` that goes to the real stderr and to the file `KUASAR_SKIP_LOG`, which the summary of
//! `make test` counts and subtracts from what libtest calls passed.

use std::fs::OpenOptions;
use std::io::Write;

/// Records that `test` did not run and why. Use [`crate::skip!`] or [`crate::require!`] instead.
pub fn record(test: &str, missing: &str) {
    let line = format!("SKIP {test}: {}\n", missing.replace('\n', " "));
    // One write(2) each: tests of several processes share both.
    if let Err(error) = std::io::stderr().write_all(line.as_bytes()) {
        eprintln!("cannot write to stderr: {error}");
    }
    if let Some(path) = std::env::var_os("KUASAR_SKIP_LOG") {
        let written =
            OpenOptions::new().create(true).append(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()));
        assert!(written.is_ok(), "cannot record a skip in {}: {written:?}", path.display());
    }
}

/// The name of the running test: libtest names its threads after them.
#[must_use]
pub fn test_name() -> String {
    std::thread::current().name().unwrap_or("main").to_owned()
}

/// Records a skip with its reason (as `format!`) and returns `Ok(())` from the test.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)+) => {{
        $crate::skip::record(&$crate::skip::test_name(), &format!($($reason)+));
        return Ok(());
    }};
}

/// Unwraps what a tool look-up found, or skips the test with the look-up's own words. A `KUASAR_…` variable that names
/// something else than a program fails it: whoever set it does not want to skip.
#[macro_export]
macro_rules! require {
    ($found:expr) => {
        match $found {
            Ok(found) => found,
            Err(wrong @ $crate::tools::Missing::Variable { .. }) => return Err(wrong.into()),
            Err(missing) => $crate::skip!("{missing}"),
        }
    };
}
