//! Memory as a survey sees it.

use alloc::vec::Vec;

use abi::Memory;
use abi::NoMemory;
use pages::PageRange;

/// Memory, and what else is known to be there though it cannot be read here: the guest memory of an arena, whose bytes lie
/// in other files.
pub(crate) struct View<'a, M> {
    memory: &'a M,
    runs: Vec<PageRange>,
}

impl<M> Clone for View<'_, M> {
    fn clone(&self) -> Self {
        Self { memory: self.memory, runs: self.runs.clone() }
    }
}

impl<'a, M: Memory> View<'a, M> {
    pub(crate) fn new(memory: &'a M) -> Self {
        let runs = memory.runs();
        Self { memory, runs }
    }

    /// With these runs for those of the source.
    pub(crate) fn with_runs(memory: &'a M, mut runs: Vec<PageRange>) -> Self {
        runs.sort_unstable_by_key(|run| run.start());
        Self { memory, runs }
    }
}

impl<M: Memory> Memory for View<'_, M> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.memory.read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        self.runs.clone()
    }
}
