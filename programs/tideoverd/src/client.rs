//! What the command asks of tideoverd.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::ConnectError;
use fdpass::Deadline;
use fdpass::Line;
use fdpass::LineError;
use fdpass::Lines;

use crate::agent;
use crate::protocol::Command;
use crate::protocol::Event;

/// How long tideoverd may take to accept: it is never busy for long.
const CONNECT: Duration = Duration::from_secs(5);

/// A connection to tideoverd.
#[derive(Debug)]
pub struct Client(Lines);

/// What agents have preserved, as long as this lives.
#[derive(Debug)]
pub struct Preserved {
    _connection: Client,
    _sessions: Vec<OwnedFd>,
    /// Agents that are ready.
    pub ready: Vec<String>,
    /// Agents that are not.
    pub missing: Vec<String>,
}

impl Client {
    /// Connects to the tideoverd of this directory of machines; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be reached, or is not to be trusted.
    pub fn connect(directory: &Path) -> anyhow::Result<Option<Self>> {
        match fdpass::connect_lines(&agent::socket(directory), Deadline::after(CONNECT)) {
            Ok(lines) => {
                lines.require_same_user().context("tideoverd is not to be trusted")?;
                Ok(Some(Self(lines)))
            }
            Err(ConnectError::Absent { .. } | ConnectError::Refused { .. }) => Ok(None),
            Err(error) => Err(error).context("cannot reach tideoverd"),
        }
    }

    /// Waits until a machine is kept. Says whether it is.
    ///
    /// # Errors
    /// If tideoverd does not say.
    pub fn await_kept(mut self, name: &str, patience: Duration) -> anyhow::Result<bool> {
        self.ask(&Command::Keep { id: name.to_owned() })?;
        match self.answer(Deadline::after(patience)) {
            Ok((Event::Kept { .. }, _)) => Ok(true),
            Ok((other, _)) => bail!("unexpected answer to keep: {other:?}"),
            Err(error) if matches!(error.downcast_ref(), Some(LineError::Stalled)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// /dev/liveupdate, which tideoverd owns from then on.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn device(mut self) -> anyhow::Result<OwnedFd> {
        self.ask(&Command::Device)?;
        match self.answer(Deadline::after(CONNECT))? {
            (Event::Device, fds) => fds.into_iter().next().context("tideoverd gives no device"),
            (other, _) => bail!("unexpected answer to device: {other:?}"),
        }
    }

    /// Has all agents preserve what they have. They may take so long.
    ///
    /// # Errors
    /// If nothing could be preserved.
    pub fn preserve(mut self, timeout: Duration) -> anyhow::Result<Preserved> {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.ask(&Command::Preserve { timeout_ms })?;
        match self.answer(Deadline::after(timeout + CONNECT))? {
            (Event::Preserved { ready, missing }, sessions) => {
                Ok(Preserved { _connection: self, _sessions: sessions, ready, missing })
            }
            (other, _) => bail!("unexpected answer to preserve: {other:?}"),
        }
    }

    fn ask(&mut self, command: &Command) -> anyhow::Result<()> {
        Ok(self.0.send(&serde_json::to_vec(command)?, Vec::new())?)
    }

    fn answer(&mut self, until: Deadline) -> anyhow::Result<(Event, Vec<OwnedFd>)> {
        let first = self.0.receive_some(until)?.into_iter().next();
        let Line { bytes, fds } = first.context("tideoverd says nothing")?;
        match serde_json::from_slice(&bytes).context("cannot read what tideoverd says")? {
            Event::Error { why } => bail!("tideoverd: {}", why.escape_debug()),
            event => Ok((event, fds)),
        }
    }
}
