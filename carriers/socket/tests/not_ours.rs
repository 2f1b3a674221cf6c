//! A process whose machine is another's by the time that it would seal it.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]

use std::convert::Infallible;
use std::thread;

use abi::Memory as _;
use abi::MemoryMut as _;
use abi::arena::OWNERSHIP_ADDRESS;
use fdpass::Channel;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::SessionName;
use machine::Spec;
use machine::StateName;
use machine::update::Guest;
use machine::update::Step;
use region::Arena;
use tideover_socket::Fatal;
use tideover_socket::Offer;
use tideover_socket::Successor;
use tideover_socket::Timeouts;

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
    let (ours, theirs) = Channel::pair().unwrap();
    let offer = Offer::default();
    let end = thread::scope(|scope| {
        scope.spawn(move || {
            let successor = Successor::greet(theirs, &[], Timeouts::default()).unwrap();
            successor.attach(&mut |_: Step| {}).unwrap().claim(&mut |_: Step| {}).unwrap_err()
        });
        let end = tideover_socket::hand_over(&mut machine, &mut guest, &ours, &offer, &mut |_: Step| {});
        drop(ours);
        end
    });
    assert!(matches!(end, Err(Fatal::NotOurs(_))), "{end:?}");
    assert!(!guest.resumed);
}
