//! Mount options in mount(8)'s words.

use nix::mount::MsFlags;

use crate::{
    error::{Error, Result},
    types::{IdMapping, IdMappings, Mount},
};

/// The options of one mount, sorted by what the kernel wants where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// Flags of mount(2) without those of propagation.
    pub flags: MsFlags,
    /// Propagation; set in a call of its own.
    pub propagation: MsFlags,
    /// What only the filesystem understands.
    pub data: Vec<String>,
    /// `uidmap` and `gidmap`.
    pub idmap: Option<IdMappings>,
}

enum Effect {
    Set(MsFlags),
    Clear(MsFlags),
    Propagate(MsFlags),
}

fn effect(option: &str) -> Option<Effect> {
    use Effect::{Clear, Propagate, Set};
    let recursive = MsFlags::MS_REC;
    Some(match option {
        "defaults" | "nofail" => Set(MsFlags::empty()),
        "ro" => Set(MsFlags::MS_RDONLY),
        "rw" => Clear(MsFlags::MS_RDONLY),
        "nosuid" => Set(MsFlags::MS_NOSUID),
        "suid" => Clear(MsFlags::MS_NOSUID),
        "nodev" => Set(MsFlags::MS_NODEV),
        "dev" => Clear(MsFlags::MS_NODEV),
        "noexec" => Set(MsFlags::MS_NOEXEC),
        "exec" => Clear(MsFlags::MS_NOEXEC),
        "sync" => Set(MsFlags::MS_SYNCHRONOUS),
        "async" => Clear(MsFlags::MS_SYNCHRONOUS),
        "dirsync" => Set(MsFlags::MS_DIRSYNC),
        "mand" => Set(MsFlags::MS_MANDLOCK),
        "nomand" => Clear(MsFlags::MS_MANDLOCK),
        "noatime" => Set(MsFlags::MS_NOATIME),
        "atime" => Clear(MsFlags::MS_NOATIME),
        "nodiratime" => Set(MsFlags::MS_NODIRATIME),
        "diratime" => Clear(MsFlags::MS_NODIRATIME),
        "relatime" => Set(MsFlags::MS_RELATIME),
        "norelatime" => Clear(MsFlags::MS_RELATIME),
        "strictatime" => Set(MsFlags::MS_STRICTATIME),
        "nostrictatime" => Clear(MsFlags::MS_STRICTATIME),
        "remount" => Set(MsFlags::MS_REMOUNT),
        "bind" => Set(MsFlags::MS_BIND),
        "rbind" => Set(MsFlags::MS_BIND | recursive),
        "private" => Propagate(MsFlags::MS_PRIVATE),
        "rprivate" => Propagate(MsFlags::MS_PRIVATE | recursive),
        "shared" => Propagate(MsFlags::MS_SHARED),
        "rshared" => Propagate(MsFlags::MS_SHARED | recursive),
        "slave" => Propagate(MsFlags::MS_SLAVE),
        "rslave" => Propagate(MsFlags::MS_SLAVE | recursive),
        "unbindable" => Propagate(MsFlags::MS_UNBINDABLE),
        "runbindable" => Propagate(MsFlags::MS_UNBINDABLE | recursive),
        _ => return None,
    })
}

