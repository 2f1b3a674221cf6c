//! The guest that is a thread: the same walk in Rust, over [`SharedWords`].
//!
//! A [`Walk`] is what the registers are to the KVM guest. The thread that owns it calls
//! [`Walk::step`] until it is told to stop; between two steps [`Walk::encode`] makes bytes of it, with
//! which it goes on elsewhere. A guest with several vCPUs is several walks in one memory, each with a
//! thread of its own. Their clock gives nanoseconds of a monotonic clock, so one millisecond is
//! 1,000,000 cycles ([`crate::Options::cycles_per_ms`]).

use thiserror::Error;

use crate::layout::{CHUNK_BYTES, CHUNK_WORDS, HUGE_PAGE_BYTES, Layout, PAGE_BYTES, SHARED_OFFSET};
use crate::mailbox::{BadWord, PAUSE_RING_LEN, SharedWords, word};
use crate::pattern::Line;
use crate::ports::Outside;
use crate::report::Report;

const CHUNKS: u64 = PAGE_BYTES / CHUNK_BYTES;
/// Words of an encoded walk.
const ENCODED_WORDS: usize = 15;
/// Length of an encoded walk in bytes.
pub const ENCODED_BYTES: usize = ENCODED_WORDS * 8;
const ENCODED_VERSION: u64 = 1;

mod outside;

/// Why [`Walk::decode`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum WalkError {
    /// The state is too short or too long.
    #[error("a walk is {ENCODED_BYTES} bytes long, not {found_bytes}")]
    Length {
        /// Its length in bytes.
        found_bytes: usize,
    },
    /// The state is of a version that this release does not know.
    #[error("the walk has version {found}, and this release knows {ENCODED_VERSION}")]
    Version {
        /// The version found.
        found: u64,
    },
    /// A field has a value that no walk over this memory ever has.
    #[error("the walk's field {field} cannot be {found}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value.
        found: u64,
    },
}

/// The live state of one vCPU of the guest that is threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Walk {
    layout: Layout,
    /// Passes done: the generation that is being verified.
    pass: u64,
    /// The page in progress: in the work area, or its end when only the end of the pass is left.
    page: u64,
    /// The chunk in progress, below [`CHUNKS`]; 0 at the end of the work area.
    chunk: u64,
    ticks: u64,
    /// The clock at the last look.
    last: u64,
    /// The clock when the pass began.
    pass_began: u64,
    parked: bool,
    probing: Option<Probing>,
    /// The lines of `pass` and of the one after it.
    old: Line,
    new: Line,
}

/// A probe in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Probing {
    request: u64,
    /// Windows to touch, at most those in memory.
    windows: u64,
    /// Windows touched.
    window: u64,
    /// The clock when it began.
    began: u64,
}

/// The guest's side of the mailbox and of its memory.
struct Hands<'a, W> {
    words: &'a W,
    mailbox: u64,
}

impl<W: SharedWords> Hands<'_, W> {
    fn get(&self, word: u64) -> u64 {
        self.words.load(self.mailbox + word)
    }

    fn set(&self, word: u64, value: u64) {
        self.words.store(self.mailbox + word, value);
    }

    fn increment(&self, word: u64) {
        self.set(word, self.get(word).wrapping_add(1));
    }
}

impl Walk {
    /// A guest that starts: nothing walked yet. `now` is its clock.
    #[must_use]
    pub fn new(layout: &Layout, now: u64) -> Self {
        Self {
            layout: *layout,
            pass: 0,
            page: layout.work_pages().start,
            chunk: 0,
            ticks: 0,
            last: now,
            pass_began: now,
            parked: false,
            probing: None,
            old: Line::of(0),
            new: Line::of(1),
        }
    }

