//! Overlay mounts: more layers than one page of options holds, and mapped ids.
//!
//! mount(2) takes one page of options, and paths of sixty layers fill it. Then the call is made by a thread whose working
//! directory is the layers' common one, with relative paths. (The newer `fsconfig` interface has no such limit, but
//! overlayfs has it since Linux 6.5 only.) overlayfs does not mount on top of mapped ids by itself either: its lower
//! directories must be mapped mounts already.

use std::{
    borrow::Cow,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    sched::{CloneFlags, unshare},
    unistd::{SysconfVar, chdir, sysconf},
};
use tracing::error;

use super::{Options, call, detach, idmap};
use crate::{
    error::{Error, Result},
    types::Mount,
};

const LOWER: &str = "lowerdir=";

/// Mounts an overlay on `target`; with `namespace`, the lower directories show ids mapped through that user namespace.
pub(super) fn mount(entry: &Mount, options: &Options, target: &Path, namespace: Option<&OwnedFd>) -> Result<()> {
    mount_layers(entry, options, target, namespace).map_err(|error| match missing(options) {
        // The kernel says that something is missing, not what.
        Some(directory) => Error::failed(format!("mount an overlay on {}", target.display()))(format!(
            "its directory {} does not exist; was the image removed? pull it again",
            directory.display()
        )),
        None => error,
    })
}

/// The first directory among the options that is not there.
fn missing(options: &Options) -> Option<PathBuf> {
    directories(options).find(|directory| !directory.exists())
}

/// The directories that the options name.
pub(super) fn directories(options: &Options) -> impl Iterator<Item = PathBuf> {
    let one = |key: &str| options.data.iter().find_map(|option| option.strip_prefix(key)).map(str::to_owned);
    let lower = one(LOWER).map(|value| Layers::parse(&value).0).unwrap_or_default();
    let named = lower.into_iter().chain(one("upperdir=")).chain(one("workdir=")).filter(|directory| !directory.is_empty());
    named.map(|directory| PathBuf::from(unescape(&directory)))
}

fn mount_layers(entry: &Mount, options: &Options, target: &Path, namespace: Option<&OwnedFd>) -> Result<()> {
    let lower = options.data.iter().find_map(|option| option.strip_prefix(LOWER));
    let rest: Vec<&str> = options.data.iter().map(String::as_str).filter(|option| !option.starts_with(LOWER)).collect();
    let layers = lower.map(Layers::parse);
    let Some(namespace) = namespace else {
        return mount_fitting(entry, options, target, &rest, layers.as_ref());
    };
    let layers = layers.ok_or_else(|| Error::invalid("rootfs mount options", "an overlay with uidmap has no lowerdir"))?;
    let common = layers.common().ok_or_else(|| {
        Error::invalid("rootfs mount options", "the lower directories of an overlay with uidmap have no directory in common")
    })?;
    let mapped = Mapped::new(&common.directory, target, namespace)?;
    let layers = common.move_to(&mapped.path);
    mount_fitting(entry, options, target, &rest, Some(&layers))
}

fn mount_fitting(entry: &Mount, options: &Options, target: &Path, rest: &[&str], layers: Option<&Layers>) -> Result<()> {
    let join = |layers: Option<&Layers>| {
        let mut words: Vec<Cow<'_, str>> = rest.iter().map(|word| Cow::Borrowed(*word)).collect();
        words.extend(layers.map(|layers| Cow::Owned(format!("{LOWER}{}", layers.0.join(":")))));
        words.join(",")
    };
    let source = Path::new(&entry.source);
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| usize::try_from(size).ok()).unwrap_or(4096);
    let data = join(layers);
    // One byte is for the end of the string.
    if data.len() < page {
        return call(Some(source), target, Some("overlay"), options.flags, Some(&data));
    }
    let too_long = || {
        let count = layers.map_or(0, |layers| layers.0.len());
        Error::invalid(
            "rootfs mount options",
            format!("{count} overlay layers do not fit into the kernel's {page} bytes of options"),
        )
    };
    let common = layers.and_then(Layers::common).ok_or_else(too_long)?;
    let data = join(Some(&Layers(common.relative.clone())));
    if data.len() >= page {
        return Err(too_long());
    }
    // A thread of its own, because the working directory it leaves behind is odd.
    std::thread::scope(|scope| {
        let work = || {
            unshare(CloneFlags::CLONE_FS).map_err(|errno| Error::failed("leave the shared working directory")(errno))?;
            chdir(&common.directory).map_err(|errno| Error::io("enter", &common.directory)(errno.into()))?;
            call(Some(source), target, Some("overlay"), options.flags, Some(&data))
        };
        let thread = std::thread::Builder::new().name("overlay".into()).stack_size(256 << 10).spawn_scoped(scope, work);
        thread
            .map_err(Error::failed("start a thread for an overlay mount"))?
            .join()
            .map_err(|_| Error::failed("mount an overlay")("its thread panicked"))?
    })
}

