//! Memory ends with its machine, in each process that had it.

use std::sync::Arc;

use gmem::End;

use crate::claim;
use crate::held;
use crate::rig::assert_filled;
use crate::rig::inodes;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;
use crate::seal;
use tideover_machine::Incoming;

/// R3.2, R3.5.
#[test]
fn a_machine_that_ends_takes_its_memory_from_whoever_knows_it() {
    const NAME: &str = "ends";
    let machine = machine(&spec(NAME, &[4, 8], &["vcpu0"]));
    let inodes = inodes(&machine);
    let mappings: Vec<_> = inodes.iter().map(|inode| Arc::clone(inode.mapping())).collect();
    assert!(inodes.iter().all(|inode| inode.own().is_none()), "the machine is their owner");
    drop(machine);
    assert_eq!(held(NAME), (0, 0));
    assert!(inodes.iter().all(|inode| inode.has_ended()));
    assert!(mappings.iter().all(|mapping| mapping.load(0).unwrap() == 0));
}

/// R3.2, R3.3.
#[test]
fn a_predecessor_that_ends_leaves_the_successor_its_memory() {
    const NAME: &str = "leaves";
    let mut predecessor = machine(&spec(NAME, &[4, 8], &["vcpu0"]));
    let before = held(NAME);
    let mut successor = claim(&mut predecessor, 1).run().unwrap();
    let old = inodes(&predecessor);
    drop(predecessor);
    assert_eq!(held(NAME), before, "only the successor's");
    old.iter().for_each(|inode| inode.mapping().store(0, 7).unwrap());
    assert_filled(&inodes(&successor));
    successor.settle().unwrap();
    assert_filled(&inodes(&claim(&mut successor, 2).run().unwrap()));
}

/// R3.2, R3.9.
#[test]
fn a_machine_that_nobody_claims_is_freed_with_the_last_who_was_offered_it() {
    const NAME: &str = "unclaimed";
    let mut predecessor = machine(&spec(NAME, &[4, 8], &["vcpu0"]));
    let incoming = Incoming::attach(offered(&predecessor), Vec::new()).unwrap();
    let (epoch, frozen) = seal(&mut predecessor, 100, 1);
    drop((predecessor, frozen));
    assert_filled(incoming.memories());
    let steps = Arc::new(std::sync::Mutex::new(Vec::new()));
    for inode in incoming.memories() {
        let steps = Arc::clone(&steps);
        inode.on_end(move |step| steps.lock().unwrap().push(step));
    }
    drop(incoming.claim(epoch).unwrap());
    assert_eq!(held(NAME), (0, 0), "no descriptor and no mapping of any of its regions");
    let steps = steps.lock().unwrap();
    for step in [End::Evicted, End::Destroyed, End::Freed] {
        assert_eq!(steps.iter().filter(|told| **told == step).count(), 2, "{step:?}");
    }
}
