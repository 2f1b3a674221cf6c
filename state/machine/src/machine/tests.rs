//! Writes to region 0 that fail, in the midst of what a machine does.

use std::os::fd::AsFd;

use faults::Fault;
use faults::FaultyMemory;
use faults::at_every_step;
use gmem::Freeze;

use super::*;
use crate::Incoming;
use crate::OfferedRegion;
use crate::update::Capabilities;
use abi::foreign::FdName;

const STATE: StateName = StateName::literal("vcpu0");

struct World {
    machine: Machine,
    _freeze: Freeze,
    fault: Fault,
}

/// A machine whose memory is frozen, of which a write to region 0 may fail.
fn world(fault: &Fault) -> World {
    let name = SessionName::literal("faults");
    let memory = MemorySpec { prefault: false, ..MemorySpec::new(MemoryName::literal("ram"), 2 << 20) };
    let spec = Spec { name, vcpus: 1, memories: vec![memory], states: vec![STATE] };
    let mut machine = Machine::create(&spec, &mut |_, _| {}).unwrap();
    let freeze = machine.memories[0].inode.freeze().unwrap();
    machine.kho.set_memory(Box::new(FaultyMemory::new(machine.arena.clone(), fault)));
    World { machine, _freeze: freeze, fault: fault.clone() }
}

fn seal(world: &mut World) -> Result<u32, SealError> {
    // More than a frame, so that there is a list of them.
    world.machine.seal(vec![(STATE, vec![7; 3 * PAGE_BYTES])])
}

/// What is known of it here. Where in region 0 it stands may be another place.
fn look(world: &World) -> (OwnershipWord, u64, usize, Vec<FdName>, bool, Vec<SessionName>) {
    let World { machine, .. } = world;
    let kept = machine.states.iter().filter(|file| file.saved().is_some()).count();
    let fds = machine.fds.iter().map(|fd| fd.record().name).collect();
    let sessions = machine.luo.outgoing_sessions().collect();
    (machine.word, machine.kho.free_frames(), kept, fds, machine.settled, sessions)
}

fn incoming(machine: &Machine) -> Incoming {
    let mut fds = machine.descriptors().unwrap();
    let sizes: Vec<u64> = machine.regions().map(Region::len_bytes).collect();
    let others = fds.split_off(sizes.len());
    let offered = fds.into_iter().zip(sizes).map(|(fd, len_bytes)| OfferedRegion { fd, len_bytes });
    Incoming::attach(offered.collect(), others).unwrap()
}

/// It can still go to somebody else, who finds all of it.
fn crosses(world: &mut World) {
    let epoch = seal(world).unwrap();
    let claimed = incoming(&world.machine).claim(epoch).unwrap();
    assert_eq!(claimed.states().get(&STATE), Some(&vec![7; 3 * PAGE_BYTES]));
}

/// R1.7: each write to region 0 fails once.
#[test]
fn a_seal_that_fails_anywhere_leaves_the_machine_running_and_to_be_sealed() {
    let steps = at_every_step(world, look, |world| seal(world).map(drop), crosses);
    assert!(steps > 10, "{steps}");
}

#[test]
fn a_descriptor_that_cannot_be_kept_for_a_write_that_fails_leaves_the_machine_without_it() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let all =
        Capabilities { other_descriptors: true, overlap: true, survives_crash: false, survives_kexec: false };
    let keep = |world: &mut World| world.machine.keep_fds(&[(FdName::literal("null"), null.as_fd())], &all);
    let steps = at_every_step(world, look, keep, crosses);
    assert!(steps > 0, "{steps}");
}

#[test]
fn a_machine_that_settles_at_the_second_try_is_whole() {
    let sealed = |fault: &Fault| {
        let mut world = world(&Fault::default());
        let epoch = seal(&mut world).unwrap();
        let mut machine = incoming(&world.machine).claim(epoch).unwrap().run().unwrap();
        let freeze = machine.memories[0].inode.freeze().unwrap();
        machine.kho.set_memory(Box::new(FaultyMemory::new(machine.arena.clone(), fault)));
        World { machine, _freeze: freeze, fault: fault.clone() }
    };
    let mut nth = 1;
    loop {
        let fault = Fault::default();
        let mut world = sealed(&fault);
        world.fault.arm(nth);
        let settled = world.machine.settle();
        let tripped = world.fault.disarm();
        assert_eq!(settled.is_err(), tripped, "{nth}: {settled:?}");
        if tripped {
            world.machine.settle().unwrap();
        }
        crosses(&mut world);
        if !tripped {
            break;
        }
        nth += 1;
    }
    assert!(nth > 3, "{nth}");
}
