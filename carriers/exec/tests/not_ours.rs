//! A process whose machine is another's by the time that it would seal it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::convert::Infallible;
use std::path::PathBuf;

use abi::Memory as _;
use abi::MemoryMut as _;
use abi::arena::OWNERSHIP_ADDRESS;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::SessionName;
use machine::Spec;
use machine::StateName;
use machine::update::Guest;
use machine::update::Step;
use region::Arena;
use socket::Program;
use tideover_exec::Fatal;
use tideover_exec::Offer;

const VCPU: StateName = StateName::literal("vcpu0");

/// A guest during whose save somebody else writes the ownership word.
struct Taken {
    arena: Arena,
    resumed: bool,
}

impl Guest for Taken {
    type Error = Infallible;

    fn pause(&mut self) -> Result<(), Infallible> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, Infallible> {
        let mut word = [0; 8];
        self.arena.read(OWNERSHIP_ADDRESS, &mut word).unwrap();
        let other = u64::from_le_bytes(word) ^ 1 << 63;
        self.arena.write(OWNERSHIP_ADDRESS, &other.to_le_bytes()).unwrap();
        Ok(vec![(VCPU, b"state".to_vec())])
    }

    fn resume(&mut self) -> Result<(), Infallible> {
        self.resumed = true;
        Ok(())
    }
}

#[test]
fn a_guest_whose_machine_is_anothers_is_not_resumed() {
    let memory = MemorySpec::new(MemoryName::literal("ram"), 2 << 20);
    let name = SessionName::new(b"taken").unwrap();
    let spec = Spec { name, vcpus: 1, memories: vec![memory], states: vec![VCPU] };
    let mut machine = Machine::create(&spec, &mut |_, _| {}).unwrap();
    let mut guest = Taken { arena: machine.arena().clone(), resumed: false };
    let path = PathBuf::from("/bin/false");
    let program = Program::open(&path, std::slice::from_ref(&path)).unwrap();
    let offer = Offer::default();
    let end = tideover_exec::replace(&mut machine, &mut guest, &program, &offer, &mut |_: Step| {});
    assert!(matches!(end, Err(Fatal::NotOurs(_))), "{end:?}");
    assert!(!guest.resumed);
}
