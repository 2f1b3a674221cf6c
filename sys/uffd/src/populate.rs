//! Entries for the pages that are present, and for those only.
//!
//! A new process that maps a region has no entry for any page of it, and pays for each at the first
//! access; a guest pays far more than a thread. To *populate* is to make the entries beforehand. What
//! the kernel offers for it (`MADV_POPULATE_READ`, `MAP_POPULATE`) makes a page in each hole as well, and
//! so would let a machine grow to its full size at its first update. There are ways round that:
//!
//! | [`Method`] | how | a hole that appears meanwhile | huge pages | others' access meanwhile |
//! |---|---|---|---|---|
//! | `Guarded` | refuse faults, `MADV_POPULATE_READ` | stays a hole | mapped whole | to a hole: SIGBUS |
//! | `Continue` | take faults, `UFFDIO_CONTINUE` | stays a hole | mapped in small pages | as always |
//! | `Seek` | `SEEK_DATA`, `MADV_POPULATE_READ` | may be filled | mapped whole | as always |
//! | `Touched` | `mincore`, `MADV_POPULATE_READ` | may be filled | | as always |
//! | `Whole` | `MADV_POPULATE_READ` | may be filled | mapped whole | as always |
//!
//! `Touched` is for a real guest_memfd, which takes no userfaultfd and tells no holes; what it has of pages that
//! nobody has touched yet gets no entry. The kernel answers the owner of the file and who may write it, and tells
//! anybody else that all of it is there. `Whole` is for hugetlb memory without a userfaultfd, where no page is
//! missing, and for a device of memory (devdax), which has all its pages and answers any `lseek` with where it is.
//!
//! Huge pages are here those that a memfd has by the kernel's choice or `MADV_COLLAPSE`; those of hugetlb
//! are always mapped whole. Mapped in small pages, a huge page is as slow for a guest as small pages are.
//!
//! A hole appears meanwhile when the predecessor's guest, which still runs, gives memory back. `Seek` is
//! for where there is no userfaultfd: the page that it may fill holds zeros, as the hole did, and all
//! that is lost is that the memory had been given back.
//!
//! A page that is added meanwhile may be left out by any of them. Pages that `fallocate` has put there
//! and nobody has touched may or may not get an entry; a hole to `SEEK_DATA` until then, they are data
//! with one.
//!
//! `SEEK_DATA` moves the position of the file, which the other processes that have the file share.
//! Nothing that maps a file needs it.

use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, SeekFrom, fstat, fstatfs, seek};
use rustix::io::Errno;

use crate::fd::{CallError, Mode, OpenError, RangeError, Stopped, Uffd};
use crate::hold::Registration;
use crate::ioctl;
use crate::mapped::{Mapped, Span, page_size};

/// How much is done at a time, in bytes, where a page is not larger: what one entry of a page table's
/// second level covers.
const STEP: usize = 2 << 20;

/// Whether the mapping is used while it is populated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Nobody accesses it through this address space: the successor before the claim. An access to a
    /// hole may fail with SIGBUS.
    Idle,
    /// Threads or vCPUs access it, and must not notice.
    Busy,
}

/// How a mapping was populated; see the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// By reading ahead while missing faults are refused.
    Guarded,
    /// By `UFFDIO_CONTINUE`.
    Continue,
    /// By reading ahead where `SEEK_DATA` says that there is data.
    Seek,
    /// By reading ahead where `mincore` says that a page was touched.
    Touched,
    /// By reading ahead all of it, as it has no holes.
    Whole,
}

