//! Objects that many files share: the kernel's *file-lifecycle-bound* ones (FLB).
//!
//! A [`SharedObject`] is registered for the kinds of files that need it. It is preserved with the first such file and
//! unpreserved with the last; a later life retrieves it when it is first asked for, and finishes it with the last file
//! that was received and needs it.
//!
//! A kernel takes the number of received files that need an object from what the life before wrote, and only when the
//! object is first asked for; if nobody asks, the number falls below zero and the object is never finished. Here the
//! files themselves are counted, when they are read.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use abi::flb;
use abi::flb::Flb;
use abi::luo::Compatible;
use kho::Kho;
use thiserror::Error;

use crate::Errno;
use crate::FileId;
use crate::HandlerError;
use crate::Handlers;

/// The most that can be registered: as many as one page lists.
pub(crate) const MAX_SHARED: usize = flb::MAX;

/// What a [`SharedObject`] makes: any value that its users know.
pub type Object = Arc<dyn Any + Send + Sync>;

/// Preserves one object that many files share, in the kernel's verbs. None has a default.
///
/// `data` is what the later life gets: the physical address of a record, or any number.
pub trait SharedObject: Send + Sync {
    /// Its name on the wire. The later life finds it by it, exactly.
    fn compatible(&self) -> Compatible;

    /// The first file needs it: makes the object, and keeps what the later life needs.
    ///
    /// # Errors
    /// [`HandlerError`]; then nothing may stay behind.
    fn preserve(&self, kho: &mut Kho) -> Result<(Object, u64), HandlerError>;

    /// Undoes `preserve`: nobody needs it any more.
    fn unpreserve(&self, kho: &mut Kho, object: &Object, data: u64);

    /// Makes again what an earlier life preserved.
    ///
    /// # Errors
    /// [`HandlerError`], which is then given for every later try, unless it is [`Errno::EAGAIN`]. What was kept must stay
    /// until `finish`.
    fn retrieve(&self, kho: &mut Kho, data: u64) -> Result<Object, HandlerError>;

    /// The last file that was received and needs it is finished. `object` is `None` only if it could not be retrieved:
    /// then what was kept for it goes all the same.
    fn finish(&self, kho: &mut Kho, object: Option<&Object>, data: u64);
}

/// A shared object was not registered, in the order in which it is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ShareError {
    /// There is no handler of this kind (EINVAL).
    #[error("there is no handler for {kind} that could need {object}")]
    UnknownHandler {
        /// The kind.
        kind: Compatible,
        /// The object.
        object: Compatible,
    },
    /// The handler has this object already (EEXIST).
    #[error("{object} is registered for {kind} already")]
    Twice {
        /// The kind.
        kind: Compatible,
        /// The object.
        object: Compatible,
    },
    /// There are as many as the format lists (ENOSPC).
    #[error("no more than {MAX_SHARED} shared objects can be handed over")]
    TooMany,
    /// Another object has this name (EEXIST).
    #[error("there is another shared object {object} already")]
    Exists {
        /// The name.
        object: Compatible,
    },
}

impl ShareError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::UnknownHandler { .. } => Errno::EINVAL,
            Self::Twice { .. } | Self::Exists { .. } => Errno::EEXIST,
            Self::TooMany => Errno::ENOSPC,
        }
    }
}

/// A shared object is not to be had.
#[derive(Debug, Clone, Error)]
pub enum SharedError {
    /// None of this name is registered in this life (ENOENT).
    #[error("no shared object {object} is registered")]
    Unknown {
        /// The name.
        object: Compatible,
    },
    /// No file of this life needs it (ENOENT).
    #[error("shared object {object} is not preserved")]
    NotPreserved {
        /// The name.
        object: Compatible,
    },
    /// This life received nothing, or the object is finished (ENODATA).
    #[error("of shared object {object} nothing is left to retrieve")]
    NoData {
        /// The name.
        object: Compatible,
    },
    /// What this life received does not list it (ENOENT).
    #[error("shared object {object} was not received")]
    NotReceived {
        /// The name.
        object: Compatible,
    },
    /// It refused, now or before: it is not asked again, unless it said EAGAIN.
    #[error("cannot retrieve shared object {object}")]
    Refused {
        /// The name.
        object: Compatible,
        /// Why.
        #[source]
        source: HandlerError,
    },
}

impl SharedError {
    /// The kernel's error number for the same refusal.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Unknown { .. } | Self::NotPreserved { .. } | Self::NotReceived { .. } => Errno::ENOENT,
            Self::NoData { .. } => Errno::ENODATA,
            Self::Refused { source, .. } => source.errno(),
        }
    }
}

/// Keeps a preserved object preserved, whether or not a file needs it. To be given back by
/// [`Luo::release_shared`](crate::Luo::release_shared): dropped, it keeps the object for as long as this life lasts.
#[must_use = "it keeps the object preserved until it is given back"]
pub struct Hold {
    name: Compatible,
    object: Object,
    of: FileId,
}

