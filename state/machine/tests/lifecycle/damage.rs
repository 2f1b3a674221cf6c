//! Region 0 as somebody would write it who means harm: every sum is right.
//!
//! Words become others that mean something (frames that are in use, ends of ranges), frames change places, and then
//! the sums of header, root slots and records are made right again. What is accepted has to be a machine for good.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use abi::Memory;
use abi::MemoryMut;
use abi::NoMemory;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::SLOT_ADDRESSES;
use abi::record::checksum;
use abi::state::StateRecord;
use pages::PageRange;
use proptest::prelude::*;
use region::Arena;
use tideover_machine::Incoming;
use tideover_machine::Machine;

use crate::rig::freeze;
use crate::rig::inodes;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;
use crate::rig::states;
use crate::seal;

const REGION0_BYTES: u64 = 8 << 20;

/// One change of what region 0 holds. Frames are drawn from those in use.
#[derive(Debug, Clone)]
enum Damage {
    /// A number of 1, 2, 4 or 8 bytes, at or near the n-th byte of the frame that is not zero.
    Number {
        frame: prop::sample::Index,
        near: prop::sample::Index,
        words_on: i64,
        width: usize,
        value: Value,
    },
    /// The n-th address of a frame in use that stands in the frame becomes another's.
    Point {
        frame: prop::sample::Index,
        nth: prop::sample::Index,
        to: prop::sample::Index,
    },
    Swap {
        one: prop::sample::Index,
        other: prop::sample::Index,
    },
    Copy {
        from: prop::sample::Index,
        to: prop::sample::Index,
    },
}

#[derive(Debug, Clone)]
enum Value {
    Number(u64),
    Frame(prop::sample::Index),
    Add(u64),
}

fn damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    let number = prop_oneof![
        Just(0),
        Just(1),
        Just(u64::MAX),
        Just(u64::MAX - 4095),
        (0u32..64).prop_map(|bit| 1 << bit),
        (0u64..2048).prop_map(|page| (1 << 30) + page * 4096),
        any::<u64>(),
    ];
    let value = prop_oneof![
        3 => number.prop_map(Value::Number),
        2 => index().prop_map(Value::Frame),
        1 => prop_oneof![Just(1), Just(u64::MAX), Just(4096)].prop_map(Value::Add),
    ];
    let place = (index(), index(), prop_oneof![4 => Just(0i64), 1 => -2i64..=2]);
    let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let number = (place, width, value).prop_map(|((frame, near, words_on), width, value)| Damage::Number {
        frame,
        near,
        words_on,
        width,
        value,
    });
    prop_oneof![
        4 => number,
        4 => (index(), index(), index()).prop_map(|(frame, nth, to)| Damage::Point { frame, nth, to }),
        1 => (index(), index()).prop_map(|(one, other)| Damage::Swap { one, other }),
        1 => (index(), index()).prop_map(|(from, to)| Damage::Copy { from, to }),
    ]
}

fn page(arena: &Arena, address: u64) -> [u8; 4096] {
    let mut page = [0; 4096];
    arena.read(address, &mut page).unwrap();
    page
}

/// Writes a page, but for the ownership word: whose the machine is, is not the question here.
fn put(arena: &mut Arena, address: u64, page: &[u8; 4096]) {
    if address == 0 {
        let word = usize::try_from(OWNERSHIP_ADDRESS).unwrap();
        arena.write(0, &page[..word]).unwrap();
        arena.write(OWNERSHIP_ADDRESS + 8, &page[word + 8..]).unwrap();
    } else {
        arena.write(address, page).unwrap();
    }
}

fn word(page: &[u8; 4096], at: usize) -> u64 {
    u64::from_le_bytes(page[at..at + 8].try_into().unwrap())
}

fn apply(arena: &mut Arena, frames: &[u64], damage: &Damage) {
    match damage {
        Damage::Number { frame, near, words_on, width, value } => {
            let address = *frame.get(frames);
            let mut page = page(arena, address);
            let there: Vec<usize> = (0..4096).filter(|at| page[*at] != 0).collect();
            if there.is_empty() {
                return;
            }
            let at = i64::try_from(*near.get(&there)).unwrap() + 8 * words_on;
            let at = usize::try_from(at.clamp(0, 4088)).unwrap() / width * width;
            let mut old = [0; 8];
            old[..*width].copy_from_slice(&page[at..at + width]);
            let value = match value {
                Value::Number(number) => *number,
                Value::Frame(frame) => *frame.get(frames),
                Value::Add(step) => u64::from_le_bytes(old).wrapping_add(*step),
            };
            page[at..at + width].copy_from_slice(&value.to_le_bytes()[..*width]);
            put(arena, address, &page);
        }
        Damage::Point { frame, nth, to } => {
            let address = *frame.get(frames);
            let mut page = page(arena, address);
            let pointers: Vec<usize> =
                (0..4096).step_by(8).filter(|at| frames[1..].contains(&word(&page, *at))).collect();
            if pointers.is_empty() {
                return;
            }
            let at = *nth.get(&pointers);
            page[at..at + 8].copy_from_slice(&to.get(frames).to_le_bytes());
            put(arena, address, &page);
        }
        Damage::Swap { one, other } => {
            let (one, other) = (*one.get(frames), *other.get(frames));
            let (from, to) = (page(arena, one), page(arena, other));
            put(arena, one, &to);
            put(arena, other, &from);
        }
        Damage::Copy { from, to } => {
            let from = page(arena, *from.get(frames));
            put(arena, *to.get(frames), &from);
        }
    }
}

