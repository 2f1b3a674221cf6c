//! States that are loaded, and states that are not.

use std::sync::Arc;

use proptest::prelude::*;

use devices::Device;
use devices::StateError;

use crate::driver::Request;
use crate::driver::Rig;
use crate::driver::device;
use crate::store::Store;

/// Head of a record; the payload follows.
const HEAD: usize = 32;
/// In the payload: registers, one queue, the disk.
const DRIVER_FEATURES: usize = 0;
const STATUS: usize = 20;
const INTERRUPT_STATUS: usize = 24;
const QUEUES: usize = 28;
const DESCRIPTORS: usize = 32;
const SIZE: usize = 56;
const NEXT: usize = 58;
const READY: usize = 60;
const CAPACITY: usize = 64;
const READ_ONLY: usize = 72;
const ID: usize = 76;
const LEN: usize = 96;

fn state() -> (Rig, Vec<u8>) {
    let mut rig = Rig::ready(Store::new(8));
    rig.ask(&Request::Flush);
    rig.blk.pause();
    let state = rig.blk.save().unwrap();
    assert_eq!(state.len(), HEAD + LEN);
    (rig, state)
}

/// The same payload, changed, with a head that fits.
fn changed(state: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let format = abi::record::Format {
        compatible: "tideover-virtio-blk-v1",
        kind: *b"DBLK",
        version: 1,
        oldest: 1,
        max_payload_bytes: 4096,
    };
    let mut payload = state[HEAD..].to_vec();
    change(&mut payload);
    format.encode(&payload)
}

fn refused(place: usize, value: u64, bytes: usize) -> String {
    let (rig, state) = state();
    let state = changed(&state, |payload| {
        payload[place..place + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
    });
    let (blk, _line) = device(&rig.store, &rig.memory);
    let before = blk.save().unwrap();
    let error = blk.load(&state).unwrap_err();
    assert_eq!(blk.save().unwrap(), before, "nothing has changed");
    match error {
        StateError::Field { field, .. } => field.to_owned(),
        StateError::Queue { source, .. } => source.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_field_that_cannot_be_is_named() {
    assert_eq!(refused(DRIVER_FEATURES, 1 << 32 | 1 << 28, 8), "driver_features");
    assert_eq!(refused(DRIVER_FEATURES, 0, 8), "driver_features");
    assert_eq!(refused(STATUS, 0x1f, 4), "status");
    assert_eq!(refused(STATUS, 0x100, 4), "status");
    assert_eq!(refused(STATUS, 7, 4), "status");
    assert_eq!(refused(INTERRUPT_STATUS, 4, 4), "interrupt_status");
    assert_eq!(refused(QUEUES, 2, 4), "queues");
    assert_eq!(refused(QUEUES, u64::from(u32::MAX), 4), "queues");
    assert_eq!(refused(READY, 2, 4), "ready");
    assert_eq!(refused(READY, 0, 4), "next");
    assert_eq!(refused(CAPACITY, 9, 8), "capacity_sectors");
    assert_eq!(refused(READ_ONLY, 1, 4), "read_only");
    assert_eq!(refused(ID, 7, 1), "id");
    assert_eq!(refused(SIZE, 12, 2), "the queue has 12 entries, not a power of two up to 128");
    assert_eq!(refused(DESCRIPTORS, 0x1008, 8), "the descriptor table at 0x1008 is not aligned");
    for place in [DESCRIPTORS, DESCRIPTORS + 8, DESCRIPTORS + 16] {
        for address in [1_u64 << 20, 1 << 40, u64::MAX - 15] {
            assert!(refused(place, address, 8).contains("outside of guest memory"));
        }
    }
}

#[test]
fn any_place_in_the_ring_is_one_that_a_queue_may_be_at() {
    let (rig, state) = state();
    let (blk, _line) = device(&rig.store, &rig.memory);
    blk.load(&changed(&state, |payload| payload[NEXT..NEXT + 2].fill(0xff))).unwrap();
}

#[test]
fn a_working_disk_is_neither_saved_nor_loaded() {
    let (rig, state) = state();
    rig.blk.resume().unwrap();
    assert!(matches!(rig.blk.save(), Err(StateError::NotPaused { .. })));
    assert!(matches!(rig.blk.load(&state), Err(StateError::NotPaused { .. })));
}

#[test]
fn a_state_of_another_length_version_or_kind_is_refused() {
    let (rig, state) = state();
    let (blk, _line) = device(&rig.store, &rig.memory);
    let longer = changed(&state, |payload| payload.push(0));
    assert!(matches!(blk.load(&longer), Err(StateError::Length { field: "disk", .. })));
    let shorter = changed(&state, |payload| payload.truncate(LEN - 1));
    assert!(matches!(blk.load(&shorter), Err(StateError::Length { field: "disk", .. })));
    let mut trailing = state.clone();
    trailing.push(0);
    assert!(matches!(blk.load(&trailing), Err(StateError::Length { field: "payload", .. })));
    let field = |state: &[u8]| match blk.load(state) {
        Err(StateError::Record { source, .. }) => source.field,
        other => panic!("{other:?}"),
    };
    let mut other = state.clone();
    other[12] = 2;
    assert_eq!(field(&other), "version");
    other[8] = b'X';
    assert_eq!(field(&other), "kind");
    assert_eq!(field(&[]), "address");
    for place in HEAD..state.len() {
        let mut flipped = state.clone();
        flipped[place] ^= 1;
        assert_eq!(field(&flipped), "checksum");
    }
}

proptest! {
    #[test]
    fn whatever_is_loaded_is_saved_as_it_was_and_does_no_harm(
        changes in proptest::collection::vec((0..LEN, any::<u8>()), 0..6),
    ) {
        let (mut rig, state) = state();
        let state = changed(&state, |payload| {
            changes.iter().for_each(|(place, value)| payload[*place] = *value);
        });
        let (blk, line) = device(&rig.store, &rig.memory);
        if blk.load(&state).is_ok() {
            prop_assert_eq!(blk.save().unwrap(), state);
            (rig.blk, rig.line) = (blk, line);
            rig.blk.resume().unwrap();
            rig.make(&Request::Flush);
            rig.notify();
            rig.blk.pause();
        }
        drop(Arc::clone(&rig.store));
    }
}
