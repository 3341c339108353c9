//! OCI images made on the spot: layers from bytes and host files, a layout in memory, a tar for `ctr images import`.
//!
//! ```text
//!   Recipe ──build──▶ Store { blobs by digest, manifests by reference } ──┬─▶ tar (import)
//!                                                                       └─▶ registry::Registry (pull)
//! ```

pub mod recipes;

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of a manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What one path of an image is.
#[derive(Clone, Debug)]
enum Kind {
    Dir,
    File(Vec<u8>),
    HardLink(String),
    Symlink(String),
}

#[derive(Clone, Debug)]
struct Entry {
    path: String,
    mode: u32,
    uid: u64,
    gid: u64,
    kind: Kind,
}

/// An image to be built: layers of paths in the order they are added, and the image's configuration.
#[derive(Clone, Debug, Default)]
pub struct Recipe {
    layers: Vec<Vec<Entry>>,
    config: serde_json::Map<String, Value>,
}

impl Recipe {
    /// An empty image.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn add(mut self, path: &str, mode: u32, kind: Kind) -> Self {
        let entry = Entry { path: path.trim_start_matches('/').to_owned(), mode, uid: 0, gid: 0, kind };
        match self.layers.last_mut() {
            Some(layer) => layer.push(entry),
            None => self.layers.push(vec![entry]),
        }
        self
    }

    /// Begins another layer: what follows is stored apart from what was added before, which other images may share.
    #[must_use]
    pub fn layer(mut self) -> Self {
        self.layers.push(Vec::new());
        self
    }

    /// A directory.
    #[must_use]
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.add(path, mode, Kind::Dir)
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, path: &str, mode: u32, content: impl Into<Vec<u8>>) -> Self {
        self.add(path, mode, Kind::File(content.into()))
    }

    /// A hard link to a path added before.
    #[must_use]
    pub fn hard_link(self, path: &str, to: &str) -> Self {
        self.add(path, 0o755, Kind::HardLink(to.trim_start_matches('/').to_owned()))
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, to: &str) -> Self {
        self.add(path, 0o777, Kind::Symlink(to.to_owned()))
    }

    /// Gives the path added last to another user.
    #[must_use]
    pub fn owned_by(mut self, uid: u64, gid: u64) -> Self {
        if let Some(entry) = self.layers.last_mut().and_then(|layer| layer.last_mut()) {
            (entry.uid, entry.gid) = (uid, gid);
        }
        self
    }

    /// Sets a key of the image configuration's `config` object (`User`, `Env`, `Cmd`, `Entrypoint`, `WorkingDir`, `Volumes`,
    /// `StopSignal`, `Labels`).
    #[must_use]
    pub fn config(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config.insert(key.to_owned(), value.into());
        self
    }
}

fn archive(entries: &[Entry]) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(entry.uid);
        header.set_gid(entry.gid);
        header.set_mtime(0);
        header.set_size(0);
        let context = || format!("add {} to the layer", entry.path);
        match &entry.kind {
            Kind::Dir => {
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, format!("{}/", entry.path), std::io::empty())
            }
            Kind::File(content) => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, &entry.path, content.as_slice())
            }
            Kind::HardLink(to) => {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, &entry.path, to)
            }
            Kind::Symlink(to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, &entry.path, to)
            }
        }
        .with_context(context)?;
    }
    tar.into_inner().context("finish the layer")
}

/// The OCI name of the architecture this program runs on.
#[must_use]
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `sha256:…` of some bytes.
#[must_use]
pub fn digest_of(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Built images, by reference.
#[derive(Clone, Debug, Default)]
pub struct Store {
    blobs: BTreeMap<String, Vec<u8>>,
    references: BTreeMap<String, String>,
}

impl Store {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn put(&mut self, bytes: Vec<u8>) -> (String, usize) {
        let digest = digest_of(&bytes);
        let size = bytes.len();
        self.blobs.entry(digest.clone()).or_insert(bytes);
        (digest, size)
    }

    /// Builds an image and names it; returns the digest of its manifest. Equal recipes give equal digests.
    ///
    /// # Errors
    /// A path cannot be written into a tar.
    pub fn build<S: AsRef<str>>(&mut self, references: &[S], recipe: &Recipe) -> Result<String> {
        // Uncompressed: the layer's digest is its diff id, and nothing is spent on compression over loopback.
        let mut diff_ids = Vec::new();
        let mut layers = Vec::new();
        for entries in &recipe.layers {
            let (digest, size) = self.put(archive(entries)?);
            layers.push(json!({ "mediaType": LAYER, "digest": digest, "size": size }));
            diff_ids.push(digest);
        }
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": recipe.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let (config, config_size) = self.put(serde_json::to_vec(&config)?);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": { "mediaType": CONFIG, "digest": config, "size": config_size },
            "layers": layers,
        });
        let (manifest, _) = self.put(serde_json::to_vec(&manifest)?);
        for reference in references {
            self.references.insert(reference.as_ref().to_owned(), manifest.clone());
        }
        Ok(manifest)
    }

    /// The references, with the digests of their manifests.
    #[must_use]
    pub fn references(&self) -> &BTreeMap<String, String> {
        &self.references
    }

    /// The bytes of a blob or manifest.
    #[must_use]
    pub fn blob(&self, digest: &str) -> Option<&[u8]> {
        self.blobs.get(digest).map(Vec::as_slice)
    }

    /// Writes the whole store as a tar of an OCI image layout, as `ctr images import` reads it.
    ///
    /// # Errors
    /// `out` cannot be written.
    pub fn write_tar(&self, out: impl Write) -> Result<()> {
        let mut tar = tar::Builder::new(out);
        let mut add = |path: &str, bytes: &[u8]| -> Result<()> {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, path, bytes).with_context(|| format!("add {path} to the archive"))
        };
        add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let manifests: Vec<Value> = self
            .references
            .iter()
            .map(|(reference, digest)| {
                json!({
                    "mediaType": MANIFEST,
                    "digest": digest,
                    "size": self.blobs.get(digest).map_or(0, Vec::len),
                    "annotations": { "io.containerd.image.name": reference },
                    "platform": { "architecture": architecture(), "os": "linux" },
                })
            })
            .collect();
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests });
        add("index.json", &serde_json::to_vec(&index)?)?;
        for (digest, bytes) in &self.blobs {
            add(&format!("blobs/{}", digest.replacen(':', "/", 1)), bytes)?;
        }
        tar.finish().context("finish the archive")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_recipes_give_equal_digests() {
        let recipe = || Recipe::new().dir("/bin", 0o755).file("/bin/a", 0o755, "x").hard_link("/bin/b", "/bin/a");
        let mut store = Store::new();
        let one = store.build(&["one:1"], &recipe()).unwrap();
        let two = store.build(&["two:1", "two:2"], &recipe()).unwrap();
        assert_eq!(one, two);
        assert_eq!(store.references().len(), 3);
        assert!(store.blob(&one).is_some());
        assert_ne!(one, store.build(&["three:1"], &recipe().config("User", "1")).unwrap());
    }

    #[test]
    fn the_archive_is_an_image_layout() {
        let mut store = Store::new();
        let digest = store.build(&["one:1"], &Recipe::new().symlink("/a", "b")).unwrap();
        let mut bytes = Vec::new();
        store.write_tar(&mut bytes).unwrap();
        let mut paths: Vec<String> = tar::Archive::new(bytes.as_slice())
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        paths.sort();
        assert!(paths.contains(&"oci-layout".to_owned()) && paths.contains(&"index.json".to_owned()));
        assert!(paths.contains(&format!("blobs/{}", digest.replace(':', "/"))));
    }
}
