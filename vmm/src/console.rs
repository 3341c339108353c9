//! What the guest's kernel and agent say on the console.
//!
//! The VMM appends it to a file. A guest can say as much as it likes, so the file is cut when it has grown: what is kept is the end.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{OpenOptionsExt, chown},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kuasar_sandboxers::{Error, Result};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use crate::agent::tame_char;

/// How large the file may be before it is cut, in bytes. Between two looks it may grow beyond.
const LIMIT: u64 = 1 << 20;

/// How much of its end is kept then.
const KEPT: u64 = 256 << 10;

/// How much of its end is told with an error.
const LAST_LINES: usize = 12;

/// What stands in place of what was cut off.
const CUT: &[u8] = b"[the beginning was cut off]\n";

/// How much of it is read at once, in bytes.
const CHUNK: u64 = 32 << 10;

/// How often one who follows looks for more. Only the VMM knows when there is, and it tells nobody.
const LOOK: Duration = Duration::from_millis(200);

/// The console of one machine. Clones share what they know of it.
#[derive(Clone, Debug)]
pub(crate) struct Console {
    path: PathBuf,
    /// By how many bytes the file has become shorter: a place in it and this are a place in all that was said. Held while it is cut.
    shortened: Arc<Mutex<u64>>,
}

/// Makes text of what comes in pieces, of which a terminal takes nothing for a command. A character that is cut waits for its rest.
#[derive(Debug, Default)]
struct Tamer(Vec<u8>);

impl Tamer {
    fn text(&mut self, bytes: &[u8]) -> String {
        let mut all = std::mem::take(&mut self.0);
        all.extend(bytes);
        let mut text = String::new();
        for chunk in all.utf8_chunks() {
            text.extend(chunk.valid().chars().filter(|c| *c != '\r').map(tame_char));
            match chunk.invalid() {
                [] => {}
                // Only at the end, and at most three bytes.
                cut if str::from_utf8(cut).is_err_and(|error| error.error_len().is_none()) => self.0 = cut.to_vec(),
                _ => text.push(char::REPLACEMENT_CHARACTER),
            }
        }
        text
    }
}

impl Console {
    pub(crate) fn of(sandbox: &Path) -> Self {
        Self { path: sandbox.join("console.log"), shortened: Arc::default() }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the file, for a VMM that runs as this user.
    pub(crate) fn create(&self, user: Option<(u32, u32)>) -> Result<()> {
        let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.path);
        open.map_err(Error::io("create", &self.path))?;
        match user {
            Some((uid, gid)) => chown(&self.path, Some(uid), Some(gid)).map_err(Error::io("change the owner of", &self.path)),
            None => Ok(()),
        }
    }

