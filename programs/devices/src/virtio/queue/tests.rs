use std::sync::Arc;

use proptest::prelude::*;
use region::Region;

use super::*;
use crate::memory::Slot;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const MEMORY_BYTES: u64 = 0x8000;

fn memory() -> GuestMemory {
    let mapping = Arc::new(Region::create("t", MEMORY_BYTES).unwrap().map().unwrap());
    let slot = Slot { guest_address: 0, mapping, offset_bytes: 0, len_bytes: MEMORY_BYTES };
    GuestMemory::new(vec![slot]).unwrap()
}

fn queue() -> Queue {
    Queue {
        size: 8,
        ready: true,
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
        ..Queue::new(16)
    }
}

/// Address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// Writes descriptors from the first on, and makes the chain at `head` available, `ahead` chains ahead.
fn offer(memory: &GuestMemory, table: &[Raw], head: u16, ahead: u16) {
    for (place, (address, len, flags, next)) in (DESCRIPTORS..).step_by(16).zip(table) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        memory.write(place, &bytes).unwrap();
    }
    memory.write(AVAILABLE + 4, &head.to_le_bytes()).unwrap();
    memory.write(AVAILABLE + 2, &ahead.to_le_bytes()).unwrap();
}

fn fault(table: &[Raw]) -> RingFault {
    let memory = memory();
    offer(&memory, table, 0, 1);
    queue().peek(&memory).unwrap_err()
}

#[test]
fn a_chain_is_read_in_the_order_of_its_links() {
    let memory = memory();
    assert_eq!(queue().peek(&memory).unwrap(), None);
    let table = [(0x5000, 3, WRITE, 9), (0x4000, 2, NEXT, 3), (0, 0, 0, 0), (0x4800, 1, NEXT, 0)];
    offer(&memory, &table, 1, 1);
    let chain = queue().peek(&memory).unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.len_bytes(), chain.writable.len_bytes()), (1, 3, 3));
    memory.write(0x4000, &[1, 2]).unwrap();
    memory.write(0x4800, &[3]).unwrap();
    let mut read = [0; 2];
    chain.readable.read(&memory, 1, &mut read).unwrap();
    assert_eq!(read, [2, 3], "over the border of two buffers");
    chain.writable.write(&memory, 1, &[8, 9]).unwrap();
    memory.read(0x5001, &mut read).unwrap();
    assert_eq!(read, [8, 9]);
    assert!(chain.readable.read(&memory, 2, &mut read).is_err(), "over the end");
    assert!(chain.writable.write(&memory, 0, &[0; 4]).is_err());
}

