//! The page through which guest and host talk.
//!
//! A *word* is a little-endian u64 at a fixed offset in the page ([`word`] lists them all). Every
//! word has one writer at a time: most are the guest's; the requests and the threshold are the
//! host's. A request is a sequence number that differs from its answer; the guest looks after every
//! chunk, does what is asked and sets the answer to the request. Times are in *cycles* of the guest's
//! clock: the TSC, or nanoseconds for the thread.
//!
//! How far the walk has come is one word, [`word::PAGES_DONE`], so that a guest stopped anywhere
//! never leaves a pass and a page that do not belong together.

use thiserror::Error;

use crate::layout::{LOW_PAGES, Layout, LayoutError, MAX_VCPUS, PAGE_BYTES};
use crate::ports::Command;

/// Offsets of the words in the mailbox page, in bytes. They are the format: a guest goes on under a
/// later release.
pub mod word {
    /// The bytes `tidpulse`.
    pub const MAGIC: u64 = 0x000;
    /// Version of the mailbox's format and of the pattern: 1.
    pub const VERSION: u64 = 0x008;
    /// Size of the guest's memory in bytes.
    pub const MEMORY_BYTES: u64 = 0x010;
    /// Offset of the work area's first byte.
    pub const WORK_START: u64 = 0x018;
    /// Offset of the byte after the work area.
    pub const WORK_END: u64 = 0x020;
    /// Cycles of the guest's clock in a millisecond; 0 if the host did not say.
    pub const CYCLES_PER_MS: u64 = 0x028;
    /// Width in bytes of the vectors the code works with.
    pub const VECTOR_BYTES: u64 = 0x030;

    /// Chunks walked and pages probed. A living guest that is not parked counts on.
    pub const TICKS: u64 = 0x040;
    /// Pages walked since the start, over all passes.
    pub const PAGES_DONE: u64 = 0x048;
    /// Passes reported.
    pub const PASSES: u64 = 0x050;
    /// Length of the last whole pass, in cycles.
    pub const PASS_CYCLES: u64 = 0x058;
    /// Reports sent.
    pub const REPORTS: u64 = 0x060;

    /// Words found wrong.
    pub const ERRORS: u64 = 0x080;
    /// Offset of the first wrong word.
    pub const FIRST_OFFSET: u64 = 0x088;
    /// What the first wrong word should have held.
    pub const FIRST_EXPECTED: u64 = 0x090;
    /// What the first wrong word held.
    pub const FIRST_FOUND: u64 = 0x098;
    /// The pass that found the first wrong word.
    pub const FIRST_PASS: u64 = 0x0a0;
    /// Times that registers did not hold what they should.
    pub const REGISTERS_LOST: u64 = 0x0a8;
    /// The guest's own: 1 + the last pass that reported a mismatch.
    pub const MISMATCH_REPORTED: u64 = 0x0b0;
    /// The guest's own: 1 + the last pass that reported lost registers.
    pub const REGISTERS_REPORTED: u64 = 0x0b8;

    /// The longest gap since the last reset, in cycles.
    pub const GAP_LONGEST: u64 = 0x0c0;
    /// The guest's clock when the longest gap ended.
    pub const GAP_END: u64 = 0x0c8;
    /// Sequence number: forget the longest gap (host).
    pub const GAP_REQUEST: u64 = 0x0d0;
    /// The last such request that was met.
    pub const GAP_ANSWER: u64 = 0x0d8;
    /// Times that the clock went back.
    pub const TIME_WENT_BACK: u64 = 0x0e0;
    /// Gaps at least this long, in cycles, are recorded as pauses (host).
    pub const PAUSE_THRESHOLD: u64 = 0x0e8;
    /// Pauses recorded; the last ones stand in [`PAUSE_RING`].
    pub const PAUSES: u64 = 0x0f0;

    /// Sequence number: probe the memory (host).
    pub const PROBE_REQUEST: u64 = 0x100;
    /// The last such request that was met.
    pub const PROBE_ANSWER: u64 = 0x108;
    /// Windows of 2 MiB to probe (host, before the request).
    pub const PROBE_WINDOWS: u64 = 0x110;
    /// Length of the last probe in cycles.
    pub const PROBE_CYCLES: u64 = 0x118;
    /// Pages of 4 KiB that the last probe touched.
    pub const PROBE_PAGES: u64 = 0x120;

