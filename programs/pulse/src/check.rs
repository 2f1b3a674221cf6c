//! The host's own proof that a stopped guest has every byte.
//!
//! [`work_area`] compares every word of the work area with what the guest must have written there;
//! [`fixed_pages`] compares everything below it that never changes (code, page tables, descriptors)
//! with sums made before the guest ever ran. Both only read, through a closure that fills a buffer
//! from an offset in the guest's memory.
//!
//! What cannot be told from outside: the page in progress may be of two generations, split at any
//! word, so a loss that looks like another split is left for the guest itself to find.

use core::ops::Range;

use crate::layout::{GDT_OFFSET, LOW_PAGES, Layout, MAX_VCPUS, PAGE_BYTES, PD_OFFSET, PML4_OFFSET, is_fixed};
use crate::mailbox::{BadWord, Progress};
use crate::pattern::{Line, mix};

const PAGE_LEN: usize = 4096;
const PAGE_WORDS: u64 = 512;
/// Pages read at once: 256 KiB stay in the second-level cache.
const PAGES_AT_ONCE: u64 = 64;

/// What a check of the work area found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Check {
    /// Pages of 4 KiB compared.
    pub pages_checked: u64,
    /// Pages with at least one wrong word.
    pub pages_lost: u64,
    /// Those of them that read zero all over: as a hole in the memory does.
    pub pages_zero: u64,
    /// The first wrong word.
    pub first_bad: Option<BadWord>,
}

impl Check {
    /// Both checks in one. `self` is of the lower pages.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            pages_checked: self.pages_checked + other.pages_checked,
            pages_lost: self.pages_lost + other.pages_lost,
            pages_zero: self.pages_zero + other.pages_zero,
            first_bad: self.first_bad.or(other.first_bad),
        }
    }

    /// Whether every byte was there.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.pages_lost == 0
    }
}

/// Compares the whole work area of a stopped guest.
///
/// `read` fills the buffer with the memory's bytes from this offset on. Mind that reading a hole
/// through a shared mapping fills it with a page of zeroes.
///
/// # Errors
///
/// What `read` answered.
pub fn work_area<E>(
    layout: &Layout,
    progress: Progress,
    read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Check, E> {
    pages(layout, progress, layout.work_pages(), read)
}

/// Compares some pages of the work area of a stopped guest: indexes counted from offset 0, as far as
/// they lie in the work area. Several threads can share a large memory this way.
///
/// # Errors
///
/// What `read` answered.
pub fn pages<E>(
    layout: &Layout,
    progress: Progress,
    pages: Range<u64>,
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Check, E> {
    let work = layout.work_pages();
    let end = pages.end.min(work.end);
    let mut next = pages.start.max(work.start);
    let mut buffer = vec![0; PAGE_LEN * 64];
    let lines = Lines::of(progress);
    let mut check = Check::default();
    while next < end {
        let offset = next * PAGE_BYTES;
        let count = PAGES_AT_ONCE.min(end - next);
        let len = buffer.len();
        let piece = usize::try_from(count).map_or(len, |count| count * PAGE_LEN);
        let piece = &mut buffer[..piece];
        read(offset, piece)?;
        for (page, bytes) in (next..).zip(piece.chunks_exact(PAGE_LEN)) {
            check = check.and(lines.compare(page, bytes));
        }
        next += count;
    }
    Ok(check)
}

/// What pages hold, seen from the cursor.
struct Lines {
    cursor: u64,
    /// Before the cursor.
    done: Line,
    /// After it.
    ahead: Line,
}

impl Lines {
    fn of(progress: Progress) -> Self {
        Self {
            cursor: progress.cursor,
            done: Line::of(progress.pass.wrapping_add(1)),
            ahead: Line::of(progress.pass),
        }
    }

    fn compare(&self, page: u64, bytes: &[u8]) -> Check {
        let first = page * PAGE_WORDS;
        let bad = if page < self.cursor {
            first_bad(self.done, first, bytes)
        } else if page > self.cursor {
            first_bad(self.ahead, first, bytes)
        } else {
            // Words of the next generation up to some word, then words of this one.
            first_bad(self.done, first, bytes).and_then(|split| {
                let rest = (split.offset_bytes - first * 8).try_into().unwrap_or(0);
                first_bad(self.ahead, split.offset_bytes / 8, &bytes[rest..])
            })
        };
        Check {
            pages_checked: 1,
            pages_lost: u64::from(bad.is_some()),
            pages_zero: u64::from(bad.is_some() && bytes.iter().all(|&byte| byte == 0)),
            first_bad: bad,
        }
    }
}

/// The first word that is not on the line; `first` is the index of the first word in `bytes`.
fn first_bad(line: Line, first: u64, bytes: &[u8]) -> Option<BadWord> {
    if all_on(line, first, bytes) {
        return None;
    }
    (first..)
        .zip(words(bytes))
        .map(|(index, found)| BadWord { offset_bytes: index * 8, expected: line.word(index), found })
        .find(|word| word.expected != word.found)
}

/// Whether all words are on the line. No early end, so that it runs on vectors.
fn all_on(line: Line, first: u64, bytes: &[u8]) -> bool {
    let mut expected = line.word(first);
    let mut differing = 0;
    for found in words(bytes) {
        differing |= found ^ expected;
        expected = expected.wrapping_add(line.step);
    }
    differing == 0
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|&word| u64::from_le_bytes(word))
}

/// What a check of the fixed pages found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedCheck {
    /// Pages compared.
    pub pages_checked: u64,
    /// Offsets of the pages that have changed.
    pub changed: Vec<u64>,
}

/// Compares everything below the work area that never changes with its sums, as
/// [`crate::Mailbox::fixed_sums`] gives them.
///
/// # Errors
///
/// What `read` answered.
pub fn fixed_pages<E>(
    sums: &[u64],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<FixedCheck, E> {
    let mut check = FixedCheck { pages_checked: 0, changed: Vec::new() };
    let mut bytes = [0; PAGE_LEN];
    for page in (0..LOW_PAGES).filter(|&page| is_fixed(page)) {
        read(page * PAGE_BYTES, &mut bytes)?;
        let found = page_sum(page, &bytes);
        let same = usize::try_from(page).is_ok_and(|page| sums.get(page) == Some(&found));
        check.pages_checked += 1;
        if !same {
            check.changed.push(page * PAGE_BYTES);
        }
    }
    Ok(check)
}

/// The sum of a fixed page, over all bits but those that a processor may set. Never 0.
pub(crate) fn page_sum(page: u64, bytes: &[u8]) -> u64 {
    let sum = (0..).zip(words(bytes)).fold(mix(page + 1), |sum, (index, word)| {
        mix(sum ^ (word & !set_by_processor(page, index))).wrapping_add(index)
    });
    sum.max(1)
}

/// The bits of a word in a fixed page that a processor may set: accessed and dirty in page tables,
/// accessed and busy in descriptors.
fn set_by_processor(page: u64, index: u64) -> u64 {
    let offset = page * PAGE_BYTES;
    if offset == GDT_OFFSET {
        let is_tss = (5..5 + 2 * u64::from(MAX_VCPUS)).contains(&index) && index % 2 == 1;
        let is_segment = (1..5).contains(&index);
        u64::from(is_segment) << 40 | u64::from(is_tss) << 41
    } else if (PML4_OFFSET..PD_OFFSET + 64 * PAGE_BYTES).contains(&offset) {
        0x60
    } else {
        0
    }
}

#[cfg(test)]
mod tests;
