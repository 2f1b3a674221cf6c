//! For tests: a memory in a vector, and a thread guest in it that is stepped by hand.

use core::cell::{Cell, RefCell};
use core::convert::Infallible;
use core::ops::Range;

use crate::check::{Check, FixedCheck, fixed_pages, work_area};
use crate::{Image, Layout, MAILBOX_OFFSET, Mailbox, Options, PAGE_BYTES, Report, SharedWords, Walk, Words};

/// Words of a page.
pub(crate) const PAGE_WORDS: u64 = 512;

/// Guest memory as a vector of words. Writes are counted.
#[derive(Debug)]
pub(crate) struct Memory {
    words: Vec<Cell<u64>>,
    /// Pages whose first word was read since the list was last taken.
    pub(crate) first_words_read: RefCell<Vec<u64>>,
    pub(crate) written: Cell<u64>,
}

impl Memory {
    pub(crate) fn new(image: &Image) -> Self {
        let len = image.layouts()[0].memory_bytes() / 8;
        let memory = Self {
            words: (0..len).map(|_| Cell::new(0)).collect(),
            first_words_read: RefCell::default(),
            written: Cell::default(),
        };
        for (offset, bytes) in image.pieces() {
            memory.write(offset, bytes);
        }
        memory
    }

    pub(crate) fn word(&self, index: u64) -> &Cell<u64> {
        &self.words[usize::try_from(index).unwrap()]
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        for (at, &byte) in (offset..).zip(bytes) {
            let word = self.word(at / 8);
            let mut value = word.get().to_le_bytes();
            value[usize::try_from(at % 8).unwrap()] = byte;
            word.set(u64::from_le_bytes(value));
        }
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Infallible> {
        for (index, place) in (offset / 8..).zip(bytes.chunks_exact_mut(8)) {
            place.copy_from_slice(&self.word(index).get().to_le_bytes());
        }
        Ok(())
    }

    pub(crate) fn page(&self, page: u64) -> Vec<u64> {
        page_words(page).map(|index| self.word(index).get()).collect()
    }

    pub(crate) fn set_page(&self, page: u64, words: &[u64]) {
        for (index, &word) in page_words(page).zip(words) {
            self.word(index).set(word);
        }
    }
}

fn page_words(page: u64) -> Range<u64> {
    page * PAGE_WORDS..(page + 1) * PAGE_WORDS
}

impl Words for Memory {
    fn load(&self, offset_bytes: u64) -> u64 {
        if offset_bytes.is_multiple_of(PAGE_BYTES) {
            let page = offset_bytes / PAGE_BYTES;
            self.first_words_read.borrow_mut().push(page);
        }
        self.word(offset_bytes / 8).get()
    }

    fn store(&self, offset_bytes: u64, value: u64) {
        self.written.set(self.written.get() + 1);
        self.word(offset_bytes / 8).set(value);
    }
}

impl SharedWords for Memory {
    fn increment(&self, offset_bytes: u64) {
        self.store(offset_bytes, self.load(offset_bytes).wrapping_add(1));
    }
}

/// A thread guest of 4 MiB whose clock goes on by 1000 at each look.
pub(crate) struct Rig {
    pub(crate) memory: Memory,
    pub(crate) layout: Layout,
    pub(crate) walk: Walk,
    pub(crate) now: u64,
    pub(crate) reports: Vec<Report>,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let image = Image::new(4 << 20, &Options::new(1_000_000)).unwrap();
        let layout = image.layouts()[0];
        Self {
            memory: Memory::new(&image),
            layout,
            walk: Walk::new(&layout, 5_000),
            now: 5_000,
            reports: Vec::new(),
        }
    }

    pub(crate) fn mailbox(&self) -> Mailbox<'_, Memory> {
        Mailbox::new(&self.memory, MAILBOX_OFFSET)
    }

    pub(crate) fn step(&mut self) -> Option<Report> {
        let now = &mut self.now;
        let mut clock = || {
            *now += 1000;
            *now
        };
        let report = self.walk.step(&self.memory, &mut clock);
        self.reports.extend(report);
        report
    }

    pub(crate) fn steps(&mut self, count: u64) {
        for _ in 0..count {
            self.step();
        }
    }

    /// Steps until this report comes.
    pub(crate) fn until(&mut self, report: Report) {
        for _ in 0..100_000 {
            if self.step() == Some(report) {
                return;
            }
        }
        panic!("{report:?} never came");
    }

    pub(crate) fn check(&self) -> Check {
        let progress = self.mailbox().progress(&self.layout);
        work_area(&self.layout, progress, |offset, bytes| self.memory.read(offset, bytes)).unwrap()
    }

    pub(crate) fn check_fixed(&self) -> FixedCheck {
        fixed_pages(&self.mailbox().fixed_sums(), |offset, bytes| self.memory.read(offset, bytes)).unwrap()
    }
}
