//! Bytes of region 0 that are not what was written: an error, or the machine as it was.

use std::sync::Arc;

use abi::Memory;
use abi::MemoryMut;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::gmem::GmemRecord;
use abi::kho::Subtree;
use abi::luo::FileSer;
use abi::regions::RegionEntry;
use abi::state::StateRecord;
use abi::vm::VmRecord;
use abi::vmalloc::Descriptor;
use pages::PageRange;
use proptest::prelude::*;
use region::Arena;
use tideover_machine::AttachError;
use tideover_machine::ClaimError;
use tideover_machine::Claimed;
use tideover_machine::Identity;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::OfferedRegion;
use zerocopy::IntoBytes;

use crate::assert_states;
use crate::name;
use crate::rig::assert_filled;
use crate::rig::inodes;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;
use crate::seal;

const STATES: [&str; 3] = ["vcpu0", "vcpu1", "serial"];

/// A sealed machine whose owner is gone.
struct Orphan {
    regions: Vec<OfferedRegion>,
    arena: Arena,
    identity: Identity,
    epoch: u32,
    /// Addresses of the frames of region 0 that are in use, the header's first.
    frames: Vec<u64>,
}

fn orphan() -> Orphan {
    let mut owner = machine(&spec("corrupted", &[4, 4], &STATES));
    let (epoch, _frozen) = seal(&mut owner, 5000, 1);
    let arena = owner.arena().clone();
    let tree = kho::Tree::read(&arena).unwrap();
    let marked = tree.blocks.keys().take_while(|frame| **frame < tree.frames).map(|frame| frame * 4096);
    let frames = [0].into_iter().chain(marked).collect();
    Orphan { regions: offered(&owner), arena, identity: owner.identity(), epoch, frames }
}

/// Takes the machine over. Gives the error's debug text if that is refused; panics if another machine comes of it.
fn take_over(orphan: Orphan) -> Result<Machine, String> {
    fn text(error: impl std::fmt::Debug) -> String {
        format!("{error:?}")
    }
    let claimed =
        Incoming::attach(orphan.regions, Vec::new()).map_err(text)?.claim(orphan.epoch).map_err(text)?;
    assert_same(&claimed, orphan.identity);
    let mut machine = claimed.run().map_err(text)?;
    machine.settle().map_err(text)?;
    assert_filled(&inodes(&machine));
    // What is published now is whole: nothing of the damage was taken over.
    let found = Incoming::attach(offered(&machine), Vec::new()).unwrap();
    assert_eq!(found.state_names().count(), STATES.len());
    assert_filled(found.memories());
    Ok(machine)
}

/// The machine's name is not looked at: it stands in the kernel's format, which has no sum over it.
fn assert_same(claimed: &Claimed, identity: Identity) {
    assert_states(claimed, &STATES.map(name), 5000, 1);
    let memories: Vec<_> = claimed.memories().iter().map(|memory| Arc::clone(&memory.inode)).collect();
    assert_eq!(memories.len(), 2);
    assert!(memories.iter().all(|memory| memory.identity() == identity));
    assert_filled(&memories);
}

fn change(arena: &mut Arena, address: u64, mask: u8) {
    let mut byte = [0];
    arena.read(address, &mut byte).unwrap();
    arena.write(address, &[byte[0] ^ mask]).unwrap();
}