    /// Not 0: stand still after the chunk in progress (host).
    pub const PARK_REQUEST: u64 = 0x140;
    /// 1 while the guest stands still.
    pub const PARKED: u64 = 0x148;
    /// Not 0: what the vCPU is to do at its ports (host). The guest sets it back before it does it.
    pub const COMMAND: u64 = 0x150;

    /// 1 + the vector of the fault that stopped the guest; 0 if none did.
    pub const FAULT_VECTOR: u64 = 0x180;
    /// Its error code, 0 if it has none.
    pub const FAULT_ERROR_CODE: u64 = 0x188;
    /// The instruction it came at.
    pub const FAULT_RIP: u64 = 0x190;
    /// CR2 at that time: the address, if it was a page fault.
    pub const FAULT_CR2: u64 = 0x198;

    /// Not 0: send a line to the console as often, in cycles from one to the next (host).
    pub const CONSOLE_LINES: u64 = 0x1a0;
    /// The guest's own: its clock when it sent the last line.
    pub const CONSOLE_LINE_LAST: u64 = 0x1a8;
    /// Not 0: look as often for received bytes, in cycles, and send them back (host).
    pub const CONSOLE_POLL: u64 = 0x1b0;
    /// The guest's own: its clock when it looked last.
    pub const CONSOLE_POLL_LAST: u64 = 0x1b8;
    /// Number of the vCPU, from 0.
    pub const VCPU: u64 = 0x1c0;
    /// How many vCPUs the guest has.
    pub const VCPUS: u64 = 0x1c8;

    /// The guest's own: 16 words to load registers from.
    pub const SCRATCH: u64 = 0x200;
    /// The last 32 pauses as pairs of words: the clock at the end, the length in cycles. Pause `n`
    /// lies at `n % 32`.
    pub const PAUSE_RING: u64 = 0x400;
    /// One sum per page below the work area, 256 words; 0 for a page that is not fixed.
    pub const FIXED_SUMS: u64 = 0x800;
}

/// "tidpulse" in the order of the bytes.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"tidpulse");
/// The format of the mailbox and of the pattern.
pub(crate) const VERSION: u64 = 1;
/// Pauses that the ring keeps.
pub(crate) const PAUSE_RING_LEN: u64 = 32;

/// Guest memory as single u64 accesses.
///
/// The guest reads and writes the same words meanwhile, so each call must be one access of eight
/// bytes, volatile or atomic, and offsets are multiples of 8 within the memory. In memory a word is
/// little-endian.
pub trait Words {
    /// Reads the word at this offset in the guest's memory.
    fn load(&self, offset_bytes: u64) -> u64;
    /// Writes the word at this offset in the guest's memory.
    fn store(&self, offset_bytes: u64, value: u64);
}

/// [`Words`] that a guest can run on whose vCPUs are threads.
pub trait SharedWords: Words {
    /// Adds 1 to the word at this offset, modulo 2^64, in one atomic step.
    fn increment(&self, offset_bytes: u64);
}

