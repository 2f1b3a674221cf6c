//! A writer may die at every store: the old or the new tree is whole, and nothing else is found.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::sync::Arc;
use std::sync::Mutex;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use abi::arena::MAX_GENERATION;
use abi::arena::RootSlot;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::vm::Identity;
use abi::vmalloc::List;
use pages::PageRange;
use proptest::prelude::*;
use tideover_kho::CommitError;
use tideover_kho::Kho;
use tideover_kho::Tree;
use zerocopy::IntoBytes;

/// Room for two whole trees of all that the properties preserve.
const FRAMES: u64 = 1024;

/// Region 0 as bytes, and guest memory without any up to frame 2³¹: 64 regions.
#[derive(Clone, Default)]
struct Image(Vec<u8>);

impl Memory for Image {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.0.read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        let starts = [0, FRAMES].into_iter().chain((1..64).map(|region| region << 25));
        let ends = [FRAMES].into_iter().chain((1..=64).map(|region| region << 25));
        let run = |(start, end)| PageRange::new(pages::Pfn::new(start).unwrap(), end - start).unwrap();
        starts.zip(ends).map(run).collect()
    }
}

impl MemoryMut for Image {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        self.0.write(address, bytes)
    }

    fn order_writes(&mut self) {}
}

#[derive(Default)]
struct Recorded {
    bytes: Image,
    writes: Vec<(u64, Vec<u8>)>,
}

/// Memory that remembers every write.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Recorded>>);

impl Recorder {
    fn new(frames: u64) -> Self {
        let bytes = Image(vec![0; usize::try_from(frames * 4096).unwrap()]);
        Self(Arc::new(Mutex::new(Recorded { bytes, writes: Vec::new() })))
    }

    fn snapshot(&self) -> Image {
        let mut recorded = self.0.lock().unwrap();
        recorded.writes.clear();
        recorded.bytes.clone()
    }

    fn writes(&self) -> Vec<(u64, Vec<u8>)> {
        self.0.lock().unwrap().writes.clone()
    }
}

impl Memory for Recorder {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.0.lock().unwrap().bytes.read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        self.0.lock().unwrap().bytes.runs()
    }
}

impl MemoryMut for Recorder {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        let mut recorded = self.0.lock().unwrap();
        recorded.writes.push((address, bytes.to_vec()));
        recorded.bytes.write(address, bytes)
    }

    fn order_writes(&mut self) {}
}

fn formatted() -> (Recorder, Kho) {
    let memory = Recorder::new(FRAMES);
    let kho = Kho::format(Box::new(memory.clone()), Identity::new([9; 16]), FRAMES).unwrap();
    (memory, kho)
}

/// Calls `check` with the memory after every prefix of the writes, cut at every 8 bytes.
fn replay(mut memory: Image, writes: &[(u64, Vec<u8>)], mut check: impl FnMut(&Image)) {
    check(&memory);
    for (address, bytes) in writes {
        for (word, part) in bytes.chunks(8).enumerate() {
            memory.write(address + word as u64 * 8, part).unwrap();
            // Inside a page of a new tree only every 64th word is looked at: 512 look alike.
            if bytes.len() <= 64 || word % 64 == 0 || word == bytes.len() / 8 - 1 {
                check(&memory);
            }
        }
    }
}

/// All that a tree says, but for where it lies.
fn content(memory: &Image) -> (Vec<PageRange>, Vec<Vec<u8>>) {
    let tree = Tree::read(memory).expect("a whole tree");
    let guest = tree.blocks.values().map(|key| key.range()).filter(|range| range.start().get() >= FRAMES);
    let blobs = tree.fdt.subtrees.iter().map(|subtree| {
        let mut blob = vec![0; usize::try_from(subtree.size).unwrap()];
        memory.read(subtree.data, &mut blob).unwrap();
        blob
    });
    (guest.collect(), blobs.collect())
}

fn blob(kho: &mut Kho, name: &str, bytes: &[u8]) {
    let name = SubtreeName::new(name.as_bytes()).unwrap();
    if let Some(old) = kho.subtree(&name).copied() {
        kho.free(PageRange::of_bytes(old.data, 4096).unwrap());
    }
    let data = kho.store(bytes).unwrap().start().address();
    kho.set_subtree(Subtree { name, data, size: bytes.len() as u64 });
}

#[derive(Debug, Clone)]
enum Change {
    Preserve(u64, u64),
    Unpreserve(usize),
    Blob(u8, Vec<u8>),
    List(usize),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (FRAMES..1 << 30, 1u64..1 << 20).prop_map(|(start, count)| Change::Preserve(start, count)),
        any::<usize>().prop_map(Change::Unpreserve),
        (0u8..4, proptest::collection::vec(any::<u8>(), 1..100))
            .prop_map(|(name, bytes)| Change::Blob(name, bytes)),
        (1usize..30_000).prop_map(Change::List),
    ]
}

