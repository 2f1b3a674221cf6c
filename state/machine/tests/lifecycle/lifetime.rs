//! Memory ends with its machine, in each process that had it.

use std::sync::Arc;

use gmem::End;
use gmem::Sharing;
use gmem::UnfitError;

use crate::claim;
use crate::held;
use crate::rig::assert_filled;
use crate::rig::inodes;
use crate::rig::machine;
use crate::rig::offered;
use crate::rig::spec;
use crate::seal;
use crate::used_bytes;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::StateName;
use tideover_machine::update::Departure;
use tideover_machine::update::DepartureError;
use tideover_machine::update::Guest;
use uffd::Mode;
use uffd::Uffd;

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

/// R0.3, R3.2.
#[test]
fn a_thousand_lives_leave_no_frame_no_descriptor_and_no_mapping() {
    const NAME: &str = "thousand-lives";
    let mut machine = machine(&spec(NAME, &[4], &["vcpu0"]));
    let (used, before) = (used_bytes(&machine), held(NAME));
    for round in 0..1000 {
        machine = claim(&mut machine, round).run().unwrap();
        machine.settle().unwrap();
        assert_eq!(held(NAME), before, "life {round}");
    }
    assert_eq!(used_bytes(&machine), used);
    assert_filled(&inodes(&machine));
}

/// A guest that there is no need for.
struct NoGuest;

impl Guest for NoGuest {
    type Error = std::io::Error;

    fn pause(&mut self) -> Result<(), std::io::Error> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, std::io::Error> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn resume(&mut self) -> Result<(), std::io::Error> {
        Ok(())
    }
}

/// R1.6, O1.6.
#[test]
fn an_update_of_memory_that_cannot_go_is_refused_before_anything_is_done() {
    harness::need!(userfaultfd);
    let mut machine = Machine::create(&spec("unfit", &[4, 8], &["vcpu0"]), &mut |_, _| {}).unwrap();
    let [first, second] = inodes(&machine).try_into().unwrap();
    let check =
        |machine: &mut Machine| match Departure::new(machine, &mut NoGuest, &mut |_| {}).check_memory() {
            Ok(()) => None,
            Err(DepartureError::Memory(error)) => Some(error),
            Err(other) => panic!("{other:?}"),
        };
    assert_eq!(check(&mut machine), None);
    second.converted(4096, 8192, Sharing::Private).unwrap();
    let private = UnfitError::Private { name: second.name(), offset_bytes: 4096 };
    assert_eq!(check(&mut machine), Some(private));
    second.converted(0, 1 << 20, Sharing::Shared).unwrap();

    let uffd = Uffd::open().unwrap();
    uffd.register(first.mapping(), 0..4 << 20, Mode::Missing).unwrap();
    uffd.poison(first.mapping(), 8192..12288).unwrap();
    let poisoned = UnfitError::Poisoned { name: first.name(), offset_bytes: 8192 };
    assert_eq!(check(&mut machine), Some(poisoned));
    assert!(!first.is_frozen() && !second.is_frozen());
}
