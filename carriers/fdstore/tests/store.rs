//! A machine's regions and notes in a store, and what is found there.

#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use custody::Note;
use custody::NoteFile;
use custody::Offer;
use custody::Standing;
use fdpass::Deadline;
use fdpass::systemd::Manager;
use fdpass::systemd::PushError;
use fdstore::Deposit;
use fdstore::Found;
use fdstore::FoundError;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::OwnershipState;
use machine::SessionName;
use machine::Spec;
use machine::StateName;

fn machine() -> Machine {
    let ram = MemorySpec { prefault: true, ..MemorySpec::new(MemoryName::new(b"ram").unwrap(), 2 << 20) };
    let (name, state) = (SessionName::new(b"m1").unwrap(), StateName::new(b"vcpu0").unwrap());
    let spec = Spec { name, vcpus: 1, memories: vec![ram], states: vec![state] };
    Machine::create(&spec, &mut |_, _| {}).unwrap()
}

fn note(machine: &Machine, says: &str) -> Note {
    Offer { formats: Vec::new(), program: PathBuf::new(), vmm: says.into() }.note(machine)
}

fn file(machine: &Machine, says: &str) -> NoteFile {
    NoteFile::make(&note(machine, says)).unwrap()
}

fn at(played: &manager::Manager) -> Manager {
    Manager::at(played.address().as_os_str()).unwrap()
}

fn found(played: &manager::Manager) -> Found {
    Found::of(played.copies(), "m1")
}

fn settle(deposit: &Deposit) {
    deposit.manager().await_done(Deadline::never()).unwrap();
}

#[test]
fn a_machine_whose_vmm_has_died_is_found_in_the_store() {
    let played = manager::Manager::start(6);
    let machine = machine();
    let deposit = Deposit::make(at(&played), &machine, &file(&machine, "first")).unwrap();
    settle(&deposit);
    assert_eq!(played.stored(), ["tideover/m1/0", "tideover/m1/1", "tideover/m1/note.0"]);
    machine.memories()[0].inode.mapping().write(4096, b"kept").unwrap();
    let (identity, word) = (machine.identity().to_string(), machine.word());
    drop(machine);
    let kept = found(&played).keep().unwrap();
    assert_eq!((kept.note().identity.as_str(), &kept.note().vmm), (identity.as_str(), &"first".into()));
    assert_eq!(kept.standing().unwrap(), Standing::RanOn(word));
    let memory = std::fs::File::from(kept.regions().nth(1).unwrap().try_clone_to_owned().unwrap());
    let mut bytes = [0; 4];
    memory.read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(&bytes, b"kept");
}

#[test]
fn a_machine_that_was_sealed_can_go_on_once_its_vmm_has_ended() {
    let played = manager::Manager::start(6);
    let mut machine = machine();
    let deposit = Deposit::make(at(&played), &machine, &file(&machine, "first")).unwrap();
    let freeze = machine.memories()[0].inode.freeze().unwrap();
    let states = machine.state_names().map(|name| (name, vec![7; 100])).collect();
    let sealed = machine.seal(states).unwrap();
    settle(&deposit);
    assert!(matches!(found(&played).keep().unwrap().standing().unwrap(), Standing::Taken(_)));
    drop((freeze, machine));
    let standing = found(&played).keep().unwrap().standing().unwrap();
    let Standing::Ready(word) = standing else { panic!("{standing:?}") };
    assert_eq!((word.state(), word.epoch()), (OwnershipState::Sealed, sealed));
}

#[test]
fn a_store_without_room_for_all_keeps_nothing() {
    let machine = machine();
    // Two regions, a note, two more for later, and the probe.
    for room in 0..6 {
        let played = manager::Manager::start(room);
        let made = Deposit::make(at(&played), &machine, &file(&machine, "first"));
        assert_eq!(made.unwrap_err(), PushError::Refused { count: 6 }, "{room}");
        assert_eq!(played.stored(), [] as [&str; 0], "{room}");
    }
}

#[test]
fn the_newest_note_that_can_be_read_counts() {
    let played = manager::Manager::start(9);
    let machine = machine();
    let says = || found(&played).keep().unwrap().note().vmm.clone();
    let mut deposit = Deposit::make(at(&played), &machine, &file(&machine, "first")).unwrap();
    let second = file(&machine, "second");
    deposit.add_note(&second).unwrap();
    assert_eq!(says(), "second");
    // Whoever wrote it died in the midst of it.
    let torn = std::fs::File::from(second.as_fd().try_clone_to_owned().unwrap());
    torn.write_all_at(&[0xff; 64], abi::note::ADDRESS).unwrap();
    assert_eq!(says(), "first");
    deposit.replace_note(&file(&machine, "third")).unwrap();
    settle(&deposit);
    assert_eq!(played.stored(), ["tideover/m1/0", "tideover/m1/1", "tideover/m1/note.2"]);
    deposit.add_note(&file(&machine, "fourth")).unwrap();
    deposit.withdraw_note().unwrap();
    settle(&deposit);
    assert_eq!(says(), "third");
}

#[test]
fn a_note_that_finds_no_room_leaves_the_last_one() {
    let played = manager::Manager::start(6);
    let machine = machine();
    let mut deposit = Deposit::make(at(&played), &machine, &file(&machine, "first")).unwrap();
    played.set_room(4);
    assert_eq!(deposit.add_note(&file(&machine, "second")), Err(PushError::Refused { count: 1 }));
    settle(&deposit);
    assert_eq!(played.stored(), ["tideover/m1/0", "tideover/m1/1", "tideover/m1/note.0"]);
    assert_eq!(deposit.told().note, 0);
}

#[test]
fn a_machine_that_is_over_leaves_nothing() {
    let played = manager::Manager::start(9);
    let machine = machine();
    let mut deposit = Deposit::make(at(&played), &machine, &file(&machine, "first")).unwrap();
    deposit.add_note(&file(&machine, "second")).unwrap();
    settle(&deposit);
    let told = found(&played).told();
    let mut another = Deposit::of(at(&played), "m1", told).unwrap();
    another.empty().unwrap();
    assert_eq!(played.stored(), [] as [&str; 0]);
    assert!(found(&played).is_none());
}

#[test]
fn what_is_not_all_of_a_machine_is_none() {
    let played = manager::Manager::start(9);
    let machine = machine();
    let deposit = Deposit::make(at(&played), &machine, &file(&machine, "first")).unwrap();
    settle(&deposit);
    let without = |left_out: &str| {
        let rest = played.copies().into_iter().filter(|(name, _)| name != left_out).collect();
        Found::of(rest, "m1")
    };
    assert!(without("tideover/m1/note.0").is_none());
    assert!(matches!(without("tideover/m1/0").keep(), Err(FoundError::Missing { index: 0 })));
    assert!(matches!(without("tideover/m1/1").keep(), Err(FoundError::Custody(_))));
    assert!(Found::of(played.copies(), "m").is_none());
}
