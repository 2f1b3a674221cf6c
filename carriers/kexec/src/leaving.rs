//! The side that runs the guest, and gives it up to the next kernel.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use custody::Note;
use custody::NoteError;
use custody::NoteFile;
use custody::Sealed;
use custody::When;
use liveupdate::Outgoing;
use liveupdate::PreserveError;
use liveupdate::moment::Moment;
use liveupdate::moment::TscRate;
use machine::Machine;
use machine::SealError;
use machine::UnsealError;
use machine::update::Departure;
use machine::update::DepartureError;
use machine::update::Guest;
use machine::update::Observer;
use machine::update::Step;
use machine::update::Timeline;
use region::Store;
use thiserror::Error;

use crate::FIRST_REGION_TOKEN;
use crate::NOTE_TOKEN;
use crate::VM_TOKEN;

/// What a machine's VMM says for its next life.
#[derive(Debug)]
pub struct Offer {
    /// Formats of the VMM's own states.
    pub formats: Vec<String>,
    /// The program that runs it now.
    pub program: PathBuf,
    /// Anything that the VMM tells its successor.
    pub vmm: serde_json::Value,
}

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
    Departure(#[from] DepartureError),
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
    /// The note cannot be written.
    #[error("cannot write the machine's note")]
    Note(#[source] NoteError),
}

/// Why the guest does not run on.
#[derive(Debug, Error)]
pub enum LostError {
    /// Nobody can tell who owns the machine.
    #[error("the machine cannot be taken back")]
    Unseal(#[source] UnsealError),
    /// The guest cannot.
    #[error("the guest cannot be resumed")]
    Resume(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// This process ran the guest, and the ownership word says otherwise.
    #[error("the machine is not this process's any more")]
    NotOurs,
}

/// A machine that is about to leave for the next kernel. To be ended by [`go_back`](Leaving::go_back), or by the kernel.
pub struct Leaving<'a, G: Guest> {
    departure: Departure<'a, G>,
    /// Its end undoes what the kernel did.
    session: Option<Outgoing>,
    note: Option<(NoteFile, Note)>,
    lost: bool,
}

impl<'a, G: Guest> Leaving<'a, G> {
    /// Nothing has been done yet. Without a session it is a rehearsal: the kernel is not asked for anything.
    pub fn new(
        machine: &'a mut Machine,
        guest: &'a mut G,
        session: Option<Outgoing>,
        observer: &'a mut dyn Observer,
    ) -> Self {
        let departure = Departure::new(machine, guest, observer);
        Self { departure, session, note: None, lost: false }
    }

    /// Everything that is done while the guest runs: fills and freezes its memory, and has the kernel preserve it.
    ///
    /// # Errors
    /// [`LeaveError`]
    pub fn preserve(&mut self, offer: Offer) -> Result<Preserved, LeaveError> {
        self.departure.check_memory()?;
        let begun = Instant::now();
        self.departure.fill_and_freeze()?;
        let fill = begun.elapsed();
        let note = self.note(offer);
        let file = NoteFile::make(&note).map_err(LeaveError::Note)?;
        let mut bytes = 0;
        let begun = Instant::now();
        self.offer_vm()?;
        for (index, region) in self.departure.machine().regions().enumerate() {
            bytes += region.len_bytes();
            let Some(session) = &mut self.session else { continue };
            let token = FIRST_REGION_TOKEN + index as u64;
            session.preserve(token, region.as_fd()).map_err(|source| LeaveError::Region { index, source })?;
        }
        if let Some(session) = &mut self.session {
            session.preserve(NOTE_TOKEN, file.as_fd()).map_err(LeaveError::PreserveNote)?;
        }
        let kernel = if self.session.is_some() { begun.elapsed() } else { Duration::ZERO };
        self.note = Some((file, note));
        Ok(Preserved { bytes, fill, kernel })
    }

    /// A guest_memfd can go where the kernel takes its VM object, too. Linux 7.3 takes neither.
    fn offer_vm(&mut self) -> Result<(), LeaveError> {
        let is_guest_memfd = |region: &region::Region| region.store() == Store::GuestMemfd;
        let Some(session) = &mut self.session else { return Ok(()) };
        if !self.departure.machine().regions().any(is_guest_memfd) {
            return Ok(());
        }
        let vm = self.departure.machine().vm_object().ok_or(LeaveError::NoVm)?;
        let vm = kvm::descriptor(&vm).map_err(LeaveError::Vm)?;
        session.preserve(VM_TOKEN, vm.as_fd()).map_err(LeaveError::PreserveVm)
    }

    fn note(&self, offer: Offer) -> Note {
        let machine = self.departure.machine();
        Note {
            machine: machine.name().to_string(),
            identity: machine.identity().to_string(),
            formats: machine.formats().into_iter().chain(offer.formats).collect(),
            regions: machine.regions().map(region::Region::len_bytes).collect(),
            program: offer.program,
            cgroup: custody::cgroup(),
            vmm: offer.vmm,
            sealed: None,
        }
    }

    /// Everything that is done while the guest stands still. `rate` is that of the host's TSC.
    ///
    /// # Errors
    /// [`LeaveError`]
    pub fn seal(&mut self, rate: &TscRate) -> Result<u32, LeaveError> {
        let epoch = self.departure.pause_and_seal().inspect_err(|error| {
            self.lost = matches!(error, DepartureError::Seal(SealError::Ownership(_)));
        })?;
        let when = self.when(rate);
        let Some((file, note)) = &mut self.note else { return Ok(epoch) };
        note.sealed = Some(Sealed { epoch, when });
        file.write(note).map_err(LeaveError::Note)?;
        Ok(epoch)
    }

    fn when(&self, rate: &TscRate) -> When {
        let mut when = When::default();
        let Ok(now) = Moment::now() else { return when };
        let timeline = self.departure.timeline();
        let stopped_ns = self.departure.guest().stopped_ns().or_else(|| timeline.at_ns(Step::Paused));
        if let Some(stopped_ns) = stopped_ns {
            when.note("stopped", &now.at_monotonic(stopped_ns.min(now.monotonic_ns), rate));
        }
        for (step, at_ns) in timeline.reached() {
            when.note(step.name(), &now.at_monotonic(*at_ns, rate));
        }
        when
    }

    /// The steps that were reached.
    pub fn timeline(&self) -> &Timeline {
        self.departure.timeline()
    }

    /// There is no kexec after all: the guest runs on here. Gives how long it stood still, if it did.
    ///
    /// # Errors
    /// [`LostError`]: the guest runs nowhere.
    pub fn go_back(mut self) -> Result<Option<Duration>, LostError> {
        if self.lost {
            return Err(LostError::NotOurs);
        }
        self.departure.unseal().map_err(LostError::Unseal)?;
        // The guest first: the kernel takes its time to let go of the memory, which can be used meanwhile.
        self.departure.go_back().map_err(|source| LostError::Resume(Box::new(source)))
    }
}
