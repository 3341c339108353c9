//! A read-only OCI registry on loopback, in this process, and the `certs.d` files that send containerd to it.
//!
//! It serves a [`Store`] under the images' own names: `registry.k8s.io/pause:3.9` is pulled as such, from here.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::image::{self, Store};

/// A running registry; dropping it ends it.
///
/// It has a thread and a runtime of its own, so that it answers while a test blocks.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Registry {
    /// Serves `images`, and writes a hosts.toml for each of their hosts below `certs`.
    ///
    /// # Errors
    /// No port on loopback, or a file cannot be written.
    pub fn start(images: Store, certs: &Path) -> Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the registry's runtime")?;
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on loopback")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        for host in hosts(&images) {
            let dir = certs.join(&host);
            fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
            // `server` is where containerd goes when the host below has no such image: the same place, so that nothing is
            // ever asked of the Internet.
            let text = format!(
                "server = \"http://{address}\"\n\n[host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
            );
            fs::write(dir.join("hosts.toml"), text).with_context(|| format!("write into {}", dir.display()))?;
        }
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("registry".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        () = serve(listener, Arc::new(images)) => {}
                        _ = stopped => {}
                    }
                });
            })
            .context("start the registry's thread")?;
        Ok(Self { address, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // It fails when the thread has ended, which is what is wanted.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the registry's thread panicked");
        }
    }
}

fn hosts(images: &Store) -> BTreeSet<String> {
    images.references().keys().filter_map(|reference| Some(reference.split_once('/')?.0.to_owned())).collect()
}

async fn serve(listener: std::net::TcpListener, images: Arc<Store>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("registry: {error}");
            return;
        }
    };
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("registry: accept: {error}");
                return;
            }
        };
        let images = Arc::clone(&images);
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let response = answer(&images, request.method(), request.uri().path(), namespace(&request));
                async move { Ok::<_, Infallible>(response) }
            });
            // A client that hangs up in the middle is its own affair: containerd cancels pulls.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// containerd tells a mirror which host it stands for: `?ns=registry.k8s.io`.
fn namespace(request: &Request<Incoming>) -> Option<String> {
    request.uri().query()?.split('&').find_map(|pair| pair.strip_prefix("ns=").map(str::to_owned))
}

fn answer(images: &Store, method: &Method, path: &str, host: Option<String>) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        return failure(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this registry is read-only");
    }
    let Some(rest) = path.strip_prefix("/v2") else {
        return failure(StatusCode::NOT_FOUND, "NOT_FOUND", path);
    };
    let rest = rest.trim_start_matches('/');
    if rest.is_empty() {
        return success(method, "application/json", None, b"{}");
    }
    if let Some((_, digest)) = rest.rsplit_once("/blobs/") {
        return match images.blob(digest) {
            Some(bytes) => success(method, "application/octet-stream", Some(digest), bytes),
            None => failure(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", digest),
        };
    }
    if let Some((name, reference)) = rest.rsplit_once("/manifests/") {
        let digest = if reference.starts_with("sha256:") {
            Some(reference)
        } else {
            let full = format!("{}/{name}:{reference}", host.as_deref().unwrap_or("localhost"));
            images.references().get(&full).map(String::as_str)
        };
        return match digest.and_then(|digest| Some((digest, images.blob(digest)?))) {
            Some((digest, bytes)) => success(method, image::MANIFEST, Some(digest), bytes),
            None => failure(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", path),
        };
    }
    failure(StatusCode::NOT_FOUND, "NOT_FOUND", path)
}

fn success(method: &Method, media_type: &str, digest: Option<&str>, bytes: &[u8]) -> Response<Full<Bytes>> {
    let mut builder = Response::builder().header("Content-Type", media_type).header("Content-Length", bytes.len());
    if let Some(digest) = digest {
        builder = builder.header("Docker-Content-Digest", digest);
    }
    let body = if method == Method::HEAD { Bytes::new() } else { Bytes::copy_from_slice(bytes) };
    builder
        .body(Full::new(body))
        .unwrap_or_else(|error| failure(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", &error.to_string()))
}

fn failure(status: StatusCode, code: &str, message: &str) -> Response<Full<Bytes>> {
    let body = json!({ "errors": [{ "code": code, "message": message }] }).to_string();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Recipe;

    fn store() -> (Store, String) {
        let mut store = Store::new();
        let digest = store.build(&["registry.k8s.io/a/b:1"], &Recipe::new().file("x", 0o644, "y")).unwrap();
        (store, digest)
    }

    #[test]
    fn manifests_are_found_by_tag_of_the_host_and_by_digest() {
        let (store, digest) = store();
        let get = |path: &str, host: &str| answer(&store, &Method::GET, path, Some(host.to_owned())).status();
        assert_eq!(get("/v2/a/b/manifests/1", "registry.k8s.io"), StatusCode::OK);
        assert_eq!(get("/v2/a/b/manifests/1", "gcr.io"), StatusCode::NOT_FOUND);
        assert_eq!(get(&format!("/v2/a/b/manifests/{digest}"), "registry.k8s.io"), StatusCode::OK);
        assert_eq!(get("/v2/a/b/blobs/sha256:00", "registry.k8s.io"), StatusCode::NOT_FOUND);
        assert_eq!(get("/v2/", "registry.k8s.io"), StatusCode::OK);
    }

    #[test]
    fn it_is_read_only() {
        let (store, _) = store();
        let status = answer(&store, &Method::PUT, "/v2/a/b/manifests/1", None).status();
        assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    }
}
