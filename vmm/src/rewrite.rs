//! A container's specification as the guest's OCI runtime is to have it.
//!
//! containerd writes it for a container of this host. In the guest there is another kernel and none of the host's paths, so:
//!
//! | of the specification | becomes |
//! |---|---|
//! | root filesystem, bind mounts | their place in the pod's share, where their owners are mapped already |
//! | volumes on huge pages | a filesystem of the guest's own memory |
//! | block devices | virtio disks |
//! | namespaces by path | placeholders that the agent resolves |
//! | cpuset, RDMA, AppArmor, SELinux | nothing: they are about the host |
//! | hooks, bidirectional propagation | refused: they would act on the host |
//!
//! Everything else, what is newer than this code too, reaches the runtime as it is.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use kuasar_sandboxers::{
    Error, Result,
    mount::Binding,
    spec::OciSpec,
    types::{IdMapping, IdMappings},
};
use nix::sys::stat::{major, makedev, minor};
use serde_json::{Value, json};
use tracing::debug;

/// How containerd writes a namespace of a sandbox that has no process; the agent knows it too.
const PLACEHOLDER: &str = "/proc/0/ns";

/// A bind mount that is to be shown in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its place in the specification's list of mounts.
    pub(crate) index: usize,
    /// On the host.
    pub(crate) source: PathBuf,
    /// How it is shown.
    pub(crate) binding: Binding,
    /// The size of its pages in bytes, if it is on huge pages, which virtiofs cannot carry: the guest has a hugetlbfs of its own pages
    /// instead. Known once it was looked at.
    ///
    /// One on a tmpfs stays the host's, where its owner, its mode and each `subPath` of it are what kubelet made them; its pages count for
    /// the pod, for virtiofsd is in its group.
    pub(crate) huge_page: Option<i64>,
}

/// A block device that is to be a disk of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// On the host.
    pub(crate) source: PathBuf,
    /// In the container.
    pub(crate) path: String,
    pub(crate) readonly: bool,
}

/// Takes what is only about the host out of a specification, and finds what has to be brought into the guest.
///
/// # Errors
/// [`Error::Unsupported`] and [`Error::Invalid`] for what cannot be, naming it.
pub(crate) fn prepare(spec: &mut OciSpec) -> Result<(Vec<Volume>, Vec<BlockDevice>)> {
    refuse_hooks(spec)?;
    namespaces(spec);
    let devices = block_devices(spec)?;
    let value = spec.as_value_mut();
    for pointer in ["/process/apparmorProfile", "/process/selinuxLabel", "/linux/mountLabel", "/linux/resources/rdma"] {
        remove(value, pointer);
    }
    for field in ["cpus", "mems"] {
        remove(value, &format!("/linux/resources/cpu/{field}"));
    }
    Ok((volumes(spec)?, devices))
}

fn remove(value: &mut Value, pointer: &str) {
    if let Some((parent, key)) = pointer.rsplit_once('/')
        && let Some(object) = value.pointer_mut(parent).and_then(Value::as_object_mut)
    {
        object.shift_remove(key);
    }
}

fn refuse_hooks(spec: &OciSpec) -> Result<()> {
    let hooks = spec.as_value().get("hooks").and_then(Value::as_object);
    let used = hooks.into_iter().flatten().find(|(_, list)| list.as_array().is_some_and(|list| !list.is_empty()));
    match used {
        Some((kind, _)) => Err(Error::Unsupported {
            operation: "an OCI hook",
            why: format!(
                "{kind} hooks are programs of the host, which a container in a virtual machine has no part in; use a sandboxer of kind runc"
            ),
        }),
        None => Ok(()),
    }
}

/// What a guest's pids are shown with on the node: no process there has such a number (`PID_MAX_LIMIT` of Linux), and still each names one
/// container, for `kubectl debug --target`.
pub(crate) const GUEST_PIDS: u32 = 1 << 22;

/// The pod's namespaces are the guest's; which one is meant the agent knows by the kind. A process id that is named (`kubectl debug
/// --target`) becomes the guest's.
fn namespaces(spec: &mut OciSpec) {
    let asked: Vec<(String, Option<String>)> =
        spec.namespaces().map(|(kind, path)| (kind.to_owned(), path.map(str::to_owned))).collect();
    for (kind, path) in asked {
        if path.is_some() && kind != "pid" {
            let name = if kind == "network" { "net" } else { &kind };
            spec.set_namespace(&kind, Some(&Path::new(PLACEHOLDER).join(name)));
        } else if let Some(pid) = path.as_deref().and_then(guest_pid) {
            spec.set_namespace(&kind, Some(&PathBuf::from(format!("/proc/{pid}/ns/pid"))));
        }
    }
}

