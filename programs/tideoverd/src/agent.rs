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
use anyhow::bail;
use anyhow::ensure;
use fdpass::Deadline;
use fdpass::Line;
use fdpass::LineListener;
use fdpass::Lines;
use fdpass::MAX_LINE_BYTES;
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
use crate::sessions::Kernel;
use crate::sessions::Orchestrator as _;
use crate::sessions::Out;
use crate::sessions::PeerId;
use crate::sessions::Sessions;

/// The socket, in the directory of this user's machines. No machine's is called so.
const SOCKET: &str = "luo-agent.socket";
/// Peers at a time.
pub(crate) const MAX_PEERS: usize = 256;

/// Bytes of a line that names may take: the rest of a status is a fraction of what is left.
const NAMES: usize = MAX_LINE_BYTES - 1024;

/// Where agents come, in a directory of machines.
#[must_use]
pub fn socket(directory: &Path) -> PathBuf {
    directory.join(SOCKET)
}

/// A peer.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    pub(crate) lines: Lines,
    /// Machines of which it wants to know when they are kept.
    waits_for: Vec<String>,
}

/// The peers, and where new ones come.
#[derive(Debug)]
pub(crate) struct Agents {
    pub(crate) listener: LineListener,
    pub(crate) peers: Vec<Peer>,
    pub(crate) sessions: Sessions<Kernel>,
    next_id: PeerId,
}

impl Agents {
    /// Listens, if no other daemon does.
    pub(crate) fn bind(directory: &Path) -> anyhow::Result<Self> {
        let path = socket(directory);
        let listener = LineListener::bind(&path)
            .with_context(|| format!("is there a tideoverd already? cannot listen at {}", path.display()))?;
        Ok(Self::new(listener, Kernel::default()))
    }

    /// Listens in another one's place.
    pub(crate) fn adopt(directory: &Path, listener: OwnedFd, kernel: Kernel) -> anyhow::Result<Self> {
        let mut listener = LineListener::adopt(listener, &socket(directory))?;
        listener.own();
        Ok(Self::new(listener, kernel))
    }

    fn new(listener: LineListener, kernel: Kernel) -> Self {
        Self { listener, peers: Vec::new(), sessions: Sessions::new(kernel), next_id: 0 }
    }