/// Why a userfaultfd was not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is none for us.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It does not take this memory.
    #[error(transparent)]
    Register(#[from] CallError),
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Populated {
    /// How.
    pub method: Method,
    /// Why without a userfaultfd; `None` with one, or if [`Method::Seek`] was asked for.
    pub refusal: Option<Refusal>,
    /// Bytes that were found present and have entries now, those that had entries before included.
    pub bytes_mapped: usize,
    /// Bytes of the whole mapping. The rest was holes.
    pub bytes_total: usize,
}

/// Why a mapping was not populated, or only in part. It can be used all the same, and pays at each first
/// access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PopulateError {
    /// The mapping's own answers make no range.
    #[error("the mapping is not a range of whole pages")]
    Range {
        /// Why not.
        #[source]
        cause: RangeError,
    },
    /// The file does not say where its holes are (hugetlb memory that has some), and there is no userfaultfd
    /// for it.
    #[error("this file does not tell its holes, and a userfaultfd cannot be used")]
    NoHoles {
        /// Why there is no userfaultfd for it; `None` if none was asked for.
        #[source]
        refusal: Option<Refusal>,
    },
    /// A call on the userfaultfd failed half-way.
    #[error("populating stopped at offset {offset:#x}")]
    Userfaultfd {
        /// Where, in bytes.
        offset: usize,
        /// Why.
        #[source]
        cause: CallError,
    },
    /// A system call failed.
    #[error("cannot {action} at offset {offset:#x}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// Where, in bytes.
        offset: usize,
        /// What the kernel answered.
        #[source]
        cause: Errno,
    },
}

/// Makes entries for the pages of the mapping that are present, by the best way that this process may
/// use. Leaves nothing registered.
///
/// `file` is the file that is mapped. `progress` is told, now and then, how many bytes of how many are
/// dealt with; holes count.
///
/// # Errors
///
/// [`PopulateError`].
pub fn populate(
    mapped: &impl Mapped,
    file: BorrowedFd<'_>,
    activity: Activity,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Populated, PopulateError> {
    let mut work = Work::new(mapped, file, progress)?;
    let method = match activity {
        Activity::Idle => Method::Guarded,
        Activity::Busy => Method::Continue,
    };
    let registration = match register(mapped, activity) {
        Ok(registration) => registration,
        Err(refusal) => return work.without_userfaultfd(refusal),
    };
    match activity {
        Activity::Idle => work.guarded()?,
        Activity::Busy => work.by_continue(registration.uffd())?,
    }
    let offset = work.total;
    registration.end().map_err(|cause| PopulateError::Userfaultfd { offset, cause })?;
    Ok(work.result(method, None))
}

/// Populates by [`Method::Seek`], though there may be a better way.
///
/// # Errors
///
/// [`PopulateError`].
pub fn populate_by_seek(
    mapped: &impl Mapped,
    file: BorrowedFd<'_>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Populated, PopulateError> {
    Work::new(mapped, file, progress)?.by_seek(None)
}

fn register(mapped: &impl Mapped, activity: Activity) -> Result<Registration, Refusal> {
    let (uffd, mode) = match activity {
        Activity::Idle => (Uffd::open_refusing()?, Mode::Missing),
        Activity::Busy => (Uffd::open()?, Mode::Minor),
    };
    Ok(Registration::new(uffd, mapped, mode)?)
}

/// What `MADV_POPULATE_READ` met.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Read {
    /// All of the range has entries.
    Whole,
    /// Something in it could not be read: while missing faults are refused, a hole.
    AtHole,
}

