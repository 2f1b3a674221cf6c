//! One tideoverd takes over from another: while that goes on, neither does anything else, so no machine is held twice.
//!
//! What VMMs and holders have, the new one could ask for by itself; what the old one alone has, it could not. So it gets all. The old
//! one goes on if the new one does not say that it has it.

use std::os::fd::AsFd as _;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Deadline;
use fdpass::LineListener;
use fdpass::Lines;
use tracing::info;

use crate::agent;
use crate::agent::Agents;
use crate::daemon::Daemon;
use crate::entry::Entry;
use crate::protocol::Command;
use crate::protocol::Event;
use crate::protocol::VERSION;
use crate::remains::Remains;

/// Gives another daemon all that is here. Says whether it has taken it.
pub(crate) fn hand_over(lines: &mut Lines, daemon: &Daemon, listener: &LineListener) -> anyhow::Result<bool> {
    let until = Deadline::after(Daemon::patience());
    for entry in daemon.entries.values() {
        let Some(remains) = entry.remains() else { continue };
        let event = Event::Machine { id: entry.name.clone(), about: Box::new(remains.about.clone()) };
        lines.send(&serde_json::to_vec(&event)?, remains.copies()?)?;
        lines.await_sent(until)?;
    }
    let listener = listener.as_fd().try_clone_to_owned()?;
    lines.send(&serde_json::to_vec(&Event::End)?, vec![listener])?;
    lines.await_sent(until)?;
    let Ok(answer) = lines.receive_some(until) else { return Ok(false) };
    let answer = answer.first().map(|line| serde_json::from_slice(&line.bytes)).transpose()?;
    Ok(answer == Some(Command::Taken))
}

/// Takes everything from the daemon that listens.
pub(crate) fn take_over(daemon: &mut Daemon) -> anyhow::Result<Agents> {
    let path = agent::socket(&daemon.directory);
    let until = Deadline::after(Daemon::patience());
    let cannot = || format!("no tideoverd to take over from at {}", path.display());
    let mut lines = fdpass::connect_lines(&path, until).with_context(cannot)?;
    lines.require_same_user().context("the other tideoverd is not to be trusted")?;
    lines.send(&serde_json::to_vec(&Command::Handover { version: VERSION })?, Vec::new())?;
    let mut waiting = Vec::new();
    loop {
        if waiting.is_empty() {
            waiting = lines.receive_some(until).context("the other tideoverd does not hand over")?;
            waiting.reverse();
        }
        let Some(line) = waiting.pop() else { continue };
        match serde_json::from_slice(&line.bytes)? {
            Event::Machine { id, about } => {
                let remains = Remains::adopt(*about, line.fds)?;
                daemon.entries.insert(id.clone(), Entry::adopted(id, remains));
            }
            Event::End => {
                let listener = line.fds.into_iter().next().context("no socket came")?;
                let agents = Agents::adopt(&daemon.directory, listener)?;
                lines.send(&serde_json::to_vec(&Command::Taken)?, Vec::new())?;
                lines.await_sent(until)?;
                info!(machines = daemon.entries.len(), "took over");
                return Ok(agents);
            }
            Event::Error { why } => bail!("the other tideoverd refuses: {}", why.escape_debug()),
            other => bail!("unexpected while it hands over: {other:?}"),
        }
    }
}