#[test]
fn nothing_changed_is_the_same_machine() {
    let machine = take_over(orphan()).unwrap();
    assert_eq!(machine.vcpus(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_byte_is_an_error_or_the_same_machine(frame: prop::sample::Index, offset in 0u64..4096, mask in 1u8..) {
        let mut orphan = orphan();
        let frame = *frame.get(&orphan.frames);
        change(&mut orphan.arena, frame + offset, mask);
        let _ = take_over(orphan);
    }

    /// Most of a frame is zeroes that nobody reads: these are the bytes that mean something.
    #[test]
    fn one_byte_that_is_not_zero_is_an_error_or_the_same_machine(place: prop::sample::Index, mask in 1u8..) {
        let mut orphan = orphan();
        let mut places = Vec::new();
        for frame in &orphan.frames {
            let mut page = [0; 4096];
            orphan.arena.read(*frame, &mut page).unwrap();
            places.extend((*frame..).zip(page).filter(|(_, byte)| *byte != 0).map(|(address, _)| address));
        }
        change(&mut orphan.arena, *place.get(&places), mask);
        let _ = take_over(orphan);
    }

    #[test]
    fn many_bytes_are_an_error_or_the_same_machine(
        changes in prop::collection::vec((any::<prop::sample::Index>(), 0u64..4096, 1u8..), 2..50),
    ) {
        let mut orphan = orphan();
        for (frame, offset, mask) in changes {
            let frame = *frame.get(&orphan.frames);
            change(&mut orphan.arena, frame + offset, mask);
        }
        let _ = take_over(orphan);
    }
}

#[test]
fn a_header_and_the_ownership_word_are_checked_bit_by_bit() {
    for bit in (0..64 * 8).chain(OWNERSHIP_ADDRESS * 8 + 24..OWNERSHIP_ADDRESS * 8 + 64) {
        let mut orphan = orphan();
        change(&mut orphan.arena, bit / 8, 1 << (bit % 8));
        assert!(take_over(orphan).is_err(), "bit {bit}");
    }
}

/// Addresses of the entries of the machine's files, by token.
fn entries(orphan: &Orphan) -> Vec<(u64, FileSer)> {
    let subtree = abi::kho::SubtreeName::literal(abi::luo::SUBTREE);
    let tree = kho::Tree::read(&orphan.arena).unwrap();
    let subtree = tree.fdt.subtree(&subtree).unwrap();
    let luo = abi::luo::Luo::read(&orphan.arena, subtree.data, subtree.size).unwrap();
    let files: Vec<FileSer> = luo.sessions[0].files.iter().map(abi::luo::File::entry).collect();
    let place = |file: &FileSer| {
        let starts = luo.pages.iter().flat_map(|page| (*page..page + 4096 - 64).step_by(8));
        let is_here = |address: &u64| {
            let mut bytes = [0; 64];
            orphan.arena.read(*address, &mut bytes).unwrap();
            bytes == file.as_bytes()
        };
        starts.into_iter().find(is_here).unwrap()
    };
    files.iter().map(|file| (place(file), *file)).collect()
}

/// Changes one entry of the list of files, and gives what attaching says.
fn with_entry(token: u64, change: impl Fn(&mut FileSer, &dyn Fn(u64) -> FileSer)) -> AttachError {
    let mut orphan = orphan();
    let entries = entries(&orphan);
    let of = |token: u64| entries.iter().find(|(_, file)| file.token.get() == token).unwrap();
    let (address, mut file) = *of(token);
    change(&mut file, &|token| of(token).1);
    orphan.arena.write(address, file.as_bytes()).unwrap();
    Incoming::attach(orphan.regions, Vec::new()).unwrap_err()
}

const VM: u64 = 1;
const RAM: u64 = 0x100;
const STATE: u64 = 0x1000;

#[test]
fn a_file_under_a_token_that_no_machine_has_is_refused() {
    for token in [RAM, RAM + 1, STATE, STATE + 2] {
        let error = with_entry(token, |file, _| file.token = 0.into());
        assert!(matches!(error, AttachError::Kind { token, .. } if token.0 == 0), "{error:?}");
    }
}

#[test]
fn a_file_of_another_kind_than_its_token_says_is_refused() {
    let error = with_entry(RAM, |file, _| file.token = (STATE + 9).into());
    assert!(matches!(error, AttachError::Kind { .. }), "{error:?}");
    let error = with_entry(STATE, |file, _| file.token = (RAM + 9).into());
    assert!(matches!(error, AttachError::Kind { .. }), "{error:?}");
    let error = with_entry(VM, |file, _| file.token = (STATE + 9).into());
    assert!(matches!(error, AttachError::Kind { .. }), "{error:?}");
}

/// P6.5.4.
#[test]
fn a_state_or_a_memory_that_two_records_name_is_refused() {
    for (one, other) in [(STATE, STATE + 1), (RAM, RAM + 1)] {
        let mut orphan = orphan();
        let entries = entries(&orphan);
        let of = |token: u64| *entries.iter().find(|(_, file)| file.token.get() == token).unwrap();
        let mut record = [0; 4096];
        orphan.arena.read(of(one).1.data.get(), &mut record).unwrap();
        let mut kho = kho::Kho::attach(Box::new(orphan.arena.clone())).unwrap();
        if one == STATE {
            // With bytes of its own: none.
            let place = |record| StateRecord::read(record, 4096).unwrap();
            let read = place(&[vec![0; 4096], record.to_vec()].concat());
            let empty = StateRecord { len_bytes: 0, list: Descriptor::default(), checksum: 0, ..read };
            record[..empty.encode().len()].copy_from_slice(&empty.encode());
        }
        let copy = kho.store(&record).unwrap().start().address();
        kho.commit().unwrap();
        let (address, mut file) = of(other);
        file.data = copy.into();
        orphan.arena.write(address, file.as_bytes()).unwrap();
        let error = Incoming::attach(orphan.regions, Vec::new()).unwrap_err();
        assert!(matches!(error, AttachError::Repeated { token, .. } if token.0 == other), "{error:?}");
    }
}

/// What retrieving a file met.
#[track_caller]
fn malformed(error: &AttachError) -> &abi::Malformed {
    let mut source = std::error::Error::source(error);
    while let Some(found) = source {
        match found.downcast_ref() {
            Some(malformed) => return malformed,
            None => source = found.source(),
        }
    }
    panic!("{error:?}");
}

/// P6.5.4.
#[test]
fn a_record_that_two_tokens_name_is_refused() {
    for (one, other) in [(STATE, STATE + 1), (RAM, RAM + 1)] {
        let error = with_entry(other, |file, of| file.data = of(one).data);
        assert_eq!(malformed(&error).field, "frames", "{error:?}");
    }
}

#[test]
fn a_record_of_another_kind_than_its_entry_says_is_refused() {
    for (one, other) in [(STATE, RAM), (RAM, STATE), (VM, RAM), (RAM, VM), (STATE, VM)] {
        let error = with_entry(one, |file, of| file.data = of(other).data);
        assert!(matches!(error, AttachError::Retrieve(_)), "{error:?}");
    }
}

/// O0.2, H3.9.2.
#[test]
fn the_record_of_another_machine_is_refused() {
    let theirs = Identity::new([0xa5; 16]);
    for token in [VM, RAM, RAM + 1, STATE, STATE + 2] {
        let mut orphan = orphan();
        let entries = entries(&orphan);
        let data = entries.iter().find(|(_, file)| file.token.get() == token).unwrap().1.data.get();
        let arena = &orphan.arena;
        // Its sums are right.
        let record = match token {
            VM => VmRecord { identity: theirs, ..VmRecord::read(arena, data).unwrap() }.encode(),
            RAM..STATE => GmemRecord { identity: theirs, ..GmemRecord::read(arena, data).unwrap() }.encode(),
            _ => StateRecord { identity: theirs, ..StateRecord::read(arena, data).unwrap() }.encode(),
        };
        orphan.arena.write(data, &record).unwrap();
        let error = Incoming::attach(orphan.regions, Vec::new()).unwrap_err();
        let refused = matches!(&error, AttachError::Retrieve(luo::RetrieveError::Handler { token: of, .. }) if of.0 == token);
        assert!(refused && format!("{error:?}").contains("Identity"), "{error:?}");
    }
}

/// R1.9, P6.5.3.
#[test]
fn a_session_without_the_machines_own_record_is_no_machine() {
    let mut orphan = orphan();
    let entries = entries(&orphan);
    let (first, last) = (entries[0], entries[entries.len() - 1]);
    assert_eq!(first.1.token.get(), VM);
    // The last entry takes its place, and both counts are right.
    let count = (entries.len() as u64 - 1).to_le_bytes();
    orphan.arena.write(first.0, last.1.as_bytes()).unwrap();
    orphan.arena.write(first.0 / 4096 * 4096 + 8, &count).unwrap();
    let is_session = |frame: &&u64| {
        let mut name = [0; 10];
        orphan.arena.read(**frame + 16, &mut name).unwrap();
        name == *b"corrupted\0"
    };
    let session = *orphan.frames.iter().find(is_session).unwrap();
    orphan.arena.write(session + 16 + 72, &count).unwrap();
    let error = Incoming::attach(orphan.regions, Vec::new()).unwrap_err();
    let missing =
        |error: &_| matches!(error, luo::RetrieveError::UnknownToken { token, .. } if token.0 == VM);
    assert!(matches!(&error, AttachError::Retrieve(error) if missing(error)), "{error:?}");
}

/// Changes the published tree, and gives what attaching says.
fn with_tree(change: impl FnOnce(&mut kho::Kho)) -> AttachError {
    let orphan = orphan();
    let mut kho = kho::Kho::attach(Box::new(orphan.arena)).unwrap();
    change(&mut kho);
    kho.commit().unwrap();
    Incoming::attach(orphan.regions, Vec::new()).unwrap_err()
}

#[test]
fn a_region_table_whose_frame_is_not_preserved_is_refused() {
    let error = with_tree(|kho| {
        let table = kho.subtree(&abi::regions::SUBTREE).unwrap().data;
        kho.free(PageRange::of_bytes(table, 4096).unwrap());
    });
    assert!(matches!(&error, AttachError::Malformed(malformed) if malformed.field == "frames"), "{error:?}");
}

#[test]
fn guest_memory_that_is_not_preserved_is_refused() {
    let error = with_tree(|kho| kho.unpreserve(PageRange::of_bytes(1 << 30, 4 << 20).unwrap()).unwrap());
    assert!(matches!(error, AttachError::Retrieve(_)), "{error:?}");
}

/// H3.5.4.
#[test]
fn a_kind_that_nobody_knows_is_named() {
    let error = with_entry(STATE, |file, _| file.compatible[0] ^= 1);
    match error {
        AttachError::Luo(luo::AttachError::UnknownHandler { token, .. }) => assert_eq!(token.0, STATE),
        other => panic!("{other:?}"),
    }
}

/// Publishes the region table anew, changed, after attaching and before the claim.
fn claim_with_table(change: impl FnOnce(&mut Vec<RegionEntry>)) -> ClaimError {
    let mut owner = machine(&spec("table", &[4, 4], &STATES));
    let incoming = Incoming::attach(offered(&owner), Vec::new()).unwrap();
    let (epoch, _frozen) = seal(&mut owner, 5000, 1);
    let mut kho = kho::Kho::attach(Box::new(owner.arena().clone())).unwrap();
    let published = kho.subtree(&abi::regions::SUBTREE).unwrap().data;
    let mut table = abi::regions::read(owner.arena(), published).unwrap().entries;
    change(&mut table);
    let bytes = abi::regions::encode(&table);
    let data = kho.store(&bytes).unwrap().start().address();
    kho.set_subtree(Subtree { name: abi::regions::SUBTREE, data, size: bytes.len() as u64 });
    kho.commit().unwrap();
    incoming.claim(epoch).unwrap_err()
}

#[test]
fn a_region_table_that_changed_since_the_attach_is_refused_by_the_claim() {
    let changes: [fn(&mut Vec<RegionEntry>); 5] = [
        |table| table[1].file += 1,
        |table| table[2].page_bytes = 2 << 20,
        |table| table[2].range = PageRange::of_bytes(3 << 30, 4 << 20).unwrap(),
        |table| table.truncate(2),
        |table| {
            let (one, other) = (table[1].file, table[2].file);
            (table[1].file, table[2].file) = (other, one);
        },
    ];
    for change in changes {
        assert!(matches!(claim_with_table(change), ClaimError::Regions));
    }
}
