//! The OCI runtime specification of a container, as a document.
//!
//! Kept as JSON, not as a typed struct: a struct would silently strip every field newer than itself (seccomp notify, time
//! offsets, personality …), and what a pod author asks for must reach the runtime. Typed views are taken where needed.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// An OCI runtime specification (config.json), checked to have what every runtime needs: `process` and `root`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct OciSpec(Value);

impl TryFrom<Value> for OciSpec {
    type Error = Error;
    fn try_from(value: Value) -> Result<Self> {
        for key in ["process", "root"] {
            if !value.get(key).is_some_and(Value::is_object) {
                return Err(Error::invalid("container spec", format!("config.json has no {key:?} object")));
            }
        }
        Ok(Self(value))
    }
}

impl OciSpec {
    /// Reads a document.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is not a JSON object, or lacks `process` or `root`.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json)
            .map_err(|error| Error::invalid("container spec", format!("config.json is not JSON: {error}")))?;
        value.try_into()
    }

    /// The document.
    #[must_use]
    pub fn as_value(&self) -> &Value {
        &self.0
    }

    /// The document, to be changed.
    pub fn as_value_mut(&mut self) -> &mut Value {
        &mut self.0
    }

    fn at(&self, pointer: &str) -> Option<&Value> {
        self.0.pointer(pointer)
    }

    fn text(&self, pointer: &str) -> Option<&str> {
        self.at(pointer)?.as_str().filter(|text| !text.is_empty())
    }

    /// The object under `key`, made if it is missing or is none.
    fn object_mut<'a>(parent: &'a mut Value, key: &str) -> &'a mut Value {
        // The document is an object by its making, and every other parent comes from this function.
        let child = &mut parent[key];
        if !child.is_object() {
            *child = Value::Object(Map::new());
        }
        child
    }

    fn list_mut<'a>(parent: &'a mut Value, key: &str) -> &'a mut Vec<Value> {
        let child = &mut parent[key];
        if !child.is_array() {
            *child = Value::Array(Vec::new());
        }
        match child {
            Value::Array(list) => list,
            _ => unreachable!("it was made an array above"),
        }
    }

    fn namespaces_mut(&mut self) -> &mut Vec<Value> {
        Self::list_mut(Self::object_mut(&mut self.0, "linux"), "namespaces")
    }

    /// The namespaces asked for: kind (`network`, `pid` …) and, for one to be joined, its path.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let list = self.at("/linux/namespaces").and_then(Value::as_array);
        list.into_iter().flatten().filter_map(|namespace| Some((namespace["type"].as_str()?, path_of(namespace))))
    }

    /// The path of the namespace of a kind: `None` when the container is to have the node's, `Some(None)` for a new one.
    #[must_use]
    pub fn namespace(&self, kind: &str) -> Option<Option<&str>> {
        self.namespaces().find(|(other, _)| *other == kind).map(|(_, path)| path)
    }

    /// Asks for a namespace of a kind: a new one, or that at `path`.
    pub fn set_namespace(&mut self, kind: &str, path: Option<&Path>) {
        let list = self.namespaces_mut();
        let is = |namespace: &Value| namespace["type"] == kind;
        let Some(first) = list.iter().position(is) else {
            let mut namespace = json!({ "type": kind });
            set_path(&mut namespace, path);
            return list.push(namespace);
        };
        set_path(&mut list[first], path);
        // A runtime refuses a kind that is named twice.
        let mut index = 0;
        list.retain(|namespace| {
            index += 1;
            index - 1 <= first || !is(namespace)
        });
    }

    /// Leaves the container in the node's namespace of a kind.
    pub fn drop_namespace(&mut self, kind: &str) {
        if self.namespace(kind).is_some() {
            self.namespaces_mut().retain(|namespace| namespace["type"] != kind);
        }
    }

    /// The mounts, as OCI mount objects.
    #[must_use]
    pub fn mounts(&self) -> &[Value] {
        self.at("/mounts").and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// The mounts, to be changed.
    pub fn mounts_mut(&mut self) -> &mut Vec<Value> {
        Self::list_mut(&mut self.0, "mounts")
    }

    /// `linux.cgroupsPath`: a path, or `slice:prefix:name` for the systemd driver.
    #[must_use]
    pub fn cgroups_path(&self) -> Option<&str> {
        self.text("/linux/cgroupsPath")
    }

    /// Names another control group.
    pub fn set_cgroups_path(&mut self, path: &str) {
        Self::object_mut(&mut self.0, "linux")["cgroupsPath"] = path.into();
    }

    /// Whether the first process gets a terminal.
    #[must_use]
    pub fn terminal(&self) -> bool {
        self.at("/process/terminal").and_then(Value::as_bool).unwrap_or(false)
    }

    /// `root.path`; relative to the bundle unless absolute.
    #[must_use]
    pub fn root_path(&self) -> Option<&str> {
        self.text("/root/path")
    }

    /// Names another root filesystem.
    pub fn set_root_path(&mut self, path: &Path) {
        Self::object_mut(&mut self.0, "root")["path"] = path.to_string_lossy().into();
    }

    /// Whether the container must not write to its root filesystem.
    #[must_use]
    pub fn root_readonly(&self) -> bool {
        self.at("/root/readonly").and_then(Value::as_bool).unwrap_or(false)
    }

    /// User and group id of the first process, as the container sees them.
    #[must_use]
    pub fn user(&self) -> (u32, u32) {
        let id = |pointer| self.at(pointer).and_then(Value::as_u64).and_then(|id| id.try_into().ok()).unwrap_or(0);
        (id("/process/user/uid"), id("/process/user/gid"))
    }

    /// The SELinux label for files made for the container.
    #[must_use]
    pub fn mount_label(&self) -> Option<&str> {
        self.text("/linux/mountLabel")
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.0.get("annotations")?.get(key)?.as_str()
    }

    /// Adds or changes an annotation.
    pub fn set_annotation(&mut self, key: &str, value: &str) {
        Self::object_mut(&mut self.0, "annotations")[key] = value.into();
    }
}

