//! A pod as CRI describes it, as the contract's [`SandboxSpec`].

use std::{collections::BTreeMap, path::PathBuf};

use k8s_cri::v1 as cri;
use kuasar_sandboxers::{
    Error, Result,
    id::{Namespace, SandboxId},
    types::{
        DnsConfig, IdMapping, IdMappings, NamespaceMode, PodMetadata, PodNamespaces, PodResources, Resources, SandboxSpec,
    },
};
use prost::Message;
use prost_types::Any;
use serde::Deserialize;

use crate::{options, proto::sandbox::ControllerCreateRequest};

/// What containerd's CRI plugin packs into the options of a Create.
const POD_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// Reads a Create request.
///
/// # Errors
/// [`Error::Invalid`] naming the field that cannot be accepted.
pub fn spec(namespace: Namespace, request: ControllerCreateRequest) -> Result<SandboxSpec> {
    let id: SandboxId = request.sandbox_id.parse()?;
    let sandbox = request.sandbox.unwrap_or_default();
    let sandboxer = if request.sandboxer.is_empty() { sandbox.sandboxer } else { request.sandboxer };
    let options = options::decode(sandbox.runtime.unwrap_or_default().options.as_ref())?;
    let config = config(request.options.as_ref())?;
    let linux = config.linux.unwrap_or_default();
    let modes = linux.security_context.unwrap_or_default().namespace_options.unwrap_or_default();
    let namespaces = namespaces(modes)?;
    let netns = netns(&namespaces, request.netns_path)?;
    let metadata = config.metadata.unwrap_or_default();
    // CRI leaves the request's own annotations empty; another client's are the pod's too.
    let mut annotations: BTreeMap<_, _> = request.annotations.into_iter().collect();
    annotations.extend(config.annotations);
    Ok(SandboxSpec {
        namespace,
        id,
        sandboxer,
        pod: PodMetadata { name: metadata.name, namespace: metadata.namespace, uid: metadata.uid, attempt: metadata.attempt },
        hostname: one_line("hostname", config.hostname)?,
        netns,
        namespaces,
        dns: config.dns_config.map(dns).transpose()?,
        sysctls: linux.sysctls.into_iter().collect(),
        cgroup_parent: linux.cgroup_parent,
        labels: config.labels.into_iter().collect(),
        annotations,
        log_directory: config.log_directory,
        resources: PodResources {
            overhead: linux.overhead.map(resources).transpose()?,
            containers: linux.resources.map(resources).transpose()?,
        },
        options,
    })
}

fn config(options: Option<&Any>) -> Result<cri::PodSandboxConfig> {
    // A client without CRI (`ctr`) sends none: a pod with CRI's defaults.
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else { return Ok(cri::PodSandboxConfig::default()) };
    if any.type_url.rsplit('/').next() != Some(POD_CONFIG) {
        return Err(Error::invalid("options", format!("{:?} is not known; {POD_CONFIG} is", any.type_url)));
    }
    cri::PodSandboxConfig::decode(any.value.as_slice())
        .map_err(|error| Error::invalid("options", format!("they are not a {POD_CONFIG} message: {error}")))
}

fn namespaces(options: cri::NamespaceOption) -> Result<PodNamespaces> {
    Ok(PodNamespaces {
        network: pod_or_node(mode("network", options.network)?),
        pid: mode("pid", options.pid)?,
        ipc: pod_or_node(mode("ipc", options.ipc)?),
        user: user(options.userns_options)?,
    })
}

