//! The memory that a guest image takes to boot.

use std::{fs::File, io::Read, path::Path};

use kuasar_sandboxers::{Error, Result};

/// The least memory that any machine has, in MiB.
const LEAST_MIB: u64 = 64;

/// What the kernel needs beside its own text and data and the initrd, in MiB: descriptions of pages, its first allocations, the agent and
/// the OCI runtime.
const WORK_MIB: u64 = 24;

/// The header of a bzImage (Documentation/arch/x86/boot.rst): version of the boot protocol, and how much memory the kernel takes from its
/// load address on until it has unpacked itself, which is also what its text, data and bss take afterwards.
const VERSION: usize = 0x206;
const INIT_SIZE: usize = 0x260;

/// The first version of the protocol with `init_size`.
const HAS_INIT_SIZE: u32 = 0x020a;

/// The least memory that a guest with this kernel and initrd boots with, in MiB.
///
/// # Errors
/// When a file cannot be read.
pub(crate) fn boot_mib(kernel: &Path, initrd: &Path) -> Result<u64> {
    let mut header = Vec::new();
    let open = File::open(kernel).map_err(Error::io("open", kernel))?;
    open.take(1024).read_to_end(&mut header).map_err(Error::io("read", kernel))?;
    let initrd = std::fs::metadata(initrd).map_err(Error::io("look at", initrd))?.len();
    // It is there twice while it is unpacked.
    let bytes = init_size(&header).saturating_add(2 * initrd);
    Ok(bytes.div_ceil(1 << 20).saturating_add(WORK_MIB).max(LEAST_MIB))
}

fn init_size(header: &[u8]) -> u64 {
    let word = |at: usize, length: usize| {
        header.get(at..at + length).map_or(0, |bytes| bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)))
    };
    if word(VERSION, 2) < HAS_INIT_SIZE { 0 } else { word(INIT_SIZE, 4).into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_how_much_it_needs() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, initrd) = (dir.path().join("vmlinuz"), dir.path().join("initrd"));
        File::create(&initrd).unwrap().set_len(7 << 20).unwrap();
        let mut header = vec![0; 1024];
        header[VERSION..VERSION + 2].copy_from_slice(&0x020f_u16.to_le_bytes());
        header[INIT_SIZE..INIT_SIZE + 4].copy_from_slice(&(51_u32 << 20).to_le_bytes());
        for (header, least) in [(&header[..], 51 + 14 + WORK_MIB), (&header[..INIT_SIZE], LEAST_MIB), (&[], LEAST_MIB)] {
            std::fs::write(&kernel, header).unwrap();
            assert_eq!(boot_mib(&kernel, &initrd).unwrap(), least);
        }
        assert!(boot_mib(&kernel, &dir.path().join("none")).unwrap_err().report().contains("none"));
    }
}
