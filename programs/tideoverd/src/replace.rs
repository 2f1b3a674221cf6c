//! One tideoverd takes over from another: while that goes on, neither does anything else, so no machine is held twice.
//!
//! What VMMs and holders have, the new one could ask for by itself; what the old one alone has, it could not. So it gets all. The old
//! one goes on if the new one does not say that it has it.

use std::os::fd::AsFd as _;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Deadline;
use fdpass::Line;
use fdpass::Lines;
use thiserror::Error;
use tracing::debug;
use tracing::info;
use vmm::machines;

use crate::agent;
use crate::agent::Agents;
use crate::agent::tell;
use crate::daemon::Daemon;
use crate::entry::Entry;
use crate::protocol::Command;
use crate::protocol::Event;
use crate::protocol::VERSION;
use crate::remains::Remains;
use crate::sessions::Kernel;

/// Gives another daemon all that is here. Says whether it has taken it.
pub(crate) fn hand_over(lines: &mut Lines, daemon: &Daemon, agents: &Agents) -> anyhow::Result<bool> {
    let until = Deadline::after(Daemon::patience());
    let mut give = |event: Event, fds: Vec<OwnedFd>| -> anyhow::Result<()> {
        tell(lines, &event, fds)?;
        Ok(lines.await_sent(until)?)
    };
    for entry in daemon.entries.values() {
        let Some(remains) = entry.remains() else { continue };
        let about = Box::new(remains.about.clone());
        give(Event::Machine { id: entry.name.clone(), about }, remains.copies()?)?;
    }
    if let Some(device) = agents.sessions.kernel.opened() {
        give(Event::Device, vec![device.as_fd().try_clone_to_owned()?])?;
    }
    for (id, session) in agents.sessions.claimed() {
        give(Event::Session { id: id.clone() }, vec![session.try_clone()?])?;
    }
    for peer in &agents.peers {
        let subscribed = agents.sessions.subscribed(peer.id).map(str::to_owned);
        give(Event::Peer { subscribed }, vec![peer.lines.as_fd().try_clone_to_owned()?])?;
    }
    give(Event::End, vec![agents.listener.as_fd().try_clone_to_owned()?])?;
    let Ok(answer) = lines.receive_some(until) else { return Ok(false) };
    let answer = answer.first().map(|line| serde_json::from_slice(&line.bytes)).transpose()?;
    Ok(answer == Some(Command::Taken))
}

/// What another daemon gives, but for machines.
#[derive(Default)]
struct Given {
    device: Option<OwnedFd>,
    sessions: Vec<(String, OwnedFd)>,
    peers: Vec<(Option<String>, OwnedFd)>,
}

/// How long one that refuses may be busy with something.
const BUSY: Duration = Duration::from_secs(5);

/// Takes everything from the daemon that listens. One that is busy is asked again.
pub(crate) fn take_over(daemon: &mut Daemon) -> anyhow::Result<Agents> {
    let until = Deadline::after(BUSY);
    loop {
        match try_to_take_over(daemon) {
            Err(error) if error.is::<Refused>() && !until.has_passed() => {
                debug!(error = &*error, "it is tried again");
                thread::sleep(Duration::from_millis(50));
            }
            done => return done,
        }
    }
}

/// The other tideoverd says so.
#[derive(Debug, Error)]
#[error("the other tideoverd refuses: {why}")]
struct Refused {
    why: String,
}

fn try_to_take_over(daemon: &mut Daemon) -> anyhow::Result<Agents> {
    let path = agent::socket(&daemon.directory);
    let until = Deadline::after(Daemon::patience());
    let cannot = || format!("no tideoverd to take over from at {}", path.display());
    let mut lines = fdpass::connect_lines(&path, until).with_context(cannot)?;
    lines.require_same_user().context("the other tideoverd is not to be trusted")?;
    lines.send(&serde_json::to_vec(&Command::Handover { version: VERSION })?, Vec::new())?;
    let mut given = Given::default();
    loop {
        let came = lines.receive_some(until).context("the other tideoverd does not hand over")?;
        for line in came {
            if let Some(listener) = take(line, daemon, &mut given)? {
                let agents = begin(daemon, listener, given)?;
                lines.send(&serde_json::to_vec(&Command::Taken)?, Vec::new())?;
                lines.await_sent(until)?;
                info!(machines = daemon.entries.len(), peers = agents.count(), "took over");
                return Ok(agents);
            }
        }
    }
}

/// Takes one thing. Gives the agents' socket, which comes last.
fn take(line: Line, daemon: &mut Daemon, given: &mut Given) -> anyhow::Result<Option<OwnedFd>> {
    let Line { bytes, mut fds } = line;
    let fd = |fds: &mut Vec<OwnedFd>| fds.pop().context("no descriptor came");
    match serde_json::from_slice(&bytes)? {
        Event::Machine { id, about } => {
            machines::check_name(&id)?;
            let remains = Remains::adopt(*about, fds)?;
            daemon.entries.insert(id.clone(), Entry::adopted(id, remains));
        }
        Event::Device => given.device = Some(fd(&mut fds)?),
        Event::Session { id } => given.sessions.push((id, fd(&mut fds)?)),
        Event::Peer { subscribed } => given.peers.push((subscribed, fd(&mut fds)?)),
        Event::End => return fd(&mut fds).map(Some),
        Event::Error { why } => return Err(Refused { why: why.escape_debug().to_string() }.into()),
        other => bail!("unexpected while it hands over: {other:?}"),
    }
    Ok(None)
}

fn begin(daemon: &Daemon, listener: OwnedFd, given: Given) -> anyhow::Result<Agents> {
    let kernel = given.device.map_or_else(|| Ok(Kernel::default()), Kernel::with)?;
    let mut agents = Agents::adopt(&daemon.directory, listener, kernel)?;
    for (id, session) in given.sessions {
        agents.sessions.adopt(id, session);
    }
    for (subscribed, connection) in given.peers {
        let peer = agents.add(Lines::from_fd(connection)?);
        if let Some(id) = subscribed {
            agents.sessions.subscribe(peer, id)?;
        }
    }
    Ok(agents)
}
