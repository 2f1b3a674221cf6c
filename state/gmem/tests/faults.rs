//! Whatever fails while guest memory is preserved, handed over, retrieved or finished, nothing stays behind.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::fs;
use std::sync::Arc;

use abi::gmem::MemoryName;
use abi::gmem::flags;
use abi::luo::SessionName;
use abi::vm::Identity;
use faults::Fault;
use faults::FaultyHandler;
use faults::FaultyMemory;
use kho::Kho;
use luo::File;
use luo::Handlers;
use luo::Luo;
use luo::Token;
use pages::PageRange;
use region::Arena;
use region::Region;
use tideover_gmem::Freeze;
use tideover_gmem::GmemHandler;
use tideover_gmem::Inode;

const MIB: u64 = 1 << 20;
const OURS: Identity = Identity::new([1; 16]);
const SESSION: SessionName = SessionName::literal("machine");
const TOKENS: [Token; 2] = [Token(7), Token(8)];

/// Two pieces of guest memory in an arena.
struct World {
    name: &'static str,
    arena: Arena,
    kho: Kho,
    luo: Luo,
    inodes: Vec<Arc<Inode>>,
    frozen: Vec<Freeze>,
}

fn handlers(arena: &Arena, known: Vec<Arc<Inode>>, fault: &Fault) -> Handlers {
    let mut handlers = Handlers::default();
    handlers.register(FaultyHandler::new(GmemHandler::new(arena.clone(), known), fault)).unwrap();
    handlers
}

/// A world whose steps can fail, in which nothing is preserved yet. Its regions have this name.
fn world(name: &'static str, fault: &Fault) -> World {
    let mapping = |bytes| Arc::new(Region::create(name, bytes).unwrap().map().unwrap());
    let mut arena = Arena::new(mapping(MIB));
    let mut inodes = Vec::new();
    for gib in [1, 2] {
        let frames = PageRange::of_bytes(gib << 30, 4 * MIB).unwrap();
        let ram = mapping(4 * MIB);
        arena.place(frames, Arc::clone(&ram)).unwrap();
        ram.store(MIB, gib).unwrap();
        let memory = MemoryName::new(format!("ram{gib}").as_bytes()).unwrap();
        inodes.push(Inode::new(memory, OURS, ram, frames, flags::MMAP));
    }
    let faulty = FaultyMemory::new(arena.clone(), fault);
    let mut kho = Kho::format(Box::new(faulty), OURS, 256).unwrap();
    let mut luo = Luo::new(handlers(&arena, inodes.clone(), fault));
    luo.create_session(SESSION).unwrap();
    luo.publish(&mut kho).unwrap();
    World { name, arena, kho, luo, inodes, frozen: Vec::new() }
}

impl World {
    fn preserve(&mut self) -> Result<(), luo::PreserveError> {
        for (token, inode) in TOKENS.into_iter().zip(&self.inodes) {
            self.luo.preserve(&mut self.kho, SESSION, token, Arc::clone(inode) as File)?;
        }
        Ok(())
    }

    fn publish(&mut self) -> Result<(), luo::PublishError> {
        self.luo.publish(&mut self.kho)
    }

    /// The life after this one.
    fn next(mut self, fault: &Fault) -> Self {
        self.publish().unwrap();
        let faulty = FaultyMemory::new(self.arena.clone(), fault);
        let mut kho = Kho::attach(Box::new(faulty)).unwrap();
        let luo = Luo::attach(&mut kho, handlers(&self.arena, Vec::new(), fault)).unwrap();
        Self { kho, luo, ..self }
    }
}

fn preserved(name: &'static str, fault: &Fault) -> World {
    let mut world = world(name, fault);
    world.preserve().unwrap();
    world
}

fn frozen(name: &'static str, fault: &Fault) -> World {
    let mut world = preserved(name, fault);
    world.frozen = world.inodes.iter().map(|inode| inode.freeze().unwrap()).collect();
    world
}

/// How many of this process's descriptors and mappings are of the world's regions.
fn held(name: &str) -> (usize, usize) {
    let ours = format!("/memfd:{name} ");
    let fds = fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    let fds = links.filter(|link| link.to_string_lossy().starts_with(&ours)).count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    (fds, maps.lines().filter(|line| line.contains(&ours)).count())
}

/// All that there is to compare: the arena's frames and what a reader finds there, sessions and tokens, and of each memory
/// its freezes, holds, files and bindings; its pages and bytes; descriptors and mappings.
fn look(world: &World) -> impl PartialEq + std::fmt::Debug + use<> {
    let memory = |inode: &Arc<Inode>| {
        let region = inode.mapping().region();
        (format!("{inode:?}"), region.allocated_bytes().unwrap(), inode.mapping().load(MIB).unwrap())
    };
    let memories: Vec<_> = world.inodes.iter().map(memory).collect();
    let references: Vec<_> = world.inodes.iter().map(Arc::strong_count).collect();
    let arena = faults::look(&world.kho, &world.arena);
    (arena, format!("{:?}", world.luo), memories, references, held(world.name))
}

