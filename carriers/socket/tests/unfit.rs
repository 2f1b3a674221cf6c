//! A machine whose memory cannot go: the update is off before anybody is told of it.

use std::convert::Infallible;

use fdpass::Channel;
use gmem::Sharing;
use gmem::UnfitError;
use machine::Machine;
use machine::MemoryName;
use machine::MemorySpec;
use machine::SessionName;
use machine::Spec;
use machine::StateName;
use machine::update::DepartureError;
use machine::update::Guest;
use machine::update::Step;
use tideover_socket::Offer;
use tideover_socket::Outcome;
use tideover_socket::Reason;

/// A guest that is left alone.
struct Untouched;

impl Guest for Untouched {
    type Error = Infallible;

    fn pause(&mut self) -> Result<(), Infallible> {
        panic!("it is paused")
    }

    fn save(&mut self) -> Result<Vec<(StateName, Vec<u8>)>, Infallible> {
        panic!("it is saved")
    }

    fn resume(&mut self) -> Result<(), Infallible> {
        panic!("it is resumed")
    }
}

/// R1.6, O1.6.
#[test]
fn memory_that_cannot_go_is_refused_before_the_successor_hears_a_word() {
    let name = SessionName::new(b"unfit").unwrap();
    let memory = MemorySpec::new(MemoryName::literal("ram"), 2 << 20);
    let spec = Spec { name, vcpus: 1, memories: vec![memory], states: vec![] };
    let mut machine = Machine::create(&spec, &mut |_, _| {}).unwrap();
    machine.memories()[0].inode.converted(4096, 4096, Sharing::Private).unwrap();
    let (ours, theirs) = Channel::pair().unwrap();
    let offer = Offer::default();
    let mut steps = Vec::new();
    let mut note = |step: Step| steps.push(step);
    let end = tideover_socket::hand_over(&mut machine, &mut Untouched, &ours, &offer, &mut note).unwrap();
    let refused = match end {
        Outcome::RolledBack {
            reason: Reason::Departure(DepartureError::Memory(refused)),
            pause: None,
            ..
        } => refused,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused, UnfitError::Private { offset_bytes: 4096, .. }), "{refused:?}");
    assert!(!steps.contains(&Step::Paused) && !steps.contains(&Step::Received), "{steps:?}");
    assert!(!machine.memories()[0].inode.is_frozen());
    drop(theirs);
}
