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
use crate::Sealed;
use crate::When;

/// What a kexec leaves of a machine: its regions' bytes, in files that are new, and its note.
struct Left {
    regions: Regions,
    note: Note,
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
fn left(machine: &Machine, sealed: Option<u32>) -> Left {
    let note = Note {
        machine: "t".to_owned(),
        identity: machine.identity().to_string(),
        formats: Vec::new(),
        regions: machine.regions().map(Region::len_bytes).collect(),
        program: PathBuf::new(),
        cgroup: None,
        vmm: serde_json::Value::Null,
        sealed: sealed.map(|epoch| Sealed { epoch, when: When::default() }),
    };
    Left { regions: Regions { fds: machine.regions().map(made_again).collect() }, note }
}

/// A machine that was sealed, as the next kernel has it, and the seal's epoch.
fn sealed() -> (Left, u32) {
    let mut machine = machine();
    let freezes: Vec<_> = machine.memories().iter().map(|memory| memory.inode.freeze().unwrap()).collect();
    let states = machine.state_names().map(|name| (name, vec![7; 100])).collect();
    let epoch = machine.seal(states).unwrap();
    drop(freezes);
    (left(&machine, Some(epoch)), epoch)
}

impl Left {
    fn standing(&self) -> Standing {
        self.regions.standing(&self.note).unwrap()
    }

    fn attach(&self) -> Incoming {
        let offered = self.regions.fds.iter().zip(&self.note.regions);
        let offered = offered
            .map(|(fd, len_bytes)| OfferedRegion { fd: fd.try_clone().unwrap(), len_bytes: *len_bytes });
        Incoming::attach_made_again(offered.collect()).unwrap()
    }

    fn claim(&self, sealed: u32) -> Claimed {
        self.attach().claim(sealed).unwrap()
    }
}

#[test]
fn a_sealed_machine_is_ready_and_one_that_was_not_is_never() {
    let (left_sealed, epoch) = sealed();
    assert_eq!(left_sealed.standing(), Standing::Ready { sealed: epoch, claimed: None });
    let running = machine();
    assert_eq!(left(&running, None).standing(), Standing::NeverSealed);
    assert_eq!(left(&running, Some(running.word().epoch())).standing(), Standing::NeverSealed);
}

#[test]
fn a_machine_is_its_claimant_s_until_that_dies() {
    let (left, epoch) = sealed();
    let claimed = left.claim(epoch);
    let Standing::Taken(word) = left.standing() else { panic!("{:?}", left.standing()) };
    assert_eq!(word.state(), OwnershipState::Claimed);
    drop(claimed);
    assert_eq!(left.standing(), Standing::Ready { sealed: epoch, claimed: Some(word) });
    let machine = left.attach().claim_again(epoch, word).unwrap().run().unwrap();
    assert_eq!(left.standing(), Standing::Taken(machine.word()));
    drop(machine);
    assert_eq!(left.standing(), Standing::RanOn);
}

#[test]
fn a_claim_that_was_revoked_runs_nothing_and_the_next_one_does() {
    let (left, epoch) = sealed();
    let late = left.claim(epoch);
    left.regions.revoke(&left.note).unwrap();
    let Standing::Ready { sealed, claimed: Some(nobody) } = left.standing() else {
        panic!("{:?}", left.standing())
    };
    assert_eq!(sealed, epoch);
    late.run().unwrap_err();
    let machine = left.attach().claim_again(epoch, nobody).unwrap().run().unwrap();
    let error = left.regions.revoke(&left.note).unwrap_err();
    assert!(error.is_lost(), "{error:?}");
    assert_eq!(left.standing(), Standing::Taken(machine.word()));
}

#[test]
fn who_is_about_to_claim_does_not_once_the_seal_is_revoked() {
    let (left, epoch) = sealed();
    let late = left.attach();
    left.regions.revoke(&left.note).unwrap();
    left.regions.revoke(&left.note).unwrap();
    late.claim(epoch).unwrap_err();
    let Standing::Ready { claimed: Some(nobody), .. } = left.standing() else {
        panic!("{:?}", left.standing())
    };
    left.attach().claim_again(epoch, nobody).unwrap();
}

#[test]
fn metadata_that_is_too_small_or_none_is_no_machine() {
    let (Left { mut regions, note }, _) = sealed();
    let small = Region::create("", 4096).unwrap();
    let fd = || small.as_fd().try_clone_to_owned().unwrap();
    regions.fds[0] = fd();
    assert!(matches!(regions.standing(&note), Err(KeptError::Map(_))));
    let empty = Note { regions: vec![4096], ..note.clone() };
    assert!(matches!(Regions { fds: vec![fd()] }.standing(&empty), Err(KeptError::Ownership(_))));
    assert!(matches!(Regions { fds: Vec::new() }.standing(&note), Err(KeptError::TooMany { regions: 0 })));
}
