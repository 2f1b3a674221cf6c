//! Each write, and each frame, that an operation needs is missing once: nothing of the operation stays behind.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::cell::RefCell;

use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::vm::Identity;
use faults::Fault;
use faults::FaultyMemory;
use faults::VecArena;
use faults::at_every_step;
use faults::exhaust;
use faults::in_every_room;
use faults::look;
use pages::PageRange;
use pages::Pfn;
use tideover_kho::Kho;
use tideover_kho::Tree;

const FRAMES: u64 = 1200;

struct World {
    memory: VecArena,
    kho: Kho,
}

fn guest(index: u64) -> PageRange {
    PageRange::page(Pfn::new((index + 1) << 24).unwrap())
}

fn name() -> SubtreeName {
    SubtreeName::literal("blob")
}

/// An arena with guest memory, a blob, and changes that are not committed: frames that were given out and given back.
fn make(fault: &Fault) -> World {
    let memory = VecArena::new(usize::try_from(FRAMES).unwrap());
    let faulty = FaultyMemory::new(memory.clone(), fault);
    let mut kho = Kho::format(Box::new(faulty), Identity::new([9; 16]), FRAMES).unwrap();
    let blob = kho.store(b"blob").unwrap();
    kho.set_subtree(Subtree { name: name(), data: blob.start().address(), size: 4 });
    let given_back = kho.allocate(3).unwrap();
    kho.preserve(guest(0)).unwrap();
    kho.commit().unwrap();
    kho.free(given_back);
    kho.allocate(2).unwrap();
    kho.preserve(guest(1)).unwrap();
    World { memory, kho }
}

fn seen(world: &World) -> (tideover_kho::Books, Tree) {
    look(&world.kho, &world.memory)
}

/// Runs an operation with each write failing, and with too few frames; gives how many of each it takes.
fn fail_everywhere(operation: impl Fn(&mut Kho) -> Result<(), String>) -> (u64, usize) {
    let run = |world: &mut World| operation(&mut world.kho);
    let steps = at_every_step(make, seen, run, |world| run(world).unwrap());
    let frames = in_every_room(|| make(&Fault::default()), |world| &mut world.kho, |_| (), seen, run);
    (steps, frames)
}

fn told<T, E: std::fmt::Debug>(result: Result<T, E>) -> Result<(), String> {
    result.map(drop).map_err(|error| format!("{error:?}"))
}

#[test]
fn bytes_that_cannot_be_kept_take_no_frame() {
    assert_eq!(fail_everywhere(|kho| told(kho.store(&[7; 100]))), (1, 1));
    assert_eq!(fail_everywhere(|kho| told(kho.store(&[7; 3 * 4096]))), (1, 3));
}

#[test]
fn a_list_that_cannot_be_kept_takes_no_frame() {
    assert_eq!(fail_everywhere(|kho| told(kho.store_list(&[7; 5000]))), (3, 3), "two blocks and a chunk");
    let long = vec![7; 511 * 4096];
    assert_eq!(fail_everywhere(|kho| told(kho.store_list(&long))), (513, 513), "and two chunks");
}

#[test]
fn frames_are_given_out_all_or_none() {
    assert_eq!(fail_everywhere(|kho| told(kho.allocate(5))), (0, 5));
}

/// L2.4.8.
#[test]
fn a_commit_that_fails_changes_nothing_that_a_reader_or_the_writer_knows() {
    let (writes, frames) = fail_everywhere(|kho| told(kho.commit()));
    assert_eq!(writes, 10, "region 0's leaf and the guest's, six tables, the FDT, the slot");
    assert_eq!(frames, 0, "a commit has frames of its own");
}

/// More new nodes than a commit has frames of its own: it fails at every one of them.
#[test]
fn a_commit_that_finds_no_frame_gives_back_those_that_it_had_found() {
    let prepare = |world: &mut World| (2..40).for_each(|index| world.kho.preserve(guest(index)).unwrap());
    let commit = |world: &mut World| told(world.kho.commit());
    let make = || make(&Fault::default());
    let taken = in_every_room(make, |world| &mut world.kho, prepare, seen, commit);
    assert!(taken > 38, "a leaf for each page at least: {taken}");
}

#[test]
fn what_is_given_back_is_kept_after_all() {
    let mut world = make(&Fault::default());
    world.kho.commit().unwrap();
    let blob = PageRange::of_bytes(world.kho.subtree(&name()).unwrap().data, 4096).unwrap();
    let World { memory, .. } = world;
    // A life that has read it: its frames are adopted.
    let mut kho = Kho::attach(Box::new(memory.clone())).unwrap();
    let before = look(&kho, &memory);
    kho.free(blob);
    assert_ne!(kho.books(), before.0);
    assert!(kho.keep(blob));
    assert!(!kho.keep(PageRange::new(Pfn::ZERO, FRAMES).unwrap()));
    assert_eq!(look(&kho, &memory), before, "those that were not given back are passed over");
    kho.free(blob);
    kho.commit().unwrap();
    assert!(!kho.keep(blob) && !kho.is_preserved(blob), "after the commit it is too late");
}

#[test]
fn frames_are_adopted_all_or_none() {
    let mut world = make(&Fault::default());
    let page = |kho: &mut Kho| kho.store(b"page").unwrap();
    let [one, other] = [(); 2].map(|()| page(&mut world.kho));
    world.kho.commit().unwrap();
    let before = seen(&world);
    let free = PageRange::page(Pfn::new(FRAMES - 1).unwrap());
    let outside = PageRange::page(Pfn::new(FRAMES).unwrap());
    for last in [free, outside, one] {
        assert!(world.kho.adopt_all("test", &[one, other, last]).is_err(), "{last:?}");
        assert_eq!(seen(&world), before);
    }
    world.kho.adopt_all("test", &[one, other]).unwrap();
    assert_ne!(seen(&world), before);
}

#[test]
fn ten_thousand_pieces_of_guest_memory_and_their_records_leave_nothing() {
    let world = RefCell::new(make(&Fault::default()));
    let mut world = world.borrow_mut();
    world.kho.commit().unwrap();
    let (used, content) = (world.kho.used_bytes(), blocks(&world));
    for round in 0..10_000 {
        let range = guest(2 + round % 30);
        world.kho.preserve(range).unwrap();
        let record = world.kho.store(&round.to_le_bytes()).unwrap();
        let list = world.kho.store_list(&[7; 5000]).unwrap();
        if round % 100 == 0 {
            world.kho.commit().unwrap();
        }
        world.kho.free_list(&list).unwrap();
        world.kho.free(record);
        world.kho.unpreserve(range).unwrap();
    }
    world.kho.commit().unwrap();
    assert_eq!((world.kho.used_bytes(), blocks(&world)), (used, content));
    assert!(!exhaust(&mut world.kho).is_empty());
}

/// The guest memory that is marked.
fn blocks(world: &World) -> Vec<PageRange> {
    let tree = Tree::read(&world.memory).unwrap();
    tree.blocks.range(FRAMES..).map(|(_, key)| key.range()).collect()
}