    /// Cuts it, if it has grown too large.
    pub(crate) fn cut(&self) -> Result<()> {
        let mut shortened = self.shortened.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cut = || -> io::Result<()> {
            let mut file = OpenOptions::new().read(true).append(true).custom_flags(libc::O_NOFOLLOW).open(&self.path)?;
            let length = file.metadata()?.len();
            if length <= LIMIT {
                return Ok(());
            }
            let end = read_from(&mut file, length - KEPT, KEPT)?;
            // The VMM appends, so it goes on at the new end. What it says between these two is lost.
            file.set_len(0)?;
            *shortened += length - (CUT.len() + end.len()) as u64;
            file.write_all(CUT)?;
            file.write_all(&end)
        };
        match cut() {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("cut", &self.path)(error)),
            _ => Ok(()),
        }
    }

    /// Its end, without what a terminal would take for commands.
    pub(crate) fn end(&self, bytes: u64) -> Result<String> {
        let read = self.read(|file| {
            let length = file.metadata()?.len();
            read_from(file, length.saturating_sub(bytes), bytes)
        });
        Ok(Tamer::default().text(&read?.unwrap_or_default()))
    }

    /// Does something with the file; `None` when there is none.
    fn read<T>(&self, read: impl FnOnce(&mut File) -> io::Result<T>) -> Result<Option<T>> {
        match File::open(&self.path).and_then(|mut file| read(&mut file)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(Error::io("read", &self.path)),
        }
    }

    /// What was said from a place on, at most [`CHUNK`] bytes, and the place behind it. What was cut off meanwhile is passed over.
    fn after(&self, place: u64) -> Result<(Vec<u8>, u64)> {
        let shortened = self.shortened.lock().unwrap_or_else(PoisonError::into_inner);
        let within = match place.saturating_sub(*shortened) {
            // In the words about the cut, or before them.
            lost if *shortened > 0 && lost < CUT.len() as u64 => 0,
            within => within,
        };
        let bytes = self.read(|file| read_from(file, within, CHUNK))?.unwrap_or_default();
        let behind = *shortened + within + bytes.len() as u64;
        Ok((bytes, behind))
    }

    /// The place behind all that was said.
    fn end_place(&self) -> Result<u64> {
        let shortened = self.shortened.lock().unwrap_or_else(PoisonError::into_inner);
        let length = self.read(|file| Ok(file.metadata()?.len()))?;
        Ok(*shortened + length.unwrap_or_default())
    }

    /// Gives all that is there, and with `until` what is said from then on, until that resolves or nobody takes it any more.
    pub(crate) async fn give(&self, until: Option<impl Future<Output = ()>>, output: &mpsc::Sender<String>) -> Result<()> {
        let (mut tamer, mut place) = (Tamer::default(), 0);
        self.give_after(&mut place, &mut tamer, output).await?;
        let Some(until) = until else { return Ok(()) };
        let mut until = std::pin::pin!(until);
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let last = tokio::select! {
                biased;
                () = output.closed() => return Ok(()),
                () = &mut until => true,
                _ = look.tick() => false,
            };
            self.give_after(&mut place, &mut tamer, output).await?;
            if last {
                return Ok(());
            }
        }
    }

    /// Gives what was said between a place and now: not all that is said meanwhile, or a guest that never stops would keep it here.
    async fn give_after(&self, place: &mut u64, tamer: &mut Tamer, output: &mpsc::Sender<String>) -> Result<()> {
        let end = self.end_place()?;
        while *place < end {
            let (bytes, behind) = self.after(*place)?;
            *place = behind;
            // Nobody takes it, or there is no more: the file has gone.
            if output.send(tamer.text(&bytes)).await.is_err() || bytes.is_empty() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Its last lines, for an error message.
    pub(crate) fn last_lines(&self) -> String {
        let text = self.end(4096).unwrap_or_else(|error| error.report());
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    pub(crate) fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", &self.path)(error)),
            _ => Ok(()),
        }
    }
}

fn read_from(file: &mut File, start: u64, most: u64) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
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
        assert!(last.ends_with("line 39999 with \u{fffd}[31m something to say\nthe last"), "{last}");
        console.remove().unwrap();
        console.remove().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn following_survives_cuts_and_loses_nothing_that_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        let console = Console::of(dir.path());
        console.create(None).unwrap();
        let mut vmm = OpenOptions::new().append(true).open(console.path()).unwrap();
        let (output, mut given) = mpsc::channel(4);
        let ended = tokio_util::sync::CancellationToken::new();
        let (followed, until) = (console.clone(), ended.clone());
        let following = tokio::spawn(async move { followed.give(Some(until.cancelled_owned()), &output).await.unwrap() });
        let mut text = String::new();
        for line in 0..100_000 {
            writeln!(vmm, "line {line}, a\u{e4}\x1b[2J\r").unwrap();
            if line % 10_000 == 9_999 {
                // It may have been read before it is cut, or not, but never twice.
                while !text.contains(&format!("line {line},")) {
                    text.push_str(&given.recv().await.unwrap());
                }
                console.cut().unwrap();
            }
        }
        // More than is kept, at once: that is passed over, and said.
        for line in 100_000..200_000 {
            writeln!(vmm, "line {line}, a").unwrap();
        }
        console.cut().unwrap();
        writeln!(vmm, "the last").unwrap();
        ended.cancel();
        while let Some(more) = given.recv().await {
            text.push_str(&more);
        }
        following.await.unwrap();
        let (whole, end) = text.split_once("[the beginning was cut off]\n").unwrap();
        let expected: String = (0..100_000).map(|line| format!("line {line}, a\u{e4}\u{fffd}[2J\n")).collect();
        assert!(whole == expected, "{} bytes, not {}", whole.len(), expected.len());
        assert!(end.ends_with("line 199999, a\nthe last\n") && end.len() > 200 << 10, "{}", end.len());
    }

    #[test]
    fn characters_that_are_cut_are_put_together() {
        let said = "a\u{20ac}\tb\r\n\u{1f600}".as_bytes();
        for cut in 0..said.len() {
            let mut tamer = Tamer::default();
            let text = tamer.text(&said[..cut]) + &tamer.text(&said[cut..]);
            assert_eq!(text, "a\u{20ac}\tb\n\u{1f600}", "cut at {cut}");
        }
        assert_eq!(Tamer::default().text(b"x\xff\x9b2Jy\x1b]0;t\x07"), "x\u{fffd}\u{fffd}2Jy\u{fffd}]0;t\u{fffd}");
    }
}
