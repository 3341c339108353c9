//! The worker's end of the socket to the keeper.

use std::{
    collections::BTreeMap,
    env, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::parent_id,
    },
    path::Path,
    sync::Arc,
};

use kuasar_sandboxers::{
    fdstore::{FdStore, Holder},
    reaper::{Ended, Reaper},
};
use nix::sys::{
    prctl,
    signal::{SigSet, Signal},
};
use rustix::net::{RecvFlags, SendFlags};
use tokio::{io::Interest, sync::mpsc::UnboundedSender};

use super::wire::{self, Message, Outcome};
use crate::sys;

/// The environment variable that makes `kuasard` a worker: the number of the socket's descriptor.
pub const VARIABLE: &str = "KUASAR_KEEPER";

/// The keeper, as the worker sees it. Clones share the socket.
#[derive(Clone, Debug)]
pub struct Keeper(Arc<OwnedFd>);

/// What is parked under a name.
#[derive(Debug)]
pub struct Parked {
    /// The name.
    pub name: String,
    /// In the order in which they were parked.
    pub descriptors: Vec<OwnedFd>,
}

/// How the names of what sandboxes leave with the keeper begin.
const HELD: &str = "held/";

/// What the keeper hands to a new worker.
#[derive(Debug)]
pub struct Inheritance {
    /// The keeper.
    pub keeper: Keeper,
    /// What workers before this one have parked, by name.
    pub parked: BTreeMap<String, Vec<OwnedFd>>,
    /// Processes that have ended.
    pub exits: Vec<Ended>,
    /// Whether this is the worker of a new program, which is to be replaced by one of the old if it does not get ready.
    pub upgrade: bool,
    /// What became of the last upgrade.
    pub upgraded: Option<Outcome>,
}

/// Whether a keeper has started this process.
#[must_use]
pub fn is_worker() -> bool {
    env::var_os(VARIABLE).is_some()
}

/// What the keeper tells a new worker; returns when all is told.
///
/// To be called once, while there is one thread.
///
/// # Errors
/// When the variable is not what a keeper sets, or the keeper is gone.
pub fn inherit() -> io::Result<Inheritance> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, format!("{VARIABLE} is for kuasard's own use: unset it"));
    let number = env::var(VARIABLE).ok().and_then(|number| number.parse().ok()).ok_or_else(invalid)?;
    let socket = sys::take_inherited(VARIABLE, number).map_err(|_| invalid())?;
    // The keeper blocks the signals it reads, and a child inherits that.
    SigSet::all().thread_unblock()?;
    // Its successor's worker takes over what there is; two at the same work would spoil it. A keeper that is gone already shows below.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let keeper = Keeper(Arc::new(socket));
    // Whatever link to the program it was started by.
    prctl::set_name(c"kuasard")?;
    let (mut parked, mut exits, mut upgrade, mut upgraded) = (BTreeMap::new(), Vec::new(), false, None);
    loop {
        match wire::receive(&*keeper.0, RecvFlags::empty())? {
            Some((Message::Park(name), descriptors)) => drop(parked.insert(name, descriptors)),
            Some((Message::Exit(ended), _)) => exits.push(ended),
            Some((Message::Upgrade { .. }, _)) => upgrade = true,
            Some((Message::Upgraded(outcome), _)) => upgraded = Some(outcome),
            Some((Message::Complete, _)) => return Ok(Inheritance { keeper, parked, exits, upgrade, upgraded }),
            Some(_) => {}
            None => return Err(gone()),
        }
    }
}

impl Inheritance {
    /// What sandboxes have left with the keeper, taken out of what is parked.
    #[must_use]
    pub fn fd_store(&mut self) -> FdStore {
        let parked = std::mem::take(&mut self.parked).into_iter();
        let (held, others): (Vec<_>, Vec<_>) = parked.partition(|(name, _)| name.starts_with(HELD));
        self.parked = others.into_iter().collect();
        let held = held.into_iter().filter_map(|(name, descriptors)| Some((name.strip_prefix(HELD)?.to_owned(), descriptors)));
        FdStore::new(self.keeper.clone(), held.collect())
    }
}

impl Holder for Keeper {
    fn hold(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.park(&format!("{HELD}{name}"), descriptors)
    }

    fn release(&self, name: &str) -> io::Result<()> {
        self.drop_parked(&format!("{HELD}{name}"))
    }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the keeper is gone")
}

impl Keeper {
    /// Whoever is at the other end of `socket`.
    #[cfg(test)]
    pub(crate) fn at(socket: OwnedFd) -> Self {
        Self(Arc::new(socket))
    }

    /// Its pid.
    #[must_use]
    pub fn pid() -> u32 {
        parent_id()
    }

    /// Leaves copies of descriptors with the keeper under a name, in place of what was.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn park(&self, name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.tell(&Message::Park(name.to_owned()), descriptors)
    }

    /// Lets the keeper close what is parked under a name.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn drop_parked(&self, name: &str) -> io::Result<()> {
        self.tell(&Message::Drop(name.to_owned()), &[])
    }

    /// Lets the keeper accept on the listening socket parked under a name.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn accept(&self, name: &str) -> io::Result<()> {
        self.tell(&Message::Accept(name.to_owned()), &[])
    }

    /// Says that calls are answered from now on.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn ready(&self) -> io::Result<()> {
        self.tell(&Message::Ready, &[])
    }

    /// Asks to be replaced by a program once this worker has left.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn upgrade(&self, id: &str, binary: &Path) -> io::Result<()> {
        self.tell(&Message::Upgrade { id: id.to_owned(), binary: binary.to_owned() }, &[])
    }

    /// Says why this worker is about to end instead of getting ready.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn failed(&self, why: &str) -> io::Result<()> {
        self.tell(&Message::failed(why), &[])
    }

    /// Says that the worker still works.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn alive(&self) -> io::Result<()> {
        self.tell(&Message::Alive, &[])
    }

    fn tell(&self, message: &Message, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        // Waits when the keeper is behind, which it is for microseconds.
        wire::send(&*self.0, message, descriptors, SendFlags::empty())
    }

    /// Passes on what the keeper tells, until it is gone.
    ///
    /// # Errors
    /// Always: why it cannot be heard any more.
    pub async fn listen(
        &self,
        reaper: &Reaper,
        connections: &UnboundedSender<Parked>,
        upgraded: impl Fn(Outcome),
    ) -> io::Error {
        let heard = async {
            let socket = sys::watch(self.0.as_fd().try_clone_to_owned()?, Interest::READABLE)?;
            loop {
                let received = socket.async_io(Interest::READABLE, |socket| wire::receive(socket, RecvFlags::DONTWAIT)).await;
                match received? {
                    // Nobody takes connections any more: the daemon is stopping.
                    Some((Message::Park(name), descriptors)) => drop(connections.send(Parked { name, descriptors })),
                    Some((Message::Exit(ended), _)) => reaper.hear(ended),
                    Some((Message::Upgraded(outcome), _)) => upgraded(outcome),
                    Some(_) => {}
                    None => return Err::<(), _>(gone()),
                }
            }
        };
        heard.await.err().unwrap_or_else(gone)
    }
}