fn apply(kho: &mut Kho, held: &mut Vec<PageRange>, change: &Change) {
    match change {
        Change::Preserve(start, count) => {
            let range = PageRange::new(pages::Pfn::new(*start).unwrap(), *count).unwrap();
            let overlaps = held.iter().any(|other| other.overlaps(range));
            assert_eq!(kho.preserve(range).is_err(), overlaps, "{range:?} among {held:?}");
            if !overlaps {
                held.push(range);
            }
        }
        Change::Unpreserve(index) if !held.is_empty() => {
            let range = held.swap_remove(index % held.len());
            kho.unpreserve(range).unwrap();
            assert!(kho.unpreserve(range).is_err(), "twice");
        }
        Change::Unpreserve(_) => {}
        Change::Blob(name, bytes) => blob(kho, &format!("blob{name}"), bytes),
        Change::List(len) => {
            let bytes: Vec<u8> = (0u8..251).cycle().take(*len).collect();
            let descriptor = kho.store_list(&bytes).unwrap();
            let list = List::read(&kho.memory(), &descriptor).unwrap();
            assert_eq!(list.read_bytes(&kho.memory(), *len as u64).unwrap(), bytes);
            kho.free_list(&descriptor).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// L2.4.8.
    #[test]
    fn every_prefix_of_the_writes_shows_the_old_or_the_new_tree(rounds in proptest::collection::vec(proptest::collection::vec(change(), 0..4), 1..6)) {
        let (memory, mut kho) = formatted();
        let mut held = Vec::new();
        for round in rounds {
            let before = memory.snapshot();
            for change in &round {
                apply(&mut kho, &mut held, change);
            }
            kho.commit().unwrap();
            let old = content(&before);
            let new = content(&memory.0.lock().unwrap().bytes);
            let mut switched = false;
            replay(before, &memory.writes(), |memory| {
                let now = content(memory);
                switched |= now == new;
                assert!(now == new || now == old && !switched);
            });
            assert!(switched);
        }
    }

    #[test]
    fn an_attached_writer_goes_on_where_the_last_commit_was(rounds in proptest::collection::vec(proptest::collection::vec(change(), 0..4), 1..8)) {
        let (memory, mut kho) = formatted();
        let mut held = Vec::new();
        for round in rounds {
            for change in &round {
                apply(&mut kho, &mut held, change);
            }
            kho.commit().unwrap();
            let used = kho.used_bytes();
            drop(kho);
            kho = Kho::attach(Box::new(memory.clone())).unwrap();
            prop_assert_eq!(kho.used_bytes(), used);
            for range in &held {
                prop_assert!(kho.is_preserved(*range));
            }
        }
        // Nothing leaks: with everything given up, the tree is as small as a fresh one.
        for range in held {
            kho.unpreserve(range).unwrap();
        }
        for name in 0..4 {
            if kho.subtree(&SubtreeName::new(format!("blob{name}").as_bytes()).unwrap()).is_some() {
                blob(&mut kho, &format!("blob{name}"), b"x");
            }
        }
        kho.commit().unwrap();
        let blobs = content(&memory.snapshot()).1.len() as u64;
        prop_assert_eq!(kho.used_bytes(), (1 + 7 + blobs) * 4096);
    }
}

#[test]
fn formatting_shows_no_arena_before_it_is_whole() {
    let memory = Recorder::new(FRAMES);
    let empty = memory.snapshot();
    Kho::format(Box::new(memory.clone()), Identity::new([9; 16]), FRAMES).unwrap();
    let writes = memory.writes();
    let (header, before) = writes.split_last().unwrap();
    assert_eq!(header.0, 0, "the header comes last");
    replay(empty, before, |memory| assert!(Tree::read(memory).is_err()));
    assert!(Tree::read(&memory.snapshot()).is_ok());
}

#[test]
fn a_full_region_refuses_and_still_commits() {
    let (memory, mut kho) = formatted();
    let mut taken = Vec::new();
    while let Ok(page) = kho.allocate(1) {
        taken.push(page);
    }
    kho.commit().unwrap();
    assert!(kho.store_list(&[0; 8192]).is_err());
    kho.free(taken[3]);
    kho.commit().unwrap();
    assert_eq!(kho.allocate(1).unwrap(), taken[3]);
    assert_eq!(Tree::read(&memory.snapshot()).unwrap().frames, FRAMES);
}

#[test]
fn a_commit_that_finds_no_room_leaves_the_old_tree_and_can_be_tried_again() {
    let (memory, mut kho) = formatted();
    while kho.allocate(1).is_ok() {}
    let before = content(&memory.snapshot());
    // One leaf each: more new nodes than there are free frames.
    let far = |index: u64| PageRange::page(pages::Pfn::new((index + 1) << 24).unwrap());
    for index in 0..40 {
        kho.preserve(far(index)).unwrap();
    }
    assert!(kho.commit().is_err());
    assert_eq!(content(&memory.snapshot()), before);
    for index in 2..40 {
        kho.unpreserve(far(index)).unwrap();
    }
    kho.commit().unwrap();
    assert_eq!(content(&memory.snapshot()).0, [far(0), far(1)]);
}

#[test]
fn after_the_last_generation_a_commit_is_refused_and_the_last_tree_stays() {
    let (mut memory, mut kho) = formatted();
    blob(&mut kho, "blob", b"first");
    kho.commit().unwrap();
    let before_last = RootSlot::new(MAX_GENERATION - 1, RootSlot::read(&memory).unwrap().fdt());
    memory.write(RootSlot::address(MAX_GENERATION - 1), before_last.as_bytes()).unwrap();
    let mut kho = Kho::attach(Box::new(memory.clone())).unwrap();
    blob(&mut kho, "blob", b"last");
    kho.commit().unwrap();
    let last = content(&memory.snapshot());
    blob(&mut kho, "blob", b"one more");
    assert_eq!(kho.commit(), Err(CommitError::Generation { generation: MAX_GENERATION }));
    assert_eq!(content(&memory.snapshot()), last);
    let used = kho.used_bytes();
    assert!(kho.commit().is_err());
    assert_eq!(kho.used_bytes(), used, "what it had taken is free again");
}

#[test]
fn frames_of_region_0_are_the_allocators() {
    let (memory, mut kho) = formatted();
    let inside = PageRange::of_bytes(8 * 4096, 4096).unwrap();
    assert!(kho.preserve(inside).is_err());
    // Its nodes are not written anew by the next commit.
    kho.preserve(PageRange::of_bytes(1 << 30, 1 << 30).unwrap()).unwrap();
    kho.commit().unwrap();
    let used = kho.used_bytes();
    kho.free(PageRange::of_bytes(0, FRAMES * 4096 * 2).unwrap());
    kho.commit().unwrap();
    assert_eq!(kho.used_bytes(), used, "the tree's own pages are not given back");
    assert!(Tree::read(&memory.snapshot()).is_ok());
}

#[test]
fn a_node_that_is_empty_is_in_no_table_of_the_next_tree() {
    let (memory, mut kho) = formatted();
    let nodes = || Tree::read(&memory.snapshot()).unwrap().nodes;
    let fresh = nodes().len();
    // The first two are in one leaf; the third is in another below the same table, the last one far away.
    let page = |pfn: u64| PageRange::page(pages::Pfn::new(pfn).unwrap());
    let held = [page(1 << 20), page((1 << 20) + 1), page((1 << 20) + (1 << 15)), page(1 << 30)];
    for range in held {
        kho.preserve(range).unwrap();
    }
    kho.commit().unwrap();
    let mut left = content(&memory.snapshot()).0;
    assert_eq!(left, held);
    for (range, fewer) in held.into_iter().zip([0, 1, 1, 2]) {
        let before = nodes().len();
        kho.unpreserve(range).unwrap();
        kho.commit().unwrap();
        left.retain(|other| *other != range);
        assert_eq!(content(&memory.snapshot()).0, left);
        assert_eq!(before - nodes().len(), fewer, "{range:?}");
        // What is given up is written over by the next commits; nobody may look for a node there.
        for round in 0..8u8 {
            blob(&mut kho, "blob", &[round; 64]);
            kho.commit().unwrap();
            assert_eq!(content(&memory.snapshot()).0, left);
        }
    }
    assert_eq!(nodes().len(), fresh);
}

#[test]
fn a_gib_of_guest_memory_costs_one_key_and_seven_nodes() {
    let (memory, mut kho) = formatted();
    let empty = kho.used_bytes();
    kho.preserve(PageRange::of_bytes(1 << 30, 1 << 30).unwrap()).unwrap();
    kho.commit().unwrap();
    // The root is shared; four tables and a leaf for order 18.
    assert_eq!(kho.used_bytes() - empty, 5 * 4096);
    assert_eq!(content(&memory.snapshot()).0.len(), 1);
}

/// A kernel restores a run in pieces that it works out anew, without the bounds between NUMA nodes that they were cut at, and
/// steps by these: it can lose pages.
#[test]
fn a_run_that_was_cut_otherwise_is_given_up_block_by_block_and_loses_no_page() {
    let (memory, mut kho) = formatted();
    let run = |start: u64, count: u64| PageRange::new(pages::Pfn::new(start).unwrap(), count).unwrap();
    // As if a node ended at page 0x10007, in the midst of what would be a block of four.
    let (near, far, whole) = (run(0x10003, 4), run(0x10007, 6), run(0x10003, 10));
    kho.preserve(near).unwrap();
    kho.preserve(far).unwrap();
    kho.commit().unwrap();
    let cut: Vec<PageRange> = content(&memory.snapshot()).0;
    assert_ne!(
        cut,
        whole.blocks().map(|(pfn, order)| PageRange::block(pfn, order).unwrap()).collect::<Vec<_>>()
    );
    let mut kho = Kho::attach(Box::new(memory.clone())).unwrap();
    assert!([near, far, whole].into_iter().all(|run| kho.is_preserved(run)));
    for wrong in [run(0x10002, 11), run(0x10003, 11), run(0x10003, 8), run(0x10005, 2), run(0x10009, 3)] {
        assert!(!kho.is_preserved(wrong) && kho.unpreserve(wrong).is_err(), "{wrong:?}");
    }
    kho.unpreserve(whole).unwrap();
    kho.commit().unwrap();
    assert_eq!(content(&memory.snapshot()).0, []);
}
