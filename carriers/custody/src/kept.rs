//! A machine in the hands of a process that does not run it.

use std::os::fd::AsFd as _;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use machine::OwnershipWord;
use machine::update::Step;
use socket::Agreed;
use socket::Custody;
use socket::Origin;
use socket::Passed;
use socket::Prospect;
use socket::Reason;
use socket::Timeouts;

use crate::CustodyError;
use crate::MAX_REGIONS;
use crate::Note;
use crate::NoteFile;
use crate::Standing;
use crate::When;
use crate::standing::Regions;

/// A machine's note and its regions, in a process that keeps them.
#[derive(Debug)]
pub struct Kept {
    note: Note,
    file: NoteFile,
    regions: Regions,
    origin: Origin,
    when: When,
}

impl Kept {
    /// A machine that came through a kexec, whose files a kernel has made again. `when` is when what was done for it since.
    ///
    /// # Errors
    /// [`CustodyError::Regions`] if these are not as many regions as the note tells of.
    pub fn made_again(
        (file, note): (NoteFile, Note),
        regions: Vec<OwnedFd>,
        when: When,
    ) -> Result<Self, CustodyError> {
        Self::new(file, note, regions, Origin::MadeAgain, when)
    }

    /// A machine whose VMM gave its regions away before it died, or went: the same files, and nothing else that went with
    /// it.
    ///
    /// # Errors
    /// [`CustodyError`]: the note cannot be read, or these are not as many regions as it tells of.
    pub fn left_behind(file: NoteFile, regions: Vec<OwnedFd>) -> Result<Self, CustodyError> {
        Self::of(file, regions, Origin::LeftBehind)
    }

    /// A machine that another process kept before this one, which says where its files come from.
    ///
    /// # Errors
    /// As of [`left_behind`](Self::left_behind).
    pub fn of(file: NoteFile, regions: Vec<OwnedFd>, origin: Origin) -> Result<Self, CustodyError> {
        let note = file.read().map_err(CustodyError::Note)?;
        Self::new(file, note, regions, origin, When::default())
    }

    fn new(
        file: NoteFile,
        note: Note,
        fds: Vec<OwnedFd>,
        origin: Origin,
        when: When,
    ) -> Result<Self, CustodyError> {
        let (told, came) = (note.regions.len(), fds.len());
        if told != came || !(1..=MAX_REGIONS).contains(&came) {
            return Err(CustodyError::Regions { told, came });
        }
        Ok(Self { note, file, regions: Regions { fds }, origin, when })
    }

    /// When what was done for the machine in this life.
    pub fn when(&self) -> &When {
        &self.when
    }

    /// What the machine's last VMM says.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// The file that the note is in.
    pub fn note_file(&self) -> &NoteFile {
        &self.file
    }

    /// Where its files come from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The regions' descriptors, region 0's first.
    pub fn regions(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.regions.fds.iter().map(OwnedFd::as_fd)
    }

    /// How the machine stands now.
    ///
    /// # Errors
    /// [`CustodyError`]
    pub fn standing(&self) -> Result<Standing, CustodyError> {
        self.regions.standing(&self.note)
    }

    /// Takes the machine, which was `left` so, from whoever has claimed it or is about to, and does not run it yet: it never will
    /// under that claim. The machine stands as before then, claimed by nobody who lives. Whoever was to run it may
    /// still write to its memory: end that one before another begins.
    ///
    /// # Errors
    /// [`CustodyError`], of which the one that [is lost](CustodyError::is_lost) says that the machine runs.
    pub fn revoke(&self, left: OwnershipWord) -> Result<(), CustodyError> {
        self.regions.revoke(&self.note, left)
    }

    /// What a successor is told of the machine first; `vmm` is what its VMM is told.
    pub fn prospect(&self, vmm: serde_json::Value, timeouts: Timeouts) -> Prospect {
        self.note.prospect(self.origin, vmm, timeouts)
    }

    /// Gives the machine, which has to [stand](Self::standing) so, to a successor that agreed to its
    /// [prospect](Self::prospect): as it was sealed, or with its memory alone if it ran on.
    /// `vmm` is what its VMM is told besides.
    ///
    /// # Errors
    /// [`Reason`]: how the machine stands then, is to be asked.
    pub fn pass_on(
        &self,
        agreed: Agreed,
        left: OwnershipWord,
        vmm: serde_json::Value,
        told: &mut dyn FnMut(Step),
    ) -> Result<Passed, Reason> {
        let regions = self.regions().collect();
        agreed.pass_on(Custody { regions, left, vmm }, told)
    }
}
