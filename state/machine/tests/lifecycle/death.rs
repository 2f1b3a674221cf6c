//! A process dies, as far as the machine can tell: all that it held is closed.

use abi::arena::OwnershipState;
use tideover_machine::ClaimError;
use tideover_machine::Incoming;

use crate::assert_states;
use crate::attach;
use crate::claim;
use crate::rig::assert_filled;
use crate::rig::inodes;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;
use crate::seal;

#[test]
fn before_the_seal_leaves_the_memory_and_a_dead_owner() {
    let owner = machine(&spec("dies-running", &[4], &["vcpu0"]));
    let regions = offered(&owner);
    let incoming = attach(&owner);
    let word = incoming.ownership().unwrap();
    assert!(incoming.owner_lives(word).unwrap());
    drop(owner);
    assert_eq!(incoming.ownership().unwrap(), word);
    assert!(!incoming.owner_lives(word).unwrap());

    let found = Incoming::attach(regions, Vec::new()).unwrap();
    assert_eq!(found.ownership().unwrap(), word);
    assert!(!found.owner_lives(word).unwrap());
    assert_filled(found.memories());
    assert!(matches!(found.claim(word.epoch()), Err(ClaimError::Ownership(_))));
}

#[test]
fn before_the_seal_leaves_a_machine_to_be_recovered_without_a_state() {
    let mut owner = machine(&spec("dies-running", &[4, 8], &["vcpu0"]));
    let regions = offered(&owner);
    // What an update that was given up has left is not to be taken for the guest's state.
    drop(seal(&mut owner, 6000, 4));
    owner.unseal().unwrap();
    let word = owner.ownership().unwrap();
    assert!(matches!(attach(&owner).recover(word), Err(ClaimError::ClaimantLives)));
    drop(owner);

    let found = Incoming::attach(regions, Vec::new()).unwrap();
    let recovered = found.recover(word).unwrap();
    assert!(recovered.states().is_empty());
    let mut successor = recovered.run().unwrap();
    successor.settle().unwrap();
    assert_filled(&inodes(&successor));
    claim(&mut successor, 3).run().unwrap();
}

#[test]
fn of_a_recoverer_leaves_the_machine_to_the_next_one() {
    let owner = machine(&spec("dies-recovered", &[4], &["vcpu0"]));
    let (regions, again) = (offered(&owner), offered(&owner));
    let word = owner.ownership().unwrap();
    drop(owner);
    drop(Incoming::attach(regions, Vec::new()).unwrap().recover(word).unwrap());

    let found = Incoming::attach(again, Vec::new()).unwrap();
    let dead = found.ownership().unwrap();
    assert_eq!(dead.state(), OwnershipState::Recovering);
    let mut next = found.recover(dead).unwrap().run().unwrap();
    next.settle().unwrap();
    assert_filled(&inodes(&next));
}

/// Else the state of an instant that is long past would be given to the memory of a later one.
#[test]
fn of_a_recoverer_is_never_taken_for_that_of_a_claimant() {
    let mut owner = machine(&spec("dies-recovered", &[4], &["vcpu0"]));
    let mut next = claim(&mut owner, 1).run().unwrap();
    next.settle().unwrap();
    let (regions, again) = (offered(&next), offered(&next));
    let word = next.ownership().unwrap();
    drop((owner, next));
    drop(Incoming::attach(regions, Vec::new()).unwrap().recover(word).unwrap());
    let found = Incoming::attach(again, Vec::new()).unwrap();
    let dead = found.ownership().unwrap();
    assert!(matches!(found.claim_again(dead), Err(ClaimError::Ownership(_))));
}

#[test]
fn after_the_seal_leaves_nothing_to_be_recovered() {
    let mut owner = machine(&spec("dies-sealed", &[4], &["vcpu0"]));
    let regions = offered(&owner);
    let (_, frozen) = seal(&mut owner, 6000, 4);
    drop((owner, frozen));
    let found = Incoming::attach(regions, Vec::new()).unwrap();
    let word = found.ownership().unwrap();
    assert!(matches!(found.recover(word), Err(ClaimError::Ownership(_))));
}

#[test]
fn after_the_seal_leaves_a_machine_to_be_claimed() {
    let mut owner = machine(&spec("dies-sealed", &[4, 8], &["vcpu0", "serial"]));
    let regions = offered(&owner);
    let names: Vec<_> = owner.state_names().collect();
    let (_, frozen) = seal(&mut owner, 6000, 4);
    drop((owner, frozen));
    let found = Incoming::attach(regions, Vec::new()).unwrap();
    let word = found.ownership().unwrap();
    assert_eq!(word.state(), OwnershipState::Sealed);
    assert!(!found.owner_lives(word).unwrap());
    let claimed = found.claim(word.epoch()).unwrap();
    assert_states(&claimed, &names, 6000, 4);
    let mut successor = claimed.run().unwrap();
    successor.settle().unwrap();
    assert_filled(&inodes(&successor));
}

#[test]
fn of_a_claimant_lets_the_predecessor_go_on() {
    let mut predecessor = machine(&spec("claimant-dies", &[4], &["vcpu0"]));
    let claimed = claim(&mut predecessor, 1);
    let word = predecessor.ownership().unwrap();
    let watcher = attach(&predecessor);
    assert!(watcher.owner_lives(word).unwrap());
    drop(claimed);
    assert!(!watcher.owner_lives(word).unwrap());
    predecessor.unseal().unwrap();
    claim(&mut predecessor, 2).run().unwrap();
}

#[test]
fn before_settling_leaves_the_session_as_it_was_received() {
    let mut predecessor = machine(&spec("dies-unsettled", &[4], &["vcpu0"]));
    let regions = offered(&predecessor);
    let successor = claim(&mut predecessor, 1).run().unwrap();
    let word = successor.ownership().unwrap();
    drop((predecessor, successor));
    let found = Incoming::attach(regions, Vec::new()).unwrap();
    assert_eq!(found.ownership().unwrap(), word);
    assert!(!found.owner_lives(word).unwrap());
    assert_filled(found.memories());
}
