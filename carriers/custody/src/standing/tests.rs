use std::os::fd::AsFd as _;
use std::path::PathBuf;

use machine::Claimed;
use machine::Incoming;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::OfferedRegion;
use machine::SessionName;
use machine::Spec;
use machine::StateName;

use super::*;
use crate::Kept;
use crate::NoteFile;
use crate::Sealed;
use crate::When;

/// What a kexec leaves of a machine: its regions' bytes, in files that are new, and its note. Or the death of its VMM: the same
/// files.
struct Remains {
    kept: Kept,
}

fn machine() -> Machine {
    let ram = MemorySpec { prefault: true, ..MemorySpec::new(MemoryName::new(b"ram").unwrap(), 2 << 20) };
    let (name, state) = (SessionName::new(b"t").unwrap(), StateName::new(b"vcpu0").unwrap());
    let spec = Spec { name, vcpus: 1, memories: vec![ram], states: vec![state] };
    Machine::create(&spec, &mut |_, _| {}).unwrap()
}

fn made_again(region: &Region) -> OwnedFd {
    let from = region.as_fd().try_clone_to_owned().unwrap();
    let from = Region::accept("", from, region.len_bytes()).unwrap().map().unwrap();
    let to = Region::create("", region.len_bytes()).unwrap().map().unwrap();
    let mut some = vec![0; 1 << 20];
    for offset in (0..region.len_bytes()).step_by(some.len()) {
        from.read(offset, &mut some).unwrap();
        to.write(offset, &some).unwrap();
    }
    to.region().as_fd().try_clone_to_owned().unwrap()
}

/// `sealed` is what the note says.
fn note(machine: &Machine, sealed: Option<u32>) -> Note {
    Note {
        machine: "t".to_owned(),
        identity: machine.identity().to_string(),
        formats: Vec::new(),
        regions: machine.regions().map(Region::len_bytes).collect(),
        program: PathBuf::new(),
        cgroup: None,
        vmm: serde_json::Value::Null,
        sealed: sealed.map(|epoch| Sealed { epoch, when: When::default() }),
    }
}

fn after_kexec_of(machine: &Machine, sealed: Option<u32>) -> Remains {
    let note = note(machine, sealed);
    let regions = machine.regions().map(made_again).collect();
    let kept = Kept::made_again((NoteFile::make(&note).unwrap(), note), regions, When::default());
    Remains { kept: kept.unwrap() }
}

fn after_death_of(machine: &Machine) -> Remains {
    let file = NoteFile::make(&note(machine, None)).unwrap();
    let regions = machine.regions().map(|region| region.as_fd().try_clone_to_owned().unwrap());
    Remains { kept: Kept::left_behind(file, regions.collect()).unwrap() }
}

fn seal(machine: &mut Machine) -> u32 {
    let freezes: Vec<_> = machine.memories().iter().map(|memory| memory.inode.freeze().unwrap()).collect();
    let states = machine.state_names().map(|name| (name, vec![7; 100])).collect();
    let epoch = machine.seal(states).unwrap();
    drop(freezes);
    epoch
}

/// A machine that was sealed, as the next kernel has it, and the seal's epoch.
fn sealed() -> (Remains, u32) {
    let mut machine = machine();
    let epoch = seal(&mut machine);
    (after_kexec_of(&machine, Some(epoch)), epoch)
}

impl Remains {
    fn standing(&self) -> Standing {
        self.kept.standing().unwrap()
    }

    fn attach(&self) -> Incoming {
        let offered = self.kept.regions().zip(&self.kept.note().regions);
        let offered = offered.map(|(fd, len_bytes)| OfferedRegion {
            fd: fd.try_clone_to_owned().unwrap(),
            len_bytes: *len_bytes,
        });
        Incoming::attach_made_again(offered.collect()).unwrap()
    }

    fn claim(&self, sealed: u32) -> Claimed {
        self.attach().claim(sealed).unwrap()
    }

    /// Its owner's word, if that is dead.
    fn ran_on(&self) -> OwnershipWord {
        let Standing::RanOn(word) = self.standing() else { panic!("{:?}", self.standing()) };
        word
    }

    /// Its word, if it can run on.
    fn ready(&self) -> OwnershipWord {
        let Standing::Ready(word) = self.standing() else { panic!("{:?}", self.standing()) };
        word
    }
}

#[test]
fn a_sealed_machine_is_ready_and_one_that_was_not_is_never() {
    let (left, epoch) = sealed();
    assert_eq!((left.ready().epoch(), left.ready().state()), (epoch, OwnershipState::Sealed));
    let running = machine();
    let left = after_kexec_of(&running, None);
    assert_eq!(left.ran_on(), running.word());
}

