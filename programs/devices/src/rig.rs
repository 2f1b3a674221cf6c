//! For tests: an interrupt line that counts, and an output that is kept.

use std::io;
use std::io::Write;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

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

/// Keeps what is written. Clones are the same output.
#[derive(Debug, Clone, Default)]
pub(crate) struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
