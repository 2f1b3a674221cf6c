//! What a kernel or a VMM hands over, made out whole: sessions, files, memory, and what refers to what.
//!
//! The decoders of `abi` stop at the first fault, as whoever uses what he reads has to. Whoever looks wants to see the rest. A
//! [`Survey`] is read by the same decoders, going on: each fault becomes a [`Finding`] with the name of the
//! [rule](RULES) that is broken, and what can still be made out is shown.
//!
//! Lists of folios are read as a stream and summed up: what a survey takes is bounded by the tree of preserved memory and by
//! what is shown, however many folios there are; work is bounded by what the memory can hold. [`folios`] lists those of one
//! file.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod arena;
mod files;
mod findings;
mod marks;
mod model;
mod picture;
mod read;
mod records;
mod rules;
mod view;

use alloc::vec::Vec;

use abi::Memory;

pub use model::*;
pub use read::Folios;
pub use read::folios;
pub use rules::RULES;
pub use rules::Rule;
pub use rules::rule;

/// Where a state begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// With the root FDT at this address.
    Fdt(u64),
    /// With this root FDT, which was read from somewhere else.
    Blob(Vec<u8>),
    /// With the header of an arena, at address 0 of its region 0.
    Arena,
}

/// What is known of a source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// It is memory of a kernel that runs, which has used some of it for other things: what is wrong may be stale.
    pub running: bool,
    /// It holds parts alone: what is not there is out of reach, not broken.
    pub partial: bool,
}

impl Survey {
    /// Makes out the state in `memory`.
    pub fn read(memory: &impl Memory, root: &Root, options: Options) -> Self {
        read::read(memory, root, options)
    }
}
