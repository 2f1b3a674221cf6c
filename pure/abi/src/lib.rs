//! Every wire format of Tideover: the kernel's for Kexec Handover and the Live Update Orchestrator, and our own.
//!
//! One file holds one format, as types whose layout is the wire's, with encoding and decoding side by
//! side. Decoding works over any source of physical memory ([`Memory`]): an arena, a kernel's debugfs
//! files, a copy of a whole machine's memory. What is read is an allegation: a decoder checks each field
//! before it is used, bounds its work by what the memory can hold, and answers with a [`Malformed`] that
//! names format, place, field and fault. It never panics and never allocates what the input asked for.
//!
//! Who uses what is read stops at the first fault (`read`). Who only looks can have a reader go on behind it
//! ([`OnFault`]): it is the same reader.
//!
//! | file | format | whose |
//! | --- | --- | --- |
//! | [`arena`] | header of region 0: root slots, ownership word | ours |
//! | [`kho`], [`fdt`] | root FDT `kho-v4`, in a flattened device tree | the kernel's |
//! | [`radix`] | tree of preserved memory | the kernel's |
//! | [`vmalloc`] | list of scattered pages | the kernel's |
//! | [`block`], [`luo`], [`flb`] | sessions, files and what files share, `luo-v5` | the kernel's |
//! | [`memfd`], [`folio`] | a memfd, `memfd-v2`, and its folios | the kernel's |
//! | [`kexec_metadata`], [`memblock`] | which kernel handed over, and memory that was reserved by name | the kernel's |
//! | [`kvm_vm`], [`guest_memfd`] | a VM and its guest_memfd, `kvm_vm_luo_v1` and `guest_memfd_luo_v1` | the kernel series' |
//! | [`record`] | the fixed head of our own records | ours |
//! | [`regions`], [`gmem`], [`vm`], [`state`] | region table, guest memory, machine, state of a vCPU or device | ours |
//! | [`foreign`] | a descriptor that goes with the machine | ours |
//! | [`note`] | what a program says to the one after it, in a file of its own | ours |
//! | [`numa`] | NUMA policy inside the region table | ours |
//! | [`groups`] | typed groups inside a state | ours |
//!
//! Integers are little-endian. Structures are byte arrays with an alignment of one.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod arena;
pub mod block;
pub mod fdt;
pub mod flb;
pub mod folio;
pub mod foreign;
pub mod gmem;
pub mod groups;
pub mod guest_memfd;
pub mod kexec_metadata;
pub mod kho;
pub mod kvm_vm;
pub mod luo;
pub mod memblock;
pub mod memfd;
pub mod memory;
pub mod note;
pub mod numa;
pub mod radix;
pub mod record;
pub mod regions;
pub mod state;
pub mod text;
pub mod vm;
pub mod vmalloc;

pub use memory::Malformed;
pub use memory::Memory;
pub use memory::MemoryMut;
pub use memory::NoMemory;
pub use memory::OnFault;
pub use memory::Problem;
pub use memory::holds;
pub use memory::stop;
