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
use pages::PAGE_SIZE;
use pages::PageRange;
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
    replaced: Mutex<Option<Replaced>>,
}

/// The record without bytes that the last freeze replaced, and the arena's generation then: until the next commit it can
/// be had back, without room for another one.
#[derive(Debug, Clone, Copy)]
struct Replaced {
    data: u64,
    frames: PageRange,
    generation: u64,
}

impl StateFile {
    pub(crate) fn new(name: StateName, saved: Option<Saved>) -> Arc<Self> {
        Arc::new(Self { id: FileId::fresh(), name, saved: Mutex::new(saved), replaced: Mutex::default() })
    }

    /// What it is the state of.
    pub fn name(&self) -> StateName {
        self.name
    }

    pub(crate) fn saved(&self) -> MutexGuard<'_, Option<Saved>> {
        self.saved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn replaced(&self) -> MutexGuard<'_, Option<Replaced>> {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Frees a record that another one replaces; gives it if it can be had back.
    fn replace(context: &mut Context<'_>, data: u64) -> Option<Replaced> {
        let record = StateRecord::read(&context.kho.memory(), data);
        let frames = PageRange::of_bytes(data, PAGE_SIZE).ok();
        Self::free(context, data);
        let generation = context.kho.generation();
        record.ok().filter(|record| record.list.is_empty())?;
        Some(Replaced { data, frames: frames?, generation })
    }

    fn have_back(context: &mut Context<'_>, replaced: Replaced) -> Option<u64> {
        let Replaced { data, frames, generation } = replaced;
        (context.kho.generation() == generation && context.kho.keep(frames)).then_some(data)
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
        *file.replaced() = Self::replace(context, data);
        Ok(new)
    }

    fn unfreeze(&self, context: &mut Context<'_>, file: &File, data: u64) -> u64 {
        let Some(file) = state_of(file) else { return data };
        let replaced = file.replaced().take();
        let before = replaced.and_then(|replaced| Self::have_back(context, replaced));
        match before.map_or_else(|| Self::store(context, file.name, None), Ok) {
            Ok(empty) => {
                Self::free(context, data);
                empty
            }
            // No room: the stale state stays. Its epoch tells that it is stale.
            Err(_) => data,
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

#[cfg(test)]
mod tests {
    use faults::Fault;
    use faults::FaultyHandler;
    use faults::FaultyMemory;
    use faults::VecArena;
    use faults::at_every_step;
    use faults::in_every_room;
    use faults::look;
    use kho::Books;
    use kho::Kho;
    use kho::Tree;
    use luo::Handlers;
    use luo::Luo;
    use luo::SessionName;
    use luo::Token;

    use super::*;

    const FRAMES: usize = 128;
    const SESSION: SessionName = SessionName::literal("machine");

    struct World {
        memory: VecArena,
        kho: Kho,
        luo: Luo,
        states: Vec<Arc<StateFile>>,
    }

    /// Places for two states, published; 5,000 bytes are saved for each, and not yet in the arena.
    fn make(fault: &Fault) -> World {
        let memory = VecArena::new(FRAMES);
        let faulty = FaultyMemory::new(memory.clone(), fault);
        let mut kho = Kho::format(Box::new(faulty), Identity::new([7; 16]), FRAMES as u64).unwrap();
        let mut handlers = Handlers::default();
        handlers.register(FaultyHandler::new(StateHandler, fault)).unwrap();
        let mut luo = Luo::new(handlers);
        luo.create_session(SESSION).unwrap();
        let mut states = Vec::new();
        for (token, name) in [(1, "vcpu0"), (2, "serial")] {
            let file = StateFile::new(StateName::literal(name), None);
            luo.preserve(&mut kho, SESSION, Token(token), Arc::<StateFile>::clone(&file)).unwrap();
            *file.saved() = Some(Saved { epoch: 2, bytes: vec![7; 5000] });
            states.push(file);
        }
        luo.publish(&mut kho).unwrap();
        World { memory, kho, luo, states }
    }

    fn seen(world: &World) -> (String, Books, Tree) {
        let (books, tree) = look(&world.kho, &world.memory);
        (format!("{:?}", world.luo), books, tree)
    }

    fn freeze(world: &mut World) -> Result<(), String> {
        world.luo.freeze(&mut world.kho).map_err(|error| format!("{error:?}"))
    }

    /// H3.4.5.
    #[test]
    fn states_that_cannot_all_be_written_leave_their_places_as_they_were() {
        let steps = at_every_step(make, seen, freeze, |world| freeze(world).unwrap());
        assert_eq!(steps, 2 * (1 + 3 + 1), "a callback, two pages of bytes, their list, the record");
        let make = || make(&Fault::default());
        let frames = in_every_room(make, |world| &mut world.kho, |_| (), seen, freeze);
        assert_eq!(frames, 2 * (3 + 1));
    }

    /// H3.4.6.
    #[test]
    fn places_are_empty_again_after_an_unfreeze_whether_or_not_the_states_were_published() {
        let mut world = make(&Fault::default());
        let (before, used) = (seen(&world), world.kho.used_bytes());
        freeze(&mut world).unwrap();
        world.luo.unfreeze(&mut world.kho);
        assert_eq!(seen(&world), before);

        freeze(&mut world).unwrap();
        world.luo.publish(&mut world.kho).unwrap();
        assert_eq!(world.kho.used_bytes(), used + 2 * 3 * 4096);
        // What was replaced is gone; somebody else has it.
        let other = world.kho.store(b"another's").unwrap();
        world.kho.commit().unwrap();
        world.kho.free(other);
        world.luo.unfreeze(&mut world.kho);
        world.luo.publish(&mut world.kho).unwrap();
        assert_eq!(world.kho.used_bytes(), used);
        assert!(world.states.iter().all(|state| state.replaced().is_none()));
    }
}
