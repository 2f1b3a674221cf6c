//! A machine, its processes, and who asks them for things.

use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::process::Command;
use std::process::Stdio;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use fdpass::Channel;
use fdpass::Deadline;
use vmm::control;
use vmm::control::Answer;
use vmm::control::CheckReport;
use vmm::control::GuestKind;
use vmm::control::MachineSpec;
use vmm::control::Request;
use vmm::control::Status;

use crate::keeper::Keeper;
use crate::plan::Actor;
use crate::plan::Folder;
use crate::plan::Place;
use crate::process::Process;
use crate::process::kill_with;
use crate::process::living_vmms;
use crate::role;
use crate::witness::Witness;

/// Guest memory of every machine: small, so that all of it can be compared after each try.
const MEMORY_BYTES: u64 = 8 << 20;
/// How long an answer may take that nothing keeps from coming.
pub(crate) const ANSWER: Duration = Duration::from_secs(120);

/// A machine whose guest runs, and the other end of its control channel.
#[derive(Debug)]
pub struct Machine {
    /// What it shares with its processes.
    pub folder: Folder,
    /// Sees its memory.
    pub witness: Witness,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// How often its VMM was replaced.
    pub updates: u64,
    /// Its identity.
    pub identity: String,
    /// What keeps it.
    pub keeper: Option<Keeper>,
    pub(crate) control: Channel,
    pub(crate) events: File,
}

/// What a process told of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Its number.
    pub pid: u32,
    /// What it is.
    pub actor: Actor,
    /// Where it is.
    pub place: Place,
}

impl Machine {
    /// Makes one.
    ///
    /// # Errors
    /// If it does not come to run.
    pub fn make(guest: GuestKind, vcpus: u32, is_kept: bool) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("c{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(format!("tideover-campaign-{name}"));
        DirBuilder::new().mode(0o700).create(&path).context("cannot make a folder")?;
        let folder = Folder::at(path);
        let socket = is_kept.then(|| Keeper::socket(&folder, &name));
        folder.write_spec(&MachineSpec { vcpus, socket, ..MachineSpec::new(&name, MEMORY_BYTES, guest) })?;
        let events = folder.make_events()?;
        rustix::io::ioctl_fionbio(&events, true)?;
        let (control, theirs) = Channel::pair()?;
        let mut command = command(&folder, role::FIRST)?;
        let child = command.stdin(Stdio::from(theirs.into_stdio())).spawn()?;
        drop(command);
        let machine = || -> anyhow::Result<_> {
            let status = status(&control)?;
            let keeper = is_kept.then(|| Keeper::start(&folder, &name)).transpose()?;
            Ok((Witness::of(child.id(), &name)?, status, keeper))
        };
        match machine() {
            Ok((witness, status, keeper)) => {
                let (updates, identity) = (status.updates, status.identity);
                Ok(Self { folder, witness, vcpus, updates, identity, keeper, control, events })
            }
            Err(error) => {
                kill_with(&environment(&folder));
                Err(error.context("cannot make a machine"))
            }
        }
    }

    /// The processes that live.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        living_vmms(&environment(&self.folder))
    }

    /// Starts a successor, and gives it with the channel to it. One that comes to grief at its start may be gone already.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_successor(&self) -> anyhow::Result<(Option<Process>, Channel)> {
        let (ours, theirs) = Channel::pair()?;
        let mut command = command(&self.folder, role::SUCCEED)?;
        let child = command.stdin(Stdio::from(theirs.into_stdio())).spawn()?;
        Ok((Process::open(child.id()).ok(), ours))
    }

    /// Asks for something, and sends a channel along.
    ///
    /// # Errors
    /// If nobody is there.
    pub fn send(&self, request: &Request, along: Option<&Channel>) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec(request)?;
        let fds: Vec<_> = along.iter().map(|channel| channel.as_fd()).collect();
        Ok(self.control.send(&bytes, &fds, Deadline::after(ANSWER))?)
    }

    /// How the guest is.
    ///
    /// # Errors
    /// If nobody says so.
    pub fn status(&self) -> anyhow::Result<Status> {
        status(&self.control)
    }

    /// Has guest and VMM check all of the memory.
    ///
    /// # Errors
    /// If that cannot be done.
    pub fn check(&self) -> anyhow::Result<CheckReport> {
        control::send(&self.control, &Request::Check)?;
        match answer(&self.control)? {
            Answer::Check(check) => Ok(check),
            other => bail!("unexpected answer to a check: {other:?}"),
        }
    }

    /// What processes have told since this was asked last.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        // A line is written whole, and there are few of them.
        let mut bytes = [0; 4096];
        let read = (&self.events).read(&mut bytes).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[..read]);
        text.lines().filter_map(event).collect()
    }

    /// What its processes have said on standard error, at the end.
    #[must_use]
    pub fn said(&self) -> String {
        let said = fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default();
        let mut lines: Vec<&str> = said.lines().rev().take(6).collect();
        lines.reverse();
        lines.join("; ").chars().take(2000).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        kill_with(&environment(&self.folder));
        let _ = fs::remove_dir_all(self.folder.path());
    }
}

/// What all processes of the machine of this folder have in their environment.
fn environment(folder: &Folder) -> String {
    format!("{}={}", role::FOLDER, folder.path().display())
}

fn event(line: &str) -> Option<Event> {
    let mut words = line.split(' ');
    let pid = words.next()?.parse().ok()?;
    let actor = Actor::named(words.next()?)?;
    let place = Place::try_from(words.next()?.to_owned()).ok()?;
    Some(Event { pid, actor, place })
}

fn command<const N: usize>(folder: &Folder, arguments: [&str; N]) -> anyhow::Result<Command> {
    let stderr = File::options().create(true).append(true).open(folder.path().join("stderr"))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).env(role::FOLDER, folder.path()).stdout(Stdio::null()).stderr(stderr);
    Ok(command)
}

/// The next answer that is no progress.
fn answer(control: &Channel) -> anyhow::Result<Answer> {
    loop {
        match control::receive(control, Deadline::after(ANSWER))? {
            Some(Answer::Progress { .. }) => {}
            Some(answer) => return Ok(answer),
            None => bail!("nobody is left who could answer"),
        }
    }
}

/// An update's answer that came late is passed over.
fn status(control: &Channel) -> anyhow::Result<Status> {
    control::send(control, &Request::Status)?;
    loop {
        match answer(control)? {
            Answer::Status(status) => return Ok(*status),
            Answer::Update(_) => {}
            other => bail!("unexpected answer to status: {other:?}"),
        }
    }
}
