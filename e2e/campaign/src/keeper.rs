//! A tideoverd of a machine's own, and what becomes of the machine when its VMM dies.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context as _;
use anyhow::bail;
use anyhow::ensure;
use fdpass::Deadline;
use rustix::process::Signal;
use vmm::Picture;
use vmm::control::Answer;
use vmm::control::CheckReport;
use vmm::control::Client;
use vmm::control::Held;
use vmm::control::Otherwise;
use vmm::control::RecoverReport;
use vmm::control::Request;

use crate::machine::ANSWER;
use crate::plan::Folder;
use crate::process::Process;
use crate::role;

/// How long to wait before it is tried again to reach somebody.
const AGAIN: Duration = Duration::from_millis(2);

/// The daemon, and the machine that it keeps.
#[derive(Debug)]
pub struct Keeper {
    folder: Folder,
    name: String,
    daemon: Process,
}

impl Keeper {
    /// Starts one for a machine.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(folder: &Folder, name: &str) -> anyhow::Result<Self> {
        let daemon = start(folder)?;
        Ok(Self { folder: folder.clone(), name: name.to_owned(), daemon })
    }

    /// Where the machine is controlled, in the folder.
    #[must_use]
    pub fn socket(folder: &Folder, name: &str) -> PathBuf {
        folder.path().join(format!("{name}.sock"))
    }

    /// Kills the daemon, and starts another.
    ///
    /// # Errors
    /// If that cannot be started.
    pub fn kill_and_start(&mut self) -> anyhow::Result<()> {
        self.daemon.signal(Signal::KILL);
        ensure!(self.daemon.ends_within(ANSWER), "tideoverd does not die");
        self.daemon = start(&self.folder)?;
        Ok(())
    }

    /// Waits until the daemon has the machine.
    ///
    /// # Errors
    /// If that takes too long.
    pub fn await_kept(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            // One that was just started does not listen yet.
            if let Some(client) = tideoverd::Client::connect(self.folder.path())? {
                let is_kept = client.await_kept(&self.name, ANSWER)?;
                ensure!(is_kept, "tideoverd does not keep the machine");
                return Ok(());
            }
            ensure!(begun.elapsed() < ANSWER, "cannot reach tideoverd");
            thread::sleep(AGAIN);
        }
    }

    /// A connection to whoever answers for the machine.
    ///
    /// # Errors
    /// If nobody does.
    pub fn connect(&self) -> anyhow::Result<fdpass::Channel> {
        let socket = Self::socket(&self.folder, &self.name);
        let begun = Instant::now();
        loop {
            match fdpass::connect(&socket, Deadline::after(ANSWER)) {
                Ok(channel) => return Ok(channel),
                Err(error) => ensure!(begun.elapsed() < ANSWER, "nobody answers for the machine: {error}"),
            }
            thread::sleep(AGAIN);
        }
    }

    fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::new(self.connect()?).with_patience(ANSWER))
    }

    /// Waits until the machine is held.
    ///
    /// # Errors
    /// If it is not.
    pub fn await_held(&self) -> anyhow::Result<Held> {
        let begun = Instant::now();
        loop {
            // One that dies may still be connected to, and says nothing.
            match self.client()?.ask(&Request::Status, &mut |_, _, _| {}) {
                Ok(Answer::Held(held)) => return Ok(held),
                Ok(other) => bail!("the machine is not held: {other:?}"),
                Err(error) => ensure!(begun.elapsed() < ANSWER, "the machine is not held: {error:#}"),
            }
            thread::sleep(AGAIN);
        }
    }

    /// Has the memory that is held compared from outside, and gives the files that it is in: of region 0, and of the guest's memory.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn compare(&self) -> anyhow::Result<(CheckReport, Vec<File>)> {
        let (custody, fds, _connection) = self.client()?.ask_custody()?;
        let files = fds.iter().take(2).map(OwnedFd::try_clone).collect::<Result<Vec<_>, _>>()?;
        let report = Picture::of(&custody, fds)?.check()?;
        Ok((report, files.into_iter().map(File::from).collect()))
    }

    /// Has the machine run again: from where it stood, or from the beginning.
    ///
    /// # Errors
    /// If it does not.
    pub fn recover(&self) -> anyhow::Result<RecoverReport> {
        let request = Request::Recover { otherwise: Otherwise::Boot, program: None };
        match self.client()?.ask(&request, &mut |_, _, _| {})? {
            Answer::Recovered(report) => Ok(report),
            other => bail!("the machine is not recovered: {other:?}"),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.daemon.signal(Signal::KILL);
    }
}

fn start(folder: &Folder) -> anyhow::Result<Process> {
    let stderr = File::options().create(true).append(true).open(folder.path().join("stderr"))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.env(role::FOLDER, folder.path()).env("TIDEOVER_DIR", folder.path()).env("TIDEOVER_LOG", "warn");
    // A key that is pressed for the campaign is none for the daemon.
    let daemon = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).process_group(0).spawn();
    Process::open(daemon.context("tideoverd cannot be started")?.id())
}
