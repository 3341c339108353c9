//! What the guest's kernel and agent say on the console.
//!
//! The VMM appends it to a file. A guest can say as much as it likes, so the file is cut when it has grown: what is kept is the end.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{OpenOptionsExt, chown},
    path::{Path, PathBuf},
};

use kuasar_sandboxers::{Error, Result};

/// How large the file may be before it is cut, in bytes. Between two looks it may grow beyond.
const LIMIT: u64 = 1 << 20;

/// How much of its end is kept then.
const KEPT: u64 = 256 << 10;

/// How much of its end is told with an error.
const LAST_LINES: usize = 12;

/// The console of one machine.
#[derive(Clone, Debug)]
pub(crate) struct Console(PathBuf);

impl Console {
    pub(crate) fn of(sandbox: &Path) -> Self {
        Self(sandbox.join("console.log"))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Makes the file, for a VMM that runs as this user.
    pub(crate) fn create(&self, user: Option<(u32, u32)>) -> Result<()> {
        let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.0);
        open.map_err(Error::io("create", &self.0))?;
        match user {
            Some((uid, gid)) => chown(&self.0, Some(uid), Some(gid)).map_err(Error::io("change the owner of", &self.0)),
            None => Ok(()),
        }
    }

    /// Cuts it, if it has grown too large.
    pub(crate) fn cut(&self) -> Result<()> {
        let cut = || -> io::Result<()> {
            let mut file = OpenOptions::new().read(true).append(true).custom_flags(libc::O_NOFOLLOW).open(&self.0)?;
            if file.metadata()?.len() <= LIMIT {
                return Ok(());
            }
            let end = read_end(&mut file, KEPT)?;
            // The VMM appends, so it goes on at the new end. What it says between these two is lost.
            file.set_len(0)?;
            file.write_all(b"[the beginning was cut off]\n")?;
            file.write_all(&end)
        };
        match cut() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("cut", &self.0)(error)),
            _ => Ok(()),
        }
    }

    /// Its end, without what a terminal would take for commands.
    pub(crate) fn end(&self, bytes: u64) -> Result<String> {
        let read = || read_end(&mut File::open(&self.0)?, bytes);
        let bytes = match read() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(Error::io("read", &self.0))?,
        };
        let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
        Ok(text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect())
    }

    /// Its last lines, for an error message.
    pub(crate) fn last_lines(&self) -> String {
        let text = self.end(4096).unwrap_or_else(|error| error.report());
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    pub(crate) fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &self.0)(error)),
            _ => Ok(()),
        }
    }
}

fn read_end(file: &mut File, bytes: u64) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut end = Vec::new();
    file.take(bytes).read_to_end(&mut end)?;
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuzz_what_a_guest_says() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::of(dir.path());
        bolero::check!().for_each(|said: &[u8]| {
            fs::write(console.path(), said).unwrap();
            let told = console.end(64).unwrap();
            // A byte that is no text becomes a sign of three.
            assert!(told.len() <= 3 * 64 && !told.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t')));
            assert!(console.last_lines().lines().count() <= LAST_LINES);
        });
    }

    #[test]
    fn it_stays_bounded_and_the_end_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::of(dir.path());
        assert_eq!(console.last_lines(), "");
        console.cut().unwrap();
        console.create(None).unwrap();
        let mut vmm = OpenOptions::new().append(true).open(console.path()).unwrap();
        for line in 0..40_000 {
            writeln!(vmm, "line {line} with \x1b[31m something to say\r").unwrap();
        }
        console.cut().unwrap();
        writeln!(vmm, "the last").unwrap();
        let length = fs::metadata(console.path()).unwrap().len();
        assert!(length < KEPT + 100, "{length}");
        let last = console.last_lines();
        assert!(last.ends_with("line 39999 with [31m something to say\nthe last"), "{last}");
        console.remove().unwrap();
        console.remove().unwrap();
    }
}
