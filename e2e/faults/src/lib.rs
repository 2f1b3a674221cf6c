//! Makes each step of an operation fail in turn, and looks whether anything stayed behind.
//!
//! A *step* is a write into the arena or a callback that may refuse: [`FaultyMemory`], [`FaultyHandler`] and
//! [`FaultyShared`] stand between the operation and the real ones and count them with one [`Fault`]. [`at_every_step`] runs the
//! operation with the first of them failing, the second, and so on, until none is left to fail; [`in_every_room`]
//! does the same with frames: it leaves the operation none, one, two, and so on. After each failure the whole state
//! has to be what it was before, and a second try has to succeed.
//!
//! What the whole state is, the test says: of an arena it is [`look`]; of a [`Luo`](luo::Luo) all that its
//! `Debug` says.
#![forbid(unsafe_code)]

mod arena;
mod handler;

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
pub use arena::VecArena;
pub use handler::FaultyHandler;
pub use handler::FaultyShared;
use kho::Books;
use kho::Kho;
use kho::Tree;
use pages::PageRange;

#[derive(Debug, Default)]
struct Steps {
    /// Steps since it was armed.
    seen: u64,
    /// The one that fails; 0 for none.
    fails: u64,
}

/// Counts steps, and says which one fails. Copies count together.
#[derive(Debug, Clone, Default)]
pub struct Fault(Arc<Mutex<Steps>>);

impl Fault {
    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the `nth` step fails, the next one being the first. None does if it is 0.
    pub fn arm(&self, nth: u64) {
        *self.steps() = Steps { seen: 0, fails: nth };
    }

    /// No step fails any more. True if one has failed since it was armed.
    pub fn disarm(&self) -> bool {
        let steps = std::mem::take(&mut *self.steps());
        steps.fails != 0 && steps.seen >= steps.fails
    }

    /// One step is taken: true if it is the one that fails.
    pub fn trips(&self) -> bool {
        let mut steps = self.steps();
        steps.seen += 1;
        steps.seen == steps.fails
    }
}

/// Memory whose writes are steps. A write that fails writes nothing.
#[derive(Debug, Clone)]
pub struct FaultyMemory<M> {
    memory: M,
    fault: Fault,
}

impl<M> FaultyMemory<M> {
    /// Stands before `memory`.
    pub fn new(memory: M, fault: &Fault) -> Self {
        Self { memory, fault: fault.clone() }
    }
}

impl<M: Memory> Memory for FaultyMemory<M> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.memory.read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        self.memory.runs()
    }
}

impl<M: MemoryMut> MemoryMut for FaultyMemory<M> {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        match self.fault.trips() {
            true => Err(NoMemory::at(address, bytes.len())),
            false => self.memory.write(address, bytes),
        }
    }

    fn order_writes(&mut self) {
        self.memory.order_writes();
    }
}

/// All that an arena's writer knows, and all that a reader finds.
///
/// # Panics
/// If a reader finds no whole tree.
pub fn look(kho: &Kho, memory: &impl Memory) -> (Books, Tree) {
    let tree = Tree::read(memory).unwrap_or_else(|malformed| panic!("no whole tree: {malformed}"));
    (kho.books(), tree)
}

/// Tries once in a world in which something will fail; gives whether it did.
fn attempt<W, S: PartialEq + Debug, E: Debug>(
    world: &mut W,
    what: &str,
    look: impl Fn(&W) -> S,
    operation: impl Fn(&mut W) -> Result<(), E>,
) -> bool {
    let before = look(world);
    match operation(world) {
        Ok(()) => false,
        Err(error) => {
            let after = look(world);
            assert!(before == after, "{what}, {error:?}, left something:\n{before:#?}\n{after:#?}");
            true
        }
    }
}

