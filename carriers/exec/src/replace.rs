//! The program that runs the guest, and gives its process up.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::time::Duration;

use holder::HolderError;
use holder::Lease;
use machine::FdName;
use machine::Machine;
use machine::SealError;
use machine::UnsealError;
use machine::update::Departure;
use machine::update::DepartureError;
use machine::update::Guest;
use machine::update::Observer;
use machine::update::Step;
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
    /// The machine does not get as far as its seal.
    #[error(transparent)]
    Departure(#[from] DepartureError),
    /// This process can have no more descriptors, or they cannot go along.
    #[error("cannot have descriptors go into the next program")]
    Descriptors(#[source] io::Error),
    /// The old address space could not be kept.
    #[error("cannot keep the old address space for later")]
    Holder(#[source] HolderError),
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
    /// This process ran the guest, and the ownership word says otherwise: it must not run here.
    #[error("the machine is not this process's any more")]
    NotOurs(#[source] SealError),
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
    let mut departure = Departure::new(machine, guest, observer);
    let Err(reason) = go(&mut departure, program, offer);
    go_back(departure, reason)
}

/// What goes into the next program.
struct Luggage {
    descriptors: Vec<OwnedFd>,
    lease: Lease,
    old: Program,
}

/// Comes back only if it fails.
fn go<G: Guest>(
    departure: &mut Departure<'_, G>,
    program: &Program,
    offer: &Offer<'_>,
) -> Result<Infallible, Reason> {
    let luggage = prepare(departure, offer)?;
    departure.pause_and_seal()?;
    let handoff = handoff(departure, &luggage, offer).write().map_err(Reason::Handoff)?;
    let all = luggage.descriptors.iter().map(inherit);
    let inherited = all
        .chain([inherit(&luggage.lease), inherit(&luggage.old), inherit(&handoff)])
        .collect::<io::Result<()>>();
    inherited.map_err(Reason::Descriptors)?;
    let number = handoff.as_raw_fd().to_string();
    Err(Reason::Program(program.execute(offer.arguments.iter().chain([&number]))))
}

/// Everything that happens while the guest runs.
fn prepare<G: Guest>(departure: &mut Departure<'_, G>, offer: &Offer<'_>) -> Result<Luggage, Reason> {
    departure.keep_fds(&offer.fds, &CAPABILITIES)?;
    let descriptors = departure.machine().descriptors().map_err(Reason::Descriptors)?;
    let old = Program::running().map_err(Reason::Program)?;
    // Of all descriptors those of KVM are what takes long to close.
    let lease = holder::start(|link| link.starts_with("anon_inode:kvm")).map_err(Reason::Holder)?;
    departure.reached(Step::Warm);
    Ok(Luggage { descriptors, lease, old })
}

fn handoff<G: Guest>(departure: &Departure<'_, G>, luggage: &Luggage, offer: &Offer<'_>) -> Handoff {
    let number = |fd: &OwnedFd| fd.as_raw_fd();
    let machine = departure.machine();
    let sizes: Vec<u64> = machine.regions().map(region::Region::len_bytes).collect();
    let (regions, fds) = luggage.descriptors.split_at(sizes.len().min(luggage.descriptors.len()));
    let raw = |fd: BorrowedFd<'_>| -> RawFd { fd.as_raw_fd() };
    let steps = departure.timeline().reached().iter();
    Handoff {
        protocol: PROTOCOL,
        regions: regions.iter().map(number).zip(sizes).collect(),
        fds: fds.iter().map(number).collect(),
        lease: Some(raw(std::os::fd::AsFd::as_fd(&luggage.lease))),
        old: (raw(std::os::fd::AsFd::as_fd(&luggage.old)), luggage.old.path().to_owned()),
        sealed: machine.word().bits(),
        steps: steps.map(|(step, at)| (step.name().to_owned(), *at)).collect(),
        stopped_ns: departure.guest().stopped_ns(),
        vmm: offer.vmm.clone(),
        failed: None,
    }
}

fn go_back<G: Guest>(mut departure: Departure<'_, G>, reason: Reason) -> Result<RolledBack, Fatal> {
    if let Reason::Departure(DepartureError::Seal(source @ SealError::Ownership(_))) = reason {
        return Err(Fatal::NotOurs(source));
    }
    if let Err(source) = departure.unseal() {
        return Err(Fatal::Ownership { reason: Box::new(reason), source });
    }
    match departure.go_back() {
        Ok(pause) => {
            warn!(reason = &reason as &dyn StdError, "the update is off; the guest runs on here");
            Ok(RolledBack { reason, pause })
        }
        Err(source) => Err(Fatal::Resume { reason: Box::new(reason), source: Box::new(source) }),
    }
}

fn inherit(fd: impl std::os::fd::AsFd) -> io::Result<()> {
    holder::inherit(fd, true)
}
