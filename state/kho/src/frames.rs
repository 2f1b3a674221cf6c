//! The frames of region 0: taken or free.

use pages::PageRange;
use pages::Pfn;

/// One bit a frame. Frame 0 is the header's and always taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frames {
    words: Vec<u64>,
    len: u64,
    taken: u64,
}

fn place(pfn: u64) -> (usize, u64) {
    (usize::try_from(pfn / 64).unwrap_or(usize::MAX), 1 << (pfn % 64))
}

impl Frames {
    pub(crate) fn new(len: u64) -> Self {
        let words = vec![0; usize::try_from(len.div_ceil(64)).unwrap_or_default()];
        let mut frames = Self { words, len, taken: 0 };
        frames.set(0, true);
        frames
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn taken(&self) -> u64 {
        self.taken
    }

    pub(crate) fn free(&self) -> u64 {
        self.len - self.taken
    }

    /// True of a frame that is not there, too.
    pub(crate) fn is_taken(&self, pfn: Pfn) -> bool {
        self.is_taken_at(pfn.get())
    }

    fn is_taken_at(&self, pfn: u64) -> bool {
        let (word, bit) = place(pfn);
        self.words.get(word).is_none_or(|word| word & bit != 0)
    }

    fn set(&mut self, pfn: u64, taken: bool) {
        if pfn >= self.len || self.is_taken_at(pfn) == taken {
            return;
        }
        let (word, bit) = place(pfn);
        if let Some(word) = self.words.get_mut(word) {
            *word ^= bit;
            self.taken = if taken { self.taken + 1 } else { self.taken - 1 };
        }
    }

    pub(crate) fn take(&mut self, pfn: Pfn) {
        self.set(pfn.get(), true);
    }

    pub(crate) fn release(&mut self, pfn: Pfn) {
        self.set(pfn.get(), false);
    }

    /// Takes the first run of `count` free frames.
    pub(crate) fn take_run(&mut self, count: u64) -> Option<PageRange> {
        let mut start = 1;
        let mut next = 1;
        while next < self.len {
            if next - start == count {
                break;
            }
            if self.is_taken_at(next) {
                start = next + 1;
            }
            next += 1;
        }
        if next - start != count {
            return None;
        }
        let range = PageRange::new(Pfn::new(start).ok()?, count).ok()?;
        range.pages().for_each(|pfn| self.take(pfn));
        Some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_never_given_out() {
        let mut frames = Frames::new(3);
        assert_eq!(frames.take_run(1).unwrap().start().get(), 1);
        assert_eq!(frames.take_run(1).unwrap().start().get(), 2);
        assert_eq!(frames.take_run(1), None);
        assert_eq!((frames.free(), frames.taken()), (0, 3));
    }

    #[test]
    fn a_run_is_found_behind_taken_frames_and_up_to_the_last() {
        let mut frames = Frames::new(130);
        assert_eq!(frames.take_run(100).unwrap().start().get(), 1);
        assert_eq!(frames.take_run(30), None);
        assert_eq!(frames.take_run(29).unwrap().end(), 130);
        frames.release(Pfn::new(50).unwrap());
        frames.release(Pfn::new(51).unwrap());
        assert_eq!(frames.take_run(3), None);
        assert_eq!(frames.take_run(2).unwrap().start().get(), 50);
    }
}
