//! Who comes to the agents' socket.
//!
//! A peer is of this user, or is refused. One that says what cannot be understood is told so; one that sends lines without an end, does
//! not read, or is one too many, is let go. None of that takes anything from another.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::path::PathBuf;
use std::process;
use std::time::Duration;

use anyhow::Context as _;
use fdpass::Deadline;
use fdpass::Line;
use fdpass::LineListener;
use fdpass::Lines;
use tracing::debug;
use tracing::info;
use tracing::warn;
use vmm::machines;

use crate::daemon::Daemon;
use crate::entry::Keeping;
use crate::protocol::Command;
use crate::protocol::Event;
use crate::protocol::VERSION;
use crate::replace;

/// The socket, in the directory of this user's machines. No machine's is called so.
const SOCKET: &str = "luo-agent.socket";
/// Peers at a time.
const MAX_PEERS: usize = 256;

/// Where agents come, in a directory of machines.
#[must_use]
pub fn socket(directory: &Path) -> PathBuf {
    directory.join(SOCKET)
}

/// A peer.
#[derive(Debug)]
struct Peer {
    lines: Lines,
    /// Machines of which it wants to know when they are kept.
    waits_for: Vec<String>,
}

/// The peers, and where new ones come.
#[derive(Debug)]
pub(crate) struct Agents {
    listener: LineListener,
    peers: Vec<Peer>,
}

impl Agents {
    /// Listens, if no other daemon does.
    pub(crate) fn bind(directory: &Path) -> anyhow::Result<Self> {
        let path = socket(directory);
        let listener = LineListener::bind(&path)
            .with_context(|| format!("is there a tideoverd already? cannot listen at {}", path.display()))?;
        Ok(Self { listener, peers: Vec::new() })
    }

    /// Listens in another one's place.
    pub(crate) fn adopt(directory: &Path, listener: OwnedFd) -> anyhow::Result<Self> {
        let mut listener = LineListener::adopt(listener, &socket(directory))?;
        listener.own();
        Ok(Self { listener, peers: Vec::new() })
    }

    /// What rings: new peers first.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.listener.as_fd()].into_iter().chain(self.peers.iter().map(|peer| peer.lines.as_fd()))
    }

    pub(crate) fn count(&self) -> usize {
        self.peers.len()
    }

    /// When to try again to send what a peer has not read yet.
    pub(crate) fn due(&self) -> Option<Deadline> {
        let slow = self.peers.iter().any(|peer| peer.lines.has_unsent());
        slow.then(|| Deadline::after(Duration::from_millis(50)))
    }

    /// Hears who rang. Says whether this daemon was replaced.
    pub(crate) fn hear(&mut self, place: usize, daemon: &mut Daemon) -> bool {
        let Some(place) = place.checked_sub(1) else {
            self.accept();
            return false;
        };
        let Some(peer) = self.peers.get_mut(place) else { return false };
        let lines = match peer.lines.receive() {
            Ok(lines) => lines,
            Err(error) => {
                debug!(%error, "a peer is gone");
                self.peers.remove(place);
                return false;
            }
        };
        for line in lines {
            match self.obey(place, &line, daemon) {
                Ok(false) => {}
                Ok(true) => return true,
                Err(error) => {
                    debug!(error = &*error, "a peer is let go");
                    self.peers.remove(place);
                    return false;
                }
            }
        }
        false
    }

    fn accept(&mut self) {
        match self.listener.accept(Deadline::after(Duration::ZERO)) {
            Ok(lines) => match lines.require_same_user() {
                Ok(_) if self.peers.len() < MAX_PEERS => {
                    self.peers.push(Peer { lines, waits_for: Vec::new() });
                }
                Ok(peer) => warn!(pid = peer.pid, "there are too many peers: one is refused"),
                Err(error) => warn!(%error, "a peer is refused"),
            },
            Err(error) => debug!(%error, "a peer did not stay"),
        }
    }

    /// Does what a line asks for. Says whether this daemon was replaced.
    fn obey(&mut self, place: usize, line: &Line, daemon: &mut Daemon) -> anyhow::Result<bool> {
        let peer = &mut self.peers[place];
        let command = match serde_json::from_slice(&line.bytes) {
            Ok(command) => command,
            Err(error) => {
                let why = format!("not understood: {error}");
                return tell(&mut peer.lines, &Event::Error { why }).map(|()| false);
            }
        };
        match command {
            Command::Status => tell(&mut peer.lines, &status(daemon))?,
            Command::Keep { id } => match machines::check_name(&id) {
                Ok(()) => {
                    daemon.look_for(&id);
                    peer.waits_for.push(id);
                }
                Err(error) => tell(&mut peer.lines, &Event::Error { why: format!("{error:#}") })?,
            },
            Command::Handover { version: VERSION } => {
                info!("another tideoverd takes over");
                if replace::hand_over(&mut peer.lines, daemon, &self.listener)? {
                    return Ok(true);
                }
                warn!("the other tideoverd did not take over; this one goes on");
            }
            Command::Handover { version } => {
                let why = format!("this tideoverd speaks version {VERSION}, not {version}");
                tell(&mut peer.lines, &Event::Error { why })?;
            }
            Command::Taken => {
                tell(&mut peer.lines, &Event::Error { why: "nothing was handed over".to_owned() })?;
            }
        }
        Ok(false)
    }

    /// Tells those who wait for a machine to be kept, and sends what was not read.
    pub(crate) fn tell_kept(&mut self, daemon: &Daemon) {
        let is_kept =
            |name: &String| daemon.entries.get(name).is_some_and(|entry| entry.keeping() == Keeping::Kept);
        self.peers.retain_mut(|peer| {
            let (kept, waits_for) = std::mem::take(&mut peer.waits_for).into_iter().partition(is_kept);
            peer.waits_for = waits_for;
            let told = Vec::into_iter(kept).try_for_each(|id| tell(&mut peer.lines, &Event::Kept { id }));
            told.is_ok() && peer.lines.flush().is_ok()
        });
    }

    /// Another daemon has the socket from now on.
    pub(crate) fn leave(self) {
        self.listener.leave();
    }
}

pub(crate) fn tell(lines: &mut Lines, event: &Event) -> anyhow::Result<()> {
    Ok(lines.send(&serde_json::to_vec(event)?, Vec::new())?)
}

fn status(daemon: &Daemon) -> Event {
    let names = |keeping| {
        let these = daemon.entries.values().filter(move |entry| entry.keeping() == keeping);
        these.map(|entry| entry.name.clone()).collect()
    };
    Event::Status {
        version: VERSION,
        pid: process::id(),
        kept: names(Keeping::Kept),
        alone: names(Keeping::Alone),
        deaths: daemon.counts.deaths,
    }
}
