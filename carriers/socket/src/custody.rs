//! The side that keeps a machine which stands still and which no process runs, and gives it to a successor.

use std::os::fd::BorrowedFd;

use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_FDS;
use fdpass::monotonic_ns;
use machine::OwnershipWord;
use machine::update::Step;
use machine::update::Timeline;

use crate::Timeouts;
use crate::message;
use crate::message::Message;
use crate::predecessor::Reason;
use crate::proposal::Proposal;

/// A sealed machine that came through a kexec, in the hands of a process that cannot run it.
#[derive(Debug)]
pub struct Custody<'a> {
    /// The machine's identity, as it is written.
    pub identity: String,
    /// All formats that the successor has to be able to read.
    pub formats: Vec<String>,
    /// The regions, region 0 first, and the bytes of each. A kernel has made them again: their files are others than
    /// the machine's metadata tells of.
    pub regions: Vec<(BorrowedFd<'a>, u64)>,
    /// Epoch of the seal.
    pub sealed: u32,
    /// The ownership word, if a successor claimed the machine and died before it ran it.
    pub claimed: Option<OwnershipWord>,
    /// What the VMM that sealed it told its successor.
    pub vmm: serde_json::Value,
    /// How long to wait.
    pub timeouts: Timeouts,
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

/// Gives the machine to the successor at the other end of `channel`, and waits until it has settled.
///
/// # Errors
/// [`Reason`]: whether the successor runs the machine all the same, its ownership word tells.
pub fn pass_on(
    channel: &Channel,
    custody: &Custody<'_>,
    told: &mut dyn FnMut(Step),
) -> Result<Passed, Reason> {
    let deadline = Deadline::after(custody.timeouts.prepare);
    let link = |step| move |source| Reason::Link { step, source };
    channel.require_same_user().map_err(Reason::Peer)?;
    let mut timeline = Timeline::default();
    let mut reached = |step| {
        timeline.note(step, monotonic_ns());
        told(step);
    };
    let successor_pid = custody.proposal().agree(channel, &mut reached, deadline)?;
    for some in custody.regions.chunks(MAX_MESSAGE_FDS) {
        let fds: Vec<BorrowedFd<'_>> = some.iter().map(|(fd, _)| *fd).collect();
        message::send(channel, &Message::Memory, &fds, deadline).map_err(link(Step::Received))?;
    }
    message::receive(channel, "warm", deadline).map_err(link(Step::Warm))?;
    reached(Step::Warm);
    let claimed = custody.claimed.map(OwnershipWord::bits);
    let sealed = Message::Sealed { epoch: custody.sealed, claimed };
    message::send(channel, &sealed, &[], deadline).map_err(link(Step::Claimed))?;
    message::receive(channel, "running", deadline).map_err(link(Step::Running))?;
    reached(Step::Running);
    let settled = message::receive(channel, "settled", deadline).map_err(link(Step::Settled))?;
    reached(Step::Settled);
    let Message::Settled { unclaimed, vmm, steps } = settled else {
        return Err(link(Step::Settled)(message::LinkError::Closed));
    };
    let known = steps.iter().filter_map(|(name, at)| Some((Step::named(name)?, *at)));
    known.for_each(|(step, at)| timeline.note(step, at));
    Ok(Passed { successor_pid, timeline, unclaimed, vmm })
}

impl Custody<'_> {
    fn proposal(&self) -> Proposal {
        Proposal {
            identity: self.identity.clone(),
            formats: self.formats.clone(),
            regions: self.regions.iter().map(|(_, len_bytes)| *len_bytes).collect(),
            descriptors: 0,
            vmm: self.vmm.clone(),
            made_again: true,
        }
    }
}