/// An arena without its guest memory.
struct Region0<'a>(&'a Arena);

impl Memory for Region0<'_> {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        let none = NoMemory::at(address, into.len());
        if address < REGION0_BYTES { self.0.read(address, into) } else { Err(none) }
    }

    fn runs(&self) -> Vec<PageRange> {
        PageRange::of_bytes(0, REGION0_BYTES).into_iter().collect()
    }
}

/// Makes the sum at `at` right that covers `covered`.
fn make_right(page: &mut [u8; 4096], at: usize, covered: std::ops::Range<usize>) {
    page[at..at + 4].fill(0);
    let sum = checksum(&[&page[covered]]);
    page[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

fn make_sums_right(arena: &mut Arena, frames: &[u64]) {
    for address in frames {
        let mut page = page(arena, *address);
        if *address == 0 {
            make_right(&mut page, 12, 0..64);
            for slot in SLOT_ADDRESSES.map(|slot| usize::try_from(slot).unwrap()) {
                make_right(&mut page, slot + 16, slot..slot + 32);
            }
        } else if page.starts_with(b"TDRECORD") {
            let len = word(&page, 16);
            if len <= 4096 - 32 {
                make_right(&mut page, 24, 0..32 + usize::try_from(len).unwrap());
            }
        }
        put(arena, *address, &page);
        // Who reads guest memory here meets a frozen hole, and waits.
        let region0 = Region0(arena);
        let Ok(record) = StateRecord::read(&region0, *address) else { continue };
        let list = record.read_list(&region0, *address);
        let bytes = list.and_then(|list| list.read_bytes(&region0, record.len_bytes));
        if let Ok(bytes) = bytes {
            let right = StateRecord { checksum: checksum(&[&bytes]), ..record }.encode();
            page[..right.len()].copy_from_slice(&right);
            put(arena, *address, &page);
        }
    }
}

/// An arena that counts the bytes that are read.
#[derive(Clone)]
struct Counted(Arena, Arc<AtomicU64>);

impl Memory for Counted {
    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), NoMemory> {
        self.1.fetch_add(into.len() as u64, Ordering::Relaxed);
        self.0.read(address, into)
    }

    fn runs(&self) -> Vec<PageRange> {
        self.0.runs()
    }
}

impl MemoryMut for Counted {
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), NoMemory> {
        self.0.write(address, bytes)
    }

    fn order_writes(&mut self) {
        self.0.order_writes();
    }
}

/// Reads all that the attach reads, as far as it can be read.
fn read_all(memory: &Counted) -> Result<(), abi::Malformed> {
    let kho = kho::Kho::attach(Box::new(memory.clone()))?;
    let Some(subtree) = kho.subtree(&abi::kho::SubtreeName::literal(abi::luo::SUBTREE)) else {
        return Ok(());
    };
    let luo = abi::luo::Luo::read(&kho.memory(), subtree.data, subtree.size)?;
    for file in luo.sessions.iter().flat_map(|session| &session.files) {
        let Ok(record) = StateRecord::read(&kho.memory(), file.data) else { continue };
        let list = record.read_list(&kho.memory(), file.data)?;
        assert!(list.blocks.len() as u64 <= REGION0_BYTES / 4096);
    }
    Ok(())
}

/// Updates a machine, and looks whether it could be done again.
fn live_on(mut machine: Machine) -> Machine {
    let _frozen = freeze(&inodes(&machine));
    let states = states(machine.state_names(), 5000, 2);
    let epoch = machine.seal(states).unwrap();
    let incoming = Incoming::attach(offered(&machine), Vec::new()).unwrap();
    let mut machine = incoming.claim(epoch).unwrap().run().unwrap();
    machine.settle().unwrap();
    machine
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn is_refused_or_is_a_machine_for_good(
        changes in prop::collection::vec(damage(), 1..4),
        early: bool,
    ) {
        let mut owner = machine(&spec("damaged", &[4, 4], &["vcpu0", "vcpu1"]));
        let attach = |owner: &Machine| Incoming::attach(offered(owner), Vec::new());
        let before = early.then(|| attach(&owner).unwrap());
        let (epoch, _frozen) = seal(&mut owner, 5000, 1);
        let mut arena = owner.arena().clone();
        let tree = kho::Tree::read(&arena).unwrap();
        let marked = tree.blocks.range(..tree.frames).map(|(frame, _)| frame * 4096);
        let frames: Vec<u64> = [0].into_iter().chain(marked).collect();
        changes.iter().for_each(|change| apply(&mut arena, &frames, change));
        make_sums_right(&mut arena, &frames);

        let counted = Counted(arena, Arc::default());
        let read = read_all(&counted);
        let bytes = counted.1.load(Ordering::Relaxed);
        prop_assert!(bytes <= 2 * REGION0_BYTES, "{} bytes, {:?}", bytes, read);

        let incoming = match before {
            Some(incoming) => Ok(incoming),
            None => attach(&owner),
        };
        let claimed = incoming.map_err(drop).and_then(|incoming| incoming.claim(epoch).map_err(drop));
        if let Ok(claimed) = claimed {
            let mut machine = claimed.run().unwrap();
            machine.settle().unwrap();
            live_on(live_on(machine));
        }
    }
}