#[test]
fn an_answer_moves_both_rings_and_says_whether_an_interrupt_is_wanted() {
    let memory = memory();
    let mut queue = queue();
    queue.next = u16::MAX;
    memory.write(USED + 2, &u16::MAX.to_le_bytes()).unwrap();
    // Number 65535 is the last entry of eight.
    offer(&memory, &[(0x5000, 3, WRITE, 0), (0x5000, 3, WRITE, 0)], 0, 0);
    memory.write(AVAILABLE + 4 + 14, &1_u16.to_le_bytes()).unwrap();
    let chain = queue.peek(&memory).unwrap().unwrap();
    assert_eq!(chain.head, 1);
    assert_eq!(queue.peek(&memory).unwrap().unwrap(), chain, "as long as it is not answered");
    assert!(queue.answer(&memory, &chain, 3).unwrap());
    let mut entry = [0; 8];
    memory.read(USED + 4 + 56, &mut entry).unwrap();
    assert_eq!(entry, [1, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!((queue.next, memory.load_u16(USED + 2)), (0, Ok(0)));
    assert_eq!(queue.peek(&memory).unwrap(), None);
    memory.write(AVAILABLE, &NO_INTERRUPT.to_le_bytes()).unwrap();
    assert!(!queue.answer(&memory, &chain, 3).unwrap());
}

#[test]
fn each_broken_chain_is_named() {
    assert_eq!(fault(&[(0, 1, NEXT, 8)]), RingFault::NoDescriptor { index: 8, size: 8 });
    assert_eq!(fault(&[(0, 1, NEXT, 1), (0, 1, NEXT, 0)]), RingFault::Endless { head: 0 });
    assert_eq!(fault(&[(0, 16, 4, 0)]), RingFault::Flags { index: 0, flags: 4 });
    assert_eq!(fault(&[(0, 0, 0, 0)]), RingFault::Empty { index: 0 });
    assert_eq!(fault(&[(0, 1, NEXT | WRITE, 1), (0, 1, 0, 0)]), RingFault::Order { index: 1 });
    for (address, len) in [(MEMORY_BYTES, 1), (MEMORY_BYTES - 1, 2), (u64::MAX, 2), (0, u32::MAX)] {
        let outside = fault(&[(address, len, 0, 0)]);
        assert!(matches!(outside, RingFault::Outside { part: "buffer", .. }), "{outside:?}");
    }
    let memory = memory();
    offer(&memory, &[], 0, 9);
    assert_eq!(queue().peek(&memory).unwrap_err(), RingFault::Index { waiting: 9, size: 8 });
    offer(&memory, &[], 8, 1);
    assert_eq!(queue().peek(&memory).unwrap_err(), RingFault::NoDescriptor { index: 8, size: 8 });
}

#[test]
fn a_chain_may_use_every_descriptor() {
    let memory = memory();
    let table: Vec<Raw> = (1..=8).map(|next| (0x4000, 16, if next < 8 { NEXT } else { 0 }, next)).collect();
    offer(&memory, &table, 0, 1);
    assert_eq!(queue().peek(&memory).unwrap().unwrap().readable.len_bytes(), 128);
}

#[test]
fn a_queue_that_is_not_in_guest_memory_is_refused() {
    let memory = memory();
    assert_eq!(queue().check(&memory), Ok(()));
    let check = |change: fn(&mut Queue)| {
        let mut queue = queue();
        change(&mut queue);
        queue.check(&memory).unwrap_err()
    };
    for size in [0, 3, 32, u16::MAX] {
        let mut queue = queue();
        queue.size = size;
        assert_eq!(queue.check(&memory), Err(RingFault::Size { size, most: 16 }));
    }
    let part = |fault| match fault {
        RingFault::Unaligned { part, .. } => ("unaligned", part),
        RingFault::Outside { part, .. } => ("outside", part),
        other => panic!("{other:?}"),
    };
    assert_eq!(part(check(|queue| queue.descriptors += 8)), ("unaligned", "descriptor table"));
    assert_eq!(part(check(|queue| queue.available += 1)), ("unaligned", "available ring"));
    assert_eq!(part(check(|queue| queue.used += 2)), ("unaligned", "used ring"));
    assert_eq!(part(check(|queue| queue.descriptors = MEMORY_BYTES - 112)), ("outside", "descriptor table"));
    assert_eq!(part(check(|queue| queue.available = MEMORY_BYTES - 20)), ("outside", "available ring"));
    assert_eq!(part(check(|queue| queue.used = u64::MAX - 3)), ("outside", "used ring"));
}

proptest! {
    #[test]
    fn whatever_stands_in_the_ring_a_chain_lies_in_memory_and_ends(
        table in proptest::collection::vec(
            (0..MEMORY_BYTES + 64, 0u32..200, 0u16..8, 0u16..10), 8,
        ),
        head in 0u16..10,
        ahead in 0u16..12,
    ) {
        let memory = memory();
        offer(&memory, &table, head, ahead);
        if let Ok(Some(chain)) = queue().peek(&memory) {
            let pieces = chain.readable.0.iter().chain(&chain.writable.0);
            prop_assert!(pieces.clone().count() <= 8);
            for piece in pieces {
                prop_assert!(piece.address + u64::from(piece.len_bytes) <= MEMORY_BYTES);
                prop_assert!(piece.len_bytes > 0);
            }
        }
    }
}
