//! Faults of real memory, on this machine's kernel.

#![expect(
    unsafe_code,
    clippy::unwrap_used,
    reason = "mapping memory is for this ring to do; a failed unwrap in a test is the test's failure"
)]

mod hold;
mod memory;
mod populate;
