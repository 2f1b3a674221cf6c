//! tideoverd, and those that come to its socket.

use std::collections::VecDeque;
use std::fs::DirBuilder;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use fdpass::Deadline;
use fdpass::Line;
use fdpass::Lines;
use serde_json::Value;
use serde_json::json;

use crate::tideover;
use crate::tideover::DIRECTORY;
use crate::tideover::PATIENCE;

const PROGRAM: &str = "/bin/tideoverd";
const SOCKET: &str = "luo-agent.socket";

/// A tideoverd that ends with this.
pub(crate) struct Daemon(Child);

impl Daemon {
    pub(crate) fn start() -> anyhow::Result<Self> {
        DirBuilder::new().mode(0o700).recursive(true).create(DIRECTORY)?;
        let path = Path::new(DIRECTORY).join("tideoverd.log");
        let log = OpenOptions::new().create(true).append(true).open(path)?;
        let mut command = Command::new(PROGRAM);
        command.env("TIDEOVER_DIR", DIRECTORY).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let daemon = Self(command.spawn().with_context(|| format!("cannot run {PROGRAM}"))?);
        tideover::wait_for("tideoverd", PATIENCE, || Ok(Peer::connect().ok()))?;
        Ok(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A connection to it, and what has come and is not heard yet.
pub(crate) struct Peer {
    lines: Lines,
    came: VecDeque<Line>,
}

impl Peer {
    pub(crate) fn connect() -> anyhow::Result<Self> {
        let socket = Path::new(DIRECTORY).join(SOCKET);
        let lines = fdpass::connect_lines(&socket, Deadline::after(PATIENCE))?;
        Ok(Self { lines, came: VecDeque::new() })
    }

    pub(crate) fn say(&mut self, command: &Value) -> anyhow::Result<()> {
        Ok(self.lines.send(&serde_json::to_vec(command)?, Vec::new())?)
    }

    /// The next event, with its descriptors.
    pub(crate) fn hear(&mut self, patience: Duration) -> anyhow::Result<(Value, Vec<OwnedFd>)> {
        if self.came.is_empty() {
            self.came.extend(self.lines.receive_some(Deadline::after(patience))?);
        }
        let Line { bytes, fds } = self.came.pop_front().context("tideoverd says nothing")?;
        Ok((serde_json::from_slice(&bytes)?, fds))
    }

    pub(crate) fn ask(&mut self, command: &Value) -> anyhow::Result<(Value, Vec<OwnedFd>)> {
        self.say(command)?;
        self.hear(PATIENCE)
    }
}

/// Waits until it says so of itself, and gives that.
pub(crate) fn await_status(what: &str, is_so: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
    let mut peer = Peer::connect()?;
    tideover::wait_for(what, PATIENCE, || {
        let (status, _) = peer.ask(&json!({ "cmd": "STATUS" }))?;
        Ok(is_so(&status).then_some(status))
    })
}