/// The pid in the guest that a path of a pid namespace names by the number that it has on the node.
fn guest_pid(path: &str) -> Option<u32> {
    let shown: u32 = path.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?.parse().ok()?;
    shown.checked_sub(GUEST_PIDS)
}

fn volumes(spec: &OciSpec) -> Result<Vec<Volume>> {
    let mut volumes = Vec::new();
    for (index, mount) in spec.mounts().iter().enumerate() {
        let destination = mount["destination"].as_str().unwrap_or_default();
        let options: Vec<&str> = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let recursive = options.contains(&"rbind");
        if !(recursive || options.contains(&"bind") || mount["type"] == "bind") {
            continue;
        }
        let source = mount["source"].as_str().filter(|source| source.starts_with('/'));
        let source = source.ok_or_else(|| {
            Error::invalid(format!("mount {destination}"), format!("its source {} is not an absolute path", mount["source"]))
        })?;
        if options.iter().any(|option| matches!(*option, "rshared" | "shared")) {
            return Err(Error::Unsupported {
                operation: "mount propagation Bidirectional",
                why: format!(
                    "{destination} would carry mounts of the virtual machine to the host; use HostToContainer, or a sandboxer of kind runc"
                ),
            });
        }
        let binding = Binding {
            readonly: options.iter().any(|option| matches!(*option, "ro" | "rro")),
            readonly_below: options.contains(&"rro"),
            recursive,
            follows: options.iter().any(|option| matches!(*option, "rslave" | "slave")),
            ids: id_mappings(mount).map_err(|why| Error::invalid(format!("mount {destination}"), why))?,
        };
        let source = PathBuf::from(source);
        volumes.push(Volume { index, source, binding, huge_page: None });
    }
    Ok(volumes)
}

/// How the owners of a volume's files are mapped, in a pod with a user namespace.
fn id_mappings(mount: &Value) -> Result<Option<IdMappings>, String> {
    let ranges = |field: &str| {
        let ranges = mount[field].as_array().into_iter().flatten();
        ranges.map(|range| id_mapping(range).ok_or_else(|| format!("{field} has {range}"))).collect::<Result<Vec<_>, _>>()
    };
    let (uids, gids) = (ranges("uidMappings")?, ranges("gidMappings")?);
    Ok((!uids.is_empty() || !gids.is_empty()).then_some(IdMappings { uids, gids }))
}

fn id_mapping(range: &Value) -> Option<IdMapping> {
    let number = |key: &str| u32::try_from(range[key].as_u64()?).ok();
    Some(IdMapping { container_id: number("containerID")?, host_id: number("hostID")?, length: number("size")? })
}

/// Points the mount of a volume at its place in the guest.
pub(crate) fn place(spec: &mut OciSpec, volume: &Volume, source: &Path) {
    if let Some(mount) = spec.mounts_mut().get_mut(volume.index) {
        mount["source"] = source.to_string_lossy().into();
        // What the host's mount propagates arrives through the share. So does that it is read-only; in the guest what is mounted below it
        // would be, too, for there that is an automount, which has the flags of the mount it is on.
        let shared = volume.huge_page.is_none();
        // Nor are owners mapped once more.
        if let Some(fields) = mount.as_object_mut().filter(|_| shared) {
            fields.shift_remove("uidMappings");
            fields.shift_remove("gidMappings");
        }
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| match option.as_str() {
                Some("rslave" | "slave" | "rprivate" | "private") => false,
                Some("ro" | "rro" | "idmap" | "ridmap") => !shared,
                _ => true,
            });
            options.push("rprivate".into());
        }
    }
}

/// Takes block devices out of the specification's list. A privileged container may be given all of the host's devices, which it asked for none
/// of: those are left out. They are told by /dev/null, which no other list has.
fn block_devices(spec: &mut OciSpec) -> Result<Vec<BlockDevice>> {
    let privileged = has_all_devices(spec);
    let Some(list) = spec.as_value_mut().pointer_mut("/linux/devices").and_then(Value::as_array_mut) else {
        return Ok(Vec::new());
    };
    let is_null = |device: &Value| device["type"] == "c" && device["major"] == 1 && device["minor"] == 3;
    let has_hosts = privileged && list.iter().any(is_null);
    let mut blocks = Vec::new();
    list.retain(|device| {
        let block = device["type"] == "b";
        if block {
            blocks.push(device.clone());
        }
        // Character devices are those of the guest's kernel with the same numbers: /dev/fuse, /dev/net/tun. It has no others to give.
        !block
    });
    if has_hosts {
        debug!(count = blocks.len(), "the node's block devices of a privileged container are left out");
        return Ok(Vec::new());
    }
    blocks.iter().map(|device| block_device(device, spec)).collect()
}

