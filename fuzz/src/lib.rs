//! Every decoder of Tideover, fed with whatever bytes.
//!
//! A [`Target`] is a function of any bytes at all: it decodes them, and looks that what it got is sound. It may refuse
//! them; it may not panic, hang, or take more memory than [`MOST_BYTES`]. Its [seeds](Target::seeds) come from the real
//! encoders, so that what mutates them starts deep inside.
//!
//! The kept [`corpus`] is replayed by a test of this crate. `cargo xtask fuzz` has libFuzzer look for more:
//! docs/fuzzing.md says how.
#![forbid(unsafe_code)]

pub mod corpus;
mod memory;
mod targets {
    pub(crate) mod arena;
    pub(crate) mod kernel;
    pub(crate) mod link;
    pub(crate) mod records;
    pub(crate) mod states;
}

use std::alloc::System;

use cap::Cap;
use targets::arena;
use targets::kernel;
use targets::link;
use targets::records;
use targets::states;

/// What one input may have a decoder take, in bytes: more than the largest payload of any record, which is read before its
/// checksum is known, and far less than a length in an input can say.
pub const MOST_BYTES: usize = 32 << 20;

/// The allocator of whoever runs targets: who sets a limit has an allocation over it fail, and with it the process.
pub static ALLOCATOR: &Cap<System> = &COUNTED;

#[global_allocator]
static COUNTED: Cap<System> = Cap::new(System, usize::MAX);

/// A decoder, as a function of bytes.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// What it is called: a word.
    pub name: &'static str,
    /// Decodes an input. True if there was something in it to decode.
    pub run: fn(&[u8]) -> bool,
    /// Inputs that decode.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 20] = [
    Target { name: "arena", run: arena::header, seeds: arena::seeds },
    Target { name: "attach", run: arena::attach, seeds: arena::seeds },
    Target { name: "fdt", run: kernel::fdt, seeds: kernel::fdt_seeds },
    Target { name: "radix", run: kernel::radix, seeds: kernel::radix_seeds },
    Target { name: "vmalloc", run: kernel::vmalloc, seeds: kernel::vmalloc_seeds },
    Target { name: "luo", run: kernel::luo, seeds: kernel::luo_seeds },
    Target { name: "memfd", run: kernel::memfd, seeds: kernel::memfd_seeds },
    Target { name: "kvm_vm", run: kernel::kvm_vm, seeds: kernel::kvm_vm_seeds },
    Target { name: "guest_memfd", run: kernel::guest_memfd, seeds: kernel::guest_memfd_seeds },
    Target { name: "kexec_metadata", run: kernel::kexec_metadata, seeds: kernel::kexec_metadata_seeds },
    Target { name: "memblock", run: kernel::memblock, seeds: kernel::memblock_seeds },
    Target { name: "survey", run: arena::survey, seeds: arena::survey_seeds },
    Target { name: "gmem", run: records::gmem, seeds: records::gmem_seeds },
    Target { name: "regions", run: records::regions, seeds: records::regions_seeds },
    Target { name: "vm", run: records::vm, seeds: records::vm_seeds },
    Target { name: "state", run: records::state, seeds: records::state_seeds },
    Target { name: "foreign", run: records::foreign, seeds: records::foreign_seeds },
    Target { name: "note", run: records::note, seeds: records::note_seeds },
    Target { name: "groups", run: states::groups, seeds: states::seeds },
    Target { name: "offer", run: link::offer, seeds: link::seeds },
];

/// The target of this name.
pub fn target(name: &str) -> Option<&'static Target> {
    const ALL: &[Target] = &TARGETS;
    ALL.iter().find(|target| target.name == name)
}
