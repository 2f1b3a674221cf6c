//! The side that runs the guest, and gives it up.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::process;
use std::thread;
use std::time::Duration;

use fdpass::Channel;
use fdpass::Deadline;
use fdpass::MAX_MESSAGE_FDS;
use machine::FdName;
use machine::Machine;
use machine::SealError;
use machine::StateName;
use machine::UnsealError;
use machine::ownership::OwnershipError;
use machine::update::Departure;
use machine::update::DepartureError;
use machine::update::Guest;
use machine::update::Observer;
use machine::update::Step;
use machine::update::Timeline;
use region::liveness;
use thiserror::Error;
use tracing::warn;

use crate::Origin;
use crate::Timeouts;
use crate::message;
use crate::message::LinkError;
use crate::message::Message;
use crate::proposal::Proposal;

/// How long to wait for what shows that a process lives, after its end of the channel is closed.
pub(crate) const DEATH: Duration = Duration::from_millis(500);

/// What the predecessor offers beside the machine.
#[derive(Debug, Default)]
pub struct Offer<'a> {
    /// Formats of the VMM's own states, which the successor has to be able to read, too.
    pub formats: Vec<String>,
    /// Other descriptors that go with the machine, each with a name.
    pub fds: Vec<(FdName, BorrowedFd<'a>)>,
    /// Anything that the VMM tells its successor.
    pub vmm: serde_json::Value,
    /// How long to wait.
    pub timeouts: Timeouts,
}

/// How an update ended.
#[derive(Debug)]
pub enum Outcome {
    /// The successor runs the guest. The machine is not this process's any more.
    Updated(Report),
    /// The guest runs on in this process.
    RolledBack {
        /// Why.
        reason: Reason,
        /// The last step that was reached.
        after: Option<Step>,
        /// How long the guest stood still, if it did.
        pause: Option<Duration>,
    },
}

/// What an update took.
#[derive(Debug, Clone)]
pub struct Report {
    /// This process.
    pub predecessor_pid: u32,
    /// The process that runs the guest now, as it says itself.
    pub successor_pid: u32,
    /// When each step was reached, by either side.
    pub timeline: Timeline,
    /// Tokens of files that the successor did not retrieve: they are gone.
    pub unclaimed: Vec<u64>,
    /// What the successor's VMM tells.
    pub vmm: serde_json::Value,
    /// Why the successor did not tell it, if so. It has the machine, and lives; whether the guest is well it did not
    /// say.
    pub silent: Option<LinkError>,
}

impl Report {
    /// How long the guest stood still: from the predecessor's last step with a running guest to the successor's
    /// first.
    pub fn pause(&self) -> Duration {
        self.timeline.between(Step::Warm, Step::Running).unwrap_or_default()
    }
}