#[test]
fn a_machine_is_its_claimant_s_until_that_dies() {
    let (left, epoch) = sealed();
    let claimed = left.claim(epoch);
    let Standing::Taken(word) = left.standing() else { panic!("{:?}", left.standing()) };
    assert_eq!(word.state(), OwnershipState::Claimed);
    assert!(!left.standing().runs());
    drop(claimed);
    assert_eq!(left.ready(), word);
    let machine = left.attach().claim_again(word).unwrap().run().unwrap();
    assert_eq!(left.standing(), Standing::Taken(machine.word()));
    drop(machine);
    left.ran_on();
}

#[test]
fn a_claim_that_was_revoked_runs_nothing_and_the_next_one_does() {
    let (left, epoch) = sealed();
    let was = left.ready();
    let late = left.claim(epoch);
    left.kept.revoke(was).unwrap();
    late.run().unwrap_err();
    let mut machine = left.attach().claim_again(left.ready()).unwrap().run().unwrap();
    let error = left.kept.revoke(was).unwrap_err();
    assert!(error.is_lost(), "{error:?}");
    assert_eq!(left.standing(), Standing::Taken(machine.word()));
    // It is at rest: sealed by the process that has it.
    seal(&mut machine);
    let error = left.kept.revoke(was).unwrap_err();
    assert!(error.is_lost(), "{error:?}");
    assert_eq!(left.standing(), Standing::Taken(machine.word()));
}

#[test]
fn who_is_about_to_claim_does_not_once_the_seal_is_revoked() {
    let (left, epoch) = sealed();
    let was = left.ready();
    let late = left.attach();
    left.kept.revoke(was).unwrap();
    left.kept.revoke(was).unwrap();
    late.claim(epoch).unwrap_err();
    left.attach().claim_again(left.ready()).unwrap();
}

#[test]
fn a_machine_whose_vmm_died_is_ready_if_it_was_sealed_and_has_no_state_if_it_ran() {
    let mut running = machine();
    let left = after_death_of(&running);
    assert_eq!(left.standing(), Standing::Taken(running.word()));
    assert!(left.standing().runs());
    let epoch = seal(&mut running);
    assert_eq!(left.standing(), Standing::Taken(running.word()), "it may be taken back");
    assert!(left.standing().runs(), "a paused machine is sealed by the process that has it");
    drop(running);
    // Whoever claims it, however often, and dies: it is as it was sealed.
    drop(left.claim(epoch));
    for _ in 0..3 {
        let claimed = left.attach().claim_again(left.ready()).unwrap();
        assert!(claimed.states().values().all(|state| *state == [7; 100]));
    }
    drop(left.attach().claim_again(left.ready()).unwrap().run().unwrap());
    assert_eq!(left.ran_on().state(), OwnershipState::Running);
}

/// Else the state of an instant that is long past would be given to the memory of a later one.
#[test]
fn a_machine_that_ran_on_never_gets_ready_by_any_death_after_that() {
    for of in [after_death_of, |machine: &Machine| after_kexec_of(machine, None)] {
        let mut running = machine();
        seal(&mut running);
        running.unseal().unwrap();
        let left = of(&running);
        drop(running);
        for _ in 0..3 {
            drop(left.attach().recover(left.ran_on()).unwrap());
            left.kept.revoke(left.ran_on()).unwrap();
        }
        assert_eq!(left.ran_on().state(), OwnershipState::Recovering);
        left.attach().recover(left.ran_on()).unwrap().run().unwrap();
    }
}

#[test]
fn a_recovery_that_was_revoked_runs_nothing() {
    let running = machine();
    let left = after_death_of(&running);
    drop(running);
    let was = left.ran_on();
    let about_to = left.attach();
    left.kept.revoke(was).unwrap();
    about_to.recover(was).unwrap_err();
    let late = left.attach().recover(left.ran_on()).unwrap();
    left.kept.revoke(was).unwrap();
    late.run().unwrap_err();
    let machine = left.attach().recover(left.ran_on()).unwrap().run().unwrap();
    assert!(left.kept.revoke(was).unwrap_err().is_lost());
    drop(machine);
}

#[test]
fn metadata_that_is_too_small_or_none_is_no_machine() {
    let mut running = machine();
    let epoch = seal(&mut running);
    let note = note(&running, Some(epoch));
    let small = Region::create("", 4096).unwrap();
    let fd = || small.as_fd().try_clone_to_owned().unwrap();
    let kept = |note: &Note, fds| Kept::left_behind(NoteFile::make(note).unwrap(), fds);
    let standing = |note: &Note, fds| kept(note, fds).unwrap().standing();
    assert!(matches!(standing(&note, vec![fd(), fd()]), Err(CustodyError::Map(_))));
    let empty = Note { regions: vec![4096], ..note.clone() };
    assert!(matches!(standing(&empty, vec![fd()]), Err(CustodyError::Ownership(_))));
    assert!(matches!(kept(&note, Vec::new()), Err(CustodyError::Regions { told: 2, came: 0 })));
    let none = Note { regions: Vec::new(), ..note };
    assert!(matches!(kept(&none, Vec::new()), Err(CustodyError::Regions { told: 0, came: 0 })));
}
