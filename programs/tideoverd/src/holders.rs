//! Who starts holders.

use std::path::Path;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::Context as _;
use fdpass::Channel;
use fdpass::Deadline;
use socket::Program;
use vmm::machines;

use crate::HOLD;
use crate::entry::CONNECT;

/// Who starts them.
#[derive(Debug)]
pub(crate) enum Holders {
    /// This daemon: they and the VMMs that they start have all of its limits.
    Children(Program),
    /// Who listens here, which a service manager does: they have none of them.
    At(PathBuf),
}

impl Holders {
    pub(crate) fn new(at: Option<&Path>) -> anyhow::Result<Self> {
        match at {
            Some(path) => Ok(Self::At(path.to_owned())),
            None => Ok(Self::Children(Program::this().context("cannot find this program")?)),
        }
    }

    /// Has one started for this machine, and gives the connection to it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) fn start(&self, name: &str, directory: &Path) -> anyhow::Result<Channel> {
        match self {
            Self::Children(program) => {
                let log = machines::log(directory, name)?;
                let (channel, started) = program.start_with([HOLD], Stdio::null(), log.into())?;
                started.let_go();
                Ok(channel)
            }
            Self::At(path) => {
                let channel = fdpass::connect(path, Deadline::after(CONNECT))?;
                channel.require_same_user().context("who starts holders is not to be trusted")?;
                Ok(channel)
            }
        }
    }
}
