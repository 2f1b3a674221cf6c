//! Arenas that are not what a commit wrote: an error by field, after work that region 0 bounds.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use abi::Malformed;
use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use abi::Problem;
use abi::arena::Header;
use abi::arena::RootSlot;
use abi::kho::RootFdt;
use abi::kho::Subtree;
use abi::kho::SubtreeName;
use abi::record::Format;
use abi::vm::Identity;
use pages::PAGE_SIZE;
use pages::PageRange;
use pages::Pfn;
use proptest::prelude::*;
use tideover_kho::Kho;
use tideover_kho::PreserveError;
use tideover_kho::Root;
use tideover_kho::Tree;
use zerocopy::IntoBytes;

const FRAMES: u64 = 2048;
/// First frame of the guest memory, which is 16 GiB.
const GUEST: u64 = 1 << 22;
const IDENTITY: Identity = Identity::new([9; 16]);

/// Region 0, and guest memory that reads as zeroes. It counts the bytes that are read.
#[derive(Clone)]
struct Counted {
    bytes: Arc<Mutex<Vec<u8>>>,
    read: Arc<AtomicU64>,
}

impl Memory for Counted {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.read.fetch_add(into.len() as u64, Ordering::Relaxed);
        if (GUEST..2 * GUEST).contains(&(address / PAGE_SIZE)) {
            into.fill(0);
            return Ok(());
        }
        self.bytes.lock().unwrap().read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        vec![range(0, FRAMES), range(GUEST, GUEST)]
    }
}

impl MemoryMut for Counted {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        self.bytes.lock().unwrap().write(address, bytes)
    }

    fn order_writes(&mut self) {}
}

impl Counted {
    fn put(&self, address: u64, bytes: &[u8]) {
        self.clone().write(address, bytes).unwrap();
    }

    fn word(&self, address: u64, value: u64) {
        self.put(address, &value.to_le_bytes());
    }

    fn page(&self, frame: u64) -> [u8; 4096] {
        let mut page = [0; 4096];
        self.read(frame * PAGE_SIZE, &mut page).unwrap();
        page
    }

    fn refused(&self) -> Malformed {
        Kho::attach(Box::new(self.clone())).unwrap_err()
    }
}

fn range(start: u64, count: u64) -> PageRange {
    PageRange::new(Pfn::new(start).unwrap(), count).unwrap()
}

fn name(text: &str) -> SubtreeName {
    SubtreeName::new(text.as_bytes()).unwrap()
}

/// An arena with all of its guest memory preserved, a blob, and a record.
fn arena() -> (Counted, Kho) {
    let bytes = vec![0; usize::try_from(FRAMES * PAGE_SIZE).unwrap()];
    let memory = Counted { bytes: Arc::new(Mutex::new(bytes)), read: Arc::default() };
    let mut kho = Kho::format(Box::new(memory.clone()), IDENTITY, FRAMES).unwrap();
    kho.preserve(range(GUEST, GUEST)).unwrap();
    let data = kho.store(b"blob").unwrap().start().address();
    kho.set_subtree(Subtree { name: name("blob"), data, size: 4 });
    kho.commit().unwrap();
    (memory, kho)
}

/// Commits frames that hold these pages; gives the first one's number.
fn store(kho: &mut Kho, pages: &[[u8; 4096]]) -> u64 {
    let frames = kho.store(pages.as_flattened()).unwrap();
    kho.commit().unwrap();
    frames.start().get()
}

/// Hangs 128 leaves of ones into the tree, for the single pages from `first` on. Gives the error, and how much was read
/// until then.
fn with_full_leaves(first: u64) -> (Malformed, u64) {
    let (memory, mut kho) = arena();
    let leaves = store(&mut kho, &[[0xFF; 4096]; 128]);
    let table = Tree::read(&memory).unwrap().nodes[&(1, 1 << 52 >> 24)];
    for index in 0..128 {
        memory.word(table + ((first >> 15) + index) * 8, (leaves + index) * PAGE_SIZE);
    }
    memory.read.store(0, Ordering::Relaxed);
    (memory.refused(), memory.read.load(Ordering::Relaxed))
}

#[test]
fn leaves_of_ones_are_refused_at_the_first() {
    let (error, read) = with_full_leaves(2 * GUEST);
    assert_eq!(error.field, "block", "outside every region: {error}");
    assert!(read < 32 * PAGE_SIZE, "{read}");
    let (error, read) = with_full_leaves(GUEST + (1 << 15));
    assert_eq!(error.field, "blocks", "in a region: {error}");
    assert!(read < 32 * PAGE_SIZE, "{read}");
}