    /// What rings: new peers first.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.listener.as_fd()].into_iter().chain(self.peers.iter().map(|peer| peer.lines.as_fd()))
    }

    pub(crate) fn count(&self) -> usize {
        self.peers.len()
    }

    /// When to try again to send what a peer has not read yet, or to tell an operator who is not ready.
    pub(crate) fn due(&self) -> Option<Deadline> {
        let slow = self.peers.iter().any(|peer| peer.lines.has_unsent());
        let slow = slow.then(|| Deadline::after(Duration::from_millis(50)));
        slow.or_else(|| self.sessions.due())
    }

    /// Hears who rang. Says whether this daemon was replaced.
    pub(crate) fn hear(&mut self, place: usize, daemon: &mut Daemon) -> bool {
        let Some(place) = place.checked_sub(1) else {
            self.accept();
            return false;
        };
        // One before it may be gone since it rang: then its place is another's, which has nothing to say or is heard now.
        let Some(peer) = self.peers.get_mut(place) else { return false };
        let id = peer.id;
        let lines = match peer.lines.receive() {
            Ok(lines) => lines,
            Err(error) => {
                debug!(%error, "a peer is gone");
                self.let_go(id);
                return false;
            }
        };
        for line in lines {
            match self.obey(id, &line, daemon) {
                Ok(After::GoOn) => {}
                Ok(After::Replaced) => return true,
                Err(error) => {
                    let why = format!("{error:#}");
                    debug!(why, "a peer is refused something");
                    self.tell(vec![(id, Event::Error { why }, Vec::new())]);
                }
            }
        }
        false
    }

    fn accept(&mut self) {
        match self.listener.accept(Deadline::after(Duration::ZERO)) {
            Ok(lines) => match lines.require_same_user() {
                Ok(_) if self.peers.len() < MAX_PEERS => {
                    self.add(lines);
                }
                Ok(peer) => warn!(pid = peer.pid, "there are too many peers: one is refused"),
                Err(error) => warn!(%error, "a peer is refused"),
            },
            Err(error) => debug!(%error, "a peer did not stay"),
        }
    }

    pub(crate) fn add(&mut self, lines: Lines) -> PeerId {
        self.next_id += 1;
        self.peers.push(Peer { id: self.next_id, lines, waits_for: Vec::new() });
        self.next_id
    }

    fn let_go(&mut self, id: PeerId) {
        self.peers.retain(|peer| peer.id != id);
        let outs = self.sessions.gone(id);
        self.tell(outs);
    }

    /// Tells peers. One that cannot be told is let go, which others may have to be told.
    fn tell(&mut self, outs: Vec<Out>) {
        let mut gone = Vec::new();
        for (id, event, fds) in outs {
            let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) else { continue };
            if let Err(error) = tell(&mut peer.lines, &event, fds) {
                debug!(error = &*error, "a peer is let go");
                gone.push(id);
            }
        }
        gone.into_iter().for_each(|id| self.let_go(id));
    }

    /// Does what a line asks for.
    ///
    /// # Errors
    /// What the peer is to be told.
    fn obey(&mut self, id: PeerId, line: &Line, daemon: &mut Daemon) -> anyhow::Result<After> {
        let command = serde_json::from_slice(&line.bytes).context("not understood")?;
        let outs = match command {
            Command::Subscribe { id: name } => self.sessions.subscribe(id, name)?,
            Command::Ready => self.sessions.ready(id)?,
            Command::Claim { id: name } => self.sessions.claim(id, name)?,
            Command::Done { id: name } => {
                self.sessions.done(&name);
                Vec::new()
            }
            Command::Preserve { timeout_ms } => {
                self.sessions.preserve(id, Duration::from_millis(timeout_ms))?
            }
            Command::Release => self.sessions.release(id),
            Command::Device => vec![(id, Event::Device, vec![self.sessions.kernel.device()?])],
            Command::Status => vec![(id, self.status(daemon), Vec::new())],
            Command::Keep { id: name } => {
                machines::check_name(&name)?;
                daemon.look_for(&name);
                let peer = self.peers.iter_mut().find(|peer| peer.id == id);
                peer.context("it is gone")?.waits_for.push(name);
                Vec::new()
            }
            Command::Handover { version } => return self.hand_over(id, version, daemon),
            Command::Taken => bail!("nothing was handed over"),
        };
        self.tell(outs);
        Ok(After::GoOn)
    }

    fn hand_over(&mut self, id: PeerId, version: u32, daemon: &Daemon) -> anyhow::Result<After> {
        ensure!(version == VERSION, "this tideoverd speaks version {VERSION}, not {version}");
        ensure!(!self.sessions.is_busy(), "everything is preserved for an update: not now");
        let starting = daemon.entries.values().find(|entry| entry.is_starting());
        ensure!(starting.is_none(), "a machine is about to be held: not now");
        let at = self.peers.iter().position(|peer| peer.id == id).context("it is gone")?;
        let mut peer = self.peers.remove(at);
        info!("another tideoverd takes over");
        match replace::hand_over(&mut peer.lines, daemon, self) {
            Ok(true) => return Ok(After::Replaced),
            Ok(false) => warn!("the other tideoverd did not take over; this one goes on"),
            Err(error) => warn!(error = &*error, "the other tideoverd did not take over; this one goes on"),
        }
        self.let_go(id);
        Ok(After::GoOn)
    }

    /// Tells those who wait for a machine to be kept, or for agents to be ready, and sends what was not read.
    pub(crate) fn act(&mut self, daemon: &Daemon) {
        let is_kept =
            |name: &String| daemon.entries.get(name).is_some_and(|entry| entry.keeping() == Keeping::Kept);
        let mut outs = self.sessions.act().unwrap_or_default();
        let mut gone = Vec::new();
        for peer in &mut self.peers {
            let (kept, waits_for) = std::mem::take(&mut peer.waits_for).into_iter().partition(is_kept);
            peer.waits_for = waits_for;
            outs.extend(Vec::into_iter(kept).map(|id| (peer.id, Event::Kept { id }, Vec::new())));
            if peer.lines.flush().is_err() {
                gone.push(peer.id);
            }
        }
        gone.into_iter().for_each(|id| self.let_go(id));
        self.tell(outs);
    }

    /// Another daemon has the socket from now on.
    pub(crate) fn leave(self) {
        self.listener.leave();
    }

    fn status(&self, daemon: &Daemon) -> Event {
        let mut room = NAMES;
        let mut names = |keeping| {
            let these = daemon.entries.values().filter(move |entry| entry.keeping() == keeping);
            fitting(these.map(|entry| entry.name.as_str()), &mut room)
        };
        // Those that need somebody first.
        let (alone, more_alone) = names(Keeping::Alone);
        let (kept, more_kept) = names(Keeping::Kept);
        Event::Status {
            version: VERSION,
            pid: process::id(),
            kept,
            alone,
            more: more_alone + more_kept,
            deaths: daemon.counts.deaths,
            agents: self.sessions.subscribers(),
        }
    }
}

/// The names for which there is room in a line, which gets less by them, and how many others there are.
fn fitting<'a>(names: impl Iterator<Item = &'a str>, room: &mut usize) -> (Vec<String>, usize) {
    let (mut fit, mut more) = (Vec::new(), 0);
    for name in names {
        // With its quotes and the comma: no letter of a name is written otherwise in JSON.
        match room.checked_sub(name.len() + 3) {
            Some(left) => {
                *room = left;
                fit.push(name.to_owned());
            }
            None => more += 1,
        }
    }
    (fit, more)
}

/// What follows a command.
enum After {
    GoOn,
    Replaced,
}

pub(crate) fn tell(lines: &mut Lines, event: &Event, fds: Vec<OwnedFd>) -> anyhow::Result<()> {
    Ok(lines.send(&serde_json::to_vec(event)?, fds)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_of_any_number_of_machines_fits_into_a_line() {
        let names: Vec<String> = (0..5000).map(|number| format!("{number:0>63}")).collect();
        let mut room = NAMES;
        let (alone, more_alone) = fitting(names[..700].iter().map(String::as_str), &mut room);
        let (kept, more_kept) = fitting(names[700..].iter().map(String::as_str), &mut room);
        assert_eq!((alone.len(), more_alone), (700, 0));
        assert_eq!(kept.len() + more_kept, 4300);
        assert!(kept.len() > 200 && more_kept > 0);
        let (pid, deaths, agents) = (u32::MAX, u64::MAX, usize::MAX);
        let more = more_alone + more_kept;
        let status = Event::Status { version: VERSION, pid, kept, alone, more, deaths, agents };
        assert!(serde_json::to_vec(&status).unwrap().len() <= MAX_LINE_BYTES);
    }
}
