//! Regions that a kernel has made again: other files with the same bytes.

use std::os::fd::AsFd as _;

use abi::arena::OwnershipState;
use region::Region;
use tideover_machine::AttachError;
use tideover_machine::ClaimError;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::OfferedRegion;

use crate::rig;

/// What a kexec leaves of a machine: its regions' bytes, in files that are new.
fn made_again(machine: &Machine) -> Vec<OfferedRegion> {
    let copy = |OfferedRegion { fd, len_bytes }| {
        // By a mapping of its own: who reads a frozen hole by the machine's waits.
        let from = Region::accept("", fd, len_bytes).unwrap().map().unwrap();
        let to = Region::create("", len_bytes).unwrap().map().unwrap();
        let mut some = vec![0; 1 << 20];
        for offset in (0..len_bytes).step_by(some.len()) {
            from.read(offset, &mut some).unwrap();
            to.write(offset, &some).unwrap();
        }
        OfferedRegion { fd: to.region().as_fd().try_clone_to_owned().unwrap(), len_bytes }
    };
    rig::offered(machine).into_iter().map(copy).collect()
}

fn again(offered: &[OfferedRegion]) -> Vec<OfferedRegion> {
    let copy = |offered: &OfferedRegion| OfferedRegion {
        fd: offered.fd.try_clone().unwrap(),
        len_bytes: offered.len_bytes,
    };
    offered.iter().map(copy).collect()
}

/// A machine that was sealed, as the next kernel has it, and the seal's epoch.
fn sealed(name: &str) -> (Vec<OfferedRegion>, u32) {
    let mut machine = rig::machine(&rig::spec(name, &[2, 4], &["vcpu0", "devices"]));
    let freezes = rig::freeze(&rig::inodes(&machine));
    let states = rig::states(machine.state_names(), 5000, 1);
    let epoch = machine.seal(states).unwrap();
    drop(freezes);
    (made_again(&machine), epoch)
}

#[test]
fn a_machine_whose_regions_were_made_again_runs_and_is_handed_over_as_any_other() {
    let (offered, epoch) = sealed("again");
    let other_file = Incoming::attach(again(&offered), Vec::new());
    assert!(matches!(other_file, Err(AttachError::File { index: 0, .. })), "{other_file:?}");
    let incoming = Incoming::attach_made_again(offered).unwrap();
    let wanted = rig::states(incoming.state_names(), 5000, 1);
    let claimed = incoming.claim(epoch).unwrap();
    assert_eq!(claimed.states().clone().into_iter().collect::<Vec<_>>(), {
        let mut wanted = wanted;
        wanted.sort();
        wanted
    });
    let mut machine = claimed.run().unwrap();
    let used = machine.arena().regions().len();
    machine.settle().unwrap();
    rig::assert_filled(&rig::inodes(&machine));
    // The table tells of the new files now, as an ordinary successor asks.
    let freezes = rig::freeze(&rig::inodes(&machine));
    let epoch = machine.seal(rig::states(machine.state_names(), 100, 2)).unwrap();
    let mut next = Incoming::attach(rig::offered(&machine), Vec::new()).unwrap().claim(epoch).unwrap().run();
    drop(freezes);
    let next = next.as_mut().unwrap();
    next.settle().unwrap();
    assert_eq!(next.regions().count(), used);
}

#[test]
fn the_old_region_table_leaves_no_frame_behind() {
    let free = |machine: &Machine| kho::Kho::attach(Box::new(machine.arena().clone())).unwrap().free_frames();
    let (mut offered, mut epoch) = sealed("frames");
    let mut before = None;
    for life in 0..5 {
        let incoming = Incoming::attach_made_again(again(&offered)).unwrap();
        let mut machine = incoming.claim(epoch).unwrap().run().unwrap();
        machine.settle().unwrap();
        let freezes = rig::freeze(&rig::inodes(&machine));
        epoch = machine.seal(rig::states(machine.state_names(), 5000, life)).unwrap();
        drop(freezes);
        let now = free(&machine);
        assert_eq!(*before.get_or_insert(now), now, "in life {life}");
        offered = made_again(&machine);
    }
}

#[test]
fn a_claim_whose_claimant_died_is_made_again_by_the_next_one_alone() {
    let (offered, epoch) = sealed("dead");
    let attach = || Incoming::attach_made_again(again(&offered)).unwrap();
    let (second, third, late) = (attach(), attach(), attach());
    let claimed = attach().claim(epoch).unwrap();
    let word = second.ownership().unwrap();
    assert_eq!(word.state(), OwnershipState::Claimed);
    let refused = late.claim_again(word).unwrap_err();
    assert!(matches!(refused, ClaimError::ClaimantLives), "{refused:?}");
    drop(claimed);
    let refused = third.claim(epoch).unwrap_err();
    assert!(matches!(refused, ClaimError::Ownership(_)), "{refused:?}");
    let claimed = second.claim_again(word).unwrap();
    assert_eq!(claimed.states().len(), 2);
    let stale = attach().claim_again(word).unwrap_err();
    assert!(matches!(stale, ClaimError::Ownership(_)), "{stale:?}");
    let machine = claimed.run().unwrap();
    let running = machine.word();
    let refused = attach().claim_again(running).unwrap_err();
    assert!(matches!(refused, ClaimError::ClaimantLives), "{refused:?}");
    drop(machine);
    let refused = attach().claim_again(running).unwrap_err();
    assert!(matches!(refused, ClaimError::Ownership(_)), "a machine that ran is claimed: {refused:?}");
}
