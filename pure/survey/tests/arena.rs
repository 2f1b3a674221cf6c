//! What a VMM hands over, as the crates that write it leave it; and what can be wrong with that.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::collections::BTreeSet;

use abi::MemoryMut as _;
use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::RootSlot;
use abi::arena::SLOT_ADDRESSES;
use abi::radix;
use tideover_survey::Options;
use tideover_survey::Root;
use tideover_survey::Survey;

/// Region 0 of a machine with 16 MiB of guest memory, as it was taken from one that ran; a page and its address each.
const PAGES: &[u8] = include_bytes!("golden/arena.pages");

fn arena() -> Vec<u8> {
    let mut memory = vec![0; 8 << 20];
    for page in PAGES.chunks(8 + 4096) {
        let (address, bytes) = page.split_first_chunk::<8>().unwrap();
        memory.write(u64::from_le_bytes(*address), bytes).unwrap();
    }
    memory
}

fn survey(memory: &Vec<u8>) -> Survey {
    Survey::read(memory, &Root::Arena, Options::default())
}

fn broken(memory: &Vec<u8>) -> BTreeSet<&'static str> {
    survey(memory).findings.iter().map(|finding| finding.rule).collect()
}

#[test]
fn a_machine_breaks_no_rule_and_all_of_it_is_shown() {
    let survey = survey(&arena());
    assert_eq!(survey.findings, []);
    assert_eq!(survey.unreferenced.bytes, 0);
    let arena = survey.arena.unwrap();
    assert_eq!((arena.region0_bytes, arena.regions.len()), (Some(8 << 20), 2));
    assert_eq!((arena.regions[1].address, arena.regions[1].bytes), (1 << 30, 16 << 20));
    let kho = survey.kho.unwrap();
    assert!(kho.tree.preserved && kho.preserved_by_order.get(&12) == Some(&1), "{kho:#?}");
    let luo = survey.luo.unwrap();
    let handlers: Vec<&str> = luo.sessions[0].files.iter().map(|file| &*file.handler).collect();
    assert_eq!(handlers, ["tideover-vm-v1", "tideover-gmem-v1", "tideover-state-v1"]);
    assert!(luo.sessions[0].files.iter().all(|file| file.identity == arena.identity));
    assert_eq!(survey.stale.len(), 1, "the tree before");
}

#[test]
fn each_rule_of_an_arena_is_broken_by_one_that_breaks_no_other() {
    let good = arena();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut memory = good.clone();
        change(&mut memory);
        broken(&memory)
    };
    let only = |rule| BTreeSet::from([rule]);
    assert_eq!(with(&|memory| memory.write(12, &[0; 4]).unwrap()), only("arena-header"));
    assert_eq!(
        with(&|memory| SLOT_ADDRESSES.iter().for_each(|at| memory.write(*at, &[0; 32]).unwrap())),
        only("arena-root-slot")
    );
    assert_eq!(with(&|memory| memory.write(OWNERSHIP_ADDRESS, &[0; 8]).unwrap()), only("arena-ownership"));
    let table = abi::kho::RootFdt::read(&good, RootSlot::read(&good).unwrap().fdt()).unwrap();
    let table = table.subtree(&abi::regions::SUBTREE).unwrap().data;
    // The second region at 0, where the first is.
    let overlap = with(&|memory| {
        memory.write(table + 32 + 16 + 40, &[0; 8]).unwrap();
        repair(memory, table);
    });
    assert_eq!(overlap, only("regions"));
    // Frame 0, by its bit in the leaf of single pages.
    let (root, mut leaf) = (survey(&good).kho.unwrap().map_address.unwrap(), 0);
    radix::walk(&good, root, |found| {
        if let radix::Found::Node { level: 0, prefix, address } = found
            && prefix == 1 << 37
        {
            leaf = address;
        }
        Ok(())
    })
    .unwrap();
    let bits = good[usize::try_from(leaf).unwrap()];
    assert_eq!(with(&|memory| memory.write(leaf, &[bits | 1]).unwrap()), only("arena-blocks"));
    let found = survey(&good).luo.unwrap().sessions[0].files[0].data;
    let other = with(&|memory| {
        memory.write(found + 32, &[9; 16]).unwrap();
        repair(memory, found);
    });
    assert_eq!(other, only("machine-identity"));
}

/// Gives a record the checksum of what it says.
fn repair(memory: &mut [u8], record: u64) {
    let at = usize::try_from(record).unwrap();
    let len = usize::try_from(u64::from_le_bytes(memory[at + 16..at + 24].try_into().unwrap())).unwrap();
    memory[at + 24..at + 28].fill(0);
    let sum = abi::record::checksum(&[&memory[at..at + 32 + len]]);
    memory[at + 24..at + 28].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn a_state_in_a_region_that_is_too_short_is_told_of() {
    let mut memory = arena();
    memory.truncate(4 << 20);
    assert_eq!(broken(&memory), BTreeSet::from(["arena-header"]));
    memory.truncate(4096);
    assert!(broken(&memory).contains("address-in-range"));
    assert!(broken(&Vec::new()).contains("address-in-range"));
}
