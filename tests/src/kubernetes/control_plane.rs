//! etcd, API server, controller manager and scheduler.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{GATES, NODE, START, Site, write};
use crate::process::{self, Daemon};

/// The API server's certificate, with that of the authority that it has made up for it.
pub(super) fn api_certificate(site: &Site) -> PathBuf {
    site.dir.join("certificates/apiserver.crt")
}

/// The running control plane.
pub struct ControlPlane {
    // In the order in which they go.
    scheduler: Daemon,
    controllers: Daemon,
    api: Daemon,
    etcd: Daemon,
    /// Configuration of a client that may do everything.
    pub admin: PathBuf,
    /// Configuration of kubelet.
    pub(super) kubelet: PathBuf,
    /// What the API server shows to kubelet.
    pub(super) client_certificate: PathBuf,
}

impl ControlPlane {
    /// Starts it and waits until the API server is ready.
    pub(super) async fn start(site: &Site) -> Result<Self> {
        let identity = Identity::make(site)?;
        let etcd = etcd(site)?;
        let mut api = api(site, &identity)?;
        let admin = site.kubeconfig("admin", &identity.admin)?;
        ready(site, &mut api, &admin).await?;
        let controllers = controllers(site, &identity)?;
        let scheduler = scheduler(site, &identity)?;
        let kubelet = site.kubeconfig("kubelet", &identity.kubelet)?;
        Ok(Self { scheduler, controllers, api, etcd, admin, kubelet, client_certificate: identity.certificate })
    }

    pub(super) fn check_running(&mut self) -> Result<()> {
        [&mut self.etcd, &mut self.api, &mut self.controllers, &mut self.scheduler]
            .into_iter()
            .try_for_each(Daemon::check_running)
    }

    /// None of them has anything to save: all of it goes with the directory.
    pub(super) fn stop(self) -> Result<()> {
        let Self { scheduler, controllers, api, etcd, .. } = self;
        [scheduler, controllers, api, etcd].into_iter().try_for_each(Daemon::kill)
    }
}

/// Who is who: tokens for the API server, and a key pair by which it signs tokens of service accounts and is known to kubelet.
struct Identity {
    admin: String,
    kubelet: String,
    controllers: String,
    scheduler: String,
    tokens: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Identity {
    fn make(site: &Site) -> Result<Self> {
        let [admin, kubelet, controllers, scheduler] = [token()?, token()?, token()?, token()?];
        let tokens = site.dir.join("tokens.csv");
        let rows = [
            format!("{admin},admin,admin,system:masters"),
            format!("{kubelet},system:node:{NODE},kubelet,system:nodes"),
            format!("{controllers},system:kube-controller-manager,controllers,"),
            format!("{scheduler},system:kube-scheduler,scheduler,"),
        ];
        write(&tokens, &rows.join("\n"))?;
        let [certificate, key] = ["client.crt", "client.key"].map(|name| site.dir.join(name));
        process::run(
            Command::new("openssl")
                .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=kube-apiserver"])
                .arg("-keyout")
                .arg(&key)
                .arg("-out")
                .arg(&certificate),
        )?;
        Ok(Self { admin, kubelet, controllers, scheduler, tokens, certificate, key })
    }
}

/// Other users of the machine must not be able to start privileged pods.
fn token() -> Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    Ok(std::fs::read_to_string(path).with_context(|| format!("read {path}"))?.trim().to_owned())
}

fn etcd_url(site: &Site, socket: &str) -> String {
    format!("unix://{}", site.dir.join(socket).display())
}

fn etcd(site: &Site) -> Result<Daemon> {
    let [clients, peers] = ["etcd.sock", "peer.sock"].map(|socket| etcd_url(site, socket));
    let mut command = site.program("etcd");
    command
        .arg("--data-dir")
        .arg(site.run.join("etcd"))
        // The data need not outlive a power failure.
        .args(["--unsafe-no-fsync", "--log-level", "warn"])
        .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", &format!("default={peers}")]);
    Daemon::spawn("etcd", command, &site.log("etcd"))
}

fn api(site: &Site, identity: &Identity) -> Result<Daemon> {
    let mut command = site.program("kube-apiserver");
    command
        .args(["--etcd-servers", &etcd_url(site, "etcd.sock")])
        .args(["--bind-address", "127.0.0.1", "--secure-port", &site.api_port.to_string()])
        .args(["--advertise-address", &site.address.to_string(), "--endpoint-reconciler-type", "none"])
        .arg("--cert-dir")
        .arg(site.dir.join("certificates"))
        .arg("--token-auth-file")
        .arg(&identity.tokens)
        .args(["--authorization-mode", "Node,RBAC", "--allow-privileged"])
        .args(["--enable-admission-plugins", "NodeRestriction", "--feature-gates", &gates()])
        .args(["--service-cluster-ip-range", "10.96.0.0/24"])
        .args(["--service-account-issuer", "https://kubernetes.default.svc"])
        .arg("--service-account-key-file")
        .arg(&identity.certificate)
        .arg("--service-account-signing-key-file")
        .arg(&identity.key)
        .arg("--kubelet-client-certificate")
        .arg(&identity.certificate)
        .arg("--kubelet-client-key")
        .arg(&identity.key)
        .args(["--kubelet-preferred-address-types", "InternalIP", "--profiling=false"]);
    Daemon::spawn("kube-apiserver", command, &site.log("kube-apiserver"))
}

fn gates() -> String {
    GATES.iter().map(|(gate, on)| format!("{gate}={on}")).collect::<Vec<_>>().join(",")
}

fn controllers(site: &Site, identity: &Identity) -> Result<Daemon> {
    let mut command = site.program("kube-controller-manager");
    command
        .arg("--kubeconfig")
        .arg(site.kubeconfig("kube-controller-manager", &identity.controllers)?)
        .arg("--service-account-private-key-file")
        .arg(&identity.key)
        .arg("--root-ca-file")
        .arg(api_certificate(site))
        .args(["--use-service-account-credentials", "--leader-elect=false", "--secure-port", "0"])
        .args(["--kube-api-qps", "200", "--kube-api-burst", "400", "--profiling=false"]);
    Daemon::spawn("kube-controller-manager", command, &site.log("kube-controller-manager"))
}

fn scheduler(site: &Site, identity: &Identity) -> Result<Daemon> {
    let mut command = site.program("kube-scheduler");
    command.arg("--kubeconfig").arg(site.kubeconfig("kube-scheduler", &identity.scheduler)?).args([
        "--leader-elect=false",
        "--secure-port",
        "0",
        "--profiling=false",
    ]);
    Daemon::spawn("kube-scheduler", command, &site.log("kube-scheduler"))
}

async fn ready(site: &Site, api: &mut Daemon, admin: &std::path::Path) -> Result<()> {
    let end = Instant::now() + START;
    loop {
        api.check_running()?;
        let asked = tokio::process::Command::new(site.programs.dir.join("kubectl"))
            .arg("--kubeconfig")
            .arg(admin)
            .args(["get", "--raw", "/readyz"])
            .kill_on_drop(true)
            .output()
            .await
            .context("run kubectl")?;
        if asked.status.success() {
            return Ok(());
        }
        if Instant::now() > end {
            let answer = String::from_utf8_lossy(&asked.stderr);
            bail!("the API server is not ready after {} s: {answer}; its log ends:\n{}", START.as_secs(), api.log_tail());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