impl Hold {
    /// The object.
    pub fn object(&self) -> &Object {
        &self.object
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a hold on {}", self.name)
    }
}

/// An object that this life preserves.
struct Preserved {
    object: Object,
    data: u64,
    files: u64,
    holds: u64,
    /// Tells it from the one of the same name that was preserved before.
    id: FileId,
}

enum Retrieved {
    NotTried,
    Object(Object),
    Failed(HandlerError),
}

/// An object that was received.
struct Received {
    data: u64,
    /// Files that were received, are not finished, and need it.
    files: u64,
    state: Retrieved,
}

enum Incoming {
    /// The life before did not list it, or there was none.
    None,
    Is(Received),
    Finished,
}

struct Slot {
    kind: Arc<dyn SharedObject>,
    outgoing: Option<Preserved>,
    incoming: Incoming,
}

/// A preserve was refused by this object.
pub(crate) struct Refused {
    pub(crate) object: Compatible,
    pub(crate) source: HandlerError,
}

/// All shared objects of a life, in the order of their registration. Handlers name those that they need by their place.
#[derive(Default)]
pub(crate) struct Pool {
    slots: Vec<Slot>,
    /// This life received something.
    has_received: bool,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let outgoing = |slot: &Slot| slot.outgoing.as_ref().map(|kept| (kept.files, kept.holds));
        let entry = |slot: &Slot| (slot.kind.compatible(), outgoing(slot), slot.left());
        f.debug_list().entries(self.slots.iter().map(entry)).finish()
    }
}

impl Slot {
    /// Received files that still need the object; `None` if it was not received or is finished.
    fn left(&self) -> Option<u64> {
        match &self.incoming {
            Incoming::Is(received) => Some(received.files),
            Incoming::None | Incoming::Finished => None,
        }
    }

    fn need(&mut self, kho: &mut Kho) -> Result<(), HandlerError> {
        match &mut self.outgoing {
            Some(kept) => kept.files += 1,
            None => {
                let (object, data) = self.kind.preserve(kho)?;
                self.outgoing = Some(Preserved { object, data, files: 1, holds: 0, id: FileId::fresh() });
            }
        }
        Ok(())
    }

    /// One file or hold less, which `change` takes off.
    fn let_go(&mut self, kho: &mut Kho, change: impl FnOnce(&mut Preserved)) {
        let Some(kept) = &mut self.outgoing else { return };
        change(kept);
        if kept.files == 0 && kept.holds == 0 {
            self.kind.unpreserve(kho, &kept.object, kept.data);
            self.outgoing = None;
        }
    }

    fn finish(&mut self, kho: &mut Kho) {
        if let Incoming::Is(mut received) = std::mem::replace(&mut self.incoming, Incoming::Finished) {
            let object = received.retrieve(self.kind.as_ref(), kho).ok();
            self.kind.finish(kho, object.as_ref(), received.data);
        }
    }
}

impl Received {
    fn retrieve(&mut self, kind: &dyn SharedObject, kho: &mut Kho) -> Result<Object, HandlerError> {
        match &self.state {
            Retrieved::Object(object) => return Ok(Arc::clone(object)),
            Retrieved::Failed(error) => return Err(error.clone()),
            Retrieved::NotTried => {}
        }
        let result = kind.retrieve(kho, self.data);
        match &result {
            Ok(object) => self.state = Retrieved::Object(Arc::clone(object)),
            Err(error) if error.is_for_now() => {}
            Err(error) => self.state = Retrieved::Failed(error.clone()),
        }
        result
    }
}

impl Pool {
    pub(crate) fn new(handlers: &Handlers) -> Self {
        let slot = |kind: &Arc<dyn SharedObject>| Slot {
            kind: Arc::clone(kind),
            outgoing: None,
            incoming: Incoming::None,
        };
        Self { slots: handlers.shared().iter().map(slot).collect(), has_received: false }
    }

    /// With what was received: the objects, and by place those that each file needs.
    ///
    /// # Errors
    /// The name of an object that is not registered.
    pub(crate) fn receive(
        &mut self,
        flbs: &[Flb],
        needs: impl Iterator<Item = Arc<[usize]>>,
    ) -> Result<(), Compatible> {
        self.has_received = true;
        for flb in flbs {
            let slot = self.slots.iter_mut().find(|slot| slot.kind.compatible() == flb.name);
            let state = Retrieved::NotTried;
            slot.ok_or(flb.name)?.incoming = Incoming::Is(Received { data: flb.data, files: 0, state });
        }
        for place in needs.flat_map(|needs| needs.to_vec()) {
            if let Some(Slot { incoming: Incoming::Is(received), .. }) = self.slots.get_mut(place) {
                received.files += 1;
            }
        }
        Ok(())
    }

