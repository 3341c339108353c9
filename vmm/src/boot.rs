//! How long a guest may take to boot, and what is said when it does not.

use std::time::Duration;

use kuasar_sandboxers::{Code, Error, types::PodResources};

/// CPU shares, of 1024 for a processor, with which a machine hardly gets a busy node's processors: what Kubernetes gives to pods without a CPU
/// request (2), or with one of a few thousandths.
const FEW_SHARES: i64 = 10;

/// How many times as long a machine with so few may take. kubelet waits four minutes, and would begin again and again with one that starves.
const PATIENCE: u32 = 3;

/// How the kernel panics when its memory does not suffice to boot.
const NO_MEMORY: [&str; 2] = ["System is deadlocked on memory", "Out of memory"];

/// The pod's CPU shares, where they are few.
fn few_shares(resources: &PodResources) -> Option<i64> {
    let shares = resources.containers.as_ref()?.cpu_shares;
    (1..=FEW_SHARES).contains(&shares).then_some(shares)
}

/// How long the guest of a pod may take.
pub(crate) fn limit(configured: Duration, resources: &PodResources) -> Duration {
    if few_shares(resources).is_some() { configured * PATIENCE } else { configured }
}

/// A boot that came to nothing; `program` is the hypervisor, `said` the last lines on the console.
pub(crate) fn failure(program: String, error: &Error, said: &str, memory_mib: u64, resources: &PodResources) -> Error {
    let why = error.report();
    let mut message = match said {
        "" => format!("{why}; nothing is on its console"),
        // The reason of its end.
        said if why.contains(said) => why,
        said => format!("{why}; last on its console: {said}"),
    };
    if NO_MEMORY.iter().any(|words| message.contains(words)) {
        message = format!(
            "memory limit too small: the VM has {memory_mib} MiB, and its kernel needs more; raise the pod's memory limit or \
             io.kuasar.vm.memory_mib: {message}"
        );
    }
    let (by, operation, code) = (program, "bring the guest up".to_owned(), error.code());
    if code != Code::DeadlineExceeded {
        return Error::Backend { program: by, operation, message };
    }
    if let Some(shares) = few_shares(resources) {
        message = format!(
            "the pod has {shares} CPU shares of 1024 for a processor; give it a CPU request, or raise boot_limit_secs: {message}"
        );
    }
    Error::Refused { by, operation, code, message }
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::types::Resources;

    use super::*;

    fn pod(cpu_shares: i64) -> PodResources {
        PodResources { overhead: None, containers: Some(Resources { cpu_shares, ..Resources::default() }) }
    }

    #[test]
    fn pods_that_starve_have_time_and_are_told_why() {
        let minute = Duration::from_secs(60);
        for (resources, limit) in
            [(PodResources::default(), minute), (pod(0), minute), (pod(1024), minute), (pod(2), 3 * minute)]
        {
            assert_eq!(super::limit(minute, &resources), limit, "{resources:?}");
        }
        let late = Error::TimedOut { operation: "the boot".into(), seconds: 60 };
        let error = failure("QEMU".into(), &late, "", 256, &pod(2));
        assert_eq!(error.code(), Code::DeadlineExceeded);
        let start =
            "QEMU failed to bring the guest up: the pod has 2 CPU shares of 1024 for a processor; give it a CPU request";
        assert!(error.report().starts_with(start), "{}", error.report());
        let error = failure("QEMU".into(), &late, "", 256, &pod(1024)).report();
        assert_eq!(error, "QEMU failed to bring the guest up: the boot did not finish within 60 s; nothing is on its console");
    }

    #[test]
    fn too_little_memory_is_said_first() {
        let panic = Error::Unavailable { what: "the VM".into(), why: "panicked: System is deadlocked on memory".into() };
        let error = failure("QEMU".into(), &panic, "panicked: System is deadlocked on memory", 80, &pod(0));
        assert_eq!(error.code(), Code::Internal);
        let report = error.report();
        assert!(report.contains("bring the guest up: memory limit too small: the VM has 80 MiB"), "{report}");
        assert!(report.matches("deadlocked").count() == 1, "{report}");
    }
}
