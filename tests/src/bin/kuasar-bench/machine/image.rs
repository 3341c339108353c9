//! How large what a machine boots is.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Kernel;
use crate::report::{Line, Report, Target};
use crate::samples::Figure;

/// The most that an initrd may have, and the agent in it, in MiB.
const INITRD_MIB: f64 = 12.0;
const AGENT_MIB: f64 = 10.0;

/// Bytes of an entry's head in a cpio archive (`newc`, Documentation/driver-api/early-userspace/buffer-format.rst).
const HEAD: usize = 110;

pub(crate) fn measure(kernel: &Kernel, report: &mut Report) -> Result<()> {
    let initrd = kernel.path.with_file_name("initrd");
    let bytes = fs::read(&initrd).with_context(|| format!("read {}", initrd.display()))?;
    let mut add = |name, bytes: usize, most: Option<f64>| {
        let line = Line::new("guest image", name, "MiB", Figure::once(bytes as f64 / f64::from(1 << 20)));
        report.add(line.of(&kernel.label()).aim(most.map(Target::value)));
    };
    add("kernel", size(&kernel.path)?, None);
    add("initrd", bytes.len(), Some(INITRD_MIB));
    add("agent in it", agent(&bytes).with_context(|| format!("{} has no /init", initrd.display()))?, Some(AGENT_MIB));
    Ok(())
}

fn size(path: &Path) -> Result<usize> {
    Ok(usize::try_from(fs::metadata(path).with_context(|| format!("look at {}", path.display()))?.len())?)
}

/// The length of `init`.
fn agent(archive: &[u8]) -> Option<usize> {
    let mut rest = archive;
    loop {
        let field = |number: usize| {
            let digits = rest.get(6 + 8 * number..14 + 8 * number)?;
            usize::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
        };
        let (length, name_length) = (field(6)?, field(11)?);
        let name = rest.get(HEAD..HEAD + name_length.checked_sub(1)?)?;
        match name {
            b"init" | b"./init" | b"/init" => return Some(length),
            b"TRAILER!!!" => return None,
            _ => {}
        }
        rest = rest.get((HEAD + name_length).next_multiple_of(4) + length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, bytes: &[u8]) -> Vec<u8> {
        let fields = [0, 0o100644, 0, 0, 1, 0, bytes.len(), 0, 0, 0, 0, name.len() + 1, 0];
        let mut entry = b"070701".to_vec();
        entry.extend(fields.iter().flat_map(|field| format!("{field:08X}").into_bytes()));
        entry.extend(name.as_bytes());
        entry.push(0);
        entry.resize(entry.len().next_multiple_of(4), 0);
        entry.extend(bytes);
        entry.resize(entry.len().next_multiple_of(4), 0);
        entry
    }

    #[test]
    fn the_agent_is_found() {
        let archive = [entry("etc/modules", b"x"), entry("init", b"12345"), entry("TRAILER!!!", b"")].concat();
        assert_eq!(agent(&archive), Some(5));
        assert_eq!((agent(&entry("TRAILER!!!", b"")), agent(b"070701")), (None, None));
    }
}