    /// Whether the guest stands still as asked: then a caller may sleep between two steps.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.parked
    }

    /// Does one small piece of work: a chunk, the end of a pass, one window of a probe, or, while
    /// parked, one look at the mailbox. Returns what a KVM guest would have reported by leaving.
    ///
    /// What it does beyond its memory goes to `outside`.
    pub fn step(&mut self, words: &impl SharedWords, outside: &mut impl Outside) -> Option<Report> {
        let hands = Hands { words, mailbox: self.layout.mailbox_offset() };
        let reported = if let Some(probing) = self.probing {
            self.probe_window(&hands, outside, probing)
        } else if self.parked {
            self.look(&hands, outside.now());
            None
        } else if self.layout.work_pages().contains(&self.page) {
            self.walk_chunk(&hands, outside)
        } else {
            self.end_pass(&hands)
        };
        let reported = reported.or_else(|| self.serve(&hands, outside));
        if reported.is_some() {
            hands.increment(word::REPORTS);
        }
        reported
    }

    fn walk_chunk<W: SharedWords>(
        &mut self,
        hands: &Hands<'_, W>,
        outside: &mut impl Outside,
    ) -> Option<Report> {
        let offset = self.page * PAGE_BYTES + self.chunk * CHUNK_BYTES;
        let first = offset / 8;
        let mut differing = 0;
        let mut expected = self.old.word(first);
        for index in first..first + CHUNK_WORDS {
            differing |= hands.words.load(index * 8) ^ expected;
            expected = expected.wrapping_add(self.old.step);
        }
        let wrong = differing != 0 && self.count_errors(hands, first);
        let mut value = self.new.word(first);
        for index in first..first + CHUNK_WORDS {
            hands.words.store(index * 8, value);
            value = value.wrapping_add(self.new.step);
        }
        self.tick(hands, outside.now());
        self.chunk += 1;
        if self.chunk == CHUNKS {
            self.chunk = 0;
            self.page += 1;
            hands.set(word::PAGES_DONE, self.pages_done());
        }
        let first_time = hands.get(word::MISMATCH_REPORTED) != self.pass + 1;
        (wrong && first_time).then(|| {
            hands.set(word::MISMATCH_REPORTED, self.pass + 1);
            Report::Mismatch
        })
    }

    /// Counts the wrong words of a chunk that is not yet written, and keeps the first ever.
    fn count_errors<W: SharedWords>(&self, hands: &Hands<'_, W>, first: u64) -> bool {
        let mut any = false;
        let all = (first..first + CHUNK_WORDS).map(|index| BadWord {
            offset_bytes: index * 8,
            expected: self.old.word(index),
            found: hands.words.load(index * 8),
        });
        for bad in all.filter(|word| word.expected != word.found) {
            if hands.get(word::ERRORS) == 0 {
                hands.set(word::FIRST_OFFSET, bad.offset_bytes);
                hands.set(word::FIRST_EXPECTED, bad.expected);
                hands.set(word::FIRST_FOUND, bad.found);
                hands.set(word::FIRST_PASS, self.pass);
            }
            hands.increment(word::ERRORS);
            any = true;
        }
        any
    }

    fn end_pass<W: SharedWords>(&mut self, hands: &Hands<'_, W>) -> Option<Report> {
        hands.set(word::PASS_CYCLES, self.last.wrapping_sub(self.pass_began));
        self.pass += 1;
        self.page = self.layout.work_pages().start;
        self.pass_began = self.last;
        self.old = self.new;
        self.new = Line::of(self.pass + 1);
        hands.set(word::PASSES, self.pass);
        Some(Report::Pass)
    }

    /// Pages walked over all passes.
    fn pages_done(&self) -> u64 {
        let work = self.layout.work_pages();
        self.pass * (work.end - work.start) + (self.page - work.start)
    }

    fn tick<W: SharedWords>(&mut self, hands: &Hands<'_, W>, now: u64) {
        hands.words.increment(SHARED_OFFSET);
        self.ticks = self.ticks.wrapping_add(1);
        hands.set(word::TICKS, self.ticks);
        self.look(hands, now);
    }

    /// One look at the clock.
    fn look<W: SharedWords>(&mut self, hands: &Hands<'_, W>, now: u64) {
        let gap = now.checked_sub(self.last);
        self.last = now;
        let Some(gap) = gap else {
            hands.increment(word::TIME_WENT_BACK);
            return;
        };
        if gap > hands.get(word::GAP_LONGEST) {
            hands.set(word::GAP_LONGEST, gap);
            hands.set(word::GAP_END, now);
        }
        if gap >= hands.get(word::PAUSE_THRESHOLD) {
            let entry = word::PAUSE_RING + hands.get(word::PAUSES) % PAUSE_RING_LEN * 16;
            hands.set(entry, now);
            hands.set(entry + 8, gap);
            hands.increment(word::PAUSES);
        }
    }

    /// Looks at the host's requests.
    fn serve<W: SharedWords>(&mut self, hands: &Hands<'_, W>, outside: &mut impl Outside) -> Option<Report> {
        self.ask_outside(hands, outside);
        let gap = hands.get(word::GAP_REQUEST);
        if gap != hands.get(word::GAP_ANSWER) {
            hands.set(word::GAP_LONGEST, 0);
            hands.set(word::GAP_END, 0);
            hands.set(word::GAP_ANSWER, gap);
        }
        let request = hands.get(word::PROBE_REQUEST);
        if self.probing.is_none() && request != hands.get(word::PROBE_ANSWER) {
            self.probing = Some(Probing {
                request,
                windows: hands.get(word::PROBE_WINDOWS).min(windows_in(&self.layout)),
                window: 0,
                began: self.last,
            });
        }
        let park = hands.get(word::PARK_REQUEST) != 0;
        let changed = park != self.parked;
        self.parked = park;
        if changed {
            hands.set(word::PARKED, u64::from(park));
        }
        (changed && park).then_some(Report::Parked)
    }

    fn probe_window<W: SharedWords>(
        &mut self,
        hands: &Hands<'_, W>,
        outside: &mut impl Outside,
        probing: Probing,
    ) -> Option<Report> {
        if probing.window == probing.windows {
            self.probing = None;
            let pages = probing.windows * (HUGE_PAGE_BYTES / PAGE_BYTES);
            let cycles = self.last.wrapping_sub(probing.began);
            hands.set(word::PROBE_CYCLES, cycles);
            hands.set(word::PROBE_PAGES, pages);
            hands.set(word::PROBE_ANSWER, probing.request);
            return Some(Report::Probe);
        }
        let window = probing.window * windows_in(&self.layout) / probing.windows;
        let start = (window + 1) * HUGE_PAGE_BYTES;
        for page in (start / PAGE_BYTES..).take(PAGES_IN_WINDOW) {
            hands.words.load(page * PAGE_BYTES);
            self.tick(hands, outside.now());
        }
        self.probing = Some(Probing { window: probing.window + 1, ..probing });
        None
    }

    /// The state as bytes: words in little-endian order.
    #[must_use]
    pub fn encode(&self) -> [u8; ENCODED_BYTES] {
        let probing = self.probing.unwrap_or(Probing { request: 0, windows: 0, window: 0, began: 0 });
        let words: [u64; ENCODED_WORDS] = [
            ENCODED_VERSION,
            self.layout.memory_bytes(),
            self.layout.mailbox_offset(),
            self.pass,
            self.page,
            self.chunk,
            self.ticks,
            self.last,
            self.pass_began,
            u64::from(self.parked),
            u64::from(self.probing.is_some()),
            probing.request,
            probing.windows,
            probing.window,
            probing.began,
        ];
        let mut bytes = [0; ENCODED_BYTES];
        let (places, _) = bytes.as_chunks_mut::<8>();
        for (place, word) in places.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        bytes
    }

    /// The walk over the memory with this layout that was encoded so.
    ///
    /// # Errors
    ///
    /// [`WalkError`] if no walk over this memory could be in this state.
    pub fn decode(bytes: &[u8], layout: &Layout) -> Result<Self, WalkError> {
        let found_bytes = bytes.len();
        let bytes: &[u8; ENCODED_BYTES] = bytes.try_into().map_err(|_| WalkError::Length { found_bytes })?;
        let mut words = [0; ENCODED_WORDS];
        for (word, place) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*place);
        }
        check_words(&words, layout)?;
        let [_, _, _, pass, page, chunk, ticks, last, pass_began, parked, ..] = words;
        let [.., is_probing, request, windows, window, began] = words;
        Ok(Self {
            layout: *layout,
            pass,
            page,
            chunk,
            ticks,
            last,
            pass_began,
            parked: parked == 1,
            probing: (is_probing == 1).then_some(Probing { request, windows, window, began }),
            old: Line::of(pass),
            new: Line::of(pass + 1),
        })
    }
}