#[test]
fn more_blocks_than_whole_regions_make_are_refused_by_both_sides() {
    let (memory, mut kho) = arena();
    kho.unpreserve(range(GUEST, GUEST)).unwrap();
    let limit = 104;
    for block in 0..limit {
        kho.preserve(range(GUEST + 2 * block, 1)).unwrap();
    }
    let error = kho.preserve(range(GUEST + 2 * limit, 1)).unwrap_err();
    assert_eq!(error, PreserveError::TooMany { limit: 104 });
    kho.commit().unwrap();
    let tree = Tree::read(&memory).unwrap();
    let leaf = tree.nodes[&(0, (1 << 52 | GUEST) >> 15)];
    memory.put(leaf + 2 * limit / 8, &[1]);
    let error = Tree::read(&memory).unwrap_err();
    assert_eq!((error.field, error.problem), ("blocks", Problem::TooLarge { found: 105, limit: 104 }));
}

#[test]
fn marks_outside_every_region_are_refused_by_both_sides() {
    let (memory, mut kho) = arena();
    for absent in [range(FRAMES, 1), range(GUEST - 1, 1), range(2 * GUEST, 1), range(1 << 51, 1 << 51)] {
        assert_eq!(kho.preserve(absent), Err(PreserveError::Absent { range: absent }));
    }
    let leaf = Tree::read(&memory).unwrap().nodes[&(0, 1 << 52 >> 15)];
    memory.put(leaf + FRAMES / 8, &[1]);
    let error = memory.refused();
    assert_eq!((error.field, error.address), ("block", FRAMES * PAGE_SIZE));
}

#[test]
fn a_tree_in_guest_memory_is_not_looked_at() {
    let (memory, _) = arena();
    let tree = Tree::read(&memory).unwrap();
    memory.word(tree.fdt.map, GUEST * PAGE_SIZE);
    assert_eq!(memory.refused().field, "node");
    memory.put(RootSlot::address(9), RootSlot::new(9, GUEST * PAGE_SIZE).as_bytes());
    assert_eq!(memory.refused().field, "fdt");
}

#[test]
fn a_region_0_that_is_smaller_than_its_header_says_is_refused() {
    let (memory, _) = arena();
    memory.put(0, Header::new(IDENTITY, FRAMES + 1).as_bytes());
    let error = Root::read(&memory).unwrap_err();
    assert_eq!(
        (error.field, error.problem),
        ("frames", Problem::TooLarge { found: FRAMES + 1, limit: FRAMES })
    );
}

#[test]
fn a_root_that_is_the_fdt_is_refused() {
    let (memory, _) = arena();
    let tree = Tree::read(&memory).unwrap();
    let fdt = RootFdt { map: tree.slot.fdt(), ..tree.fdt };
    memory.put(tree.slot.fdt(), &fdt.encode().unwrap());
    assert_eq!(memory.refused().field, "node");
}

#[test]
fn frames_that_two_blobs_share_are_refused() {
    for (data, size) in [(0, 4), (0, 4096), (8, 1)] {
        let (memory, mut kho) = arena();
        let first = kho.subtree(&name("blob")).unwrap().data;
        kho.set_subtree(Subtree { name: name("other"), data: first + data, size });
        kho.commit().unwrap();
        let error = memory.refused();
        assert_eq!((error.format, error.field, error.address), ("kho subtree", "frames", first));
    }
}

#[test]
fn blobs_that_are_not_there_are_refused() {
    let (memory, kho) = arena();
    let (node, used) = (Tree::read(&memory).unwrap().fdt.map, kho.used_bytes());
    for (data, size) in [
        (node, 1),
        (node + 4095, 1),
        (used + 64 * PAGE_SIZE, 1),
        (4, 1),
        ((FRAMES - 1) * PAGE_SIZE, 8192),
        (GUEST * PAGE_SIZE, 1),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (4096, u64::MAX),
        (1, u64::MAX),
    ] {
        let (memory, mut kho) = arena();
        kho.set_subtree(Subtree { name: name("other"), data, size });
        kho.commit().unwrap();
        assert!(matches!(memory.refused().field, "frames" | "blob-size"), "{data:#x} {size:#x}");
    }
}

#[test]
fn a_frame_is_adopted_once_until_it_is_given_back() {
    const FORMAT: Format =
        Format { compatible: "t", kind: *b"TEST", version: 1, oldest: 1, max_payload_bytes: 9000 };
    let (memory, mut kho) = arena();
    let record = kho.store(&FORMAT.encode(&[7; 5000])).unwrap();
    let list = kho.store_list(&[7; 5000]).unwrap();
    kho.commit().unwrap();
    let mut kho = Kho::attach(Box::new(memory)).unwrap();
    let address = record.start().address();
    kho.adopt_record(&FORMAT, address).unwrap();
    let list = abi::vmalloc::List::read(&kho.memory(), &list).unwrap();
    assert_eq!((record.len_pages(), list.blocks.len(), list.chunks.len()), (2, 2, 1));
    kho.adopt_list(&list).unwrap();
    for taken in record.pages().chain(list.blocks.iter().flat_map(|block| block.pages())) {
        assert_eq!(kho.adopt("t", PageRange::page(taken)).unwrap_err().address, taken.address());
    }
    assert!(kho.adopt_record(&FORMAT, address).is_err());
    assert!(kho.adopt_list(&list).is_err());
    kho.free_record(&FORMAT, address);
    kho.commit().unwrap();
    assert_eq!(kho.allocate(2).unwrap(), record);
    kho.adopt("t", record).unwrap();
}