/// R1.7.
#[test]
fn a_preserve_that_fails_at_any_step_or_without_a_frame_leaves_everything_as_it_was() {
    const NAME: &str = "fails-preserve";
    let one = |world: &mut World| {
        let file = Arc::clone(&world.inodes[0]) as File;
        world.luo.preserve(&mut world.kho, SESSION, TOKENS[0], file)
    };
    let steps = faults::at_every_step(|fault| world(NAME, fault), look, one, |world| one(world).unwrap());
    assert!(steps >= 2, "a callback and a write");
    let make = || world(NAME, &Fault::default());
    let frames = faults::in_every_room(make, |world| &mut world.kho, |_| (), look, one);
    assert_eq!(frames, 1, "the record's");
}

/// R1.7, R1.10.
#[test]
fn a_publish_that_fails_at_any_step_leaves_everything_as_it_was() {
    let make = |fault: &Fault| preserved("fails-publish", fault);
    let again = |world: &mut World| world.publish().unwrap();
    let steps = faults::at_every_step(make, look, World::publish, again);
    assert!(steps >= 5, "{steps}: sessions, files, the tree, the root");
}

/// R1.3, R1.7, O1.11.
#[test]
fn a_hand_over_that_fails_at_any_step_leaves_the_freezes_as_they_were() {
    let freeze = |world: &mut World| world.luo.freeze(&mut world.kho);
    let make = |fault: &Fault| frozen("fails-freeze", fault);
    let steps = faults::at_every_step(make, look, freeze, |world| {
        freeze(world).unwrap();
        world.frozen.clear();
        assert!(world.inodes.iter().all(|inode| inode.is_frozen()));
        world.luo.unfreeze(&mut world.kho);
        assert!(world.inodes.iter().all(|inode| inode.allocate(0, MIB).is_ok()));
    });
    assert_eq!(steps, 2, "a callback for each memory");

    // And one that refuses by itself: the second memory is not frozen, and the first one's freeze is given back.
    let mut world = frozen("refuses-freeze", &Fault::default());
    drop(world.frozen.pop());
    let before = look(&world);
    freeze(&mut world).unwrap_err();
    assert!(look(&world) == before);
    drop(world.frozen.pop());
    assert!(world.inodes.iter().all(|inode| inode.punch(0, MIB).is_ok()));
}

/// R1.12, O1.13.
#[test]
fn a_retrieve_that_fails_frees_nothing_and_a_finish_then_frees_it() {
    let retrieve = |world: &mut World| world.luo.retrieve(&mut world.kho, SESSION, TOKENS[1]).map(drop);
    for nth in 1.. {
        let fault = Fault::default();
        let mut world = preserved("fails-retrieve", &fault).next(&fault);
        fault.arm(nth);
        let bytes = |world: &World| world.inodes[1].mapping().region().allocated_bytes().unwrap();
        let failed = retrieve(&mut world).is_err();
        assert_eq!(fault.disarm(), failed);
        assert!(world.kho.is_preserved(world.inodes[1].frames()));
        assert_eq!(bytes(&world), Some(4096));
        if !failed {
            assert!(nth > 1, "a step at least");
            break;
        }
        let finished = world.luo.finish(&mut world.kho, SESSION).unwrap();
        assert_eq!(finished.unclaimed, TOKENS, "the error is final for this life");
        assert_eq!(bytes(&world), Some(0));
        assert!(!world.kho.is_preserved(world.inodes[1].frames()));
    }
}

/// R1.13.
#[test]
fn a_finish_that_is_refused_destroys_nothing() {
    let finish = |world: &mut World| world.luo.finish(&mut world.kho, SESSION).map(drop);
    let make = |fault: &Fault| preserved("fails-finish", fault).next(fault);
    let steps = faults::at_every_step(make, look, finish, |world| finish(world).unwrap());
    assert_eq!(steps, 2, "each memory is asked");
}

/// R1.7, R1.10.
#[test]
fn ten_thousand_times_preserved_and_unpreserved_it_is_as_it_was() {
    let mut world = world("ten-thousand", &Fault::default());
    world.luo.drop_session(&mut world.kho, SESSION).unwrap();
    world.publish().unwrap();
    let summary = |world: &World| (world.kho.used_bytes(), world.kho.free_frames(), held(world.name));
    let before = (summary(&world), format!("{:?}", world.inodes));
    for round in 0..10_000 {
        world.luo.create_session(SESSION).unwrap();
        world.preserve().unwrap();
        if round % 100 == 0 {
            world.frozen = world.inodes.iter().map(|inode| inode.freeze().unwrap()).collect();
            world.luo.freeze(&mut world.kho).unwrap();
            world.publish().unwrap();
        }
        world.luo.drop_session(&mut world.kho, SESSION).unwrap();
        world.frozen.clear();
        if round % 100 == 0 {
            world.publish().unwrap();
        }
    }
    world.publish().unwrap();
    assert_eq!((summary(&world), format!("{:?}", world.inodes)), before);
}