/// Whether a walk over this memory can have these words.
fn check_words(words: &[u64; ENCODED_WORDS], layout: &Layout) -> Result<(), WalkError> {
    let [version, memory_bytes, mailbox_offset, pass, page, chunk, ..] = *words;
    let [.., parked, is_probing, request, windows, window, began] = *words;
    if version != ENCODED_VERSION {
        return Err(WalkError::Version { found: version });
    }
    let work = layout.work_pages();
    let at_end = page == work.end;
    // Leaves room for the count of pages over all passes.
    let passes = u64::MAX / layout.memory_bytes();
    let no_probe = [request, windows, window, began] == [0; 4];
    let rules = [
        ("memory_bytes", memory_bytes, memory_bytes == layout.memory_bytes()),
        ("mailbox_offset", mailbox_offset, mailbox_offset == layout.mailbox_offset()),
        ("pass", pass, pass < passes),
        ("page", page, work.contains(&page) || at_end),
        ("chunk", chunk, chunk < if at_end { 1 } else { CHUNKS }),
        ("parked", parked, parked <= 1),
        ("is_probing", is_probing, is_probing == 1 || is_probing == 0 && no_probe),
        ("windows", windows, windows <= windows_in(layout)),
        ("window", window, window <= windows),
    ];
    match rules.into_iter().find(|(.., holds)| !holds) {
        Some((field, found, _)) => Err(WalkError::Field { field, found }),
        None => Ok(()),
    }
}

/// Windows that a probe can touch: all of memory but the first 2 MiB.
fn windows_in(layout: &Layout) -> u64 {
    layout.memory_bytes() / HUGE_PAGE_BYTES - 1
}

const PAGES_IN_WINDOW: usize = 512;
const _: () = assert!(HUGE_PAGE_BYTES / PAGE_BYTES == PAGES_IN_WINDOW as u64);

#[cfg(test)]
mod tests;