/// The value of `lowerdir`: directories separated by colons, with colons, commas and backslashes of a name escaped by a
/// backslash. An empty element stands for a double colon, after which layers hold data only.
struct Layers(Vec<String>);

struct Common {
    /// Unescaped.
    directory: PathBuf,
    /// What is left of each layer, still escaped.
    relative: Vec<String>,
}

impl Layers {
    fn parse(value: &str) -> Self {
        let mut layers = vec![String::new()];
        let mut escaped = false;
        for character in value.chars() {
            if character == ':' && !escaped {
                layers.push(String::new());
            } else if let Some(layer) = layers.last_mut() {
                layer.push(character);
            }
            escaped = character == '\\' && !escaped;
        }
        Self(layers)
    }

    /// The longest directory that all layers lie below, other than the root.
    fn common(&self) -> Option<Common> {
        let named = || self.0.iter().filter(|layer| !layer.is_empty());
        let mut prefix = named().next()?.as_str();
        for layer in named() {
            let same = prefix.chars().zip(layer.chars()).take_while(|(a, b)| a == b);
            prefix = &prefix[..same.map(|(character, _)| character.len_utf8()).sum()];
        }
        let prefix = &prefix[..prefix.rfind('/')?];
        if !prefix.starts_with('/') {
            return None;
        }
        let relative = self.0.iter().map(|layer| layer.get(prefix.len() + 1..).unwrap_or_default().to_owned()).collect();
        Some(Common { directory: unescape(prefix).into(), relative })
    }
}

impl Common {
    fn move_to(&self, directory: &Path) -> Layers {
        let directory = escape(&directory.to_string_lossy());
        let one = |layer: &String| if layer.is_empty() { String::new() } else { format!("{directory}/{layer}") };
        Layers(self.relative.iter().map(one).collect())
    }
}

fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        plain.extend(if character == '\\' { characters.next() } else { Some(character) });
    }
    plain
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '\\' | ':' | ',') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

/// A directory mounted once more with mapped ids, for as long as the overlay mount takes: overlayfs keeps clones of its own.
struct Mapped {
    path: PathBuf,
}

impl Mapped {
    fn new(directory: &Path, target: &Path, namespace: &OwnedFd) -> Result<Self> {
        // Beside the target, which is ours alone, and on its filesystem.
        let target = std::fs::canonicalize(target).map_err(Error::io("resolve mount point", target))?;
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".idmapped");
        let path = target.with_file_name(name);
        detach(&path)?; // of a daemon that was killed in between
        match std::fs::create_dir(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("make directory", path)(error));
            }
            _ => {}
        }
        let mapped = Self { path };
        idmap::map(directory, &mapped.path, namespace, true)?;
        Ok(mapped)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let removed = detach(&self.path)
            .and_then(|()| std::fs::remove_dir(&self.path).map_err(Error::io("remove directory", &self.path)));
        if let Err(error) = removed {
            error!(error = error.report(), "failed to remove a temporary mount");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shortens_layers_to_their_common_directory() {
        let layers = Layers::parse("/s/snapshots/11/fs:/s/snapshots/1/fs:/s/snapshots/12/fs");
        let common = layers.common().unwrap();
        assert_eq!(common.directory, Path::new("/s/snapshots"));
        assert_eq!(common.relative, ["11/fs", "1/fs", "12/fs"]);
        assert_eq!(common.move_to(Path::new("/t:x")).0[1], "/t\\:x/1/fs");
    }

    #[test]
    fn keeps_data_only_layers_and_escapes() {
        let layers = Layers::parse(r"/s/a\:b/1::/s/a\:b/2");
        let common = layers.common().unwrap();
        assert_eq!(common.directory, Path::new("/s/a:b"));
        assert_eq!(common.relative.join(":"), "1::2");
        for alone in ["/a:/b", "a:b", "a/b:a/c", ""] {
            assert!(Layers::parse(alone).common().is_none(), "{alone}");
        }
    }

    proptest! {
        #[test]
        fn common_and_rest_make_the_layer_again(names in prop::collection::vec("[a-zé:,\\\\ ]{1,6}", 1..6)) {
            let paths: Vec<String> = names.iter().map(|name| format!("/base/{name}/fs")).collect();
            let layers = Layers::parse(&paths.iter().map(|path| escape(path)).collect::<Vec<_>>().join(":"));
            let common = layers.common().unwrap();
            for (path, rest) in paths.iter().zip(&common.relative) {
                let joined = common.directory.join(unescape(rest));
                prop_assert_eq!(joined.as_path(), Path::new(path));
            }
        }
    }
}
