//! A machine, and the VMMs that run it one after another.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use fdpass::Channel;
use pulse::{MAILBOX_OFFSET, word};
use rustix::process::{Pid, Signal, kill_process};
use socket::Timeouts;
use vmm::control::{
    Answer, Carrier, Client, GuestKind, MachineSpec, Pages, Request, Source, Status, UpdateOutcome,
    UpdateReport, UpdateRequest,
};

/// How long a VMM may take to end once its guest runs elsewhere.
const GONE: Duration = Duration::from_secs(60);
/// Given to the kernel, after a VMM has ended, to finish what it does in the background.
const AFTERWARDS: Duration = Duration::from_millis(20);

/// How an update is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct How {
    /// How the machine gets to its next VMM.
    pub carrier: Carrier,
    /// Enter present pages into the successor's page tables before the pause.
    pub populate: bool,
    /// Measure what the guest's first touches cost.
    pub probe: bool,
}

/// A machine, run by the reference VMM in a process of its own.
#[derive(Debug)]
pub struct Chain {
    client: Client,
    program: PathBuf,
    first: Child,
    pid: u32,
    memory: File,
    held: bool,
}

impl Chain {
    /// Starts the first VMM by `program vmm run`, and waits until its guest counts.
    ///
    /// # Errors
    /// If there is no such guest.
    pub fn start(program: &Path, memory_bytes: u64, pages: Pages) -> Result<Self> {
        let spec = MachineSpec { pages, ..MachineSpec::new("bench", memory_bytes, GuestKind::Kvm) };
        let (ours, theirs) = Channel::pair()?;
        let first = Command::new(program)
            .args(["vmm", "run", "--spec", &serde_json::to_string(&spec)?])
            .stdin(Stdio::from(theirs.into_stdio()))
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let pid = first.id();
        let client = Client::new(ours);
        while status(&client)?.ticks == Some(0) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let memory = memory_of(pid).context("cannot open the guest's memory")?;
        Ok(Self { client, program: program.to_owned(), first, pid, memory, held: false })
    }

    /// How its guest is.
    ///
    /// # Errors
    /// If the guest has failed.
    pub fn status(&self) -> Result<Status> {
        status(&self.client)
    }

    /// What its guest has counted, read from the guest's memory: the VMM is not asked, and not disturbed.
    ///
    /// # Errors
    /// If the memory cannot be read.
    pub fn ticks(&self) -> Result<u64> {
        self.word(word::TICKS)
    }

    /// Full passes over its memory, likewise.
    ///
    /// # Errors
    /// If the memory cannot be read.
    pub fn passes(&self) -> Result<u64> {
        self.word(word::PASSES)
    }

    fn word(&self, word: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, MAILBOX_OFFSET + word)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Replaces the VMM, and waits until the old one is gone with all that it had.
    ///
    /// # Errors
    /// If it was not replaced.
    pub fn update(&mut self, how: How) -> Result<UpdateReport> {
        let timeouts = Timeouts::default();
        let millis = |span: Duration| u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let request = Request::Update(UpdateRequest {
            successor: Source::Program(self.program.clone()),
            carrier: how.carrier,
            populate: how.populate,
            probe: how.probe,
            timeout_ms: millis(timeouts.hand_over),
            prepare_timeout_ms: millis(timeouts.prepare),
        });
        let report = match self.client.ask(&request, &mut |_, _, _| {})? {
            Answer::Update(report) => *report,
            other => bail!("unexpected answer to update: {other:?}"),
        };
        let (UpdateOutcome::Updated, Some(successor)) = (report.outcome, report.successor_pid) else {
            bail!("the update was rolled back: {}", report.reason.unwrap_or_default());
        };
        let predecessor = std::mem::replace(&mut self.pid, successor);
        let begun = Instant::now();
        while predecessor != successor && lives(predecessor) {
            if begun.elapsed() > GONE {
                bail!("the old VMM, process {predecessor}, does not end");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(AFTERWARDS);
        Ok(report)
    }

    /// Stops the VMM's process with all its threads, so that it uses no processor. It answers nothing until it may
    /// [go](Chain::go) on.
    ///
    /// # Errors
    /// If it is gone.
    pub fn hold(&mut self) -> Result<()> {
        self.signal(Signal::STOP)?;
        self.held = true;
        Ok(())
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// If it is gone.
    pub fn go(&mut self) -> Result<()> {
        self.signal(Signal::CONT)?;
        self.held = false;
        Ok(())
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw).context("the VMM has no number")?;
        kill_process(pid, signal).context("cannot signal the VMM")
    }

    /// Ends the guest, if it has found nothing wrong.
    ///
    /// # Errors
    /// If it has.
    pub fn finish(mut self) -> Result<()> {
        self.go()?;
        self.status()?;
        match self.client.ask(&Request::Stop, &mut |_, _, _| {})? {
            Answer::Stopped => Ok(()),
            other => bail!("unexpected answer to stop: {other:?}"),
        }
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.held {
            // Only who runs notices that nobody is left at the control channel.
            let _ = self.signal(Signal::CONT);
        }
        let _ = self.client.ask(&Request::Stop, &mut |_, _, _| {});
        let _ = self.first.wait();
    }
}

fn status(client: &Client) -> Result<Status> {
    match client.ask(&Request::Status, &mut |_, _, _| {})? {
        Answer::Status(status) if status.errors > Some(0) => {
            bail!("the guest found errors: {:?}", status.errors)
        }
        Answer::Status(status) => match status.failure {
            Some(why) => bail!("{why}"),
            None => Ok(*status),
        },
        other => bail!("unexpected answer to status: {other:?}"),
    }
}

/// The memory of the VMM's guest, which has the machine's name and its own. It is the same file in every VMM.
fn memory_of(pid: u32) -> Result<File> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        let target = std::fs::read_link(&path).unwrap_or_default();
        if target.to_string_lossy().starts_with("/memfd:bench.ram") {
            return Ok(File::open(path)?);
        }
    }
    bail!("process {pid} has no memory file of that name")
}

/// Whether the process has anything left but its number.
fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name stands before it in brackets, and may hold any character.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_waits_to_be_reaped_lives_no_more() {
        assert!(lives(std::process::id()));
        let mut child = Command::new("true").spawn().unwrap();
        let begun = Instant::now();
        while lives(child.id()) {
            assert!(begun.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(1));
        }
        child.wait().unwrap();
        assert!(!lives(child.id()));
    }
}