/// Why a mailbox cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MailboxError {
    /// There is no mailbox at this place.
    #[error("the mailbox at {mailbox_offset:#x} begins with {found:#018x}, not with its magic")]
    Magic {
        /// Where it should be, as an offset.
        mailbox_offset: u64,
        /// What stands there.
        found: u64,
    },
    /// It is of a version that this release does not know.
    #[error("the mailbox has version {found}, and this release knows {VERSION}")]
    Version {
        /// The version found.
        found: u64,
    },
    /// It says that the guest has none, or too many of them.
    #[error("the mailbox tells of {found} vCPUs, and this release knows of 1 to {MAX_VCPUS}")]
    Vcpus {
        /// The number that stands there.
        found: u64,
    },
    /// It is another vCPU's, or of a guest with another number of them.
    #[error("where vCPU {expected} of {vcpus} has its mailbox is that of vCPU {vcpu} of {vcpus_there}")]
    Vcpu {
        /// Number of the vCPU whose place it is.
        expected: u32,
        /// How many vCPUs the first mailbox tells of.
        vcpus: u32,
        /// Number of the vCPU that stands there.
        vcpu: u64,
        /// How many vCPUs it tells of.
        vcpus_there: u64,
    },
    /// The guest is one of a memory of another size.
    #[error("the mailbox is of a memory of {found} bytes, and this one has {memory_bytes}")]
    MemorySize {
        /// The size that stands there.
        found: u64,
        /// The memory's size.
        memory_bytes: u64,
    },
    /// The vCPUs' shares leave out a part of the work area, or overlap.
    #[error("a share of the work area ends at {end:#x}, and what follows begins at {start:#x}")]
    Share {
        /// Where the next share begins, or the memory ends, as an offset.
        start: u64,
        /// Where the share before ends.
        end: u64,
    },
    /// It describes a memory that cannot be.
    #[error("the mailbox describes no valid layout")]
    Layout(#[source] LayoutError),
}

/// How far the walk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Passes done. Pages from `cursor` on hold this generation, pages before it the next one.
    pub pass: u64,
    /// The page in progress: its index, counted from offset 0. It may hold both generations, the
    /// next one up to some word and this one from there on.
    pub cursor: u64,
}

/// A word that did not hold what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadWord {
    /// Its offset in the guest's memory.
    pub offset_bytes: u64,
    /// What it should have held.
    pub expected: u64,
    /// What it held.
    pub found: u64,
}

/// The longest time in which the guest did not look at its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Its length in cycles.
    pub cycles: u64,
    /// The guest's clock when it ended.
    pub end: u64,
}

/// One gap that reached the threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// The guest's clock when it ended.
    pub end: u64,
    /// Its length in cycles.
    pub cycles: u64,
}

/// The answer to a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Pages of 4 KiB touched.
    pub pages: u64,
    /// Time that all of them took, in cycles.
    pub cycles: u64,
}

/// The exception that stopped the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its vector.
    pub vector: u64,
    /// Its error code, 0 if it has none.
    pub error_code: u64,
    /// The instruction it came at.
    pub rip: u64,
    /// CR2 at that time.
    pub cr2: u64,
}

/// The host's view of one mailbox.
#[derive(Debug)]
pub struct Mailbox<'a, W: Words> {
    words: &'a W,
    mailbox_offset: u64,
}

impl<W: Words> Clone for Mailbox<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<W: Words> Copy for Mailbox<'_, W> {}

impl<'a, W: Words> Mailbox<'a, W> {
    /// The mailbox at this offset of the guest's memory ([`crate::MAILBOX_OFFSET`] for the first
    /// vCPU). Nothing is read yet; [`Mailbox::layout`] checks that there is one.
    pub fn new(words: &'a W, mailbox_offset: u64) -> Self {
        Self { words, mailbox_offset }
    }

    fn load(&self, word: u64) -> u64 {
        self.words.load(self.mailbox_offset + word)
    }

    fn store(&self, word: u64, value: u64) {
        self.words.store(self.mailbox_offset + word, value);
    }

    /// The guest's layout as it stands in the mailbox, checked.
    ///
    /// # Errors
    ///
    /// [`MailboxError`] if this is no mailbox, or none that this release can read.
    pub fn layout(&self) -> Result<Layout, MailboxError> {
        let found = self.load(word::MAGIC);
        if found != MAGIC {
            return Err(MailboxError::Magic { mailbox_offset: self.mailbox_offset, found });
        }
        let found = self.load(word::VERSION);
        if found != VERSION {
            return Err(MailboxError::Version { found });
        }
        let work = self.load(word::WORK_START)..self.load(word::WORK_END);
        Layout::with_parts(self.load(word::MEMORY_BYTES), self.mailbox_offset, work)
            .map_err(MailboxError::Layout)
    }

    /// Cycles of the guest's clock in a millisecond, if the host said so.
    #[must_use]
    pub fn cycles_per_ms(&self) -> Option<u64> {
        Some(self.load(word::CYCLES_PER_MS)).filter(|&cycles| cycles != 0)
    }