fn block_device(device: &Value, spec: &OciSpec) -> Result<BlockDevice> {
    let path = device["path"].as_str().unwrap_or_default().to_owned();
    let invalid = |why: String| Error::invalid(format!("device {path}"), why);
    let number = |key: &str| device[key].as_u64().ok_or_else(|| invalid(format!("it has no {key} number")));
    let (wanted_major, wanted_minor) = (number("major")?, number("minor")?);
    // By its number, which is what the container was promised, not by a path that may be anything by now. The kernel has named it; what has
    // that name is looked at below.
    let known = format!("/sys/dev/block/{wanted_major}:{wanted_minor}/uevent");
    let absent = |error| invalid(format!("the host has no block device {wanted_major}:{wanted_minor}: {error}"));
    let known = fs::read_to_string(known).map_err(absent)?;
    let name = known.lines().find_map(|line| line.strip_prefix("DEVNAME=")).unwrap_or_default();
    let source = Path::new("/dev").join(name);
    let found = fs::metadata(&source).map_err(absent)?;
    if !found.file_type().is_block_device() || found.rdev() != makedev(wanted_major, wanted_minor) {
        return Err(invalid(format!("{} is device {}:{}", source.display(), major(found.rdev()), minor(found.rdev()))));
    }
    let rules = spec.as_value().pointer("/linux/resources/devices").and_then(Value::as_array);
    let same = |rule: &Value, key: &str, number| rule[key].as_u64() == Some(number);
    let mut own = rules
        .into_iter()
        .flatten()
        .filter(|rule| rule["allow"] == true && same(rule, "major", wanted_major) && same(rule, "minor", wanted_minor));
    // One that may use all devices needs no rule for this one.
    let writable = match own.next() {
        None => has_all_devices(spec),
        Some(first) => {
            std::iter::once(first).chain(own).any(|rule| rule["access"].as_str().is_some_and(|access| access.contains('w')))
        }
    };
    Ok(BlockDevice { source, path, readonly: !writable })
}

/// Whether the container may use every device: a privileged one.
fn has_all_devices(spec: &OciSpec) -> bool {
    let rules = spec.as_value().pointer("/linux/resources/devices").and_then(Value::as_array);
    rules.into_iter().flatten().any(|rule| {
        let any = |key: &str| rule[key].is_null() || rule[key].as_i64().is_some_and(|number| number < 0);
        rule["allow"] == true && any("major") && any("minor") && rule["type"].as_str().is_none_or(|kind| kind == "a")
    })
}

