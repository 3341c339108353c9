//! Options of containerd's runtime table, in whichever message they come.
//!
//! For `runtime_type = "io.containerd.runc.v2"` containerd sends runc's own message. For a type it does not know (ours) it
//! sends the table's TOML text, with the same keys.

use containerd_shim_protos::shim::oci::Options as RuncOptions;
use kuasar_sandboxers::{Error, Result, types::RuntimeOptions};
use prost::Message;
use prost_types::Any;
use protobuf::Message as _;
use serde::Deserialize;

use crate::proto::runtimeoptions;

const RUNC: &str = "containerd.runc.v1.Options";
const GENERIC: &str = "runtimeoptions.v1.Options";

/// The `options` table as people write it. The keys are those of runc's shim, so that a table can be moved over unchanged.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", deny_unknown_fields, default)]
struct Table {
    binary_name: String,
    systemd_cgroup: bool,
    no_pivot_root: bool,
    no_new_keyring: bool,
    io_uid: u32,
    io_gid: u32,
    // Understood and without effect here: there is no shim process, checkpoints are not made, and where the OCI runtime keeps its state
    // is the sandboxer's own setting.
    #[serde(rename = "ShimCgroup")]
    _shim_cgroup: String,
    #[serde(rename = "Root")]
    _root: String,
    #[serde(rename = "CriuPath")]
    _criu_path: String,
    #[serde(rename = "CriuImagePath")]
    _criu_image_path: String,
    #[serde(rename = "CriuWorkPath")]
    _criu_work_path: String,
    #[serde(rename = "TypeUrl")]
    _type_url: String,
    #[serde(rename = "TaskApiAddress")]
    _task_api_address: String,
    #[serde(rename = "TaskApiVersion")]
    _task_api_version: u32,
}

/// Reads runtime options; none at all mean the defaults.
///
/// # Errors
/// [`Error::Invalid`] for a message of another type, one that cannot be decoded, or a key that does not exist.
pub fn decode(options: Option<&Any>) -> Result<RuntimeOptions> {
    let Some(options) = options else { return Ok(RuntimeOptions::default()) };
    if options.type_url.is_empty() && options.value.is_empty() {
        return Ok(RuntimeOptions::default());
    }
    let invalid = |why: String| Error::invalid("runtime options", why);
    // Some clients write the type as a URL, `type.googleapis.com/…`.
    match options.type_url.rsplit('/').next().unwrap_or_default() {
        RUNC => {
            let options = RuncOptions::parse_from_bytes(&options.value)
                .map_err(|error| invalid(format!("they are not a {RUNC} message: {error}")))?;
            Ok(RuntimeOptions {
                binary: some(options.binary_name),
                systemd_cgroup: options.systemd_cgroup,
                no_pivot_root: options.no_pivot_root,
                no_new_keyring: options.no_new_keyring,
                io_owner: (options.io_uid, options.io_gid),
            })
        }
        GENERIC => {
            let options = runtimeoptions::Options::decode(options.value.as_slice())
                .map_err(|error| invalid(format!("they are not a {GENERIC} message: {error}")))?;
            if !options.config_path.is_empty() {
                let why =
                    "`ConfigPath` is not read; write the options into containerd's runtime table or kuasard's configuration";
                return Err(invalid(why.into()));
            }
            let text = std::str::from_utf8(&options.config_body).map_err(|_| invalid("they are not text".into()))?;
            let table: Table = toml::from_str(text).map_err(|error| invalid(error.message().to_owned()))?;
            Ok(RuntimeOptions {
                binary: some(table.binary_name),
                systemd_cgroup: table.systemd_cgroup,
                no_pivot_root: table.no_pivot_root,
                no_new_keyring: table.no_new_keyring,
                io_owner: (table.io_uid, table.io_gid),
            })
        }
        other => Err(invalid(format!("{other:?} is not known; {RUNC} and {GENERIC} are"))),
    }
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> Any {
        let options = runtimeoptions::Options { config_body: text.into(), ..Default::default() };
        Any { type_url: GENERIC.into(), value: options.encode_to_vec() }
    }

    fn wanted() -> RuntimeOptions {
        RuntimeOptions {
            binary: Some("crun".into()),
            systemd_cgroup: true,
            no_pivot_root: false,
            no_new_keyring: true,
            io_owner: (5, 6),
        }
    }

    #[test]
    fn no_options_are_the_defaults() {
        assert_eq!(decode(None).unwrap(), RuntimeOptions::default());
        assert_eq!(decode(Some(&Any::default())).unwrap(), RuntimeOptions::default());
        assert_eq!(decode(Some(&generic(""))).unwrap(), RuntimeOptions::default());
    }

    #[test]
    fn both_messages_say_the_same() {
        let runc = RuncOptions {
            binary_name: "crun".into(),
            systemd_cgroup: true,
            no_new_keyring: true,
            io_uid: 5,
            io_gid: 6,
            ..Default::default()
        };
        let any = Any { type_url: RUNC.into(), value: runc.write_to_bytes().unwrap() };
        assert_eq!(decode(Some(&any)).unwrap(), wanted());
        let any = Any { type_url: format!("type.googleapis.com/{RUNC}"), ..any };
        assert_eq!(decode(Some(&any)).unwrap(), wanted());
        let text = "BinaryName = 'crun'\nSystemdCgroup = true\nNoNewKeyring = true\nIoUid = 5\nIoGid = 6\nRoot = '/r'\n";
        assert_eq!(decode(Some(&generic(text))).unwrap(), wanted());
        let rest = "TaskApiAddress = 'unix:///x'\nTaskApiVersion = 3\nTypeUrl = 'x'\nShimCgroup = '/x'\nCriuPath = '/x'\n";
        assert_eq!(decode(Some(&generic(rest))).unwrap(), RuntimeOptions::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let garbage = Any { type_url: RUNC.into(), value: vec![0xff] };
        let path = runtimeoptions::Options { config_path: "/c".into(), ..Default::default() };
        let cases = [
            (Any { type_url: "x.Y".into(), value: vec![1] }, "x.Y"),
            (garbage, RUNC),
            (generic("BinaryNam = 'x'"), "BinaryNam"),
            (generic("SystemdCgroup = 'yes'"), "invalid type"),
            (Any { type_url: GENERIC.into(), value: path.encode_to_vec() }, "ConfigPath"),
        ];
        for (any, word) in cases {
            let error = decode(Some(&any)).unwrap_err();
            assert_eq!(error.code(), kuasar_sandboxers::Code::InvalidArgument);
            assert!(error.report().contains(word), "{}", error.report());
        }
    }
}