impl Options {
    /// Sorts the options of `mount`.
    pub(super) fn parse(mount: &Mount) -> Result<Self> {
        let unsupported = |what: &str| {
            Err(Error::Unsupported {
                operation: "this root filesystem",
                why: format!(
                    "its mount {} ({}) needs {what}; use a snapshotter that gives plain mounts, as overlayfs",
                    mount.source, mount.kind
                ),
            })
        };
        if mount.kind.starts_with("fuse.") || mount.kind.starts_with("fuse3.") {
            return unsupported("a FUSE helper program");
        }
        let mut options = Self {
            flags: if mount.kind == "bind" { MsFlags::MS_BIND } else { MsFlags::empty() },
            propagation: MsFlags::empty(),
            data: Vec::new(),
            idmap: None,
        };
        let (mut uids, mut gids) = (None, None);
        for option in &mount.options {
            match effect(option) {
                Some(Effect::Set(flags)) => options.flags |= flags,
                Some(Effect::Clear(flags)) => options.flags &= !flags,
                Some(Effect::Propagate(flags)) => options.propagation = flags,
                None if option == "loop" => return unsupported("a loop device"),
                None if option.starts_with("X-containerd.") => {
                    return unsupported(&format!("containerd's mount manager ({option})"));
                }
                None => {
                    if let Some(map) = option.strip_prefix("uidmap=") {
                        uids = Some(mappings("uidmap", map)?);
                    } else if let Some(map) = option.strip_prefix("gidmap=") {
                        gids = Some(mappings("gidmap", map)?);
                    } else {
                        options.data.push(option.clone());
                    }
                }
            }
        }
        options.idmap = match (uids, gids) {
            (Some(uids), Some(gids)) => Some(IdMappings { uids, gids }),
            (None, None) => None,
            _ => return Err(Error::invalid("rootfs mount options", "uidmap and gidmap come together or not at all")),
        };
        Ok(options)
    }
}

/// `inside:outside:length`, separated by commas.
fn mappings(name: &str, text: &str) -> Result<Vec<IdMapping>> {
    let one = |text: &str| {
        let mut numbers = text.split(':').map(str::parse);
        let mut next = || numbers.next()?.ok();
        let mapping = IdMapping { container_id: next()?, host_id: next()?, length: next()? };
        numbers.next().is_none().then_some(mapping)
    };
    text.split(',').map(one).collect::<Option<_>>().ok_or_else(|| {
        Error::invalid("rootfs mount options", format!("{name}={text} is not of the form inside:outside:length[,…]"))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(kind: &str, options: &[&str]) -> Result<Options> {
        let options = options.iter().map(ToString::to_string).collect();
        Options::parse(&Mount { kind: kind.into(), source: "x".into(), target: String::new(), options })
    }

    #[test]
    fn sorts_flags_propagation_and_data() {
        let options = parse("overlay", &["ro", "nosuid", "rw", "rslave", "index=off", "lowerdir=/a:/b"]).unwrap();
        assert_eq!(options.flags, MsFlags::MS_NOSUID);
        assert_eq!(options.propagation, MsFlags::MS_SLAVE | MsFlags::MS_REC);
        assert_eq!(options.data, ["index=off", "lowerdir=/a:/b"]);
        assert_eq!(parse("bind", &["ro"]).unwrap().flags, MsFlags::MS_BIND | MsFlags::MS_RDONLY);
    }

    #[test]
    fn reads_id_mappings() {
        let options = parse("bind", &["uidmap=0:1000:10,10:5000:1", "gidmap=0:2000:10"]).unwrap();
        let idmap = options.idmap.unwrap();
        assert_eq!(idmap.uids[1], IdMapping { container_id: 10, host_id: 5000, length: 1 });
        for bad in [
            &["uidmap=0:1:2"][..],
            &["uidmap=0:1", "gidmap=0:1:1"],
            &["uidmap=0:1:2:3", "gidmap=0:1:1"],
            &["uidmap=", "gidmap="],
        ] {
            assert!(matches!(parse("bind", bad), Err(Error::Invalid { .. })), "{bad:?}");
        }
    }

    #[test]
    fn says_what_it_cannot_mount() {
        for (kind, option) in [("ext4", "loop"), ("fuse3.fuse-overlayfs", "ro"), ("erofs", "X-containerd.dm=1")] {
            assert!(matches!(parse(kind, &[option]), Err(Error::Unsupported { .. })), "{kind}");
        }
    }

    proptest! {
        #[test]
        fn every_option_is_a_flag_or_data(options in prop::collection::vec("[a-z=:/]{1,12}", 0..8)) {
            let words: Vec<&str> = options.iter().map(String::as_str).collect();
            if let Ok(parsed) = parse("overlay", &words) {
                let data: Vec<_> = words.iter().filter(|word| effect(word).is_none()).collect();
                prop_assert_eq!(parsed.data.len(), data.len());
            }
        }
    }
}