    /// Says how many cycles the guest's clock makes in a millisecond.
    pub fn set_cycles_per_ms(&self, cycles: u64) {
        self.store(word::CYCLES_PER_MS, cycles);
    }

    /// A time of the guest in nanoseconds; `None` if its clock's rate is not known.
    #[must_use]
    pub fn nanoseconds(&self, cycles: u64) -> Option<u64> {
        let per_ms = u128::from(self.cycles_per_ms()?);
        let nanoseconds = u128::from(cycles) * 1_000_000 / per_ms;
        Some(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Width in bytes of the vectors that the guest's code works with: 16 or 32.
    #[must_use]
    pub fn vector_bytes(&self) -> u64 {
        self.load(word::VECTOR_BYTES)
    }

    /// Chunks walked and pages probed since the start.
    #[must_use]
    pub fn ticks(&self) -> u64 {
        self.load(word::TICKS)
    }

    /// How far the walk is, in a guest with this layout.
    #[must_use]
    pub fn progress(&self, layout: &Layout) -> Progress {
        let done = self.load(word::PAGES_DONE);
        let pages = layout.work_pages();
        let len = pages.end - pages.start;
        Progress { pass: done / len, cursor: pages.start + done % len }
    }

    /// Length of the last whole pass in cycles; `None` before the first is done.
    #[must_use]
    pub fn pass_cycles(&self) -> Option<u64> {
        (self.load(word::PASSES) != 0).then(|| self.load(word::PASS_CYCLES))
    }

    /// Reports sent, all kinds together.
    #[must_use]
    pub fn reports(&self) -> u64 {
        self.load(word::REPORTS)
    }

    /// Words that the guest found wrong.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.load(word::ERRORS)
    }

    /// The first word that the guest found wrong.
    #[must_use]
    pub fn first_bad(&self) -> Option<BadWord> {
        (self.errors() != 0).then(|| BadWord {
            offset_bytes: self.load(word::FIRST_OFFSET),
            expected: self.load(word::FIRST_EXPECTED),
            found: self.load(word::FIRST_FOUND),
        })
    }

    /// The pass that found the first wrong word.
    #[must_use]
    pub fn first_bad_pass(&self) -> Option<u64> {
        (self.errors() != 0).then(|| self.load(word::FIRST_PASS))
    }

    /// Times that the guest found its registers wrong, counted by page or chunk.
    #[must_use]
    pub fn registers_lost(&self) -> u64 {
        self.load(word::REGISTERS_LOST)
    }

    /// The longest gap since the last reset.
    #[must_use]
    pub fn longest_gap(&self) -> Gap {
        Gap { cycles: self.load(word::GAP_LONGEST), end: self.load(word::GAP_END) }
    }

    /// Asks the guest to forget its longest gap. Returns the request, for [`Mailbox::gap_is_reset`].
    pub fn reset_gap(&self) -> u64 {
        self.request(word::GAP_REQUEST)
    }

    /// Whether the guest has met this request.
    #[must_use]
    pub fn gap_is_reset(&self, request: u64) -> bool {
        self.load(word::GAP_ANSWER) == request
    }

    /// Times that the guest's clock went back.
    #[must_use]
    pub fn time_went_back(&self) -> u64 {
        self.load(word::TIME_WENT_BACK)
    }

    /// Sets how long a gap must be, in cycles, to be recorded as a pause.
    pub fn set_pause_threshold(&self, cycles: u64) {
        self.store(word::PAUSE_THRESHOLD, cycles);
    }

    /// Pauses recorded since the start.
    #[must_use]
    pub fn pauses(&self) -> u64 {
        self.load(word::PAUSES)
    }

    /// The recorded pauses from number `first` on (numbers count from 0), as far as they are kept:
    /// the last 31. Each comes with its number.
    #[must_use]
    pub fn pauses_from(&self, first: u64) -> Vec<(u64, Pause)> {
        let end = self.pauses();
        let kept = first.max(end.saturating_sub(PAUSE_RING_LEN))..end;
        let mut found: Vec<(u64, Pause)> = kept
            .map(|number| {
                let entry = word::PAUSE_RING + number % PAUSE_RING_LEN * 16;
                let pause = Pause { end: self.load(entry), cycles: self.load(entry + 8) };
                (number, pause)
            })
            .collect();
        // The guest runs meanwhile, and writes an entry before it counts it.
        let now = self.pauses();
        found.retain(|&(number, _)| number + PAUSE_RING_LEN > now);
        found
    }

    /// Asks the guest to read one word of every 4 KiB page in this many windows of 2 MiB, spread
    /// evenly over its memory (all of it, if it has fewer). The first 2 MiB are left out: the guest
    /// itself lies there, and KVM treats page tables apart. Returns the request, for
    /// [`Mailbox::probe`].
    pub fn request_probe(&self, windows: u64) -> u64 {
        self.store(word::PROBE_WINDOWS, windows);
        self.request(word::PROBE_REQUEST)
    }

    /// The answer to this request, once it is there.
    #[must_use]
    pub fn probe(&self, request: u64) -> Option<Probe> {
        (self.load(word::PROBE_ANSWER) == request)
            .then(|| Probe { pages: self.load(word::PROBE_PAGES), cycles: self.load(word::PROBE_CYCLES) })
    }

    /// Asks the guest to stand still: it goes on to look at its clock, and touches nothing but the
    /// mailbox (and, if a probe is asked for, reads its memory).
    pub fn park(&self) {
        self.store(word::PARK_REQUEST, 1);
    }

    /// Takes the park request back.
    pub fn unpark(&self) {
        self.store(word::PARK_REQUEST, 0);
    }

    /// Whether the guest stands still as asked.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.load(word::PARKED) != 0
    }

