//! The side that keeps a machine which stands still and which no process runs, and gives it to a successor.

use std::os::fd::BorrowedFd;

use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_FDS;
use fdpass::monotonic_ns;
use machine::OwnershipWord;
use machine::update::Step;
use machine::update::Timeline;
use serde::Deserialize;
use serde::Serialize;

use crate::Timeouts;
use crate::message;
use crate::message::Message;
use crate::predecessor::Reason;
use crate::proposal::Proposal;

/// What becomes of a machine's files on their way to a successor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The process that runs the machine hands them over, with all that goes with it.
    #[default]
    Handed,
    /// A kernel has made the regions again: they are other files than those that the machine's metadata tells of. Nothing else
    /// came.
    MadeAgain,
    /// They are what is left of a process that is dead: the regions, the same files, and nothing else.
    LeftBehind,
}

impl Origin {
    pub(crate) fn is_handed(&self) -> bool {
        *self == Self::Handed
    }
}

/// What is known of a machine that no process runs before any of its memory is here.
#[derive(Debug, Clone)]
pub struct Prospect {
    /// The machine's identity, as it is written.
    pub identity: String,
    /// All formats that the successor has to be able to read.
    pub formats: Vec<String>,
    /// Bytes of each region, region 0 first.
    pub regions: Vec<u64>,
    /// Where its files come from.
    pub origin: Origin,
    /// What the VMM that had it told its successor.
    pub vmm: serde_json::Value,
    /// How long to wait.
    pub timeouts: Timeouts,
}

/// A successor that knows what it is to get, can read it, and waits for it.
#[derive(Debug)]
pub struct Agreed {
    channel: Channel,
    successor_pid: u32,
    timeline: Timeline,
    timeouts: Timeouts,
}

/// A machine in the hands of a process that cannot run it.
#[derive(Debug)]
pub struct Custody<'a> {
    /// The regions, region 0 first.
    pub regions: Vec<BorrowedFd<'a>>,
    /// How it was left: its ownership word. Sealed, or claimed by a process that is dead: there is its state. Or the process that ran it
    /// is dead, or who was to recover it after that: there is its memory alone.
    pub left: OwnershipWord,
    /// What the successor's VMM is told that was not known yet when it agreed.
    pub vmm: serde_json::Value,
}

/// A machine that was passed on.
#[derive(Debug)]
pub struct Passed {
    /// The process that runs it, as it says itself.
    pub successor_pid: u32,
    /// When each step was reached.
    pub timeline: Timeline,
    /// Tokens of files that the successor did not retrieve: they are gone.
    pub unclaimed: Vec<u64>,
    /// What the successor's VMM tells.
    pub vmm: serde_json::Value,
}

impl Prospect {
    /// Offers the machine to the successor at the other end of `channel`, which prepares what it can without the memory.
    ///
    /// # Errors
    /// [`Reason`]
    pub fn offer(self, channel: Channel) -> Result<Agreed, Reason> {
        let Self { identity, formats, regions, origin, vmm, timeouts } = self;
        let deadline = Deadline::after(timeouts.prepare);
        channel.require_same_user().map_err(Reason::Peer)?;
        let mut timeline = Timeline::default();
        let mut reached = |step| timeline.note(step, monotonic_ns());
        let proposal = Proposal { identity, formats, regions, descriptors: 0, vmm, origin };
        let successor_pid = proposal.agree(&channel, &mut reached, deadline)?;
        Ok(Agreed { channel, successor_pid, timeline, timeouts })
    }
}

impl Agreed {
    /// Gives the machine to the successor, which refuses another number of regions than was offered, and waits until it has
    /// settled.
    ///
    /// # Errors
    /// [`Reason`]: whether the successor runs the machine all the same, its ownership word tells.
    pub fn pass_on(self, custody: Custody<'_>, told: &mut dyn FnMut(Step)) -> Result<Passed, Reason> {
        let Self { channel, successor_pid, mut timeline, timeouts } = self;
        let Custody { regions, left, vmm } = custody;
        let deadline = Deadline::after(timeouts.prepare);
        let link = |step| move |source| Reason::Link { step, source };
        let mut reached = |step| {
            timeline.note(step, monotonic_ns());
            told(step);
        };
        for some in regions.chunks(MAX_MESSAGE_FDS) {
            message::send(&channel, &Message::Memory, some, deadline).map_err(link(Step::Received))?;
        }
        message::receive(&channel, "warm", deadline).map_err(link(Step::Warm))?;
        reached(Step::Warm);
        let sealed = Message::Sealed { epoch: left.epoch(), left: Some(left.bits()), vmm };
        message::send(&channel, &sealed, &[], deadline).map_err(link(Step::Claimed))?;
        message::receive(&channel, "running", deadline).map_err(link(Step::Running))?;
        reached(Step::Running);
        let settled = message::receive(&channel, "settled", deadline).map_err(link(Step::Settled))?;
        reached(Step::Settled);
        let Message::Settled { unclaimed, vmm, steps } = settled else {
            return Err(link(Step::Settled)(message::LinkError::Closed));
        };
        let known = steps.iter().filter_map(|(name, at)| Some((Step::named(name)?, *at)));
        known.for_each(|(step, at)| timeline.note(step, at));
        Ok(Passed { successor_pid, timeline, unclaimed, vmm })
    }
}
