//! A machine that its VMM gives up, for another to run it later.

use std::path::PathBuf;
use std::time::Duration;

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
use thiserror::Error;

use crate::Note;
use crate::NoteError;
use crate::NoteFile;
use crate::Sealed;
use crate::When;

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

impl Offer {
    /// The note of a machine that its VMM says this of. It is not sealed.
    pub fn note(self, machine: &Machine) -> Note {
        Note {
            machine: machine.name().to_string(),
            identity: machine.identity().to_string(),
            formats: machine.formats().into_iter().chain(self.formats).collect(),
            regions: machine.regions().map(region::Region::len_bytes).collect(),
            program: self.program,
            cgroup: crate::cgroup(),
            vmm: self.vmm,
            sealed: None,
        }
    }
}

/// Why a machine cannot leave. The guest runs on, or will once it has [gone back](Leaving::go_back).
#[derive(Debug, Error)]
pub enum LeaveError {
    /// The machine does not get as far.
    #[error(transparent)]
    Departure(#[from] DepartureError),
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

/// A machine that is about to leave this process. To be ended by [`go_back`](Leaving::go_back), or by the end of the
/// process.
pub struct Leaving<'a, G: Guest> {
    departure: Departure<'a, G>,
    note: Option<(NoteFile, Note)>,
    lost: bool,
}

impl<'a, G: Guest> Leaving<'a, G> {
    /// Nothing has been done yet.
    pub fn new(machine: &'a mut Machine, guest: &'a mut G, observer: &'a mut dyn Observer) -> Self {
        let departure = Departure::new(machine, guest, observer);
        Self { departure, note: None, lost: false }
    }

    /// The machine.
    pub fn machine(&self) -> &Machine {
        self.departure.machine()
    }

    /// Refuses a machine whose memory cannot go, while the guest runs.
    ///
    /// # Errors
    /// [`LeaveError::Departure`]
    pub fn check_memory(&self) -> Result<(), LeaveError> {
        Ok(self.departure.check_memory()?)
    }

    /// Gives guest memory all its pages and freezes it, while the guest runs. Without this it is frozen right before the
    /// pause, and keeps its holes.
    ///
    /// # Errors
    /// [`LeaveError::Departure`]
    pub fn fill_and_freeze(&mut self) -> Result<(), LeaveError> {
        Ok(self.departure.fill_and_freeze()?)
    }

    /// Writes the machine's note, while the guest runs: the file is to be where the next life finds it before the machine is
    /// [sealed](Self::seal).
    ///
    /// # Errors
    /// [`LeaveError::Note`]
    pub fn write_note(&mut self, offer: Offer) -> Result<(), LeaveError> {
        let note = offer.note(self.departure.machine());
        let file = NoteFile::make(&note).map_err(LeaveError::Note)?;
        self.note = Some((file, note));
        Ok(())
    }

    /// The file of the note that was [written](Self::write_note).
    pub fn note_file(&self) -> Option<&NoteFile> {
        self.note.as_ref().map(|(file, _)| file)
    }

    /// What is [noted](Self::write_note) of it, with its seal once it has one.
    pub fn note(&self) -> Option<&Note> {
        self.note.as_ref().map(|(_, note)| note)
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

    /// The machine is whose turn it is next: nothing that happens in this process from here on adds a page to its memory.
    pub fn leave(self) -> Timeline {
        self.departure.leave()
    }

    /// It does not leave after all: the guest runs on here. Gives how long it stood still, if it did.
    ///
    /// # Errors
    /// [`LostError`]: the guest runs nowhere.
    pub fn go_back(mut self) -> Result<Option<Duration>, LostError> {
        if self.lost {
            return Err(LostError::NotOurs);
        }
        self.departure.unseal().map_err(LostError::Unseal)?;
        self.departure.go_back().map_err(|source| LostError::Resume(Box::new(source)))
    }
}
