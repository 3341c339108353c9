//! systemd, where it has started the daemon: what is parked is stored there too (FDSTORE, sd_notify(3)), so that the keeper's own death does
//! not close it. The next keeper gets it back as a service with sockets does (sd_listen_fds(3)).
//!
//! systemd may be busy for seconds, as when it reloads its units, and nothing here waits for it: what its socket does not take is sent later.
//! Not message by message, of which there would be ever more, but by name: what is stored under it has to become what is parked.
//!
//! Without systemd nothing here does anything.

use std::{
    collections::{BTreeMap, VecDeque},
    env, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendmsg_addr,
    socket_with,
};

use super::CONFIG;
use crate::sys;

/// The longest name that systemd takes, in bytes.
const NAME_LIMIT: usize = 255;

/// How long to wait before what was not taken is sent again. A socket that is not connected cannot be waited for.
const AGAIN: Duration = Duration::from_millis(50);

/// How long systemd may take to take the rest when the keeper ends.
const REST: Duration = Duration::from_secs(2);

/// How often all is stored once more while systemd has too little room: others may have gone, or the unit may have been given more.
const STORE_AGAIN: Duration = Duration::from_secs(60);

/// What is parked, by name.
pub(super) type Parked = BTreeMap<String, Vec<OwnedFd>>;

/// Whether what is parked outlives the keeper.
#[must_use]
pub fn is_stored() -> bool {
    // Set for a service of Type=notify. There is no telling whether its unit has room for descriptors; ours has.
    env::var_os("NOTIFY_SOCKET").is_some()
}

/// What is still to be sent to systemd.
#[derive(Debug, Default)]
pub(super) struct Notifier {
    /// Where to; `None` without systemd.
    address: Option<SocketAddrUnix>,
    socket: Option<OwnedFd>,
    words: VecDeque<&'static str>,
    /// Names under which what is stored may differ from what is parked, and how many descriptors may be stored under each.
    names: BTreeMap<String, usize>,
    /// When to go on.
    again: Option<Instant>,
    /// How many descriptors systemd stores (`FileDescriptorStoreMax=`), as far as it says so, which it does from version 254 on.
    room: Option<usize>,
    /// More are parked than it stores: when to store all once more.
    overflow: Option<Instant>,
    /// It was logged that systemd cannot be reached.
    is_lost: bool,
}

impl Notifier {
    /// As the environment says, with what an earlier keeper has not sent.
    pub(super) fn new(names: BTreeMap<String, usize>) -> Self {
        let address = env::var_os("NOTIFY_SOCKET").and_then(|path| match address(path.as_bytes()) {
            Ok(address) => Some(address),
            Err(error) => {
                eprintln!("kuasard: cannot use NOTIFY_SOCKET={}: {error}", Path::new(&path).display());
                None
            }
        });
        let room = env::var("FDSTORE").ok().filter(|_| address.is_some()).and_then(|room| room.parse().ok());
        Self { address, names, room, ..Self::default() }
    }

    /// What is parked under a name has changed; before, there were so many descriptors.
    pub(super) fn changed(&mut self, name: &str, earlier: usize) {
        if self.address.is_some() {
            // What has not been sent was not stored.
            self.names.entry(name.to_owned()).or_insert(earlier);
        }
    }

    /// Says that calls are answered.
    pub(super) fn ready(&mut self) {
        self.say("READY=1");
    }

    /// Says that the daemon is stopping.
    pub(super) fn stopping(&mut self) {
        self.say("STOPPING=1");
    }

    /// Says that the keeper lives.
    pub(super) fn alive(&mut self) {
        self.say("WATCHDOG=1");
    }

    fn say(&mut self, word: &'static str) {
        // Once is enough of what has not been sent.
        if self.address.is_some() && !self.words.contains(&word) {
            self.words.push_back(word);
        }
    }

    /// What the next keeper is to send.
    pub(super) fn rest(&self) -> &BTreeMap<String, usize> {
        &self.names
    }

    /// When to call [`Self::send`] again.
    pub(super) fn again(&self) -> Option<Instant> {
        [self.again, self.overflow].into_iter().flatten().min()
    }

    /// Sends what systemd takes.
    pub(super) fn send(&mut self, parked: &Parked) {
        self.look_at_room(parked);
        if self.words.is_empty() && self.names.is_empty() || self.again.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.again = match self.send_all(parked) {
            Ok(()) => {
                self.is_lost = false;
                None
            }
            Err(error) => {
                // What came and went meanwhile.
                self.names.retain(|name, count| *count > 0 || parked.contains_key(name));
                let is_full = error.kind() == io::ErrorKind::WouldBlock;
                if !is_full && !std::mem::replace(&mut self.is_lost, true) {
                    eprintln!("kuasard: cannot reach systemd, trying again: {error}");
                }
                Some(Instant::now() + if is_full { AGAIN } else { 20 * AGAIN })
            }
        };
    }

