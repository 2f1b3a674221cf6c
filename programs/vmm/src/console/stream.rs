//! What the guest has said: all of it has a place, of which the latest is kept.

use std::collections::VecDeque;

/// The latest output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Stream {
    /// Place of the first byte that is kept.
    start: u64,
    bytes: VecDeque<u8>,
}

impl Stream {
    /// One that begins at this place with these bytes.
    pub(crate) fn new(start: u64, bytes: Vec<u8>) -> Option<Self> {
        start.checked_add(len(bytes.len()))?;
        Some(Self { start, bytes: bytes.into() })
    }

    /// Place of the first byte that is kept.
    pub(crate) const fn start(&self) -> u64 {
        self.start
    }

    /// Place of the next byte.
    pub(crate) fn end(&self) -> u64 {
        self.start + len(self.bytes.len())
    }

    /// Adds bytes, and keeps the last `keep` of all.
    pub(crate) fn push(&mut self, bytes: &[u8], keep: usize) {
        self.bytes.extend(bytes);
        self.forget(self.end().saturating_sub(len(keep)));
    }

    /// Forgets what is before this place.
    pub(crate) fn forget(&mut self, before: u64) {
        let gone = before.saturating_sub(self.start).min(len(self.bytes.len()));
        self.bytes.drain(..usize::try_from(gone).unwrap_or(usize::MAX).min(self.bytes.len()));
        self.start += gone;
    }

    /// Up to `most` bytes from this place on, which is kept.
    pub(crate) fn read(&self, from: u64, most: usize) -> Vec<u8> {
        let skip = usize::try_from(from.saturating_sub(self.start)).unwrap_or(usize::MAX);
        self.bytes.iter().skip(skip).take(most).copied().collect()
    }

    /// From where on to show it to somebody new: the last `most` bytes, in whole lines if something is left out.
    pub(crate) fn recent(&self, most: usize) -> u64 {
        let from = self.end().saturating_sub(len(most)).max(self.start);
        if from == 0 {
            return 0;
        }
        let line = self.read(from, most).iter().position(|byte| *byte == b'\n');
        line.map_or(from, |line| from + len(line) + 1)
    }
}

/// A number of bytes as the distance of two places.
fn len(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_bytes_are_kept_and_each_has_its_place() {
        let mut stream = Stream::default();
        stream.push(b"abcdef", 4);
        assert_eq!((stream.start(), stream.end()), (2, 6));
        assert_eq!(stream.read(3, 2), b"de");
        assert_eq!(stream.read(6, 2), b"");
        stream.forget(5);
        stream.push(b"g", 4);
        assert_eq!((stream.start(), stream.read(5, 9)), (5, b"fg".to_vec()));
        stream.forget(100);
        assert_eq!((stream.start(), stream.end()), (7, 7));
    }

    #[test]
    fn somebody_new_is_shown_whole_lines_of_what_is_recent() {
        let mut stream = Stream::default();
        stream.push(b"one\ntwo\nthree", 100);
        assert_eq!(stream.recent(100), 0);
        assert_eq!(stream.read(stream.recent(10), 100), b"two\nthree".to_vec());
        assert_eq!(stream.read(stream.recent(3), 100), b"ree".to_vec(), "there is no whole line");
        stream.forget(2);
        assert_eq!(stream.read(stream.recent(100), 100), b"two\nthree".to_vec());
    }

    #[test]
    fn a_place_beyond_the_last_is_none() {
        assert_eq!(Stream::new(u64::MAX, vec![1]), None);
        assert!(Stream::new(u64::MAX - 1, vec![1]).is_some());
    }
}
