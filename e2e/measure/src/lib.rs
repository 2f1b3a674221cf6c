//! What the benches share.
//!
//! - [`numbers`]: medians, how far they can be trusted, and slopes.
//! - [`chain`]: a machine and the VMMs that run it one after another, each a process of its own, as an operator
//!   has it. All that is ours is in there.
//! - [`plain`]: the same guest on plain shared memory in a VM of this process: what ours is measured against.
//! - [`quiet`]: waiting until the rest of the machine is quiet.
//!
//! One guest runs at a time. The other one is [held](chain::Chain::hold) or [stopped](plain::Plain::stop) and
//! uses no processor, so that neither is measured beside the other.
#![forbid(unsafe_code)]

pub mod chain;
pub mod numbers;
pub mod plain;
pub mod quiet;
