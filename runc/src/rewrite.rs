//! What containerd's container specification lacks for a pod without a pause container.
//!
//! containerd writes namespaces as those of the sandbox's process, and ours has none, so they come as `/proc/0/ns/…`: always for
//! network, ipc and uts, even where the pod uses the node's; for pid unless the container has its own; and for user. Here they
//! become the pod's real ones. Nothing else is touched but what the pod provides (its files, the root filesystem's place) and what
//! one runtime does otherwise than the others. Capabilities, AppArmor and SELinux are the runtime's.

use std::path::{Path, PathBuf};

use kuasar_sandboxers::{Error, Result, podfiles::PodFiles, spec::OciSpec};
use serde_json::Value;

use crate::{
    namespaces::{Namespaces, PidNamespace as Pid},
    seccomp,
};

/// How containerd writes a namespace of a sandbox that has no process.
const PLACEHOLDER: &str = "/proc/0/ns/";

/// The `ociVersion` that a runtime which knows only 1.0 is told. Later versions only added fields, which it ignores.
const SPEC_1_0: &str = "1.0.2";

/// What a container gets from its pod.
pub(crate) struct Rewriting<'a> {
    pub(crate) namespaces: &'a Namespaces,
    pub(crate) files: &'a PodFiles,
    /// Where its root filesystem has been mounted, if it has.
    pub(crate) rootfs: Option<&'a Path>,
    /// The runtime refuses newer versions by their number.
    pub(crate) only_spec_1_0: bool,
    /// The runtime answers system calls that are newer than the seccomp profile as it does those that the profile refuses.
    pub(crate) refuses_newer_calls: bool,
    /// Whether a process is in this pod: a container may join only that pod's process ids.
    pub(crate) in_pod: &'a dyn Fn(u32) -> bool,
}

impl Rewriting<'_> {
    /// Rewrites a specification; once more changes nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a namespace that the pod does not have.
    pub(crate) fn apply(&self, spec: &mut OciSpec, bundle: &Path) -> Result<()> {
        let asked: Vec<(String, Option<String>)> =
            spec.namespaces().map(|(kind, path)| (kind.to_owned(), path.map(str::to_owned))).collect();
        for (kind, path) in asked {
            match path {
                Some(path) if path.starts_with(PLACEHOLDER) => self.resolve(spec, &kind, &path)?,
                Some(path) if kind == "pid" => self.check_target(&path)?,
                _ => {}
            }
        }
        // In the namespace that the runtime is in they would be everyone's, and stay.
        if spec.namespace("mount").is_some() {
            self.files.apply(spec)?;
        }
        if let Some(rootfs) = self.rootfs
            && spec.root_path().is_none_or(|root| bundle.join(root) != rootfs)
        {
            spec.set_root_path(rootfs);
        }
        if self.only_spec_1_0 && spec.as_value()["ociVersion"].as_str().is_some_and(|version| !version.starts_with("1.0")) {
            spec.as_value_mut()["ociVersion"] = SPEC_1_0.into();
        }
        // No limit is what a new group has, and older cruns cannot write it on cgroup v1.
        if let Some(cpu) = spec.as_value_mut().pointer_mut("/linux/resources/cpu").and_then(Value::as_object_mut)
            && cpu.get("quota").and_then(Value::as_i64).is_some_and(|quota| quota < 0)
        {
            cpu.remove("quota");
        }
        if self.refuses_newer_calls
            && let Some(profile) = spec.as_value_mut().pointer_mut("/linux/seccomp")
        {
            seccomp::answer_newer_calls(profile);
        }
        Ok(())
    }

    fn resolve(&self, spec: &mut OciSpec, kind: &str, path: &str) -> Result<()> {
        let shared = |namespace: &Option<PathBuf>, spec: &mut OciSpec| match namespace {
            Some(path) => spec.set_namespace(kind, Some(path)),
            None => spec.drop_namespace(kind),
        };
        match kind {
            "network" => shared(&self.namespaces.network, spec),
            "ipc" => shared(&self.namespaces.ipc, spec),
            "uts" => shared(&self.namespaces.uts, spec),
            "pid" => match &self.namespaces.pid {
                Pid::Shared(path) => spec.set_namespace(kind, Some(path)),
                Pid::Node => spec.drop_namespace(kind),
                // The pod said that its containers do not share, and there is nothing to share.
                Pid::Own => spec.set_namespace(kind, None),
            },
            "user" => match &self.namespaces.user {
                Some(path) => spec.set_namespace(kind, Some(path)),
                // Dropping it would run the container as the node's root.
                None => return Err(Error::invalid("user namespace", "the container wants the pod's, but the pod has none")),
            },
            _ => {
                let why = format!("{path} stands for one of the pod, but a pod shares only network, ipc, uts, pid and user");
                return Err(Error::invalid(format!("{kind} namespace"), why));
            }
        }
        Ok(())
    }

    /// `kubectl debug --target` names another container's namespace by its pid.
    fn check_target(&self, path: &str) -> Result<()> {
        let pid = path.strip_prefix("/proc/").and_then(|rest| rest.strip_suffix("/ns/pid")).and_then(|pid| pid.parse().ok());
        let known = self.namespaces.pid == Pid::Shared(path.into()) || pid.is_some_and(|pid| (self.in_pod)(pid));
        if known {
            return Ok(());
        }
        Err(Error::invalid(
            "pid namespace",
            format!("{path} is not that of a container of this pod; target one that runs in it"),
        ))
    }
}

