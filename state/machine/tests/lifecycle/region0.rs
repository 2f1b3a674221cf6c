//! A region 0 of another size than this version makes.

use std::os::fd::AsFd;

use abi::Memory;
use abi::arena::Header;
use abi::arena::OwnershipState;
use abi::regions;
use pages::PageRange;
use region::Region;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::OfferedRegion;
use tideover_machine::SealError;
use zerocopy::IntoBytes;

use crate::claim;
use crate::rig::freeze;
use crate::rig::inodes;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;
use crate::seal;
use crate::used_bytes;

/// A machine that came with a region 0 of `mib` MiB, and runs here.
fn with_region0(mib: u64) -> Machine {
    let mut owner = machine(&spec("region0", &[4], &["vcpu0"]));
    let (epoch, _frozen) = seal(&mut owner, 100, 1);
    let region = Region::create("region0.metadata", mib << 20).unwrap();
    let copy = region.map().unwrap();
    let mut page = [0; 4096];
    for address in (0..(mib << 20).min(8 << 20)).step_by(4096) {
        owner.arena().read(address, &mut page).unwrap();
        copy.write(address, &page).unwrap();
    }
    copy.write(0, Header::new(owner.identity(), mib << 8).as_bytes()).unwrap();
    let table = kho::Root::read(owner.arena()).unwrap().fdt.subtree(&regions::SUBTREE).unwrap().data;
    let mut entries = regions::read(owner.arena(), table).unwrap().entries;
    entries[0].range = PageRange::of_bytes(0, mib << 20).unwrap();
    entries[0].file = copy.region().file_number().unwrap();
    copy.write(table, &regions::encode(&entries)).unwrap();
    let mut regions = offered(&owner);
    let fd = copy.region().as_fd().try_clone_to_owned().unwrap();
    regions[0] = OfferedRegion { fd, len_bytes: mib << 20 };
    let mut machine = Incoming::attach(regions, Vec::new()).unwrap().claim(epoch).unwrap().run().unwrap();
    machine.settle().unwrap();
    machine
}

fn large(machine: &Machine, pages: usize) -> Vec<(tideover_machine::StateName, Vec<u8>)> {
    machine.state_names().map(|name| (name, vec![7; pages * 4096])).collect()
}

#[test]
fn that_is_larger_has_room_for_larger_states() {
    let mut machine = with_region0(32);
    let used = used_bytes(&machine);
    let _frozen = freeze(&inodes(&machine));
    // Each is more than 8 MiB, and stands in the way of the next.
    for _ in 0..2 {
        let states = large(&machine, 2500);
        machine.seal(states).unwrap();
        assert!(used_bytes(&machine) > 8 << 20);
        machine.unseal().unwrap();
    }
    assert_eq!(used_bytes(&machine), used);
    let states = large(&machine, 8150);
    assert!(matches!(machine.seal(states), Err(SealError::NoRoom { .. })));
}

#[test]
fn that_is_smaller_is_not_taken_for_a_larger_one() {
    let mut machine = with_region0(1);
    let _frozen = freeze(&inodes(&machine));
    let states = large(&machine, 300);
    match machine.seal(states) {
        Err(SealError::NoRoom { wanted, free }) => assert!(free < 256 && free < wanted, "{wanted} {free}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(machine.ownership().unwrap().state(), OwnershipState::Running);
    claim(&mut machine, 1).run().unwrap();
}
