//! Guest memory as a preserved file: `tideover-gmem-v1`.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use abi::gmem::Extent;
use abi::gmem::FORMAT;
use abi::gmem::GmemRecord;
use luo::Compatible;
use luo::Context;
use luo::Errno;
use luo::File;
use luo::FileId;
use luo::Handler;
use luo::HandlerError;
use pages::PageRange;
use region::Arena;
use thiserror::Error;

use crate::Freeze;
use crate::Inode;

/// A record was read, and is of no memory that this arena has.
#[derive(Debug, Error)]
enum Mismatch {
    #[error("the record is of machine {record}, the arena of machine {arena}")]
    Identity { record: abi::vm::Identity, arena: abi::vm::Identity },
    #[error("its extents are not one region of the arena, whole and from its start")]
    Extents,
    #[error("the frames of guest memory {name} are not preserved")]
    NotPreserved { name: abi::gmem::MemoryName },
    #[error("guest memory {name} is not frozen")]
    NotFrozen { name: abi::gmem::MemoryName },
    #[error("not guest memory")]
    Type,
}

/// Preserves guest memory: its frames are marked, and one record says what they are.
///
/// The memory is preserved from its making on and need not be frozen for that; the last callback before a
/// hand-over refuses if it is not.
#[derive(Debug)]
pub struct GmemHandler {
    arena: Arena,
    /// One inode for each memory, however often it is retrieved.
    known: Mutex<Vec<Arc<Inode>>>,
    /// What is handed over stays frozen until that is called off, whoever froze it first.
    handed_over: Mutex<HashMap<FileId, Freeze>>,
}

impl GmemHandler {
    /// For the guest memory that lies in `arena`, of which `known` are in use already.
    pub fn new(arena: Arena, known: Vec<Arc<Inode>>) -> Self {
        Self { arena, known: Mutex::new(known), handed_over: Mutex::default() }
    }

    fn read(&self, context: &Context<'_>, data: u64) -> Result<GmemRecord, HandlerError> {
        GmemRecord::read(&context.kho.memory(), data).map_err(|error| HandlerError::new(Errno::EINVAL, error))
    }

    fn inode(&self, record: &GmemRecord) -> Result<Arc<Inode>, Mismatch> {
        let [Extent { index: 0, frames }] = record.extents[..] else {
            return Err(Mismatch::Extents);
        };
        if frames.len_bytes() != record.size_bytes {
            return Err(Mismatch::Extents);
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inode) = known.iter().find(|inode| inode.frames() == frames) {
            return Ok(Arc::clone(inode));
        }
        let placed = self.arena.regions().iter().skip(1).find(|placed| placed.range == frames);
        let placed = placed.ok_or(Mismatch::Extents)?;
        let mapping = Arc::clone(&placed.mapping);
        let inode = Inode::new(record.name, record.identity, mapping, frames, record.flags);
        known.push(Arc::clone(&inode));
        Ok(inode)
    }

    fn handed_over(&self) -> MutexGuard<'_, HashMap<FileId, Freeze>> {
        self.handed_over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Destroys memory that nobody retrieved: between two lives the session was its owner.
    fn abandoned(&self, context: &Context<'_>, data: u64) -> Option<Arc<Inode>> {
        let record = self.read(context, data).ok()?;
        let inode = self.inode(&record).ok().filter(|_| record.identity == context.kho.identity())?;
        inode.destroy();
        Some(inode)
    }

    fn forget(&self, context: &mut Context<'_>, frames: Option<PageRange>, data: u64) {
        // A record that cannot be read any more leaves its frames marked: lost, but never handed out twice.
        if let Some(frames) = frames {
            let _ = context.kho.unpreserve(frames);
        }
        context.kho.free_record(&FORMAT, data);
    }
}

fn inode_of(file: &File) -> Option<Arc<Inode>> {
    Arc::clone(file).downcast::<Inode>().ok()
}

fn refuse(errno: Errno) -> impl Fn(Mismatch) -> HandlerError {
    move |why| HandlerError::new(errno, why)
}

impl Handler for GmemHandler {
    fn compatible(&self) -> Compatible {
        Compatible::literal(FORMAT.compatible)
    }

    fn can_preserve(&self, file: &File) -> bool {
        inode_of(file).is_some_and(|inode| inode.check_shared().is_ok())
    }

    fn id(&self, file: &File) -> FileId {
        inode_of(file).map_or_else(FileId::fresh, |inode| inode.id)
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        let inode = inode_of(file).ok_or(Mismatch::Type).map_err(refuse(Errno::EINVAL))?;
        let frames = inode.frames();
        let (record, arena) = (inode.identity(), context.kho.identity());
        if record != arena {
            return Err(refuse(Errno::EINVAL)(Mismatch::Identity { record, arena }));
        }
        let record = GmemRecord {
            identity: record,
            name: inode.name(),
            size_bytes: inode.size_bytes(),
            flags: inode.flags(),
            extents: vec![Extent { index: 0, frames }],
        };
        context.kho.preserve(frames).map_err(|error| HandlerError::new(Errno::EBUSY, error))?;
        let stored = context.kho.store(&record.encode());
        if stored.is_err() {
            let _ = context.kho.unpreserve(frames);
        }
        let range = stored.map_err(|error| HandlerError::new(Errno::ENOMEM, error))?;
        Ok(range.start().address())
    }

    fn unpreserve(&self, context: &mut Context<'_>, file: &File, data: u64) {
        self.forget(context, inode_of(file).map(|inode| inode.frames()), data);
    }

    fn freeze(&self, _: &mut Context<'_>, file: &File, data: u64) -> Result<u64, HandlerError> {
        let inode = inode_of(file).ok_or(Mismatch::Type).map_err(refuse(Errno::EINVAL))?;
        // Converted since it was preserved: from the freeze on it is not any more.
        let shared = || inode.check_shared().map_err(|error| HandlerError::new(Errno::EOPNOTSUPP, error));
        // In one step: a freeze that is looked for and then relied on may have ended by then.
        let not_frozen = Mismatch::NotFrozen { name: inode.name() };
        let freeze = inode.join_freeze().ok_or(not_frozen).map_err(refuse(Errno::EBUSY))?;
        shared()?;
        self.handed_over().insert(inode.id, freeze);
        Ok(data)
    }

    fn unfreeze(&self, _: &mut Context<'_>, file: &File, data: u64) -> u64 {
        // Dropped outside of the lock: the end of a freeze wakes who waits for it.
        let _ended = inode_of(file).and_then(|inode| self.handed_over().remove(&inode.id));
        data
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        let record = self.read(context, data)?;
        let adopted = context.kho.adopt_record(&FORMAT, data);
        adopted.map_err(|error| HandlerError::new(Errno::EINVAL, error))?;
        let arena = context.kho.identity();
        if record.identity != arena {
            let record = record.identity;
            return Err(refuse(Errno::EINVAL)(Mismatch::Identity { record, arena }));
        }
        let inode = self.inode(&record).map_err(refuse(Errno::EINVAL))?;
        if !context.kho.is_preserved(inode.frames()) {
            return Err(refuse(Errno::EINVAL)(Mismatch::NotPreserved { name: record.name }));
        }
        Ok(inode)
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, file: Option<&File>, data: u64) {
        let inode = file.and_then(inode_of).or_else(|| self.abandoned(context, data));
        let frames = inode.map(|inode| inode.frames());
        self.forget(context, frames, data);
    }
}