    /// A file that is about to be preserved needs these.
    ///
    /// # Errors
    /// The first refusal; those before it are let go again, the last first.
    pub(crate) fn need(&mut self, kho: &mut Kho, needs: &[usize]) -> Result<(), Refused> {
        for (done, place) in needs.iter().enumerate() {
            let Some(slot) = self.slots.get_mut(*place) else { continue };
            if let Err(source) = slot.need(kho) {
                let object = slot.kind.compatible();
                self.let_go(kho, needs.get(..done).unwrap_or_default());
                return Err(Refused { object, source });
            }
        }
        Ok(())
    }

    /// A file that needed these is unpreserved: the last registered goes first.
    pub(crate) fn let_go(&mut self, kho: &mut Kho, needs: &[usize]) {
        for place in needs.iter().rev() {
            if let Some(slot) = self.slots.get_mut(*place) {
                slot.let_go(kho, |kept| kept.files -= 1);
            }
        }
    }

    /// A file that was received and needed these is finished: the last registered goes first.
    pub(crate) fn finish_file(&mut self, kho: &mut Kho, needs: &[usize]) {
        for place in needs.iter().rev() {
            let Some(slot) = self.slots.get_mut(*place) else { continue };
            if let Incoming::Is(received) = &mut slot.incoming {
                received.files -= 1;
                if received.files == 0 {
                    slot.finish(kho);
                }
            }
        }
    }

    /// Finishes what was received and no file needs: only a hold of the life before kept it.
    pub(crate) fn finish_unneeded(&mut self, kho: &mut Kho) {
        self.slots.iter_mut().rev().filter(|slot| slot.left() == Some(0)).for_each(|slot| slot.finish(kho));
    }

    fn slot(&mut self, name: &Compatible) -> Result<&mut Slot, SharedError> {
        let slot = self.slots.iter_mut().find(|slot| slot.kind.compatible() == *name);
        slot.ok_or(SharedError::Unknown { object: *name })
    }

    pub(crate) fn outgoing(&mut self, name: &Compatible) -> Result<Object, SharedError> {
        let kept = self.slot(name)?.outgoing.as_ref();
        kept.map(|kept| Arc::clone(&kept.object)).ok_or(SharedError::NotPreserved { object: *name })
    }

    pub(crate) fn incoming(&mut self, kho: &mut Kho, name: &Compatible) -> Result<Object, SharedError> {
        let has_received = self.has_received;
        let Slot { kind, incoming, .. } = self.slot(name)?;
        match incoming {
            Incoming::Is(received) => received
                .retrieve(kind.as_ref(), kho)
                .map_err(|source| SharedError::Refused { object: *name, source }),
            Incoming::None if has_received => Err(SharedError::NotReceived { object: *name }),
            Incoming::None | Incoming::Finished => Err(SharedError::NoData { object: *name }),
        }
    }

    pub(crate) fn hold(&mut self, name: &Compatible) -> Result<Hold, SharedError> {
        let kept = self.slot(name)?.outgoing.as_mut();
        let kept = kept.ok_or(SharedError::NotPreserved { object: *name })?;
        kept.holds += 1;
        Ok(Hold { name: *name, object: Arc::clone(&kept.object), of: kept.id })
    }

    pub(crate) fn release(&mut self, kho: &mut Kho, hold: &Hold) {
        // Not one of another arena's, nor of an object that was preserved before this one.
        let of_this = |slot: &&mut Slot| slot.outgoing.as_ref().is_some_and(|kept| kept.id == hold.of);
        if let Some(slot) = self.slots.iter_mut().find(of_this) {
            slot.let_go(kho, |kept| kept.holds -= 1);
        }
    }

    /// Names of the objects that are preserved, or received and not finished.
    pub(crate) fn names(&self) -> impl Iterator<Item = Compatible> + '_ {
        let in_use = |slot: &&Slot| slot.outgoing.is_some() || slot.left().is_some();
        self.slots.iter().filter(in_use).map(|slot| slot.kind.compatible())
    }

    /// The list as it is published.
    ///
    /// # Errors
    /// The name of an object that is preserved while one of this name was received and is not finished.
    pub(crate) fn wire(&self) -> Result<Vec<Flb>, Compatible> {
        let mut flbs = Vec::new();
        for slot in &self.slots {
            let name = slot.kind.compatible();
            // What no file needs any more was held by somebody: he is one.
            match (&slot.outgoing, &slot.incoming) {
                (Some(_), Incoming::Is(_)) => return Err(name),
                (Some(kept), _) => {
                    flbs.push(Flb { name, data: kept.data, count: kept.files + kept.holds });
                }
                (None, Incoming::Is(received)) => {
                    flbs.push(Flb { name, data: received.data, count: received.files.max(1) });
                }
                (None, Incoming::None | Incoming::Finished) => {}
            }
        }
        Ok(flbs)
    }
}
