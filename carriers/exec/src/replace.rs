//! The program that runs the guest, and gives its process up.

use std::error::Error as StdError;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::time::Duration;

use fdpass::monotonic_ns;
use gmem::Freeze;
use gmem::FreezeError;
use holder::HolderError;
use holder::Lease;
use machine::FdName;
use machine::KeepError;
use machine::Machine;
use machine::SealError;
use machine::UnsealError;
use machine::update::Guest;
use machine::update::Observer;
use machine::update::Step;
use machine::update::Timeline;
use socket::Program;
use socket::ProgramError;
use thiserror::Error;
use tracing::warn;

use crate::CAPABILITIES;
use crate::handoff::Handoff;
use crate::handoff::HandoffError;
use crate::handoff::PROTOCOL;

/// What goes along beside the machine.
#[derive(Debug, Default)]
pub struct Offer<'a> {
    /// Other descriptors that go with the machine, each with a name.
    pub fds: Vec<(FdName, BorrowedFd<'a>)>,
    /// Anything that the VMM tells its successor.
    pub vmm: serde_json::Value,
    /// What the new program is told before the number of the hand-off's descriptor.
    pub arguments: Vec<String>,
}

/// The guest runs on in this program.
#[derive(Debug)]
pub struct RolledBack {
    /// Why.
    pub reason: Reason,
    /// How long the guest stood still, if it did.
    pub pause: Option<Duration>,
}