/// Why the guest runs on in the predecessor.
#[derive(Debug, Error)]
pub enum Reason {
    /// The other process is another user's.
    #[error("the successor is not to be trusted")]
    Peer(#[source] fdpass::PeerError),
    /// The successor is gone, silent, refuses, or says something else than is due.
    #[error("the successor did not get to {step}")]
    Link {
        /// The step that was to come.
        step: Step,
        /// Why.
        #[source]
        source: LinkError,
    },
    /// The successor says that it runs the guest, and has not taken the machine over.
    #[error("the successor says that it runs the guest, and has not taken the machine over")]
    NotTaken,
    /// The successor cannot read what it would get.
    #[error("the successor cannot read {}", .formats.join(", "))]
    Formats {
        /// The formats.
        formats: Vec<String>,
    },
    /// The machine does not get as far as its seal.
    #[error(transparent)]
    Departure(#[from] DepartureError),
    /// This process can have no more descriptors.
    #[error("cannot copy the machine's descriptors")]
    Descriptors(#[source] io::Error),
}

/// The guest runs nowhere.
#[derive(Debug, Error)]
pub enum Fatal {
    /// The update failed, and the guest could not be resumed.
    #[error("the update failed ({reason}), and the guest cannot be resumed")]
    Resume {
        /// Why the update failed.
        reason: Box<Reason>,
        /// Why the guest cannot be resumed.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The ownership word is destroyed: nobody can tell who may run the guest.
    #[error("the update failed ({reason}), and nobody can tell who owns the machine")]
    Ownership {
        /// Why the update failed.
        reason: Box<Reason>,
        /// What was found.
        #[source]
        source: UnsealError,
    },
    /// This process ran the guest, and the ownership word says otherwise: it must not run here.
    #[error("the machine is not this process's any more")]
    NotOurs(#[source] SealError),
    /// The successor took the machine over and died, and the guest with it.
    #[error("the successor took the machine over, and died")]
    Successor(#[source] LinkError),
}

/// One update, from the predecessor's side.
struct Update<'a, G: Guest> {
    departure: Departure<'a, G>,
    channel: &'a Channel,
    offer: &'a Offer<'a>,
    successor_pid: u32,
}

/// Hands the machine over to the successor at the other end of `channel`.
///
/// When this returns [`Outcome::Updated`], the successor runs the guest: what is left to do is to drop the
/// guest's VM and the machine. With [`Outcome::RolledBack`] the guest runs on here, and another update may
/// be tried.
///
/// # Errors
/// [`Fatal`] if the guest runs nowhere.
pub fn hand_over<G: Guest>(
    machine: &mut Machine,
    guest: &mut G,
    channel: &Channel,
    offer: &Offer<'_>,
    observer: &mut dyn Observer,
) -> Result<Outcome, Fatal> {
    let departure = Departure::new(machine, guest, observer);
    let mut update = Update { departure, channel, offer, successor_pid: 0 };
    match update.prepare().and_then(|()| update.pause_and_seal()) {
        Ok(()) => update.finish(),
        Err(reason) => update.go_back(reason),
    }
}

/// Has the process at the other end of `channel` get ready to take the machine over, as [`hand_over`] does, and goes
/// no further: it can read the formats, has accepted the memory and made its VM. The guest runs all the time.
///
/// # Errors
/// [`Reason`]: why that process could not take the machine over.
pub fn rehearse(
    machine: &mut Machine,
    channel: &Channel,
    offer: &Offer<'_>,
    observer: &mut dyn Observer,
) -> Result<(), Reason> {
    let mut nobody = NoGuest;
    let departure = Departure::new(machine, &mut nobody, observer);
    let mut update = Update { departure, channel, offer, successor_pid: 0 };
    let prepared = update.prepare();
    match &prepared {
        Ok(()) => {
            // It ends by itself, told or not.
            let soon = Deadline::after(DEATH);
            let _ = message::send(channel, &Message::Rehearsed, &[], soon);
        }
        Err(reason) => message::refuse(channel, &format!("the rehearsal is off: {reason}")),
    }
    update.departure.release_fds();
    prepared
}

/// In a rehearsal nobody asks the guest for anything.
struct NoGuest;

impl Guest for NoGuest {
    type Error = Infallible;

    fn pause(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, Infallible> {
        Ok(Vec::new())
    }

    fn resume(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl<G: Guest> Update<'_, G> {
    /// Takes in what the successor says of its steps, after `after` and up to `last`: of others it knows nothing.
    fn note(&mut self, steps: &[(String, u64)], after: Step, last: Step) {
        let known = steps.iter().filter_map(|(name, at)| Some((Step::named(name)?, *at)));
        known
            .filter(|(step, _)| *step > after && *step <= last)
            .for_each(|(step, at)| self.departure.note(step, at));
    }

    /// Everything that happens while the guest runs.
    fn prepare(&mut self) -> Result<(), Reason> {
        let deadline = Deadline::after(self.offer.timeouts.prepare);
        self.channel.require_same_user().map_err(Reason::Peer)?;
        self.departure.check_memory()?;
        self.departure.keep_fds(&self.offer.fds, &crate::CAPABILITIES)?;
        self.agree(deadline)?;
        let link = |step| move |source| Reason::Link { step, source };
        let fds = self.departure.machine().descriptors().map_err(Reason::Descriptors)?;
        for fds in fds.chunks(MAX_MESSAGE_FDS) {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            message::send(self.channel, &Message::Memory, &fds, deadline).map_err(link(Step::Received))?;
        }
        let warm = message::receive(self.channel, "warm", deadline).map_err(link(Step::Warm))?;
        if let Message::Warm { steps } = warm {
            self.note(&steps, Step::Offered, Step::Attached);
        }
        // Not when the successor was ready, but when it is known here: from now on the guest does not run for long.
        self.departure.reached(Step::Warm);
        Ok(())
    }

    /// Who are you, and can you read what you would get?
    fn agree(&mut self, deadline: Deadline) -> Result<(), Reason> {
        let machine = self.departure.machine();
        let proposal = Proposal {
            identity: machine.identity().to_string(),
            formats: machine.formats().into_iter().chain(self.offer.formats.clone()).collect(),
            regions: machine.regions().map(region::Region::len_bytes).collect(),
            descriptors: machine.fd_count(),
            vmm: self.offer.vmm.clone(),
            origin: Origin::Handed,
        };
        let mut reached = |step| self.departure.reached(step);
        self.successor_pid = proposal.agree(self.channel, &mut reached, deadline)?;
        Ok(())
    }

    /// Everything that happens while the guest stands still.
    fn pause_and_seal(&mut self) -> Result<(), Reason> {
        let epoch = self.departure.pause_and_seal()?;
        let deadline = Deadline::after(self.offer.timeouts.hand_over);
        let link = |source| Reason::Link { step: Step::Running, source };
        let sealed = Message::Sealed { epoch, left: None, vmm: serde_json::Value::Null };
        message::send(self.channel, &sealed, &[], deadline).map_err(link)?;
        self.told_of_running(deadline).map_err(link)
    }

    fn told_of_running(&mut self, deadline: Deadline) -> Result<(), LinkError> {
        if let Message::Running { steps } = message::receive(self.channel, "running", deadline)? {
            self.note(&steps, Step::Sealed, Step::Running);
        }
        Ok(())
    }

    fn told_of_settled(&mut self, deadline: Deadline) -> Result<(Vec<u64>, serde_json::Value), LinkError> {
        match message::receive(self.channel, "settled", deadline)? {
            Message::Settled { steps, unclaimed, vmm } => {
                self.note(&steps, Step::Running, Step::Settled);
                Ok((unclaimed, vmm))
            }
            _ => Ok((Vec::new(), serde_json::Value::Null)),
        }
    }

    /// The successor says that it runs the guest; the ownership word has to say so, too.
    fn finish(mut self) -> Result<Outcome, Fatal> {
        match self.departure.unseal() {
            Ok(()) => self.go_back(Reason::NotTaken),
            Err(UnsealError::Ownership(OwnershipError::Lost(_))) => self.report(true),
            Err(source) => Err(Fatal::Ownership { reason: Box::new(Reason::NotTaken), source }),
        }
    }

    /// The machine is the successor's. It has told that it runs, or still has to.
    fn report(mut self, told: bool) -> Result<Outcome, Fatal> {
        let deadline = Deadline::after(self.offer.timeouts.prepare);
        let running = if told { Ok(()) } else { self.told_of_running(deadline) };
        self.departure.reached(Step::Running);
        let settled = running.and_then(|()| self.told_of_settled(deadline));
        let (silent, (unclaimed, vmm)) = match settled {
            Ok(settled) => (None, settled),
            Err(error) => {
                if self.successor_is_dead() {
                    return Err(Fatal::Successor(error));
                }
                warn!(error = &error as &dyn StdError, "the successor runs the guest, and is silent");
                (Some(error), Default::default())
            }
        };
        self.departure.tell(Step::Settled);
        let (predecessor_pid, successor_pid) = (process::id(), self.successor_pid);
        let timeline = self.departure.leave();
        Ok(Outcome::Updated(Report { predecessor_pid, successor_pid, timeline, unclaimed, vmm, silent }))
    }

    /// Does nobody live who owns the machine? A process that dies closes its descriptors one after another, so
    /// what shows that it lives may outlast its end of the channel for a moment.
    fn successor_is_dead(&self) -> bool {
        let soon = Deadline::after(DEATH);
        loop {
            let (Ok(word), Some(region0)) =
                (self.departure.machine().ownership(), self.departure.machine().regions().next())
            else {
                return false;
            };
            match liveness::is_held(region0, word.nonce().get()) {
                Ok(true) if !soon.has_passed() => thread::sleep(Duration::from_millis(1)),
                held => return matches!(held, Ok(false)),
            }
        }
    }

    /// The guest runs on here, unless the successor was faster.
    fn go_back(mut self, reason: Reason) -> Result<Outcome, Fatal> {
        if let Reason::Departure(DepartureError::Seal(source @ SealError::Ownership(_))) = reason {
            return Err(Fatal::NotOurs(source));
        }
        let after = self.departure.timeline().reached().last().map(|(step, _)| *step);
        match self.departure.unseal() {
            Ok(()) => {}
            Err(UnsealError::Ownership(OwnershipError::Lost(lost))) => {
                // It owns the machine, though it could not say so: an update, with a poor report.
                warn!(reason = &reason as &dyn StdError, word = ?lost.found, "the successor owns the machine");
                return self.report(false);
            }
            Err(source) => return Err(Fatal::Ownership { reason: Box::new(reason), source }),
        }
        match self.departure.go_back() {
            Ok(pause) => {
                message::refuse(self.channel, &format!("the update is off: {reason}"));
                warn!(reason = &reason as &dyn StdError, ?after, "the update is off; the guest runs on here");
                Ok(Outcome::RolledBack { reason, after, pause })
            }
            Err(source) => Err(Fatal::Resume { reason: Box::new(reason), source: Box::new(source) }),
        }
    }
}
