//! What a VMM is told, and what it answers: JSON, one message a packet of a Unix socket.
//!
//! Of each connection one request is under way at a time; the answer may come from the next VMM's life.

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use anyhow::bail;
use custody::Note;
use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_BYTES;
use fdpass::MAX_MESSAGE_FDS;
use fdpass::ReceiveError;
use fdpass::SendError;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;
use socket::Origin;

mod spec;

pub use spec::DiskSpec;
pub use spec::GuestKind;
pub use spec::LinuxSpec;
pub use spec::MachineSpec;
pub use spec::OnOom;
pub use spec::Pages;
pub use spec::Store;
pub use spec::Then;

pub use crate::confine::Confine;
pub use crate::guest::End;

/// How a successor comes to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// The VMM starts the program at the path that it was started from itself, as it is by now.
    Own,
    /// The VMM starts this program.
    Program(PathBuf),
    /// Somebody else starts it, and it connects to a socket at this path.
    Listen(PathBuf),
    /// Somebody else has started it, and the channel to it comes with this request as a descriptor.
    Passed,
}

/// How the machine gets to its next VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    /// To another process, both alive at once.
    Socket,
    /// This process executes the next VMM's program.
    Exec,
}

/// An update that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateRequest {
    /// Where the successor comes from.
    pub successor: Source,
    /// How the machine gets there. Only a program can be executed.
    pub carrier: Carrier,
    /// Enter present pages into the successor's page tables before the pause.
    pub populate: bool,
    /// Measure what the guest's first touches cost after the update.
    pub probe: bool,
    /// How long the guest may stand still before the update is called off, in milliseconds.
    pub timeout_ms: u64,
    /// How long the successor may take to get ready, in milliseconds.
    pub prepare_timeout_ms: u64,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// How is the guest?
    Status,
    /// Replace the VMM.
    Update(UpdateRequest),
    /// Have the guest check all of its memory, then check it from outside while it stands still.
    Check,
    /// Have the guest stand still, until it is resumed. Updates leave it so.
    Pause,
    /// Let the guest run on.
    Resume,
    /// Get ready for a kexec: fill and freeze the memory, while the guest runs, and have the kernel preserve it in the
    /// session whose descriptor comes with this. Without a descriptor the kernel is not asked: a rehearsal. Until this
    /// connection is closed, or sends [`Request::GoOn`], the VMM obeys nobody else.
    Preserve,
    /// After [`Request::Preserve`]: have the guest stand still, save and seal it.
    Seal,
    /// The service that the VMM belongs to is restarted: have the guest stand still, save and seal it, leave the machine in the
    /// service manager's store, and end.
    Park,
    /// After [`Request::Preserve`]: there is no kexec, everything is to be as before.
    GoOn,
    /// What did the last kexec take?
    Report,
    /// What did the last update take, of those since the last kexec?
    LastUpdate,
    /// Give this connection what it takes to keep the machine against the end of this process: [`Answer::Custody`], now and
    /// whenever that changes. From then on it is told of the machine's end as if it had [waited](Request::Wait) for that.
    Custody,
    /// Of a machine that is held: have it run, by this program or the one that was tried before.
    Recover {
        /// What to do if its state is not complete to the last instant.
        otherwise: Otherwise,
        /// The program.
        program: Option<PathBuf>,
    },
    /// Of a machine that is held after a kexec: try again to run it, by this program or the one that was tried before.
    Revive {
        /// The program.
        program: Option<PathBuf>,
    },
    /// Answer when the guest ends, and how.
    Wait,
    /// Make this connection a console of the guest's serial line. From then on both sides send bytes of the line
    /// ([`console_message`]), and the VMM besides [`Answer::ConsoleMissed`] and how the machine ends. It goes on through updates
    /// until it is closed. A machine without a socket is not kept by its consoles.
    Console,
    /// End the guest and the VMM.
    Stop,
}