/// Shows a disk that the agent has found, at `source` in the guest, as a device of the container. That it may use it the agent says, who
/// knows its number there.
pub(crate) fn add_block_device(spec: &mut OciSpec, device: &BlockDevice, source: &Path) {
    let options = if device.readonly { json!(["bind", "ro"]) } else { json!(["bind", "rw"]) };
    spec.mounts_mut().push(json!({
        "destination": device.path,
        "type": "bind",
        "source": source.to_string_lossy(),
        "options": options,
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(extra: Value) -> OciSpec {
        let mut value = json!({ "process": { "args": ["x"], "apparmorProfile": "p" }, "root": { "path": "rootfs" } });
        for (key, extra) in extra.as_object().unwrap() {
            value[key] = extra.clone();
        }
        value.try_into().unwrap()
    }

    #[test]
    fn what_is_the_hosts_goes_and_the_rest_stays() {
        let mut spec = spec(json!({
            "linux": {
                "resources": { "cpu": { "quota": 5, "cpus": "0-1" }, "rdma": {}, "later": 1 },
                "seccomp": { "defaultAction": "SCMP_ACT_ERRNO" },
                "namespaces": [{ "type": "network", "path": "/run/netns/x" }, { "type": "pid" }, { "type": "mount" }],
            },
            "later": [1],
        }));
        prepare(&mut spec).unwrap();
        let value = spec.as_value();
        assert_eq!(value["linux"]["resources"], json!({ "cpu": { "quota": 5 }, "later": 1 }));
        assert_eq!(value["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!((spec.namespace("network"), spec.namespace("pid")), (Some(Some("/proc/0/ns/net")), Some(None)));
        assert!(value["process"].get("apparmorProfile").is_none());
        for (shown, guests) in [(GUEST_PIDS + 106, 106), (107, 107)] {
            let path = format!("/proc/{shown}/ns/pid");
            let mut target = self::spec(json!({ "linux": { "namespaces": [{ "type": "pid", "path": path }] } }));
            prepare(&mut target).unwrap();
            assert_eq!(target.namespace("pid"), Some(Some(format!("/proc/{guests}/ns/pid").as_str())));
        }
        assert_eq!(value["later"], json!([1]));
    }

    #[test]
    fn hooks_and_outward_propagation_are_refused() {
        let error = prepare(&mut spec(json!({ "hooks": { "prestart": [{ "path": "/bin/x" }] } }))).unwrap_err();
        assert!(error.to_string().contains("prestart hooks"), "{error}");
        prepare(&mut spec(json!({ "hooks": { "prestart": [] } }))).unwrap();
        let mount = json!([{ "destination": "/x", "type": "bind", "source": "/tmp", "options": ["rbind", "rshared"] }]);
        let error = prepare(&mut spec(json!({ "mounts": mount }))).unwrap_err();
        assert!(error.to_string().contains("/x would carry mounts"), "{error}");
        let mount = json!([{ "destination": "/x", "type": "bind", "source": "relative" }]);
        assert!(matches!(prepare(&mut spec(json!({ "mounts": mount }))), Err(Error::Invalid { .. })));
    }

    #[test]
    fn volumes_are_found_and_placed() {
        let mounts = json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/a", "type": "bind", "source": "/tmp", "options": ["rbind", "rprivate", "ro"] },
            { "destination": "/b", "type": "none", "source": "/tmp", "options": ["bind", "rslave"] },
            { "destination": "/c", "type": "bind", "source": "/tmp", "options": ["rbind", "idmap"],
              "uidMappings": [{ "containerID": 0, "hostID": 100, "size": 10 }],
              "gidMappings": [{ "containerID": 0, "hostID": 200, "size": 10 }] },
        ]);
        let mut spec = spec(json!({ "mounts": mounts }));
        let (volumes, _) = prepare(&mut spec).unwrap();
        let binding = |readonly, recursive, follows| Binding { readonly, recursive, follows, ..Binding::default() };
        let kinds: Vec<_> = volumes.iter().map(|volume| (volume.index, volume.binding.clone())).collect();
        let range = |host_id| vec![IdMapping { container_id: 0, host_id, length: 10 }];
        let ids = Some(IdMappings { uids: range(100), gids: range(200) });
        let mapped = Binding { recursive: true, ids, ..Binding::default() };
        assert_eq!(kinds, [(1, binding(true, true, false)), (2, binding(false, false, true)), (3, mapped)]);
        place(&mut spec, &volumes[0], Path::new("/guest/a"));
        assert_eq!(spec.mounts()[1]["options"], json!(["rbind", "rprivate"]));
        place(&mut spec, &volumes[1], Path::new("/guest/b"));
        assert_eq!(spec.mounts()[2]["source"], "/guest/b");
        assert_eq!(spec.mounts()[2]["options"], json!(["bind", "rprivate"]));
        place(&mut spec, &volumes[2], Path::new("/guest/c"));
        let mapped = json!({ "destination": "/c", "type": "bind", "source": "/guest/c", "options": ["rbind", "rprivate"] });
        assert_eq!(spec.mounts()[3], mapped);
        let range = json!([{ "containerID": 0, "hostID": -1, "size": 1 }]);
        let mounts = json!([{ "destination": "/d", "type": "bind", "source": "/tmp", "uidMappings": range }]);
        assert!(matches!(prepare(&mut self::spec(json!({ "mounts": mounts }))), Err(Error::Invalid { .. })));
    }

    #[test]
    fn devices() {
        let device = json!({ "path": "/dev/null", "type": "c", "major": 1, "minor": 3 });
        let disk = json!({ "path": "/dev/xvda", "type": "b", "major": 4000, "minor": 1 });
        let all = json!({ "allow": true, "access": "rwm" });
        let mut privileged =
            spec(json!({ "linux": { "devices": [device, disk], "resources": { "devices": [{ "allow": false }, all] } } }));
        assert_eq!(prepare(&mut privileged).unwrap().1, []);
        assert_eq!(privileged.as_value()["linux"]["devices"], json!([device]));
        // One that may use all of the machine's devices, and has asked for a disk.
        let mut asking = spec(json!({ "linux": { "devices": [disk], "resources": { "devices": [all] } } }));
        let error = prepare(&mut asking).unwrap_err();
        assert!(error.to_string().contains("4000:1"), "{error}");
        let error = prepare(&mut spec(json!({ "linux": { "devices": [disk] } }))).unwrap_err();
        assert!(error.to_string().contains("/dev/xvda") && error.to_string().contains("4000:1"), "{error}");
        let mut spec = spec(json!({}));
        let block = BlockDevice { source: "/dev/block/8:1".into(), path: "/dev/data".into(), readonly: true };
        add_block_device(&mut spec, &block, Path::new("/run/kuasar/storage/d0"));
        assert_eq!(spec.mounts()[0]["destination"], "/dev/data");
        assert_eq!(spec.mounts()[0]["options"], json!(["bind", "ro"]));
    }
}
