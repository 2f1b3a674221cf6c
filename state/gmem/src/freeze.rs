//! No page is added or taken away while a [`Freeze`] stands.

use std::sync::Arc;
use std::sync::PoisonError;

use abi::gmem::MemoryName;
use region::Mapping;
use region::PageSize;
use region::RegionError;
use region::Store;
use region::WarmError;
use thiserror::Error;
use uffd::Hold;
use uffd::Uffd;

use crate::Inode;

/// What an inode's changes go through.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    freezes: usize,
    hold: Option<Hold<Arc<Mapping>>>,
    held: Option<Held>,
}

impl Gate {
    pub(crate) fn is_frozen(&self) -> bool {
        self.freezes > 0
    }
}

/// How faults are kept from adding pages while a freeze stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// There was no hole: no fault can add a page.
    Whole,
    /// By userfaultfd: who faults on a hole waits until the freeze ends.
    Userfaultfd,
    /// This process has no right to userfaultfd, or it is a guest_memfd, whose faults nobody can hold: all holes were
    /// filled first.
    Prefaulted,
}

/// Why memory was not frozen. It is as it was, but for holes that were filled.
#[derive(Debug, Error)]
pub enum FreezeError {
    /// It is not known how many pages there are.
    #[error("cannot tell whether guest memory {name} has holes")]
    Region {
        /// The memory.
        name: MemoryName,
        /// Why.
        #[source]
        source: RegionError,
    },
    /// There is no memory for the holes of a guest_memfd.
    #[error(
        "cannot fill the holes of guest memory {name}, which is the one way to freeze a guest_memfd: leave the host more \
         memory, or have the memory filled when the machine is made"
    )]
    Fill {
        /// The memory.
        name: MemoryName,
        /// Why.
        #[source]
        source: RegionError,
    },
    /// Faults could not be held.
    #[error("cannot hold faults of guest memory {name}")]
    Userfaultfd {
        /// The memory.
        name: MemoryName,
        /// Why.
        #[source]
        source: uffd::CallError,
    },
    /// There is no right to userfaultfd, and no memory for the holes.
    #[error(
        "cannot fill the holes of guest memory {name}, which without a right to userfaultfd is the way to freeze it"
    )]
    Warm {
        /// The memory.
        name: MemoryName,
        /// Why.
        #[source]
        source: WarmError,
    },
}

/// Keeps an inode frozen; several may stand at once, and the last one's end is the freeze's.
#[derive(Debug)]
#[must_use = "the freeze ends when this is dropped"]
pub struct Freeze {
    inode: Arc<Inode>,
    held: Held,
}

impl Freeze {
    /// How faults are held.
    pub fn held(&self) -> Held {
        self.held
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        let mut gate = self.inode.gate.write().unwrap_or_else(PoisonError::into_inner);
        gate.freezes -= 1;
        if gate.freezes == 0 {
            gate.held = None;
            // Ends the registration: whoever waits at a hole goes on.
            gate.hold = None;
        }
    }
}

impl Inode {
    /// Freezes the memory. When this has returned, no allocation or punch of ours is running and none can
    /// start, and no fault in this address space adds a page (requirement R2.4).
    ///
    /// # Errors
    /// [`FreezeError`]
    pub fn freeze(self: &Arc<Self>) -> Result<Freeze, FreezeError> {
        let mut gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let held = match gate.held {
            Some(held) => held,
            None => self.hold_faults(&mut gate)?,
        };
        gate.held = Some(held);
        gate.freezes += 1;
        Ok(Freeze { inode: Arc::clone(self), held })
    }

    fn hold_faults(&self, gate: &mut Gate) -> Result<Held, FreezeError> {
        let name = self.name();
        let region = self.mapping().region();
        if region.is_whole().map_err(|source| FreezeError::Region { name, source })? {
            return Ok(Held::Whole);
        }
        if region.store() == Store::GuestMemfd {
            let filled = region.fill().map_err(|source| FreezeError::Fill { name, source });
            return filled.map(|()| Held::Prefaulted);
        }
        let Ok(uffd) = Uffd::open() else {
            let warmed = self.mapping().warm(PageSize::Small, &mut |_, _| {});
            return warmed.map(|_| Held::Prefaulted).map_err(|source| FreezeError::Warm { name, source });
        };
        let hold = Hold::new(uffd, Arc::clone(self.mapping()));
        gate.hold = Some(hold.map_err(|source| FreezeError::Userfaultfd { name, source })?);
        Ok(Held::Userfaultfd)
    }

    /// True while a freeze stands.
    pub fn is_frozen(&self) -> bool {
        self.gate.read().unwrap_or_else(PoisonError::into_inner).is_frozen()
    }
}