impl Request {
    /// What it asks for can be done while the machine is sealed where it is.
    pub(crate) fn leaves_at_rest(&self) -> bool {
        !matches!(self, Self::Update(_) | Self::Preserve | Self::Park | Self::Resume)
    }
}

/// What to do with a machine whose vCPUs' state is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Otherwise {
    /// It stays as it is.
    Keep,
    /// Its guest starts from the beginning, in the same memory, which is made zero.
    Boot,
}

/// What the guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// It runs.
    Running,
    /// It stands still until it is resumed.
    Paused,
    /// It has ended by itself.
    Ended,
}

/// What a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// A serial line.
    Serial,
    /// The ports for power off and reset.
    Power,
    /// A disk.
    Disk,
    /// A network card.
    Net,
}

/// A device of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: DeviceKind,
    /// The host's file or interface behind it.
    pub backend: Option<String>,
    /// Of a disk: whether the guest may only read it.
    pub read_only: Option<bool>,
    /// Of a disk: its size, in bytes.
    pub size_bytes: Option<u64>,
    /// Of a network card: frames that were dropped.
    pub dropped: Option<u64>,
    /// What went wrong in it last, since its guest was started.
    #[serde(default)]
    pub fault: Option<String>,
}

/// How the guest is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The machine's name.
    pub name: String,
    /// The process that runs it.
    pub pid: u32,
    /// What the guest is doing.
    pub state: GuestState,
    /// How many times its VMM was replaced.
    pub updates: u64,
    /// How many kernels of the host it has left.
    #[serde(default)]
    pub kexecs: u64,
    /// How long ago the machine was made, in milliseconds.
    pub age_ms: u64,
    /// The machine's identity, as hex.
    pub identity: String,
    /// The guest.
    pub guest: GuestKind,
    /// How many vCPUs it has.
    pub vcpus: u64,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// What its memory comes from.
    pub store: Store,
    /// The page size asked for, in bytes.
    pub page_size: u64,
    /// Bytes of its memory that this process has mapped in huge pages.
    pub huge_bytes: u64,
    /// Why there are not more, as the kernel's error number, if it is known.
    pub huge_refused: Option<i32>,
    /// What all of its vCPUs have counted together, if it is pulse.
    pub ticks: Option<u64>,
    /// Full passes over its memory, if it is pulse.
    pub passes: Option<u64>,
    /// Wrong words that it found, if it is pulse.
    pub errors: Option<u64>,
    /// Why it does not run any more, if so.
    pub failure: Option<String>,
    /// Its devices.
    pub devices: Vec<DeviceStatus>,
    /// Consoles that are attached to its serial line.
    pub consoles: usize,
    /// How the VMM is confined.
    pub confined: Confine,
    /// It is to go with the host through a kexec.
    #[serde(default)]
    pub through_kexec: bool,
    /// How often the right to run it has changed hands, which it does three times in an update: the epoch of its ownership
    /// word. It wraps to 0 after 2³².
    #[serde(default)]
    pub epoch: Option<u32>,
    /// Its memory is frozen.
    #[serde(default)]
    pub frozen: bool,
    /// How long its guest stood still for the last update or kexec, in microseconds.
    #[serde(default)]
    pub last_pause_us: Option<f64>,
    /// Somebody keeps the machine against the end of its VMM.
    #[serde(default)]
    pub kept: bool,
    /// How many times it was recovered from the death of its VMM.
    #[serde(default)]
    pub recoveries: u64,
    /// Its VMMs are a service of a service manager, which keeps its memory, too.
    #[serde(default)]
    pub stored: bool,
    /// Where it lies, if it is found by its path.
    #[serde(default)]
    pub path: Option<PathBuf>,
}

/// The outcome of an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateOutcome {
    /// The successor runs the guest.
    Updated,
    /// The guest runs on where it did.
    RolledBack,
}

