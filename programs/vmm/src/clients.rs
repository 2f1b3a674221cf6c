//! Who asks the VMM for things: the connections that it has, and where new ones come.
//!
//! All of them go with the machine to the next VMM, so that nobody needs to notice an update.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use fdpass::BindError;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::Listener;
use fdpass::MAX_MESSAGE_BYTES;
use fdpass::ReceiveError;
use machine::FdName;
use machine::Fds;
use serde::Deserialize;
use serde::Serialize;
use tracing::debug;
use tracing::warn;

use crate::control;
use crate::control::Answer;
use crate::control::Request;

/// Where new connections come.
const LISTENER: FdName = FdName::literal("listener");
/// Connections that one VMM has at a time. More wait to be accepted.
const MAX_CLIENTS: usize = 256;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// It asks, and is answered.
    Asks,
    /// It asked to be told of the guest's end.
    Waits,
    /// It keeps the machine against the end of this process.
    Keeps,
}

#[derive(Debug)]
struct Client {
    channel: Channel,
    mode: Mode,
}

/// A connection among the others, until one of them closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClientId(usize);

/// What came.
#[derive(Debug)]
pub(crate) enum Came {
    /// A request, and the descriptor that came with it.
    Request(ClientId, Request, Option<OwnedFd>),
    /// The guest has ended.
    Bell,
    /// Nobody is left who could ask, and nobody can come.
    Nobody,
}

/// The connections of one VMM.
#[derive(Debug)]
pub(crate) struct Clients {
    listener: Option<Listener>,
    list: Vec<Client>,
    /// Where to look first.
    next: usize,
}

impl Clients {
    /// Who makes a machine.
    pub(crate) const MAKER: ClientId = ClientId(0);

    /// Those of a new machine: the one that made it, and whoever comes to `socket`. Gives the maker back if nobody can
    /// come there.
    pub(crate) fn first(maker: Channel, socket: Option<&Path>) -> Result<Self, (BindError, Channel)> {
        match socket.map(Listener::bind).transpose() {
            Ok(listener) => {
                Ok(Self { listener, list: vec![Client { channel: maker, mode: Mode::Asks }], next: 0 })
            }
            Err(error) => Err((error, maker)),
        }
    }

    /// Those that came with a machine.
    pub(crate) fn adopt(fds: &mut Fds, modes: &[Mode], socket: Option<&Path>) -> anyhow::Result<Self> {
        let listener = match socket {
            Some(path) => {
                let fd = fds.take(LISTENER).context("no control socket came with the machine")?;
                Some(Listener::adopt(fd, path)?)
            }
            None => None,
        };
        let mut list = Vec::new();
        for (index, mode) in modes.iter().enumerate() {
            let fd = fds.take(name(index)).with_context(|| format!("{} did not come", name(index)))?;
            list.push(Client { channel: Channel::from_fd(fd)?, mode: *mode });
        }
        Ok(Self { listener, list, next: 0 })
    }

    /// What goes with the machine.
    pub(crate) fn fds(&self) -> Vec<(FdName, BorrowedFd<'_>)> {
        let listener = self.listener.iter().map(|listener| (LISTENER, listener.as_fd()));
        let list = self.list.iter().enumerate();
        listener.chain(list.map(|(index, client)| (name(index), client.channel.as_fd()))).collect()
    }

    /// What each connection is for, in the order of [`fds`](Self::fds).
    pub(crate) fn modes(&self) -> Vec<Mode> {
        self.list.iter().map(|client| client.mode).collect()
    }

    /// The machine is this process's: its control socket goes with it.
    pub(crate) fn own(&mut self) {
        if let Some(listener) = &mut self.listener {
            listener.own();
        }
    }

    /// The machine is another process's: its control socket stays where it is.
    pub(crate) fn leave(&mut self) {
        if let Some(listener) = self.listener.take() {
            listener.leave();
        }
    }

