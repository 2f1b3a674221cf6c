//! The side that runs the guest, and gives it up to the next kernel.

use std::os::fd::AsFd as _;
use std::time::Duration;
use std::time::Instant;

use custody::LostError;
use custody::Note;
use custody::Offer;
use liveupdate::Outgoing;
use liveupdate::PreserveError;
use liveupdate::moment::TscRate;
use machine::Machine;
use machine::update::Guest;
use machine::update::Observer;
use machine::update::Timeline;
use region::Store;
use thiserror::Error;

use crate::FIRST_REGION_TOKEN;
use crate::NOTE_TOKEN;
use crate::VM_TOKEN;

/// What was preserved, and what that took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preserved {
    /// Bytes of all regions and the note.
    pub bytes: u64,
    /// Filling holes and freezing, while the guest ran.
    pub fill: Duration,
    /// The kernel's own part: all its calls together; zero without a session.
    pub kernel: Duration,
}

/// Why a machine cannot leave. The guest runs on, or will once it has [gone back](Leaving::go_back).
#[derive(Debug, Error)]
pub enum LeaveError {
    /// The machine does not get as far.
    #[error(transparent)]
    Leave(#[from] custody::LeaveError),
    /// The kernel does not take a region.
    #[error("the kernel does not preserve region {index} of the machine")]
    Region {
        /// Its number; 0 is metadata.
        index: usize,
        /// Why.
        #[source]
        source: PreserveError,
    },
    /// The machine's memory is a guest_memfd, which goes with its VM object alone, and there is none.
    #[error("the machine's memory belongs to a VM object of another process, or of none")]
    NoVm,
    /// The VM object's descriptor cannot be copied.
    #[error("cannot copy the descriptor of the machine's VM object")]
    Vm(#[source] std::io::Error),
    /// The kernel does not take the VM object.
    #[error("the kernel does not preserve the VM object that the machine's memory belongs to")]
    PreserveVm(#[source] PreserveError),
    /// The kernel does not take the note.
    #[error("the kernel does not preserve the machine's note")]
    PreserveNote(#[source] PreserveError),
}

/// A machine that is about to leave for the next kernel. To be ended by [`go_back`](Leaving::go_back), or by the kernel.
pub struct Leaving<'a, G: Guest> {
    leaving: custody::Leaving<'a, G>,
    /// Its end undoes what the kernel did.
    session: Option<Outgoing>,
}

impl<'a, G: Guest> Leaving<'a, G> {
    /// Nothing has been done yet. Without a session it is a rehearsal: the kernel is not asked for anything.
    pub fn new(
        machine: &'a mut Machine,
        guest: &'a mut G,
        session: Option<Outgoing>,
        observer: &'a mut dyn Observer,
    ) -> Self {
        Self { leaving: custody::Leaving::new(machine, guest, observer), session }
    }

    /// Everything that is done while the guest runs: fills and freezes its memory, and has the kernel preserve it.
    ///
    /// # Errors
    /// [`LeaveError`]
    pub fn preserve(&mut self, offer: Offer) -> Result<Preserved, LeaveError> {
        self.leaving.check_memory()?;
        let begun = Instant::now();
        self.leaving.fill_and_freeze()?;
        let fill = begun.elapsed();
        self.leaving.write_note(offer)?;
        let mut bytes = 0;
        let begun = Instant::now();
        self.offer_vm()?;
        for (index, region) in self.leaving.machine().regions().enumerate() {
            bytes += region.len_bytes();
            let Some(session) = &mut self.session else { continue };
            let token = FIRST_REGION_TOKEN + index as u64;
            session.preserve(token, region.as_fd()).map_err(|source| LeaveError::Region { index, source })?;
        }
        if let (Some(session), Some(note)) = (&mut self.session, self.leaving.note_file()) {
            session.preserve(NOTE_TOKEN, note.as_fd()).map_err(LeaveError::PreserveNote)?;
        }
        let kernel = if self.session.is_some() { begun.elapsed() } else { Duration::ZERO };
        Ok(Preserved { bytes, fill, kernel })
    }

    /// A guest_memfd can go where the kernel takes its VM object, too. Linux 7.3 takes neither.
    fn offer_vm(&mut self) -> Result<(), LeaveError> {
        let is_guest_memfd = |region: &region::Region| region.store() == Store::GuestMemfd;
        let Some(session) = &mut self.session else { return Ok(()) };
        if !self.leaving.machine().regions().any(is_guest_memfd) {
            return Ok(());
        }
        let vm = self.leaving.machine().vm_object().ok_or(LeaveError::NoVm)?;
        let vm = kvm::descriptor(&vm).map_err(LeaveError::Vm)?;
        session.preserve(VM_TOKEN, vm.as_fd()).map_err(LeaveError::PreserveVm)
    }

    /// Everything that is done while the guest stands still. `rate` is that of the host's TSC.
    ///
    /// # Errors
    /// [`LeaveError`]
    pub fn seal(&mut self, rate: &TscRate) -> Result<u32, LeaveError> {
        Ok(self.leaving.seal(rate)?)
    }

    /// What is noted of it, with its seal once it has one.
    pub fn note(&self) -> Option<&Note> {
        self.leaving.note()
    }

    /// The steps that were reached.
    pub fn timeline(&self) -> &Timeline {
        self.leaving.timeline()
    }

    /// There is no kexec after all: the guest runs on here. Gives how long it stood still, if it did.
    ///
    /// # Errors
    /// [`LostError`]: the guest runs nowhere.
    pub fn go_back(self) -> Result<Option<Duration>, LostError> {
        // The guest first: the kernel takes its time to let go of the memory, which can be used meanwhile.
        let Self { leaving, session } = self;
        let gone_back = leaving.go_back();
        drop(session);
        gone_back
    }
}
