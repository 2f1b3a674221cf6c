//! The predecessor's side of an update, as far as all carriers share it.

use std::error::Error as StdError;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use abi::foreign::FdName;
use fdpass::monotonic_ns;
use gmem::Freeze;
use gmem::FreezeError;
use gmem::Held;
use gmem::UnfitError;
use region::PageSize;
use region::WarmError;
use thiserror::Error;
use tracing::warn;

use super::Capabilities;
use super::Guest;
use super::Observer;
use super::Step;
use super::Timeline;
use crate::KeepError;
use crate::Machine;
use crate::SealError;
use crate::UnsealError;

/// Why a machine does not get as far as its seal.
#[derive(Debug, Error)]
pub enum DepartureError {
    /// Descriptors cannot go with the machine.
    #[error("cannot hand over what goes with the machine")]
    Fds(#[source] KeepError),
    /// A page of guest memory is lost, or the guest's alone.
    #[error("the machine cannot be handed over")]
    Memory(#[source] UnfitError),
    /// Guest memory could not get all of its pages.
    #[error("cannot fill the guest's memory")]
    Fill(#[source] WarmError),
    /// Pages of guest memory were given back while it was to be filled, again and again.
    #[error("guest memory does not stay whole: its pages are given back all the time")]
    NotWhole,
    /// Guest memory could not be frozen.
    #[error("cannot freeze the guest's memory")]
    Freeze(#[source] FreezeError),
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
}

/// A machine on its way to the next program: what has been done to it and to its guest, and how to undo it.
pub struct Departure<'a, G: Guest> {
    machine: &'a mut Machine,
    guest: &'a mut G,
    observer: &'a mut dyn Observer,
    timeline: Timeline,
    /// They stand until it is decided who runs the guest.
    freezes: Vec<Freeze>,
    /// When the guest was told to stand still.
    paused_ns: Option<u64>,
    sealed: bool,
}

impl<'a, G: Guest> Departure<'a, G> {
    /// Nothing has been done yet.
    pub fn new(machine: &'a mut Machine, guest: &'a mut G, observer: &'a mut dyn Observer) -> Self {
        let (timeline, freezes) = (Timeline::default(), Vec::new());
        Self { machine, guest, observer, timeline, freezes, paused_ns: None, sealed: false }
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        self.machine
    }

    /// The guest.
    pub fn guest(&self) -> &G {
        self.guest
    }

    /// The steps that this side knows of.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The machine is the successor's: ends the guest's memory in this process before the freezes end, so that whatever
    /// still waits at a hole adds no page under the other's guest. Gives the steps that this side knew of at the end.
    pub fn leave(self) -> Timeline {
        // Else nobody can wait, and it ends with the machine.
        if self.freezes.iter().any(|freeze| freeze.held() == Held::Userfaultfd) {
            self.machine.owners.clear();
        }
        self.timeline
    }

    /// Notes that a step is reached now, and tells of it.
    pub fn reached(&mut self, step: Step) {
        self.timeline.note(step, monotonic_ns());
        self.observer.reached(step);
    }

    /// Tells of a step, and does not note it: the other side says when it was.
    pub fn tell(&mut self, step: Step) {
        self.observer.reached(step);
    }

    /// Notes a step that the other side tells of: nanoseconds on the clock of the [`Timeline`].
    pub fn note(&mut self, step: Step, at_ns: u64) {
        self.timeline.note(step, at_ns);
    }

    /// Refuses a machine whose memory has a poisoned page, or a private one. To be asked while the guest runs: it looks at all page tables.
    ///
    /// # Errors
    /// [`DepartureError::Memory`]
    pub fn check_memory(&self) -> Result<(), DepartureError> {
        let check = |memory: &crate::Memory| memory.inode.check_fit().map_err(DepartureError::Memory);
        self.machine.memories().iter().try_for_each(check)
    }

    /// Has these descriptors go with the machine.
    ///
    /// # Errors
    /// [`DepartureError::Fds`] if one cannot go.
    pub fn keep_fds(
        &mut self,
        fds: &[(FdName, BorrowedFd<'_>)],
        carrier: &Capabilities,
    ) -> Result<(), DepartureError> {
        self.machine.keep_fds(fds, carrier).map_err(DepartureError::Fds)
    }

    /// No descriptor goes with the machine after all.
    pub fn release_fds(&mut self) {
        if let Err(error) = self.machine.release_fds() {
            warn!(
                error = &error as &dyn StdError,
                "the descriptors that were to go stay in the session for now"
            );
        }
    }

    /// The predecessor's half of the pause. The freeze comes right before it: who faults on a hole from then on stands
    /// still, and that is to be as short as the pause. Gives the seal's epoch.
    ///
    /// # Errors
    /// [`DepartureError`]: what was done until then stands until [`go_back`](Self::go_back).
    pub fn pause_and_seal(&mut self) -> Result<u32, DepartureError> {
        let freeze = |memory: &crate::Memory| memory.inode.freeze().map_err(DepartureError::Freeze);
        for memory in self.machine.memories() {
            self.freezes.push(freeze(memory)?);
        }
        let failed = |step| move |source: G::Error| DepartureError::Guest { step, source: Box::new(source) };
        self.paused_ns = Some(monotonic_ns());
        self.guest.pause().map_err(failed(Step::Paused))?;
        self.reached(Step::Paused);
        let states = self.guest.save().map_err(failed(Step::Saved))?;
        self.reached(Step::Saved);
        let epoch = self.machine.seal(states).map_err(DepartureError::Seal)?;
        self.sealed = true;
        self.reached(Step::Sealed);
        Ok(epoch)
    }

    /// Gives guest memory all its pages and freezes it, while the guest runs: for a carrier whose kernel fills holes behind the
    /// back of who waits at one.
    ///
    /// # Errors
    /// [`DepartureError`]: what was done until then stands until [`go_back`](Self::go_back).
    pub fn fill_and_freeze(&mut self) -> Result<(), DepartureError> {
        for memory in self.machine.memories() {
            let freeze = freeze_whole(memory)?;
            self.freezes.push(freeze);
        }
        Ok(())
    }

    /// Takes the machine back, if it is sealed: the first step back.
    ///
    /// # Errors
    /// [`UnsealError`]: the guest must not run here then.
    pub fn unseal(&mut self) -> Result<(), UnsealError> {
        if self.sealed {
            self.machine.unseal()?;
            self.sealed = false;
        }
        Ok(())
    }

    /// Has the guest run on here. The machine has to be [unsealed](Self::unseal). Gives how long the guest stood still,
    /// if it did.
    ///
    /// # Errors
    /// The guest's own, if it cannot be resumed: it is lost then.
    pub fn go_back(&mut self) -> Result<Option<Duration>, G::Error> {
        self.release_fds();
        // Nobody waits at a hole any more when the guest runs on.
        self.freezes.clear();
        let Some(paused_ns) = self.paused_ns else {
            return Ok(None);
        };
        self.guest.resume()?;
        Ok(Some(Duration::from_nanos(monotonic_ns().saturating_sub(paused_ns))))
    }
}

/// How often memory is filled that is punched meanwhile.
const FILL_TRIES: u32 = 3;

/// A freeze that holds no fault, since there is no hole.
fn freeze_whole(memory: &crate::Memory) -> Result<Freeze, DepartureError> {
    for _ in 0..FILL_TRIES {
        let whole = memory.inode.mapping().region().is_whole();
        if !whole.is_ok_and(|whole| whole) {
            memory.inode.mapping().warm(PageSize::Small, &mut |_, _| {}).map_err(DepartureError::Fill)?;
        }
        let freeze = memory.inode.freeze().map_err(DepartureError::Freeze)?;
        if freeze.held() != Held::Userfaultfd {
            return Ok(freeze);
        }
    }
    Err(DepartureError::NotWhole)
}
