//! A machine for a test, and what both sides of an update do with it.

use std::os::fd::AsFd;
use std::sync::Arc;

use gmem::Freeze;
use gmem::Inode;
use tideover_machine::Machine;
use tideover_machine::MemoryName;
use tideover_machine::MemorySpec;
use tideover_machine::OfferedRegion;
use tideover_machine::SessionName;
use tideover_machine::Spec;
use tideover_machine::StateName;

pub(crate) type States = Vec<(StateName, Vec<u8>)>;

/// A machine of this name with a piece of memory for each size, in MiB, and these states.
pub(crate) fn spec(name: &str, memories_mib: &[u64], states: &[&str]) -> Spec {
    let memory = |(index, mib): (usize, &u64)| {
        let name = MemoryName::new(format!("ram{index}").as_bytes()).unwrap();
        MemorySpec { prefault: false, ..MemorySpec::new(name, mib << 20) }
    };
    Spec {
        name: SessionName::new(name.as_bytes()).unwrap(),
        vcpus: 3,
        memories: memories_mib.iter().enumerate().map(memory).collect(),
        states: states.iter().map(|name| StateName::new(name.as_bytes()).unwrap()).collect(),
    }
}

/// Such a machine, with something in its memory.
pub(crate) fn machine(spec: &Spec) -> Machine {
    let machine = Machine::create(spec, &mut |_, _| {}).unwrap();
    let memories: Vec<_> = inodes(&machine);
    fill(&memories);
    machine
}

pub(crate) fn inodes(machine: &Machine) -> Vec<Arc<Inode>> {
    machine.memories().iter().map(|memory| Arc::clone(&memory.inode)).collect()
}

/// Offsets of the bytes that a test writes in a piece of memory: both ends, and some between.
fn offsets(inode: &Inode) -> impl Iterator<Item = u64> {
    let last = inode.size_bytes() - 8;
    (0..last).step_by(0x3_5008).chain([last])
}

fn pattern(inode: &Inode, offset: u64) -> [u8; 8] {
    (offset ^ inode.frames().start().get() << 20 ^ 0x5EED).to_le_bytes()
}

pub(crate) fn fill(memories: &[Arc<Inode>]) {
    for inode in memories {
        offsets(inode).for_each(|offset| inode.mapping().write(offset, &pattern(inode, offset)).unwrap());
    }
}

/// Every byte that [`fill`] wrote is there.
#[track_caller]
pub(crate) fn assert_filled(memories: &[Arc<Inode>]) {
    for inode in memories {
        for offset in offsets(inode) {
            let mut read = [0; 8];
            inode.mapping().read(offset, &mut read).unwrap();
            assert_eq!(read, pattern(inode, offset), "{} at {offset:#x}", inode.name());
        }
    }
}

/// The machine's descriptors as another process would get them.
pub(crate) fn offered(machine: &Machine) -> Vec<OfferedRegion> {
    let offer = |region: &region::Region| OfferedRegion {
        fd: region.as_fd().try_clone_to_owned().unwrap(),
        len_bytes: region.len_bytes(),
    };
    machine.regions().map(offer).collect()
}

pub(crate) fn freeze(memories: &[Arc<Inode>]) -> Vec<Freeze> {
    memories.iter().map(|inode| inode.freeze().unwrap()).collect()
}

/// A state for each name, of `len_bytes` bytes that tell states and seeds apart.
pub(crate) fn states(names: impl Iterator<Item = StateName>, len_bytes: usize, seed: usize) -> States {
    let bytes =
        |index: usize| (0..len_bytes).map(|at| (at * 31 + index * 7 + seed).to_le_bytes()[0]).collect();
    names.enumerate().map(|(index, name)| (name, bytes(index))).collect()
}
