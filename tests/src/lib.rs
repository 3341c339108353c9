//! Harness, end-to-end tests, conformance, demo and benchmark.
//!
//! Everything here talks to a **real, private containerd**, started in a scratch directory of its own beside whatever the
//! machine already runs. No test needs a container registry or the Internet: images are made on the spot from the host's
//! static busybox.
//!
//! ```text
//!   Node ──┬─ Scratch      directory, tmpfs for <state>, lock, network slot; swept when its owner is gone
//!          ├─ Containerd   child process, configuration, restart
//!          ├─ Kuasard      child process, configuration, restart (only when a sandboxer is asked for)
//!          ├─ Cri          client: Pod and Container handles, logs, exec streams
//!          ├─ Registry     in-process, loopback, read-only (only when asked for)
//!          └─ leak         what a node has on the machine, and what a test left of it
//!   Cluster               a Kubernetes around a Node: see [`kubernetes`]
//!   VmNode                a Debian node in a virtual machine, with systemd: see [`vm_node`]
//! ```
//!
//! # A test
//!
//! ```no_run
//! use kuasar_tests::{ContainerSpec, Node, NodeOptions, PodSpec};
//!
//! # async fn test() -> anyhow::Result<()> {
//! // containerd with the `runc` handler (runc-v2 shim) and, from our daemon, `kuasar-runc`.
//! let node = Node::start(NodeOptions::new("hello").sandboxer("kuasar-runc", "runc")).await?;
//! let before = node.snapshot()?;
//!
//! let pod = node.run_pod(PodSpec::new("pod").handler("kuasar-runc")).await?;
//! let container = pod.run(ContainerSpec::new("c").sh("echo hello; exec sleep 1000")).await?;
//! container.wait_log("hello").await?;
//! let ran = container.exec(["cat", "/proc/1/comm"]).await?;
//! assert_eq!((ran.exit_code, ran.stdout().as_str()), (0, "sleep\n"));
//! container.stop(0).await?;
//! pod.remove_all().await?;
//!
//! node.assert_no_leak(&before).await?;
//! node.stop().await
//! # }
//! ```
//!
//! `Drop` of a [`Node`] kills and removes everything too, so that a panic leaves nothing behind; [`Node::stop`] says what
//! went wrong while doing so. With `KUASAR_KEEP=1` the scratch directory of a failed test stays for inspection.
//!
//! A test that needs what the machine lacks calls [`skip!`] or [`require!`], which put it on record for the summary.
//!
//! # Environment
//!
//! `KUASAR_CONTAINERD`, `KUASAR_RUNC`, `KUASAR_CRUN`, `KUASAR_CRICTL`, `KUASAR_CRITEST`, `KUASAR_CNI_BIN` name a tool to use;
//! `KUASAR_KUBERNETES` the directory of its programs; `KUASAR_CACHE` the directory `make deps` fills; `KUASAR_BIN_DIR` our own executables; `KUASAR_SCRATCH` where scratch
//! directories go (default `/tmp`); `KUASAR_SKIP_LOG` the file that collects skipped tests.
//!
//! # Non-goals
//!
//! Nothing here mocks containerd or a runtime, and nothing is shared between two nodes.

pub mod conformance;
pub mod containerd;
pub mod cri;
pub mod hung;
pub mod hybrid;
pub mod image;
pub mod kuasard;
pub mod kubernetes;
pub mod leak;
pub mod node;
pub mod process;
pub mod program;
pub mod registry;
pub mod scratch;
pub mod screen;
pub mod signals;
pub mod skip;
pub mod systemd;
pub mod tools;
pub mod vm_node;
pub mod wait;

pub use cri::{Container, ContainerSpec, Cri, Pod, PodSpec};
pub use node::{Node, NodeOptions};