    /// systemd closes what it has no room for and says nothing of it. What it has it takes for the same, so all can be stored once more.
    fn look_at_room(&mut self, parked: &Parked) {
        let Some(room) = self.room else { return };
        let mut count = parked.values().map(Vec::len).sum::<usize>();
        if count > room || self.overflow.is_some() {
            let stored = |(name, descriptors): (&String, &Vec<OwnedFd>)| {
                (0..descriptors.len()).filter(|number| name_of(name, *number).is_some()).count()
            };
            count = parked.iter().map(stored).sum();
        }
        let now = Instant::now();
        match self.overflow {
            None if count <= room => {}
            None => {
                eprintln!(
                    "kuasard: systemd stores {room} descriptors of {count}: containers of the others are reported as exited when this \
                     process ends; raise FileDescriptorStoreMax= of the service"
                );
                self.overflow = Some(now + STORE_AGAIN);
            }
            Some(at) if count > room && at > now => {}
            Some(_) => {
                for name in parked.keys() {
                    self.changed(name, 0);
                }
                self.overflow = (count > room).then(|| now + STORE_AGAIN);
            }
        }
    }

    /// Sends the rest, as far as systemd takes it in time.
    pub(super) fn finish(&mut self, parked: &Parked) {
        let end = Instant::now() + REST;
        loop {
            self.send(parked);
            let Some(again) = self.again.filter(|again| *again < end) else { return };
            sleep(again.saturating_duration_since(Instant::now()));
        }
    }

    fn send_all(&mut self, parked: &Parked) -> io::Result<()> {
        while let Some(word) = self.words.front() {
            self.send_one(word, None)?;
            self.words.pop_front();
        }
        while let Some((name, count)) = self.names.pop_first() {
            let now = parked.get(&name).map_or(&[][..], Vec::as_slice);
            if let Err(error) = self.replace(&name, count, now) {
                // All of it once more: to remove what is not there does nothing, and what was stored by now is removed as well.
                self.names.insert(name, count.max(now.len()));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Stores descriptors under a name, in place of what is stored.
    fn replace(&mut self, name: &str, count: usize, now: &[OwnedFd]) -> io::Result<()> {
        for name in (0..count).filter_map(|number| name_of(name, number)) {
            self.send_one(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)?;
        }
        for (number, descriptor) in now.iter().enumerate() {
            let Some(name) = name_of(name, number) else { continue };
            self.send_one(&format!("FDSTORE=1\nFDNAME={name}"), Some(descriptor.as_fd()))?;
        }
        Ok(())
    }

    fn send_one(&mut self, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let Some(address) = &self.address else { return Ok(()) };
        let socket = match self.socket.take() {
            Some(socket) => socket,
            None => socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?,
        };
        let socket = self.socket.insert(socket);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.as_slice();
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::other("no room for a descriptor"));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::io::retry_on_intr(|| {
            sendmsg_addr(&*socket, address, &[io::IoSlice::new(text.as_bytes())], &mut ancillary, flags)
        })?;
        Ok(())
    }
}

/// A path, or a name that begins with `@` (sd_notify(3)).
fn address(text: &[u8]) -> io::Result<SocketAddrUnix> {
    Ok(match text.strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name)?,
        None => SocketAddrUnix::new(text)?,
    })
}

/// What an earlier keeper has stored, by name. To be called once, while there is one thread.
pub(super) fn stored(notifier: &mut Notifier) -> Parked {
    let mut numbered = BTreeMap::<String, BTreeMap<usize, OwnedFd>>::new();
    for (name, descriptor) in sys::listen_fds() {
        // Others are not ours, as a socket of a unit that somebody has written.
        if let Some((name, number)) = name.rsplit_once('#').and_then(|(name, number)| Some((name, number.parse().ok()?))) {
            numbered.entry(name.to_owned()).or_default().insert(number, descriptor);
        }
    }
    let whole = |(name, descriptors): (String, BTreeMap<usize, OwnedFd>)| {
        // systemd drops what has been closed at its other end: a connection, and not the journal beside it.
        if !descriptors.keys().copied().eq(0..descriptors.len()) {
            notifier.changed(&name, descriptors.keys().last().map_or(0, |last| last + 1));
            return None;
        }
        Some((name, descriptors.into_values().collect()))
    };
    numbered.into_iter().filter_map(whole).collect()
}

/// The name of one of the descriptors that are parked together; `None` for what is not stored: what systemd has no name for; output that
/// goes through no terminal, which its process holds too and of which there is some for each exec; and the configuration, which
/// a restart of the service is to read again.
fn name_of(name: &str, number: usize) -> Option<String> {
    let left_out = name.ends_with("/stdout") || name.ends_with("/stderr") || name == CONFIG;
    Some(format!("{name}#{number}")).filter(|name| !left_out && name.len() <= NAME_LIMIT && !name.contains(':'))
}

