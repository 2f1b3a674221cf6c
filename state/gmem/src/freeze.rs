//! No page is added or taken away while a [`Freeze`] stands.

use std::sync::Arc;
use std::time::Duration;

use abi::gmem::MemoryName;
use region::Errno;
use region::Mapping;
use region::PageSize;
use region::RegionError;
use region::Store;
use region::WarmError;
use thiserror::Error;
use uffd::Faults;
use uffd::Hold;
use uffd::OpenError;
use uffd::Parked;
use uffd::Uffd;

use crate::Inode;
use crate::gate::Stopped;

/// What keeps faults from adding pages while a freeze stands.
#[derive(Debug)]
pub(crate) struct Holding {
    held: Held,
    hold: Option<Hold<Arc<Mapping>>>,
    faults: Option<Arc<Faults>>,
}

impl Holding {
    /// For memory that is to be unmapped: gives what is to be woken after that.
    pub(crate) fn end(self) -> Option<Parked> {
        self.hold.map(|hold| hold.end().1)
    }

    fn told(&self) -> (Held, Option<Arc<Faults>>) {
        (self.held, self.faults.clone())
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
    /// The machine that owns it is gone (EIO).
    #[error("guest memory {name} is nobody's any more: its machine is gone")]
    Ended {
        /// The memory.
        name: MemoryName,
    },
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
    /// There is a right to userfaultfd, and for the moment none to be had: too many open files, most likely.
    #[error("cannot hold faults of guest memory {name}")]
    Open {
        /// The memory.
        name: MemoryName,
        /// Why.
        #[source]
        source: OpenError,
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

impl FreezeError {
    /// The kernel's own error number, or the one that it gives for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Ended { .. } => Errno::IO,
            Self::Region { source, .. } | Self::Fill { source, .. } => source.errno(),
            Self::Warm { source, .. } => source.errno(),
            Self::Userfaultfd { source, .. } => source.errno(),
            Self::Open { source, .. } => source.errno(),
        }
    }
}

/// Keeps an inode frozen; several may stand at once, and the last one's end is the freeze's.
#[derive(Debug)]
#[must_use = "the freeze ends when this is dropped"]
pub struct Freeze {
    inode: Arc<Inode>,
    held: Held,
    faults: Option<Arc<Faults>>,
}

impl Freeze {
    /// How faults are held.
    pub fn held(&self) -> Held {
        self.held
    }

    /// Waits until somebody waits at a hole who has not been told of yet, and says where: the offset of the page in the
    /// memory, in bytes. `None` if nobody did by the end of `timeout`; at once if nobody can, as with all but
    /// [`Held::Userfaultfd`].
    ///
    /// So a VMM refuses a vCPU what it would otherwise wait for: [`GmemFile::guest_address`](crate::GmemFile::guest_address)
    /// says what the guest reached for, and a kick gets the vCPU out, which still stands before the same instruction. It
    /// can then be saved, or run on when the freeze has ended. Each is told once, and to one of all who ask; who comes back
    /// to the hole is told anew. KVM may have a worker of its own wait in the vCPU's stead, which waits on when the
    /// vCPU is out.
    ///
    /// # Errors
    /// [`FreezeError::Userfaultfd`]
    pub fn wait_fault(&self, timeout: Duration) -> Result<Option<u64>, FreezeError> {
        let Some(faults) = &self.faults else { return Ok(None) };
        let name = self.inode.name();
        let offset = faults.wait(timeout).map_err(|source| FreezeError::Userfaultfd { name, source })?;
        Ok(offset.map(|offset| offset as u64))
    }
}

impl Drop for Freeze {
    fn drop(&mut self) {
        self.inode.gate.thaw();
    }
}

impl Inode {
    /// Freezes the memory. When this has returned, no allocation or punch of ours is running and none can
    /// start, and no fault in this address space adds a page (requirement R2.4).
    ///
    /// # Errors
    /// [`FreezeError`]
    pub fn freeze(self: &Arc<Self>) -> Result<Freeze, FreezeError> {
        let told = self.gate.freeze(|| self.hold_faults(), Holding::told);
        let (held, faults) = told.map_err(|why| match why {
            Stopped::Hold(error) => error,
            Stopped::Ended => FreezeError::Ended { name: self.name() },
        })?;
        Ok(Freeze { inode: Arc::clone(self), held, faults })
    }

    /// Another freeze, if one stands: what is handed over stays frozen, whoever ends the first one.
    pub(crate) fn join_freeze(self: &Arc<Self>) -> Option<Freeze> {
        let (held, faults) = self.gate.join(Holding::told)?;
        Some(Freeze { inode: Arc::clone(self), held, faults })
    }

    fn hold_faults(&self) -> Result<Holding, FreezeError> {
        let name = self.name();
        let without = |held| Ok(Holding { held, hold: None, faults: None });
        let region = self.mapping().region();
        if region.is_whole().map_err(|source| FreezeError::Region { name, source })? {
            return without(Held::Whole);
        }
        if region.store() == Store::GuestMemfd {
            region.fill().map_err(|source| FreezeError::Fill { name, source })?;
            return without(Held::Prefaulted);
        }
        let uffd = match Uffd::open() {
            Ok(uffd) => uffd,
            // What may be otherwise in a moment is no reason to fill terabytes.
            Err(source @ OpenError::Open { .. }) => return Err(FreezeError::Open { name, source }),
            Err(
                OpenError::NoRight { .. } | OpenError::NotInKernel { .. } | OpenError::KernelTooOld { .. },
            ) => {
                let warmed = self.mapping().warm(PageSize::Small, &mut |_, _| {});
                warmed.map_err(|source| FreezeError::Warm { name, source })?;
                return without(Held::Prefaulted);
            }
        };
        let failed = |source| FreezeError::Userfaultfd { name, source };
        let hold = Hold::new(uffd, Arc::clone(self.mapping())).map_err(failed)?;
        let faults = Some(Arc::new(hold.faults().map_err(failed)?));
        Ok(Holding { held: Held::Userfaultfd, hold: Some(hold), faults })
    }

    /// True while a freeze stands.
    pub fn is_frozen(&self) -> bool {
        self.gate.is_frozen()
    }
}
