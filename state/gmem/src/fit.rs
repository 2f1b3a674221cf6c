//! Which memory can be handed over: shared with the host, every page of it, and none lost.

use std::collections::BTreeMap;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use abi::gmem::MemoryName;
use pages::PAGE_SIZE;
use region::Errno;
use thiserror::Error;

use crate::ChangeError;
use crate::Inode;

/// Why memory cannot be handed over. It is as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum UnfitError {
    /// The hardware lost a page (EHWPOISON). The guest will find out; a successor must not.
    #[error(
        "guest memory {name} lost its page at {offset_bytes:#x}: it cannot be handed over. Shut the guest down, or free \
         the page"
    )]
    Poisoned {
        /// The memory.
        name: MemoryName,
        /// Where the page is in it.
        offset_bytes: u64,
    },
    /// A page is the guest's alone (EOPNOTSUPP): no host can map it in the successor.
    #[error("guest memory {name} is private from {offset_bytes:#x} on: it cannot be handed over")]
    Private {
        /// The memory.
        name: MemoryName,
        /// Where the first such page is in it.
        offset_bytes: u64,
    },
}

impl UnfitError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Poisoned { .. } => Errno::HWPOISON,
            Self::Private { .. } => Errno::OPNOTSUPP,
        }
    }
}

/// Who sees a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Guest and host.
    Shared,
    /// The guest alone.
    Private,
}

/// Runs of pages that are private: the first page of each, and the one after its last.
pub(crate) type PrivatePages = BTreeMap<u64, u64>;

/// Takes pages out of the runs, and puts them in again as one of their own if they are private.
fn set(private: &mut PrivatePages, start: u64, end: u64, to: Sharing) {
    let touched: Vec<(u64, u64)> = private
        .range(..end)
        .filter(|(_, last)| **last > start)
        .map(|(first, last)| (*first, *last))
        .collect();
    for (first, last) in touched {
        private.remove(&first);
        if first < start {
            private.insert(first, start);
        }
        if last > end {
            private.insert(end, last);
        }
    }
    if to == Sharing::Private {
        private.insert(start, end);
    }
}

impl Inode {
    fn private(&self) -> MutexGuard<'_, PrivatePages> {
        self.private.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that pages were converted. KVM has no call that says which pages are private, so who converts them says so
    /// here, after a conversion to shared and before one to private. It is a change like any other: none is made of
    /// frozen memory.
    ///
    /// # Errors
    /// [`ChangeError`]
    pub fn converted(&self, offset_bytes: u64, len_bytes: u64, to: Sharing) -> Result<(), ChangeError> {
        self.change(offset_bytes, len_bytes, |inode| {
            let start = offset_bytes / PAGE_SIZE;
            set(&mut inode.private(), start, start + len_bytes / PAGE_SIZE, to);
            Ok(())
        })
    }

    /// Offset of the first page of this range, in bytes, that is private; `None` if the host sees all of it.
    pub fn first_private(&self, offset_bytes: u64, len_bytes: u64) -> Option<u64> {
        let (start, end) =
            (offset_bytes / PAGE_SIZE, offset_bytes.saturating_add(len_bytes).div_ceil(PAGE_SIZE));
        let private = self.private();
        let first = private.range(..end).find(|(_, last)| **last > start)?;
        Some(start.max(*first.0) * PAGE_SIZE)
    }

    /// Refuses memory of which a page is private or poisoned, as [`Mapping::first_poisoned`](region::Mapping::first_poisoned)
    /// finds it; where the kernel cannot be asked, there is none that anybody knows of. To be asked while the guest runs:
    /// it looks at all page tables.
    ///
    /// # Errors
    /// [`UnfitError`]
    pub fn check_fit(&self) -> Result<(), UnfitError> {
        let name = self.name();
        self.check_shared()?;
        match self.mapping().first_poisoned() {
            Ok(Some(offset_bytes)) => Err(UnfitError::Poisoned { name, offset_bytes }),
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Refuses memory of which a page is private.
    pub(crate) fn check_shared(&self) -> Result<(), UnfitError> {
        match self.first_private(0, self.size_bytes()) {
            Some(offset_bytes) => Err(UnfitError::Private { name: self.name(), offset_bytes }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// O1.6.
    #[test]
    fn pages_are_private_that_were_made_so_last() {
        // Every way to convert three ranges of six pages, against a table of the pages.
        let ranges = (0..6).flat_map(|start| (start + 1..=6).map(move |end| (start, end)));
        let ways = || ranges.clone().flat_map(|range| [(range, Sharing::Private), (range, Sharing::Shared)]);
        for one in ways() {
            for two in ways() {
                for three in ways() {
                    let (mut runs, mut pages) = (PrivatePages::new(), [Sharing::Shared; 6]);
                    for ((start, end), to) in [one, two, three] {
                        set(&mut runs, start as u64, end as u64, to);
                        pages[start..end].fill(to);
                    }
                    let found = (0..6_u64)
                        .map(|page| runs.iter().any(|(first, last)| (*first..*last).contains(&page)));
                    let wanted = pages.iter().map(|page| *page == Sharing::Private);
                    assert!(found.eq(wanted), "{one:?} {two:?} {three:?}: {runs:?}");
                }
            }
        }
    }
}