/// What an update took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UpdateReport {
    /// The process that ran the guest.
    pub predecessor_pid: u32,
    /// The process that runs it now; `None` if the update was rolled back.
    pub successor_pid: Option<u32>,
    /// How it ended.
    pub outcome: UpdateOutcome,
    /// Why it was rolled back; of an update, why the successor did not tell how it went.
    pub reason: Option<String>,
    /// From the last instruction of the first vCPU that stopped to the first of the last that was entered, by the
    /// host's clock, in microseconds.
    pub pause_us: Option<f64>,
    /// By exec: how long the guest stood still before that pause, when the VMM's threads stepped aside, in microseconds.
    pub aside_us: Option<f64>,
    /// The longest gap that a vCPU saw, by its own clock, in microseconds.
    pub guest_pause_us: Option<f64>,
    /// How long the way to each step took, in microseconds.
    pub phases_us: BTreeMap<String, f64>,
    /// What the guest had counted when it was stopped.
    pub ticks_before: u64,
    /// What it had counted when all of its vCPUs had counted on; `None` if one did not.
    pub ticks_after: Option<u64>,
    /// What the guest's first touches after the update cost, if it was asked for.
    pub probe: Option<ProbeReport>,
}

/// What touching memory costs after an update, of a sample of the guest's pages.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Pages of 4 KiB touched.
    pub pages: u64,
    /// One touch, right after the update, in nanoseconds.
    pub cold_ns: f64,
    /// One touch, the second time, in nanoseconds.
    pub warm_ns: f64,
    /// Until all memory is as fast as before, if the guest touched nothing else: the difference, for
    /// all of its pages, in microseconds.
    pub time_to_full_speed_us: f64,
}

/// What a check of the memory found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Pages of 4 KiB that the host compared.
    pub pages_checked: u64,
    /// Pages that do not hold what they should, found by the host.
    pub pages_lost: u64,
    /// Wrong words that the guest has found in its whole life.
    pub guest_errors: u64,
    /// Times that the guest found registers lost.
    pub registers_lost: u64,
    /// Ticks that a vCPU has lost, or counted twice.
    pub ticks_miscounted: u64,
    /// Full passes that the guest made over its memory since the check was asked for.
    pub guest_passes: u64,
    /// What was wrong, if something was.
    pub first_bad: Option<String>,
}

/// What was done for a kexec while the guest ran.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PreservedReport {
    /// The process that runs it, and obeys nobody else by now.
    #[serde(default)]
    pub pid: u32,
    /// Bytes of all of the machine's memory.
    pub bytes: u64,
    /// Filling holes, and freezing, in microseconds.
    pub fill_us: f64,
    /// The kernel's own part, in microseconds; 0 if it was not asked.
    pub kernel_us: f64,
}

/// What was done for a kexec while the guest stood still.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SealedReport {
    /// The seal's epoch.
    pub epoch: u32,
    /// How long the way to each step took, in microseconds.
    pub phases_us: BTreeMap<String, f64>,
}

/// What a kexec took from a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KexecReport {
    /// The machine.
    pub name: String,
    /// The process that runs it under the new kernel.
    pub pid: u32,
    /// How long the host was shut down before that, while the guest ran, in microseconds; `None` if it was not.
    #[serde(default)]
    pub shutdown_us: Option<f64>,
    /// From the last instruction under the old kernel to the first under the new one, in microseconds.
    pub pause_us: Option<f64>,
    /// By which clock that is known: `tsc`, or `realtime`, which is right to a second.
    pub clock: Option<String>,
    /// How far it may be off, in microseconds.
    pub uncertain_us: Option<f64>,
    /// The parts of the pause, in their order, with the microseconds that each took.
    pub phases_us: Vec<(String, f64)>,
    /// The longest gap that a vCPU saw, by its own clock, in microseconds.
    pub guest_pause_us: Option<f64>,
    /// How far the guest's clock (kvmclock) is ahead of the time that has passed, in microseconds.
    pub clock_error_us: Option<f64>,
    /// What the guest had counted when it was stopped.
    pub ticks_before: u64,
    /// What it had counted when all of its vCPUs had counted on.
    pub ticks_after: Option<u64>,
}