fn path_of(namespace: &Value) -> Option<&str> {
    namespace["path"].as_str().filter(|path| !path.is_empty())
}

fn set_path(namespace: &mut Value, path: Option<&Path>) {
    let Some(object) = namespace.as_object_mut() else { return };
    match path {
        Some(path) => {
            object.insert("path".into(), path.to_string_lossy().into());
        }
        None => {
            object.remove("path");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn spec(extra: Value) -> OciSpec {
        let mut value = json!({ "process": { "args": ["x"] }, "root": { "path": "rootfs" } });
        for (key, extra) in extra.as_object().unwrap() {
            value[key] = extra.clone();
        }
        OciSpec::parse(value.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn refuses_what_is_no_specification() {
        for bad in ["", "[]", "1", "{}", r#"{"process":{}}"#, r#"{"process":[],"root":{}}"#, "{\"process\":{},\"root\":null}"] {
            let error = OciSpec::parse(bad.as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with("invalid container spec: config.json "), "{error}");
        }
    }

    #[test]
    fn views() {
        let spec = spec(json!({
            "process": { "terminal": true, "user": { "uid": 7, "gid": 8 } },
            "root": { "path": "/r", "readonly": true },
            "linux": {
                "cgroupsPath": "/a/b",
                "mountLabel": "",
                "namespaces": [{ "type": "pid" }, { "type": "ipc", "path": "/p" }],
            },
            "annotations": { "a.b/c": "1" },
        }));
        assert!(spec.terminal() && spec.root_readonly());
        assert_eq!((spec.user(), spec.root_path(), spec.cgroups_path()), ((7, 8), Some("/r"), Some("/a/b")));
        assert_eq!((spec.annotation("a.b/c"), spec.annotation("x"), spec.mount_label()), (Some("1"), None, None));
        assert_eq!(spec.namespaces().collect::<Vec<_>>(), [("pid", None), ("ipc", Some("/p"))]);
        assert_eq!((spec.namespace("pid"), spec.namespace("uts")), (Some(None), None));
        let bare = self::spec(json!({}));
        assert!(!bare.terminal() && !bare.root_readonly() && bare.mounts().is_empty());
        assert_eq!((bare.user(), bare.cgroups_path(), bare.namespaces().count()), ((0, 0), None, 0));
    }

    #[test]
    fn what_is_missing_is_made() {
        let mut spec = spec(json!({ "linux": null }));
        spec.drop_namespace("pid");
        assert_eq!(spec.as_value()["linux"], Value::Null);
        spec.set_namespace("network", Some(Path::new("/n")));
        spec.set_cgroups_path("/c");
        spec.set_annotation("k", "v");
        spec.set_root_path(Path::new("/root"));
        spec.mounts_mut().push(json!({ "destination": "/x" }));
        assert_eq!(spec.namespace("network"), Some(Some("/n")));
        assert_eq!((spec.cgroups_path(), spec.annotation("k"), spec.root_path()), (Some("/c"), Some("v"), Some("/root")));
        assert_eq!(spec.mounts().len(), 1);
    }

    fn namespace() -> impl Strategy<Value = Value> {
        let kind = prop_oneof![Just("pid"), Just("ipc"), Just("network"), Just("future")];
        (kind, proptest::option::of("/[a-z]{1,5}"), any::<bool>()).prop_map(|(kind, path, extra)| {
            let mut namespace = json!({ "type": kind });
            if let Some(path) = path {
                namespace["path"] = path.into();
            }
            if extra {
                namespace["unheardOf"] = json!({ "deep": [1, null] });
            }
            namespace
        })
    }

    fn first<'a>(spec: &'a OciSpec, kind: &str) -> Option<&'a Value> {
        spec.as_value()["linux"]["namespaces"].as_array()?.iter().find(|namespace| namespace["type"] == kind)
    }

    fn odd_linux() -> impl Strategy<Value = Value> {
        let odd = [json!(1), json!([]), json!({ "namespaces": "x" }), json!({ "namespaces": [1, null, {}] })];
        prop::sample::select(odd.to_vec())
    }

    /// The document without what the helpers are allowed to change.
    fn rest(spec: &OciSpec, kind: &str) -> Value {
        let mut value = spec.as_value().clone();
        let others =
            value["linux"]["namespaces"].as_array().unwrap().iter().filter(|namespace| namespace["type"] != kind).cloned();
        value["linux"]["namespaces"] = others.collect();
        value
    }

    proptest! {
        #[test]
        fn setting_a_namespace_is_idempotent_and_nothing_else_changes(
            list in vec(namespace(), 0..6),
            path in proptest::option::of("/[a-z]{1,5}"),
            unknown in "[a-z]{1,8}",
        ) {
            let mut spec = spec(json!({ "linux": { "namespaces": list, "x": [unknown] }, "vm": { "new": 1.5 }, "y": unknown }));
            let before = rest(&spec, "ipc");
            let extra = first(&spec, "ipc").map(|namespace| namespace["unheardOf"].clone());
            spec.set_namespace("ipc", path.as_deref().map(Path::new));
            let once = spec.clone();
            spec.set_namespace("ipc", path.as_deref().map(Path::new));
            prop_assert_eq!(&spec, &once);
            prop_assert_eq!(spec.namespace("ipc"), Some(path.as_deref()));
            prop_assert_eq!(spec.namespaces().filter(|(kind, _)| *kind == "ipc").count(), 1);
            prop_assert_eq!(rest(&spec, "ipc"), before.clone());
            if let Some(extra) = extra {
                prop_assert_eq!(&first(&spec, "ipc").unwrap()["unheardOf"], &extra);
            }
            spec.drop_namespace("ipc");
            prop_assert_eq!(spec.as_value(), &before);
            spec.drop_namespace("ipc");
            prop_assert_eq!(spec.as_value(), &before);
        }

        #[test]
        fn a_document_survives_reading_and_writing(unknown in "[a-z]{1,8}", number in any::<i64>()) {
            let process = json!({ unknown.as_str(): [null, { "a": number }] });
            let value = json!({ "zeta": number, "process": process, "root": {}, "alpha": unknown });
            let text = value.to_string();
            let spec = OciSpec::parse(text.as_bytes()).unwrap();
            prop_assert_eq!(serde_json::to_string(&spec).unwrap(), text);
        }

        #[test]
        fn odd_shapes_do_not_panic(linux in odd_linux()) {
            let mut spec = spec(json!({ "linux": linux, "mounts": 5, "annotations": "x" }));
            let _ = (spec.namespaces().count(), spec.mounts().len(), spec.annotation("a"), spec.cgroups_path());
            spec.drop_namespace("pid");
            spec.set_namespace("pid", None);
            spec.set_annotation("a", "b");
            spec.mounts_mut();
            prop_assert_eq!(spec.namespace("pid"), Some(None));
        }
    }
}
