//! A machine's way from process to process, both in this one, and every refusal on it. No VM.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

#[path = "lifecycle/corruption.rs"]
mod corruption;
#[path = "lifecycle/damage.rs"]
mod damage;
#[path = "lifecycle/death.rs"]
mod death;
#[path = "lifecycle/descriptors.rs"]
mod descriptors;
#[path = "lifecycle/lifetime.rs"]
mod lifetime;
#[path = "lifecycle/made_again.rs"]
mod made_again;
#[path = "lifecycle/refused_regions.rs"]
mod refused_regions;
#[path = "lifecycle/region0.rs"]
mod region0;
mod rig;
#[path = "lifecycle/stores.rs"]
mod stores;
#[path = "lifecycle/swapped.rs"]
mod swapped;

use std::collections::BTreeMap;

use abi::arena::OWNERSHIP_ADDRESS;
use abi::arena::OwnershipState;
use abi::state::StateRecord;
use rig::assert_filled;
use rig::freeze;
use rig::inodes;
use rig::machine;
use rig::offered;
use rig::spec;
use rig::states;
use tideover_machine::ClaimError;
use tideover_machine::Claimed;
use tideover_machine::CreateError;
use tideover_machine::Incoming;
use tideover_machine::Machine;
use tideover_machine::OwnershipWord;
use tideover_machine::SealError;
use tideover_machine::StateName;
use tideover_machine::UnsealError;
use tideover_machine::ownership::Lost;
use tideover_machine::ownership::OwnershipError;
use tideover_machine::ownership::Wanted;

fn name(text: &str) -> StateName {
    StateName::new(text.as_bytes()).unwrap()
}

fn attach(machine: &Machine) -> Incoming {
    Incoming::attach(offered(machine), Vec::new()).unwrap()
}

/// Seals with states of `len_bytes` bytes. The freeze stands until what is given is dropped.
fn seal(machine: &mut Machine, len_bytes: usize, seed: usize) -> (u32, Vec<gmem::Freeze>) {
    let frozen = freeze(&inodes(machine));
    let states = states(machine.state_names(), len_bytes, seed);
    (machine.seal(states).unwrap(), frozen)
}

fn claim(machine: &mut Machine, seed: usize) -> Claimed {
    let incoming = attach(machine);
    let (epoch, _frozen) = seal(machine, 5000, seed);
    incoming.claim(epoch).unwrap()
}

/// Asserts that a claimed machine has the states of [`seal`].
#[track_caller]
fn assert_states(claimed: &Claimed, names: &[StateName], len_bytes: usize, seed: usize) {
    let expected: BTreeMap<_, _> = states(names.iter().copied(), len_bytes, seed).into_iter().collect();
    assert_eq!(*claimed.states(), expected);
}

/// Bytes of region 0 that the published tree uses.
fn used_bytes(machine: &Machine) -> u64 {
    kho::Kho::attach(Box::new(machine.arena().clone())).unwrap().used_bytes()
}

/// The state records that the published tree holds.
fn published_states(machine: &Machine) -> Vec<StateRecord> {
    let arena = machine.arena();
    let tree = kho::Tree::read(arena).unwrap();
    let subtree = tree.fdt.subtree(&abi::kho::SubtreeName::literal(abi::luo::SUBTREE)).unwrap();
    let luo = abi::luo::Luo::read(arena, subtree.data, subtree.size).unwrap();
    let files = luo.sessions.iter().flat_map(|session| &session.files);
    let compatible = abi::luo::Compatible::literal(abi::state::FORMAT.compatible);
    let records = files.filter(|file| file.compatible == compatible);
    records.map(|file| StateRecord::read(arena, file.data).unwrap()).collect()
}

#[track_caller]
fn assert_lost(error: &OwnershipError, wanted: Wanted, found: OwnershipWord) {
    match error {
        OwnershipError::Lost(lost) => assert_eq!(*lost, Lost { wanted, found }),
        OwnershipError::Malformed(error) => panic!("{error}"),
    }
}