/// An answer, or what comes before it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Something takes a while.
    Progress {
        /// What, as `warming`.
        what: String,
        /// Done.
        done: u64,
        /// Of.
        of: u64,
    },
    /// How the guest is.
    Status(Box<Status>),
    /// An update ended.
    Update(Box<UpdateReport>),
    /// A check ended.
    Check(CheckReport),
    /// The guest stands still.
    Paused,
    /// The machine is preserved; its guest runs.
    Preserved(PreservedReport),
    /// The machine is sealed; its guest stands still.
    Sealed(SealedReport),
    /// There is no kexec: everything is as before.
    WentOn {
        /// How long the guest stood still, if it did, in microseconds.
        pause_us: Option<f64>,
    },
    /// What the last kexec took; `None` if there was none.
    Report(Option<Box<KexecReport>>),
    /// What the last update took; `None` if there was none since the machine was made or came through a kexec, or it is not known.
    LastUpdate(Option<Box<UpdateReport>>),
    /// Nothing runs the machine: its memory is held.
    Held(Held),
    /// What it takes to keep the machine. With it come descriptors: those of its regions, region 0's first, then those of its
    /// vCPUs.
    Custody(Box<Custody>),
    /// The machine that was held runs.
    Recovered(RecoverReport),
    /// The guest runs on.
    Resumed,
    /// The connection is a console from now on.
    Console,
    /// A console was too slow for the guest's output.
    ConsoleMissed {
        /// How many bytes are missing in what follows.
        bytes: u64,
    },
    /// The guest has ended, and the VMM is about to.
    Stopped,
    /// The guest has ended by itself, and the VMM is about to.
    Ended(End),
    /// It could not be done.
    Error(String),
}

/// A machine whose memory is held, and which nothing runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Its name.
    pub name: String,
    /// The process that holds it.
    pub pid: u32,
    /// Why nothing runs it.
    pub why: String,
    /// It is what a VMM that died has left; else it came through a kexec.
    #[serde(default)]
    pub left_behind: bool,
    /// It can run on as if nothing had happened: its state is complete to the last instant.
    #[serde(default)]
    pub complete: bool,
}

/// What is to be known of a machine to keep it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Custody {
    /// What its VMM leaves for its next life.
    pub note: Note,
    /// How many of the descriptors are vCPUs'.
    pub vcpus: usize,
    /// The process that has it.
    pub pid: u32,
    /// Where its files come from.
    pub origin: Origin,
    /// When the process is ended for want of memory.
    pub on_oom: OnOom,
    /// The service manager keeps it already, and says what follows on the process's end: it is not for others to keep.
    #[serde(default)]
    pub stored: bool,
}

impl PartialEq for Custody {
    fn eq(&self, other: &Self) -> bool {
        (self.vcpus, self.pid, &self.note.identity) == (other.vcpus, other.pid, &other.note.identity)
    }
}

/// How a machine came to run again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverReport {
    /// Its name.
    pub name: String,
    /// The process that runs it, as that says itself.
    pub pid: u32,
    /// How.
    pub how: Recovered,
    /// Why so.
    pub why: String,
}

/// How a machine came to run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recovered {
    /// Its guest runs on from where it stood.
    RunsOn,
    /// Its guest starts from the beginning.
    Booted,
}

/// What stands before bytes of the serial line in a console's messages. No other message begins with it.
const LINE: u8 = 0;

/// Bytes of the serial line as a console's message, in either direction. They are to be few enough for a message.
#[must_use]
pub fn console_message(bytes: &[u8]) -> Vec<u8> {
    [&[LINE], bytes].concat()
}

/// The bytes of the serial line in a console's message, if it is one of those.
#[must_use]
pub fn console_bytes(message: &[u8]) -> Option<&[u8]> {
    message.strip_prefix(&[LINE])
}

