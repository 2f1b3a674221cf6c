//! The side that takes the guest over.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process;
use std::thread;
use std::time::Duration;

use abi::arena::OwnershipState;
use abi::arena::OwnershipWord;
use fdpass::Channel;
use fdpass::ConnectError;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_FDS;
use fdpass::PeerError;
use fdpass::StdinError;
use fdpass::monotonic_ns;
use machine::AttachError;
use machine::ClaimError;
use machine::Claimed;
use machine::Incoming;
use machine::MAX_FDS;
use machine::Machine;
use machine::OfferedRegion;
use machine::SettleError;
use machine::StateName;
use machine::ownership::OwnershipError;
use machine::update::Observer;
use machine::update::Step;
use machine::update::Timeline;
use thiserror::Error;
use uffd::Activity;
use uffd::PopulateError;
use uffd::Populated;

use crate::Origin;
use crate::Timeouts;
use crate::message;
use crate::message::LinkError;
use crate::message::Message;
use crate::message::PROTOCOL;
use crate::predecessor::DEATH;

/// Why this process did not take the machine over. The predecessor runs it on, or will.
#[derive(Debug, Error)]
pub enum SuccessorError {
    /// There is no predecessor at that path.
    #[error("cannot connect to the predecessor")]
    Connect(#[source] ConnectError),
    /// This process was not started by a predecessor.
    #[error("cannot find the predecessor")]
    Stdin(#[source] StdinError),
    /// The other process is another user's.
    #[error("the predecessor is not to be trusted")]
    Peer(#[source] PeerError),
    /// The predecessor is gone, silent, gives up, or says something else than is due.
    #[error("the predecessor did not get this process to {step}")]
    Link {
        /// The step that was to come.
        step: Step,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The machine is kept in formats that this program does not know.
    #[error("this program cannot read {}", .formats.join(", "))]
    Formats {
        /// The formats, escaped.
        formats: Vec<String>,
    },
    /// Descriptors came that were not announced, or did not come.
    #[error("{came} descriptors came, {announced} were announced")]
    Descriptors {
        /// Announced.
        announced: usize,
        /// Came.
        came: usize,
    },
    /// More descriptors than a machine can have.
    #[error(
        "{descriptors} descriptors are to come with the machine, and at most {MAX_FDS} can, none after a kexec or a death"
    )]
    TooManyFds {
        /// Announced.
        descriptors: usize,
    },
    /// The regions are not those of a machine.
    #[error("cannot accept the machine")]
    Attach(#[source] AttachError),
    /// Guest memory could not be populated.
    #[error("cannot populate the guest's memory")]
    Populate(#[source] PopulateError),
    /// The machine could not be claimed.
    #[error("cannot claim the machine")]
    Claim(#[source] ClaimError),
    /// The predecessor took the machine back.
    #[error("the machine was taken back")]
    Run(#[source] OwnershipError),
}

impl SuccessorError {
    /// It was a rehearsal: nothing went wrong, and nothing is left to do.
    pub fn is_rehearsed(&self) -> bool {
        matches!(self, Self::Link { source: LinkError::Rehearsed, .. })
    }
}

/// The machine runs here, and is not ready for another update: its next seal tries again.
#[derive(Debug, Error)]
#[error("the machine runs here, but its session is not settled")]
pub struct Unsettled {
    /// The machine.
    pub machine: Machine,
    /// Why.
    #[source]
    pub cause: SettleError,
}

/// A process that is to take a machine over, connected to the one that runs it.
#[derive(Debug)]
pub struct Successor {
    channel: Channel,
    timeouts: Timeouts,
    timeline: Timeline,
    regions: Vec<u64>,
    descriptors: usize,
    origin: Origin,
    vmm: serde_json::Value,
}

fn link(step: Step) -> impl Fn(LinkError) -> SuccessorError {
    move |source| SuccessorError::Link { step, source }
}

impl Successor {
    /// Speaks to the predecessor that listens at `path`. See [`Successor::greet`].
    ///
    /// # Errors
    /// [`SuccessorError`]
    pub fn connect(path: &Path, formats: &[&str], timeouts: Timeouts) -> Result<Self, SuccessorError> {
        let channel =
            fdpass::connect(path, Deadline::after(timeouts.prepare)).map_err(SuccessorError::Connect)?;
        Self::greet(channel, formats, timeouts)
    }

    /// Speaks to the predecessor that started this process, through its standard input. See
    /// [`Successor::greet`].
    ///
    /// # Errors
    /// [`SuccessorError`]
    pub fn from_stdin(formats: &[&str], timeouts: Timeouts) -> Result<Self, SuccessorError> {
        Self::greet(Channel::from_stdin().map_err(SuccessorError::Stdin)?, formats, timeouts)
    }

    /// Says what this program is and can read, and hears what it would get. `formats` are those of the VMM's own
    /// states.
    ///
    /// # Errors
    /// [`SuccessorError`]: what could not be read later is refused now.
    pub fn greet(channel: Channel, formats: &[&str], timeouts: Timeouts) -> Result<Self, SuccessorError> {
        channel.require_same_user().map_err(SuccessorError::Peer)?;
        let deadline = Deadline::after(timeouts.prepare);
        let own = formats.iter().map(|format| (*format).to_owned());
        let reads: Vec<String> = machine::readable_formats().into_iter().chain(own).collect();
        let hello = Message::Hello {
            protocol: PROTOCOL,
            program: std::env::args().next().unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: process::id(),
            reads: reads.clone(),
        };
        message::send(&channel, &hello, &[], deadline).map_err(link(Step::Connected))?;
        let offer = message::receive(&channel, "offer", deadline).map_err(link(Step::Offered))?;
        let Message::Offer { protocol, formats, regions, descriptors, vmm, origin, .. } = offer else {
            return Err(link(Step::Offered)(LinkError::Closed));
        };
        let timeline = Timeline::default();
        let successor = Self { channel, timeouts, timeline, regions, descriptors, origin, vmm };
        if protocol != PROTOCOL {
            return Err(successor.refuse(link(Step::Offered)(LinkError::Protocol { theirs: protocol })));
        }
        if descriptors > MAX_FDS || (!origin.is_handed() && descriptors > 0) {
            return Err(successor.refuse(SuccessorError::TooManyFds { descriptors }));
        }
        let unread = formats.iter().filter(|format| !reads.contains(format));
        let unread: Vec<String> = unread.map(|format| message::shown(format)).collect();
        if !unread.is_empty() {
            return Err(successor.refuse(SuccessorError::Formats { formats: unread }));
        }
        message::send(&successor.channel, &Message::Accept, &[], deadline).map_err(link(Step::Offered))?;
        Ok(successor)
    }

    /// What the predecessor's VMM tells.
    pub fn vmm(&self) -> &serde_json::Value {
        &self.vmm
    }

    fn refuse(&self, error: SuccessorError) -> SuccessorError {
        refuse(&self.channel, error)
    }

    /// Gets the regions, checks and maps them. The predecessor's guest runs in them.
    ///
    /// # Errors
    /// [`SuccessorError`]
    pub fn attach(mut self, observer: &mut dyn Observer) -> Result<Attached, SuccessorError> {
        let deadline = Deadline::after(self.timeouts.prepare);
        let mut fds = self.receive_descriptors(deadline)?;
        reached(&mut self.timeline, observer, Step::Received);
        let others = fds.split_off(self.regions.len());
        let regions = fds.into_iter().zip(&self.regions);
        let regions = regions.map(|(fd, len_bytes)| OfferedRegion { fd, len_bytes: *len_bytes });
        let incoming = match self.origin {
            Origin::MadeAgain => Incoming::attach_made_again(regions.collect()),
            Origin::LeftBehind => Incoming::attach_left_behind(regions.collect()),
            Origin::Handed => Incoming::attach(regions.collect(), others),
        };
        let incoming = incoming.map_err(|error| self.refuse(SuccessorError::Attach(error)))?;
        reached(&mut self.timeline, observer, Step::Attached);
        Ok(Attached {
            channel: self.channel,
            timeouts: self.timeouts,
            timeline: self.timeline,
            incoming,
            vmm: self.vmm,
        })
    }

    /// As many descriptors as were announced, in as many messages as that takes.
    fn receive_descriptors(&self, deadline: Deadline) -> Result<Vec<OwnedFd>, SuccessorError> {
        let announced = self.regions.len().saturating_add(self.descriptors);
        let mut fds = Vec::new();
        while fds.len() < announced {
            let due = (announced - fds.len()).min(MAX_MESSAGE_FDS);
            let memory = message::receive_with(&self.channel, "memory", MAX_MESSAGE_FDS, deadline);
            let (_, came) = memory.map_err(link(Step::Received))?;
            if came.len() != due {
                let came = fds.len() + came.len();
                return Err(self.refuse(SuccessorError::Descriptors { announced, came }));
            }
            fds.extend(came);
        }
        Ok(fds)
    }
}

fn reached(timeline: &mut Timeline, observer: &mut dyn Observer, step: Step) {
    timeline.note(step, monotonic_ns());
    observer.reached(step);
}

fn refuse(channel: &Channel, error: SuccessorError) -> SuccessorError {
    message::refuse(channel, &chain(&error));
    error
}

/// An error with all its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn steps(timeline: &Timeline) -> Vec<(String, u64)> {
    timeline.reached().iter().map(|(step, at)| (step.name().to_owned(), *at)).collect()
}

/// How the machine was left, as a successor was told.
struct Told {
    epoch: u32,
    /// No process has it.
    left: Option<u64>,
}

impl Told {
    fn claim(self, incoming: Incoming) -> Result<Claimed, ClaimError> {
        let left = self.left.map(OwnershipWord::from_bits).transpose();
        let left = left.map_err(|malformed| ClaimError::Ownership(OwnershipError::Malformed(malformed)))?;
        match left.map(|word| (word, word.state())) {
            None | Some((_, OwnershipState::Sealed)) => incoming.claim(self.epoch),
            Some((dead, OwnershipState::Claimed)) => incoming.claim_again(dead),
            Some((dead, OwnershipState::Running | OwnershipState::Recovering)) => incoming.recover(dead),
        }
    }
}

/// The machine is mapped here, and runs in the predecessor. The VMM makes its VM now, with all that does not
/// need the guest's state.
#[derive(Debug)]
pub struct Attached {
    channel: Channel,
    timeouts: Timeouts,
    timeline: Timeline,
    incoming: Incoming,
    vmm: serde_json::Value,
}

impl Attached {
    /// The machine.
    pub fn incoming(&self) -> &Incoming {
        &self.incoming
    }

    /// The machine, to take descriptors from that came with it.
    pub fn incoming_mut(&mut self) -> &mut Incoming {
        &mut self.incoming
    }

    /// What the predecessor's VMM tells.
    pub fn vmm(&self) -> &serde_json::Value {
        &self.vmm
    }

    /// Enters the pages of guest memory that are present into this process's page tables, so that the guest does
    /// not pay for it after the update. Holes stay holes. `progress` gets bytes done and bytes in all, for each
    /// piece of memory.
    ///
    /// # Errors
    /// [`SuccessorError::Populate`]; the update can go on without.
    pub fn populate(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<Vec<Populated>, SuccessorError> {
        let populate = |inode: &std::sync::Arc<gmem::Inode>| {
            let mapping = inode.mapping();
            uffd::populate(mapping, mapping.region().as_fd(), Activity::Idle, progress)
        };
        self.incoming
            .memories()
            .iter()
            .map(populate)
            .collect::<Result<_, _>>()
            .map_err(SuccessorError::Populate)
    }

    /// Gives up, and tells the predecessor why.
    pub fn give_up(self, reason: &str) {
        message::refuse(&self.channel, reason);
    }

    /// Says that this side is ready, waits for the seal, and claims the machine.
    ///
    /// # Errors
    /// [`SuccessorError`]. If the predecessor dies while this side waits, the machine is claimed all the same if it was
    /// sealed.
    pub fn claim(mut self, observer: &mut dyn Observer) -> Result<Handed, SuccessorError> {
        reached(&mut self.timeline, observer, Step::Warm);
        let deadline = Deadline::after(self.timeouts.prepare);
        let warm = Message::Warm { steps: steps(&self.timeline) };
        message::send(&self.channel, &warm, &[], deadline).map_err(link(Step::Warm))?;
        let sealed = match message::receive(&self.channel, "sealed", deadline) {
            Ok(Message::Sealed { epoch, left, vmm }) => {
                self.vmm = vmm;
                Told { epoch, left }
            }
            Ok(_) => return Err(link(Step::Sealed)(LinkError::Closed)),
            Err(LinkError::Closed) => {
                let epoch = self.left_sealed().ok_or(link(Step::Sealed)(LinkError::Closed))?;
                self.vmm = serde_json::Value::Null;
                Told { epoch, left: None }
            }
            Err(error) => return Err(link(Step::Sealed)(error)),
        };
        let claimed = sealed.claim(self.incoming);
        let claimed = claimed.map_err(|error| refuse(&self.channel, SuccessorError::Claim(error)))?;
        reached(&mut self.timeline, observer, Step::Claimed);
        let Self { channel, timeline, timeouts, vmm, .. } = self;
        Ok(Handed { channel, timeline, timeouts, claimed, vmm })
    }

    /// The predecessor's end of the channel is closed: the epoch of its seal, if it sealed the machine and is dead.
    /// One that lives takes the machine back.
    fn left_sealed(&self) -> Option<u32> {
        let soon = Deadline::after(DEATH);
        loop {
            let word = self.incoming.ownership().ok()?;
            if word.state() != OwnershipState::Sealed {
                return None;
            }
            match self.incoming.owner_lives(word) {
                Ok(false) => return Some(word.epoch()),
                // A process that dies closes its descriptors one after another.
                Ok(true) if !soon.has_passed() => thread::sleep(Duration::from_millis(1)),
                _ => return None,
            }
        }
    }
}

/// The machine is claimed, and stands still: its state is to be loaded now.
#[derive(Debug)]
pub struct Handed {
    channel: Channel,
    timeline: Timeline,
    timeouts: Timeouts,
    claimed: Claimed,
    vmm: serde_json::Value,
}

impl Handed {
    /// The states that were sealed.
    pub fn states(&self) -> &BTreeMap<StateName, Vec<u8>> {
        self.claimed.states()
    }

    /// What the predecessor's VMM tells that was not known when it offered the machine; null if there is nothing.
    pub fn vmm(&self) -> &serde_json::Value {
        &self.vmm
    }

    /// Gives up, and tells the predecessor why: it takes the machine back.
    pub fn give_up(self, reason: &str) {
        message::refuse(&self.channel, reason);
    }

    /// Takes the machine over: the point of no return. The guest may run here from now on.
    ///
    /// # Errors
    /// [`SuccessorError::Run`] if the predecessor took the machine back: the guest must not run here.
    pub fn run(mut self, observer: &mut dyn Observer) -> Result<Running, SuccessorError> {
        reached(&mut self.timeline, observer, Step::Loaded);
        let machine = self.claimed.run().map_err(SuccessorError::Run)?;
        reached(&mut self.timeline, observer, Step::Running);
        Ok(Running { channel: self.channel, timeline: self.timeline, timeouts: self.timeouts, machine })
    }
}

/// The machine is this process's. The predecessor does not know yet.
#[derive(Debug)]
pub struct Running {
    channel: Channel,
    timeline: Timeline,
    timeouts: Timeouts,
    machine: Machine,
}

impl Running {
    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The steps that were reached here.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Tells the predecessor, ends the session that was received, and makes it stand again in this life. Call it
    /// once the guest runs; `vmm` gives what the VMM tells the predecessor for its report.
    ///
    /// # Errors
    /// [`Unsettled`], with the machine: the guest runs on.
    pub fn settle(
        self,
        observer: &mut dyn Observer,
        vmm: impl FnOnce() -> serde_json::Value,
    ) -> Result<Machine, Box<Unsettled>> {
        self.settle_and_part(observer, vmm).0
    }

    /// As [`settle`](Self::settle), and gives what tells whether the predecessor did its last duty.
    pub fn settle_and_part(
        self,
        observer: &mut dyn Observer,
        vmm: impl FnOnce() -> serde_json::Value,
    ) -> (Result<Machine, Box<Unsettled>>, Parting) {
        let Self { channel, mut timeline, timeouts, mut machine } = self;
        let deadline = Deadline::after(timeouts.prepare);
        // If it is gone, it need not be told.
        let first = says_farewell(&channel, &Message::Running { steps: steps(&timeline) }, deadline);
        let finished = match machine.settle() {
            Ok(finished) => finished,
            Err(cause) => {
                return (Err(Box::new(Unsettled { machine, cause })), Parting { channel, told: first });
            }
        };
        reached(&mut timeline, observer, Step::Settled);
        let unclaimed = finished.unclaimed.iter().map(|token| token.0).collect();
        let settled = Message::Settled { steps: steps(&timeline), unclaimed, vmm: vmm() };
        let told = says_farewell(&channel, &settled, deadline).or(first);
        (Ok(machine), Parting { channel, told })
    }
}

/// Sends what the predecessor need not be told if it is gone. If it is, and has said farewell: what it said.
fn says_farewell(channel: &Channel, message: &Message, deadline: Deadline) -> Option<serde_json::Value> {
    match message::send(channel, message, &[], deadline) {
        Err(LinkError::Farewell { vmm }) => Some(vmm),
        _ => None,
    }
}

/// What is left of the predecessor, which has one thing to do still: to tell whoever asked for the update how it went.
#[derive(Debug)]
pub struct Parting {
    channel: Channel,
    told: Option<serde_json::Value>,
}

impl Parting {
    /// Waits until the predecessor has told, at most for so long, and gives what its VMM said then: null if that was nothing, or it
    /// did not come in time. `None` if the predecessor is gone and had not told: then somebody else has to. To be asked only of
    /// one that says [`farewell`](crate::farewell).
    pub fn was_told(self, patience: Duration) -> Option<serde_json::Value> {
        let Self { channel, told } = self;
        told.or_else(|| match message::receive(&channel, "farewell", Deadline::after(patience)) {
            Err(LinkError::Closed) => None,
            Err(LinkError::Farewell { vmm }) => Some(vmm),
            _ => Some(serde_json::Value::Null),
        })
    }
}