/// A mapping on its way to be populated.
struct Work<'a, M: Mapped> {
    mapped: &'a M,
    file: BorrowedFd<'a>,
    /// The size of a page of the file, in bytes.
    page: usize,
    /// It is a device, and none of its memory is missing.
    is_device: bool,
    /// The size of the mapping, in bytes.
    total: usize,
    /// Bytes that were found present.
    present: usize,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl<'a, M: Mapped> Work<'a, M> {
    fn new(
        mapped: &'a M,
        file: BorrowedFd<'a>,
        progress: &'a mut dyn FnMut(usize, usize),
    ) -> Result<Self, PopulateError> {
        Span::whole(mapped).map_err(|cause| PopulateError::Range { cause })?;
        let page = file_page_size(file).map_err(|cause| PopulateError::Call {
            action: "ask for the size of a page",
            offset: 0,
            cause,
        })?;
        let stat = fstat(file).map_err(|cause| PopulateError::Call {
            action: "ask for the kind of file",
            offset: 0,
            cause,
        })?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        Ok(Self { mapped, file, page, is_device, total: mapped.len_bytes(), present: 0, progress })
    }

    fn result(&self, method: Method, refusal: Option<Refusal>) -> Populated {
        Populated { method, refusal, bytes_mapped: self.present, bytes_total: self.total }
    }

    /// Whether the file's holes are finer than what is populated in one step.
    fn tells_holes(&self) -> bool {
        self.page == page_size() && !self.is_device
    }

    /// The end of the step that `at` is in.
    fn step_end(&self, at: usize) -> usize {
        let step = self.page.max(STEP);
        (at / step)
            .checked_add(1)
            .and_then(|steps| steps.checked_mul(step))
            .map_or(self.total, |end| end.min(self.total))
    }

    fn tell(&mut self, done: usize) {
        (self.progress)(done.min(self.total), self.total);
    }

    fn guarded(&mut self) -> Result<(), PopulateError> {
        let mut at = 0;
        while at < self.total {
            let end = self.step_end(at);
            at = match self.read(at..end)? {
                Read::Whole => {
                    self.present += end - at;
                    end
                }
                // Not only this step: where the next data is far off, all that is before it.
                Read::AtHole => self.guarded_with_holes(at, end)?,
            };
            self.tell(at);
        }
        Ok(())
    }

    /// Populates what is present of a step that has a hole somewhere, and answers where to go on: at its
    /// end, or further if there is no data before.
    fn guarded_with_holes(&mut self, mut at: usize, end: usize) -> Result<usize, PopulateError> {
        if !self.tells_holes() {
            self.by_page(at..end)?;
            return Ok(end);
        }
        while at < end {
            let Some(data) = self.next_data(at)? else { return Ok(self.total) };
            if data.start >= end {
                return Ok(data.start);
            }
            let data = data.start..data.end.min(end);
            match self.read(data.clone())? {
                Read::Whole => self.present += data.len(),
                // A hole has appeared since we looked.
                Read::AtHole => self.by_page(data.clone())?,
            }
            at = data.end;
        }
        Ok(end)
    }

    /// Populates what is present of a range, page by page.
    fn by_page(&mut self, range: Range<usize>) -> Result<(), PopulateError> {
        for at in range.clone().step_by(self.page) {
            let page = at..at.saturating_add(self.page).min(range.end);
            if self.read(page.clone())? == Read::Whole {
                self.present += page.len();
            }
        }
        Ok(())
    }

    fn by_continue(&mut self, uffd: &Uffd) -> Result<(), PopulateError> {
        let mut at = 0;
        while at < self.total {
            let continued = uffd
                .continue_range(self.mapped, at..self.step_end(at))
                .map_err(|cause| PopulateError::Userfaultfd { offset: at, cause })?;
            at += continued.bytes_mapped;
            self.present += continued.bytes_mapped;
            let past_page = at.saturating_add(self.page).min(self.total);
            match continued.stopped {
                Stopped::AtEnd => {}
                Stopped::AtMapped => {
                    self.present += past_page - at;
                    at = past_page;
                }
                Stopped::AtHole if self.tells_holes() => {
                    // Data where the hole was has come since; it is left out, so that this ends.
                    let data = self.next_data(at)?.map_or(self.total, |data| data.start);
                    at = data.max(past_page);
                }
                Stopped::AtHole => at = past_page,
            }
            self.tell(at);
        }
        Ok(())
    }

    fn without_userfaultfd(&mut self, refusal: Refusal) -> Result<Populated, PopulateError> {
        if !self.tells_holes() {
            return self.if_whole(refusal);
        }
        match self.by_seek(Some(refusal)) {
            Err(PopulateError::NoHoles { .. }) => self.by_touch(refusal),
            result => result,
        }
    }

    /// Populates all of it, if there is no page missing.
    fn if_whole(&mut self, refusal: Refusal) -> Result<Populated, PopulateError> {
        let ask = |cause| PopulateError::Call { action: "ask for the number of pages", offset: 0, cause };
        let blocks = fstat(self.file).map_err(ask)?.st_blocks;
        let present = usize::try_from(blocks).unwrap_or(0).saturating_mul(512);
        if present < self.total && !self.is_device {
            return Err(PopulateError::NoHoles { refusal: Some(refusal) });
        }
        self.read_on(0..self.total)?;
        Ok(self.result(Method::Whole, Some(refusal)))
    }

    /// Populates what somebody has touched.
    fn by_touch(&mut self, refusal: Refusal) -> Result<Populated, PopulateError> {
        let mut pages = vec![0; STEP / self.page];
        let mut at = 0;
        while at < self.total {
            let end = self.step_end(at);
            let span = Span::of(self.mapped, at..end).map_err(|cause| PopulateError::Range { cause })?;
            let ask = |cause| PopulateError::Call { action: "ask what is in memory", offset: at, cause };
            ioctl::in_memory(span, &mut pages).map_err(ask)?;
            let mut from = at;
            for run in pages[..span.len / self.page].chunk_by(|one, next| one & 1 == next & 1) {
                let to = from + run.len() * self.page;
                if run[0] & 1 != 0 {
                    self.read_on(from..to)?;
                }
                from = to;
            }
            at = end;
            self.tell(at);
        }
        Ok(self.result(Method::Touched, Some(refusal)))
    }

    /// Populates a range that is present, step by step.
    fn read_on(&mut self, range: Range<usize>) -> Result<(), PopulateError> {
        let mut at = range.start;
        while at < range.end {
            let end = self.step_end(at).min(range.end);
            if self.read(at..end)? == Read::AtHole {
                return Err(read_error(at, Errno::FAULT));
            }
            self.present += end - at;
            at = end;
            self.tell(at);
        }
        Ok(())
    }

    fn by_seek(&mut self, refusal: Option<Refusal>) -> Result<Populated, PopulateError> {
        if !self.tells_holes() {
            return Err(PopulateError::NoHoles { refusal });
        }
        let mut at = 0;
        while let Some(data) = self.next_data(at).map_err(|error| match error {
            PopulateError::Call { cause: Errno::SPIPE | Errno::INVAL, .. } => {
                PopulateError::NoHoles { refusal }
            }
            error => error,
        })? {
            at = data.end;
            self.read_on(data)?;
        }
        self.tell(self.total);
        Ok(self.result(Method::Seek, refusal))
    }

    /// Makes entries for a range as if each page of it were read.
    fn read(&self, range: Range<usize>) -> Result<Read, PopulateError> {
        let span = Span::of(self.mapped, range.clone()).map_err(|cause| PopulateError::Range { cause })?;
        loop {
            match ioctl::populate_read(span) {
                Ok(()) => return Ok(Read::Whole),
                Err(Errno::FAULT) => return Ok(Read::AtHole),
                Err(Errno::INTR) => {}
                Err(cause) => return Err(read_error(range.start, cause)),
            }
        }
    }

    /// The first run of data that ends behind `at`, in whole pages and cut to the mapping; `None` if only
    /// holes follow.
    fn next_data(&self, at: usize) -> Result<Option<Range<usize>>, PopulateError> {
        let call = |action, offset| move |cause| PopulateError::Call { action, offset, cause };
        let start = match seek(self.file, SeekFrom::Data(at as u64)) {
            Ok(start) => self.in_mapping(start),
            Err(Errno::NXIO) => return Ok(None),
            Err(cause) => return Err(call("look for data", at)(cause)),
        };
        if start >= self.total {
            return Ok(None);
        }
        let end = match seek(self.file, SeekFrom::Hole(start as u64)) {
            Ok(end) => self.in_mapping(end),
            // The file has been cut off here since.
            Err(Errno::NXIO) => return Ok(None),
            Err(cause) => return Err(call("look for a hole", start)(cause)),
        };
        let start = start / self.page * self.page;
        let end = end.div_ceil(self.page).saturating_mul(self.page).min(self.total);
        Ok(Some(start.max(at)..end.max(start.saturating_add(self.page)).min(self.total)))
    }

    /// An offset in the file as one in the mapping, at most its end.
    fn in_mapping(&self, offset: u64) -> usize {
        usize::try_from(offset).map_or(self.total, |offset| offset.min(self.total))
    }
}

fn read_error(offset: usize, cause: Errno) -> PopulateError {
    PopulateError::Call { action: "make page table entries", offset, cause }
}

/// The size of a page of the file in bytes: a huge one on hugetlbfs, else the smallest.
fn file_page_size(file: BorrowedFd<'_>) -> Result<usize, Errno> {
    let filesystem = fstatfs(file)?;
    if filesystem.f_type != libc::HUGETLBFS_MAGIC {
        return Ok(page_size());
    }
    usize::try_from(filesystem.f_bsize).map_err(|_negative| Errno::INVAL)
}