/// Sends a message.
///
/// # Errors
/// If the other side is gone, or takes too long to read.
pub fn send(channel: &Channel, message: &impl Serialize) -> anyhow::Result<()> {
    send_with(channel, message, &[])
}

/// Sends a message with descriptors.
///
/// # Errors
/// As [`send`].
pub fn send_with(channel: &Channel, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    channel.send(&bytes, fds, Deadline::after(Duration::from_secs(5)))?;
    Ok(())
}

/// The same, unless the other side has not read what it was sent before.
///
/// # Errors
/// As [`send`].
pub fn send_at_once(
    channel: &Channel,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    Ok(channel.send(&bytes, fds, Deadline::after(Duration::ZERO))?)
}

/// Receives a message; `None` if the other side is gone.
///
/// # Errors
/// If nothing comes in time, or nothing that can be read.
pub fn receive<T: DeserializeOwned>(channel: &Channel, deadline: Deadline) -> anyhow::Result<Option<T>> {
    match channel.receive(MAX_MESSAGE_BYTES, 0, deadline) {
        Ok(message) => Ok(Some(serde_json::from_slice(&message.bytes)?)),
        Err(ReceiveError::Closed) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Receives a message with the descriptors that come with it; `None` if the other side is gone.
///
/// # Errors
/// As [`receive`].
pub fn receive_with<T: DeserializeOwned>(
    channel: &Channel,
    deadline: Deadline,
) -> anyhow::Result<Option<(T, Vec<OwnedFd>)>> {
    match channel.receive(MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, deadline) {
        Ok(message) => Ok(Some((serde_json::from_slice(&message.bytes)?, message.fds))),
        Err(ReceiveError::Closed) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The other end of a VMM's control channel.
#[derive(Debug)]
pub struct Client {
    channel: Channel,
    patience: Option<Duration>,
}

impl Client {
    /// Speaks to the VMM at the other end, and waits for its answers as long as it lives.
    pub fn new(channel: Channel) -> Self {
        Self { channel, patience: None }
    }

    /// Waits no longer than this for each answer.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience: Some(patience), ..self }
    }

    /// From now on, waits so long for each answer.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = Some(patience);
    }

    /// Makes the connection a console; see [`Request::Console`].
    ///
    /// # Errors
    /// If the guest has no serial line, or the VMM is gone.
    pub fn into_console(self) -> anyhow::Result<Channel> {
        match self.ask(&Request::Console, &mut |_, _, _| {})? {
            Answer::Console => Ok(self.channel),
            Answer::Held(held) => {
                bail!("{} is held, and does not run: {}", held.name, held.why)
            }
            other => bail!("unexpected answer to console: {other:?}"),
        }
    }

    /// Asks for what it takes to keep the machine, and gives the connection, over which more comes.
    ///
    /// # Errors
    /// As [`Client::answer`].
    pub fn ask_custody(self) -> anyhow::Result<(Custody, Vec<OwnedFd>, Channel)> {
        send(&self.channel, &Request::Custody).context("cannot reach the VMM")?;
        let deadline = self.patience.map_or(Deadline::never(), Deadline::after);
        match receive_with(&self.channel, deadline).context("cannot read the VMM's answer")? {
            Some((Answer::Custody(custody), fds)) => Ok((*custody, fds, self.channel)),
            Some((Answer::Held(held), _)) => bail!("{}: nothing of it is here yet: {}", held.name, held.why),
            Some((Answer::Error(error), _)) => bail!("{error}"),
            Some((other, _)) => bail!("unexpected answer to custody: {other:?}"),
            None => bail!("the VMM is gone"),
        }
    }

    /// Waits until the VMM closes the connection, which it does when it ends.
    ///
    /// # Errors
    /// If that takes longer than this waits for an answer.
    pub fn await_end(&self) -> anyhow::Result<()> {
        let deadline = self.patience.map_or(Deadline::never(), Deadline::after);
        while receive::<serde_json::Value>(&self.channel, deadline)?.is_some() {}
        Ok(())
    }

    /// Waits for the next answer; what comes before it goes to `progress`.
    ///
    /// # Errors
    /// If the VMM is gone, or says that it cannot.
    pub fn answer(&self, progress: &mut dyn FnMut(&str, u64, u64)) -> anyhow::Result<Answer> {
        loop {
            let deadline = self.patience.map_or(Deadline::never(), Deadline::after);
            let answer = receive(&self.channel, deadline).context("cannot read the VMM's answer")?;
            match answer {
                Some(Answer::Progress { what, done, of }) => progress(&what, done, of),
                Some(Answer::Error(error)) => bail!("{error}"),
                Some(answer) => return Ok(answer),
                None => bail!("the VMM is gone"),
            }
        }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// As [`Client::answer`].
    pub fn ask(&self, request: &Request, progress: &mut dyn FnMut(&str, u64, u64)) -> anyhow::Result<Answer> {
        match send(&self.channel, request) {
            // It may have said why before it went.
            Err(error) if error.downcast_ref() == Some(&SendError::Closed) => {}
            sent => sent.context("cannot reach the VMM")?,
        }
        self.answer(progress)
    }

    /// Asks, and sends a descriptor with it; the answer is to be waited for.
    ///
    /// # Errors
    /// If the VMM is gone.
    pub fn tell(&self, request: &Request, fd: Option<BorrowedFd<'_>>) -> anyhow::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        send_with(&self.channel, request, &fds).context("cannot reach the VMM")
    }

    /// Asks for an update to a successor that this process has started, with the channel to it
    /// ([`Source::Passed`]), and waits for the answer.
    ///
    /// # Errors
    /// As [`Client::answer`].
    pub fn ask_update_to(
        &self,
        successor: Channel,
        request: UpdateRequest,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> anyhow::Result<Answer> {
        let request = Request::Update(UpdateRequest { successor: Source::Passed, ..request });
        self.tell(&request, Some(successor.as_fd()))?;
        // Only then is it noticed at the other end that the successor is gone.
        drop(successor);
        self.answer(progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_these_bytes() {
        let text = |request: &Request| serde_json::to_string(request).unwrap();
        assert_eq!(text(&Request::Status), r#""status""#);
        let update = Request::Update(UpdateRequest {
            successor: Source::Listen("/run/x".into()),
            carrier: Carrier::Socket,
            populate: true,
            probe: false,
            timeout_ms: 2000,
            prepare_timeout_ms: 60000,
        });
        assert_eq!(
            text(&update),
            r#"{"update":{"successor":{"listen":"/run/x"},"carrier":"socket","populate":true,"probe":false,"timeout_ms":2000,"prepare_timeout_ms":60000}}"#
        );
    }

    #[test]
    fn what_a_vmm_said_before_it_went_is_heard() {
        let (ours, theirs) = Channel::pair().unwrap();
        send(&theirs, &Answer::Error("no room".to_owned())).unwrap();
        drop(theirs);
        let error = Client::new(ours).ask(&Request::Status, &mut |_, _, _| {}).unwrap_err();
        assert_eq!(error.to_string(), "no room");
    }

    #[test]
    fn a_machine_that_says_nothing_of_vcpus_has_one() {
        let spec = MachineSpec { vcpus: 3, ..MachineSpec::new("m", 8 << 20, GuestKind::Thread) };
        let mut json = serde_json::to_value(spec).unwrap();
        assert_eq!(json["vcpus"], 3);
        json.as_object_mut().unwrap().remove("vcpus");
        assert_eq!(serde_json::from_value::<MachineSpec>(json).unwrap().vcpus, 1);
    }

    #[test]
    fn a_vmm_that_is_gone_is_an_error() {
        let (ours, theirs) = Channel::pair().unwrap();
        drop(theirs);
        assert!(Client::new(ours).answer(&mut |_, _, _| {}).is_err());
    }
}