/// How often to say that the keeper lives, where systemd wants that.
pub(super) fn watchdog() -> Option<Duration> {
    Some(sd_notify::watchdog_enabled()? / 2)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::net::UnixDatagram};

    use super::*;

    /// What has arrived; each message is whole.
    fn arrived(socket: &UnixDatagram) -> Vec<String> {
        let mut all = Vec::new();
        let mut bytes = [0; 512];
        while let Ok(length) = socket.recv(&mut bytes) {
            all.push(String::from_utf8_lossy(&bytes[..length]).replace('\n', " "));
        }
        all
    }

    #[test]
    fn what_systemd_had_no_room_for_is_stored_once_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_nonblocking(true).unwrap();
        let address = Some(address(path.as_os_str().as_bytes()).unwrap());
        let mut notifier = Notifier { address, room: Some(2), ..Notifier::default() };
        let mut parked = Parked::new();
        let mut park = |notifier: &mut Notifier, name: &str| {
            parked.insert(name.to_owned(), vec![File::open("/dev/null").unwrap().into()]);
            notifier.changed(name, 0);
            notifier.send(&parked);
        };
        park(&mut notifier, "a");
        park(&mut notifier, "b");
        // It is not stored.
        park(&mut notifier, "c/stdout");
        assert_eq!(notifier.again(), None);
        park(&mut notifier, "d");
        assert!(notifier.again().is_some());
        assert_eq!(arrived(&systemd), ["FDSTORE=1 FDNAME=a#0", "FDSTORE=1 FDNAME=b#0", "FDSTORE=1 FDNAME=d#0"]);
        notifier.send(&parked);
        assert!(arrived(&systemd).is_empty());
        // The unit may have been given more.
        notifier.overflow = Some(Instant::now());
        notifier.send(&parked);
        assert_eq!(arrived(&systemd), ["FDSTORE=1 FDNAME=a#0", "FDSTORE=1 FDNAME=b#0", "FDSTORE=1 FDNAME=d#0"]);
        assert!(notifier.again().is_some());
        parked.remove("a");
        notifier.changed("a", 1);
        notifier.send(&parked);
        assert_eq!(arrived(&systemd), ["FDSTOREREMOVE=1 FDNAME=a#0", "FDSTORE=1 FDNAME=b#0", "FDSTORE=1 FDNAME=d#0"]);
        assert_eq!(notifier.again(), None);
    }

    #[test]
    fn what_systemd_does_not_take_is_sent_later_and_nobody_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_nonblocking(true).unwrap();
        let address = Some(address(path.as_os_str().as_bytes()).unwrap());
        let mut notifier = Notifier { address, ..Notifier::default() };
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mut parked = Parked::new();
        // More than its queue holds (net.unix.max_dgram_qlen), a thousand times over; it does not read at all.
        for number in 0..2000 {
            let name = format!("task.sock/{number}");
            parked.insert(name.clone(), vec![null(), null()]);
            notifier.changed(&name, 0);
            notifier.send(&parked);
            parked.remove(&name);
            notifier.changed(&name, 2);
            notifier.send(&parked);
        }
        parked.insert("task.sock/1".into(), vec![null(), null()]);
        notifier.changed("task.sock/1", 0);
        notifier.ready();
        notifier.alive();
        notifier.alive();
        assert!(notifier.again().is_some());
        let mut all = arrived(&systemd);
        while notifier.again().is_some() {
            notifier.again = None;
            notifier.send(&parked);
            all.extend(arrived(&systemd));
        }
        let mut stored = std::collections::BTreeSet::new();
        for message in &all {
            match message.split_once(" FDNAME=") {
                Some(("FDSTORE=1", name)) => drop(stored.insert(name)),
                Some(("FDSTOREREMOVE=1", name)) => drop(stored.remove(name)),
                _ => {}
            }
        }
        assert_eq!(Vec::from_iter(stored), ["task.sock/1#0", "task.sock/1#1"]);
        let count = |word: &str| all.iter().filter(|message| *message == word).count();
        assert_eq!((count("READY=1"), count("WATCHDOG=1")), (1, 1));
        // The other end goes away, and comes back.
        drop(systemd);
        notifier.stopping();
        notifier.send(&parked);
        std::fs::remove_file(&path).unwrap();
        let systemd = UnixDatagram::bind(&path).unwrap();
        systemd.set_nonblocking(true).unwrap();
        notifier.finish(&parked);
        assert_eq!(arrived(&systemd), ["STOPPING=1"]);
    }
}
