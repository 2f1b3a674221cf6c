//! The program that this process executes after another.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use fdpass::monotonic_ns;
use holder::Lease;
use machine::AttachError;
use machine::ClaimError;
use machine::Claimed;
use machine::Incoming;
use machine::Machine;
use machine::OfferedRegion;
use machine::OwnershipWord;
use machine::SettleError;
use machine::StateName;
use machine::ownership::OwnershipError;
use machine::update::Observer;
use machine::update::Step;
use machine::update::Timeline;
use socket::Program;
use socket::ProgramError;
use thiserror::Error;

use crate::handoff::Handoff;
use crate::handoff::HandoffError;

/// Why this program cannot run the machine.
#[derive(Debug, Error)]
pub enum LifeError {
    /// There is no hand-off.
    #[error("cannot find what the program before left")]
    Handoff(#[source] HandoffError),
    /// A descriptor that the hand-off names was not inherited.
    #[error("descriptor {number}, which the hand-off names, did not come")]
    Descriptor {
        /// Its number.
        number: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The regions are not those of a machine.
    #[error("cannot accept the machine")]
    Attach(#[source] AttachError),
    /// The machine cannot be claimed, or taken back.
    #[error("cannot claim the machine")]
    Claim(#[source] ClaimError),
    /// The machine is another's.
    #[error("the machine is not this process's")]
    Run(#[source] OwnershipError),
    /// The hand-off's ownership word is none.
    #[error("the hand-off's ownership word cannot be read")]
    Word,
    /// The program before cannot be executed again: the guest runs nowhere.
    #[error("the program before cannot be executed again, after this one failed: {reason}")]
    Back {
        /// Why this program failed.
        reason: String,
        /// Why that one cannot be executed.
        #[source]
        source: ProgramError,
    },
    /// The descriptors cannot go back: the guest runs nowhere.
    #[error("cannot go back to the program before, after this one failed: {reason}")]
    BackDescriptors {
        /// Why this program failed.
        reason: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The hand-off cannot be written again: the guest runs nowhere.
    #[error("cannot write the hand-off again, after this program failed: {reason}")]
    BackHandoff {
        /// Why this program failed.
        reason: String,
        /// Why.
        #[source]
        source: HandoffError,
    },
}

/// What an update took.
#[derive(Debug, Clone)]
pub struct Report {
    /// When each step was reached, by either program.
    pub timeline: Timeline,
    /// When the last vCPU stopped.
    pub stopped_ns: Option<u64>,
    /// Tokens of files that were not retrieved: they are gone.
    pub unclaimed: Vec<u64>,
    /// Why this is the program before again, if it is.
    pub failed: Option<String>,
}

/// The way back to the program before, as long as this one has not run the machine.
#[derive(Debug)]
pub struct WayBack {
    handoff: Handoff,
    descriptors: Vec<OwnedFd>,
    old: Program,
    arguments: Vec<String>,
}

impl WayBack {
    /// Has this process execute the program before again, which runs the guest on. Returns only if that fails: then the
    /// guest is lost.
    pub fn take(self, reason: &str) -> LifeError {
        let Self { mut handoff, descriptors, old, arguments } = self;
        let reason = reason.to_owned();
        let count = handoff.regions.len();
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        handoff.regions.iter_mut().zip(&numbers).for_each(|(region, number)| region.0 = *number);
        handoff.fds = numbers.into_iter().skip(count).collect();
        handoff.old.0 = old.as_fd().as_raw_fd();
        // The old address space goes with this one.
        handoff.lease = None;
        handoff.failed = Some(reason.clone());
        let file = match handoff.write() {
            Ok(file) => file,
            Err(source) => return LifeError::BackHandoff { reason, source },
        };
        let all = descriptors.iter().map(|fd| holder::inherit(fd, true));
        let inherited: io::Result<()> =
            all.chain([holder::inherit(&old, true), holder::inherit(&file, true)]).collect();
        if let Err(source) = inherited {
            return LifeError::BackDescriptors { reason, source };
        }
        let number = file.as_raw_fd().to_string();
        let source = old.execute(arguments.iter().chain([&number]));
        LifeError::Back { reason, source }
    }
}

/// A program that cannot take up what the one before left, and its way back, if it has one.
#[derive(Debug)]
pub struct Failed {
    /// Why.
    pub error: LifeError,
    /// The way back.
    pub way_back: Option<WayBack>,
}

/// A machine that the program before has sealed, mapped here. The VMM makes its VM now.
#[derive(Debug)]
pub struct Life {
    incoming: Incoming,
    lease: Option<Lease>,
    sealed: OwnershipWord,
    timeline: Timeline,
    stopped_ns: Option<u64>,
    vmm: serde_json::Value,
    failed: Option<String>,
}

fn take(number: RawFd) -> Result<OwnedFd, LifeError> {
    holder::inherited(number).map_err(|source| LifeError::Descriptor { number, source })
}

impl Life {
    /// Takes what the program before left in the descriptor with this number. With it comes the way back, unless this is
    /// the way back already; `arguments` are what the program before is to be told then, before a number like this.
    ///
    /// # Errors
    /// [`Failed`], with the way back if there is one.
    pub fn begin(
        number: RawFd,
        arguments: Vec<String>,
        observer: &mut dyn Observer,
    ) -> Result<(Self, Option<WayBack>), Box<Failed>> {
        let none = |error| Failed { error, way_back: None };
        let (handoff, descriptors, old) = receive(number).map_err(none)?;
        let copies: io::Result<Vec<OwnedFd>> = descriptors.iter().map(OwnedFd::try_clone).collect();
        let way_back = match (&handoff.failed, copies) {
            (None, Ok(descriptors)) => {
                Some(WayBack { handoff: handoff.clone(), descriptors, old, arguments })
            }
            _ => None,
        };
        match Self::attach(handoff, descriptors, observer) {
            Ok(life) => Ok((life, way_back)),
            Err(error) => Err(Box::new(Failed { error, way_back })),
        }
    }

    fn attach(
        handoff: Handoff,
        mut descriptors: Vec<OwnedFd>,
        observer: &mut dyn Observer,
    ) -> Result<Self, LifeError> {
        let mut timeline = Timeline::default();
        let known = handoff.steps.iter().filter_map(|(name, at)| Some((Step::named(name)?, *at)));
        known.filter(|(step, _)| *step <= Step::Sealed).for_each(|(step, at)| timeline.note(step, at));
        let lease = handoff.lease.map(take).transpose()?.map(Lease::from_fd);
        let others = descriptors.split_off(handoff.regions.len());
        let regions = descriptors.into_iter().zip(&handoff.regions);
        let regions = regions.map(|(fd, (_, len_bytes))| OfferedRegion { fd, len_bytes: *len_bytes });
        let incoming = Incoming::attach(regions.collect(), others).map_err(LifeError::Attach)?;
        observer.reached(Step::Attached);
        Ok(Self {
            incoming,
            lease,
            sealed: OwnershipWord::from_bits(handoff.sealed).map_err(|_| LifeError::Word)?,
            timeline,
            stopped_ns: handoff.stopped_ns,
            vmm: handoff.vmm,
            failed: handoff.failed,
        })
    }

    /// What the VMM before tells.
    pub fn vmm(&self) -> &serde_json::Value {
        &self.vmm
    }

    /// The machine.
    pub fn incoming(&mut self) -> &mut Incoming {
        &mut self.incoming
    }

    /// Claims the machine, or begins to take it back, if the program after this one has failed.
    ///
    /// # Errors
    /// [`LifeError::Claim`]
    pub fn claim(self, observer: &mut dyn Observer) -> Result<Handed, LifeError> {
        let claimed = match self.failed {
            None => self.incoming.claim(self.sealed.epoch()),
            Some(_) => self.incoming.reclaim(self.sealed),
        };
        let claimed = claimed.map_err(LifeError::Claim)?;
        let mut timeline = self.timeline;
        reached(&mut timeline, observer, Step::Claimed);
        let after = After { lease: self.lease, timeline, stopped_ns: self.stopped_ns, failed: self.failed };
        Ok(Handed { claimed, after })
    }
}

fn receive(number: RawFd) -> Result<(Handoff, Vec<OwnedFd>, Program), LifeError> {
    let handoff = Handoff::read(take(number)?).map_err(LifeError::Handoff)?;
    let numbers = handoff.regions.iter().map(|(number, _)| number).chain(&handoff.fds);
    let descriptors = numbers.map(|number| take(*number)).collect::<Result<_, _>>()?;
    let old = Program::opened(handoff.old.1.clone(), take(handoff.old.0)?);
    Ok((handoff, descriptors, old))
}

fn reached(timeline: &mut Timeline, observer: &mut dyn Observer, step: Step) {
    timeline.note(step, monotonic_ns());
    observer.reached(step);
}

#[derive(Debug)]
struct After {
    lease: Option<Lease>,
    timeline: Timeline,
    stopped_ns: Option<u64>,
    failed: Option<String>,
}

/// The machine is this program's to load.
#[derive(Debug)]
pub struct Handed {
    claimed: Claimed,
    after: After,
}

impl Handed {
    /// The states that were sealed.
    pub fn states(&self) -> &BTreeMap<StateName, Vec<u8>> {
        self.claimed.states()
    }

    /// Takes the machine over: the point of no return. The guest may run here from now on.
    ///
    /// # Errors
    /// [`LifeError::Run`]: the guest must not run here.
    pub fn run(self, observer: &mut dyn Observer) -> Result<Running, LifeError> {
        let Self { claimed, mut after } = self;
        reached(&mut after.timeline, observer, Step::Loaded);
        let machine = claimed.run().map_err(LifeError::Run)?;
        reached(&mut after.timeline, observer, Step::Running);
        Ok(Running { machine, after })
    }
}

/// The machine is this process's again.
#[derive(Debug)]
pub struct Running {
    machine: Machine,
    after: After,
}

impl Running {
    /// The machine.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Ends the session that was received, makes it stand again in this life, and lets the old address space go. Call it
    /// once the guest runs.
    pub fn settle(self, observer: &mut dyn Observer) -> (Machine, Report, Result<(), SettleError>) {
        let Self { mut machine, after } = self;
        let settled = machine.settle();
        let mut timeline = after.timeline;
        reached(&mut timeline, observer, Step::Settled);
        drop(after.lease);
        let (unclaimed, settled) = match settled {
            Ok(finished) => (finished.unclaimed.iter().map(|token| token.0).collect(), Ok(())),
            Err(error) => (Vec::new(), Err(error)),
        };
        let report = Report { timeline, stopped_ns: after.stopped_ns, unclaimed, failed: after.failed };
        (machine, report, settled)
    }
}