/// Why the program was not replaced.
#[derive(Debug, Error)]
pub enum Reason {
    /// Descriptors cannot go with the machine.
    #[error("cannot hand over what goes with the machine")]
    Fds(#[source] KeepError),
    /// This process can have no more descriptors, or they cannot go along.
    #[error("cannot have descriptors go into the next program")]
    Descriptors(#[source] io::Error),
    /// Guest memory could not be frozen.
    #[error("cannot freeze the guest's memory")]
    Freeze(#[source] FreezeError),
    /// The old address space could not be kept.
    #[error("cannot keep the old address space for later")]
    Holder(#[source] HolderError),
    /// The guest could not be paused or saved.
    #[error("cannot get to {step}")]
    Guest {
        /// The step that was to come.
        step: Step,
        /// Why.
        #[source]
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The machine could not be sealed.
    #[error("cannot seal the machine")]
    Seal(#[source] SealError),
    /// The hand-off could not be written.
    #[error("cannot write the hand-off")]
    Handoff(#[source] HandoffError),
    /// The program could not be executed, or looked at.
    #[error("cannot execute the next program")]
    Program(#[source] ProgramError),
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
    /// The machine could not be taken back: nobody else should have it.
    #[error("the update failed ({reason}), and the machine cannot be taken back")]
    Ownership {
        /// Why the update failed.
        reason: Box<Reason>,
        /// What was found.
        #[source]
        source: UnsealError,
    },
}

/// Gives the machine to `program`, which this process executes. Returns only if that fails: the guest then runs on here.
/// The descriptors of the old VM are closed and the old address space is taken down later, when the new program has
/// [settled](crate::Running::settle).
///
/// # Errors
/// [`Fatal`] if the guest runs nowhere.
pub fn replace<G: Guest>(
    machine: &mut Machine,
    guest: &mut G,
    program: &Program,
    offer: &Offer<'_>,
    observer: &mut dyn Observer,
) -> Result<RolledBack, Fatal> {
    let mut update = Update {
        machine,
        guest,
        observer,
        timeline: Timeline::default(),
        freezes: Vec::new(),
        paused_ns: None,
        sealed: false,
    };
    let reason = update.go(program, offer);
    update.go_back(reason)
}

struct Update<'a, G: Guest> {
    machine: &'a mut Machine,
    guest: &'a mut G,
    observer: &'a mut dyn Observer,
    timeline: Timeline,
    freezes: Vec<Freeze>,
    paused_ns: Option<u64>,
    sealed: bool,
}

/// What goes into the next program.
struct Luggage {
    descriptors: Vec<OwnedFd>,
    lease: Lease,
    old: Program,
}

impl<G: Guest> Update<'_, G> {
    fn reached(&mut self, step: Step) {
        self.timeline.note(step, monotonic_ns());
        self.observer.reached(step);
    }

    /// Gives why it has come back.
    fn go(&mut self, program: &Program, offer: &Offer<'_>) -> Reason {
        let luggage = match self.prepare(offer).and_then(|luggage| self.pause_and_seal().map(|()| luggage)) {
            Ok(luggage) => luggage,
            Err(reason) => return reason,
        };
        let handoff = match self.handoff(&luggage, offer).write() {
            Ok(handoff) => handoff,
            Err(error) => return Reason::Handoff(error),
        };
        let all = luggage.descriptors.iter().map(inherit);
        let inherited = all
            .chain([inherit(&luggage.lease), inherit(&luggage.old), inherit(&handoff)])
            .collect::<io::Result<()>>();
        if let Err(error) = inherited {
            return Reason::Descriptors(error);
        }
        let number = handoff.as_raw_fd().to_string();
        Reason::Program(program.execute(offer.arguments.iter().chain([&number])))
    }

    /// Everything that happens while the guest runs.
    fn prepare(&mut self, offer: &Offer<'_>) -> Result<Luggage, Reason> {
        self.machine.keep_fds(&offer.fds, &CAPABILITIES).map_err(Reason::Fds)?;
        let descriptors = self.machine.descriptors().map_err(Reason::Descriptors)?;
        let old = Program::running().map_err(Reason::Program)?;
        // Of all descriptors those of KVM are what takes long to close.
        let lease = holder::start(|link| link.starts_with("anon_inode:kvm")).map_err(Reason::Holder)?;
        self.reached(Step::Warm);
        Ok(Luggage { descriptors, lease, old })
    }

    fn pause_and_seal(&mut self) -> Result<(), Reason> {
        let failed = |step| move |source: G::Error| Reason::Guest { step, source: Box::new(source) };
        // Right before the pause: who faults on a hole from now on stands still.
        let freeze = |memory: &machine::Memory| memory.inode.freeze().map_err(Reason::Freeze);
        self.freezes = self.machine.memories().iter().map(freeze).collect::<Result<_, _>>()?;
        self.paused_ns = Some(monotonic_ns());
        self.guest.pause().map_err(failed(Step::Paused))?;
        self.reached(Step::Paused);
        let states = self.guest.save().map_err(failed(Step::Saved))?;
        self.reached(Step::Saved);
        self.machine.seal(states).map_err(Reason::Seal)?;
        self.sealed = true;
        self.reached(Step::Sealed);
        Ok(())
    }

    fn handoff(&self, luggage: &Luggage, offer: &Offer<'_>) -> Handoff {
        let number = |fd: &OwnedFd| fd.as_raw_fd();
        let sizes: Vec<u64> = self.machine.regions().map(region::Region::len_bytes).collect();
        let (regions, fds) = luggage.descriptors.split_at(sizes.len().min(luggage.descriptors.len()));
        let raw = |fd: BorrowedFd<'_>| -> RawFd { fd.as_raw_fd() };
        let steps = self.timeline.reached().iter();
        Handoff {
            protocol: PROTOCOL,
            regions: regions.iter().map(number).zip(sizes).collect(),
            fds: fds.iter().map(number).collect(),
            lease: Some(raw(std::os::fd::AsFd::as_fd(&luggage.lease))),
            old: (raw(std::os::fd::AsFd::as_fd(&luggage.old)), luggage.old.path().to_owned()),
            sealed: self.machine.word().bits(),
            steps: steps.map(|(step, at)| (step.name().to_owned(), *at)).collect(),
            stopped_ns: self.guest.stopped_ns(),
            vmm: offer.vmm.clone(),
            failed: None,
        }
    }

    fn go_back(mut self, reason: Reason) -> Result<RolledBack, Fatal> {
        if self.sealed
            && let Err(source) = self.machine.unseal()
        {
            return Err(Fatal::Ownership { reason: Box::new(reason), source });
        }
        if let Err(error) = self.machine.release_fds() {
            warn!(
                error = &error as &dyn StdError,
                "the descriptors that were to go stay in the session for now"
            );
        }
        self.freezes.clear();
        let mut pause = None;
        if let Some(paused_ns) = self.paused_ns {
            if let Err(source) = self.guest.resume() {
                return Err(Fatal::Resume { reason: Box::new(reason), source: Box::new(source) });
            }
            pause = Some(Duration::from_nanos(monotonic_ns().saturating_sub(paused_ns)));
        }
        warn!(reason = &reason as &dyn StdError, "the update is off; the guest runs on here");
        Ok(RolledBack { reason, pause })
    }
}

fn inherit(fd: impl std::os::fd::AsFd) -> io::Result<()> {
    holder::inherit(fd, true)
}
