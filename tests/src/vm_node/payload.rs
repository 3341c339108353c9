//! Files that a node has from its boot on: a tar archive as a second disk, which is quicker than any network into an emulated machine.

use std::fs::File;
use std::io::{BufWriter, Seek as _, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result};

/// Files to be unpacked at the root of the node. The archive has no name: it goes with this process and the hypervisor's.
pub struct Payload {
    tar: tar::Builder<BufWriter<File>>,
}

impl Payload {
    /// An empty one.
    ///
    /// # Errors
    /// No file can be made where scratch directories go.
    pub fn new() -> Result<Self> {
        let file = tempfile::tempfile_in(crate::scratch::base()).context("create a file for a disk")?;
        let mut tar = tar::Builder::new(BufWriter::new(file));
        tar.follow_symlinks(false);
        Ok(Self { tar })
    }

    /// A directory's contents, symbolic links as they are.
    ///
    /// # Errors
    /// Something cannot be read.
    pub fn tree(&mut self, dir: &Path) -> Result<()> {
        self.tar.append_dir_all(".", dir).with_context(|| format!("read {}", dir.display()))
    }

    /// A program of this machine, into a directory of the node. A symbolic link is followed.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn program(&mut self, program: &Path, dir: &str) -> Result<()> {
        let name = program.file_name().with_context(|| format!("{} has no name", program.display()))?;
        let mut file = File::open(program).with_context(|| format!("open {}", program.display()))?;
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(file.metadata()?.len());
        let to = Path::new(dir.trim_start_matches('/')).join(name);
        self.tar.append_data(&mut header, to, &mut file).with_context(|| format!("read {}", program.display()))
    }

    /// A file with this content.
    ///
    /// # Errors
    /// The archive cannot be written.
    pub fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        self.tar.append_data(&mut header, path.trim_start_matches('/'), content).with_context(|| format!("add {path}"))
    }

    /// The archive, from its beginning.
    pub(super) fn finish(self) -> Result<File> {
        let writer = self.tar.into_inner().context("finish the archive")?;
        let mut file = writer.into_inner().context("write the archive")?;
        file.seek(SeekFrom::Start(0))?;
        Ok(file)
    }
}