    /// Waits for whatever comes first. `bell` is what rings when the guest ends; `None` once it was heard.
    pub(crate) fn wait(&mut self, bell: Option<BorrowedFd<'_>>) -> anyhow::Result<Came> {
        loop {
            if self.listener.is_none() && self.list.is_empty() {
                return Ok(Came::Nobody);
            }
            let may_come = self.listener.as_ref().filter(|_| self.list.len() < MAX_CLIENTS);
            let mut fds: Vec<BorrowedFd<'_>> =
                self.list.iter().map(|client| client.channel.as_fd()).collect();
            fds.extend(bell);
            fds.extend(may_come.map(AsFd::as_fd));
            let clients = self.list.len();
            let ready = fdpass::ready(&fds, Deadline::never()).context("cannot wait for requests")?;
            if bell.is_some() && ready.contains(&clients) {
                return Ok(Came::Bell);
            }
            // One after another: a client that asks all the time does not keep the others waiting.
            let next = ready.iter().find(|place| **place >= self.next).or(ready.first());
            let Some(place) = next.copied() else { continue };
            self.next = place + 1;
            if place >= clients {
                self.accept();
            } else if let Some(came) = self.hear(place) {
                return Ok(came);
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match listener.accept(Deadline::after(Duration::ZERO)) {
            Ok(channel) => match channel.require_same_user() {
                Ok(_) => self.list.push(Client { channel, mode: Mode::Asks }),
                Err(error) => warn!(%error, "a client is not to be trusted"),
            },
            Err(error) => debug!(%error, "a client did not stay"),
        }
    }

    /// What a connection has to say; `None` if that is nothing that concerns anybody else.
    fn hear(&mut self, place: usize) -> Option<Came> {
        let client = &self.list[place];
        let message = match client.channel.receive(MAX_MESSAGE_BYTES, 1, Deadline::after(Duration::ZERO)) {
            Ok(message) => message,
            Err(ReceiveError::TimedOut) => return None,
            Err(error @ (ReceiveError::TooLong { .. } | ReceiveError::TooManyFds { .. })) => {
                self.tell(ClientId(place), &Answer::Error(format!("not a request: {error}")));
                return None;
            }
            Err(error) => {
                debug!(%error, "a client has left");
                self.list.remove(place);
                return None;
            }
        };
        match serde_json::from_slice::<Request>(&message.bytes) {
            Ok(request) => Some(Came::Request(ClientId(place), request, message.fds.into_iter().next())),
            Err(error) => {
                self.tell(ClientId(place), &Answer::Error(format!("not a request: {error}")));
                None
            }
        }
    }

    /// Whoever asked may be gone: that ends the next wait for a request.
    pub(crate) fn tell(&self, client: ClientId, answer: &Answer) {
        let Some(client) = self.list.get(client.0) else { return };
        if let Err(error) = control::send(&client.channel, answer) {
            debug!(%error, "nobody hears the answer");
        }
    }

    /// The same, with descriptors.
    pub(crate) fn tell_with(&self, client: ClientId, answer: &Answer, fds: &[BorrowedFd<'_>]) {
        let Some(client) = self.list.get(client.0) else { return };
        if let Err(error) = control::send_with(&client.channel, answer, fds) {
            debug!(%error, "nobody hears the answer");
        }
    }

    /// Those of a machine to whom nobody is connected yet.
    pub(crate) fn fresh(socket: Option<&Path>) -> anyhow::Result<Self> {
        Ok(Self { listener: socket.map(Listener::bind).transpose()?, list: Vec::new(), next: 0 })
    }

    /// Takes a connection in.
    pub(crate) fn put(&mut self, channel: Channel) {
        self.list.push(Client { channel, mode: Mode::Asks });
    }

    /// Gives a connection away, which is no more among these.
    pub(crate) fn take(&mut self, client: ClientId) -> Option<Channel> {
        (client.0 < self.list.len()).then(|| self.list.remove(client.0).channel)
    }

    /// The process at the other end, as it was when it connected.
    pub(crate) fn process(&self, client: ClientId) -> Option<u32> {
        let peer = self.list.get(client.0)?.channel.peer().ok()?;
        Some(peer.pid)
    }

    /// Changes what a connection is for.
    pub(crate) fn set_mode(&mut self, client: ClientId, mode: Mode) {
        if let Some(client) = self.list.get_mut(client.0) {
            client.mode = mode;
        }
    }

    /// Those that keep the machine.
    pub(crate) fn keepers(&self) -> impl Iterator<Item = &Channel> {
        self.list.iter().filter(|client| client.mode == Mode::Keeps).map(|client| &client.channel)
    }

    /// Ends the connections of all that keep the machine: they ask again. They stay in the list until that is heard, so that nobody's
    /// place changes.
    pub(crate) fn let_go_of_keepers(&mut self) {
        for client in self.list.iter_mut().filter(|client| client.mode == Mode::Keeps) {
            client.mode = Mode::Asks;
            client.channel.shut_down();
        }
    }

    /// Tells all that wait for the guest's end, and who keeps the machine for nothing from then on.
    pub(crate) fn tell_waiting(&self, answer: &Answer) {
        for client in self.list.iter().filter(|client| client.mode != Mode::Asks) {
            // It is gone, or will hear it.
            let _ = control::send(&client.channel, answer);
        }
    }
}

fn name(index: usize) -> FdName {
    // At most 256 of them: it fits.
    FdName::new(format!("client{index}").as_bytes()).unwrap_or(LISTENER)
}
