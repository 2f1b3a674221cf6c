//! The machine's saved state as preserved files, and what all of a machine's handlers share.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use abi::state;
use abi::state::StateName;
use abi::state::StateRecord;
use abi::vm::Identity;
use luo::Compatible;
use luo::Context;
use luo::Errno;
use luo::File;
use luo::FileId;
use luo::Handler;
use luo::HandlerError;
use thiserror::Error;

#[derive(Debug, Error)]
pub(crate) enum Mismatch {
    #[error("the record is of machine {record}, the arena of machine {arena}")]
    Identity { record: Identity, arena: Identity },
    #[error("not of this kind")]
    Type,
    #[error("nothing was saved for {name}")]
    NotSaved { name: StateName },
}

pub(crate) fn invalid(why: Mismatch) -> HandlerError {
    HandlerError::new(Errno::EINVAL, why)
}

pub(crate) fn check_identity(context: &Context<'_>, record: Identity) -> Result<(), HandlerError> {
    let arena = context.kho.identity();
    if record == arena { Ok(()) } else { Err(invalid(Mismatch::Identity { record, arena })) }
}

/// What was saved, and for which seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) epoch: u32,
    pub(crate) bytes: Vec<u8>,
}

/// A place for the state of one vCPU or device. It stands in the session from the machine's making on, and is
/// filled by the last callback before a hand-over: at any other time it says that nothing is saved.
#[derive(Debug)]
pub struct StateFile {
    id: FileId,
    name: StateName,
    saved: Mutex<Option<Saved>>,
}

impl StateFile {
    pub(crate) fn new(name: StateName, saved: Option<Saved>) -> Arc<Self> {
        Arc::new(Self { id: FileId::fresh(), name, saved: Mutex::new(saved) })
    }

    /// What it is the state of.
    pub fn name(&self) -> StateName {
        self.name
    }

    pub(crate) fn saved(&self) -> MutexGuard<'_, Option<Saved>> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn state_of(file: &File) -> Option<Arc<StateFile>> {
    Arc::clone(file).downcast().ok()
}

/// Preserves a [`StateFile`]: `tideover-state-v1`. While nothing is saved, a record without bytes stands for it,
/// so that its name is known.
pub(crate) struct StateHandler;

/// Epoch of a record that holds nothing. The first seal's is 2.
const NOTHING_SAVED: u32 = 0;

impl StateHandler {
    fn store(context: &mut Context<'_>, name: StateName, saved: Option<&Saved>) -> Result<u64, HandlerError> {
        let bytes = saved.map_or(&[][..], |saved| saved.bytes.as_slice());
        let no_room = |error| HandlerError::new(Errno::ENOMEM, error);
        let list = context.kho.store_list(bytes).map_err(no_room)?;
        let record = StateRecord {
            identity: context.kho.identity(),
            name,
            epoch: saved.map_or(NOTHING_SAVED, |saved| saved.epoch),
            checksum: abi::record::checksum(&[bytes]),
            len_bytes: bytes.len() as u64,
            list,
        };
        let stored = context.kho.store(&record.encode());
        if stored.is_err() {
            let _ = context.kho.free_list(&list);
        }
        Ok(stored.map_err(no_room)?.start().address())
    }

    fn free(context: &mut Context<'_>, data: u64) {
        if let Ok(record) = StateRecord::read(&context.kho.memory(), data) {
            // A list that cannot be read any more keeps its frames: lost, but never handed out twice.
            let _ = context.kho.free_list(&record.list);
        }
        context.kho.free_record(&state::FORMAT, data);
    }
}

impl Handler for StateHandler {
    fn compatible(&self) -> Compatible {
        Compatible::literal(state::FORMAT.compatible)
    }

    fn can_preserve(&self, file: &File) -> bool {
        state_of(file).is_some()
    }

    fn id(&self, file: &File) -> FileId {
        state_of(file).map_or_else(FileId::fresh, |file| file.id)
    }

    fn preserve(&self, context: &mut Context<'_>, file: &File) -> Result<u64, HandlerError> {
        let file = state_of(file).ok_or(Mismatch::Type).map_err(invalid)?;
        Self::store(context, file.name, None)
    }

    fn unpreserve(&self, context: &mut Context<'_>, _: &File, data: u64) {
        Self::free(context, data);
    }

    fn freeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> Result<u64, HandlerError> {
        let file = state_of(file).ok_or(Mismatch::Type).map_err(invalid)?;
        let saved = file.saved();
        let saved = saved.as_ref().ok_or(Mismatch::NotSaved { name: file.name }).map_err(invalid)?;
        let new = Self::store(context, file.name, Some(saved))?;
        Self::free(context, data);
        Ok(new)
    }

    fn unfreeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> u64 {
        let name = state_of(file).map(|file| file.name);
        match name.map(|name| Self::store(context, name, None)) {
            Some(Ok(empty)) => {
                Self::free(context, data);
                empty
            }
            // No room: the stale state stays. Its epoch tells that it is stale.
            _ => data,
        }
    }

    fn retrieve(&self, context: &mut Context<'_>, data: u64) -> Result<File, HandlerError> {
        let malformed = |error| HandlerError::new(Errno::EINVAL, error);
        let record = StateRecord::read(&context.kho.memory(), data).map_err(malformed)?;
        check_identity(context, record.identity)?;
        context.kho.adopt_record(&state::FORMAT, data).map_err(malformed)?;
        // Before the bytes are gathered: no two states are made of the same frames.
        let list = record.read_list(&context.kho.memory(), data).map_err(malformed)?;
        context.kho.adopt_list(&list).map_err(malformed)?;
        if record.epoch == NOTHING_SAVED {
            return Ok(StateFile::new(record.name, None));
        }
        let bytes = record.read_bytes(&context.kho.memory(), data, &list).map_err(malformed)?;
        Ok(StateFile::new(record.name, Some(Saved { epoch: record.epoch, bytes })))
    }

    fn can_finish(&self, _: Option<&File>) -> bool {
        true
    }

    fn finish(&self, context: &mut Context<'_>, _: Option<&File>, data: u64) {
        Self::free(context, data);
    }
}