/// Whether the container has process ids of its own, so that the kernel ends all of it with its first process.
pub(crate) fn has_own_pids(spec: &OciSpec) -> bool {
    spec.namespace("pid") == Some(None)
}

/// Whether `linux.cgroupsPath` is in the form of systemd's driver.
pub(crate) fn wants_systemd(spec: &OciSpec) -> bool {
    spec.cgroups_path().is_some_and(|path| path.split(':').count() == 3 && !path.contains('/'))
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::{fake, types::SandboxSpec};
    use proptest::{collection::vec, prelude::*};
    use serde_json::json;

    use super::*;

    const BUNDLE: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/c";

    fn namespaces(node: bool, pid: Pid, user: bool) -> Namespaces {
        let path = |path: &str| (!node).then(|| path.into());
        Namespaces {
            network: path("/run/netns/cni-1"),
            ipc: path("/proc/77/ns/ipc"),
            uts: path("/proc/77/ns/uts"),
            user: user.then(|| "/proc/77/ns/user".into()),
            pid,
        }
    }

    fn spec(list: &[(&str, Option<&str>)]) -> OciSpec {
        let list: Vec<_> = list
            .iter()
            .map(|(kind, path)| match path {
                Some(path) => json!({"type": kind, "path": path}),
                None => json!({"type": kind}),
            })
            .collect();
        let document = json!({
            "ociVersion": "1.3.0", "process": {"args": ["x"]}, "root": {"path": "rootfs"}, "linux": {"namespaces": list}
        });
        document.try_into().unwrap()
    }

    /// As containerd writes it.
    fn containerds(pid: Option<&str>) -> OciSpec {
        let place = |kind| Some(kind);
        spec(&[
            ("mount", None),
            ("network", place("/proc/0/ns/net")),
            ("ipc", place("/proc/0/ns/ipc")),
            ("uts", place("/proc/0/ns/uts")),
            ("pid", pid),
        ])
    }

    fn rewrite(spec: &mut OciSpec, namespaces: &Namespaces, rootfs: Option<&Path>, old: bool) -> Result<()> {
        let pod: SandboxSpec = fake::spec("pod");
        let files = PodFiles::at(Path::new("/pod"), &pod);
        let in_pod = |pid| pid == 4711;
        let rewriting =
            Rewriting { namespaces, files: &files, rootfs, only_spec_1_0: old, refuses_newer_calls: old, in_pod: &in_pod };
        rewriting.apply(spec, Path::new(BUNDLE))
    }

    fn result(mut spec: OciSpec, namespaces: &Namespaces) -> Vec<(String, Option<String>)> {
        rewrite(&mut spec, namespaces, None, false).unwrap();
        spec.namespaces().map(|(kind, path)| (kind.to_owned(), path.map(str::to_owned))).collect()
    }

    fn pairs(list: &[(&str, Option<&str>)]) -> Vec<(String, Option<String>)> {
        list.iter().map(|(kind, path)| ((*kind).to_owned(), path.map(str::to_owned))).collect()
    }

    #[test]
    fn a_pods_own() {
        let pod = namespaces(false, Pid::Shared("/proc/77/ns/pid".into()), false);
        let expected = [
            ("mount", None),
            ("network", Some("/run/netns/cni-1")),
            ("ipc", Some("/proc/77/ns/ipc")),
            ("uts", Some("/proc/77/ns/uts")),
        ];
        let with = |pid| pairs(&[&expected[..], &[("pid", pid)]].concat());
        assert_eq!(result(containerds(Some("/proc/0/ns/pid")), &pod), with(Some("/proc/77/ns/pid")));
        assert_eq!(result(containerds(None), &pod), with(None));
        assert_eq!(result(containerds(Some("/proc/4711/ns/pid")), &pod), with(Some("/proc/4711/ns/pid")));
        // The pod does not share, the container would have liked to.
        let pod = namespaces(false, Pid::Own, false);
        assert_eq!(result(containerds(Some("/proc/0/ns/pid")), &pod), with(None));
    }

    #[test]
    fn the_nodes() {
        let pod = namespaces(true, Pid::Node, false);
        assert_eq!(result(containerds(Some("/proc/0/ns/pid")), &pod), pairs(&[("mount", None)]));
        // A container with process ids of its own in a pod that has the node's.
        assert_eq!(result(containerds(None), &pod), pairs(&[("mount", None), ("pid", None)]));
    }

    #[test]
    fn files_are_mounted_in_a_namespace_of_the_containers_own_or_not_at_all() {
        let pod = namespaces(false, Pid::Own, false);
        for (list, count) in [(&[][..], 0), (&[("mount", None)][..], 4)] {
            let mut spec = spec(list);
            rewrite(&mut spec, &pod, None, false).unwrap();
            assert_eq!(spec.mounts().len(), count, "{list:?}");
        }
    }

    #[test]
    fn user_namespaces() {
        let mapped = namespaces(false, Pid::Own, true);
        assert_eq!(result(spec(&[("user", Some("/proc/0/ns/user"))]), &mapped), pairs(&[("user", Some("/proc/77/ns/user"))]));
        let plain = namespaces(false, Pid::Own, false);
        assert!(matches!(
            rewrite(&mut spec(&[("user", Some("/proc/0/ns/user"))]), &plain, None, false),
            Err(Error::Invalid { .. })
        ));
    }

    #[test]
    fn other_pods_are_out_of_reach() {
        let pod = namespaces(false, Pid::Own, false);
        for path in ["/proc/1/ns/pid", "/proc/4712/ns/pid", "/proc/4711/ns/../../1/ns/pid", "/proc//ns/pid", "/run/pid"] {
            let error = rewrite(&mut spec(&[("pid", Some(path))]), &pod, None, false).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
        assert!(rewrite(&mut spec(&[("mount", Some("/proc/0/ns/mnt"))]), &pod, None, false).is_err());
    }

    #[test]
    fn root_and_version() {
        let pod = namespaces(false, Pid::Own, false);
        let mut oci = spec(&[]);
        rewrite(&mut oci, &pod, Some(&Path::new(BUNDLE).join("rootfs")), false).unwrap();
        assert_eq!((oci.root_path(), &oci.as_value()["ociVersion"]), (Some("rootfs"), &json!("1.3.0")));
        rewrite(&mut oci, &pod, Some(Path::new("/elsewhere")), true).unwrap();
        assert_eq!((oci.root_path(), &oci.as_value()["ociVersion"]), (Some("/elsewhere"), &json!("1.0.2")));
    }

    #[test]
    fn a_quota_that_limits_nothing() {
        for (quota, left) in [(-1, json!(null)), (50_000, json!(50_000))] {
            let mut oci = spec(&[]);
            oci.as_value_mut()["linux"]["resources"] = json!({ "cpu": { "quota": quota, "period": 100_000 } });
            rewrite(&mut oci, &namespaces(false, Pid::Own, false), None, false).unwrap();
            let cpu = &oci.as_value()["linux"]["resources"]["cpu"];
            assert_eq!((&cpu["quota"], &cpu["period"]), (&left, &json!(100_000)));
        }
    }

    #[test]
    fn newer_calls_where_the_runtime_refuses_them() {
        for (refuses, rules) in [(true, 2), (false, 1)] {
            let mut oci = spec(&[]);
            let rule = json!({ "names": ["read"], "action": "SCMP_ACT_ALLOW" });
            oci.as_value_mut()["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule] });
            rewrite(&mut oci, &namespaces(false, Pid::Own, false), None, refuses).unwrap();
            assert_eq!(oci.as_value()["linux"]["seccomp"]["syscalls"].as_array().unwrap().len(), rules);
        }
    }

    #[test]
    fn systemds_form() {
        let with = |path: &str| {
            let mut spec = spec(&[]);
            spec.set_cgroups_path(path);
            wants_systemd(&spec)
        };
        assert!(with("kubepods-pod1.slice:cri-containerd:abc") && with(":docker:abc"));
        assert!(!with("/kubepods/pod1/abc") && !with("kubepods/a:b:c") && !wants_systemd(&spec(&[])));
    }

    fn namespace() -> impl Strategy<Value = Value> {
        let kind = prop::sample::select(vec!["network", "ipc", "uts", "pid", "user", "mount", "cgroup", "time", "future"]);
        let path = prop_oneof![
            Just(None),
            Just(Some("/proc/0/ns/x".to_owned())),
            Just(Some("/proc/4711/ns/pid".to_owned())),
            "/[a-z]{1,8}".prop_map(Some)
        ];
        (kind, path, any::<bool>()).prop_map(|(kind, path, extra)| {
            let mut namespace = json!({"type": kind});
            if let Some(path) = path {
                namespace["path"] = path.into();
            }
            if extra {
                namespace["unheardOf"] = json!([1, {"deep": null}]);
            }
            namespace
        })
    }

    fn pid() -> impl Strategy<Value = Pid> {
        prop_oneof![Just(Pid::Own), Just(Pid::Node), Just(Pid::Shared("/proc/77/ns/pid".into()))]
    }

    proptest! {
        #[test]
        fn no_placeholder_is_left_and_the_rest_is_as_it_was(
            list in vec(namespace(), 0..8),
            (node, user, old) in any::<(bool, bool, bool)>(),
            pid in pid(),
            unknown in "[a-z]{1,8}",
            number in any::<i64>(),
        ) {
            let before: OciSpec = json!({
                "ociVersion": "1.2.0",
                "process": {"args": ["x"], "capabilities": {"effective": [unknown]}, "apparmorProfile": unknown, unknown.as_str(): number},
                "root": {"path": "rootfs", "later": number},
                "linux": {"namespaces": list, "seccomp": {"defaultAction": unknown, "new": [number]}, "mountLabel": "", "later": {}},
                "vm": {"later": [unknown]},
                unknown.as_str(): {"deep": number},
            }).try_into().unwrap();
            let pod = namespaces(node, pid, user);
            let mut once = before.clone();
            if rewrite(&mut once, &pod, None, old).is_ok() {
                prop_assert!(!once.as_value()["linux"]["namespaces"].to_string().contains("/proc/0/"));
                let mut twice = once.clone();
                rewrite(&mut twice, &pod, None, old).unwrap();
                prop_assert_eq!(&once, &twice);
                let rest = |spec: &OciSpec| {
                    let mut value = spec.as_value().clone();
                    for key in ["mounts", "ociVersion"] {
                        value.as_object_mut().unwrap().remove(key);
                    }
                    value["linux"]["namespaces"] = Value::Null;
                    value
                };
                prop_assert_eq!(rest(&before), rest(&once));
            }
        }
    }
}