fn mode(kind: &str, value: i32) -> Result<NamespaceMode> {
    match cri::NamespaceMode::try_from(value) {
        Ok(cri::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(cri::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(cri::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(cri::NamespaceMode::Target) => Ok(NamespaceMode::Target),
        Err(_) => Err(Error::invalid(
            format!("namespace_options.{kind}"),
            format!("{value} is none of POD (0), CONTAINER (1), NODE (2) and TARGET (3)"),
        )),
    }
}

/// CRI has no network or ipc namespace of a container's own; like containerd, everything that is not the node's is the pod's.
fn pod_or_node(mode: NamespaceMode) -> NamespaceMode {
    match mode {
        NamespaceMode::Node => NamespaceMode::Node,
        NamespaceMode::Pod | NamespaceMode::Container | NamespaceMode::Target => NamespaceMode::Pod,
    }
}

fn user(options: Option<cri::UserNamespace>) -> Result<Option<IdMappings>> {
    let Some(options) = options else { return Ok(None) };
    let invalid = |why: &str| Err(Error::invalid("namespace_options.userns_options", why));
    match mode("userns_options", options.mode)? {
        NamespaceMode::Node if options.uids.is_empty() && options.gids.is_empty() => Ok(None),
        NamespaceMode::Node => invalid("mode NODE takes no mappings; leave them out or set mode POD"),
        NamespaceMode::Container | NamespaceMode::Target => invalid("the mode must be POD or NODE"),
        NamespaceMode::Pod => {
            if options.uids.is_empty() || options.gids.is_empty() {
                return invalid("mode POD needs at least one mapping of user ids and one of group ids");
            }
            if options.uids.iter().chain(&options.gids).any(|mapping| mapping.length == 0) {
                return invalid("a mapping's length must be greater than 0");
            }
            let mappings = |list: Vec<cri::IdMapping>| list.into_iter().map(mapping).collect();
            Ok(Some(IdMappings { uids: mappings(options.uids), gids: mappings(options.gids) }))
        }
    }
}

fn mapping(mapping: cri::IdMapping) -> IdMapping {
    IdMapping { container_id: mapping.container_id, host_id: mapping.host_id, length: mapping.length }
}

fn netns(namespaces: &PodNamespaces, path: String) -> Result<Option<PathBuf>> {
    let invalid = |why: String| Err(Error::invalid("netns_path", why));
    match (namespaces.network, path.as_str()) {
        (NamespaceMode::Node, _) => Ok(None),
        (_, "") => invalid(
            "it is empty, but the pod has a network of its own; ask for mode NODE, or give the namespace CNI has set up".into(),
        ),
        (_, path) if !path.starts_with('/') => invalid(format!("{path:?} is not an absolute path")),
        (_, path) => Ok(Some(PathBuf::from(path))),
    }
}

fn dns(config: cri::DnsConfig) -> Result<DnsConfig> {
    let lines = |field: &str, list: Vec<String>| -> Result<Vec<String>> {
        list.into_iter().map(|line| one_line(&format!("dns_config.{field}"), line)).collect()
    };
    Ok(DnsConfig {
        servers: lines("servers", config.servers)?,
        searches: lines("searches", config.searches)?,
        options: lines("options", config.options)?,
    })
}

/// These go into files with a meaning per line; a line break in them would write further lines.
fn one_line(field: &str, text: String) -> Result<String> {
    if text.contains(['\n', '\r', '\0']) {
        return Err(Error::invalid(field, format!("{text:?} has a line break or NUL in it")));
    }
    Ok(text)
}

fn resources(resources: cri::LinuxContainerResources) -> Result<Resources> {
    // kubelet names all sizes that the node has, most with a limit of nothing.
    let huge_pages = resources.hugepage_limits.into_iter().filter(|huge_pages| huge_pages.limit > 0);
    Ok(Resources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit_bytes: resources.memory_limit_in_bytes,
        memory_swap_limit_bytes: resources.memory_swap_limit_in_bytes,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: resources.cpuset_cpus,
        cpuset_mems: resources.cpuset_mems,
        unified: resources.unified.into_iter().collect(),
        huge_page_limits: huge_pages.map(|limit| Ok((page_size(&limit.page_size)?, limit.limit))).collect::<Result<_>>()?,
    })
}

/// A size of huge pages as CRI writes it (`2MB`, in powers of 1024), in bytes.
fn page_size(text: &str) -> Result<u64> {
    let units = [("KB", 10), ("MB", 20), ("GB", 30)];
    let bytes = units.iter().find_map(|(unit, shift)| {
        let number: u64 = text.strip_suffix(unit)?.parse().ok()?;
        number.checked_mul(1 << shift).filter(|bytes| bytes.is_power_of_two())
    });
    bytes.ok_or_else(|| Error::invalid("hugepage_limits.page_size", format!("{text:?} is no size of pages; one is 2MB, 1GB …")))
}

/// The `updated-resources` extension: a Go struct as `encoding/json` writes it, its inner messages with protobuf's own field names.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct UpdatedResources {
    overhead: Option<LinuxContainerResources>,
    resources: Option<LinuxContainerResources>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct LinuxContainerResources {
    cpu_period: i64,
    cpu_quota: i64,
    cpu_shares: i64,
    memory_limit_in_bytes: i64,
    memory_swap_limit_in_bytes: i64,
    oom_score_adj: i64,
    cpuset_cpus: String,
    cpuset_mems: String,
    unified: Option<BTreeMap<String, String>>,
}

impl From<LinuxContainerResources> for Resources {
    fn from(wire: LinuxContainerResources) -> Self {
        Self {
            cpu_period: wire.cpu_period,
            cpu_quota: wire.cpu_quota,
            cpu_shares: wire.cpu_shares,
            memory_limit_bytes: wire.memory_limit_in_bytes,
            memory_swap_limit_bytes: wire.memory_swap_limit_in_bytes,
            oom_score_adj: wire.oom_score_adj,
            cpuset_cpus: wire.cpuset_cpus,
            cpuset_mems: wire.cpuset_mems,
            unified: wire.unified.unwrap_or_default(),
            // They are set apart when a pod begins, and not changed.
            huge_page_limits: BTreeMap::new(),
        }
    }
}

/// Reads the extension that containerd sends with UpdatePodSandboxResources.
///
/// # Errors
/// [`Error::Invalid`] when it is not what containerd writes.
pub fn updated_resources(extension: &Any) -> Result<PodResources> {
    let invalid = |why: String| Error::invalid("extension updated-resources", why);
    if extension.type_url.rsplit('/').next() != Some("UpdatedResources") {
        return Err(invalid(format!("{:?} is not known; io.containerd.cri.v1/UpdatedResources is", extension.type_url)));
    }
    let wire: UpdatedResources =
        serde_json::from_slice(&extension.value).map_err(|error| invalid(format!("it cannot be read: {error}")))?;
    Ok(PodResources { overhead: wire.overhead.map(Into::into), containers: wire.resources.map(Into::into) })
}

#[cfg(test)]
mod tests {
    use kuasar_sandboxers::Code;

    use super::*;
    use crate::proto::types;

    fn request(config: &cri::PodSandboxConfig) -> ControllerCreateRequest {
        ControllerCreateRequest {
            sandbox_id: "pod1".into(),
            options: Some(Any { type_url: POD_CONFIG.into(), value: config.encode_to_vec() }),
            netns_path: "/run/netns/x".into(),
            sandboxer: "kuasar-runc".into(),
            ..Default::default()
        }
    }

    fn with(options: cri::NamespaceOption) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn namespace() -> Namespace {
        "k8s.io".parse().unwrap()
    }

    fn refusal(request: ControllerCreateRequest) -> String {
        let error = spec(namespace(), request).unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        error.report()
    }

    #[test]
    fn an_empty_config_means_the_pods_own_namespaces() {
        let spec = spec(namespace(), request(&cri::PodSandboxConfig::default())).unwrap();
        assert_eq!(spec.namespaces, PodNamespaces::default());
        assert_eq!(spec.namespaces.pid, NamespaceMode::Pod);
        assert_eq!(spec.netns, Some("/run/netns/x".into()));
        assert_eq!((spec.dns, spec.resources, spec.options), Default::default());
        assert_eq!(spec.sandboxer, "kuasar-runc");
    }

    #[test]
    fn every_field_arrives() {
        let limits = cri::LinuxContainerResources {
            cpu_period: 1,
            cpu_quota: 2,
            cpu_shares: 3,
            memory_limit_in_bytes: 4,
            oom_score_adj: 5,
            cpuset_cpus: "0".into(),
            cpuset_mems: "1".into(),
            unified: [("memory.high".to_owned(), "9".to_owned())].into(),
            memory_swap_limit_in_bytes: 6,
            ..Default::default()
        };
        let mapping = cri::IdMapping { host_id: 65536, container_id: 0, length: 65536 };
        let mut config = with(cri::NamespaceOption {
            network: cri::NamespaceMode::Pod as i32,
            pid: cri::NamespaceMode::Container as i32,
            ipc: cri::NamespaceMode::Node as i32,
            userns_options: Some(cri::UserNamespace { mode: 0, uids: vec![mapping], gids: vec![mapping] }),
            ..Default::default()
        });
        config.metadata =
            Some(cri::PodSandboxMetadata { name: "n".into(), uid: "u".into(), namespace: "ns".into(), attempt: 7 });
        config.hostname = "h".into();
        config.log_directory = "/log".into();
        config.dns_config = Some(cri::DnsConfig {
            servers: vec!["10.0.0.1".into()],
            searches: vec!["a.b".into()],
            options: vec!["ndots:5".into()],
        });
        config.labels = [("l".to_owned(), "1".to_owned())].into();
        config.annotations = [("a".to_owned(), "2".to_owned())].into();
        let linux = config.linux.as_mut().unwrap();
        linux.cgroup_parent = "/kubepods/pod1".into();
        linux.sysctls = [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into();
        linux.resources = Some(limits);
        let mut request = request(&config);
        request.annotations = [("b".to_owned(), "3".to_owned())].into();

        let spec = spec(namespace(), request).unwrap();
        assert_eq!((spec.pod.name.as_str(), spec.pod.uid.as_str(), spec.pod.attempt), ("n", "u", 7));
        assert_eq!((spec.hostname.as_str(), spec.log_directory.as_str()), ("h", "/log"));
        assert_eq!(spec.namespaces.pid, NamespaceMode::Container);
        assert_eq!(spec.namespaces.ipc, NamespaceMode::Node);
        let range = IdMapping { container_id: 0, host_id: 65536, length: 65536 };
        assert_eq!(spec.namespaces.user, Some(IdMappings { uids: vec![range], gids: vec![range] }));
        assert_eq!(spec.dns.unwrap().options, ["ndots:5"]);
        assert_eq!(spec.sysctls["net.ipv4.ip_forward"], "1");
        assert_eq!(spec.cgroup_parent, "/kubepods/pod1");
        assert_eq!(spec.labels["l"], "1");
        assert_eq!((spec.annotations["a"].as_str(), spec.annotations["b"].as_str()), ("2", "3"));
        let got = spec.resources.containers.unwrap();
        assert_eq!((got.cpu_period, got.cpu_quota, got.cpu_shares, got.memory_limit_bytes), (1, 2, 3, 4));
        assert_eq!((got.oom_score_adj, got.memory_swap_limit_bytes), (5, 6));
        assert_eq!((got.cpuset_cpus.as_str(), got.unified["memory.high"].as_str()), ("0", "9"));
        assert_eq!(spec.resources.overhead, None);
    }

    #[test]
    fn the_nodes_network_has_no_netns() {
        let mut request = request(&with(cri::NamespaceOption { network: 2, ..Default::default() }));
        request.netns_path = String::new();
        let spec = spec(namespace(), request).unwrap();
        assert_eq!((spec.namespaces.network, spec.netns), (NamespaceMode::Node, None));
    }

    #[test]
    fn the_sandboxer_may_come_with_the_sandbox() {
        let mut request = request(&cri::PodSandboxConfig::default());
        request.sandboxer = String::new();
        request.sandbox = Some(types::Sandbox { sandboxer: "other".into(), ..Default::default() });
        assert_eq!(spec(namespace(), request).unwrap().sandboxer, "other");
    }

    #[test]
    fn bad_requests_are_named() {
        let good = request(&cri::PodSandboxConfig::default());
        for id in ["", "a/b", "..", "a\0b", &"a".repeat(300)] {
            assert!(refusal(ControllerCreateRequest { sandbox_id: id.into(), ..good.clone() }).contains("sandbox id"));
        }
        assert!(refusal(ControllerCreateRequest { netns_path: String::new(), ..good.clone() }).contains("netns_path"));
        assert!(refusal(ControllerCreateRequest { netns_path: "x".into(), ..good.clone() }).contains("absolute"));
        let other = Any { type_url: "x.Y".into(), value: vec![] };
        assert!(refusal(ControllerCreateRequest { options: Some(other), ..good.clone() }).contains("x.Y"));
        let garbage = Any { type_url: POD_CONFIG.into(), value: vec![0xff] };
        assert!(refusal(ControllerCreateRequest { options: Some(garbage), ..good.clone() }).contains(POD_CONFIG));
        assert!(refusal(request(&with(cri::NamespaceOption { pid: 17, ..Default::default() }))).contains("17"));
        let injected = cri::DnsConfig { searches: vec!["a\nnameserver 6.6.6.6".into()], ..Default::default() };
        let config = cri::PodSandboxConfig { dns_config: Some(injected), ..Default::default() };
        assert!(refusal(request(&config)).contains("dns_config.searches"));
        let config = cri::PodSandboxConfig { hostname: "a\nb".into(), ..Default::default() };
        assert!(refusal(request(&config)).contains("hostname"));
    }

    #[test]
    fn user_namespaces_are_checked() {
        let mapping = cri::IdMapping { host_id: 1, container_id: 0, length: 1 };
        let userns = |mode, uids, gids| {
            let options =
                cri::NamespaceOption { userns_options: Some(cri::UserNamespace { mode, uids, gids }), ..Default::default() };
            request(&with(options))
        };
        assert!(refusal(userns(0, vec![], vec![])).contains("at least one"));
        assert!(refusal(userns(0, vec![mapping], vec![])).contains("at least one"));
        assert!(refusal(userns(1, vec![mapping], vec![mapping])).contains("POD or NODE"));
        assert!(refusal(userns(2, vec![mapping], vec![])).contains("no mappings"));
        let empty = cri::IdMapping { length: 0, ..mapping };
        assert!(refusal(userns(0, vec![empty], vec![mapping])).contains("length"));
        assert_eq!(spec(namespace(), userns(2, vec![], vec![])).unwrap().namespaces.user, None);
    }

    #[test]
    fn huge_pages_have_sizes() {
        for (text, bytes) in [("64KB", 64 << 10), ("2MB", 2 << 20), ("1GB", 1 << 30)] {
            assert_eq!(page_size(text).unwrap(), bytes);
        }
        for bad in ["", "MB", "2", "3MB", "-2MB", "2mb", "99999999999999GB"] {
            assert!(page_size(bad).unwrap_err().report().contains("hugepage_limits.page_size"), "{bad}");
        }
        let limit = |page_size: &str, limit| cri::HugepageLimit { page_size: page_size.into(), limit };
        let limits = vec![limit("1GB", 0), limit("2MB", 4 << 20)];
        let read = resources(cri::LinuxContainerResources { hugepage_limits: limits, ..Default::default() }).unwrap();
        assert_eq!(read.huge_page_limits, BTreeMap::from([(2 << 20, 4 << 20)]));
    }

    #[test]
    fn updated_resources_are_read_as_go_writes_them() {
        let any = |url: &str, json: &str| Any { type_url: url.into(), value: json.into() };
        let url = "io.containerd.cri.v1/UpdatedResources";
        let json = r#"{"Overhead":null,"Resources":{"cpu_period":100000,"cpu_quota":20000,"memory_limit_in_bytes":1048576,"hugepage_limits":[{"page_size":"2MB"}]}}"#;
        let got = updated_resources(&any(url, json)).unwrap();
        assert_eq!(got.overhead, None);
        let containers = got.containers.unwrap();
        assert_eq!((containers.cpu_quota, containers.memory_limit_bytes), (20000, 1_048_576));
        for bad in [any("x/Y", json), any(url, "[]"), any(url, "{"), any(url, r#"{"Resources":{"cpu_quota":"x"}}"#)] {
            assert_eq!(updated_resources(&bad).unwrap_err().code(), Code::InvalidArgument);
        }
    }
}
