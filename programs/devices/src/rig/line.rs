//! An interrupt line that counts.

use std::io;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

// The crate's own in its unit tests, and the one that the root of an integration test brings in.
use crate::InterruptLine;

/// Counts what is done to it.
#[derive(Debug, Default)]
pub(crate) struct CountedLine {
    raised: AtomicUsize,
    lowered: AtomicUsize,
}

impl CountedLine {
    pub(crate) fn raised(&self) -> usize {
        self.raised.load(Ordering::SeqCst)
    }

    pub(crate) fn lowered(&self) -> usize {
        self.lowered.load(Ordering::SeqCst)
    }
}

impl InterruptLine for CountedLine {
    fn raise(&self) -> io::Result<()> {
        self.raised.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn lower(&self) -> io::Result<()> {
        self.lowered.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
