//! A guest on real KVM that runs into the freeze of its memory.
#![expect(clippy::unwrap_used, reason = "a failed unwrap in a test is the test's failure")]
#![forbid(unsafe_code)]

mod ended;
mod rig;
mod taken;
mod unheld;
mod waits;