/// Runs `operation` in a new world for each step of it, which fails there; gives how many steps there are. After each
/// failure the world has to `look` as it did before, and `again` has to find that a second try succeeds (or is
/// refused for good, if that is the rule).
///
/// # Panics
/// If a failure leaves something or goes unnoticed, or `again` does.
pub fn at_every_step<W, S: PartialEq + Debug, E: Debug>(
    make: impl Fn(&Fault) -> W,
    look: impl Fn(&W) -> S,
    operation: impl Fn(&mut W) -> Result<(), E>,
    again: impl Fn(&mut W),
) -> u64 {
    for nth in 1.. {
        let fault = Fault::default();
        let mut world = make(&fault);
        fault.arm(nth);
        let failed = attempt(&mut world, &format!("step {nth}"), &look, &operation);
        let tripped = fault.disarm();
        assert_eq!(failed, tripped, "step {nth}: the operation fails if a step does");
        if !failed {
            return nth - 1;
        }
        again(&mut world);
    }
    unreachable!("an operation has an end")
}

/// Takes and commits every frame that [`Kho::allocate`] gives, until there is none; gives the frames.
///
/// # Panics
/// If a commit fails.
pub fn exhaust(kho: &mut Kho) -> Vec<PageRange> {
    let mut taken = Vec::new();
    loop {
        let before = taken.len();
        taken.extend(std::iter::from_fn(|| kho.allocate(1).ok()));
        if taken.len() == before {
            return taken;
        }
        // It may free what was given back before.
        assert!(kho.commit().is_ok(), "a commit has frames of its own");
    }
}

/// Runs `operation` with no frame left, with one, with two, in a row at the end of region 0 as far as that goes, until it
/// succeeds; gives how many it took. Each time in a new world, of which `kho` gives the arena; `prepare` comes after the
/// frames are taken. After each failure the world has to `look` as it did before.
///
/// # Panics
/// If a failure leaves something, or the operation needs more frames than there are.
pub fn in_every_room<W, S: PartialEq + Debug, E: Debug>(
    make: impl Fn() -> W,
    kho: impl Fn(&mut W) -> &mut Kho,
    prepare: impl Fn(&mut W),
    look: impl Fn(&W) -> S,
    operation: impl Fn(&mut W) -> Result<(), E>,
) -> usize {
    for room in 0.. {
        let mut world = make();
        let arena = kho(&mut world);
        let mut taken = exhaust(arena);
        assert!(taken.len() >= room, "the operation fails with all {} frames", taken.len());
        taken.drain(taken.len() - room..).for_each(|frame| arena.free(frame));
        assert!(arena.commit().is_ok(), "a commit has frames of its own");
        prepare(&mut world);
        if !attempt(&mut world, &format!("{room} frames"), &look, &operation) {
            return room;
        }
        // With all frames it succeeds: nothing that the failure did is in its way.
        taken.into_iter().for_each(|frame| kho(&mut world).free(frame));
        let committed = kho(&mut world).commit();
        let again = committed.is_ok().then(|| operation(&mut world));
        assert!(!matches!(again, Some(Err(_))), "{room} frames, and then all of them: {again:?}");
    }
    unreachable!("an operation has an end")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two words in memory, which are to be written together.
    struct World(FaultyMemory<Vec<u8>>);

    fn make(fault: &Fault) -> World {
        World(FaultyMemory::new(vec![0; 16], fault))
    }

    fn look(world: &World) -> Vec<u8> {
        world.0.memory.clone()
    }

    fn both(world: &mut World) -> Result<(), NoMemory> {
        world.0.write(0, &[1; 8])?;
        world.0.write(8, &[2; 8]).or_else(|error| {
            world.0.write(0, &[0; 8])?;
            Err(error)
        })
    }

    #[test]
    fn an_operation_that_undoes_what_it_did_has_as_many_steps_as_writes() {
        let steps = at_every_step(make, look, both, |world| both(world).unwrap());
        assert_eq!(steps, 2);
    }

    fn panics(operation: fn(&mut World) -> Result<(), NoMemory>) -> bool {
        std::panic::catch_unwind(|| at_every_step(make, look, operation, |_| ())).is_err()
    }

    #[test]
    fn what_stays_behind_is_found() {
        assert!(panics(|world| {
            world.0.write(0, &[1; 8])?;
            world.0.write(8, &[2; 8])
        }));
    }

    #[test]
    fn a_failure_that_is_passed_over_is_found() {
        assert!(panics(|world| {
            let _ = world.0.write(0, &[1; 8]);
            Ok(())
        }));
        assert!(!panics(|_| Ok(())), "an operation without steps does not fail");
    }
}