/// R0.1, R3.3, P6.5.3, P6.5.6.
#[test]
fn a_machine_crosses_with_its_memory_and_its_states() {
    for len_bytes in [0, 1, 4095, 4096, 4097, 511 * 4096, 512 * 4096 + 1] {
        let mut predecessor = machine(&spec("crosses", &[4, 8], &["vcpu0", "vcpu1", "serial"]));
        let names: Vec<_> = predecessor.state_names().collect();
        let incoming = attach(&predecessor);
        assert_eq!(incoming.name(), predecessor.name());
        assert_eq!(incoming.identity(), predecessor.identity());
        assert_eq!(incoming.vcpus(), 3);
        assert_eq!(incoming.state_names().collect::<Vec<_>>(), names);
        assert_filled(incoming.memories());

        let (epoch, _frozen) = seal(&mut predecessor, len_bytes, 1);
        let claimed = incoming.claim(epoch).unwrap();
        assert_states(&claimed, &names, len_bytes, 1);
        let mut successor = claimed.run().unwrap();
        assert_eq!(successor.settle().unwrap().unclaimed, []);
        assert_eq!(successor.identity(), predecessor.identity());
        assert_eq!(successor.places(), predecessor.places());
        assert_eq!(successor.formats(), predecessor.formats());
        assert_filled(&inodes(&successor));
        let word = successor.ownership().unwrap();
        assert_eq!((word.epoch(), word.state()), (4, OwnershipState::Running));
        match predecessor.unseal() {
            Err(UnsealError::Ownership(error)) => assert_lost(&error, Wanted::TakenBack, word),
            Ok(()) => panic!("two run it"),
        }
        assert!(published_states(&successor).iter().all(|record| record.epoch == 0), "used states stayed");
    }
}

#[test]
fn a_machine_without_states_crosses() {
    let mut predecessor = machine(&spec("stateless", &[4], &[]));
    let claimed = claim(&mut predecessor, 1);
    assert!(claimed.states().is_empty());
    assert_filled(&inodes(&claimed.run().unwrap()));
}

/// O1.10, L2.8.4.
#[test]
fn guest_memory_is_the_same_memory_on_both_sides() {
    let predecessor = machine(&spec("same-memory", &[4], &[]));
    let incoming = attach(&predecessor);
    predecessor.memories()[0].inode.mapping().write(0x1234, b"later").unwrap();
    let mut read = [0; 5];
    incoming.memories()[0].mapping().read(0x1234, &mut read).unwrap();
    assert_eq!(&read, b"later");
}

/// R1.5, R1.15.
#[test]
fn holes_cross_as_holes() {
    harness::need!(userfaultfd);
    let mut predecessor = Machine::create(&spec("holes", &[4, 8], &["vcpu0"]), &mut |_, _| {}).unwrap();
    let [some, none] = inodes(&predecessor).try_into().unwrap();
    some.mapping().store(3 << 20, 7).unwrap();
    let present = |inode: &gmem::Inode| inode.mapping().region().allocated_bytes().unwrap();
    assert_eq!((present(&some), present(&none)), (Some(4096), Some(0)));
    let mut successor = claim(&mut predecessor, 1).run().unwrap();
    successor.settle().unwrap();
    let [some, none] = inodes(&successor).try_into().unwrap();
    assert_eq!((present(&some), present(&none)), (Some(4096), Some(0)));
    assert_eq!((some.size_bytes(), none.size_bytes()), (4 << 20, 8 << 20));
    assert_eq!(some.mapping().load(3 << 20).unwrap(), 7);
    assert_eq!(none.mapping().load(3 << 20).unwrap(), 0);
}

#[test]
fn a_machine_that_is_unsealed_has_no_stale_states_and_can_be_updated() {
    let mut predecessor = machine(&spec("unsealed", &[4], &["vcpu0", "serial"]));
    let used = used_bytes(&predecessor);
    let stale = attach(&predecessor);
    let (first, frozen) = seal(&mut predecessor, 9000, 1);
    assert!(published_states(&predecessor).iter().all(|record| record.epoch == first));
    predecessor.unseal().unwrap();
    drop(frozen);
    let word = predecessor.ownership().unwrap();
    assert_eq!((word.epoch(), word.state()), (3, OwnershipState::Running));
    assert!(published_states(&predecessor).iter().all(|record| record.epoch == 0 && record.len_bytes == 0));
    assert_eq!(used_bytes(&predecessor), used);

    let incoming = attach(&predecessor);
    let (second, _frozen) = seal(&mut predecessor, 100, 2);
    assert_eq!((first, second), (2, 4));
    match stale.claim(first) {
        Err(ClaimError::Ownership(error)) => {
            assert_lost(&error, Wanted::Claimed, predecessor.ownership().unwrap());
        }
        other => panic!("{other:?}"),
    }
    let names: Vec<_> = predecessor.state_names().collect();
    let claimed = incoming.claim(second).unwrap();
    assert_states(&claimed, &names, 100, 2);
    claimed.run().unwrap();
}