    /// Has the vCPU do something at its ports, soon. One thing at a time.
    pub fn command(&self, command: Command) {
        self.store(word::COMMAND, command.code());
    }

    /// Whether the vCPU has taken the last command, and does it or has done it.
    #[must_use]
    pub fn command_is_taken(&self) -> bool {
        self.load(word::COMMAND) == 0
    }

    /// Has the vCPU send a line to the console each so many cycles, and send received bytes back, for which it looks
    /// each so many cycles. 0 is never.
    pub fn set_console(&self, lines_cycles: u64, poll_cycles: u64) {
        self.store(word::CONSOLE_LINES, lines_cycles);
        self.store(word::CONSOLE_POLL, poll_cycles);
    }

    /// Number of the vCPU and how many there are, as they stand there.
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.load(word::VCPU), self.load(word::VCPUS))
    }

    /// The exception that stopped the guest for good, if one did.
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        let vector = self.load(word::FAULT_VECTOR).checked_sub(1)?;
        Some(Fault {
            vector,
            error_code: self.load(word::FAULT_ERROR_CODE),
            rip: self.load(word::FAULT_RIP),
            cr2: self.load(word::FAULT_CR2),
        })
    }

    /// The sums of the fixed pages, for [`crate::check::fixed_pages`]. The guest carries them, so
    /// that a release with other code can check it too.
    #[must_use]
    pub fn fixed_sums(&self) -> Vec<u64> {
        (0..LOW_PAGES).map(|page| self.load(word::FIXED_SUMS + page * 8)).collect()
    }

    fn request(&self, word: u64) -> u64 {
        let request = self.load(word).wrapping_add(1);
        self.store(word, request);
        request
    }
}

/// The words that stand in a mailbox before the guest starts: pairs of offset in the page and value.
pub(crate) fn first_words(layout: &Layout, sums: &[u64]) -> Vec<(u64, u64)> {
    let work = layout.work();
    let mut words = vec![
        (word::MAGIC, MAGIC),
        (word::VERSION, VERSION),
        (word::MEMORY_BYTES, layout.memory_bytes()),
        (word::WORK_START, work.start),
        (word::WORK_END, work.end),
        (word::VCPU, layout.vcpu().into()),
    ];
    let sums = (0..).map(|page| word::FIXED_SUMS + page * 8).zip(sums);
    words.extend(sums.map(|(offset, &sum)| (offset, sum)));
    words
}

const _: () = assert!(word::FIXED_SUMS + LOW_PAGES * 8 == PAGE_BYTES);

#[cfg(test)]
mod tests;
