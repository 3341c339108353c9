//! System calls that are newer than a container's seccomp profile, with crun.
//!
//! Programs try a new system call and fall back to an older one when it is answered with ENOSYS. runc answers so to all calls with
//! numbers above those that a profile names, whatever the profile's default; crun gives the default, which is EPERM, to every one,
//! and programs fail. So the profile that crun gets names them with ENOSYS. What crun's libseccomp does not know by name stays EPERM.

use serde_json::{Value, json};

/// Those with the same number on all architectures, from 424 on and without a gap (`scripts/syscall.tbl` of Linux).
const CALLS: [&str; 47] = [
    "pidfd_send_signal",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "open_tree",
    "move_mount",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "pidfd_open",
    "clone3",
    "close_range",
    "openat2",
    "pidfd_getfd",
    "faccessat2",
    "process_madvise",
    "epoll_pwait2",
    "mount_setattr",
    "quotactl_fd",
    "landlock_create_ruleset",
    "landlock_add_rule",
    "landlock_restrict_self",
    "memfd_secret",
    "process_mrelease",
    "futex_waitv",
    "set_mempolicy_home_node",
    "cachestat",
    "fchmodat2",
    "map_shadow_stack",
    "futex_wake",
    "futex_wait",
    "futex_requeue",
    "statmount",
    "listmount",
    "lsm_get_self_attr",
    "lsm_set_self_attr",
    "lsm_list_modules",
    "mseal",
    "setxattrat",
    "getxattrat",
    "listxattrat",
    "removexattrat",
    "open_tree_attr",
    "file_getattr",
    "file_setattr",
    "listns",
];

/// Adds to `linux.seccomp` a rule for the calls that are newer than all that it names. Once more adds nothing.
pub(crate) fn answer_newer_calls(seccomp: &mut Value) {
    // A profile that says itself what calls are answered with is left alone.
    if seccomp["defaultAction"] != "SCMP_ACT_ERRNO" || seccomp["defaultErrnoRet"].as_u64().is_some_and(|errno| errno != EPERM) {
        return;
    }
    let Some(rules) = seccomp.get_mut("syscalls").and_then(Value::as_array_mut) else { return };
    let named = |call: &str| {
        rules.iter().any(|rule| rule["names"].as_array().is_some_and(|names| names.iter().any(|name| name == call)))
    };
    let newer = CALLS.iter().rposition(|call| named(call)).map_or(0, |newest| newest + 1);
    if newer < CALLS.len() {
        rules.push(json!({ "names": CALLS[newer..], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }));
    }
}

const EPERM: u64 = 1;
const ENOSYS: u64 = 38;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_no_gap() {
        // Those of Linux's headers here, as far as they go.
        let numbers =
            [(libc::SYS_pidfd_send_signal, 0), (libc::SYS_clone3, 11), (libc::SYS_fchmodat2, 28), (libc::SYS_mseal, 38)];
        for (number, at) in numbers {
            assert_eq!(number, 424 + i64::try_from(at).unwrap(), "{}", CALLS[at]);
        }
        assert_eq!((CALLS[0], CALLS[11], CALLS[28], CALLS[38]), ("pidfd_send_signal", "clone3", "fchmodat2", "mseal"));
    }

    #[test]
    fn what_is_newer_is_not_there() {
        let mut profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{ "names": ["read", "cachestat"], "action": "SCMP_ACT_ALLOW" }, { "names": ["listmount", "clone3"], "action": "SCMP_ACT_ERRNO" }],
        });
        answer_newer_calls(&mut profile);
        let added = &profile["syscalls"][2];
        assert_eq!((&added["action"], &added["errnoRet"]), (&json!("SCMP_ACT_ERRNO"), &json!(38)));
        assert_eq!((added["names"][0].as_str(), added["names"][3].as_str()), (Some("lsm_get_self_attr"), Some("mseal")));
        // What is older and not named was left out on purpose: it stays refused.
        assert!(!added["names"].as_array().unwrap().contains(&json!("statmount")));
        let once = profile.clone();
        answer_newer_calls(&mut profile);
        assert_eq!(profile, once);
    }

    #[test]
    fn other_profiles_are_left_alone() {
        for profile in [
            json!(null),
            json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [] }),
            json!({ "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": [] }),
            json!({ "defaultAction": "SCMP_ACT_KILL", "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW" }] }),
            json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": "?" }),
        ] {
            let mut left = profile.clone();
            answer_newer_calls(&mut left);
            assert_eq!(left, profile);
        }
    }
}