/// R2.7, R3.8.
#[test]
fn a_claim_of_another_seal_or_of_none_is_refused() {
    let mut predecessor = machine(&spec("claims", &[4], &["vcpu0"]));
    let refused = |incoming: Incoming, epoch, found| match incoming.claim(epoch) {
        Err(ClaimError::Ownership(error)) => assert_lost(&error, Wanted::Claimed, found),
        other => panic!("{other:?}"),
    };
    refused(attach(&predecessor), 1, predecessor.ownership().unwrap());
    let early = attach(&predecessor);
    let (epoch, _frozen) = seal(&mut predecessor, 10, 1);
    let sealed = predecessor.ownership().unwrap();
    refused(early, epoch + 1, sealed);
    refused(attach(&predecessor), epoch - 1, sealed);

    let (one, other) = (attach(&predecessor), attach(&predecessor));
    let one = one.claim(epoch).unwrap();
    refused(other, epoch, predecessor.ownership().unwrap());
    one.run().unwrap();
}

#[test]
fn a_claim_after_the_machine_was_taken_back_is_refused() {
    let mut predecessor = machine(&spec("late-claim", &[4], &["vcpu0"]));
    let incoming = attach(&predecessor);
    let (epoch, _frozen) = seal(&mut predecessor, 10, 1);
    predecessor.unseal().unwrap();
    match incoming.claim(epoch) {
        Err(ClaimError::Ownership(error)) => {
            assert_lost(&error, Wanted::Claimed, predecessor.ownership().unwrap());
        }
        other => panic!("{other:?}"),
    }
}

/// O1.13.
#[test]
fn a_claimant_whose_claim_was_taken_back_cannot_run_the_machine() {
    let mut predecessor = machine(&spec("late-run", &[4], &["vcpu0"]));
    let claimed = claim(&mut predecessor, 1);
    predecessor.unseal().unwrap();
    let word = predecessor.ownership().unwrap();
    assert_lost(&claimed.run().unwrap_err(), Wanted::Run, word);
    // It is whole, and goes to the next one.
    let claimed = claim(&mut predecessor, 2);
    assert_states(&claimed, &[name("vcpu0")], 5000, 2);
    assert_filled(&inodes(&claimed.run().unwrap()));
}

#[test]
fn only_a_sealed_machine_is_taken_back() {
    let mut owner = machine(&spec("not-sealed", &[4], &[]));
    let word = owner.ownership().unwrap();
    match owner.unseal() {
        Err(UnsealError::Ownership(error)) => assert_lost(&error, Wanted::TakenBack, word),
        Ok(()) => panic!("it was not sealed"),
    }
    assert_eq!(owner.ownership().unwrap(), word);
}

#[test]
fn a_sealed_machine_is_not_sealed_again() {
    let mut owner = machine(&spec("sealed-twice", &[4], &["vcpu0"]));
    let (_, _frozen) = seal(&mut owner, 10, 1);
    let sealed = owner.ownership().unwrap();
    match owner.seal(states(owner.state_names(), 10, 2)) {
        Err(SealError::Ownership(error)) => assert_lost(&error, Wanted::Sealed, sealed),
        other => panic!("{other:?}"),
    }
    assert_eq!(owner.ownership().unwrap(), sealed);
    let claimed = attach(&owner).claim(sealed.epoch()).unwrap();
    assert_states(&claimed, &[name("vcpu0")], 10, 1);
}

/// Asserts that a refused seal left nothing behind, and that the next one works.
#[track_caller]
fn assert_seals_after(mut owner: Machine, used: u64) {
    let word = owner.ownership().unwrap();
    assert_eq!((word.epoch(), word.state()), (1, OwnershipState::Running));
    assert_eq!(used_bytes(&owner), used);
    assert!(published_states(&owner).iter().all(|record| record.epoch == 0));
    let names: Vec<_> = owner.state_names().collect();
    let claimed = claim(&mut owner, 3);
    assert_states(&claimed, &names, 5000, 3);
    assert_filled(&inodes(&claimed.run().unwrap()));
}

/// R1.3, L2.8.1.
#[test]
fn a_machine_whose_memory_is_not_frozen_is_not_sealed() {
    let mut owner = machine(&spec("not-frozen", &[4, 4], &["vcpu0"]));
    let used = used_bytes(&owner);
    let half = owner.memories()[0].inode.freeze().unwrap();
    let error = owner.seal(states(owner.state_names(), 10, 1)).unwrap_err();
    drop(half);
    match &error {
        SealError::Freeze(refused) => assert_eq!(refused.errno(), luo::Errno::EBUSY),
        other => panic!("{other:?}"),
    }
    assert_seals_after(owner, used);
}