#[test]
fn what_is_refused_adopts_nothing() {
    let (memory, mut kho) = arena();
    let three = kho.allocate(3).unwrap();
    let [first, middle, last] = [0, 1, 2].map(|index| range(three.start().get() + index, 1));
    kho.commit().unwrap();
    let mut kho = Kho::attach(Box::new(memory)).unwrap();
    kho.adopt("t", last).unwrap();
    assert_eq!(kho.adopt("t", three).unwrap_err().address, last.start().address());
    kho.free(middle);
    assert_eq!(kho.adopt("t", three).unwrap_err().address, middle.start().address());
    kho.adopt("t", first).unwrap();
    for absent in [range(0, 1), range(FRAMES - 1, 1), range(FRAMES - 1, 2), range(1 << 40, 1 << 40)] {
        assert_eq!(kho.adopt("t", absent).unwrap_err().field, "frames", "{absent:?}");
    }
}

/// One change of what region 0 holds.
#[derive(Debug, Clone)]
enum Damage {
    Word { frame: prop::sample::Index, word: u64, value: Value },
    Swap { one: prop::sample::Index, other: prop::sample::Index },
    Copy { from: prop::sample::Index, to: prop::sample::Index },
}

#[derive(Debug, Clone)]
enum Value {
    Number(u64),
    Frame(prop::sample::Index),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    let number =
        prop_oneof![Just(0), Just(1), Just(u64::MAX), (0u32..64).prop_map(|bit| 1 << bit), any::<u64>()];
    let value = prop_oneof![number.prop_map(Value::Number), index().prop_map(Value::Frame)];
    // Most of what means something stands at the start of a page.
    let word = prop_oneof![0u64..32, 0u64..512];
    prop_oneof![
        8 => (index(), word, value).prop_map(|(frame, word, value)| Damage::Word { frame, word, value }),
        1 => (index(), index()).prop_map(|(one, other)| Damage::Swap { one, other }),
        1 => (index(), index()).prop_map(|(from, to)| Damage::Copy { from, to }),
    ]
}

fn apply(memory: &Counted, frames: &[u64], damage: &Damage) {
    match damage {
        Damage::Word { frame, word, value } => {
            let value = match value {
                Value::Number(number) => *number,
                Value::Frame(frame) => frame.get(frames) * PAGE_SIZE,
            };
            memory.word(frame.get(frames) * PAGE_SIZE + word * 8, value);
        }
        Damage::Swap { one, other } => {
            let (one, other) = (*one.get(frames), *other.get(frames));
            let (page, into) = (memory.page(one), memory.page(other));
            memory.put(one * PAGE_SIZE, &into);
            memory.put(other * PAGE_SIZE, &page);
        }
        Damage::Copy { from, to } => memory.put(to.get(frames) * PAGE_SIZE, &memory.page(*from.get(frames))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// The header's sums are made right again: a sum protects from chance alone.
    #[test]
    fn damage_is_refused_or_can_be_lived_with(changes in prop::collection::vec(damage(), 1..4)) {
        let (memory, mut kho) = arena();
        kho.store_list(&[7; 5000]).unwrap();
        kho.commit().unwrap();
        let tree = Tree::read(&memory).unwrap();
        let frames: Vec<u64> = [0].into_iter().chain(tree.blocks.range(..FRAMES).map(|(frame, _)| *frame)).collect();
        let slot = tree.slot;
        changes.iter().for_each(|change| apply(&memory, &frames, change));
        memory.put(0, Header::new(IDENTITY, FRAMES).as_bytes());
        memory.put(RootSlot::address(slot.generation()), slot.as_bytes());

        memory.read.store(0, Ordering::Relaxed);
        let found = Kho::attach(Box::new(memory.clone()));
        let read = memory.read.load(Ordering::Relaxed);
        prop_assert!(read <= FRAMES * PAGE_SIZE, "{read} bytes");
        if let Ok(mut kho) = found {
            let before = Tree::read(&memory).unwrap();
            kho.free(range(0, FRAMES));
            let data = kho.store(b"new").unwrap().start().address();
            let old: Vec<Subtree> = before.fdt.subtrees;
            old.iter().for_each(|subtree| kho.set_subtree(Subtree { data, size: 0, ..*subtree }));
            kho.commit().unwrap();
            prop_assert!(Tree::read(&memory).is_ok());
        }
    }
}