#[test]
fn a_state_that_is_missing_unknown_or_given_twice_is_named() {
    let all = ["vcpu0", "vcpu1"];
    for (given, at_fault) in [
        (vec!["vcpu0"], "vcpu1"),
        (vec![], "vcpu0"),
        (vec!["vcpu0", "vcpu1", "vcpu2"], "vcpu2"),
        (vec!["vcpu0", "vcpu1", "vcpu0"], "vcpu0"),
    ] {
        let mut owner = machine(&spec("states", &[4], &all));
        let used = used_bytes(&owner);
        let frozen = freeze(&inodes(&owner));
        match owner.seal(states(given.iter().map(|given| name(given)), 10, 1)) {
            Err(SealError::State { name: refused, .. }) => assert_eq!(refused, name(at_fault), "{given:?}"),
            other => panic!("{given:?}: {other:?}"),
        }
        drop(frozen);
        assert_seals_after(owner, used);
    }
}

#[test]
fn states_of_any_size_leave_room_for_the_way_back_and_the_way_on_or_are_refused() {
    let names: Vec<String> = (0..64).map(|number| format!("vcpu{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let with_large = |machine: &Machine, pages: usize| {
        let mut states = states(machine.state_names(), 10, 1);
        states[0].1 = vec![7; pages * 4096];
        states
    };
    let mut refused = 0;
    let around_the_limit: Vec<usize> = (1560..1590).chain([1700, 2000, 3000]).collect();
    for pages in around_the_limit.iter().copied() {
        let mut owner = machine(&spec("large", &[4], &names));
        let used = used_bytes(&owner);
        let frozen = freeze(&inodes(&owner));
        let incoming = attach(&owner);
        match owner.seal(with_large(&owner, pages)) {
            Err(SealError::NoRoom { wanted, free }) => {
                refused += 1;
                assert!(wanted > free);
                drop(frozen);
                assert_seals_after(owner, used);
            }
            Err(other) => panic!("{pages} pages: {other:?}"),
            Ok(_) => {
                owner.unseal().unwrap();
                assert_eq!(used_bytes(&owner), used, "{pages} pages");
                let epoch = owner.seal(with_large(&owner, pages)).unwrap();
                let mut successor = incoming.claim(epoch).unwrap().run().unwrap();
                successor.settle().unwrap();
                assert_eq!(used_bytes(&successor), used, "{pages} pages");
            }
        }
    }
    assert!((4..around_the_limit.len()).contains(&refused), "{refused}");
}

#[test]
fn a_state_of_another_seal_is_refused() {
    let mut predecessor = machine(&spec("stale", &[4], &["vcpu0"]));
    let incoming = attach(&predecessor);
    let (_, _frozen) = seal(&mut predecessor, 10, 1);
    let sealed = predecessor.ownership().unwrap();
    let later = OwnershipWord::new(sealed.epoch() + 2, OwnershipState::Sealed, sealed.nonce());
    let word = predecessor.arena().regions()[0].mapping.word(OWNERSHIP_ADDRESS).unwrap();
    word.compare_exchange(sealed.bits(), later.bits()).unwrap();
    match incoming.claim(later.epoch()) {
        Err(ClaimError::Stale { name: stale }) => assert_eq!(stale, name("vcpu0")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn nonsense_in_the_ownership_word_is_an_error_for_both_sides() {
    let mut owner = machine(&spec("nonsense", &[4], &["vcpu0"]));
    let incoming = attach(&owner);
    let (epoch, _frozen) = seal(&mut owner, 10, 1);
    owner.arena().regions()[0].mapping.word(OWNERSHIP_ADDRESS).unwrap().store(0);
    assert!(owner.ownership().is_err());
    assert!(matches!(owner.unseal(), Err(UnsealError::Ownership(OwnershipError::Malformed(_)))));
    assert!(matches!(incoming.claim(epoch), Err(ClaimError::Ownership(OwnershipError::Malformed(_)))));
}

#[test]
fn a_successor_that_was_not_settled_can_be_updated() {
    let mut machine = machine(&spec("unsettled", &[4], &["vcpu0"]));
    for round in 0..3 {
        machine = claim(&mut machine, round).run().unwrap();
    }
    assert_filled(&inodes(&machine));
}

/// How many of this process's descriptors and mappings are of regions of the machine `name`.
fn held(name: &str) -> (usize, usize) {
    let ours = format!("/memfd:{name}.");
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let links = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let fds = links.filter(|link| link.to_string_lossy().starts_with(&ours)).count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (fds, maps.lines().filter(|line| line.contains(&ours)).count())
}

/// R0.3, R3.2, G5.7.3.
#[test]
fn updates_in_a_row_leak_no_frames_no_descriptors_and_no_mappings() {
    const NAME: &str = "twenty-updates";
    let mut machine = machine(&spec(NAME, &[4, 8], &["vcpu0", "vcpu1", "serial"]));
    let names: Vec<_> = machine.state_names().collect();
    let (used, before) = (used_bytes(&machine), held(NAME));
    assert_eq!(before, (4, 3), "a descriptor for each region and the lock's, a mapping for each region");
    for round in 0..20 {
        let incoming = attach(&machine);
        let (epoch, frozen) = seal(&mut machine, 10_000 + round * 997, round);
        assert_eq!(usize::try_from(epoch).unwrap(), 2 + 3 * round);
        let claimed = incoming.claim(epoch).unwrap();
        assert_states(&claimed, &names, 10_000 + round * 997, round);
        drop(frozen);
        machine = claimed.run().unwrap();
        assert_eq!(machine.settle().unwrap().unclaimed, []);
        assert_eq!(used_bytes(&machine), used, "update {round}");
        assert_eq!(held(NAME), before, "update {round}");
    }
    assert_filled(&inodes(&machine));
    drop(machine);
    assert_eq!(held(NAME), (0, 0));
}

#[test]
fn attempts_in_a_row_that_go_back_leak_nothing() {
    const NAME: &str = "twenty-attempts";
    let mut machine = machine(&spec(NAME, &[4], &["vcpu0", "serial"]));
    let (used, before) = (used_bytes(&machine), held(NAME));
    for round in 0..20 {
        let claimed = claim(&mut machine, round);
        machine.unseal().unwrap();
        claimed.run().unwrap_err();
        assert_eq!(used_bytes(&machine), used, "attempt {round}");
        assert_eq!(held(NAME), before, "attempt {round}");
    }
}

#[test]
fn a_settled_machine_is_settled_once() {
    let mut predecessor = machine(&spec("settled", &[4], &["vcpu0"]));
    let generation = |machine: &Machine| kho::Tree::read(machine.arena()).unwrap().slot.generation();
    let before = generation(&predecessor);
    predecessor.settle().unwrap();
    assert_eq!(generation(&predecessor), before, "a new machine is settled");
    let mut successor = claim(&mut predecessor, 1).run().unwrap();
    let sealed = generation(&successor);
    successor.settle().unwrap();
    successor.settle().unwrap();
    assert_eq!(generation(&successor), sealed + 1);
}

#[test]
fn specifications_that_no_machine_meets_are_refused() {
    let refused = |spec| match Machine::create(&spec, &mut |_, _| {}) {
        Err(CreateError::Spec { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(refused(spec("m", &[], &[])).contains("no memory"));
    assert!(refused(spec("m", &[1; 256], &[])).contains("255"));
    assert!(refused(spec("m", &[4], &["vcpu0", "vcpu0"])).contains("one name"));
    let mut twice = spec("m", &[4, 4], &[]);
    twice.memories[1].name = twice.memories[0].name;
    assert!(refused(twice).contains("one name"));
    let mut odd = spec("m", &[4], &[]);
    odd.memories[0].size_bytes += 1;
    assert!(refused(odd).contains("multiple"));
    let mut none = spec("m", &[4], &[]);
    none.memories[0].size_bytes = 0;
    assert!(matches!(Machine::create(&none, &mut |_, _| {}), Err(CreateError::Region(_))));
    let many: Vec<String> = (0..2100).map(|number| format!("s{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let error = Machine::create(&spec("m", &[4], &many), &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, CreateError::Settle(_)), "no room for their records: {error:?}");
}

/// R0.2.
#[test]
fn a_machine_that_cannot_be_made_leaves_nothing() {
    const NAME: &str = "never-made";
    let many: Vec<String> = (0..2100).map(|number| format!("s{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let error = Machine::create(&spec(NAME, &[4, 8], &many), &mut |_, _| {}).unwrap_err();
    assert!(matches!(error, CreateError::Settle(_)), "its memory was there by then: {error:?}");
    assert_eq!(held(NAME), (0, 0));
}

#[test]
fn prefaulted_memory_is_all_there_and_accounted_for() {
    let mut spec = spec("prefault", &[4, 8], &[]);
    spec.memories.iter_mut().for_each(|memory| memory.prefault = true);
    let mut seen = Vec::new();
    let machine = Machine::create(&spec, &mut |done, all| seen.push((done, all))).unwrap();
    assert_eq!(seen.last(), Some(&(12 << 20, 12 << 20)));
    assert!(seen.is_sorted(), "{seen:?}");
    for memory in machine.memories() {
        assert!(memory.inode.mapping().region().is_whole().unwrap());
        assert!(memory.account.is_some());
    }
}
